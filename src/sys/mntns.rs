//! The mount namespaces of this node, each by a process or thread that is in it.

use std::{collections::HashSet, fmt::Display, io, os::unix::fs::MetadataExt, sync::Arc};

use super::process::{Process, ProcessError};

/// The inode number of a mount namespace. All namespaces are on one device.
pub type NamespaceId = u64;

/// The mount namespace of a process, by its pid or `self`, if it runs.
pub fn namespace_of(pid: impl Display) -> Option<NamespaceId> {
    namespace(&format!("/proc/{pid}")).ok()
}

/// A search for the mount namespaces of this node. It finds each namespace once, and not our own.
#[derive(Debug)]
pub struct Scan {
    seen: HashSet<NamespaceId>,
}

impl Scan {
    /// # Errors
    /// Fails if `/proc` is not mounted.
    pub fn new() -> io::Result<Scan> {
        Ok(Scan { seen: HashSet::from([namespace("/proc/self")?]) })
    }

    /// One process of every namespace that the main thread of a process is in.
    ///
    /// # Errors
    /// Fails if `/proc` cannot be listed.
    pub fn processes(&mut self) -> io::Result<Vec<Arc<Process>>> {
        Ok(self.processes_among(numbers("/proc")?))
    }

    fn processes_among(&mut self, pids: impl IntoIterator<Item = i64>) -> Vec<Arc<Process>> {
        let take = |pid| self.take(&format!("/proc/{pid}"), || Process::open_any(pid));
        pids.into_iter().filter_map(take).collect()
    }

    /// One thread of every other namespace: a thread can leave the namespace of its process, or
    /// outlive the main thread, whose namespace is then unknown.
    ///
    /// # Errors
    /// Fails if `/proc` cannot be listed.
    pub fn threads(&mut self) -> io::Result<Vec<Arc<Process>>> {
        Ok(self.threads_among(numbers("/proc")?))
    }

    fn threads_among(&mut self, pids: impl IntoIterator<Item = i64>) -> Vec<Arc<Process>> {
        let mut found = Vec::new();
        let own = i64::from(std::process::id());
        for pid in pids.into_iter().filter(|pid| *pid != own) {
            let tasks = format!("/proc/{pid}/task");
            // One link for each thread, beside `.` and `..` (proc_task_getattr(), fs/proc/base.c).
            if std::fs::metadata(&tasks).map_or(0, |tasks| tasks.nlink()) <= 3 {
                continue;
            }
            // A process may exit at any moment.
            for tid in numbers(&tasks).into_iter().flatten().filter(|tid| *tid != pid) {
                let open = || Process::open_thread(pid, tid);
                found.extend(self.take(&format!("{tasks}/{tid}"), open));
            }
        }
        found
    }

    /// All that [`Scan::processes`] and [`Scan::threads`] find, by one listing of `/proc`.
    ///
    /// # Errors
    /// Fails if `/proc` cannot be listed.
    pub fn all() -> io::Result<Vec<Arc<Process>>> {
        let mut scan = Scan::new()?;
        let pids: Vec<i64> = numbers("/proc")?.collect();
        let mut found = scan.processes_among(pids.iter().copied());
        found.extend(scan.threads_among(pids));
        Ok(found)
    }

    /// Opens the task in this directory if its namespace is new.
    fn take(
        &mut self,
        task: &str,
        open: impl FnOnce() -> Result<Process, ProcessError>,
    ) -> Option<Arc<Process>> {
        // A task may exit at any moment, and a zombie has no namespace.
        let namespace = namespace(task).ok().filter(|id| !self.seen.contains(id))?;
        let process = open().ok()?;
        self.seen.insert(namespace);
        Some(Arc::new(process))
    }
}

/// Reads the link `mnt:[4026531841]` (namespaces(7)), a third of what stat(2) costs: that makes an
/// inode.
fn namespace(task: &str) -> io::Result<NamespaceId> {
    let link = std::fs::read_link(format!("{task}/ns/mnt"))?;
    let number = link.to_str().and_then(|link| link.strip_prefix("mnt:[")?.strip_suffix(']'));
    let number = number.and_then(|number| number.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("{}: not a namespace", link.display())))
}

/// The entries of a directory of `/proc` that are numbers.
fn numbers(path: &str) -> io::Result<impl Iterator<Item = i64>> {
    let entries = std::fs::read_dir(path)?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()))
}
