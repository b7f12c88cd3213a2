//! The serving lxcfs, shared by concurrent operations.

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use super::{Error, Finder, finder::Found, mounted_at};
use crate::mount::{LxcfsFiles, Workers};

/// How long a supervised lxcfs that responded counts as responding: less than its supervisor takes
/// to notice that it hangs (by default, `--watchdog` is 5 s). On a busy node, starts follow each
/// other within such a time.
const RESPONDED: Duration = Duration::from_secs(2);

/// Opens the view files of the serving lxcfs for the first of concurrent users, and closes them
/// with the last: an open descriptor keeps the lxcfs mount busy. Those of a supervised lxcfs are
/// held until it exits, because its supervisor detaches the mount lazily. One search at a time,
/// whose result all users share that waited for it.
#[derive(Clone, Debug)]
pub struct SharedLxcfs {
    finder: Finder,
    workers: Workers,
    search: Arc<tokio::sync::Mutex<()>>,
    last: Arc<Mutex<LastSearch>>,
}

/// The result of the last search.
#[derive(Debug, Default)]
struct LastSearch {
    /// What users have.
    found: Weak<LxcfsFiles>,
    /// The open files of a supervised lxcfs, and when it responded.
    held: Option<(Found, Instant)>,
    failed: Option<(Instant, Arc<Error>)>,
    /// Counts the calls of [`SharedLxcfs::invalidate`].
    generation: u64,
}

/// What a user acquired.
#[derive(Debug)]
pub struct Acquired {
    pub lxcfs: Result<Arc<LxcfsFiles>, Arc<Error>>,
    /// This user's call made the search.
    pub searched: bool,
}

impl SharedLxcfs {
    pub fn new(finder: Finder, workers: Workers) -> SharedLxcfs {
        SharedLxcfs { finder, workers, search: Arc::default(), last: Arc::default() }
    }

    /// The path at which lxcfs is mounted.
    pub fn path(&self) -> &Path {
        self.finder.path()
    }

    /// The serving lxcfs: the one that another user holds, or the result of a search. Whether it
    /// responds is checked in every search, also if its files are held. No search is made for
    /// [`RESPONDED`] after a supervised one has responded.
    ///
    /// # Errors
    /// [`Acquired::lxcfs`] has those of [`Finder::find`].
    pub async fn acquire(&self) -> Acquired {
        let requested = Instant::now();
        let shared = |lxcfs| Acquired { lxcfs, searched: false };
        if let Some(lxcfs) = self.last().in_use_or_responded(self.path()) {
            return shared(Ok(lxcfs));
        }
        let _turn = self.search.lock().await;
        let (generation, held) = {
            let mut last = self.last();
            if let Some(lxcfs) = last.in_use_or_responded(self.path()) {
                return shared(Ok(lxcfs));
            }
            match &last.failed {
                Some((at, e)) if *at >= requested => return shared(Err(e.clone())),
                _ => (last.generation, last.held.as_ref().map(|(found, _)| found.clone())),
            }
        };
        let searched = Instant::now();
        let found = self.finder.find_again(&self.workers, held).await;
        let mut last = self.last();
        let is_current = last.generation == generation;
        if is_current {
            let found = found.as_ref().ok();
            let supervised = found.filter(|found| found.supervised.is_some()).cloned();
            last.held = supervised.map(|found| (found, searched));
        }
        let lxcfs = found.map(|found| Arc::new(found.files)).map_err(Arc::new);
        if is_current {
            match &lxcfs {
                Ok(lxcfs) => last.found = Arc::downgrade(lxcfs),
                Err(e) => last.failed = Some((Instant::now(), e.clone())),
            }
        }
        Acquired { lxcfs, searched: true }
    }

    /// Makes the next user search again, because another lxcfs serves, or none. Returns the one
    /// that users still hold.
    pub fn invalidate(&self) -> Option<Arc<LxcfsFiles>> {
        let mut last = self.last();
        last.generation += 1;
        last.failed = None;
        last.held = None;
        std::mem::take(&mut last.found).upgrade()
    }

    fn last(&self) -> MutexGuard<'_, LastSearch> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LastSearch {
    /// What users have, or the open files of a supervised lxcfs that has just responded and is
    /// still mounted.
    fn in_use_or_responded(&mut self, path: &Path) -> Option<Arc<LxcfsFiles>> {
        self.found.upgrade().or_else(|| {
            let (Found { files, supervised }, responded) = self.held.as_ref()?;
            if responded.elapsed() > RESPONDED || mounted_at(path) != *supervised {
                return None;
            }
            let lxcfs = Arc::new(files.clone());
            self.found = Arc::downgrade(&lxcfs);
            Some(lxcfs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn concurrent_users_share_one_search() {
        let workers = Workers::start(1, Duration::from_secs(60)).unwrap();
        let lxcfs = SharedLxcfs::new(Finder::new(Path::new("/nonexistent")), workers.clone());
        for _ in 0..2 {
            // The only worker is busy until every user waits.
            let (release, held) = std::sync::mpsc::channel::<()>();
            let busy = workers.run(move |_| held.recv());
            let users = futures::future::join_all((0..5).map(|_| lxcfs.acquire()));
            let (_, users, ()) = tokio::join!(busy, users, async move { drop(release) });
            assert!(users.iter().all(|user| user.lxcfs.is_err()));
            assert_eq!(users.iter().filter(|user| user.searched).count(), 1);
            // A later user searches again.
            assert!(lxcfs.acquire().await.searched);
        }
        assert!(lxcfs.invalidate().is_none());
    }
}
