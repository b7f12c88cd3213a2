//! What a fleet of agents costs the API server: start, steady state, and a restart of the server.
//!
//!     cargo bench --bench apiserver
//!
//! The watches of many agents run in this process, each agent with its own client, against a real
//! kube-apiserver and etcd. `APISERVER_NODES` (500) and `APISERVER_PODS` (5000) set the size,
//! `APISERVER_IDLE` (70) the seconds of the steady state. Root is not needed.
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_imports,
    clippy::needless_pass_by_value,
    clippy::cast_precision_loss,
    reason = "a benchmark fails by panicking; counts are small"
)]

#[path = "../tests/it/harness/mod.rs"]
#[allow(dead_code, unused, reason = "the tests use the rest")]
mod harness;

use std::{
    collections::BTreeMap,
    fs,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams, PostParams},
    client::{Body, ClientBuilder},
    config::{KubeConfigOptions, Kubeconfig},
};
use kube_lxcfs::{
    model::pod::Update,
    sources::kubernetes::{watch_namespaces, watch_pods},
};
use serde_json::json;
use tokio::sync::mpsc;

/// An event that a watch of an agent received, or a request that it sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    ListPods,
    WatchPods,
    ListNamespaces,
    WatchNamespaces,
    PodsReplaced,
    NamespacesReplaced,
    Changed,
}

type Record = Arc<Mutex<Vec<(Instant, usize, Kind)>>>;

fn parameter(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

fn agent_client(config: Config, agent: usize, record: Record) -> Client {
    let layer = tower::util::MapRequestLayer::new(move |request: axum::http::Request<Body>| {
        let query = request.uri().query().unwrap_or_default();
        let kind = match (request.uri().path(), query.contains("watch=true")) {
            ("/api/v1/pods", false) => Kind::ListPods,
            ("/api/v1/pods", true) => Kind::WatchPods,
            (_, false) => Kind::ListNamespaces,
            (_, true) => Kind::WatchNamespaces,
        };
        record.lock().unwrap().push((Instant::now(), agent, kind));
        request
    });
    ClientBuilder::try_from(config).unwrap().with_layer(&layer).build()
}

/// Runs the watches of all agents as `kube-lxcfs agent` does, until this process exits.
fn run_agents(config: Config, nodes: usize, record: Record) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for agent in 0..nodes {
            let (updates_tx, mut updates) = mpsc::channel(256);
            let client = agent_client(config.clone(), agent, record.clone());
            let node = format!("node-{agent}");
            tokio::spawn(watch_pods(client.clone(), node, updates_tx.clone(), Arc::default()));
            tokio::spawn(watch_namespaces(client, false, updates_tx, Arc::default()));
            let record = record.clone();
            tokio::spawn(async move {
                while let Some(update) = updates.recv().await {
                    let kind = match update {
                        Update::PodsReplaced(_) => Kind::PodsReplaced,
                        Update::NamespacesReplaced(_) => Kind::NamespacesReplaced,
                        _ => Kind::Changed,
                    };
                    record.lock().unwrap().push((Instant::now(), agent, kind));
                }
            });
        }
        std::future::pending::<()>().await;
    });
}

async fn create_pods(api: &Api<Pod>, nodes: usize, pods: usize) {
    let create = |n: usize| async move {
        let name = format!("pod-{n}");
        let resources = json!({"limits": {"cpu": "1", "memory": "1Gi"}});
        let pod = json!({"metadata": {"name": name, "labels": {"app": "web"},
                "annotations": {"kube-lxcfs.io/inject": "true"}},
            "spec": {"nodeName": format!("node-{}", n % nodes),
                "containers": [{"name": "app", "image": "registry.example/web:1",
                    "resources": resources, "ports": [{"containerPort": 8080}]}]}});
        let pod = serde_json::from_value(pod).unwrap();
        api.create(&PostParams::default(), &pod).await.unwrap();
        let id = format!("containerd://{n:064x}");
        let status = json!({"status": {"phase": "Running", "containerStatuses": [
            {"name": "app", "image": "registry.example/web:1", "imageID": "", "containerID": id,
            "ready": true, "restartCount": 0, "state": {"running": {}}}]}});
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    };
    stream::iter(0..pods).map(create).buffer_unordered(64).collect::<Vec<()>>().await;
}

