//! A plugin of the runtime's NRI (Node Resource Interface): the runtime calls it between the creation of a container and its
//! first instruction, and waits for the answer. It answers well within the runtime's timeout whatever happens inside, and
//! never with an error, because either would keep the container from starting.
//!
//! Sources: containerd/nri `pkg/api/api.proto` and `pkg/stub`; tried with containerd 1.7.24 and 2.1.9.

pub mod wire;

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use prost::Message;
use rustix::fs::inotify;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::UnixStream,
    sync::{mpsc, oneshot},
};

use self::wire::{ConfigureRequest, Frame, Kind, Packet, StateChangeEvent, SynchronizeRequest, event};
use super::{ContainerId, sandboxed};
use crate::{
    pods::{Pod, Started, Trigger, Update},
    policy::Annotations,
    report::OutageLog,
    sys,
};

/// Where the runtime listens for plugins.
pub const DEFAULT_SOCKET: &str = "/var/run/nri/nri.sock";
const SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
const NAME: &str = "kube-lxcfs";
/// After the plugins that change containers.
const INDEX: &str = "90";
/// The runtime's `request_timeout` where it does not tell it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// The runtime answers our registration within this time, or it is none.
const REGISTRATION_TIMEOUT: Duration = Duration::from_secs(5);
/// The first and the longest wait before another try; one that the socket's coming ends at once.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// A session that lasted so long was a good one.
const GOOD: Duration = Duration::from_secs(10);
/// Between the coming of the socket's file and the try: the runtime binds first and listens then.
const BREATH: Duration = Duration::from_millis(50);

/// Whether there must be NRI (`--nri`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Nri {
    /// Where the runtime has it.
    Auto,
    Off,
    /// The agent ends with an error where it has not.
    Required,
}

