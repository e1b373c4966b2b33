//! Guarantees that hold in a run without faults, where the simulator looks for others:
//! docs/guarantees.md names these tests.

use base::ErrorKind;
use parallax_vdi::{OpenOptions, Store, Target};

use crate::ram::{Ram, run};
use crate::{
    STORE_BLOCKS, disk, format_options, open, open_options, open_with_cache, read, with_store,
    write,
};

/// G6: a file lock shows nothing of another machine, so its heartbeat is watched.
#[test]
fn a_daemon_on_another_machine_is_noticed() {
    let ram = Ram::default();
    let shared = ram.clone();
    let elsewhere = || OpenOptions { boot_id: [2; 16], ..open_options(3) };
    run(1, |runtime| async move {
        let device = || shared.device(STORE_BLOCKS);
        Store::format(&device(), &runtime, &format_options()).await.unwrap();
        let (store, _) = open(&shared, &runtime).await;
        store.create("a", 4096).await.unwrap();
        let refused = Store::open(device(), runtime.clone(), &elsewhere()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Busy, "{refused}");
        store.snapshot("a", None).await.unwrap();
    });
    run(2, |runtime| async move {
        let device = ram.device(STORE_BLOCKS);
        let opened = Store::open(device, runtime.clone(), &elsewhere()).await;
        let (store, _) = opened.expect("a daemon that died does not keep others out");
        assert_eq!(store.info("a").await.unwrap().snapshot_count, 1);
    });
}

/// G8: how much is read to open a store after a crash does not depend on how much is in it.
#[test]
fn opening_reads_the_log_and_no_tree() {
    let read_to_open = |leaves: u64| {
        let ram = Ram::default();
        let device = ram.clone();
        let nodes = run(1, |runtime| async move {
            let medium = device.device(STORE_BLOCKS);
            Store::format(&medium, &runtime, &format_options()).await.unwrap();
            let (store, _) = open(&device, &runtime).await;
            store.create("a", 4 << 30).await.unwrap();
            let head = disk(&store, "a").await;
            for leaf in 0..leaves {
                write(&head, leaf << 20, &[1; 4096]).await;
            }
            store.checkpoint().await.unwrap();
            write(&head, 0, &[2; 4096]).await;
            store.stats().nodes_written
        });
        let before = ram.blocks_read();
        run(2, |runtime| async move {
            let (store, report) = open(&ram, &runtime).await;
            assert!(!report.clean && report.records_replayed > 0, "{report:?}");
            let read_blocks = ram.blocks_read() - before;
            assert_eq!(read(&disk(&store, "a").await, 0, 4096).await, [2; 4096]);
            (read_blocks, nodes)
        })
    };
    let (small, _) = read_to_open(1);
    let (large, nodes) = read_to_open(2000);
    assert!(nodes > 2000, "each write made a leaf: {nodes}");
    assert!(large < small + 200, "{small} and {large} blocks were read");
}

/// G9: a read reads the same nodes, however many snapshots and clones its VDI descends from.
#[test]
fn a_read_costs_the_same_at_any_depth() {
    let ram = Ram::default();
    let device = ram.clone();
    run(1, |runtime| async move {
        let medium = device.device(STORE_BLOCKS);
        Store::format(&medium, &runtime, &format_options()).await.unwrap();
        let (store, _) = open(&device, &runtime).await;
        store.create("d0", 1 << 30).await.unwrap();
        write(&disk(&store, "d0").await, 0, &[7; 4096]).await;
        for depth in 0..200 {
            let (old, new) = (format!("d{depth}"), format!("d{}", depth + 1));
            write(&disk(&store, &old).await, 1 << 20, &[1; 4096]).await;
            store.snapshot(&old, None).await.unwrap();
            store.clone_vdi(&Target::parse(&format!("{old}@1")), &new).await.unwrap();
            if depth % 7 == 0 {
                store.checkpoint().await.unwrap();
            }
        }
        store.close().await.unwrap();
    });
    let read_cold = |name: &'static str| {
        let ram = ram.clone();
        run(2, |runtime| async move {
            let (store, _) = open(&ram, &runtime).await;
            let head = disk(&store, name).await;
            let before = ram.blocks_read();
            assert_eq!(read(&head, 0, 4096).await, [7; 4096]);
            let blocks = ram.blocks_read() - before;
            store.close().await.unwrap();
            blocks
        })
    };
    let (shallow, deep) = (read_cold("d0"), read_cold("d200"));
    assert!(shallow > 0 && deep <= shallow, "{shallow} blocks at depth 0, {deep} at 200");
}

/// G9: what a read and the deletion of a snapshot ask of the device and of the cache is the same,
/// however many snapshots a VDI has: one block is read, one is written and flushed.
#[test]
fn a_read_and_a_deletion_cost_the_same_beside_any_number_of_snapshots() {
    const BLOCKS: u64 = 600;
    let cost = |snapshots: u64| {
        let (ram, ()) = with_store(move |_, store| async move {
            store.create("a", BLOCKS << 12).await.unwrap();
            let head = disk(&store, "a").await;
            for block in 0..BLOCKS {
                write(&head, block << 12, &[1; 4096]).await;
            }
            for number in 1..=snapshots {
                write(&head, (number % BLOCKS) << 12, &[2; 4096]).await;
                store.snapshot("a", None).await.unwrap();
                if number % 100 == 0 {
                    store.checkpoint().await.unwrap();
                }
            }
            store.close().await.unwrap();
        });
        run(2, move |runtime| async move {
            let (store, _) = open_with_cache(&ram, &runtime, 8 << 20).await;
            let head = disk(&store, "a").await;
            let read_all = async || {
                for block in 0..BLOCKS {
                    read(&head, block << 12, 4096).await;
                }
            };
            read_all().await;
            let (hits, read) = (store.stats().cache_hits, ram.blocks_read());
            read_all().await;
            let read = ram.blocks_read() - read;
            let hits = store.stats().cache_hits - hits;
            let operations = ram.operations();
            store.remove(&Target::parse(&format!("a@{}", snapshots / 2))).await.unwrap();
            (read, hits, ram.operations() - operations)
        })
    };
    let (few, many) = (cost(2), cost(1000));
    assert_eq!(few, many, "blocks read, nodes asked for, and operations of a deletion");
    assert_eq!((few.0, few.1, few.2), (BLOCKS, 2 * BLOCKS, 2));
}
