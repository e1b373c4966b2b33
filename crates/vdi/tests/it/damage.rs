//! Damaged metadata hurts what it describes, and nobody else (G5).

use std::rc::Rc;

use base::{ErrorKind, Pba};
use disk::{Disk, Request};
use ondisk::{RootRef, Roots};
use parallax_vdi::{Store, Target};

use crate::check::{Anatomy, OPTIONS, checked};
use crate::ram::{Ram, run};
use crate::{disk, open_with_cache, read, reopened, with_store, write};

/// A store with three pages in its VDI table: VDIs 1 to 40 hold a byte of their number.
fn store_of_many(clean: bool) -> Ram {
    let (ram, ()) = with_store(move |_, store| async move {
        for id in 1..=40u8 {
            store.create(&name(id), 1 << 20).await.unwrap();
            write(&disk(&store, &name(id)).await, 0, &[id; 8192]).await;
        }
        store.snapshot(&name(1), Some("first")).await.unwrap();
        store.checkpoint().await.unwrap();
        if clean {
            store.close().await.unwrap();
        }
    });
    ram
}

fn name(id: u8) -> String {
    format!("vdi-{id:02}")
}

async fn holds(store: &Store, id: u8) -> bool {
    match store.open_disk(&Target::parse(&name(id))).await {
        Ok(disk) => {
            assert_eq!(read(&disk, 0, 8192).await, [id; 8192]);
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            false
        }
    }
}

/// The root node of a table, and its pages.
fn table(anatomy: &Anatomy, root: &RootRef) -> Vec<Pba> {
    assert_eq!(root.height, 1);
    let pages = anatomy.entries(root.entry).into_iter().map(|entry| entry.pba());
    std::iter::once(root.entry.pba()).chain(pages).collect()
}

/// A page of the directory rotted. No checkpoint could be merged any more, the log filled up, and
/// every VDI stopped.
#[test]
fn tables_that_rot_under_a_running_store_are_written_again() {
    type Choose = fn(&Roots) -> RootRef;
    let tables: [(&str, Choose); 3] = [
        ("directory", |roots| roots.directory),
        ("extents", |roots| roots.extents),
        ("bitmaps", |roots| roots.bitmaps),
    ];
    for (what, root) in tables {
        for node in [true, false] {
            let ram = store_of_many(true);
            let device = ram.clone();
            run(2, move |runtime| async move {
                // Nothing is kept in memory, so that damage is met.
                let (store, _) = open_with_cache(&device, &runtime, 0).await;
                let anatomy = Anatomy::of(&device);
                let blocks = table(&anatomy, &root(&anatomy.slot().roots));
                device.rot(if node { blocks[0] } else { *blocks.last().unwrap() });
                store.create("new", 64 << 20).await.unwrap();
                let new = disk(&store, "new").await;
                for index in 0..20 {
                    write(&new, index << 20, &vec![0xaa; 1 << 20]).await;
                }
                write(&disk(&store, &name(1)).await, 0, &[1; 8192]).await;
                store.checkpoint().await.unwrap_or_else(|error| panic!("{what}: {error}"));
                store.close().await.unwrap();
            });
            let report = checked(&ram, OPTIONS);
            assert!(report.is_clean(), "{what}: {:#?}", report.errors);
            reopened(&ram, |_, store, _| async move {
                for id in 1..=40 {
                    assert!(holds(&store, id).await, "VDI {id}");
                }
                assert_eq!(read(&disk(&store, "new").await, 0, 4096).await, [0xaa; 4096]);
            });
        }
    }
}

