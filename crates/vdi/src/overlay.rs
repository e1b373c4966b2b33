//! What was written since the last checkpoint, by LBA, with versions.
//!
//! A full-block write never waits for a tree read (design rule 60): it goes here, and meets the
//! tree when a checkpoint merges it. A discard is a change of whole aligned subtrees, so that
//! 16 TiB cost as little as 1 MiB. A change has a version for each snapshot interval in which it
//! was made: within one interval the newest replaces the older ones.
//!
//! Invariants:
//! - versions of one subtree are ordered by LSN, and at most one lies between two neighbouring
//!   points (snapshot positions) of the branch, unless each write can be opened (`writes.rs`);
//! - the newest LSN wins wherever changes overlap, whatever completed first (design rule 11).

use std::collections::BTreeMap;

use base::{Lsn, Pba};
use blockstore::tree::{Change, slot, span};
use ondisk::{Entry, EntryState, HEIGHT_MAX};

/// Changes by the tree node that they belong to: (level, number of the node at that level).
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    nodes: BTreeMap<(u8, u64), Changes>,
    level_max: u8,
    node_count: usize,
    /// Versions that only histories will tell of.
    past_versions: usize,
}

/// The changes of one node.
#[derive(Debug, Default)]
struct Changes {
    /// LSN of the newest.
    newest: Lsn,
    /// Whether it is counted for the first of the snapshots, and for what follows the last.
    counted_twice: bool,
    /// The newest version of each slot, in order of slots.
    newest_of_slots: Vec<Version>,
    /// Those that they have replaced and that somebody sees. Many, where each write can be opened and one
    /// block is written again and again.
    older: BTreeMap<(u8, Lsn), Entry>,
}

/// What lies between two changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Separation {
    /// Nothing that anybody sees.
    Nothing,
    /// Snapshots, or writes that can be opened; the first of them may do with a history.
    History,
    /// Snapshots; the first of them needs a tree.
    Tree,
}

/// Versions of a history that take as much memory as a node here, and some of a page there.
const VERSIONS_PER_NODE: usize = 64;

/// Versions of each level that are looked at to find the end of a run; a node of older ones alone
/// counts as one. Who asks goes on where that ended, and pays for another step.
const VERSIONS_SEARCHED_MAX: usize = 1024;

/// One version of one slot of a node.
#[derive(Clone, Copy, Debug)]
struct Version {
    slot: u8,
    lsn: Lsn,
    entry: Entry,
}

/// A change that covers a block.
#[derive(Clone, Copy)]
struct Found {
    level: u8,
    lsn: Lsn,
    entry: Entry,
}

impl Overlay {
    /// Adds a change. `separated(older, newer)` tells what lies between two LSNs.
    /// Returns the block that nothing can reach any more because of it: that of the version that
    /// it replaced, or its own if a newer version was there already.
    pub(crate) fn insert(
        &mut self,
        change: &Change,
        separated: impl Fn(Lsn, Lsn) -> Separation,
    ) -> Option<Pba> {
        let node = change.start / (span(change.level) * 256);
        let slot = u8::try_from(slot(change.start, change.level)).unwrap_or(u8::MAX);
        self.level_max = self.level_max.max(change.level);
        let node_count = &mut self.node_count;
        let changes = self.nodes.entry((change.level, node)).or_insert_with(|| {
            *node_count += 1;
            Changes { newest: change.lsn, ..Changes::default() }
        });
        // A merge writes the node once for each tree that it makes in an interval in which it changed:
        // for the first snapshot, for those that need one, and for the newest state.
        match separated(changes.newest.min(change.lsn), changes.newest.max(change.lsn)) {
            Separation::Nothing => {}
            Separation::History if change.level == 0 && changes.counted_twice => {
                self.past_versions += 1;
            }
            Separation::History | Separation::Tree => {
                *node_count += 1;
                changes.counted_twice = true;
            }
        }
        changes.newest = changes.newest.max(change.lsn);
        changes.insert(Version { slot, lsn: change.lsn, entry: change.entry }, |older, newer| {
            separated(older, newer) != Separation::Nothing
        })
    }

