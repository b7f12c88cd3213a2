//! Bare mount namespaces, and what a mount table shows.

use std::{fs, path::Path};

use tempfile::TempDir;

use super::{Running, eventually, program};

/// Arguments of unshare(1): a mount and a pid namespace of its own, with its own `/proc`.
pub(crate) const OWN_NAMESPACES: [&str; 7] =
    ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"];

/// A process in a mount namespace of its own, with its own `/proc`.
#[derive(Debug)]
pub(crate) struct Bare {
    pub(crate) unshare: Running,
    pub(crate) pid: i32,
    _dir: TempDir,
}

impl Bare {
    pub(crate) fn start() -> Bare {
        Bare::with(&OWN_NAMESPACES)
    }

    /// With these arguments for unshare(1), among them `--fork`.
    pub(crate) fn with(args: &[&str]) -> Bare {
        Bare::running(args, &["sleep", "3600"])
    }

    pub(crate) fn running(args: &[&str], command: &[&str]) -> Bare {
        let dir = tempfile::tempdir().unwrap();
        let unshare = Running::start(
            program("unshare").args(args).arg("--").args(command),
            &dir.path().join("log"),
        );
        let children = format!("/proc/{0}/task/{0}/children", unshare.pid());
        let pid = eventually("the namespace exists", || {
            let pid: i32 = fs::read_to_string(&children)
                .unwrap_or_default()
                .trim()
                .parse()
                .map_err(|_| unshare.log())?;
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if comm.trim() == "unshare" { Err("not set up yet".into()) } else { Ok(pid) }
        });
        Bare { unshare, pid, _dir: dir }
    }

    /// A file as a process inside reads it.
    pub(crate) fn read(&self, path: &str) -> String {
        let output = program("nsenter")
            .args(["--target", &self.pid.to_string(), "--mount", "cat", path])
            .output()
            .unwrap();
        let text = if output.status.success() { output.stdout } else { output.stderr };
        String::from_utf8_lossy(&text).into_owned()
    }

    pub(crate) fn mountinfo(&self) -> String {
        mountinfo(self.pid)
    }

    /// Whether this is the pid of one of its processes: unshare(1) itself is in the namespace too.
    pub(crate) fn has(&self, pid: &serde_json::Value) -> bool {
        [self.pid, self.unshare.pid()].iter().any(|own| pid == *own)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.unshare.kill();
    }
}

/// Detaches every mount at a path.
pub(crate) fn unmount(path: &Path) {
    let flags = nix::mount::MntFlags::MNT_DETACH | nix::mount::MntFlags::UMOUNT_NOFOLLOW;
    while nix::mount::umount2(path, flags).is_ok() {}
}

/// The mount table of a process, without the mounts of others on this machine: namespaces have
/// copies of them, which vanish when their mount points are removed.
pub(crate) fn mountinfo(pid: i32) -> String {
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let temporary = std::env::temp_dir();
    let is_ours = |line: &&str| {
        let point = Path::new(line.split(' ').nth(4).unwrap());
        let ours = ["/proc", "/sys", "/dev", "/run", "/etc", temporary.to_str().unwrap()];
        point == Path::new("/") || ours.iter().any(|dir| point.starts_with(dir))
    };
    table.lines().filter(is_ours).map(|line| format!("{line}\n")).collect()
}

/// The mount table of this process, which is the node's.
pub(crate) fn own_mountinfo() -> String {
    mountinfo(std::process::id().cast_signed())
}

/// The managed view files in a mount table, as mount points.
pub(crate) fn views(mountinfo: &str) -> Vec<String> {
    let view = |line: &&str| line.contains(" - fuse.lxcfs ") && line.contains("noexec,noatime");
    let mut points: Vec<String> = mountinfo
        .lines()
        .filter(view)
        .map(|line| line.split(' ').nth(4).unwrap().to_owned())
        .collect();
    points.sort();
    points
}

/// Waits until a namespace has this many view files, none of them twice.
pub(crate) fn has_views(what: &str, pid: i32, count: usize) {
    eventually(&format!("{what} has {count} view files"), || {
        let views = views(&mountinfo(pid));
        let mut distinct = views.clone();
        distinct.dedup();
        if views.len() == count && distinct == views { Ok(()) } else { Err(format!("{views:?}")) }
    });
}
