//! kube-lxcfs: lxcfs views in running Kubernetes containers, by annotation, put there from outside.
//!
//! ARCHITECTURE.md shows how the modules hang together.

pub mod agent;
pub mod check;
pub mod cli;
pub mod hook;
pub mod lxcfs;
pub mod mount;
pub mod node;
pub mod plan;
pub mod pods;
pub mod policy;
pub mod report;
pub mod runtime;
pub mod sys;
pub mod view;
