//! The engine on a faultless device: what it does when nothing fails.
#![allow(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test that fails says where"
)]

mod budget;
mod check;
mod checkpoints;
mod damage;
mod faults;
mod gate;
mod gc;
mod gc_space;
mod golden;
mod guarantees;
mod history;
mod holds;
mod hostile;
mod intervals;
mod machines;
mod model;
mod moments;
mod online;
mod opening;
mod passes;
mod ram;
mod receive;
mod reopen;
mod scrub;
mod series;
mod space;
mod starts;
mod stuck;
mod walks;
mod writes;

use std::rc::Rc;
use std::time::Duration;

use base::{BLOCK_SIZE, Buffer, ErrorKind, SnapshotNumber};
use disk::{Disk, Extent, ExtentState, Request, Response, copy_segments};
use parallax_vdi::{Error, FormatOptions, OpenOptions, OpenReport, Reuse, Store, Target, VdiDiff};
use ram::{Ram, run};
use runtime::Runtime;

const STORE_BLOCKS: u64 = (128 << 20) / BLOCK_SIZE as u64;

pub(crate) fn format_options() -> FormatOptions {
    FormatOptions {
        extent_bytes: Some(16 << 20),
        log_bytes: Some(256 << 10),
        force: false,
        keep_space: false,
        uuid: [7; 16],
        secret: [9; 32],
        boot_id: [1; 16],
    }
}

/// Options of machine 1.
pub(crate) fn open_options(nonce: u64) -> OpenOptions {
    OpenOptions {
        cache_bytes: 1 << 20,
        boot_id: [1; 16],
        nonce,
        after_failure: false,
        idle_vdis_max: 0,
        marks_stored_every: Duration::ZERO,
        gc_memory_bytes: 256 << 20,
        reuse: Reuse::Late,
    }
}

pub(crate) async fn open(ram: &Ram, runtime: &Runtime) -> (Store, OpenReport) {
    open_with_cache(ram, runtime, 1 << 20).await
}

pub(crate) async fn open_with_cache(
    ram: &Ram,
    runtime: &Runtime,
    cache_bytes: usize,
) -> (Store, OpenReport) {
    let options = OpenOptions { cache_bytes, ..open_options(runtime.random()) };
    Store::open(ram.device(STORE_BLOCKS), runtime.clone(), &options).await.expect("opens")
}

/// Formats a device and runs `work` on the open store.
fn with_store<T: 'static, F: Future<Output = T> + 'static>(
    work: impl FnOnce(Runtime, Store) -> F + 'static,
) -> (Ram, T) {
    let ram = Ram::default();
    let device = ram.clone();
    let outcome = run(1, |runtime| async move {
        Store::format(&device.device(STORE_BLOCKS), &runtime, &format_options()).await.unwrap();
        let (store, report) = open(&device, &runtime).await;
        assert!(report.clean && report.alarms.is_empty(), "{report:?}");
        work(runtime, store).await
    });
    (ram, outcome)
}

fn reopened<T: 'static, F: Future<Output = T> + 'static>(
    ram: &Ram,
    work: impl FnOnce(Runtime, Store, OpenReport) -> F + 'static,
) -> T {
    let ram = ram.clone();
    run(2, |runtime| async move {
        let (store, report) = open(&ram, &runtime).await;
        work(runtime, store, report).await
    })
}

pub(crate) async fn disk(store: &Store, name: &str) -> Rc<dyn Disk> {
    store.open_disk(&Target::parse(name)).await.expect("exists")
}

pub(crate) async fn write(disk: &Rc<dyn Disk>, offset: u64, bytes: &[u8]) {
    let data = Buffer::from_bytes(bytes);
    let request = Request::Write { offset, length: bytes.len(), data, fua: false };
    disk.submit(request).await.expect("writes");
}

pub(crate) async fn read(disk: &Rc<dyn Disk>, offset: u64, length: usize) -> Vec<u8> {
    let answer = disk.submit(Request::Read { offset, length }).await.expect("reads");
    let Response::Data(segments) = answer else { panic!("a read answers with data") };
    let mut bytes = vec![0xee; length];
    copy_segments(&segments, &mut bytes);
    bytes
}

/// All that differs.
pub(crate) async fn diff(store: &Store, from: &Target, to: &Target) -> Result<VdiDiff, Error> {
    store.diff(from, to, 0, usize::MAX).await
}

