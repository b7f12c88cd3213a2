//! `kube-lxcfs mount`, `umount` and `remount`: reconcile the chosen containers once.

use std::{collections::BTreeMap, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, stream};
use serde::Serialize;

use super::{output::print, workers};
use crate::{
    args::{Common, Output, Target, TargetOrAll},
    lxcfs,
    model::{
        container_id::ContainerId,
        status::Operation,
        view::{FileSet, ViewFile},
    },
    mount::{self, Outcome, Task, Workers},
    node,
    plan::DesiredView,
    runtime::{Runtime, cgroup, cri::CriClient},
    sys::{process::Process, syscalls::Purpose},
};

/// The time that `remount --all` waits for an lxcfs that is starting.
const STARTUP_WAIT: Duration = Duration::from_secs(5);
/// The limit of containers that a command changes concurrently.
const CONCURRENCY: usize = 48;

pub(super) async fn mount(
    common: Common,
    target: Target,
    files: Option<FileSet>,
    output: Output,
) -> Result<ExitCode> {
    let workers = workers(None, Purpose::Mount)?;
    let process = process(&common, target.pid, target.container.as_deref()).await?;
    let lxcfs = lxcfs::find(&workers, &common.lxcfs_path).await?;
    let desired = DesiredView::AtLeast(files.unwrap_or(FileSet::ALL));
    let task = Task::reconcile(desired, Some(lxcfs));
    apply_and_print(&workers, vec![(process, None)], task, output).await
}

pub(super) async fn umount(
    common: Common,
    target: TargetOrAll,
    output: Output,
) -> Result<ExitCode> {
    let workers = workers(None, Purpose::Remove)?;
    let task = Task::reconcile(DesiredView::Absent, None);
    let processes = processes(&workers, &common, target, &task).await?;
    apply_and_print(&workers, processes, task, output).await
}

pub(super) async fn remount(
    common: Common,
    target: TargetOrAll,
    output: Output,
) -> Result<ExitCode> {
    let workers = workers(None, Purpose::Mount)?;
    // As ExecStartPost= of a systemd unit it runs as soon as lxcfs was started, which may be before
    // lxcfs serves.
    let timeout = if target.all { STARTUP_WAIT } else { Duration::ZERO };
    let lxcfs = lxcfs::wait_until_serving(timeout, &workers, &common.lxcfs_path).await?;
    let task = Task::reconcile(DesiredView::REMOUNT_ONLY, Some(lxcfs));
    let processes = processes(&workers, &common, target, &task).await?;
    apply_and_print(&workers, processes, task, output).await
}

async fn process(
    common: &Common,
    pid: Option<i64>,
    container: Option<&str>,
) -> Result<Arc<Process>> {
    if let Some(pid) = pid {
        return Ok(Arc::new(Process::open(pid)?));
    }
    let prefix = ContainerId::from_url(container.unwrap_or_default())?;
    let cri = CriClient::new(common.cri_endpoint.clone(), common.host_root.clone());
    let runtime = Runtime::new(common.pid_from, cri);
    let running = runtime.running().await?;
    Ok(runtime.process(match_prefix(&running, &prefix)?, None).await?)
}

/// The only id with this prefix, or the one that equals it.
fn match_prefix<'a>(running: &'a [ContainerId], prefix: &ContainerId) -> Result<&'a ContainerId> {
    let matching: Vec<_> =
        running.iter().filter(|id| id.as_str().starts_with(prefix.as_str())).collect();
    match matching.as_slice() {
        [] => bail!("container '{prefix}': no running container has an id with this prefix"),
        [id] => Ok(id),
        several => several.iter().find(|id| **id == prefix).copied().with_context(|| {
            let ids: Vec<_> = several.iter().map(|id| id.short()).collect();
            let count = ids.len();
            format!(
                "container '{prefix}': {count} running containers have an id with this prefix: {}",
                ids.join(", ")
            )
        }),
    }
}

/// A process, and the outcome of the command's task if it is known to need no step.
type ProcessAndOutcome = (Arc<Process>, Option<Outcome>);

