//! `--pods-from kubernetes`: watches of this node's pods and of the namespaces that carry the label.
//!
//! Thousands of agents may start at once, so both lists are answered from the API server's cache (`resourceVersion=0`), the
//! watches get bookmarks, and retries are spread (kube's default backoff: 0.8 to 30 s, with jitter). Of each pod only the
//! fields below are decoded; of namespaces only the metadata of those that have the label is asked for.

use std::{borrow::Cow, collections::HashMap, pin::pin};

use futures::{Stream, StreamExt};
use k8s_openapi::{api::core::v1 as core, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Client, Resource,
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt,
        watcher::{self, Config, Event},
    },
};
use serde::Deserialize;
use tokio::sync::mpsc::Sender;

use super::{Container, Namespace, Pod, Update};
use crate::{
    policy::{Annotations, INJECT},
    report::OutageLog,
    runtime::ContainerId,
};

/// Watches the pods of `node` until the receiver is gone.
pub async fn watch_pods(client: Client, node: String, updates: Sender<Update>) {
    let api: Api<WirePod> = Api::all(client);
    let config = Config::default().fields(&format!("spec.nodeName={node}")).any_semantic();
    let stream = watcher::watcher(api, config).default_backoff();
    let names = Names { all: Update::Pods, one: Update::Pod, gone: Update::PodGone };
    forward("pods", stream, |pod| Some(reduced(pod)), |pod| pod.uid.clone(), names, updates).await;
}

/// Watches the labels of namespaces until the receiver is gone.
pub async fn watch_namespaces(client: Client, updates: Sender<Update>) {
    let api: Api<PartialObjectMeta<core::Namespace>> = Api::all(client);
    // A namespace that loses the label is told as deleted to a watch that selects by it.
    let config = Config::default().labels(INJECT).any_semantic();
    let stream = watcher::watcher(api, config).default_backoff();
    let names = Names { all: Update::Namespaces, one: Update::Namespace, gone: Update::NamespaceGone };
    forward("namespaces", stream, label_of, |namespace| namespace.name.clone(), names, updates).await;
}

/// The updates that a kind of object is told by.
struct Names<T> {
    all: fn(Vec<T>) -> Update,
    one: fn(T) -> Update,
    gone: fn(String) -> Update,
}

async fn forward<K: Send + 'static, T>(
    what: &'static str,
    stream: impl Stream<Item = watcher::Result<Event<K>>>,
    reduce: impl Fn(K) -> Option<T>,
    key: impl Fn(&T) -> String,
    names: Names<T>,
    updates: Sender<Update>,
) {
    let mut stream = pin!(stream);
    let mut listed = Vec::new();
    let mut outage = OutageLog::new(what);
    while let Some(event) = stream.next().await {
        let update = match event {
            Ok(event) => {
                outage.recovered(&format!("the watch of {what} works again"));
                match event {
                    Event::Init => {
                        listed = Vec::new();
                        None
                    }
                    Event::InitApply(object) => {
                        listed.extend(reduce(object));
                        None
                    }
                    Event::InitDone => Some((names.all)(std::mem::take(&mut listed))),
                    Event::Apply(object) => reduce(object).map(names.one),
                    Event::Delete(object) => reduce(object).map(|object| (names.gone)(key(&object))),
                }
            }
            Err(e) => {
                outage.failed(&format!("failed to watch {what} at the API server"), &e);
                None
            }
        };
        if let Some(update) = update
            && updates.send(update).await.is_err()
        {
            return;
        }
    }
}

fn label_of(namespace: PartialObjectMeta<core::Namespace>) -> Option<Namespace> {
    let label = namespace.metadata.labels?.remove(INJECT)?;
    Some(Namespace { name: namespace.metadata.name?, label })
}

/// The fields of a Pod that are decoded.
#[derive(Clone, Debug, Deserialize)]
struct WirePod {
    metadata: WireMeta,
    #[serde(default)]
    spec: WireSpec,
    #[serde(default)]
    status: WireStatus,
}

