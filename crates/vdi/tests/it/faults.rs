//! A device that fails in one operation (G10).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use base::{Buffer, ErrorKind, Pba};
use disk::{Disk, Request, Response, copy_segments};
use parallax_vdi::{Store, Target};

use crate::check::{Anatomy, assert_sound};
use crate::ram::{Ram, run};
use crate::{
    STORE_BLOCKS, disk, format_options, open, open_options, read, reopened, with_store, write,
};

const EIO: i32 = 5;
const ENOLINK: i32 = 67;

/// Every operation in turn takes minutes where nothing is optimised: then one of so many fails.
const STRIDE: usize = if cfg!(debug_assertions) { 61 } else { 1 };

/// What each block of two VDIs may hold: what was acknowledged last, and whatever failed since.
type Contents = Rc<RefCell<BTreeMap<(usize, u64), Vec<u8>>>>;

const NAMES: [&str; 2] = ["web01", "web02"];

/// Some two thousand operations, one request after the other, until the store stops.
async fn work(store: &Store, contents: &Contents) -> Result<(), ErrorKind> {
    let mut disks: Vec<Rc<dyn Disk>> = Vec::new();
    for name in NAMES {
        store.create(name, 64 << 20).await.map_err(|error| error.kind())?;
        disks.push(disk(store, name).await);
    }
    for round in 1..=750u64 {
        let vdi = (round % 2) as usize;
        let (first, count) = (round * 911 % 16_000, 1 + round % 3);
        let byte = round as u8;
        let data = Buffer::from_bytes(&vec![byte; (count * 4096) as usize]);
        let length = data.bytes().len();
        let request = Request::Write { offset: first * 4096, length, data, fua: false };
        let outcome = disks[vdi].submit(request).await;
        for block in first..first + count {
            let mut contents = contents.borrow_mut();
            let legal = contents.entry((vdi, block)).or_insert_with(|| vec![0]);
            if outcome.is_ok() {
                legal.clear();
            }
            legal.push(byte);
        }
        let mut failures = vec![outcome.err().map(|error| error.kind)];
        if round % 3 == 0 {
            failures.push(disks[vdi].submit(Request::Flush).await.err().map(|error| error.kind));
        }
        if round % 7 == 0 {
            failures.push(look(&disks[vdi], vdi, contents, first).await.err());
        }
        if round % 50 == 0 {
            failures.push(store.snapshot(NAMES[vdi], None).await.err().map(|error| error.kind()));
            failures.push(store.checkpoint().await.err().map(|error| error.kind()));
        }
        if let Some(kind) = failures.into_iter().flatten().next() {
            // Whatever failed was said to have failed, and nothing goes on that must not.
            assert!([ErrorKind::Io, ErrorKind::Fenced, ErrorKind::Corrupt].contains(&kind));
            if disks[vdi].severed() {
                return Err(kind);
            }
        }
    }
    Ok(())
}

/// Reads a block and compares it with what it may hold.
async fn look(
    disk: &Rc<dyn Disk>,
    vdi: usize,
    contents: &Contents,
    block: u64,
) -> Result<(), ErrorKind> {
    let request = Request::Read { offset: block * 4096, length: 4096 };
    let answer = disk.submit(request).await.map_err(|error| error.kind)?;
    let Response::Data(segments) = answer else { panic!("a read answers with data") };
    let mut bytes = vec![0xee; 4096];
    copy_segments(&segments, &mut bytes);
    let contents = contents.borrow();
    let legal = &contents[&(vdi, block)];
    assert!(legal.iter().any(|&byte| bytes == [byte; 4096]), "VDI {vdi} block {block}: {legal:?}");
    Ok(())
}

/// A new store and its device; the operations that making it took do not count.
fn made() -> Ram {
    let (ram, ()) = with_store(|_, store| async move { store.close().await.unwrap() });
    ram.copy()
}

#[test]
fn an_operation_that_fails_is_reported_or_repeated_and_nothing_is_lost() {
    let ram = made();
    let whole = |ram: &Ram| {
        let (ram, contents) = (ram.clone(), Contents::default());
        run(2, move |runtime| async move {
            let (store, _) = open(&ram, &runtime).await;
            let at_open = ram.operations();
            work(&store, &contents).await.unwrap();
            at_open
        })
    };
    let first = whole(&ram) + 1;
    let last = ram.operations();
    assert!(last >= 2000, "{last} operations");
    for number in (first..=last).step_by(STRIDE) {
        let ram = made();
        let contents = Contents::default();
        ram.fail(number, EIO);
        let (device, written) = (ram.clone(), Rc::clone(&contents));
        run(2, move |runtime| async move {
            let (store, _) = open(&device, &runtime).await;
            let _ = work(&store, &written).await;
        });
        // The daemon dies, and what was acknowledged is there.
        reopened(&ram, move |_, store, _| async move {
            for (vdi, name) in NAMES.into_iter().enumerate() {
                let Ok(disk) = store.open_disk(&Target::parse(name)).await else {
                    assert!(contents.borrow().keys().all(|(of, _)| *of != vdi));
                    continue;
                };
                let blocks: Vec<u64> =
                    contents.borrow().keys().filter(|key| key.0 == vdi).map(|key| key.1).collect();
                for block in blocks {
                    look(&disk, vdi, &contents, block).await.unwrap();
                }
            }
            store.close().await.unwrap();
        });
        assert_sound(&ram, number);
    }
}

