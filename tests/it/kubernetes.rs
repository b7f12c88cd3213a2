//! Pods and namespaces of a real API server lead to views in real containers; the test is the
//! kubelet.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::harness::*;

/// Everything, and a pod's life in both the API and the runtime.
struct Node {
    cluster: Cluster,
    containerd: Containerd,
    lxcfs: Lxcfs,
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl Node {
    fn start() -> Node {
        let cluster = Cluster::start();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = runtime.block_on(cluster.client());
        Node { containerd: Containerd::start(), lxcfs: Lxcfs::start(), cluster, runtime, client }
    }

    fn agent(&self, more: &[&str]) -> Running {
        self.agent_with(self.lxcfs.path(), more)
    }

    fn agent_with(&self, lxcfs_path: &str, more: &[&str]) -> Running {
        let endpoint = self.containerd.endpoint();
        let args = ["--node-name", "n1", "--lxcfs-path", lxcfs_path, "--cri-endpoint", &endpoint];
        let kubeconfig = self.cluster.kubeconfig("agent");
        agent(
            self.containerd.dir.path(),
            &[&args, more].concat(),
            &[("KUBECONFIG", kubeconfig.to_str().unwrap())],
        )
    }

    fn pods(&self, namespace: &str) -> Api<Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }

    fn namespace(&self, name: &str, labels: Value) {
        let namespace: Namespace =
            serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}})).unwrap();
        let api: Api<Namespace> = Api::all(self.client.clone());
        self.runtime.block_on(api.create(&PostParams::default(), &namespace)).unwrap();
    }

    fn relabel(&self, namespace: &str, label: Value) {
        let api: Api<Namespace> = Api::all(self.client.clone());
        let patch = Patch::Merge(json!({"metadata": {"labels": {"kube-lxcfs.io/inject": label}}}));
        self.runtime.block_on(api.patch(namespace, &PatchParams::default(), &patch)).unwrap();
    }

    /// A pod in the API, its containers in the runtime, and its status as a kubelet writes it.
    fn pod(
        &self,
        namespace: &str,
        name: &str,
        annotations: Value,
        containers: &[&str],
    ) -> RunningPod {
        let spec: Vec<Value> =
            containers.iter().map(|c| json!({"name": c, "image": IMAGE})).collect();
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "annotations": annotations},
            "spec": {"nodeName": "n1", "containers": spec}}))
        .unwrap();
        self.runtime.block_on(self.pods(namespace).create(&PostParams::default(), &pod)).unwrap();
        let running = self.containerd.run(&PodSpec {
            name: &format!("{namespace}-{name}"),
            annotations: &[],
            containers,
        });
        self.status(namespace, name, &running);
        running
    }

    fn status(&self, namespace: &str, name: &str, pod: &RunningPod) {
        let statuses: Vec<Value> = pod
            .containers
            .iter()
            .map(|(name, id)| {
                json!({"name": name, "containerID": format!("containerd://{id}"), "image": IMAGE,
                    "imageID": "", "ready": true, "restartCount": 0,
                    "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}})
            })
            .collect();
        let patch =
            Patch::Merge(json!({"status": {"phase": "Running", "containerStatuses": statuses}}));
        self.runtime
            .block_on(self.pods(namespace).patch_status(name, &PatchParams::default(), &patch))
            .unwrap();
    }

    fn annotate(&self, namespace: &str, name: &str, annotations: Value) {
        let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
        self.runtime
            .block_on(self.pods(namespace).patch(name, &PatchParams::default(), &patch))
            .unwrap();
    }

    fn table(&self, id: &str) -> String {
        mountinfo(self.containerd.pid(id))
    }

    fn has(&self, id: &str, files: usize) {
        has_views(id, self.containerd.pid(id), files);
    }

    fn events(&self, namespace: &str, pod: &str) -> Vec<(String, String)> {
        self.cluster.events(namespace, pod)
    }

    fn reasons(&self, namespace: &str, pod: &str, expected: &[&str]) {
        self.cluster.reasons(namespace, pod, expected);
    }
}

const ALL: usize = ALWAYS.len();

#[test]
fn annotation_changes_are_followed_without_restart() {
    isolated(|| {
        let node = Node::start();
        node.namespace("shop", json!({}));
        let pod = node.pod("shop", "web", json!({}), &["app", "proxy"]);
        let alone = node.pod("shop", "alone", json!({}), &["app"]);
        let before = node.table(&alone.containers["app"]);
        let (app, proxy) = (&pod.containers["app"], &pod.containers["proxy"]);
        let agent = node.agent(&[]);
        let started = node.containerd.pid(app);

        node.annotate("shop", "web", json!({"kube-lxcfs.io/inject": "true"}));
        node.has(app, ALL);
        node.has(proxy, ALL);
        assert!(node.containerd.sees_its_own_memory(app));
        node.reasons("shop", "web", &["LxcfsInjected"]);
        let (_, note) = &node.events("shop", "web")[0];
        assert!(note.contains("app: cpuinfo,") && note.contains("proxy: cpuinfo,"), "{note}");

        node.annotate("shop", "web", json!({"kube-lxcfs.io/files": "meminfo,uptime"}));
        node.has(app, 2);
        node.reasons("shop", "web", &["LxcfsInjected", "LxcfsRemoved"]);
        node.annotate("shop", "web", json!({"kube-lxcfs.io/containers": "proxy"}));
        node.has(app, 0);
        node.has(proxy, 2);
        node.reasons("shop", "web", &["LxcfsInjected", "LxcfsRemoved", "LxcfsRemoved"]);

        // An invalid value changes nothing, and is reported.
        node.annotate("shop", "web", json!({"kube-lxcfs.io/containers": "nobody"}));
        node.reasons(
            "shop",
            "web",
            &["LxcfsInjected", "LxcfsRemoved", "LxcfsRemoved", "LxcfsInvalidAnnotation"],
        );
        let (_, note) = node.events("shop", "web").pop().unwrap();
        assert!(
            note.contains("kube-lxcfs.io/containers: 'nobody'")
                && note.contains("valid names: app, proxy"),
            "{note}"
        );
        node.has(proxy, 2);

        node.annotate("shop", "web", json!({"kube-lxcfs.io/inject": "false"}));
        node.has(proxy, 0);
        assert!(!node.containerd.sees_its_own_memory(proxy));
        node.annotate(
            "shop",
            "web",
            json!({"kube-lxcfs.io/inject": null, "kube-lxcfs.io/containers": null,
                "kube-lxcfs.io/files": null}),
        );
        node.annotate("shop", "web", json!({"kube-lxcfs.io/inject": "true"}));
        node.has(app, ALL);

        // A container that starts again gets its view again; one that is added later, an ephemeral
        // one say, too.
        node.containerd.stop_container(proxy);
        let mut pod = pod.clone();
        node.containerd.start_container(&mut pod, "proxy", 1);
        node.status("shop", "web", &pod);
        node.has(&pod.containers["proxy"], ALL);

        assert_eq!(
            node.table(&alone.containers["app"]),
            before,
            "the pod that did not opt in is as it was"
        );
        assert!(node.events("shop", "alone").is_empty());
        assert_eq!(node.containerd.pid(&pod.containers["app"]), started, "nothing was restarted");

        // Deleted from the API while it runs still: nothing more is done to it, and nothing breaks.
        node.runtime
            .block_on(node.pods("shop").delete(
                "web",
                &DeleteParams { grace_period_seconds: Some(0), ..Default::default() },
            ))
            .unwrap();
        node.annotate("shop", "alone", json!({"kube-lxcfs.io/inject": "true"}));
        node.has(&alone.containers["app"], ALL);
        assert!(!agent.log().contains("panicked"));
        assert!(!agent.log().contains("orbidden"), "{}", agent.log());
    });
}

#[test]
fn namespace_label_is_the_default_of_its_pods() {
    isolated(|| {
        let node = Node::start();
        node.namespace("in", json!({"kube-lxcfs.io/inject": "true"}));
        node.namespace("later", json!({}));
        let inside = node.pod("in", "a", json!({}), &["app"]);
        let out = node.pod("in", "b", json!({"kube-lxcfs.io/inject": "false"}), &["app"]);
        let later = node.pod("later", "c", json!({}), &["app"]);
        let _agent = node.agent(&[]);
        node.has(&inside.containers["app"], ALL);
        node.relabel("later", json!("true"));
        node.has(&later.containers["app"], ALL);
        node.relabel("in", Value::Null);
        node.has(&inside.containers["app"], 0);
        node.relabel("later", json!("false"));
        node.has(&later.containers["app"], 0);
        node.relabel("in", json!("maybe"));
        // One Event on the namespace, however many pods and agents notice the label.
        let of_namespace = || node.events("kube-system", "in");
        eventually("the Event on the namespace", || match of_namespace() {
            events if events.len() == 1 => Ok(()),
            events => Err(format!("{events:?}")),
        });
        let (reason, note) = of_namespace().remove(0);
        assert_eq!(reason, "LxcfsInvalidAnnotation");
        assert!(note.contains("invalid namespace label") && note.contains("maybe"), "{note}");
        let other = node.agent(&[]);
        ready(&other);
        let noticed = || other.logged(&[("namespace", "in"), ("message", "namespace event")]);
        eventually_true("the other agent notices the label", || noticed() == 1);
        // Its queue is in order: the Event of this pod follows that of the namespace.
        node.pod("in", "c", json!({"kube-lxcfs.io/inject": "rubbish"}), &["app"]);
        eventually_true("the pod has its Events", || node.events("in", "c").len() == 2);
        assert_eq!(of_namespace().len(), 1);
        node.reasons("in", "a", &["LxcfsInjected", "LxcfsRemoved"]);
        node.has(&out.containers["app"], 0);
        assert!(node.events("in", "b").is_empty());
    });
}

#[test]
fn selectors_and_exclusions_decide_without_annotation() {
    isolated(|| {
        let node = Node::start();
        for name in ["selected", "excluded"] {
            node.namespace(name, json!({"team": "a"}));
        }
        node.namespace("plain", json!({}));
        let selected = node.pod("selected", "a", json!({}), &["app"]);
        let excluded = node.pod("excluded", "b", json!({}), &["app"]);
        let annotated =
            node.pod("excluded", "c", json!({"kube-lxcfs.io/inject": "true"}), &["app"]);
        let plain = node.pod("plain", "d", json!({}), &["app"]);
        let selectors = ["--pod-selector", "app in (web,api)", "--namespace-selector", "team"];
        let _agent = node.agent(&[&selectors[..], &["--exclude-namespaces", "excluded"]].concat());
        node.has(&annotated.containers["app"], ALL);
        node.has(&selected.containers["app"], ALL);
        node.has(&excluded.containers["app"], 0);
        node.has(&plain.containers["app"], 0);
        let label = |args: &[&str]| node.cluster.kubectl(&[&["label"], args].concat());
        label(&["--namespace", "plain", "pod", "d", "app=web"]);
        node.has(&plain.containers["app"], ALL);
        label(&["--namespace", "plain", "pod", "d", "app=db", "--overwrite"]);
        node.has(&plain.containers["app"], 0);
        label(&["namespace", "plain", "team=b"]);
        node.has(&plain.containers["app"], ALL);
        // The label of kube-lxcfs decides before the selector.
        node.relabel("plain", json!("false"));
        node.has(&plain.containers["app"], 0);
        node.relabel("plain", Value::Null);
        node.has(&plain.containers["app"], ALL);
        label(&["namespace", "plain", "team-"]);
        node.has(&plain.containers["app"], 0);
        node.has(&excluded.containers["app"], 0);
    });
}

#[test]
fn inject_by_default_applies_unless_opted_out() {
    isolated(|| {
        let node = Node::start();
        node.namespace("x", json!({}));
        let silent = node.pod("x", "silent", json!({}), &["app"]);
        let out = node.pod("x", "out", json!({"kube-lxcfs.io/inject": "false"}), &["app"]);
        let _agent = node.agent(&["--inject-by-default"]);
        node.has(&silent.containers["app"], ALL);
        node.has(&out.containers["app"], 0);
    });
}

#[test]
fn api_server_outage_loses_nothing() {
    isolated(|| {
        let mut node = Node::start();
        node.namespace("shop", json!({}));
        let a = node.pod("shop", "a", json!({"kube-lxcfs.io/inject": "true"}), &["app"]);
        let b = node.pod("shop", "b", json!({}), &["app"]);
        let first = node.agent(&[]);
        node.has(&a.containers["app"], ALL);
        let table = node.table(&a.containers["app"]);
        node.cluster.down();
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(node.table(&a.containers["app"]), table);
        node.cluster.up();
        node.annotate("shop", "b", json!({"kube-lxcfs.io/inject": "true"}));
        node.annotate("shop", "a", json!({"kube-lxcfs.io/inject": null}));
        node.has(&b.containers["app"], ALL);
        node.has(&a.containers["app"], 0);
        node.reasons("shop", "a", &["LxcfsInjected", "LxcfsRemoved"]);
        for subject in ["pods", "namespaces", "events"] {
            let outages = first.logged(&[("subject", subject), ("outage", "started")]);
            assert!(outages <= 1, "{subject}, logged {outages} times: {}", first.log());
        }

        // The next agent reconciles what changes while none runs.
        let mut first = first;
        first.terminate();
        node.annotate("shop", "a", json!({"kube-lxcfs.io/inject": "true"}));
        node.annotate("shop", "b", json!({"kube-lxcfs.io/inject": "false"}));
        let _second = node.agent(&[]);
        node.has(&a.containers["app"], ALL);
        node.has(&b.containers["app"], 0);
        node.reasons("shop", "b", &["LxcfsInjected", "LxcfsRemoved"]);
    });
}

#[test]
fn views_follow_when_lxcfs_starts_later() {
    isolated(|| {
        let node = Node::start();
        node.namespace("shop", json!({}));
        let pod = node.pod("shop", "a", json!({"kube-lxcfs.io/inject": "true"}), &["app"]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lxcfs");
        std::fs::create_dir(&path).unwrap();
        let agent = node.agent_with(path.to_str().unwrap(), &[]);
        eventually_true("the outage is logged", || {
            agent.logged(&[("subject", "lxcfs"), ("outage", "started")]) == 1
        });
        assert_eq!(get(&agent, "/readyz"), (503, "no lxcfs serves\n".into()));
        node.reasons("shop", "a", &["LxcfsInjectFailed"]);
        // The mount comes from elsewhere, as from another pod: a bind of the one that serves.
        nix::mount::mount(
            Some(&node.lxcfs.path),
            &path,
            None::<&str>,
            nix::mount::MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            node.has(&pod.containers["app"], ALL);
        }));
        unmount(&path);
        done.unwrap();
        node.reasons("shop", "a", &["LxcfsInjectFailed", "LxcfsInjected"]);
    });
}
