//! A VDI and its snapshots in memory.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use base::{BLOCK_SIZE_U64, ClaimGeneration, ErrorKind, Lsn, SnapshotNumber, VdiId};
use blockstore::allocator::Window;
use ondisk::{History, Origin, RootRef, SnapshotRecord};
use runtime::Time;

use crate::Error;
use crate::branch::{Branch, Point, View};
use crate::budget::Growth;
use crate::holds::Hold;
use crate::ledger::Ledger;
use crate::ranges::RangeLocks;
use crate::retention::Retention;
use crate::snapshots::Snapshots;
use crate::types::LedgerEntry;

/// A VDI that is in use.
#[derive(Debug)]
pub(crate) struct Vdi {
    pub(crate) id: VdiId,
    pub(crate) claim: ClaimGeneration,
    /// The record that cloned it, if that was in this run: until it is durable, a crash may take
    /// the VDI away (design rule 31).
    pub(crate) born: Cell<Lsn>,
    /// What its head continues. Replaced by a rollback.
    pub(crate) branch: RefCell<Rc<Branch>>,
    /// Size in blocks.
    pub(crate) block_count: Cell<u64>,
    /// Blocks reserved for its next writes, so that neighbours are its own (design rule 61).
    pub(crate) window: RefCell<Window>,
    /// Changes under way.
    pub(crate) ranges: RangeLocks,
    /// Handles opened under an older number are severed.
    pub(crate) incarnation: Cell<u64>,
    /// How often it was rolled back or shrunk: its users know another state of it.
    pub(crate) rollbacks: Cell<u64>,
    pub(crate) deleted: Cell<bool>,
    /// How many wait until nothing is on its way, to delete it, roll it back or shrink it.
    pub(crate) leaving: Cell<u32>,
    pub(crate) snapshots: RefCell<Snapshots>,
    pub(crate) snapshot_next: Cell<SnapshotNumber>,
    /// Snapshots whose records the next checkpoint writes or takes away: see [`crate::engine::Engine::owe_snapshot`].
    pub(crate) snapshots_dirty: RefCell<BTreeSet<SnapshotNumber>>,
    /// The table of its snapshots as the last checkpoint wrote it.
    pub(crate) snapshot_table: Cell<RootRef>,
    /// Numbers of its snapshots that are held.
    pub(crate) held: RefCell<BTreeSet<SnapshotNumber>>,
    /// What happened to holds.
    pub(crate) ledger: RefCell<Ledger>,
    /// Which moments are kept by themselves.
    pub(crate) retention: RefCell<Retention>,
    /// Whether that is its own; else it is the store's.
    pub(crate) has_own_rules: Cell<bool>,
    /// When the last of them was taken, in this run of the store.
    pub(crate) moment_at: Cell<Option<Time>>,
    /// Whether one is being taken.
    pub(crate) moment_pending: Cell<bool>,
    /// Blocks that were changed since the last one.
    pub(crate) changed_blocks: Cell<u64>,
    /// And since garbage collection counted what its past holds.
    pub(crate) growth: Growth,
    /// Whether the log was told that the past holds more than its budget for good.
    pub(crate) budget_told: Cell<bool>,
}

/// What a listing tells of a VDI beside its name.
#[derive(Debug, Default)]
pub(crate) struct Outline {
    pub(crate) block_count: u64,
    /// Snapshots that were asked for.
    pub(crate) snapshot_count: u64,
    /// Those that its retention made.
    pub(crate) moment_count: u64,
    pub(crate) retention: Retention,
    pub(crate) has_own_retention: bool,
    pub(crate) held_count: u64,
    pub(crate) ledger: Option<LedgerEntry>,
}

/// A snapshot.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) number: SnapshotNumber,
    pub(crate) position: Lsn,
    pub(crate) claim: ClaimGeneration,
    pub(crate) branch: Rc<Branch>,
    pub(crate) point: Rc<Point>,
    pub(crate) block_count: u64,
    pub(crate) wall_ns: u64,
    pub(crate) store_ns: u64,
    pub(crate) label: String,
    /// How it came to be.
    pub(crate) origin: Origin,
    /// Whether and how long it must not be deleted.
    pub(crate) hold: Cell<Option<Hold>>,
    pub(crate) deleted: Cell<bool>,
}

impl Vdi {
    /// The VDI as it is now.
    pub(crate) fn head(&self) -> View {
        View::Head(Rc::clone(&self.branch.borrow()))
    }

    /// Finds a snapshot by label or number; labels win.
    pub(crate) fn snapshot(&self, name: &str) -> Option<Rc<Snapshot>> {
        self.snapshots.borrow().find(name).map(Rc::clone)
    }

    /// Wall time of the newest snapshot. A later one is never older, whatever the clock does
    /// (design rule 38).
    pub(crate) fn newest_snapshot_ns(&self) -> u64 {
        self.snapshots.borrow().iter().next_back().map_or(0, |newest| newest.wall_ns)
    }

    /// Whether somebody waits to delete it, roll it back or shrink it.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.get() > 0
    }

    /// Whether there is something to do for moments that are kept by themselves.
    pub(crate) fn has_moments(&self) -> bool {
        let has_any = !self.retention.borrow().is_off() || self.snapshots.borrow().kept_count() > 0;
        has_any && !self.deleted.get()
    }

    /// Notes that so many blocks were changed.
    pub(crate) fn note_changed(&self, blocks: u64) {
        self.changed_blocks.set(self.changed_blocks.get().saturating_add(blocks));
        self.growth.note(blocks);
    }

    /// Ends every handle that is open now.
    pub(crate) fn sever(&self) {
        self.incarnation.set(self.incarnation.get() + 1);
    }
}

impl Snapshot {
    /// Whether the VDI's retention made it.
    pub(crate) fn is_kept(&self) -> bool {
        matches!(self.origin, Origin::Kept { .. })
    }

    /// Bytes changed since the one before, of one that the VDI's retention made.
    pub(crate) fn changed_bytes(&self) -> Option<u64> {
        match self.origin {
            Origin::Kept { changed_blocks } => Some(changed_blocks.saturating_mul(BLOCK_SIZE_U64)),
            Origin::Asked | Origin::Received(_) => None,
        }
    }

    /// What it is called, with its VDI's name.
    pub(crate) fn handle(&self, name: &str) -> String {
        match self.label.as_str() {
            "" => format!("{name}@{}", self.number),
            label => format!("{name}@{label}"),
        }
    }

    /// What somebody gets who waited for something while it was deleted.
    pub(crate) fn deleted_meanwhile(&self, name: &str) -> Error {
        let message = format!("{} was deleted meanwhile", self.handle(name));
        Error::refused(ErrorKind::NotFound, message)
    }

    /// Its contents.
    pub(crate) fn view(&self) -> View {
        View::Point(Rc::clone(&self.branch), Rc::clone(&self.point))
    }

    /// As it is stored, with the tree or the history that a checkpoint made of it, and from where on this
    /// keeps writes.
    pub(crate) fn record(
        &self,
        root: RootRef,
        (history, writes_from): (Option<History>, Option<Lsn>),
        is_held: bool,
    ) -> SnapshotRecord {
        SnapshotRecord {
            number: self.number,
            position: self.position,
            claim: self.claim,
            root,
            history,
            block_count: self.block_count,
            wall_ns: self.wall_ns,
            store_ns: self.store_ns,
            label: self.label.clone(),
            origin: self.origin,
            is_held,
            writes_from,
        }
    }
}
