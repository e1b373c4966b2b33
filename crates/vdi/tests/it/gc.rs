//! Garbage collection, and what a full store does.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use base::{Buffer, ErrorKind};
use disk::{Disk, Request};
use parallax_vdi::check::{CheckOptions, check};
use parallax_vdi::{OpenOptions, Store, Target};
use runtime::Runtime;

use crate::check::{Anatomy, assert_sound, checked};
use crate::gate::with_gated_store;
use crate::ram::{Ram, run};
use crate::walks::{LEAVES, read_slowly, wide_disk};
use crate::{
    STORE_BLOCKS, disk, format_options, open, open_options, open_with_cache, read, with_store,
    write,
};

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

const OPTIONS: CheckOptions =
    CheckOptions { repair: false, read_data: true, boot_id: [1; 16], nonce: 5 };

/// Blocks that are in use beyond the data of VDIs.
fn used(store: &Store) -> u64 {
    let stats = store.stats();
    (stats.capacity_bytes - stats.free_bytes) / 4096
}

#[test]
fn whatever_is_deleted_in_any_order_comes_back() {
    for order in 0..6 {
        let (ram, ()) = with_store(move |_, store| async move {
            store.create("web01", 64 << 20).await.unwrap();
            let head = disk(&store, "web01").await;
            for round in 1..=3u8 {
                for index in 0..40u64 {
                    write(&head, index << 18, &vec![round; 40_960]).await;
                }
                store.snapshot("web01", Some(&format!("s{round}"))).await.unwrap();
                if round == 2 {
                    store.checkpoint().await.unwrap();
                }
            }
            store.clone_vdi(&Target::parse("web01@s2"), "clone").await.unwrap();
            write(&disk(&store, "clone").await, 0, &vec![9; 1 << 20]).await;
            store.rollback("web01", "s1").await.unwrap();
            store.checkpoint().await.unwrap();
            let before = used(&store);
            let mut victims = vec!["web01@s1", "web01@s2", "web01@s3", "clone"];
            victims.rotate_left(order % 4);
            if order % 2 == 1 {
                victims.reverse();
            }
            for victim in victims {
                store.remove(&Target::parse(victim)).await.unwrap();
                if order > 3 {
                    store.collect_garbage().await.unwrap();
                }
                for block in [0u64, 9, 39 * 64] {
                    let bytes = read(&disk(&store, "web01").await, block << 12, 4096).await;
                    assert_eq!(bytes, [1; 4096], "order {order}, without {victim}");
                }
            }
            store.collect_garbage().await.unwrap();
            // The data of web01, its tree and the tables, and half-used windows.
            assert!(used(&store) < 400 + 40 + 150, "{} of {before} blocks", used(&store));
            store.remove(&Target::parse("web01")).await.unwrap();
            let report = store.collect_garbage().await.unwrap();
            assert!(report.freed_blocks >= 400, "{report:?}");
            assert!(used(&store) < 150, "{} blocks are in use", used(&store));
            assert_eq!(store.collect_garbage().await.unwrap().freed_blocks, 0);
        });
        let report = checked(&ram, OPTIONS);
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.counts.leaked_blocks, 0);
    }
}

#[test]
fn a_full_store_heals_by_itself_when_a_snapshot_goes() {
    with_store(|runtime, store| async move {
        store.create("big", 1 << 30).await.unwrap();
        let disk = disk(&store, "big").await;
        for index in 0..40 {
            write(&disk, index << 20, &vec![1; 1 << 20]).await;
        }
        store.snapshot("big", Some("held")).await.unwrap();
        let (store, disk) = (store.clone(), Rc::clone(&disk));
        in_time(&runtime, async move {
            let mut refused = 0;
            for index in 0..80u64 {
                let data = Buffer::from_bytes(&vec![2; 1 << 20]);
                let offset = (index % 40) << 20;
                let request = Request::Write { offset, length: 1 << 20, data, fua: false };
                let Err(error) = disk.submit(request).await else { continue };
                assert_eq!(error.kind, ErrorKind::NoSpace);
                refused += 1;
                if refused == 3 {
                    store.remove(&Target::parse("big@held")).await.unwrap();
                }
                assert!(refused <= 3, "write {index} was refused");
            }
            assert!(refused == 3, "the store was never full");
            assert!(store.stats().collected_blocks > 5000);
        })
        .await;
    });
}

