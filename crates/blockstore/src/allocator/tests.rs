//! The allocator against a model of plain sets, and the choices that it makes between runs.

use std::collections::BTreeMap;

use base::ErrorKind;
use proptest::prelude::*;

use super::*;

fn pba(raw: u64) -> Pba {
    Pba::new(raw)
}

fn run(start: u64, count: u64) -> Run {
    Run { start: pba(start), count }
}

/// Allocates all that `space` can have, run by run.
fn fill(allocator: &Allocator, space: Space) -> Vec<Run> {
    let mut window = Window::default();
    std::iter::from_fn(|| allocator.allocate(space, &mut window, 256)).collect()
}

fn total(runs: &[Run]) -> u64 {
    runs.iter().map(|run| run.count).sum()
}

fn image(live: &[u64]) -> [u8; BLOCK_SIZE] {
    let mut bytes = [0; BLOCK_SIZE];
    for &block in live {
        bytes[usize::try_from(block / 8).unwrap()] |= 1 << (block % 8);
    }
    bytes
}

#[test]
fn neighbours_in_a_window_are_ones_own() {
    let allocator = Allocator::new(64 << 10, 4096);
    let mut windows: [Window; 2] = Default::default();
    let mut taken: [Vec<Run>; 2] = Default::default();
    for _ in 0..8 {
        for (window, taken) in windows.iter_mut().zip(&mut taken) {
            taken.push(allocator.allocate(Space::Data, window, 8).unwrap());
        }
    }
    for taken in taken {
        assert_eq!(total(&taken), 64);
        assert!(taken.is_sorted_by(|a, b| a.end() == b.start), "{taken:?}");
    }
    assert_eq!(allocator.window_blocks_reserved(), 0, "a window of 64 was used up by each");
}

#[test]
fn data_leaves_the_reserve_to_metadata() {
    let check = |block_count: u64, extent_blocks: u64, data: u64| {
        let allocator = Allocator::new(block_count, extent_blocks);
        assert_eq!(allocator.data_available(), data);
        assert_eq!(total(&fill(&allocator, Space::Data)), data);
        assert_eq!(allocator.data_available(), 0);
        let metadata = allocator.metadata_available();
        assert!(metadata >= allocator.metadata_reserve_blocks());
        assert_eq!(total(&fill(&allocator, Space::Metadata)), metadata);
        assert_eq!((data + metadata, allocator.free_blocks()), (block_count, 0));
    };
    check(8 * 256, 256, 7 * 256);
    check(8 * 256 + 100, 256, 7 * 256 + 100);
    check(96 * 256, 256, 93 * 256);
    check(4 << 16, 1 << 16, 3 << 16);
}

/// What a test frees too early must be overwritten by the next write.
#[test]
fn reused_soon_means_at_once() {
    let allocator = Allocator::new(6 * 4096, 4096);
    allocator.prefer(Reuse::Soon);
    let mut window = Window::default();
    let mut next = |count| allocator.allocate(Space::Data, &mut window, count);
    assert_eq!(next(100), Some(run(0, 64)), "no more than a window");
    assert_eq!(next(10), Some(run(64, 10)));
    allocator.release([3, 20, 21, 22].map(pba));
    assert_eq!(next(2), Some(run(3, 1)));
    assert_eq!(next(2), Some(run(20, 2)));
    assert_eq!(next(2), Some(run(22, 1)));
    assert_eq!(next(2), Some(run(74, 2)));
}

#[test]
fn long_runs_come_first_then_free_extents_then_crumbs() {
    let allocator = Allocator::new(4 * 256, 256);
    let filled: Vec<Pba> =
        fill(&allocator, Space::Data).into_iter().flat_map(Run::blocks).collect();
    assert_eq!(filled.len(), 3 * 256);
    // Crumbs in extent 0, a decent run in extent 1, a long one in extent 2.
    allocator.release((0..256).step_by(2).map(pba));
    allocator.release((300..340).map(pba));
    allocator.release((520..600).map(pba));
    let mut window = Window::default();
    let mut next = |count| allocator.allocate(Space::Data, &mut window, count);
    assert_eq!(next(64), Some(run(520, 64)));
    assert_eq!(next(64), Some(run(300, 40)));
    assert_eq!(next(64), Some(run(584, 16)));
    // Nothing decent is left, and the last free extent belongs to metadata.
    assert_eq!(next(64).map(|run| run.count), Some(1));
    assert_eq!(allocator.extent_kind(ExtentIndex::new(3)), None);
    let mut window = Window::default();
    let node = allocator.allocate(Space::Metadata, &mut window, 1).unwrap();
    assert_eq!(node.start, pba(768));
    assert_eq!(
        allocator.take_dirty_extents().last(),
        Some(&(ExtentIndex::new(3), Some(ExtentKind::Metadata)))
    );
}

