//! Mount tables: parses `/proc/PID/mountinfo` (proc_pid_mountinfo(5)) and finds mounts by path.
//! Pure: bytes in, values out.

use std::{borrow::Cow, collections::HashSet, fmt, str::FromStr};

/// The device number of a mount's file system (`st_dev`). It identifies one lxcfs: after a restart
/// the number differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dev {
    pub major: u32,
    pub minor: u32,
}

impl fmt::Display for Dev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The id of a mount (field 1 of mountinfo, `stx_mnt_id` of statx(2)). The kernel reuses it when
/// the mount is detached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MountId(pub u64);

impl fmt::Display for MountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One line of the table. Paths are unescaped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount<'a> {
    pub id: MountId,
    pub parent: MountId,
    pub dev: Dev,
    /// The path within its file system that is the root of this mount.
    pub root: Cow<'a, [u8]>,
    /// The mount point, relative to the reader's root.
    pub point: Cow<'a, [u8]>,
    /// Per-mount options, comma-separated.
    pub options: &'a [u8],
    /// The peer group that mounts below it propagate to.
    pub shared: Option<u64>,
    pub fstype: Cow<'a, [u8]>,
}

/// A line that does not follow proc_pid_mountinfo(5).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the mount table is malformed")]
pub struct Malformed {
    pub line: usize,
}

/// A parsed mount table, in the kernel's order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountTable<'a>(pub Vec<Mount<'a>>);

impl<'a> MountTable<'a> {
    /// # Errors
    /// The first line that does not follow proc_pid_mountinfo(5).
    pub fn parse(text: &'a [u8]) -> Result<Self, Malformed> {
        let lines = text.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        let parsed =
            lines.enumerate().map(|(i, line)| parse_line(line).ok_or(Malformed { line: i + 1 }));
        parsed.collect::<Result<_, _>>().map(MountTable)
    }

    /// The topmost mount at an absolute path, if one is exactly there and reachable.
    pub fn top(&self, path: &[u8]) -> Option<&Mount<'a>> {
        let root = self.root()?;
        if path == b"/" {
            return Some(root);
        }
        // The lowest mount at the path is a child of some mount that itself can be reached; of
        // several the last made wins.
        let lowest = self
            .0
            .iter()
            .rev()
            .find(|m| *m.point == *path && !self.is_stacked(m) && self.reachable(m, root));
        Some(self.topmost(lowest?))
    }

    /// The topmost mount that `path` lies on.
    pub fn holder(&self, path: &[u8]) -> Option<&Mount<'a>> {
        let mut at = path;
        loop {
            if let Some(mount) = self.top(if at.is_empty() { b"/" } else { at }) {
                return Some(mount);
            }
            at = &at[..at.iter().rposition(|b| *b == b'/')?];
        }
    }

    /// The mount at `point` whose parent is `parent`. There is at most one that is not stacked on
    /// another.
    pub fn child(&self, parent: &Mount<'a>, point: &[u8]) -> Option<&Mount<'a>> {
        self.0.iter().find(|m| m.parent == parent.id && m.id != parent.id && *m.point == *point)
    }

    /// The mounts stacked on `lowest`'s own root, bottom first.
    pub fn stack(&self, lowest: &Mount<'a>) -> Vec<&Mount<'a>> {
        let mut above = Vec::new();
        let mut top = lowest;
        while let Some(next) = self.child(top, &top.point) {
            // A table of distinct ids cannot have a cycle; malformed input can.
            if above.len() > self.0.len() {
                break;
            }
            above.push(next);
            top = next;
        }
        above
    }

    /// The last of the mounts stacked on `lowest`, or `lowest` itself.
    pub fn topmost<'s>(&'s self, lowest: &'s Mount<'a>) -> &'s Mount<'a> {
        self.stack(lowest).last().copied().unwrap_or(lowest)
    }

    /// The topmost mount at `/`.
    fn root(&self) -> Option<&Mount<'a>> {
        let ids: HashSet<MountId> =
            self.0.iter().filter(|m| *m.point == *b"/").map(|m| m.id).collect();
        let lowest = self
            .0
            .iter()
            .find(|m| *m.point == *b"/" && (m.parent == m.id || !ids.contains(&m.parent)))?;
        Some(self.topmost(lowest))
    }

    fn by_id(&self, id: MountId) -> Option<&Mount<'a>> {
        self.0.iter().find(|m| m.id == id)
    }

    fn is_stacked(&self, mount: &Mount<'a>) -> bool {
        mount.parent != mount.id
            && self.by_id(mount.parent).is_some_and(|parent| parent.point == mount.point)
    }

    /// Whether every mount from `mount` up to the root is the topmost at its mount point.
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

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &[u8]) -> Option<Mount<'_>> {
    let mut fields = line.split(|b| *b == b' ');
    let id = MountId(number(fields.next()?)?);
    let parent = MountId(number(fields.next()?)?);
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
    fields.next()?; // The source; the super options after it are not used.
    Some(Mount { id, parent, dev, root, point, options, shared, fstype })
}