    /// What the newest change of block `index` with an LSN below `before` says.
    pub(crate) fn lookup(&self, index: u64, before: Lsn) -> Option<Entry> {
        self.newest(index, before).map(|found| found.entry)
    }

    /// As [`Self::lookup`], with the end of a run of blocks from `index` on of which it says the same.
    pub(crate) fn run(&self, index: u64, before: Lsn) -> Option<(Entry, u64)> {
        let found = self.newest(index, before)?;
        let end = (index / span(found.level) + 1) * span(found.level);
        // Of what is newer, only subtrees that are smaller can begin within it.
        let newer = self.next_covered(index + 1, found.level, found.lsn, before);
        Some((found.entry, end.min(newer)))
    }

    /// The end of a run of blocks behind `index` of which it says nothing to who sees LSNs below
    /// `before`.
    pub(crate) fn silent_end(&self, index: u64, before: Lsn) -> u64 {
        self.next_covered(index + 1, self.level_max + 1, Lsn::default(), before)
    }

    fn newest(&self, index: u64, before: Lsn) -> Option<Found> {
        let mut newest: Option<Found> = None;
        for level in 0..=self.level_max {
            let found = self.newest_of(level, index, before);
            if let Some(found) = found
                && newest.is_none_or(|other| found.lsn > other.lsn)
            {
                newest = Some(found);
            }
        }
        newest
    }

    fn newest_of(&self, level: u8, index: u64, before: Lsn) -> Option<Found> {
        let changes = self.nodes.get(&(level, index / (span(level) * 256)))?;
        let slot = u8::try_from(slot(index, level)).unwrap_or(u8::MAX);
        let newest = changes.newest_of_slots.get(changes.find(slot).ok()?)?;
        let Version { lsn, entry, .. } = changes.seen(newest, before)?;
        Some(Found { level, lsn, entry })
    }

    /// The first block at or behind `index` that is covered by a change of a level below `level_end`
    /// with an LSN between `after` and `before`; or one in front of it, where the search ended.
    fn next_covered(&self, index: u64, level_end: u8, after: Lsn, before: Lsn) -> u64 {
        let mut next = u64::MAX;
        for level in 0..level_end {
            let width = span(level);
            let mut versions_left = VERSIONS_SEARCHED_MAX;
            let from = (level, index / (width * 256));
            for (&(_, node), changes) in self.nodes.range(from..=(level, u64::MAX)) {
                let start = node * width * 256;
                if start >= next {
                    break;
                }
                if versions_left == 0 {
                    next = start.max(index);
                    break;
                }
                if changes.newest <= after {
                    versions_left -= 1;
                    continue;
                }
                versions_left = versions_left.saturating_sub(changes.newest_of_slots.len());
                let seen = |newest| changes.seen(newest, before).filter(|it| after < it.lsn);
                let mut starts = changes
                    .newest_of_slots
                    .iter()
                    .filter_map(seen)
                    .map(|version| start + u64::from(version.slot) * width);
                // A subtree that began earlier still covers the block if it reaches it.
                if let Some(found) = starts.find(|start| start + width > index) {
                    next = next.min(found.max(index));
                    break;
                }
            }
        }
        next
    }

    /// All versions of at most `node_max` nodes behind `after`, and the last of these nodes.
    pub(crate) fn chunk(
        &self,
        after: Option<(u8, u64)>,
        node_max: usize,
        into: &mut Vec<Change>,
    ) -> Option<(u8, u64)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        let mut last = None;
        for (&(level, node), changes) in self.nodes.range((from, Unbounded)).take(node_max) {
            let width = span(level);
            into.extend(changes.versions().map(|version| Change {
                level,
                start: node * width * 256 + u64::from(version.slot) * width,
                lsn: version.lsn,
                entry: version.entry,
            }));
            last = Some((level, node));
        }
        last
    }

    /// Takes some nodes out, so that a large overlay can be dropped without stopping the thread.
    pub(crate) fn shed(&mut self, node_max: usize) -> bool {
        for _ in 0..node_max {
            if self.nodes.pop_first().is_none() {
                return false;
            }
        }
        true
    }

    /// Number of nodes that a merge writes, at least.
    pub(crate) fn node_count(&self) -> usize {
        self.node_count + self.past_versions / VERSIONS_PER_NODE
    }
}

