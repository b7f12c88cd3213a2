//! The FUSE connection of an lxcfs that has exited: its readers wait for the recovery of the views.
//!
//! The kernel aborts a connection with its last descriptor, and from then on every read of a view
//! is an error (ENOTCONN) until the view is removed. So the supervisor shares lxcfs's descriptor.
//! Requests wait until their container is recovered. Then they are answered with ESTALE: the kernel
//! resolves the path a second time (do_filp_open() in fs/namei.c, retry_estale()), and finds the
//! view of the next lxcfs or the container's own file. A reader that had the file open gets an
//! error, at once: many call fstat(2) before they read, so that is answered with what the kernel
//! knows of the file.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{OwnedFd, RawFd},
    sync::{Arc, mpsc as std_mpsc},
    thread,
    time::{Duration, Instant},
};

use nix::sched::CloneFlags;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::{AtFlags, OFlags, Statx, StatxFlags},
    io::Errno,
    process::{Pid, PidfdFlags, PidfdGetfdFlags},
};
use tokio::sync::{mpsc, oneshot};

use super::DRAIN;
use crate::{
    mount::LxcfsFiles,
    sys::{
        fuse,
        mntns::{self, NamespaceId},
        mountinfo::Dev,
    },
};

/// The longest that a request waits.
const MAX_WAIT: Duration = Duration::from_secs(5);
/// The interval at which the thread and the recovery look for each other's results.
const TICK: Duration = Duration::from_millis(1);
/// The size of the buffer for a request. The kernel refuses one that is smaller than the largest
/// write that lxcfs has agreed on, even of a read-only file system (fuse_dev_do_read(),
/// fs/fuse/dev.c): 1 MiB with libfuse 3. Only what is used of it takes memory.
const REQUEST_BYTES: usize = 4 << 20;

/// The size of `struct fuse_in_header`, the start of a request (include/uapi/linux/fuse.h, as all
/// below).
const IN_HEADER: usize = 40;
/// The size of `struct fuse_out_header`.
const OUT_HEADER: usize = 16;
/// The size of `struct fuse_attr_out`.
const ATTR_OUT: usize = 104;
/// A notification: the kernel sends the requests again that lxcfs has read and not answered (kernel
/// 6.9).
const NOTIFY_RESEND: i32 = 7;

/// A share in the connection of an lxcfs, held by a thread with a descriptor table of its own.
///
/// A thread of the supervisor may wait for a request to this lxcfs, and the kernel lets it wait
/// even when it is killed. If the supervisor is killed with its lxcfs, such a thread would keep the
/// supervisor's descriptors open. The connection must not be among them, or it would never be
/// aborted: the thread, and every reader, would wait for ever. The thread that holds it makes no
/// request to a FUSE file system.
#[derive(Debug)]
pub(super) struct Connection {
    recoveries: std_mpsc::Sender<Recovery>,
    lxcfs: Arc<LxcfsFiles>,
}

/// What the thread is to do when lxcfs has exited.
struct Recovery {
    attributes: HashMap<NodeId, [u8; ATTR_OUT]>,
    over: oneshot::Receiver<()>,
    recovered: mpsc::UnboundedReceiver<Option<NamespaceId>>,
    waited: std_mpsc::Sender<io::Result<Waited>>,
}

