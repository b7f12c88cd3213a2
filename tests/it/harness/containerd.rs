//! containerd, of three releases, with the tests' image in it; pods and containers over CRI.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::{
    self as cri, image_service_client::ImageServiceClient,
    runtime_service_client::RuntimeServiceClient,
};
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint, Uri};

use super::{
    Running, cache, eventually, program, remove_cgroup, send, stderr, test_cgroup, unmount,
};

pub(crate) const IMAGE: &str = "localhost/kube-lxcfs/busybox:1";
const CONFIG: &str = include_str!("../../../hack/containerd.toml");

/// A containerd with the image in it.
#[derive(Debug)]
pub(crate) struct Containerd {
    pub(crate) dir: TempDir,
    /// Where its programs are, when not this machine's own.
    root: Option<PathBuf>,
    process: Option<Running>,
    runtime: tokio::runtime::Runtime,
    channel: Channel,
    client: RuntimeServiceClient<Channel>,
    cgroup: String,
}

/// A pod to run: its annotations and its containers' names.
#[derive(Clone, Debug, Default)]
pub(crate) struct PodSpec<'a> {
    pub(crate) name: &'a str,
    pub(crate) annotations: &'a [(&'a str, &'a str)],
    pub(crate) containers: &'a [&'a str],
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub(crate) struct RunningPod {
    pub(crate) sandbox: String,
    config: cri::PodSandboxConfig,
    pub(crate) containers: BTreeMap<String, String>,
}

/// The memory limit of every test container, in MiB.
pub(crate) const MEMORY_MIB: u64 = 96;

/// Which containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Release {
    /// This machine's own: 1.6 on Debian 12.
    Own,
    /// Of Debian trixie: 1.7.
    Trixie,
    /// Of Debian sid: 2.
    Sid,
}

impl Containerd {
    pub(crate) fn start() -> Containerd {
        Containerd::of(Release::Own, false)
    }

