//! Containers that work against the driver by what they do with their own mounts.

use std::{
    fs, io,
    path::Path,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use futures::future::{Either, select};

use kube_lxcfs::{
    model::view::{FileSet, ViewFile},
    mount::{self, IfLocked, LxcfsFiles, Outcome, TableLimit, Task, Workers},
    plan::DesiredView,
    sys::process::Process,
};
use nix::{
    mount::{MntFlags, MsFlags},
    sched::CloneFlags,
};

use crate::harness::*;

/// A mount namespace that shares the pid namespace of the test, so that its processes can make user
/// namespaces.
fn bare() -> Bare {
    Bare::with(&["--mount", "--propagation", "private", "--fork", "--kill-child"])
}

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn files(files: impl IntoIterator<Item = ViewFile>) -> DesiredView {
    DesiredView::Exactly(FileSet::from_iter(files))
}

async fn reconcile(
    workers: &Workers,
    pid: i32,
    desired: DesiredView,
    lxcfs: Option<&Arc<LxcfsFiles>>,
) -> Result<Outcome, mount::Error> {
    let process = Arc::new(Process::open(i64::from(pid)).unwrap());
    mount::reconcile(workers, process, Task::reconcile(desired, lxcfs.cloned())).await.unwrap()
}

fn inside(bare: &Bare, args: &[&str]) {
    let pid = bare.pid.to_string();
    let done = program("nsenter").args(["--target", &pid, "--mount"]).args(args).output().unwrap();
    assert!(done.status.success(), "{args:?}: {}", stderr(&done));
}

/// A container with a `Bidirectional` volume of the host's `/proc`, which it binds on its own
/// `/proc` and unmounts again, all the time.
#[test]
fn flipped_proc_puts_no_view_on_the_host() {
    const TRIES: u32 = 3000;
    isolated(|| {
        let lxcfs = Lxcfs::start();
        let change = |point: &Path, flags: MsFlags| {
            nix::mount::mount(None::<&str>, point, None::<&str>, flags, None::<&str>).unwrap();
        };
        change(Path::new("/proc"), MsFlags::MS_SHARED);
        let target =
            Bare::with(&["--mount", "--propagation", "unchanged", "--fork", "--kill-child"]);
        let volume = tempfile::tempdir().unwrap();
        let stop = AtomicBool::new(false);
        let injected = thread::scope(|scope| {
            scope.spawn(|| {
                let namespace = fs::File::open(format!("/proc/{}/ns/mnt", target.pid)).unwrap();
                nix::sched::unshare(CloneFlags::CLONE_FS).unwrap();
                nix::sched::setns(namespace, CloneFlags::CLONE_NEWNS).unwrap();
                let bind = |from: &Path, to: &Path| {
                    let flags = MsFlags::MS_BIND;
                    nix::mount::mount(Some(from), to, None::<&str>, flags, None::<&str>).unwrap();
                };
                bind(Path::new("/proc"), volume.path());
                change(Path::new("/proc"), MsFlags::MS_PRIVATE);
                let mut pause = 0;
                while !stop.load(Ordering::SeqCst) {
                    bind(volume.path(), Path::new("/proc"));
                    thread::sleep(Duration::from_micros(pause));
                    nix::mount::umount2("/proc", MntFlags::MNT_DETACH).unwrap();
                    pause = (pause + 17) % 300;
                    thread::sleep(Duration::from_micros(pause));
                }
            });
            let injected = runtime().block_on(async {
                let workers = Workers::start(1, Duration::from_secs(60)).unwrap();
                let lxcfs = kube_lxcfs::lxcfs::find(&workers, &lxcfs.path).await.unwrap();
                let mut injected = 0;
                for _ in 0..TRIES {
                    let view = files([ViewFile::Meminfo]);
                    // It fails if the mounts change again and again.
                    let done = reconcile(&workers, target.pid, view, Some(&lxcfs)).await;
                    injected += done.map_or(0, |outcome| outcome.done.len());
                    if !views(&own_mountinfo()).is_empty() {
                        return Err(injected);
                    }
                    let _ = reconcile(&workers, target.pid, DesiredView::Absent, None).await;
                }
                Ok(injected)
            });
            stop.store(true, Ordering::SeqCst);
            injected
        });
        assert!(injected.expect("no view on the host's /proc") > 0);
    });
}

/// `unshare -Urm` in a container: its mounts are copies, which the kernel has locked.
fn nested(bare: &Bare) -> Running {
    let log = tempfile::NamedTempFile::new().unwrap();
    let nested = Running::start(
        program("nsenter").args(["--target", &bare.pid.to_string(), "--mount"]).args([
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sleep",
            "3600",
        ]),
        log.path(),
    );
    eventually("the nested namespace exists", || {
        let comm = fs::read_to_string(format!("/proc/{}/comm", nested.pid())).unwrap();
        if comm.trim() == "sleep" { Ok(()) } else { Err(nested.log()) }
    });
    nested
}

fn read_in(process: &Running, path: &str) -> String {
    let pid = process.pid().to_string();
    let cat = program("nsenter").args(["--target", &pid, "--mount", "cat", path]).output().unwrap();
    stdout(&cat) + &stderr(&cat)
}

fn layers(process: &Running, path: &str) -> usize {
    let point = format!(" {path} ");
    mountinfo(process.pid()).lines().filter(|line| line.contains(&point)).count()
}

#[test]
fn locked_views_are_covered_by_a_remount() {
    isolated(|| {
        let (old, new, newer) = (Lxcfs::start(), Lxcfs::start(), Lxcfs::start());
        let target = bare();
        let pid = target.pid.to_string();
        succeeds(&["mount", "--pid", &pid, "--lxcfs-path", old.path()]);
        let nested = nested(&target);
        drop(old);
        assert!(read_in(&nested, "/proc/meminfo").contains("not connected"));
        for lxcfs in [&new, &newer] {
            let remount = ["remount", "--all", "--lxcfs-path", lxcfs.path()];
            assert_eq!(succeeds(&remount).matches("remounted").count(), 2);
            assert!(read_in(&nested, "/proc/meminfo").contains("MemTotal"));
            assert!(read_in(&nested, "/sys/devices/system/cpu/online").starts_with('0'));
            assert_eq!(layers(&nested, "/proc/meminfo"), 2, "the locked view and its cover");
            let table = mountinfo(nested.pid());
            assert_eq!(succeeds(&remount).matches("nothing to do").count(), 2);
            assert_eq!(mountinfo(nested.pid()), table);
        }
        let status = succeeds(&["status", "--pid-from", "proc", "--lxcfs-path", newer.path()]);
        assert_eq!(status.matches(" current ").count(), 2, "{status}");
    });
}

#[test]
fn locked_views_are_covered_by_an_umount() {
    isolated(|| {
        let lxcfs = Lxcfs::start();
        let target = bare();
        let pid = target.pid.to_string();
        succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        let nested = nested(&target);
        succeeds(&["umount", "--pid", &pid]);
        let nested_pid = nested.pid().to_string();
        assert!(succeeds(&["umount", "--pid", &nested_pid]).contains("removed "));
        drop(lxcfs);
        let table = mountinfo(nested.pid());
        assert_eq!(table.matches("noatime,nodiratime").count(), ALWAYS.len(), "{table}");
        for file in ["meminfo", "uptime", "stat", "cpuinfo", "loadavg", "swaps", "diskstats"] {
            let read = read_in(&nested, &format!("/proc/{file}"));
            assert!(!read.contains("not connected"), "{file}: {read}");
        }
        assert!(read_in(&nested, "/sys/devices/system/cpu/online").starts_with('0'));
        assert!(succeeds(&["umount", "--pid", &nested_pid]).contains("nothing to do"));
        assert_eq!(mountinfo(nested.pid()), table, "nothing is stacked");
        writes_to_cpu_are_refused(&nested);
    });
}

/// The value is the one that was read: nothing changes on this machine even if the write succeeds.
fn writes_to_cpu_are_refused(nested: &Running) {
    let script = "cd /sys/devices/system/cpu && mount -o remount,bind,rw . && cd . \
                  && value=$(cat cpu0/power/control) && echo $value >cpu0/power/control \
                  && echo written; mount -o remount,rw . || echo kept";
    let entered = program("nsenter")
        .args(["--target", &nested.pid().to_string(), "--user", "--mount", "sh", "-c", script])
        .output()
        .unwrap();
    assert_eq!(stdout(&entered), "kept\n", "the superblock stays read-only");
    let error = stderr(&entered);
    assert!(error.contains("cpu0/power/control: Read-only file system"), "{error}");
    assert!(mountinfo(nested.pid()).contains("/sys/devices/system/cpu rw,"), "it was remounted");
}

#[test]
fn locked_views_of_an_exited_lxcfs_are_covered() {
    isolated(|| {
        let supervised = Supervised::start_mortal();
        let target = bare();
        let pid = target.pid.to_string();
        succeeds(&["mount", "--pid", &pid, "--lxcfs-path", supervised.path()]);
        let nested = nested(&target);
        supervised.kill_for_good();
        eventually("the node's file shows", || {
            let read = read_in(&nested, "/proc/meminfo");
            let covered = layers(&nested, "/proc/meminfo") == 2;
            if covered && read.contains("MemTotal") { Ok(()) } else { Err(read) }
        });
        assert!(views(&target.mountinfo()).is_empty());
        eventually("every locked view is covered", || {
            let table = mountinfo(nested.pid());
            let covers = table.matches("noatime,nodiratime").count();
            if covers == ALWAYS.len() { Ok(()) } else { Err(table) }
        });
        assert!(read_in(&nested, "/sys/devices/system/cpu/online").starts_with('0'));
    });
}

#[test]
fn held_lock_delays_only_its_own_container() {
    isolated(|| {
        let lxcfs = Lxcfs::start();
        let hostile: Vec<Bare> = (0..12).map(|_| bare()).collect();
        let other = bare();
        let locks = hostile.iter().map(|bare| {
            let namespace = fs::File::open(format!("/proc/{}/ns/mnt", bare.pid)).unwrap();
            namespace.try_lock().map_err(io::Error::from).unwrap();
            namespace
        });
        let locks: Vec<fs::File> = locks.collect();
        runtime().block_on(async {
            let workers = Workers::start(1, Duration::from_secs(60)).unwrap();
            let lxcfs = kube_lxcfs::lxcfs::find(&workers, &lxcfs.path).await.unwrap();
            // Without steps the lock is not needed, with steps it is.
            let view = || files([ViewFile::Uptime]);
            let attempt = |pid: i32, desired, lxcfs: Option<&Arc<LxcfsFiles>>| {
                let process = Process::open(i64::from(pid)).unwrap();
                let task = Task::reconcile(desired, lxcfs.cloned());
                workers.run(move |context| {
                    mount::reconcile_blocking(
                        context,
                        &process,
                        &task,
                        IfLocked::Fail,
                        TableLimit::Large,
                    )
                })
            };
            let idle = attempt(hostile[0].pid, DesiredView::Absent, None).await.unwrap();
            assert_eq!(idle.unwrap(), Outcome::default());
            let locked = attempt(hostile[0].pid, view(), Some(&lxcfs)).await.unwrap();
            assert!(matches!(locked, Err(mount::Error::Locked(_))), "{locked:?}");
            // One worker serves the other container while twelve wait.
            let all = pin!(futures::future::join_all(hostile.iter().map(|bare| reconcile(
                &workers,
                bare.pid,
                view(),
                Some(&lxcfs)
            )),));
            let one = pin!(reconcile(&workers, other.pid, view(), Some(&lxcfs)));
            let Either::Right((one, all)) = select(all, one).await else {
                panic!("the other container waited for the locks")
            };
            assert_eq!(one.unwrap().done.len(), 1);
            for done in all.await {
                assert_eq!(done.unwrap().done.len(), 1);
            }
        });
        drop(locks);
    });
}

#[test]
fn view_with_other_options_is_still_managed() {
    isolated(|| {
        let (lxcfs, target) = (Lxcfs::start(), bare());
        let pid = target.pid.to_string();
        let provided = lxcfs.path.join("proc/uptime");
        inside(&target, &["mount", "--bind", provided.to_str().unwrap(), "/proc/uptime"]);
        let before = target.mountinfo();
        let mount = ["mount", "--pid", &pid, "--files", "meminfo,stat,uptime", "--lxcfs-path"];
        let output = succeeds(&[&mount[..], &[lxcfs.path()]].concat());
        assert!(output.contains("skipped uptime: a pod-provided lxcfs file"), "{output}");
        inside(&target, &["mount", "-o", "remount,bind,rw,atime", "/proc/meminfo"]);
        inside(&target, &["mount", "-o", "remount,bind,rw,strictatime", "/proc/stat"]);
        assert!(succeeds(&["umount", "--pid", &pid]).contains("removed meminfo,stat"));
        assert_eq!(target.mountinfo(), before, "the pod-provided file stays");
    });
}
