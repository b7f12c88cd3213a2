//! The wire format of NRI: frames that carry two connections over one socket, ttrpc in each, and
//! the messages that a plugin needs. Pure: bytes in, values out. A length beyond the protocol's
//! limit is refused before memory is allocated for it.
//!
//! Sources: containerd/nri `pkg/net/multiplex` and `pkg/api/api.proto` (v1alpha1), containerd/ttrpc
//! `PROTOCOL.md`.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The connection on which the runtime calls the plugin's service.
pub const PLUGIN: u32 = 1;
/// The connection on which the plugin calls the runtime's service.
pub const RUNTIME: u32 = 2;

/// The limit of a ttrpc payload, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 4 << 20;
const FRAME_HEADER: usize = 8;
const MESSAGE_HEADER: usize = 10;
/// The limit of a frame's payload, in bytes: a whole ttrpc message.
pub const MAX_FRAME_BYTES: usize = MAX_PAYLOAD_BYTES + MESSAGE_HEADER;

/// A violation of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("received a frame of {0} bytes; the limit is {MAX_FRAME_BYTES}")]
    Frame(usize),
    #[error("received a message of {0} bytes; the limit is {MAX_PAYLOAD_BYTES}")]
    Message(usize),
}

/// One frame: a piece of the byte stream of one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub connection: u32,
    pub payload: Bytes,
}

impl Frame {
    /// Takes the next complete frame from the buffer, if there is one.
    ///
    /// # Errors
    /// Fails if its length is beyond [`MAX_FRAME_BYTES`].
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Frame>, Error> {
        let Some((mut header, body)) = buffer.split_at_checked(FRAME_HEADER) else {
            return Ok(None);
        };
        let (connection, length) = (header.get_u32(), header.get_u32() as usize);
        if length > MAX_FRAME_BYTES {
            return Err(Error::Frame(length));
        }
        if body.len() < length {
            return Ok(None);
        }
        buffer.advance(FRAME_HEADER);
        Ok(Some(Frame { connection, payload: buffer.split_to(length).freeze() }))
    }

    /// # Panics
    /// Panics if the payload is longer than [`MAX_FRAME_BYTES`].
    pub fn encode(&self, buffer: &mut BytesMut) {
        assert!(self.payload.len() <= MAX_FRAME_BYTES);
        buffer.put_u32(self.connection);
        buffer.put_u32(length(&self.payload));
        buffer.put_slice(&self.payload);
    }
}

#[allow(clippy::cast_possible_truncation, reason = "no payload is longer than MAX_FRAME_BYTES")]
fn length(payload: &Bytes) -> u32 {
    payload.len() as u32
}

/// The type of a ttrpc message. NRI uses no streams (3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageType {
    Request,
    Response,
    Other(u8),
}

impl MessageType {
    fn byte(self) -> u8 {
        match self {
            MessageType::Request => 1,
            MessageType::Response => 2,
            MessageType::Other(byte) => byte,
        }
    }
}

/// One ttrpc message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub stream: u32,
    pub message_type: MessageType,
    pub payload: Bytes,
}

impl Message {
    /// Takes the next complete message from a connection's bytes, if there is one.
    ///
    /// # Errors
    /// Fails if its length is beyond [`MAX_PAYLOAD_BYTES`].
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Message>, Error> {
        let Some((mut header, body)) = buffer.split_at_checked(MESSAGE_HEADER) else {
            return Ok(None);
        };
        let (length, stream) = (header.get_u32() as usize, header.get_u32());
        let message_type = match header.get_u8() {
            1 => MessageType::Request,
            2 => MessageType::Response,
            other => MessageType::Other(other),
        };
        if length > MAX_PAYLOAD_BYTES {
            return Err(Error::Message(length));
        }
        if body.len() < length {
            return Ok(None);
        }
        buffer.advance(MESSAGE_HEADER);
        Ok(Some(Message { stream, message_type, payload: buffer.split_to(length).freeze() }))
    }

    /// The message as one frame of a connection.
    pub fn frame(&self, connection: u32) -> Frame {
        let mut payload = BytesMut::with_capacity(MESSAGE_HEADER + self.payload.len());
        payload.put_u32(length(&self.payload));
        payload.put_u32(self.stream);
        payload.put_u8(self.message_type.byte());
        payload.put_u8(0);
        payload.put_slice(&self.payload);
        Frame { connection, payload: payload.freeze() }
    }
}

/// ttrpc's `Request`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Request {
    #[prost(string, tag = "1")]
    pub service: String,
    #[prost(string, tag = "2")]
    pub method: String,
    #[prost(bytes = "bytes", tag = "3")]
    pub payload: Bytes,
}

/// ttrpc's `Response`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Response {
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    #[prost(bytes = "bytes", tag = "2")]
    pub payload: Bytes,
}

/// `google.rpc.Status`: code 0 is success.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Status {
    #[prost(int32, tag = "1")]
    pub code: i32,
    #[prost(string, tag = "2")]
    pub message: String,
}

