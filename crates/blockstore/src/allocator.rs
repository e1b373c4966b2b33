//! Which blocks are free, and who gets them next. In memory; the checkpoint persists its images.
//!
//! Two bit planes over the blocks of data and metadata extents:
//!
//! ```text
//!             allocate      set_live (checkpoint)     clear_live        release
//!      free ───────────► busy ───────────► busy + live ────────► busy ─────────► free
//!        ▲  window/run     │                                 replaced, still      │
//!        └─ free_now ◄─────┘                                 named by a slot      │
//!        └────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! - *live*: blocks that the newest tree reaches; the plane that is persisted. Changed by
//!   [`Allocator::set_live`] and [`Allocator::clear_live`] only.
//! - *busy*: blocks that must not be handed out: live ones, and those allocated but not yet in a
//!   tree, replaced but not yet released, reserved in a [`Window`], or bad. Never persisted: after
//!   a crash it is the live plane plus what [`Allocator::mark_busy`] adds from the log.
//!
//! Invariants: live is within busy; a block is handed out only if it was not busy; a replaced
//! block stays busy until [`Allocator::release`] (design rule 17); data never takes the last free
//! extents (design rule 25); the bitmaps' own blocks are busy, never live, so that writing a
//! bitmap page does not change one.
//!
//! It does not know trees, the log or the device: when something may be released is the
//! checkpoint's business.

mod bitmap;
mod extents;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::BTreeSet;

use base::{BLOCK_SIZE, ExtentIndex, Pba};
use ondisk::ExtentKind;

use crate::Error;
use bitmap::{Planes, narrow, widen};
use extents::{DECENT_CLASS, Extents};

pub use bitmap::BITMAP_PAGE_BLOCKS;

/// Most blocks of a window: 4 MiB (design rule 61).
const WINDOW_BLOCKS_MAX: u64 = 1024;

/// Fewest blocks of a window while that many adjacent ones are free: 64 KiB.
const WINDOW_BLOCKS_MIN: u64 = 16;

/// No more than this part of what data can get is lent at a time, so that nobody runs short for it.
const LENT_SHARE: u64 = 2;

/// A window holds at most this part of the available blocks, so that the windows of idle VDIs
/// cannot hold most of a store that is nearly full.
const WINDOW_SHARE: u64 = 64;

/// What blocks are for. Data and metadata lie in different extents, so that GC and recovery read
/// metadata only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Blocks of VDIs.
    Data,
    /// Tree nodes and table pages.
    Metadata,
}

impl Space {
    /// The kind of extent that holds such blocks.
    #[must_use]
    pub fn kind(self) -> ExtentKind {
        match self {
            Self::Data => ExtentKind::Data,
            Self::Metadata => ExtentKind::Metadata,
        }
    }

    fn of(kind: ExtentKind) -> Option<Self> {
        match kind {
            ExtentKind::Data => Some(Self::Data),
            ExtentKind::Metadata => Some(Self::Metadata),
            ExtentKind::System | ExtentKind::Log => None,
        }
    }

    fn slot(self) -> usize {
        match self {
            Self::Data => 0,
            Self::Metadata => 1,
        }
    }
}

/// Which free blocks are handed out first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reuse {
    /// Those behind the last ones, as long runs: what was freed is overwritten late, and random
    /// writes become sequential ones.
    #[default]
    Late,
    /// The first ones, without windows: what was freed is overwritten at once. For the simulator:
    /// it shows within a few writes that a block was freed too early, which would otherwise take
    /// a store that is nearly full.
    Soon,
}

/// Adjacent blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Run {
    /// The first block.
    pub start: Pba,
    /// Number of blocks.
    pub count: u64,
}

impl Run {
    /// The block after the last one.
    #[must_use]
    pub fn end(self) -> Pba {
        self.start.plus(self.count)
    }

    /// Every block, in order.
    pub fn blocks(self) -> impl Iterator<Item = Pba> {
        (self.start.get()..self.end().get()).map(Pba::new)
    }
}

/// Blocks reserved for one user, so that its neighbours are its own. Begins empty, is filled by
/// [`Allocator::allocate`]. To be given back with [`Allocator::return_window`]: what a dropped
/// window holds stays busy until the store is opened again.
#[derive(Debug, Default)]
pub struct Window {
    run: Run,
    space: Option<Space>,
}

