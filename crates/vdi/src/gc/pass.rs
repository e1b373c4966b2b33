//! The passes of a cycle. A collection keeps three bits for each block of what it collects, and so much
//! memory as the configuration says. A store that needs more is collected in several passes: each has a
//! *section* of addresses, and is a cycle of its own in all but that its candidates are those of its section:
//! what `gc.rs` says of a cycle holds of any part of its candidates. Each has a cut of its own, too: no roots
//! and no candidates need be kept from one pass to the next, and releases are held back no longer than one lasts.
//!
//! - Each pass walks all trees, and enters each node once: bits of nodes are kept for the whole store.
//!   They are few, for they lie in extents of metadata. Of data it keeps the bits of its section.
//! - What a pass sweeps is released before the next one ends, unless a reader that began before holds it.
//! - A section is made of pages that have a live block: a store that is mostly free has few passes.
//! - How far a pass has come is not stored (docs/decisions/0017-passes.md).

use std::ops::Range;

use base::{BLOCK_SIZE_U64, Pba};
use blockstore::allocator::BITMAP_PAGE_BLOCKS;
use ondisk::Roots;

use super::{Held, PAGES_PER_TURN};
use crate::engine::Engine;
use crate::mark::{BlockSet, PAGE_WORDS};

/// Sets of a cycle of one pass: candidates, marked, held back, and the marks that are being stored.
const SETS_OF_ONE_PASS: u64 = 4;

/// Sets of a pass that have bits of data blocks of its section: candidates and marked.
const SETS_OF_A_SECTION: u64 = 2;

/// Sets of a pass that have bits of metadata only: marked nodes, tables, and held back.
const SETS_OF_METADATA: u64 = 3;

/// Fewest blocks of a section, however little memory there is: those of a page but for tests and the simulator.
const SECTION_BLOCKS_MIN: u64 = 1024;

/// Addresses that one pass collects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Section(Range<u64>);

impl Section {
    /// All of the store.
    pub(super) const WHOLE: Self = Self(0..u64::MAX);

    pub(super) fn contains(&self, pba: Pba) -> bool {
        self.0.contains(&pba.get())
    }

    pub(super) fn is_whole(&self) -> bool {
        *self == Self::WHOLE
    }

    fn page_numbers(&self) -> Range<u64> {
        self.0.start / BITMAP_PAGE_BLOCKS..self.0.end.div_ceil(BITMAP_PAGE_BLOCKS)
    }

    /// Leaves of a page of bits what lies in it.
    fn cut(&self, index: u64, words: &mut [u64; PAGE_WORDS]) {
        let start = index * BITMAP_PAGE_BLOCKS;
        if self.0.start <= start && start + BITMAP_PAGE_BLOCKS <= self.0.end {
            return;
        }
        for (first, word) in (start..).step_by(64).zip(words) {
            let outside = (0..64).filter(|bit| !self.0.contains(&(first + bit)));
            *word &= !outside.fold(0, |mask, bit| mask | 1 << bit);
        }
    }
}

/// How far a cycle has come: from where the one before was cut short to the end of the store, and from its
/// beginning to there.
#[derive(Clone, Copy)]
pub(super) struct Round {
    start: Pba,
    /// The first block behind the last section.
    at: Pba,
    has_turned: bool,
}

impl Round {
    pub(super) fn at(&self) -> Pba {
        self.at
    }

    /// What of a section it has not come to yet.
    fn enter(&mut self, Section(mut blocks): Section) -> Option<Section> {
        if self.has_turned {
            blocks.end = blocks.end.min(self.start.get());
        }
        self.at = Pba::new(blocks.end);
        (blocks.start < blocks.end).then_some(Section(blocks))
    }

    fn is_new(&self) -> bool {
        self.at == self.start && !self.has_turned
    }
}

/// What a pass begins with.
pub(super) struct Cut {
    pub(super) section: Section,
    pub(super) roots: Roots,
    /// Blocks of the section that are live in these.
    pub(super) candidates: BlockSet,
}

impl Engine {
    /// Whether a cycle keeps the bits of all blocks at a time.
    pub(crate) fn collects_in_one_pass(&self) -> bool {
        let pages = SETS_OF_ONE_PASS * self.allocator.pages_in_memory()
            + self.allocator.metadata_page_count();
        pages * BLOCK_SIZE_U64 <= self.collector.memory_bytes_max
    }

    /// What a cycle begins with. Where the one before was cut short, for else garbage behind a section that
    /// gives a little each time would never be collected.
    pub(super) fn round(&self) -> Round {
        let start = match self.collects_in_one_pass() {
            true => Pba::default(),
            false => self.collector.next_start.get(),
        };
        Round { start, at: start, has_turned: false }
    }

    /// Whether there are sections that it has not come to.
    pub(super) fn has_more(&self, mut round: Round) -> bool {
        self.section_behind(&mut round).is_some()
    }

