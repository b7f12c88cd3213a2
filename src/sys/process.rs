//! A process held by its pidfd, so that its pid cannot come to mean another process, or a thread
//! held by its mount namespace.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags},
};

/// A process by pid and pidfd, or a thread by its id and mount namespace.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    /// The pidfd, or the thread's mount namespace. setns(2) takes either.
    handle: OwnedFd,
    root: PathBuf,
}

/// The reason why a process cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("no process has pid {0}")]
    NotFound(i64),
    #[error("invalid pid {0}")]
    InvalidPid(i64),
    #[error("pid {0} is a kernel thread")]
    KernelThread(i64),
    #[error("failed to open process {0}: {1}")]
    Open(i64, #[source] io::Error),
}

/// `PF_KTHREAD` of a task's flags (include/linux/sched.h).
const PF_KTHREAD: u32 = 0x0020_0000;

impl Process {
    /// Opens the process that has this pid now (pidfd_open(2), kernel 5.3).
    ///
    /// # Errors
    /// Fails if there is none, or it is a kernel thread.
    pub fn open(pid: i64) -> Result<Process, ProcessError> {
        let process = Process::open_any(pid)?;
        let flags = procfs::process::Process::new(process.pid()).and_then(|p| p.stat());
        match flags.map(|stat| stat.flags) {
            Ok(flags) if flags & PF_KTHREAD != 0 => Err(ProcessError::KernelThread(pid)),
            Ok(_) => Ok(process),
            Err(_) if !process.is_alive() => Err(ProcessError::NotFound(pid)),
            Err(e) => Err(ProcessError::Open(pid, io::Error::other(e))),
        }
    }

    /// As [`Process::open`], but kernel threads too. They are in the host's mount namespace, which
    /// is never changed, or in one without procfs and sysfs (devtmpfsd(), drivers/base/devtmpfs.c).
    pub(super) fn open_any(pid: i64) -> Result<Process, ProcessError> {
        let raw =
            i32::try_from(pid).ok().filter(|pid| *pid > 0).ok_or(ProcessError::InvalidPid(pid))?;
        let checked = Pid::from_raw(raw).ok_or(ProcessError::InvalidPid(pid))?;
        let pidfd =
            rustix::process::pidfd_open(checked, PidfdFlags::empty()).map_err(|e| match e {
                rustix::io::Errno::SRCH => ProcessError::NotFound(pid),
                // A thread that does not lead its thread group (EINVAL; ENOENT since 6.15) is not a
                // process.
                rustix::io::Errno::INVAL | rustix::io::Errno::NOENT => {
                    ProcessError::InvalidPid(pid)
                }
                e => ProcessError::Open(pid, e.into()),
            })?;
        Ok(Process { pid: checked, handle: pidfd, root: PathBuf::from("/") })
    }

    /// Opens a thread that is in another mount namespace than its process, to enter that namespace.
    /// A pidfd cannot serve: before kernel 6.9 there is none of a thread.
    ///
    /// # Errors
    /// Fails if there is no such thread.
    pub fn open_thread(pid: i64, tid: i64) -> Result<Process, ProcessError> {
        let checked = i32::try_from(tid).ok().and_then(Pid::from_raw);
        let checked = checked.ok_or(ProcessError::InvalidPid(tid))?;
        let namespace = std::fs::File::open(format!("/proc/{pid}/task/{tid}/ns/mnt"));
        let namespace = namespace.map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => ProcessError::NotFound(tid),
            _ => ProcessError::Open(tid, e),
        })?;
        Ok(Process { pid: checked, handle: namespace.into(), root: PathBuf::from("/") })
    }

    /// Sets the root of a container that has not yet changed it (pivot_root(2)), as when a runtime
    /// runs its hooks. `root` is the path of the root file system in the container's mount
    /// namespace, without links.
    pub fn with_root(self, root: PathBuf) -> Process {
        Process { root, ..self }
    }

    /// The container's root in its mount namespace: `/`, unless [`Process::with_root`] set another.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Whether it has not exited. If true, the pid has referred to this process until now. Of a
    /// thread this is unknown, hence false.
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.handle, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(0))
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_exit_is_observed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(i64::from(child.id())).unwrap();
        assert!(process.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive());
        assert!(matches!(Process::open(i64::from(child.id())), Err(ProcessError::NotFound(_))));
    }

    #[test]
    fn invalid_and_missing_pids_differ() {
        for pid in [0, -1, i64::MAX, 1 << 31] {
            assert!(matches!(Process::open(pid), Err(ProcessError::InvalidPid(_))), "{pid}");
        }
        // Above any kernel.pid_max (4 Mi).
        assert!(matches!(Process::open(5 << 20), Err(ProcessError::NotFound(_))));
    }
}
