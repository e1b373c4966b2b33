//! The slot through which a host publishes: one write makes a checkpoint of everything that the
//! host owns valid. Two slots per host, written in turn, so that a torn write loses only the
//! newer one; plus a heartbeat block that vouches for nothing but life.

use base::{Ballot, Block, Buffer, Epoch, HostId, Lsn, Pba, RingPosition};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::bounds::{BLOCKS_MAX, COUNTER_END, RECORD_NUMBER_END, below};
use crate::layout::layout;
use crate::table::{KEEP_RULE_LAYOUT, KEEP_RULES_MAX, KeepRule, KeepRules};
use crate::{Checksums, DecodeError, RootRef, StructureKind};

const MAGIC: [u8; 4] = *b"PXhs";
const HEARTBEAT_MAGIC: [u8; 4] = *b"PXhb";

/// Most segments of the log that a slot can name. Each recovery adds up to two, a checkpoint drops those
/// that it covers; recovery writes a checkpoint itself before they run out.
pub const LOG_SEGMENTS_MAX: usize = 16;

layout! {
    /// Fields of a log segment in a host slot.
    struct RawSegment as "log segment" = LOG_SEGMENT_LAYOUT {
        epoch: U64,
        nonce: U64,
        start: U64,
        first_lsn: U64,
        last_lsn: U64,
        chain: U64,
    }
}

layout! {
    /// Fields of a host slot.
    struct RawHostSlot as "host slot" = HOST_SLOT_LAYOUT {
        magic: [u8; 4],
        host: U16,
        state: u8,
        segment_count: u8,
        sequence: U64,
        epoch: U64,
        boot_id: [u8; 16],
        ballot: U64,
        cut: U64,
        vdi_id_next: U64,
        wall_ns: U64,
        store_ns: U64,
        log_start: U64,
        directory: [u8; RootRef::BYTES],
        extents: [u8; RootRef::BYTES],
        vdis: [u8; RootRef::BYTES],
        bitmaps: [u8; RootRef::BYTES],
        bad_blocks: [u8; RootRef::BYTES],
        segments: [RawSegment; LOG_SEGMENTS_MAX],
        failures: U64,
        retention: [u8; KEEP_RULES_MAX * KEEP_RULE_LAYOUT.size],
        marks: [u8; RootRef::BYTES],
        budget: U64,
        reserved: [u8; 2976],
        checksum: U64,
    }
}

layout! {
    /// Fields of a heartbeat.
    struct RawHeartbeat as "heartbeat" = HEARTBEAT_LAYOUT {
        magic: [u8; 4],
        host: U16,
        reserved_0: U16,
        epoch: U64,
        sequence: U64,
        wall_ns: U64,
        boot_id: [u8; 16],
        reserved: [u8; 4036],
        reserved_1: U32,
        checksum: U64,
    }
}

const _: () = assert!(HOST_SLOT_LAYOUT.size == base::BLOCK_SIZE);
const _: () = assert!(HEARTBEAT_LAYOUT.size == base::BLOCK_SIZE);

/// Whether the host that wrote the slot still runs on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SlotState {
    /// No host uses the slot.
    Free = 0,
    /// Closed cleanly: the roots hold everything, nothing is to be replayed.
    Clean = 1,
    /// In use, or left by a crash.
    Running = 2,
}

/// The trees that a slot publishes. Control trees are written under a ballot of their lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Roots {
    /// Control: name, parent and owner of each VDI.
    pub directory: RootRef,
    /// Control: kind and owner of each extent.
    pub extents: RootRef,
    /// This host's VDIs: their roots, sizes, snapshots.
    pub vdis: RootRef,
    /// Allocation bitmaps of this host's extents.
    pub bitmaps: RootRef,
    /// Blocks that failed a write and are never used again.
    pub bad_blocks: RootRef,
    /// What a garbage collection under way has reached so far; empty if none is.
    pub marks: RootRef,
}

/// A part of the log that one epoch wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogSegment {
    /// The epoch.
    pub epoch: Epoch,
    /// Its random nonce; seeds every block's checksum, with the epoch.
    pub nonce: u64,
    /// Position of its first block that may still be needed.
    pub start: RingPosition,
    /// Number of the first record in that block.
    pub first_lsn: Lsn,
    /// Last record that counts, once the segment is sealed: what lies above was rewritten by the
    /// next epoch or dropped. Zero while the epoch is the current one.
    pub last_lsn: Lsn,
    /// Checksum of the block before `start`, to which that one is chained.
    pub chain: u64,
}

