//! Learns at once when the serving lxcfs ends, hangs, is unmounted or replaced: from the pidfd of its process, from the mount
//! table's own notice, and as the last resort from a probe.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::fs::{Mode, OFlags};
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::JoinHandle,
    time::{Instant, Interval, MissedTickBehavior},
};

use super::{Error, Finder, Identity, mounted, server};
use crate::{mount::Workers, sys};

/// The last resort.
const PROBE: Duration = Duration::from_secs(30);
/// On a busy node mounts come and go all the time; the table is read at most this often.
const BREATH: Duration = Duration::from_millis(50);

/// What became of the lxcfs that served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// This one serves at the path now, or none: another than before. The one before may still answer.
    Mounted(Option<Identity>),
    /// Its process ended. `supervised`: by a `kube-lxcfs lxcfs`, which sweeps.
    Ended { was: Identity, supervised: bool },
    /// It does not answer.
    Hangs(Identity),
}

/// The kernel's notice that our mount table changed.
#[derive(Debug)]
pub(super) struct Notice {
    table: AsyncFd<OwnedFd>,
    looked: Instant,
}

impl Notice {
    /// # Errors
    /// When the mount table cannot be watched.
    pub(super) fn new() -> io::Result<Notice> {
        let table = rustix::fs::open("/proc/self/mountinfo", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let table = sys::watch(table, Interest::PRIORITY | Interest::ERROR)?;
        Ok(Notice { table, looked: Instant::now() })
    }

    /// Waits until the table changed since the last call. Cancel safe.
    pub(super) async fn changed(&mut self) {
        // A poll of the table is answered with POLLERR and POLLPRI when it changed since the last one (proc(5)).
        let noticed = self.table.ready(Interest::PRIORITY | Interest::ERROR).await;
        tokio::time::sleep_until(self.looked + BREATH).await;
        if let Ok(mut noticed) = noticed {
            noticed.clear_ready();
        }
        self.looked = Instant::now();
    }
}

/// Watches one path.
#[derive(Debug)]
pub struct Watch {
    finder: Finder,
    workers: Workers,
    notice: Notice,
    now: Option<Identity>,
    server: Option<Server>,
    probe: Interval,
    probing: Option<JoinHandle<Result<(), Error>>>,
    /// It was told that it hangs.
    hangs: bool,
}

/// The process that answers for a mount.
#[derive(Debug)]
struct Server {
    ended: AsyncFd<OwnedFd>,
    supervised: bool,
}

impl Watch {
    /// # Errors
    /// When the mount table cannot be watched.
    pub fn new(finder: Finder, workers: Workers) -> io::Result<Watch> {
        let notice = Notice::new()?;
        let mut probe = tokio::time::interval_at(Instant::now() + PROBE, PROBE);
        probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let now = mounted(finder.path());
        let server = now.and_then(|now| Server::of(now, finder.path()));
        Ok(Watch { finder, workers, notice, now, server, probe, probing: None, hangs: false })
    }

    /// Waits for the next change. Cancel safe: what is not told now is told by the next call.
    pub async fn changed(&mut self) -> Change {
        loop {
            let ended = async {
                match &self.server {
                    Some(server) => drop(server.ended.readable().await),
                    None => std::future::pending().await,
                }
            };
            let may_probe = self.now.is_some() && self.probing.is_none();
            let probed = async {
                match &mut self.probing {
                    Some(probing) => probing.await.unwrap_or(Ok(())),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = ended => {
                    let supervised = self.server.take().is_some_and(|server| server.supervised);
                    if let Some(was) = self.now.take() {
                        return Change::Ended { was, supervised };
                    }
                }
                () = self.notice.changed() => {
                    let now = mounted(self.finder.path());
                    if now != self.now {
                        self.now = now;
                        self.hangs = false;
                        self.server = now.and_then(|now| Server::of(now, self.finder.path()));
                        return Change::Mounted(now);
                    }
                }
                _ = self.probe.tick(), if may_probe => {
                    let (finder, workers) = (self.finder.clone(), self.workers.clone());
                    self.probing = Some(tokio::spawn(async move { finder.find(&workers).await.map(drop) }));
                }
                found = probed => {
                    self.probing = None;
                    match (found, self.now) {
                        (Err(Error::Hung { .. }), Some(was)) if !self.hangs => {
                            self.hangs = true;
                            return Change::Hangs(was);
                        }
                        (Ok(()), _) => self.hangs = false,
                        (Err(Error::Dead(_)), Some(was)) => {
                            self.now = None;
                            self.server = None;
                            return Change::Ended { was, supervised: false };
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
        let process = server::serving(identity, path)?;
        let parent = procfs::process::Process::new(process.pid()).and_then(|p| p.stat()).ok()?.ppid;
        let parent = procfs::process::Process::new(parent).and_then(|p| p.stat()).map(|stat| stat.comm);
        let pidfd = process.as_fd().try_clone_to_owned().ok()?;
        let ended = sys::watch(pidfd, Interest::READABLE).ok()?;
        Some(Server { ended, supervised: parent.is_ok_and(|comm| comm == "kube-lxcfs") })
    }
}
