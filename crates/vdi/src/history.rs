//! Snapshots without a tree of their own.
//!
//! A tree for each of a thousand snapshots that were taken between two checkpoints would cost each of
//! them a path of nodes for every leaf that changed. So the checkpoint makes a tree of the first one, a
//! *keyframe* (or, for many, takes the tree that the last checkpoint made of the head), and of what changed from there to the last one a *history*: 32 bytes for each version of
//! a block that one of them sees, by block and then by LSN. All that makes a snapshot one of them is its
//! position:
//!
//! ```text
//!            keyframe     17       18        19          head
//!   tree ───── tree ───────┼────────┼─────────┼────────── tree
//!                └ history: 5@101   5@107    9@110
//!
//!   block 5 at snapshot 18: the newest of its versions below position 18, 5@101;
//!   block 7 at snapshot 18: none, so what the keyframe's tree says.
//! ```
//!
//! - A read finds a version by halving: as many pages as a tree is high, twice, whatever the number of
//!   snapshots.
//! - They may be deleted in any order, and the keyframe too: each record names the tree and the history,
//!   which stay as long as one of them does. Garbage collection keeps a version only as long as a
//!   snapshot sees it (design rule 37). Blocks of the tree are not judged one by one: what a deleted
//!   keyframe alone sees, [`ondisk::HISTORY_VERSIONS_MAX`] blocks at most, stays until the last of them goes.
//! - What is continued (a clone, a rollback) or compared gets a tree by the next checkpoint.
//! - The blocks of versions are in no tree, or in the head's too: they carry labels that count as
//!   shared, so that none but garbage collection frees them (design rules 21, 34).

use std::ops::Range;

use base::{Buffer, Lsn};
use blockstore::tree::Change;
use blockstore::{NodeStore, table};
use ondisk::{
    Entry, EntryState, History, Node, RootRef, SnapshotRecord, TableRecord, VersionRecord,
};
use runtime::Runtime;

use crate::Error;
use crate::damage::is_damage;
use crate::overlay::subtrees;

/// Versions on a page.
const PER_PAGE: u64 = VersionRecord::PER_PAGE;

/// What a snapshot without a tree of its own is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Past {
    /// The tree of the keyframe.
    pub(crate) root: RootRef,
    pub(crate) history: History,
}

/// Looks into a history.
pub(crate) struct Versions<'a> {
    nodes: &'a NodeStore,
    history: History,
    count: u64,
    /// The page that was looked at last, and its number.
    page: Option<(u64, Node)>,
}

impl<'a> Versions<'a> {
    pub(crate) fn new(nodes: &'a NodeStore, history: History) -> Self {
        Self { nodes, history, count: history.count.into(), page: None }
    }

    /// Whether it looks into this one.
    pub(crate) fn of(&self, history: &History) -> bool {
        self.history == *history
    }

    /// The blocks of a range that have versions with LSNs below `before`, in order, each with the newest
    /// of these.
    ///
    /// # Errors
    /// If a page is damaged or cannot be read.
    pub(crate) async fn seen(
        &mut self,
        blocks: Range<u64>,
        before: Lsn,
    ) -> Result<Vec<(u64, Entry)>, Error> {
        let mut seen = Vec::new();
        let mut index = self.search((blocks.start, Lsn::default())).await?;
        while index < self.count {
            let first = self.at(index).await?;
            if first.block >= blocks.end {
                break;
            }
            // One too many is the first that the snapshot does not see.
            let before = match base::mutant::active("history_replays_one_too_many") {
                true => before.plus(2),
                false => before,
            };
            let end = self.search((first.block, before)).await?;
            if end > index {
                let newest = self.at(end - 1).await?;
                seen.push((newest.block, newest.entry));
            }
            index = self.search((first.block + 1, Lsn::default())).await?;
        }
        Ok(seen)
    }

    /// The first block at or behind `block` that has a version; `u64::MAX` if none has.
    ///
    /// # Errors
    /// As [`Self::seen`].
    pub(crate) async fn next_block(&mut self, block: u64) -> Result<u64, Error> {
        let index = self.search((block, Lsn::default())).await?;
        match index < self.count {
            true => Ok(self.at(index).await?.block),
            false => Ok(u64::MAX),
        }
    }

