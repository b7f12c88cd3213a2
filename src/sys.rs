//! What no crate wraps safely. The only file with `unsafe`.
#![allow(unsafe_code, reason = "mount_setattr(2) has no safe wrapper in nix or rustix, and epoll none in tokio")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Watches a descriptor from within a tokio runtime.
///
/// # Errors
/// Those of epoll_ctl(2).
///
/// # Panics
/// Outside a tokio runtime.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` stays open and names the same open file until it is dropped, which is when the `AsyncFd` is.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

const MOUNT_ATTR_RDONLY: u64 = 0x01;
const MOUNT_ATTR_NOSUID: u64 = 0x02;
const MOUNT_ATTR_NODEV: u64 = 0x04;
const MOUNT_ATTR_NOEXEC: u64 = 0x08;
const MOUNT_ATTR_NOATIME: u64 = 0x10;
/// The bits that hold the access time mode; to be cleared whole before one is set.
const MOUNT_ATTR_ATIME: u64 = 0x70;

/// Makes a detached mount read-only, nosuid, nodev, noexec and private (mount_setattr(2), kernel 5.12). It is marked as ours by
/// noatime; without the mark it is relatime, as mounts that came with a pod are.
///
/// # Errors
/// Those of the call.
pub fn make_view(mount: impl AsFd, marked: bool) -> io::Result<()> {
    let mark = if marked { MOUNT_ATTR_NOATIME } else { 0 };
    let attr = MountAttr {
        attr_set: MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | mark,
        attr_clr: MOUNT_ATTR_ATIME,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    mount_setattr(mount.as_fd().as_raw_fd(), &attr)
}

/// Makes the call with nothing to work on, to learn whether the kernel has it.
///
/// # Errors
/// `EBADF` where the call is there, `ENOSYS` or `EPERM` where it is not or is forbidden.
pub fn probe_mount_setattr() -> io::Result<()> {
    mount_setattr(-1, &MountAttr { attr_set: MOUNT_ATTR_RDONLY, ..MountAttr::default() })
}

fn mount_setattr(fd: RawFd, attr: &MountAttr) -> io::Result<()> {
    // SAFETY: the path is a NUL-terminated literal, `attr` points to a live `struct mount_attr` of the size given, and the
    // call keeps neither; a bad descriptor is an error of the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
