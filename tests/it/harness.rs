//! What the tests are made of: an own lxcfs, an own containerd, bare mount namespaces, the
//! kube-lxcfs binary. Each has its own folder, and its end leaves no process, mount or cgroup
//! behind, also when the test panics. What is missing is a failure.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Debug,
    fs,
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::{
    self as cri, image_service_client::ImageServiceClient,
    runtime_service_client::RuntimeServiceClient,
};
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint, Uri};

pub(crate) const IMAGE: &str = "localhost/kube-lxcfs/busybox:1";
/// More than any machine needs; a test that waits so long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `what` holds.
///
/// # Panics
/// When it does not within [`PATIENCE`].
pub(crate) fn eventually<T: Debug>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(why) if begun.elapsed() > PATIENCE => {
                panic!("{what}: not within {PATIENCE:?}: {why}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The same for a plain condition.
pub(crate) fn eventually_true(what: &str, mut look: impl FnMut() -> bool) {
    eventually(what, || look().then_some(()).ok_or_else(|| "it is not so".into()));
}

/// A command that must be on this machine.
pub(crate) fn program(name: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let found = path.split(':').map(|dir| Path::new(dir).join(name)).find(|p| p.exists());
    Command::new(found.unwrap_or_else(|| {
        panic!("this test needs {name}, which is not installed; run it by `make test`")
    }))
}

/// A child process that is killed and reaped at the end of the test.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) child: Child,
    log: Option<PathBuf>,
}

impl Running {
    pub(crate) fn start(command: &mut Command, log: &Path) -> Running {
        let out = fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        command.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out).process_group(0);
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        Running { child, log: Some(log.to_owned()) }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).unwrap();
    }

    pub(crate) fn log(&self) -> String {
        self.log.as_ref().and_then(|log| fs::read_to_string(log).ok()).unwrap_or_default()
    }

    /// Ends it in good order.
    pub(crate) fn terminate(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            self.signal(nix::sys::signal::Signal::SIGTERM);
            let begun = Instant::now();
            while self.child.try_wait().is_ok_and(|status| status.is_none())
                && begun.elapsed() < Duration::from_secs(10)
            {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        self.kill();
    }

    /// Kills it, and waits for its end for a while only: one of its threads may wait for an lxcfs
    /// that hangs, which no signal ends.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let begun = Instant::now();
        while self.child.try_wait().is_ok_and(|status| status.is_none())
            && begun.elapsed() < Duration::from_secs(5)
        {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> =
                log.lines().filter(|l| !l.contains("lxcfs: ")).rev().take(40).collect();
            eprintln!("--- the log of pid {} ends:", self.pid());
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// An own lxcfs.
#[derive(Debug)]
pub(crate) struct Lxcfs {
    pub(crate) path: PathBuf,
    pub(crate) process: Running,
    dir: TempDir,
}

impl Lxcfs {
    pub(crate) fn start() -> Lxcfs {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lxcfs");
        fs::create_dir(&path).unwrap();
        let process = Lxcfs::serve(&path, dir.path());
        Lxcfs { path, process, dir }
    }

    /// Starts it again at the same path.
    pub(crate) fn again(&mut self) {
        self.process = Lxcfs::serve(&self.path, self.dir.path());
    }

    fn serve(path: &Path, dir: &Path) -> Running {
        let mut lxcfs = program("lxcfs");
        lxcfs
            .args(["-f", "-l", "--enable-cfs", "--enable-pidfd", "-p"])
            .arg(dir.join("pid"))
            .arg(path);
        let process = Running::start(&mut lxcfs, &dir.join("log"));
        eventually("lxcfs serves", || {
            fs::read_to_string(path.join("proc/uptime"))
                .map_err(|e| format!("{e}: {}", process.log()))
        });
        process
    }

    pub(crate) fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

impl Drop for Lxcfs {
    fn drop(&mut self) {
        self.process.kill();
        unmount(&self.path);
    }
}

/// An lxcfs run by `kube-lxcfs lxcfs`.
#[derive(Debug)]
pub(crate) struct Supervised {
    pub(crate) path: PathBuf,
    pub(crate) supervisor: Running,
    pub(crate) dir: TempDir,
    args: Vec<String>,
    /// Reaped when their lxcfs has ended.
    former: Vec<Running>,
}

impl Supervised {
    pub(crate) fn start(args: &[&str]) -> Supervised {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lxcfs");
        Supervised::with(path, dir, args)
    }

    #[allow(dead_code, reason = "for the tests")]
    /// At a path of the caller's.
    pub(crate) fn at(path: &Path) -> Supervised {
        Supervised::with(path.to_owned(), tempfile::tempdir().unwrap(), &[])
    }

    fn with(path: PathBuf, dir: TempDir, args: &[&str]) -> Supervised {
        let args: Vec<String> = args.iter().map(|s| (*s).to_owned()).collect();
        let supervisor = Supervised::spawn(&path, dir.path(), &args);
        let supervised = Supervised { path, supervisor, dir, args, former: Vec::new() };
        supervised.serves();
        supervised
    }

    pub(crate) fn spawn(path: &Path, dir: &Path, args: &[String]) -> Running {
        let mut command = kube_lxcfs();
        command.arg("lxcfs").arg("--lxcfs-path").arg(path).args(args);
        Running::start(&mut command, &dir.join("supervisor.log"))
    }

    /// Starts it again, after it was ended or killed.
    pub(crate) fn again(&mut self) {
        let supervisor = Supervised::spawn(&self.path, self.dir.path(), &self.args);
        self.former.push(std::mem::replace(&mut self.supervisor, supervisor));
    }

    pub(crate) fn serves(&self) {
        eventually("lxcfs serves", || {
            fs::read_to_string(self.path.join("proc/uptime"))
                .map_err(|e| format!("{e}: {}", self.supervisor.log()))
        });
    }

    /// The pid of the lxcfs that the supervisor runs now.
    pub(crate) fn lxcfs(&self) -> i32 {
        let supervisor = self.supervisor.pid();
        eventually("lxcfs runs", || {
            let children =
                fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"))
                    .unwrap_or_default();
            // At its start it also asks `lxcfs --help`.
            let serves = |pid: &i32| {
                fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|args| {
                    let args: Vec<&[u8]> = args.split(|b| *b == 0).collect();
                    args.contains(&&b"-f"[..])
                        && args.contains(&self.path.as_os_str().as_encoded_bytes())
                })
            };
            let mut pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
            pids.find(serves).ok_or_else(|| self.supervisor.log())
        })
    }

    pub(crate) fn signal_lxcfs(&self, signal: nix::sys::signal::Signal) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.lxcfs()), signal);
    }

    pub(crate) fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        let lxcfs = |process: &procfs::process::Process| {
            process.cmdline().is_ok_and(|args| args.iter().any(|arg| Path::new(arg) == self.path))
        };
        let _ = self.supervisor.child.kill();
        for process in
            procfs::process::all_processes().into_iter().flatten().flatten().filter(lxcfs)
        {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(process.pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        unmount(&self.path);
    }
}

