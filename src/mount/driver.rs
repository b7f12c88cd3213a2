//! The reconcile of one container: observe, plan, apply.
//!
//! The thread enters the namespace, locks it, observes the mounts and plans: see `paths.rs` and
//! `table.rs`. If there are steps, it returns to make detached mounts of lxcfs's files, because the
//! kernel clones only mounts of the caller's namespace. Then it enters again and applies the steps.
//! For a container that has just been created, it makes them before its only entry. If the mounts
//! changed in between, it plans again.
//!
//! Nothing in the container is trusted. Paths are opened without following links and without
//! crossing a mount; only the last component of a view file's path leads into the mount on it. So
//! no file system that the container mounts below its `/proc` and `/sys` gets a request, which it
//! might never answer. `/proc` and `/sys` are checked on the open descriptor, which is held from
//! the plan to the last step: the mount that the plan names is the one that is mounted on. Whether
//! it would propagate to the host is checked again in the entry that mounts. A mount is detached by
//! a descriptor whose mount id equals the planned one. A managed mount that the kernel does not
//! detach, because it is locked in a nested user namespace, is covered.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashSet},
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, FlockOperation, Mode, OFlags, ResolveFlags, StatxFlags},
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags},
    path::DecInt,
};

use super::{
    Error, Liveness, Outcome, StepError, TableLimit, Task, WorkerContext, attrs, observe, paths,
    scratch, table,
};
use crate::{
    model::view::{BaseFs, FileSet, ViewFile},
    plan::{CoverFile, Layer, MountIdentity, ObservedMounts, Plan, SkipReason, Step},
    sys::{
        Ownership,
        mountinfo::{Dev, MountId, MountTable, ReadError},
        process::Process,
        statmount::{self, Buffer, Parts},
    },
};

/// The number of plans of a reconcile whose mounts change in between.
const MAX_REPLANS: usize = 4;
/// The least number of mounts for which a scratch mount is made: it costs as much as to detach one
/// or two.
const MIN_DETACHED_TOGETHER: usize = 3;
/// The limit of detaches of one scratch mount. More than one only if a container mounts on it.
const MAX_SCRATCH_DETACHES: usize = 8;

/// What to do if another process holds the lock of the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfLocked {
    /// Change nothing: [`Error::Locked`].
    Fail,
    /// Go on without the lock.
    Ignore,
}

