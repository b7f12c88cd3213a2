//! The input of an OCI runtime hook (`createRuntime` or `prestart`), and the view that it requests.
//! Pure: bytes in, a request out.
//!
//! The runtime has created the container's namespaces and mounts, has not changed its root yet, and
//! waits for the hook.
//!
//! Source: OCI runtime-spec, `runtime.md` (state) and `config.md` (hooks, annotations, root).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    model::pod::Annotations,
    plan::DesiredView,
    policy::{self, InvalidAnnotation},
};

/// The limit of a state or a config, in bytes.
pub const MAX_INPUT_BYTES: u64 = 16 << 20;

/// The CRI runtimes' annotations for a container's name and type: containerd's, then CRI-O's.
const CONTAINER_NAME: [&str; 2] =
    ["io.kubernetes.cri.container-name", "io.kubernetes.container.name"];
const CONTAINER_TYPE: [&str; 2] =
    ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
/// CRI-O passes the pod's annotations in this one, as JSON.
const CRIO_ANNOTATIONS: &str = "io.kubernetes.cri-o.Annotations";

/// The reason why the input cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("failed to parse the container's state on stdin: {0}")]
    State(serde_json::Error),
    #[error("the container's state on stdin has {0}")]
    Incomplete(&'static str),
    #[error("failed to parse config.json: {0}")]
    Config(serde_json::Error),
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Annotations(Vec<InvalidAnnotation>),
}

/// The container's state, as the runtime passes it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    #[serde(default)]
    pub id: String,
    #[serde(default)]
    pub pid: i64,
    /// The directory of the bundle. Runtimes before OCI 1.0 name it `bundlePath`.
    #[serde(default, alias = "bundlePath")]
    bundle: Option<PathBuf>,
}

impl State {
    /// # Errors
    /// Fails if it is not JSON, or has no bundle or pid.
    pub fn parse(text: &[u8]) -> Result<State, Error> {
        let state: State = serde_json::from_slice(text).map_err(Error::State)?;
        if state.bundle.is_none() {
            return Err(Error::Incomplete("no bundle"));
        }
        if state.pid <= 0 {
            return Err(Error::Incomplete("no pid; is this a createRuntime or prestart hook?"));
        }
        Ok(state)
    }

    pub fn bundle(&self) -> &Path {
        self.bundle.as_deref().unwrap_or(Path::new(""))
    }
}

/// The part of a bundle's `config.json` that decides.
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
    /// Absolute, or relative to the bundle.
    #[serde(default)]
    pub path: PathBuf,
}

impl Config {
    /// # Errors
    /// Fails if it does not have the form of a `config.json`.
    pub fn parse(text: &[u8]) -> Result<Config, Error> {
        serde_json::from_slice(text).map_err(Error::Config)
    }

    /// The desired view of the container, which has none yet.
    ///
    /// # Errors
    /// Fails if its annotations are invalid.
    pub fn desired(&self, id: &str, inject_by_default: bool) -> Result<DesiredView, Error> {
        let first = |keys: [&str; 2]| {
            keys.into_iter().find_map(|key| self.annotations.get(key)).map(String::as_str)
        };
        if first(CONTAINER_TYPE) == Some("sandbox") {
            return Ok(DesiredView::Absent);
        }
        let mut annotations = Annotations::from_map(&self.annotations);
        let of_pod: Option<BTreeMap<String, String>> =
            self.annotations.get(CRIO_ANNOTATIONS).and_then(|text| serde_json::from_str(text).ok());
        if let Some(of_pod) = of_pod {
            let Annotations { inject, files, containers } = Annotations::from_map(&of_pod);
            annotations.inject = annotations.inject.or(inject);
            annotations.files = annotations.files.or(files);
            annotations.containers = annotations.containers.or(containers);
        }
        let name = first(CONTAINER_NAME).unwrap_or(id);
        // The names of the pod's other containers are unknown here, so any name is taken as valid.
        let mut names = vec![name];
        names.extend(annotations.containers.iter().flat_map(|all| all.split(',')).map(str::trim));
        let decision = policy::decide(&annotations, None, inject_by_default, &names);
        match decision.by_container.get(name) {
            Some(DesiredView::Exactly(files)) => Ok(DesiredView::AtLeast(*files)),
            Some(DesiredView::Unmanaged) => Err(Error::Annotations(decision.invalid)),
            _ => Ok(DesiredView::Absent),
        }
    }
}

