//! The reconcile of one container: observe, plan, apply.
//!
//! The thread enters the namespace, locks it, reads the mount table and plans. If there are steps,
//! it returns to make detached mounts of lxcfs's files, because the kernel clones only mounts of
//! the caller's namespace. Then it enters again and applies the steps. If the mounts changed in
//! between, it plans again.
//!
//! Nothing in the container is trusted. Paths are opened without following links and without
//! crossing a mount. `/proc` and `/sys` are checked on the open descriptor. A mount is detached by
//! a descriptor whose mount id equals the planned one.

use std::{
    cell::OnceCell,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags},
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags},
    path::DecInt,
};

use super::{Error, Liveness, Outcome, StepError, Task, WorkerContext, observe};
use crate::{
    model::view::{BaseFs, ViewFile},
    plan::{ObservedMounts, Plan, SkipReason, Step},
    sys::{
        self, Ownership,
        mountinfo::{MountId, MountTable},
        process::Process,
    },
};

/// The number of plans of a reconcile whose mounts change in between.
const MAX_REPLANS: usize = 4;

/// Performs a task in the mount namespace of `process`, on a worker thread.
///
/// # Errors
/// See [`Error`].
pub fn reconcile_blocking(
    context: &WorkerContext,
    process: &Process,
    task: &Task,
) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    let mut lock = None;
    for attempts_left in (0..MAX_REPLANS).rev() {
        let Plan { steps, skipped } = context.enter(process, |entered| {
            // Another kube-lxcfs may be at work here: the lock keeps it from changes between our
            // observation and our steps.
            if lock.is_none() {
                lock = context.lock();
            }
            Ok(task.plan(&entered.observe()?))
        })?;
        outcome.skipped = skipped;
        if steps.is_empty() {
            return Ok(outcome);
        }
        let steps = with_clones(task, steps)?;
        let mut failed = Vec::new();
        let mut changed = false;
        context.enter(process, |entered| {
            for (step, clone) in steps {
                match entered.apply_step(step, clone) {
                    Ok(()) => outcome.done.push(step),
                    Err((_, StepFailure::Skipped(why))) => outcome.skipped.push((step.file(), why)),
                    Err((_, StepFailure::Changed)) if attempts_left > 0 => changed = true,
                    Err((verb, StepFailure::Changed)) => {
                        let cause = io::Error::other("the container's mounts keep changing");
                        failed.push(StepError { step, verb, cause });
                    }
                    Err((verb, StepFailure::Failed(cause))) => {
                        failed.push(StepError { step, verb, cause });
                    }
                }
            }
            Ok(())
        })?;
        if !failed.is_empty() {
            return Err(Error::Steps { pid: process.pid(), failed, outcome });
        }
        if !changed {
            return Ok(outcome);
        }
    }
    Ok(outcome)
}

/// A step with the detached mount that it needs, if any.
type StepWithClone = (Step, Option<io::Result<OwnedFd>>);

/// Clones lxcfs's files for the steps, in the thread's own mount namespace.
fn with_clones(task: &Task, steps: Vec<Step>) -> Result<Vec<StepWithClone>, Error> {
    let clone = |step: Step| {
        let ownership = match step {
            Step::Inject(_) | Step::Remount { .. } => Ownership::Managed,
            Step::Adopt { .. } => Ownership::PodProvided,
            Step::Remove { .. } => return None,
        };
        Some(clone_detached(task.lxcfs_file(step.file())?.as_fd(), ownership))
    };
    let steps: Vec<StepWithClone> = steps.into_iter().map(|step| (step, clone(step))).collect();
    // A mount that is attached to no namespace cannot be cloned (open_tree(2): EINVAL).
    let unmounted = |e: &io::Error| e.raw_os_error() == Some(libc::EINVAL);
    if steps.iter().any(|(_, clone)| matches!(clone, Some(Err(e)) if unmounted(e))) {
        return Err(Error::LxcfsUnmounted);
    }
    Ok(steps)
}

/// Makes a detached mount of one view file, with the options of a view.
fn clone_detached(file: BorrowedFd<'_>, ownership: Ownership) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let clone = rustix::mount::open_tree(file, "", flags)?;
    sys::set_view_attrs(&clone, ownership)?;
    Ok(clone)
}

/// The reason why one step was not applied.
enum StepFailure {
    Skipped(SkipReason),
    /// The mounts are no longer as planned for.
    Changed,
    Failed(io::Error),
}

impl From<Errno> for StepFailure {
    fn from(e: Errno) -> Self {
        StepFailure::Failed(e.into())
    }
}

/// The thread while it is in a container's mount namespace.
pub(super) struct EnteredNs<'a> {
    context: &'a WorkerContext,
    process: &'a Process,
    /// `/proc` and `/sys`, opened and checked on first use.
    bases: [OnceCell<OwnedFd>; 2],
}

