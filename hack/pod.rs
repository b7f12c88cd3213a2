//! A very small `crictl` for the demo: runs, enters and removes pods over CRI, on the host's
//! network.
//!
//!     pod SOCKET ready                                succeeds if the runtime responds
//!     pod SOCKET run NAME [KEY=VALUE annotation]...   prints the sandbox's and the container's id
//!     pod SOCKET exec CONTAINER COMMAND...
//!     pod SOCKET clear                                removes every pod of this runtime

use std::{collections::HashMap, io::Write, process::ExitCode};

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::{self as cri, runtime_service_client::RuntimeServiceClient};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

const IMAGE: &str = "localhost/kube-lxcfs/busybox:1";
/// 128 MiB and half a CPU.
const MEMORY_BYTES: i64 = 128 << 20;
const CPU_QUOTA_US: i64 = 50_000;
const CPU_PERIOD_US: i64 = 100_000;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let [socket, command @ ..] = args.as_slice() else {
        bail!("usage: pod SOCKET ready|run|exec|clear …")
    };
    let socket = (*socket).to_owned();
    let dial = move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    };
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector_lazy(tower::service_fn(dial));
    let client = RuntimeServiceClient::new(channel);
    match command {
        ["ready"] => ready(client).await,
        ["run", name, annotations @ ..] => Box::pin(run(client, name, annotations)).await,
        ["exec", id, command @ ..] => exec(client, id, command).await,
        ["clear"] => clear(client).await,
        _ => bail!(
            "usage: pod SOCKET ready | run NAME [KEY=VALUE]… | exec CONTAINER COMMAND… | clear"
        ),
    }
}

async fn ready(mut client: RuntimeServiceClient<Channel>) -> Result<ExitCode> {
    client.version(cri::VersionRequest::default()).await.context("the runtime does not respond")?;
    Ok(ExitCode::SUCCESS)
}

async fn run(
    mut client: RuntimeServiceClient<Channel>,
    name: &str,
    annotations: &[&str],
) -> Result<ExitCode> {
    let annotations: HashMap<String, String> = annotations
        .iter()
        .filter_map(|a| a.split_once('='))
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
    let namespaces = cri::NamespaceOption {
        network: cri::NamespaceMode::Node as i32,
        pid: cri::NamespaceMode::Container as i32,
        ..Default::default()
    };
    let metadata = cri::PodSandboxMetadata {
        name: name.into(),
        uid: name.into(),
        namespace: "demo".into(),
        attempt: 0,
    };
    let security = cri::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces.clone()),
        ..Default::default()
    };
    let sandbox_config = cri::PodSandboxConfig {
        metadata: Some(metadata),
        annotations,
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: "/kube-lxcfs-demo".into(),
            security_context: Some(security),
            ..Default::default()
        }),
        ..Default::default()
    };
    let request = cri::RunPodSandboxRequest {
        config: Some(sandbox_config.clone()),
        runtime_handler: String::new(),
    };
    let pod_sandbox_id = client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    let resources = cri::LinuxContainerResources {
        memory_limit_in_bytes: MEMORY_BYTES,
        cpu_quota: CPU_QUOTA_US,
        cpu_period: CPU_PERIOD_US,
        ..Default::default()
    };
    let security = cri::LinuxContainerSecurityContext {
        namespace_options: Some(namespaces),
        ..Default::default()
    };
    let config = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: "app".into(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: IMAGE.into(), ..Default::default() }),
        command: vec!["sleep".into(), "86400".into()],
        linux: Some(cri::LinuxContainerConfig {
            resources: Some(resources),
            security_context: Some(security),
        }),
        ..Default::default()
    };
    let create = cri::CreateContainerRequest {
        pod_sandbox_id: pod_sandbox_id.clone(),
        config: Some(config),
        sandbox_config: Some(sandbox_config),
    };
    let container_id = client.create_container(create).await?.into_inner().container_id;
    client
        .start_container(cri::StartContainerRequest { container_id: container_id.clone() })
        .await?;
    println!("{pod_sandbox_id} {container_id}");
    Ok(ExitCode::SUCCESS)
}

async fn exec(
    mut client: RuntimeServiceClient<Channel>,
    id: &str,
    command: &[&str],
) -> Result<ExitCode> {
    let cmd = command.iter().map(|s| (*s).to_owned()).collect();
    let request = cri::ExecSyncRequest { container_id: id.into(), cmd, timeout: 60 };
    let done = client.exec_sync(request).await?.into_inner();
    std::io::stdout().write_all(&done.stdout)?;
    std::io::stderr().write_all(&done.stderr)?;
    Ok(ExitCode::from(u8::try_from(done.exit_code).unwrap_or(1)))
}

async fn clear(mut client: RuntimeServiceClient<Channel>) -> Result<ExitCode> {
    for sandbox in
        client.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await?.into_inner().items
    {
        let pod_sandbox_id = sandbox.id;
        client
            .stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() })
            .await?;
        client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id }).await?;
    }
    Ok(ExitCode::SUCCESS)
}
