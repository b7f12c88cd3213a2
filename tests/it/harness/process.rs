//! Programs: those of the machine, the `kube-lxcfs` binary, and child processes that end with the
//! test.

use std::{
    fs,
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::eventually_true;

/// A program that must be on this machine.
pub(crate) fn program(name: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let found = path.split(':').map(|dir| Path::new(dir).join(name)).find(|p| p.exists());
    Command::new(found.unwrap_or_else(|| {
        panic!("this test needs {name}, which is not installed; run it by `make test`")
    }))
}

/// A child process that is killed and reaped at the end of the test.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts it in a process group of its own. Its output is appended to `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Running {
        let out = fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        command.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out).process_group(0);
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        Running { child, log: log.to_owned() }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The lines of its JSON log.
    pub(crate) fn entries(&self) -> Vec<Value> {
        self.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// How many lines of its JSON log have these values in these fields.
    pub(crate) fn logged(&self, fields: &[(&str, &str)]) -> usize {
        let matches = |entry: &Value| {
            fields.iter().all(|(key, value)| match &entry[key] {
                Value::String(text) => text == value,
                Value::Bool(flag) => flag.to_string() == *value,
                _ => false,
            })
        };
        self.entries().iter().filter(|entry| matches(entry)).count()
    }

    /// Sends SIGTERM and waits; kills it if it takes too long.
    pub(crate) fn terminate(&mut self) {
        if self.is_running() {
            self.signal(Signal::SIGTERM);
            self.wait(Duration::from_secs(60));
        }
        self.kill();
    }

    /// Kills it, and waits for its exit for some seconds only: a thread that waits for a hung
    /// lxcfs cannot be killed.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        self.wait(Duration::from_secs(5));
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_none())
    }

    fn wait(&mut self, timeout: Duration) {
        let started = Instant::now();
        while self.is_running() && started.elapsed() < timeout {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> =
                log.lines().filter(|l| !l.contains("lxcfs: ")).rev().take(60).collect();
            eprintln!("--- end of the log of pid {}:", self.pid());
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Sends a signal. SIGSTOP is waited for: the process has stopped when this returns, or exited.
pub(crate) fn send(pid: i32, signal: Signal) {
    let sent = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
    if signal == Signal::SIGSTOP && sent.is_ok() {
        eventually_true("every thread has stopped", || {
            let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return true };
            tasks.flatten().all(|task| {
                let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
                state.is_none_or(|state| "TZX".contains(state))
            })
        });
    }
}

/// The `kube-lxcfs` binary, without the configuration of this machine.
pub(crate) fn kube_lxcfs() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-lxcfs"));
    command.env_remove("NODE_NAME").env_remove("KUBECONFIG").env_remove("RUST_BACKTRACE");
    command
}

/// Runs the binary to its end.
pub(crate) fn run(args: &[&str]) -> Output {
    kube_lxcfs().args(args).output().unwrap()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs the binary, which must succeed, and returns what it printed.
pub(crate) fn succeeds(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

/// Runs the binary, which must fail with one line of error, and returns that.
pub(crate) fn fails(args: &[&str]) -> String {
    let output = run(args);
    error_line(&output)
}

pub(crate) fn error_line(output: &Output) -> String {
    let error = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.starts_with("error: "), "{error}");
    error
}

/// Reads a file to its end or to an error, as text.
pub(crate) fn read(path: &Path) -> Result<String, std::io::Error> {
    let mut text = String::new();
    fs::File::open(path)?.read_to_string(&mut text)?;
    Ok(text)
}
