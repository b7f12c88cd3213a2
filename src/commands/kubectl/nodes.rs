//! The nodes that should have an agent: those to which a DaemonSet of the agents assigns a pod.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use k8s_openapi::api::core::v1 as core;
use kube::{Api, Client, api::ListParams};

use super::agents::{Agents, api_error};

/// The limit of nodes in one response: a node's object has a list of its images.
const PAGE: u32 = 500;
/// The label that a node's kubelet sets, and its value on Linux.
const LINUX: (&str, &str) = ("kubernetes.io/os", "linux");
/// DaemonSets tolerate the taints with this prefix: those of the conditions of a node.
const CONDITION_TAINTS: &str = "node.kubernetes.io/";

/// The names of the nodes. Without a DaemonSet, those of all Linux nodes.
pub(super) async fn with_agents(client: &Client, agents: &Agents) -> Result<BTreeSet<String>> {
    let templates = agents.pod_templates().await?;
    let api: Api<core::Node> = Api::all(client.clone());
    let mut names = BTreeSet::new();
    let mut parameters = ListParams::default().limit(PAGE);
    loop {
        let page = api.list(&parameters).await.map_err(|e| {
            let e = api_error(e);
            e.context("failed to list the nodes")
        })?;
        let runs = |node: &core::Node| match &*templates {
            [] => is_linux(node),
            templates => templates.iter().any(|template| assigns(template, node)),
        };
        names.extend(page.items.into_iter().filter(runs).filter_map(|node| node.metadata.name));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => return Ok(names),
        }
    }
}

fn labels(node: &core::Node) -> BTreeMap<&str, &str> {
    let labels = node.metadata.labels.iter().flatten();
    labels.map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

fn is_linux(node: &core::Node) -> bool {
    labels(node).get(LINUX.0).is_none_or(|os| *os == LINUX.1)
}

/// Whether the DaemonSet of these pods assigns one to the node, as its controller decides.
fn assigns(pod: &core::PodSpec, node: &core::Node) -> bool {
    let labels = labels(node);
    let mut selector = pod.node_selector.iter().flatten();
    let selected = selector.all(|(key, value)| labels.get(&**key) == Some(&&**value));
    let affinity = pod.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let fields = BTreeMap::from([("metadata.name", name)]);
    let attracted = required.is_none_or(|required| {
        required.node_selector_terms.iter().any(|term| {
            let expressions = term.match_expressions.iter().flatten();
            let of_fields = term.match_fields.iter().flatten();
            expressions.map(|one| (one, &labels)).chain(of_fields.map(|one| (one, &fields))).all(
                |(requirement, values)| {
                    matches(requirement, values.get(&*requirement.key).copied())
                },
            )
        })
    });
    let mut taints = node.spec.iter().filter_map(|spec| spec.taints.as_ref()).flatten();
    let tolerated = taints.all(|taint| {
        let mut tolerations = pod.tolerations.iter().flatten();
        taint.effect == "PreferNoSchedule"
            || taint.key.starts_with(CONDITION_TAINTS)
            || tolerations.any(|toleration| tolerates(toleration, taint))
    });
    selected && attracted && tolerated
}

/// Whether a label or field with this value meets a requirement.
fn matches(requirement: &core::NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|value| values.iter().any(|one| one == value));
    let compare = |is: fn(&i64, &i64) -> bool| {
        let number = value.and_then(|value| value.parse().ok());
        let limit = values.first().and_then(|limit| limit.parse().ok());
        number.zip(limit).is_some_and(|(number, limit)| is(&number, &limit))
    };
    match &*requirement.operator {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(i64::gt),
        "Lt" => compare(i64::lt),
        _ => false,
    }
}

/// An empty key, effect or operator of a toleration matches every key or effect, or is `Equal`.
fn tolerates(toleration: &core::Toleration, taint: &core::Taint) -> bool {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let (key, effect) = (text(&toleration.key), text(&toleration.effect));
    let exists = toleration.operator.as_deref() == Some("Exists");
    (effect.is_empty() || effect == taint.effect)
        && (key == taint.key || key.is_empty() && exists)
        && (exists || text(&toleration.value) == text(&taint.value))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn nodes_are_those_of_the_daemon_set() {
        let affinity = |term: Value| {
            json!({"affinity": {"nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}
            }}})
        };
        let expression = |operator: &str, values: Value| {
            affinity(json!({"matchExpressions": [
                {"key": "n", "operator": operator, "values": values}
            ]}))
        };
        for (pod, expected) in [
            (json!({}), true),
            (json!({"nodeSelector": {"kubernetes.io/os": "linux"}}), true),
            (json!({"nodeSelector": {"kubernetes.io/os": "windows"}}), false),
            (json!({"nodeSelector": {"absent": ""}}), false),
            (expression("In", json!(["4", "5"])), true),
            (expression("In", json!(["4"])), false),
            (expression("NotIn", json!(["4"])), true),
            (expression("NotIn", json!(["5"])), false),
            (expression("Exists", json!([])), true),
            (expression("DoesNotExist", json!([])), false),
            (expression("Gt", json!(["4"])), true),
            (expression("Gt", json!(["5"])), false),
            (expression("Lt", json!(["6"])), true),
            (
                affinity(json!({"matchFields": [
                    {"key": "metadata.name", "operator": "In", "values": ["n1"]}
                ]})),
                true,
            ),
            (
                affinity(json!({"matchFields": [
                    {"key": "metadata.name", "operator": "NotIn", "values": ["n1"]}
                ]})),
                false,
            ),
        ] {
            let template: core::PodSpec = spec(pod.clone());
            let labels = json!({"kubernetes.io/os": "linux", "n": "5"});
            let node = json!({"metadata": {"name": "n1", "labels": labels}});
            let node: core::Node = serde_json::from_value(node).unwrap();
            assert_eq!(assigns(&template, &node), expected, "{pod}");
        }
    }

    #[test]
    fn taints_of_nodes_are_tolerated() {
        for (toleration, taint, expected) in [
            (json!({}), ["a", "b", "NoSchedule"], false),
            (json!({}), ["a", "b", "PreferNoSchedule"], true),
            (json!({}), ["node.kubernetes.io/unschedulable", "", "NoSchedule"], true),
            (json!({"operator": "Exists"}), ["a", "b", "NoExecute"], true),
            (json!({"key": "a", "operator": "Exists"}), ["a", "b", "NoExecute"], true),
            (json!({"key": "c", "operator": "Exists"}), ["a", "b", "NoExecute"], false),
            (json!({"key": "a", "value": "b"}), ["a", "b", "NoSchedule"], true),
            (json!({"key": "a", "value": "c"}), ["a", "b", "NoSchedule"], false),
            (json!({"operator": "Exists", "effect": "NoSchedule"}), ["a", "b", "NoExecute"], false),
        ] {
            let template = spec(json!({"tolerations": [toleration]}));
            let [key, value, effect] = taint;
            let node = json!({"metadata": {"name": "n1"},
                "spec": {"taints": [{"key": key, "value": value, "effect": effect}]}});
            let node: core::Node = serde_json::from_value(node).unwrap();
            assert_eq!(assigns(&template, &node), expected, "{toleration} {taint:?}");
        }
    }

    fn spec(mut pod: Value) -> core::PodSpec {
        pod["containers"] = json!([]);
        serde_json::from_value(pod).unwrap()
    }
}