#[test]
fn written_space_is_used_before_virgin_extents() {
    let allocator = Allocator::new(16 * 256, 256);
    let mut window = Window::default();
    // Writes and replaces 16 blocks a hundred times: the store stays at one extent.
    let mut replaced: Option<Run> = None;
    for _ in 0..100 {
        let taken = allocator.allocate(Space::Data, &mut window, 16).unwrap();
        if let Some(replaced) = replaced.replace(taken) {
            allocator.release(replaced.blocks());
        }
    }
    assert_eq!(allocator.take_dirty_extents().len(), 1);
}

#[test]
fn a_full_store_is_not_scanned() {
    let allocator = Allocator::new(4 << 16, 1 << 16);
    fill(&allocator, Space::Data);
    let state = allocator.state.borrow();
    assert_eq!(state.extents.candidate(Space::Data, 0, pba(0)), None, "no region is filed");
}

#[test]
fn a_run_is_found_again_after_scattered_releases() {
    // Each block alone is a crumb when it is released; together they are a window.
    let allocator = Allocator::new(4 << 16, 1 << 16);
    fill(&allocator, Space::Data);
    let start = 32_768 + 500;
    let (odd, even): (Vec<u64>, Vec<u64>) = (start..start + 1024).partition(|block| block % 2 == 1);
    allocator.release(odd.into_iter().rev().map(pba));
    allocator.release(even.into_iter().map(pba));
    let mut window = Window::default();
    assert_eq!(allocator.allocate(Space::Data, &mut window, 1024), Some(run(start, 1024)));
}

#[test]
fn empty_extents_become_free_but_not_under_a_window() {
    let allocator = Allocator::new(4 * 256, 256);
    let mut window = Window::default();
    let taken = allocator.allocate(Space::Data, &mut window, 8).unwrap();
    allocator.release(taken.blocks());
    assert_eq!(allocator.reclaim_empty_extents(), 0);
    allocator.return_window(&mut window);
    assert_eq!(allocator.reclaim_empty_extents(), 1);
    assert_eq!(allocator.state.borrow().planes.page_count(), 0, "its bits are forgotten");
    assert_eq!(allocator.take_dirty_extents(), [(ExtentIndex::new(0), None)]);
    assert_eq!(total(&fill(&allocator, Space::Metadata)), 1024, "all of it may be metadata now");
}

#[test]
fn images_are_of_the_live_plane_alone_and_load_back() {
    let allocator = Allocator::new(1 << 16, 4096);
    allocator.load_extent(ExtentIndex::new(0), ExtentKind::System).unwrap();
    let mut window = Window::default();
    let taken = allocator.allocate(Space::Data, &mut window, 3).unwrap();
    assert_eq!((taken, allocator.dirty_page_count()), (run(4096, 3), 0));
    allocator.set_live(pba(4096)).unwrap();
    allocator.set_live(pba(4098)).unwrap();
    let pages = allocator.take_dirty_pages();
    assert_eq!(pages, [(0, Box::new(image(&[4096, 4098])))]);
    assert!(allocator.take_dirty_pages().is_empty());
    allocator.mark_page_dirty(0);
    assert_eq!(allocator.take_dirty_pages(), pages);

    let reopened = Allocator::new(1 << 16, 4096);
    reopened.load_extent(ExtentIndex::new(0), ExtentKind::System).unwrap();
    reopened.load_extent(ExtentIndex::new(1), ExtentKind::Data).unwrap();
    reopened.load_live_page(0, &pages[0].1).unwrap();
    assert_eq!((reopened.live_blocks(), reopened.free_blocks()), (2, (15 * 4096) - 2));
    assert!(reopened.is_busy(pba(4096)) && !reopened.is_busy(pba(4097)));
    assert_eq!(reopened.dirty_page_count(), 0);
    let mut seen = Vec::new();
    reopened.for_each_live_page(|index, words| seen.push((index, words[64])));
    assert_eq!(seen, [(0, 0b101)]);
    reopened.clear_live(pba(4096)).unwrap();
    reopened.clear_live(pba(4098)).unwrap();
    assert_eq!(reopened.take_dirty_pages(), [(0, Box::new(image(&[])))]);
    assert!(reopened.is_busy(pba(4098)), "until it is released");
}

