//! The output of commands on stdout.

use std::io::Write;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::args::Output;

/// Prints a value as JSON, or as these lines of text.
pub(super) fn print(
    output: Output,
    value: &impl Serialize,
    text: impl FnOnce() -> Vec<String>,
) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let written = match output {
        Output::Json => serde_json::to_writer_pretty(&mut out, value)
            .map_err(std::io::Error::from)
            .and_then(|()| writeln!(out)),
        Output::Text => text().iter().try_for_each(|line| writeln!(out, "{line}")),
    };
    match written.and_then(|()| out.flush()) {
        // The reader has enough, as `head` has.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("failed to write the output"),
    }
}

/// Pads all columns but the last to their widest cell.
pub(super) fn columns<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width =
        |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}
