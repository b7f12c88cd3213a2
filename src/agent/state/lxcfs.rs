//! The serving lxcfs as the agent's state sees it: searches, changes and sweeps.

use std::time::{Duration, Instant};

use super::{State, container::Container};
use crate::{plan::DesiredView, telemetry::Backoff};

/// The delay before the next search for an absent lxcfs.
pub(super) const LXCFS_RETRY: Backoff =
    Backoff::new(Duration::from_secs(1), Duration::from_secs(30));

/// How long lxcfs may be missing before pods get an Event: it may be restarting, which needs no
/// attention of a pod's owner.
pub(super) const REPORT_AFTER: Duration = Duration::from_secs(30);

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
            self.missing = None;
            LxcfsState::Available
        } else {
            // While a view waits for lxcfs, searches come more often than this. A failure after a
            // longer pause is another outage: nothing has searched since the end of the first.
            let same_outage =
                |(_, last): &(Instant, Instant)| now < *last + 2 * LXCFS_RETRY.longest;
            let since = self.missing.filter(same_outage).map_or(now, |(since, _)| since);
            self.missing = Some((since, now));
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

    /// Whether a missing lxcfs is reported on pods at `now`: not while it may be restarting.
    pub(super) fn reports_missing_lxcfs(&self, now: Instant) -> bool {
        self.missing.is_some_and(|(since, _)| now >= since + REPORT_AFTER)
    }

    /// The serving lxcfs changed: what was known of it is outdated, and every view is reconciled
    /// again. It is still missing until a search finds it, and an exit starts no new grace period.
    /// If a supervisor remounts the views, the containers that have one are reconciled after
    /// `recovered`.
    pub fn lxcfs_changed(&mut self, recovered: Option<Instant>) {
        self.lxcfs = LxcfsState::Available;
        let has_view = |desired: Option<DesiredView>| {
            desired.is_some_and(|desired| desired != DesiredView::Absent)
        };
        for c in self.containers.all_mut() {
            if c.adopt
                || c.needs_lxcfs()
                || has_view(c.applied)
                || has_view(c.in_flight.map(|operation| operation.desired))
            {
                let rests_with_view = c.in_flight.is_none() && has_view(c.applied);
                let until = recovered.filter(|_| rests_with_view).or(c.deferred());
                c.requeue();
                c.defer(until);
            }
        }
    }

    /// The serving lxcfs has become read-only, so that it serves `cpu` too: the containers without
    /// it are reconciled again.
    pub fn lxcfs_read_only(&mut self) {
        let skips = |c: &Container| {
            c.skips_writable || c.in_flight.is_some_and(|operation| operation.with_lxcfs)
        };
        self.containers.all_mut().filter(|c| skips(c)).for_each(Container::requeue);
    }
}
