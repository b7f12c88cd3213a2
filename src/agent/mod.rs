//! The node agent: one loop that owns the [`State`], fed by the watchers, by the results of operations and by the clock.
//! It decides nothing itself: what is due comes from the state, what is mounted from the plan.

pub mod state;

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, mpsc, oneshot},
};

use crate::{
    lxcfs::{self, Change, Finder, Watch},
    mount::{self, Source, Task, Workers},
    node,
    plan::{Dev, Step, Wish},
    pods::{Trigger, Update},
    report::{
        OutageLog,
        events::Events,
        http::{Ask, Snapshot},
        metrics::{Metrics, Operation, OperationResult},
    },
    runtime::{self, ContainerId, Runtime, nri::Waiting},
    view::FileSet,
};
use state::{Due, Finished, Start, State};

/// So many operations may be on their way at once; the mounts themselves are done by the workers' threads.
const MOST_AT_ONCE: usize = 32;
/// How often every container is looked at again, for what no watcher tells, as when a container unmounts its own view.
const RESYNC: Duration = Duration::from_secs(300);
/// A supervisor has swept by then.
const OWNER_SWEEPS: Duration = Duration::from_secs(1);
/// How long operations that have begun may take to end after SIGTERM.
const FAREWELL: Duration = Duration::from_secs(1);

/// What the agent works with.
#[derive(Debug)]
pub struct Agent {
    pub workers: Workers,
    pub runtime: Runtime,
    pub lxcfs_path: PathBuf,
    pub events: Events,
    pub state: State,
    /// Keep lxcfs files current that came with a pod.
    pub adopt: bool,
    pub metrics: Arc<Metrics>,
}

/// Who tells the agent's loop something.
#[derive(Debug)]
pub struct Inbox {
    pub updates: mpsc::Receiver<Update>,
    /// Containers that wait for their view before they start.
    pub starts: mpsc::Receiver<Waiting>,
    /// Who asks what the loop knows.
    pub asks: mpsc::Receiver<Ask>,
}

/// What the loop waits for, besides updates.
enum Told {
    /// By the generation in which it was looked for.
    Lxcfs(u64, Result<Arc<Source>, lxcfs::Error>),
    Changed(lxcfs::Change),
    /// It is time to look after the sweep of this lxcfs's owner.
    Sweep(Dev),
    Swept,
    Finished {
        id: ContainerId,
        finished: Finished,
        wish: Wish,
        took: Duration,
    },
}

