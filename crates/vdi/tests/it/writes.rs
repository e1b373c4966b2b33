//! Each write of a disk can be opened, of which every write is kept.

use std::cell::Cell;
use std::time::Duration;

use base::{Buffer, ErrorKind, Lsn, SnapshotNumber};
use disk::{Disk, Request};
use ondisk::HISTORY_VERSIONS_MAX;
use parallax_vdi::{FormatOptions, OpenOptions, Retention, Store, Target, VdiWrite};
use std::rc::Rc;

use crate::check::assert_sound;
use crate::gate::with_gated_store;
use crate::ram::{Ram, run};
use crate::stuck::writes_slot;
use crate::{disk, format_options, open_options, read, reopened, with_store, write};

pub(crate) const RULES: &str = "every write for 10m, 1s for 1h";

async fn keep(store: &Store, rules: &str) {
    store.retain("web01", Retention::parse(rules).unwrap()).await.unwrap();
}

/// A new disk with these rules.
pub(crate) async fn disk_that_keeps(store: &Store, rules: &str) -> Rc<dyn Disk> {
    store.create("web01", 1 << 30).await.unwrap();
    keep(store, rules).await;
    disk(store, "web01").await
}

/// Numbers of all moments.
pub(crate) async fn moments(store: &Store) -> Vec<u64> {
    let all = store.snapshots("web01", SnapshotNumber::new(0), usize::MAX).await.unwrap();
    all.iter().map(|it| it.number.get()).collect()
}

/// All writes that moments keep.
pub(crate) async fn writes(store: &Store) -> Vec<VdiWrite> {
    let mut all = Vec::new();
    for number in moments(store).await {
        let listed = store.writes("web01", &number.to_string()).await;
        match listed {
            Ok(listed) => all.extend(listed),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Invalid, "{error}"),
        }
    }
    all
}

pub(crate) async fn at(store: &Store, lsn: Lsn) -> Result<Rc<dyn Disk>, parallax_vdi::Error> {
    store.open_disk(&Target::parse(&format!("web01@lsn:{lsn}"))).await
}

/// Opens each write, and compares it with what these bytes, one for each write, have made of block 0.
pub(crate) async fn assert_each(store: &Store, expected: &[u8]) {
    let all: Vec<VdiWrite> = writes(store).await.into_iter().filter(|it| it.offset == 0).collect();
    assert_eq!(all.len(), expected.len());
    for (write, byte) in all.iter().zip(expected) {
        let then = at(store, write.lsn).await.unwrap();
        assert_eq!(read(&then, 0, 4096).await, [*byte; 4096], "lsn:{}", write.lsn);
    }
}

