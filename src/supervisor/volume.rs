//! The hostPath volume that lxcfs is mounted below. The kubelet creates its directory on the node
//! and never removes it. The last kube-lxcfs pod on the node does, so that an uninstallation leaves
//! nothing behind.

use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use crate::{
    mount::TableLimit,
    sys::{
        mntns::Scan,
        mountinfo::{self, Mount, MountTable},
    },
};

/// Removes the empty mount point of lxcfs and the volume that holds it, unless another pod uses the
/// volume. If lxcfs is not in a volume, nothing is removed.
///
/// # Errors
/// Fails if the volume cannot be removed, as when it is not empty.
pub fn remove_if_unused(lxcfs_path: &Path) -> io::Result<()> {
    let Some(point) = lxcfs_path.parent() else { return Ok(()) };
    let own = std::fs::read("/proc/self/mountinfo")?;
    let own = MountTable::parse(&own).map_err(io::Error::other)?;
    // A volume is a directory of one of the node's file systems, not the root of a file system.
    let Some(volume) = own.top(point.as_os_str().as_bytes()).filter(|mount| *mount.root != *b"/")
    else {
        return Ok(());
    };
    // The mount point also belongs to the other pods: an lxcfs that is restarting will be mounted
    // on it.
    if others_use(volume)? {
        return Ok(());
    }
    match std::fs::remove_dir(lxcfs_path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let host = std::fs::read("/proc/1/mountinfo")?;
    let host = MountTable::parse(&host).map_err(io::Error::other)?;
    let Some(path) = path_of(volume, &host) else { return Ok(()) };
    std::fs::remove_dir(Path::new("/proc/1/root").join(path.strip_prefix("/").unwrap_or(&path)))
}

fn others_use(volume: &Mount<'_>) -> io::Result<bool> {
    let is_volume = |line: &[u8]| {
        Mount::parse(line).is_some_and(|m| m.dev == volume.dev && m.root == volume.root)
    };
    Ok(Scan::all()?.iter().any(|process| {
        let table = std::fs::File::open(format!("/proc/{}/mountinfo", process.pid()));
        table.is_ok_and(|table| {
            // The table of another kube-lxcfs is not a large one.
            let volumes = mountinfo::filter_lines(table, TableLimit::Large.bytes(), is_volume);
            volumes.is_ok_and(|volumes| !volumes.is_empty())
        })
    }))
}

/// The path of a mount's root in another mount table.
fn path_of(volume: &Mount<'_>, table: &MountTable<'_>) -> Option<PathBuf> {
    let below = |mount: &Mount<'_>| {
        let root = mount.root.strip_suffix(b"/").unwrap_or(&mount.root);
        let rest = volume.root.strip_prefix(root).filter(|rest| rest.first() == Some(&b'/'))?;
        let point = mount.point.strip_suffix(b"/").unwrap_or(&mount.point);
        Some(PathBuf::from(OsStr::from_bytes(&[point, rest].concat())))
    };
    table.mounts().iter().filter(|mount| mount.dev == volume.dev).find_map(below)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_is_found_below_any_host_mount() {
        let pod = MountTable::parse(b"9 1 8:1 /var/lib/kube-lxcfs /volume rw - ext4 /dev/sda rw\n")
            .unwrap();
        for (host, path) in [
            (&b"1 0 8:1 / / rw - ext4 /dev/sda rw\n"[..], Some("/var/lib/kube-lxcfs")),
            (
                b"1 0 8:2 / / rw - ext4 /dev/sdb rw\n2 1 8:1 /var /var rw - ext4 /dev/sda rw\n",
                Some("/var/lib/kube-lxcfs"),
            ),
            (b"1 0 8:2 / / rw - ext4 /dev/sdb rw\n2 1 8:1 /varia /x rw - ext4 /dev/sda rw\n", None),
            (b"1 0 8:2 / / rw - ext4 /dev/sdb rw\n", None),
        ] {
            let host = MountTable::parse(host).unwrap();
            assert_eq!(path_of(&pod.mounts()[0], &host), path.map(PathBuf::from));
        }
    }
}
