//! What a stream consists of: runs of data, runs of zeroes, and the end.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::Error;

/// Bytes of the header of a frame.
pub const FRAME_HEADER_BYTES: usize = 40;

/// Most bytes of a disk that one frame carries: 1 MiB, as much as one request takes.
pub const FRAME_DATA_BYTES_MAX: usize = 1 << 20;

/// The header of a frame as it travels.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawFrame {
    pub(crate) kind: u8,
    pub(crate) encoding: u8,
    pub(crate) reserved: U16,
    pub(crate) stored_bytes: U32,
    pub(crate) offset: U64,
    pub(crate) length: U64,
    pub(crate) payload: U64,
    pub(crate) checksum: U64,
}

const _: () = assert!(size_of::<RawFrame>() == FRAME_HEADER_BYTES);

pub(crate) const DATA: u8 = 1;
pub(crate) const ZEROES: u8 = 2;
pub(crate) const END: u8 = 3;

/// How the payload of a frame stands for the bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// As they are.
    Plain = 0,
    /// As one zstd frame.
    Zstd = 1,
}

/// A part of what differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// There is data.
    Data(Packed),
    /// There are zeroes, and need not be anything.
    Zeroes {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
}

/// A run of data as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// First byte.
    pub offset: u64,
    /// Number of bytes; at most [`FRAME_DATA_BYTES_MAX`].
    pub length: usize,
    /// How the payload is to be read.
    pub encoding: Encoding,
    /// The payload; no longer than what it stands for.
    pub payload: Vec<u8>,
}

impl Frame {
    /// The first byte behind it.
    #[must_use]
    pub fn end(&self) -> u64 {
        match self {
            Self::Data(packed) => packed.offset.saturating_add(packed.length as u64),
            Self::Zeroes { offset, length } => offset.saturating_add(*length),
        }
    }
}

impl RawFrame {
    /// A frame without a payload.
    pub(crate) fn bare(kind: u8, offset: u64, length: u64) -> Self {
        Self {
            kind,
            encoding: Encoding::Plain as u8,
            reserved: 0.into(),
            stored_bytes: 0.into(),
            offset: offset.into(),
            length: length.into(),
            payload: xxh3_64(&[]).into(),
            checksum: 0.into(),
        }
    }

    /// The header of a frame with this payload.
    pub(crate) fn of(packed: &Packed) -> Self {
        Self {
            encoding: packed.encoding as u8,
            stored_bytes: u32::try_from(packed.payload.len()).unwrap_or(u32::MAX).into(),
            payload: xxh3_64(&packed.payload).into(),
            ..Self::bare(DATA, packed.offset, packed.length as u64)
        }
    }

    /// Whether it is of a kind without payload, and says nothing of one.
    pub(crate) fn is_bare(&self) -> bool {
        let bare = Self::bare(self.kind, self.offset.get(), self.length.get());
        let bare = Self { checksum: self.checksum, ..bare };
        bare.as_bytes() == self.as_bytes()
    }

    /// Its checksum, behind a frame or header with the checksum `previous`.
    pub(crate) fn chained(&self, previous: u64) -> u64 {
        let covered = self.as_bytes().get(..FRAME_HEADER_BYTES - 8);
        xxh3_64_with_seed(covered.unwrap_or_default(), previous)
    }

    /// Bytes of the payload, and how they are to be read, of a frame with data.
    pub(crate) fn stored(&self) -> Result<(usize, Encoding), Error> {
        let nonsense = Error::Invalid("a frame has another length than it can have");
        let length = usize::try_from(self.length.get()).unwrap_or(usize::MAX);
        let stored = usize::try_from(self.stored_bytes.get()).unwrap_or(usize::MAX);
        if length > FRAME_DATA_BYTES_MAX || stored > length || self.reserved.get() != 0 {
            return Err(nonsense);
        }
        match self.encoding {
            0 if stored == length => Ok((stored, Encoding::Plain)),
            0 => Err(nonsense),
            1 => Ok((stored, Encoding::Zstd)),
            _ => Err(Error::Invalid("a frame has an encoding that is not known here")),
        }
    }
}
