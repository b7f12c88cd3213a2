//! A sysfs that no container can make writable, of which the node's own `cpu` covers locked ones.
//!
//! A user namespace can make a mount of its own writable, but not its superblock
//! (mount_namespaces(7)). The node's sysfs has a writable one. The kernel makes a superblock of
//! sysfs for each network namespace, so another one, with the same CPUs, can be read-only.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags},
    sched::CloneFlags,
};
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags},
};

use crate::{
    model::view::ViewFile,
    sys::mountinfo::{Mount, MountTable},
};

/// A read-only sysfs in a mount namespace that no process is in.
#[derive(Debug)]
pub(super) struct ReadOnlySysfs {
    namespace: OwnedFd,
    root: OwnedFd,
}

/// The one of this process. It exits with the process, and the clones of it stay.
static SHARED: Mutex<Option<Arc<ReadOnlySysfs>>> = Mutex::new(None);

impl ReadOnlySysfs {
    /// Makes it at the first call.
    ///
    /// # Errors
    /// Those of unshare(2), mount(2) and fsopen(2).
    pub(super) fn shared() -> io::Result<Arc<ReadOnlySysfs>> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sysfs) = &*shared {
            return Ok(sysfs.clone());
        }
        // A thread, because it cannot return to the network namespace without another descriptor.
        let made = thread::Builder::new().name("sysfs".into()).spawn(ReadOnlySysfs::make)?.join();
        let made = made.unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))?;
        Ok(shared.insert(Arc::new(made)).clone())
    }

    fn make() -> io::Result<ReadOnlySysfs> {
        let namespace = enter_empty_namespace(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)?;
        let context = rustix::mount::fsopen("sysfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_flag(&context, "ro")?;
        rustix::mount::fsconfig_create(&context)?;
        let root = rustix::mount::fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::MOUNT_ATTR_RDONLY,
        )?;
        // Before kernel 6.15 only mounts of a namespace can be cloned.
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&root, "", CWD, "/", flags)?;
        Ok(ReadOnlySysfs { namespace, root })
    }

    /// The namespace in which its files can be cloned.
    pub(super) fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// Opens a view file with `O_PATH`.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub(super) fn open(&self, file: ViewFile) -> io::Result<OwnedFd> {
        let resolve =
            ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let opened =
            rustix::fs::openat2(&self.root, file.path_in_base(), flags, Mode::empty(), resolve);
        Ok(opened?)
    }
}

/// Moves the thread into a mount namespace of its own, in which only the root is mounted, so that
/// it keeps none of the node's other file systems mounted. `namespaces` are those to make.
///
/// # Errors
/// Those of unshare(2), mount(2) and umount2(2).
pub(super) fn enter_empty_namespace(namespaces: CloneFlags) -> io::Result<OwnedFd> {
    nix::sched::unshare(namespaces)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
    let open = |path| rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let namespace = open("/proc/thread-self/ns/mnt")?;
    detach_children_of_root()?;
    Ok(namespace)
}

/// Detaches every mount but the root of the thread's namespace.
fn detach_children_of_root() -> io::Result<()> {
    let text = std::fs::read("/proc/thread-self/mountinfo")?;
    let table = MountTable::parse(&text).map_err(io::Error::other)?;
    let Some(root) = table.top(b"/") else { return Ok(()) };
    let is_child = |mount: &&Mount<'_>| mount.parent == root.id && *mount.point != *b"/";
    // Those mounted last lie on top.
    for mount in table.mounts().iter().rev().filter(is_child) {
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        nix::mount::umount2(&*mount.point, flags)?;
    }
    Ok(())
}
