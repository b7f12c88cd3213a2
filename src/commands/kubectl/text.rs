//! Text of at most 100 columns. Names and reasons are text of tenants: control characters in them
//! are escaped.

use std::io::Write;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::{args::kubectl::Format, model::text::one_line};

/// The width of all output, in columns.
const WIDTH: usize = 100;
/// The width of the names of fields, with the space after them.
const NAME_WIDTH: usize = 10;
/// No column of a table becomes narrower.
const MIN_COLUMN: usize = 6;

/// Prints a value.
pub(super) fn print(
    format: Format,
    value: &impl Serialize,
    text: impl FnOnce() -> Vec<String>,
) -> Result<()> {
    let printed = match format {
        Format::Text => text().join("\n"),
        Format::Json => serde_json::to_string_pretty(value)?,
        Format::Yaml => serde_saphyr::to_string(value)?.trim_end().to_owned(),
    };
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{printed}").and_then(|()| out.flush()) {
        // The reader has enough, as `head` has.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("failed to write the output"),
    }
}

/// The lines of a field: its name, and its value beside it.
pub(super) fn field(indent: usize, name: &str, value: &str) -> Vec<String> {
    let at = indent + NAME_WIDTH;
    let lines = wrap(&one_line(value), WIDTH - at);
    let line = |(number, line): (usize, &String)| {
        let name = if number == 0 { name } else { "" };
        format!("{:indent$}{name:NAME_WIDTH$}{line}", "")
    };
    lines.iter().enumerate().map(line).collect()
}

/// Breaks a line between words, and a word that is too long within.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let mut word: Vec<char> = word.chars().collect();
        let last = lines.last().map_or(0, |line| line.chars().count());
        if last > 0 && last + 1 + word.len() > width {
            lines.push(String::new());
        }
        loop {
            let line = lines.last_mut().expect("one line at least");
            if !line.is_empty() {
                line.push(' ');
            }
            let rest = word.split_off(word.len().min(width));
            line.extend(word);
            word = rest;
            if word.is_empty() {
                break;
            }
            lines.push(String::new());
        }
    }
    lines
}

/// The lines of a table. Its widest columns are shortened until it fits.
pub(super) fn table<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let rows: Vec<[String; N]> =
        rows.iter().map(|row| row.clone().map(|cell| one_line(&cell).into_owned())).collect();
    let mut widths: [usize; N] = std::array::from_fn(|column| {
        rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
    });
    let total = |widths: &[usize; N]| widths.iter().sum::<usize>() + 2 * (N - 1);
    while total(&widths) > WIDTH {
        match widths.iter_mut().max() {
            Some(widest) if *widest > MIN_COLUMN => *widest -= 1,
            _ => break,
        }
    }
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| {
            let cell = shorten(cell, width);
            format!("{cell:width$}")
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

fn shorten(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn value_is_wrapped_between_words() {
        let value = "word ".repeat(30);
        let lines = field(2, "why", value.trim_end());
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with("  why       word"), "{lines:?}");
        assert!(lines[1].starts_with("            word"), "{lines:?}");
        assert_eq!(field(0, "pod", "a\n\u{1b}[2J"), [r"pod       a\n\u{1b}[2J"]);
    }

    proptest! {
        #[test]
        fn output_fits(cells in proptest::collection::vec("[a-z ]{0,150}", 12)) {
            let rows: Vec<[String; 6]> =
                cells.chunks(6).map(|row| row.to_vec().try_into().expect("6 cells")).collect();
            for line in table(&rows).iter().chain(&field(2, "why", &cells[0])) {
                prop_assert!(line.chars().count() <= WIDTH, "{}", line);
            }
            let words = |text: &str| text.split_whitespace().collect::<String>();
            let wrapped = field(0, "", &cells[0]).concat();
            prop_assert_eq!(words(&wrapped), words(&cells[0]));
        }
    }
}
