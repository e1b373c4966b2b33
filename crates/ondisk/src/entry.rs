//! Tree entries, nodes and root references.
//!
//! ```text
//! Entry, 16 bytes                      RootRef, 32 bytes
//! +0  40 bits  PBA                     +0   Entry
//! +5   8 bits  state and flags         +16  64 bits  hash of the root node
//! +6  32 bits  birth label             +24   8 bits  height (0: the entry maps one page itself)
//! +10 48 bits  hash of what it names   +25  zeroes
//! ```

use std::rc::Rc;

use base::{BLOCK_SIZE, BirthLabel, Block, Buffer, Pba};

/// Entries in a node.
pub const FANOUT: usize = 256;

/// Address bits that one level resolves.
pub const FANOUT_BITS: u32 = 8;

/// Greatest height: 5 levels map 2^40 blocks, 4 PiB.
pub const HEIGHT_MAX: u8 = 5;

/// Bytes of an entry.
const ENTRY_BYTES: usize = 16;

const _: () = assert!(FANOUT * ENTRY_BYTES == BLOCK_SIZE && FANOUT == 1 << FANOUT_BITS);

const PBA_BITS: u32 = 40;
const STATE_MASK: u8 = 0b0000_0011;
const SHARED: u8 = 0b0000_0100;
/// Reserved for compressed (0x08) and encrypted (0x10) blocks; refused until they exist.
const KNOWN_FLAGS: u8 = STATE_MASK | SHARED;

/// What an entry says of its block or subtree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EntryState {
    /// Never written or discarded: reads as zeroes.
    Unmapped = 0,
    /// Zeroed and to be reported as allocated: reads as zeroes.
    Zero = 1,
    /// Names a block.
    Mapped = 2,
    /// What it named was lost to damage that was found and reported: reads fail until the block is
    /// written again.
    Damaged = 3,
}

/// One entry: 16 bytes that name a child node, a page or a data block, and verify it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry([u8; ENTRY_BYTES]);

impl Entry {
    /// Nothing here.
    pub const UNMAPPED: Self = Self([0; ENTRY_BYTES]);

    /// Zeroes here, reported as allocated.
    pub const ZERO: Self = {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[5] = EntryState::Zero as u8;
        Self(bytes)
    };

    /// What was here is lost.
    pub const DAMAGED: Self = {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[5] = EntryState::Damaged as u8;
        Self(bytes)
    };