impl Connection {
    /// Shares the connection of the lxcfs with this pid.
    ///
    /// # Errors
    /// Fails if the process has no descriptor of it, and with those of clone(2), unshare(2),
    /// pidfd_open(2) and pidfd_getfd(2).
    pub(super) fn share(pid: Pid, lxcfs: Arc<LxcfsFiles>) -> io::Result<Connection> {
        let dev = lxcfs.dev;
        let (recoveries, recovery) = std_mpsc::channel::<Recovery>();
        let (shared_tx, shared) = std_mpsc::channel();
        let hold = move || {
            let device = own_descriptors().and_then(|()| share(pid, dev));
            let (device, result) = match device {
                Ok(device) => (Some(device), Ok(())),
                Err(e) => (None, Err(e)),
            };
            let _ = shared_tx.send(result);
            // The sender is dropped when the connection is not needed any more.
            if let (Some(device), Ok(recovery)) = (device, recovery.recv()) {
                let Recovery { attributes, over, recovered, waited } = recovery;
                let _ = waited.send(answer(device, attributes, over, recovered));
            }
        };
        thread::Builder::new().name("connection".into()).spawn(hold)?;
        shared.recv().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))?;
        Ok(Connection { recoveries, lxcfs })
    }

    /// Answers the requests for an lxcfs that has exited until `over` is sent or dropped, and for
    /// a short time after it: those from a mount namespace that was `recovered` do not wait for it.
    ///
    /// # Errors
    /// Those of read(2) and poll(2): readers get an error from then on.
    pub(super) async fn answer(
        self,
        over: oneshot::Receiver<()>,
        recovered: mpsc::UnboundedReceiver<Option<NamespaceId>>,
    ) -> io::Result<Waited> {
        let (waited, result) = std_mpsc::channel();
        let gone = || io::Error::other("the thread panicked");
        let attributes = attributes(&self.lxcfs);
        let recovery = Recovery { attributes, over, recovered, waited };
        self.recoveries.send(recovery).map_err(|_| gone())?;
        // The thread cannot wake this task: it does not have the runtime's descriptors.
        loop {
            match result.try_recv() {
                Ok(waited) => return waited,
                Err(std_mpsc::TryRecvError::Empty) => tokio::time::sleep(TICK).await,
                Err(std_mpsc::TryRecvError::Disconnected) => return Err(gone()),
            }
        }
    }
}

/// Gives the calling thread a descriptor table of its own, with the standard descriptors only.
fn own_descriptors() -> io::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_FILES)?;
    let open = std::fs::read_dir("/proc/thread-self/fd")?.flatten();
    let open = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // The directory itself is closed by now: an error.
    let others: Vec<RawFd> = open.filter(|fd| *fd > libc::STDERR_FILENO).collect();
    for fd in others {
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}

fn share(pid: Pid, dev: Dev) -> io::Result<OwnedFd> {
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let descriptor = fuse::descriptor(pid.as_raw_nonzero().get(), dev)
        .ok_or_else(|| io::Error::other("lxcfs has no descriptor of its connection"))?;
    Ok(rustix::process::pidfd_getfd(process, descriptor, PidfdGetfdFlags::empty())?)
}

/// The kernel's number of a file in a connection. libfuse makes it the inode number too, unless
/// lxcfs is given the option `use_ino`: then no file is known, and its requests wait.
type NodeId = u64;

/// The attributes of the view files that the kernel knows (`struct fuse_attr_out`). lxcfs is sent
/// no request.
fn attributes(lxcfs: &LxcfsFiles) -> HashMap<NodeId, [u8; ATTR_OUT]> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = |file: &OwnedFd| rustix::fs::statx(file, "", flags, StatxFlags::BASIC_STATS).ok();
    let stats = lxcfs.files.values().filter_map(stat);
    stats.map(|stat| (stat.stx_ino, attr_out(&stat))).collect()
}

fn attr_out(stat: &Statx) -> [u8; ATTR_OUT] {
    let times = [&stat.stx_atime, &stat.stx_mtime, &stat.stx_ctime];
    let [atime, mtime, ctime] = times.map(|time| time.tv_sec.cast_unsigned());
    let [atime_ns, mtime_ns, ctime_ns] = times.map(|time| time.tv_nsec);
    // The first are those of the cache: the attributes are valid for no time.
    let longs = [0, 0, stat.stx_ino, stat.stx_size, stat.stx_blocks, atime, mtime, ctime];
    let mode = stat.stx_mode.into();
    let (links, block) = (stat.stx_nlink, stat.stx_blksize);
    let shorts =
        [atime_ns, mtime_ns, ctime_ns, mode, links, stat.stx_uid, stat.stx_gid, 0, block, 0];
    let longs = longs.into_iter().flat_map(u64::to_ne_bytes);
    let mut out = [0; ATTR_OUT];
    let bytes = longs.chain(shorts.into_iter().flat_map(u32::to_ne_bytes));
    out.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
    out
}

