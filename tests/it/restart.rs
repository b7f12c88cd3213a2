//! lxcfs exits, hangs, is restarted and replaced: what readers in containers see, and what is left.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use kube_lxcfs::{
    lxcfs::{Error, Finder, MountTableWatch, SharedLxcfs},
    mount::Workers,
};
use nix::sys::signal::Signal;
use rustix::{
    fs::{AtFlags, StatxFlags},
    io::Errno,
};
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

pub(super) fn removed(readers: &[Reader]) {
    readers.iter().for_each(|reader| has_views("the reader", reader.pid(), 0));
}

/// A node whose pods are the readers: an API server, an agent, a supervised lxcfs.
pub(super) struct Node {
    pub(super) readers: Vec<Reader>,
    pub(super) agent: Running,
    pub(super) lxcfs: Supervised,
    pub(super) pods: Pods,
    pub(super) dir: tempfile::TempDir,
}

impl Node {
    pub(super) fn start(n: usize, lxcfs_args: &[&str]) -> Node {
        Node::with(Supervised::start(lxcfs_args), n)
    }

    fn with(lxcfs: Supervised, n: usize) -> Node {
        let (readers, pods) = (readers(n), Pods::start());
        for (n, reader) in readers.iter().enumerate() {
            pods.run(&format!("pod-{n}"), &reader.id, json!({"kube-lxcfs.io/inject": "true"}));
        }
        let dir = tempfile::tempdir().unwrap();
        let agent = Node::agent(dir.path(), &pods, lxcfs.path());
        let node = Node { readers, agent, lxcfs, pods, dir };
        injected(&node.readers);
        node
    }

    pub(super) fn agent(dir: &Path, pods: &Pods, lxcfs_path: &str) -> Running {
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
pub(super) fn serving_dev(path: &str) -> Option<String> {
    let table = own_mountinfo();
    let mut at_path = table.lines().rev().filter(|l| l.split(' ').nth(4) == Some(path));
    let top = at_path.next().filter(|l| l.contains(" - fuse.lxcfs "))?;
    top.split(' ').nth(2).map(str::to_owned)
}

/// The devices of the managed view files in a mount table.
pub(super) fn managed_devs(table: &str) -> Vec<String> {
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
        assert!(seen.own > 0, "{seen:?}");
        assert_eq!(node.agent.logged(&[("lxcfs", "exited"), ("supervised", "true")]), 1);
        // On a busy machine the next lxcfs may not serve in time.
        if node.lxcfs.supervisor.logged(&[("in_time", "true")]) > 0 {
            // A reader that has the file open gets an error, any other waits.
            assert!(seen.errors <= node.readers.len() as u64, "{seen:?}");
        }
        // No reader keeps an error.
        node.read();
        std::thread::sleep(Duration::from_millis(300));
        let seen = self::seen(&node.readers);
        assert!(seen.own > 0 && (seen.errors, seen.host) == (0, 0), "{seen:?}");
    });
}

