//! Operations that take very long, and futures that nobody waits for.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use base::{Buffer, Epoch, HostId, Pba, SnapshotNumber, StoreUuid};
use device::Operation;
use disk::{Disk, Request};
use ondisk::{Checksums, Heartbeat};
use parallax_vdi::{FormatOptions, Retention, Store, Target};
use runtime::Runtime;

use crate::gate::{Gate, ends, start_writers, with_gated_store};
use crate::ram::{Ram, run};
use crate::{diff, disk, format_options, open_options, read, reopened, write};

/// First block that can hold data in these stores: behind the system extent and that of the log.
pub(crate) const DATA_START: u64 = 2 * (16 << 20) / 4096;

/// Where the slots of the first host stand, and its heartbeat.
const SLOTS: Range<u64> = 2049..2051;
const HEARTBEAT: Pba = Pba::new(2051);

/// The extent that the log lies in.
const LOG: Range<u64> = 4096..DATA_START;

/// Whether it writes data, or nodes.
pub(crate) fn writes_data(operation: &Operation) -> bool {
    matches!(operation, Operation::Write { at, .. } if at.get() >= DATA_START)
}

fn write_of(offset: u64, length: usize) -> Request {
    let data = Buffer::from_bytes(&vec![7; length]);
    Request::Write { offset, length, data, fua: false }
}

pub(crate) fn writes_slot(operation: &Operation) -> bool {
    matches!(operation, Operation::Write { at, .. } if SLOTS.contains(&at.get()))
}

/// Begins `work`, and drops it.
async fn abandon(work: impl Future) {
    let mut work = Box::pin(work);
    poll_fn(|context| {
        assert!(work.as_mut().poll(context).is_pending());
        Poll::Ready(())
    })
    .await;
}

/// One write whose data does not complete keeps F behind it, while flushes succeed. Once guests
/// filled three quarters of the log above F then, and recovery had a quarter to write that again.
#[test]
fn a_store_opens_after_a_crash_with_one_data_write_that_hung() {
    let (ram, ()) = with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.create("web02", 1 << 30).await.unwrap();
        let (one, two) = (disk(&store, "web01").await, disk(&store, "web02").await);
        write(&two, 0, &[1; 4096]).await;
        let first = Cell::new(true);
        gate.hold(move |operation| writes_data(operation) && first.replace(false));
        drop(runtime.spawn(one.submit(write_of(0, 4096))));
        runtime.sleep(Duration::from_millis(1)).await;
        assert_eq!(gate.held(), 1);
        let done = start_writers(&runtime, &two, 60, 20, 64 << 10);
        runtime.sleep(Duration::from_secs(10)).await;
        assert!(done.get() > 0);
    });
    reopened(&ram, |_, store, _| async move {
        assert_eq!(read(&disk(&store, "web02").await, 0, 4096).await, [1; 4096]);
    });
}

/// When the data write completes after all, everybody goes on.
#[test]
fn writers_that_wait_behind_a_slow_data_write_go_on() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let disk = disk(&store, "web01").await;
        let first = Cell::new(true);
        gate.hold(move |operation| writes_data(operation) && first.replace(false));
        let done = start_writers(&runtime, &disk, 60, 10, 64 << 10);
        runtime.sleep(Duration::from_secs(10)).await;
        assert!(gate.held() == 1 && done.get() < 60 * 10);
        gate.release();
        runtime.sleep(Duration::from_secs(10)).await;
        assert_eq!(done.get(), 60 * 10);
    });
}

/// The record of an abandoned snapshot was never complete, and every checkpoint waited for it.
#[test]
fn a_snapshot_that_nobody_waits_for_is_taken() {
    with_gated_store(|runtime, _, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[1; 4096]).await;
        abandon(store.snapshot("web01", None)).await;
        let later = store.clone();
        let ended = ends(&runtime, async move { later.checkpoint().await.unwrap() });
        assert!(ended.await, "checkpoints stopped");
        assert_eq!(store.info("web01").await.unwrap().snapshot_count, 1);
    });
}

