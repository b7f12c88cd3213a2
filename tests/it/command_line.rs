//! Bad input: each with its one line of error, and nothing changed.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    thread,
};

use crate::harness::*;

#[test]
fn help_is_complete_and_wrong_usage_ends_with_2() {
    let help = succeeds(&["--help"]);
    for word in [
        "agent",
        "mount",
        "umount",
        "remount",
        "status",
        "check",
        "--lxcfs-path",
        "--cri-endpoint",
        "KUBE_LXCFS_PID_FROM",
    ] {
        assert!(help.contains(word), "{word} is not in {help}");
    }
    for command in ["agent", "lxcfs", "mount", "umount", "remount", "status", "check", "hook"] {
        assert!(succeeds(&[command, "--help"]).contains("Usage: kube-lxcfs"), "{command}");
    }
    for wrong in [
        &["mount"][..],
        &["mount", "--pid", "1", "--files", "memory"],
        &["nonsense"],
        &["status", "-o", "yaml"],
        &["agent", "--cri-endpoint", "tcp://x"],
    ] {
        let output = run(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(stderr(&output).starts_with("error: "), "{}", stderr(&output));
    }
    assert!(
        stderr(&run(&["mount", "--pid", "1", "--files", "memory"]))
            .contains("'memory' is no view file; allowed are cpuinfo")
    );
}

#[test]
fn a_path_where_no_lxcfs_serves_is_told_and_nothing_is_mounted() {
    let target = Bare::start();
    let (pid, before) = (target.pid.to_string(), target.mountinfo());
    let dir = tempfile::tempdir().unwrap();
    let mut dead = Lxcfs::start();
    dead.process.kill();
    let missing = dir.path().join("missing");
    for (path, told) in [
        (missing.to_str().unwrap(), "no such directory"),
        (dir.path().to_str().unwrap(), "nothing is mounted there"),
        ("/proc", "a proc is mounted there, no lxcfs"),
        ("/etc/hostname", "nothing is mounted there"),
        (dead.path(), "its lxcfs has ended"),
    ] {
        for command in ["mount", "remount"] {
            let error = fails(&[command, "--pid", &pid, "--lxcfs-path", path]);
            assert!(error.contains(told) && error.contains(path), "{error}");
        }
    }
    assert_eq!(target.mountinfo(), before);
}

#[test]
fn an_endpoint_that_is_no_cri_runtime_is_told() {
    let (lxcfs, dir) = (Lxcfs::start(), tempfile::tempdir().unwrap());
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("file"), "").unwrap();
    // One listens and says something else, one hangs up, one is nobody's any more.
    let other = UnixListener::bind(at("other")).unwrap();
    thread::spawn(move || {
        for stream in other.incoming().flatten() {
            let mut stream = stream;
            let _ = stream
                .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                .and_then(|()| stream.read(&mut [0; 64]).map(drop));
        }
    });
    let silent = UnixListener::bind(at("silent")).unwrap();
    thread::spawn(move || silent.incoming().flatten().collect::<Vec<_>>());
    drop(UnixListener::bind(at("gone")).unwrap());
    for (name, told) in [
        ("missing", "no such file"),
        ("file", "it is no socket"),
        ("gone", "cannot connect"),
        ("other", "does not speak CRI v1"),
        ("silent", "does not speak CRI v1 (no answer within 2s)"),
    ] {
        let endpoint = format!("unix://{}", at(name));
        let error = fails(&[
            "mount",
            "--container",
            "abc",
            "--pid-from",
            "cri",
            "--cri-endpoint",
            &endpoint,
            "--lxcfs-path",
            lxcfs.path(),
        ]);
        assert!(error.contains(told) && error.contains(&at(name)), "{name}: {error}");
    }
    let error = fails(&["mount", "--container", "../x", "--pid-from", "proc"]);
    assert!(error.contains("'../x' is no container id"), "{error}");
}

