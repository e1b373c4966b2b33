//! The radix tree: fixed height, copy-on-write, 256 entries of 16 bytes per node. VDIs are trees of
//! data blocks; tables are trees of pages. Node level 0 is a leaf: its entries name blocks; an
//! entry of a node at level l covers 256^l blocks.
//!
//! ```text
//!                    root, level 2          one entry covers 65,536 blocks
//!                   /      |      \
//!            level 1    unmapped   zero     an entry that is not mapped stands for all below it
//!           /   |   \
//!     leaf    leaf    leaf                  one entry covers one block
//! ```
//!
//! [`update`] merges a sorted list of changes and returns a new root: it never changes a node, it
//! writes new ones, bottom-up. What it replaces is private to this tree if it was born after the
//! tree's `shared_up_to`; then it is reported as replaced, else it is left to garbage collection.

mod update;

use ondisk::{Entry, EntryState, FANOUT, FANOUT_BITS, Node, RootRef};

pub use update::{Births, Change, OnDamage, Outcome, TreeWriter, update};

use crate::{Error, NodeStore};

/// Blocks that one entry of a node at `level` covers.
#[must_use]
pub const fn span(level: u8) -> u64 {
    1 << (level as u32 * FANOUT_BITS)
}

/// Slot of block `index` in a node at `level`.
#[must_use]
pub const fn slot(index: u64, level: u8) -> usize {
    // At most 255.
    ((index >> (level as u32 * FANOUT_BITS)) & 0xff) as u8 as usize
}

/// Blocks that a tree of this root's height covers.
#[must_use]
pub fn coverage(root: &RootRef) -> u64 {
    span(root.height)
}

/// What a tree says of the surroundings of a block.
#[derive(Clone, Debug)]
pub enum Leaf {
    /// The leaf node that covers the block.
    Node(Node),
    /// Nothing is mapped from the block on, up to the end of the aligned range of so many blocks
    /// that it lies in.
    Uniform(EntryState, u64),
}

impl Leaf {
    /// The entry of block `index`, which the leaf covers.
    #[must_use]
    pub fn entry(&self, index: u64) -> Entry {
        match self {
            Self::Node(node) => node.entry(slot(index, 0)),
            Self::Uniform(state, _) => Entry::uniform(*state),
        }
    }

    /// First block behind what the leaf covers around `index`.
    #[must_use]
    pub fn end(&self, index: u64) -> u64 {
        let length = match self {
            Self::Node(_) => FANOUT as u64,
            Self::Uniform(_, length) => *length,
        };
        (index / length + 1) * length
    }
}

/// The range that what a tree does not cover lies in: it has no end.
const UNCOVERED: u64 = 1 << 63;

/// A step of a descent.
enum Step {
    /// Load this node, which is at this level.
    Load(Entry, u8),
    Done(Leaf),
}

fn first_step(root: &RootRef, index: u64) -> Step {
    if index >= coverage(root) {
        return Step::Done(Leaf::Uniform(EntryState::Unmapped, UNCOVERED));
    }
    step(root.entry, root.height)
}

/// What to do with an entry that covers `span(level)` blocks, at least a leaf's.
fn step(entry: Entry, level: u8) -> Step {
    match entry.state() {
        EntryState::Mapped => Step::Load(entry, level - 1),
        state => Step::Done(Leaf::Uniform(state, span(level))),
    }
}

/// The leaf for block `index`, if all nodes on the way are in memory.
#[must_use]
pub fn leaf_cached(nodes: &NodeStore, root: &RootRef, index: u64) -> Option<Leaf> {
    let mut next = first_step(root, index);
    loop {
        match next {
            Step::Done(leaf) => return Some(leaf),
            Step::Load(entry, level) => {
                let node = nodes.cached(entry)?;
                if level == 0 {
                    return Some(Leaf::Node(node));
                }
                next = step(node.entry(slot(index, level)), level);
            }
        }
    }
}

/// The leaf for block `index`.
///
/// # Errors
/// If a node on the way is damaged or cannot be read.
pub async fn leaf(nodes: &NodeStore, root: &RootRef, index: u64) -> Result<Leaf, Error> {
    let mut next = first_step(root, index);
    loop {
        match next {
            Step::Done(leaf) => return Ok(leaf),
            Step::Load(entry, level) => {
                let node = nodes.load(entry).await?;
                if level == 0 {
                    return Ok(Leaf::Node(node));
                }
                next = step(node.entry(slot(index, level)), level);
            }
        }
    }
}

/// The entry of block `index`.
///
/// # Errors
/// As [`leaf`].
pub async fn lookup(nodes: &NodeStore, root: &RootRef, index: u64) -> Result<Entry, Error> {
    Ok(leaf(nodes, root, index).await?.entry(index))
}

/// The entry that names the node on `level` that covers block `index`; one that names none if there is
/// no such node.
///
/// # Errors
/// As [`leaf`], of the nodes above it.
pub async fn node(
    nodes: &NodeStore,
    root: &RootRef,
    level: u8,
    index: u64,
) -> Result<Entry, Error> {
    let mut at = root.height.saturating_sub(1);
    if index >= coverage(root) || at < level {
        return Ok(Entry::UNMAPPED);
    }
    let mut entry = root.entry;
    while at > level && entry.state() == EntryState::Mapped {
        entry = nodes.load(entry).await?.entry(slot(index, at));
        at -= 1;
    }
    Ok(entry)
}
