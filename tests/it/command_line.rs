//! Bad input: each with its one line of error, and nothing changed.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    thread,
};

use crate::harness::*;

#[test]
fn help_is_complete_and_wrong_usage_exits_2() {
    isolated(|| {
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
                .contains("unknown view file 'memory'; valid names: cpuinfo")
        );
    });
}

#[test]
fn path_without_lxcfs_is_an_error() {
    isolated(|| {
        let target = Bare::start();
        let (pid, before) = (target.pid.to_string(), target.mountinfo());
        let dir = tempfile::tempdir().unwrap();
        let mut dead = Lxcfs::start();
        dead.process.kill();
        let missing = dir.path().join("missing");
        for (path, expected) in [
            (missing.to_str().unwrap(), "no such directory"),
            (dir.path().to_str().unwrap(), "no lxcfs mounted at"),
            ("/proc", "but a proc; set --lxcfs-path"),
            ("/etc/hostname", "no lxcfs mounted at"),
            (dead.path(), "has exited; unmount it"),
        ] {
            for command in ["mount", "remount"] {
                let error = fails(&[command, "--pid", &pid, "--lxcfs-path", path]);
                assert!(error.contains(expected) && error.contains(path), "{error}");
            }
        }
        assert_eq!(target.mountinfo(), before);
    });
}

#[test]
fn endpoint_without_cri_is_an_error() {
    isolated(|| {
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
        for (name, expected) in [
            ("missing", "no such file"),
            ("file", "not a socket"),
            ("gone", "failed to connect"),
            ("other", "does not speak CRI v1"),
            ("silent", "does not speak CRI v1 (timed out after 2s)"),
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
            assert!(error.contains(expected) && error.contains(&at(name)), "{name}: {error}");
        }
        let error = fails(&["mount", "--container", "../x", "--pid-from", "proc"]);
        assert!(error.contains("invalid container id '../x'"), "{error}");
    });
}

#[test]
fn missing_capability_is_an_error() {
    isolated(|| {
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
                error.contains("missing capability CAP_SYS_ADMIN") && error.contains("as root"),
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
    });
}

/// The agent's readiness depends on CRI unless it uses `/proc` only, and `check` says so.
#[test]
fn check_and_readiness_agree_about_cri() {
    isolated(|| {
        for (source, is_ready) in [("auto", false), ("cri", false), ("proc", true)] {
            let flags = ["--cri-endpoint", "unix:///nonexistent/cri.sock", "--pid-from", source];
            let checks = stdout(&run(&[&["check"][..], &flags].concat()));
            let line = checks.lines().find(|line| line.contains("  cri ")).unwrap();
            assert!(line.starts_with("warn"), "{line}");
            assert_eq!(!line.contains("the agent is not ready"), is_ready, "{source}: {line}");
            let lxcfs = Lxcfs::start();
            let dir = tempfile::tempdir().unwrap();
            let pods = Pods::start();
            let kubeconfig = pods.kubeconfig();
            let args = ["--node-name", "n1", "--lxcfs-path", lxcfs.path(), "--nri", "off"];
            let environment = [("KUBECONFIG", kubeconfig.to_str().unwrap())];
            let agent = agent(dir.path(), &[&args[..], &flags].concat(), &environment);
            let expected = if is_ready { (200, "ok\n") } else { (503, "cri.sock") };
            eventually_true(source, || {
                let (code, body) = get(&agent, "/readyz");
                code == expected.0 && body.contains(expected.1)
            });
        }
    });
}

/// Runs the binary where a seccomp filter fails these calls with this error, as a kernel without
/// them does.
fn run_without(calls: &[i64], errno: i32, args: &'static [&'static str]) -> std::process::Output {
    without(calls, errno, move || run(args))
}

/// Calls a function where the programs that it starts cannot make these calls.
fn without<T: Send + 'static>(
    calls: &[i64],
    errno: i32,
    start: impl FnOnce() -> T + Send + 'static,
) -> T {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
    let rules = calls.iter().map(|call| (*call, vec![])).collect();
    let refuse = SeccompAction::Errno(errno.cast_unsigned());
    let arch: TargetArch = std::env::consts::ARCH.try_into().unwrap();
    let filter: BpfProgram =
        SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap().try_into().unwrap();
    // A filter binds the thread that sets it, and what it starts.
    let filtered = thread::spawn(move || {
        seccompiler::apply_filter(&filter).unwrap();
        start()
    });
    filtered.join().unwrap()
}

