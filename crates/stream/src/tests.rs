//! A small stream, whole, cut at every byte, and with every byte altered.

use base::SnapshotUuid;
use zerocopy::IntoBytes;

use super::*;
use crate::frame::{END, RawFrame, ZEROES};

fn header() -> Header {
    Header {
        snapshot: SnapshotUuid([1; 16]),
        base: Some(SnapshotUuid([2; 16])),
        size_bytes: 64 << 20,
        start: 0,
        created_ns: 1_700_000_000_000_000_000,
        name: "web01".to_owned(),
        label: "daily".to_owned(),
    }
}

/// Frames that are as different as can be.
fn frames() -> Vec<Frame> {
    let mut packer = Packer::new(Some(LEVEL_DEFAULT)).unwrap();
    let mut state = 1u64;
    let noise = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    let noise: Vec<u8> = noise.flatten().take(4096).collect();
    let frames = vec![
        Frame::Data(packer.pack(0, vec![7; 8192])),
        Frame::Zeroes { offset: 8192, length: 1 << 20 },
        Frame::Data(packer.pack(2 << 20, noise)),
        Frame::Zeroes { offset: 63 << 20, length: 1 << 20 },
    ];
    let encodings: Vec<_> = frames.iter().filter_map(encoding).collect();
    assert_eq!(encodings, [Encoding::Zstd, Encoding::Plain]);
    frames
}

fn encoding(frame: &Frame) -> Option<Encoding> {
    match frame {
        Frame::Data(packed) => Some(packed.encoding),
        Frame::Zeroes { .. } => None,
    }
}

/// The parts of a stream: header, frames, end.
fn parts(header: &Header, frames: &[Frame]) -> Vec<Vec<u8>> {
    let (mut writer, begin) = Writer::begin(header);
    let mut parts = vec![begin.to_vec()];
    for frame in frames {
        parts.push(match frame {
            Frame::Data(packed) => [&writer.data(packed)[..], &packed.payload].concat(),
            Frame::Zeroes { offset, length } => writer.zeroes(*offset, *length).to_vec(),
        });
    }
    parts.push(writer.end().to_vec());
    parts
}

fn whole() -> Vec<u8> {
    parts(&header(), &frames()).concat()
}

fn read(bytes: &[u8]) -> Result<Vec<Frame>, Error> {
    let mut reader = Reader::open(bytes)?;
    let mut frames = Vec::new();
    while let Some(frame) = reader.next_frame()? {
        frames.push(frame);
    }
    assert!(reader.next_frame().unwrap().is_none(), "the end stays the end");
    Ok(frames)
}

#[test]
fn what_is_written_is_read() {
    let bytes = whole();
    assert_eq!(Reader::open(&bytes[..]).unwrap().header(), &header());
    let read = read(&bytes).unwrap();
    assert_eq!(read, frames());
    let Frame::Data(packed) = read[0].clone() else { panic!() };
    assert_eq!(Unpacker::new().unwrap().unpack(packed).unwrap(), [7; 8192]);
    let empty = Header { base: None, label: String::new(), ..header() };
    let bytes = parts(&empty, &[]).concat();
    assert_eq!(Reader::open(&bytes[..]).unwrap().header(), &empty);
    assert_eq!(super::tests::read(&bytes).unwrap(), []);
}

#[test]
fn a_stream_that_is_cut_anywhere_is_cut() {
    let bytes = whole();
    for length in 0..bytes.len() {
        let error = read(&bytes[..length]).unwrap_err();
        assert!(matches!(error, Error::Cut), "{length}: {error}");
    }
}

#[test]
fn a_stream_with_any_byte_altered_is_refused_and_never_taken_for_cut() {
    let bytes = whole();
    for position in 0..bytes.len() {
        for flip in [1, 0x80, 0xff] {
            let mut altered = bytes.clone();
            altered[position] ^= flip;
            let error = read(&altered).unwrap_err();
            assert!(!matches!(error, Error::Cut | Error::Io(_)), "{position}: {error}");
        }
    }
}