/// An abandoned resize waited for the blocks of the disk, was given them, and kept them for ever.
#[test]
fn a_resize_that_nobody_waits_for_is_done() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let disk = disk(&store, "web01").await;
        gate.hold(writes_data);
        drop(runtime.spawn(disk.submit(write_of(0, 4096))));
        runtime.sleep(Duration::from_millis(1)).await;
        abandon(store.resize("web01", 2 << 30)).await;
        gate.release();
        let goes_on = ends(&runtime, async move { write(&disk, 0, &[1; 4096]).await });
        assert!(goes_on.await, "the disk is locked");
        assert_eq!(store.info("web01").await.unwrap().size_bytes, 2 << 30);
    });
}

/// The task that runs checkpoints ended as soon as the store was asked to close, while writers
/// waited for the room in the log that only a checkpoint makes.
#[test]
fn a_store_closes_although_writers_wait_for_room_in_the_log() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let disk = disk(&store, "web01").await;
        gate.hold(writes_slot);
        let done = start_writers(&runtime, &disk, 16, 100, 4096);
        runtime.sleep(Duration::from_secs(1)).await;
        assert!(gate.held() == 1 && done.get() < 16 * 100);
        let later = runtime.clone();
        drop(runtime.spawn(async move {
            later.sleep(Duration::from_millis(100)).await;
            gate.release();
        }));
        let closed = ends(&runtime, async move { store.close().await.unwrap() });
        assert!(closed.await, "close hangs");
    });
}

/// Each data write that fails takes up to five more records, out of what guests leave of the log. So
/// many at once that this was used up were an assertion, and the end of the daemon; and what they
/// took, recovery did not have: no opening succeeded any more. A flush may make room, unless a write
/// that takes long is in its way; else the store stops.
#[test]
fn more_failing_writes_than_the_log_has_room_for_leave_recovery_its_own() {
    for (passing, one_hangs) in
        [(0, false), (1, false), (6, false), (10, false), (0, true), (4, true), (9, true)]
    {
        with_crowded_log(36, move |runtime, gate, store| async move {
            let web01 = disk(&store, "web01").await;
            let is_data = |at: Pba| at.get() >= 2 * LONG_EXTENT_BYTES / 4096;
            let hangs = Cell::new(one_hangs);
            gate.hold(move |operation| {
                writes_slot(operation)
                    || matches!(operation, Operation::Write { at, .. } if is_data(*at))
                        && hangs.replace(false)
            });
            let left = Cell::new(passing);
            gate.fail(move |at| is_data(at) && left.replace(i32::max(left.get() - 1, 0)) == 0);
            let written = begin_large_writes(&runtime, &web01, 20);
            runtime.sleep(Duration::from_secs(5)).await;
            assert!(passing > 0 || web01.severed(), "the store goes on");
            written.take()
        });
    }
}

/// Begins writes of 1 MiB each; where those that have succeeded wrote.
fn begin_large_writes(runtime: &Runtime, disk: &Rc<dyn Disk>, count: u64) -> Rc<RefCell<Vec<u64>>> {
    let written: Rc<RefCell<Vec<u64>>> = Rc::default();
    for offset in (1..=count).map(|index| index << 20) {
        let (write, written) = (disk.submit(write_of(offset, 1 << 20)), Rc::clone(&written));
        drop(runtime.spawn(async move {
            if write.await.is_ok() {
                written.borrow_mut().push(offset);
            }
        }));
    }
    written
}

