//! What opening a store makes of what it finds.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use base::{Block, BlockSlice, Buffer, ErrorKind, Lba, Pba, SnapshotNumber};
use device::{Backend, Device, Operation};
use disk::Request;
use ondisk::{LogBlock, RangeState, RecordBody};
use parallax_vdi::{Error, FormatOptions, Store, Target};
use runtime::Runtime;

use crate::check::{Anatomy, forge_records, set_label};
use crate::gate::{Gate, start_writers, with_gated_store};
use crate::ram::{Ram, run};
use crate::stuck::{DATA_START, writes_slot};
use crate::{STORE_BLOCKS, disk, format_options, open_options, read, reopened, with_store, write};

/// A record is bounded by what a VDI can have at most, but this one has a single block: cut into
/// subtrees of its size, the range was 2^40 pieces.
#[test]
fn a_forged_range_ends_where_the_disk_does() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 4096).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[1; 4096]).await;
    });
    let range = RecordBody::Range { lba: Lba::new(0), count: 1 << 40, state: RangeState::Unmapped };
    forge_records(&ram, vec![(1, range)]);
    reopened(&ram, |_, store, report| async move {
        assert!(report.records_replayed == 3, "{report:?}");
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [0; 4096]);
        store.close().await.unwrap();
    });
}

/// Labels end after 2^32 snapshots that a checkpoint met. Then no checkpoint succeeded any more,
/// and nothing could be written to any VDI.
#[test]
fn a_vdi_without_birth_labels_refuses_snapshots_and_nothing_else() {
    let (ram, ()) = with_store(|_, store| async move {
        for name in ["web01", "web02"] {
            store.create(name, 1 << 20).await.unwrap();
            write(&disk(&store, name).await, 0, &[1; 4096]).await;
        }
        store.snapshot("web01", Some("old")).await.unwrap();
        store.close().await.unwrap();
    });
    set_label(&ram, 1, u32::MAX - 5);
    reopened(&ram, |_, store, _| async move {
        let full = |error: Option<Error>| error.map(|error| error.kind());
        let no_space = Some(ErrorKind::NoSpace);
        assert_eq!(full(store.snapshot("web01", None).await.err()), no_space);
        assert_eq!(full(store.rollback("web01", "old").await.err()), no_space);
        for source in ["web01", "web01@old"] {
            let cloned = store.clone_vdi(&Target::parse(source), "clone").await;
            assert_eq!(full(cloned.err()), no_space);
        }
        write(&disk(&store, "web01").await, 0, &[2; 4096]).await;
        store.checkpoint().await.unwrap();
        store.snapshot("web02", None).await.unwrap();
        store.close().await.unwrap();
    });
}

/// A slot of zeroes was taken for one that was never written, although it may have been the newest.
#[test]
fn a_host_slot_that_was_zeroed_raises_an_alarm() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 20).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[1; 4096]).await;
        store.close().await.unwrap();
    });
    for at in [2049, 2050].map(Pba::new) {
        let ram = ram.copy();
        ram.set_block(at, &Block([0; 4096]));
        reopened(&ram, |_, store, report| async move {
            assert_eq!(report.alarms.len(), 1, "{report:?}");
            assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [1; 4096]);
        });
    }
}

/// Zeroes are what a format leaves, so one bad transfer of zeroes was believed: the store went back
/// to the older slot, of before it was closed.
#[test]
fn a_host_slot_that_comes_as_zeroes_once_is_read_again() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 20).await.unwrap();
        store.close().await.unwrap();
    });
    let pair = Anatomy::of(&ram).pair;
    ram.blank(Anatomy::of(&ram).geometry.host_slot(pair.newest.host, pair.copy));
    reopened(&ram, |_, _, report| async move {
        assert!(report.clean && report.alarms.is_empty(), "{report:?}");
    });
}

/// A copy of the slot that could not be read was as good as a damaged one, also when it was the whole
/// device that could not be reached: the store went back to the older slot, or, if another machine
/// might use it, found that the slot was another one after the watch, and blamed that machine.
#[test]
fn a_device_out_of_reach_says_nothing_of_a_host_slot() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 20).await.unwrap();
        store.close().await.unwrap();
    });
    let Anatomy { geometry, pair, .. } = Anatomy::of(&ram);
    ram.sever(geometry.host_slot(pair.newest.host, pair.copy));
    let device = ram.clone();
    run(2, move |runtime| async move {
        let device = device.device(STORE_BLOCKS);
        let error = Store::open(device, runtime, &open_options(2)).await.expect_err("opens");
        assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    });
    reopened(&ram, |_, _, report| async move {
        assert!(report.clean && report.alarms.is_empty(), "{report:?}");
    });
}

