//! Walks of whole trees beside everything else: comparing disks, and counting what they map.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use device::Operation;
use disk::{Disk, ExtentState, Request, Response};
use parallax_vdi::{DiffExtent, Error, FormatOptions, Reuse, Store, Target};
use runtime::Runtime;

use crate::check::Anatomy;
use crate::gate::{Gate, with_gated_store, with_gated_store_that_reuses};
use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, diff, disk, format_options, open_options, reopened, with_store, write};

pub(crate) const LEAVES: u64 = 1500;

/// A disk of which each leaf maps one block.
pub(crate) async fn wide_disk(store: &Store, name: &str) -> Rc<dyn Disk> {
    store.create(name, 1 << 40).await.unwrap();
    let disk = disk(store, name).await;
    for leaf in 0..LEAVES {
        write(&disk, leaf << 20, &[1; 4096]).await;
    }
    disk
}

async fn walk(store: Store, from: Option<&str>, to: &str) -> Result<(), Error> {
    let to = Target::parse(to);
    match from {
        Some(from) => diff(&store, &Target::parse(from), &to).await.map(drop),
        None => store.space(&to).await.map(drop),
    }
}

/// Makes reads take a millisecond each, one after the other.
pub(crate) fn read_slowly(runtime: &Runtime, gate: &Gate) {
    gate.hold(|operation| matches!(operation, Operation::Read { .. }));
    let (later, gate) = (runtime.clone(), gate.clone());
    drop(runtime.spawn(async move {
        loop {
            later.sleep(Duration::from_millis(1)).await;
            gate.pass_one();
        }
    }));
}

/// A walk was one reader from its beginning to its end, hours later on a large disk: nothing that
/// was replaced meanwhile became free, and who needed space waited.
#[test]
fn a_long_walk_keeps_no_space_from_becoming_free() {
    with_gated_store(|runtime, gate, store| async move {
        let head = wide_disk(&store, "web01").await;
        store.snapshot("web01", Some("all")).await.unwrap();
        store.create("empty", 1 << 40).await.unwrap();
        let other = disk(&store, "empty").await;
        read_slowly(&runtime, &gate);
        for (from, to) in [
            (None, "web01"),
            (None, "web01@all"),
            (Some("empty"), "web01"),
            (Some("web01@all"), "empty"),
        ] {
            let ended = Rc::new(Cell::new(false));
            let (flag, walking) = (Rc::clone(&ended), store.clone());
            drop(runtime.spawn(async move {
                walk(walking, from, to).await.unwrap();
                flag.set(true);
            }));
            runtime.sleep(Duration::from_millis(100)).await;
            for disk in [&head, &other] {
                write(disk, (LEAVES + 1) << 20, &[2; 4096]).await;
            }
            // Ends when what it replaced is free.
            store.checkpoint().await.unwrap();
            assert!(!ended.get(), "the walk of {to} ended first");
            while !ended.get() {
                runtime.sleep(Duration::from_millis(100)).await;
            }
        }
    });
}

/// What a walk finds is right, whatever becomes of nodes that it has not reached yet.
#[test]
fn disks_are_compared_and_counted_while_they_are_written() {
    with_gated_store_that_reuses(Reuse::Soon, |runtime, gate, store| async move {
        let head = wide_disk(&store, "web01").await;
        store.snapshot("web01", Some("old")).await.unwrap();
        for leaf in [3, LEAVES - 3] {
            write(&head, leaf << 20, &[2; 4096]).await;
        }
        let stop = Rc::new(Cell::new(false));
        let (ended, changing) = (Rc::clone(&stop), store.clone());
        read_slowly(&runtime, &gate);
        let changed = runtime.spawn(async move {
            let mut rounds = 0;
            while !ended.get() {
                for leaf in (10..LEAVES - 10).step_by(7) {
                    write(&head, leaf << 20, &[rounds | 1; 4096]).await;
                }
                changing.checkpoint().await.unwrap();
                rounds += 1;
            }
            rounds
        });
        for _ in 0..3 {
            let (old, new) = (Target::parse("web01@old"), Target::parse("web01"));
            let differences = diff(&store, &old, &new).await.unwrap().extents;
            let has = |leaf: u64| {
                let offset = leaf << 20;
                differences.iter().any(|it| (it.offset, it.length, it.data) == (offset, 4096, true))
            };
            assert!(has(3) && has(LEAVES - 3) && !has(4) && !has(LEAVES - 4));
            assert!(differences.len() < 300, "{} differences", differences.len());
            for target in [&old, &new] {
                let space = store.space(target).await.unwrap();
                assert_eq!(space.mapped_bytes, LEAVES * 4096, "{target}");
            }
        }
        stop.set(true);
        assert!(changed.await > 5);
    });
}

