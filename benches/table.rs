//! What large mount tables cost: reads and searches by the size of the table; operations on other
//! containers beside one with a large table; and a sweep of the node beside a container with many
//! large tables.
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
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
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
/// Of one container beside the others.
const LARGE: usize = 20_000;
/// As many threads as the agent has on a machine with two CPUs.
const AGENT_WORKERS: usize = 2;
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

/// Prints the times per mount, which do not grow with the table if the work is linear. Above 1,000
/// mounts, the fixed costs of a call do not count, and the table outgrows the CPU's caches.
fn growth() {
    const GOAL: f64 = 3.0;
    for (shape, stacked) in [("apart", false), ("stacked", true)] {
        let mut of_1000 = None;
        for size in SIZES {
            let text = text(size, stacked);
            let parsed = MountTable::parse(text.as_bytes()).unwrap();
            let parse = timed(|| MountTable::parse(text.as_bytes()).unwrap().mounts().len());
            let top = timed(|| parsed.top(b"/proc/meminfo").map(|m| m.id));
            let read = timed(|| table::read(text.as_bytes(), b"/", TableLimit::Large).is_ok());
            #[allow(clippy::cast_precision_loss, reason = "sizes are small")]
            let per_mount = [parse, top, read].map(|time| time.as_secs_f64() * 1e9 / size as f64);
            let [p, t, r] = per_mount;
            print!(
                "{size:>7} mounts {shape:8} parse {parse:>9.1?} {p:>4.0} ns each  \
                 top {top:>9.1?} {t:>4.0} ns each  read {read:>9.1?} {r:>4.0} ns each"
            );
            let base = *of_1000.get_or_insert(per_mount);
            if size <= 1000 {
                of_1000 = Some(per_mount);
                println!();
                continue;
            }
            let ratios = [0, 1, 2].map(|n| per_mount[n] / base[n]);
            let most = ratios.into_iter().fold(0.0, f64::max);
            let verdict = if most <= GOAL { "ok" } else { "over" };
            println!("  at most {most:.1} times that of 1000 (goal {GOAL}: {verdict})");
        }
    }
}

fn bind(source: &str, target: &str) {
    let flags = MsFlags::MS_BIND;
    nix::mount::mount(Some(source), target, None::<&str>, flags, None::<&str>).unwrap();
}

/// Runs `work` in the mount namespace of a process.
fn inside(pid: i32, work: impl FnOnce() + Send + 'static) {
    let enter = move || {
        unshare(CloneFlags::CLONE_FS).unwrap();
        let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt")).unwrap();
        setns(namespace, CloneFlags::CLONE_NEWNS).unwrap();
        work();
    };
    std::thread::spawn(enter).join().unwrap();
}

/// A container with [`LARGE`] mounts, none of them on the paths of view files.
fn large() -> Bare {
    let bare = Bare::start();
    inside(bare.pid, || {
        let (source, flags) = (Some("tmpfs"), MsFlags::empty());
        nix::mount::mount(source, "/mnt", source, flags, None::<&str>).unwrap();
        for n in 0..LARGE {
            let target = format!("/mnt/{n}");
            fs::write(&target, "").unwrap();
            bind("/proc/uptime", &target);
        }
    });
    bare
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
        inside(pid, || (0..BINDS).for_each(|_| bind("/proc/uptime", "/proc/meminfo")));
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

    /// The times of injections into the containers, one after the other.
    fn injections(&self, workers: &Workers) -> Vec<Duration> {
        let inject = |process: &Arc<Process>| {
            let view = |files| {
                let task = Task::reconcile(files, Some(self.lxcfs.clone()));
                let reconciled = mount::reconcile(workers, process.clone(), task);
                self.runtime.block_on(reconciled).unwrap().unwrap();
            };
            view(DesiredView::Absent);
            let started = Instant::now();
            view(DesiredView::Exactly(FileSet::ALL));
            started.elapsed()
        };
        (0..ROUNDS).flat_map(|_| self.containers.iter().map(inject)).collect()
    }

    /// Injects into the containers, alone and while the agent's workers also reconcile, again and
    /// again, a container with a large table.
    fn print_injections_beside_large_table(&self) {
        let workers = Workers::start(AGENT_WORKERS, Duration::from_secs(60)).unwrap();
        let alone = self.injections(&workers);
        let large = large();
        let process = Arc::new(Process::open(i64::from(large.pid)).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let reconciling = std::thread::spawn({
            let (workers, lxcfs, stop) = (workers.clone(), self.lxcfs.clone(), stop.clone());
            move || {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let mut times = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let desired = DesiredView::Exactly(FileSet::ALL);
                    let task = Task::reconcile(desired, Some(lxcfs.clone()));
                    let started = Instant::now();
                    let reconciled = mount::reconcile(&workers, process.clone(), task);
                    runtime.block_on(reconciled).unwrap().unwrap();
                    times.push(started.elapsed());
                }
                times
            }
        });
        let beside = self.injections(&workers);
        stop.store(true, Ordering::Relaxed);
        let of_large = reconciling.join().unwrap();
        let (count, of_large) = (of_large.len(), median(of_large));
        let [(half, most), (half_beside, most_beside)] = [alone, beside].map(|mut times| {
            times.sort();
            (times[times.len() / 2], times[times.len() * 99 / 100])
        });
        let verdict = if half_beside <= 3 * half { "ok" } else { "over" };
        println!(
            "injection into {CONTAINERS} containers: median {half:.1?}, 99th percentile {most:.1?} \
             alone; {half_beside:.1?}, {most_beside:.1?} beside {count} reconciles of {LARGE} \
             mounts, {of_large:.1?} each (goal 3 times the median: {verdict})"
        );
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
    node.print_injections_beside_large_table();
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
