//! View files: their names and their paths. Independent of mounts, pods and the state of lxcfs.

use std::fmt;

use serde::{Serialize, Serializer, ser::SerializeSeq};

use super::text::Quoted;

/// One file (or, for [`ViewFile::Cpu`], one directory) that lxcfs can answer from the reader's
/// cgroup.
///
/// Its path below an lxcfs mount is the same as below a container's root (lxcfs(1)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ViewFile {
    Cpuinfo,
    Diskstats,
    Loadavg,
    Meminfo,
    Slabinfo,
    Stat,
    Swaps,
    Uptime,
    PressureCpu,
    PressureIo,
    PressureMemory,
    Cpu,
}

/// The file system of the container that a view file is mounted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BaseFs {
    /// procfs, at `/proc`.
    Procfs,
    /// sysfs, at `/sys`.
    Sysfs,
}

impl BaseFs {
    pub const ALL: [BaseFs; 2] = [BaseFs::Procfs, BaseFs::Sysfs];

    /// Its mount point, relative to the root: `proc` or `sys`.
    pub fn path(self) -> &'static str {
        match self {
            BaseFs::Procfs => "proc",
            BaseFs::Sysfs => "sys",
        }
    }

    /// The file system type as `/proc/PID/mountinfo` names it.
    pub fn fstype(self) -> &'static str {
        match self {
            BaseFs::Procfs => "proc",
            BaseFs::Sysfs => "sysfs",
        }
    }
}

impl ViewFile {
    pub const ALL: [ViewFile; 12] = [
        ViewFile::Cpuinfo,
        ViewFile::Diskstats,
        ViewFile::Loadavg,
        ViewFile::Meminfo,
        ViewFile::Slabinfo,
        ViewFile::Stat,
        ViewFile::Swaps,
        ViewFile::Uptime,
        ViewFile::PressureCpu,
        ViewFile::PressureIo,
        ViewFile::PressureMemory,
        ViewFile::Cpu,
    ];

    /// The name users write in the annotation `kube-lxcfs.io/files` and in `--files`.
    pub fn name(self) -> &'static str {
        match self {
            ViewFile::Cpu => "cpu",
            _ => self.path_in_base(),
        }
    }

    /// The path relative to the root of an lxcfs mount and of a container alike, without a leading
    /// slash.
    pub fn path(self) -> &'static str {
        match self {
            ViewFile::Cpuinfo => "proc/cpuinfo",
            ViewFile::Diskstats => "proc/diskstats",
            ViewFile::Loadavg => "proc/loadavg",
            ViewFile::Meminfo => "proc/meminfo",
            ViewFile::Slabinfo => "proc/slabinfo",
            ViewFile::Stat => "proc/stat",
            ViewFile::Swaps => "proc/swaps",
            ViewFile::Uptime => "proc/uptime",
            ViewFile::PressureCpu => "proc/pressure/cpu",
            ViewFile::PressureIo => "proc/pressure/io",
            ViewFile::PressureMemory => "proc/pressure/memory",
            ViewFile::Cpu => "sys/devices/system/cpu",
        }
    }

    /// The file system that it is mounted on.
    pub fn base(self) -> BaseFs {
        match self {
            ViewFile::Cpu => BaseFs::Sysfs,
            _ => BaseFs::Procfs,
        }
    }

    /// The path relative to the mount point of its [`BaseFs`].
    pub fn path_in_base(self) -> &'static str {
        &self.path()[self.base().path().len() + 1..]
    }

    fn bit(self) -> u16 {
        1 << (self as u16)
    }
}

impl fmt::Display for ViewFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for ViewFile {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.name())
    }
}

/// A name that no view file has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown view file {}; valid names: {}", Quoted(.0), valid_names())]
pub struct UnknownViewFile(pub String);

