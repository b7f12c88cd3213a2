//! The process that serves an lxcfs mount, found in `/proc`. Only a process that has the FUSE
//! device open is considered, because any process can choose its name and its arguments.

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use super::Identity;
use crate::{
    mount::observe::LXCFS_FSTYPE,
    sys::{
        fuse::{self, Holder, Search},
        mntns,
        mountinfo::Dev,
        process::Process,
    },
};

/// The limit of what is read of a mount table to find lxcfs in it, in bytes.
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// The name of a supervisor's process, as `comm` has it.
const SUPERVISOR: &str = "kube-lxcfs";

/// The process that serves a mount.
#[derive(Debug)]
pub(super) struct ServingProcess {
    pub(super) process: Process,
    /// A `kube-lxcfs` is its parent.
    pub(super) supervised: bool,
    /// The kernel named its connection. If not, another process may be the one.
    pub(super) certain: bool,
}

/// The search for a process took too long, and reached only a part of the processes.
#[derive(Debug, thiserror::Error)]
#[error("only a part of the processes was searched in time")]
pub(super) struct IncompleteSearch;

/// Finds the process that serves a mount: the one with its connection. On kernels that name no
/// connection, it is an lxcfs whose arguments name the path and whose namespace has the mount; of
/// several, the one that was started last, which serves after a hand-over. Blocks.
///
/// # Errors
/// Fails if none was found and not every process was searched.
pub(super) fn serving_process(
    identity: Identity,
    path: &Path,
) -> Result<Option<ServingProcess>, IncompleteSearch> {
    let dev = identity.dev;
    let may_serve = |pid| has_mount(pid, dev) && is_lxcfs_at(pid, path);
    // A supervisor shares the connection of its lxcfs.
    let Search { mut holders, complete } =
        fuse::search(|pid| !is_supervisor(pid), |holder| holder.dev == Some(dev));
    // Where the kernel names connections, the search did not reach the holder of this one.
    if !complete && holders.iter().any(|holder| holder.dev.is_some()) {
        holders.clear();
    }
    let Some(holder) = choose(holders, dev, may_serve, start_time) else {
        return if complete { Ok(None) } else { Err(IncompleteSearch) };
    };
    let Ok(process) = Process::open(i64::from(holder.pid)) else { return Ok(None) };
    let (supervised, certain) = (is_supervised(holder.pid), holder.dev.is_some());
    Ok(Some(ServingProcess { process, supervised, certain }))
}

/// Chooses the holder of the connection, else of those without a name that `may_serve` the one that
/// was started last.
fn choose<T: Ord>(
    holders: Vec<Holder>,
    dev: Dev,
    may_serve: impl Fn(i32) -> bool,
    started: impl Fn(i32) -> T,
) -> Option<Holder> {
    if let Some(holder) = holders.iter().find(|holder| holder.dev == Some(dev)) {
        return Some(holder.clone());
    }
    let unnamed = holders.into_iter().filter(|holder| holder.dev.is_none());
    unnamed.filter(|holder| may_serve(holder.pid)).max_by_key(|holder| started(holder.pid))
}

/// What the arguments of an lxcfs enable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Enabled {
    /// `loadavg` is the container's (`-l`, `--enable-loadavg`).
    pub loadavg: bool,
    /// `cpuinfo`, `stat` and `cpu` show limits of CPU time (`--enable-cfs`).
    pub cfs: bool,
}

/// What the arguments of the lxcfs that is mounted at `path` enable. It is sent no request. `None`
/// if its process was not found. Blocks while it searches the processes.
pub fn enabled_at(path: &Path) -> Option<Enabled> {
    let ServingProcess { process, .. } = serving_process(super::identify(path)?, path).ok()??;
    let arguments = fuse::arguments(process.pid());
    // Else they may be another process's, or empty.
    process.is_alive().then(|| enabled_by(&arguments))
}

