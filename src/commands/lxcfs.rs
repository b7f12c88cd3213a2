//! `kube-lxcfs lxcfs`: runs the supervisor.

use std::process::ExitCode;

use anyhow::Result;

use super::{check, raise_descriptor_limit, unsupported};
use crate::{
    args::{Common, LxcfsArgs},
    supervisor::Supervisor,
    sys::syscalls::{self, Purpose},
};

pub(super) async fn run(
    common: Common,
    LxcfsArgs { lxcfs_bin, watchdog, args }: LxcfsArgs,
) -> Result<ExitCode> {
    raise_descriptor_limit();
    check::require_capabilities()?;
    if let Err(missing) = syscalls::verify_syscalls(Purpose::Mount) {
        return unsupported::run_supervisor(missing).await;
    }
    let path = std::path::absolute(&common.lxcfs_path)?;
    Supervisor { path, bin: lxcfs_bin, args, watchdog }.run().await?;
    Ok(ExitCode::SUCCESS)
}