/// What is above F when the log is as full as guests may make it fits behind it once. A crash after
/// recovery, and before a checkpoint, had it written again once more.
#[test]
fn a_full_log_is_recovered_as_often_as_it_must_be() {
    for small in 28..42 {
        with_crowded_log(small, move |runtime, gate, store| async move {
            gate.hold(|operation| {
                writes_slot(operation) || matches!(operation, Operation::Flush { .. })
            });
            let web01 = disk(&store, "web01").await;
            let written = begin_large_writes(&runtime, &web01, 12);
            // Without time for a flush. What the log has no room for waits.
            runtime.sleep(Duration::from_millis(1)).await;
            written.take()
        });
    }
}

/// Extents so long that a write of 1 MiB is one run, and its record fills a block of the log.
const LONG_EXTENT_BYTES: u64 = 64 << 20;

/// A store on which no checkpoint makes room in the log, which has `small` blocks of settled writes.
/// `work` on it says which MiB it has written; they are there after each of some crashes.
fn with_crowded_log<F: Future<Output = Vec<u64>> + 'static>(
    small: u64,
    work: impl FnOnce(Runtime, Gate, Store) -> F + 'static,
) -> Vec<u64> {
    const BLOCKS: u64 = 8 * LONG_EXTENT_BYTES / 4096;
    let ram = Ram::default();
    let gate = Gate::new(ram.backend(BLOCKS));
    let written = run(1, move |runtime| async move {
        let options = FormatOptions { extent_bytes: Some(LONG_EXTENT_BYTES), ..format_options() };
        Store::format(&gate.device(), &runtime, &options).await.unwrap();
        let (store, _) =
            Store::open(gate.device(), runtime.clone(), &open_options(3)).await.unwrap();
        store.create("web01", 1 << 30).await.unwrap();
        let web01 = disk(&store, "web01").await;
        gate.hold(writes_slot);
        for block in 0..small {
            write(&web01, block * 4096, &[2; 4096]).await;
        }
        web01.submit(Request::Flush).await.unwrap();
        drop(web01);
        work(runtime, gate, store).await
    });
    for crash in 1..5 {
        let (device, written) = (ram.device(BLOCKS), written.clone());
        run(crash, move |runtime| async move {
            let opened = Store::open(device, runtime.clone(), &open_options(3 + crash)).await;
            let (store, _) = opened.unwrap_or_else(|error| panic!("crash {crash}: {error}"));
            if crash < 4 {
                // Before a checkpoint has made room.
                return;
            }
            let web01 = disk(&store, "web01").await;
            assert_eq!(read(&web01, (small - 1) * 4096, 4096).await, [2; 4096]);
            for offset in written {
                assert_eq!(read(&web01, offset, 4096).await, [7; 4096]);
            }
        });
    }
    written
}

/// A flush that had begun before the store was closed noted in the log what it had made durable:
/// behind the last checkpoint, at a place where the next opening writes.
#[test]
fn a_store_that_closes_writes_no_log() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let disk = disk(&store, "web01").await;
        runtime.sleep(Duration::from_secs(10)).await;
        write(&disk, 0, &[1; 4096]).await;
        gate.hold(|operation| matches!(operation, Operation::Flush { .. }));
        runtime.sleep(Duration::from_secs(2)).await;
        assert_eq!(gate.held(), 1, "the flush that comes by itself");
        let closing = store.clone();
        let closed = runtime.spawn(async move { closing.close().await.unwrap() });
        runtime.sleep(Duration::from_millis(1)).await;
        let logged = Rc::new(Cell::new(0));
        let writes = Rc::clone(&logged);
        gate.release();
        gate.hold(move |operation| {
            let is_log =
                matches!(operation, Operation::Write { at, .. } if LOG.contains(&at.get()));
            writes.set(writes.get() + u64::from(is_log));
            false
        });
        closed.await;
        runtime.sleep(Duration::from_secs(1)).await;
        assert_eq!(logged.get(), 0, "log blocks were written");
    });
}

