//! The runtime over CRI: pod sandboxes with their annotations (`--pods-from cri`), and container
//! events.
//!
//! Annotations of a sandbox never change, and there are no namespace labels.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use k8s_cri::v1::{
    ContainerEventResponse, ContainerEventType, ContainerState, PodSandboxMetadata,
    PodSandboxStatus,
};
use tokio::sync::{mpsc::Sender, watch};

use crate::{
    model::{
        container_id::ContainerId,
        pod::{Annotations, Container, Pod, StartedContainer, Trigger, Update},
    },
    runtime::cri::{CriClient, Error, NextEvent},
    telemetry::{
        Backoff, OutageLog,
        metrics::{Metrics, Watched},
    },
};

/// The interval between lists of the pod sandboxes.
const LIST_INTERVAL: Duration = Duration::from_secs(30);
/// The delays before the first repeated lists: 1, 3 and 10 s after the first. A subscription to
/// events becomes live at an unknown moment, and a container may start before it.
const EARLY_LISTS: [Duration; 3] =
    [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(7)];
/// The delay before the next list after a failure.
const LIST_RETRY: Backoff = Backoff::new(Duration::from_secs(1), LIST_INTERVAL);
/// The delay before events are requested again.
const EVENTS_RETRY: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));

/// How long after the start of a stream the events come that the runtime has kept for it.
const KEPT_EVENTS: Duration = Duration::from_secs(10);

/// Lists the pod sandboxes periodically until the receiver is dropped.
pub async fn watch(cri: CriClient, updates: Sender<Update>, metrics: Arc<Metrics>) {
    let mut outage = OutageLog::new("pods");
    let mut delays = LIST_RETRY.start();
    let mut intervals = list_intervals();
    loop {
        match list_pods(&cri).await {
            Ok(pods) => {
                outage.recovered("the runtime lists pods again");
                delays.reset();
                if updates.send(Update::PodsReplaced(pods)).await.is_err() {
                    return;
                }
                tokio::time::sleep(intervals.next().unwrap_or(LIST_INTERVAL)).await;
            }
            Err(e) => {
                metrics.watch_failed(Watched::Pods);
                outage.failed("failed to list pods from the runtime", &e);
                // The events were interrupted too.
                intervals = list_intervals();
                tokio::time::sleep(delays.next_delay()).await;
            }
        }
    }
}

/// The delays between lists: [`EARLY_LISTS`], then [`LIST_INTERVAL`].
fn list_intervals() -> impl Iterator<Item = Duration> {
    EARLY_LISTS.into_iter().chain(std::iter::repeat(LIST_INTERVAL))
}

/// The pods of all ready sandboxes with their running containers.
///
/// # Errors
/// Fails if the runtime does not respond.
pub async fn list_pods(cri: &CriClient) -> Result<Vec<Pod>, Error> {
    let sandboxes = sandboxes(cri).await?;
    let mut containers: HashMap<String, Vec<Container>> = HashMap::new();
    for container in cri.list_running().await? {
        let Ok(id) = ContainerId::new(&container.id) else { continue };
        let name = container.metadata.map(|m| m.name).unwrap_or_default();
        containers.entry(container.pod_sandbox_id).or_default().push(Container {
            name,
            id: Some(id),
            nests_containers: false,
        });
    }
    let with_containers = |(id, pod): (String, Pod)| Pod {
        containers: containers.remove(&id).unwrap_or_default(),
        ..pod
    };
    Ok(sandboxes.into_iter().map(with_containers).collect())
}

/// As [`list_pods`], but empty where the runtime does not respond: a list of views without their
/// pods' names is better than none.
pub async fn list_pods_or_none(cri: &CriClient) -> Vec<Pod> {
    list_pods(cri).await.unwrap_or_else(|e| {
        tracing::warn!(cause = %e, "views are shown without their pods' names");
        Vec::new()
    })
}

/// Reports starts and stops of containers from the runtime's events (`GetContainerEvents`), until
/// the receiver is dropped. While NRI is connected, which reports the same, there is no stream: the
/// runtime describes the whole pod in each of several events of a start. A runtime without events,
/// as containerd before 1.7, is queried once.
pub async fn watch_events(
    cri: CriClient,
    updates: Sender<Update>,
    mut nri_connected: watch::Receiver<bool>,
) {
    let mut delays = EVENTS_RETRY.start();
    while !updates.is_closed() {
        if *nri_connected.borrow() {
            tracing::debug!("NRI is connected, container events are not received");
            until(&mut nri_connected, false).await;
            delays.reset();
        }
        let started = Instant::now();
        let forwarded = tokio::select! {
            forwarded = forward_events(&cri, &updates) => forwarded,
            () = until(&mut nri_connected, true) => continue,
        };
        match forwarded {
            // CRI-O without evented PLEG closes every stream immediately.
            Ok(NextEvent::Event(_) | NextEvent::Closed) => {}
            Ok(NextEvent::Unsupported) => {
                tracing::debug!("the runtime has no container events");
                return updates.closed().await;
            }
            // The components that need the runtime report its outage.
            Err(e) => tracing::debug!(cause = %e, "container events stopped"),
        }
        if started.elapsed() > EVENTS_RETRY.longest {
            delays.reset();
        }
        tokio::select! {
            () = tokio::time::sleep(delays.next_delay()) => {}
            () = until(&mut nri_connected, true) => {}
        }
    }
}

