//! Pods whose owners try to harm the node's log, the API server or the agent, or whose containers
//! start or nest at an inconvenient moment.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use kube_lxcfs::sources::nri::ttrpc::{self, Frame, Message, MessageType};
use nix::fcntl::{Flock, FlockArg};
use prost::Message as _;
use serde_json::json;

use crate::harness::*;

/// An agent of the API server's pods, without lxcfs and without a runtime.
fn api_server_args(pods: &Pods, dir: &std::path::Path) -> (Vec<String>, String) {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let cri = format!("unix://{}", path("no-cri"));
    let args = ["--node-name", "n1", "--cri-endpoint", &cri, "--lxcfs-path", &path("no-lxcfs")];
    (args.map(str::to_owned).to_vec(), pods.kubeconfig().to_str().unwrap().to_owned())
}

#[test]
fn start_after_the_first_list_has_its_view() {
    isolated(|| {
        let (lxcfs, containerd) = (Lxcfs::start(), Containerd::start());
        let cri = containerd.endpoint();
        let args = ["--pods-from", "cri", "--lxcfs-path", lxcfs.path(), "--cri-endpoint", &cri];
        // No event reports the start: the subscription is not live yet.
        let agent =
            agent(containerd.dir.path(), &[&args[..], &["--cri-events", "off"]].concat(), &[]);
        ready(&agent);
        let pod =
            containerd.run(&PodSpec { name: "p", annotations: &[INJECT], containers: &["a"] });
        has_views("the container", containerd.pid(&pod.containers["a"]), ALWAYS.len());
    });
}

#[test]
fn hostile_annotation_forges_no_log_line() {
    isolated(|| {
        let (pods, dir) = (Pods::start(), tempfile::tempdir().unwrap());
        let (args, kubeconfig) = api_server_args(&pods, dir.path());
        let mut command = kube_lxcfs();
        command.args(["agent", "--listen", "127.0.0.1:0"]).args(&args);
        command.env("KUBECONFIG", kubeconfig).env("RUST_LOG", "kube_lxcfs=trace");
        let agent = Running::start(&mut command, &dir.path().join("text.log"));
        let forged = "2026-01-01T00:00:00.000000Z  INFO kube_lxcfs: forged";
        let value = format!("x'\n{forged}\r\u{1b}[2J");
        pods.create("p", json!({"kube-lxcfs.io/inject": "true", "kube-lxcfs.io/files": value}));
        pods.reasons("p", &["LxcfsInvalidAnnotation"]);
        let log = agent.log();
        assert!(log.contains(forged), "{log}");
        assert!(!log.lines().any(|line| line.starts_with(forged)), "{log}");
        assert!(!log.contains(|c: char| c.is_control() && c != '\n'), "{log}");
        let (_, note) = &pods.events("p")[0];
        assert!(!note.contains(char::is_control), "{note}");
    });
}

#[test]
fn annotation_edits_create_few_events() {
    isolated(|| {
        let (pods, dir) = (Pods::start(), tempfile::tempdir().unwrap());
        let (args, kubeconfig) = api_server_args(&pods, dir.path());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let agent = agent(dir.path(), &args, &[("KUBECONFIG", &kubeconfig)]);
        pods.create("p", json!({"kube-lxcfs.io/inject": "true"}));
        pods.create("other", json!({"kube-lxcfs.io/inject": "maybe"}));
        pods.reasons("other", &["LxcfsInvalidAnnotation"]);
        let started = Instant::now();
        for n in 0..60 {
            pods.annotate("p", json!({"kube-lxcfs.io/files": format!("file-{n}")}));
        }
        // Ten, and one more each minute.
        let admitted = || 10 + usize::try_from(started.elapsed().as_secs() / 60).unwrap();
        eventually_true("the first events are published", || pods.events("p").len() >= 10);
        eventually_true("all edits are followed", || {
            let suppressed = metric(&agent, "events_suppressed_total");
            suppressed >= f64::from(u32::try_from(60 - admitted()).unwrap())
        });
        let events = pods.events("p").len();
        assert!(events <= admitted(), "{events} events");
        let warnings = agent.logged(&[("pod", "default/p"), ("level", "WARN")]);
        assert!(warnings <= 2 * admitted(), "{warnings} lines: {}", agent.log());
        // The limit is per pod.
        pods.annotate("other", json!({"kube-lxcfs.io/inject": "perhaps"}));
        pods.reasons("other", &["LxcfsInvalidAnnotation", "LxcfsInvalidAnnotation"]);
    });
}

#[test]
fn short_absence_of_lxcfs_creates_no_warning() {
    isolated(|| {
        let (lxcfs, containerd, pods) = (Lxcfs::start(), Containerd::start(), Pods::start());
        let pod = containerd.run(&PodSpec { name: "p", annotations: &[], containers: &["app"] });
        pods.run("p", &pod.containers["app"], json!({"kube-lxcfs.io/inject": "true"}));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lxcfs");
        std::fs::create_dir(&path).unwrap();
        let (cri, kubeconfig) = (containerd.endpoint(), pods.kubeconfig());
        let (path_arg, kubeconfig) = (path.to_str().unwrap(), kubeconfig.to_str().unwrap());
        let args = ["--node-name", "n1", "--cri-endpoint", &cri, "--lxcfs-path", path_arg];
        let agent = agent(dir.path(), &args, &[("KUBECONFIG", kubeconfig)]);
        eventually_true("the outage is logged", || {
            agent.logged(&[("subject", "lxcfs"), ("outage", "started")]) == 1
        });
        // As long as a slow restart.
        std::thread::sleep(Duration::from_secs(5));
        nix::mount::mount(
            Some(&lxcfs.path),
            &path,
            None::<&str>,
            nix::mount::MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
        let reported = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            has_views("the container", containerd.pid(&pod.containers["app"]), ALWAYS.len());
            pods.reasons("p", &["LxcfsInjected"]);
        }));
        unmount(&path);
        reported.unwrap();
    });
}

