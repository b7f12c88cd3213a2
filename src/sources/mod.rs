//! The sources of updates about pods and containers: the API server, the runtime over CRI, and the
//! runtime over NRI. They send [`Update`](crate::model::pod::Update)s and are independent of views
//! and mounts.

pub mod cri;
pub mod kubernetes;
pub mod nri;
