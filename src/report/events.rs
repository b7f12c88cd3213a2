//! Kubernetes Events on the pods (events.k8s.io/v1). Needs `create` on events; while the API server is away they wait.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::sync::mpsc;

use super::OutageLog;

/// The pod an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRef {
    pub uid: String,
    pub namespace: String,
    pub name: String,
}

/// Why an event is told: the reasons of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    LxcfsInjected,
    LxcfsRemoved,
    LxcfsRemounted,
    LxcfsInjectFailed,
    LxcfsInvalidAnnotation,
    LxcfsUnsupportedRuntime,
}

impl Reason {
    /// What the agent did or tried, in the words of the event's `action`.
    fn action(self) -> &'static str {
        match self {
            Reason::LxcfsInjected
            | Reason::LxcfsInjectFailed
            | Reason::LxcfsInvalidAnnotation
            | Reason::LxcfsUnsupportedRuntime => "Inject",
            Reason::LxcfsRemoved => "Remove",
            Reason::LxcfsRemounted => "Remount",
        }
    }

    fn warns(self) -> bool {
        matches!(self, Reason::LxcfsInjectFailed | Reason::LxcfsInvalidAnnotation | Reason::LxcfsUnsupportedRuntime)
    }
}

/// One event: one per pod and change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodEvent {
    pub pod: PodRef,
    pub reason: Reason,
    pub note: String,
}

/// The API's limit for an event's note, in bytes.
const LONGEST_NOTE: usize = 1024;
/// So long one try may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The first and the longest wait before another try.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// So long an event is tried before it is given up; the API server keeps events for an hour.
const GIVE_UP: Duration = Duration::from_secs(600);
/// More events than these waiting are dropped: views matter more than events.
const MOST_WAITING: usize = 1024;

/// Where events go: to the log, and with an API server onto the pods.
#[derive(Clone, Debug)]
pub struct Events(Option<mpsc::Sender<PodEvent>>);

impl Events {
    /// Events in the log alone.
    pub fn to_log() -> Events {
        Events(None)
    }

    /// Events on the pods, reported by the agent on `node`, and the task that publishes them until the last clone is dropped.
    pub fn to_pods(client: Client, node: String) -> (Events, impl Future<Output = ()> + Send + 'static) {
        let (sender, mut waiting) = mpsc::channel::<PodEvent>(MOST_WAITING);
        let publisher = async move {
            let mut outage = OutageLog::new("events");
            while let Some(event) = waiting.recv().await {
                // A recorder folds events alike into a series that keeps the first one's note; each of ours is a change.
                let reporter = Reporter { controller: "kube-lxcfs".into(), instance: Some(node.clone()) };
                publish(&Recorder::new(client.clone(), reporter), event, &mut outage).await;
            }
        };
        (Events(Some(sender)), publisher)
    }

    /// Tells an event; never waits.
    pub fn tell(&self, event: PodEvent) {
        let PodEvent { pod, reason, note } = &event;
        let pod = format!("{}/{}", pod.namespace, pod.name);
        if reason.warns() {
            tracing::warn!(pod, ?reason, "{note}");
        } else {
            // The log has it already, container by container.
            tracing::debug!(pod, ?reason, "{note}");
        }
        if let Some(sender) = &self.0
            && sender.try_send(event).is_err()
        {
            tracing::warn!(pod, "an event was dropped: too many wait for the API server");
        }
    }
}

/// Whether another try changes nothing: the event is malformed, or its namespace is gone or going. An API server that
/// has just begun forbids everything for a moment, until it has read its roles.
fn is_final(status: &kube::core::Status) -> bool {
    match status.code {
        403 => status.message.contains("being terminated"),
        400 | 404 | 405 | 409 | 422 => true,
        _ => false,
    }
}

async fn publish(recorder: &Recorder, PodEvent { pod, reason, mut note }: PodEvent, outage: &mut OutageLog) {
    if note.len() > LONGEST_NOTE {
        note.truncate(note.floor_char_boundary(LONGEST_NOTE - '…'.len_utf8()));
        note.push('…');
    }
    let event = Event {
        type_: if reason.warns() { EventType::Warning } else { EventType::Normal },
        reason: format!("{reason:?}"),
        note: Some(note),
        action: reason.action().into(),
        secondary: None,
    };
    let regarding = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        name: Some(pod.name.clone()),
        namespace: Some(pod.namespace.clone()),
        uid: Some(pod.uid),
        ..ObjectReference::default()
    };
    let (namespace, name) = (pod.namespace, pod.name);
    let begun = Instant::now();
    let mut wait = RETRY.0;
    loop {
        let why = match tokio::time::timeout(TIMEOUT, recorder.publish(&event, &regarding)).await {
            Ok(Ok(())) => return outage.recovered("events are published again"),
            Ok(Err(kube::Error::Api(status))) if is_final(&status) => {
                tracing::warn!("event {reason:?} on pod {namespace}/{name} was refused: {}", status.message);
                return;
            }
            Ok(Err(e)) => e.to_string(),
            Err(_) => format!("no answer within {TIMEOUT:?}"),
        };
        if begun.elapsed() > GIVE_UP {
            tracing::warn!("event {reason:?} on pod {namespace}/{name} was given up: {why}");
            return;
        }
        outage.failed("failed to publish events", &why);
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RETRY.1);
    }
}
