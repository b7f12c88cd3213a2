//! A full node: 100 pods of 10 containers with 10 processes each, and 200 pods that are created and
//! deleted per minute. What the agent costs there, minute by minute.
//!
//!     cargo bench --bench node            2 minutes
//!     cargo bench --bench node -- 10      more
//!     cargo bench --bench node -- 10 100  with 100 instead of 1,000 containers
//!
//! The containers are those of a real containerd 2. The agent has the pods from CRI, and the starts
//! from NRI. A supervisor runs lxcfs. Everything runs in a pid and a mount namespace of its own, on
//! a tmpfs.
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_imports,
    clippy::needless_pass_by_value,
    clippy::cast_precision_loss,
    reason = "a benchmark fails by panicking; counts are small"
)]

#[path = "../tests/it/harness/mod.rs"]
#[allow(dead_code, unused, reason = "the tests use the rest")]
mod harness;

use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use harness::*;

/// Set in the namespaces of the benchmark: the name of its cgroups.
const TOKEN: &str = "KUBE_LXCFS_TEST_TOKEN";
const MINUTES: usize = 2;
const CONTAINERS: usize = 1000;
const CONTAINERS_PER_POD: usize = 10;
const PROCESSES_PER_CONTAINER: usize = 10;
const PODS_PER_MINUTE: u32 = 200;
/// How many of these pods run at the same time: each runs for some seconds.
const SHORT_PODS: usize = 20;
/// Threads that call containerd.
const CALLERS: usize = 4;
/// How often Prometheus reads the metrics of the agent, and the kubelet its health.
const SCRAPE: Duration = Duration::from_secs(15);
const MAX_RSS_MIB: f64 = 20.0;
const MAX_CPU_PERCENT: f64 = 1.0;
/// In MiB per minute: 3 MiB in a day would be found, noise of one page is not.
const MAX_SLOPE: f64 = 0.02;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if std::env::var_os(TOKEN).is_some() {
        let mut numbers = args.iter().filter_map(|arg| arg.parse().ok());
        let minutes = numbers.next().unwrap_or(MINUTES);
        return measure(minutes, numbers.next().unwrap_or(CONTAINERS));
    }
    let dir = tempfile::Builder::new().prefix("kl").tempdir().unwrap();
    let token = dir.path().file_name().unwrap().to_str().unwrap().to_owned();
    // The shell is PID 1 of the namespace and reaps orphans.
    let set_up =
        "mount -t tmpfs none \"$1\" && mount -t tmpfs none /run && shift && \"$@\"; exit $?";
    let status = program("unshare")
        .args(OWN_NAMESPACES)
        .args(["sh", "-c", set_up, "sh"])
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .args(args)
        .env(TOKEN, &token)
        .env("TMPDIR", dir.path())
        .env("PATH", std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin")
        .status()
        .unwrap();
    remove_cgroup(&token);
    assert!(status.success(), "{status}");
}

/// Runs `work` with each number below `count`, on some threads.
fn in_parallel(count: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                loop {
                    match next.fetch_add(1, Ordering::Relaxed) {
                        n if n < count => work(n),
                        _ => return,
                    }
                }
            });
        }
    });
}

fn fill(containerd: &Containerd, count: usize) {
    let script = format!(
        "for n in $(seq 2 {PROCESSES_PER_CONTAINER}); do sleep 100000 & done; exec sleep 100000"
    );
    in_parallel(count / CONTAINERS_PER_POD, |n| {
        let name = format!("full-{n}");
        let spec = PodSpec { name: &name, annotations: &[INJECT], containers: &[] };
        let mut pod = containerd.run(&spec);
        for n in 0..CONTAINERS_PER_POD {
            let command = ["sh", "-c", &script].map(str::to_owned).to_vec();
            containerd.start_with(&mut pod, &format!("c{n}"), 0, command, Vec::new());
        }
    });
}

/// Creates pods at a steady rate, and deletes the oldest, until `stop`. Counts the deleted ones.
fn churn(containerd: &Containerd, stop: &AtomicBool, deleted: &AtomicUsize) {
    let (started, created, running) =
        (Instant::now(), AtomicUsize::new(0), Mutex::new(VecDeque::new()));
    let interval = Duration::from_secs(60) / PODS_PER_MINUTE;
    std::thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let n = created.fetch_add(1, Ordering::Relaxed);
                    let due = started + interval * u32::try_from(n).unwrap();
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    let name = format!("short-{n}");
                    let spec =
                        PodSpec { name: &name, annotations: &[INJECT], containers: &["app"] };
                    let pod = containerd.run(&spec);
                    let oldest = {
                        let mut running = running.lock().unwrap();
                        running.push_back(pod);
                        (running.len() > SHORT_PODS).then(|| running.pop_front().unwrap())
                    };
                    if let Some(oldest) = oldest {
                        containerd.remove(&oldest);
                        deleted.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}

/// A process at one moment.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    /// In MiB.
    rss: f64,
    /// User and system time, in seconds.
    cpu: f64,
    threads: u64,
    descriptors: usize,
}

