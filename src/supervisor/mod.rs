//! `kube-lxcfs lxcfs`: runs lxcfs as its child, so that no container keeps a dead view or hangs on
//! a hung lxcfs.
//!
//! When lxcfs exits, the supervisor first unmounts it at the serving path, so that no new view can
//! be made of it. Then it starts lxcfs again. If the next one serves soon, the views are remounted
//! from it, else they are swept. At a shutdown the supervisor sweeps before it stops lxcfs, so that
//! no reader sees an error.
//!
//! Views are selected by the device number of their lxcfs. The kernel gives the number to another
//! file system when the last mount is gone, and the next lxcfs could get it. So the supervisor
//! holds the exited one, by an open descriptor, until none of its views is left. It also shares
//! lxcfs's connection: until then, readers of the views wait.

mod cgroup2;
mod child;
mod connection;
mod predecessors;
mod program;
mod recovery;
pub mod volume;

use std::{
    collections::HashSet,
    ffi::OsString,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, StatxFlags},
    mount::UnmountFlags,
    process::{Pid, Signal},
};
use tokio::{
    process::Child,
    signal::unix::{SignalKind, signal},
};

use self::{
    cgroup2::Cgroup2,
    connection::Connection,
    predecessors::Predecessors,
    program::Program,
    recovery::{ExitedLxcfs, Recoveries},
};
use crate::{
    lxcfs::{Error as FindError, Finder, Identity, MountTableWatch, identify, is_mounted},
    mount::{JobTimeout, LxcfsFiles, Workers},
    node,
    runtime::cgroup::CgroupVersion,
    sys::mountinfo::Dev,
    telemetry::{
        Backoff,
        metrics::supervisor::{RestartCause, SupervisorMetrics},
    },
};

/// A part of the cost of a container is waiting for RCU, so there are more threads than CPUs. With
/// 48 of them, a node with 2 CPUs has no time for lxcfs.
const SWEEPERS: usize = 8;
/// The nice value of the supervisor and of lxcfs (setpriority(2)).
const NICE: i32 = -10;
/// The limit of a sweep in one namespace.
const SWEEP_DEADLINE: Duration = Duration::from_secs(5);
/// The time for lxcfs to serve after its start.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(10);
/// The interval between checks for the mount during a start.
const STARTUP_POLL: Duration = Duration::from_millis(5);
/// An lxcfs works if it uses one part in so many of the watchdog's time as CPU time.
const WORKING_SHARE: u32 = 8;
/// How many times longer than the watchdog's time an lxcfs that works may take to respond.
const MAX_EXTENSIONS: u32 = 3;
/// A reader that opened a view file just before its removal finishes within this time.
const DRAIN: Duration = Duration::from_millis(200);
/// The delay before a restart, from the second failure on.
const RESTART: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
/// An lxcfs that served for this time resets the delay.
const BACKOFF_RESET: Duration = Duration::from_secs(60);

/// The supervisor of one lxcfs: its path, program and arguments.
#[derive(Clone, Debug)]
pub struct Supervisor {
    pub path: PathBuf,
    /// `None`: the one that fits the node's cgroup version.
    pub bin: Option<PathBuf>,
    pub args: Vec<OsString>,
    /// An lxcfs that does not respond for this time, and does not work meanwhile, is killed.
    pub watchdog: Duration,
    pub metrics: Arc<SupervisorMetrics>,
}

/// The reason why lxcfs cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("failed to run {bin}: {cause}; install lxcfs, or set --lxcfs-bin to its program")]
    Bin { bin: PathBuf, cause: io::Error },
    #[error(
        "{bin} is lxcfs {version}, which serves cgroup v2 only, and this node has cgroup v1; \
         set --lxcfs-bin to an lxcfs 5 or 6"
    )]
    Cgroup2Only { bin: PathBuf, version: String },
    #[error("failed to create the lxcfs path {path}: {cause}")]
    Path { path: PathBuf, cause: io::Error },
    #[error("failed to start the threads for sweeps: {0}")]
    Workers(io::Error),
    #[error("failed to listen for signals: {0}")]
    Signals(io::Error),
    #[error("failed to watch the mount table: {0}")]
    Watch(io::Error),
}