/// The plugin's name and index, in its first call.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RegisterPluginRequest {
    #[prost(string, tag = "1")]
    pub plugin_name: String,
    /// Two digits: the position among the plugins.
    #[prost(string, tag = "2")]
    pub plugin_idx: String,
}

/// The runtime's configuration of the plugin. Timeouts are in ms; older runtimes send none.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ConfigureRequest {
    #[prost(string, tag = "2")]
    pub runtime_name: String,
    #[prost(string, tag = "3")]
    pub runtime_version: String,
    #[prost(int64, tag = "5")]
    pub request_timeout: i64,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ConfigureResponse {
    /// Bit `event - 1` of each event that is subscribed to.
    #[prost(int32, tag = "2")]
    pub events: i32,
}

/// The pods and containers that exist already; `more` if another part follows.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SynchronizeRequest {
    #[prost(message, repeated, tag = "1")]
    pub pods: Vec<PodSandbox>,
    #[prost(message, repeated, tag = "2")]
    pub containers: Vec<Container>,
    #[prost(bool, tag = "3")]
    pub more: bool,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SynchronizeResponse {
    #[prost(bool, tag = "2")]
    pub more: bool,
}

/// The form in which older runtimes report an [`event`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct StateChangeEvent {
    #[prost(int32, tag = "1")]
    pub event: i32,
    /// A [`PodSandbox`], which only a start needs.
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub pod: Option<Bytes>,
    #[prost(message, optional, tag = "3")]
    pub container: Option<Container>,
}

/// The form in which newer runtimes report an event: a call named after it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ContainerRequest {
    /// As in [`StateChangeEvent`].
    #[prost(bytes = "bytes", optional, tag = "1")]
    pub pod: Option<Bytes>,
    #[prost(message, optional, tag = "2")]
    pub container: Option<Container>,
}

/// A pod.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PodSandbox {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub uid: String,
    #[prost(string, tag = "4")]
    pub namespace: String,
    #[prost(btree_map = "string, string", tag = "5")]
    pub labels: std::collections::BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "6")]
    pub annotations: std::collections::BTreeMap<String, String>,
    #[prost(string, tag = "7")]
    pub runtime_handler: String,
}

/// A container.
#[derive(Clone, PartialEq, Eq, prost::Message)]
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
    use proptest::{collection::vec, prelude::*};
    use prost::Message as _;

    use super::*;

    /// Sends messages in frames of any size over a socket that delivers pieces of any size.
    fn transfer(messages: &[Message], frame: usize, piece: usize) -> Vec<Message> {
        let mut stream = BytesMut::new();
        messages.iter().for_each(|p| stream.put_slice(&p.frame(PLUGIN).payload));
        let mut socket = BytesMut::new();
        for chunk in stream.chunks(frame) {
            Frame { connection: PLUGIN, payload: Bytes::copy_from_slice(chunk) }
                .encode(&mut socket);
        }
        let (mut raw, mut bytes, mut all) = (BytesMut::new(), BytesMut::new(), Vec::new());
        for chunk in socket.chunks(piece) {
            raw.put_slice(chunk);
            while let Some(frame) = Frame::decode(&mut raw).unwrap() {
                bytes.put_slice(&frame.payload);
            }
            while let Some(message) = Message::decode(&mut bytes).unwrap() {
                all.push(message);
            }
        }
        all
    }

    proptest! {
        #[test]
        fn messages_survive_any_fragmentation(
            payloads in vec(vec(any::<u8>(), 0..40), 0..5),
            frame in 1..30usize,
            piece in 1..30usize,
        ) {
            let message = |(n, payload): (usize, Vec<u8>)| Message {
                stream: u32::try_from(n).unwrap(),
                message_type: MessageType::Request,
                payload: payload.into(),
            };
            let messages: Vec<Message> = payloads.into_iter().enumerate().map(message).collect();
            prop_assert_eq!(transfer(&messages, frame, piece), messages);
        }

        #[test]
        fn decoder_never_panics(bytes in vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = Frame::decode(&mut buffer) {}
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = Message::decode(&mut buffer) {}
            let _ = StateChangeEvent::decode(&bytes[..]);
            let _ = SynchronizeRequest::decode(&bytes[..]);
        }
    }

    #[test]
    fn excessive_length_is_refused_before_allocation() {
        let mut frame = BytesMut::from(&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff][..]);
        assert_eq!(Frame::decode(&mut frame), Err(Error::Frame(0xffff_ffff)));
        let mut message = BytesMut::from(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 1, 0][..]);
        assert_eq!(Message::decode(&mut message), Err(Error::Message(0xffff_ffff)));
    }

    #[test]
    fn unknown_fields_are_skipped() {
        // A pod with an id and a field 99 of a later version.
        let bytes = [&[0x0a, 1, b'x'][..], &[0x9a, 0x06, 2, 1, 2]].concat();
        assert_eq!(PodSandbox::decode(&bytes[..]).unwrap().id, "x");
    }
}
