//! `kubectl lxcfs explain`: why a pod has a view, or none.
//!
//! The decision is made here with the policy of the agent, from the pod, its namespace and the
//! agent's flags. The observed views are the agent's. Whatever the user may not read is reported as
//! unknown, with the reason.

use std::{collections::BTreeMap, process::ExitCode};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1 as core;
use kube::{Api, api::ListParams};
use serde::Serialize;

use super::{
    Connection, Row,
    agents::{Agent, api_error},
    in_one_line, observed, status,
    text::{field, print},
};
use crate::{
    args::{AgentArgs, PodSource, kubectl::Format},
    model::{
        pod::{CONTAINERS_KEY, Container, INJECT_KEY, Pod},
        selector::{Labels, Scope},
        text::Quoted,
        view::FileSet,
    },
    plan::DesiredView,
    policy::{self, Decision, Rule},
    sources::kubernetes,
    telemetry::events::CONTROLLER,
};

const BY_CREATION: &str = "the agent decides by the annotations and labels at the pod's creation \
                           (--pods-from cri), the rule above is by the current ones, and a change \
                           has no effect on this pod";

#[derive(Debug, Serialize)]
struct Explanation {
    namespace: String,
    pod: String,
    node: Option<String>,
    phase: Option<String>,
    decision: DecisionReport,
    agent: AgentReport,
    lxcfs: LxcfsReport,
    containers: Vec<ContainerReport>,
    /// The Events of kube-lxcfs on the pod, oldest first.
    events: Vec<EventReport>,
}

#[derive(Debug, Serialize)]
struct DecisionReport {
    /// Null if it is unknown.
    rule: Option<&'static str>,
    detail: String,
    /// Which annotations and labels of the pod the agent uses: the `current` ones, or those at its
    /// `creation`; null if it is unknown.
    annotations: Option<&'static str>,
    /// Invalid annotations and labels.
    invalid: Vec<String>,
}

#[derive(Debug, Default, Serialize)]
struct AgentReport {
    pod: Option<String>,
    /// Null if it is unknown.
    ready: Option<bool>,
    /// The reason why it is not ready or not known.
    why: Option<String>,
}

#[derive(Debug, Default, Serialize)]
struct LxcfsReport {
    /// Null if it is unknown.
    serves: Option<bool>,
    version: Option<String>,
}

#[derive(Debug, Serialize)]
struct ContainerReport {
    name: String,
    /// Null while it does not run.
    id: Option<String>,
    /// `all`, `none`, `keep` (left as it is) or view files; null if it is unknown.
    desired: Option<String>,
    /// As the agent reports it: `injected`, `pending`, `failed` or `skipped`.
    state: Option<String>,
    /// The state of each view file; null if it is unknown.
    observed: Option<BTreeMap<String, String>>,
    why: Option<String>,
}

#[derive(Debug, Serialize)]
struct EventReport {
    #[serde(rename = "type")]
    kind: String,
    reason: String,
    note: String,
}

/// What the agent of the pod's node reports.
#[derive(Default)]
struct NodeReport {
    agent: AgentReport,
    lxcfs: LxcfsReport,
    /// `None` if they are unknown.
    args: Option<AgentArgs>,
    /// `None` if they are unknown.
    rows: Option<Vec<Row>>,
}

impl NodeReport {
    /// Whether the agent uses the annotations and labels that a pod was created with.
    fn decides_by_creation(&self) -> bool {
        self.args.as_ref().is_some_and(|args| args.pods_from == PodSource::Cri)
    }
}

pub(super) async fn run(connection: &Connection, name: &str, format: Format) -> Result<ExitCode> {
    let Connection { client, namespace, agents } = connection;
    let pods: Api<core::Pod> = Api::namespaced(client.clone(), namespace);
    let object = pods.get(name).await.map_err(api_error)?;
    let pod = kubernetes::reduced(&object).context("failed to read the pod")?;
    let node = object.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let phase = object.status.as_ref().and_then(|status| status.phase.clone());
    let report = match &node {
        None => NodeReport {
            agent: AgentReport {
                why: Some("the pod is on no node yet".to_owned()),
                ..AgentReport::default()
            },
            ..NodeReport::default()
        },
        Some(node) => match agents.of_node(node).await {
            Ok(agent) => node_report(&agent).await,
            Err(e) => NodeReport {
                agent: AgentReport { why: Some(in_one_line(&e)), ..AgentReport::default() },
                ..NodeReport::default()
            },
        },
    };
    let namespaces: Api<core::Namespace> = Api::all(client.clone());
    let labels = namespaces.get_metadata(namespace).await.map_err(api_error);
    let labels = labels.map(|namespace| namespace.metadata.labels.unwrap_or_default());
    let (decided, decision) = decide(&pod, report.args.as_ref(), labels);
    // By the current annotations, which an agent that knows only the sandbox does not use.
    let decided = decided.filter(|_| !report.decides_by_creation());
    let containers = containers(&pod, decided.as_ref(), &report);
    let NodeReport { agent, lxcfs, .. } = report;
    let events = events(connection, name).await;
    let explanation = Explanation {
        namespace: pod.namespace,
        pod: pod.name,
        node,
        phase,
        decision,
        agent,
        lxcfs,
        containers,
        events,
    };
    print(format, &explanation, || text(&explanation))?;
    Ok(ExitCode::SUCCESS)
}