#[test]
fn check_names_the_options_that_lxcfs_runs_without() {
    isolated(|| {
        for (options, missing) in [
            (&["-l", "--enable-cfs"][..], None),
            (&["-l"], Some("without --enable-cfs: cpuinfo, stat and cpu")),
            (&["--enable-cfs"], Some("without --enable-loadavg: loadavg")),
            (&[], Some("without --enable-cfs and --enable-loadavg: ")),
        ] {
            let lxcfs = Lxcfs::with_options(options);
            let checks = stdout(&run(&["check", "--lxcfs-path", lxcfs.path()]));
            let line = checks.lines().find(|line| line.contains("  lxcfs ")).unwrap();
            let verdict = if missing.is_some() { "warn" } else { "ok" };
            assert!(line.starts_with(verdict), "{options:?}: {line}");
            let remedy = missing.map(|_| "manifests/systemd/lxcfs.service.d");
            assert!(missing.is_none_or(|text| line.contains(text)), "{options:?}: {line}");
            assert!(remedy.is_none_or(|text| line.contains(text)), "{options:?}: {line}");
        }
    });
}

#[test]
fn missing_system_calls_are_named() {
    isolated(|| {
        let calls = [
            (libc::SYS_open_tree, "open_tree (kernel 5.2)"),
            (libc::SYS_openat2, "openat2 (kernel 5.6)"),
            (libc::SYS_move_mount, "move_mount (kernel 5.2)"),
        ];
        for errno in [libc::ENOSYS, libc::EPERM] {
            for (call, expected) in calls {
                let error = error_line(&run_without(&[call], errno, &["mount", "--pid", "1"]));
                assert!(error.contains(expected), "{error}");
            }
        }
        let all: Vec<i64> = calls.iter().map(|(call, _)| *call).collect();
        let check = run_without(&all, libc::ENOSYS, &["check"]);
        assert_eq!(check.status.code(), Some(1));
        assert!(stdout(&check).contains("fail  kernel"), "{}", stdout(&check));
    });
}

#[test]
fn missing_mount_calls_refuse_only_mounts() {
    isolated(|| {
        let (lxcfs, target) = (Lxcfs::start(), Bare::start());
        succeeds(&["mount", "--pid", &target.pid.to_string(), "--lxcfs-path", lxcfs.path()]);
        let mount = [libc::SYS_open_tree, libc::SYS_move_mount];
        let status = run_without(&mount, libc::ENOSYS, &["status", "--pid-from", "proc"]);
        assert_eq!(stdout(&status).lines().count(), 2, "{}", stderr(&status));
        let umount = run_without(&mount, libc::ENOSYS, &["umount", "--all"]);
        assert!(stdout(&umount).contains("removed"), "{}", stderr(&umount));
        assert!(views(&target.mountinfo()).is_empty());
        let remount = run_without(&mount, libc::ENOSYS, &["remount", "--all"]);
        assert!(error_line(&remount).contains("move_mount (kernel 5.2)"), "{}", stderr(&remount));
    });
}

/// As on a kernel before 5.8. A pod that exits would be restarted again and again.
#[test]
fn unsupported_node_is_reported_and_left_alone() {
    isolated(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lxcfs");
        let lxcfs_path = path.to_str().unwrap().to_owned();
        let agent_dir = dir.path().to_owned();
        let start_agent =
            move || agent(&agent_dir, &["--node-name", "n", "--lxcfs-path", &lxcfs_path], &[]);
        let agent = without(&[libc::SYS_openat2], libc::ENOSYS, start_agent);
        let reason = "lacks openat2 (kernel 5.6)";
        assert_eq!(get(&agent, "/healthz").0, 200);
        let (code, why) = get(&agent, "/readyz");
        assert_eq!((code, why.contains(reason)), (503, true), "{why}");
        assert!(get(&agent, "/metrics").1.contains("kube_lxcfs_node_supported 0"));
        let (log, at) = (dir.path().join("supervisor.log"), path.clone());
        let supervisor = without(&[libc::SYS_openat2], libc::ENOSYS, move || {
            let mut command = kube_lxcfs();
            Running::start(command.args(["lxcfs", "--lxcfs-path"]).arg(at), &log)
        });
        eventually_true("the supervisor reports it", || supervisor.log().contains(reason));
        for mut process in [agent, supervisor] {
            assert!(process.log().contains("not supported"), "{}", process.log());
            assert!(process.is_running());
            process.signal(nix::sys::signal::Signal::SIGTERM);
            let status = process.child.wait().unwrap();
            assert!(status.success(), "{status}");
        }
        assert!(!path.exists(), "nothing is made");
    });
}

