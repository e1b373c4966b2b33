//! What a virtio block device is made of: features, configuration space, requests. No I/O.
//!
//! Source: virtio 1.2, section 5.2. Everything is little-endian.

use disk::Disk;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::protocol::{CONFIG_BYTES_MAX, ConfigRange};

/// Bytes in a sector, the unit of every offset of the protocol whatever the block size is.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// The unit in which guests read and write; partition tables of most images count in it.
const LOGICAL_BLOCK_BYTES: u32 = 512;

/// Sectors in a block of a VDI.
const SECTORS_PER_BLOCK: u16 = 8;
const _: () = assert!(SECTORS_PER_BLOCK as u64 * SECTOR_BYTES == base::BLOCK_SIZE_U64);

/// The same as a power of two.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;
const _: () = assert!(1 << PHYSICAL_BLOCK_EXPONENT == SECTORS_PER_BLOCK);

/// Sectors that the disk takes at once: what it likes best.
const OPTIMAL_SECTORS: u32 = 2048;
const _: () = assert!(OPTIMAL_SECTORS as u64 * SECTOR_BYTES == disk::REQUEST_BYTES_MAX as u64);

/// Most bytes in one segment of a request.
const SEGMENT_BYTES_MAX: u32 = 256 << 10;

/// Most segments of a request: what QEMU's default ring of 128 descriptors holds beside the header
/// and the status.
const SEGMENTS_MAX: u32 = 126;

/// Most bytes of data in one request: 31.5 MiB.
pub(crate) const REQUEST_BYTES_MAX: u64 = SEGMENT_BYTES_MAX as u64 * SEGMENTS_MAX as u64;

/// Most ranges of one discard or zeroing, and most sectors of each: 2 GiB. A range costs the disk
/// a record, whatever its length.
pub(crate) const RANGES_MAX: u32 = 16;
pub(crate) const RANGE_SECTORS_MAX: u32 = 1 << 22;

/// Most rings of a device: one for each processor of a large guest.
pub(crate) const RINGS_MAX: u16 = 128;

/// Feature bits, those of the transport too.
pub(crate) mod feature {
    pub(crate) const SIZE_MAX: u64 = 1 << 1;
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    /// Of vhost, not of virtio: what is written to guest memory is logged.
    pub(crate) const LOG_ALL: u64 = 1 << 26;
    /// Of vhost-user, not of virtio.
    pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << 32;
}

/// The features of a device for `disk`.
pub(crate) fn features(disk: &dyn Disk) -> u64 {
    let kind =
        if disk.read_only() { feature::RO } else { feature::DISCARD | feature::WRITE_ZEROES };
    kind | feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::MQ
        | feature::LOG_ALL
        | feature::INDIRECT_DESC
        | feature::EVENT_IDX
        | feature::PROTOCOL_FEATURES
        | feature::VERSION_1
}

/// `struct virtio_blk_config` as far as our features go; what lies behind it is zero.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Default)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused_too: [u8; 3],
}

/// A part of the configuration space of a device for `disk`, as long as was asked for.
pub(crate) fn config(disk: &dyn Disk, range: &ConfigRange) -> Vec<u8> {
    let config = Config {
        capacity: (disk.size_bytes() / SECTOR_BYTES).into(),
        size_max: SEGMENT_BYTES_MAX.into(),
        seg_max: SEGMENTS_MAX.into(),
        blk_size: LOGICAL_BLOCK_BYTES.into(),
        physical_block_exp: PHYSICAL_BLOCK_EXPONENT,
        min_io_size: SECTORS_PER_BLOCK.into(),
        opt_io_size: OPTIMAL_SECTORS.into(),
        num_queues: RINGS_MAX.into(),
        max_discard_sectors: RANGE_SECTORS_MAX.into(),
        max_discard_seg: RANGES_MAX.into(),
        discard_sector_alignment: u32::from(SECTORS_PER_BLOCK).into(),
        max_write_zeroes_sectors: RANGE_SECTORS_MAX.into(),
        max_write_zeroes_seg: RANGES_MAX.into(),
        write_zeroes_may_unmap: 1,
        ..Config::default()
    };
    let zeroes = [0; CONFIG_BYTES_MAX];
    let all = config.as_bytes().iter().chain(&zeroes).copied();
    let wanted = usize::try_from(range.bytes).unwrap_or(0);
    all.skip(usize::try_from(range.offset).unwrap_or(usize::MAX)).take(wanted).collect()
}

