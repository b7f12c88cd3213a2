//! Mount tables: parses `/proc/PID/mountinfo` (proc_pid_mountinfo(5)) and finds mounts by path.
//! Pure: bytes in, values out. A table can be large, so every search is linear in it.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    fmt,
    io::{self, BufRead, BufReader, Read},
    str::FromStr,
};

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
    pub source: Cow<'a, [u8]>,
    /// Options of the file system, comma-separated. Empty if the line is cut.
    pub super_options: &'a [u8],
}

/// A line that does not follow proc_pid_mountinfo(5).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the mount table is malformed")]
pub struct Malformed {
    pub line: usize,
}

/// A parsed mount table, in the kernel's order, indexed by id and by parent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountTable<'a> {
    mounts: Vec<Mount<'a>>,
    /// The place of each mount in `mounts`. Ids are distinct in a table of the kernel.
    by_id: HashMap<MountId, usize>,
    children: HashMap<MountId, Vec<usize>>,
}

impl<'a> MountTable<'a> {
    /// # Errors
    /// The first line that does not follow proc_pid_mountinfo(5).
    pub fn parse(text: &'a [u8]) -> Result<Self, Malformed> {
        let lines = text.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        let parsed =
            lines.enumerate().map(|(i, line)| Mount::parse(line).ok_or(Malformed { line: i + 1 }));
        parsed.collect::<Result<_, _>>().map(MountTable::index)
    }

    fn index(mounts: Vec<Mount<'a>>) -> Self {
        let mut by_id = HashMap::with_capacity(mounts.len());
        let mut children: HashMap<MountId, Vec<usize>> = HashMap::new();
        for (n, mount) in mounts.iter().enumerate() {
            by_id.entry(mount.id).or_insert(n);
            if mount.parent != mount.id {
                children.entry(mount.parent).or_default().push(n);
            }
        }
        MountTable { mounts, by_id, children }
    }

    /// All mounts, in the kernel's order.
    pub fn mounts(&self) -> &[Mount<'a>] {
        &self.mounts
    }

    /// The topmost mount at an absolute path, if one is exactly there and reachable.
    pub fn top(&self, path: &[u8]) -> Option<&Mount<'a>> {
        let root = self.root()?;
        if path == b"/" {
            return Some(root);
        }
        let reachable = self.reachable(root);
        // The lowest mount at the path is a child of some mount that itself can be reached; of
        // several the last made wins.
        let lowest = self
            .mounts
            .iter()
            .rev()
            .find(|m| *m.point == *path && !self.is_stacked(m) && reachable.contains(&m.id));
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
        self.children(parent).find(|m| *m.point == *point)
    }

    fn children(&self, parent: &Mount<'a>) -> impl Iterator<Item = &Mount<'a>> {
        self.children.get(&parent.id).into_iter().flatten().map(|n| &self.mounts[*n])
    }

    /// The mounts stacked on `lowest`'s own root, bottom first.
    pub fn stack(&self, lowest: &Mount<'a>) -> Vec<&Mount<'a>> {
        let mut above = Vec::new();
        let mut top = lowest;
        while let Some(next) = self.child(top, &top.point) {
            // A table of distinct ids cannot have a cycle; malformed input can.
            if above.len() > self.mounts.len() {
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
            self.mounts.iter().filter(|m| *m.point == *b"/").map(|m| m.id).collect();
        let lowest = self
            .mounts
            .iter()
            .find(|m| *m.point == *b"/" && (m.parent == m.id || !ids.contains(&m.parent)))?;
        Some(self.topmost(lowest))
    }

    /// The mount with this id.
    pub fn by_id(&self, id: MountId) -> Option<&Mount<'a>> {
        self.by_id.get(&id).map(|n| &self.mounts[*n])
    }

    fn is_stacked(&self, mount: &Mount<'a>) -> bool {
        mount.parent != mount.id
            && self.by_id(mount.parent).is_some_and(|parent| parent.point == mount.point)
    }

    /// The mounts below `root` for which every mount up to it is the topmost at its mount point.
    fn reachable(&self, root: &Mount<'a>) -> HashSet<MountId> {
        let mut reachable = HashSet::new();
        let mut parents = vec![root];
        while let Some(parent) = parents.pop() {
            let cover = self.child(parent, &parent.point);
            let below = self.children(parent).filter(|m| cover.is_none_or(|c| c.id == m.id));
            parents.extend(below.filter(|m| reachable.insert(m.id)));
        }
        reachable
    }
}

/// The limits of what [`filter_lines`] keeps. The paths that matter hold a handful of mounts.
const MAX_KEPT_LINES: usize = 1024;
const MAX_KEPT_BYTES: usize = 256 << 10;
/// The limit of one line, in bytes. What follows in a longer one is not read: the super options.
const MAX_LINE: u64 = 64 << 10;

/// The reason why a mount table was not read to its end.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("mount table too large: more than {0} bytes")]
    TooLong(u64),
    #[error("mount table too large: too many mounts, or too long ones, on the paths of view files")]
    TooManyMounts,
}

/// Reads the lines of a mount table that `keep` accepts, in bounded memory for any size of the
/// table. [`MountTable::parse`] parses the result.
///
/// A long line reaches `keep` without its end.
///
/// # Errors
/// Fails if the table has more than `max_bytes`, or too many of its lines are accepted.
pub fn filter_lines(
    table: impl Read,
    max_bytes: u64,
    keep: impl Fn(&[u8]) -> bool,
) -> Result<Vec<u8>, ReadError> {
    let mut table = BufReader::new(table.take(max_bytes.saturating_add(1)));
    let (mut kept, mut lines, mut read) = (Vec::new(), 0, 0);
    let mut line = Vec::new();
    loop {
        line.clear();
        read += (&mut table).take(MAX_LINE).read_until(b'\n', &mut line)?;
        let whole = line.ends_with(b"\n");
        if !whole {
            read += table.skip_until(b'\n')?;
        }
        if read as u64 > max_bytes {
            return Err(ReadError::TooLong(max_bytes));
        }
        if line.is_empty() {
            return Ok(kept);
        }
        if !keep(&line) {
            continue;
        }
        lines += 1;
        let unparsable = !whole && line.len() as u64 == MAX_LINE && Mount::parse(&line).is_none();
        if unparsable || lines > MAX_KEPT_LINES || kept.len() + line.len() > MAX_KEPT_BYTES {
            return Err(ReadError::TooManyMounts);
        }
        kept.extend_from_slice(&line);
        if !whole {
            kept.push(b'\n');
        }
    }
}

/// The mount point of a line, unescaped; `None` if the line does not reach beyond it.
pub fn mount_point(line: &[u8]) -> Option<Cow<'_, [u8]>> {
    let mut fields = line.split(|b| *b == b' ');
    let point = fields.nth(4)?;
    fields.next()?;
    Some(unescape(point))
}

