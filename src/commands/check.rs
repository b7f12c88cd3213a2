//! `kube-lxcfs check`: the prerequisites of this node, each with a fix. Reads only.

mod host;

use std::{
    convert::Infallible,
    fmt, io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use serde::Serialize;

use super::output::print;
use crate::{
    args::{Common, Output},
    lxcfs::{self, Enabled, Finder, Identity},
    mount::Workers,
    runtime::{
        PidSource,
        cgroup::CgroupVersion,
        cri::{CriClient, Version, existing_endpoints},
    },
    sys::{
        host_root::{self, HostRoot},
        syscalls::{self, Purpose},
    },
    telemetry::metrics::Metrics,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// A feature is missing, or works in some configurations only.
    Warn,
    /// Views cannot be injected.
    Fail,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "fail",
        }
    }
}

/// One line of `kube-lxcfs check`.
#[derive(Clone, Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    detail: String,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:4}  {:14}  {}", self.verdict.name(), self.name, self.detail)
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

/// Each capability: its bit, its name, and what needs it (capabilities(7)).
const CAPABILITIES: [(u32, &str, &str); 3] = [
    (18, "CAP_SYS_CHROOT", "entering a container's mount namespace"),
    (19, "CAP_SYS_PTRACE", "reading other processes' namespaces"),
    (21, "CAP_SYS_ADMIN", "entering mount namespaces and mounting"),
];

/// A capability that this process does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("missing capability {0}, needed for {1}; run kube-lxcfs as root")]
pub(super) struct MissingCapability(&'static str, &'static str);

/// Checks that this process has the capabilities to mount in containers.
///
/// # Errors
/// The first that is missing.
pub(super) fn require_capabilities() -> Result<(), MissingCapability> {
    let effective =
        procfs::process::Process::myself().and_then(|p| p.status()).map_or(0, |s| s.capeff);
    match CAPABILITIES.iter().rev().find(|(bit, ..)| effective & (1 << bit) == 0) {
        Some((_, name, what)) => Err(MissingCapability(name, what)),
        None => Ok(()),
    }
}

pub(super) async fn run(common: Common, nri_socket: &Path, output: Output) -> Result<ExitCode> {
    let mut node = Node {
        pid_from: common.pid_from,
        cri: Some(CriClient::new(common.cri_endpoint, common.host_root.clone())),
        finder: Finder::new(&common.lxcfs_path),
        workers: Workers::start(1, Duration::from_secs(2)),
        host_root: common.host_root,
        nri_socket: nri_socket.to_owned(),
        passive: false,
        enabled: None,
    };
    let checks = node.all().await;
    print(output, &checks, || checks.iter().map(ToString::to_string).collect())?;
    let failed = checks.iter().any(|c| c.verdict == Verdict::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What the checks of a node need.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) pid_from: PidSource,
    /// `None` if CRI is not used.
    pub(super) cri: Option<CriClient>,
    pub(super) finder: Finder,
    pub(super) workers: io::Result<Workers>,
    pub(super) host_root: HostRoot,
    pub(super) nri_socket: PathBuf,
    /// Connect neither to NRI nor to the API server: metrics of the agent show both.
    pub(super) passive: bool,
    /// What the lxcfs enables that served at the last check.
    pub(super) enabled: Option<(Identity, Enabled)>,
}

/// The interval of the agent's checks.
const INTERVAL: Duration = Duration::from_secs(600);

