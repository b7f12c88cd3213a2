//! The command line's arguments.

pub mod kubectl;

use std::{
    collections::BTreeMap, ffi::OsString, net::SocketAddr, path::PathBuf, process::ExitCode,
    time::Duration,
};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use crate::{
    model::{
        selector::{DEFAULT_EXCLUDED, Scope, Selector},
        view::FileSet,
    },
    runtime::{PidSource, cri::CriEndpoint},
    sources::nri::{self, NriMode},
    sys::host_root::HostRoot,
    telemetry::{LogFormat, events::EventLevel},
};

/// Mount lxcfs files into running Kubernetes containers, so that /proc/meminfo, /proc/cpuinfo and
/// others show the container's limits.
#[derive(Debug, Parser)]
#[command(name = "kube-lxcfs", version, propagate_version = true, max_term_width = 120)]
pub struct Cli {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// Path at which lxcfs is mounted.
    #[arg(
        long,
        global = true,
        env = "KUBE_LXCFS_LXCFS_PATH",
        value_name = "DIR",
        default_value = "/var/lib/lxcfs"
    )]
    pub lxcfs_path: PathBuf,
    /// CRI socket of the runtime [default: the first of the usual ones whose runtime has pods, else
    /// that responds: containerd, k3s and RKE2, k0s, MicroK8s, CRI-O, cri-dockerd, iSulad].
    #[arg(long, global = true, env = "KUBE_LXCFS_CRI_ENDPOINT", value_name = "unix://PATH")]
    pub cri_endpoint: Option<CriEndpoint>,
    /// Directory that has the node's files: the sockets of CRI and NRI are looked up in it. In a
    /// pod with the node's pids: /proc/1/root.
    #[arg(
        long,
        global = true,
        env = "KUBE_LXCFS_HOST_ROOT",
        value_name = "DIR",
        default_value = "/"
    )]
    pub host_root: HostRoot,
    /// Source of container pids.
    #[arg(
        long,
        global = true,
        env = "KUBE_LXCFS_PID_FROM",
        value_enum,
        default_value_t = PidSource::Auto
    )]
    pub pid_from: PidSource,
    /// Format of the log on stderr. RUST_LOG sets the filter, for example
    /// RUST_LOG=kube_lxcfs=debug.
    #[arg(
        long,
        global = true,
        env = "KUBE_LXCFS_LOG_FORMAT",
        value_enum,
        default_value_t = LogFormat::Text
    )]
    pub log_format: LogFormat,
}

/// The format of a command's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Text,
    Json,
}

/// The source of the node's pods (`--pods-from`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PodSource {
    /// The API server.
    Kubernetes,
    /// The annotations of the runtime's pod sandboxes; no API server is needed.
    Cri,
}

/// The use of CRI events (`--cri-events`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CriEvents {
    /// Use them if the runtime has them and is the source of pids or pods.
    Auto,
    /// Do not use them.
    Off,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the node agent: keep the views of this node's pods as their annotations request.
    Agent(AgentArgs),
    /// Run lxcfs as a child process. Restart it when it exits or hangs, and remove the views of the
    /// exited one from all containers.
    Lxcfs(LxcfsArgs),
    /// Inject the view, or some of its files, into a container. Files that are already injected
    /// stay.
    Mount {
        #[command(flatten)]
        target: Target,
        /// Comma-separated view files [default: all that lxcfs serves].
        #[arg(long, env = "KUBE_LXCFS_FILES", value_parser = FileSet::parse)]
        files: Option<FileSet>,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Remove the view from a container, or from all containers.
    Umount {
        #[command(flatten)]
        target: TargetOrAll,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Make a view of an earlier lxcfs current. A container without a view is left as it is.
    Remount {
        #[command(flatten)]
        target: TargetOrAll,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show the views of this node: pod, container, pid, files, and whether they are current, stale
    /// or dead.
    Status {
        #[command(flatten)]
        output: OutputArg,
    },
    /// Act as an OCI runtime hook (createRuntime or prestart), for runtimes without NRI. Read the
    /// container's state from stdin and inject the view if its annotations request one. The
    /// exit code is always 0, so that the container starts.
    Hook(HookArgs),
    /// Probe one view file, for another kube-lxcfs.
    #[command(hide = true)]
    Probe(ProbeArgs),
    /// Check prerequisites and suggest fixes. The exit code is 1 if a check fails.
    Check {
        /// NRI socket of the runtime.
        #[arg(
            long,
            env = "KUBE_LXCFS_NRI_SOCKET",
            value_name = "PATH",
            default_value = nri::DEFAULT_SOCKET
        )]
        nri_socket: PathBuf,
        #[command(flatten)]
        output: OutputArg,
    },
}

