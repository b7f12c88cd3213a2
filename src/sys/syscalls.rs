//! The check for system calls that this kernel, or a seccomp profile, may lack.

use std::{fmt, os::fd::BorrowedFd};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags},
    thread::ThreadNameSpaceType,
};

/// An invalid descriptor.
fn invalid_fd() -> BorrowedFd<'static> {
    rustix::fs::ABS
}

/// Whether this kernel can mount beneath another mount (6.5 and later). Earlier ones refuse the
/// unknown flag.
pub fn has_move_mount_beneath() -> bool {
    rustix::mount::move_mount(
        invalid_fd(),
        "x",
        invalid_fd(),
        "x",
        MoveMountFlags::MOVE_MOUNT_BENEATH,
    ) != Err(Errno::INVAL)
}

/// Whether this kernel has mount_setattr(2) (5.12 and later), and no seccomp profile forbids it.
pub fn has_mount_setattr() -> bool {
    super::probe_mount_setattr().is_err_and(|e| e.raw_os_error() == Some(libc::EBADF))
}

/// A system call that the mount driver requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syscall {
    pub name: &'static str,
    /// The first kernel that has it.
    pub since: &'static str,
}

impl fmt::Display for Syscall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (kernel {})", self.name, self.since)
    }
}

/// The required system calls that are missing or forbidden.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this kernel, or a seccomp profile, lacks {}; use kernel 5.8 or later without such a profile",
    .0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
)]
pub struct MissingSyscalls(pub Vec<Syscall>);

/// What system calls are required for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To observe containers and to remove views.
    Remove,
    /// To mount view files, too.
    Mount,
}

/// Makes each call that the purpose requires once with invalid arguments.
///
/// # Errors
/// The calls that are missing or forbidden.
pub fn verify_syscalls(purpose: Purpose) -> Result<(), MissingSyscalls> {
    let missing = |e: Errno| e == Errno::NOSYS || e == Errno::PERM;
    let mut lacking = Vec::new();
    let mut probe = |name, since, result: Result<(), Errno>| {
        if result.is_err_and(missing) {
            lacking.push(Syscall { name, since });
        }
    };
    // No process has the largest pid: the call's error is ESRCH.
    let pidfd_open = rustix::process::Pid::from_raw(i32::MAX).map_or(Err(Errno::SRCH), |pid| {
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).map(drop)
    });
    probe("pidfd_open", "5.3", pidfd_open);
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let openat2 =
        rustix::fs::openat2(invalid_fd(), "x", flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
            .map(drop);
    probe("openat2", "5.6", openat2);
    let setns =
        rustix::thread::move_into_thread_name_spaces(invalid_fd(), ThreadNameSpaceType::MOUNT);
    probe("setns", "5.8", setns);
    if purpose == Purpose::Mount {
        let open_tree =
            rustix::mount::open_tree(invalid_fd(), "x", OpenTreeFlags::OPEN_TREE_CLOEXEC).map(drop);
        probe("open_tree", "5.2", open_tree);
        let move_mount = rustix::mount::move_mount(
            invalid_fd(),
            "x",
            invalid_fd(),
            "x",
            MoveMountFlags::empty(),
        );
        probe("move_mount", "5.2", move_mount);
    }
    if lacking.is_empty() { Ok(()) } else { Err(MissingSyscalls(lacking)) }
}
