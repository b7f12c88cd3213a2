//! The plugin's service: the calls that the runtime makes.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use prost::Message as _;
use tokio::sync::{
    mpsc::{self, error::TrySendError},
    oneshot,
};

use super::{
    BlockedStart, Outputs,
    ttrpc::{
        self, ConfigureRequest, Message, MessageType, StateChangeEvent, SynchronizeRequest, event,
    },
};
use crate::{
    model::{
        container_id::ContainerId,
        pod::{Annotations, Pod, StartedContainer, Trigger, Update},
    },
    runtime::guest_kernel,
};

pub(super) const SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
/// The runtime's `request_timeout` where it sends none.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// The service of one session.
pub(super) struct PluginService<'a> {
    outputs: &'a Outputs,
    session_started: Instant,
    timeout: Duration,
    /// The parts of `Synchronize` so far: pods by id, and containers.
    pods: HashMap<String, Pod>,
    containers: Vec<StartedContainer>,
}

impl<'a> PluginService<'a> {
    pub(super) fn new(outputs: &'a Outputs) -> PluginService<'a> {
        PluginService {
            outputs,
            session_started: Instant::now(),
            timeout: REQUEST_TIMEOUT,
            pods: HashMap::new(),
            containers: Vec::new(),
        }
    }

    /// Handles one call. The reply to an unknown or malformed call is empty, which is success.
    pub(super) fn call(&mut self, message: Message) -> BoxFuture<'a, Message> {
        let stream = message.stream;
        let request = ttrpc::Request::decode(message.payload).unwrap_or_default();
        let method = if request.service == SERVICE { request.method.as_str() } else { "" };
        tracing::trace!(method, "NRI call");
        match method {
            "Configure" => {
                let configure = ConfigureRequest::decode(request.payload).unwrap_or_default();
                self.configure(&configure);
                let bits = [event::START_CONTAINER, event::STOP_CONTAINER, event::REMOVE_CONTAINER];
                let events = bits.iter().map(|event| 1 << (event - 1)).sum();
                ready(response(stream, &ttrpc::ConfigureResponse { events }))
            }
            "Synchronize" => {
                let part = SynchronizeRequest::decode(request.payload).unwrap_or_default();
                let reply = response(stream, &ttrpc::SynchronizeResponse { more: part.more });
                let update = self.synchronize(part).map(|containers| {
                    let requested_at = self.session_started;
                    Update::ContainersListed { containers, trigger: Trigger::Nri, requested_at }
                });
                self.send_and_reply(update, reply)
            }
            "StateChange" => {
                let StateChangeEvent { event, pod, container } =
                    StateChangeEvent::decode(request.payload).unwrap_or_default();
                self.event(event, pod, container, empty(stream))
            }
            "StartContainer" | "StopContainer" | "RemoveContainer" => {
                let event = match method {
                    "StartContainer" => event::START_CONTAINER,
                    "StopContainer" => event::STOP_CONTAINER,
                    _ => event::REMOVE_CONTAINER,
                };
                let ttrpc::ContainerRequest { pod, container } =
                    ttrpc::ContainerRequest::decode(request.payload).unwrap_or_default();
                self.event(event, pod, container, empty(stream))
            }
            _ => ready(empty(stream)),
        }
    }

    fn configure(&mut self, configure: &ConfigureRequest) {
        if let Ok(ms @ 1..) = u64::try_from(configure.request_timeout) {
            self.timeout = Duration::from_millis(ms);
        }
        let ConfigureRequest { runtime_name, runtime_version, .. } = configure;
        let timeout = self.timeout;
        tracing::debug!(runtime_name, runtime_version, ?timeout, "NRI plugin configured");
    }

