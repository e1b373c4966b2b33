//! What was received into a disk of its own becomes a snapshot of the disk that it was meant for.

use base::{ErrorKind, SnapshotNumber, SnapshotUuid};
use parallax_vdi::{Received, SnapshotEntry, Store, Target};

use crate::check::assert_sound;
use crate::{diff, disk, read, reopened, with_store, write};

const MIB: u64 = 1 << 20;

/// One block more than the snapshot, as receivers have it.
const MORE: u64 = 4096;

fn received(name: &str, uuid: u8, base: Option<u8>) -> Received {
    Received {
        partial: format!("{name}.partial"),
        name: name.to_owned(),
        size_bytes: MIB,
        label: Some(format!("snap{uuid}")),
        uuid: SnapshotUuid([uuid; 16]),
        base: base.map(|base| SnapshotUuid([base; 16])),
        force: false,
    }
}

async fn snapshots(store: &Store, name: &str) -> Vec<SnapshotEntry> {
    store.snapshots(name, SnapshotNumber::new(0), 100).await.unwrap()
}

async fn uuids(store: &Store, name: &str) -> Vec<u8> {
    snapshots(store, name).await.into_iter().map(|snapshot| snapshot.uuid.0[0]).collect()
}

/// Receives a whole disk whose first block is `byte`.
async fn receive_all(store: &Store, name: &str, byte: u8) {
    let partial = format!("{name}.partial");
    store.create(&partial, MIB + MORE).await.unwrap();
    write(&disk(store, &partial).await, 0, &[byte; 4096]).await;
    write(&disk(store, &partial).await, MIB, &[0xee; 4096]).await;
    store.complete_receive(&received(name, byte, None)).await.unwrap();
}

/// Receives what makes the block number `byte` full of it.
async fn receive_more(store: &Store, name: &str, base: u8, byte: u8) {
    prepare_more(store, name, base, byte).await;
    store.complete_receive(&received(name, byte, Some(base))).await.unwrap();
}

async fn prepare_more(store: &Store, name: &str, base: u8, byte: u8) {
    let partial = format!("{name}.partial");
    let source = Target { vdi: name.to_owned(), snapshot: Some(format!("snap{base}")) };
    store.clone_vdi(&source, &partial).await.unwrap();
    store.resize(&partial, MIB + MORE).await.unwrap();
    let partial = disk(store, &partial).await;
    write(&partial, 4096 * u64::from(byte), &[byte; 4096]).await;
    write(&partial, MIB, &[0xee; 4096]).await;
}

/// The blocks of a disk that have their number in them, and whether the first has the one it should.
async fn blocks(store: &Store, name: &str) -> Vec<u8> {
    let disk = disk(store, name).await;
    assert_eq!(disk.size_bytes(), MIB);
    let mut blocks = Vec::new();
    for number in 1..8 {
        if read(&disk, 4096 * u64::from(number), 4096).await == [number; 4096] {
            blocks.push(number);
        }
    }
    blocks
}

