//! `kubectl lxcfs status`: the desired and the observed views of the pods of many nodes.

use std::{collections::BTreeSet, process::ExitCode};

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use k8s_openapi::api::core::v1 as core;
use kube::{Api, api::ListParams};
use serde::Serialize;

use super::{
    Connection, Row,
    agents::{Agent, api_error},
    in_one_line, nodes, observed,
    text::{field, print, table},
};
use crate::args::kubectl::Format;

/// The number of agents that are requested at the same time.
const CONCURRENCY: usize = 16;

/// Which pods are shown.
pub(super) enum Scope {
    /// Those of the connection's namespace.
    Namespace,
    Node(String),
    Cluster,
}

/// The views of one node.
#[derive(Debug, Serialize)]
struct NodeStatus {
    node: String,
    /// Namespace and name of the agent's pod.
    agent: Option<String>,
    /// The reason why the views are unknown.
    error: Option<String>,
    containers: Vec<Row>,
}

pub(super) async fn run(connection: &Connection, scope: Scope, format: Format) -> Result<ExitCode> {
    let mut missing = Vec::new();
    let mut missing_unknown = None;
    let agents = match &scope {
        Scope::Node(node) => vec![connection.agents.of_node(node).await?],
        Scope::Cluster => {
            let agents = connection.agents.list().await?;
            match nodes::with_agents(&connection.client, &connection.agents).await {
                Ok(mut nodes) => {
                    for agent in &agents {
                        nodes.remove(&agent.node);
                    }
                    missing.extend(nodes);
                }
                Err(e) => missing_unknown = Some(e),
            }
            agents
        }
        Scope::Namespace => {
            let mut nodes = nodes_of_namespace(connection).await?;
            let mut agents = connection.agents.list().await?;
            agents.retain(|agent| nodes.remove(&agent.node));
            missing.extend(nodes);
            agents
        }
    };
    let requests = agents.into_iter().map(|agent| node_status(agent, connection, &scope));
    let mut nodes: Vec<NodeStatus> =
        futures::stream::iter(requests).buffer_unordered(CONCURRENCY).collect().await;
    nodes.extend(missing.into_iter().map(|node| NodeStatus {
        node,
        agent: None,
        error: Some("no agent runs on it".to_owned()),
        containers: Vec::new(),
    }));
    nodes.sort_by(|a, b| a.node.cmp(&b.node));
    print(format, &nodes, || text(&nodes))?;
    if let Some(e) = missing_unknown {
        return Err(e.context("nodes without an agent are not shown"));
    }
    let failed = nodes.iter().any(|node| node.error.is_some());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn nodes_of_namespace(connection: &Connection) -> Result<BTreeSet<String>> {
    let pods: Api<core::Pod> = Api::namespaced(connection.client.clone(), &connection.namespace);
    let pods = pods.list(&ListParams::default()).await.map_err(api_error)?;
    let active = pods.items.into_iter().filter(|pod| {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        !matches!(phase, Some("Succeeded" | "Failed"))
    });
    Ok(active.filter_map(|pod| pod.spec?.node_name).collect())
}

async fn node_status(agent: Agent, connection: &Connection, scope: &Scope) -> NodeStatus {
    let (containers, error) = match rows(&agent).await {
        Ok(rows) => (rows, None),
        Err(e) => (Vec::new(), Some(in_one_line(&e))),
    };
    let shown = |row: &Row| match scope {
        Scope::Namespace => row.namespace.as_ref() == Some(&connection.namespace),
        Scope::Node(_) | Scope::Cluster => true,
    };
    NodeStatus {
        containers: containers.into_iter().filter(shown).collect(),
        node: agent.node,
        agent: Some(agent.full_name),
        error,
    }
}

/// The rows of the agent's `/status`.
pub(super) async fn rows(agent: &Agent) -> Result<Vec<Row>> {
    let (code, body) = agent.get("/status").await?;
    if code != 200 {
        bail!("the agent responds with {code}: {}", String::from_utf8_lossy(&body).trim());
    }
    serde_json::from_slice(&body).context("failed to read the response of the agent")
}

fn text(nodes: &[NodeStatus]) -> Vec<String> {
    let header =
        ["NODE", "POD", "CONTAINER", "DESIRED", "STATE", "OBSERVED", "WHY"].map(str::to_owned);
    let rows =
        nodes.iter().flat_map(|node| node.containers.iter().map(move |row| cells(node, row)));
    let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
    let errors = nodes.iter().filter_map(|node| {
        let error = node.error.as_ref()?;
        Some(field(0, "error", &format!("node {}: {error}", node.node)))
    });
    let errors: Vec<String> = errors.flatten().collect();
    if rows.len() == 1 && !errors.is_empty() {
        return errors;
    }
    if rows.len() == 1 {
        return vec!["No views, and none is desired.".to_owned()];
    }
    table(&rows).into_iter().chain(errors).collect()
}

fn cells(node: &NodeStatus, row: &Row) -> [String; 7] {
    let or_dash = |text: Option<&str>| text.unwrap_or("-").to_owned();
    let pod = match (&row.namespace, &row.pod) {
        (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
        _ => "-".to_owned(),
    };
    let desired = row.desired.as_ref();
    [
        node.node.clone(),
        pod,
        or_dash(row.container.as_deref()),
        desired.map_or("none", |desired| &desired.files).to_owned(),
        or_dash(desired.map(|desired| desired.state.as_str())),
        observed(&row.files),
        or_dash(desired.and_then(|desired| desired.why.as_deref())),
    ]
}
