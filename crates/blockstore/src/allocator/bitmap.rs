//! The two bit planes, and arithmetic on words of bits.
//!
//! One bit per block, least significant first, in pages of 32768 blocks: a page's encoding is one
//! block. A missing page is all zero.

use std::collections::{BTreeMap, BTreeSet};

use base::{BLOCK_SIZE, Pba};

/// Blocks that one bitmap page describes: 8 per byte of a block.
pub const BITMAP_PAGE_BLOCKS: u64 = 32_768;

const PAGE_BITS: usize = BLOCK_SIZE * 8;
const PAGE_WORDS: usize = PAGE_BITS / 64;

const _: () = assert!(PAGE_BITS as u64 == BITMAP_PAGE_BLOCKS);

/// The bits of one page of one plane.
pub(super) type Words = [u64; PAGE_WORDS];

static ZEROES: Words = [0; PAGE_WORDS];

#[derive(Clone)]
struct Page {
    live: Words,
    busy: Words,
}

/// Both planes. Keeps `live` within `busy`; knows nothing of extents.
#[derive(Default)]
pub(super) struct Planes {
    pages: BTreeMap<u64, Box<Page>>,
    dirty: BTreeSet<u64>,
    live_count: u64,
}

/// The page that describes `pba`, and the bit in it.
pub(super) fn place(pba: Pba) -> (u64, usize) {
    (pba.get() / BITMAP_PAGE_BLOCKS, narrow(pba.get() % BITMAP_PAGE_BLOCKS))
}

