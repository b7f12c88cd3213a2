//! lxcfs dies, hangs, is restarted and replaced: what readers in containers see, and what is left.

use std::{fs, path::Path, time::Duration};

use nix::sys::signal::Signal;

use crate::{cluster::Pods, harness::*};

const PAUSE: Duration = Duration::from_millis(10);

fn readers(n: usize) -> Vec<Reader> {
    (0..n).map(|_| Reader::start(PAUSE)).collect()
}

fn seen(readers: &[Reader]) -> Seen {
    readers.iter().map(Reader::stop).reduce(Seen::and).unwrap()
}

fn current(readers: &[Reader]) {
    for reader in readers {
        eventually("the view is current", || {
            let table = reader.mountinfo();
            let views = views(&table);
            let mut once = views.clone();
            once.dedup();
            if views.len() >= 9 && once == views { Ok(()) } else { Err(format!("{views:?}")) }
        });
    }
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
            pods.run(
                &format!("pod-{n}"),
                &reader.id,
                serde_json::json!({"kube-lxcfs.io/inject": "true"}),
            );
        }
        let dir = tempfile::tempdir().unwrap();
        let agent = Node::agent(dir.path(), &pods, &lxcfs);
        let node = Node { readers, agent, lxcfs, pods, dir };
        current(&node.readers);
        node
    }

    fn agent(dir: &Path, pods: &Pods, lxcfs: &Supervised) -> Running {
        let args = ["--node-name", "n1", "--lxcfs-path", lxcfs.path(), "--pid-from", "proc"];
        agent(dir, &args, &[("KUBECONFIG", pods.kubeconfig().to_str().unwrap())])
    }

    fn read(&self) {
        self.readers.iter().for_each(Reader::go);
    }
}

#[test]
fn after_a_kill_views_return_by_themselves_and_no_reader_keeps_an_error() {
    let node = Node::start(8, &[]);
    node.read();
    let killed = node.lxcfs.lxcfs();
    node.lxcfs.signal_lxcfs(Signal::SIGKILL);
    eventually_true("another lxcfs runs", || node.lxcfs.lxcfs() != killed);
    node.lxcfs.serves();
    current(&node.readers);
    let all_own = || {
        node.readers
            .iter()
            .all(|r| fs::read_to_string(format!("/proc/{}/mountinfo", r.pid())).is_ok())
    };
    assert!(all_own());
    std::thread::sleep(Duration::from_millis(500));
    let seen = seen(&node.readers);
    println!("SIGKILL: {seen:?}");
    assert!(seen.own > 0 && seen.host > 0, "{seen:?}");
    assert!(node.agent.log().contains("supervised: true"), "{}", node.agent.log());
}

#[test]
fn a_supervisor_that_ends_and_starts_again_causes_no_error() {
    let mut node = Node::start(8, &[]);
    node.read();
    node.lxcfs.supervisor.terminate();
    assert!(node.readers.iter().all(|r| views(&r.mountinfo()).is_empty()), "no view is left");
    assert!(fs::read_dir(&node.lxcfs.path).unwrap().next().is_none(), "no mount is left");
    assert!(!node.lxcfs.path.with_file_name(".lxcfs.pid").exists(), "no file is left");
    std::thread::sleep(Duration::from_millis(300));
    node.lxcfs.again();
    node.lxcfs.serves();
    current(&node.readers);
    std::thread::sleep(Duration::from_millis(300));
    let seen = seen(&node.readers);
    println!("SIGTERM: {seen:?}");
    assert_eq!(seen.errors, 0, "{seen:?}");
    assert!(seen.own > 0 && seen.host > 0, "{seen:?}");
}

#[test]
fn a_predecessor_that_serves_still_is_replaced_without_a_gap() {
    // The supervisor alone is killed, as in an upgrade gone wrong: its lxcfs goes on.
    let mut node = Node::start(8, &[]);
    node.read();
    let old = node.lxcfs.lxcfs();
    node.lxcfs.supervisor.kill();
    node.lxcfs.again();
    eventually_true("the predecessor has ended", || {
        !Path::new("/proc").join(old.to_string()).exists()
    });
    node.lxcfs.serves();
    current(&node.readers);
    std::thread::sleep(Duration::from_millis(300));
    let seen = seen(&node.readers);
    println!("replacement: {seen:?}");
    assert_eq!((seen.errors, seen.host), (0, 0), "{seen:?}");
    assert!(seen.own > 0);
}

#[test]
fn a_hung_lxcfs_is_killed_and_meanwhile_the_agent_serves_others() {
    let node = Node::start(4, &["--watchdog", "1500ms"]);
    node.read();
    let hung = node.lxcfs.lxcfs();
    node.lxcfs.signal_lxcfs(Signal::SIGSTOP);
    // An opt-out needs no lxcfs and is not kept waiting by it.
    node.pods.annotate("pod-0", serde_json::json!({"kube-lxcfs.io/inject": "false"}));
    eventually_true("it is out", || views(&node.readers[0].mountinfo()).is_empty());
    eventually_true("another lxcfs runs", || node.lxcfs.lxcfs() != hung);
    node.lxcfs.serves();
    current(&node.readers[1..]);
    std::thread::sleep(Duration::from_millis(200));
    let seen = seen(&node.readers);
    println!("hung: {seen:?}");
    assert!(node.lxcfs.supervisor.log().contains("gives no answer for 1.5s and is killed"));
    assert!(!node.agent.log().contains("panic"), "{}", node.agent.log());
}

