//! The node as it is: every mount namespace once, and which views are in them. Needs no runtime and no API server.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt, io,
    os::unix::fs::MetadataExt,
    pin::pin,
    sync::Arc,
};

use futures::{StreamExt, stream};
use serde::Serialize;

use crate::{
    mount::{self, Answer, Process, Source, Task, Workers},
    plan::{Dev, There, Wish},
    runtime::{self, ContainerId},
    view::ViewFile,
};

/// How many namespaces are looked at side by side.
const AT_ONCE: usize = 128;

/// One process of every mount namespace of this node but our own.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn namespaces() -> io::Result<Vec<Arc<Process>>> {
    let id = |path: String| std::fs::metadata(path).map(|m| (m.dev(), m.ino()));
    let mut seen = HashSet::from([id("/proc/self/ns/mnt".into())?]);
    let mut processes = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry.ok().and_then(|e| e.file_name().to_str()?.parse::<i64>().ok()) else { continue };
        // A process may end at any moment, and a kernel thread or a zombie has no namespace to look at.
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
pub struct Viewed {
    pub process: Arc<Process>,
    pub there: There,
}

/// Every mount namespace that has a view of ours. Those that cannot be looked at are left out; the log says why.
///
/// # Errors
/// When `/proc` cannot be listed.
pub async fn views(workers: &Workers) -> io::Result<Vec<Viewed>> {
    let processes = namespaces()?;
    let looked = stream::iter(processes).map(|process| async move {
        match mount::observe(workers, process.clone()).await {
            Ok(there) if there.views().next().is_some() => Some(Viewed { process, there }),
            Ok(_) | Err(mount::Error::Ended(_) | mount::Error::Host(_) | mount::Error::Own(_)) => None,
            Err(e) => {
                tracing::warn!("left out: {e}");
                None
            }
        }
    });
    let mut viewed: Vec<Viewed> = looked.buffer_unordered(AT_ONCE).filter_map(async |v| v).collect().await;
    viewed.sort_by_key(|v| v.process.pid());
    Ok(viewed)
}

/// What a pass over the node did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    pub containers: usize,
    pub files: usize,
    /// Containers that it could not be done to.
    pub failed: usize,
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} view files in {} containers", self.files, self.containers)?;
        if self.failed > 0 { write!(f, ", {} containers failed", self.failed) } else { Ok(()) }
    }
}

/// Does a task in every mount namespace of the node, many side by side.
async fn pass(workers: &Workers, processes: Vec<Arc<Process>>, task: &Task) -> Pass {
    let visits = stream::iter(processes).map(|process| async move {
        let visited = mount::run(workers, process, task.clone()).await;
        visited.unwrap_or_else(|late| Err(late.error.into()))
    });
    let mut pass = Pass::default();
    let mut visits = pin!(visits.buffer_unordered(AT_ONCE));
    while let Some(visited) = visits.next().await {
        let done = match visited {
            Ok(outcome) => outcome.done.len(),
            Err(mount::Error::Ended(_) | mount::Error::Host(_) | mount::Error::Own(_)) => 0,
            Err(e) => {
                pass.failed += 1;
                tracing::warn!("{e}");
                if let mount::Error::Steps { outcome, .. } = e { outcome.done.len() } else { 0 }
            }
        };
        pass.files += done;
        pass.containers += usize::from(done > 0);
    }
    pass
}

/// Gives every container of the node its own files back where a view file is of these lxcfs. Asks no lxcfs anything.
///
/// # Errors
/// When `/proc` cannot be listed.
#[allow(clippy::implicit_hasher, reason = "a handful of device numbers")]
pub async fn sweep(workers: &Workers, of: HashSet<Dev>) -> io::Result<Pass> {
    Ok(pass(workers, namespaces()?, &Task::Sweep(Arc::new(of))).await)
}

