//! What goes wrong: errors, damage and trouble, drawn at the rates of the plan and noted in the
//! atlas.

use base::{BLOCK_SIZE, BlockSlice};
use device::Cause;
use runtime::{Clock, Time};

use crate::content;
use crate::faults::{Damage, DamageKind, FaultKind, Victim};
use crate::medium::CutStyle;
use crate::plan::EXTENT_BLOCKS;
use crate::random::to_u64;

use super::work::{Fate, Work};
use super::{EIO, MILLISECOND, SECOND, State};

/// A device that is slow, hangs or is gone for a while.
#[derive(Clone, Copy)]
pub(super) struct Trouble {
    pub(super) kind: TroubleKind,
    until: Time,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum TroubleKind {
    Slow,
    Hang,
    /// The cache goes only after somebody was told: a device that comes back without it reports an
    /// error first.
    Gone {
        loses_cache: bool,
        told: bool,
    },
}

impl State {
    /// Decides what will become of an operation.
    pub(super) fn fate(&mut self, work: &Work) -> Fate {
        let gone = matches!(self.trouble, Some(Trouble { kind: TroubleKind::Gone { .. }, .. }));
        if gone {
            return Fate::Fails(Cause::Gone);
        }
        if let Work::Read { at, block_count, .. } = work
            && self.unreadable.range(*at..*at + to_u64(*block_count)).next().is_some()
        {
            return Fate::Fails(Cause::Errno(EIO));
        }
        if matches!(work, Work::Write { .. } | Work::Allocate { .. })
            && !self.has_space(work.at(), work.block_count())
        {
            return Fate::Fails(Cause::NoSpace);
        }
        if !self.armed {
            return Fate::Succeeds;
        }
        match work {
            Work::Read { .. } if self.strikes(FaultKind::ReadError) => {
                Fate::Fails(Cause::Errno(EIO))
            }
            Work::Write { .. } if self.strikes(FaultKind::WriteError) => {
                Fate::Fails(Cause::Errno(EIO))
            }
            Work::Write { at, .. }
                if *at >= NODES_START && self.strikes(FaultKind::DataWriteError) =>
            {
                Fate::Fails(Cause::Errno(EIO))
            }
            Work::Write { .. } if self.strikes(FaultKind::LostWrite) => Fate::Lost,
            Work::Write { at, blocks, .. }
                if self.strikes(FaultKind::LostNode) && self.begins_with_node(*at, blocks) =>
            {
                Fate::Lost
            }
            Work::Write { .. } if self.strikes(FaultKind::Misdirected) => {
                match self.random.pick(self.medium.written()) {
                    Some(victim) if victim + work.block_count() <= self.block_count => {
                        Fate::Misdirected(victim)
                    }
                    _ => Fate::Succeeds,
                }
            }
            Work::Flush { .. } if self.strikes(FaultKind::FlushError) => {
                Fate::Fails(Cause::Errno(EIO))
            }
            _ => Fate::Succeeds,
        }
    }

    fn begins_with_node(&self, at: u64, blocks: &[BlockSlice]) -> bool {
        let first = blocks.first().and_then(|slice| slice.bytes().get(..BLOCK_SIZE));
        first.is_some_and(|bytes| self.victim(at, bytes) == Victim::Node)
    }

    fn strikes(&mut self, kind: FaultKind) -> bool {
        self.random.rarely(self.faults.rate(kind))
    }

    /// Whether a write of these blocks finds space below.
    fn has_space(&self, at: u64, block_count: u64) -> bool {
        if self.space >= self.block_count {
            return true;
        }
        let new = (at..at + block_count).filter(|block| !self.allocated.contains(block)).count();
        new == 0 || to_u64(self.allocated.len() + new) <= self.space
    }

    pub(super) fn note_damage(&mut self, pba: u64, kind: DamageKind, victim: Victim) {
        self.atlas.damage(pba, Damage { kind, victim, since: self.medium.mark() });
    }

    pub(super) fn note_error(&mut self, work: &Work, cause: Cause) {
        self.atlas.errors += 1;
        if !matches!(work, Work::Read { .. }) {
            self.atlas.write_side_errors += 1;
        }
        if matches!(work, Work::Flush { .. }) {
            self.atlas.cache_losses += 1;
        }
        if cause == Cause::NoSpace {
            self.atlas.no_space += 1;
        }
        self.atlas.count(match (work, cause) {
            (_, Cause::NoSpace) => "no space below",
            (Work::Read { .. }, _) => "read error",
            (Work::Write { .. }, _) => "write error",
            (Work::Flush { .. }, _) => "flush error",
            (Work::Discard { .. } | Work::Allocate { .. }, _) => "other error",
        });
    }

