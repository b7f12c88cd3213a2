//! What passes for lxcfs and is not, and what a container or a client does to lxcfs and the agent.

use std::{
    fs,
    io::Write,
    net::TcpStream,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::signal::Signal;
use rustix::mount::FsPickFlags;
use serde_json::json;

use crate::harness::*;

/// A container with a file system of its own that passes for a view of `/proc/meminfo`.
pub(super) struct Fake {
    pub(super) container: Bare,
    _dir: tempfile::TempDir,
}

impl Fake {
    /// `mode`: `hang`, or the error of every open.
    pub(super) fn start(mode: &str) -> Fake {
        Fake::by(Path::new("/dev/fuse"), mode)
    }

    /// By this device.
    fn by(device: &Path, mode: &str) -> Fake {
        let program = compiled("fuse_fake");
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().to_str().unwrap();
        let script = format!(
            "mount --bind {at}/proc/meminfo /proc/meminfo; \
             mount -o remount,bind,ro,nosuid,nodev,noexec,noatime /proc/meminfo"
        );
        let command = [program.to_str().unwrap(), mode, device.to_str().unwrap(), at, &script];
        let container = Bare::running(&OWN_NAMESPACES, &command);
        eventually_true("the fake is ready", || container.unshare.log().contains("ready"));
        Fake { container, _dir: dir }
    }

    /// Of a device that is not found, and stopped: an open of its file waits, and can be killed.
    pub(crate) fn stopped() -> Fake {
        let dir = tempfile::tempdir().unwrap();
        let fake = Fake::by(&hidden_device(dir.path()), "hang");
        send(fake.container.pid, Signal::SIGSTOP);
        fake
    }

    fn dev(&self) -> (String, String) {
        let table = self.container.mountinfo();
        let line = table.lines().find(|l| l.contains(" /proc/meminfo ")).unwrap();
        let (major, minor) = line.split(' ').nth(2).unwrap().split_once(':').unwrap();
        (major.to_owned(), minor.to_owned())
    }

    pub(super) fn has_view(&self) -> bool {
        views(&self.container.mountinfo()) == ["/proc/meminfo"]
    }
}

/// A FUSE device of another name.
fn hidden_device(dir: &Path) -> PathBuf {
    let device = dir.join("hidden");
    let copied = program("cp").args(["-a", "/dev/fuse"]).arg(&device).status().unwrap();
    assert!(copied.success());
    device
}

/// Moves processes into a cgroup.
fn enter_cgroup(cgroup: &str, pids: &[i32]) {
    let used = |dir: &PathBuf| {
        let hierarchy = dir.strip_prefix("/sys/fs/cgroup").unwrap();
        Path::new("/sys/fs/cgroup/cgroup.controllers").exists() || hierarchy.starts_with("pids")
    };
    for dir in cgroup_dirs(cgroup).iter().filter(|dir| used(dir)) {
        fs::create_dir_all(dir).unwrap();
        for pid in pids {
            fs::write(dir.join("cgroup.procs"), pid.to_string()).unwrap();
        }
    }
}

fn agent_of(dir: &Path, pods: &Pods, lxcfs_path: &str) -> Running {
    let args = ["--node-name", "n1", "--lxcfs-path", lxcfs_path, "--pid-from", "proc"];
    let kubeconfig = pods.kubeconfig();
    agent(dir, &args, &[("KUBECONFIG", kubeconfig.to_str().unwrap())])
}

/// Without a view file to open, a container's file system cannot make a thread hang.
#[test]
fn hanging_fake_lxcfs_stops_neither_status_nor_agent() {
    isolated(|| {
        let (fake, lxcfs) = (Fake::start("hang"), Lxcfs::start());
        let args = ["status", "-o", "json", "--pid-from", "proc", "--lxcfs-path", lxcfs.path()];
        let rows: serde_json::Value = serde_json::from_str(&succeeds(&args)).unwrap();
        let row = rows.as_array().unwrap().iter().find(|row| fake.container.has(&row["pid"]));
        assert_eq!(row.unwrap()["files"]["meminfo"], "stale");

        let (reader, pods) = (Reader::start(Duration::from_millis(50)), Pods::start());
        let dir = tempfile::tempdir().unwrap();
        let mut agent = agent_of(dir.path(), &pods, lxcfs.path());
        ready(&agent);
        // More than there may be hung threads.
        (0..70).for_each(|_| drop(status(&agent)));
        assert_eq!(get(&agent, "/healthz").0, 200);
        pods.run("in", &reader.id, json!({"kube-lxcfs.io/inject": "true"}));
        has_views("the reader", reader.pid(), ALWAYS.len());
        assert!(fake.has_view(), "it never opted in");
        agent.signal(Signal::SIGKILL);
        eventually_true("no thread of the agent hangs", || !agent.is_running());
    });
}

/// Mounts a file system that does not reply to lookups on this path of a container. `dir` is empty.
fn hang_lookups(container: &Bare, dir: &Path, path: &str) -> Running {
    let at = dir.to_str().unwrap();
    let mut command = program("nsenter");
    command.args(["--target", &container.pid.to_string(), "--mount", "--pid"]);
    command.arg(compiled("fuse_fake")).args(["hang-lookup", "/dev/fuse", at]);
    command.arg(format!("mount --bind {at} {path}"));
    let fake = Running::start(&mut command, &dir.join("fake.log"));
    eventually_true("the fake is ready", || fake.log().contains("ready"));
    fake
}

/// The kernel waits for the reply to a lookup for ever, and then no signal ends the thread.
#[test]
fn hanging_mount_above_a_view_stops_neither_umount_nor_sweep() {
    isolated(|| {
        let mut supervised = Supervised::start(&[]);
        let (hostile, other) = (Bare::start(), Bare::start());
        let path = supervised.path().to_owned();
        let path = path.as_str();
        let of = |bare: &Bare| bare.pid.to_string();
        for bare in [&hostile, &other] {
            succeeds(&["mount", "--pid", &of(bare), "--files", "cpu,stat", "--lxcfs-path", path]);
        }
        let dir = tempfile::tempdir().unwrap();
        let _fake = hang_lookups(&hostile, dir.path(), "/sys/devices");
        let ended = |args: &[&str]| {
            let log = dir.path().join("umount.log");
            let mut umount = Running::start(kube_lxcfs().args(args), &log);
            eventually_true("umount ends", || !umount.is_running());
        };
        ended(&["umount", "--pid", &of(&hostile)]);
        let left = || views(&hostile.mountinfo());
        assert_eq!(left(), ["/sys/devices/system/cpu"]);
        succeeds(&["mount", "--pid", &of(&hostile), "--lxcfs-path", path, "--files", "stat,cpu"]);
        assert_eq!(left().len(), 2);

        let supervisor = &mut supervised.supervisor;
        supervisor.signal(Signal::SIGTERM);
        eventually_true("the supervisor ends", || !supervisor.is_running());
        assert!(views(&other.mountinfo()).is_empty(), "{}", supervisor.log());
        assert_eq!(left(), ["/sys/devices/system/cpu"]);
        ended(&["umount", "--all"]);
    });
}

/// A thread that enters the container has this root, and looks nothing up in it.
#[test]
fn hanging_root_stops_no_pass_over_the_node() {
    isolated(|| {
        let mut supervised = Supervised::start(&[]);
        let (hostile, other) = (Bare::start(), Bare::start());
        let path = supervised.path().to_owned();
        let of_other = other.pid.to_string();
        succeeds(&["mount", "--pid", &of_other, "--lxcfs-path", &path]);
        let dir = tempfile::tempdir().unwrap();
        let _fake = hang_lookups(&hostile, dir.path(), "/");

        let ended = |args: &[&str]| {
            let mut command = kube_lxcfs();
            command.args(args).env("RUST_LOG", "warn");
            let mut command = Running::start(&mut command, &dir.path().join("log"));
            eventually_true("the command ends", || !command.is_running());
            let log = command.log();
            assert!(!log.contains("timed out"), "{log}");
            log
        };
        let rows = ended(&["status", "-o", "json", "--pid-from", "proc", "--lxcfs-path", &path]);
        let rows: Vec<serde_json::Value> = serde_json::from_str(&rows).expect(&rows);
        assert!(rows.len() == 1 && other.has(&rows[0]["pid"]), "{rows:?}");
        ended(&["umount", "--all"]);
        assert_eq!(views(&other.mountinfo()), [""; 0]);
        succeeds(&["mount", "--pid", &of_other, "--lxcfs-path", &path]);
        let supervisor = &mut supervised.supervisor;
        supervisor.signal(Signal::SIGTERM);
        eventually_true("the supervisor ends", || !supervisor.is_running());
        assert_eq!(views(&other.mountinfo()), [""; 0], "{}", supervisor.log());
    });
}

/// A device of another name is not found, so its files are opened: in a process of their own.
#[test]
fn hanging_fake_of_a_hidden_device_costs_one_process() {
    isolated(|| {
        let dir = tempfile::tempdir().unwrap();
        let device = hidden_device(dir.path());
        let (fake, lxcfs) = (Fake::by(&device, "hang"), Lxcfs::start());
        let pods = Pods::start();
        let mut agent = agent_of(dir.path(), &pods, lxcfs.path());
        ready(&agent);
        for _ in 0..5 {
            let rows = status(&agent);
            let row = rows.iter().find(|row| fake.container.has(&row["pid"])).unwrap();
            assert_eq!(row["files"]["meminfo"], "dead");
        }
        let probes = |process: &procfs::process::Process| {
            process.stat().is_ok_and(|stat| stat.ppid == agent.pid())
        };
        let all = procfs::process::all_processes().unwrap().flatten();
        assert!(all.filter(probes).count() <= 1, "a device that hung is remembered");
        assert!(fake.has_view(), "it never opted in");
        agent.signal(Signal::SIGKILL);
        eventually_true("no thread of the agent hangs", || !agent.is_running());
    });
}

/// Many hanging files of one container: the view of another one is swept, and `status` is complete.
#[test]
fn many_hidden_fakes_keep_no_dead_view_of_others() {
    isolated(|| {
        let dir = tempfile::tempdir().unwrap();
        let device = hidden_device(dir.path());
        let container = format!("{}/{:064x}", test_cgroup(), 1);
        let fakes: Vec<Fake> = (0..9).map(|_| Fake::by(&device, "hang")).collect();
        for fake in &fakes {
            enter_cgroup(&container, &[fake.container.pid, fake.container.unshare.pid()]);
        }
        // Its pid is higher than theirs, so its file is opened last.
        let (mut exited, target) = (Lxcfs::start(), Bare::start());
        let pid = target.pid.to_string();
        succeeds(&["mount", "--pid", &pid, "--lxcfs-path", exited.path()]);
        exited.process.kill();

        let (lxcfs, pods) = (Lxcfs::start(), Pods::start());
        let agent = agent_of(dir.path(), &pods, lxcfs.path());
        eventually_true("the target is swept", || views(&target.mountinfo()).is_empty());
        let failures = || metric(&agent, "sweep_failures_total");
        eventually_true("the other devices are counted", || failures() >= 7.0);
        let message = "failed to determine whether the lxcfs has exited";
        let logged = |entry: &&serde_json::Value| entry["message"] == message;
        let entries = agent.entries();
        let logged: Vec<_> = entries.iter().filter(logged).collect();
        assert_eq!(logged.len(), 1, "once per container: {}", agent.log());
        let of_fake = |fake: &Fake| fake.container.has(&logged[0]["pid"]);
        assert!(fakes.iter().any(of_fake) && logged[0]["dev"].is_string(), "{}", agent.log());
        assert!(fakes.iter().all(Fake::has_view), "they never opted in");
        let states = status(&agent);
        let state =
            |state: &str| states.iter().filter(|row| row["files"]["meminfo"] == state).count();
        assert_eq!((state("dead"), state("stale")), (2, 7));
    });
}

/// Its server runs, so the sweep leaves it alone, and the views of others too.
#[test]
fn fake_that_answers_enotconn_gets_nothing_swept() {
    isolated(|| {
        let (fake, old, target) = (Fake::start("ENOTCONN"), Lxcfs::start(), Bare::start());
        let pid = target.pid.to_string();
        succeeds(&["mount", "--pid", &pid, "--lxcfs-path", old.path()]);
        // A supervisor sweeps at its start what has exited.
        let supervised = Supervised::start(&[]);
        assert_eq!(views(&target.mountinfo()).len(), ALWAYS.len());
        assert!(fake.has_view());
        let swept = |e: &serde_json::Value| e["swept_files"].as_u64();
        assert_eq!(supervised.supervisor.entries().iter().filter_map(swept).sum::<u64>(), 0);

        // The probe of a file is of one device only, for any mounts of the container.
        let container = fake.container.pid.to_string();
        let (major, minor) = fake.dev();
        let probe = |minor: &str| succeeds(&["probe", &container, "meminfo", &major, minor]);
        assert_eq!(probe(&minor), "disconnected\n");
        assert_eq!(probe("99999"), "unknown\n");
    });
}

#[test]
fn impostor_is_not_taken_for_the_serving_lxcfs() {
    isolated(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lxcfs");
        fs::create_dir_all(dir.path().join("dev")).unwrap();
        fs::create_dir(&path).unwrap();
        // It is found before lxcfs: its pid is lower.
        let device = dir.path().join("dev/fuse");
        let script =
            format!("exec 3<>{}; exec -a lxcfs sh -c 'sleep 3600; :' \"$0\"", device.display());
        let args = ["--mount", "--propagation", "private", "--fork", "--kill-child"];
        let impostor = Bare::running(&args, &["bash", "-c", &script, path.to_str().unwrap()]);
        eventually_true("it poses as lxcfs", || {
            let args = fs::read(format!("/proc/{}/cmdline", impostor.pid)).unwrap_or_default();
            args.starts_with(b"lxcfs\0")
                && args.ends_with(&[path.as_os_str().as_encoded_bytes(), b"\0"].concat())
        });
        let mut lxcfs = Lxcfs::at(&path);
        let pods = Pods::start();
        let agent = agent_of(dir.path(), &pods, lxcfs.path());
        ready(&agent);
        send(impostor.pid, Signal::SIGKILL);
        drop(impostor);
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(agent.logged(&[("lxcfs", "exited")]), 0, "{}", agent.log());
        lxcfs.process.kill();
        // By the death of its process, not by the probe every 30 s.
        eventually_true("the exit is noticed", || agent.logged(&[("lxcfs", "exited")]) == 1);
        let noticed = [("lxcfs", "exited"), ("noticed_by", "pidfd")];
        assert_eq!(agent.logged(&noticed), 1, "{}", agent.log());
    });
}

