//! Which lxcfs the supervisor runs. Two generations are needed: lxcfs 7 serves cgroup v2 only, and
//! earlier ones have wrong values there (`/proc/stat` lists the node's CPUs before 6.0.6, and
//! `/proc/pressure` is the node's before 7.0.0).

use std::{
    io,
    path::{Path, PathBuf},
    process::{ExitStatus, Output, Stdio},
    time::Duration,
};

use tokio::process::Command;

use super::{Error, child};
use crate::runtime::cgroup::CgroupVersion;

/// The directory of the image that has an lxcfs for each cgroup version: `cgroup1/lxcfs` and
/// `cgroup2/lxcfs`, each with its `liblxcfs.so`.
const BUNDLED: &str = "/usr/lib/kube-lxcfs";
/// The program that is run where none is bundled.
const INSTALLED: &str = "lxcfs";
/// The library that lxcfs loads, searched in `LD_LIBRARY_PATH` first (dlopen(3)).
const LIBRARY: &str = "liblxcfs.so";
/// Options that are used if this lxcfs has them: load average, CPU limits as CPU counts, and
/// pidfds.
const OPTIONS: [&str; 3] = ["--enable-loadavg", "--enable-cfs", PIDFD];
/// The first version that serves cgroup v2 only. It always uses pidfds, and still lists the option
/// in its help, but warns of it.
const CGROUP2_ONLY: u32 = 7;
const PIDFD: &str = "--enable-pidfd";
/// The limit for `lxcfs --help` and `lxcfs --version`.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The attempts of these if they are killed by a signal.
const ATTEMPTS: u32 = 3;

/// An lxcfs program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) bin: PathBuf,
    /// The directory of its own `liblxcfs.so`, if that is not the installed one.
    pub(super) library_dir: Option<PathBuf>,
    /// As it prints it, for example `7.0.0`.
    pub(super) version: String,
    pub(super) reason: &'static str,
    /// Those of [`OPTIONS`] that it has, by its own help text.
    pub(super) options: Vec<&'static str>,
}

impl Program {
    /// `bin`, or the one that fits the node's cgroup version.
    pub(super) async fn choose(bin: Option<&Path>, cgroups: CgroupVersion) -> Result<Self, Error> {
        let (bin, reason) = candidate(bin, Path::new(BUNDLED), cgroups);
        let library_dir = bin.parent().filter(|dir| dir.join(LIBRARY).exists()).map(Path::to_owned);
        let (version, options) = (String::new(), Vec::new());
        let mut program = Program { bin, library_dir, version, reason, options };
        let output = program.output("--version").await?;
        program.version = parse_version(&output);
        if !fits(&program.version, cgroups) {
            let (bin, version) = (program.bin, program.version);
            return Err(Error::Cgroup2Only { bin, version });
        }
        let help = program.output("--help").await?;
        program.options = options_of(&help, &program.version);
        Ok(program)
    }

    /// A command that runs it.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(&self.bin);
        if let Some(dir) = &self.library_dir {
            command.env("LD_LIBRARY_PATH", dir);
        }
        command
    }

    /// What it prints with one argument, on both of its outputs.
    async fn output(&self, argument: &str) -> Result<String, Error> {
        let failed = |cause| Error::Bin { bin: self.bin.clone(), cause };
        let mut attempts = 0;
        loop {
            let mut command = self.command();
            command.arg(argument).stdin(Stdio::null()).kill_on_drop(true);
            let output = match tokio::time::timeout(TIMEOUT, command.output()).await {
                Ok(output) => output.map_err(failed)?,
                Err(_) => return Err(failed(io::ErrorKind::TimedOut.into())),
            };
            attempts += 1;
            // The exit status differs from version to version, but if it was killed the output is
            // incomplete.
            match output.status.code() {
                Some(_) => return Ok(text(&output)),
                None if attempts < ATTEMPTS => {}
                None => return Err(failed(killed(argument, output.status))),
            }
        }
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

fn killed(argument: &str, status: ExitStatus) -> io::Error {
    io::Error::other(format!("{argument} exited by {}", child::describe(status)))
}

/// The program to run, and the reason.
fn candidate(
    bin: Option<&Path>,
    bundled: &Path,
    cgroups: CgroupVersion,
) -> (PathBuf, &'static str) {
    if let Some(bin) = bin {
        return (bin.to_owned(), "set by --lxcfs-bin");
    }
    let (dir, reason) = match cgroups {
        CgroupVersion::V1 => ("cgroup1", "the node has cgroup v1"),
        CgroupVersion::V2 => ("cgroup2", "the node has cgroup v2"),
    };
    let fitting = bundled.join(dir).join(INSTALLED);
    if fitting.exists() { (fitting, reason) } else { (INSTALLED.into(), "installed") }
}

/// The version in the output of `--version`, which some versions print in quotes.
fn parse_version(output: &str) -> String {
    let is_version = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit());
    let mut words = output.split(|c: char| c.is_whitespace() || c == '"');
    words.find(is_version).unwrap_or("unknown").to_owned()
}

