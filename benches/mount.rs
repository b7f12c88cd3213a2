//! What the driver costs beside the bare system calls that do the same, each pair measured in the
//! same run.
//!
//!     cargo bench
//!
//! Namespaces are bare ones (`unshare`), lxcfs is the real one; both sides do the same mounts on
//! them in turn, many times, and medians are compared: this is for ratios, not for seconds.
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
    fs::File,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use kube_lxcfs::{
    lxcfs,
    model::view::FileSet,
    mount::{self, IfLocked, LxcfsFiles, TableLimit, Task, Workers},
    plan::DesiredView,
    sys::{self, Ownership, process::Process},
};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags},
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{LinkNameSpaceType, ThreadNameSpaceType},
};

/// The kernel waits less for RCU in the first moments after many namespaces were made: these many
/// outlast them.
const ROUNDS: usize = 2000;
const CONTAINERS: [usize; 3] = [50, 200, 1000];

/// One pass may take five times as long as another, because the kernel waits for RCU; this many
/// even it out.
fn passes_of(containers: usize) -> usize {
    match containers {
        0..=50 => 161,
        51..=200 => 41,
        _ => 9,
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// The bare calls for one container: as a program that trusts the container would make them.
mod bare {
    use super::*;

    fn clone(file: &OwnedFd) -> OwnedFd {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let clone = rustix::mount::open_tree(file, "", flags).unwrap();
        sys::set_view_attrs(&clone, Ownership::Managed).unwrap();
        clone
    }

    pub(super) fn inject(pid: &Process, lxcfs: &LxcfsFiles, home: &File) {
        let clones: Vec<_> = lxcfs.files.iter().map(|(file, fd)| (*file, clone(fd))).collect();
        rustix::thread::move_into_thread_name_spaces(pid.as_fd(), ThreadNameSpaceType::MOUNT)
            .unwrap();
        for (file, clone) in &clones {
            let path = format!("/{}", file.path());
            let target =
                rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
            let flags =
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            rustix::mount::move_mount(clone, "", &target, "", flags).unwrap();
        }
        leave(home);
    }

    pub(super) fn remove(pid: &Process, lxcfs: &LxcfsFiles, home: &File) {
        rustix::thread::move_into_thread_name_spaces(pid.as_fd(), ThreadNameSpaceType::MOUNT)
            .unwrap();
        for file in lxcfs.files.keys() {
            let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
            rustix::mount::unmount(format!("/{}", file.path()), flags).unwrap();
        }
        leave(home);
    }

    pub(super) fn remount(pid: &Process, lxcfs: &LxcfsFiles, home: &File) {
        let clones: Vec<_> = lxcfs.files.iter().map(|(file, fd)| (*file, clone(fd))).collect();
        rustix::thread::move_into_thread_name_spaces(pid.as_fd(), ThreadNameSpaceType::MOUNT)
            .unwrap();
        for (file, clone) in &clones {
            let path = format!("/{}", file.path());
            let target =
                rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
                | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH
                | MoveMountFlags::MOVE_MOUNT_BENEATH;
            rustix::mount::move_mount(clone, "", &target, "", flags).unwrap();
            rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).unwrap();
        }
        leave(home);
    }

    fn leave(home: &File) {
        rustix::thread::move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Mount))
            .unwrap();
    }
}

/// Runs `work` on a worker's thread, which may enter other namespaces, without the cost of the
/// queue.
fn on_a_worker<T: Send + 'static>(
    runtime: &tokio::runtime::Runtime,
    workers: &Workers,
    work: impl FnOnce(&mount::WorkerContext) -> T + Send + 'static,
) -> T {
    runtime.block_on(workers.run(work)).unwrap_or_else(|timeout| panic!("{}", timeout.error))
}

fn report(what: &str, ours: Duration, bare: Duration, bound: f64) {
    let ratio = ours.as_secs_f64() / bare.as_secs_f64();
    let verdict = if ratio <= bound { "ok" } else { "over" };
    println!(
        "{what:44}  ours {ours:>10.1?}  bare {bare:>10.1?}  ratio {ratio:.2} \
         (goal {bound}: {verdict})"
    );
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // As many threads as the agent has by default.
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    let workers =
        Workers::start(threads, Duration::from_secs(300)).expect("the benchmark needs root");
    mount::prepare_scratch().unwrap();
    let (first, second) = (harness::Lxcfs::start(), harness::Lxcfs::start());
    let find = |path: &std::path::Path| runtime.block_on(lxcfs::find(&workers, path)).unwrap();
    let (lxcfs, other) = (find(&first.path), find(&second.path));
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let all: Vec<harness::Bare> = std::thread::scope(|scope| {
        let start = || (0..CONTAINERS[2] / 10).map(|_| harness::Bare::start()).collect::<Vec<_>>();
        let started: Vec<_> = (0..10).map(|_| scope.spawn(start)).collect();
        started.into_iter().flat_map(|started| started.join().unwrap()).collect()
    });
    let processes: Vec<Arc<Process>> =
        all.iter().map(|bare| Arc::new(Process::open(i64::from(bare.pid)).unwrap())).collect();
    println!("{} view files in each container; medians of {ROUNDS} rounds", lxcfs.files.len());

    one_container(&runtime, &workers, processes[0].clone(), lxcfs.clone());
    passes(&runtime, &workers, &processes, [lxcfs, other]);
}

