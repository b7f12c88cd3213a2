//! What the driver costs beside the bare system calls that do the same, each pair measured in the same run.
//!
//!     cargo bench
//!
//! Namespaces are bare ones (`unshare`), lxcfs is the real one; both sides do the same mounts on them in turn, many times,
//! and medians are compared: this is for ratios, not for seconds.
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_imports,
    clippy::needless_pass_by_value,
    reason = "a benchmark fails by panicking"
)]

#[path = "../tests/it/harness.rs"]
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
    mount::{self, Process, Source, Task, Workers},
    plan::Wish,
    sys,
    view::FileSet,
};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags},
    thread::{LinkNameSpaceType, ThreadNameSpaceType},
};

const ROUNDS: usize = 200;
const CONTAINERS: [usize; 3] = [50, 100, 200];
/// The kernel's waiting for RCU makes one pass take five times another; that many even it out.
const PASSES: usize = 41;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// The bare calls for one container: what a C programmer who trusts the container would write.
mod bare {
    use super::*;

    fn clone(file: &OwnedFd) -> OwnedFd {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let clone = rustix::mount::open_tree(file, "", flags).unwrap();
        sys::make_view(&clone, true).unwrap();
        clone
    }

    pub(super) fn inject(pid: &Process, source: &Source, home: &File) {
        let clones: Vec<_> = source.files.iter().map(|(file, fd)| (*file, clone(fd))).collect();
        rustix::thread::move_into_thread_name_spaces(pid.as_fd(), ThreadNameSpaceType::MOUNT).unwrap();
        for (file, clone) in &clones {
            let path = format!("/{}", file.path());
            let target = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            rustix::mount::move_mount(clone, "", &target, "", flags).unwrap();
        }
        go(home);
    }

    pub(super) fn remove(pid: &Process, source: &Source, home: &File) {
        rustix::thread::move_into_thread_name_spaces(pid.as_fd(), ThreadNameSpaceType::MOUNT).unwrap();
        for file in source.files.keys() {
            let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
            rustix::mount::unmount(format!("/{}", file.path()), flags).unwrap();
        }
        go(home);
    }

    pub(super) fn swap(pid: &Process, source: &Source, home: &File) {
        let clones: Vec<_> = source.files.iter().map(|(file, fd)| (*file, clone(fd))).collect();
        rustix::thread::move_into_thread_name_spaces(pid.as_fd(), ThreadNameSpaceType::MOUNT).unwrap();
        for (file, clone) in &clones {
            let path = format!("/{}", file.path());
            let target = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
                | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH
                | MoveMountFlags::MOVE_MOUNT_BENEATH;
            rustix::mount::move_mount(clone, "", &target, "", flags).unwrap();
            rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).unwrap();
        }
        go(home);
    }

    fn go(home: &File) {
        rustix::thread::move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Mount)).unwrap();
    }
}

/// Runs `work` on a worker's thread, where entering other namespaces is allowed, without the cost of handing it over.
fn on_a_worker<T: Send + 'static>(
    runtime: &tokio::runtime::Runtime,
    workers: &Workers,
    work: impl FnOnce(&mount::Seat) -> T + Send + 'static,
) -> T {
    runtime.block_on(workers.run(work)).unwrap_or_else(|late| panic!("{}", late.error))
}

fn report(what: &str, ours: Duration, bare: Duration, bound: f64) {
    let ratio = ours.as_secs_f64() / bare.as_secs_f64();
    let verdict = if ratio <= bound { "ok" } else { "over" };
    println!("{what:44}  ours {ours:>10.1?}  bare {bare:>10.1?}  ratio {ratio:.2} (goal {bound}: {verdict})");
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // As many threads as the agent has by default.
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    let workers = Workers::start(threads, Duration::from_secs(300)).expect("the benchmark needs root");
    let (first, second) = (harness::Lxcfs::start(), harness::Lxcfs::start());
    let find = |path: &std::path::Path| runtime.block_on(lxcfs::find(&workers, path)).unwrap();
    let (source, other) = (find(&first.path), find(&second.path));
    let all: Vec<harness::Bare> = (0..CONTAINERS[2]).map(|_| harness::Bare::start()).collect();
    let processes: Vec<Arc<Process>> =
        all.iter().map(|bare| Arc::new(Process::open(i64::from(bare.pid)).unwrap())).collect();
    println!("{} view files in each container; medians of {ROUNDS} rounds, of {PASSES} passes", source.files.len());

    one_container(&runtime, &workers, processes[0].clone(), source.clone());
    passes(&runtime, &workers, &processes, [source, other]);
}

