//! `kube-lxcfs hook`: reads the container's state from stdin and injects the view, in a child
//! process with a time limit. No failure keeps the container from starting.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::Path,
    process::{ExitCode, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};

use super::workers;
use crate::{
    args::{Common, HookArgs},
    lxcfs,
    mount::{self, Outcome, Task},
    oci_hook::{HookRequest, MAX_INPUT_BYTES, State, parse_request},
    sys::{process::Process, syscalls::Purpose},
};

/// The container waits for the hook at most this time.
const TIMEOUT: Duration = Duration::from_secs(1);

pub(super) async fn run(common: Common, args: HookArgs) -> ExitCode {
    if !args.in_process {
        run_with_timeout(args.log_file.as_deref()).await;
    } else if let Err(e) = inject_if_desired(&common, args.inject_by_default).await {
        let cause = format!("{e:#}").replace('\n', " ");
        tracing::warn!(cause, "the container starts without a view");
    }
    ExitCode::SUCCESS
}

/// Runs this command as a child, with the same stdin, for up to [`TIMEOUT`], and copies its log to
/// stderr and `log_file`. A thread that waits for a hung lxcfs cannot be killed, and its process
/// does not exit. The runtime must not wait for that process.
async fn run_with_timeout(log_file: Option<&Path>) {
    let child = async {
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command.args(std::env::args_os().skip(1)).arg("--in-process");
        command
            .stdin(Stdio::inherit())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?
            .wait_with_output()
            .await
    };
    let log = match tokio::time::timeout(TIMEOUT, child).await {
        Ok(Ok(output)) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Ok(Err(e)) => format!("the container starts without a view: failed to run the hook: {e}\n"),
        Err(_) => format!("the container starts without a view: timed out after {TIMEOUT:?}\n"),
    };
    let _ = io::stderr().write_all(log.as_bytes());
    let Some(path) = log_file else { return };
    let file = File::options().create(true).append(true).open(path);
    if let Err(e) = file.and_then(|mut file| file.write_all(log.as_bytes())) {
        let _ = writeln!(io::stderr(), "failed to append to the log file {}: {e}", path.display());
    }
}

async fn inject_if_desired(common: &Common, inject_by_default: bool) -> Result<()> {
    let state = read(io::stdin()).context("failed to read the container's state from stdin")?;
    let Some(request) = read_request(&state, inject_by_default)? else { return Ok(()) };
    let id = request.id.clone();
    let outcome = inject(request, common).await?;
    let files: Vec<&str> = outcome.done.iter().map(|step| step.file().name()).collect();
    tracing::info!(id, files = files.join(","), "view injected");
    for (file, why) in outcome.skipped {
        tracing::warn!(id, %file, %why, "view file skipped");
    }
    Ok(())
}

/// Decides from the state and from the bundle that it names. `None` if no view is desired.
fn read_request(state: &[u8], inject_by_default: bool) -> Result<Option<HookRequest>> {
    let state = State::parse(state)?;
    let path = state.bundle().join("config.json");
    let config = File::open(&path)
        .and_then(read)
        .with_context(|| format!("failed to read {}", path.display()))?;
    let request = parse_request(&state, &config, inject_by_default);
    request.with_context(|| format!("container {}", state.id))
}

async fn inject(
    HookRequest { pid, root, desired, .. }: HookRequest,
    common: &Common,
) -> Result<Outcome> {
    let root =
        root.canonicalize().with_context(|| format!("failed to resolve {}", root.display()))?;
    let workers = workers(Some(1), Purpose::Mount)?;
    let lxcfs = lxcfs::find(&workers, &common.lxcfs_path).await?;
    let process = Arc::new(Process::open(pid)?.with_root(root));
    match mount::reconcile(&workers, process, Task::reconcile(desired, Some(lxcfs))).await {
        Ok(reconciled) => Ok(reconciled?),
        Err(timeout) => Err(timeout.error.into()),
    }
}

fn read(input: impl Read) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    input.take(MAX_INPUT_BYTES).read_to_end(&mut text)?;
    Ok(text)
}