/// The same for every lxcfs that is gone, each asked in a container that has a view of it, and for `hung`. One that merely hangs is
/// not ours to judge: on a node within a node it is somebody else's.
///
/// # Errors
/// When `/proc` cannot be listed.
pub async fn sweep_dead(workers: &Workers, hung: Option<Dev>) -> io::Result<Pass> {
    let mut answers: HashMap<Dev, Answer> = hung.into_iter().map(|dev| (dev, Answer::Gone)).collect();
    for Viewed { process, there } in views(workers).await? {
        for (file, dev) in there.views() {
            if answers.get(&dev).is_none_or(|answer| *answer == Answer::Unknown) {
                answers.insert(dev, mount::ask(workers, process.clone(), file).await);
            }
        }
    }
    let gone: HashSet<Dev> = answers.into_iter().filter(|(_, a)| *a == Answer::Gone).map(|(dev, _)| dev).collect();
    if gone.is_empty() { Ok(Pass::default()) } else { sweep(workers, gone).await }
}

/// Makes every view of the node current that comes from one of these lxcfs.
///
/// # Errors
/// When `/proc` cannot be listed.
pub async fn refresh(workers: &Workers, source: &Arc<Source>, of: impl Fn(Dev) -> bool) -> io::Result<Pass> {
    let stale = |viewed: &Viewed| viewed.there.views().any(|(_, dev)| dev != source.dev && of(dev));
    let processes = views(workers).await?.into_iter().filter(stale).map(|viewed| viewed.process).collect();
    Ok(pass(workers, processes, &Task::wish(Wish::REFRESH, Some(source.clone()))).await)
}

/// Whether the lxcfs behind a view file answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It comes from the lxcfs that serves now.
    Current,
    /// It comes from another lxcfs, which still answers.
    Stale,
    /// Its lxcfs is gone, or hangs.
    Dead,
}

/// The view of one container, as `status` shows it.
#[derive(Debug, Serialize)]
pub struct Status {
    pub namespace: Option<String>,
    pub pod: Option<String>,
    pub container: Option<String>,
    pub id: Option<ContainerId>,
    pub pid: i32,
    pub files: BTreeMap<ViewFile, State>,
}

/// The views of this node. `serving` is the lxcfs that serves now; names are added where the runtime can tell them.
///
/// # Errors
/// When `/proc` cannot be listed.
pub async fn status(
    workers: &Workers,
    serving: Option<Dev>,
    cri: Option<&runtime::cri::Cri>,
) -> io::Result<Vec<Status>> {
    let mut names = HashMap::new();
    if let Some(cri) = cri {
        match cri.pods().await {
            Ok(pods) => {
                for pod in pods {
                    for container in pod.containers {
                        let Some(id) = container.id else { continue };
                        names.insert(id, (pod.namespace.clone(), pod.name.clone(), container.name));
                    }
                }
            }
            Err(e) => tracing::warn!("pods and containers are shown without their names: {e}"),
        }
    }
    // One file of one container tells for all views of an lxcfs.
    let mut answers: HashMap<Dev, State> = serving.into_iter().map(|dev| (dev, State::Current)).collect();
    let mut all = Vec::new();
    for Viewed { process, there } in views(workers).await? {
        let mut files = BTreeMap::new();
        for (file, dev) in there.views() {
            let asked = match answers.get(&dev) {
                Some(state) => Some(*state),
                None => match mount::ask(workers, process.clone(), file).await {
                    Answer::Answers => Some(State::Stale),
                    Answer::Gone | Answer::Hangs => Some(State::Dead),
                    // The next container that has a view of it is asked.
                    Answer::Unknown => None,
                },
            };
            answers.extend(asked.map(|state| (dev, state)));
            let state = asked.unwrap_or(State::Stale);
            files.insert(file, state);
        }
        let pid = process.pid();
        let id = runtime::proc::container(pid);
        let (namespace, pod, container) = match id.as_ref().and_then(|id| names.remove(id)) {
            Some((namespace, pod, container)) => (Some(namespace), Some(pod), Some(container)),
            None => (None, None, None),
        };
        all.push(Status { namespace, pod, container, id, pid, files });
    }
    all.sort_by(|a, b| (&a.namespace, &a.pod, &a.container, a.pid).cmp(&(&b.namespace, &b.pod, &b.container, b.pid)));
    Ok(all)
}
