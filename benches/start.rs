//! What a container's first instruction sees, and what its start costs more: pods in a row with
//! containerd 1.7 and 2 over NRI, half of which ask for no view, and the same without kube-lxcfs,
//! in turns in the same run, with a supervised lxcfs; what the agent does in that time; and how
//! soon the view comes without NRI.
//!
//!     cargo bench --bench start                       500 pods each
//!     cargo bench --bench start -- 50                 fewer
//!     cargo bench --bench start -- 500 1.7            with containerd 1.7 only; or 2, or events
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_imports,
    clippy::needless_pass_by_value,
    reason = "a benchmark fails by panicking"
)]

#[path = "../tests/it/harness/mod.rs"]
#[allow(dead_code, unused, reason = "the tests use the rest")]
mod harness;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use harness::*;

const FIRST: &str =
    "head -1 /proc/meminfo; cut -d' ' -f1 /proc/uptime; cat /sys/devices/system/cpu/online";
/// How long the containers whose start is timed wait before they read: lxcfs and the reader would
/// use the CPUs while the runtime still starts the container.
const WAIT: &str = "sleep 0.1; ";
/// How many pods in a turn read first, and are not timed.
const FIRST_READS: usize = 5;
/// How many pods in a row before the agent is started or stopped.
const TURN: usize = 50;
/// The time for the agent to finish what it does at its start.
const SETTLE: Duration = Duration::from_secs(2);

fn own(output: &str) -> bool {
    let own_memory = output.starts_with(&format!("MemTotal:{:>15} kB\n", MEMORY_MIB << 10));
    own_memory
        && output.ends_with("\n0\n")
        && output.lines().nth(1).is_some_and(|s| s.parse::<f64>().unwrap() < 60.0)
}

fn agent_of(dir: &Path, containerd: &Containerd, lxcfs: &str, nri: bool) -> Running {
    let (cri, socket) = (containerd.endpoint(), containerd.nri_socket());
    let mode = if nri { "required" } else { "off" };
    let args =
        ["--pods-from", "cri", "--cri-endpoint", &cri, "--nri", mode, "--nri-socket", &socket];
    let agent = agent(dir, &[&args[..], &["--lxcfs-path", lxcfs]].concat(), &[]);
    if nri {
        eventually_true("the plugin is registered", || agent.logged(&[("nri", "registered")]) == 1);
    }
    std::thread::sleep(SETTLE);
    agent
}

/// Runs one pod and removes it: the time of its container's start, and what the script printed.
fn pod(
    containerd: &Containerd,
    n: usize,
    annotations: &[(&str, &str)],
    script: &str,
) -> (Duration, String) {
    let mut pod =
        containerd.run(&PodSpec { name: &format!("pod-{n}"), annotations, containers: &[] });
    let (took, out) = containerd.start_script(&mut pod, "app", script);
    let output = eventually("the container has read", || {
        fs::read_to_string(&out).map_err(|e| e.to_string())
    });
    containerd.remove(&pod);
    (took, output)
}

fn percentile(all: &mut [Duration], percent: usize) -> Duration {
    all.sort();
    all[(all.len() * percent / 100).min(all.len() - 1)]
}

