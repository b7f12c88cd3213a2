//! `/healthz`, `/readyz`, `/metrics` and `/status` of the agent, compared with what is true.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::*;

#[test]
fn metrics_status_and_readiness_match_the_node() {
    isolated(|| {
        let pause = Duration::from_millis(50);
        let (reader, other, pods) = (Reader::start(pause), Reader::start(pause), Pods::start());
        pods.run("in", &reader.id, json!({"kube-lxcfs.io/inject": "true"}));
        pods.run("rubbish", &other.id, json!({"kube-lxcfs.io/inject": "yes"}));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lxcfs");
        let lxcfs_path = path.to_str().unwrap();
        let args = ["--node-name", "n1", "--lxcfs-path", lxcfs_path, "--pid-from", "proc"];
        let kubeconfig = pods.kubeconfig();
        let agent = agent(dir.path(), &args, &[("KUBECONFIG", kubeconfig.to_str().unwrap())]);
        assert_eq!(get(&agent, "/healthz"), (200, "ok\n".into()));
        eventually("the agent waits for lxcfs", || match get(&agent, "/readyz") {
            (503, why) if why == "no lxcfs serves\n" => Ok(()),
            (code, why) => Err(format!("{code} {why}")),
        });
        assert_eq!(get(&agent, "/readyz?exclude=lxcfs"), (200, "ok\n".into()));
        assert_eq!(get(&agent, "/readyz?exclude=cri&verbose").0, 503);
        let (code, endpoints) = get(&agent, "/");
        assert_eq!(code, 200);
        for endpoint in ["/healthz", "/readyz", "/metrics", "/status"] {
            assert!(endpoints.lines().any(|line| line.starts_with(endpoint)), "{endpoints}");
        }
        let metric = |name: &str| metric(&agent, name);
        let is = |name: &str, value: u32| {
            let expected = f64::from(value);
            eventually(&format!("{name} is {value}"), || {
                let found = metric(name);
                if (found - expected).abs() < 0.5 { Ok(()) } else { Err(found.to_string()) }
            });
        };
        is("lxcfs_up", 0);
        let lxcfs = Supervised::at(&path);
        is("containers{state=\"injected\"}", 1);
        ready(&agent);
        is("containers{state=\"skipped\"}", 1);
        is("operations_total{operation=\"inject\",result=\"success\"}", 1);
        is("injection_latency_seconds_count{trigger=\"watch\"}", 1);
        is("lxcfs_up", 1);
        let row = |pod: &str| status(&agent).into_iter().find(|row| row["pod"] == pod).unwrap();
        let injected = row("in");
        assert_eq!(injected["files"]["meminfo"], "current");
        assert_eq!(injected["desired"]["files"], "all");
        assert_eq!(injected["desired"]["state"], "injected");
        assert_eq!(injected["id"], *reader.id);
        assert_eq!(row("rubbish")["desired"]["state"], "skipped");
        // Another lxcfs.
        lxcfs.signal_lxcfs(Signal::SIGKILL);
        eventually_true("the restart is counted", || metric("lxcfs_restarts_total") > 0.0);
        eventually_true("the pass is measured", || {
            metric("remount_pass_duration_seconds_sum") > 0.0
        });
        is("containers{state=\"injected\"}", 1);
        has_views("the reader", reader.pid(), ALWAYS.len());
        assert_eq!(get(&agent, "/nothing").0, 404);
        // The address is in use.
        let address = http_address(&agent);
        let output = run(&["agent", "--pods-from", "cri", "--listen", &address]);
        let error = stderr(&output);
        assert!(error.contains(&format!("failed to listen on {address}")), "{error}");
        assert!(error.contains("set --listen"), "{error}");
    });
}

