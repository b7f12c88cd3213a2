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
    /// It serves as far as is known: operations search for it.
    Available,
    /// The last searches failed. Operations that need it wait for `retry_at`.
    Absent { failures: u32, retry_at: Instant },
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

    /// Takes the result of an operation's search for lxcfs. Returns whether it is the first failure
    /// since lxcfs served.
    pub fn lxcfs_searched(&mut self, found: bool, now: Instant) -> bool {
        let failures = match self.lxcfs {
            LxcfsState::Available => 0,
            LxcfsState::Absent { failures, .. } => failures,
        };
        self.lxcfs = if found {
            LxcfsState::Available
        } else {
            let retry_at = now + LXCFS_RETRY.delay(failures);
            LxcfsState::Absent { failures: failures + 1, retry_at }
        };
        !found && failures == 0
    }

    /// Whether an operation may search for lxcfs and inject at `now`.
    pub(super) fn lxcfs_usable(&self, now: Instant) -> bool {
        let due = match self.lxcfs {
            LxcfsState::Available => true,
            LxcfsState::Absent { retry_at, .. } => retry_at <= now,
        };
        due && self.sweeps == 0
    }

    /// Whether a missing lxcfs is reported on pods. One failed search is a restart of lxcfs, which
    /// needs no event on every pod that starts in between.
    pub(super) fn reports_missing_lxcfs(&self) -> bool {
        matches!(self.lxcfs, LxcfsState::Absent { failures: 2.., .. })
    }

    /// The serving lxcfs changed: what was known of it is outdated, and every view is reconciled
    /// again.
    pub fn lxcfs_changed(&mut self) {
        self.lxcfs = LxcfsState::Available;
        let has_view = |desired: Option<DesiredView>| {
            desired.is_some_and(|desired| desired != DesiredView::Absent)
        };
        for c in self.containers.values_mut() {
            if c.adopt
                || c.needs_lxcfs()
                || has_view(c.applied)
                || has_view(c.in_flight.map(|operation| operation.desired))
            {
                c.requeue();
            }
        }
    }
}