fn with_nri(name: &str, release: Release, pods: usize) {
    let (lxcfs, containerd, dir) =
        (Supervised::start(&[]), Containerd::of(release, true), tempfile::tempdir().unwrap());
    let (mut with, mut plain, mut without, mut right) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let mut later = 0;
    let (timed, turns) = (format!("{WAIT}{FIRST}"), pods.div_ceil(TURN));
    let (mut held, mut mounting) = (Vec::new(), Vec::new());
    for turn in 0..turns {
        let count = TURN.min(pods - turn * TURN);
        let mut agent = agent_of(dir.path(), &containerd, lxcfs.path(), true);
        for n in 0..FIRST_READS {
            right += usize::from(own(&pod(&containerd, n, &[INJECT], FIRST).1));
        }
        for n in 0..count {
            let (took, output) = pod(&containerd, n, &[INJECT], &timed);
            with.push(took);
            later += usize::from(own(&output));
            plain.push(pod(&containerd, n, &[], &timed).0);
        }
        held.extend(elapsed(&agent, "desired view injected"));
        mounting.extend(elapsed(&agent, "view injected"));
        agent.terminate();
        without.extend((0..count).map(|n| pod(&containerd, n, &[INJECT], &timed).0));
    }
    let mut of = |p| [&mut with, &mut plain, &mut without].map(|all| percentile(all, p));
    let [median, most] = [50, 99].map(&mut of);
    let reads = FIRST_READS * turns;
    println!(
        "{name}, NRI: {right} of {reads} first reads show the container's own values, and \
         {later} of {pods} of the timed containers"
    );
    for (what, [with, plain, without]) in [("median", median), ("99th percentile", most)] {
        let added = |to: Duration| (to.as_secs_f64() - without.as_secs_f64()) * 1e3;
        println!(
            "{name}, NRI: start {what} {with:.1?} with, {without:.1?} without the agent: \
             {:+.1} ms, ratio {:.2}; {:+.1} ms for a pod that asks for no view",
            added(with),
            with.as_secs_f64() / without.as_secs_f64(),
            added(plain)
        );
    }
    for (what, percent) in [("median", 50), ("99th percentile", 99)] {
        let [held, mounting] = [&mut held, &mut mounting].map(|all| percentile(all, percent));
        println!(
            "{name}, NRI: the agent holds a start for {held:.2?} ({what}), of it process and \
             mounts {mounting:.2?}, the rest is the search for lxcfs and the loop"
        );
    }
}

/// The times in the agent's log lines with this message.
fn elapsed(agent: &Running, message: &str) -> Vec<Duration> {
    let entries = agent.entries().into_iter().filter(|entry| entry["message"] == message);
    let parse = |text: &str| {
        let number = |unit: &str| text.strip_suffix(unit)?.parse::<f64>().ok();
        let micros = number("µs").or_else(|| Some(number("ms")? * 1e3));
        Duration::from_secs_f64(micros.or_else(|| Some(number("s")? * 1e6)).unwrap() / 1e6)
    };
    entries.map(|entry| parse(entry["elapsed"].as_str().unwrap())).collect()
}

/// From the end of the start to the view in the mount table.
fn with_events(pods: usize) {
    let (lxcfs, containerd) = (Supervised::start(&[]), Containerd::of(Release::Trixie, false));
    let dir = tempfile::tempdir().unwrap();
    let _agent = agent_of(dir.path(), &containerd, lxcfs.path(), false);
    let mut all = Vec::new();
    for n in 0..pods {
        let annotations = &[INJECT];
        let pod = containerd.run(&PodSpec {
            name: &format!("pod-{n}"),
            annotations,
            containers: &["app"],
        });
        let started = Instant::now();
        let pid = containerd.pid(&pod.containers["app"]);
        while views(&mountinfo(pid)).len() < 9 {
            assert!(started.elapsed() < DEADLINE, "no view");
            std::thread::sleep(Duration::from_millis(1));
        }
        all.push(started.elapsed());
        containerd.remove(&pod);
    }
    let [median, most] = [50, 99].map(|p| percentile(&mut all, p));
    println!(
        "containerd 1.7, NRI off, {pods} pods: view after the start: median {median:.1?}, \
         99th percentile {most:.1?}"
    );
}

fn main() {
    // `cargo bench` adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let pods = args.first().map_or(500, |arg| arg.parse().unwrap());
    let runs = |part: &str| args.get(1).is_none_or(|only| only == part);
    if runs("1.7") {
        with_nri("containerd 1.7", Release::Trixie, pods);
    }
    if runs("2") {
        with_nri("containerd 2", Release::Sid, pods);
    }
    if runs("events") {
        with_events(pods.min(100));
    }
}
