//! A plugin of the runtime's NRI (Node Resource Interface). The runtime calls it between the
//! creation of a container and its first instruction, and waits for the reply. The plugin always
//! replies with success within half the runtime's timeout: it can delay a start, never fail it.
//!
//! Sources: containerd/nri `pkg/api/api.proto` and `pkg/stub`; tried with containerd 1.7.24 and
//! 2.1.9.

mod service;
pub mod ttrpc;

use std::{
    convert::Infallible,
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use prost::Message as _;
use rustix::fs::inotify;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    sync::{mpsc, oneshot, watch},
};

use self::{
    service::PluginService,
    ttrpc::{Frame, Message, MessageType},
};
use crate::{
    model::pod::{StartedContainer, Update},
    sys::{
        self,
        host_root::{self, HostRoot},
    },
    telemetry::{Backoff, OutageLog, metrics::Metrics},
};

/// The usual socket of the runtime for plugins.
pub const DEFAULT_SOCKET: &str = "/var/run/nri/nri.sock";
const NAME: &str = "kube-lxcfs";
/// After the plugins that change containers.
const INDEX: &str = "90";
/// The ttrpc stream of the registration, the plugin's only call.
const REGISTRATION_STREAM: u32 = 1;
/// The limit for the runtime's reply to the registration.
const REGISTRATION_TIMEOUT: Duration = Duration::from_secs(5);
/// The buffers of a connection that are kept for the next messages, in bytes. After the plugin has
/// registered, one message describes every container of the node: 2 MB for 1,000.
const MAX_KEPT_BYTES: usize = 64 << 10;
/// The delay before the next connection. A new socket ends it early.
const RECONNECT: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));
/// A session of at least this duration resets the delay.
const STABLE_SESSION: Duration = Duration::from_secs(10);
/// The delay between the creation of the socket's file and the connection: the runtime binds first
/// and listens then.
const LISTEN_DELAY: Duration = Duration::from_millis(50);

/// The use of NRI (`--nri`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum NriMode {
    /// Use it if the runtime has it.
    Auto,
    /// Do not use it.
    Off,
    /// The agent exits with an error if the runtime does not have it.
    Required,
}

/// The reason why there is no session with the runtime.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "NRI socket {path}: failed to connect: {cause}; \
         enable NRI in the runtime's configuration, set --nri-socket, or use --nri auto"
    )]
    Connect { path: PathBuf, cause: io::Error },
    #[error(
        "NRI socket {0}: registration timed out after {REGISTRATION_TIMEOUT:?}; \
         set --nri-socket to the runtime's NRI socket"
    )]
    RegistrationTimeout(PathBuf),
    #[error("NRI: the runtime refused the plugin: {0}")]
    Refused(String),
    #[error("NRI: the runtime closed the session")]
    Disconnected,
    #[error("NRI: {0}")]
    Io(#[from] io::Error),
    #[error("NRI: {0}")]
    Protocol(#[from] ttrpc::Error),
}

/// A container whose start the runtime blocks until `reply` is used or dropped.
#[derive(Debug)]
pub struct BlockedStart {
    pub container: StartedContainer,
    pub reply: oneshot::Sender<()>,
}

/// The outputs of the plugin: starts and updates.
#[derive(Clone, Debug)]
pub struct Outputs {
    pub starts: mpsc::Sender<BlockedStart>,
    pub updates: mpsc::Sender<Update>,
    /// Whether the plugin is registered.
    connected: watch::Sender<bool>,
    pub metrics: Arc<Metrics>,
}

impl Outputs {
    pub fn new(
        starts: mpsc::Sender<BlockedStart>,
        updates: mpsc::Sender<Update>,
        metrics: Arc<Metrics>,
    ) -> Outputs {
        Outputs { starts, updates, connected: watch::Sender::new(false), metrics }
    }

    /// Whether the plugin is registered, from now on.
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.connected.subscribe()
    }

    fn set_connected(&self, connected: bool) {
        self.connected.send_replace(connected);
        self.metrics.set_nri_connected(connected);
    }
}

/// A socket of the node.
#[derive(Clone, Debug)]
pub struct Socket {
    pub host_root: HostRoot,
    /// In the host's root.
    pub path: PathBuf,
}

