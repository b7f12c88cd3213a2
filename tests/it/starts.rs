//! What a container's first instruction sees: NRI, the runtime's events.

use std::{
    fs,
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::harness::*;

/// What programs read when they start.
pub(crate) const FIRST: &str =
    "head -1 /proc/meminfo; cut -d' ' -f1 /proc/uptime; cat /sys/devices/system/cpu/online";

/// The agent of a node without an API server.
fn cri_agent(dir: &Path, containerd: &Containerd, lxcfs: &str, more: &[&str]) -> Running {
    let (cri, nri) = (containerd.endpoint(), containerd.nri_socket());
    let args =
        ["--pods-from", "cri", "--cri-endpoint", &cri, "--nri-socket", &nri, "--lxcfs-path", lxcfs];
    agent(dir, &[&args, more].concat(), &[])
}

/// The agent of a node with an API server.
fn kubernetes_agent(dir: &Path, lxcfs: &str, pods: &Pods, more: &[&str]) -> Running {
    let kubeconfig = pods.kubeconfig();
    let args = [&["--node-name", "n1", "--lxcfs-path", lxcfs], more].concat();
    agent(dir, &args, &[("KUBECONFIG", kubeconfig.to_str().unwrap())])
}

/// Runs a pod without its container's id at the API server, which nobody writes there. Returns the
/// container's pid.
fn run_unposted(containerd: &Containerd, pods: &Pods, name: &str) -> i32 {
    let spec = PodSpec { name, annotations: &[INJECT], containers: &["app"] };
    let uid = pods.create(name, json!({"kube-lxcfs.io/inject": "true"}));
    let pod = containerd.run_with_uid(&spec, &uid);
    containerd.pid(&pod.containers["app"])
}

/// The number of views whose first report came from this source.
fn injected_by(agent: &Running, trigger: &str) -> f64 {
    metric(agent, &format!("injection_latency_seconds_count{{trigger=\"{trigger}\"}}"))
}

/// Waits until the agent's plugin was registered this many times.
fn registered(agent: &Running, times: usize) {
    eventually("the plugin is registered", || match agent.logged(&[("nri", "registered")]) {
        n if n == times => Ok(()),
        n => Err(format!("{n} of {times} times: {}", agent.log())),
    });
}

/// Whether the first reads showed the container's own values.
pub(crate) fn own(output: &str) -> bool {
    let lines: Vec<&str> = output.lines().collect();
    let [mem, uptime, cpus] = lines.as_slice() else { return false };
    let kib = mem.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    kib == Some(MEMORY_MIB << 10) && uptime.parse::<f64>().is_ok_and(|s| s < 60.0) && *cpus == "0"
}

fn output(path: &Path) -> String {
    eventually("the container has read", || fs::read_to_string(path).map_err(|e| e.to_string()))
}

/// Runs a pod with one container that reads first.
fn first_read(
    containerd: &Containerd,
    name: &str,
    annotations: &[(&str, &str)],
) -> (RunningPod, String) {
    let mut pod = containerd.run(&PodSpec { name, annotations, containers: &[] });
    let (_, out) = containerd.start_script(&mut pod, "app", FIRST);
    let output = output(&out);
    (pod, output)
}

fn with_nri(release: Release) {
    let dir = tempfile::tempdir().unwrap();
    let (lxcfs, mut containerd) = (Lxcfs::start(), Containerd::of(release, true));
    let mut agent = cri_agent(dir.path(), &containerd, lxcfs.path(), &["--nri", "required"]);
    registered(&agent, 1);
    for n in 0..5 {
        let (pod, read) = first_read(&containerd, &format!("in-{n}"), &[INJECT]);
        assert!(own(&read), "{read}\n{}", agent.log());
        containerd.remove(&pod);
    }
    let views = |id: &str| views(&mountinfo(containerd.pid(id)));
    let (mut out, read) = first_read(&containerd, "out", &[]);
    assert!(!own(&read), "{read}");
    assert!(views(&out.containers["app"]).is_empty());
    // One of several containers.
    let chosen = &[INJECT, ("kube-lxcfs.io/containers", "app"), ("kube-lxcfs.io/files", "meminfo")];
    let (mut pod, read) = first_read(&containerd, "chosen", chosen);
    assert!(read.starts_with(&format!("MemTotal:          {} kB", MEMORY_MIB << 10)), "{read}");
    assert_eq!(views(&pod.containers["app"]), ["/proc/meminfo"]);
    containerd.start_container(&mut pod, "sidecar", 0);
    assert!(views(&pod.containers["sidecar"]).is_empty());
    // The runtime restarts: the plugin registers again.
    containerd.down();
    containerd.up();
    let responds = std::time::Instant::now();
    registered(&agent, 2);
    println!("the plugin is registered {:?} after the runtime responds", responds.elapsed());
    let (_, read) = first_read(&containerd, "after-restart", &[INJECT]);
    assert!(own(&read), "{read}\n{}", agent.log());
    // The agent hangs: the container starts, and the view follows when the agent goes on.
    agent.signal(Signal::SIGSTOP);
    let (hung, read) = first_read(&containerd, "agent-hangs", &[INJECT]);
    assert!(!own(&read), "{read}");
    agent.signal(Signal::SIGCONT);
    has_views("the container", containerd.pid(&hung.containers["app"]), ALWAYS.len());
    // The agent is killed.
    agent.kill();
    let (killed, read) = first_read(&containerd, "agent-killed", &[INJECT]);
    assert!(!own(&read), "{read}");
    let agent = cri_agent(dir.path(), &containerd, lxcfs.path(), &[]);
    has_views("the container", containerd.pid(&killed.containers["app"]), ALWAYS.len());
    // Without lxcfs containers start as they are.
    drop(lxcfs);
    registered(&agent, 1);
    let (_, out_file) = containerd.start_script(&mut out, "second", FIRST);
    assert!(!own(&output(&out_file)));
    let (_, read) = first_read(&containerd, "no-lxcfs", &[INJECT]);
    assert!(!own(&read), "{read}");
}

#[test]
fn containerd_1_7_with_nri_first_read_is_own() {
    isolated(|| with_nri(Release::Trixie));
}

#[test]
fn containerd_2_with_nri_first_read_is_own() {
    isolated(|| with_nri(Release::Sid));
}

/// An agent that sees no socket in its own mount namespace, as in a pod: they are below the host's
/// root only.
#[test]
fn sockets_are_found_below_the_host_root() {
    isolated(|| {
        let dir = tempfile::tempdir().unwrap();
        let (lxcfs, mut containerd) = (Lxcfs::start(), Containerd::of(Release::Sid, true));
        let sockets = containerd.dir.path().to_str().unwrap();
        // As `/var/run` on a node.
        std::os::unix::fs::symlink(sockets, "/run/linked").unwrap();
        let program = kube_lxcfs();
        let mut command = std::process::Command::new("unshare");
        command
            .args(["--mount", "sh", "-c"])
            .arg("mount -t tmpfs none \"$0\" && mount -t tmpfs none /run && exec \"$@\"")
            .arg(sockets)
            .arg(program.get_program())
            .args(["agent", "--log-format", "json", "--listen", "127.0.0.1:0"])
            .args(["--pods-from", "cri", "--nri", "required", "--lxcfs-path", lxcfs.path()])
            .args(["--host-root", "/proc/1/root", "--cri-endpoint", "unix:///run/linked/sock"])
            .args(["--nri-socket", "/run/linked/nri.sock"])
            .env("RUST_LOG", "kube_lxcfs=debug");
        let agent = Running::start(&mut command, &dir.path().join("agent.log"));
        registered(&agent, 1);
        ready(&agent);
        let (_, read) = first_read(&containerd, "first", &[INJECT]);
        assert!(own(&read), "{read}\n{}", agent.log());
        // The runtime restarts, with other sockets at the same paths.
        containerd.down();
        containerd.up();
        registered(&agent, 2);
        let (_, read) = first_read(&containerd, "after-restart", &[INJECT]);
        assert!(own(&read), "{read}\n{}", agent.log());
        ready(&agent);
    });
}

/// A node with two runtimes, of which only the second has pods.
#[test]
fn runtime_that_has_pods_is_found() {
    isolated(|| {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "").unwrap();
            path
        };
        let found = || {
            let host_root = root.path().to_str().unwrap();
            let output = run(&["check", "--host-root", host_root, "-o", "json"]);
            let checks: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            let cri = checks.as_array().unwrap().iter().find(|check| check["name"] == "cri");
            cri.unwrap()["detail"].as_str().unwrap().to_owned()
        };
        assert!(found().starts_with("no CRI runtime responds at /run/containerd/"), "{}", found());
        let (idle, busy) = (Containerd::start(), Containerd::start());
        for (runtime, path) in [
            (&idle, "run/containerd/containerd.sock"),
            (&busy, "var/snap/microk8s/common/run/containerd.sock"),
        ] {
            let socket = runtime.dir.path().join("sock");
            let flags = nix::mount::MsFlags::MS_BIND;
            nix::mount::mount(Some(&socket), &at(path), None::<&str>, flags, None::<&str>).unwrap();
        }
        assert!(found().ends_with(" at /run/containerd/containerd.sock"), "{}", found());
        let _pod = busy.run(&PodSpec { name: "a", annotations: &[], containers: &[] });
        let detail = found();
        assert!(detail.ends_with(" at /var/snap/microk8s/common/run/containerd.sock"), "{detail}");
        for path in ["run/containerd", "var/snap/microk8s/common/run"] {
            nix::mount::umount(&root.path().join(path).join("containerd.sock")).unwrap();
        }
    });
}

