//! Series of snapshots: each is of its moment, and all are durable when the series is answered.

use std::time::Duration;

use base::{Buffer, ErrorKind, SnapshotNumber};
use disk::Request;
use parallax_vdi::{FormatOptions, SnapshotEntry, Store, Target, WantedSeries};

use crate::check::assert_sound;
use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, disk, format_options, open, read, reopened, with_store, write};

const EVERY: Duration = Duration::from_micros(100);

async fn list(store: &Store) -> Vec<SnapshotEntry> {
    store.snapshots("web01", SnapshotNumber::new(0), usize::MAX).await.unwrap()
}

/// Contents go on from each to the next, none has a later write without an earlier one, and a crash behind the
/// answer takes none away.
#[test]
fn each_snapshot_of_a_series_is_of_its_moment_and_durable_with_the_others() {
    let (ram, numbers) = with_store(|runtime, store| async move {
        store.create("web01", 8 << 20).await.unwrap();
        let (writer, clock) = (store.clone(), runtime.clone());
        let written = runtime.spawn(async move {
            let head = disk(&writer, "web01").await;
            for byte in 1..=100u8 {
                write(&head, 0, &[byte; 4096]).await;
                write(&head, u64::from(byte) << 13, &[byte; 4096]).await;
                clock.sleep(EVERY * 2).await;
            }
        });
        let wanted = WantedSeries { every: EVERY, count: 150 };
        let series = store.snapshot_series("web01", wanted).await.unwrap();
        let (first, last) = (series.first.get(), series.last.get());
        assert_eq!((series.count, last - first), (150, 149));
        written.await;
        first..=last
    });
    reopened(&ram, |_, store, _| async move {
        let all = list(&store).await;
        let listed: Vec<u64> = all.iter().map(|entry| entry.number.get()).collect();
        assert_eq!(listed, numbers.clone().collect::<Vec<_>>());
        let steps = all.windows(2).map(|two| two[1].created_ns - two[0].created_ns);
        assert!(steps.min() > Some(0) && all[149].created_ns - all[0].created_ns < 20_000_000);
        let (mut before, mut kinds) = (0, 0);
        for number in numbers {
            let snapshot = disk(&store, &format!("web01@{number}")).await;
            let byte = read(&snapshot, 0, 1).await[0];
            assert!(byte >= before, "snapshot {number} has {byte}, the one before {before}");
            let earlier = u64::from(byte.saturating_sub(1));
            assert_eq!(
                read(&snapshot, earlier << 13, 1).await[0],
                if earlier > 0 { earlier as u8 } else { byte }
            );
            assert_eq!(read(&snapshot, u64::from(byte + 1) << 13, 1).await[0], 0);
            kinds += usize::from(byte > before);
            before = byte;
        }
        assert!(kinds > 50, "the series went over {kinds} writes");
    });
}

/// Nobody waits for a record of a series, so it must not wait for anybody: not for the block that it is in, which
/// a checkpoint needs to make room in the log.
#[test]
fn a_series_may_be_longer_than_the_log() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 8 << 20).await.unwrap();
        let before = store.stats().checkpoints;
        let wanted = WantedSeries { every: Duration::ZERO, count: 20_000 };
        assert_eq!(store.snapshot_series("web01", wanted).await.unwrap().count, 20_000);
        assert!(store.stats().checkpoints > before + 2, "the log was lapped");
    });
    let count = reopened(&ram, |_, store, _| async move { list(&store).await.len() });
    assert_eq!(count, 20_000);
}

/// One that is late all the time left nobody else a turn.
#[test]
fn guests_go_on_while_a_series_catches_up() {
    with_store(|runtime, store| async move {
        store.create("web01", 8 << 20).await.unwrap();
        let head = disk(&store, "web01").await;
        let taker = store.clone();
        // The log has room for more.
        let wanted = WantedSeries { every: Duration::ZERO, count: 900 };
        let taken = runtime.spawn(async move { taker.snapshot_series("web01", wanted).await });
        write(&head, 0, &[1; 4096]).await;
        let next = store.snapshot("web01", None).await.unwrap().get();
        assert!(next < 500, "{next} were taken beside one write and one snapshot");
        assert_eq!(taken.await.unwrap().count, 900);
    });
}

/// Each record of a quiet disk was a block of the log.
#[test]
fn records_of_a_series_share_blocks_of_the_log() {
    with_store(|_, store| async move {
        store.create("web01", 8 << 20).await.unwrap();
        let before = store.stats().log_blocks;
        let wanted = WantedSeries { every: EVERY, count: 2_000 };
        store.snapshot_series("web01", wanted).await.unwrap();
        let blocks = store.stats().log_blocks - before;
        assert!(blocks < 40, "{blocks} blocks");
    });
}

