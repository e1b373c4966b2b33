//! A store on a sparse file whose file system is full (G10, design rule 26).

use std::time::Duration;

use base::ErrorKind;
use disk::Request;
use ondisk::ExtentKind;
use runtime::Runtime;

use crate::check::{Anatomy, assert_sound};
use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, disk, format_options, open, read, reopened, write};
use parallax_vdi::{FormatOptions, GcPhase, GcReport, Store, Target};

/// A new store, open.
async fn new_store(ram: &Ram, runtime: &Runtime, options: &FormatOptions) -> Store {
    Store::format(&ram.device(STORE_BLOCKS), runtime, options).await.unwrap();
    open(ram, runtime).await.0
}

/// A checkpoint found no space for a node, so that no space was made, and the log filled up.
#[test]
fn no_space_below_fails_writes_of_guests_and_nothing_else() {
    for space in [2000, 4200, 6000, 8300] {
        let ram = Ram::default();
        let device = ram.clone();
        run(1, move |runtime| async move {
            let store = new_store(&device, &runtime, &format_options()).await;
            device.limit_space(Some(space));
            if store.create("web01", 64 << 20).await.is_err() {
                return;
            }
            let head = disk(&store, "web01").await;
            let mut written: Vec<u64> = Vec::new();
            let mut refused = 0;
            for block in 0..14_000u64 {
                // Far apart, so that many nodes change.
                let block = block * 37 % 16_384;
                let data = base::Buffer::from_bytes(&[block as u8 | 1; 4096]);
                let request =
                    Request::Write { offset: block * 4096, length: 4096, data, fua: false };
                match head.submit(request).await {
                    Ok(_) => written.push(block),
                    Err(error) => {
                        assert_eq!(error.kind, ErrorKind::NoSpace, "{error}");
                        refused += 1;
                    }
                }
                if refused > 20 {
                    break;
                }
            }
            assert!(refused > 0, "{space}: there was space for all");
            // Everything else goes on.
            head.submit(Request::Flush).await.unwrap();
            store.checkpoint().await.unwrap();
            store.collect_garbage().await.unwrap();
            for &block in &written {
                let bytes = read(&head, block * 4096, 4096).await;
                assert_eq!(bytes, [block as u8 | 1; 4096], "{space}: block {block}");
            }
            // Space below heals it.
            device.limit_space(None);
            write(&head, 0, &[0xaa; 4096]).await;
            write(&head, 63 << 20, &[0xaa; 4096]).await;
            store.close().await.unwrap();
        });
        if ram.refused().is_empty() {
            continue;
        }
        let anatomy = Anatomy::of(&ram);
        for at in ram.refused() {
            let extent = anatomy.geometry.extent_of(at);
            let kinds = anatomy.extents();
            let kind = kinds.get(&u64::from(extent.get()));
            assert!(kind.is_none_or(|kind| *kind == ExtentKind::Data), "{space}: {at} {kind:?}");
        }
        assert_sound(&ram, 0);
        reopened(&ram, |_, store, _| async move {
            let head = disk(&store, "web01").await;
            assert_eq!(read(&head, 0, 4096).await, [0xaa; 4096]);
            store.remove(&Target::parse("web01")).await.unwrap();
        });
    }
}

/// A file system that finds space for each write does one after the other (and a guest that goes on
/// where it wrote is not refused in the middle).
#[test]
fn data_has_its_space_below_before_it_comes() {
    let ram = Ram::default();
    run(1, move |runtime| async move {
        let store = new_store(&ram, &runtime, &format_options()).await;
        store.create("web01", 64 << 20).await.unwrap();
        let head = disk(&store, "web01").await;
        write(&head, 0, &[1; 4096]).await;
        ram.limit_space(Some(0));
        for block in 1..4096 {
            write(&head, block * 4096, &[2; 4096]).await;
        }
        assert!(ram.refused().is_empty());
        store.close().await.unwrap();
    });
}