#[test]
fn what_was_written_is_read_across_crashes_and_clean_restarts() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let disk = disk(&store, "web01").await;
        write(&disk, 0, &[1; 8192]).await;
        write(&disk, 5000, &[2; 100]).await;
        write(&disk, 1 << 29, &vec![3; 1 << 20]).await;
    });
    let check = |clean: bool| {
        move |_, store: Store, report: OpenReport| async move {
            assert_eq!(report.clean, clean);
            let disk = disk(&store, "web01").await;
            let head = read(&disk, 0, 12288).await;
            assert_eq!(head[..5000], [1; 5000]);
            assert_eq!(head[5000..5100], [2; 100]);
            assert_eq!(head[5100..8192], [1; 3092]);
            assert_eq!(head[8192..], [0; 4096]);
            assert_eq!(read(&disk, 1 << 29, 1 << 20).await, vec![3; 1 << 20]);
            store.close().await.unwrap();
        }
    };
    reopened(&ram, check(false));
    reopened(&ram, check(true));
}

/// The simulator's device failed the read of a write's data once, while the store was opened after
/// a power cut that had lost them. The record counted, and the block was lost: neither old nor new.
#[test]
fn a_read_that_fails_once_does_not_make_a_lost_write_count() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 4 << 20).await.unwrap();
        let disk = disk(&store, "web01").await;
        write(&disk, 0, &[11; 4096]).await;
        store.checkpoint().await.unwrap();
        write(&disk, 0, &[22; 4096]).await;
    });
    let lost = ram.filled_with(22).unwrap();
    ram.rot(lost);
    ram.stumble(lost);
    reopened(&ram, |_, store, report| async move {
        assert_eq!(report.records_dropped, 1);
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [11; 4096]);
    });
}

#[test]
fn a_log_of_many_laps_survives_a_crash_at_its_end() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 4 << 20).await.unwrap();
        let disk = disk(&store, "web01").await;
        for round in 0..600u64 {
            write(&disk, (round * 7 % 1024) * 4096, &[round as u8; 4096]).await;
        }
    });
    reopened(&ram, |_, store, _| async move {
        let disk = disk(&store, "web01").await;
        for round in 0..600u64 {
            let bytes = read(&disk, (round * 7 % 1024) * 4096, 4096).await;
            assert_eq!(bytes, [round as u8; 4096], "round {round}");
        }
    });
}

#[test]
fn snapshots_clones_and_rollbacks_keep_their_moment() {
    let check = |store: Store| async move {
        let at = |name: &'static str| {
            let store = store.clone();
            async move { read(&disk(&store, name).await, 0, 4096).await[0] }
        };
        assert_eq!(at("web01@first").await, 1);
        assert_eq!(at("web01@2").await, 2);
        assert_eq!(at("clone-of-first").await, 11);
        assert_eq!(at("clone-of-running").await, 3);
        assert_eq!(at("web01").await, 21);
        assert_eq!(at("clone-of-rolled").await, 21);
        let numbers: Vec<_> = store
            .snapshots("web01", SnapshotNumber::new(0), 10)
            .await
            .unwrap()
            .into_iter()
            .map(|snapshot| snapshot.number.get())
            .collect();
        assert_eq!(numbers, [1, 2]);
        store
    };
    let (ram, ()) = with_store(move |_, store| async move {
        store.create("web01", 1 << 20).await.unwrap();
        let head = disk(&store, "web01").await;
        write(&head, 0, &[1; 4096]).await;
        store.snapshot("web01", Some("first")).await.unwrap();
        write(&head, 0, &[2; 4096]).await;
        store.snapshot("web01", None).await.unwrap();
        write(&head, 0, &[3; 4096]).await;
        store.clone_vdi(&Target::parse("web01@first"), "clone-of-first").await.unwrap();
        store.clone_vdi(&Target::parse("web01"), "clone-of-running").await.unwrap();
        write(&head, 0, &[4; 4096]).await;
        write(&disk(&store, "clone-of-first").await, 0, &[11; 4096]).await;
        store.rollback("web01", "2").await.unwrap();
        assert!(head.severed());
        let head = disk(&store, "web01").await;
        assert_eq!(read(&head, 0, 4096).await, [2; 4096]);
        write(&head, 0, &[21; 4096]).await;
        store.clone_vdi(&Target::parse("web01"), "clone-of-rolled").await.unwrap();
        let store = check(store).await;
        store.checkpoint().await.unwrap();
        check(store).await;
    });
    reopened(&ram, move |_, store, _| async move {
        let store = check(store).await;
        store.close().await.unwrap();
    });
    reopened(&ram, move |_, store, _| async move {
        check(store).await;
    });
}

