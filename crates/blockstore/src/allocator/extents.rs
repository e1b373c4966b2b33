//! Who owns which extent, how much of it is free, and where a search has to look.
//!
//! Extents are divided into *regions*: aligned parts of one bitmap page's length, or the whole
//! extent if that is shorter. A region thus lies in one extent and in one bitmap page, and scanning
//! one costs at most 512 words. Regions with free blocks are filed under the logarithm of an
//! *upper bound* of their longest free run:
//! - taking blocks only lowers the truth, so the bound stays;
//! - freeing blocks raises the bound to the run around them, which is exact as far as it matters;
//! - a scan that finds nothing of that length sets the bound to the truth.
//!
//! So a failed scan is paid for by an earlier release, and a region without free blocks is filed
//! nowhere: a full store costs no scan at all.

use std::collections::{BTreeMap, BTreeSet};

use base::{ExtentIndex, Pba};
use ondisk::ExtentKind;

use super::bitmap::{BITMAP_PAGE_BLOCKS, narrow};
use super::{Division, Run, Space};

/// Classes of longest free runs: 1, 2..4, 4..8, up to 1024 and more.
const CLASSES: usize = 11;

/// Class from which a run is decent: 16 blocks, 64 KiB. Shorter ones are crumbs, taken only when
/// no free extent may be.
pub(super) const DECENT_CLASS: usize = 4;

struct Extent {
    kind: ExtentKind,
    free: u64,
    regions: Box<[Region]>,
}

#[derive(Clone, Copy)]
struct Region {
    free: u64,
    /// Not less than the longest free run, as far as that is shorter than a window.
    /// Zero if and only if `free` is.
    longest: u64,
}

/// The extents in use; all others are free.
pub(super) struct Extents {
    division: Division,
    owned: BTreeMap<u32, Extent>,
    /// By space, then by class: regions of that class.
    classes: [[BTreeSet<u64>; CLASSES]; 2],
    /// Free blocks in the extents of each space.
    free: [u64; 2],
    /// Free extents of full length.
    full_extents_free: u64,
    /// Blocks of the shorter extent at the end of the store, if there is one and it is free.
    tail_free: u64,
    /// No extent below is free.
    first_free: u32,
    /// Extents of data and metadata without a busy block.
    empty: BTreeSet<u32>,
    dirty: BTreeSet<u32>,
    /// Blocks of system and log extents.
    unusable: u64,
}

fn class_of(longest: u64) -> Option<usize> {
    longest.checked_ilog2().map(|class| narrow(u64::from(class)).min(CLASSES - 1))
}

impl Extents {
    pub(super) fn new(division: Division) -> Self {
        Self {
            division,
            owned: BTreeMap::new(),
            classes: Default::default(),
            free: [0; 2],
            full_extents_free: division.block_count / division.extent_blocks,
            tail_free: division.block_count % division.extent_blocks,
            first_free: 0,
            empty: BTreeSet::new(),
            dirty: BTreeSet::new(),
            unusable: 0,
        }
    }

    /// What the extent holds; `None` if it is free.
    pub(super) fn kind(&self, index: u32) -> Option<ExtentKind> {
        self.owned.get(&index).map(|extent| extent.kind)
    }

    /// What space the block belongs to; `None` in free, system and log extents.
    pub(super) fn space_at(&self, pba: Pba) -> Option<Space> {
        self.kind(self.division.extent_of(pba)).and_then(Space::of)
    }

    /// Pages of bits that describe metadata extents. Short extents share pages.
    pub(super) fn metadata_page_count(&self) -> u64 {
        let mut counted = 0;
        let mut count = 0;
        for (&index, _) in
            self.owned.iter().filter(|(_, extent)| extent.kind == ExtentKind::Metadata)
        {
            let run = self.division.extent_run(index);
            let first = (run.start.get() / BITMAP_PAGE_BLOCKS).max(counted);
            let end = run.end().get().div_ceil(BITMAP_PAGE_BLOCKS);
            count += end.saturating_sub(first);
            counted = end.max(counted);
        }
        count
    }

    pub(super) fn free_in(&self, space: Space) -> u64 {
        self.free[space.slot()]
    }

    pub(super) fn free_extent_blocks(&self) -> u64 {
        self.full_extents_free * self.division.extent_blocks + self.tail_free
    }

    pub(super) fn capacity(&self) -> u64 {
        self.division.block_count - self.unusable
    }

    /// Blocks that metadata can get: its own free ones, and every free extent.
    pub(super) fn metadata_available(&self) -> u64 {
        self.free_in(Space::Metadata) + self.free_extent_blocks()
    }

    /// Blocks that data can get: its own free ones, and the free extents above the reserve.
    pub(super) fn data_available(&self) -> u64 {
        let surplus = self.data_surplus();
        let extents = self.full_extents_free.min(surplus / self.division.extent_blocks);
        let full = extents * self.division.extent_blocks;
        let tail = if self.tail_free <= surplus - full { self.tail_free } else { 0 };
        self.free_in(Space::Data) + full + tail
    }

