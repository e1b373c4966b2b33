//! Checkpoints that fail, or do not keep up.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use base::{Buffer, ErrorKind};
use device::Operation;
use disk::{Disk, Request};
use parallax_vdi::{FormatOptions, Store};
use runtime::Runtime;

use crate::gate::{Gate, with_gated_store};
use crate::ram::{Ram, run};
use crate::{disk, format_options, open_options};

/// First block of the first extent of data or metadata.
const EXTENTS: u64 = (32 << 20) / 4096;

const DATA: u8 = 0x5a;

/// Guests waited for room in the log for ever, and `close` waited for them.
#[test]
fn a_store_whose_checkpoints_keep_failing_stops_with_an_error() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let disk = disk(&store, "web01").await;
        refuse_nodes(&gate);
        let failure = go_on(&runtime, &disk, write_of);
        runtime.sleep(Duration::from_secs(30)).await;
        assert_eq!(failure.get(), None, "it may still heal");
        runtime.sleep(Duration::from_secs(60)).await;
        assert_eq!(failure.get(), Some(ErrorKind::NoSpace), "the guest is told");
        store.failed().await;
        assert!(store.close().await.is_err());
    });
}

/// Finds no space for nodes from now on.
fn refuse_nodes(gate: &Gate) {
    gate.refuse(|at, block| at.get() >= EXTENTS && block.0 != [DATA; 4096]);
}

fn write_of(block: u64) -> Request {
    let data = Buffer::from_bytes(&[DATA; 4096]);
    Request::Write { offset: block * 4096, length: 4096, data, fua: false }
}

/// Submits one request after the other until one fails; with what.
fn go_on(
    runtime: &Runtime,
    disk: &Rc<dyn Disk>,
    request: fn(u64) -> Request,
) -> Rc<Cell<Option<ErrorKind>>> {
    let failure = Rc::new(Cell::new(None));
    let (failed, disk) = (Rc::clone(&failure), Rc::clone(disk));
    drop(runtime.spawn(async move {
        for count in 0..100_000 {
            if let Err(error) = disk.submit(request(count % 1000)).await {
                failed.set(Some(error.kind));
                return;
            }
        }
    }));
    failure
}

/// The minute began with the first failure, though nobody waited for a checkpoint: the first guest
/// that did found that it was over.
#[test]
fn a_store_stops_after_a_minute_of_waiting_guests() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        refuse_nodes(&gate);
        runtime.sleep(Duration::from_secs(120)).await;
        // Attempts take all space for nodes, so guests that need some are refused at once.
        let discard = |block| Request::Discard { offset: block * 4096, length: 4096, fua: false };
        let failure = go_on(&runtime, &disk(&store, "web01").await, discard);
        runtime.sleep(Duration::from_secs(50)).await;
        assert_eq!(failure.get(), None, "nobody has waited for a minute");
        runtime.sleep(Duration::from_secs(30)).await;
        assert_eq!(failure.get(), Some(ErrorKind::NoSpace), "the guest is told");
    });
}

/// Nor did a checkpoint that somebody forced end the minute.
#[test]
fn the_minute_of_failing_checkpoints_ends_with_one_that_succeeds() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        refuse_nodes(&gate);
        let failure = go_on(&runtime, &disk(&store, "web01").await, write_of);
        // Between two attempts, which come each tenth of a second.
        runtime.sleep(Duration::from_millis(40_050)).await;
        gate.refuse(|_, _| false);
        store.checkpoint().await.unwrap();
        refuse_nodes(&gate);
        runtime.sleep(Duration::from_secs(50)).await;
        assert_eq!(failure.get(), None, "one succeeded meanwhile");
        runtime.sleep(Duration::from_secs(30)).await;
        assert_eq!(failure.get(), Some(ErrorKind::NoSpace), "the guest is told");
    });
}

/// A burst of small writes made more changes than checkpoints merged meanwhile, without bound.
#[test]
fn changes_wait_for_a_checkpoint_that_does_not_keep_up() {
    const BLOCKS: u64 = (4 << 30) / 4096;
    const LEAVES: u64 = 70_000;
    let ram = Ram::default();
    run(1, |runtime| async move {
        let gate = Gate::new(ram.backend(BLOCKS));
        let options = FormatOptions {
            extent_bytes: Some(64 << 20),
            log_bytes: Some(16 << 20),
            ..format_options()
        };
        Store::format(&gate.device(), &runtime, &options).await.unwrap();
        let options = open_options(runtime.random());
        let (store, _) =
            Store::open(gate.device(), runtime.clone(), &options).await.expect("opens");
        store.create("web01", 1 << 40).await.unwrap();
        let disk = disk(&store, "web01").await;
        // No node is ever written.
        let first = (128 << 20) / 4096;
        gate.hold(
            move |operation| matches!(operation, Operation::Write { at, .. } if at.get() >= first),
        );
        let done = Rc::new(Cell::new(0));
        for task in 0..70 {
            let (disk, done) = (Rc::clone(&disk), Rc::clone(&done));
            drop(runtime.spawn(async move {
                for leaf in (task..LEAVES).step_by(70) {
                    let (offset, length) = (leaf << 20, 4096);
                    disk.submit(Request::Discard { offset, length, fua: false }).await.unwrap();
                    done.set(done.get() + 1);
                }
            }));
        }
        runtime.sleep(Duration::from_secs(20)).await;
        let stuck = done.get();
        assert!((32 << 10..LEAVES - 100).contains(&stuck), "{stuck} leaves changed");
        gate.release();
        runtime.sleep(Duration::from_secs(20)).await;
        assert_eq!(done.get(), LEAVES);
    });
}
