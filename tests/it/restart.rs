//! lxcfs exits, hangs, is restarted and replaced: what readers in containers see, and what is left.

use std::{fs, path::Path, time::Duration};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::harness::*;

const PAUSE: Duration = Duration::from_millis(10);

fn readers(n: usize) -> Vec<Reader> {
    (0..n).map(|_| Reader::start(PAUSE)).collect()
}

fn seen(readers: &[Reader]) -> Seen {
    readers.iter().map(Reader::stop).reduce(Seen::and).unwrap()
}

fn injected(readers: &[Reader]) {
    readers.iter().for_each(|reader| has_views("the reader", reader.pid(), ALWAYS.len()));
}

fn removed(readers: &[Reader]) {
    readers.iter().for_each(|reader| has_views("the reader", reader.pid(), 0));
}

/// A node whose pods are the readers: an API server, an agent, a supervised lxcfs.
struct Node {
    readers: Vec<Reader>,
    agent: Running,
    lxcfs: Supervised,
    pods: Pods,
    dir: tempfile::TempDir,
}

impl Node {
    fn start(n: usize, lxcfs_args: &[&str]) -> Node {
        let (lxcfs, readers, pods) = (Supervised::start(lxcfs_args), readers(n), Pods::start());
        for (n, reader) in readers.iter().enumerate() {
            pods.run(&format!("pod-{n}"), &reader.id, json!({"kube-lxcfs.io/inject": "true"}));
        }
        let dir = tempfile::tempdir().unwrap();
        let agent = Node::agent(dir.path(), &pods, lxcfs.path());
        let node = Node { readers, agent, lxcfs, pods, dir };
        injected(&node.readers);
        node
    }

    fn agent(dir: &Path, pods: &Pods, lxcfs_path: &str) -> Running {
        agent_of(dir, pods, lxcfs_path, &[])
    }

    fn read(&self) {
        self.readers.iter().for_each(Reader::go);
    }

    /// Waits until another lxcfs than this one serves and every view comes from it.
    fn replaced(&self, previous: i32) {
        eventually_true("another lxcfs runs", || self.lxcfs.lxcfs() != previous);
        self.lxcfs.wait_until_serving();
        injected(&self.readers);
        eventually_true("every view is current", || {
            self.readers.iter().all(|r| self.is_current(r))
        });
    }

    /// Whether every view file of a reader comes from the lxcfs that is mounted now.
    fn is_current(&self, reader: &Reader) -> bool {
        let Some(serving) = serving_dev(self.lxcfs.path()) else { return false };
        managed_devs(&reader.mountinfo()).iter().all(|dev| *dev == serving)
    }
}

fn agent_of(dir: &Path, pods: &Pods, lxcfs_path: &str, more: &[&str]) -> Running {
    let args = ["--node-name", "n1", "--lxcfs-path", lxcfs_path, "--pid-from", "proc"];
    let kubeconfig = pods.kubeconfig();
    agent(dir, &[&args, more].concat(), &[("KUBECONFIG", kubeconfig.to_str().unwrap())])
}

/// The device of the lxcfs that is mounted at a path of the node.
fn serving_dev(path: &str) -> Option<String> {
    let table = own_mountinfo();
    let mut at_path = table.lines().rev().filter(|l| l.split(' ').nth(4) == Some(path));
    let top = at_path.next().filter(|l| l.contains(" - fuse.lxcfs "))?;
    top.split(' ').nth(2).map(str::to_owned)
}

/// The devices of the managed view files in a mount table.
fn managed_devs(table: &str) -> Vec<String> {
    let managed = table.lines().filter(|l| l.contains("noexec,noatime - fuse.lxcfs "));
    managed.map(|l| l.split(' ').nth(2).unwrap().to_owned()).collect()
}

