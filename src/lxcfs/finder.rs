//! Finds the serving lxcfs: checks that it responds, and opens its view files.

use std::{
    collections::BTreeMap,
    io::Read,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags},
    io::Errno,
};
use tokio::sync::oneshot;

use super::{Error, Identity, is_writable, mounted_at, unique_identity, version};
use crate::{
    model::view::ViewFile,
    mount::{LxcfsFiles, WorkError, Workers, observe::LXCFS_FSTYPE},
    sys::mountinfo::{Dev, MountId, MountTable},
    telemetry::metrics::Metrics,
};

/// The interval between the searches of [`wait_until_serving`].
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Finds the lxcfs that serves at `path`, checks that it responds, and opens its view files.
///
/// # Errors
/// Fails if there is none, or it does not respond within the workers' deadline.
pub async fn find(workers: &Workers, path: &Path) -> Result<Arc<LxcfsFiles>, Error> {
    Finder::new(path).find(workers).await
}

/// As [`find`], but waits up to `timeout` for an lxcfs that is starting.
///
/// # Errors
/// As [`find`], when none serves within `timeout`.
pub async fn wait_until_serving(
    timeout: Duration,
    workers: &Workers,
    path: &Path,
) -> Result<Arc<LxcfsFiles>, Error> {
    let started = Instant::now();
    loop {
        match find(workers, path).await {
            Err(Error::NotMounted(_) | Error::Dead(_)) if started.elapsed() < timeout => {
                tokio::time::sleep(POLL_INTERVAL).await;
            }
            found => return found,
        }
    }
}

/// Finds the serving lxcfs repeatedly. A hung one is not probed again while the first probe is
/// pending, so that it costs one thread however long it hangs.
#[derive(Clone, Debug)]
pub struct Finder {
    path: PathBuf,
    pending: Arc<Mutex<Option<PendingProbe>>>,
    known: Arc<KnownLxcfs>,
    /// Where the duration of each search is recorded.
    metrics: Option<Arc<Metrics>>,
}

/// What the mount table showed of a mount that is one of lxcfs, and not writable: it is not read
/// again for the same mount. On a full node that takes longer than an injection.
type KnownLxcfs = Mutex<Option<Known>>;

#[derive(Clone, Copy, Debug)]
struct Known {
    identity: Identity,
    supervised: bool,
}

/// The result of a search.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) files: LxcfsFiles,
    /// Its mount, if a supervisor runs it: that detaches the mount lazily, so that open files keep
    /// nobody from unmounting it.
    pub(super) supervised: Option<Identity>,
}

/// A probe that timed out and has not returned.
#[derive(Debug)]
struct PendingProbe {
    identity: Option<Identity>,
    timeout: Duration,
    result: oneshot::Receiver<Result<Found, Error>>,
}

impl Finder {
    pub fn new(path: &Path) -> Finder {
        Finder {
            path: path.to_owned(),
            pending: Arc::default(),
            known: Arc::default(),
            metrics: None,
        }
    }