/// A guest that goes on after its daemon was killed is told by it whether its disk is still the one
/// that it knew.
#[test]
fn a_disk_is_the_same_one_until_it_is_rolled_back_or_replaced() {
    let identity = |store: &Store, name: &'static str| {
        let store = store.clone();
        async move { disk(&store, name).await.identity() }
    };
    let (ram, before) = with_store(move |_, store| async move {
        store.create("web01", 1 << 20).await.unwrap();
        let created = identity(&store, "web01").await;
        write(&disk(&store, "web01").await, 0, &[1; 4096]).await;
        store.snapshot("web01", Some("first")).await.unwrap();
        store.resize("web01", 2 << 20).await.unwrap();
        assert_eq!(identity(&store, "web01").await, created);
        store.resize("web01", 1 << 20).await.unwrap();
        let shrunk = identity(&store, "web01").await;
        store.rollback("web01", "first").await.unwrap();
        let rolled_back = identity(&store, "web01").await;
        store.checkpoint().await.unwrap();
        assert_eq!(identity(&store, "web01").await, rolled_back);
        store.rollback("web01", "first").await.unwrap();
        let again = identity(&store, "web01").await;
        store.clone_vdi(&Target::parse("web01@first"), "clone").await.unwrap();
        let (snapshot, clone) =
            (identity(&store, "web01@first").await, identity(&store, "clone").await);
        let all = [created, shrunk, rolled_back, again, snapshot, clone];
        for (index, one) in all.iter().enumerate() {
            assert!(!all[..index].contains(one), "{all:?}");
        }
        all
    });
    let [created, _, _, again, snapshot, clone] = before;
    for clean in [false, true] {
        reopened(&ram, move |_, store, report| async move {
            assert_eq!(report.clean, clean);
            assert_eq!(identity(&store, "web01").await, again);
            assert_eq!(identity(&store, "web01@first").await, snapshot);
            assert_eq!(identity(&store, "clone").await, clone);
            store.close().await.unwrap();
        });
    }
    // What no flush covered may be lost, and users who were there are there still.
    let failed = ram.clone();
    let after_failure = run(2, move |runtime| async move {
        let options = OpenOptions { after_failure: true, ..open_options(runtime.random()) };
        let device = failed.device(STORE_BLOCKS);
        let (store, _) = Store::open(device, runtime.clone(), &options).await.expect("opens");
        identity(&store, "web01").await
    });
    assert_ne!(after_failure, again);
    reopened(&ram, move |_, store, _| async move {
        assert_eq!(identity(&store, "web01").await, after_failure, "that is no news any more");
        store.remove(&Target::parse("web01")).await.unwrap();
        store.create("web01", 1 << 20).await.unwrap();
        assert_ne!(identity(&store, "web01").await, created);
    });
}

#[test]
fn discards_make_holes_and_free_their_blocks() {
    with_store(|_, store| async move {
        store.create("web01", 64 << 20).await.unwrap();
        let disk = disk(&store, "web01").await;
        for megabyte in 0..16 {
            write(&disk, megabyte << 20, &vec![5; 1 << 20]).await;
        }
        store.checkpoint().await.unwrap();
        let used = store.stats().free_bytes;
        let request = Request::Discard { offset: 100, length: (16 << 20) - 200, fua: false };
        disk.submit(request).await.unwrap();
        let request = Request::BlockStatus { offset: 0, length: 64 << 20, extents_max: 10 };
        let Ok(Response::Extents(extents)) = disk.submit(request).await else { panic!() };
        let states: Vec<_> = extents.iter().map(|extent| extent.state).collect();
        use ExtentState::{Data, Hole};
        assert_eq!(states, [Data, Hole, Data, Hole]);
        assert_eq!(read(&disk, 0, 200).await, [[5; 100], [0; 100]].concat());
        store.checkpoint().await.unwrap();
        let freed = store.stats().free_bytes - used;
        assert!(freed >= (15 << 20), "{freed} bytes came back");
    });
}

/// A disk that has hardly been written told 1 GiB of its holes at a time.
#[test]
fn what_was_never_written_is_one_hole() {
    with_store(|_, store| async move {
        store.create("web01", 20 << 40).await.unwrap();
        let disk = disk(&store, "web01").await;
        write(&disk, 0, &[1; 4096]).await;
        store.checkpoint().await.unwrap();
        let request =
            Request::BlockStatus { offset: 4096, length: (20 << 40) - 4096, extents_max: 9 };
        let Ok(Response::Extents(extents)) = disk.submit(request).await else { panic!() };
        let [Extent { length, state: ExtentState::Hole }] = extents[..] else {
            panic!("{extents:?}")
        };
        assert_eq!(length, (20 << 40) - 4096);
    });
}