/// A number that is known to be small, as an index: of a bit in a page, of a page in an extent.
pub(super) fn narrow(value: u64) -> usize {
    // A value that does not fit is out of every bound, and is caught where it is used.
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// A number of bits or blocks, as a count.
pub(super) fn widen(value: usize) -> u64 {
    value as u64
}

impl Planes {
    fn page(&mut self, index: u64) -> &mut Page {
        self.pages
            .entry(index)
            .or_insert_with(|| Box::new(Page { live: [0; PAGE_WORDS], busy: [0; PAGE_WORDS] }))
    }

    pub(super) fn is_live(&self, pba: Pba) -> bool {
        let (page, bit) = place(pba);
        self.pages.get(&page).is_some_and(|page| count_ones(&page.live, bit, 1) == 1)
    }

    pub(super) fn is_busy(&self, pba: Pba) -> bool {
        let (page, bit) = place(pba);
        count_ones(self.busy(page), bit, 1) == 1
    }

    /// The busy plane of a page.
    pub(super) fn busy(&self, page: u64) -> &Words {
        self.pages.get(&page).map_or(&ZEROES, |page| &page.busy)
    }

    /// Makes a run within one page busy; returns how many blocks were not.
    pub(super) fn set_busy(&mut self, start: Pba, count: u64) -> u64 {
        let (page, bit) = place(start);
        let mut changed = 0;
        let busy = &mut self.page(page).busy;
        for_each_word(bit, narrow(count), |word, mask| {
            changed += (mask & !busy[word]).count_ones();
            busy[word] |= mask;
        });
        u64::from(changed)
    }

    /// Makes a run within one page free.
    ///
    /// # Panics
    /// If a block of it is live, or is free already.
    pub(super) fn clear_busy(&mut self, start: Pba, count: u64) {
        let (page, bit) = place(start);
        let page = self.page(page);
        let count = narrow(count);
        assert!(count_ones(&page.live, bit, count) == 0, "a live block is released at {start}");
        assert!(count_ones(&page.busy, bit, count) == count, "a block is free twice at {start}");
        for_each_word(bit, count, |word, mask| page.busy[word] &= !mask);
    }

    /// Makes a busy block live; false if it was.
    pub(super) fn set_live(&mut self, pba: Pba) -> bool {
        assert!(self.is_busy(pba), "block {pba} becomes live, but was never allocated");
        let changed = self.change_live(pba, true);
        self.live_count += u64::from(changed);
        changed
    }

    /// Makes a live block not live, and leaves it busy; false if it was not live.
    pub(super) fn clear_live(&mut self, pba: Pba) -> bool {
        let changed = self.is_live(pba) && self.change_live(pba, false);
        self.live_count -= u64::from(changed);
        changed
    }

    fn change_live(&mut self, pba: Pba, to: bool) -> bool {
        let (index, bit) = place(pba);
        let word = &mut self.page(index).live[bit / 64];
        let before = *word;
        let mask = 1 << (bit % 64);
        *word = if to { before | mask } else { before & !mask };
        let changed = before != *word;
        if changed {
            self.dirty.insert(index);
        }
        changed
    }

    /// Makes the blocks of `live` live and busy, without marking the page dirty.
    pub(super) fn load(&mut self, index: u64, live: &Words) {
        let page = self.page(index);
        let mut added = 0;
        for (word, new) in live.iter().enumerate() {
            added += (new & !page.live[word]).count_ones();
            page.live[word] |= new;
            page.busy[word] |= new;
        }
        self.live_count += u64::from(added);
    }

    pub(super) fn mark_dirty(&mut self, index: u64) {
        self.dirty.insert(index);
    }

    pub(super) fn mark_all_dirty(&mut self) {
        self.dirty.extend(self.pages.keys());
    }

    pub(super) fn dirty_count(&self) -> usize {
        self.dirty.len()
    }

    pub(super) fn take_dirty(&mut self) -> Vec<(u64, Box<[u8; BLOCK_SIZE]>)> {
        let dirty = std::mem::take(&mut self.dirty);
        let image = |index: &u64| self.pages.get(index).map_or(&ZEROES, |page| &page.live);
        dirty.into_iter().map(|index| (index, encode(image(&index)))).collect()
    }

    /// Forgets the page if no block of it is busy.
    pub(super) fn drop_if_empty(&mut self, index: u64) {
        if self.busy(index).iter().all(|&word| word == 0) {
            self.pages.remove(&index);
        }
    }

    /// Pages that are in memory: every one that has a busy block.
    pub(super) fn page_count(&self) -> usize {
        self.pages.len()
    }

    pub(super) fn live_count(&self) -> u64 {
        self.live_count
    }

    /// The first page from `from` on that has a live block.
    pub(super) fn live_page(&self, from: u64) -> Option<(u64, &Words)> {
        let mut pages = self.pages.range(from..).map(|(&index, page)| (index, &page.live));
        pages.find(|(_, live)| live.iter().any(|&word| word != 0))
    }

    /// The live plane of every page that has a live block, in order.
    pub(super) fn live_pages(&self) -> impl Iterator<Item = (u64, &Words)> {
        let pages = self.pages.iter().map(|(&index, page)| (index, &page.live));
        pages.filter(|(_, live)| live.iter().any(|&word| word != 0))
    }
}

/// The words of a stored page.
pub(super) fn decode(bytes: &[u8; BLOCK_SIZE]) -> Words {
    let mut words = [0; PAGE_WORDS];
    let (chunks, _) = bytes.as_chunks();
    for (word, chunk) in words.iter_mut().zip(chunks) {
        *word = u64::from_le_bytes(*chunk);
    }
    words
}

fn encode(words: &Words) -> Box<[u8; BLOCK_SIZE]> {
    let mut bytes = Box::new([0; BLOCK_SIZE]);
    let (chunks, _) = bytes.as_chunks_mut();
    for (chunk, word) in chunks.iter_mut().zip(words) {
        *chunk = word.to_le_bytes();
    }
    bytes
}

/// Calls `visit` with each word that the range touches and the mask of its bits there.
fn for_each_word(start: usize, count: usize, mut visit: impl FnMut(usize, u64)) {
    let end = start + count;
    let mut at = start;
    while at < end {
        let in_word = (64 - at % 64).min(end - at);
        visit(at / 64, (u64::MAX >> (64 - in_word)) << (at % 64));
        at += in_word;
    }
}

/// How many bits of the range are set.
pub(super) fn count_ones(words: &Words, start: usize, count: usize) -> usize {
    let mut ones = 0;
    for_each_word(start, count, |word, mask| ones += (words[word] & mask).count_ones() as usize);
    ones
}

/// The first bit in `from..end` of which `flip` of its word is set; `end` if there is none.
fn next(words: &Words, from: usize, end: usize, flip: impl Fn(u64) -> u64) -> usize {
    let mut at = from;
    while at < end {
        let word = flip(words[at / 64]) >> (at % 64);
        if word != 0 {
            return (at + word.trailing_zeros() as usize).min(end);
        }
        at = (at / 64 + 1) * 64;
    }
    end
}

/// The runs of clear bits in `from..end`, in order, as (first bit, length).
pub(super) fn clear_runs(
    words: &Words,
    from: usize,
    end: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let mut at = from;
    std::iter::from_fn(move || {
        let start = next(words, at, end, |word| !word);
        at = next(words, start, end, |word| word);
        (start < end).then_some((start, at - start))
    })
}

/// The runs of set bits of a page, in order, as (first bit, length).
pub(super) fn set_runs(words: &Words) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = next(words, at, PAGE_BITS, |word| word);
        at = next(words, start, PAGE_BITS, |word| !word);
        (start < PAGE_BITS).then_some((start, at - start))
    })
}