/// Performs a task in the mount namespace of `process`, on a worker thread. Does not wait for the
/// lock of the namespace, which matters only if there is something to change.
///
/// # Errors
/// See [`Error`].
pub fn reconcile_blocking(
    context: &WorkerContext,
    process: &Process,
    task: &Task,
    if_locked: IfLocked,
    limit: TableLimit,
) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    let mut lock = None;
    let mut locked = HashSet::new();
    for attempts_left in (0..MAX_REPLANS).rev() {
        if task.only_removes() {
            context.prepare_scratch();
        }
        let is_first = attempts_left == MAX_REPLANS - 1;
        let likely = if is_first { task.likely_steps() } else { Vec::new() };
        let fresh: FileSet = likely.iter().map(|step| step.file()).collect();
        let mut prepared = with_clones(context, task, likely)?;
        let (observed, Plan { steps, skipped, view }, held, applied) =
            context.enter(process, |entered| {
                // Another kube-lxcfs may be at work here: the lock keeps it from changes between
                // our observation and our steps.
                if lock.is_none() {
                    lock = entered.try_lock();
                }
                let may_change = lock.is_some() || if_locked == IfLocked::Ignore;
                let (mut observed, mut held) = entered.observe_and_hold(limit, fresh)?;
                observed.mark_locked(&locked);
                let plan = task.plan(&observed);
                if held.bases.is_empty() {
                    held.bases = entered.hold_bases(&observed, &plan.steps);
                }
                if may_change && !observed.scratch.is_empty() {
                    entered.remove_scratch(&observed);
                }
                // Steps without clones need no second entry, nor do those that have theirs.
                let without_clones = |step: &Step| matches!(step, Step::Remove { .. });
                let steps: Option<Vec<StepWithClone>> = if !may_change {
                    None
                } else if plan.steps.iter().all(without_clones) {
                    Some(plan.steps.iter().map(|step| (*step, None)).collect())
                } else if prepared.iter().map(|(step, _)| step).eq(&plan.steps) {
                    Some(std::mem::take(&mut prepared))
                } else {
                    None
                };
                let applied = steps.map(|steps| entered.apply(&observed, &held, steps));
                let applied = applied.transpose()?;
                Ok((observed, plan, held, applied))
            })?;
        (outcome.skipped, outcome.view) = (skipped, view);
        if steps.is_empty() && observed.scratch.is_empty() {
            return Ok(outcome);
        }
        let applied = match applied {
            Some(applied) => applied,
            None if lock.is_none() && if_locked == IfLocked::Fail => {
                return Err(Error::Locked(process.pid()));
            }
            None => {
                if may_detach_together(&steps, context.beneath) {
                    context.prepare_scratch();
                }
                let steps = with_clones(context, task, steps)?;
                let apply = |entered: &EnteredNs<'_>| entered.apply(&observed, &held, steps);
                match &lock {
                    Some(namespace) => context.enter_again(namespace, process, apply)?,
                    None => context.enter(process, apply)?,
                }
            }
        };
        let mut failed = Vec::new();
        let mut changed = false;
        for (step, applied) in applied {
            match applied {
                Ok(()) => outcome.done.push(step),
                Err((_, StepFailure::Skipped(why))) => {
                    outcome.view.remove(step.file());
                    outcome.skipped.push((step.file(), why));
                }
                Err((_, StepFailure::Changed)) if attempts_left > 0 => changed = true,
                Err((_, StepFailure::Locked(mount))) if attempts_left > 0 => {
                    locked.insert(mount);
                    changed = true;
                }
                Err((verb, why)) => failed.push(StepError { step, verb, cause: why.into() }),
            }
        }
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

/// A step and its result. An error comes with the verb of what failed.
type Applied = (Step, Result<(), (&'static str, StepFailure)>);

/// Whether the steps detach so many mounts that a scratch mount is faster.
fn may_detach_together(steps: &[Step], beneath: bool) -> bool {
    let detaches = |step: &&Step| match step {
        Step::Inject(_) => false,
        Step::Cover { locked, .. } => beneath && !locked,
        Step::Remove { .. } | Step::Remount { .. } | Step::Adopt { .. } => true,
    };
    steps.iter().filter(detaches).count() >= MIN_DETACHED_TOGETHER
}

/// Clones the files for the steps, in the thread's own mount namespace.
fn with_clones(
    context: &WorkerContext,
    task: &Task,
    steps: Vec<Step>,
) -> Result<Vec<StepWithClone>, Error> {
    let with_attrs = |detached, ownership| attrs::set(detached, ownership, context.mount_setattr);
    let of_lxcfs = |step: Step, ownership| {
        let file = task.lxcfs_file(step.file())?.as_fd();
        Some(clone(file).map_err(io::Error::from).and_then(|file| with_attrs(file, ownership)))
    };
    let clone = |step: Step| match step {
        Step::Inject(_) | Step::Remount { .. } => of_lxcfs(step, Ownership::Managed),
        Step::Adopt { .. } => of_lxcfs(step, Ownership::PodProvided),
        Step::Cover { with: CoverFile::Lxcfs, .. } => of_lxcfs(step, Ownership::Cover),
        Step::Cover { with: CoverFile::Node, file, .. } => {
            Some(context.clone_own_file(file).and_then(|own| with_attrs(own, Ownership::Cover)))
        }
        Step::Remove { .. } => None,
    };
    let steps: Vec<StepWithClone> = steps.into_iter().map(|step| (step, clone(step))).collect();
    // A mount that is attached to no namespace cannot be cloned (open_tree(2): EINVAL).
    let unmounted = |(step, clone): &StepWithClone| {
        let is_einval = |e: &io::Error| e.raw_os_error() == Some(libc::EINVAL);
        !matches!(step, Step::Cover { with: CoverFile::Node, .. })
            && matches!(clone, Some(Err(e)) if is_einval(e))
    };
    if steps.iter().any(unmounted) {
        return Err(Error::LxcfsUnmounted);
    }
    Ok(steps)
}

/// Makes a detached mount of one file.
pub(super) fn clone(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    rustix::mount::open_tree(file, "", flags)
}

/// The reason why one step was not applied.
enum StepFailure {
    Skipped(SkipReason),
    /// The mounts are no longer as planned for.
    Changed,
    /// The kernel refuses to detach this mount.
    Locked(MountId),
    Failed(io::Error),
}

impl From<StepFailure> for io::Error {
    fn from(failure: StepFailure) -> io::Error {
        match failure {
            StepFailure::Skipped(why) => io::Error::other(why.to_string()),
            StepFailure::Changed => io::Error::other("the container's mounts keep changing"),
            StepFailure::Locked(_) => {
                io::Error::other("the mount is locked in a nested user namespace")
            }
            StepFailure::Failed(cause) => cause,
        }
    }
}

impl From<Errno> for StepFailure {
    fn from(e: Errno) -> Self {
        StepFailure::Failed(e.into())
    }
}

/// The container's `/proc` and `/sys` that the steps of a plan need, held open: an open mount keeps
/// its id. One that is not the mount of the observation is absent.
type Bases = BTreeMap<BaseFs, (MountId, io::Result<OwnedFd>)>;

/// What is held open from the plan to the last step. After an observation by the mount table, it is
/// the bases.
#[derive(Default)]
struct Held {
    bases: Bases,
    /// The files with one mount, which lies on a base that is not shared. Empty without
    /// statmount(2).
    on_base: FileSet,
    /// As in [`paths::Observed`].
    own: BTreeMap<ViewFile, OwnedFd>,
    tops: BTreeMap<ViewFile, (MountId, OwnedFd)>,
}

impl Held {
    fn base(&self, base: BaseFs) -> Result<&OwnedFd, StepFailure> {
        match self.bases.get(&base) {
            None => Err(StepFailure::Changed),
            Some((_, Ok(dir))) => Ok(dir),
            Some((_, Err(e))) => Err(StepFailure::Failed(io::Error::new(e.kind(), e.to_string()))),
        }
    }

    /// Opens the mount on a view file's path again, if it is the one with this id. If it lay on
    /// the base, it must still do so.
    fn open_mount(&self, file: ViewFile, mount: MountId) -> Result<OwnedFd, StepFailure> {
        let base = self.base(file.base())?;
        if !self.on_base.contains(file) {
            return open_mount(base, file, mount);
        }
        let top = open_top(base, file)?;
        let mut buffer = Buffer::default();
        let status = statmount::of(&top, Parts::Basic, &mut buffer);
        let status = status.map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT) => StepFailure::Changed,
            _ => StepFailure::Failed(e),
        })?;
        let base = self.bases.get(&file.base()).map(|(id, _)| *id);
        if (status.id, Some(status.parent)) == (mount, base) {
            Ok(top)
        } else {
            Err(StepFailure::Changed)
        }
    }

    /// The mount on a view file's path, if it is the one with this id.
    fn top(&self, file: ViewFile, mount: MountId) -> Option<&OwnedFd> {
        self.tops.get(&file).filter(|(id, _)| *id == mount).map(|(_, top)| top)
    }
}

