//! The mount driver: the only code that mounts. Puts view files into the mount namespace of one process, swaps them and takes
//! them out, from outside. Knows nothing of pods, runtimes or lxcfs's health.
//!
//! A visit runs on a thread of [`Workers`]: enter by pidfd, read the mount table, plan, and if there is anything to do make
//! detached mounts at home, enter again and attach them. Nothing in the container is trusted: paths are opened without
//! following links and without crossing a mount, what they lie on is checked on the open descriptor, and a mount is detached
//! by a descriptor whose mount id was compared with the table's.

mod process;
pub mod table;
mod workers;

use std::{
    cell::OnceCell,
    collections::{BTreeMap, HashSet},
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::{
    fs::{AtFlags, FlockOperation, Mode, OFlags, ResolveFlags, StatxFlags},
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags},
    path::DecInt,
    thread::{LinkNameSpaceType, ThreadNameSpaceType},
};

pub use self::{
    process::{Process, ProcessError},
    workers::{Error as WorkError, Late, Workers},
};
use crate::{
    plan::{Dev, LeftOut, Plan, Serving, Step, There, Wish, plan, sweep},
    sys,
    view::{Base, ViewFile},
};
use table::Table;

/// The view files of the serving lxcfs, each opened with `O_PATH`: every clone is made from these, so that putting a view
/// into a container sends lxcfs no request.
///
/// Holding one keeps the lxcfs mount busy: drop it when there is nothing to do, or `umount` of lxcfs by its owner fails.
#[derive(Debug)]
pub struct Source {
    pub dev: Dev,
    pub files: BTreeMap<ViewFile, OwnedFd>,
}

impl Source {
    /// What the plan needs of it.
    pub fn serving(&self) -> Serving {
        Serving { dev: self.dev, files: self.files.keys().copied().collect() }
    }
}

/// Why a visit came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("process {0} has ended")]
    Ended(i32),
    #[error("process {0} is in the host's mount namespace, which is never touched")]
    Host(i32),
    #[error("process {0} is in kube-lxcfs's own mount namespace, which is never touched")]
    Own(i32),
    #[error("the mount namespace of process {pid} cannot be entered: {cause}")]
    Enter { pid: i32, cause: io::Error },
    #[error("the mount table of process {pid} cannot be read: {cause}")]
    Observe { pid: i32, cause: io::Error },
    /// The lxcfs whose view files were to be put in is no longer mounted.
    #[error("lxcfs was unmounted during the operation")]
    SourceGone,
    /// Some steps were not made; the others were.
    #[error("process {pid}: {}", .failed.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Steps { pid: i32, failed: Vec<StepError>, outcome: Outcome },
    #[error(transparent)]
    Work(#[from] WorkError),
}

/// A step that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{what} {} failed: {cause}", .step.file())]
pub struct StepError {
    pub step: Step,
    what: &'static str,
    cause: io::Error,
}

/// What a visit found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The steps that were made.
    pub done: Vec<Step>,
    /// What was wished and is not there.
    pub left_out: Vec<(ViewFile, LeftOut)>,
}

/// What a visit is for.
#[derive(Clone, Debug)]
pub enum Task {
    /// Make the view what is wished; without a source nothing is put in. With `adopt` lxcfs files that came with the pod are
    /// made current too.
    Reconcile { wish: Wish, source: Option<Arc<Source>>, adopt: bool },
    /// Take out the view files of these lxcfs, which are gone or going.
    Sweep(Arc<HashSet<Dev>>),
}

impl Task {
    pub fn wish(wish: Wish, source: Option<Arc<Source>>) -> Task {
        Task::Reconcile { wish, source, adopt: false }
    }

    fn plan(&self, there: &There) -> Plan {
        match self {
            Task::Reconcile { wish, source, adopt } => plan(*wish, there, source.as_ref().map(|s| s.serving()), *adopt),
            Task::Sweep(of) => sweep(there, |dev| of.contains(&dev)),
        }
    }

    fn source(&self, file: ViewFile) -> Option<&OwnedFd> {
        match self {
            Task::Reconcile { source, .. } => source.as_ref()?.files.get(&file),
            Task::Sweep(_) => None,
        }
    }
}

/// Does a task in `process`'s mount namespace.
///
/// # Errors
/// See [`Error`]; repeating is safe, what is already so stays so.
pub async fn run(
    workers: &Workers,
    process: Arc<Process>,
    task: Task,
) -> Result<Result<Outcome, Error>, Late<Result<Outcome, Error>>> {
    workers.run(move |seat| visit(seat, &process, &task)).await
}

