//! Who is not touched, and what a hostile container cannot do.

use std::{fs, path::Path};

use crate::harness::*;

#[test]
fn a_namespace_gets_its_view_and_loses_it_and_the_host_and_others_keep_theirs() {
    let (lxcfs, target, other) = (Lxcfs::start(), Bare::start(), Bare::start());
    let (host, before, others) =
        (mountinfo(std::process::id().cast_signed()), target.mountinfo(), other.mountinfo());
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
        table.lines().filter(|l| l.contains(lxcfs.path())).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(mine(&mountinfo(std::process::id().cast_signed())), mine(&host));
}

#[test]
fn a_mount_namespace_owned_by_a_user_namespace_works() {
    let lxcfs = Lxcfs::start();
    let target = Bare::with(&[
        "--user",
        "--map-root-user",
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]);
    let pid = target.pid.to_string();
    succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
    assert_eq!(views(&target.mountinfo()).len(), 9);
    succeeds(&["umount", "--pid", &pid]);
    assert!(views(&target.mountinfo()).is_empty());
}

#[test]
fn processes_that_are_no_container_are_refused() {
    let lxcfs = Lxcfs::start();
    let table = mountinfo(std::process::id().cast_signed());
    let vanished = Bare::start().pid.to_string();
    eventually_true("it has vanished", || !Path::new("/proc").join(&vanished).exists());
    let mine = std::process::id().to_string();
    for (pid, told) in [
        ("2", "is a kernel thread"),
        (mine.as_str(), "mount namespace, which is never touched"),
        (vanished.as_str(), "no process has pid"),
        ("0", "is no process id"),
        ("-7", "is no process id"),
        ("99999999999", "is no process id"),
    ] {
        let error = fails(&["mount", "--pid", pid, "--lxcfs-path", lxcfs.path()]);
        assert!(error.contains(told), "{pid}: {error}");
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
    assert_eq!(mine(&mountinfo(std::process::id().cast_signed())), mine(&table));
}

#[test]
fn a_proc_that_shares_its_mounts_with_ours_is_left_alone() {
    let lxcfs = Lxcfs::start();
    // An own «host» whose mounts are shared, and in it a process whose /proc is a peer of the
    // host's.
    let script = format!(
        "mount --make-rshared / && unshare --mount --propagation unchanged sleep 60 & sleep 0.5; \
         child=$(pgrep -P $!) || child=$!; {0} mount --pid $child --lxcfs-path {1}; grep -c noatime.*fuse.lxcfs /proc/self/mountinfo; kill $child",
        env!("CARGO_BIN_EXE_kube-lxcfs"),
        lxcfs.path()
    );
    let output = program("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap();
    let told = stdout(&output);
    assert!(
        told.contains("left out meminfo: /proc shares its mounts with the host's mount namespace"),
        "{told} {}",
        stderr(&output)
    );
    assert!(told.ends_with("\n0\n"), "{told}");
}

#[test]
fn mounts_of_the_containers_own_are_never_removed_or_covered() {
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
    let told = succeeds(&[
        "mount",
        "--pid",
        &pid,
        "--files",
        "meminfo,uptime,cpu",
        "--lxcfs-path",
        lxcfs.path(),
    ]);
    assert!(told.contains("left out meminfo: another mount is on its path"), "{told}");
    assert!(told.contains("left out cpu: "), "{told}");
    assert_eq!(views(&target.mountinfo()), ["/proc/uptime"]);
    succeeds(&["umount", "--pid", &pid]);
    assert_eq!(target.mountinfo(), before);
}

#[test]
fn links_and_file_systems_put_in_the_way_are_not_followed() {
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
            "mount --bind {0} {0} && cd {0} && {make}; mkdir -p old && pivot_root . old && cd / && /bin/busybox umount -l /old && exec /bin/busybox sleep 3600",
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
            stdout(&output).contains("left out meminfo: /proc is"),
            "{name}: {} {}",
            stdout(&output),
            stderr(&output)
        );
        assert_eq!(target.mountinfo(), before, "{name}");
    }
}

#[test]
fn a_hung_lxcfs_is_told_within_the_deadline_and_views_come_out_all_the_same() {
    let (lxcfs, target) = (Lxcfs::start(), Bare::start());
    let pid = target.pid.to_string();
    succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
    lxcfs.process.signal(nix::sys::signal::Signal::SIGSTOP);
    let told = fails(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
    assert!(told.contains("lxcfs does not answer within 5s"), "{told}");
    succeeds(&["umount", "--pid", &pid]);
    assert!(views(&target.mountinfo()).is_empty());
    lxcfs.process.signal(nix::sys::signal::Signal::SIGCONT);
}

#[test]
fn a_view_of_an_earlier_lxcfs_is_shown_swapped_and_removed() {
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
}