fn one_container(
    runtime: &tokio::runtime::Runtime,
    workers: &Workers,
    process: Arc<Process>,
    lxcfs: Arc<LxcfsFiles>,
) {
    let [ours, bare] = on_a_worker(runtime, workers, move |context| {
        let home = File::open("/proc/thread-self/ns/mnt").unwrap();
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let started = Instant::now();
            mount::reconcile_blocking(
                context,
                &process,
                // As a start has it.
                &Task::Reconcile {
                    desired: DesiredView::Exactly(FileSet::ALL),
                    lxcfs: Some(lxcfs.clone()),
                    adopt: false,
                    fresh: true,
                },
                IfLocked::Fail,
                TableLimit::Large,
            )
            .unwrap();
            let between = Instant::now();
            mount::reconcile_blocking(
                context,
                &process,
                &Task::reconcile(DesiredView::Absent, None),
                IfLocked::Fail,
                TableLimit::Large,
            )
            .unwrap();
            ours.push([between - started, between.elapsed()]);
            let started = Instant::now();
            bare::inject(&process, &lxcfs, &home);
            let between = Instant::now();
            bare::remove(&process, &lxcfs, &home);
            bare.push([between - started, between.elapsed()]);
        }
        [ours, bare].map(|times| {
            let of =
                |what: fn(&[Duration; 2]) -> Duration| median(times.iter().map(what).collect());
            [of(|t| t[0]), of(|t| t[1]), of(|t| t[0] + t[1])]
        })
    });
    report("one container, inject", ours[0], bare[0], 1.3);
    report("one container, remove", ours[1], bare[1], 1.2);
    report("one container, inject and remove", ours[2], bare[2], 1.2);
}

/// One pass over many containers as the agent makes it, through the workers' queue, and the bare
/// calls one after the other.
fn passes(
    runtime: &tokio::runtime::Runtime,
    workers: &Workers,
    processes: &[Arc<Process>],
    instances: [Arc<LxcfsFiles>; 2],
) {
    let pass = |n: usize, desired: DesiredView, lxcfs: Option<Arc<LxcfsFiles>>| {
        let started = Instant::now();
        runtime.block_on(async {
            let reconciles = stream::iter(processes[..n].to_vec()).map(|process| {
                mount::reconcile(workers, process, Task::reconcile(desired, lxcfs.clone()))
            });
            reconciles
                .buffer_unordered(32)
                .for_each(async |done| drop(done.unwrap().unwrap()))
                .await;
        });
        started.elapsed()
    };
    let bare = |n: usize, work: fn(&Process, &LxcfsFiles, &File), lxcfs: &Arc<LxcfsFiles>| {
        let (processes, lxcfs) = (processes[..n].to_vec(), lxcfs.clone());
        on_a_worker(runtime, workers, move |_| {
            let home = File::open("/proc/thread-self/ns/mnt").unwrap();
            let started = Instant::now();
            processes.iter().for_each(|process| work(process, &lxcfs, &home));
            started.elapsed()
        })
    };
    let mut per_container = Vec::new();
    for n in CONTAINERS {
        let mut times = [const { Vec::new() }; 6];
        for round in 0..passes_of(n) {
            let (old, new) = (&instances[round % 2], &instances[(round + 1) % 2]);
            times[0].push(pass(n, DesiredView::Exactly(FileSet::ALL), Some(old.clone())));
            times[1].push(pass(n, DesiredView::REMOUNT_ONLY, Some(new.clone())));
            times[2].push(bare(n, bare::remove, new));
            times[3].push(bare(n, bare::inject, old));
            times[4].push(bare(n, bare::remount, new));
            times[5].push(pass(n, DesiredView::Absent, None));
        }
        let [inject, remount, bare_remove, bare_inject, bare_remount, remove] = times.map(median);
        report(
            &format!("{n} containers, inject and remove"),
            inject + remove,
            bare_inject + bare_remove,
            1.2,
        );
        report(&format!("{n} containers, remount"), remount, bare_remount, 1.2);
        per_container.push(((inject + remove + remount) / u32::try_from(n).unwrap(), n));
    }
    let ((few, least), (many, most)) = (per_container[0], per_container[2]);
    let growth = many.as_secs_f64() / few.as_secs_f64();
    println!(
        "time per container: {few:.1?} of {least}, {many:.1?} of {most}: {growth:.2} times \
         (1 is linear)"
    );
}
