//! docs/on-disk-format.md against the code: every table, every constant, every record kind.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test that fails says where")]

use base::{
    BLOCK_SIZE, BirthLabel, Block, Buffer, ClaimGeneration, Epoch, Lba, Lsn, Pba,
    REQUEST_BLOCKS_MAX, RingPosition, SnapshotNumber, StoreUuid, VdiId,
};
use parallax_ondisk::{
    BLOCKS_MAX, COUNTER_END, Checksums, Entry, EntryState, FANOUT, HEIGHT_MAX,
    HISTORY_VERSIONS_MAX, KNOWN_INCOMPATIBLE, KNOWN_READ_ONLY_COMPATIBLE, KeepRule, KeepRules,
    LABEL_BYTES_MAX, LAYOUTS, LEDGER_RECORDS_MAX, LOG_PAYLOAD_BYTES, LOG_SEGMENTS_MAX,
    LogBlockBuilder, NAME_BYTES_MAX, Node, Origin, RECORD_NUMBER_END, RangeState, Record,
    RecordBody, RootRef, SUPERBLOCK_COPIES, Seal, StructureKind,
};

const DOCUMENT: &str = include_str!("../../../docs/on-disk-format.md");

/// The cells of the first table that begins after `heading`, head and rule left out.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let mut lines = DOCUMENT.lines().skip_while(|line| *line != heading);
    assert!(lines.next().is_some(), "there is no heading {heading:?}");
    let rows = lines
        .take_while(|line| !line.starts_with('#'))
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2);
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

fn number(cell: &str) -> usize {
    cell.parse().unwrap_or_else(|_| panic!("{cell:?} is not a number"))
}

#[test]
fn every_structure_is_documented_as_it_is() {
    for layout in LAYOUTS {
        let documented: Vec<(usize, usize, String)> =
            table(&format!("### {}, {} bytes", layout.name, layout.size))
                .iter()
                .map(|row| (number(row[0]), number(row[1]), row[2].replace('`', "")))
                .collect();
        let coded: Vec<(usize, usize, String)> = layout
            .fields
            .iter()
            .map(|field| (field.offset, field.size, field.name.to_owned()))
            .collect();
        assert_eq!(documented, coded, "{}", layout.name);
        let mut end = 0;
        for field in layout.fields {
            assert_eq!(field.offset, end, "{}: a gap before {}", layout.name, field.name);
            end += field.size;
        }
        assert_eq!(end, layout.size, "{}", layout.name);
    }
    let tables = DOCUMENT.lines().filter(|line| line.starts_with("| offset | size |")).count();
    assert_eq!(tables, LAYOUTS.len(), "a documented structure is not in the code");
}

#[test]
fn types_fit_their_sizes() {
    for layout in LAYOUTS {
        for row in table(&format!("### {}, {} bytes", layout.name, layout.size)) {
            let size = match row[3] {
                "u8" => 1,
                "u16" => 2,
                "u32" => 4,
                "u64" | "PBA" | "LSN" | "ring position" => 8,
                "root reference" => RootRef::BYTES,
                "log segment × 16" => 16 * 48,
                "bytes" => number(row[1]),
                other => panic!("{other:?} is not a type"),
            };
            assert_eq!(size, number(row[1]), "{}: {}", layout.name, row[2]);
        }
    }
}

#[test]
fn constants_are_documented_as_they_are() {
    let [first, second] = SUPERBLOCK_COPIES.map(Pba::get);
    let expected: [(&str, u64); 17] = [
        ("bytes in a block", BLOCK_SIZE as u64),
        ("entries in a node", FANOUT as u64),
        ("greatest height of a tree", u64::from(HEIGHT_MAX)),
        ("bytes of records in a log block", LOG_PAYLOAD_BYTES as u64),
        ("log segments in a host slot", LOG_SEGMENTS_MAX as u64),
        ("blocks that one write record names, at most", REQUEST_BLOCKS_MAX as u64),
        ("bytes of a VDI's name, at most", NAME_BYTES_MAX as u64),
        ("bytes of a snapshot's label, at most", LABEL_BYTES_MAX as u64),
        ("versions of a history, at most", u64::from(HISTORY_VERSIONS_MAX)),
        ("records of a ledger, at most", LEDGER_RECORDS_MAX as u64),
        ("blocks of a VDI or a store, at most", BLOCKS_MAX),
        ("LSNs, epochs, sequences and ring positions stay below", COUNTER_END),
        ("ids of VDIs and numbers of snapshots stay below", RECORD_NUMBER_END),
        ("PBA of the superblock's first copy", first),
        ("PBA of the superblock's second copy", second),
        ("incompatible features known", KNOWN_INCOMPATIBLE),
        ("read-only compatible features known", KNOWN_READ_ONLY_COMPATIBLE),
    ];
    let documented: Vec<(&str, u64)> = table("## Constants")
        .iter()
        .map(|row| (row[0], row[1].parse().expect("a constant is a number")))
        .collect();
    assert_eq!(documented, expected);
}

