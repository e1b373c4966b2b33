//! Merging changes into a tree.

use std::collections::VecDeque;

use base::{BirthLabel, Lsn, Pba};
use ondisk::{Entry, EntryState, FANOUT, Node, RootRef};

use super::{slot, span};
use crate::scheduler::Batch;
use crate::{Error, NodeStore};

/// A change of one block, or of a whole aligned subtree (`level` above 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// 0 for a block; else the subtree covers `span(level)` blocks.
    pub level: u8,
    /// First block.
    pub start: u64,
    /// When it was made; the newest wins where changes overlap.
    pub lsn: Lsn,
    /// What is there now; a subtree can only become unmapped or zero. The birth label is stamped
    /// by the update.
    pub entry: Entry,
}

impl Change {
    /// The order that [`update`] wants: by first block, larger subtrees first.
    #[must_use]
    pub fn order(&self) -> (u64, std::cmp::Reverse<u8>) {
        (self.start, std::cmp::Reverse(self.level))
    }
}

/// Ages of what an update meets and makes.
#[derive(Clone, Copy, Debug)]
pub struct Births {
    /// Label of new entries.
    pub label: BirthLabel,
    /// What was born up to here may be shared, and is not reported as replaced.
    pub shared_up_to: BirthLabel,
    /// Changes with lower LSNs are shared already: others name their blocks as well.
    pub shared_before: Lsn,
}

/// What an update did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Blocks that the new tree names and the old one did not: new nodes and changed data.
    pub added: Vec<Pba>,
    /// Private blocks that the old tree named and the new one does not.
    pub replaced: Vec<Pba>,
    /// Blocks of changes that a newer subtree change overruled: they never were in a tree.
    pub overruled: Vec<Pba>,
    /// How often something that may be shared was left to garbage collection, alone or with a
    /// subtree below it.
    pub left: u64,
    /// Nodes written.
    pub nodes_written: u64,
}

/// What an update does where a node of the old tree is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDamage {
    /// It fails: what stood there is known from elsewhere, or must not be given up silently.
    Fail,
    /// It gives up what stood there: what the changes do not write is marked as damaged, so that
    /// the rest of the tree, and every other tree, goes on.
    Mark,
    /// It forgets what stood there, as if nothing had.
    Forget,
}

/// Where updates put what they build.
pub struct TreeWriter<'a> {
    /// Loads old nodes, writes new ones.
    pub nodes: &'a NodeStore,
    /// New blocks are written as part of it.
    pub batch: &'a Batch,
    /// Gives a free metadata block.
    pub allocate: &'a mut dyn FnMut() -> Result<Pba, Error>,
    /// What to do where the old tree is damaged.
    pub on_damage: OnDamage,
    /// What has been done.
    pub outcome: Outcome,
}

/// Most nodes that one update reads to free what a dropped subtree held. Beyond it, blocks are
/// left to garbage collection, so that discarding 16 TiB does not stop the checkpoint (rule 29).
const DROPPED_NODES_MAX: u32 = 1024;

/// Nodes built between two breaths of the thread.
const NODES_PER_TURN: u64 = 32;

/// New nodes whose writes may be under way at once: 16 MiB.
const NODES_IN_FLIGHT_MAX: usize = 4096;

/// Merges `changes`, in [`Change::order`] and at most one per subtree, into the tree of `root`.
/// `root.height` may be less than `height`: the tree grows.
///
/// # Errors
/// `NoSpace` if there is no block for a node; device errors of nodes that must be read; `Damaged`
/// as the writer says. Nothing that the old root names was changed; what was allocated is in the
/// writer's outcome.
pub async fn update(
    writer: &mut TreeWriter<'_>,
    births: Births,
    root: RootRef,
    height: u8,
    changes: &[Change],
) -> Result<RootRef, Error> {
    assert!(changes.is_sorted_by_key(Change::order), "changes come in order");
    let nodes = writer.nodes;
    let mut updater = Updater { writer, births, dropped_nodes_left: DROPPED_NODES_MAX };
    let mut root = root;
    while root.height < height {
        root = updater.grow(root)?;
    }
    if changes.is_empty() {
        return Ok(root);
    }
    let top = root.height - 1;
    let old = match root.entry.state() {
        EntryState::Mapped => updater.usable(root.entry, nodes.load(root.entry).await)?,
        _ => (root.entry, None),
    };
    let (entry, hash) = updater.update_node(top, 0, old, changes, Lsn::default()).await?;
    let hash = if entry == root.entry { root.hash } else { hash };
    Ok(RootRef { entry, hash, height: root.height })
}