/// A checkpoint that a series makes due must find the blocks that it needs: pages for records of snapshots.
#[test]
fn a_series_is_cut_short_before_a_full_store_cannot_write_it_down() {
    // How much room is left when the last checkpoint begins is another each time.
    for first in [4_000, 9_000, 14_000, 19_000] {
        fill_up(first);
    }
}

fn fill_up(first: u32) {
    let ram = Ram::default();
    let device = ram.clone();
    let count = run(1, move |runtime| async move {
        // Long enough for more pages than checkpoints have room for beside what guests changed.
        let options = FormatOptions { log_bytes: Some(4 << 20), ..format_options() };
        Store::format(&device.device(STORE_BLOCKS), &runtime, &options).await.unwrap();
        let (store, _) = open(&device, &runtime).await;
        store.create("web01", 1 << 30).await.unwrap();
        let head = disk(&store, "web01").await;
        let mut offset = 0;
        let data = vec![7; 1 << 20];
        loop {
            let data = Buffer::from_bytes(&data);
            let request = Request::Write { offset, length: 1 << 20, data, fua: false };
            if head.submit(request).await.is_err() {
                break;
            }
            offset += 1 << 20;
        }
        let wanted = WantedSeries { every: Duration::ZERO, count: 25_000 };
        let mut count = first;
        let first = WantedSeries { count: first, ..wanted };
        store.snapshot_series("web01", first).await.unwrap();
        loop {
            match store.snapshot_series("web01", wanted).await {
                Ok(series) => count += series.count,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                    break;
                }
            }
            assert!(count < 2_000_000, "the store never fills");
        }
        store.checkpoint().await.unwrap();
        assert_eq!(read(&head, 0, 4096).await, [7; 4096]);
        store.close().await.unwrap();
        count
    });
    assert_sound(&ram, 0);
    let left = reopened(&ram, move |runtime, store, _| async move {
        let all = list(&store).await;
        assert!(all.len() >= count as usize, "{} of {count}", all.len());
        // One of each page of records stays, so that no page goes; and many go between two checkpoints.
        let numbers: Vec<u64> =
            all.iter().map(|it| it.number.get()).filter(|it| it % 16 > 0).collect();
        for numbers in numbers.chunks(64) {
            let removals: Vec<_> = numbers
                .iter()
                .map(|number| {
                    let (store, target) =
                        (store.clone(), Target::parse(&format!("web01@{number}")));
                    runtime.spawn(async move { store.remove(&target).await.unwrap() })
                })
                .collect();
            for removed in removals {
                removed.await;
            }
        }
        store.checkpoint().await.unwrap();
        store.close().await.unwrap();
        all.len() - numbers.len()
    });
    assert_sound(&ram, 0);
    assert_eq!(reopened(&ram, |_, store, _| async move { list(&store).await.len() }), left);
}

#[test]
fn a_series_that_is_cut_short_says_how_far_it_came() {
    with_store(|runtime, store| async move {
        store.create("web01", 8 << 20).await.unwrap();
        let (remover, clock) = (store.clone(), runtime.clone());
        let removed = runtime.spawn(async move {
            clock.sleep(EVERY * 100).await;
            remover.remove(&Target::parse("web01")).await.unwrap();
        });
        let wanted = WantedSeries { every: EVERY, count: 10_000 };
        let error = store.snapshot_series("web01", wanted).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let said = error.to_string();
        assert!(said.contains(" of 10000 snapshots were taken, web01@1 to web01@1"), "{said}");
        removed.await;
    });
}

#[test]
fn a_series_has_bounds() {
    with_store(|_, store| async move {
        store.create("web01", 8 << 20).await.unwrap();
        let second = Duration::from_secs(1);
        for (every, count) in
            [(EVERY, 0), (Duration::ZERO, 25_001), (second, 3), (Duration::MAX, u32::MAX)]
        {
            let refused = store.snapshot_series("web01", WantedSeries { every, count }).await;
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid, "{every:?}, {count}");
        }
        let pair = WantedSeries { every: second, count: 2 };
        assert_eq!(store.snapshot_series("web01", pair).await.unwrap().count, 2);
        let missing = store.snapshot_series("web02", pair).await.unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        assert_eq!(list(&store).await.len(), 2);
    });
}