/// [`ObjectMeta`] without what is large: managed fields, and annotations that are none of ours.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(from = "FullMeta")]
struct WireMeta {
    /// What kube's watcher reads: name, namespace, uid, resource version.
    kube: ObjectMeta,
    annotations: Annotations,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FullMeta {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

impl From<FullMeta> for WireMeta {
    fn from(full: FullMeta) -> Self {
        WireMeta {
            annotations: Annotations::from_map(&full.annotations),
            kube: ObjectMeta {
                name: full.name,
                namespace: full.namespace,
                uid: full.uid,
                resource_version: full.resource_version,
                ..ObjectMeta::default()
            },
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireSpec {
    #[serde(default)]
    init_containers: Vec<WireContainer>,
    #[serde(default)]
    containers: Vec<WireContainer>,
    #[serde(default)]
    ephemeral_containers: Vec<WireContainer>,
}

#[derive(Clone, Debug, Deserialize)]
struct WireContainer {
    name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct WireStatus {
    #[serde(default, rename = "initContainerStatuses")]
    init: Vec<WireContainerStatus>,
    #[serde(default, rename = "containerStatuses")]
    main: Vec<WireContainerStatus>,
    #[serde(default, rename = "ephemeralContainerStatuses")]
    ephemeral: Vec<WireContainerStatus>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireContainerStatus {
    name: String,
    #[serde(rename = "containerID")]
    container_id: Option<String>,
    #[serde(default)]
    state: WireState,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct WireState {
    running: Option<serde::de::IgnoredAny>,
}

impl Resource for WirePod {
    type DynamicType = ();
    type Scope = k8s_openapi::NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        core::Pod::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        core::Pod::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        core::Pod::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        core::Pod::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata.kube
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata.kube
    }
}

fn reduced(pod: WirePod) -> Pod {
    let WireStatus { init, main, ephemeral } = pod.status;
    let statuses = init.into_iter().chain(main).chain(ephemeral);
    let mut running: HashMap<String, ContainerId> = statuses
        .filter(|status| status.state.running.is_some())
        .filter_map(|status| Some((status.name, ContainerId::from_url(&status.container_id?).ok()?)))
        .collect();
    let WireSpec { init_containers, containers, ephemeral_containers } = pod.spec;
    let all = init_containers.into_iter().chain(containers).chain(ephemeral_containers);
    let container = |c: WireContainer| Container { id: running.remove(&c.name), name: c.name };
    let containers = all.map(container).collect();
    let WireMeta { kube, annotations } = pod.metadata;
    Pod {
        uid: kube.uid.unwrap_or_default(),
        namespace: kube.namespace.unwrap_or_default(),
        name: kube.name.unwrap_or_default(),
        annotations,
        containers,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a 1.33 API server gives it, with an init container that ended, a sidecar (an init container that runs on), an
    /// ephemeral container, and `hostUsers: false`.
    const POD: &str = r#"{
        "metadata": {"name": "web", "namespace": "shop", "uid": "u-1", "resourceVersion": "42",
            "annotations": {"kube-lxcfs.io/inject": "true", "other": "x"},
            "managedFields": [{"manager": "kubectl"}]},
        "spec": {"hostUsers": false, "nodeName": "n",
            "initContainers": [{"name": "setup"}, {"name": "proxy", "restartPolicy": "Always"}],
            "containers": [{"name": "app", "image": "x"}, {"name": "waiting"}],
            "ephemeralContainers": [{"name": "debugger"}]},
        "status": {
            "initContainerStatuses": [
                {"name": "setup", "containerID": "containerd://aa", "state": {"terminated": {"exitCode": 0}}},
                {"name": "proxy", "containerID": "containerd://bb", "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}],
            "containerStatuses": [
                {"name": "app", "containerID": "cri-o://cc", "state": {"running": {}}},
                {"name": "waiting", "state": {"waiting": {"reason": "ContainerCreating"}}}],
            "ephemeralContainerStatuses": [{"name": "debugger", "containerID": "docker://dd", "state": {"running": {}}}]}
    }"#;

    #[test]
    fn all_kinds_of_containers_count_and_only_running_ones_have_an_id() {
        let pod = reduced(serde_json::from_str(POD).unwrap());
        let ids: Vec<_> =
            pod.containers.iter().map(|c| (c.name.as_str(), c.id.as_ref().map(ContainerId::as_str))).collect();
        let expected =
            [("setup", None), ("proxy", Some("bb")), ("app", Some("cc")), ("waiting", None), ("debugger", Some("dd"))];
        assert_eq!(ids, expected);
        assert_eq!((pod.uid.as_str(), pod.namespace.as_str(), pod.name.as_str()), ("u-1", "shop", "web"));
        assert_eq!(pod.annotations.inject.as_deref(), Some("true"));
    }

    #[test]
    fn a_pod_that_was_only_just_bound_decodes() {
        let pod = reduced(
            serde_json::from_str(r#"{"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}]}}"#).unwrap(),
        );
        assert_eq!(pod.containers, [Container { name: "a".into(), id: None }]);
    }
}
