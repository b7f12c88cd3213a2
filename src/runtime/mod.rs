//! Containers → processes. Over CRI where a runtime answers, else from `/proc/*/cgroup`. A pid is bound to its container's id
//! through a pidfd: opened first, then the cgroup is compared, so that a pid that was given away again is never entered.
//! Knows nothing of mounts or pods.

pub mod cri;
pub mod nri;
pub mod proc;

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Serialize, Serializer};

use crate::{
    mount::{Process, ProcessError},
    report::OutageLog,
};

/// A container's id as runtimes give it, validated: 1 to 128 of `[A-Za-z0-9_.-]`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(Arc<str>);

/// Text that is no container id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no container id: 1 to 128 letters, digits, '_', '.' and '-' are expected")]
pub struct NoContainerId(pub String);

impl ContainerId {
    /// # Errors
    /// When the text is no container id.
    pub fn new(id: &str) -> Result<Self, NoContainerId> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
        if (1..=128).contains(&id.len()) && id.bytes().all(allowed) && !id.starts_with('.') {
            Ok(ContainerId(id.into()))
        } else {
            Err(NoContainerId(id.into()))
        }
    }

    /// Parses `containerd://ID`, the form of `status.containerStatuses[].containerID` (Kubernetes API).
    ///
    /// # Errors
    /// When the part after `://` is no container id.
    pub fn from_url(url: &str) -> Result<Self, NoContainerId> {
        Self::new(url.split_once("://").map_or(url, |(_, id)| id))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 12 characters, as people name containers.
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for ContainerId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

/// Where pids are asked for (`--pid-from`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PidFrom {
    /// CRI where it answers, else `/proc`.
    Auto,
    Cri,
    Proc,
}

/// Why a container has no process to work on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("container {0} is not known to the runtime, or does not run")]
    NotRunning(ContainerId),
    #[error("container {id} runs in a sandbox of its own kernel ({kind}), where lxcfs has no part")]
    Sandboxed { id: ContainerId, kind: String },
    #[error("process {pid} is not of container {id}")]
    NotBound { id: ContainerId, pid: i64 },
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Cri(#[from] cri::Error),
    #[error("/proc cannot be searched: {0}")]
    Proc(#[from] std::io::Error),
}

/// Finds the processes of containers.
#[derive(Clone, Debug)]
pub struct Runtime {
    cri: Option<cri::Cri>,
    proc: proc::Cgroups,
    /// With `--pid-from auto`, what CRI cannot tell now is looked up in `/proc`.
    fall_back: bool,
    outage: Arc<Mutex<OutageLog>>,
}

impl Runtime {
    pub fn new(from: PidFrom, cri: cri::Cri) -> Runtime {
        let cri = (from != PidFrom::Proc).then_some(cri);
        Runtime {
            cri,
            proc: proc::Cgroups::default(),
            fall_back: from == PidFrom::Auto,
            outage: Arc::new(Mutex::new(OutageLog::new("cri"))),
        }
    }

    /// The first process of a running container. `told` is its pid where the runtime told it with the start; the runtime is asked
    /// when that is not (any more) its.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn process(&self, id: &ContainerId, told: Option<i64>) -> Result<Arc<Process>, Error> {
        if let Some(process) = told.and_then(|pid| self.bound(pid, id).ok()) {
            return Ok(process);
        }
        let pid = match &self.cri {
            Some(cri) => match self.noted(cri.pid(id).await) {
                Err(Error::Cri(_)) if self.fall_back => self.proc.pid(id).await?,
                pid => pid?,
            },
            None => self.proc.pid(id).await?,
        };
        self.bound(pid, id)
    }

    fn bound(&self, pid: i64, id: &ContainerId) -> Result<Arc<Process>, Error> {
        let process = Process::open(pid)?;
        proc::bind(&process, id)?;
        if let Some(kind) = proc::sandbox(process.pid()) {
            return Err(Error::Sandboxed { id: id.clone(), kind: kind.to_owned() });
        }
        Ok(Arc::new(process))
    }

    /// The ids of all running containers.
    ///
    /// # Errors
    /// When the runtime does not answer (with [`PidFrom::Cri`]), or `/proc` cannot be read.
    pub async fn running(&self) -> Result<Vec<ContainerId>, Error> {
        match &self.cri {
            Some(cri) => match cri.running().await {
                Err(_) if self.fall_back => Ok(self.proc.running().await?),
                ids => Ok(ids?),
            },
            None => Ok(self.proc.running().await?),
        }
    }

    /// Tells in the log, once, that CRI does not answer, and that it does again.
    fn noted<T>(&self, answer: Result<T, Error>) -> Result<T, Error> {
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        match &answer {
            Err(Error::Cri(e)) if self.fall_back => {
                outage.failed("CRI is unavailable, falling back to /proc for pids", e);
            }
            Err(Error::Cri(e)) => outage.failed("failed to resolve pids over CRI", e),
            _ => outage.recovered("CRI responds again"),
        }
        answer
    }
}

/// A sandboxed runtime, by what it calls itself: the runtime type, its handler, or its process on the host.
/// Kata, gVisor and Firecracker containers have a kernel of their own, and no process of theirs is on the host.
fn sandboxed(name: &str) -> Option<&str> {
    const KINDS: [&str; 8] =
        ["kata", "runsc", "gvisor", "firecracker", "qemu-system", "cloud-hypervi", "dragonball", "nabla"];
    KINDS.into_iter().any(|kind| name.contains(kind)).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_validated() {
        let id = ContainerId::from_url("containerd://0123abc").unwrap();
        assert_eq!(id.as_str(), "0123abc");
        assert_eq!(ContainerId::from_url("0123abc"), Ok(id));
        for bad in ["", "containerd://", "../../etc", "a/b", "a b", "a\nb", &"a".repeat(129)] {
            assert!(ContainerId::from_url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sandboxed_runtimes_are_recognised() {
        for name in ["io.containerd.kata.v2", "io.containerd.runsc.v1", "runsc-sandbox", "qemu-system-x86", "kata-qemu"]
        {
            assert!(sandboxed(name).is_some(), "{name}");
        }
        for name in ["io.containerd.runc.v2", "crun", "", "java", "youki"] {
            assert!(sandboxed(name).is_none(), "{name}");
        }
    }
}
