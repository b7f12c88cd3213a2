//! The input of an OCI hook: the state, and the config of the bundle.
#![no_main]

use kube_lxcfs::oci_hook::{Config, State};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(state) = State::parse(data) {
        assert!(state.pid > 0);
    }
    if let Ok(config) = Config::parse(data) {
        let _ = config.desired("id", false);
        let _ = config.desired("", true);
    }
});