/// The thread while it is in a container's mount namespace.
pub(super) struct EnteredNs<'a> {
    context: &'a WorkerContext,
    process: &'a Process,
    /// The namespace's own file, until it is locked.
    namespace: Cell<Option<OwnedFd>>,
}

impl<'a> EnteredNs<'a> {
    pub(super) fn new(
        context: &'a WorkerContext,
        process: &'a Process,
        namespace: Option<OwnedFd>,
    ) -> EnteredNs<'a> {
        EnteredNs { context, process, namespace: Cell::new(namespace) }
    }

    /// Locks the namespace, unless another process holds the lock: flock(2) on the namespace's own
    /// file, released with the descriptor. Every kube-lxcfs takes it before it changes the
    /// namespace. A container could hold it too, so nothing waits for it here.
    fn try_lock(&self) -> Option<OwnedFd> {
        let file = self.namespace.take()?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).ok().map(|()| file)
    }

    /// Observes the container, and holds what was opened. If it is `fresh`, it can have mounts only
    /// on these files.
    fn observe_and_hold(
        &self,
        limit: TableLimit,
        fresh: FileSet,
    ) -> Result<(ObservedMounts, Held), Error> {
        let on_base = |mounts: &ObservedMounts| -> FileSet {
            let is_on_base = |(file, layers): &(&ViewFile, &Vec<Layer>)| {
                self.context.statmount && layers.len() == 1 && !mounts.shared.contains(&file.base())
            };
            mounts.layers.iter().filter(is_on_base).map(|(file, _)| *file).collect()
        };
        let fresh = Some(fresh).filter(|fresh| !fresh.is_empty());
        let Some(observed) = self.observe_by_path(fresh, limit) else {
            let mounts = self.observe_by_table(limit)?;
            let on_base = on_base(&mounts);
            return Ok((mounts, Held { on_base, ..Held::default() }));
        };
        let paths::Observed { mounts, bases, own, tops } = observed;
        let with_id = |(base, dir)| Some((base, (mounts.bases.get(&base)?.id, Ok(dir))));
        let bases = bases.into_iter().filter_map(with_id).collect();
        let on_base = on_base(&mounts);
        Ok((mounts, Held { bases, on_base, own, tops }))
    }

    /// Observes the container.
    pub(super) fn observe(&self, limit: TableLimit) -> Result<ObservedMounts, Error> {
        match self.observe_by_path(None, limit) {
            Some(observed) => Ok(observed.mounts),
            None => self.observe_by_table(limit),
        }
    }

    /// `None` if its mount table must be read.
    fn observe_by_path(
        &self,
        fresh: Option<FileSet>,
        limit: TableLimit,
    ) -> Option<paths::Observed> {
        let by_path = self.context.statmount && self.process.root() == Path::new("/");
        by_path.then(|| paths::resolve(fresh, limit)).flatten()
    }

    fn observe_by_table(&self, limit: TableLimit) -> Result<ObservedMounts, Error> {
        let text = self.mountinfo(limit)?;
        let table = self.parse(&text)?;
        let root = self.process.root().as_os_str().as_encoded_bytes();
        Ok(observe::observe(&table, root, |group| self.context.is_host_peer_group(group)))
    }

    /// The lines of the mount table that can matter.
    fn mountinfo(&self, limit: TableLimit) -> Result<Vec<u8>, Error> {
        let pid = self.process.pid();
        let root = self.process.root().as_os_str().as_encoded_bytes();
        let table = self.context.open("mountinfo").map_err(io::Error::from);
        let text = table
            .map_err(ReadError::Io)
            .and_then(|file| table::read(File::from(file), root, limit));
        text.map_err(|e| match e {
            ReadError::Io(cause) => Error::Observe { pid, cause },
            cause => Error::LargeTable { pid, cause },
        })
    }

    fn parse<'t>(&self, text: &'t [u8]) -> Result<MountTable<'t>, Error> {
        let fail = |e| Error::Observe { pid: self.process.pid(), cause: io::Error::other(e) };
        MountTable::parse(text).map_err(fail)
    }

    /// Opens a view file for reading, if its device is `dev`, which sends its lxcfs a request. The
    /// check and the open are of the same mount, even if the container mounts in between.
    pub(super) fn probe(&self, file: ViewFile, dev: Dev) -> Liveness {
        let Ok(base) = self.open_base(file.base()) else { return Liveness::Unknown };
        // A request to another file system hangs this process at worst, which is the probe's own.
        if check_fstype(&base, file.base()).is_err() {
            return Liveness::Unknown;
        }
        let Ok(top) = open_view(&base, file) else { return Liveness::Unknown };
        if !mount_of(&top).is_ok_and(|mount| mount.dev == dev) {
            return Liveness::Unknown;
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        // The working directory has the thread's descriptors.
        match rustix::fs::open(DecInt::from_fd(&top), flags, Mode::empty()) {
            Ok(_) => Liveness::Alive,
            // The errors of a FUSE file system whose process has exited (fuse(4)), the second for
            // requests that were pending.
            Err(Errno::NOTCONN | Errno::CONNABORTED) => Liveness::Disconnected,
            Err(_) => Liveness::Unknown,
        }
    }

    /// Opens the bases of the steps, each if it is the mount of the observation.
    fn hold_bases(&self, observed: &ObservedMounts, steps: &[Step]) -> Bases {
        let needed = |base: BaseFs| steps.iter().any(|step| step.file().base() == base);
        let open = |(base, mount): (&BaseFs, &MountIdentity)| {
            let dir = self.open_base(*base);
            let is_observed = dir.as_ref().map_or(true, |dir| mount_of(dir) == Ok(*mount));
            is_observed.then_some((*base, (mount.id, dir)))
        };
        observed.bases.iter().filter(|(base, _)| needed(**base)).filter_map(open).collect()
    }

    /// Applies the steps of a plan.
    fn apply(
        &self,
        observed: &ObservedMounts,
        held: &Held,
        steps: Vec<StepWithClone>,
    ) -> Result<Vec<Applied>, Error> {
        let in_host = self.steps_into_host(observed, held, &steps)?;
        let mut detacher = Detacher::new(self.context, observed, held, &steps);
        let mut moved = Vec::new();
        let mut applied = Vec::with_capacity(steps.len());
        for (step, clone) in steps {
            let before = detacher.moved();
            let result = if in_host.contains(&step.file()) {
                Err(("mount", StepFailure::Changed))
            } else {
                self.apply_step(held, step, clone, &mut detacher)
            };
            if detacher.moved() > before {
                moved.push(applied.len());
            }
            applied.push((step, result));
        }
        if !detacher.finish() {
            // The next observation shows what was left.
            moved.into_iter().for_each(|n| applied[n].1 = Err(("detach", StepFailure::Changed)));
        }
        Ok(applied)
    }

    /// Detaches the scratch mounts of a kube-lxcfs that was killed. One that is locked in a nested
    /// user namespace stays.
    fn remove_scratch(&self, observed: &ObservedMounts) {
        let procfs = observed.bases.get(&BaseFs::Procfs);
        let Ok(base) = self.open_base(BaseFs::Procfs) else { return };
        if mount_of(&base).ok().as_ref() != procfs {
            return;
        }
        let Some((directory, name)) = scratch::POINT_IN_PROC.rsplit_once('/') else { return };
        for mount in &observed.scratch {
            let removed = open(&base, directory, ResolveFlags::NO_XDEV)
                .and_then(|directory| open(&directory, name, ResolveFlags::empty()))
                .and_then(|top| {
                    if mount_of(&top)?.id == *mount { detach(&top) } else { Err(Errno::INVAL) }
                });
            let pid = self.process.pid();
            match removed {
                Ok(()) => tracing::info!(pid, "removed a scratch mount that was left"),
                Err(cause) => return tracing::debug!(pid, %cause, "scratch mount not removed"),
            }
        }
    }

    /// The files whose steps would mount on a mount that the host's mount namespace shares, or that
    /// has vanished.
    fn steps_into_host(
        &self,
        observed: &ObservedMounts,
        held: &Held,
        steps: &[StepWithClone],
    ) -> Result<HashSet<ViewFile>, Error> {
        // A mount that is in no peer group never joins one of the host's: only clones of a shared
        // mount do (mount_namespaces(7)). The base has been open since it was observed.
        let is_known = |step: Step| match step {
            Step::Remove { .. } => true,
            Step::Inject(file) => !observed.shared.contains(&file.base()),
            // It lies on such a base, which is checked again when it is opened.
            Step::Remount { file, .. } | Step::Adopt { file, .. } => held.on_base.contains(file),
            Step::Cover { .. } => false,
        };
        if steps.iter().all(|(step, _)| is_known(*step)) {
            return Ok(HashSet::new());
        }
        let text = self.mountinfo(TableLimit::Large)?;
        let table = self.parse(&text)?;
        let find = |id: MountId| table.by_id(id);
        let stays_inside = |step: Step| {
            let target = match step {
                _ if is_known(step) => return Some(true),
                Step::Remove { .. } => return Some(true),
                Step::Inject(file) => held.bases.get(&file.base())?.0,
                Step::Cover { mount, locked: true, .. } => mount,
                Step::Cover { mount, .. }
                | Step::Remount { mount, .. }
                | Step::Adopt { mount, .. } => find(mount)?.parent,
            };
            let shared = find(target)?.shared;
            Some(!shared.is_some_and(|group| self.context.is_host_peer_group(group)))
        };
        let steps = steps.iter().map(|(step, _)| *step);
        Ok(steps.filter(|s| stays_inside(*s) != Some(true)).map(Step::file).collect())
    }

    /// Applies one step. An error comes with the verb of what failed.
    fn apply_step(
        &self,
        held: &Held,
        step: Step,
        clone: Option<io::Result<OwnedFd>>,
        detacher: &mut Detacher,
    ) -> Result<(), (&'static str, StepFailure)> {
        let clone = clone.transpose().map_err(|e| ("clone", StepFailure::Failed(e)))?;
        let base = held.base(step.file().base()).map_err(|e| ("open the base of", e))?;
        match (step, clone) {
            (Step::Inject(file), Some(clone)) => {
                let injected = match held.own.get(&file) {
                    Some(own) => attach(&clone, own),
                    None => inject(base, file, &clone),
                };
                injected.map_err(|e| ("inject", e))
            }
            (Step::Remove { file, mount }, _) => {
                let removed = match held.top(file, mount) {
                    Some(top) => {
                        detacher.detach(top, file).map_err(|e| refused(e, base, file, mount))
                    }
                    None => remove(base, file, mount, detacher),
                };
                removed.map_err(|e| ("remove", e))
            }
            // Before kernel 6.5 a cover stays below its successor.
            (Step::Cover { file, mount, locked, .. }, Some(clone))
                if locked || !self.context.beneath =>
            {
                let covered = held.open_mount(file, mount).and_then(|top| attach(&clone, &top));
                covered.map_err(|e| ("cover", e))
            }
            (
                Step::Remount { file, mount }
                | Step::Adopt { file, mount }
                | Step::Cover { file, mount, .. },
                Some(clone),
            ) => {
                let remounted = if self.context.beneath {
                    remount(held, file, mount, &clone, detacher)
                } else {
                    // Before kernel 6.5 the container's own file shows for a moment.
                    remove(base, file, mount, detacher).and_then(|()| inject(base, file, &clone))
                };
                remounted.map_err(|e| ("remount", e))
            }
            (_, None) => Err((
                "clone",
                StepFailure::Failed(io::Error::other("this lxcfs does not serve it")),
            )),
        }
    }

    /// Opens what is mounted at the container's `/proc` or `/sys`. Sends it no request, as it may
    /// be any file system: the caller compares it with the observation.
    fn open_base(&self, base: BaseFs) -> io::Result<OwnedFd> {
        let root = self.process.root();
        if root == Path::new("/") {
            let path = match base {
                BaseFs::Procfs => "/proc",
                BaseFs::Sysfs => "/sys",
            };
            return Ok(open(rustix::fs::CWD, path, ResolveFlags::empty())?);
        }
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat2(rustix::fs::CWD, root, directory, Mode::empty(), resolve)?;
        Ok(open(&root, base.path(), ResolveFlags::empty())?)
    }
}