struct Updater<'a, 'w> {
    writer: &'a mut TreeWriter<'w>,
    births: Births,
    dropped_nodes_left: u32,
}

impl Updater<'_, '_> {
    /// The entry and node to start from, or what is left of a damaged one.
    fn usable(
        &self,
        entry: Entry,
        loaded: Result<Node, Error>,
    ) -> Result<(Entry, Option<Node>), Error> {
        match (loaded, self.writer.on_damage) {
            (Ok(node), _) => Ok((entry, Some(node))),
            (Err(Error::Damaged { .. }), OnDamage::Mark) => Ok((Entry::DAMAGED, None)),
            (Err(Error::Damaged { .. }), OnDamage::Forget) => Ok((Entry::UNMAPPED, None)),
            (Err(error), _) => Err(error),
        }
    }

    /// A tree one level higher with the same contents.
    fn grow(&mut self, root: RootRef) -> Result<RootRef, Error> {
        let height = root.height + 1;
        if root.entry.state() == EntryState::Unmapped {
            return Ok(RootRef::empty(height));
        }
        let mut entries = [Entry::UNMAPPED; FANOUT];
        if let Some(first) = entries.first_mut() {
            *first = root.entry;
        }
        let (entry, hash) = self.build(&entries)?;
        Ok(RootRef { entry, hash, height })
    }

