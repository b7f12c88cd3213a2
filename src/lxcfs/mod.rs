//! The serving lxcfs: which one it is, what it serves, whether it answers, and when that changes. Reads only; every question
//! to it has a deadline. [`supervisor`] runs one.

mod server;
pub mod supervisor;
pub mod volume;
mod watch;

use std::{
    collections::BTreeMap,
    io::Read,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags},
    io::Errno,
};
use tokio::sync::oneshot;

use crate::{
    mount::{
        Source, WorkError, Workers,
        table::{LXCFS_FSTYPE, Table},
    },
    plan::Dev,
    view::ViewFile,
};

/// Why no lxcfs serves at a path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("lxcfs path {0}: no such directory; start lxcfs there, or name its mount with --lxcfs-path")]
    Missing(PathBuf),
    #[error("lxcfs path {0}: nothing is mounted there; start lxcfs there, or name its mount with --lxcfs-path")]
    NotMounted(PathBuf),
    #[error("lxcfs path {path}: a {fstype} is mounted there, no lxcfs; name the mount of lxcfs with --lxcfs-path")]
    NotLxcfs { path: PathBuf, fstype: String },
    #[error("lxcfs path {0}: its lxcfs has ended; unmount it (umount -l) and start lxcfs again")]
    Dead(PathBuf),
    #[error("lxcfs path {path}: lxcfs does not answer within {waited:?}; if it hangs, kill and restart it")]
    Hung { path: PathBuf, waited: Duration },
    #[error("lxcfs path {path}: {what}: {cause}")]
    Io { path: PathBuf, what: &'static str, cause: std::io::Error },
    #[error("lxcfs path {path}: {why}")]
    Work { path: PathBuf, why: WorkError },
}

pub use watch::{Change, Watch};

/// Which lxcfs is mounted at a path. Two at different times are the same only if both numbers are: the kernel gives a device
/// number to the next file system as soon as the last mount of the old one is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub dev: Dev,
    /// The mount's id that is never given again (`STATX_MNT_ID_UNIQUE`, kernel 6.8), before that its plain one.
    pub mount: u64,
}

/// `STATX_MNT_ID_UNIQUE` (include/uapi/linux/stat.h, kernel 6.8).
const STATX_MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// The lxcfs that is mounted at `path`, if one is, by the mount table: it is sent no request.
pub fn mounted(path: &Path) -> Option<Identity> {
    let real = path.canonicalize().ok()?;
    let text = std::fs::read("/proc/thread-self/mountinfo").ok()?;
    let table = Table::parse(&text).ok()?;
    let mount = table.top(real.as_os_str().as_encoded_bytes())?;
    if *mount.fstype != *LXCFS_FSTYPE || *mount.root != *b"/" {
        return None;
    }
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let unique = rustix::fs::statx(rustix::fs::CWD, &real, flags, STATX_MNT_ID_UNIQUE).ok();
    let unique = unique.filter(|stat| stat.stx_mask & STATX_MNT_ID_UNIQUE.bits() != 0);
    Some(Identity { dev: mount.dev, mount: unique.map_or(mount.id, |stat| stat.stx_mnt_id) })
}

/// Finds the lxcfs that serves at `path`, sees whether it answers, and opens its view files.
///
/// # Errors
/// When there is none, or it does not answer within the workers' deadline.
pub async fn find(workers: &Workers, path: &Path) -> Result<Arc<Source>, Error> {
    Finder::new(path).find(workers).await
}

/// The same; one that is only just starting is waited for.
///
/// # Errors
/// As [`find`], when it does not serve within `patience`.
pub async fn find_within(patience: Duration, workers: &Workers, path: &Path) -> Result<Arc<Source>, Error> {
    let begun = Instant::now();
    loop {
        match find(workers, path).await {
            Err(Error::NotMounted(_) | Error::Dead(_)) if begun.elapsed() < patience => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            found => return found,
        }
    }
}

/// Finds the serving lxcfs again and again. One that hung is not asked a second time while the first question is unanswered,
/// so that it costs one thread however long it hangs.
#[derive(Clone, Debug)]
pub struct Finder {
    path: PathBuf,
    unanswered: Arc<Mutex<Option<Unanswered>>>,
}

#[derive(Debug)]
struct Unanswered {
    by: Option<Identity>,
    waited: Duration,
    answer: oneshot::Receiver<Result<Source, Error>>,
}

