//! Garbage collection, and what a full store does.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use base::{Buffer, ErrorKind};
use disk::Request;
use runtime::Runtime;

use crate::{disk, read, with_store, write};

/// Fails instead of hanging if `work` takes longer than a minute of the runtime's time.
async fn in_time<T: 'static>(runtime: &Runtime, work: impl Future<Output = T> + 'static) -> T {
    let ended = Rc::new(Cell::new(false));
    let watched = Rc::clone(&ended);
    let sleep = runtime.sleep(Duration::from_secs(60));
    drop(runtime.spawn(async move {
        sleep.await;
        assert!(watched.get(), "still waiting after a minute");
    }));
    let outcome = work.await;
    ended.set(true);
    outcome
}

/// A write of several runs that met a full store in its middle waited for a checkpoint, which
/// waited for the write's own first record.
#[test]
fn a_write_that_fills_the_store_ends() {
    with_store(|runtime, store| async move {
        store.create("big", 1 << 30).await.unwrap();
        let disk = disk(&store, "big").await;
        in_time(&runtime, async move {
            write(&disk, 0, &[1; 4096]).await;
            for index in 1.. {
                let data = Buffer::from_bytes(&vec![7; 1 << 20]);
                let offset = index << 20;
                let request = Request::Write { offset, length: 1 << 20, data, fua: false };
                if let Err(error) = disk.submit(request).await {
                    assert_eq!(error.kind, ErrorKind::NoSpace);
                    break;
                }
            }
            assert_eq!(read(&disk, 2 << 20, 4096).await, [7; 4096]);
        })
        .await;
    });
}
