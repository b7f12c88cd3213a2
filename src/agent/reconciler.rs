//! The agent's effects, each a spawned task that reports to the loop with a [`Message`].

use std::{
    collections::HashSet,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt, future::BoxFuture};
use tokio::sync::{Semaphore, mpsc};

use super::{
    MAX_CONCURRENT, Message,
    state::{Completion, Operation},
};
use crate::{
    lxcfs::{self, Acquired, SharedLxcfs},
    model::{container_id::ContainerId, status::Operation as OperationKind, view::FileSet},
    mount::{self, JobTimeout, LxcfsFiles, Outcome, Task, WorkError, Workers},
    node::{self, PassSummary},
    runtime::{self, Runtime},
    sys::{
        mountinfo::Dev,
        process::{Process, ProcessError},
    },
};

/// The dependencies of an operation.
#[derive(Clone)]
pub(super) struct Reconciler {
    workers: Workers,
    runtime: Runtime,
    lxcfs: SharedLxcfs,
    adopt: bool,
    permits: Arc<Semaphore>,
    /// For operations that block a start: they do not wait for those that do not.
    start_permits: Arc<Semaphore>,
    tx: mpsc::Sender<Message>,
}

impl Reconciler {
    pub(super) fn new(
        workers: Workers,
        runtime: Runtime,
        lxcfs: SharedLxcfs,
        adopt: bool,
        tx: mpsc::Sender<Message>,
    ) -> Reconciler {
        Reconciler {
            workers,
            runtime,
            lxcfs,
            adopt,
            permits: Arc::new(Semaphore::new(MAX_CONCURRENT)),
            start_permits: Arc::new(Semaphore::new(MAX_CONCURRENT)),
            tx,
        }
    }

    /// Reconciles one container. `generation` is that of the loop's knowledge of lxcfs. The runtime
    /// waits for an operation that blocks a start.
    pub(super) fn spawn(&self, operation: Operation, generation: u64, blocks_start: bool) {
        let Reconciler { workers, runtime, lxcfs, adopt, permits, start_permits, tx } =
            self.clone();
        let (permits, workers) =
            if blocks_start { (start_permits, workers.urgent()) } else { (permits, workers) };
        tokio::spawn(async move {
            let Operation { id, desired, name, pid, with_lxcfs } = operation;
            let started = Instant::now();
            tracing::debug!(container = name, %id, ?desired, "operation started");
            let finished = |completion, elapsed| {
                let id = id.clone();
                tx.send(Message::OperationFinished { id, desired, completion, elapsed })
            };
            let mut process = None;
            // Without a permit: a hung lxcfs must not keep removals from starting.
            let lxcfs = if with_lxcfs {
                // While a thread searches for lxcfs, there is time for the process.
                let during_search = async {
                    if blocks_start {
                        process = Some(find_process(&runtime, &id, pid).await);
                    }
                };
                let (Acquired { lxcfs, searched }, ()) =
                    tokio::join!(lxcfs.acquire(), during_search);
                if searched {
                    let found = lxcfs.as_ref().map(drop).map_err(Arc::clone);
                    let _ = tx.send(Message::LxcfsSearched { generation, found }).await;
                }
                match lxcfs {
                    Ok(lxcfs) => Some(lxcfs),
                    Err(_) => {
                        let _ = finished(Completion::NoLxcfs, started.elapsed()).await;
                        return;
                    }
                }
            } else {
                None
            };
            let permit = permits.acquire_owned().await;
            let started = Instant::now();
            let task = Task::Reconcile { desired, lxcfs, adopt, fresh: blocks_start };
            let process = match process {
                Some(process) => process,
                None => find_process(&runtime, &id, pid).await,
            };
            let (completion, pending) = match process {
                Err(e) => (e.into(), None),
                Ok(process) => match mount::reconcile(&workers, process, task).await {
                    Ok(reconciled) => (reconciled.into(), None),
                    Err(JobTimeout { error, result }) => {
                        (Completion::TimedOut { why: for_owner(&error) }, Some(result))
                    }
                },
            };
            log_changes(&name, &completion, started.elapsed());
            // A hung operation holds no permit.
            drop(permit);
            let _ = finished(completion, started.elapsed()).await;
            let completion = match pending {
                None => return,
                Some(Some(result)) => match result.await {
                    Ok(reconciled) => complete_late(reconciled),
                    Err(_) => Completion::Failed {
                        done: Vec::new(),
                        why: for_owner(&WorkError::Panicked),
                    },
                },
                // It was not started, or it panicked.
                Some(None) => Completion::NotRunning,
            };
            let elapsed = started.elapsed();
            tracing::debug!(container = name, ?completion, ?elapsed, "hung operation finished");
            let _ = finished(completion, elapsed).await;
        });
    }

