//! The messages of NRI and ttrpc.
#![no_main]

use kube_lxcfs::sources::nri::ttrpc::{
    ConfigureRequest, ContainerRequest, Request, Response, StateChangeEvent, SynchronizeRequest,
};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fn again<M: Message + Default + PartialEq + std::fmt::Debug>(data: &[u8]) {
    if let Ok(message) = M::decode(data) {
        assert_eq!(M::decode(&message.encode_to_vec()[..]).ok(), Some(message));
    }
}

fuzz_target!(|data: &[u8]| {
    again::<Request>(data);
    again::<Response>(data);
    again::<ConfigureRequest>(data);
    again::<SynchronizeRequest>(data);
    again::<StateChangeEvent>(data);
    again::<ContainerRequest>(data);
});
