//! The agent's state machine. It is sans-I/O: inputs are updates, completions and the time; outputs
//! are operations and events.
//!
//! At most one operation per container is in flight. The last desired view wins.

mod container;
mod containers;
mod lxcfs;
mod operation;

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

pub use self::operation::{Completion, Operation};
use self::{
    container::{Container, InFlight},
    containers::Containers,
    lxcfs::LxcfsState,
};
use super::pod_events::{self, PodReport};
use crate::{
    model::{
        container_id::ContainerId,
        pod::{INJECT_KEY, Pod, StartedContainer, Trigger, Update},
        selector::{Labels, Scope},
        status::ContainerStatus,
    },
    plan::DesiredView,
    policy::{self, InvalidAnnotation},
    telemetry::{
        Backoff,
        events::{NamespaceEvent, PodEvent, Reason},
    },
};

/// The delay before a failed operation is retried.
const CONTAINER_RETRY: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
/// A container that the runtime reported and the watch of the pods has not yet.
#[derive(Debug)]
struct Unconfirmed {
    pod: String,
    name: String,
    pid: Option<i64>,
    triggered: (Trigger, Instant),
}

#[derive(Debug)]
struct PodState {
    pod: Pod,
    invalid: Vec<InvalidAnnotation>,
    /// As in [`policy::Decision`].
    nesting: Vec<String>,
    report: PodReport,
    /// Otherwise only the runtime reported it, as it was when its sandbox was created.
    seen_by_watch: bool,
}

/// The configuration of the state machine.
#[derive(Clone, Debug, Default)]
pub struct StateConfig {
    pub scope: Scope,
    /// Updates of namespaces will come; decisions wait for the first list. Without it, a pod of a
    /// labelled namespace would lose its view for a moment when the agent starts.
    pub has_namespaces: bool,
    /// Pod-provided lxcfs files are kept current too: every container needs lxcfs.
    pub adopt: bool,
}

/// The agent's state.
#[derive(Debug)]
pub struct State {
    config: StateConfig,
    pods_listed: bool,
    namespaces_listed: bool,
    /// By uid.
    pods: HashMap<String, PodState>,
    namespace_labels: HashMap<String, Labels>,
    containers: Containers,
    unconfirmed: HashMap<ContainerId, Unconfirmed>,
    lxcfs: LxcfsState,
    /// The first and the last failed search of an outage; `None` once lxcfs is found.
    missing: Option<(Instant, Instant)>,
    /// Sweeps in progress. A sweep selects by device number, and a new lxcfs may have that of the
    /// exited one, so nothing is injected during a sweep.
    sweeps: usize,
    events: Vec<PodEvent>,
    namespace_events: Vec<NamespaceEvent>,
    /// The invalid label of each namespace that an event reported.
    reported_labels: HashMap<String, String>,
    latencies: Vec<(Trigger, Duration)>,
}

impl State {
    pub fn new(config: StateConfig) -> State {
        State {
            namespaces_listed: !config.has_namespaces,
            config,
            pods_listed: false,
            pods: HashMap::new(),
            namespace_labels: HashMap::new(),
            containers: Containers::default(),
            unconfirmed: HashMap::new(),
            lxcfs: LxcfsState::Available,
            missing: None,
            sweeps: 0,
            events: Vec::new(),
            namespace_events: Vec::new(),
            reported_labels: HashMap::new(),
            latencies: Vec::new(),
        }
    }

