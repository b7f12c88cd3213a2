//! The kubectl plugin against a real API server. The agent's pod is an object only, without a
//! kubelet: what needs one is in hack/e2e.sh.

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Command, Output},
};

use serde_json::{Value, json};

use crate::harness::*;

const WIDTH: usize = 100;

/// Runs the plugin, as kubectl does: under its name.
fn plugin(cluster: &Cluster, user: &str, args: &[&str]) -> Output {
    let mut command = kube_lxcfs();
    command.arg0("kubectl-lxcfs").args(args).env("KUBECONFIG", cluster.kubeconfig(user));
    let output = command.output().unwrap();
    // The formats for programs have no width.
    if !args.contains(&"-o") {
        for line in stdout(&output).lines() {
            assert!(line.chars().count() <= WIDTH, "{args:?}: {line}");
        }
    }
    output
}

/// The output of the plugin as the administrator.
fn prints(cluster: &Cluster, args: &[&str]) -> String {
    let output = plugin(cluster, "admin", args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

fn apply(cluster: &Cluster, objects: &[Value]) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("list.json");
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    fs::write(&file, list.to_string()).unwrap();
    cluster.kubectl(&["apply", "-f", file.to_str().unwrap()]);
}

fn namespace(name: &str, labels: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

fn pod(namespace: &str, name: &str, labels: Value, containers: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"nodeName": "n1", "containers": containers}})
}

/// The pod of an agent, as the chart makes it.
fn agent_pod(environment: Value) -> Value {
    pod(
        "kube-lxcfs",
        "kube-lxcfs-agent-x",
        json!({"app.kubernetes.io/name": "kube-lxcfs", "app.kubernetes.io/component": "agent"}),
        json!([{"name": "agent", "image": "x", "args": ["agent"], "env": environment,
            "ports": [{"name": "http", "containerPort": 9808}]}]),
    )
}

/// A namespace `shop` with a pod `web`, and an agent with this environment on its node.
fn shop(labels: Value, environment: Value) -> Cluster {
    let cluster = Cluster::start();
    let containers = json!([{"name": "app", "image": "x"}, {"name": "proxy", "image": "x"}]);
    apply(
        &cluster,
        &[
            namespace("shop", labels),
            namespace("kube-lxcfs", json!({})),
            pod("shop", "web", json!({"app": "web"}), containers),
            agent_pod(environment),
        ],
    );
    // `kubectl patch` of a subresource needs a newer kubectl.
    let path = "/api/v1/namespaces/kube-lxcfs/pods/kube-lxcfs-agent-x/status";
    let text = cluster.kubectl(&["get", "--raw", path.trim_end_matches("/status")]);
    let mut agent: Value = serde_json::from_str(&text).unwrap();
    agent["status"]["phase"] = "Running".into();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("status.json");
    fs::write(&file, agent.to_string()).unwrap();
    cluster.kubectl(&["replace", "--raw", path, "-f", file.to_str().unwrap()]);
    cluster
}

fn explanation(cluster: &Cluster) -> Value {
    let text = prints(cluster, &["explain", "pod", "web", "-n", "shop", "-o", "json"]);
    serde_json::from_str(&text).unwrap()
}

