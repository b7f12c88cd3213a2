//! Who is on this node and what it says of itself. Two watchers, one for the API server and one for the runtime's pod
//! sandboxes; both send [`Update`]s, and so does the runtime itself where it tells of starts at once (NRI, CRI events).
//! Knows nothing of views or mounts.

pub mod cri;
pub mod kubernetes;

use std::time::Instant;

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

/// Who told first that a view is wished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Trigger {
    /// The runtime, which waits with the container's first instruction.
    Nri,
    /// The runtime, after the start.
    Cri,
    /// The watch of the pods.
    Watch,
}

/// A container that the runtime starts or runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// As the runtime knows it, from its sandbox: with the annotations that it was made with. Its containers are not told.
    pub pod: Pod,
    pub name: String,
    pub id: ContainerId,
    /// Its first process, where the runtime tells.
    pub pid: Option<i64>,
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
    /// The runtime starts this container, or has just done so.
    Started(Started, Trigger),
    /// The runtime has ended or removed this container.
    Ended(ContainerId),
    /// These are all the containers that the runtime knew to be created or running at some moment after `asked`.
    Running { running: Vec<Started>, by: Trigger, asked: Instant },
}
