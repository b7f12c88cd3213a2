//! Operations that the state starts, and their completions.

use crate::{
    model::{
        container_id::ContainerId,
        view::{FileSet, ViewFile},
    },
    plan::{DesiredView, SkipReason, Step},
};

/// An operation to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    pub id: ContainerId,
    pub desired: DesiredView,
    /// For the log: `namespace/pod/container`.
    pub name: String,
    /// The container's first process, where the runtime reported it.
    pub pid: Option<i64>,
    /// It needs the serving lxcfs, or makes pod-provided files current with it.
    pub with_lxcfs: bool,
}

/// The completion of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The container has its desired view: these files of it, without the skipped ones.
    Applied { done: Vec<Step>, skipped: Vec<(ViewFile, SkipReason)>, view: FileSet },
    /// The container does not have its desired view, or only a part; a retry follows.
    Failed { done: Vec<Step>, why: String },
    /// The operation missed its deadline. It stays in flight until its real completion.
    TimedOut { why: String },
    /// No lxcfs serves: nothing was changed. A search for lxcfs follows.
    NoLxcfs,
    /// The container does not run (any more, or yet), or the runtime does not respond. A retry
    /// follows, without an event.
    NotRunning,
    /// The container cannot have a view.
    Unsupported { why: String },
}
