//! A branch: one line of changes from a base. A VDI's head is a branch; a clone and a rollback
//! each begin a new one at a *point* of another. A point is a log position of a branch: a snapshot
//! or the origin of a clone.
//!
//! ```text
//!   root ── generation ── generation (active)      branch of web01
//!              │  point 17 (snapshot web01@1)
//!              └───────────── generation           branch of a clone of web01@1
//! ```
//!
//! Until a checkpoint has made a tree or a history (`history.rs`) of a point, reads at it look through
//! the branch's overlays, at versions below its position. So a snapshot, a clone and a rollback are
//! one log record each, and cost the same whatever was written before.
//!
//! Invariants: a base is older than its branch; generations are ordered, all LSNs of one lie below
//! those of the next; a point that no checkpoint has met lies above everything in the branch's
//! root.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use base::{BirthLabel, Lsn, Pba};
use blockstore::tree::Change;
use ondisk::{Entry, HISTORY_VERSIONS_MAX, RootRef};

use crate::history::Past;
use crate::overlay::{Overlay, Separation};
use crate::writes::KeptWrites;

/// Changes between two checkpoints.
#[derive(Debug, Default)]
pub(crate) struct Generation {
    pub(crate) overlay: RefCell<Overlay>,
    /// Blocks that were written and replaced within the generation: never in any tree.
    pub(crate) dead: RefCell<Vec<Pba>>,
}

/// Where a point's blocks stand.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Contents {
    /// In the branch's overlays: no checkpoint has met it.
    Pending,
    /// In a history and the tree that it changes.
    Past(Past),
    /// In a tree of its own.
    Tree(RootRef),
}

/// A log position at which a branch is read or continued by others.
#[derive(Debug)]
pub(crate) struct Point {
    /// What has a lower LSN is in.
    pub(crate) position: Lsn,
    pub(crate) contents: Cell<Contents>,
    /// Newest birth label in its tree.
    pub(crate) label: Cell<BirthLabel>,
    /// Whether a history is not enough: somebody continues it, or compares it with another.
    pub(crate) needs_tree: Cell<bool>,
    /// From which position on, up to its own, each can be opened: a history has all versions. `None`: its
    /// own only.
    pub(crate) writes_from: Cell<Option<Lsn>>,
    /// Size of the VDI then, in blocks.
    pub(crate) block_count: u64,
}

impl Point {
    /// A point that a checkpoint has met.
    pub(crate) fn met(
        position: Lsn,
        contents: Contents,
        label: BirthLabel,
        block_count: u64,
    ) -> Rc<Self> {
        Rc::new(Self {
            position,
            contents: Cell::new(contents),
            label: Cell::new(label),
            needs_tree: Cell::new(false),
            writes_from: Cell::new(None),
            block_count,
        })
    }

    /// Its tree, once a checkpoint has made one.
    pub(crate) fn root(&self) -> Option<RootRef> {
        match self.contents.get() {
            Contents::Tree(root) => Some(root),
            Contents::Pending | Contents::Past(_) => None,
        }
    }

    /// Where its blocks stand, but for those of one that is pending.
    fn place(&self) -> Option<Place> {
        match self.contents.get() {
            Contents::Pending => None,
            Contents::Past(past) => Some(Place::Past(past, self.position)),
            Contents::Tree(root) => Some(Place::Tree(root)),
        }
    }
}

/// What a branch starts from.
#[derive(Clone, Debug)]
pub(crate) enum Base {
    /// A tree.
    Root(RootRef),
    /// A point of an older branch that may have no tree yet.
    Point(Rc<Branch>, Rc<Point>),
}

/// One line of changes.
#[derive(Debug)]
pub(crate) struct Branch {
    /// Rises with each branch: a base has a lower number than what is built on it.
    pub(crate) serial: u64,
    pub(crate) base: RefCell<Base>,
    /// Oldest first; the last one is active.
    pub(crate) generations: RefCell<VecDeque<Rc<Generation>>>,
    /// Points without a tree, in order of position.
    pub(crate) points: RefCell<Vec<Rc<Point>>>,
    /// Label of new entries.
    pub(crate) label: Cell<BirthLabel>,
    /// What was born up to here may be shared. Never decreases.
    pub(crate) shared_up_to: Cell<BirthLabel>,
    /// Whether a VDI still has it as its head.
    pub(crate) is_head: Cell<bool>,
    /// What points may cost beside what overlays count.
    pub(crate) trees: Trees,
    /// Of which writes all versions stay.
    pub(crate) writes: KeptWrites,
}

/// An upper bound of what trees cost that points get in place of a history.
#[derive(Debug, Default)]
pub(crate) struct Trees {
    /// Position of the last point that needs one.
    last: Cell<Lsn>,
    /// Changes behind the first point, and of them those since the last tree.
    changes: Cell<u64>,
    since_last: Cell<u64>,
    /// Those that the checkpoint under way has.
    frozen: Cell<u64>,
    /// Nodes that nobody has reserved yet.
    owed: Cell<u64>,
}