fn annotations(cluster: &Cluster) -> Value {
    let text = cluster.kubectl(&["get", "pod", "web", "-n", "shop", "-o", "json"]);
    let pod: Value = serde_json::from_str(&text).unwrap();
    let all = pod["metadata"]["annotations"].as_object().unwrap();
    all.iter()
        .filter(|(key, _)| key.starts_with("kube-lxcfs.io/"))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

#[test]
fn plugin_sets_annotations_and_explains_them() {
    isolated(|| {
        let cluster = shop(json!({"kube-lxcfs.io/inject": "true"}), json!([]));
        let explained = explanation(&cluster);
        assert_eq!(explained["decision"]["rule"], "namespaceLabel", "{explained}");
        assert_eq!(explained["decision"]["annotations"], "current", "{explained}");
        assert_eq!(explained["containers"][0]["desired"], "all", "{explained}");
        assert_eq!(explained["containers"][0]["why"], "it does not run", "{explained}");
        // No kubelet forwards the request.
        assert_eq!(explained["agent"]["pod"], "kube-lxcfs/kube-lxcfs-agent-x", "{explained}");
        assert!(explained["agent"]["ready"].is_null(), "{explained}");
        assert!(explained["agent"]["why"].is_string(), "{explained}");

        let inject = ["inject", "web", "-n", "shop"];
        let chosen = ["--files", "meminfo,uptime", "--containers", "app"];
        prints(&cluster, &[&inject[..], &chosen].concat());
        assert_eq!(
            annotations(&cluster),
            json!({"kube-lxcfs.io/inject": "true", "kube-lxcfs.io/files": "meminfo,uptime",
                "kube-lxcfs.io/containers": "app"})
        );
        let explained = explanation(&cluster);
        assert_eq!(explained["decision"]["rule"], "annotation", "{explained}");
        assert_eq!(explained["containers"][0]["desired"], "meminfo,uptime", "{explained}");
        assert_eq!(explained["containers"][1]["desired"], "none", "{explained}");
        let why = explained["containers"][1]["why"].as_str().unwrap();
        assert_eq!(why, "the annotation kube-lxcfs.io/containers does not list it");

        let unknown =
            plugin(&cluster, "admin", &[&inject[..], &["--containers", "app,nobody"]].concat());
        assert_eq!(unknown.status.code(), Some(1));
        assert!(stderr(&unknown).contains("no container 'nobody'; valid names: app, proxy"));

        prints(&cluster, &["eject", "pod/web", "-n", "shop"]);
        assert_eq!(annotations(&cluster)["kube-lxcfs.io/inject"], "false");
        assert_eq!(explanation(&cluster)["containers"][0]["desired"], "none");
        prints(&cluster, &["eject", "web", "-n", "shop", "--unset"]);
        assert_eq!(annotations(&cluster), json!({}));
        assert_eq!(explanation(&cluster)["decision"]["rule"], "namespaceLabel");
    });
}

#[test]
fn plugin_decides_by_the_flags_of_the_agent() {
    isolated(|| {
        let cluster = shop(
            json!({"kube-lxcfs.io/inject": "false"}),
            json!([{"name": "KUBE_LXCFS_POD_SELECTOR", "value": "app=web"}]),
        );
        let explained = explanation(&cluster);
        assert_eq!(explained["decision"]["rule"], "podSelector", "{explained}");
        assert_eq!(explained["containers"][0]["desired"], "all", "{explained}");
        let text = prints(&cluster, &["explain", "pod/web", "-n", "shop"]);
        assert!(text.contains("\nrule      the labels of the pod match --pod-selector"), "{text}");
        let yaml = prints(&cluster, &["explain", "pod/web", "-n", "shop", "-o", "yaml"]);
        assert!(yaml.contains("rule: podSelector"), "{yaml}");
    });
}

#[test]
fn plugin_reports_what_it_may_not_read() {
    isolated(|| {
        let cluster = shop(json!({}), json!([]));
        // The agent's own user may list pods and namespaces, and nothing else.
        let refused = plugin(&cluster, "agent", &["explain", "pod", "web", "-n", "shop"]);
        assert_eq!(refused.status.code(), Some(1));
        let why = stderr(&refused);
        assert!(why.starts_with("error: pods \"web\" is forbidden"), "{why}");
        assert_eq!(why.lines().count(), 1, "{why}");

        let status = plugin(&cluster, "admin", &["status", "-n", "shop", "-o", "json"]);
        assert_eq!(status.status.code(), Some(1), "no kubelet forwards the request");
        let nodes: Value = serde_json::from_str(&stdout(&status)).unwrap();
        assert_eq!(nodes[0]["node"], "n1", "{nodes}");
        assert!(nodes[0]["error"].is_string(), "{nodes}");

        let absent = plugin(&cluster, "admin", &["check", "--node", "n2"]);
        assert_eq!(absent.status.code(), Some(1));
        assert!(stderr(&absent).starts_with("error: no agent runs on node n2"));
    });
}

/// The DaemonSet's pod of `n2` is missing. It has none on `n3`, `n4` and `n5`.
#[test]
fn status_lists_nodes_without_an_agent() {
    isolated(|| {
        let cluster = shop(json!({}), json!([]));
        let node = |name: &str, os: &str, taints: Value| {
            json!({"apiVersion": "v1", "kind": "Node",
                "metadata": {"name": name, "labels": {"kubernetes.io/os": os}},
                "spec": {"taints": taints}})
        };
        let taint = json!([{"key": "reserved", "effect": "NoSchedule"}]);
        apply(
            &cluster,
            &[
                node("n1", "linux", json!([])),
                node("n2", "linux", json!([])),
                node("n3", "windows", json!([])),
            ],
        );
        let status = |user: &str| {
            let output = plugin(&cluster, user, &["status", "-A", "-o", "json"]);
            assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
            let nodes: Value = serde_json::from_str(&stdout(&output)).unwrap();
            let nodes = nodes.as_array().unwrap().iter().map(|node| {
                assert!(node["error"].is_string(), "{node}");
                let agent = node["agent"].as_str().map(ToOwned::to_owned);
                (node["node"].as_str().unwrap().to_owned(), agent)
            });
            (nodes.collect::<Vec<_>>(), stderr(&output))
        };
        // That of n1 does not respond: no kubelet forwards the request.
        let agent = || ("n1".to_owned(), Some("kube-lxcfs/kube-lxcfs-agent-x".to_owned()));
        let expected = (vec![agent(), ("n2".to_owned(), None)], String::new());
        assert_eq!(status("admin"), expected);

        let labels = json!({"app.kubernetes.io/name": "kube-lxcfs",
            "app.kubernetes.io/component": "agent"});
        let template = json!({"metadata": {"labels": labels}, "spec": {
            "nodeSelector": {"kubernetes.io/os": "linux"},
            "containers": [{"name": "agent", "image": "x"}]}});
        let daemon_set = json!({"apiVersion": "apps/v1", "kind": "DaemonSet",
            "metadata": {"name": "kube-lxcfs-agent", "namespace": "kube-lxcfs", "labels": labels},
            "spec": {"selector": {"matchLabels": labels}, "template": template}});
        let tainted = [node("n4", "linux", taint), node("n5", "windows", json!([])), daemon_set];
        apply(&cluster, &tainted);
        assert_eq!(status("admin"), expected);
        // One that may not list nodes sees the agents, and an error.
        let (nodes, error) = status("agent");
        assert_eq!(nodes, [agent()]);
        assert!(error.starts_with("error: nodes without an agent are not shown: "), "{error}");
        cluster.kubectl(&["delete", "pod", "-n", "kube-lxcfs", "--all", "--force"]);
        let expected = ["n1", "n2"].map(|node| (node.to_owned(), None)).to_vec();
        assert_eq!(status("admin"), (expected, String::new()));
    });
}

#[test]
fn missing_kubeconfig_is_one_cause() {
    isolated(|| {
        let failed = |args: &[&str], variable: &str| {
            let mut command = kube_lxcfs();
            command.arg0("kubectl-lxcfs").args(["status"]).args(args);
            let output = command.env("KUBECONFIG", variable).output().unwrap();
            assert_eq!(output.status.code(), Some(1));
            stderr(&output)
        };
        let hint = "; set KUBECONFIG, --kubeconfig or --context\n";
        let missing = "error: failed to read the kubeconfig /nonexistent: No such file or \
                       directory (os error 2)";
        assert_eq!(failed(&[], "/nonexistent"), format!("{missing}{hint}"));
        assert_eq!(failed(&["--kubeconfig", "/nonexistent"], ""), format!("{missing}{hint}"));
        assert_eq!(failed(&["--context", "c"], "/nonexistent"), format!("{missing}{hint}"));
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config");
        let file = file.to_str().unwrap();
        fs::write(file, "apiVersion: v1\nkind: Config\n").unwrap();
        let error = failed(&["--context", "c"], file);
        assert!(error.starts_with("error: failed to use the kubeconfig: "), "{error}");
        assert!(error.ends_with(hint) && error.matches("context").count() <= 3, "{error}");
    });
}

/// The agent uses those of the pod sandbox, which the API server does not have.
#[test]
fn explanation_names_annotations_of_the_sandbox() {
    isolated(|| {
        let source = json!([{"name": "KUBE_LXCFS_PODS_FROM", "value": "cri"}]);
        let cluster = shop(json!({}), source);
        prints(&cluster, &["inject", "web", "-n", "shop"]);
        let explained = explanation(&cluster);
        assert_eq!(explained["decision"]["rule"], "annotation", "{explained}");
        assert_eq!(explained["decision"]["annotations"], "creation", "{explained}");
        // The agent does not respond.
        assert!(explained["containers"][0]["desired"].is_null(), "{explained}");
        let text = prints(&cluster, &["explain", "pod/web", "-n", "shop"]);
        let lines: Vec<&str> = text.split_whitespace().collect();
        let note = "by the annotations and labels at the pod's creation (--pods-from cri)";
        assert!(lines.join(" ").contains(note), "{text}");
    });
}

#[test]
fn plugin_prints_completion_and_manual_page() {
    isolated(|| {
        let printed = |args: &[&str]| {
            let output = kube_lxcfs().arg0("kubectl-lxcfs").args(args).output().unwrap();
            assert!(output.status.success(), "{args:?}: {}", stderr(&output));
            stdout(&output)
        };
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("bash");
        fs::write(&script, printed(&["completion", "bash"])).unwrap();
        assert!(Command::new("bash").arg("-n").arg(&script).status().unwrap().success());
        // The words after `kubectl-lxcfs `.
        let complete = "source \"$0\"; COMP_WORDS=(kubectl-lxcfs ''); COMP_CWORD=1; \
            _kubectl__lxcfs kubectl-lxcfs '' kubectl-lxcfs; echo ${COMPREPLY[@]}";
        let words = Command::new("bash").args(["-c", complete]).arg(&script).output().unwrap();
        assert!(stdout(&words).contains("explain status check inject eject"), "{words:?}");
        assert!(printed(&["completion", "zsh"]).starts_with("#compdef kubectl-lxcfs"));
        assert!(printed(&["completion", "fish"]).contains("-c kubectl-lxcfs"));
        let manual = printed(&["man"]);
        assert!(manual.contains("\n.TH kubectl") || manual.starts_with(".TH kubectl"), "{manual}");
        assert!(manual.contains("COMMAND EXPLAIN"), "{manual}");
    });
}
