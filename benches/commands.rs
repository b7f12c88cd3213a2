//! Whole commands from outside, over every container of a node: `remount --all`, `umount --all` and
//! both with nothing to do. In the same run, on the same containers: a loop of nsenter(1) and
//! mount(8) as scripts do it, and the bare system calls, by a program of their own.
//!
//!     cargo bench --bench commands             100 containers
//!     cargo bench --bench commands -- 1000     more
//!
//! It runs in a pid and a mount namespace of its own: `--all` reaches only its own containers.
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
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use harness::*;
use kube_lxcfs::sys::{self, Ownership, process::Process};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags},
    thread::{LinkNameSpaceType, ThreadNameSpaceType},
};

/// Set in the namespaces of the benchmark: the name of its cgroups.
const TOKEN: &str = "KUBE_LXCFS_TEST_TOKEN";
const CONTAINERS: usize = 100;
const ROUNDS: usize = 15;

/// Of the scripts, which take seconds.
fn script_rounds(containers: usize) -> usize {
    if containers > CONTAINERS { 1 } else { 3 }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some((_, [what, lxcfs, pids @ ..])) =
        args.split_first().filter(|(first, _)| *first == "bare")
    {
        return bare::run(what, Path::new(lxcfs), pids);
    }
    if std::env::var_os(TOKEN).is_some() {
        let containers = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(CONTAINERS);
        return measure(containers);
    }
    let token = format!("kl{}", std::process::id());
    let status = program("unshare")
        .args(OWN_NAMESPACES)
        .arg("--")
        .arg(std::env::current_exe().unwrap())
        .args(args)
        .env(TOKEN, &token)
        .status()
        .unwrap();
    remove_cgroup(&format!("/{token}"));
    assert!(status.success(), "{status}");
}

/// The bare calls: a program that trusts the containers, with one thread.
mod bare {
    use super::*;

    pub(super) fn run(what: &str, lxcfs: &Path, pids: &[String]) {
        let home = fs::File::open("/proc/self/ns/mnt").unwrap();
        let files: Vec<OwnedFd> = ALWAYS.iter().map(|file| open(&join(lxcfs, file))).collect();
        for pid in pids {
            let process = Process::open(pid.parse().unwrap()).unwrap();
            let clones: Vec<OwnedFd> =
                if what == "umount" { Vec::new() } else { files.iter().map(clone).collect() };
            let mount = ThreadNameSpaceType::MOUNT;
            rustix::thread::move_into_thread_name_spaces(process.as_fd(), mount).unwrap();
            for (n, file) in ALWAYS.iter().enumerate() {
                if let Some(clone) = clones.get(n) {
                    put(clone, file, what == "remount");
                }
                if what != "mount" {
                    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
                    rustix::mount::unmount(*file, flags).unwrap();
                }
            }
            let mount = Some(LinkNameSpaceType::Mount);
            rustix::thread::move_into_link_name_space(home.as_fd(), mount).unwrap();
        }
    }

    fn open(path: &str) -> OwnedFd {
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    fn clone(file: &OwnedFd) -> OwnedFd {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let clone = rustix::mount::open_tree(file, "", flags).unwrap();
        sys::set_view_attrs(&clone, Ownership::Managed).unwrap();
        clone
    }

    fn put(clone: &OwnedFd, file: &str, beneath: bool) {
        let mut flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        flags.set(MoveMountFlags::MOVE_MOUNT_BENEATH, beneath);
        rustix::mount::move_mount(clone, "", open(file), "", flags).unwrap();
    }
}

/// A file of an lxcfs.
fn join(lxcfs: &Path, file: &str) -> String {
    format!("{}{file}", lxcfs.display())
}

fn bare_command(what: &str, lxcfs: &Path, pids: &[String]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["bare", what]).arg(lxcfs).args(pids);
    command
}

/// One `nsenter … COMMAND` for each file of each container.
fn script(pids: &[String], command: impl Fn(&str) -> String) -> Command {
    let nsenter = |file: &&str| format!("nsenter --target $pid {}", command(file));
    let lines: Vec<String> = ALWAYS.iter().map(nsenter).collect();
    let mut shell = program("sh");
    let script = format!("set -e; for pid; do {}; done", lines.join("; "));
    shell.args(["-c", &script, "sh"]).args(pids);
    shell
}

/// Runs a command to its end: the time it took, and what it printed.
fn time(mut command: Command) -> (Duration, String) {
    let started = Instant::now();
    let output = command.stdin(Stdio::null()).output().unwrap();
    let took = started.elapsed();
    assert!(output.status.success(), "{command:?}: {}", stderr(&output));
    (took, stdout(&output))
}