/// Where a block stands.
#[derive(Debug)]
pub(crate) enum Place {
    /// An overlay knows.
    Entry(Entry),
    /// This tree knows.
    Tree(RootRef),
    /// This history knows, by what has lower LSNs in it, or its tree.
    Past(Past, Lsn),
}

impl Branch {
    pub(crate) fn new(
        serial: u64,
        base: Base,
        label: BirthLabel,
        shared_up_to: BirthLabel,
    ) -> Rc<Self> {
        Rc::new(Self {
            serial,
            base: RefCell::new(base),
            generations: RefCell::new(VecDeque::from([Rc::default()])),
            points: RefCell::default(),
            label: Cell::new(label),
            shared_up_to: Cell::new(shared_up_to),
            is_head: Cell::new(true),
            trees: Trees::default(),
            writes: KeptWrites::default(),
        })
    }

    /// The generation that takes changes now.
    pub(crate) fn active(&self) -> Rc<Generation> {
        self.generations.borrow().back().map(Rc::clone).unwrap_or_default()
    }

    /// Begins a new generation; changes with records up to now stay in the older ones.
    pub(crate) fn freeze(&self) {
        self.generations.borrow_mut().push_back(Rc::default());
        self.trees.frozen.set(self.trees.changes.get());
    }

    /// Marks `position` as a point, at which the VDI has so many blocks.
    pub(crate) fn add_point(&self, position: Lsn, block_count: u64) -> Rc<Point> {
        let point = Point::met(position, Contents::Pending, BirthLabel::default(), block_count);
        let mut points = self.points.borrow_mut();
        assert!(points.last().is_none_or(|last| last.position < position));
        points.push(Rc::clone(&point));
        point
    }

    /// The point at `position` that no checkpoint has met, at which the VDI has so many blocks; others may
    /// follow it. All versions that it sees are there: the next snapshot keeps the writes before its own.
    pub(crate) fn point_at(&self, position: Lsn, block_count: u64) -> Rc<Point> {
        let mut points = self.points.borrow_mut();
        let index = points.partition_point(|point| point.position < position);
        if let Some(point) = points.get(index).filter(|point| point.position == position) {
            return Rc::clone(point);
        }
        let point = Point::met(position, Contents::Pending, BirthLabel::default(), block_count);
        points.insert(index, Rc::clone(&point));
        point
    }

    /// How many nodes a merge writes at most if it makes a tree of a point that it has not met, and
    /// not a history.
    pub(crate) fn nodes_of(&self, point: &Point) -> u64 {
        let points = self.points.borrow();
        match (points.first(), points.last()) {
            // The first one gets a tree anyway, unless it has writes before it.
            (Some(first), _) if first.position == point.position && !self.writes.is_on() => 0,
            (_, Some(last)) if last.position == point.position => self.trees.since_last.get(),
            _ => self.trees.changes.get(),
        }
    }

    /// How many nodes a tree of what there is now takes at most, beside what overlays count.
    pub(crate) fn nodes_now(&self) -> u64 {
        self.trees.since_last.get()
    }

    /// Notes that a point needs a tree, and that this is reserved.
    pub(crate) fn note_tree(&self, point: &Point) {
        if self.points.borrow().last().is_some_and(|last| last.position == point.position) {
            self.trees.last.set(point.position);
            self.trees.since_last.set(0);
        }
    }

    /// Nodes to be reserved for trees that changes have made necessary.
    pub(crate) fn take_owed(&self) -> u64 {
        self.trees.owed.take()
    }

    /// Notes that a checkpoint has met the points that were there when it froze the branch.
    pub(crate) fn points_met(&self) {
        let Trees { changes, since_last, frozen, .. } = &self.trees;
        changes.set(changes.get().saturating_sub(frozen.take()));
        since_last.set(since_last.get().min(changes.get()));
    }

    /// Applies a change that was recorded while `generation` was active.
    pub(crate) fn insert(&self, generation: &Generation, change: &Change) {
        let points = self.points.borrow();
        let separated = |older: Lsn, newer: Lsn| {
            if base::mutant::active("overlay_forgets_snapshots") {
                return Separation::Nothing;
            }
            let next = points.partition_point(|point| point.position <= older);
            let tree = self.trees.last.get();
            match points.get(next) {
                Some(point) if point.position <= newer && older < tree && tree <= newer => {
                    Separation::Tree
                }
                Some(point) if point.position <= newer => Separation::History,
                _ if self.writes.separate(older, newer) => Separation::History,
                _ => Separation::Nothing,
            }
        };
        if points.first().is_some_and(|first| first.position <= change.lsn) || self.writes.is_on() {
            let trees = &self.trees;
            trees.changes.set(trees.changes.get() + 1);
            trees.since_last.set(trees.since_last.get() + 1);
            // The next point gets a tree, of all that changed since the last one.
            if change.level > 0 || trees.since_last.get() > u64::from(HISTORY_VERSIONS_MAX) {
                trees.owed.set(trees.owed.get() + trees.since_last.take());
            }
        }
        let dead = generation.overlay.borrow_mut().insert(change, separated);
        generation.dead.borrow_mut().extend(dead);
    }

