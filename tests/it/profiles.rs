//! The shipped seccomp profile allows what the agent needs, and nothing more: without any of its
//! system calls, a scenario with runc, an API server, containerd and lxcfs fails.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{harness::*, hostile_lxcfs::Fake};

const SECCOMP: &str = include_str!("../../charts/kube-lxcfs/profiles/seccomp-agent.json");
/// The path of the volume with the lxcfs mount in the agent's container.
const VOLUME: &str = "/var/lib/kube-lxcfs";
/// The deadline of each step without a system call. Only a step that never happens takes longer.
const REMOVED_DEADLINE: Duration = Duration::from_secs(10);
/// The limit of runs of the scenario in a test.
const MAX_RUNS: u32 = 300;
/// The message of the log about a probe that hangs.
const HUNG_PROBE: &str = "the file system behind a view file hangs";
/// The name of the API server. Only [`name_server`] knows it.
const API_SERVER: &str = "kubernetes.default.svc";
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// A node with an API server, a runtime with NRI, and a pod.
struct Node {
    pods: Pods,
    containerd: Containerd,
    app: i32,
    lxcfs: Lxcfs,
    dir: tempfile::TempDir,
    runs: u32,
}

impl Node {
    fn start() -> Node {
        // As on a node with systemd: mounts propagate to the volumes of pods.
        let tmp = std::env::temp_dir();
        mount(&["--make-shared", tmp.to_str().unwrap()]);
        std::thread::spawn(name_server);
        let (pods, containerd) = (Pods::start(), Containerd::of(Release::Trixie, true));
        let uid = pods.create("p", json!({}));
        let spec = PodSpec { name: "p", annotations: &[], containers: &["app"] };
        let running = containerd.run_with_uid(&spec, &uid);
        pods.set_running("p", &running.containers["app"]);
        let app = containerd.pid(&running.containers["app"]);
        let (lxcfs, dir) = (Lxcfs::start(), tempfile::tempdir().unwrap());
        Node { pods, containerd, app, lxcfs, dir, runs: 0 }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs the agent in a container with this profile: it injects, remounts and removes views,
    /// sweeps those of an exited lxcfs, and leaves nothing when it stops.
    fn scenario(
        &mut self,
        runtime: &'static str,
        profile: &Value,
        deadline: Duration,
    ) -> Result<(), String> {
        // Below a directory of an exited lxcfs whose name the kernel has dropped, nothing can be
        // mounted (d_set_mounted(), fs/dcache.c): on a busy machine, a cover then fails.
        let dropped = |why: &str| {
            let causes = why.split(['"', ';']);
            causes.into_iter().any(|c| c.contains("failed to cover ") && c.contains("No such file"))
        };
        loop {
            match self.attempt(runtime, profile, deadline) {
                Err(why) if dropped(&why) && self.runs < MAX_RUNS => {}
                result => return result,
            }
        }
    }

    fn attempt(
        &mut self,
        runtime: &'static str,
        profile: &Value,
        deadline: Duration,
    ) -> Result<(), String> {
        self.runs += 1;
        let volume = self.at("volume");
        let path = volume.join("lxcfs");
        fs::create_dir_all(&path).unwrap();
        let nri = self.at("nri");
        fs::create_dir_all(&nri).unwrap();
        mount(&["--bind", self.lxcfs.path(), path.to_str().unwrap()]);
        self.pods.annotate("p", json!({"kube-lxcfs.io/inject": "true"}));
        let mut lxcfs = Lxcfs::start();
        let mut agent = self.agent(runtime, profile, deadline);
        let result = self.steps(&mut agent, &mut lxcfs, &path);
        agent.delete();
        unmount(&path);
        let _ = fs::remove_dir_all(&nri);
        self.pods.annotate("p", json!({"kube-lxcfs.io/inject": "false"}));
        if !views(&mountinfo(self.app)).is_empty() {
            succeeds(&["umount", "--pid", &self.app.to_string()]);
        }
        result
    }

    fn steps(&self, agent: &mut Agent<'_>, lxcfs: &mut Lxcfs, path: &Path) -> Result<(), String> {
        let serving = |path: &Path| Some(device(path));
        agent.wait("it is ready", |agent| agent.get("/readyz").is_ok())?;
        agent.wait("views are injected", |_| self.views_of(serving(path)))?;
        agent.wait("it waits for NRI", |agent| agent.has_fd("anon_inode:inotify"))?;
        std::os::unix::fs::symlink(self.containerd.nri_socket(), self.at("nri/nri.sock")).unwrap();
        agent.wait("NRI is registered", |agent| {
            agent.process.logged(&[("nri", "registered")]) == 1
        })?;
        mount(&["--bind", lxcfs.path(), path.to_str().unwrap()]);
        agent.wait("views are remounted", |_| self.views_of(serving(path)))?;
        agent.wait("the status says so", |agent| {
            agent.get("/status").is_ok_and(|text| text.contains(r#""meminfo":"current""#))
        })?;
        self.pods.annotate("p", json!({"kube-lxcfs.io/inject": "false"}));
        agent.wait("views are removed", |_| self.views_of(None))?;
        self.pods.annotate("p", json!({"kube-lxcfs.io/inject": "true"}));
        agent.wait("views are injected again", |_| self.views_of(serving(path)))?;
        // A nested user namespace: its copies of the views are locked, and are covered.
        let nested = self.nested();
        agent.lxcfs_exits = true;
        // The kernel trusts the name for 1 s more (libfuse's entry timeout).
        fs::metadata(path.join("proc")).unwrap();
        lxcfs.process.kill();
        agent.wait("views of an exited lxcfs are removed", |_| self.views_of(None))?;
        agent.wait("locked views are covered", |_| {
            mountinfo(nested.pid).matches("noatime,nodiratime").count() == ALWAYS.len()
        })?;
        drop(nested);
        agent.wait("no process that probed is left", |agent| {
            agent.children().iter().all(|child| child.state == 'Z' && agent.has_hung_probe())
        })?;
        unmount(path);
        agent.terminate()?;
        // crun's own mount namespace uses the volume too.
        if agent.runtime == "runc" && path.parent().is_some_and(Path::exists) {
            return Err("the volume is left".into());
        }
        agent.unusual()
    }

    /// A process in the container that has mount and user namespaces of its own.
    fn nested(&self) -> Nested {
        let busybox = "/bin/busybox";
        let mut command = program("nsenter");
        command.args(["--target", &self.app.to_string(), "--mount", "--pid"]);
        command.args([busybox, "unshare", "--user", "--map-root-user", "--mount"]);
        let nsenter =
            Running::start(command.args([busybox, "sleep", "3600"]), &self.at("nested.log"));
        let children = format!("/proc/{0}/task/{0}/children", nsenter.pid());
        let pid = eventually("the nested namespace exists", || {
            let children = fs::read_to_string(&children).unwrap_or_default();
            let pid: i32 = children.trim().parse().map_err(|_| nsenter.log())?;
            let args = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if args.starts_with("/bin/busybox\0sleep") { Ok(pid) } else { Err(nsenter.log()) }
        });
        Nested { pid, _nsenter: nsenter }
    }

    /// Whether the container has all view files of this lxcfs, or none.
    fn views_of(&self, device: Option<String>) -> bool {
        let table = mountinfo(self.app);
        let Some(device) = device else { return views(&table).is_empty() };
        let device = format!(" {device} ");
        views(&table).len() == ALWAYS.len()
            && table.lines().filter(|l| l.contains(" - fuse.lxcfs ")).all(|l| l.contains(&device))
    }

    fn agent(&self, runtime: &'static str, profile: &Value, deadline: Duration) -> Agent<'_> {
        let bundle = self.at("bundle");
        let _ = fs::remove_dir_all(&bundle);
        fs::create_dir_all(bundle.join("rootfs/etc")).unwrap();
        let account = format!("rootfs{SERVICE_ACCOUNT}");
        fs::create_dir_all(bundle.join(&account)).unwrap();
        let write = |name: &str, text: &str| fs::write(bundle.join(name), text).unwrap();
        write("rootfs/etc/resolv.conf", "nameserver 127.0.0.1\n");
        write("rootfs/etc/nsswitch.conf", "hosts: files dns\n");
        write("rootfs/etc/hosts", "127.0.0.1 localhost\n");
        let kubeconfig = self.pods.kubeconfig();
        let text = fs::read_to_string(&kubeconfig).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        let token = config["users"][0]["user"]["token"].as_str().unwrap();
        let certificate = kubeconfig.with_file_name("certs").join("apiserver.crt");
        write(&format!("{account}/token"), token);
        write(&format!("{account}/namespace"), "default");
        write(&format!("{account}/ca.crt"), &fs::read_to_string(certificate).unwrap());
        let server = config["clusters"][0]["cluster"]["server"].as_str().unwrap();
        let port = server.rsplit(':').next().unwrap();
        write("config.json", &self.config(profile, port).to_string());
        let id = format!("agent-{}", self.runs);
        let _ = fs::remove_file(self.at("pid"));
        let mut command = if runtime == "crun" {
            self.runtime_script(runtime, CREATE_AND_START)
        } else {
            let mut command = self.runtime(runtime);
            command.arg("run");
            command
        };
        command.arg("--bundle").arg(&bundle).arg("--pid-file").arg(self.at("pid")).arg(&id);
        let without_lock = !profile.to_string().contains("\"flock\"");
        let process = Running::start(&mut command, &self.at(&format!("{id}.log")));
        Agent { node: self, process, runtime, id, deadline, lxcfs_exits: false, without_lock }
    }

    /// An OCI runtime.
    fn runtime(&self, name: &str) -> Command {
        self.runtime_script(name, "exec \"$@\"")
    }

    /// A script with the beginning of a runtime's command. Where cgroups are hybrid, crun needs the
    /// unified ones hidden.
    fn runtime_script(&self, name: &str, script: &str) -> Command {
        let script =
            format!("[ ! -d /sys/fs/cgroup/unified ] || umount /sys/fs/cgroup/unified; {script}");
        let mut command = program("unshare");
        command.args(["--mount", "--propagation", "slave", "sh", "-c", &script, "sh"]);
        command.arg(program(name).get_program()).arg("--root").arg(self.at(name));
        command
    }

    /// The container of the chart's agent.
    fn config(&self, profile: &Value, port: &str) -> Value {
        let bind = |from: &Path, to: &str, options: &[&str]| {
            let options = [&["bind"], options].concat();
            json!({"source": from, "destination": to, "type": "bind", "options": options})
        };
        let binary = Path::new(env!("CARGO_BIN_EXE_kube-lxcfs"));
        let mut mounts = vec![
            json!({"destination": "/proc", "type": "proc", "source": "proc",
                "options": ["nosuid", "noexec", "nodev"]}),
            json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"]}),
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755"]}),
            bind(binary, "/usr/bin/kube-lxcfs", &["ro"]),
            bind(&self.at("volume"), VOLUME, &["rbind", "rslave"]),
        ];
        let ldd = program("ldd").arg(binary).output().unwrap();
        let libraries = stdout(&ldd);
        let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
        mounts.extend(libraries.map(|path| bind(Path::new(path), path, &["ro"])));
        let args = ["/usr/bin/kube-lxcfs", "agent", "--log-format", "json", "--listen"];
        let args = [&args[..], &["[::1]:0", "--node-name", "n1"]].concat();
        let capabilities = ["CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE"];
        json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs", "readonly": true},
            "process": {
                "user": {"uid": 0, "gid": 0},
                "cwd": "/",
                "args": args,
                "env": [
                    "PATH=/usr/bin", "RUST_LOG=kube_lxcfs=debug",
                    format!("KUBERNETES_SERVICE_HOST={API_SERVER}"),
                    format!("KUBERNETES_SERVICE_PORT={port}"),
                    format!("KUBE_LXCFS_LXCFS_PATH={VOLUME}/lxcfs"),
                    "KUBE_LXCFS_HOST_ROOT=/proc/1/root",
                    format!("KUBE_LXCFS_CRI_ENDPOINT={}", self.containerd.endpoint()),
                    format!("KUBE_LXCFS_NRI_SOCKET={}", self.at("nri/nri.sock").display()),
                ],
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                },
                "noNewPrivileges": false,
            },
            "mounts": mounts,
            "linux": {
                // The pids and the network of the test, as those of the node.
                "namespaces": [{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
                // As the CRI does for a volume with HostToContainer.
                "rootfsPropagation": "rslave",
                "cgroupsPath": format!("{}/agent", test_cgroup()),
                "seccomp": profile,
            },
        })
    }
}

struct Nested {
    pid: i32,
    _nsenter: Running,
}

impl Drop for Nested {
    fn drop(&mut self) {
        send(self.pid, Signal::SIGKILL);
    }
}

/// The agent in its container.
struct Agent<'n> {
    node: &'n Node,
    process: Running,
    runtime: &'static str,
    id: String,
    deadline: Duration,
    /// The test stops lxcfs, which the agent reports.
    lxcfs_exits: bool,
    /// The profile lacks flock(2).
    without_lock: bool,
}

impl Agent<'_> {
    /// Waits until a step is done. Fails early if the agent exits, or logs an unusual error.
    fn wait(&mut self, step: &str, done: impl Fn(&mut Self) -> bool) -> Result<(), String> {
        let started = Instant::now();
        while !done(self) {
            let exited = !self.process.is_running();
            self.unusual().map_err(|why| format!("{step}: {why}"))?;
            if exited {
                return Err(format!("{step}: it has exited"));
            }
            if started.elapsed() > self.deadline {
                return Err(format!("{step}: not within {:?}", self.deadline));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Fails if its log has a warning or an error, or a line that is not of its log.
    fn unusual(&self) -> Result<(), String> {
        let text = self.process.log();
        let complete = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let usual = |line: &&str| {
            let Ok(entry) = serde_json::from_str::<Value>(line) else { return false };
            let outage = entry["subject"] == "lxcfs" && self.lxcfs_exits;
            let waited = entry["elapsed"].as_str().is_some_and(|t| self.without_lock && waited(t));
            let hung = entry["message"] == HUNG_PROBE;
            hung || !waited && ((entry["level"] != "WARN" && entry["level"] != "ERROR") || outage)
        };
        let unusual: Vec<&str> = complete.filter(|line| !usual(line)).collect();
        if unusual.is_empty() { Ok(()) } else { Err(unusual.concat()) }
    }

    /// The body of a response with status 200.
    fn get(&self, path: &str) -> Result<String, String> {
        let entries = self.process.entries();
        let address = entries.iter().find_map(|e| e["http_address"].as_str());
        let address = address.ok_or("it does not listen yet")?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: x\r\n\r\n");
        let mut response = String::new();
        let exchanged = TcpStream::connect(address).and_then(|mut stream| {
            stream.set_read_timeout(Some(self.deadline))?;
            stream.write_all(request.as_bytes())?;
            stream.read_to_string(&mut response)
        });
        exchanged.map_err(|e| e.to_string())?;
        let (head, body) = response.split_once("\r\n\r\n").ok_or("no head")?;
        if head.split(' ').nth(1) == Some("200") { Ok(body.into()) } else { Err(body.into()) }
    }

    fn pid(&self) -> Option<i32> {
        fs::read_to_string(self.node.at("pid")).ok()?.parse().ok()
    }

    /// Its child processes, zombies too.
    fn children(&self) -> Vec<procfs::process::Stat> {
        let all = procfs::process::all_processes().unwrap().flatten();
        let stats = all.filter_map(|process| process.stat().ok());
        stats.filter(|stat| Some(stat.ppid) == self.pid()).collect()
    }

    /// Whether it has reported a probe that hangs. It reaps that one at a later probe.
    fn has_hung_probe(&self) -> bool {
        self.process.entries().iter().any(|entry| entry["message"] == HUNG_PROBE)
    }

    /// Whether it has this open.
    fn has_fd(&self, link: &str) -> bool {
        let Some(pid) = self.pid() else { return false };
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        fds.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|to| to == Path::new(link))
    }

    /// Sends SIGTERM, upon which it must exit with status 0.
    fn terminate(&mut self) -> Result<(), String> {
        send(self.pid().ok_or("it has not started")?, Signal::SIGTERM);
        let started = Instant::now();
        loop {
            match self.process.child.try_wait().unwrap() {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(format!("SIGTERM: {status}")),
                None if started.elapsed() > self.deadline => {
                    return Err("SIGTERM: it does not exit".into());
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Removes the container.
    fn delete(&mut self) {
        let mut command = self.node.runtime(self.runtime);
        let _ = command.args(["delete", "--force", &self.id]).output().unwrap();
        self.process.kill();
    }
}

/// Whether an operation took as long as one that waits for the lock of a namespace in vain.
fn waited(elapsed: &str) -> bool {
    let ms = elapsed.strip_suffix("ms").and_then(|ms| ms.parse::<f64>().ok());
    ms.map_or(elapsed.parse::<f64>().is_err() && !elapsed.contains('µ'), |ms| ms >= 500.0)
}

fn mount(args: &[&str]) {
    let done = program("mount").args(args).output().unwrap();
    assert!(done.status.success(), "{args:?}: {}", stderr(&done));
}

/// The device of the file system at a path, as in a mount table.
fn device(path: &Path) -> String {
    let table = own_mountinfo();
    let at_path = |line: &&str| line.split(' ').nth(4) == path.to_str();
    table.lines().rev().find(at_path).unwrap().split(' ').nth(2).unwrap().to_owned()
}

/// A DNS server: every name has the IPv4 address 127.0.0.1, and no other record.
fn name_server() {
    const A: [u8; 2] = [0, 1];
    let socket = UdpSocket::bind("127.0.0.1:53").unwrap();
    let mut query = [0; 512];
    while let Ok((length, from)) = socket.recv_from(&mut query) {
        // The header has 12 bytes. The question is a name, which ends with 0, a type and a class.
        let end = query[12..length].iter().position(|b| *b == 0).unwrap() + 12 + 5;
        let is_a = query[end - 4..end - 2] == A;
        let mut answer = query[..end].to_vec();
        // A response without error, one question, no authority, no further records.
        answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
        if is_a {
            // The name of the question, IN, 60 s, 4 bytes.
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
        }
        let _ = socket.send_to(&answer, from);
    }
}

fn profile() -> Value {
    serde_json::from_str(SECCOMP).unwrap()
}

/// The profile without a system call in one rule.
fn without(name: &str, rule: usize) -> Value {
    let mut profile = profile();
    let rules = profile["syscalls"].as_array_mut().unwrap();
    rules[rule]["names"].as_array_mut().unwrap().retain(|other| other != name);
    rules.retain(|rule| rule["names"] != json!([]));
    profile
}

/// System calls of every program. Their removal shows only in other circumstances: more memory, a
/// signal, an abort, a clock that the vDSO does not read, a machine without `/dev/urandom`.
const BASE: [&str; 16] = [
    "brk",
    "clock_gettime",
    "clock_nanosleep",
    "exit_group",
    "getpid",
    "getrandom",
    "gettid",
    "madvise",
    "mremap",
    "munmap",
    "restart_syscall",
    "rt_sigprocmask",
    "sched_getaffinity",
    "set_tid_address",
    "sigaltstack",
    "tgkill",
];
/// System calls of arm64, each with the one that x86-64 has for the same.
const ARM64: [(&str, &str); 3] =
    [("dup3", "dup2"), ("epoll_pwait", "epoll_wait"), ("unlinkat", "rmdir")];
/// System calls that only crun makes. All others of container runtimes are made by runc.
const CRUN: [&str; 3] = ["pselect6", "setresgid", "setresuid"];
/// What is removed in every run of the tests: what needs a capability, or has a condition. The rest
/// is removed with `PROFILE_REMOVALS=all`.
const ALWAYS_REMOVED: [&str; 21] = [
    "capset",
    "clone",
    "clone3",
    "execve",
    "flock",
    "fsconfig",
    "fsmount",
    "fsopen",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "openat2",
    "pidfd_open",
    "pselect6",
    "rmdir",
    "setns",
    "setresuid",
    "socket",
    "umount2",
    "unshare",
];

/// `create` and `start`, as container engines do. crun makes other system calls in these than in
/// `run`. Ends with the container.
const CREATE_AND_START: &str = r#"
    "$1" "$2" "$3" create "$4" "$5" "$6" "$7" "$8" && "$1" "$2" "$3" start "$8" || exit
    pid=$(cat "$7")
    while [ -d "/proc/$pid" ] && ! grep -qs '^State:.Z' "/proc/$pid/status"; do sleep 0.05; done"#;

#[test]
fn seccomp_profile_is_complete_and_minimal() {
    isolated(|| {
        let mut node = Node::start();
        for runtime in ["runc", "crun"] {
            node.scenario(runtime, &profile(), DEADLINE).unwrap();
        }
        let all = std::env::var("PROFILE_REMOVALS").is_ok_and(|value| value == "all");
        let rules = profile()["syscalls"].as_array().unwrap().clone();
        let names = rules.iter().enumerate().flat_map(|(n, rule)| {
            let names = rule["names"].as_array().unwrap().iter();
            names.map(move |name| (n, name.as_str().unwrap()))
        });
        let mut unneeded = Vec::new();
        for (rule, name) in names.filter(|(_, name)| all || ALWAYS_REMOVED.contains(name)) {
            let of_arm64 = ARM64.iter().any(|(arm64, _)| *arm64 == name);
            // Without these the agent reads mount tables.
            let optional = BASE.contains(&name) || ["listmount", "statmount"].contains(&name);
            if optional || (of_arm64 && cfg!(target_arch = "x86_64")) {
                continue;
            }
            let runtime = if CRUN.contains(&name) { "crun" } else { "runc" };
            // Only a process that hangs is killed.
            let stopped = (name == "kill").then(Fake::stopped);
            match node.scenario(runtime, &without(name, rule), REMOVED_DEADLINE) {
                Ok(()) => unneeded.push(name),
                Err(why) => println!("without {name} (rule {rule}): {}", first_line(&why)),
            }
            if stopped.is_some() {
                node.scenario(runtime, &profile(), DEADLINE).unwrap();
            }
        }
        assert_eq!(unneeded, Vec::<&str>::new(), "the scenario passes without them");
    });
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(160).collect()
}