#[test]
fn hostile_tables_and_bitmaps_are_refused_whole() {
    let new = || {
        let allocator = Allocator::new(3 * 4096 + 10, 4096);
        allocator.load_extent(ExtentIndex::new(0), ExtentKind::System).unwrap();
        allocator.load_extent(ExtentIndex::new(1), ExtentKind::Data).unwrap();
        allocator.load_extent(ExtentIndex::new(3), ExtentKind::Data).unwrap();
        allocator
    };
    let refused = |result: Result<(), Error>| {
        assert_eq!(result.map_err(|error| error.kind()), Err(ErrorKind::Corrupt));
    };
    let allocator = new();
    for index in [1, 4, u32::MAX] {
        refused(allocator.load_extent(ExtentIndex::new(index), ExtentKind::Data));
    }
    for (index, block) in [(0, 7), (0, 2 * 4096), (0, 3 * 4096 + 10), (1, 0), (u64::MAX, 0)] {
        refused(allocator.load_live_page(index, &image(&[4096, block])));
    }
    for (start, count) in
        [(0, 1), (4095, 2), (3 * 4096 + 9, 2), (u64::MAX, 1), (5000, u64::MAX), (1 << 40, 1)]
    {
        refused(allocator.mark_busy(pba(start), count, Space::Data));
    }
    refused(allocator.retire(pba(0)));
    refused(allocator.retire(pba(u64::MAX)));
    assert_eq!(allocator.free_blocks(), new().free_blocks(), "nothing was changed");
    assert!(allocator.take_dirty_extents().is_empty());
    allocator.load_live_page(0, &image(&[3 * 4096 + 9])).unwrap();
    refused(allocator.mark_busy(pba(3 * 4096), 1, Space::Metadata));
    refused(allocator.set_live(pba(3 * 4096 + 9)));
    refused(allocator.clear_live(pba(3 * 4096 + 8)));
}

#[test]
fn recovery_takes_extents_that_the_table_does_not_know_yet() {
    let allocator = Allocator::new(4 * 256, 256);
    allocator.load_extent(ExtentIndex::new(0), ExtentKind::Metadata).unwrap();
    // Extent 0 was emptied and became one of data, extent 1 was free, after the checkpoint.
    allocator.mark_busy(pba(250), 10, Space::Data).unwrap();
    allocator.mark_busy(pba(255), 2, Space::Data).unwrap();
    let kind = Some(ExtentKind::Data);
    let expected = [(ExtentIndex::new(0), kind), (ExtentIndex::new(1), kind)];
    assert_eq!(allocator.take_dirty_extents(), expected);
    assert_eq!(allocator.free_blocks(), 1024 - 10);
}

#[test]
fn a_bad_block_is_never_handed_out_again() {
    let allocator = Allocator::new(4 * 256, 256);
    let mut window = Window::default();
    let taken = allocator.allocate(Space::Data, &mut window, 10).unwrap();
    allocator.retire(taken.start.plus(4)).unwrap();
    allocator.free_now(taken);
    allocator.return_window(&mut window);
    let again = fill(&allocator, Space::Data);
    assert_eq!(total(&again), 3 * 256 - 1);
    assert!(again.into_iter().flat_map(Run::blocks).all(|block| block != pba(4)));
    allocator.release([pba(3), pba(4), pba(5)]);
    assert!(allocator.is_busy(pba(4)) && !allocator.is_busy(pba(5)));
    assert_eq!(allocator.bad_blocks(), [pba(4)]);
}

#[test]
#[should_panic(expected = "live block is released")]
fn releasing_a_live_block_is_a_bug() {
    let allocator = Allocator::new(4 * 256, 256);
    let taken = allocator.allocate(Space::Data, &mut Window::default(), 1).unwrap();
    allocator.set_live(taken.start).unwrap();
    allocator.release(taken.blocks());
}

#[test]
#[should_panic(expected = "free twice")]
fn releasing_a_free_block_is_a_bug() {
    let allocator = Allocator::new(4 * 256, 256);
    let taken = allocator.allocate(Space::Data, &mut Window::default(), 1).unwrap();
    allocator.free_now(taken);
    allocator.release(taken.blocks());
}

// ── The model ────────────────────────────────────────────────────────────────────────────────

const WINDOWS: usize = 4;