    /// Perhaps damages a block at rest.
    pub(super) fn rot(&mut self) {
        if !self.armed || !self.strikes(FaultKind::Rot) {
            return;
        }
        let Some(block) = self.random.pick(self.medium.written()) else { return };
        let victim = self.victim_at(block);
        let byte = self.random.index(BLOCK_SIZE);
        let bit = 1u8 << self.random.below(8);
        let unreadable = self.random.chance(200);
        let hit = self.medium.damage(block, |contents| {
            if !unreadable {
                contents[byte] ^= bit;
            }
        });
        if !hit {
            return;
        }
        self.atlas.count("rot");
        let kind = if unreadable { DamageKind::Unreadable } else { DamageKind::Flipped };
        if unreadable {
            self.unreadable.insert(block);
        }
        self.note_damage(block, kind, victim);
        self.trace.event([11, block, to_u64(byte), u64::from(bit)], || {
            format!("device  injected: {kind:?} block {block} ({victim:?})")
        });
    }

    /// Whose a block is, by what stands there now.
    pub(super) fn victim_at(&self, block: u64) -> Victim {
        let mut bytes = [0; BLOCK_SIZE];
        self.medium.read(block, &mut bytes);
        self.victim(block, &bytes)
    }

    /// Whose a block is that holds, or should hold, `bytes`.
    pub(super) fn victim(&self, block: u64, bytes: &[u8]) -> Victim {
        match content::identify_lba(bytes) {
            Some(lba) => Victim::Data(lba),
            None if block >= NODES_START && is_node(bytes, self.block_count) => Victim::Node,
            None => Victim::Unknown,
        }
    }

    pub(super) fn start_trouble(&mut self) {
        if !self.armed || self.trouble.is_some() {
            return;
        }
        let mut trouble = None;
        if self.strikes(FaultKind::Slow) {
            trouble = Some((TroubleKind::Slow, SECOND, "slow"));
        }
        if self.strikes(FaultKind::Hang) {
            trouble = Some((TroubleKind::Hang, 60 * SECOND, "hang"));
        }
        if self.strikes(FaultKind::Gone) {
            let loses_cache = self.random.chance(500);
            trouble = Some((TroubleKind::Gone { loses_cache, told: false }, 20 * SECOND, "gone"));
        }
        if self.strikes(FaultKind::ClockJump) {
            let years = i64::try_from(self.random.below(21)).unwrap_or(0) - 10;
            self.clock.jump_wall(years.saturating_mul(31_556_952_000_000_000));
            self.atlas.count("clock jump");
        }
        if let Some((kind, longest, what)) = trouble {
            let length = MILLISECOND + self.random.magnitude(longest);
            let until = Time(self.clock.now().0 + length);
            self.trouble = Some(Trouble { kind, until });
            if matches!(kind, TroubleKind::Gone { .. }) {
                // What is under way does not come back.
                for queued in self.queue.values_mut() {
                    queued.fate = Fate::Fails(Cause::Gone);
                }
            }
            self.atlas.count(what);
            self.trace.note(|| format!("device  injected: {what} for {} ms", length / MILLISECOND));
        }
    }

    pub(super) fn hangs_until(&self) -> Option<Time> {
        let hang = self.trouble.filter(|trouble| trouble.kind == TroubleKind::Hang)?;
        Some(hang.until)
    }

    pub(super) fn end_trouble_in_time(&mut self) {
        if self.trouble.is_some_and(|trouble| trouble.until <= self.clock.now()) {
            self.end_trouble();
        }
    }

    pub(super) fn end_trouble(&mut self) {
        let Some(trouble) = self.trouble.take() else { return };
        if trouble.kind == (TroubleKind::Gone { loses_cache: true, told: true }) {
            self.atlas.cache_losses += 1;
            self.atlas.count("returned without its cache");
            self.medium.lose_cache(CutStyle::Torn, &mut self.random);
        }
    }
}

/// The first block behind the extents of the system and the log.
const NODES_START: u64 = 2 * EXTENT_BLOCKS;

/// Whether bytes make sense as a node of a VDI's tree that names something. Nothing that clients
/// write does. The nodes of a VDI's first label cannot be told from those of tables, whose loss
/// costs more: they do not count.
fn is_node(bytes: &[u8], block_count: u64) -> bool {
    let mut named = 0;
    let sensible = bytes.chunks_exact(16).all(|entry| {
        let pba = entry.iter().take(5).rev().fold(0, |pba, &byte| pba << 8 | u64::from(byte));
        match entry.get(5) {
            Some(2) => {
                let birth = entry.get(6..10).and_then(|birth| birth.try_into().ok());
                named += u32::from(birth.map_or(0, u32::from_le_bytes) > 1);
                (NODES_START..block_count).contains(&pba)
            }
            // Unmapped, zero or damaged, and nothing else.
            Some(0 | 1 | 3) => (0..16).all(|at| at == 5 || entry[at] == 0),
            _ => false,
        }
    });
    sensible && named > 0
}