impl Window {
    /// The blocks that it still holds.
    #[must_use]
    pub fn run(&self) -> Run {
        self.run
    }
}

/// A store as the allocator sees it: so many blocks, in extents of so many.
#[derive(Clone, Copy, Debug)]
struct Division {
    block_count: u64,
    extent_blocks: u64,
}

impl Division {
    /// Design rule 25: a 32nd of the store, and half an extent at least. Not a whole one: where
    /// there are few, metadata that nearly fills none would keep data from a quarter of the store.
    fn metadata_reserve_blocks(self) -> u64 {
        (self.block_count / 32).max(self.extent_blocks / 2)
    }

    /// Most blocks of a window; fewer in short extents, so that an extent serves many windows.
    fn window_blocks(self) -> u64 {
        (self.extent_blocks / 64).clamp(64, WINDOW_BLOCKS_MAX)
    }
}

/// Hands out blocks and takes them back. For one thread; no method waits or does I/O.
pub struct Allocator {
    division: Division,
    state: RefCell<State>,
}

struct State {
    planes: Planes,
    extents: Extents,
    /// Next-fit: where the last window of each space ended.
    cursors: [Pba; 2],
    bad: BTreeSet<Pba>,
    /// Blocks in windows.
    reserved: u64,
    reuse: Reuse,
}

impl Allocator {
    /// An allocator for a store of `block_count` blocks in extents of `extent_blocks`, all of them
    /// free; the last extent is shorter if the one is not a multiple of the other.
    ///
    /// # Panics
    /// If `extent_blocks` is not a power of two of at least 64, or there are more than 2^32 - 2
    /// extents, or more than 2^40 blocks. A superblock that was decoded is within these bounds.
    #[must_use]
    pub fn new(block_count: u64, extent_blocks: u64) -> Self {
        assert!(extent_blocks.is_power_of_two() && extent_blocks >= 64);
        assert!(block_count <= 1 << 40);
        assert!(block_count.div_ceil(extent_blocks) < u64::from(u32::MAX));
        let division = Division { block_count, extent_blocks };
        let state = State {
            planes: Planes::default(),
            extents: Extents::new(division),
            cursors: [Pba::default(); 2],
            bad: BTreeSet::new(),
            reserved: 0,
            reuse: Reuse::Late,
        };
        Self { division, state: RefCell::new(state) }
    }

    /// Says which free blocks are handed out first from now on.
    pub fn prefer(&self, reuse: Reuse) {
        self.state.borrow_mut().reuse = reuse;
    }

    // ── Opening a store ──────────────────────────────────────────────────────────────────────

    /// Notes at open or format that an extent is in use. All extents come before any block.
    ///
    /// # Errors
    /// `Corrupt` if there is no such extent, or it was loaded before.
    pub fn load_extent(&self, index: ExtentIndex, kind: ExtentKind) -> Result<(), Error> {
        let extents = &mut self.state.borrow_mut().extents;
        let exists = self.division.extent_length(index.get()) > 0;
        if !exists || extents.kind(index.get()).is_some() {
            let at = Pba::new(u64::from(index.get()).saturating_mul(self.division.extent_blocks));
            return Err(Error::Damaged { what: "extent table", at });
        }
        extents.own(index.get(), kind);
        Ok(())
    }

    /// Makes the blocks of a stored page of the live plane live and busy, at open. The page is not
    /// dirty thereby.
    ///
    /// # Errors
    /// `Corrupt` if it names a block out of bounds or in an extent that is not of data or
    /// metadata; nothing is changed then.
    pub fn load_live_page(&self, index: u64, image: &[u8; BLOCK_SIZE]) -> Result<(), Error> {
        let live = bitmap::decode(image);
        let state = &mut *self.state.borrow_mut();
        let start = Pba::new(index.saturating_mul(BITMAP_PAGE_BLOCKS));
        let page = Run { start, count: BITMAP_PAGE_BLOCKS };
        let damaged = |at| Err(Error::Damaged { what: "allocation bitmap", at });
        for (first, length) in bitmap::set_runs(&live) {
            let run = Run { start: start.plus(widen(first)), count: widen(length) };
            if run.end().get() > self.division.block_count {
                return damaged(run.start);
            }
            for (_, part) in self.division.by_region(run) {
                if state.extents.space_at(part.start).is_none() {
                    return damaged(part.start);
                }
            }
        }
        for (region, part) in self.division.by_region(page) {
            let first = narrow(part.start.get() % BITMAP_PAGE_BLOCKS);
            let count = narrow(part.count);
            let fresh = bitmap::count_new(state.planes.busy(index), &live, first, count);
            if fresh > 0 {
                state.extents.used(region, widen(fresh));
            }
        }
        state.planes.load(index, &live);
        Ok(())
    }

