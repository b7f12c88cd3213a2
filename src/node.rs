//! Operations over every mount namespace of the node: views, sweeps, remounts. They need no runtime
//! and no API server.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt, io,
    os::unix::fs::MetadataExt,
    path::Path,
    pin::pin,
    sync::Arc,
};

use futures::{StreamExt, stream};
use serde::Serialize;

use crate::{
    lxcfs,
    model::{container_id::ContainerId, pod::Pod, view::ViewFile},
    mount::{self, Liveness, LxcfsFiles, Prober, Task, Workers},
    plan::{DesiredView, ObservedMounts},
    runtime::cgroup,
    sys::{mountinfo::Dev, process::Process},
};

/// The limit of namespaces that are worked on concurrently.
const CONCURRENCY: usize = 128;

/// One process of every mount namespace of this node except our own.
///
/// # Errors
/// Fails if `/proc` cannot be listed.
pub fn namespaces() -> io::Result<Vec<Arc<Process>>> {
    let id = |path: String| std::fs::metadata(path).map(|m| (m.dev(), m.ino()));
    let mut seen = HashSet::from([id("/proc/self/ns/mnt".into())?]);
    let mut processes = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry.ok().and_then(|e| e.file_name().to_str()?.parse::<i64>().ok()) else {
            continue;
        };
        // A process may exit at any moment, and a kernel thread or a zombie has no mount namespace.
        let Ok(namespace) = id(format!("/proc/{pid}/ns/mnt")) else { continue };
        if seen.contains(&namespace) {
            continue;
        }
        if let Ok(process) = Process::open(pid) {
            seen.insert(namespace);
            processes.push(Arc::new(process));
        }
    }
    Ok(processes)
}

/// A mount namespace with a view.
#[derive(Debug)]
pub struct ViewedNamespace {
    pub process: Arc<Process>,
    pub observed: ObservedMounts,
}

/// Every mount namespace that has a managed view. One that cannot be observed is skipped, and the
/// log says why.
///
/// # Errors
/// Fails if `/proc` cannot be listed.
pub async fn views(workers: &Workers) -> io::Result<Vec<ViewedNamespace>> {
    let processes = namespaces()?;
    let observations = stream::iter(processes).map(|process| async move {
        match mount::observe(workers, process.clone()).await {
            Ok(observed) if observed.views().next().is_some() => {
                Some(ViewedNamespace { process, observed })
            }
            Ok(_) => None,
            Err(e) if e.is_no_target() => None,
            Err(e) => {
                tracing::warn!(cause = %e, "namespace skipped");
                None
            }
        }
    });
    let viewed = observations.buffer_unordered(CONCURRENCY).filter_map(async |viewed| viewed);
    let mut viewed: Vec<ViewedNamespace> = viewed.collect().await;
    viewed.sort_by_key(|v| v.process.pid());
    Ok(viewed)
}

/// The summary of a pass over the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassSummary {
    /// Containers that were changed.
    pub containers: usize,
    /// View files that were changed.
    pub files: usize,
    /// Containers in which a step failed.
    pub failed: usize,
}

impl fmt::Display for PassSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} view files in {} containers", self.files, self.containers)?;
        if self.failed > 0 { write!(f, ", {} containers failed", self.failed) } else { Ok(()) }
    }
}

/// Performs a task in the mount namespaces of these processes, many concurrently.
async fn pass(workers: &Workers, processes: Vec<Arc<Process>>, task: &Task) -> PassSummary {
    let reconciles = stream::iter(processes).map(|process| async move {
        let reconciled = mount::reconcile(workers, process, task.clone()).await;
        reconciled.unwrap_or_else(|timeout| Err(timeout.error.into()))
    });
    let mut summary = PassSummary::default();
    let mut reconciles = pin!(reconciles.buffer_unordered(CONCURRENCY));
    while let Some(reconciled) = reconciles.next().await {
        let changed = match reconciled {
            Ok(outcome) => outcome.done.len(),
            Err(e) if e.is_no_target() => 0,
            Err(e) => {
                summary.failed += 1;
                tracing::warn!(cause = %e, "failed to change a container");
                e.into_outcome().done.len()
            }
        };
        summary.files += changed;
        summary.containers += usize::from(changed > 0);
    }
    summary
}

/// Removes the view files of these lxcfs from every container of the node. Sends no lxcfs a
/// request.
///
/// # Errors
/// Fails if `/proc` cannot be listed.
#[allow(clippy::implicit_hasher, reason = "a handful of device numbers")]
pub async fn sweep(workers: &Workers, exited: HashSet<Dev>) -> io::Result<PassSummary> {
    Ok(pass(workers, namespaces()?, &Task::Sweep(Arc::new(exited))).await)
}

