//! The folder of the node that lxcfs is mounted below, where it is a hostPath volume of our pod: the kubelet makes it and nobody
//! removes it. The last of our pods on the node does, so that an uninstallation leaves nothing.

use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use crate::{
    mount::table::{Mount, Table},
    node,
};

/// Removes lxcfs's empty mount point, and the volume that it is in, unless another pod uses that. Where lxcfs is in no volume,
/// nothing is done.
///
/// # Errors
/// When the volume cannot be removed, as when it is not empty.
pub fn leave(lxcfs_path: &Path) -> io::Result<()> {
    let Some(point) = lxcfs_path.parent() else { return Ok(()) };
    let own = std::fs::read("/proc/self/mountinfo")?;
    let own = Table::parse(&own).map_err(io::Error::other)?;
    // A folder of a file system of the node is mounted here, and not a file system of its own.
    let Some(volume) = own.top(point.as_os_str().as_bytes()).filter(|mount| *mount.root != *b"/") else {
        return Ok(());
    };
    // Its mount point too is theirs while they are there: an lxcfs that is just restarting is mounted on it.
    if others_use(volume)? {
        return Ok(());
    }
    match std::fs::remove_dir(lxcfs_path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let host = std::fs::read("/proc/1/mountinfo")?;
    let host = Table::parse(&host).map_err(io::Error::other)?;
    let Some(path) = path_of(volume, &host) else { return Ok(()) };
    std::fs::remove_dir(Path::new("/proc/1/root").join(path.strip_prefix("/").unwrap_or(&path)))
}

fn others_use(volume: &Mount<'_>) -> io::Result<bool> {
    Ok(node::namespaces()?.iter().any(|process| {
        let text = std::fs::read(format!("/proc/{}/mountinfo", process.pid())).unwrap_or_default();
        Table::parse(&text).is_ok_and(|table| table.0.iter().any(|m| m.dev == volume.dev && m.root == volume.root))
    }))
}

/// Where a mount's root is in another mount table.
fn path_of(volume: &Mount<'_>, table: &Table<'_>) -> Option<PathBuf> {
    let below = |mount: &Mount<'_>| {
        let root = mount.root.strip_suffix(b"/").unwrap_or(&mount.root);
        let rest = volume.root.strip_prefix(root).filter(|rest| rest.first() == Some(&b'/'))?;
        let point = mount.point.strip_suffix(b"/").unwrap_or(&mount.point);
        Some(PathBuf::from(OsStr::from_bytes(&[point, rest].concat())))
    };
    table.0.iter().filter(|mount| mount.dev == volume.dev).find_map(below)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_found_on_the_host_whatever_it_is_mounted_on() {
        let pod = Table::parse(b"9 1 8:1 /var/lib/kube-lxcfs /here rw - ext4 /dev/sda rw\n").unwrap();
        for (host, path) in [
            (&b"1 0 8:1 / / rw - ext4 /dev/sda rw\n"[..], Some("/var/lib/kube-lxcfs")),
            (
                b"1 0 8:2 / / rw - ext4 /dev/sdb rw\n2 1 8:1 /var /var rw - ext4 /dev/sda rw\n",
                Some("/var/lib/kube-lxcfs"),
            ),
            (b"1 0 8:2 / / rw - ext4 /dev/sdb rw\n2 1 8:1 /varia /x rw - ext4 /dev/sda rw\n", None),
            (b"1 0 8:2 / / rw - ext4 /dev/sdb rw\n", None),
        ] {
            let host = Table::parse(host).unwrap();
            assert_eq!(path_of(&pod.0[0], &host), path.map(PathBuf::from));
        }
    }
}
