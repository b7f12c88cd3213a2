//! The views of an lxcfs that has exited: they are remounted from the next one if it serves soon,
//! else removed. Readers wait until then.

use std::{
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{Mutex, mpsc, oneshot},
    task::JoinSet,
};

use super::{
    connection::{Connection, Waited},
    sweep,
};
use crate::{
    mount::{LxcfsFiles, Workers},
    node,
    sys::{mntns, mountinfo::Dev, process::Process},
    telemetry::metrics::supervisor::SupervisorMetrics,
};

/// The time for the next lxcfs to serve. It usually takes some ten milliseconds.
const SUCCESSOR_TIMEOUT: Duration = Duration::from_secs(3);
/// The limit of recoveries at a time: an lxcfs that exits repeatedly waits for the oldest.
const MAX_RECOVERIES: usize = 4;

/// An lxcfs that has exited, or is being killed.
#[derive(Debug)]
pub(super) struct ExitedLxcfs {
    pub(super) dev: Dev,
    /// Until it is dropped, no other file system gets the device number.
    pub(super) held: OwnedFd,
    /// Readers wait only with it.
    pub(super) connection: Option<Connection>,
}

/// Recovers the views of exited lxcfs, beside the next one.
#[derive(Debug)]
pub(super) struct Recoveries {
    sweepers: Workers,
    metrics: Arc<SupervisorMetrics>,
    tasks: JoinSet<()>,
    /// Those that wait for the next lxcfs.
    waiting: Vec<oneshot::Sender<Arc<LxcfsFiles>>>,
    /// Held during a remount: the lxcfs that it mounts from may exit, and its own recovery must not
    /// come before.
    remounting: Arc<Mutex<()>>,
}

impl Recoveries {
    pub(super) fn new(sweepers: Workers, metrics: Arc<SupervisorMetrics>) -> Recoveries {
        Recoveries {
            sweepers,
            metrics,
            tasks: JoinSet::new(),
            waiting: Vec::new(),
            remounting: Arc::default(),
        }
    }

    /// Starts the recovery of the views of this lxcfs.
    pub(super) async fn start(&mut self, exited: ExitedLxcfs) {
        while self.tasks.try_join_next().is_some() {}
        if self.tasks.len() >= MAX_RECOVERIES {
            self.no_successor();
            self.tasks.join_next().await;
        }
        let (successor, next) = oneshot::channel();
        // Its readers get errors until the views are removed.
        if exited.connection.is_some() {
            self.waiting.push(successor);
        }
        let recovery = Recovery {
            sweepers: self.sweepers.clone(),
            metrics: self.metrics.clone(),
            remounting: self.remounting.clone(),
        };
        self.tasks.spawn(recovery.run(exited, next));
        // It starts before lxcfs does.
        tokio::task::yield_now().await;
    }

    /// The next lxcfs serves: the views that wait are remounted from it.
    pub(super) fn successor(&mut self, lxcfs: &Arc<LxcfsFiles>) {
        for waiting in self.waiting.drain(..) {
            let _ = waiting.send(lxcfs.clone());
        }
    }

    /// The next lxcfs does not serve soon: the views that wait are removed.
    pub(super) fn no_successor(&mut self) {
        self.waiting.clear();
    }

    /// Waits until every recovery is over.
    pub(super) async fn finish(mut self) {
        self.no_successor();
        while self.tasks.join_next().await.is_some() {}
    }
}

struct Recovery {
    sweepers: Workers,
    metrics: Arc<SupervisorMetrics>,
    remounting: Arc<Mutex<()>>,
}

impl Recovery {
    async fn run(self, exited: ExitedLxcfs, next: oneshot::Receiver<Arc<LxcfsFiles>>) {
        let ExitedLxcfs { dev, held, connection } = exited;
        let (recovered, is_recovered) = oneshot::channel();
        let (namespaces, recovered_namespaces) = mpsc::unbounded_channel();
        let recover = async {
            let next =
                tokio::time::timeout(SUCCESSOR_TIMEOUT, next).await.ok().and_then(Result::ok);
            let visited = |process: &Process| {
                let _ = namespaces.send(mntns::namespace_of(process.pid()));
            };
            let is_over = self.remount(dev, next, &visited).await;
            let recovered = (!is_over).then_some(recovered);
            // Also views that the next lxcfs does not have, and those that were just injected.
            sweep(&self.sweepers, dev, &self.metrics).await;
            drop(recovered);
        };
        let answer = async {
            let Some(connection) = connection else { return };
            match connection.answer(is_recovered, recovered_namespaces).await {
                Ok(Waited { requests, in_time }) => {
                    tracing::info!(%dev, requests, in_time, "readers waited for other views");
                }
                Err(cause) => tracing::warn!(%dev, %cause, "readers did not wait"),
            }
        };
        tokio::join!(answer, recover);
        drop(held);
    }

    /// Remounts the views of the exited lxcfs from the next one. Returns whether none of its views
    /// is left.
    async fn remount(
        &self,
        exited: Dev,
        next: Option<Arc<LxcfsFiles>>,
        visited: &impl Fn(&Process),
    ) -> bool {
        let _remounting = self.remounting.lock().await;
        let Some(next) = next else { return false };
        let started = Instant::now();
        match node::recover(&self.sweepers, exited, next, visited).await {
            Ok(summary) => {
                if summary.files > 0 {
                    let (dev, elapsed) = (exited, started.elapsed());
                    tracing::info!(%dev, %summary, ?elapsed, "remounted views of an exited lxcfs");
                }
                summary.failed == 0
            }
            Err(cause) => {
                tracing::warn!(%cause, "failed to remount views of an exited lxcfs");
                false
            }
        }
    }
}