/// While a publication was on its way the epoch was taken for 0, in heartbeats and in the records
/// of extents.
#[test]
fn a_heartbeat_names_its_epoch_also_while_a_slot_is_written() {
    let (ram, ()) = with_gated_store(|runtime, gate, store| async move {
        gate.hold(writes_slot);
        store.create("web01", 1 << 30).await.unwrap();
        runtime.sleep(Duration::from_secs(20)).await;
        assert_eq!(gate.held(), 1);
    });
    let options = format_options();
    let checksums = Checksums::new(StoreUuid(options.uuid), &options.secret);
    let beat = Heartbeat::decode(&ram.block(HEARTBEAT), &checksums, HEARTBEAT).expect("beats");
    assert!(beat.host == HostId::new(0) && beat.epoch > Epoch::new(0), "{beat:?}");
}

/// Writes to a disk from its start until the store is full; how many bytes it took.
async fn fill(disk: &Rc<dyn Disk>) -> u64 {
    let mut filled = 0;
    while disk.submit(write_of(filled, 1 << 20)).await.is_ok() {
        filled += 1 << 20;
    }
    filled
}

/// Begins a read of the first block, and keeps its device read.
async fn begin_stuck_read(runtime: &Runtime, gate: &Gate, disk: &Rc<dyn Disk>) {
    gate.hold(|operation| matches!(operation, Operation::Read { .. }));
    drop(runtime.spawn(disk.submit(Request::Read { offset: 0, length: 4096 })));
    runtime.sleep(Duration::from_millis(1)).await;
    assert_eq!(gate.held(), 1);
    gate.hold(|_| false);
}

/// Publishing a checkpoint used to wait for all readers, as it released what it had replaced. The
/// next one waited for it, the log filled up, and every VDI stood still.
#[test]
fn a_stuck_read_stops_no_writes() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.create("web02", 1 << 30).await.unwrap();
        let (one, two) = (disk(&store, "web01").await, disk(&store, "web02").await);
        write(&one, 0, &[7; 4096]).await;
        store.checkpoint().await.unwrap();
        begin_stuck_read(&runtime, &gate, &one).await;
        let done = start_writers(&runtime, &two, 1, 1000, 4096);
        runtime.sleep(Duration::from_secs(60)).await;
        assert_eq!(done.get(), 1000, "writes while a read is stuck");
        gate.release();
        assert_eq!(read(&one, 0, 4096).await, [7; 4096]);
    });
}

/// What a reader may still see is not free before it has ended, and then it is.
#[test]
fn replaced_blocks_wait_for_readers_in_the_background() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let disk = disk(&store, "web01").await;
        write(&disk, 0, &vec![1; 1 << 20]).await;
        store.checkpoint().await.unwrap();
        let free = store.stats().free_bytes;
        begin_stuck_read(&runtime, &gate, &disk).await;
        let discard = Request::Discard { offset: 0, length: 1 << 20, fua: false };
        disk.submit(discard).await.unwrap();
        let forced = store.clone();
        let ended = ends(&runtime, async move { forced.checkpoint().await.unwrap() });
        assert!(!ended.await, "a forced checkpoint ends when the space is free");
        assert!(store.stats().free_bytes < free + (1 << 20));
        gate.release();
        runtime.sleep(Duration::from_secs(1)).await;
        assert!(store.stats().free_bytes >= free + (1 << 20));
    });
}