/// See [`Connection::answer`].
fn answer(
    device: OwnedFd,
    attributes: HashMap<NodeId, [u8; ATTR_OUT]>,
    mut over: oneshot::Receiver<()>,
    mut recovered: mpsc::UnboundedReceiver<Option<NamespaceId>>,
) -> io::Result<Waited> {
    let flags = rustix::fs::fcntl_getfl(&device)?;
    rustix::fs::fcntl_setfl(&device, flags | OFlags::NONBLOCK)?;
    let mut requests = Requests {
        device,
        attributes,
        waiting: Vec::new(),
        recovered: Recovered::default(),
        waited: 0,
    };
    let mut buffer = vec![0; REQUEST_BYTES];
    let mut is_over = move || !matches!(over.try_recv(), Err(oneshot::error::TryRecvError::Empty));
    requests.resend();
    let deadline = Instant::now() + MAX_WAIT;
    let in_time = loop {
        if is_over() {
            break true;
        }
        if Instant::now() >= deadline {
            break false;
        }
        let mut is_new = false;
        while let Ok(namespace) = recovered.try_recv() {
            requests.recovered.namespaces.extend(namespace);
            is_new = true;
        }
        if is_new {
            requests.answer_waiting();
        }
        if !requests.read(&mut buffer)? {
            break true;
        }
    };
    requests.recovered.all = true;
    requests.answer_waiting();
    let until = if in_time { Instant::now() + DRAIN } else { deadline + MAX_WAIT };
    while Instant::now() < until && (in_time || !is_over()) {
        if !requests.read(&mut buffer)? {
            break;
        }
    }
    Ok(Waited { requests: requests.waited, in_time })
}

/// The mount namespaces whose views no longer come from the exited lxcfs.
#[derive(Debug, Default)]
struct Recovered {
    all: bool,
    namespaces: HashSet<NamespaceId>,
}

impl Recovered {
    fn contains(&self, namespace: Option<NamespaceId>) -> bool {
        self.all || namespace.is_some_and(|id| self.namespaces.contains(&id))
    }
}

/// What readers experienced of a recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waited {
    /// The number of requests that waited.
    pub(super) requests: usize,
    /// The recovery was over within [`MAX_WAIT`]. If not, requests got an error from then on.
    pub(super) in_time: bool,
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// A path is resolved: the answer waits for the recovery.
    Wait,
    /// A path is resolved, or the file was opened before: the answer waits if its attributes are
    /// not known.
    Attributes,
    /// The kernel makes another request instead.
    NotSupported,
    /// A descriptor is closed, which succeeds.
    Done,
    /// A descriptor is used that was opened before.
    NotConnected,
    /// The request with this number was interrupted by a signal.
    Interrupt(u64),
    /// The kernel expects none.
    None,
}

/// A request of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    unique: u64,
    node: NodeId,
    /// The process that it is for; 0 if it is none of our pid namespace.
    pid: i32,
    answer: Answer,
}

/// Parses a request. `None` if it is none.
fn parse(request: &[u8]) -> Option<Request> {
    let number = |at: usize| Some(u32::from_ne_bytes(*request.get(at..)?.first_chunk()?));
    let long = |at: usize| Some(u64::from_ne_bytes(*request.get(at..)?.first_chunk()?));
    let answer = match number(4)? {
        // LOOKUP, READLINK, OPEN, STATFS, GETXATTR, LISTXATTR, OPENDIR, ACCESS
        1 | 5 | 14 | 17 | 22 | 23 | 27 | 34 => Answer::Wait,
        // GETATTR
        3 => Answer::Attributes,
        // STATX: GETATTR follows
        52 => Answer::NotSupported,
        // RELEASE, FLUSH, RELEASEDIR
        18 | 25 | 29 => Answer::Done,
        // FORGET, BATCH_FORGET
        2 | 42 => Answer::None,
        // INTERRUPT
        36 => Answer::Interrupt(long(IN_HEADER)?),
        _ => Answer::NotConnected,
    };
    Some(Request { unique: long(8)?, node: long(16)?, pid: number(32)?.cast_signed(), answer })
}

struct Requests {
    device: OwnedFd,
    attributes: HashMap<NodeId, [u8; ATTR_OUT]>,
    /// The numbers of those that wait, each with the mount namespace of its process.
    waiting: Vec<(u64, Option<NamespaceId>)>,
    recovered: Recovered,
    /// How many have waited.
    waited: usize,
}

