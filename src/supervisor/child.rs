//! lxcfs as a child process: its options, its start and its end.

use std::{
    ffi::{OsStr, OsString},
    os::unix::{ffi::OsStrExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::Child,
};

use super::{Error, program::Program};
use crate::lxcfs;

/// The time for lxcfs to exit after SIGTERM.
const TERM_TIMEOUT: Duration = Duration::from_millis(500);

/// Starts lxcfs at `path`.
pub(super) fn start(program: &Program, path: &Path, args: &[OsString]) -> Result<Child, Error> {
    // At each start, because the directory may have been removed since the last one.
    std::fs::create_dir_all(path).map_err(|cause| Error::Path { path: path.to_owned(), cause })?;
    let pid_file = pid_file(path);
    let _ = std::fs::remove_file(&pid_file);
    let mut command = program.command();
    command.arg("-f").args(&program.options).arg("-p").arg(pid_file);
    command.args(with_fuse_options(&program.version, args)).arg(path);
    // In its own process group: on Ctrl-C at a terminal the supervisor sweeps the containers first.
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child =
        command.spawn().map_err(|cause| Error::Bin { bin: program.bin.clone(), cause })?;
    forward(child.stdout.take());
    forward(child.stderr.take());
    Ok(child)
}

/// Adds our mount options to the arguments for lxcfs, which accepts `-o` once only. From its first
/// moment the file system is read-only, for all its mounts: a container with a user namespace can
/// make its own mount writable, and lxcfs 5 passes writes on to the host. The mount's source names
/// the version.
fn with_fuse_options(version: &str, args: &[OsString]) -> Vec<OsString> {
    let options = format!("ro,subtype=lxcfs,fsname={}{version}", lxcfs::SOURCE_PREFIX);
    let mut options = OsString::from(options);
    let mut others = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let value = match arg.as_bytes() {
            b"-o" => args.next().map(OsString::as_os_str),
            [b'-', b'o', value @ ..] => Some(OsStr::from_bytes(value)),
            _ => None,
        };
        match value {
            Some(value) => options.extend([OsStr::new(","), value]),
            None => others.push(arg.clone()),
        }
    }
    [vec!["-o".into(), options], others].concat()
}

/// Terminates the child if it still runs.
pub(super) async fn terminate(child: &mut Child) {
    if let Some(pid) = pid(child) {
        let _ = rustix::process::kill_process(pid, Signal::TERM);
        // No container has a view of it any more: a kill loses nothing.
        if tokio::time::timeout(TERM_TIMEOUT, child.wait()).await.is_err() {
            let _ = child.kill().await;
        }
    }
}

pub(super) fn pid(child: &Child) -> Option<Pid> {
    child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()))
}

/// The CPU time that it has used, in ticks of 10 ms.
pub(super) fn cpu_time(pid: Pid) -> Option<Duration> {
    let process = procfs::process::Process::new(pid.as_raw_nonzero().get());
    let stat = process.and_then(|process| process.stat()).ok()?;
    let ticks = stat.utime.checked_add(stat.stime)?;
    Some(Duration::from_millis(ticks.checked_mul(1000)? / procfs::ticks_per_second().max(1)))
}

/// The pid file, beside the mount point, so that it is removed with the directory that holds both.
pub(super) fn pid_file(path: &Path) -> PathBuf {
    let name =
        path.file_name().map_or_else(|| "lxcfs".into(), |name| name.to_string_lossy().into_owned());
    path.with_file_name(format!(".{name}.pid"))
}

pub(super) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => status.to_string(),
    }
}

/// Forwards the output of lxcfs to the log, line by line.
fn forward(output: Option<impl AsyncRead + Unpin + Send + 'static>) {
    let Some(output) = output else { return };
    tokio::spawn(async move {
        let mut lines = BufReader::new(output).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            tracing::info!("lxcfs: {line}");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuse_options_are_joined() {
        let joined = |args: &[&str]| {
            let args: Vec<OsString> = args.iter().map(OsString::from).collect();
            with_fuse_options("7.0.0", &args).join(OsStr::new(" ")).into_string().unwrap()
        };
        let ours = "-o ro,subtype=lxcfs,fsname=lxcfs-7.0.0";
        assert_eq!(joined(&[]), ours);
        let args = ["-u", "-o", "max_read=4096", "-l"];
        assert_eq!(joined(&args), format!("{ours},max_read=4096 -u -l"));
        assert_eq!(joined(&["-oallow_root"]), format!("{ours},allow_root"));
    }
}