impl Changes {
    /// Adds a version. `separated(older, newer)` tells whether somebody sees what stands between two LSNs.
    /// Returns the block that nothing can reach any more.
    fn insert(&mut self, version: Version, separated: impl Fn(Lsn, Lsn) -> bool) -> Option<Pba> {
        let Version { slot, lsn, entry } = version;
        let at = match self.find(slot) {
            Ok(at) => at,
            Err(at) => {
                self.newest_of_slots.insert(at, version);
                return None;
            }
        };
        let newest = self.newest_of_slots.get_mut(at)?;
        if newest.lsn < lsn {
            let replaced = std::mem::replace(newest, version);
            if !separated(replaced.lsn, lsn) {
                return mapped(replaced.entry);
            }
            self.older.insert((slot, replaced.lsn), replaced.entry);
            return None;
        }
        if !separated(lsn, newest.lsn) {
            if base::mutant::active("last_completed_wins") {
                return mapped(std::mem::replace(newest, version).entry);
            }
            return mapped(entry);
        }
        // It completed after a newer one, with which it shares no interval.
        let next = self.older.range((slot, lsn)..=(slot, Lsn::new(u64::MAX))).next();
        if next.is_some_and(|(&(_, next), _)| !separated(lsn, next)) {
            return mapped(entry);
        }
        let last = self.older.range((slot, Lsn::default())..(slot, lsn)).next_back();
        let replaced = last.map(|(&key, _)| key).filter(|&(_, last)| !separated(last, lsn));
        let dead = replaced.and_then(|key| self.older.remove(&key));
        self.older.insert((slot, lsn), entry);
        dead.and_then(mapped)
    }

    /// Where a slot stands among those that have versions, or would stand.
    fn find(&self, slot: u8) -> Result<usize, usize> {
        self.newest_of_slots.binary_search_by_key(&slot, |version| version.slot)
    }

    /// The newest version with an LSN below `before` of the slot of which `newest` is the newest.
    fn seen(&self, newest: &Version, before: Lsn) -> Option<Version> {
        if newest.lsn < before {
            return Some(*newest);
        }
        let slot = newest.slot;
        let older = self.older.range((slot, Lsn::default())..(slot, before)).next_back();
        older.map(|(&(slot, lsn), &entry)| Version { slot, lsn, entry })
    }

    /// All of them, ordered by slot, then LSN.
    fn versions(&self) -> impl Iterator<Item = Version> {
        self.newest_of_slots.iter().flat_map(|newest| {
            let slot = newest.slot;
            let older = self.older.range((slot, Lsn::default())..(slot, newest.lsn));
            let older = older.map(|(&(slot, lsn), &entry)| Version { slot, lsn, entry });
            older.chain([*newest])
        })
    }
}

fn mapped(entry: Entry) -> Option<Pba> {
    (entry.state() == EntryState::Mapped).then(|| entry.pba())
}

/// Cuts `start .. end` into the fewest aligned subtrees of at most `level_max`.
pub(crate) fn subtrees(start: u64, end: u64, level_max: u8) -> impl Iterator<Item = (u8, u64)> {
    let level_max = level_max.min(HEIGHT_MAX - 1);
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let mut level = 0;
        while level < level_max && at.is_multiple_of(span(level + 1)) && end - at >= span(level + 1)
        {
            level += 1;
        }
        let piece = (level, at);
        at += span(level);
        Some(piece)
    })
}

/// Sorts changes for a merge and keeps the newest of each subtree; reports the blocks of the
/// others, which nothing can reach any more.
pub(crate) fn newest_only(changes: Vec<Change>, dead: &mut Vec<Pba>) -> Vec<Change> {
    seen_from(changes, Lsn::new(u64::MAX), dead)
}