async fn processes(
    workers: &Workers,
    common: &Common,
    target: TargetOrAll,
    task: &Task,
) -> Result<Vec<ProcessAndOutcome>> {
    if target.all {
        let viewed = node::views(workers).await.context("failed to scan /proc")?;
        let with_outcome =
            viewed.into_iter().map(|v| (v.process, task.outcome_without_steps(&v.observed)));
        return Ok(with_outcome.collect());
    }
    Ok(vec![(process(common, target.pid, target.container.as_deref()).await?, None)])
}

/// The changes that a command made to one container.
#[derive(Debug, Serialize)]
struct ContainerReport {
    pid: i32,
    id: Option<ContainerId>,
    injected: FileSet,
    remounted: FileSet,
    removed: FileSet,
    skipped: BTreeMap<ViewFile, String>,
    error: Option<String>,
}

impl ContainerReport {
    fn new(pid: i32, outcome: Outcome, error: Option<String>) -> ContainerReport {
        let mut report = ContainerReport {
            pid,
            id: cgroup::container_of_process(pid),
            injected: FileSet::NONE,
            remounted: FileSet::NONE,
            removed: FileSet::NONE,
            skipped: outcome
                .skipped
                .into_iter()
                .map(|(file, why)| (file, why.to_string()))
                .collect(),
            error,
        };
        for step in outcome.done {
            let files = match step.operation() {
                Operation::Inject => &mut report.injected,
                Operation::Remount => &mut report.remounted,
                Operation::Remove => &mut report.removed,
            };
            files.insert(step.file());
        }
        report
    }

    fn lines(&self) -> Vec<String> {
        let container = match &self.id {
            Some(id) => format!("container {} (pid {})", id.short(), self.pid),
            None => format!("pid {}", self.pid),
        };
        let changes =
            [("injected", self.injected), ("remounted", self.remounted), ("removed", self.removed)];
        let non_empty = changes.into_iter().filter(|(_, files)| !files.is_empty());
        let mut lines: Vec<String> =
            non_empty.map(|(verb, files)| format!("{container}: {verb} {files}")).collect();
        lines.extend(
            self.skipped.iter().map(|(file, why)| format!("{container}: skipped {file}: {why}")),
        );
        if lines.is_empty() && self.error.is_none() {
            lines.push(format!("{container}: nothing to do"));
        }
        lines
    }
}

/// Reconciles each process's mount namespace and prints the changes.
async fn apply_and_print(
    workers: &Workers,
    processes: Vec<ProcessAndOutcome>,
    task: Task,
    output: Output,
) -> Result<ExitCode> {
    let changing = processes.iter().filter(|(_, outcome)| outcome.is_none()).count();
    if changing > 1 {
        node::prepare_scratch().await;
    }
    let reconciles = stream::iter(processes).map(|(process, outcome)| {
        let task = task.clone();
        async move {
            let pid = process.pid();
            if let Some(outcome) = outcome {
                return ContainerReport::new(pid, outcome, None);
            }
            let reconciled = mount::reconcile(workers, process, task).await;
            match reconciled.unwrap_or_else(|timeout| Err(timeout.error.into())) {
                Ok(outcome) => ContainerReport::new(pid, outcome, None),
                Err(e) => {
                    let error = e.to_string();
                    ContainerReport::new(pid, e.into_outcome(), Some(error))
                }
            }
        }
    });
    let reports: Vec<ContainerReport> = reconciles.buffered(CONCURRENCY).collect().await;
    print(output, &reports, || reports.iter().flat_map(ContainerReport::lines).collect())?;
    let errors: Vec<&str> = reports.iter().filter_map(|c| c.error.as_deref()).collect();
    match errors.as_slice() {
        [] => Ok(ExitCode::SUCCESS),
        [error] => bail!("{error}"),
        [first, ..] => {
            bail!("{} of {} containers failed, the first: {first}", errors.len(), reports.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_matches_one_container() {
        let id = |text: &str| ContainerId::new(text).unwrap();
        let running = [id("abc"), id("abcd"), id("xyz")];
        assert_eq!(match_prefix(&running, &id("x")).unwrap(), &running[2]);
        assert_eq!(match_prefix(&running, &id("abc")).unwrap(), &running[0], "an exact match wins");
        let error = match_prefix(&running, &id("ab")).unwrap_err().to_string();
        assert!(error.contains("2 running containers"), "{error}");
        let error = match_prefix(&running, &id("q")).unwrap_err().to_string();
        assert!(error.contains("no running container"), "{error}");
    }
}
