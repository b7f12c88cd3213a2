//! What a container sees in its first instruction: NRI, the runtime's events, the OCI hook.

use std::{fs, path::Path, time::Duration};

use nix::sys::signal::Signal;

use crate::harness::*;

/// What programs ask when they start.
pub(crate) const FIRST: &str =
    "head -1 /proc/meminfo; cut -d' ' -f1 /proc/uptime; cat /sys/devices/system/cpu/online";
const IN: &[(&str, &str)] = &[("kube-lxcfs.io/inject", "true")];

/// The agent of a node without an API server.
fn agent_of(dir: &Path, containerd: &Containerd, lxcfs: &str, more: &[&str]) -> Running {
    let (cri, nri) = (containerd.endpoint(), containerd.nri_socket());
    let args =
        ["--pods-from", "cri", "--cri-endpoint", &cri, "--nri-socket", &nri, "--lxcfs-path", lxcfs];
    agent(dir, &[&args, more].concat(), &[])
}

fn registered(agent: &Running) {
    eventually("NRI has the plugin", || {
        let log = agent.log();
        log.contains("before a container's first instruction").then_some(()).ok_or(log)
    });
}

/// Whether the first reads showed the container's own values.
pub(crate) fn own(told: &str) -> bool {
    let lines: Vec<&str> = told.lines().collect();
    let [mem, uptime, cpus] = lines.as_slice() else { return false };
    let kib = mem.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    kib == Some(MEMORY_MIB << 10) && uptime.parse::<f64>().is_ok_and(|s| s < 60.0) && *cpus == "0"
}

fn told(path: &Path) -> String {
    eventually("the container has read", || fs::read_to_string(path).map_err(|e| e.to_string()))
}

/// Runs a pod with one container that reads first thing.
fn first_read(
    containerd: &Containerd,
    name: &str,
    annotations: &[(&str, &str)],
) -> (RunningPod, String) {
    let mut pod = containerd.run(&PodSpec { name, annotations, containers: &[] });
    let (_, out) = containerd.start_script(&mut pod, "app", FIRST);
    let told = told(&out);
    (pod, told)
}

fn with_nri(release: Release) {
    let (lxcfs, mut containerd, dir) =
        (Lxcfs::start(), Containerd::of(release, true), tempfile::tempdir().unwrap());
    let mut agent = agent_of(dir.path(), &containerd, lxcfs.path(), &["--nri", "required"]);
    registered(&agent);
    for n in 0..5 {
        let (pod, told) = first_read(&containerd, &format!("in-{n}"), IN);
        assert!(own(&told), "{told}\n{}", agent.log());
        containerd.remove(&pod);
    }
    let (mut out, told) = first_read(&containerd, "out", &[]);
    assert!(!own(&told), "{told}");
    assert!(views(&mountinfo(containerd.pid(&out.containers["app"]))).is_empty());
    // One of several containers.
    let chosen = &[IN[0], ("kube-lxcfs.io/containers", "app"), ("kube-lxcfs.io/files", "meminfo")];
    let (mut pod, told) = first_read(&containerd, "chosen", chosen);
    assert!(told.starts_with(&format!("MemTotal:          {} kB", MEMORY_MIB << 10)), "{told}");
    assert_eq!(views(&mountinfo(containerd.pid(&pod.containers["app"]))), ["/proc/meminfo"]);
    containerd.start_container(&mut pod, "sidecar", 0);
    assert!(views(&mountinfo(containerd.pid(&pod.containers["sidecar"]))).is_empty());
    // The runtime restarts: the plugin is there again.
    let registered_so_far =
        |agent: &Running| agent.log().matches("before a container's first instruction").count();
    containerd.down();
    containerd.up();
    let answers = std::time::Instant::now();
    eventually_true("the plugin is there again", || registered_so_far(&agent) == 2);
    println!("the plugin is there again {:?} after the runtime answered", answers.elapsed());
    let (_, told) = first_read(&containerd, "after-restart", IN);
    assert!(own(&told), "{told}\n{}", agent.log());
    // The agent hangs: the container starts, and the view comes when it goes on.
    agent.signal(Signal::SIGSTOP);
    let (hung, told) = first_read(&containerd, "agent-hangs", IN);
    assert!(!own(&told), "{told}");
    agent.signal(Signal::SIGCONT);
    let pid = containerd.pid(&hung.containers["app"]);
    eventually("the view comes", || {
        if views(&mountinfo(pid)).len() >= 9 { Ok(()) } else { Err(agent.log()) }
    });
    // The agent is killed.
    agent.kill();
    let (killed, told) = first_read(&containerd, "agent-killed", IN);
    assert!(!own(&told), "{told}");
    let agent = agent_of(dir.path(), &containerd, lxcfs.path(), &[]);
    let pid = containerd.pid(&killed.containers["app"]);
    eventually("the view comes", || {
        if views(&mountinfo(pid)).len() >= 9 { Ok(()) } else { Err(agent.log()) }
    });
    // No lxcfs: containers start at once.
    drop(lxcfs);
    registered(&agent);
    let (_, out_file) = containerd.start_script(&mut out, "second", FIRST);
    assert!(!own(&self::told(&out_file)));
    let (_, told) = first_read(&containerd, "no-lxcfs", IN);
    assert!(!own(&told), "{told}");
}

