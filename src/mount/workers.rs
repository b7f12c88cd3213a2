//! A small pool of threads for calls that may hang: those that enter other mount namespaces, and
//! those that probe lxcfs. Each job has a deadline, counted from its start. A thread that misses it
//! is abandoned and replaced, so that one hung container or lxcfs delays nothing else. If the hung
//! job returns later, its result is still delivered.

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

use super::WorkerContext;

/// The limit of hung threads, beside those that work. Beyond it jobs are refused, queued ones too.
const MAX_HUNG_THREADS: usize = 64;

type Job = Box<dyn FnOnce(&WorkerContext, &Arc<Thread>) + Send>;

/// One thread, as its jobs see it.
#[derive(Debug)]
struct Thread {
    kind: ThreadKind,
    /// It missed a deadline and is replaced.
    abandoned: AtomicBool,
}

/// Which jobs a thread runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ThreadKind {
    /// All, the urgent ones first.
    Any,
    /// Urgent ones only.
    Reserved,
}

/// The reason why a job has no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("timed out after {0:?}")]
    TimedOut(Duration),
    #[error("refused because {0} threads hang; find the hung mounts with `kube-lxcfs status`")]
    TooManyHung(usize),
    #[error("panicked; this is a bug: open an issue with the log")]
    Panicked,
}

/// A job without a result in time. `result` is delivered if the thread returns later.
#[derive(Debug)]
pub struct JobTimeout<T> {
    pub error: Error,
    pub result: Option<oneshot::Receiver<T>>,
}

/// The pool. Clones share it; its threads exit with the last clone.
#[derive(Clone, Debug)]
pub struct Workers {
    pool: Arc<Pool>,
    /// Jobs of this clone are urgent.
    urgent: bool,
    // Dropped with the last clone of Workers; the threads themselves hold none.
    _close: Arc<CloseOnDrop>,
}

#[derive(Debug)]
struct CloseOnDrop(Arc<Pool>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.queue().closed = true;
        self.0.ready.notify_all();
        self.0.urgent_ready.notify_all();
    }
}

struct Pool {
    queue: Mutex<Queue>,
    /// For the threads that run any job, and for the reserved ones.
    ready: Condvar,
    urgent_ready: Condvar,
    hung: AtomicUsize,
    deadline: Duration,
}

#[derive(Default)]
struct Queue {
    urgent: VecDeque<Job>,
    jobs: VecDeque<Job>,
    closed: bool,
    /// The reserved threads that wait for a job, and those of them that have been notified.
    waiting_reserved: usize,
    notified_reserved: usize,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("hung", &self.hung)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

impl Workers {
    /// Starts `threads` threads (at least one), each job with this deadline.
    ///
    /// # Errors
    /// Fails if a thread cannot be started, or if `/proc` is not mounted.
    pub fn start(threads: usize, deadline: Duration) -> io::Result<Workers> {
        let pool = Arc::new(Pool {
            queue: Mutex::default(),
            ready: Condvar::new(),
            urgent_ready: Condvar::new(),
            hung: AtomicUsize::new(0),
            deadline,
        });
        let close = Arc::new(CloseOnDrop(pool.clone()));
        let workers = Workers { pool, urgent: false, _close: close };
        workers.pool.spawn(threads.max(1), ThreadKind::Any)?;
        Ok(workers)
    }

    /// Starts more threads, for urgent jobs only.
    ///
    /// # Errors
    /// As [`Workers::start`].
    pub fn reserve(&self, threads: usize) -> io::Result<()> {
        self.pool.spawn(threads, ThreadKind::Reserved)
    }

    /// The same pool, for jobs that others wait for: they come before all jobs that are not urgent.
    pub fn urgent(&self) -> Workers {
        Workers { urgent: true, ..self.clone() }
    }