/// Whoever lacked room for metadata waited for a forced checkpoint until what it had replaced was
/// free, which a stuck read held up for ever, though the merge itself had made the room. One pair
/// of checkpoints waited at a time, and everybody who came later waited for the next.
#[test]
fn a_stuck_read_stops_nobody_who_needs_no_replaced_block() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("big", 1 << 30).await.unwrap();
        store.create("wide", 1 << 40).await.unwrap();
        let (big, wide) = (disk(&store, "big").await, disk(&store, "wide").await);
        fill(&big).await;
        store.checkpoint().await.unwrap();
        begin_stuck_read(&runtime, &gate, &big).await;
        // What is to be free after this is not, and who asked for that waits.
        big.submit(Request::Discard { offset: 0, length: 1 << 20, fua: false }).await.unwrap();
        let (waiting, forced) = (Rc::new(Cell::new(true)), store.clone());
        let waits = Rc::clone(&waiting);
        drop(runtime.spawn(async move {
            forced.checkpoint().await.unwrap();
            waits.set(false);
        }));
        // One changed leaf each, and many records to a block of the log: soon there is no room for
        // the nodes of so many.
        let tasks: Vec<_> = (0..400)
            .map(|task| {
                let wide = Rc::clone(&wide);
                runtime.spawn(async move {
                    for leaf in (task..8_000).step_by(400) {
                        let (offset, length) = (leaf << 20, 4096);
                        let discard = Request::Discard { offset, length, fua: false };
                        wide.submit(discard).await.unwrap();
                    }
                })
            })
            .collect();
        let ended = ends(&runtime, async move {
            for task in tasks {
                task.await;
            }
            store.snapshot("wide", None).await.unwrap();
        });
        assert!(ended.await, "discards and snapshots while a read is stuck");
        assert!(waiting.get(), "a forced checkpoint ends when the space is free");
        gate.release();
        runtime.sleep(Duration::from_secs(1)).await;
        assert!(!waiting.get());
    });
}

/// Writes to a full store wait for what a stuck read keeps from being free. Each held room in the log
/// meanwhile, until there was none for anybody; and its range of the disk, so that deleting the
/// disk waited, and everybody who managed another behind that.
#[test]
fn writes_that_wait_for_space_behind_a_stuck_read_stop_nobody_else() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("big", 1 << 30).await.unwrap();
        store.create("wide", 1 << 40).await.unwrap();
        let big = disk(&store, "big").await;
        let filled = fill(&big).await;
        store.checkpoint().await.unwrap();
        begin_stuck_read(&runtime, &gate, &big).await;
        // This may be free soon: so writes wait.
        big.submit(Request::Discard { offset: 0, length: 1 << 20, fua: false }).await.unwrap();
        let failed = Rc::new(Cell::new(0));
        for task in 0..40 {
            let (write, failed) =
                (big.submit(write_of(filled + task * 4096, 4096)), Rc::clone(&failed));
            drop(runtime.spawn(async move {
                let is_err = write.await.is_err();
                failed.set(failed.get() + u32::from(is_err));
            }));
        }
        runtime.sleep(Duration::from_secs(10)).await;
        assert_eq!(failed.get(), 0, "they wait");
        let managed = store.clone();
        let ended = ends(&runtime, async move {
            managed.snapshot("wide", None).await.unwrap();
            managed.resize("wide", 1 << 41).await.unwrap();
        });
        assert!(ended.await, "a snapshot and a resize of another disk");
        let managed = store.clone();
        let ended = ends(&runtime, async move {
            managed.remove(&Target::parse("big")).await.unwrap();
            managed.create("new", 1 << 30).await.unwrap();
        });
        assert!(ended.await, "what makes space again");
        assert_eq!(failed.get(), 40);
        gate.release();
    });
}

