//! Where a branch starts that is a clone, or what a VDI is after a rollback: at a VDI as it is now, at a
//! snapshot, or at a position that a moment keeps (`writes.rs`).
//!
//! What is continued needs a tree. A snapshot gets one of its own, and keeps no writes any more. Where a
//! moment is to go on to keep them, a branch starts at a point that no snapshot owns:
//!
//! - It is made of the moment's history. The checkpoint that merges the branch finds it as the base, and
//!   makes the tree; the moment stays as it is.
//! - The record names the moment and the position, and replay makes the same point. So it is appended when
//!   the moment is published, and while nobody has asked for a tree of it: what is published below the record
//!   has the history. Whoever deletes the moment, or has it forget its writes, comes behind the record, and
//!   so does the checkpoint that stores this, which has the branch's tree.
//! - If the newest slot is lost, replay finds the moment in the log, too. Then the point is one of its branch
//!   that no checkpoint has met, as those of snapshots.
//! - All that start at one position before a checkpoint freezes share a point, and so a tree. Who comes later
//!   gets another: a tree stays as long as a root reaches it, and these are of others.

use std::rc::Rc;

use base::{Lsn, SnapshotNumber};
use ondisk::{FANOUT, SlotState};

use crate::Error;
use crate::branch::{Base, Branch, Contents, Point};
use crate::engine::{Engine, as_u64};
use crate::types::Target;
use crate::vdi::{Snapshot, Vdi};
use crate::writes::{AtWrite, is_pending, not_kept};

/// A snapshot, or a position that it keeps.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    pub(crate) snapshot: Rc<Snapshot>,
    /// `None`: its own.
    pub(crate) position: Option<Lsn>,
}

impl Start {
    /// At a snapshot.
    pub(crate) fn at(snapshot: Rc<Snapshot>) -> Self {
        Self { snapshot, position: None }
    }

    /// What a record names; `None` if there is no such snapshot, or if it does not keep the position.
    pub(crate) fn recorded(
        vdi: &Vdi,
        number: SnapshotNumber,
        position: Option<Lsn>,
    ) -> Option<Self> {
        let snapshot = vdi.snapshots.borrow().get(number).map(Rc::clone)?;
        let forgets = base::mutant::active("replay_starts_at_the_moment");
        let position = position.filter(|_| !forgets);
        let is_kept = position.is_none_or(|position| snapshot.keeps(position));
        is_kept.then_some(Self { snapshot, position })
    }

    /// The same of `vdi` as it is now.
    ///
    /// # Errors
    /// `NotFound` if it was deleted, or does not keep the position any more.
    pub(crate) fn again(&self, vdi: &Vdi, name: &str) -> Result<Self, Error> {
        let found = vdi.snapshots.borrow().get(self.snapshot.number).cloned();
        // Another disk may have the name by now.
        let same = found.filter(|it| it.position == self.snapshot.position);
        let gone = || match self.position {
            Some(position) => not_kept(name, Lsn::new(position.get().saturating_sub(1))),
            None => self.snapshot.deleted_meanwhile(name),
        };
        let snapshot = same.ok_or_else(gone)?;
        let Some(position) = self.position else { return Ok(Self::at(snapshot)) };
        // The checkpoint under way may store it with a tree in place of its history.
        if snapshot.point.needs_tree.get() || !snapshot.keeps(position) {
            return Err(gone());
        }
        Ok(Self { snapshot, position: Some(position) })
    }

    /// Whether the branch starts at a point that the snapshot does not own.
    fn is_apart(&self) -> bool {
        let point = &self.snapshot.point;
        let is_past = matches!(point.contents.get(), Contents::Past(_));
        let keeps_writes = point.writes_from.get().is_some();
        self.position.is_some() || (keeps_writes && is_past && !point.needs_tree.get())
    }

    /// Nodes that its tree takes at most.
    fn nodes(&self) -> u64 {
        match self.is_apart() {
            true => nodes_of(&self.snapshot.branch, &self.snapshot.point),
            false => nodes_wanted(&self.snapshot),
        }
    }

    fn position(&self) -> Lsn {
        self.position.unwrap_or(self.snapshot.position)
    }

    /// A point that the snapshot does not own.
    fn point_apart(&self) -> Rc<Point> {
        let Snapshot { branch, point, block_count, .. } = &*self.snapshot;
        let one_too_far = base::mutant::active("clone_is_one_write_too_far");
        let position = Lsn::new(self.position().get() + u64::from(one_too_far));
        match point.contents.get() {
            Contents::Pending => branch.point_at(position, *block_count),
            contents => Point::met(position, contents, point.label.get(), *block_count),
        }
    }
}

