//! What readers in 200 containers see when lxcfs is killed, ended in order, and replaced: bare
//! namespaces and 20 containers of a real containerd, pods of a real API server, an agent and a
//! supervised lxcfs; and 50 readers of an lxcfs that hangs.
//!
//!     cargo bench --bench restart                  200 containers
//!     cargo bench --bench restart -- 1000          more
//!     cargo bench --bench restart -- 1000 500      whose readers read 500 files a second in all
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
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use harness::*;
use k8s_cri::v1 as cri;
use nix::sys::signal::Signal;

/// How many containers without an argument, and how many of them are containerd's.
const CONTAINERS: usize = 200;
const REAL: usize = 20;
const HUNG: usize = 50;
/// How many files all readers together read in a second. With 20,000, they wait for lxcfs already
/// before it is killed; with 2,000, it uses most of two CPUs.
const FILES_PER_SECOND: u32 = 2000;
/// How many files a reader reads in a round.
const FILES_PER_ROUND: u32 = 2;

struct Container {
    pid: i32,
    id: String,
    out: PathBuf,
}

struct Setup {
    lxcfs: Supervised,
    containers: Vec<Container>,
    // In the order in which they are dropped.
    _agent: Running,
    _pods: Pods,
    _bare: Vec<Reader>,
    _real: Option<Containerd>,
    _dir: tempfile::TempDir,
}

/// A pod whose container is a reader: its container's id, and where the reader writes what it saw.
fn run_reader(containerd: &Containerd, name: &str, pause: Duration) -> (String, PathBuf) {
    let mut pod = containerd.run(&PodSpec { name, annotations: &[], containers: &[] });
    let dir = containerd.dir.path().join(name);
    std::fs::create_dir(&dir).unwrap();
    let mount = |container_path: &str, host: &Path| cri::Mount {
        container_path: container_path.into(),
        host_path: host.to_str().unwrap().into(),
        ..Default::default()
    };
    let mounts = vec![mount("/out", &dir), mount("/reader", &reader_program())];
    let command = reader_command("/reader", "/out/seen", MEMORY_MIB, pause);
    containerd.start_with(&mut pod, "app", 0, command, mounts);
    (pod.containers["app"].clone(), dir.join("seen"))
}

