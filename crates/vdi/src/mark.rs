//! Sets of blocks, and walking trees to find out what they reach: `check`, garbage collection and
//! scrub do so. `reach.rs` says which trees a VDI has.
//!
//! A walk reads nodes only, several at a time, and each shared subtree once: a [`Marker`] says for
//! every node that is named whether it must be entered. Memory is bounded by the height of the
//! trees, and one bit per block of a set.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Page;

use base::{BLOCK_SIZE, BLOCK_SIZE_U64, BirthLabel, Buffer, Pba};
use blockstore::allocator::BITMAP_PAGE_BLOCKS;
use blockstore::{Error, NodeStore, tree};
use ondisk::{Entry, EntryState, FANOUT, Node, RootRef};
use runtime::JoinHandle;

/// Words in a page of bits.
pub(crate) const PAGE_WORDS: usize = BLOCK_SIZE / 8;

/// How far a walk goes at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stride {
    /// Nodes that are read. What was written together is adjacent, and is read so.
    nodes: usize,
    /// Whether as many are read ahead while these are looked at.
    reads_ahead: bool,
}

impl Stride {
    /// All that a node names: 1 MiB, and as much ahead.
    pub(crate) const ALONE: Self = Self { nodes: FANOUT, reads_ahead: true };

    /// No request waits behind many.
    pub(crate) const BESIDE_GUESTS: Self = Self { nodes: 16, reads_ahead: false };
}

/// Blocks, one bit each, in pages like those of the allocation bitmap.
#[derive(Clone, Default)]
pub(crate) struct BlockSet {
    pages: BTreeMap<u64, Box<[u64; PAGE_WORDS]>>,
    count: u64,
}

fn count_ones(page: &[u64; PAGE_WORDS]) -> u64 {
    page.iter().map(|word| u64::from(word.count_ones())).sum()
}

fn place(pba: Pba) -> (u64, usize, u64) {
    let bit = pba.get() % BITMAP_PAGE_BLOCKS;
    let word = usize::try_from(bit / 64).unwrap_or(0);
    (pba.get() / BITMAP_PAGE_BLOCKS, word, 1 << (bit % 64))
}

impl BlockSet {
    /// Adds a block; whether it was not there.
    pub(crate) fn insert(&mut self, pba: Pba) -> bool {
        let (page, word, mask) = place(pba);
        let page = self.pages.entry(page).or_insert_with(|| Box::new([0; PAGE_WORDS]));
        let fresh = page[word] & mask == 0;
        page[word] |= mask;
        self.count += u64::from(fresh);
        fresh
    }

    /// Takes a block out; whether it was there.
    pub(crate) fn remove(&mut self, pba: Pba) -> bool {
        let (page, word, mask) = place(pba);
        let Some(page) = self.pages.get_mut(&page) else { return false };
        let present = page[word] & mask != 0;
        page[word] &= !mask;
        self.count -= u64::from(present);
        present
    }

    pub(crate) fn contains(&self, pba: Pba) -> bool {
        let (page, word, mask) = place(pba);
        self.pages.get(&page).is_some_and(|page| page[word] & mask != 0)
    }

    /// Number of blocks.
    pub(crate) fn len(&self) -> u64 {
        self.count
    }

    /// Adds the blocks of a page of 512 words.
    pub(crate) fn insert_page(&mut self, index: u64, words: &[u64; PAGE_WORDS]) {
        let page = self.pages.entry(index).or_insert_with(|| Box::new([0; PAGE_WORDS]));
        for (to, from) in page.iter_mut().zip(words) {
            self.count += u64::from((from & !*to).count_ones());
            *to |= from;
        }
    }

    /// Takes out the blocks that `mask` has in a page of this number, as a set of their own.
    pub(crate) fn split_off(&mut self, mask: impl Fn(u64) -> Box<[u64; PAGE_WORDS]>) -> Self {
        let mut taken = Self::default();
        for (&index, page) in &mut self.pages {
            let mut words = mask(index);
            for (mask, word) in words.iter_mut().zip(page.iter_mut()) {
                *mask &= *word;
                *word &= !*mask;
            }
            let count = count_ones(&words);
            if count > 0 {
                self.count -= count;
                taken.count += count;
                taken.pages.insert(index, words);
            }
        }
        taken
    }

    /// Bytes of memory that its pages take.
    pub(crate) fn bytes(&self) -> u64 {
        self.pages.len() as u64 * BLOCK_SIZE_U64
    }