#[test]
fn checksum_kinds_are_documented_as_they_are() {
    let documented: Vec<(&str, usize)> =
        table("## Checksums").iter().map(|row| (row[0], number(row[1]))).collect();
    let expected = [
        ("superblock", StructureKind::Superblock as usize),
        ("host slot", StructureKind::HostSlot as usize),
        ("heartbeat", StructureKind::Heartbeat as usize),
        ("log block", StructureKind::LogBlock as usize),
    ];
    assert_eq!(documented, expected);
}

/// One record of every kind, and what the document calls it; texts of three bytes, two hashes.
fn records() -> Vec<(&'static str, RecordBody)> {
    let (name, label) = ("abc".to_owned(), "abc".to_owned());
    let (number, origin) = (SnapshotNumber::new(9), Origin::Asked);
    let (lba, pba, position) = (Lba::new(1), Pba::new(2), Some(Lsn::new(10)));
    let rules = || KeepRules { rules: vec![KeepRule { every_ms: 0, for_s: 1 }], budget: None };
    vec![
        ("write", RecordBody::Write { lba, pba, hashes: vec![3, 4] }),
        ("range", RecordBody::Range { lba, count: 5, state: RangeState::Zero }),
        ("void", RecordBody::Void { lsn: Lsn::new(6) }),
        ("snapshot", RecordBody::Snapshot { number, wall_ns: 1, store_ns: 2, label, origin }),
        ("delete snapshot", RecordBody::DeleteSnapshot { number }),
        ("create", RecordBody::Create { block_count: 7, wall_ns: 1, name: name.clone() }),
        (
            "clone",
            RecordBody::Clone {
                source: VdiId::new(8),
                snapshot: number,
                position: None,
                wall_ns: 1,
                name: name.clone(),
            },
        ),
        ("rename", RecordBody::Rename { name: name.clone() }),
        ("resize", RecordBody::Resize { block_count: 7 }),
        ("delete", RecordBody::Delete),
        ("rollback", RecordBody::Rollback { number, position: None }),
        ("time", RecordBody::Time { wall_ns: 1, store_ns: 2 }),
        ("adopt", RecordBody::Adopt { source: VdiId::new(8), number }),
        ("retain", RecordBody::Retain { rules: Some(rules()) }),
        ("hold", RecordBody::Hold { number, wall_ns: 1, store_ns: 2, until: None }),
        ("end hold", RecordBody::EndHold { number, wall_ns: 1, store_ns: 2, is_due: true }),
        ("retain by default", RecordBody::RetainByDefault { rules: rules() }),
        (
            "clone at a position",
            RecordBody::Clone {
                source: VdiId::new(8),
                snapshot: number,
                position,
                wall_ns: 1,
                name,
            },
        ),
        ("rollback to a position", RecordBody::Rollback { number, position }),
    ]
}

/// The bytes of a record, as they stand in a log block.
fn encoded(body: RecordBody) -> Vec<u8> {
    let record = Record { vdi: VdiId::new(3), claim: ClaimGeneration::new(1), body };
    let mut builder = LogBlockBuilder::default();
    builder.push(&record);
    let seal = Seal {
        epoch: Epoch::new(1),
        nonce: 1,
        position: RingPosition::new(1),
        at: Pba::new(1),
        first_lsn: Lsn::new(1),
        durable: Lsn::new(0),
        previous: 0,
        slot_sequence: 0,
        cut: Lsn::new(0),
    };
    let mut buffer = Buffer::zeroed(1);
    builder.seal(&Checksums::new(StoreUuid([1; 16]), &[2; 32]), &seal, &mut buffer);
    buffer.bytes()[72..72 + record.encoded_bytes()].to_vec()
}