    /// Makes the next operation search for lxcfs again. Returns the one that operations hold.
    pub(super) fn invalidate_lxcfs(&self) -> Option<Arc<LxcfsFiles>> {
        self.lxcfs.invalidate()
    }

    /// Removes the view files of this lxcfs, which has exited or hangs, from every container.
    pub(super) fn sweep(&self, dev: Dev) {
        let reconciler = self.clone();
        tokio::spawn(async move {
            let Reconciler { workers, lxcfs, .. } = &reconciler;
            let serving = lxcfs::identify(lxcfs.path());
            let swept = if serving.is_some_and(|serving| serving.dev == dev) {
                // It is still mounted, or another lxcfs has its device number: the kernel gives
                // that away as soon as no mount is left, and not before.
                reconciler.sweep_disconnected().await
            } else {
                node::sweep(workers, HashSet::from([dev])).await
            };
            reconciler.sweep_finished(&swept).await;
        });
    }

    /// Removes the view files of every lxcfs that has exited, and of the one at the lxcfs path if
    /// it hangs.
    pub(super) fn sweep_dead(&self) {
        let reconciler = self.clone();
        tokio::spawn(async move {
            let swept = reconciler.sweep_disconnected().await;
            reconciler.sweep_finished(&swept).await;
        });
    }

    async fn sweep_disconnected(&self) -> io::Result<PassSummary> {
        let found = self.lxcfs.acquire().await.lxcfs.map(drop);
        let hangs = found.is_err_and(|e| matches!(*e, lxcfs::Error::Hung { .. }));
        let at_path = lxcfs::identify(self.lxcfs.path()).filter(|_| hangs);
        node::sweep_dead(&self.workers, at_path.map(|identity| identity.dev)).await
    }

    async fn sweep_finished(&self, swept: &io::Result<PassSummary>) {
        node::log_sweep(swept);
        // A sweep that failed as a whole counts as one.
        let failures = swept.as_ref().map_or(1, |summary| summary.failed);
        let _ = self.tx.send(Message::SweepFinished { failures }).await;
    }

    /// Sends [`Message::SweepDue`] after `delay`.
    pub(super) fn sweep_later(&self, dev: Dev, delay: Duration) {
        let tx = self.tx.clone();
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let _ = tx.send(Message::SweepDue(dev)).await;
        });
    }
}

/// [`Runtime::process`], whose state of 2.5 kB an operation has only while it runs: after the start
/// of the agent, as many operations as the node has containers wait for a permit.
fn find_process<'a>(
    runtime: &'a Runtime,
    id: &'a ContainerId,
    pid: Option<i64>,
) -> BoxFuture<'a, Result<Arc<Process>, runtime::Error>> {
    runtime.process(id, pid).boxed()
}

impl From<runtime::Error> for Completion {
    fn from(e: runtime::Error) -> Completion {
        match e {
            // The container stops, or the runtime is unavailable, which the log reports. Neither is
            // a failure of the pod.
            runtime::Error::NotRunning(_)
            | runtime::Error::Cri(_)
            | runtime::Error::Process(ProcessError::NotFound(_)) => {
                tracing::debug!(cause = %e, "container not running");
                Completion::NotRunning
            }
            runtime::Error::GuestKernel { .. } => Completion::Unsupported { why: e.to_string() },
            e => Completion::Failed { done: Vec::new(), why: e.to_string() },
        }
    }
}

