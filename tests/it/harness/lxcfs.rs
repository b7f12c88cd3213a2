//! lxcfs, alone or run by `kube-lxcfs lxcfs`.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::{Release, Running, cache, eventually, kube_lxcfs, program, send, unmount};

/// An lxcfs without a supervisor.
#[derive(Debug)]
pub(crate) struct Lxcfs {
    pub(crate) path: PathBuf,
    pub(crate) process: Running,
    dir: TempDir,
    /// The program, with its own arguments if a loader runs it.
    command: Vec<PathBuf>,
}

/// The options that the supervisor starts it with.
const OPTIONS: [&str; 3] = ["--enable-loadavg", "--enable-cfs", "--enable-pidfd"];

impl Lxcfs {
    pub(crate) fn start() -> Lxcfs {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lxcfs");
        fs::create_dir(&path).unwrap();
        Lxcfs::with(path, dir)
    }

    /// At this path.
    pub(crate) fn at(path: &Path) -> Lxcfs {
        Lxcfs::with(path.to_owned(), tempfile::tempdir().unwrap())
    }

    /// With these options in place of the usual ones.
    pub(crate) fn with_options(options: &[&str]) -> Lxcfs {
        Lxcfs::of_with_options(Release::Own, options)
    }

    /// With the usual options, of a Debian release: 6.0.4 of trixie.
    pub(crate) fn of(release: Release) -> Lxcfs {
        Lxcfs::of_with_options(release, &OPTIONS)
    }

    fn of_with_options(release: Release, options: &[&str]) -> Lxcfs {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lxcfs");
        fs::create_dir(&path).unwrap();
        let command = command_of(release);
        let process = Lxcfs::serve(&path, dir.path(), &command, options);
        Lxcfs { path, process, dir, command }
    }

    fn with(path: PathBuf, dir: TempDir) -> Lxcfs {
        let command = command_of(Release::Own);
        let process = Lxcfs::serve(&path, dir.path(), &command, &OPTIONS);
        Lxcfs { path, process, dir, command }
    }

    /// Starts it again at the same path.
    pub(crate) fn restart(&mut self) {
        self.process = Lxcfs::serve(&self.path, self.dir.path(), &self.command, &OPTIONS);
    }

    fn serve(path: &Path, dir: &Path, command: &[PathBuf], options: &[&str]) -> Running {
        let mut lxcfs = Command::new(&command[0]);
        lxcfs
            .args(&command[1..])
            .args(options)
            .args(["-f", "-o", "ro", "-p"])
            .arg(dir.join("pid"))
            .arg(path);
        let process = Running::start(&mut lxcfs, &dir.join("log"));
        wait_until_serving(path, &process);
        process
    }

    pub(crate) fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

impl Drop for Lxcfs {
    fn drop(&mut self) {
        self.process.kill();
        unmount(&self.path);
    }
}

/// The lxcfs of another release runs with the C library of that release, by its loader.
fn command_of(release: Release) -> Vec<PathBuf> {
    let root = match release {
        Release::Own => return vec![program("lxcfs").get_program().into()],
        Release::Trixie => cache("debian/trixie"),
        Release::Sid => cache("debian/sid"),
    };
    let libraries = root.join(format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH));
    let mut files = fs::read_dir(&libraries).unwrap().map(|file| file.unwrap().path());
    let is_loader = |file: &PathBuf| {
        file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ld-linux"))
    };
    let loader = files.find(is_loader).unwrap_or_else(|| {
        panic!("this test needs libc6 in {}, which `make test` unpacks", root.display())
    });
    let path = format!("{0}:{0}/lxcfs", libraries.display());
    vec![loader, "--library-path".into(), path.into(), root.join("usr/bin/lxcfs")]
}

fn wait_until_serving(path: &Path, process: &Running) {
    eventually("lxcfs serves", || {
        fs::read_to_string(path.join("proc/uptime")).map_err(|e| format!("{e}: {}", process.log()))
    });
}

/// The file that keeps lxcfs from starting.
const REFUSED: &str = "refused";

