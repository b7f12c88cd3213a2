//! Everything that can happen to a node, one after the other at random moments, beside containers
//! that do to themselves what a hostile container can.

use std::{collections::BTreeMap, io::Write, net::TcpStream, process::Command, time::Duration};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::{
    harness::*,
    hostile_lxcfs::Fake,
    restart::{Node, managed_devs, removed, serving_dev},
};

/// Containers that behave, and after them the hostile ones.
const HONEST: usize = 4;
const HOSTILE: usize = 3;
/// A hostile container has at most this many processes at a time.
const MAX_PROCESSES: usize = 4;

/// A small random number generator (xorshift): a seed is all that repeats a run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn index(&mut self, n: usize) -> usize {
        usize::try_from(self.below(u64::try_from(n).unwrap())).unwrap()
    }
}

/// A number from the environment, or the default.
fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable)
        .map_or(default, |n| n.parse().unwrap_or_else(|e| panic!("invalid {variable} '{n}': {e}")))
}

/// The run: the node, what is done to it, and how often.
struct Chaos {
    node: Node,
    desired: [bool; HONEST],
    random: Random,
    /// Processes that hostile containers have started, for each container.
    processes: [Vec<Running>; HOSTILE],
    /// A container that has never opted in, and its mount table.
    bystander: (Bare, String),
    /// A container with a file system of its own that never answers.
    fake: Fake,
    /// Requests that are never completed.
    requests: Vec<TcpStream>,
    counts: BTreeMap<&'static str, u32>,
}

/// 200 rounds, or `CHAOS_ROUNDS`. Most of the time passes in the supervisor's backoff.
#[test]
fn chaos_converges_to_desired_state() {
    isolated(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = number("KUBE_LXCFS_SEED", u64::from(now.subsec_nanos()) | 1);
        println!("KUBE_LXCFS_SEED={seed}");
        let bystander = Bare::start();
        let table = bystander.mountinfo();
        let mut chaos = Chaos {
            node: Node::start(HONEST + HOSTILE, &["--watchdog", "600ms"]),
            desired: [true; HONEST],
            random: Random(seed),
            processes: Default::default(),
            bystander: (bystander, table),
            fake: Fake::start("hang"),
            requests: Vec::new(),
            counts: BTreeMap::new(),
        };
        let rounds = number("CHAOS_ROUNDS", 200);
        for round in 1..=rounds {
            if chaos.random.below(3) == 0 {
                chaos.attack();
            } else {
                chaos.disturb();
            }
            std::thread::sleep(Duration::from_millis(chaos.random.below(120)));
            if round % 25 == 0 {
                chaos.converges(&format!("round {round} of seed {seed}"));
            }
        }
        println!("{rounds} rounds: {:?}", chaos.counts);
        chaos.leaves_nothing();
    });
}

impl Chaos {
    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// What happens to the parts of kube-lxcfs and to lxcfs.
    fn disturb(&mut self) {
        let node = &mut self.node;
        let path = node.lxcfs.path.clone();
        let covered =
            own_mountinfo().lines().any(|l| l.contains(node.lxcfs.path()) && l.contains("tmpfs"));
        let what = match self.random.below(7) {
            0 | 1 => {
                node.lxcfs.signal_lxcfs(Signal::SIGKILL);
                "lxcfs killed"
            }
            2 => {
                node.lxcfs.signal_lxcfs(Signal::SIGSTOP);
                "lxcfs stopped"
            }
            3 => {
                node.lxcfs.supervisor.signal(Signal::SIGKILL);
                node.lxcfs.restart();
                "supervisor killed"
            }
            4 => {
                node.agent.kill();
                node.agent = Node::agent(node.dir.path(), &node.pods, node.lxcfs.path());
                "agent killed"
            }
            5 => {
                let pod = self.random.index(HONEST);
                self.desired[pod] = !self.desired[pod];
                let inject = self.desired[pod].to_string();
                node.pods.annotate(&format!("pod-{pod}"), json!({"kube-lxcfs.io/inject": inject}));
                "annotation changed"
            }
            _ if covered || self.random.below(2) == 0 => {
                unmount(&path);
                "lxcfs unmounted"
            }
            _ => {
                let flags = nix::mount::MsFlags::empty();
                let _ = nix::mount::mount(Some("none"), &path, Some("tmpfs"), flags, None::<&str>);
                "lxcfs covered"
            }
        };
        self.count(what);
    }

