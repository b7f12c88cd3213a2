//! The agent's HTTP: `/healthz`, `/readyz`, `/metrics`, `/status`. Every answer comes from the agent's loop, so that a loop that
//! stands still is seen.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

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

use super::metrics::{ContainerState, Metrics};
use crate::{node, runtime::ContainerId};

/// The loop answers within this time, or it stands still.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The media type of OpenMetrics.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the agent's loop knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Why it is not ready, as far as the loop knows.
    pub waits_for: Option<String>,
    pub containers: Vec<Known>,
}

/// A container that wants a view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Known {
    pub namespace: String,
    pub pod: String,
    pub container: String,
    pub id: ContainerId,
    pub state: ContainerState,
    /// `all`, view files, or `keep` where what the pod says is not understood.
    pub wish: String,
    /// Why it has no view, or not the whole.
    pub why: Option<String>,
}

/// A container with a view, or that wants one.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    view: View,
    /// What its pod wishes; none for a view that no pod wishes.
    wish: Option<Wished>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum View {
    There(node::Status),
    None { namespace: String, pod: String, container: String, id: ContainerId },
}

#[derive(Debug, Serialize)]
struct Wished {
    files: String,
    state: ContainerState,
    why: Option<String>,
}

/// Asks the loop.
pub type Ask = oneshot::Sender<Snapshot>;

/// What answers: the loop, and what is asked beside it.
#[derive(Debug)]
pub struct Sources<Status, Runtime> {
    pub ask: mpsc::Sender<Ask>,
    pub metrics: Arc<Metrics>,
    /// The views of this node.
    pub status: Status,
    /// Whether the runtime answers.
    pub runtime: Runtime,
}

impl<S, R> Sources<S, R> {
    async fn snapshot(&self) -> Option<Snapshot> {
        let (answer, answered) = oneshot::channel();
        let asked = async {
            self.ask.send(answer).await.ok()?;
            answered.await.ok()
        };
        tokio::time::timeout(TIMEOUT, asked).await.ok()?
    }
}

/// Listens.
///
/// # Errors
/// Those of bind(2).
pub async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves for ever.
///
/// # Errors
/// Those of accept(2) that do not pass.
pub async fn serve<S, SF, R, RF>(listener: TcpListener, sources: Sources<S, R>) -> std::io::Result<()>
where
    S: Fn() -> SF + Send + Sync + 'static,
    SF: Future<Output = Result<Vec<node::Status>, String>> + Send + 'static,
    R: Fn() -> RF + Send + Sync + 'static,
    RF: Future<Output = Result<(), String>> + Send + 'static,
{
    let router = Router::new()
        .route("/healthz", get(healthz::<S, R>))
        .route("/readyz", get(readyz::<S, R, RF>))
        .route("/metrics", get(metrics::<S, R>))
        .route("/status", get(status::<S, SF, R>))
        .with_state(Arc::new(sources));
    axum::serve(listener, router).await
}

async fn healthz<S, R>(State(sources): State<Arc<Sources<S, R>>>) -> Response {
    match sources.snapshot().await {
        Some(_) => "ok\n".into_response(),
        None => unavailable("the agent's loop stands still"),
    }
}

async fn readyz<S, R, RF>(State(sources): State<Arc<Sources<S, R>>>) -> Response
where
    R: Fn() -> RF,
    RF: Future<Output = Result<(), String>>,
{
    let Some(Snapshot { waits_for, .. }) = sources.snapshot().await else {
        return unavailable("the agent's loop stands still");
    };
    if let Some(why) = waits_for {
        return unavailable(&why);
    }
    match (sources.runtime)().await {
        Ok(()) => "ok\n".into_response(),
        Err(why) => unavailable(&why),
    }
}

async fn metrics<S, R>(State(sources): State<Arc<Sources<S, R>>>) -> Response {
    let Some(Snapshot { containers, .. }) = sources.snapshot().await else {
        return unavailable("the agent's loop stands still");
    };
    sources.metrics.containers(|state| containers.iter().filter(|c| c.state == state).count());
    ([(header::CONTENT_TYPE, OPENMETRICS)], sources.metrics.text()).into_response()
}

async fn status<S, SF, R>(State(sources): State<Arc<Sources<S, R>>>) -> Response
where
    S: Fn() -> SF,
    SF: Future<Output = Result<Vec<node::Status>, String>>,
{
    let views = match (sources.status)().await {
        Ok(views) => views,
        Err(why) => return unavailable(&why),
    };
    match sources.snapshot().await {
        Some(Snapshot { containers, .. }) => Json(rows(views, containers)).into_response(),
        None => unavailable("the agent's loop stands still"),
    }
}

/// Puts beside each view what is wished, and adds those who wish for one and have none.
fn rows(views: Vec<node::Status>, mut known: Vec<Known>) -> Vec<Row> {
    let mut rows: Vec<Row> = views
        .into_iter()
        .map(|mut view| {
            let wished = view.id.as_ref().and_then(|id| known.iter().position(|known| known.id == *id));
            let wish = wished.map(|n| known.swap_remove(n)).map(|known| {
                view.namespace = Some(known.namespace);
                view.pod = Some(known.pod);
                view.container = Some(known.container);
                Wished { files: known.wish, state: known.state, why: known.why }
            });
            Row { view: View::There(view), wish }
        })
        .collect();
    known.sort_by(|a, b| (&a.namespace, &a.pod, &a.container).cmp(&(&b.namespace, &b.pod, &b.container)));
    rows.extend(known.into_iter().map(|Known { namespace, pod, container, id, state, wish, why }| Row {
        view: View::None { namespace, pod, container, id },
        wish: Some(Wished { files: wish, state, why }),
    }));
    rows
}

fn unavailable(why: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response()
}
