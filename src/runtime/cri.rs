//! The CRI client (runtime.v1 of k8s.io/cri-api): which containers run, their pids, and their pods' annotations.

use std::{
    collections::HashMap,
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::{
    ContainerEventResponse, ContainerEventType, ContainerFilter, ContainerState, ContainerStateValue,
    ContainerStatusRequest, GetEventsRequest, ListContainersRequest, ListPodSandboxRequest, PodSandboxFilter,
    PodSandboxState, PodSandboxStateValue, VersionRequest, runtime_service_client::RuntimeServiceClient,
};
use tokio::{
    net::UnixStream,
    sync::{Mutex, mpsc},
};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint, Uri},
};

use super::{ContainerId, Error as RuntimeError, sandboxed};
use crate::pods::{self, Started, Trigger, Update};

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

/// The first and the longest wait before the runtime's events are asked for again.
const EVENTS_RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

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
        let sandboxes = self.sandboxes().await?;
        let mut containers: HashMap<String, Vec<pods::Container>> = HashMap::new();
        for container in self.containers().await? {
            let Ok(id) = ContainerId::new(&container.id) else { continue };
            let name = container.metadata.map(|m| m.name).unwrap_or_default();
            containers.entry(container.pod_sandbox_id).or_default().push(pods::Container { name, id: Some(id) });
        }
        let with_containers = |(id, pod): (String, pods::Pod)| pods::Pod {
            containers: containers.remove(&id).unwrap_or_default(),
            ..pod
        };
        Ok(sandboxes.into_iter().map(with_containers).collect())
    }

    /// Tells of starts and ends of containers as the runtime does (`GetContainerEvents`), until the receiver is gone. A runtime
    /// that has no events, as containerd before 1.7, is asked once.
    pub async fn tell_events(self, updates: mpsc::Sender<Update>) {
        let mut wait = EVENTS_RETRY.0;
        while !updates.is_closed() {
            let begun = Instant::now();
            match self.events(&updates).await {
                // CRI-O without evented PLEG ends every stream at once.
                Ok(true) => {}
                Ok(false) => {
                    tracing::debug!("the runtime has no container events");
                    return updates.closed().await;
                }
                // Whoever needs the runtime tells that it is away.
                Err(e) => tracing::debug!("no events: {e}"),
            }
            wait = if begun.elapsed() > EVENTS_RETRY.1 { EVENTS_RETRY.0 } else { (wait * 2).min(EVENTS_RETRY.1) };
            tokio::time::sleep(wait).await;
        }
    }

    /// Whether there were any; the end of the stream is no error.
    async fn events(&self, updates: &mpsc::Sender<Update>) -> Result<bool, Error> {
        let Connected { path, mut client } = self.connect().await?;
        let failed = |status: &Status| self.failed(&path, "GetContainerEvents", status);
        // The stream begins with its first message, and has no end in time: this is no timed request.
        let asked = client.get_container_events(GetEventsRequest {});
        let missed = async {
            // What started while nobody listened. Asked for beside the stream, so that nothing falls between the two.
            tokio::time::sleep(EVENTS_RETRY.0).await;
            let asked = Instant::now();
            match self.known().await {
                Ok(running) => drop(updates.send(Update::Running { running, by: Trigger::Cri, asked }).await),
                Err(e) => tracing::debug!("what runs cannot be listed: {e}"),
            }
        };
        let told = async {
            let mut stream = match asked.await {
                Ok(stream) => stream.into_inner(),
                Err(status) if status.code() == Code::Unimplemented => return Ok(false),
                Err(status) => return Err(failed(&status)),
            };
            loop {
                match stream.message().await {
                    Ok(Some(event)) => {
                        if let Some(update) = update(event)
                            && updates.send(update).await.is_err()
                        {
                            return Ok(true);
                        }
                    }
                    Ok(None) => return Ok(true),
                    Err(status) if status.code() == Code::Unimplemented => return Ok(false),
                    Err(status) => return Err(failed(&status)),
                }
            }
        };
        tokio::pin!(told, missed);
        tokio::select! {
            ended = &mut told => return ended,
            () = &mut missed => {}
        }
        told.await
    }

    /// The containers that are created or running, each with its pod.
    async fn known(&self) -> Result<Vec<Started>, Error> {
        let pods: HashMap<String, pods::Pod> = self.sandboxes().await?.into_iter().collect();
        let (created, running) = (ContainerState::ContainerCreated as i32, ContainerState::ContainerRunning as i32);
        let known = self.list_containers(ContainerFilter::default()).await?.into_iter();
        let started = |container: k8s_cri::v1::Container| {
            let pod = pods.get(&container.pod_sandbox_id)?.clone();
            let id = ContainerId::new(&container.id).ok()?;
            Some(Started { pod, name: container.metadata.unwrap_or_default().name, id, pid: None })
        };
        Ok(known.filter(|c| c.state == created || c.state == running).filter_map(started).collect())
    }

    /// The pods of all ready sandboxes by sandbox id, without their containers.
    async fn sandboxes(&self) -> Result<Vec<(String, pods::Pod)>, Error> {
        let Connected { path, mut client } = self.connect().await?;
        let ready = PodSandboxStateValue { state: PodSandboxState::SandboxReady as i32 };
        let filter = PodSandboxFilter { state: Some(ready), ..PodSandboxFilter::default() };
        let sandboxes = client.list_pod_sandbox(timed(ListPodSandboxRequest { filter: Some(filter) })).await;
        let sandboxes = sandboxes.map_err(|status| self.failed(&path, "ListPodSandbox", &status))?.into_inner().items;
        Ok(sandboxes.into_iter().map(|s| (s.id, pod(s.metadata.unwrap_or_default(), &s.annotations))).collect())
    }

    async fn containers(&self) -> Result<Vec<k8s_cri::v1::Container>, Error> {
        let running = ContainerStateValue { state: ContainerState::ContainerRunning as i32 };
        self.list_containers(ContainerFilter { state: Some(running), ..ContainerFilter::default() }).await
    }

    async fn list_containers(&self, filter: ContainerFilter) -> Result<Vec<k8s_cri::v1::Container>, Error> {
        let Connected { path, mut client } = self.connect().await?;
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

/// A pod as its sandbox knows it, without its containers.
fn pod(metadata: k8s_cri::v1::PodSandboxMetadata, annotations: &HashMap<String, String>) -> pods::Pod {
    pods::Pod {
        uid: metadata.uid,
        namespace: metadata.namespace,
        name: metadata.name,
        annotations: crate::policy::Annotations::from_map(annotations),
        containers: Vec::new(),
    }
}

/// What an event tells us; sandboxes have events too, without a container's status.
fn update(event: ContainerEventResponse) -> Option<Update> {
    let id = ContainerId::new(&event.container_id).ok()?;
    let kind = event.container_event_type();
    if let ContainerEventType::ContainerStoppedEvent | ContainerEventType::ContainerDeletedEvent = kind {
        return Some(Update::Ended(id));
    }
    let status = event.containers_statuses.into_iter().find(|status| status.id == event.container_id)?;
    let sandbox = event.pod_sandbox_status?;
    // An old one may come late: a runtime keeps those that nobody has taken.
    if kind != ContainerEventType::ContainerStartedEvent || status.state != ContainerState::ContainerRunning as i32 {
        return None;
    }
    let name = status.metadata?.name;
    let pod = pod(sandbox.metadata?, &sandbox.annotations);
    Some(Update::Started(Started { pod, name, id, pid: None }, Trigger::Cri))
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
