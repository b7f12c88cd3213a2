//! The arguments of `kubectl lxcfs`: this program under the name `kubectl-lxcfs`, as kubectl runs
//! its plugins.

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::model::view::FileSet;

/// The file name under which kubectl finds the plugin.
pub const PROGRAM: &str = "kubectl-lxcfs";
/// The file name under which kubectl finds the completion of the plugin.
const COMPLETION: &str = "kubectl_complete-lxcfs";

/// Show and change the views of pods: lxcfs files over /proc/meminfo, /proc/cpuinfo and others,
/// that show the container's limits.
#[derive(Debug, Parser)]
#[command(
    name = PROGRAM,
    display_name = PROGRAM,
    bin_name = "kubectl lxcfs",
    version,
    max_term_width = 100
)]
pub struct Plugin {
    #[command(flatten)]
    pub cluster: Cluster,
    #[command(subcommand)]
    pub command: PluginCommand,
}

/// The cluster, and the agents in it.
#[derive(Clone, Debug, Args)]
pub struct Cluster {
    /// Kubeconfig file [default: those of KUBECONFIG, else ~/.kube/config].
    #[arg(long, global = true, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig file [default: the current one].
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// Namespace of the pod [default: the context's].
    #[arg(short, long, global = true, value_name = "NAME")]
    pub namespace: Option<String>,
    /// Namespace of the agents: that of the chart's release.
    #[arg(
        long,
        global = true,
        env = "KUBE_LXCFS_AGENT_NAMESPACE",
        value_name = "NAME",
        default_value = "kube-lxcfs"
    )]
    pub agent_namespace: String,
    /// Label selector of the agents' pods.
    #[arg(
        long,
        global = true,
        env = "KUBE_LXCFS_AGENT_SELECTOR",
        value_name = "SELECTOR",
        default_value = "app.kubernetes.io/name=kube-lxcfs,app.kubernetes.io/component=agent"
    )]
    pub agent_selector: String,
}

/// The format of the plugin's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Lines of at most 100 columns.
    #[default]
    Text,
    Json,
    Yaml,
}

/// The flag `-o`.
#[derive(Clone, Copy, Debug, Args)]
pub struct FormatArg {
    /// Format of the output.
    #[arg(
        short = 'o',
        long = "output",
        global = true,
        value_enum,
        value_name = "FORMAT",
        default_value = "text"
    )]
    pub format: Format,
}

#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// Explain why a pod has a view, or none: the rule that decides, the agent and lxcfs of its
    /// node, and for each container the desired view, the observed one, and the reason of a
    /// difference.
    Explain {
        #[command(subcommand)]
        object: Object,
        #[command(flatten)]
        output: FormatArg,
    },
    /// Show the views of the namespace's pods, of one node, or of all nodes. The exit code is 1
    /// if a node has no agent, or its agent did not respond.
    Status {
        /// Show the pods of all namespaces on this node.
        #[arg(long, value_name = "NAME", conflicts_with = "all_namespaces")]
        node: Option<String>,
        /// Show the pods of all namespaces on all nodes.
        #[arg(short = 'A', long)]
        all_namespaces: bool,
        #[command(flatten)]
        output: FormatArg,
    },
    /// Check the prerequisites of a node, in its agent's pod. The exit code is 1 if a check
    /// fails.
    Check {
        /// The node.
        #[arg(long, value_name = "NAME")]
        node: String,
        #[command(flatten)]
        output: FormatArg,
    },
    /// Inject a view into a running pod: set its annotations. Its containers are not restarted.
    Inject {
        #[command(flatten)]
        pod: PodArg,
        /// Comma-separated view files [default: the annotation stays as it is].
        #[arg(long, value_name = "LIST", value_parser = FileSet::parse)]
        files: Option<FileSet>,
        /// Comma-separated containers [default: the annotation stays as it is].
        #[arg(long, value_name = "LIST", value_delimiter = ',')]
        containers: Vec<String>,
    },
    /// Remove the view from a running pod: opt it out by its annotation.
    Eject {
        #[command(flatten)]
        pod: PodArg,
        /// Remove all annotations of kube-lxcfs instead: the labels and the agent's flags decide.
        #[arg(long)]
        unset: bool,
    },
    /// Print the completion script of a shell.
    Completion {
        /// The shell.
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print the manual page.
    Man,
}

