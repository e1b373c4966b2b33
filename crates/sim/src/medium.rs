//! What a disk holds: a medium, and a volatile write cache before it.
//!
//! This is the fault model of a power cut, as a contract:
//!
//! - A read sees every write that was applied before, cached or not.
//! - A flush makes durable exactly the writes that were applied before it was *submitted*.
//! - When the power goes, of each block of each write that no successful flush covered, each
//!   512-byte sector is kept or lost. Which, is drawn per write (all, none, a prefix, any sectors),
//!   so writes tear, and older ones survive newer ones (reordering), even on the same sector.
//! - A flush that fails makes of each block that it covered one of three things, and all of them
//!   count as clean afterwards, so that no later flush concerns them: it is durable, it is gone at
//!   once, or it is gone at the next power cut, and until then reads lie (fsyncgate).
//! - What a flush made durable never changes by itself; damage is done by [`Medium::damage`] only.
//! - A process that dies changes nothing here.
//!
//! No time, no errors, no queues: those are the device's.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;

use base::BLOCK_SIZE;

use crate::content::{SECTOR_SIZE, SECTORS_PER_BLOCK};
use crate::random::{Random, mix, to_u64};

/// The bytes of a block.
pub type Contents = [u8; BLOCK_SIZE];

/// Number of writes applied so far: what a flush covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u64);

/// How a power cut treats what is in the cache; drawn per cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutStyle {
    /// Everything in the cache is lost.
    LoseAll,
    /// Everything in the cache reaches the medium.
    KeepAll,
    /// Each write is kept or lost whole.
    Whole,
    /// Each write is kept, lost or torn.
    Torn,
}

impl CutStyle {
    /// All styles.
    pub const ALL: [Self; 4] = [Self::LoseAll, Self::KeepAll, Self::Whole, Self::Torn];
}

/// Sectors of a block, one bit each.
type SectorMask = u8;
const ALL_SECTORS: SectorMask = SectorMask::MAX;
const _: () = assert!(SECTORS_PER_BLOCK == 8);

/// One block of a write that is in the cache.
#[derive(Clone, Debug)]
struct Cached {
    /// The write that it belongs to.
    write: u64,
    /// Which block of the write this is.
    index: usize,
    /// When it was applied.
    order: Mark,
    block: u64,
    data: Rc<Contents>,
    /// Whether a flush still makes it durable.
    dirty: bool,
}

/// A medium with its cache. Sparse: what was never written reads as zeroes.
#[derive(Clone, Debug, Default)]
pub struct Medium {
    /// What reads see.
    visible: BlockMap<Rc<Contents>>,
    /// What stands on the medium, for blocks that are in the cache. `None`: never written.
    durable: BlockMap<Option<Rc<Contents>>>,
    /// In the order in which they were applied.
    cache: Vec<Cached>,
    /// Every block ever written, in the order of first writing.
    written: Vec<u64>,
    applied: Mark,
}

impl Medium {
    /// Copies what reads of `block` see.
    pub fn read(&self, block: u64, into: &mut [u8]) {
        match self.visible.get(&block) {
            Some(contents) => into.copy_from_slice(&**contents),
            None => into.fill(0),
        }
    }

    /// Applies one block of the write numbered `write`; `index` says which one.
    pub fn write(&mut self, write: u64, index: usize, block: u64, data: &[u8]) {
        let mut contents = Rc::new([0; BLOCK_SIZE]);
        Rc::make_mut(&mut contents).copy_from_slice(data);
        let before = self.visible.insert(block, Rc::clone(&contents));
        if before.is_none() && !self.durable.contains_key(&block) {
            self.written.push(block);
        }
        self.durable.entry(block).or_insert(before);
        self.applied.0 += 1;
        let order = self.applied;
        self.cache.push(Cached { write, index, order, block, data: contents, dirty: true });
    }

    /// Applies a part of a block's write: a random mix of old and new sectors.
    pub fn write_torn(
        &mut self,
        write: u64,
        index: usize,
        block: u64,
        data: &[u8],
        random: &mut Random,
    ) {
        let mut mixed = [0; BLOCK_SIZE];
        self.read(block, &mut mixed);
        merge(&mut mixed, data, sector_mask(random));
        self.write(write, index, block, &mixed);
    }

