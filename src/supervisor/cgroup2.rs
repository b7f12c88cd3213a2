//! The mount options of cgroup2 on the node. An lxcfs before 6.0.6 mounts cgroup2 for itself,
//! without the node's options. There is one superblock only, so the node's options change
//! (lxc/lxcfs#681): containers could then write to the limits that are set for them.

use std::{collections::BTreeSet, io, path::PathBuf};

use rustix::mount::FsPickFlags;

/// The options that can be lost: flags without a value
/// (Documentation/admin-guide/cgroup-v2.rst, "Mounting").
const OPTIONS: [&str; 6] = [
    "nsdelegate",
    "favordynmods",
    "memory_localevents",
    "memory_recursiveprot",
    "memory_hugetlb_accounting",
    "pids_localevents",
];

/// The mount point and the options of a cgroup2 mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cgroup2 {
    path: PathBuf,
    options: BTreeSet<&'static str>,
}

impl Cgroup2 {
    /// The first cgroup2 mount of this mount namespace; `None` if there is none.
    pub(super) fn read() -> io::Result<Option<Cgroup2>> {
        Ok(Cgroup2::parse(&std::fs::read_to_string("/proc/self/mountinfo")?))
    }

    fn parse(mountinfo: &str) -> Option<Cgroup2> {
        mountinfo.lines().find_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut fields = file_system.split(' ');
            let options = if fields.next()? == "cgroup2" { fields.nth(1)? } else { return None };
            let path = mount.split(' ').nth(4)?.into();
            let options = options.split(',');
            let known = options.filter_map(|o| OPTIONS.into_iter().find(|known| *known == o));
            Some(Cgroup2 { path, options: known.collect() })
        })
    }

    /// Sets the options as they were, if another process has changed them since.
    pub(super) fn restore(&self) {
        let Ok(Some(now)) = Cgroup2::read() else { return };
        if now.options == self.options {
            return;
        }
        let changed: Vec<_> = self.options.symmetric_difference(&now.options).copied().collect();
        let changed = changed.join(",");
        tracing::warn!(
            cgroup2_options = changed,
            "lxcfs changed mount options of cgroup2 for the whole node; restoring them"
        );
        match self.set() {
            Ok(()) if Cgroup2::read().is_ok_and(|now| now.as_ref() == Some(self)) => {}
            // The kernel ignores them outside the initial cgroup namespace (cgroup_namespaces(7)).
            Ok(()) => tracing::error!(
                cgroup2_options = changed,
                "failed to restore mount options of cgroup2; run in the host's cgroup namespace"
            ),
            Err(cause) => tracing::error!(
                cgroup2_options = changed,
                %cause,
                "failed to restore mount options of cgroup2"
            ),
        }
    }

    /// As `mount -o remount`: options that are not given are cleared.
    fn set(&self) -> rustix::io::Result<()> {
        let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_NO_AUTOMOUNT;
        let context = rustix::mount::fspick(rustix::fs::CWD, &self.path, flags)?;
        for option in &self.options {
            rustix::mount::fsconfig_set_flag(&context, *option)?;
        }
        rustix::mount::fsconfig_reconfigure(&context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_those_of_the_file_system() {
        let table = "24 1 0:22 / /proc rw - proc proc rw\n\
                     31 24 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 \
                     rw,nsdelegate,memory_recursiveprot\n";
        let cgroup2 = Cgroup2::parse(table).unwrap();
        assert_eq!(cgroup2.path, PathBuf::from("/sys/fs/cgroup"));
        let expected = BTreeSet::from(["memory_recursiveprot", "nsdelegate"]);
        assert_eq!(cgroup2.options, expected);
        assert_eq!(Cgroup2::parse("24 1 0:22 / /proc rw - proc proc rw\n"), None);
    }
}