    /// How many versions come before `key`, a block and an LSN. Pages are halved; a damaged one is left
    /// out, unless the answer may lie in it.
    async fn search(&mut self, key: (u64, Lsn)) -> Result<u64, Error> {
        // Most searches end where the one before did.
        if let Some(number) = self.page.as_ref().map(|(number, _)| *number)
            && let Side::Here(index) = self.side(number, key).await?
        {
            return Ok(index);
        }
        // All versions before page `low` come before the key, none from page `high` on.
        let (mut low, mut high) = (0, self.count.div_ceil(PER_PAGE));
        while low < high {
            let middle = low + (high - low) / 2;
            let mut page = middle;
            let mut side = self.intact_side(page, key).await?;
            while side.is_none() && page + 1 < high {
                page += 1;
                side = self.intact_side(page, key).await?;
            }
            if side.is_none() {
                page = middle;
                while side.is_none() && page > low {
                    page -= 1;
                    side = self.intact_side(page, key).await?;
                }
                if matches!(side, None | Some(Side::Behind)) {
                    return Err(damaged(&self.history));
                }
            }
            match side {
                Some(Side::Here(index)) => return Ok(index),
                Some(Side::Behind) => low = page + 1,
                Some(Side::Before) | None => high = page,
            }
        }
        Ok((low * PER_PAGE).min(self.count))
    }