#[test]
fn parts_that_are_left_out_repeated_or_moved_are_refused() {
    let parts = parts(&header(), &frames());
    let refused = |parts: Vec<&Vec<u8>>| {
        let bytes = parts.into_iter().flatten().copied().collect::<Vec<_>>();
        let error = read(&bytes).unwrap_err();
        assert!(!matches!(error, Error::Cut), "{error}");
    };
    for at in 1..parts.len() - 1 {
        let without = parts.iter().enumerate().filter(|(index, _)| *index != at);
        refused(without.map(|(_, part)| part).collect());
        let mut repeated: Vec<_> = parts.iter().collect();
        repeated.insert(at, &parts[at]);
        refused(repeated);
        for other in 1..at {
            let mut moved: Vec<_> = parts.iter().collect();
            moved.swap(at, other);
            refused(moved);
        }
    }
    let twice: Vec<_> = parts.iter().chain(&parts).collect();
    refused(twice);
}

#[test]
fn parts_of_another_stream_are_refused() {
    let ours = parts(&header(), &frames());
    let other = Header { label: "weekly".to_owned(), ..header() };
    let theirs = parts(&other, &frames());
    for at in 0..ours.len() {
        let mixed: Vec<u8> = [&ours[..at], &theirs[at..=at], &ours[at + 1..]].concat().concat();
        assert!(read(&mixed).is_err(), "{at}");
    }
}

#[test]
fn what_is_no_stream_is_told_from_one_of_another_version() {
    for nonsense in [&b"QFI\xfb"[..], &[0; 4096], b"PLXSENDX", &[0xff; 3]] {
        assert!(matches!(read(nonsense), Err(Error::NotAStream)), "{nonsense:?}");
    }
    let mut later = whole();
    later[8] = 2;
    assert!(matches!(read(&later), Err(Error::Version(2))));
}

/// Frames whose checksums are right, and which say what no sender says.
#[test]
fn frames_that_make_no_sense_are_refused() {
    let (_, begin) = Writer::begin(&header());
    let (_, checksum) = header().encode();
    let invalid = |raw: RawFrame| {
        let raw = RawFrame { checksum: raw.chained(checksum).into(), ..raw };
        let bytes = [&begin[..], raw.as_bytes(), &[0; 8192]].concat();
        let error = read(&bytes).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{error}");
    };
    let zeroes = |offset, length| RawFrame::bare(ZEROES, offset, length);
    invalid(zeroes(0, 0));
    invalid(zeroes(512, 4096));
    invalid(zeroes(0, 512));
    invalid(zeroes(64 << 20, 4096));
    invalid(zeroes(4096, 64 << 20));
    invalid(zeroes(u64::MAX - 4095, 4096));
    invalid(RawFrame { stored_bytes: 1.into(), ..zeroes(0, 4096) });
    invalid(RawFrame::bare(9, 0, 4096));
    invalid(RawFrame::bare(END, 1, 0));
    invalid(RawFrame::bare(END, 0, 1));
    let data = |length: usize, stored: usize, encoding| {
        let packed = Packed { offset: 0, length, encoding, payload: vec![0; stored] };
        RawFrame::of(&packed)
    };
    invalid(data(4096, 4095, Encoding::Plain));
    invalid(data(4096, 4097, Encoding::Zstd));
    invalid(data(2 << 20, 4096, Encoding::Zstd));
    invalid(RawFrame { encoding: 2, ..data(4096, 4096, Encoding::Plain) });
    invalid(RawFrame { reserved: 1.into(), ..data(4096, 4096, Encoding::Plain) });
}

#[test]
fn what_unpacks_to_another_length_is_refused() {
    let mut packer = Packer::new(Some(LEVEL_MAX)).unwrap();
    let mut unpacker = Unpacker::new().unwrap();
    let packed = packer.pack(0, vec![0; 1 << 20]);
    assert!(packed.payload.len() < 1000, "{}", packed.payload.len());
    for length in [0, 4096, (1 << 20) - 4096] {
        let bomb = Packed { length, ..packed.clone() };
        assert!(matches!(unpacker.unpack(bomb), Err(Error::Invalid(_))), "{length}");
    }
    let nonsense = Packed { payload: vec![0xff; 100], ..packed.clone() };
    assert!(matches!(unpacker.unpack(nonsense), Err(Error::Invalid(_))));
    assert_eq!(unpacker.unpack(packed).unwrap(), vec![0; 1 << 20]);
    let plain = Packer::new(None).unwrap().pack(4096, vec![0; 4096]);
    assert_eq!((plain.encoding, plain.payload.len()), (Encoding::Plain, 4096));
}