    /// Makes blocks busy that a log record or the bitmap's own tree names, at recovery; those that
    /// are busy already stay so. An extent without a busy block becomes one of `space`: it was
    /// taken, or changed hands, after the checkpoint that recovery started from.
    ///
    /// # Errors
    /// `Corrupt` if a block is out of bounds, or in an extent that holds something else; nothing
    /// is changed then.
    pub fn mark_busy(&self, start: Pba, count: u64, space: Space) -> Result<(), Error> {
        let state = &mut *self.state.borrow_mut();
        let run = Run { start, count };
        let damaged = |at| Err(Error::Damaged { what: "block address", at });
        if start.get().checked_add(count).is_none_or(|end| end > self.division.block_count) {
            return damaged(start);
        }
        for (_, part) in self.division.by_region(run) {
            let index = self.division.extent_of(part.start);
            let fits = match state.extents.kind(index) {
                None => true,
                Some(kind) => kind == space.kind() || state.extents.is_empty(index),
            };
            if !fits {
                return damaged(part.start);
            }
        }
        for (region, part) in self.division.by_region(run) {
            let index = self.division.extent_of(part.start);
            state.give_extent(index, space);
            let fresh = state.planes.set_busy(part.start, part.count);
            if fresh > 0 {
                state.extents.used(region, fresh);
            }
        }
        Ok(())
    }

    // ── Taking blocks ────────────────────────────────────────────────────────────────────────

    /// Takes up to `count` adjacent blocks out of `window`, at least one; an empty window is
    /// refilled first. `None`: no space (after windows were returned and a checkpoint has released
    /// what it can, this means ENOSPC).
    ///
    /// Where a window comes from: the longest free runs there are in the extents of `space`, as
    /// far as they have runs of 16 blocks, next-fit; then a free extent (none of the last ones for
    /// data, design rule 25); then crumbs. So random writes become sequential ones, and a thin
    /// store stays small. A taken extent shows in [`Self::take_dirty_extents`]: on a file it has
    /// to be really allocated before metadata is written there (design rule 26).
    ///
    /// # Panics
    /// If `count` is zero, or `window` holds blocks of the other space.
    #[must_use]
    pub fn allocate(&self, space: Space, window: &mut Window, count: u64) -> Option<Run> {
        assert!(count > 0);
        let state = &mut *self.state.borrow_mut();
        if window.run.count == 0 {
            window.run = state.reserve(self.division, space, count)?;
            window.space = Some(space);
            state.reserved += window.run.count;
        }
        assert!(window.space == Some(space), "a window serves one space");
        let taken = Run { start: window.run.start, count: count.min(window.run.count) };
        window.run = Run { start: taken.end(), count: window.run.count - taken.count };
        state.reserved -= taken.count;
        Some(taken)
    }

    /// Gives back what a window holds, and leaves it empty.
    pub fn return_window(&self, window: &mut Window) {
        let run = std::mem::take(&mut window.run);
        let state = &mut *self.state.borrow_mut();
        state.reserved -= run.count;
        state.free(self.division, run);
    }

    // ── The live plane, for the checkpoint ───────────────────────────────────────────────────

    /// Notes that the tree being built reaches a block. It must be busy: allocated, or named by
    /// the log.
    ///
    /// # Errors
    /// `Corrupt` if the block is live already: two entries name it.
    ///
    /// # Panics
    /// If the block is not busy.
    pub fn set_live(&self, pba: Pba) -> Result<(), Error> {
        match self.state.borrow_mut().planes.set_live(pba) {
            true => Ok(()),
            false => Err(Error::Damaged { what: "reference to a block in use", at: pba }),
        }
    }

    /// Notes that the tree being built does not reach a block any more. It stays busy until it is
    /// [released](Self::release).
    ///
    /// # Errors
    /// `Corrupt` if the block is not live: the tree named a block that the bitmap does not know.
    pub fn clear_live(&self, pba: Pba) -> Result<(), Error> {
        match self.state.borrow_mut().planes.clear_live(pba) {
            true => Ok(()),
            false => Err(Error::Damaged { what: "reference to a free block", at: pba }),
        }
    }

