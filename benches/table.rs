//! What large mount tables cost: reads and searches by the size of the table, and a sweep of the
//! node beside a container with many large tables.
//!
//!     cargo bench --bench table
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_imports,
    clippy::needless_pass_by_value,
    reason = "a benchmark fails by panicking"
)]

#[path = "../tests/it/harness/mod.rs"]
#[allow(dead_code, unused, reason = "the tests use the rest")]
mod harness;

use std::{
    collections::HashSet,
    fs,
    hint::black_box,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use harness::*;
use kube_lxcfs::{
    lxcfs,
    model::view::FileSet,
    mount::{self, LxcfsFiles, TableLimit, Task, Workers, table},
    node,
    plan::DesiredView,
    sys::{mountinfo::MountTable, process::Process},
};
use nix::{
    mount::MsFlags,
    sched::{CloneFlags, setns, unshare},
};

const SIZES: [usize; 4] = [100, 1_000, 10_000, 100_000];
const CONTAINERS: usize = 20;
const ROUNDS: usize = 21;
/// Of the hostile container.
const BINDS: usize = 12_000;
const NAMESPACES: usize = 130;
/// As many threads as the supervisor has.
const SWEEPERS: usize = 48;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn timed<T>(work: impl Fn() -> T) -> Duration {
    let time = |_| {
        let started = Instant::now();
        black_box(work());
        started.elapsed()
    };
    median((0..7).map(time).collect())
}

/// A table whose mounts all lie on the same path, or each on its own.
fn text(mounts: usize, stacked: bool) -> String {
    let line = |id| match (id, stacked) {
        (1, _) => "1 0 0:1 / / rw - overlay o rw\n".to_owned(),
        (2, _) => "2 1 0:2 / /proc rw - proc p rw\n".to_owned(),
        (_, true) => format!("{id} {} 0:2 /uptime /proc/meminfo rw - proc p rw\n", id - 1),
        (_, false) => format!("{id} 1 0:3 / /mnt/{id} rw,nosuid,nodev - tmpfs t rw\n"),
    };
    (1..=mounts).map(line).collect()
}

fn growth() {
    for (shape, stacked) in [("apart", false), ("stacked", true)] {
        let mut last: Option<[Duration; 3]> = None;
        for size in SIZES {
            let text = text(size, stacked);
            let parsed = MountTable::parse(text.as_bytes()).unwrap();
            let parse = timed(|| MountTable::parse(text.as_bytes()).unwrap().mounts().len());
            let top = timed(|| parsed.top(b"/proc/meminfo").map(|m| m.id));
            let read = timed(|| table::read(text.as_bytes(), b"/", TableLimit::Large).is_ok());
            let times = [parse, top, read];
            let grown = last.map(|last| {
                let ratio = |n: usize| times[n].as_secs_f64() / last[n].as_secs_f64();
                format!("  times {:.1}, {:.1}, {:.1}", ratio(0), ratio(1), ratio(2))
            });
            println!(
                "{size:>7} mounts {shape:8} parse {parse:>9.1?}  top {top:>9.1?}  \
                 read {read:>9.1?}{}",
                grown.unwrap_or_default()
            );
            last = Some(times);
        }
    }
}

/// A container with many namespaces, each with a large mount table.
struct Hostile {
    _bare: Bare,
    copies: Vec<Running>,
    cgroup: String,
    _dir: tempfile::TempDir,
}

impl Hostile {
    fn start() -> Hostile {
        let bare = Bare::start();
        let cgroup = format!("{}/{}", test_cgroup(), "f".repeat(64));
        for dir in used_cgroups(&cgroup) {
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("cgroup.procs"), bare.pid.to_string()).unwrap();
        }
        let pid = bare.pid;
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_FS).unwrap();
            let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt")).unwrap();
            setns(namespace, CloneFlags::CLONE_NEWNS).unwrap();
            for _ in 0..BINDS {
                let (source, target) = (Some("/proc/uptime"), "/proc/meminfo");
                let bind = MsFlags::MS_BIND;
                nix::mount::mount(source, target, None::<&str>, bind, None::<&str>).unwrap();
            }
        })
        .join()
        .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let target = format!("--target={pid}");
        let copy = |n: usize| {
            let mut command = program("nsenter");
            command.args([&target, "--mount", "unshare", "--mount", "sleep", "3600"]);
            let copy = Running::start(&mut command, &dir.path().join(n.to_string()));
            for dir in used_cgroups(&cgroup) {
                fs::write(dir.join("cgroup.procs"), copy.pid().to_string()).unwrap();
            }
            copy
        };
        let copies: Vec<Running> = (1..NAMESPACES).map(copy).collect();
        for copy in &copies {
            eventually_true("the table is copied", || {
                mountinfo(copy.pid()).lines().count() > BINDS
            });
        }
        Hostile { _bare: bare, copies, cgroup, _dir: dir }
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.copies.clear();
        remove_cgroup(&self.cgroup);
    }
}