#[test]
fn progress_is_read_as_it_is_noted() {
    let progress = Progress { done: 12 << 20, ..Progress::beginning(&header()) };
    let block = progress.to_block();
    assert_eq!((block.len(), Progress::from_block(&block)), (PROGRESS_BYTES, Some(progress)));
    let token = progress.to_token();
    assert_eq!(Progress::from_token(&token), Some(progress));
    let full = Progress { base: None, ..progress };
    assert_eq!(Progress::from_token(&full.to_token()), Some(full));
    for position in 0..72 {
        let mut altered = block.clone();
        altered[position] ^= 1;
        assert_eq!(Progress::from_block(&altered), None, "{position}");
    }
    for position in 0..token.len() {
        let mut altered = token.clone();
        altered.replace_range(
            position..=position,
            if altered.as_bytes()[position] == b'0' { "1" } else { "0" },
        );
        assert_eq!(Progress::from_token(&altered), None, "{position}");
        assert_eq!(Progress::from_token(&token[..position]), None);
    }
    for nonsense in ["", "+", &"\u{e4}".repeat(56), &"+1".repeat(56)] {
        assert_eq!(Progress::from_token(nonsense), None, "{nonsense}");
    }
    assert_eq!(Progress::from_block(&[0; 4096]), None);
}

#[test]
fn a_stream_goes_on_where_one_was_cut_or_before() {
    let progress = Progress { done: 12 << 20, ..Progress::beginning(&header()) };
    let check = |header: Header, expected| assert_eq!(progress.continues_with(&header), expected);
    check(header(), true);
    check(Header { start: 12 << 20, ..header() }, true);
    check(Header { start: 13 << 20, ..header() }, false);
    check(Header { base: None, ..header() }, false);
    check(Header { snapshot: SnapshotUuid([9; 16]), ..header() }, false);
}

/// docs/send-stream.md against the code: every table, the version and the bounds.
mod document {
    use std::mem::offset_of;

    use super::*;
    use crate::header::{MAGIC, RawHeader};
    use crate::progress::RawProgress;

    const DOCUMENT: &str = include_str!("../../../docs/send-stream.md");

    /// `(offset, size, field)` of the first table behind a heading.
    fn table(heading: &str) -> Vec<(usize, usize, String)> {
        let lines = DOCUMENT.lines().skip_while(|line| *line != heading);
        let rows = lines.skip_while(|line| !line.starts_with('|')).skip(2);
        rows.take_while(|line| line.starts_with('|'))
            .map(|row| {
                let cells: Vec<_> = row.split('|').map(str::trim).collect();
                let number = |cell: &str| cell.parse().unwrap();
                (number(cells[1]), number(cells[2]), cells[3].replace('`', ""))
            })
            .collect()
    }

    macro_rules! fields {
        ($raw:ident: $($field:ident),*) => {{
            let mut fields: Vec<(usize, usize, String)> = Vec::new();
            $(fields.push((offset_of!($raw, $field), 0, stringify!($field).to_owned()));)*
            let ends = fields.iter().map(|field| field.0).skip(1).chain([size_of::<$raw>()]);
            let ends: Vec<_> = ends.collect();
            for (field, end) in fields.iter_mut().zip(ends) {
                field.1 = end - field.0;
            }
            fields
        }};
    }

    #[test]
    fn structures_are_documented_as_they_are() {
        assert_eq!(
            table("### Header, 512 bytes"),
            fields!(
                RawHeader: magic, version, flags, snapshot, base, size_bytes, start, created_ns,
                name, name_length, label, label_length, reserved, checksum
            )
        );
        assert_eq!(
            table("### Frame header, 40 bytes"),
            fields!(
                RawFrame: kind, encoding, reserved, stored_bytes, offset, length, payload, checksum
            )
        );
        assert_eq!(
            table("## Partial disks"),
            fields!(
                RawProgress: magic, version, reserved, snapshot, base, size_bytes, done, checksum
            )
        );
    }

    #[test]
    fn numbers_are_documented_as_they_are() {
        let magic = std::str::from_utf8(&MAGIC[..7]).unwrap();
        for said in [
            format!("version {VERSION}"),
            format!("`{magic}` and a line feed"),
            format!("at most {FRAME_DATA_BYTES_MAX} bytes"),
            format!("{} data", crate::frame::DATA),
            format!("{ZEROES} zeroes"),
            format!("{END} end"),
            format!("{} plain, {} zstd", Encoding::Plain as u8, Encoding::Zstd as u8),
            format!("{:#018x}", crate::header::SEED),
        ] {
            assert!(DOCUMENT.contains(&said), "{said}");
        }
    }
}