/// Why there is no session with the runtime.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "NRI socket {path}: {cause}; is NRI on in the runtime's configuration? --nri-socket names its socket, --nri auto goes without"
    )]
    Connect { path: PathBuf, cause: io::Error },
    #[error("NRI socket {0}: no answer within {REGISTRATION_TIMEOUT:?}; is it the runtime's NRI socket?")]
    Silent(PathBuf),
    #[error("NRI: the runtime refused the plugin: {0}")]
    Refused(String),
    #[error("NRI: the runtime ended the session")]
    Ended,
    #[error("NRI: {0}")]
    Io(#[from] io::Error),
    #[error("NRI: {0}")]
    Wire(#[from] wire::Error),
}

/// A container that waits for its first instruction until it is answered, or dropped.
#[derive(Debug)]
pub struct Waiting {
    pub started: Started,
    pub answer: oneshot::Sender<()>,
}

/// Where what the runtime tells goes.
#[derive(Clone, Debug)]
pub struct Tell {
    pub starts: mpsc::Sender<Waiting>,
    pub updates: mpsc::Sender<Update>,
}

/// Serves the runtime as its plugin for ever, and connects again whenever it was away.
///
/// # Errors
/// With `required`, when the first session does not come about.
pub async fn run(socket: &Path, required: bool, tell: Tell) -> Result<(), Error> {
    let mut outage = OutageLog::new("nri");
    let mut wait = BACKOFF.0;
    let mut first = required;
    loop {
        let begun = Instant::now();
        let mut registered = false;
        let ended = session(socket, &tell, &mut registered, &mut outage).await;
        if tell.updates.is_closed() {
            return Ok(());
        }
        match ended {
            Err(e) if first && !registered => return Err(e),
            // A node without NRI is as it should be.
            Err(Error::Connect { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {
                tracing::debug!("NRI: no socket {}", socket.display());
            }
            Err(e) => outage.failed("NRI is unavailable, using CRI events and the pod watch", &e),
            Ok(never) => match never {},
        }
        first &= !registered;
        wait = if registered && begun.elapsed() >= GOOD { BACKOFF.0 } else { (wait * 2).min(BACKOFF.1) };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = appears(socket) => wait = BACKOFF.0,
        }
    }
}

/// Waits until somebody makes the socket anew.
async fn appears(socket: &Path) {
    loop {
        let Ok(made) = make_notice(socket) else { return std::future::pending().await };
        let Ok(made) = sys::watch(made, Interest::READABLE) else { return std::future::pending().await };
        let _ = made.readable().await;
        tokio::time::sleep(BREATH).await;
        if socket.exists() {
            return;
        }
    }
}

/// The kernel's notice that something is made where the socket is to be, or in the nearest folder above that there is.
fn make_notice(socket: &Path) -> io::Result<std::os::fd::OwnedFd> {
    let notice = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for folder in socket.ancestors().skip(1) {
        match inotify::add_watch(&notice, folder, inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO) {
            Ok(_) => return Ok(notice),
            Err(e) => last = e.into(),
        }
    }
    Err(last)
}

enum Never {}

/// One session, from the connection to its end.
async fn session(socket: &Path, tell: &Tell, registered: &mut bool, outage: &mut OutageLog) -> Result<Never, Error> {
    let connected = UnixStream::connect(socket).await;
    let mut stream = connected.map_err(|cause| Error::Connect { path: socket.to_owned(), cause })?;
    let (mut read, mut write) = stream.split();
    let register = wire::RegisterPluginRequest { plugin_name: NAME.into(), plugin_idx: INDEX.into() };
    let request = wire::Request {
        service: "nri.pkg.api.v1alpha1.Runtime".into(),
        method: "RegisterPlugin".into(),
        payload: register.encode_to_vec().into(),
    };
    let request = Packet { stream: 1, kind: Kind::Request, payload: request.encode_to_vec().into() };
    let mut out = BytesMut::new();
    request.frame(wire::RUNTIME).encode(&mut out);
    write.write_all(&out).await?;

    let patience = tokio::time::sleep(REGISTRATION_TIMEOUT);
    tokio::pin!(patience);
    let mut calls =
        Calls { tell, begun: Instant::now(), timeout: REQUEST_TIMEOUT, parts: HashMap::new(), running: Vec::new() };
    let mut answers: FuturesUnordered<BoxFuture<'_, Packet>> = FuturesUnordered::new();
    let (mut raw, mut asked, mut answered) = (BytesMut::new(), BytesMut::new(), BytesMut::new());
    loop {
        tokio::select! {
            got = read.read_buf(&mut raw) => {
                if got? == 0 {
                    return Err(Error::Ended);
                }
                while let Some(Frame { connection, payload }) = Frame::decode(&mut raw)? {
                    match connection {
                        wire::PLUGIN => asked.extend_from_slice(&payload),
                        wire::RUNTIME => answered.extend_from_slice(&payload),
                        _ => {}
                    }
                }
                while let Some(packet) = Packet::decode(&mut answered)? {
                    if let (Kind::Response, 1, false) = (packet.kind, packet.stream, *registered) {
                        accepted(&packet.payload)?;
                        *registered = true;
                        tracing::info!(nri = "registered", "NRI plugin registered");
                        outage.recovered("NRI is available again");
                    }
                }
                while let Some(packet) = Packet::decode(&mut asked)? {
                    if packet.kind == Kind::Request {
                        answers.push(calls.answer(packet));
                    }
                }
            }
            Some(answer) = answers.next() => {
                let mut out = BytesMut::new();
                answer.frame(wire::PLUGIN).encode(&mut out);
                write.write_all(&out).await?;
            }
            () = &mut patience, if !*registered => return Err(Error::Silent(socket.to_owned())),
        }
    }
}

fn accepted(response: &Bytes) -> Result<(), Error> {
    match wire::Response::decode(response.clone()) {
        Ok(wire::Response { status: Some(status), .. }) if status.code != 0 => Err(Error::Refused(status.message)),
        Ok(_) => Ok(()),
        Err(e) => Err(Error::Refused(format!("its answer is not understood: {e}"))),
    }
}

/// The plugin's service.
struct Calls<'a> {
    tell: &'a Tell,
    begun: Instant,
    timeout: Duration,
    /// What `Synchronize` told so far: pods by id, then containers.
    parts: HashMap<String, Pod>,
    running: Vec<Started>,
}

impl<'a> Calls<'a> {
    /// Answers one call. What is not known or not understood is answered too: with nothing in it, which is success.
    fn answer(&mut self, packet: Packet) -> BoxFuture<'a, Packet> {
        let stream = packet.stream;
        let request = wire::Request::decode(packet.payload).unwrap_or_default();
        let method = if request.service == SERVICE { request.method.as_str() } else { "" };
        tracing::trace!(method, "NRI call");
        match method {
            "Configure" => {
                let configure = ConfigureRequest::decode(request.payload).unwrap_or_default();
                self.configure(&configure);
                let bits = [event::START_CONTAINER, event::STOP_CONTAINER, event::REMOVE_CONTAINER];
                let events = bits.iter().map(|event| 1 << (event - 1)).sum();
                ready(response(stream, &wire::ConfigureResponse { events }))
            }
            "Synchronize" => {
                let part = SynchronizeRequest::decode(request.payload).unwrap_or_default();
                let more = part.more;
                let told = self.synchronize(part);
                let answer = response(stream, &wire::SynchronizeResponse { more });
                let asked = self.begun;
                self.then(told.map(|running| Update::Running { running, by: Trigger::Nri, asked }), answer)
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
                let wire::ContainerRequest { pod, container } =
                    wire::ContainerRequest::decode(request.payload).unwrap_or_default();
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
        tracing::debug!(runtime_name, runtime_version, timeout = ?self.timeout, "NRI: configured");
    }

    /// Keeps a part of what runs; all of it with the last.
    fn synchronize(&mut self, part: SynchronizeRequest) -> Option<Vec<Started>> {
        self.parts.extend(part.pods.into_iter().map(|sandbox| (sandbox.id.clone(), pod(sandbox))));
        // A container may come in an earlier part than its pod: pods are looked up at the end.
        for container in part.containers.into_iter().filter(|c| matches!(c.state, 1..=3)) {
            let sandbox = Pod { uid: container.pod_sandbox_id.clone(), ..Pod::default() };
            self.running.extend(started(sandbox, container));
        }
        if part.more {
            return None;
        }
        let pods = std::mem::take(&mut self.parts);
        let known = |started: Started| Some(Started { pod: pods.get(&started.pod.uid)?.clone(), ..started });
        Some(std::mem::take(&mut self.running).into_iter().filter_map(known).collect())
    }

    fn event(
        &self,
        event: i32,
        sandbox: Option<wire::PodSandbox>,
        container: Option<wire::Container>,
        answer: Packet,
    ) -> BoxFuture<'a, Packet> {
        let (Some(sandbox), Some(container)) = (sandbox, container) else { return ready(answer) };
        match event {
            // It has no process on this node's kernel.
            event::START_CONTAINER if sandboxed(&sandbox.runtime_handler).is_some() => ready(answer),
            event::START_CONTAINER => {
                let Some(started) = started(pod(sandbox), container) else { return ready(answer) };
                let (waiting, may_start) = oneshot::channel();
                let starts = self.tell.starts.clone();
                let limit = self.timeout / 2;
                Box::pin(async move {
                    let id = started.id.clone();
                    let placed = async {
                        // Whoever drops it answers it.
                        if starts.send(Waiting { started, answer: waiting }).await.is_ok() {
                            let _ = may_start.await;
                        }
                    };
                    if tokio::time::timeout(limit, placed).await.is_err() {
                        tracing::warn!(%id, "starts before its view is in place, which was not done within {limit:?}");
                    }
                    answer
                })
            }
            event::STOP_CONTAINER | event::REMOVE_CONTAINER => {
                self.then(ContainerId::new(&container.id).ok().map(Update::Ended), answer)
            }
            _ => ready(answer),
        }
    }

    /// Tells something and answers; an agent that is too busy to listen is not waited for longer than the runtime waits.
    fn then(&self, update: Option<Update>, answer: Packet) -> BoxFuture<'a, Packet> {
        let (updates, limit) = (self.tell.updates.clone(), self.timeout / 2);
        Box::pin(async move {
            if let Some(update) = update {
                let _ = tokio::time::timeout(limit, updates.send(update)).await;
            }
            answer
        })
    }
}