/// Detaches mounts of a container, together where that is faster and possible. See `scratch.rs`.
#[derive(Default)]
struct Detacher {
    /// Attached in the container.
    scratch: Option<OwnedFd>,
    files: usize,
    directories: usize,
}

impl Detacher {
    fn new(
        context: &WorkerContext,
        observed: &ObservedMounts,
        held: &Held,
        steps: &[StepWithClone],
    ) -> Detacher {
        let steps: Vec<Step> = steps.iter().map(|(step, _)| *step).collect();
        // On a shared procfs it would appear in other namespaces, and no mount could be moved.
        let may = may_detach_together(&steps, context.beneath)
            && !observed.shared.contains(&BaseFs::Procfs);
        let scratch = may.then(|| Detacher::attach(context, held)).flatten();
        Detacher { scratch, ..Detacher::default() }
    }

    fn attach(context: &WorkerContext, held: &Held) -> Option<OwnedFd> {
        let base = held.base(BaseFs::Procfs).ok()?;
        let point = open(base, scratch::POINT_IN_PROC, ResolveFlags::NO_XDEV).ok()?;
        let scratch = context.take_scratch()?;
        match move_mount(&scratch, &point, MoveMountFlags::empty()) {
            Ok(()) => Some(scratch),
            Err(_) => {
                context.return_scratch(scratch);
                None
            }
        }
    }

