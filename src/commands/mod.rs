//! The commands, and the kubectl plugin: each calls modules of lower layers and prints the result.
//! They decide nothing.

mod agent;
mod check;
mod hook;
mod kubectl;
mod lxcfs;
mod mount;
mod output;
mod probe;
mod status;
mod unsupported;

use std::{ffi::OsString, io::Write, process::ExitCode, time::Duration};

use anyhow::{Context, Result};

use crate::{
    args::{Cli, Command, kubectl::Plugin},
    mount::Workers,
    sys::syscalls::{self, Purpose},
};

/// The deadline of each operation on a container and of each request to lxcfs; one that misses it
/// counts as hung.
const DEADLINE: Duration = Duration::from_secs(5);

/// Runs a command, and prints an error in one line on stderr. `docs/reference.md` lists the exit
/// statuses.
pub fn run(cli: Cli) -> ExitCode {
    finish(dispatch(cli))
}

/// Runs the kubectl plugin with these arguments of a process.
pub fn run_plugin(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match Plugin::parse_arguments(arguments) {
        Ok(plugin) => finish(kubectl::run(plugin)),
        Err(e) => {
            let _ = e.print();
            if e.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS }
        }
    }
}

/// Prints the words with which kubectl completes a line of the plugin: the arguments of a process,
/// of which the last is incomplete.
pub fn complete_plugin(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let words = arguments.into_iter().skip(1).map(|word| word.to_string_lossy().into_owned());
    kubectl::complete(&words.collect::<Vec<_>>()).unwrap_or(ExitCode::FAILURE)
}

fn finish(command: impl Future<Output = Result<ExitCode>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let finished = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let finished = runtime.block_on(command);
        // The process does not wait for a hung thread.
        runtime.shutdown_background();
        finished
    });
    finished.unwrap_or_else(|e| {
        let _ = writeln!(std::io::stderr(), "error: {}", format!("{e:#}").replace('\n', " "));
        ExitCode::FAILURE
    })
}

/// Raises the limit of open descriptors to the most that is allowed, for whatever holds some for
/// each container.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(cause) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%cause, "failed to raise the limit of open files");
    }
}

async fn dispatch(Cli { common, command }: Cli) -> Result<ExitCode> {
    match command {
        Command::Agent(args) => agent::run(common, args).await,
        Command::Lxcfs(args) => lxcfs::run(common, args).await,
        Command::Mount { target, files, output } => {
            mount::mount(common, target, files, output.output).await
        }
        Command::Umount { target, output } => mount::umount(common, target, output.output).await,
        Command::Remount { target, output } => mount::remount(common, target, output.output).await,
        Command::Status { output } => status::run(common, output.output).await,
        Command::Probe(args) => probe::run(args),
        Command::Hook(args) => Ok(hook::run(common, args).await),
        Command::Check { nri_socket, output } => {
            check::run(common, &nri_socket, output.output).await
        }
    }
}

/// Starts the threads that enter containers, after a check that they can do what is required. More
/// threads than CPUs are slower: the kernel changes one mount namespace at a time (namespace_sem),
/// and they would wait for each other.
fn workers(threads: Option<u16>, purpose: Purpose) -> Result<Workers> {
    raise_descriptor_limit();
    check::require_capabilities()?;
    syscalls::verify_syscalls(purpose)?;
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    let threads = threads.map_or(cpus, usize::from);
    Workers::start(threads, DEADLINE).context("failed to start the threads that mount")
}