#[derive(Clone, Copy, Debug, Args)]
pub struct OutputArg {
    /// Format of the output.
    #[arg(
        short,
        long = "output",
        env = "KUBE_LXCFS_OUTPUT",
        value_enum,
        default_value_t = Output::Text
    )]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Name of this node at the API server.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: Option<String>,
    /// Source of the node's pods.
    #[arg(long, env = "KUBE_LXCFS_PODS_FROM", value_enum, default_value_t = PodSource::Kubernetes)]
    pub pods_from: PodSource,
    /// Inject views before a container's first instruction, over the runtime's NRI.
    #[arg(long, env = "KUBE_LXCFS_NRI", value_enum, default_value_t = NriMode::Auto)]
    pub nri: NriMode,
    /// NRI socket of the runtime.
    #[arg(
        long,
        env = "KUBE_LXCFS_NRI_SOCKET",
        value_name = "PATH",
        default_value = nri::DEFAULT_SOCKET
    )]
    pub nri_socket: PathBuf,
    /// Use the runtime's container events. Set to off for containerd 1.7 with a kubelet that uses
    /// evented PLEG: that runtime sends each event to one listener only.
    #[arg(long, env = "KUBE_LXCFS_CRI_EVENTS", value_enum, default_value_t = CriEvents::Auto)]
    pub cri_events: CriEvents,
    /// Events to create on pods; the log has all.
    #[arg(long, env = "KUBE_LXCFS_EVENTS", value_enum, default_value_t = EventLevel::All)]
    pub events: EventLevel,
    /// Address of /healthz, /readyz, /metrics and /status. [::] serves IPv4 too.
    #[arg(long, env = "KUBE_LXCFS_LISTEN", value_name = "IP:PORT", default_value = "[::]:9808")]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub secure: SecureArgs,
    /// Inject by default unless an annotation or label opts out.
    #[arg(long, env = "KUBE_LXCFS_INJECT_BY_DEFAULT")]
    pub inject_by_default: bool,
    /// Inject into pods whose labels match, for example 'team=a,tier in (web,api)', unless their
    /// annotation opts out.
    #[arg(long, env = "KUBE_LXCFS_POD_SELECTOR", value_name = "SELECTOR")]
    pub pod_selector: Option<Selector>,
    /// Inject into pods of namespaces whose labels match, unless an annotation or label opts out.
    #[arg(long, env = "KUBE_LXCFS_NAMESPACE_SELECTOR", value_name = "SELECTOR")]
    pub namespace_selector: Option<Selector>,
    /// Comma-separated namespaces: only pods whose annotation opts in have a view there [default
    /// with --inject-by-default: kube-system,kube-node-lease].
    #[arg(long, env = "KUBE_LXCFS_EXCLUDE_NAMESPACES", value_name = "LIST", value_delimiter = ',')]
    pub exclude_namespaces: Option<Vec<String>>,
    /// Also keep pod-provided lxcfs files current, for example from an admission webhook's
    /// volumes.
    #[arg(long, env = "KUBE_LXCFS_ADOPT")]
    pub adopt: bool,
    /// Number of threads that mount [default: one per CPU, at most 4].
    #[arg(
        long,
        env = "KUBE_LXCFS_WORKERS",
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=64)
    )]
    pub workers: Option<u16>,
}

/// The agent's flags for HTTPS.
#[derive(Clone, Debug, Args)]
pub struct SecureArgs {
    /// Address of /healthz, /metrics and /status over HTTPS, for clients whose bearer token and
    /// path the API server allows [default: none].
    #[arg(long, env = "KUBE_LXCFS_SECURE_LISTEN", value_name = "IP:PORT")]
    pub secure_listen: Option<SocketAddr>,
    /// PEM file of the certificate of --secure-listen; read again for each connection [default: a
    /// self-signed certificate].
    #[arg(
        long,
        env = "KUBE_LXCFS_TLS_CERT_FILE",
        value_name = "FILE",
        requires_all = ["secure_listen", "tls_key_file"]
    )]
    pub tls_cert_file: Option<PathBuf>,
    /// PEM file of the certificate's key.
    #[arg(long, env = "KUBE_LXCFS_TLS_KEY_FILE", value_name = "FILE", requires = "tls_cert_file")]
    pub tls_key_file: Option<PathBuf>,
}

