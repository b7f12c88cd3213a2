//! Observation by path: opens what lies on the view files' paths of a container. It costs the same
//! for a mount table of any length, and the open files serve the steps.
//!
//! It knows only what almost every container has: on each path the container's own file, or one
//! mount on it. For anything else, and before kernel 6.8, the mount table is read.

use std::{collections::BTreeMap, os::fd::OwnedFd};

use rustix::{
    fs::{CWD, ResolveFlags},
    io::Errno,
};

use super::{
    TableLimit,
    driver::{magic, open, open_view},
    observe::{LXCFS_FSTYPE, Mark, kind},
    scratch,
};
use crate::{
    model::view::{BaseFs, FileSet, ViewFile},
    plan::{Layer, LayerKind, MountIdentity, ObservedMounts},
    sys::{
        mountinfo::MountId,
        statmount::{self, Buffer, MountStatus, Parts},
    },
};

/// The kernel also gives up a lookup in its caches if any mount of the node changes meanwhile
/// (`mount_lock`, fs/namei.c).
const CACHED_TRIES: usize = 8;

/// A pass over the node reads the table of a namespace with as many mounts as this. They may all
/// lie on one path: a lookup goes from each to the next, and other containers' detaches wait for
/// its end (RCU). If the table is too large, the namespace comes last, and then without this limit.
const MANY_MOUNTS: usize = 256;

/// The mounts of a container, and what was opened of it.
pub(super) struct Observed {
    pub(super) mounts: ObservedMounts,
    pub(super) bases: BTreeMap<BaseFs, OwnedFd>,
    /// The container's own files.
    pub(super) own: BTreeMap<ViewFile, OwnedFd>,
    /// The only mount on each of the other files.
    pub(super) tops: BTreeMap<ViewFile, (MountId, OwnedFd)>,
}

/// Resolves the view files' paths in the namespace that the thread is in, for a container whose
/// root is `/`. `None` if the mount table must be read, also if the limit is [`TableLimit::Normal`]
/// and the namespace has many mounts. A `fresh` container has no scratch mount, and can have mounts
/// only on these files.
pub(super) fn resolve(fresh: Option<FileSet>, limit: TableLimit) -> Option<Observed> {
    if limit == TableLimit::Normal && !statmount::has_fewer_than::<MANY_MOUNTS>().ok()? {
        return None;
    }
    let mut buffer = Buffer::default();
    let mut observed = Observed {
        mounts: ObservedMounts::default(),
        bases: BTreeMap::new(),
        own: BTreeMap::new(),
        tops: BTreeMap::new(),
    };
    for base in BaseFs::ALL {
        let path = match base {
            BaseFs::Procfs => "/proc",
            BaseFs::Sysfs => "/sys",
        };
        let dir = open_cached(path)?;
        let mount = statmount::of(&dir, Parts::Basic, &mut buffer).ok()?;
        if mount.is_shared || mount.fs_magic != magic(base) {
            return None;
        }
        let mount = MountIdentity { id: mount.id, dev: mount.dev };
        if base == BaseFs::Procfs && fresh.is_none() && !is_without_scratch(&dir) {
            return None;
        }
        observed.mounts.bases.insert(base, mount);
        let files = ViewFile::ALL.into_iter().filter(|file| file.base() == base);
        let files = files.filter(|file| fresh.is_none_or(|fresh| fresh.contains(*file)));
        observe_files(&mut observed, files, fresh.is_some(), &dir, mount.id, &mut buffer)?;
        observed.bases.insert(base, dir);
    }
    Some(observed)
}

/// Opens a path without a request to the root's file system, which may not answer. A mount point is
/// cached, but its file system may want to be asked nevertheless (EAGAIN).
fn open_cached(path: &str) -> Option<OwnedFd> {
    let mut tries = (0..CACHED_TRIES).map(|_| open(CWD, path, ResolveFlags::CACHED));
    tries.find(|opened| !matches!(opened, Err(Errno::AGAIN)))?.ok()
}

fn is_without_scratch(procfs: &OwnedFd) -> bool {
    let point = open(procfs, scratch::POINT_IN_PROC, ResolveFlags::NO_XDEV);
    matches!(point, Ok(_) | Err(Errno::NOENT))
}

fn observe_files(
    observed: &mut Observed,
    files: impl Iterator<Item = ViewFile>,
    is_fresh: bool,
    dir: &OwnedFd,
    mount: MountId,
    buffer: &mut Buffer,
) -> Option<()> {
    // A container has views of most files, or of none: the likely one of two ways is tried first.
    let mut expects_own = is_fresh;
    for file in files {
        let own = if expects_own {
            open(dir, file.path_in_base(), ResolveFlags::NO_XDEV)
        } else {
            Err(Errno::XDEV)
        };
        match own {
            Ok(own) => drop(observed.own.insert(file, own)),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(Errno::XDEV) => {
                let top = match open_view(dir, file) {
                    Ok(top) => top,
                    Err(Errno::NOENT | Errno::NOTDIR) => continue,
                    Err(_) => return None,
                };
                let status = statmount::of(&top, Parts::All, buffer).ok()?;
                expects_own = status.id == mount;
                if expects_own {
                    observed.own.insert(file, top);
                    continue;
                }
                let id = status.id;
                let kind = kind_of(&status, file).filter(|_| status.parent == mount)?;
                observed.mounts.layers.insert(file, vec![Layer { id, kind, locked: false }]);
                observed.tops.insert(file, (id, top));
            }
            Err(_) => return None,
        }
    }
    Some(())
}

