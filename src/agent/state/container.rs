//! One container as the agent's state sees it.

use std::time::{Duration, Instant};

use super::{CONTAINER_RETRY, Completion};
use crate::{
    agent::pod_events::{PodReport, describe_skipped},
    model::container_id::ContainerId,
    model::{
        pod::{Pod, Trigger},
        status::{ContainerState, ContainerStatus, DesiredStatus, FailureReason},
        view::FileSet,
    },
    plan::{DesiredView, SkipReason, Step},
};

/// For the pod's owner. The cause, with advice for the node's administrator, is in the log.
const NO_LXCFS: &str = "no lxcfs serves on this node; the view is injected as soon as one does";

#[derive(Debug)]
pub(super) struct Container {
    /// The uid of its pod.
    pub(super) pod: String,
    pub(super) name: String,
    /// As in [`super::StateConfig`].
    pub(super) adopt: bool,
    pub(super) desired: DesiredView,
    /// The desired view that was last reached.
    pub(super) applied: Option<DesiredView>,
    pub(super) in_flight: Option<InFlight>,
    /// With adoption: its last operation had no lxcfs, so another follows when there is one.
    pub(super) adoption_pending: bool,
    /// A file was skipped because lxcfs is writable.
    pub(super) skips_writable: bool,
    /// The number of retries so far, and the time of the next. None so far: see
    /// [`Container::defer`].
    pub(super) retry: Option<(u32, Instant)>,
    /// The last error that an event reported, so that retries do not repeat it.
    pub(super) reported_error: Option<(FailureReason, String)>,
    /// Its first process, where the runtime reported it.
    pub(super) pid: Option<i64>,
    /// The source that first reported the desired view, and when; until the view is injected.
    pub(super) triggered: Option<(Trigger, Instant)>,
}

/// The operation of a container that is in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub(super) desired: DesiredView,
    /// It has, or searches for, the serving lxcfs.
    pub(super) with_lxcfs: bool,
    /// It may have used outdated facts, so another operation follows it.
    pub(super) dirty: bool,
}

impl Container {
    /// Whether an operation is to start.
    pub(super) fn needs_reconcile(&self) -> bool {
        let reached = (self.desired == DesiredView::Unmanaged && !self.adopt)
            || self.applied == Some(self.desired);
        self.in_flight.is_none() && !reached
    }

    /// Whether no operation is in flight or to start.
    pub(super) fn is_at_rest(&self) -> bool {
        self.in_flight.is_none() && !self.needs_reconcile()
    }

    /// Whether an operation needs the serving lxcfs; a removal does not.
    pub(super) fn needs_lxcfs(&self) -> bool {
        !matches!(self.desired, DesiredView::Absent | DesiredView::Unmanaged)
    }

    /// Whether the next operation waits until lxcfs is usable.
    pub(super) fn waits_for_lxcfs(&self) -> bool {
        self.needs_lxcfs() || self.adoption_pending
    }

    /// Queues the container again, because the facts changed: lxcfs, or its process.
    pub(super) fn requeue(&mut self) {
        self.applied = None;
        self.retry = None;
        if let Some(in_flight) = &mut self.in_flight {
            in_flight.dirty = true;
        }
    }

    /// Makes the next operation start at this time, if any. Until then the supervisor of lxcfs is
    /// at work in the container.
    pub(super) fn defer(&mut self, until: Option<Instant>) {
        self.retry = until.map(|until| (0, until));
    }

    /// The time of [`Container::defer`].
    pub(super) fn deferred(&self) -> Option<Instant> {
        self.retry.filter(|(attempts, _)| *attempts == 0).map(|(_, until)| until)
    }

    /// Whether its last operation failed.
    pub(super) fn waits_for_retry(&self) -> bool {
        self.retry.is_some_and(|(attempts, _)| attempts > 0)
    }

    fn schedule_retry(&mut self, now: Instant) {
        let attempt = self.retry.map_or(0, |(attempt, _)| attempt);
        self.retry = Some((attempt + 1, now + CONTAINER_RETRY.delay(attempt)));
        self.applied = None;
    }

    fn set_applied(&mut self, desired: DesiredView) {
        self.applied = Some(desired);
        self.retry = None;
    }