/// A host's published state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSlot {
    /// Whose.
    pub host: HostId,
    /// Whether it is in use.
    pub state: SlotState,
    /// Rises by one with each publication; the newer slot wins.
    pub sequence: u64,
    /// Epoch of the writer.
    pub epoch: Epoch,
    /// Boot of the machine that the writer ran on.
    pub boot_id: [u8; 16],
    /// Lock ballot of the control trees.
    pub ballot: Ballot,
    /// The roots contain all records up to here and none above.
    pub cut: Lsn,
    /// Next VDI id.
    pub vdi_id_next: u64,
    /// Wall time of the publication in nanoseconds since 1970.
    pub wall_ns: u64,
    /// Monotonic time that this store has been open, in nanoseconds.
    pub store_ns: u64,
    /// First block of the host's log ring; meaningless in a free slot.
    pub log_start: Pba,
    /// The trees.
    pub roots: Roots,
    /// Log to replay on top, oldest first.
    pub segments: Vec<LogSegment>,
    /// How often the store was opened again under its users after its device had failed.
    pub failures: u64,
    /// Which moments are kept of VDIs that have no rules of their own.
    pub retention: KeepRules,
}

impl HostSlot {
    /// Encodes the slot for block `at`.
    ///
    /// # Panics
    /// If there are more than [`LOG_SEGMENTS_MAX`] segments.
    #[must_use]
    pub fn encode(&self, checksums: &Checksums, at: Pba) -> Buffer {
        assert!(self.segments.len() <= LOG_SEGMENTS_MAX);
        let segment = |index: usize| self.segments.get(index).map(encode_segment);
        let mut raw = RawHostSlot {
            magic: MAGIC,
            host: self.host.get().into(),
            state: self.state as u8,
            segment_count: u8::try_from(self.segments.len()).unwrap_or(u8::MAX),
            sequence: self.sequence.into(),
            epoch: self.epoch.get().into(),
            boot_id: self.boot_id,
            ballot: self.ballot.get().into(),
            cut: self.cut.get().into(),
            vdi_id_next: self.vdi_id_next.into(),
            wall_ns: self.wall_ns.into(),
            store_ns: self.store_ns.into(),
            log_start: self.log_start.get().into(),
            directory: self.roots.directory.to_bytes(),
            extents: self.roots.extents.to_bytes(),
            vdis: self.roots.vdis.to_bytes(),
            bitmaps: self.roots.bitmaps.to_bytes(),
            bad_blocks: self.roots.bad_blocks.to_bytes(),
            segments: std::array::from_fn(|index| segment(index).unwrap_or(EMPTY_SEGMENT)),
            failures: self.failures.into(),
            retention: KeepRule::list_to_bytes(&self.retention.rules),
            marks: self.roots.marks.to_bytes(),
            budget: self.retention.raw_budget().into(),
            reserved: [0; 2976],
            checksum: 0.into(),
        };
        let unsealed = Buffer::from_bytes(raw.as_bytes());
        let checksum = unsealed.blocks().first().map_or(0, |block| {
            checksums.structure(StructureKind::HostSlot, at, Epoch::new(0), 0, block)
        });
        raw.checksum = checksum.into();
        Buffer::from_bytes(raw.as_bytes())
    }

