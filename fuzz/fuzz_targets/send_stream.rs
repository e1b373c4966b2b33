//! Streams of `parallax send`: bytes as they come, and parts with right checksums that say anything.
#![no_main]

use base::SnapshotUuid;
use fuzz::script::Script;
use libfuzzer_sys::fuzz_target;
use stream::{
    Encoding, FRAME_DATA_BYTES_MAX, Frame, Header, Packed, Packer, Progress, Reader, Unpacker,
    Writer,
};

/// What is taken lies on the disk, in order, and is written again in the same bytes.
fn read(bytes: &[u8]) {
    let Ok(mut reader) = Reader::open(bytes) else { return };
    let header = reader.header().clone();
    let (mut writer, begin) = Writer::begin(&header);
    let mut again = begin.to_vec();
    let mut unpacker = Unpacker::new().expect("memory");
    let mut at = header.start;
    while let Ok(frame) = reader.next_frame() {
        let Some(frame) = frame else {
            again.extend(writer.end());
            // Of the header, what is reserved or behind a text may be anything.
            assert_eq!(again[512..], bytes[512..]);
            return;
        };
        let end = frame.end();
        match frame {
            Frame::Zeroes { offset, length } => {
                assert!(offset >= at && end - offset == length);
                again.extend(writer.zeroes(offset, length));
            }
            Frame::Data(packed) => {
                assert!(packed.offset >= at && packed.length <= FRAME_DATA_BYTES_MAX);
                assert!(packed.payload.len() <= packed.length);
                again.extend(writer.data(&packed));
                again.extend(&packed.payload);
                let length = packed.length;
                if let Ok(data) = unpacker.unpack(packed) {
                    assert_eq!(data.len(), length);
                }
            }
        }
        assert!(end > at && end <= header.size_bytes);
        at = end;
    }
}

fn blocks(script: &mut Script<'_>) -> u64 {
    if script.byte() % 8 == 0 { script.number() } else { u64::from(script.byte()) * 4096 }
}

fn forged(script: &mut Script<'_>) -> Vec<u8> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).chars().take(20).collect::<String>();
    let header = Header {
        snapshot: SnapshotUuid([script.byte(); 16]),
        base: Some(SnapshotUuid([script.byte(); 16])),
        size_bytes: blocks(script).wrapping_add(4096 * u64::from(script.byte())),
        start: blocks(script),
        created_ns: script.number(),
        name: text(script.bytes()),
        label: text(script.bytes()),
    };
    let mut packer = Packer::new(Some(1)).expect("memory");
    let (mut writer, begin) = Writer::begin(&header);
    let mut stream = begin.to_vec();
    let mut at = header.start;
    while !script.is_over() {
        let offset = if script.byte() % 4 == 0 { blocks(script) } else { at };
        match script.byte() % 4 {
            0 => {
                let length = blocks(script);
                stream.extend(writer.zeroes(offset, length));
                at = offset.saturating_add(length);
            }
            1 => {
                let length = usize::try_from(blocks(script)).unwrap_or(usize::MAX);
                let encoding =
                    if script.byte() % 2 == 0 { Encoding::Plain } else { Encoding::Zstd };
                let payload = script.bytes().to_vec();
                let packed = Packed { offset, length, encoding, payload };
                stream.extend(writer.data(&packed));
                stream.extend(&packed.payload);
                at = offset.saturating_add(length as u64);
            }
            _ => {
                let data = vec![script.byte(); 4096 * (1 + script.below(4))];
                let mut packed = packer.pack(offset, data);
                at = offset.saturating_add(packed.length as u64);
                if script.byte() % 4 == 0 {
                    script.patch(&mut packed.payload);
                }
                stream.extend(writer.data(&packed));
                stream.extend(&packed.payload);
            }
        }
    }
    stream.extend(writer.end());
    stream
}

fuzz_target!(|input: &[u8]| {
    let Some((&selector, bytes)) = input.split_first() else { return };
    match selector % 4 {
        0 => read(bytes),
        1 => {
            if let Some(progress) = Progress::from_block(bytes) {
                assert_eq!(Progress::from_token(&progress.to_token()), Some(progress));
            }
            if let Ok(token) = std::str::from_utf8(bytes)
                && let Some(progress) = Progress::from_token(token)
            {
                assert_eq!(progress.to_token(), token.to_lowercase());
            }
        }
        _ => read(&forged(&mut Script(bytes))),
    }
});
