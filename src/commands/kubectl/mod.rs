//! `kubectl lxcfs`: explains, shows and changes the views of pods over the API server.

mod agents;
mod change;
mod check;
mod completion;
mod explain;
mod nodes;
mod status;
mod text;

use std::{collections::BTreeMap, io::Write, process::ExitCode};

use anyhow::{Context, Result, anyhow};
use clap::CommandFactory;
use clap_mangen::Man;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use serde::{Deserialize, Serialize};

use self::agents::Agents;
use crate::args::kubectl::{Cluster, Object, Plugin, PluginCommand};

pub(super) async fn run(Plugin { cluster, command }: Plugin) -> Result<ExitCode> {
    let connection = match command {
        PluginCommand::Completion { shell } => return print(&completion::script(shell)),
        PluginCommand::Man => return print(&manual()?),
        _ => Connection::open(&cluster).await?,
    };
    match command {
        PluginCommand::Explain { object: Object::Pod(pod), output } => {
            Box::pin(explain::run(&connection, &pod.name, output.format)).await
        }
        PluginCommand::Status { node, all_namespaces, output } => {
            let scope = match node {
                Some(node) => status::Scope::Node(node),
                None if all_namespaces => status::Scope::Cluster,
                None => status::Scope::Namespace,
            };
            status::run(&connection, scope, output.format).await
        }
        PluginCommand::Check { node, output } => {
            check::run(&connection, &node, output.format).await
        }
        PluginCommand::Inject { pod, files, containers } => {
            change::inject(&connection, &pod.name, files, &containers).await
        }
        PluginCommand::Eject { pod, unset } => change::eject(&connection, &pod.name, unset).await,
        PluginCommand::Completion { .. } | PluginCommand::Man => Ok(ExitCode::SUCCESS),
    }
}

/// Prints the words with which kubectl completes a line of the plugin.
pub(super) fn complete(words: &[String]) -> Result<ExitCode> {
    print(completion::words(words).as_bytes())
}

/// The API server, and the namespace of the pod.
struct Connection {
    client: Client,
    namespace: String,
    agents: Agents,
}

impl Connection {
    async fn open(cluster: &Cluster) -> Result<Connection> {
        let options =
            KubeConfigOptions { context: cluster.context.clone(), ..KubeConfigOptions::default() };
        let config = match &cluster.kubeconfig {
            Some(file) => match Kubeconfig::read_from(file) {
                Ok(kubeconfig) => Config::from_custom_kubeconfig(kubeconfig, &options).await,
                Err(e) => Err(e),
            },
            None if options.context.is_some() => Config::from_kubeconfig(&options).await,
            None => match Config::from_kubeconfig(&options).await {
                // In a pod there may be none. Elsewhere, what a client in a pod needs is of no
                // interest.
                Err(e) => Config::incluster().map_err(|_| e),
                config => config,
            },
        };
        let config = config.map_err(|e| kubeconfig_error(&e))?;
        let default_namespace = config.default_namespace.clone();
        let client = Client::try_from(config).context("failed to set up the API client")?;
        Ok(Connection {
            namespace: cluster.namespace.clone().unwrap_or(default_namespace),
            agents: Agents::new(client.clone(), cluster),
            client,
        })
    }
}

/// Without the error's source: its text has that already.
fn kubeconfig_error(error: &KubeconfigError) -> anyhow::Error {
    let what = match error {
        KubeconfigError::ReadConfig(cause, path) => {
            format!("failed to read the kubeconfig {}: {cause}", path.display())
        }
        error => format!("failed to use the kubeconfig: {error}"),
    };
    anyhow!("{what}; set KUBECONFIG, --kubeconfig or --context")
}

/// A row of the agent's `/status`. Fields that this version does not know are ignored.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Row {
    namespace: Option<String>,
    pod: Option<String>,
    container: Option<String>,
    id: Option<String>,
    #[serde(default)]
    pid: Option<i64>,
    /// The state of each view file.
    #[serde(default)]
    files: BTreeMap<String, String>,
    desired: Option<Desired>,
}

/// As [`crate::model::status::DesiredStatus`].
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Desired {
    files: String,
    state: String,
    why: Option<String>,
    reason: Option<String>,
}

/// The observed view files in words: `none`, or the number in each state.
fn observed(files: &BTreeMap<String, String>) -> String {
    let mut states: BTreeMap<&str, usize> = BTreeMap::new();
    files.values().for_each(|state| *states.entry(state).or_default() += 1);
    let counts: Vec<String> = states.iter().map(|(state, n)| format!("{n} {state}")).collect();
    if counts.is_empty() { "none".to_owned() } else { counts.join(", ") }
}

/// An error with its causes, on one line.
fn in_one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").replace('\n', " ")
}

/// The manual page of the plugin, with a section for each command.
fn manual() -> Result<Vec<u8>> {
    let mut command = Plugin::command();
    command.build();
    let mut page = Vec::new();
    let man = Man::new(command.clone());
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    for command in command.get_subcommands().filter(|command| command.get_name() != "help") {
        writeln!(page, ".SH \"COMMAND {}\"", command.get_name().to_uppercase())?;
        // The options of every command are above.
        let own = command.clone().mut_args(|arg| {
            let is_global = arg.is_global_set();
            if is_global { arg.hide(true) } else { arg }
        });
        let mut sections = Vec::new();
        let man = Man::new(own);
        man.render_synopsis_section(&mut sections)?;
        man.render_description_section(&mut sections)?;
        man.render_options_section(&mut sections)?;
        page.extend(String::from_utf8_lossy(&sections).replace(".SH ", ".SS ").into_bytes());
    }
    Ok(page)
}

fn print(output: &[u8]) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    out.write_all(output).and_then(|()| out.flush()).context("failed to write the output")?;
    Ok(ExitCode::SUCCESS)
}