impl Finder {
    pub fn new(path: &Path) -> Finder {
        Finder { path: path.to_owned(), unanswered: Arc::default() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// # Errors
    /// When no lxcfs serves, or it does not answer within the workers' deadline.
    pub async fn find(&self, workers: &Workers) -> Result<Arc<Source>, Error> {
        let by = mounted(&self.path);
        if let Some(before) = &mut *self.unanswered() {
            let hangs = matches!(before.answer.try_recv(), Err(oneshot::error::TryRecvError::Empty));
            if hangs && before.by == by {
                return Err(Error::Hung { path: self.path.clone(), waited: before.waited });
            }
        }
        let path = self.path.clone();
        let late = match workers.run(move |_| open(&path)).await {
            Ok(found) => {
                *self.unanswered() = None;
                return found.map(Arc::new);
            }
            Err(late) => late,
        };
        let path = self.path.clone();
        Err(match late.error {
            WorkError::Deadline(waited) => {
                *self.unanswered() = late.result.map(|answer| Unanswered { by, waited, answer });
                Error::Hung { path, waited }
            }
            why => Error::Work { path, why },
        })
    }

    fn unanswered(&self) -> MutexGuard<'_, Option<Unanswered>> {
        self.unanswered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open(path: &Path) -> Result<Source, Error> {
    let fail = |what| move |e: Errno| Error::Io { path: path.to_owned(), what, cause: e.into() };
    // readlink(2) alone is asked of the path's last component, which FUSE answers for a directory without its server.
    let real = path.canonicalize().map_err(|cause| match cause.kind() {
        std::io::ErrorKind::NotFound => Error::Missing(path.to_owned()),
        _ if cause.raw_os_error() == Some(libc::ENOTCONN) => Error::Dead(path.to_owned()),
        _ => Error::Io { path: path.to_owned(), what: "cannot be resolved", cause },
    })?;
    let text = std::fs::read("/proc/thread-self/mountinfo");
    let text = text.map_err(|cause| Error::Io { path: path.to_owned(), what: "reading the mount table", cause })?;
    let table = Table::parse(&text);
    let table = table.map_err(|e| Error::Io {
        path: path.to_owned(),
        what: "the mount table",
        cause: std::io::Error::other(e),
    })?;
    let Some(mount) = table.top(real.as_os_str().as_encoded_bytes()) else {
        return Err(Error::NotMounted(path.to_owned()));
    };
    if *mount.fstype != *LXCFS_FSTYPE || *mount.root != *b"/" {
        let fstype = String::from_utf8_lossy(&mount.fstype).into_owned();
        return Err(Error::NotLxcfs { path: path.to_owned(), fstype });
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(&real, flags, Mode::empty()).map_err(|e| match e {
        Errno::NOTCONN => Error::Dead(path.to_owned()),
        e => fail("cannot be opened")(e),
    })?;
    let opened = rustix::fs::statx(&root, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::MNT_ID);
    if opened.map_err(fail("cannot be looked at"))?.stx_mnt_id != mount.id {
        let cause = std::io::Error::other("another mount took its place just now");
        return Err(Error::Io { path: path.to_owned(), what: "cannot be opened", cause });
    }
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let mut files = BTreeMap::new();
    for file in ViewFile::ALL {
        match rustix::fs::openat2(&root, file.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Ok(fd) => drop(files.insert(file, fd)),
            Err(Errno::NOTCONN | Errno::CONNABORTED) => return Err(Error::Dead(path.to_owned())),
            // It does not have it, or not here: lxcfs 6 refuses /proc/pressure where the kernel has none.
            Err(e) => tracing::debug!(%file, "not served by lxcfs: {e}"),
        }
    }
    probe(&root).map_err(|cause| match cause.raw_os_error() {
        Some(libc::ENOTCONN | libc::ECONNABORTED) => Error::Dead(path.to_owned()),
        _ => Error::Io { path: path.to_owned(), what: "reading its proc/uptime", cause },
    })?;
    Ok(Source { dev: mount.dev, files })
}

/// Whether lxcfs answers: the file that is cheapest for it is read.
fn probe(root: &impl std::os::fd::AsFd) -> std::io::Result<()> {
    let uptime = rustix::fs::openat(root, ViewFile::Uptime.path(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut text = [0; 64];
    match std::fs::File::from(uptime).read(&mut text)? {
        0 => Err(std::io::Error::other("it is empty")),
        _ => Ok(()),
    }
}