fn number<T: FromStr>(field: &[u8]) -> Option<T> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Undoes the kernel's `\ooo` (three octal digits, one byte). The kernel so writes space, tab,
/// newline, backslash and, in types and sources, `#`. Every other byte stands for itself, valid
/// UTF-8 or not (fs/proc_namespace.c, fs/seq_file.c).
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

    #[test]
    fn topmost_mount_is_found_and_covered_one_is_not() {
        let text = "1 0 8:1 / / rw - ext4 r rw\n\
                    2 1 0:9 / /a rw - tmpfs t rw\n\
                    3 2 0:40 / /a/lxcfs rw - fuse.lxcfs lxcfs rw\n";
        let id = |text: &str, path: &str| {
            MountTable::parse(text.as_bytes()).unwrap().top(path.as_bytes()).map(|m| m.id.0)
        };
        assert_eq!(id(text, "/a/lxcfs"), Some(3));
        assert_eq!(id(text, "/"), Some(1));
        assert_eq!(id(text, "/a/other"), None);
        assert_eq!(
            id(&(text.to_owned() + "4 3 0:41 / /a/lxcfs rw - fuse.lxcfs lxcfs rw\n"), "/a/lxcfs"),
            Some(4)
        );
        assert_eq!(id(&(text.to_owned() + "4 2 0:41 / /a rw - tmpfs t rw\n"), "/a/lxcfs"), None);
    }

    #[test]
    fn escapes_are_undone_and_lookalikes_stay() {
        let line =
            b"1 0 0:1 / /a\\040b\\011c\\012d\\134e\\043f\xff\\9\\04 rw - fuse.\\134\\040 none rw";
        let table = MountTable::parse(line).unwrap();
        assert_eq!(*table.0[0].point, *b"/a b\tc\nd\\e#f\xff\\9\\04");
        assert_eq!(*table.0[0].fstype, *b"fuse.\\ ");
    }

    #[test]
    fn malformed_line_is_named_in_the_error() {
        for bad in [
            "1",
            "x 0 0:1 / / rw - t s o",
            "1 0 01 / / rw - t s o",
            "1 0 0:1 / / rw t s o",
            "1 0 0:1 / / rw shared:x - t s o",
        ] {
            assert_eq!(
                MountTable::parse(format!("1 0 0:1 / / rw - t s o\n{bad}\n").as_bytes()),
                Err(Malformed { line: 2 }),
                "{bad}"
            );
        }
    }

    #[test]
    fn own_mount_table_parses() {
        let text = std::fs::read("/proc/self/mountinfo").unwrap();
        let table = MountTable::parse(&text).unwrap();
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
        fn any_path_survives_escaping(path in proptest::collection::vec(1u8.., 0..40)) {
            let line = [b"1 0 0:1 / ".as_slice(), &escaped(&path), b" rw - t s o"].concat();
            let table = MountTable::parse(&line).unwrap();
            prop_assert_eq!(&*table.0[0].point, &path[..]);
        }

        #[test]
        fn parser_never_panics(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = MountTable::parse(&text).map(|t| t.top(b"/proc").is_some());
        }
    }
}