/// The names that users may write, for messages.
fn valid_names() -> String {
    let names: Vec<_> = ViewFile::ALL.iter().map(|f| f.name()).collect();
    format!("{} and pressure", names.join(", "))
}

/// A set of view files.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct FileSet(u16);

impl FileSet {
    pub const NONE: FileSet = FileSet(0);
    /// Every view file; in a desired view: all that lxcfs serves.
    pub const ALL: FileSet = FileSet((1 << ViewFile::ALL.len()) - 1);

    /// Parses the comma-separated names of `kube-lxcfs.io/files` and `--files`; `pressure` stands
    /// for the three files below it.
    ///
    /// # Errors
    /// The first name that no view file has; an empty name is an error too.
    pub fn parse(list: &str) -> Result<FileSet, UnknownViewFile> {
        let mut set = FileSet::NONE;
        for name in list.split(',').map(str::trim) {
            let named = |f: &&ViewFile| {
                f.name() == name || f.name().split_once('/').is_some_and(|(dir, _)| dir == name)
            };
            let before = set;
            set.extend(ViewFile::ALL.iter().filter(named).copied());
            if set == before && !ViewFile::ALL.iter().any(|f| named(&f)) {
                return Err(UnknownViewFile(name.to_owned()));
            }
        }
        Ok(set)
    }

    pub fn contains(self, file: ViewFile) -> bool {
        self.0 & file.bit() != 0
    }

    pub fn insert(&mut self, file: ViewFile) {
        self.0 |= file.bit();
    }

    pub fn remove(&mut self, file: ViewFile) {
        self.0 &= !file.bit();
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub fn iter(self) -> impl Iterator<Item = ViewFile> {
        ViewFile::ALL.into_iter().filter(move |f| self.contains(*f))
    }
}

impl Extend<ViewFile> for FileSet {
    fn extend<I: IntoIterator<Item = ViewFile>>(&mut self, files: I) {
        files.into_iter().for_each(|f| self.insert(f));
    }
}

impl FromIterator<ViewFile> for FileSet {
    fn from_iter<I: IntoIterator<Item = ViewFile>>(files: I) -> Self {
        let mut set = FileSet::NONE;
        set.extend(files);
        set
    }
}

impl fmt::Display for FileSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.iter().map(ViewFile::name).collect();
        f.write_str(&names.join(","))
    }
}

impl fmt::Debug for FileSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}

impl Serialize for FileSet {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut seq = s.serialize_seq(Some(self.len()))?;
        for file in self.iter() {
            seq.serialize_element(&file)?;
        }
        seq.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_parses_to_its_file() {
        for file in ViewFile::ALL {
            assert_eq!(FileSet::parse(file.name()), Ok(FileSet::from_iter([file])));
        }
        assert_eq!(FileSet::from_iter(ViewFile::ALL), FileSet::ALL);
    }

    #[test]
    fn pressure_stands_for_its_three_files() {
        let three = [ViewFile::PressureCpu, ViewFile::PressureIo, ViewFile::PressureMemory];
        assert_eq!(FileSet::parse("pressure"), Ok(FileSet::from_iter(three)));
        assert_eq!(
            FileSet::parse(" meminfo , meminfo"),
            Ok(FileSet::from_iter([ViewFile::Meminfo]))
        );
    }

    #[test]
    fn unknown_name_error_lists_valid_names() {
        for bad in ["", "meminfo,", "memory", "proc/meminfo", "MEMINFO", "../meminfo", "pressure/"]
        {
            let error = FileSet::parse(bad).unwrap_err().to_string();
            assert!(error.contains("valid names: cpuinfo, diskstats"), "{error}");
        }
    }

    #[test]
    fn path_splits_at_its_base() {
        assert_eq!(ViewFile::PressureIo.path_in_base(), "pressure/io");
        assert_eq!(ViewFile::Cpu.path_in_base(), "devices/system/cpu");
        assert_eq!(ViewFile::Cpu.name(), "cpu");
    }
}