impl Node {
    /// Records the verdicts again and again.
    pub(super) async fn record(mut self, metrics: Arc<Metrics>) -> Infallible {
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let checks = self.all().await;
            for Check { name, verdict, detail } in &checks {
                tracing::debug!(check = name, ?verdict, detail, "node checked");
            }
            metrics.set_checks(checks.iter().map(|check| (check.name, check.verdict.name())));
        }
    }

    async fn all(&mut self) -> Vec<Check> {
        let mut checks = own();
        let host = self.host_root.clone();
        // The scan of the processes blocks.
        let blocking = move || {
            let mut checks = vec![host_pids()];
            checks.extend(host::kernel(&host));
            checks.push(selinux_of_node(&host));
            checks
        };
        let kernel = tokio::task::spawn_blocking(blocking);
        checks.push(self.serving().await);
        let Node { pid_from, cri, host_root, nri_socket, passive, .. } = &*self;
        if let Some(cri) = cri {
            checks.push(runtime(cri, *pid_from).await);
        }
        if !passive {
            checks.push(nri(host_root, nri_socket).await);
        }
        checks.push(sockets(&existing_endpoints(host_root)));
        checks.push(cgroups());
        checks.extend(kernel.await.unwrap_or_default());
        if !passive {
            checks.extend(api_server().await);
        }
        checks
    }

    async fn serving(&mut self) -> Check {
        let path = self.finder.path().to_owned();
        let workers = match &self.workers {
            Ok(workers) => workers,
            Err(e) => {
                return fail(
                    "lxcfs",
                    format!("failed to start a thread for the check: {e}; run kube-lxcfs as root"),
                );
            }
        };
        match self.finder.find(workers).await {
            Ok(lxcfs) => {
                let version = lxcfs::version_at(&path);
                let cgroups = CgroupVersion::of_node();
                let named = version.as_ref().map(|version| format!("version {version} "));
                let named = named.unwrap_or_default();
                let detail =
                    format!("{named}serves {} at {}", lxcfs.serving().files, path.display());
                let writable = lxcfs.writable.then(|| {
                    let path = path.display();
                    let why = "without cpu, because lxcfs is writable; make it read-only:";
                    format!("{why} mount -o remount,ro {path}")
                });
                let wrong = version.and_then(|version| wrong_values(&version, cgroups));
                let disabled = self.enabled().await.and_then(disabled);
                let problems: Vec<String> =
                    [wrong.map(str::to_owned), writable, disabled].into_iter().flatten().collect();
                if problems.is_empty() {
                    ok("lxcfs", detail)
                } else {
                    warn("lxcfs", format!("{detail}; {}", problems.join("; ")))
                }
            }
            Err(e) => fail("lxcfs", e),
        }
    }

    /// What the arguments of the serving lxcfs enable. Its process is searched once: that reads
    /// every process of the node.
    async fn enabled(&mut self) -> Option<Enabled> {
        let path = self.finder.path().to_owned();
        let serving = lxcfs::identify(&path)?;
        if let Some((of, enabled)) = self.enabled
            && of == serving
        {
            return Some(enabled);
        }
        // The search blocks.
        let found = tokio::task::spawn_blocking(move || lxcfs::enabled_at(&path)).await;
        let enabled = found.ok().flatten()?;
        self.enabled = Some((serving, enabled));
        Some(enabled)
    }
}

/// Whether the runtime responds over CRI.
async fn runtime(cri: &CriClient, pid_from: PidSource) -> Check {
    match cri.version().await {
        Ok(Version { endpoint, name, version }) => {
            ok("cri", format!("{name} {version} at {}", endpoint.display()))
        }
        Err(e) => warn("cri", format!("{e}; {}", without_cri(pid_from))),
    }
}

/// What an agent lacks without CRI. The error has the remedy for a runtime with CRI.
fn without_cri(pid_from: PidSource) -> &'static str {
    match pid_from {
        PidSource::Auto => {
            "pids are resolved from /proc, but the agent is not ready, and --pods-from cri does \
             not work; on nodes without CRI set --pid-from proc"
        }
        PidSource::Cri => {
            "no pid is resolved except those that NRI reports, and the agent is not ready; on \
             nodes without CRI set --pid-from proc"
        }
        PidSource::Proc => "pids are resolved from /proc, and only --pods-from cri does not work",
    }
}

/// The sockets of runtimes on the node.
fn sockets(found: &[&Path]) -> Check {
    const NAME: &str = "sockets";
    let paths: Vec<String> = found.iter().map(|path| path.display().to_string()).collect();
    if paths.is_empty() {
        warn(NAME, "no usual CRI socket exists on the node; set --cri-endpoint, or --host-root")
    } else {
        ok(NAME, paths.join(", "))
    }
}

/// The checks of this process and of the kernel's system calls.
fn own() -> Vec<Check> {
    vec![
        match syscalls::verify_syscalls(Purpose::Mount) {
            Ok(()) if syscalls::has_mount_setattr() => {
                ok("kernel", "has all mount system calls (5.12 or later)")
            }
            Ok(()) => ok(
                "kernel",
                "has the mount system calls (5.8 or later); without mount_setattr (5.12), each \
                 view file is prepared in a namespace of its own, which takes longer",
            ),
            Err(e) => fail("kernel", e),
        },
        if syscalls::has_move_mount_beneath() {
            ok("remount", "view files are remounted without a gap (kernel 6.5 or later)")
        } else {
            warn(
                "remount",
                "before kernel 6.5, a container reads the node's values for a moment during a \
                 remount",
            )
        },
        match require_capabilities() {
            Ok(()) => ok("capabilities", "complete"),
            Err(e) => fail("capabilities", e),
        },
    ]
}

async fn nri(host_root: &HostRoot, socket: &Path) -> Check {
    let path = socket.display();
    match host_root.connect(socket).await {
        Ok(_) => ok("nri", format!("the runtime listens at {path}")),
        Err(e) => warn(
            "nri",
            format!(
                "{path}: {e}; views are injected just after a container's start, not before it; \
                 enable NRI in the runtime, or use the hook"
            ),
        ),
    }
}

