//! The offline check: silent about healthy stores, and naming what is planted in sick ones.

use std::collections::BTreeMap;

use base::{BirthLabel, Block, Buffer, ClaimGeneration, HostId, Lsn, Pba, VdiId};
use blockstore::log::survey;
use blockstore::slots::{SlotPair, read_slots};
use blockstore::{Geometry, superblock};
use ondisk::{
    Checksums, Entry, EntryState, ExtentKind, ExtentRecord, HostSlot, LogBlock, LogBlockBuilder,
    LogSegment, Node, Record, RecordBody, RootRef, Seal, TableRecord, VdiRecord,
};
use parallax_vdi::check::{CheckOptions, CheckReport, FindingKind, NotedHead, check};
use parallax_vdi::dump::Dump;
use parallax_vdi::{Store, Target};
use runtime::Runtime;

use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, disk, open, read, with_store, write};

pub(crate) const OPTIONS: CheckOptions =
    CheckOptions { repair: false, read_data: true, boot_id: [1; 16], nonce: 5 };

pub(crate) fn checked(ram: &Ram, options: CheckOptions) -> CheckReport {
    checked_for(ram, options, Vec::new())
}

/// Also whether ledgers hold what was noted.
pub(crate) fn checked_for(ram: &Ram, options: CheckOptions, noted: Vec<NotedHead>) -> CheckReport {
    let ram = ram.clone();
    run(9, |runtime| async move {
        let device = ram.device(STORE_BLOCKS);
        check(&device, &runtime, options, &noted, &|_| {}).await.expect("a store")
    })
}

/// Checks a store that nothing bad happened to.
pub(crate) fn assert_sound(ram: &Ram, seed: u64) {
    let report = checked(ram, OPTIONS);
    assert!(report.is_clean(), "seed {seed}: {:#?}", report.errors);
    assert!(report.warnings.is_empty(), "seed {seed}: {:#?}", report.warnings);
    let counts = report.counts;
    let reached = counts.metadata_blocks + counts.data_blocks;
    assert!(reached >= counts.live_blocks - counts.leaked_blocks, "seed {seed}: {counts:?}");
    assert!(counts.data_blocks_verified >= counts.data_blocks, "seed {seed}: {counts:?}");
}

/// A store with two VDIs, snapshots and a clone; closed if `clean`.
pub(crate) fn small_store(clean: bool) -> Ram {
    let (ram, ()) = with_store(move |_, store| async move {
        store.create("web01", 64 << 20).await.unwrap();
        let head = disk(&store, "web01").await;
        for index in 0..600u64 {
            write(&head, index * 4096, &[index as u8 | 1; 4096]).await;
        }
        store.snapshot("web01", Some("first")).await.unwrap();
        write(&head, 0, &[3; 8192]).await;
        store.clone_vdi(&Target::parse("web01@first"), "clone").await.unwrap();
        write(&disk(&store, "clone").await, 4096, &[4; 4096]).await;
        store.checkpoint().await.unwrap();
        write(&head, 1 << 20, &[150; 8192]).await;
        store.snapshot("web01", None).await.unwrap();
        write(&head, 1 << 20, &[6; 4096]).await;
        if clean {
            store.close().await.unwrap();
        }
    });
    ram
}

/// What a test needs to find its way around a store.
pub(crate) struct Anatomy {
    pub(crate) ram: Ram,
    pub(crate) geometry: Geometry,
    pub(crate) checksums: Checksums,
    pub(crate) pair: SlotPair,
}

impl Anatomy {
    pub(crate) fn of(ram: &Ram) -> Self {
        let ram = ram.clone();
        run(3, |runtime| async move {
            let device = ram.device(STORE_BLOCKS);
            let found = superblock::read(&device, &runtime, false).await.unwrap();
            let geometry = Geometry::new(&found.superblock);
            let checksums = Checksums::new(found.superblock.uuid, &found.superblock.key);
            let host = HostId::new(0);
            let pair = read_slots(&device, &runtime, &geometry, &checksums, host).await.unwrap();
            Self { ram, geometry, checksums, pair }
        })
    }

