//! Observation: which mounts lie on the view files' paths of a container, read from its mount
//! table. Pure: a table in, values out.

use super::scratch;
use crate::{
    model::view::{BaseFs, ViewFile},
    plan::{Layer, LayerKind, MountIdentity, ObservedMounts, UnusableBase},
    sys::{
        MOUNT_ATTR_ATIME, MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOEXEC,
        mountinfo::{Dev, Mount, MountId, MountTable},
    },
};

/// The file system type of an lxcfs mount (libfuse: `fuse.` and the subtype).
pub const LXCFS_FSTYPE: &[u8] = b"fuse.lxcfs";

/// Finds the mounts on the view files' paths below `root`, which is `/` unless the container has
/// not yet changed its root.
///
/// `is_host_peer_group` decides whether a peer group has a member in the host's mount namespace. It
/// is called only where `/proc` or `/sys` is shared, which runtimes do on request only.
pub fn observe(
    table: &MountTable<'_>,
    root: &[u8],
    is_host_peer_group: impl Fn(u64) -> bool,
) -> ObservedMounts {
    let mut observed = ObservedMounts::default();
    let prefix = root.strip_suffix(b"/").unwrap_or(root);
    let Some(root) = table.holder(root) else {
        observed.unusable =
            BaseFs::ALL.into_iter().map(|base| (base, UnusableBase::Missing)).collect();
        return observed;
    };
    for base in BaseFs::ALL {
        let point = [prefix, b"/", base.path().as_bytes()].concat();
        let Some(top) = table.child(root, &point).map(|m| table.topmost(m)) else {
            observed.unusable.insert(base, UnusableBase::Missing);
            continue;
        };
        if *top.fstype != *base.fstype().as_bytes() {
            let found = String::from_utf8_lossy(&top.fstype).into_owned();
            observed.unusable.insert(base, UnusableBase::Fstype(found));
            continue;
        }
        observed.bases.insert(base, MountIdentity { id: top.id, dev: top.dev });
        if let Some(group) = top.shared {
            observed.shared.insert(base);
            if is_host_peer_group(group) {
                observed.unusable.insert(base, UnusableBase::SharedWithHost);
            }
        }
        if base == BaseFs::Procfs {
            observed.scratch = scratch_mounts(table, top, prefix);
        }
        for file in ViewFile::ALL.into_iter().filter(|f| f.base() == base) {
            let point = [prefix, b"/", file.path().as_bytes()].concat();
            if let Some(cover) = directory_cover(table, top, &point) {
                // The path leads into that mount, whose file system may never answer.
                let kind = LayerKind::Unrelated;
                observed.layers.insert(file, vec![Layer { id: cover.id, kind, locked: false }]);
            } else if let Some(lowest) = table.child(top, &point) {
                let mut layers = vec![layer(lowest, file)];
                layers.extend(table.stack(lowest).iter().map(|m| layer(m, file)));
                observed.layers.insert(file, layers);
            }
        }
    }
    observed
}

/// The scratch mounts on top of the others at their place.
fn scratch_mounts(table: &MountTable<'_>, procfs: &Mount<'_>, prefix: &[u8]) -> Vec<MountId> {
    let point = [prefix, b"/", scratch::POINT.as_bytes()].concat();
    if directory_cover(table, procfs, &point).is_some() {
        return Vec::new();
    }
    let Some(lowest) = table.child(procfs, &point) else { return Vec::new() };
    let is_scratch =
        |mount: &&&Mount<'_>| *mount.fstype == *b"tmpfs" && *mount.source == *scratch::SOURCE;
    let stack = table.stack(lowest);
    let above = stack.iter().rev().chain([&lowest]);
    above.take_while(is_scratch).map(|mount| mount.id).collect()
}

/// The mount on a directory between `base` and the path `point` below it, if any. The mounts at
/// `point` itself stay in the table, but no path reaches them.
fn directory_cover<'t>(
    table: &'t MountTable<'t>,
    base: &Mount<'t>,
    point: &[u8],
) -> Option<&'t Mount<'t>> {
    let below_base = base.point.len() + 1..point.len();
    let mut directories = below_base.filter(|n| point[*n] == b'/').map(|n| &point[..n]);
    directories.find_map(|directory| table.child(base, directory))
}