    /// The number of mounts that [`Detacher::finish`] detaches.
    fn moved(&self) -> usize {
        self.files + self.directories
    }

    /// Detaches the mount whose root is open as `view`: it is no longer on the path of `file`.
    fn detach(&mut self, view: &OwnedFd, file: ViewFile) -> Result<(), Errno> {
        if let Some(scratch) = &self.scratch {
            let (name, count) = match file {
                ViewFile::Cpu => {
                    (scratch::DIRECTORIES.get(self.directories), &mut self.directories)
                }
                _ => (scratch::FILES.get(self.files), &mut self.files),
            };
            let target = name.and_then(|n| open(scratch, n, ResolveFlags::NO_XDEV).ok());
            // A mount that is locked, or on a shared mount, cannot be moved (EINVAL).
            if target.is_some_and(|t| move_mount(view, &t, MoveMountFlags::empty()).is_ok()) {
                *count += 1;
                return Ok(());
            }
        }
        detach(view)
    }

    /// Detaches what was moved. Returns whether nothing is left.
    fn finish(self) -> bool {
        let Some(scratch) = self.scratch else { return true };
        let mut detached = false;
        // If the container has mounted on it, that mount is detached first.
        for _ in 0..MAX_SCRATCH_DETACHES {
            match detach(&scratch) {
                Ok(()) => detached = true,
                // It is in no namespace any more.
                Err(Errno::INVAL) => return detached,
                Err(_) => return false,
            }
        }
        false
    }
}

