//! `kube-lxcfs lxcfs`: runs the supervisor.

use std::{convert::Infallible, net::SocketAddr, process::ExitCode, sync::Arc};

use anyhow::Result;

use super::{check, raise_descriptor_limit, unsupported};
use crate::{
    admin,
    args::{Common, LxcfsArgs},
    supervisor::Supervisor,
    sys::syscalls::{self, Purpose},
    telemetry::metrics::supervisor::SupervisorMetrics,
};

pub(super) async fn run(
    common: Common,
    LxcfsArgs { lxcfs_bin, watchdog, listen, args }: LxcfsArgs,
) -> Result<ExitCode> {
    raise_descriptor_limit();
    check::require_capabilities()?;
    if let Err(missing) = syscalls::verify_syscalls(Purpose::Mount) {
        return unsupported::run_supervisor(missing).await;
    }
    let path = std::path::absolute(&common.lxcfs_path)?;
    let metrics = Arc::new(SupervisorMetrics::default());
    let serve = serve(listen, metrics.clone());
    let supervisor = Supervisor { path, bin: lxcfs_bin, args, watchdog, metrics };
    tokio::select! {
        stopped = supervisor.run() => stopped?,
        never = serve => match never {},
    }
    Ok(ExitCode::SUCCESS)
}

/// Serves the metrics. A failure is logged only: the containers' views are worth more.
async fn serve(listen: Option<SocketAddr>, metrics: Arc<SupervisorMetrics>) -> Infallible {
    if let Some(address) = listen {
        let served = match admin::listen(address).await {
            Ok(listener) => {
                let address = listener.local_addr().unwrap_or(address);
                tracing::info!(http_address = %address, "serving HTTP");
                admin::serve_supervisor(listener, metrics).await
            }
            Err(e) => Err(e),
        };
        if let Err(cause) = served {
            tracing::warn!(%cause, %address, "failed to serve metrics; set --listen");
        }
    }
    std::future::pending().await
}