/// Reads what is there, and changes nothing.
///
/// # Errors
/// See [`Error`].
pub async fn observe(workers: &Workers, process: Arc<Process>) -> Result<There, Error> {
    let looked = workers.run(move |seat| seat.inside(&process, |inside| inside.there())).await;
    looked.unwrap_or_else(|late| Err(late.error.into()))
}

/// What an lxcfs says when a view file of it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Answers,
    /// Its process has ended.
    Gone,
    Hangs,
    /// It could not be asked: the container has ended, or hides the file.
    Unknown,
}

/// Asks the lxcfs behind a view file.
pub async fn ask(workers: &Workers, process: Arc<Process>, file: ViewFile) -> Answer {
    let opens = move |inside: &Inside<'_>| {
        let Ok(base) = inside.base(file.base()) else { return Ok(Answer::Unknown) };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        Ok(match rustix::fs::openat2(base, file.below_base(), flags, Mode::empty(), resolve) {
            Ok(_) => Answer::Answers,
            // What a FUSE file system says whose process is gone (fuse(4)), and to those who waited for it meanwhile.
            Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED) => Answer::Gone,
            Err(_) => Answer::Unknown,
        })
    };
    match workers.run(move |seat| seat.inside(&process, opens)).await {
        Ok(Ok(answer)) => answer,
        Err(Late { error: WorkError::Deadline(_), .. }) => Answer::Hangs,
        _ => Answer::Unknown,
    }
}

/// A namespace that another kube-lxcfs works on is waited for this often, this long each time: more than any visit takes.
const LOCK_TRIES: u32 = 500;
const LOCK_WAIT: Duration = Duration::from_millis(1);

/// So often a visit plans anew when the mounts change under it.
const MOST_PLANS: usize = 4;