/// Of the VDI table only the VDIs in use are in memory: they and all on other pages go on, the
/// others on the damaged page are lost, and can be deleted.
#[test]
fn a_damaged_page_of_the_vdi_table_costs_its_idle_vdis() {
    let ram = store_of_many(true);
    let device = ram.clone();
    run(2, move |runtime| async move {
        let (store, _) = open_with_cache(&device, &runtime, 0).await;
        let anatomy = Anatomy::of(&device);
        let used = disk(&store, &name(20)).await;
        // VDIs 16 to 31.
        device.rot(table(&anatomy, &anatomy.slot().roots.vdis)[2]);
        for id in 1..=40 {
            assert_eq!(holds(&store, id).await, !(16..32).contains(&id) || id == 20, "VDI {id}");
        }
        write(&used, 8192, &[7; 4096]).await;
        store.checkpoint().await.unwrap();
        let sizes: Vec<u64> =
            store.list(None, 100).await.unwrap().iter().map(|vdi| vdi.size_bytes).collect();
        assert_eq!(sizes.len(), 40);
        assert_eq!(sizes.iter().filter(|&&size| size == 0).count(), 15);
        store.remove(&Target::parse(&name(16))).await.unwrap();
        store.create(&name(16), 1 << 20).await.unwrap();
    });
    for round in 0..2 {
        reopened(&ram, move |_, store, _| async move {
            assert_eq!(read(&disk(&store, &name(16)).await, 0, 4096).await, [0; 4096]);
            for id in (1..=40).filter(|&id| id != 16) {
                let is_left = !(16..32).contains(&id) || id == 20;
                assert_eq!(holds(&store, id).await, is_left, "VDI {id} in round {round}");
            }
            assert_eq!(read(&disk(&store, &name(20)).await, 8192, 4096).await, [7; 4096]);
            store.close().await.unwrap();
        });
    }
}

/// The log had a change of a VDI whose record was damaged, and the store could not be opened.
#[test]
fn a_lost_vdi_does_not_keep_the_store_from_opening() {
    let ram = store_of_many(false);
    reopened(&ram, |_, store, _| async move {
        store.checkpoint().await.unwrap();
        for id in [3, 17, 18] {
            write(&disk(&store, &name(id)).await, 4096, &[id; 4096]).await;
        }
        store.clone_vdi(&Target::parse(&name(17)), "clone").await.unwrap();
        store.remove(&Target::parse(&name(18))).await.unwrap();
        store.rename(&name(19), "renamed").await.unwrap();
    });
    let anatomy = Anatomy::of(&ram);
    ram.rot(table(&anatomy, &anatomy.slot().roots.vdis)[2]);
    for round in 0..3 {
        reopened(&ram, move |_, store, report| async move {
            if round == 0 {
                let told = |name| report.alarms.iter().any(|alarm| alarm.starts_with(name));
                assert!(told("vdi-17") && told("clone"), "{report:?}");
            }
            for id in (1..=40).filter(|id| ![18, 19].contains(id)) {
                assert_eq!(holds(&store, id).await, !(16..32).contains(&id), "VDI {id}");
            }
            for gone in ["clone", "renamed"] {
                let error = store.open_disk(&Target::parse(gone)).await.err().unwrap();
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{gone}");
            }
            let error = store.open_disk(&Target::parse(&name(18))).await.err().unwrap();
            assert_eq!(error.kind(), ErrorKind::NotFound);
            if round == 1 {
                store.close().await.unwrap();
            }
        });
    }
}

/// Tables that only recovery reads are written again from what VDIs reach; it took an operator.
#[test]
fn a_store_with_damaged_tables_opens() {
    type Choose = fn(&Roots) -> RootRef;
    let tables: [(&str, Choose); 3] = [
        ("directory", |roots| roots.directory),
        ("extent", |roots| roots.extents),
        ("bitmaps", |roots| roots.bitmaps),
    ];
    for (what, root) in tables {
        for (block, clean) in [(0, true), (1, true), (0, false), (1, false)] {
            let ram = store_of_many(clean);
            let anatomy = Anatomy::of(&ram);
            ram.rot(table(&anatomy, &root(&anatomy.slot().roots))[block]);
            reopened(&ram, move |_, store, report| async move {
                assert!(report.alarms.iter().any(|alarm| alarm.contains(what)), "{report:?}");
                let mut bytes = Vec::new();
                for vdi in store.list(None, 100).await.unwrap() {
                    let disk = disk(&store, &vdi.name).await;
                    bytes.push(read(&disk, 0, 1).await[0]);
                    write(&disk, 8192, &[5; 4096]).await;
                }
                bytes.sort_unstable();
                assert_eq!(bytes, (1..=40).collect::<Vec<u8>>(), "{what}");
                store.close().await.unwrap();
            });
            let report = checked(&ram, OPTIONS);
            assert!(report.is_clean(), "{what} {block}: {:#?}", report.errors);
        }
    }
}

