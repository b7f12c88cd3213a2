//! The agent's HTTP endpoints: `/healthz`, `/readyz`, `/metrics`, `/status`, and `/`, which lists
//! them. Every response of these four needs the agent's loop, so that each reports a loop that is
//! stuck. Over HTTPS, clients that the API server authenticates and authorizes get all but
//! `/readyz`.

mod connections;
mod reviews;
mod tls;

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{ConnectInfo, RawQuery, State, connect_info::Connected},
    http::{HeaderMap, StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    routing::get,
    serve::IncomingStream,
};
use bytes::Bytes;
use serde::Serialize;
use tokio::{
    net::TcpListener,
    sync::{Mutex, mpsc, oneshot},
};

pub use self::tls::{CertificateFiles, Error};
use self::{
    connections::BoundedListener,
    reviews::Reviewer,
    tls::{Certificate, TlsListener},
};
use crate::{
    lxcfs::Finder,
    model::{
        container_id::ContainerId,
        pod::Pod,
        status::{ContainerStatus, DesiredStatus, Snapshot, SnapshotRequest},
    },
    mount::Workers,
    node::{self, ViewStatus},
    runtime::cri::CriClient,
    sources,
    sys::mountinfo::Dev,
    telemetry::metrics::{self, Metrics, exposition::Format, supervisor::SupervisorMetrics},
};

/// A loop that does not respond within this time is stuck.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The response of `/`.
const ENDPOINTS: &str = "\
/healthz               200 if the agent's loop responds
/readyz                200 if the agent can inject; else the reason
/readyz?exclude=lxcfs  the same, whether lxcfs serves or not
/metrics               metrics as Prometheus text, or in OpenMetrics 1.0
/status                views of the node, in JSON, for loopback clients
";
/// The limit for each part of `/metrics` that waits for containers or the runtime; Prometheus waits
/// 10 s by default.
const METRICS_TIMEOUT: Duration = Duration::from_secs(2);
/// The views that `/metrics` counts are at least this old before they are counted again, and at
/// most [`VIEWS_LONG_TTL`], unless a container hangs.
const VIEWS_TTL: Duration = Duration::from_secs(15);
const VIEWS_LONG_TTL: Duration = Duration::from_secs(120);
/// In between, to count them takes one part in so many of the time. With 1,000 containers and
/// 10,000 processes it takes 0.2 s of CPU time.
const VIEWS_SHARE: u32 = 800;
const STUCK: &str = "the agent's loop is stuck";
/// The response of `/status` to other hosts. It names pods of every namespace.
const LOOPBACK_ONLY: &str =
    "/status is for loopback clients only; use kubectl port-forward, or kube-lxcfs status\n";
const EXHAUSTED: &str = "too many worker threads hang; restart the agent";
/// `/status` visits every container: its result is used again for this time.
const STATUS_TTL: Duration = Duration::from_secs(1);
/// The number of threads that `/status` uses, apart from those that mount.
const STATUS_THREADS: usize = 2;
/// The deadline of each job of `/status`.
const STATUS_DEADLINE: Duration = Duration::from_secs(5);

/// The dependencies of the handlers.
#[derive(Clone, Debug)]
pub struct AppState {
    /// Requests to the agent's loop.
    pub snapshots: mpsc::Sender<SnapshotRequest>,
    pub metrics: Arc<Metrics>,
    /// The threads that mount, for `/healthz`.
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

/// `/status`, one response at a time.
#[derive(Debug)]
struct Status {
    app: AppState,
    workers: Workers,
    last: Mutex<Option<(Instant, Bytes)>>,
    /// When `/metrics` counts the views again. Locked while it does.
    next_count: Arc<Mutex<Option<Instant>>>,
}

/// The address of a client.
#[derive(Clone, Copy, Debug)]
struct Peer(SocketAddr);

impl Connected<IncomingStream<'_, BoundedListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, BoundedListener>) -> Peer {
        Peer(*stream.remote_addr())
    }
}

impl Peer {
    /// Whether it is in this network namespace. A listener on `::` sees IPv4 addresses as mapped
    /// ones.
    fn is_loopback(self) -> bool {
        self.0.ip().to_canonical().is_loopback()
    }
}

/// HTTPS, for clients that the API server authenticates and authorizes.
pub struct Secure {
    listener: TlsListener,
    reviewer: Reviewer,
}

impl fmt::Debug for Secure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secure").finish_non_exhaustive()
    }
}

impl Secure {
    /// With the certificate of these files, or with a self-signed one. The files are read again for
    /// each connection.
    ///
    /// # Errors
    /// Fails if the files are not readable, or not a certificate and its key.
    pub fn new(
        listener: TcpListener,
        files: Option<CertificateFiles>,
        client: kube::Client,
    ) -> Result<Secure, Error> {
        let listener = TlsListener::new(listener, Certificate::new(files)?);
        Ok(Secure { listener, reviewer: Reviewer::new(client) })
    }
}

