//! A real etcd and kube-apiserver on loopback, with RBAC, and the agent's own user with the rules
//! of the chart.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU16, Ordering},
};

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Running, cache, eventually, program, stderr, stdout};

const ADMIN: &str = "admin-token";
const AGENT: &str = "agent-token";
/// The token of a user without any rights, in the group `viewers`.
pub(crate) const VIEWER: &str = "viewer-token";

/// What the agent may do, and nothing more.
const RBAC: &str = r#"
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: kube-lxcfs
rules:
- {apiGroups: [""], resources: [pods, namespaces], verbs: [list, watch]}
- {apiGroups: [events.k8s.io], resources: [events], verbs: [create]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: kube-lxcfs
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: kube-lxcfs}
subjects:
- {kind: User, name: kube-lxcfs, apiGroup: rbac.authorization.k8s.io}
"#;

/// etcd and the API server.
#[derive(Debug)]
pub(crate) struct Cluster {
    dir: TempDir,
    port: u16,
    etcd_port: u16,
    apiserver: Option<Running>,
    _etcd: Running,
}

/// A free port below those that the kernel gives to connections and to listeners that name none
/// (`ip_local_port_range`): one of these could be taken before the server listens.
fn free_port() -> u16 {
    static CHOSEN: AtomicU16 = AtomicU16::new(0);
    let first = 20_000 + u16::try_from(std::process::id() % 5000).unwrap();
    loop {
        let port = first + CHOSEN.fetch_add(1, Ordering::Relaxed) % 5000;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// The directory of kube-apiserver, as hack/offline/kubernetes.sh finds or builds it.
fn assets() -> PathBuf {
    match std::env::var_os("KUBEBUILDER_ASSETS") {
        Some(dir) => dir.into(),
        None => cache("kubernetes-1.20.2"),
    }
}

fn either(name: &str) -> std::process::Command {
    let own = assets().join(name);
    if own.exists() { std::process::Command::new(own) } else { program(name) }
}

impl Cluster {
    pub(crate) fn start() -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let tokens = format!(
            "{ADMIN},admin,1,system:masters\n{AGENT},kube-lxcfs,2\n{VIEWER},viewer,3,viewers\n"
        );
        fs::write(at("tokens"), tokens).unwrap();
        let keyed = program("openssl")
            .args(["genrsa", "-out"])
            .arg(at("sa.key"))
            .arg("2048")
            .output()
            .unwrap();
        assert!(keyed.status.success(), "{}", stderr(&keyed));
        let (port, etcd_port, peer_port) = (free_port(), free_port(), free_port());
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let mut etcd = either("etcd");
        etcd.arg("--data-dir").arg(at("etcd")).args([
            "--unsafe-no-fsync",
            "--listen-client-urls",
            &url(etcd_port),
        ]);
        etcd.args([
            "--advertise-client-urls",
            &url(etcd_port),
            "--listen-peer-urls",
            &url(peer_port),
        ]);
        etcd.args([
            "--initial-advertise-peer-urls",
            &url(peer_port),
            "--initial-cluster",
            &format!("default={}", url(peer_port)),
        ]);
        // etcd before 3.5 has the flag under another name or not at all; a test's data may be lost
        // anyway.
        let help = either("etcd").arg("--help").output().unwrap();
        let mut etcd = if stdout(&help).contains("unsafe-no-fsync") {
            etcd
        } else {
            without_fsync_flag(&etcd)
        };
        let etcd = Running::start(&mut etcd, &at("etcd.log"));
        let mut cluster = Cluster { port, etcd_port, apiserver: None, _etcd: etcd, dir };
        cluster.up();
        cluster.write_kubeconfig("admin", ADMIN);
        cluster.write_kubeconfig("agent", AGENT);
        cluster.apply(RBAC);
        cluster
    }

    /// Applies manifests as the administrator.
    pub(crate) fn apply(&self, manifests: &str) {
        let file = at_path(&self.dir, "applied.yaml");
        fs::write(&file, manifests).unwrap();
        self.kubectl(&["apply", "-f", file.to_str().unwrap()]);
    }

    /// Starts the API server (again), with the same state at the same port.
    pub(crate) fn up(&mut self) {
        let at = |name: &str| at_path(&self.dir, name).to_str().unwrap().to_owned();
        let mut apiserver = either("kube-apiserver");
        apiserver.args([
            format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            "--bind-address=127.0.0.1".into(),
            "--advertise-address=127.0.0.1".into(),
            format!("--secure-port={}", self.port),
            format!("--cert-dir={}", at("certs")),
            "--authorization-mode=RBAC".into(),
            format!("--token-auth-file={}", at("tokens")),
            format!("--service-account-key-file={}", at("sa.key")),
            format!("--service-account-signing-key-file={}", at("sa.key")),
            "--service-account-issuer=https://kube-lxcfs.test".into(),
            "--service-cluster-ip-range=10.96.0.0/24".into(),
            "--endpoint-reconciler-type=none".into(),
            "--allow-privileged=true".into(),
            // Nobody here makes service accounts.
            "--disable-admission-plugins=ServiceAccount".into(),
        ]);
        let process = Running::start(&mut apiserver, &at_path(&self.dir, "apiserver.log"));
        self.write_kubeconfig("admin", ADMIN);
        eventually("the API server is ready", || {
            let ready = self.try_kubectl(&["get", "--raw", "/readyz"]);
            if ready.status.success() {
                Ok(())
            } else {
                Err(format!("{} {}", stderr(&ready), process.log().lines().last().unwrap_or("")))
            }
        });
        self.apiserver = Some(process);
    }

    pub(crate) fn down(&mut self) {
        if let Some(mut process) = self.apiserver.take() {
            process.kill();
        }
    }

    fn write_kubeconfig(&self, name: &str, token: &str) {
        let server = format!("https://127.0.0.1:{}", self.port);
        let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c",
                "cluster": {"server": server, "insecure-skip-tls-verify": true}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]});
        fs::write(self.kubeconfig(name), config.to_string()).unwrap();
    }

    pub(crate) fn kubeconfig(&self, name: &str) -> PathBuf {
        at_path(&self.dir, &format!("{name}.json"))
    }

    fn try_kubectl(&self, args: &[&str]) -> std::process::Output {
        program("kubectl")
            .arg("--kubeconfig")
            .arg(self.kubeconfig("admin"))
            .args(args)
            .env("HOME", self.dir.path())
            .output()
            .unwrap()
    }

    /// Runs kubectl as the administrator.
    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        let output = self.try_kubectl(args);
        assert!(output.status.success(), "kubectl {args:?}: {}", stderr(&output));
        stdout(&output)
    }

    /// Reasons and notes of the Events on a pod, oldest first.
    pub(crate) fn events(&self, namespace: &str, pod: &str) -> Vec<(String, String)> {
        let selector = format!("involvedObject.name={pod}");
        let text = self.kubectl(&[
            "get",
            "events",
            "-n",
            namespace,
            "--field-selector",
            &selector,
            "-o",
            "json",
        ]);
        let list: Value = serde_json::from_str(&text).unwrap();
        let field = |event: &Value, name: &str| event[name].as_str().unwrap().to_owned();
        let events = list["items"].as_array().unwrap().iter();
        let mut events: Vec<_> = events
            .map(|e| (e["eventTime"].to_string(), field(e, "reason"), field(e, "message")))
            .collect();
        events.sort();
        events.into_iter().map(|(_, reason, message)| (reason, message)).collect()
    }

    /// Waits until the Events on a pod have these reasons.
    pub(crate) fn reasons(&self, namespace: &str, pod: &str, expected: &[&str]) {
        eventually(&format!("the Events on {pod}"), || {
            let events = self.events(namespace, pod);
            let reasons: Vec<&str> = events.iter().map(|(reason, _)| reason.as_str()).collect();
            if reasons == expected { Ok(()) } else { Err(format!("{reasons:?}")) }
        });
    }

    /// A client for the administrator.
    pub(crate) async fn client(&self) -> Client {
        let kubeconfig = Kubeconfig::read_from(self.kubeconfig("admin")).unwrap();
        Client::try_from(
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .unwrap(),
        )
        .unwrap()
    }
}