/// Sets the bits of the range in `to` that are clear in `from`.
pub(super) fn set_clear(to: &mut Words, from: &Words, start: usize, count: usize) {
    for_each_word(start, count, |word, mask| to[word] |= !from[word] & mask);
}

/// How many bits of the range are set in `new` and clear in `old`.
pub(super) fn count_new(old: &Words, new: &Words, start: usize, count: usize) -> usize {
    let mut fresh = 0;
    for_each_word(start, count, |word, mask| {
        fresh += (new[word] & !old[word] & mask).count_ones() as usize;
    });
    fresh
}

/// Length of the run of clear bits within `bounds` around the clear range `start..end`, looking
/// at most `limit` bits beyond it on either side.
pub(super) fn clear_around(
    words: &Words,
    (start, end): (usize, usize),
    bounds: (usize, usize),
    limit: usize,
) -> usize {
    let after = next(words, end, bounds.1.min(end + limit), |word| word);
    let lowest = bounds.0.max(start.saturating_sub(limit));
    let mut before = start;
    while before > lowest {
        // The bits below `before` in its word, moved to the top: leading zeroes are clear bits.
        let bits = (before - 1) % 64 + 1;
        let clear = ((words[(before - 1) / 64] << (64 - bits)).leading_zeros() as usize).min(bits);
        before -= clear;
        if clear < bits {
            break;
        }
    }
    after - before.max(lowest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(ones: impl IntoIterator<Item = usize>) -> Words {
        let mut words = [0; PAGE_WORDS];
        for bit in ones {
            words[bit / 64] |= 1 << (bit % 64);
        }
        words
    }

    #[test]
    fn pages_round_trip_least_significant_bit_first() {
        let words = words([0, 9, 64, 32_767]);
        let bytes = encode(&words);
        assert_eq!((bytes[0], bytes[1], bytes[8], bytes[4095]), (1, 2, 1, 0x80));
        assert_eq!(decode(&bytes), words);
    }

    proptest! {
        #[test]
        fn word_arithmetic_equals_bit_arithmetic(
            ones in proptest::collection::vec(0usize..400, 0..40),
            from in 0usize..400,
            length in 1usize..400,
            limit in 1usize..200,
        ) {
            let words = words(ones.iter().copied());
            let end = from + length;
            let is_set = |bit: usize| ones.contains(&bit);
            prop_assert_eq!(
                count_ones(&words, from, length),
                (from..end).filter(|&bit| is_set(bit)).count()
            );
            let mut expected: Vec<(usize, usize)> = Vec::new();
            for bit in (from..end).filter(|&bit| !is_set(bit)) {
                match expected.last_mut() {
                    Some((start, length)) if *start + *length == bit => *length += 1,
                    _ => expected.push((bit, 1)),
                }
            }
            let runs: Vec<_> = clear_runs(&words, from, end).collect();
            prop_assert_eq!(&runs, &expected);
            for (start, length) in runs {
                // Any part of a run, seen without a limit, is the whole run.
                let part = (start + length / 3, start + length / 3 + 1);
                prop_assert_eq!(clear_around(&words, part, (from, end), 1000), length);
                let near = clear_around(&words, part, (from, end), limit);
                let left = (part.0 - start).min(limit);
                let right = (start + length - part.1).min(limit);
                prop_assert_eq!(near, left + 1 + right);
            }
        }
    }
}
