//! The mount driver: the only module that mounts. It injects, remounts and removes view files in
//! the mount namespace of one process, from outside. Independent of pods, runtimes and the health
//! of lxcfs.
//!
//! Work runs on a thread of [`Workers`], which enters the namespace by pidfd and always returns to
//! the agent's own. Nothing in the container is trusted: see `driver.rs`.

mod attrs;
mod driver;
mod liveness;
mod namespace;
pub mod observe;
mod paths;
mod scratch;
mod sysfs;
pub mod table;
mod workers;

use std::{
    collections::{BTreeMap, HashSet},
    io,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

pub use self::{
    driver::{IfLocked, reconcile_blocking},
    liveness::{Candidate, Liveness, Owner, liveness, probe_blocking},
    namespace::WorkerContext,
    scratch::prepare as prepare_scratch,
    table::TableLimit,
    workers::{Error as WorkError, JobTimeout, Workers},
};
use crate::{
    model::view::{FileSet, ViewFile},
    plan::{self, DesiredView, ObservedMounts, Plan, ServingLxcfs, SkipReason, Step},
    sys::{
        mountinfo::{Dev, ReadError},
        process::Process,
    },
};

/// The time to wait for the lock of a namespace that another kube-lxcfs works on: longer than any
/// reconcile. A container may hold it too, so the work then goes on without it.
const LOCK_TIMEOUT: Duration = Duration::from_millis(500);
/// The first interval between two attempts, and the limit up to which it doubles.
const LOCK_INTERVAL: Duration = Duration::from_millis(1);
const MAX_LOCK_INTERVAL: Duration = Duration::from_millis(50);

/// The view files of the serving lxcfs, each opened with `O_PATH`: every clone is made from these,
/// so that an injection sends lxcfs no request.
///
/// An open descriptor keeps the lxcfs mount busy: drop it with the last operation, or `umount` by
/// lxcfs's owner fails. A supervisor's does not.
#[derive(Clone, Debug)]
pub struct LxcfsFiles {
    pub dev: Dev,
    pub files: Arc<BTreeMap<ViewFile, OwnedFd>>,
    /// See [`ServingLxcfs::writable`].
    pub writable: bool,
}

impl LxcfsFiles {
    /// The part of it that the plan uses.
    pub fn serving(&self) -> ServingLxcfs {
        let files = self.files.keys().copied().collect();
        ServingLxcfs { dev: self.dev, files, writable: self.writable }
    }
}

/// The reason why a container could not be reconciled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("process {0} has exited")]
    ProcessExited(i32),
    #[error("process {0} is in the host's mount namespace, which is never changed")]
    HostNamespace(i32),
    #[error("process {0} is in kube-lxcfs's own mount namespace, which is never changed")]
    OwnNamespace(i32),
    #[error("failed to enter the mount namespace of process {pid}: {cause}")]
    Enter { pid: i32, cause: io::Error },
    #[error("failed to read the mount table of process {pid}: {cause}")]
    Observe { pid: i32, cause: io::Error },
    #[error("another process holds the lock of the mount namespace of process {0}")]
    Locked(i32),
    #[error("process {pid}: {cause}; reduce the mounts of its container")]
    LargeTable { pid: i32, cause: ReadError },
    /// The lxcfs whose view files were to be mounted is no longer mounted itself.
    #[error("lxcfs was unmounted during the operation")]
    LxcfsUnmounted,
    /// Some steps failed; the others were applied.
    #[error(
        "process {pid}: {}",
        .failed.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    )]
    Steps { pid: i32, failed: Vec<StepError>, outcome: Outcome },
    #[error(transparent)]
    Work(#[from] WorkError),
}

impl Error {
    /// Whether the process is not in a container that may be changed, or no longer running: a pass
    /// over the node ignores it.
    pub fn is_no_target(&self) -> bool {
        matches!(self, Error::ProcessExited(_) | Error::HostNamespace(_) | Error::OwnNamespace(_))
    }

    /// Whether the mount table is too large: its container is at fault, and nothing was changed.
    pub fn is_large(&self) -> bool {
        matches!(self, Error::LargeTable { .. })
    }

    /// The changes before the error.
    pub fn into_outcome(self) -> Outcome {
        if let Error::Steps { outcome, .. } = self { outcome } else { Outcome::default() }
    }
}

/// A step that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("failed to {verb} {}: {cause}", .step.file())]
pub struct StepError {
    pub step: Step,
    verb: &'static str,
    cause: io::Error,
}

/// The changes of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The steps that were applied.
    pub done: Vec<Step>,
    /// The desired files that were skipped.
    pub skipped: Vec<(ViewFile, SkipReason)>,
    /// The desired files that the container has, if no step failed.
    pub view: FileSet,
}

/// A task in a container.
#[derive(Clone, Debug)]
pub enum Task {
    /// Make the view the desired one; without `lxcfs` nothing is injected. With `adopt`,
    /// pod-provided lxcfs files are made current too. A `fresh` container has just been created,
    /// and likely has no mount on its view files' paths.
    Reconcile { desired: DesiredView, lxcfs: Option<Arc<LxcfsFiles>>, adopt: bool, fresh: bool },
    /// Remount the view from `lxcfs` if it has files of this other one, which has exited.
    Recover { exited: Dev, lxcfs: Arc<LxcfsFiles> },
    /// Remove the view files of these lxcfs, which have exited or are about to.
    Sweep(Arc<HashSet<Dev>>),
}

impl Task {
    pub fn reconcile(desired: DesiredView, lxcfs: Option<Arc<LxcfsFiles>>) -> Task {
        Task::Reconcile { desired, lxcfs, adopt: false, fresh: false }
    }

