//! Containers by their cgroup paths in `/proc/PID/cgroup`, on cgroup v1 and v2, for any runtime
//! (cgroups(7)).

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::fs::StatFs;

use super::{Error, guest_kernel};
use crate::{
    model::container_id::ContainerId,
    sys::process::{Process, ProcessError},
};

/// The time for which a scan is reused. A pid from it is verified again before its use.
const CACHE_TTL: Duration = Duration::from_millis(200);

/// The version of the node's cgroups. The hybrid of both counts as version 1, because its
/// controllers are in hierarchies of version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupVersion {
    V1,
    V2,
}

impl CgroupVersion {
    /// The node's, by the file system at `/sys/fs/cgroup` (cgroups(7)).
    pub fn of_node() -> CgroupVersion {
        let is_v2 = |fs: StatFs| fs.f_type == libc::CGROUP2_SUPER_MAGIC;
        if rustix::fs::statfs("/sys/fs/cgroup").is_ok_and(is_v2) {
            CgroupVersion::V2
        } else {
            CgroupVersion::V1
        }
    }

    /// Its label in metrics.
    pub fn label(self) -> &'static str {
        match self {
            CgroupVersion::V1 => "v1",
            CgroupVersion::V2 => "v2",
        }
    }
}

/// Finds the first processes of containers by a scan of `/proc`. Concurrent callers share one scan.
#[derive(Clone, Debug, Default)]
pub struct ProcScanner {
    scanning: Arc<tokio::sync::Mutex<()>>,
    last: Arc<Mutex<Option<Scan>>>,
}

/// The start time of a scan, and the first process of each container.
type Scan = (Instant, HashMap<ContainerId, i64>);

impl ProcScanner {
    /// The pid of the container's first process.
    ///
    /// # Errors
    /// [`Error::NotRunning`] when no process is in a cgroup of that name.
    pub async fn pid(&self, id: &ContainerId) -> Result<i64, Error> {
        self.scan(|found| found.get(id).copied(), |pid| pid.is_some())
            .await?
            .ok_or_else(|| Error::NotRunning(id.clone()))
    }

    /// All containers that have a process.
    ///
    /// # Errors
    /// Fails if `/proc` cannot be listed.
    pub async fn running(&self) -> io::Result<Vec<ContainerId>> {
        self.scan(|found| found.keys().cloned().collect(), |_: &Vec<_>| false).await
    }

    async fn scan<T>(
        &self,
        select: impl Fn(&HashMap<ContainerId, i64>) -> T,
        is_complete: impl Fn(&T) -> bool,
    ) -> io::Result<T> {
        let requested_at = Instant::now();
        let _one_at_a_time = self.scanning.lock().await;
        if let Some((started, found)) = &*self.last.lock().unwrap_or_else(PoisonError::into_inner) {
            // A scan that started after the request serves it; an older one only if it has the
            // result.
            let selected = select(found);
            if *started >= requested_at || (started.elapsed() < CACHE_TTL && is_complete(&selected))
            {
                return Ok(selected);
            }
        }
        let started = Instant::now();
        let found = tokio::task::spawn_blocking(scan).await.map_err(io::Error::other)??;
        let selected = select(&found);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((started, found));
        Ok(selected)
    }
}

/// The first process of each container on this machine.
fn scan() -> io::Result<HashMap<ContainerId, i64>> {
    let mut first: HashMap<ContainerId, (u64, i64)> = HashMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry.ok().and_then(|e| e.file_name().to_str()?.parse::<i32>().ok()) else {
            continue;
        };
        // A process may exit at any moment; then it belongs to no container.
        let Ok(cgroup) = read(pid) else { continue };
        let Some(id) = container_of_cgroup(&cgroup) else { continue };
        let Ok(stat) = procfs::process::Process::new(pid).and_then(|p| p.stat()) else { continue };
        // The container's first process is the one that started first: `exec`ed ones come later.
        let started = (stat.starttime, i64::from(pid));
        first.entry(id).and_modify(|old| *old = started.min(*old)).or_insert(started);
    }
    Ok(first.into_iter().map(|(id, (_, pid))| (id, pid)).collect())
}

/// The cgroups of a process (cgroups(7)): usually with one read, for which the kernel makes the
/// whole text each time.
fn read(pid: i32) -> io::Result<Vec<u8>> {
    let mut text = Vec::with_capacity(4096);
    File::open(format!("/proc/{pid}/cgroup"))?.read_to_end(&mut text)?;
    Ok(text)
}