/// Whoever waited for space behind somebody who had given up the older half of all moments gave up half
/// of the rest at once, and the next one again: what the first had given up was not free yet, as reads
/// held it up. At last none was left, and writes were refused with much of the store about to be free.
#[test]
fn moments_go_only_when_those_that_went_before_were_not_enough() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.retain("web01", Retention::parse("24h").unwrap()).await.unwrap();
        let web01 = disk(&store, "web01").await;
        let kept = async || {
            let all = store.snapshots("web01", SnapshotNumber::new(0), usize::MAX).await.unwrap();
            all.len()
        };
        // Until some had to go, and the store is as full again.
        let (mut most, mut least_free) = (0, u64::MAX);
        for part in 0.. {
            assert!(part < 400, "it does not run full");
            let (free, count) = (store.stats().free_bytes, kept().await);
            if count < most && free <= least_free + (1 << 20) {
                break;
            }
            if count >= most {
                (most, least_free) = (count, free);
            }
            web01.submit(write_of((part % 16) << 20, 1 << 20)).await.unwrap();
            web01.submit(Request::Flush).await.unwrap();
            runtime.sleep(Duration::from_millis(20)).await;
        }
        let before = kept().await;
        let over = Rc::new(Cell::new(false));
        let (ended, reading, read_too) = (Rc::clone(&over), runtime.clone(), Rc::clone(&web01));
        drop(runtime.spawn(async move {
            while !ended.get() {
                gate.hold(|operation| matches!(operation, Operation::Read { .. }));
                let read = read_too.submit(Request::Read { offset: 0, length: 4096 });
                drop(reading.spawn(read));
                reading.sleep(Duration::from_millis(700)).await;
                gate.release();
            }
        }));
        // A quarter of the store.
        let writers: Vec<_> = (0..64)
            .map(|part| runtime.spawn(web01.submit(write_of(part << 18, 1 << 18))))
            .collect();
        for writer in writers {
            writer.await.unwrap();
        }
        over.set(true);
        let left = kept().await;
        assert!(left < before && left >= before / 2, "{left} of {before} moments are left");
    });
}

/// A client that is cut off connects again at once. It went on with what it had read before the disk
/// was rolled back, or deleted.
#[test]
fn who_opens_a_disk_that_is_about_to_go_is_severed_too() {
    for rolls_back in [true, false] {
        with_gated_store(move |runtime, gate, store| async move {
            store.create("web01", 1 << 30).await.unwrap();
            store.snapshot("web01", Some("s")).await.unwrap();
            let web01 = disk(&store, "web01").await;
            gate.hold(writes_data);
            drop(runtime.spawn(web01.submit(write_of(0, 4096))));
            runtime.sleep(Duration::from_millis(1)).await;
            let leaving = store.clone();
            let left = runtime.spawn(async move {
                match rolls_back {
                    true => leaving.rollback("web01", "s").await,
                    false => leaving.remove(&Target::parse("web01")).await,
                }
            });
            runtime.sleep(Duration::from_millis(1)).await;
            let again = disk(&store, "web01").await;
            assert!(web01.severed() && !again.severed());
            gate.release();
            left.await.unwrap();
            assert!(again.severed());
        });
    }
}

/// A request may take as long as its device does. Deleting its disk waited for it, and everybody who
/// managed another disk behind that.
#[test]
fn a_disk_that_cannot_be_deleted_yet_is_in_nobodys_way() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let web01 = disk(&store, "web01").await;
        write(&web01, 0, &[1; 4096]).await;
        store.checkpoint().await.unwrap();
        gate.hold(|operation| matches!(operation, Operation::Read { .. }));
        // It begins by reading the rest of its block.
        drop(runtime.spawn(web01.submit(write_of(512, 512))));
        runtime.sleep(Duration::from_millis(1)).await;
        assert_eq!(gate.held(), 1);
        let removed = Rc::new(Cell::new(false));
        let (flag, removing) = (Rc::clone(&removed), store.clone());
        drop(runtime.spawn(async move {
            removing.remove(&Target::parse("web01")).await.unwrap();
            flag.set(true);
        }));
        let managed = store.clone();
        let ended = ends(&runtime, async move {
            managed.create("web02", 1 << 30).await.unwrap();
            managed.rename("web02", "web03").await.unwrap();
        });
        assert!(ended.await && !removed.get(), "others are managed meanwhile");
        gate.release();
        runtime.sleep(Duration::from_secs(1)).await;
        assert!(removed.get());
        assert!(store.info("web01").await.is_err());
    });
}

