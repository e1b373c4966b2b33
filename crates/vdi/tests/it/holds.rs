//! Held snapshots: nothing deletes them, and what becomes of them is told.

use std::rc::Rc;
use std::time::Duration;

use base::{Block, ErrorKind, SnapshotNumber};
use device::Operation;
use disk::{Disk, Request};
use ondisk::{LedgerKind, LedgerRecord, RootRef, SnapshotRecord, TableRecord, VdiRecord};
use parallax_vdi::check::{CheckOptions, FindingKind, NotedHead};
use parallax_vdi::{Received, Retention, SnapshotEntry, Store, Target};

use crate::check::{Anatomy, OPTIONS, assert_sound, checked, checked_for, kinds};
use crate::gate::with_gated_store;
use crate::ram::{Ram, WALL_START_NS, run, run_at};
use crate::{STORE_BLOCKS, disk, format_options, open, read, reopened, with_store, write};

const HOUR: Duration = Duration::from_secs(3600);

/// First block of the first extent of data or metadata.
const EXTENTS: u64 = (32 << 20) / 4096;

/// What somebody does to the record of a snapshot.
type Alter = fn(SnapshotRecord) -> SnapshotRecord;

async fn flush(disk: &Rc<dyn Disk>) {
    disk.submit(Request::Flush).await.unwrap();
}

async fn refused(store: &Store, target: &str) -> String {
    let error = store.remove(&Target::parse(target)).await.expect_err("it is held");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    error.to_string()
}

async fn removed(store: &Store, target: &str) {
    store.remove(&Target::parse(target)).await.unwrap();
}

async fn listed(store: &Store) -> Vec<SnapshotEntry> {
    store.snapshots("web01", SnapshotNumber::new(0), usize::MAX).await.unwrap()
}

async fn held(store: &Store) -> Vec<u64> {
    let held = listed(store).await.into_iter().filter(|snapshot| snapshot.hold.is_some());
    held.map(|snapshot| snapshot.number.get()).collect()
}

/// A closed store, or one that was left, with three snapshots of which the first two are held.
fn store_with_holds(clean: bool) -> Ram {
    let (ram, ()) = with_store(move |_, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let head = disk(&store, "web01").await;
        for (round, label) in [(1, "first"), (2, "second"), (3, "third")] {
            write(&head, 0, &[round; 8192]).await;
            store.snapshot("web01", Some(label)).await.unwrap();
        }
        store.hold("web01", "first", None).await.unwrap();
        store.hold("web01", "second", Some("1h")).await.unwrap();
        write(&head, 0, &[4; 8192]).await;
        if clean {
            store.close().await.unwrap();
        }
    });
    ram
}

#[test]
fn what_is_held_is_not_deleted_until_it_is_released() {
    for clean in [true, false] {
        let ram = store_with_holds(clean);
        assert_sound(&ram, 0);
        reopened(&ram, |_, store, _| async move {
            assert_eq!(held(&store).await, [1, 2]);
            assert_eq!(store.info("web01").await.unwrap().held_count, 2);
            let message = refused(&store, "web01@first").await;
            assert!(message.contains("parallax release web01@first"), "{message}");
            let message = refused(&store, "web01").await;
            assert!(message.contains("web01@first, web01@second"), "{message}");
            // Nobody was disconnected for that.
            assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [4; 4096]);
            removed(&store, "web01@third").await;
            store.rollback("web01", "first").await.unwrap();
            store.release_hold("web01", "first").await.unwrap();
            let error = store.release_hold("web01", "first").await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            removed(&store, "web01@first").await;
            let message = refused(&store, "web01").await;
            assert!(message.contains("web01@second"), "{message}");
            store.collect_garbage().await.unwrap();
            store.checkpoint().await.unwrap();
            assert_eq!(read(&disk(&store, "web01@second").await, 0, 4096).await, [2; 4096]);
        });
        assert_sound(&ram, 0);
        reopened(&ram, |_, store, _| async move {
            assert_eq!(held(&store).await, [2]);
            store.release_hold("web01", "2").await.unwrap();
            removed(&store, "web01").await;
            store.collect_garbage().await.unwrap();
            store.close().await.unwrap();
        });
        let report = checked(&ram, OPTIONS);
        assert!(report.is_clean(), "{report:?}");
        assert_eq!((report.counts.leaked_blocks, report.counts.snapshots), (0, 0));
    }
}

