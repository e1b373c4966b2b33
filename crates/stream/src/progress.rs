//! How far a receive has come: what a receiver notes in the last block of a partial disk, and what
//! a sender is told so that it goes on from there.

use base::{BLOCK_SIZE, BLOCK_SIZE_U64, SnapshotUuid};
use xxhash_rust::xxh3::xxh3_64;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::header::{Header, VERSION};

/// Bytes that a receiver notes: one block, which is written whole or not at all.
pub const PROGRESS_BYTES: usize = BLOCK_SIZE;

const MAGIC: [u8; 8] = *b"PLXPART\n";

/// Bytes that are noted; zeroes follow.
const RAW_BYTES: usize = 72;

/// Bytes of them that a token has: which stream, how far, and the checksum of both.
const TOKEN_BYTES: usize = RAW_BYTES - 16;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawProgress {
    pub(crate) magic: [u8; 8],
    pub(crate) version: U32,
    pub(crate) reserved: U32,
    pub(crate) snapshot: [u8; 16],
    pub(crate) base: [u8; 16],
    pub(crate) size_bytes: U64,
    pub(crate) done: U64,
    pub(crate) checksum: U64,
}

const _: () = assert!(size_of::<RawProgress>() == RAW_BYTES);

/// A receive that has not come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What the snapshot is known by.
    pub snapshot: SnapshotUuid,
    /// What it builds on.
    pub base: Option<SnapshotUuid>,
    /// Logical size of the disk at the snapshot.
    pub size_bytes: u64,
    /// What lies below this byte is there, and durable.
    pub done: u64,
}

impl Progress {
    /// Of a stream of which nothing is there yet.
    #[must_use]
    pub fn beginning(header: &Header) -> Self {
        Self {
            snapshot: header.snapshot,
            base: header.base,
            size_bytes: header.size_bytes,
            done: 0,
        }
    }

    /// Whether a stream goes on where this stands, or before.
    #[must_use]
    pub fn continues_with(&self, header: &Header) -> bool {
        Self { done: 0, ..*self } == Self::beginning(header) && header.start <= self.done
    }

    /// As it is noted.
    #[must_use]
    pub fn to_block(&self) -> Vec<u8> {
        let mut block = self.raw().as_bytes().to_vec();
        block.resize(PROGRESS_BYTES, 0);
        block
    }

    /// What was noted; `None` if nothing was.
    #[must_use]
    pub fn from_block(block: &[u8]) -> Option<Self> {
        let (raw, _) = RawProgress::ref_from_prefix(block).ok()?;
        Self::verified(raw)
    }

    /// As people carry it to the sender.
    #[must_use]
    pub fn to_token(&self) -> String {
        let raw = self.raw();
        let bytes = raw.as_bytes().iter().skip(RAW_BYTES - TOKEN_BYTES);
        bytes.map(|byte| format!("{byte:02x}")).collect()
    }

    /// What [`Self::to_token`] made; `None` if it did not.
    #[must_use]
    pub fn from_token(token: &str) -> Option<Self> {
        let mut bytes = [0; RAW_BYTES];
        let digits = token.as_bytes().chunks_exact(2);
        if token.len() != 2 * TOKEN_BYTES || !token.is_ascii() {
            return None;
        }
        for (byte, digits) in bytes.iter_mut().skip(RAW_BYTES - TOKEN_BYTES).zip(digits) {
            // `+1` would be a number too.
            let digits = std::str::from_utf8(digits).ok().filter(|it| !it.starts_with('+'))?;
            *byte = u8::from_str_radix(digits, 16).ok()?;
        }
        let raw = RawProgress::ref_from_bytes(&bytes).ok()?;
        Self::verified(&RawProgress { magic: MAGIC, version: VERSION.into(), ..*raw })
    }

    fn raw(&self) -> RawProgress {
        let mut raw = RawProgress {
            magic: MAGIC,
            version: VERSION.into(),
            reserved: 0.into(),
            snapshot: self.snapshot.0,
            base: self.base.unwrap_or_default().0,
            size_bytes: self.size_bytes.into(),
            done: self.done.into(),
            checksum: 0.into(),
        };
        raw.checksum = checksum(&raw).into();
        raw
    }

    fn verified(raw: &RawProgress) -> Option<Self> {
        let known = raw.magic == MAGIC && raw.version.get() == VERSION;
        let progress = Self {
            snapshot: SnapshotUuid(raw.snapshot),
            base: Some(SnapshotUuid(raw.base)).filter(|base| *base != SnapshotUuid::default()),
            size_bytes: raw.size_bytes.get(),
            done: raw.done.get(),
        };
        let sound = checksum(raw) == raw.checksum.get()
            && progress.done <= progress.size_bytes
            && progress.done.is_multiple_of(BLOCK_SIZE_U64);
        (known && sound).then_some(progress)
    }
}

fn checksum(raw: &RawProgress) -> u64 {
    xxh3_64(raw.as_bytes().get(..RAW_BYTES - 8).unwrap_or_default())
}
