//! What is told to people and programs: the log's «once» helper, Events on pods, metrics, HTTP.

pub mod events;
pub mod http;
pub mod metrics;

use std::fmt::Display;

/// Logs an outage once when it starts and once when it is over, not at every retry.
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

    /// Logs a failure: a warning for the first of an outage, and debug messages for those that follow.
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
