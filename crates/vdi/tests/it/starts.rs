//! Clones and rollbacks start at any write that is kept.

use std::time::Duration;

use base::{Buffer, ErrorKind, Lsn, SnapshotNumber, VdiId};
use device::Operation;
use disk::Request;
use ondisk::RecordBody;
use parallax_vdi::{FormatOptions, OpenOptions, Retention, Store, Target};
use runtime::Runtime;

use crate::check::{Anatomy, assert_sound, forge_records};
use crate::gate::{Gate, with_gated_store};
use crate::ram::{Ram, run};
use crate::stuck::writes_data;
use crate::writes::{RULES, assert_each, at, disk_that_keeps, moments, writes};
use crate::{
    STORE_BLOCKS, diff, disk, format_options, open, open_options, read, reopened, with_store, write,
};

/// Writes each of these bytes to block 0; the LSNs of all writes that are kept then.
async fn write_each(store: &Store, bytes: impl IntoIterator<Item = u8>) -> Vec<Lsn> {
    let head = disk(store, "web01").await;
    for byte in bytes {
        write(&head, 0, &[byte; 4096]).await;
        write(&head, u64::from(byte) << 13, &[byte; 4096]).await;
    }
    store.checkpoint().await.unwrap();
    lsns(store).await
}

/// LSNs of all writes of block 0 that are kept.
async fn lsns(store: &Store) -> Vec<Lsn> {
    let all = writes(store).await;
    all.iter().filter(|write| write.offset == 0).map(|write| write.lsn).collect()
}

/// The moment that keeps a write.
async fn moment_of(store: &Store, lsn: Lsn) -> u64 {
    for number in moments(store).await {
        let kept = store.writes("web01", &number.to_string()).await;
        if kept.is_ok_and(|kept| kept.iter().any(|write| write.lsn == lsn)) {
            return number;
        }
    }
    panic!("none keeps lsn:{lsn}")
}

async fn clone_at(store: &Store, lsn: Lsn, name: &str) -> Result<VdiId, parallax_vdi::Error> {
    store.clone_vdi(&Target::parse(&format!("web01@lsn:{lsn}")), name).await
}

async fn rollback_to(store: &Store, lsn: Lsn) {
    store.rollback("web01", &format!("lsn:{lsn}")).await.unwrap();
}

/// A disk holds what the writes of these bytes up to one have left.
async fn assert_holds(store: &Store, name: &str, byte: u8) {
    let disk = disk(store, name).await;
    assert_eq!(read(&disk, 0, 4096).await, [byte; 4096], "{name}");
    let last = read(&disk, u64::from(byte) << 13, 4096).await;
    let next = read(&disk, u64::from(byte + 1) << 13, 4096).await;
    // The write of block 0 comes first.
    assert_eq!((last, next), (vec![0; 4096], vec![0; 4096]), "{name}");
    if byte > 1 {
        let before = read(&disk, u64::from(byte - 1) << 13, 4096).await;
        assert_eq!(before, [byte - 1; 4096], "{name}");
    }
}

