//! Bounds of numbers that no store can have counted beyond. What decodes is within them, so that
//! sums of a few of these numbers cannot overflow, and what is counted fits into its tables.

use crate::DecodeError;
use crate::entry::{FANOUT_BITS, HEIGHT_MAX};

/// What LSNs, epochs, sequences and ring positions stay below: a million a second take more than
/// two thousand years to reach it.
pub const COUNTER_END: u64 = 1 << 56;

/// Most blocks of a VDI, and of a store: what a tree of the greatest height maps, and a block
/// address can say.
pub const BLOCKS_MAX: u64 = 1 << (HEIGHT_MAX as u32 * FANOUT_BITS);

/// What ids of VDIs and numbers of snapshots stay below: 16 records in each of 2^40 pages.
pub const RECORD_NUMBER_END: u64 = 16 * BLOCKS_MAX;

const _: () = assert!(16 * crate::VDI_LAYOUT.size == base::BLOCK_SIZE);

/// `value`, if it stays below `end`.
pub(crate) fn below(value: u64, end: u64, what: &'static str) -> Result<u64, DecodeError> {
    if value < end { Ok(value) } else { Err(DecodeError::Invalid(what)) }
}

/// `start`, if a run of `count` blocks from there lies within what addresses can say.
pub(crate) fn run(start: u64, count: u64, what: &'static str) -> Result<u64, DecodeError> {
    let end = start.checked_add(count);
    end.filter(|&end| end <= BLOCKS_MAX).map(|_| start).ok_or(DecodeError::Invalid(what))
}

/// `block_count`, if a VDI can have so many.
pub(crate) fn vdi_size(block_count: u64) -> Result<u64, DecodeError> {
    let is_possible = (1..=BLOCKS_MAX).contains(&block_count);
    is_possible.then_some(block_count).ok_or(DecodeError::Invalid("VDI size"))
}