fn layer(mount: &Mount<'_>, file: ViewFile) -> Layer {
    let mark = Mark::of_options(mount.options);
    let kind = kind(&mount.fstype, &mount.root, mount.dev, mark, file);
    Layer { id: mount.id, kind, locked: false }
}

/// The kind of a mount on a view file's path, of this file system type, root and device.
pub(super) fn kind(
    fstype: &[u8],
    root: &[u8],
    dev: Dev,
    mark: Option<Mark>,
    file: ViewFile,
) -> LayerKind {
    match (fstype, mark) {
        (LXCFS_FSTYPE, mark) if is_root_of(root, file.path()) => match mark {
            None => LayerKind::PodProvided(dev),
            Some(Mark::Managed) => LayerKind::Managed(dev),
            Some(Mark::Cover) => LayerKind::Cover(Some(dev)),
        },
        (fstype, Some(Mark::Cover))
            if *fstype == *file.base().fstype().as_bytes()
                && is_root_of(root, file.path_in_base()) =>
        {
            LayerKind::Cover(None)
        }
        _ => LayerKind::Unrelated,
    }
}

/// What the per-mount options show about a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Managed,
    Cover,
}

impl Mark {
    /// Every mount of kube-lxcfs has `noexec`, and all but adopted ones `noatime`. A container with
    /// `CAP_SYS_ADMIN` can remount them with other options: `noexec` without `relatime` is enough.
    /// Pod-provided mounts inherit lxcfs's `nosuid,nodev,relatime`. Only covers have `nodiratime`.
    fn of(noexec: bool, relatime: bool, nodiratime: bool) -> Option<Mark> {
        match noexec && !relatime {
            false => None,
            true if nodiratime => Some(Mark::Cover),
            true => Some(Mark::Managed),
        }
    }

    /// By the options of the mount table.
    fn of_options(options: &[u8]) -> Option<Mark> {
        let has = |option: &[u8]| options.split(|b| *b == b',').any(|o| o == option);
        Mark::of(has(b"noexec"), has(b"relatime"), has(b"nodiratime"))
    }

    /// By the attributes of statmount(2).
    pub(super) fn of_attributes(attributes: u64) -> Option<Mark> {
        let has = |attribute| attributes & attribute != 0;
        let relatime = attributes & MOUNT_ATTR_ATIME == 0;
        Mark::of(has(MOUNT_ATTR_NOEXEC), relatime, has(MOUNT_ATTR_NODIRATIME))
    }
}