#[derive(Clone, Debug)]
enum Step {
    /// Allocate from this window.
    Allocate {
        window: usize,
        count: u64,
    },
    /// Allocate until the window's space is full.
    Fill {
        window: usize,
    },
    ReturnWindow {
        window: usize,
    },
    /// These act on the chosen ones of the blocks that are in the right state.
    SetLive {
        chosen: Chosen,
    },
    ClearLive {
        chosen: Chosen,
    },
    Release {
        chosen: Chosen,
    },
    Retire {
        chosen: usize,
    },
    Reclaim,
}

/// A stretch of a list of candidates, or every so-manieth of it.
#[derive(Clone, Debug)]
struct Chosen {
    from: usize,
    step: usize,
    count: usize,
}

impl Chosen {
    fn of(&self, candidates: &BTreeSet<u64>) -> Vec<u64> {
        let from = self.from % candidates.len().max(1);
        candidates.iter().skip(from).step_by(self.step).take(self.count).copied().collect()
    }
}

/// The store as plain sets.
struct Model {
    block_count: u64,
    extent_blocks: u64,
    kinds: BTreeMap<u64, ExtentKind>,
    busy: BTreeSet<u64>,
    live: BTreeSet<u64>,
    bad: BTreeSet<u64>,
    /// Allocated and not live: to become live, or to be released.
    held: BTreeSet<u64>,
}

impl Model {
    fn blocks_of(&self, extent: u64) -> std::ops::Range<u64> {
        let start = extent * self.extent_blocks;
        start..(start + self.extent_blocks).min(self.block_count)
    }

    fn extent_count(&self) -> u64 {
        self.block_count.div_ceil(self.extent_blocks)
    }

    fn free_in(&self, kind: Option<ExtentKind>) -> u64 {
        (0..self.extent_count())
            .filter(|extent| self.kinds.get(extent).copied() == kind)
            .flat_map(|extent| self.blocks_of(extent))
            .filter(|block| !self.busy.contains(block))
            .count() as u64
    }

    /// The free extent that `space` may take next.
    fn takeable(&self, space: Space, free_extents: &BTreeSet<u64>) -> Option<u64> {
        let length = |extent: u64| self.blocks_of(extent).count() as u64;
        let kept = self.free_in(Some(ExtentKind::Metadata))
            + free_extents.iter().map(|&extent| length(extent)).sum::<u64>();
        let reserve = (self.block_count / 32).max(self.extent_blocks / 2);
        let mut may = free_extents
            .iter()
            .filter(|&&extent| space == Space::Metadata || kept >= reserve + length(extent));
        may.next().copied()
    }

    fn free_extents(&self) -> BTreeSet<u64> {
        (0..self.extent_count()).filter(|extent| !self.kinds.contains_key(extent)).collect()
    }

    fn available(&self, space: Space) -> u64 {
        let mut free_extents = self.free_extents();
        let mut available = self.free_in(Some(space.kind()));
        while let Some(extent) = self.takeable(space, &free_extents) {
            free_extents.remove(&extent);
            available += self.blocks_of(extent).count() as u64;
        }
        available
    }

    fn longest_run(&self, kind: ExtentKind) -> usize {
        let extents = self.kinds.iter().filter(|(_, of)| **of == kind).map(|(extent, _)| *extent);
        let runs = |extent| {
            let free: Vec<bool> =
                self.blocks_of(extent).map(|block| !self.busy.contains(&block)).collect();
            free.split(|free| !free).map(<[bool]>::len).max().unwrap_or(0)
        };
        extents.map(runs).max().unwrap_or(0)
    }

    /// Notes that a window was filled with `run`, which must be free and as the rules say.
    fn reserve(&mut self, space: Space, run: Run) {
        let extent = run.start.get() / self.extent_blocks;
        assert_eq!((run.end().get() - 1) / self.extent_blocks, extent, "a window in one extent");
        let longest = self.longest_run(space.kind());
        // A last extent of a few blocks is taken like any other, but is itself a crumb then.
        if let Some(taken) = self.takeable(space, &self.free_extents())
            && longest < 16
            && self.blocks_of(taken).count() < 16
        {
            self.kinds.insert(taken, space.kind());
        }
        match self.kinds.get(&extent) {
            None => {
                assert!(longest < 16, "an extent was taken although a run of {longest} was free");
                assert_eq!(self.takeable(space, &self.free_extents()), Some(extent));
                self.kinds.insert(extent, space.kind());
            }
            Some(kind) => {
                assert_eq!(*kind, space.kind());
                let class = |length: u64| length.min(64).ilog2();
                if class(run.count) < 4 && longest < 16 {
                    assert_eq!(self.takeable(space, &self.free_extents()), None, "crumbs last");
                }
            }
        }
        for block in run.blocks() {
            assert!(self.busy.insert(block.get()), "busy block {block} was handed out");
        }
    }