    /// As [`Self::side`]; `None` if the page is damaged.
    async fn intact_side(&mut self, number: u64, key: (u64, Lsn)) -> Result<Option<Side>, Error> {
        match self.side(number, key).await {
            Ok(side) => Ok(Some(side)),
            Err(error) if is_damage(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Where the first version that does not come before `key` stands, beside a page.
    async fn side(&mut self, number: u64, key: (u64, Lsn)) -> Result<Side, Error> {
        let (first, end) = (number * PER_PAGE, ((number + 1) * PER_PAGE).min(self.count));
        if key <= key_of(&self.at(first).await?) {
            return Ok(Side::Before);
        }
        if key_of(&self.at(end - 1).await?) < key {
            return Ok(Side::Behind);
        }
        let (mut low, mut high) = (first + 1, end - 1);
        while low < high {
            let middle = low + (high - low) / 2;
            match key_of(&self.at(middle).await?) < key {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        Ok(Side::Here(low))
    }

    async fn at(&mut self, index: u64) -> Result<VersionRecord, Error> {
        let number = index / PER_PAGE;
        let page = match &self.page {
            Some((held, page)) if *held == number => page,
            _ => {
                let page = table::page(self.nodes, &self.history.versions, number).await?;
                let page = page.ok_or_else(|| damaged(&self.history))?;
                &self.page.insert((number, page)).1
            }
        };
        match VersionRecord::get(page.block(), index) {
            Ok(Some(version)) => Ok(version),
            Ok(None) | Err(_) => Err(damaged(&self.history)),
        }
    }
}

/// Where something stands, beside a page.
enum Side {
    /// In front of its second version.
    Before,
    /// In it: at this index.
    Here(u64),
    Behind,
}

fn key_of(version: &VersionRecord) -> (u64, Lsn) {
    (version.block, version.lsn)
}

fn damaged(history: &History) -> Error {
    blockstore::Error::Damaged { what: "history of snapshots", at: history.at() }.into()
}

/// What has to be changed in the tree of the keyframe to have that of position `before`, in
/// order. Where a page is damaged, all that it may tell of is lost, up to block `end`.
///
/// # Errors
/// If a page cannot be read for another reason.
pub(crate) async fn changes(
    nodes: &NodeStore,
    history: History,
    before: Lsn,
    end: u64,
) -> Result<Vec<Change>, Error> {
    let mut changes: Vec<Change> = Vec::new();
    let mut lost: Vec<Range<u64>> = Vec::new();
    let (mut last, mut is_damaged) = ((0, Lsn::default()), false);
    for number in 0..u64::from(history.count).div_ceil(PER_PAGE) {
        let versions = match page_of(nodes, &history, number, last).await {
            Err(error) if is_damage(&error) => {
                is_damaged = true;
                continue;
            }
            versions => versions?,
        };
        for version in versions {
            if std::mem::take(&mut is_damaged) {
                lost.push(last.0..(version.block + 1).min(end));
            }
            last = key_of(&version);
            if version.lsn >= before {
                continue;
            }
            let VersionRecord { block: start, lsn, entry } = version;
            let change = Change { level: 0, start, lsn, entry };
            match changes.last_mut() {
                Some(last) if last.start == start => *last = change,
                _ => changes.push(change),
            }
        }
    }
    if is_damaged {
        lost.push(last.0..end);
    }
    if lost.is_empty() {
        return Ok(changes);
    }
    changes.retain(|change| !lost.iter().any(|range| range.contains(&change.start)));
    let level_max = RootRef::height_for(end) - 1;
    let within = |range: &Range<u64>| subtrees(range.start, range.end, level_max);
    let damaged = |(level, start)| Change { level, start, lsn: before, entry: Entry::DAMAGED };
    changes.extend(lost.iter().flat_map(within).map(damaged));
    changes.sort_unstable_by_key(Change::order);
    changes.dedup_by_key(|change| change.order());
    Ok(changes)
}

/// The versions of a page, which come behind `last` and in order, or it is damaged.
async fn page_of(
    nodes: &NodeStore,
    history: &History,
    number: u64,
    last: (u64, Lsn),
) -> Result<Vec<VersionRecord>, Error> {
    let page = table::page(nodes, &history.versions, number).await?;
    let page = page.ok_or_else(|| damaged(history))?;
    let end = ((number + 1) * PER_PAGE).min(history.count.into());
    let versions = (number * PER_PAGE..end).map(|index| {
        let version = VersionRecord::get(page.block(), index);
        version.ok().flatten().ok_or_else(|| damaged(history))
    });
    let versions: Vec<VersionRecord> = versions.collect::<Result<_, _>>()?;
    let keys = || versions.iter().map(key_of);
    match keys().next().is_some_and(|first| first > last) && keys().is_sorted() {
        true => Ok(versions),
        false => Err(damaged(history)),
    }
}

/// The positions that are seen of a snapshot: its own, and those of writes that it keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) from: Lsn,
    pub(crate) position: Lsn,
}

impl Seen {
    pub(crate) fn of(snapshot: &SnapshotRecord) -> Self {
        let position = snapshot.position;
        Self { from: snapshot.writes_from.unwrap_or(position), position }
    }

    fn keeps_writes(&self) -> bool {
        self.from < self.position && !base::mutant::active("gc_frees_kept_writes")
    }
}

/// Which of some versions, in order, name a block that some snapshots, in order, see: those that are the
/// newest of their block below a position of one of them.
pub(crate) fn seen_by<'a>(
    versions: &'a [VersionRecord],
    snapshots: &[Seen],
) -> impl Iterator<Item = &'a VersionRecord> + use<'a> {
    let positions: Vec<Lsn> = snapshots.iter().map(|seen| seen.position).collect();
    // Where one ends the next begins, or later: of those behind a version the first sees it, or none.
    let keepers: Vec<Seen> = snapshots.iter().filter(|it| it.keeps_writes()).copied().collect();
    let newer = versions.iter().skip(1).map(Some).chain([None]);
    versions.iter().zip(newer).filter_map(move |(version, newer)| {
        let replaced = newer.filter(|newer| newer.block == version.block).map(|newer| newer.lsn);
        let next = positions.partition_point(|&position| position <= version.lsn);
        let next = next + usize::from(base::mutant::active("gc_thins_history_too_far"));
        let first_of = |position: Lsn| replaced.is_none_or(|replaced| position <= replaced);
        let is_seen = positions.get(next).copied().is_some_and(first_of);
        let keeper = keepers.partition_point(|seen| seen.position <= version.lsn);
        let is_kept = keepers.get(keeper).is_some_and(|seen| first_of(seen.from));
        ((is_seen || is_kept) && version.entry.state() == EntryState::Mapped).then_some(version)
    })
}

/// All versions of a history, in order.
///
/// # Errors
/// If a page is damaged or cannot be read.
pub(crate) async fn all(nodes: &NodeStore, history: &History) -> Result<Vec<VersionRecord>, Error> {
    let mut versions = Vec::new();
    for number in 0..u64::from(history.count).div_ceil(PER_PAGE) {
        let last = versions.last().map_or((0, Lsn::default()), key_of);
        versions.extend(page_of(nodes, history, number, last).await?);
    }
    Ok(versions)
}

/// The pages of a history of these versions, in order.
pub(crate) fn pages(runtime: &Runtime, versions: &[Change]) -> Vec<(u64, Buffer)> {
    let per_page = usize::try_from(PER_PAGE).unwrap_or(1);
    let chunks = (0u64..).zip(versions.chunks(per_page));
    let page = |(number, chunk): (u64, &[Change])| {
        let mut buffer = runtime.buffers().take_to_keep(1);
        buffer.bytes_mut().fill(0);
        if let Some(block) = buffer.blocks_mut().first_mut() {
            for (index, change) in (0u64..).zip(chunk) {
                let Change { start: block_number, lsn, entry, .. } = *change;
                let version = VersionRecord { block: block_number, lsn, entry };
                VersionRecord::set(block, index, Some(&version));
            }
        }
        (number, buffer)
    };
    chunks.map(page).collect()
}

#[cfg(test)]
mod tests {
    use base::{BirthLabel, Pba};

    use super::*;

    fn version(block: u64, lsn: u64) -> VersionRecord {
        let entry = Entry::mapped(Pba::new(100 + lsn), 0, BirthLabel::new(1));
        VersionRecord { block, lsn: Lsn::new(lsn), entry }
    }

    #[test]
    fn a_version_is_seen_from_its_record_to_the_next() {
        let versions = [version(5, 10), version(5, 20), version(7, 15)];
        let seen = |positions: &[u64]| -> Vec<u64> {
            let at =
                |&position: &u64| Seen { from: Lsn::new(position), position: Lsn::new(position) };
            let snapshots: Vec<Seen> = positions.iter().map(at).collect();
            seen_by(&versions, &snapshots).map(|version| version.lsn.get()).collect()
        };
        assert_eq!(seen(&[]), [0u64; 0]);
        assert_eq!(seen(&[10]), [0u64; 0], "what has a lower LSN is in, and nothing else");
        assert_eq!(seen(&[11]), [10]);
        assert_eq!(seen(&[20]), [10, 15]);
        assert_eq!(seen(&[21]), [20, 15]);
        assert_eq!(seen(&[11, 30]), [10, 20, 15]);
    }

    /// Each position of a history that keeps writes sees what it should, and nothing else stays: compared
    /// with looking at each.
    #[test]
    fn kept_writes_are_seen_at_each_position() {
        let versions: Vec<VersionRecord> = (1..=9)
            .map(|lsn| version(5, lsn * 10))
            .chain([version(7, 15), version(7, 55)])
            .collect();
        for (from, to) in (1..100).flat_map(|from| (from..100).map(move |to| (from, to))) {
            for other in [1, from, 95, 99] {
                let mut snapshots = vec![Seen { from: Lsn::new(from), position: Lsn::new(to) }];
                let other = Lsn::new(other);
                snapshots.push(Seen { from: other, position: other });
                snapshots.sort_by_key(|seen| seen.position);
                let seen: Vec<VersionRecord> = seen_by(&versions, &snapshots).copied().collect();
                let is_seen = |index: usize, at: u64| {
                    let newer = versions.get(index + 1);
                    let newer = newer.filter(|it| it.block == versions[index].block);
                    versions[index].lsn.get() < at
                        && newer.is_none_or(|newer| at <= newer.lsn.get())
                };
                let expected = (0..versions.len())
                    .filter(|&index| (from..=to).chain([other.get()]).any(|at| is_seen(index, at)));
                let expected: Vec<VersionRecord> = expected.map(|it| versions[it]).collect();
                assert_eq!(seen, expected, "{from} to {to}, and {other}");
            }
        }
    }
}