/// What a version of lxcfs shows wrongly on the node's cgroup version, by lxcfs's release notes.
fn wrong_values(version: &str, cgroups: CgroupVersion) -> Option<&'static str> {
    let number = |n: usize| version.split('.').nth(n)?.parse::<u32>().ok();
    let version = (number(0)?, number(1)?, number(2)?);
    match cgroups {
        CgroupVersion::V2 if version < (6, 0, 6) => Some(
            "on cgroup v2 it shows the node's CPUs in stat and the node's pressure; use lxcfs 7",
        ),
        CgroupVersion::V2 if version < (7, 0, 0) => {
            Some("on cgroup v2 it shows the node's pressure; use lxcfs 7")
        }
        _ => None,
    }
}

/// Which values are the node's, because the arguments of lxcfs do not enable the container's.
fn disabled(enabled: lxcfs::Enabled) -> Option<String> {
    let missing: Vec<(&str, &str)> = [
        (enabled.cfs, "--enable-cfs", "cpuinfo, stat and cpu ignore limits of CPU time"),
        (enabled.loadavg, "--enable-loadavg", "loadavg is the node's"),
    ]
    .into_iter()
    .filter_map(|(enabled, option, values)| (!enabled).then_some((option, values)))
    .collect();
    let (options, values): (Vec<&str>, Vec<&str>) = missing.iter().copied().unzip();
    let (options, values) = (options.join(" and "), values.join(", and "));
    (!missing.is_empty()).then(|| {
        format!(
            "lxcfs runs without {options}: {values}; start it with them, as the drop-in in \
             manifests/systemd/lxcfs.service.d does"
        )
    })
}

/// All containers' processes are visible only in the node's pid namespace.
fn host_pids() -> Check {
    let all = procfs::process::all_processes().into_iter().flatten();
    let stats = all.filter_map(|process| process.ok()?.stat().ok());
    pids(stats.map(|stat| (stat.comm, stat.ppid)))
}

/// The programs of the kubelet and of runtimes, as `/proc/PID/comm` has them: of kubeadm's nodes,
/// k3s, RKE2 and MicroK8s. k0s runs the first two.
const NODE_PROGRAMS: [&str; 8] =
    ["kubelet", "containerd", "crio", "dockerd", "isulad", "k3s-server", "k3s-agent", "kubelite"];

/// Decides by the names and the parents of the visible processes. The host's pid namespace has the
/// kernel threads. A node that is a container itself, as with kind, has a pid namespace without
/// them, but with the kubelet and its runtime, which no pod without `hostPID` sees.
fn pids(processes: impl IntoIterator<Item = (String, i32)>) -> Check {
    const NAME: &str = "pids";
    let mut nested_node = false;
    for (comm, parent) in processes {
        if comm == "kthreadd" && parent == 0 {
            return ok(NAME, "in the host's pid namespace");
        }
        nested_node |= NODE_PROGRAMS.contains(&&*comm);
    }
    if nested_node {
        return ok(NAME, "in the node's pid namespace, within another one");
    }
    warn(
        NAME,
        "not in the host's pid namespace: only processes below it are visible; \
         in a pod set hostPID: true",
    )
}

/// Types of processes that SELinux does not restrict: of hosts and container-selinux, and of
/// Bottlerocket.
const UNCONFINED_TYPES: [&str; 5] =
    ["spc_t", "super_t", "unconfined_t", "unconfined_service_t", "kernel_t"];

fn selinux_of_node(host_root: &HostRoot) -> Check {
    let enforce = host_root
        .open(Path::new("/sys/fs/selinux/enforce"))
        .and_then(|file| std::fs::read_to_string(host_root::by_descriptor(&file)));
    let context = std::fs::read_to_string("/proc/self/attr/current");
    selinux(enforce.ok().as_deref(), context.as_deref().unwrap_or_default())
}

/// Decides by the content of the node's `enforce`, if this process can read it, and by its context.
/// With SELinux, that is `USER:ROLE:TYPE:LEVEL`; SELinux may be what keeps it from reading.
fn selinux(enforce: Option<&str>, context: &str) -> Check {
    const NAME: &str = "selinux";
    let context = context.trim_end_matches(['\0', '\n']);
    let fields: Vec<&str> = context.split(':').collect();
    let own_type = match fields[..] {
        [user, _, own_type, ..] if !user.is_empty() => Some(own_type),
        _ => None,
    };
    let mode = match (enforce.map(str::trim), own_type) {
        (Some("1"), _) => "enforcing",
        (None, Some(_)) => "its mode is not readable",
        _ => return ok(NAME, "not in enforcing mode"),
    };
    let own_type = own_type.unwrap_or("unknown");
    if UNCONFINED_TYPES.contains(&own_type) {
        ok(NAME, format!("{mode}; the type {own_type} is not restricted"))
    } else {
        warn(
            NAME,
            format!(
                "{mode}; the type {own_type} may be denied to mount and to connect to the \
                 runtime; in a pod set the type spc_t, as presets/selinux.yaml of the chart does"
            ),
        )
    }
}