    /// Adds the blocks of another set, page by page; one that both had, if there was any.
    pub(crate) fn union(&mut self, other: Self) -> Option<Pba> {
        let mut common = None;
        for (index, words) in other.pages {
            match self.pages.entry(index) {
                Page::Vacant(page) => {
                    self.count += count_ones(&words);
                    page.insert(words);
                }
                Page::Occupied(mut page) => {
                    for (word, (to, &from)) in (0u64..).zip(page.get_mut().iter_mut().zip(&*words))
                    {
                        let both = *to & from;
                        if both != 0 {
                            let bit = word * 64 + u64::from(both.trailing_zeros());
                            common = Some(Pba::new(index * BITMAP_PAGE_BLOCKS + bit));
                        }
                        self.count += u64::from((from & !*to).count_ones());
                        *to |= from;
                    }
                }
            }
        }
        common
    }

    /// Takes out the first page that is left.
    pub(crate) fn pop_page(&mut self) -> Option<(u64, Box<[u64; PAGE_WORDS]>)> {
        let (index, page) = self.pages.pop_first()?;
        self.count -= count_ones(&page);
        Some((index, page))
    }

    /// Number of the first page, from `from` on, that has a block.
    pub(crate) fn first_page(&self, from: u64) -> Option<u64> {
        let mut pages = self.pages.range(from..);
        pages.find(|(_, page)| page.iter().any(|&word| word != 0)).map(|(&index, _)| index)
    }

    /// A page, if there is one.
    pub(crate) fn page(&self, index: u64) -> Option<&[u64; PAGE_WORDS]> {
        self.pages.get(&index).map(|page| &**page)
    }

    /// The pages, in order.
    pub(crate) fn pages(&self) -> impl Iterator<Item = (u64, &[u64; PAGE_WORDS])> {
        self.pages.iter().map(|(&index, page)| (index, &**page))
    }

    /// The blocks, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Pba> {
        self.pages().flat_map(|(index, page)| {
            (0u64..).zip(page).flat_map(move |(word, &bits)| {
                let start = index * BITMAP_PAGE_BLOCKS + word * 64;
                let mut bits = bits;
                std::iter::from_fn(move || {
                    let bit = bits.trailing_zeros();
                    bits = bits.checked_sub(1)? & bits;
                    Some(Pba::new(start + u64::from(bit)))
                })
            })
        })
    }
}

/// The words of a stored bitmap page.
pub(crate) fn words_of(bytes: &[u8; BLOCK_SIZE]) -> [u64; PAGE_WORDS] {
    let (chunks, _) = bytes.as_chunks();
    let mut words = [0; PAGE_WORDS];
    for (word, chunk) in words.iter_mut().zip(chunks) {
        *word = u64::from_le_bytes(*chunk);
    }
    words
}

/// The stored page of some words.
pub(crate) fn page_of_words(words: &[u64; PAGE_WORDS]) -> Buffer {
    let mut buffer = Buffer::zeroed(1);
    for (bytes, word) in buffer.bytes_mut().chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    buffer
}

/// A block that a tree names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Named {
    /// The caller's number of the tree.
    pub(crate) tree: usize,
    /// What names it.
    pub(crate) entry: Entry,
    /// Level of the node; 0 is a leaf, and so is what a leaf names.
    pub(crate) level: u8,
    /// First block of the VDI, or page of the table, that it covers.
    pub(crate) start: u64,
    /// Birth of the node that names it.
    pub(crate) parent_birth: BirthLabel,
}

/// What a walk tells what it finds.
pub(crate) trait Marker {
    /// A node is named. Whether it is to be read and walked.
    fn enter(&mut self, node: &Named) -> bool;

    /// A leaf names a data block or a page.
    fn block(&mut self, block: &Named);

    /// An entry says that what it named was lost.
    fn lost(&mut self, node: &Named);

    /// A node could not be read or is damaged.
    fn failed(&mut self, node: &Named, error: &Error);
}

/// A walk of some trees under way.
#[derive(Default)]
pub(crate) struct Walk {
    /// What is to be read, the next last.
    unread: Vec<Named>,
    /// What is being read ahead.
    ahead: Option<Reading>,
}

/// Nodes that are being read.
struct Reading {
    named: Vec<Named>,
    loads: JoinHandle<Vec<Result<Node, Error>>>,
}

impl Walk {
    /// Adds a tree under the caller's number `tree`.
    pub(crate) fn add(&mut self, tree: usize, root: &RootRef, marker: &mut impl Marker) {
        let named = Named {
            tree,
            entry: root.entry,
            level: root.height - 1,
            start: 0,
            parent_birth: BirthLabel::new(u32::MAX),
        };
        match root.entry.state() {
            EntryState::Mapped if marker.enter(&named) => self.unread.push(named),
            EntryState::Damaged => marker.lost(&named),
            _ => {}
        }
    }

