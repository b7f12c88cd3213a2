//! `kubectl lxcfs inject` and `eject`: set the annotations of a running pod.

use std::{io::Write, process::ExitCode};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1 as core;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};

use super::{Connection, agents::api_error};
use crate::{
    model::{
        pod::{CONTAINERS_KEY, FILES_KEY, INJECT_KEY},
        view::FileSet,
    },
    sources::kubernetes,
};

pub(super) async fn inject(
    connection: &Connection,
    pod: &str,
    files: Option<FileSet>,
    containers: &[String],
) -> Result<ExitCode> {
    let (api, object) = get(connection, pod).await?;
    let known = kubernetes::reduced(&object).context("failed to read the pod")?.containers;
    if let Some(unknown) = containers.iter().find(|name| known.iter().all(|c| c.name != **name)) {
        let names: Vec<&str> = known.iter().map(|c| c.name.as_str()).collect();
        bail!("pod {pod} has no container '{unknown}'; valid names: {}", names.join(", "));
    }
    let mut annotations = json!({INJECT_KEY: "true"});
    if let Some(files) = files {
        annotations[FILES_KEY] = files.to_string().into();
    }
    if !containers.is_empty() {
        annotations[CONTAINERS_KEY] = containers.join(",").into();
    }
    annotate(&api, pod, annotations).await?;
    report(&object, "opted in", "set the annotation in its template too, for its next pods")
}

pub(super) async fn eject(connection: &Connection, pod: &str, unset: bool) -> Result<ExitCode> {
    let (api, object) = get(connection, pod).await?;
    if unset {
        let none = Value::Null;
        annotate(&api, pod, json!({INJECT_KEY: none, FILES_KEY: none, CONTAINERS_KEY: none}))
            .await?;
        let hint = "its next pods have the annotations of its template";
        return report(&object, "has no annotations of kube-lxcfs", hint);
    }
    annotate(&api, pod, json!({INJECT_KEY: "false"})).await?;
    report(&object, "opted out", "change its template too, for its next pods")
}

async fn get(connection: &Connection, pod: &str) -> Result<(Api<core::Pod>, core::Pod)> {
    let api: Api<core::Pod> = Api::namespaced(connection.client.clone(), &connection.namespace);
    let object = api.get(pod).await.map_err(api_error)?;
    Ok((api, object))
}

async fn annotate(api: &Api<core::Pod>, pod: &str, annotations: Value) -> Result<()> {
    let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
    api.patch(pod, &PatchParams::default(), &patch).await.map_err(api_error)?;
    Ok(())
}

/// Prints what was changed, and a hint if a controller made the pod.
fn report(pod: &core::Pod, change: &str, hint: &str) -> Result<ExitCode> {
    let metadata = &pod.metadata;
    let name = metadata.name.as_deref().unwrap_or_default();
    let owners = metadata.owner_references.iter().flatten();
    let owner = owners.into_iter().find(|owner| owner.controller == Some(true));
    let owner =
        owner.map(|owner| format!("{} {} made this pod:\n  {hint}\n", owner.kind, owner.name));
    let text = format!("pod/{name} {change}\n{}", owner.unwrap_or_default());
    std::io::stdout().lock().write_all(text.as_bytes()).context("failed to write the output")?;
    Ok(ExitCode::SUCCESS)
}
