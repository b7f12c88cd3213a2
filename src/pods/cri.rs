//! `--pods-from cri`: the runtime's pod sandboxes and their annotations, for nodes and demos without an API server.
//! Annotations of a sandbox never change, and there are no namespace labels.

use std::time::Duration;

use tokio::sync::mpsc::Sender;

use super::Update;
use crate::{report::OutageLog, runtime::cri::Cri};

/// How often the runtime is asked where nothing else tells of starts and ends.
const PERIOD: Duration = Duration::from_secs(30);
/// The first and the longest wait when the runtime does not answer.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), PERIOD);

/// Watches until the receiver is gone.
pub async fn watch(cri: Cri, updates: Sender<Update>) {
    let mut outage = OutageLog::new("pods");
    let mut wait = BACKOFF.0;
    loop {
        match cri.pods().await {
            Ok(pods) => {
                outage.recovered("the runtime lists pods again");
                wait = BACKOFF.0;
                if updates.send(Update::Pods(pods)).await.is_err() {
                    return;
                }
                tokio::time::sleep(PERIOD).await;
            }
            Err(e) => {
                outage.failed("failed to list pods from the runtime", &e);
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(BACKOFF.1);
            }
        }
    }
}