#[test]
fn killed_lxcfs_is_restarted_and_views_return() {
    isolated(|| {
        let node = Node::start(8, &[]);
        node.read();
        let killed = node.lxcfs.lxcfs();
        node.lxcfs.signal_lxcfs(Signal::SIGKILL);
        node.replaced(killed);
        assert!(node.readers.iter().all(|r| Path::new("/proc").join(r.pid().to_string()).exists()));
        std::thread::sleep(Duration::from_millis(500));
        let seen = seen(&node.readers);
        println!("SIGKILL: {seen:?}");
        assert!(seen.own > 0 && seen.host > 0, "{seen:?}");
        assert_eq!(node.agent.logged(&[("lxcfs", "exited"), ("supervised", "true")]), 1);
        // No reader keeps an error.
        node.read();
        std::thread::sleep(Duration::from_millis(300));
        let seen = self::seen(&node.readers);
        assert!(seen.own > 0 && (seen.errors, seen.host) == (0, 0), "{seen:?}");
    });
}

#[test]
fn terminated_supervisor_causes_no_read_error() {
    isolated(|| {
        let mut node = Node::start(8, &[]);
        node.read();
        node.lxcfs.supervisor.terminate();
        assert!(node.readers.iter().all(|r| views(&r.mountinfo()).is_empty()), "no view is left");
        assert!(fs::read_dir(&node.lxcfs.path).unwrap().next().is_none(), "no mount is left");
        assert!(!node.lxcfs.path.with_file_name(".lxcfs.pid").exists(), "no file is left");
        std::thread::sleep(Duration::from_millis(300));
        node.lxcfs.restart();
        node.lxcfs.wait_until_serving();
        injected(&node.readers);
        std::thread::sleep(Duration::from_millis(300));
        let seen = seen(&node.readers);
        println!("SIGTERM: {seen:?}");
        assert_eq!(seen.errors, 0, "{seen:?}");
        assert!(seen.own > 0 && seen.host > 0, "{seen:?}");
    });
}

#[test]
fn serving_predecessor_is_replaced_without_a_gap() {
    isolated(|| {
        // The supervisor alone is killed, as in an upgrade gone wrong: its lxcfs goes on.
        let mut node = Node::start(8, &[]);
        node.read();
        let old = node.lxcfs.lxcfs();
        node.lxcfs.supervisor.kill();
        node.lxcfs.restart();
        let old = Path::new("/proc").join(old.to_string());
        eventually_true("the predecessor has exited", || !old.exists());
        node.lxcfs.wait_until_serving();
        injected(&node.readers);
        std::thread::sleep(Duration::from_millis(300));
        let seen = seen(&node.readers);
        println!("replacement: {seen:?}");
        assert_eq!((seen.errors, seen.host), (0, 0), "{seen:?}");
        assert!(seen.own > 0);
    });
}

#[test]
fn opt_out_is_served_while_lxcfs_hangs() {
    isolated(|| {
        let node = Node::start(4, &["--watchdog", "600s"]);
        let hung = node.lxcfs.lxcfs();
        node.lxcfs.signal_lxcfs(Signal::SIGSTOP);
        node.pods.annotate("pod-0", json!({"kube-lxcfs.io/inject": "false"}));
        has_views("the pod that opted out", node.readers[0].pid(), 0);
        assert_eq!(node.lxcfs.lxcfs(), hung, "the hung lxcfs still runs");
        assert!(node.readers[1..].iter().all(|r| views(&r.mountinfo()).len() == ALWAYS.len()));
        node.lxcfs.signal_lxcfs(Signal::SIGCONT);
    });
}

#[test]
fn hung_lxcfs_is_killed_and_views_return() {
    isolated(|| {
        let mut node = Node::start(4, &["--watchdog", "1500ms"]);
        node.read();
        let hung = node.lxcfs.lxcfs();
        node.lxcfs.signal_lxcfs(Signal::SIGSTOP);
        node.replaced(hung);
        std::thread::sleep(Duration::from_millis(200));
        let seen = seen(&node.readers);
        println!("hung: {seen:?}");
        assert!(seen.own > 0, "{seen:?}");
        assert!(node.lxcfs.supervisor.logged(&[("exit_reason", "hung")]) > 0);
        assert!(node.agent.is_running());
    });
}

