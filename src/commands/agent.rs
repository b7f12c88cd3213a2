//! `kube-lxcfs agent`: connects the sources, the agent's loop and the HTTP server.

use std::{collections::HashMap, net::SocketAddr, process::ExitCode, sync::Arc};

use anyhow::{Context, Result, anyhow, bail};
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet};

use super::{check, unsupported, workers};
use crate::{
    admin::{self, AppState, CertificateFiles, Secure},
    agent::{
        self, Dependencies, Inputs,
        state::{State, StateConfig},
    },
    args::{AgentArgs, Common, CriEvents, PodSource, SecureArgs},
    lxcfs::{Finder, SharedLxcfs, Watcher},
    model::pod::Update,
    node,
    runtime::{PidSource, Runtime, cri::CriClient},
    sources::{
        cri, kubernetes,
        nri::{self, NriMode},
    },
    supervisor::volume,
    sys::{
        self,
        syscalls::{self, Purpose},
    },
    telemetry::{
        events::{EventLevel, Events},
        metrics::Metrics,
    },
};

/// The number of threads, beside `--workers`, for operations that a blocked start waits for.
const RESERVED_WORKERS: usize = 1;
/// The capacity of a channel to the agent's loop, in messages.
const CHANNEL_CAPACITY: usize = 256;

pub(super) async fn run(common: Common, args: AgentArgs) -> Result<ExitCode> {
    sys::limit_heap();
    check::require_capabilities()?;
    let scope = args.scope();
    let selects_namespaces = scope.namespace_selector.is_some();
    if args.pods_from == PodSource::Cri {
        refuse_flags_of_api_server(&args)?;
    }
    if let Err(missing) = syscalls::verify_syscalls(Purpose::Mount) {
        return unsupported::run_agent(missing, common, args.listen, args.secure).await;
    }
    let lxcfs_path = common.lxcfs_path.clone();
    let cri = CriClient::new(common.cri_endpoint, common.host_root.clone());
    let workers = workers(args.workers, Purpose::Mount)?;
    workers.reserve(RESERVED_WORKERS).context("failed to start the threads that mount")?;
    node::prepare_scratch().await;
    let metrics = Arc::new(Metrics::default());
    let finder = Finder::new(&common.lxcfs_path).with_metrics(metrics.clone());
    let (updates_tx, updates) = mpsc::channel(CHANNEL_CAPACITY);
    let (lxcfs_changes_tx, lxcfs_changes) = mpsc::channel(CHANNEL_CAPACITY);
    let (blocked_starts_tx, blocked_starts) = mpsc::channel(CHANNEL_CAPACITY);
    let (snapshots_tx, snapshot_requests) = mpsc::channel(CHANNEL_CAPACITY);
    let mut watchers = Watchers::default();
    let lxcfs_watcher =
        Watcher::new(finder.clone(), workers.clone()).context("failed to watch the mount table")?;
    watchers.spawn("the watch of lxcfs", lxcfs_watcher.run(lxcfs_changes_tx));
    let (events, client) = match args.pods_from {
        PodSource::Kubernetes => {
            let watched = watch_api_server(
                args.node_name,
                selects_namespaces,
                args.events,
                &updates_tx,
                &metrics,
                &mut watchers,
            );
            watched.await?
        }
        PodSource::Cri => {
            let watch = cri::watch(cri.clone(), updates_tx.clone(), metrics.clone());
            watchers.spawn("the watch of pod sandboxes", watch);
            (Events::to_log(), None)
        }
    };
    let cri_is_used = common.pid_from != PidSource::Proc || args.pods_from == PodSource::Cri;
    let nri_outputs = nri::Outputs::new(blocked_starts_tx, updates_tx.clone(), metrics.clone());
    if args.cri_events == CriEvents::Auto && cri_is_used {
        let events = cri::watch_events(cri.clone(), updates_tx, nri_outputs.subscribe());
        watchers.spawn("the watch of CRI events", events);
    }
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(version, lxcfs = %lxcfs_path.display(), "agent started");
    let listener = listen(args.listen).await?;
    let secure = listen_secure(args.secure, client).await?;
    let app = AppState {
        snapshots: snapshots_tx,
        metrics: metrics.clone(),
        workers: workers.clone(),
        finder: finder.clone(),
        cri: (common.pid_from != PidSource::Proc).then(|| cri.clone()),
    };
    let checks = check::Node {
        pid_from: common.pid_from,
        cri: cri_is_used.then(|| cri.clone()),
        finder: finder.clone(),
        workers: Ok(workers.clone()),
        host_root: common.host_root.clone(),
        nri_socket: args.nri_socket.clone(),
        passive: true,
        enabled: None,
    }
    .record(metrics.clone());
    let dependencies = Dependencies {
        // Blocked starts wait for its searches.
        lxcfs: SharedLxcfs::new(finder, workers.urgent()),
        workers,
        runtime: Runtime::new(common.pid_from, cri),
        events,
        state: State::new(StateConfig {
            scope,
            has_namespaces: args.pods_from == PodSource::Kubernetes,
            adopt: args.adopt,
        }),
        adopt: args.adopt,
        metrics,
    };
    let nri_socket = nri::Socket { host_root: common.host_root, path: args.nri_socket };
    let inputs = Inputs { updates, lxcfs_changes, blocked_starts, snapshot_requests };
    tokio::select! {
        stopped = agent::run(dependencies, inputs) => stopped?,
        stopped = watchers.stopped() => return Err(stopped),
        stopped = run_nri(args.nri, nri_socket, nri_outputs) => stopped?,
        never = checks => match never {},
        stopped = admin::serve(listener, secure, app) => stopped.context("failed to serve HTTP")?,
    }
    // The last of the two pods removes the volume; lxcfs's pod does this too.
    if let Err(e) = volume::remove_if_unused(&lxcfs_path) {
        tracing::debug!(cause = %e, "failed to remove the volume of lxcfs");
    }
    Ok(ExitCode::SUCCESS)
}

