//! Small stores that the engine made, for targets to damage.

use std::rc::Rc;

use base::{BLOCK_SIZE, Buffer};
use disk::{Disk, Request};
use runtime::Runtime;
use vdi::{FormatOptions, OpenOptions, Reuse, Store, Target};

use crate::ram::{Ram, run};

/// Six extents, the fewest.
const STORE_BLOCKS: u64 = (96 << 20) / BLOCK_SIZE as u64;

/// Boot under which stores are made and opened.
pub const BOOT_ID: [u8; 16] = [1; 16];

/// Opens the store on a device.
pub async fn open(ram: &Ram, runtime: &Runtime) -> Result<Store, vdi::Error> {
    let options = OpenOptions {
        cache_bytes: 1 << 20,
        boot_id: BOOT_ID,
        nonce: runtime.random(),
        after_failure: false,
        reuse: Reuse::Soon,
    };
    Ok(Store::open(ram.device(), runtime.clone(), &options).await?.0)
}

/// Opens a VDI or snapshot.
pub async fn disk(store: &Store, name: &str) -> Result<Rc<dyn Disk>, vdi::Error> {
    store.open_disk(&Target::parse(name)).await
}

/// Writes a block full of `byte`.
pub async fn write(disk: &Rc<dyn Disk>, lba: u64, byte: u8) -> Result<(), disk::DiskError> {
    let data = Buffer::from_bytes(&[byte; BLOCK_SIZE]);
    let offset = lba * BLOCK_SIZE as u64;
    disk.submit(Request::Write { offset, length: BLOCK_SIZE, data, fua: false }).await.map(drop)
}

/// The stores to begin with: an empty one, one that was closed, and one whose daemon was killed
/// with records of every kind in its log, the last of them above the durable point.
pub fn all() -> Vec<Ram> {
    [Stage::Formatted, Stage::Closed, Stage::Killed].into_iter().map(made).collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Formatted,
    Closed,
    Killed,
}

fn made(stage: Stage) -> Ram {
    let ram = Ram::zeroed(STORE_BLOCKS);
    let target = ram.clone();
    let done = run(1, move |runtime| async move { make(&target, &runtime, stage).await });
    done.expect("making a store waits for nothing").expect("nothing fails");
    ram.settled()
}

async fn make(
    ram: &Ram,
    runtime: &Runtime,
    stage: Stage,
) -> Result<(), Box<dyn std::error::Error>> {
    let options = FormatOptions {
        extent_bytes: Some(16 << 20),
        log_bytes: Some(256 << 10),
        force: false,
        keep_space: false,
        uuid: [7; 16],
        secret: [9; 32],
        boot_id: BOOT_ID,
    };
    Store::format(&ram.device(), runtime, &options).await?;
    if stage == Stage::Formatted {
        return Ok(());
    }
    let store = open(ram, runtime).await?;
    store.create("a", 8 << 20).await?;
    store.create("wide", 1 << 40).await?;
    let (a, wide) = (disk(&store, "a").await?, disk(&store, "wide").await?);
    for lba in (0..40).chain(600..610) {
        write(&a, lba, lba as u8 | 1).await?;
    }
    for lba in [0, 255, 256, 65_535, 65_536, (1 << 28) - 1] {
        write(&wide, lba, 7).await?;
    }
    store.snapshot("a", Some("first")).await?;
    for byte in 90..94 {
        write(&a, 3, byte).await?;
        write(&a, 600 + u64::from(byte % 4), byte).await?;
        store.snapshot("a", None).await?;
    }
    write(&a, 3, 99).await?;
    store.clone_vdi(&Target::parse("a@first"), "b").await?;
    write(&disk(&store, "b").await?, 4, 98).await?;
    store.checkpoint().await?;
    write(&a, 5, 97).await?;
    store.snapshot("a", None).await?;
    store.checkpoint().await?;
    if stage == Stage::Closed {
        store.close().await?;
        return Ok(());
    }
    // What follows stands in the log alone.
    write(&a, 6, 96).await?;
    a.submit(Request::Discard { offset: 0, length: 20 << 12, fua: false }).await?;
    let zeroes = Request::WriteZeroes {
        offset: 600 << 12,
        length: 5 << 12,
        fua: false,
        no_hole: true,
        fast_only: false,
    };
    a.submit(zeroes).await?;
    store.snapshot("a", Some("late")).await?;
    write(&a, 1, 95).await?;
    store.clone_vdi(&Target::parse("a"), "c").await?;
    store.create("short-lived", 1 << 20).await?;
    write(&disk(&store, "short-lived").await?, 0, 1).await?;
    store.remove(&Target::parse("short-lived")).await?;
    store.rename("b", "renamed").await?;
    store.resize("a", 4 << 20).await?;
    store.resize("a", 16 << 20).await?;
    store.remove(&Target::parse("a@2")).await?;
    store.rollback("a", "first").await?;
    let a = disk(&store, "a").await?;
    write(&a, 2, 94).await?;
    a.submit(Request::Flush).await?;
    write(&a, 2, 93).await?;
    write(&disk(&store, "c").await?, 9, 92).await?;
    Ok(())
}
