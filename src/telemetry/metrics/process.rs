//! The metrics of this process, with the names that Prometheus's client libraries share
//! (<https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics>).

use std::{fmt, time::Duration};

use procfs::{
    WithCurrentSystemInfo,
    process::{LimitValue, Process},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

/// Reads `/proc/self` for each response. A value that cannot be read is missing.
#[derive(Debug)]
pub(super) struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Ok(process) = Process::myself() else { return Ok(()) };
        let mut encode =
            |name: &str, unit: Option<&Unit>, help: &str, metric: &dyn EncodeMetric| {
                let kind = metric.metric_type();
                metric.encode(encoder.encode_descriptor(name, help, unit, kind)?)
            };
        let (seconds, bytes) = (Some(&Unit::Seconds), Some(&Unit::Bytes));
        if let Ok(stat) = process.stat() {
            let cpu = ConstCounter::new(ticks(stat.utime + stat.stime).as_secs_f64());
            encode("process_cpu", seconds, "Time on CPUs, user and system, in seconds.", &cpu)?;
            if let Ok(boot) = procfs::boot_time_secs() {
                let start = Duration::from_secs(boot) + ticks(stat.starttime);
                let start = ConstGauge::new(start.as_secs_f64());
                encode("process_start_time", seconds, "Start, in seconds since 1970.", &start)?;
            }
            let size = ConstGauge::new(stat.vsize);
            encode("process_virtual_memory", bytes, "Virtual memory, in bytes.", &size)?;
            let resident = ConstGauge::new(stat.rss_bytes().get());
            encode("process_resident_memory", bytes, "Resident memory, in bytes.", &resident)?;
            let threads = ConstGauge::new(stat.num_threads);
            encode("process_threads", None, "Threads.", &threads)?;
        }
        if let Ok(open) = process.fd_count() {
            encode("process_open_fds", None, "Open file descriptors.", &ConstGauge::new(open))?;
        }
        if let Ok(limits) = process.limits()
            && let LimitValue::Value(limit) = limits.max_open_files.soft_limit
        {
            let limit = ConstGauge::new(limit);
            encode("process_max_fds", None, "Limit of open file descriptors.", &limit)?;
        }
        Ok(())
    }
}

/// The duration of this many clock ticks (proc(5)).
fn ticks(count: u64) -> Duration {
    Duration::from_millis(count.saturating_mul(1000) / procfs::ticks_per_second().max(1))
}