/// Where the log breaks, it ends, unless something behind says that it went on. That was read once:
/// after one bad transfer the end of the log was where it had rotted, and what had been flushed was
/// gone without a word.
#[test]
fn what_vouches_for_a_broken_log_is_read_again() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 20).await.unwrap();
        let disk = disk(&store, "web01").await;
        store.checkpoint().await.unwrap();
        write(&disk, 0, &[1; 4096]).await;
        disk.submit(Request::Flush).await.unwrap();
        write(&disk, 4096, &[2; 4096]).await;
    });
    let Anatomy { geometry, checksums, pair, .. } = Anatomy::of(&ram);
    let segment = *pair.newest.segments.last().unwrap();
    let places = (0..geometry.ring_blocks)
        .map(|count| geometry.log_block(pair.newest.log_start, segment.start.plus(count)));
    let blocks: Vec<Pba> = places
        .take_while(|&at| {
            let block = ram.block(at);
            LogBlock::decode(&block, &checksums, at, segment.epoch, segment.nonce).is_ok()
        })
        .collect();
    let [.., flushed, vouching] = blocks[..] else { panic!("two writes of two records") };
    ram.rot(flushed);
    // Blocks that do not validate are read twice, together with what stands behind them.
    ram.garble_after(2, vouching);
    reopened(&ram, |_, store, report| async move {
        assert!(!report.alarms.is_empty(), "{report:?}");
        let create = store.create("web02", 4096).await;
        assert_eq!(create.unwrap_err().kind(), ErrorKind::ReadOnly);
    });
}

/// Each run of these tests begins at the same wall time, as a machine with a bad clock does.
#[test]
fn snapshots_are_in_order_of_time_although_the_clock_goes_back() {
    let (ram, first) = with_store(|runtime, store| async move {
        store.create("web01", 1 << 20).await.unwrap();
        runtime.sleep(Duration::from_secs(3600)).await;
        store.snapshot("web01", None).await.unwrap();
        store.snapshots("web01", SnapshotNumber::new(0), 1).await.unwrap().remove(0).created_ns
    });
    reopened(&ram, move |_, store, _| async move {
        store.snapshot("web01", None).await.unwrap();
        let second = store.snapshots("web01", SnapshotNumber::new(1), 1).await.unwrap().remove(0);
        assert_eq!(second.created_ns, first);
    });
}

/// Counts data blocks that were read and not written again yet.
struct Meter {
    inner: Rc<dyn Backend>,
    held: Cell<usize>,
    most: Rc<Cell<usize>>,
}

impl Backend for Meter {
    fn submit(&self, operation: Operation) {
        match &operation {
            Operation::Read { at, block_count, .. } if at.get() >= DATA_START => {
                self.held.set(self.held.get() + block_count);
            }
            Operation::Write { at, blocks, .. } if at.get() >= DATA_START => {
                let written: usize = blocks.iter().map(BlockSlice::block_count).sum();
                self.held.set(self.held.get().saturating_sub(written));
            }
            _ => {}
        }
        self.most.set(self.most.get().max(self.held.get()));
        self.inner.submit(operation);
    }

    fn block_count(&self) -> u64 {
        self.inner.block_count()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

/// All data above F was held in memory at once: gigabytes, with a large log.
#[test]
fn recovery_holds_a_bounded_part_of_what_it_writes_again() {
    const BLOCKS: u64 = (512 << 20) / 4096;
    let ram = Ram::default();
    let gate = Gate::new(ram.backend(BLOCKS));
    run(1, |runtime| async move {
        let device = gate.device();
        let format = FormatOptions { log_bytes: Some(1 << 20), ..format_options() };
        Store::format(&device, &runtime, &format).await.unwrap();
        let (store, _) =
            Store::open(device, runtime.clone(), &open_options(runtime.random())).await.unwrap();
        store.create("web01", 1 << 30).await.unwrap();
        let disk = disk(&store, "web01").await;
        gate.hold(|operation| matches!(operation, Operation::Flush { .. }));
        let done = start_writers(&runtime, &disk, 60, 1, 1 << 20);
        runtime.sleep(Duration::from_secs(1)).await;
        assert!(done.get() >= 40, "{} written", done.get());
    });
    let most = Rc::new(Cell::new(0));
    let meter = Meter { inner: ram.backend(BLOCKS), held: Cell::new(0), most: Rc::clone(&most) };
    run(2, |runtime| async move {
        let device = Device::new(Rc::new(meter));
        let (store, report) =
            Store::open(device, runtime.clone(), &open_options(runtime.random())).await.unwrap();
        assert!(report.records_replayed >= 40, "{report:?}");
        store.close().await.unwrap();
    });
    let window = 8192 + 256;
    assert!((1..=window).contains(&most.get()), "{} blocks in memory", most.get());
}

/// One bad transfer of the data while the log is read back.
#[test]
fn one_bad_transfer_in_recovery_loses_no_acknowledged_write() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[5; 4096]).await;
    });
    ram.garble(ram.filled_with(5).unwrap());
    reopened(&ram, |_, store, report| async move {
        let bytes = read(&disk(&store, "web01").await, 0, 4096).await;
        assert_eq!(bytes, [5; 4096], "{report:?}");
    });
}

