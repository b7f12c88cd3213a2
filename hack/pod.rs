//! A very small `crictl` for the demo and the virtual machines: runs, enters and removes pods over
//! CRI.
//!
//!     pod SOCKET ready                          succeeds if the runtime responds
//!     pod SOCKET run NAME [OPTION]... [KEY=VALUE annotation]... [-- COMMAND...]
//!                                               prints the sandbox's and the container's id
//!     pod SOCKET exec CONTAINER COMMAND...
//!     pod SOCKET rm SANDBOX                     removes a pod
//!     pod SOCKET clear                          removes every pod of this runtime
//!
//! The options of `run`, each with a value:
//!
//!     --cgroup PARENT                           of the pod's cgroup
//!     --memory MIB, --cpu PERCENT               0: no limit
//!     --volume HOST:CONTAINER                   a bind mount
//!     --handler NAME                            of a runtime
//!     --network pod, --pid pod|node, --users pod    namespaces; the default of the network is node
//!     --read-only-root true, --privileged true, --proc-mount Unmasked
//!     --apparmor NAME                           a profile of the node

use std::{collections::HashMap, io::Write, process::ExitCode};

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::{self as cri, runtime_service_client::RuntimeServiceClient};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

const IMAGE: &str = "localhost/kube-lxcfs/busybox:1";
const CPU_PERIOD_US: i64 = 100_000;
/// What the kubelet masks with `procMount: Default`, in part.
const MASKED: [&str; 3] = ["/proc/kcore", "/proc/keys", "/sys/firmware"];

type Client = RuntimeServiceClient<Channel>;

/// What `run` runs.
struct Pod {
    name: String,
    annotations: HashMap<String, String>,
    command: Vec<String>,
    cgroup: String,
    handler: String,
    memory_mib: i64,
    cpu_percent: i64,
    mounts: Vec<cri::Mount>,
    namespaces: cri::NamespaceOption,
    security: cri::LinuxContainerSecurityContext,
}

impl Pod {
    fn parse(name: &str, args: &[&str]) -> Result<Pod> {
        let mut pod = Pod {
            name: name.into(),
            annotations: HashMap::new(),
            command: vec!["sleep".into(), "86400".into()],
            cgroup: "/kube-lxcfs-demo".into(),
            handler: String::new(),
            memory_mib: 128,
            cpu_percent: 50,
            mounts: Vec::new(),
            namespaces: cri::NamespaceOption {
                network: cri::NamespaceMode::Node as i32,
                pid: cri::NamespaceMode::Container as i32,
                ..Default::default()
            },
            security: cri::LinuxContainerSecurityContext {
                masked_paths: MASKED.map(str::to_owned).to_vec(),
                ..Default::default()
            },
        };
        let mut args = args.iter().copied();
        while let Some(arg) = args.next() {
            if arg == "--" {
                pod.command = args.map(str::to_owned).collect();
                break;
            }
            if let Some((key, value)) = arg.split_once('=') {
                pod.annotations.insert(key.into(), value.into());
                continue;
            }
            let value = args.next().with_context(|| format!("{arg} has no value"))?;
            pod.set(arg, value)?;
        }
        Ok(pod)
    }

