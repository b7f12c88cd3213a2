//! Isolation of a test from the machine and from other tests.
//!
//! [`isolated`] runs a test again, as a process in a pid, mount and network namespace of its own.
//! A sweep or `--all` reaches only what this test made. When the test ends, however it ends, the
//! kernel kills its processes and drops its mounts, and with the tmpfs at `TMPDIR` its files.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{program, stderr, stdout};

/// Set for a test that runs isolated: the name of its directory and of its cgroups.
const TOKEN: &str = "KUBE_LXCFS_TEST_TOKEN";
/// A test that takes longer than this time, in seconds, hangs. Long runs set another one.
const TIMEOUT: &str = "1200";
const TIMEOUT_VARIABLE: &str = "KUBE_LXCFS_TEST_TIMEOUT";

/// Runs `body`, the body of a test, isolated.
///
/// # Panics
/// When the test fails, with its output.
pub(crate) fn isolated<F: FnOnce()>(body: F) {
    if std::env::var_os(TOKEN).is_some() {
        return body();
    }
    let test = name_of::<F>();
    let dir = tempfile::Builder::new().prefix("kl").tempdir().unwrap();
    let token = dir.path().file_name().unwrap().to_str().unwrap().to_owned();
    let timeout = std::env::var(TIMEOUT_VARIABLE).unwrap_or_else(|_| TIMEOUT.to_owned());
    let set_up = "mount -t tmpfs none \"$1\" && mount -t tmpfs none /run \
                  && busybox ip link set lo up && shift && \"$@\"; exit $?";
    // The shell is PID 1 of the namespace and reaps orphans. A program that is killed leaves its
    // child, so each has its own signal.
    let output = program("setpriv")
        .args(["--pdeathsig", "KILL", "timeout", "-s", "KILL", &timeout])
        .args(["setpriv", "--pdeathsig", "KILL", "unshare"])
        .args(["--mount", "--propagation", "private", "--net"])
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["sh", "-c", set_up, "sh"])
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .args([&test, "--exact", "--nocapture", "--test-threads", "1"])
        .env(TOKEN, &token)
        .env("TMPDIR", dir.path())
        .env("PATH", std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin")
        .output()
        .unwrap();
    remove_cgroup(&token);
    print!("{}", stdout(&output));
    let passed = output.status.success() && stdout(&output).contains("test result: ok. 1 passed");
    assert!(passed, "{}\n{}", stderr(&output), output.status);
}

/// The name of the test whose body is the closure `F`: `it::module::test::{{closure}}`.
fn name_of<F>() -> String {
    let name = std::any::type_name::<F>().trim_end_matches("::{{closure}}");
    name.split_once("::").expect("the path begins with the crate").1.to_owned()
}

/// The cgroup below which a test makes its own, absolute, in every hierarchy.
pub(crate) fn test_cgroup() -> String {
    let token = std::env::var(TOKEN).unwrap_or_else(|_| format!("kl{}", std::process::id()));
    format!("/{token}")
}

/// The directories of a cgroup: one on cgroup v2, one for each hierarchy on v1.
pub(crate) fn cgroup_dirs(cgroup: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let name = cgroup.trim_start_matches('/');
    if root.join("cgroup.controllers").exists() {
        return vec![root.join(name)];
    }
    fs::read_dir(root).into_iter().flatten().flatten().map(|h| h.path().join(name)).collect()
}

/// Kills the processes in a cgroup and below it, and removes it.
pub(crate) fn remove_cgroup(cgroup: &str) {
    fn remove(dir: &Path) {
        let Ok(entries) = fs::read_dir(dir) else { return };
        let children = entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
        children.for_each(|e| remove(&e.path()));
        for pid in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
            let pid = nix::unistd::Pid::from_raw(pid.parse().unwrap_or(0));
            if pid.as_raw() > 0 {
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
        for _ in 0..200 {
            if fs::remove_dir(dir).is_ok() || !dir.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    cgroup_dirs(cgroup).iter().for_each(|dir| remove(dir));
}
