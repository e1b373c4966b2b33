//! Which blocks of a VDI clients write to: a few windows, far apart, so that requests collide and
//! trees are high, though little is stored.

use base::BLOCK_SIZE_U64;

use crate::random::{Random, to_u64, to_usize};

/// A run of blocks that clients write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First block.
    pub first: u64,
    /// Number of blocks.
    pub count: u64,
    /// Number of its first block, counted over all windows.
    slot: u64,
}

/// The windows of a run; the same for every VDI, since clones keep addresses.
#[derive(Clone, Debug)]
pub struct Layout {
    windows: Vec<Window>,
}

impl Layout {
    /// Windows at `(first, count)`, in order and apart.
    #[must_use]
    pub fn new(windows: &[(u64, u64)]) -> Self {
        let mut slot = 0;
        let windows = windows
            .iter()
            .map(|&(first, count)| {
                let window = Window { first, count, slot };
                slot += count;
                window
            })
            .collect();
        Self { windows }
    }

    /// Draws windows: one at the start, others across the borders of tree nodes.
    #[must_use]
    pub fn draw(random: &mut Random) -> Self {
        let mut windows = vec![(0, random.between(4, 96))];
        // 256 blocks fill a leaf, 65,536 a node above it, 16,777,216 one above that.
        let borders = [256u64, 512, 65_536, 131_072, 16_777_216];
        for border in borders {
            if random.chance(300) {
                let before = random.between(1, 24);
                windows.push((border - before, before + random.between(1, 24)));
            }
        }
        Self::new(&windows)
    }

    /// The windows.
    #[must_use]
    pub fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// Number of blocks in all windows.
    #[must_use]
    pub fn slot_count(&self) -> usize {
        to_usize(self.windows.iter().map(|window| window.count).sum())
    }

    /// Number of the block `lba`, if it lies in a window.
    #[must_use]
    pub fn slot(&self, lba: u64) -> Option<usize> {
        let window = self
            .windows
            .iter()
            .find(|window| (window.first..window.first + window.count).contains(&lba))?;
        Some(to_usize(window.slot + lba - window.first))
    }

    /// The block with this number.
    #[must_use]
    pub fn lba(&self, slot: usize) -> u64 {
        let slot = to_u64(slot);
        let window = self.windows.iter().rev().find(|window| window.slot <= slot);
        window.map_or(u64::MAX, |window| window.first + slot - window.slot)
    }

    /// The parts of `bytes` (`start..end`) that lie in blocks of windows: number of the block, and
    /// the bytes within it.
    pub fn pieces(&self, start: u64, end: u64) -> impl Iterator<Item = (usize, (u16, u16))> + '_ {
        self.windows.iter().flat_map(move |window| {
            let from = (start / BLOCK_SIZE_U64).max(window.first);
            let to = end.div_ceil(BLOCK_SIZE_U64).min(window.first + window.count);
            (from..to).map(move |lba| {
                let block_start = lba * BLOCK_SIZE_U64;
                let cut = |byte: u64| {
                    u16::try_from(byte.saturating_sub(block_start).min(BLOCK_SIZE_U64))
                        .unwrap_or(u16::MAX)
                };
                (to_usize(window.slot + lba - window.first), (cut(start), cut(end)))
            })
        })
    }

    /// Blocks that a VDI needs for `windows` of them.
    #[must_use]
    pub fn blocks_for(&self, windows: usize) -> u64 {
        let last = self.windows.iter().take(windows.max(1)).next_back();
        last.map_or(1, |window| window.first + window.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_and_slots_correspond() {
        let layout = Layout::new(&[(0, 4), (250, 10), (65_530, 12)]);
        assert_eq!(layout.slot_count(), 26);
        for slot in 0..26 {
            assert_eq!(layout.slot(layout.lba(slot)), Some(slot));
        }
        assert_eq!(layout.slot(4), None);
        assert_eq!(layout.slot(250), Some(4));
        assert_eq!(layout.blocks_for(2), 260);
    }

    #[test]
    fn ranges_are_cut_into_blocks() {
        let layout = Layout::new(&[(0, 2), (4, 2)]);
        let pieces: Vec<_> = layout.pieces(1000, 4 * 4096 + 10).collect();
        assert_eq!(pieces, [(0, (1000, 4096)), (1, (0, 4096)), (2, (0, 10))]);
        assert_eq!(layout.pieces(3 * 4096, 4 * 4096).count(), 0);
    }

    #[test]
    fn drawn_windows_do_not_overlap() {
        for seed in 0..200 {
            let layout = Layout::draw(&mut Random::new(seed));
            for pair in layout.windows().windows(2) {
                assert!(pair[0].first + pair[0].count <= pair[1].first, "{pair:?}");
            }
        }
    }
}
