//! The snapshots of a VDI in memory, by number and by label.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashSet};
use std::hash::{Hash, Hasher};
use std::ops::Bound;
use std::rc::Rc;

use base::SnapshotNumber;

use crate::vdi::Snapshot;

/// All snapshots of a VDI.
#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    by_number: BTreeMap<SnapshotNumber, Rc<Snapshot>>,
    /// Those that have a label.
    by_label: HashSet<Labelled>,
    /// How many a retention made.
    kept_count: usize,
}

/// A snapshot, as its label.
#[derive(Debug)]
struct Labelled(Rc<Snapshot>);

impl Borrow<str> for Labelled {
    fn borrow(&self) -> &str {
        &self.0.label
    }
}

impl Hash for Labelled {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.label.hash(state);
    }
}

impl PartialEq for Labelled {
    fn eq(&self, other: &Self) -> bool {
        self.0.label == other.0.label
    }
}

impl Eq for Labelled {}

impl Snapshots {
    pub(crate) fn insert(&mut self, snapshot: Rc<Snapshot>) {
        // Without a label a snapshot has the empty one, which names nothing.
        if !snapshot.label.is_empty() {
            self.by_label.insert(Labelled(Rc::clone(&snapshot)));
        }
        self.kept_count += usize::from(snapshot.is_kept());
        if let Some(old) = self.by_number.insert(snapshot.number, snapshot) {
            // Numbers are given once, but not by who forges a log.
            self.kept_count -= usize::from(old.is_kept());
        }
    }

    pub(crate) fn remove(&mut self, number: SnapshotNumber) -> Option<Rc<Snapshot>> {
        let removed = self.by_number.remove(&number)?;
        self.by_label.remove(removed.label.as_str());
        self.kept_count -= usize::from(removed.is_kept());
        Some(removed)
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn get(&self, number: SnapshotNumber) -> Option<&Rc<Snapshot>> {
        self.by_number.get(&number)
    }

    /// How many a retention made.
    pub(crate) fn kept_count(&self) -> usize {
        self.kept_count
    }

    /// The newest that was taken at this time or before.
    pub(crate) fn at(&self, wall_ns: u64) -> Option<&Rc<Snapshot>> {
        // Times never go back from one to the next (design rule 38).
        let later = base::mutant::active("lookup_leaves_out_its_instant");
        let wall_ns = wall_ns.saturating_sub(u64::from(later));
        if base::mutant::active("lookup_finds_the_next") {
            return self.by_number.values().find(|snapshot| snapshot.wall_ns > wall_ns);
        }
        self.by_number.values().rev().find(|snapshot| snapshot.wall_ns <= wall_ns)
    }

    /// Finds one by label or number; labels win.
    pub(crate) fn find(&self, name: &str) -> Option<&Rc<Snapshot>> {
        // `+5` parses as a number, but it is a label.
        let digits = name.bytes().all(|byte| byte.is_ascii_digit());
        let number = || name.parse().ok().filter(|_| digits).map(SnapshotNumber::new);
        let by_label = self.by_label.get(name).map(|Labelled(snapshot)| snapshot);
        by_label.or_else(|| self.get(number()?))
    }

    /// Whether anybody else uses a snapshot of some.
    pub(crate) fn is_in_use(snapshot: &Rc<Snapshot>) -> bool {
        Rc::strong_count(snapshot) > 1 + usize::from(!snapshot.label.is_empty())
    }

    pub(crate) fn count(&self) -> usize {
        self.by_number.len()
    }

    /// All of them, oldest first.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &Rc<Snapshot>> {
        self.by_number.values()
    }

    /// Those with numbers below `number`, or all, newest first.
    pub(crate) fn before(
        &self,
        number: Option<SnapshotNumber>,
    ) -> impl Iterator<Item = &Rc<Snapshot>> {
        let end = number.map_or(Bound::Unbounded, Bound::Excluded);
        self.by_number.range((Bound::Unbounded, end)).rev().map(|(_, snapshot)| snapshot)
    }

    /// Those with numbers above `number`, oldest first.
    pub(crate) fn after(&self, number: SnapshotNumber) -> impl Iterator<Item = &Rc<Snapshot>> {
        let behind = (Bound::Excluded(number), Bound::Unbounded);
        self.by_number.range(behind).map(|(_, snapshot)| snapshot)
    }
}

impl FromIterator<Rc<Snapshot>> for Snapshots {
    fn from_iter<I: IntoIterator<Item = Rc<Snapshot>>>(all: I) -> Self {
        let mut snapshots = Self::default();
        for snapshot in all {
            snapshots.insert(snapshot);
        }
        snapshots
    }
}
