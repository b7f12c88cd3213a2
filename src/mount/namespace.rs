//! Entering a container's mount namespace and returning from it, on a worker thread.

use std::{
    cell::RefCell,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags},
    thread::{LinkNameSpaceType, ThreadNameSpaceType},
};

use super::{
    Error,
    driver::{EnteredNs, check_fstype, clone},
    scratch,
    sysfs::ReadOnlySysfs,
};
use crate::{
    model::view::{BaseFs, ViewFile},
    sys::{
        mountinfo::{self, Mount},
        process::Process,
        statmount::{self, Buffer, Parts},
        syscalls,
    },
};

/// The device and inode number of a mount namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NamespaceId(u64, u64);

impl NamespaceId {
    fn of(stat: &rustix::fs::Stat) -> NamespaceId {
        NamespaceId(stat.st_dev, stat.st_ino)
    }
}

/// The state of a worker thread between jobs: its own mount namespace to return to, and a `/proc`
/// that no container can change.
#[derive(Debug)]
pub struct WorkerContext {
    own_mntns: OwnedFd,
    own_ns: NamespaceId,
    /// The initial mount namespace as far as it is known: that of pid 1 where readable, and that
    /// of kernel threads.
    host_ns: Vec<NamespaceId>,
    proc: OwnedFd,
    /// The thread's own directory in that `/proc`: a lookup of `thread-self` costs 4 µs each time.
    task: OwnedFd,
    /// The thread's own `fd` directory: the driver names a mount by its descriptor when it
    /// detaches it.
    fds: OwnedFd,
    /// Whether the kernel has `MOVE_MOUNT_BENEATH`.
    pub(super) beneath: bool,
    /// The kernel has mount_setattr(2).
    pub(super) mount_setattr: bool,
    /// The kernel has statmount(2), and no seccomp profile forbids it.
    pub(super) statmount: bool,
    /// A clone of the scratch mount for the next container. An unused one is kept, because its end
    /// would wait for RCU.
    spare_scratch: RefCell<Option<OwnedFd>>,
}