    /// Reads some nodes and shows what they name; false if none is left.
    pub(crate) async fn step(
        &mut self,
        nodes: &NodeStore,
        stride: Stride,
        marker: &mut impl Marker,
    ) -> bool {
        let Some(reading) = self.ahead.take().or_else(|| self.read(nodes, stride.nodes)) else {
            return false;
        };
        if stride.reads_ahead {
            self.ahead = self.read(nodes, stride.nodes);
        }
        for (parent, loaded) in reading.named.iter().zip(reading.loads.await) {
            match loaded {
                Ok(node) => self.show(parent, &node, marker),
                Err(error) => marker.failed(parent, &error),
            }
        }
        true
    }

    /// Ends a walk before its end: nothing is read any more.
    pub(crate) async fn stop(mut self) {
        if let Some(reading) = self.ahead.take() {
            reading.loads.await;
        }
    }

    /// Begins to read some nodes; `None` if none is left.
    fn read(&mut self, nodes: &NodeStore, count: usize) -> Option<Reading> {
        let named = self.take(count);
        if named.is_empty() {
            return None;
        }
        let entries = named.iter().map(|named| named.entry).collect();
        let store = nodes.clone();
        let loads = nodes.runtime().spawn(async move { store.load_all(entries).await });
        Some(Reading { named, loads })
    }

    /// Takes some nodes that are to be read; none if the walk is at its end.
    pub(crate) fn take(&mut self, count: usize) -> Vec<Named> {
        self.unread.split_off(self.unread.len().saturating_sub(count))
    }

    /// Adds a node that is to be read.
    pub(crate) fn push(&mut self, node: Named) {
        self.unread.push(node);
    }

    /// Shows what a node names.
    pub(crate) fn show(&mut self, parent: &Named, node: &Node, marker: &mut impl Marker) {
        let width = tree::span(parent.level);
        for (slot, entry) in node.used_entries() {
            let child = Named {
                tree: parent.tree,
                entry,
                level: parent.level.saturating_sub(1),
                start: parent.start + slot * width,
                parent_birth: parent.entry.birth(),
            };
            match (entry.state(), parent.level) {
                (EntryState::Mapped, 0) => marker.block(&child),
                (EntryState::Mapped, _) if marker.enter(&child) => self.unread.push(child),
                (EntryState::Damaged, _) => marker.lost(&child),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::as_u64;

    #[test]
    fn a_set_holds_what_was_put_in() {
        let mut set = BlockSet::default();
        let blocks = [0, 1, 63, 64, 32_767, 32_768, 1 << 39].map(Pba::new);
        for pba in blocks {
            assert!(set.insert(pba) && !set.insert(pba) && set.contains(pba));
        }
        assert_eq!(set.len(), 7);
        assert_eq!(set.iter().collect::<Vec<_>>(), blocks);
        assert!(set.remove(Pba::new(64)) && !set.remove(Pba::new(64)));
        let mut copy = BlockSet::default();
        for (index, page) in set.pages() {
            copy.insert_page(index, page);
            copy.insert_page(index, page);
        }
        assert_eq!((copy.len(), copy.iter().count()), (6, 6));
    }

    #[test]
    fn what_is_split_off_is_there_no_more() {
        let mut set = BlockSet::default();
        let blocks = [0, 1, 63, 64, 32_767, 32_768, 70_050].map(Pba::new);
        for pba in blocks {
            set.insert(pba);
        }
        // Even words of even pages.
        let mask = |index: u64| {
            let is_even = |at: usize| index.is_multiple_of(2) && at.is_multiple_of(2);
            Box::new(std::array::from_fn(|at| if is_even(at) { u64::MAX } else { 0 }))
        };
        let taken = set.split_off(mask);
        assert_eq!(taken.iter().map(Pba::get).collect::<Vec<_>>(), [0, 1, 63, 70_050]);
        assert_eq!(set.iter().map(Pba::get).collect::<Vec<_>>(), [64, 32_767, 32_768]);
        assert_eq!((taken.len(), set.len()), (4, 3));
    }

    #[test]
    fn a_union_holds_both_and_tells_of_what_both_had() {
        let set = |blocks: &[u64]| {
            let mut set = BlockSet::default();
            for &block in blocks {
                set.insert(Pba::new(block));
            }
            set
        };
        for (one, other, both, common) in [
            (&[][..], &[][..], &[][..], None),
            (&[], &[5], &[5], None),
            (&[5], &[], &[5], None),
            (&[0, 64, 1 << 30], &[63, 65, 40_000], &[0, 63, 64, 65, 40_000, 1 << 30], None),
            (&[7, 32_768 + 70], &[8, 32_768 + 70], &[7, 8, 32_768 + 70], Some(32_768 + 70)),
        ] {
            let mut union = set(one);
            assert_eq!(union.union(set(other)), common.map(Pba::new), "{one:?} and {other:?}");
            assert_eq!(union.iter().map(Pba::get).collect::<Vec<_>>(), both);
            assert_eq!(union.len(), as_u64(both.len()));
        }
    }
}