#[test]
fn status_is_for_loopback_clients_only() {
    isolated(|| {
        // An address of this network namespace's own: the client has it too.
        let ip = |args: &[&str]| {
            let added = program("busybox").arg("ip").args(args).output().unwrap();
            assert!(added.status.success(), "{args:?}: {}", stderr(&added));
        };
        ip(&["addr", "add", "192.0.2.1/32", "dev", "lo"]);
        let dir = tempfile::tempdir().unwrap();
        for (listen, loopback) in
            [("0.0.0.0:0", "127.0.0.1"), ("[::]:0", "127.0.0.1"), ("[::]:0", "[::1]")]
        {
            let agent = agent(
                dir.path(),
                &["--pods-from", "cri", "--pid-from", "proc", "--listen", listen],
                &[],
            );
            let address = http_address(&agent);
            let port = address.rsplit(':').next().unwrap();
            let (near, far) = (format!("{loopback}:{port}"), format!("192.0.2.1:{port}"));
            assert_eq!(get_from(&near, "/status").0, 200, "{listen} {loopback}");
            let (code, text) = get_from(&far, "/status");
            assert_eq!((code, text.lines().count()), (403, 1), "{text}");
            assert!(text.contains("kubectl port-forward"), "{text}");
            for path in ["/healthz", "/readyz", "/metrics", "/nothing"] {
                assert_eq!(get_from(&far, path).0, get_from(&near, path).0, "{path}");
            }
            assert_eq!(get_from(&far, "/metrics").0, 200);
        }
    });
}

/// What an agent with `--secure-listen` may do too.
const REVIEWS: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reviews}
rules:
- {apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}
- {apiGroups: [authorization.k8s.io], resources: [subjectaccessreviews], verbs: [create]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reviews}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reviews}
subjects: [{kind: User, name: kube-lxcfs, apiGroup: rbac.authorization.k8s.io}]
";

/// Lets a group get `/status`.
const VIEWERS: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: viewers}
rules:
- {nonResourceURLs: [/status], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: viewers}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: viewers}
subjects: [{kind: Group, name: viewers, apiGroup: rbac.authorization.k8s.io}]
";

/// An agent that serves HTTPS, with these flags.
fn secure_agent(pods: &Pods, dir: &Path, more: &[&str]) -> Running {
    let lxcfs = dir.join("lxcfs");
    let args = ["--node-name", "n1", "--lxcfs-path", lxcfs.to_str().unwrap()];
    let args = [&args, &["--pid-from", "proc", "--secure-listen", "127.0.0.1:0"], more].concat();
    agent(dir, &args, &[("KUBECONFIG", pods.kubeconfig().to_str().unwrap())])
}

#[test]
fn status_over_tls_needs_a_token_and_permission() {
    isolated(|| {
        let (reader, mut pods) = (Reader::start(Duration::from_millis(50)), Pods::start());
        pods.run("in", &reader.id, json!({"kube-lxcfs.io/inject": "true"}));
        let dir = tempfile::tempdir().unwrap();
        let agent = secure_agent(&pods, dir.path(), &[]);
        let address = https_address(&agent);
        let get = |path: &str, token: Option<&str>| get_secure(&address, path, token, &[]).unwrap();
        let refused = |(code, text): (u16, String), expected: u16, hint: &str| {
            assert_eq!((code, text.lines().count()), (expected, 1), "{text}");
            assert!(text.contains(hint), "{text}");
        };
        // The agent may not create reviews.
        refused(get("/status", Some(VIEWER)), 503, "the agent's log");
        pods.cluster.apply(REVIEWS);
        eventually("the agent may create reviews", || {
            match get("/status", Some("unknown-token")) {
                (401, _) => Ok(()),
                (code, text) => Err(format!("{code} {text}")),
            }
        });
        refused(get("/status", None), 401, "Authorization: Bearer");
        refused(get("/status", Some("unknown-token")), 401, "does not accept this token");
        refused(get("/status", Some("other-token")), 401, "does not accept this token");
        refused(get("/status", Some(&"x".repeat(20_000))), 401, "does not accept this token");
        for path in ["/status", "/metrics"] {
            refused(get(path, Some(VIEWER)), 403, &format!("nonResourceURLs: [{path}]"));
        }
        // Kubernetes allows this one to every user.
        assert_eq!(get("/healthz", Some(VIEWER)), (200, "ok\n".into()));
        refused(get("/healthz", None), 401, "Authorization: Bearer");
        for path in ["/", "/readyz"] {
            assert_eq!(get(path, Some(VIEWER)).0, 404, "{path}");
        }
        pods.cluster.apply(VIEWERS);
        let rows =
            eventually("the viewer may get /status", || match get("/status", Some(VIEWER)) {
                (200, text) => Ok(serde_json::from_str::<Value>(&text).unwrap()),
                (code, text) => Err(format!("{code} {text}")),
            });
        assert_eq!((&rows[0]["pod"], &rows[0]["id"]), (&json!("in"), &json!(*reader.id)));
        assert_eq!(get("/metrics", Some(VIEWER)).0, 403);
        // Without TLS there is no response, and the other port needs no token.
        assert!(!is_http(&address), "a response without TLS");
        assert_eq!(get_from(&http_address(&agent), "/metrics").0, 200);
        pods.cluster.down();
        refused(get("/status", Some("another-token")), 503, "retry");
        refused(get("/status", None), 401, "Authorization: Bearer");
        for token in [VIEWER, "unknown-token", "other-token", "another-token"] {
            assert!(!agent.log().contains(token), "{token}");
        }
    });
}