async fn node_report(agent: &Agent) -> NodeReport {
    let args = agent.args();
    let (ready, metrics, rows) =
        futures::join!(agent.get("/readyz"), agent.get("/metrics"), status::rows(agent));
    let (ready, mut why) = match ready {
        Ok((200, _)) => (Some(true), None),
        Ok((_, body)) => (Some(false), Some(String::from_utf8_lossy(&body).trim().to_owned())),
        Err(e) => (None, Some(in_one_line(&e))),
    };
    if why.is_none() {
        why = rows.as_ref().err().or(args.as_ref().err()).map(in_one_line);
    }
    let metrics = match &metrics {
        Ok((200, body)) => String::from_utf8_lossy(body),
        _ => "".into(),
    };
    NodeReport {
        agent: AgentReport { pod: Some(agent.full_name.clone()), ready, why },
        lxcfs: lxcfs_report(&metrics),
        args: args.ok(),
        rows: rows.ok(),
    }
}

/// Lxcfs, by the agent's metrics.
fn lxcfs_report(metrics: &str) -> LxcfsReport {
    let value = |name: &str| metrics.lines().find_map(|line| line.strip_prefix(name));
    LxcfsReport {
        serves: value("kube_lxcfs_lxcfs_up ").map(|value| value == "1"),
        version: value("kube_lxcfs_lxcfs_info{version=\"")
            .and_then(|rest| rest.split_once('"'))
            .map(|(version, _)| version.to_owned()),
    }
}

/// The decision about the pod, `None` if it is unknown, and its explanation.
fn decide(
    pod: &Pod,
    args: Option<&AgentArgs>,
    labels: Result<Labels>,
) -> (Option<Decision>, DecisionReport) {
    let annotations = args.map(|args| match args.pods_from {
        PodSource::Kubernetes => "current",
        PodSource::Cri => "creation",
    });
    let unknown = |detail: String| {
        (None, DecisionReport { rule: None, detail, annotations, invalid: Vec::new() })
    };
    let (scope, uses_labels) = match args {
        Some(args) => (args.scope(), args.pods_from == PodSource::Kubernetes),
        None if pod.annotations.inject.is_some() => (Scope::default(), false),
        None => {
            return unknown(format!(
                "unknown: the pod has no annotation {INJECT_KEY}, and the flags of its node's \
                 agent are unknown"
            ));
        }
    };
    let (labels, no_labels) = match labels {
        Ok(labels) if uses_labels => (Some(labels), None),
        Err(e) if uses_labels => (None, Some(in_one_line(&e))),
        _ => (None, None),
    };
    let rule = policy::rule(&scope, pod, labels.as_ref());
    if let (Rule::Default, Some(why)) = (rule, no_labels) {
        return unknown(format!("unknown: failed to read the labels of the namespace: {why}"));
    }
    let names: Vec<&str> = pod.containers.iter().map(|c| c.name.as_str()).collect();
    let decision = policy::decide_for(&scope, pod, labels.as_ref(), &names);
    let inject = pod.annotations.inject.as_deref().unwrap_or_default();
    let label = labels.as_ref().and_then(|labels| labels.get(INJECT_KEY));
    let label = label.map(String::as_str).unwrap_or_default();
    let (name, detail) = match rule {
        Rule::Annotation => {
            ("annotation", format!("annotation {INJECT_KEY} of the pod: {}", Quoted(inject)))
        }
        Rule::ExcludedNamespace => (
            "excludedNamespace",
            "the agent excludes the namespace (--exclude-namespaces): no view".to_owned(),
        ),
        Rule::PodSelector => (
            "podSelector",
            "the labels of the pod match --pod-selector of the agent: a view".to_owned(),
        ),
        Rule::NamespaceLabel => {
            ("namespaceLabel", format!("label {INJECT_KEY} of the namespace: {}", Quoted(label)))
        }
        Rule::NamespaceSelector => (
            "namespaceSelector",
            "the labels of the namespace match --namespace-selector of the agent: a view"
                .to_owned(),
        ),
        Rule::Default if scope.inject_by_default => {
            ("default", "--inject-by-default of the agent: a view".to_owned())
        }
        Rule::Default => {
            ("default", format!("no view without the annotation {INJECT_KEY}: \"true\" on the pod"))
        }
    };
    let invalid = decision.invalid.iter().map(ToString::to_string).collect();
    (Some(decision), DecisionReport { rule: Some(name), detail, annotations, invalid })
}

