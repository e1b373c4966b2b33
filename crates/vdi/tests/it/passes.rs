//! A store that is collected in several passes.

use std::time::Duration;

use base::SnapshotNumber;
use disk::Request;
use parallax_vdi::{OpenOptions, Retention, Store};

use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, disk, format_options, open_options, write};

/// A history that has filled the store gives up no more of it for lack of memory. Who needed space had a collection end
/// where it had freed something, and the next one began at the beginning: what was given up behind that was not
/// collected, so all of the history went, and then a write was refused.
#[test]
fn a_full_store_is_collected_to_its_end() {
    let left: Vec<usize> = [256 << 20, 0].map(moments_of_a_full_store).to_vec();
    let [in_one, in_many] = left[..] else { unreachable!("two were asked for") };
    assert!(in_one > 100 && in_many > in_one / 2, "{left:?} moments are left");
}

/// How many moments are left when a disk of 16 MiB with a history has filled its store twice over.
fn moments_of_a_full_store(gc_memory_bytes: u64) -> usize {
    const BLOCKS: u64 = 4096;
    let ram = Ram::default();
    run(1, |runtime| async move {
        Store::format(&ram.device(STORE_BLOCKS), &runtime, &format_options()).await.unwrap();
        let options = OpenOptions { gc_memory_bytes, ..open_options(1) };
        let device = ram.device(STORE_BLOCKS);
        let (store, _) = Store::open(device, runtime.clone(), &options).await.unwrap();
        store.create("web01", BLOCKS << 12).await.unwrap();
        store.retain("web01", Retention::parse("1h").unwrap()).await.unwrap();
        let head = disk(&store, "web01").await;
        for mebibyte in 0..BLOCKS / 256 {
            write(&head, mebibyte << 20, &[1; 1 << 20]).await;
        }
        for _second in 0..20 * 60 {
            for byte in 0..16 {
                write(&head, (runtime.random() % BLOCKS) << 12, &[byte; 4096]).await;
            }
            head.submit(Request::Flush).await.unwrap();
            runtime.sleep(Duration::from_secs(1)).await;
        }
        let all = store.snapshots("web01", SnapshotNumber::new(0), usize::MAX).await.unwrap();
        all.len()
    })
}
