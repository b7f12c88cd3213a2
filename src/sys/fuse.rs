//! The processes that hold a FUSE connection, found in `/proc`. A connection whose last holder has
//! exited is aborted by the kernel: its file system answers with `ENOTCONN`.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
    io::Read,
    os::fd::RawFd,
    path::Path,
    time::{Duration, Instant},
};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};

use super::mountinfo::Dev;

/// The device number of `/dev/fuse` (Documentation/admin-guide/devices.txt).
const FUSE_DEVICE: (u32, u32) = (10, 229);
/// The limit of descriptors that are read of one process, of the lowest numbers.
const MAX_FDS: usize = 256;
/// The time for a search. Processes that are not reached in time are not searched.
const SEARCH_TIME: Duration = Duration::from_secs(1);
/// The limit of what is read of one file of `/proc`, in bytes.
const MAX_BYTES: u64 = 64 << 10;

/// A process that has `/dev/fuse` open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub pid: i32,
    /// The device of the connection's file system (`fuse_connection` in fdinfo, newer kernels).
    pub dev: Option<Dev>,
}

/// The result of a search for the processes that have `/dev/fuse` open.
#[derive(Clone, Debug)]
pub struct Search {
    /// Each process, once per connection.
    pub holders: Vec<Holder>,
    /// Every process was searched, or the search stopped at a holder.
    pub complete: bool,
}

/// Searches the processes that `consider` selects, until `stop_at` a holder. The first process of
/// each cgroup comes first, then the second of each, and so on: many processes of one container do
/// not delay the search of another's. No descriptor's file system is sent a request. It takes
/// milliseconds, and with many open descriptors on the node up to [`SEARCH_TIME`]: call it on a
/// worker thread.
pub fn search(consider: impl Fn(i32) -> bool, mut stop_at: impl FnMut(&Holder) -> bool) -> Search {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let pids: Vec<i32> = pids.filter(|pid| consider(*pid)).collect();
    let pids = in_rounds(pids, |pid| group(&read_start(format!("/proc/{pid}/cgroup"))));
    let started = Instant::now();
    let mut search = Search { holders: Vec::new(), complete: true };
    for pid in pids {
        if started.elapsed() >= SEARCH_TIME {
            search.complete = false;
            break;
        }
        for holder in holders_in(pid) {
            let stop = stop_at(&holder);
            search.holders.push(holder);
            if stop {
                return search;
            }
        }
    }
    search
}

/// The first pid of each group, then the second of each, and so on.
fn in_rounds<G: Eq + Hash>(pids: Vec<i32>, group: impl Fn(i32) -> G) -> Vec<i32> {
    let mut counts: HashMap<G, usize> = HashMap::new();
    let rounds = pids.into_iter().map(|pid| {
        let count = counts.entry(group(pid)).or_default();
        *count += 1;
        (*count, pid)
    });
    let mut rounds: Vec<(usize, i32)> = rounds.collect();
    rounds.sort_by_key(|(round, _)| *round);
    rounds.into_iter().map(|(_, pid)| pid).collect()
}

/// The id of the container that a cgroup file names, else the whole file. A container can make
/// cgroups below its own.
fn group(cgroup: &[u8]) -> Vec<u8> {
    const ID: usize = 64;
    let id = cgroup.windows(ID).find(|text| text.iter().all(u8::is_ascii_hexdigit));
    id.unwrap_or(cgroup).to_owned()
}

/// Those of `devs` whose connection a process holds, as far as the kernel reports it and the search
/// reaches.
pub fn held(devs: &BTreeSet<Dev>) -> BTreeSet<Dev> {
    let mut held = BTreeSet::new();
    search(
        |_| true,
        |holder| {
            held.extend(holder.dev.filter(|dev| devs.contains(dev)));
            held.len() == devs.len()
        },
    );
    held
}

/// A descriptor of this process for the connection of `dev`. On kernels that name no connection,
/// one for any.
pub fn descriptor(pid: i32, dev: Dev) -> Option<RawFd> {
    let mut descriptors = descriptors(pid);
    descriptors.find(|(_, of)| of.is_none_or(|of| of == dev)).map(|(fd, _)| fd)
}

