//! The superblock: what a store is. Written at format and by repair only, in two copies.

use base::{BLOCK_SIZE_U64, Block, Buffer, Epoch, Pba, StoreUuid};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::layout::layout;
use crate::{Checksums, DecodeError, StructureKind};

/// Where the copies stand: block 0, and 8 MiB further on, where neither a partition table nor a
/// boot loader that lands on the start of a device reaches. The primary is the first.
pub const SUPERBLOCK_COPIES: [Pba; 2] = [Pba::new(0), Pba::new(2048)];

const MAGIC: [u8; 8] = *b"PARALLAX";

/// The version of the format that this build writes.
const VERSION: u32 = 1;

/// XXH3-64, keyed.
const HASH_XXH3: u32 = 1;

/// The compatible feature: the space of free blocks stays allocated below.
pub const COMPATIBLE_KEEPS_SPACE: u64 = 1;
/// The incompatible feature: snapshots may be histories over a tree, and have none of their own.
pub const INCOMPATIBLE_HISTORY: u64 = 1;
/// The incompatible feature: snapshots may be held, and the store may have a retention of its own.
pub const INCOMPATIBLE_HOLDS: u64 = 2;
/// The incompatible feature: moments may keep all writes since the one before.
pub const INCOMPATIBLE_WRITES: u64 = 4;
/// The read-only compatible feature: a retention may have a budget.
pub const READ_ONLY_COMPATIBLE_BUDGETS: u64 = 1;
/// Feature flags of the format that this build knows; see docs/on-disk-format.md.
pub const KNOWN_INCOMPATIBLE: u64 = INCOMPATIBLE_HISTORY | INCOMPATIBLE_HOLDS | INCOMPATIBLE_WRITES;
/// Unknown ones of these allow reading only.
pub const KNOWN_READ_ONLY_COMPATIBLE: u64 = READ_ONLY_COMPATIBLE_BUDGETS;

layout! {
    /// Fields of the superblock.
    struct RawSuperblock as "superblock" = SUPERBLOCK_LAYOUT {
        magic: [u8; 8],
        version: U32,
        hash_id: U32,
        compatible: U64,
        read_only_compatible: U64,
        incompatible: U64,
        uuid: [u8; 16],
        key: [u8; 32],
        block_count: U64,
        extent_blocks: U64,
        log_ring_blocks: U64,
        host_slots_start: U64,
        host_slot_count: U32,
        lock_slot_count: U32,
        lock_slots_start: U64,
        created_ns: U64,
        reserved: [u8; 3944],
        checksum: U64,
    }
}

const _: () = assert!(SUPERBLOCK_LAYOUT.size == base::BLOCK_SIZE);

/// Feature flags that a store uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// May be ignored.
    pub compatible: u64,
    /// Unknown ones forbid writing.
    pub read_only_compatible: u64,
    /// Unknown ones forbid everything.
    pub incompatible: u64,
}

/// What a store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Identity, fresh at each format.
    pub uuid: StoreUuid,
    /// Key of all checksums but the superblock's own.
    pub key: [u8; 32],
    /// Feature flags.
    pub features: Features,
    /// Length of the store in blocks.
    pub block_count: u64,
    /// Length of an extent in blocks; a power of two.
    pub extent_blocks: u64,
    /// Length of one host's log ring in blocks.
    pub log_ring_blocks: u64,
    /// First block of the host slots; each host has four blocks: slot A, slot B, heartbeat, spare.
    pub host_slots_start: Pba,
    /// Number of host slots.
    pub host_slot_count: u32,
    /// First block of the lock slots (disk leases).
    pub lock_slots_start: Pba,
    /// Number of lock slots.
    pub lock_slot_count: u32,
    /// When it was formatted, in nanoseconds since 1970.
    pub created_ns: u64,
}