    /// Compares all that can be seen; `windows` hold blocks.
    fn check(&self, allocator: &Allocator, windows: &[Window]) {
        let unusable: u64 = (self.kinds.iter())
            .filter(|(_, kind)| Space::of(**kind).is_none())
            .map(|(&extent, _)| self.blocks_of(extent).count() as u64)
            .sum();
        let free = [None, Some(ExtentKind::Data), Some(ExtentKind::Metadata)]
            .map(|kind| self.free_in(kind))
            .iter()
            .sum::<u64>();
        assert_eq!(allocator.capacity_blocks(), self.block_count - unusable);
        assert_eq!(allocator.free_blocks(), free);
        assert_eq!(allocator.data_available(), self.available(Space::Data));
        assert_eq!(allocator.metadata_available(), self.available(Space::Metadata));
        assert_eq!(allocator.live_blocks(), self.live.len() as u64);
        let reserved: u64 = windows.iter().map(|window| window.run().count).sum();
        assert_eq!(allocator.window_blocks_reserved(), reserved);
        for block in 0..self.block_count {
            assert_eq!(allocator.is_busy(pba(block)), self.busy.contains(&block), "{block}");
            assert_eq!(allocator.is_live(pba(block)), self.live.contains(&block), "{block}");
        }
        let mut metadata_pages = BTreeSet::new();
        for (&extent, _) in self.kinds.iter().filter(|(_, kind)| **kind == ExtentKind::Metadata) {
            metadata_pages.extend(self.blocks_of(extent).map(|block| block / BITMAP_PAGE_BLOCKS));
        }
        assert_eq!(allocator.metadata_page_count(), metadata_pages.len() as u64);
        let metadata = allocator.metadata_page(0);
        let words = (0u64..).zip(metadata.iter());
        let bits =
            words.flat_map(|(at, word)| (0..64).map(move |bit| (at * 64 + bit, word >> bit & 1)));
        for (block, bit) in bits.take_while(|(block, _)| *block < self.block_count) {
            let kind = self.kinds.get(&(block / self.extent_blocks));
            assert_eq!(bit == 1, kind == Some(&ExtentKind::Metadata), "{block}");
        }
        for extent in 0..self.extent_count() {
            let index = ExtentIndex::new(u32::try_from(extent).unwrap());
            assert_eq!(allocator.extent_kind(index), self.kinds.get(&extent).copied());
        }
        assert_eq!(allocator.bad_blocks(), self.bad.iter().map(|&at| pba(at)).collect::<Vec<_>>());
    }
}

/// What a reader of the published checkpoints knows: images and records as they were taken.
#[derive(Default)]
struct Published {
    pages: BTreeMap<u64, Box<[u8; BLOCK_SIZE]>>,
    extents: BTreeMap<ExtentIndex, ExtentKind>,
}

impl Published {
    fn update(&mut self, allocator: &Allocator) {
        self.pages.extend(allocator.take_dirty_pages());
        for (index, kind) in allocator.take_dirty_extents() {
            match kind {
                Some(kind) => self.extents.insert(index, kind),
                None => self.extents.remove(&index),
            };
        }
    }
}

fn space_of(window: usize) -> Space {
    if window.is_multiple_of(2) { Space::Data } else { Space::Metadata }
}