    /// Images of the pages of the live plane that changed since the last call, by page number; a
    /// page describes [`BITMAP_PAGE_BLOCKS`] blocks. They count as clean from now on.
    #[must_use]
    pub fn take_dirty_pages(&self) -> Vec<(u64, Box<[u8; BLOCK_SIZE]>)> {
        self.state.borrow_mut().planes.take_dirty()
    }

    /// How many images [`Self::take_dirty_pages`] would return.
    #[must_use]
    pub fn dirty_page_count(&self) -> usize {
        self.state.borrow().planes.dirty_count()
    }

    /// Makes a page dirty again whose image could not be published.
    pub fn mark_page_dirty(&self, index: u64) {
        self.state.borrow_mut().planes.mark_dirty(index);
    }

    /// Makes every page dirty, because those that are stored are damaged.
    pub fn mark_all_pages_dirty(&self) {
        self.state.borrow_mut().planes.mark_all_dirty();
    }

    /// Makes every extent of data or metadata dirty, because their records are damaged.
    pub fn mark_all_extents_dirty(&self) {
        self.state.borrow_mut().extents.mark_all_dirty();
    }

    /// The extents that were taken or became free since the last call, and what they are now.
    /// They count as clean from now on.
    #[must_use]
    pub fn take_dirty_extents(&self) -> Vec<(ExtentIndex, Option<ExtentKind>)> {
        self.state.borrow_mut().extents.take_dirty()
    }

    /// Makes an extent dirty again whose record could not be published.
    pub fn mark_extent_dirty(&self, index: ExtentIndex) {
        self.state.borrow_mut().extents.mark_dirty(index.get());
    }

    // ── Giving blocks back ───────────────────────────────────────────────────────────────────

    /// Makes replaced blocks allocatable. *The one function that does* (design rule 17): it is
    /// called for a block only once the checkpoint that contains its replacement is durably
    /// published, both host slots name that one or a later one (design rule 18), the log tail has
    /// passed the replacing record, and every lookup begun before has ended (design rule 19).
    /// Bad blocks stay busy.
    ///
    /// # Panics
    /// If a block is live, or not busy: it would be handed out while something names it.
    pub fn release(&self, blocks: impl IntoIterator<Item = Pba>) {
        let mut run = Run::default();
        // The allocator is borrowed per run, so that the iterator may look at it.
        for block in blocks {
            if block == run.end() {
                run.count += 1;
            } else {
                self.state.borrow_mut().free_good(self.division, run);
                run = Run { start: block, count: 1 };
            }
        }
        self.state.borrow_mut().free_good(self.division, run);
    }

    /// Gives back blocks that were allocated and never became reachable, nor are named by a log
    /// record that may be durable: those of an operation that failed before it was logged. No
    /// write to them may be in flight (design rule 20). Bad blocks stay busy.
    ///
    /// # Panics
    /// As [`Self::release`].
    pub fn free_now(&self, run: Run) {
        self.state.borrow_mut().free_good(self.division, run);
    }

    /// Makes a block busy for ever, because the device failed to write it (design rule 58), or
    /// because that is known from before. One in a free extent makes that an extent of data.
    ///
    /// # Errors
    /// `Corrupt` if the block is out of bounds or in a system or log extent.
    pub fn retire(&self, pba: Pba) -> Result<(), Error> {
        let index = self.division.extent_of(pba);
        let space = match self.state.borrow().extents.kind(index) {
            None => Some(Space::Data),
            Some(kind) => Space::of(kind),
        };
        let Some(space) = space else {
            return Err(Error::Damaged { what: "address of a bad block", at: pba });
        };
        self.mark_busy(pba, 1, space)?;
        self.state.borrow_mut().bad.insert(pba);
        Ok(())
    }

    /// The retired blocks, in order; to be persisted and retired again at open.
    #[must_use]
    pub fn bad_blocks(&self) -> Vec<Pba> {
        self.state.borrow().bad.iter().copied().collect()
    }