/// The visit itself, on a worker's thread.
pub fn visit(seat: &Seat, process: &Process, task: &Task) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    let mut lock = None;
    for again in (0..MOST_PLANS).rev() {
        let Plan { steps, left_out } = seat.inside(process, |inside| {
            // Another kube-lxcfs may be at work here: what it does comes before what we see, or after what we do.
            if lock.is_none() {
                lock = inside.lock();
            }
            Ok(task.plan(&inside.there()?))
        })?;
        outcome.left_out = left_out;
        if steps.is_empty() {
            return Ok(outcome);
        }
        // Clones can be made only of mounts of the namespace one is in: at home.
        let clone = |step: Step| {
            let file = task.source(step.file());
            match step {
                Step::Inject(_) | Step::Swap(..) => file.map(|file| detached(file.as_fd(), true)),
                Step::Adopt(..) => file.map(|file| detached(file.as_fd(), false)),
                Step::Remove(..) => None,
            }
        };
        let steps: Vec<(Step, Option<io::Result<OwnedFd>>)> =
            steps.into_iter().map(|step| (step, clone(step))).collect();
        // A mount that is attached to no namespace cannot be cloned (open_tree(2): EINVAL).
        let unmounted = |e: &io::Error| e.raw_os_error() == Some(libc::EINVAL);
        if steps.iter().any(|(_, clone)| matches!(clone, Some(Err(e)) if unmounted(e))) {
            return Err(Error::SourceGone);
        }
        let mut failed = Vec::new();
        let mut changed = false;
        seat.inside(process, |inside| {
            for (step, clone) in steps {
                match inside.make(step, clone) {
                    Ok(()) => outcome.done.push(step),
                    Err((_, Refusal::LeftOut(why))) => outcome.left_out.push((step.file(), why)),
                    Err((_, Refusal::Changed)) if again > 0 => changed = true,
                    Err((what, Refusal::Changed)) => {
                        failed.push(StepError { step, what, cause: io::Error::other("it changes again and again") });
                    }
                    Err((what, Refusal::Failed(cause))) => failed.push(StepError { step, what, cause }),
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

/// A detached mount of one view file, with the options of a view, marked as ours or not.
fn detached(file: BorrowedFd<'_>, marked: bool) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let clone = rustix::mount::open_tree(file, "", flags)?;
    sys::make_view(&clone, marked)?;
    Ok(clone)
}

/// The device and inode number of a mount namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NamespaceId(u64, u64);

/// What a worker's thread holds between visits: the way home, and a `/proc` that no container can touch.
#[derive(Debug)]
pub struct Seat {
    home: OwnedFd,
    home_id: NamespaceId,
    /// The initial mount namespace as far as it can be told: pid 1's where readable, and the kernel threads'.
    host_ids: Vec<NamespaceId>,
    proc: OwnedFd,
    /// The thread's own descriptors, by which a mount is named when it is detached.
    fds: OwnedFd,
    beneath: bool,
}

impl Seat {
    /// Makes the calling thread a worker's: its root and working directory become its own, apart from the process's.
    ///
    /// # Errors
    /// Without `CAP_SYS_ADMIN`, or where `/proc` is not mounted.
    pub fn take() -> io::Result<Seat> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        let proc = rustix::fs::open("/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fds = rustix::fs::openat(&proc, "thread-self/fd", directory, Mode::empty())?;
        let home = rustix::fs::openat(&proc, "thread-self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let home_id = id_of(&rustix::fs::fstat(&home)?);
        // Kernel threads have the initial mount namespace; where pid 2 is another process, pid namespaces are nested, and it
        // is not asked.
        let kthreadd = std::fs::read("/proc/2/comm").is_ok_and(|comm| comm == b"kthreadd\n");
        let host_ids = [Some(1), kthreadd.then_some(2)]
            .into_iter()
            .flatten()
            .filter_map(|pid| rustix::fs::statat(&proc, format!("{pid}/ns/mnt"), AtFlags::empty()).ok())
            .map(|stat| id_of(&stat))
            .collect();
        Ok(Seat { home, home_id, host_ids, proc, fds, beneath: has_move_mount_beneath() })
    }

    /// Runs `work` in the process's mount namespace and comes home.
    fn inside<T>(&self, process: &Process, work: impl FnOnce(&Inside<'_>) -> Result<T, Error>) -> Result<T, Error> {
        let pid = process.pid();
        let enter = rustix::thread::move_into_thread_name_spaces(process.as_fd(), ThreadNameSpaceType::MOUNT);
        enter.map_err(|e| match e {
            rustix::io::Errno::SRCH => Error::Ended(pid),
            e => Error::Enter { pid, cause: e.into() },
        })?;
        let home = Return(self);
        let here = rustix::fs::statat(&self.proc, "thread-self/ns/mnt", AtFlags::empty()).map(|stat| id_of(&stat));
        let here = here.map_err(|e| Error::Enter { pid, cause: e.into() })?;
        if self.host_ids.contains(&here) {
            return Err(Error::Host(pid));
        }
        if here == self.home_id {
            return Err(Error::Own(pid));
        }
        // Whatever is named by a relative path from here on is one of this thread's descriptors.
        rustix::process::fchdir(&self.fds).map_err(|e| Error::Enter { pid, cause: e.into() })?;
        let done = work(&Inside { seat: self, process, pid, bases: Default::default() });
        drop(home);
        done
    }

    /// Whether a peer group has a member in the host's mount namespace, or in ours. What cannot be read counts as a yes.
    fn shares(&self, group: u64) -> bool {
        let has = |path: &str| {
            let text = self.read(path).ok()?;
            Some(Table::parse(&text).ok()?.0.iter().any(|m| m.shared == Some(group)))
        };
        // Either of the first processes shows the host's table; here and there one of them is not readable.
        let host = has("2/mountinfo").or_else(|| has("1/mountinfo"));
        has("self/mountinfo").unwrap_or(true) || host.unwrap_or(true)
    }

    /// Reads a file of the trusted `/proc`.
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let file = rustix::fs::openat(&self.proc, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut text = Vec::with_capacity(16 << 10);
        io::Read::read_to_end(&mut std::fs::File::from(file), &mut text)?;
        Ok(text)
    }
}

fn id_of(stat: &rustix::fs::Stat) -> NamespaceId {
    NamespaceId(stat.st_dev, stat.st_ino)
}

/// Brings the thread home when dropped, also when a visit panics.
struct Return<'a>(&'a Seat);

impl Drop for Return<'_> {
    fn drop(&mut self) {
        let home = rustix::thread::move_into_link_name_space(self.0.home.as_fd(), Some(LinkNameSpaceType::Mount));
        if let Err(e) = home {
            // The descriptor is held and the capability was there on the way in, so this cannot be; but a thread that stays
            // in a container must not go on, and an agent that starts again loses nothing.
            tracing::error!("no way back from a container's mount namespace: {e}");
            std::process::abort();
        }
    }
}

/// Why one step was not made.
enum Refusal {
    LeftOut(LeftOut),
    /// The mounts are no longer as they were when it was planned.
    Changed,
    Failed(io::Error),
}

impl From<rustix::io::Errno> for Refusal {
    fn from(e: rustix::io::Errno) -> Self {
        Refusal::Failed(e.into())
    }
}

/// The thread while it is in a container's mount namespace.
struct Inside<'a> {
    seat: &'a Seat,
    process: &'a Process,
    pid: i32,
    /// `/proc` and `/sys`, opened and checked when first needed.
    bases: [OnceCell<OwnedFd>; 2],
}

impl Inside<'_> {
    fn there(&self) -> Result<There, Error> {
        let observe = |cause| Error::Observe { pid: self.pid, cause };
        let text = self.seat.read("thread-self/mountinfo").map_err(observe)?;
        let table = Table::parse(&text).map_err(|e| observe(io::Error::other(e)))?;
        Ok(table.there(self.process.root().as_os_str().as_encoded_bytes(), |group| self.seat.shares(group)))
    }

    fn make(&self, step: Step, clone: Option<io::Result<OwnedFd>>) -> Result<(), (&'static str, Refusal)> {
        let clone = clone.transpose().map_err(|e| ("cloning", Refusal::Failed(e)))?;
        match (step, clone) {
            (Step::Inject(file), Some(clone)) => self.inject(file, &clone).map_err(|e| ("mounting", e)),
            (Step::Remove(file, id), _) => self.remove(file, id).map_err(|e| ("unmounting", e)),
            (Step::Swap(file, id) | Step::Adopt(file, id), Some(clone)) if self.seat.beneath => {
                self.swap(file, id, &clone).map_err(|e| ("swapping", e))
            }
            // Before kernel 6.5 there is a moment with the container's own file.
            (Step::Swap(file, id) | Step::Adopt(file, id), Some(clone)) => {
                let swap = self.remove(file, id).and_then(|()| self.inject(file, &clone));
                swap.map_err(|e| ("swapping", e))
            }
            (_, None) => Err(("cloning", Refusal::Failed(io::Error::other("lxcfs does not serve it")))),
        }
    }

    fn inject(&self, file: ViewFile, clone: &OwnedFd) -> Result<(), Refusal> {
        let base = self.base(file.base())?;
        let target = open(base, file.below_base(), ResolveFlags::NO_XDEV).map_err(|e| match e {
            rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR => Refusal::LeftOut(LeftOut::NotInContainer),
            // Another mount is on the path, or on a directory above it, that the table did not show at the path itself.
            rustix::io::Errno::XDEV => Refusal::LeftOut(LeftOut::Occupied),
            e => e.into(),
        })?;
        Ok(move_mount(clone, &target, MoveMountFlags::empty())?)
    }

    fn swap(&self, file: ViewFile, id: u64, clone: &OwnedFd) -> Result<(), Refusal> {
        let old = self.mounted(file, id)?;
        move_mount(clone, &old, MoveMountFlags::MOVE_MOUNT_BENEATH).map_err(gone_meanwhile)?;
        self.detach(&old)
    }

    fn remove(&self, file: ViewFile, id: u64) -> Result<(), Refusal> {
        let view = self.mounted(file, id)?;
        self.detach(&view)
    }

    /// The mount on a view file's path, if it is the one with this id. Sends its file system no request.
    fn mounted(&self, file: ViewFile, id: u64) -> Result<OwnedFd, Refusal> {
        let base = self.base(file.base())?;
        let top = open(base, file.below_base(), ResolveFlags::empty())?;
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let found = rustix::fs::statx(&top, "", flags, StatxFlags::MNT_ID)?;
        if found.stx_mnt_id == id { Ok(top) } else { Err(Refusal::Changed) }
    }

    /// Detaches the mount whose root is open as `view`. By descriptor, because a path could have come to mean another one.
    fn detach(&self, view: &OwnedFd) -> Result<(), Refusal> {
        rustix::mount::unmount(DecInt::from_fd(view), UnmountFlags::DETACH).map_err(gone_meanwhile)
    }

    /// A lock on the namespace that every kube-lxcfs takes before it changes it: flock(2) on the namespace's own file, gone
    /// with the descriptor. A container could hold it too, so it is waited for only so long.
    fn lock(&self) -> Option<OwnedFd> {
        let file =
            rustix::fs::openat(&self.seat.proc, "thread-self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let file = file.ok()?;
        for _ in 0..LOCK_TRIES {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(LOCK_WAIT),
                _ => return Some(file),
            }
        }
        Some(file)
    }

    /// The container's `/proc` or `/sys`, checked to be procfs or sysfs.
    fn base(&self, base: Base) -> Result<&OwnedFd, Refusal> {
        let cell = &self.bases[base as usize];
        if let Some(dir) = cell.get() {
            return Ok(dir);
        }
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat2(rustix::fs::CWD, self.process.root(), directory, Mode::empty(), resolve)?;
        let dir = open(&root, base.path(), ResolveFlags::empty())?;
        let expected = match base {
            Base::Proc => nix::sys::statfs::PROC_SUPER_MAGIC,
            Base::Sys => nix::sys::statfs::SYSFS_MAGIC,
        };
        if rustix::fs::fstatfs(&dir)?.f_type != expected.0 {
            let why = format!("/{} is no {}", base.path(), base.fstype());
            return Err(Refusal::Failed(io::Error::other(why)));
        }
        Ok(cell.get_or_init(|| dir))
    }
}

/// A mount that was detached meanwhile is none of this namespace any more (EINVAL).
fn gone_meanwhile(e: rustix::io::Errno) -> Refusal {
    if e == rustix::io::Errno::INVAL { Refusal::Changed } else { e.into() }
}

fn open(dir: impl AsFd, path: &str, more: ResolveFlags) -> Result<OwnedFd, rustix::io::Errno> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | more;
    rustix::fs::openat2(dir, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
}

fn move_mount(mount: &OwnedFd, target: &OwnedFd, more: MoveMountFlags) -> Result<(), rustix::io::Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH | more;
    rustix::mount::move_mount(mount, "", target, "", flags)
}

/// A descriptor that is none.
fn nowhere() -> BorrowedFd<'static> {
    rustix::fs::ABS
}

/// Whether this kernel can mount beneath another mount (6.5 and later). Earlier ones refuse the unknown flag.
pub fn has_move_mount_beneath() -> bool {
    rustix::mount::move_mount(nowhere(), "x", nowhere(), "x", MoveMountFlags::MOVE_MOUNT_BENEATH)
        != Err(rustix::io::Errno::INVAL)
}

/// A system call that the driver cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub name: &'static str,
    /// The kernel that brought it.
    pub since: &'static str,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (kernel {})", self.name, self.since)
    }
}