/// Bytes of the header of a request.
pub(crate) const HEADER_BYTES: usize = 16;

/// Bytes of a range to discard or zero.
pub(crate) const RANGE_BYTES: usize = 16;

/// Bytes of the answer to `GET_ID`.
pub(crate) const SERIAL_BYTES: usize = 20;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Read,
    Write,
    Flush,
    Serial,
    Discard,
    WriteZeroes,
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// `None` if the device does not know it.
    pub(crate) operation: Option<Operation>,
    /// Where it reads or writes.
    pub(crate) sector: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    kind: U32,
    reserved: U32,
    sector: U64,
}

impl Header {
    pub(crate) fn decode(bytes: [u8; HEADER_BYTES]) -> Self {
        let raw: RawHeader = zerocopy::transmute!(bytes);
        let operation = match raw.kind.get() {
            0 => Some(Operation::Read),
            1 => Some(Operation::Write),
            4 => Some(Operation::Flush),
            8 => Some(Operation::Serial),
            11 => Some(Operation::Discard),
            13 => Some(Operation::WriteZeroes),
            _ => None,
        };
        Self { operation, sector: raw.sector.get() }
    }
}

/// A range to discard or zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// First sector.
    pub(crate) sector: u64,
    /// Number of sectors.
    pub(crate) sectors: u32,
    /// Whether zeroes need no space.
    pub(crate) unmap: bool,
    /// Whether there are flags that the device does not know.
    pub(crate) unknown_flags: bool,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRange {
    sector: U64,
    sectors: U32,
    flags: U32,
}

impl Range {
    pub(crate) fn decode(bytes: [u8; RANGE_BYTES]) -> Self {
        let raw: RawRange = zerocopy::transmute!(bytes);
        let flags = raw.flags.get();
        Self {
            sector: raw.sector.get(),
            sectors: raw.sectors.get(),
            unmap: flags & 1 != 0,
            unknown_flags: flags & !1 != 0,
        }
    }
}

/// The status bytes that are no [`disk::virtio_status`].
pub(crate) mod status {
    pub(crate) const OK: u8 = 0;
    pub(crate) const IOERR: u8 = 1;
    pub(crate) const UNSUPP: u8 = 2;
}

#[cfg(test)]
mod tests {
    use disk::MemDisk;

    use super::*;

    #[test]
    fn the_configuration_space_lies_where_the_standard_says() {
        assert_eq!(size_of::<Config>(), 60);
        let disk = MemDisk::new(1 << 20);
        let at = |offset, bytes| config(&disk, &ConfigRange { offset, bytes, flags: 0 });
        assert_eq!(at(0, 8), 2048u64.to_le_bytes());
        assert_eq!(at(12, 4), 126u32.to_le_bytes());
        assert_eq!(at(20, 5), [0, 2, 0, 0, 3]);
        assert_eq!(at(34, 2), RINGS_MAX.to_le_bytes());
        assert_eq!(at(56, 1), [1]);
        assert_eq!(at(250, 6), [0; 6]);
        assert_eq!(at(u32::MAX, 4), [0u8; 0]);
    }

    #[test]
    fn snapshots_take_no_changes() {
        let snapshot = MemDisk::read_only(vec![0; 4096]);
        let changes = feature::DISCARD | feature::WRITE_ZEROES;
        assert_eq!(features(&snapshot) & (feature::RO | changes), feature::RO);
        assert_eq!(features(&MemDisk::new(4096)) & (feature::RO | changes), changes);
    }

    #[test]
    fn headers_and_ranges_decode() {
        let mut bytes = [0; 16];
        bytes[0] = 11;
        bytes[8] = 7;
        let header = Header { operation: Some(Operation::Discard), sector: 7 };
        assert_eq!(Header::decode(bytes), header);
        bytes[0] = 2;
        assert_eq!(Header::decode(bytes).operation, None);
        let mut bytes = [0; 16];
        (bytes[0], bytes[8], bytes[12]) = (9, 3, 1);
        let range = Range { sector: 9, sectors: 3, unmap: true, unknown_flags: false };
        assert_eq!(Range::decode(bytes), range);
        bytes[12] = 2;
        assert!(Range::decode(bytes).unknown_flags);
    }
}