    pub(crate) const fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        self.0
    }

    pub(crate) const fn from_bytes(bytes: [u8; ENTRY_BYTES]) -> Self {
        Self(bytes)
    }

    /// The entry that stands for `state` without naming a block.
    #[must_use]
    pub const fn uniform(state: EntryState) -> Self {
        match state {
            EntryState::Zero => Self::ZERO,
            EntryState::Damaged => Self::DAMAGED,
            EntryState::Unmapped | EntryState::Mapped => Self::UNMAPPED,
        }
    }

    /// Names the block at `pba`, whose bytes hash to `hash` (48 bits of it are kept).
    ///
    /// # Panics
    /// If `pba` has more than 40 bits.
    #[must_use]
    pub fn mapped(pba: Pba, hash: u64, birth: BirthLabel) -> Self {
        assert!(pba.get() >> PBA_BITS == 0, "the blockstore never grows beyond 2^40 blocks");
        let [a0, a1, a2, a3, a4, ..] = pba.get().to_le_bytes();
        let [b0, b1, b2, b3] = birth.get().to_le_bytes();
        let [h0, h1, h2, h3, h4, h5, ..] = hash.to_le_bytes();
        let state = EntryState::Mapped as u8;
        Self([a0, a1, a2, a3, a4, state, b0, b1, b2, b3, h0, h1, h2, h3, h4, h5])
    }

    /// The same, born at `birth`.
    #[must_use]
    pub fn with_birth(self, birth: BirthLabel) -> Self {
        let mut bytes = self.0;
        let [b0, b1, b2, b3] = birth.get().to_le_bytes();
        bytes[6] = b0;
        bytes[7] = b1;
        bytes[8] = b2;
        bytes[9] = b3;
        Self(bytes)
    }

    /// Its state.
    #[must_use]
    pub fn state(self) -> EntryState {
        match self.0[5] & STATE_MASK {
            0 => EntryState::Unmapped,
            1 => EntryState::Zero,
            2 => EntryState::Mapped,
            _ => EntryState::Damaged,
        }
    }

    /// Whether all bits have a meaning that this version knows.
    #[must_use]
    pub fn is_valid(self) -> bool {
        self.0[5] & !KNOWN_FLAGS == 0
    }

    /// The block that it names. Meaningful if mapped.
    #[must_use]
    pub fn pba(self) -> Pba {
        let [a0, a1, a2, a3, a4, ..] = self.0;
        Pba::new(u64::from_le_bytes([a0, a1, a2, a3, a4, 0, 0, 0]))
    }

    /// When it was born, within its VDI's lineage.
    #[must_use]
    pub fn birth(self) -> BirthLabel {
        let [.., b0, b1, b2, b3, _, _, _, _, _, _] = self.0;
        BirthLabel::new(u32::from_le_bytes([b0, b1, b2, b3]))
    }

    /// 48 bits of the hash of the block that it names.
    #[must_use]
    pub fn hash48(self) -> u64 {
        let [.., h0, h1, h2, h3, h4, h5] = self.0;
        u64::from_le_bytes([h0, h1, h2, h3, h4, h5, 0, 0])
    }

    /// Whether bytes with this hash are what it names.
    #[must_use]
    pub fn matches(self, hash: u64) -> bool {
        self.hash48() == hash & ((1 << 48) - 1)
    }

    /// Whether it was marked as shared beyond what births tell (dedup; design rule 34).
    #[must_use]
    pub fn is_shared(self) -> bool {
        self.0[5] & SHARED != 0
    }

    /// Whether two entries name the same content: same state, block and hash, births apart.
    /// This is what diff compares (design rule 32).
    #[must_use]
    pub fn same_content(self, other: Self) -> bool {
        self.state() == other.state()
            && self.pba() == other.pba()
            && self.hash48() == other.hash48()
    }
}

impl Default for Entry {
    fn default() -> Self {
        Self::UNMAPPED
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.state() {
            EntryState::Unmapped => f.write_str("unmapped"),
            EntryState::Zero => f.write_str("zero"),
            EntryState::Damaged => f.write_str("damaged"),
            EntryState::Mapped => {
                write!(f, "{} (born {}, {:012x})", self.pba(), self.birth(), self.hash48())
            }
        }
    }
}

/// A tree node: 256 entries, verified, never changed once it was written.
#[derive(Clone, Debug)]
pub struct Node(Rc<Buffer>);

impl Node {
    /// A node from a block that was verified against its parent's hash.
    ///
    /// # Panics
    /// If `buffer` is empty.
    #[must_use]
    pub fn from_verified(buffer: Rc<Buffer>) -> Self {
        assert!(buffer.block_count() >= 1);
        Self(buffer)
    }

    /// A new node with these entries, in a buffer of one block.
    #[must_use]
    pub fn build(entries: &[Entry; FANOUT], mut buffer: Buffer) -> Self {
        let bytes = buffer.bytes_mut();
        for (slot, entry) in bytes.chunks_exact_mut(ENTRY_BYTES).zip(entries) {
            for (to, from) in slot.iter_mut().zip(entry.0) {
                *to = from;
            }
        }
        Self(Rc::new(buffer))
    }

    /// The entry in `slot`.
    ///
    /// # Panics
    /// If `slot` is 256 or more.
    #[must_use]
    pub fn entry(&self, slot: usize) -> Entry {
        assert!(slot < FANOUT);
        self.stored().get(slot).map_or(Entry::UNMAPPED, |bytes| Entry(*bytes))
    }

    /// All entries.
    #[must_use]
    pub fn entries(&self) -> [Entry; FANOUT] {
        std::array::from_fn(|slot| self.entry(slot))
    }

    /// The entries that are not unmapped, with their slots.
    pub fn used_entries(&self) -> impl Iterator<Item = (u64, Entry)> {
        let entries = self.stored().iter().map(|bytes| Entry(*bytes));
        (0..).zip(entries).filter(|(_, entry)| entry.state() != EntryState::Unmapped)
    }

