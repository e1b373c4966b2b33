//! Whole stores with damage anywhere: checking, dumping, repairing, opening and using one ends in
//! an answer or an error. Half of the runs make all checksums right again afterwards, so that the
//! damage lies behind them.
//!
//! Beyond that nothing panics, hangs or takes memory without bound:
//! - damage to anything that a closed store reaches is noticed by `check`;
//! - a store that `check` finds sound opens, and everything that it holds can be read.
#![no_main]

use base::{BLOCK_SIZE, BLOCK_SIZE_U64, Pba, SnapshotNumber};
use disk::{Disk, Request};
use fuzz::image::{self, BOOT_ID};
use fuzz::ram::{Ram, run};
use fuzz::script::Script;
use fuzz::seal::{Anatomy, Sealer};
use libfuzzer_sys::fuzz_target;
use runtime::Runtime;
use vdi::Target;
use vdi::check::{CheckOptions, CheckReport, check};
use vdi::dump::Dump;

const CHECK: CheckOptions =
    CheckOptions { repair: false, read_data: true, boot_id: BOOT_ID, nonce: 5 };

/// Lines of a dump that are asked for: it may rightly print more of a tree that is shared within
/// itself than anybody can wait for.
const LINES_MAX: usize = 1 << 20;

struct Original {
    ram: Ram,
    anatomy: Anatomy,
    is_closed: bool,
}

thread_local! {
    static ORIGINALS: Vec<Original> = image::all()
        .into_iter()
        .enumerate()
        .map(|(index, ram)| Original { anatomy: Anatomy::of(&ram), ram, is_closed: index < 2 })
        .collect();
}

/// Damages a store as the script says.
fn damage(script: &mut Script, ram: &Ram, anatomy: &Anatomy) {
    let places = [&anatomy.fixed, &anatomy.log, &anatomy.reached];
    let place = |script: &mut Script| {
        let blocks = places[script.below(places.len())];
        match blocks.is_empty() {
            true => Pba::new(0),
            false => blocks[script.below(blocks.len())],
        }
    };
    for _ in 0..=script.below(4) {
        let at = place(script);
        match script.byte() % 8 {
            0 => ram.change(at, |block| script.patch(&mut block.0)),
            1 => ram.change(at, |block| block.0[script.below(BLOCK_SIZE)] ^= 1 << script.below(8)),
            2 | 3 => ram.change(at, |block| {
                // Fields are in the head of a block or record, mostly aligned.
                let record = script.below(3) * 256;
                let start = record + script.below(64) * 4;
                let bytes = script.number().to_le_bytes();
                let width = [8, 4, 2, 1][script.below(4)];
                block.0[start..start + width].copy_from_slice(&bytes[..width]);
            }),
            4 | 5 => {
                // An entry of a node that names some other block, or itself.
                let named = if script.byte() % 4 == 0 { at } else { place(script) };
                ram.change(at, |block| {
                    let start = [script.below(4), script.below(256)][script.below(2)] * 16;
                    block.0[start..start + 5].copy_from_slice(&named.get().to_le_bytes()[..5]);
                    block.0[start + 5] = [2, script.byte()][script.below(2)];
                    block.0[start + 6..start + 10].copy_from_slice(&[1, 0, 0, 0]);
                });
            }
            6 => {
                let other = ram.block(place(script));
                ram.change(at, |block| *block = other);
            }
            _ => ram.change(at, |block| block.0.fill(script.byte())),
        }
    }
}

fn checked(ram: &Ram, repair: bool) -> Result<CheckReport, vdi::Error> {
    let ram = ram.clone();
    let options = CheckOptions { repair, ..CHECK };
    let outcome =
        run(
            2,
            move |runtime| async move { check(&ram.device(), &runtime, options, &|_| {}).await },
        );
    outcome.expect("a check waits for nothing")
}

fn dump(ram: &Ram) {
    let ram = ram.clone();
    let shown = run(3, move |runtime| async move {
        let Ok(dump) = Dump::open(&ram.device(), &runtime).await else { return };
        let mut lines = 0;
        let mut line = |text: String| {
            assert!(text.len() < 4096, "a line is a line");
            lines += 1;
            assert!(lines < LINES_MAX, "this is without end");
        };
        dump.superblock(&mut line);
        let _ = dump.slots(&mut line).await;
        let _ = dump.log(&mut line).await;
        let _ = dump.extents(&mut line).await;
        let _ = dump.bitmaps(&mut line).await;
        let _ = dump.vdis(&mut line).await;
        for name in ["a", "a@first", "wide", "b"] {
            let _ = dump.tree(&Target::parse(name), &mut line).await;
        }
    });
    assert!(shown.is_some(), "a dump waits for nothing");
}

/// Opens the store and reads what it holds. `Err` at the first thing that cannot be had.
async fn read_all(ram: Ram, runtime: Runtime) -> Result<(), Box<dyn std::error::Error>> {
    let store = image::open(&ram, &runtime).await?;
    for vdi in store.list(None, 8).await? {
        look(&*image::disk(&store, &vdi.name).await?).await?;
        for snapshot in store.snapshots(&vdi.name, SnapshotNumber::new(0), 8).await? {
            look(&*image::disk(&store, &format!("{}@{}", vdi.name, snapshot.number)).await?)
                .await?;
        }
    }
    Ok(())
}