/// The type of procfs or sysfs (statfs(2)).
pub(super) fn magic(base: BaseFs) -> u64 {
    match base {
        BaseFs::Procfs => 0x9fa0,
        BaseFs::Sysfs => 0x6265_6572,
    }
}

/// Checks that an open file is on procfs (sysfs).
pub(super) fn check_fstype(file: &OwnedFd, base: BaseFs) -> io::Result<()> {
    if u64::try_from(rustix::fs::fstatfs(file)?.f_type) == Ok(magic(base)) {
        return Ok(());
    }
    Err(io::Error::other(format!("/{} is not {}", base.path(), base.fstype())))
}

fn inject(base: &OwnedFd, file: ViewFile, clone: &OwnedFd) -> Result<(), StepFailure> {
    let target = open(base, file.path_in_base(), ResolveFlags::NO_XDEV).map_err(|e| match e {
        Errno::NOENT | Errno::NOTDIR => StepFailure::Skipped(SkipReason::NotInContainer),
        // Another mount is on the path, or on a directory above it, which the table did not show
        // at the path itself.
        Errno::XDEV => StepFailure::Skipped(SkipReason::PathOccupied),
        e => e.into(),
    })?;
    attach(clone, &target)
}

fn attach(clone: &OwnedFd, target: &OwnedFd) -> Result<(), StepFailure> {
    Ok(move_mount(clone, target, MoveMountFlags::empty())?)
}

