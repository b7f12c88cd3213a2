//! The scratch mount: a container's old mounts are moved onto its files, and are detached with it.
//!
//! Each umount2(2) waits for RCU (namespace_unlock(), fs/namespace.c), for 10 µs to more than
//! 300 µs. move_mount(2) waits for nothing, so that one wait serves all mounts of a container.
//!
//! A move keeps to one mount namespace, so the scratch mount is attached in the container's: at
//! [`POINT`], for as long as the moves take. If its process is killed in between, the next
//! reconcile of the container finds it by its source, and detaches it with what was moved onto it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, OnceLock, PoisonError},
    thread,
};

use nix::sched::CloneFlags;
use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags},
};

use super::sysfs;

/// The place of a scratch mount, relative to the container's root. Linux keeps this directory only
/// because programs could see it, and it is always empty (proc_tty_init(), fs/proc/proc_tty.c).
pub(super) const POINT: &str = "proc/tty/ldisc";
/// The same, relative to the container's `/proc`.
pub(super) const POINT_IN_PROC: &str = "tty/ldisc";
/// The source of a scratch mount, as the mount table shows it.
pub(super) const SOURCE: &[u8] = b"kube-lxcfs-scratch";
/// The files and the directories of a scratch mount. Nothing is mounted on a file but a file, and
/// on a directory but a directory. Mounts for which none is left are detached one by one.
pub(super) const FILES: [&str; 16] = [
    "f0", "f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8", "f9", "f10", "f11", "f12", "f13", "f14",
    "f15",
];
pub(super) const DIRECTORIES: [&str; 2] = ["d0", "d1"];

/// The scratch mount of this process, in a mount namespace that no process is in. Containers get
/// clones of it, which share its read-only file system. Its files are empty.
#[derive(Debug)]
pub(super) struct Scratch {
    namespace: OwnedFd,
    root: OwnedFd,
}

static SHARED: OnceLock<Scratch> = OnceLock::new();
/// Held while it is made.
static MAKING: Mutex<()> = Mutex::new(());

/// Prepares that mounts of one container are detached together. Without it they are detached one
/// by one, which is faster for a single container. Later calls do nothing.
///
/// # Errors
/// Those of unshare(2), umount2(2) and of the system calls that make a file system.
pub fn prepare() -> io::Result<()> {
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    if SHARED.get().is_none() {
        // A thread, because nothing else needs its namespace.
        let made = thread::Builder::new().name("scratch".into()).spawn(Scratch::make)?.join();
        let made = made.unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))?;
        let _ = SHARED.set(made);
    }
    Ok(())
}

/// The scratch mount of this process, if it is prepared.
pub(super) fn shared() -> Option<&'static Scratch> {
    SHARED.get()
}

impl Scratch {
    fn make() -> io::Result<Scratch> {
        let namespace = sysfs::enter_empty_namespace(CloneFlags::CLONE_NEWNS).or_else(|e| {
            // The seccomp profile of the agent allows only what the sysfs needs, too.
            if e.raw_os_error() != Some(libc::EPERM) {
                return Err(e);
            }
            sysfs::enter_empty_namespace(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        })?;
        let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_string(&context, "source", SOURCE)?;
        // No other user reads it. Without CAP_DAC_OVERRIDE, root opens its files.
        rustix::mount::fsconfig_set_string(&context, "mode", "0700")?;
        rustix::mount::fsconfig_create(&context)?;
        let attrs = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let root = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attrs)?;
        for name in FILES {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&root, name, flags, Mode::empty())?;
        }
        for name in DIRECTORIES {
            // The seccomp profile forbids it: then directories are detached one by one.
            let _ = rustix::fs::mkdirat(&root, name, Mode::empty());
        }
        // No container can write to it, whatever the options of its mount.
        rustix::mount::fsconfig_set_flag(&context, "ro")?;
        rustix::mount::fsconfig_reconfigure(&context)?;
        // Before kernel 6.15 only mounts of a namespace can be cloned.
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&root, "", CWD, "/", flags)?;
        Ok(Scratch { namespace, root })
    }

    /// The namespace in which it can be cloned.
    pub(super) fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}
