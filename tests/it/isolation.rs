//! Who is not touched, and what a hostile container cannot do.

use std::{fs, path::Path, sync::Arc, time::Duration};

use kube_lxcfs::{
    model::view::FileSet,
    mount::{self, Task, Workers},
    plan::DesiredView,
    sys::process::Process,
};

use crate::harness::*;

#[test]
fn mount_and_umount_change_only_the_target() {
    isolated(|| {
        let (lxcfs, target, other) = (Lxcfs::start(), Bare::start(), Bare::start());
        let (host, before, others) = (own_mountinfo(), target.mountinfo(), other.mountinfo());
        let pid = target.pid.to_string();
        succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        assert_eq!(views(&target.mountinfo()).len(), 9);
        assert!(target.read("/proc/meminfo").contains("MemTotal"));
        for line in target.mountinfo().lines().filter(|l| l.contains("/proc/meminfo")) {
            assert!(line.contains(" ro,nosuid,nodev,noexec,noatime - fuse.lxcfs"), "{line}");
        }
        succeeds(&["umount", "--pid", &pid]);
        assert_eq!(target.mountinfo(), before);
        assert_eq!(other.mountinfo(), others);
        let mine = |table: &str| {
            table
                .lines()
                .filter(|l| l.contains(lxcfs.path()))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(mine(&own_mountinfo()), mine(&host));
    });
}

#[test]
fn user_namespace_gets_and_loses_its_view() {
    isolated(|| {
        let lxcfs = Lxcfs::start();
        let user = ["--user", "--map-root-user"];
        let target = Bare::with(&[&user[..], &OWN_NAMESPACES].concat());
        let pid = target.pid.to_string();
        succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        assert_eq!(views(&target.mountinfo()).len(), 9);
        succeeds(&["umount", "--pid", &pid]);
        assert!(views(&target.mountinfo()).is_empty());
    });
}

#[test]
fn process_outside_a_container_is_refused() {
    isolated(|| {
        let lxcfs = Lxcfs::start();
        let table = own_mountinfo();
        let vanished = Bare::start().pid.to_string();
        eventually_true("it has vanished", || !Path::new("/proc").join(&vanished).exists());
        let mine = std::process::id().to_string();
        for (pid, expected) in [
            (mine.as_str(), "mount namespace, which is never changed"),
            (vanished.as_str(), "no process has pid"),
            ("0", "invalid pid"),
            ("-7", "invalid pid"),
            ("99999999999", "invalid pid"),
        ] {
            let error = fails(&["mount", "--pid", pid, "--lxcfs-path", lxcfs.path()]);
            assert!(error.contains(expected), "{pid}: {error}");
        }
        // The agent itself, in a namespace apart from the host's: its own is refused as its own.
        let own = format!(
            "{} mount --pid $$ --lxcfs-path {}",
            env!("CARGO_BIN_EXE_kube-lxcfs"),
            lxcfs.path()
        );
        let output = program("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &own])
            .output()
            .unwrap();
        assert!(
            error_line(&output).contains("kube-lxcfs's own mount namespace"),
            "{}",
            stderr(&output)
        );
        let mine = |table: &str| table.lines().filter(|l| l.contains(lxcfs.path())).count();
        assert_eq!(mine(&own_mountinfo()), mine(&table));
    });
}

/// Not isolated: a pid namespace shows no kernel threads. The command is refused before it searches
/// for an lxcfs.
#[test]
fn kernel_thread_is_refused() {
    let flags = |pid: i32| procfs::process::Process::new(pid).ok()?.stat().ok().map(|s| s.flags);
    assert!(flags(2).is_some_and(|flags| flags & 0x20_0000 != 0), "pid 2 is not one here");
    let error = fails(&["mount", "--pid", "2"]);
    assert!(error.contains("is a kernel thread"), "{error}");
}

#[test]
fn proc_shared_with_the_host_is_skipped() {
    isolated(|| {
        let lxcfs = Lxcfs::start();
        // The /proc of this namespace is a peer of the host's, whose mounts are shared.
        let flags = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_SHARED;
        nix::mount::mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
        let target =
            Bare::with(&["--mount", "--propagation", "unchanged", "--fork", "--kill-child"]);
        let pid = target.pid.to_string();
        let output = succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        let reason = "skipped meminfo: /proc shares its mounts with the host's mount namespace";
        assert!(output.contains(reason), "{output}");
        assert!(views(&own_mountinfo()).is_empty());
        assert!(views(&target.mountinfo()).is_empty());
    });
}

#[test]
fn unrelated_mounts_are_never_removed_or_covered() {
    isolated(|| {
        let (lxcfs, target) = (Lxcfs::start(), Bare::start());
        let pid = target.pid.to_string();
        let inside = |args: &[&str]| {
            let done =
                program("nsenter").args(["--target", &pid, "--mount"]).args(args).output().unwrap();
            assert!(done.status.success(), "{args:?}: {}", stderr(&done));
        };
        inside(&["mount", "--bind", "/etc/hostname", "/proc/meminfo"]);
        inside(&["mount", "-t", "tmpfs", "none", "/sys/devices"]);
        let before = target.mountinfo();
        let output = succeeds(&[
            "mount",
            "--pid",
            &pid,
            "--files",
            "meminfo,uptime,cpu",
            "--lxcfs-path",
            lxcfs.path(),
        ]);
        assert!(output.contains("skipped meminfo: another mount is on its path"), "{output}");
        assert!(output.contains("skipped cpu: "), "{output}");
        assert_eq!(views(&target.mountinfo()), ["/proc/uptime"]);
        succeeds(&["umount", "--pid", &pid]);
        assert_eq!(target.mountinfo(), before);
    });
}

#[test]
fn links_and_other_file_systems_are_not_followed() {
    isolated(|| {
        let lxcfs = Lxcfs::start();
        let dir = tempfile::tempdir().unwrap();
        // A root whose /proc is a link to elsewhere, and one whose /proc is no procfs.
        for (name, make) in [
            ("link", "ln -s /elsewhere proc; mkdir -p elsewhere; touch elsewhere/meminfo"),
            ("tmpfs", "mkdir proc; mount -t tmpfs none proc; touch proc/meminfo"),
            ("none", "true"),
        ] {
            let root = dir.path().join(name);
            fs::create_dir_all(root.join("bin")).unwrap();
            fs::copy(program("busybox").get_program(), root.join("bin/busybox")).unwrap();
            let script = format!(
                "mount --bind {0} {0} && cd {0} && {make}; mkdir -p old && pivot_root . old \
                 && cd / && /bin/busybox umount -l /old && exec /bin/busybox sleep 3600",
                root.display()
            );
            let target = Bare::running(
                &["--mount", "--propagation", "private", "--fork", "--kill-child"],
                &["sh", "-c", &script],
            );
            eventually_true("it is in its root", || {
                fs::read_to_string(format!("/proc/{}/comm", target.pid))
                    .is_ok_and(|comm| comm.trim() == "busybox")
            });
            let before = target.mountinfo();
            let output =
                run(&["mount", "--pid", &target.pid.to_string(), "--lxcfs-path", lxcfs.path()]);
            assert!(
                stdout(&output).contains("skipped meminfo: /proc is"),
                "{name}: {} {}",
                stdout(&output),
                stderr(&output)
            );
            assert_eq!(target.mountinfo(), before, "{name}");
        }
    });
}

#[test]
fn hung_lxcfs_times_out_and_umount_still_works() {
    isolated(|| {
        let (lxcfs, target) = (Lxcfs::start(), Bare::start());
        let pid = target.pid.to_string();
        succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        lxcfs.process.signal(nix::sys::signal::Signal::SIGSTOP);
        let error = fails(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        assert!(error.contains("timed out after 5s"), "{error}");
        succeeds(&["umount", "--pid", &pid]);
        assert!(views(&target.mountinfo()).is_empty());
        lxcfs.process.signal(nix::sys::signal::Signal::SIGCONT);
    });
}

#[test]
fn stale_and_dead_views_are_shown_and_remounted() {
    isolated(|| {
        let (old, new, target) = (Lxcfs::start(), Lxcfs::start(), Bare::start());
        let pid = target.pid.to_string();
        let state = || {
            let status: serde_json::Value = serde_json::from_str(&succeeds(&[
                "status",
                "-o",
                "json",
                "--pid-from",
                "proc",
                "--lxcfs-path",
                new.path(),
            ]))
            .unwrap();
            let mine = status.as_array().unwrap().iter().find(|s| target.has(&s["pid"])).cloned();
            mine.map(|s| s["files"]["meminfo"].as_str().unwrap().to_owned())
        };
        let remount = || succeeds(&["remount", "--pid", &pid, "--lxcfs-path", new.path()]);
        assert!(remount().contains("nothing to do"), "a container without a view is left alone");
        assert_eq!(state(), None);
        succeeds(&["mount", "--pid", &pid, "--files", "meminfo,cpu", "--lxcfs-path", old.path()]);
        assert_eq!(state().as_deref(), Some("stale"));
        assert!(remount().contains("remounted meminfo,cpu"));
        assert_eq!(state().as_deref(), Some("current"));
        assert_eq!(
            views(&target.mountinfo()),
            ["/proc/meminfo", "/sys/devices/system/cpu"],
            "nothing is stacked"
        );

        succeeds(&["umount", "--pid", &pid]);
        succeeds(&["mount", "--pid", &pid, "--lxcfs-path", old.path()]);
        drop(old);
        assert!(target.read("/proc/meminfo").contains("not connected"));
        assert_eq!(state().as_deref(), Some("dead"));
        remount();
        assert_eq!(state().as_deref(), Some("current"));
        assert_eq!(views(&target.mountinfo()).len(), 9, "nothing is stacked");
        assert!(target.read("/proc/meminfo").contains("MemTotal"));
        assert!(read(Path::new("/proc/meminfo")).is_ok());
    });
}

/// The open view files outlive the unmount of lxcfs, but the kernel no longer clones them.
#[test]
fn unmount_during_an_operation_is_no_failure() {
    isolated(|| {
        let (lxcfs, bare) = (Lxcfs::start(), Bare::start());
        let path = Path::new(lxcfs.path());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let reconciled = runtime.block_on(async {
            let workers = Workers::start(1, Duration::from_secs(10)).unwrap();
            let files = kube_lxcfs::lxcfs::find(&workers, path).await.unwrap();
            unmount(path);
            let process = Arc::new(Process::open(i64::from(bare.pid)).unwrap());
            let task = Task::reconcile(DesiredView::Exactly(FileSet::ALL), Some(files));
            mount::reconcile(&workers, process, task).await.unwrap()
        });
        assert!(matches!(reconciled, Err(mount::Error::LxcfsUnmounted)), "{reconciled:?}");
        assert!(views(&bare.mountinfo()).is_empty());
    });
}
