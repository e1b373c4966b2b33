//! Checkpoints that fail, or do not keep up.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use base::{Buffer, ErrorKind};
use device::Operation;
use disk::Request;
use parallax_vdi::{FormatOptions, Store};

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
        gate.refuse(|at, block| at.get() >= EXTENTS && block.0 != [DATA; 4096]);
        let failure = Rc::new(Cell::new(None));
        let (failed, writer) = (Rc::clone(&failure), Rc::clone(&disk));
        drop(runtime.spawn(async move {
            for block in 0..100_000 {
                let data = Buffer::from_bytes(&[DATA; 4096]);
                let offset = block % 1000 * 4096;
                let request = Request::Write { offset, length: 4096, data, fua: false };
                if let Err(error) = writer.submit(request).await {
                    failed.set(Some(error.kind));
                    return;
                }
            }
        }));
        runtime.sleep(Duration::from_secs(30)).await;
        assert_eq!(failure.get(), None, "it may still heal");
        runtime.sleep(Duration::from_secs(60)).await;
        assert_eq!(failure.get(), Some(ErrorKind::NoSpace), "the guest is told");
        store.failed().await;
        assert!(store.close().await.is_err());
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