/// Runs until SIGTERM or SIGINT; leaves the views alone.
///
/// # Errors
/// When the signals or the mount table cannot be listened to.
pub async fn run(agent: Agent, inbox: Inbox) -> std::io::Result<()> {
    let Agent { workers, runtime, lxcfs_path, events, state, adopt, metrics } = agent;
    let Inbox { mut updates, mut starts, mut asks } = inbox;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (tell, mut told) = mpsc::channel(MOST_AT_ONCE);
    let finder = Finder::new(&lxcfs_path);
    let mut watching = tokio::spawn(tell_changes(Watch::new(finder.clone(), workers.clone())?, tell.clone()));
    let effects = Effects { workers, runtime, finder, adopt, permits: Arc::new(Semaphore::new(MOST_AT_ONCE)), tell };
    let mut agent = Loop {
        effects,
        events,
        state,
        source: None,
        generation: 0,
        before: Vec::new(),
        waiting: Vec::new(),
        up: lxcfs::mounted(&lxcfs_path).is_some(),
        changed: None,
        metrics,
        outage: OutageLog::new("lxcfs"),
    };
    agent.metrics.lxcfs(agent.up);
    // What an lxcfs left that ended while no agent looked.
    agent.sweep_dead();
    let mut resync = tokio::time::interval_at((Instant::now() + RESYNC).into(), RESYNC);
    loop {
        agent.begin_what_is_due();
        let next = agent.state.next();
        let wake = async {
            match next {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // They keep a container from starting.
            Some(Waiting { started, answer }) = starts.recv() => {
                agent.waiting.push((started.id.clone(), answer));
                agent.state.update(Update::Started(started, Trigger::Nri), Instant::now());
            }
            Some(answer) = asks.recv() => drop(answer.send(agent.snapshot())),
            Some(update) = updates.recv() => agent.state.update(update, Instant::now()),
            Some(told) = told.recv() => agent.told(told),
            () = wake => {}
            stopped = &mut watching => {
                let why = stopped.err().map_or("it returned".to_owned(), |e| e.to_string());
                return Err(std::io::Error::other(format!(
                    "the watch of lxcfs stopped: {why}; this is a bug, report it with the agent's log"
                )));
            }
            _ = resync.tick() => agent.state.resync(),
        }
    }
    watching.abort();
    tracing::info!("ends; the views stay");
    let farewell = async {
        while agent.state.running() > 0 {
            let Some(told) = told.recv().await else { break };
            agent.told(told);
        }
    };
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
    Ok(())
}

/// What the loop keeps between two turns.
struct Loop {
    effects: Effects,
    events: Events,
    state: State,
    /// The serving lxcfs, held while operations need it.
    source: Option<Arc<Source>>,
    /// Counts the changes of the serving lxcfs: an answer to an older question is none.
    generation: u64,
    /// Those that served before and that operations may be giving containers views of still; and whether they are gone.
    before: Vec<Before>,
    /// Containers that the runtime does not start until they are answered.
    waiting: Vec<(ContainerId, oneshot::Sender<()>)>,
    /// lxcfs serves, as far as is known.
    up: bool,
    /// When another lxcfs came to serve, until every view is current.
    changed: Option<Instant>,
    metrics: Arc<Metrics>,
    outage: OutageLog,
}

struct Before {
    dev: Dev,
    held: Weak<Source>,
    gone: bool,
}

impl Loop {
    fn sweep(&mut self, dev: Dev) {
        self.state.sweeps();
        self.effects.sweep(dev);
    }

    fn sweep_dead(&mut self) {
        self.state.sweeps();
        self.effects.sweep_dead();
    }

    fn begin_what_is_due(&mut self) {
        let Due { start, find_lxcfs } = self.state.due(Instant::now());
        if find_lxcfs {
            self.effects.find_lxcfs(self.generation);
        }
        for start in start {
            tracing::debug!(container = start.name, id = %start.id, wish = ?start.wish, "begin");
            self.effects.begin(start, self.source.clone());
        }
        for (_, answer) in self.waiting.extract_if(.., |(id, _)| !self.state.pending(id)) {
            let _ = answer.send(());
        }
        for (trigger, took) in self.state.take_latencies() {
            tracing::debug!(?trigger, ?took, "view in place");
            self.metrics.injected(trigger, took);
        }
        if self.state.is_at_rest()
            && let Some(changed) = self.changed.take()
        {
            self.metrics.remounted(changed.elapsed());
        }
        if self.state.running() == 0 && self.source.take().is_some() {
            self.state.lxcfs_released();
        }
        self.state.take_events().into_iter().for_each(|event| self.events.tell(event));
        // Views that were put in of an lxcfs after its sweep.
        let over: Vec<Before> = self.before.extract_if(.., |b| b.held.strong_count() == 0).collect();
        over.iter().filter(|b| b.gone).for_each(|b| self.sweep(b.dev));
    }

    fn told(&mut self, told: Told) {
        match told {
            Told::Finished { id, finished, wish, took } => {
                self.count(&finished, wish, took);
                self.state.finished(&id, finished, Instant::now());
            }
            Told::Lxcfs(generation, _) if generation != self.generation => {}
            Told::Lxcfs(_, Ok(found)) => {
                self.outage.recovered("lxcfs serves again");
                self.is_up(true);
                self.source = Some(found);
                self.state.lxcfs_found(Ok(()), Instant::now());
            }
            Told::Lxcfs(_, Err(e)) => {
                if self.state.lxcfs_missing_first() {
                    self.sweep_dead();
                }
                self.outage.failed("no lxcfs serves", &e);
                self.is_up(false);
                self.state.lxcfs_found(Err(e.to_string()), Instant::now());
            }
            Told::Changed(change) => self.lxcfs_changed(change),
            Told::Sweep(dev) => self.sweep(dev),
            Told::Swept => self.state.swept(),
        }
    }

    fn is_up(&mut self, up: bool) {
        self.up = up;
        self.metrics.lxcfs(up);
    }

    fn snapshot(&self) -> Snapshot {
        let no_lxcfs = (!self.up).then_some("no lxcfs serves");
        let waits_for = self.state.waits_for().or(no_lxcfs).map(str::to_owned);
        Snapshot { waits_for, containers: self.state.known() }
    }

    /// Counts what an operation did, each kind once; one that failed at once counts as what it was for.
    fn count(&self, finished: &Finished, wish: Wish, took: Duration) {
        let (done, result) = match finished {
            Finished::Done { done, .. } => (done.as_slice(), OperationResult::Success),
            Finished::Failed { done, .. } => (done.as_slice(), OperationResult::Failure),
            Finished::Hangs { .. } => (&[][..], OperationResult::Failure),
            Finished::Later | Finished::Unsupported { .. } => return,
        };
        let kind = |step: &Step| match step {
            Step::Inject(_) => Operation::Inject,
            Step::Remove(..) => Operation::Remove,
            Step::Swap(..) | Step::Adopt(..) => Operation::Remount,
        };
        let mut kinds: Vec<Operation> = done.iter().map(kind).collect();
        if kinds.is_empty() && result == OperationResult::Failure {
            kinds.push(if wish == Wish::Nothing { Operation::Remove } else { Operation::Inject });
        }
        kinds.sort_unstable();
        kinds.dedup();
        kinds.into_iter().for_each(|kind| self.metrics.operation(kind, result, took));
    }

    fn lxcfs_changed(&mut self, change: Change) {
        log_lxcfs_change(change);
        self.generation += 1;
        if let Some(source) = self.source.take() {
            self.before.push(Before { dev: source.dev, held: Arc::downgrade(&source), gone: false });
        }
        if let Change::Mounted(Some(_)) = change {
            self.metrics.lxcfs_restarted();
            self.changed = Some(Instant::now());
        }
        self.is_up(matches!(change, Change::Mounted(Some(_))));
        let gone = match change {
            Change::Mounted(_) => None,
            Change::Ended { was, supervised } => Some((was, supervised)),
            Change::Hangs(was) => Some((was, false)),
        };
        if let Some((was, supervised)) = gone {
            if supervised {
                // Its supervisor sweeps; it is looked after that it did.
                self.effects.sweep_later(was.dev, OWNER_SWEEPS);
            } else {
                self.sweep(was.dev);
            }
            self.before.iter_mut().filter(|b| b.dev == was.dev).for_each(|b| b.gone = true);
        }
        self.state.lxcfs_changed();
    }
}

async fn tell_changes(mut watch: Watch, tell: mpsc::Sender<Told>) {
    loop {
        let change = watch.changed().await;
        if tell.send(Told::Changed(change)).await.is_err() {
            return;
        }
    }
}

/// What an operation is done with.
#[derive(Clone)]
struct Effects {
    workers: Workers,
    runtime: Runtime,
    finder: Finder,
    adopt: bool,
    permits: Arc<Semaphore>,
    tell: mpsc::Sender<Told>,
}

impl Effects {
    fn find_lxcfs(&self, generation: u64) {
        let Effects { workers, finder, tell, .. } = self.clone();
        tokio::spawn(async move {
            let found = finder.find(&workers).await;
            let _ = tell.send(Told::Lxcfs(generation, found)).await;
        });
    }

    /// Gives containers their own files back where a view is of this lxcfs.
    fn sweep(&self, dev: Dev) {
        let Effects { workers, finder, tell, .. } = self.clone();
        tokio::spawn(async move {
            // The kernel gives a device number to another lxcfs as soon as no mount of the first is left, and not before.
            if lxcfs::mounted(finder.path()).is_none_or(|now| now.dev != dev) {
                told(node::sweep(&workers, HashSet::from([dev])).await);
            }
            let _ = tell.send(Told::Swept).await;
        });
    }

    /// The same for every lxcfs that is gone, and for the one at our path if it hangs.
    fn sweep_dead(&self) {
        let Effects { workers, finder, tell, .. } = self.clone();
        tokio::spawn(async move {
            let hangs = matches!(finder.find(&workers).await, Err(lxcfs::Error::Hung { .. }));
            let hung = lxcfs::mounted(finder.path()).filter(|_| hangs).map(|identity| identity.dev);
            told(node::sweep_dead(&workers, hung).await);
            let _ = tell.send(Told::Swept).await;
        });
    }

    /// Has a sweep told of later.
    fn sweep_later(&self, dev: Dev, wait: Duration) {
        let tell = self.tell.clone();
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            let _ = tell.send(Told::Sweep(dev)).await;
        });
    }

    fn begin(&self, Start { id, wish, name, pid }: Start, source: Option<Arc<Source>>) {
        let Effects { workers, runtime, adopt, permits, tell, .. } = self.clone();
        tokio::spawn(async move {
            let permit = permits.acquire_owned().await;
            let begun = Instant::now();
            let (finished, late) = match runtime.process(&id, pid).await {
                Err(e) => (unresolved(e), None),
                Ok(process) => match mount::run(&workers, process, Task::Reconcile { wish, source, adopt }).await {
                    Ok(visited) => (finished(visited), None),
                    Err(late) => (Finished::Hangs { why: late.error.to_string() }, Some(late.result)),
                },
            };
            tracing::debug!(container = name, completion = ?finished, elapsed = ?begun.elapsed(), "operation finished");
            tell_story(&name, &finished, begun.elapsed());
            // One that hangs holds no place of others.
            drop(permit);
            let took = begun.elapsed();
            let _ = tell.send(Told::Finished { id: id.clone(), finished, wish, took }).await;
            let finished = match late {
                None => return,
                Some(Some(late)) => match late.await {
                    Ok(visited) => finished_late(visited),
                    Err(_) => Finished::Failed { done: Vec::new(), why: mount::WorkError::Panicked.to_string() },
                },
                // It was not begun, or ended in a panic.
                Some(None) => Finished::Later,
            };
            tracing::debug!(container = name, completion = ?finished, elapsed = ?begun.elapsed(), "hung operation finished");
            let _ = tell.send(Told::Finished { id, finished, wish, took: begun.elapsed() }).await;
        });
    }
}

