//! Watches the serving lxcfs: reports when it exits, hangs, is unmounted or replaced. The sources
//! are the pidfd of its process, the kernel's notification about the mount table, and as the last
//! resort a periodic probe.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::fs::{Mode, OFlags};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc::Sender,
    task::JoinHandle,
    time::{Instant, Interval, MissedTickBehavior},
};

use super::{
    Error, Finder, Identity, identify, is_writable_at, mounted_at,
    server::{ServingProcess, serving_process},
};
use crate::{mount::Workers, sys};

/// The interval between probes of lxcfs.
const PROBE_INTERVAL: Duration = Duration::from_secs(30);
/// The interval between checks whether a writable lxcfs has become read-only, of which the kernel
/// sends no notification: at first, and after [`READ_ONLY_SOON`].
const READ_ONLY_INTERVAL: Duration = Duration::from_secs(1);
const READ_ONLY_LONG_INTERVAL: Duration = Duration::from_secs(30);
const READ_ONLY_SOON: Duration = Duration::from_secs(60);
/// The pause after a search for the process of lxcfs that did not reach every process.
const SEARCH_AGAIN: Duration = Duration::from_secs(10);
/// On a busy node mounts change all the time; they are noticed at most this often.
const DEBOUNCE: Duration = Duration::from_millis(200);

/// A change of the serving lxcfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Another lxcfs serves at the path now, or none. The previous one may still respond.
    Mounted(Option<Identity>),
    /// Its process exited. `supervised`: by a `kube-lxcfs lxcfs`, which sweeps.
    Exited { was: Identity, supervised: bool, noticed_by: NoticedBy },
    /// It does not respond.
    Unresponsive(Identity),
    /// It was writable, so that it did not serve `cpu`, and has become read-only.
    ReadOnly(Identity),
}

/// How the exit of an lxcfs was noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoticedBy {
    /// Its process's pidfd, without delay.
    Pidfd,
    /// A probe, up to 30 s later.
    Probe,
}

/// The kernel's notification that our mount table changed.
#[derive(Debug)]
pub struct MountTableWatch {
    table: OwnedFd,
    /// A duplicate of `table` that is watched. None during the debounce, so that no change wakes
    /// the thread.
    watched: Option<AsyncFd<OwnedFd>>,
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
        let watched = Some(watch(&table)?);
        Ok(MountTableWatch { table, watched, last_change: Instant::now() })
    }

    /// Waits until the table may have changed since the last call. Cancel safe.
    pub async fn changed(&mut self) {
        if let Some(watched) = &self.watched {
            let _ = watched.ready(Interest::PRIORITY | Interest::ERROR).await;
            self.watched = None;
        } else {
            tokio::time::sleep_until(self.last_change + DEBOUNCE).await;
            // A change during the debounce is not seen by `ready`: to register the descriptor takes
            // note of it (epoll_ctl(2) polls once), and only later ones are reported.
            self.watched = watch(&self.table).ok();
        }
        self.last_change = Instant::now();
    }
}

/// Watches a mount table: poll(2) returns POLLERR and POLLPRI when it changed since the last poll
/// (proc(5)).
fn watch(table: &OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    sys::async_fd(table.try_clone()?, Interest::PRIORITY | Interest::ERROR)
}

/// Watches the lxcfs at one path.
#[derive(Debug)]
pub struct Watcher {
    finder: Finder,
    workers: Workers,
    mount_table: MountTableWatch,
    current: Option<Identity>,
    server: Option<Server>,
    /// `server` is not searched for yet.
    unsearched: bool,
    /// When the search for its process is repeated, if it ended early.
    search_again: Option<Instant>,
    /// The log says that the search ended early.
    logged: bool,
    probe: Interval,
    probing: Option<JoinHandle<Result<(), Error>>>,
    /// [`Change::Unresponsive`] was reported and still holds.
    unresponsive: bool,
    /// Since when the current lxcfs is known to be writable, and when that is checked again.
    writable: Option<(Instant, Instant)>,
}

/// The process that serves the mount.
#[derive(Debug)]
struct Server {
    exited: AsyncFd<OwnedFd>,
    supervised: bool,
    /// See [`ServingProcess::certain`].
    certain: bool,
}

impl Watcher {
    /// # Errors
    /// Fails if the mount table cannot be watched.
    pub fn new(finder: Finder, workers: Workers) -> io::Result<Watcher> {
        let mount_table = MountTableWatch::new()?;
        let mut probe = tokio::time::interval_at(Instant::now() + PROBE_INTERVAL, PROBE_INTERVAL);
        probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let current = identify(finder.path());
        let mut watcher = Watcher {
            finder,
            workers,
            mount_table,
            current,
            server: None,
            unsearched: true,
            search_again: None,
            logged: false,
            probe,
            probing: None,
            unresponsive: false,
            writable: None,
        };
        watcher.watch_writable();
        Ok(watcher)
    }