#[test]
fn a_full_store_refuses_writes_and_heals() {
    with_store(|_, store| async move {
        store.create("big", 1 << 30).await.unwrap();
        let disk = disk(&store, "big").await;
        let mut filled = 0;
        let error = loop {
            let data = Buffer::from_bytes(&vec![7; 1 << 20]);
            let request = Request::Write { offset: filled, length: 1 << 20, data, fua: false };
            match disk.submit(request).await {
                Ok(_) => filled += 1 << 20,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind, ErrorKind::NoSpace);
        assert!(filled >= 48 << 20, "{} MiB fitted", filled >> 20);
        assert_eq!(read(&disk, filled - 4096, 4096).await, [7; 4096]);
        store.snapshot("big", None).await.expect("a full store takes snapshots");
        store.remove(&Target::parse("big@1")).await.unwrap();
        disk.submit(Request::Flush).await.unwrap();
        disk.submit(Request::Discard { offset: 0, length: 8 << 20, fua: true }).await.unwrap();
        write(&disk, 0, &vec![8; 1 << 20]).await;
    });
}

/// A discard that did not end at whole blocks asked a full store for room before it freed any, and
/// filled holes with zeroes.
#[test]
fn discarding_parts_of_blocks_needs_no_room() {
    with_store(|_, store| async move {
        store.create("big", 1 << 30).await.unwrap();
        let disk = disk(&store, "big").await;
        let mut filled = 0;
        loop {
            let data = Buffer::from_bytes(&vec![7; 1 << 20]);
            let request = Request::Write { offset: filled, length: 1 << 20, data, fua: false };
            if disk.submit(request).await.is_err() {
                break;
            }
            filled += 1 << 20;
        }
        let holes = (1 << 29) + 512;
        disk.submit(Request::Discard { offset: holes, length: 1024, fua: false }).await.unwrap();
        let no_hole = Request::WriteZeroes {
            offset: holes,
            length: 8192,
            fua: false,
            no_hole: true,
            fast_only: false,
        };
        disk.submit(no_hole).await.unwrap();
        disk.submit(Request::Discard { offset: 512, length: 8 << 20, fua: true }).await.unwrap();
        let head = read(&disk, 0, 4096).await;
        assert_eq!((&head[..512], &head[512..]), (&[7; 512][..], &[0; 3584][..]));
        assert_eq!(read(&disk, 4 << 20, 1 << 20).await, vec![0; 1 << 20]);
        let tail = read(&disk, 8 << 20, 4096).await;
        assert_eq!((&tail[..512], &tail[512..]), (&[0; 512][..], &[7; 3584][..]));
        let status =
            Request::BlockStatus { offset: 1 << 29, length: 16_384, extents_max: usize::MAX };
        let Response::Extents(extents) = disk.submit(status).await.unwrap() else { panic!() };
        assert!(extents.iter().all(|extent| extent.state != ExtentState::Data), "{extents:?}");
    });
}

#[test]
fn names_and_sizes_are_checked() {
    with_store(|_, store| async move {
        store.create("a", 4096).await.unwrap();
        let kind = |result: Result<base::VdiId, parallax_vdi::Error>| result.unwrap_err().kind();
        assert_eq!(kind(store.create("a", 4096).await), ErrorKind::Exists);
        let long = "x".repeat(300);
        for bad in ["", "a@b", "a b", "-x", ".", "..", "/a", &long] {
            assert_eq!(kind(store.create(bad, 4096).await), ErrorKind::Invalid, "{bad}");
        }
        for good in ["a/b", "_x", "1", "w\u{e4}b.01:x+y"] {
            store.create(good, 4096).await.unwrap();
            store.remove(&Target::parse(good)).await.unwrap();
        }
        assert_eq!(kind(store.create("c", 0).await), ErrorKind::Invalid);
        let nowhere = Target::parse("nowhere");
        assert_eq!(kind(store.clone_vdi(&nowhere, "d").await), ErrorKind::NotFound);
        store.rename("a", "z").await.unwrap();
        assert_eq!(store.info("a").await.unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(store.info("z").await.unwrap().size_bytes, 4096);
        store.resize("z", 1 << 30).await.unwrap();
        let disk = disk(&store, "z").await;
        write(&disk, (1 << 30) - 4096, &[1; 4096]).await;
        store.resize("z", 8192).await.unwrap();
        assert!(disk.severed());
        store.resize("z", 1 << 30).await.unwrap();
        let disk = self::disk(&store, "z").await;
        assert_eq!(read(&disk, (1 << 30) - 4096, 4096).await, [0; 4096]);
        store.remove(&Target::parse("z")).await.unwrap();
        assert!(store.list(None, 10).await.unwrap().is_empty());
    });
}

/// `web01@` once meant the oldest snapshot without a label, which a typing error could delete, and
/// `web01@+2` number 2 to some commands and the label `+2` to others.
#[test]
fn a_snapshot_is_named_by_its_label_or_by_digits() {
    with_store(|_, store| async move {
        store.create("a", 4096).await.unwrap();
        store.snapshot("a", None).await.unwrap();
        store.snapshot("a", Some("+1")).await.unwrap();
        for nothing in ["a@", "a@+2", "a@ 1", "a@3", "a@18446744073709551616"] {
            let refused = store.remove(&Target::parse(nothing)).await.unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::NotFound, "{nothing}");
        }
        store.remove(&Target::parse("a@+1")).await.unwrap();
        let left = store.snapshots("a", SnapshotNumber::new(0), 10).await.unwrap();
        assert_eq!(left.iter().map(|entry| entry.number.get()).collect::<Vec<_>>(), [1]);
        store.remove(&Target::parse("a@1")).await.unwrap();
    });
}

#[test]
fn diff_lists_what_differs() {
    with_store(|_, store| async move {
        store.create("a", 1 << 30).await.unwrap();
        let disk = disk(&store, "a").await;
        write(&disk, 0, &[1; 16384]).await;
        store.snapshot("a", Some("s")).await.unwrap();
        write(&disk, 4096, &[2; 4096]).await;
        write(&disk, 1 << 29, &[3; 8192]).await;
        disk.submit(Request::Discard { offset: 12288, length: 4096, fua: false }).await.unwrap();
        let (old, new) = (Target::parse("a@s"), Target::parse("a"));
        let found = diff(&store, &old, &new).await.unwrap();
        let extents: Vec<_> = found.extents.iter().map(|e| (e.offset, e.length, e.data)).collect();
        assert_eq!(extents, [(4096, 4096, true), (12288, 4096, false), (1 << 29, 8192, true)]);
        store.resize("a", 2 << 30).await.unwrap();
        let grown = diff(&store, &old, &new).await.unwrap();
        assert_eq!((grown.from_size_bytes, grown.to_size_bytes), (1 << 30, 2 << 30));
        assert_eq!(grown.extents, found.extents, "what is behind the end counts as zeroes");
        let space = store.space(&Target::parse("a")).await.unwrap();
        assert_eq!(space.mapped_bytes, 5 * 4096);
        assert_eq!(space.exclusive_bytes, 3 * 4096);
    });
}

/// A write of 1 MiB that is not aligned touches 257 blocks. In extents that are large enough they
/// lie next to each other: one record named them all, replay refused it, took it for the end of the
/// log, and flushed writes were gone.
#[test]
fn a_large_unaligned_write_is_replayed() {
    const BLOCKS: u64 = (2 << 30) / BLOCK_SIZE as u64;
    let ram = Ram::default();
    let device = ram.clone();
    run(1, move |runtime| async move {
        let options = FormatOptions { extent_bytes: Some(256 << 20), ..format_options() };
        Store::format(&device.device(BLOCKS), &runtime, &options).await.unwrap();
        let opened = Store::open(device.device(BLOCKS), runtime.clone(), &open_options(1)).await;
        let (store, _) = opened.unwrap();
        store.create("web01", 64 << 20).await.unwrap();
        let disk = disk(&store, "web01").await;
        write(&disk, (1 << 20) + 512, &vec![2; 1 << 20]).await;
        write(&disk, 16 << 20, &[3; 4096]).await;
        disk.submit(Request::Flush).await.unwrap();
    });
    run(2, move |runtime| async move {
        let opened = Store::open(ram.device(BLOCKS), runtime.clone(), &open_options(2)).await;
        let (store, _) = opened.unwrap();
        let disk = disk(&store, "web01").await;
        assert_eq!(read(&disk, (1 << 20) + 512, 1 << 20).await, vec![2; 1 << 20]);
        assert_eq!(read(&disk, 16 << 20, 4096).await, [3; 4096]);
    });
}
