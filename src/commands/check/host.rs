//! Checks of the node's kernel and of the namespace's Pod Security level.

use std::path::Path;

use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client, api::ListParams};

use super::{Check, ok, warn};
use crate::{
    runtime::cgroup::CgroupVersion,
    sys::host_root::{self, HostRoot},
};

/// The label of the Pod Security Admission level of a namespace (Kubernetes 1.25).
const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";

const CGROUP_OPTIONS: &str = "cgroup options";

/// All checks of the kernel.
pub(super) fn kernel(host_root: &HostRoot) -> Vec<Check> {
    let read = |path: &str| {
        let file = host_root.open(Path::new(path)).ok()?;
        std::fs::read_to_string(host_root::by_descriptor(&file)).ok()
    };
    let own = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    vec![
        fuse(&own("/proc/filesystems"), host_root.open(Path::new("/dev/fuse")).is_ok()),
        match CgroupVersion::of_node() {
            CgroupVersion::V2 => cgroup_options(&own("/proc/self/mountinfo")),
            CgroupVersion::V1 => ok(CGROUP_OPTIONS, "not checked with cgroup version 1"),
        },
        lsm(read("/sys/kernel/security/lsm").as_deref(), &own("/proc/self/attr/current")),
        lockdown(read("/sys/kernel/security/lockdown").as_deref()),
        rich_container(&own("/proc/sys/kernel/rich_container_enable")),
    ]
}

/// Decides by `/proc/filesystems`, and whether the node has the device.
fn fuse(filesystems: &str, has_device: bool) -> Check {
    const NAME: &str = "fuse";
    let is_known =
        filesystems.lines().any(|line| line.trim_start_matches("nodev").trim() == "fuse");
    match (is_known, has_device) {
        (true, true) => ok(NAME, "the kernel and /dev have FUSE"),
        (false, _) => warn(NAME, "the kernel has no FUSE yet, which lxcfs needs; modprobe fuse"),
        (true, false) => warn(
            NAME,
            "the node has no /dev/fuse, which lxcfs needs; mknod -m 666 /dev/fuse c 10 229",
        ),
    }
}

/// An lxcfs before 6.0.6 changes the mount options of cgroup2 for the whole node (lxc/lxcfs#681).
/// systemd sets `nsdelegate`, and without it a container could change its own limits.
fn cgroup_options(mountinfo: &str) -> Check {
    const NAME: &str = CGROUP_OPTIONS;
    let mounted = mountinfo.lines().find_map(|line| line.split_once(" - cgroup2 "));
    let Some((mount, file_system)) = mounted else {
        return ok(NAME, "no mount of cgroup2");
    };
    let options = file_system.split(' ').nth(1).unwrap_or_default();
    if options.split(',').any(|option| option == "nsdelegate") {
        return ok(NAME, format!("cgroup2 has {options}"));
    }
    let path = mount.split(' ').nth(4).unwrap_or_default();
    warn(
        NAME,
        format!(
            "cgroup2 has no nsdelegate: an lxcfs before 6.0.6 may have removed it for the whole \
             node; use lxcfs 7, and mount -o remount,nsdelegate,memory_recursiveprot {path}"
        ),
    )
}

/// Decides by the active security modules (Documentation/admin-guide/LSM/index.rst), and the
/// profile of this process.
fn lsm(modules: Option<&str>, profile: &str) -> Check {
    const NAME: &str = "lsm";
    let Some(modules) = modules.map(str::trim) else {
        return ok(NAME, "unknown: no /sys/kernel/security/lsm");
    };
    let profile = profile.trim_end_matches(['\0', '\n']);
    let confined =
        modules.split(',').any(|module| module == "apparmor") && profile.ends_with("(enforce)");
    if confined {
        warn(
            NAME,
            format!(
                "{modules}; the AppArmor profile {profile} may deny mounts; in a pod set \
                 Unconfined (agent.appArmorProfile), or the profile of docs/profiles.md"
            ),
        )
    } else {
        ok(NAME, modules)
    }
}

/// The mode is in brackets (kernel_lockdown(7)).
fn lockdown(modes: Option<&str>) -> Check {
    const NAME: &str = "lockdown";
    let mode =
        modes.and_then(|modes| modes.split_once('[')?.1.split_once(']')).map(|(mode, _)| mode);
    match mode {
        None => ok(NAME, "the kernel has none"),
        Some("none") => ok(NAME, "off"),
        Some(mode) => ok(NAME, format!("{mode}; mounts and lxcfs work in every mode")),
    }
}