/// As [`newest_only`], but keeps what a position from `from` on sees.
pub(crate) fn seen_from(mut changes: Vec<Change>, from: Lsn, dead: &mut Vec<Pba>) -> Vec<Change> {
    // Merges are stable and fast on what is sorted already, as most overlays are.
    changes.sort_by_key(|change| (change.order(), change.lsn));
    let mut newest: Vec<Change> = Vec::with_capacity(changes.len());
    for change in changes {
        match newest.last_mut() {
            Some(last) if last.order() == change.order() && change.lsn < from => {
                dead.extend(mapped(std::mem::replace(last, change).entry));
            }
            _ => newest.push(change),
        }
    }
    newest
}

#[cfg(test)]
mod tests {
    use base::BirthLabel;

    use super::*;
    use crate::engine::as_u64;

    fn block(start: u64, lsn: u64, pba: u64) -> Change {
        let entry = Entry::mapped(Pba::new(pba), 0, BirthLabel::new(0));
        Change { level: 0, start, lsn: Lsn::new(lsn), entry }
    }

    fn never(_: Lsn, _: Lsn) -> Separation {
        Separation::Nothing
    }

    fn history(is_between: bool) -> Separation {
        if is_between { Separation::History } else { Separation::Nothing }
    }

    fn at(overlay: &Overlay, index: u64, before: u64) -> Option<u64> {
        let entry = overlay.lookup(index, Lsn::new(before))?;
        Some(if entry.state() == EntryState::Mapped { entry.pba().get() } else { 0 })
    }

    #[test]
    fn versions_are_kept_only_across_snapshots() {
        let mut overlay = Overlay::default();
        assert_eq!(overlay.insert(&block(7, 1, 100), never), None);
        assert_eq!(overlay.insert(&block(7, 2, 101), never), Some(Pba::new(100)));
        let snapshot_at_3 = |older: Lsn, newer: Lsn| history(older.get() < 3 && newer.get() >= 3);
        assert_eq!(overlay.insert(&block(7, 4, 102), snapshot_at_3), None);
        assert_eq!(overlay.insert(&block(7, 5, 103), snapshot_at_3), Some(Pba::new(102)));
        assert_eq!(at(&overlay, 7, 3), Some(101));
        assert_eq!(at(&overlay, 7, u64::MAX), Some(103));
        assert_eq!(at(&overlay, 8, u64::MAX), None);
    }

    #[test]
    fn an_older_write_that_completes_later_loses() {
        let mut overlay = Overlay::default();
        overlay.insert(&block(7, 5, 105), never);
        assert_eq!(overlay.insert(&block(7, 4, 104), never), Some(Pba::new(104)));
        assert_eq!(at(&overlay, 7, u64::MAX), Some(105));
    }

