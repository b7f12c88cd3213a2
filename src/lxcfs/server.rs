//! The process that serves an lxcfs mount, found in `/proc`.

use std::{os::unix::fs::MetadataExt, path::Path};

use procfs::process::{FDInfo, FDTarget};

use super::Identity;
use crate::sys::{mountinfo::Dev, process::Process};

/// A process that has /dev/fuse open.
struct FuseProcess {
    pid: i32,
    /// The minor number of its connection's mounts (`fuse_connection` in fdinfo, newer kernels).
    connection: Option<u32>,
}

impl FuseProcess {
    /// Whether it is an lxcfs whose arguments name this path.
    fn is_lxcfs_at(&self, path: &Path) -> bool {
        let process = procfs::process::Process::new(self.pid);
        process.and_then(|p| p.cmdline()).is_ok_and(|args| {
            let (at, others): (Vec<_>, Vec<_>) =
                args.iter().map(Path::new).partition(|arg| *arg == path);
            // Its program, or the program that a loader or wrapper runs.
            let lxcfs = |arg: &&Path| {
                arg.file_name().is_some_and(|name| name.to_string_lossy().starts_with("lxcfs"))
            };
            !at.is_empty() && others.iter().any(lxcfs)
        })
    }

    fn in_our_mount_namespace(&self) -> bool {
        let id = |path: String| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
        let ours = id("/proc/self/ns/mnt".into());
        ours.is_some() && id(format!("/proc/{}/ns/mnt", self.pid)) == ours
    }
}

fn fuse_processes() -> impl Iterator<Item = FuseProcess> {
    procfs::process::all_processes().into_iter().flatten().flatten().filter_map(|process| {
        let fuse =
            |fd: &FDInfo| matches!(&fd.target, FDTarget::Path(path) if path.ends_with("dev/fuse"));
        let pid = process.pid;
        let fd = process.fd().ok()?.flatten().find(fuse)?.fd;
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
        let minor = |line: &str| line.strip_prefix("fuse_connection:")?.trim().parse().ok();
        Some(FuseProcess { pid, connection: info.lines().find_map(minor) })
    })
}

/// The process that serves a mount: the one with its connection. On kernels whose fdinfo names no
/// connection, it is the lxcfs whose arguments name the path.
pub(super) fn serving_process(identity: Identity, path: &Path) -> Option<Process> {
    let serves = |fuse: &FuseProcess| match fuse.connection {
        Some(minor) => identity.dev.major == 0 && minor == identity.dev.minor,
        None => fuse.is_lxcfs_at(path),
    };
    Process::open(i64::from(fuse_processes().find(serves)?.pid)).ok()
}

/// Every lxcfs of our mount namespace whose arguments name this path, even if its mount is
/// detached, and its device where the kernel reports it. An lxcfs of another mount namespace serves
/// another path of the same name.
pub fn processes_serving(path: &Path) -> Vec<(Process, Option<Dev>)> {
    let ours =
        fuse_processes().filter(|fuse| fuse.in_our_mount_namespace() && fuse.is_lxcfs_at(path));
    let dev = |fuse: &FuseProcess| fuse.connection.map(|minor| Dev { major: 0, minor });
    ours.filter_map(|fuse| Some((Process::open(i64::from(fuse.pid)).ok()?, dev(&fuse)))).collect()
}
