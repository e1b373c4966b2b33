//! Stores whose checksums are right and whose contents are not: what a bug wrote, or somebody who
//! knows the key. They cost an error or what they say, and never a panic or a walk without end.

use base::{
    BirthLabel, Block, Buffer, Epoch, ErrorKind, HostId, Lba, Lsn, Pba, SnapshotNumber, VdiId,
};
use ondisk::{
    DirectoryRecord, Entry, FANOUT, HostSlot, Node, RangeState, RecordBody, RootRef, Roots,
    TableRecord, VdiRecord,
};
use parallax_vdi::check::{CheckOptions, FindingKind};
use parallax_vdi::dump::Dump;
use parallax_vdi::{Error, OpenReport, Store, Target};

use crate::check::{Anatomy, OPTIONS, assert_sound, checked, forge_records, kinds, small_store};
use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, diff, disk, open, open_options, read, reopened, write};

fn try_open(ram: &Ram) -> Result<OpenReport, Error> {
    let ram = ram.clone();
    run(4, |runtime| async move {
        let device = ram.device(STORE_BLOCKS);
        Ok(Store::open(device, runtime, &open_options(3)).await?.1)
    })
}

fn open_fails(ram: &Ram) {
    let error = try_open(ram).expect_err("this makes no sense");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

/// Opens a store, and closes it again if what is in it reads as it should.
fn opens_whole(ram: &Ram) {
    reopened(ram, |_, store, report| async move {
        assert!(!report.alarms.is_empty(), "{report:?}");
        assert_eq!(read(&disk(&store, "web01").await, 1 << 20, 4096).await, [6; 4096]);
        assert_eq!(read(&disk(&store, "web01@first").await, 0, 4096).await, [1; 4096]);
        let clone = disk(&store, "clone").await;
        assert_eq!(read(&clone, 4096, 4096).await, [4; 4096]);
        write(&clone, 8192, &[5; 4096]).await;
        store.close().await.unwrap();
    });
    assert!(checked(ram, OPTIONS).is_clean());
}

/// Changes the newest slot, in both copies.
fn republish(anatomy: &Anatomy, change: impl FnOnce(&mut HostSlot)) {
    let mut slot = anatomy.slot().clone();
    change(&mut slot);
    anatomy.publish(&slot);
}

async fn is_lost(store: &Store, name: &str) -> bool {
    let opened = store.open_disk(&Target::parse(name)).await;
    opened.is_err_and(|error| error.kind() == ErrorKind::Corrupt)
}

/// Blocks that records named twice were released twice, which ended the engine.
#[test]
fn a_log_that_names_a_block_of_somebody_else_is_refused() {
    let sound = small_store(false);
    let anatomy = Anatomy::of(&sound);
    let live = anatomy.path(&anatomy.vdi(1).root).last().unwrap().pba().get();
    let free = live | 4095;
    let bitmap = anatomy.slot().roots.bitmaps.entry.pba().get();
    let write = |lba: u64, pba: u64| {
        let (lba, pba) = (Lba::new(lba), Pba::new(pba));
        (1, RecordBody::Write { lba, pba, hashes: vec![1] })
    };
    for records in [
        vec![write(1, free), write(2, free)],
        vec![write(1, live)],
        vec![write(1, bitmap)],
        vec![write(1, 1)],
    ] {
        let ram = sound.copy();
        forge_records(&ram, records);
        open_fails(&ram);
        assert!(!checked(&ram, CheckOptions { read_data: false, ..OPTIONS }).is_clean());
    }
    // By itself it is a write like any other.
    forge_records(&sound, vec![write(1, free)]);
    try_open(&sound).unwrap();
}

#[test]
fn a_log_that_creates_a_vdi_twice_is_refused() {
    let (source, snapshot) = (VdiId::new(1), SnapshotNumber::new(0));
    for (id, body) in [
        (1, RecordBody::Create { block_count: 1, wall_ns: 0, name: "new".into() }),
        (2, RecordBody::Clone { source, snapshot, position: None, wall_ns: 0, name: "new".into() }),
    ] {
        let ram = small_store(false);
        forge_records(&ram, vec![(id, body)]);
        open_fails(&ram);
    }
}

#[test]
fn what_the_log_builds_on_nothing_is_lost_and_nothing_else() {
    let number = SnapshotNumber::new(77);
    let clone = |source: u64, snapshot| {
        let source = VdiId::new(source);
        (9, RecordBody::Clone { source, snapshot, position: None, wall_ns: 0, name: "new".into() })
    };
    for (record, lost) in [
        (clone(1, number), "new"),
        (clone(8, SnapshotNumber::new(0)), "new"),
        ((1, RecordBody::Rollback { number, position: None }), "web01"),
    ] {
        let ram = small_store(false);
        forge_records(&ram, vec![record]);
        reopened(&ram, move |_, store, _| async move {
            assert!(is_lost(&store, lost).await);
            assert_eq!(read(&disk(&store, "clone").await, 4096, 4096).await, [4; 4096]);
            store.remove(&Target::parse(lost)).await.unwrap();
            store.close().await.unwrap();
        });
        assert_sound(&ram, 0);
    }
}

/// What a record wrote beyond the end of its VDI showed when the VDI grew.
#[test]
fn what_the_log_writes_beyond_the_end_stays_invisible() {
    let ram = small_store(false);
    let anatomy = Anatomy::of(&ram);
    // The end of an extent.
    let free = anatomy.path(&anatomy.vdi(1).root).last().unwrap().pba().get() | 4095;
    let free = Pba::new(free - 255);
    let hashes = vec![anatomy.checksums.block(&[0; 4096]); 256];
    let beyond = Lba::new((64 << 20) / 4096);
    let zeroed = RecordBody::Range { lba: beyond, count: 1 << 30, state: RangeState::Zero };
    let records = [
        RecordBody::Write { lba: beyond, pba: free, hashes },
        zeroed,
        RecordBody::Resize { block_count: 1 << 20 },
    ];
    forge_records(&ram, records.map(|body| (1, body)).into());
    reopened(&ram, |_, store, _| async move {
        let free_before = store.stats().free_bytes;
        assert_eq!(read(&disk(&store, "web01").await, 64 << 20, 4096).await, [0; 4096]);
        store.checkpoint().await.unwrap();
        store.checkpoint().await.unwrap();
        let freed = store.stats().free_bytes.saturating_sub(free_before);
        assert!(freed > 200 * 4096, "{freed} bytes of its blocks are free again");
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// A table of four blocks that says it has 2^40 pages.
fn endless(anatomy: &Anatomy, page: &Block) -> RootRef {
    // Behind everything that is in use.
    let mut at = Pba::new(STORE_BLOCKS - 8);
    anatomy.ram.set_block(at, page);
    let mut hash = anatomy.checksums.block(&page.0);
    for _ in 0..5 {
        let named = Entry::mapped(at, hash, BirthLabel::new(1));
        let node = Node::build(&[named; FANOUT], Buffer::zeroed(1));
        at = at.plus(1);
        anatomy.ram.set_block(at, node.block());
        hash = anatomy.checksums.block(&node.block().0);
    }
    RootRef { entry: Entry::mapped(at, hash, BirthLabel::new(1)), hash, height: 5 }
}

type Choose = fn(&mut Roots) -> &mut RootRef;

const TABLES: [Choose; 5] = [
    |roots| &mut roots.directory,
    |roots| &mut roots.extents,
    |roots| &mut roots.bitmaps,
    |roots| &mut roots.bad_blocks,
    |roots| &mut roots.vdis,
];

/// Opening, checking and dumping them had no end.
#[test]
fn tables_without_end_are_damaged_tables() {
    for (number, table) in TABLES.into_iter().enumerate() {
        let ram = small_store(true);
        let anatomy = Anatomy::of(&ram);
        let root = endless(&anatomy, &Block([0; 4096]));
        republish(&anatomy, |slot| *table(&mut slot.roots) = root);
        assert!(kinds(&checked(&ram, OPTIONS)).contains(&FindingKind::NamedTwice));
        let dumped = ram.clone();
        run(5, |runtime| async move {
            let dump = Dump::open(&dumped.device(STORE_BLOCKS), &runtime).await.unwrap();
            let _ = dump.vdis(&mut drop).await;
            let _ = dump.extents(&mut drop).await;
            let _ = dump.bitmaps(&mut drop).await;
        });
        assert_costs_what_it_hits(&ram, number);
    }
}

#[test]
fn tables_with_a_lost_part_are_damaged_tables() {
    for (number, table) in TABLES.into_iter().enumerate() {
        let ram = small_store(true);
        let lost = RootRef { entry: Entry::DAMAGED, hash: 0, height: 1 };
        republish(&Anatomy::of(&ram), |slot| *table(&mut slot.roots) = lost);
        assert!(kinds(&checked(&ram, OPTIONS)).contains(&FindingKind::Metadata));
        assert_costs_what_it_hits(&ram, number);
    }
}

/// The damage is that of one of [`TABLES`].
fn assert_costs_what_it_hits(ram: &Ram, number: usize) {
    match number {
        0 => reopened(ram, |_, store, _| async move {
            assert_eq!(read(&disk(&store, "recovered-2").await, 4096, 4096).await, [4; 4096]);
            store.close().await.unwrap();
        }),
        4 => reopened(ram, |_, store, _| async move {
            assert!(is_lost(&store, "web01").await && is_lost(&store, "clone").await);
            store.close().await.unwrap();
        }),
        _ => opens_whole(ram),
    }
}

#[test]
fn tables_without_end_of_the_older_slot_are_walked_once() {
    for table in TABLES {
        let ram = small_store(true);
        let anatomy = Anatomy::of(&ram);
        let sound = anatomy.slot().clone();
        let mut slot = HostSlot { sequence: sound.sequence - 1, ..sound };
        *table(&mut slot.roots) = endless(&anatomy, &Block([0; 4096]));
        let at = anatomy.geometry.host_slot(slot.host, 1 - anatomy.pair.copy);
        ram.set_block(at, &slot.encode(&anatomy.checksums, at).blocks()[0]);
        checked(&ram, OPTIONS);
    }
}

#[test]
fn trees_without_end_are_walked_once() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    let vdis = anatomy.replace_page(&anatomy.slot().roots.vdis, |page| {
        let record = anatomy.vdi(1);
        let (root, block_count) = (endless(&anatomy, &Block([7; 4096])), 1 << 40);
        let wrong = VdiRecord { root, block_count, ..record };
        TableRecord::set(page, 1, Some(&wrong));
    });
    republish(&anatomy, |slot| slot.roots.vdis = vdis);
    assert!(!checked(&ram, OPTIONS).is_clean());
    run(5, |runtime| async move {
        let dump = Dump::open(&ram.device(STORE_BLOCKS), &runtime).await.unwrap();
        dump.tree(&Target::parse("web01"), &mut drop).await.unwrap();
        let (store, _) = open(&ram, &runtime).await;
        let (web01, clone) = (Target::parse("web01"), Target::parse("clone"));
        let error = store.space(&web01).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let error = diff(&store, &web01, &clone).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    });
}

#[test]
fn a_directory_record_in_the_place_of_another_is_damage() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    let directory = anatomy.replace_page(&anatomy.slot().roots.directory, |page| {
        let record: DirectoryRecord = TableRecord::get(page, 1).unwrap().unwrap();
        TableRecord::set(page, 5, Some(&record));
    });
    republish(&anatomy, |slot| slot.roots.directory = directory);
    assert_eq!(kinds(&checked(&ram, OPTIONS)), [FindingKind::Record]);
    opens_whole(&ram);
}

#[test]
fn a_vdi_with_the_record_of_another_is_lost() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    let vdis = anatomy.replace_page(&anatomy.slot().roots.vdis, |page| {
        let record: VdiRecord = TableRecord::get(page, 1).unwrap().unwrap();
        TableRecord::set(page, 2, Some(&record));
    });
    republish(&anatomy, |slot| slot.roots.vdis = vdis);
    reopened(&ram, |_, store, _| async move {
        assert!(is_lost(&store, "clone").await);
        assert_eq!(read(&disk(&store, "web01").await, 1 << 20, 4096).await, [6; 4096]);
    });
}

/// The bitmaps' own blocks are released without a look at the bitmaps: one that was marked as
/// reached ended the engine when the bitmaps changed.
#[test]
fn bitmaps_that_have_their_own_blocks_are_damaged_bitmaps() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    let root = anatomy.slot().roots.bitmaps;
    let own = root.entry.pba().get();
    let bitmaps = anatomy.replace_page(&root, |page| {
        page.0[usize::try_from(own % 32_768 / 8).unwrap()] |= 1 << (own % 8);
    });
    republish(&anatomy, |slot| slot.roots.bitmaps = bitmaps);
    assert_eq!(kinds(&checked(&ram, OPTIONS)), [FindingKind::BitmapBlockLive]);
    opens_whole(&ram);
}

