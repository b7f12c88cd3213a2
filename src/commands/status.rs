//! `kube-lxcfs status`: the views of this node.

use std::process::ExitCode;

use anyhow::{Context, Result};

use super::{
    output::{columns, print},
    workers,
};
use crate::{
    args::{Common, Output},
    lxcfs,
    node::{self, ViewStatus},
    runtime::{PidSource, cri::CriClient},
    sources,
    sys::syscalls::Purpose,
};

pub(super) async fn run(common: Common, output: Output) -> Result<ExitCode> {
    let workers = workers(None, Purpose::Remove)?;
    let found = lxcfs::find(&workers, &common.lxcfs_path).await;
    match &found {
        Ok(_) => {
            let lxcfs_version = lxcfs::version_at(&common.lxcfs_path);
            tracing::info!(lxcfs_version, "lxcfs serves");
        }
        Err(e) => tracing::warn!(cause = %e, "no lxcfs serves"),
    }
    let at_path = node::state_at_path(&common.lxcfs_path, found.as_deref());
    drop(found);
    let pods = if common.pid_from == PidSource::Proc {
        Vec::new()
    } else {
        let cri = CriClient::new(common.cri_endpoint, common.host_root);
        sources::cri::list_pods_or_none(&cri).await
    };
    let views = node::status(&workers, at_path, pods).await.context("failed to scan /proc")?;
    print(output, &views, || {
        let header = ["POD", "CONTAINER", "ID", "PID", "STATE", "FILES"].map(str::to_owned);
        columns(&std::iter::once(header).chain(views.iter().map(row)).collect::<Vec<_>>())
    })?;
    Ok(ExitCode::SUCCESS)
}

fn row(view: &ViewStatus) -> [String; 6] {
    let or_dash = |text: Option<&str>| text.unwrap_or("-").to_owned();
    let worst = view
        .files
        .values()
        .max()
        .map_or(String::new(), |state| format!("{state:?}").to_lowercase());
    let files: Vec<_> = view.files.keys().map(|file| file.name()).collect();
    let pod = match (&view.namespace, &view.pod) {
        (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
        _ => "-".to_owned(),
    };
    let id = or_dash(view.id.as_ref().map(|id| id.short()));
    [pod, or_dash(view.container.as_deref()), id, view.pid.to_string(), worst, files.join(",")]
}
