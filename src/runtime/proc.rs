//! Containers by what `/proc/PID/cgroup` says, on cgroup v1 and v2, whatever the runtime (cgroups(7)).

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{ContainerId, Error, sandboxed};
use crate::mount::{Process, ProcessError};

/// A search of `/proc` serves all who ask within this time; a pid from it is bound again before it is used.
const FRESH: Duration = Duration::from_millis(200);

/// Finds containers' first processes by searching `/proc`; askers side by side share one search.
#[derive(Clone, Debug, Default)]
pub struct Cgroups {
    last: Arc<tokio::sync::Mutex<()>>,
    found: Arc<Mutex<Option<Search>>>,
}

/// When a search began, and what it found.
type Search = (Instant, HashMap<ContainerId, i64>);

impl Cgroups {
    /// The pid of the container's first process.
    ///
    /// # Errors
    /// [`Error::NotRunning`] when no process is in a cgroup of that name.
    pub async fn pid(&self, id: &ContainerId) -> Result<i64, Error> {
        self.search(|found| found.get(id).copied(), |pid| pid.is_some())
            .await?
            .ok_or_else(|| Error::NotRunning(id.clone()))
    }

    /// All containers that have a process.
    ///
    /// # Errors
    /// When `/proc` cannot be listed.
    pub async fn running(&self) -> io::Result<Vec<ContainerId>> {
        self.search(|found| found.keys().cloned().collect(), |_: &Vec<_>| false).await
    }

    async fn search<T>(
        &self,
        look: impl Fn(&HashMap<ContainerId, i64>) -> T,
        good: impl Fn(&T) -> bool,
    ) -> io::Result<T> {
        let asked = Instant::now();
        let _one_at_a_time = self.last.lock().await;
        if let Some((at, found)) = &*self.found.lock().unwrap_or_else(PoisonError::into_inner) {
            // One that began after we asked is as good as our own; an older one only if it has what we want.
            let there = look(found);
            if *at >= asked || (at.elapsed() < FRESH && good(&there)) {
                return Ok(there);
            }
        }
        let begun = Instant::now();
        let found = tokio::task::spawn_blocking(search).await.map_err(io::Error::other)??;
        let there = look(&found);
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some((begun, found));
        Ok(there)
    }
}

/// The first process of each container on this machine.
fn search() -> io::Result<HashMap<ContainerId, i64>> {
    let mut first: HashMap<ContainerId, (u64, i64)> = HashMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry.ok().and_then(|e| e.file_name().to_str()?.parse::<i32>().ok()) else {
            continue;
        };
        // A process may end at any moment; then it is of no container.
        let Ok(cgroup) = std::fs::read(format!("/proc/{pid}/cgroup")) else { continue };
        let Some(id) = container_of(&cgroup) else { continue };
        let Ok(stat) = procfs::process::Process::new(pid).and_then(|p| p.stat()) else { continue };
        // The container's first process is the one that started first: `exec`ed ones come later.
        let started = (stat.starttime, i64::from(pid));
        first.entry(id).and_modify(|old| *old = started.min(*old)).or_insert(started);
    }
    Ok(first.into_iter().map(|(id, (_, pid))| (id, pid)).collect())
}

/// Sees to it that the process that `process` holds is of this container, now.
///
/// # Errors
/// [`Error::NotBound`] when its cgroup does not name the container, or it has ended.
pub fn bind(process: &Process, id: &ContainerId) -> Result<(), Error> {
    let pid = i64::from(process.pid());
    let cgroup = std::fs::read(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    // Alive after the reading: what was read was this process's own.
    if !process.is_alive() {
        return Err(ProcessError::Vanished(pid).into());
    }
    if components(&cgroup).any(|c| names(c, id.as_str().as_bytes())) {
        Ok(())
    } else {
        Err(Error::NotBound { id: id.clone(), pid })
    }
}

/// The name of the sandbox that a process on the host is in fact (Kata's hypervisor, gVisor's sentry).
pub fn sandbox(pid: i32) -> Option<&'static str> {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    // A container's own program can have any name; a hypervisor or sentry additionally is no child of the container's
    // runtime namespace: it lives in the host's pid namespace.
    let host = std::fs::read_link("/proc/self/ns/pid").ok()?;
    let own = std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok()?;
    (host == own && sandboxed(&comm).is_some()).then_some("a hypervisor or sentry process")
}