impl AgentArgs {
    /// The flags of another agent, from its arguments and its environment. The environment of this
    /// process has no effect.
    ///
    /// # Errors
    /// Fails if it is not an agent, or has a flag that this version does not know.
    pub fn of_process(
        arguments: &[String],
        environment: &BTreeMap<String, String>,
    ) -> Result<AgentArgs, clap::Error> {
        let program = || std::iter::once("kube-lxcfs".to_owned());
        let without_environment =
            |command: clap::Command| command.mut_args(|arg| arg.env(None::<&'static str>));
        let command = without_environment(Cli::command()).mut_subcommands(without_environment);
        // A flag has priority over its variable.
        let given = command.clone().try_get_matches_from(program().chain(arguments.to_vec()))?;
        let given = given.subcommand_matches("agent");
        let mut all = arguments.to_vec();
        let own = Cli::command();
        for arg in own.find_subcommand("agent").into_iter().flat_map(|agent| agent.get_arguments())
        {
            let value = arg.get_env().and_then(|name| environment.get(name.to_str()?));
            let (Some(value), Some(flag)) = (value, arg.get_long()) else { continue };
            let source = given.and_then(|given| given.value_source(arg.get_id().as_str()));
            if source == Some(clap::parser::ValueSource::CommandLine) {
                continue;
            }
            if arg.get_action().takes_values() {
                all.push(format!("--{flag}={value}"));
            } else if value == "true" {
                all.push(format!("--{flag}"));
            }
        }
        let matches = command.try_get_matches_from(program().chain(all))?;
        match Cli::from_arg_matches(&matches)?.command {
            Command::Agent(args) => Ok(args),
            _ => Err(clap::Error::new(clap::error::ErrorKind::InvalidSubcommand)),
        }
    }

    /// Which pods have a view without an annotation.
    pub fn scope(&self) -> Scope {
        let defaults = if self.inject_by_default { &DEFAULT_EXCLUDED[..] } else { &[] };
        let excluded = self.exclude_namespaces.clone();
        let excluded =
            excluded.unwrap_or_else(|| defaults.iter().map(|name| (*name).to_owned()).collect());
        Scope {
            inject_by_default: self.inject_by_default,
            pod_selector: self.pod_selector.clone(),
            namespace_selector: self.namespace_selector.clone(),
            exclude_namespaces: excluded.into_iter().filter(|name| !name.is_empty()).collect(),
        }
    }
}

#[derive(Debug, Args)]
pub struct LxcfsArgs {
    /// Program to run as lxcfs [default: the bundled one for the node's cgroup version, else
    /// lxcfs].
    #[arg(long, env = "KUBE_LXCFS_LXCFS_BIN", value_name = "FILE")]
    pub lxcfs_bin: Option<PathBuf>,
    /// Time after which an unresponsive lxcfs is killed and restarted, from 100ms to 3600s.
    #[arg(
        long,
        env = "KUBE_LXCFS_WATCHDOG",
        value_name = "TIME",
        default_value = "5s",
        value_parser = parse_duration
    )]
    pub watchdog: Duration,
    /// Address of /metrics and /healthz [default: none].
    #[arg(long, env = "KUBE_LXCFS_LISTEN", value_name = "IP:PORT")]
    pub listen: Option<SocketAddr>,
    /// Additional arguments for lxcfs.
    #[arg(last = true, value_name = "ARGUMENT")]
    pub args: Vec<OsString>,
}

#[derive(Debug, Args)]
pub struct HookArgs {
    /// Inject by default unless the container's annotations opt out.
    #[arg(long, env = "KUBE_LXCFS_INJECT_BY_DEFAULT")]
    pub inject_by_default: bool,
    /// File to append the log to. Runtimes discard the stderr of a successful hook.
    #[arg(long, env = "KUBE_LXCFS_LOG_FILE", value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Inject in this process, which hangs when lxcfs does.
    #[arg(long, hide = true)]
    pub in_process: bool,
}

/// Flags of the hidden command `probe`.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// Pid of a process that has the view file.
    pub pid: i64,
    /// Name of the view file.
    #[arg(value_parser = FileSet::parse)]
    pub file: FileSet,
    /// Major number of the view file's device.
    pub major: u32,
    /// Minor number of the view file's device.
    pub minor: u32,
}

/// One container. No environment variable sets a target, so that none is changed by accident.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Target {
    /// Pid, on the host, of a process of the container.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub pid: Option<i64>,
    /// Id of the container, or a unique prefix of it.
    #[arg(long, value_name = "ID")]
    pub container: Option<String>,
}

/// One container, or all. No environment variable sets a target.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct TargetOrAll {
    /// Pid, on the host, of a process of the container.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub pid: Option<i64>,
    /// Id of the container, or a unique prefix of it.
    #[arg(long, value_name = "ID")]
    pub container: Option<String>,
    /// Every container of this node that has a view.
    #[arg(long)]
    pub all: bool,
}

/// Parses the arguments of this process.
///
/// # Errors
/// The exit code, after help, version or a usage error was printed.
pub fn parse() -> Result<Cli, ExitCode> {
    Cli::try_parse().map_err(|e| {
        let _ = e.print();
        // A hook that fails keeps the container from starting.
        let failed = e.use_stderr() && !is_hook(std::env::args_os());
        if failed { ExitCode::from(2) } else { ExitCode::SUCCESS }
    })
}

