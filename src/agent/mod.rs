//! The node agent: one loop that owns the [`State`], fed by the watchers, by the results of operations and by the clock.
//! It decides nothing itself: what is due comes from the state, what is mounted from the plan.

pub mod state;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, mpsc},
};

use crate::{
    lxcfs,
    mount::{self, Source, Task, Workers},
    plan::Wish,
    pods::Update,
    report::{Once, events::Events},
    runtime::{self, ContainerId, Runtime},
};
use state::{Due, Finished, Start, State};

/// So many operations may be on their way at once; the mounts themselves are done by the workers' threads.
const MOST_AT_ONCE: usize = 32;
/// How often every container is looked at again, for what no watcher tells, as when a container unmounts its own view.
const RESYNC: Duration = Duration::from_secs(300);
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
}

/// What the loop waits for, besides updates.
enum Told {
    Lxcfs(Result<Arc<Source>, lxcfs::Error>),
    Finished(ContainerId, Finished),
}

/// Runs until SIGTERM or SIGINT; leaves the views alone.
///
/// # Errors
/// When the signals cannot be listened for.
pub async fn run(agent: Agent, mut updates: mpsc::Receiver<Update>) -> std::io::Result<()> {
    let Agent { workers, runtime, lxcfs_path, events, mut state } = agent;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (tell, mut told) = mpsc::channel(MOST_AT_ONCE);
    let effects = Effects { workers, runtime, permits: Arc::new(Semaphore::new(MOST_AT_ONCE)), tell };
    let mut source: Option<Arc<Source>> = None;
    let mut trouble = Once::default();
    let mut resync = tokio::time::interval_at((Instant::now() + RESYNC).into(), RESYNC);
    loop {
        let Due { start, find_lxcfs } = state.due(Instant::now());
        if find_lxcfs {
            effects.find_lxcfs(lxcfs_path.clone());
        }
        for Start { id, wish, name } in start {
            tracing::debug!(container = name, %id, ?wish, "begin");
            effects.begin(id, wish, name, source.clone());
        }
        if state.running() == 0 && source.take().is_some() {
            state.lxcfs_released();
        }
        state.take_events().into_iter().for_each(|event| events.tell(event));
        let next = state.next();
        let wake = async {
            match next {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(update) = updates.recv() => state.update(update),
            Some(told) = told.recv() => match told {
                Told::Finished(id, finished) => state.finished(&id, finished, Instant::now()),
                Told::Lxcfs(Ok(found)) => {
                    trouble.over("lxcfs serves again");
                    source = Some(found);
                    state.lxcfs_found(Ok(()), Instant::now());
                }
                Told::Lxcfs(Err(e)) => {
                    trouble.warn("views wait for lxcfs", &e);
                    state.lxcfs_found(Err(e.to_string()), Instant::now());
                }
            },
            () = wake => {}
            _ = resync.tick() => state.resync(),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    tracing::info!("ends; the views stay");
    let farewell = async {
        while state.running() > 0 {
            let Some(told) = told.recv().await else { break };
            if let Told::Finished(id, finished) = told {
                state.finished(&id, finished, Instant::now());
            }
        }
    };
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
    Ok(())
}

/// What an operation is done with.
#[derive(Clone)]
struct Effects {
    workers: Workers,
    runtime: Runtime,
    permits: Arc<Semaphore>,
    tell: mpsc::Sender<Told>,
}

impl Effects {
    fn find_lxcfs(&self, path: PathBuf) {
        let Effects { workers, tell, .. } = self.clone();
        tokio::spawn(async move {
            let found = lxcfs::find(&workers, &path).await;
            let _ = tell.send(Told::Lxcfs(found)).await;
        });
    }

    fn begin(&self, id: ContainerId, wish: Wish, name: String, source: Option<Arc<Source>>) {
        let Effects { workers, runtime, permits, tell } = self.clone();
        tokio::spawn(async move {
            let permit = permits.acquire_owned().await;
            let begun = Instant::now();
            let (finished, late) = match runtime.process(&id).await {
                Err(e) => (unresolved(e), None),
                Ok(process) => match mount::run(&workers, process, Task::wish(wish, source)).await {
                    Ok(visited) => (finished(visited), None),
                    Err(late) => (Finished::Hangs { why: late.error.to_string() }, Some(late.result)),
                },
            };
            tracing::debug!(container = name, ?finished, took = ?begun.elapsed(), "end");
            // One that hangs holds no place of others.
            drop(permit);
            let _ = tell.send(Told::Finished(id.clone(), finished)).await;
            let finished = match late {
                None => return,
                Some(Some(late)) => match late.await {
                    Ok(visited) => finished_late(visited),
                    Err(_) => Finished::Failed { done: Vec::new(), why: mount::WorkError::Panicked.to_string() },
                },
                // It was not begun, or ended in a panic.
                Some(None) => Finished::Later,
            };
            tracing::debug!(container = name, ?finished, took = ?begun.elapsed(), "late end");
            let _ = tell.send(Told::Finished(id, finished)).await;
        });
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
        Err(mount::Error::Ended(_)) => Finished::Later,
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
