//! Containers whose process reads view files all the time and counts what it sees.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use tempfile::TempDir;

use super::{
    Bare, OWN_NAMESPACES, cgroup_dirs, eventually, eventually_true, remove_cgroup, send, stderr,
    test_cgroup,
};

/// What a reader saw.
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

/// A bare namespace in a cgroup that is named as a runtime names a container's, with a reader as
/// its first process.
#[derive(Debug)]
pub(crate) struct Reader {
    bare: Bare,
    pub(crate) id: String,
    cgroup: String,
    pub(crate) out: PathBuf,
    _dir: TempDir,
}

/// The reader's program.
pub(crate) fn reader_program() -> PathBuf {
    compiled("reader")
}

/// A program of tests/it, compiled once: the lock keeps a second test from doing it as well.
pub(crate) fn compiled(name: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/it/{name}.rs"));
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let program = dir.join(name);
    let lock = fs::File::create(dir.join(format!("{name}.lock"))).unwrap();
    lock.lock().unwrap();
    let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
    if modified(&program) < modified(&source) {
        let part = dir.join(format!("{name}.part"));
        let mut rustc = Command::new(std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into()));
        rustc
            .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "--crate-name"])
            .args([name, "-o"])
            .arg(&part)
            .arg(source);
        let compiled = rustc.output().unwrap_or_else(|e| panic!("this test needs rustc: {e}"));
        assert!(compiled.status.success(), "{}", stderr(&compiled));
        fs::rename(part, &program).unwrap();
    }
    program
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
    /// With this pause between two rounds of reads.
    pub(crate) fn start(pause: Duration) -> Reader {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::SeqCst);
        let id = format!("{:032x}{number:032x}", std::process::id());
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("seen");
        let program = reader_program();
        let (program, seen) = (program.to_str().unwrap(), out.to_str().unwrap());
        let command = reader_command(program, seen, READER_MIB, pause);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let bare = Bare::running(&OWN_NAMESPACES, &command);
        let cgroup = format!("{}/{id}", test_cgroup());
        let reader = Reader { bare, id, cgroup, out, _dir: dir };
        reader.enter_cgroup();
        reader
    }

    /// Moves its processes into its cgroup, with the memory limit.
    fn enter_cgroup(&self) {
        let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        if v2 {
            let parent = cgroup_dirs(&test_cgroup()).remove(0);
            fs::create_dir_all(&parent).unwrap();
            fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory +pids").unwrap();
            fs::write(parent.join("cgroup.subtree_control"), "+memory +pids").unwrap();
        }
        let limit = if v2 { "memory.max" } else { "memory.limit_in_bytes" };
        let used = |dir: &PathBuf| {
            let hierarchy = dir.strip_prefix("/sys/fs/cgroup").unwrap();
            v2 || hierarchy.starts_with("memory") || hierarchy.starts_with("pids")
        };
        for cgroup in cgroup_dirs(&self.cgroup).iter().filter(|dir| used(dir)) {
            fs::create_dir_all(cgroup).unwrap();
            if cgroup.join(limit).exists() {
                fs::write(cgroup.join(limit), (READER_MIB << 20).to_string()).unwrap();
            }
            // unshare(1) is in the namespace too.
            for pid in [self.bare.pid, self.bare.unshare.pid()] {
                fs::write(cgroup.join("cgroup.procs"), pid.to_string()).unwrap();
            }
        }
    }

    /// Starts to read.
    pub(crate) fn go(&self) {
        go(&self.out);
    }

    /// Stops to read.
    pub(crate) fn stop(&self) -> Seen {
        stop(&self.out)
    }

    pub(crate) fn mountinfo(&self) -> String {
        self.bare.mountinfo()
    }

    pub(crate) fn pid(&self) -> i32 {
        self.bare.pid
    }
}

/// The command line of a reader.
pub(crate) fn reader_command(
    program: &str,
    out: &str,
    own_mib: u64,
    pause: Duration,
) -> Vec<String> {
    let args = [
        program.to_owned(),
        out.to_owned(),
        (own_mib << 10).to_string(),
        pause.as_millis().to_string(),
    ];
    args.into_iter().chain(READ.map(str::to_owned)).collect()
}

/// Makes a reader start.
pub(crate) fn go(out: &Path) {
    for old in [out.to_owned(), out.with_extension("started"), out.with_extension("stop")] {
        let _ = fs::remove_file(old);
    }
    fs::write(out.with_extension("go"), "").unwrap();
    eventually_true("the reader reads", || out.with_extension("started").exists());
}

/// Makes a reader stop, and returns what it saw.
pub(crate) fn stop(out: &Path) -> Seen {
    fs::write(out.with_extension("stop"), "").unwrap();
    let counts =
        eventually("the reader has stopped", || fs::read_to_string(out).map_err(|e| e.to_string()));
    let numbers: Vec<u128> = counts.split_whitespace().map(|n| n.parse().unwrap()).collect();
    let [own, host, errors, last_error, last_host, rounds] = numbers.try_into().unwrap();
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
        send(self.bare.pid, nix::sys::signal::Signal::SIGKILL);
        remove_cgroup(&self.cgroup);
        // The test's cgroup goes with its last child.
        cgroup_dirs(&test_cgroup()).iter().for_each(|dir| drop(fs::remove_dir(dir)));
    }
}
