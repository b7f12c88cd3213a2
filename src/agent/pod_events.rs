//! Collects the changes of a pod's containers into at most one event of each reason.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    model::{
        pod::{INJECT_KEY, Pod},
        status::Operation,
        view::{FileSet, ViewFile},
    },
    plan::{SkipReason, Step},
    telemetry::events::{PodEvent, PodRef, Reason},
};

/// The unpublished changes and errors of one pod, by container name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PodReport {
    injected: BTreeMap<String, FileSet>,
    removed: BTreeMap<String, FileSet>,
    remounted: BTreeMap<String, FileSet>,
    skipped: BTreeMap<String, Vec<String>>,
    failed: BTreeMap<String, String>,
    /// Started before their views were injected.
    late: BTreeSet<String>,
    unsupported: BTreeMap<String, String>,
}

impl PodReport {
    pub(super) fn is_empty(&self) -> bool {
        *self == PodReport::default()
    }

    pub(super) fn add_steps(&mut self, container: &str, done: &[Step]) {
        for step in done {
            let files = match step.operation() {
                Operation::Inject => &mut self.injected,
                Operation::Remove => &mut self.removed,
                Operation::Remount => &mut self.remounted,
            };
            files.entry(container.to_owned()).or_default().insert(step.file());
        }
    }

    pub(super) fn add_skipped(&mut self, container: &str, skipped: &[(ViewFile, SkipReason)]) {
        self.skipped.insert(container.to_owned(), skipped.iter().map(describe_skipped).collect());
    }

    pub(super) fn add_failed(&mut self, container: &str, why: String) {
        self.failed.insert(container.to_owned(), why);
    }

    pub(super) fn add_late(&mut self, container: &str) {
        self.late.insert(container.to_owned());
    }

    pub(super) fn add_unsupported(&mut self, container: &str, why: String) {
        self.unsupported.insert(container.to_owned(), why);
    }

    /// The events on `pod`.
    pub(super) fn into_events(self, pod: &Pod) -> impl Iterator<Item = PodEvent> + use<> {
        let skipped =
            self.skipped.iter().map(|(c, files)| format!("; skipped in {c}: {}", files.join(", ")));
        let skipped: String = skipped.collect();
        let files = |verb: &str, changed: &BTreeMap<String, FileSet>| {
            let each = changed.iter().map(|(c, files)| format!("{c}: {files}"));
            format!("{verb} {}", each.collect::<Vec<_>>().join("; "))
        };
        let causes = |failures: &BTreeMap<String, String>| {
            failures.iter().map(|(c, why)| format!("{c}: {why}")).collect::<Vec<_>>()
        };
        let mut events = Vec::new();
        if !self.injected.is_empty() {
            events.push((
                Reason::LxcfsInjected,
                files("injected view files into", &self.injected) + &skipped,
            ));
        }
        if !self.remounted.is_empty() {
            events
                .push((Reason::LxcfsRemounted, files("remounted view files in", &self.remounted)));
        }
        if !self.removed.is_empty() {
            events.push((Reason::LxcfsRemoved, files("removed view files from", &self.removed)));
        }
        let mut failed = causes(&self.failed);
        failed.extend(self.late.iter().map(|c| {
            format!(
                "{c}: started before its view was injected, and may have read the node's values"
            )
        }));
        if !failed.is_empty() {
            events.push((Reason::LxcfsInjectFailed, failed.join("; ")));
        }
        if !self.unsupported.is_empty() {
            events.push((Reason::LxcfsUnsupportedRuntime, causes(&self.unsupported).join("; ")));
        }
        let pod = reference(pod);
        events.into_iter().map(move |(reason, note)| PodEvent { pod: pod.clone(), reason, note })
    }
}

pub(super) fn describe_skipped((file, why): &(ViewFile, SkipReason)) -> String {
    format!("{file} ({why})")
}

/// Reports the containers without a view because they nest containers. They can have one, if the
/// pod's annotation requests it: `LxcfsUnsupportedRuntime` is for those that cannot.
pub(super) fn nesting(pod: &Pod, containers: &[String]) -> PodEvent {
    let note = format!(
        "{}: no view was injected, because it would prevent mounts of procfs in containers inside \
         (procMount: Unmasked, hostUsers: false); to inject it nevertheless, annotate the pod with \
         {INJECT_KEY}: \"true\"",
        containers.join(", ")
    );
    PodEvent { pod: reference(pod), reason: Reason::LxcfsInjectFailed, note }
}

pub(super) fn reference(pod: &Pod) -> PodRef {
    PodRef { uid: pod.uid.clone(), namespace: pod.namespace.clone(), name: pod.name.clone() }
}