#[test]
fn a_chain_of_streams_makes_a_disk_with_its_snapshots() {
    let check = |store: Store| async move {
        assert_eq!(uuids(&store, "web01").await, [1, 2, 3]);
        let labels: Vec<_> =
            snapshots(&store, "web01").await.into_iter().map(|it| it.label).collect();
        assert_eq!(labels, ["snap1", "snap2", "snap3"].map(|label| Some(label.to_owned())));
        let expected: [(&str, &[u8]); 4] = [
            ("web01", &[2, 3]),
            ("web01@snap1", &[]),
            ("web01@snap2", &[2]),
            ("web01@snap3", &[2, 3]),
        ];
        for (name, expected) in expected {
            assert_eq!(blocks(&store, name).await, expected, "{name}");
            let first = read(&disk(&store, name).await, 0, 4096).await;
            assert_eq!(first, [1; 4096], "{name}");
        }
        let names: Vec<_> =
            store.list(None, 10).await.unwrap().into_iter().map(|it| it.name).collect();
        assert_eq!(names, ["web01"], "no partial disk is left");
        store
    };
    // With a checkpoint at every place: what a disk is built on has a tree by then, or not.
    for checkpoint_before in 0..4 {
        let (ram, ()) = with_store(move |_, store| async move {
            let checkpoint = |number| {
                let store = store.clone();
                async move {
                    if number == checkpoint_before {
                        store.checkpoint().await.unwrap();
                    }
                }
            };
            checkpoint(0).await;
            receive_all(&store, "web01", 1).await;
            checkpoint(1).await;
            receive_more(&store, "web01", 1, 2).await;
            checkpoint(2).await;
            receive_more(&store, "web01", 2, 3).await;
            checkpoint(3).await;
            check(store).await;
        });
        assert_sound(&ram, 2);
        reopened(&ram, move |_, store, _| async move {
            let store = check(store).await;
            store.checkpoint().await.unwrap();
            let store = check(store).await;
            store.collect_garbage().await.unwrap();
            check(store).await.close().await.unwrap();
        });
        assert_sound(&ram, 3);
        reopened(&ram, move |_, store, report| async move {
            assert!(report.clean);
            let store = check(store).await;
            // It is a disk like any other.
            write(&disk(&store, "web01").await, 7 * 4096, &[7; 4096]).await;
            store.rollback("web01", "snap2").await.unwrap();
            assert_eq!(blocks(&store, "web01").await, [2]);
            for snapshot in ["web01@snap1", "web01@snap3"] {
                store.remove(&Target::parse(snapshot)).await.unwrap();
            }
            store.collect_garbage().await.unwrap();
            assert_eq!(blocks(&store, "web01@snap2").await, [2]);
        });
    }
}

#[test]
fn whoever_has_the_disk_open_is_told_that_it_is_another() {
    with_store(|_, store| async move {
        receive_all(&store, "web01", 1).await;
        let before = disk(&store, "web01").await;
        let identity = before.identity();
        receive_more(&store, "web01", 1, 2).await;
        assert!(before.severed());
        assert_ne!(identity, disk(&store, "web01").await.identity());
    });
}

#[test]
fn a_stream_goes_onto_what_it_builds_on_alone() {
    with_store(|_, store| async move {
        let refused = |received: Received, kind: ErrorKind| {
            let store = store.clone();
            async move {
                let error = store.complete_receive(&received).await.unwrap_err();
                assert_eq!(error.kind(), kind, "{error}");
                assert!(disk(&store, &received.partial).await.size_bytes() > MIB, "it is kept");
            }
        };
        receive_all(&store, "web01", 1).await;
        receive_more(&store, "web01", 1, 2).await;
        prepare_more(&store, "web01", 2, 3).await;
        let open = disk(&store, "web01").await;
        refused(received("web01", 3, None), ErrorKind::Exists).await;
        refused(received("web01", 3, Some(1)), ErrorKind::Invalid).await;
        refused(received("web01", 3, Some(9)), ErrorKind::Invalid).await;
        let nowhere = Received { name: "web02".into(), ..received("web01", 3, Some(2)) };
        refused(nowhere, ErrorKind::NotFound).await;
        assert!(!open.severed(), "nobody is disconnected for nothing");
        write(&open, 5 * 4096, &[5; 4096]).await;
        refused(received("web01", 3, Some(2)), ErrorKind::Invalid).await;
        assert!(!open.severed());
        assert_eq!(blocks(&store, "web01").await, [2, 5]);
        assert_eq!(uuids(&store, "web01").await, [1, 2]);
        // What was written may go.
        let forced = Received { force: true, ..received("web01", 3, Some(2)) };
        store.complete_receive(&forced).await.unwrap();
        assert_eq!(blocks(&store, "web01").await, [2, 3]);
    });
}

#[test]
fn a_taken_label_leaves_the_disk_as_it_is() {
    with_store(|_, store| async move {
        receive_all(&store, "web01", 1).await;
        prepare_more(&store, "web01", 1, 2).await;
        let taken = Received { label: Some("snap1".into()), ..received("web01", 2, Some(1)) };
        let error = store.complete_receive(&taken).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exists);
        assert_eq!(blocks(&store, "web01").await, []);
        assert_eq!(uuids(&store, "web01").await, [1]);
        // Nor does the partial disk lose what it says of itself, behind the snapshot.
        assert_eq!(disk(&store, "web01.partial").await.size_bytes(), MIB + MORE);
        assert_eq!(uuids(&store, "web01.partial").await, []);
        store.complete_receive(&received("web01", 2, Some(1))).await.unwrap();
        assert_eq!(blocks(&store, "web01").await, [2]);
    });
}

