//! An empty store.

use std::rc::Rc;

use base::{
    Ballot, BlockSlice, Buffer, Epoch, ErrorKind, ExtentIndex, HostId, Lsn, Pba,
    REQUEST_BLOCKS_MAX, StoreUuid,
};
use device::{Cause, Device};
use ondisk::{
    COMPATIBLE_KEEPS_SPACE, Checksums, Features, HostSlot, INCOMPATIBLE_HISTORY,
    INCOMPATIBLE_HOLDS, INCOMPATIBLE_WRITES, KeepRules, READ_ONLY_COMPATIBLE_BUDGETS, RootRef,
    Roots, SUPERBLOCK_COPIES, SlotState, Superblock,
};
use runtime::Runtime;

use crate::geometry::{self, Geometry};
use crate::{Error, superblock};

/// How to format.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes per extent, or a fitting default.
    pub extent_bytes: Option<u64>,
    /// Bytes per log ring, or a fitting default.
    pub log_bytes: Option<u64>,
    /// Format even if the device looks used.
    pub force: bool,
    /// Whether free blocks keep their space below.
    pub keep_space: bool,
    /// Identity.
    pub uuid: StoreUuid,
    /// Checksum key.
    pub key: [u8; 32],
    /// Boot of the machine that formats.
    pub boot_id: [u8; 16],
}

/// Blocks at the start and at the end of a device where partition tables, file systems, volume
/// managers and RAID put their labels: they must be zero for it to look unused.
const LABEL_BLOCKS: u64 = REQUEST_BLOCKS_MAX as u64;

/// Blocks between two words about progress: 64 MiB.
const ZERO_BLOCKS_AT_ONCE: u64 = 16_384;

/// Writes an empty store. Old copies of superblocks are wiped first and the primary is written
/// last (design rule 44): a format that was cut short leaves no store, never half of one.
///
/// # Errors
/// `Busy` if the device looks used and `force` is not set; `Invalid` for impossible sizes;
/// device errors.
pub async fn format(device: &Device, runtime: &Runtime, options: &Options) -> Result<(), Error> {
    let (extent_blocks, ring_blocks) = check(device, runtime, options).await?;
    let zero = BlockSlice::whole(Rc::new(Buffer::zeroed(1)));
    let [primary, secondary] = SUPERBLOCK_COPIES;
    // One after the other, the primary last: of a format that is cut short here the old store is
    // left, or a primary that is torn and no secondary.
    for at in [secondary, primary] {
        device.write(at, vec![zero.clone()]).await?;
        device.flush().await?;
    }
    // A label that stays would have others take the device for theirs.
    for (at, count) in labels(device) {
        zero_blocks(device, at, count).await?;
    }

    let superblock = Superblock {
        uuid: options.uuid,
        key: options.key,
        features: Features {
            compatible: if options.keep_space { COMPATIBLE_KEEPS_SPACE } else { 0 },
            read_only_compatible: READ_ONLY_COMPATIBLE_BUDGETS,
            incompatible: INCOMPATIBLE_HISTORY | INCOMPATIBLE_HOLDS | INCOMPATIBLE_WRITES,
        },
        block_count: device.block_count() / extent_blocks * extent_blocks,
        extent_blocks,
        log_ring_blocks: ring_blocks,
        host_slots_start: Geometry::host_slots_start(),
        host_slot_count: geometry::HOST_SLOT_COUNT,
        lock_slots_start: Geometry::lock_slots_start(),
        lock_slot_count: geometry::LOCK_SLOT_COUNT,
        created_ns: runtime.wall_ns(),
    };
    let places = Geometry::new(&superblock);
    // The ring of the first host fills the head of extent 1; further hosts take further extents.
    let log_start = places.extent_start(ExtentIndex::new(1));
    prepare(device, Pba::new(0), extent_blocks, false).await?;
    prepare(device, log_start, ring_blocks, true).await?;
    let slots = u64::from(geometry::HOST_SLOT_COUNT) * 4;
    zero_blocks(device, Geometry::host_slots_start(), slots).await?;
    zero_blocks(device, Geometry::lock_slots_start(), u64::from(geometry::LOCK_SLOT_COUNT)).await?;

    let checksums = Checksums::new(options.uuid, &options.key);
    let slot = empty_slot(log_start, runtime.wall_ns(), options.boot_id);
    let at = places.host_slot(slot.host, 0);
    let block = BlockSlice::whole(Rc::new(slot.encode(&checksums, at)));
    device.write(at, vec![block]).await?;
    device.flush().await?;
    superblock::write(device, &superblock, &[secondary, primary]).await
}