    /// Records the duration of each search.
    pub fn with_metrics(self, metrics: Arc<Metrics>) -> Finder {
        Finder { metrics: Some(metrics), ..self }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// # Errors
    /// Fails if no lxcfs serves, or it does not respond within the workers' deadline.
    pub async fn find(&self, workers: &Workers) -> Result<Arc<LxcfsFiles>, Error> {
        self.find_again(workers, None).await.map(|found| Arc::new(found.files))
    }

    /// As [`Finder::find`]. The files that were `held` since an earlier search are not opened
    /// again, if their lxcfs still serves and responds.
    pub(super) async fn find_again(
        &self,
        workers: &Workers,
        held: Option<Found>,
    ) -> Result<Found, Error> {
        let identity = mounted_at(&self.path);
        if let Some(probe) = &mut *self.pending() {
            let hangs = matches!(probe.result.try_recv(), Err(oneshot::error::TryRecvError::Empty));
            if hangs && probe.identity == identity {
                return Err(Error::Hung { path: self.path.clone(), timeout: probe.timeout });
            }
        }
        let (path, known, started) = (self.path.clone(), self.known.clone(), Instant::now());
        let search = move |_: &_| match held {
            Some(held) if still_serves(&path, &held) => Ok(held),
            _ => open(&path, &known),
        };
        let searched = workers.run(search).await;
        if let Some(metrics) = &self.metrics {
            metrics.lxcfs_probed(started.elapsed());
        }
        let timed_out = match searched {
            Ok(found) => {
                *self.pending() = None;
                return found;
            }
            Err(timed_out) => timed_out,
        };
        let path = self.path.clone();
        Err(match timed_out.error {
            WorkError::TimedOut(timeout) => {
                *self.pending() =
                    timed_out.result.map(|result| PendingProbe { identity, timeout, result });
                Error::Hung { path, timeout }
            }
            cause => Error::Work { path, cause },
        })
    }

    fn pending(&self) -> MutexGuard<'_, Option<PendingProbe>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the lxcfs whose files are held is mounted at `path`, and responds. It must answer an
/// open; its supervisor also reads. Blocks if it hangs.
fn still_serves(path: &Path, Found { files, supervised }: &Found) -> bool {
    let Some(uptime) = files.files.get(&ViewFile::Uptime) else { return false };
    supervised.is_some()
        && mounted_at(path) == *supervised
        && rustix::fs::open(
            format!("/proc/self/fd/{}", uptime.as_raw_fd()),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .is_ok()
}

/// Opens the view files of the lxcfs at `path`, and reads one. Blocks if lxcfs hangs. Does not open
/// `cpu` of one that is writable.
fn open(path: &Path, known: &KnownLxcfs) -> Result<Found, Error> {
    let fail = |verb| move |cause: std::io::Error| Error::Io { path: path.to_owned(), verb, cause };
    // Only readlink(2) is called on the path's last component; FUSE handles it for a directory
    // without its server.
    let real = path.canonicalize().map_err(|cause| match cause.kind() {
        std::io::ErrorKind::NotFound => Error::Missing(path.to_owned()),
        _ if cause.raw_os_error() == Some(libc::ENOTCONN) => Error::Dead(path.to_owned()),
        _ => fail("resolve the path")(cause),
    })?;
    let open_root = || {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&real, flags, Mode::empty()).map_err(|e| match e {
            Errno::NOTCONN => Error::Dead(path.to_owned()),
            e => fail("open the mount")(e.into()),
        })
    };
    let known = || known.lock().unwrap_or_else(PoisonError::into_inner);
    let found = |files, known: Option<Known>| Found {
        files,
        supervised: known.filter(|known| known.supervised).map(|known| known.identity),
    };
    let last = *known();
    if let Some(Known { identity, .. }) = last
        && mounted_at(&real) == Some(identity)
    {
        let root = open_root()?;
        if unique_identity(&root) == Some(identity) {
            return Ok(found(open_files(path, &root, identity.dev, false)?, last));
        }
    }
    let text =
        std::fs::read("/proc/thread-self/mountinfo").map_err(fail("read the mount table"))?;
    let table = MountTable::parse(&text)
        .map_err(|e| fail("parse the mount table")(std::io::Error::other(e)))?;
    let Some(mount) = table.top(real.as_os_str().as_encoded_bytes()) else {
        return Err(Error::NotMounted(path.to_owned()));
    };
    if *mount.fstype != *LXCFS_FSTYPE || *mount.root != *b"/" {
        let fstype = String::from_utf8_lossy(&mount.fstype).into_owned();
        return Err(Error::NotLxcfs { path: path.to_owned(), fstype });
    }
    let root = open_root()?;
    let opened = rustix::fs::statx(
        &root,
        "",
        AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC,
        StatxFlags::MNT_ID,
    );
    let opened = opened.map_err(|e| fail("stat the mount")(e.into()))?;
    if MountId(opened.stx_mnt_id) != mount.id {
        return Err(fail("open the mount")(std::io::Error::other(
            "another mount has just replaced it",
        )));
    }
    let writable = is_writable(mount);
    let identity = unique_identity(&root).filter(|_| !writable);
    let supervised = version(mount).is_some();
    let now = identity.map(|identity| Known { identity, supervised });
    *known() = now;
    Ok(found(open_files(path, &root, mount.dev, writable)?, now))
}

/// Opens the view files below the root of an lxcfs, and reads one.
fn open_files(path: &Path, root: &OwnedFd, dev: Dev, writable: bool) -> Result<LxcfsFiles, Error> {
    let fail = |verb| move |cause: std::io::Error| Error::Io { path: path.to_owned(), verb, cause };
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let mut files = BTreeMap::new();
    for file in ViewFile::ALL.into_iter().filter(|file| !(writable && *file == ViewFile::Cpu)) {
        match rustix::fs::openat2(
            root,
            file.path(),
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        ) {
            Ok(fd) => drop(files.insert(file, fd)),
            Err(Errno::NOTCONN | Errno::CONNABORTED) => return Err(Error::Dead(path.to_owned())),
            // This lxcfs does not have it, or not on this kernel: lxcfs 6 refuses /proc/pressure
            // where the kernel has none.
            Err(cause) => tracing::debug!(%file, %cause, "view file not served by lxcfs"),
        }
    }
    probe(root).map_err(|cause| match cause.raw_os_error() {
        Some(libc::ENOTCONN | libc::ECONNABORTED) => Error::Dead(path.to_owned()),
        _ => fail("read proc/uptime")(cause),
    })?;
    Ok(LxcfsFiles { dev, files: Arc::new(files), writable })
}

/// Checks that lxcfs responds: reads the file that is the cheapest for it.
fn probe(root: &impl std::os::fd::AsFd) -> std::io::Result<()> {
    let uptime = rustix::fs::openat(
        root,
        ViewFile::Uptime.path(),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut text = [0; 64];
    match std::fs::File::from(uptime).read(&mut text)? {
        0 => Err(std::io::Error::other("it is empty")),
        _ => Ok(()),
    }
}
