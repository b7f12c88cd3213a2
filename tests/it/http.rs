//! `/healthz`, `/readyz`, `/metrics` and `/status` of the agent, compared with what is true.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

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