/// One bad transfer of a block of the log.
#[test]
fn one_bad_transfer_of_the_log_loses_no_acknowledged_write() {
    let (ram, last) = with_gated_store(|_, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let last = Rc::new(Cell::new(base::Pba::new(0)));
        let seen = Rc::clone(&last);
        gate.hold(move |operation| {
            if let Operation::Write { at, .. } = operation
                && (4096..DATA_START).contains(&at.get())
            {
                seen.set(*at);
            }
            false
        });
        write(&disk(&store, "web01").await, 0, &[5; 4096]).await;
        last.get()
    });
    assert!(last.get() > 4095);
    ram.garble(last);
    reopened(&ram, |_, store, report| async move {
        let bytes = read(&disk(&store, "web01").await, 0, 4096).await;
        assert_eq!(bytes, [5; 4096], "{report:?}");
    });
}

/// A device that takes its time.
struct Slow {
    inner: Rc<dyn Backend>,
    runtime: Runtime,
}

impl Backend for Slow {
    fn submit(&self, operation: Operation) {
        let (inner, runtime) = (Rc::clone(&self.inner), self.runtime.clone());
        drop(self.runtime.spawn(async move {
            runtime.sleep(Duration::from_micros(100)).await;
            inner.submit(operation);
        }));
    }

    fn block_count(&self) -> u64 {
        self.inner.block_count()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

async fn open_device(device: Device, runtime: &Runtime) -> Result<Store, Error> {
    let opened = Store::open(device, runtime.clone(), &open_options(runtime.random())).await;
    opened.map(|(store, _)| store)
}

/// Each VDI that recovery loaded ended a block of the log, which had no room for so many.
#[test]
fn many_vdis_above_f_fit_into_the_log_again() {
    const COUNT: u64 = 40;
    let (ram, ()) = with_store(|_, store| async move {
        for vdi in 0..COUNT {
            let name = format!("web{vdi}");
            store.create(&name, 1 << 30).await.unwrap();
            store.snapshot(&name, Some("s")).await.unwrap();
        }
        store.close().await.unwrap();
    });
    let shared = ram.clone();
    let used = run(3, move |runtime| async move {
        let gate = Gate::new(shared.backend(STORE_BLOCKS));
        let store = open_device(gate.device(), &runtime).await.unwrap();
        let mut disks = Vec::new();
        for vdi in 0..COUNT {
            disks.push(disk(&store, &format!("web{vdi}")).await);
        }
        write(&disks[0], 1 << 20, &[1; 4096]).await;
        store.checkpoint().await.unwrap();
        gate.hold(writes_slot);
        // Up to here the log is filled below F.
        for round in 0.. {
            write(&disks[0], round % 100 * 4096, &[round as u8; 4096]).await;
            disks[0].submit(Request::Flush).await.unwrap();
            if store.stats().log_used_percent >= 54 {
                break;
            }
        }
        gate.hold(|operation| {
            writes_slot(operation) || matches!(operation, Operation::Flush { .. })
        });
        for round in 0..300u64 {
            for disk in &disks {
                let data = Buffer::from_bytes(&[3; 4096]);
                let offset = (200 + round) * 4096;
                let request = Request::Write { offset, length: 4096, data, fua: false };
                drop(runtime.spawn(disk.submit(request)));
            }
            runtime.sleep(Duration::from_millis(10)).await;
        }
        store.stats().log_used_percent
    });
    let opened = run(4, move |runtime| async move {
        let inner = ram.backend(STORE_BLOCKS);
        let slow = Device::new(Rc::new(Slow { inner, runtime: runtime.clone() }));
        open_device(slow, &runtime).await.map(|_| ())
    });
    assert!(opened.is_ok(), "log {used}% full: {opened:?}");
}

/// A full file system below refuses new blocks. Recovery gave up, although what it wanted to write
/// again stood where it was verified.
#[test]
fn a_store_opens_although_there_is_no_space_below() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let disk = disk(&store, "web01").await;
        write(&disk, 0, &[4; 1 << 20]).await;
        disk.submit(Request::Flush).await.unwrap();
        write(&disk, 0, &[5; 4096]).await;
    });
    ram.limit_space(Some(0));
    reopened(&ram, |_, store, _| async move {
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [5; 4096]);
    });
}

/// A bad block where recovery writes data again: each attempt to open met the same one.
#[test]
fn a_store_opens_although_a_block_cannot_be_written() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[5; 4096]).await;
    });
    let old = ram.filled_with(5).unwrap();
    let trial = ram.copy();
    reopened(&trial, |_, _, _| async {});
    trial.set_block(old, &base::Block([0; 4096]));
    ram.spoil(trial.filled_with(5).unwrap());
    reopened(&ram, |_, store, _| async move {
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [5; 4096]);
    });
}
