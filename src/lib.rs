//! kube-lxcfs injects lxcfs views into running Kubernetes containers: bind mounts of lxcfs files
//! over the container's `/proc` and `/sys` entries, made from outside. Pods opt in by annotation;
//! the pod spec is not modified.
//!
//! # Layers
//! A module uses modules of the layers below its own, and within its layer only those after an
//! arrow. `hack/check-layers.sh` checks the imports against this table.
//!
//! | layer | modules |
//! | --- | --- |
//! | command line | [`commands`] → [`args`] |
//! | long-running parts | [`agent`] (the loop), [`admin`] (HTTP), [`supervisor`] (runs lxcfs) |
//! | node and sources | [`node`] (all mount namespaces), [`sources`] (API server, CRI, NRI) |
//! | facts | [`lxcfs`] (the serving one), [`runtime`] (container id to process) |
//! | effects | [`mount`] (the only module that mounts) |
//! | pure decisions | [`oci_hook`] → [`policy`] (desired view) → [`plan`] (steps) |
//! | vocabulary | [`telemetry`] → [`model`], [`sys`] |
//!
//! ARCHITECTURE.md shows one annotation change from the API server to `move_mount(2)`.

pub mod admin;
pub mod agent;
pub mod args;
pub mod commands;
pub mod lxcfs;
pub mod model;
pub mod mount;
pub mod node;
pub mod oci_hook;
pub mod plan;
pub mod policy;
pub mod runtime;
pub mod sources;
pub mod supervisor;
pub mod sys;
pub mod telemetry;
