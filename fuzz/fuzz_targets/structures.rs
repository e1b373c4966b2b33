//! Every persistent structure: bytes behind a right checksum decode to an error, or to a value
//! that is encoded and decoded again without a change; and the allocator takes whatever stored
//! tables and bitmaps say.
#![no_main]

use base::{BLOCK_SIZE, Block, Buffer, Epoch, ExtentIndex, Pba, StoreUuid};
use blockstore::allocator::{Allocator, Space, Window};
use fuzz::script::Script;
use libfuzzer_sys::fuzz_target;
use ondisk::{
    Checksums, DirectoryRecord, Entry, EntryState, ExtentKind, ExtentRecord, FANOUT, Heartbeat,
    HostSlot, LedgerRecord, LogBlock, LogBlockBuilder, Node, Record, Seal, SnapshotRecord,
    StructureKind, Superblock, TableRecord, VdiRecord,
};

const EPOCH: Epoch = Epoch::new(3);
const NONCE: u64 = 5;

fn checksums() -> Checksums {
    Checksums::new(StoreUuid([1; 16]), &[2; 32])
}

/// A block that begins with `magic`, with patches all over it.
fn patched(script: &mut Script, magic: &[u8]) -> Block {
    let mut block = Block([0; BLOCK_SIZE]);
    let head = script.bytes();
    block.0[magic.len()..][..head.len()].copy_from_slice(head);
    while !script.is_over() {
        script.patch(&mut block.0);
    }
    block.0[..magic.len()].copy_from_slice(magic);
    block
}

fn superblock(script: &mut Script, at: Pba) {
    let mut block = patched(script, b"PARALLAX\x01\0\0\0\x01\0\0\0");
    let uuid = StoreUuid(*block.0[40..].first_chunk().expect("it is in the block"));
    let own = Checksums::new(uuid, &[0; 32]);
    own.seal(StructureKind::Superblock, at, Epoch::new(0), 0, &mut block);
    if let Ok(decoded) = Superblock::decode(&block, at) {
        let again = decoded.encode(at);
        assert_eq!(Superblock::decode(&again.blocks()[0], at), Ok(decoded));
    }
}

fn slots(script: &mut Script, at: Pba) {
    let sums = checksums();
    let mut block = patched(script, b"PXhs");
    sums.seal(StructureKind::HostSlot, at, Epoch::new(0), 0, &mut block);
    if let Ok(slot) = HostSlot::decode(&block, &sums, at) {
        let again = slot.encode(&sums, at);
        assert_eq!(HostSlot::decode(&again.blocks()[0], &sums, at), Ok(slot));
    }
    block.0[..4].copy_from_slice(b"PXhb");
    sums.seal(StructureKind::Heartbeat, at, Epoch::new(0), 0, &mut block);
    if let Ok(beat) = Heartbeat::decode(&block, &sums, at) {
        let again = beat.encode(&sums, at);
        assert_eq!(Heartbeat::decode(&again.blocks()[0], &sums, at), Ok(beat));
    }
}

fn log_block(script: &mut Script, at: Pba) {
    let sums = checksums();
    let mut block = patched(script, b"PXlg");
    block.0[8..16].copy_from_slice(&EPOCH.get().to_le_bytes());
    sums.seal(StructureKind::LogBlock, at, EPOCH, NONCE, &mut block);
    let Ok(decoded) = LogBlock::decode(&block, &sums, at, EPOCH, NONCE) else { return };
    let mut builder = LogBlockBuilder::default();
    for record in &decoded.records {
        // What decodes from a block fits into one.
        builder.push(record);
    }
    let seal = Seal {
        epoch: EPOCH,
        nonce: NONCE,
        position: decoded.position,
        at,
        first_lsn: decoded.first_lsn,
        durable: decoded.durable,
        previous: decoded.previous,
        slot_sequence: decoded.slot_sequence,
        cut: decoded.cut,
    };
    let mut buffer = Buffer::zeroed(1);
    let checksum = builder.seal(&sums, &seal, &mut buffer);
    let again = LogBlock::decode(&buffer.blocks()[0], &sums, at, EPOCH, NONCE);
    assert_eq!(again, Ok(LogBlock { checksum, ..decoded }));
}

fn record(mut bytes: &[u8]) {
    while let Ok((decoded, rest)) = Record::decode(bytes) {
        assert!(rest.len() < bytes.len(), "a record has a length");
        let mut builder = LogBlockBuilder::default();
        builder.push(&decoded);
        bytes = rest;
    }
}