#[test]
fn incomplete_requests_do_not_stop_mounting() {
    isolated(|| {
        let (reader, pods) = (Reader::start(Duration::from_millis(50)), Pods::start());
        let lxcfs = Lxcfs::start();
        let dir = tempfile::tempdir().unwrap();
        let mut command = program("prlimit");
        command.args(["--nofile=128:4096", env!("CARGO_BIN_EXE_kube-lxcfs"), "agent"]);
        command.args(["--log-format", "json", "--listen", "127.0.0.1:0", "--node-name", "n1"]);
        command.args(["--pid-from", "proc", "--lxcfs-path", lxcfs.path()]);
        command.env("KUBECONFIG", pods.kubeconfig());
        let agent = Running::start(&mut command, &dir.path().join("agent.log"));
        ready(&agent);
        let limits = fs::read_to_string(format!("/proc/{}/limits", agent.pid())).unwrap();
        let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        let address = http_address(&agent);
        let half: Vec<TcpStream> = (0..300)
            .map(|_| {
                let mut stream = TcpStream::connect(&address).unwrap();
                stream.write_all(b"GET /healthz HTTP/1.1\r\nHost:").unwrap();
                stream
            })
            .collect();
        eventually_true("a few connections stay", || {
            fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap().count() < 128
        });
        assert_eq!(get(&agent, "/healthz"), (200, "ok\n".into()));
        pods.run("in", &reader.id, json!({"kube-lxcfs.io/inject": "true"}));
        has_views("the reader", reader.pid(), ALWAYS.len());
        assert_eq!(files.split_whitespace().nth(3), Some("4096"), "{files}");
        drop(half);
    });
}

