//! `kube-lxcfs hook`: an OCI runtime hook (`prestart` or `createRuntime`) for runtimes without NRI. The runtime has made the
//! container's namespaces and mounts, has not yet changed its root, and waits. Whatever goes wrong, the container starts.
//!
//! Source: OCI runtime-spec, `runtime.md` (state) and `config.md` (hooks, annotations, root).

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;

use crate::{
    lxcfs,
    mount::{self, Outcome, Process, ProcessError, Task, WorkError, Workers},
    plan::Wish,
    policy::{self, Annotations, Problem},
};

/// The hook ends within this time, whatever hangs: the container waits for it.
pub const LIMIT: Duration = Duration::from_secs(1);
/// A state or a config longer than this, in bytes, is none.
pub const LONGEST: u64 = 16 << 20;

/// Annotations by which the CRI runtimes tell what a container is: containerd's, then CRI-O's.
const CONTAINER_NAME: [&str; 2] = ["io.kubernetes.cri.container-name", "io.kubernetes.container.name"];
const CONTAINER_TYPE: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
/// CRI-O keeps the pod's annotations in one, as JSON.
const CRIO_ANNOTATIONS: &str = "io.kubernetes.cri-o.Annotations";

/// Why the container starts without a view.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the container's state on stdin is not understood: {0}")]
    State(serde_json::Error),
    #[error("the container's state on stdin has {0}")]
    Incomplete(&'static str),
    #[error("{path}: {cause}")]
    Bundle { path: PathBuf, cause: io::Error },
    #[error("{path} is not understood: {cause}")]
    Config { path: PathBuf, cause: serde_json::Error },
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Annotations(Vec<Problem>),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Lxcfs(#[from] lxcfs::Error),
    #[error(transparent)]
    Mount(#[from] mount::Error),
    #[error(transparent)]
    Work(#[from] WorkError),
    #[error("it was not done within {LIMIT:?}")]
    Late,
}

/// What the runtime tells of the container.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    #[serde(default)]
    pub id: String,
    #[serde(default)]
    pub pid: i64,
    /// The bundle's folder.
    pub bundle: Option<PathBuf>,
    /// The same, as runtimes before OCI 1.0 call it.
    pub bundle_path: Option<PathBuf>,
}

impl State {
    /// # Errors
    /// When it is no JSON, or names no bundle or process.
    pub fn parse(text: &[u8]) -> Result<State, Error> {
        let state: State = serde_json::from_slice(text).map_err(Error::State)?;
        if state.bundle().is_none() {
            return Err(Error::Incomplete("no bundle"));
        }
        if state.pid <= 0 {
            return Err(Error::Incomplete("no pid; is this a createRuntime or prestart hook?"));
        }
        Ok(state)
    }

    fn bundle(&self) -> Option<&Path> {
        self.bundle.as_deref().or(self.bundle_path.as_deref())
    }
}

/// What of a bundle's `config.json` is decided by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Config {
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub root: Root,
}

/// `root` of a `config.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Root {
    #[serde(default)]
    pub path: PathBuf,
}

impl Config {
    /// # Errors
    /// When it is not of the form of a `config.json`.
    pub fn parse(text: &[u8]) -> Result<Config, serde_json::Error> {
        serde_json::from_slice(text)
    }

    /// What is wished for the container, which is as yet without a view.
    ///
    /// # Errors
    /// When its annotations are not understood.
    pub fn wish(&self, id: &str, inject_by_default: bool) -> Result<Wish, Error> {
        let first = |keys: [&str; 2]| keys.into_iter().find_map(|key| self.annotations.get(key)).map(String::as_str);
        if first(CONTAINER_TYPE) == Some("sandbox") {
            return Ok(Wish::Nothing);
        }
        let mut annotations = Annotations::from_map(&self.annotations);
        let pods: Option<BTreeMap<String, String>> =
            self.annotations.get(CRIO_ANNOTATIONS).and_then(|text| serde_json::from_str(text).ok());
        if let Some(pods) = pods {
            let Annotations { inject, files, containers } = Annotations::from_map(&pods);
            annotations.inject = annotations.inject.or(inject);
            annotations.files = annotations.files.or(files);
            annotations.containers = annotations.containers.or(containers);
        }
        let name = first(CONTAINER_NAME).unwrap_or(id);
        // The pod's other containers are not known here: whatever is named is taken to be one.
        let mut names = vec![name];
        names.extend(annotations.containers.iter().flat_map(|all| all.split(',')).map(str::trim));
        let wishes = policy::wishes(&annotations, None, inject_by_default, &names);
        match wishes.by_container.get(name) {
            Some(Wish::Files(files)) => Ok(Wish::Add(*files)),
            Some(Wish::Keep) => Err(Error::Annotations(wishes.problems)),
            _ => Ok(Wish::Nothing),
        }
    }
}

/// A container whose annotations want a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub id: String,
    pub pid: i64,
    /// Where its root file system is.
    pub root: PathBuf,
    pub wish: Wish,
}

