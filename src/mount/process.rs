//! One process, held by its pidfd, so that its pid cannot come to mean another one.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags},
};

/// A process by pid and pidfd.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    root: PathBuf,
}

/// Why a process cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("no process has pid {0}")]
    Vanished(i64),
    #[error("pid {0} is no process id")]
    NoPid(i64),
    #[error("pid {0} is a kernel thread")]
    KernelThread(i64),
    #[error("process {0} cannot be opened: {1}")]
    Open(i64, #[source] io::Error),
}

/// `PF_KTHREAD` of a task's flags (include/linux/sched.h).
const PF_KTHREAD: u32 = 0x0020_0000;

impl Process {
    /// Opens the process that has this pid now (pidfd_open(2), kernel 5.3).
    ///
    /// # Errors
    /// When there is none, or it is a kernel thread.
    pub fn open(pid: i64) -> Result<Process, ProcessError> {
        let raw = i32::try_from(pid).ok().filter(|pid| *pid > 0).ok_or(ProcessError::NoPid(pid))?;
        let checked = Pid::from_raw(raw).ok_or(ProcessError::NoPid(pid))?;
        let pidfd = rustix::process::pidfd_open(checked, PidfdFlags::empty()).map_err(|e| match e {
            rustix::io::Errno::SRCH => ProcessError::Vanished(pid),
            // A thread that is no thread group leader (EINVAL; ENOENT since 6.15) is no process.
            rustix::io::Errno::INVAL | rustix::io::Errno::NOENT => ProcessError::NoPid(pid),
            e => ProcessError::Open(pid, e.into()),
        })?;
        let process = Process { pid: checked, pidfd, root: PathBuf::from("/") };
        let flags = procfs::process::Process::new(raw).and_then(|p| p.stat()).map(|stat| stat.flags);
        match flags {
            Ok(flags) if flags & PF_KTHREAD != 0 => Err(ProcessError::KernelThread(pid)),
            Ok(_) => Ok(process),
            Err(_) if !process.is_alive() => Err(ProcessError::Vanished(pid)),
            Err(e) => Err(ProcessError::Open(pid, io::Error::other(e))),
        }
    }

    /// For a container that has not yet changed its root (pivot_root(2)), as when a runtime runs its hooks: `root` is where its
    /// root file system is in its mount namespace, without links.
    pub fn with_root(self, root: PathBuf) -> Process {
        Process { root, ..self }
    }

    /// The container's root in its mount namespace: `/`, unless it was told otherwise.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Whether it has not ended. A true answer also says that the pid meant this process until now.
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(0))
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_process_opens_and_its_end_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(i64::from(child.id())).unwrap();
        assert!(process.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive());
        assert!(matches!(Process::open(i64::from(child.id())), Err(ProcessError::Vanished(_))));
    }

    #[test]
    fn what_is_no_process_is_told_apart() {
        for pid in [0, -1, i64::MAX, 1 << 31] {
            assert!(matches!(Process::open(pid), Err(ProcessError::NoPid(_))), "{pid}");
        }
        // Above any kernel.pid_max (4 Mi).
        assert!(matches!(Process::open(5 << 20), Err(ProcessError::Vanished(_))));
    }
}