/// The reason why lxcfs stopped serving.
enum ExitReason {
    Exited(io::Result<ExitStatus>),
    Hung,
    /// The serving path was unmounted, or another mount covers it. Existing views still work,
    /// unless lxcfs unmounted it because it was terminated.
    Unmounted,
    Shutdown,
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn shutdown(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// The probes of one lxcfs, by a single thread.
struct Probes {
    workers: Workers,
    interval: Duration,
}

impl Supervisor {
    /// Runs until SIGTERM or SIGINT. Leaves no mount, process or view behind.
    ///
    /// # Errors
    /// Fails if lxcfs cannot be run at all; an lxcfs that exits or hangs is restarted.
    pub async fn run(self) -> Result<(), Error> {
        // Every reader of the node waits for the threads that are started from here on, and for
        // lxcfs. All inherit the value; Linux sets that of one thread only (setpriority(2)).
        // Without CAP_SYS_NICE it stays as it is.
        let _ = rustix::process::setpriority_process(None, NICE);
        let sweepers = Workers::start(SWEEPERS, SWEEP_DEADLINE).map_err(Error::Workers)?;
        let mut recoveries = Recoveries::new(sweepers.clone(), self.metrics.clone());
        let stopped = self.run_until_shutdown(sweepers, &mut recoveries).await;
        recoveries.finish().await;
        stopped?;
        self.clean_up();
        Ok(())
    }

    async fn run_until_shutdown(
        &self,
        sweepers: Workers,
        recoveries: &mut Recoveries,
    ) -> Result<(), Error> {
        let mut signals = Signals::listen().map_err(Error::Signals)?;
        // Ten probes per watchdog time: the probe that is pending at a kill is younger than the
        // hang by one interval.
        let probe_interval = self.watchdog / 10;
        let probe_deadline = self.watchdog.saturating_sub(probe_interval);
        // Before it is needed: a sweep is urgent.
        node::prepare_scratch().await;
        let node = CgroupVersion::of_node();
        let program = Program::choose(self.bin.as_deref(), node).await?;
        let Program { bin, version, reason, .. } = &program;
        tracing::info!(lxcfs_version = version, bin = %bin.display(), reason, "running lxcfs");
        let cgroup2 = Cgroup2::read().unwrap_or_default();
        let mut mount_table = MountTableWatch::new().map_err(Error::Watch)?;
        let mut predecessors = Predecessors::take_over(&self.path, &sweepers).await;
        let mut failures = 0;
        loop {
            let started = Instant::now();
            let mut child = child::start(&program, &self.path, &self.args)?;
            // Another thread for each lxcfs: a probe of the last one may wait until its views are
            // remounted from this one.
            let probe_workers = Workers::start(1, probe_deadline).map_err(Error::Workers)?;
            let probes = Probes { workers: probe_workers, interval: probe_interval };
            let serves = self.wait_until_serving(&mut child, &probes, &mut signals).await;
            if let Some(cgroup2) = &cgroup2 {
                cgroup2.restore();
            }
            let reason = match serves {
                Err(reason) => {
                    recoveries.no_successor();
                    reason
                }
                Ok((identity, lxcfs)) => {
                    recoveries.successor(&lxcfs);
                    let (dev, elapsed) = (identity.dev, started.elapsed());
                    tracing::info!(lxcfs = "serving", %dev, ?elapsed, "lxcfs serves");
                    self.metrics.set_up(true);
                    let held = hold(&self.path, dev);
                    let connection = share(&child, lxcfs);
                    predecessors.replace(&self.path, &sweepers, &probes.workers).await;
                    let reason = self
                        .serve(&mut child, identity, &probes, &mut mount_table, &mut signals)
                        .await;
                    self.metrics.set_up(false);
                    self.stop_serving(dev, &reason);
                    let recovers = match reason {
                        ExitReason::Exited(_) | ExitReason::Hung => true,
                        // If its readers cannot wait, its views are swept while it still serves.
                        ExitReason::Unmounted => held.is_some() && connection.is_some(),
                        ExitReason::Shutdown => false,
                    };
                    if recovers {
                        let _ = child.start_kill();
                    }
                    match held.filter(|_| recovers) {
                        // Its views are dead, and must not keep the next lxcfs from serving.
                        Some(held) => {
                            recoveries.start(ExitedLxcfs { dev, held, connection }).await;
                        }
                        None => {
                            // Its open files would keep the file system after its last view.
                            drop(connection);
                            self.sweep_before_exit(&mut child, dev, &reason, &sweepers).await;
                        }
                    }
                    if let ExitReason::Shutdown = reason {
                        return Ok(());
                    }
                    reason
                }
            };
            if let ExitReason::Exited(status) = &reason {
                let status =
                    status.as_ref().map_or_else(ToString::to_string, |s| child::describe(*s));
                let elapsed = started.elapsed();
                tracing::error!(exit_reason = "exited", status, ?elapsed, "lxcfs exited");
            }
            child::terminate(&mut child).await;
            unmount_all(&self.path);
            if let ExitReason::Shutdown = reason {
                return Ok(());
            }
            self.metrics.restarted(match reason {
                ExitReason::Exited(_) => RestartCause::Exited,
                ExitReason::Hung => RestartCause::Hung,
                ExitReason::Unmounted | ExitReason::Shutdown => RestartCause::Unmounted,
            });
            failures = if started.elapsed() >= BACKOFF_RESET { 0 } else { failures + 1 };
            let delay = restart_delay(failures);
            if !delay.is_zero() {
                recoveries.no_successor();
            }
            tracing::info!(?delay, "restarting lxcfs");
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = signals.shutdown() => return Ok(()),
            }
        }
    }

    async fn wait_until_serving(
        &self,
        child: &mut Child,
        probes: &Probes,
        signals: &mut Signals,
    ) -> Result<(Identity, Arc<LxcfsFiles>), ExitReason> {
        let started = Instant::now();
        let finder = Finder::new(&self.path);
        let serves = async {
            loop {
                if let Some(identity) = identify(&self.path) {
                    match finder.find(&probes.workers).await {
                        Ok(lxcfs) => return Some((identity, lxcfs)),
                        Err(FindError::Hung { .. }) => return None,
                        Err(_) => {}
                    }
                }
                if started.elapsed() > STARTUP_TIMEOUT {
                    return None;
                }
                tokio::time::sleep(STARTUP_POLL).await;
            }
        };
        tokio::select! {
            serves = serves => serves.ok_or(ExitReason::Hung),
            status = child.wait() => Err(ExitReason::Exited(status)),
            () = signals.shutdown() => Err(ExitReason::Shutdown),
        }
    }

    /// Waits until lxcfs stops serving, or is to be stopped.
    async fn serve(
        &self,
        child: &mut Child,
        serving: Identity,
        probes: &Probes,
        mount_table: &mut MountTableWatch,
        signals: &mut Signals,
    ) -> ExitReason {
        let pid = child::pid(child);
        let hangs = self.hangs(pid, probes);
        let unmounted = async {
            // A covered lxcfs serves no new view.
            while is_mounted(&self.path, serving) {
                mount_table.changed().await;
            }
        };
        tokio::pin!(hangs, unmounted);
        loop {
            tokio::select! {
                status = child.wait() => return ExitReason::Exited(status),
                () = &mut hangs => return ExitReason::Hung,
                () = &mut unmounted => return ExitReason::Unmounted,
                _ = signals.terminate.recv() => return ExitReason::Shutdown,
                _ = signals.interrupt.recv() => return ExitReason::Shutdown,
                _ = signals.hangup.recv() => {
                    tracing::info!("reloading liblxcfs");
                    if let Some(pid) = pid {
                        let _ = rustix::process::kill_process(pid, Signal::USR1);
                    }
                }
            }
        }
    }

    /// Waits until lxcfs hangs: until it does not respond in time, and does not work meanwhile.
    /// With many readers it works, and responds late: to kill it would only make more of them wait
    /// for the next one.
    async fn hangs(&self, pid: Option<Pid>, probes: &Probes) {
        let uptime = self.path.join("proc/uptime");
        'probes: loop {
            tokio::time::sleep(probes.interval).await;
            let (uptime, mut used) = (uptime.clone(), pid.and_then(child::cpu_time));
            // An error is a response too: an unmounted or covered path is noticed elsewhere.
            let probe = probes.workers.run(move |_| std::fs::read(uptime).is_ok()).await;
            let Err(JobTimeout { result, .. }) = probe else { continue };
            let Some(mut result) = result else { return };
            for _ in 0..MAX_EXTENSIONS {
                let before = std::mem::replace(&mut used, pid.and_then(child::cpu_time));
                let Some((used, before)) = used.zip(before) else { return };
                let worked = used.saturating_sub(before);
                if worked < self.watchdog / WORKING_SHARE {
                    return;
                }
                tracing::warn!(cpu_time = ?worked, "lxcfs responds late, but works");
                if tokio::time::timeout(self.watchdog, &mut result).await.is_ok() {
                    continue 'probes;
                }
            }
            return;
        }
    }

