//! Mounts of one container that are detached together, with a scratch mount.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use kube_lxcfs::{
    model::view::FileSet,
    mount::{self, LxcfsFiles, Task, Workers},
    plan::DesiredView,
    sys::process::Process,
};
use nix::{sched::CloneFlags, sys::signal::Signal};
use rustix::fs::{Mode, OFlags, openat};

use crate::{harness::*, restart::managed_devs};

const POINT: &str = "/proc/tty/ldisc";
const SOURCE: &str = "kube-lxcfs-scratch";
/// The attempts without a pause to be in the moment in which a scratch mount exists.
const ROUNDS: usize = 50;

/// Watches mount tables until it is dropped.
struct Watch<'a> {
    stop: &'a AtomicBool,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

/// Runs `work`, which gets whether a scratch mount was in one of these tables so far.
fn watching(tables: impl Fn() -> String + Sync, work: impl FnOnce(&dyn Fn() -> bool)) {
    let (seen, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                seen.fetch_or(tables().contains(SOURCE), Ordering::SeqCst);
            }
        });
        let _watch = Watch { stop: &stop };
        work(&|| seen.load(Ordering::SeqCst));
    });
}

/// A thread that detaches together, and two lxcfs.
struct Driver {
    runtime: tokio::runtime::Runtime,
    workers: Workers,
    lxcfs: [Lxcfs; 2],
}

impl Driver {
    fn start() -> Driver {
        mount::prepare_scratch().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let workers = Workers::start(1, Duration::from_secs(60)).unwrap();
        Driver { runtime, workers, lxcfs: [Lxcfs::start(), Lxcfs::start()] }
    }

    fn files(&self, lxcfs: usize) -> Arc<LxcfsFiles> {
        let path = Path::new(self.lxcfs[lxcfs].path());
        self.runtime.block_on(kube_lxcfs::lxcfs::find(&self.workers, path)).unwrap()
    }

    /// Performs a task. Returns the number of steps.
    fn run(&self, target: &Bare, task: Task) -> usize {
        let process = Arc::new(Process::open(i64::from(target.pid)).unwrap());
        let done = self.runtime.block_on(mount::reconcile(&self.workers, process, task));
        done.unwrap().unwrap().done.len()
    }

    fn inject(&self, target: &Bare) -> usize {
        self.run(target, Task::reconcile(DesiredView::Exactly(FileSet::ALL), Some(self.files(0))))
    }

    fn remount(&self, target: &Bare) -> usize {
        self.run(target, Task::reconcile(DesiredView::REMOUNT_ONLY, Some(self.files(1))))
    }

    fn remove(&self, target: &Bare) -> usize {
        self.run(target, Task::reconcile(DesiredView::Absent, None))
    }
}

/// Runs a shell script in the container's mount namespace.
fn inside(target: &Bare, script: &str) {
    let pid = target.pid.to_string();
    let mut nsenter = program("nsenter");
    nsenter.args(["--target", &pid, "--mount", "--pid", "sh", "-ec", script]);
    let done = nsenter.output().unwrap();
    assert!(done.status.success(), "{script}: {}", stderr(&done));
}

/// What a kube-lxcfs leaves that is killed between the moves and the last detach.
fn leave_scratch(target: &Bare) {
    inside(
        target,
        "mount -t tmpfs kube-lxcfs-scratch /proc/tty/ldisc
         touch /proc/tty/ldisc/f0
         mount --move /proc/meminfo /proc/tty/ldisc/f0",
    );
    assert!(target.mountinfo().contains(SOURCE));
}

#[test]
fn detached_together_nothing_is_left() {
    isolated(|| {
        let (driver, target) = (Driver::start(), Bare::start());
        let before = target.mountinfo();
        // A reader of the table that sees the scratch mount proves that it was used.
        watching(
            || target.mountinfo(),
            |seen| {
                let round = || {
                    assert_eq!(driver.inject(&target), ALWAYS.len());
                    assert_eq!(driver.remount(&target), ALWAYS.len());
                    let table = target.mountinfo();
                    assert_eq!(views(&table).len(), ALWAYS.len(), "nothing is stacked");
                    let serving = driver.files(1).dev.to_string();
                    assert!(managed_devs(&table).iter().all(|dev| *dev == serving), "{table}");
                    assert!(!table.contains(SOURCE), "{table}");
                    assert!(target.read("/proc/meminfo").contains("MemTotal"));
                    assert_eq!(driver.remove(&target), ALWAYS.len());
                    assert_eq!(target.mountinfo(), before);
                    seen()
                };
                eventually_true("a reader of the table sees the scratch mount", || {
                    (0..ROUNDS).any(|_| round())
                });
            },
        );
    });
}

/// A process of the container takes the moment, and holds the scratch mount.
#[test]
fn scratch_mount_cannot_be_written() {
    isolated(|| {
        let (driver, target) = (Driver::start(), Bare::start());
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let holder = scope.spawn(|| {
                let namespace = fs::File::open(format!("/proc/{}/ns/mnt", target.pid)).unwrap();
                nix::sched::unshare(CloneFlags::CLONE_FS).unwrap();
                nix::sched::setns(namespace, CloneFlags::CLONE_NEWNS).unwrap();
                while !stop.load(Ordering::SeqCst) {
                    let root = fs::File::open(POINT).unwrap();
                    if openat(&root, "f0", OFlags::PATH, Mode::empty()).is_ok() {
                        let flags = OFlags::CREATE | OFlags::WRONLY;
                        return openat(&root, "file", flags, Mode::RWXU).err();
                    }
                }
                None
            });
            let _watch = Watch { stop: &stop };
            let round = || {
                driver.inject(&target);
                driver.remove(&target);
                holder.is_finished()
            };
            eventually_true("the scratch mount is held", || (0..ROUNDS).any(|_| round()));
            let error = holder.join().unwrap().unwrap();
            assert_eq!(error, rustix::io::Errno::ROFS);
        });
    });
}