/// What a reader inside a container saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) own: u64,
    pub(crate) host: u64,
    pub(crate) errors: u64,
    /// In ns since the epoch; 0 for never.
    pub(crate) last_error: u128,
    pub(crate) last_host: u128,
    pub(crate) rounds: u64,
}

impl Seen {
    pub(crate) fn and(self, other: Seen) -> Seen {
        Seen {
            own: self.own + other.own,
            host: self.host + other.host,
            errors: self.errors + other.errors,
            last_error: self.last_error.max(other.last_error),
            last_host: self.last_host.max(other.last_host),
            rounds: self.rounds + other.rounds,
        }
    }
}

/// The memory limit of containers with a reader, in MiB.
pub(crate) const READER_MIB: u64 = 77;

/// A container that is a bare namespace in a cgroup of its own, named as a runtime names it, with a
/// reader as its first process.
#[derive(Debug)]
pub(crate) struct Reader {
    bare: Bare,
    pub(crate) id: String,
    cgroups: Vec<PathBuf>,
    out: PathBuf,
    _dir: TempDir,
}

/// The reader's program, compiled once.
fn reader_program() -> &'static Path {
    static PROGRAM: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    PROGRAM.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/reader.rs");
        let program =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("reader-{}", std::process::id()));
        let mut rustc = Command::new(std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into()));
        rustc
            .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-o"])
            .arg(&program)
            .arg(source);
        let compiled = rustc.output().unwrap_or_else(|e| panic!("this test needs rustc: {e}"));
        assert!(compiled.status.success(), "{}", stderr(&compiled));
        program
    })
}