fn holders_in(pid: i32) -> Vec<Holder> {
    let mut found: Vec<Holder> = Vec::new();
    for (_, dev) in descriptors(pid) {
        let holder = Holder { pid, dev };
        if !found.contains(&holder) {
            found.push(holder);
        }
    }
    found
}

/// The descriptors of a process that are of the FUSE device, each with [`Holder::dev`].
fn descriptors(pid: i32) -> impl Iterator<Item = (RawFd, Option<Dev>)> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.take(MAX_FDS).filter_map(move |fd| {
        let path = fd.path();
        let named =
            std::fs::read_link(&path).is_ok_and(|to| to.file_name() == Some("fuse".as_ref()));
        if !named || !is_fuse_device(&path) {
            return None;
        }
        let info =
            read_start(Path::new("/proc").join(format!("{pid}/fdinfo")).join(fd.file_name()));
        let dev = connection(&String::from_utf8_lossy(&info));
        Some((fd.file_name().to_str()?.parse().ok()?, dev))
    })
}

/// Whether a descriptor is of the FUSE device. Its name proves nothing. With `AT_STATX_DONT_SYNC` a
/// file system is not sent a request.
fn is_fuse_device(fd: &Path) -> bool {
    let stat = rustix::fs::statx(CWD, fd, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE);
    stat.is_ok_and(|stat| {
        FileType::from_raw_mode(stat.stx_mode.into()) == FileType::CharacterDevice
            && (stat.stx_rdev_major, stat.stx_rdev_minor) == FUSE_DEVICE
    })
}

/// The device of a connection, from fdinfo.
fn connection(info: &str) -> Option<Dev> {
    let minor = info.lines().find_map(|line| line.strip_prefix("fuse_connection:"))?;
    Some(Dev { major: 0, minor: minor.trim().parse().ok()? })
}

/// The arguments of a process, as far as the first 64 KiB have them. Reading them may block: a
/// process may have them in memory that it serves itself.
pub fn arguments(pid: i32) -> Vec<Vec<u8>> {
    let text = read_start(format!("/proc/{pid}/cmdline"));
    text.split(|b| *b == 0).map(<[u8]>::to_vec).collect()
}

fn read_start(path: impl AsRef<Path>) -> Vec<u8> {
    let mut text = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        let _ = file.take(MAX_BYTES).read_to_end(&mut text);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_file_of_the_same_name_is_no_device() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dev/fuse");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "").unwrap();
        let _open = std::fs::File::open(&path).unwrap();
        let own = std::process::id().cast_signed();
        assert_eq!(holders_in(own), []);
        assert!(is_fuse_device(Path::new("/dev/fuse")) && !is_fuse_device(Path::new("/dev/null")));
    }

    #[test]
    fn many_processes_of_a_cgroup_do_not_come_first() {
        // A container with 4,000 processes and a cgroup for each of them, and lxcfs.
        let (id, lxcfs) = ("ab".repeat(32), 5000);
        let cgroup = |pid| match pid {
            ..4000 => format!("0::/kubepods/cri-containerd-{id}.scope/{pid}\n"),
            _ => format!("0::/system.slice/{}.service\n", pid / 1000),
        };
        let pids: Vec<i32> = (0..4000).chain([4000, 4001, 4002, 4998, 4999, lxcfs]).collect();
        let ordered = in_rounds(pids, |pid| group(cgroup(pid).as_bytes()));
        assert_eq!(ordered[..5], [0, 4000, lxcfs, 1, 4001]);
        assert_eq!(ordered.len(), 4006);
    }

    #[test]
    fn connection_is_read_from_fdinfo() {
        let info = "pos:\t0\nflags:\t02\nmnt_id:\t24\nfuse_connection:\t41\n";
        assert_eq!(connection(info), Some(Dev { major: 0, minor: 41 }));
        assert_eq!(connection("pos:\t0\n"), None);
    }

    #[test]
    fn long_command_line_is_read_in_part() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cmdline");
        std::fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
        assert_eq!(read_start(&path).len() as u64, MAX_BYTES);
    }
}
