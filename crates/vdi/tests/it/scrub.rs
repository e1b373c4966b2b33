//! Scrub: finds what is planted, says whose it is, and cries about nothing else.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use base::Pba;
use disk::{Disk, Request};
use parallax_vdi::{Damage, DamageKind, OpenOptions, Reuse, ScrubEnd, ScrubReport, Store, Target};
use runtime::Runtime;

use crate::check::{Anatomy, small_store};
use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, disk, open, open_options, read, write};

async fn scrub(store: &Store) -> ScrubReport {
    let report = store.scrubbed(store.begin_scrub(Some(0))).await;
    assert_eq!(report.end, ScrubEnd::Finished, "{report:?}");
    report
}

/// What people need to know of a damaged place: what it is, its bytes, and who has it.
fn told(damage: &Damage) -> String {
    let kind = match &damage.kind {
        DamageKind::Data => "data",
        DamageKind::Node => "node",
        DamageKind::Table(title) => title,
    };
    let owners = damage.owners.iter().map(|owner| {
        let mut names: Vec<String> = owner.head.then(|| owner.name.clone()).into_iter().collect();
        names.extend(owner.snapshots.iter().map(|number| format!("{}@{number}", owner.name)));
        names.join(" ")
    });
    let owners: Vec<String> = owners.collect();
    format!("{kind} {}+{}: {}", damage.offset >> 12, damage.length >> 12, owners.join(" "))
}

/// Everything that [`small_store`] has in memory when the damage comes, so that only a read of the device
/// can find it.
async fn warm(store: &Store) {
    for name in ["web01", "web01@first", "web01@2", "clone"] {
        read(&disk(store, name).await, 0, 1 << 20).await;
        read(&disk(store, name).await, 1 << 20, 1 << 20).await;
        read(&disk(store, name).await, 2 << 20, 1 << 20).await;
    }
}

#[test]
fn damage_is_found_and_named_whoever_shares_it() {
    type Choose = fn(&Ram, &Anatomy) -> Vec<Pba>;
    let planted: [(&str, Choose, &[&str]); 7] = [
        // Several blocks hold this byte, and nobody changed them.
        (
            "shared data",
            |ram, _| vec![ram.filled_with(45).unwrap()],
            &["data 44 mod 256+1: web01 web01@1 web01@2 clone"],
        ),
        ("data of the head", |ram, _| vec![ram.filled_with(6).unwrap()], &["data 256+1: web01"]),
        (
            "what only a snapshot has",
            |ram, _| {
                // The first of two.
                let either = ram.filled_with(150).unwrap();
                let before = Pba::new(either.get() - 1);
                vec![if ram.block(before).0 == [150; 4096] { before } else { either }]
            },
            &["data 256+1: web01@2"],
        ),
        ("data of the clone", |ram, _| vec![ram.filled_with(4).unwrap()], &["data 1+1: clone"]),
        ("a node", |_, anatomy| vec![anatomy.vdi(1).root.entry.pba()], &["node 0+65536: web01"]),
        (
            "a table",
            |_, anatomy| vec![anatomy.slot().roots.directory.entry.pba()],
            &["the directory 0+0: "],
        ),
        (
            "a page",
            |_, anatomy| vec![anatomy.path(&anatomy.vdi(1).snapshots)[1].pba()],
            &["the snapshots of web01 0+0: "],
        ),
    ];
    for (what, choose, expected) in planted {
        let ram = small_store(true);
        let device = ram.clone();
        run(2, move |runtime| async move {
            let (store, _) = open(&device, &runtime).await;
            store.checkpoint().await.unwrap();
            warm(&store).await;
            let sound = scrub(&store).await;
            assert_eq!(sound.damages, [], "{what}");
            assert!(sound.read_blocks > 600, "{sound:?}");
            let anatomy = Anatomy::of(&device);
            for pba in choose(&device, &anatomy) {
                device.rot(pba);
            }
            let report = scrub(&store).await;
            let mut found: Vec<String> = report.damages.iter().map(told).collect();
            if what == "shared data" {
                let (place, owners) = found[0].split_once('+').unwrap();
                let lba: u64 = place.strip_prefix("data ").unwrap().parse().unwrap();
                found = vec![format!("data {} mod 256+{owners}", (lba % 256) & !1)];
            }
            assert_eq!(found, expected, "{what}");
            assert_eq!(report.damaged_blocks, 1, "{what}: each block is read once");
            let stats = store.stats();
            assert_eq!((stats.scrubs, stats.scrub_damaged_blocks), (2, 1), "{what}");
            assert_eq!(stats.checksum_failures, 0, "{what}: no guest met it");
            assert_eq!(
                stats.scrubbed_bytes,
                (sound.read_blocks + report.read_blocks) * 4096,
                "{what}"
            );
        });
    }
}

