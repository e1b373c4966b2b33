//! Snapshots that follow each other between two checkpoints have a history, and no trees.

use std::collections::BTreeMap;

use base::{ErrorKind, Pba};
use disk::Request;
use ondisk::{History, SnapshotRecord, TableRecord};
use parallax_vdi::{FormatOptions, Store, Target};

use crate::check::{Anatomy, OPTIONS, assert_sound, checked};
use crate::ram::{Ram, run};
use crate::{
    STORE_BLOCKS, diff, disk, format_options, open, open_with_cache, read, reopened, write,
};

/// Blocks that are written.
const BLOCKS: u64 = 250;

/// What each snapshot holds, a byte for each block, by number.
type Model = BTreeMap<u64, Vec<u8>>;

/// A closed store with so many snapshots of `web01`, each behind a few writes.
fn store_of_snapshots(count: u64) -> (Ram, Model) {
    let ram = Ram::default();
    let device = ram.clone();
    let model = run(1, move |runtime| async move {
        // A log that no checkpoint is due for.
        let options = FormatOptions { log_bytes: Some(8 << 20), ..format_options() };
        Store::format(&device.device(STORE_BLOCKS), &runtime, &options).await.unwrap();
        let (store, _) = open(&device, &runtime).await;
        store.create("web01", 64 << 20).await.unwrap();
        let head = disk(&store, "web01").await;
        let mut now = vec![0u8; BLOCKS as usize];
        let mut model = Model::new();
        for number in 1..=count {
            for step in 0..3u64 {
                let block = (number * 7 + step * 101) % BLOCKS;
                if number % 11 == 5 && step == 1 {
                    let (offset, length) = (block << 12, 4096);
                    head.submit(Request::Discard { offset, length, fua: false }).await.unwrap();
                    now[block as usize] = 0;
                } else {
                    let byte = (number * 3 + step) as u8 | 1;
                    write(&head, block << 12, &[byte; 4096]).await;
                    now[block as usize] = byte;
                }
            }
            store.snapshot("web01", None).await.unwrap();
            model.insert(number, now.clone());
        }
        write(&head, 0, &[77; 4096]).await;
        store.checkpoint().await.unwrap();
        let stats = store.stats();
        assert!(stats.histories + 3 >= count, "{stats:?}");
        assert!(stats.nodes_written < 40, "{stats:?}");
        store.close().await.unwrap();
        model
    });
    (ram, model)
}

async fn assert_holds(store: &Store, name: &str, expected: &[u8]) {
    let bytes = read(&disk(store, name).await, 0, BLOCKS as usize * 4096).await;
    for (block, &byte) in expected.iter().enumerate() {
        let found = &bytes[block * 4096..][..4096];
        assert!(found.iter().all(|&b| b == byte), "{name}, block {block}: {} for {byte}", found[0]);
    }
}

fn snapshot(number: u64) -> String {
    format!("web01@{number}")
}

#[test]
fn each_snapshot_holds_its_moment() {
    let (ram, model) = store_of_snapshots(250);
    assert_sound(&ram, 0);
    reopened(&ram, move |_, store, _| async move {
        for (&number, expected) in &model {
            assert_holds(&store, &snapshot(number), expected).await;
        }
        assert_eq!(store.stats().nodes_written, 0, "reading makes no trees");
    });
}

#[test]
fn the_state_of_a_snapshot_comes_in_runs() {
    let (ram, model) = store_of_snapshots(100);
    reopened(&ram, move |_, store, _| async move {
        let disk = disk(&store, "web01@60").await;
        let (mut offset, end) = (0, BLOCKS << 12);
        while offset < end {
            let request = Request::BlockStatus { offset, length: end - offset, extents_max: 64 };
            let disk::Response::Extents(extents) = disk.submit(request).await.unwrap() else {
                panic!("the state is extents");
            };
            for extent in extents {
                for block in offset >> 12..(offset + extent.length) >> 12 {
                    let has_data = model[&60][block as usize] != 0;
                    assert_eq!(extent.state == disk::ExtentState::Data, has_data, "block {block}");
                }
                offset += extent.length;
            }
        }
    });
}

#[test]
fn what_continues_a_snapshot_gets_a_tree() {
    let (ram, model) = store_of_snapshots(120);
    let ram_after = ram.clone();
    reopened(&ram, move |_, store, _| async move {
        for (number, name) in [(40, "a"), (40, "b"), (90, "c")] {
            store.clone_vdi(&Target::parse(&snapshot(number)), name).await.unwrap();
            // Before a checkpoint and after it.
            assert_holds(&store, name, &model[&number]).await;
        }
        write(&disk(&store, "a").await, 5 << 12, &[200; 4096]).await;
        store.remove(&Target::parse(&snapshot(40))).await.unwrap();
        store.rollback("web01", "71").await.unwrap();
        assert_holds(&store, "web01", &model[&71]).await;
        store.checkpoint().await.unwrap();
        store.collect_garbage().await.unwrap();
        let mut a = model[&40].clone();
        a[5] = 200;
        assert_holds(&store, "a", &a).await;
        assert_holds(&store, "b", &model[&40]).await;
        assert_holds(&store, "c", &model[&90]).await;
        assert_holds(&store, "web01", &model[&71]).await;
        for number in [1, 39, 41, 71, 120] {
            assert_holds(&store, &snapshot(number), &model[&number]).await;
        }
        store.close().await.unwrap();
    });
    assert_sound(&ram_after, 0);
}