#[test]
fn a_damaged_snapshot_table_leaves_its_vdi_alone() {
    let ram = store_of_many(true);
    let anatomy = Anatomy::of(&ram);
    ram.rot(table(&anatomy, &anatomy.vdi(1).snapshots)[1]);
    reopened(&ram, |_, store, _| async move {
        assert!(holds(&store, 1).await);
        let gone = store.open_disk(&Target::parse("vdi-01@first")).await.err().unwrap();
        assert_eq!(gone.kind(), ErrorKind::NotFound);
        store.snapshot(&name(1), Some("second")).await.unwrap();
        store.checkpoint().await.unwrap();
        store.close().await.unwrap();
    });
    let report = checked(&ram, OPTIONS);
    assert!(report.is_clean(), "{:#?}", report.errors);
    reopened(&ram, |_, store, _| async move {
        assert_eq!(read(&disk(&store, "vdi-01@second").await, 0, 8192).await, [1; 8192]);
    });
}

/// While a path to the device failed for a moment, a checkpoint took a node that could not be read
/// for lost, and the VDI with it.
#[test]
fn a_node_that_cannot_be_read_for_a_moment_is_not_lost() {
    for lasting in [false, true] {
        let ram = store_of_many(true);
        let device = ram.clone();
        run(2, move |runtime| async move {
            let (store, _) = open_with_cache(&device, &runtime, 0).await;
            let anatomy = Anatomy::of(&device);
            let leaf = anatomy.vdi(1).root.entry.pba();
            let vdi: Rc<dyn Disk> = disk(&store, &name(1)).await;
            write(&vdi, 8192, &[3; 4096]).await;
            device.set_unreadable(leaf, true);
            if lasting {
                // The device serves everything else: the block is given up in the end.
                while store.checkpoint().await.is_err() {
                    runtime.sleep(std::time::Duration::from_secs(1)).await;
                }
            } else {
                assert!(store.checkpoint().await.is_err());
            }
            device.set_unreadable(leaf, false);
            store.checkpoint().await.unwrap();
            assert_eq!(read(&vdi, 8192, 4096).await, [3; 4096]);
            let lost = vdi.submit(disk::Request::Read { offset: 0, length: 4096 }).await.is_err();
            assert_eq!(lost, lasting);
            assert!(holds(&store, 2).await);
            store.close().await.unwrap();
        });
    }
}

/// What a snapshot could not give was counted nowhere: the counter of errors stood at 0.
#[test]
fn a_read_of_a_snapshot_that_fails_is_counted() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 20).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[5; 4096]).await;
        store.snapshot("web01", Some("first")).await.unwrap();
        store.checkpoint().await.unwrap();
    });
    ram.rot(ram.filled_with(5).unwrap());
    reopened(&ram, |_, store, _| async move {
        let snapshot = disk(&store, "web01@first").await;
        let request = Request::Read { offset: 0, length: 4096 };
        assert_eq!(snapshot.submit(request).await.unwrap_err().kind, ErrorKind::Corrupt);
        let stats = store.stats();
        assert_eq!((stats.errors, stats.checksum_failures), (1, 1));
    });
}

/// A drive may report the sector that it was writing when the power went, or any other of the ring
/// that lies idle, as uncorrectable. That is the end of the log, or damage in it; no opening
/// succeeded any more, and no repair.
#[test]
fn a_log_block_that_cannot_be_read_keeps_no_store_shut() {
    const LOG_START: Pba = Pba::new(4096);
    const RING_BLOCKS: u64 = 64;
    let mut intact = 0;
    for offset in 0..RING_BLOCKS {
        let (ram, ()) = with_store(|_, store| async move {
            store.create("web01", 1 << 20).await.unwrap();
            let disk = disk(&store, "web01").await;
            for round in 1..6 {
                write(&disk, 0, &[round; 4096]).await;
                disk.submit(Request::Flush).await.unwrap();
            }
        });
        ram.set_unreadable(LOG_START.plus(offset), true);
        let found = reopened(&ram, move |_, store, report| async move {
            let is_cut = report.alarms.iter().any(|alarm| alarm.contains("is damaged"));
            if is_cut {
                return report.alarms;
            }
            let disk = disk(&store, "web01").await;
            // The last one was flushed, and nothing behind it says so.
            let last = if report.alarms.is_empty() { 5..6 } else { 4..6 };
            let found = read(&disk, 0, 4096).await;
            assert!(last.contains(&found[0]), "block {offset} of the ring: {}", found[0]);
            write(&disk, 0, &[6; 4096]).await;
            report.alarms
        });
        match found.first() {
            Some(alarm) => assert!(alarm.contains("the log"), "{found:?}"),
            None => intact += 1,
        }
    }
    assert!(intact > RING_BLOCKS / 2, "{intact}");
}
