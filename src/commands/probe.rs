//! `kube-lxcfs probe`: probes one view file, for another kube-lxcfs. Not for users.

use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};

use super::output::print;
use crate::{
    args::{Output, ProbeArgs},
    mount,
    sys::{mountinfo::Dev, process::Process},
};

pub(super) fn run(ProbeArgs { pid, file, major, minor }: ProbeArgs) -> Result<ExitCode> {
    let file = file.iter().next().context("no view file")?;
    // It may be the id of a thread that is alone in its namespace. Whichever task has it now, the
    // device of the view file is checked.
    let process = Process::open(pid).or_else(|_| Process::open_thread(pid, pid))?;
    let state = mount::probe_blocking(&process, file, Dev { major, minor });
    let state = state.map_err(|e| anyhow!(e))?;
    print(Output::Text, &state, || vec![state.to_owned()])?;
    Ok(ExitCode::SUCCESS)
}