/// Verifies that `process` belongs to this container now.
///
/// # Errors
/// [`Error::CgroupMismatch`] when its cgroup does not name the container, or it has exited.
pub fn verify_cgroup(process: &Process, id: &ContainerId) -> Result<(), Error> {
    let pid = i64::from(process.pid());
    let cgroup = read(process.pid()).unwrap_or_default();
    // It is alive after the read, so the text was its own.
    if !process.is_alive() {
        return Err(ProcessError::NotFound(pid).into());
    }
    if components(&cgroup).any(|c| names_container(c, id.as_str().as_bytes())) {
        Ok(())
    } else {
        Err(Error::CgroupMismatch { id: id.clone(), pid })
    }
}

/// Whether a process of the host is in fact a sandbox with its own kernel (Kata's hypervisor,
/// gVisor's sentry), or gVisor's file server, and which.
pub fn guest_kernel_process(pid: i32) -> Option<&'static str> {
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let program = program.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // gVisor starts itself again as `exe`, and its file server has a pid namespace.
    if program == "runsc" {
        return Some("gVisor");
    }
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    // A container's program can have any name. A hypervisor or sentry is also in the host's pid
    // namespace.
    let host = std::fs::read_link("/proc/self/ns/pid").ok()?;
    let own = std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok()?;
    (host == own && guest_kernel(&comm).is_some()).then_some("a hypervisor or sentry process")
}

/// The container that a process belongs to, if its cgroup names one.
pub fn container_of_process(pid: i32) -> Option<ContainerId> {
    container_of_cgroup(&read(pid).ok()?)
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

/// Whether a cgroup has the name of a container: the id alone (cgroupfs driver), or
/// `cri-containerd-ID.scope`, `crio-ID.scope`, `docker-ID.scope` (systemd driver), or
/// `…:cri-containerd:ID`.
fn names_container(component: &[u8], id: &[u8]) -> bool {
    let plain = component.strip_suffix(b".scope").unwrap_or(component);
    plain
        .strip_suffix(id)
        .is_some_and(|before| before.last().is_none_or(|b| *b == b'-' || *b == b':'))
}

/// The container that a cgroup file names: the first component with the 64 hexadecimal digits that
/// all CRI runtimes use. The first and not the last, because containers within a container belong
/// to it.
fn container_of_cgroup(cgroup: &[u8]) -> Option<ContainerId> {
    components(cgroup).find_map(|component| {
        let plain = component.strip_suffix(b".scope").unwrap_or(component);
        let id = plain.get(plain.len().checked_sub(64)?..)?;
        let hex = id.iter().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b));
        // CRI-O runs its monitor beside the container, in `crio-conmon-ID.scope`.
        let monitor = plain.windows(6).any(|w| w == b"conmon");
        (hex && !monitor && names_container(component, id))
            .then(|| ContainerId::new(std::str::from_utf8(id).ok()?).ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "8e0b9d3f6f4d1b0f9f7f1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f";

    #[test]
    fn container_id_is_read_from_any_cgroup_path() {
        for line in [
            format!("0::/kubepods/besteffort/pod1/{ID}\n"),
            format!("0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope\n"),
            format!("0::/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope/container\n"),
            format!("12:cpu,cpuacct:/kubepods/pod1/{ID}\n11:memory:/\n"),
            format!(
                "1:name=systemd:/system.slice/containerd.service/\
                 kubepods-pod1.slice:cri-containerd:{ID}\n"
            ),
            format!("0::/../../kubepods/pod1/{ID}/init.scope\n"),
            format!("0::/docker/{ID}/docker/{}\n", "f".repeat(64)),
        ] {
            assert_eq!(
                container_of_cgroup(line.as_bytes()).map(|id| id.to_string()),
                Some(ID.to_owned()),
                "{line}"
            );
        }
    }

    #[test]
    fn other_cgroups_name_no_container() {
        for line in
            ["0::/", "0::/user.slice/session-1.scope\n", "", "rubbish", "1:a", "0::/init.scope\n"]
        {
            assert_eq!(container_of_cgroup(line.as_bytes()), None, "{line}");
        }
        assert_eq!(
            container_of_cgroup(format!("0::/x.slice/crio-conmon-{ID}.scope\n").as_bytes()),
            None
        );
        assert_eq!(
            container_of_cgroup(format!("0::/kubepods/a{ID}\n").as_bytes()),
            None,
            "65 digits"
        );
    }

    #[test]
    fn process_must_be_in_the_containers_cgroup() {
        let id = ContainerId::new(ID).unwrap();
        let own = Process::open(i64::from(std::process::id())).unwrap();
        assert!(matches!(verify_cgroup(&own, &id), Err(Error::CgroupMismatch { .. })));
        assert!(names_container(b"cri-containerd-abc.scope", b"abc"));
        assert!(!names_container(b"xabc", b"abc"), "a part of an id");
    }
}