    fn set(&mut self, option: &str, value: &str) -> Result<()> {
        use cri::NamespaceMode::{Node, Pod};
        match (option, value) {
            ("--cgroup", _) => self.cgroup = value.into(),
            ("--handler", _) => self.handler = value.into(),
            ("--memory", _) => self.memory_mib = value.parse()?,
            ("--cpu", _) => self.cpu_percent = value.parse()?,
            ("--volume", _) => {
                let (host, container) = value.split_once(':').context("HOST:CONTAINER")?;
                self.mounts.push(cri::Mount {
                    host_path: host.into(),
                    container_path: container.into(),
                    ..Default::default()
                });
            }
            ("--network", "pod") => self.namespaces.network = Pod as i32,
            ("--pid", "pod") => self.namespaces.pid = Pod as i32,
            ("--pid", "node") => self.namespaces.pid = Node as i32,
            ("--users", "pod") => {
                let range = cri::IdMapping { host_id: 1 << 20, container_id: 0, length: 1 << 16 };
                self.namespaces.userns_options = Some(cri::UserNamespace {
                    mode: Pod as i32,
                    uids: vec![range],
                    gids: vec![range],
                });
            }
            ("--read-only-root", "true") => self.security.readonly_rootfs = true,
            ("--privileged", "true") => self.security.privileged = true,
            ("--proc-mount", "Unmasked") => self.security.masked_paths.clear(),
            ("--apparmor", _) => {
                self.security.apparmor = Some(cri::SecurityProfile {
                    profile_type: cri::security_profile::ProfileType::Localhost as i32,
                    localhost_ref: value.into(),
                });
            }
            _ => bail!("unknown option {option} {value}"),
        }
        Ok(())
    }
}
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let [socket, command @ ..] = args.as_slice() else {
        bail!("usage: pod SOCKET ready|run|exec|rm|clear …")
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
        ["run", name, args @ ..] => Box::pin(run(client, Pod::parse(name, args)?)).await,
        ["exec", id, command @ ..] => exec(client, id, command).await,
        ["rm", sandbox] => remove(client, sandbox).await,
        ["clear"] => clear(client).await,
        _ => bail!(
            "usage: pod SOCKET ready | run NAME [OPTION]… [KEY=VALUE]… [-- COMMAND…] \
             | exec CONTAINER COMMAND… | rm SANDBOX | clear"
        ),
    }
}

async fn ready(mut client: Client) -> Result<ExitCode> {
    client.version(cri::VersionRequest::default()).await.context("the runtime does not respond")?;
    Ok(ExitCode::SUCCESS)
}

async fn run(mut client: Client, pod: Pod) -> Result<ExitCode> {
    let metadata = cri::PodSandboxMetadata {
        name: pod.name.clone(),
        uid: pod.name,
        namespace: "demo".into(),
        attempt: 0,
    };
    let security = cri::LinuxSandboxSecurityContext {
        namespace_options: Some(pod.namespaces.clone()),
        privileged: pod.security.privileged,
        ..Default::default()
    };
    let sandbox_config = cri::PodSandboxConfig {
        metadata: Some(metadata),
        annotations: pod.annotations,
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: pod.cgroup,
            security_context: Some(security),
            ..Default::default()
        }),
        ..Default::default()
    };
    let request = cri::RunPodSandboxRequest {
        config: Some(sandbox_config.clone()),
        runtime_handler: pod.handler,
    };
    let pod_sandbox_id = client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    let resources = cri::LinuxContainerResources {
        memory_limit_in_bytes: pod.memory_mib << 20,
        cpu_quota: pod.cpu_percent * CPU_PERIOD_US / 100,
        cpu_period: CPU_PERIOD_US,
        ..Default::default()
    };
    let security = cri::LinuxContainerSecurityContext {
        namespace_options: Some(pod.namespaces),
        ..pod.security
    };
    let config = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: "app".into(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: IMAGE.into(), ..Default::default() }),
        command: pod.command,
        mounts: pod.mounts,
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

async fn exec(mut client: Client, id: &str, command: &[&str]) -> Result<ExitCode> {
    let cmd = command.iter().map(|s| (*s).to_owned()).collect();
    let request = cri::ExecSyncRequest { container_id: id.into(), cmd, timeout: 60 };
    let done = client.exec_sync(request).await?.into_inner();
    std::io::stdout().write_all(&done.stdout)?;
    std::io::stderr().write_all(&done.stderr)?;
    Ok(ExitCode::from(u8::try_from(done.exit_code).unwrap_or(1)))
}

async fn remove(mut client: Client, sandbox: &str) -> Result<ExitCode> {
    let pod_sandbox_id = sandbox.to_owned();
    client
        .stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() })
        .await?;
    client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id }).await?;
    Ok(ExitCode::SUCCESS)
}

async fn clear(mut client: Client) -> Result<ExitCode> {
    for sandbox in
        client.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await?.into_inner().items
    {
        remove(client.clone(), &sandbox.id).await?;
    }
    Ok(ExitCode::SUCCESS)
}