    /// Collects a part of the containers that exist, and returns all of them with the last part.
    fn synchronize(&mut self, part: SynchronizeRequest) -> Option<Vec<StartedContainer>> {
        self.pods
            .extend(part.pods.into_iter().map(|sandbox| (sandbox.id.clone(), into_pod(sandbox))));
        // A container may come in an earlier part than its pod, so pods are resolved at the end.
        for container in part.containers.into_iter().filter(|c| matches!(c.state, 1..=3)) {
            let sandbox = Pod { uid: container.pod_sandbox_id.clone(), ..Pod::default() };
            self.containers.extend(started_container(sandbox, container));
        }
        if part.more {
            return None;
        }
        let pods = std::mem::take(&mut self.pods);
        let with_pod = |container: StartedContainer| {
            Some(StartedContainer { pod: pods.get(&container.pod.uid)?.clone(), ..container })
        };
        Some(std::mem::take(&mut self.containers).into_iter().filter_map(with_pod).collect())
    }

    fn event(
        &self,
        event: i32,
        sandbox: Option<Bytes>,
        container: Option<ttrpc::Container>,
        reply: Message,
    ) -> BoxFuture<'a, Message> {
        let Some(container) = container else { return ready(reply) };
        match event {
            event::START_CONTAINER => {
                let Some(Ok(sandbox)) = sandbox.map(ttrpc::PodSandbox::decode) else {
                    return ready(reply);
                };
                // It has no process on this node's kernel.
                if guest_kernel(&sandbox.runtime_handler).is_some() {
                    return ready(reply);
                }
                let Some(container) = started_container(into_pod(sandbox), container) else {
                    return ready(reply);
                };
                let starts = self.outputs.starts.clone();
                Box::pin(block_start(starts, container, self.timeout / 2, reply))
            }
            event::STOP_CONTAINER | event::REMOVE_CONTAINER => self.send_and_reply(
                ContainerId::new(&container.id).ok().map(Update::ContainerStopped),
                reply,
            ),
            _ => ready(reply),
        }
    }

    /// Sends an update, then replies. A busy agent delays the reply no longer than half the
    /// runtime's timeout.
    fn send_and_reply(&self, update: Option<Update>, reply: Message) -> BoxFuture<'a, Message> {
        let (updates, limit) = (self.outputs.updates.clone(), self.timeout / 2);
        Box::pin(async move {
            if let Some(update) = update {
                let _ = tokio::time::timeout(limit, updates.send(update)).await;
            }
            reply
        })
    }
}

/// Reports the start, and replies when the view is injected, or after `timeout`.
async fn block_start(
    starts: mpsc::Sender<BlockedStart>,
    container: StartedContainer,
    timeout: Duration,
    reply: Message,
) -> Message {
    let pod = format!("{}/{}", container.pod.namespace, container.pod.name);
    let (name, id) = (container.name.clone(), container.id.clone());
    let (injected_tx, injected) = oneshot::channel();
    let start = BlockedStart { container, reply: injected_tx };
    if let Err(TrySendError::Full(start)) = starts.try_send(start) {
        // A busy agent receives the start too, after the timeout if need be.
        tokio::spawn(async move { starts.send(start).await });
    }
    // A dropped sender releases the start too.
    if tokio::time::timeout(timeout, injected).await.is_err() {
        tracing::warn!(
            pod,
            container = name,
            %id,
            ?timeout,
            "injection timed out, the container starts without its view"
        );
    }
    reply
}

fn ready<'a>(reply: Message) -> BoxFuture<'a, Message> {
    Box::pin(std::future::ready(reply))
}

fn response(stream: u32, payload: &impl prost::Message) -> Message {
    let response = ttrpc::Response { status: None, payload: payload.encode_to_vec().into() };
    Message {
        stream,
        message_type: MessageType::Response,
        payload: response.encode_to_vec().into(),
    }
}

pub(super) fn empty(stream: u32) -> Message {
    Message { stream, message_type: MessageType::Response, payload: Bytes::new() }
}

fn into_pod(sandbox: ttrpc::PodSandbox) -> Pod {
    Pod {
        annotations: Annotations::from_map(&sandbox.annotations),
        labels: sandbox.labels,
        uid: sandbox.uid,
        namespace: sandbox.namespace,
        name: sandbox.name,
        containers: Vec::new(),
    }
}

fn started_container(pod: Pod, container: ttrpc::Container) -> Option<StartedContainer> {
    let id = ContainerId::new(&container.id).ok()?;
    let pid = (container.pid > 0).then(|| i64::from(container.pid));
    Some(StartedContainer { pod, name: container.name, id, pid })
}