impl<'a> Mount<'a> {
    /// Parses one line:
    /// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
    pub fn parse(line: &'a [u8]) -> Option<Self> {
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
        let source = unescape(fields.next()?);
        let super_options = fields.next().unwrap_or_default();
        Some(Mount { id, parent, dev, root, point, options, shared, fstype, source, super_options })
    }
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
        assert_eq!(*table.mounts()[0].point, *b"/a b\tc\nd\\e#f\xff\\9\\04");
        assert_eq!(*table.mounts()[0].fstype, *b"fuse.\\ ");
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

    /// Many mounts of the root, as many stacked on `/proc/meminfo`, and as many each on the one
    /// before. A search that scans the table for each mount takes minutes here.
    #[test]
    fn top_of_a_large_table_is_found() {
        const COUNT: u64 = 20_000;
        let on = |first: u64, n: u64, base: u64| if n == 0 { base } else { first + n - 1 };
        let lines = |n: u64| {
            let [apart, stacked, below] = [100_000, 200_000, 300_000].map(|first| first + n);
            let (on_stack, on_last) = (on(200_000, n, 2), on(300_000, n, 1));
            format!(
                "{apart} 1 0:3 / /mnt/{n} rw - tmpfs t rw\n\
                 {stacked} {on_stack} 0:2 /uptime /proc/meminfo rw - proc p rw\n\
                 {below} {on_last} 0:4 / /deep/{n} rw - tmpfs t rw\n"
            )
        };
        let base = "1 0 0:1 / / rw - overlay o rw\n2 1 0:2 / /proc rw - proc p rw\n".to_owned();
        let mut text = base + &(0..COUNT).map(lines).collect::<String>();
        let top = |text: &str, path: &str| {
            let table = MountTable::parse(text.as_bytes()).unwrap();
            table.top(path.as_bytes()).map(|m| m.id.0)
        };
        assert_eq!(top(&text, "/proc/meminfo"), Some(219_999));
        assert_eq!(top(&text, "/mnt/19999"), Some(119_999));
        assert_eq!(top(&text, "/deep/19999"), Some(319_999));
        // A cover hides what lies on the mount below it.
        text += "1000000 300009 0:5 / /deep/9 rw - tmpfs t rw\n";
        assert_eq!(top(&text, "/deep/9"), Some(1_000_000));
        assert_eq!(top(&text, "/deep/10"), None);
        assert_eq!(top(&text, "/deep/19999"), None);
        assert_eq!(top(&text, "/mnt/19999"), Some(119_999));
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

    /// The searches without an index, as a reference.
    mod naive {
        use super::*;

        pub(super) fn top<'t>(mounts: &'t [Mount<'t>], path: &[u8]) -> Option<&'t Mount<'t>> {
            let root = root(mounts)?;
            let lowest = mounts.iter().rev().find(|m| {
                *m.point == *path && !is_stacked(mounts, m) && reachable(mounts, m, root)
            });
            if path == b"/" { Some(root) } else { lowest.map(|lowest| topmost(mounts, lowest)) }
        }

        pub(super) fn child<'t>(
            mounts: &'t [Mount<'t>],
            parent: &Mount<'_>,
            point: &[u8],
        ) -> Option<&'t Mount<'t>> {
            mounts.iter().find(|m| m.parent == parent.id && m.id != parent.id && *m.point == *point)
        }

