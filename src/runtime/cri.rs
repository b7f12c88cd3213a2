//! The CRI client (runtime.v1 of k8s.io/cri-api): containers, pod sandboxes, pids and events.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::{
    Container, ContainerEventResponse, ContainerFilter, ContainerState, ContainerStateValue,
    ContainerStatusRequest, GetEventsRequest, ListContainersRequest, ListPodSandboxRequest,
    PodSandbox, PodSandboxFilter, PodSandboxState, PodSandboxStateValue, VersionRequest,
    runtime_service_client::RuntimeServiceClient,
};
use rustix::fs::FileType;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::Mutex;
use tonic::{
    Code, Request, Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};

use super::{Error as RuntimeError, guest_kernel};
use crate::{model::container_id::ContainerId, sys::host_root::HostRoot};

/// The usual sockets, in the order they are tried: containerd (its own; k3s's and RKE2's; k0s's;
/// MicroK8s's), CRI-O, cri-dockerd, iSulad.
const DEFAULT_ENDPOINTS: [&str; 7] = [
    "/run/containerd/containerd.sock",
    "/run/k3s/containerd/containerd.sock",
    "/run/k0s/containerd.sock",
    "/var/snap/microk8s/common/run/containerd.sock",
    "/run/crio/crio.sock",
    "/run/cri-dockerd.sock",
    "/var/run/isulad.sock",
];

/// The deadline of each call.
const TIMEOUT: Duration = Duration::from_secs(2);

/// The limit of a message, the same as the kubelet's: verbose statuses carry whole OCI specs, and
/// lists all containers of a node.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// The socket of a runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CriEndpoint(PathBuf);

impl std::str::FromStr for CriEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = text.strip_prefix("unix://").unwrap_or(text);
        if path.starts_with('/') {
            Ok(CriEndpoint(path.into()))
        } else {
            Err("expected unix:// and an absolute path, \
                 for example unix:///run/containerd/containerd.sock"
                .into())
        }
    }
}

/// The reason why a call failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "no CRI runtime responds at {}; set --cri-endpoint to its socket",
        DEFAULT_ENDPOINTS.join(", ")
    )]
    NoEndpoint,
    #[error(
        "CRI endpoint {0}: no such file; start the runtime, or set --cri-endpoint to its socket"
    )]
    Missing(PathBuf),
    #[error("CRI endpoint {0}: not a socket; set --cri-endpoint to the runtime's socket")]
    NotASocket(PathBuf),
    #[error("CRI endpoint {path}: failed to connect: {cause}; is the runtime running?")]
    Connect { path: PathBuf, cause: Arc<io::Error> },
    #[error(
        "CRI endpoint {path}: the server does not speak CRI v1 ({cause}); \
         set --cri-endpoint to the runtime's socket"
    )]
    NotCri { path: PathBuf, cause: String },
    #[error("CRI endpoint {path}: {call} failed: {cause}")]
    Call { path: PathBuf, call: &'static str, cause: String },
}

/// The runtime's name and version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    pub endpoint: PathBuf,
    pub name: String,
    pub version: String,
}

#[derive(Clone, Debug)]
struct Connection {
    path: PathBuf,
    client: RuntimeServiceClient<Channel>,
}

/// What is read of a container's verbose status. The rest, a whole OCI spec, is skipped. No runtime
/// promises the types.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerInfo {
    pid: Option<Value>,
    runtime_type: Option<Value>,
    runtime_handler: Option<Value>,
}

/// A client that connects on its first call, and reconnects when the runtime has restarted.
#[derive(Clone, Debug)]
pub struct CriClient {
    endpoint: Option<CriEndpoint>,
    host_root: HostRoot,
    connection: Arc<Mutex<Option<Connection>>>,
}

/// The usual sockets that exist in `host_root`, whether a runtime listens or not.
pub fn existing_endpoints(host_root: &HostRoot) -> Vec<&'static Path> {
    let paths = DEFAULT_ENDPOINTS.into_iter().map(Path::new);
    paths.filter(|path| host_root.open(path).is_ok()).collect()
}

impl CriClient {
    /// Sockets are looked up in `host_root`. Without an endpoint, the first of the usual ones whose
    /// runtime has pods is used, else the first that responds.
    pub fn new(endpoint: Option<CriEndpoint>, host_root: HostRoot) -> CriClient {
        CriClient { endpoint, host_root, connection: Arc::default() }
    }

    /// # Errors
    /// See [`Error`].
    pub async fn version(&self) -> Result<Version, Error> {
        let Connection { path, mut client } = self.connect().await?;
        let response = client.version(with_timeout(VersionRequest::default())).await;
        let response =
            response.map_err(|status| call_error(&path, "Version", &status))?.into_inner();
        Ok(Version {
            endpoint: path,
            name: response.runtime_name,
            version: response.runtime_version,
        })
    }