/// A program that the supervisor runs as lxcfs: see `busy` in fuse_fake.rs.
fn busy_lxcfs(dir: &Path) -> String {
    let (script, fake) = (dir.join("lxcfs"), compiled("fuse_fake"));
    let text = format!(
        "#!/bin/sh\ncase $1 in --*version|--help) exec lxcfs \"$1\";; esac\n\
         for path; do :; done\nexec {} busy /dev/fuse \"$path\" true\n",
        fake.display()
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
    script.to_str().unwrap().to_owned()
}

#[test]
fn busy_lxcfs_is_killed_late() {
    isolated(|| {
        let dir = tempfile::tempdir().unwrap();
        let args = ["--lxcfs-bin", &busy_lxcfs(dir.path()), "--watchdog", "1s"];
        let lxcfs = Supervised::start(&args);
        let late = [("message", "lxcfs responds late, but works")];
        let hung = [("exit_reason", "hung")];
        // Three reads that are slow, and one that never returns.
        eventually_true("it is killed", || lxcfs.supervisor.logged(&hung) == 1);
        let warned = lxcfs.supervisor.logged(&late);
        assert!(warned >= 3 + 3, "{warned} in {}", lxcfs.supervisor.log());
    });
}

/// Whether a thread of this process waits for a response of a FUSE server.
fn waits_for_lxcfs(pid: i32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let mut calls = tasks.map(|task| fs::read_to_string(task.path().join("wchan")));
    calls.any(|call| call.is_ok_and(|call| call == "request_wait_answer"))
}

/// A thread whose request lxcfs has read exits only when the connection is aborted: the supervisor
/// must not be what keeps it.
#[test]
fn supervisor_killed_with_its_lxcfs_exits() {
    isolated(|| {
        let dir = tempfile::tempdir().unwrap();
        let args = ["--lxcfs-bin", &busy_lxcfs(dir.path()), "--watchdog", "5s"];
        let mut lxcfs = Supervised::start(&args);
        let pid = lxcfs.supervisor.pid();
        eventually_true("a probe waits", || waits_for_lxcfs(pid));
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let fake: i32 = children.trim().parse().unwrap();
        send(pid, Signal::SIGKILL);
        send(fake, Signal::SIGKILL);
        eventually_true("it exits", || lxcfs.supervisor.child.try_wait().unwrap().is_some());
    });
}

/// To register a descriptor with epoll(7) takes note of a change, and does not report it.
#[test]
fn mount_table_changes_in_a_row_are_noticed() {
    isolated(|| {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().to_str().unwrap();
        let run = |name: &str, args: &[&str]| {
            let done = program(name).args(args).output().unwrap();
            assert!(done.status.success(), "{args:?}: {}", stderr(&done));
        };
        crate::hostile_mounts::runtime().block_on(async {
            let mut watch = MountTableWatch::new().unwrap();
            for change in 0..6 {
                // Each second one soon after the first, which was noticed.
                if change % 2 == 0 {
                    run("mount", &["-t", "tmpfs", "none", at]);
                } else {
                    run("umount", &[at]);
                }
                let noticed = tokio::time::timeout(DEADLINE, watch.changed()).await;
                noticed.unwrap_or_else(|_| panic!("change {change} is not noticed"));
            }
        });
    });
}

/// Readers wait for each of them.
#[test]
fn threads_of_the_supervisor_and_lxcfs_have_one_priority() {
    isolated(|| {
        let lxcfs = Supervised::start(&[]);
        let nice_values = |pid| {
            let tasks = procfs::process::Process::new(pid).unwrap().tasks().unwrap();
            tasks.map(|task| task.unwrap().stat().unwrap().nice).collect::<Vec<i64>>()
        };
        let supervisor = nice_values(lxcfs.supervisor.pid());
        assert!(supervisor.len() > 8, "{supervisor:?}");
        let all = [supervisor, nice_values(lxcfs.lxcfs())].concat();
        assert!(all.iter().all(|nice| *nice == all[0]), "{all:?}");
    });
}

/// The probe waits with the readers.
#[test]
fn pending_probe_does_not_delay_the_next_lxcfs() {
    isolated(|| {
        let node = Node::start(1, &["--watchdog", "60s"]);
        let (killed, supervisor) = (node.lxcfs.lxcfs(), &node.lxcfs.supervisor);
        node.lxcfs.signal_lxcfs(Signal::SIGSTOP);
        eventually_true("a probe waits", || waits_for_lxcfs(supervisor.pid()));
        node.lxcfs.signal_lxcfs(Signal::SIGKILL);
        node.replaced(killed);
        let remounted = [("message", "remounted views of an exited lxcfs")];
        eventually_true("it remounts", || supervisor.logged(&remounted) == 1);
        assert_eq!(supervisor.logged(&[("message", "removed views of an exited lxcfs")]), 0);
    });
}

#[test]
fn terminated_lxcfs_is_replaced_while_readers_wait() {
    isolated(|| {
        let node = Node::start(4, &[]);
        let terminated = node.lxcfs.lxcfs();
        node.read();
        // It unmounts itself before it exits.
        node.lxcfs.signal_lxcfs(Signal::SIGTERM);
        node.replaced(terminated);
        let seen = seen(&node.readers);
        println!("SIGTERM: {seen:?}");
        let supervisor = &node.lxcfs.supervisor;
        // Its views are remounted, and not swept.
        let remounted = [("message", "remounted views of an exited lxcfs")];
        assert_eq!(supervisor.logged(&remounted), 1, "{}", supervisor.log());
        // On a busy machine the next lxcfs may not serve in time.
        if supervisor.logged(&[("in_time", "true")]) > 0 {
            assert!(seen.own > 0 && seen.errors <= node.readers.len() as u64, "{seen:?}");
        }
    });
}

#[test]
fn readers_wait_while_an_exited_lxcfs_is_swept() {
    isolated(|| {
        let node = Node::start(1, &[]);
        // The sweep waits for the lock, half a second at most.
        let namespace = format!("/proc/{}/ns/mnt", node.readers[0].pid());
        let namespace = fs::File::open(namespace).unwrap();
        let lock = nix::fcntl::Flock::lock(namespace, nix::fcntl::FlockArg::LockExclusive);
        let _lock = lock.unwrap();
        node.read();
        std::thread::sleep(Duration::from_millis(200));
        let view = format!("/proc/{}/root/proc/meminfo", node.readers[0].pid());
        let open = fs::File::open(&view).unwrap();
        let stat = move || {
            std::thread::sleep(Duration::from_millis(1));
            let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
            rustix::fs::statx(&open, "", flags, StatxFlags::BASIC_STATS)
        };
        let stat_until_error =
            std::thread::spawn(|| std::iter::repeat_with(stat).find_map(Result::err));
        let killed = node.lxcfs.lxcfs();
        node.lxcfs.signal_lxcfs(Signal::SIGKILL);
        let proc = Path::new("/proc").join(killed.to_string());
        eventually_true("lxcfs has exited", || !proc.exists());
        // Opened now, while the view is dead, the file is another one at the end.
        let text = fs::read_to_string(view).unwrap();
        assert!(text.starts_with("MemTotal:"), "{text}");
        let supervisor = &node.lxcfs.supervisor;
        eventually_true("the reader has waited", || {
            let waited = |entry: &serde_json::Value| entry["requests"].as_u64();
            supervisor.entries().iter().find_map(waited).is_some_and(|requests| requests > 0)
        });
        // fstat(2) of the file that was open has not waited for the recovery: the first error is
        // that of the end of the connection.
        let error = stat_until_error.join().unwrap().unwrap();
        assert_ne!(error, Errno::STALE);
        node.replaced(killed);
        let seen = seen(&node.readers);
        println!("locked: {seen:?}");
        // A reader that had opened the file gets an error.
        assert!(seen.own > 0 && seen.errors <= 1, "{seen:?}");
    });
}

#[test]
fn supervisor_alone_remounts_the_views() {
    isolated(|| {
        let (lxcfs, target) = (Supervised::start(&[]), Bare::start());
        let pid = target.pid.to_string();
        // On a busy machine the next lxcfs may not serve in time, and the views are swept.
        let remounted = (1..=10).any(|attempt| {
            succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
            let killed = lxcfs.lxcfs();
            lxcfs.signal_lxcfs(Signal::SIGKILL);
            eventually_true("another lxcfs runs", || lxcfs.lxcfs() != killed);
            let over = |entry: &serde_json::Value| entry["in_time"].is_boolean();
            eventually_true("the recovery is over", || {
                lxcfs.supervisor.entries().into_iter().filter(over).count() == attempt
            });
            lxcfs.wait_until_serving();
            let devs = managed_devs(&target.mountinfo());
            devs.len() == ALWAYS.len()
                && devs.into_iter().all(|d| Some(d) == serving_dev(lxcfs.path()))
        });
        assert!(remounted, "{}", lxcfs.supervisor.log());
    });
}

#[test]
fn views_are_removed_if_lxcfs_does_not_start_again() {
    isolated(|| {
        let node = Node::with(Supervised::start_mortal(), 4);
        node.read();
        node.lxcfs.kill_for_good();
        removed(&node.readers);
        std::thread::sleep(Duration::from_millis(300));
        let seen = seen(&node.readers);
        println!("not started again: {seen:?}");
        assert!(seen.own > 0 && seen.host > 0, "{seen:?}");
        node.lxcfs.revive();
        injected(&node.readers);
    });
}

#[test]
fn version_of_a_supervised_lxcfs_is_shown() {
    isolated(|| {
        let node = Node::start(1, &[]);
        let output = program("lxcfs").arg("--version").output().unwrap();
        let version = (stdout(&output) + &stderr(&output)).trim().trim_matches('"').to_owned();
        let source = format!("noexec,noatime - fuse.lxcfs lxcfs-{version} ");
        let table = node.readers[0].mountinfo();
        assert_eq!(table.matches(&source).count(), ALWAYS.len(), "{table}");
        let is_v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let cgroup = if is_v2 { "v2" } else { "v1" };
        let info = format!("lxcfs_info{{version=\"{version}\",cgroup=\"{cgroup}\"}}");
        assert!((metric(&node.agent, &info) - 1.0).abs() < f64::EPSILON);
        let check = run(&["check", "--lxcfs-path", node.lxcfs.path()]);
        let shown = format!("version {version} serves");
        assert!(stdout(&check).contains(&shown), "{}", stdout(&check));
        let status = run(&["status", "--pid-from", "proc", "--lxcfs-path", node.lxcfs.path()]);
        assert!(stderr(&status).contains(&version), "{}", stderr(&status));
        let supervisor = &node.lxcfs.supervisor;
        assert_eq!(supervisor.logged(&[("lxcfs_version", &version)]), 1, "{}", supervisor.log());
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
        // It got no extension, which is for one that works.
        let log = node.lxcfs.supervisor.entries();
        let before = log.iter().take_while(|entry| entry["exit_reason"] != "hung");
        let late = before.filter(|entry| entry["message"] == "lxcfs responds late, but works");
        assert!(late.count() < 3 && node.lxcfs.supervisor.logged(&[("exit_reason", "hung")]) > 0);
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

/// How many files of the lxcfs at a path this process has open.
fn open_files(path: &Path) -> usize {
    let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let links = links.filter_map(|fd| fs::read_link(fd.path()).ok());
    links.filter(|link| link.starts_with(path)).count()
}

#[test]
fn files_are_held_of_a_supervised_lxcfs_only() {
    isolated(|| {
        let (host_managed, supervised) =
            (Lxcfs::start(), Supervised::start(&["--watchdog", "600s"]));
        crate::hostile_mounts::runtime().block_on(async {
            let workers = Workers::start(1, Duration::from_secs(1)).unwrap();
            let shared = |path: &Path| SharedLxcfs::new(Finder::new(path), workers.clone());
            let lxcfs = shared(&host_managed.path);
            assert_eq!(lxcfs.acquire().await.lxcfs.unwrap().files.len(), ALWAYS.len());
            assert_eq!(open_files(&host_managed.path), 0, "umount would fail");
            let lxcfs = shared(&supervised.path);
            // Longer than a response counts.
            let later = || std::thread::sleep(Duration::from_millis(2200));
            for _ in 0..2 {
                let acquired = lxcfs.acquire().await;
                assert!(acquired.searched, "it may hang by now");
                assert_eq!(acquired.lxcfs.unwrap().files.len(), ALWAYS.len());
                assert_eq!(open_files(&supervised.path), ALWAYS.len());
                again_without_a_search(&lxcfs).await;
                later();
            }
            supervised.signal_lxcfs(Signal::SIGSTOP);
            let hung = lxcfs.acquire().await.lxcfs.unwrap_err();
            assert!(matches!(*hung, Error::Hung { .. }), "{hung}");
            supervised.signal_lxcfs(Signal::SIGCONT);
            let killed = supervised.lxcfs();
            eventually_true("it responds", || workers.hung() == 0);
            assert!(lxcfs.acquire().await.lxcfs.is_ok());
            supervised.signal_lxcfs(Signal::SIGKILL);
            eventually_true("another lxcfs runs", || supervised.lxcfs() != killed);
            supervised.wait_until_serving();
            let dev = lxcfs.acquire().await.lxcfs.unwrap().dev;
            assert_eq!(Some(dev.to_string()), serving_dev(supervised.path()));
            assert!(lxcfs.invalidate().is_none());
            assert_eq!(open_files(&supervised.path), 0);
        });
    });
}

/// On a busy machine the last search may be too long ago.
async fn again_without_a_search(lxcfs: &SharedLxcfs) {
    for _ in 0..100 {
        drop(lxcfs.acquire().await.lxcfs.unwrap());
        if !lxcfs.acquire().await.searched {
            return;
        }
    }
    panic!("every call searches");
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