fn containers(pod: &Pod, decision: Option<&Decision>, report: &NodeReport) -> Vec<ContainerReport> {
    let is_view = |desired: &DesiredView| matches!(desired, DesiredView::Exactly(_));
    let has_view = decision.is_some_and(|decision| decision.by_container.values().any(is_view));
    let report_of = |container: &Container| {
        let name = &container.name;
        let id = container.id.as_ref().map(|id| id.as_str().to_owned());
        let row = report.rows.iter().flatten().find(|row| row.id.is_some() && row.id == id);
        let agents = row.and_then(|row| row.desired.as_ref());
        let view = decision.and_then(|decision| decision.by_container.get(name).copied());
        let desired = match view {
            Some(DesiredView::Unmanaged) => Some("keep".to_owned()),
            Some(DesiredView::Absent) => Some("none".to_owned()),
            Some(DesiredView::Exactly(files) | DesiredView::AtLeast(files)) => {
                Some(if files == FileSet::ALL { "all".to_owned() } else { files.to_string() })
            }
            // The agent reports every container with a desired view.
            None if report.decides_by_creation() && id.is_some() && report.rows.is_some() => {
                Some(agents.map_or("none", |desired| &desired.files).to_owned())
            }
            None => agents.map(|desired| desired.files.clone()),
        };
        let observed = (id.is_some() && report.rows.is_some())
            .then(|| row.map(|row| row.files.clone()).unwrap_or_default());
        let why = agents.and_then(|desired| desired.why.clone()).or_else(|| {
            let nests = decision.is_some_and(|decision| decision.nesting.contains(name));
            let list = pod.annotations.containers.as_deref();
            let unlisted = list.is_some_and(|list| list.split(',').all(|one| one.trim() != name));
            let why = match view {
                Some(DesiredView::Absent) if nests => {
                    "it may run containers inside (procMount: Unmasked, hostUsers: false), and a \
                     view would prevent their mounts of procfs; only the annotation of the pod \
                     injects it"
                        .to_owned()
                }
                Some(DesiredView::Absent) if unlisted && has_view => {
                    format!("the annotation {CONTAINERS_KEY} does not list it")
                }
                Some(DesiredView::Unmanaged) => {
                    "an annotation or label is invalid, so nothing is changed".to_owned()
                }
                Some(DesiredView::Exactly(_)) if id.is_none() => "it does not run".to_owned(),
                Some(DesiredView::Exactly(_)) if report.rows.is_some() && row.is_none() => {
                    "the agent does not know the container yet".to_owned()
                }
                _ => return None,
            };
            Some(why)
        });
        ContainerReport {
            name: name.clone(),
            state: agents.map(|desired| desired.state.clone()),
            id,
            desired,
            observed,
            why,
        }
    };
    pod.containers.iter().map(report_of).collect()
}

/// The Events of kube-lxcfs on a pod; none if they cannot be listed.
async fn events(connection: &Connection, pod: &str) -> Vec<EventReport> {
    let api: Api<core::Event> = Api::namespaced(connection.client.clone(), &connection.namespace);
    let of_pod = format!("involvedObject.kind=Pod,involvedObject.name={pod}");
    let Ok(list) = api.list(&ListParams::default().fields(&of_pod)).await else {
        return Vec::new();
    };
    let own = |event: &core::Event| event.reporting_component.as_deref() == Some(CONTROLLER);
    let mut events: Vec<core::Event> = list.items.into_iter().filter(own).collect();
    events.sort_by(|a, b| a.event_time.cmp(&b.event_time));
    let report = |event: core::Event| EventReport {
        kind: event.type_.unwrap_or_default(),
        reason: event.reason.unwrap_or_default(),
        note: event.message.unwrap_or_default(),
    };
    events.into_iter().map(report).collect()
}

