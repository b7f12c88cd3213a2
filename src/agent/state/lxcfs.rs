//! The serving lxcfs as the agent's state sees it: searches, changes and sweeps.

use std::time::{Duration, Instant};

use super::State;
use crate::{plan::DesiredView, telemetry::Backoff};

/// The delay before the next search for an absent lxcfs.
pub(super) const LXCFS_RETRY: Backoff =
    Backoff::new(Duration::from_secs(1), Duration::from_secs(30));

/// The state of the serving lxcfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LxcfsState {
    Unknown,
    Finding { attempt: u32 },
    Serving,
    Absent { attempt: u32, retry_at: Instant },
}

impl State {
    /// A sweep starts; see [`State::sweep_finished`].
    pub fn sweep_started(&mut self) {
        self.sweeps += 1;
    }

    /// A sweep has finished.
    pub fn sweep_finished(&mut self) {
        self.sweeps -= 1;
    }

    /// Takes the result of [`find_lxcfs`](super::Actions::find_lxcfs).
    pub fn lxcfs_found(&mut self, found: Result<(), String>, now: Instant) {
        let LxcfsState::Finding { attempt } = self.lxcfs else { return };
        let Err(why) = found else {
            self.lxcfs = LxcfsState::Serving;
            for c in self.containers.values_mut() {
                if std::mem::take(&mut c.adoption_pending) {
                    c.requeue();
                }
            }
            return;
        };
        self.lxcfs =
            LxcfsState::Absent { attempt: attempt + 1, retry_at: now + LXCFS_RETRY.delay(attempt) };
        // One failure is a restart of lxcfs, which needs no event on every pod that starts in
        // between.
        if attempt == 0 {
            return;
        }
        for c in self.containers.values_mut().filter(|c| c.needs_reconcile() && c.needs_lxcfs()) {
            if let Some(pod) = self.pods.get_mut(&c.pod) {
                c.report_error(why.clone(), |name, why| pod.report.add_failed(name, why));
            }
        }
        self.flush_reports();
    }

    /// Whether this is the first search for lxcfs since it served.
    pub fn is_first_search(&self) -> bool {
        matches!(self.lxcfs, LxcfsState::Finding { attempt: 0 })
    }

    /// The lxcfs that was found is released: the next operation that needs one requests a search.
    pub fn lxcfs_released(&mut self) {
        if self.lxcfs == LxcfsState::Serving {
            self.lxcfs = LxcfsState::Unknown;
        }
    }

    /// The serving lxcfs changed: what was known of it is outdated, and every view is reconciled
    /// again.
    pub fn lxcfs_changed(&mut self) {
        self.lxcfs = LxcfsState::Unknown;
        let has_view = |desired: Option<DesiredView>| {
            desired.is_some_and(|desired| desired != DesiredView::Absent)
        };
        for c in self.containers.values_mut() {
            if c.adopt || c.needs_lxcfs() || has_view(c.applied) || has_view(c.in_flight) {
                c.requeue();
            }
        }
    }
}