/// The container that a process is of, if its cgroup names one.
pub fn container(pid: i32) -> Option<ContainerId> {
    container_of(&std::fs::read(format!("/proc/{pid}/cgroup")).ok()?)
}

/// The path components of all lines `hierarchy:controllers:path`.
fn components(cgroup: &[u8]) -> impl Iterator<Item = &[u8]> {
    let path = |line: &'_ [u8]| -> Option<usize> {
        line.iter().enumerate().filter(|(_, b)| **b == b':').nth(1).map(|(i, _)| i + 1)
    };
    cgroup
        .split(|b| *b == b'\n')
        .filter_map(move |line| line.get(path(line)?..))
        .flat_map(|path| path.split(|b| *b == b'/'))
}

/// Whether a cgroup's name is a container's: the id alone (cgroupfs driver), or `cri-containerd-ID.scope`, `crio-ID.scope`,
/// `docker-ID.scope` (systemd driver), or `…:cri-containerd:ID`.
fn names(component: &[u8], id: &[u8]) -> bool {
    let plain = component.strip_suffix(b".scope").unwrap_or(component);
    plain.strip_suffix(id).is_some_and(|before| before.last().is_none_or(|b| *b == b'-' || *b == b':'))
}

/// The container that a cgroup file names: the first component with the 64 hexadecimal digits that all CRI runtimes give.
/// The first and not the last, because containers within a container belong to it.
fn container_of(cgroup: &[u8]) -> Option<ContainerId> {
    components(cgroup).find_map(|component| {
        let plain = component.strip_suffix(b".scope").unwrap_or(component);
        let id = plain.get(plain.len().checked_sub(64)?..)?;
        let hex = id.iter().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b));
        // CRI-O puts its monitor beside the container, in `crio-conmon-ID.scope`.
        let monitor = plain.windows(6).any(|w| w == b"conmon");
        (hex && !monitor && names(component, id)).then(|| ContainerId::new(std::str::from_utf8(id).ok()?).ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "8e0b9d3f6f4d1b0f9f7f1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f";

    #[test]
    fn the_container_is_read_from_every_runtimes_cgroup_path() {
        for line in [
            format!("0::/kubepods/besteffort/pod1/{ID}\n"),
            format!("0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope\n"),
            format!("0::/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope/container\n"),
            format!("12:cpu,cpuacct:/kubepods/pod1/{ID}\n11:memory:/\n"),
            format!("1:name=systemd:/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:{ID}\n"),
            format!("0::/../../kubepods/pod1/{ID}/init.scope\n"),
            format!("0::/docker/{ID}/docker/{}\n", "f".repeat(64)),
        ] {
            assert_eq!(container_of(line.as_bytes()).map(|id| id.to_string()), Some(ID.to_owned()), "{line}");
        }
    }

    #[test]
    fn what_is_no_container_is_none() {
        for line in ["0::/", "0::/user.slice/session-1.scope\n", "", "rubbish", "1:a", "0::/init.scope\n"] {
            assert_eq!(container_of(line.as_bytes()), None, "{line}");
        }
        assert_eq!(container_of(format!("0::/x.slice/crio-conmon-{ID}.scope\n").as_bytes()), None);
        assert_eq!(container_of(format!("0::/kubepods/a{ID}\n").as_bytes()), None, "65 digits");
    }

    #[test]
    fn a_process_is_bound_only_to_the_container_its_cgroup_names() {
        let id = ContainerId::new(ID).unwrap();
        let own = Process::open(i64::from(std::process::id())).unwrap();
        assert!(matches!(bind(&own, &id), Err(Error::NotBound { .. })));
        assert!(names(b"cri-containerd-abc.scope", b"abc"));
        assert!(!names(b"xabc", b"abc"), "an id is a whole one");
    }
}