fn sample(pid: i32) -> Sample {
    let process = procfs::process::Process::new(pid).unwrap();
    let (stat, status) = (process.stat().unwrap(), process.status().unwrap());
    Sample {
        at: Instant::now(),
        rss: status.vmrss.unwrap() as f64 / 1024.0,
        cpu: (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64,
        threads: status.threads,
        descriptors: process.fd_count().unwrap(),
    }
}

fn cpu_percent(from: Sample, to: Sample) -> f64 {
    100.0 * (to.cpu - from.cpu) / (to.at - from.at).as_secs_f64()
}

/// The agent's metrics, as Prometheus reads them.
fn scrape(address: &str) -> String {
    let (code, text) = get_from(address, "/metrics");
    assert_eq!(code, 200, "{text}");
    text
}

/// The sum of the metrics whose names begin with `series`.
fn sum(text: &str, series: &str) -> f64 {
    let lines = text.lines().filter(|line| line.starts_with(&format!("kube_lxcfs_{series}")));
    let values = lines.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap());
    values.fold(0.0, |sum, value| sum + value)
}

/// The slope of the line with the least squares through the points.
fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let covariance: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    covariance / points.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>()
}

/// A panic ends the threads too.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn verdict(holds: bool) -> &'static str {
    if holds { "ok" } else { "missed" }
}

fn measure(minutes: usize, count: usize) {
    let lxcfs = Supervised::start(&[]);
    let containerd = Containerd::of(Release::Sid, true);
    let started = Instant::now();
    fill(&containerd, count);
    let processes = procfs::process::all_processes().unwrap().count();
    println!("{count} containers run after {:.0?}, {processes} processes", started.elapsed());

    let dir = tempfile::tempdir().unwrap();
    let (cri, socket) = (containerd.endpoint(), containerd.nri_socket());
    let started = Instant::now();
    let args = [
        "--pods-from",
        "cri",
        "--cri-endpoint",
        &cri,
        "--nri",
        "required",
        "--nri-socket",
        &socket,
        "--lxcfs-path",
        lxcfs.path(),
    ];
    let agent = agent(dir.path(), &args, &[("RUST_LOG", "info")]);
    let address = http_address(&agent);
    let injected = || sum(&scrape(&address), "containers{state=\"injected\"}");
    eventually_true("every container has its view", || injected() >= count as f64);
    println!("the agent has injected every view after {:.1?}", started.elapsed());
    println!(
        "after that: {:.1} MiB, {:.2} s of CPU",
        sample(agent.pid()).rss,
        sample(agent.pid()).cpu
    );

    let (stop, deleted) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| churn(&containerd, &stop, &deleted));
        let _stop = StopOnDrop(&stop);
        let before = sample(lxcfs.supervisor.pid());
        print_minutes(minutes, agent.pid(), &address, &deleted);
        let after = sample(lxcfs.supervisor.pid());
        println!(
            "the supervisor: {:.2} % of a core, {:.2} MiB resident",
            cpu_percent(before, after),
            after.rss
        );
    });
    let text = scrape(&address);
    for name in [
        "operations_total{operation=\"inject\",result=\"success\"}",
        "operations_total{operation=\"inject\",result=\"failure\"}",
        "late_starts_total",
    ] {
        println!("{name}: {}", sum(&text, name));
    }
    // The namespace's end kills what runs in it, sooner than containerd stops every pod.
    std::process::exit(0);
}

fn print_minutes(minutes: usize, pid: i32, address: &str, deleted: &AtomicUsize) {
    println!("minute      RSS    CPU  threads  descriptors  containers  views  pods deleted");
    let (mut rss, mut cpu) = (Vec::new(), Vec::new());
    let (started, mut last) = (Instant::now(), sample(pid));
    for minute in 1..=minutes {
        let end = started + Duration::from_secs(60) * u32::try_from(minute).unwrap();
        let [mut all, mut injected] = [0.0; 2];
        while Instant::now() < end {
            std::thread::sleep(SCRAPE.min(end.saturating_duration_since(Instant::now())));
            let text = scrape(address);
            all = sum(&text, "containers{");
            injected = sum(&text, "containers{state=\"injected\"}");
            let now = sample(pid);
            rss.push(((now.at - started).as_secs_f64() / 60.0, now.rss));
        }
        let now = sample(pid);
        let percent = cpu_percent(last, now);
        let Sample { rss, threads, descriptors, .. } = now;
        println!(
            "{minute:>6} {rss:>8.2} {percent:>5.2}% {threads:>8} {descriptors:>12} {all:>11} \
             {injected:>6} {:>13}",
            deleted.swap(0, Ordering::Relaxed)
        );
        cpu.push(percent);
        last = now;
    }
    let most = rss.iter().map(|point| point.1).fold(0.0, f64::max);
    println!(
        "at most {most:.2} MiB resident (goal {MAX_RSS_MIB}: {})",
        verdict(most <= MAX_RSS_MIB)
    );
    let mean = cpu.iter().sum::<f64>() / cpu.len() as f64;
    let most = cpu.iter().copied().fold(0.0, f64::max);
    println!(
        "{mean:.2} % of a core, at most {most:.2} % in a minute (goal {MAX_CPU_PERCENT}: {})",
        verdict(most <= MAX_CPU_PERCENT)
    );
    // Of the second half: caches of the allocator fill in the first minutes.
    let slope = slope(&rss[rss.len() / 2..]);
    println!(
        "slope {slope:.3} MiB per minute in the second half (goal {MAX_SLOPE}: {})",
        verdict(slope <= MAX_SLOPE)
    );
}