#[test]
fn snapshots_with_a_history_are_compared() {
    let (ram, model) = store_of_snapshots(60);
    reopened(&ram, move |_, store, _| async move {
        let (from, to) = (Target::parse("web01@20"), Target::parse("web01@21"));
        let found = diff(&store, &from, &to).await.unwrap();
        let mut differing = vec![false; BLOCKS as usize];
        for extent in found.extents {
            for block in extent.offset >> 12..(extent.offset + extent.length) >> 12 {
                differing[block as usize] = true;
            }
        }
        for block in 0..BLOCKS as usize {
            let differs = model[&20][block] != model[&21][block];
            assert!(!differs || differing[block], "block {block} differs");
        }
        assert!(differing.iter().filter(|&&differs| differs).count() <= 3);
    });
}

#[test]
fn they_are_deleted_in_any_order_and_all_space_comes_back() {
    for order in 0..3u64 {
        let (ram, model) = store_of_snapshots(150);
        let emptied = ram.clone();
        reopened(&ram, move |_, store, _| async move {
            let mut left: Vec<u64> = model.keys().copied().collect();
            match order {
                0 => left.reverse(),
                1 => left.sort_by_key(|number| number * 37 % 151),
                _ => {}
            }
            while let Some(number) = left.pop() {
                store.remove(&Target::parse(&snapshot(number))).await.unwrap();
                if left.len().is_multiple_of(30) {
                    store.collect_garbage().await.unwrap();
                    for number in &left {
                        assert_holds(&store, &snapshot(*number), &model[number]).await;
                    }
                }
            }
            store.remove(&Target::parse("web01")).await.unwrap();
            store.collect_garbage().await.unwrap();
            store.close().await.unwrap();
        });
        let report = checked(&emptied, OPTIONS);
        assert!(report.is_clean(), "{report:?}");
        assert_eq!((report.counts.data_blocks, report.counts.leaked_blocks), (0, 0));
    }
}

/// The blocks of the history of the last snapshot: its root first, then its pages.
fn history_blocks(ram: &Ram, number: u64) -> Vec<Pba> {
    let anatomy = Anatomy::of(ram);
    let pages = anatomy.entries(anatomy.vdi(1).snapshots.entry);
    let page = pages[(number / SnapshotRecord::PER_PAGE) as usize];
    let record = SnapshotRecord::get(anatomy.node(page).block(), number).unwrap().unwrap();
    let History { versions, .. } = record.history.unwrap();
    let mut blocks = vec![versions.entry.pba()];
    blocks.extend(anatomy.entries(versions.entry).into_iter().map(|entry| entry.pba()));
    blocks
}

/// A page of a history rots: what it may tell of fails, nothing is wrong, and all else goes on.
#[test]
fn a_damaged_history_costs_what_it_tells_of() {
    let (pristine, model) = store_of_snapshots(250);
    let page_count = history_blocks(&pristine, 250).len();
    assert!(page_count > 3);
    for rotten in [0, 1, page_count / 2, page_count - 1] {
        let (ram, _) = store_of_snapshots(250);
        ram.rot(history_blocks(&ram, 250)[rotten]);
        assert!(!checked(&ram, OPTIONS).is_clean(), "block {rotten} of the history");
        let (device, model) = (ram.clone(), model.clone());
        run(4, move |runtime| async move {
            let (store, _) = open_with_cache(&device, &runtime, 0).await;
            store.clone_vdi(&Target::parse("web01@130"), "clone").await.unwrap();
            store.checkpoint().await.unwrap();
            for round in 0..2 {
                let mut read_well = 0;
                for (name, number) in [("web01@130", 130), ("clone", 130), ("web01@200", 200)] {
                    let before = read_well;
                    let disk = disk(&store, name).await;
                    for block in 0..BLOCKS {
                        let request = Request::Read { offset: block << 12, length: 4096 };
                        match disk.submit(request).await {
                            Ok(disk::Response::Data(segments)) => {
                                let mut bytes = vec![0xee; 4096];
                                disk::copy_segments(&segments, &mut bytes);
                                assert_eq!(
                                    bytes[0], model[&number][block as usize],
                                    "{name}, {block}"
                                );
                                read_well += 1;
                            }
                            Ok(_) => panic!("a read answers with data"),
                            Err(error) => assert_eq!(error.kind, ErrorKind::Corrupt, "{name}"),
                        }
                    }
                    let left = read_well - before;
                    assert!(rotten == 0 || left > BLOCKS / 3, "{left} blocks of {name} are left");
                }
                assert!(read_well < 3 * BLOCKS, "something is lost");
                assert!(rotten == 0 || read_well > BLOCKS, "{read_well} blocks are left");
                assert_holds(&store, "web01@1", &model[&1]).await;
                let head = read(&disk(&store, "web01").await, 0, 4096).await;
                assert_eq!(head, [77; 4096]);
                if round == 0 {
                    store.collect_garbage().await.unwrap();
                }
            }
            store.close().await.unwrap();
        });
    }
}