/// Whether a mount's root is the view file. The kernel appends `//deleted` when FUSE has forgotten
/// the name.
fn is_root_of(root: &[u8], path: &str) -> bool {
    let root = root.strip_suffix(b"//deleted").unwrap_or(root);
    root.strip_prefix(b"/") == Some(path.as_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const CONTAINER: &str = "\
700 600 0:50 / / rw,relatime - overlay overlay rw,lowerdir=/l
701 700 0:51 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
702 700 0:52 / /sys ro,nosuid,nodev,noexec,relatime - sysfs sysfs ro
703 701 0:40 /proc/meminfo /proc/meminfo ro,nosuid,nodev,noexec,noatime - \
    fuse.lxcfs lxcfs rw,user_id=0,group_id=0,allow_other
704 701 0:40 /proc/uptime /proc/uptime rw,nosuid,nodev,relatime - \
    fuse.lxcfs lxcfs rw,user_id=0,group_id=0,allow_other
705 701 0:53 /null /proc/stat rw,nosuid - tmpfs tmpfs rw
706 702 0:40 /sys/devices/system/cpu//deleted /sys/devices/system/cpu \
    ro,nosuid,nodev,noexec,noatime - fuse.lxcfs lxcfs rw
";
    const LXCFS: Dev = Dev { major: 0, minor: 40 };

    fn observed(text: &str) -> ObservedMounts {
        observe(&MountTable::parse(text.as_bytes()).unwrap(), b"/", |_| false)
    }

    fn layer(id: u64, kind: LayerKind) -> Layer {
        Layer { id: MountId(id), kind, locked: false }
    }

    #[test]
    fn managed_pod_provided_and_unrelated_differ() {
        let observed = observed(CONTAINER);
        assert_eq!(observed.layers[&ViewFile::Meminfo], [layer(703, LayerKind::Managed(LXCFS))]);
        assert_eq!(observed.layers[&ViewFile::Uptime], [layer(704, LayerKind::PodProvided(LXCFS))]);
        assert_eq!(observed.layers[&ViewFile::Stat], [layer(705, LayerKind::Unrelated)]);
        assert_eq!(observed.layers[&ViewFile::Cpu], [layer(706, LayerKind::Managed(LXCFS))]);
        assert_eq!(observed.layers.len(), 4);
        assert!(observed.unusable.is_empty());
        let base = |id, minor| MountIdentity { id: MountId(id), dev: Dev { major: 0, minor } };
        assert_eq!(observed.bases[&BaseFs::Procfs], base(701, 51));
        assert_eq!(observed.bases[&BaseFs::Sysfs], base(702, 52));
    }

    #[test]
    fn options_tell_managed_from_pod_provided() {
        use LayerKind::{Cover, Managed, PodProvided, Unrelated};
        let line = "703 701 0:40 /proc/meminfo /proc/meminfo OPTIONS - fuse.lxcfs lxcfs rw\n";
        let node = "703 701 0:51 /meminfo /proc/meminfo OPTIONS - proc proc rw\n";
        let base = "700 600 0:50 / / rw - overlay o rw\n701 700 0:51 / /proc rw - proc proc rw\n";
        for (line, options, kind) in [
            (line, "ro,nosuid,nodev,noexec,noatime", Managed(LXCFS)),
            // Remounted by the container: read-write, then with another access time mode.
            (line, "rw,nosuid,nodev,noexec,noatime", Managed(LXCFS)),
            (line, "rw,noexec", Managed(LXCFS)),
            (line, "ro,nosuid,nodev,noexec,noatime,nodiratime", Cover(Some(LXCFS))),
            // Adopted, from a webhook's volume, and the same where lxcfs is mounted noatime.
            (line, "ro,nosuid,nodev,noexec,relatime", PodProvided(LXCFS)),
            (line, "rw,nosuid,nodev,relatime", PodProvided(LXCFS)),
            (line, "ro,nosuid,nodev,noatime", PodProvided(LXCFS)),
            (node, "ro,nosuid,nodev,noexec,noatime,nodiratime", Cover(None)),
            (node, "ro,nosuid,nodev,noexec,noatime", Unrelated),
        ] {
            let text = base.to_owned() + &line.replace("OPTIONS", options);
            let layers = &observed(&text).layers[&ViewFile::Meminfo];
            assert_eq!(layers, &[layer(703, kind)], "{options}");
        }
    }

    #[test]
    fn stacks_are_bottom_first_in_any_line_order() {
        // MOVE_MOUNT_BENEATH: the newer mount (710) lies below the older one (703).
        let text = CONTAINER.replace("703 701", "703 710")
            + "710 701 0:41 /proc/meminfo /proc/meminfo ro,nosuid,nodev,noexec,noatime - \
               fuse.lxcfs lxcfs rw\n";
        let layers = &observed(&text).layers[&ViewFile::Meminfo];
        assert_eq!(layers.iter().map(|l| l.id.0).collect::<Vec<_>>(), [710, 703]);
    }

    #[test]
    fn covered_proc_hides_the_views_below_it() {
        let observed =
            observed(&(CONTAINER.to_owned() + "711 701 0:60 / /proc rw - tmpfs none rw\n"));
        assert_eq!(observed.unusable[&BaseFs::Procfs], UnusableBase::Fstype("tmpfs".into()));
        assert_eq!(observed.layers.keys().copied().collect::<Vec<_>>(), [ViewFile::Cpu]);
    }

    #[test]
    fn covered_directory_hides_the_view_below_it() {
        for (point, file) in [
            ("/sys/devices", ViewFile::Cpu),
            ("/sys/devices/system", ViewFile::Cpu),
            ("/proc/pressure", ViewFile::PressureCpu),
        ] {
            let parent = if file == ViewFile::Cpu { 702 } else { 701 };
            // With the root and the options of a view, too.
            let cover = format!(
                "711 {parent} 0:60 /{} {point} ro,nosuid,nodev,noexec,noatime - \
                 fuse.lxcfs lxcfs rw\n",
                file.path()
            );
            let observed = observed(&(CONTAINER.to_owned() + &cover));
            assert_eq!(observed.layers[&file], [layer(711, LayerKind::Unrelated)], "{point}");
            assert!(observed.views().all(|(view, _)| view != file), "{point}");
            assert_eq!(observed.layers[&ViewFile::Meminfo].len(), 1);
        }
        let beside = "711 702 0:60 / /sys/dev rw - tmpfs none rw\n";
        assert_eq!(observed(&(CONTAINER.to_owned() + beside)), observed(CONTAINER));
    }

    #[test]
    fn scratch_mounts_are_found_by_source_topmost_first() {
        let at = |id, parent, point: &str, source: &str| {
            format!("{id} {parent} 0:61 / {point} ro,nosuid - tmpfs {source} ro,mode=700\n")
        };
        let point = "/proc/tty/ldisc";
        let lower = at(712, 701, point, "kube-lxcfs-scratch");
        let upper = at(713, 712, point, "kube-lxcfs-scratch");
        let other = at(714, 713, point, "tmpfs");
        let cover = at(715, 701, "/proc/tty", "kube-lxcfs-scratch");
        let scratch = |lines: &[&String]| {
            let lines: String = lines.iter().map(|line| line.as_str()).collect();
            observed(&(CONTAINER.to_owned() + &lines)).scratch
        };
        assert_eq!(scratch(&[&lower]), [MountId(712)]);
        assert_eq!(scratch(&[&lower, &upper]), [MountId(713), MountId(712)]);
        assert_eq!(scratch(&[&lower, &upper, &other]), []);
        assert_eq!(scratch(&[&lower, &cover]), [], "no path leads to it");
        assert_eq!(scratch(&[&at(712, 701, point, "tmpfs")]), []);
    }

    #[test]
    fn missing_proc_or_root_is_unusable() {
        let without_proc = observed("700 600 0:50 / / rw - overlay o rw\n");
        assert_eq!(without_proc.unusable[&BaseFs::Procfs], UnusableBase::Missing);
        assert_eq!(observed("").unusable.len(), 2);
    }

    #[test]
    fn proc_shared_with_the_host_is_unusable() {
        let text = CONTAINER.replace("relatime - proc", "relatime shared:7 master:3 - proc");
        let table = MountTable::parse(text.as_bytes()).unwrap();
        let shared = observe(&table, b"/", |group| group == 7);
        assert_eq!(shared.unusable[&BaseFs::Procfs], UnusableBase::SharedWithHost);
        assert_eq!(shared.shared, [BaseFs::Procfs].into());
        assert!(observe(&table, b"/", |group| [3, 8].contains(&group)).unusable.is_empty());
    }

    proptest! {
        #[test]
        fn malformed_tables_and_trees_never_panic(
            text in vec(any::<u8>(), 0..200),
            tree in vec((0u64..6, 0u64..6, 0usize..5), 0..8),
        ) {
            let read = |table: &MountTable<'_>| {
                let _ = (observe(table, b"/", |_| false), table.top(b"/proc").is_some());
            };
            let _ = MountTable::parse(&text).map(|table| read(&table));
            let points = ["/", "/proc", "/sys", "/proc/meminfo", "/sys/devices/system/cpu"];
            let line = |(id, parent, p): &(u64, u64, usize)| {
                format!("{id} {parent} 0:1 / {} rw - proc s o\n", points[*p])
            };
            let lines: String = tree.iter().map(line).collect();
            read(&MountTable::parse(lines.as_bytes()).unwrap());
        }
    }
}