/// One hierarchy is enough to name the container.
fn used_cgroups(cgroup: &str) -> Vec<PathBuf> {
    let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let used = |dir: &PathBuf| v2 || dir.starts_with("/sys/fs/cgroup/pids");
    cgroup_dirs(cgroup).into_iter().filter(used).collect()
}

struct Node {
    runtime: tokio::runtime::Runtime,
    workers: Workers,
    lxcfs: Arc<LxcfsFiles>,
    containers: Vec<Arc<Process>>,
}

impl Node {
    /// The time until no container has a view, and until the sweep is over.
    fn sweep(&self) -> [Duration; 2] {
        for process in &self.containers {
            let desired = DesiredView::Exactly(FileSet::ALL);
            let task = Task::reconcile(desired, Some(self.lxcfs.clone()));
            let injected = mount::reconcile(&self.workers, process.clone(), task);
            self.runtime.block_on(injected).unwrap().unwrap();
        }
        let pids: Vec<i32> = self.containers.iter().map(|process| process.pid()).collect();
        let started = Instant::now();
        let clean = std::thread::spawn(move || {
            for pid in pids {
                while !views(&mountinfo(pid)).is_empty() {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
            started.elapsed()
        });
        let exited = HashSet::from([self.lxcfs.dev]);
        let swept = self.runtime.block_on(node::sweep(&self.workers, exited)).unwrap();
        assert!(swept.files >= self.containers.len() * ALWAYS.len(), "{swept}");
        let whole = started.elapsed();
        [clean.join().unwrap(), whole]
    }

    fn sweeps(&self) -> [Duration; 2] {
        let times: Vec<[Duration; 2]> = (0..ROUNDS).map(|_| self.sweep()).collect();
        [0, 1].map(|n| median(times.iter().map(|time| time[n]).collect()))
    }
}

fn main() {
    growth();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let workers =
        Workers::start(SWEEPERS, Duration::from_secs(60)).expect("the benchmark needs root");
    let served = Lxcfs::start();
    let lxcfs = runtime.block_on(lxcfs::find(&workers, Path::new(served.path()))).unwrap();
    let bares: Vec<Bare> = (0..CONTAINERS).map(|_| Bare::start()).collect();
    let open = |bare: &Bare| Arc::new(Process::open(i64::from(bare.pid)).unwrap());
    let containers = bares.iter().map(open).collect();
    let node = Node { runtime, workers, lxcfs, containers };
    let [clean, whole] = node.sweeps();
    let hostile = Hostile::start();
    let [clean_beside, whole_beside] = node.sweeps();
    drop(hostile);
    let ratio = clean_beside.as_secs_f64() / clean.as_secs_f64();
    let verdict = if ratio <= 3.0 { "ok" } else { "over" };
    println!(
        "sweep of {CONTAINERS} containers: {clean:.1?} alone, {clean_beside:.1?} beside \
         {NAMESPACES} tables of {BINDS} mounts, ratio {ratio:.2} (goal 3: {verdict})"
    );
    println!("the whole sweep: {whole:.1?} alone, {whole_beside:.1?} beside them");
}