fn cgroups() -> Check {
    match CgroupVersion::of_node() {
        CgroupVersion::V2 => ok("cgroup", "version 2"),
        CgroupVersion::V1 if Path::new("/sys/fs/cgroup/memory").exists() => {
            ok("cgroup", "version 1")
        }
        CgroupVersion::V1 => fail(
            "cgroup",
            "no cgroup file system at /sys/fs/cgroup; mount one, lxcfs reads the limits from it",
        ),
    }
}

/// Whether the API server responds, and what it says of this process's namespace.
async fn api_server() -> Vec<Check> {
    const NAME: &str = "api server";
    let client = match kube::Client::try_default().await {
        Ok(client) => client,
        Err(e) => {
            let e = e.to_string().replace('\n', " ");
            return vec![warn(
                NAME,
                format!(
                    "not configured ({e}); set KUBECONFIG, needed only for --pods-from kubernetes"
                ),
            )];
        }
    };
    let responds = async {
        let version = client.apiserver_version().await?;
        Ok::<_, kube::Error>((version, host::pod_security(&client).await))
    };
    match tokio::time::timeout(Duration::from_secs(5), responds).await {
        Ok(Ok((version, pod_security))) => vec![ok(NAME, version.git_version), pod_security],
        Ok(Err(e)) => {
            vec![warn(NAME, format!("request failed: {e}; check its address in KUBECONFIG"))]
        }
        Err(_) => vec![warn(NAME, "timed out after 5 s; check its address in KUBECONFIG")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pid_namespace_is_recognised_by_its_processes() {
        use Verdict::{Ok, Warn};
        for (processes, expected, detail) in [
            (&[("systemd", 0), ("kthreadd", 0), ("kubelet", 1)][..], Ok, "the host's"),
            (&[("systemd", 0), ("containerd", 1)], Ok, "the node's"),
            (&[("init", 0), ("k3s-server", 1)], Ok, "the node's"),
            (&[("kube-lxcfs", 0)], Warn, "hostPID"),
            // A process that passes for the kernel's, or a shared pid namespace of a pod.
            (&[("pause", 0), ("kthreadd", 1)], Warn, "hostPID"),
            (&[], Warn, "hostPID"),
        ] {
            let check = pids(processes.iter().map(|(comm, parent)| ((*comm).to_owned(), *parent)));
            assert_eq!(check.verdict, expected, "{processes:?}");
            assert!(check.detail.contains(detail), "{processes:?}: {}", check.detail);
        }
    }

    #[test]
    fn selinux_type_is_checked_in_enforcing_mode() {
        use Verdict::{Ok, Warn};
        for (enforce, context, expected, detail) in [
            (Some("0"), "system_u:system_r:container_t:s0:c1,c2\0", Ok, "not in enforcing"),
            (
                Some("1"),
                "system_u:system_r:container_t:s0:c1,c2\0",
                Warn,
                "container_t may be denied",
            ),
            (
                None,
                "system_u:system_r:container_t:s0\0",
                Warn,
                "its mode is not readable; the type",
            ),
            (Some("1"), "system_u:system_r:spc_t:s0\0", Ok, "spc_t is not restricted"),
            (Some("1\n"), "system_u:system_r:super_t:s0\n", Ok, "super_t is not restricted"),
            (Some("1"), "", Warn, "the type unknown"),
            // Other security modules.
            (None, "", Ok, "not in enforcing"),
            (None, "cri-containerd.apparmor.d (enforce)\n", Ok, "not in enforcing"),
            (None, ":pods://profile (enforce)\n", Ok, "not in enforcing"),
        ] {
            let check = selinux(enforce, context);
            assert_eq!(check.verdict, expected, "{context}");
            assert!(check.detail.contains(detail), "{context}: {}", check.detail);
        }
    }

    #[test]
    fn wrong_values_depend_on_version_and_cgroups() {
        use CgroupVersion::{V1, V2};
        for (version, cgroups, wrong) in [
            ("6.0.4", V2, true),
            ("6.0.6", V2, true),
            ("7.0.0", V2, false),
            ("5.0.3", V1, false),
            ("unknown", V2, false),
        ] {
            assert_eq!(wrong_values(version, cgroups).is_some(), wrong, "{version} {cgroups:?}");
        }
    }
}
