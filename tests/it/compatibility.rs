//! The script that writes results of virtual machines into `docs/compatibility.md`.

use std::{fs, io::Write, path::Path, process::Stdio};

use crate::harness::*;

const CELLS: &str = "\nc1 trixie trixie sid runc all\nc2 sid sid sid crun begin end\n";

/// Writes a table of results into a page, and returns the lines that follow its columns.
fn write(page: &Path, results: &str) -> Vec<String> {
    let table = page.with_extension("table");
    fs::write(&table, results).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("hack/vm/page.py");
    let mut script = program("python3")
        .args([&script, page, &table])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    script.stdin.take().unwrap().write_all(CELLS.as_bytes()).unwrap();
    let output = script.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let page = fs::read_to_string(page).unwrap();
    let (_, written) = page.split_once("| --- | --- |\n").unwrap();
    written.lines().map(ToOwned::to_owned).collect()
}

#[test]
fn known_failures_are_in_one_note() {
    let dir = tempfile::tempdir().unwrap();
    let page = dir.path().join("page.md");
    let table = "| a | b |\n| --- | --- |\n";
    let before = format!("# A\n\n{table}| x | y |\n\n## Virtual machines\n\n{table}\n## Next\n");
    fs::write(&page, before).unwrap();
    // The script uses the first table of its section.
    let rows = |written: &[String]| {
        let (_, written) =
            written.split_at(written.iter().position(|l| l == "| --- | --- |").unwrap());
        let kept = written[1..].iter().map(|line| {
            let columns: Vec<&str> = line.split(" | ").collect();
            // Without versions and the date.
            if columns.len() == 6 {
                [columns[0], columns[3], columns[4], columns[5]].join(" | ")
            } else {
                line.clone()
            }
        });
        kept.collect::<Vec<_>>()
    };
    let results = "c1\tversions\tpassed\tkernel 1\n\
                   c1\tdisks\tknown\tvalues of the node (read: 17)\n\
                   c1\tstarts\tfailed\tno view\nc2\tversions\tpassed\tkernel 2\n\
                   c2\tdisks\tknown\tvalues of the node (read: 18)\n\
                   c2\tcpus\tknown\tlxcfs 6: 1 0 2\n";
    assert_eq!(
        rows(&write(&page, results)),
        [
            "| c1 | all | 1 of 3 | known: `disks`. failed: `starts`, no view |",
            "| c2 | begin end | 1 of 3 | known: `disks`, `cpus` |",
            "",
            "Known failures:",
            "",
            "- `cpus`: lxcfs 6: 1 0 2",
            "- `disks`: values of the node",
            "",
            "## Next",
        ]
    );
    // Of the other cell, the row and the texts stay. A failure that no row names has none.
    let results = "c2\tdisks\tknown\tlxcfs 6 serves the node's values\n";
    assert_eq!(
        rows(&write(&page, results)),
        [
            "| c1 | all | 1 of 3 | known: `disks`. failed: `starts`, no view |",
            "| c2 | begin end | 0 of 1 | known: `disks` |",
            "",
            "Known failures:",
            "",
            "- `disks`: values of the node; lxcfs 6 serves the node's values",
            "",
            "## Next",
        ]
    );
    let results = "c1\tdisks\tpassed\t\nc2\tdisks\tpassed\t\n";
    let passed = ["| c1 | all | 1 of 1 |  |", "| c2 | begin end | 1 of 1 |  |", "", "## Next"];
    assert_eq!(rows(&write(&page, results)), passed);
}
