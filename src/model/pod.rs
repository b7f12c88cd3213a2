//! The node's pods as far as views depend on them, and the updates by which sources report changes.

use std::time::Instant;

use super::{container_id::ContainerId, selector::Labels};

/// Pod annotation and namespace label that opt in or out: `"true"` or `"false"`.
pub const INJECT_KEY: &str = "kube-lxcfs.io/inject";
/// Pod annotation with comma-separated view files; absent: all that lxcfs serves.
pub const FILES_KEY: &str = "kube-lxcfs.io/files";
/// Pod annotation with comma-separated container names; absent: all of the pod's.
pub const CONTAINERS_KEY: &str = "kube-lxcfs.io/containers";

/// The values of a pod's annotations that concern kube-lxcfs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Annotations {
    pub inject: Option<String>,
    pub files: Option<String>,
    pub containers: Option<String>,
}

impl Annotations {
    /// Takes the three relevant ones from all annotations of a pod or pod sandbox.
    pub fn from_map<'a>(all: impl IntoIterator<Item = (&'a String, &'a String)>) -> Self {
        let mut annotations = Self::default();
        for (key, value) in all {
            match key.as_str() {
                INJECT_KEY => annotations.inject = Some(value.clone()),
                FILES_KEY => annotations.files = Some(value.clone()),
                CONTAINERS_KEY => annotations.containers = Some(value.clone()),
                _ => {}
            }
        }
        annotations
    }
}

/// A pod, reduced to the fields that decide about views.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub annotations: Annotations,
    pub labels: Labels,
    /// All of them: init, sidecar and ephemeral containers too.
    pub containers: Vec<Container>,
}

/// A container of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    pub name: String,
    /// Set while it runs.
    pub id: Option<ContainerId>,
    /// It may mount procfs in a nested user namespace, to build or run containers inside:
    /// `procMount: Unmasked` in a pod with `hostUsers: false`. The kernel refuses that mount while
    /// a view covers files of its `/proc` (`mount_too_revealing` in fs/namespace.c). False where
    /// the source does not report it.
    pub nests_containers: bool,
}

/// A namespace whose labels may decide about its pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    pub name: String,
    pub labels: Labels,
}

/// The source that first reported that a container needs a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Trigger {
    /// The runtime over NRI, before the container's first instruction.
    Nri,
    /// The runtime over CRI, after the start.
    Cri,
    /// The watch of the pods.
    Watch,
}

/// A container that the runtime starts or runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartedContainer {
    /// The pod as its sandbox describes it: with the annotations at its creation and without
    /// containers.
    pub pod: Pod,
    pub name: String,
    pub id: ContainerId,
    /// The container's first process, where the runtime reports it.
    pub pid: Option<i64>,
}

/// A change that a source reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// The complete list of the node's pods.
    PodsReplaced(Vec<Pod>),
    /// A pod was added or changed.
    PodApplied(Pod),
    /// The pod with this uid was deleted.
    PodDeleted(String),
    /// The complete list of the namespaces: those that carry the label [`INJECT_KEY`], or all.
    NamespacesReplaced(Vec<Namespace>),
    /// A namespace was added, or its labels changed.
    NamespaceApplied(Namespace),
    /// The namespace with this name lost the label or was deleted.
    NamespaceDeleted(String),
    /// The runtime starts this container, or has just started it.
    ContainerStarted(StartedContainer, Trigger),
    /// The runtime stopped or removed this container.
    ContainerStopped(ContainerId),
    /// The complete list of the containers that were created or running at some moment after
    /// `requested_at`.
    ContainersListed { containers: Vec<StartedContainer>, trigger: Trigger, requested_at: Instant },
}