#[test]
fn an_lxcfs_without_a_supervisor_is_swept_by_the_agent() {
    let mut lxcfs = Lxcfs::start();
    let (readers, pods) = (readers(3), Pods::start());
    for (n, reader) in readers.iter().enumerate() {
        pods.run(
            &format!("pod-{n}"),
            &reader.id,
            serde_json::json!({"kube-lxcfs.io/inject": "true"}),
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let args = ["--node-name", "n1", "--lxcfs-path", lxcfs.path(), "--pid-from", "proc"];
    let agent = agent(dir.path(), &args, &[("KUBECONFIG", pods.kubeconfig().to_str().unwrap())]);
    current(&readers);
    lxcfs.process.kill();
    for reader in &readers {
        eventually_true("it has its own files back", || views(&reader.mountinfo()).is_empty());
    }
    unmount(&lxcfs.path);
    lxcfs.again();
    current(&readers);
    assert!(agent.log().contains("containers have their own files back"), "{}", agent.log());
}

#[test]
fn a_path_unmounted_or_covered_under_our_feet_is_served_again() {
    let node = Node::start(2, &["--watchdog", "1s"]);
    unmount(&node.lxcfs.path);
    eventually_true("it is mounted again", || node.lxcfs.path.join("proc/uptime").exists());
    current(&node.readers);
    nix::mount::mount(
        Some("none"),
        &node.lxcfs.path,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    eventually_true("it is mounted again", || node.lxcfs.path.join("proc/uptime").exists());
    current(&node.readers);
}

#[test]
fn a_mount_point_that_is_removed_is_made_again() {
    let node = Supervised::start(&[]);
    // While the supervisor stands still, so that its next lxcfs is not mounted there yet.
    node.supervisor.signal(Signal::SIGSTOP);
    node.signal_lxcfs(Signal::SIGKILL);
    unmount(&node.path);
    fs::remove_dir(&node.path).unwrap();
    node.supervisor.signal(Signal::SIGCONT);
    node.serves();
}

#[test]
fn what_came_with_the_pod_is_left_alone_and_kept_current_with_adopt() {
    let (old, new) = (Lxcfs::start(), Lxcfs::start());
    let (reader, pods) = (Reader::start(PAUSE), Pods::start());
    // As a webhook's hostPath volume does it: a bind mount made with the container.
    let target = format!("/proc/{}/ns/mnt", reader.pid());
    let bind = format!("mount --bind {}/proc/meminfo /proc/meminfo", old.path());
    let bound = program("nsenter")
        .args([&format!("--mount={target}"), "sh", "-c", &bind])
        .output()
        .unwrap();
    assert!(bound.status.success(), "{}", stderr(&bound));
    let before = reader.mountinfo();
    pods.run("webhook", &reader.id, serde_json::json!({}));
    let dir = tempfile::tempdir().unwrap();
    let kubeconfig = pods.kubeconfig();
    let start = |more: &[&str]| {
        let args = ["--node-name", "n1", "--lxcfs-path", new.path(), "--pid-from", "proc"];
        agent(dir.path(), &[&args, more].concat(), &[("KUBECONFIG", kubeconfig.to_str().unwrap())])
    };
    let mut alone = start(&[]);
    eventually_true("it has looked", || alone.log().contains("end container"));
    assert_eq!(reader.mountinfo(), before, "left alone");
    alone.terminate();
    let _adopting = start(&["--adopt"]);
    let dev = |table: &str| {
        table
            .lines()
            .find(|l| l.contains(" /proc/meminfo "))
            .map(|l| l.split(' ').nth(2).unwrap().to_owned())
    };
    eventually_true("it is current", || dev(&reader.mountinfo()) != dev(&before));
    drop(old);
    assert_eq!(
        reader.mountinfo().matches(" /proc/meminfo /proc/meminfo ").count(),
        1,
        "nothing is stacked"
    );
    reader.go();
    std::thread::sleep(Duration::from_millis(100));
    let seen = reader.stop();
    assert!(seen.own > 0 && seen.errors == 0, "{seen:?}");
}

/// A small random number generator (xorshift): a seed is all that a failure needs to be told with.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// What can happen to a node, one after the other at random moments, 200 times. It takes up to two
/// minutes, most of them in the supervisor's backoff.
#[test]
fn whatever_dies_in_whatever_order_every_wished_view_is_current_in_the_end_and_no_other_is_left() {
    const ROUNDS: u32 = 200;
    let seed =
        std::env::var("KUBE_LXCFS_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            u64::from(now.subsec_nanos()) | 1
        });
    println!("KUBE_LXCFS_SEED={seed}");
    let mut random = Random(seed);
    let mut node = Node::start(4, &["--watchdog", "600ms"]);
    let own = || mountinfo(std::process::id().cast_signed());
    let host = |path: &str| own().lines().filter(|l| l.contains(path)).count();
    let covered = |node: &Node| {
        own().lines().filter(|l| l.contains(node.lxcfs.path()) && l.contains("tmpfs")).count()
    };
    let mut wished = [true; 4];
    for round in 1..=ROUNDS {
        match random.below(7) {
            0 | 1 => node.lxcfs.signal_lxcfs(Signal::SIGKILL),
            2 => node.lxcfs.signal_lxcfs(Signal::SIGSTOP),
            3 => {
                node.lxcfs.supervisor.signal(Signal::SIGKILL);
                node.lxcfs.again();
            }
            4 => {
                node.agent.kill();
                node.agent = Node::agent(node.dir.path(), &node.pods, &node.lxcfs);
            }
            5 => {
                let pod = usize::try_from(random.below(4)).unwrap();
                wished[pod] = !wished[pod];
                let inject = wished[pod].to_string();
                node.pods.annotate(
                    &format!("pod-{pod}"),
                    serde_json::json!({"kube-lxcfs.io/inject": inject}),
                );
            }
            _ if covered(&node) > 0 || random.below(2) == 0 => unmount(&node.lxcfs.path),
            _ => {
                let flags = nix::mount::MsFlags::empty();
                let _ = nix::mount::mount(
                    Some("none"),
                    &node.lxcfs.path,
                    Some("tmpfs"),
                    flags,
                    None::<&str>,
                );
            }
        }
        std::thread::sleep(Duration::from_millis(random.below(120)));
        if round % 25 == 0 {
            settled(&node, &wished, round, seed);
        }
    }
    let readers: Vec<i32> = node.readers.iter().map(Reader::pid).collect();
    node.lxcfs.supervisor.terminate();
    for pid in readers {
        eventually_true("no view is left", || views(&mountinfo(pid)).is_empty());
    }
    let path = node.lxcfs.path.clone();
    unmount(&path);
    drop(node);
    assert_eq!(host(path.to_str().unwrap()), 0, "the host's own mount table is as before");
}

fn settled(node: &Node, wished: &[bool], round: u32, seed: u64) {
    for (reader, wished) in node.readers.iter().zip(wished) {
        eventually(&format!("round {round} of seed {seed}"), || {
            let Some(serves) = fs::read_to_string("/proc/self/mountinfo")
                .unwrap()
                .lines()
                .rev()
                .find(|l| {
                    l.contains(" - fuse.lxcfs ") && l.split(' ').nth(4) == Some(node.lxcfs.path())
                })
                .map(|l| l.split(' ').nth(2).unwrap().to_owned())
            else {
                return Err("lxcfs is not mounted".into());
            };
            let table = reader.mountinfo();
            let all = views(&table);
            let mut once = all.clone();
            once.dedup();
            let current = table
                .lines()
                .filter(|l| l.contains("noexec,noatime - fuse.lxcfs "))
                .all(|l| l.split(' ').nth(2) == Some(&serves));
            let right = if *wished { all.len() == 9 } else { all.is_empty() };
            if right && current && all == once {
                Ok(())
            } else {
                Err(format!("wished {wished}, serves {serves}: {table}"))
            }
        });
    }
}

/// As a unit's `ExecStartPost=` it runs before lxcfs serves. A node of its own, in a pid namespace:
/// `--all` is all that it sees.
#[test]
fn remount_all_waits_for_an_lxcfs_that_is_starting() {
    let dir = tempfile::tempdir().unwrap();
    let script = r#"
        set -e
        serve() { lxcfs -f -p "$2/pid" "$2" >/dev/null 2>&1 & served=$!; }
        answers() { until [ -e "$1/proc/uptime" ]; do sleep 0.02; done; }
        serve "$@"; answers "$2"
        unshare --mount --propagation private sleep 3600 & target=$!
        until [ "$(readlink /proc/$target/ns/mnt)" != "$(readlink /proc/self/ns/mnt)" ]; do sleep 0.02; done
        "$1" mount --pid $target --lxcfs-path "$2" >/dev/null
        kill -9 $served
        umount -l "$2"
        (sleep 0.7; exec lxcfs -f -p "$2/pid" "$2" >/dev/null 2>&1) &
        "$1" remount --all --lxcfs-path "$2"
        "$1" status --pid-from proc --lxcfs-path "$2"
    "#;
    let mut node = program("unshare");
    node.args([
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]);
    node.args([
        "timeout",
        "-s",
        "KILL",
        "20",
        "sh",
        "-c",
        script,
        "sh",
        env!("CARGO_BIN_EXE_kube-lxcfs"),
    ])
    .arg(dir.path());
    node.env("PATH", std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin");
    let output = node.output().unwrap();
    assert!(output.status.success(), "{} {}", stdout(&output), stderr(&output));
    let told = stdout(&output);
    assert!(
        told.contains(" current ") && !told.contains("dead") && !told.contains("stale"),
        "{told}"
    );
}