#[test]
fn left_scratch_mount_is_removed_by_the_next_pass() {
    isolated(|| {
        let (driver, target) = (Driver::start(), Bare::start());
        let pid = target.pid.to_string();
        let before = target.mountinfo();
        driver.inject(&target);
        let with_views = views(&target.mountinfo());
        leave_scratch(&target);
        inside(&target, "mount -t tmpfs kube-lxcfs-scratch /proc/tty/ldisc");
        assert_eq!(target.mountinfo().matches(SOURCE).count(), 2);
        assert_eq!(driver.inject(&target), 1, "the file that was moved");
        assert_eq!(views(&target.mountinfo()), with_views);
        assert!(!target.mountinfo().contains(SOURCE));

        // Without a view, too: status lists no such container, and `--all` reaches it.
        assert_eq!(driver.remove(&target), ALWAYS.len());
        driver.inject(&target);
        leave_scratch(&target);
        for file in with_views.iter().filter(|file| *file != "/proc/meminfo") {
            inside(&target, &format!("umount {file}"));
        }
        assert_eq!(views(&target.mountinfo()).len(), 1, "that of the scratch mount");
        let status = ["status", "--pid-from", "proc", "--lxcfs-path", driver.lxcfs[0].path()];
        assert!(!succeeds(&status).contains(&pid));
        assert!(succeeds(&["umount", "--all"]).contains("nothing to do"));
        assert_eq!(target.mountinfo(), before);
        assert_eq!(succeeds(&["umount", "--all"]).trim(), "");
    });
}

#[test]
fn other_mounts_at_the_scratch_place_stay() {
    isolated(|| {
        let (driver, target) = (Driver::start(), Bare::start());
        for script in [
            "mount -t tmpfs other /proc/tty/ldisc",
            "mount -t tmpfs other /proc/tty",
            "mount -t tmpfs kube-lxcfs-scratch /proc/tty && mkdir /proc/tty/ldisc",
        ] {
            inside(&target, script);
            let before = target.mountinfo();
            assert_eq!(driver.inject(&target), ALWAYS.len(), "{script}");
            assert_eq!(driver.remount(&target), ALWAYS.len(), "{script}");
            assert_eq!(driver.remove(&target), ALWAYS.len(), "{script}");
            assert_eq!(target.mountinfo(), before, "{script}");
        }
    });
}

/// The copies in a peer namespace lose their views with the container's, and get no scratch mount.
#[test]
fn views_of_a_shared_proc_are_detached_one_by_one() {
    isolated(|| {
        let (driver, target) = (Driver::start(), Bare::start());
        inside(&target, "mount --make-shared /proc; mount --make-shared /sys");
        let nested = program("nsenter")
            .args(["--target", &target.pid.to_string(), "--mount", "unshare", "--mount"])
            .args(["--propagation", "unchanged", "sleep", "3600"])
            .spawn()
            .unwrap();
        let nested = Nested(nested);
        let in_nested = || fs::read_to_string(format!("/proc/{}/mountinfo", nested.0.id()));
        let others = [target.pid.unsigned_abs(), std::process::id()].map(namespace_of);
        let is_own = || !others.contains(&namespace_of(nested.0.id()));
        eventually_true("the nested namespace exists", is_own);
        let (before, nested_before) = (target.mountinfo(), in_nested().unwrap());
        assert_eq!(driver.inject(&target), ALWAYS.len());
        assert_eq!(views(&in_nested().unwrap()).len(), ALWAYS.len());
        // A mount that propagates cannot be moved.
        watching(
            || target.mountinfo() + &in_nested().unwrap(),
            |seen| {
                for _ in 0..20 {
                    assert_eq!(driver.remove(&target), ALWAYS.len());
                    assert_eq!(target.mountinfo(), before);
                    assert_eq!(in_nested().unwrap(), nested_before);
                    assert_eq!(driver.inject(&target), ALWAYS.len());
                }
                assert!(!seen());
            },
        );
        assert_eq!(driver.remove(&target), ALWAYS.len());
        assert_eq!(target.mountinfo(), before);
    });
}

struct Nested(std::process::Child);

impl Drop for Nested {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn namespace_of(pid: u32) -> Option<std::path::PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()
}

/// Neither an lxcfs that hangs nor one that has exited gets a request.
#[test]
fn views_of_hung_and_exited_lxcfs_are_detached_together() {
    isolated(|| {
        let (mut driver, target) = (Driver::start(), Bare::start());
        let before = target.mountinfo();
        driver.inject(&target);
        driver.lxcfs[0].process.signal(Signal::SIGSTOP);
        assert_eq!(driver.remove(&target), ALWAYS.len());
        driver.lxcfs[0].process.signal(Signal::SIGCONT);
        assert_eq!(target.mountinfo(), before);

        driver.inject(&target);
        driver.lxcfs[0].process.kill();
        assert_eq!(driver.remount(&target), ALWAYS.len());
        assert!(target.read("/proc/meminfo").contains("MemTotal"));
        let dev = driver.files(1).dev;
        driver.lxcfs[1].process.kill();
        assert_eq!(driver.run(&target, Task::Sweep(Arc::new([dev].into()))), ALWAYS.len());
        assert_eq!(target.mountinfo(), before);
    });
}
