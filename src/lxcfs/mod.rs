//! The serving lxcfs: its identity, its view files, its health and its changes. Reads only; every
//! request to it has a deadline.

mod finder;
mod server;
mod shared;
mod watcher;

use std::{
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, Statx, StatxFlags};

pub use self::{
    finder::{Finder, find, wait_until_serving},
    server::{Enabled, enabled_at, processes_serving},
    shared::{Acquired, SharedLxcfs},
    watcher::{Change, MountTableWatch, NoticedBy, Watcher},
};
use crate::{
    mount::{WorkError, observe::LXCFS_FSTYPE},
    sys::{
        mountinfo::{Dev, Mount, MountTable},
        statmount::STATX_MNT_ID_UNIQUE,
    },
};

/// The beginning of the source of a supervised lxcfs's mount, before its version.
pub const SOURCE_PREFIX: &str = "lxcfs-";

/// The reason why no lxcfs serves at a path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("lxcfs path {0}: no such directory; start lxcfs or set --lxcfs-path")]
    Missing(PathBuf),
    #[error("no lxcfs mounted at {0}; start lxcfs or set --lxcfs-path")]
    NotMounted(PathBuf),
    #[error(
        "no lxcfs mounted at {path}, but a {fstype}; set --lxcfs-path to the mount point of lxcfs"
    )]
    NotLxcfs { path: PathBuf, fstype: String },
    #[error("lxcfs at {0} has exited; unmount it (umount -l) and start lxcfs again")]
    Dead(PathBuf),
    #[error("lxcfs at {path} timed out after {timeout:?}; if it hangs, kill and restart it")]
    Hung { path: PathBuf, timeout: std::time::Duration },
    #[error("failed to {verb} at lxcfs path {path}: {cause}")]
    Io { path: PathBuf, verb: &'static str, cause: std::io::Error },
    #[error("failed to probe lxcfs at {path}: {cause}")]
    Work { path: PathBuf, cause: WorkError },
}

/// Identifies the lxcfs that is mounted at a path. Two at different times are the same only if both
/// numbers are. When the last mount of a file system is detached, the kernel gives its device
/// number to the next file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub dev: Dev,
    /// The mount's unique id, which is never reused (`STATX_MNT_ID_UNIQUE`, kernel 6.8); on older
    /// kernels the plain one.
    pub mount: u64,
}

/// Identifies the lxcfs that is mounted at `path`, if one is. It is sent no request.
pub fn identify(path: &Path) -> Option<Identity> {
    mount_at(path, |mount, real| {
        let unique = stat_mount(rustix::fs::CWD, real);
        let unique = unique.filter(|stat| stat.stx_mask & STATX_MNT_ID_UNIQUE.bits() != 0);
        Identity { dev: mount.dev, mount: unique.map_or(mount.id.0, |stat| stat.stx_mnt_id) }
    })
}

/// Whether [`identify`] finds this identity at `path`. It reads no mount table if so.
pub fn is_mounted(path: &Path, identity: Identity) -> bool {
    [mounted_at, identify].iter().any(|find| find(path) == Some(identity))
}

/// The identity of the mount at `path`, of an lxcfs or not, as [`identify`] has it. No mount
/// table is read.
fn mounted_at(path: &Path) -> Option<Identity> {
    stat_mount(rustix::fs::CWD, path).and_then(|stat| identity_of(&stat))
}

/// The identity of the mount that a file is opened in, if the kernel has unique ids.
fn unique_identity(file: impl AsFd) -> Option<Identity> {
    let stat = stat_mount(file, Path::new(""))?;
    identity_of(&stat).filter(|_| stat.stx_mask & STATX_MNT_ID_UNIQUE.bits() != 0)
}

fn identity_of(stat: &Statx) -> Option<Identity> {
    let ids = STATX_MNT_ID_UNIQUE | StatxFlags::MNT_ID;
    let dev = Dev { major: stat.stx_dev_major, minor: stat.stx_dev_minor };
    (stat.stx_mask & ids.bits() != 0).then_some(Identity { dev, mount: stat.stx_mnt_id })
}