/// Reads where something may be.
async fn look(disk: &dyn Disk) -> Result<(), disk::DiskError> {
    let size = disk.size_bytes();
    for start in [0, 150, 256, 600, 65_535, (1 << 28) - 1] {
        let offset = start * BLOCK_SIZE_U64;
        let length = size.saturating_sub(offset).min(100 * BLOCK_SIZE_U64);
        let length = usize::try_from(length).unwrap_or(0);
        if length > 0 {
            disk.submit(Request::Read { offset, length }).await?;
            let length = length as u64;
            let status = Request::BlockStatus { offset, length, extents_max: 100 };
            disk.submit(status).await?;
        }
    }
    Ok(())
}

/// Opens the store and does everything to it that can be done; errors are answers.
async fn use_it(ram: Ram, runtime: Runtime) {
    let Ok(store) = image::open(&ram, &runtime).await else { return };
    let Ok(vdis) = store.list(None, 6).await else { return };
    for vdi in &vdis {
        let name = &vdi.name;
        let _ = store.info(name).await;
        let _ = store.space(&Target::parse(name)).await;
        let snapshots = store.snapshots(name, SnapshotNumber::new(0), 4).await.unwrap_or_default();
        let Ok(disk) = image::disk(&store, name).await else { continue };
        let _ = look(&*disk).await;
        for snapshot in &snapshots {
            let handle = format!("{name}@{}", snapshot.number);
            if let Ok(snapshot) = image::disk(&store, &handle).await {
                let _ = look(&*snapshot).await;
            }
            let _ = store.diff(&Target::parse(name), &Target::parse(&handle), 0, 1024).await;
        }
        for lba in [0, 5, 300, 65_536] {
            let _ = image::write(&disk, lba, 55).await;
        }
        let (offset, length) = (0, disk.size_bytes() / 2);
        let _ = disk.submit(Request::Discard { offset, length, fua: true }).await;
        let _ = store.snapshot(name, None).await;
        let _ = store.clone_vdi(&Target::parse(name), &format!("clone-of-{name}")).await;
        if let Some(first) = snapshots.first() {
            let _ = store.rollback(name, &first.number.to_string()).await;
            let _ = store.remove(&Target::parse(&format!("{name}@{}", first.number))).await;
        }
        let _ = store.resize(name, 1 << 20).await;
        let _ = store.resize(name, 1 << 40).await;
    }
    let _ = store.checkpoint().await;
    if let Some(first) = vdis.first() {
        let _ = store.rename(&first.name, "renamed-now").await;
        let _ = store.remove(&Target::parse("renamed-now")).await;
    }
    let _ = store.create("new", 1 << 30).await;
    if let Ok(disk) = image::disk(&store, "new").await {
        let _ = image::write(&disk, 9, 66).await;
    }
    let _ = store.collect_garbage().await;
    let _ = store.stats();
    let _ = store.close().await;
}

/// The blocks that are not what they were.
fn changed(ram: &Ram) -> Vec<Pba> {
    ram.written().into_iter().filter(|&at| ram.is_changed(at)).collect()
}

fuzz_target!(|input: &[u8]| {
    ORIGINALS.with(|originals| {
        let mut script = Script(input);
        let [which, mode] = script.take();
        let original = &originals[usize::from(which) % originals.len()];
        let ram = original.ram.fork();
        damage(&mut script, &ram, &original.anatomy);
        let is_sealed = mode & 1 != 0;
        if is_sealed {
            if mode & 2 != 0 {
                Sealer::superblocks(&ram);
            }
            if let Some(mut sealer) = Sealer::new(&ram) {
                sealer.all(&ram);
            }
        }
        // What checksums show, check must see.
        let must_notice = !is_sealed
            && original.is_closed
            && original.anatomy.reached.iter().any(|&at| ram.is_changed(at));
        let report = checked(&ram, false);
        let is_sound = report.as_ref().is_ok_and(|report| report.is_clean());
        assert!(!is_sound || !must_notice, "damage at {:?} is not noticed", changed(&ram));
        // What an entry says was lost earlier is an error to who reads it, and no news to `check`.
        let is_whole = report.is_ok_and(|report| report.counts.lost_entries == 0);
        if is_sound && is_whole {
            let fork = ram.fork();
            let read = run(4, |runtime| async move {
                read_all(fork, runtime).await.map_err(|error| error.to_string())
            });
            assert_eq!(read, Some(Ok(())), "a sound store");
        }
        dump(&ram);
        if mode & 4 != 0 && checked(&ram, true).is_ok() {
            let _ = checked(&ram, false);
        }
        run(5, {
            let ram = ram.clone();
            |runtime| use_it(ram, runtime)
        });
        let _ = checked(&ram, false);
    });
});
