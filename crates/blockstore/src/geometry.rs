//! Where things stand in a store.
//!
//! ```text
//! extent 0 (system)                                extents 1 ..           the rest
//! +------------+-----------+-------------+------+  +------------------+  +---------------+
//! | superblock | lock      | superblock  | host |  | log ring of      |  | data or       |
//! | copy 0     | slots     | copy 1      | slots|  | host 0, ...      |  | metadata      |
//! +------------+-----------+-------------+------+  +------------------+  +---------------+
//! 0            1           2048          2049
//! ```

use base::{BLOCK_SIZE_U64, ErrorKind, ExtentIndex, HostId, Pba, RingPosition};
use ondisk::Superblock;

use crate::Error;

/// Hosts that a store has slots for.
pub(crate) const HOST_SLOT_COUNT: u32 = 64;

/// Lock slots: one block per host for each of the three rare events.
pub(crate) const LOCK_SLOT_COUNT: u32 = 3 * HOST_SLOT_COUNT;

const LOCK_SLOTS_START: Pba = Pba::new(1);
const HOST_SLOTS_START: Pba = Pba::new(2049);

/// Smallest extent in bytes.
pub(crate) const EXTENT_BYTES_MIN: u64 = 16 << 20;
/// Largest extent in bytes.
pub(crate) const EXTENT_BYTES_MAX: u64 = 1 << 40;
/// Default extent in bytes, on stores that have room for 64 of them.
const EXTENT_BYTES_DEFAULT: u64 = 2 << 30;
/// Fewest extents: system, log, metadata and data, and as many free ones.
const EXTENT_COUNT_MIN: u64 = 6;

/// Smallest log ring in bytes.
pub(crate) const LOG_BYTES_MIN: u64 = 256 << 10;
/// Largest log ring in bytes: replay reads all of it within a second.
pub(crate) const LOG_BYTES_MAX: u64 = 256 << 20;

const _: () = assert!(LOCK_SLOTS_START.get() + (LOCK_SLOT_COUNT as u64) < 2048);
const _: () = assert!(HOST_SLOTS_START.get() + 4 * (HOST_SLOT_COUNT as u64) < 4096);

/// Places in a store.
#[derive(Clone, Debug)]
pub struct Geometry {
    /// Length of the store in blocks.
    pub block_count: u64,
    /// Length of an extent in blocks.
    pub extent_blocks: u64,
    /// Length of a log ring in blocks.
    pub ring_blocks: u64,
    host_slots_start: Pba,
}

/// Chooses and checks the sizes of a new store: `(extent_blocks, ring_blocks)`.
///
/// # Errors
/// `Invalid`, with the bounds.
pub fn choose_sizes(
    block_count: u64,
    extent_bytes: Option<u64>,
    log_bytes: Option<u64>,
) -> Result<(u64, u64), Error> {
    let invalid = |message: String| Error::refused(ErrorKind::Invalid, message);
    let store_bytes = block_count.saturating_mul(BLOCK_SIZE_U64);
    let fitting = (store_bytes / 64).max(1);
    let extent_bytes = extent_bytes.unwrap_or_else(|| {
        let power = 1u64 << (63 - fitting.leading_zeros());
        power.clamp(EXTENT_BYTES_MIN, EXTENT_BYTES_DEFAULT)
    });
    if !extent_bytes.is_power_of_two()
        || !(EXTENT_BYTES_MIN..=EXTENT_BYTES_MAX).contains(&extent_bytes)
    {
        return Err(invalid("the extent size must be a power of two from 16M to 1T".into()));
    }
    if store_bytes / extent_bytes < EXTENT_COUNT_MIN {
        return Err(invalid(format!(
            "a store needs at least {EXTENT_COUNT_MIN} extents: {} at this extent size",
            base::size::HumanBytes(EXTENT_COUNT_MIN * extent_bytes)
        )));
    }
    if block_count >= 1 << 40 {
        return Err(invalid("a store cannot be larger than 4 PiB".into()));
    }
    let log_bytes = log_bytes.unwrap_or((extent_bytes / 8).clamp(4 << 20, LOG_BYTES_MAX))
        / BLOCK_SIZE_U64
        * BLOCK_SIZE_U64;
    if !(LOG_BYTES_MIN..=LOG_BYTES_MAX).contains(&log_bytes) || log_bytes > extent_bytes {
        return Err(invalid("the log must have 256K to 256M, and fit into an extent".into()));
    }
    Ok((extent_bytes / BLOCK_SIZE_U64, log_bytes / BLOCK_SIZE_U64))
}

impl Geometry {
    /// The places of a store.
    #[must_use]
    pub fn new(superblock: &Superblock) -> Self {
        Self {
            block_count: superblock.block_count,
            extent_blocks: superblock.extent_blocks,
            ring_blocks: superblock.log_ring_blocks,
            host_slots_start: superblock.host_slots_start,
        }
    }

    /// First block of the host slots of a new store.
    #[must_use]
    pub const fn host_slots_start() -> Pba {
        HOST_SLOTS_START
    }

    /// First block of the lock slots of a new store.
    #[must_use]
    pub const fn lock_slots_start() -> Pba {
        LOCK_SLOTS_START
    }

    /// Whole extents; blocks behind the last one are not used.
    #[must_use]
    pub fn extent_count(&self) -> u32 {
        u32::try_from(self.block_count / self.extent_blocks).unwrap_or(u32::MAX)
    }

    /// First block of an extent.
    #[must_use]
    pub fn extent_start(&self, extent: ExtentIndex) -> Pba {
        Pba::new(u64::from(extent.get()) * self.extent_blocks)
    }

    /// The extent that a block lies in.
    #[must_use]
    pub fn extent_of(&self, pba: Pba) -> ExtentIndex {
        ExtentIndex::new(u32::try_from(pba.get() / self.extent_blocks).unwrap_or(u32::MAX))
    }

    /// Host slot `copy` (0 or 1) of a host.
    #[must_use]
    pub fn host_slot(&self, host: HostId, copy: u64) -> Pba {
        self.host_slots_start.plus(u64::from(host.get()) * 4 + copy % 2)
    }

    /// Heartbeat of a host.
    #[must_use]
    pub fn heartbeat(&self, host: HostId) -> Pba {
        self.host_slots_start.plus(u64::from(host.get()) * 4 + 2)
    }

    /// Where a log block of the ring that starts at `log_start` stands.
    #[must_use]
    pub fn log_block(&self, log_start: Pba, position: RingPosition) -> Pba {
        log_start.plus(position.get() % self.ring_blocks)
    }
}