/// A read failed while the device was away; it came back without what it had not written yet, and
/// the next flush succeeded (design rule 57).
#[test]
fn a_device_that_was_away_is_read_back_before_a_flush_is_answered() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 20).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[1; 4096]).await;
        store.close().await.unwrap();
    });
    let device = ram.clone();
    run(2, move |runtime| async move {
        let (store, _) = open(&device, &runtime).await;
        let disk = disk(&store, "web01").await;
        let before = device.copy();
        write(&disk, 0, &[2; 4096]).await;
        device.fail(device.operations() + 1, ENOLINK);
        let away = Request::Read { offset: 0, length: 4096 };
        assert!(disk.submit(away).await.is_err());
        for block in 0..STORE_BLOCKS {
            let at = Pba::new(block);
            // All but the log, which had come through.
            if Anatomy::of(&before).geometry.extent_of(at).get() != 1 {
                device.set_block(at, &before.block(at));
            }
        }
        assert!(disk.submit(Request::Flush).await.is_err(), "what it covers is gone");
        store.failed().await;
    });
    reopened(&ram, |_, store, report| async move {
        assert_eq!(report.records_dropped, 1, "{report:?}");
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [1; 4096]);
    });
}

/// A block in the middle of the log rotted, and the store could not be opened: nobody could read
/// what was written before (design rule 9).
#[test]
fn a_damaged_log_makes_every_vdi_read_only() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 20).await.unwrap();
        let head = disk(&store, "web01").await;
        write(&head, 0, &[1; 4096]).await;
        store.checkpoint().await.unwrap();
        for index in 0..10 {
            write(&head, index * 4096, &[2; 4096]).await;
            head.submit(Request::Flush).await.unwrap();
        }
    });
    let anatomy = Anatomy::of(&ram);
    let segment = anatomy.slot().segments.last().unwrap();
    ram.rot(anatomy.geometry.log_block(anatomy.slot().log_start, segment.start.plus(4)));
    let before = ram.copy();
    reopened(&ram, |_, store, report| async move {
        assert!(report.alarms[0].contains("read-only"), "{report:?}");
        let head = disk(&store, "web01").await;
        assert!(head.read_only());
        assert_eq!(read(&head, 0, 4096).await, [2; 4096]);
        assert_eq!(read(&head, 9 << 12, 4096).await, [0; 4096]);
        let data = Buffer::from_bytes(&[3; 4096]);
        let request = Request::Write { offset: 0, length: 4096, data, fua: false };
        assert_eq!(head.submit(request).await.unwrap_err().kind, ErrorKind::ReadOnly);
        let error = store.create("new", 1 << 20).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        assert_eq!(store.checkpoint().await.unwrap_err().kind(), ErrorKind::ReadOnly);
        store.close().await.unwrap();
    });
    // But for the claim to the store.
    let heartbeat = anatomy.geometry.heartbeat(anatomy.slot().host);
    for at in (0..STORE_BLOCKS).map(Pba::new).filter(|&at| at != heartbeat) {
        assert!(ram.block(at).0 == before.block(at).0, "block {at} was written");
    }
}

#[test]
fn filling_and_deleting_again_and_again_loses_no_space() {
    let cycles: u8 = if cfg!(debug_assertions) { 10 } else { 100 };
    let ram = Ram::default();
    let device = ram.clone();
    run(1, move |runtime| async move {
        // As small as stores are.
        let blocks = 6 * 4096;
        let options = format_options();
        Store::format(&device.device(blocks), &runtime, &options).await.unwrap();
        let options = open_options(3);
        let (store, _) =
            Store::open(device.device(blocks), runtime.clone(), &options).await.unwrap();
        let mut filled_first = 0;
        for cycle in 0..cycles {
            store.create("big", 1 << 30).await.unwrap();
            let head = disk(&store, "big").await;
            let mut filled = 0u64;
            loop {
                let data = Buffer::from_bytes(&vec![cycle; 256 << 10]);
                let length = data.bytes().len();
                let request = Request::Write { offset: filled, length, data, fua: false };
                match head.submit(request).await {
                    Ok(_) => filled += 256 << 10,
                    Err(error) => {
                        assert_eq!(error.kind, ErrorKind::NoSpace);
                        break;
                    }
                }
                if filled == 8 << 20 {
                    store.snapshot("big", None).await.unwrap();
                }
            }
            if cycle == 0 {
                filled_first = filled;
            }
            assert!(filled + (1 << 20) >= filled_first, "{cycle}: {filled} of {filled_first}");
            // What was accepted can be flushed and read, full or not.
            head.submit(Request::Flush).await.unwrap();
            assert_eq!(read(&head, filled - 4096, 4096).await, [cycle; 4096]);
            store.remove(&Target::parse("big")).await.unwrap();
        }
        assert!(filled_first > 30 << 20, "{filled_first}");
        store.close().await.unwrap();
    });
}