fn kind_of(mount: &MountStatus<'_>, file: ViewFile) -> Option<LayerKind> {
    let fstype = match (mount.fstype, mount.subtype) {
        // Before kernel 6.13 it is not known which.
        (Some(b"fuse"), None) => return None,
        (Some(b"fuse"), Some(b"lxcfs")) => LXCFS_FSTYPE,
        (fstype, _) => fstype?,
    };
    let mark = Mark::of_attributes(mount.attributes);
    Some(kind(fstype, mount.root?, mount.dev, mark, file))
}

#[cfg(test)]
mod tests {
    use nix::{
        mount::{MntFlags, MsFlags},
        sched::CloneFlags,
    };

    use super::*;
    use crate::{mount::observe::observe as table_observation, sys::mountinfo::MountTable};

    /// Runs on a thread with a private mount namespace of its own.
    fn in_namespace(work: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                nix::sched::unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
                mount(None, "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
                work();
            });
        });
    }

    fn mount(source: Option<&str>, point: &str, fstype: Option<&str>, flags: MsFlags) {
        nix::mount::mount(source, point, fstype, flags, None::<&str>).unwrap();
    }

    fn bind(source: &str, point: &str) {
        mount(Some(source), point, None, MsFlags::MS_BIND);
    }

    fn by_table() -> ObservedMounts {
        let text = std::fs::read("/proc/thread-self/mountinfo").unwrap();
        table_observation(&MountTable::parse(&text).unwrap(), b"/", |_| false)
    }

    fn kernel_has_it() -> bool {
        let procfs = std::fs::File::open("/proc").unwrap();
        statmount::of(&procfs, Parts::Basic, &mut Buffer::default()).is_ok()
    }

    #[test]
    fn observation_by_path_is_that_of_the_table() {
        in_namespace(|| {
            let agrees = |on_paths: usize| {
                let Some(observed) = resolve(None, TableLimit::Large) else {
                    assert!(!kernel_has_it(), "{:?}", by_table());
                    return;
                };
                let opened = observed.own.keys().chain(observed.tops.keys());
                assert!(opened.count() >= ViewFile::ALL.len() - 3, "pressure may be missing");
                assert_eq!(observed.tops.len(), on_paths);
                assert_eq!(observed.mounts, by_table());
            };
            agrees(0);
            bind("/proc/uptime", "/proc/meminfo");
            mount(Some("none"), "/sys/devices/system/cpu", Some("tmpfs"), MsFlags::empty());
            agrees(2);
            // A cover.
            bind("/proc/stat", "/proc/stat");
            let flags = MsFlags::MS_REMOUNT
                | MsFlags::MS_BIND
                | MsFlags::MS_RDONLY
                | MsFlags::MS_NOEXEC
                | MsFlags::MS_NOATIME
                | MsFlags::MS_NODIRATIME;
            mount(None, "/proc/stat", None, flags);
            agrees(3);
            assert_eq!(by_table().layers[&ViewFile::Stat][0].kind, LayerKind::Cover(None));
            // A mount beside the paths.
            bind("/proc/version", "/proc/version");
            agrees(3);
            let fresh = FileSet::from_iter([ViewFile::Meminfo, ViewFile::Swaps]);
            if let Some(observed) = resolve(Some(fresh), TableLimit::Large) {
                assert_eq!(
                    observed.mounts.layers.into_keys().collect::<Vec<_>>(),
                    [ViewFile::Meminfo]
                );
                assert_eq!(observed.own.into_keys().collect::<Vec<_>>(), [ViewFile::Swaps]);
            }
        });
    }

    #[test]
    fn many_mounts_need_the_table_in_a_pass() {
        in_namespace(|| {
            mount(Some("none"), "/mnt", Some("tmpfs"), MsFlags::empty());
            let text = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let is_normal = text.lines().count() < MANY_MOUNTS && kernel_has_it();
            assert_eq!(resolve(None, TableLimit::Normal).is_some(), is_normal);
            (0..MANY_MOUNTS).for_each(|_| bind("/mnt", "/mnt"));
            assert!(resolve(None, TableLimit::Normal).is_none());
            assert_eq!(resolve(None, TableLimit::Large).is_some(), kernel_has_it());
        });
    }

    #[test]
    fn anything_unusual_needs_the_table() {
        let unusual: [fn(); 6] = [
            || (0..2).for_each(|_| bind("/proc/uptime", "/proc/meminfo")),
            || mount(Some("none"), "/sys/devices/system", Some("tmpfs"), MsFlags::empty()),
            || mount(Some("none"), "/proc", Some("tmpfs"), MsFlags::empty()),
            || mount(None, "/proc", None, MsFlags::MS_SHARED),
            || mount(Some("none"), "/proc/tty/ldisc", Some("tmpfs"), MsFlags::empty()),
            || nix::mount::umount2("/sys", MntFlags::MNT_DETACH).unwrap(),
        ];
        for make in unusual {
            in_namespace(|| {
                make();
                assert!(resolve(None, TableLimit::Large).is_none());
            });
        }
    }
}