    /// Everything that has been applied so far: what a flush that is submitted now covers.
    #[must_use]
    pub fn mark(&self) -> Mark {
        self.applied
    }

    /// Makes durable what was applied up to `mark`, and calls `durable` for each block of
    /// such a write, with the moment at which it was applied.
    pub fn flush(&mut self, mark: Mark, mut durable: impl FnMut(u64, Mark)) {
        let mut cache = std::mem::take(&mut self.cache);
        let mut flushed: Vec<(u64, Mark)> = Vec::new();
        for entry in &cache {
            if entry.order <= mark && entry.dirty {
                self.durable.insert(entry.block, Some(Rc::clone(&entry.data)));
                flushed.push((entry.block, entry.order));
                durable(entry.block, entry.order);
            }
        }
        // What a failed flush left behind is gone for good once a newer version is durable.
        flushed.sort_unstable();
        cache.retain(|entry| {
            let newest = newest_of(&flushed, entry.block);
            newest.is_none_or(|newest| entry.order > newest)
        });
        self.cache = cache;
        self.forget_clean(flushed.into_iter().map(|(block, _)| block));
    }

    /// Fails a flush of what was applied up to `mark`.
    pub fn fail_flush(&mut self, mark: Mark, random: &mut Random) {
        let cache = std::mem::take(&mut self.cache);
        let mut touched = Vec::new();
        for mut entry in cache {
            if entry.order > mark || !entry.dirty {
                self.cache.push(entry);
                continue;
            }
            touched.push(entry.block);
            match random.below(3) {
                0 => {
                    self.durable.insert(entry.block, Some(entry.data));
                }
                1 => {}
                _ => {
                    entry.dirty = false;
                    self.cache.push(entry);
                }
            }
        }
        for &block in &touched {
            self.show(block);
        }
        self.forget_clean(touched.into_iter());
    }

    /// Cuts the power: see the contract above.
    pub fn lose_cache(&mut self, style: CutStyle, random: &mut Random) {
        let mut fates: HashMap<u64, Fate> = HashMap::new();
        let cache = std::mem::take(&mut self.cache);
        for entry in &cache {
            let fate = fates.entry(entry.write).or_insert_with(|| Fate::draw(style, random));
            let mask = if entry.dirty { fate.mask(entry.index, random) } else { 0 };
            if mask == 0 {
                continue;
            }
            let stands = self.durable.entry(entry.block).or_default();
            let mut contents = stands.take().unwrap_or_else(|| Rc::new([0; BLOCK_SIZE]));
            merge(Rc::make_mut(&mut contents), &*entry.data, mask);
            *stands = Some(contents);
        }
        for entry in &cache {
            self.show(entry.block);
        }
        self.forget_clean(cache.iter().map(|entry| entry.block));
        assert!(self.durable.is_empty(), "after a power cut the cache is empty");
    }

    /// Changes the bytes of a block that is at rest, on the medium itself. `false`: it is not at
    /// rest or was never written.
    pub fn damage(&mut self, block: u64, change: impl FnOnce(&mut Contents)) -> bool {
        if self.durable.contains_key(&block) {
            return false;
        }
        match self.visible.get_mut(&block) {
            Some(contents) => {
                change(Rc::make_mut(contents));
                true
            }
            None => false,
        }
    }

    /// Every block ever written, in the order of first writing.
    #[must_use]
    pub fn written(&self) -> &[u64] {
        &self.written
    }

    /// Blocks of writes that no flush covered yet.
    #[must_use]
    pub fn cached_count(&self) -> usize {
        self.cache.len()
    }

    /// A hash of everything that reads see.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.written.iter().fold(0, |hash, &block| {
            let contents = self.visible.get(&block);
            let words = contents.iter().flat_map(|contents| contents.chunks_exact(8));
            words.fold(mix(hash ^ block), |hash, word| {
                let word = word.try_into().map_or(0, u64::from_le_bytes);
                (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
            })
        })
    }

    /// Makes reads see the newest cached version of a block, or what stands on the medium.
    fn show(&mut self, block: u64) {
        let cached = self.cache.iter().rev().find(|entry| entry.block == block);
        let contents = match cached {
            Some(entry) => Some(Rc::clone(&entry.data)),
            None => self.durable.get(&block).cloned().flatten(),
        };
        match contents {
            Some(contents) => self.visible.insert(block, contents),
            None => self.visible.remove(&block),
        };
    }

    /// Blocks that are no longer in the cache are what the medium holds.
    fn forget_clean(&mut self, blocks: impl Iterator<Item = u64>) {
        let mut in_cache: Vec<u64> = self.cache.iter().map(|entry| entry.block).collect();
        in_cache.sort_unstable();
        for block in blocks {
            if in_cache.binary_search(&block).is_err() {
                self.durable.remove(&block);
            }
        }
    }
}

