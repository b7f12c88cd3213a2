//! System interfaces: what no crate wraps safely (this file is the only one with `unsafe`),
//! processes, mount tables and the check for system calls. Independent of pods and lxcfs.
#![allow(
    unsafe_code,
    reason = "mount_setattr(2), statmount(2), listmount(2) and mallopt(3) have no safe wrapper in \
              nix or rustix, and epoll none in tokio"
)]

pub mod fuse;
pub mod host_root;
pub mod mntns;
pub mod mountinfo;
pub mod process;
pub mod statmount;
pub mod syscalls;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers a descriptor with the tokio runtime.
///
/// # Errors
/// Those of epoll_ctl(2).
///
/// # Panics
/// Outside a tokio runtime.
pub fn async_fd(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` stays open and refers to the same open file until it is dropped, which
    // the `AsyncFd` does.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// Makes glibc return freed memory to the kernel: by default, it keeps what lists of a thousand
/// containers needed once, and a heap for each thread (mallopt(3)). For use before the first thread
/// starts. Other C libraries keep their defaults.
pub fn limit_heap() {
    #[cfg(target_env = "gnu")]
    {
        const KEPT: libc::c_int = 128 << 10;
        let parameters = [
            (libc::M_ARENA_MAX, 1),
            (libc::M_TRIM_THRESHOLD, KEPT),
            (libc::M_MMAP_THRESHOLD, KEPT),
        ];
        for (parameter, value) in parameters {
            // SAFETY: the call takes two integers and sets a parameter of the allocator.
            unsafe { libc::mallopt(parameter, value) };
        }
    }
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
pub(crate) const MOUNT_ATTR_NOEXEC: u64 = 0x08;
const MOUNT_ATTR_NOATIME: u64 = 0x10;
pub(crate) const MOUNT_ATTR_NODIRATIME: u64 = 0x80;
/// The bits of the access time mode, none of them for `relatime`; all are cleared before one is
/// set.
pub(crate) const MOUNT_ATTR_ATIME: u64 = 0x70;

/// Who a view file counts as provided by, as its mount options show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// By kube-lxcfs: marked with `noatime`.
    Managed,
    /// By kube-lxcfs, over a locked mount: marked with `noatime` and `nodiratime`.
    Cover,
    /// By the pod: `relatime`, as mounts made by an admission webhook have it.
    PodProvided,
}

/// Makes a detached mount read-only, nosuid, nodev, noexec and private (mount_setattr(2), kernel
/// 5.12).
///
/// # Errors
/// Those of the call.
pub fn set_view_attrs(mount: impl AsFd, ownership: Ownership) -> io::Result<()> {
    let mark = match ownership {
        Ownership::Managed => MOUNT_ATTR_NOATIME,
        Ownership::Cover => MOUNT_ATTR_NOATIME | MOUNT_ATTR_NODIRATIME,
        Ownership::PodProvided => 0,
    };
    let attr = MountAttr {
        attr_set: MOUNT_ATTR_RDONLY
            | MOUNT_ATTR_NOSUID
            | MOUNT_ATTR_NODEV
            | MOUNT_ATTR_NOEXEC
            | mark,
        attr_clr: MOUNT_ATTR_ATIME,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    mount_setattr(mount.as_fd().as_raw_fd(), &attr)
}

/// Makes the call on an invalid descriptor, to learn whether the kernel has it.
///
/// # Errors
/// `EBADF` where the call exists, `ENOSYS` or `EPERM` where it is missing or forbidden.
pub fn probe_mount_setattr() -> io::Result<()> {
    mount_setattr(-1, &MountAttr { attr_set: MOUNT_ATTR_RDONLY, ..MountAttr::default() })
}

fn mount_setattr(fd: RawFd, attr: &MountAttr) -> io::Result<()> {
    // SAFETY: the path is a NUL-terminated literal, and `attr` points to a live `struct mount_attr`
    // of the size given. The call keeps neither. A bad descriptor is an error of the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `struct mnt_id_req` of statmount(2) and listmount(2), in its first version
/// (`MNT_ID_REQ_SIZE_VER0`).
#[repr(C)]
struct MntIdReq {
    size: u32,
    spare: u32,
    mnt_id: u64,
    param: u64,
}

const MNT_ID_REQ_SIZE: u32 = 24;
const _: () = assert!(size_of::<MntIdReq>() == MNT_ID_REQ_SIZE as usize);

// The numbers on x86-64 and arm64. libc does not have them.
const SYS_STATMOUNT: libc::c_long = 457;
const SYS_LISTMOUNT: libc::c_long = 458;

/// Describes the mount with this unique id, of the caller's mount namespace, in a
/// `struct statmount`.
fn statmount(unique_id: u64, parts: u64, buffer: &mut [u8]) -> io::Result<()> {
    let request = MntIdReq { size: MNT_ID_REQ_SIZE, spare: 0, mnt_id: unique_id, param: parts };
    // SAFETY: `request` is a live `struct mnt_id_req` of the size that it gives. The kernel writes
    // at most `buffer.len()` bytes to the buffer, which is borrowed for the call.
    let result = unsafe {
        libc::syscall(
            SYS_STATMOUNT,
            std::ptr::from_ref(&request),
            buffer.as_mut_ptr(),
            buffer.len(),
            0,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lists the unique ids of mounts of the caller's mount namespace, as many as there is room for.
/// Returns their number.
fn listmount(unique_ids: &mut [u64]) -> io::Result<usize> {
    /// `LSMT_ROOT`: all that the caller's root leads to.
    const ROOT: u64 = u64::MAX;
    let request = MntIdReq { size: MNT_ID_REQ_SIZE, spare: 0, mnt_id: ROOT, param: 0 };
    // SAFETY: `request` is a live `struct mnt_id_req` of the size that it gives. The kernel writes
    // at most `unique_ids.len()` ids to the slice, which is borrowed for the call.
    let result = unsafe {
        libc::syscall(
            SYS_LISTMOUNT,
            std::ptr::from_ref(&request),
            unique_ids.as_mut_ptr(),
            unique_ids.len(),
            0,
        )
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