    /// What a hostile container or client does.
    fn attack(&mut self) {
        let container = self.random.index(HOSTILE);
        let pid = self.node.readers[HONEST + container].pid();
        let in_container = |script: &str| {
            let mut command = program("nsenter");
            command.args(["--target", &pid.to_string(), "--mount", "--pid"]);
            command.args(["sh", "-c", script]);
            command
        };
        let what = match self.random.below(9) {
            0 => {
                let script = "exec unshare --user --map-root-user --mount sleep 3600";
                self.start(container, &mut in_container(script));
                "nested user namespace"
            }
            1 => {
                self.start(container, &mut in_container("exec unshare --mount sleep 3600"));
                "nested mount namespace"
            }
            2 => {
                let mut flock = program("flock");
                let namespace = format!("/proc/{pid}/ns/mnt");
                self.start(container, flock.args([&namespace, "sleep", "0.7"]));
                "namespace locked"
            }
            3 => {
                let script = "for n in $(seq 60); do \
                              mount --bind /proc/version /proc/meminfo; done; \
                              for n in $(seq 60); do umount /proc/meminfo; done";
                finish(in_container(script));
                "mounts stacked"
            }
            4 => {
                finish(in_container("mount -o remount,bind,rw,strictatime /proc/uptime"));
                "options changed"
            }
            5 => {
                finish(in_container("umount -l /proc/stat /sys/devices/system/cpu"));
                "views unmounted"
            }
            6 => {
                let script = "for n in $(seq 40); do \
                              mount --bind /proc /proc; umount -l /proc; done";
                self.start(container, &mut in_container(script));
                "proc flipped"
            }
            7 => {
                let address = http_address(&self.node.agent);
                for _ in 0..40 {
                    if let Ok(mut stream) = TcpStream::connect(&address) {
                        let _ = stream.write_all(b"GET /status HTTP/1.1\r\nHost:");
                        self.requests.push(stream);
                    }
                }
                let excess = self.requests.len().saturating_sub(200);
                self.requests.drain(..excess);
                "incomplete requests"
            }
            _ => {
                let pod = format!("pod-{}", HONEST + container);
                for n in 0..8 {
                    let files = format!("meminfo,file-{n}");
                    self.node.pods.annotate(&pod, json!({"kube-lxcfs.io/files": files}));
                }
                self.node.pods.annotate(&pod, json!({"kube-lxcfs.io/files": null}));
                "annotations edited"
            }
        };
        self.count(what);
    }

    /// Starts a process of a hostile container; the oldest of too many ends.
    fn start(&mut self, container: usize, command: &mut Command) {
        let log = self.node.dir.path().join(format!("hostile-{container}.log"));
        let processes = &mut self.processes[container];
        processes.push(Running::start(command, &log));
        let excess = processes.len().saturating_sub(MAX_PROCESSES);
        processes.drain(..excess);
    }

    /// Waits until every desired view is current, and there is no other: none that is dead, none
    /// twice, none in a container that has not opted in.
    fn converges(&self, when: &str) {
        for (reader, desired) in self.node.readers.iter().zip(self.desired) {
            eventually(when, || {
                let (serving, table) = (self.serving()?, reader.mountinfo());
                let all = views(&table);
                let mut distinct = all.clone();
                distinct.dedup();
                let current = managed_devs(&table).iter().all(|dev| *dev == serving);
                let count = if desired { ALWAYS.len() } else { 0 };
                if all.len() == count && current && all == distinct {
                    Ok(())
                } else {
                    Err(format!("desired {desired}, serving {serving}: {table}"))
                }
            });
        }
        let hostile = self.node.readers[HONEST..].iter().map(Reader::pid);
        let nested = self.processes.iter().flatten().map(Running::pid);
        for pid in hostile.chain(nested) {
            let mut attempts = 0;
            eventually(when, || {
                attempts += 1;
                if attempts % 100 == 0 {
                    self.reconcile_hostile();
                }
                // Its process may have ended, or have been in the namespace above so far.
                let table = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"));
                let Ok(table) = table else { return Ok(()) };
                let serving = self.serving()?;
                let dead: Vec<_> = top_views(&table).filter(|(_, dev)| *dev != serving).collect();
                if dead.is_empty() { Ok(()) } else { Err(format!("{dead:?} in {pid}: {table}")) }
            });
        }
        self.leaves_others_alone();
    }

    /// A view that the container itself has covered cannot be detached or remounted. Once it is
    /// uncovered, the next reconcile does it.
    fn reconcile_hostile(&self) {
        for container in HONEST..HONEST + HOSTILE {
            let pod = format!("pod-{container}");
            self.node.pods.annotate(&pod, json!({"kube-lxcfs.io/files": "meminfo"}));
            self.node.pods.annotate(&pod, json!({"kube-lxcfs.io/files": null}));
        }
    }

    fn serving(&self) -> Result<String, String> {
        serving_dev(self.node.lxcfs.path()).ok_or_else(|| "lxcfs is not mounted".into())
    }

    fn leaves_others_alone(&self) {
        let (bystander, table) = &self.bystander;
        assert_eq!(bystander.mountinfo(), *table, "a container that has not opted in");
        assert!(self.fake.has_view(), "it has not opted in either");
        assert!(views(&own_mountinfo()).is_empty(), "a view on the node itself");
    }

    fn leaves_nothing(mut self) {
        self.leaves_others_alone();
        self.node.lxcfs.supervisor.terminate();
        removed(&self.node.readers[..HONEST]);
        for reader in &self.node.readers[HONEST..] {
            eventually("no view is left", || {
                let table = reader.mountinfo();
                if managed_devs(&table).is_empty() { Ok(()) } else { Err(table) }
            });
        }
        let path = self.node.lxcfs.path.clone();
        unmount(&path);
        drop(self);
        let left = own_mountinfo().matches(path.to_str().unwrap()).count();
        assert_eq!(left, 0, "the node's own mount table is as before");
    }
}

/// Runs a command of a hostile container to its end. What it does may fail, because a view has
/// just gone.
fn finish(mut command: Command) {
    drop(command.output().unwrap());
}

/// The managed views that are the topmost mounts of their paths, with their devices.
fn top_views(table: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut top = BTreeMap::new();
    for line in table.lines() {
        let mut fields = line.split(' ');
        let (dev, point) = (fields.nth(2).unwrap(), fields.nth(1).unwrap());
        let dev = line.contains("noexec,noatime").then_some(dev);
        let view = dev.filter(|_| line.contains(" - fuse.lxcfs "));
        top.insert(point, view);
    }
    top.into_iter().filter_map(|(point, dev)| Some((point, dev?)))
}
