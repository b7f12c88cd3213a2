//! The agent's metrics (docs/reference.md), in OpenMetrics.

use std::time::Duration;

use crate::model::{
    pod::Trigger,
    status::{ContainerState, Operation},
};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};

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

/// The result of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperationResult {
    Success,
    Failure,
}

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
struct VersionLabel {
    version: String,
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
    lxcfs_info: Family<VersionLabel, Gauge>,
    lxcfs_restarts: Counter,
    remount_pass: Gauge<f64, std::sync::atomic::AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut metrics = Metrics {
            registry: Registry::with_prefix("kube_lxcfs"),
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
            remount_pass: Gauge::default(),
        };
        let build = [("version", env!("CARGO_PKG_VERSION")), ("revision", revision())];
        let registry = &mut metrics.registry;
        registry.register(
            "containers",
            "Containers with a desired view, by state",
            metrics.containers.clone(),
        );
        registry.register(
            "operations",
            "Operations on views, by result",
            metrics.operations.clone(),
        );
        registry.register_with_unit(
            "operation_duration",
            "Duration of an operation on a container's view, in seconds",
            Unit::Seconds,
            metrics.durations.clone(),
        );
        registry.register_with_unit(
            "injection_latency",
            "Time from the first trigger until the view is mounted, in seconds",
            Unit::Seconds,
            metrics.latencies.clone(),
        );
        registry.register(
            "late_starts",
            "Containers that started before their view was injected, though NRI announced them",
            metrics.late_starts.clone(),
        );
        registry.register(
            "events_suppressed",
            "Events that were not created because their pod has too many",
            metrics.events_suppressed.clone(),
        );
        registry.register(
            "sweep_failures",
            "Mount namespaces that a sweep skipped, or in which it failed to remove dead views",
            metrics.sweep_failures.clone(),
        );
        registry.register(
            "node_supported",
            "0 if the node's kernel is too old, so that nothing is mounted, else 1",
            metrics.node_supported.clone(),
        );
        metrics.node_supported.set(1);
        registry.register("lxcfs_up", "1 while lxcfs serves, else 0", metrics.lxcfs_up.clone());
        registry.register(
            "lxcfs_info",
            "Version of the serving lxcfs, always 1",
            metrics.lxcfs_info.clone(),
        );
        registry.register(
            "lxcfs_restarts",
            "Starts of another lxcfs since the agent started",
            metrics.lxcfs_restarts.clone(),
        );
        registry.register_with_unit(
            "remount_pass_duration",
            "Duration of the last remount pass, from the start of another lxcfs until every view \
             was current, in seconds",
            Unit::Seconds,
            metrics.remount_pass.clone(),
        );
        registry.register("build", "Version and revision of the agent", Info::new(build));
        metrics
    }
}

/// The commit of the build, if `KUBE_LXCFS_REVISION` was set then.
pub fn revision() -> &'static str {
    option_env!("KUBE_LXCFS_REVISION").unwrap_or("unknown")
}

impl Metrics {
    pub fn set_containers(&self, count: impl Fn(ContainerState) -> usize) {
        for state in ContainerState::ALL {
            let count = i64::try_from(count(state)).unwrap_or(i64::MAX);
            self.containers.get_or_create(&StateLabel { state: StateValue(state) }).set(count);
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

    /// The version of the serving lxcfs; `None` if it is not known, or none serves.
    pub fn set_lxcfs_version(&self, version: Option<String>) {
        self.lxcfs_info.clear();
        if let Some(version) = version {
            self.lxcfs_info.get_or_create(&VersionLabel { version }).set(1);
        }
    }

    pub fn lxcfs_restarted(&self) {
        self.lxcfs_restarts.inc();
    }

    pub fn remount_pass_finished(&self, elapsed: Duration) {
        self.remount_pass.set(elapsed.as_secs_f64());
    }

    /// The text format of OpenMetrics 1.0.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing into a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
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
        metrics.set_lxcfs_version(Some("6.0.4".into()));
        metrics.set_lxcfs_version(Some("7.0.0".into()));
        metrics.lxcfs_restarted();
        metrics.remount_pass_finished(Duration::from_millis(250));
        let text = metrics.text();
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
            "kube_lxcfs_lxcfs_info{version=\"7.0.0\"} 1",
            "kube_lxcfs_lxcfs_restarts_total 1",
            "kube_lxcfs_remount_pass_duration_seconds 0.25",
            "kube_lxcfs_build_info{version=\"",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        assert!(!text.contains("6.0.4"), "{text}");
    }
}
