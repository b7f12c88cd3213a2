//! What is told to people and programs: the log's «once» helper, Events on pods, metrics, HTTP.

pub mod events;
pub mod http;
pub mod metrics;

use std::fmt::Display;

/// Tells a trouble that lasts once when it begins and once when it is over, not at every retry.
#[derive(Debug, Default)]
pub struct Once {
    told: bool,
}

impl Once {
    /// Warns, the first time; what it says later goes to the debug log.
    pub fn warn(&mut self, what: &str, cause: &dyn Display) {
        if std::mem::replace(&mut self.told, true) {
            tracing::debug!("{what}: {cause}");
        } else {
            tracing::warn!("{what}: {cause}; will be retried");
        }
    }

    /// Says that it is over, if it was told that it began.
    pub fn over(&mut self, message: &str) {
        if std::mem::take(&mut self.told) {
            tracing::info!("{message}");
        }
    }
}