/// The view files that readers read in turn.
const READ: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/sys/devices/system/cpu/online",
];

impl Reader {
    pub(crate) fn start(pause: Duration) -> Reader {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let id = format!("{:032x}{number:032x}", std::process::id());
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("seen");
        let program = reader_program().to_str().unwrap();
        let command = reader_command(program, out.to_str().unwrap(), READER_MIB, pause);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let args = [
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ];
        let bare = Bare::running(&args, &command);
        let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let roots: &[&str] = if v2 {
            &["/sys/fs/cgroup"]
        } else {
            &["/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids"]
        };
        let limit = if v2 { "memory.max" } else { "memory.limit_in_bytes" };
        let mut reader = Reader { bare, id, cgroups: Vec::new(), out, _dir: dir };
        for root in roots {
            let cgroup = Path::new(root).join(&reader.id);
            fs::create_dir(&cgroup).unwrap();
            reader.cgroups.push(cgroup.clone());
            if cgroup.join(limit).exists() {
                fs::write(cgroup.join(limit), (READER_MIB << 20).to_string()).unwrap();
            }
            // unshare(1) is in the namespace too.
            for pid in [reader.bare.pid, reader.bare.unshare.pid()] {
                fs::write(cgroup.join("cgroup.procs"), pid.to_string()).unwrap();
            }
        }
        reader
    }

    /// Begins to read.
    pub(crate) fn go(&self) {
        go(&self.out);
    }

    /// Ends reading.
    pub(crate) fn stop(&self) -> Seen {
        stop(&self.out)
    }

    pub(crate) fn mountinfo(&self) -> String {
        self.bare.mountinfo()
    }

    pub(crate) fn pid(&self) -> i32 {
        self.bare.pid
    }

    #[allow(dead_code, reason = "for the benchmarks")]
    pub(crate) fn out(&self) -> &Path {
        &self.out
    }
}

/// A reader's command line.
fn reader_command(program: &str, out: &str, own_mib: u64, pause: Duration) -> Vec<String> {
    let own = [
        program.to_owned(),
        out.to_owned(),
        (own_mib << 10).to_string(),
        pause.as_millis().to_string(),
    ];
    own.into_iter().chain(READ.map(str::to_owned)).collect()
}

/// Lets a reader begin.
pub(crate) fn go(out: &Path) {
    for old in [out.to_owned(), out.with_extension("started"), out.with_extension("stop")] {
        let _ = fs::remove_file(old);
    }
    fs::write(out.with_extension("go"), "").unwrap();
    eventually_true("the reader reads", || out.with_extension("started").exists());
}

