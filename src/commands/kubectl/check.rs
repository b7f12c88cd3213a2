//! `kubectl lxcfs check`: the checks of a node, which its agent's pod runs.

use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use super::{
    Connection,
    text::{field, print},
};
use crate::args::kubectl::Format;

/// The program in the image of the agent.
const PROGRAM: &str = "/usr/bin/kube-lxcfs";

/// As `kube-lxcfs check -o json` prints it.
#[derive(Debug, Deserialize, Serialize)]
struct Check {
    name: String,
    verdict: String,
    detail: String,
}

pub(super) async fn run(connection: &Connection, node: &str, format: Format) -> Result<ExitCode> {
    let agent = connection.agents.of_node(node).await?;
    let output = agent.exec(&[PROGRAM, "check", "--output", "json"]).await?;
    let checks: Vec<Check> = serde_json::from_slice(&output.stdout)
        .map_err(|e| {
            let why = output.stderr.trim();
            if why.is_empty() { anyhow!(e) } else { anyhow!("{why}") }
        })
        .with_context(|| format!("failed to check node {node}"))?;
    print(format, &checks, || {
        let lines = checks.iter().map(|check| {
            let name = format!("{:12}", check.name);
            field(0, &check.verdict, &format!("{name}  {}", check.detail))
        });
        lines.flatten().collect()
    })?;
    let failed = checks.iter().any(|check| check.verdict == "fail");
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