    /// Takes the completion of the operation `in_flight`, and adds to the report of the pod.
    /// Returns the latency of a view that it injected.
    pub(super) fn complete(
        &mut self,
        InFlight { desired, with_lxcfs, dirty }: InFlight,
        completion: Completion,
        report: &mut PodReport,
        report_lxcfs: bool,
        now: Instant,
    ) -> Option<(Trigger, Duration)> {
        let mut latency = None;
        match completion {
            Completion::Applied { done, skipped, view } => {
                report.add_steps(&self.name, &done);
                self.skips_writable =
                    skipped.iter().any(|(_, why)| *why == SkipReason::WritableLxcfs);
                if let Some((trigger, at)) = self.triggered.take()
                    && done.iter().any(|step| matches!(step, Step::Inject(_)))
                {
                    latency = Some((trigger, now.saturating_duration_since(at)));
                }
                if matches!(desired, DesiredView::Exactly(_)) && view.is_empty() {
                    let skipped: Vec<String> = skipped.iter().map(describe_skipped).collect();
                    let why = format!("no view file was injected; skipped: {}", skipped.join(", "));
                    self.report_error(FailureReason::FilesSkipped, why, |c, why| {
                        report.add_failed(c, why);
                    });
                } else {
                    self.reported_error = None;
                    if !skipped.is_empty() {
                        report.add_skipped(&self.name, &skipped);
                    }
                }
                self.set_applied(desired);
                self.adoption_pending = self.adopt && !with_lxcfs;
                if self.adoption_pending {
                    self.applied = None;
                }
            }
            Completion::Failed { done, why } => {
                report.add_steps(&self.name, &done);
                // Outdated facts may be the cause, for example an lxcfs that exited in between.
                if !dirty {
                    self.report_error(FailureReason::StepFailed, why, |c, why| {
                        report.add_failed(c, why);
                    });
                }
                self.schedule_retry(now);
            }
            Completion::TimedOut { why } => {
                self.report_error(FailureReason::TimedOut, why, |c, why| report.add_failed(c, why));
                return None;
            }
            Completion::NotRunning => self.schedule_retry(now),
            Completion::NoLxcfs => {
                if report_lxcfs && self.needs_lxcfs() && !dirty {
                    self.report_error(FailureReason::NoLxcfs, NO_LXCFS.to_owned(), |c, why| {
                        report.add_failed(c, why);
                    });
                }
                self.applied = None;
            }
            Completion::Unsupported { why } => {
                // Without a desired view there is no failure to report.
                if desired != DesiredView::Absent {
                    self.report_error(FailureReason::Unsupported, why, |c, why| {
                        report.add_unsupported(c, why);
                    });
                }
                self.set_applied(desired);
            }
        }
        self.in_flight = None;
        if dirty {
            self.applied = None;
            self.retry = None;
        }
        latency
    }

    /// Reports an error unless it is the last one that was reported.
    pub(super) fn report_error(
        &mut self,
        reason: FailureReason,
        why: String,
        add: impl FnOnce(&str, String),
    ) {
        if self.reported_error.as_ref().is_none_or(|(_, reported)| *reported != why) {
            add(&self.name, why.clone());
            self.reported_error = Some((reason, why));
        }
    }

    /// Its status, if its pod wants a view for it or has invalid annotations.
    pub(super) fn status(
        &self,
        id: &ContainerId,
        pod: &Pod,
        has_invalid_annotations: bool,
    ) -> Option<ContainerStatus> {
        let (files, state) = match self.desired {
            DesiredView::Absent => return None,
            DesiredView::Unmanaged if !has_invalid_annotations => return None,
            DesiredView::Unmanaged => ("keep".to_owned(), ContainerState::Skipped),
            DesiredView::Exactly(files) | DesiredView::AtLeast(files) => {
                let state = match (self.applied == Some(self.desired), &self.reported_error) {
                    (true, None) => ContainerState::Injected,
                    (true, Some(_)) => ContainerState::Skipped,
                    (false, Some(_)) => ContainerState::Failed,
                    (false, None) => ContainerState::Pending,
                };
                (if files == FileSet::ALL { "all".to_owned() } else { files.to_string() }, state)
            }
        };
        let reported = self.reported_error.as_ref();
        let reason = match state {
            ContainerState::Skipped | ContainerState::Failed => {
                Some(reported.map_or(FailureReason::InvalidAnnotation, |(reason, _)| *reason))
            }
            ContainerState::Injected | ContainerState::Pending => None,
        };
        let why = reported.map(|(_, why)| why.clone());
        Some(ContainerStatus {
            namespace: pod.namespace.clone(),
            pod: pod.name.clone(),
            container: self.name.clone(),
            id: id.clone(),
            desired: DesiredStatus { files, state, why, reason },
        })
    }
}