/// Those of [`OPTIONS`] that this version has, by its help text.
fn options_of(help: &str, version: &str) -> Vec<&'static str> {
    let has_default = |option| option == PIDFD && is_cgroup2_only(version);
    let needed = OPTIONS.into_iter().filter(|option| !has_default(*option));
    needed.filter(|option| help.contains(option)).collect()
}

/// Whether a version can serve this cgroup version. An unknown one is tried.
fn fits(version: &str, cgroups: CgroupVersion) -> bool {
    cgroups == CgroupVersion::V2 || !is_cgroup2_only(version)
}

fn is_cgroup2_only(version: &str) -> bool {
    let major = version.split('.').next().and_then(|major| major.parse().ok());
    major.is_some_and(|major: u32| major >= CGROUP2_ONLY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_found_in_any_output() {
        for (output, expected) in [
            ("\"5.0.3\"\n", "5.0.3"),
            ("7.0.0\n", "7.0.0"),
            ("", "unknown"),
            ("usage\n", "unknown"),
        ] {
            assert_eq!(parse_version(output), expected);
        }
    }

    #[test]
    fn lxcfs_7_does_not_fit_cgroup_version_1() {
        use CgroupVersion::{V1, V2};
        for (version, cgroups, expected) in [
            ("5.0.3", V1, true),
            ("6.0.4", V2, true),
            ("7.0.0", V1, false),
            ("7.0.0", V2, true),
            ("10.1.0", V1, false),
            ("unknown", V1, true),
        ] {
            assert_eq!(fits(version, cgroups), expected, "{version} {cgroups:?}");
        }
    }

    #[test]
    fn options_are_those_that_the_version_has_and_needs() {
        let help = "-l, --enable-loadavg\n--enable-cfs\n--enable-pidfd\n";
        assert_eq!(options_of(help, "5.0.3"), OPTIONS);
        assert_eq!(options_of(help, "unknown"), OPTIONS);
        assert_eq!(options_of(help, "7.0.0"), ["--enable-loadavg", "--enable-cfs"]);
        assert_eq!(options_of("--enable-cfs", "4.0.0"), ["--enable-cfs"]);
    }

    #[test]
    fn program_fits_the_cgroup_version_unless_one_is_set() {
        let dir = tempfile::tempdir().unwrap();
        let fitting = dir.path().join("cgroup2/lxcfs");
        std::fs::create_dir(dir.path().join("cgroup2")).unwrap();
        std::fs::write(&fitting, "").unwrap();
        let chosen =
            |bin: Option<&str>, cgroups| candidate(bin.map(Path::new), dir.path(), cgroups).0;
        assert_eq!(chosen(None, CgroupVersion::V2), fitting);
        assert_eq!(chosen(None, CgroupVersion::V1), Path::new("lxcfs"));
        assert_eq!(chosen(Some("/bin/x"), CgroupVersion::V2), Path::new("/bin/x"));
    }
}
