//! Whether the lxcfs behind a view file still runs.
//!
//! A container can mount a file system of its own that passes for a view, and can let every request
//! to it hang. So a file system whose connection a process holds is not opened. Any other is opened
//! in a child process: that can be left behind when it hangs, a thread of the agent cannot.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use tokio::{io::AsyncReadExt, process::Child};

use super::{Error, WorkerContext, Workers};
use crate::{
    model::{container_id::ContainerId, view::ViewFile},
    sys::{fuse, mountinfo::Dev, process::Process},
};

/// The time for a child process to start and to open one file.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The limit of child processes that hang, of the files of one container. Beyond it none of its
/// files is opened.
const MAX_HUNG_PER_OWNER: usize = 2;
/// As [`MAX_HUNG_PER_OWNER`], for the whole node. Probes that run concurrently may exceed it.
const MAX_HUNG: usize = 64;
/// The limit of containers whose files are opened concurrently.
const CONCURRENCY: usize = 32;
/// The time for all the files of one container. The last one may exceed it by [`TIMEOUT`].
const OWNER_BUDGET: Duration = Duration::from_secs(5);
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
    /// It could not be determined: the container hides the file, or other files of it hang.
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

/// Whose probes share one limit: a container, or a process outside containers.
pub type Owner = Result<ContainerId, i32>;

/// A view file through which an lxcfs can be probed.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub process: Arc<Process>,
    pub owner: Owner,
    pub file: ViewFile,
    /// The device of the lxcfs.
    pub dev: Dev,
}

/// One call of [`liveness`] at a time, so that each knows which devices hung before.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
/// The probes that hang or hung, by device.
static HUNG: Mutex<BTreeMap<Dev, HungProbe>> = Mutex::new(BTreeMap::new());

#[derive(Debug)]
struct HungProbe {
    owner: Owner,
    child: Child,
    since: Instant,
}

/// The state of the lxcfs of each device. The candidates of a device are probed in their order,
/// until one determines it. A device of which every process has exited is absent.
pub async fn liveness(workers: &Workers, candidates: Vec<Candidate>) -> HashMap<Dev, Liveness> {
    let mut states = HashMap::new();
    let mut untried: BTreeMap<Dev, VecDeque<Candidate>> = BTreeMap::new();
    for candidate in candidates {
        untried.entry(candidate.dev).or_default().push_back(candidate);
    }
    if untried.is_empty() {
        return states;
    }
    let devs: BTreeSet<Dev> = untried.keys().copied().collect();
    let held = workers.run(move |_| fuse::held(&devs)).await.unwrap_or_else(|timeout| {
        tracing::warn!(cause = %timeout.error, "failed to find the processes that serve lxcfs");
        BTreeSet::new()
    });
    untried.retain(|dev, _| !held.contains(dev));
    states.extend(held.into_iter().map(|dev| (dev, Liveness::Alive)));
    let _turn = TURN.lock().await;
    let mut spent: HashMap<Owner, Duration> = HashMap::new();
    loop {
        let mut by_owner: HashMap<Owner, Vec<Candidate>> = HashMap::new();
        for candidate in untried.values_mut().filter_map(VecDeque::pop_front) {
            by_owner.entry(candidate.owner.clone()).or_default().push(candidate);
        }
        if by_owner.is_empty() {
            return states;
        }
        let groups = by_owner.into_iter().map(|(owner, group)| {
            let spent = spent.get(&owner).copied().unwrap_or_default();
            probe_group(owner, group, spent)
        });
        let probed = stream::iter(groups.collect::<Vec<_>>()).buffer_unordered(CONCURRENCY);
        for (owner, time, probed) in probed.collect::<Vec<_>>().await {
            spent.insert(owner, time);
            for (dev, liveness) in probed {
                states.insert(dev, liveness);
                if liveness != Liveness::Unknown {
                    untried.remove(&dev);
                }
            }
        }
    }
}

/// Probes files of one container, one after the other. `spent` is the time that its files have
/// taken; the time is returned with those of this call.
async fn probe_group(
    owner: Owner,
    group: Vec<Candidate>,
    spent: Duration,
) -> (Owner, Duration, Vec<(Dev, Liveness)>) {
    let started = Instant::now();
    let mut probed = Vec::new();
    for Candidate { process, file, dev, .. } in group {
        let liveness = if spent + started.elapsed() >= OWNER_BUDGET {
            Liveness::Unknown
        } else {
            match may_probe(dev, &owner) {
                Ok(()) => probe_in_child(process.pid(), file, dev, &owner).await,
                Err(liveness) => liveness,
            }
        };
        if liveness != Liveness::Unknown || process.is_alive() {
            probed.push((dev, liveness));
        }
    }
    (owner, spent + started.elapsed(), probed)
}

/// Whether a device may be probed by a file of `owner`. If not, the answer without a probe.
fn may_probe(dev: Dev, owner: &Owner) -> Result<(), Liveness> {
    let mut hung = hung();
    hung.retain(|_, probe| {
        matches!(probe.child.try_wait(), Ok(None)) || probe.since.elapsed() < REMEMBER_HUNG
    });
    if hung.contains_key(&dev) {
        return Err(Liveness::Hung);
    }
    let of_owner = hung.values().filter(|probe| probe.owner == *owner).count();
    let may = hung.len() < MAX_HUNG && of_owner < MAX_HUNG_PER_OWNER;
    if may { Ok(()) } else { Err(Liveness::Unknown) }
}

async fn probe_in_child(pid: i32, file: ViewFile, dev: Dev, owner: &Owner) -> Liveness {
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
        let (owner, since) = (owner.clone(), Instant::now());
        hung().insert(dev, HungProbe { owner, child, since });
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