    /// Merges the changes of one node's range; `old` is its entry and, if mapped, the node itself.
    /// Changes older than `floor` were overruled by a subtree change above. Returns the new entry
    /// and, if it is a new node, that node's hash.
    fn update_node<'b>(
        &'b mut self,
        level: u8,
        start: u64,
        old: (Entry, Option<Node>),
        changes: &'b [Change],
        floor: Lsn,
    ) -> BorrowedFuture<'b, (Entry, u64)> {
        Box::pin(async move {
            let (old_entry, old_node) = old;
            let before = match &old_node {
                Some(node) => node.entries(),
                None => [old_entry; FANOUT],
            };
            let mut entries = before;
            if level == 0 {
                self.merge_blocks(&mut entries, changes, floor);
            } else {
                self.merge_subtrees(level, start, &mut entries, changes, floor).await?;
            }
            if entries == before {
                return Ok((old_entry, 0));
            }
            if old_node.is_some() {
                self.replace(old_entry);
            }
            for uniform in [Entry::UNMAPPED, Entry::ZERO, Entry::DAMAGED] {
                if entries.iter().all(|&entry| entry == uniform) {
                    return Ok((uniform, 0));
                }
            }
            self.writer.batch.below(NODES_IN_FLIGHT_MAX).await;
            let built = self.build(&entries)?;
            if self.writer.outcome.nodes_written.is_multiple_of(NODES_PER_TURN) {
                self.writer.nodes.runtime().yield_now().await;
            }
            Ok(built)
        })
    }

    fn merge_blocks(&mut self, entries: &mut [Entry; FANOUT], changes: &[Change], floor: Lsn) {
        for change in changes {
            assert!(change.level == 0);
            if change.lsn < floor {
                self.overrule(change);
                continue;
            }
            let Some(entry) = entries.get_mut(slot(change.start, 0)) else { continue };
            let new = self.births.stamp(change);
            let old = std::mem::replace(entry, new);
            if old != new {
                self.replace(old);
                if new.state() == EntryState::Mapped {
                    self.writer.outcome.added.push(new.pba());
                }
            }
        }
    }

    async fn merge_subtrees(
        &mut self,
        level: u8,
        start: u64,
        entries: &mut [Entry; FANOUT],
        changes: &[Change],
        floor: Lsn,
    ) -> Result<(), Error> {
        // Per slot: a change of the whole slot, if there is one, and the changes within it.
        let mut slots: Vec<(usize, &[Change], Lsn)> = Vec::new();
        for group in changes.chunk_by(|a, b| slot(a.start, level) == slot(b.start, level)) {
            let Some(first) = group.first() else { continue };
            let index = slot(first.start, level);
            let (own, within) = match group.split_first() {
                Some((first, rest)) if first.level == level => (Some(first), rest),
                _ => (None, group),
            };
            let mut slot_floor = floor;
            if let (Some(own), Some(entry)) = (own, entries.get_mut(index))
                && own.lsn >= floor
            {
                slot_floor = own.lsn;
                let dropped = std::mem::replace(entry, own.entry);
                self.drop_subtree(dropped, level).await?;
            }
            if !within.is_empty() {
                slots.push((index, within, slot_floor));
            }
        }
        // All children that must be read, at once.
        let mapped: Vec<Entry> = slots
            .iter()
            .filter_map(|&(index, ..)| entries.get(index).copied())
            .filter(|entry| entry.state() == EntryState::Mapped)
            .collect();
        let mut loaded: VecDeque<_> = self.writer.nodes.load_all(mapped).await.into();
        for (index, within, slot_floor) in slots {
            let Some(entry) = entries.get_mut(index) else { continue };
            let old = match entry.state() {
                EntryState::Mapped => match loaded.pop_front() {
                    Some(loaded) => self.usable(*entry, loaded)?,
                    None => (*entry, None),
                },
                _ => (*entry, None),
            };
            let child_start = start + u64::try_from(index).unwrap_or(0) * span(level);
            let (new, _) =
                self.update_node(level - 1, child_start, old, within, slot_floor).await?;
            *entry = new;
        }
        Ok(())
    }

    fn build(&mut self, entries: &[Entry; FANOUT]) -> Result<(Entry, u64), Error> {
        let pba = (self.writer.allocate)()?;
        self.writer.outcome.added.push(pba);
        self.writer.outcome.nodes_written += 1;
        let buffer = self.writer.nodes.runtime().buffers().take_to_keep(1);
        let node = Node::build(entries, buffer);
        let hash =
            self.writer.nodes.write(self.writer.batch, pba, std::rc::Rc::clone(node.buffer()));
        Ok((Entry::mapped(pba, hash, self.births.label), hash))
    }

    fn overrule(&mut self, change: &Change) {
        if change.entry.state() == EntryState::Mapped {
            self.writer.outcome.overruled.push(change.entry.pba());
        }
    }

    fn replace(&mut self, old: Entry) {
        if old.state() != EntryState::Mapped {
            return;
        }
        if self.births.is_private(old) {
            self.writer.outcome.replaced.push(old.pba());
        } else {
            self.writer.outcome.left += 1;
        }
    }

    /// Reports the private blocks below an entry of a node at `level` as replaced.
    fn drop_subtree(&mut self, entry: Entry, level: u8) -> BorrowedFuture<'_, ()> {
        Box::pin(async move {
            // Children are never younger than the node that names them: a shared node has
            // nothing private below it.
            if entry.state() != EntryState::Mapped || !self.births.is_private(entry) {
                self.replace(entry);
                return Ok(());
            }
            if level > 0 {
                if self.dropped_nodes_left == 0 {
                    self.writer.outcome.left += 1;
                    return Ok(());
                }
                self.dropped_nodes_left -= 1;
                let loaded = self.writer.nodes.load(entry).await;
                let (_, Some(node)) = self.usable(entry, loaded)? else { return Ok(()) };
                for child in node.entries() {
                    self.drop_subtree(child, level - 1).await?;
                }
            }
            self.replace(entry);
            Ok(())
        })
    }
}

/// Recursion through `async` needs a box.
type BorrowedFuture<'a, T> = std::pin::Pin<Box<dyn Future<Output = Result<T, Error>> + 'a>>;

impl Births {
    fn is_private(&self, entry: Entry) -> bool {
        entry.birth() > self.shared_up_to && !entry.is_shared()
    }

    fn stamp(&self, change: &Change) -> Entry {
        let is_shared = change.lsn < self.shared_before
            && !base::mutant::active("history_is_taken_for_private");
        let label = if is_shared { self.shared_up_to } else { self.label };
        match change.entry.state() {
            EntryState::Mapped => change.entry.with_birth(label),
            _ => change.entry,
        }
    }
}
