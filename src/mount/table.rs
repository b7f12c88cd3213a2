//! The part of a container's mount table that its view depends on. The rest of the table, which may
//! be of any size, is not kept.

use std::{collections::HashSet, io::Read, sync::LazyLock};

use super::scratch;
use crate::{
    model::view::{BaseFs, ViewFile},
    sys::mountinfo::{self, ReadError},
};

/// The limit of a mount table that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableLimit {
    /// 256 KiB, about 2,000 mounts: enough for almost every container.
    Normal,
    /// 16 MiB, about 100,000 mounts: as many as the kernel allows (`fs.mount-max`).
    Large,
}

impl TableLimit {
    pub fn bytes(self) -> u64 {
        match self {
            TableLimit::Normal => 256 << 10,
            TableLimit::Large => 16 << 20,
        }
    }
}

/// The lines of a mount table that [`super::observe::observe`] depends on, for a container whose
/// root is `root`.
///
/// # Errors
/// Fails if the table cannot be read, or is larger than `limit`.
pub fn read(table: impl Read, root: &[u8], limit: TableLimit) -> Result<Vec<u8>, ReadError> {
    mountinfo::filter_lines(table, limit.bytes(), |line| {
        // A line without a mount point is malformed: the parser reports it.
        mountinfo::mount_point(line).is_none_or(|point| is_relevant(&point, root))
    })
}

/// Whether a path is that of the root, of a base, of a view file or of the scratch mount, or above
/// one of them.
fn is_relevant(point: &[u8], root: &[u8]) -> bool {
    let prefix = root.strip_suffix(b"/").unwrap_or(root);
    match point.strip_prefix(prefix) {
        Some([b'/', below @ ..]) if BELOW_ROOT.contains(below) => true,
        _ => is_at_or_above(point, root),
    }
}

fn is_at_or_above(point: &[u8], path: &[u8]) -> bool {
    let is_above = |rest: &[u8]| rest.first().is_none_or(|b| *b == b'/');
    point == b"/" || (!point.is_empty() && path.strip_prefix(point).is_some_and(is_above))
}

