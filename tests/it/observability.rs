//! What Prometheus sees: the metrics of a real agent and a real supervisor, checked by promtool and
//! scraped by a real Prometheus, the chart's alerts and every panel of its dashboard.

use std::{fs, io::Write, process::Stdio};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{chart::template, harness::*};

/// Checks a text in the Prometheus format as `promtool check metrics` does.
fn check_metrics(text: &str) {
    let mut promtool = program("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let problems = stdout(&output) + &stderr(&output);
    assert!(output.status.success() && problems.is_empty(), "{problems}\n{text}");
}

/// An agent with an injected container, and a supervised lxcfs that has restarted once.
struct Node {
    agent: Running,
    lxcfs: Supervised,
    _reader: Reader,
    _pods: Pods,
    _dir: tempfile::TempDir,
}

impl Node {
    fn start() -> Node {
        let (reader, pods) = (Reader::start(std::time::Duration::from_millis(50)), Pods::start());
        pods.run("in", &reader.id, json!({"kube-lxcfs.io/inject": "true"}));
        let dir = tempfile::tempdir().unwrap();
        let lxcfs = Supervised::start(&["--listen", "127.0.0.1:0"]);
        let args = ["--node-name", "n1", "--lxcfs-path", lxcfs.path()];
        let args = [&args[..], &["--nri-socket", "/nonexistent/nri.sock"]].concat();
        let kubeconfig = pods.kubeconfig();
        let agent = agent(dir.path(), &args, &[("KUBECONFIG", kubeconfig.to_str().unwrap())]);
        injected(&agent);
        lxcfs.signal_lxcfs(Signal::SIGKILL);
        eventually_true("the restart is counted", || metric(&agent, "lxcfs_restarts_total") > 0.0);
        eventually_true("the pass is measured", || {
            metric(&agent, "remount_pass_duration_seconds_count") > 0.0
        });
        injected(&agent);
        Node { agent, lxcfs, _reader: reader, _pods: pods, _dir: dir }
    }
}

fn injected(agent: &Running) {
    eventually_true("the view is injected", || {
        metric(agent, "containers{state=\"injected\"}") > 0.0
    });
}

#[test]
fn promtool_finds_no_problem_in_metrics() {
    isolated(|| {
        let node = Node::start();
        let (code, of_agent) = get(&node.agent, "/metrics");
        assert_eq!(code, 200);
        let (code, of_supervisor) = get(&node.lxcfs.supervisor, "/metrics");
        assert_eq!(code, 200);
        check_metrics(&of_agent);
        check_metrics(&of_supervisor);
        // The reference has every name, and no other.
        let reference = include_str!("../../docs/reference.md");
        let mut documented: Vec<&str> = reference
            .lines()
            .filter_map(|line| line.strip_prefix("| `"))
            .map(|line| line.split(['`', '{']).next().unwrap())
            .filter(|name| name.starts_with("kube_lxcfs_") || name.starts_with("process_"))
            .collect();
        documented.sort_unstable();
        let mut served: Vec<&str> = of_agent
            .lines()
            .chain(of_supervisor.lines())
            .filter_map(|line| line.strip_prefix("# TYPE "))
            .map(|line| line.split(' ').next().unwrap())
            .collect();
        served.sort_unstable();
        served.dedup();
        // This agent has no CRI.
        served.retain(|name| *name != "kube_lxcfs_runtime_up");
        documented.retain(|name| *name != "kube_lxcfs_runtime_up");
        assert_eq!(served, documented);
        let metric = |name: &str| metric(&node.lxcfs.supervisor, name);
        for (name, expected) in [
            ("supervisor_restarts_total{cause=\"exited\"}", 1.0),
            ("supervisor_restarts_total{cause=\"hung\"}", 0.0),
            ("supervisor_sweep_failures_total", 0.0),
            ("supervisor_lxcfs_up", 1.0),
        ] {
            assert!((metric(name) - expected).abs() < 0.5, "{name}: {}", metric(name));
        }
        assert!(metric("supervisor_sweeps_total") > 0.0);
        assert!(metric("supervisor_without_lxcfs_seconds_total") > 0.0);
    });
}

#[test]
fn text_format_follows_the_accept_header() {
    isolated(|| {
        let dir = tempfile::tempdir().unwrap();
        let agent = agent(dir.path(), &["--pods-from", "cri", "--pid-from", "proc"], &[]);
        let address = http_address(&agent);
        for (accept, content_type, end) in [
            ("*/*", "text/plain; version=0.0.4; charset=utf-8", false),
            (
                "application/openmetrics-text;version=1.0.0,text/plain;q=0.5",
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                true,
            ),
        ] {
            let (head, body) = response(&address, "/metrics", accept);
            assert!(head.contains(&format!("content-type: {content_type}\r\n")), "{head}");
            assert_eq!(body.ends_with("# EOF\n"), end, "{body}");
            let counter =
                if end { "kube_lxcfs_late_starts" } else { "kube_lxcfs_late_starts_total" };
            assert!(body.contains(&format!("# TYPE {counter} counter\n")), "{body}");
        }
    });
}

/// The alerts of the chart, as a rule file. The chart's release is `x` in `kube-system`.
fn rules() -> String {
    let rendered = template(&["--set", "prometheusRule.enabled=true"]);
    let rendered = stdout(&rendered);
    let rule = rendered.split("\n---\n").find(|one| one.contains("kind: PrometheusRule")).unwrap();
    let spec = rule.split("\nspec:\n").nth(1).unwrap();
    spec.lines().map(|line| line.strip_prefix("  ").unwrap_or(line).to_owned() + "\n").collect()
}

#[test]
fn promtool_accepts_and_tests_the_alerts() {
    let dir = tempfile::tempdir().unwrap();
    let rules = rules();
    fs::write(dir.path().join("rules.yaml"), &rules).unwrap();
    let tests = include_str!("alerts.yaml");
    fs::write(dir.path().join("alerts.yaml"), tests).unwrap();
    for args in [["check", "rules", "rules.yaml"], ["test", "rules", "alerts.yaml"]] {
        let output = program("promtool").args(args).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    }
    let runbook = include_str!("../../docs/runbook.md");
    let reference = include_str!("../../docs/reference.md");
    let mut alerts = Vec::new();
    for line in rules.lines() {
        let Some(alert) = line.trim().strip_prefix("- alert: ") else { continue };
        alerts.push(alert);
        assert!(runbook.contains(&format!("\n## {alert}\n")), "runbook.md lacks {alert}");
        assert!(reference.contains(&format!("| `{alert}` |")), "reference.md lacks {alert}");
        // It fires in a test.
        assert!(tests.contains(&format!("alertname: {alert}\n")), "alerts.yaml lacks {alert}");
        // The default is the path of this file in the repository.
        let link = format!("runbook_url: docs/runbook.md#{}\n", alert.to_lowercase());
        assert!(rules.contains(&link), "{alert} has no runbook link");
    }
    assert_eq!(rules.matches("description:").count(), alerts.len());
    assert_eq!(runbook.matches("\n## ").count(), alerts.len());
}

#[test]
fn threshold_of_each_alert_is_a_value() {
    let changed = [
        ("agentAbsentFor=99m", "for: 99m"),
        ("agentsUnavailable=79", ") > 79"),
        ("downFor=98m", "for: 98m"),
        ("restarts=77", "[15m]) > 77"),
        ("hungWorkers=76", "workers_hung > 76"),
        ("hungWorkersFor=97m", "for: 97m"),
        ("deadViewsFor=96m", "for: 96m"),
        ("sweepFailures=75", "[15m]) > 75"),
        ("invalidAnnotations=74", ") > 74"),
        ("invalidAnnotationsFor=95m", "for: 95m"),
        ("failed=73", ") > 73"),
        ("failedFor=94m", "for: 94m"),
        ("nriLostFor=93m", "for: 93m"),
        ("nodeUnsupportedFor=92m", "for: 92m"),
        ("runtimeDownFor=91m", "for: 91m"),
        ("watchErrors=78", "[15m]) > 78"),
        ("notSyncedSeconds=901", "_seconds > 901"),
        ("lateStarts=72", "[15m]) > 72"),
        ("slowSeconds=3", ")) > 3"),
        ("slowFor=89m", "for: 89m"),
        ("checkFailedFor=88m", "for: 88m"),
    ];
    for (value, expected) in changed {
        let set = format!("prometheusRule.enabled=true,prometheusRule.thresholds.{value}");
        let rendered = stdout(&template(&["--set", &set]));
        assert!(rendered.contains(expected), "{value}: {rendered}");
    }
}

/// Escapes every byte of a query (RFC 3986, section 2.1).
fn percent_encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

#[test]
fn each_panel_of_the_dashboard_has_data() {
    const PROMETHEUS: &str = "127.0.0.1:9090";
    isolated(|| {
        let node = Node::start();
        let dir = tempfile::tempdir().unwrap();
        let labels = json!({"cluster": "c1", "node": "n1"});
        let targets = [http_address(&node.agent), http_address(&node.lxcfs.supervisor)];
        let config = json!({
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{
                "job_name": "kube-lxcfs",
                "static_configs": [{"targets": targets, "labels": labels}],
            }],
        });
        let file = dir.path().join("prometheus.yaml");
        fs::write(&file, config.to_string()).unwrap();
        let mut prometheus = program("prometheus");
        prometheus
            .arg("--config.file")
            .arg(&file)
            .arg("--storage.tsdb.path")
            .arg(dir.path().join("data"))
            .args(["--web.listen-address", PROMETHEUS]);
        let prometheus = Running::start(&mut prometheus, &dir.path().join("prometheus.log"));
        eventually_true("Prometheus serves", || std::net::TcpStream::connect(PROMETHEUS).is_ok());
        let dashboard: Value = serde_json::from_str(include_str!(
            "../../charts/kube-lxcfs/dashboards/kube-lxcfs.json"
        ))
        .unwrap();
        let query = |expression: &str| {
            let path = format!("/api/v1/query?query={}", percent_encoded(expression));
            let (code, body) = get_from(PROMETHEUS, &path);
            assert!(code == 200 || code == 503, "{expression}: {code} {body}");
            let body: Value = serde_json::from_str(&body).unwrap_or_default();
            body["data"]["result"].as_array().cloned().unwrap_or_default()
        };
        for variable in ["cluster", "node"] {
            let variables = dashboard["templating"]["list"].as_array().unwrap();
            assert!(variables.iter().any(|one| one["name"] == variable), "{variable}");
        }
        let mut count = 0;
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().unwrap() {
                let expression = target["expr"].as_str().unwrap();
                for variable in ["cluster=~\"$cluster\"", "node=~\"$node\""] {
                    assert!(expression.contains(variable), "{expression}");
                }
                let chosen = expression.replace("$cluster", "c1").replace("$node", "n1");
                eventually(&chosen, || match query(&chosen) {
                    result if result.is_empty() => Err(prometheus.log()),
                    _ => Ok(()),
                });
                let other = expression.replace("$cluster", "c2").replace("$node", ".*");
                let other = other.replace(" or vector(0)", "");
                assert!(query(&other).is_empty(), "{other}");
                count += 1;
            }
        }
        assert!(count > 15, "{count}");
    });
}