#[test]
fn adjacent_damage_is_one_place_and_all_of_it_is_counted() {
    let ram = small_store(true);
    let device = ram.clone();
    run(2, move |runtime| async move {
        let (store, _) = open(&device, &runtime).await;
        let first = device.filled_with(101).unwrap();
        for index in 0..8 {
            device.rot(first.plus(index));
        }
        device.set_unreadable(first.plus(8), true);
        let report = scrub(&store).await;
        assert_eq!(report.damaged_blocks, 9, "{report:?}");
        let lengths: Vec<(u64, bool)> =
            report.damages.iter().map(|d| (d.block_count, d.is_unreadable)).collect();
        assert_eq!(lengths, [(8, false), (1, true)], "{report:?}");
        assert_eq!(report.damages[0].at, first);
    });
}

/// A read that failed once, and a bad transfer, are no damage.
#[test]
fn what_a_second_read_gives_is_not_damaged() {
    let ram = small_store(true);
    let device = ram.clone();
    run(2, move |runtime| async move {
        let (store, _) = open(&device, &runtime).await;
        store.checkpoint().await.unwrap();
        device.stumble(device.filled_with(4).unwrap());
        device.garble(Anatomy::of(&device).vdi(1).root.entry.pba());
        assert_eq!(scrub(&store).await.damages, []);
        assert_eq!(store.scrub_status().last.unwrap().pass, 1);
    });
}

#[test]
fn damage_in_a_history_is_found() {
    let ram = Ram::default();
    let device = ram.clone();
    run(1, move |runtime| async move {
        let options =
            parallax_vdi::FormatOptions { log_bytes: Some(8 << 20), ..crate::format_options() };
        Store::format(&device.device(STORE_BLOCKS), &runtime, &options).await.unwrap();
        let (store, _) = open(&device, &runtime).await;
        store.create("web01", 1 << 20).await.unwrap();
        let head = disk(&store, "web01").await;
        for number in 1..=9u8 {
            write(&head, 0, &[number; 4096]).await;
            store.snapshot("web01", None).await.unwrap();
        }
        write(&head, 0, &[77; 4096]).await;
        store.checkpoint().await.unwrap();
        assert!(store.stats().histories > 4, "{:?}", store.stats());
        assert_eq!(scrub(&store).await.damages, []);
        // What only the fifth sees, and a page that tells of it.
        device.rot(device.filled_with(5).unwrap());
        let found = scrub(&store).await;
        assert_eq!(found.damages.iter().map(told).collect::<Vec<_>>(), ["data 0+1: web01@5"]);
        let anatomy = Anatomy::of(&device);
        let page = anatomy.path(&anatomy.vdi(1).snapshots)[1];
        let history = (1..10).find_map(|number| {
            let page = anatomy.node(page);
            let record: Option<ondisk::SnapshotRecord> =
                ondisk::TableRecord::get(page.block(), number).unwrap();
            record?.history
        });
        device.rot(anatomy.path(&history.unwrap().versions)[1].pba());
        let found = scrub(&store).await;
        let found: Vec<String> = found.damages.iter().map(told).collect();
        assert!(found.iter().any(|told| told.starts_with("the history of ")), "{found:?}");
        assert!(
            found.contains(&"data 0+1: web01@5".to_owned()),
            "its page is in memory: {found:?}"
        );
    });
}