fn table<R: TableRecord + PartialEq + std::fmt::Debug>(script: &mut Script) {
    let page = patched(script, b"");
    for (index, bytes) in (0..R::PER_PAGE).zip(page.0.chunks_exact(R::BYTES)) {
        if let Ok(record) = R::decode(bytes) {
            let number = record.as_ref().and_then(R::number).unwrap_or(index);
            let mut again = Block([0xee; BLOCK_SIZE]);
            R::set(&mut again, number, record.as_ref());
            assert_eq!(R::get(&again, number), Ok(record));
        }
    }
}

fn node(script: &mut Script) {
    let node = Node::from_verified(std::rc::Rc::new(Buffer::from_bytes(&patched(script, b"").0)));
    let entries = node.entries();
    assert_eq!(Node::build(&entries, Buffer::zeroed(1)).block().0, node.block().0);
    for (slot, entry) in entries.into_iter().enumerate() {
        assert_eq!(entry, node.entry(slot));
        if entry.state() == EntryState::Mapped {
            let again = Entry::mapped(entry.pba(), entry.hash48(), entry.birth());
            assert!(again.same_content(entry) && again.matches(entry.hash48()));
            assert_eq!(again.birth(), entry.birth());
            assert_eq!(entry.with_birth(entry.birth()), entry);
        } else {
            assert!(Entry::uniform(entry.state()).is_valid());
        }
        let _ = format!("{entry:?}");
    }
    assert_eq!(entries.len(), FANOUT);
}

/// Whatever tables, bitmaps and log say is taken or refused; what is handed out then is in bounds,
/// of its space, and was free.
fn allocator(script: &mut Script) {
    let extent_blocks = 64 << (script.byte() % 12);
    let block_count = extent_blocks * u64::from(script.byte() % 40) + u64::from(script.byte());
    let allocator = Allocator::new(block_count, extent_blocks);
    let kinds = [ExtentKind::System, ExtentKind::Data, ExtentKind::Metadata, ExtentKind::Log];
    let spaces = [Space::Data, Space::Metadata];
    let mut image = Box::new([0; BLOCK_SIZE]);
    while !script.is_over() {
        match script.byte() % 8 {
            0..3 => {
                let index = u32::try_from(script.number()).unwrap_or(u32::MAX);
                let kind = kinds[usize::from(script.byte() % 4)];
                let _ = allocator.load_extent(ExtentIndex::new(index), kind);
            }
            3 => script.patch(&mut image[..]),
            4 => {
                let before = allocator.live_blocks();
                let fits = allocator.load_live_page(script.number(), &image).is_ok();
                assert!(fits || allocator.live_blocks() == before, "refused, yet changed");
            }
            5 => {
                let (start, count) = (Pba::new(script.number()), script.number() % 300);
                let space = spaces[usize::from(script.byte() % 2)];
                if allocator.mark_busy(start, count, space).is_ok() {
                    assert!((0..count).all(|at| allocator.is_busy(start.plus(at))));
                }
            }
            6 => {
                let pba = Pba::new(script.number());
                if allocator.retire(pba).is_ok() {
                    assert!(allocator.is_busy(pba) && allocator.bad_blocks().contains(&pba));
                }
            }
            _ => break,
        }
    }
    let free = allocator.free_blocks();
    assert!(free <= allocator.capacity_blocks());
    let mut taken = Vec::new();
    for space in spaces {
        let mut window = Window::default();
        for _ in 0..8 {
            let Some(run) = allocator.allocate(space, &mut window, 40) else { break };
            assert!(run.end().get() <= block_count);
            for pba in run.blocks() {
                let extent = ExtentIndex::new((pba.get() / extent_blocks) as u32);
                assert_eq!(allocator.extent_kind(extent), Some(space.kind()));
                assert!(!allocator.is_live(pba) && !taken.contains(&pba));
                taken.push(pba);
            }
        }
        allocator.return_window(&mut window);
    }
    for &pba in &taken {
        allocator.set_live(pba).expect("it was not live");
        allocator.clear_live(pba).expect("it was live");
    }
    allocator.release(taken);
    assert_eq!(allocator.free_blocks(), free, "what was taken is back");
}

fuzz_target!(|input: &[u8]| {
    let Some((&selector, bytes)) = input.split_first() else { return };
    let mut script = Script(bytes);
    let at = Pba::new(u64::from(selector / 16) * 2048);
    match selector % 11 {
        0 => superblock(&mut script, at),
        1 => slots(&mut script, at),
        2 => log_block(&mut script, at),
        3 => record(bytes),
        4 => table::<DirectoryRecord>(&mut script),
        5 => table::<VdiRecord>(&mut script),
        6 => table::<SnapshotRecord>(&mut script),
        7 => table::<ExtentRecord>(&mut script),
        8 => node(&mut script),
        9 => table::<LedgerRecord>(&mut script),
        _ => allocator(&mut script),
    }
});