/// The id of the topmost mount at `path`, the unique one if the kernel has it, and its device
/// number. Its file system is sent no request.
fn stat_mount(dir: impl AsFd, path: &Path) -> Option<Statx> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
    rustix::fs::statx(dir, path, flags, STATX_MNT_ID_UNIQUE | StatxFlags::MNT_ID).ok()
}

/// The version of the lxcfs that is mounted at `path`. It is sent no request. `None` if it has no
/// supervisor.
pub fn version_at(path: &Path) -> Option<String> {
    mount_at(path, |mount, _| version(mount))?
}

/// Whether the lxcfs at `path` is writable, or none is known to be there. It is sent no request.
fn is_writable_at(path: &Path) -> bool {
    mount_at(path, |mount, _| is_writable(mount)).unwrap_or(true)
}

/// Reads the mount table's line of the lxcfs that is mounted at `path`, if one is. The function
/// gets the path without links too.
fn mount_at<T>(path: &Path, look: impl FnOnce(&Mount<'_>, &Path) -> T) -> Option<T> {
    let real = path.canonicalize().ok()?;
    let text = std::fs::read("/proc/thread-self/mountinfo").ok()?;
    let table = MountTable::parse(&text).ok()?;
    let mount = table.top(real.as_os_str().as_encoded_bytes())?;
    let is_lxcfs = *mount.fstype == *LXCFS_FSTYPE && *mount.root == *b"/";
    is_lxcfs.then(|| look(mount, &real))
}

/// The source of the mount names the version.
fn version(mount: &Mount<'_>) -> Option<String> {
    let version = mount.source.strip_prefix(SOURCE_PREFIX.as_bytes())?;
    Some(String::from_utf8_lossy(version).into_owned())
}

/// Whether the file system of a mount is writable. The options of the mount itself do not decide:
/// they can be changed in a container's user namespace. Unknown options count as writable.
fn is_writable(mount: &Mount<'_>) -> bool {
    !mount.super_options.split(|b| *b == b',').any(|option| option == b"ro")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(line: &str) -> Mount<'_> {
        Mount::parse(line.as_bytes()).unwrap()
    }

    #[test]
    fn mount_is_identified_without_the_table() {
        let text = std::fs::read("/proc/thread-self/mountinfo").unwrap();
        let table = MountTable::parse(&text).unwrap();
        let (proc, root) = (table.top(b"/proc").unwrap(), table.top(b"/").unwrap());
        let identity = mounted_at(Path::new("/proc")).unwrap();
        assert_eq!(identity.dev, proc.dev);
        let open = std::fs::File::open("/proc").unwrap();
        assert!(unique_identity(open).is_none_or(|unique| unique == identity));
        assert_ne!(mounted_at(Path::new("/")).unwrap().mount, identity.mount);
        assert_ne!(root.id, proc.id);
        assert_eq!(mounted_at(Path::new("/proc/none")), None);
    }

    #[test]
    fn source_of_a_supervised_mount_names_the_version() {
        let supervised = mount("8 1 0:41 / /b ro shared:3 - fuse.lxcfs lxcfs-7.0.0 ro,user_id=0");
        assert_eq!(version(&supervised).as_deref(), Some("7.0.0"));
        assert_eq!(version(&mount("7 1 0:40 / /a ro - fuse.lxcfs lxcfs ro,user_id=0")), None);
    }

    #[test]
    fn only_the_file_systems_own_options_decide() {
        for (line, expected) in [
            ("7 1 0:40 / /a ro,nosuid - fuse.lxcfs lxcfs rw,user_id=0", true),
            ("8 1 0:41 / /b rw,nosuid shared:3 - fuse.lxcfs lxcfs ro,user_id=0", false),
            ("9 1 0:42 / /c ro - fuse.lxcfs lxcfs", true),
        ] {
            assert_eq!(is_writable(&mount(line)), expected, "{line}");
        }
    }
}