    /// Blocks of free extents that data may take without touching the reserve.
    fn data_surplus(&self) -> u64 {
        self.metadata_available().saturating_sub(self.division.metadata_reserve_blocks())
    }

    /// Makes a free extent one of `kind`, with all of its blocks free.
    pub(super) fn own(&mut self, index: u32, kind: ExtentKind) {
        let blocks = self.division.extent_length(index);
        self.count_free_extent(blocks, false);
        let first_region = self.division.first_region(index);
        let bound = |at: u64| self.division.region_length(first_region + at);
        let count = blocks.div_ceil(self.division.region_blocks());
        let regions: Box<[Region]> = (0..count)
            .map(|at| Region {
                free: bound(at),
                longest: bound(at).min(self.division.window_blocks()),
            })
            .collect();
        match Space::of(kind) {
            Some(space) => {
                self.free[space.slot()] += blocks;
                self.empty.insert(index);
                for (at, region) in (first_region..).zip(&regions) {
                    if let Some(class) = class_of(region.longest) {
                        self.classes[space.slot()][class].insert(at);
                    }
                }
            }
            None => self.unusable += blocks,
        }
        let replaced = self.owned.insert(index, Extent { kind, free: blocks, regions });
        assert!(replaced.is_none(), "extent {index} is owned already");
    }

    /// Makes an extent of data or metadata free that has no busy block.
    pub(super) fn disown(&mut self, index: u32) {
        assert!(self.empty.remove(&index), "extent {index} holds blocks");
        let Some(extent) = self.owned.remove(&index) else { return };
        let Some(space) = Space::of(extent.kind) else { return };
        self.free[space.slot()] -= extent.free;
        for (at, region) in (self.division.first_region(index)..).zip(&extent.regions) {
            if let Some(class) = class_of(region.longest) {
                self.classes[space.slot()][class].remove(&at);
            }
        }
        self.count_free_extent(extent.free, true);
        self.first_free = self.first_free.min(index);
        self.dirty.insert(index);
    }

    fn count_free_extent(&mut self, blocks: u64, is_free: bool) {
        match (blocks == self.division.extent_blocks, is_free) {
            (true, true) => self.full_extents_free += 1,
            (true, false) => self.full_extents_free -= 1,
            (false, true) => self.tail_free = blocks,
            (false, false) => self.tail_free = 0,
        }
    }

    /// Takes a free extent for `space`, the lowest that it may have. False if there is none.
    pub(super) fn take_free(&mut self, space: Space) -> bool {
        let surplus = match space {
            Space::Data => self.data_surplus(),
            Space::Metadata => u64::MAX,
        };
        let index = if self.full_extents_free > 0 && self.division.extent_blocks <= surplus {
            self.lowest_free()
        } else if self.tail_free > 0 && self.tail_free <= surplus {
            self.division.extent_of(Pba::new(self.division.block_count - 1))
        } else {
            return false;
        };
        self.own(index, space.kind());
        self.dirty.insert(index);
        true
    }

    /// The lowest free extent; there is one. Steps over an owned one once per time that it is
    /// taken, so the walk is paid for by taking.
    fn lowest_free(&mut self) -> u32 {
        for &index in self.owned.range(self.first_free..).map(|(index, _)| index) {
            if index != self.first_free {
                break;
            }
            self.first_free += 1;
        }
        self.first_free
    }

    /// A region whose longest free run may be of the highest class there is, but of `class_min` at
    /// least: the first at or after `cursor`, or else the first. With its class.
    pub(super) fn candidate(
        &self,
        space: Space,
        class_min: usize,
        cursor: Pba,
    ) -> Option<(u64, usize)> {
        let cursor = self.division.region_of(cursor);
        let classes = self.classes[space.slot()].iter().enumerate().skip(class_min);
        let (class, regions) = classes.rev().find(|(_, regions)| !regions.is_empty())?;
        let region = regions.range(cursor..).next().or_else(|| regions.first())?;
        Some((*region, class))
    }

    /// The first region with a free block, and the class of a single one.
    pub(super) fn first(&self, space: Space) -> Option<(u64, usize)> {
        let classes = self.classes[space.slot()].iter();
        classes.filter_map(|regions| regions.first()).min().map(|&region| (region, 0))
    }

    /// Notes that `count` free blocks of the region became busy.
    pub(super) fn used(&mut self, region: u64, count: u64) {
        self.change(region, |region| {
            region.free -= count;
            region.longest.min(region.free)
        });
    }

    /// Notes that `count` busy blocks of the region became free, as part of a free run of
    /// `run_length` or of a window's length, whichever is less.
    pub(super) fn freed(&mut self, region: u64, count: u64, run_length: u64) {
        self.change(region, |region| {
            region.free += count;
            region.longest.max(run_length)
        });
    }