/// Serves the runtime as its plugin until the receivers are dropped, and reconnects after each
/// session.
///
/// # Errors
/// With `required`, when the first session fails before the registration.
pub async fn run(socket: &Socket, required: bool, outputs: Outputs) -> Result<(), Error> {
    let mut outage = OutageLog::new("nri");
    let mut delays = RECONNECT.start();
    let mut first = required;
    loop {
        let started = Instant::now();
        let mut registered = false;
        let Err(error) = session(socket, &outputs, &mut registered, &mut outage).await;
        outputs.set_connected(false);
        if outputs.updates.is_closed() {
            return Ok(());
        }
        match error {
            e if first && !registered => return Err(e),
            // A node without NRI is not an outage.
            Error::Connect { cause, .. } if cause.kind() == io::ErrorKind::NotFound => {
                tracing::debug!(socket = %socket.path.display(), "no NRI socket");
            }
            e => outage.failed("NRI is unavailable, using CRI events and the pod watch", &e),
        }
        first &= !registered;
        if registered && started.elapsed() >= STABLE_SESSION {
            delays.reset();
        }
        tokio::select! {
            () = tokio::time::sleep(delays.next_delay()) => {}
            () = wait_for_socket(socket) => delays.reset(),
        }
    }
}

/// Waits until the socket is created.
async fn wait_for_socket(socket: &Socket) {
    loop {
        let Ok(watch) = watch_parent_dir(socket) else { return std::future::pending().await };
        let Ok(watch) = sys::async_fd(watch, Interest::READABLE) else {
            return std::future::pending().await;
        };
        let _ = watch.readable().await;
        tokio::time::sleep(LISTEN_DELAY).await;
        if socket.host_root.open(&socket.path).is_ok() {
            return;
        }
    }
}