    /// Runs a job on one of the threads.
    ///
    /// # Errors
    /// [`JobTimeout`] when there is no result in time.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&WorkerContext) -> T + Send + 'static,
    ) -> Result<T, JobTimeout<T>> {
        let hung = self.hung();
        if hung >= MAX_HUNG_THREADS {
            return Err(JobTimeout { error: Error::TooManyHung(hung), result: None });
        }
        let started: Arc<OnceLock<(Instant, Arc<Thread>)>> = Arc::default();
        let (result_tx, mut result) = oneshot::channel();
        let start = started.clone();
        let job: Job = Box::new(move |context, thread| {
            let _ = start.set((Instant::now(), thread.clone()));
            let _ = result_tx.send(job(context));
        });
        self.pool.push(job, self.urgent);
        let deadline = self.pool.deadline;
        loop {
            // Time in the queue does not count: a full pool is busy, not hung. The thread sends no
            // message when it starts, because waking two threads for each job costs as
            // much as a mount.
            let left =
                started.get().map_or(deadline, |(at, _)| deadline.saturating_sub(at.elapsed()));
            if let Ok(result) = tokio::time::timeout(left, &mut result).await {
                // A job that is dropped in the queue has not started.
                let dropped = |_| match started.get() {
                    Some(_) => Error::Panicked,
                    None => Error::TooManyHung(self.hung()),
                };
                return result.map_err(dropped).map_err(|error| JobTimeout { error, result: None });
            }
            if let Some((at, thread)) = started.get()
                && at.elapsed() >= deadline
            {
                self.pool.abandon(thread);
                return Err(JobTimeout { error: Error::TimedOut(deadline), result: Some(result) });
            }
        }
    }

    /// Whether so many threads hang that jobs are refused.
    pub fn is_exhausted(&self) -> bool {
        self.pool.is_exhausted()
    }

    /// The number of threads that hang now, beyond their deadline.
    pub fn hung(&self) -> usize {
        self.pool.hung.load(Ordering::SeqCst)
    }
}

impl Pool {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Jobs run outside the lock, so a poisoned queue is whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_exhausted(&self) -> bool {
        self.hung.load(Ordering::SeqCst) >= MAX_HUNG_THREADS
    }

    fn push(&self, job: Job, urgent: bool) {
        let mut queue = self.queue();
        let jobs = if urgent { &mut queue.urgent } else { &mut queue.jobs };
        jobs.push_back(job);
        // One thread is woken, not one of each kind: that costs as much as a mount.
        let reserved = urgent && queue.waiting_reserved > queue.notified_reserved;
        queue.notified_reserved += usize::from(reserved);
        drop(queue);
        if reserved { self.urgent_ready.notify_one() } else { self.ready.notify_one() }
    }