/// The newest mark of `block` in a sorted list.
fn newest_of(flushed: &[(u64, Mark)], block: u64) -> Option<Mark> {
    let end = flushed.partition_point(|&(other, _)| other <= block);
    let (other, mark) = *flushed.get(end.checked_sub(1)?)?;
    (other == block).then_some(mark)
}

/// What a power cut does to one write.
#[derive(Clone, Copy)]
enum Fate {
    Kept,
    Lost,
    /// So many sectors from the start are kept.
    Prefix(u64),
    /// Any sectors are kept.
    Shredded,
}

impl Fate {
    fn draw(style: CutStyle, random: &mut Random) -> Self {
        match (style, random.below(4)) {
            (CutStyle::LoseAll, _) | (CutStyle::Whole, 0 | 1) | (CutStyle::Torn, 0) => Self::Lost,
            (CutStyle::KeepAll, _) | (CutStyle::Whole, _) | (CutStyle::Torn, 1) => Self::Kept,
            (CutStyle::Torn, 2) => Self::Prefix(random.magnitude(64)),
            (CutStyle::Torn, _) => Self::Shredded,
        }
    }

    fn mask(self, index: usize, random: &mut Random) -> SectorMask {
        match self {
            Self::Kept => ALL_SECTORS,
            Self::Lost => 0,
            Self::Prefix(sectors) => {
                let before = to_u64(index * SECTORS_PER_BLOCK);
                let kept = sectors.saturating_sub(before).min(to_u64(SECTORS_PER_BLOCK));
                u8::try_from((1u16 << kept) - 1).unwrap_or(ALL_SECTORS)
            }
            Self::Shredded => sector_mask(random),
        }
    }
}

fn sector_mask(random: &mut Random) -> SectorMask {
    SectorMask::try_from(random.below(256)).unwrap_or(0)
}

/// Copies the sectors in `mask`.
fn merge(into: &mut Contents, from: &[u8], mask: SectorMask) {
    let sectors = into.chunks_exact_mut(SECTOR_SIZE).zip(from.chunks_exact(SECTOR_SIZE));
    for (index, (into, from)) in sectors.enumerate() {
        if mask & (1 << index) != 0 {
            into.copy_from_slice(from);
        }
    }
}

/// Hashes block numbers; the same in every run, unlike the standard one. Never iterated.
#[derive(Default)]
struct BlockHasher(u64);

impl Hasher for BlockHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = mix(self.0 ^ u64::from(byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = mix(number);
    }
}