    /// Decodes and validates the slot at `at`.
    ///
    /// # Errors
    /// `Magic` if none was ever written here; `Checksum` if it is torn or rotten; `Invalid` if it
    /// makes no sense.
    pub fn decode(block: &Block, checksums: &Checksums, at: Pba) -> Result<Self, DecodeError> {
        let raw = RawHostSlot::read_from_bytes(&block.0).map_err(|_| DecodeError::Magic)?;
        if raw.magic != MAGIC {
            return Err(DecodeError::Magic);
        }
        let checksum = checksums.structure(StructureKind::HostSlot, at, Epoch::new(0), 0, block);
        if raw.checksum.get() != checksum {
            return Err(DecodeError::Checksum);
        }
        let state = match raw.state {
            0 => SlotState::Free,
            1 => SlotState::Clean,
            2 => SlotState::Running,
            _ => return Err(DecodeError::Invalid("host slot state")),
        };
        let segments = raw
            .segments
            .get(..usize::from(raw.segment_count))
            .ok_or(DecodeError::Invalid("log segment count"))?;
        let segments: Vec<_> = segments.iter().map(decode_segment).collect::<Result<_, _>>()?;
        if !segments.is_sorted_by(follows) {
            return Err(DecodeError::Invalid("order of log segments"));
        }
        Ok(Self {
            host: HostId::new(raw.host.get()),
            state,
            sequence: below(raw.sequence.get(), COUNTER_END, "sequence")?,
            epoch: Epoch::new(below(raw.epoch.get(), COUNTER_END, "epoch")?),
            boot_id: raw.boot_id,
            ballot: Ballot::new(raw.ballot.get()),
            cut: Lsn::new(below(raw.cut.get(), COUNTER_END, "cut")?),
            vdi_id_next: below(raw.vdi_id_next.get(), RECORD_NUMBER_END, "next VDI id")?,
            wall_ns: raw.wall_ns.get(),
            store_ns: raw.store_ns.get(),
            log_start: Pba::new(below(raw.log_start.get(), BLOCKS_MAX, "start of the log")?),
            roots: Roots {
                directory: RootRef::from_bytes(raw.directory)?,
                extents: RootRef::from_bytes(raw.extents)?,
                vdis: RootRef::from_bytes(raw.vdis)?,
                bitmaps: RootRef::from_bytes(raw.bitmaps)?,
                bad_blocks: RootRef::from_bytes(raw.bad_blocks)?,
                // Older writers know none: what was marked before is forgotten then.
                marks: match raw.marks == [0; RootRef::BYTES] {
                    true => RootRef::empty(1),
                    false => RootRef::from_bytes(raw.marks)?,
                },
            },
            segments,
            failures: raw.failures.get(),
            retention: KeepRules::decode(&raw.retention, raw.budget.get())?,
        })
    }
}

const EMPTY_SEGMENT: RawSegment = RawSegment {
    epoch: U64::ZERO,
    nonce: U64::ZERO,
    start: U64::ZERO,
    first_lsn: U64::ZERO,
    last_lsn: U64::ZERO,
    chain: U64::ZERO,
};

fn encode_segment(segment: &LogSegment) -> RawSegment {
    RawSegment {
        epoch: segment.epoch.get().into(),
        nonce: segment.nonce.into(),
        start: segment.start.get().into(),
        first_lsn: segment.first_lsn.get().into(),
        last_lsn: segment.last_lsn.get().into(),
        chain: segment.chain.into(),
    }
}

fn decode_segment(raw: &RawSegment) -> Result<LogSegment, DecodeError> {
    let bounded = |value: U64| below(value.get(), COUNTER_END, "log segment");
    Ok(LogSegment {
        epoch: Epoch::new(bounded(raw.epoch)?),
        nonce: raw.nonce.get(),
        start: RingPosition::new(bounded(raw.start)?),
        first_lsn: Lsn::new(bounded(raw.first_lsn)?),
        last_lsn: Lsn::new(bounded(raw.last_lsn)?),
        chain: raw.chain.get(),
    })
}

/// Whether a segment may stand behind another: that one is sealed, and ends before it.
fn follows(older: &LogSegment, newer: &LogSegment) -> bool {
    let sealed = older.last_lsn > Lsn::default();
    sealed && newer.first_lsn > older.last_lsn && newer.start >= older.start
}

/// A sign of life of a host, written every second while it runs, and before that to claim the
/// store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Whose.
    pub host: HostId,
    /// Epoch of the writer.
    pub epoch: Epoch,
    /// Rises with each beat; a random number in a claim.
    pub sequence: u64,
    /// Wall time in nanoseconds since 1970.
    pub wall_ns: u64,
    /// Boot of the machine that the writer runs on.
    pub boot_id: [u8; 16],
}

impl Heartbeat {
    /// Encodes the heartbeat for block `at`.
    #[must_use]
    pub fn encode(&self, checksums: &Checksums, at: Pba) -> Buffer {
        let mut raw = RawHeartbeat {
            magic: HEARTBEAT_MAGIC,
            host: self.host.get().into(),
            reserved_0: 0.into(),
            epoch: self.epoch.get().into(),
            sequence: self.sequence.into(),
            wall_ns: self.wall_ns.into(),
            boot_id: self.boot_id,
            reserved: [0; 4036],
            reserved_1: 0.into(),
            checksum: 0.into(),
        };
        let unsealed = Buffer::from_bytes(raw.as_bytes());
        let checksum = unsealed.blocks().first().map_or(0, |block| {
            checksums.structure(StructureKind::Heartbeat, at, Epoch::new(0), 0, block)
        });
        raw.checksum = checksum.into();
        Buffer::from_bytes(raw.as_bytes())
    }