fn one_container(runtime: &tokio::runtime::Runtime, workers: &Workers, process: Arc<Process>, source: Arc<Source>) {
    let [ours, bare] = on_a_worker(runtime, workers, move |seat| {
        let home = File::open("/proc/thread-self/ns/mnt").unwrap();
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            mount::visit(seat, &process, &Task::wish(Wish::Files(FileSet::ALL), Some(source.clone()))).unwrap();
            let between = Instant::now();
            mount::visit(seat, &process, &Task::wish(Wish::Nothing, None)).unwrap();
            ours.push([between - begun, between.elapsed()]);
            let begun = Instant::now();
            bare::inject(&process, &source, &home);
            let between = Instant::now();
            bare::remove(&process, &source, &home);
            bare.push([between - begun, between.elapsed()]);
        }
        [ours, bare].map(|times| {
            let of = |what: fn(&[Duration; 2]) -> Duration| median(times.iter().map(what).collect());
            [of(|t| t[0]), of(|t| t[1]), of(|t| t[0] + t[1])]
        })
    });
    report("one container, inject", ours[0], bare[0], 1.5);
    report("one container, remove", ours[1], bare[1], 1.5);
    report("one container, inject and remove", ours[2], bare[2], 1.5);
}

/// One pass over many containers as the agent makes it, through the workers' queue, and the bare calls one after the other.
fn passes(runtime: &tokio::runtime::Runtime, workers: &Workers, processes: &[Arc<Process>], sources: [Arc<Source>; 2]) {
    let pass = |n: usize, wish: Wish, source: Option<Arc<Source>>| {
        let begun = Instant::now();
        runtime.block_on(async {
            let visits = stream::iter(processes[..n].to_vec())
                .map(|process| mount::run(workers, process, Task::wish(wish, source.clone())));
            visits.buffer_unordered(32).for_each(async |visited| drop(visited.unwrap().unwrap())).await;
        });
        begun.elapsed()
    };
    let bare = |n: usize, work: fn(&Process, &Source, &File), source: &Arc<Source>| {
        let (processes, source) = (processes[..n].to_vec(), source.clone());
        on_a_worker(runtime, workers, move |_| {
            let home = File::open("/proc/thread-self/ns/mnt").unwrap();
            let begun = Instant::now();
            processes.iter().for_each(|process| work(process, &source, &home));
            begun.elapsed()
        })
    };
    let mut per_container = Vec::new();
    for n in CONTAINERS {
        let mut times = [const { Vec::new() }; 6];
        for round in 0..PASSES {
            let (old, new) = (&sources[round % 2], &sources[(round + 1) % 2]);
            times[0].push(pass(n, Wish::Files(FileSet::ALL), Some(old.clone())));
            times[1].push(pass(n, Wish::REFRESH, Some(new.clone())));
            times[2].push(bare(n, bare::remove, new));
            times[3].push(bare(n, bare::inject, old));
            times[4].push(bare(n, bare::swap, new));
            times[5].push(pass(n, Wish::Nothing, None));
        }
        let [inject, swap, bare_remove, bare_inject, bare_swap, remove] = times.map(median);
        report(&format!("{n} containers, inject and remove"), inject + remove, bare_inject + bare_remove, 1.5);
        report(&format!("{n} containers, remount"), swap, bare_swap, 1.5);
        per_container.push(((inject + remove + swap) / u32::try_from(n).unwrap(), n));
    }
    let ((few, least), (many, most)) = (per_container[0], per_container[2]);
    let growth = many.as_secs_f64() / few.as_secs_f64();
    println!("time per container: {few:.1?} of {least}, {many:.1?} of {most}: {growth:.2} times (1 is linear)");
}