/// In a full store recovery leaves data where it stands. It wrote a record for each block then,
/// and a log that was three quarters full had no room for them.
#[test]
fn a_full_store_opens_after_a_crash_with_a_full_log() {
    const MIB: u64 = 1 << 20;
    let (ram, ()) = with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let disk = disk(&store, "web01").await;
        let mut filled = 0;
        while disk.submit(write_of(filled, 1 << 20)).await.is_ok() {
            filled += MIB;
        }
        disk.submit(Request::Discard { offset: 0, length: 13 * MIB, fua: true }).await.unwrap();
        store.checkpoint().await.unwrap();
        // The tail stays where it is, while the log fills.
        gate.hold(writes_slot);
        for block in 0..30 {
            write(&disk, filled + block * 4096, &[1; 4096]).await;
        }
        disk.submit(Request::Flush).await.unwrap();
        gate.hold(|operation| {
            writes_slot(operation) || matches!(operation, Operation::Flush { .. })
        });
        for megabyte in 0..12 {
            drop(runtime.spawn(disk.submit(write_of(megabyte << 20, 1 << 20))));
        }
        runtime.sleep(Duration::from_secs(2)).await;
        let stats = store.stats();
        assert!(stats.log_used_percent >= 50, "{stats:?}");
    });
    reopened(&ram, |_, store, _| async move {
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [7; 4096]);
    });
}

/// A clone of a running disk counts after a crash only if every write before it does. It could be
/// opened by name before that was certain, and then lost what was written to it and flushed.
#[test]
fn a_clone_can_be_opened_when_it_is_durable() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        gate.hold(writes_data);
        drop(runtime.spawn(disk(&store, "web01").await.submit(write_of(0, 4096))));
        runtime.sleep(Duration::from_millis(1)).await;
        let cloning = store.clone();
        drop(runtime.spawn(async move {
            cloning.clone_vdi(&Target::parse("web01"), "web02").await.unwrap();
        }));
        runtime.sleep(Duration::from_millis(1)).await;
        let opening = store.clone();
        let opened = runtime.spawn(async move {
            let clone = disk(&opening, "web02").await;
            assert_eq!(read(&clone, 0, 4096).await, [7; 4096]);
        });
        runtime.sleep(Duration::from_secs(1)).await;
        assert_eq!(gate.held(), 1);
        gate.release();
        opened.await;
    });
}

/// A snapshot counts after a crash only if every write before it does. It was listed, counted and
/// compared before that was certain.
#[test]
fn a_snapshot_is_seen_when_it_is_durable() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let head = disk(&store, "web01").await;
        write(&head, 0, &[1; 4096]).await;
        store.snapshot("web01", None).await.unwrap();
        gate.hold(|operation| matches!(operation, Operation::Flush { .. }));
        write(&head, 4096, &[2; 4096]).await;
        let taking = store.clone();
        let taken = runtime.spawn(async move { taking.snapshot("web01", None).await.unwrap() });
        let cloning = store.clone();
        let cloned = runtime.spawn(async move {
            cloning.clone_vdi(&Target::parse("web01"), "web02").await.unwrap();
        });
        runtime.sleep(Duration::from_millis(1)).await;
        let counted = store.info("web01").await.unwrap().snapshot_count;
        let listed = store.snapshots("web01", SnapshotNumber::new(0), 10).await.unwrap().len();
        assert_eq!((counted, listed), (1, 1));
        let waiting = Rc::new(Cell::new(3));
        let count = |left: &Rc<Cell<i32>>| {
            let left = Rc::clone(left);
            move || left.set(left.get() - 1)
        };
        let (first, second) = (Target::parse("web01@1"), Target::parse("web01@2"));
        let (comparing, compared) = (store.clone(), count(&waiting));
        drop(runtime.spawn(async move {
            diff(&comparing, &first, &second).await.unwrap();
            compared();
        }));
        let (counting, counted) = (store.clone(), count(&waiting));
        drop(runtime.spawn(async move {
            counting.space(&Target::parse("web01@2")).await.unwrap();
            counted();
        }));
        let (describing, described) = (store.clone(), count(&waiting));
        drop(runtime.spawn(async move {
            describing.info("web02").await.unwrap();
            described();
        }));
        // Checkpoints make it durable too, but only when flushes succeed.
        runtime.sleep(Duration::from_secs(1)).await;
        assert_eq!(waiting.get(), 3, "answers while it is not durable");
        gate.release();
        taken.await;
        cloned.await;
        runtime.sleep(Duration::from_secs(1)).await;
        assert_eq!(waiting.get(), 0);
        assert_eq!(store.info("web01").await.unwrap().snapshot_count, 2);
    });
}

