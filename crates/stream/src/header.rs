//! What a stream begins with: which snapshot it carries, and what it builds on.

use base::{BLOCK_SIZE_U64, SnapshotUuid};
use xxhash_rust::xxh3::xxh3_64_with_seed;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::Error;

/// The version of the format that is written and read here.
pub const VERSION: u32 = 1;

/// Bytes of the header.
pub const STREAM_HEADER_BYTES: usize = 512;

/// Longest name of a disk in bytes.
pub const NAME_BYTES_MAX: usize = 191;

/// Longest label of a snapshot in bytes.
pub const LABEL_BYTES_MAX: usize = 127;

/// First bytes of every stream. The line end shows whether they went through something that
/// converts those.
pub(crate) const MAGIC: [u8; 8] = *b"PLXSEND\n";

/// Seed of the header's checksum, from which the chain of checksums goes on.
pub(crate) const SEED: u64 = 0x5061_7261_6c6c_6178;

/// Largest disk: 2^40 blocks.
const SIZE_BYTES_MAX: u64 = BLOCK_SIZE_U64 << 40;

/// The header as it travels.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub(crate) magic: [u8; 8],
    pub(crate) version: U32,
    pub(crate) flags: U32,
    pub(crate) snapshot: [u8; 16],
    pub(crate) base: [u8; 16],
    pub(crate) size_bytes: U64,
    pub(crate) start: U64,
    pub(crate) created_ns: U64,
    pub(crate) name: [u8; NAME_BYTES_MAX],
    pub(crate) name_length: u8,
    pub(crate) label: [u8; LABEL_BYTES_MAX],
    pub(crate) label_length: u8,
    pub(crate) reserved: [u8; 112],
    pub(crate) checksum: U64,
}

const _: () = assert!(size_of::<RawHeader>() == STREAM_HEADER_BYTES);

/// What a stream carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the snapshot is known by.
    pub snapshot: SnapshotUuid,
    /// The snapshot that it builds on; `None`: all that there is comes with it.
    pub base: Option<SnapshotUuid>,
    /// Logical size of the disk at the snapshot; whole blocks.
    pub size_bytes: u64,
    /// First byte of which it says anything: what is below, an earlier stream has brought.
    pub start: u64,
    /// When the snapshot was taken, in nanoseconds since 1970.
    pub created_ns: u64,
    /// Name of the disk where it comes from.
    pub name: String,
    /// Label of the snapshot; empty for none.
    pub label: String,
}

impl Header {
    /// Encodes it; also the checksum that the first frame goes on from.
    pub(crate) fn encode(&self) -> ([u8; STREAM_HEADER_BYTES], u64) {
        let (name, name_length) = base::fixed_text(&self.name);
        let (label, label_length) = base::fixed_text(&self.label);
        let mut raw = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            flags: 0.into(),
            snapshot: self.snapshot.0,
            base: self.base.unwrap_or_default().0,
            size_bytes: self.size_bytes.into(),
            start: self.start.into(),
            created_ns: self.created_ns.into(),
            name,
            name_length,
            label,
            label_length,
            reserved: [0; 112],
            checksum: 0.into(),
        };
        let checksum = checksum(&raw);
        raw.checksum = checksum.into();
        let mut bytes = [0; STREAM_HEADER_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        (bytes, checksum)
    }

    /// Decodes what [`Self::encode`] made.
    pub(crate) fn decode(bytes: &[u8; STREAM_HEADER_BYTES]) -> Result<(Self, u64), Error> {
        let raw = RawHeader::ref_from_bytes(bytes).map_err(|_| Error::NotAStream)?;
        if raw.magic != MAGIC {
            return Err(Error::NotAStream);
        }
        // Before the checksum, which another version may have somewhere else.
        if raw.version.get() != VERSION {
            return Err(Error::Version(raw.version.get()));
        }
        if checksum(raw) != raw.checksum.get() {
            return Err(Error::Checksum("header"));
        }
        let snapshot = SnapshotUuid(raw.snapshot);
        if raw.flags.get() != 0 {
            return Err(Error::Invalid("it has flags that are not known here"));
        }
        if snapshot == SnapshotUuid::default() {
            return Err(Error::Invalid("it carries no snapshot"));
        }
        let (size_bytes, start) = (raw.size_bytes.get(), raw.start.get());
        let whole_blocks = [size_bytes, start].iter().all(|it| it.is_multiple_of(BLOCK_SIZE_U64));
        if !whole_blocks || size_bytes == 0 || size_bytes > SIZE_BYTES_MAX || start > size_bytes {
            return Err(Error::Invalid("no disk has such a size"));
        }
        let header = Self {
            snapshot,
            base: Some(SnapshotUuid(raw.base)).filter(|base| *base != SnapshotUuid::default()),
            size_bytes,
            start,
            created_ns: raw.created_ns.get(),
            name: decode_text(&raw.name, raw.name_length)?,
            label: decode_text(&raw.label, raw.label_length)?,
        };
        Ok((header, raw.checksum.get()))
    }
}

fn checksum(raw: &RawHeader) -> u64 {
    let covered = raw.as_bytes().get(..STREAM_HEADER_BYTES - 8);
    xxh3_64_with_seed(covered.unwrap_or_default(), SEED)
}

fn decode_text(bytes: &[u8], length: u8) -> Result<String, Error> {
    let text = bytes.get(..usize::from(length)).ok_or(Error::Invalid("a text is too long"))?;
    let text = std::str::from_utf8(text).map_err(|_| Error::Invalid("a text is not UTF-8"))?;
    Ok(text.to_owned())
}