fn play(block_count: u64, extent_blocks: u64, steps: &[Step]) {
    let allocator = Allocator::new(block_count, extent_blocks);
    let mut published = Published::default();
    let mut model = Model {
        block_count,
        extent_blocks,
        kinds: BTreeMap::new(),
        busy: BTreeSet::new(),
        live: BTreeSet::new(),
        bad: BTreeSet::new(),
        held: BTreeSet::new(),
    };
    for (extent, kind) in [(0, ExtentKind::System), (2, ExtentKind::Log)] {
        allocator.load_extent(ExtentIndex::new(extent), kind).unwrap();
        published.extents.insert(ExtentIndex::new(extent), kind);
        model.kinds.insert(u64::from(extent), kind);
    }
    let mut windows: [Window; WINDOWS] = Default::default();
    let allocate = |model: &mut Model, window: &mut Window, space, count| {
        let before = window.run();
        let Some(taken) = allocator.allocate(space, window, count) else {
            assert_eq!((before.count, model.available(space)), (0, 0), "there was space");
            return false;
        };
        if before.count == 0 {
            let count = taken.count + window.run().count;
            model.reserve(space, Run { start: taken.start, count });
        } else {
            assert_eq!(taken.start, before.start);
        }
        assert!(taken.count == count || (taken.count < count && window.run().count == 0));
        model.held.extend(taken.blocks().map(Pba::get));
        true
    };
    for step in steps {
        match step {
            Step::Allocate { window, count } => {
                allocate(&mut model, &mut windows[*window], space_of(*window), *count);
            }
            Step::Fill { window } => {
                while allocate(&mut model, &mut windows[*window], space_of(*window), 100) {}
            }
            Step::ReturnWindow { window } => {
                for block in windows[*window].run().blocks() {
                    model.busy.remove(&block.get());
                }
                allocator.return_window(&mut windows[*window]);
            }
            Step::SetLive { chosen } => {
                for block in chosen.of(&model.held) {
                    allocator.set_live(pba(block)).unwrap();
                    model.held.remove(&block);
                    model.live.insert(block);
                }
            }
            Step::ClearLive { chosen } => {
                for block in chosen.of(&model.live) {
                    allocator.clear_live(pba(block)).unwrap();
                    model.live.remove(&block);
                    model.held.insert(block);
                }
                published.update(&allocator);
            }
            Step::Release { chosen } => {
                let blocks = chosen.of(&model.held);
                allocator.release(blocks.iter().map(|&block| pba(block)));
                for block in blocks {
                    model.held.remove(&block);
                    if !model.bad.contains(&block) {
                        model.busy.remove(&block);
                    }
                }
            }
            Step::Retire { chosen } => {
                let chosen = Chosen { from: *chosen, step: 1, count: 1 };
                for block in chosen.of(&model.held) {
                    allocator.retire(pba(block)).unwrap();
                    model.bad.insert(block);
                }
            }
            Step::Reclaim => {
                let is_empty = |extent: u64| model.busy.range(model.blocks_of(extent)).count() == 0;
                let emptied: Vec<u64> = (model.kinds.iter())
                    .filter(|(extent, kind)| Space::of(**kind).is_some() && is_empty(**extent))
                    .map(|(&extent, _)| extent)
                    .collect();
                assert_eq!(allocator.reclaim_empty_extents(), emptied.len());
                model.kinds.retain(|extent, _| !emptied.contains(extent));
            }
        }
        model.check(&allocator, &windows);
    }
    // A crash: what was published, and the blocks that the log names, give the same store, but
    // for blocks in windows and extents without a block.
    published.update(&allocator);
    let reopened = Allocator::new(block_count, extent_blocks);
    for (&index, &kind) in &published.extents {
        reopened.load_extent(index, kind).unwrap();
    }
    for (&index, image) in &published.pages {
        reopened.load_live_page(index, image).unwrap();
    }
    for &block in model.held.iter().chain(&model.bad) {
        let kind = model.kinds[&(block / extent_blocks)];
        reopened.mark_busy(pba(block), 1, Space::of(kind).unwrap()).unwrap();
    }
    for &block in &model.bad {
        reopened.retire(pba(block)).unwrap();
    }
    for block in windows.iter().flat_map(|window| window.run().blocks()) {
        model.busy.remove(&block.get());
    }
    model.check(&reopened, &[]);
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let chosen = || {
        (0usize..2000, 1usize..4, 0usize..300).prop_map(|(from, step, count)| Chosen {
            from,
            step,
            count,
        })
    };
    let step = prop_oneof![
        8 => (0..WINDOWS, 1u64..300).prop_map(|(window, count)| Step::Allocate { window, count }),
        1 => (0..WINDOWS).prop_map(|window| Step::Fill { window }),
        2 => (0..WINDOWS).prop_map(|window| Step::ReturnWindow { window }),
        4 => chosen().prop_map(|chosen| Step::SetLive { chosen }),
        4 => chosen().prop_map(|chosen| Step::ClearLive { chosen }),
        6 => chosen().prop_map(|chosen| Step::Release { chosen }),
        1 => (0usize..2000).prop_map(|chosen| Step::Retire { chosen }),
        2 => Just(Step::Reclaim),
    ];
    proptest::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn it_equals_the_model(steps in steps(), tail in prop_oneof![0u64..20, 20u64..200]) {
        play(9 * 256 + tail, 256, &steps);
    }
}