    /// Keeps an lxcfs that stopped serving from new views.
    fn stop_serving(&self, dev: Dev, reason: &ExitReason) {
        match reason {
            ExitReason::Hung => {
                let timeout = self.watchdog;
                tracing::error!(exit_reason = "hung", ?timeout, "killing an unresponsive lxcfs");
            }
            ExitReason::Unmounted => {
                let path = self.path.display();
                tracing::error!(exit_reason = "unmounted", %path, "lxcfs unmounted or covered");
            }
            ExitReason::Exited(_) | ExitReason::Shutdown => {}
        }
        // From here on no new view can be made of it. Existing ones work until it exits.
        while identify(&self.path).is_some_and(|top| top.dev == dev) && detach(&self.path).is_ok() {
        }
    }

    /// Removes the views of an lxcfs that stopped serving, before it is terminated if it still
    /// runs.
    async fn sweep_before_exit(
        &self,
        child: &mut Child,
        dev: Dev,
        reason: &ExitReason,
        sweepers: &Workers,
    ) {
        sweep(sweepers, dev, &self.metrics).await;
        if matches!(reason, ExitReason::Shutdown | ExitReason::Unmounted) {
            tokio::time::sleep(DRAIN).await;
        }
        if let ExitReason::Shutdown = reason {
            child::terminate(child).await;
            // An injection that was in progress at the first sweep has finished by now.
            sweep(sweepers, dev, &self.metrics).await;
        }
    }