/// Whether the subcommand of a command line, which may be invalid otherwise, is `hook`.
fn is_hook(args: impl IntoIterator<Item = OsString>) -> bool {
    let lenient = Cli::command().ignore_errors(true).try_get_matches_from(args);
    lenient.is_ok_and(|matches| matches.subcommand_name() == Some("hook"))
}

/// A duration such as `5s`, `1.5s` or `800ms`, from 100 ms to an hour.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let invalid =
        || format!("invalid duration '{text}': expected 100ms to 3600s, for example 5s or 800ms");
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 0.001),
        None => (text.strip_suffix('s').ok_or_else(invalid)?, 1.0),
    };
    let seconds = number.parse::<f64>().map_err(|_| invalid())? * unit;
    if (0.1..=3600.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(invalid())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_and_flag_has_help() {
        let mut cli = Cli::command();
        cli.build();
        cli.clone().debug_assert();
        for command in cli.get_subcommands() {
            assert!(
                command.get_name() == "help" || command.get_about().is_some(),
                "{}",
                command.get_name()
            );
            for arg in command.get_arguments() {
                assert!(arg.get_help().is_some(), "{} {}", command.get_name(), arg.get_id());
            }
        }
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
        let is_target =
            |arg: &&clap::Arg| ["pid", "container", "all"].contains(&arg.get_id().as_str());
        for command in cli.get_subcommands() {
            for arg in command.get_arguments().filter(is_target) {
                assert_eq!(arg.get_env(), None, "{} --{}", command.get_name(), arg.get_id());
            }
        }
    }

    #[test]
    fn exactly_one_target_is_required() {
        for invalid in [
            &["umount"][..],
            &["umount", "--all", "--pid", "1"],
            &["mount", "--all"],
            &["mount"],
            &["mount", "--pid", "x"],
        ] {
            let args = [&["kube-lxcfs"], invalid].concat();
            assert_eq!(Cli::try_parse_from(args).unwrap_err().exit_code(), 2, "{invalid:?}");
        }
    }

    #[test]
    fn flags_of_a_process_come_from_arguments_and_environment() {
        let of = |arguments: &[&str], environment: &[(&str, &str)]| {
            let arguments: Vec<String> = arguments.iter().map(|&a| a.to_owned()).collect();
            let pairs =
                environment.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
            AgentArgs::of_process(&arguments, &pairs.collect())
        };
        let plain = of(&["agent"], &[]).unwrap();
        assert_eq!((plain.inject_by_default, plain.listen.port()), (false, 9808));
        let args = of(
            &["agent", "--lxcfs-path", "/x", "--listen", "[::1]:1"],
            &[
                ("KUBE_LXCFS_LISTEN", "[::1]:2"),
                ("KUBE_LXCFS_INJECT_BY_DEFAULT", "true"),
                ("KUBE_LXCFS_ADOPT", "false"),
                ("KUBE_LXCFS_EXCLUDE_NAMESPACES", "a,b"),
                ("KUBE_LXCFS_PODS_FROM", "cri"),
                ("KUBE_LXCFS_LXCFS_PATH", "/y"),
                ("OTHER", "x"),
            ],
        );
        let args = args.unwrap();
        assert_eq!((args.inject_by_default, args.adopt, args.listen.port()), (true, false, 1));
        assert_eq!(
            (args.scope().exclude_namespaces, args.pods_from),
            (vec!["a".to_owned(), "b".to_owned()], PodSource::Cri)
        );
        assert!(of(&["agent", "--no-such-flag"], &[]).is_err());
        assert!(of(&["lxcfs"], &[]).is_err());
    }

    #[test]
    fn default_injection_excludes_system_namespaces() {
        let excluded = |args: &[&str]| {
            let cli = Cli::try_parse_from([&["kube-lxcfs", "agent"], args].concat()).unwrap();
            let Command::Agent(args) = cli.command else { unreachable!("{args:?}") };
            args.scope().exclude_namespaces
        };
        assert_eq!(excluded(&[]), [""; 0]);
        assert_eq!(excluded(&["--inject-by-default"]), ["kube-system", "kube-node-lease"]);
        let named = ["--exclude-namespaces", "a,b", "--inject-by-default"];
        assert_eq!(excluded(&named), ["a", "b"]);
        assert_eq!(excluded(&["--inject-by-default", "--exclude-namespaces", ""]), [""; 0]);
    }

    #[test]
    fn duration_is_within_bounds() {
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(parse_duration("3600s"), Ok(Duration::from_secs(3600)));
        for invalid in ["", "5", "s", "99ms", "3601s", "-1s", "NaNs", "infs", "1h"] {
            assert!(parse_duration(invalid).is_err(), "{invalid}");
        }
    }
}