/// The value is the one that was read: nothing changes on this machine even if the write succeeds.
#[test]
fn cpu_view_refuses_writes_from_a_user_namespace() {
    isolated(|| {
        let lxcfs = Supervised::start(&[]);
        let args = [&["--user", "--map-root-user"], &OWN_NAMESPACES[..]].concat();
        let target = Bare::with(&args);
        let pid = target.pid.to_string();
        succeeds(&["mount", "--pid", &pid, "--files", "cpu", "--lxcfs-path", lxcfs.path()]);
        let script = "cd /sys/devices/system/cpu && mount -o remount,bind,rw . && cd . \
                      && value=$(cat cpu0/power/control) && echo $value >cpu0/power/control \
                      && echo written";
        let entered = program("nsenter")
            .args(["--target", &pid, "--user", "--mount", "--pid", "sh", "-c", script])
            .output()
            .unwrap();
        let error = stderr(&entered);
        assert!(!stdout(&entered).contains("written"), "the write reached the node");
        assert!(error.contains("Read-only file system"), "{error}");
        assert!(target.mountinfo().contains("/sys/devices/system/cpu rw,"), "it was remounted");
    });
}

#[test]
fn cpu_of_a_writable_lxcfs_is_skipped_with_a_reason() {
    isolated(|| {
        let (lxcfs, target) = (Lxcfs::start(), Bare::start());
        let remount = program("mount").args(["-o", "remount,rw", lxcfs.path()]).output().unwrap();
        assert!(remount.status.success(), "{}", stderr(&remount));
        let pid = target.pid.to_string();
        let output = succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        assert!(output.contains("skipped cpu: lxcfs is writable"), "{output}");
        assert_eq!(views(&target.mountinfo()).len(), ALWAYS.len() - 1);
        let checks = stdout(&run(&["check", "--lxcfs-path", lxcfs.path()]));
        assert!(checks.contains("without cpu, because lxcfs is writable"), "{checks}");
    });
}

