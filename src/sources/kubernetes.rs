//! The API server (`--pods-from kubernetes`): watches of this node's pods and of the namespaces
//! that carry the label.
//!
//! Thousands of agents may start together, and lose their watches together. Both lists are served
//! from the API server's cache (`resourceVersion=0`), the watches use bookmarks, and what follows
//! a failure or an early end of a watch is spread at random ([`Retries`], [`Reconnects`]). Only the
//! fields below are decoded of a pod. Of namespaces, only the metadata of those with the label is
//! requested; with `--namespace-selector`, of all.

use std::{
    borrow::Cow,
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::http::Request;
use futures::{Stream, StreamExt};
use k8s_openapi::{api::core::v1 as core, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Client, Resource,
    client::Body,
    core::PartialObjectMeta,
    runtime::watcher::{self, Config, Event},
};
use serde::Deserialize;
use tokio::sync::mpsc::Sender;

use crate::{
    model::{
        container_id::ContainerId,
        pod::{Annotations, Container, INJECT_KEY, Namespace, Pod, Update},
        selector::Labels,
    },
    telemetry::{
        Backoff, Delays, OutageLog,
        metrics::{Metrics, Watched},
    },
};

/// The window in which a failed request is repeated, or a watch that ended early is resumed. When
/// an API server exits, all agents lose their watches in the same moment.
const RETRY_WINDOW: Backoff = Backoff::new(Duration::from_secs(4), Duration::from_secs(32));
/// A watch without changes reports no success. After this time without a failure it had one.
const STABLE: Duration = Duration::from_secs(120);
/// The API server ends a watch after this time, in seconds.
const WATCH_TIMEOUT: u32 = 290;
/// A watch that ends within this time before its timeout counts as ended by the timeout.
const TIMEOUT_MARGIN: Duration = Duration::from_secs(10);

/// Watches the pods of `node` until the receiver is dropped.
pub async fn watch_pods(
    client: Client,
    node: String,
    updates: Sender<Update>,
    metrics: Arc<Metrics>,
) {
    let api: Api<SlimPod> = Api::all(spread_reconnects(client, tokio::time::sleep));
    let config = cached_lists().fields(&format!("spec.nodeName={node}"));
    let stream = watcher::watcher(api, config);
    let kinds = UpdateKinds {
        source: Watched::Pods,
        replaced: Update::PodsReplaced,
        applied: Update::PodApplied,
        deleted: Update::PodDeleted,
    };
    let key = |pod: &Pod| pod.uid.clone();
    forward(stream, |pod| Some(into_pod(pod)), key, kinds, updates, &metrics).await;
}

/// Watches the labels of namespaces until the receiver is dropped: of those with the label
/// [`INJECT_KEY`], or of `all`.
pub async fn watch_namespaces(
    client: Client,
    all: bool,
    updates: Sender<Update>,
    metrics: Arc<Metrics>,
) {
    let client = spread_reconnects(client, tokio::time::sleep);
    let api: Api<PartialObjectMeta<core::Namespace>> = Api::all(client);
    // To a watch that selects by the label, a namespace that loses it appears as deleted.
    let config = if all { cached_lists() } else { cached_lists().labels(INJECT_KEY) };
    let stream = watcher::watcher(api, config);
    let kinds = UpdateKinds {
        source: Watched::Namespaces,
        replaced: Update::NamespacesReplaced,
        applied: Update::NamespaceApplied,
        deleted: Update::NamespaceDeleted,
    };
    let key = |namespace: &Namespace| namespace.name.clone();
    forward(stream, into_namespace, key, kinds, updates, &metrics).await;
}

/// Lists come from the API server's cache. They have no pages: kube omits `resourceVersion=0` from
/// a list with a limit, and the API server then reads all pods of the cluster from etcd.
fn cached_lists() -> Config {
    Config { page_size: None, ..Config::default() }.timeout(WATCH_TIMEOUT).any_semantic()
}

/// A client for one watcher, whose watches are delayed by [`Reconnects`].
fn spread_reconnects<S: Future<Output = ()> + Send>(
    client: Client,
    sleep: impl Fn(Duration) -> S + Clone + Send + 'static,
) -> Client {
    let namespace = client.default_namespace().to_owned();
    let reconnects = Arc::new(Mutex::new(Reconnects::default()));
    let service = tower::service_fn(move |request: Request<Body>| {
        let (client, sleep, reconnects) = (client.clone(), sleep.clone(), reconnects.clone());
        async move {
            let lock = || reconnects.lock().unwrap_or_else(PoisonError::into_inner);
            let query = request.uri().query().unwrap_or_default();
            let is_watch = query.split('&').any(|parameter| parameter == "watch=true");
            let delay = lock().delay(is_watch, Instant::now());
            if let Some(delay) = delay {
                sleep(delay).await;
            }
            let response = client.send(request).await?;
            if is_watch && response.status().is_success() {
                lock().started(Instant::now());
            }
            Ok::<_, kube::Error>(response)
        }
    });
    Client::new(service, namespace)
}

/// The delay of a watch after one that the API server ended early, at its exit. kube's watcher
/// resumes a watch that has ended without a delay.
#[derive(Debug, Default)]
struct Reconnects {
    /// The start of the last watch, if no request followed.
    last_start: Option<Instant>,
}

impl Reconnects {
    /// The API server accepted a watch.
    fn started(&mut self, now: Instant) {
        self.last_start = Some(now);
    }

    /// The delay of a request at `now`. A watch after a list, after a failed request or after the
    /// timeout of the last watch has none.
    fn delay(&mut self, is_watch: bool, now: Instant) -> Option<Duration> {
        let age = now.saturating_duration_since(self.last_start.take()?);
        let ended_early = age + TIMEOUT_MARGIN < Duration::from_secs(WATCH_TIMEOUT.into());
        (is_watch && ended_early).then(|| RETRY_WINDOW.start().next_spread())
    }
}

/// The updates of one kind of object.
struct UpdateKinds<T> {
    source: Watched,
    replaced: fn(Vec<T>) -> Update,
    applied: fn(T) -> Update,
    deleted: fn(String) -> Update,
}

/// The delays of one watcher after failures. kube's own backoff starts again with each
/// [`Event::Init`], which precedes every list: failing lists would be repeated every 0.8 to 1.6 s.
#[derive(Debug)]
struct Retries {
    delays: Delays,
    last_failure: Option<Instant>,
}

impl Retries {
    fn new() -> Retries {
        Retries { delays: RETRY_WINDOW.start(), last_failure: None }
    }

    /// The API server sent objects.
    fn received<K>(&mut self, event: &Event<K>) {
        if !matches!(event, Event::Init) {
            self.delays.reset();
        }
    }

    /// The delay after a failure at `now`.
    fn delay(&mut self, error: &watcher::Error, now: Instant) -> Duration {
        let previous = self.last_failure.replace(now);
        let is_stable = previous.is_some_and(|at| now.saturating_duration_since(at) > STABLE);
        // 410 Gone: the API server works, but does not know the version of the watch.
        let is_expired = matches!(error, watcher::Error::WatchError(status) if status.code == 410);
        if is_stable || is_expired {
            self.delays.reset();
        }
        self.delays.next_spread()
    }
}

/// Forwards the events of a watch as updates.
async fn forward<K: Send + 'static, T>(
    stream: impl Stream<Item = watcher::Result<Event<K>>>,
    convert: impl Fn(K) -> Option<T>,
    key: impl Fn(&T) -> String,
    kinds: UpdateKinds<T>,
    updates: Sender<Update>,
    metrics: &Metrics,
) {
    let subject = kinds.source.name();
    let mut stream = pin!(stream);
    let mut listed = Vec::new();
    let mut outage = OutageLog::new(subject);
    let mut retries = Retries::new();
    while let Some(event) = stream.next().await {
        let update = match event {
            Ok(event) => {
                retries.received(&event);
                outage.recovered(&format!("the watch of {subject} works again"));
                match event {
                    Event::Init => {
                        listed = Vec::new();
                        None
                    }
                    Event::InitApply(object) => {
                        listed.extend(convert(object));
                        None
                    }
                    Event::InitDone => Some((kinds.replaced)(std::mem::take(&mut listed))),
                    Event::Apply(object) => convert(object).map(kinds.applied),
                    Event::Delete(object) => {
                        convert(object).map(|object| (kinds.deleted)(key(&object)))
                    }
                }
            }
            Err(e) => {
                metrics.watch_failed(kinds.source);
                outage.failed(&format!("failed to watch {subject} at the API server"), &e);
                tokio::time::sleep(retries.delay(&e, Instant::now())).await;
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

fn into_namespace(namespace: PartialObjectMeta<core::Namespace>) -> Option<Namespace> {
    let labels = namespace.metadata.labels.unwrap_or_default();
    Some(Namespace { name: namespace.metadata.name?, labels })
}

/// The fields of a Pod that are decoded.
#[derive(Clone, Debug, Deserialize)]
struct SlimPod {
    metadata: SlimMeta,
    #[serde(default)]
    spec: SlimSpec,
    #[serde(default)]
    status: SlimStatus,
}

/// [`ObjectMeta`] without its large parts: managed fields and unrelated annotations.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(from = "FullMeta")]
struct SlimMeta {
    /// The fields that kube's watcher reads: name, namespace, uid, resource version.
    kube: ObjectMeta,
    annotations: Annotations,
    labels: Labels,
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
    #[serde(default)]
    labels: Labels,
}

impl From<FullMeta> for SlimMeta {
    fn from(full: FullMeta) -> Self {
        SlimMeta {
            annotations: Annotations::from_map(&full.annotations),
            labels: full.labels,
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
struct SlimSpec {
    host_users: Option<bool>,
    #[serde(default)]
    init_containers: Vec<SlimContainer>,
    #[serde(default)]
    containers: Vec<SlimContainer>,
    #[serde(default)]
    ephemeral_containers: Vec<SlimContainer>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SlimContainer {
    name: String,
    security_context: Option<SlimSecurityContext>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SlimSecurityContext {
    proc_mount: Option<String>,
}

impl SlimContainer {
    fn has_unmasked_proc(&self) -> bool {
        let context = self.security_context.as_ref();
        context.and_then(|context| context.proc_mount.as_deref()) == Some("Unmasked")
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
struct SlimStatus {
    #[serde(default, rename = "initContainerStatuses")]
    init: Vec<SlimContainerStatus>,
    #[serde(default, rename = "containerStatuses")]
    main: Vec<SlimContainerStatus>,
    #[serde(default, rename = "ephemeralContainerStatuses")]
    ephemeral: Vec<SlimContainerStatus>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SlimContainerStatus {
    name: String,
    #[serde(rename = "containerID")]
    container_id: Option<String>,
    #[serde(default)]
    state: SlimState,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct SlimState {
    running: Option<serde::de::IgnoredAny>,
}

impl Resource for SlimPod {
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

/// A pod of the API server, reduced to the fields that decide about views.
///
/// # Errors
/// Fails if the pod lacks a field that the API requires.
pub fn reduced(pod: &core::Pod) -> serde_json::Result<Pod> {
    serde_json::from_value(serde_json::to_value(pod)?).map(into_pod)
}

fn into_pod(pod: SlimPod) -> Pod {
    let SlimStatus { init, main, ephemeral } = pod.status;
    let statuses = init.into_iter().chain(main).chain(ephemeral);
    let mut running: HashMap<String, ContainerId> = statuses
        .filter(|status| status.state.running.is_some())
        .filter_map(|status| {
            Some((status.name, ContainerId::from_url(&status.container_id?).ok()?))
        })
        .collect();
    let SlimSpec { host_users, init_containers, containers, ephemeral_containers } = pod.spec;
    let all = init_containers.into_iter().chain(containers).chain(ephemeral_containers);
    let has_user_namespace = host_users == Some(false);
    let container = |c: SlimContainer| Container {
        id: running.remove(&c.name),
        nests_containers: has_user_namespace && c.has_unmasked_proc(),
        name: c.name,
    };
    let containers = all.map(container).collect();
    let SlimMeta { kube, annotations, labels } = pod.metadata;
    Pod {
        uid: kube.uid.unwrap_or_default(),
        namespace: kube.namespace.unwrap_or_default(),
        name: kube.name.unwrap_or_default(),
        annotations,
        labels,
        containers,
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Response;

    use crate::telemetry::metrics::exposition::Format;

    use super::*;

    /// A pod as a 1.33 API server returns it. Of its init containers one has exited and one is a
    /// sidecar, which still runs. It has an ephemeral container, and `hostUsers: false`.
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
                {"name": "setup", "containerID": "containerd://aa",
                    "state": {"terminated": {"exitCode": 0}}},
                {"name": "proxy", "containerID": "containerd://bb",
                    "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}],
            "containerStatuses": [
                {"name": "app", "containerID": "cri-o://cc", "state": {"running": {}}},
                {"name": "waiting", "state": {"waiting": {"reason": "ContainerCreating"}}}],
            "ephemeralContainerStatuses": [
                {"name": "debugger", "containerID": "docker://dd", "state": {"running": {}}}]}
    }"#;

    #[test]
    fn running_containers_of_all_kinds_have_ids() {
        let pod = into_pod(serde_json::from_str(POD).unwrap());
        let ids: Vec<_> = pod
            .containers
            .iter()
            .map(|c| (c.name.as_str(), c.id.as_ref().map(ContainerId::as_str)))
            .collect();
        let expected = [
            ("setup", None),
            ("proxy", Some("bb")),
            ("app", Some("cc")),
            ("waiting", None),
            ("debugger", Some("dd")),
        ];
        assert_eq!(ids, expected);
        assert_eq!(
            (pod.uid.as_str(), pod.namespace.as_str(), pod.name.as_str()),
            ("u-1", "shop", "web")
        );
        assert_eq!(pod.annotations.inject.as_deref(), Some("true"));
    }

    /// The first request that a watch sends. The server refuses it.
    async fn first_request<W: Future<Output = ()> + Send + 'static>(
        watch: impl FnOnce(Client, Sender<Update>) -> W,
    ) -> String {
        let (requests_tx, mut requests) = tokio::sync::mpsc::channel(8);
        let service = tower::service_fn(move |request: Request<Body>| {
            let _ = requests_tx.try_send(request.uri().to_string());
            let refused = Response::builder().status(500).body(Body::empty()).unwrap();
            std::future::ready(Ok::<_, std::convert::Infallible>(refused))
        });
        let (updates, _receiver) = tokio::sync::mpsc::channel(8);
        let watching = tokio::spawn(watch(Client::new(service, "default"), updates));
        let request = requests.recv().await.unwrap();
        watching.abort();
        request
    }

    #[tokio::test]
    async fn lists_are_requested_from_cache() {
        let metrics = || Arc::<Metrics>::default();
        let pods =
            first_request(|client, updates| watch_pods(client, "n".into(), updates, metrics()));
        let labelled =
            first_request(|client, updates| watch_namespaces(client, false, updates, metrics()));
        let all =
            first_request(|client, updates| watch_namespaces(client, true, updates, metrics()));
        let (pods, labelled, all) = (pods.await, labelled.await, all.await);
        assert!(labelled.contains("labelSelector="), "{labelled}");
        assert!(!all.contains("labelSelector="), "{all}");
        for request in [pods, labelled, all] {
            let is_cached = request.contains("resourceVersion=0") && !request.contains("limit=");
            assert!(is_cached, "{request}");
        }
    }

    #[tokio::test]
    async fn failed_list_is_counted() {
        let service = tower::service_fn(|_: Request<Body>| {
            let refused = Response::builder().status(500).body(Body::empty()).unwrap();
            std::future::ready(Ok::<_, std::convert::Infallible>(refused))
        });
        let (updates, _receiver) = tokio::sync::mpsc::channel(8);
        let metrics: Arc<Metrics> = Arc::default();
        let client = Client::new(service, "default");
        let watching = tokio::spawn(watch_namespaces(client, false, updates, metrics.clone()));
        let counted = "kube_lxcfs_watch_errors_total{source=\"namespaces\"} 1";
        while !metrics.text(Format::Prometheus).contains(counted) {
            tokio::task::yield_now().await;
        }
        watching.abort();
    }

    #[test]
    fn retries_of_failing_lists_slow_down() {
        let (error, now) = (watcher::Error::NoResourceVersion, Instant::now());
        let longest_of = |failures: usize| {
            let delays = (0..50).map(|_| {
                let mut retries = Retries::new();
                for _ in 1..failures {
                    retries.received(&Event::<()>::Init);
                    retries.delay(&error, now);
                }
                retries.received(&Event::<()>::Init);
                retries.delay(&error, now)
            });
            delays.max().unwrap()
        };
        assert!(longest_of(1) <= RETRY_WINDOW.first);
        // The probability that 50 delays are all in the first eighth of the window is 2^-150.
        assert!(longest_of(4) > RETRY_WINDOW.first && longest_of(9) <= RETRY_WINDOW.longest);
    }

    #[test]
    fn retries_after_objects_or_expiry_start_again() {
        let failed = || {
            let mut retries = Retries::new();
            for _ in 0..9 {
                retries.delay(&watcher::Error::NoResourceVersion, Instant::now());
            }
            retries
        };
        for _ in 0..50 {
            let mut retries = failed();
            retries.received(&Event::<()>::InitDone);
            let delay = retries.delay(&watcher::Error::NoResourceVersion, Instant::now());
            assert!(delay <= RETRY_WINDOW.first, "{delay:?}");
            let status = kube::core::Status { code: 410, ..kube::core::Status::default() };
            let delay = failed().delay(&watcher::Error::WatchError(status.boxed()), Instant::now());
            assert!(delay <= RETRY_WINDOW.first, "{delay:?}");
            let later = Instant::now() + 2 * STABLE;
            let delay = failed().delay(&watcher::Error::NoResourceVersion, later);
            assert!(delay <= RETRY_WINDOW.first, "{delay:?}");
        }
    }

    #[test]
    fn reconnects_are_delayed_after_early_ends_only() {
        let start = Instant::now();
        let delay_after = |age: u64, is_watch: bool| {
            let mut reconnects = Reconnects::default();
            reconnects.started(start);
            let first = reconnects.delay(is_watch, start + Duration::from_secs(age));
            // A request that follows has failed, and waits by itself.
            assert_eq!(reconnects.delay(true, start + Duration::from_secs(age)), None);
            first
        };
        assert_eq!(Reconnects::default().delay(true, start), None);
        for age in [0, 100, 279] {
            assert!(delay_after(age, true).is_some_and(|delay| delay < RETRY_WINDOW.first));
            assert_eq!(delay_after(age, false), None);
        }
        // The API server ended them after their timeout, or a dead connection was noticed.
        for age in [280, 290, 320] {
            assert_eq!(delay_after(age, true), None);
        }
        let delays: std::collections::HashSet<_> = (0..50).map(|_| delay_after(0, true)).collect();
        assert!(delays.len() > 1, "{delays:?}");
    }

    /// The API server ends every watch without an event.
    #[tokio::test]
    async fn watch_that_ended_early_is_resumed_later() {
        let (requests_tx, mut requests) = tokio::sync::mpsc::channel(8);
        let slept = requests_tx.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let is_watch = request.uri().query().unwrap().contains("watch=true");
            let sent = requests_tx.try_send(if is_watch { "watch" } else { "list" });
            async move {
                if sent.is_err() {
                    std::future::pending::<()>().await;
                }
                let list = r#"{"metadata": {"resourceVersion": "7"}, "items": []}"#;
                let body = if is_watch { Vec::new() } else { list.into() };
                Ok::<_, std::convert::Infallible>(Response::new(Body::from(body)))
            }
        });
        let client = spread_reconnects(Client::new(service, "default"), move |delay| {
            assert!(delay < RETRY_WINDOW.first);
            let _ = slept.try_send("sleep");
            std::future::ready(())
        });
        let api: Api<SlimPod> = Api::all(client);
        let mut stream = pin!(watcher::watcher(api, cached_lists()));
        let mut seen = Vec::new();
        while seen.len() < 6 {
            tokio::select! {
                request = requests.recv() => seen.extend(request),
                event = stream.next() => assert!(event.unwrap().is_ok()),
            }
        }
        assert_eq!(seen, ["list", "watch", "sleep", "watch", "sleep", "watch"]);
    }

    #[test]
    fn pod_without_status_decodes() {
        let pod = into_pod(
            serde_json::from_str(
                r#"{"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}]}}"#,
            )
            .unwrap(),
        );
        let container = Container { name: "a".into(), id: None, nests_containers: false };
        assert_eq!(pod.containers, [container]);
    }

    /// A pod that builds images without privileges, as a 1.33 API server returns it.
    const BUILDER: &str = r#"{
        "metadata": {"name": "ci", "namespace": "shop", "uid": "u-2", "resourceVersion": "43"},
        "spec": {"hostUsers": false, "nodeName": "n",
            "securityContext": {"runAsUser": 1000},
            "initContainers": [{"name": "clone", "image": "x", "securityContext": {}}],
            "containers": [
                {"name": "build", "image": "x", "securityContext": {
                    "allowPrivilegeEscalation": true, "procMount": "Unmasked",
                    "seccompProfile": {"type": "Unconfined"}}},
                {"name": "push", "image": "x", "securityContext": {"procMount": "Default"}},
                {"name": "log", "image": "x", "securityContext": null}]},
        "status": {}
    }"#;

    #[test]
    fn unmasked_proc_in_user_namespace_nests_containers() {
        let nesting = |text: &str| {
            let pod = into_pod(serde_json::from_str(text).unwrap());
            let nesting = pod.containers.into_iter().filter(|c| c.nests_containers);
            nesting.map(|c| c.name).collect::<Vec<_>>()
        };
        assert_eq!(nesting(BUILDER), ["build"]);
        // In the host's user namespace, or with the runtime's masked paths.
        assert!(
            nesting(&BUILDER.replace(r#""hostUsers": false"#, r#""hostUsers": true"#)).is_empty()
        );
        assert!(nesting(&BUILDER.replace(r#""hostUsers": false, "#, "")).is_empty());
        assert!(nesting(&BUILDER.replace("Unmasked", "Default")).is_empty());
        assert!(nesting(POD).is_empty());
    }
}
