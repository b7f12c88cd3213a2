//! The CRI client (runtime.v1 of k8s.io/cri-api): which containers run, their pids, and their pods' annotations.

use std::{
    collections::HashMap,
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::{
    ContainerFilter, ContainerState, ContainerStateValue, ContainerStatusRequest, ListContainersRequest,
    ListPodSandboxRequest, PodSandboxFilter, PodSandboxState, PodSandboxStateValue, VersionRequest,
    runtime_service_client::RuntimeServiceClient,
};
use tokio::{net::UnixStream, sync::Mutex};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint, Uri},
};

use super::{ContainerId, Error as RuntimeError, sandboxed};
use crate::pods;

/// Where runtimes listen, in the order they are tried: containerd (its own, k3s's), CRI-O, cri-dockerd, iSulad.
const DEFAULT_ENDPOINTS: [&str; 5] = [
    "/run/containerd/containerd.sock",
    "/run/k3s/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/cri-dockerd.sock",
    "/var/run/isulad.sock",
];

/// Each call is answered within this time or counts as not answered.
const TIMEOUT: Duration = Duration::from_secs(2);

/// As the kubelet's: verbose states carry whole OCI specs, and lists all containers of a node.
const MOST_BYTES: usize = 16 << 20;

/// A socket where a runtime may listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CriEndpoint(PathBuf);

impl std::str::FromStr for CriEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = text.strip_prefix("unix://").unwrap_or(text);
        if path.starts_with('/') {
            Ok(CriEndpoint(path.into()))
        } else {
            Err("expected is unix:// and an absolute path, as in unix:///run/containerd/containerd.sock".into())
        }
    }
}

/// Why the runtime gave no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("no CRI runtime answers at {}; name its socket with --cri-endpoint", DEFAULT_ENDPOINTS.join(", "))]
    NoneFound,
    #[error("CRI endpoint {0}: no such file; is the runtime running? --cri-endpoint names its socket")]
    Missing(PathBuf),
    #[error("CRI endpoint {0}: it is no socket; name the runtime's socket with --cri-endpoint")]
    NoSocket(PathBuf),
    #[error("CRI endpoint {path}: cannot connect: {cause}; is the runtime running?")]
    Connect { path: PathBuf, cause: Arc<io::Error> },
    #[error(
        "CRI endpoint {path}: what listens there does not speak CRI v1 ({cause}); name the runtime's socket with --cri-endpoint"
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
struct Connected {
    path: PathBuf,
    client: RuntimeServiceClient<Channel>,
}

/// A client that connects when first asked and again after the runtime was away.
#[derive(Clone, Debug)]
pub struct Cri {
    endpoint: Option<CriEndpoint>,
    connected: Arc<Mutex<Option<Connected>>>,
}

impl Cri {
    /// Without an endpoint, the first default one that answers is used.
    pub fn new(endpoint: Option<CriEndpoint>) -> Cri {
        Cri { endpoint, connected: Arc::default() }
    }

    /// # Errors
    /// See [`Error`].
    pub async fn version(&self) -> Result<Version, Error> {
        let Connected { path, mut client } = self.connect().await?;
        let answer = client.version(timed(VersionRequest::default())).await;
        let answer = answer.map_err(|status| self.failed(&path, "Version", &status))?.into_inner();
        Ok(Version { endpoint: path, name: answer.runtime_name, version: answer.runtime_version })
    }

    /// The pid of a running container, from `ContainerStatus` with `verbose`.
    ///
    /// # Errors
    /// [`RuntimeError::NotRunning`], [`RuntimeError::Sandboxed`], or that the runtime did not answer.
    pub async fn pid(&self, id: &ContainerId) -> Result<i64, RuntimeError> {
        let Connected { path, mut client } = self.connect().await?;
        let request = ContainerStatusRequest { container_id: id.to_string(), verbose: true };
        let answer = match client.container_status(timed(request)).await {
            Ok(answer) => answer.into_inner(),
            Err(status) if status.code() == Code::NotFound => return Err(RuntimeError::NotRunning(id.clone())),
            Err(status) => return Err(self.failed(&path, "ContainerStatus", &status).into()),
        };
        if answer.status.is_some_and(|s| s.state != ContainerState::ContainerRunning as i32) {
            return Err(RuntimeError::NotRunning(id.clone()));
        }
        let no_pid = |cause: &str| Error::Call { path: path.clone(), call: "ContainerStatus", cause: cause.to_owned() };
        // containerd, CRI-O and iSulad put what they know into one JSON text under "info"; cri-dockerd has no pid there.
        let info = answer.info.get("info").map_or("{}", String::as_str);
        let info: serde_json::Value =
            serde_json::from_str(info).map_err(|e| no_pid(&format!("its info is no JSON: {e}")))?;
        for key in ["runtimeType", "runtimeHandler"] {
            if let Some(kind) = info.get(key).and_then(|v| v.as_str()).and_then(sandboxed) {
                return Err(RuntimeError::Sandboxed { id: id.clone(), kind: kind.to_owned() });
            }
        }
        match info.get("pid").and_then(serde_json::Value::as_i64) {
            Some(pid) if pid > 0 => Ok(pid),
            Some(_) => Err(RuntimeError::NotRunning(id.clone())),
            None => Err(no_pid("its info names no pid; use --pid-from proc").into()),
        }
    }