/// At once, after a checkpoint, after a collection, and when the store was opened again; and the moment keeps
/// its writes.
#[test]
fn any_write_that_is_kept_can_be_cloned() {
    let (ram, ()) = with_store(|_, store| async move {
        disk_that_keeps(&store, RULES).await;
        let lsns = write_each(&store, 1..=60).await;
        for (index, byte) in [(0, 1u8), (29, 30), (58, 59)] {
            let name = format!("fix{byte}");
            clone_at(&store, lsns[index], &name).await.unwrap();
            assert_holds(&store, &name, byte).await;
        }
        let head = disk(&store, "fix30").await;
        write(&head, 5 << 20, &[99; 4096]).await;
        store.checkpoint().await.unwrap();
        store.collect_garbage().await.unwrap();
        for byte in [1, 30, 59] {
            assert_holds(&store, &format!("fix{byte}"), byte).await;
        }
        assert_each(&store, &(1..=60).collect::<Vec<u8>>()).await;
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
    reopened(&ram, |_, store, _| async move {
        assert_eq!(read(&disk(&store, "fix30").await, 5 << 20, 4096).await, [99; 4096]);
        assert_holds(&store, "fix30", 30).await;
        assert_each(&store, &(1..=60).collect::<Vec<u8>>()).await;
        // The clones have all that they need.
        store.remove(&Target::parse("web01")).await.unwrap();
        store.checkpoint().await.unwrap();
        store.collect_garbage().await.unwrap();
        assert_holds(&store, "fix59", 59).await;
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// A rollback leaves the writes that it goes back over in the history, and a later one goes to them, or to one
/// before another rollback.
#[test]
fn a_disk_goes_back_to_any_write() {
    let (ram, ()) = with_store(|_, store| async move {
        disk_that_keeps(&store, RULES).await;
        let lsns = write_each(&store, 1..=20).await;
        rollback_to(&store, lsns[9]).await;
        assert_holds(&store, "web01", 10).await;
        let head = disk(&store, "web01").await;
        write(&head, 0, &[50; 4096]).await;
        write(&head, 0, &[51; 4096]).await;
        rollback_to(&store, lsns[14]).await;
        assert_holds(&store, "web01", 15).await;
        store.checkpoint().await.unwrap();
        let all = self::lsns(&store).await;
        assert_eq!(all.len(), 22);
        rollback_to(&store, all[20]).await;
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [50; 4096]);
        let gone = disk(&store, "web01").await;
        rollback_to(&store, lsns[2]).await;
        assert!(gone.severed());
        // Over a change of size.
        store.resize("web01", 1 << 29).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[60; 4096]).await;
        rollback_to(&store, lsns[4]).await;
        let head = disk(&store, "web01").await;
        assert_eq!(head.size_bytes(), 1 << 30);
        assert_holds(&store, "web01", 5).await;
    });
    reopened(&ram, |_, store, _| async move {
        assert_holds(&store, "web01", 5).await;
        assert_eq!(lsns(&store).await.len(), 23);
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// The record alone, with what followed it before a checkpoint: the moment was deleted, its disk was, the clone
/// was cloned, written and deleted.
#[test]
fn a_clone_of_a_write_survives_a_crash() {
    for step in 0..5 {
        let (ram, ()) = with_store(move |_, store| async move {
            disk_that_keeps(&store, RULES).await;
            let lsns = write_each(&store, 1..=20).await;
            clone_at(&store, lsns[9], "fix").await.unwrap();
            match step {
                1 => {
                    for number in moments(&store).await {
                        store.remove(&Target::parse(&format!("web01@{number}"))).await.unwrap();
                    }
                }
                2 => store.remove(&Target::parse("web01")).await.unwrap(),
                3 => {
                    store.clone_vdi(&Target::parse("fix"), "again").await.unwrap();
                    write(&disk(&store, "fix").await, 0, &[99; 4096]).await;
                    store.remove(&Target::parse("fix")).await.unwrap();
                    store.rename("again", "fix").await.unwrap();
                }
                4 => {
                    rollback_to(&store, lsns[14]).await;
                    store.remove(&Target::parse("fix")).await.unwrap();
                    store.rename("web01", "fix").await.unwrap();
                    store.rollback("fix", &format!("lsn:{}", lsns[9])).await.unwrap();
                }
                _ => {}
            }
        });
        for _ in 0..2 {
            // Once more from the same log, and then from what a checkpoint has made of it.
            reopened(&ram, move |_, store, _| async move {
                assert_holds(&store, "fix", 10).await;
            });
        }
        reopened(&ram, move |_, store, _| async move {
            store.checkpoint().await.unwrap();
            store.collect_garbage().await.unwrap();
            assert_holds(&store, "fix", 10).await;
            store.close().await.unwrap();
        });
        assert_sound(&ram, 0);
    }
}

/// The moment is published, and then the slot that has it is lost: replay finds it in the log, too.
#[test]
fn a_clone_of_a_write_survives_the_loss_of_the_newest_slot() {
    let (ram, ()) = with_store(|runtime, store| async move {
        let head = disk_that_keeps(&store, RULES).await;
        store.checkpoint().await.unwrap();
        // Fewer than a checkpoint is due for.
        for byte in 1..=5u8 {
            write(&head, 0, &[byte; 4096]).await;
            write(&head, u64::from(byte) << 13, &[byte; 4096]).await;
            if byte == 3 {
                head.submit(Request::Flush).await.unwrap();
                runtime.sleep(Duration::from_millis(1500)).await;
            }
        }
        head.submit(Request::Flush).await.unwrap();
        runtime.sleep(Duration::from_millis(1500)).await;
        let before = store.stats().checkpoints;
        // With one checkpoint.
        let lsns = lsns(&store).await;
        assert_eq!((lsns.len(), store.stats().checkpoints), (5, before + 1));
        clone_at(&store, lsns[1], "fix").await.unwrap();
        clone_at(&store, lsns[1], "too").await.unwrap();
        let moment = moments(&store).await[0];
        store.clone_vdi(&Target::parse(&format!("web01@{moment}")), "moment").await.unwrap();
        clone_at(&store, lsns[0], "early").await.unwrap();
        clone_at(&store, lsns[3], "late").await.unwrap();
        assert_eq!(store.stats().checkpoints, before + 1);
    });
    let Anatomy { geometry, pair, .. } = Anatomy::of(&ram);
    ram.rot(geometry.host_slot(pair.newest.host, pair.copy));
    reopened(&ram, |_, store, report| async move {
        assert!(!report.alarms.is_empty(), "{report:?}");
        for checkpoint in [false, true] {
            for (name, byte) in [("fix", 2), ("too", 2), ("early", 1), ("late", 4)] {
                assert_holds(&store, name, byte).await;
            }
            assert_eq!(read(&disk(&store, "moment").await, 0, 4096).await[0], 3);
            if !checkpoint {
                store.checkpoint().await.unwrap();
                store.collect_garbage().await.unwrap();
            }
        }
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// A checkpoint that is under way makes a tree of the moment in place of its history: what is published then
/// has no such write, so a record that names it would name nothing after a crash.
#[test]
fn a_write_that_is_being_forgotten_is_not_cloned() {
    let (ram, ()) = with_gated_store(|runtime, gate, store| async move {
        disk_that_keeps(&store, RULES).await;
        let lsns = write_each(&store, 1..=20).await;
        let moment = moment_of(&store, lsns[9]).await;
        gate.hold(writes_data);
        let comparing = store.clone();
        let compared = runtime.spawn(async move {
            let [from, to] = ["web01".to_owned(), format!("web01@{moment}")];
            diff(&comparing, &Target::parse(&from), &Target::parse(&to)).await.unwrap();
        });
        runtime.sleep(Duration::from_millis(100)).await;
        assert!(gate.held() > 0, "the tree is being written");
        let error = clone_at(&store, lsns[9], "fix").await.expect_err("it goes");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        let error = store.rollback("web01", &format!("lsn:{}", lsns[9])).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        gate.release();
        compared.await;
    });
    reopened(&ram, |_, store, _| async move {
        assert!(store.info("fix").await.is_err());
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [20; 4096]);
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// The table of snapshots is damaged, so that a checkpoint writes all of them. At some step of it, a write is
/// cloned, and then somebody wants a tree of the moment: what is published has its history, of which the clone
/// is made after a crash.
#[test]
fn who_wants_a_tree_later_takes_no_history_from_a_clone() {
    for step in 0..48 {
        let ram = Ram::default();
        let gate = Gate::new(ram.backend(STORE_BLOCKS));
        let device = ram.clone();
        run(1, move |runtime| async move {
            Store::format(&gate.device(), &runtime, &format_options()).await.unwrap();
            // Nothing is kept in memory, so that damage is met.
            let options = OpenOptions { cache_bytes: 0, ..open_options(1) };
            let opened = Store::open(gate.device(), runtime.clone(), &options).await;
            let (store, _) = opened.unwrap();
            let head = disk_that_keeps(&store, RULES).await;
            store.create("db01", 1 << 30).await.unwrap();
            let db01 = disk(&store, "db01").await;
            for leaf in 0..6u64 {
                write(&db01, leaf << 24, &[1; 4096]).await;
            }
            let lsns = write_each(&store, 1..=4).await;
            let moment = moment_of(&store, lsns[1]).await;
            let anatomy = Anatomy::of(&device);
            let table = anatomy.vdi(1).snapshots;
            assert_eq!(table.height, 1);
            device.rot(anatomy.entries(table.entry)[0].pba());
            write(&head, 0, &[5; 4096]).await;
            // Nodes of it are read before records of snapshots are written.
            for leaf in 0..6u64 {
                write(&db01, leaf << 24, &[2; 4096]).await;
            }
            gate.hold(|operation| {
                writes_data(operation) || matches!(operation, Operation::Read { .. })
            });
            let before = store.stats().checkpoints;
            let publishing = store.clone();
            drop(runtime.spawn(async move { publishing.checkpoint().await.unwrap() }));
            let pass = async || {
                runtime.sleep(Duration::from_millis(1)).await;
                gate.pass_one();
            };
            for _ in 0..step {
                pass().await;
            }
            clone_at(&store, lsns[1], "fix").await.unwrap();
            let comparing = store.clone();
            drop(runtime.spawn(async move {
                let [from, to] = ["web01".to_owned(), format!("web01@{moment}")];
                diff(&comparing, &Target::parse(&from), &Target::parse(&to)).await.unwrap();
            }));
            while store.stats().checkpoints == before {
                pass().await;
            }
        });
        reopened(&ram, move |_, store, _| async move {
            assert!(store.open_disk(&Target::parse("fix")).await.is_ok(), "step {step}");
            assert_holds(&store, "fix", 2).await;
            store.close().await.unwrap();
        });
        assert_sound(&ram, 0);
    }
}

/// A store with a log that no checkpoint is due for.
async fn with_long_log(ram: &Ram, runtime: &Runtime) -> Store {
    let options = FormatOptions { log_bytes: Some(8 << 20), ..format_options() };
    Store::format(&ram.device(STORE_BLOCKS), runtime, &options).await.unwrap();
    open(ram, runtime).await.0
}

/// Clones that were made before a checkpoint share a tree. Those that come later have one of their own: the
/// other goes with its clones.
#[test]
fn many_clones_of_a_write_share_a_tree() {
    let ram = Ram::default();
    let device = ram.clone();
    run(1, move |runtime| async move {
        let store = with_long_log(&device, &runtime).await;
        disk_that_keeps(&store, RULES).await;
        let lsns = write_each(&store, 1..=200).await;
        let nodes_of = async |count: u32, prefix: &str| {
            let before = store.stats();
            for number in 0..count {
                clone_at(&store, lsns[99], &format!("{prefix}{number}")).await.unwrap();
            }
            assert_eq!(store.stats().checkpoints, before.checkpoints);
            store.checkpoint().await.unwrap();
            store.stats().nodes_written - before.nodes_written
        };
        let (one, all) = (nodes_of(1, "one").await, nodes_of(100, "fix").await);
        // The tables have more pages.
        assert!(all < one + 40, "{one} nodes for one, {all} for a hundred");
        for number in 0..100 {
            store.remove(&Target::parse(&format!("fix{number}"))).await.unwrap();
        }
        store.remove(&Target::parse("one0")).await.unwrap();
        store.checkpoint().await.unwrap();
        assert!(store.collect_garbage().await.unwrap().freed_blocks > 0);
        nodes_of(1, "again").await;
        assert_holds(&store, "again0", 100).await;
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// A moment that is cloned as a whole, by its number or a time, goes on to keep its writes.
#[test]
fn a_moment_that_is_cloned_keeps_its_writes() {
    let (ram, ()) = with_store(|runtime, store| async move {
        let head = disk_that_keeps(&store, RULES).await;
        for byte in 1..=8u8 {
            write(&head, 0, &[byte; 4096]).await;
        }
        head.submit(Request::Flush).await.unwrap();
        runtime.sleep(Duration::from_millis(1500)).await;
        // No checkpoint has met it.
        let moment = Target::parse(&format!("web01@{}", moments(&store).await[0]));
        store.clone_vdi(&moment, "copy").await.unwrap();
        store.checkpoint().await.unwrap();
        store.clone_vdi(&moment, "again").await.unwrap();
        store.rollback("web01", &moment.snapshot.clone().unwrap()).await.unwrap();
        store.checkpoint().await.unwrap();
        assert_each(&store, &(1..=8).collect::<Vec<u8>>()).await;
        for name in ["copy", "again", "web01"] {
            assert_eq!(read(&disk(&store, name).await, 0, 4096).await, [8; 4096], "{name}");
        }
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// What cannot be done with a write says what can.
#[test]
fn a_write_is_no_snapshot() {
    with_store(|_, store| async move {
        disk_that_keeps(&store, RULES).await;
        let lsn = write_each(&store, 1..=3).await[1];
        let (write, head) = (format!("lsn:{lsn}"), Target::parse("web01"));
        let target = Target::parse(&format!("web01@{write}"));
        let refusals = [
            store.diff(&target, &head, 0, 1).await.err(),
            store.diff(&head, &target, 0, 1).await.err(),
            store.mapped(&target, 0, 1).await.err(),
            store.space(&target).await.err(),
            store.hold("web01", &write, None).await.err(),
            store.release_hold("web01", &write).await.err(),
            store.remove(&target).await.err(),
            store.snapshot_info("web01", &write).await.err(),
            store.writes("web01", &write).await.err(),
        ];
        for (index, error) in refusals.into_iter().enumerate() {
            let error = error.unwrap_or_else(|| panic!("{index} is done"));
            assert_eq!(error.kind(), ErrorKind::NotFound, "{index}: {error}");
            let advice = format!("parallax clone {target} NEW");
            assert!(error.to_string().contains(&advice), "{index}: {error}");
        }
        let error = clone_at(&store, Lsn::new(1 << 40), "fix").await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        let error = clone_at(&store, Lsn::new(0), "fix").await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(error.to_string().contains("parallax log web01 --writes"), "{error}");
    });
}

/// A store whose log has one more record behind it.
fn forged(ram: &Ram, record: (u64, RecordBody), check: &'static str) {
    let ram = ram.copy();
    forge_records(&ram, vec![record]);
    reopened(&ram, move |_, store, _| async move {
        let error = store.open_disk(&Target::parse(check)).await.err().expect("it is lost");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        store.remove(&Target::parse(check)).await.unwrap();
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// A record that names a position that the snapshot does not keep names nothing, as one that names no snapshot.
#[test]
fn a_record_of_what_is_not_kept_loses_what_it_makes() {
    let (ram, (last, from, to)) = with_store(|_, store| async move {
        disk_that_keeps(&store, RULES).await;
        store.snapshot("web01", Some("asked")).await.unwrap();
        let lsns = write_each(&store, 1..=4).await;
        let last = moments(&store).await.last().copied().unwrap();
        (last, lsns[0], lsns[3].plus(2))
    });
    let number = SnapshotNumber::new;
    for (snapshot, position) in [
        (last, 1),
        (last, to.get()),
        (last, to.get() + 1),
        (last, (1 << 56) - 1),
        (last, 0),
        (1, from.get() + 5),
        (77, from.get() + 5),
        (0, from.get() + 5),
    ] {
        let (snapshot, position) = (number(snapshot), Some(Lsn::new(position)));
        let (source, name) = (VdiId::new(1), "new".to_owned());
        let clone = RecordBody::Clone { source, snapshot, position, wall_ns: 0, name };
        forged(&ram, (9, clone), "new");
        forged(&ram, (1, RecordBody::Rollback { number: snapshot, position }), "web01");
    }
    // By itself it is one like any other.
    let position = Some(from.plus(1));
    forge_records(&ram, vec![(1, RecordBody::Rollback { number: number(last), position })]);
    reopened(&ram, |_, store, _| async move {
        assert_holds(&store, "web01", 1).await;
    });
}

/// The tree is reserved before the record is written: a clone that a full store has no room for is refused, and
/// one that was made does not keep a checkpoint from its end.
#[test]
fn a_full_store_refuses_a_clone_or_makes_its_tree() {
    clones_on_a_full_store(false);
}

/// As many of them at once as at other times one after the other: all find the same room.
#[test]
fn a_full_store_refuses_clones_at_once_or_makes_their_trees() {
    clones_on_a_full_store(true);
}

fn clones_on_a_full_store(are_at_once: bool) {
    /// Blocks that are changed, each below a node of its own.
    const LEAVES: u64 = 1500;
    let ram = Ram::default();
    let device = ram.clone();
    run(1, move |runtime| async move {
        let store = with_long_log(&device, &runtime).await;
        store.create("web01", 4 << 30).await.unwrap();
        store.retain("web01", Retention::parse(RULES).unwrap()).await.unwrap();
        let head = disk(&store, "web01").await;
        for byte in 1..=3u8 {
            for leaf in 0..LEAVES {
                write(&head, leaf << 20, &[byte; 4096]).await;
            }
        }
        store.checkpoint().await.unwrap();
        let all = writes(&store).await;
        let lsns: Vec<Lsn> = all.iter().map(|write| write.lsn).collect();
        let number = usize::try_from(LEAVES).unwrap();
        // They are open, so that no full store takes them.
        let mut open = Vec::new();
        for step in 0..20 {
            open.push(at(&store, lsns[number + 70 * step]).await.unwrap());
        }
        store.create("filler", 4 << 30).await.unwrap();
        let filler = disk(&store, "filler").await;
        let mut filled = 0;
        let write_of = |offset| {
            let data = Buffer::from_bytes(&vec![9; 1 << 16]);
            Request::Write { offset, length: 1 << 16, data, fua: false }
        };
        while filler.submit(write_of(filled)).await.is_ok() {
            filled += 1 << 16;
        }
        let (mut made, mut refused) = (Vec::new(), 0);
        let mut begun = Vec::new();
        for step in 0..20 {
            let lsn = lsns[number + 70 * step];
            let of_store = store.clone();
            let clone =
                runtime.spawn(async move { clone_at(&of_store, lsn, &format!("fix{step}")).await });
            begun.push(match are_at_once {
                true => (step, Err(clone)),
                false => (step, Ok(clone.await)),
            });
        }
        for (step, clone) in begun {
            let outcome = match clone {
                Ok(outcome) => outcome,
                Err(clone) => clone.await,
            };
            match outcome {
                Ok(_) => made.push(step),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                    refused += 1;
                }
            }
        }
        store.checkpoint().await.expect("there is room for what was made");
        assert!(refused > 0, "{made:?}");
        store.remove(&Target::parse("filler")).await.unwrap();
        drop(filler);
        store.collect_garbage().await.unwrap();
        for step in 0..20 {
            if !made.contains(&step) {
                let lsn = lsns[number + 70 * step];
                clone_at(&store, lsn, &format!("fix{step}")).await.unwrap();
            }
            let fix = disk(&store, &format!("fix{step}")).await;
            let last = 70 * step as u64;
            for (leaf, byte) in [(0, 2), (last, 2), (last + 1, 1), (LEAVES - 1, 1)] {
                assert_eq!(read(&fix, leaf << 20, 4096).await, [byte; 4096], "{step}: {leaf}");
            }
        }
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}