fn without_fsync_flag(command: &std::process::Command) -> std::process::Command {
    let mut plain = std::process::Command::new(command.get_program());
    plain.args(command.get_args().filter(|arg| *arg != "--unsafe-no-fsync"));
    plain
}

fn at_path(dir: &TempDir, name: &str) -> PathBuf {
    Path::new(dir.path()).join(name)
}

/// Pods of a node `n1` in the namespace `default`, whose containers the test has made.
pub(crate) struct Pods {
    pub(crate) cluster: Cluster,
    runtime: tokio::runtime::Runtime,
    api: Api<Pod>,
}

impl Pods {
    pub(crate) fn start() -> Pods {
        let cluster = Cluster::start();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let api = Api::namespaced(runtime.block_on(cluster.client()), "default");
        Pods { cluster, runtime, api }
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.cluster.kubeconfig("agent")
    }

    /// A pod with one container, which runs.
    pub(crate) fn run(&self, name: &str, id: &str, annotations: Value) {
        self.create(name, annotations);
        self.set_running(name, id);
    }

    /// Its container runs, with this id.
    pub(crate) fn set_running(&self, name: &str, id: &str) {
        let id = format!("containerd://{id}");
        let status = json!({"status": {"phase": "Running", "containerStatuses": [
            {"name": "app", "image": "x", "imageID": "", "containerID": id, "ready": true,
            "restartCount": 0, "state": {"running": {}}}]}});
        let patch = Patch::Merge(status);
        let params = PatchParams::default();
        self.runtime.block_on(self.api.patch_status(name, &params, &patch)).unwrap();
    }

    /// A pod whose one container has no status yet. Returns its uid.
    pub(crate) fn create(&self, name: &str, annotations: Value) -> String {
        let pod = json!({"metadata": {"name": name, "annotations": annotations},
            "spec": {"nodeName": "n1", "containers": [{"name": "app", "image": "x"}]}});
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let created = self.runtime.block_on(self.api.create(&PostParams::default(), &pod));
        created.unwrap().metadata.uid.unwrap()
    }

    /// Waits until the Events on a pod have these reasons.
    pub(crate) fn reasons(&self, pod: &str, expected: &[&str]) {
        self.cluster.reasons("default", pod, expected);
    }

    /// The Events on a pod, as reason and note.
    pub(crate) fn events(&self, pod: &str) -> Vec<(String, String)> {
        self.cluster.events("default", pod)
    }

    pub(crate) fn annotate(&self, name: &str, annotations: Value) {
        let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
        self.runtime.block_on(self.api.patch(name, &PatchParams::default(), &patch)).unwrap();
    }
}