#[test]
fn check_has_the_names_of_the_reference() {
    isolated(|| {
        let cluster = Cluster::start();
        let check = || -> Vec<Value> {
            let mut check = kube_lxcfs();
            check.args(["check", "-o", "json", "--lxcfs-path", "/nonexistent"]);
            let output = check.env("KUBECONFIG", cluster.kubeconfig("agent")).output().unwrap();
            serde_json::from_slice(&output.stdout).unwrap()
        };
        let reference = include_str!("../../docs/reference.md");
        let names = reference.split("\nThe names are ").nth(1).unwrap();
        let names = names.split(". ").next().unwrap();
        let mut documented: Vec<&str> = names.split('`').skip(1).step_by(2).collect();
        documented.sort_unstable();
        let checks = check();
        let mut served: Vec<&str> =
            checks.iter().map(|one| one["name"].as_str().unwrap()).collect();
        served.sort_unstable();
        assert_eq!(served, documented);
        let verdict = |checks: &[Value], name: &str| {
            let found = checks.iter().find(|one| one["name"] == name).unwrap();
            found["verdict"].as_str().unwrap().to_owned()
        };
        assert_eq!(verdict(&checks, "pod security"), "ok");
        let label = "pod-security.kubernetes.io/enforce=restricted";
        cluster.kubectl(&["label", "namespace", "default", label]);
        // The list may come from the API server's cache.
        eventually_true("the level is noticed", || verdict(&check(), "pod security") == "warn");
        // No runtime, no lxcfs.
        assert_eq!(verdict(&checks, "sockets"), "warn");
        assert_eq!(verdict(&checks, "lxcfs"), "fail");
        assert_eq!(verdict(&checks, "fuse"), "ok");
    });
}
