//! The bytes of NRI: frames that carry two connections over one socket, ttrpc in each, and the few messages that a plugin
//! needs. Pure: bytes in, values out. A length that no honest peer sends is refused before anything is kept for it.
//!
//! Sources: containerd/nri `pkg/net/multiplex` and `pkg/api/api.proto` (v1alpha1), containerd/ttrpc `PROTOCOL.md`.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

/// The connection on which the runtime calls the plugin's service.
pub const PLUGIN: u32 = 1;
/// The connection on which the plugin calls the runtime's service.
pub const RUNTIME: u32 = 2;

/// The longest ttrpc payload, in bytes.
pub const LONGEST_PAYLOAD: usize = 4 << 20;
const FRAME_HEADER: usize = 8;
const MESSAGE_HEADER: usize = 10;
/// The longest payload of a frame: a whole ttrpc message.
pub const LONGEST_FRAME: usize = LONGEST_PAYLOAD + MESSAGE_HEADER;

/// What is no NRI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("a frame of {0} bytes, where {LONGEST_FRAME} are the most")]
    Frame(usize),
    #[error("a message of {0} bytes, where {LONGEST_PAYLOAD} are the most")]
    Message(usize),
}

/// One frame: a piece of the byte stream of one of the connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub connection: u32,
    pub payload: Bytes,
}

impl Frame {
    /// Takes the next whole frame off the buffer; none while it is not all there.
    ///
    /// # Errors
    /// When its length is beyond [`LONGEST_FRAME`].
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Frame>, Error> {
        let Some((mut header, body)) = buffer.split_at_checked(FRAME_HEADER) else { return Ok(None) };
        let (connection, length) = (header.get_u32(), header.get_u32() as usize);
        if length > LONGEST_FRAME {
            return Err(Error::Frame(length));
        }
        if body.len() < length {
            return Ok(None);
        }
        buffer.advance(FRAME_HEADER);
        Ok(Some(Frame { connection, payload: buffer.split_to(length).freeze() }))
    }

    /// # Panics
    /// When the payload is longer than [`LONGEST_FRAME`].
    pub fn encode(&self, buffer: &mut BytesMut) {
        assert!(self.payload.len() <= LONGEST_FRAME);
        buffer.put_u32(self.connection);
        buffer.put_u32(length(&self.payload));
        buffer.put_slice(&self.payload);
    }
}

#[allow(clippy::cast_possible_truncation, reason = "no payload is longer than LONGEST_FRAME")]
fn length(payload: &Bytes) -> u32 {
    payload.len() as u32
}

/// What a ttrpc message is. Streams (3) are not used by NRI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Request,
    Response,
    Other(u8),
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Kind::Request => 1,
            Kind::Response => 2,
            Kind::Other(byte) => byte,
        }
    }
}

/// One ttrpc message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub stream: u32,
    pub kind: Kind,
    pub payload: Bytes,
}

impl Packet {
    /// Takes the next whole message off a connection's bytes; none while it is not all there.
    ///
    /// # Errors
    /// When its length is beyond [`LONGEST_PAYLOAD`].
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Packet>, Error> {
        let Some((mut header, body)) = buffer.split_at_checked(MESSAGE_HEADER) else { return Ok(None) };
        let (length, stream) = (header.get_u32() as usize, header.get_u32());
        let kind = match header.get_u8() {
            1 => Kind::Request,
            2 => Kind::Response,
            other => Kind::Other(other),
        };
        if length > LONGEST_PAYLOAD {
            return Err(Error::Message(length));
        }
        if body.len() < length {
            return Ok(None);
        }
        buffer.advance(MESSAGE_HEADER);
        Ok(Some(Packet { stream, kind, payload: buffer.split_to(length).freeze() }))
    }

    /// The message as one frame of a connection.
    pub fn frame(&self, connection: u32) -> Frame {
        let mut payload = BytesMut::with_capacity(MESSAGE_HEADER + self.payload.len());
        payload.put_u32(length(&self.payload));
        payload.put_u32(self.stream);
        payload.put_u8(self.kind.byte());
        payload.put_u8(0);
        payload.put_slice(&self.payload);
        Frame { connection, payload: payload.freeze() }
    }
}

/// ttrpc's `Request`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Request {
    #[prost(string, tag = "1")]
    pub service: String,
    #[prost(string, tag = "2")]
    pub method: String,
    #[prost(bytes = "bytes", tag = "3")]
    pub payload: Bytes,
}

/// ttrpc's `Response`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Response {
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    #[prost(bytes = "bytes", tag = "2")]
    pub payload: Bytes,
}

/// `google.rpc.Status`: code 0 is success.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Status {
    #[prost(int32, tag = "1")]
    pub code: i32,
    #[prost(string, tag = "2")]
    pub message: String,
}

/// What the plugin says of itself, in the first call.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RegisterPluginRequest {
    #[prost(string, tag = "1")]
    pub plugin_name: String,
    /// Two digits, the place among the plugins.
    #[prost(string, tag = "2")]
    pub plugin_idx: String,
}