impl Superblock {
    /// Encodes the copy that stands at `at`.
    #[must_use]
    pub fn encode(&self, at: Pba) -> Buffer {
        let mut raw = RawSuperblock {
            magic: MAGIC,
            version: VERSION.into(),
            hash_id: HASH_XXH3.into(),
            compatible: self.features.compatible.into(),
            read_only_compatible: self.features.read_only_compatible.into(),
            incompatible: self.features.incompatible.into(),
            uuid: self.uuid.0,
            key: self.key,
            block_count: self.block_count.into(),
            extent_blocks: self.extent_blocks.into(),
            log_ring_blocks: self.log_ring_blocks.into(),
            host_slots_start: self.host_slots_start.get().into(),
            host_slot_count: self.host_slot_count.into(),
            lock_slot_count: self.lock_slot_count.into(),
            lock_slots_start: self.lock_slots_start.get().into(),
            created_ns: self.created_ns.into(),
            reserved: [0; 3944],
            checksum: 0.into(),
        };
        let unsealed = Buffer::from_bytes(raw.as_bytes());
        raw.checksum = own_checksum(self.uuid, at, unsealed.blocks()).into();
        Buffer::from_bytes(raw.as_bytes())
    }

    /// Decodes and validates the copy at `at`. Feature flags are not judged here.
    ///
    /// # Errors
    /// `Magic` if no superblock stands here; `Checksum` if a damaged one does; `Invalid` if it is
    /// intact and makes no sense, or has a version or a hash that this build does not know.
    pub fn decode(block: &Block, at: Pba) -> Result<Self, DecodeError> {
        let raw = RawSuperblock::read_from_bytes(&block.0).map_err(|_| DecodeError::Magic)?;
        if raw.magic != MAGIC {
            return Err(DecodeError::Magic);
        }
        let uuid = StoreUuid(raw.uuid);
        if raw.checksum.get() != own_checksum(uuid, at, std::slice::from_ref(block)) {
            return Err(DecodeError::Checksum);
        }
        let superblock = Self {
            uuid,
            key: raw.key,
            features: Features {
                compatible: raw.compatible.get(),
                read_only_compatible: raw.read_only_compatible.get(),
                incompatible: raw.incompatible.get(),
            },
            block_count: raw.block_count.get(),
            extent_blocks: raw.extent_blocks.get(),
            log_ring_blocks: raw.log_ring_blocks.get(),
            host_slots_start: Pba::new(raw.host_slots_start.get()),
            host_slot_count: raw.host_slot_count.get(),
            lock_slots_start: Pba::new(raw.lock_slots_start.get()),
            lock_slot_count: raw.lock_slot_count.get(),
            created_ns: raw.created_ns.get(),
        };
        if raw.version.get() != VERSION {
            return Err(DecodeError::Invalid("format version"));
        }
        if raw.hash_id.get() != HASH_XXH3 {
            return Err(DecodeError::Invalid("hash id"));
        }
        superblock.check_geometry()?;
        Ok(superblock)
    }

    fn check_geometry(&self) -> Result<(), DecodeError> {
        let within = |start: Pba, count: u64| {
            start.get().checked_add(count).is_some_and(|end| end <= self.block_count)
        };
        let hosts = u64::from(self.host_slot_count);
        if !self.extent_blocks.is_power_of_two()
            || self.extent_blocks < (16 << 20) / BLOCK_SIZE_U64
            || self.extent_blocks > 1 << 28
        {
            return Err(DecodeError::Invalid("extent length"));
        }
        if self.block_count >= 1 << 40 || self.block_count < 4 * self.extent_blocks {
            return Err(DecodeError::Invalid("store length"));
        }
        if !(16..=self.extent_blocks).contains(&self.log_ring_blocks) || hosts == 0 {
            return Err(DecodeError::Invalid("log ring length"));
        }
        if !within(self.host_slots_start, hosts * 4)
            || !within(self.lock_slots_start, u64::from(self.lock_slot_count))
        {
            return Err(DecodeError::Invalid("slots"));
        }
        Ok(())
    }
}

/// The superblock holds the key of all other checksums; its own is not keyed.
fn own_checksum(uuid: StoreUuid, at: Pba, blocks: &[Block]) -> u64 {
    blocks.first().map_or(0, |block| {
        Checksums::new(uuid, &[0; 32]).structure(
            StructureKind::Superblock,
            at,
            Epoch::new(0),
            0,
            block,
        )
    })
}
