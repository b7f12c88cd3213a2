//! Predecessors: an lxcfs that served at our path before, and may still serve views in containers.

use std::{os::fd::AsFd, path::Path};

use rustix::process::Signal;

use super::DRAIN;
use crate::{
    lxcfs::{Finder, Identity, identify, processes_serving},
    mount::Workers,
    node,
    sys::{mountinfo::Dev, process::Process},
};

/// The predecessors that still respond.
pub(super) struct Predecessors {
    processes: Vec<(Process, Option<Dev>)>,
    /// The device of the one that was mounted at our path.
    mounted: Option<Dev>,
}

impl Predecessors {
    /// Takes over from predecessors: unmounts them at the path, and removes dead views. One that
    /// responds keeps serving the views in containers until [`Predecessors::replace`].
    pub(super) async fn take_over(path: &Path, sweepers: &Workers) -> Predecessors {
        let of = path.to_owned();
        let found = sweepers.run(move |_| processes_serving(&of)).await;
        let processes = found.unwrap_or_else(|timeout| {
            tracing::warn!(cause = %timeout.error, "a predecessor may still run");
            Vec::new()
        });
        let mut predecessors = Predecessors { processes, mounted: None };
        let mut hung = None;
        if let Some(Identity { dev, .. }) = identify(path) {
            match Finder::new(path).find(sweepers).await {
                Ok(_) => predecessors.mounted = Some(dev),
                Err(e) => {
                    tracing::info!(cause = %e, "removing the mount of a predecessor");
                    predecessors.processes.drain(..).for_each(|(process, _)| kill(&process));
                    hung = Some(dev);
                }
            }
        }
        super::unmount_all(path);
        for (process, _) in &predecessors.processes {
            tracing::info!(pid = process.pid(), "predecessor still runs, replacing it");
        }
        node::log_sweep(&node::sweep_dead(sweepers, hung).await);
        predecessors
    }

    /// Whether views of this lxcfs are theirs. On a kernel that does not report a process's device
    /// that may be any.
    fn may_own(&self, dev: Dev) -> bool {
        self.mounted == Some(dev)
            || self.processes.iter().any(|(_, of)| of.is_none_or(|of| of == dev))
    }

    /// Remounts the predecessors' views from the lxcfs at `path`, then kills the predecessors. If
    /// that lxcfs does not respond, the next one does it.
    pub(super) async fn replace(
        &mut self,
        path: &Path,
        sweepers: &Workers,
        probe_workers: &Workers,
    ) {
        if self.processes.is_empty() && self.mounted.is_none() {
            return;
        }
        let Ok(lxcfs) = Finder::new(path).find(probe_workers).await else { return };
        match node::remount(sweepers, &lxcfs, |dev| self.may_own(dev)).await {
            Ok(remounted) if remounted.files > 0 => {
                tracing::info!(summary = %remounted, "remounted views of a predecessor");
            }
            Ok(_) => {}
            Err(cause) => return tracing::warn!(%cause, "failed to remount a predecessor's views"),
        }
        drop(lxcfs);
        self.mounted = None;
        if !self.processes.is_empty() {
            tokio::time::sleep(DRAIN).await;
        }
        for (process, _) in self.processes.drain(..) {
            kill(&process);
            tracing::info!(pid = process.pid(), "predecessor killed");
        }
    }
}

/// Kills a predecessor. Not with SIGTERM: an lxcfs that exits in order unmounts what is mounted at
/// its path, its successor too.
fn kill(process: &Process) {
    // It may have exited already.
    let _ = rustix::process::pidfd_send_signal(process.as_fd(), Signal::KILL);
}