#[test]
fn guests_go_on_while_garbage_is_collected() {
    let (ram, ()) = with_store(|runtime, store| async move {
        store.create("web01", 64 << 20).await.unwrap();
        store.create("quiet", 64 << 20).await.unwrap();
        write(&disk(&store, "quiet").await, 0, &vec![77; 1 << 20]).await;
        let stop = Rc::new(Cell::new(false));
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let (store, stop) = (store.clone(), Rc::clone(&stop));
                runtime.spawn(async move {
                    let mut round = 0u8;
                    while !stop.get() {
                        round = round.wrapping_add(1).max(1);
                        let disk = disk(&store, "web01").await;
                        for index in 0..16 {
                            let offset = (writer * 16 + index) << 16;
                            write(&disk, offset, &[round; 12_288]).await;
                        }
                        for index in 0..16 {
                            let offset = (writer * 16 + index) << 16;
                            assert_eq!(read(&disk, offset, 12_288).await, [round; 12_288]);
                        }
                    }
                    round
                })
            })
            .collect();
        // Checkpoints at all times, so that blocks become live in the middle of each mark.
        let (settling, ended) = (store.clone(), Rc::clone(&stop));
        let settled = runtime.spawn(async move {
            while !ended.get() {
                settling.checkpoint().await.unwrap();
            }
        });
        for _ in 0..12 {
            let number = store.snapshot("web01", None).await.unwrap();
            let label = number.to_string();
            let frozen = read(&disk(&store, &format!("web01@{label}")).await, 0, 1 << 20).await;
            store.collect_garbage().await.unwrap();
            let again = read(&disk(&store, &format!("web01@{label}")).await, 0, 1 << 20).await;
            assert!(frozen == again, "snapshot {label} changed");
            store.clone_vdi(&Target::parse(&format!("web01@{label}")), "copy").await.unwrap();
            store.remove(&Target::parse(&format!("web01@{label}"))).await.unwrap();
            store.collect_garbage().await.unwrap();
            let copied = read(&disk(&store, "copy").await, 0, 1 << 20).await;
            assert!(copied == frozen, "the copy of {label} changed");
            store.remove(&Target::parse("copy")).await.unwrap();
        }
        stop.set(true);
        settled.await;
        for (writer, task) in (0u64..).zip(writers) {
            let round = task.await;
            let bytes = read(&disk(&store, "web01").await, writer << 20, 12_288).await;
            assert_eq!(bytes, [round; 12_288]);
        }
        assert_eq!(read(&disk(&store, "quiet").await, 0, 1 << 20).await, vec![77; 1 << 20]);
        store.collect_garbage().await.unwrap();
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
    assert_eq!(checked(&ram, OPTIONS).counts.leaked_blocks, 0);
}

#[test]
fn a_crash_in_the_middle_loses_nothing() {
    for breaths in (0..600).step_by(7) {
        let (ram, ()) = with_store(move |runtime, store| async move {
            store.create("web01", 64 << 20).await.unwrap();
            let head = disk(&store, "web01").await;
            write(&head, 0, &vec![1; 1 << 20]).await;
            store.snapshot("web01", Some("gone")).await.unwrap();
            write(&head, 0, &vec![2; 1 << 20]).await;
            store.snapshot("web01", Some("kept")).await.unwrap();
            write(&head, 0, &vec![3; 1 << 20]).await;
            store.checkpoint().await.unwrap();
            store.remove(&Target::parse("web01@gone")).await.unwrap();
            let collecting = store.clone();
            drop(runtime.spawn(async move { drop(collecting.collect_garbage().await) }));
            for _ in 0..breaths {
                runtime.yield_now().await;
            }
            write(&head, 0, &vec![4; 4096]).await;
        });
        let report = checked(&ram, OPTIONS);
        assert!(report.is_clean(), "after {breaths} breaths: {:?}", report.errors);
        let device = ram.clone();
        run(2, |runtime| async move {
            let (store, _) = open(&device, &runtime).await;
            let head = read(&disk(&store, "web01").await, 0, 1 << 20).await;
            assert!(head[..4096] == [4; 4096] && head[4096..].iter().all(|&byte| byte == 3));
            store.collect_garbage().await.unwrap();
            let kept = read(&disk(&store, "web01@kept").await, 0, 1 << 20).await;
            assert!(kept.iter().all(|&byte| byte == 2), "after {breaths} breaths");
        });
        assert_sound(&ram, breaths);
        assert_eq!(checked(&ram, OPTIONS).counts.leaked_blocks, 0, "after {breaths} breaths");
    }
}