/// The process of the API server, a child of this one.
fn apiserver_pid() -> i32 {
    let own = i32::try_from(std::process::id()).unwrap();
    procfs::process::all_processes()
        .unwrap()
        .flatten()
        .filter_map(|process| process.stat().ok())
        .find(|stat| stat.ppid == own && stat.comm == "kube-apiserver" && stat.state != 'Z')
        .unwrap()
        .pid
}

fn print_process(when: &str) {
    let pid = apiserver_pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let mib = |field: &str| {
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    };
    let stat = procfs::process::Process::new(pid).unwrap().stat().unwrap();
    let cpu = (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64;
    let (rss, peak) = (mib("VmRSS"), mib("VmHWM"));
    println!("{when}: API server resident {rss:.0} MiB, at most {peak:.0} MiB, CPU {cpu:.1} s");
}

/// Sums of the API server's metrics that concern pods, namespaces and events.
fn metrics(cluster: &harness::Cluster) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for line in cluster.kubectl(&["get", "--raw", "/metrics"]).lines() {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let Some((name, labels)) = series.split_once('{') else { continue };
        let label = |key: &str| {
            let at = labels.find(&format!("{key}=\""))? + key.len() + 2;
            labels[at..].split('"').next()
        };
        let key = match name {
            "apiserver_request_total"
            | "apiserver_response_sizes_sum"
            | "apiserver_longrunning_gauge" => {
                let resource = label("resource").unwrap_or_default();
                if !["pods", "namespaces", "events"].contains(&resource) {
                    continue;
                }
                let code = label("code").unwrap_or_default();
                format!("{name} {} {resource} {code}", label("verb").unwrap_or_default())
            }
            "apiserver_watch_events_total" | "apiserver_watch_events_sizes_sum" => {
                let kind = label("kind").unwrap_or_default();
                if !["Pod", "Namespace"].contains(&kind) {
                    continue;
                }
                format!("{name} {kind}")
            }
            _ => continue,
        };
        *sums.entry(key).or_insert(0.0) += value.parse::<f64>().unwrap_or(0.0);
    }
    sums
}

fn print_difference(before: &BTreeMap<String, f64>, after: &BTreeMap<String, f64>) {
    for (key, value) in after {
        let change = value - before.get(key).copied().unwrap_or(0.0);
        if change != 0.0 {
            println!("    {key}: {change}");
        }
    }
}