    pub(crate) fn slot(&self) -> &HostSlot {
        &self.pair.newest
    }

    pub(crate) fn node(&self, entry: Entry) -> Node {
        Node::from_verified(std::rc::Rc::new(Buffer::from_bytes(&self.ram.block(entry.pba()).0)))
    }

    /// The first mapped entry on each level of a tree, from its root to what a leaf names.
    pub(crate) fn path(&self, root: &RootRef) -> Vec<Entry> {
        let mut path = vec![root.entry];
        for _ in 0..root.height {
            let node = self.node(*path.last().unwrap());
            let mapped = |entry: &Entry| entry.state() == EntryState::Mapped;
            path.push(node.entries().into_iter().find(mapped).unwrap());
        }
        path
    }

    pub(crate) fn vdi(&self, index: u64) -> ondisk::VdiRecord {
        let page = *self.path(&self.slot().roots.vdis).last().unwrap();
        ondisk::TableRecord::get(self.node(page).block(), index).unwrap().unwrap()
    }

    /// What a node names.
    pub(crate) fn entries(&self, node: Entry) -> Vec<Entry> {
        let entries = self.node(node).entries().into_iter();
        entries.filter(|entry| entry.state() == EntryState::Mapped).collect()
    }

    /// What the first page of the extent table says.
    pub(crate) fn extents(&self) -> BTreeMap<u64, ExtentKind> {
        let page = *self.path(&self.slot().roots.extents).last().unwrap();
        let page = self.node(page);
        let kind = |index| {
            let record: ExtentRecord = ondisk::TableRecord::get(page.block(), index).unwrap()?;
            Some((index, record.kind))
        };
        (0..ExtentRecord::PER_PAGE).filter_map(kind).collect()
    }

    /// Replaces the slot's copies by `slot`.
    pub(crate) fn publish(&self, slot: &HostSlot) {
        for copy in 0..2 {
            let at = self.geometry.host_slot(slot.host, copy);
            let slot = HostSlot { sequence: slot.sequence + copy, ..slot.clone() };
            self.ram.set_block(at, &slot.encode(&self.checksums, at).blocks()[0]);
        }
    }

    /// Puts other bytes where an entry of a tree of height 1 says, and makes the tree say so.
    pub(crate) fn replace_page(&self, root: &RootRef, change: impl FnOnce(&mut Block)) -> RootRef {
        assert_eq!(root.height, 1);
        let [node_entry, page_entry] = self.path(root)[..] else { panic!("a node and a page") };
        let mut page = self.ram.block(page_entry.pba());
        change(&mut page);
        self.ram.set_block(page_entry.pba(), &page);
        let mut entries = self.node(node_entry).entries();
        let slot = entries.iter().position(|entry| *entry == page_entry).unwrap();
        let hash = self.checksums.block(&page.0);
        entries[slot] = Entry::mapped(page_entry.pba(), hash, page_entry.birth());
        let node = Node::build(&entries, Buffer::zeroed(1));
        self.ram.set_block(node_entry.pba(), node.block());
        let hash = self.checksums.block(&node.block().0);
        let entry = Entry::mapped(node_entry.pba(), hash, node_entry.birth());
        RootRef { entry, hash, height: 1 }
    }
}

/// Appends records of VDIs to the log of a store that was not closed, as who knows its key can.
pub(crate) fn forge_records(ram: &Ram, records: Vec<(u64, RecordBody)>) {
    let Anatomy { ram, geometry, checksums, pair } = Anatomy::of(ram);
    let slot = pair.newest;
    let segment = *slot.segments.last().unwrap();
    run(3, |runtime| async move {
        let device = ram.device(STORE_BLOCKS);
        let mut previous = segment.chain;
        let mut see = |_: &LogSegment, block: &LogBlock| previous = block.checksum;
        let (log, segments) = (slot.log_start, &slot.segments);
        let surveyed =
            survey(&device, &runtime, &geometry, log, &checksums, segments, &mut see).await;
        let (replayed, broken) = surveyed.unwrap();
        assert_eq!(broken, None);
        let at = geometry.log_block(log, replayed.end);
        let seal = Seal {
            epoch: segment.epoch,
            nonce: segment.nonce,
            position: replayed.end,
            at,
            first_lsn: replayed.lsn_next,
            durable: replayed.lsn_next.plus(records.len() as u64 - 1),
            previous,
            slot_sequence: slot.sequence,
            cut: slot.cut,
        };
        let mut builder = LogBlockBuilder::default();
        for (vdi, body) in records {
            builder.push(&Record { vdi: VdiId::new(vdi), claim: ClaimGeneration::new(1), body });
        }
        let mut buffer = Buffer::zeroed(1);
        builder.seal(&checksums, &seal, &mut buffer);
        ram.set_block(at, &buffer.blocks()[0]);
    });
}

