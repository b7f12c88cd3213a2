//! The serving lxcfs, shared by concurrent operations.

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Instant,
};

use super::{Error, Finder, finder::Found};
use crate::mount::{LxcfsFiles, Workers};

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
    /// The open files of a supervised lxcfs.
    held: Option<Found>,
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
    /// responds is checked in every search, also if its files are held.
    ///
    /// # Errors
    /// [`Acquired::lxcfs`] has those of [`Finder::find`].
    pub async fn acquire(&self) -> Acquired {
        let requested = Instant::now();
        let shared = |lxcfs| Acquired { lxcfs, searched: false };
        if let Some(lxcfs) = self.last().found.upgrade() {
            return shared(Ok(lxcfs));
        }
        let _turn = self.search.lock().await;
        let (generation, held) = {
            let last = self.last();
            if let Some(lxcfs) = last.found.upgrade() {
                return shared(Ok(lxcfs));
            }
            match &last.failed {
                Some((at, e)) if *at >= requested => return shared(Err(e.clone())),
                _ => (last.generation, last.held.clone()),
            }
        };
        let found = self.finder.find_again(&self.workers, held).await;
        let mut last = self.last();
        let is_current = last.generation == generation;
        if is_current {
            let found = found.as_ref().ok();
            last.held = found.filter(|found| found.supervised.is_some()).cloned();
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