impl WorkerContext {
    /// Prepares the calling thread: its root and working directory become its own, apart from the
    /// process's.
    ///
    /// # Errors
    /// Fails if `/proc` is not mounted.
    pub fn new() -> io::Result<WorkerContext> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::open("/proc", directory, Mode::empty())?;
        let task = rustix::fs::openat(&proc, "thread-self", directory, Mode::empty())?;
        let fds = rustix::fs::openat(&task, "fd", directory, Mode::empty())?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let own_mntns = rustix::fs::openat(&task, "ns/mnt", flags, Mode::empty())?;
        let own_ns = NamespaceId::of(&rustix::fs::fstat(&own_mntns)?);
        // Kernel threads are in the initial mount namespace. In a nested pid namespace pid 2 is
        // another process and is ignored.
        let kthreadd = std::fs::read("/proc/2/comm").is_ok_and(|comm| comm == b"kthreadd\n");
        let host_ns = [Some(1), kthreadd.then_some(2)]
            .into_iter()
            .flatten()
            .filter_map(|pid| {
                rustix::fs::statat(&proc, format!("{pid}/ns/mnt"), AtFlags::empty()).ok()
            })
            .map(|stat| NamespaceId::of(&stat))
            .collect();
        let statmount = statmount::of(&proc, Parts::Basic, &mut Buffer::default()).is_ok();
        Ok(WorkerContext {
            own_mntns,
            own_ns,
            host_ns,
            proc,
            task,
            fds,
            beneath: syscalls::has_move_mount_beneath(),
            mount_setattr: syscalls::has_mount_setattr(),
            statmount,
            spare_scratch: RefCell::new(None),
        })
    }

    /// Runs `work` in the mount namespace of `process`, and returns to the thread's own.
    pub(super) fn enter<T>(
        &self,
        process: &Process,
        work: impl FnOnce(&EnteredNs<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let pid = process.pid();
        let entered = rustix::thread::move_into_thread_name_spaces(
            process.as_fd(),
            ThreadNameSpaceType::MOUNT,
        );
        entered.map_err(|e| match e {
            rustix::io::Errno::SRCH => Error::ProcessExited(pid),
            e => Error::Enter { pid, cause: e.into() },
        })?;
        let restore = RestoreNs(self);
        let fail = |e: rustix::io::Errno| Error::Enter { pid, cause: e.into() };
        let namespace = self.open("ns/mnt").map_err(fail)?;
        let current = NamespaceId::of(&rustix::fs::fstat(&namespace).map_err(fail)?);
        if self.host_ns.contains(&current) {
            return Err(Error::HostNamespace(pid));
        }
        if current == self.own_ns {
            return Err(Error::OwnNamespace(pid));
        }
        self.work_in(process, Some(namespace), restore, work)
    }

    /// Enters a namespace again that [`EnteredNs::try_lock`] has locked: it was checked.
    pub(super) fn enter_again<T>(
        &self,
        namespace: &OwnedFd,
        process: &Process,
        work: impl FnOnce(&EnteredNs<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let kind = Some(LinkNameSpaceType::Mount);
        let entered = rustix::thread::move_into_link_name_space(namespace.as_fd(), kind);
        entered.map_err(|e| Error::Enter { pid: process.pid(), cause: e.into() })?;
        self.work_in(process, None, RestoreNs(self), work)
    }

    fn work_in<T>(
        &self,
        process: &Process,
        namespace: Option<OwnedFd>,
        restore: RestoreNs<'_>,
        work: impl FnOnce(&EnteredNs<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        // From here on a relative path names one of this thread's descriptors.
        let changed = rustix::process::fchdir(&self.fds);
        changed.map_err(|e| Error::Enter { pid: process.pid(), cause: e.into() })?;
        let result = work(&EnteredNs::new(self, process, namespace));
        drop(restore);
        result
    }

    /// Whether a peer group has a member in the host's mount namespace, or in ours. If that cannot
    /// be read, the answer is yes.
    pub(super) fn is_host_peer_group(&self, group: u64) -> bool {
        let has = |path: &str| {
            let member = |line: &[u8]| Mount::parse(line).is_none_or(|m| m.shared == Some(group));
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let table = rustix::fs::openat(&self.proc, path, flags, Mode::empty()).ok()?;
            let members = mountinfo::filter_lines(File::from(table), u64::MAX, member).ok()?;
            Some(!members.is_empty())
        };
        // Both pid 2 and pid 1 show the host's table; on some machines one of them is not readable.
        let host = has("2/mountinfo").or_else(|| has("1/mountinfo"));
        has("self/mountinfo").unwrap_or(true) || host.unwrap_or(true)
    }

    /// Opens a file of the thread's own in the trusted `/proc`.
    pub(super) fn open(&self, path: &str) -> Result<OwnedFd, rustix::io::Errno> {
        rustix::fs::openat(&self.task, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
    }

    /// Makes a detached mount of the node's own file for a view file: from the trusted `/proc`, or
    /// from a sysfs that no user namespace can make writable.
    ///
    /// # Errors
    /// Fails if another mount is on the file, or that sysfs cannot be mounted.
    pub(super) fn clone_own_file(&self, file: ViewFile) -> io::Result<OwnedFd> {
        match file.base() {
            BaseFs::Procfs => Ok(clone(self.own_procfs_file(file)?.as_fd())?),
            BaseFs::Sysfs => {
                let sysfs = ReadOnlySysfs::shared()?;
                let own = sysfs.open(file)?;
                self.clone_in(sysfs.namespace(), own.as_fd())
            }
        }
    }

    /// Makes a detached mount of a file in another namespace: only mounts of the namespace that
    /// the thread is in can be cloned.
    fn clone_in(&self, namespace: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let kind = Some(LinkNameSpaceType::Mount);
        rustix::thread::move_into_link_name_space(namespace, kind)?;
        let restore = RestoreNs(self);
        let cloned = clone(file);
        drop(restore);
        Ok(cloned?)
    }

    /// Makes sure that [`WorkerContext::take_scratch`] has a scratch mount, if this process has
    /// prepared it. Without one, mounts are detached one by one.
    pub(super) fn prepare_scratch(&self) {
        let mut spare = self.spare_scratch.borrow_mut();
        if let (None, Some(scratch)) = (&*spare, scratch::shared()) {
            *spare = self.clone_in(scratch.namespace(), scratch.root()).ok();
        }
    }

    /// Gives back a scratch mount that was not attached.
    pub(super) fn return_scratch(&self, scratch: OwnedFd) {
        *self.spare_scratch.borrow_mut() = Some(scratch);
    }

    /// A detached scratch mount.
    pub(super) fn take_scratch(&self) -> Option<OwnedFd> {
        self.spare_scratch.borrow_mut().take()
    }

    fn own_procfs_file(&self, file: ViewFile) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let own = rustix::fs::openat2(
            &self.proc,
            file.path_in_base(),
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            resolve | ResolveFlags::NO_XDEV,
        )?;
        check_fstype(&own, file.base())?;
        Ok(own)
    }
}

/// Returns the thread to its own mount namespace when dropped, also after a panic.
struct RestoreNs<'a>(&'a WorkerContext);

impl Drop for RestoreNs<'_> {
    fn drop(&mut self) {
        let own = self.0.own_mntns.as_fd();
        if let Err(e) =
            rustix::thread::move_into_link_name_space(own, Some(LinkNameSpaceType::Mount))
        {
            // The descriptor is open and the capability was present on the way in, so this cannot
            // fail. But a thread that stays in a container must not go on, and an agent
            // that restarts loses nothing.
            tracing::error!(cause = %e, "failed to return from a container's mount namespace");
            std::process::abort();
        }
    }
}
