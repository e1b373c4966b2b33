//! Moments that are kept by themselves, and disks that are opened as they were.

use std::time::Duration;

use base::ErrorKind;
use disk::{Disk, Request};
use parallax_vdi::{Retention, Store, Target};
use runtime::Runtime;
use std::rc::Rc;

use crate::check::assert_sound;
use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, disk, format_options, open, read, reopened, with_store, write};

async fn flush(disk: &Rc<dyn Disk>) {
    disk.submit(Request::Flush).await.unwrap();
}

async fn kept(store: &Store) -> Vec<u64> {
    let all = store.snapshots("web01", base::SnapshotNumber::new(0), usize::MAX).await.unwrap();
    let kept = all.iter().filter(|snapshot| snapshot.changed_bytes.is_some());
    kept.map(|snapshot| snapshot.number.get()).collect()
}

fn time_of(runtime: &Runtime) -> String {
    let seconds = runtime.wall_ns() / 1_000_000_000;
    let nanos = runtime.wall_ns() % 1_000_000_000;
    // 2023-11-14T22:13:20Z is where the clock of these tests begins.
    let (minute, second) =
        ((seconds - 1_700_000_000 + 800) / 60, (seconds - 1_700_000_000 + 800) % 60);
    format!("2023-11-14T{:02}:{:02}:{second:02}.{nanos:09}Z", 22 + minute / 60, minute % 60)
}

/// Each flush can be opened, by time, until it is too old; and what is written behind it is not in it.
#[test]
fn a_disk_is_opened_as_it_was() {
    let (ram, times) = with_store(|runtime, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.retain("web01", Retention::parse("10m").unwrap()).await.unwrap();
        let head = disk(&store, "web01").await;
        let mut times = Vec::new();
        for round in 1..=20u8 {
            write(&head, 0, &[round; 4096]).await;
            write(&head, u64::from(round) << 12, &[round; 4096]).await;
            flush(&head).await;
            runtime.sleep(Duration::from_millis(700)).await;
            times.push((time_of(&runtime), round));
            runtime.sleep(Duration::from_millis(700)).await;
        }
        assert!(store.stats().moments >= 20, "{:?}", store.stats());
        times
    });
    assert_sound(&ram, 0);
    let ram_after = ram.clone();
    reopened(&ram, move |runtime, store, _| async move {
        // Its clock begins where the other one's did: behind the moments.
        let early = store.open_disk(&Target::parse(&format!("web01@{}", times[3].0))).await;
        assert_eq!(early.err().map(|error| error.kind()), Some(ErrorKind::Invalid));
        runtime.sleep(Duration::from_secs(60)).await;
        for (time, round) in &times {
            let then = disk(&store, &format!("web01@{time}")).await;
            assert_eq!(read(&then, 0, 4096).await, [*round; 4096], "{time}");
            assert_eq!(read(&then, u64::from(*round + 1) << 12, 4096).await, [0; 4096]);
        }
        let (time, round) = times[6].clone();
        let target = Target::parse(&format!("web01@{time}"));
        store.clone_vdi(&target, "fix").await.unwrap();
        assert_eq!(read(&disk(&store, "fix").await, 0, 4096).await, [round; 4096]);
        // A time is no name for something to be deleted.
        let error = store.remove(&target).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let error = store.clone_vdi(&Target::parse("web01@2 days ago"), "x").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        store.rollback("web01", &time).await.unwrap();
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [round; 4096]);
        store.close().await.unwrap();
    });
    assert_sound(&ram_after, 0);
}

/// Of flushes that follow each other closely, as a file system's two for a sync, the last is the one that somebody
/// goes back to. Only the first had a moment, and what came behind it waited for up to two seconds.
#[test]
fn the_last_of_some_flushes_has_a_moment() {
    with_store(|runtime, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.retain("web01", Retention::parse("10m").unwrap()).await.unwrap();
        let head = disk(&store, "web01").await;
        for round in 1..=10u8 {
            for part in 0..3 {
                write(&head, part << 12, &[round; 4096]).await;
                flush(&head).await;
            }
            runtime.sleep(Duration::from_millis(100)).await;
            let time = time_of(&runtime);
            runtime.sleep(Duration::from_millis(3)).await;
            let then = disk(&store, &format!("web01@{time}")).await;
            assert_eq!(read(&then, 2 << 12, 1).await, [round], "{time}");
        }
        assert!(kept(&store).await.len() <= 30, "{:?}", kept(&store).await);
    });
}