/// The nodes of a snapshot are nobody's when it is deleted.
#[test]
fn a_walk_of_what_is_deleted_meanwhile_ends_with_not_found() {
    for victim in ["web01@old", "web01"] {
        with_gated_store_that_reuses(Reuse::Soon, move |runtime, gate, store| async move {
            drop(wide_disk(&store, "web01").await);
            store.snapshot("web01", Some("old")).await.unwrap();
            store.create("empty", 1 << 40).await.unwrap();
            read_slowly(&runtime, &gate);
            let walks = [None, Some("empty")].map(|from| {
                let store = store.clone();
                runtime.spawn(async move { walk(store, from, victim).await })
            });
            runtime.sleep(Duration::from_millis(100)).await;
            store.remove(&Target::parse(victim)).await.unwrap();
            store.collect_garbage().await.unwrap();
            wide_disk(&store, "new").await;
            for walk in walks {
                assert_eq!(walk.await.unwrap_err().kind(), base::ErrorKind::NotFound, "{victim}");
            }
        });
    }
}

/// A list of every run that differs grew to gigabytes, at the will of whoever wrote a disk.
#[test]
fn differences_come_in_parts_that_cut_no_run() {
    with_store(|_, store| async move {
        for name in ["web01", "empty"] {
            store.create(name, 1 << 40).await.unwrap();
        }
        let web01 = disk(&store, "web01").await;
        for block in 0..40 {
            write(&web01, block << 13, &[1; 4096]).await;
        }
        // One run over two leaves, which is one more extent wherever a part ends.
        write(&web01, (1 << 39) - 8192, &[2; 16_384]).await;
        let (from, to) = (Target::parse("empty"), Target::parse("web01"));
        let whole = diff(&store, &from, &to).await.unwrap();
        assert_eq!((whole.extents.len(), whole.next), (41, None));
        let last = DiffExtent { offset: (1 << 39) - 8192, length: 16_384, data: true };
        assert_eq!(whole.extents.last(), Some(&last));
        for extents_max in [1, 3, 40, 41] {
            let (mut extents, mut next) = (Vec::new(), Some(0));
            while let Some(offset) = next {
                let part = store.diff(&from, &to, offset, extents_max).await.unwrap();
                assert!((1..=extents_max).contains(&part.extents.len()), "{part:?}");
                assert!(part.next.is_none() || part.extents.len() == extents_max, "{part:?}");
                extents.extend(part.extents);
                next = part.next;
            }
            assert_eq!(extents, whole.extents, "{extents_max} at a time");
        }
        let behind = store.diff(&from, &to, (1 << 39) + 5000, 10).await.unwrap();
        let rest = DiffExtent { offset: (1 << 39) + 4096, length: 4096, data: true };
        assert_eq!(behind.extents, [rest]);
        for offset in [1 << 40, u64::MAX] {
            let nothing = store.diff(&from, &to, offset, 10).await.unwrap();
            assert_eq!((nothing.extents, nothing.next), (vec![], None));
        }
    });
}