    /// The cut of the next pass; `None` if nothing is live in what is left. A cycle of one pass always has it:
    /// what was held back for it must be released.
    pub(super) async fn cut(&self, round: &mut Round) -> Option<Cut> {
        let _merges_wait = self.between_merges().await;
        if round.is_new() {
            self.collector.begin();
        }
        let had_turned = round.has_turned;
        let cut = self.next_cut(round).await;
        if round.has_turned && !had_turned {
            self.collector.turns.set(self.collector.turns.get() + 1);
        }
        let (section, candidates) = cut?;
        let held = || match section.is_whole() {
            true => Held::everything(),
            false => Held::metadata(),
        };
        self.collector.held.borrow_mut().get_or_insert_with(held);
        Some(Cut { section, roots: self.roots.get(), candidates })
    }

    /// The next section that has candidates, and these.
    async fn next_cut(&self, round: &mut Round) -> Option<(Section, BlockSet)> {
        loop {
            let section = self.section_behind(round)?;
            let candidates = self.live_in(&section).await;
            if candidates.len() > 0 || section.is_whole() {
                return Some((section, candidates));
            }
        }
    }

    /// The next section. The last one ends where the round began: nothing is to be counted twice.
    fn section_behind(&self, round: &mut Round) -> Option<Section> {
        let mut section = self.section(round.at);
        if section.is_none() && !round.has_turned {
            round.has_turned = true;
            section = self.section(Pba::default());
        }
        round.enter(section?)
    }

    /// The section that begins with `from`, as large as the memory allows.
    fn section(&self, from: Pba) -> Option<Section> {
        let start = from.get();
        if start == 0 && self.collects_in_one_pass() {
            return Some(Section::WHOLE);
        }
        let first = self.allocator.live_page_index(start / BITMAP_PAGE_BLOCKS)?;
        let nodes = SETS_OF_METADATA * self.allocator.metadata_page_count() * BLOCK_SIZE_U64;
        // If the bits of nodes take all of it, more is better than passes without end.
        let memory = self.collector.memory_bytes_max;
        let bytes = memory.saturating_sub(nodes).max(memory / 4) / SETS_OF_A_SECTION;
        let page_count = bytes / BLOCK_SIZE_U64;
        if page_count == 0 {
            let start = start.max(first * BITMAP_PAGE_BLOCKS);
            return Some(Section(start..start + (bytes * 8).max(SECTION_BLOCKS_MIN)));
        }
        let mut last = first;
        for _ in 1..page_count {
            match self.allocator.live_page_index(last + 1) {
                Some(next) => last = next,
                None => break,
            }
        }
        Some(Section(start..(last + 1) * BITMAP_PAGE_BLOCKS))
    }

    /// The blocks of a section that are live now.
    pub(super) async fn live_in(&self, section: &Section) -> BlockSet {
        let mut live = BlockSet::default();
        let mut pages = section.page_numbers();
        let is_bounded = !base::mutant::active("gc_sweeps_beyond_its_section");
        while let Some((index, mut words)) = self.allocator.live_page(pages.start) {
            if index >= pages.end && is_bounded {
                break;
            }
            if is_bounded {
                section.cut(index, &mut words);
            }
            live.insert_page(index, &words);
            pages.start = index + 1;
            if pages.start.is_multiple_of(PAGES_PER_TURN) {
                self.runtime.yield_now().await;
            }
        }
        live
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Also if sections begin elsewhere than they did when it began.
    #[test]
    fn a_round_comes_to_each_block_once() {
        let start = Pba::new(100);
        let mut round = Round { start, at: start, has_turned: false };
        let mut enter = |turns: bool, blocks: Range<u64>| {
            round.has_turned |= turns;
            round.enter(Section(blocks)).map(|Section(blocks)| blocks)
        };
        assert_eq!(enter(false, 100..250), Some(100..250));
        assert_eq!(enter(true, 0..70), Some(0..70));
        assert_eq!(enter(true, 70..140), Some(70..100));
        assert_eq!(enter(true, 100..250), None);
    }

    #[test]
    fn a_section_cuts_pages_at_its_ends() {
        for (section, page, left) in [
            (0..u64::MAX, 3, 32_768),
            (0..32_768, 0, 32_768),
            (0..32_768, 1, 0),
            (1000..2000, 0, 1000),
            (1000..40_000, 1, 40_000 - 32_768),
            (32_767..32_769, 0, 1),
            (32_767..32_769, 1, 1),
        ] {
            let section = Section(section);
            let mut words = [u64::MAX; PAGE_WORDS];
            section.cut(page, &mut words);
            let mut set = BlockSet::default();
            set.insert_page(page, &words);
            assert_eq!(set.len(), left, "{section:?}, page {page}");
            assert!(set.iter().all(|pba| section.contains(pba)), "{section:?}, page {page}");
        }
    }
}