/// Makes the file system read-only, but not the mount: the kernel sends no notification of that.
fn make_read_only(path: &Path) {
    let flags = FsPickFlags::FSPICK_CLOEXEC;
    let context = rustix::mount::fspick(rustix::fs::CWD, path, flags).unwrap();
    rustix::mount::fsconfig_set_flag(&context, "ro").unwrap();
    rustix::mount::fsconfig_reconfigure(&context).unwrap();
}

#[test]
fn cpu_is_injected_when_lxcfs_becomes_read_only() {
    isolated(|| {
        let (lxcfs, reader) = (Lxcfs::start(), Reader::start(Duration::from_millis(50)));
        let remount = program("mount").args(["-o", "remount,rw", lxcfs.path()]).output().unwrap();
        assert!(remount.status.success(), "{}", stderr(&remount));
        let (pods, dir) = (Pods::start(), tempfile::tempdir().unwrap());
        let agent = agent_of(dir.path(), &pods, lxcfs.path());
        pods.run("in", &reader.id, json!({"kube-lxcfs.io/inject": "true"}));
        has_views("the reader without cpu", reader.pid(), ALWAYS.len() - 1);
        let injections =
            || metric(&agent, "operations_total{operation=\"inject\",result=\"success\"}");
        eventually_true("the first operation is over", || injections() >= 1.0);
        make_read_only(&lxcfs.path);
        has_views("the reader", reader.pid(), ALWAYS.len());
        eventually_true("the second operation is over", || injections() >= 2.0);
    });
}
