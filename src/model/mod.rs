//! The values that modules exchange: containers, pods, view files, states. No module of this crate
//! is used here.

pub mod container_id;
pub mod pod;
pub mod selector;
pub mod status;
pub mod text;
pub mod view;
