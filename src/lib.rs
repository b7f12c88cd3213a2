//! kube-lxcfs injects lxcfs views into running Kubernetes containers: bind mounts of lxcfs files
//! over the container's `/proc` and `/sys` entries, made from outside. Pods opt in by annotation;
//! the pod spec is not modified.
//!
//! # Layers
//! Each module uses modules of lower layers only; `make lint` checks it.
//!
//! | layer | modules |
//! | --- | --- |
//! | command line | [`args`], [`commands`] |
//! | long-running parts | [`agent`] (reconciles pods), [`admin`] (HTTP), [`supervisor`] (runs lxcfs) |
//! | the node and its sources | [`node`] (every mount namespace), [`sources`] (API server, CRI, NRI) |
//! | facts | [`lxcfs`] (the serving one), [`runtime`] (container id to process) |
//! | effects | [`mount`] (the only module that mounts) |
//! | pure decisions | [`policy`] (annotations to desired view), [`plan`] (difference to steps), [`oci_hook`] (OCI state to request) |
//! | vocabulary | [`model`], [`telemetry`], [`sys`] |
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