    /// The pid of a running container, from `ContainerStatus` with `verbose`.
    ///
    /// # Errors
    /// [`RuntimeError::NotRunning`], [`RuntimeError::GuestKernel`], or that the call failed.
    pub async fn pid(&self, id: &ContainerId) -> Result<i64, RuntimeError> {
        let Connection { path, mut client } = self.connect().await?;
        let request = ContainerStatusRequest { container_id: id.to_string(), verbose: true };
        let response = match client.container_status(with_timeout(request)).await {
            Ok(response) => response.into_inner(),
            Err(status) if status.code() == Code::NotFound => {
                return Err(RuntimeError::NotRunning(id.clone()));
            }
            Err(status) => return Err(call_error(&path, "ContainerStatus", &status).into()),
        };
        if response.status.is_some_and(|s| s.state != ContainerState::ContainerRunning as i32) {
            return Err(RuntimeError::NotRunning(id.clone()));
        }
        let no_pid = |cause: &str| Error::Call {
            path: path.clone(),
            call: "ContainerStatus",
            cause: cause.to_owned(),
        };
        // containerd, CRI-O and iSulad write their details as one JSON text under "info";
        // cri-dockerd has no pid in it.
        let info = response.info.get("info").map_or("{}", String::as_str);
        let info: ContainerInfo = serde_json::from_str(info)
            .map_err(|e| no_pid(&format!("its info is not JSON: {e}")))?;
        for kind in [info.runtime_type, info.runtime_handler].iter().flatten() {
            if let Some(kind) = kind.as_str().and_then(guest_kernel) {
                return Err(RuntimeError::GuestKernel { id: id.clone(), kind: kind.to_owned() });
            }
        }
        match info.pid.and_then(|pid| pid.as_i64()) {
            Some(pid) if pid > 0 => Ok(pid),
            Some(_) => Err(RuntimeError::NotRunning(id.clone())),
            None => Err(no_pid("its info has no pid; use --pid-from proc").into()),
        }
    }

    /// The ids of all running containers.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn running(&self) -> Result<Vec<ContainerId>, Error> {
        let containers = self.list_running().await?;
        // A container with an invalid id cannot be named in a call either.
        Ok(containers.iter().filter_map(|c| ContainerId::new(&c.id).ok()).collect())
    }

    /// The running containers.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn list_running(&self) -> Result<Vec<Container>, Error> {
        let running = ContainerStateValue { state: ContainerState::ContainerRunning as i32 };
        self.list_containers(ContainerFilter { state: Some(running), ..ContainerFilter::default() })
            .await
    }

    /// The containers that are created or running.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn list_created_or_running(&self) -> Result<Vec<Container>, Error> {
        let states =
            [ContainerState::ContainerCreated as i32, ContainerState::ContainerRunning as i32];
        let mut containers = self.list_containers(ContainerFilter::default()).await?;
        containers.retain(|c| states.contains(&c.state));
        Ok(containers)
    }

    /// The pod sandboxes that are ready.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn list_ready_sandboxes(&self) -> Result<Vec<PodSandbox>, Error> {
        let Connection { path, mut client } = self.connect().await?;
        let ready = PodSandboxStateValue { state: PodSandboxState::SandboxReady as i32 };
        let filter = PodSandboxFilter { state: Some(ready), ..PodSandboxFilter::default() };
        let request = ListPodSandboxRequest { filter: Some(filter) };
        let sandboxes = client.list_pod_sandbox(with_timeout(request)).await;
        Ok(sandboxes
            .map_err(|status| call_error(&path, "ListPodSandbox", &status))?
            .into_inner()
            .items)
    }

    /// The runtime's container events (`GetContainerEvents`). The stream opens with its first
    /// message.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn events(&self) -> Result<EventStream, Error> {
        let Connection { path, mut client } = self.connect().await?;
        // Not awaited here, and without a deadline: a node may have no event for hours.
        let opening =
            async move { Ok(client.get_container_events(GetEventsRequest {}).await?.into_inner()) };
        Ok(EventStream { path, state: StreamState::Opening(Box::pin(opening)) })
    }

    async fn list_containers(&self, filter: ContainerFilter) -> Result<Vec<Container>, Error> {
        let Connection { path, mut client } = self.connect().await?;
        let request = ListContainersRequest { filter: Some(filter) };
        let response = client.list_containers(with_timeout(request)).await;
        Ok(response
            .map_err(|status| call_error(&path, "ListContainers", &status))?
            .into_inner()
            .containers)
    }

    async fn connect(&self) -> Result<Connection, Error> {
        let mut connection = self.connection.lock().await;
        if let Some(connection) = &*connection {
            return Ok(connection.clone());
        }
        let found = match &self.endpoint {
            Some(CriEndpoint(path)) => connect(&self.host_root, path).await?,
            None => self.search().await?,
        };
        Ok(connection.insert(found).clone())
    }

    /// The first of the usual sockets whose runtime has pods: beside the kubelet's runtime there
    /// may be another one, such as Docker's containerd on a node of k3s. If none has pods, the
    /// first that responds.
    async fn search(&self) -> Result<Connection, Error> {
        let mut best = Err(Error::NoEndpoint);
        for path in DEFAULT_ENDPOINTS.map(Path::new) {
            match connect(&self.host_root, path).await {
                Ok(mut found) => {
                    let request = with_timeout(ListPodSandboxRequest::default());
                    let pods = found.client.list_pod_sandbox(request).await;
                    if pods.is_ok_and(|pods| !pods.into_inner().items.is_empty()) {
                        return Ok(found);
                    }
                    if best.is_err() {
                        best = Ok(found);
                    }
                }
                Err(Error::Missing(_)) => {}
                // The error of a socket that exists is more useful than that there is none.
                Err(e) => best = best.or(Err(e)),
            }
        }
        best
    }
}