/// As on a kernel before 5.12.
#[test]
fn views_are_the_same_without_mount_setattr() {
    isolated(|| {
        // A supervised lxcfs may be a shared mount: its copies must not be.
        let (old, new, target) = (Lxcfs::start(), Lxcfs::start(), Bare::start());
        let shared = nix::mount::MsFlags::MS_SHARED;
        nix::mount::mount(None::<&str>, &old.path, None::<&str>, shared, None::<&str>).unwrap();
        let pid: &'static str = target.pid.to_string().leak();
        let path = |lxcfs: &Lxcfs| -> &'static str { lxcfs.path().to_owned().leak() };
        let views_of = |table: &str| -> Vec<String> {
            let mounts = table.lines().filter(|line| line.contains(" - fuse.lxcfs "));
            mounts.map(|l| l.split(' ').skip(3).collect::<Vec<_>>().join(" ")).collect()
        };
        let without = |args: &'static [&'static str]| {
            let output = run_without(&[libc::SYS_mount_setattr], libc::ENOSYS, args);
            assert!(output.status.success(), "{}", stderr(&output));
            stdout(&output)
        };
        let before = target.mountinfo();
        let mount: &'static [&str] = vec!["mount", "--pid", pid, "--lxcfs-path", path(&old)].leak();
        succeeds(mount);
        let expected = views_of(&target.mountinfo());
        succeeds(&["umount", "--pid", pid]);
        let own_mounts = own_mountinfo();
        without(mount);
        assert_eq!(views_of(&target.mountinfo()), expected);
        assert_eq!(views(&target.mountinfo()).len(), ALWAYS.len());
        without(vec!["remount", "--all", "--lxcfs-path", path(&new)].leak());
        assert_eq!(views(&target.mountinfo()).len(), ALWAYS.len());
        assert!(without(&["umount", "--all"]).contains("removed"));
        assert_eq!(target.mountinfo(), before);
        assert_eq!(own_mountinfo(), own_mounts);
        let check = run_without(&[libc::SYS_mount_setattr], libc::ENOSYS, &["check"]);
        assert!(stdout(&check).contains("ok    kernel"), "{}", stdout(&check));
    });
}

#[test]
fn log_that_cannot_be_written_is_no_error() {
    isolated(|| {
        for format in ["text", "json"] {
            let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
            let mut status = kube_lxcfs();
            status.args(["status", "--pid-from", "proc", "--lxcfs-path", "/nonexistent"]);
            let output = status.args(["--log-format", format]).stderr(full).output().unwrap();
            assert!(output.status.success(), "{format}: {}", output.status);
        }
    });
}

#[test]
fn agent_without_node_or_api_server_is_an_error() {
    isolated(|| {
        for args in [&["agent"][..], &["agent", "--node-name", ""]] {
            let error = fails(args);
            assert!(error.contains("--node-name"), "{error}");
        }
        let output = kube_lxcfs()
            .args(["agent", "--node-name", "n"])
            .env("HOME", "/nonexistent")
            .output()
            .unwrap();
        let error = error_line(&output);
        assert!(
            error.contains("failed to configure the API server's client")
                && error.contains("--pods-from cri"),
            "{error}"
        );
    });
}

#[test]
fn all_containers_with_few_descriptors_are_found() {
    isolated(|| {
        let lxcfs = Lxcfs::start();
        let targets: Vec<Bare> = (0..24).map(|_| Bare::start()).collect();
        for target in &targets {
            let pid = target.pid.to_string();
            succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        }
        let binary = kube_lxcfs();
        let removed = program("prlimit")
            .args(["--nofile=32:4096", "--"])
            .arg(binary.get_program())
            .args(["umount", "--all"])
            .output()
            .unwrap();
        assert!(removed.status.success(), "{}", stderr(&removed));
        assert_eq!(stdout(&removed).matches("removed").count(), targets.len());
    });
}

#[test]
fn all_views_are_shown_remounted_and_removed() {
    isolated(|| {
        let (old, new) = (Lxcfs::start(), Lxcfs::start());
        let targets = [Bare::start(), Bare::start(), Bare::start()];
        for target in &targets[..2] {
            let pid = target.pid.to_string();
            succeeds(&["mount", "--pid", &pid, "--lxcfs-path", old.path()]);
        }
        let count = |args: &[&str], word: &str| succeeds(args).matches(word).count();
        let status = ["status", "--pid-from", "proc", "--lxcfs-path", new.path()];
        assert_eq!(count(&status, " stale "), 2);
        assert_eq!(count(&["remount", "--all", "--lxcfs-path", new.path()], "remounted"), 2);
        assert_eq!(count(&status, " current "), 2);
        assert_eq!(count(&["umount", "--all"], "removed"), 2);
        assert_eq!(succeeds(&status).lines().count(), 1, "the header alone");
    });
}
