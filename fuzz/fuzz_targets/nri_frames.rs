//! The bytes of an NRI socket, in pieces: frames, and ttrpc messages within them. The decoder never
//! keeps more than a frame.
#![no_main]

use bytes::BytesMut;
use kube_lxcfs::sources::nri::ttrpc::{Frame, MAX_FRAME_BYTES, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (mut socket, mut stream) = (BytesMut::new(), BytesMut::new());
    for piece in data.chunks(13) {
        socket.extend_from_slice(piece);
        loop {
            match Frame::decode(&mut socket) {
                Ok(Some(frame)) => {
                    let mut again = BytesMut::new();
                    frame.encode(&mut again);
                    assert_eq!(Frame::decode(&mut again), Ok(Some(frame.clone())));
                    stream.extend_from_slice(&frame.payload);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        while let Ok(Some(message)) = Message::decode(&mut stream) {
            let mut again = BytesMut::from(&message.frame(1).payload[..]);
            assert_eq!(Message::decode(&mut again), Ok(Some(message)));
        }
        assert!(socket.capacity() <= 4 * (data.len() + 64) && stream.len() <= MAX_FRAME_BYTES);
    }
});