/// The kernel's rule that containers inside containers meet.
#[test]
fn view_prevents_procfs_of_a_nested_namespace() {
    isolated(|| {
        let (lxcfs, bare) = (Lxcfs::start(), Bare::start());
        let pid = bare.pid.to_string();
        let nested = || {
            let mut nested = program("nsenter");
            nested.args(["--target", &pid, "--mount", "--pid", "unshare", "--user"]);
            nested.args(["--map-root-user", "--pid", "--fork", "--mount-proc", "true"]);
            nested.output().unwrap()
        };
        let before = nested();
        assert!(before.status.success(), "{}", stderr(&before));
        succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        let with_view = nested();
        assert!(stderr(&with_view).contains("not permitted"), "{}", stderr(&with_view));
        succeeds(&["umount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        assert!(nested().status.success());
    });
}

/// The runtime's side of an NRI session with the agent.
struct NriRuntime {
    stream: UnixStream,
    raw: BytesMut,
}

impl NriRuntime {
    /// Registers the agent, with a request timeout in ms.
    fn accept(listener: &UnixListener, request_timeout: i64) -> NriRuntime {
        let (stream, _) = listener.accept().unwrap();
        let mut runtime = NriRuntime { stream, raw: BytesMut::new() };
        let register = runtime.receive();
        let accepted =
            Message { message_type: MessageType::Response, payload: Bytes::new(), ..register };
        runtime.send(ttrpc::RUNTIME, &accepted);
        let configure =
            ttrpc::ConfigureRequest { request_timeout, ..ttrpc::ConfigureRequest::default() };
        runtime.call("Configure", &configure);
        runtime
    }

    fn send(&mut self, connection: u32, message: &Message) {
        let mut out = BytesMut::new();
        message.frame(connection).encode(&mut out);
        self.stream.write_all(&out).unwrap();
    }

    fn receive(&mut self) -> Message {
        loop {
            if let Some(frame) = Frame::decode(&mut self.raw).unwrap() {
                return Message::decode(&mut BytesMut::from(&frame.payload[..])).unwrap().unwrap();
            }
            let mut piece = [0; 4096];
            let read = self.stream.read(&mut piece).unwrap();
            assert_ne!(read, 0, "the agent closed the session");
            self.raw.extend_from_slice(&piece[..read]);
        }
    }

    /// Calls the agent, and returns the time until its reply.
    fn call(&mut self, method: &str, payload: &impl prost::Message) -> Duration {
        let request = ttrpc::Request {
            service: "nri.pkg.api.v1alpha1.Plugin".into(),
            method: method.into(),
            payload: payload.encode_to_vec().into(),
        };
        let payload = request.encode_to_vec().into();
        let started = Instant::now();
        let call = Message { stream: 2, message_type: MessageType::Request, payload };
        self.send(ttrpc::PLUGIN, &call);
        assert_eq!(self.receive().message_type, MessageType::Response);
        started.elapsed()
    }
}

#[test]
fn late_start_names_its_pod_in_log_event_and_metric() {
    isolated(|| {
        let (lxcfs, dir) = (Lxcfs::start(), tempfile::tempdir().unwrap());
        let container = Reader::start(Duration::from_millis(50));
        let socket = dir.path().join("nri.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let cri = format!("unix://{}", dir.path().join("no-cri").display());
        let socket = socket.to_str().unwrap();
        let args = ["--pods-from", "cri", "--pid-from", "proc", "--cri-endpoint", &cri];
        let more = ["--nri-socket", socket, "--lxcfs-path", lxcfs.path()];
        let agent = agent(dir.path(), &[&args[..], &more].concat(), &[]);
        let mut runtime = NriRuntime::accept(&listener, 200);
        // The agent stops its work on the container for longer than half of the timeout.
        let lock = File::open(format!("/proc/{}/ns/mnt", container.pid())).unwrap();
        let lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
        let release = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            drop(lock);
        });
        let annotations = [(INJECT.0.to_owned(), INJECT.1.to_owned())].into();
        let pod = ttrpc::PodSandbox {
            id: "sandbox".into(),
            uid: "u".into(),
            namespace: "shop".into(),
            name: "web".into(),
            annotations,
            ..Default::default()
        };
        let app = ttrpc::Container {
            id: container.id.clone(),
            name: "app".into(),
            pid: u32::try_from(container.pid()).unwrap(),
            ..Default::default()
        };
        let start =
            ttrpc::ContainerRequest { pod: Some(pod.encode_to_vec().into()), container: Some(app) };
        let elapsed = runtime.call("StartContainer", &start);
        assert!(elapsed >= Duration::from_millis(100), "{elapsed:?}");
        release.join().unwrap();
        has_views("the container", container.pid(), ALWAYS.len());
        let warned = agent.logged(&[("pod", "shop/web"), ("container", "app"), ("level", "WARN")]);
        assert_eq!(warned, 1, "{}", agent.log());
        eventually_true("the owner gets an Event", || {
            agent.logged(&[("pod", "shop/web"), ("reason", "LxcfsInjectFailed")]) == 1
        });
        assert!(agent.log().contains("app: started before its view"), "{}", agent.log());
        assert!(metric(&agent, "late_starts_total") >= 1.0);
    });
}