/// Listens. On a kernel without IPv6 (`ipv6.disable=1`), `::` is `0.0.0.0`.
///
/// # Errors
/// Those of bind(2).
pub async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(e) => match without_ipv6(address, &e) {
            Some(address) => TcpListener::bind(address).await,
            None => Err(e),
        },
        listening => listening,
    }
}

/// The address to use instead if the kernel has no IPv6 (`EAFNOSUPPORT` of socket(2)).
fn without_ipv6(address: SocketAddr, error: &std::io::Error) -> Option<SocketAddr> {
    let any = address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    (any && error.raw_os_error() == Some(libc::EAFNOSUPPORT))
        .then(|| (Ipv4Addr::UNSPECIFIED, address.port()).into())
}

/// Serves until it fails.
///
/// # Errors
/// Fails if the threads of `/status` cannot be started.
pub async fn serve(
    listener: TcpListener,
    secure: Option<Secure>,
    state: AppState,
) -> std::io::Result<()> {
    let workers = Workers::start(STATUS_THREADS, STATUS_DEADLINE)?;
    let status =
        Status { app: state.clone(), workers, last: Mutex::default(), next_count: Arc::default() };
    let (state, status) = (Arc::new(state), Arc::new(status));
    let views =
        Router::new().route("/status", get(loopback_status)).route("/metrics", get(metrics));
    let router = Router::new()
        .route("/", get(ENDPOINTS))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(state.clone())
        .merge(views.with_state(status.clone()));
    let service = router.into_make_service_with_connect_info::<Peer>();
    let plain = async { axum::serve(BoundedListener::new(listener), service).await };
    let Some(Secure { listener, reviewer }) = secure else { return plain.await };
    let views = Router::new().route("/status", get(self::status)).route("/metrics", get(metrics));
    let router = Router::new()
        .route("/healthz", get(healthz))
        .with_state(state)
        .merge(views.with_state(status))
        .route_layer(middleware::from_fn_with_state(Arc::new(reviewer), reviews::authorize));
    let secure = async { axum::serve(listener, router).await };
    tokio::try_join!(plain, secure).map(|_| ())
}

/// Serves `/metrics` and `/healthz` of the supervisor until it fails.
///
/// # Errors
/// Those of accept(2).
pub async fn serve_supervisor(
    listener: TcpListener,
    metrics: Arc<SupervisorMetrics>,
) -> std::io::Result<()> {
    let text = |State(metrics): State<Arc<SupervisorMetrics>>, headers: HeaderMap| async move {
        exposition(&headers, |format| metrics.text(format))
    };
    let router = Router::new()
        .route("/healthz", get("ok\n"))
        .route("/metrics", get(text))
        .with_state(metrics);
    axum::serve(BoundedListener::new(listener), router).await
}

/// The response with metrics in the format that the client accepts.
fn exposition(headers: &HeaderMap, text: impl FnOnce(Format) -> String) -> Response {
    let accept: Vec<&str> =
        headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    let format = Format::negotiate(&accept.join(","));
    let headers = [(header::CONTENT_TYPE, format.content_type()), (header::VARY, "Accept")];
    (headers, text(format)).into_response()
}

async fn healthz(State(state): State<Arc<AppState>>) -> Response {
    match state.snapshot().await {
        Some(_) if state.workers.is_exhausted() => unavailable(EXHAUSTED),
        Some(_) => "ok\n".into_response(),
        None => unavailable(STUCK),
    }
}

/// With `exclude=lxcfs`, a missing lxcfs is ignored: in a rolling update, agent and lxcfs must not
/// wait for each other.
async fn readyz(State(state): State<Arc<AppState>>, RawQuery(query): RawQuery) -> Response {
    let Some(Snapshot { not_ready_reason, lxcfs_up, .. }) = state.snapshot().await else {
        return unavailable(STUCK);
    };
    if let Some(reason) = not_ready_reason {
        return unavailable(&reason);
    }
    let excluded = query.is_some_and(|query| query.split('&').any(|one| one == "exclude=lxcfs"));
    if !lxcfs_up && !excluded {
        return unavailable("no lxcfs serves");
    }
    let Some(cri) = &state.cri else { return "ok\n".into_response() };
    match cri.version().await {
        Ok(_) => "ok\n".into_response(),
        Err(e) => unavailable(&e.to_string()),
    }
}

async fn metrics(State(status): State<Arc<Status>>, headers: HeaderMap) -> Response {
    let AppState { metrics, workers, cri, .. } = &status.app;
    let Some(Snapshot { containers, .. }) = status.app.snapshot().await else {
        return unavailable(STUCK);
    };
    let count =
        |is: &dyn Fn(&DesiredStatus) -> bool| containers.iter().filter(|c| is(&c.desired)).count();
    metrics.set_containers(|state| count(&|c| c.state == state));
    metrics.set_containers_without_view(|state, reason| {
        count(&|c| c.state == state && c.reason == Some(reason))
    });
    metrics.set_workers_hung(workers.hung());
    let runtime = async {
        if let Some(cri) = cri {
            let version = tokio::time::timeout(METRICS_TIMEOUT, cri.version()).await;
            metrics.set_runtime_up(version.is_ok_and(|version| version.is_ok()));
        }
    };
    tokio::join!(runtime, status.count_views());
    exposition(&headers, |format| metrics.text(format))
}