/// A container whose annotations request a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookRequest {
    pub id: String,
    pub pid: i64,
    /// Its root file system, where the runtime has mounted it.
    pub root: PathBuf,
    pub desired: DesiredView,
}

/// Decides from the container's state and the `config.json` of its bundle. `None` if no view is
/// desired.
///
/// # Errors
/// Fails if the config or the annotations are invalid.
pub fn parse_request(
    state: &State,
    config: &[u8],
    inject_by_default: bool,
) -> Result<Option<HookRequest>, Error> {
    let config = Config::parse(config)?;
    let desired = config.desired(&state.id, inject_by_default)?;
    let root = state.bundle().join(&config.root.path);
    let request = HookRequest { id: state.id.clone(), pid: state.pid, root, desired };
    Ok((desired != DesiredView::Absent).then_some(request))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        pod::{CONTAINERS_KEY, FILES_KEY, INJECT_KEY},
        view::{FileSet, ViewFile},
    };

    fn config(annotations: &serde_json::Value) -> Config {
        Config::parse(
            serde_json::json!({"annotations": annotations, "root": {"path": "rootfs"}})
                .to_string()
                .as_bytes(),
        )
        .unwrap()
    }

    #[test]
    fn state_of_each_runtime_version_is_parsed() {
        let new = br#"{"ociVersion":"1.0.2","id":"a","status":"creating","pid":7,"bundle":"/b",
            "annotations":{}}"#;
        assert_eq!(State::parse(new).unwrap().bundle(), Path::new("/b"));
        let old = br#"{"version":"0.6","id":"a","pid":7,"bundlePath":"/b"}"#;
        assert_eq!(State::parse(old).unwrap().bundle(), Path::new("/b"));
        for bad in [
            &b""[..],
            b"{",
            b"[]",
            b"{}",
            br#"{"pid":7}"#,
            br#"{"bundle":"/b"}"#,
            br#"{"bundle":7,"pid":7}"#,
        ] {
            assert!(State::parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn annotations_decide_for_each_runtime() {
        let all = DesiredView::AtLeast(FileSet::ALL);
        let inject = INJECT_KEY;
        for (annotations, desired) in [
            (serde_json::json!({}), DesiredView::Absent),
            (serde_json::json!({inject: "true"}), all),
            (serde_json::json!({inject: "false"}), DesiredView::Absent),
            (
                serde_json::json!({inject: "true", CONTAINER_TYPE[0]: "sandbox"}),
                DesiredView::Absent,
            ),
            (serde_json::json!({CRIO_ANNOTATIONS: "{\"kube-lxcfs.io/inject\":\"true\"}"}), all),
            (
                serde_json::json!({inject: "true", CONTAINERS_KEY: "b", CONTAINER_NAME[0]: "a"}),
                DesiredView::Absent,
            ),
            (
                serde_json::json!({inject: "true", CONTAINERS_KEY: "a,b", CONTAINER_NAME[1]: "a"}),
                all,
            ),
            (
                serde_json::json!({inject: "true", FILES_KEY: "meminfo"}),
                DesiredView::AtLeast(FileSet::from_iter([ViewFile::Meminfo])),
            ),
        ] {
            assert_eq!(
                config(&annotations).desired("id", false).unwrap(),
                desired,
                "{annotations}"
            );
        }
        assert_eq!(config(&serde_json::json!({})).desired("id", true).unwrap(), all);
        let error = config(&serde_json::json!({inject: "yes"}))
            .desired("id", false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("'yes'"), "{error}");
    }
}
