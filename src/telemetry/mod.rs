//! Telemetry: the log, metrics, Events on pods.

pub mod events;
pub mod metrics;

use std::{
    fmt::Display,
    hash::{BuildHasher, RandomState},
    io::{self, Write},
    time::Duration,
};

use tracing_subscriber::EnvFilter;

use crate::model::text::one_line;

/// The format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// The log filter where `RUST_LOG` sets none.
const DEFAULT_LOG_FILTER: &str = "info,kube_runtime=error,kube_client=error";

/// Starts the log on stderr. An invalid `RUST_LOG` is reported once, and the default filter is
/// used.
///
/// # Panics
/// Panics if called twice.
pub fn init(format: LogFormat) {
    let (filter, invalid) = log_filter(std::env::var_os("RUST_LOG"));
    // A log that cannot be written is no reason to end: without this, the subscriber prints to the
    // same stderr, which panics.
    let log = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false);
    match format {
        LogFormat::Text => log.with_ansi(false).with_writer(|| OneLine(io::stderr())).init(),
        LogFormat::Json => log.with_writer(io::stderr).json().flatten_event(true).init(),
    }
    if let Some(cause) = invalid {
        tracing::warn!(cause, "ignoring an invalid RUST_LOG, using '{DEFAULT_LOG_FILTER}'");
    }
}

/// Writes each event of the text log as one line: a line break in a tenant's value forges no second
/// one.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    /// Takes one event, which ends in a line break.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let line = one_line(text.strip_suffix('\n').unwrap_or(&text));
        self.0.write_all(format!("{line}\n").as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// The filter for a value of `RUST_LOG`, and why the value is invalid if it is.
fn log_filter(value: Option<std::ffi::OsString>) -> (EnvFilter, Option<String>) {
    let default = || EnvFilter::new(DEFAULT_LOG_FILTER);
    let Some(value) = value.filter(|value| !value.is_empty()) else { return (default(), None) };
    match value.to_str().map(EnvFilter::try_new) {
        Some(Ok(filter)) => (filter, None),
        Some(Err(e)) => (default(), Some(e.to_string())),
        None => (default(), Some("not UTF-8".to_owned())),
    }
}

/// Logs the start and the end of an outage once each, not every retry.
#[derive(Debug)]
pub struct OutageLog {
    /// The component that fails, as in the field `subject` of the log.
    subject: &'static str,
    failing: bool,
}

impl OutageLog {
    pub fn new(subject: &'static str) -> OutageLog {
        OutageLog { subject, failing: false }
    }

    /// Logs a failure: a warning for the first of an outage, and debug messages for those that
    /// follow.
    pub fn failed(&mut self, message: &str, cause: &dyn Display) {
        let OutageLog { subject, failing } = self;
        if std::mem::replace(failing, true) {
            tracing::debug!(subject, %cause, "{message}");
        } else {
            tracing::warn!(subject, outage = "started", %cause, "{message}; retrying");
        }
    }

    /// Logs the recovery from an outage that was logged.
    pub fn recovered(&mut self, message: &str) {
        if std::mem::take(&mut self.failing) {
            tracing::info!(subject = self.subject, outage = "recovered", "{message}");
        }
    }
}

/// Delays between retries: the first, doubled each time up to the longest.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    pub first: Duration,
    pub longest: Duration,
}

impl Backoff {
    pub const fn new(first: Duration, longest: Duration) -> Backoff {
        Backoff { first, longest }
    }

    /// The delay before the retry after `attempt` earlier ones.
    pub fn delay(self, attempt: u32) -> Duration {
        self.first.saturating_mul(1 << attempt.min(16)).min(self.longest)
    }

    /// Starts a sequence of delays.
    pub fn start(self) -> Delays {
        Delays { backoff: self, attempt: 0 }
    }
}

/// A sequence of delays of a [`Backoff`], each shortened by up to a quarter at random, so that many
/// nodes do not retry in step.
#[derive(Debug)]
pub struct Delays {
    backoff: Backoff,
    attempt: u32,
}

impl Delays {
    /// The next delay.
    pub fn next_delay(&mut self) -> Duration {
        let delay = self.backoff.delay(self.attempt);
        delay.saturating_sub(delay / 1024 * self.advance())
    }

    /// A delay between zero and the next delay, all equally likely: retries of many nodes are
    /// spread over the whole time.
    pub fn next_spread(&mut self) -> Duration {
        let delay = self.backoff.delay(self.attempt);
        delay / 256 * self.advance()
    }

    /// Counts an attempt. Returns a random number below 256.
    fn advance(&mut self) -> u32 {
        self.attempt += 1;
        // A hasher's random keys are all the randomness that is needed here.
        u32::try_from(RandomState::new().hash_one(self.attempt) % 256).unwrap_or_default()
    }

    /// Starts again with the first delay.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_the_longest() {
        let backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let delays: Vec<u128> = (0..8).map(|n| backoff.delay(n).as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff.delay(u32::MAX), backoff.longest);
    }

    #[test]
    fn jitter_takes_off_at_most_a_quarter() {
        let mut delays = Backoff::new(Duration::from_secs(1), Duration::from_secs(4)).start();
        for nominal in [1, 2, 4, 4, 4].map(Duration::from_secs) {
            let delay = delays.next_delay();
            assert!(delay <= nominal && delay >= nominal * 3 / 4, "{delay:?} of {nominal:?}");
        }
        delays.reset();
        assert!(delays.next_delay() <= Duration::from_secs(1));
    }

    #[derive(Clone, Default)]
    struct Buffer(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn text_log_has_one_line_per_event() {
        let (buffer, hostile) =
            (Buffer::default(), "x\n2026-01-01T00:00:00Z  WARN forged\u{1b}[2J");
        let writer = buffer.clone();
        let log = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || OneLine(writer.clone()))
            .finish();
        tracing::subscriber::with_default(log, || {
            tracing::warn!(text = hostile, display = %hostile, debug = ?hostile, "{hostile}");
            tracing::warn!("second");
        });
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.lines().all(|line| !line.contains(char::is_control)), "{text}");
    }

    #[test]
    fn invalid_log_filter_falls_back_with_a_reason() {
        for (value, valid) in [
            (None, true),
            (Some(""), true),
            (Some("kube_lxcfs=debug"), true),
            (Some("a=b=c"), false),
        ] {
            assert_eq!(log_filter(value.map(Into::into)).1.is_none(), valid, "{value:?}");
        }
    }
}