    /// Of another release, with NRI on or off.
    pub(crate) fn of(release: Release, nri: bool) -> Containerd {
        let root = match release {
            Release::Own => None,
            Release::Trixie => Some(cache("debian/trixie")),
            Release::Sid => Some(cache("debian/sid")),
        };
        let dir = tempfile::Builder::new().prefix("kl").tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        // Far more than a plugin takes on a busy machine.
        let request_timeout = "10s";
        let mut config = CONFIG.to_owned();
        for (placeholder, value) in [
            ("@DIR@", dir.path().to_str().unwrap()),
            ("@IMAGE@", IMAGE),
            ("@CNI_BIN@", &at("cni")),
            ("@CNI_CONF@", &at("cni")),
            ("@NRI_DISABLED@", if nri { "false" } else { "true" }),
            ("@NRI_TIMEOUT@", request_timeout),
        ] {
            config = config.replace(placeholder, value);
        }
        fs::write(at("config.toml"), config).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let socket = dir.path().join("sock");
        let channel = runtime.block_on(async {
            let dial = move |_: Uri| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
            };
            Endpoint::from_static("http://localhost")
                .connect_with_connector_lazy(tower::service_fn(dial))
        });
        let client = RuntimeServiceClient::new(channel.clone());
        let name = dir.path().file_name().unwrap().to_str().unwrap();
        let cgroup = format!("{}/{name}", test_cgroup());
        let mut containerd =
            Containerd { dir, root, process: None, runtime, channel, client, cgroup };
        containerd.up();
        let image = cache("busybox-image-1.tar");
        let imported = containerd
            .program("ctr")
            .args(["-a", &at_dir(&containerd.dir, "sock"), "-n", "k8s.io", "images", "import"])
            .arg(image)
            .output()
            .unwrap();
        assert!(imported.status.success(), "{}", stderr(&imported));
        // CRI learns of it a moment later.
        let image = || Some(cri::ImageSpec { image: IMAGE.into(), ..Default::default() });
        eventually("CRI has the image", || {
            let mut images = ImageServiceClient::new(containerd.channel.clone());
            let request = cri::ImageStatusRequest { image: image(), verbose: false };
            let status = containerd
                .runtime
                .block_on(images.image_status(request))
                .map_err(|e| e.to_string())?;
            status.into_inner().image.ok_or_else(|| "not yet".to_owned())
        });
        containerd
    }

    /// Starts the daemon (again).
    pub(crate) fn up(&mut self) {
        let mut command = self.program("containerd");
        command.arg("--config").arg(self.dir.path().join("config.toml"));
        let process = Running::start(&mut command, &self.dir.path().join("containerd.log"));
        let client = self.client.clone();
        eventually("containerd responds", || {
            let answer =
                self.runtime.block_on(client.clone().version(cri::VersionRequest::default()));
            answer.map_err(|e| format!("{e}: {}", process.log()))
        });
        self.process = Some(process);
    }

    /// Stops the daemon. Containers keep running.
    pub(crate) fn down(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.terminate();
        }
    }

    /// One of its programs.
    fn program(&self, name: &str) -> Command {
        let Some(root) = &self.root else { return program(name) };
        let bin = root.join("usr/bin");
        let mut command = Command::new(bin.join(name));
        // Its shim before this machine's own.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}:/usr/sbin:/sbin", bin.display()));
        command
    }

    pub(crate) fn nri_socket(&self) -> String {
        at_dir(&self.dir, "nri.sock")
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("unix://{}", at_dir(&self.dir, "sock"))
    }

    fn call<T>(
        &self,
        call: impl AsyncFnOnce(
            RuntimeServiceClient<Channel>,
        ) -> Result<tonic::Response<T>, tonic::Status>,
    ) -> T {
        self.runtime.block_on(call(self.client.clone())).unwrap().into_inner()
    }

    /// Runs a pod on the host's network: no CNI is needed.
    pub(crate) fn run(&self, spec: &PodSpec<'_>) -> RunningPod {
        self.run_with_uid(spec, &format!("uid-{}", spec.name))
    }

    /// The same, as the pod of the API server that has this uid.
    pub(crate) fn run_with_uid(&self, spec: &PodSpec<'_>, uid: &str) -> RunningPod {
        let mut annotations: HashMap<String, String> = HashMap::new();
        annotations
            .extend(spec.annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        let namespaces = namespaces();
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: spec.name.into(),
                uid: uid.into(),
                namespace: "default".into(),
                attempt: 0,
            }),
            annotations,
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup.clone(),
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let sandbox = self.call(async |mut c| c.run_pod_sandbox(request).await).pod_sandbox_id;
        let mut pod = RunningPod { sandbox, config, containers: BTreeMap::new() };
        for name in spec.containers {
            self.start_container(&mut pod, name, 0);
        }
        pod
    }

    /// Creates and starts a container; its id replaces that of an earlier attempt.
    pub(crate) fn start_container(&self, pod: &mut RunningPod, name: &str, attempt: u32) {
        self.start_with(pod, name, attempt, vec!["sleep".into(), "3600".into()], Vec::new());
    }

    /// Runs a shell script in a container of a pod that is there; returns the time that its start
    /// took, and the file that has the whole output once it has exited.
    pub(crate) fn start_script(
        &self,
        pod: &mut RunningPod,
        name: &str,
        script: &str,
    ) -> (Duration, PathBuf) {
        let out = self.dir.path().join(format!("out-{}", pod.sandbox));
        fs::create_dir_all(&out).unwrap();
        let mount = cri::Mount {
            container_path: "/out".into(),
            host_path: out.to_str().unwrap().into(),
            ..Default::default()
        };
        let script = format!(
            "{{ {script}; }} >/out/{name}.new 2>&1; mv /out/{name}.new /out/{name}; exec sleep 3600"
        );
        let command = ["sh", "-c", &script].map(str::to_owned).to_vec();
        (self.start_with(pod, name, 0, command, vec![mount]), out.join(name))
    }

    /// Creates and starts a container with this command and these mounts. Returns the time that
    /// the start took.
    pub(crate) fn start_with(
        &self,
        pod: &mut RunningPod,
        name: &str,
        attempt: u32,
        command: Vec<String>,
        mounts: Vec<cri::Mount>,
    ) -> Duration {
        let namespaces = namespaces();
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: name.into(), attempt }),
            image: Some(cri::ImageSpec { image: IMAGE.into(), ..Default::default() }),
            command,
            mounts,
            linux: Some(cri::LinuxContainerConfig {
                resources: Some(cri::LinuxContainerResources {
                    memory_limit_in_bytes: i64::try_from(MEMORY_MIB << 20).unwrap(),
                    cpu_period: 100_000,
                    cpu_quota: 50_000,
                    ..Default::default()
                }),
                security_context: Some(cri::LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        let create = cri::CreateContainerRequest {
            pod_sandbox_id: pod.sandbox.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let id = self.call(async |mut c| c.create_container(create).await).container_id;
        let start = cri::StartContainerRequest { container_id: id.clone() };
        let begun = Instant::now();
        self.call(async |mut c| c.start_container(start).await);
        let took = begun.elapsed();
        pod.containers.insert(name.to_owned(), id);
        took
    }

    pub(crate) fn stop_container(&self, id: &str) {
        let stop = cri::StopContainerRequest { container_id: id.into(), timeout: 0 };
        self.call(async |mut c| c.stop_container(stop).await);
        let remove = cri::RemoveContainerRequest { container_id: id.into() };
        self.call(async |mut c| c.remove_container(remove).await);
    }

    /// Stops and removes a pod.
    pub(crate) fn remove(&self, pod: &RunningPod) {
        let id = &pod.sandbox;
        self.call(async |mut c| {
            c.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() }).await
        });
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.clone() };
        self.call(async |mut c| c.remove_pod_sandbox(request).await);
    }

    /// Runs a command in a container.
    pub(crate) fn exec(&self, id: &str, cmd: &[&str]) -> String {
        let request = cri::ExecSyncRequest {
            container_id: id.into(),
            cmd: cmd.iter().map(|s| (*s).to_owned()).collect(),
            timeout: 10,
        };
        let done = self.call(async |mut c| c.exec_sync(request).await);
        String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned()
    }

    /// The pid of a container's first process.
    pub(crate) fn pid(&self, id: &str) -> i32 {
        let request = cri::ContainerStatusRequest { container_id: id.into(), verbose: true };
        let info = self.call(async |mut c| c.container_status(request).await).info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        i32::try_from(info["pid"].as_i64().unwrap()).unwrap()
    }

    pub(crate) fn mem_total_kib(&self, id: &str) -> u64 {
        let meminfo = self.exec(id, &["cat", "/proc/meminfo"]);
        let line = meminfo
            .lines()
            .find(|l| l.starts_with("MemTotal:"))
            .unwrap_or_else(|| panic!("{meminfo}"));
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Whether the container sees its own memory limit.
    pub(crate) fn sees_its_own_memory(&self, id: &str) -> bool {
        self.mem_total_kib(id) == MEMORY_MIB << 10
    }
}