/// Guests that write and overwrite, snapshots, deletions, checkpoints and collections, until told to stop.
pub(crate) async fn turmoil(runtime: Runtime, store: Store, seed: u64, over: Rc<Cell<bool>>) {
    let head = disk(&store, "web01").await;
    let mut step = seed;
    while !over.get() {
        step = step.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let block = (step >> 33) % 1900;
        match (step >> 20) % 40 {
            0 => _ = store.snapshot("web01", None).await.unwrap(),
            1 => {
                let snapshots = store.snapshots("web01", Default::default(), 100).await.unwrap();
                if let Some(oldest) = snapshots.first() {
                    let target = Target::parse(&format!("web01@{}", oldest.number));
                    store.remove(&target).await.unwrap();
                }
            }
            2..8 => store.checkpoint().await.unwrap(),
            8 => _ = store.collect_garbage().await.unwrap(),
            9 => {
                let length = 64 << 12;
                let request = Request::Discard { offset: block << 12, length, fua: false };
                head.submit(request).await.unwrap();
            }
            _ => {
                write(&head, block << 12, &vec![step as u8 | 1; 4096 * (1 + (block % 9) as usize)])
                    .await
            }
        }
        runtime.sleep(Duration::from_micros(300)).await;
    }
}

/// A store in which blocks are written again as soon as they are free.
pub(crate) async fn busy_store(device: &Ram, runtime: &Runtime) -> Store {
    Store::format(&device.device(STORE_BLOCKS), runtime, &crate::format_options()).await.unwrap();
    let options = OpenOptions { reuse: Reuse::Soon, ..open_options(runtime.random()) };
    let (store, _) =
        Store::open(device.device(STORE_BLOCKS), runtime.clone(), &options).await.unwrap();
    store.create("calm", 4 << 20).await.unwrap();
    write(&disk(&store, "calm").await, 0, &[200; 4096]).await;
    store.create("web01", 8 << 20).await.unwrap();
    let head: Rc<dyn Disk> = disk(&store, "web01").await;
    for index in 0..7 {
        write(&head, index << 20, &vec![2; 1 << 20]).await;
    }
    store.snapshot("web01", Some("old")).await.unwrap();
    store.checkpoint().await.unwrap();
    store
}

#[test]
fn nothing_is_cried_about_while_everything_changes() {
    let mut read = 0;
    for seed in 1..=12 {
        read += run(seed, move |runtime| async move {
            let device = Ram::default();
            let store = busy_store(&device, &runtime).await;
            let over = Rc::new(Cell::new(false));
            let guests =
                runtime.spawn(turmoil(runtime.clone(), store.clone(), seed, Rc::clone(&over)));
            // Slow enough for checkpoints and reuse between two nodes.
            let pass = store.begin_scrub(Some(16 << 20));
            let report = store.scrubbed(pass).await;
            over.set(true);
            guests.await;
            assert_eq!((report.end, report.damages), (ScrubEnd::Finished, Vec::new()), "{seed}");
            assert!(store.stats().checkpoints > 20, "{:?}", store.stats());
            report.read_blocks
        });
    }
    assert!(read > 12 * 800, "{read}");
}

#[test]
fn damage_is_found_while_everything_changes() {
    for seed in 1..=6 {
        run(seed, move |runtime| async move {
            let device = Ram::default();
            let store = busy_store(&device, &runtime).await;
            device.rot(device.filled_with(200).unwrap());
            let over = Rc::new(Cell::new(false));
            let guests =
                runtime.spawn(turmoil(runtime.clone(), store.clone(), seed, Rc::clone(&over)));
            let report = store.scrubbed(store.begin_scrub(Some(16 << 20))).await;
            over.set(true);
            guests.await;
            let found: Vec<String> = report.damages.iter().map(told).collect();
            assert_eq!(found, ["data 0+1: calm"], "{seed}");
        });
    }
}

