//! Every NBD decoder on arbitrary bytes: no panic, and what decodes encodes to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd::protocol::Framing;
use nbd::protocol::handshake::{
    self, ClientFlags, ContextRequest, ExportRequest, Info, OptionHeader, OptionReply,
};
use nbd::protocol::reply::{Payload, Reply};
use nbd::protocol::request::{Header, StatusPayload};

fuzz_target!(|input: &[u8]| {
    let Some((&selector, bytes)) = input.split_first() else { return };
    let mut encoded = Vec::new();
    match selector % 10 {
        0 => {
            for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
                if let Ok(Some(header)) = Header::decode(framing, bytes) {
                    encoded.clear();
                    header.encode(framing, &mut encoded);
                    assert_eq!(encoded, bytes[..Header::wire_bytes(framing)]);
                    let _ = header.payload_bytes(framing);
                }
            }
        }
        1 => {
            if let Ok(payload) = StatusPayload::decode(bytes) {
                payload.encode(&mut encoded);
                assert_eq!(encoded, bytes);
            }
        }
        2 => {
            if let Ok(request) = ExportRequest::decode(bytes) {
                request.encode(&mut encoded);
                assert_eq!(encoded, bytes);
            }
        }
        3 => {
            if let Ok(request) = ContextRequest::decode(bytes) {
                request.encode(&mut encoded);
                assert_eq!(encoded, bytes);
            }
        }
        4 => {
            if let Ok(Some(info)) = Info::decode(bytes) {
                info.encode(&mut encoded);
                assert_eq!(encoded, bytes);
            }
        }
        5 => {
            let _ = OptionHeader::decode(bytes);
            let _ = OptionReply::decode(bytes);
            if let Some(&flags) = bytes.first_chunk()
                && let Ok(client) = ClientFlags::decode(flags)
            {
                client.encode(&mut encoded);
                assert_eq!(encoded, flags);
            }
        }
        6 => {
            if let Ok((name, description)) = handshake::decode_server(bytes) {
                handshake::encode_server(name, description, &mut encoded);
                assert_eq!(encoded, bytes);
            }
        }
        7 => {
            if let Ok((id, name)) = handshake::decode_context(bytes) {
                handshake::encode_context(id, name, &mut encoded);
                assert_eq!(encoded, bytes);
            }
        }
        8 => {
            if let Ok(Some((_, length))) = Reply::decode(bytes) {
                assert!(length <= bytes.len());
            }
        }
        _ => {
            if let Some((kind, payload)) = bytes.split_first_chunk() {
                let _ = Payload::decode(u16::from_be_bytes(*kind), payload);
            }
        }
    }
});
