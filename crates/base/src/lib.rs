//! Sizes, identifiers, addresses, limits and error kinds that every other crate shares. No I/O.
//!
//! Every address, identifier and counter is a type of its own: a block address in a VDI ([`Lba`])
//! cannot be passed where a block address in the blockstore ([`Pba`]) is meant. Arithmetic exists
//! only where it has a meaning.

mod buffer;
mod error;
mod id;
pub mod mutant;
pub mod size;

pub use buffer::{Block, BlockSlice, Buffer, BufferPool};
pub use error::ErrorKind;
pub use id::{
    Ballot, BirthLabel, ClaimGeneration, Epoch, ExtentIndex, HostId, Lba, Lsn, Pba, RingPosition,
    SnapshotNumber, SnapshotUuid, StoreUuid, VdiId,
};

/// Bytes in a block: the unit of allocation, of checksums and of atomicity (G3).
pub const BLOCK_SIZE: usize = 4096;

/// [`BLOCK_SIZE`] as `u64`, for byte offsets.
pub const BLOCK_SIZE_U64: u64 = 4096;

const _: () = assert!(BLOCK_SIZE_U64 == BLOCK_SIZE as u64);

/// Most blocks that one request, one device operation or one log record covers: 1 MiB.
/// A record of 256 hashes of 8 bytes fills half a log block, so that every record fits into one.
pub const REQUEST_BLOCKS_MAX: usize = 256;

/// Text as it stands in a field of `MAX` bytes, with its length in another one: what does not fit is cut.
#[must_use]
pub fn fixed_text<const MAX: usize>(text: &str) -> ([u8; MAX], u8) {
    let mut bytes = [0; MAX];
    for (to, from) in bytes.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    (bytes, u8::try_from(text.len().min(MAX)).unwrap_or(u8::MAX))
}
