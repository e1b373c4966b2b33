//! Operations under way: what they are, how long they take, what was decided about them, and what
//! is answered.

use std::ops::Range;

use base::{BlockSlice, Buffer, Pba};
use blockstore::Geometry;
use device::{Cause, DeviceError};
use runtime::sync::OneshotSender;

use crate::medium::Mark;
use crate::plan::{EXTENT_BLOCKS, Erratic};
use crate::random::{Random, to_u64};

use super::{MICROSECOND, MILLISECOND};

/// How long operations take, in nanoseconds: a minimum, and a random addition up to as much.
#[derive(Clone, Copy, Debug)]
pub(super) struct Latencies {
    read: (u64, u64),
    write: (u64, u64),
    flush: (u64, u64),
    slot: (u64, u64),
}

impl Latencies {
    /// Draws a device: fast or slow, regular or erratic.
    pub(super) fn draw(random: &mut Random) -> Self {
        let mut pair = |low: u64, high: u64| {
            let minimum = random.between(low, high);
            (minimum, random.magnitude(minimum * 20))
        };
        let read = pair(5 * MICROSECOND, 100 * MICROSECOND);
        let write = pair(5 * MICROSECOND, 200 * MICROSECOND);
        let flush = pair(10 * MICROSECOND, 2_000 * MICROSECOND);
        Self { read, write, flush, slot: write }
    }

    /// Makes some operations take up to so many milliseconds, and others not.
    pub(super) fn make_erratic(&mut self, erratic: Erratic) {
        match erratic {
            Erratic::Nothing => {}
            Erratic::Reads(ms) => self.read.1 = ms * MILLISECOND,
            Erratic::Writes(ms) => {
                self.write.1 = ms * MILLISECOND;
                self.slot.1 = ms * MILLISECOND;
            }
            Erratic::Flushes(ms) => self.flush.1 = ms * MILLISECOND,
            Erratic::EachFlush(ms) => self.flush.0 = ms * MILLISECOND,
            Erratic::Slots(ms) => self.slot.1 = ms * MILLISECOND,
        }
    }

    /// How long an operation takes this time.
    pub(super) fn of(&self, work: &Work, random: &mut Random) -> u64 {
        let (minimum, spread) = match work {
            Work::Read { .. } => self.read,
            Work::Write { at, .. } if is_slot(*at) => self.slot,
            Work::Write { .. } => self.write,
            Work::Flush { .. } => self.flush,
            Work::Discard { .. } | Work::Allocate { .. } => self.write,
        };
        minimum + random.magnitude(spread)
    }
}

/// An operation under way, and what will become of it.
pub(super) struct Queued {
    pub(super) work: Work,
    pub(super) fate: Fate,
}

/// An operation, with whom to answer.
pub(super) enum Work {
    Read { at: u64, block_count: usize, buffer: Buffer, done: OneshotSender<ReadResult> },
    Write { at: u64, blocks: Vec<BlockSlice>, done: OneshotSender<Done> },
    Flush { covers: Mark, done: OneshotSender<Done> },
    Discard { at: u64, block_count: u64, done: OneshotSender<Done> },
    Allocate { at: u64, block_count: u64, done: OneshotSender<Done> },
}

pub(super) type ReadResult = Result<Buffer, DeviceError>;
pub(super) type Done = Result<(), DeviceError>;

/// What was decided about an operation when it was submitted.
#[derive(Clone, Copy)]
pub(super) enum Fate {
    Succeeds,
    Fails(Cause),
    /// Says that it succeeded, and did nothing.
    Lost,
    /// Says that it succeeded, and wrote from this block on.
    Misdirected(u64),
}

/// An answer that is sent once nothing is borrowed.
pub(super) enum Reply {
    Read(OneshotSender<ReadResult>, ReadResult),
    Done(OneshotSender<Done>, Done),
}

impl Reply {
    pub(super) fn send(self) {
        match self {
            Self::Read(done, result) => done.send(result),
            Self::Done(done, result) => done.send(result),
        }
    }
}

impl Work {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Flush { .. } => "flush",
            Self::Discard { .. } => "discard",
            Self::Allocate { .. } => "allocate",
        }
    }

    pub(super) fn at(&self) -> u64 {
        match self {
            Self::Read { at, .. }
            | Self::Write { at, .. }
            | Self::Discard { at, .. }
            | Self::Allocate { at, .. } => *at,
            Self::Flush { .. } => 0,
        }
    }

    pub(super) fn block_count(&self) -> u64 {
        match self {
            Self::Read { block_count, .. } => to_u64(*block_count),
            Self::Write { blocks, .. } => to_u64(blocks.iter().map(BlockSlice::block_count).sum()),
            Self::Flush { .. } => 0,
            Self::Discard { block_count, .. } | Self::Allocate { block_count, .. } => *block_count,
        }
    }
}

/// Where the one host has its log.
pub(super) const LOG_EXTENT: Range<u64> = EXTENT_BLOCKS..2 * EXTENT_BLOCKS;

/// Whether a copy of the host's slot stands here.
pub(super) fn is_slot(at: u64) -> bool {
    let slot = Geometry::host_slots_start();
    [slot, slot.plus(1)].map(Pba::get).contains(&at)
}