/// The sets of a collection took three bits for each block of the store, and another while they were
/// stored: two gigabytes for 16 TiB.
#[test]
fn what_a_collection_keeps_in_memory_is_bounded() {
    /// Three pages of bits describe what the store holds: candidates and marks alone would take six.
    const MEMORY_BYTES: u64 = 6 * 4096;
    const BLOCKS: u64 = (512 << 20) / 4096;
    let ram = Ram::default();
    let device = ram.clone();
    run(1, |runtime| async move {
        Store::format(&device.device(BLOCKS), &runtime, &format_options()).await.unwrap();
        let options = OpenOptions { gc_memory_bytes: MEMORY_BYTES, ..open_options(1) };
        let (store, _) =
            Store::open(device.device(BLOCKS), runtime.clone(), &options).await.unwrap();
        for name in ["kept", "deleted"] {
            store.create(name, 1 << 30).await.unwrap();
        }
        let (kept, deleted) = (disk(&store, "kept").await, disk(&store, "deleted").await);
        for index in 0..120 {
            for disk in [&kept, &deleted] {
                write(disk, index << 20, &vec![7; 1 << 20]).await;
            }
        }
        drop(deleted);
        store.snapshot("deleted", None).await.unwrap();
        store.checkpoint().await.unwrap();
        store.remove(&Target::parse("deleted")).await.unwrap();
        let report = store.collect_garbage().await.unwrap();
        assert!(report.memory_bytes <= MEMORY_BYTES, "{report:?}");
        assert!(report.passes > 1 && report.freed_blocks > 120 << 8, "{report:?}");
        assert!(report.reached_blocks > 120 << 8, "{report:?}");
        assert!(is_filled(&kept, 120, 7).await);
        let report = store.collect_garbage().await.unwrap();
        assert_eq!(report.freed_blocks, 0, "all of it was found");
        let found = store.check(false, None, Vec::new(), |_| {}).await.unwrap();
        assert!(found.is_clean(), "{:?}", found.errors);
        store.close().await.unwrap();
    });
    let report = run(9, |runtime| async move {
        check(&ram.device(BLOCKS), &runtime, OPTIONS, &[], &|_| {}).await.unwrap()
    });
    assert!(report.is_clean(), "{:?}", report.errors);
    assert_eq!(report.counts.leaked_blocks, 0);
}

/// With little memory there are many passes, and what a crash leaves behind is no more than with one.
#[test]
fn passes_free_all_that_one_would() {
    let mut outcomes = Vec::new();
    for gc_memory_bytes in [0, 1 << 20] {
        let ram = Ram::default();
        let device = ram.clone();
        let report = run(1, move |runtime| async move {
            Store::format(&device.device(STORE_BLOCKS), &runtime, &format_options()).await.unwrap();
            let options = OpenOptions { gc_memory_bytes, ..open_options(1) };
            let (store, _) =
                Store::open(device.device(STORE_BLOCKS), runtime, &options).await.unwrap();
            store.create("web01", 64 << 20).await.unwrap();
            let head = disk(&store, "web01").await;
            for round in 1..=6u8 {
                fill(&head, 4, round).await;
                store.snapshot("web01", Some(&format!("s{round}"))).await.unwrap();
                store.checkpoint().await.unwrap();
            }
            store.clone_vdi(&Target::parse("web01@s2"), "clone").await.unwrap();
            for name in ["web01@s1", "web01@s2", "web01@s4"] {
                store.remove(&Target::parse(name)).await.unwrap();
            }
            let report = store.collect_garbage().await.unwrap();
            assert!(is_filled(&disk(&store, "clone").await, 4, 2).await);
            for round in [3, 5, 6] {
                let snapshot = disk(&store, &format!("web01@s{round}")).await;
                assert!(is_filled(&snapshot, 4, round).await);
            }
            assert_eq!(store.collect_garbage().await.unwrap().freed_blocks, 0);
            report
        });
        assert_sound(&ram, 1);
        assert_eq!(checked(&ram, OPTIONS).counts.leaked_blocks, 0);
        outcomes.push(report);
    }
    let (many, one) = (outcomes[0], outcomes[1]);
    assert!(many.passes > 4 && one.passes == 1, "{many:?}, {one:?}");
    assert_eq!(many.freed_blocks, one.freed_blocks);
}

