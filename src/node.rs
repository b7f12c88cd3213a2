//! Operations over every mount namespace of the node: views, sweeps, remounts. They need no runtime
//! and no API server.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt, io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use serde::Serialize;

use crate::{
    lxcfs,
    model::{container_id::ContainerId, pod::Pod, view::ViewFile},
    mount::{self, Candidate, Liveness, LxcfsFiles, Owner, TableLimit, Task, Workers},
    plan::{DesiredView, ObservedMounts},
    runtime::cgroup,
    sys::{
        mntns::Scan,
        mountinfo::{Dev, ReadError},
        process::Process,
    },
};

/// The limit of namespaces that are worked on concurrently.
const CONCURRENCY: usize = 128;
/// As [`CONCURRENCY`], for the second and further namespaces of containers.
const FURTHER_CONCURRENCY: usize = 4;
/// The limit of containers with large mount tables that are worked on concurrently.
const LARGE_CONCURRENCY: usize = 2;
/// The time that the large mount tables of one container may take in a pass over the node.
const LARGE_BUDGET: Duration = Duration::from_secs(5);

type Done<T> = (Arc<Process>, Result<T, mount::Error>);

/// Works on every process, such that no container delays the others much. The first namespace of
/// each container comes first. When these are done, the second of each follows, and so on, a few at
/// a time. Those with large mount tables come last, with a limit of time for each container.
///
/// # Errors
/// Fails if the runtime of tasks is being shut down.
async fn for_each<T, F>(
    processes: Vec<Arc<Process>>,
    work: impl Fn(Arc<Process>, TableLimit) -> F,
) -> io::Result<Vec<Done<T>>>
where
    F: Future<Output = Result<T, mount::Error>>,
{
    let container = |process: &Process| cgroup::container_of_process(process.pid());
    let turns = move || Ok(take_turns(processes, |process| container(process)));
    let (first, further) = blocking(turns).await?;
    let work = |process: Arc<Process>, limit| {
        let done = work(process.clone(), limit);
        async move { (process, done.await) }
    };
    let work = &work;
    let mut normal: Vec<Done<T>> = Vec::new();
    for (processes, concurrency) in [(first, CONCURRENCY), (further, FURTHER_CONCURRENCY)] {
        let done = stream::iter(processes).map(|process| work(process, TableLimit::Normal));
        normal.extend(done.buffer_unordered(concurrency).collect::<Vec<Done<T>>>().await);
    }
    let is_large = |(_, done): &Done<T>| {
        matches!(done, Err(mount::Error::LargeTable { cause: ReadError::TooLong(_), .. }))
    };
    let (large, mut done): (Vec<_>, Vec<_>) = normal.into_iter().partition(is_large);
    let mut groups: HashMap<Result<ContainerId, i32>, Vec<Done<T>>> = HashMap::new();
    for (process, refused) in large {
        let key = container(&process).ok_or(process.pid());
        groups.entry(key).or_default().push((process, refused));
    }
    let large = stream::iter(groups.into_values()).map(|group| async move {
        let started = Instant::now();
        let mut done = Vec::new();
        for (process, refused) in group {
            done.push(if started.elapsed() < LARGE_BUDGET {
                work(process, TableLimit::Large).await
            } else {
                (process, refused)
            });
        }
        done
    });
    let large: Vec<Vec<Done<T>>> = large.buffer_unordered(LARGE_CONCURRENCY).collect().await;
    done.extend(large.into_iter().flatten());
    let large_error = |(process, done): &'_ Done<T>| {
        let error = done.as_ref().err().filter(|e| e.is_large())?;
        Some((process.pid(), error.to_string()))
    };
    let too_large: Vec<(i32, String)> = done.iter().filter_map(large_error).collect();
    if let [(pid, cause), ..] = &too_large[..] {
        let namespaces = too_large.len();
        let container = cgroup::container_of_process(*pid).map(tracing::field::display);
        tracing::warn!(cause, pid, container, namespaces, "namespaces skipped");
    }
    Ok(done)
}

