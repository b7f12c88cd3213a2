//! The metrics (docs/reference.md): those of the agent here, those of the supervisor in
//! [`supervisor`].

/// The labels. Wrappers, because the values are of the model, which knows nothing of metrics.
macro_rules! label_values {
    ($label:ident($type:ty) { $($value:ident => $name:literal),* $(,)? }) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        struct $label($type);

        impl EncodeLabelValue for $label {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
                match self.0 { $(<$type>::$value => $name),* }.encode(encoder)
            }
        }
    };
}

pub mod exposition;
mod process;
pub mod supervisor;

use std::{
    sync::{Arc, OnceLock, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::model::{
    pod::Trigger,
    status::{ContainerState, FailureReason, Operation},
};
use prometheus_client::{
    encoding::{
        EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder, MetricEncoder,
        text::encode,
    },
    metrics::{
        MetricType, TypedMetric, counter::Counter, family::Family, gauge::Gauge,
        histogram::Histogram, info::Info,
    },
    registry::{Registry, Unit},
};

use self::{exposition::Format, process::ProcessCollector};

/// The prefix of every name but those of [`process`].
const PREFIX: &str = "kube_lxcfs";

/// The result of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperationResult {
    Success,
    Failure,
}

/// The state of a container's view, by its worst file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ViewState {
    Current,
    Stale,
    Dead,
}

/// A source of pods or namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Watched {
    Pods,
    Namespaces,
}

impl Watched {
    /// Its name in the log.
    pub fn name(self) -> &'static str {
        match self {
            Watched::Pods => "pods",
            Watched::Namespaces => "namespaces",
        }
    }
}

/// The reason why an Event was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// Too many Events wait for the API server.
    QueueFull,
    /// The API server refused it.
    Refused,
    /// The API server was unavailable for too long.
    Deadline,
}