#[test]
fn with_containerd_1_7_and_nri_the_first_read_shows_the_containers_own() {
    with_nri(Release::Trixie);
}

#[test]
fn with_containerd_2_the_first_read_shows_the_containers_own() {
    with_nri(Release::Sid);
}

#[test]
fn without_nri_the_runtimes_events_bring_the_view() {
    let (lxcfs, containerd, dir) =
        (Lxcfs::start(), Containerd::of(Release::Trixie, false), tempfile::tempdir().unwrap());
    let agent = agent_of(dir.path(), &containerd, lxcfs.path(), &[]);
    eventually_true("it has listed", || agent.log().contains("agent begins"));
    std::thread::sleep(Duration::from_millis(500));
    for n in 0..5 {
        let pod = containerd.run(&PodSpec {
            name: &format!("pod-{n}"),
            annotations: IN,
            containers: &["app"],
        });
        let pid = containerd.pid(&pod.containers["app"]);
        eventually("the view comes", || {
            if views(&mountinfo(pid)).len() >= 9 { Ok(()) } else { Err(agent.log()) }
        });
    }
    let log = agent.log();
    assert_eq!(log.matches("view in place trigger=Cri").count(), 5, "{log}");
    assert_eq!(log.matches("LxcfsInjected").count(), 5, "{log}");
}

#[test]
fn nri_that_is_required_and_not_there_is_an_error_and_else_it_is_quiet() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nri.sock");
    let path = socket.to_str().unwrap();
    let cri = format!("unix://{}/none", dir.path().display());
    let args = [
        "agent",
        "--listen",
        "127.0.0.1:0",
        "--pods-from",
        "cri",
        "--cri-endpoint",
        &cri,
        "--nri-socket",
        path,
    ];
    let refused = || {
        let ended = run(&[&args[..], &["--nri", "required"]].concat());
        assert_eq!(ended.status.code(), Some(1));
        // It was logged before that the agent begins.
        stderr(&ended).lines().rfind(|line| line.starts_with("error: ")).unwrap().to_owned()
    };
    let told = refused();
    assert!(
        told.contains(&format!("NRI socket {path}: No such file")) && told.contains("--nri auto"),
        "{told}"
    );
    // What listens there is none: it says nothing.
    let silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let told = refused();
    assert!(told.contains("no answer within 5s"), "{told}");
    drop(silent);
    fs::remove_file(&socket).unwrap();
    let agent = agent(dir.path(), &args[1..], &[("RUST_LOG", "info")]);
    std::thread::sleep(Duration::from_secs(1));
    assert!(!agent.log().contains("NRI"), "{}", agent.log());
}