/// The first process of each container; then the second of each, the third of each, and so on.
fn take_turns<P>(
    processes: Vec<P>,
    container: impl Fn(&P) -> Option<ContainerId>,
) -> (Vec<P>, Vec<P>) {
    let mut counts: HashMap<ContainerId, usize> = HashMap::new();
    let mut rank = |process: &P| {
        let count = counts.entry(container(process)?).or_default();
        *count += 1;
        Some(*count)
    };
    let ranked: Vec<(usize, P)> =
        processes.into_iter().map(|process| (rank(&process).unwrap_or(1), process)).collect();
    let (first, mut further): (Vec<_>, Vec<_>) = ranked.into_iter().partition(|(n, _)| *n == 1);
    further.sort_by_key(|(rank, _)| *rank);
    let processes = |ranked: Vec<(usize, P)>| ranked.into_iter().map(|(_, p)| p).collect();
    (processes(first), processes(further))
}

/// A mount namespace with a view, or with the scratch mount of a kube-lxcfs that was killed.
#[derive(Debug)]
pub struct ViewedNamespace {
    pub process: Arc<Process>,
    pub observed: ObservedMounts,
}

/// Every mount namespace that has a managed view or a scratch mount. One that cannot be observed is
/// skipped, and the log says why.
///
/// # Errors
/// Fails if `/proc` cannot be listed.
pub async fn views(workers: &Workers) -> io::Result<Vec<ViewedNamespace>> {
    viewed(workers, blocking(Scan::all).await?).await
}

/// Those of the namespaces of these processes that [`views`] finds.
async fn viewed(
    workers: &Workers,
    processes: Vec<Arc<Process>>,
) -> io::Result<Vec<ViewedNamespace>> {
    let observed =
        for_each(processes, |process, limit| mount::observe(workers, process, limit)).await?;
    let viewed = observed.into_iter().filter_map(|(process, observed)| match observed {
        Ok(observed) if observed.views().next().is_some() || !observed.scratch.is_empty() => {
            Some(ViewedNamespace { process, observed })
        }
        Ok(_) => None,
        Err(e) => {
            if !e.is_no_target() && !e.is_large() {
                let pid = process.pid();
                let container = cgroup::container_of_process(pid).map(tracing::field::display);
                tracing::warn!(cause = %e, pid, container, "namespace skipped");
            }
            None
        }
    });
    let mut viewed: Vec<ViewedNamespace> = viewed.collect();
    viewed.sort_by_key(|v| v.process.pid());
    Ok(viewed)
}

/// Makes what lets the mounts of one container be detached together. Without it they are detached
/// one by one.
pub async fn prepare_scratch() {
    if let Err(cause) = blocking(mount::prepare_scratch).await {
        tracing::debug!(%cause, "no scratch mount");
    }
}

/// Runs a function that may take long for a runtime with a single thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// The summary of a pass over the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassSummary {
    /// Containers that were changed.
    pub containers: usize,
    /// View files that were changed.
    pub files: usize,
    /// Mount namespaces that were skipped, or in which a step failed, or with a view whose lxcfs is
    /// in an unknown state.
    pub failed: usize,
}

impl PassSummary {
    fn and(self, other: PassSummary) -> PassSummary {
        PassSummary {
            containers: self.containers + other.containers,
            files: self.files + other.files,
            failed: self.failed + other.failed,
        }
    }
}

impl fmt::Display for PassSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} view files in {} containers", self.files, self.containers)?;
        if self.failed > 0 { write!(f, ", {} namespaces failed", self.failed) } else { Ok(()) }
    }
}

/// Performs a task in the mount namespaces of these processes, many concurrently. `visited` gets
/// each process that the task was performed in.
async fn pass(
    workers: &Workers,
    processes: Vec<Arc<Process>>,
    task: &Task,
    visited: &impl Fn(&Process),
) -> io::Result<PassSummary> {
    let reconcile = |process: Arc<Process>, limit| async move {
        let done = mount::reconcile_within(workers, process.clone(), task.clone(), limit).await;
        let done = done.unwrap_or_else(|timeout| Err(timeout.error.into()));
        if done.is_ok() {
            visited(&process);
        }
        done
    };
    let mut summary = PassSummary::default();
    for (process, reconciled) in for_each(processes, reconcile).await? {
        let changed = match reconciled {
            Ok(outcome) => outcome.done.len(),
            Err(e) if e.is_no_target() => 0,
            Err(e) => {
                summary.failed += 1;
                if !e.is_large() {
                    let pid = process.pid();
                    let container = cgroup::container_of_process(pid).map(tracing::field::display);
                    tracing::warn!(cause = %e, pid, container, "failed to change a container");
                }
                e.into_outcome().done.len()
            }
        };
        summary.files += changed;
        summary.containers += usize::from(changed > 0);
    }
    Ok(summary)
}