#[test]
fn lxcfs_without_supervisor_is_swept_by_the_agent() {
    isolated(|| {
        let mut lxcfs = Lxcfs::start();
        let (readers, pods) = (readers(3), Pods::start());
        for (n, reader) in readers.iter().enumerate() {
            pods.run(&format!("pod-{n}"), &reader.id, json!({"kube-lxcfs.io/inject": "true"}));
        }
        let dir = tempfile::tempdir().unwrap();
        let agent = agent_of(dir.path(), &pods, lxcfs.path(), &[]);
        injected(&readers);
        lxcfs.process.kill();
        removed(&readers);
        unmount(&lxcfs.path);
        lxcfs.restart();
        injected(&readers);
        let swept = |entry: &serde_json::Value| entry["swept_files"].as_u64();
        let swept: u64 = agent.entries().iter().filter_map(swept).sum();
        assert_eq!(swept, 3 * 9, "the agent did it: {}", agent.log());
    });
}

#[test]
fn unmounted_or_covered_path_is_served_again() {
    isolated(|| {
        let node = Node::start(2, &["--watchdog", "1s"]);
        let mounted = || node.lxcfs.path.join("proc/uptime").exists();
        unmount(&node.lxcfs.path);
        eventually_true("lxcfs is mounted again", mounted);
        injected(&node.readers);
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("none"), &node.lxcfs.path, Some("tmpfs"), flags, None::<&str>)
            .unwrap();
        eventually_true("lxcfs is mounted again", mounted);
        injected(&node.readers);
    });
}

#[test]
fn removed_mount_point_is_created_again() {
    isolated(|| {
        let node = Supervised::start(&[]);
        // The supervisor is stopped, so that its next lxcfs is not mounted there yet.
        node.supervisor.signal(Signal::SIGSTOP);
        let killed = node.lxcfs();
        send(killed, Signal::SIGKILL);
        unmount(&node.path);
        fs::remove_dir(&node.path).unwrap();
        node.supervisor.signal(Signal::SIGCONT);
        node.wait_until_serving();
    });
}

#[test]
fn pod_provided_files_stay_unless_adopted() {
    isolated(|| {
        let (old, new) = (Lxcfs::start(), Lxcfs::start());
        let (reader, pods) = (Reader::start(PAUSE), Pods::start());
        // As a webhook's hostPath volume does it: a bind mount made with the container.
        let target = format!("--mount=/proc/{}/ns/mnt", reader.pid());
        let bind = format!("mount --bind {}/proc/meminfo /proc/meminfo", old.path());
        let bound = program("nsenter").args([&target, "sh", "-c", &bind]).output().unwrap();
        assert!(bound.status.success(), "{}", stderr(&bound));
        let before = reader.mountinfo();
        pods.run("webhook", &reader.id, json!({}));
        let dir = tempfile::tempdir().unwrap();
        let start = |more: &[&str]| agent_of(dir.path(), &pods, new.path(), more);
        let mut plain = start(&[]);
        reconciled(&plain, "default/webhook/app");
        assert_eq!(reader.mountinfo(), before, "unchanged");
        plain.terminate();
        let _adopting = start(&["--adopt"]);
        let dev = |table: &str| {
            let line = table.lines().find(|l| l.contains(" /proc/meminfo "))?;
            Some(line.split(' ').nth(2).unwrap().to_owned())
        };
        eventually_true("it is current", || dev(&reader.mountinfo()) != dev(&before));
        drop(old);
        let count = reader.mountinfo().matches(" /proc/meminfo /proc/meminfo ").count();
        assert_eq!(count, 1, "nothing is stacked");
        reader.go();
        std::thread::sleep(Duration::from_millis(100));
        let seen = reader.stop();
        assert!(seen.own > 0 && seen.errors == 0, "{seen:?}");
    });
}

/// A small random number generator (xorshift): a seed is all that repeats a run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// A number from the environment, or the default.
fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable)
        .map_or(default, |n| n.parse().unwrap_or_else(|e| panic!("invalid {variable} '{n}': {e}")))
}