/// What this kernel, or the seccomp profile on it, refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this kernel, or a seccomp profile, does not have {}: kernel 5.12 or later without such a profile is needed", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
pub struct Lacking(pub Vec<Call>);

/// Makes each call once with nothing to work on.
///
/// # Errors
/// The calls that are missing or forbidden.
pub fn verify_calls() -> Result<(), Lacking> {
    use rustix::io::Errno;
    let missing = |e: Errno| e == Errno::NOSYS || e == Errno::PERM;
    let mut lacking = Vec::new();
    let mut probe = |name, since, result: Result<(), Errno>| {
        if result.is_err_and(missing) {
            lacking.push(Call { name, since });
        }
    };
    let tree = OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let nothing = MoveMountFlags::empty();
    // No process has the largest pid: its error is ESRCH.
    let nobody = rustix::process::Pid::from_raw(i32::MAX).map_or(Err(Errno::SRCH), |pid| {
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).map(drop)
    });
    probe("pidfd_open", "5.3", nobody);
    probe("open_tree", "5.2", rustix::mount::open_tree(nowhere(), "x", tree).map(drop));
    probe("move_mount", "5.2", rustix::mount::move_mount(nowhere(), "x", nowhere(), "x", nothing));
    probe("openat2", "5.6", open(nowhere(), "x", ResolveFlags::empty()).map(drop));
    let mount_setattr = sys::probe_mount_setattr().map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO));
    probe("mount_setattr", "5.12", mount_setattr);
    let setns = rustix::thread::move_into_thread_name_spaces(nowhere(), ThreadNameSpaceType::MOUNT);
    probe("setns", "5.8", setns);
    if lacking.is_empty() { Ok(()) } else { Err(Lacking(lacking)) }
}