/// All snapshots and disks were looked into at full speed for each damaged block, also for those that are
/// only counted.
#[test]
fn who_names_damage_is_looked_for_at_the_rate() {
    const CLONES: u64 = 40;
    const BLOCKS: u64 = 2400;
    let ram = Ram::default();
    let device = ram.clone();
    run(2, move |runtime| async move {
        Store::format(&device.device(STORE_BLOCKS), &runtime, &crate::format_options())
            .await
            .unwrap();
        let (store, _) = open(&device, &runtime).await;
        store.create("web01", BLOCKS << 12).await.unwrap();
        let head = disk(&store, "web01").await;
        write(&head, 0, &[99; 4096]).await;
        for index in 1..BLOCKS {
            write(&head, index << 12, &[1; 4096]).await;
        }
        store.snapshot("web01", Some("s")).await.unwrap();
        for number in 0..CLONES {
            let source = Target::parse("web01@s");
            store.clone_vdi(&source, &format!("clone{number}")).await.unwrap();
        }
        store.checkpoint().await.unwrap();
        let timed = async || {
            let before = runtime.now();
            let report = store.scrubbed(store.begin_scrub(Some(16 << 20))).await;
            assert_eq!(report.end, ScrubEnd::Finished, "{report:?}");
            (report, runtime.now().since(before))
        };
        let (sound, took) = timed().await;
        assert_eq!(sound.damages, []);
        // Each by itself, as every second one is damaged.
        let first = device.filled_with(99).unwrap();
        for index in (0..BLOCKS).step_by(2) {
            device.rot(first.plus(index));
        }
        let (report, took_longer) = timed().await;
        let listed = report.damages.len() as u64;
        assert_eq!(
            (report.damaged_blocks, report.damages_omitted),
            (BLOCKS / 2, BLOCKS / 2 - listed)
        );
        assert!(listed == 1000 && report.damages[0].owners_omitted > 20, "{listed}");
        // The clones are looked into for those that are listed, and for the others one disk.
        let looks = listed * (CLONES + 1) + report.damages_omitted;
        let due = Duration::from_secs(1) * u32::try_from(looks).unwrap() / (16 << 20 >> 12);
        let took_for_owners = took_longer - took;
        let (least, most) = (due * 95 / 100, due * 105 / 100);
        assert!((least..most).contains(&took_for_owners), "{took_for_owners:?}, {due:?} are due");
    });
}

/// A pause that began at a low rate was kept to its end.
#[test]
fn a_raised_rate_shortens_the_pause_under_way() {
    let ram = small_store(true);
    run(2, move |runtime| async move {
        let (store, _) = open(&ram, &runtime).await;
        let pass = store.begin_scrub(Some(1));
        runtime.sleep(Duration::from_secs(20)).await;
        let before = runtime.now();
        store.begin_scrub(Some(64 << 20));
        assert_eq!(store.scrubbed(pass).await.end, ScrubEnd::Finished);
        let took = runtime.now().since(before);
        assert!(took < Duration::from_secs(3), "{took:?}");
    });
}

#[test]
fn the_rate_is_kept_and_a_pass_can_be_watched_hurried_and_stopped() {
    let ram = small_store(true);
    run(2, move |runtime| async move {
        let (store, _) = open(&ram, &runtime).await;
        let before = runtime.now();
        let pass = store.begin_scrub(Some(1 << 20));
        assert_eq!(store.begin_scrub(None), pass, "one at a time");
        let report = store.scrubbed(pass).await;
        let took = runtime.now().since(before).as_millis() as u64;
        let due = report.read_blocks * 4096 * 1000 / (1 << 20);
        assert!((due..due + 1500).contains(&took), "{took} ms for {due} ms");

        let pass = store.begin_scrub(Some(4096));
        runtime.sleep(Duration::from_secs(20)).await;
        let status = store.scrub_status();
        assert!(status.running && status.pass == pass && status.rate_bytes == 4096, "{status:?}");
        assert!(
            status.done_blocks < status.total_blocks && status.total_blocks > 600,
            "{status:?}"
        );
        assert!(status.elapsed >= Duration::from_secs(20));
        let before = runtime.now();
        store.begin_scrub(Some(0));
        assert_eq!(store.scrubbed(pass).await.end, ScrubEnd::Finished);
        assert!(runtime.now().since(before) < Duration::from_secs(3), "it was hurried");

        let pass = store.begin_scrub(Some(4096));
        runtime.sleep(Duration::from_secs(5)).await;
        assert!(store.stop_scrub());
        let stopped = store.scrubbed(pass).await;
        assert_eq!(stopped.end, ScrubEnd::Stopped);
        assert!(!store.stop_scrub() && !store.scrub_status().running);
        assert_eq!(store.stats().scrubs, 2, "one that was stopped has not read everything");
        store.close().await.unwrap();
    });
}
