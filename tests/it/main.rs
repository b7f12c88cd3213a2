//! Tests against the real thing: lxcfs, containerd, runc, kube-apiserver, etcd and this kernel.
//! `make test` sets them up.
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_imports,
    clippy::needless_pass_by_value,
    clippy::similar_names,
    reason = "tests fail by panicking, and are read for what they want"
)]

mod chaos;
mod chart;
mod command_line;
mod compatibility;
mod containers;
mod harness;
mod hook;
mod hostile_lxcfs;
mod hostile_mounts;
mod hostile_pods;
mod hostile_tables;
mod http;
mod isolation;
mod kubectl;
mod kubernetes;
mod observability;
mod profiles;
mod restart;
mod scratch;
mod starts;
mod values;
