//! The process that serves an lxcfs mount, found in `/proc`. Only a process that has the FUSE
//! device open is considered, because any process can choose its name and its arguments.

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
};

use super::Identity;
use crate::{
    mount::observe::LXCFS_FSTYPE,
    sys::{
        fuse::{self, Holder, Search},
        mountinfo::Dev,
        process::Process,
    },
};

/// The limit of what is read of a mount table to find lxcfs in it, in bytes.
const MAX_TABLE_BYTES: u64 = 8 << 20;

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
    let Search { mut holders, complete } = fuse::search(|_| true, |holder| holder.dev == Some(dev));
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

/// Options without which lxcfs shows values of the node, and these values.
const OPTIONS: [(&str, &str); 2] = [
    ("--enable-cfs", "cpuinfo, stat and cpu/online show the node's CPUs, whatever the quota"),
    ("--enable-loadavg", "loadavg is the node's"),
];

/// The options that the lxcfs at `path` was started without, each with what follows. Empty if its
/// process was not found. Blocks.
pub fn missing_options(path: &Path) -> Vec<(&'static str, &'static str)> {
    let process = super::identify(path).and_then(|id| serving_process(id, path).ok().flatten());
    process.map_or_else(Vec::new, |s| missing_in(&fuse::arguments(s.process.pid())))
}

fn missing_in(arguments: &[Vec<u8>]) -> Vec<(&'static str, &'static str)> {
    // `-l` is `--enable-loadavg`, alone or with other letters, as in `-fl`. What follows `o` or `p`
    // is their value.
    let has_short = |argument: &[u8]| match argument {
        [b'-', letters @ ..] if !letters.starts_with(b"-") => {
            letters.iter().take_while(|l| !matches!(l, b'o' | b'p')).any(|l| *l == b'l')
        }
        _ => false,
    };
    let has = |option: &str| {
        arguments.iter().any(|argument| {
            argument == option.as_bytes()
                || option == "--enable-loadavg" && has_short(argument.as_slice())
        })
    };
    // Without arguments, the process has ended.
    let ended = arguments.iter().all(Vec::is_empty);
    OPTIONS.into_iter().filter(|(option, _)| !ended && !has(option)).collect()
}

/// Every lxcfs of our mount namespace whose arguments name this path, even if its mount is
/// detached, and its device where the kernel reports it. An lxcfs of another mount namespace serves
/// another path of the same name. Blocks.
pub fn processes_serving(path: &Path) -> Vec<(Process, Option<Dev>)> {
    let own = mount_namespace("self");
    let ours = |pid: i32| own.is_some() && mount_namespace(&pid.to_string()) == own;
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
    let paths = arguments.iter().map(|arg| Path::new(std::ffi::OsStr::from_bytes(arg)));
    let (at, others): (Vec<_>, Vec<_>) = paths.partition(|arg| *arg == path);
    // Its program, or the program that a loader or wrapper runs.
    let lxcfs =
        |arg: &&Path| arg.file_name().is_some_and(|name| name.as_bytes().starts_with(b"lxcfs"));
    !at.is_empty() && others.iter().any(lxcfs)
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
    let namespace = mount_namespace(&pid.to_string());
    namespace.is_some()
        && parent.is_some_and(|parent| {
            parent.comm == "kube-lxcfs" && mount_namespace(&parent.pid.to_string()) == namespace
        })
}

fn mount_namespace(pid: &str) -> Option<(u64, u64)> {
    std::fs::metadata(format!("/proc/{pid}/ns/mnt")).map(|m| (m.dev(), m.ino())).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_lxcfs_are_found_in_its_arguments() {
        for (line, expected) in [
            ("lxcfs /var/lib/lxcfs", &["--enable-cfs", "--enable-loadavg"][..]),
            ("lxcfs -f --enable-cfs --enable-loadavg /var/lib/lxcfs", &[]),
            ("lxcfs -fl --enable-cfs /var/lib/lxcfs", &[]),
            ("lxcfs -p/run/l --enable-cfs -o allow_all /lxcfs", &["--enable-loadavg"]),
            ("lxcfs --enable-cfsx -l /lxcfs", &["--enable-cfs"]),
            ("", &[]),
        ] {
            let arguments: Vec<Vec<u8>> =
                line.split_whitespace().map(|argument| argument.as_bytes().to_vec()).collect();
            let missing: Vec<&str> = missing_in(&arguments).into_iter().map(|(o, _)| o).collect();
            assert_eq!(missing, expected, "{line}");
        }
    }

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