#[test]
fn without_cri_nri_gives_the_pids() {
    isolated(|| {
        let (lxcfs, containerd, pods) =
            (Lxcfs::start(), Containerd::of(Release::Sid, true), Pods::start());
        let dir = tempfile::tempdir().unwrap();
        let nri = containerd.nri_socket();
        let no_cri = ["--pid-from", "proc", "--cri-endpoint", "unix:///run/none.sock"];
        let more = [&["--nri-socket", &nri], &no_cri[..]].concat();
        let agent = kubernetes_agent(dir.path(), lxcfs.path(), &pods, &more);
        registered(&agent, 1);
        ready(&agent);
        for name in ["a", "b", "c"] {
            let uid = pods.create(name, json!({"kube-lxcfs.io/inject": "true"}));
            let spec = PodSpec { name, annotations: &[INJECT], containers: &[] };
            let mut pod = containerd.run_with_uid(&spec, &uid);
            let (_, out) = containerd.start_script(&mut pod, "app", FIRST);
            let read = output(&out);
            assert!(own(&read), "{read}\n{}", agent.log());
        }
        assert!(!agent.log().contains("none.sock"), "{}", agent.log());
    });
}

#[test]
fn without_nri_cri_events_trigger_injection() {
    isolated(|| {
        let (lxcfs, containerd, pods) =
            (Lxcfs::start(), Containerd::of(Release::Trixie, false), Pods::start());
        let dir = tempfile::tempdir().unwrap();
        let more = ["--cri-endpoint", &containerd.endpoint()];
        let agent = kubernetes_agent(dir.path(), lxcfs.path(), &pods, &more);
        ready(&agent);
        let run = |n: usize| run_unposted(&containerd, &pods, &format!("pod-{n}"));
        // Events reach the agent from some moment after its start.
        let mut n = 0;
        eventually("the first event arrives", || {
            n += 1;
            let pid = run(n);
            std::thread::sleep(Duration::from_secs(2));
            (!views(&mountinfo(pid)).is_empty()).then_some(()).ok_or_else(|| agent.log())
        });
        let before = injected_by(&agent, "cri");
        for more in 1..=5 {
            has_views("the container", run(n + more), ALWAYS.len());
        }
        eventually_true("five more views by events", || injected_by(&agent, "cri") >= before + 5.0);
        for trigger in ["watch", "nri"] {
            let injected = injected_by(&agent, trigger);
            assert!(injected == 0.0, "{injected} by {trigger}: {}", agent.log());
        }
        for more in 1..=5 {
            pods.reasons(&format!("pod-{}", n + more), &["LxcfsInjected"]);
        }
    });
}