/// Watches the socket's directory, or the nearest existing directory above it, for new entries
/// (inotify(7)).
fn watch_parent_dir(Socket { host_root, path }: &Socket) -> io::Result<OwnedFd> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    let entries = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
    for directory in path.ancestors().skip(1) {
        let added = host_root.open(directory).and_then(|directory| {
            Ok(inotify::add_watch(&watch, host_root::by_descriptor(&directory), entries)?)
        });
        match added {
            Ok(_) => return Ok(watch),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// One session, from the connection to its end, which always is an error.
async fn session(
    socket: &Socket,
    outputs: &Outputs,
    registered: &mut bool,
    outage: &mut OutageLog,
) -> Result<Infallible, Error> {
    let connected = socket.host_root.connect(&socket.path).await;
    let mut stream =
        connected.map_err(|cause| Error::Connect { path: socket.path.clone(), cause })?;
    let (mut read, mut write) = stream.split();
    let mut out = BytesMut::new();
    registration().frame(ttrpc::RUNTIME).encode(&mut out);
    write.write_all(&out).await?;
    out.clear();

    let timeout = tokio::time::sleep(REGISTRATION_TIMEOUT);
    tokio::pin!(timeout);
    let mut service = PluginService::new(outputs);
    let mut replies: FuturesUnordered<BoxFuture<'_, Message>> = FuturesUnordered::new();
    // The bytes of the socket, and of the two connections in it: calls of the runtime, and
    // responses to ours.
    let (mut raw, mut calls, mut responses) = (BytesMut::new(), BytesMut::new(), BytesMut::new());
    let mut large = false;
    loop {
        tokio::select! {
            received = read.read_buf(&mut raw) => {
                if received? == 0 {
                    return Err(Error::Disconnected);
                }
                large |= raw.len() > MAX_KEPT_BYTES;
                while let Some(Frame { connection, payload }) = Frame::decode(&mut raw)? {
                    match connection {
                        ttrpc::PLUGIN => calls.extend_from_slice(&payload),
                        ttrpc::RUNTIME => responses.extend_from_slice(&payload),
                        _ => {}
                    }
                }
                while let Some(message) = Message::decode(&mut responses)? {
                    let is_reply = message.message_type == MessageType::Response
                        && message.stream == REGISTRATION_STREAM;
                    if is_reply && !*registered {
                        accepted(&message.payload)?;
                        *registered = true;
                        tracing::info!(nri = "registered", "NRI plugin registered");
                        outage.recovered("NRI is available again");
                        outputs.set_connected(true);
                    }
                }
                large |= calls.len() > MAX_KEPT_BYTES;
                while let Some(message) = Message::decode(&mut calls)? {
                    if message.message_type == MessageType::Request {
                        replies.push(service.call(message));
                    }
                }
                if large && raw.is_empty() && calls.is_empty() {
                    (raw, calls, large) = (BytesMut::new(), BytesMut::new(), false);
                }
            }
            Some(reply) = replies.next() => reply.frame(ttrpc::PLUGIN).encode(&mut out),
            // Beside the rest: a runtime that is slow to read delays no other call.
            written = write.write_buf(&mut out), if !out.is_empty() => {
                written?;
            }
            () = &mut timeout, if !*registered => {
                return Err(Error::RegistrationTimeout(socket.path.clone()));
            }
        }
    }
}

/// The plugin's first message.
fn registration() -> Message {
    let register =
        ttrpc::RegisterPluginRequest { plugin_name: NAME.into(), plugin_idx: INDEX.into() };
    let request = ttrpc::Request {
        service: "nri.pkg.api.v1alpha1.Runtime".into(),
        method: "RegisterPlugin".into(),
        payload: register.encode_to_vec().into(),
    };
    Message {
        stream: REGISTRATION_STREAM,
        message_type: MessageType::Request,
        payload: request.encode_to_vec().into(),
    }
}

/// Checks the runtime's response to the registration.
fn accepted(response: &Bytes) -> Result<(), Error> {
    match ttrpc::Response::decode(response.clone()) {
        Ok(ttrpc::Response { status: Some(status), .. }) if status.code != 0 => {
            Err(Error::Refused(status.message))
        }
        Ok(_) => Ok(()),
        Err(e) => Err(Error::Refused(format!("malformed response: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        service::{SERVICE, empty},
        ttrpc::{ConfigureRequest, StateChangeEvent, SynchronizeRequest, event},
        *,
    };
    use crate::telemetry::metrics::exposition::Format;
    use tokio::net::UnixStream;

    fn at(path: &std::path::Path) -> Socket {
        Socket { host_root: HostRoot::default(), path: path.to_owned() }
    }

    /// The runtime's side of a session, registered and configured.
    struct Runtime {
        stream: UnixStream,
        raw: BytesMut,
        calls: u32,
    }

    impl Runtime {
        async fn accept(listener: &tokio::net::UnixListener, request_timeout: i64) -> Runtime {
            let (stream, _) = listener.accept().await.unwrap();
            let mut runtime = Runtime { stream, raw: BytesMut::new(), calls: 0 };
            let register = runtime.message(ttrpc::RUNTIME).await;
            let request = ttrpc::Request::decode(register.payload).unwrap();
            assert_eq!(request.method, "RegisterPlugin");
            runtime.send(ttrpc::RUNTIME, &empty(register.stream)).await;
            let configure = ConfigureRequest { request_timeout, ..ConfigureRequest::default() };
            runtime.call("Configure", &configure).await;
            let events = ttrpc::ConfigureResponse::decode(runtime.reply().await).unwrap().events;
            assert_eq!(events, 1 << 5 | 1 << 9 | 1 << 10);
            runtime
        }

        async fn send(&mut self, connection: u32, message: &Message) {
            let mut out = BytesMut::new();
            message.frame(connection).encode(&mut out);
            self.stream.write_all(&out).await.unwrap();
        }

        async fn call(&mut self, method: &str, payload: &impl prost::Message) {
            self.calls += 2;
            let payload = payload.encode_to_vec().into();
            let request =
                ttrpc::Request { service: SERVICE.into(), method: method.into(), payload };
            let payload = request.encode_to_vec().into();
            self.send(
                ttrpc::PLUGIN,
                &Message { stream: self.calls, message_type: MessageType::Request, payload },
            )
            .await;
        }

        async fn message(&mut self, connection: u32) -> Message {
            loop {
                if let Some(frame) = Frame::decode(&mut self.raw).unwrap() {
                    assert_eq!(frame.connection, connection);
                    return Message::decode(&mut BytesMut::from(&frame.payload[..]))
                        .unwrap()
                        .unwrap();
                }
                assert_ne!(self.stream.read_buf(&mut self.raw).await.unwrap(), 0);
            }
        }

        /// The reply to the last call, which is never an error.
        async fn reply(&mut self) -> Bytes {
            let message = self.message(ttrpc::PLUGIN).await;
            assert_eq!((message.stream, message.message_type), (self.calls, MessageType::Response));
            let response = ttrpc::Response::decode(message.payload).unwrap();
            assert_eq!(response.status, None);
            response.payload
        }
    }

    fn start(method: &str) -> (&str, Vec<u8>) {
        let pod = ttrpc::PodSandbox { id: "p".into(), uid: "u".into(), ..Default::default() };
        let pod = Some(pod.encode_to_vec().into());
        let container = Some(ttrpc::Container {
            id: "c".into(),
            name: "app".into(),
            pid: 7,
            ..Default::default()
        });
        let payload = match method {
            "StateChange" => {
                StateChangeEvent { event: event::START_CONTAINER, pod, container }.encode_to_vec()
            }
            _ => ttrpc::ContainerRequest { pod, container }.encode_to_vec(),
        };
        (method, payload)
    }

    fn message(stream: u32, (method, payload): (&str, Vec<u8>)) -> Message {
        let request = ttrpc::Request {
            service: SERVICE.into(),
            method: method.into(),
            payload: payload.into(),
        };
        let payload = request.encode_to_vec().into();
        Message { stream, message_type: MessageType::Request, payload }
    }

    /// A plugin, and a runtime with this request timeout in ms. The channel of starts has room for
    /// one.
    async fn session_with(request_timeout: i64) -> (Runtime, mpsc::Receiver<BlockedStart>) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nri.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let ((starts, blocked), (updates, _)) = (mpsc::channel(1), mpsc::channel(1));
        let outputs = Outputs::new(starts, updates, Arc::default());
        tokio::spawn(async move { run(&at(&socket), true, outputs).await });
        (Runtime::accept(&listener, request_timeout).await, blocked)
    }

    #[tokio::test]
    async fn slow_start_delays_no_other() {
        let (mut runtime, mut blocked) = session_with(60_000).await;
        let mut replies = Vec::new();
        for stream in [2, 4, 6] {
            runtime.send(ttrpc::PLUGIN, &message(stream, start("StartContainer"))).await;
            replies.push(blocked.recv().await.unwrap().reply);
        }
        for (stream, reply) in [6, 4, 2].into_iter().zip(replies.into_iter().rev()) {
            reply.send(()).unwrap();
            assert_eq!(runtime.message(ttrpc::PLUGIN).await.stream, stream);
        }
    }

    #[tokio::test]
    async fn busy_agent_receives_every_start_later() {
        let (mut runtime, mut blocked) = session_with(200).await;
        for stream in [2, 4, 6] {
            runtime.send(ttrpc::PLUGIN, &message(stream, start("StartContainer"))).await;
        }
        for _ in 0..3 {
            assert!([2, 4, 6].contains(&runtime.message(ttrpc::PLUGIN).await.stream));
        }
        for _ in 0..3 {
            let start = tokio::time::timeout(Duration::from_secs(10), blocked.recv()).await;
            assert!(start.unwrap().unwrap().reply.is_closed(), "the container has started");
        }
    }

    #[tokio::test]
    async fn start_waits_for_injection_up_to_half_timeout() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nri.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let ((starts, mut blocked), (updates, mut received)) = (mpsc::channel(4), mpsc::channel(4));
        let metrics: Arc<Metrics> = Arc::default();
        let outputs = Outputs::new(starts, updates, metrics.clone());
        let nri = outputs.subscribe();
        let plugin = tokio::spawn(async move { run(&at(&socket), true, outputs).await });
        let mut runtime = Runtime::accept(&listener, 600).await;
        for (method, payload) in [start("StateChange"), start("StartContainer")] {
            runtime.calls += 2;
            let request = ttrpc::Request {
                service: SERVICE.into(),
                method: method.into(),
                payload: payload.into(),
            };
            let message = Message {
                stream: runtime.calls,
                message_type: MessageType::Request,
                payload: request.encode_to_vec().into(),
            };
            runtime.send(ttrpc::PLUGIN, &message).await;
            let BlockedStart { container, reply } = blocked.recv().await.unwrap();
            assert_eq!(
                (container.id.as_str(), container.pid, container.pod.uid.as_str()),
                ("c", Some(7), "u")
            );
            // There is no reply before the view is injected.
            let early =
                tokio::time::timeout(Duration::from_millis(100), runtime.message(ttrpc::PLUGIN))
                    .await;
            assert!(early.is_err(), "{method}: {early:?}");
            reply.send(()).unwrap();
            runtime.reply().await;
            // If the injection hangs, the reply still comes in time: the sender is held.
            runtime.calls += 2;
            let message = Message { stream: runtime.calls, ..message };
            let started = Instant::now();
            runtime.send(ttrpc::PLUGIN, &message).await;
            let _held = blocked.recv().await.unwrap();
            runtime.reply().await;
            assert!(started.elapsed() >= Duration::from_millis(250), "{:?}", started.elapsed());
        }
        let text = metrics.text(Format::Prometheus);
        assert!(text.contains("kube_lxcfs_nri_connected 1\n"), "{text}");
        assert!(*nri.borrow());
        // Unknown calls are no errors. The containers that exist come in parts.
        runtime.call("PostStartSomething", &ConfigureRequest::default()).await;
        runtime.reply().await;
        let pod = ttrpc::PodSandbox { id: "p".into(), uid: "u".into(), ..Default::default() };
        let container = |id: &str, state| ttrpc::Container {
            id: id.into(),
            pod_sandbox_id: "p".into(),
            state,
            ..Default::default()
        };
        let first = SynchronizeRequest {
            pods: Vec::new(),
            containers: vec![container("a", 3)],
            more: true,
        };
        runtime.call("Synchronize", &first).await;
        assert!(ttrpc::SynchronizeResponse::decode(runtime.reply().await).unwrap().more);
        let containers = vec![container("b", 1), container("ended", 4)];
        runtime
            .call("Synchronize", &SynchronizeRequest { pods: vec![pod], containers, more: false })
            .await;
        assert!(!ttrpc::SynchronizeResponse::decode(runtime.reply().await).unwrap().more);
        let Update::ContainersListed { containers, .. } = received.recv().await.unwrap() else {
            panic!("another update");
        };
        assert_eq!(containers.iter().map(|s| s.id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        // The runtime restarts.
        drop(runtime);
        Runtime::accept(&listener, 0).await;
        plugin.abort();
    }
}
