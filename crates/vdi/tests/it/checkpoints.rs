//! Checkpoints that fail.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use base::{Buffer, ErrorKind};
use disk::Request;

use crate::disk;
use crate::gate::with_gated_store;

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