type BlockMap<T> = HashMap<u64, T, BuildHasherDefault<BlockHasher>>;

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(fill: u8) -> Contents {
        [fill; BLOCK_SIZE]
    }

    fn see(medium: &Medium, block: u64) -> Contents {
        let mut bytes = [0xee; BLOCK_SIZE];
        medium.read(block, &mut bytes);
        bytes
    }

    #[test]
    fn a_flush_covers_only_what_was_applied_before_it_was_submitted() {
        let mut random = Random::new(1);
        let mut medium = Medium::default();
        medium.write(1, 0, 10, &contents(1));
        let mark = medium.mark();
        medium.write(2, 0, 10, &contents(2));
        medium.write(3, 0, 11, &contents(3));
        let mut durable = Vec::new();
        medium.flush(mark, |block, _| durable.push(block));
        assert_eq!(durable, [10]);
        assert_eq!(see(&medium, 10), contents(2), "reads see the cache");
        medium.lose_cache(CutStyle::LoseAll, &mut random);
        assert_eq!(see(&medium, 10), contents(1), "the flushed version is the floor");
        assert_eq!(see(&medium, 11), contents(0), "never flushed: gone");
    }

    #[test]
    fn a_power_cut_keeps_loses_tears_and_reorders() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..400 {
            let mut random = Random::new(seed);
            let mut medium = Medium::default();
            medium.write(1, 0, 10, &contents(1));
            medium.write(2, 0, 10, &contents(2));
            medium.lose_cache(CutStyle::Torn, &mut random);
            let now = see(&medium, 10);
            assert!(now.iter().all(|byte| *byte <= 2), "nothing but old or new bytes");
            for sector in now.chunks(SECTOR_SIZE) {
                assert!(sector.iter().all(|byte| *byte == sector[0]), "sectors are atomic");
            }
            let kinds: std::collections::BTreeSet<u8> = now.iter().copied().collect();
            seen.insert(kinds.into_iter().collect::<Vec<u8>>());
        }
        for outcome in [vec![0], vec![1], vec![2], vec![0, 1], vec![1, 2], vec![0, 1, 2]] {
            assert!(seen.contains(&outcome), "{outcome:?} never happened: {seen:?}");
        }
    }

    #[test]
    fn whole_and_keep_cuts_do_not_tear() {
        for style in [CutStyle::Whole, CutStyle::KeepAll, CutStyle::LoseAll] {
            for seed in 0..50 {
                let mut medium = Medium::default();
                medium.write(1, 0, 10, &contents(1));
                medium.write(1, 1, 11, &contents(1));
                medium.lose_cache(style, &mut Random::new(seed));
                assert_eq!(see(&medium, 10), see(&medium, 11), "one write has one fate");
                let expected: &[u8] = match style {
                    CutStyle::KeepAll => &[1],
                    CutStyle::LoseAll => &[0],
                    _ => &[0, 1],
                };
                assert!(expected.contains(&see(&medium, 10)[0]));
            }
        }
    }

    #[test]
    fn a_failed_flush_forgets() {
        let mut fates = std::collections::BTreeSet::new();
        for seed in 0..100 {
            let mut random = Random::new(seed);
            let mut medium = Medium::default();
            medium.write(1, 0, 10, &contents(1));
            medium.fail_flush(medium.mark(), &mut random);
            let after = see(&medium, 10)[0];
            medium.flush(medium.mark(), |_, _| panic!("nothing is dirty any more"));
            medium.lose_cache(CutStyle::KeepAll, &mut random);
            fates.insert((after, see(&medium, 10)[0]));
        }
        assert_eq!(fates.into_iter().collect::<Vec<_>>(), [(0, 0), (1, 0), (1, 1)]);
    }

    #[test]
    fn rewriting_after_a_failed_flush_is_safe() {
        for seed in 0..100 {
            let mut random = Random::new(seed);
            let mut medium = Medium::default();
            medium.write(1, 0, 10, &contents(1));
            medium.fail_flush(medium.mark(), &mut random);
            medium.write(2, 0, 10, &contents(2));
            medium.flush(medium.mark(), |_, _| {});
            medium.lose_cache(CutStyle::LoseAll, &mut random);
            assert_eq!(see(&medium, 10), contents(2));
            assert_eq!(medium.cached_count(), 0);
        }
    }

    #[test]
    fn what_was_flushed_changes_only_by_damage() {
        let mut random = Random::new(9);
        let mut medium = Medium::default();
        medium.write(1, 0, 10, &contents(1));
        assert!(!medium.damage(10, |bytes| bytes[0] = 9), "not at rest");
        medium.flush(medium.mark(), |_, _| {});
        for style in CutStyle::ALL {
            medium.lose_cache(style, &mut random);
            assert_eq!(see(&medium, 10), contents(1));
        }
        assert!(medium.damage(10, |bytes| bytes[0] = 9));
        assert_eq!(see(&medium, 10)[0], 9);
        assert!(!medium.damage(12, |_| {}), "never written");
    }

    #[test]
    fn torn_writes_leave_a_mix() {
        let mut medium = Medium::default();
        medium.write(1, 0, 10, &contents(1));
        medium.write_torn(2, 0, 10, &contents(2), &mut Random::new(3));
        let now = see(&medium, 10);
        assert!(now.contains(&1) && now.contains(&2));
    }
}