/// Writes zeroes over the whole device, so that a file below is not only allocated but written: a
/// file system keeps a note of each block that never was, and a flush waits for its journal then.
/// `progress` is told how many blocks of how many are done. Durable on return.
///
/// # Errors
/// If the device fails.
pub async fn zero(device: &Device, progress: &dyn Fn(u64, u64)) -> Result<(), Error> {
    let count = device.block_count();
    let mut done = 0;
    while done < count {
        let part = ZERO_BLOCKS_AT_ONCE.min(count - done);
        zero_blocks(device, Pba::new(done), part).await?;
        done += part;
        progress(done, count);
    }
    Ok(device.flush().await?)
}

fn empty_slot(log_start: Pba, wall_ns: u64, boot_id: [u8; 16]) -> HostSlot {
    HostSlot {
        host: HostId::new(0),
        state: SlotState::Clean,
        sequence: 1,
        epoch: Epoch::new(0),
        boot_id,
        ballot: Ballot::new(0),
        cut: Lsn::new(0),
        vdi_id_next: 1,
        wall_ns,
        store_ns: 0,
        log_start,
        roots: Roots {
            directory: RootRef::empty(1),
            extents: RootRef::empty(1),
            vdis: RootRef::empty(1),
            bitmaps: RootRef::empty(1),
            bad_blocks: RootRef::empty(1),
            marks: RootRef::empty(1),
        },
        segments: Vec::new(),
        failures: 0,
        retention: KeepRules::default(),
    }
}

/// Where labels stand: runs of at most [`REQUEST_BLOCKS_MAX`] blocks.
fn labels(device: &Device) -> [(Pba, u64); 3] {
    let [start, secondary] = SUPERBLOCK_COPIES;
    let end = Pba::new(device.block_count().saturating_sub(LABEL_BLOCKS));
    [(start, LABEL_BLOCKS), (secondary, 1), (end, LABEL_BLOCKS)]
}

/// The lengths of an extent and of a log ring in blocks that [`format()`] would go on with. Unless it
/// is forced, it does not on a device with a store, a partition table or a file system.
///
/// # Errors
/// `Busy`, with what was found; `Invalid` for impossible sizes; device errors.
pub async fn check(
    device: &Device,
    runtime: &Runtime,
    options: &Options,
) -> Result<(u64, u64), Error> {
    let sizes =
        geometry::choose_sizes(device.block_count(), options.extent_bytes, options.log_bytes)?;
    if !options.force {
        check_unused(device, runtime).await?;
    }
    Ok(sizes)
}

async fn check_unused(device: &Device, runtime: &Runtime) -> Result<(), Error> {
    let used = |found| Err(Error::refused(ErrorKind::Busy, found));
    if superblock::read(device, runtime, false).await.is_ok() {
        return used("it holds a Parallax store");
    }
    for (at, count) in labels(device) {
        let count = usize::try_from(count).unwrap_or(0);
        let buffer = device.read(at, count, runtime.buffers().take(count)).await?;
        let mut blocks = buffer.blocks().iter().take(count);
        if blocks.any(|block| block.0.iter().any(|&byte| byte != 0)) {
            return used("something is written where labels stand");
        }
    }
    Ok(())
}

/// Makes sure that what is rewritten in place has room below (design rule 26): really allocated,
/// and, for the log, already written once, so that a flush of it moves no file system metadata.
async fn prepare(device: &Device, at: Pba, count: u64, write: bool) -> Result<(), Error> {
    match device.allocate(at, count.min(4096)).await {
        Ok(()) => {}
        Err(error) if error.cause == Cause::Unsupported => {}
        Err(error) => return Err(error.into()),
    }
    if write { zero_blocks(device, at, count).await } else { Ok(()) }
}

async fn zero_blocks(device: &Device, at: Pba, count: u64) -> Result<(), Error> {
    let zeroes = Rc::new(Buffer::zeroed(REQUEST_BLOCKS_MAX));
    let chunk = u64::try_from(REQUEST_BLOCKS_MAX).unwrap_or(1);
    let mut done = 0;
    while done < count {
        let length = chunk.min(count - done);
        let slice = BlockSlice::new(Rc::clone(&zeroes), 0, usize::try_from(length).unwrap_or(1));
        device.write(at.plus(done), vec![slice]).await?;
        done += length;
    }
    Ok(())
}