/// Ends a reader and tells what it saw.
pub(crate) fn stop(out: &Path) -> Seen {
    fs::write(out.with_extension("stop"), "").unwrap();
    let told =
        eventually("the reader has ended", || fs::read_to_string(out).map_err(|e| e.to_string()));
    let number: Vec<u128> = told.split_whitespace().map(|n| n.parse().unwrap()).collect();
    let [own, host, errors, last_error, last_host, rounds] = number.try_into().unwrap();
    let small = |n: u128| u64::try_from(n).unwrap();
    Seen {
        own: small(own),
        host: small(host),
        errors: small(errors),
        last_error,
        last_host,
        rounds: small(rounds),
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Its processes first, or the cgroup is not empty.
        self.bare.unshare.kill();
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.bare.pid),
            nix::sys::signal::Signal::SIGKILL,
        );
        for cgroup in &self.cgroups {
            for _ in 0..200 {
                if fs::remove_dir(cgroup).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// Detaches whatever is mounted at a path, all layers.
pub(crate) fn unmount(path: &Path) {
    while nix::mount::umount2(
        path,
        nix::mount::MntFlags::MNT_DETACH | nix::mount::MntFlags::UMOUNT_NOFOLLOW,
    )
    .is_ok()
    {}
}

/// A process in a mount namespace of its own, with its own `/proc`.
#[derive(Debug)]
pub(crate) struct Bare {
    unshare: Running,
    pub(crate) pid: i32,
    _dir: TempDir,
}

impl Bare {
    pub(crate) fn start() -> Bare {
        Bare::with(&[
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
    }

    /// With these arguments for unshare(1), among them `--fork`.
    pub(crate) fn with(args: &[&str]) -> Bare {
        Bare::running(args, &["sleep", "3600"])
    }

    pub(crate) fn running(args: &[&str], command: &[&str]) -> Bare {
        let dir = tempfile::tempdir().unwrap();
        let unshare = Running::start(
            program("unshare").args(args).arg("--").args(command),
            &dir.path().join("log"),
        );
        let children = format!("/proc/{0}/task/{0}/children", unshare.pid());
        let pid = eventually("the namespace is there", || {
            let pid: i32 =
                fs::read_to_string(&children).unwrap().trim().parse().map_err(|_| unshare.log())?;
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if comm.trim() == "unshare" { Err("it is not yet made".into()) } else { Ok(pid) }
        });
        Bare { unshare, pid, _dir: dir }
    }

    /// A file as a process inside reads it.
    pub(crate) fn read(&self, path: &str) -> String {
        let output = program("nsenter")
            .args(["--target", &self.pid.to_string(), "--mount", "cat", path])
            .output()
            .unwrap();
        String::from_utf8_lossy(&if output.status.success() {
            output.stdout
        } else {
            output.stderr
        })
        .into_owned()
    }

    /// Its mount table, but for the mounts of other tests' folders: the namespace has copies of
    /// those that were there when it was made, and they go when their folders do.
    pub(crate) fn mountinfo(&self) -> String {
        let others = std::env::temp_dir();
        let kept = |line: &&str| {
            line.split(' ').nth(4).is_none_or(|point| !Path::new(point).starts_with(&others))
        };
        mountinfo(self.pid).split_inclusive('\n').filter(kept).collect()
    }

    /// Whether this is the pid of one of its processes: unshare(1) itself is in the namespace too.
    pub(crate) fn has(&self, pid: &serde_json::Value) -> bool {
        [self.pid, self.unshare.pid()].iter().any(|own| pid == *own)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.unshare.kill();
    }
}

pub(crate) fn mountinfo(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap()
}

/// The view files in a mount table, as mount points.
pub(crate) fn views(mountinfo: &str) -> Vec<String> {
    let view = |line: &&str| line.contains(" - fuse.lxcfs ") && line.contains("noexec,noatime");
    let mut points: Vec<String> = mountinfo
        .lines()
        .filter(view)
        .map(|line| line.split(' ').nth(4).unwrap().to_owned())
        .collect();
    points.sort();
    points
}

pub(crate) fn kube_lxcfs() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-lxcfs"));
    // Nothing of this machine's own set-up.
    command.env_remove("NODE_NAME").env_remove("KUBECONFIG").env_remove("RUST_BACKTRACE");
    command
}

/// Runs the binary to its end.
pub(crate) fn run(args: &[&str]) -> Output {
    kube_lxcfs().args(args).output().unwrap()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs the binary, which must succeed, and returns what it printed.
pub(crate) fn succeeds(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

/// Runs the binary, which must fail with one line of error, and returns that.
pub(crate) fn fails(args: &[&str]) -> String {
    let output = run(args);
    error_line(&output)
}

pub(crate) fn error_line(output: &Output) -> String {
    let told = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(told.starts_with("error: "), "{told}");
    told
}

/// Runs the agent until the end of the test.
pub(crate) fn agent(dir: &Path, args: &[&str], env: &[(&str, &str)]) -> Running {
    let mut command = kube_lxcfs();
    command.arg("agent").args(["--listen", "127.0.0.1:0"]).args(args);
    if std::env::var_os("RUST_LOG").is_none() {
        command.env("RUST_LOG", "kube_lxcfs=debug");
    }
    command.envs(env.iter().copied());
    Running::start(&mut command, &dir.join("agent.log"))
}

/// An own containerd, with the image in it.
#[derive(Debug)]
pub(crate) struct Containerd {
    pub(crate) dir: TempDir,
    /// Where its programs are, when not this machine's own.
    root: Option<PathBuf>,
    process: Option<Running>,
    runtime: tokio::runtime::Runtime,
    channel: Channel,
    client: RuntimeServiceClient<Channel>,
    cgroup: String,
}

/// A pod to run: its annotations and its containers' names.
#[derive(Clone, Debug, Default)]
pub(crate) struct PodSpec<'a> {
    pub(crate) name: &'a str,
    pub(crate) annotations: &'a [(&'a str, &'a str)],
    pub(crate) containers: &'a [&'a str],
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub(crate) struct RunningPod {
    pub(crate) sandbox: String,
    config: cri::PodSandboxConfig,
    pub(crate) containers: BTreeMap<String, String>,
}

/// The memory limit of every test container, in MiB.
pub(crate) const MEMORY_MIB: u64 = 96;

/// Which containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Release {
    /// This machine's own: 1.6 on Debian 12.
    Own,
    /// Of Debian trixie: 1.7.
    Trixie,
    /// Of Debian sid: 2.
    Sid,
}

impl Containerd {
    pub(crate) fn start() -> Containerd {
        Containerd::of(Release::Own, false)
    }

    /// Of another release, with NRI on or off.
    pub(crate) fn of(release: Release, nri: bool) -> Containerd {
        let root = match release {
            Release::Own => None,
            Release::Trixie => Some(cache("debian/trixie")),
            Release::Sid => Some(cache("debian/sid")),
        };
        let dir = tempfile::Builder::new().prefix("kl").tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let config = format!(
            r#"version = 2
root = "{}"
state = "{}"
[grpc]
address = "{}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{IMAGE}"
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{}"
conf_dir = "{}"
[plugins."io.containerd.internal.v1.opt"]
path = "{}"
[plugins."io.containerd.nri.v1.nri"]
disable = {}
socket_path = "{}"
plugin_path = "{}"
plugin_config_path = "{}"
"#,
            at("root"),
            at("state"),
            at("sock"),
            at("cni"),
            at("cni"),
            at("opt"),
            !nri,
            at("nri.sock"),
            at("nri-plugins"),
            at("nri-config"),
        );
        fs::write(at("config.toml"), config).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let socket = dir.path().join("sock");
        let channel = runtime.block_on(async {
            let dial = move |_: Uri| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
            };
            Endpoint::from_static("http://localhost")
                .connect_with_connector_lazy(tower::service_fn(dial))
        });
        let client = RuntimeServiceClient::new(channel.clone());
        let cgroup = format!("/{}", dir.path().file_name().unwrap().to_str().unwrap());
        let mut containerd =
            Containerd { dir, root, process: None, runtime, channel, client, cgroup };
        containerd.up();
        let image = cache("busybox-image-1.tar");
        let imported = containerd
            .program("ctr")
            .args(["-a", &at_dir(&containerd.dir, "sock"), "-n", "k8s.io", "images", "import"])
            .arg(image)
            .output()
            .unwrap();
        assert!(imported.status.success(), "{}", stderr(&imported));
        // CRI learns of it a moment later.
        let image = || Some(cri::ImageSpec { image: IMAGE.into(), ..Default::default() });
        eventually("CRI has the image", || {
            let mut images = ImageServiceClient::new(containerd.channel.clone());
            let request = cri::ImageStatusRequest { image: image(), verbose: false };
            let status = containerd
                .runtime
                .block_on(images.image_status(request))
                .map_err(|e| e.to_string())?;
            status.into_inner().image.ok_or_else(|| "not yet".to_owned())
        });
        containerd
    }

    /// Starts the daemon (again).
    pub(crate) fn up(&mut self) {
        let mut command = self.program("containerd");
        command.arg("--config").arg(self.dir.path().join("config.toml"));
        let process = Running::start(&mut command, &self.dir.path().join("containerd.log"));
        let client = self.client.clone();
        eventually("containerd answers", || {
            let answer =
                self.runtime.block_on(client.clone().version(cri::VersionRequest::default()));
            answer.map_err(|e| format!("{e}: {}", process.log()))
        });
        self.process = Some(process);
    }

    /// Ends the daemon; containers go on.
    pub(crate) fn down(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.terminate();
        }
    }

    /// One of its programs.
    fn program(&self, name: &str) -> Command {
        let Some(root) = &self.root else { return program(name) };
        let bin = root.join("usr/bin");
        let mut command = Command::new(bin.join(name));
        // Its shim before this machine's own.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}:/usr/sbin:/sbin", bin.display()));
        command
    }

    pub(crate) fn nri_socket(&self) -> String {
        at_dir(&self.dir, "nri.sock")
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("unix://{}", at_dir(&self.dir, "sock"))
    }

    fn call<T>(
        &self,
        call: impl AsyncFnOnce(
            RuntimeServiceClient<Channel>,
        ) -> Result<tonic::Response<T>, tonic::Status>,
    ) -> T {
        self.runtime.block_on(call(self.client.clone())).unwrap().into_inner()
    }

    /// Runs a pod on the host's network: no CNI is needed.
    pub(crate) fn run(&self, spec: &PodSpec<'_>) -> RunningPod {
        let mut annotations: HashMap<String, String> = HashMap::new();
        annotations
            .extend(spec.annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        let namespaces = namespaces();
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: spec.name.into(),
                uid: format!("uid-{}", spec.name),
                namespace: "default".into(),
                attempt: 0,
            }),
            annotations,
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup.clone(),
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let sandbox = self.call(async |mut c| c.run_pod_sandbox(request).await).pod_sandbox_id;
        let mut pod = RunningPod { sandbox, config, containers: BTreeMap::new() };
        for name in spec.containers {
            self.start_container(&mut pod, name, 0);
        }
        pod
    }

    #[allow(dead_code, reason = "for the benchmarks")]
    /// A pod with a reader in its container; the folder is where it tells what it saw.
    pub(crate) fn run_reader(&self, name: &str, pause: Duration) -> (String, PathBuf) {
        let mut pod = self.run(&PodSpec { name, annotations: &[], containers: &[] });
        let dir = self.dir.path().join(name);
        fs::create_dir(&dir).unwrap();
        let mount = |container_path: &str, host: &Path| cri::Mount {
            container_path: container_path.into(),
            host_path: host.to_str().unwrap().into(),
            ..Default::default()
        };
        let mounts = vec![mount("/out", &dir), mount("/reader", reader_program())];
        let command = reader_command("/reader", "/out/seen", MEMORY_MIB, pause);
        self.start_with(&mut pod, "app", 0, command, mounts);
        (pod.containers["app"].clone(), dir.join("seen"))
    }

    /// Creates and starts a container; its id replaces that of an earlier attempt.
    pub(crate) fn start_container(&self, pod: &mut RunningPod, name: &str, attempt: u32) {
        self.start_with(pod, name, attempt, vec!["sleep".into(), "3600".into()], Vec::new());
    }

    /// Runs a shell script in a container of a pod that is there; returns the time that its start
    /// took, and where what it prints will be, whole, when it has ended.
    pub(crate) fn start_script(
        &self,
        pod: &mut RunningPod,
        name: &str,
        script: &str,
    ) -> (Duration, PathBuf) {
        let out = self.dir.path().join(format!("out-{}", pod.sandbox));
        fs::create_dir_all(&out).unwrap();
        let mount = cri::Mount {
            container_path: "/out".into(),
            host_path: out.to_str().unwrap().into(),
            ..Default::default()
        };
        let script = format!(
            "{{ {script}; }} >/out/{name}.new 2>&1; mv /out/{name}.new /out/{name}; exec sleep 3600"
        );
        let command = ["sh", "-c", &script].map(str::to_owned).to_vec();
        (self.start_with(pod, name, 0, command, vec![mount]), out.join(name))
    }

    /// Returns the time that the start took.
    fn start_with(
        &self,
        pod: &mut RunningPod,
        name: &str,
        attempt: u32,
        command: Vec<String>,
        mounts: Vec<cri::Mount>,
    ) -> Duration {
        let namespaces = namespaces();
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: name.into(), attempt }),
            image: Some(cri::ImageSpec { image: IMAGE.into(), ..Default::default() }),
            command,
            mounts,
            linux: Some(cri::LinuxContainerConfig {
                resources: Some(cri::LinuxContainerResources {
                    memory_limit_in_bytes: i64::try_from(MEMORY_MIB << 20).unwrap(),
                    cpu_period: 100_000,
                    cpu_quota: 50_000,
                    ..Default::default()
                }),
                security_context: Some(cri::LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        let create = cri::CreateContainerRequest {
            pod_sandbox_id: pod.sandbox.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let id = self.call(async |mut c| c.create_container(create).await).container_id;
        let start = cri::StartContainerRequest { container_id: id.clone() };
        let begun = Instant::now();
        self.call(async |mut c| c.start_container(start).await);
        let took = begun.elapsed();
        pod.containers.insert(name.to_owned(), id);
        took
    }

    pub(crate) fn stop_container(&self, id: &str) {
        let stop = cri::StopContainerRequest { container_id: id.into(), timeout: 0 };
        self.call(async |mut c| c.stop_container(stop).await);
        let remove = cri::RemoveContainerRequest { container_id: id.into() };
        self.call(async |mut c| c.remove_container(remove).await);
    }

    /// Stops and removes a pod.
    pub(crate) fn remove(&self, pod: &RunningPod) {
        let id = &pod.sandbox;
        self.call(async |mut c| {
            c.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() }).await
        });
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.clone() };
        self.call(async |mut c| c.remove_pod_sandbox(request).await);
    }

    /// Runs a command in a container.
    pub(crate) fn exec(&self, id: &str, cmd: &[&str]) -> String {
        let request = cri::ExecSyncRequest {
            container_id: id.into(),
            cmd: cmd.iter().map(|s| (*s).to_owned()).collect(),
            timeout: 10,
        };
        let done = self.call(async |mut c| c.exec_sync(request).await);
        String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned()
    }

    /// The pid of a container's first process.
    pub(crate) fn pid(&self, id: &str) -> i32 {
        let request = cri::ContainerStatusRequest { container_id: id.into(), verbose: true };
        let info = self.call(async |mut c| c.container_status(request).await).info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        i32::try_from(info["pid"].as_i64().unwrap()).unwrap()
    }

    pub(crate) fn mem_total_kib(&self, id: &str) -> u64 {
        let meminfo = self.exec(id, &["cat", "/proc/meminfo"]);
        let line = meminfo
            .lines()
            .find(|l| l.starts_with("MemTotal:"))
            .unwrap_or_else(|| panic!("{meminfo}"));
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Whether the container sees its own memory limit.
    pub(crate) fn sees_its_own_memory(&self, id: &str) -> bool {
        let seen = self.mem_total_kib(id);
        eprintln!("MemTotal is {seen} kB in {id}");
        seen == MEMORY_MIB << 10
    }
}