/// Gives a VDI of a closed store another newest birth label.
pub(crate) fn set_label(ram: &Ram, vdi: u64, label: u32) {
    let anatomy = Anatomy::of(ram);
    let mut slot = anatomy.slot().clone();
    let record = VdiRecord { label: BirthLabel::new(label), ..anatomy.vdi(vdi) };
    slot.roots.vdis =
        anatomy.replace_page(&slot.roots.vdis, |page| VdiRecord::set(page, vdi, Some(&record)));
    anatomy.publish(&slot);
}

pub(crate) fn kinds(report: &CheckReport) -> Vec<FindingKind> {
    let mut kinds: Vec<_> = report.errors.iter().map(|finding| finding.kind).collect();
    kinds.dedup();
    kinds
}

/// Repairs a store, and opens it and reads what the small store holds.
fn repaired(ram: &Ram) -> CheckReport {
    let report = checked(ram, CheckOptions { repair: true, ..OPTIONS });
    assert!(!report.repairs.is_empty());
    let ram = ram.clone();
    run(4, |runtime| async move {
        let (store, _) = open(&ram, &runtime).await;
        look(&store).await;
        write(&disk(&store, "web01").await, 2 << 20, &[9; 4096]).await;
        store.checkpoint().await.unwrap();
        store.close().await.unwrap();
    });
    report
}

async fn look(store: &Store) {
    for (name, offset, byte) in
        [("web01", 0, 3), ("web01@first", 8192, 3), ("clone", 4096, 4), ("web01@first", 4096, 1)]
    {
        let bytes = read(&disk(store, name).await, offset, 4096).await;
        assert_eq!(bytes, [byte; 4096], "{name} at {offset}");
    }
}

#[test]
fn a_healthy_store_is_clean_open_or_closed() {
    for clean in [true, false] {
        let ram = small_store(clean);
        let before = ram.copy();
        assert_sound(&ram, 0);
        let report = checked(&ram, OPTIONS);
        assert_eq!(report.closed_cleanly, clean);
        assert_eq!((report.counts.vdis, report.counts.snapshots), (2, 1 + u64::from(clean)));
        assert_eq!(report.counts.log_records > 0, !clean);
        assert_eq!(report.counts.leaked_blocks, 0);
        let all = |ram: &Ram| (0..STORE_BLOCKS).map(|at| ram.block(Pba::new(at)).0).collect();
        let (now, then): (Vec<_>, Vec<_>) = (all(&ram), all(&before));
        assert!(now == then, "a check writes nothing");
        let report = checked(&ram, CheckOptions { repair: true, ..OPTIONS });
        assert!(report.is_clean() && report.repairs.is_empty(), "nothing to repair: {report:?}");
    }
}

#[test]
fn a_damaged_superblock_copy_is_named_and_repaired() {
    for at in ondisk::SUPERBLOCK_COPIES {
        let ram = small_store(true);
        ram.rot(at);
        let report = checked(&ram, OPTIONS);
        assert_eq!(kinds(&report), [FindingKind::Superblock]);
        assert_eq!(report.errors[0].at, Some(at));
        assert!(repaired(&ram).is_clean());
        assert_sound(&ram, 0);
    }
}

