//! What happened to a disk, summed up by intervals.

use std::time::Duration;

use base::{ErrorKind, SnapshotNumber};
use disk::Request;
use parallax_vdi::{Retention, SnapshotEntry, Store, VdiInterval, VdiIntervals, WantedIntervals};

use crate::{disk, with_store, write};

/// More than are looked at in one go.
const MOMENTS: u64 = 5000;

/// Each so many moments somebody takes a snapshot: more than one answer names.
const ASKED_EACH: u64 = 4;

/// All that is to be told, from the list of snapshots.
fn summed(all: &[SnapshotEntry], every_s: u64) -> Vec<VdiInterval> {
    let name = |entry: &SnapshotEntry| match &entry.label {
        Some(label) => label.clone(),
        None => entry.number.to_string(),
    };
    let from_ns = |entry: &SnapshotEntry| {
        let second = entry.created_ns / 1_000_000_000;
        (second - second % every_s) * 1_000_000_000
    };
    let intervals = all.chunk_by(|one, other| from_ns(one) == from_ns(other));
    let interval = |entries: &[SnapshotEntry]| VdiInterval {
        from_ns: from_ns(&entries[0]),
        moments: entries.iter().filter(|entry| entry.changed_bytes.is_some()).count() as u64,
        changed_bytes: entries.iter().filter_map(|entry| entry.changed_bytes).sum(),
        last: entries.last().map(name).unwrap(),
        snapshots: entries.iter().filter(|it| it.changed_bytes.is_none()).map(name).collect(),
        held: entries.iter().filter(|entry| entry.hold.is_some()).map(name).collect(),
    };
    intervals.map(interval).collect()
}

fn joined(earlier: &mut Vec<VdiInterval>, mut later: Vec<VdiInterval>) {
    if let Some(one) = earlier.last_mut()
        && later.first().is_some_and(|other| other.from_ns == one.from_ns)
    {
        let other = later.remove(0);
        one.moments += other.moments;
        one.changed_bytes += other.changed_bytes;
        one.last = other.last;
        one.snapshots.extend(other.snapshots);
        one.held.extend(other.held);
    }
    earlier.append(&mut later);
}

/// Every answer on the way to the beginning, joined; each is bounded and tells what is left.
async fn all_pages(store: &Store, every: &str, max: usize) -> (Vec<VdiInterval>, usize) {
    let mut wanted = WantedIntervals { every: Some(every.to_owned()), max, before: None };
    let (mut told, mut pages) = (Vec::new(), 0);
    loop {
        let page = store.intervals("web01", &wanted).await.unwrap();
        pages += 1;
        let VdiIntervals { mut intervals, next, .. } = page;
        let names: usize = intervals.iter().map(|it| it.snapshots.len() + it.held.len()).sum();
        assert!(intervals.len() <= max && names <= 1001, "{} {names}", intervals.len());
        joined(&mut intervals, told);
        told = intervals;
        let Some(next) = next else {
            assert_eq!(page.earlier, 0);
            return (told, pages);
        };
        wanted.before = Some(next);
    }
}

/// Of a disk with thousands of moments, every way of asking tells the same, a bounded part at a time.
#[test]
fn thousands_of_moments_are_summed_up() {
    with_store(|runtime, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.retain("web01", Retention::parse("24h").unwrap()).await.unwrap();
        let head = disk(&store, "web01").await;
        for round in 0..MOMENTS {
            write(&head, (round % 64) << 12, &[round as u8 | 1; 4096]).await;
            head.submit(Request::Flush).await.unwrap();
            runtime.sleep(Duration::from_millis(100)).await;
            if round % ASKED_EACH == 0 {
                let label = format!("s{round}");
                store.snapshot("web01", Some(&label)).await.unwrap();
            }
        }
        for held in ["s0", "s400", "17"] {
            store.hold("web01", held, None).await.unwrap();
        }
        let all = store.snapshots("web01", SnapshotNumber::new(0), usize::MAX).await.unwrap();
        assert!(all.len() as u64 >= MOMENTS, "{}", all.len());
        for (every, every_s) in [("1s", 1), ("1m", 60), ("1 day", 86_400)] {
            let expected = summed(&all, every_s);
            for max in [1, 7, 1000] {
                let (told, pages) = all_pages(&store, every, max).await;
                assert!(told == expected, "{every} {max}: {told:?}");
                assert!(pages > 1, "{every} {max}");
            }
        }
        // Without a length one that fits; what is not told is counted.
        let wanted = WantedIntervals { every: None, max: 41, before: None };
        let fitting = store.intervals("web01", &wanted).await.unwrap();
        assert_eq!(fitting.every_s, 15);
        let expected = summed(&all, 15);
        let told = fitting.intervals.len();
        assert_eq!(fitting.intervals[1..], expected[expected.len() - told + 1..]);
        assert_eq!(fitting.earlier, (expected.len() - told) as u64);
        let wanted = WantedIntervals { every: Some("often".to_owned()), ..wanted };
        let refused = store.intervals("web01", &wanted).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid);
        let refused = store.intervals("web02", &wanted).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid);
        let missing = store.intervals("web02", &WantedIntervals::default()).await.unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    });
}