/// Whether the server at this address responds to HTTP without TLS.
fn is_http(address: &str) -> bool {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").unwrap();
    let mut response = Vec::new();
    let _ = stream.read_to_end(&mut response);
    response.starts_with(b"HTTP/")
}

/// Makes a certificate and its key, and returns their files.
fn make_certificate(dir: &Path, name: &str) -> [PathBuf; 2] {
    let [certificate, key] = ["crt", "key"].map(|kind| dir.join(format!("{name}.{kind}")));
    let mut openssl = program("openssl");
    openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]);
    openssl.args(["-subj", &format!("/CN={name}")]);
    let made = openssl.arg("-out").arg(&certificate).arg("-keyout").arg(&key).output().unwrap();
    assert!(made.status.success(), "{}", stderr(&made));
    [certificate, key]
}

#[test]
fn certificate_files_are_used_and_read_again() {
    isolated(|| {
        let (pods, dir) = (Pods::start(), tempfile::tempdir().unwrap());
        let [first, second] = ["first", "second"].map(|name| make_certificate(dir.path(), name));
        let [certificate, key] = ["tls.crt", "tls.key"].map(|name| dir.path().join(name));
        let install = |pair: &[PathBuf; 2]| {
            fs::copy(&pair[0], &certificate).unwrap();
            fs::copy(&pair[1], &key).unwrap();
        };
        let flags = [
            "--tls-cert-file",
            certificate.to_str().unwrap(),
            "--tls-key-file",
            key.to_str().unwrap(),
        ];
        install(&first);
        let agent = secure_agent(&pods, dir.path(), &flags);
        let address = https_address(&agent);
        let serves = |pair: &[PathBuf; 2]| {
            let verify = ["-verify_return_error", "-CAfile", pair[0].to_str().unwrap()];
            get_secure(&address, "/status", None, &verify).map(|(code, _)| code)
        };
        assert_eq!(serves(&first), Ok(401));
        assert!(serves(&second).is_err());
        // A certificate without its key.
        fs::copy(&second[0], &certificate).unwrap();
        assert_eq!(serves(&first), Ok(401));
        fs::copy(&second[1], &key).unwrap();
        assert_eq!(serves(&second), Ok(401));
        assert!(serves(&first).is_err());
        fs::remove_file(&key).unwrap();
        assert_eq!(serves(&second), Ok(401));
        assert_eq!(agent.logged(&[("subject", "certificate"), ("outage", "started")]), 2);
        assert_eq!(agent.logged(&[("subject", "certificate"), ("outage", "recovered")]), 1);
        // At the start, the files must be usable.
        let mut agent = secure_agent(&pods, dir.path(), &flags);
        eventually_true("the agent exits", || !agent.is_running());
        let log = agent.log();
        assert!(log.contains("error: failed to serve HTTPS; set --tls-cert-file"), "{log}");
        assert!(log.contains(key.to_str().unwrap()), "{log}");
    });
}

#[test]
fn secure_listener_needs_api_server_and_pair() {
    let flags = ["agent", "--secure-listen", "127.0.0.1:0"];
    isolated(move || {
        let error = fails(&[&flags[..], &["--pods-from", "cri"]].concat());
        assert!(error.contains("--secure-listen needs --pods-from kubernetes"), "{error}");
        for more in [&["--tls-cert-file", "a"][..], &["--tls-key-file", "a"]] {
            assert_eq!(run(&[&flags[..], more].concat()).status.code(), Some(2), "{more:?}");
        }
        let pair = ["agent", "--tls-cert-file", "a", "--tls-key-file", "b"];
        assert_eq!(run(&pair).status.code(), Some(2));
    });
}