    /// Takes an update from a source.
    pub fn update(&mut self, update: Update, now: Instant) {
        match update {
            Update::PodsReplaced(pods) => self.replace_pods(pods, now),
            Update::PodApplied(pod) => {
                let uid = pod.uid.clone();
                self.apply_pod(pod);
                self.prune_pods();
                self.update_desired(&uid, now);
            }
            Update::PodDeleted(uid) => {
                self.pods.remove(&uid);
                self.unconfirmed.retain(|_, unconfirmed| unconfirmed.pod != uid);
                self.containers.retain(|_, c| c.pod != uid || c.in_flight.is_some());
            }
            Update::NamespacesReplaced(namespaces) => {
                self.namespaces_listed = true;
                self.namespace_labels =
                    namespaces.into_iter().map(|n| (n.name, n.labels)).collect();
                self.forget_changed_labels();
                self.update_desired_where(|_| true, now);
            }
            Update::NamespaceApplied(namespace) => {
                self.namespace_labels.insert(namespace.name.clone(), namespace.labels);
                self.forget_changed_labels();
                self.update_desired_where(|pod| pod.namespace == namespace.name, now);
            }
            Update::NamespaceDeleted(name) => {
                self.namespace_labels.remove(&name);
                self.forget_changed_labels();
                self.update_desired_where(|pod| pod.namespace == name, now);
            }
            Update::ContainerStarted(container, trigger) => {
                self.container_started(container, trigger, now);
            }
            Update::ContainerStopped(id) => self.container_stopped(&id),
            Update::ContainersListed { containers, trigger, requested_at } => {
                let listed: HashSet<&ContainerId> = containers.iter().map(|c| &c.id).collect();
                // A container that started after the request may be missing in the list.
                let stopped = |(id, unconfirmed): &(&ContainerId, &Unconfirmed)| {
                    unconfirmed.triggered.1 < requested_at && !listed.contains(id)
                };
                let stopped: Vec<ContainerId> =
                    self.unconfirmed.iter().filter(stopped).map(|(id, _)| id.clone()).collect();
                stopped.iter().for_each(|id| self.container_stopped(id));
                containers.into_iter().for_each(|c| self.container_started(c, trigger, now));
            }
        }
    }

    /// Makes a label that is invalid again be reported again.
    fn forget_changed_labels(&mut self) {
        let labels = &self.namespace_labels;
        self.reported_labels.retain(|namespace, reported| {
            labels.get(namespace).and_then(|labels| labels.get(INJECT_KEY)) == Some(reported)
        });
    }

    fn replace_pods(&mut self, pods: Vec<Pod>, now: Instant) {
        self.pods_listed = true;
        let listed: HashSet<&str> = pods.iter().map(|p| p.uid.as_str()).collect();
        self.pods.values_mut().for_each(|p| p.seen_by_watch = listed.contains(p.pod.uid.as_str()));
        let unconfirmed = &self.unconfirmed;
        self.containers.retain(|id, c| {
            listed.contains(c.pod.as_str()) || c.in_flight.is_some() || unconfirmed.contains_key(id)
        });
        pods.into_iter().for_each(|pod| self.apply_pod(pod));
        self.prune_pods();
        self.update_desired_where(|_| true, now);
    }

    /// Takes a pod from the watch.
    fn apply_pod(&mut self, pod: Pod) {
        for container in &pod.containers {
            let Some(id) = &container.id else { continue };
            // A static pod has different uids at the API server and at the runtime.
            if let Some(known) = self.containers.get_mut(id) {
                known.pod.clone_from(&pod.uid);
            }
            // Earlier starts of the same container have stopped, even if no stop was reported.
            if let Some(Unconfirmed { triggered: (_, at), .. }) = self.unconfirmed.remove(id) {
                self.unconfirmed.retain(|_, unconfirmed| {
                    unconfirmed.pod != pod.uid
                        || unconfirmed.name != container.name
                        || unconfirmed.triggered.1 > at
                });
            }
        }
        match self.pods.get_mut(&pod.uid) {
            Some(known) => (known.pod, known.seen_by_watch) = (pod, true),
            None => drop(self.pods.insert(pod.uid.clone(), PodState::new(pod, true))),
        }
    }