impl From<Result<Outcome, mount::Error>> for Completion {
    fn from(reconciled: Result<Outcome, mount::Error>) -> Completion {
        match reconciled {
            Ok(Outcome { done, skipped, view }) => Completion::Applied { done, skipped, view },
            Err(mount::Error::ProcessExited(_) | mount::Error::LxcfsUnmounted) => {
                Completion::NotRunning
            }
            Err(e @ (mount::Error::HostNamespace(_) | mount::Error::OwnNamespace(_))) => {
                Completion::Unsupported { why: e.to_string() }
            }
            Err(e) => Completion::Failed { why: e.to_string(), done: e.into_outcome().done },
        }
    }
}

/// Describes the error for the pod's owner, who cannot follow advice about the node.
fn for_owner(error: &WorkError) -> String {
    match error {
        WorkError::TimedOut(_) => error.to_string(),
        WorkError::TooManyHung(_) => "too many operations hang on this node".to_owned(),
        WorkError::Panicked => "internal error of the agent".to_owned(),
    }
}

/// The completion of an operation that hung. What is desired may have changed since, so the
/// container is reconciled again.
fn complete_late(reconciled: Result<Outcome, mount::Error>) -> Completion {
    match reconciled.into() {
        Completion::Applied { done, .. } => {
            Completion::Failed { done, why: "finished after its deadline".into() }
        }
        other => other,
    }
}

/// One line in the log for each kind of change of a container.
fn log_changes(container: &str, completion: &Completion, elapsed: Duration) {
    tracing::debug!(container, ?completion, ?elapsed, "operation finished");
    let (Completion::Applied { done, .. } | Completion::Failed { done, .. }) = completion else {
        return;
    };
    for (operation, kind, message) in [
        ("inject", OperationKind::Inject, "view injected"),
        ("remount", OperationKind::Remount, "view remounted"),
        ("remove", OperationKind::Remove, "view removed"),
    ] {
        let files: FileSet =
            done.iter().filter(|step| step.operation() == kind).map(|step| step.file()).collect();
        if !files.is_empty() {
            tracing::info!(operation, container, %files, ?elapsed, "{message}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::view::ViewFile, plan::Step};

    #[test]
    fn only_failures_of_the_pod_complete_as_failed() {
        let done = vec![Step::Inject(ViewFile::Uptime)];
        let outcome = Outcome { done: done.clone(), ..Outcome::default() };
        let cause = || io::Error::other("no");
        let completion = |e: mount::Error| Completion::from(Err::<Outcome, _>(e));
        // An lxcfs that is unmounted during an operation is no failure of the pod: a retry follows.
        for error in [mount::Error::LxcfsUnmounted, mount::Error::ProcessExited(7)] {
            assert_eq!(completion(error), Completion::NotRunning);
        }
        for error in [mount::Error::HostNamespace(7), mount::Error::OwnNamespace(7)] {
            assert!(matches!(completion(error), Completion::Unsupported { .. }));
        }
        let why = "process 7: ".to_owned();
        let steps = mount::Error::Steps { pid: 7, failed: Vec::new(), outcome };
        assert_eq!(completion(steps), Completion::Failed { done, why });
        let observe = completion(mount::Error::Observe { pid: 7, cause: cause() });
        assert!(matches!(observe, Completion::Failed { done, .. } if done.is_empty()));
    }

    #[test]
    fn runtime_outage_is_not_a_failure_of_the_pod() {
        let id = ContainerId::new("a").unwrap();
        let outage = runtime::cri::Error::NoEndpoint;
        for error in [
            runtime::Error::NotRunning(id.clone()),
            runtime::Error::Cri(outage),
            runtime::Error::Process(ProcessError::NotFound(7)),
        ] {
            assert_eq!(Completion::from(error), Completion::NotRunning);
        }
        let kata = runtime::Error::GuestKernel { id: id.clone(), kind: "kata".into() };
        assert!(matches!(Completion::from(kata), Completion::Unsupported { .. }));
        let mismatch = runtime::Error::CgroupMismatch { id, pid: 7 };
        assert!(matches!(Completion::from(mismatch), Completion::Failed { .. }));
    }
}