    /// The ids of all running containers.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn running(&self) -> Result<Vec<ContainerId>, Error> {
        let containers = self.containers().await?;
        // An id that is none cannot be asked for either.
        Ok(containers.iter().filter_map(|c| ContainerId::new(&c.id).ok()).collect())
    }

    /// The pods of all ready sandboxes with their running containers.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn pods(&self) -> Result<Vec<pods::Pod>, Error> {
        let Connected { path, mut client } = self.connect().await?;
        let ready = PodSandboxStateValue { state: PodSandboxState::SandboxReady as i32 };
        let filter = PodSandboxFilter { state: Some(ready), ..PodSandboxFilter::default() };
        let sandboxes = client.list_pod_sandbox(timed(ListPodSandboxRequest { filter: Some(filter) })).await;
        let sandboxes = sandboxes.map_err(|status| self.failed(&path, "ListPodSandbox", &status))?.into_inner().items;
        let mut containers: HashMap<String, Vec<pods::Container>> = HashMap::new();
        for container in self.containers().await? {
            let Ok(id) = ContainerId::new(&container.id) else { continue };
            let name = container.metadata.map(|m| m.name).unwrap_or_default();
            containers.entry(container.pod_sandbox_id).or_default().push(pods::Container { name, id: Some(id) });
        }
        let pod = |sandbox: k8s_cri::v1::PodSandbox| {
            let metadata = sandbox.metadata.unwrap_or_default();
            pods::Pod {
                uid: metadata.uid,
                namespace: metadata.namespace,
                name: metadata.name,
                annotations: crate::policy::Annotations::from_map(&sandbox.annotations),
                containers: containers.remove(&sandbox.id).unwrap_or_default(),
            }
        };
        Ok(sandboxes.into_iter().map(pod).collect())
    }

    async fn containers(&self) -> Result<Vec<k8s_cri::v1::Container>, Error> {
        let Connected { path, mut client } = self.connect().await?;
        let running = ContainerStateValue { state: ContainerState::ContainerRunning as i32 };
        let filter = ContainerFilter { state: Some(running), ..ContainerFilter::default() };
        let answer = client.list_containers(timed(ListContainersRequest { filter: Some(filter) })).await;
        Ok(answer.map_err(|status| self.failed(&path, "ListContainers", &status))?.into_inner().containers)
    }

    async fn connect(&self) -> Result<Connected, Error> {
        let mut connected = self.connected.lock().await;
        if let Some(connected) = &*connected {
            return Ok(connected.clone());
        }
        let found = match &self.endpoint {
            Some(CriEndpoint(path)) => connect(path).await?,
            None => {
                let mut tried = Err(Error::NoneFound);
                for path in DEFAULT_ENDPOINTS.map(Path::new) {
                    match connect(path).await {
                        Ok(found) => {
                            tried = Ok(found);
                            break;
                        }
                        Err(Error::Missing(_)) => {}
                        // A socket that is there says more than that none is.
                        Err(e) => tried = tried.or(Err(e)),
                    }
                }
                tried?
            }
        };
        Ok(connected.insert(found).clone())
    }

    fn failed(&self, path: &Path, call: &'static str, status: &Status) -> Error {
        Error::Call { path: path.to_owned(), call, cause: told(status) }
    }
}

/// Connects and asks for the version, so that what is connected is a CRI runtime. The channel reconnects by itself later.
async fn connect(path: &Path) -> Result<Connected, Error> {
    match std::fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Error::Missing(path.to_owned())),
        Ok(file) if !file.file_type().is_socket() => return Err(Error::NoSocket(path.to_owned())),
        _ => {}
    }
    let refused = |cause| Error::Connect { path: path.to_owned(), cause: Arc::new(cause) };
    // Once by hand: the channel would hide why.
    drop(UnixStream::connect(path).await.map_err(refused)?);
    let socket = path.to_owned();
    let dial = move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    };
    // The authority is never resolved: the connector dials the socket.
    let channel = Endpoint::from_static("http://localhost").connect_with_connector_lazy(tower::service_fn(dial));
    let mut client = RuntimeServiceClient::new(channel).max_decoding_message_size(MOST_BYTES);
    match client.version(timed(VersionRequest::default())).await {
        Ok(_) => Ok(Connected { path: path.to_owned(), client }),
        Err(status) => Err(Error::NotCri { path: path.to_owned(), cause: told(&status) }),
    }
}

fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(TIMEOUT);
    request
}

/// A status in one line, with the cause that tonic hides behind «transport error».
fn told(status: &Status) -> String {
    let mut told = match status.code() {
        Code::Cancelled | Code::DeadlineExceeded => return format!("no answer within {TIMEOUT:?}"),
        Code::Unimplemented => return "it does not know CRI v1".to_owned(),
        _ => status.message().to_owned(),
    };
    let mut cause = std::error::Error::source(status);
    while let Some(e) = cause {
        told = format!("{told}: {e}");
        cause = e.source();
    }
    told.replace('\n', " ")
}