    /// Makes extents free that hold no busy block, so that the balance between data and metadata
    /// heals; returns how many. They show in [`Self::take_dirty_extents`]. An extent with a block
    /// in a window stays.
    pub fn reclaim_empty_extents(&self) -> usize {
        let state = &mut *self.state.borrow_mut();
        let empty = state.extents.empty();
        for &index in &empty {
            state.disown(self.division, index);
        }
        empty.len()
    }

    // ── Lending free blocks, so that their space can be given back below ─────────────────────

    /// The free blocks of data and metadata extents in a page of [`BITMAP_PAGE_BLOCKS`] blocks: 512
    /// words, least significant bit first.
    #[must_use]
    pub fn free_page(&self, index: u64) -> Box<[u64; BLOCK_SIZE / 8]> {
        let state = &*self.state.borrow();
        let start = Pba::new(index.saturating_mul(BITMAP_PAGE_BLOCKS));
        let busy = state.planes.busy(index);
        let mut free = Box::new([0; BLOCK_SIZE / 8]);
        for (_, part) in self.division.by_region(Run { start, count: BITMAP_PAGE_BLOCKS }) {
            if state.extents.space_at(part.start).is_some() {
                let (_, bit) = bitmap::place(part.start);
                bitmap::set_clear(&mut free, busy, bit, narrow(part.count));
            }
        }
        free
    }

