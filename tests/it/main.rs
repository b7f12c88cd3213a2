//! Tests against the real thing: lxcfs, containerd, runc, kube-apiserver, etcd and this kernel. `make test` sets them up.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests fail by panicking, and tell what they want by their names")]

mod cluster;
mod command_line;
mod containers;
mod harness;
mod isolation;
mod kubernetes;