fn log_lxcfs_change(change: Change) {
    match change {
        Change::Mounted(Some(identity)) => tracing::info!(lxcfs = "mounted", dev = %identity.dev, "lxcfs changed"),
        Change::Mounted(None) => tracing::info!(lxcfs = "unmounted", "lxcfs changed"),
        Change::Ended { was, supervised } => {
            tracing::info!(lxcfs = "exited", dev = %was.dev, supervised, "lxcfs changed");
        }
        Change::Hangs(was) => tracing::info!(lxcfs = "unresponsive", dev = %was.dev, "lxcfs changed"),
    }
}

/// One line in the log for each change of a container.
fn tell_story(container: &str, finished: &Finished, took: Duration) {
    let (Finished::Done { done, .. } | Finished::Failed { done, .. }) = finished else { return };
    let of = |wanted: fn(&Step) -> bool| done.iter().filter(|s| wanted(s)).map(|s| s.file()).collect::<FileSet>();
    let changes = [
        ("inject", "view injected", of(|s| matches!(s, Step::Inject(_)))),
        ("remount", "view remounted", of(|s| matches!(s, Step::Swap(..) | Step::Adopt(..)))),
        ("remove", "view removed", of(|s| matches!(s, Step::Remove(..)))),
    ];
    for (operation, message, files) in changes.into_iter().filter(|(.., files)| !files.is_empty()) {
        tracing::info!(operation, container, %files, elapsed = ?took, "{message}");
    }
}

