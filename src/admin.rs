//! The agent's HTTP endpoints: `/healthz`, `/readyz`, `/metrics`, `/status`. Every response needs
//! the agent's loop, so that each endpoint reports a loop that is stuck.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Serialize;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
};

use crate::{
    lxcfs::Finder,
    model::{
        container_id::ContainerId,
        status::{ContainerStatus, DesiredStatus, Snapshot, SnapshotRequest},
    },
    mount::Workers,
    node::{self, ViewStatus},
    runtime::cri::CriClient,
    sources,
    telemetry::metrics::Metrics,
};

/// A loop that does not respond within this time is stuck.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The media type of OpenMetrics.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const STUCK: &str = "the agent's loop is stuck";

/// The dependencies of the handlers.
#[derive(Debug)]
pub struct AppState {
    /// Requests to the agent's loop.
    pub snapshots: mpsc::Sender<SnapshotRequest>,
    pub metrics: Arc<Metrics>,
    pub workers: Workers,
    pub finder: Finder,
    /// `None` if pids come from `/proc` only.
    pub cri: Option<CriClient>,
}

impl AppState {
    async fn snapshot(&self) -> Option<Snapshot> {
        let (tx, rx) = oneshot::channel();
        let snapshot = async {
            self.snapshots.send(tx).await.ok()?;
            rx.await.ok()
        };
        tokio::time::timeout(TIMEOUT, snapshot).await.ok()?
    }
}

/// Listens.
///
/// # Errors
/// Those of bind(2).
pub async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until it fails.
///
/// # Errors
/// Those of accept(2) that are not temporary.
pub async fn serve(listener: TcpListener, state: AppState) -> std::io::Result<()> {
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .with_state(Arc::new(state));
    axum::serve(listener, router).await
}

async fn healthz(State(state): State<Arc<AppState>>) -> Response {
    match state.snapshot().await {
        Some(_) => "ok\n".into_response(),
        None => unavailable(STUCK),
    }
}

async fn readyz(State(state): State<Arc<AppState>>) -> Response {
    let Some(Snapshot { not_ready_reason, .. }) = state.snapshot().await else {
        return unavailable(STUCK);
    };
    if let Some(reason) = not_ready_reason {
        return unavailable(&reason);
    }
    let Some(cri) = &state.cri else { return "ok\n".into_response() };
    match cri.version().await {
        Ok(_) => "ok\n".into_response(),
        Err(e) => unavailable(&e.to_string()),
    }
}

async fn metrics(State(state): State<Arc<AppState>>) -> Response {
    let Some(Snapshot { containers, .. }) = state.snapshot().await else {
        return unavailable(STUCK);
    };
    state
        .metrics
        .set_containers(|state| containers.iter().filter(|c| c.desired.state == state).count());
    ([(header::CONTENT_TYPE, OPENMETRICS)], state.metrics.text()).into_response()
}

async fn status(State(state): State<Arc<AppState>>) -> Response {
    let pods = match &state.cri {
        Some(cri) => sources::cri::list_pods_or_none(cri).await,
        None => Vec::new(),
    };
    let serving = state.finder.find(&state.workers).await.ok().map(|lxcfs| lxcfs.dev);
    let views = match node::status(&state.workers, serving, pods).await {
        Ok(views) => views,
        Err(e) => return unavailable(&format!("failed to scan /proc: {e}")),
    };
    match state.snapshot().await {
        Some(Snapshot { containers, .. }) => Json(rows(views, containers)).into_response(),
        None => unavailable(STUCK),
    }
}

/// A container with a view, or that wants one.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    view: View,
    /// The desired view; null for a view that no pod desires.
    desired: Option<DesiredStatus>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum View {
    Present(ViewStatus),
    Absent { namespace: String, pod: String, container: String, id: ContainerId },
}

/// Joins the views with the desired ones, and adds the containers that want a view and have none.
fn rows(views: Vec<ViewStatus>, mut containers: Vec<ContainerStatus>) -> Vec<Row> {
    let mut rows: Vec<Row> = views
        .into_iter()
        .map(|mut view| {
            let known = view.id.as_ref().and_then(|id| containers.iter().position(|c| c.id == *id));
            let desired = known.map(|n| containers.swap_remove(n)).map(|known| {
                view.namespace = Some(known.namespace);
                view.pod = Some(known.pod);
                view.container = Some(known.container);
                known.desired
            });
            Row { view: View::Present(view), desired }
        })
        .collect();
    containers.sort_by(|a, b| {
        (&a.namespace, &a.pod, &a.container).cmp(&(&b.namespace, &b.pod, &b.container))
    });
    rows.extend(containers.into_iter().map(
        |ContainerStatus { namespace, pod, container, id, desired }| Row {
            view: View::Absent { namespace, pod, container, id },
            desired: Some(desired),
        },
    ));
    rows
}

fn unavailable(why: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response()
}
