//! The directory that has the node's files: the sockets of the runtime are looked up in it.
//!
//! A pod reaches them through `/proc/1/root`, without a volume. The sockets of a runtime that has
//! restarted are found there too, which a mounted socket file would hide.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use tokio::net::UnixStream;

/// The root directory of the node, `/` unless this process has another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoot(PathBuf);

impl Default for HostRoot {
    fn default() -> HostRoot {
        HostRoot("/".into())
    }
}

impl std::str::FromStr for HostRoot {
    type Err = String;

    fn from_str(text: &str) -> Result<HostRoot, String> {
        if text.starts_with('/') {
            Ok(HostRoot(text.into()))
        } else {
            Err("expected an absolute path, for example /proc/1/root".into())
        }
    }
}

impl HostRoot {
    /// Opens a path of the node, without access to its content (`O_PATH`). Absolute links stay
    /// within the root (`RESOLVE_IN_ROOT` of openat2(2), kernel 5.6).
    ///
    /// # Errors
    /// Those of the call. If the root itself cannot be opened, the error names it, and its kind is
    /// not `NotFound`.
    pub fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        if self.0 == Path::new("/") {
            return Ok(rustix::fs::open(path, flags, Mode::empty())?);
        }
        let root = rustix::fs::open(&self.0, flags | OFlags::DIRECTORY, Mode::empty());
        let root = root.map_err(|e| {
            let (root, cause) = (self.0.display(), io::Error::from(e));
            io::Error::other(format!("failed to open the host's root {root}: {cause}"))
        })?;
        let resolve = ResolveFlags::IN_ROOT;
        Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?)
    }

    /// Connects to a socket of the node.
    ///
    /// # Errors
    /// Those of [`HostRoot::open`] and connect(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn connect(&self, path: &Path) -> io::Result<UnixStream> {
        let socket = self.open(path)?;
        UnixStream::connect(by_descriptor(&socket)).await
    }
}

/// A path of the open file itself, for calls that take no descriptor.
pub fn by_descriptor(file: impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use tokio::net::UnixListener;

    use super::*;

    /// A root with `/var/run` as the absolute link to `/run`, as distributions have it.
    fn root() -> (tempfile::TempDir, HostRoot) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("run/nri")).unwrap();
        fs::create_dir(dir.path().join("var")).unwrap();
        symlink("/run", dir.path().join("var/run")).unwrap();
        let root = dir.path().to_str().unwrap().parse().unwrap();
        (dir, root)
    }

    #[tokio::test]
    async fn absolute_links_stay_within_root() {
        let (dir, root) = root();
        let path = Path::new("/var/run/nri/nri.sock");
        assert_eq!(root.connect(path).await.unwrap_err().kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(dir.path().join("run/nri/nri.sock")).unwrap();
        root.connect(path).await.unwrap();
        listener.accept().await.unwrap();
        // `..` does not leave it either.
        assert!(root.open(Path::new("/../../run/nri/nri.sock")).is_ok());
    }

    #[tokio::test]
    async fn replaced_socket_is_found() {
        let (dir, root) = root();
        let socket = dir.path().join("run/nri/nri.sock");
        let path = Path::new("/var/run/nri/nri.sock");
        for _ in 0..2 {
            let listener = UnixListener::bind(&socket).unwrap();
            root.connect(path).await.unwrap();
            listener.accept().await.unwrap();
            fs::remove_file(&socket).unwrap();
        }
    }

    #[tokio::test]
    async fn missing_root_is_named() {
        let root: HostRoot = "/nonexistent/root".parse().unwrap();
        let error = root.connect(Path::new("/run/s")).await.unwrap_err();
        assert!(error.to_string().contains("the host's root /nonexistent/root"), "{error}");
        assert_ne!(error.kind(), io::ErrorKind::NotFound);
        assert!("proc/1/root".parse::<HostRoot>().is_err());
    }
}