/// A proxy of the runtime's NRI socket, which ends the plugin's connections when it is dropped.
struct NriProxy {
    path: PathBuf,
    connections: Arc<Mutex<Vec<UnixStream>>>,
}

impl NriProxy {
    fn start(path: &Path, runtime: &str) -> NriProxy {
        let listener = UnixListener::bind(path).unwrap();
        let (runtime, connections) = (runtime.to_owned(), Arc::default());
        let proxy = NriProxy { path: path.to_owned(), connections };
        let connections = proxy.connections.clone();
        std::thread::spawn(move || {
            for plugin in listener.incoming().map(Result::unwrap) {
                let runtime = UnixStream::connect(&runtime).unwrap();
                for (mut from, mut to) in [(&plugin, &runtime), (&runtime, &plugin)]
                    .map(|(from, to)| (from.try_clone().unwrap(), to.try_clone().unwrap()))
                {
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
                connections.lock().unwrap().extend([plugin, runtime]);
            }
        });
        proxy
    }
}

impl Drop for NriProxy {
    fn drop(&mut self) {
        fs::remove_file(&self.path).unwrap();
        let connections = self.connections.lock().unwrap();
        connections.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }
}

/// While NRI is connected, no stream of events is open. Without it, events lead to views again.
#[test]
fn cri_events_are_received_while_nri_is_not_connected() {
    isolated(|| {
        let (lxcfs, containerd, pods) =
            (Lxcfs::start(), Containerd::of(Release::Trixie, true), Pods::start());
        let dir = tempfile::tempdir().unwrap();
        let (cri, nri) = (containerd.endpoint(), dir.path().join("nri.sock"));
        let more = ["--cri-endpoint", &cri, "--nri-socket", nri.to_str().unwrap()];
        let agent = kubernetes_agent(dir.path(), lxcfs.path(), &pods, &more);
        ready(&agent);
        let not_received = "NRI is connected, container events are not received";
        let by = |trigger| injected_by(&agent, trigger);
        let has_view = |name: &str| {
            has_views(name, run_unposted(&containerd, &pods, name), ALWAYS.len());
        };
        for round in 1..=2 {
            let proxy = NriProxy::start(&nri, &containerd.nri_socket());
            registered(&agent, round);
            eventually_true("the stream of events ends", || {
                agent.logged(&[("message", not_received)]) >= round
            });
            let before = (by("nri"), by("cri"));
            has_view(&format!("nri-{round}"));
            eventually_true("one view by NRI", || {
                (by("nri"), by("cri")) == (before.0 + 1.0, before.1)
            });
            drop(proxy);
            eventually_true("NRI is lost", || metric(&agent, "nri_connected") == 0.0);
            let before = (by("nri"), by("cri"));
            has_view(&format!("cri-{round}"));
            eventually_true("one view by events", || {
                (by("nri"), by("cri")) == (before.0, before.1 + 1.0)
            });
        }
    });
}

#[test]
fn required_nri_without_socket_is_an_error() {
    isolated(|| {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nri.sock");
        let path = socket.to_str().unwrap();
        let cri = format!("unix://{}/none", dir.path().display());
        let args = ["--pods-from", "cri", "--cri-endpoint", &cri, "--nri-socket", path];
        let start = ["agent", "--listen", "127.0.0.1:0", "--nri", "required"];
        let refused = || {
            let output = run(&[&start[..], &args].concat());
            assert_eq!(output.status.code(), Some(1));
            // The log comes before it.
            let stderr = stderr(&output);
            stderr.lines().rfind(|line| line.starts_with("error: ")).unwrap().to_owned()
        };
        let error = refused();
        let missing = error.contains(&format!("NRI socket {path}: ")) && error.contains("No such");
        assert!(missing && error.contains("--nri auto"), "{error}");
        // A server that never responds.
        let silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let error = refused();
        assert!(error.contains("registration timed out after 5s"), "{error}");
        drop(silent);
        fs::remove_file(&socket).unwrap();
        // By default a missing NRI is not worth a line.
        let agent = agent(dir.path(), &args, &[("RUST_LOG", "info")]);
        http_address(&agent);
        std::thread::sleep(Duration::from_secs(1));
        assert!(!agent.log().contains("NRI"), "{}", agent.log());
    });
}
