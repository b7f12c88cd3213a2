//! The metrics of the contract, in OpenMetrics.

use std::time::Duration;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};
use serde::Serialize;

use crate::pods::Trigger;

/// Gives each value of an enum the name that it has as a label.
macro_rules! label_values {
    ($type:ty { $($value:ident => $name:literal),* $(,)? }) => {
        impl $type {
            pub fn name(self) -> &'static str {
                match self { $(Self::$value => $name),* }
            }
        }

        impl EncodeLabelValue for $type {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
                self.name().encode(encoder)
            }
        }
    };
}

/// What a container that wants a view has of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ContainerState {
    /// Its view is in place.
    Injected,
    /// It is to get one.
    Pending,
    /// It could not be given one, and will be tried again.
    Failed,
    /// It can have none, or what its pod says is not understood.
    Skipped,
}

impl ContainerState {
    pub const ALL: [ContainerState; 4] = [Self::Injected, Self::Pending, Self::Failed, Self::Skipped];
}

/// What is done to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operation {
    Inject,
    Remove,
    Remount,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperationResult {
    Success,
    Failure,
}

label_values!(ContainerState { Injected => "injected", Pending => "pending", Failed => "failed", Skipped => "skipped" });
label_values!(Operation { Inject => "inject", Remove => "remove", Remount => "remount" });
label_values!(OperationResult { Success => "success", Failure => "failure" });
label_values!(Trigger { Nri => "nri", Cri => "cri", Watch => "watch" });

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: ContainerState,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    operation: Operation,
    result: OperationResult,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabel {
    operation: Operation,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TriggerLabel {
    trigger: Trigger,
}

/// From 0.5 ms to 16 s.
fn seconds() -> Histogram {
    Histogram::new(prometheus_client::metrics::histogram::exponential_buckets(0.0005, 2.0, 16))
}

/// All of them. Their values are set by the agent's loop.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    containers: Family<StateLabel, Gauge>,
    operations: Family<OperationLabels, Counter>,
    durations: Family<OperationLabel, Histogram, fn() -> Histogram>,
    latencies: Family<TriggerLabel, Histogram, fn() -> Histogram>,
    lxcfs_up: Gauge,
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
            lxcfs_up: Gauge::default(),
            lxcfs_restarts: Counter::default(),
            remount_pass: Gauge::default(),
        };
        let build = [("version", env!("CARGO_PKG_VERSION")), ("revision", revision())];
        let registry = &mut metrics.registry;
        registry.register(
            "containers",
            "Containers that want a view, by what they have of it",
            metrics.containers.clone(),
        );
        registry.register("operations", "Changes of containers' views", metrics.operations.clone());
        registry.register_with_unit(
            "operation_duration",
            "How long a change of a container's view took",
            Unit::Seconds,
            metrics.durations.clone(),
        );
        registry.register_with_unit(
            "injection_latency",
            "From whoever told first that a view is wished, to the view in place",
            Unit::Seconds,
            metrics.latencies.clone(),
        );
        registry.register("lxcfs_up", "Whether lxcfs serves", metrics.lxcfs_up.clone());
        registry.register("lxcfs_restarts", "How often another lxcfs came to serve", metrics.lxcfs_restarts.clone());
        registry.register_with_unit(
            "remount_pass_duration",
            "How long the last pass took after which every view was current",
            Unit::Seconds,
            metrics.remount_pass.clone(),
        );
        registry.register("build", "What runs", Info::new(build));
        metrics
    }
}

/// The commit that this was built from, where the build was told (`KUBE_LXCFS_REVISION`).
pub fn revision() -> &'static str {
    option_env!("KUBE_LXCFS_REVISION").unwrap_or("unknown")
}

impl Metrics {
    pub fn containers(&self, count: impl Fn(ContainerState) -> usize) {
        for state in ContainerState::ALL {
            self.containers.get_or_create(&StateLabel { state }).set(i64::try_from(count(state)).unwrap_or(i64::MAX));
        }
    }

    pub fn operation(&self, operation: Operation, result: OperationResult, took: Duration) {
        self.operations.get_or_create(&OperationLabels { operation, result }).inc();
        self.durations.get_or_create(&OperationLabel { operation }).observe(took.as_secs_f64());
    }

    pub fn injected(&self, trigger: Trigger, took: Duration) {
        self.latencies.get_or_create(&TriggerLabel { trigger }).observe(took.as_secs_f64());
    }

    pub fn lxcfs(&self, up: bool) {
        self.lxcfs_up.set(i64::from(up));
    }

    pub fn lxcfs_restarted(&self) {
        self.lxcfs_restarts.inc();
    }

    pub fn remounted(&self, took: Duration) {
        self.remount_pass.set(took.as_secs_f64());
    }

    /// All of them as text (OpenMetrics 1.0).
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
    fn names_and_labels_are_those_of_the_contract() {
        let metrics = Metrics::default();
        metrics.containers(|state| usize::from(state == ContainerState::Injected));
        metrics.operation(Operation::Inject, OperationResult::Success, Duration::from_millis(2));
        metrics.injected(Trigger::Nri, Duration::from_millis(3));
        metrics.lxcfs(true);
        metrics.lxcfs_restarted();
        metrics.remounted(Duration::from_millis(250));
        let text = metrics.text();
        for line in [
            "kube_lxcfs_containers{state=\"injected\"} 1",
            "kube_lxcfs_containers{state=\"skipped\"} 0",
            "kube_lxcfs_operations_total{operation=\"inject\",result=\"success\"} 1",
            "kube_lxcfs_operation_duration_seconds_count{operation=\"inject\"} 1",
            "kube_lxcfs_injection_latency_seconds_count{trigger=\"nri\"} 1",
            "kube_lxcfs_lxcfs_up 1",
            "kube_lxcfs_lxcfs_restarts_total 1",
            "kube_lxcfs_remount_pass_duration_seconds 0.25",
            "kube_lxcfs_build_info{version=\"",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
