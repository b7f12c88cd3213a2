//! The mount table: parses `/proc/PID/mountinfo` (proc_pid_mountinfo(5)) and reads from it what is on the view files'
//! paths. Pure: bytes in, values out.

use std::{borrow::Cow, collections::HashSet, str::FromStr};

use crate::{
    plan::{Dev, Kind, Layer, There, Unusable},
    view::{Base, ViewFile},
};

/// The file system type of an lxcfs mount (libfuse: `fuse.` and the subtype).
pub const LXCFS_FSTYPE: &[u8] = b"fuse.lxcfs";

/// The per-mount options that only our mounts have together: the four of the contract, and `noatime`, which nothing else
/// gives to an lxcfs file. Mounts that came with a pod inherit lxcfs's own `nosuid,nodev,relatime`.
const VIEW_OPTIONS: [&[u8]; 5] = [b"ro", b"nosuid", b"nodev", b"noexec", b"noatime"];

/// One line of the table. Paths are as the kernel means them, without its escapes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount<'a> {
    pub id: u64,
    pub parent: u64,
    pub dev: Dev,
    /// The path within its file system that is the root of this mount.
    pub root: Cow<'a, [u8]>,
    /// Where it is, relative to the reader's root.
    pub point: Cow<'a, [u8]>,
    /// Per-mount options, comma-separated.
    pub options: &'a [u8],
    /// The peer group that mounts below it propagate to.
    pub shared: Option<u64>,
    pub fstype: Cow<'a, [u8]>,
}

/// A line that no kernel writes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the mount table is malformed")]
pub struct Malformed {
    pub line: usize,
}

/// A parsed mount table, in the kernel's order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table<'a>(pub Vec<Mount<'a>>);

impl<'a> Table<'a> {
    /// # Errors
    /// The first line that is not of the form in proc_pid_mountinfo(5).
    pub fn parse(text: &'a [u8]) -> Result<Self, Malformed> {
        let lines = text.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        let parsed = lines.enumerate().map(|(i, line)| parse_line(line).ok_or(Malformed { line: i + 1 }));
        parsed.collect::<Result<_, _>>().map(Table)
    }