/// The paths that matter below a container's root.
static BELOW_ROOT: LazyLock<HashSet<&[u8]>> = LazyLock::new(|| {
    let bases = BaseFs::ALL.into_iter().map(BaseFs::path);
    let files = ViewFile::ALL.into_iter().map(ViewFile::path);
    let paths = bases.chain(files).chain([scratch::POINT]).map(str::as_bytes);
    let ends = |path: &'static [u8]| {
        let ends = (1..=path.len()).filter(move |n| path.get(*n).is_none_or(|b| *b == b'/'));
        ends.map(move |n| &path[..n])
    };
    paths.flat_map(ends).collect()
});

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{
        mount::observe::observe,
        sys::mountinfo::{Mount, MountTable},
    };

    const POINTS: [&str; 13] = [
        "/",
        "/proc",
        "/sys",
        "/proc/meminfo",
        "/proc/pressure",
        "/proc/pressure/cpu",
        "/sys/devices/system/cpu",
        "/rootfs",
        "/rootfs/proc",
        "/rootfs/proc/stat",
        "/mnt",
        "/proc/acpi",
        "/proc/tty/ldisc",
    ];

    fn is_above(above: &str, path: &str) -> bool {
        path == above || above == "/" || path.starts_with(&format!("{above}/"))
    }

    /// A table as the kernel makes it: each mount lies on one whose mount point is a path above.
    fn tables() -> impl Strategy<Value = String> {
        let mount = (any::<prop::sample::Index>(), 0..POINTS.len(), 0..4usize);
        vec(mount, 0..40).prop_map(|mounts| {
            let mut points = vec!["/"];
            let mut text = String::from("1 0 0:1 / / rw - overlay o rw\n");
            for (parent, point, fstype) in mounts {
                let (point, fstype) =
                    (POINTS[point], ["proc", "sysfs", "fuse.lxcfs", "tmpfs"][fstype]);
                let on = |n: &usize| is_above(points[*n], point);
                let parents: Vec<usize> = (0..points.len()).filter(on).collect();
                let parent = parent.get(&parents) + 1;
                points.push(point);
                let id = points.len();
                let source = String::from_utf8_lossy(scratch::SOURCE);
                let line =
                    format!("{id} {parent} 0:{id} {point} {point} ro - {fstype} {source} o\n");
                text.push_str(&line);
            }
            text
        })
    }

    #[test]
    fn points_are_paths_with_their_ancestors() {
        for point in ["/", "/run", "/run/rootfs", "/run/rootfs/proc/pressure", "/run/rootfs/sys"] {
            assert!(is_relevant(point.as_bytes(), b"/run/rootfs"), "{point}");
        }
        for point in ["", "/proc", "/ru", "/run/rootfs2", "/run/rootfs/proc/x", "/run/rootfsproc"] {
            assert!(!is_relevant(point.as_bytes(), b"/run/rootfs"), "{point}");
        }
        for point in ["/", "/proc", "/proc/tty/ldisc", "/sys/devices"] {
            assert!(is_relevant(point.as_bytes(), b"/"), "{point}");
        }
        assert!(!is_relevant(b"/proc/meminfo/x", b"/") && !is_relevant(b"proc", b"/"));
    }

    #[test]
    fn unrelated_mounts_are_not_kept() {
        let related = "1 0 0:1 / / rw - overlay o rw\n2 1 0:2 / /proc rw - proc p rw\n";
        let others = (3..1500).map(|id| format!("{id} 1 0:3 / /mnt/{id} rw - tmpfs t rw\n"));
        let text = related.to_owned() + &others.collect::<String>();
        let kept = read(text.as_bytes(), b"/", TableLimit::Normal).unwrap();
        assert_eq!(kept, related.as_bytes());
    }

    #[test]
    fn tables_beyond_the_limits_are_refused() {
        let long = format!("1 0 0:1 / /mnt/{} rw - tmpfs t rw\n", "x".repeat(4000)).repeat(100);
        let normal = read(long.as_bytes(), b"/", TableLimit::Normal);
        assert!(matches!(normal, Err(ReadError::TooLong(_))), "{normal:?}");
        assert_eq!(read(long.as_bytes(), b"/", TableLimit::Large).unwrap(), b"");
        let line = |id: usize| format!("{id} 1 0:1 / /proc/meminfo rw - tmpfs t rw\n");
        let stacked: String = (0..2000).map(line).collect();
        let stacked = read(stacked.as_bytes(), b"/", TableLimit::Normal);
        assert!(matches!(stacked, Err(ReadError::TooManyMounts)), "{stacked:?}");
    }

    #[test]
    fn end_of_a_long_line_is_not_needed() {
        let options = "lowerdir=".to_owned() + &"/l:".repeat(30_000);
        let text =
            format!("1 0 0:1 / / rw - overlay o {options}\n2 1 0:2 / /proc rw - proc p rw\n");
        let kept = read(text.as_bytes(), b"/", TableLimit::Normal).unwrap();
        let points: Vec<_> =
            MountTable::parse(&kept).unwrap().mounts().iter().map(|m| m.point.to_vec()).collect();
        assert_eq!(points, [&b"/"[..], b"/proc"]);
        // A mount of a directory whose own path is too long.
        let deep = format!("1 0 0:1 /{} /proc/meminfo rw - tmpfs t rw\n", "x".repeat(70_000));
        let deep = read(deep.as_bytes(), b"/", TableLimit::Normal);
        assert!(matches!(deep, Err(ReadError::TooManyMounts)), "{deep:?}");
    }

    proptest! {
        #[test]
        fn observation_of_the_kept_lines_is_that_of_all(text in tables(), hook in any::<bool>()) {
            let root = if hook { &b"/rootfs"[..] } else { b"/" };
            let kept = read(text.as_bytes(), root, TableLimit::Normal).unwrap();
            let all = MountTable::parse(text.as_bytes()).unwrap();
            let kept = MountTable::parse(&kept).unwrap();
            prop_assert_eq!(observe(&kept, root, |_| false), observe(&all, root, |_| false));
        }

        #[test]
        fn filter_accepts_any_bytes(text in vec(any::<u8>(), 0..400)) {
            let _ = read(&text[..], b"/", TableLimit::Normal);
            let lines = text.split(|b| *b == b'\n');
            lines.for_each(|line| drop(Mount::parse(line)));
        }
    }
}