/// What was lost with a node was compared with a hole block by block, in one breath.
#[test]
fn a_disk_of_which_most_was_lost_is_compared_in_few_steps() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 40).await.unwrap();
        write(&disk(&store, "web01").await, (1 << 40) - 4096, &[1; 4096]).await;
        store.create("empty", 1 << 40).await.unwrap();
        store.create("small", 1 << 20).await.unwrap();
        store.close().await.unwrap();
    });
    let root = Anatomy::of(&ram).vdi(1).root;
    assert_eq!(root.height, 4);
    ram.rot(root.entry.pba());
    reopened(&ram, |_, store, _| async move {
        write(&disk(&store, "web01").await, 1 << 39, &[2; 4096]).await;
        for other in ["empty", "small"] {
            let (lost, other) = (Target::parse("web01"), Target::parse(other));
            for (from, to, data) in [(&other, &lost, true), (&lost, &other, false)] {
                let extents = diff(&store, from, to).await.unwrap().extents;
                assert_eq!(extents, [DiffExtent { offset: 0, length: 1 << 40, data }]);
            }
        }
    });
}

/// Asks for the state of a whole disk; how much of it is data, and how many answers that took.
async fn mapped_bytes(disk: &Rc<dyn Disk>, disk_bytes: u64) -> (u64, u64) {
    let (mut offset, mut mapped, mut answers) = (0, 0, 0);
    while offset < disk_bytes {
        let length = disk_bytes - offset;
        let status = Request::BlockStatus { offset, length, extents_max: usize::MAX };
        let Ok(Response::Extents(extents)) = disk.submit(status).await else { panic!() };
        for extent in extents {
            offset += extent.length;
            mapped += if extent.state == ExtentState::Data { extent.length } else { 0 };
        }
        answers += 1;
    }
    assert_eq!(offset, disk_bytes);
    (mapped, answers)
}

/// Asking for the state of a whole disk was one reader too.
#[test]
fn the_state_of_a_large_disk_comes_in_parts() {
    with_store(|_, store| async move {
        store.create("web01", 1 << 40).await.unwrap();
        let disk = disk(&store, "web01").await;
        for leaf in 0..6000 {
            write(&disk, leaf << 20, &[1; 4096]).await;
        }
        store.checkpoint().await.unwrap();
        let (mapped, parts) = mapped_bytes(&disk, 1 << 40).await;
        assert_eq!(mapped, 6000 * 4096);
        assert!((2..100).contains(&parts), "{parts} answers");
    });
}

/// What was discarded, and no checkpoint had met, was looked at block by block in one breath: after a
/// TRIM of a whole disk, asking for its state stopped everybody for minutes.
#[test]
fn the_state_of_a_discarded_disk_takes_few_steps() {
    with_store(|_, store| async move {
        store.create("web01", 1 << 40).await.unwrap();
        let disk = disk(&store, "web01").await;
        let (length, extents_max) = (1 << 40, usize::MAX);
        disk.submit(Request::Discard { offset: 0, length, fua: false }).await.unwrap();
        write(&disk, 1 << 39, &[1; 4096]).await;
        let status = Request::BlockStatus { offset: 0, length, extents_max };
        let Ok(Response::Extents(extents)) = disk.submit(status).await else { panic!() };
        let extents: Vec<_> = extents.iter().map(|extent| (extent.state, extent.length)).collect();
        let hole = |length: u64| (ExtentState::Hole, length);
        let data = (ExtentState::Data, 4096);
        assert_eq!(extents, [hole(1 << 39), data, hole((1 << 39) - 4096)]);
    });
}

/// Changes that no checkpoint has met cost steps, too.
#[test]
fn the_state_of_what_was_just_written_comes_in_parts() {
    // A log that takes all of it without a checkpoint.
    let options = FormatOptions { log_bytes: Some(16 << 20), ..format_options() };
    run(1, move |runtime| async move {
        let device = Ram::default().device(STORE_BLOCKS);
        Store::format(&device, &runtime, &options).await.unwrap();
        let (store, _) = Store::open(device, runtime, &open_options(1)).await.unwrap();
        store.create("web01", 32 << 20).await.unwrap();
        let disk = disk(&store, "web01").await;
        for megabyte in 0..24 {
            write(&disk, megabyte << 20, &vec![1; 1 << 20]).await;
        }
        assert_eq!(store.stats().checkpoints, 0);
        assert_eq!(mapped_bytes(&disk, 32 << 20).await, (24 << 20, 2));
    });
}