/// Each waits for both disks.
#[test]
fn disks_that_are_received_into_each_other_do_not_wait_for_ever() {
    with_store(|runtime, store| async move {
        for (name, byte) in [("a", 1), ("b", 2)] {
            receive_all(&store, name, byte).await;
        }
        let into = |partial: &str, name: &str, base| Received {
            partial: partial.to_owned(),
            label: None,
            ..received(name, 9, Some(base))
        };
        let error = store.complete_receive(&into("a", "a", 1)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        let crosswise = [into("a", "b", 2), into("b", "a", 1)].map(|received| {
            let store = store.clone();
            runtime.spawn(async move { store.complete_receive(&received).await.is_ok() })
        });
        let [one, other] = crosswise;
        assert!(one.await != other.await, "the other one is gone then");
        assert_eq!(store.list(None, 10).await.unwrap().len(), 1);
    });
}

#[test]
fn a_disk_takes_the_size_of_what_it_receives() {
    let (ram, ()) = with_store(|_, store| async move {
        receive_all(&store, "web01", 1).await;
        for (number, size_bytes) in [(2, 2 * MIB), (3, MIB / 2)] {
            let base = Target::parse(&format!("web01@snap{}", number - 1));
            store.clone_vdi(&base, "web01.partial").await.unwrap();
            store.resize("web01.partial", size_bytes).await.unwrap();
            let received = Received { size_bytes, ..received("web01", number, Some(number - 1)) };
            store.complete_receive(&received).await.unwrap();
            assert_eq!(disk(&store, "web01").await.size_bytes(), size_bytes);
        }
    });
    reopened(&ram, |_, store, _| async move {
        let sizes: Vec<_> =
            snapshots(&store, "web01").await.iter().map(|it| it.size_bytes).collect();
        assert_eq!(sizes, [MIB, 2 * MIB, MIB / 2]);
        assert_eq!(disk(&store, "web01").await.size_bytes(), MIB / 2);
    });
}

/// Streams find what they build on by it: after a restart, too.
#[test]
fn a_snapshot_is_known_by_one_uuid_for_ever() {
    let all = |store: Store| async move {
        let mut all = Vec::new();
        for name in ["a", "b", "web01"] {
            all.extend(snapshots(&store, name).await.into_iter().map(|it| it.uuid));
        }
        (store, all)
    };
    let (ram, before) = with_store(move |_, store| async move {
        for name in ["a", "b"] {
            store.create(name, MIB).await.unwrap();
            store.snapshot(name, None).await.unwrap();
            store.snapshot(name, Some("s")).await.unwrap();
        }
        receive_all(&store, "web01", 1).await;
        all(store).await.1
    });
    let different: std::collections::HashSet<_> = before.iter().collect();
    assert_eq!(different.len(), 5, "{before:?}");
    for _ in 0..2 {
        let before = before.clone();
        reopened(&ram, move |_, store, _| async move {
            let (store, now) = all(store).await;
            assert_eq!(now, before);
            store.rename("a", "c").await.unwrap();
            store.rename("c", "a").await.unwrap();
            store.close().await.unwrap();
        });
    }
}

#[test]
fn what_has_data_is_listed() {
    with_store(|_, store| async move {
        store.create("a", 1 << 30).await.unwrap();
        store.create("empty", 1 << 30).await.unwrap();
        let head = disk(&store, "a").await;
        write(&head, 8192, &[1; 8192]).await;
        write(&head, 1 << 29, &vec![2; 1 << 20]).await;
        let (a, empty) = (Target::parse("a"), Target::parse("empty"));
        let mapped = store.mapped(&a, 0, usize::MAX).await.unwrap();
        assert_eq!(mapped.extents, diff(&store, &empty, &a).await.unwrap().extents);
        assert_eq!((mapped.from_size_bytes, mapped.to_size_bytes), (0, 1 << 30));
        assert_eq!(mapped.extents.len(), 2);
        let behind = store.mapped(&a, 12_288, usize::MAX).await.unwrap();
        assert_eq!((behind.extents[0].offset, behind.extents[0].length), (12_288, 4096));
        assert_eq!(store.mapped(&empty, 0, 9).await.unwrap().extents, []);
    });
}
