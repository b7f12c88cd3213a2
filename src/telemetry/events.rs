//! Kubernetes Events on pods and namespaces (events.k8s.io/v1). Needs `create` on events. While the
//! API server is unavailable they wait in a queue.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1 as events},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::PostParams,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::sync::mpsc;

use super::{
    Backoff, OutageLog,
    metrics::{DropReason, Metrics},
};
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

/// An event about the label of a namespace: one per value, whichever agents notice it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceEvent {
    pub namespace: String,
    /// The invalid value.
    pub value: String,
    pub note: String,
}

/// An event that waits for the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Queued {
    Pod(PodEvent),
    Namespace(NamespaceEvent),
}

impl Queued {
    /// Its object in the log.
    fn object(&self) -> String {
        match self {
            Queued::Pod(PodEvent { pod, .. }) => format!("{}/{}", pod.namespace, pod.name),
            Queued::Namespace(NamespaceEvent { namespace, .. }) => namespace.clone(),
        }
    }

    fn note_mut(&mut self) -> &mut String {
        match self {
            Queued::Pod(PodEvent { note, .. }) | Queued::Namespace(NamespaceEvent { note, .. }) => {
                note
            }
        }
    }
}

/// The reporting controller of every event.
pub const CONTROLLER: &str = "kube-lxcfs";
/// The namespace of events about objects without one. Version 1.20 refuses `default`.
const CLUSTER_EVENTS: &str = "kube-system";
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
pub struct Events {
    /// The queue for the API server.
    queue: Option<mpsc::Sender<Queued>>,
    level: EventLevel,
    metrics: Arc<Metrics>,
}

/// The Events that are created (`--events`). The log has all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum EventLevel {
    /// Normal and Warning Events.
    #[default]
    All,
    /// Warning Events only.
    Warnings,
    /// None.
    Off,
}

impl EventLevel {
    fn includes(self, reason: Reason) -> bool {
        match self {
            EventLevel::All => true,
            EventLevel::Warnings => reason.is_warning(),
            EventLevel::Off => false,
        }
    }
}

impl Events {
    /// Events in the log only.
    pub fn to_log() -> Events {
        Events { queue: None, level: EventLevel::Off, metrics: Arc::default() }
    }

    /// Events of this level on the pods, reported by the agent on `node`, and the task that
    /// publishes them until the last clone is dropped.
    pub fn to_pods(
        client: Client,
        node: String,
        level: EventLevel,
        metrics: Arc<Metrics>,
    ) -> (Events, impl Future<Output = ()> + Send + 'static) {
        let (sender, mut queue) = mpsc::channel::<Queued>(QUEUE_CAPACITY);
        let events = Events { queue: Some(sender), level, metrics: metrics.clone() };
        let publisher = async move {
            let mut outage = OutageLog::new("events");
            while let Some(event) = queue.recv().await {
                if let Err(reason) = publish_with_retries(&client, &node, event, &mut outage).await
                {
                    metrics.event_dropped(reason);
                }
            }
        };
        (events, publisher)
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
        if self.level.includes(event.reason) {
            self.enqueue(Queued::Pod(event));
        }
    }

    /// Reports an invalid label of a namespace. Never blocks.
    pub fn publish_for_namespace(&self, mut event: NamespaceEvent) {
        event.note = one_line(&event.note).into_owned();
        let NamespaceEvent { namespace, note, .. } = &event;
        tracing::warn!(namespace, note, "namespace event");
        if self.level.includes(Reason::LxcfsInvalidAnnotation) {
            self.enqueue(Queued::Namespace(event));
        }
    }