fn remount(
    held: &Held,
    file: ViewFile,
    mount: MountId,
    clone: &OwnedFd,
    detacher: &mut Detacher,
) -> Result<(), StepFailure> {
    let base = held.base(file.base())?;
    let old = held.open_mount(file, mount)?;
    move_mount(clone, &old, MoveMountFlags::MOVE_MOUNT_BENEATH)
        .and_then(|()| detacher.detach(&old, file))
        .map_err(|e| refused(e, base, file, mount))
}

fn remove(
    base: &OwnedFd,
    file: ViewFile,
    mount: MountId,
    detacher: &mut Detacher,
) -> Result<(), StepFailure> {
    let old = open_mount(base, file, mount)?;
    detacher.detach(&old, file).map_err(|e| refused(e, base, file, mount))
}

/// Opens the mount on a view file's path, if it is the one with this id. Sends its file system no
/// request.
fn open_mount(base: &OwnedFd, file: ViewFile, mount: MountId) -> Result<OwnedFd, StepFailure> {
    let top = open_top(base, file)?;
    if mount_of(&top)?.id == mount { Ok(top) } else { Err(StepFailure::Changed) }
}

fn open_top(base: &OwnedFd, file: ViewFile) -> Result<OwnedFd, StepFailure> {
    open_view(base, file).map_err(|e| match e {
        // A directory above the file was covered in between.
        Errno::XDEV => StepFailure::Changed,
        e => e.into(),
    })
}