    /// No label that the merges of what is there now can give is greater.
    pub(crate) fn label_bound(self: &Rc<Self>) -> u64 {
        // A branch starts one above its base, and advances once in the merge that is under way and
        // once in the next.
        const PER_BRANCH: u64 = 3;
        let mut branch = Rc::clone(self);
        let (mut above, mut bound) = (0, 0);
        loop {
            above += PER_BRANCH;
            bound = bound.max(u64::from(branch.label.get().get()) + above);
            let base = branch.base.borrow().clone();
            match base {
                Base::Root(_) => return bound,
                Base::Point(_, point) if point.place().is_some() => {
                    return bound.max(u64::from(point.label.get().get()) + above);
                }
                Base::Point(older, _) => branch = older,
            }
        }
    }

    /// Where block `index` stands, for a reader that sees LSNs below `before`.
    pub(crate) fn place(self: &Rc<Self>, index: u64, before: Lsn) -> Place {
        self.find(before, |overlay, before| overlay.lookup(index, before))
    }

    /// As [`Self::place`], with the end of a run of blocks from `index` on that stand there too: of
    /// which an overlay says the same, or of which none says anything.
    pub(crate) fn run(self: &Rc<Self>, index: u64, before: Lsn) -> (Place, u64) {
        let mut end = u64::MAX;
        let place = self.find(before, |overlay, before| {
            let (entry, run_end) = match overlay.run(index, before) {
                Some((entry, run_end)) => (Some(entry), run_end),
                None => (None, overlay.silent_end(index, before)),
            };
            end = end.min(run_end);
            entry
        });
        (place, end)
    }

    /// Asks overlays, newest first, over points that have no tree yet, until one knows; each with what
    /// the reader sees of it.
    fn find(
        self: &Rc<Self>,
        before: Lsn,
        mut look: impl FnMut(&Overlay, Lsn) -> Option<Entry>,
    ) -> Place {
        let mut branch = Rc::clone(self);
        let mut before = before;
        loop {
            let found = branch
                .generations
                .borrow()
                .iter()
                .rev()
                .find_map(|generation| look(&generation.overlay.borrow(), before));
            if let Some(entry) = found {
                return Place::Entry(entry);
            }
            let base = branch.base.borrow().clone();
            match base {
                Base::Root(root) => return Place::Tree(root),
                Base::Point(older, point) => match point.place() {
                    Some(place) => return place,
                    None => {
                        before = point.position;
                        branch = older;
                    }
                },
            }
        }
    }
}

/// A moment of a branch that is read: its head, or a point.
#[derive(Clone, Debug)]
pub(crate) enum View {
    /// The newest state.
    Head(Rc<Branch>),
    /// A point.
    Point(Rc<Branch>, Rc<Point>),
}

impl View {
    /// Where block `index` stands now.
    pub(crate) fn place(&self, index: u64) -> Place {
        match self {
            Self::Head(branch) => branch.place(index, Lsn::new(u64::MAX)),
            Self::Point(branch, point) => {
                point.place().unwrap_or_else(|| branch.place(index, point.position))
            }
        }
    }

    /// As [`Self::place`], with the end of a run of blocks from `index` on that stand there too.
    pub(crate) fn run(&self, index: u64) -> (Place, u64) {
        match self {
            Self::Head(branch) => branch.run(index, Lsn::new(u64::MAX)),
            Self::Point(branch, point) => match point.place() {
                Some(place) => (place, u64::MAX),
                None => branch.run(index, point.position),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_bounded_over_bases_that_have_no_tree_yet() {
        let root = || Base::Root(RootRef::empty(1));
        let zero = BirthLabel::new(0);
        let old = Branch::new(1, root(), BirthLabel::new(100), zero);
        assert_eq!(old.label_bound(), 103);
        let point = old.add_point(Lsn::new(7), 1);
        let base = || Base::Point(Rc::clone(&old), Rc::clone(&point));
        let clone = Branch::new(2, base(), BirthLabel::new(1), zero);
        assert_eq!(clone.label_bound(), 106);
        let rolled_back = Branch::new(3, base(), BirthLabel::new(200), zero);
        assert_eq!(rolled_back.label_bound(), 203);
        point.label.set(BirthLabel::new(90));
        point.contents.set(Contents::Tree(RootRef::empty(1)));
        assert_eq!(clone.label_bound(), 93, "the base has its tree, and advances no more");
    }
}