/// Writes the first MiBs of a disk.
async fn fill(disk: &Rc<dyn Disk>, mebibytes: u64, byte: u8) {
    for index in 0..mebibytes {
        write(disk, index << 20, &vec![byte; 1 << 20]).await;
    }
}

async fn is_filled(disk: &Rc<dyn Disk>, mebibytes: u64, byte: u8) -> bool {
    for index in 0..mebibytes {
        if read(disk, index << 20, 1 << 20).await != vec![byte; 1 << 20] {
            return false;
        }
    }
    true
}

/// A damaged node kept all garbage from being collected, until every disk was full.
#[test]
fn a_damaged_node_is_given_up_and_the_rest_is_collected() {
    let (ram, ()) = with_store(|_, store| async move {
        for name in ["web01", "doomed"] {
            store.create(name, 64 << 20).await.unwrap();
            fill(&disk(&store, name).await, 2, 1).await;
        }
        // The damaged node is shared, and names what the head does not name any more.
        store.snapshot("web01", Some("first")).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[2; 4096]).await;
        store.close().await.unwrap();
    });
    let anatomy = Anatomy::of(&ram);
    let root = anatomy.vdi(1).root.entry;
    let second = anatomy.entries(root)[1].pba();
    let whole = ram.block(second);
    ram.rot(second);
    let device = ram.clone();
    run(2, |runtime| async move {
        let (store, _) = open(&device, &runtime).await;
        store.remove(&Target::parse("doomed")).await.unwrap();
        assert!(store.collect_garbage().await.unwrap().freed_blocks > 500);
        // What it named may be somebody else's now: it must not come back.
        device.set_block(second, &whole);
        for name in ["web01", "web01@first"] {
            let disk = disk(&store, name).await;
            assert_eq!(read(&disk, 4096, 4096).await, [1; 4096]);
            let read = Request::Read { offset: 1 << 20, length: 4096 };
            assert!(disk.submit(read).await.is_err(), "{name}");
        }
        store.create("new", 8 << 20).await.unwrap();
        fill(&disk(&store, "new").await, 4, 3).await;
        store.checkpoint().await.unwrap();
    });
    let device = ram.clone();
    run(3, |runtime| async move {
        let (store, _) = open(&device, &runtime).await;
        let head = disk(&store, "web01").await;
        let read_lost = Request::Read { offset: 1 << 20, length: 4096 };
        assert!(head.submit(read_lost).await.is_err());
        write(&head, 1 << 20, &vec![4; 1 << 20]).await;
        store.collect_garbage().await.unwrap();
        assert_eq!(read(&head, 1 << 20, 4096).await, [4; 4096]);
        assert!(is_filled(&disk(&store, "new").await, 4, 3).await);
        // With the last tree that names it the damage goes.
        store.remove(&Target::parse("web01@first")).await.unwrap();
        store.collect_garbage().await.unwrap();
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// The same of the tables: VDIs and snapshots in use are written again before anything is freed.
#[test]
fn damaged_tables_cost_nobody_who_is_in_use() {
    let (ram, ()) = with_store(|_, store| async move {
        for name in ["web01", "doomed"] {
            store.create(name, 64 << 20).await.unwrap();
            fill(&disk(&store, name).await, 2, 1).await;
        }
        store.snapshot("web01", Some("first")).await.unwrap();
        fill(&disk(&store, "web01").await, 2, 2).await;
        store.close().await.unwrap();
    });
    let anatomy = Anatomy::of(&ram);
    let roots = anatomy.slot().roots;
    let pages = |root: &ondisk::RootRef| anatomy.path(root).into_iter().map(|entry| entry.pba());
    let blocks: Vec<_> = pages(&roots.vdis)
        .chain(pages(&anatomy.vdi(1).snapshots))
        .chain([roots.directory.entry.pba(), roots.extents.entry.pba()])
        .collect();
    for at in blocks {
        let ram = ram.copy();
        let device = ram.clone();
        run(2, move |runtime| async move {
            let (store, _) = open_with_cache(&device, &runtime, 0).await;
            let (head, first) = (disk(&store, "web01").await, disk(&store, "web01@first").await);
            store.remove(&Target::parse("doomed")).await.unwrap();
            device.rot(at);
            store.collect_garbage().await.unwrap();
            store.create("new", 8 << 20).await.unwrap();
            fill(&disk(&store, "new").await, 4, 3).await;
            assert!(is_filled(&head, 2, 2).await && is_filled(&first, 2, 1).await, "block {at}");
            store.close().await.unwrap();
        });
        let device = ram.clone();
        run(3, move |runtime| async move {
            let (store, _) = open(&device, &runtime).await;
            for (name, byte) in [("web01", 2), ("web01@first", 1)] {
                let disk = disk(&store, name).await;
                assert!(is_filled(&disk, 2, byte).await, "{name}, block {at}");
            }
            store.close().await.unwrap();
        });
        assert_sound(&ram, 0);
    }
}

/// Nodes that were written together are adjacent. Each was a read of its own: a third of what the device
/// gives in order.
#[test]
fn a_collection_reads_adjacent_nodes_at_once() {
    let (ram, ()) = with_store(|_, store| async move {
        drop(wide_disk(&store, "web01").await);
        store.close().await.unwrap();
    });
    run(2, |runtime| async move {
        let (store, _) = open_with_cache(&ram, &runtime, 0).await;
        let (blocks, operations) = (ram.blocks_read(), ram.operations());
        store.collect_garbage().await.unwrap();
        let (blocks, operations) = (ram.blocks_read() - blocks, ram.operations() - operations);
        assert!(blocks > LEAVES, "only {blocks} blocks were read");
        assert!(operations < LEAVES / 5, "{operations} operations for {blocks} blocks");
    });
}

/// How long a collection takes on a device that needs a millisecond for each read, if a guest reads every
/// so many milliseconds.
fn time_to_collect(guest_reads_every: Option<u64>) -> Duration {
    let (_, took) = with_gated_store(move |runtime, gate, store| async move {
        drop(wide_disk(&store, "web01").await);
        store.checkpoint().await.unwrap();
        store.create("guest", 1 << 20).await.unwrap();
        let guest = disk(&store, "guest").await;
        let ended = Rc::new(Cell::new(false));
        let (over, later) = (Rc::clone(&ended), runtime.clone());
        read_slowly(&runtime, &gate);
        let reads = runtime.spawn(async move {
            while let Some(every) = guest_reads_every.filter(|_| !over.get()) {
                read(&guest, 0, 4096).await;
                later.sleep(Duration::from_millis(every)).await;
            }
        });
        let began = runtime.now();
        store.collect_garbage().await.unwrap();
        let took = runtime.now().since(began);
        ended.set(true);
        reads.await;
        took
    });
    took
}

#[test]
fn a_collection_leaves_most_of_the_device_to_guests() {
    let [alone, beside, beside_rare] = [None, Some(5), Some(1000)].map(time_to_collect);
    assert!(beside > alone * 3, "{alone:?} alone, {beside:?} beside a guest");
    assert!(beside_rare < alone * 2, "{alone:?} alone, {beside_rare:?} beside a guest that rests");
}

/// A read of several nodes at once did not tell that it was the way to the device that failed: what nobody
/// had flushed may be gone, and the next flush was answered as if it were not (design rule 57).
#[test]
fn a_way_that_fails_during_a_collection_stops_the_store() {
    const ENOLINK: i32 = 67;
    let (ram, ()) = with_store(|_, store| async move {
        drop(wide_disk(&store, "web01").await);
        store.close().await.unwrap();
    });
    let mut met = 0;
    for number in (1..200).step_by(3) {
        let ram = ram.copy();
        let stopped = run(2, move |runtime| async move {
            let (store, _) = open_with_cache(&ram, &runtime, 0).await;
            let head = disk(&store, "web01").await;
            write(&head, 0, &[2; 4096]).await;
            let before = ram.operations();
            ram.fail(before + number, ENOLINK);
            let _ = store.collect_garbage().await;
            if ram.operations() < before + number {
                return None;
            }
            Some(head.submit(Request::Flush).await.is_err())
        });
        let Some(stopped) = stopped else { break };
        assert!(stopped, "operation {number} failed, and a flush was answered");
        met += 1;
    }
    assert!(met > 10, "only {met} operations failed");
}