/// The host's network, and a pid namespace for each container, as the kubelet asks by default.
fn namespaces() -> cri::NamespaceOption {
    cri::NamespaceOption {
        network: cri::NamespaceMode::Node as i32,
        pid: cri::NamespaceMode::Container as i32,
        ..Default::default()
    }
}

fn at_dir(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_owned()
}

/// A file that the scripts in hack/ have put into the cache.
pub(crate) fn cache(name: &str) -> PathBuf {
    let home = || PathBuf::from(std::env::var("HOME").unwrap_or_else(|_| "/root".into()));
    let base =
        std::env::var("XDG_CACHE_HOME").map_or_else(|_| home().join(".cache"), PathBuf::from);
    let cache =
        std::env::var("KUBE_LXCFS_CACHE").map_or_else(|_| base.join("kube-lxcfs"), PathBuf::from);
    let path = cache.join(name);
    assert!(path.exists(), "this test needs {}, which `make test` makes", path.display());
    path
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Without the daemon nothing can be asked to end in order: what is left is killed by its
        // folder below.
        let mut client = self.client.clone();
        let end_in_order = async move {
            let Ok(list) = client.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await
            else {
                return;
            };
            for sandbox in list.into_inner().items {
                let id = sandbox.id;
                let _ = client
                    .stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() })
                    .await;
                let _ = client
                    .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id })
                    .await;
            }
        };
        let _ = self
            .runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(20), end_in_order).await });
        self.down();
        let dir = self.dir.path().to_str().unwrap().to_owned();
        kill_cgroup(&self.cgroup);
        for process in procfs::process::all_processes().into_iter().flatten().flatten() {
            if process.cmdline().is_ok_and(|args| args.iter().any(|arg| arg.starts_with(&dir))) {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(process.pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
        let points = || -> Vec<String> {
            let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            table
                .lines()
                .filter_map(|l| l.split(' ').nth(4))
                .filter(|p| p.starts_with(&dir))
                .map(str::to_owned)
                .collect()
        };
        for _ in 0..3 {
            points().iter().rev().for_each(|point| unmount(Path::new(point)));
        }
    }
}

/// Kills what is in a cgroup and below it, and removes it, in every hierarchy.
fn kill_cgroup(cgroup: &str) {
    fn remove(dir: &Path) {
        let Ok(entries) = fs::read_dir(dir) else { return };
        entries
            .flatten()
            .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
            .for_each(|e| remove(&e.path()));
        for pid in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
            let pid = nix::unistd::Pid::from_raw(pid.parse().unwrap_or(0));
            if pid.as_raw() > 0 {
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
        for _ in 0..50 {
            if fs::remove_dir(dir).is_ok() || !dir.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let name = cgroup.trim_start_matches('/');
    remove(&Path::new("/sys/fs/cgroup").join(name));
    for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        remove(&hierarchy.path().join(name));
    }
}

/// What the agent's HTTP answers: the status and the body.
#[allow(dead_code, reason = "for the tests")]
pub(crate) fn get(agent: &Running, path: &str) -> (u16, String) {
    let address = eventually("the agent listens", || {
        let log = agent.log();
        let (_, after) = log.split_once("HTTP address=").ok_or_else(|| log.clone())?;
        Ok::<_, String>(after.lines().next().unwrap_or_default().trim().to_owned())
    });
    let mut stream = std::net::TcpStream::connect(&address).unwrap();
    std::io::Write::write_all(
        &mut stream,
        format!("GET {path} HTTP/1.0\r\nHost: x\r\n\r\n").as_bytes(),
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// Reads a file to its end or to an error, as text.
pub(crate) fn read(path: &Path) -> Result<String, std::io::Error> {
    let mut text = String::new();
    fs::File::open(path)?.read_to_string(&mut text)?;
    Ok(text)
}
