//! What the tests are made of: lxcfs, containerd, an API server, bare mount namespaces and the
//! `kube-lxcfs` binary, each in a directory of its own. What is missing is a failure.

mod agent;
mod apiserver;
mod containerd;
mod isolation;
mod lxcfs;
mod namespace;
mod process;
mod reader;

use std::{
    fmt::Debug,
    path::PathBuf,
    time::{Duration, Instant},
};

pub(crate) use self::{
    agent::*, apiserver::*, containerd::*, isolation::*, lxcfs::*, namespace::*, process::*,
    reader::*,
};

/// The annotation that requests a view.
pub(crate) const INJECT: (&str, &str) = ("kube-lxcfs.io/inject", "true");

/// The view files that lxcfs 5 and later always serve, as mount points.
pub(crate) const ALWAYS: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/sys/devices/system/cpu",
];

/// The deadline of [`eventually`]: far more than any step takes on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// Polls until `check` returns a value.
///
/// # Panics
/// With the last error, after [`DEADLINE`].
pub(crate) fn eventually<T: Debug>(what: &str, mut check: impl FnMut() -> Result<T, String>) -> T {
    let started = Instant::now();
    loop {
        match check() {
            Ok(value) => return value,
            Err(why) if started.elapsed() > DEADLINE => {
                panic!("{what}: not within {DEADLINE:?}: {why}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Polls until `check` holds.
pub(crate) fn eventually_true(what: &str, mut check: impl FnMut() -> bool) {
    eventually(what, || check().then_some(()).ok_or_else(|| "the condition is false".into()));
}

/// A file that the scripts in hack/ have put into the cache.
pub(crate) fn cache(name: &str) -> PathBuf {
    let home = || PathBuf::from(std::env::var("HOME").unwrap_or_else(|_| "/root".into()));
    let base =
        std::env::var("XDG_CACHE_HOME").map_or_else(|_| home().join(".cache"), PathBuf::from);
    let cache =
        std::env::var("KUBE_LXCFS_CACHE").map_or_else(|_| base.join("kube-lxcfs"), PathBuf::from);
    let path = cache.join(name);
    assert!(path.exists(), "this test needs {}, which `make test` makes", path.display());
    path
}