/// Writes of one block, many between two checkpoints, a flush and a second: each can be opened, at once,
/// after a checkpoint, after the store was closed, and when garbage was collected.
#[test]
fn each_write_can_be_opened() {
    let bytes: Vec<u8> = (1..=200).collect();
    let expected = bytes.clone();
    let (ram, ()) = with_store(move |runtime, store| async move {
        let head = disk_that_keeps(&store, RULES).await;
        for &byte in &bytes {
            write(&head, 0, &[byte; 4096]).await;
            write(&head, 1 << 20, &[byte; 8192]).await;
            if byte % 37 == 0 {
                head.submit(Request::Flush).await.unwrap();
                runtime.sleep(Duration::from_millis(300)).await;
            }
            if byte % 53 == 0 {
                store.checkpoint().await.unwrap();
            }
        }
        store.checkpoint().await.unwrap();
        assert_each(&store, &bytes).await;
        let last = writes(&store).await.last().copied().unwrap();
        assert_eq!((last.offset, last.length), (1 << 20, 8192));
        store.collect_garbage().await.unwrap();
        assert_each(&store, &bytes).await;
        assert_eq!(read(&head, 0, 4096).await, [200; 4096]);
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
    reopened(&ram, move |_, store, _| async move {
        store.collect_garbage().await.unwrap();
        assert_each(&store, &expected).await;
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// A write is opened that no moment has kept yet, and what comes later does not change what is read.
#[test]
fn a_write_is_opened_at_once() {
    with_store(|_, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let head = disk(&store, "web01").await;
        write(&head, 0, &[9; 4096]).await;
        keep(&store, "every write for 10m").await;
        write(&head, 0, &[1; 4096]).await;
        write(&head, 0, &[2; 4096]).await;
        store.checkpoint().await.unwrap();
        let first = writes(&store).await[0].lsn;
        write(&head, 0, &[3; 4096]).await;
        let then = at(&store, first).await.unwrap();
        assert_eq!(read(&then, 0, 4096).await, [1; 4096]);
        assert_ne!(then.identity(), at(&store, first.plus(1)).await.unwrap().identity());
        // By counting on from there: nobody has listed it yet. The moment of the checkpoint lies between.
        let third = (first.get()..first.get() + 20).map(Lsn::new);
        let mut seen = Vec::new();
        for lsn in third {
            match at(&store, lsn).await {
                Ok(then) => seen.push(read(&then, 0, 4096).await[0]),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Invalid, "{error}"),
            }
        }
        seen.dedup();
        assert_eq!(seen, [1, 2, 3]);
        let error = at(&store, Lsn::new(1)).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::NotFound, "before there was a history: {error}");
    });
}

/// What a crash leaves of writes that were flushed can be opened.
#[test]
fn writes_are_kept_through_a_crash() {
    let (ram, lsns) = with_store(|_, store| async move {
        let head = disk_that_keeps(&store, RULES).await;
        for byte in 1..=9u8 {
            write(&head, 0, &[byte; 4096]).await;
        }
        store.checkpoint().await.unwrap();
        let lsns: Vec<Lsn> = writes(&store).await.iter().map(|write| write.lsn).collect();
        for byte in 10..=19u8 {
            write(&head, 0, &[byte; 4096]).await;
        }
        head.submit(Request::Flush).await.unwrap();
        lsns
    });
    reopened(&ram, move |_, store, report| async move {
        assert!(!report.clean);
        store.checkpoint().await.unwrap();
        let kept: Vec<Lsn> = writes(&store).await.iter().map(|write| write.lsn).collect();
        assert_eq!(kept[..9], lsns);
        assert_each(&store, &(1..=19).collect::<Vec<u8>>()).await;
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// When their time has come the blocks of writes that no moment sees are freed, and the moments stay.
#[test]
fn writes_go_when_their_time_has_come() {
    let (ram, ()) = with_store(|runtime, store| async move {
        let head = disk_that_keeps(&store, "every write for 10s, 1s for 1h").await;
        for byte in 1..=100u8 {
            write(&head, 0, &[byte; 4096]).await;
        }
        store.checkpoint().await.unwrap();
        let all = writes(&store).await;
        assert_eq!(all.len(), 100);
        let open = at(&store, all[41].lsn).await.unwrap();
        store.collect_garbage().await.unwrap();
        runtime.sleep(Duration::from_secs(30)).await;
        assert_eq!(read(&open, 0, 4096).await, [42; 4096], "it is open: it stays");
        assert!(!open.severed());
        drop(open);
        runtime.sleep(Duration::from_secs(10)).await;
        let error = at(&store, all[41].lsn).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        store.checkpoint().await.unwrap();
        let freed = store.collect_garbage().await.unwrap().freed_blocks;
        assert!(freed >= 98, "{freed}");
        let last = moments(&store).await.last().copied().unwrap();
        let then = disk(&store, &format!("web01@{last}")).await;
        assert_eq!(read(&then, 0, 4096).await, [100; 4096]);
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// More than fits into one history, and a discard of a large range, cost no write but what they lie between.
#[test]
fn many_writes_and_large_discards() {
    let (ram, ()) = with_store(|_, store| async move {
        let head = disk_that_keeps(&store, "every write for 10m").await;
        for byte in 1..=120u8 {
            write(&head, 0, &[byte; 4096]).await;
            write(&head, 1 << 20, &vec![byte; 1 << 18]).await;
        }
        let length = 256 << 20;
        let discard = Request::Discard { offset: 0, length, fua: false };
        head.submit(discard).await.unwrap();
        for byte in 121..=140u8 {
            write(&head, 0, &[byte; 4096]).await;
        }
        store.checkpoint().await.unwrap();
        assert_each(&store, &(1..=140).collect::<Vec<u8>>()).await;
        store.resize("web01", 1 << 29).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[141; 4096]).await;
        store.checkpoint().await.unwrap();
        let sizes: Vec<u64> = {
            let all = writes(&store).await;
            let all = [all[0].lsn, all.last().unwrap().lsn];
            let mut sizes = Vec::new();
            for lsn in all {
                sizes.push(at(&store, lsn).await.unwrap().size_bytes());
            }
            sizes
        };
        assert_eq!(sizes, [1 << 30, 1 << 29]);
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// One checkpoint meets more versions than a history has room for.
#[test]
fn a_history_that_is_full_is_followed_by_another() {
    const WRITES: u64 = 300;
    const STORE_BLOCKS: u64 = (8 << 30) / 4096;
    let ram = Ram::default();
    run(1, |runtime| async move {
        let log_bytes = Some(16 << 20);
        let extent_bytes = Some(256 << 20);
        let options = FormatOptions { extent_bytes, log_bytes, ..format_options() };
        Store::format(&ram.device(STORE_BLOCKS), &runtime, &options).await.unwrap();
        let options = OpenOptions { cache_bytes: 16 << 20, ..open_options(runtime.random()) };
        let device = ram.device(STORE_BLOCKS);
        let (store, _) = Store::open(device, runtime.clone(), &options).await.unwrap();
        let head = disk_that_keeps(&store, RULES).await;
        store.checkpoint().await.unwrap();
        let before = store.stats();
        let bytes_of = |number: u64| u8::try_from(number % 251).unwrap();
        // Side by side, or the next checkpoint comes before they are many enough.
        let offset_of = |number: u64| (number % 32) << 20;
        let begun: Vec<_> = (1..=WRITES)
            .map(|number| {
                let data = Buffer::from_bytes(&vec![bytes_of(number); 1 << 20]);
                let (offset, length) = (offset_of(number), 1 << 20);
                head.submit(Request::Write { offset, length, data, fua: false })
            })
            .collect();
        for written in begun {
            written.await.unwrap();
        }
        assert_eq!(store.stats().checkpoints, before.checkpoints, "all of them wait for one");
        store.checkpoint().await.unwrap();
        let versions = store.stats().versions_written - before.versions_written;
        assert!(versions > u64::from(HISTORY_VERSIONS_MAX), "{versions}");
        store.close().await.unwrap();
        let device = ram.device(STORE_BLOCKS);
        let (store, _) = Store::open(device, runtime, &options).await.unwrap();
        let mut told: Vec<(u64, u8)> = Vec::new();
        for kept in writes(&store).await {
            let then = at(&store, kept.lsn).await.unwrap();
            let byte = read(&then, kept.offset, 1).await[0];
            assert_eq!(read(&then, kept.offset + (1 << 20) - 4096, 1).await, [byte]);
            // Some other MiB is as the write before has left it.
            if let Some(&(offset, byte)) = told.last().filter(|(offset, _)| *offset != kept.offset)
            {
                assert_eq!(read(&then, offset, 1).await, [byte], "lsn:{}", kept.lsn);
            }
            told.push((kept.offset, byte));
        }
        told.sort_unstable();
        let mut written: Vec<(u64, u8)> =
            (1..=WRITES).map(|number| (offset_of(number), bytes_of(number))).collect();
        written.sort_unstable();
        assert_eq!(told, written);
        store.close().await.unwrap();
    });
}

/// `lsn:N` of the position of a snapshot is that snapshot, which keeps no writes: each request to the handle
/// failed, as if the history had been taken from under it.
#[test]
fn a_write_before_a_snapshot_is_read() {
    with_store(|_, store| async move {
        let head = disk_that_keeps(&store, "every write for 10m").await;
        write(&head, 0, &[1; 4096]).await;
        store.snapshot("web01", None).await.unwrap();
        write(&head, 0, &[2; 4096]).await;
        store.checkpoint().await.unwrap();
        let all = writes(&store).await;
        let (first, second) = (all[0].lsn, all[1].lsn);
        assert!(first.plus(1) < second, "the snapshot lies between");
        for lsn in (first.get()..second.get()).map(Lsn::new) {
            let then = at(&store, lsn).await.unwrap();
            assert!(!then.severed(), "lsn:{lsn}");
            assert_eq!(read(&then, 0, 4096).await, [1; 4096], "lsn:{lsn}");
        }
        assert_eq!(read(&at(&store, second).await.unwrap(), 0, 4096).await, [2; 4096]);
    });
}

/// A write is named by its LSN when a crash cannot give it another: recovery goes by the published slot and by
/// what log blocks tell of flushes, and not by what a flush has made durable since.
#[test]
fn a_write_has_a_name_when_its_moment_is_published() {
    with_gated_store(|runtime, gate, store| async move {
        let head = disk_that_keeps(&store, "every write for 10m").await;
        for byte in 1..=3u8 {
            write(&head, 0, &[byte; 4096]).await;
        }
        store.checkpoint().await.unwrap();
        let last = writes(&store).await[2].lsn;
        write(&head, 0, &[4; 4096]).await;
        write(&head, 0, &[5; 4096]).await;
        gate.hold(writes_slot);
        let publishing = store.clone();
        let published = runtime.spawn(async move { publishing.checkpoint().await.unwrap() });
        runtime.sleep(Duration::from_millis(100)).await;
        assert_eq!(gate.held(), 1);
        let opening = store.clone();
        let opened = Rc::new(Cell::new(false));
        let is_open = Rc::clone(&opened);
        // The moment of the checkpoint before lies between.
        let lsn = last.plus(2);
        let open = runtime.spawn(async move {
            let then = at(&opening, lsn).await.unwrap();
            is_open.set(true);
            read(&then, 0, 4096).await
        });
        let listing = store.clone();
        let listed = Rc::new(Cell::new(false));
        let is_listed = Rc::clone(&listed);
        let list = runtime.spawn(async move {
            let all = writes(&listing).await;
            is_listed.set(true);
            all
        });
        runtime.sleep(Duration::from_secs(1)).await;
        assert!(!opened.get(), "a crash now gives it another number");
        assert!(!listed.get(), "a crash now gives them other numbers");
        gate.hold(|_| false);
        gate.release();
        published.await;
        assert_eq!(open.await, [4; 4096]);
        assert_eq!(list.await[3].lsn, lsn);
    });
}

/// Large discards one after another took two moments each, until the oldest moments went for them.
#[test]
fn discards_in_a_row_take_few_moments() {
    let (ram, ()) = with_store(|runtime, store| async move {
        let head = disk_that_keeps(&store, "every write for 10m").await;
        write(&head, 0, &[1; 4096]).await;
        let discard = |offset| Request::Discard { offset, length: 256 << 20, fua: false };
        for _ in 0..100 {
            head.submit(discard(256 << 20)).await.unwrap();
        }
        write(&head, 0, &[2; 4096]).await;
        store.checkpoint().await.unwrap();
        assert_each(&store, &[1, 2]).await;
        let count = moments(&store).await.len();
        assert!(count <= 4, "{count}");
        // With writes between them, those in one interval are not told from each other.
        for byte in 0..100u8 {
            write(&head, 0, &[byte; 4096]).await;
            head.submit(discard(512 << 20)).await.unwrap();
        }
        store.checkpoint().await.unwrap();
        let count = moments(&store).await.len();
        assert!(count <= 12, "{count}");
        runtime.sleep(Duration::from_secs(2)).await;
        let before = writes(&store).await.len();
        write(&head, 0, &[101; 4096]).await;
        head.submit(discard(0)).await.unwrap();
        write(&head, 4096, &[102; 4096]).await;
        store.checkpoint().await.unwrap();
        assert_eq!(writes(&store).await.len(), before + 2);
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// A discard that is no subtree is as many versions as blocks. Many of them are more than a history has room
/// for, and the writes between them stay.
#[test]
fn many_small_discards_cost_no_write() {
    let (ram, ()) = with_store(|_, store| async move {
        let head = disk_that_keeps(&store, "every write for 10m").await;
        for byte in 1..=140u8 {
            write(&head, 0, &[byte; 4096]).await;
            let discard = Request::Discard { offset: 4096, length: 510 * 4096, fua: false };
            head.submit(discard).await.unwrap();
        }
        store.checkpoint().await.unwrap();
        assert_each(&store, &(1..=140).collect::<Vec<u8>>()).await;
        store.close().await.unwrap();
    });
    assert_sound(&ram, 0);
}

/// What a disk was before it was created is not told.
#[test]
fn no_write_lies_before_the_disk() {
    with_store(|_, store| async move {
        store.retain_by_default(Retention::parse("every write for 10m").unwrap()).await.unwrap();
        store.create("db01", 1 << 30).await.unwrap();
        write(&disk(&store, "db01").await, 0, &[1; 4096]).await;
        store.create("web01", 1 << 30).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[1; 4096]).await;
        store.checkpoint().await.unwrap();
        let first = writes(&store).await[0].lsn;
        assert_eq!(read(&at(&store, first).await.unwrap(), 0, 4096).await, [1; 4096]);
        // In front of the first write stands the record that created it.
        assert!(at(&store, Lsn::new(first.get() - 1)).await.is_ok());
        for lsn in (1..first.get() - 1).map(Lsn::new) {
            let error = at(&store, lsn).await.err().expect("there was no such disk");
            assert_eq!(error.kind(), ErrorKind::NotFound, "lsn:{lsn}: {error}");
        }
    });
}