/// The object to explain.
#[derive(Debug, Subcommand)]
pub enum Object {
    /// Explain a pod.
    #[command(visible_alias = "po")]
    Pod(PodArg),
}

#[derive(Clone, Debug, Args)]
pub struct PodArg {
    /// Name of the pod.
    #[arg(value_name = "POD", value_parser = parse_pod)]
    pub name: String,
}

/// A shell with a completion script.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    Bash,
    Fish,
    Zsh,
}

/// The program that this one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `kube-lxcfs`
    Agent,
    /// `kubectl lxcfs`
    Plugin,
    /// The completion of `kubectl lxcfs`, for kubectl.
    Completion,
}

/// The program by the file name in its first argument.
pub fn program(path: Option<&OsStr>) -> Program {
    match path.and_then(|path| Path::new(path).file_stem()).and_then(OsStr::to_str) {
        Some(PROGRAM) => Program::Plugin,
        Some(COMPLETION) => Program::Completion,
        _ => Program::Agent,
    }
}

impl Plugin {
    /// Parses arguments. `explain pod/NAME` is accepted as `explain pod NAME`, as kubectl does.
    ///
    /// # Errors
    /// Help, version, or a usage error.
    pub fn parse_arguments(
        arguments: impl IntoIterator<Item = OsString>,
    ) -> Result<Plugin, clap::Error> {
        let mut explains = false;
        let split = arguments.into_iter().flat_map(|argument| {
            let name = argument.to_str().and_then(name_of_pod).map(OsString::from);
            match name {
                Some(name) if explains => vec!["pod".into(), name],
                _ => {
                    explains |= argument == "explain";
                    vec![argument]
                }
            }
        });
        Plugin::try_parse_from(split)
    }
}

/// The name in `pod/NAME`.
fn name_of_pod(text: &str) -> Option<&str> {
    ["pod/", "pods/", "po/"].into_iter().find_map(|prefix| text.strip_prefix(prefix))
}

/// The name of a pod, as `NAME` or `pod/NAME`.
fn parse_pod(text: &str) -> Result<String, String> {
    match name_of_pod(text).unwrap_or(text) {
        "" => Err("expected the name of a pod".to_owned()),
        name => Ok(name.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_argument_has_help() {
        let mut command = Plugin::command();
        command.build();
        command.clone().debug_assert();
        for command in command.get_subcommands().filter(|c| c.get_name() != "help") {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{argument:?}");
            }
        }
    }

    #[test]
    fn file_name_selects_the_program() {
        for (path, expected) in [
            (Some("kubectl-lxcfs"), Program::Plugin),
            (Some("/usr/local/bin/kubectl-lxcfs"), Program::Plugin),
            (Some("/usr/local/bin/kubectl_complete-lxcfs"), Program::Completion),
            (Some("kube-lxcfs"), Program::Agent),
            (Some("/kubectl-lxcfs/kube-lxcfs"), Program::Agent),
            (None, Program::Agent),
        ] {
            assert_eq!(program(path.map(OsStr::new)), expected, "{path:?}");
        }
    }

    #[test]
    fn pod_is_named_as_for_kubectl() {
        for arguments in [
            &["explain", "pod", "web"][..],
            &["explain", "pod/web"],
            &["-n", "shop", "explain", "-o", "yaml", "pods/web"],
            &["explain", "po", "web"],
            &["inject", "web"],
            &["inject", "pod/web", "--files", "meminfo"],
        ] {
            let arguments = [&[PROGRAM], arguments].concat();
            let plugin = Plugin::parse_arguments(arguments.iter().map(OsString::from)).unwrap();
            let name = match plugin.command {
                PluginCommand::Explain { object: Object::Pod(pod), .. }
                | PluginCommand::Inject { pod, .. } => pod.name,
                _ => panic!("{arguments:?}"),
            };
            assert_eq!(name, "web");
        }
    }
}