    /// Number of pages that describe the store.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.division.block_count.div_ceil(BITMAP_PAGE_BLOCKS)
    }

    /// Makes a run of blocks of one extent busy, if all of it is free and it is a small part of what data
    /// or metadata can get: whoever needs blocks meanwhile finds others. It is given back with
    /// [`Self::free_now`].
    #[must_use]
    pub fn lend(&self, run: Run) -> bool {
        let state = &mut *self.state.borrow_mut();
        let space = state.extents.space_at(run.start);
        let is_free = |(_, part): (u64, Run)| {
            let (page, bit) = bitmap::place(part.start);
            state.extents.space_at(part.start) == space
                && bitmap::count_ones(state.planes.busy(page), bit, narrow(part.count)) == 0
        };
        let available = match space {
            Some(Space::Data) => state.extents.data_available(),
            Some(Space::Metadata) => state.extents.metadata_available(),
            None => 0,
        };
        let is_little = run.count <= available / LENT_SHARE;
        if !is_little || !self.division.by_region(run).all(is_free) {
            return false;
        }
        state.take(self.division, run);
        true
    }

    /// Makes a free extent one that nobody gets, if data can get many more without the reserve for
    /// metadata (design rule 25). It is given back with [`Self::return_extent`]. Nothing of that is
    /// persisted.
    #[must_use]
    pub fn lend_extent(&self, index: ExtentIndex) -> bool {
        let state = &mut *self.state.borrow_mut();
        let run = self.division.extent_run(index.get());
        let is_little = run.count <= state.extents.data_available() / LENT_SHARE;
        if run.count == 0 || !is_little || state.extents.kind(index.get()).is_some() {
            return false;
        }
        state.extents.own(index.get(), ExtentKind::Data);
        state.take(self.division, run);
        true
    }

    /// Makes an extent free that was lent.
    ///
    /// # Panics
    /// If it was not.
    pub fn return_extent(&self, index: ExtentIndex) {
        let state = &mut *self.state.borrow_mut();
        state.free(self.division, self.division.extent_run(index.get()));
        state.disown(self.division, index.get());
    }

    /// Blocks that are kept for metadata, in free extents or metadata extents (design rule 25).
    #[must_use]
    pub fn metadata_reserve_blocks(&self) -> u64 {
        self.division.metadata_reserve_blocks()
    }

    // ── Counters; none of them counts ────────────────────────────────────────────────────────

    /// Blocks that can hold data or metadata: all but those of system and log extents.
    #[must_use]
    pub fn capacity_blocks(&self) -> u64 {
        self.state.borrow().extents.capacity()
    }

    /// Blocks that are not busy.
    #[must_use]
    pub fn free_blocks(&self) -> u64 {
        let extents = &self.state.borrow().extents;
        extents.free_in(Space::Data)
            + extents.free_in(Space::Metadata)
            + extents.free_extent_blocks()
    }

    /// Blocks that data can get, those in windows apart.
    #[must_use]
    pub fn data_available(&self) -> u64 {
        self.state.borrow().extents.data_available()
    }

    /// Blocks that metadata can get, those in windows apart.
    #[must_use]
    pub fn metadata_available(&self) -> u64 {
        self.state.borrow().extents.metadata_available()
    }

    /// Blocks in windows: busy, but nobody's yet.
    #[must_use]
    pub fn window_blocks_reserved(&self) -> u64 {
        self.state.borrow().reserved
    }

    /// Live blocks.
    #[must_use]
    pub fn live_blocks(&self) -> u64 {
        self.state.borrow().planes.live_count()
    }

    // ── Looking, for `check` and GC ──────────────────────────────────────────────────────────

    /// Whether the newest tree reaches the block.
    #[must_use]
    pub fn is_live(&self, pba: Pba) -> bool {
        self.state.borrow().planes.is_live(pba)
    }

    /// Whether the block, in an extent of data or metadata, must not be handed out.
    #[must_use]
    pub fn is_busy(&self, pba: Pba) -> bool {
        self.state.borrow().planes.is_busy(pba)
    }

    /// What an extent holds; `None` if it is free.
    #[must_use]
    pub fn extent_kind(&self, index: ExtentIndex) -> Option<ExtentKind> {
        self.state.borrow().extents.kind(index.get())
    }

    /// The first page of the live plane, from number `from` on, that has a live block: its number
    /// and its 512 words.
    #[must_use]
    pub fn live_page(&self, from: u64) -> Option<(u64, Box<[u64; BLOCK_SIZE / 8]>)> {
        self.state.borrow().planes.live_page(from).map(|(index, live)| (index, Box::new(*live)))
    }

    /// Number of the first page of the live plane, from number `from` on, that has a live block.
    #[must_use]
    pub fn live_page_index(&self, from: u64) -> Option<u64> {
        self.state.borrow().planes.live_page(from).map(|(index, _)| index)
    }

    /// Pages of the planes that are in memory: no more have a live block.
    #[must_use]
    pub fn pages_in_memory(&self) -> u64 {
        widen(self.state.borrow().planes.page_count())
    }

    /// Pages of bits that describe blocks of metadata extents.
    #[must_use]
    pub fn metadata_page_count(&self) -> u64 {
        self.state.borrow().extents.metadata_page_count()
    }

    /// The blocks of metadata extents in a page of [`BITMAP_PAGE_BLOCKS`] blocks, busy or not: 512 words,
    /// least significant bit first. No block changes sides while it is busy.
    #[must_use]
    pub fn metadata_page(&self, index: u64) -> Box<[u64; BLOCK_SIZE / 8]> {
        let state = &*self.state.borrow();
        let start = Pba::new(index.saturating_mul(BITMAP_PAGE_BLOCKS));
        let mut metadata = Box::new([0; BLOCK_SIZE / 8]);
        for (_, part) in self.division.by_region(Run { start, count: BITMAP_PAGE_BLOCKS }) {
            if state.extents.space_at(part.start) == Some(Space::Metadata) {
                let (_, bit) = bitmap::place(part.start);
                bitmap::set_clear(&mut metadata, &[0; BLOCK_SIZE / 8], bit, narrow(part.count));
            }
        }
        metadata
    }

    /// Shows every page of the live plane that has a live block, in order: 512 words, least
    /// significant bit first. `visit` must not change the allocator.
    pub fn for_each_live_page(&self, mut visit: impl FnMut(u64, &[u64; BLOCK_SIZE / 8])) {
        for (index, live) in self.state.borrow().planes.live_pages() {
            visit(index, live);
        }
    }
}

impl std::fmt::Debug for Allocator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Allocator")
            .field("division", &self.division)
            .field("live", &self.live_blocks())
            .field("free", &self.free_blocks())
            .finish_non_exhaustive()
    }
}

impl State {
    /// Reserves a run for a window whose first use is `count` blocks.
    fn reserve(&mut self, division: Division, space: Space, count: u64) -> Option<Run> {
        let available = match space {
            Space::Data => self.extents.data_available(),
            Space::Metadata => self.extents.metadata_available(),
        };
        let length = match self.reuse {
            Reuse::Late => (available / WINDOW_SHARE).max(count).max(WINDOW_BLOCKS_MIN),
            Reuse::Soon => count,
        };
        let length = length.min(division.window_blocks());
        loop {
            let cursor = match self.reuse {
                Reuse::Late => self.cursors[space.slot()],
                Reuse::Soon => Pba::default(),
            };
            let decent = match self.reuse {
                Reuse::Late => self.extents.candidate(space, DECENT_CLASS, cursor),
                Reuse::Soon => self.extents.first(space),
            };
            let candidate = match decent {
                Some(found) => found,
                None if self.extents.take_free(space) => continue,
                None => self.extents.candidate(space, 0, cursor)?,
            };
            // Each round returns, takes an extent, or moves a region to a lower class.
            let (region, class) = candidate;
            if let Some(found) = self.scan(division, region, class, cursor) {
                let run = Run { start: found.start, count: found.count.min(length) };
                self.take(division, run);
                self.cursors[space.slot()] = run.end();
                return Some(run);
            }
        }
    }