fn setup(bare: usize, real: usize, files_per_second: u32, lxcfs: &[&str]) -> Setup {
    let (lxcfs, pods) = (Supervised::start(lxcfs), Pods::start());
    let files = FILES_PER_ROUND * u32::try_from(bare + real).unwrap();
    // Of each reader between two rounds.
    let pause = Duration::from_secs(1) * files / files_per_second;
    let bare: Vec<Reader> = (0..bare).map(|_| Reader::start(pause)).collect();
    let mut containers: Vec<Container> = bare
        .iter()
        .map(|r| Container { pid: r.pid(), id: r.id.clone(), out: r.out.clone() })
        .collect();
    let runtime = (real > 0).then(Containerd::start);
    if let Some(runtime) = &runtime {
        for n in 0..real {
            let (id, out) = run_reader(runtime, &format!("real-{n}"), pause);
            containers.push(Container { pid: runtime.pid(&id), id, out });
        }
    }
    for (n, container) in containers.iter().enumerate() {
        pods.run(
            &format!("pod-{n}"),
            &container.id,
            serde_json::json!({"kube-lxcfs.io/inject": "true"}),
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let args = ["--node-name", "n1", "--lxcfs-path", lxcfs.path(), "--pid-from", "proc"];
    let agent = agent(
        dir.path(),
        &args,
        &[("KUBECONFIG", pods.kubeconfig().to_str().unwrap()), ("RUST_LOG", "info")],
    );
    let setup = Setup {
        lxcfs,
        containers,
        _agent: agent,
        _pods: pods,
        _bare: bare,
        _real: runtime,
        _dir: dir,
    };
    setup.all_current(None);
    setup
}

impl Setup {
    /// Waits until every container has a whole view of another lxcfs than `before`.
    fn all_current(&self, before: Option<&str>) {
        // What is measured has the nice value -10, and uses every CPU.
        let nice = |value| rustix::process::setpriority_process(None, value).unwrap();
        nice(-20);
        for container in &self.containers {
            eventually("the view is current", || {
                let table = mountinfo(container.pid);
                let stale =
                    before.is_some_and(|dev| table.contains(&format!(" {dev} /proc/meminfo ")));
                if views(&table).len() >= 9 && !stale {
                    Ok(())
                } else {
                    Err(format!("{:?}", views(&table)))
                }
            });
        }
        nice(0);
    }

    /// The device of the view in the last container.
    fn dev(&self) -> String {
        let table = mountinfo(self.containers.last().unwrap().pid);
        table
            .lines()
            .find(|l| l.contains(" /proc/meminfo /proc/meminfo "))
            .unwrap()
            .split(' ')
            .nth(2)
            .unwrap()
            .to_owned()
    }

    /// Reads from before `what` until after, and prints what the readers saw.
    fn during(&mut self, name: &str, readers: usize, what: impl FnOnce(&mut Setup) -> u128) {
        let outs: Vec<PathBuf> =
            self.containers.iter().rev().take(readers).map(|c| c.out.clone()).collect();
        // Concurrently: one after the other they would be busy long before.
        std::thread::scope(|s| outs.iter().for_each(|out| drop(s.spawn(|| go(out)))));
        std::thread::sleep(Duration::from_millis(500));
        let at = what(self);
        std::thread::sleep(Duration::from_millis(700));
        let seen = std::thread::scope(|s| {
            let stopping: Vec<_> = outs.iter().map(|out| s.spawn(|| stop(out))).collect();
            stopping.into_iter().map(|stopped| stopped.join().unwrap()).reduce(Seen::and).unwrap()
        });
        let after = |ns: u128| {
            if ns == 0 {
                "never".to_owned()
            } else {
                format!("{} ms after", ns.saturating_sub(at) / 1_000_000)
            }
        };
        println!(
            "{name}: {} containers read {} own values, {} host values (the last {}), \
             {} errors (the last {})",
            outs.len(),
            seen.own,
            seen.host,
            after(seen.last_host),
            seen.errors,
            after(seen.last_error)
        );
    }
}

fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()
}

fn main() {
    let started = Instant::now();
    let mut numbers = std::env::args().skip(1).filter_map(|arg| arg.parse().ok());
    let containers = numbers.next().map_or(CONTAINERS, |count: u32| count.try_into().unwrap());
    let rate = numbers.next().unwrap_or(FILES_PER_SECOND);
    let bare = containers.saturating_sub(REAL);
    let mut setup = setup(bare, REAL, rate, &["--watchdog", "2s"]);
    println!(
        "{} containers have their view after {:.1?} of preparations",
        setup.containers.len(),
        started.elapsed()
    );

    setup.during("kill -9", usize::MAX, |setup| {
        let (old, dev) = (setup.lxcfs.lxcfs(), setup.dev());
        let at = now();
        setup.lxcfs.signal_lxcfs(Signal::SIGKILL);
        eventually_true("another lxcfs runs", || setup.lxcfs.lxcfs() != old);
        setup.lxcfs.wait_until_serving();
        let serves = (now() - at) / 1_000_000;
        setup.all_current(Some(&dev));
        let current = (now() - at) / 1_000_000;
        let remounted = eventually("the supervisor has remounted every view", || {
            let entries = setup.lxcfs.supervisor.entries().into_iter();
            let mut passes =
                entries.filter(|entry| entry["message"] == "remounted views of an exited lxcfs");
            passes.next().ok_or_else(|| "no such line".to_owned())
        });
        println!(
            "kill -9: lxcfs serves after {serves} ms, all views are current after {current} ms; \
             the supervisor's remount took {}",
            remounted["elapsed"].as_str().unwrap()
        );
        at
    });
    setup.during("SIGTERM and restart", usize::MAX, |setup| {
        let at = now();
        setup.lxcfs.supervisor.terminate();
        setup.lxcfs.restart();
        setup.all_current(None);
        println!(
            "SIGTERM and restart: all views are current after {} ms",
            (now() - at) / 1_000_000
        );
        at
    });
    let before = setup.dev();
    setup.during("replacement while the old one answers", usize::MAX, |setup| {
        let at = now();
        setup.lxcfs.supervisor.kill();
        setup.lxcfs.restart();
        setup.all_current(Some(&before));
        println!("replacement: all views are current after {} ms", (now() - at) / 1_000_000);
        at
    });
    setup.during("hung (watchdog 2 s)", HUNG, |setup| {
        let (old, dev) = (setup.lxcfs.lxcfs(), setup.dev());
        let at = now();
        setup.lxcfs.signal_lxcfs(Signal::SIGSTOP);
        eventually_true("another lxcfs runs", || setup.lxcfs.lxcfs() != old);
        setup.lxcfs.wait_until_serving();
        setup.all_current(Some(&dev));
        println!("hung: all views are current after {} ms", (now() - at) / 1_000_000);
        at
    });
    for line in setup
        .lxcfs
        .supervisor
        .log()
        .lines()
        .filter(|l| ["killed", "views of", "waited"].iter().any(|word| l.contains(word)))
    {
        println!("{line}");
    }
}