    /// In whatever order versions come, each position sees what it should, and only what no position sees
    /// is dead.
    #[test]
    fn versions_are_those_that_positions_see() {
        let mut random = 1u64;
        let mut below = |bound: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % bound
        };
        for round in 0..500 {
            let lsn_end = 2 + below(30);
            let positions: Vec<u64> = (1..lsn_end).filter(|_| below(3) == 0).collect();
            let mut changes: Vec<(u64, u64)> = (1..lsn_end).map(|lsn| (below(3), lsn)).collect();
            for index in (1..changes.len()).rev() {
                changes.swap(index, usize::try_from(below(as_u64(index) + 1)).unwrap());
            }
            let mut overlay = Overlay::default();
            let mut dead = Vec::new();
            for &(index, lsn) in &changes {
                dead.extend(overlay.insert(&block(index, lsn, 100 + lsn), |older, newer| {
                    let between = |&at: &u64| older.get() < at && at <= newer.get();
                    history(positions.iter().any(between))
                }));
            }
            let seen_at = |index: u64, before: u64| {
                let seen = changes.iter().filter(|&&(at, lsn)| at == index && lsn < before);
                seen.map(|&(_, lsn)| 100 + lsn).max()
            };
            let mut seen: Vec<(u64, u64)> = Vec::new();
            for index in 0..3 {
                for &before in positions.iter().chain([&u64::MAX]) {
                    let expected = seen_at(index, before);
                    assert_eq!(at(&overlay, index, before), expected, "round {round}");
                    seen.extend(expected.map(|pba| (index, pba)));
                }
            }
            seen.dedup();
            let mut versions = Vec::new();
            overlay.chunk(None, 8, &mut versions);
            let told: Vec<(u64, u64)> =
                versions.iter().map(|change| (change.start, change.entry.pba().get())).collect();
            assert_eq!(told, seen, "round {round}");
            assert_eq!(dead.len() + seen.len(), changes.len(), "round {round}");
            assert!(dead.iter().all(|pba| seen.iter().all(|(_, other)| pba.get() != *other)));
        }
    }

    #[test]
    fn a_discarded_subtree_hides_older_blocks_only() {
        let mut overlay = Overlay::default();
        overlay.insert(&block(300, 1, 100), never);
        let discard = Change { level: 1, start: 256, lsn: Lsn::new(2), entry: Entry::UNMAPPED };
        overlay.insert(&discard, never);
        assert_eq!(at(&overlay, 300, u64::MAX), Some(0));
        overlay.insert(&block(301, 3, 101), never);
        assert_eq!(at(&overlay, 301, u64::MAX), Some(101));
        assert_eq!(at(&overlay, 511, u64::MAX), Some(0));
        assert_eq!(at(&overlay, 512, u64::MAX), None);
        let run = |index| overlay.run(index, Lsn::new(u64::MAX)).map(|(_, end)| end);
        assert_eq!((run(256), run(301), run(302)), (Some(301), Some(302), Some(512)));
        let silent_end = |index| overlay.silent_end(index, Lsn::new(u64::MAX));
        assert_eq!((silent_end(0), silent_end(512)), (256, u64::MAX));
    }

    /// Of every block of a run the overlay says the same, whatever lies below, above and beside it, and
    /// to whoever asks.
    #[test]
    fn runs_are_of_one_kind() {
        let mut random = 1u64;
        let mut below = |bound: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % bound
        };
        for round in 0..50 {
            let mut overlay = Overlay::default();
            let lsn_end = 2 + below(40);
            for lsn in 1..lsn_end {
                let level = [0, 0, 0, 1][usize::try_from(below(4)).unwrap()];
                let start = below(1024 / span(level)) * span(level);
                let change = match level {
                    0 => block(start, lsn, 100 + lsn),
                    _ => Change { level, start, lsn: Lsn::new(lsn), entry: Entry::UNMAPPED },
                };
                overlay.insert(&change, |_, newer| history(newer.get().is_multiple_of(3)));
            }
            for before in [lsn_end / 2, u64::MAX] {
                let before = Lsn::new(before);
                for index in 0..1024 {
                    let (entry, end) = match overlay.run(index, before) {
                        Some((entry, end)) => (Some(entry), end),
                        None => (None, overlay.silent_end(index, before)),
                    };
                    assert!(end > index, "round {round}: {index} .. {end}");
                    for other in index..end.min(1024) {
                        let said = overlay.lookup(other, before);
                        assert_eq!(said, entry, "round {round}: {other} of {index} .. {end}");
                    }
                }
            }
        }
    }

    /// What a discard made stale does not cut it.
    #[test]
    fn a_discarded_subtree_is_few_runs() {
        let mut overlay = Overlay::default();
        for index in 0..65_536 {
            overlay.insert(&block(index, 1 + index, 1000 + index), never);
        }
        let discard = Change { level: 2, start: 0, lsn: Lsn::new(1 << 20), entry: Entry::UNMAPPED };
        overlay.insert(&discard, never);
        let (mut at, mut count) = (0, 0);
        while at < 65_536 {
            (_, at) = overlay.run(at, Lsn::new(u64::MAX)).unwrap();
            count += 1;
        }
        assert_eq!((at, count), (65_536, 1));
    }

    #[test]
    fn ranges_become_few_subtrees() {
        let pieces: Vec<_> = subtrees(255, 65_536 + 256, 2).collect();
        assert_eq!(pieces.first(), Some(&(0, 255)));
        assert_eq!(pieces.len(), 1 + 255 + 1);
        let total: u64 = pieces.iter().map(|&(level, _)| span(level)).sum();
        assert_eq!(total, 65_536 + 256 - 255);
        assert_eq!(subtrees(0, 1 << 40, 4).count(), 256, "a whole disk is one node of changes");
    }
}