/// Opens what is mounted on a view file's path. A mount on a directory above the file is not
/// crossed (EXDEV): the lookup of the next component would be a request to its file system.
pub(super) fn open_view(base: &OwnedFd, file: ViewFile) -> Result<OwnedFd, Errno> {
    let Some((directory, name)) = file.path_in_base().rsplit_once('/') else {
        return open(base, file.path_in_base(), ResolveFlags::empty());
    };
    let directory = open(base, directory, ResolveFlags::NO_XDEV)?;
    open(&directory, name, ResolveFlags::empty())
}

/// The mount and the device of an open file. Sends its file system no request.
fn mount_of(file: &OwnedFd) -> Result<MountIdentity, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = rustix::fs::statx(file, "", flags, StatxFlags::MNT_ID)?;
    let dev = Dev { major: found.stx_dev_major, minor: found.stx_dev_minor };
    Ok(MountIdentity { id: MountId(found.stx_mnt_id), dev })
}

/// Detaches the mount whose root is open as `view`. By descriptor, because a path could have come
/// to mean another mount.
fn detach(view: &OwnedFd) -> Result<(), Errno> {
    rustix::mount::unmount(DecInt::from_fd(view), UnmountFlags::DETACH)
}

/// The reason why a mount was not detached. EINVAL: it was detached in between and is no longer
/// part of this namespace, or it is locked. A mount with locked mounts on it is not cloned without
/// them (open_tree(2): EINVAL).
fn refused(e: Errno, base: &OwnedFd, file: ViewFile, mount: MountId) -> StepFailure {
    if e != Errno::INVAL {
        return e.into();
    }
    match (open_mount(base, file, mount), clone(base.as_fd())) {
        (Ok(_), Err(Errno::INVAL)) => StepFailure::Locked(mount),
        _ => StepFailure::Changed,
    }
}

pub(super) fn open(dir: impl AsFd, path: &str, more: ResolveFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | more;
    rustix::fs::openat2(dir, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
}

fn move_mount(mount: &OwnedFd, target: &OwnedFd, more: MoveMountFlags) -> Result<(), Errno> {
    let flags =
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH | more;
    rustix::mount::move_mount(mount, "", target, "", flags)
}