#[test]
fn a_damaged_slot_copy_is_named_and_repaired() {
    for older in [false, true] {
        let ram = small_store(true);
        let anatomy = Anatomy::of(&ram);
        let copy = if older { 1 - anatomy.pair.copy } else { anatomy.pair.copy };
        let at = anatomy.geometry.host_slot(HostId::new(0), copy);
        ram.rot(at);
        let report = checked(&ram, OPTIONS);
        match older {
            true => assert_eq!(kinds(&report), [FindingKind::HostSlot]),
            // The older slot was written by a running store: its copy may be torn by a crash.
            false => {
                assert!(report.is_clean(), "{:?}", report.errors);
                assert_eq!(report.warnings[0].kind, FindingKind::HostSlot);
            }
        }
        assert!(repaired(&ram).is_clean());
        assert_sound(&ram, 0);
    }
}

#[test]
fn both_slot_copies_gone_is_said_plainly() {
    let ram = small_store(true);
    let geometry = Anatomy::of(&ram).geometry;
    ram.rot(geometry.host_slot(HostId::new(0), 0));
    ram.rot(geometry.host_slot(HostId::new(0), 1));
    assert_eq!(kinds(&checked(&ram, OPTIONS)), [FindingKind::HostSlot]);
}

#[test]
fn damaged_nodes_are_named_with_what_they_cover() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    let path = anatomy.path(&anatomy.vdi(1).root);
    let leaf = path[path.len() - 2];
    ram.rot(leaf.pba());
    let report = checked(&ram, OPTIONS);
    assert_eq!(kinds(&report), [FindingKind::Metadata]);
    assert_eq!(report.errors[0].at, Some(leaf.pba()));
    assert!(report.errors[0].message.starts_with("web01, blocks 0 to 255"), "{report:?}");
    // Only blocks below a damaged node are lost, and a repair frees nothing that they may hold.
    let after = checked(&ram, CheckOptions { repair: true, ..OPTIONS });
    assert_eq!(kinds(&after), [FindingKind::Metadata]);
    assert_eq!(after.counts.live_blocks, report.counts.live_blocks);
}

#[test]
fn damaged_data_is_named_if_data_is_read() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    let block = *anatomy.path(&anatomy.vdi(1).root).last().unwrap();
    ram.rot(block.pba());
    let report = checked(&ram, OPTIONS);
    assert_eq!(kinds(&report), [FindingKind::Data]);
    assert!(report.errors[0].message.starts_with("web01, block 0:"), "{report:?}");
    assert!(checked(&ram, CheckOptions { read_data: false, ..OPTIONS }).is_clean());
}

#[test]
fn reached_blocks_that_are_free_are_found_and_leaks_are_counted() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    let data = *anatomy.path(&anatomy.vdi(1).root).last().unwrap();
    let bit = |pba: Pba| ((pba.get() % 32_768 / 8) as usize, 1u8 << (pba.get() % 8));
    let slot = anatomy.slot().clone();
    let bitmaps = anatomy.replace_page(&slot.roots.bitmaps, |page| {
        let (byte, mask) = bit(data.pba());
        assert!(page.0[byte] & mask != 0);
        page.0[byte] &= !mask;
        // Nothing is there: the last block of the same extent.
        let (byte, mask) = bit(Pba::new(data.pba().get() | 4095));
        page.0[byte] |= mask;
    });
    anatomy.publish(&HostSlot { roots: ondisk::Roots { bitmaps, ..slot.roots }, ..slot });
    let report = checked(&ram, OPTIONS);
    assert_eq!(kinds(&report), [FindingKind::ReachedButFree]);
    assert_eq!(report.errors[0].at, Some(data.pba()));
    assert_eq!(report.counts.leaked_blocks, 1);
    let report = repaired(&ram);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.counts.leaked_blocks, 0);
    assert_sound(&ram, 0);
}