impl Requests {
    /// Waits [`TICK`] for a request, and answers it if it need not wait. Returns whether the
    /// connection still exists.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        let tick = Timespec { tv_sec: 0, tv_nsec: TICK.subsec_nanos().into() };
        match rustix::event::poll(&mut [PollFd::new(&self.device, PollFlags::IN)], Some(&tick)) {
            Ok(0) | Err(Errno::INTR) => return Ok(true),
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        let length = match rustix::io::read(&self.device, &mut *buffer) {
            Ok(length) => length,
            // The request was taken back in between.
            Err(Errno::AGAIN | Errno::NOENT | Errno::INTR) => return Ok(true),
            // Its last mount is detached, or it was aborted.
            Err(Errno::NODEV) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        let Some(Request { unique, node, pid, answer }) = parse(&buffer[..length]) else {
            return Ok(true);
        };
        match (answer, self.attributes.get(&node)) {
            (Answer::Attributes, Some(attributes)) => self.send(unique, 0, attributes),
            (Answer::Wait | Answer::Attributes, _) => {
                let namespace = mntns::namespace_of(pid);
                if self.recovered.contains(namespace) {
                    self.send_error(unique, Errno::STALE);
                } else {
                    self.waiting.push((unique, namespace));
                    self.waited += 1;
                }
            }
            (Answer::Done, _) => self.send(unique, 0, &[]),
            (Answer::NotConnected, _) => self.send_error(unique, Errno::NOTCONN),
            (Answer::NotSupported, _) => self.send_error(unique, Errno::NOSYS),
            (Answer::Interrupt(interrupted), _) => {
                self.waiting.retain(|(waiting, _)| *waiting != interrupted);
                self.send_error(interrupted, Errno::INTR);
            }
            (Answer::None, _) => {}
        }
        Ok(true)
    }

    /// Makes the kernel resolve the paths of requests a second time whose namespace is recovered.
    fn answer_waiting(&mut self) {
        let answered = |(_, namespace): &mut (u64, _)| self.recovered.contains(*namespace);
        let answered: Vec<_> = self.waiting.extract_if(.., answered).collect();
        answered.into_iter().for_each(|(unique, _)| self.send_error(unique, Errno::STALE));
    }

    /// The requests that lxcfs had read come again. Older kernels keep them: their readers get an
    /// error when the connection ends.
    fn resend(&self) {
        self.send(0, NOTIFY_RESEND, &[]);
    }

    fn send_error(&self, unique: u64, error: Errno) {
        self.send(unique, -error.raw_os_error(), &[]);
    }

    /// Sends a `struct fuse_out_header`, and what follows it. Fails if the request was taken back,
    /// which is no matter.
    fn send(&self, unique: u64, error: i32, body: &[u8]) {
        let length = u32::try_from(OUT_HEADER + body.len()).unwrap_or_default();
        let header = [length.to_ne_bytes(), error.to_ne_bytes()].concat();
        let _ =
            rustix::io::write(&self.device, &[&header, &unique.to_ne_bytes()[..], body].concat());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, unique: u64, body: u64) -> Vec<u8> {
        let mut request = vec![0; IN_HEADER];
        request[4..8].copy_from_slice(&opcode.to_ne_bytes());
        request[8..16].copy_from_slice(&unique.to_ne_bytes());
        request[16..24].copy_from_slice(&3u64.to_ne_bytes());
        request[32..36].copy_from_slice(&5u32.to_ne_bytes());
        request.extend(body.to_ne_bytes());
        request
    }

    #[test]
    fn answers_differ_by_operation() {
        for (opcode, expected) in [
            (1, Answer::Wait),
            (3, Answer::Attributes),
            (14, Answer::Wait),
            (15, Answer::NotConnected),
            (25, Answer::Done),
            (36, Answer::Interrupt(9)),
            (42, Answer::None),
            (52, Answer::NotSupported),
            (1000, Answer::NotConnected),
        ] {
            let parsed = parse(&request(opcode, 7, 9));
            let expected = Request { unique: 7, node: 3, pid: 5, answer: expected };
            assert_eq!(parsed, Some(expected), "{opcode}");
        }
    }

    #[test]
    fn attributes_are_those_of_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "some bytes").unwrap();
        let mask = StatxFlags::BASIC_STATS;
        let stat = rustix::fs::statx(rustix::fs::CWD, file.path(), AtFlags::empty(), mask).unwrap();
        let out = attr_out(&stat);
        let long = |at: usize| u64::from_ne_bytes(*out[at..].first_chunk().unwrap());
        let short = |at: usize| u32::from_ne_bytes(*out[at..].first_chunk().unwrap());
        assert_eq!((long(0), long(16), long(24)), (0, stat.stx_ino, 10));
        assert_eq!(short(76), u32::from(stat.stx_mode));
        assert_eq!((short(80), short(96)), (1, stat.stx_blksize));
    }

    #[test]
    fn short_requests_are_ignored() {
        let whole = request(36, 7, 9);
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]), None, "{length}");
        }
    }
}