/// As lxcfs reads its arguments (getopt_long(3)): short options can be joined, long ones shortened,
/// and options can follow the path. The options are the same in lxcfs 5, 6 and 7.
fn enabled_by(arguments: &[Vec<u8>]) -> Enabled {
    const PREFIX: &[u8] = b"--enable-";
    let mut enabled = Enabled::default();
    let mut arguments = arguments.iter().map(Vec::as_slice).skip_while(|arg| !names_lxcfs(arg));
    arguments.next();
    while let Some(argument) = arguments.next() {
        let is = |option: &[u8]| argument.len() > PREFIX.len() && option.starts_with(argument);
        match argument {
            b"--" => break,
            b"--pidfile" | b"--runtime-dir" => drop(arguments.next()),
            [b'-', b'-', ..] => {
                enabled.loadavg |= is(b"--enable-loadavg");
                enabled.cfs |= is(b"--enable-cfs");
            }
            [b'-', short @ ..] => {
                // These two have a value, in the same argument or the next.
                let value = short.iter().position(|option| b"op".contains(option));
                let flags = value.map_or(short, |value| &short[..value]);
                enabled.loadavg |= flags.contains(&b'l');
                if value.is_some_and(|value| value + 1 == short.len()) {
                    arguments.next();
                }
            }
            _ => {}
        }
    }
    enabled
}

/// Every lxcfs of our mount namespace whose arguments name this path, even if its mount is
/// detached, and its device where the kernel reports it. An lxcfs of another mount namespace serves
/// another path of the same name. Blocks.
pub fn processes_serving(path: &Path) -> Vec<(Process, Option<Dev>)> {
    let own = mntns::namespace_of("self");
    let ours = |pid: i32| own.is_some() && mntns::namespace_of(pid) == own && !is_supervisor(pid);
    let Search { holders, complete } = fuse::search(ours, |_| false);
    if !complete {
        tracing::warn!(cause = %IncompleteSearch, "a predecessor may still run");
    }
    let holders = holders.into_iter().filter(|h| is_lxcfs_at(h.pid, path));
    holders.filter_map(|h| Some((Process::open(i64::from(h.pid)).ok()?, h.dev))).collect()
}

/// Whether a process is an lxcfs whose arguments name this path.
fn is_lxcfs_at(pid: i32, path: &Path) -> bool {
    are_of_lxcfs_at(&fuse::arguments(pid), path)
}

fn are_of_lxcfs_at(arguments: &[Vec<u8>], path: &Path) -> bool {
    let (at, others): (Vec<&[u8]>, Vec<&[u8]>) =
        arguments.iter().map(Vec::as_slice).partition(|arg| as_path(arg) == path);
    !at.is_empty() && others.into_iter().any(names_lxcfs)
}

/// Whether an argument is lxcfs's program: the process's, or that which a loader or wrapper runs.
fn names_lxcfs(argument: &[u8]) -> bool {
    as_path(argument).file_name().is_some_and(|name| name.as_bytes().starts_with(b"lxcfs"))
}

fn as_path(argument: &[u8]) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(argument))
}

/// Whether the namespace of a process has the whole file system of this device mounted. A container
/// has files of it only.
fn has_mount(pid: i32, dev: Dev) -> bool {
    let Ok(table) = std::fs::File::open(format!("/proc/{pid}/mountinfo")) else { return false };
    let lines = BufReader::new(table.take(MAX_TABLE_BYTES)).split(b'\n');
    lines.map_while(Result::ok).any(|line| is_mount_of(&line, dev))
}

fn is_mount_of(line: &[u8], dev: Dev) -> bool {
    let mut fields = line.split(|b| *b == b' ').skip(2);
    let at_root = fields.next() == Some(dev.to_string().as_bytes()) && fields.next() == Some(b"/");
    let after_hyphen = fields.skip_while(|field| *field != b"-").nth(1);
    at_root && after_hyphen == Some(LXCFS_FSTYPE)
}

/// When a process was started, in clock ticks since the start of the machine.
fn start_time(pid: i32) -> Option<u64> {
    procfs::process::Process::new(pid).and_then(|p| p.stat()).ok().map(|stat| stat.starttime)
}