    fn enqueue(&self, event: Queued) {
        let object = event.object();
        if let Some(queue) = &self.queue
            && queue.try_send(event).is_err()
        {
            self.metrics.event_dropped(DropReason::QueueFull);
            tracing::warn!(object, "event dropped, the queue for the API server is full");
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
    client: &Client,
    node: &str,
    mut event: Queued,
    outage: &mut OutageLog,
) -> Result<(), DropReason> {
    let text = event.note_mut();
    if text.len() > MAX_NOTE_BYTES {
        text.truncate(text.floor_char_boundary(MAX_NOTE_BYTES - '…'.len_utf8()));
        text.push('…');
    }
    let object = event.object();
    let started = Instant::now();
    let mut delays = RETRY.start();
    loop {
        let published = async {
            match &event {
                Queued::Pod(event) => publish_for_pod(client, node, event).await,
                Queued::Namespace(event) => publish_for_namespace(client, node, event).await,
            }
        };
        let why = match tokio::time::timeout(TIMEOUT, published).await {
            Ok(Ok(())) => {
                outage.recovered("events are published again");
                return Ok(());
            }
            Ok(Err(kube::Error::Api(status))) if is_final(&status) => {
                tracing::warn!(object, cause = status.message, "event refused");
                return Err(DropReason::Refused);
            }
            Ok(Err(e)) => e.to_string(),
            Err(_) => format!("timed out after {TIMEOUT:?}"),
        };
        if started.elapsed() > PUBLISH_DEADLINE {
            tracing::warn!(object, cause = why, "event dropped after retries");
            return Err(DropReason::Deadline);
        }
        outage.failed("failed to publish events", &why);
        tokio::time::sleep(delays.next_delay()).await;
    }
}

async fn publish_for_pod(
    client: &Client,
    node: &str,
    PodEvent { pod, reason, note }: &PodEvent,
) -> Result<(), kube::Error> {
    let event = Event {
        type_: if reason.is_warning() { EventType::Warning } else { EventType::Normal },
        reason: format!("{reason:?}"),
        note: Some(note.clone()),
        action: reason.action().into(),
        secondary: None,
    };
    let regarding = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        name: Some(pod.name.clone()),
        namespace: Some(pod.namespace.clone()),
        uid: Some(pod.uid.clone()),
        ..ObjectReference::default()
    };
    // A recorder folds equal events into a series that keeps the first one's note, but each of
    // these is a change.
    let reporter = Reporter { controller: CONTROLLER.into(), instance: Some(node.to_owned()) };
    Recorder::new(client.clone(), reporter).publish(&event, &regarding).await
}

/// The event's name is the same for every agent, so that the API server keeps one event for each
/// value, until it expires.
async fn publish_for_namespace(
    client: &Client,
    node: &str,
    NamespaceEvent { namespace, value, note }: &NamespaceEvent,
) -> Result<(), kube::Error> {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    let reason = Reason::LxcfsInvalidAnnotation;
    let event = events::Event {
        metadata: ObjectMeta {
            name: Some(format!("{namespace}.{:016x}", hasher.finish())),
            namespace: Some(CLUSTER_EVENTS.into()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(Timestamp::now())),
        type_: Some("Warning".into()),
        reason: Some(format!("{reason:?}")),
        action: Some(reason.action().into()),
        note: Some(note.clone()),
        regarding: Some(ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Namespace".into()),
            name: Some(namespace.clone()),
            ..ObjectReference::default()
        }),
        reporting_controller: Some(CONTROLLER.into()),
        reporting_instance: Some(node.to_owned()),
        ..events::Event::default()
    };
    let api: Api<events::Event> = Api::namespaced(client.clone(), CLUSTER_EVENTS);
    match api.create(&PostParams::default(), &event).await {
        // Another agent has reported it.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        created => created.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::exposition::Format;

    #[test]
    fn note_is_published_on_one_line() {
        let (events, mut queue) = events(EventLevel::All);
        events.publish(event(Reason::LxcfsInjected, "a\nb\u{1b}[2J"));
        assert_eq!(*queue.try_recv().unwrap().note_mut(), r"a\nb\u{1b}[2J");
    }

    fn events(level: EventLevel) -> (Events, mpsc::Receiver<Queued>) {
        let (sender, queue) = mpsc::channel(1);
        (Events { queue: Some(sender), level, metrics: Arc::default() }, queue)
    }

    fn event(reason: Reason, note: &str) -> PodEvent {
        let pod = PodRef { uid: "u".into(), namespace: "n".into(), name: "p".into() };
        PodEvent { pod, reason, note: note.into() }
    }

    #[test]
    fn level_decides_which_events_are_created() {
        for (level, normal, warning) in [
            (EventLevel::All, true, true),
            (EventLevel::Warnings, false, true),
            (EventLevel::Off, false, false),
        ] {
            let (events, mut queue) = events(level);
            for (reason, expected) in
                [(Reason::LxcfsInjected, normal), (Reason::LxcfsInjectFailed, warning)]
            {
                events.publish(event(reason, "x"));
                assert_eq!(queue.try_recv().is_ok(), expected, "{level:?} {reason:?}");
            }
        }
    }

    #[test]
    fn event_beyond_the_queue_is_counted() {
        let (events, _queue) = events(EventLevel::All);
        for _ in 0..3 {
            events.publish(event(Reason::LxcfsInjected, "x"));
        }
        let text = events.metrics.text(Format::Prometheus);
        assert!(
            text.contains("kube_lxcfs_events_dropped_total{reason=\"queue_full\"} 2"),
            "{text}"
        );
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
