//! Whether the lxcfs behind a view file still runs.
//!
//! A container can mount a file system of its own that passes for a view, and can let every request
//! to it hang. So a file system whose connection a process holds is not opened. Any other is opened
//! in a child process: that can be left behind when it hangs, a thread of the agent cannot.

use std::{
    collections::{BTreeMap, HashSet},
    process::Stdio,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{io::AsyncReadExt, process::Child};

use super::{Error, WorkerContext, Workers};
use crate::{
    model::view::ViewFile,
    sys::{fuse, mountinfo::Dev, process::Process},
};

/// The time for a child process to start and to open one file.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The limit of child processes that hang. Beyond it no file is opened.
const MAX_HUNG: usize = 8;
/// A device that hung is not probed again for this time.
const REMEMBER_HUNG: Duration = Duration::from_secs(60);

/// The state of an lxcfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// Its process runs. It may hang.
    Alive,
    /// Its process has exited.
    Disconnected,
    /// An open of its file did not return in time.
    Hung,
    /// It could not be determined: the container has exited, or hides the file.
    Unknown,
}

impl Liveness {
    fn name(self) -> &'static str {
        match self {
            Liveness::Alive => "alive",
            Liveness::Disconnected => "disconnected",
            Liveness::Hung => "hung",
            Liveness::Unknown => "unknown",
        }
    }
}

/// Determines the state of lxcfs, by the connections that processes held at its creation.
#[derive(Debug)]
pub struct Prober {
    held: HashSet<Dev>,
}

/// One probe at a time, so that each knows which devices hung before.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
/// The probes that hang or hung, by device.
static HUNG: Mutex<BTreeMap<Dev, HungProbe>> = Mutex::new(BTreeMap::new());

#[derive(Debug)]
struct HungProbe {
    child: Child,
    since: Instant,
}

impl Prober {
    pub async fn new(workers: &Workers) -> Prober {
        Prober { held: workers.run(|_| fuse::held()).await.unwrap_or_default() }
    }

    /// The state of the lxcfs with this device, of which `process` has the view file `file`.
    pub async fn liveness(&self, process: &Process, file: ViewFile, dev: Dev) -> Liveness {
        if self.held.contains(&dev) {
            return Liveness::Alive;
        }
        let _turn = TURN.lock().await;
        match may_probe(dev) {
            Ok(()) => probe_in_child(process.pid(), file, dev).await,
            Err(liveness) => liveness,
        }
    }
}

/// Whether a device may be probed. If not, the answer without a probe.
fn may_probe(dev: Dev) -> Result<(), Liveness> {
    let mut hung = hung();
    hung.retain(|_, probe| {
        matches!(probe.child.try_wait(), Ok(None)) || probe.since.elapsed() < REMEMBER_HUNG
    });
    if hung.contains_key(&dev) {
        return Err(Liveness::Hung);
    }
    if hung.len() < MAX_HUNG { Ok(()) } else { Err(Liveness::Unknown) }
}

async fn probe_in_child(pid: i32, file: ViewFile, dev: Dev) -> Liveness {
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command.args(["probe", &pid.to_string(), file.name()]);
    command.args([dev.major.to_string(), dev.minor.to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(cause) => {
            tracing::warn!(%cause, "failed to start the process that probes lxcfs");
            return Liveness::Unknown;
        }
    };
    let mut name = String::new();
    let finished = async {
        if let Some(stdout) = &mut child.stdout {
            let _ = stdout.read_to_string(&mut name).await;
        }
        let _ = child.wait().await;
    };
    if tokio::time::timeout(TIMEOUT, finished).await.is_err() {
        tracing::warn!(pid, %file, %dev, "the file system behind a view file hangs");
        let _ = child.start_kill();
        hung().insert(dev, HungProbe { child, since: Instant::now() });
        return Liveness::Hung;
    }
    let all = [Liveness::Alive, Liveness::Disconnected];
    all.into_iter().find(|state| state.name() == name.trim()).unwrap_or(Liveness::Unknown)
}

fn hung() -> MutexGuard<'static, BTreeMap<Dev, HungProbe>> {
    HUNG.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens a view file of a process, if its device is `dev`, and returns the name of the state.
/// Blocks if lxcfs hangs; for a process of its own.
///
/// # Errors
/// See [`Error`].
pub fn probe_blocking(
    process: &Process,
    file: ViewFile,
    dev: Dev,
) -> Result<&'static str, Box<dyn std::error::Error + Send + Sync>> {
    let context = WorkerContext::new()?;
    let liveness: Result<Liveness, Error> =
        context.enter(process, |entered| Ok(entered.probe(file, dev)));
    Ok(liveness?.name())
}