        fn topmost<'t>(mounts: &'t [Mount<'t>], lowest: &'t Mount<'t>) -> &'t Mount<'t> {
            let above = |m: &&'t Mount<'t>| child(mounts, m, &m.point);
            std::iter::successors(Some(lowest), above).last().unwrap_or(lowest)
        }

        fn root<'t>(mounts: &'t [Mount<'t>]) -> Option<&'t Mount<'t>> {
            let at_root = || mounts.iter().filter(|m| *m.point == *b"/");
            let lowest = at_root().find(|m| !at_root().any(|below| below.id == m.parent))?;
            Some(topmost(mounts, lowest))
        }

        fn parent<'t>(mounts: &'t [Mount<'t>], mount: &Mount<'_>) -> Option<&'t Mount<'t>> {
            mounts.iter().find(|m| m.id == mount.parent)
        }

        fn is_stacked(mounts: &[Mount<'_>], mount: &Mount<'_>) -> bool {
            parent(mounts, mount).is_some_and(|parent| parent.point == mount.point)
        }

        fn reachable(mounts: &[Mount<'_>], mount: &Mount<'_>, root: &Mount<'_>) -> bool {
            let Some(parent) = parent(mounts, mount) else { return false };
            let uncovered = child(mounts, parent, &parent.point).is_none_or(|c| c.id == mount.id);
            uncovered && (parent.id == root.id || reachable(mounts, parent, root))
        }
    }

    const POINTS: [&str; 5] = ["/", "/a", "/a/b", "/proc", "/proc/meminfo"];

    /// The lines of a tree of mounts, in any order.
    fn trees() -> impl Strategy<Value = Vec<String>> {
        let mount = (any::<prop::sample::Index>(), 0..POINTS.len());
        let lines = proptest::collection::vec(mount, 1..30).prop_map(|mounts| {
            let line = |(n, (parent, point)): (usize, (prop::sample::Index, usize))| {
                let (parent, point) = if n == 0 { (0, 0) } else { (1 + parent.index(n), point) };
                format!("{} {parent} 0:1 / {} rw - t s o\n", n + 1, POINTS[point])
            };
            mounts.into_iter().enumerate().map(line).collect::<Vec<_>>()
        });
        lines.prop_shuffle()
    }

    proptest! {
        #[test]
        fn index_finds_what_a_plain_search_finds(lines in trees()) {
            let text = lines.concat();
            let table = MountTable::parse(text.as_bytes()).unwrap();
            for point in POINTS.map(str::as_bytes) {
                prop_assert_eq!(table.top(point), naive::top(table.mounts(), point));
                for parent in table.mounts() {
                    let expected = naive::child(table.mounts(), parent, point);
                    prop_assert_eq!(table.child(parent, point), expected);
                }
            }
        }

        #[test]
        fn any_path_survives_escaping(path in proptest::collection::vec(1u8.., 0..40)) {
            let line = [b"1 0 0:1 / ".as_slice(), &escaped(&path), b" rw - t s o"].concat();
            let table = MountTable::parse(&line).unwrap();
            prop_assert_eq!(&*table.mounts()[0].point, &path[..]);
        }

        #[test]
        fn parser_never_panics(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = MountTable::parse(&text).map(|t| t.top(b"/proc").is_some());
        }
    }
}