label_values!(ViewStateValue(ViewState) {
    Current => "current",
    Stale => "stale",
    Dead => "dead",
});
label_values!(WatchedValue(Watched) { Pods => "pods", Namespaces => "namespaces" });
label_values!(DropReasonValue(DropReason) {
    QueueFull => "queue_full",
    Refused => "refused",
    Deadline => "deadline",
});
label_values!(FailureReasonValue(FailureReason) {
    InvalidAnnotation => "invalid_annotation",
    Unsupported => "unsupported_runtime",
    FilesSkipped => "files_skipped",
    NoLxcfs => "no_lxcfs",
    TimedOut => "timed_out",
    StepFailed => "step_failed",
});
label_values!(StateValue(ContainerState) {
    Injected => "injected",
    Pending => "pending",
    Failed => "failed",
    Skipped => "skipped",
});
label_values!(OperationValue(Operation) {
    Inject => "inject",
    Remove => "remove",
    Remount => "remount",
});
label_values!(ResultValue(OperationResult) { Success => "success", Failure => "failure" });
label_values!(TriggerValue(Trigger) { Nri => "nri", Cri => "cri", Watch => "watch" });

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: StateValue,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    operation: OperationValue,
    result: ResultValue,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabel {
    operation: OperationValue,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TriggerLabel {
    trigger: TriggerValue,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    state: StateValue,
    reason: FailureReasonValue,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ViewStateLabel {
    state: ViewStateValue,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WatchedLabel {
    source: WatchedValue,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DropReasonLabel {
    reason: DropReasonValue,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LxcfsLabels {
    version: String,
    cgroup: &'static str,
}

/// A metric without labels that is missing until it has a value.
#[derive(Clone, Debug)]
struct Optional<M>(Arc<OnceLock<M>>);

impl<M> Default for Optional<M> {
    fn default() -> Optional<M> {
        Optional(Arc::default())
    }
}

impl<M: Default> Optional<M> {
    fn get_or_create(&self) -> &M {
        self.0.get_or_init(M::default)
    }
}

impl<M: EncodeMetric + TypedMetric> EncodeMetric for Optional<M> {
    fn encode(&self, encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.0.get().map_or(Ok(()), |metric| metric.encode(encoder))
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }

    fn is_empty(&self) -> bool {
        self.0.get().is_none()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CheckLabels {
    check: &'static str,
    verdict: &'static str,
}

/// From 0.5 ms to 16 s.
fn seconds() -> Histogram {
    Histogram::new(prometheus_client::metrics::histogram::exponential_buckets(0.0005, 2.0, 16))
}

/// All metrics. The agent's loop sets their values.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    containers: Family<StateLabel, Gauge>,
    operations: Family<OperationLabels, Counter>,
    durations: Family<OperationLabel, Histogram, fn() -> Histogram>,
    latencies: Family<TriggerLabel, Histogram, fn() -> Histogram>,
    late_starts: Counter,
    events_suppressed: Counter,
    sweep_failures: Counter,
    node_supported: Gauge,
    lxcfs_up: Gauge,
    lxcfs_info: Family<LxcfsLabels, Gauge>,
    lxcfs_restarts: Counter,
    lxcfs_probes: Histogram,
    remount_passes: Histogram,
    containers_without_view: Family<FailureLabels, Gauge>,
    views: Family<ViewStateLabel, Gauge>,
    workers_hung: Gauge,
    events_dropped: Family<DropReasonLabel, Counter>,
    nri_connected: Optional<Gauge>,
    runtime_up: Optional<Gauge>,
    watch_errors: Family<WatchedLabel, Counter>,
    last_sync: Optional<Gauge<f64, AtomicU64>>,
    checks: Family<CheckLabels, Gauge>,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut metrics = Metrics {
            registry: Registry::default(),
            containers: Family::default(),
            operations: Family::default(),
            durations: Family::new_with_constructor(seconds),
            latencies: Family::new_with_constructor(seconds),
            late_starts: Counter::default(),
            events_suppressed: Counter::default(),
            sweep_failures: Counter::default(),
            node_supported: Gauge::default(),
            lxcfs_up: Gauge::default(),
            lxcfs_info: Family::default(),
            lxcfs_restarts: Counter::default(),
            lxcfs_probes: seconds(),
            remount_passes: seconds(),
            containers_without_view: Family::default(),
            views: Family::default(),
            workers_hung: Gauge::default(),
            events_dropped: Family::default(),
            nri_connected: Optional::default(),
            runtime_up: Optional::default(),
            watch_errors: Family::default(),
            last_sync: Optional::default(),
            checks: Family::default(),
        };
        let mut registry = Registry::default();
        registry.register_collector(Box::new(ProcessCollector));
        let prefixed = registry.sub_registry_with_prefix(PREFIX);
        metrics.register_views(prefixed);
        metrics.register_lxcfs(prefixed);
        metrics.register_agent(prefixed);
        metrics.registry = registry;
        // A counter that appears with its first increment hides it from rate().
        for source in [Watched::Pods, Watched::Namespaces] {
            let label = WatchedLabel { source: WatchedValue(source) };
            metrics.watch_errors.get_or_create(&label).inc_by(0);
        }
        for reason in [DropReason::QueueFull, DropReason::Refused, DropReason::Deadline] {
            let label = DropReasonLabel { reason: DropReasonValue(reason) };
            metrics.events_dropped.get_or_create(&label).inc_by(0);
        }
        metrics.node_supported.set(1);
        metrics
    }
}

impl Metrics {
    /// The metrics of containers and their views.
    fn register_views(&self, registry: &mut Registry) {
        registry.register(
            "containers",
            "Containers with a desired view, by state",
            self.containers.clone(),
        );
        registry.register("operations", "Operations on views, by result", self.operations.clone());
        registry.register_with_unit(
            "operation_duration",
            "Duration of an operation on a container's view, in seconds",
            Unit::Seconds,
            self.durations.clone(),
        );
        registry.register_with_unit(
            "injection_latency",
            "Time from the first trigger until the view is mounted, in seconds",
            Unit::Seconds,
            self.latencies.clone(),
        );
        registry.register(
            "late_starts",
            "Containers that started before their view was injected, though NRI announced them",
            self.late_starts.clone(),
        );
        registry.register(
            "sweep_failures",
            "Mount namespaces that a sweep skipped, or in which it failed to remove dead views",
            self.sweep_failures.clone(),
        );
        registry.register_with_unit(
            "remount_pass_duration",
            "Duration of a remount pass, from the start of another lxcfs until every view was \
             current, in seconds",
            Unit::Seconds,
            self.remount_passes.clone(),
        );
        registry.register(
            "containers_without_view",
            "Containers in the states failed and skipped, by reason",
            self.containers_without_view.clone(),
        );
        registry.register(
            "views",
            "Containers that have a view, by the state of its worst file",
            self.views.clone(),
        );
        registry.register(
            "workers_hung",
            "Threads that mount and that hang beyond their deadline",
            self.workers_hung.clone(),
        );
        registry.register_with_unit(
            "last_sync_timestamp",
            "Last time at which no container waited for an operation, in seconds since 1970",
            Unit::Seconds,
            self.last_sync.clone(),
        );
    }

    /// The metrics of the serving lxcfs.
    fn register_lxcfs(&self, registry: &mut Registry) {
        registry.register("lxcfs_up", "1 while lxcfs serves, else 0", self.lxcfs_up.clone());
        registry.register(
            "lxcfs_info",
            "Version of the serving lxcfs and the node's cgroup version, always 1",
            self.lxcfs_info.clone(),
        );
        registry.register(
            "lxcfs_restarts",
            "Starts of another lxcfs since the agent started",
            self.lxcfs_restarts.clone(),
        );
        registry.register_with_unit(
            "lxcfs_probe_duration",
            "Duration of a search for lxcfs that opens its files and reads one, in seconds",
            Unit::Seconds,
            self.lxcfs_probes.clone(),
        );
    }

    /// The metrics of the node, and of what the agent connects to.
    fn register_agent(&self, registry: &mut Registry) {
        let build = [("version", env!("CARGO_PKG_VERSION")), ("revision", revision())];
        registry.register(
            "events_suppressed",
            "Events that were not created because their pod has too many",
            self.events_suppressed.clone(),
        );
        registry.register(
            "node_supported",
            "0 if the node's kernel is too old, so that nothing is mounted, else 1",
            self.node_supported.clone(),
        );
        registry.register(
            "events_dropped",
            "Events that were lost before the API server had them, by reason",
            self.events_dropped.clone(),
        );
        registry.register(
            "nri_connected",
            "1 while the runtime has registered the NRI plugin, else 0; missing without NRI",
            self.nri_connected.clone(),
        );
        registry.register(
            "runtime_up",
            "1 if the runtime responded over CRI, else 0; missing if CRI is not used",
            self.runtime_up.clone(),
        );
        registry.register(
            "watch_errors",
            "Failed requests for pods and namespaces, by source",
            self.watch_errors.clone(),
        );
        registry.register(
            "check",
            "Result of a check of the node's prerequisites, always 1",
            self.checks.clone(),
        );
        registry.register("build", "Version and revision of the agent", Info::new(build));
    }
}

/// The commit of the build, if `KUBE_LXCFS_REVISION` was set then.
pub fn revision() -> &'static str {
    option_env!("KUBE_LXCFS_REVISION").unwrap_or("unknown")
}

impl Metrics {
    pub fn set_containers(&self, count: impl Fn(ContainerState) -> usize) {
        for state in ContainerState::ALL {
            let label = StateLabel { state: StateValue(state) };
            self.containers.get_or_create(&label).set(gauge(count(state)));
        }
    }

    pub fn operation_finished(
        &self,
        operation: Operation,
        result: OperationResult,
        elapsed: Duration,
    ) {
        let (operation, result) = (OperationValue(operation), ResultValue(result));
        self.operations.get_or_create(&OperationLabels { operation, result }).inc();
        self.durations.get_or_create(&OperationLabel { operation }).observe(elapsed.as_secs_f64());
    }

    pub fn injected(&self, trigger: Trigger, elapsed: Duration) {
        self.latencies
            .get_or_create(&TriggerLabel { trigger: TriggerValue(trigger) })
            .observe(elapsed.as_secs_f64());
    }

    pub fn start_was_late(&self) {
        self.late_starts.inc();
    }

    pub fn event_suppressed(&self) {
        self.events_suppressed.inc();
    }

    /// A sweep failed in this many mount namespaces.
    pub fn sweep_finished(&self, failures: usize) {
        self.sweep_failures.inc_by(failures as u64);
    }

    pub fn set_node_supported(&self, supported: bool) {
        self.node_supported.set(i64::from(supported));
    }

    pub fn set_lxcfs_up(&self, up: bool) {
        self.lxcfs_up.set(i64::from(up));
    }

    /// The version of the serving lxcfs, and the node's cgroup version; `None` if it is not known,
    /// or none serves.
    pub fn set_lxcfs_version(&self, version: Option<(String, &'static str)>) {
        self.lxcfs_info.clear();
        if let Some((version, cgroup)) = version {
            self.lxcfs_info.get_or_create(&LxcfsLabels { version, cgroup }).set(1);
        }
    }

    pub fn lxcfs_restarted(&self) {
        self.lxcfs_restarts.inc();
    }

    pub fn lxcfs_probed(&self, elapsed: Duration) {
        self.lxcfs_probes.observe(elapsed.as_secs_f64());
    }

    pub fn remount_pass_finished(&self, elapsed: Duration) {
        self.remount_passes.observe(elapsed.as_secs_f64());
    }

    /// The containers in the states failed and skipped.
    pub fn set_containers_without_view(
        &self,
        count: impl Fn(ContainerState, FailureReason) -> usize,
    ) {
        for state in [ContainerState::Failed, ContainerState::Skipped] {
            for reason in FailureReason::ALL {
                let count = gauge(count(state, reason));
                let labels =
                    FailureLabels { state: StateValue(state), reason: FailureReasonValue(reason) };
                self.containers_without_view.get_or_create(&labels).set(count);
            }
        }
    }

    pub fn set_views(&self, count: impl Fn(ViewState) -> usize) {
        for state in [ViewState::Current, ViewState::Stale, ViewState::Dead] {
            let label = ViewStateLabel { state: ViewStateValue(state) };
            self.views.get_or_create(&label).set(gauge(count(state)));
        }
    }

    pub fn set_workers_hung(&self, count: usize) {
        self.workers_hung.set(gauge(count));
    }

    pub fn event_dropped(&self, reason: DropReason) {
        self.events_dropped
            .get_or_create(&DropReasonLabel { reason: DropReasonValue(reason) })
            .inc();
    }

    pub fn set_nri_connected(&self, connected: bool) {
        self.nri_connected.get_or_create().set(i64::from(connected));
    }

    pub fn set_runtime_up(&self, up: bool) {
        self.runtime_up.get_or_create().set(i64::from(up));
    }

    pub fn watch_failed(&self, source: Watched) {
        self.watch_errors.get_or_create(&WatchedLabel { source: WatchedValue(source) }).inc();
    }

    /// No container waits for an operation at this time.
    pub fn synced(&self) {
        if let Ok(now) = SystemTime::now().duration_since(UNIX_EPOCH) {
            self.last_sync.get_or_create().set(now.as_secs_f64());
        }
    }

    /// The verdict of each check of the node.
    pub fn set_checks(&self, checks: impl Iterator<Item = (&'static str, &'static str)>) {
        self.checks.clear();
        for (check, verdict) in checks {
            self.checks.get_or_create(&CheckLabels { check, verdict }).set(1);
        }
    }

    /// The text of all metrics.
    pub fn text(&self, format: Format) -> String {
        text(&self.registry, format)
    }
}

/// The text of the metrics of a registry.
fn text(registry: &Registry, format: Format) -> String {
    let mut text = String::new();
    // Writing into a string cannot fail.
    let _ = encode(&mut text, registry);
    format.from_openmetrics(text)
}

/// The value of a gauge that counts.
fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_those_of_the_reference() {
        let metrics = Metrics::default();
        metrics.set_containers(|state| usize::from(state == ContainerState::Injected));
        metrics.operation_finished(
            Operation::Inject,
            OperationResult::Success,
            Duration::from_millis(2),
        );
        metrics.injected(Trigger::Nri, Duration::from_millis(3));
        metrics.start_was_late();
        metrics.event_suppressed();
        metrics.sweep_finished(2);
        metrics.set_lxcfs_up(true);
        metrics.set_lxcfs_version(Some(("6.0.4".into(), "v1")));
        metrics.set_lxcfs_version(Some(("7.0.0".into(), "v2")));
        metrics.lxcfs_restarted();
        metrics.remount_pass_finished(Duration::from_millis(250));
        metrics.lxcfs_probed(Duration::from_millis(1));
        metrics.set_containers_without_view(|_, reason| {
            usize::from(reason == FailureReason::TimedOut)
        });
        metrics.set_views(|state| usize::from(state == ViewState::Dead));
        metrics.set_workers_hung(3);
        metrics.event_dropped(DropReason::Refused);
        metrics.watch_failed(Watched::Pods);
        let text = metrics.text(Format::OpenMetrics);
        assert!(!text.contains("nri_connected 0") && !text.contains("runtime_up 0"), "{text}");
        metrics.set_nri_connected(true);
        metrics.set_runtime_up(false);
        metrics.synced();
        metrics.set_checks([("kernel", "fail")].into_iter());
        metrics.set_checks([("kernel", "ok"), ("cri", "warn")].into_iter());
        let text = metrics.text(Format::OpenMetrics);
        for line in [
            "kube_lxcfs_containers{state=\"injected\"} 1",
            "kube_lxcfs_containers{state=\"skipped\"} 0",
            "kube_lxcfs_operations_total{operation=\"inject\",result=\"success\"} 1",
            "kube_lxcfs_operation_duration_seconds_count{operation=\"inject\"} 1",
            "kube_lxcfs_injection_latency_seconds_count{trigger=\"nri\"} 1",
            "kube_lxcfs_late_starts_total 1",
            "kube_lxcfs_events_suppressed_total 1",
            "kube_lxcfs_sweep_failures_total 2",
            "kube_lxcfs_node_supported 1",
            "kube_lxcfs_lxcfs_up 1",
            "kube_lxcfs_lxcfs_info{version=\"7.0.0\",cgroup=\"v2\"} 1",
            "kube_lxcfs_lxcfs_restarts_total 1",
            "kube_lxcfs_remount_pass_duration_seconds_sum 0.25",
            "kube_lxcfs_remount_pass_duration_seconds_bucket{le=\"0.256\"} 1",
            "kube_lxcfs_lxcfs_probe_duration_seconds_count 1",
            "kube_lxcfs_containers_without_view{state=\"failed\",reason=\"timed_out\"} 1",
            "kube_lxcfs_containers_without_view{state=\"skipped\",reason=\"files_skipped\"} 0",
            "kube_lxcfs_views{state=\"dead\"} 1",
            "kube_lxcfs_views{state=\"current\"} 0",
            "kube_lxcfs_workers_hung 3",
            "kube_lxcfs_events_dropped_total{reason=\"refused\"} 1",
            "kube_lxcfs_events_dropped_total{reason=\"deadline\"} 0",
            "kube_lxcfs_watch_errors_total{source=\"pods\"} 1",
            "kube_lxcfs_nri_connected 1",
            "kube_lxcfs_runtime_up 0",
            "kube_lxcfs_check{check=\"kernel\",verdict=\"ok\"} 1",
            "kube_lxcfs_check{check=\"cri\",verdict=\"warn\"} 1",
            "kube_lxcfs_last_sync_timestamp_seconds ",
            "process_cpu_seconds_total ",
            "process_start_time_seconds ",
            "process_resident_memory_bytes ",
            "process_open_fds ",
            "process_max_fds ",
            "kube_lxcfs_build_info{version=\"",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        assert!(!text.contains("6.0.4") && !text.contains("verdict=\"fail\""), "{text}");
    }
}