fn ready<'a>(answer: Packet) -> BoxFuture<'a, Packet> {
    Box::pin(std::future::ready(answer))
}

fn response(stream: u32, payload: &impl Message) -> Packet {
    let response = wire::Response { status: None, payload: payload.encode_to_vec().into() };
    Packet { stream, kind: Kind::Response, payload: response.encode_to_vec().into() }
}

fn empty(stream: u32) -> Packet {
    Packet { stream, kind: Kind::Response, payload: Bytes::new() }
}

fn pod(sandbox: wire::PodSandbox) -> Pod {
    Pod {
        annotations: Annotations::from_map(&sandbox.annotations),
        uid: sandbox.uid,
        namespace: sandbox.namespace,
        name: sandbox.name,
        containers: Vec::new(),
    }
}

fn started(pod: Pod, container: wire::Container) -> Option<Started> {
    let id = ContainerId::new(&container.id).ok()?;
    let pid = (container.pid > 0).then(|| i64::from(container.pid));
    Some(Started { pod, name: container.name, id, pid })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The runtime's end of a session, registered and configured.
    struct Runtime {
        stream: UnixStream,
        raw: BytesMut,
        calls: u32,
    }

    impl Runtime {
        async fn accept(listener: &tokio::net::UnixListener, request_timeout: i64) -> Runtime {
            let (stream, _) = listener.accept().await.unwrap();
            let mut runtime = Runtime { stream, raw: BytesMut::new(), calls: 0 };
            let register = runtime.packet(wire::RUNTIME).await;
            let asked = wire::Request::decode(register.payload).unwrap();
            assert_eq!(asked.method, "RegisterPlugin");
            runtime.send(wire::RUNTIME, &empty(register.stream)).await;
            let configure = ConfigureRequest { request_timeout, ..ConfigureRequest::default() };
            runtime.call("Configure", &configure).await;
            let events = wire::ConfigureResponse::decode(runtime.answer().await).unwrap().events;
            assert_eq!(events, 1 << 5 | 1 << 9 | 1 << 10);
            runtime
        }

        async fn send(&mut self, connection: u32, packet: &Packet) {
            let mut out = BytesMut::new();
            packet.frame(connection).encode(&mut out);
            self.stream.write_all(&out).await.unwrap();
        }

        async fn call(&mut self, method: &str, payload: &impl Message) {
            self.calls += 2;
            let payload = payload.encode_to_vec().into();
            let request = wire::Request { service: SERVICE.into(), method: method.into(), payload };
            let payload = request.encode_to_vec().into();
            self.send(wire::PLUGIN, &Packet { stream: self.calls, kind: Kind::Request, payload }).await;
        }

        async fn packet(&mut self, connection: u32) -> Packet {
            loop {
                if let Some(frame) = Frame::decode(&mut self.raw).unwrap() {
                    assert_eq!(frame.connection, connection);
                    return Packet::decode(&mut BytesMut::from(&frame.payload[..])).unwrap().unwrap();
                }
                assert_ne!(self.stream.read_buf(&mut self.raw).await.unwrap(), 0);
            }
        }

        /// The answer to the last call, which is never an error.
        async fn answer(&mut self) -> Bytes {
            let packet = self.packet(wire::PLUGIN).await;
            assert_eq!((packet.stream, packet.kind), (self.calls, Kind::Response));
            let response = wire::Response::decode(packet.payload).unwrap();
            assert_eq!(response.status, None);
            response.payload
        }
    }

    fn start(method: &str) -> (&str, Vec<u8>) {
        let pod = Some(wire::PodSandbox { id: "p".into(), uid: "u".into(), ..Default::default() });
        let container = Some(wire::Container { id: "c".into(), name: "app".into(), pid: 7, ..Default::default() });
        let payload = match method {
            "StateChange" => StateChangeEvent { event: event::START_CONTAINER, pod, container }.encode_to_vec(),
            _ => wire::ContainerRequest { pod, container }.encode_to_vec(),
        };
        (method, payload)
    }

    #[tokio::test]
    async fn a_start_is_answered_when_the_view_is_in_place_or_half_of_the_timeout_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nri.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let ((starts, mut waiting), (updates, mut told)) = (mpsc::channel(4), mpsc::channel(4));
        let plugin = tokio::spawn(async move { run(&socket, true, Tell { starts, updates }).await });
        let mut runtime = Runtime::accept(&listener, 600).await;
        for (method, payload) in [start("StateChange"), start("StartContainer")] {
            runtime.calls += 2;
            let request = wire::Request { service: SERVICE.into(), method: method.into(), payload: payload.into() };
            let packet = Packet { stream: runtime.calls, kind: Kind::Request, payload: request.encode_to_vec().into() };
            runtime.send(wire::PLUGIN, &packet).await;
            let Waiting { started, answer } = waiting.recv().await.unwrap();
            assert_eq!((started.id.as_str(), started.pid, started.pod.uid.as_str()), ("c", Some(7), "u"));
            // Nothing is answered while the view is not in place.
            let early = tokio::time::timeout(Duration::from_millis(100), runtime.packet(wire::PLUGIN)).await;
            assert!(early.is_err(), "{method}: {early:?}");
            answer.send(()).unwrap();
            runtime.answer().await;
            // And whatever hangs, it is answered in time: `answer` is held.
            runtime.calls += 2;
            let packet = Packet { stream: runtime.calls, ..packet };
            let begun = Instant::now();
            runtime.send(wire::PLUGIN, &packet).await;
            let _held = waiting.recv().await.unwrap();
            runtime.answer().await;
            assert!(begun.elapsed() >= Duration::from_millis(250), "{:?}", begun.elapsed());
        }
        // Unknown calls and rubbish are no errors; what runs already comes in parts.
        runtime.call("PostStartSomething", &ConfigureRequest::default()).await;
        runtime.answer().await;
        let pod = wire::PodSandbox { id: "p".into(), uid: "u".into(), ..Default::default() };
        let container = |id: &str, state| wire::Container {
            id: id.into(),
            pod_sandbox_id: "p".into(),
            state,
            ..Default::default()
        };
        let first = SynchronizeRequest { pods: Vec::new(), containers: vec![container("a", 3)], more: true };
        runtime.call("Synchronize", &first).await;
        assert!(wire::SynchronizeResponse::decode(runtime.answer().await).unwrap().more);
        let containers = vec![container("b", 1), container("ended", 4)];
        runtime.call("Synchronize", &SynchronizeRequest { pods: vec![pod], containers, more: false }).await;
        assert!(!wire::SynchronizeResponse::decode(runtime.answer().await).unwrap().more);
        let Update::Running { running, .. } = told.recv().await.unwrap() else { panic!("something else was told") };
        assert_eq!(running.iter().map(|s| s.id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        // The runtime goes and comes.
        drop(runtime);
        Runtime::accept(&listener, 0).await;
        plugin.abort();
    }
}