#[test]
fn without_privileges_it_says_so() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let binary = dir.path().join("kube-lxcfs");
    fs::copy(env!("CARGO_BIN_EXE_kube-lxcfs"), &binary).unwrap();
    for args in [
        &["mount", "--pid", "1"][..],
        &["umount", "--all"],
        &["status"],
        &["agent", "--pods-from", "cri"],
    ] {
        let mut setpriv = program("setpriv");
        setpriv
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"])
            .arg(&binary)
            .args(args);
        let error = error_line(&setpriv.output().unwrap());
        assert!(
            error.contains("CAP_SYS_ADMIN is missing") && error.contains("run it as root"),
            "{error}"
        );
    }
    let mut check = program("setpriv");
    check
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"])
        .arg(&binary)
        .arg("check");
    let output = check.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("fail  capabilities"), "{}", stdout(&output));
}

/// Runs the binary where a seccomp filter answers these calls with this error, as a kernel without
/// them does.
fn run_without(calls: &[i64], errno: i32, args: &'static [&'static str]) -> std::process::Output {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
    let rules = calls.iter().map(|call| (*call, vec![])).collect();
    let refuse = SeccompAction::Errno(errno.cast_unsigned());
    let arch: TargetArch = std::env::consts::ARCH.try_into().unwrap();
    let filter: BpfProgram =
        SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap().try_into().unwrap();
    // A filter binds the thread that sets it, and what it starts.
    let filtered = thread::spawn(move || {
        seccompiler::apply_filter(&filter).unwrap();
        run(args)
    });
    filtered.join().unwrap()
}

#[test]
fn a_kernel_without_the_calls_is_told_by_their_names() {
    let calls = [
        (libc::SYS_mount_setattr, "mount_setattr (kernel 5.12)"),
        (libc::SYS_openat2, "openat2 (kernel 5.6)"),
        (libc::SYS_move_mount, "move_mount (kernel 5.2)"),
    ];
    for errno in [libc::ENOSYS, libc::EPERM] {
        for (call, told) in calls {
            let error = error_line(&run_without(&[call], errno, &["mount", "--pid", "1"]));
            assert!(error.contains(told), "{error}");
        }
    }
    let all: Vec<i64> = calls.iter().map(|(call, _)| *call).collect();
    let check = run_without(&all, libc::ENOSYS, &["check"]);
    assert_eq!(check.status.code(), Some(1));
    assert!(stdout(&check).contains("fail  kernel"), "{}", stdout(&check));
}

#[test]
fn the_agent_says_what_it_lacks() {
    let error = fails(&["agent"]);
    assert!(error.contains("give --node-name or set NODE_NAME"), "{error}");
    let output = kube_lxcfs()
        .args(["agent", "--node-name", "n"])
        .env("HOME", "/nonexistent")
        .output()
        .unwrap();
    let error = error_line(&output);
    assert!(
        error.contains("no API server is known") && error.contains("--pods-from cri"),
        "{error}"
    );
}

#[test]
fn all_views_of_a_node_are_shown_remounted_and_removed() {
    let (old, new) = (Lxcfs::start(), Lxcfs::start());
    // A node of its own: other tests' namespaces are not in its /proc.
    let script = format!(
        "set -e; kl={0}; for i in 1 2 3; do unshare --mount --propagation private sleep 60 & pids=\"$pids $!\"; done; sleep 0.5
         for pid in ${{pids% *}}; do $kl mount --pid $pid --lxcfs-path {1} >/dev/null; done
         $kl status --pid-from proc --lxcfs-path {2} 2>/dev/null | grep -c stale
         $kl remount --all --lxcfs-path {2} | grep -c remounted
         $kl status --pid-from proc --lxcfs-path {2} 2>/dev/null | grep -c current
         $kl umount --all | grep -c removed
         $kl status --pid-from proc --lxcfs-path {2} 2>/dev/null | wc -l
         kill $pids",
        env!("CARGO_BIN_EXE_kube-lxcfs"),
        old.path(),
        new.path()
    );
    let output = program("unshare")
        .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &script])
        .output()
        .unwrap();
    assert_eq!(
        stdout(&output).split_whitespace().collect::<Vec<_>>(),
        ["2", "2", "2", "2", "1"],
        "{}",
        stderr(&output)
    );
}