    fn stored(&self) -> &[[u8; ENTRY_BYTES]] {
        self.block().0.as_chunks().0
    }

    /// Its bytes.
    #[must_use]
    pub fn block(&self) -> &Block {
        #[expect(clippy::expect_used, reason = "constructors demand a block")]
        self.0.blocks().first().expect("a node has a block")
    }

    /// The buffer that holds it.
    #[must_use]
    pub fn buffer(&self) -> &Rc<Buffer> {
        &self.0
    }
}

/// Names a tree: its root node and its height.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootRef {
    /// Names the root node; unmapped if the whole tree is.
    pub entry: Entry,
    /// All 64 bits of the root node's hash.
    pub hash: u64,
    /// Levels of nodes: a tree of height h maps 256^h blocks. At least 1.
    pub height: u8,
}

impl RootRef {
    /// Bytes in which it is stored.
    pub const BYTES: usize = 32;

    /// An empty tree.
    #[must_use]
    pub const fn empty(height: u8) -> Self {
        Self { entry: Entry::UNMAPPED, hash: 0, height }
    }

    /// The least height whose tree maps `block_count` blocks.
    #[must_use]
    pub fn height_for(block_count: u64) -> u8 {
        let mut height = 1;
        while height < HEIGHT_MAX && block_count > 1 << (u32::from(height) * FANOUT_BITS) {
            height += 1;
        }
        height
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let parts = self.entry.0.into_iter().chain(self.hash.to_le_bytes()).chain([self.height]);
        for (to, from) in bytes.iter_mut().zip(parts) {
            *to = from;
        }
        bytes
    }

    pub(crate) fn from_bytes(bytes: [u8; Self::BYTES]) -> Result<Self, crate::DecodeError> {
        let mut entry = [0; ENTRY_BYTES];
        for (to, from) in entry.iter_mut().zip(bytes) {
            *to = from;
        }
        let [.., h0, h1, h2, h3, h4, h5, h6, h7, height, _, _, _, _, _, _, _] = bytes;
        let root = Self {
            entry: Entry(entry),
            hash: u64::from_le_bytes([h0, h1, h2, h3, h4, h5, h6, h7]),
            height,
        };
        if !root.entry.is_valid() || height == 0 || height > HEIGHT_MAX {
            return Err(crate::DecodeError::Invalid("root reference"));
        }
        Ok(root)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_their_parts() {
        let pba = Pba::new(0xab_cdef_0123);
        let entry = Entry::mapped(pba, 0xffff_1234_5678_9abc, BirthLabel::new(0xdead_beef));
        assert_eq!(entry.state(), EntryState::Mapped);
        assert_eq!(entry.pba(), pba);
        assert_eq!(entry.birth(), BirthLabel::new(0xdead_beef));
        assert_eq!(entry.hash48(), 0x1234_5678_9abc);
        assert!(entry.matches(0x0000_1234_5678_9abc) && !entry.matches(1));
        assert!(entry.is_valid() && Entry::ZERO.is_valid() && Entry::UNMAPPED.is_valid());
        assert_eq!(Entry::ZERO.state(), EntryState::Zero);
    }

    #[test]
    fn heights_cover_their_sizes() {
        for (blocks, height) in
            [(1, 1), (256, 1), (257, 2), (65_536, 2), (65_537, 3), (1 << 32, 4), (1 << 40, 5)]
        {
            assert_eq!(RootRef::height_for(blocks), height, "{blocks}");
        }
    }

    #[test]
    fn roots_round_trip_and_hostile_ones_are_refused() {
        let root = RootRef {
            entry: Entry::mapped(Pba::new(77), 5, BirthLabel::new(3)),
            hash: 5,
            height: 4,
        };
        assert_eq!(RootRef::from_bytes(root.to_bytes()), Ok(root));
        let mut bytes = root.to_bytes();
        bytes[24] = 9;
        assert!(RootRef::from_bytes(bytes).is_err());
        bytes[24] = 4;
        bytes[5] = 0x83;
        assert!(RootRef::from_bytes(bytes).is_err());
    }
}
