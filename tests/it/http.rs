//! `/healthz`, `/readyz`, `/metrics` and `/status` of the agent, against what is really there.

use nix::sys::signal::Signal;

use crate::{cluster::Pods, harness::*};

#[test]
fn metrics_status_and_readiness_tell_what_is_there() {
    let (reader, pods) = (Reader::start(std::time::Duration::from_millis(50)), Pods::start());
    pods.run("in", &reader.id, serde_json::json!({"kube-lxcfs.io/inject": "true"}));
    let other = Reader::start(std::time::Duration::from_millis(50));
    pods.run("rubbish", &other.id, serde_json::json!({"kube-lxcfs.io/inject": "yes"}));
    let dir = tempfile::tempdir().unwrap();
    let lxcfs_path = dir.path().join("lxcfs");
    let args =
        ["--node-name", "n1", "--lxcfs-path", lxcfs_path.to_str().unwrap(), "--pid-from", "proc"];
    let agent = agent(dir.path(), &args, &[("KUBECONFIG", pods.kubeconfig().to_str().unwrap())]);
    assert_eq!(get(&agent, "/healthz"), (200, "ok\n".into()));
    eventually("it waits for lxcfs", || {
        let (code, why) = get(&agent, "/readyz");
        if (code, why.as_str()) == (503, "no lxcfs serves\n") {
            Ok(())
        } else {
            Err(format!("{code} {why}"))
        }
    });
    let metric = |name: &str| {
        let (code, text) = get(&agent, "/metrics");
        assert_eq!(code, 200);
        let line = text
            .lines()
            .find(|l| l.split(' ').next() == Some(name))
            .unwrap_or_else(|| panic!("{name}: {text}"));
        line.split(' ').nth(1).unwrap().to_owned()
    };
    assert_eq!(metric("kube_lxcfs_lxcfs_up"), "0");
    let lxcfs = Supervised::at(&lxcfs_path);
    let injected = || metric("kube_lxcfs_containers{state=\"injected\"}");
    eventually_true("the view is in place", || injected() == "1");
    assert_eq!(get(&agent, "/readyz").0, 200);
    assert_eq!(metric("kube_lxcfs_containers{state=\"skipped\"}"), "1");
    assert_eq!(metric("kube_lxcfs_operations_total{operation=\"inject\",result=\"success\"}"), "1");
    assert_eq!(metric("kube_lxcfs_injection_latency_seconds_count{trigger=\"watch\"}"), "1");
    assert_eq!(metric("kube_lxcfs_lxcfs_up"), "1");
    let status =
        || -> Vec<serde_json::Value> { serde_json::from_str(&get(&agent, "/status").1).unwrap() };
    let of = |pod: &str| status().into_iter().find(|row| row["pod"] == pod).unwrap();
    let row = of("in");
    assert_eq!(
        (&row["files"]["meminfo"], &row["wish"]["files"], &row["wish"]["state"]),
        (&"current".into(), &"all".into(), &"injected".into())
    );
    assert_eq!(row["id"], *reader.id);
    assert_eq!(of("rubbish")["wish"]["state"], "skipped");
    // Another lxcfs.
    lxcfs.signal_lxcfs(Signal::SIGKILL);
    eventually_true("it is counted", || metric("kube_lxcfs_lxcfs_restarts_total") != "0");
    eventually_true("the pass is measured", || {
        metric("kube_lxcfs_remount_pass_duration_seconds") != "0.0"
    });
    eventually_true("the view is back", || {
        injected() == "1" && views(&reader.mountinfo()).len() >= 9
    });
    assert_eq!(get(&agent, "/nothing").0, 404);
    // The address is taken.
    let taken =
        agent.log().split_once("HTTP address=").unwrap().1.lines().next().unwrap().to_owned();
    let ended = run(&["agent", "--pods-from", "cri", "--listen", &taken]);
    assert!(
        stderr(&ended).contains(&format!("{taken} cannot be listened on; --listen")),
        "{}",
        stderr(&ended)
    );
}