/// Everything that can happen to a node, one after the other at random moments: 200 rounds, or
/// `CHAOS_ROUNDS`. Most of the time passes in the supervisor's backoff.
#[test]
fn chaos_converges_to_desired_state() {
    isolated(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = number("KUBE_LXCFS_SEED", u64::from(now.subsec_nanos()) | 1);
        println!("KUBE_LXCFS_SEED={seed}");
        let mut random = Random(seed);
        let mut node = Node::start(4, &["--watchdog", "600ms"]);
        let mut desired = [true; 4];
        for round in 1..=number("CHAOS_ROUNDS", 200) {
            disturb(&mut node, &mut desired, &mut random);
            std::thread::sleep(Duration::from_millis(random.below(120)));
            if round % 25 == 0 {
                converges(&node, &desired, &format!("round {round} of seed {seed}"));
            }
        }
        node.lxcfs.supervisor.terminate();
        removed(&node.readers);
        let path = node.lxcfs.path.clone();
        unmount(&path);
        drop(node);
        let left = own_mountinfo().matches(path.to_str().unwrap()).count();
        assert_eq!(left, 0, "the node's own mount table is as before");
    });
}

fn disturb(node: &mut Node, desired: &mut [bool; 4], random: &mut Random) {
    let covered =
        own_mountinfo().lines().any(|l| l.contains(node.lxcfs.path()) && l.contains("tmpfs"));
    match random.below(7) {
        0 | 1 => node.lxcfs.signal_lxcfs(Signal::SIGKILL),
        2 => node.lxcfs.signal_lxcfs(Signal::SIGSTOP),
        3 => {
            node.lxcfs.supervisor.signal(Signal::SIGKILL);
            node.lxcfs.restart();
        }
        4 => {
            node.agent.kill();
            node.agent = Node::agent(node.dir.path(), &node.pods, node.lxcfs.path());
        }
        5 => {
            let pod = usize::try_from(random.below(4)).unwrap();
            desired[pod] = !desired[pod];
            let inject = desired[pod].to_string();
            node.pods.annotate(&format!("pod-{pod}"), json!({"kube-lxcfs.io/inject": inject}));
        }
        _ if covered || random.below(2) == 0 => unmount(&node.lxcfs.path),
        _ => {
            let flags = nix::mount::MsFlags::empty();
            let path = &node.lxcfs.path;
            let _ = nix::mount::mount(Some("none"), path, Some("tmpfs"), flags, None::<&str>);
        }
    }
}

/// Waits until every desired view is current, and there is no other.
fn converges(node: &Node, desired: &[bool], when: &str) {
    for (reader, desired) in node.readers.iter().zip(desired) {
        eventually(when, || {
            let serving = serving_dev(node.lxcfs.path()).ok_or("lxcfs is not mounted")?;
            let table = reader.mountinfo();
            let all = views(&table);
            let mut distinct = all.clone();
            distinct.dedup();
            let current = managed_devs(&table).iter().all(|dev| *dev == serving);
            let count = if *desired { ALWAYS.len() } else { 0 };
            if all.len() == count && current && all == distinct {
                Ok(())
            } else {
                Err(format!("desired {desired}, serving {serving}: {table}"))
            }
        });
    }
}

/// As `ExecStartPost=` of a unit, `remount --all` runs before lxcfs serves.
#[test]
fn remount_all_waits_for_a_starting_lxcfs() {
    isolated(|| {
        let (mut lxcfs, target) = (Lxcfs::start(), Bare::start());
        let pid = target.pid.to_string();
        succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        lxcfs.process.kill();
        unmount(&lxcfs.path);
        let mut remount = kube_lxcfs();
        remount.args(["remount", "--all", "--lxcfs-path", lxcfs.path()]);
        let mut remount = remount
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It waits: there is no lxcfs yet.
        std::thread::sleep(Duration::from_millis(300));
        assert!(remount.try_wait().unwrap().is_none(), "it has not waited");
        lxcfs.restart();
        let output = remount.wait_with_output().unwrap();
        assert!(output.status.success(), "{} {}", stdout(&output), stderr(&output));
        let status = succeeds(&["status", "--pid-from", "proc", "--lxcfs-path", lxcfs.path()]);
        assert!(status.contains(" current "), "{status}");
        assert!(!status.contains("dead") && !status.contains("stale"), "{status}");
    });
}