/// Decides by the state that the runtime tells, and by the bundle that it names; none when no view is wished.
///
/// # Errors
/// When either is not there or not understood.
pub fn asked(state: &[u8], inject_by_default: bool) -> Result<Option<Asked>, Error> {
    let state = State::parse(state)?;
    let bundle = state.bundle().unwrap_or(Path::new(""));
    let path = bundle.join("config.json");
    let config = read(&path).map_err(|cause| Error::Bundle { path: path.clone(), cause })?;
    let config = Config::parse(&config).map_err(|cause| Error::Config { path, cause })?;
    let wish = config.wish(&state.id, inject_by_default)?;
    if wish == Wish::Nothing {
        return Ok(None);
    }
    let root = bundle.join(&config.root.path);
    let root = root.canonicalize().map_err(|cause| Error::Bundle { path: root, cause })?;
    Ok(Some(Asked { id: state.id, pid: state.pid, root, wish }))
}

/// The state that the runtime writes on our stdin.
///
/// # Errors
/// Those of reading.
pub fn state_on_stdin() -> io::Result<Vec<u8>> {
    let mut state = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(io::stdin(), LONGEST), &mut state)?;
    Ok(state)
}

/// Runs this very command as a child, hands it stdin, and tells what it logs on stderr and in `log_file`, for [`LIMIT`]. A
/// thread that asks an lxcfs that hangs cannot be killed, and a process with such a thread does not end: so it must not be the
/// one that the runtime waits for.
pub async fn guarded(log_file: Option<&Path>) {
    let child = async {
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command.args(std::env::args_os().skip(1)).arg("--here");
        command.stdin(Stdio::inherit()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?.wait_with_output().await
    };
    let told = match tokio::time::timeout(LIMIT, child).await {
        Ok(Ok(ended)) => String::from_utf8_lossy(&ended.stderr).into_owned(),
        Ok(Err(e)) => format!("the container starts without a view: the hook cannot be run: {e}\n"),
        Err(_) => format!("the container starts without a view: {}\n", Error::Late),
    };
    let _ = io::stderr().write_all(told.as_bytes());
    let Some(path) = log_file else { return };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    if let Err(e) = file.and_then(|mut file| file.write_all(told.as_bytes())) {
        let _ = writeln!(io::stderr(), "{}: {e}", path.display());
    }
}

/// Puts the view in.
///
/// # Errors
/// Whatever keeps it out.
pub async fn place(asked: Asked, lxcfs_path: &Path, workers: &Workers) -> Result<Outcome, Error> {
    let source = lxcfs::find(workers, lxcfs_path).await?;
    let process = Arc::new(Process::open(asked.pid)?.with_root(asked.root));
    let visited = mount::run(workers, process, Task::wish(asked.wish, Some(source))).await;
    visited.map_err(|late| Error::Work(late.error))?.map_err(Error::Mount)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(std::fs::File::open(path)?, LONGEST), &mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{FileSet, ViewFile};

    fn config(annotations: &serde_json::Value) -> Config {
        Config::parse(
            serde_json::json!({"annotations": annotations, "root": {"path": "rootfs"}}).to_string().as_bytes(),
        )
        .unwrap()
    }

    #[test]
    fn states_of_all_ages_are_understood() {
        let new = br#"{"ociVersion":"1.0.2","id":"a","status":"creating","pid":7,"bundle":"/b","annotations":{}}"#;
        assert_eq!(State::parse(new).unwrap().bundle(), Some(Path::new("/b")));
        let old = br#"{"version":"0.6","id":"a","pid":7,"bundlePath":"/b"}"#;
        assert_eq!(State::parse(old).unwrap().bundle(), Some(Path::new("/b")));
        for bad in [&b""[..], b"{", b"[]", b"{}", br#"{"pid":7}"#, br#"{"bundle":"/b"}"#, br#"{"bundle":7,"pid":7}"#] {
            assert!(State::parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn annotations_decide_however_the_runtime_passes_them_on() {
        let all = Wish::Add(FileSet::ALL);
        let inject = policy::INJECT;
        for (annotations, wish) in [
            (serde_json::json!({}), Wish::Nothing),
            (serde_json::json!({inject: "true"}), all),
            (serde_json::json!({inject: "false"}), Wish::Nothing),
            (serde_json::json!({inject: "true", CONTAINER_TYPE[0]: "sandbox"}), Wish::Nothing),
            (serde_json::json!({CRIO_ANNOTATIONS: "{\"kube-lxcfs.io/inject\":\"true\"}"}), all),
            (serde_json::json!({inject: "true", policy::CONTAINERS: "b", CONTAINER_NAME[0]: "a"}), Wish::Nothing),
            (serde_json::json!({inject: "true", policy::CONTAINERS: "a,b", CONTAINER_NAME[1]: "a"}), all),
            (
                serde_json::json!({inject: "true", policy::FILES: "meminfo"}),
                Wish::Add(FileSet::from_iter([ViewFile::Meminfo])),
            ),
        ] {
            assert_eq!(config(&annotations).wish("id", false).unwrap(), wish, "{annotations}");
        }
        assert_eq!(config(&serde_json::json!({})).wish("id", true).unwrap(), all);
        let told = config(&serde_json::json!({inject: "yes"})).wish("id", false).unwrap_err().to_string();
        assert!(told.contains("'yes' is not understood"), "{told}");
    }
}
