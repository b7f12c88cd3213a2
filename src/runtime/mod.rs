//! Containers to processes: over CRI where a runtime responds, else from `/proc/*/cgroup`.
//!
//! A pid is bound to its container's id through a pidfd: the pidfd is opened first, then the cgroup
//! is compared. A reused pid is never entered. Independent of mounts and pods.

pub mod cgroup;
pub mod cri;

use std::sync::{Arc, Mutex, PoisonError};

use crate::{
    model::container_id::ContainerId,
    sys::process::{Process, ProcessError},
    telemetry::OutageLog,
};

/// The source of container pids (`--pid-from`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PidSource {
    /// CRI where it responds, else `/proc`.
    Auto,
    /// CRI only.
    Cri,
    /// `/proc` only.
    Proc,
}

/// The reason why the process of a container could not be found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("container {0} is unknown to the runtime, or not running")]
    NotRunning(ContainerId),
    #[error("container {id} has its own kernel ({kind}), which lxcfs does not serve")]
    GuestKernel { id: ContainerId, kind: String },
    #[error("process {pid} does not belong to container {id}")]
    CgroupMismatch { id: ContainerId, pid: i64 },
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Cri(#[from] cri::Error),
    #[error("failed to scan /proc: {0}")]
    Proc(#[from] std::io::Error),
}

/// Finds the processes of containers.
#[derive(Clone, Debug)]
pub struct Runtime {
    cri: Option<cri::CriClient>,
    proc: cgroup::ProcScanner,
    /// With `--pid-from auto`, `/proc` is scanned where CRI does not respond.
    fall_back: bool,
    outage: Arc<Mutex<OutageLog>>,
}

impl Runtime {
    pub fn new(source: PidSource, cri: cri::CriClient) -> Runtime {
        let cri = (source != PidSource::Proc).then_some(cri);
        Runtime {
            cri,
            proc: cgroup::ProcScanner::default(),
            fall_back: source == PidSource::Auto,
            outage: Arc::new(Mutex::new(OutageLog::new("cri"))),
        }
    }

    /// The first process of a running container. `pid_hint` is the pid that the runtime reported at
    /// the start, if any; if it does not belong to the container, the runtime is queried.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn process(
        &self,
        id: &ContainerId,
        pid_hint: Option<i64>,
    ) -> Result<Arc<Process>, Error> {
        if let Some(process) = pid_hint.and_then(|pid| self.open_verified(pid, id).ok()) {
            return Ok(process);
        }
        let pid = match &self.cri {
            Some(cri) => match self.log_availability(cri.pid(id).await) {
                Err(Error::Cri(_)) if self.fall_back => self.proc.pid(id).await?,
                pid => pid?,
            },
            None => self.proc.pid(id).await?,
        };
        self.open_verified(pid, id)
    }

    fn open_verified(&self, pid: i64, id: &ContainerId) -> Result<Arc<Process>, Error> {
        let process = Process::open(pid)?;
        let verified = cgroup::verify_cgroup(&process, id);
        // gVisor has one process for all containers of a pod, in the cgroup of the pod's sandbox.
        if matches!(verified, Ok(()) | Err(Error::CgroupMismatch { .. }))
            && let Some(kind) = cgroup::guest_kernel_process(process.pid())
        {
            return Err(Error::GuestKernel { id: id.clone(), kind: kind.to_owned() });
        }
        verified.map(|()| Arc::new(process))
    }

    /// The ids of all running containers.
    ///
    /// # Errors
    /// Fails if the runtime does not respond (with [`PidSource::Cri`]), or `/proc` cannot be read.
    pub async fn running(&self) -> Result<Vec<ContainerId>, Error> {
        match &self.cri {
            Some(cri) => match cri.running().await {
                Err(_) if self.fall_back => Ok(self.proc.running().await?),
                ids => Ok(ids?),
            },
            None => Ok(self.proc.running().await?),
        }
    }

    /// Logs an outage of CRI once, and its recovery once.
    fn log_availability<T>(&self, response: Result<T, Error>) -> Result<T, Error> {
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        match &response {
            Err(Error::Cri(e)) if self.fall_back => {
                outage.failed("CRI is unavailable, falling back to /proc for pids", e);
            }
            Err(Error::Cri(e)) => outage.failed("failed to resolve pids over CRI", e),
            _ => outage.recovered("CRI responds again"),
        }
        response
    }
}

/// Whether a runtime gives containers their own kernel, by the name of the runtime type, its
/// handler or its process on the host. Kata, gVisor and Firecracker containers have no process on
/// the host's kernel.
pub fn guest_kernel(name: &str) -> Option<&str> {
    const KINDS: [&str; 8] = [
        "kata",
        "runsc",
        "gvisor",
        "firecracker",
        "qemu-system",
        "cloud-hypervi",
        "dragonball",
        "nabla",
    ];
    KINDS.into_iter().any(|kind| name.contains(kind)).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gvisors_process_is_recognised_in_the_cgroup_of_the_sandbox() {
        let id = ContainerId::new(&"a".repeat(64)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let opened = |name| {
            let program = dir.path().join(name);
            std::fs::copy("/bin/sleep", &program).unwrap();
            let mut child = std::process::Command::new(&program).arg("60").spawn().unwrap();
            let cri = cri::CriClient::new(None, crate::sys::host_root::HostRoot::default());
            let runtime = Runtime::new(PidSource::Proc, cri);
            let opened = runtime.open_verified(child.id().into(), &id);
            child.kill().unwrap();
            child.wait().unwrap();
            opened.unwrap_err()
        };
        assert!(matches!(opened("runsc"), Error::GuestKernel { kind, .. } if kind == "gVisor"));
        assert!(matches!(opened("run"), Error::CgroupMismatch { .. }));
    }

    #[test]
    fn guest_kernel_runtimes_are_recognised() {
        for name in [
            "io.containerd.kata.v2",
            "io.containerd.runsc.v1",
            "runsc-sandbox",
            "qemu-system-x86",
            "kata-qemu",
        ] {
            assert!(guest_kernel(name).is_some(), "{name}");
        }
        for name in ["io.containerd.runc.v2", "crun", "", "java", "youki"] {
            assert!(guest_kernel(name).is_none(), "{name}");
        }
    }
}