impl<'a> EnteredNs<'a> {
    pub(super) fn new(context: &'a WorkerContext, process: &'a Process) -> EnteredNs<'a> {
        EnteredNs { context, process, bases: Default::default() }
    }

    pub(super) fn observe(&self) -> Result<ObservedMounts, Error> {
        let fail = |cause| Error::Observe { pid: self.process.pid(), cause };
        let text = self.context.read("thread-self/mountinfo").map_err(fail)?;
        let table = MountTable::parse(&text).map_err(|e| fail(io::Error::other(e)))?;
        let root = self.process.root().as_os_str().as_encoded_bytes();
        Ok(observe::observe(&table, root, |group| self.context.is_host_peer_group(group)))
    }

    /// Opens a view file for reading, which sends its lxcfs a request.
    pub(super) fn probe(&self, file: ViewFile) -> Liveness {
        let Ok(base) = self.base(file.base()) else { return Liveness::Unknown };
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        match rustix::fs::openat2(base, file.path_in_base(), flags, Mode::empty(), resolve) {
            Ok(_) => Liveness::Alive,
            // The errors of a FUSE file system whose process has exited (fuse(4)), the second for
            // requests that were pending.
            Err(Errno::NOTCONN | Errno::CONNABORTED) => Liveness::Disconnected,
            Err(_) => Liveness::Unknown,
        }
    }

    /// Applies one step. An error comes with the verb of what failed.
    fn apply_step(
        &self,
        step: Step,
        clone: Option<io::Result<OwnedFd>>,
    ) -> Result<(), (&'static str, StepFailure)> {
        let clone = clone.transpose().map_err(|e| ("clone", StepFailure::Failed(e)))?;
        match (step, clone) {
            (Step::Inject(file), Some(clone)) => {
                self.inject(file, &clone).map_err(|e| ("inject", e))
            }
            (Step::Remove { file, mount }, _) => {
                self.remove(file, mount).map_err(|e| ("remove", e))
            }
            (Step::Remount { file, mount } | Step::Adopt { file, mount }, Some(clone)) => {
                let remounted = if self.context.beneath {
                    self.remount(file, mount, &clone)
                } else {
                    // Before kernel 6.5 the container's own file shows for a moment.
                    self.remove(file, mount).and_then(|()| self.inject(file, &clone))
                };
                remounted.map_err(|e| ("remount", e))
            }
            (_, None) => Err((
                "clone",
                StepFailure::Failed(io::Error::other("this lxcfs does not serve it")),
            )),
        }
    }

    fn inject(&self, file: ViewFile, clone: &OwnedFd) -> Result<(), StepFailure> {
        let base = self.base(file.base())?;
        let target =
            open(base, file.path_in_base(), ResolveFlags::NO_XDEV).map_err(|e| match e {
                Errno::NOENT | Errno::NOTDIR => StepFailure::Skipped(SkipReason::NotInContainer),
                // Another mount is on the path, or on a directory above it, which the table did not
                // show at the path itself.
                Errno::XDEV => StepFailure::Skipped(SkipReason::PathOccupied),
                e => e.into(),
            })?;
        Ok(move_mount(clone, &target, MoveMountFlags::empty())?)
    }

    fn remount(&self, file: ViewFile, mount: MountId, clone: &OwnedFd) -> Result<(), StepFailure> {
        let old = self.open_mount(file, mount)?;
        move_mount(clone, &old, MoveMountFlags::MOVE_MOUNT_BENEATH).map_err(changed_on_einval)?;
        detach(&old)
    }

    fn remove(&self, file: ViewFile, mount: MountId) -> Result<(), StepFailure> {
        detach(&self.open_mount(file, mount)?)
    }

    /// Opens the mount on a view file's path, if it is the one with this id. Sends its file system
    /// no request.
    fn open_mount(&self, file: ViewFile, mount: MountId) -> Result<OwnedFd, StepFailure> {
        let base = self.base(file.base())?;
        let top = open(base, file.path_in_base(), ResolveFlags::empty())?;
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let found = rustix::fs::statx(&top, "", flags, StatxFlags::MNT_ID)?;
        if MountId(found.stx_mnt_id) == mount { Ok(top) } else { Err(StepFailure::Changed) }
    }

    /// The container's `/proc` or `/sys`, checked to be procfs or sysfs.
    fn base(&self, base: BaseFs) -> Result<&OwnedFd, StepFailure> {
        let cell = &self.bases[base as usize];
        if let Some(dir) = cell.get() {
            return Ok(dir);
        }
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat2(
            rustix::fs::CWD,
            self.process.root(),
            directory,
            Mode::empty(),
            resolve,
        )?;
        let dir = open(&root, base.path(), ResolveFlags::empty())?;
        let expected = match base {
            BaseFs::Procfs => nix::sys::statfs::PROC_SUPER_MAGIC,
            BaseFs::Sysfs => nix::sys::statfs::SYSFS_MAGIC,
        };
        if rustix::fs::fstatfs(&dir)?.f_type != expected.0 {
            let why = format!("/{} is not {}", base.path(), base.fstype());
            return Err(StepFailure::Failed(io::Error::other(why)));
        }
        Ok(cell.get_or_init(|| dir))
    }
}

/// Detaches the mount whose root is open as `view`. By descriptor, because a path could have come
/// to mean another mount.
fn detach(view: &OwnedFd) -> Result<(), StepFailure> {
    rustix::mount::unmount(DecInt::from_fd(view), UnmountFlags::DETACH).map_err(changed_on_einval)
}

/// EINVAL: the mount was detached in between and is no longer part of this namespace.
fn changed_on_einval(e: Errno) -> StepFailure {
    if e == Errno::INVAL { StepFailure::Changed } else { e.into() }
}

fn open(dir: impl AsFd, path: &str, more: ResolveFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | more;
    rustix::fs::openat2(dir, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
}

fn move_mount(mount: &OwnedFd, target: &OwnedFd, more: MoveMountFlags) -> Result<(), Errno> {
    let flags =
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH | more;
    rustix::mount::move_mount(mount, "", target, "", flags)
}
