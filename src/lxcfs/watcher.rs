//! Watches the serving lxcfs: reports when it exits, hangs, is unmounted or replaced. The sources
//! are the pidfd of its process, the kernel's notification about the mount table, and as the last
//! resort a periodic probe.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::fs::{Mode, OFlags};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc::Sender,
    task::JoinHandle,
    time::{Instant, Interval, MissedTickBehavior},
};

use super::{Error, Finder, Identity, identify, server};
use crate::{mount::Workers, sys};

/// The interval between probes of lxcfs.
const PROBE_INTERVAL: Duration = Duration::from_secs(30);
/// On a busy node mounts change all the time; the table is read at most this often.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// A change of the serving lxcfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Another lxcfs serves at the path now, or none. The previous one may still respond.
    Mounted(Option<Identity>),
    /// Its process exited. `supervised`: by a `kube-lxcfs lxcfs`, which sweeps.
    Exited { was: Identity, supervised: bool },
    /// It does not respond.
    Unresponsive(Identity),
}

/// The kernel's notification that our mount table changed.
#[derive(Debug)]
pub struct MountTableWatch {
    table: AsyncFd<OwnedFd>,
    last_change: Instant,
}

impl MountTableWatch {
    /// # Errors
    /// Fails if the mount table cannot be watched.
    pub fn new() -> io::Result<MountTableWatch> {
        let table = rustix::fs::open(
            "/proc/self/mountinfo",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let table = sys::async_fd(table, Interest::PRIORITY | Interest::ERROR)?;
        Ok(MountTableWatch { table, last_change: Instant::now() })
    }

    /// Waits until the table changed since the last call. Cancel safe.
    pub async fn changed(&mut self) {
        // poll(2) returns POLLERR and POLLPRI when the table changed since the last call (proc(5)).
        let ready = self.table.ready(Interest::PRIORITY | Interest::ERROR).await;
        tokio::time::sleep_until(self.last_change + DEBOUNCE).await;
        if let Ok(mut ready) = ready {
            ready.clear_ready();
        }
        self.last_change = Instant::now();
    }
}

/// Watches the lxcfs at one path.
#[derive(Debug)]
pub struct Watcher {
    finder: Finder,
    workers: Workers,
    mount_table: MountTableWatch,
    current: Option<Identity>,
    server: Option<Server>,
    probe: Interval,
    probing: Option<JoinHandle<Result<(), Error>>>,
    /// [`Change::Unresponsive`] was reported and still holds.
    unresponsive: bool,
}

/// The process that serves the mount.
#[derive(Debug)]
struct Server {
    exited: AsyncFd<OwnedFd>,
    supervised: bool,
}

impl Watcher {
    /// # Errors
    /// Fails if the mount table cannot be watched.
    pub fn new(finder: Finder, workers: Workers) -> io::Result<Watcher> {
        let mount_table = MountTableWatch::new()?;
        let mut probe = tokio::time::interval_at(Instant::now() + PROBE_INTERVAL, PROBE_INTERVAL);
        probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let current = identify(finder.path());
        let server = current.and_then(|current| Server::of(current, finder.path()));
        Ok(Watcher {
            finder,
            workers,
            mount_table,
            current,
            server,
            probe,
            probing: None,
            unresponsive: false,
        })
    }

    /// Sends every change until the receiver is dropped.
    pub async fn run(mut self, changes: Sender<Change>) {
        loop {
            let change = self.changed().await;
            if changes.send(change).await.is_err() {
                return;
            }
        }
    }

    /// Waits for the next change.
    async fn changed(&mut self) -> Change {
        loop {
            let exited = async {
                match &self.server {
                    Some(server) => drop(server.exited.readable().await),
                    None => std::future::pending().await,
                }
            };
            let may_probe = self.current.is_some() && self.probing.is_none();
            let probed = async {
                match &mut self.probing {
                    Some(probing) => probing.await.unwrap_or(Ok(())),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = exited => {
                    let supervised = self.server.take().is_some_and(|server| server.supervised);
                    if let Some(was) = self.current.take() {
                        return Change::Exited { was, supervised };
                    }
                }
                () = self.mount_table.changed() => {
                    let current = identify(self.finder.path());
                    if current != self.current {
                        self.current = current;
                        self.unresponsive = false;
                        let path = self.finder.path();
                        self.server = current.and_then(|current| Server::of(current, path));
                        return Change::Mounted(current);
                    }
                }
                _ = self.probe.tick(), if may_probe => {
                    let (finder, workers) = (self.finder.clone(), self.workers.clone());
                    let probing = async move { finder.find(&workers).await.map(drop) };
                    self.probing = Some(tokio::spawn(probing));
                }
                found = probed => {
                    self.probing = None;
                    match (found, self.current) {
                        (Err(Error::Hung { .. }), Some(was)) if !self.unresponsive => {
                            self.unresponsive = true;
                            return Change::Unresponsive(was);
                        }
                        (Ok(()), _) => self.unresponsive = false,
                        (Err(Error::Dead(_)), Some(was)) => {
                            self.current = None;
                            self.server = None;
                            return Change::Exited { was, supervised: false };
                        }
                        _ => {}
                    }
                }
            }
        }
    }
}

impl Server {
    fn of(identity: Identity, path: &Path) -> Option<Server> {
        let process = server::serving_process(identity, path)?;
        let parent = procfs::process::Process::new(process.pid()).and_then(|p| p.stat()).ok()?.ppid;
        let parent =
            procfs::process::Process::new(parent).and_then(|p| p.stat()).map(|stat| stat.comm);
        let pidfd = process.as_fd().try_clone_to_owned().ok()?;
        let exited = sys::async_fd(pidfd, Interest::READABLE).ok()?;
        Some(Server { exited, supervised: parent.is_ok_and(|comm| comm == "kube-lxcfs") })
    }
}