/// An lxcfs run by `kube-lxcfs lxcfs`.
#[derive(Debug)]
pub(crate) struct Supervised {
    pub(crate) path: PathBuf,
    pub(crate) supervisor: Running,
    dir: TempDir,
    args: Vec<String>,
    /// Earlier supervisors. They are reaped at the end: one may wait for an lxcfs that hangs.
    previous: Vec<Running>,
}

impl Supervised {
    pub(crate) fn start(args: &[&str]) -> Supervised {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lxcfs");
        Supervised::with(path, dir, args)
    }

    /// One whose lxcfs [`Supervised::kill_for_good`] keeps from starting again.
    pub(crate) fn start_mortal() -> Supervised {
        let dir = tempfile::tempdir().unwrap();
        let (path, script) = (dir.path().join("lxcfs"), dir.path().join("bin/lxcfs"));
        fs::create_dir(dir.path().join("bin")).unwrap();
        let refuse = format!("[ ! -e {}/{REFUSED} ] || exit 3", dir.path().display());
        fs::write(&script, format!("#!/bin/sh\n{refuse}\nexec lxcfs \"$@\"\n")).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
        let args = ["--lxcfs-bin", script.to_str().unwrap()];
        Supervised::with(path, dir, &args)
    }

    /// Kills an lxcfs of [`Supervised::start_mortal`], which does not start again until
    /// [`Supervised::revive`].
    pub(crate) fn kill_for_good(&self) {
        fs::write(self.dir.path().join(REFUSED), "").unwrap();
        self.signal_lxcfs(Signal::SIGKILL);
    }

    pub(crate) fn revive(&self) {
        fs::remove_file(self.dir.path().join(REFUSED)).unwrap();
    }

    /// At this path.
    pub(crate) fn at(path: &Path) -> Supervised {
        Supervised::with(path.to_owned(), tempfile::tempdir().unwrap(), &[])
    }

    fn with(path: PathBuf, dir: TempDir, args: &[&str]) -> Supervised {
        let args: Vec<String> = args.iter().map(|s| (*s).to_owned()).collect();
        let supervisor = Supervised::spawn(&path, dir.path(), &args);
        let supervised = Supervised { path, supervisor, dir, args, previous: Vec::new() };
        supervised.wait_until_serving();
        supervised
    }

    fn spawn(path: &Path, dir: &Path, args: &[String]) -> Running {
        let mut command = kube_lxcfs();
        command.args(["lxcfs", "--log-format", "json", "--lxcfs-path"]).arg(path).args(args);
        Running::start(&mut command, &dir.join("supervisor.log"))
    }

    /// Starts the supervisor again, after it was terminated or killed.
    pub(crate) fn restart(&mut self) {
        let supervisor = Supervised::spawn(&self.path, self.dir.path(), &self.args);
        self.previous.push(std::mem::replace(&mut self.supervisor, supervisor));
    }

    /// Waits until it serves.
    pub(crate) fn wait_until_serving(&self) {
        wait_until_serving(&self.path, &self.supervisor);
    }

    /// The pid of the lxcfs that the supervisor runs now.
    pub(crate) fn lxcfs(&self) -> i32 {
        let supervisor = self.supervisor.pid();
        eventually("lxcfs runs", || {
            let children = format!("/proc/{supervisor}/task/{supervisor}/children");
            let children = fs::read_to_string(children).unwrap_or_default();
            // At its start the supervisor also runs `lxcfs --help`.
            let serves = |pid: &i32| {
                fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|args| {
                    let args: Vec<&[u8]> = args.split(|b| *b == 0).collect();
                    args.contains(&&b"-f"[..])
                        && args.contains(&self.path.as_os_str().as_encoded_bytes())
                })
            };
            let mut pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
            pids.find(serves).ok_or_else(|| self.supervisor.log())
        })
    }

    pub(crate) fn signal_lxcfs(&self, signal: Signal) {
        send(self.lxcfs(), signal);
    }

    pub(crate) fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        let lxcfs = |process: &procfs::process::Process| {
            process.cmdline().is_ok_and(|args| args.iter().any(|arg| Path::new(arg) == self.path))
        };
        let _ = self.supervisor.child.kill();
        for process in procfs::process::all_processes().into_iter().flatten().flatten() {
            if lxcfs(&process) {
                send(process.pid, Signal::SIGKILL);
            }
        }
        unmount(&self.path);
    }
}