/// Waits until every agent has listed both kinds since `since`, and returns when the last did.
fn wait_for_lists(record: &Record, nodes: usize, since: Instant) -> Option<Instant> {
    let deadline = Instant::now() + Duration::from_secs(180);
    loop {
        let mut first = BTreeMap::new();
        for &(at, agent, kind) in record.lock().unwrap().iter() {
            if at >= since && matches!(kind, Kind::PodsReplaced | Kind::NamespacesReplaced) {
                first.entry((agent, kind)).or_insert(at);
            }
        }
        if first.len() == 2 * nodes {
            return first.into_values().max();
        }
        if Instant::now() > deadline {
            println!("    only {} of {} lists after 180 s", first.len(), 2 * nodes);
            return None;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Waits until the API server serves the watches of every agent. A watch that resumes at a version
/// which the server still knows needs no list.
fn wait_for_watches(cluster: &harness::Cluster, nodes: usize) -> bool {
    let deadline = Instant::now() + Duration::from_secs(180);
    let mut missing = Vec::new();
    while Instant::now() < deadline {
        let metrics = metrics(cluster);
        missing = ["pods", "namespaces"]
            .iter()
            .map(|resource| {
                let key = format!("apiserver_longrunning_gauge WATCH {resource} ");
                nodes as f64 - metrics.get(&key).copied().unwrap_or(0.0)
            })
            .collect();
        if missing.iter().all(|count| *count <= 0.0) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    println!("    watches of pods and namespaces missing after 180 s: {missing:?}");
    false
}

/// Prints how many records of the kinds fall into each second since `since`, and the share of the
/// busiest.
fn print_histogram(title: &str, record: &Record, since: Instant, kinds: &[Kind]) {
    let mut buckets = BTreeMap::new();
    for &(at, _, kind) in record.lock().unwrap().iter() {
        if at >= since && kinds.contains(&kind) {
            *buckets.entry((at - since).as_secs()).or_insert(0_usize) += 1;
        }
    }
    let (total, most) = (buckets.values().sum::<usize>(), buckets.values().max().copied());
    let share = 100.0 * most.unwrap_or(0) as f64 / total.max(1) as f64;
    println!("{title}: {total}, {share:.0} % of them in the busiest second");
    let cells: Vec<String> = buckets.iter().map(|(s, n)| format!("{s} s: {n}")).collect();
    println!("    {}", cells.join(", "));
}

fn main() {
    let nodes = parameter("APISERVER_NODES", 500);
    let pods = parameter("APISERVER_PODS", 5000);
    let idle = Duration::from_secs(parameter("APISERVER_IDLE", 70) as u64);
    // Two connections per agent, and one for each request beside the watches.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();

    let mut cluster = harness::Cluster::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let started = Instant::now();
    let api: Api<Pod> = Api::namespaced(runtime.block_on(cluster.client()), "default");
    runtime.block_on(create_pods(&api, nodes, pods));
    cluster.kubectl(&["label", "namespace", "default", "kube-lxcfs.io/inject=enabled"]);
    println!("{pods} pods on {nodes} nodes created in {:.0?}", started.elapsed());
    print_process("without agents");

    let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig("agent")).unwrap();
    let options = KubeConfigOptions::default();
    let mut config =
        runtime.block_on(Config::from_custom_kubeconfig(kubeconfig, &options)).unwrap();
    // In a pod, the client reads one certificate authority, not all of the machine.
    config.root_cert = Some(Vec::new());
    let record = Record::default();
    let before = metrics(&cluster);
    let started = Instant::now();
    {
        let record = record.clone();
        std::thread::spawn(move || run_agents(config, nodes, record));
    }
    if let Some(last) = wait_for_lists(&record, nodes, started) {
        println!("all agents started together have listed after {:.1?}", last - started);
    }
    let listed = metrics(&cluster);
    print_difference(&before, &listed);
    print_process("with agents");

    std::thread::sleep(idle);
    let rested = metrics(&cluster);
    println!("in {idle:?} without changes:");
    print_difference(&listed, &rested);
    print_process("after that");

    let received = || {
        let changed = |(_, _, kind): &&(_, _, Kind)| *kind == Kind::Changed;
        record.lock().unwrap().iter().filter(changed).count()
    };
    let (changes, already) = (pods.min(500), received());
    runtime.block_on(async {
        let annotate = |n: usize| {
            let api = &api;
            async move {
                let patch = json!({"metadata": {"annotations": {"example.com/change": "1"}}});
                let (name, patch) = (format!("pod-{n}"), Patch::Merge(patch));
                api.patch(&name, &PatchParams::default(), &patch).await.unwrap();
            }
        };
        stream::iter(0..changes).map(annotate).buffer_unordered(16).collect::<Vec<()>>().await;
    });
    harness::eventually_true("every change is received", || received() - already >= changes);
    println!("{changes} changes of pods, {} updates received:", received() - already);
    print_difference(&rested, &metrics(&cluster));

    let killed = Instant::now();
    cluster.down();
    cluster.up();
    let ready = Instant::now();
    println!("API server killed, and ready again after {:.1?}", ready - killed);
    print_process("ready again");
    let is_watch = |kind| matches!(kind, Kind::WatchPods | Kind::WatchNamespaces);
    if wait_for_watches(&cluster, nodes) {
        let last = record.lock().unwrap().iter().rev().find(|entry| is_watch(entry.2)).unwrap().0;
        println!("the last watch was requested {:.1?} after that", last - ready.min(last));
    }
    print_difference(&BTreeMap::new(), &metrics(&cluster));
    print_process("all watches again");
    let (lists, watches) =
        ([Kind::ListPods, Kind::ListNamespaces], [Kind::WatchPods, Kind::WatchNamespaces]);
    let received = [Kind::PodsReplaced, Kind::NamespacesReplaced];
    let last_list =
        record.lock().unwrap().iter().rev().find(|entry| received.contains(&entry.2)).copied();
    if let Some((last, _, _)) = last_list.filter(|(last, _, _)| *last > ready) {
        println!("the last list was received {:.1?} after that", last - ready);
    }
    print_histogram("watches requested since the kill", &record, killed, &watches);
    print_histogram("lists requested since the kill", &record, killed, &lists);
    print_histogram("lists received since the kill", &record, killed, &received);
    drop(cluster);
    // The agents' thread ends with the process.
}