    /// Starts the checks whether the current lxcfs becomes read-only, if it is not.
    fn watch_writable(&mut self) {
        let writable = self.current.is_some() && is_writable_at(self.finder.path());
        let now = Instant::now();
        self.writable = writable.then_some((now, now + READ_ONLY_INTERVAL));
    }

    /// Checks whether the current lxcfs has become read-only.
    fn read_only(&mut self) -> Option<Change> {
        let ((since, _), current) = (self.writable?, self.current?);
        if is_writable_at(self.finder.path()) {
            let soon = since.elapsed() < READ_ONLY_SOON;
            let interval = if soon { READ_ONLY_INTERVAL } else { READ_ONLY_LONG_INTERVAL };
            self.writable = Some((since, Instant::now() + interval));
            return None;
        }
        self.writable = None;
        Some(Change::ReadOnly(current))
    }

    /// Finds out whether another lxcfs is mounted after a change of the mount table, or none. Each
    /// start of a container changes the table, and a full node's is long: it is not read while the
    /// mount is the same.
    fn remounted(&mut self) -> Option<Change> {
        let path = self.finder.path();
        if self.current.is_some_and(|current| mounted_at(path) == Some(current)) {
            return None;
        }
        let current = identify(path);
        if current == self.current {
            return None;
        }
        self.current = current;
        self.unresponsive = false;
        self.watch_writable();
        (self.server, self.unsearched) = (None, true);
        self.search_again = None;
        Some(Change::Mounted(current))
    }

    /// Sends every change until the receiver is dropped.
    pub async fn run(mut self, changes: Sender<Change>) {
        loop {
            if std::mem::take(&mut self.unsearched) {
                self.logged = false;
                self.find_server().await;
                if self.server.is_none() {
                    // It may have exited before the search.
                    self.probe.reset_immediately();
                }
            }
            let change = self.changed().await;
            if changes.send(change).await.is_err() {
                return;
            }
        }
    }

    /// Finds the process that serves now, on a worker thread: a hostile process can make reads of
    /// its arguments block. A search that ends early is repeated later.
    async fn find_server(&mut self) {
        (self.server, self.search_again) = (None, None);
        let (Some(current), path) = (self.current, self.finder.path().to_owned()) else { return };
        let found = self.workers.run(move |_| serving_process(current, &path)).await;
        let cause: &dyn std::error::Error = match &found {
            Ok(Ok(found)) => {
                self.server = found.as_ref().and_then(Server::watch);
                return;
            }
            Ok(Err(incomplete)) => incomplete,
            Err(timeout) => &timeout.error,
        };
        self.search_again = Some(Instant::now() + SEARCH_AGAIN);
        if !std::mem::replace(&mut self.logged, true) {
            tracing::warn!(%cause, "failed to find the process of lxcfs, trying again");
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
            let check = self.writable.filter(|_| self.current.is_some()).map(|(_, at)| at);
            let checked = async {
                match check {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let search_again = self.search_again;
            let search = async {
                match search_again {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = exited => {
                    let Some(Server { supervised, certain, .. }) = self.server.take() else {
                        continue;
                    };
                    if !certain {
                        self.find_server().await;
                        if self.server.is_some() {
                            continue;
                        }
                        if self.search_again.is_some() {
                            self.probe.reset_immediately();
                            continue;
                        }
                    }
                    if let Some(was) = self.current.take() {
                        let noticed_by = NoticedBy::Pidfd;
                        return Change::Exited { was, supervised, noticed_by };
                    }
                }
                () = self.mount_table.changed() => {
                    if let Some(change) = self.remounted() {
                        return change;
                    }
                }
                () = search => self.find_server().await,
                () = checked => {
                    if let Some(change) = self.read_only() {
                        return change;
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
                            (self.server, self.search_again) = (None, None);
                            let noticed_by = NoticedBy::Probe;
                            return Change::Exited { was, supervised: false, noticed_by };
                        }
                        _ => {}
                    }
                }
            }
        }
    }
}

impl Server {
    fn watch(found: &ServingProcess) -> Option<Server> {
        let ServingProcess { process, supervised, certain } = found;
        let pidfd = process.as_fd().try_clone_to_owned().ok()?;
        let exited = sys::async_fd(pidfd, Interest::READABLE).ok()?;
        Some(Server { exited, supervised: *supervised, certain: *certain })
    }
}
