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

use super::{Error, Finder, Identity, mounted};
use crate::{
    mount::{Process, Workers},
    sys,
};

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

/// Watches one path.
#[derive(Debug)]
pub struct Watch {
    finder: Finder,
    workers: Workers,
    table: AsyncFd<OwnedFd>,
    looked: Instant,
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
        let table = rustix::fs::open("/proc/self/mountinfo", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let table = sys::watch(table, Interest::PRIORITY | Interest::ERROR)?;
        let mut probe = tokio::time::interval_at(Instant::now() + PROBE, PROBE);
        probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let now = mounted(finder.path());
        let server = now.and_then(|now| Server::of(now, finder.path()));
        Ok(Watch { finder, workers, table, looked: Instant::now(), now, server, probe, probing: None, hangs: false })
    }

    /// The lxcfs that is mounted now.
    pub fn now(&self) -> Option<Identity> {
        self.now
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
            let table = async {
                // A poll of the table is answered with POLLERR and POLLPRI when it changed since the last one (proc(5)).
                let noticed = self.table.ready(Interest::PRIORITY | Interest::ERROR).await;
                tokio::time::sleep_until(self.looked + BREATH).await;
                noticed.map(|mut guard| guard.clear_ready())
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
                _ = table => {
                    self.looked = Instant::now();
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
        let process = serving_process(identity, path)?;
        let parent = procfs::process::Process::new(process.pid()).and_then(|p| p.stat()).ok()?.ppid;
        let parent = procfs::process::Process::new(parent).and_then(|p| p.stat()).map(|stat| stat.comm);
        let pidfd = process.as_fd().try_clone_to_owned().ok()?;
        let ended = sys::watch(pidfd, Interest::READABLE).ok()?;
        Some(Server { ended, supervised: parent.is_ok_and(|comm| comm == "kube-lxcfs") })
    }
}

/// The process that serves an lxcfs mount: of those that hold /dev/fuse, the one whose connection has the mount's minor number
/// (told in fdinfo by newer kernels), else of those called lxcfs the one whose arguments name the path, else the only one.
pub(super) fn serving_process(identity: Identity, path: &Path) -> Option<Process> {
    let mut candidates: Vec<(i32, Vec<String>)> = Vec::new();
    for process in procfs::process::all_processes().ok()?.flatten() {
        let fuse = |fd: &procfs::process::FDInfo| matches!(&fd.target, procfs::process::FDTarget::Path(p) if p.ends_with("dev/fuse"));
        let Some(fd) = process.fd().into_iter().flatten().flatten().find(fuse) else { continue };
        let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{}", process.pid, fd.fd)).unwrap_or_default();
        match info.lines().find_map(|l| l.strip_prefix("fuse_connection:")) {
            Some(minor) if minor.trim() == identity.dev.minor.to_string() => {
                return Process::open(i64::from(process.pid)).ok();
            }
            None if process.stat().is_ok_and(|stat| stat.comm.starts_with("lxcfs")) => {
                candidates.push((process.pid, process.cmdline().unwrap_or_default()));
            }
            _ => {}
        }
    }
    let named = candidates.iter().find(|(_, args)| args.iter().any(|arg| Path::new(arg) == path));
    let only = || if let [only] = candidates.as_slice() { Some(only) } else { None };
    Process::open(i64::from(named.or_else(only)?.0)).ok()
}
