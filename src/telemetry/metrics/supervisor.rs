//! The metrics of the supervisor.

use std::{
    sync::{Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    time::Instant,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};

use super::{PREFIX, exposition::Format, process::ProcessCollector, revision, text};

/// The reason why lxcfs stopped serving, or did not start to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RestartCause {
    Exited,
    /// It did not respond for the watchdog's time, or did not serve in time after its start.
    Hung,
    /// Its mount was unmounted or covered.
    Unmounted,
}

label_values!(CauseValue(RestartCause) {
    Exited => "exited",
    Hung => "hung",
    Unmounted => "unmounted",
});

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CauseLabel {
    cause: CauseValue,
}

/// All metrics of the supervisor.
#[derive(Debug)]
pub struct SupervisorMetrics {
    registry: Registry,
    up: Gauge,
    restarts: Family<CauseLabel, Counter>,
    sweeps: Counter,
    sweep_failures: Counter,
    downtime: Counter<f64, AtomicU64>,
    /// Until when the time without lxcfs is counted; `None` while it serves.
    down_since: Mutex<Option<Instant>>,
}

impl Default for SupervisorMetrics {
    fn default() -> SupervisorMetrics {
        let mut metrics = SupervisorMetrics {
            registry: Registry::default(),
            up: Gauge::default(),
            restarts: Family::default(),
            sweeps: Counter::default(),
            sweep_failures: Counter::default(),
            downtime: Counter::default(),
            down_since: Mutex::new(Some(Instant::now())),
        };
        metrics.registry.register_collector(Box::new(ProcessCollector));
        let registry = metrics.registry.sub_registry_with_prefix(PREFIX);
        registry.register(
            "supervisor_lxcfs_up",
            "1 while the supervised lxcfs serves, else 0",
            metrics.up.clone(),
        );
        registry.register(
            "supervisor_restarts",
            "Restarts of lxcfs, by cause",
            metrics.restarts.clone(),
        );
        registry.register(
            "supervisor_sweeps",
            "Sweeps of every mount namespace for views of an lxcfs that stopped serving",
            metrics.sweeps.clone(),
        );
        registry.register(
            "supervisor_sweep_failures",
            "Mount namespaces that a sweep skipped, or in which it failed to remove dead views",
            metrics.sweep_failures.clone(),
        );
        registry.register_with_unit(
            "supervisor_without_lxcfs",
            "Time in which no lxcfs served since the start of the supervisor, in seconds",
            Unit::Seconds,
            metrics.downtime.clone(),
        );
        let build = [("version", env!("CARGO_PKG_VERSION")), ("revision", revision())];
        registry.register(
            "supervisor_build",
            "Version and revision of the supervisor",
            Info::new(build),
        );
        for cause in [RestartCause::Exited, RestartCause::Hung, RestartCause::Unmounted] {
            let label = CauseLabel { cause: CauseValue(cause) };
            metrics.restarts.get_or_create(&label).inc_by(0);
        }
        metrics
    }
}

impl SupervisorMetrics {
    pub fn set_up(&self, up: bool) {
        self.up.set(i64::from(up));
        let mut since = self.down_since();
        self.count_downtime(&mut since);
        *since = (!up).then(Instant::now);
    }

    pub fn restarted(&self, cause: RestartCause) {
        self.restarts.get_or_create(&CauseLabel { cause: CauseValue(cause) }).inc();
    }

    /// A sweep failed in this many mount namespaces.
    pub fn swept(&self, failures: usize) {
        self.sweeps.inc();
        self.sweep_failures.inc_by(failures as u64);
    }

    /// The text of all metrics.
    pub fn text(&self, format: Format) -> String {
        self.count_downtime(&mut self.down_since());
        text(&self.registry, format)
    }

    /// Counts the time without lxcfs until now.
    fn count_downtime(&self, since: &mut Option<Instant>) {
        if let Some(since) = since {
            let now = Instant::now();
            self.downtime.inc_by(now.duration_since(*since).as_secs_f64());
            *since = now;
        }
    }

    fn down_since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.down_since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_lxcfs_is_counted_while_none_serves() {
        let metrics = SupervisorMetrics::default();
        let downtime = || {
            let text = metrics.text(Format::Prometheus);
            let name = "kube_lxcfs_supervisor_without_lxcfs_seconds_total ";
            let value = text.lines().find_map(|line| line.strip_prefix(name));
            value.unwrap().parse::<f64>().unwrap()
        };
        let first = downtime();
        let second = downtime();
        assert!(second > first, "{second} {first}");
        metrics.set_up(true);
        let up = downtime();
        assert_eq!(downtime().to_bits(), up.to_bits());
        metrics.set_up(false);
        assert!(downtime() > up);
    }

    #[test]
    fn restarts_are_counted_by_cause() {
        let metrics = SupervisorMetrics::default();
        metrics.restarted(RestartCause::Hung);
        metrics.swept(2);
        let text = metrics.text(Format::Prometheus);
        for line in [
            "kube_lxcfs_supervisor_restarts_total{cause=\"hung\"} 1",
            "kube_lxcfs_supervisor_restarts_total{cause=\"exited\"} 0",
            "kube_lxcfs_supervisor_sweeps_total 1",
            "kube_lxcfs_supervisor_sweep_failures_total 2",
            "kube_lxcfs_supervisor_lxcfs_up 0",
            "process_cpu_seconds_total ",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
