//! Histories that have a budget.

use std::rc::Rc;
use std::time::Duration;

use base::SnapshotNumber;
use disk::{Disk, Request};
use parallax_vdi::{OpenOptions, Retention, Store, Target};
use runtime::Runtime;

use crate::check::assert_sound;
use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, disk, format_options, open_options, read, reopened, with_store, write};

const MIB: u64 = 1 << 20;

/// Blocks of the disks that are written all over.
const BLOCKS: u64 = 4096;

fn rules(text: &str) -> Retention {
    Retention::parse(text).unwrap()
}

/// Numbers of the moments of a disk, and whether each is held.
async fn moments(store: &Store, name: &str) -> Vec<(u64, bool)> {
    let all = store.snapshots(name, SnapshotNumber::new(0), usize::MAX).await.unwrap();
    let kept = all.iter().filter(|snapshot| snapshot.changed_bytes.is_some());
    kept.map(|snapshot| (snapshot.number.get(), snapshot.hold.is_some())).collect()
}

/// Bytes that its moments hold, as far as that was counted.
async fn held(store: &Store, name: &str) -> Option<u64> {
    store.info(name).await.unwrap().past.map(|past| past.moments_bytes)
}

async fn filled(store: &Store, name: &str, history: &str) -> Rc<dyn Disk> {
    store.create(name, BLOCKS << 12).await.unwrap();
    store.retain(name, rules(history)).await.unwrap();
    let head = disk(store, name).await;
    for part in 0..BLOCKS / 256 {
        write(&head, part << 20, &[1; 1 << 20]).await;
    }
    head
}

/// Writes 64 KiB and flushes, each second.
async fn churn(runtime: &Runtime, head: &Rc<dyn Disk>, seconds: u64) {
    for _ in 0..seconds {
        for _ in 0..16 {
            let byte = runtime.random() as u8;
            write(head, (runtime.random() % BLOCKS) << 12, &[byte; 4096]).await;
        }
        head.submit(Request::Flush).await.unwrap();
        runtime.sleep(Duration::from_secs(1)).await;
    }
}