#[test]
fn damaged_control_tables_are_written_again() {
    type Choose = fn(&ondisk::Roots) -> RootRef;
    let damages: [(&str, Choose); 3] = [
        ("bitmaps", |roots| roots.bitmaps),
        ("extent table", |roots| roots.extents),
        ("directory", |roots| roots.directory),
    ];
    for (name, root) in damages {
        for page in [false, true] {
            let ram = small_store(true);
            let anatomy = Anatomy::of(&ram);
            let path = anatomy.path(&root(&anatomy.slot().roots));
            let at = path[usize::from(page)].pba();
            ram.rot(at);
            let report = checked(&ram, OPTIONS);
            let finding = &report.errors[0];
            assert_eq!((finding.kind, finding.at), (FindingKind::Metadata, Some(at)), "{name}");
            assert!(finding.message.contains(name), "{}", finding.message);
            let report = checked(&ram, CheckOptions { repair: true, ..OPTIONS });
            assert!(report.is_clean(), "{name}: {report:?}");
            let ram = ram.clone();
            run(4, |runtime| async move {
                let (store, _) = open(&ram, &runtime).await;
                let names = store.list(None, 10).await.unwrap();
                let names: Vec<_> = names.iter().map(|entry| entry.name.as_str()).collect();
                match name {
                    "directory" => assert_eq!(names, ["recovered-1", "recovered-2"]),
                    _ => assert_eq!(names, ["clone", "web01"]),
                }
                let head = disk(&store, names[usize::from(name != "directory")]).await;
                assert_eq!(read(&head, 0, 8192).await, [3; 8192]);
                write(&head, 0, &[7; 8192]).await;
                store.checkpoint().await.unwrap();
                store.close().await.unwrap();
            });
        }
    }
}

#[test]
fn wrong_extents_and_counts_are_found() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    let slot = anatomy.slot().clone();
    let data = *anatomy.path(&anatomy.vdi(1).root).last().unwrap();
    let index = u64::from(anatomy.geometry.extent_of(data.pba()).get());
    let extents = anatomy.replace_page(&slot.roots.extents, |page| {
        ondisk::TableRecord::set(page, index, None::<&ondisk::ExtentRecord>);
    });
    let vdis = anatomy.replace_page(&slot.roots.vdis, |page| {
        let record = anatomy.vdi(1);
        let wrong = ondisk::VdiRecord { snapshot_count: 7, ..record };
        ondisk::TableRecord::set(page, 1, Some(&wrong));
    });
    anatomy.publish(&HostSlot { roots: ondisk::Roots { extents, vdis, ..slot.roots }, ..slot });
    let report = checked(&ram, OPTIONS);
    assert_eq!(kinds(&report), [FindingKind::Record, FindingKind::WrongExtent]);
    assert!(report.errors[0].message.contains("2 snapshots are there"), "{report:?}");
    let report = checked(&ram, CheckOptions { repair: true, ..OPTIONS });
    assert_eq!(kinds(&report), [FindingKind::Record], "{report:?}");
}

#[test]
fn a_block_named_as_two_things_is_found() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    let slot = anatomy.slot().clone();
    let vdis = anatomy.replace_page(&slot.roots.vdis, |page| {
        // The clone gets the other's head, which has it for itself.
        let (web01, clone) = (anatomy.vdi(1), anatomy.vdi(2));
        let wrong = ondisk::VdiRecord { root: web01.root, label: web01.label, ..clone };
        ondisk::TableRecord::set(page, 2, Some(&wrong));
    });
    anatomy.publish(&HostSlot { roots: ondisk::Roots { vdis, ..slot.roots }, ..slot });
    let report = checked(&ram, OPTIONS);
    assert_eq!(kinds(&report), [FindingKind::NamedTwice], "{report:?}");
}