    /// Whether a free run of a window's length is known or suspected in the region.
    pub(super) fn may_hold_window(&self, region: u64) -> bool {
        let (index, at) = self.division.region_in_extent(region);
        let region = self.owned.get(&index).and_then(|extent| extent.regions.get(at));
        region.is_some_and(|region| region.longest >= self.division.window_blocks())
    }

    /// Notes what a scan found to be the longest free run of the region.
    pub(super) fn scanned(&mut self, region: u64, longest: u64) {
        self.change(region, |_| longest);
    }

    /// Changes a region's free blocks, and its bound to what `change` returns.
    fn change(&mut self, at: u64, change: impl FnOnce(&mut Region) -> u64) {
        let (index, in_extent) = self.division.region_in_extent(at);
        #[expect(clippy::expect_used, reason = "callers hold a block of an owned extent")]
        let extent = self.owned.get_mut(&index).expect("blocks belong to owned extents");
        #[expect(clippy::expect_used, reason = "callers hold a block of a data or metadata extent")]
        let slot = Space::of(extent.kind).expect("blocks change in data and metadata").slot();
        let region = &mut extent.regions[in_extent];
        let before = *region;
        region.longest = change(region).min(self.division.window_blocks());
        assert!((region.free == 0) == (region.longest == 0), "a region's bound is wrong");
        let (old, new) = (class_of(before.longest), class_of(region.longest));
        extent.free = extent.free + region.free - before.free;
        self.free[slot] = self.free[slot] + region.free - before.free;
        if extent.free == self.division.extent_length(index) {
            self.empty.insert(index);
        } else {
            self.empty.remove(&index);
        }
        if old != new {
            if let Some(class) = old {
                self.classes[slot][class].remove(&at);
            }
            if let Some(class) = new {
                self.classes[slot][class].insert(at);
            }
        }
    }

    /// Whether the extent is of data or metadata, and no block of it is busy.
    pub(super) fn is_empty(&self, index: u32) -> bool {
        self.empty.contains(&index)
    }

    pub(super) fn empty(&self) -> Vec<u32> {
        self.empty.iter().copied().collect()
    }

    pub(super) fn mark_dirty(&mut self, index: u32) {
        self.dirty.insert(index);
    }

    /// Of those that the table has records of.
    pub(super) fn mark_all_dirty(&mut self) {
        let kinds = self.owned.iter().map(|(&index, extent)| (index, extent.kind));
        let stored = kinds.filter(|(_, kind)| Space::of(*kind).is_some());
        self.dirty.extend(stored.map(|(index, _)| index));
    }

    pub(super) fn take_dirty(&mut self) -> Vec<(ExtentIndex, Option<ExtentKind>)> {
        let dirty = std::mem::take(&mut self.dirty);
        dirty.into_iter().map(|index| (ExtentIndex::new(index), self.kind(index))).collect()
    }
}

impl Division {
    pub(super) fn region_blocks(self) -> u64 {
        self.extent_blocks.min(BITMAP_PAGE_BLOCKS)
    }

    pub(super) fn region_of(self, pba: Pba) -> u64 {
        pba.get() / self.region_blocks()
    }

    /// The blocks of a region; fewer at the end of the store.
    pub(super) fn region_length(self, region: u64) -> u64 {
        let start = region * self.region_blocks();
        self.region_blocks().min(self.block_count.saturating_sub(start))
    }

    fn first_region(self, extent: u32) -> u64 {
        u64::from(extent) * (self.extent_blocks / self.region_blocks())
    }

    fn region_in_extent(self, region: u64) -> (u32, usize) {
        let extent = self.extent_of(Pba::new(region * self.region_blocks()));
        (extent, narrow(region - self.first_region(extent)))
    }

    /// The extent that a block lies in; one that does not exist if the block is out of bounds.
    pub(super) fn extent_of(self, pba: Pba) -> u32 {
        u32::try_from(pba.get() / self.extent_blocks).unwrap_or(u32::MAX)
    }

    /// The blocks of an extent; fewer for the last one, none for one that does not exist.
    pub(super) fn extent_length(self, index: u32) -> u64 {
        let start = u64::from(index) * self.extent_blocks;
        self.extent_blocks.min(self.block_count.saturating_sub(start))
    }

    /// The blocks of an extent, as a run.
    pub(super) fn extent_run(self, index: u32) -> Run {
        let start = Pba::new(u64::from(index) * self.extent_blocks);
        Run { start, count: self.extent_length(index) }
    }

    /// Cuts a run at the ends of regions.
    pub(super) fn by_region(self, run: Run) -> impl Iterator<Item = (u64, Run)> {
        let end = run.end().get();
        let mut at = run.start.get();
        std::iter::from_fn(move || {
            let region = at / self.region_blocks();
            let stop = end.min((region + 1).saturating_mul(self.region_blocks()));
            let part = Run { start: Pba::new(at), count: stop.saturating_sub(at) };
            at = stop;
            (part.count > 0).then_some((region, part))
        })
    }
}