async fn loopback_status(
    status: State<Arc<Status>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Response {
    if !peer.is_loopback() {
        return (StatusCode::FORBIDDEN, LOOPBACK_ONLY).into_response();
    }
    self::status(status).await
}

async fn status(State(status): State<Arc<Status>>) -> Response {
    let mut last = status.last.lock().await;
    if let Some((at, rows)) = &*last
        && at.elapsed() < STATUS_TTL
    {
        return json(rows.clone());
    }
    match status.rows().await {
        Ok(rows) => json(last.insert((Instant::now(), rows)).1.clone()),
        Err(why) => unavailable(&why),
    }
}

impl Status {
    /// Counts the views for `/metrics`. A pass that a hung container delays goes on, and the last
    /// numbers stay until it has finished.
    async fn count_views(self: &Arc<Self>) {
        let Ok(mut next_count) = self.next_count.clone().try_lock_owned() else { return };
        let started = Instant::now();
        if next_count.is_some_and(|at| started < at) {
            return;
        }
        let status = self.clone();
        let pass = tokio::spawn(async move {
            let mut all_current = false;
            if let Ok(worst) = node::worst_states(&status.workers, status.at_path().await).await {
                let count =
                    |state| worst.iter().filter(|worst| metric_state(**worst) == state).count();
                status.app.metrics.set_views(count);
                all_current = count(metrics::ViewState::Current) == worst.len();
            }
            *next_count = Some(started + views_ttl(started.elapsed(), all_current));
        });
        let _ = tokio::time::timeout(METRICS_TIMEOUT, pass).await;
    }

    async fn rows(&self) -> Result<Bytes, String> {
        let pods = match &self.app.cri {
            Some(cri) => sources::cri::list_pods_or_none(cri).await,
            None => Vec::new(),
        };
        let views = self.views(pods).await?;
        let Snapshot { containers, .. } = self.app.snapshot().await.ok_or(STUCK)?;
        let rows = serde_json::to_vec(&rows(views, containers));
        rows.map(Bytes::from).map_err(|e| e.to_string())
    }

    /// The views of the node.
    async fn views(&self, pods: Vec<Pod>) -> Result<Vec<ViewStatus>, String> {
        let views = node::status(&self.workers, self.at_path().await, pods).await;
        views.map_err(|e| format!("failed to scan /proc: {e}"))
    }

    /// The lxcfs at the lxcfs path, and the state of its views.
    async fn at_path(&self) -> Option<(Dev, node::ViewState)> {
        let finder = &self.app.finder;
        let found = finder.find(&self.workers).await;
        node::state_at_path(finder.path(), found.as_deref())
    }
}

/// How long the count of the views is kept that took `elapsed`. Those that are not current will
/// soon be, and an alert must not see them for longer.
fn views_ttl(elapsed: Duration, all_current: bool) -> Duration {
    if !all_current {
        return VIEWS_TTL;
    }
    elapsed.saturating_mul(VIEWS_SHARE).clamp(VIEWS_TTL, VIEWS_LONG_TTL)
}

fn metric_state(state: node::ViewState) -> metrics::ViewState {
    match state {
        node::ViewState::Current => metrics::ViewState::Current,
        node::ViewState::Stale => metrics::ViewState::Stale,
        node::ViewState::Dead => metrics::ViewState::Dead,
    }
}

/// A container with a view, or for which one is desired.
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

/// Joins the views with the desired ones, and adds the containers whose desired view is missing.
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

fn json(body: Bytes) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

fn unavailable(why: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn views_are_counted_less_often_where_that_takes_long() {
        let ttl = |millis| views_ttl(Duration::from_millis(millis), true).as_millis();
        assert_eq!(
            [0, 18, 19, 100, 200, 5_000].map(ttl),
            [15_000, 15_000, 15_200, 80_000, 120_000, 120_000]
        );
        assert_eq!(views_ttl(Duration::from_secs(5), false), VIEWS_TTL);
    }

    #[test]
    fn any_address_falls_back_without_ipv6() {
        let none = io::Error::from_raw_os_error(libc::EAFNOSUPPORT);
        let used = io::Error::from_raw_os_error(libc::EADDRINUSE);
        for (address, error, expected) in [
            ("[::]:9808", &none, Some("0.0.0.0:9808")),
            ("[::]:9808", &used, None),
            ("[::1]:9808", &none, None),
            ("0.0.0.0:9808", &none, None),
        ] {
            let expected = expected.map(|text| text.parse().unwrap());
            assert_eq!(without_ipv6(address.parse().unwrap(), error), expected, "{address}");
        }
    }
}