/// A store that was nearly emptied takes hardly more space below than a new one: neither nodes nor gaps
/// keep theirs. And what it needs next is there again.
#[test]
fn an_emptied_store_takes_no_space_below() {
    let ram = Ram::default();
    let device = ram.clone();
    run(1, move |runtime| async move {
        let store = new_store(&device, &runtime, &format_options()).await;
        let empty = device.space_taken();
        store.create("fragmented", 1 << 30).await.unwrap();
        store.create("kept", 1 << 30).await.unwrap();
        let head = disk(&store, "fragmented").await;
        let kept = disk(&store, "kept").await;
        // Each in a leaf of its own, so that there are many nodes.
        for round in 0..12u8 {
            for index in 0..900u64 {
                write(&head, index << 20, &[round; 4096]).await;
                // Its nodes lie among the others: no extent becomes empty.
                if index.is_multiple_of(90) {
                    write(&kept, index << 20, &[round; 4096]).await;
                }
            }
            store.snapshot("fragmented", None).await.unwrap();
            store.checkpoint().await.unwrap();
        }
        drop(head);
        let taken = device.space_taken();
        assert!(taken > empty + 12 * 1500, "{taken} blocks");
        store.remove(&Target::parse("fragmented")).await.unwrap();
        store.collect_garbage().await.unwrap();
        store.trim().await.unwrap();
        let left = device.space_taken();
        assert!(left < empty + 300, "{left} blocks of {taken}, {empty} when it was new");
        // Nodes find space that is really there, and data what is left.
        device.limit_space(Some(40 << 8));
        store.create("next", 64 << 20).await.unwrap();
        let head = disk(&store, "next").await;
        for index in 0..10 {
            write(&head, index << 20, &[9; 4096]).await;
        }
        store.checkpoint().await.unwrap();
        assert_eq!(read(&head, 9 << 20, 4096).await, [9; 4096]);
    });
}

/// What is deleted takes no space below any more; not so in a store that is to keep it.
#[test]
fn freed_space_goes_back_to_what_lies_below() {
    for keep_space in [false, true] {
        let ram = Ram::default();
        let device = ram.clone();
        run(1, move |runtime| async move {
            let options = FormatOptions { keep_space, ..format_options() };
            let store = new_store(&device, &runtime, &options).await;
            for name in ["kept", "deleted"] {
                store.create(name, 64 << 20).await.unwrap();
                let head = disk(&store, name).await;
                for index in 0..40 {
                    write(&head, index << 20, &vec![7; 1 << 20]).await;
                }
            }
            store.snapshot("deleted", None).await.unwrap();
            store.checkpoint().await.unwrap();
            let before = device.space_taken();
            store.remove(&Target::parse("deleted")).await.unwrap();
            let report = store.collect_garbage().await.unwrap();
            let trimmed_blocks = report.trimmed_blocks + store.trim().await.unwrap();
            let report = GcReport { trimmed_blocks, ..report };
            let given_back = before - device.space_taken();
            assert_eq!(given_back > 39 * 256, !keep_space, "{given_back} blocks, {report:?}");
            assert_eq!(report.trimmed_blocks > 39 * 256, !keep_space, "{report:?}");
            let head = disk(&store, "kept").await;
            for index in 0..40 {
                assert_eq!(read(&head, index << 20, 1 << 20).await, vec![7; 1 << 20]);
            }
            // What was given back is taken again, and nodes find space that is really there.
            device.limit_space(Some(60 << 8));
            store.create("next", 64 << 20).await.unwrap();
            let head = disk(&store, "next").await;
            for index in 0..40 {
                write(&head, index << 20, &vec![8; 1 << 20]).await;
            }
            store.checkpoint().await.unwrap();
            assert_eq!(read(&head, 39 << 20, 1 << 20).await, vec![8; 1 << 20]);
            store.close().await.unwrap();
        });
        assert_sound(&ram, 1);
    }
}

/// A minute after something was deleted its space is given back, however much is free.
#[test]
fn what_is_deleted_is_collected_by_itself() {
    let ram = Ram::default();
    let device = ram.clone();
    run(1, move |runtime| async move {
        let store = new_store(&device, &runtime, &format_options()).await;
        store.create("web01", 64 << 20).await.unwrap();
        let head = disk(&store, "web01").await;
        for index in 0..4 {
            write(&head, index << 20, &vec![7; 1 << 20]).await;
        }
        runtime.sleep(Duration::from_secs(120)).await;
        assert_eq!(store.stats().collections, 0, "nothing was deleted");
        let before = device.space_taken();
        store.remove(&Target::parse("web01")).await.unwrap();
        runtime.sleep(Duration::from_secs(90)).await;
        assert_eq!(store.stats().collections, 1);
        assert_eq!(store.gc_status().phase, GcPhase::Idle);
        assert!(device.space_taken() + 1000 < before, "{before}: {}", device.space_taken());
        store.close().await.unwrap();
    });
    assert_sound(&ram, 1);
}
