//! What the agent costs with 200 pods on its node: resident memory, and what it does while nothing
//! happens.
//!
//!     cargo bench --bench agent
//!
//! The pods are objects of a real API server; their containers are bare namespaces in cgroups named
//! as a runtime names them.
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_imports,
    clippy::needless_pass_by_value,
    reason = "a benchmark fails by panicking"
)]

#[path = "../tests/it/harness/mod.rs"]
#[allow(dead_code, unused, reason = "the tests use the rest")]
mod harness;

use std::{fs, path::PathBuf, time::Duration};

use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;

const PODS: usize = 200;
const IDLE: Duration = Duration::from_secs(60);

/// A cgroup that a process is put into, gone with the benchmark.
struct Cgroup(PathBuf);

impl Cgroup {
    fn with(name: &str, pid: i32) -> Cgroup {
        let v2 = PathBuf::from("/sys/fs/cgroup/cgroup.controllers").exists();
        let dir =
            PathBuf::from(if v2 { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/pids" }).join(name);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("cgroup.procs"), pid.to_string()).unwrap();
        Cgroup(dir)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (cluster, lxcfs) = (harness::Cluster::start(), harness::Lxcfs::start());
    let ids: Vec<String> =
        (0..PODS).map(|n| format!("{:x}{n:060x}", std::process::id() & 0xfff | 0x1000)).collect();
    // Namespaces end before their cgroups are removed.
    let mut cgroups = Vec::new();
    let containers: Vec<harness::Bare> = (0..PODS).map(|_| harness::Bare::start()).collect();
    for (id, container) in ids.iter().zip(&containers) {
        cgroups.push(Cgroup::with(id, container.pid));
    }
    runtime.block_on(async {
        let pods: Api<Pod> = Api::namespaced(cluster.client().await, "default");
        let pods = &pods;
        let create = |(n, id): (usize, String)| async move {
            let name = format!("pod-{n}");
            let annotations = json!({"kube-lxcfs.io/inject": "true"});
            let pod = json!({"metadata": {"name": name, "annotations": annotations},
                "spec": {"nodeName": "n1", "containers": [{"name": "app", "image": "x"}]}});
            let pod = serde_json::from_value(pod).unwrap();
            pods.create(&PostParams::default(), &pod).await.unwrap();
            let id = format!("containerd://{id}");
            let status = json!({"status": {"phase": "Running", "containerStatuses": [
                {"name": "app", "image": "x", "imageID": "", "containerID": id, "ready": true,
                "restartCount": 0, "state": {"running": {}}}]}});
            pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
        };
        let created = stream::iter(ids.clone().into_iter().enumerate()).map(create);
        created.buffer_unordered(8).collect::<Vec<()>>().await;
    });

    let dir = tempfile::tempdir().unwrap();
    let kubeconfig = cluster.kubeconfig("agent");
    let args = ["--node-name", "n1", "--lxcfs-path", lxcfs.path(), "--pid-from", "proc"];
    let agent = harness::agent(
        dir.path(),
        &args,
        &[("KUBECONFIG", kubeconfig.to_str().unwrap()), ("RUST_LOG", "info")],
    );
    let started = std::time::Instant::now();
    for container in &containers {
        harness::eventually_true("the view is injected", || {
            harness::views(&container.mountinfo()).len() >= 9
        });
    }
    println!("{PODS} pods have their views {:.1?} after the agent's start", started.elapsed());
    // Events are still being sent.
    std::thread::sleep(Duration::from_secs(20));
    let before = usage(agent.pid());
    std::thread::sleep(IDLE);
    let after = usage(agent.pid());
    println!(
        "resident {:.1} MiB, at most {:.1} MiB (goal 20)",
        kib(agent.pid(), "VmRSS") / 1024.0,
        kib(agent.pid(), "VmHWM") / 1024.0
    );
    println!("in {IDLE:?} idle: {} ms of CPU, {} wake-ups", after.0 - before.0, after.1 - before.1);
    drop(agent);
    drop(containers);
}

/// CPU time in ms and voluntary context switches of all threads.
fn usage(pid: i32) -> (u64, u64) {
    let process = procfs::process::Process::new(pid).unwrap();
    let stat = process.stat().unwrap();
    let woken = process
        .tasks()
        .unwrap()
        .flatten()
        .filter_map(|t| t.status().ok()?.voluntary_ctxt_switches)
        .sum();
    ((stat.utime + stat.stime) * 1000 / procfs::ticks_per_second(), woken)
}

fn kib(pid: i32, field: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
