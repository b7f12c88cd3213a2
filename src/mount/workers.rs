//! A small pool of threads for calls that may hang: those that enter other mount namespaces, and those that ask lxcfs.
//! Each job has a deadline from the moment it starts; a thread that misses it is written off and replaced, so that one hanging
//! container or a hung lxcfs keeps nobody else waiting. What the late thread returns after all is still delivered.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::Seat;

/// So many threads may hang at once, beside those that work, before new jobs are refused.
const MOST_LOST: usize = 64;

type Job = Box<dyn FnOnce(&Seat, &Arc<AtomicBool>) + Send>;

/// Why a job has no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no answer within {0:?}; the thread was written off")]
    Deadline(Duration),
    #[error("it was not begun, because {0} threads hang already")]
    TooManyLost(usize),
    #[error("it ended in a panic, which is a bug in kube-lxcfs")]
    Panicked,
}

/// A job without a result in time. `result` comes when the thread returns after all, or never.
#[derive(Debug)]
pub struct Late<T> {
    pub error: Error,
    pub result: Option<oneshot::Receiver<T>>,
}

/// The pool. Clones are the same pool; its threads end with the last one.
#[derive(Clone, Debug)]
pub struct Workers {
    pool: Arc<Pool>,
    // Dropped with the last clone of Workers, which the threads themselves do not hold.
    _open: Arc<Open>,
}

#[derive(Debug)]
struct Open(Arc<Pool>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.queue().closed = true;
        self.0.ready.notify_all();
    }
}

struct Pool {
    queue: Mutex<Queue>,
    ready: Condvar,
    lost: AtomicUsize,
    deadline: Duration,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("lost", &self.lost).field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

impl Workers {
    /// Starts `threads` threads (at least one), each job with this deadline.
    ///
    /// # Errors
    /// When a thread cannot take its [`Seat`]: without `CAP_SYS_ADMIN`, or without `/proc`.
    pub fn start(threads: usize, deadline: Duration) -> io::Result<Workers> {
        let pool =
            Arc::new(Pool { queue: Mutex::default(), ready: Condvar::new(), lost: AtomicUsize::new(0), deadline });
        let workers = Workers { _open: Arc::new(Open(pool.clone())), pool };
        for _ in 0..threads.max(1) {
            workers.pool.spawn()?;
        }
        Ok(workers)
    }

    /// Runs a job on one of the threads.
    ///
    /// # Errors
    /// [`Late`] when there is no result in time.
    pub async fn run<T: Send + 'static>(&self, job: impl FnOnce(&Seat) -> T + Send + 'static) -> Result<T, Late<T>> {
        let lost = self.lost();
        if lost >= MOST_LOST {
            return Err(Late { error: Error::TooManyLost(lost), result: None });
        }
        let begun = Arc::new(OnceLock::new());
        let (done, mut result) = oneshot::channel();
        let begins = begun.clone();
        self.pool.push(Box::new(move |seat, written_off| {
            let _ = begins.set((Instant::now(), written_off.clone()));
            let _ = done.send(job(seat));
        }));
        let deadline = self.pool.deadline;
        loop {
            // Time in the queue does not count: a full pool is busy, not hung. The thread sends no word when it begins,
            // because waking two threads for each job costs as much as a mount.
            let left = begun.get().map_or(deadline, |(at, _): &(Instant, _)| deadline.saturating_sub(at.elapsed()));
            if let Ok(result) = tokio::time::timeout(left, &mut result).await {
                return result.map_err(|_| Late { error: Error::Panicked, result: None });
            }
            if let Some((at, written_off)) = begun.get()
                && at.elapsed() >= deadline
            {
                self.pool.write_off(written_off);
                return Err(Late { error: Error::Deadline(deadline), result: Some(result) });
            }
        }
    }

    /// Threads that hang now, beyond their deadline.
    pub fn lost(&self) -> usize {
        self.pool.lost.load(Ordering::SeqCst)
    }
}

impl Pool {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Jobs run outside the lock, so a poisoned queue is whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, job: Job) {
        self.queue().jobs.push_back(job);
        self.ready.notify_one();
    }

    /// Another thread takes the place of one that hangs.
    fn write_off(self: &Arc<Self>, written_off: &AtomicBool) {
        // Counted before it is told, so that the thread's own subtraction cannot come first.
        self.lost.fetch_add(1, Ordering::SeqCst);
        if written_off.swap(true, Ordering::SeqCst) {
            self.lost.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        if let Err(e) = self.spawn() {
            tracing::error!("no thread could be started in place of one that hangs: {e}");
        }
    }

    fn spawn(self: &Arc<Self>) -> io::Result<()> {
        let pool = self.clone();
        let (seated, seat) = mpsc::sync_channel(1);
        let thread = move || {
            let seat = match Seat::take() {
                Ok(seat) => seat,
                Err(e) => return drop(seated.send(Err(e))),
            };
            let _ = seated.send(Ok(()));
            pool.work(&seat);
        };
        thread::Builder::new().name("mount".into()).stack_size(256 << 10).spawn(thread)?;
        seat.recv().unwrap_or_else(|_| Err(io::Error::other("the thread ended at once")))
    }

    fn work(self: &Arc<Self>, seat: &Seat) {
        let written_off = Arc::new(AtomicBool::new(false));
        loop {
            let job = {
                let mut queue = self.queue();
                loop {
                    if let Some(job) = queue.jobs.pop_front() {
                        break job;
                    }
                    if queue.closed {
                        return;
                    }
                    queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
            };
            // A panic drops the job's channels, which tells the caller; the visit's guard has brought the thread home.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(seat, &written_off)));
            if written_off.load(Ordering::SeqCst) {
                self.lost.fetch_sub(1, Ordering::SeqCst);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workers(threads: usize) -> Workers {
        Workers::start(threads, Duration::from_millis(50)).expect("these tests need CAP_SYS_ADMIN")
    }

    #[tokio::test]
    async fn a_thread_that_hangs_is_replaced_and_what_it_returns_late_is_delivered() {
        let workers = workers(1);
        let (release, held) = mpsc::channel::<()>();
        let late = workers.run(move |_| held.recv().is_ok()).await.unwrap_err();
        assert!(matches!(late.error, Error::Deadline(_)), "{late:?}");
        assert_eq!(workers.lost(), 1);
        assert_eq!(workers.run(|_| 7).await.unwrap(), 7);
        release.send(()).unwrap();
        assert!(late.result.unwrap().await.unwrap());
        while workers.lost() > 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_panic_is_told_and_the_thread_goes_on() {
        // Writing a backtrace may take longer than the others' deadline.
        let workers = Workers::start(1, Duration::from_secs(10)).expect("this test needs CAP_SYS_ADMIN");
        let late = workers.run(|_| -> u8 { panic!("as the test wants it") }).await.unwrap_err();
        assert!(matches!(late.error, Error::Panicked), "{late:?}");
        assert_eq!(workers.run(|_| 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn waiting_in_the_queue_is_not_hanging() {
        let workers = workers(1);
        let slow = || workers.run(|_| thread::sleep(Duration::from_millis(30)));
        let (a, b, c) = tokio::join!(slow(), slow(), slow());
        assert!(a.is_ok() && b.is_ok() && c.is_ok());
        assert_eq!(workers.lost(), 0);
    }
}