/// Polls `work` for a while, and drops it.
async fn abandon_later(runtime: &Runtime, work: impl Future) {
    let mut work = Box::pin(work);
    for _ in 0..10 {
        poll_fn(|context| {
            assert!(work.as_mut().poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
        runtime.sleep(Duration::from_millis(1)).await;
    }
}

/// Both begin with a checkpoint. What it had taken at its cut went with it, and the next one
/// published without.
#[test]
fn a_comparison_that_nobody_waits_for_loses_no_changes() {
    let (ram, ()) = with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.create("web02", 1 << 30).await.unwrap();
        for (name, byte) in [("web01", 1), ("web02", 2)] {
            let disk = disk(&store, name).await;
            write(&disk, 0, &[byte; 4096]).await;
            gate.hold(writes_data);
            let target = Target::parse(name);
            match byte {
                1 => abandon_later(&runtime, store.space(&target)).await,
                _ => abandon_later(&runtime, diff(&store, &target, &target)).await,
            }
            assert!(gate.held() > 0, "the checkpoint had begun");
            gate.release();
            store.checkpoint().await.unwrap();
        }
    });
    reopened(&ram, |_, store, report| async move {
        for (name, byte) in [("web01", 1), ("web02", 2)] {
            let bytes = read(&disk(&store, name).await, 0, 4096).await;
            assert_eq!(bytes[0], byte, "{name}: {report:?}");
        }
    });
}

/// One that was dropped while it was published took the slots with it: none could follow.
#[test]
fn checkpoints_go_on_after_a_comparison_that_nobody_waits_for() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[1; 4096]).await;
        gate.hold(writes_slot);
        abandon_later(&runtime, store.space(&Target::parse("web01"))).await;
        assert_eq!(gate.held(), 1);
        gate.release();
        store.checkpoint().await.unwrap();
    });
}

/// A disk is read from its tables when somebody uses it. Who was slow to read them adopted what they had
/// said, though another had loaded the disk, written it and left it meanwhile.
#[test]
fn who_loads_a_disk_slowly_gets_what_was_written_meanwhile() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 20).await.unwrap();
        store.snapshot("web01", None).await.unwrap();
        store.close().await.unwrap();
        let (store, _) =
            Store::open(gate.device(), runtime.clone(), &open_options(3)).await.unwrap();
        runtime.sleep(Duration::from_secs(1)).await;
        // The page of its snapshots.
        gate.hold(|operation| matches!(operation, Operation::Read { .. }));
        let slow = store.clone();
        let described = Rc::new(Cell::new(false));
        let flag = Rc::clone(&described);
        drop(runtime.spawn(async move {
            disk(&slow, "web01").await;
            flag.set(true);
        }));
        runtime.sleep(Duration::from_millis(1)).await;
        assert_eq!(gate.held(), 1);
        gate.hold(|_| false);
        let quick = disk(&store, "web01").await;
        write(&quick, 0, &[7; 4096]).await;
        drop(quick);
        // A checkpoint, and it is dropped.
        runtime.sleep(Duration::from_secs(10)).await;
        gate.release();
        runtime.sleep(Duration::from_millis(1)).await;
        assert!(described.get());
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [7; 4096]);
    });
}
