//! The check of a store in use: silent while guests go on, and naming what is planted.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use base::ErrorKind;
use ondisk::{TableRecord, VdiRecord};
use parallax_vdi::Store;
use parallax_vdi::check::{CheckReport, CheckStage, FindingKind};

use crate::check::{Anatomy, kinds, small_store};
use crate::ram::{Ram, run};
use crate::scrub::{busy_store, turmoil};
use crate::{disk, open, write};

async fn check(store: &Store) -> CheckReport {
    store.check(true, Some(0), Vec::new(), |_| {}).await.unwrap()
}

fn checked(ram: &Ram) -> CheckReport {
    let ram = ram.clone();
    run(2, |runtime| async move {
        let (store, _) = open(&ram, &runtime).await;
        check(&store).await
    })
}

#[test]
fn nothing_is_cried_about_while_everything_changes() {
    for seed in 1..=4 {
        run(seed, move |runtime| async move {
            let device = Ram::default();
            let store = busy_store(&device, &runtime).await;
            let over = Rc::new(Cell::new(false));
            let guests =
                runtime.spawn(turmoil(runtime.clone(), store.clone(), seed, Rc::clone(&over)));
            let stages = Rc::new(RefCell::new(Vec::new()));
            for _ in 0..5 {
                let seen = Rc::clone(&stages);
                let tell = move |at: parallax_vdi::check::CheckProgress| {
                    seen.borrow_mut().push(at.stage);
                };
                let report = store.check(true, Some(32 << 20), Vec::new(), tell).await.unwrap();
                assert!(report.is_clean(), "{seed}: {:#?}", report.errors);
                assert_eq!(report.warnings, [], "{seed}");
                assert_eq!(report.counts.vdis, 2);
                assert!(report.counts.data_blocks > 1000, "{:?}", report.counts);
                assert!(report.counts.data_blocks_verified > 500, "{:?}", report.counts);
            }
            stages.borrow_mut().dedup();
            let all = [CheckStage::Tables, CheckStage::Vdis, CheckStage::Data];
            assert_eq!(stages.borrow()[..3], all);
            over.set(true);
            guests.await;
            // What was held back is free again, or the store would fill up.
            store.collect_garbage().await.unwrap();
            let head = disk(&store, "web01").await;
            for round in 0..20 {
                write(&head, 0, &vec![round; 1 << 20]).await;
                store.checkpoint().await.unwrap();
            }
            store.close().await.unwrap();
        });
    }
}

#[test]
fn planted_damage_is_named() {
    let ram = small_store(true);
    assert!(checked(&ram).is_clean());
    // Data, and a node.
    let anatomy = Anatomy::of(&ram);
    let path = anatomy.path(&anatomy.vdi(1).root);
    let data = ram.copy();
    data.rot(path.last().unwrap().pba());
    let report = checked(&data);
    assert_eq!(kinds(&report), [FindingKind::Data]);
    let message = &report.errors[0].message;
    assert!(message.starts_with("web01, web01@2, bytes 0 to 4095: block "), "{message}");
    assert!(message.ends_with(" of the store does not verify"), "{message}");
    let node = ram.copy();
    node.rot(path[1].pba());
    let report = checked(&node);
    assert_eq!(kinds(&report), [FindingKind::Metadata]);
    assert_eq!(report.errors.len(), 1, "both walks find it: {:#?}", report.errors);
    // A copy of the superblock, under the daemon.
    run(3, |runtime| async move {
        let (store, _) = open(&ram, &runtime).await;
        ram.rot(ondisk::SUPERBLOCK_COPIES[1]);
        assert_eq!(kinds(&check(&store).await), [FindingKind::Superblock]);
    });
}

/// It took a pass that was under way for its own, which had read most of the store before.
#[test]
fn what_a_pass_under_way_has_read_is_read_again() {
    let ram = small_store(true);
    run(4, |runtime| async move {
        let (store, _) = open(&ram, &runtime).await;
        let pass = store.begin_scrub(Some(1 << 20));
        let left = || store.scrub_status().total_blocks - store.scrub_status().done_blocks;
        while store.scrub_status().total_blocks == 0 || left() > 20 {
            runtime.sleep(std::time::Duration::from_millis(10)).await;
        }
        ram.rot(ram.filled_with(6).unwrap());
        let report = check(&store).await;
        assert_eq!(kinds(&report), [FindingKind::Data]);
        let passes = (store.scrub_status().pass, store.scrubbed(pass).await.pass);
        assert_eq!(passes, (pass + 1, pass + 1), "one that it began itself");
    });
}

#[test]
fn what_does_not_agree_is_named() {
    let ram = small_store(true);
    let anatomy = Anatomy::of(&ram);
    // A block that is reached, and that the bitmaps say is free.
    let free = *anatomy.path(&anatomy.vdi(1).root).last().unwrap();
    let mut slot = anatomy.slot().clone();
    slot.roots.bitmaps = anatomy.replace_page(&slot.roots.bitmaps, |page| {
        page.0[(free.pba().get() % 32_768 / 8) as usize] &= !(1 << (free.pba().get() % 8));
    });
    // A count of snapshots that is not theirs.
    let record = VdiRecord { snapshot_count: 7, ..anatomy.vdi(1) };
    slot.roots.vdis =
        anatomy.replace_page(&slot.roots.vdis, |page| VdiRecord::set(page, 1, Some(&record)));
    anatomy.publish(&slot);
    let report = checked(&ram);
    let expected = [FindingKind::ReachedButFree, FindingKind::ReachedButFree, FindingKind::Record];
    let mut found: Vec<_> = report.errors.iter().map(|finding| finding.kind).collect();
    found.sort_by_key(|kind| format!("{kind:?}"));
    assert_eq!(found, expected, "{:#?}", report.errors);
    assert!(report.errors.iter().any(|finding| finding.message.contains("the daemon holds them")));
}

/// Who needs space waited for the end of the check.
#[test]
fn a_check_gives_way_to_who_needs_space() {
    run(5, |runtime| async move {
        let device = Ram::default();
        let store = busy_store(&device, &runtime).await;
        store.create("big", 1 << 30).await.unwrap();
        let big = disk(&store, "big").await;
        let mut refused = 0;
        for index in 0..200u64 {
            let (checked, answer) = (store.clone(), Rc::new(RefCell::new(None)));
            let slot = Rc::clone(&answer);
            let check = runtime.spawn(async move {
                *slot.borrow_mut() = Some(checked.check(false, None, Vec::new(), |_| {}).await);
            });
            let data = base::Buffer::from_bytes(&vec![9; 1 << 20]);
            let offset = (index % 40) << 20;
            let request = disk::Request::Write { offset, length: 1 << 20, data, fua: false };
            big.submit(request).await.unwrap();
            check.await;
            match answer.take().unwrap() {
                Ok(report) => assert!(report.is_clean(), "{:#?}", report.errors),
                Err(error) => {
                    assert!(
                        matches!(error.kind(), ErrorKind::Busy | ErrorKind::NoSpace),
                        "{error}"
                    );
                    refused += 1;
                }
            }
        }
        assert!(refused < 200, "{refused}");
        store.close().await.unwrap();
    });
}
