//! What the disks may hold: every VDI and snapshot with the legal contents of each block.
//!
//! The model is told of every request when it is issued and when it is answered, of every crash and
//! every successful opening of the store; it is asked whether what a reader saw is legal. It knows
//! nothing of the engine, the device or time: only the order in which things were asked and
//! answered. What it holds the engine to:
//!
//! - a running disk shows every change that was acknowledged before a read was issued (G1);
//! - after a kill all of them are there (G2), after a power cut those that a flush covered;
//! - a block is always a whole version (G3), see [`block`];
//! - a snapshot holds what was acknowledged before it was asked for, nothing that was issued after
//!   it completed, and of the rest an instant of the order in which things happened; and once read
//!   it never changes (G4);
//! - once the store has been opened after a crash, nothing that it holds changes any more.

pub mod block;
pub mod layout;
pub mod ops;
pub mod segments;
mod whole;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;

use base::{BLOCK_SIZE, BLOCK_SIZE_U64, SnapshotUuid};

use crate::content::{self, SECTOR_SIZE, SECTOR_SIZE_U64, Tag};
use crate::random::{mix, to_u64, to_usize};
use block::{BlockModel, Floor, SharedBlock};
use layout::Layout;
use ops::{Moment, Ops, Outcome, Serial};
use segments::{Content, Segments};

/// Something that the engine did and must not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Divergence(pub String);

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The model's number of a VDI; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VdiRef(pub u32);

/// The legal contents of all blocks of a VDI or snapshot, by number in the layout.
pub type Blocks = Vec<SharedBlock>;

/// What a snapshot or clone holds.
#[derive(Clone, Debug)]
pub struct Contents {
    /// Its blocks.
    pub blocks: Blocks,
    /// When they were copied from a running VDI; never, if they were not.
    copied_at: Moment,
}

/// A VDI.
#[derive(Clone, Debug)]
pub struct VdiModel {
    /// The engine's id, once it is known.
    pub id: Option<u64>,
    /// Its name.
    pub name: String,
    /// Its size.
    pub block_count: u64,
    /// Its snapshots, by number.
    pub snapshots: BTreeMap<u64, SnapshotModel>,
    /// Every number that a snapshot of it ever had.
    pub snapshot_numbers: BTreeSet<u64>,
    /// Whether it was deleted.
    pub deleted: bool,
    /// How often something severed its handles.
    pub severed: u64,
    blocks: Blocks,
    /// Changes that were acknowledged and that no flush covered.
    unflushed: BTreeSet<Serial>,
}

/// A snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotModel {
    /// Its label.
    pub label: Option<String>,
    /// Size of the VDI then.
    pub block_count: u64,
    /// What it is known by in every store, once that was seen.
    pub uuid: Option<SnapshotUuid>,
    blocks: Blocks,
    /// See [`Contents`].
    copied_at: Moment,
    /// See [`BlockModel::instant`]: over all blocks that were read.
    latest_in: Moment,
    earliest_out: Moment,
}

/// What a reader looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A VDI.
    Head(VdiRef),
    /// A snapshot.
    Snapshot(VdiRef, u64),
}

/// What a change does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Writes bytes that name it.
    Write,
    /// Writes zero bytes.
    WriteOfZeroes,
    /// Discards.
    Discard,
    /// Writes zeroes.
    Zero,
}

/// The moment of a snapshot or clone that was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Asked(Moment);

/// All VDIs of a store.
#[derive(Debug)]
pub struct Model {
    layout: Layout,
    ops: Ops,
    vdis: Vec<VdiModel>,
    /// When the readers that are under way were issued.
    observers: BTreeMap<Moment, u32>,
    zero: SharedBlock,
    /// Whether damage left something of which it cannot be said what it is.
    pub unknowable: bool,
    /// How often a reader learned in which order two changes happened.
    pub rivals: u64,
}