#[test]
fn a_hold_ends_when_both_clocks_say_so() {
    let ram = store_with_holds(false);
    // The wall clock leaps by ten years; the store has been open for some seconds.
    let (later, device) = (WALL_START_NS + 10 * 365 * 86_400 * 1_000_000_000, ram.clone());
    run_at(later, 2, |runtime| async move {
        let (store, _) = open(&device, &runtime).await;
        runtime.sleep(HOUR / 2).await;
        assert_eq!(held(&store).await, [1, 2]);
        refused(&store, "web01@second").await;
        store.close().await.unwrap();
    });
    let device = ram.clone();
    // It leaps back: an hour of the store is over, and the date is not.
    run_at(WALL_START_NS - 86_400 * 1_000_000_000, 3, |runtime| async move {
        let (store, _) = open(&device, &runtime).await;
        runtime.sleep(HOUR).await;
        assert_eq!(held(&store).await, [1, 2]);
        store.close().await.unwrap();
    });
    run(4, |runtime| {
        let device = ram.clone();
        async move {
            let (store, _) = open(&device, &runtime).await;
            // Nobody looks, and then somebody deletes it in the moment in which it ends.
            runtime.sleep(HOUR - Duration::from_secs(5)).await;
            assert_eq!(held(&store).await, [1, 2]);
            runtime.sleep(Duration::from_secs(5)).await;
            removed(&store, "web01@second").await;
            runtime.sleep(Duration::from_secs(10)).await;
            assert_eq!(held(&store).await, [1]);
            let entry = store.info("web01").await.unwrap().ledger;
            store.close().await.unwrap();
            assert!(entry.is_some());
        }
    });
    assert_sound(&ram, 0);
    let anatomy = Anatomy::of(&ram);
    let last = ledger_of(&anatomy).pop().unwrap();
    assert_eq!((last.kind, last.number), (LedgerKind::Ended, SnapshotNumber::new(2)));
}

/// While a checkpoint was under way that takes a hold into the ledger, the head from before was shown as if
/// nothing came behind it: who noted it then had noted nothing of the hold.
#[test]
fn a_head_without_what_a_checkpoint_is_writing_says_so() {
    let ended = |store: &Store| {
        let store = store.clone();
        async move {
            let ledger = store.info("web01").await.unwrap().ledger;
            ledger.map(|end| (end.sequence, end.pending))
        }
    };
    with_gated_store(move |runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.snapshot("web01", Some("first")).await.unwrap();
        store.snapshot("web01", Some("second")).await.unwrap();
        store.hold("web01", "first", None).await.unwrap();
        assert_eq!(ended(&store).await, Some((1, 0)));
        // The checkpoint's nodes: what lies behind the log.
        gate.hold(
            |operation| matches!(operation, Operation::Write { at, .. } if at.get() >= EXTENTS),
        );
        let holding = store.clone();
        let held = runtime.spawn(async move { holding.hold("web01", "second", None).await });
        while gate.held() == 0 {
            runtime.sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(ended(&store).await, Some((1, 1)));
        gate.release();
        held.await.unwrap();
        assert_eq!(ended(&store).await, Some((2, 0)));
        store.close().await.unwrap();
    });
}

