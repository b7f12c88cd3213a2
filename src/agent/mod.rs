//! The node agent: one loop that owns the [`State`]. Its inputs are the sources, the completions of
//! operations and the time. The state decides what to start; the plan decides what to mount.

mod event_limiter;
mod pod_events;
mod reconciler;
pub mod state;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
};

use self::{
    event_limiter::{EventLimiter, Verdict},
    reconciler::Reconciler,
    state::{Completion, State},
};
use crate::{
    lxcfs::{self, Change, NoticedBy, SharedLxcfs},
    model::{
        container_id::ContainerId,
        pod::{Trigger, Update},
        status::{Operation as OperationKind, Snapshot, SnapshotRequest},
    },
    mount::{LxcfsFiles, Workers},
    plan::DesiredView,
    runtime::{Runtime, cgroup::CgroupVersion},
    sources::nri::BlockedStart,
    sys::mountinfo::Dev,
    telemetry::{
        OutageLog,
        events::{Events, PodEvent},
        metrics::{Metrics, OperationResult},
    },
};

/// The limit of concurrent operations. The workers' threads do the mounts.
const MAX_CONCURRENT: usize = 32;
/// The interval at which every container is reconciled again, for changes that no source reports:
/// a container may unmount its own view. The containers are spread over [`RESYNC_PARTS`] moments:
/// those of a full node at once would delay starts.
const RESYNC: Duration = Duration::from_secs(300);
const RESYNC_PARTS: u32 = 30;
/// The delay from the exit of a supervised lxcfs to the agent's sweep. Its supervisor has usually
/// swept by then.
const SUPERVISOR_SWEEP_GRACE: Duration = Duration::from_secs(1);
/// The time for the supervisor of an exited lxcfs to remount its views, with 1,000 containers. The
/// agent's own look at them would compete for the CPUs.
const SUPERVISOR_RECOVERY: Duration = Duration::from_secs(2);
/// The time for operations in flight to finish after SIGTERM.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

/// The dependencies of the agent.
#[derive(Debug)]
pub struct Dependencies {
    pub workers: Workers,
    pub runtime: Runtime,
    pub lxcfs: SharedLxcfs,
    pub events: Events,
    pub state: State,
    /// Pod-provided lxcfs files are kept current too.
    pub adopt: bool,
    pub metrics: Arc<Metrics>,
}

/// The channels that the agent's loop receives from.
#[derive(Debug)]
pub struct Inputs {
    pub updates: mpsc::Receiver<Update>,
    pub lxcfs_changes: mpsc::Receiver<Change>,
    pub blocked_starts: mpsc::Receiver<BlockedStart>,
    pub snapshot_requests: mpsc::Receiver<SnapshotRequest>,
}

/// The messages of spawned tasks to the loop.
#[derive(Debug)]
enum Message {
    /// The result of an operation's search for lxcfs. The operation started in `generation`.
    LxcfsSearched { generation: u64, found: Result<(), Arc<lxcfs::Error>> },
    /// [`SUPERVISOR_SWEEP_GRACE`] has passed.
    SweepDue(Dev),
    SweepFinished {
        /// The mount namespaces that were not swept, or not wholly.
        failures: usize,
    },
    OperationFinished {
        id: ContainerId,
        desired: DesiredView,
        completion: Completion,
        elapsed: Duration,
    },
}

