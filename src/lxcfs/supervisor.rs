//! `kube-lxcfs lxcfs`: runs lxcfs as its child, and sees to it that no container keeps a dead view or hangs on a hung lxcfs.
//!
//! When lxcfs ends, the serving path is unmounted first, so that nobody can make new views of it, then every mount namespace is
//! swept, then lxcfs is started again. When it is told to end, the same comes before lxcfs does, so that no reader sees an error.

use std::{
    collections::HashSet,
    ffi::OsString,
    io,
    os::{fd::AsFd, unix::process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    mount::UnmountFlags,
    process::{Pid, Signal},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

use super::{Error as FindError, Finder, Identity, mounted, server, volume, watch::Notice};
use crate::{
    mount::{Process, Workers},
    node,
    plan::Dev,
};

/// Options that are given when this lxcfs knows them: load average, CPU limits as CPU counts, and pidfds.
const OPTIONS: [&str; 3] = ["--enable-loadavg", "--enable-cfs", "--enable-pidfd"];
/// Waiting for RCU is most of what detaching a mount costs, so many threads sweep at once, whatever the number of CPUs.
const SWEEPERS: usize = 48;
/// The nice value of the supervisor and of lxcfs (setpriority(2)).
const NICE: i32 = -10;
/// A sweep's visit to one namespace may take this long.
const DEADLINE: Duration = Duration::from_secs(5);
/// So long lxcfs may take to serve after its start, and to end after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(10);
const FAREWELL: Duration = Duration::from_millis(500);
/// So often lxcfs is asked for its options when somebody kills it over that.
const HELP_TRIES: u32 = 3;
/// Readers that opened a view file just before it was taken out finish within this time.
const DRAIN: Duration = Duration::from_millis(200);
/// Restarts wait nothing at first, then this, doubled each time up to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// An lxcfs that served so long was healthy.
const HEALTHY: Duration = Duration::from_secs(60);

/// What is run, and where.
#[derive(Clone, Debug)]
pub struct Supervisor {
    pub path: PathBuf,
    pub bin: PathBuf,
    pub args: Vec<OsString>,
    /// An lxcfs that gives no answer for so long is killed.
    pub watchdog: Duration,
}

/// Why lxcfs cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{bin} cannot be run: {cause}; install lxcfs, or name its program with --lxcfs-bin")]
    Bin { bin: PathBuf, cause: io::Error },
    #[error("lxcfs path {path}: {cause}")]
    Path { path: PathBuf, cause: io::Error },
    #[error("no thread could be made to sweep in: {0}")]
    Workers(io::Error),
    #[error("signals cannot be listened for: {0}")]
    Signals(io::Error),
    #[error("the mount table cannot be watched: {0}")]
    Watch(io::Error),
}

/// Why serving ended.
enum Ended {
    Exit(io::Result<ExitStatus>),
    Hung,
    /// Somebody unmounted the serving path, or mounted something over it. Views go on working.
    Unmounted,
    Told,
}

/// Those who served at our path before us, and answer still.
struct Predecessors {
    processes: Vec<(Process, Option<Dev>)>,
    /// The one that was mounted.
    mounted: Option<Dev>,
}

impl Predecessors {
    /// Whether views of this lxcfs are theirs. On a kernel that does not tell a process's device that may be any.
    fn may_be(&self, dev: Dev) -> bool {
        self.mounted == Some(dev) || self.processes.iter().any(|(_, of)| of.is_none_or(|of| of == dev))
    }
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl Signals {
    async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

impl Supervisor {
    /// Runs until SIGTERM or SIGINT, and leaves no mount, no process and no view.
    ///
    /// # Errors
    /// When lxcfs cannot be run at all; an lxcfs that ends or hangs is restarted.
    pub async fn run(self) -> Result<(), Error> {
        let listen = |kind| signal(kind).map_err(Error::Signals);
        let mut signals = Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
        };
        // Every reader of the node waits for these threads, and for lxcfs, which inherits it. Without CAP_SYS_NICE it is as it is.
        let _ = rustix::process::setpriority_process(None, NICE);
        let sweepers = Workers::start(SWEEPERS, DEADLINE).map_err(Error::Workers)?;
        // It is asked ten times within the watchdog's time; so the unanswered question is that much younger than the hang.
        let pulse = self.watchdog / 10;
        let askers = Workers::start(1, self.watchdog.saturating_sub(pulse)).map_err(Error::Workers)?;
        let options = self.options().await?;
        let mut notice = Notice::new().map_err(Error::Watch)?;
        let mut predecessors = self.prepare(&sweepers).await?;
        let mut failures = 0;
        loop {
            let begun = Instant::now();
            let mut child = self.start(&options)?;
            let ended = match self.until_serving(&mut child, &askers, &mut signals).await {
                Err(ended) => ended,
                Ok(identity) => {
                    tracing::info!(lxcfs = "serving", dev = %identity.dev, elapsed = ?begun.elapsed(), "lxcfs serves");
                    self.make_current(&sweepers, &askers, &mut predecessors).await;
                    let ended = self.serve(&mut child, identity, &askers, pulse, &mut notice, &mut signals).await;
                    let died = Instant::now();
                    if let Ended::Hung = ended {
                        tracing::error!(exit_reason = "hung", timeout = ?self.watchdog, "lxcfs is unresponsive, killing it");
                        let _ = child.start_kill();
                    }
                    // Nobody can make new views of it from here on; those that are there go on working while it lives.
                    self.unmount(identity.dev);
                    sweep(&sweepers, identity.dev).await;
                    if matches!(ended, Ended::Told | Ended::Unmounted) {
                        tokio::time::sleep(DRAIN).await;
                    }
                    if let Ended::Told = ended {
                        self.end(&mut child).await;
                        // Whoever was putting a view in at that moment is done now.
                        sweep(&sweepers, identity.dev).await;
                        self.leave();
                        tracing::info!(exit_reason = "shutdown", "lxcfs stopped");
                        return Ok(());
                    }
                    tracing::info!(took = ?died.elapsed(), "swept");
                    ended
                }
            };
            if let Ended::Told = ended {
                self.end(&mut child).await;
                self.unmount_all();
                self.leave();
                return Ok(());
            }
            match &ended {
                Ended::Exit(Ok(status)) => {
                    let (status, elapsed) = (describe(*status), begun.elapsed());
                    tracing::error!(exit_reason = "exited", status, ?elapsed, "lxcfs exited");
                }
                Ended::Exit(Err(e)) => tracing::error!("lxcfs cannot be waited for: {e}"),
                _ => {}
            }
            self.end(&mut child).await;
            self.unmount_all();
            failures = if begun.elapsed() >= HEALTHY { 0 } else { failures + 1 };
            let wait = backoff(failures);
            tracing::info!("lxcfs is started again in {wait:?}");
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = signals.end() => {
                    self.leave();
                    return Ok(());
                }
            }
        }
    }

    /// Those of our options that this lxcfs knows, by its own help: versions differ.
    async fn options(&self) -> Result<Vec<&'static str>, Error> {
        let failed = |cause| Error::Bin { bin: self.bin.clone(), cause };
        let mut tries = 0;
        let told = loop {
            let mut help = Command::new(&self.bin);
            help.arg("--help").stdin(Stdio::null()).kill_on_drop(true);
            let told = match tokio::time::timeout(PATIENCE, help.output()).await {
                Ok(told) => told.map_err(failed)?,
                Err(_) => return Err(failed(io::ErrorKind::TimedOut.into())),
            };
            tries += 1;
            // Its exit status differs from version to version; but one that was killed has not said all it knows.
            match told.status.code() {
                Some(_) => break told,
                None if tries < HELP_TRIES => {}
                None => return Err(failed(io::Error::other(format!("--help ended by {}", describe(told.status))))),
            }
        };
        let text = String::from_utf8_lossy(&[told.stdout, told.stderr].concat()).into_owned();
        Ok(OPTIONS.into_iter().filter(|option| text.contains(option)).collect())
    }

    /// Cleans up after predecessors. One that answers still is unmounted here but goes on answering in containers, until the new
    /// one has taken over; such are returned.
    async fn prepare(&self, sweepers: &Workers) -> Result<Predecessors, Error> {
        let mut predecessors = Predecessors { processes: server::started_at(&self.path), mounted: None };
        let mut hung = None;
        if let Some(Identity { dev, .. }) = mounted(&self.path) {
            match Finder::new(&self.path).find(sweepers).await {
                Ok(_) => predecessors.mounted = Some(dev),
                Err(e) => {
                    tracing::info!("a predecessor left its mount: {e}");
                    predecessors.processes.drain(..).for_each(|(process, _)| kill(&process));
                    hung = Some(dev);
                }
            }
        }
        self.unmount_all();
        for (process, _) in &predecessors.processes {
            tracing::info!(pid = process.pid(), "a predecessor runs still and will be replaced");
        }
        match node::sweep_dead(sweepers, hung).await {
            Ok(swept) if swept.files > 0 => tracing::info!(%swept, "dead views of a predecessor are gone"),
            Ok(_) => {}
            Err(e) => tracing::warn!("dead views could not be looked for: {e}"),
        }
        Ok(predecessors)
    }

    fn start(&self, options: &[&str]) -> Result<Child, Error> {
        // Each time: whoever removes it must not keep lxcfs away for good.
        std::fs::create_dir_all(&self.path).map_err(|cause| Error::Path { path: self.path.clone(), cause })?;
        let pid_file = self.pid_file();
        let _ = std::fs::remove_file(&pid_file);
        let mut command = Command::new(&self.bin);
        command.arg("-f").args(options).arg("-p").arg(pid_file).args(&self.args).arg(&self.path);
        // Ctrl-C at a terminal is ours to handle: the containers come first.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().map_err(|cause| Error::Bin { bin: self.bin.clone(), cause })?;
        forward(child.stdout.take());
        forward(child.stderr.take());
        Ok(child)
    }

    async fn until_serving(
        &self,
        child: &mut Child,
        askers: &Workers,
        signals: &mut Signals,
    ) -> Result<Identity, Ended> {
        let begun = Instant::now();
        let finder = Finder::new(&self.path);
        let serves = async {
            loop {
                if let Some(identity) = mounted(&self.path) {
                    match finder.find(askers).await {
                        Ok(_) => return Some(identity),
                        Err(FindError::Hung { .. }) => return None,
                        Err(_) => {}
                    }
                }
                if begun.elapsed() > PATIENCE {
                    return None;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            serves = serves => serves.ok_or(Ended::Hung),
            status = child.wait() => Err(Ended::Exit(status)),
            () = signals.end() => Err(Ended::Told),
        }
    }

    /// Views of predecessors that answer still are swapped; then those are ended. When this one hangs or dies already, that is left to
    /// the next.
    async fn make_current(&self, sweepers: &Workers, askers: &Workers, predecessors: &mut Predecessors) {
        if predecessors.processes.is_empty() && predecessors.mounted.is_none() {
            return;
        }
        let Ok(source) = Finder::new(&self.path).find(askers).await else { return };
        match node::refresh(sweepers, &source, |dev| predecessors.may_be(dev)).await {
            Ok(swapped) if swapped.files > 0 => tracing::info!(%swapped, "views are current"),
            Ok(_) => {}
            Err(e) => return tracing::warn!("views of an earlier lxcfs could not be looked for: {e}"),
        }
        drop(source);
        predecessors.mounted = None;
        if !predecessors.processes.is_empty() {
            tokio::time::sleep(DRAIN).await;
        }
        for (process, _) in predecessors.processes.drain(..) {
            kill(&process);
            tracing::info!(pid = process.pid(), "the predecessor has ended");
        }
    }

    async fn serve(
        &self,
        child: &mut Child,
        was: Identity,
        askers: &Workers,
        pulse: Duration,
        notice: &mut Notice,
        signals: &mut Signals,
    ) -> Ended {
        let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let uptime = self.path.join("proc/uptime");
        let hangs = async {
            loop {
                tokio::time::sleep(pulse).await;
                let uptime = uptime.clone();
                // An error is an answer: a path that was unmounted or covered under our feet is seen below.
                if askers.run(move |_| std::fs::read(uptime).is_ok()).await.is_err() {
                    return;
                }
            }
        };
        let unmounted = async {
            // Covered by something else it is no longer served, and a covered lxcfs is of no use to anybody.
            while mounted(&self.path) == Some(was) {
                notice.changed().await;
            }
        };
        tokio::pin!(hangs, unmounted);
        loop {
            tokio::select! {
                status = child.wait() => return Ended::Exit(status),
                () = &mut hangs => return Ended::Hung,
                () = &mut unmounted => {
                    tracing::error!(exit_reason = "unmounted", path = %self.path.display(), "lxcfs is no longer the topmost mount");
                    return Ended::Unmounted;
                }
                _ = signals.terminate.recv() => return Ended::Told,
                _ = signals.interrupt.recv() => return Ended::Told,
                _ = signals.hangup.recv() => {
                    tracing::info!("liblxcfs is loaded anew");
                    if let Some(pid) = pid {
                        let _ = rustix::process::kill_process(pid, Signal::USR1);
                    }
                }
            }
        }
    }

    /// Leaves nothing behind.
    fn leave(&self) {
        let _ = std::fs::remove_file(self.pid_file());
        if let Err(e) = volume::leave(&self.path) {
            tracing::warn!("the volume that lxcfs was mounted in stays: {e}");
        }
    }

    /// Ends the child if it runs still.
    async fn end(&self, child: &mut Child) {
        if let Some(pid) = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            let _ = rustix::process::kill_process(pid, Signal::TERM);
            // Nobody has a view of it any more: nothing is lost when it does not hurry.
            if tokio::time::timeout(FAREWELL, child.wait()).await.is_err() {
                let _ = child.kill().await;
            }
        }
    }

    /// Detaches this lxcfs's mount from the serving path, if it is on top there.
    fn unmount(&self, dev: Dev) {
        while mounted(&self.path).is_some_and(|on_top| on_top.dev == dev) && detach(&self.path).is_ok() {}
    }

    /// Detaches every lxcfs that is on top at the serving path; what else lies there is none of ours.
    fn unmount_all(&self) {
        while mounted(&self.path).is_some() && detach(&self.path).is_ok() {}
    }

    /// Beside the path, so that it goes with the directory that was given to us.
    fn pid_file(&self) -> PathBuf {
        let name = self.path.file_name().map_or_else(|| "lxcfs".into(), |name| name.to_string_lossy().into_owned());
        self.path.with_file_name(format!(".{name}.pid"))
    }
}

/// Not with SIGTERM: an lxcfs that ends in order unmounts whatever is mounted at its path, its successor for one.
fn kill(process: &Process) {
    // It may have ended by itself meanwhile.
    let _ = rustix::process::pidfd_send_signal(process.as_fd(), Signal::KILL);
}

fn detach(path: &Path) -> rustix::io::Result<()> {
    rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
}

async fn sweep(sweepers: &Workers, dev: Dev) {
    match node::sweep(sweepers, HashSet::from([dev])).await {
        Ok(swept) if swept.files > 0 => {
            tracing::info!(swept_files = swept.files, %swept, "removed views of an exited lxcfs");
        }
        Ok(_) => {}
        Err(e) => tracing::error!("containers could not be swept: {e}"),
    }
}

fn backoff(failures: u32) -> Duration {
    match failures {
        0 | 1 => Duration::ZERO,
        n => BACKOFF.0.saturating_mul(1 << (n - 2).min(16)).min(BACKOFF.1),
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => status.to_string(),
    }
}

/// Forwards what lxcfs says to the log, line by line.
fn forward(output: Option<impl AsyncRead + Unpin + Send + 'static>) {
    let Some(output) = output else { return };
    tokio::spawn(async move {
        let mut lines = BufReader::new(output).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            tracing::info!("lxcfs: {line}");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_wait_nothing_at_first_and_ever_longer_then() {
        let waits: Vec<u128> = (0..12).map(|n| backoff(n).as_millis()).collect();
        assert_eq!(waits, [0, 0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000, 5000]);
    }
}