/// A container for each number, in a cgroup that is named as a runtime names a container's.
fn containers(count: usize) -> Vec<Bare> {
    let start = |number: usize| {
        let bare = Bare::start();
        let dirs = cgroup_dirs(&format!("{}/{number:064x}", test_cgroup()));
        // One hierarchy is enough: any but cpuset takes processes at once.
        let dir = dirs.iter().find(|dir| dir.to_string_lossy().contains("/pids/"));
        let dir = dir.unwrap_or(&dirs[0]);
        fs::create_dir_all(dir).unwrap();
        for pid in [bare.pid, bare.unshare.pid()] {
            fs::write(dir.join("cgroup.procs"), pid.to_string()).unwrap();
        }
        bare
    };
    let numbers: Vec<usize> = (1..=count).collect();
    std::thread::scope(|s| {
        let parts = numbers.chunks(count.div_ceil(16));
        let started: Vec<_> = parts
            .map(|part| s.spawn(move || part.iter().map(|n| start(*n)).collect::<Vec<_>>()))
            .collect();
        started.into_iter().flat_map(|part| part.join().unwrap()).collect()
    })
}

/// What is measured of one operation.
#[derive(Default)]
struct Times {
    ours: Vec<Duration>,
    bare: Vec<Duration>,
    scripts: Vec<Duration>,
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn verdict(holds: bool) -> &'static str {
    if holds { "ok" } else { "missed" }
}

impl Times {
    fn report(mut self, what: &str, goal: Duration) {
        let ours = median(&mut self.ours);
        let (least, most) = (self.ours[0], *self.ours.last().unwrap());
        print!(
            "{what:14} median {ours:>8.1?} ({least:.1?} to {most:.1?}; goal {goal:?}: {})",
            verdict(ours <= goal)
        );
        let ratio = |a: Duration, b: Duration| a.as_secs_f64() / b.as_secs_f64();
        if !self.bare.is_empty() {
            let bare = median(&mut self.bare);
            print!("; bare calls {bare:.1?}, {:.2} times that", ratio(ours, bare));
        }
        if !self.scripts.is_empty() {
            let scripts = median(&mut self.scripts);
            let faster = ratio(scripts, ours);
            print!(
                "; scripts {scripts:.1?}, {faster:.0} times faster (goal 40: {})",
                verdict(faster >= 40.0)
            );
        }
        println!();
    }
}

fn measure(count: usize) {
    let lxcfs = [Lxcfs::start(), Lxcfs::start()];
    let containers = containers(count);
    let pids: Vec<String> = containers.iter().map(|bare| bare.pid.to_string()).collect();
    println!("{count} containers, {} view files in each, {ROUNDS} rounds", ALWAYS.len());
    let ours = |args: &[&str], printed: &str, lines: usize| {
        let mut command = kube_lxcfs();
        command.args(args);
        let (took, output) = time(command);
        assert_eq!(output.matches(printed).count(), lines, "{args:?}: {output}");
        took
    };
    let mut remount = Times::default();
    let mut umount = Times::default();
    let mut remount_nothing = Times::default();
    let mut umount_nothing = Times::default();
    for round in 0..ROUNDS {
        let [old, new] = [&lxcfs[round % 2], &lxcfs[(round + 1) % 2]];
        let remount_all = ["remount", "--all", "--lxcfs-path", new.path()];
        time(bare_command("mount", &old.path, &pids));
        remount.ours.push(ours(&remount_all, ": remounted ", count));
        remount_nothing.ours.push(ours(&remount_all, ": nothing to do", count));
        remount.bare.push(time(bare_command("remount", &old.path, &pids)).0);
        umount.ours.push(ours(&["umount", "--all"], ": removed ", count));
        umount_nothing.ours.push(ours(&["umount", "--all"], "", 1));
        time(bare_command("mount", &old.path, &pids));
        umount.bare.push(time(bare_command("umount", &old.path, &pids)).0);
        if round < script_rounds(count) {
            let mount =
                |file: &str| format!("--mount mount --bind {} {file}", join(&new.path, file));
            remount.scripts.push(time(script(&pids, mount)).0);
            // umount(8) reads the mount table in the container's /proc.
            let umount_file = |file: &str| format!("--mount --pid umount {file}");
            umount.scripts.push(time(script(&pids, umount_file)).0);
        }
    }
    let scaled = |goal: u64, of_1000: u64| {
        let goal = if count > CONTAINERS { of_1000 } else { goal };
        Duration::from_millis(goal)
    };
    remount.report("remount --all", scaled(60, 500));
    umount.report("umount --all", scaled(60, 500));
    remount_nothing.report("remount again", scaled(20, 200));
    umount_nothing.report("umount again", scaled(20, 200));
}