fn text(explanation: &Explanation) -> Vec<String> {
    let Explanation { namespace, pod, node, phase, decision, agent, lxcfs, containers, events } =
        explanation;
    let phase = phase.as_deref().unwrap_or("unknown");
    let mut lines = field(0, "pod", &format!("{namespace}/{pod} ({phase})"));
    lines.extend(field(0, "node", node.as_deref().unwrap_or("none")));
    lines.extend(field(0, "rule", &decision.detail));
    if decision.annotations == Some("creation") {
        lines.extend(field(0, "note", BY_CREATION));
    }
    for invalid in &decision.invalid {
        lines.extend(field(0, "invalid", invalid));
    }
    let ready = match agent.ready {
        Some(true) => "ready",
        Some(false) => "not ready",
        None => "unknown",
    };
    let why = agent.why.iter().map(|why| format!(": {why}"));
    let name = agent.pod.iter().map(|pod| format!("{pod} "));
    let status: String = name.chain([ready.to_owned()]).chain(why).collect();
    lines.extend(field(0, "agent", &status));
    let serves = match (lxcfs.serves, &lxcfs.version) {
        (Some(true), Some(version)) => format!("serves, version {version}"),
        (Some(true), None) => "serves".to_owned(),
        (Some(false), _) => "does not serve".to_owned(),
        (None, _) => "unknown".to_owned(),
    };
    lines.extend(field(0, "lxcfs", &serves));
    for container in containers {
        let id = container.id.as_deref().map_or("not running", |id| id.get(..12).unwrap_or(id));
        lines.push(String::new());
        lines.extend(field(0, "container", &format!("{} ({id})", container.name)));
        lines.extend(field(2, "desired", container.desired.as_deref().unwrap_or("unknown")));
        let files = container.observed.as_ref();
        lines.extend(field(2, "observed", &files.map_or("unknown".to_owned(), observed_files)));
        if let Some(state) = &container.state {
            lines.extend(field(2, "state", state));
        }
        if let Some(why) = &container.why {
            lines.extend(field(2, "why", why));
        }
    }
    for (number, event) in events.iter().enumerate() {
        if number == 0 {
            lines.push(String::new());
        }
        let EventReport { kind, reason, note } = event;
        lines.extend(field(0, "event", &format!("{kind} {reason}: {note}")));
    }
    lines
}

/// `9 current: cpuinfo, meminfo`
fn observed_files(files: &BTreeMap<String, String>) -> String {
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    let counts = observed(files);
    if names.is_empty() { counts } else { format!("{counts}: {}", names.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pod of an agent that uses the runtime's sandboxes has opted out since its creation.
    #[test]
    fn desired_view_is_that_of_the_agent() {
        let id = |n: u8| n.to_string().repeat(64);
        let pod: core::Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u",
                "annotations": {"kube-lxcfs.io/inject": "false"}},
            "spec": {"containers": [{"name": "a"}, {"name": "b"}]},
            "status": {"containerStatuses": [
                {"name": "a", "state": {"running": {}},
                    "containerID": format!("containerd://{}", id(1))},
                {"name": "b", "state": {"running": {}},
                    "containerID": format!("containerd://{}", id(2))}]}
        }))
        .unwrap();
        let pod = kubernetes::reduced(&pod).unwrap();
        let row = serde_json::json!([{"namespace": "shop", "pod": "web", "container": "a",
            "id": id(1), "pid": 1, "files": {"meminfo": "current"},
            "desired": {"files": "meminfo", "state": "injected", "why": null, "reason": null}}]);
        let report = |source: &str| {
            let arguments = ["agent".to_owned(), format!("--pods-from={source}")];
            NodeReport {
                args: Some(AgentArgs::of_process(&arguments, &BTreeMap::new()).unwrap()),
                rows: Some(serde_json::from_value(row.clone()).unwrap()),
                ..NodeReport::default()
            }
        };
        for (source, expected) in [("cri", ["meminfo", "none"]), ("kubernetes", ["none", "none"])] {
            let report = report(source);
            let (decided, _) = decide(&pod, report.args.as_ref(), Ok(Labels::new()));
            let decided = decided.filter(|_| !report.decides_by_creation());
            let reported = containers(&pod, decided.as_ref(), &report);
            let desired: Vec<_> = reported.iter().map(|c| c.desired.as_deref().unwrap()).collect();
            assert_eq!(desired, expected, "{source}");
        }
    }
}
