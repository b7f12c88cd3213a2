//! What a node has and lacks for kube-lxcfs, each with its remedy. Reads only.

use std::{fmt, path::Path, time::Duration};

use serde::Serialize;

use crate::{
    lxcfs, mount,
    mount::Workers,
    runtime::cri::{self, Cri},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// Something works less well, or only in some ways of running.
    Warn,
    /// Views cannot be put in.
    Fail,
}

/// One line of `kube-lxcfs check`.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub verdict: Verdict,
    pub detail: String,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "fail",
        };
        write!(f, "{verdict:4}  {:13}  {}", self.name, self.detail)
    }
}

fn ok(name: &'static str, detail: impl fmt::Display) -> Check {
    Check { name, verdict: Verdict::Ok, detail: detail.to_string() }
}

fn warn(name: &'static str, detail: impl fmt::Display) -> Check {
    Check { name, verdict: Verdict::Warn, detail: detail.to_string() }
}

fn fail(name: &'static str, detail: impl fmt::Display) -> Check {
    Check { name, verdict: Verdict::Fail, detail: detail.to_string() }
}

/// A capability and what it is needed for (capabilities(7)).
const CAPABILITIES: [(u32, &str, &str); 3] = [
    (18, "CAP_SYS_CHROOT", "entering a container's mount namespace"),
    (19, "CAP_SYS_PTRACE", "looking at other processes' namespaces"),
    (21, "CAP_SYS_ADMIN", "mounting"),
];

/// This process lacks a capability.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is missing, which {1} needs: run it as root")]
pub struct Unprivileged(&'static str, &'static str);

/// Whether this process has the capabilities to mount in containers.
///
/// # Errors
/// The first that is missing.
pub fn privileged() -> Result<(), Unprivileged> {
    let effective = procfs::process::Process::myself().and_then(|p| p.status()).map_or(0, |s| s.capeff);
    match CAPABILITIES.iter().rev().find(|(bit, ..)| effective & (1 << bit) == 0) {
        Some((_, name, what)) => Err(Unprivileged(name, what)),
        None => Ok(()),
    }
}

/// All that can be told of this node.
pub async fn all(lxcfs_path: &Path, cri: &Cri, nri_socket: &Path) -> Vec<Check> {
    let mut checks = vec![
        match mount::verify_calls() {
            Ok(()) => ok("kernel", "has all the mount calls (5.12 or later)"),
            Err(e) => fail("kernel", e),
        },
        if mount::has_move_mount_beneath() {
            ok("swap", "old view files are swapped for new ones without a gap (kernel 6.5 or later)")
        } else {
            warn("swap", "before kernel 6.5 a remount shows the node's own values for a moment")
        },
        match privileged() {
            Ok(()) => ok("capabilities", "all that are needed are there"),
            Err(e) => fail("capabilities", e),
        },
        host_pids(),
        serving(lxcfs_path).await,
    ];
    checks.push(match cri.version().await {
        Ok(cri::Version { endpoint, name, version }) => {
            ok("cri", format!("{name} {version} at {}", endpoint.display()))
        }
        Err(e) => warn("cri", format!("{e}; until then pids are found in /proc, and --pods-from cri has no pods")),
    });
    checks.push(nri(nri_socket));
    checks.push(cgroups());
    checks.push(api_server().await);
    checks
}

fn nri(socket: &Path) -> Check {
    let path = socket.display();
    match std::os::unix::net::UnixStream::connect(socket) {
        Ok(_) => ok("nri", format!("the runtime listens at {path}")),
        Err(e) => warn(
            "nri",
            format!(
                "{path}: {e}: views come just after a container's start, not before it; turn NRI on in the runtime, or use the hook"
            ),
        ),
    }
}

async fn serving(path: &Path) -> Check {
    let workers = match Workers::start(1, Duration::from_secs(2)) {
        Ok(workers) => workers,
        Err(e) => return fail("lxcfs", format!("cannot be looked for: {e}; run it as root")),
    };
    match lxcfs::find(&workers, path).await {
        Ok(source) => ok("lxcfs", format!("serves {} at {}", source.serving().files, path.display())),
        Err(e) => fail("lxcfs", e),
    }
}

/// Containers' processes are seen only in the host's pid namespace, where kernel threads are.
fn host_pids() -> Check {
    let is_host = procfs::process::all_processes().is_ok_and(|all| {
        all.filter_map(Result::ok).filter_map(|p| p.stat().ok()).any(|stat| stat.comm == "kthreadd" && stat.ppid == 0)
    });
    if is_host {
        ok("pids", "the host's processes are seen")
    } else {
        warn(
            "pids",
            "this is no host's pid namespace, so that only what runs below it is seen: in a pod set hostPID: true",
        )
    }
}

fn cgroups() -> Check {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        ok("cgroup", "version 2")
    } else if Path::new("/sys/fs/cgroup/memory").exists() {
        ok("cgroup", "version 1")
    } else {
        fail("cgroup", "neither version is mounted at /sys/fs/cgroup: mount it, lxcfs has no limits to show without")
    }
}

async fn api_server() -> Check {
    const NAME: &str = "api server";
    let client = match kube::Client::try_default().await {
        Ok(client) => client,
        Err(e) => {
            let e = e.to_string().replace('\n', " ");
            return warn(NAME, format!("none is known ({e}): needed only for --pods-from kubernetes; set KUBECONFIG"));
        }
    };
    match tokio::time::timeout(Duration::from_secs(5), client.apiserver_version()).await {
        Ok(Ok(version)) => ok(NAME, version.git_version),
        Ok(Err(e)) => warn(NAME, format!("does not answer: {e}; see to its address in KUBECONFIG")),
        Err(_) => warn(NAME, "does not answer within 5 s; see to its address in KUBECONFIG"),
    }
}
