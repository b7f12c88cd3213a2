//! The options of a view file's mount, set before a container has it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    thread,
};

use nix::{mount::MsFlags, sched::CloneFlags};
use rustix::{
    fs::{AtFlags, CWD, FileType, StatxFlags},
    mount::MoveMountFlags,
};

use super::driver;
use crate::sys::{self, Ownership};

/// Sets the options of a view on a detached mount.
///
/// # Errors
/// Those of the system calls.
pub(super) fn set(
    detached: OwnedFd,
    ownership: Ownership,
    has_mount_setattr: bool,
) -> io::Result<OwnedFd> {
    if has_mount_setattr {
        sys::set_view_attrs(&detached, ownership)?;
        return Ok(detached);
    }
    // A thread, because nothing else needs its namespace.
    let thread = thread::Builder::new().name("attrs".into());
    let remounted = thread.spawn(move || remount(&detached, ownership))?.join();
    remounted.unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}

/// Before kernel 5.12 only mount(2) sets options, and only of a mount in the caller's namespace:
/// the mount is attached in a namespace of the thread's own, and cloned there.
fn remount(detached: &OwnedFd, ownership: Ownership) -> io::Result<OwnedFd> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    let change = |point: &str, flags| {
        nix::mount::mount(None::<&str>, point, None::<&str>, flags, None::<&str>)
    };
    change("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(detached, "", flags, StatxFlags::TYPE)?;
    let is_dir = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
    // Any mount point of the same kind.
    let point = if is_dir { "/" } else { "/proc/version" };
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(detached, "", CWD, point, flags)?;
    let attached = format!("/proc/thread-self/fd/{}", detached.as_raw_fd());
    change(&attached, MsFlags::MS_PRIVATE)?;
    let mark = match ownership {
        Ownership::Managed => MsFlags::MS_NOATIME,
        Ownership::Cover => MsFlags::MS_NOATIME | MsFlags::MS_NODIRATIME,
        Ownership::PodProvided => MsFlags::MS_RELATIME,
    };
    let options = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    change(&attached, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | options | mark)?;
    Ok(driver::clone(detached.as_fd())?)
}