    /// Removes the pid file, and the volume if no other pod uses it.
    fn clean_up(&self) {
        let _ = std::fs::remove_file(child::pid_file(&self.path));
        if let Err(e) = volume::remove_if_unused(&self.path) {
            tracing::warn!(cause = %e, "failed to remove the volume of lxcfs");
        }
        tracing::info!(exit_reason = "shutdown", "lxcfs stopped");
    }
}

/// Detaches every lxcfs that is on top at the serving path. Other mounts stay.
fn unmount_all(path: &Path) {
    while identify(path).is_some() && detach(path).is_ok() {}
}

fn detach(path: &Path) -> rustix::io::Result<()> {
    rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
}

async fn sweep(sweepers: &Workers, dev: Dev, metrics: &SupervisorMetrics) {
    let swept = node::sweep(sweepers, HashSet::from([dev])).await;
    node::log_sweep(&swept);
    // A sweep that failed as a whole counts as one failure.
    metrics.swept(swept.map_or(1, |summary| summary.failed));
}

/// Holds the lxcfs with this device at the serving path, if it is mounted there. Sends it no
/// request.
fn hold(path: &Path, dev: Dev) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = rustix::fs::statx(&root, "", flags, StatxFlags::MNT_ID).ok()?;
    let found = Dev { major: found.stx_dev_major, minor: found.stx_dev_minor };
    (found == dev).then_some(root)
}

/// Shares the connection of lxcfs. Without it, readers of its views get errors while an exited
/// lxcfs is swept.
fn share(child: &Child, lxcfs: Arc<LxcfsFiles>) -> Option<Connection> {
    let shared = child::pid(child).map(|pid| Connection::share(pid, lxcfs))?;
    shared.inspect_err(|cause| tracing::warn!(%cause, "failed to share lxcfs's connection")).ok()
}

/// The delay before a restart: none after the first failure.
fn restart_delay(failures: u32) -> Duration {
    failures.checked_sub(2).map_or(Duration::ZERO, |attempt| RESTART.delay(attempt))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restart_delays_grow_from_the_second_failure() {
        let delays: Vec<u128> = (0..12).map(|n| restart_delay(n).as_millis()).collect();
        assert_eq!(delays, [0, 0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000, 5000]);
    }
}