/// Runs until SIGTERM or SIGINT. Views are left in place.
///
/// # Errors
/// Those of sigaction(2).
pub async fn run(dependencies: Dependencies, inputs: Inputs) -> std::io::Result<()> {
    let Inputs { mut updates, mut lxcfs_changes, mut blocked_starts, mut snapshot_requests } =
        inputs;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (tx, mut rx) = mpsc::channel(MAX_CONCURRENT);
    let mut agent = Agent::new(dependencies, tx);
    // An lxcfs may have exited while no agent ran.
    agent.sweep_dead();
    let part = RESYNC / RESYNC_PARTS;
    let mut resync = tokio::time::interval_at((Instant::now() + part).into(), part);
    let mut parts = (0..RESYNC_PARTS).cycle();
    loop {
        agent.dispatch();
        let timeout = agent.state.poll_timeout();
        let timer = async {
            match timeout {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // These block a container's start.
            Some(BlockedStart { container, reply }) = blocked_starts.recv() => {
                agent.blocked_starts.push((container.id.clone(), reply));
                let update = Update::ContainerStarted(container, Trigger::Nri);
                agent.state.update(update, Instant::now());
            }
            Some(request) = snapshot_requests.recv() => drop(request.send(agent.snapshot())),
            Some(update) = updates.recv() => agent.state.update(update, Instant::now()),
            Some(change) = lxcfs_changes.recv() => agent.lxcfs_changed(change),
            Some(message) = rx.recv() => agent.handle(message),
            () = timer => {}
            _ = resync.tick() => {
                let part = parts.next().unwrap_or_default();
                agent.state.resync(part, RESYNC_PARTS);
                if part == 0 {
                    agent.limiter.prune(Instant::now());
                }
            }
        }
    }
    tracing::info!("shutting down; views are left in place");
    let drain = async {
        while agent.state.in_flight() > 0 {
            let Some(message) = rx.recv().await else { break };
            agent.handle(message);
        }
    };
    let _ = tokio::time::timeout(SHUTDOWN_GRACE, drain).await;
    Ok(())
}

/// The state of the loop between two inputs.
struct Agent {
    reconciler: Reconciler,
    events: Events,
    limiter: EventLimiter,
    state: State,
    /// Counts the changes of the serving lxcfs: the result of an older search is ignored.
    generation: u64,
    /// Earlier lxcfs that operations in flight may still mount from.
    previous: Vec<PreviousLxcfs>,
    blocked_starts: Vec<(ContainerId, oneshot::Sender<()>)>,
    lxcfs_path: PathBuf,
    /// Whether lxcfs serves, as far as is known.
    lxcfs_up: bool,
    /// The time at which another lxcfs started to serve; `None` once every view is current.
    remount_started: Option<Instant>,
    metrics: Arc<Metrics>,
    outage: OutageLog,
}

struct PreviousLxcfs {
    dev: Dev,
    in_use: Weak<LxcfsFiles>,
    exited: bool,
}

impl Agent {
    fn new(dependencies: Dependencies, tx: mpsc::Sender<Message>) -> Agent {
        let Dependencies { workers, runtime, lxcfs, events, state, adopt, metrics } = dependencies;
        let lxcfs_path = lxcfs.path().to_owned();
        let up = lxcfs::identify(&lxcfs_path).is_some();
        let mut agent = Agent {
            reconciler: Reconciler::new(workers, runtime, lxcfs, adopt, tx),
            events,
            limiter: EventLimiter::default(),
            state,
            generation: 0,
            previous: Vec::new(),
            blocked_starts: Vec::new(),
            lxcfs_path,
            lxcfs_up: false,
            remount_started: None,
            metrics,
            outage: OutageLog::new("lxcfs"),
        };
        agent.set_lxcfs_up(up);
        agent
    }

    /// Starts the operations that the state requests, and publishes its events and latencies.
    fn dispatch(&mut self) {
        for operation in self.state.poll_operations(Instant::now()) {
            let blocks_start = self.blocked_starts.iter().any(|(id, _)| *id == operation.id);
            self.reconciler.spawn(operation, self.generation, blocks_start);
        }
        self.release_starts();
        for (trigger, elapsed) in self.state.take_latencies() {
            tracing::debug!(?trigger, ?elapsed, "desired view injected");
            self.metrics.injected(trigger, elapsed);
        }
        if self.state.is_idle() {
            self.metrics.synced();
            if let Some(started) = self.remount_started.take() {
                self.metrics.remount_pass_finished(started.elapsed());
            }
        }
        for event in self.state.take_events() {
            self.publish(event);
        }
        for event in self.state.take_namespace_events() {
            self.events.publish_for_namespace(event);
        }
        // An operation may have injected views of an exited lxcfs after its sweep.
        let unused: Vec<PreviousLxcfs> =
            self.previous.extract_if(.., |previous| previous.in_use.strong_count() == 0).collect();
        unused
            .iter()
            .filter(|previous| previous.exited)
            .for_each(|previous| self.sweep(previous.dev));
    }

    /// Releases the starts whose operations have finished, and reports those that the plugin has
    /// released before.
    fn release_starts(&mut self) {
        let released: Vec<(ContainerId, oneshot::Sender<()>)> = self
            .blocked_starts
            .extract_if(.., |(id, reply)| reply.is_closed() || !self.state.is_pending(id))
            .collect();
        for (id, reply) in released {
            if reply.send(()).is_err() && self.state.start_timed_out(&id) {
                self.metrics.start_was_late();
            }
        }
    }

    fn publish(&mut self, mut event: PodEvent) {
        match self.limiter.admit(&event.pod.uid, Instant::now()) {
            Verdict::Admitted { suppressed } => {
                if suppressed > 0 {
                    event.note = format!("after {suppressed} suppressed events: {}", event.note);
                }
                self.events.publish(event);
            }
            Verdict::Suppressed { first } => {
                self.metrics.event_suppressed();
                if first {
                    let pod = format!("{}/{}", event.pod.namespace, event.pod.name);
                    tracing::warn!(pod, "pod has too many events, the next ones are suppressed");
                }
            }
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::OperationFinished { id, desired, completion, elapsed } => {
                self.record_metrics(&completion, desired, elapsed);
                self.state.completed(&id, completion, Instant::now());
            }
            Message::LxcfsSearched { generation, .. } if generation != self.generation => {}
            Message::LxcfsSearched { found, .. } => {
                // Its version is read from the mount table, which is long on a full node.
                if found.is_ok() != self.lxcfs_up {
                    self.set_lxcfs_up(found.is_ok());
                }
                let first_failure = self.state.lxcfs_searched(found.is_ok(), Instant::now());
                match found {
                    Ok(()) => self.outage.recovered("lxcfs serves again"),
                    Err(e) => self.outage.failed("no lxcfs serves", &e),
                }
                if first_failure {
                    self.sweep_dead();
                }
            }
            Message::SweepDue(dev) => self.sweep(dev),
            Message::SweepFinished { failures } => {
                self.metrics.sweep_finished(failures);
                self.state.sweep_finished();
            }
        }
    }

    fn lxcfs_changed(&mut self, change: Change) {
        log_lxcfs_change(change, &self.lxcfs_path);
        if let Change::ReadOnly(_) = change {
            self.forget_open_files();
            return self.state.lxcfs_read_only();
        }
        self.generation += 1;
        self.forget_open_files();
        if let Change::Mounted(Some(_)) = change {
            self.metrics.lxcfs_restarted();
            self.remount_started = Some(Instant::now());
        }
        self.set_lxcfs_up(matches!(change, Change::Mounted(Some(_))));
        let exited = match change {
            Change::Mounted(_) | Change::ReadOnly(_) => None,
            Change::Exited { was, supervised, .. } => Some((was, supervised)),
            Change::Unresponsive(was) => Some((was, false)),
        };
        if let Some((was, supervised)) = exited {
            if supervised {
                self.reconciler.sweep_later(was.dev, SUPERVISOR_SWEEP_GRACE);
            } else {
                self.sweep(was.dev);
            }
            self.previous.iter_mut().filter(|p| p.dev == was.dev).for_each(|p| p.exited = true);
        }
        let supervised = exited.is_some_and(|(_, supervised)| supervised);
        self.state.lxcfs_changed(supervised.then(|| Instant::now() + SUPERVISOR_RECOVERY));
    }

    /// Makes the next operation open the files of lxcfs again.
    fn forget_open_files(&mut self) {
        if let Some(lxcfs) = self.reconciler.invalidate_lxcfs() {
            let in_use = Arc::downgrade(&lxcfs);
            self.previous.push(PreviousLxcfs { dev: lxcfs.dev, in_use, exited: false });
        }
    }

    fn sweep(&mut self, dev: Dev) {
        self.state.sweep_started();
        self.reconciler.sweep(dev);
    }

    fn sweep_dead(&mut self) {
        self.state.sweep_started();
        self.reconciler.sweep_dead();
    }

    fn set_lxcfs_up(&mut self, up: bool) {
        self.lxcfs_up = up;
        self.metrics.set_lxcfs_up(up);
        let version = lxcfs::version_at(&self.lxcfs_path).filter(|_| up);
        let cgroup = CgroupVersion::of_node().label();
        self.metrics.set_lxcfs_version(version.map(|version| (version, cgroup)));
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            not_ready_reason: self.state.not_ready_reason().map(str::to_owned),
            lxcfs_up: self.lxcfs_up,
            containers: self.state.snapshot(),
        }
    }

    /// Records each kind of change of an operation once. An operation that failed without a change
    /// is recorded as the kind that it was started for.
    fn record_metrics(&self, completion: &Completion, desired: DesiredView, elapsed: Duration) {
        let (done, result) = match completion {
            Completion::Applied { done, .. } => (done.as_slice(), OperationResult::Success),
            Completion::Failed { done, .. } => (done.as_slice(), OperationResult::Failure),
            Completion::TimedOut { .. } => (&[][..], OperationResult::Failure),
            Completion::NotRunning | Completion::NoLxcfs | Completion::Unsupported { .. } => return,
        };
        let mut kinds: BTreeSet<OperationKind> = done.iter().map(|step| step.operation()).collect();
        if kinds.is_empty() && result == OperationResult::Failure {
            let remove = desired == DesiredView::Absent;
            kinds.insert(if remove { OperationKind::Remove } else { OperationKind::Inject });
        }
        kinds.into_iter().for_each(|kind| self.metrics.operation_finished(kind, result, elapsed));
    }
}

fn log_lxcfs_change(change: Change, path: &Path) {
    match change {
        Change::Mounted(Some(identity)) => {
            let version = lxcfs::version_at(path);
            tracing::info!(lxcfs = "mounted", dev = %identity.dev, version, "lxcfs changed");
        }
        Change::ReadOnly(identity) => {
            tracing::info!(lxcfs = "read-only", dev = %identity.dev, "lxcfs changed");
        }
        Change::Mounted(None) => tracing::info!(lxcfs = "unmounted", "lxcfs changed"),
        Change::Exited { was, supervised, noticed_by } => {
            let noticed_by = match noticed_by {
                NoticedBy::Pidfd => "pidfd",
                NoticedBy::Probe => "probe",
            };
            let dev = was.dev;
            tracing::info!(lxcfs = "exited", %dev, supervised, noticed_by, "lxcfs changed");
        }
        Change::Unresponsive(was) => {
            tracing::info!(lxcfs = "unresponsive", dev = %was.dev, "lxcfs changed");
        }
    }
}