    /// The outcome of the task in a container with these mounts, if it needs no step.
    pub fn outcome_without_steps(&self, observed: &ObservedMounts) -> Option<Outcome> {
        let Plan { steps, skipped, view } = self.plan(observed);
        (steps.is_empty() && observed.scratch.is_empty()).then(|| Outcome {
            done: Vec::new(),
            skipped,
            view,
        })
    }

    /// Whether it injects and remounts nothing.
    fn only_removes(&self) -> bool {
        matches!(self, Task::Sweep(_) | Task::Reconcile { lxcfs: None, .. })
    }

    fn plan(&self, observed: &ObservedMounts) -> Plan {
        match self {
            Task::Reconcile { desired, lxcfs, adopt, .. } => {
                plan::plan(*desired, observed, lxcfs.as_ref().map(|lxcfs| lxcfs.serving()), *adopt)
            }
            Task::Recover { exited, .. } if observed.views().all(|(_, dev)| dev != *exited) => {
                Plan::default()
            }
            Task::Recover { lxcfs, .. } => {
                plan::plan(DesiredView::REMOUNT_ONLY, observed, Some(lxcfs.serving()), false)
            }
            Task::Sweep(exited) => plan::plan_sweep(observed, |dev| exited.contains(&dev)),
        }
    }

    /// The steps in a container that is likely as it was created; none if it is not.
    fn likely_steps(&self) -> Vec<Step> {
        match self {
            Task::Reconcile {
                desired: DesiredView::Exactly(files) | DesiredView::AtLeast(files),
                lxcfs: Some(lxcfs),
                fresh: true,
                ..
            } => {
                let served = lxcfs.files.keys().filter(|file| files.contains(**file));
                served.map(|file| Step::Inject(*file)).collect()
            }
            _ => Vec::new(),
        }
    }

    fn lxcfs_file(&self, file: ViewFile) -> Option<&OwnedFd> {
        match self {
            Task::Reconcile { lxcfs, .. } => lxcfs.as_ref()?.files.get(&file),
            Task::Recover { lxcfs, .. } => lxcfs.files.get(&file),
            Task::Sweep(_) => None,
        }
    }
}

/// Performs a task in the mount namespace of `process`. While another process holds the lock of the
/// namespace, no thread waits for it.
///
/// # Errors
/// See [`Error`]. Repeating is safe: current view files stay.
pub async fn reconcile(
    workers: &Workers,
    process: Arc<Process>,
    task: Task,
) -> Result<Result<Outcome, Error>, JobTimeout<Result<Outcome, Error>>> {
    reconcile_within(workers, process, task, TableLimit::Large).await
}

/// As [`reconcile`], with a limit of the mount table.
///
/// # Errors
/// As [`reconcile`]; [`Error::LargeTable`] for a table beyond the limit.
pub async fn reconcile_within(
    workers: &Workers,
    process: Arc<Process>,
    task: Task,
    limit: TableLimit,
) -> Result<Result<Outcome, Error>, JobTimeout<Result<Outcome, Error>>> {
    let started = Instant::now();
    let mut interval = LOCK_INTERVAL;
    loop {
        let (process, task) = (process.clone(), task.clone());
        let if_locked =
            if started.elapsed() < LOCK_TIMEOUT { IfLocked::Fail } else { IfLocked::Ignore };
        let job = move |context: &WorkerContext| {
            reconcile_blocking(context, &process, &task, if_locked, limit)
        };
        match workers.run(job).await? {
            Err(Error::Locked(_)) => tokio::time::sleep(interval).await,
            reconciled => return Ok(reconciled),
        }
        interval = (interval * 2).min(MAX_LOCK_INTERVAL);
    }
}

/// Observes a container, and changes nothing.
///
/// # Errors
/// See [`Error`]; [`Error::LargeTable`] for a table beyond the limit.
pub async fn observe(
    workers: &Workers,
    process: Arc<Process>,
    limit: TableLimit,
) -> Result<ObservedMounts, Error> {
    let observed =
        workers.run(move |context| context.enter(&process, |entered| entered.observe(limit))).await;
    observed.unwrap_or_else(|timeout| Err(timeout.error.into()))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::{model::view::BaseFs, plan::MountIdentity, sys::mountinfo::MountId};

    #[test]
    fn likely_steps_are_those_of_a_fresh_container() {
        let dev = Dev { major: 0, minor: 40 };
        let file = || OwnedFd::from(File::open("/dev/null").unwrap());
        let files = [ViewFile::Cpu, ViewFile::Uptime, ViewFile::Meminfo, ViewFile::Stat];
        let files = Arc::new(files.into_iter().map(|name| (name, file())).collect());
        let lxcfs = Some(Arc::new(LxcfsFiles { dev, files, writable: false }));
        let base = |base| (base, MountIdentity { id: MountId(1), dev });
        let bases = BaseFs::ALL.into_iter().map(base).collect();
        let observed = ObservedMounts { bases, ..ObservedMounts::default() };
        let some = FileSet::from_iter([ViewFile::Uptime, ViewFile::Swaps, ViewFile::Cpu]);
        for desired in [
            DesiredView::Exactly(FileSet::ALL),
            DesiredView::Exactly(some),
            DesiredView::AtLeast(some),
        ] {
            let task = |fresh| {
                let lxcfs = lxcfs.clone();
                Task::Reconcile { desired, lxcfs, adopt: false, fresh }
            };
            assert_eq!(task(true).likely_steps(), task(true).plan(&observed).steps);
            assert!(task(true).likely_steps().len() >= 2);
            assert_eq!(task(false).likely_steps(), []);
        }
    }
}