fn bounded(history: &'static str, gc_memory_bytes: u64, minutes: u64) {
    let ram = Ram::default();
    let device = ram.clone();
    run(1, move |runtime| async move {
        Store::format(&device.device(STORE_BLOCKS), &runtime, &format_options()).await.unwrap();
        let options = OpenOptions { gc_memory_bytes, ..open_options(1) };
        let opened = Store::open(device.device(STORE_BLOCKS), runtime.clone(), &options).await;
        let (store, _) = opened.unwrap();
        let head = filled(&store, "web01", history).await;
        churn(&runtime, &head, 10).await;
        let first = moments(&store, "web01").await[1].0;
        store.hold("web01", &first.to_string(), None).await.unwrap();
        let then = disk(&store, &format!("web01@{first}")).await;
        let before = read(&then, 0, 1 << 20).await;
        drop(then);
        store.snapshot("web01", Some("asked")).await.unwrap();
        let mut greatest = 0;
        for _ in 0..minutes {
            churn(&runtime, &head, 60).await;
            greatest = greatest.max(held(&store, "web01").await.unwrap_or(0));
        }
        assert!(greatest > 4 * MIB && greatest < 10 * MIB, "{greatest}");
        runtime.sleep(Duration::from_secs(600)).await;
        let newest = moments(&store, "web01").await.last().unwrap().0;
        let kept = moments(&store, "web01").await;
        let left = held(&store, "web01").await.unwrap();
        assert!((MIB..=4 * MIB).contains(&left), "{left}");
        let asked = store.info("web01").await.unwrap().past.unwrap().snapshots_bytes;
        assert!(asked > 4 * MIB, "{asked}");
        assert!(kept.len() > 10 && kept.last() == Some(&(newest, false)), "{kept:?}");
        assert_eq!(kept.iter().filter(|(_, held)| *held).collect::<Vec<_>>(), [&(first, true)]);
        // They are the last ones.
        assert!(kept[1..].windows(2).all(|pair| pair[1].0 - pair[0].0 <= 2), "{kept:?}");
        let then = disk(&store, &format!("web01@{first}")).await;
        assert!(read(&then, 0, 1 << 20).await == before);
        drop(then);
        disk(&store, "web01@asked").await;
        let collections = store.stats().collections;
        assert!((5..=1900 / 10).contains(&collections), "{collections}");
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

#[test]
fn a_history_stays_within_its_budget() {
    bounded("1h, at most 4M", MIB, 20);
}

#[test]
fn a_history_stays_within_its_budget_in_passes() {
    bounded("1h, at most 4M", 0, 8);
}

#[test]
fn a_history_of_writes_stays_within_its_budget() {
    bounded("every write for 1h, at most 4M", MIB, 12);
}

/// The newest moment stays, whatever it holds, and nobody collects for ever because of it.
#[test]
fn a_budget_that_cannot_be_met_leaves_the_newest_moment() {
    with_store(|runtime, store| async move {
        let head = filled(&store, "web01", "1d, at most 1B").await;
        churn(&runtime, &head, 10).await;
        let held = moments(&store, "web01").await[0].0;
        store.hold("web01", &held.to_string(), None).await.unwrap();
        churn(&runtime, &head, 300).await;
        // What it was before is all changed behind the newest.
        for part in 0..BLOCKS / 256 {
            write(&head, part << 20, &[9; 1 << 20]).await;
        }
        runtime.sleep(Duration::from_secs(300)).await;
        let kept = moments(&store, "web01").await;
        assert_eq!(kept.len(), 2, "{kept:?}");
        assert_eq!(kept[0], (held, true));
        let collections = store.stats().collections;
        runtime.sleep(Duration::from_secs(3600)).await;
        assert!(store.stats().collections <= collections + 1);
        assert_eq!(moments(&store, "web01").await, kept);
        // It goes when it is not the newest any more.
        churn(&runtime, &head, 2).await;
        runtime.sleep(Duration::from_secs(300)).await;
        let later = moments(&store, "web01").await;
        assert_eq!((later.len(), later[0]), (2, kept[0]), "{later:?}");
        assert!(later[1].0 > kept[1].0, "{later:?}");
    });
}

/// What a shrink cuts off moments hold from then on, though nobody writes anything.
#[test]
fn what_is_cut_off_counts() {
    with_store(|runtime, store| async move {
        let head = filled(&store, "web01", "1h, at most 8M").await;
        churn(&runtime, &head, 20).await;
        runtime.sleep(Duration::from_secs(120)).await;
        assert!(moments(&store, "web01").await.len() > 10);
        store.resize("web01", 2 * MIB).await.unwrap();
        runtime.sleep(Duration::from_secs(600)).await;
        // All of them hold the same.
        assert_eq!(moments(&store, "web01").await.len(), 1);
    });
}

/// What a moment holds counts from when its hold ends.
#[test]
fn what_is_released_counts() {
    with_store(|runtime, store| async move {
        let head = filled(&store, "web01", "1h, at most 8M").await;
        churn(&runtime, &head, 2).await;
        let (first, _) = moments(&store, "web01").await[0];
        store.hold("web01", &first.to_string(), None).await.unwrap();
        for part in 0..BLOCKS / 256 {
            write(&head, part << 20, &[2; 1 << 20]).await;
        }
        churn(&runtime, &head, 2).await;
        runtime.sleep(Duration::from_secs(300)).await;
        assert!(moments(&store, "web01").await.contains(&(first, true)));
        store.release_hold("web01", &first.to_string()).await.unwrap();
        runtime.sleep(Duration::from_secs(300)).await;
        let left = moments(&store, "web01").await;
        assert!(left.iter().all(|&(number, _)| number != first), "{left:?}");
        assert!(held(&store, "web01").await.unwrap() <= 8 * MIB);
    });
}

/// After a start nothing was counted yet, and a budget that may be exceeded has it counted.
#[test]
fn a_budget_is_kept_after_a_restart() {
    let (ram, ()) = with_store(|runtime, store| async move {
        let head = filled(&store, "web01", "1d").await;
        churn(&runtime, &head, 120).await;
        store.retain("web01", rules("1d, at most 2M")).await.unwrap();
        store.close().await.unwrap();
    });
    let after = ram.clone();
    reopened(&ram, |runtime, store, _| async move {
        assert_eq!(store.info("web01").await.unwrap().retention, rules("1d, at most 2M"));
        assert_eq!(held(&store, "web01").await, None, "nobody has counted");
        let before = moments(&store, "web01").await.len();
        runtime.sleep(Duration::from_secs(20)).await;
        assert_eq!(moments(&store, "web01").await.len(), before);
        runtime.sleep(Duration::from_secs(300)).await;
        let left = held(&store, "web01").await.unwrap();
        assert!((MIB / 2..=2 * MIB).contains(&left), "{left}");
        assert!((2..before).contains(&moments(&store, "web01").await.len()));
        // What the whole store holds is less than that: nobody need count.
        store.retain("web01", rules("1d, at most 1G")).await.unwrap();
        store.close().await.unwrap();
    });
    reopened(&after, |runtime, store, _| async move {
        let kept = moments(&store, "web01").await;
        runtime.sleep(Duration::from_secs(3600)).await;
        assert_eq!((held(&store, "web01").await, store.stats().collections), (None, 0));
        assert_eq!(moments(&store, "web01").await, kept);
        store.close().await.unwrap();
    });
    assert_sound(&after, 0);
}

/// A smaller budget goes by what was counted before, and what somebody has open stays.
#[test]
fn a_budget_that_is_lowered_leaves_what_is_open() {
    with_store(|runtime, store| async move {
        let head = filled(&store, "web01", "1d, at most 20M").await;
        churn(&runtime, &head, 60).await;
        store.collect_garbage().await.unwrap();
        let kept = moments(&store, "web01").await;
        assert!(kept.len() > 50);
        // What comes later was not counted, and has no part in it.
        churn(&runtime, &head, 20).await;
        let all = moments(&store, "web01").await.len();
        store.retain("web01", rules("1d, at most 6M")).await.unwrap();
        while moments(&store, "web01").await.len() == all {
            runtime.sleep(Duration::from_millis(100)).await;
        }
        let left = moments(&store, "web01").await;
        let is_counted = |moment: &&(u64, bool)| moment.0 <= kept[kept.len() - 1].0;
        let counted = left.iter().filter(is_counted).count();
        assert!(counted > 32 && counted < kept.len(), "{counted} of {}", kept.len());
        assert!(left.len() - counted >= 19, "{left:?}");
        let kept = left;
        let open = disk(&store, &format!("web01@{}", kept[2].0)).await;
        let before = read(&open, 0, 1 << 20).await;
        store.retain("web01", rules("1d, at most 1M")).await.unwrap();
        runtime.sleep(Duration::from_secs(8)).await;
        let left = moments(&store, "web01").await;
        assert!(left.len() > 2 && left.len() < 25, "{left:?}");
        assert_eq!(left[0], kept[2]);
        runtime.sleep(Duration::from_secs(600)).await;
        assert!(read(&open, 0, 1 << 20).await == before);
        assert_eq!(moments(&store, "web01").await[0], kept[2]);
        drop(open);
        runtime.sleep(Duration::from_secs(600)).await;
        assert!(moments(&store, "web01").await[0].0 > kept[2].0);
        assert!(held(&store, "web01").await.unwrap() <= MIB);
    });
}

/// The store's budget is one of each disk that has no rules of its own.
#[test]
fn a_budget_by_default_is_each_disks() {
    with_store(|runtime, store| async move {
        store.retain_by_default(rules("1d, at most 3M")).await.unwrap();
        let own = filled(&store, "own", "1d").await;
        let mut inherited = Vec::new();
        for name in ["web01", "web02"] {
            inherited.push(filled(&store, name, "off").await);
            store.inherit_retention(name).await.unwrap();
        }
        for _ in 0..120 {
            churn(&runtime, &own, 1).await;
            for head in &inherited {
                churn(&runtime, head, 1).await;
            }
        }
        runtime.sleep(Duration::from_secs(1200)).await;
        // What it has counted last may have been before the last moments.
        store.collect_garbage().await.unwrap();
        assert!(held(&store, "own").await.unwrap() > 6 * MIB);
        for name in ["web01", "web02"] {
            let held = held(&store, name).await.unwrap();
            assert!((MIB..=3 * MIB).contains(&held), "{name}: {held}");
        }
        // With the disk goes its share.
        store.remove(&Target::parse("web01")).await.unwrap();
        store.create("web01", 1 << 20).await.unwrap();
        assert_eq!(held(&store, "web01").await, Some(0));
    });
}