    fn container_started(&mut self, started: StartedContainer, trigger: Trigger, now: Instant) {
        let StartedContainer { pod, name, id, pid } = started;
        if let Some(known) = self.containers.get_mut(&id) {
            // Another source reported it first. If the runtime did not know its process then, it
            // does now, and an operation in flight may have failed for that.
            if pid.is_some() && known.pid != pid {
                known.pid = pid;
                known.requeue();
            }
            known.retry = None;
            return;
        }
        let uid = pod.uid.clone();
        self.pods.entry(uid.clone()).or_insert_with(|| PodState::new(pod, false));
        self.unconfirmed
            .insert(id, Unconfirmed { pod: uid.clone(), name, pid, triggered: (trigger, now) });
        self.update_desired(&uid, now);
    }

    /// Removes an unconfirmed container. Others are removed with their pod by the watch.
    fn container_stopped(&mut self, id: &ContainerId) {
        if self.unconfirmed.remove(id).is_some() {
            if self.containers.get(id).is_some_and(|c| c.in_flight.is_none()) {
                self.containers.remove(id);
            }
            self.prune_pods();
        }
    }

    /// Removes pods that neither the watch nor an unconfirmed container refers to.
    fn prune_pods(&mut self) {
        let unconfirmed: HashSet<&str> =
            self.unconfirmed.values().map(|c| c.pod.as_str()).collect();
        self.pods.retain(|uid, pod| pod.seen_by_watch || unconfirmed.contains(uid.as_str()));
    }

    fn update_desired_where(&mut self, select: impl Fn(&Pod) -> bool, now: Instant) {
        let selected = self.pods.iter().filter(|(_, pod)| select(&pod.pod));
        let uids: Vec<String> = selected.map(|(uid, _)| uid.clone()).collect();
        uids.iter().for_each(|uid| self.update_desired(uid, now));
    }

    /// Decides about the containers of a pod.
    fn update_desired(&mut self, uid: &str, now: Instant) {
        let Some(PodState { pod, invalid, nesting, seen_by_watch, .. }) = self.pods.get_mut(uid)
        else {
            return;
        };
        // The runtime knows the annotations at the pod's creation: if they decide, no list is
        // needed.
        if !self.namespaces_listed && (*seen_by_watch || pod.annotations.inject.is_none()) {
            return;
        }
        let mut containers: Vec<(&str, Option<&ContainerId>)> =
            pod.containers.iter().map(|c| (c.name.as_str(), c.id.as_ref())).collect();
        let unconfirmed = self.unconfirmed.iter().filter(|(_, c)| c.pod == uid);
        containers.extend(unconfirmed.map(|(id, c)| (c.name.as_str(), Some(id))));
        let mut names: Vec<&str> = containers.iter().map(|(name, _)| *name).collect();
        if !*seen_by_watch {
            // The runtime does not report a pod's containers in advance, so any name is taken as
            // valid.
            names.extend(
                pod.annotations.containers.iter().flat_map(|all| all.split(',')).map(str::trim),
            );
        }
        names.sort_unstable();
        names.dedup();
        let of_namespace = self.namespace_labels.get(&pod.namespace);
        let decision = policy::decide_for(&self.config.scope, pod, of_namespace, &names);
        if *seen_by_watch && *invalid != decision.invalid {
            let mut of_pod = Vec::new();
            for one in &decision.invalid {
                let InvalidAnnotation::NamespaceLabel(value) = one else {
                    of_pod.push(one.to_string());
                    continue;
                };
                // Once on the namespace, not on each of its pods.
                if self.reported_labels.get(&pod.namespace) != Some(value) {
                    let (namespace, value) = (pod.namespace.clone(), value.clone());
                    self.reported_labels.insert(namespace.clone(), value.clone());
                    let note = one.to_string();
                    self.namespace_events.push(NamespaceEvent { namespace, value, note });
                }
            }
            if !of_pod.is_empty() {
                let note = of_pod.join("; ");
                let pod = pod_events::reference(pod);
                self.events.push(PodEvent { pod, reason: Reason::LxcfsInvalidAnnotation, note });
            }
            *invalid = decision.invalid;
        }
        if *nesting != decision.nesting {
            if !decision.nesting.is_empty() {
                self.events.push(pod_events::nesting(pod, &decision.nesting));
            }
            *nesting = decision.nesting;
        }
        let running: HashSet<&ContainerId> = containers.iter().filter_map(|(_, id)| *id).collect();
        self.containers
            .retain(|id, c| c.pod != uid || running.contains(id) || c.in_flight.is_some());
        for (name, id) in containers {
            let (Some(id), Some(desired)) = (id, decision.by_container.get(name)) else { continue };
            let desired = match *desired {
                desired if *seen_by_watch => desired,
                // The annotations may have changed since the pod's creation: they inject, and never
                // remove.
                DesiredView::Exactly(files) => DesiredView::AtLeast(files),
                _ => DesiredView::Unmanaged,
            };
            let unconfirmed = self.unconfirmed.get(id);
            let known = self.containers.get_or_insert_with(id, || Container {
                pod: uid.to_owned(),
                name: name.to_owned(),
                adopt: self.config.adopt,
                desired,
                applied: None,
                in_flight: None,
                adoption_pending: false,
                skips_writable: false,
                retry: None,
                reported_error: None,
                pid: unconfirmed.and_then(|c| c.pid),
                triggered: Some(unconfirmed.map_or((Trigger::Watch, now), |c| c.triggered)),
            });
            if known.desired != desired {
                known.desired = desired;
                known.retry = None;
                known.reported_error = None;
                known.adoption_pending = false;
                known.triggered = Some((Trigger::Watch, now));
            }
        }
    }

