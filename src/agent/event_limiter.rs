//! Limits the events of each pod, so that a user who edits annotations in a loop floods neither the
//! API server nor the log. Pure: the time is passed in.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// The number of events that a pod may have in a row.
const BURST: u32 = 10;
/// The time after which a pod may have another one.
const REFILL: Duration = Duration::from_secs(60);

/// A token bucket for each pod, by uid.
#[derive(Debug, Default)]
pub(super) struct EventLimiter {
    buckets: HashMap<String, Bucket>,
}

#[derive(Debug)]
struct Bucket {
    tokens: u32,
    /// The time of the last refill.
    refilled: Instant,
    /// The events since the last admitted one.
    suppressed: u64,
}

/// The decision about an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Publish it. `suppressed` events of the pod were not, since the last one that was.
    Admitted { suppressed: u64 },
    /// Do not publish it. `first` since the last one that was published.
    Suppressed { first: bool },
}

impl EventLimiter {
    /// Takes a token of the pod, if it has one.
    pub(super) fn admit(&mut self, uid: &str, now: Instant) -> Verdict {
        let new = || Bucket { tokens: BURST, refilled: now, suppressed: 0 };
        let bucket = self.buckets.entry(uid.to_owned()).or_insert_with(new);
        bucket.refill(now);
        if let Some(left) = bucket.tokens.checked_sub(1) {
            bucket.tokens = left;
            Verdict::Admitted { suppressed: std::mem::take(&mut bucket.suppressed) }
        } else {
            bucket.suppressed += 1;
            Verdict::Suppressed { first: bucket.suppressed == 1 }
        }
    }

    /// Forgets the pods whose buckets are full: they are as new ones.
    pub(super) fn prune(&mut self, now: Instant) {
        self.buckets.retain(|_, bucket| {
            bucket.refill(now);
            bucket.tokens < BURST
        });
    }
}

impl Bucket {
    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.refilled);
        let due = u32::try_from(elapsed.as_secs() / REFILL.as_secs()).unwrap_or(u32::MAX);
        self.tokens = self.tokens.saturating_add(due).min(BURST);
        if self.tokens == BURST {
            self.refilled = now;
        } else {
            self.refilled += REFILL * due;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn burst_is_admitted_then_one_per_minute() {
        let (mut limiter, started) = (EventLimiter::default(), Instant::now());
        let mut admit =
            |uid: &str, seconds| limiter.admit(uid, started + Duration::from_secs(seconds));
        for _ in 0..10 {
            assert_eq!(admit("a", 0), Verdict::Admitted { suppressed: 0 });
        }
        for n in 0..290 {
            assert_eq!(admit("a", n / 10), Verdict::Suppressed { first: n == 0 });
        }
        assert_eq!(admit("b", 30), Verdict::Admitted { suppressed: 0 }, "another pod");
        assert_eq!(admit("a", 61), Verdict::Admitted { suppressed: 290 });
        assert_eq!(admit("a", 119), Verdict::Suppressed { first: true });
        assert_eq!(admit("a", 120), Verdict::Admitted { suppressed: 1 });
    }

    #[test]
    fn quiet_pod_is_forgotten() {
        let (mut limiter, started) = (EventLimiter::default(), Instant::now());
        limiter.admit("a", started);
        limiter.prune(started + Duration::from_secs(59));
        assert_eq!(limiter.buckets.len(), 1);
        limiter.prune(started + Duration::from_secs(60));
        assert!(limiter.buckets.is_empty());
    }

    proptest! {
        #[test]
        fn admitted_events_are_bounded(gaps in vec(0..100_u64, 0..300), prune: bool) {
            let (mut limiter, started) = (EventLimiter::default(), Instant::now());
            let (mut elapsed, mut admitted, mut suppressed) = (0, 0, 0);
            for gap in gaps.iter().copied() {
                elapsed += gap;
                let now = started + Duration::from_secs(elapsed);
                if prune {
                    limiter.prune(now);
                }
                match limiter.admit("a", now) {
                    Verdict::Admitted { suppressed: before } => {
                        prop_assert!(before == suppressed || prune, "{before} of {suppressed}");
                        (admitted, suppressed) = (admitted + 1, 0);
                    }
                    Verdict::Suppressed { first } => {
                        prop_assert_eq!(first, suppressed == 0);
                        suppressed += 1;
                    }
                }
                prop_assert!(admitted <= u64::from(BURST) + elapsed / REFILL.as_secs());
            }
        }
    }
}