/// Sweeps every lxcfs that has exited, by its device in containers that have a view of it, and
/// `hung`. Another lxcfs that hangs is left alone: on a node within a node it belongs to another
/// supervisor.
///
/// # Errors
/// Fails if `/proc` cannot be listed.
pub async fn sweep_dead(workers: &Workers, hung: Option<Dev>) -> io::Result<PassSummary> {
    let mut known: HashMap<Dev, Liveness> =
        hung.into_iter().map(|dev| (dev, Liveness::Disconnected)).collect();
    let viewed = views(workers).await?;
    let prober = Prober::new(workers).await;
    for ViewedNamespace { process, observed } in viewed {
        for (file, dev) in observed.views() {
            if known.get(&dev).is_none_or(|liveness| *liveness == Liveness::Unknown) {
                known.insert(dev, prober.liveness(&process, file, dev).await);
            }
        }
    }
    let exited = known.into_iter().filter(|(_, liveness)| *liveness == Liveness::Disconnected);
    let exited: HashSet<Dev> = exited.map(|(dev, _)| dev).collect();
    if exited.is_empty() { Ok(PassSummary::default()) } else { sweep(workers, exited).await }
}

/// Remounts every view of the node that comes from one of these lxcfs.
///
/// # Errors
/// Fails if `/proc` cannot be listed.
pub async fn remount(
    workers: &Workers,
    lxcfs: &Arc<LxcfsFiles>,
    of: impl Fn(Dev) -> bool,
) -> io::Result<PassSummary> {
    let stale = |viewed: &ViewedNamespace| {
        viewed.observed.views().any(|(_, dev)| dev != lxcfs.dev && of(dev))
    };
    let processes =
        views(workers).await?.into_iter().filter(stale).map(|viewed| viewed.process).collect();
    Ok(pass(workers, processes, &Task::reconcile(DesiredView::REMOUNT_ONLY, Some(lxcfs.clone())))
        .await)
}

/// The state of a view file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ViewState {
    /// It comes from the lxcfs that serves now.
    Current,
    /// It comes from another lxcfs, whose process still runs.
    Stale,
    /// Its lxcfs has exited, or is the one at the lxcfs path and hangs.
    Dead,
}

/// The device of the lxcfs at the lxcfs path and the state of its views, from a search for it.
pub fn state_at_path(
    path: &Path,
    found: Result<&LxcfsFiles, &lxcfs::Error>,
) -> Option<(Dev, ViewState)> {
    match found {
        Ok(lxcfs) => Some((lxcfs.dev, ViewState::Current)),
        Err(lxcfs::Error::Hung { .. } | lxcfs::Error::Dead(_)) => {
            lxcfs::identify(path).map(|at_path| (at_path.dev, ViewState::Dead))
        }
        Err(_) => None,
    }
}

/// The view of one container, as `status` shows it.
#[derive(Debug, Serialize)]
pub struct ViewStatus {
    pub namespace: Option<String>,
    pub pod: Option<String>,
    pub container: Option<String>,
    pub id: Option<ContainerId>,
    pub pid: i32,
    pub files: BTreeMap<ViewFile, ViewState>,
}

/// The views of this node. `at_path` is the lxcfs at the lxcfs path, and the state of its views;
/// `pods` give the containers their names.
///
/// # Errors
/// Fails if `/proc` cannot be listed.
pub async fn status(
    workers: &Workers,
    at_path: Option<(Dev, ViewState)>,
    pods: Vec<Pod>,
) -> io::Result<Vec<ViewStatus>> {
    let mut names = HashMap::new();
    for Pod { namespace, name, containers, .. } in pods {
        for container in containers {
            let Some(id) = container.id else { continue };
            names.insert(id, (namespace.clone(), name.clone(), container.name));
        }
    }
    // One probe, through one file of one container, decides for all views of an lxcfs.
    let mut states: HashMap<Dev, ViewState> = at_path.into_iter().collect();
    let viewed = views(workers).await?;
    let prober = Prober::new(workers).await;
    let mut all = Vec::new();
    for ViewedNamespace { process, observed } in viewed {
        let mut files = BTreeMap::new();
        for (file, dev) in observed.views() {
            let state = match states.get(&dev) {
                Some(state) => Some(*state),
                None => match prober.liveness(&process, file, dev).await {
                    Liveness::Alive => Some(ViewState::Stale),
                    Liveness::Disconnected | Liveness::Hung => Some(ViewState::Dead),
                    // The next container that has a view of it is probed.
                    Liveness::Unknown => None,
                },
            };
            states.extend(state.map(|state| (dev, state)));
            files.insert(file, state.unwrap_or(ViewState::Stale));
        }
        let pid = process.pid();
        let id = cgroup::container_of_process(pid);
        let (namespace, pod, container) = match id.as_ref().and_then(|id| names.remove(id)) {
            Some((namespace, pod, container)) => (Some(namespace), Some(pod), Some(container)),
            None => (None, None, None),
        };
        all.push(ViewStatus { namespace, pod, container, id, pid, files });
    }
    all.sort_by(|a, b| {
        (&a.namespace, &a.pod, &a.container, a.pid).cmp(&(
            &b.namespace,
            &b.pod,
            &b.container,
            b.pid,
        ))
    });
    Ok(all)
}