    /// Decodes and validates the heartbeat at `at`.
    ///
    /// # Errors
    /// As [`HostSlot::decode`].
    pub fn decode(block: &Block, checksums: &Checksums, at: Pba) -> Result<Self, DecodeError> {
        let raw = RawHeartbeat::read_from_bytes(&block.0).map_err(|_| DecodeError::Magic)?;
        if raw.magic != HEARTBEAT_MAGIC {
            return Err(DecodeError::Magic);
        }
        let checksum = checksums.structure(StructureKind::Heartbeat, at, Epoch::new(0), 0, block);
        if raw.checksum.get() != checksum {
            return Err(DecodeError::Checksum);
        }
        Ok(Self {
            host: HostId::new(raw.host.get()),
            epoch: Epoch::new(raw.epoch.get()),
            sequence: raw.sequence.get(),
            wall_ns: raw.wall_ns.get(),
            boot_id: raw.boot_id,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use base::StoreUuid;

    use super::*;

    fn slot(segments: Vec<LogSegment>) -> HostSlot {
        let root = RootRef::empty(1);
        HostSlot {
            host: HostId::new(0),
            state: SlotState::Running,
            sequence: 7,
            epoch: Epoch::new(2),
            boot_id: [3; 16],
            ballot: Ballot::new(0),
            cut: Lsn::new(9),
            vdi_id_next: 4,
            wall_ns: u64::MAX,
            store_ns: u64::MAX,
            log_start: Pba::new(4096),
            roots: Roots {
                directory: root,
                extents: root,
                vdis: root,
                bitmaps: root,
                bad_blocks: root,
                marks: root,
            },
            segments,
            failures: 5,
            retention: KeepRules {
                rules: vec![KeepRule { every_ms: 0, for_s: 60 }],
                budget: NonZeroU64::new(20 << 30),
            },
        }
    }

    fn segment(start: u64, first_lsn: u64, last_lsn: u64) -> LogSegment {
        LogSegment {
            epoch: Epoch::new(1),
            nonce: u64::MAX,
            start: RingPosition::new(start),
            first_lsn: Lsn::new(first_lsn),
            last_lsn: Lsn::new(last_lsn),
            chain: u64::MAX,
        }
    }

    fn decoded(slot: &HostSlot) -> Result<HostSlot, DecodeError> {
        let (checksums, at) = (Checksums::new(StoreUuid([1; 16]), &[2; 32]), Pba::new(2049));
        let encoded = slot.encode(&checksums, at);
        HostSlot::decode(encoded.blocks().first().unwrap(), &checksums, at)
    }

    #[test]
    fn slots_round_trip() {
        let slot = slot(vec![segment(1, 2, 3), segment(1, 5, 6), segment(9, 7, 0)]);
        assert_eq!(decoded(&slot), Ok(slot));
    }

    #[test]
    fn segments_out_of_order_are_refused() {
        for segments in [
            vec![segment(1, 2, 0), segment(2, 3, 0)],
            vec![segment(1, 2, 3), segment(2, 3, 0)],
            vec![segment(2, 2, 3), segment(1, 4, 0)],
        ] {
            let order = DecodeError::Invalid("order of log segments");
            assert_eq!(decoded(&slot(segments)), Err(order));
        }
    }

    #[test]
    fn counters_out_of_bounds_are_refused() {
        let end = COUNTER_END;
        let check = |slot: HostSlot| assert!(decoded(&slot).is_err(), "{slot:?}");
        check(HostSlot { sequence: end, ..slot(vec![]) });
        check(HostSlot { epoch: Epoch::new(end), ..slot(vec![]) });
        check(HostSlot { cut: Lsn::new(end), ..slot(vec![]) });
        check(HostSlot { vdi_id_next: RECORD_NUMBER_END, ..slot(vec![]) });
        check(HostSlot { log_start: Pba::new(BLOCKS_MAX), ..slot(vec![]) });
        check(slot(vec![segment(end, 2, 3)]));
        check(slot(vec![segment(1, end, 0)]));
        check(slot(vec![segment(1, 2, end)]));
    }
}