    /// Finds a free run of the class's least length in the region: the first at or after `cursor`
    /// if that lies in it, or else the first. If there is none, notes the longest.
    fn scan(&mut self, division: Division, region: u64, class: usize, cursor: Pba) -> Option<Run> {
        let region_start = Pba::new(region * division.region_blocks());
        let (page, start) = bitmap::place(region_start);
        let end = start + narrow(division.region_length(region));
        let from = match division.region_of(cursor) == region {
            true => start + narrow(cursor.distance_from(region_start)),
            false => start,
        };
        let busy = self.planes.busy(page);
        let mut longest = 0;
        let mut long_enough = |&(_, length): &(usize, usize)| {
            longest = longest.max(length);
            length >= 1 << class
        };
        let found = bitmap::clear_runs(busy, from, end)
            .find(&mut long_enough)
            .or_else(|| bitmap::clear_runs(busy, start, end).find(&mut long_enough));
        match found {
            Some((bit, length)) => {
                let start = region_start.plus(widen(bit - start));
                Some(Run { start, count: widen(length) })
            }
            None => {
                self.extents.scanned(region, widen(longest));
                None
            }
        }
    }

    /// Makes the blocks of a run busy, which are free.
    fn take(&mut self, division: Division, run: Run) {
        for (region, part) in division.by_region(run) {
            let fresh = self.planes.set_busy(part.start, part.count);
            assert!(fresh == part.count, "a busy block is handed out at {}", part.start);
            self.extents.used(region, part.count);
        }
    }

    /// Makes the blocks of a run free, except bad ones.
    fn free_good(&mut self, division: Division, run: Run) {
        let bad: Vec<Pba> = self.bad.range(run.start..run.end()).copied().collect();
        let mut rest = run;
        for block in bad {
            self.free(division, Run { count: block.distance_from(rest.start), ..rest });
            let start = block.plus(1);
            rest = Run { start, count: run.end().distance_from(start) };
        }
        self.free(division, rest);
    }

    /// Makes the blocks of a run free.
    fn free(&mut self, division: Division, run: Run) {
        for (region, part) in division.by_region(run) {
            self.planes.clear_busy(part.start, part.count);
            let run_length = match self.extents.may_hold_window(region) {
                true => division.window_blocks(),
                false => self.free_run_around(division, region, part),
            };
            self.extents.freed(region, part.count, run_length);
        }
    }

    /// Length of the free run of a region that a free part lies in, seen up to a window's length
    /// to either side.
    fn free_run_around(&self, division: Division, region: u64, part: Run) -> u64 {
        let (page, region_start) = bitmap::place(Pba::new(region * division.region_blocks()));
        let bounds = (region_start, region_start + narrow(division.region_length(region)));
        let (_, start) = bitmap::place(part.start);
        let range = (start, start + narrow(part.count));
        let limit = narrow(division.window_blocks());
        widen(bitmap::clear_around(self.planes.busy(page), range, bounds, limit))
    }

    /// Makes an extent one of `space`, if it is free or holds nothing yet.
    fn give_extent(&mut self, index: u32, space: Space) {
        if self.extents.kind(index) == Some(space.kind()) {
            return;
        }
        if self.extents.is_empty(index) {
            self.extents.disown(index);
        }
        self.extents.own(index, space.kind());
        self.extents.mark_dirty(index);
    }

    /// Makes an extent free, and forgets the pages that describe nothing any more.
    fn disown(&mut self, division: Division, index: u32) {
        self.extents.disown(index);
        for (_, part) in division.by_region(division.extent_run(index)) {
            self.planes.drop_if_empty(bitmap::place(part.start).0);
        }
    }
}