impl Model {
    /// An empty store.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            ops: Ops::default(),
            vdis: Vec::new(),
            observers: BTreeMap::new(),
            zero: Rc::new(BlockModel::zero()),
            unknowable: false,
            rivals: 0,
        }
    }

    /// Where clients write.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// All changes so far.
    #[must_use]
    pub fn ops(&self) -> &Ops {
        &self.ops
    }

    /// A VDI.
    #[must_use]
    pub fn vdi(&self, vdi: VdiRef) -> &VdiModel {
        &self.vdis[to_usize(u64::from(vdi.0))]
    }

    /// A VDI, to be changed.
    pub fn vdi_mut(&mut self, vdi: VdiRef) -> &mut VdiModel {
        &mut self.vdis[to_usize(u64::from(vdi.0))]
    }

    /// Every VDI that was not deleted.
    pub fn live(&self) -> impl Iterator<Item = VdiRef> + '_ {
        (0..).zip(&self.vdis).filter(|(_, vdi)| !vdi.deleted).map(|(number, _)| VdiRef(number))
    }

    /// The VDI of this name.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<VdiRef> {
        self.live().find(|&vdi| self.vdi(vdi).name == name)
    }

    /// A VDI exists now.
    pub fn add(&mut self, name: &str, id: u64, block_count: u64, contents: Contents) -> VdiRef {
        self.vdis.push(VdiModel {
            id: Some(id),
            name: name.to_owned(),
            block_count,
            snapshots: BTreeMap::new(),
            snapshot_numbers: BTreeSet::new(),
            deleted: false,
            severed: 0,
            blocks: contents.blocks,
            unflushed: BTreeSet::new(),
        });
        VdiRef(u32::try_from(self.vdis.len() - 1).unwrap_or(u32::MAX))
    }

    /// The contents of an empty VDI.
    #[must_use]
    pub fn empty(&self) -> Contents {
        let blocks = vec![Rc::clone(&self.zero); self.layout.slot_count()];
        Contents { blocks, copied_at: Moment::NEVER }
    }

    /// A client asks for a change.
    pub fn begin(&mut self, vdi: VdiRef, change: Change, offset: u64, length: u64) -> Serial {
        let what = match change {
            Change::Write => "write",
            Change::WriteOfZeroes => "write of zeroes",
            Change::Discard => "discard",
            Change::Zero => "write-zeroes",
        };
        let serial = self.ops.begin(vdi.0, what, offset, length);
        let tag = if change == Change::Write { self.ops.tag(serial) } else { Tag::ZERO };
        let end = offset.saturating_add(length);
        self.change_blocks(vdi, serial, offset, end, |_| Content::Tag(tag));
        serial
    }

    /// The change was answered. `durable`: it was acknowledged with FUA.
    pub fn end(&mut self, serial: Serial, outcome: Outcome, durable: bool) {
        self.ops.end(serial, outcome, durable && outcome == Outcome::Acked);
        let Some(vdi) = self.ops.get(serial).map(|op| VdiRef(op.vdi)) else { return };
        if outcome == Outcome::Acked && !durable {
            self.vdi_mut(vdi).unflushed.insert(serial);
        }
    }

    /// The bytes of a change.
    pub fn fill(&self, serial: Serial, change: Change, offset: u64, into: &mut [u8]) {
        let tag = if change == Change::Write { self.ops.tag(serial) } else { Tag::ZERO };
        content::fill(tag, offset, into);
    }

    /// A client asks for a flush.
    pub fn begin_flush(&mut self) -> Moment {
        self.ops.tick()
    }

    /// A flush that was asked for at `asked` succeeded.
    pub fn end_flush(&mut self, vdi: VdiRef, asked: Moment) {
        self.ops.tick();
        let unflushed = std::mem::take(&mut self.vdi_mut(vdi).unflushed);
        for serial in unflushed {
            match self.ops.get_mut(serial) {
                Some(op) if op.ended < asked => op.durable = true,
                _ => {
                    self.vdi_mut(vdi).unflushed.insert(serial);
                }
            }
        }
    }

    /// Whether a change was acknowledged before another was asked for.
    #[must_use]
    pub fn was_acknowledged_before(&self, one: u64, other: u64) -> bool {
        let op = |serial: u64| self.ops.get(Serial(u32::try_from(serial).unwrap_or(0)));
        let (Some(one), Some(other)) = (op(one), op(other)) else { return false };
        one.outcome == Outcome::Acked && one.ended < other.issued
    }

    /// A reader starts looking.
    pub fn begin_read(&mut self) -> Moment {
        let now = self.ops.tick();
        *self.observers.entry(now).or_insert(0) += 1;
        now
    }

    /// A reader that started at `asked` goes without having seen anything.
    pub fn forget_read(&mut self, asked: Moment) {
        if let Some(count) = self.observers.get_mut(&asked) {
            *count -= 1;
            if *count == 0 {
                self.observers.remove(&asked);
            }
        }
    }

    /// A reader that started at `asked` saw `bytes` at `offset`.
    ///
    /// # Errors
    /// If they are not legal.
    pub fn end_read(
        &mut self,
        place: Place,
        asked: Moment,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Divergence> {
        self.forget_read(asked);
        self.ops.tick();
        let end = offset + to_u64(bytes.len());
        self.check_unwritten(place, offset, bytes)?;
        let pieces: Vec<_> = self.layout.pieces(offset, end).collect();
        for (slot, (from, to)) in pieces {
            let lba = self.layout.lba(slot);
            let at = to_usize(lba * BLOCK_SIZE_U64 + u64::from(from) - offset);
            let seen = &bytes[at..at + usize::from(to - from)];
            match place {
                Place::Head(_) => {
                    self.check_block(place, slot, from, seen, Floor::Before(asked))?;
                }
                Place::Snapshot(vdi, number) => self.pin_snapshot(vdi, number, slot, from, seen)?,
            }
        }
        Ok(())
    }

    /// What a verification read of a whole block of a VDI saw, while nothing else is under way:
    /// from now on it is certain. `damaged`: the device lied about a write of this block, so that
    /// it may have gone back to what it held before.
    ///
    /// # Errors
    /// If it is not legal.
    pub fn pin(
        &mut self,
        vdi: VdiRef,
        slot: usize,
        seen: &[u8],
        damaged: bool,
    ) -> Result<(), Divergence> {
        assert_eq!(seen.len(), BLOCK_SIZE);
        let place = Place::Head(vdi);
        let now = self.ops.tick();
        let lba = self.layout.lba(slot);
        let block = Rc::clone(&self.vdi(vdi).blocks[slot]);
        match block.check(&self.ops, lba, 0, seen, Floor::Before(now)) {
            Ok(explanation) => {
                if !block.is_settled() {
                    Rc::make_mut(&mut self.vdi_mut(vdi).blocks[slot]).pin(&explanation);
                }
                Ok(())
            }
            Err(_) if damaged => {
                content::check_belongs(lba, seen)?;
                let segments = Segments::seen(seen);
                let mut rendered = [0; BLOCK_SIZE];
                segments.render(lba, 0, &mut rendered);
                self.unknowable |= rendered != seen;
                Rc::make_mut(&mut self.vdi_mut(vdi).blocks[slot]).set(segments);
                Ok(())
            }
            Err(illegal) => Err(self.diverge(place, lba, 0, seen, &illegal)),
        }
    }

    /// Whether a whole block, as it was seen, is legal on a VDI; changes nothing.
    #[must_use]
    pub fn is_legal(&self, vdi: VdiRef, slot: usize, seen: &[u8]) -> bool {
        let block = &self.vdi(vdi).blocks[slot];
        let lba = self.layout.lba(slot);
        block.check(&self.ops, lba, 0, seen, Floor::Before(Moment::NEVER)).is_ok()
    }

    /// A reader is told that this range reads as zeroes.
    ///
    /// # Errors
    /// If it certainly does not.
    pub fn check_zero(
        &mut self,
        place: Place,
        asked: Moment,
        start: u64,
        end: u64,
    ) -> Result<(), Divergence> {
        let pieces: Vec<_> = self.layout.pieces(start, end).collect();
        let zeroes = [0; BLOCK_SIZE];
        for (slot, (from, to)) in pieces {
            let seen = &zeroes[..usize::from(to - from)];
            match place {
                Place::Head(_) => {
                    self.check_block(place, slot, from, seen, Floor::Before(asked))?;
                }
                Place::Snapshot(vdi, number) => self.pin_snapshot(vdi, number, slot, from, seen)?,
            }
        }
        Ok(())
    }

    /// A snapshot or clone of a VDI is asked for.
    pub fn ask(&mut self) -> Asked {
        Asked(self.begin_read())
    }

    /// The request of `asked` was answered, or will never be.
    pub fn answered(&mut self, asked: Asked) {
        self.forget_read(asked.0);
        self.ops.tick();
    }

    /// The contents of a VDI at some instant between `asked` and now.
    #[must_use]
    pub fn contents_since(&self, vdi: VdiRef, asked: Asked) -> Contents {
        let now = self.ops.now();
        Contents { blocks: self.freeze(vdi, now, Floor::Before(asked.0)), copied_at: now }
    }

    /// The contents of a snapshot.
    #[must_use]
    pub fn contents_of(&self, vdi: VdiRef, number: u64) -> Option<Contents> {
        let snapshot = self.vdi(vdi).snapshots.get(&number)?;
        Some(Contents { blocks: snapshot.blocks.clone(), copied_at: Moment::NEVER })
    }

    /// Whether a snapshot may be later than another: whether what was read of it lacks nothing that was
    /// read of the other.
    #[must_use]
    pub fn goes_on(&self, vdi: VdiRef, earlier: u64, later: u64) -> bool {
        let snapshots = &self.vdi(vdi).snapshots;
        let pair = snapshots.get(&earlier).zip(snapshots.get(&later));
        pair.is_none_or(|(earlier, later)| later.earliest_out >= earlier.latest_in)
    }

    /// Whether every block of a snapshot was read.
    #[must_use]
    pub fn is_settled(&self, vdi: VdiRef, number: u64) -> bool {
        let snapshot = self.vdi(vdi).snapshots.get(&number);
        snapshot.is_some_and(|snapshot| snapshot.blocks.iter().all(|block| block.is_settled()))
    }

    /// A snapshot exists now.
    pub fn add_snapshot(
        &mut self,
        vdi: VdiRef,
        number: u64,
        label: Option<String>,
        block_count: u64,
        contents: Contents,
    ) {
        let vdi = self.vdi_mut(vdi);
        vdi.snapshot_numbers.insert(number);
        let snapshot = SnapshotModel {
            label,
            block_count,
            uuid: None,
            blocks: contents.blocks,
            copied_at: contents.copied_at,
            latest_in: Moment(0),
            earliest_out: Moment::NEVER,
        };
        vdi.snapshots.insert(number, snapshot);
    }

    /// Changes whenever a VDI appears, vanishes or gets another name or size.
    #[must_use]
    pub fn catalog_version(&self) -> u64 {
        let live = self.live().map(|vdi| self.vdi(vdi));
        live.fold(to_u64(self.vdis.len()), |version, vdi| {
            let name = vdi.name.bytes().fold(version, |hash, byte| mix(hash ^ u64::from(byte)));
            mix(name ^ vdi.block_count)
        })
    }

    /// Compares the ranges of bytes in which `to` is said to differ from `from`, and whether there
    /// is data, with what is known of both. `None`: not all of both is certain.
    #[must_use]
    pub fn check_diff(
        &self,
        from: (VdiRef, u64),
        to: (VdiRef, u64),
        ranges: &[(u64, u64, bool)],
    ) -> Option<Result<(), Divergence>> {
        let snapshot = |(vdi, number): (VdiRef, u64)| self.vdi(vdi).snapshots.get(&number);
        let (one, other) = (snapshot(from)?, snapshot(to)?);
        let sorted = ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0);
        if !sorted || ranges.iter().any(|&(start, end, _)| start >= end) {
            return Some(Err(Divergence(format!("a diff is not in order: {ranges:?}"))));
        }
        let common = one.block_count.min(other.block_count);
        for slot in 0..self.layout.slot_count() {
            let lba = self.layout.lba(slot);
            if lba >= common {
                continue;
            }
            let (before, after) = (one.blocks[slot].settled()?, other.blocks[slot].settled()?);
            let offset = lba * BLOCK_SIZE_U64;
            let range = ranges.iter().find(|&&(start, end, _)| start <= offset && offset < end);
            let wrong = match range {
                None => before != after,
                Some(&(_, _, data)) => !data && !after.is_zero(),
            };
            if wrong {
                return Some(Err(Divergence(format!(
                    "diff of {from:?} and {to:?}: block {lba} is {before:?} and {after:?}, but \
                     the diff says {range:?}"
                ))));
            }
        }
        Some(Ok(()))
    }

    /// The process died or the power went; nothing will be answered any more.
    pub fn crash(&mut self) {
        self.observers.clear();
        self.ops.tick();
    }

    /// The store was opened after a crash: what it holds now it will keep.
    pub fn settle(&mut self, floor: Floor) {
        let now = self.ops.tick();
        for number in 0..self.vdis.len() {
            let vdi = VdiRef(u32::try_from(number).unwrap_or(u32::MAX));
            let blocks = self.freeze(vdi, now, floor);
            let vdi = self.vdi_mut(vdi);
            vdi.blocks = blocks;
            vdi.unflushed.clear();
        }
        self.ops.next_era();
    }

    fn freeze(&self, vdi: VdiRef, now: Moment, floor: Floor) -> Blocks {
        let blocks = self.vdi(vdi).blocks.iter();
        blocks
            .map(|block| match block.is_settled() {
                true => Rc::clone(block),
                false => Rc::new(block.frozen(&self.ops, now, floor)),
            })
            .collect()
    }

    fn change_blocks(
        &mut self,
        vdi: VdiRef,
        serial: Serial,
        start: u64,
        end: u64,
        content: impl Fn(usize) -> Content,
    ) {
        let oldest = self.observers.keys().next().copied().unwrap_or(Moment::NEVER);
        let Self { layout, ops, vdis, .. } = self;
        let Some(vdi) = vdis.get_mut(to_usize(u64::from(vdi.0))) else { return };
        for (slot, piece) in layout.pieces(start, end) {
            if let Some(block) = vdi.blocks.get_mut(slot) {
                Rc::make_mut(block).push(ops, oldest, serial, piece, content(slot));
            }
        }
    }

    fn check_block(
        &mut self,
        place: Place,
        slot: usize,
        from: u16,
        seen: &[u8],
        floor: Floor,
    ) -> Result<(), Divergence> {
        let (Place::Head(vdi) | Place::Snapshot(vdi, _)) = place;
        let lba = self.layout.lba(slot);
        let block = Rc::clone(&self.vdi(vdi).blocks[slot]);
        match block.check(&self.ops, lba, from, seen, floor) {
            Ok(explanation) if block.has_rivals(&explanation) => {
                self.rivals += 1;
                let Self { ops, vdis, .. } = self;
                if let Some(vdi) = vdis.get_mut(to_usize(u64::from(vdi.0))) {
                    drop(block);
                    Rc::make_mut(&mut vdi.blocks[slot]).learn(ops, floor, &explanation);
                }
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(illegal) => Err(self.diverge(place, lba, from, seen, &illegal)),
        }
    }

    /// Checks what was seen of a block of a snapshot; if all of the block was seen, it is certain
    /// from now on.
    fn pin_snapshot(
        &mut self,
        vdi: VdiRef,
        number: u64,
        slot: usize,
        from: u16,
        seen: &[u8],
    ) -> Result<(), Divergence> {
        let place = Place::Snapshot(vdi, number);
        let lba = self.layout.lba(slot);
        let Some(snapshot) = self.vdi(vdi).snapshots.get(&number) else { return Ok(()) };
        let block = Rc::clone(&snapshot.blocks[slot]);
        let explanation = match block.check(&self.ops, lba, from, seen, Floor::Flushed) {
            Ok(explanation) => explanation,
            Err(illegal) => return Err(self.diverge(place, lba, from, seen, &illegal)),
        };
        if block.is_settled() || seen.len() < BLOCK_SIZE {
            return Ok(());
        }
        let (latest_in, earliest_out) = block.instant(&self.ops, &explanation, snapshot.copied_at);
        let vdi = self.vdi_mut(vdi);
        let Some(snapshot) = vdi.snapshots.get_mut(&number) else { return Ok(()) };
        snapshot.latest_in = snapshot.latest_in.max(latest_in);
        snapshot.earliest_out = snapshot.earliest_out.min(earliest_out);
        Rc::make_mut(&mut snapshot.blocks[slot]).pin(&explanation);
        if snapshot.earliest_out < snapshot.latest_in {
            return Err(Divergence(format!(
                "snapshot {number} of VDI {} ({:?}) is no instant: it holds a change that was \
                 asked for at {}, and lacks one that was acknowledged before, at {}",
                vdi.name, snapshot.label, snapshot.latest_in.0, snapshot.earliest_out.0
            )));
        }
        Ok(())
    }

    /// Blocks outside the windows were never written.
    fn check_unwritten(&self, place: Place, offset: u64, bytes: &[u8]) -> Result<(), Divergence> {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let length = to_usize(BLOCK_SIZE_U64 - at % BLOCK_SIZE_U64).min(rest.len());
            let (now, later) = rest.split_at(length);
            let lba = at / BLOCK_SIZE_U64;
            if self.layout.slot(lba).is_none() && now.iter().any(|&byte| byte != 0) {
                return Err(Divergence(format!(
                    "{place:?}: block {lba} was never written, but holds {}",
                    content::describe(&now[..now.len().min(SECTOR_SIZE)])
                )));
            }
            at += to_u64(length);
            rest = later;
        }
        Ok(())
    }

    fn diverge(
        &self,
        place: Place,
        lba: u64,
        from: u16,
        seen: &[u8],
        illegal: &block::Illegal,
    ) -> Divergence {
        let (Place::Head(vdi) | Place::Snapshot(vdi, _)) = place;
        let at = usize::from(illegal.start.saturating_sub(from));
        let skip = usize::from(illegal.start) % SECTOR_SIZE;
        let sector_start = at.saturating_sub(skip);
        let sector = &seen[sector_start..(sector_start + SECTOR_SIZE).min(seen.len())];
        let sector_number = (lba * BLOCK_SIZE_U64 + u64::from(illegal.start)) / SECTOR_SIZE_U64;
        let mut text = format!(
            "{place:?} '{}' block {lba} byte {} (sector {sector_number}): saw {}; {}",
            self.vdi(vdi).name,
            illegal.start,
            content::describe(sector),
            illegal.why
        );
        if let Some(origin) = content::identify(sector) {
            let serial = Serial(u32::try_from(origin.tag.serial()).unwrap_or(0));
            text.push_str(&format!("\n    seen: {}", self.ops.describe(serial)));
        }
        Divergence(text)
    }
}

#[cfg(test)]
mod tests;