#[test]
fn a_broken_log_is_named_and_cut() {
    let ram = small_store(false);
    // What was written last was flushed by the snapshot; a marker says so.
    let ram_too = ram.clone();
    run(6, |runtime: Runtime| async move {
        let (store, _) = open(&ram_too, &runtime).await;
        let head = disk(&store, "web01").await;
        for index in 0..10 {
            write(&head, (4 << 20) + index * 4096, &[8; 4096]).await;
            head.submit(disk::Request::Flush).await.unwrap();
        }
    });
    let anatomy = Anatomy::of(&ram);
    let slot = anatomy.slot();
    let segment = slot.segments.last().unwrap();
    let at = anatomy.geometry.log_block(slot.log_start, segment.start.plus(4));
    let decode = |block: &Block| {
        LogBlock::decode(block, &anatomy.checksums, at, segment.epoch, segment.nonce)
    };
    assert!(decode(&ram.block(at)).unwrap().durable > Lsn::new(0));
    ram.rot(at);
    let report = checked(&ram, OPTIONS);
    assert!(kinds(&report).contains(&FindingKind::Log), "{report:?}");
    assert_eq!(report.errors[0].at, Some(at));
    let report = repaired(&ram);
    assert!(report.is_clean(), "{report:?}");
    assert!(report.repairs[0].contains("are lost"), "{report:?}");
    assert_sound(&ram, 0);
}

/// A node write failed; its block was retired, and no later open could load the list of such
/// blocks, because it took all of them for data.
#[test]
fn a_retired_metadata_block_does_not_keep_a_store_from_opening() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    let nodes = anatomy.geometry.extent_of(anatomy.slot().roots.vdis.entry.pba());
    let start = anatomy.geometry.extent_start(nodes);
    let blocks = (0..anatomy.geometry.extent_blocks).map(|offset| start.plus(offset));
    let is_zero = |at: &Pba| ram.block(*at).0.iter().all(|&byte| byte == 0);
    let unused: Vec<Pba> = blocks.filter(is_zero).collect();
    let (first, later) = unused.split_at(3);
    for &at in first {
        ram.spoil(at);
    }
    assert!(!later.is_empty());
    let device = ram.clone();
    run(5, |runtime| async move {
        let (store, _) = open(&device, &runtime).await;
        let head = disk(&store, "web01").await;
        store.resize("web01", 1 << 30).await.unwrap();
        for round in 0..300u64 {
            write(&head, round << 20, &[7; 4096]).await;
        }
        let mut failures = 0;
        while store.checkpoint().await.is_err() {
            failures += 1;
            assert!(failures < 10);
        }
    });
    assert_sound(&ram, 0);
    assert!(checked(&ram, OPTIONS).counts.bad_blocks > 0);
    run(6, |runtime| async move {
        let (store, report) = open(&ram, &runtime).await;
        assert!(report.alarms.iter().any(|alarm| alarm.contains("retired")), "{report:?}");
        store.close().await.unwrap();
    });
}

#[test]
fn a_dump_shows_what_stands_on_a_store() {
    let ram = small_store(false);
    let damaged = Anatomy::of(&ram);
    let path = damaged.path(&damaged.vdi(2).root);
    ram.rot(path[path.len() - 2].pba());
    let lines = run(7, |runtime| async move {
        let device = ram.device(STORE_BLOCKS);
        let dump = Dump::open(&device, &runtime).await.unwrap();
        let mut lines: Vec<String> = Vec::new();
        let line: &mut dyn FnMut(String) = &mut |line| lines.push(line);
        dump.superblock(line);
        dump.slots(line).await.unwrap();
        dump.log(line).await.unwrap();
        dump.vdis(line).await.unwrap();
        dump.extents(line).await.unwrap();
        dump.bitmaps(line).await.unwrap();
        for target in ["web01", "web01@first", "web01@1", "clone"] {
            dump.tree(&Target::parse(target), line).await.unwrap();
        }
        let error = dump.tree(&Target::parse("web01@nowhere"), line).await.unwrap_err();
        assert_eq!(error.kind(), base::ErrorKind::NotFound);
        lines
    });
    let text = lines.join("\n");
    for expected in [
        "superblock copy at block 2048: intact",
        "uuid 07070707-0707-",
        "running, or left by a crash",
        "snapshot 2 \"\"",
        "write 2 blocks at 256 to block",
        "VDI 2 \"clone\": parent 1@1",
        "@1 \"first\": position",
        ": Metadata, of host 0",
        "bitmap page 0 at block",
        "web01@first: height 2",
        "damaged metadata block",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
    }
    assert!(!text.contains("0909090909"), "the checksum key is a secret");
}