/// Removes the view files of these lxcfs from every container of the node. Sends no lxcfs a
/// request.
///
/// # Errors
/// Fails if `/proc` cannot be listed.
#[allow(clippy::implicit_hasher, reason = "a handful of device numbers")]
pub async fn sweep(workers: &Workers, exited: HashSet<Dev>) -> io::Result<PassSummary> {
    everywhere(workers, &Task::Sweep(Arc::new(exited)), &|_| ()).await
}

/// Remounts the views of an lxcfs that has exited from another one. Sends neither a request.
/// `visited` gets each process whose namespace has no view of the exited one any more.
///
/// # Errors
/// Fails if `/proc` cannot be listed.
pub async fn recover(
    workers: &Workers,
    exited: Dev,
    lxcfs: Arc<LxcfsFiles>,
    visited: &impl Fn(&Process),
) -> io::Result<PassSummary> {
    everywhere(workers, &Task::Recover { exited, lxcfs }, visited).await
}

/// Performs a task in every mount namespace of the node.
async fn everywhere(
    workers: &Workers,
    task: &Task,
    visited: &impl Fn(&Process),
) -> io::Result<PassSummary> {
    let scan = blocking(|| {
        let mut scan = Scan::new()?;
        let processes = scan.processes()?;
        Ok((scan, processes))
    });
    let (scanned, ()) = futures::join!(scan, prepare_scratch());
    let (mut scan, processes) = scanned?;
    let summary = pass(workers, processes, task, visited).await?;
    // A node has many more threads than processes, and few of them have their own namespace.
    let threads = blocking(move || scan.threads()).await?;
    Ok(summary.and(pass(workers, threads, task, visited).await?))
}

/// Sweeps every lxcfs that has exited, by its device in containers that have a view of it, and
/// `hung`. Another lxcfs that hangs is left alone: on a node within a node it belongs to another
/// supervisor. A namespace with a view whose lxcfs may have exited counts as failed. Scratch
/// mounts that were left are removed, too.
///
/// # Errors
/// Fails if `/proc` cannot be listed.
pub async fn sweep_dead(workers: &Workers, hung: Option<Dev>) -> io::Result<PassSummary> {
    let viewed = views(workers).await?;
    let mut states = mount::liveness(workers, candidates(&viewed, |dev| hung == Some(dev))).await;
    states.extend(hung.map(|dev| (dev, Liveness::Disconnected)));
    let unknown = PassSummary { failed: log_unknown(&viewed, &states), ..PassSummary::default() };
    let exited = states.into_iter().filter(|(_, liveness)| *liveness == Liveness::Disconnected);
    let exited: HashSet<Dev> = exited.map(|(dev, _)| dev).collect();
    let has_scratch = viewed.iter().any(|viewed| !viewed.observed.scratch.is_empty());
    let swept = if exited.is_empty() && !has_scratch {
        PassSummary::default()
    } else {
        sweep(workers, exited).await?
    };
    Ok(swept.and(unknown))
}

/// Logs one namespace of each container that has a view whose lxcfs is in an unknown state. Returns
/// how many namespaces have one.
fn log_unknown(viewed: &[ViewedNamespace], states: &HashMap<Dev, Liveness>) -> usize {
    let mut logged = HashSet::new();
    let mut count = 0;
    for ViewedNamespace { process, observed } in viewed {
        let is_unknown = |(_, dev): &(ViewFile, Dev)| states.get(dev) == Some(&Liveness::Unknown);
        let Some((file, dev)) = observed.views().find(is_unknown) else { continue };
        count += 1;
        if logged.insert(owner(process)) {
            let pid = process.pid();
            tracing::warn!(pid, %file, %dev, "failed to determine whether the lxcfs has exited");
        }
    }
    count
}

/// The container of a process, or the process, if it is in none.
fn owner(process: &Process) -> Owner {
    cgroup::container_of_process(process.pid()).ok_or(process.pid())
}

/// The view files through which lxcfs can be probed, but those of a `known` device.
fn candidates(viewed: &[ViewedNamespace], known: impl Fn(Dev) -> bool) -> Vec<Candidate> {
    let mut candidates = Vec::new();
    for ViewedNamespace { process, observed } in viewed {
        let mut unknown = observed.views().filter(|(_, dev)| !known(*dev)).peekable();
        if unknown.peek().is_none() {
            continue;
        }
        let owner = owner(process);
        candidates.extend(unknown.map(|(file, dev)| Candidate {
            process: process.clone(),
            owner: owner.clone(),
            file,
            dev,
        }));
    }
    candidates
}