fn told(swept: std::io::Result<node::Pass>) {
    match swept {
        Ok(swept) if swept.files > 0 => {
            tracing::info!(swept_files = swept.files, %swept, "removed views of an exited lxcfs");
        }
        Ok(_) => {}
        Err(e) => tracing::warn!("containers could not be looked at: {e}"),
    }
}

fn unresolved(e: runtime::Error) -> Finished {
    match e {
        // The container is ending or its runtime is away; the log has it, and it is no matter of the pod's.
        runtime::Error::NotRunning(_)
        | runtime::Error::Cri(_)
        | runtime::Error::Process(mount::ProcessError::Vanished(_)) => {
            tracing::debug!("{e}");
            Finished::Later
        }
        runtime::Error::Sandboxed { .. } => Finished::Unsupported { why: e.to_string() },
        e => Finished::Failed { done: Vec::new(), why: e.to_string() },
    }
}

fn finished(visited: Result<mount::Outcome, mount::Error>) -> Finished {
    match visited {
        Ok(mount::Outcome { done, left_out }) => Finished::Done { done, left_out },
        Err(mount::Error::Ended(_) | mount::Error::SourceGone) => Finished::Later,
        Err(e @ (mount::Error::Host(_) | mount::Error::Own(_))) => Finished::Unsupported { why: e.to_string() },
        Err(e) => {
            let why = e.to_string();
            let done = if let mount::Error::Steps { outcome, .. } = e { outcome.done } else { Vec::new() };
            Finished::Failed { done, why }
        }
    }
}

/// A late result is not trusted to be what is wished still: the container is looked at again.
fn finished_late(visited: Result<mount::Outcome, mount::Error>) -> Finished {
    match finished(visited) {
        Finished::Done { done, .. } => Finished::Failed { done, why: "it hung, and goes on now".into() },
        other => other,
    }
}
