//! Series of snapshots: each is of its moment, and all are durable when the series is answered.

use std::time::Duration;

use base::{ErrorKind, SnapshotNumber};
use parallax_vdi::{SnapshotEntry, Store, Target, WantedSeries};

use crate::{disk, read, reopened, with_store, write};

const EVERY: Duration = Duration::from_micros(100);

async fn list(store: &Store) -> Vec<SnapshotEntry> {
    let mut all: Vec<SnapshotEntry> = Vec::new();
    loop {
        let after = all.last().map_or(SnapshotNumber::new(0), |last| last.number);
        let more = store.snapshots("web01", after, 1000).await.unwrap();
        if more.is_empty() {
            return all;
        }
        all.extend(more);
    }
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
            [(EVERY, 0), (Duration::ZERO, 100_001), (second, 3), (Duration::MAX, u32::MAX)]
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