/// How the runtime configures the plugin. Timeouts are in ms; older runtimes send none.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ConfigureRequest {
    #[prost(string, tag = "2")]
    pub runtime_name: String,
    #[prost(string, tag = "3")]
    pub runtime_version: String,
    #[prost(int64, tag = "5")]
    pub request_timeout: i64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct ConfigureResponse {
    /// Bit `event - 1` of each event that is subscribed to.
    #[prost(int32, tag = "2")]
    pub events: i32,
}

/// What runs already; `more` when another part follows.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SynchronizeRequest {
    #[prost(message, repeated, tag = "1")]
    pub pods: Vec<PodSandbox>,
    #[prost(message, repeated, tag = "2")]
    pub containers: Vec<Container>,
    #[prost(bool, tag = "3")]
    pub more: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct SynchronizeResponse {
    #[prost(bool, tag = "2")]
    pub more: bool,
}

/// How older runtimes tell of [`event`]s.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StateChangeEvent {
    #[prost(int32, tag = "1")]
    pub event: i32,
    #[prost(message, optional, tag = "2")]
    pub pod: Option<PodSandbox>,
    #[prost(message, optional, tag = "3")]
    pub container: Option<Container>,
}

/// How newer runtimes tell of one event each, in a call of its own name.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ContainerRequest {
    #[prost(message, optional, tag = "1")]
    pub pod: Option<PodSandbox>,
    #[prost(message, optional, tag = "2")]
    pub container: Option<Container>,
}

/// A pod.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PodSandbox {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub uid: String,
    #[prost(string, tag = "4")]
    pub namespace: String,
    #[prost(btree_map = "string, string", tag = "6")]
    pub annotations: std::collections::BTreeMap<String, String>,
    #[prost(string, tag = "7")]
    pub runtime_handler: String,
}

/// A container.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Container {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub pod_sandbox_id: String,
    #[prost(string, tag = "3")]
    pub name: String,
    /// 1 created, 2 paused, 3 running, 4 stopped.
    #[prost(int32, tag = "4")]
    pub state: i32,
    #[prost(uint32, tag = "12")]
    pub pid: u32,
}

/// Events, by their number in `StateChange`.
pub mod event {
    pub const START_CONTAINER: i32 = 6;
    pub const STOP_CONTAINER: i32 = 10;
    pub const REMOVE_CONTAINER: i32 = 11;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All messages of a connection's bytes that come in pieces of any size, in frames of any size.
    fn through(packets: &[Packet], frame: usize, piece: usize) -> Vec<Packet> {
        let mut stream = BytesMut::new();
        packets.iter().for_each(|p| stream.put_slice(&p.frame(PLUGIN).payload));
        let mut socket = BytesMut::new();
        for chunk in stream.chunks(frame) {
            Frame { connection: PLUGIN, payload: Bytes::copy_from_slice(chunk) }.encode(&mut socket);
        }
        let (mut raw, mut bytes, mut all) = (BytesMut::new(), BytesMut::new(), Vec::new());
        for chunk in socket.chunks(piece) {
            raw.put_slice(chunk);
            while let Some(frame) = Frame::decode(&mut raw).unwrap() {
                bytes.put_slice(&frame.payload);
            }
            while let Some(packet) = Packet::decode(&mut bytes).unwrap() {
                all.push(packet);
            }
        }
        all
    }

    proptest! {
        #[test]
        fn messages_survive_any_cut(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..5),
            frame in 1..30usize,
            piece in 1..30usize,
        ) {
            let packet = |(n, payload): (usize, Vec<u8>)| Packet {
                stream: u32::try_from(n).unwrap(), kind: Kind::Request, payload: payload.into(),
            };
            let packets: Vec<Packet> = payloads.into_iter().enumerate().map(packet).collect();
            prop_assert_eq!(through(&packets, frame, piece), packets);
        }

        #[test]
        fn rubbish_is_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = Frame::decode(&mut buffer) {}
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = Packet::decode(&mut buffer) {}
            let _ = StateChangeEvent::decode(&bytes[..]);
            let _ = SynchronizeRequest::decode(&bytes[..]);
        }
    }

    #[test]
    fn lengths_that_nobody_sends_are_refused_at_once() {
        let mut frame = BytesMut::from(&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff][..]);
        assert_eq!(Frame::decode(&mut frame), Err(Error::Frame(0xffff_ffff)));
        let mut packet = BytesMut::from(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 1, 0][..]);
        assert_eq!(Packet::decode(&mut packet), Err(Error::Message(0xffff_ffff)));
    }

    #[test]
    fn unknown_fields_are_skipped() {
        // A pod with an id and a field 99 of a later version.
        let bytes = [&[0x0a, 1, b'x'][..], &[0x9a, 0x06, 2, 1, 2]].concat();
        assert_eq!(PodSandbox::decode(&bytes[..]).unwrap().id, "x");
    }
}
