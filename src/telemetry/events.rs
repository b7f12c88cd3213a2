//! Kubernetes Events on the pods (events.k8s.io/v1). Needs `create` on events. While the API server
//! is unavailable they wait in a queue.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::sync::mpsc;

use super::{Backoff, OutageLog};
use crate::model::text::one_line;

/// The pod that an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRef {
    pub uid: String,
    pub namespace: String,
    pub name: String,
}

/// The reason of an event (docs/reference.md).
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
    /// The event's `action`: what the agent did or tried.
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

    fn is_warning(self) -> bool {
        matches!(
            self,
            Reason::LxcfsInjectFailed
                | Reason::LxcfsInvalidAnnotation
                | Reason::LxcfsUnsupportedRuntime
        )
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
const MAX_NOTE_BYTES: usize = 1024;
/// The limit of one attempt.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The delay between attempts.
const RETRY: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(15));
/// An event is dropped after this time; the API server keeps events for an hour.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(600);
/// More events than these in the queue are dropped: views matter more than events.
const QUEUE_CAPACITY: usize = 1024;

/// The destination of events: the log, and with an API server the pods.
#[derive(Clone, Debug)]
pub struct Events(Option<mpsc::Sender<PodEvent>>);

impl Events {
    /// Events in the log only.
    pub fn to_log() -> Events {
        Events(None)
    }

    /// Events on the pods, reported by the agent on `node`, and the task that publishes them until
    /// the last clone is dropped.
    pub fn to_pods(
        client: Client,
        node: String,
    ) -> (Events, impl Future<Output = ()> + Send + 'static) {
        let (sender, mut queue) = mpsc::channel::<PodEvent>(QUEUE_CAPACITY);
        let publisher = async move {
            let mut outage = OutageLog::new("events");
            while let Some(event) = queue.recv().await {
                // A recorder folds equal events into a series that keeps the first one's note, but
                // each of these is a change.
                let reporter =
                    Reporter { controller: "kube-lxcfs".into(), instance: Some(node.clone()) };
                publish_with_retries(&Recorder::new(client.clone(), reporter), event, &mut outage)
                    .await;
            }
        };
        (Events(Some(sender)), publisher)
    }

    /// Reports an event. Never blocks.
    pub fn publish(&self, mut event: PodEvent) {
        // Notes quote annotations and errors.
        event.note = one_line(&event.note).into_owned();
        let PodEvent { pod, reason, note } = &event;
        let pod = format!("{}/{}", pod.namespace, pod.name);
        if reason.is_warning() {
            tracing::warn!(pod, ?reason, note, "pod event");
        } else {
            // The log already has it, container by container.
            tracing::debug!(pod, ?reason, note, "pod event");
        }
        if let Some(sender) = &self.0
            && sender.try_send(event).is_err()
        {
            tracing::warn!(pod, "event dropped, the queue for the API server is full");
        }
    }
}

/// Whether a retry is useless: the event is malformed, or its namespace does not exist or is being
/// deleted. An API server that has just started forbids every request until it has read its roles.
fn is_final(status: &kube::core::Status) -> bool {
    match status.code {
        403 => status.message.contains("being terminated"),
        400 | 404 | 405 | 409 | 422 => true,
        _ => false,
    }
}

async fn publish_with_retries(
    recorder: &Recorder,
    PodEvent { pod, reason, mut note }: PodEvent,
    outage: &mut OutageLog,
) {
    if note.len() > MAX_NOTE_BYTES {
        note.truncate(note.floor_char_boundary(MAX_NOTE_BYTES - '…'.len_utf8()));
        note.push('…');
    }
    let event = Event {
        type_: if reason.is_warning() { EventType::Warning } else { EventType::Normal },
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
    let started = Instant::now();
    let mut delays = RETRY.start();
    loop {
        let why = match tokio::time::timeout(TIMEOUT, recorder.publish(&event, &regarding)).await {
            Ok(Ok(())) => return outage.recovered("events are published again"),
            Ok(Err(kube::Error::Api(status))) if is_final(&status) => {
                tracing::warn!(
                    pod = format!("{namespace}/{name}"),
                    ?reason,
                    cause = status.message,
                    "event refused"
                );
                return;
            }
            Ok(Err(e)) => e.to_string(),
            Err(_) => format!("timed out after {TIMEOUT:?}"),
        };
        if started.elapsed() > PUBLISH_DEADLINE {
            tracing::warn!(
                pod = format!("{namespace}/{name}"),
                ?reason,
                cause = why,
                "event dropped after retries"
            );
            return;
        }
        outage.failed("failed to publish events", &why);
        tokio::time::sleep(delays.next_delay()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn note_is_published_on_one_line() {
        let (sender, mut queue) = mpsc::channel(1);
        let pod = PodRef { uid: "u".into(), namespace: "n".into(), name: "p".into() };
        let note = "a\nb\u{1b}[2J".into();
        Events(Some(sender)).publish(PodEvent { pod, reason: Reason::LxcfsInjected, note });
        assert_eq!(queue.try_recv().unwrap().note, r"a\nb\u{1b}[2J");
    }

    #[test]
    fn action_says_what_was_done() {
        for (reason, action) in [
            (Reason::LxcfsInjected, "Inject"),
            (Reason::LxcfsInjectFailed, "Inject"),
            (Reason::LxcfsRemoved, "Remove"),
            (Reason::LxcfsRemounted, "Remount"),
        ] {
            assert_eq!(reason.action(), action);
        }
    }
}
