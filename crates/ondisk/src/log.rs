//! Log blocks. A host's write-ahead log is a ring of them; each is written once per lap and
//! chained to its predecessor by checksum.

use base::{BLOCK_SIZE, Block, Buffer, Epoch, Lsn, Pba, RingPosition};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::bounds::{COUNTER_END, below};
use crate::layout::layout;
use crate::{Checksums, DecodeError, Record, StructureKind};

const MAGIC: [u8; 4] = *b"PXlg";

/// Bytes of records in a log block.
pub const LOG_PAYLOAD_BYTES: usize = 4016;

layout! {
    /// Fields of a log block.
    struct RawLogBlock as "log block" = LOG_BLOCK_LAYOUT {
        magic: [u8; 4],
        used_bytes: U16,
        record_count: U16,
        epoch: U64,
        position: U64,
        stream: U16,
        reserved_0: U16,
        reserved_1: U32,
        first_lsn: U64,
        durable: U64,
        previous: U64,
        slot_sequence: U64,
        cut: U64,
        payload: [u8; LOG_PAYLOAD_BYTES],
        checksum: U64,
    }
}

const _: () = assert!(LOG_BLOCK_LAYOUT.size == BLOCK_SIZE);

/// A decoded log block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogBlock {
    /// Epoch of the writer.
    pub epoch: Epoch,
    /// Its position, over all laps.
    pub position: RingPosition,
    /// Number of its first record, or of the next one if it holds none.
    pub first_lsn: Lsn,
    /// F (design rule 3): all records up to here, and their data, had completed before a device
    /// flush that succeeded was issued.
    pub durable: Lsn,
    /// Checksum of the block before it.
    pub previous: u64,
    /// Newest host slot sequence that the writer knew to be durable.
    pub slot_sequence: u64,
    /// Cut of the last published checkpoint.
    pub cut: Lsn,
    /// Its records; their numbers rise by one from `first_lsn`.
    pub records: Vec<Record>,
    /// Its own checksum, to which the next block is chained.
    pub checksum: u64,
}

/// Collects the records of one log block.
#[derive(Debug, Default)]
pub struct LogBlockBuilder {
    payload: Vec<u8>,
    record_count: u16,
}

/// What the builder does not know.
#[derive(Clone, Copy, Debug)]
pub struct Seal {
    /// Epoch of the writer.
    pub epoch: Epoch,
    /// Its nonce.
    pub nonce: u64,
    /// Position of the block.
    pub position: RingPosition,
    /// Where it stands.
    pub at: Pba,
    /// Number of its first record.
    pub first_lsn: Lsn,
    /// F.
    pub durable: Lsn,
    /// Checksum of the block before it.
    pub previous: u64,
    /// Newest durable host slot sequence.
    pub slot_sequence: u64,
    /// Cut of the last published checkpoint.
    pub cut: Lsn,
}

impl LogBlockBuilder {
    /// Whether a record of `bytes` encoded bytes still fits.
    #[must_use]
    pub fn fits(&self, bytes: usize) -> bool {
        self.payload.len() + bytes <= LOG_PAYLOAD_BYTES
    }

    /// Appends a record.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn push(&mut self, record: &Record) {
        assert!(self.fits(record.encoded_bytes()));
        record.encode(&mut self.payload);
        self.record_count += 1;
    }

    /// Number of records so far.
    #[must_use]
    pub fn record_count(&self) -> u16 {
        self.record_count
    }

    /// Encodes the block into `buffer` and returns its checksum. Empties the builder.
    ///
    /// # Panics
    /// If `buffer` is empty.
    pub fn seal(&mut self, checksums: &Checksums, seal: &Seal, buffer: &mut Buffer) -> u64 {
        let header = RawHeader {
            magic: MAGIC,
            used_bytes: u16::try_from(self.payload.len()).unwrap_or(u16::MAX).into(),
            record_count: self.record_count.into(),
            epoch: seal.epoch.get().into(),
            position: seal.position.get().into(),
            stream: 0.into(),
            reserved_0: 0.into(),
            reserved_1: 0.into(),
            first_lsn: seal.first_lsn.get().into(),
            durable: seal.durable.get().into(),
            previous: seal.previous.into(),
            slot_sequence: seal.slot_sequence.into(),
            cut: seal.cut.get().into(),
        };
        let Some(block) = buffer.blocks_mut().first_mut() else {
            unreachable!("a log block is sealed into a buffer of one block")
        };
        let (head, rest) = block.0.split_at_mut(HEADER_BYTES);
        head.copy_from_slice(header.as_bytes());
        let (payload, rest) = rest.split_at_mut(self.payload.len());
        payload.copy_from_slice(&self.payload);
        rest.fill(0);
        let checksum =
            checksums.structure(StructureKind::LogBlock, seal.at, seal.epoch, seal.nonce, block);
        if let Some(end) = block.0.last_chunk_mut::<8>() {
            *end = checksum.to_le_bytes();
        }
        self.payload.clear();
        self.record_count = 0;
        checksum
    }
}

const HEADER_BYTES: usize = 72;

/// The head of [`RawLogBlock`], so that sealing copies the payload once.
#[derive(zerocopy::IntoBytes, zerocopy::Immutable)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    used_bytes: U16,
    record_count: U16,
    epoch: U64,
    position: U64,
    stream: U16,
    reserved_0: U16,
    reserved_1: U32,
    first_lsn: U64,
    durable: U64,
    previous: U64,
    slot_sequence: U64,
    cut: U64,
}

const _: () = assert!(
    size_of::<RawHeader>() == HEADER_BYTES && HEADER_BYTES + LOG_PAYLOAD_BYTES + 8 == BLOCK_SIZE
);

impl LogBlock {
    /// Decodes and validates the block that stands at `at`, as one of `epoch` with `nonce`.
    ///
    /// # Errors
    /// `Checksum` for anything that this epoch did not write here; `Invalid` for an intact block
    /// that makes no sense, such as one with a record kind that this build does not know.
    pub fn decode(
        block: &Block,
        checksums: &Checksums,
        at: Pba,
        epoch: Epoch,
        nonce: u64,
    ) -> Result<Self, DecodeError> {
        let raw = RawLogBlock::ref_from_bytes(&block.0).map_err(|_| DecodeError::Magic)?;
        // Cheap tests first: recovery tries every block of the ring.
        if raw.magic != MAGIC || raw.epoch.get() != epoch.get() {
            return Err(DecodeError::Magic);
        }
        let checksum = checksums.structure(StructureKind::LogBlock, at, epoch, nonce, block);
        if raw.checksum.get() != checksum {
            return Err(DecodeError::Checksum);
        }
        let mut payload = raw
            .payload
            .get(..usize::from(raw.used_bytes.get()))
            .ok_or(DecodeError::Invalid("log block length"))?;
        let mut records = Vec::with_capacity(usize::from(raw.record_count.get()).min(256));
        for _ in 0..raw.record_count.get() {
            let (record, rest) = Record::decode(payload)?;
            records.push(record);
            payload = rest;
        }
        let bounded = |value: U64| below(value.get(), COUNTER_END, "log block counter");
        Ok(Self {
            epoch,
            position: RingPosition::new(bounded(raw.position)?),
            first_lsn: Lsn::new(bounded(raw.first_lsn)?),
            durable: Lsn::new(bounded(raw.durable)?),
            previous: raw.previous.get(),
            slot_sequence: bounded(raw.slot_sequence)?,
            cut: Lsn::new(bounded(raw.cut)?),
            records,
            checksum,
        })
    }
}