/// The next of a stream of events.
#[derive(Debug)]
pub enum NextEvent {
    Event(Box<ContainerEventResponse>),
    /// The runtime closed the stream.
    Closed,
    /// The runtime has no events, as containerd before 1.7.
    Unsupported,
}

/// A stream of container events.
pub struct EventStream {
    path: PathBuf,
    state: StreamState,
}

enum StreamState {
    Opening(futures::future::BoxFuture<'static, Result<Streaming<ContainerEventResponse>, Status>>),
    Open(Box<Streaming<ContainerEventResponse>>),
}

impl std::fmt::Debug for EventStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventStream").field("path", &self.path).finish_non_exhaustive()
    }
}

impl EventStream {
    /// Waits for the next event. Cancel safe.
    ///
    /// # Errors
    /// Fails if the stream breaks.
    pub async fn next(&mut self) -> Result<NextEvent, Error> {
        let event = loop {
            match &mut self.state {
                StreamState::Open(stream) => break stream.message().await,
                StreamState::Opening(opening) => match opening.await {
                    Ok(stream) => self.state = StreamState::Open(Box::new(stream)),
                    Err(status) => break Err(status),
                },
            }
        };
        match event {
            Ok(Some(event)) => Ok(NextEvent::Event(Box::new(event))),
            Ok(None) => Ok(NextEvent::Closed),
            Err(status) if status.code() == Code::Unimplemented => Ok(NextEvent::Unsupported),
            Err(status) => Err(call_error(&self.path, "GetContainerEvents", &status)),
        }
    }
}

/// Connects and requests the version, which shows that the server is a CRI runtime. The channel
/// reconnects by itself later.
async fn connect(host_root: &HostRoot, path: &Path) -> Result<Connection, Error> {
    let refused = |cause| Error::Connect { path: path.to_owned(), cause: Arc::new(cause) };
    let file = host_root.open(path).and_then(|file| Ok(rustix::fs::fstat(file)?));
    match file {
        Ok(file) if FileType::from_raw_mode(file.st_mode) == FileType::Socket => {}
        Ok(_) => return Err(Error::NotASocket(path.to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(Error::Missing(path.to_owned()));
        }
        Err(e) => return Err(refused(e)),
    }
    // A plain connection first, because the channel hides the cause of a failure.
    drop(host_root.connect(path).await.map_err(refused)?);
    let (root, socket) = (host_root.clone(), path.to_owned());
    // The path is looked up again for each connection: a runtime that restarts makes a new socket.
    let dial = move |_: Uri| {
        let (root, socket) = (root.clone(), socket.clone());
        async move { root.connect(&socket).await.map(TokioIo::new) }
    };
    // The authority is never resolved: the connector dials the socket.
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector_lazy(tower::service_fn(dial));
    let mut client =
        RuntimeServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    match client.version(with_timeout(VersionRequest::default())).await {
        Ok(_) => Ok(Connection { path: path.to_owned(), client }),
        Err(status) => Err(Error::NotCri { path: path.to_owned(), cause: describe(&status) }),
    }
}

fn with_timeout<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(TIMEOUT);
    request
}

fn call_error(path: &Path, call: &'static str, status: &Status) -> Error {
    Error::Call { path: path.to_owned(), call, cause: describe(status) }
}

/// Describes a status in one line, with the cause that tonic hides behind "transport error".
fn describe(status: &Status) -> String {
    let mut text = match status.code() {
        Code::Cancelled | Code::DeadlineExceeded => return format!("timed out after {TIMEOUT:?}"),
        Code::Unimplemented => return "it does not implement CRI v1".to_owned(),
        _ => status.message().to_owned(),
    };
    let mut cause = std::error::Error::source(status);
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text.replace('\n', " ")
}
