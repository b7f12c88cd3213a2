//! The command line: flags in, one module called, text or JSON out. Decides nothing.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    io::{IsTerminal, Write},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use futures::{StreamExt, stream};
use serde::Serialize;
use tokio::{sync::mpsc, task::JoinSet};
use tracing_subscriber::EnvFilter;

use crate::{
    agent::{self, Agent, Inbox, state::State},
    check, hook, lxcfs,
    mount::{self, Outcome, Process, Source, Task, Workers},
    node,
    plan::{Step, Wish},
    pods,
    report::{events::Events, http, metrics::Metrics},
    runtime::{
        ContainerId, PidFrom, Runtime,
        cri::{Cri, CriEndpoint},
        nri::{self, Nri},
    },
    view::{FileSet, ViewFile},
};

/// Each visit to a container, and each question to lxcfs, is answered within this time or counts as hung.
const DEADLINE: Duration = Duration::from_secs(5);
/// `remount --all` waits so long for an lxcfs that is starting.
const SOON: Duration = Duration::from_secs(5);
/// So many updates may wait for the agent's loop.
const UPDATES: usize = 256;
/// So many containers are worked on side by side by a command.
const AT_ONCE: usize = 16;

/// Puts lxcfs's files into running Kubernetes containers, so that /proc/meminfo, /proc/cpuinfo and their like show the
/// container's own limits.
#[derive(Debug, Parser)]
#[command(name = "kube-lxcfs", version, propagate_version = true, max_term_width = 120)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Args)]
struct Common {
    /// Where lxcfs is mounted.
    #[arg(long, global = true, env = "KUBE_LXCFS_LXCFS_PATH", value_name = "DIR", default_value = "/var/lib/lxcfs")]
    lxcfs_path: PathBuf,
    /// The runtime's CRI socket [default: the first that answers of containerd, CRI-O, cri-dockerd, iSulad].
    #[arg(long, global = true, env = "KUBE_LXCFS_CRI_ENDPOINT", value_name = "unix://PATH")]
    cri_endpoint: Option<CriEndpoint>,
    /// Where the pids of containers are asked for.
    #[arg(long, global = true, env = "KUBE_LXCFS_PID_FROM", value_enum, default_value_t = PidFrom::Auto)]
    pid_from: PidFrom,
    /// How the log (on stderr) is written; RUST_LOG sets what is logged, as in RUST_LOG=kube_lxcfs=debug.
    #[arg(long, global = true, env = "KUBE_LXCFS_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PodsFrom {
    /// The API server.
    Kubernetes,
    /// The annotations of the runtime's pod sandboxes; no API server is needed.
    Cri,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum CriEvents {
    /// Where the runtime has them, and pids are asked for there.
    Auto,
    Off,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node agent: keeps the views of this node's pods as their annotations wish.
    Agent(AgentArgs),
    /// Run lxcfs as a child: restarted when it dies, killed when it hangs, and no container keeps a dead view of it.
    Lxcfs {
        /// The lxcfs program.
        #[arg(long, env = "KUBE_LXCFS_LXCFS_BIN", value_name = "FILE", default_value = "lxcfs")]
        lxcfs_bin: PathBuf,
        /// An lxcfs that gives no answer for so long is killed and started again, as in 5s or 800ms.
        #[arg(long, env = "KUBE_LXCFS_WATCHDOG", value_name = "TIME", default_value = "5s", value_parser = time)]
        watchdog: Duration,
        /// More arguments for lxcfs.
        #[arg(last = true, value_name = "ARGUMENT")]
        args: Vec<OsString>,
    },
    /// Put the view into a container (or some files of it); what it has already stays.
    Mount {
        #[command(flatten)]
        target: One,
        /// Comma-separated view files [default: all that lxcfs serves].
        #[arg(long, env = "KUBE_LXCFS_FILES", value_parser = FileSet::parse)]
        files: Option<FileSet>,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Take the view out of a container, or out of all.
    Umount {
        #[command(flatten)]
        target: OneOrAll,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Make a view current that comes from an earlier lxcfs; a container without a view is left alone.
    Remount {
        #[command(flatten)]
        target: OneOrAll,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show the views of this node: pod, container, pid, files, and whether they are current, stale or dead.
    Status {
        #[command(flatten)]
        output: OutputArg,
    },
    /// Be an OCI runtime hook (createRuntime or prestart), for runtimes without NRI: read the container's state on stdin and put the
    /// view in if its annotations want one. The container starts whatever happens: the exit status is always 0.
    Hook {
        /// Give a view to containers whose annotations say nothing.
        #[arg(long, env = "KUBE_LXCFS_INJECT_BY_DEFAULT")]
        inject_by_default: bool,
        /// Append the log to this file too: runtimes drop what a hook that succeeds writes on stderr.
        #[arg(long, env = "KUBE_LXCFS_LOG_FILE", value_name = "FILE")]
        log_file: Option<PathBuf>,
        /// Do it in this process, which hangs when lxcfs does.
        #[arg(long, hide = true)]
        here: bool,
    },
    /// Tell what this node has and lacks for kube-lxcfs, with the remedy; exit status 1 when something fails.
    Check {
        /// The runtime's NRI socket.
        #[arg(long, env = "KUBE_LXCFS_NRI_SOCKET", value_name = "PATH", default_value = nri::DEFAULT_SOCKET)]
        nri_socket: PathBuf,
        #[command(flatten)]
        output: OutputArg,
    },
}

#[derive(Clone, Copy, Debug, Args)]
struct OutputArg {
    /// For people or for programs.
    #[arg(short, long = "output", env = "KUBE_LXCFS_OUTPUT", value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Debug, Args)]
struct AgentArgs {
    /// The name of this node at the API server.
    #[arg(long, env = "NODE_NAME")]
    node_name: Option<String>,
    /// Who tells of the node's pods.
    #[arg(long, env = "KUBE_LXCFS_PODS_FROM", value_enum, default_value_t = PodsFrom::Kubernetes)]
    pods_from: PodsFrom,
    /// Whether views are put in before a container's first instruction, by the runtime's NRI.
    #[arg(long, env = "KUBE_LXCFS_NRI", value_enum, default_value_t = Nri::Auto)]
    nri: Nri,
    /// The runtime's NRI socket.
    #[arg(long, env = "KUBE_LXCFS_NRI_SOCKET", value_name = "PATH", default_value = nri::DEFAULT_SOCKET)]
    nri_socket: PathBuf,
    /// Whether the runtime's own events tell of starts. Off for containerd 1.7 with a kubelet that uses evented PLEG: it gives
    /// each event to one listener only.
    #[arg(long, env = "KUBE_LXCFS_CRI_EVENTS", value_enum, default_value_t = CriEvents::Auto)]
    cri_events: CriEvents,
    /// Where /healthz, /readyz, /metrics and /status are served.
    #[arg(long, env = "KUBE_LXCFS_LISTEN", value_name = "IP:PORT", default_value = "0.0.0.0:9808")]
    listen: SocketAddr,
    /// Give a view to pods that say nothing, in namespaces that say nothing.
    #[arg(long, env = "KUBE_LXCFS_INJECT_BY_DEFAULT")]
    inject_by_default: bool,
    /// Keep lxcfs files current too that came with a pod, as from an admission webhook's volumes.
    #[arg(long, env = "KUBE_LXCFS_ADOPT")]
    adopt: bool,
    /// Threads that mount [default: one per CPU, 4 at most].
    #[arg(long, env = "KUBE_LXCFS_WORKERS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: Option<u16>,
}

/// One container.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct One {
    /// A process of the container, by its pid on the host.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pid: Option<i64>,
    /// The container's id, or a prefix that only one running container has.
    #[arg(long, value_name = "ID")]
    container: Option<String>,
}

/// One container or all.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct OneOrAll {
    /// A process of the container, by its pid on the host.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pid: Option<i64>,
    /// The container's id, or a prefix that only one running container has.
    #[arg(long, value_name = "ID")]
    container: Option<String>,
    /// Every container of this node that has a view.
    #[arg(long)]
    all: bool,
}

/// Parses the arguments, runs the command, and tells an error in one line. See the contract for the exit status.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // A hook that fails keeps the container from starting.
        Err(e) if e.use_stderr() && is_hook(std::env::args_os()) => {
            let _ = e.print();
            return ExitCode::SUCCESS;
        }
        Err(e) => e.exit(),
    };
    log_to_stderr(cli.common.log_format);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let done = runtime.block_on(run(cli));
        // A thread that hangs must not keep the process.
        runtime.shutdown_background();
        done
    });
    match done {
        Ok(code) => code,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "error: {}", format!("{e:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

/// Whether the subcommand of a command line, which may be wrong otherwise, is `hook`.
fn is_hook(args: impl IntoIterator<Item = OsString>) -> bool {
    let lenient = Cli::command().ignore_errors(true).try_get_matches_from(args);
    lenient.is_ok_and(|matches| matches.subcommand_name() == Some("hook"))
}

/// The log filter where `RUST_LOG` sets none.
const DEFAULT_LOG_FILTER: &str = "info,kube_runtime=error,kube_client=error";

/// Starts the log on stderr. An invalid `RUST_LOG` is reported once, and the default filter is used.
fn log_to_stderr(format: LogFormat) {
    let (filter, invalid) = match std::env::var_os("RUST_LOG") {
        None => (EnvFilter::new(DEFAULT_LOG_FILTER), None),
        Some(value) if value.is_empty() => (EnvFilter::new(DEFAULT_LOG_FILTER), None),
        Some(value) => match value.to_str().map(EnvFilter::try_new) {
            Some(Ok(filter)) => (filter, None),
            Some(Err(e)) => (EnvFilter::new(DEFAULT_LOG_FILTER), Some(e.to_string())),
            None => (EnvFilter::new(DEFAULT_LOG_FILTER), Some("not UTF-8".to_owned())),
        },
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(true);
    match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    if let Some(cause) = invalid {
        tracing::warn!(%cause, "ignoring an invalid RUST_LOG, using '{DEFAULT_LOG_FILTER}'");
    }
}

async fn run(Cli { common, command }: Cli) -> Result<ExitCode> {
    match command {
        Command::Agent(args) => run_agent(common, args).await,
        Command::Lxcfs { lxcfs_bin, watchdog, args } => {
            check::privileged()?;
            mount::verify_calls()?;
            let path = std::path::absolute(&common.lxcfs_path)?;
            lxcfs::supervisor::Supervisor { path, bin: lxcfs_bin, args, watchdog }.run().await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Mount { target: One { pid, container }, files, output } => {
            let workers = workers(None)?;
            let process = process(&common, pid, container.as_deref()).await?;
            let source = lxcfs::find(&workers, &common.lxcfs_path).await?;
            let wish = Wish::Add(files.unwrap_or(FileSet::ALL));
            changed(&workers, vec![process], wish, Some(source), output.output).await
        }
        Command::Umount { target, output } => {
            let workers = workers(None)?;
            let processes = targets(&workers, &common, target).await?;
            changed(&workers, processes, Wish::Nothing, None, output.output).await
        }
        Command::Remount { target, output } => {
            let workers = workers(None)?;
            // As a unit's ExecStartPost= it runs when lxcfs was started, and that may be before it serves.
            let patience = if target.all { SOON } else { Duration::ZERO };
            let source = lxcfs::find_within(patience, &workers, &common.lxcfs_path).await?;
            let processes = targets(&workers, &common, target).await?;
            changed(&workers, processes, Wish::REFRESH, Some(source), output.output).await
        }
        Command::Status { output } => status(&common, output.output).await,
        Command::Hook { here: false, log_file, .. } => {
            hook::guarded(log_file.as_deref()).await;
            Ok(ExitCode::SUCCESS)
        }
        Command::Hook { here: true, inject_by_default, .. } => {
            if let Err(e) = run_hook(&common, inject_by_default).await {
                tracing::warn!("the container starts without a view: {}", format!("{e:#}").replace('\n', " "));
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Check { nri_socket, output } => {
            let checks = check::all(&common.lxcfs_path, &Cri::new(common.cri_endpoint), &nri_socket).await;
            print(output.output, &checks, || checks.iter().map(ToString::to_string).collect())?;
            let failed = checks.iter().any(|c| c.verdict == check::Verdict::Fail);
            Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
        }
    }
}

/// A length of time, as in `5s`, `1.5s` or `800ms`: from 100 ms to an hour.
fn time(text: &str) -> Result<Duration, String> {
    let expected = || format!("'{text}' is no time from 100ms to 3600s, as in 5s or 800ms");
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 0.001),
        None => (text.strip_suffix('s').ok_or_else(expected)?, 1.0),
    };
    let seconds = number.parse::<f64>().map_err(|_| expected())? * unit;
    if (0.1..=3600.0).contains(&seconds) { Ok(Duration::from_secs_f64(seconds)) } else { Err(expected()) }
}

/// The threads that mount, once it is known that they can.
fn workers(threads: Option<u16>) -> Result<Workers> {
    check::privileged()?;
    mount::verify_calls()?;
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    let threads = threads.map_or(cpus, usize::from);
    Workers::start(threads, DEADLINE).context("no thread could be made to mount in")
}

async fn run_agent(common: Common, args: AgentArgs) -> Result<ExitCode> {
    let cri = Cri::new(common.cri_endpoint);
    let workers = workers(args.workers)?;
    let (tell, updates) = mpsc::channel(UPDATES);
    let (waiting, starts) = mpsc::channel(UPDATES);
    let from_kubernetes = args.pods_from == PodsFrom::Kubernetes;
    let (told, cri_told) = (tell.clone(), tell.clone());
    let mut watchers = Watchers::default();
    let events = if from_kubernetes {
        let node =
            args.node_name.ok_or_else(|| anyhow!("the node's name is not known: give --node-name or set NODE_NAME"))?;
        let told =
            "no API server is known: run in a pod with a service account, set KUBECONFIG, or use --pods-from cri";
        let client = kube::Client::try_default().await.context(told)?;
        watchers.spawn("the watch of pods", pods::kubernetes::watch_pods(client.clone(), node.clone(), tell.clone()));
        watchers.spawn("the watch of namespaces", pods::kubernetes::watch_namespaces(client.clone(), tell));
        let (events, publisher) = Events::to_pods(client, node);
        watchers.spawn("the publisher of Events", publisher);
        events
    } else {
        watchers.spawn("the watch of pod sandboxes", pods::cri::watch(cri.clone(), tell));
        Events::to_log()
    };
    let state = State::new(args.inject_by_default, from_kubernetes, args.adopt);
    let runtime = Runtime::new(common.pid_from, cri.clone());
    tracing::info!(version = env!("CARGO_PKG_VERSION"), lxcfs = %common.lxcfs_path.display(), "agent begins");
    let listener = http::listen(args.listen)
        .await
        .with_context(|| format!("{} cannot be listened on; --listen names another address", args.listen))?;
    tracing::info!(http_address = %listener.local_addr().unwrap_or(args.listen), "serving HTTP");
    let metrics = Arc::new(Metrics::default());
    let (ask, asks) = mpsc::channel(UPDATES);
    let (finder, asked_cri) =
        (lxcfs::Finder::new(&common.lxcfs_path), (common.pid_from != PidFrom::Proc).then(|| cri.clone()));
    let status_of = (workers.clone(), asked_cri.clone());
    let sources = http::Sources {
        ask,
        metrics: metrics.clone(),
        status: move || {
            let ((workers, cri), finder) = (status_of.clone(), finder.clone());
            async move {
                let serving = finder.find(&workers).await.ok().map(|source| source.dev);
                let status = node::status(&workers, serving, cri.as_ref()).await;
                status.map_err(|e| format!("/proc cannot be searched: {e}"))
            }
        },
        runtime: move || {
            let cri = asked_cri.clone();
            async move {
                match cri {
                    Some(cri) => cri.version().await.map(drop).map_err(|e| e.to_string()),
                    None => Ok(()),
                }
            }
        },
    };
    let lxcfs_path = common.lxcfs_path.clone();
    let agent = Agent { workers, runtime, lxcfs_path: common.lxcfs_path, events, state, adopt: args.adopt, metrics };
    if args.cri_events == CriEvents::Auto && (common.pid_from != PidFrom::Proc || !from_kubernetes) {
        watchers.spawn("the watch of CRI events", cri.tell_events(cri_told));
    }
    let nri = async {
        if args.nri == Nri::Off {
            return std::future::pending().await;
        }
        nri::run(&args.nri_socket, args.nri == Nri::Required, nri::Tell { starts: waiting, updates: told }).await
    };
    tokio::select! {
        ended = agent::run(agent, Inbox { updates, starts, asks }) => ended?,
        stopped = watchers.stopped() => return Err(stopped),
        ended = nri => ended?,
        ended = http::serve(listener, sources) => ended.context("HTTP cannot be served")?,
    }
    // lxcfs's pod does this too, if it is the last.
    if let Err(e) = lxcfs::volume::leave(&lxcfs_path) {
        tracing::debug!("the volume that lxcfs is mounted in stays: {e}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Tasks that run as long as the agent does: one that returns or panics is an error of the agent, which the kubelet
/// restarts. Dropped, they are aborted.
#[derive(Debug, Default)]
struct Watchers {
    tasks: JoinSet<()>,
    names: HashMap<tokio::task::Id, &'static str>,
}

impl Watchers {
    fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.names.insert(self.tasks.spawn(task).id(), name);
    }

    /// Waits for the first that stops, and says which and why.
    async fn stopped(&mut self) -> anyhow::Error {
        let (id, why) = match self.tasks.join_next_with_id().await {
            None => return std::future::pending().await,
            Some(Ok((id, ()))) => (id, "it returned".to_owned()),
            Some(Err(e)) => (e.id(), e.to_string()),
        };
        let name = self.names.get(&id).copied().unwrap_or("a task");
        anyhow!("{name} stopped: {why}; this is a bug, report it with the agent's log")
    }
}

async fn run_hook(common: &Common, inject_by_default: bool) -> Result<()> {
    let state = hook::state_on_stdin().context("stdin cannot be read")?;
    let Some(asked) = hook::asked(&state, inject_by_default)? else { return Ok(()) };
    let workers = workers(Some(1))?;
    let (id, outcome) = (asked.id.clone(), hook::place(asked, &common.lxcfs_path, &workers).await?);
    let files: Vec<&str> = outcome.done.iter().map(|step| step.file().name()).collect();
    tracing::info!(id, files = files.join(","), "view in place");
    for (file, why) in outcome.left_out {
        tracing::warn!(id, "left out {file}: {why}");
    }
    Ok(())
}

async fn process(common: &Common, pid: Option<i64>, container: Option<&str>) -> Result<Arc<Process>> {
    if let Some(pid) = pid {
        return Ok(Arc::new(Process::open(pid)?));
    }
    let prefix = ContainerId::from_url(container.unwrap_or_default())?;
    let runtime = Runtime::new(common.pid_from, Cri::new(common.cri_endpoint.clone()));
    let running = runtime.running().await?;
    let candidates: Vec<_> = running.iter().filter(|id| id.as_str().starts_with(prefix.as_str())).collect();
    let id = match candidates.as_slice() {
        [] => bail!("container '{prefix}': no running container has an id that begins so"),
        [id] => id,
        several => match several.iter().find(|id| ***id == prefix) {
            Some(id) => id,
            None => {
                let ids: Vec<_> = several.iter().map(|id| id.short()).collect();
                bail!(
                    "container '{prefix}': {} running containers have an id that begins so: {}",
                    ids.len(),
                    ids.join(", ")
                )
            }
        },
    };
    Ok(runtime.process(id, None).await?)
}

async fn targets(workers: &Workers, common: &Common, target: OneOrAll) -> Result<Vec<Arc<Process>>> {
    if target.all {
        let viewed = node::views(workers).await.context("/proc cannot be searched")?;
        return Ok(viewed.into_iter().map(|v| v.process).collect());
    }
    Ok(vec![process(common, target.pid, target.container.as_deref()).await?])
}

/// What a command did to one container.
#[derive(Debug, Serialize)]
struct Change {
    pid: i32,
    id: Option<ContainerId>,
    injected: FileSet,
    remounted: FileSet,
    removed: FileSet,
    left_out: BTreeMap<ViewFile, String>,
    error: Option<String>,
}

impl Change {
    fn new(pid: i32, outcome: Outcome, error: Option<String>) -> Change {
        let mut change = Change {
            pid,
            id: crate::runtime::proc::container(pid),
            injected: FileSet::NONE,
            remounted: FileSet::NONE,
            removed: FileSet::NONE,
            left_out: outcome.left_out.into_iter().map(|(file, why)| (file, why.to_string())).collect(),
            error,
        };
        for step in outcome.done {
            match step {
                Step::Inject(file) => change.injected.insert(file),
                Step::Swap(file, _) | Step::Adopt(file, _) => change.remounted.insert(file),
                Step::Remove(file, _) => change.removed.insert(file),
            }
        }
        change
    }

    fn lines(&self) -> Vec<String> {
        let who = match &self.id {
            Some(id) => format!("container {} (pid {})", id.short(), self.pid),
            None => format!("pid {}", self.pid),
        };
        let changes = [("injected", self.injected), ("remounted", self.remounted), ("removed", self.removed)];
        let made = changes.into_iter().filter(|(_, files)| !files.is_empty());
        let mut lines: Vec<String> = made.map(|(what, files)| format!("{who}: {what} {files}")).collect();
        lines.extend(self.left_out.iter().map(|(file, why)| format!("{who}: left out {file}: {why}")));
        if lines.is_empty() && self.error.is_none() {
            lines.push(format!("{who}: nothing to do"));
        }
        lines
    }
}

/// Does the same to each process's mount namespace and prints what was done.
async fn changed(
    workers: &Workers,
    processes: Vec<Arc<Process>>,
    wish: Wish,
    source: Option<Arc<Source>>,
    output: Output,
) -> Result<ExitCode> {
    let visits = stream::iter(processes).map(|process| {
        let source = source.clone();
        async move {
            let pid = process.pid();
            let visited = mount::run(workers, process, Task::wish(wish, source)).await;
            match visited.unwrap_or_else(|late| Err(late.error.into())) {
                Ok(outcome) => Change::new(pid, outcome, None),
                Err(e) => {
                    let told = e.to_string();
                    let outcome =
                        if let mount::Error::Steps { outcome, .. } = e { outcome } else { Outcome::default() };
                    Change::new(pid, outcome, Some(told))
                }
            }
        }
    });
    let changes: Vec<Change> = visits.buffered(AT_ONCE).collect().await;
    print(output, &changes, || changes.iter().flat_map(Change::lines).collect())?;
    let errors: Vec<&str> = changes.iter().filter_map(|c| c.error.as_deref()).collect();
    match errors.as_slice() {
        [] => Ok(ExitCode::SUCCESS),
        [error] => bail!("{error}"),
        [first, ..] => bail!("{} of {} containers failed, the first: {first}", errors.len(), changes.len()),
    }
}

async fn status(common: &Common, output: Output) -> Result<ExitCode> {
    let workers = workers(None)?;
    let serving = match lxcfs::find(&workers, &common.lxcfs_path).await {
        Ok(source) => Some(source.dev),
        Err(e) => {
            tracing::warn!("{e}");
            None
        }
    };
    let cri = (common.pid_from != PidFrom::Proc).then(|| Cri::new(common.cri_endpoint.clone()));
    let all = node::status(&workers, serving, cri.as_ref()).await.context("/proc cannot be searched")?;
    print(output, &all, || {
        let or_dash = |text: &Option<String>| text.as_deref().unwrap_or("-").to_owned();
        let row = |s: &node::Status| {
            let worst = s.files.values().max().map_or(String::new(), |state| format!("{state:?}").to_lowercase());
            let files: Vec<_> = s.files.keys().map(|file| file.name()).collect();
            let id = s.id.as_ref().map_or("-".to_owned(), |id| id.short().to_owned());
            let pod = match (&s.namespace, &s.pod) {
                (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
                _ => "-".to_owned(),
            };
            [pod, or_dash(&s.container), id, s.pid.to_string(), worst, files.join(",")]
        };
        let header = ["POD", "CONTAINER", "ID", "PID", "STATE", "FILES"].map(str::to_owned);
        columns(&std::iter::once(header).chain(all.iter().map(row)).collect::<Vec<_>>())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Pads all columns but the last to their widest cell.
fn columns<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

fn print(output: Output, value: &impl Serialize, text: impl FnOnce() -> Vec<String>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let written = match output {
        Output::Json => {
            serde_json::to_writer_pretty(&mut out, value).map_err(std::io::Error::from).and_then(|()| writeln!(out))
        }
        Output::Text => text().iter().try_for_each(|line| writeln!(out, "{line}")),
    };
    match written.and_then(|()| out.flush()) {
        // Whoever reads has seen enough, as `head` has.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("the output cannot be written"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed_and_every_flag_is_explained() {
        let mut cli = Cli::command();
        cli.build();
        cli.clone().debug_assert();
        for command in cli.get_subcommands() {
            assert!(command.get_name() == "help" || command.get_about().is_some(), "{}", command.get_name());
            for arg in command.get_arguments() {
                assert!(arg.get_help().is_some(), "{} {}", command.get_name(), arg.get_id());
            }
        }
    }

    #[tokio::test]
    async fn watcher_that_stops_is_an_error() {
        let mut watchers = Watchers::default();
        watchers.spawn("a", std::future::pending());
        watchers.spawn("b", async { panic!("as the test wants it") });
        let error = watchers.stopped().await.to_string();
        assert!(error.starts_with("b stopped:") && error.contains("panicked"), "{error}");
        watchers.spawn("c", async {});
        let error = watchers.stopped().await.to_string();
        assert!(error.starts_with("c stopped: it returned"), "{error}");
    }

    #[test]
    fn hook_is_recognised_as_subcommand_only() {
        for (args, expected) in [
            (&["hook", "--no-such-flag"][..], true),
            (&["--log-format", "json", "hook", "--no-such-flag"], true),
            (&["hook", "--log-format", "yaml"], true),
            (&["umount", "--container", "hook", "--pid", "1"], false),
            (&["mount", "hook"], false),
            (&["--lxcfs-path", "hook", "nonsense"], false),
            (&["nonsense", "hook"], false),
            (&[], false),
        ] {
            let args = [&["kube-lxcfs"], args].concat();
            assert_eq!(is_hook(args.iter().map(OsString::from)), expected, "{args:?}");
        }
    }

    #[test]
    fn targets_read_no_environment_variable() {
        let cli = Cli::command();
        for command in cli.get_subcommands() {
            for arg in
                command.get_arguments().filter(|arg| ["pid", "container", "all"].contains(&arg.get_id().as_str()))
            {
                assert_eq!(arg.get_env(), None, "{} --{}", command.get_name(), arg.get_id());
            }
        }
    }

    #[test]
    fn one_target_is_asked_for_and_no_more() {
        for wrong in [
            &["umount"][..],
            &["umount", "--all", "--pid", "1"],
            &["mount", "--all"],
            &["mount"],
            &["mount", "--pid", "x"],
        ] {
            let args = [&["kube-lxcfs"], wrong].concat();
            assert_eq!(Cli::try_parse_from(args).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }
}