/// Kernels of Alibaba Cloud Linux and Anolis OS can show containers their own limits in `/proc`.
fn rich_container(enabled: &str) -> Check {
    const NAME: &str = "rich_container";
    match enabled.trim() {
        "" => ok(NAME, "not a kernel with a view of its own"),
        "0" => ok(NAME, "the kernel has a view of its own, which is off"),
        _ => warn(
            NAME,
            "the kernel itself shows containers their limits; use one of the two: \
             sysctl kernel.rich_container_enable=0",
        ),
    }
}

/// Checks the Pod Security level of the client's own namespace.
pub(super) async fn pod_security(client: &Client) -> Check {
    let name = client.default_namespace().to_owned();
    // The agent may list namespaces, but not get one. The cache of the API server suffices.
    let selected = ListParams::default().match_any().fields(&format!("metadata.name={name}"));
    let listed = Api::<Namespace>::all(client.clone()).list_metadata(&selected).await;
    let level = listed.map(|list| {
        let labels = list.items.into_iter().next().and_then(|found| found.metadata.labels);
        labels.and_then(|mut labels| labels.remove(POD_SECURITY))
    });
    match level {
        Ok(level) => level_of(&name, level.as_deref()),
        Err(e) => warn("pod security", format!("failed to list the namespace {name}: {e}")),
    }
}

fn level_of(namespace: &str, level: Option<&str>) -> Check {
    const NAME: &str = "pod security";
    match level {
        Some("privileged") => ok(NAME, format!("the namespace {namespace} enforces privileged")),
        Some(level) => warn(
            NAME,
            format!(
                "the namespace {namespace} enforces {level}, which refuses the pods of kube-lxcfs; \
                 kubectl label namespace {namespace} --overwrite {POD_SECURITY}=privileged"
            ),
        ),
        None => ok(NAME, format!("the namespace {namespace} has the level of the cluster")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict::{self, Ok, Warn};
    use super::*;

    fn is(check: &Check, verdict: Verdict, detail: &str) {
        assert_eq!(check.verdict, verdict, "{check}");
        assert!(check.detail.contains(detail), "{check}");
    }

    #[test]
    fn fuse_needs_kernel_and_device() {
        let known = "nodev\tproc\n\text4\nnodev\tfuse\nnodev\tfusectl\n";
        is(&fuse(known, true), Ok, "have FUSE");
        is(&fuse(known, false), Warn, "mknod");
        is(&fuse("nodev\tproc\nnodev\tfusectl\n", true), Warn, "modprobe fuse");
    }

    #[test]
    fn lost_cgroup_options_are_noticed() {
        let line = |options: &str| {
            format!("30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 {options}\n")
        };
        is(&cgroup_options(&line("rw,nsdelegate,memory_recursiveprot")), Ok, "nsdelegate");
        is(&cgroup_options(&line("rw")), Warn, "memory_recursiveprot /sys/fs/cgroup");
        is(&cgroup_options("22 1 0:4 / /proc rw - proc proc rw\n"), Ok, "no mount");
    }

    #[test]
    fn confinement_by_apparmor_is_noticed() {
        let modules = Some("lockdown,capability,apparmor,bpf\n");
        is(&lsm(modules, "unconfined\n"), Ok, "apparmor,bpf");
        is(&lsm(modules, "cri-containerd.apparmor.d (enforce)\n"), Warn, "appArmorProfile");
        is(&lsm(modules, "kube-lxcfs-agent (complain)\n"), Ok, "apparmor");
        is(&lsm(Some("capability,selinux"), "x (enforce)"), Ok, "selinux");
        is(&lsm(None, ""), Ok, "unknown");
    }

    #[test]
    fn lockdown_mode_is_shown() {
        is(&lockdown(Some("none [integrity] confidentiality\n")), Ok, "integrity;");
        is(&lockdown(Some("[none] integrity confidentiality\n")), Ok, "off");
        is(&lockdown(None), Ok, "none");
    }

    #[test]
    fn kernel_with_its_own_view_is_noticed() {
        is(&rich_container("1\n"), Warn, "rich_container_enable=0");
        is(&rich_container("0\n"), Ok, "off");
        is(&rich_container(""), Ok, "not a kernel");
    }

    #[test]
    fn pod_security_level_must_allow_privileged_pods() {
        is(&level_of("kube-lxcfs", Some("privileged")), Ok, "enforces privileged");
        is(&level_of("kube-lxcfs", None), Ok, "of the cluster");
        is(&level_of("web", Some("restricted")), Warn, "namespace web --overwrite");
    }
}
