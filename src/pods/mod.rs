//! Who is on this node and what it says of itself. Two watchers, one for the API server and one for the runtime's pod
//! sandboxes; both send [`Update`]s. Knows nothing of views or mounts.

pub mod cri;
pub mod kubernetes;

use crate::{policy::Annotations, runtime::ContainerId};

/// A pod, reduced to what is decided by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub annotations: Annotations,
    /// All of them: init, sidecar and ephemeral ones too.
    pub containers: Vec<Container>,
}

/// A container of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    pub name: String,
    /// While it runs.
    pub id: Option<ContainerId>,
}

/// A namespace's label [`crate::policy::INJECT`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    pub name: String,
    pub label: String,
}

/// What a watcher tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// These are all the pods of the node.
    Pods(Vec<Pod>),
    /// A pod came or changed.
    Pod(Pod),
    /// The pod with this uid is gone.
    PodGone(String),
    /// These are all the namespaces that have the label.
    Namespaces(Vec<Namespace>),
    /// A namespace has the label now, or another value of it.
    Namespace(Namespace),
    /// The namespace of this name has no label any more, or is gone.
    NamespaceGone(String),
}