#[test]
fn record_kinds_are_documented_as_they_are() {
    let rows = table("### record header, 16 bytes");
    let bodies: Vec<_> = DOCUMENT
        .lines()
        .skip_while(|line| !line.starts_with("| kind | record |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|row| row.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>())
        .collect();
    assert_eq!(rows.len(), 5);
    assert_eq!(bodies.len(), records().len());
    for (row, (name, body)) in bodies.iter().zip(records()) {
        let bytes = encoded(body);
        assert_eq!(row[1], name);
        assert_eq!(usize::from(bytes[2]), number(row[0]), "{name}: kind");
        let (fixed, rest) = row[2].split_once(" + ").unwrap_or((row[2], ""));
        let variable = match rest {
            "" => 0,
            "8 per block" => 16,
            "name" | "label" => 3,
            other => panic!("{other:?}"),
        };
        let length = (number(fixed) + variable).next_multiple_of(8);
        assert_eq!(bytes.len(), length, "{name}: length");
        let stored = u16::from_le_bytes([bytes[0], bytes[1]]);
        assert_eq!(usize::from(stored), length, "{name}: stored length");
    }
}

#[test]
fn entries_are_documented_as_they_are() {
    let entry = Entry::mapped(
        Pba::new(0x11_2233_4455),
        0xffff_6677_8899_aabb,
        BirthLabel::new(0xccdd_eeff),
    );
    let mut entries = [Entry::UNMAPPED; FANOUT];
    entries[1] = entry;
    entries[2] = Entry::ZERO;
    entries[3] = Entry::DAMAGED;
    let node = Node::build(&entries, Buffer::zeroed(1));
    let Block(bytes) = node.block();
    let mut offset = 0;
    let expected: [(&str, &[u8]); 4] = [
        ("PBA of what it names", &[0x55, 0x44, 0x33, 0x22, 0x11]),
        ("state (bits 0 and 1) and flags", &[2]),
        ("birth label", &[0xff, 0xee, 0xdd, 0xcc]),
        ("low bits of the hash of what it names", &[0xbb, 0xaa, 0x99, 0x88, 0x77, 0x66]),
    ];
    let rows = table("### Entry, 16 bytes");
    assert_eq!(rows.len(), expected.len());
    for (row, (meaning, stored)) in rows.iter().zip(expected) {
        assert_eq!((row[2], number(row[0]), number(row[1])), (meaning, offset, stored.len() * 8));
        assert_eq!(&bytes[16 + offset..16 + offset + stored.len()], stored, "{meaning}");
        offset += stored.len();
    }
    for (index, state) in [(2, EntryState::Zero), (3, EntryState::Damaged)] {
        let mut expected = [0; 16];
        expected[5] = state as u8;
        assert_eq!(bytes[index * 16..(index + 1) * 16], expected, "{state:?}");
    }
    assert!(DOCUMENT.contains(&format!("### Root reference, {} bytes", RootRef::BYTES)));
}

/// XXH3-64 under the derived secret, over the seed's parts: as the document says, from scratch.
#[test]
fn checksums_are_documented_as_they_are() {
    use xxhash_rust::xxh3::{Xxh3Builder, xxh3_64_with_secret, xxh3_64_with_seed};
    let (uuid, key) = (StoreUuid([7; 16]), [9u8; 32]);
    let mut secret = [0; 192];
    for (word, bytes) in (0u64..).zip(secret.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&xxh3_64_with_seed(&key, word).to_le_bytes());
    }
    let data = [5; BLOCK_SIZE];
    let checksums = Checksums::new(uuid, &key);
    assert_eq!(checksums.block(&data), xxh3_64_with_secret(&data, &secret));

    let at = Pba::new(77);
    let seal = Seal {
        epoch: Epoch::new(3),
        nonce: 4,
        position: RingPosition::new(5),
        at,
        first_lsn: Lsn::new(6),
        durable: Lsn::new(5),
        previous: 0,
        slot_sequence: 0,
        cut: Lsn::new(0),
    };
    let mut buffer = Buffer::zeroed(1);
    let sealed = LogBlockBuilder::default().seal(&checksums, &seal, &mut buffer);
    let mut hasher = Xxh3Builder::new().with_secret(secret).build();
    hasher.update(&uuid.0);
    hasher.update(&[4]);
    hasher.update(&77u64.to_le_bytes());
    hasher.update(&3u64.to_le_bytes());
    hasher.update(&4u64.to_le_bytes());
    hasher.update(&buffer.bytes()[..4088]);
    assert_eq!(sealed, hasher.digest());
    assert_eq!(buffer.bytes()[4088..], sealed.to_le_bytes());
}