    /// The operations to start at `now`. Each counts as in flight until [`State::completed`].
    pub fn poll_operations(&mut self, now: Instant) -> Vec<Operation> {
        let mut operations = Vec::new();
        let usable = self.lxcfs_usable(now);
        let pods = &self.pods;
        self.containers.settle();
        self.containers.for_each_active(|id, c| {
            let waits = c.retry.is_some_and(|(_, at)| at > now) || (c.waits_for_lxcfs() && !usable);
            if !c.needs_reconcile() || waits {
                return;
            }
            let Some(pod) = pods.get(&c.pod) else { return };
            let with_lxcfs = usable && (c.needs_lxcfs() || c.adopt);
            c.in_flight = Some(InFlight { desired: c.desired, with_lxcfs, dirty: false });
            let name = format!("{}/{}/{}", pod.pod.namespace, pod.pod.name, c.name);
            let (id, desired, pid) = (id.clone(), c.desired, c.pid);
            operations.push(Operation { id, desired, name, pid, with_lxcfs });
        });
        operations
    }

    /// When [`State::poll_operations`] has new operations, if there is no input before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let due = |c: &Container| {
            let retry = c.retry.map(|(_, at)| at);
            if !c.needs_reconcile() {
                None
            } else if !c.waits_for_lxcfs() {
                retry
            } else if self.sweeps > 0 {
                // Its end is an input.
                None
            } else {
                match self.lxcfs {
                    LxcfsState::Available => retry,
                    LxcfsState::Absent { retry_at, .. } => retry.max(Some(retry_at)),
                }
            }
        };
        self.containers.active().filter_map(due).min()
    }

    /// Whether an operation on the container is in flight or starts soon: a blocked start waits for
    /// it. No start waits for an lxcfs that does not serve.
    pub fn is_pending(&self, id: &ContainerId) -> bool {
        let available = self.lxcfs == LxcfsState::Available;
        self.containers.get(id).is_some_and(|c| {
            let startable = c.needs_reconcile() && c.retry.is_none();
            (c.in_flight.is_some() || startable) && (available || !c.needs_lxcfs())
        })
    }

    /// A blocked start of the container was released before its operation had finished. Returns
    /// whether a view is desired: the container may have read the node's values. A missing lxcfs
    /// releases starts too, which [`State::lxcfs_searched`] reports.
    pub fn start_timed_out(&mut self, id: &ContainerId) -> bool {
        let Some(c) = self.containers.get(id) else { return false };
        let Some(pod) = self.pods.get_mut(&c.pod) else { return false };
        let late = c.needs_lxcfs() && self.lxcfs == LxcfsState::Available;
        if late {
            pod.report.add_late(&c.name);
            self.flush_reports();
        }
        late
    }

    /// Takes the completion of an operation.
    pub fn completed(&mut self, id: &ContainerId, completion: Completion, now: Instant) {
        let report_lxcfs = self.reports_missing_lxcfs(now);
        let Some(c) = self.containers.get_mut(id) else { return };
        let Some(in_flight) = c.in_flight else { return };
        let Some(pod) = self.pods.get_mut(&c.pod) else {
            // The pod was deleted during the operation. A hung one is kept, so that no second one
            // starts.
            if !matches!(completion, Completion::TimedOut { .. }) {
                self.containers.remove(id);
            }
            return;
        };
        self.latencies.extend(c.complete(
            in_flight,
            completion,
            &mut pod.report,
            report_lxcfs,
            now,
        ));
        let known = self.unconfirmed.contains_key(id)
            || pod.pod.containers.iter().any(|c| c.id.as_ref() == Some(id));
        if c.in_flight.is_none() && !known {
            self.containers.remove(id);
        }
        self.flush_reports();
    }

    /// Queues one of so many parts of the containers again. A view that is as desired stays.
    pub fn resync(&mut self, part: u32, parts: u32) {
        self.containers.part_mut(part, parts).for_each(|c| c.applied = None);
    }

    /// The events since the last call.
    pub fn take_events(&mut self) -> Vec<PodEvent> {
        std::mem::take(&mut self.events)
    }

    /// The events about namespaces since the last call.
    pub fn take_namespace_events(&mut self) -> Vec<NamespaceEvent> {
        std::mem::take(&mut self.namespace_events)
    }

    /// The latencies of the views that were injected since the last call, each from its first
    /// trigger.
    pub fn take_latencies(&mut self) -> Vec<(Trigger, Duration)> {
        std::mem::take(&mut self.latencies)
    }

    /// The reason why nothing can be decided yet.
    pub fn not_ready_reason(&self) -> Option<&'static str> {
        match (self.pods_listed, self.namespaces_listed) {
            (false, _) => Some("pods not listed yet"),
            (true, false) => Some("namespaces not listed yet"),
            (true, true) => None,
        }
    }

    /// The containers with a desired view, and those of pods with invalid annotations.
    pub fn snapshot(&self) -> Vec<ContainerStatus> {
        let status = |(id, c): (&ContainerId, &Container)| {
            let pod = self.pods.get(&c.pod)?;
            c.status(id, &pod.pod, !pod.invalid.is_empty())
        };
        self.containers.iter().filter_map(status).collect()
    }

    /// Whether every view is as desired, or waits for a retry.
    pub fn is_idle(&self) -> bool {
        let waits = |c: &Container| c.in_flight.is_none() && c.waits_for_retry();
        self.containers.active().all(|c| c.is_at_rest() || waits(c))
    }

    /// The number of operations in flight.
    pub fn in_flight(&self) -> usize {
        self.containers.active().filter(|c| c.in_flight.is_some()).count()
    }

    /// Turns the reports of pods without an operation in flight into events.
    fn flush_reports(&mut self) {
        let reported: Vec<&mut PodState> =
            self.pods.values_mut().filter(|pod| !pod.report.is_empty()).collect();
        if reported.is_empty() {
            return;
        }
        let in_flight = self
            .containers
            .active()
            .filter(|c| c.in_flight.is_some() && c.reported_error.is_none());
        let busy: HashSet<&str> = in_flight.map(|c| c.pod.as_str()).collect();
        for PodState { pod, report, .. } in reported {
            if !busy.contains(pod.uid.as_str()) {
                self.events.extend(std::mem::take(report).into_events(pod));
            }
        }
    }
}

impl PodState {
    fn new(pod: Pod, seen_by_watch: bool) -> PodState {
        let report = PodReport::default();
        PodState { pod, invalid: Vec::new(), nesting: Vec::new(), report, seen_by_watch }
    }
}

#[cfg(test)]
mod tests;