    /// Replaces a thread that hangs.
    fn abandon(self: &Arc<Self>, thread: &Thread) {
        // Counted before the flag is set, so that the thread's own subtraction cannot come first.
        self.hung.fetch_add(1, Ordering::SeqCst);
        if thread.abandoned.swap(true, Ordering::SeqCst) {
            self.hung.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        if let Err(cause) = self.spawn(1, thread.kind) {
            tracing::error!(%cause, "failed to replace a hung worker thread");
        }
    }

    /// Starts threads, all at the same time, and waits until they are ready.
    fn spawn(self: &Arc<Self>, threads: usize, kind: ThreadKind) -> io::Result<()> {
        let (ready_tx, ready) = mpsc::channel();
        for _ in 0..threads {
            let (pool, ready_tx) = (self.clone(), ready_tx.clone());
            let thread = move || {
                let context = match WorkerContext::new() {
                    Ok(context) => context,
                    Err(e) => return drop(ready_tx.send(Err(e))),
                };
                let _ = ready_tx.send(Ok(()));
                drop(ready_tx);
                pool.work(&context, kind);
            };
            thread::Builder::new().name("mount".into()).stack_size(256 << 10).spawn(thread)?;
        }
        drop(ready_tx);
        let exited = || Err(io::Error::other("the thread exited at its start"));
        (0..threads).try_for_each(|_| ready.recv().unwrap_or_else(|_| exited()))
    }

    /// Waits for the next job of a thread of this kind. `None` when the pool is closed.
    fn next_job(&self, kind: ThreadKind) -> Option<Job> {
        let mut queue = self.queue();
        loop {
            let mut job = queue.urgent.pop_front();
            if kind == ThreadKind::Any {
                job = job.or_else(|| queue.jobs.pop_front());
            }
            if job.is_some() || queue.closed {
                return job;
            }
            if kind == ThreadKind::Any {
                queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
            } else {
                queue.waiting_reserved += 1;
                queue = self.urgent_ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.waiting_reserved -= 1;
                // A thread may wake without a notification, which is then left for another.
                queue.notified_reserved = queue.notified_reserved.saturating_sub(1);
            }
        }
    }

    fn work(self: &Arc<Self>, context: &WorkerContext, kind: ThreadKind) {
        let thread = Arc::new(Thread { kind, abandoned: AtomicBool::new(false) });
        while let Some(job) = self.next_job(kind) {
            if self.is_exhausted() {
                drop(job);
                continue;
            }
            // A panic drops the job's sender, which the caller sees; the guard of `enter` has
            // restored the namespace.
            let _ =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(context, &thread)));
            if thread.abandoned.load(Ordering::SeqCst) {
                self.hung.fetch_sub(1, Ordering::SeqCst);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workers(threads: usize, deadline: Duration) -> Workers {
        Workers::start(threads, deadline).expect("a thread and /proc")
    }

    #[tokio::test]
    async fn hung_thread_is_replaced_and_its_result_delivered() {
        let workers = workers(1, Duration::from_secs(2));
        let (release, held) = mpsc::channel::<()>();
        let timeout = workers.run(move |_| held.recv().is_ok()).await.unwrap_err();
        assert!(matches!(timeout.error, Error::TimedOut(_)), "{timeout:?}");
        assert_eq!(workers.hung(), 1);
        assert_eq!(workers.run(|_| 7).await.unwrap(), 7);
        release.send(()).unwrap();
        assert!(timeout.result.unwrap().await.unwrap());
        while workers.hung() > 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn queued_jobs_do_not_exceed_the_hung_limit() {
        let workers = workers(1, Duration::from_millis(5));
        let released = Arc::new((Mutex::new(false), Condvar::new()));
        let hang = || {
            let released = released.clone();
            workers.run(move |_| {
                let held = released.0.lock().unwrap();
                drop(released.1.wait_while(held, |released| !*released).unwrap());
            })
        };
        let results = futures::future::join_all((0..2 * MAX_HUNG_THREADS).map(|_| hang())).await;
        let refused = |r: &Result<(), JobTimeout<()>>| {
            matches!(r, Err(JobTimeout { error: Error::TooManyHung(_), .. }))
        };
        assert_eq!(results.iter().filter(|r| refused(r)).count(), MAX_HUNG_THREADS);
        assert_eq!(workers.hung(), MAX_HUNG_THREADS);
        assert!(workers.is_exhausted());
        *released.0.lock().unwrap() = true;
        released.1.notify_all();
        while workers.hung() > 0 {
            tokio::task::yield_now().await;
        }
        // On a busy machine a job may miss the short deadline.
        let mut recovered = false;
        for _ in 0..1000 {
            recovered |= workers.run(|_| 7).await.is_ok();
            if recovered {
                break;
            }
        }
        assert!(recovered);
    }

    #[tokio::test]
    async fn urgent_jobs_wait_for_no_others() {
        let workers = workers(2, Duration::from_secs(3600));
        workers.reserve(1).unwrap();
        let (started_tx, started) = mpsc::channel();
        let released = Arc::new((Mutex::new(false), Condvar::new()));
        // Two run, and three are in the queue.
        let held = (0..5).map(|_| {
            let (released, workers, started) =
                (released.clone(), workers.clone(), started_tx.clone());
            tokio::spawn(async move {
                let job = workers.run(move |_| {
                    started.send(()).unwrap();
                    let held = released.0.lock().unwrap();
                    drop(released.1.wait_while(held, |released| !*released).unwrap());
                });
                job.await.unwrap();
            })
        });
        let held: Vec<_> = held.collect();
        let mut running = 0;
        while running < 2 || workers.pool.queue().jobs.len() != 3 {
            running += started.try_iter().count();
            tokio::task::yield_now().await;
        }
        let urgent = workers.urgent();
        let numbers = futures::future::join_all((0..10).map(|n| urgent.run(move |_| n))).await;
        assert_eq!(numbers.into_iter().map(Result::unwrap).sum::<usize>(), 45);
        assert_eq!(workers.pool.queue().jobs.len(), 3, "no reserved thread runs these");
        *released.0.lock().unwrap() = true;
        released.1.notify_all();
        for job in held {
            job.await.unwrap();
        }
    }

    #[tokio::test]
    async fn panic_is_reported_and_the_thread_continues() {
        // Writing a backtrace may take longer than the other tests' deadline.
        let workers = workers(1, Duration::from_secs(10));
        let failed = workers.run(|_| -> u8 { panic!("on purpose") }).await.unwrap_err();
        assert!(matches!(failed.error, Error::Panicked), "{failed:?}");
        assert_eq!(workers.run(|_| 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn time_in_the_queue_is_not_a_timeout() {
        let workers = workers(1, Duration::from_secs(3));
        let slow = || workers.run(|_| thread::sleep(Duration::from_millis(1200)));
        let (a, b, c) = tokio::join!(slow(), slow(), slow());
        assert!(a.is_ok() && b.is_ok() && c.is_ok());
        assert_eq!(workers.hung(), 0);
    }
}