    /// The topmost mount at an absolute path, if one is exactly there and reachable.
    pub fn top(&self, path: &[u8]) -> Option<&Mount<'a>> {
        let root = self.root()?;
        if path == b"/" {
            return Some(root);
        }
        // The lowest mount at the path is a child of some mount that itself can be reached; of several the last made wins.
        let lowest = self.0.iter().rev().find(|m| *m.point == *path && !self.stacked(m) && self.reachable(m, root));
        Some(self.stack(lowest?).last().copied().unwrap_or(lowest?))
    }

    /// What is on the view files' paths below `root`, which is `/` but for a container that has not yet changed its root. `of_host`
    /// tells whether a peer group has a member in the host's mount namespace; it is asked only where `/proc` or `/sys` is
    /// shared, which no runtime does unless told to.
    pub fn there(&self, root: &[u8], of_host: impl Fn(u64) -> bool) -> There {
        let mut there = There::default();
        let prefix = root.strip_suffix(b"/").unwrap_or(root);
        let Some(root) = self.holder(root) else {
            there.unusable = Base::ALL.into_iter().map(|base| (base, Unusable::Missing)).collect();
            return there;
        };
        for base in Base::ALL {
            let point = [prefix, b"/", base.path().as_bytes()].concat();
            let Some(top) = self.child(root, &point).map(|m| self.stack(m).last().copied().unwrap_or(m)) else {
                there.unusable.insert(base, Unusable::Missing);
                continue;
            };
            if *top.fstype != *base.fstype().as_bytes() {
                let found = String::from_utf8_lossy(&top.fstype).into_owned();
                there.unusable.insert(base, Unusable::Fstype(found));
                continue;
            }
            if top.shared.is_some_and(&of_host) {
                there.unusable.insert(base, Unusable::SharedWithHost);
            }
            for file in ViewFile::ALL.into_iter().filter(|f| f.base() == base) {
                let point = [prefix, b"/", file.path().as_bytes()].concat();
                if let Some(lowest) = self.child(top, &point) {
                    let mut layers = vec![layer(lowest, file)];
                    layers.extend(self.stack(lowest).iter().map(|m| layer(m, file)));
                    there.layers.insert(file, layers);
                }
            }
        }
        there
    }

    /// The topmost mount that `path` is on.
    fn holder(&self, path: &[u8]) -> Option<&Mount<'a>> {
        let mut at = path;
        loop {
            if let Some(mount) = self.top(if at.is_empty() { b"/" } else { at }) {
                return Some(mount);
            }
            at = &at[..at.iter().rposition(|b| *b == b'/')?];
        }
    }

    /// The topmost mount at `/`.
    fn root(&self) -> Option<&Mount<'a>> {
        let ids: HashSet<u64> = self.0.iter().filter(|m| *m.point == *b"/").map(|m| m.id).collect();
        let lowest = self.0.iter().find(|m| *m.point == *b"/" && (m.parent == m.id || !ids.contains(&m.parent)))?;
        Some(self.stack(lowest).last().copied().unwrap_or(lowest))
    }

    /// The mount at `point` whose parent is `parent`. There is at most one that is not stacked on another.
    fn child(&self, parent: &Mount<'a>, point: &[u8]) -> Option<&Mount<'a>> {
        self.0.iter().find(|m| m.parent == parent.id && m.id != parent.id && *m.point == *point)
    }

    /// The mounts that lie on `lowest`'s own root, bottom first.
    fn stack(&self, lowest: &Mount<'a>) -> Vec<&Mount<'a>> {
        let mut above = Vec::new();
        let mut top = lowest;
        while let Some(next) = self.child(top, &top.point) {
            // A table of distinct ids cannot have a cycle; rubbish can.
            if above.len() > self.0.len() {
                break;
            }
            above.push(next);
            top = next;
        }
        above
    }

    fn by_id(&self, id: u64) -> Option<&Mount<'a>> {
        self.0.iter().find(|m| m.id == id)
    }

    fn stacked(&self, mount: &Mount<'a>) -> bool {
        mount.parent != mount.id && self.by_id(mount.parent).is_some_and(|parent| parent.point == mount.point)
    }

    /// Whether every mount above `mount` on the way to the root is the topmost at its place.
    fn reachable(&self, mount: &Mount<'a>, root: &Mount<'a>) -> bool {
        let mut at = mount;
        for _ in 0..=self.0.len() {
            let Some(parent) = self.by_id(at.parent) else { return false };
            if self.child(parent, &parent.point).is_some_and(|cover| cover.id != at.id) {
                return false;
            }
            if parent.id == root.id {
                return true;
            }
            at = parent;
        }
        false
    }
}

fn layer(mount: &Mount<'_>, file: ViewFile) -> Layer {
    let kind = if *mount.fstype == *LXCFS_FSTYPE && is_root_of(&mount.root, file) {
        let has = |option: &[u8]| mount.options.split(|b| *b == b',').any(|o| o == option);
        if VIEW_OPTIONS.into_iter().all(has) { Kind::View(mount.dev) } else { Kind::Foreign(mount.dev) }
    } else {
        Kind::Other
    };
    Layer { id: mount.id, kind }
}

/// Whether a mount's root is the view file. The kernel appends `//deleted` when FUSE has forgotten the name meanwhile.
fn is_root_of(root: &[u8], file: ViewFile) -> bool {
    let root = root.strip_suffix(b"//deleted").unwrap_or(root);
    root.strip_prefix(b"/") == Some(file.path().as_bytes())
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &[u8]) -> Option<Mount<'_>> {
    let mut fields = line.split(|b| *b == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let dev = std::str::from_utf8(fields.next()?).ok()?;
    let (major, minor) = dev.split_once(':')?;
    let dev = Dev { major: major.parse().ok()?, minor: minor.parse().ok()? };
    let root = unescape(fields.next()?);
    let point = unescape(fields.next()?);
    let options = fields.next()?;
    let mut shared = None;
    // Optional fields, unknown ones too, end with a lone hyphen.
    loop {
        match fields.next()? {
            b"-" => break,
            field => {
                if let Some(group) = field.strip_prefix(b"shared:") {
                    shared = Some(number(group)?);
                }
            }
        }
    }
    let fstype = unescape(fields.next()?);
    fields.next()?; // The source; the super options that follow it are of no use here.
    Some(Mount { id, parent, dev, root, point, options, shared, fstype })
}

