//! What readers in 200 containers see when lxcfs is killed, ended in order, and replaced: 180 bare
//! namespaces and 20 containers of a real containerd, pods of a real API server, an agent and a
//! supervised lxcfs; and 50 readers of an lxcfs that hangs.
//!
//!     cargo bench --bench restart
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_imports,
    clippy::needless_pass_by_value,
    reason = "a benchmark fails by panicking"
)]

#[path = "../tests/it/cluster.rs"]
#[allow(dead_code, unused, reason = "the tests use the rest")]
mod cluster;
#[path = "../tests/it/harness.rs"]
#[allow(dead_code, unused, reason = "the tests use the rest")]
mod harness;

use std::{
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use harness::*;
use nix::sys::signal::Signal;

const BARE: usize = 180;
const REAL: usize = 20;
const HUNG: usize = 50;
/// Of each reader between two rounds; two files a round.
const PAUSE: Duration = Duration::from_millis(100);

struct Container {
    pid: i32,
    id: String,
    out: PathBuf,
}

struct Setup {
    lxcfs: Supervised,
    containers: Vec<Container>,
    // In the order in which they end.
    _agent: Running,
    _pods: cluster::Pods,
    _bare: Vec<Reader>,
    _real: Option<Containerd>,
    _dir: tempfile::TempDir,
}

fn setup(bare: usize, real: usize, lxcfs: &[&str]) -> Setup {
    let (lxcfs, pods) = (Supervised::start(lxcfs), cluster::Pods::start());
    let bare: Vec<Reader> = (0..bare).map(|_| Reader::start(PAUSE)).collect();
    let mut containers: Vec<Container> = bare
        .iter()
        .map(|r| Container { pid: r.pid(), id: r.id.clone(), out: r.out().to_owned() })
        .collect();
    let runtime = (real > 0).then(Containerd::start);
    if let Some(runtime) = &runtime {
        for n in 0..real {
            let (id, out) = runtime.run_reader(&format!("real-{n}"), PAUSE);
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
    /// Waits until every container has a whole view of another lxcfs than `before`; returns the
    /// time it took.
    fn all_current(&self, before: Option<&str>) -> Duration {
        let begun = Instant::now();
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
        begun.elapsed()
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

    /// Readers read from before `what` until after, and tell.
    fn during(&mut self, name: &str, readers: usize, what: impl FnOnce(&mut Setup) -> u128) {
        let outs: Vec<PathBuf> =
            self.containers.iter().rev().take(readers).map(|c| c.out.clone()).collect();
        // All at once: one after the other they would be busy long before.
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
            "{name}: {} containers read {} own values, {} host values (the last {}), {} errors (the last {})",
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
    let begun = Instant::now();
    let mut setup = setup(BARE, REAL, &["--watchdog", "2s"]);
    println!(
        "{} containers have their view after {:.1?} of preparations",
        setup.containers.len(),
        begun.elapsed()
    );

    setup.during("kill -9", usize::MAX, |setup| {
        let old = setup.lxcfs.lxcfs();
        let at = now();
        setup.lxcfs.signal_lxcfs(Signal::SIGKILL);
        eventually_true("another lxcfs runs", || setup.lxcfs.lxcfs() != old);
        setup.lxcfs.serves();
        let serves = (now() - at) / 1_000_000;
        setup.all_current(None);
        println!(
            "kill -9: lxcfs answers again after {serves} ms, all views are current after {} ms",
            (now() - at) / 1_000_000
        );
        at
    });
    setup.during("SIGTERM and restart", usize::MAX, |setup| {
        let at = now();
        setup.lxcfs.supervisor.terminate();
        setup.lxcfs.again();
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
        setup.lxcfs.again();
        setup.all_current(Some(&before));
        println!("replacement: all views are current after {} ms", (now() - at) / 1_000_000);
        at
    });
    setup.during("hung (watchdog 2 s)", HUNG, |setup| {
        let old = setup.lxcfs.lxcfs();
        let at = now();
        setup.lxcfs.signal_lxcfs(Signal::SIGSTOP);
        eventually_true("another lxcfs runs", || setup.lxcfs.lxcfs() != old);
        setup.lxcfs.serves();
        setup.all_current(None);
        println!("hung: all views are current after {} ms", (now() - at) / 1_000_000);
        at
    });
    for line in
        setup.lxcfs.supervisor.log().lines().filter(|l| l.contains("killed") || l.contains("swept"))
    {
        println!("{line}");
    }
}
