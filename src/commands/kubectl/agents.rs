//! The agents, over the API server. HTTP requests use the port-forward of their pods: the kubelet
//! connects within the pod's network namespace, so that `/status` accepts them as loopback clients,
//! and no port is opened on any machine. The API server authorizes each by `pods/portforward`.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::api::{apps::v1::DaemonSet, core::v1 as core};
use kube::{
    Api, Client,
    api::{AttachParams, ListParams},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use crate::args::{AgentArgs, kubectl::Cluster};

/// The deadline of one request to an agent. It collects `/status` within about 10 s.
const TIMEOUT: Duration = Duration::from_secs(20);
/// The limit of a response, in bytes.
const MAX_BYTES: usize = 64 << 20;
/// The limit of the head of a response, in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// The container and the port of the agent's pod in the chart.
const CONTAINER: &str = "agent";
const PORT: &str = "http";

/// A client for the agents of a cluster.
#[derive(Clone)]
pub(super) struct Agents {
    pods: Api<core::Pod>,
    daemon_sets: Api<DaemonSet>,
    selector: String,
    namespace: String,
}

/// The pod of one agent.
pub(super) struct Agent {
    pods: Api<core::Pod>,
    /// Its namespace and name, as `NAMESPACE/NAME`.
    pub(super) full_name: String,
    pub(super) node: String,
    name: String,
    container: core::Container,
}

/// The output of a program in an agent's pod.
pub(super) struct Output {
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: String,
}

impl Agents {
    pub(super) fn new(client: Client, cluster: &Cluster) -> Agents {
        let namespace = cluster.agent_namespace.clone();
        let pods = Api::namespaced(client.clone(), &namespace);
        let daemon_sets = Api::namespaced(client, &namespace);
        Agents { pods, daemon_sets, selector: cluster.agent_selector.clone(), namespace }
    }

    /// The running agents, one for each node, in the order of their nodes.
    pub(super) async fn list(&self) -> Result<Vec<Agent>> {
        self.list_where(ListParams::default()).await
    }

    /// The running agent of a node.
    ///
    /// # Errors
    /// Fails if there is none, or the agents' namespace cannot be listed.
    pub(super) async fn of_node(&self, node: &str) -> Result<Agent> {
        let on_node = ListParams::default().fields(&format!("spec.nodeName={node}"));
        let found = self.list_where(on_node).await?.into_iter().next();
        found.ok_or_else(|| {
            anyhow!(
                "no agent runs on node {node} in namespace {}; check the node selector and the \
                 tolerations of the DaemonSet, or set --agent-namespace",
                self.namespace
            )
        })
    }

    /// The specs of the pods that the DaemonSets of the agents create.
    pub(super) async fn pod_templates(&self) -> Result<Vec<core::PodSpec>> {
        let with_labels = ListParams::default().labels(&self.selector);
        let daemon_sets = self.daemon_sets.list(&with_labels).await.map_err(|e| {
            let what = format!("failed to list the DaemonSets in {}", self.namespace);
            api_error(e).context(what)
        })?;
        Ok(daemon_sets.items.into_iter().filter_map(|one| one.spec.template.spec).collect())
    }

    async fn list_where(&self, parameters: ListParams) -> Result<Vec<Agent>> {
        let pods = self.pods.list(&parameters.labels(&self.selector)).await;
        let pods = pods.map_err(|e| {
            api_error(e).context(format!("failed to list the agents in {}", self.namespace))
        })?;
        let mut by_node = BTreeMap::new();
        for pod in pods.items {
            let Some(agent) = self.agent(pod) else { continue };
            // In an update, the former agent may still stop.
            by_node.entry(agent.node.clone()).or_insert(agent);
        }
        Ok(by_node.into_values().collect())
    }

    /// An agent, if its pod runs.
    fn agent(&self, pod: core::Pod) -> Option<Agent> {
        let runs = pod.status.as_ref()?.phase.as_deref() == Some("Running")
            && pod.metadata.deletion_timestamp.is_none();
        let spec = pod.spec?;
        let name = pod.metadata.name?;
        Some(Agent {
            pods: self.pods.clone(),
            full_name: format!("{}/{name}", self.namespace),
            node: spec.node_name?,
            name,
            container: spec.containers.into_iter().find(|c| c.name == CONTAINER)?,
        })
        .filter(|_| runs)
    }
}

impl Agent {
    /// The flags of the agent.
    ///
    /// # Errors
    /// Fails if this version does not know one of them.
    pub(super) fn args(&self) -> Result<AgentArgs> {
        let environment = self.container.env.iter().flatten();
        let environment = environment
            .filter_map(|variable| Some((variable.name.clone(), variable.value.clone()?)));
        let arguments = self.container.args.as_deref().unwrap_or_default();
        AgentArgs::of_process(arguments, &environment.collect()).map_err(|e| {
            let why = e.to_string();
            let why = why.lines().next().unwrap_or_default();
            anyhow!(
                "failed to read the flags of the agent: {why}; use kubectl lxcfs of its version"
            )
        })
    }

    fn port(&self) -> Result<u16> {
        let mut ports = self.container.ports.iter().flatten();
        let port = ports.find(|port| port.name.as_deref() == Some(PORT));
        port.and_then(|port| u16::try_from(port.container_port).ok())
            .ok_or_else(|| anyhow!("the agent {} has no port '{PORT}'", self.full_name))
    }

    /// The status and the body of a response.
    pub(super) async fn get(&self, path: &str) -> Result<(u16, Vec<u8>)> {
        let port = self.port()?;
        let response = async {
            let forwarder = self.pods.portforward(&self.name, &[port]).await;
            let mut forwarder = forwarder.map_err(api_error)?;
            let mut stream = forwarder.take_stream(port).context("no stream")?;
            let refusal = forwarder.take_error(port);
            let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let response = read_response(&mut stream).await;
            forwarder.abort();
            match (response, refusal) {
                (Err(e), Some(refusal)) => match refusal.await {
                    Some(why) => Err(anyhow!(why)),
                    None => Err(e),
                },
                (response, _) => response,
            }
        };
        with_timeout(response)
            .await
            .with_context(|| format!("failed to get {path} of the agent {}", self.full_name))
    }

    /// Runs a program in the agent's container, to its end. The API server authorizes it by
    /// `pods/exec`.
    pub(super) async fn exec(&self, command: &[&str]) -> Result<Output> {
        let parameters =
            AttachParams::default().container(CONTAINER).stdin(false).stdout(true).stderr(true);
        let output = async {
            let process = self.pods.exec(&self.name, command.to_vec(), &parameters).await;
            let mut process = process.map_err(api_error)?;
            let (stdout, stderr) = (process.stdout(), process.stderr());
            let (stdout, stderr) = (stdout.context("no stdout")?, stderr.context("no stderr")?);
            let (stdout, stderr) = futures::join!(read(stdout), read(stderr));
            let stderr = String::from_utf8_lossy(&stderr?).into_owned();
            Ok::<_, anyhow::Error>(Output { stdout: stdout?, stderr })
        };
        with_timeout(output).await.with_context(|| {
            format!("failed to run {} in the pod {}", command.join(" "), self.full_name)
        })
    }
}

async fn with_timeout<T>(operation: impl Future<Output = Result<T>>) -> Result<T> {
    let result = tokio::time::timeout(TIMEOUT, operation).await;
    result.map_err(|_| anyhow!("timed out after {} s", TIMEOUT.as_secs()))?
}

async fn read(stream: impl AsyncRead + Unpin) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.take(MAX_BYTES as u64).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

/// Reads a response of HTTP/1.x up to its `Content-Length`.
async fn read_response(stream: &mut (impl AsyncRead + Unpin)) -> Result<(u16, Vec<u8>)> {
    let mut bytes = Vec::new();
    let end_of_head = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at;
        }
        if bytes.len() > MAX_HEAD_BYTES || stream.read_buf(&mut bytes).await? == 0 {
            bail!("the response is not HTTP");
        }
    };
    let mut body = bytes.split_off(end_of_head + 4);
    let head = String::from_utf8_lossy(&bytes);
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.context("the response is not HTTP")?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let length = length.context("the response has no length")?;
    if length > MAX_BYTES {
        bail!("the response is larger than {} MiB", MAX_BYTES >> 20);
    }
    while body.len() < length {
        if stream.read_buf(&mut body).await? == 0 {
            bail!("the response ended early");
        }
    }
    body.truncate(length);
    Ok((status, body))
}

/// The message of an error of the API server, without the type's own words around it.
pub(super) fn api_error(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => anyhow!(status.message),
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn response(bytes: &[u8]) -> Option<(u16, String)> {
        let mut bytes = bytes;
        let (status, body) = read_response(&mut bytes).await.ok()?;
        Some((status, String::from_utf8(body).unwrap()))
    }

    #[tokio::test]
    async fn response_ends_at_its_length() {
        let complete = b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 3\r\n\r\nnoxyz";
        assert_eq!(response(complete).await, Some((503, "nox".into())));
        for invalid in [
            &b""[..],
            b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nno",
            b"HTTP/1.0 200 OK\r\n\r\nno",
            b"HTTP/1.0 200 OK\r\nContent-Length: 99999999999\r\n\r\nno",
            b"rubbish\r\n\r\n",
        ] {
            assert_eq!(response(invalid).await, None, "{}", String::from_utf8_lossy(invalid));
        }
    }
}