/// Waits until NRI is connected, or not. It never is again once its task has ended.
async fn until(nri_connected: &mut watch::Receiver<bool>, wanted: bool) {
    if nri_connected.wait_for(|connected| *connected == wanted).await.is_err() && wanted {
        std::future::pending::<()>().await;
    }
}

/// Forwards one stream of events to its end.
async fn forward_events(cri: &CriClient, updates: &Sender<Update>) -> Result<NextEvent, Error> {
    let (started, opened) = (Instant::now(), SystemTime::now());
    let mut stream = cri.events().await?;
    // Containers that started while no stream was open. Listed beside the stream, and again until
    // the subscription is live on a loaded node too: no response confirms it.
    let missed = async {
        for delay in [EVENTS_RETRY.first].into_iter().chain(EARLY_LISTS) {
            tokio::time::sleep(delay).await;
            let requested_at = Instant::now();
            match list_started(cri).await {
                Ok(containers) => {
                    let trigger = Trigger::Cri;
                    let _ = updates
                        .send(Update::ContainersListed { containers, trigger, requested_at })
                        .await;
                }
                Err(e) => tracing::debug!(cause = %e, "failed to list containers"),
            }
        }
    };
    let events = async {
        loop {
            match stream.next().await? {
                NextEvent::Event(event) => {
                    // Not later: the clock may be set back.
                    let may_be_old = started.elapsed() < KEPT_EVENTS;
                    if !(may_be_old && is_from_before(&event, opened))
                        && let Some(update) = update(*event)
                        && updates.send(update).await.is_err()
                    {
                        return Ok(NextEvent::Closed);
                    }
                }
                end => return Ok(end),
            }
        }
    };
    tokio::pin!(events, missed);
    tokio::select! {
        end = &mut events => return end,
        () = &mut missed => {}
    }
    events.await
}

/// The containers that are created or running, each with its pod.
async fn list_started(cri: &CriClient) -> Result<Vec<StartedContainer>, Error> {
    let pods: HashMap<String, Pod> = sandboxes(cri).await?.into_iter().collect();
    let started = |container: k8s_cri::v1::Container| {
        let pod = pods.get(&container.pod_sandbox_id)?.clone();
        let id = ContainerId::new(&container.id).ok()?;
        Some(StartedContainer {
            pod,
            name: container.metadata.unwrap_or_default().name,
            id,
            pid: None,
        })
    };
    Ok(cri.list_created_or_running().await?.into_iter().filter_map(started).collect())
}

/// The pods of all ready sandboxes by sandbox id, without their containers.
async fn sandboxes(cri: &CriClient) -> Result<Vec<(String, Pod)>, Error> {
    let sandboxes = cri.list_ready_sandboxes().await?.into_iter();
    Ok(sandboxes
        .map(|s| (s.id, into_pod(s.metadata.unwrap_or_default(), s.labels, &s.annotations)))
        .collect())
}

/// A pod as its sandbox describes it, without its containers.
fn into_pod(
    metadata: PodSandboxMetadata,
    labels: HashMap<String, String>,
    annotations: &HashMap<String, String>,
) -> Pod {
    Pod {
        uid: metadata.uid,
        namespace: metadata.namespace,
        name: metadata.name,
        annotations: Annotations::from_map(annotations),
        labels: labels.into_iter().collect(),
        containers: Vec::new(),
    }
}

/// Whether an event is from before this time, which a runtime kept because no client received it:
/// containerd does for 5 minutes. The lists beside the stream have what it led to.
fn is_from_before(event: &ContainerEventResponse, opened: SystemTime) -> bool {
    let created = Duration::from_nanos(event.created_at.try_into().unwrap_or(0));
    !created.is_zero() && SystemTime::UNIX_EPOCH + created < opened
}

/// Converts an event of a container. Sandboxes have events too, without a container's status, which
/// are ignored.
fn update(event: ContainerEventResponse) -> Option<Update> {
    let id = ContainerId::new(&event.container_id).ok()?;
    let kind = event.container_event_type();
    if let ContainerEventType::ContainerStoppedEvent | ContainerEventType::ContainerDeletedEvent =
        kind
    {
        return Some(Update::ContainerStopped(id));
    }
    let status =
        event.containers_statuses.into_iter().find(|status| status.id == event.container_id)?;
    let PodSandboxStatus { metadata, labels, annotations, .. } = event.pod_sandbox_status?;
    // The event may have waited for the stream.
    if kind != ContainerEventType::ContainerStartedEvent
        || status.state != ContainerState::ContainerRunning as i32
    {
        return None;
    }
    let pod = into_pod(metadata?, labels, &annotations);
    Some(Update::ContainerStarted(
        StartedContainer { pod, name: status.metadata?.name, id, pid: None },
        Trigger::Cri,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_events_are_from_before_the_stream() {
        let opened = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        let is_old = |created_at| {
            is_from_before(&ContainerEventResponse { created_at, ..Default::default() }, opened)
        };
        let second = 1_000_000_000;
        // A runtime may send no time.
        let times = [-1, 0, 1, 99 * second, 100 * second, 101 * second, i64::MAX];
        assert_eq!(times.map(is_old), [false, false, true, true, false, false, false]);
    }

    #[test]
    fn early_lists_come_after_1_3_and_10_seconds() {
        let mut at = 0;
        let times: Vec<u64> = list_intervals()
            .take(5)
            .map(|delay| {
                at += delay.as_secs();
                at
            })
            .collect();
        assert_eq!(times, [1, 3, 10, 40, 70]);
    }
}