/// A checkpoint that replaced a block which the bitmaps did not know could not be undone: the
/// attempt ended the engine.
#[test]
fn a_checkpoint_that_meets_a_block_the_bitmaps_do_not_know_fails() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    let path = anatomy.path(&anatomy.vdi(2).root);
    let leaf = path[path.len() - 2].pba().get();
    let bitmaps = anatomy.replace_page(&anatomy.slot().roots.bitmaps, |page| {
        page.0[usize::try_from(leaf % 32_768 / 8).unwrap()] &= !(1 << (leaf % 8));
    });
    republish(&anatomy, |slot| slot.roots.bitmaps = bitmaps);
    run(5, |runtime| async move {
        let (store, _) = open(&ram, &runtime).await;
        write(&disk(&store, "clone").await, 8192, &[1; 4096]).await;
        for _ in 0..2 {
            let error = store.checkpoint().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        }
        assert_eq!(read(&disk(&store, "clone").await, 8192, 4096).await, [1; 4096]);
    });
}

/// Counters at the end of their range, which the next step took beyond it.
#[test]
fn a_slot_that_counted_to_the_end_is_none() {
    type Change = fn(&mut HostSlot);
    let changes: [Change; 4] = [
        |slot| slot.sequence = u64::MAX - 1,
        |slot| slot.epoch = Epoch::new(u64::MAX),
        |slot| slot.cut = Lsn::new(u64::MAX),
        |slot| slot.vdi_id_next = u64::MAX,
    ];
    for change in changes {
        let ram = small_store(true);
        republish(&Anatomy::of(&ram), change);
        open_fails(&ram);
        assert_eq!(kinds(&checked(&ram, OPTIONS)), [FindingKind::HostSlot]);
    }
}

/// It was published in the place of the host that it names.
#[test]
fn the_slot_of_another_host_is_none() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    let other = HostSlot { host: HostId::new(9), ..anatomy.slot().clone() };
    for copy in 0..2 {
        let at = anatomy.geometry.host_slot(HostId::new(0), copy);
        ram.set_block(at, &other.encode(&anatomy.checksums, at).blocks()[0]);
    }
    open_fails(&ram);
}