fn number<T: FromStr>(field: &[u8]) -> Option<T> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Undoes the kernel's `\ooo` (three octal digits, one byte). It so writes space, tab, newline, backslash and, in types and
/// sources, `#`; every other byte stands for itself, valid UTF-8 or not (fs/proc_namespace.c, fs/seq_file.c).
fn unescape(field: &[u8]) -> Cow<'_, [u8]> {
    if !field.contains(&b'\\') {
        return Cow::Borrowed(field);
    }
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    Cow::Owned(plain)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONTAINER: &str = "\
700 600 0:50 / / rw,relatime - overlay overlay rw,lowerdir=/l
701 700 0:51 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
702 700 0:52 / /sys ro,nosuid,nodev,noexec,relatime - sysfs sysfs ro
703 701 0:40 /proc/meminfo /proc/meminfo ro,nosuid,nodev,noexec,noatime - fuse.lxcfs lxcfs rw,user_id=0,group_id=0,allow_other
704 701 0:40 /proc/uptime /proc/uptime rw,nosuid,nodev,relatime - fuse.lxcfs lxcfs rw,user_id=0,group_id=0,allow_other
705 701 0:53 /null /proc/stat rw,nosuid - tmpfs tmpfs rw
706 702 0:40 /sys/devices/system/cpu//deleted /sys/devices/system/cpu ro,nosuid,nodev,noexec,noatime - fuse.lxcfs lxcfs rw
";
    const LXCFS: Dev = Dev { major: 0, minor: 40 };

    fn there(text: &str) -> There {
        Table::parse(text.as_bytes()).unwrap().there(b"/", |_| false)
    }

    #[test]
    fn view_files_foreign_ones_and_others_are_told_apart() {
        let there = there(CONTAINER);
        assert_eq!(there.layers[&ViewFile::Meminfo], [Layer { id: 703, kind: Kind::View(LXCFS) }]);
        assert_eq!(there.layers[&ViewFile::Uptime], [Layer { id: 704, kind: Kind::Foreign(LXCFS) }]);
        assert_eq!(there.layers[&ViewFile::Stat], [Layer { id: 705, kind: Kind::Other }]);
        assert_eq!(there.layers[&ViewFile::Cpu], [Layer { id: 706, kind: Kind::View(LXCFS) }]);
        assert_eq!(there.layers.len(), 4);
        assert!(there.unusable.is_empty());
    }

    #[test]
    fn stacks_are_told_bottom_first_whatever_the_order_of_the_lines() {
        // MOVE_MOUNT_BENEATH: the newer mount (710) lies below the older one (703).
        let text = CONTAINER.replace("703 701", "703 710")
            + "710 701 0:41 /proc/meminfo /proc/meminfo ro,nosuid,nodev,noexec,noatime - fuse.lxcfs lxcfs rw\n";
        let layers = &there(&text).layers[&ViewFile::Meminfo];
        assert_eq!(layers.iter().map(|l| l.id).collect::<Vec<_>>(), [710, 703]);
    }

    #[test]
    fn a_covered_proc_hides_the_views_below_it() {
        let there = there(&(CONTAINER.to_owned() + "711 701 0:60 / /proc rw - tmpfs none rw\n"));
        assert_eq!(there.unusable[&Base::Proc], Unusable::Fstype("tmpfs".into()));
        assert_eq!(there.layers.keys().copied().collect::<Vec<_>>(), [ViewFile::Cpu]);
    }

    #[test]
    fn no_proc_and_no_root_are_unusable() {
        assert_eq!(there("700 600 0:50 / / rw - overlay o rw\n").unusable[&Base::Proc], Unusable::Missing);
        assert_eq!(there("").unusable.len(), 2);
    }

    #[test]
    fn a_proc_that_shares_with_the_host_is_unusable() {
        let text = CONTAINER.replace("relatime - proc", "relatime shared:7 master:3 - proc");
        let table = Table::parse(text.as_bytes()).unwrap();
        assert_eq!(table.there(b"/", |group| group == 7).unusable[&Base::Proc], Unusable::SharedWithHost);
        assert!(table.there(b"/", |group| [3, 8].contains(&group)).unusable.is_empty());
    }

    #[test]
    fn the_topmost_mount_at_a_path_is_found_and_a_covered_one_is_not() {
        let text =
            "1 0 8:1 / / rw - ext4 r rw\n2 1 0:9 / /a rw - tmpfs t rw\n3 2 0:40 / /a/lxcfs rw - fuse.lxcfs lxcfs rw\n";
        let id = |text: &str, path: &str| Table::parse(text.as_bytes()).unwrap().top(path.as_bytes()).map(|m| m.id);
        assert_eq!(id(text, "/a/lxcfs"), Some(3));
        assert_eq!(id(text, "/"), Some(1));
        assert_eq!(id(text, "/a/other"), None);
        assert_eq!(id(&(text.to_owned() + "4 3 0:41 / /a/lxcfs rw - fuse.lxcfs lxcfs rw\n"), "/a/lxcfs"), Some(4));
        assert_eq!(id(&(text.to_owned() + "4 2 0:41 / /a rw - tmpfs t rw\n"), "/a/lxcfs"), None);
    }

    #[test]
    fn every_escape_of_the_kernel_is_undone_and_lookalikes_stay() {
        let line = b"1 0 0:1 / /a\\040b\\011c\\012d\\134e\\043f\xff\\9\\04 rw - fuse.\\134\\040 none rw";
        let table = Table::parse(line).unwrap();
        assert_eq!(*table.0[0].point, *b"/a b\tc\nd\\e#f\xff\\9\\04");
        assert_eq!(*table.0[0].fstype, *b"fuse.\\ ");
    }

    #[test]
    fn a_malformed_line_is_an_error_that_names_it() {
        for bad in [
            "1",
            "x 0 0:1 / / rw - t s o",
            "1 0 01 / / rw - t s o",
            "1 0 0:1 / / rw t s o",
            "1 0 0:1 / / rw shared:x - t s o",
        ] {
            assert_eq!(
                Table::parse(format!("1 0 0:1 / / rw - t s o\n{bad}\n").as_bytes()),
                Err(Malformed { line: 2 }),
                "{bad}"
            );
        }
    }

    #[test]
    fn this_machines_own_table_parses() {
        let text = std::fs::read("/proc/self/mountinfo").unwrap();
        let table = Table::parse(&text).unwrap();
        assert!(table.top(b"/").is_some());
        assert_eq!(*table.top(b"/proc").unwrap().fstype, *b"proc");
    }

    fn escaped(path: &[u8]) -> Vec<u8> {
        let escape = |b: &u8| match b {
            b' ' | b'\t' | b'\n' | b'\\' | b'#' => format!("\\{b:03o}").into_bytes(),
            b => vec![*b],
        };
        path.iter().flat_map(escape).collect()
    }

    proptest! {
        #[test]
        fn any_path_survives_the_kernels_escaping(path in proptest::collection::vec(1u8.., 0..40)) {
            let line = [b"1 0 0:1 / ".as_slice(), &escaped(&path), b" rw - t s o"].concat();
            let table = Table::parse(&line).unwrap();
            prop_assert_eq!(&*table.0[0].point, &path[..]);
        }

        #[test]
        fn rubbish_and_odd_trees_never_panic(
            text in proptest::collection::vec(any::<u8>(), 0..200),
            tree in proptest::collection::vec((0u64..6, 0u64..6, 0usize..5), 0..8),
        ) {
            let _ = Table::parse(&text).map(|t| (t.there(b"/", |_| false), t.top(b"/proc").is_some()));
            let points = ["/", "/proc", "/sys", "/proc/meminfo", "/sys/devices/system/cpu"];
            let lines: String = tree.iter().map(|(id, parent, p)| format!("{id} {parent} 0:1 / {} rw - proc s o\n", points[*p])).collect();
            let table = Table::parse(lines.as_bytes()).unwrap();
            let _ = (table.there(b"/", |_| false), table.top(b"/proc").is_some());
        }
    }
}
