//! The process that answers for an lxcfs mount, found in `/proc`.

use std::{os::unix::fs::MetadataExt, path::Path};

use super::Identity;
use crate::{mount::Process, plan::Dev};

/// A process that holds /dev/fuse.
struct Fuse {
    pid: i32,
    /// The minor number of its connection's mounts (`fuse_connection` in fdinfo, newer kernels).
    connection: Option<u32>,
}

impl Fuse {
    /// Whether it is an lxcfs that was told to serve at this path, as it sees it.
    fn is_lxcfs_at(&self, path: &Path) -> bool {
        let process = procfs::process::Process::new(self.pid);
        process.and_then(|p| p.cmdline()).is_ok_and(|args| {
            let (at, others): (Vec<_>, Vec<_>) = args.iter().map(Path::new).partition(|arg| *arg == path);
            // Its program, or what a loader or wrapper was given as such.
            let lxcfs = |arg: &&Path| arg.file_name().is_some_and(|name| name.to_string_lossy().starts_with("lxcfs"));
            !at.is_empty() && others.iter().any(lxcfs)
        })
    }

    fn in_our_mount_namespace(&self) -> bool {
        let id = |path: String| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
        let ours = id("/proc/self/ns/mnt".into());
        ours.is_some() && id(format!("/proc/{}/ns/mnt", self.pid)) == ours
    }
}

fn all() -> impl Iterator<Item = Fuse> {
    procfs::process::all_processes().into_iter().flatten().flatten().filter_map(|process| {
        let fuse = |fd: &procfs::process::FDInfo| {
            matches!(&fd.target, procfs::process::FDTarget::Path(path) if path.ends_with("dev/fuse"))
        };
        let fd = process.fd().ok()?.flatten().find(fuse)?.fd;
        let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{fd}", process.pid)).unwrap_or_default();
        let connection = info.lines().find_map(|l| l.strip_prefix("fuse_connection:")?.trim().parse().ok());
        Some(Fuse { pid: process.pid, connection })
    })
}

/// The process that serves a mount: the one with its connection, and on kernels that do not tell connections the lxcfs whose
/// arguments name the path.
pub(super) fn serving(identity: Identity, path: &Path) -> Option<Process> {
    let serves = |fuse: &Fuse| match fuse.connection {
        Some(minor) => identity.dev.major == 0 && minor == identity.dev.minor,
        None => fuse.is_lxcfs_at(path),
    };
    Process::open(i64::from(all().find(serves)?.pid)).ok()
}

/// Every lxcfs that was started to serve at this path in our mount namespace, whether its mount is still there or not, and its
/// device where the kernel tells. One of another mount namespace is somebody else's, though its path is called the same.
pub(super) fn started_at(path: &Path) -> Vec<(Process, Option<Dev>)> {
    let ours = all().filter(|fuse| fuse.in_our_mount_namespace() && fuse.is_lxcfs_at(path));
    let dev = |fuse: &Fuse| fuse.connection.map(|minor| Dev { major: 0, minor });
    ours.filter_map(|fuse| Some((Process::open(i64::from(fuse.pid)).ok()?, dev(&fuse)))).collect()
}
