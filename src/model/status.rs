//! The desired views of containers and their states, for metrics and `/status`.

use serde::Serialize;
use tokio::sync::oneshot;

use super::container_id::ContainerId;

/// The state of a container with a desired view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ContainerState {
    /// Its view is mounted.
    Injected,
    /// Its view is not mounted yet.
    Pending,
    /// Its view could not be mounted; the agent retries.
    Failed,
    /// It cannot have a view, or its pod's annotations are invalid.
    Skipped,
}

impl ContainerState {
    pub const ALL: [ContainerState; 4] =
        [Self::Injected, Self::Pending, Self::Failed, Self::Skipped];
}

/// The reason why a container with a desired view has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureReason {
    /// Its pod's annotations, or the label of its namespace, are invalid.
    InvalidAnnotation,
    /// It cannot have a view, for example because it has its own kernel.
    #[serde(rename = "unsupported_runtime")]
    Unsupported,
    /// Every desired file was skipped.
    FilesSkipped,
    /// No lxcfs serves.
    NoLxcfs,
    /// The operation missed its deadline.
    TimedOut,
    /// A step of the operation failed.
    StepFailed,
}

impl FailureReason {
    pub const ALL: [FailureReason; 6] = [
        Self::InvalidAnnotation,
        Self::Unsupported,
        Self::FilesSkipped,
        Self::NoLxcfs,
        Self::TimedOut,
        Self::StepFailed,
    ];
}

/// A kind of change of a container's view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operation {
    Inject,
    Remove,
    Remount,
}

/// A container with a desired view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerStatus {
    pub namespace: String,
    pub pod: String,
    pub container: String,
    pub id: ContainerId,
    pub desired: DesiredStatus,
}

/// The desired view of a container, and its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DesiredStatus {
    /// `all`, comma-separated view files, or `keep` where the pod's annotations are invalid.
    pub files: String,
    pub state: ContainerState,
    /// The reason why it has no view, or only a part of it.
    pub why: Option<String>,
    /// The same, as a label.
    pub reason: Option<FailureReason>,
}

/// The agent's state at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The reason why the agent is not ready, as far as its loop knows, apart from lxcfs.
    pub not_ready_reason: Option<String>,
    /// Whether lxcfs serves.
    pub lxcfs_up: bool,
    pub containers: Vec<ContainerStatus>,
}

/// A request for a [`Snapshot`]: where the agent's loop sends it.
pub type SnapshotRequest = oneshot::Sender<Snapshot>;