impl Engine {
    /// What a person names to be continued, and how many nodes its tree may take. A time is looked up
    /// once: it is another one when something was waited for. What is returned stays: moments go, and
    /// forget their writes, unless somebody holds them.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for what is to come.
    pub(crate) async fn find_start(
        self: &Rc<Self>,
        target: &Target,
    ) -> Result<(Option<Start>, u64), Error> {
        let vdi = self.find(&target.vdi).await?;
        let Some(wanted) = &target.snapshot else { return Ok((None, nodes_of_head(&vdi))) };
        let start = match self.write_of(target).await? {
            Some(lsn) => {
                let AtWrite { moment, point, .. } = self.at_write(&target.vdi, lsn).await?;
                Start { snapshot: moment, position: point.map(|point| point.position) }
            }
            None => Start::at(self.find_moment(&vdi, &target.vdi, wanted)?),
        };
        if is_pending(&start.snapshot) && start.snapshot.point.writes_from.get().is_some() {
            // With a history it keeps them.
            self.checkpoint(SlotState::Running).await?;
        }
        let nodes = self.nodes_of_start(&vdi, Some(&start));
        Ok((Some(start), nodes))
    }

    /// Nodes that the tree of a start takes at most that nobody has reserved; `None`: of `vdi` as it is now.
    pub(crate) fn nodes_of_start(&self, vdi: &Vdi, start: Option<&Start>) -> u64 {
        let Some(start) = start else { return nodes_of_head(vdi) };
        let is_shared = || self.starts.borrow().contains_key(&(vdi.id, start.position()));
        if start.is_apart() && is_shared() { 0 } else { start.nodes() }
    }

    /// Where a branch starts, of a snapshot of `vdi`, as its base.
    pub(crate) fn base_of(&self, vdi: &Vdi, start: &Start) -> Base {
        let Snapshot { branch, point, .. } = &*start.snapshot;
        if !start.is_apart() {
            self.want_tree(vdi, &start.snapshot);
            return Base::Point(Rc::clone(branch), Rc::clone(point));
        }
        let mut starts = self.starts.borrow_mut();
        let key = (vdi.id, start.position());
        let point = starts.entry(key).or_insert_with(|| start.point_apart());
        if point.root().is_none() && !point.needs_tree.replace(true) {
            self.owed_nodes.set(self.owed_nodes.get() + nodes_of(branch, point));
        }
        Base::Point(Rc::clone(branch), Rc::clone(point))
    }

    /// Has the next checkpoint make a tree of a snapshot of `vdi`, unless it has one.
    pub(crate) fn want_tree(&self, vdi: &Vdi, snapshot: &Snapshot) {
        let point = &snapshot.point;
        let nodes = nodes_wanted(snapshot);
        if point.root().is_some() || point.needs_tree.replace(true) {
            return;
        }
        snapshot.branch.note_tree(point);
        self.owed_nodes.set(self.owed_nodes.get() + nodes);
        self.owe_snapshot(vdi, snapshot.number);
        self.touch(vdi);
    }

    /// The head of `vdi` as a base for others.
    pub(crate) fn point_now(&self, vdi: &Vdi, lsn: Lsn) -> Base {
        let branch = Rc::clone(&vdi.branch.borrow());
        self.owed_nodes.set(self.owed_nodes.get() + nodes_of_head(vdi));
        let point = branch.add_point(lsn, vdi.block_count.get());
        point.needs_tree.set(true);
        branch.note_tree(&point);
        self.touch(vdi);
        Base::Point(branch, point)
    }

    /// Ends what starts share: the checkpoint that freezes now makes the trees of all of them.
    pub(crate) fn part_starts(&self) {
        self.starts.borrow_mut().clear();
    }
}

/// Nodes that a tree of a VDI as it is now takes at most, beside what overlays count.
pub(crate) fn nodes_of_head(vdi: &Vdi) -> u64 {
    vdi.branch.borrow().nodes_now().min(vdi.block_count.get().div_ceil(as_u64(FANOUT)))
}

/// Nodes that a tree of a snapshot takes at most, if it has none and is to have one.
pub(crate) fn nodes_wanted(snapshot: &Snapshot) -> u64 {
    match snapshot.point.needs_tree.get() {
        true => 0,
        false => nodes_of(&snapshot.branch, &snapshot.point),
    }
}

/// Nodes that a tree of a point of `branch` takes at most, if it has none.
fn nodes_of(branch: &Branch, point: &Point) -> u64 {
    let nodes = match point.contents.get() {
        Contents::Tree(_) => 0,
        Contents::Past(past) => u64::from(past.history.count),
        Contents::Pending => branch.nodes_of(point),
    };
    nodes.min(point.block_count.div_ceil(as_u64(FANOUT)))
}