/// Whether a process is the child of a `kube-lxcfs` that shares its mount namespace. The name alone
/// proves nothing.
fn is_supervised(pid: i32) -> bool {
    let stat = |pid| procfs::process::Process::new(pid).and_then(|p| p.stat()).ok();
    let parent = stat(pid).and_then(|child| stat(child.ppid));
    let namespace = mntns::namespace_of(pid);
    namespace.is_some()
        && parent.is_some_and(|parent| {
            parent.comm == SUPERVISOR && mntns::namespace_of(parent.pid) == namespace
        })
}

/// Whether a process has the name of a supervisor.
fn is_supervisor(pid: i32) -> bool {
    let comm = std::fs::read(format!("/proc/{pid}/comm"));
    comm.is_ok_and(|comm| comm.strip_suffix(b"\n") == Some(SUPERVISOR.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_file_system_is_a_serving_mount() {
        let dev = Dev { major: 0, minor: 40 };
        for (line, expected) in [
            ("9 1 0:40 / /lxcfs rw shared:3 - fuse.lxcfs lxcfs rw", true),
            ("9 1 0:41 / /lxcfs rw - fuse.lxcfs lxcfs rw", false),
            ("9 1 0:40 /proc/meminfo /proc/meminfo ro - fuse.lxcfs lxcfs rw", false),
            ("9 1 0:40 / /lxcfs rw - fuse.sshfs lxcfs rw", false),
            ("9 1", false),
        ] {
            assert_eq!(is_mount_of(line.as_bytes(), dev), expected, "{line}");
        }
    }

    #[test]
    fn successor_serves_where_no_connection_is_named() {
        let dev = Dev { major: 0, minor: 40 };
        let unnamed = |pid| Holder { pid, dev: None };
        let other = Holder { pid: 4, dev: Some(Dev { major: 0, minor: 41 }) };
        // The predecessor has pid 1 and the successor pid 2; pid 3 is not an lxcfs at the path.
        let holders = vec![unnamed(1), unnamed(2), unnamed(3), other];
        let choose = |holders: &[Holder]| choose(holders.to_vec(), dev, |pid| pid != 3, |pid| pid);
        assert_eq!(choose(&holders), Some(unnamed(2)));
        let named = Holder { pid: 5, dev: Some(dev) };
        let all = [holders.as_slice(), std::slice::from_ref(&named)].concat();
        assert_eq!(choose(&all), Some(named));
        assert_eq!(choose(&holders[2..]), None);
    }

    #[test]
    fn arguments_enable_what_lxcfs_reads_in_them() {
        for (arguments, loadavg, cfs) in [
            (&["/usr/bin/lxcfs", "/var/lib/lxcfs"][..], false, false),
            (&["lxcfs", "--enable-loadavg", "--enable-cfs", "/l"], true, true),
            (&["lxcfs", "-l", "/l"], true, false),
            (&["lxcfs", "-fl", "/l", "--enable-cf"], true, true),
            (&["/lib/ld.so", "/usr/bin/lxcfs", "--enable-cfs", "/l"], false, true),
            (&["lxcfs", "-o", "-l", "-p", "--enable-cfs", "/l"], false, false),
            (&["lxcfs", "-fpl", "-oro,l", "--pidfile", "-l", "/l"], false, false),
            (&["lxcfs", "--enable-", "--enable-cgroup", "/l", "--", "-l"], false, false),
        ] {
            let bytes: Vec<_> = arguments.iter().map(|a| a.as_bytes().to_vec()).collect();
            assert_eq!(enabled_by(&bytes), Enabled { loadavg, cfs }, "{arguments:?}");
        }
        assert_eq!(enabled_by(&[]), Enabled::default());
    }

    #[test]
    fn arguments_name_the_program_and_the_path() {
        let path = Path::new("/var/lib/lxcfs");
        let of = |arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(|a| a.as_bytes().to_vec()).collect();
            are_of_lxcfs_at(&arguments, path)
        };
        assert!(of(&["/usr/bin/lxcfs", "-f", "/var/lib/lxcfs"]));
        assert!(of(&["/lib/ld.so", "/usr/bin/lxcfs", "/var/lib/lxcfs"]));
        assert!(!of(&["/usr/bin/lxcfs", "-f", "/other"]) && !of(&["/var/lib/lxcfs"]) && !of(&[]));
    }
}