fn refuse_flags_of_api_server(args: &AgentArgs) -> Result<()> {
    if args.namespace_selector.is_some() {
        bail!("--namespace-selector needs --pods-from kubernetes: the runtime knows no namespaces");
    }
    if args.secure.secure_listen.is_some() {
        bail!("--secure-listen needs --pods-from kubernetes: the API server reviews the tokens");
    }
    Ok(())
}

/// Watches pods and namespaces at the API server: those with the label, or all. Returns where
/// Events go, and the client.
async fn watch_api_server(
    node_name: Option<String>,
    all_namespaces: bool,
    level: EventLevel,
    updates: &mpsc::Sender<Update>,
    metrics: &Arc<Metrics>,
    watchers: &mut Watchers,
) -> Result<(Events, Option<kube::Client>)> {
    let node = node_name
        .filter(|name| !name.is_empty())
        .context("unknown node name; set --node-name or NODE_NAME")?;
    let client = api_client().await?;
    watchers.spawn(
        "the watch of pods",
        kubernetes::watch_pods(client.clone(), node.clone(), updates.clone(), metrics.clone()),
    );
    watchers.spawn(
        "the watch of namespaces",
        kubernetes::watch_namespaces(
            client.clone(),
            all_namespaces,
            updates.clone(),
            metrics.clone(),
        ),
    );
    let (events, publisher) = Events::to_pods(client.clone(), node, level, metrics.clone());
    watchers.spawn("the publisher of Events", publisher);
    Ok((events, Some(client)))
}

pub(super) async fn api_client() -> Result<kube::Client> {
    kube::Client::try_default().await.context(
        "failed to configure the API server's client; \
         run in a pod with a service account, set KUBECONFIG, or use --pods-from cri",
    )
}

async fn listen(address: SocketAddr) -> Result<TcpListener> {
    let listener = admin::listen(address).await.with_context(|| {
        format!("failed to listen on {address}; set --listen to another address")
    })?;
    tracing::info!(http_address = %listener.local_addr().unwrap_or(address), "serving HTTP");
    Ok(listener)
}

/// Listens at `--secure-listen`, if it is set. The client reviews tokens.
pub(super) async fn listen_secure(
    args: SecureArgs,
    client: Option<kube::Client>,
) -> Result<Option<Secure>> {
    let (Some(address), Some(client)) = (args.secure_listen, client) else { return Ok(None) };
    let listener = admin::listen(address).await.with_context(|| {
        format!("failed to listen on {address}; set --secure-listen to another address")
    })?;
    let files = args.tls_cert_file.zip(args.tls_key_file);
    let files = files.map(|(certificate, key)| CertificateFiles { certificate, key });
    let local = listener.local_addr().unwrap_or(address);
    let secure = Secure::new(listener, files, client).context(
        "failed to serve HTTPS; set --tls-cert-file and --tls-key-file to a usable pair",
    )?;
    tracing::info!(https_address = %local, "serving HTTPS");
    Ok(Some(secure))
}

async fn run_nri(
    mode: NriMode,
    socket: nri::Socket,
    outputs: nri::Outputs,
) -> Result<(), nri::Error> {
    if mode == NriMode::Off {
        return std::future::pending().await;
    }
    nri::run(&socket, mode == NriMode::Required, outputs).await
}

/// Tasks that run as long as the agent: one that returns or panics is an error of the agent, which
/// the kubelet restarts. When dropped, they are aborted.
#[derive(Debug, Default)]
struct Watchers {
    tasks: JoinSet<()>,
    names: HashMap<tokio::task::Id, &'static str>,
}

impl Watchers {
    fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.names.insert(self.tasks.spawn(task).id(), name);
    }

    /// Waits for the first that stops, and returns an error that names it.
    async fn stopped(&mut self) -> anyhow::Error {
        let (id, why) = match self.tasks.join_next_with_id().await {
            None => return std::future::pending().await,
            Some(Ok((id, ()))) => (id, "it returned".to_owned()),
            Some(Err(e)) => (e.id(), e.to_string()),
        };
        let name = self.names.get(&id).copied().unwrap_or("a task");
        anyhow!("{name} stopped: {why}; this is a bug: open an issue with the agent's log")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn error_of(watchers: &mut Watchers) -> String {
        let stopped = tokio::time::timeout(Duration::from_secs(10), watchers.stopped()).await;
        stopped.expect("a watcher stopped").to_string()
    }

    #[tokio::test]
    async fn watcher_that_panics_or_returns_is_an_error() {
        let mut watchers = Watchers::default();
        watchers.spawn("a", std::future::pending());
        watchers.spawn("b", async { panic!("on purpose") });
        let error = error_of(&mut watchers).await;
        assert!(error.starts_with("b stopped:") && error.contains("panicked"), "{error}");
        watchers.spawn("c", async {});
        let error = error_of(&mut watchers).await;
        assert!(error.starts_with("c stopped: it returned"), "{error}");
    }
}