/// Nothing is kept of what is not written; what is too old goes, but for what the disk was then.
#[test]
fn moments_go_when_their_time_has_come() {
    let (ram, ()) = with_store(|runtime, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let rules = Retention::parse("every flush for 10s, 5s for 60s").unwrap();
        store.retain("web01", rules).await.unwrap();
        let head = disk(&store, "web01").await;
        for second in 0..120u64 {
            write(&head, (second % 50) << 12, &[second as u8 | 1; 4096]).await;
            flush(&head).await;
            runtime.sleep(Duration::from_secs(1)).await;
        }
        let count = kept(&store).await.len();
        assert!((20..=26).contains(&count), "{count} moments");
        runtime.sleep(Duration::from_secs(600)).await;
        assert_eq!(kept(&store).await.len(), 1, "what it was when nothing was written any more");
        store.collect_garbage().await.unwrap();
        assert_eq!(store.stats().moments, 120);
    });
    reopened(&ram, |runtime, store, _| async move {
        // Nobody has opened the disk, and the setting is known.
        assert!(!store.info("web01").await.unwrap().retention.is_off());
        store.snapshot("web01", Some("asked")).await.unwrap();
        store.retain("web01", Retention::default()).await.unwrap();
        runtime.sleep(Duration::from_secs(9)).await;
        assert_eq!(kept(&store).await, [0u64; 0]);
        assert_eq!(store.info("web01").await.unwrap().snapshot_count, 1);
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// A disk that is written and not flushed has moments too; what somebody has open stays.
#[test]
fn unflushed_writes_are_kept_and_open_moments_stay() {
    with_store(|runtime, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.retain("web01", Retention::parse("5s").unwrap()).await.unwrap();
        let head = disk(&store, "web01").await;
        write(&head, 0, &[1; 4096]).await;
        runtime.sleep(Duration::from_secs(3)).await;
        let first = kept(&store).await;
        assert_eq!(first.len(), 1);
        let open = disk(&store, &format!("web01@{}", first[0])).await;
        for second in 2..20u8 {
            write(&head, 0, &[second; 4096]).await;
            runtime.sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(read(&open, 0, 4096).await, [1; 4096]);
        assert!(kept(&store).await.contains(&first[0]));
        drop(open);
        runtime.sleep(Duration::from_secs(9)).await;
        assert!(!kept(&store).await.contains(&first[0]));
    });
}

/// A full store gives up old moments before it refuses a write (design rule 39).
#[test]
fn a_full_store_thins_its_history_first() {
    let ram = Ram::default();
    let device = ram.clone();
    run(1, |runtime| async move {
        Store::format(&device.device(STORE_BLOCKS), &runtime, &format_options()).await.unwrap();
        let (store, _) = open(&device, &runtime).await;
        store.create("web01", 1 << 30).await.unwrap();
        store.snapshot("web01", Some("asked")).await.unwrap();
        store.retain("web01", Retention::parse("24h").unwrap()).await.unwrap();
        let head = disk(&store, "web01").await;
        // Four times what the store can hold, over and over the same 16 MiB.
        for round in 0..24u8 {
            for part in 0..16u64 {
                write(&head, part << 20, &vec![round; 1 << 20]).await;
                flush(&head).await;
                runtime.sleep(Duration::from_millis(20)).await;
            }
        }
        assert!(store.stats().moments > 100);
        let left = kept(&store).await;
        assert!(!left.is_empty() && left.len() < 200, "{} moments are left", left.len());
        assert_eq!(read(&disk(&store, "web01@asked").await, 0, 4096).await, [0; 4096]);
        assert_eq!(read(&head, 5 << 20, 4096).await, [23; 4096]);
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// Deleting many moments of a disk that nobody writes to went through the log block by block until
/// it was full; the checkpoint that makes room in it was asked for by nobody.
#[test]
fn many_moments_end_while_nobody_writes() {
    let (ram, ()) = with_store(|runtime, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.retain("web01", Retention::parse("24h").unwrap()).await.unwrap();
        let head = disk(&store, "web01").await;
        for round in 0..600u64 {
            write(&head, (round % 40) << 12, &[round as u8 | 1; 4096]).await;
            flush(&head).await;
            runtime.sleep(Duration::from_millis(20)).await;
        }
        assert!(kept(&store).await.len() >= 500);
        store.retain("web01", Retention::default()).await.unwrap();
        runtime.sleep(Duration::from_secs(30)).await;
        assert_eq!(kept(&store).await, [0u64; 0]);
        write(&head, 0, &[7; 4096]).await;
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// What was written behind the last moment is in the history when the disk has gone back.
#[test]
fn a_rollback_leaves_a_moment() {
    with_store(|runtime, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.retain("web01", Retention::parse("every 1h for 1d").unwrap()).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[1; 4096]).await;
        runtime.sleep(Duration::from_secs(2)).await;
        store.snapshot("web01", Some("before")).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[2; 4096]).await;
        store.rollback("web01", "before").await.unwrap();
        let moments = kept(&store).await;
        let [.., left, reached] = moments[..] else { panic!("{moments:?}") };
        let holds = async |number: u64| {
            read(&disk(&store, &format!("web01@{number}")).await, 0, 4096).await[0]
        };
        assert_eq!((holds(left).await, holds(reached).await), (2, 1));
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [1; 4096]);
    });
}

/// A shortage that collecting garbage ends costs no moment.
#[test]
fn garbage_goes_before_moments() {
    with_store(|runtime, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.create("big", 1 << 30).await.unwrap();
        store.retain("web01", Retention::parse("24h").unwrap()).await.unwrap();
        let (web01, big) = (disk(&store, "web01").await, disk(&store, "big").await);
        for round in 0..10u8 {
            write(&web01, 0, &[round | 1; 4096]).await;
            flush(&web01).await;
            runtime.sleep(Duration::from_millis(20)).await;
        }
        store.snapshot("big", Some("s")).await.unwrap();
        for part in 0..50u64 {
            write(&big, part << 20, &vec![1; 1 << 20]).await;
        }
        store.snapshot("big", Some("t")).await.unwrap();
        store.remove(&Target::parse("big")).await.unwrap();
        for part in 0..50u64 {
            write(&web01, (1 + part) << 20, &vec![2; 1 << 20]).await;
        }
        assert!(kept(&store).await.len() >= 10);
    });
}

/// A store that is closed when a history was just ended has moments left, of a disk without rules.
#[test]
fn what_an_ended_history_left_goes_though_nobody_opens_the_disk() {
    let (ram, ()) = with_store(|runtime, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.retain("web01", Retention::parse("24h").unwrap()).await.unwrap();
        let head = disk(&store, "web01").await;
        for round in 0..5u8 {
            write(&head, 0, &[round | 1; 4096]).await;
            flush(&head).await;
            runtime.sleep(Duration::from_millis(20)).await;
        }
        store.retain("web01", Retention::default()).await.unwrap();
        store.close().await.unwrap();
    });
    reopened(&ram, |runtime, store, _| async move {
        runtime.sleep(Duration::from_secs(9)).await;
        let after = store.stats().log_records;
        assert_eq!(kept(&store).await, [0u64; 0]);
        assert_eq!(store.stats().log_records, after, "they had gone before anybody looked");
    });
}

/// The state of a disk that nobody used when it got its history was no moment until the next write, and
/// then it was lost: the moment was of what that write had made of it.
#[test]
fn a_disk_at_rest_that_gets_a_history_has_what_it_is_as_its_first_moment() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.create("empty", 1 << 30).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[1; 4096]).await;
        store.close().await.unwrap();
    });
    reopened(&ram, |runtime, store, _| async move {
        for name in ["web01", "empty"] {
            store.retain(name, Retention::parse("24h").unwrap()).await.unwrap();
        }
        runtime.sleep(Duration::from_secs(3)).await;
        let first = kept(&store).await;
        assert_eq!(first.len(), 1);
        assert_eq!(store.info("empty").await.unwrap().moment_count, 0, "nothing was written");
        let head = disk(&store, "web01").await;
        write(&head, 0, &[2; 4096]).await;
        flush(&head).await;
        runtime.sleep(Duration::from_secs(3)).await;
        let then = disk(&store, &format!("web01@{}", first[0])).await;
        assert_eq!(read(&then, 0, 4096).await[0], 1);
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}