/// Logs the result of a sweep. Each namespace that failed has its own line before.
pub fn log_sweep(swept: &io::Result<PassSummary>) {
    match swept {
        Ok(summary) => {
            let (swept_files, failed) = (summary.files, summary.failed);
            if failed > 0 {
                tracing::warn!(swept_files, failed, %summary, "views of an exited lxcfs remain");
            } else if swept_files > 0 {
                tracing::info!(swept_files, %summary, "removed views of an exited lxcfs");
            }
        }
        Err(cause) => tracing::warn!(%cause, "failed to sweep the node"),
    }
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
    let processes: Vec<_> =
        views(workers).await?.into_iter().filter(stale).map(|viewed| viewed.process).collect();
    if processes.len() > 1 {
        prepare_scratch().await;
    }
    let task = Task::reconcile(DesiredView::REMOUNT_ONLY, Some(lxcfs.clone()));
    pass(workers, processes, &task, &|_| ()).await
}

/// The state of a view file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ViewState {
    /// It comes from the lxcfs that serves now.
    Current,
    /// It comes from another lxcfs, whose process still runs, or whose state is unknown.
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

/// The state of each lxcfs that has views in these namespaces. One probe, through one file of one
/// container, decides for all of them.
async fn states(
    workers: &Workers,
    viewed: &[ViewedNamespace],
    at_path: Option<(Dev, ViewState)>,
) -> HashMap<Dev, ViewState> {
    let at_path_dev = at_path.map(|(dev, _)| dev);
    let probed = mount::liveness(workers, candidates(viewed, |dev| at_path_dev == Some(dev)));
    let states = probed.await.into_iter().map(|(dev, liveness)| {
        let state = match liveness {
            Liveness::Alive | Liveness::Unknown => ViewState::Stale,
            Liveness::Disconnected | Liveness::Hung => ViewState::Dead,
        };
        (dev, state)
    });
    states.chain(at_path).collect()
}

/// The state of the worst file of each view of the node. Leaves out namespaces that only threads
/// are in: to search those too takes twice as long. `at_path` as for [`status`].
///
/// # Errors
/// Fails if `/proc` cannot be listed.
pub async fn worst_states(
    workers: &Workers,
    at_path: Option<(Dev, ViewState)>,
) -> io::Result<Vec<ViewState>> {
    let processes = blocking(|| Scan::new()?.processes()).await?;
    let viewed = viewed(workers, processes).await?;
    let states = states(workers, &viewed, at_path).await;
    let state = |dev| states.get(&dev).copied().unwrap_or(ViewState::Stale);
    let worst = |viewed: &ViewedNamespace| viewed.observed.views().map(|(_, dev)| state(dev)).max();
    Ok(viewed.iter().filter_map(worst).collect())
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
    let viewed = views(workers).await?;
    let states = states(workers, &viewed, at_path).await;
    let mut all = Vec::new();
    let with_view = |viewed: &ViewedNamespace| viewed.observed.views().next().is_some();
    let with_id = |viewed: ViewedNamespace| {
        let id = cgroup::container_of_process(viewed.process.pid());
        (viewed, id)
    };
    let viewed = viewed.into_iter().filter(with_view);
    let viewed: Vec<_> = blocking(move || Ok(viewed.map(with_id).collect())).await?;
    for (ViewedNamespace { process, observed }, id) in viewed {
        let state = |dev| states.get(&dev).copied().unwrap_or(ViewState::Stale);
        let files = observed.views().map(|(file, dev)| (file, state(dev))).collect();
        let pid = process.pid();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_take_turns() {
        let container =
            |(name, _): &(&str, u32)| (*name != "none").then(|| ContainerId::new(name).unwrap());
        let processes =
            [("a", 1), ("a", 2), ("a", 3), ("none", 4), ("b", 5), ("none", 6), ("b", 7)];
        let (first, further) = take_turns(processes.to_vec(), container);
        let numbers = |processes: Vec<(&str, u32)>| {
            processes.into_iter().map(|(_, number)| number).collect::<Vec<_>>()
        };
        assert_eq!(numbers(first), [1, 4, 5, 6]);
        assert_eq!(numbers(further), [2, 7, 3]);
    }
}
