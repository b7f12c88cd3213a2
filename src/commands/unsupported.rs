//! What the long-running commands do on a kernel that is too old: they report it, and touch
//! nothing. If they exited, their pods would crash again and again.

use std::{io, net::SocketAddr, process::ExitCode, sync::Arc};

use anyhow::{Context, Result};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use super::{DEADLINE, agent};
use crate::{
    admin::{self, AppState},
    args::{Common, SecureArgs},
    lxcfs::Finder,
    model::status::{Snapshot, SnapshotRequest},
    mount::Workers,
    sys::syscalls::MissingSyscalls,
    telemetry::metrics::Metrics,
};

/// Serves HTTP, never ready, until SIGTERM or SIGINT.
pub(super) async fn run_agent(
    missing: MissingSyscalls,
    common: Common,
    listen: SocketAddr,
    secure: SecureArgs,
) -> Result<ExitCode> {
    report(&missing);
    let (snapshots, mut requests) = mpsc::channel::<SnapshotRequest>(1);
    let reply = async {
        while let Some(request) = requests.recv().await {
            let not_ready_reason = Some(missing.to_string());
            let snapshot = Snapshot { not_ready_reason, lxcfs_up: false, containers: Vec::new() };
            let _ = request.send(snapshot);
        }
    };
    let metrics = Metrics::default();
    metrics.set_node_supported(false);
    let app = AppState {
        snapshots,
        metrics: Arc::new(metrics),
        workers: Workers::start(1, DEADLINE).context("failed to start a thread")?,
        finder: Finder::new(&common.lxcfs_path),
        cri: None,
    };
    let listener = admin::listen(listen).await.context("failed to listen; set --listen")?;
    tracing::info!(http_address = %listener.local_addr().unwrap_or(listen), "serving HTTP");
    let client = match secure.secure_listen {
        Some(_) => Some(agent::api_client().await?),
        None => None,
    };
    let secure = agent::listen_secure(secure, client).await?;
    tokio::select! {
        () = reply => {}
        served = admin::serve(listener, secure, app) => served.context("failed to serve HTTP")?,
        shutdown = shutdown() => shutdown?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits for SIGTERM or SIGINT. lxcfs does not run.
pub(super) async fn run_supervisor(missing: MissingSyscalls) -> Result<ExitCode> {
    report(&missing);
    shutdown().await?;
    Ok(ExitCode::SUCCESS)
}

fn report(missing: &MissingSyscalls) {
    tracing::error!(cause = %missing, "this node is not supported: nothing is mounted");
}

async fn shutdown() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