/// The host's network, and a pid namespace for each container, as is the kubelet's default.
fn namespaces() -> cri::NamespaceOption {
    cri::NamespaceOption {
        network: cri::NamespaceMode::Node as i32,
        pid: cri::NamespaceMode::Container as i32,
        ..Default::default()
    }
}

fn at_dir(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_owned()
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Without the daemon no pod can be stopped over CRI. What is left is killed by its
        // directory below.
        let mut client = self.client.clone();
        let end_in_order = async move {
            let Ok(list) = client.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await
            else {
                return;
            };
            for sandbox in list.into_inner().items {
                let id = sandbox.id;
                let _ = client
                    .stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() })
                    .await;
                let _ = client
                    .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id })
                    .await;
            }
        };
        let _ = self
            .runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(20), end_in_order).await });
        self.down();
        let dir = self.dir.path().to_str().unwrap().to_owned();
        remove_cgroup(&self.cgroup);
        for process in procfs::process::all_processes().into_iter().flatten().flatten() {
            if process.cmdline().is_ok_and(|args| args.iter().any(|arg| arg.starts_with(&dir))) {
                send(process.pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
        let points = || -> Vec<String> {
            let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            table
                .lines()
                .filter_map(|l| l.split(' ').nth(4))
                .filter(|p| p.starts_with(&dir))
                .map(str::to_owned)
                .collect()
        };
        for _ in 0..3 {
            points().iter().rev().for_each(|point| unmount(Path::new(point)));
        }
    }
}