#[test]
fn a_hold_that_is_over_ends_though_nobody_asks() {
    let (ram, ()) = with_store(|runtime, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.snapshot("web01", None).await.unwrap();
        store.hold("web01", "1", Some("1h")).await.unwrap();
        runtime.sleep(HOUR + Duration::from_secs(10)).await;
        assert_eq!(held(&store).await, [0u64; 0]);
        store.checkpoint().await.unwrap();
        assert_eq!(store.info("web01").await.unwrap().ledger.unwrap().sequence, 2);
        removed(&store, "web01").await;
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

#[test]
fn a_hold_may_become_longer_and_not_shorter() {
    with_store(|_, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        store.snapshot("web01", Some("s")).await.unwrap();
        let until = async |text| store.hold("web01", "s", text).await.map(SnapshotNumber::get);
        assert_eq!(until(Some("1d")).await.unwrap(), 1);
        for shorter in ["1h", "2023-11-15"] {
            let error = until(Some(shorter)).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains("until 2023-11-15T22:13:20Z"), "{error}");
        }
        assert_eq!(until(Some("2d")).await.unwrap(), 1);
        assert_eq!(until(None).await.unwrap(), 1);
        assert!(until(Some("3d")).await.is_err());
        for nonsense in ["yesterday", "2023-11-14", "0s"] {
            assert!(until(Some(nonsense)).await.is_err(), "{nonsense}");
        }
        let error = store.hold("web01", "none", None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(store.info("web01").await.unwrap().ledger.unwrap().sequence, 3);
    });
}

/// Neither age, nor the end of a history, nor a full store takes a moment that is held.
#[test]
fn held_moments_outlive_their_history() {
    let ram = Ram::default();
    let device = ram.clone();
    run(1, |runtime| async move {
        Store::format(&device.device(STORE_BLOCKS), &runtime, &format_options()).await.unwrap();
        let (store, _) = open(&device, &runtime).await;
        store.create("web01", 1 << 30).await.unwrap();
        store.retain("web01", Retention::parse("24h").unwrap()).await.unwrap();
        let head = disk(&store, "web01").await;
        for round in 0..24u8 {
            for part in 0..16u64 {
                write(&head, part << 20, &vec![round; 1 << 20]).await;
                flush(&head).await;
                runtime.sleep(Duration::from_millis(20)).await;
            }
            if round == 1 {
                store.hold("web01", "0 seconds ago", None).await.unwrap();
            }
        }
        let [number] = held(&store).await[..] else { panic!("one is held") };
        let kept = async || listed(&store).await.len();
        assert!((2..200).contains(&kept().await), "the store was full");
        let moment = format!("web01@{number}");
        assert_eq!(read(&disk(&store, &moment).await, 15 << 20, 4096).await, [1; 4096]);
        store.retain("web01", Retention::parse("10s").unwrap()).await.unwrap();
        runtime.sleep(Duration::from_secs(60)).await;
        assert_eq!(
            kept().await,
            2,
            "the one that is held, and what it was when it was last written"
        );
        store.retain("web01", Retention::default()).await.unwrap();
        runtime.sleep(Duration::from_secs(60)).await;
        assert_eq!(held(&store).await, [number]);
        refused(&store, &moment).await;
        store.release_hold("web01", &number.to_string()).await.unwrap();
        runtime.sleep(Duration::from_secs(60)).await;
        assert_eq!(kept().await, 0, "what was released goes the way of the others");
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// A disk that a stream went into is not taken away with what is held of it.
#[test]
fn a_partial_disk_of_which_something_is_held_stays() {
    with_store(|_, store| async move {
        store.create("web01", 1 << 20).await.unwrap();
        store.snapshot("web01", None).await.unwrap();
        let base = listed(&store).await[0].uuid;
        store.create("web01.partial", 1 << 20).await.unwrap();
        store.snapshot("web01.partial", Some("s")).await.unwrap();
        store.hold("web01.partial", "s", None).await.unwrap();
        let received = Received {
            partial: "web01.partial".to_owned(),
            name: "web01".to_owned(),
            size_bytes: 1 << 20,
            label: None,
            uuid: base::SnapshotUuid([5; 16]),
            base: Some(base),
            force: false,
        };
        let error = store.complete_receive(&received).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert_eq!(store.info("web01").await.unwrap().snapshot_count, 1, "nothing was begun");
        store.release_hold("web01.partial", "s").await.unwrap();
        store.complete_receive(&received).await.unwrap();
    });
}

fn ledger_of(anatomy: &Anatomy) -> Vec<LedgerRecord> {
    let vdi = anatomy.vdi(1);
    let mut records = Vec::new();
    for page in anatomy.entries(vdi.ledger.entry) {
        for index in 0..LedgerRecord::PER_PAGE {
            records.extend(LedgerRecord::get(anatomy.node(page).block(), index).unwrap());
        }
    }
    assert_eq!(records.len(), vdi.ledger_count as usize);
    records
}

/// Changes a table of the VDI of a closed store, as who knows its key can.
fn forge(ram: &Ram, change: impl FnOnce(&Anatomy, &mut VdiRecord)) {
    let anatomy = Anatomy::of(ram);
    let mut slot = anatomy.slot().clone();
    let mut record = anatomy.vdi(1);
    change(&anatomy, &mut record);
    slot.roots.vdis =
        anatomy.replace_page(&slot.roots.vdis, |page| VdiRecord::set(page, 1, Some(&record)));
    anatomy.publish(&slot);
}

fn forge_snapshot(
    ram: &Ram,
    number: u64,
    change: impl FnOnce(SnapshotRecord) -> Option<SnapshotRecord>,
) {
    forge(ram, |anatomy, vdi| {
        let set = |page: &mut Block| {
            let changed = change(SnapshotRecord::get(page, number).unwrap().unwrap());
            vdi.snapshot_count -= u64::from(changed.is_none());
            SnapshotRecord::set(page, number, changed.as_ref());
        };
        vdi.snapshots = anatomy.replace_page(&vdi.snapshots.clone(), set);
    });
}

/// What the check finds, without and with repair: that changes nothing about it.
fn found(ram: &Ram) -> (Vec<FindingKind>, String) {
    let report = checked(ram, OPTIONS);
    let repaired = checked(ram, CheckOptions { repair: true, ..OPTIONS });
    assert_eq!(kinds(&repaired), kinds(&report), "{:?}", repaired.repairs);
    let messages: Vec<&str> = report.errors.iter().map(|it| it.message.as_str()).collect();
    (kinds(&report), messages.join("; "))
}

#[test]
fn the_check_tells_of_a_held_snapshot_that_is_missing_or_altered() {
    let ram = store_with_holds(true);
    forge_snapshot(&ram, 2, |_| None);
    let (kinds, message) = found(&ram);
    assert_eq!(kinds, [FindingKind::HeldMissing], "{message}");
    assert!(message.contains("web01@2 was held, and is missing"), "{message}");
    reopened(&ram, |_, store, _| async move {
        assert_eq!(held(&store).await, [1]);
        store.release_hold("web01", "2").await.unwrap();
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);

    let changes: [(&str, Alter); 6] = [
        ("label", |it| SnapshotRecord { label: "other".into(), ..it }),
        ("time", |it| SnapshotRecord { wall_ns: it.wall_ns + 1, ..it }),
        ("size", |it| SnapshotRecord { block_count: it.block_count + 1, ..it }),
        ("contents", |it| SnapshotRecord { root: RootRef::empty(1), ..it }),
        ("origin", |it| SnapshotRecord {
            origin: ondisk::Origin::Kept { changed_blocks: 1 },
            ..it
        }),
        ("hold", |it| SnapshotRecord { is_held: false, ..it }),
    ];
    for (what, change) in changes {
        let ram = store_with_holds(true);
        forge_snapshot(&ram, 1, |record| Some(change(record)));
        let (kinds, message) = found(&ram);
        assert_eq!(kinds, [FindingKind::HeldAltered], "{what}: {message}");
        assert!(message.starts_with("web01@1 "), "{message}");
    }
    let ram = store_with_holds(true);
    forge_snapshot(&ram, 3, |it| Some(SnapshotRecord { is_held: true, ..it }));
    assert_eq!(found(&ram).0, [FindingKind::Ledger], "nobody has held it");
}

#[test]
fn the_check_tells_of_a_broken_ledger() {
    let forge_record = |index: u64, change: fn(LedgerRecord) -> Option<LedgerRecord>| {
        let ram = store_with_holds(true);
        forge(&ram, |anatomy, vdi| {
            vdi.ledger = anatomy.replace_page(&vdi.ledger.clone(), |page| {
                let changed = change(LedgerRecord::get(page, index).unwrap().unwrap());
                LedgerRecord::set(page, index, changed.as_ref());
            });
        });
        found(&ram)
    };
    for index in 0..2 {
        let (kinds, message) = forge_record(index, |it| {
            Some(LedgerRecord { until: None, wall_ns: it.wall_ns - 1, ..it })
        });
        assert_eq!(kinds, [FindingKind::Ledger], "{message}");
        assert!(message.contains(&format!("record {} is not what it was", index + 1)));
        let (kinds, message) = forge_record(index, |_| None);
        assert_eq!(kinds, [FindingKind::Ledger], "{message}");
        assert!(message.contains("1 records are there, but there were 2"), "{message}");
    }
    // Who leaves the last record out everywhere has another head, which somebody may have noted.
    let ram = store_with_holds(true);
    let noted = noted_of(&ram);
    compare(&ram, &noted, "");
    forge(&ram, |anatomy, vdi| {
        let mut records = ledger_of(anatomy);
        let last = records.pop().unwrap();
        vdi.ledger = anatomy.replace_page(&vdi.ledger.clone(), |page| {
            LedgerRecord::set(page, last.sequence - 1, None);
        });
        vdi.ledger_head = records.last().unwrap().chain;
        vdi.ledger_count -= 1;
    });
    forge_snapshot(&ram, 2, |it| Some(SnapshotRecord { is_held: false, ..it }));
    assert_sound(&ram, 0);
    compare(&ram, &noted[..1], "");
    compare(&ram, &noted, "was noted up to record 2, and ends at 1");
}

/// Where the ledger ended after each of its records, as somebody noted it.
fn noted_of(ram: &Ram) -> Vec<String> {
    let records = ledger_of(&Anatomy::of(ram));
    records.iter().map(|record| format!("web01={}:{}", record.sequence, record.chain)).collect()
}

/// Checks a store that is closed, and once more while it is in use, against what was noted: the error that
/// contains `wrong`, or none.
fn compare(ram: &Ram, noted: &[String], wrong: &str) {
    let noted: Vec<NotedHead> = noted.iter().map(|it| NotedHead::parse(it).unwrap()).collect();
    let offline = checked_for(ram, OPTIONS, noted.clone());
    let online = reopened(ram, |_, store, _| async move {
        let report = store.check(false, None, noted, |_| {}).await.unwrap();
        store.close().await.unwrap();
        report
    });
    for report in [offline, online] {
        let said: Vec<&str> = report.errors.iter().map(|it| it.message.as_str()).collect();
        match wrong {
            "" => assert_eq!(said, [""; 0]),
            _ => assert!(said.len() == 1 && said[0].contains(wrong), "{said:?}"),
        }
    }
}

#[test]
fn what_was_noted_of_a_ledger_is_found_in_it_or_missed() {
    let ram = store_with_holds(true);
    let noted = noted_of(&ram);
    compare(&ram, &noted, "");
    compare(&ram, &[noted[1].to_ascii_uppercase().replace("WEB", "web")], "");
    let other = noted[1].replace("web01=2:", "web01=1:");
    compare(&ram, &[other], "record 1 of its ledger is not the one that was noted");
    compare(&ram, &[noted[0].replace("web01", "web02")], "there is no such disk");
    for nonsense in
        ["web01", "web01=2", "web01=2:3f9a", "=1:0123456789abcdef", "a=0:0123456789abcdef"]
    {
        let error = NotedHead::parse(nonsense).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{nonsense}");
    }
    let digits = |count: usize, record: u64| format!("web01={record}:{}", "0".repeat(count));
    for nonsense in [digits(63, 1), digits(65, 1), digits(64, 0), digits(64, u64::MAX)] {
        NotedHead::parse(&nonsense).unwrap_err();
    }
    // What was released since may have been removed since.
    reopened(&ram, |_, store, _| async move {
        store.release_hold("web01", "2").await.unwrap();
        store.close().await.unwrap();
    });
    let noted = noted.iter().map(|it| NotedHead::parse(it).unwrap()).collect();
    let report = checked_for(&ram, OPTIONS, noted);
    assert!(report.is_clean(), "{report:?}");
    let warned: Vec<&str> = report.warnings.iter().map(|it| it.message.as_str()).collect();
    assert_eq!(warned, ["web01: held at record 2 of its ledger, and released since: web01@2"]);
}

/// A page of the ledger rots: what was held is, until somebody releases it, and the loss is told of.
#[test]
fn a_damaged_ledger_costs_dates_and_no_hold() {
    for in_use in [false, true] {
        let ram = store_with_holds(false);
        let page = Anatomy::of(&ram).entries(Anatomy::of(&ram).vdi(1).ledger.entry)[0].pba();
        if !in_use {
            ram.rot(page);
        }
        let device = ram.clone();
        run(4, move |runtime| async move {
            let (store, _) = crate::open_with_cache(&device, &runtime, 0).await;
            assert_eq!(held(&store).await, [1, 2]);
            device.rot(page);
            // It is met, and written again.
            store.collect_garbage().await.unwrap();
            store.checkpoint().await.unwrap();
            let hold = listed(&store).await[1].hold.unwrap();
            assert_eq!(hold.until_ns.is_some(), in_use, "what was in memory is not lost");
            refused(&store, "web01").await;
            store.close().await.unwrap();
        });
        let report = checked(&ram, OPTIONS);
        assert!(report.is_clean(), "{report:?}");
        let warned: Vec<_> = report.warnings.iter().map(|it| it.kind).collect();
        assert_eq!(warned, if in_use { vec![] } else { vec![FindingKind::Ledger] });
        reopened(&ram, move |_, store, _| async move {
            assert_eq!(held(&store).await, [1, 2]);
            store.release_hold("web01", "1").await.unwrap();
            removed(&store, "web01@1").await;
            // Records that were lost are not given their numbers again: what was noted of one was not of
            // another.
            let sequence = store.info("web01").await.unwrap().ledger.unwrap().sequence;
            assert_eq!(sequence, if in_use { 3 } else { 2 + 3 + 1 });
            store.close().await.unwrap();
        });
        assert!(checked(&ram, OPTIONS).is_clean());
    }
}

/// The number of records of a ledger that nobody could have written made the record of the disk one that
/// made no sense, and the disk was lost.
#[test]
fn a_forged_number_of_records_costs_no_disk() {
    for forged in [0, 1, 5000, u32::MAX] {
        let ram = store_with_holds(true);
        forge(&ram, |_, vdi| vdi.ledger_count = forged);
        assert!(found(&ram).0.contains(&FindingKind::Ledger), "{forged}");
        reopened(&ram, |_, store, _| async move {
            assert_eq!(held(&store).await, [1, 2]);
            refused(&store, "web01").await;
            assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [4; 4096]);
            store.close().await.unwrap();
        });
    }
}

/// A ledger that is full is folded, and what holds is still known.
#[test]
fn a_ledger_is_bounded() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[1; 4096]).await;
        store.snapshot("web01", Some("first")).await.unwrap();
        store.snapshot("web01", Some("second")).await.unwrap();
        store.hold("web01", "first", None).await.unwrap();
        for _ in 0..2_100 {
            store.hold("web01", "second", None).await.unwrap();
            store.release_hold("web01", "second").await.unwrap();
        }
        assert_eq!(
            store.info("web01").await.unwrap().ledger.unwrap().sequence,
            4_201 + 3,
            "the fold, and two that were held"
        );
        assert_eq!(held(&store).await, [1]);
        store.collect_garbage().await.unwrap();
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
    let records = ledger_of(&Anatomy::of(&ram));
    assert!(records.len() < 200, "{}", records.len());
    assert_eq!((records[0].kind, records[0].sequence), (LedgerKind::Folded, 4_097));
    // Who makes a fold that names what was noted can leave out all that he likes.
    for digest in [records[0].digest, records[0].chain] {
        compare(&ram, &[format!("web01=4096:{digest}")], "is not there any more: it was folded");
    }
    compare(&ram, &[format!("web01=4097:{}", records[0].chain)], "");
    reopened(&ram, |_, store, _| async move {
        refused(&store, "web01@first").await;
        store.close().await.unwrap();
    });
}

/// What the store keeps of disks without rules of their own.
#[test]
fn a_store_has_a_history_for_disks_that_have_none() {
    let (ram, ()) = with_store(|runtime, store| async move {
        for name in ["before", "own", "none"] {
            store.create(name, 1 << 30).await.unwrap();
        }
        store.retain("own", Retention::parse("every 1h for 1d").unwrap()).await.unwrap();
        store.retain("none", Retention::default()).await.unwrap();
        store.retain_by_default(Retention::parse("24h").unwrap()).await.unwrap();
        store.create("behind", 1 << 30).await.unwrap();
        runtime.sleep(Duration::from_secs(1)).await;
        for name in ["before", "own", "none", "behind"] {
            let head = disk(&store, name).await;
            for round in 1..=3u8 {
                write(&head, 0, &[round; 4096]).await;
                flush(&head).await;
                runtime.sleep(Duration::from_millis(20)).await;
            }
        }
        runtime.sleep(Duration::from_secs(2)).await;
    });
    for round in 0..2 {
        reopened(&ram, move |runtime, store, _| async move {
            assert_eq!(store.default_retention().to_string(), "every flush for 1d");
            let mut all = Vec::new();
            for entry in store.list(None, 10).await.unwrap() {
                let rules = entry.retention.to_string();
                all.push((entry.name, rules, entry.has_own_retention, entry.moment_count));
            }
            let expected = [
                ("before", "every flush for 1d", false, 3),
                ("behind", "every flush for 1d", false, 3),
                ("none", "off", true, 0),
                ("own", "every 1h for 1d", true, 1),
            ];
            let expected = expected.map(|(name, rules, own, moments)| {
                (name.to_owned(), rules.to_owned(), own, moments)
            });
            assert_eq!(all, expected, "round {round}");
            if round == 0 {
                store.close().await.unwrap();
                return;
            }
            store.retain_by_default(Retention::default()).await.unwrap();
            store.inherit_retention("own").await.unwrap();
            runtime.sleep(Duration::from_secs(30)).await;
            for entry in store.list(None, 10).await.unwrap() {
                assert_eq!((entry.retention.is_off(), entry.moment_count), (true, 0));
            }
            store.close().await.unwrap();
        });
    }
    assert_sound(&ram, 0);
}
