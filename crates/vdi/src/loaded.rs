//! VDIs in memory: read when somebody uses them, dropped when nobody does.
//!
//! A VDI that nobody uses, and of which a checkpoint has everything, is in its tables and nowhere
//! else. Some stay in memory for a while, as they may be used again.

use std::cell::{Cell, RefCell};
use std::collections::hash_map::Entry;
use std::rc::Rc;

use base::{ErrorKind, VdiId};
use blockstore::table;
use ondisk::{RootRef, SnapshotRecord, VdiRecord};

use crate::Error;
use crate::branch::{Base, Branch, Contents, Point};
use crate::budget::Growth;
use crate::damage::{Table, is_damage};
use crate::engine::{Engine, Registry, as_u64};
use crate::history::Past;
use crate::holds::Hold;
use crate::retention::Retention;
use crate::snapshots::Snapshots;
use crate::vdi::{Outline, Snapshot, Vdi};

/// VDIs that are looked at, to be dropped, between two breaths of the thread.
const VDIS_PER_TURN: usize = 256;

impl Engine {
    /// The VDI with this id, loaded from its table if it is not in use yet.
    pub(crate) async fn vdi(&self, id: VdiId) -> Result<Rc<Vdi>, Error> {
        if let Some(vdi) = self.loaded(id)? {
            return Ok(vdi);
        }
        // Who loads it first, changes it and leaves it must not have it dropped: what is read here would be
        // older than what was stored meanwhile.
        let _loading = Loading::begin(self, id);
        let _reader = self.epochs.enter();
        let record = self.vdi_record(id).await?;
        let mut snapshots = Vec::new();
        let scanned = table::scan(&self.nodes, &record.snapshots, |_, snapshot: SnapshotRecord| {
            snapshots.push(snapshot);
            true
        });
        let scanned = scanned.await.map_err(Error::from);
        if let Err(error) = &scanned
            && is_damage(error)
        {
            // The VDI and its other snapshots are none the worse for it.
            let registry = self.registry.borrow();
            let disk = registry.name(id);
            tracing::error!(disk, "snapshots are lost: their records are damaged");
            self.checkpoints.damaged.note(Table::Snapshots(id));
        } else {
            scanned?;
        }
        let records = self.read_ledger(&record).await?;
        // Somebody else may have loaded it meanwhile, or deleted it.
        if let Some(vdi) = self.loaded(id)? {
            return Ok(vdi);
        }
        let vdi = self.adopt(&record, snapshots);
        self.adopt_ledger(&vdi, &record, records);
        self.registry.borrow_mut().loaded.insert(id, Rc::clone(&vdi));
        Ok(vdi)
    }

    /// What the last checkpoint stored of a VDI.
    pub(crate) async fn vdi_record(&self, id: VdiId) -> Result<VdiRecord, Error> {
        let _reader = self.epochs.enter();
        let record = table::get(&self.nodes, &self.roots.get().vdis, id.get()).await?;
        record.ok_or_else(|| lost(id))
    }

    /// A VDI that exists, if it is in use.
    fn loaded(&self, id: VdiId) -> Result<Option<Rc<Vdi>>, Error> {
        let registry = self.registry.borrow();
        if !registry.directory.contains(id) {
            return Err(Error::refused(ErrorKind::NotFound, format!("VDI {id} was deleted")));
        }
        if registry.lost.contains(&id) {
            return Err(lost(id));
        }
        Ok(registry.loaded.get(&id).map(Rc::clone))
    }

    fn adopt(&self, record: &VdiRecord, snapshots: Vec<SnapshotRecord>) -> Rc<Vdi> {
        let branch = self.new_branch(Base::Root(record.root), record.label, record.shared_up_to);
        // How much was written since its last moment is not known any more; whether, only if a tree
        // tells it.
        let is_as_newest = snapshots.last().map_or(record.root == RootRef::empty(1), |newest| {
            newest.history.is_none() && newest.root.entry == record.root.entry
        });
        let retention = self.retention_of(record);
        branch.writes.set_in_tree(record.lsn);
        branch.writes.set(retention.keeps_writes(), record.lsn.plus(1));
        let snapshots = snapshots.into_iter().map(|snapshot| {
            let contents = match snapshot.history {
                Some(history) => Contents::Past(Past { root: snapshot.root, history }),
                None => Contents::Tree(snapshot.root),
            };
            let point = Point::met(snapshot.position, contents, record.label, snapshot.block_count);
            point.writes_from.set(snapshot.writes_from);
            let branch = Rc::clone(&branch);
            Rc::new(loaded_snapshot(snapshot, branch, point))
        });
        let snapshots = snapshots.collect();
        Rc::new(Vdi {
            id: record.id,
            claim: record.claim,
            born: Cell::default(),
            branch: RefCell::new(branch),
            block_count: Cell::new(record.block_count),
            window: RefCell::default(),
            ranges: Default::default(),
            incarnation: Cell::new(0),
            rollbacks: Cell::new(record.rollbacks),
            deleted: Cell::new(false),
            leaving: Cell::new(0),
            snapshots: RefCell::new(snapshots),
            snapshot_next: Cell::new(record.snapshot_next),
            snapshots_dirty: RefCell::default(),
            snapshot_table: Cell::new(record.snapshots),
            held: RefCell::default(),
            ledger: RefCell::default(),
            changed_blocks: Cell::new(u64::from(!is_as_newest)),
            growth: Growth::default(),
            budget_told: Cell::new(false),
            retention: RefCell::new(retention),
            has_own_rules: Cell::new(record.retention.is_some()),
            moment_at: Cell::default(),
            moment_pending: Cell::new(false),
        })
    }

    /// What a listing tells of a VDI. One that nobody uses is not loaded for it, unless moments of it or
    /// holds are to be counted.
    pub(crate) async fn outline(self: &Rc<Self>, id: VdiId) -> Result<Outline, Error> {
        if let Some(vdi) = self.loaded(id)? {
            return Ok(self.outline_of(&vdi));
        }
        let record = self.vdi_record(id).await?;
        if record.has_moments || record.ledger_count > 0 || self.loaded(id)?.is_some() {
            let vdi = self.vdi(id).await?;
            return Ok(self.outline_of(&vdi));
        }
        Ok(Outline {
            block_count: record.block_count,
            snapshot_count: record.snapshot_count,
            moment_count: 0,
            retention: self.retention_of(&record),
            has_own_retention: record.retention.is_some(),
            held_count: 0,
            ledger: None,
        })
    }

    /// As [`Self::outline`], of one that is in memory: its snapshots count when they are durable.
    pub(crate) fn outline_of(&self, vdi: &Vdi) -> Outline {
        let (snapshot_count, moment_count) = self.durable_snapshot_counts(vdi);
        Outline {
            block_count: vdi.block_count.get(),
            snapshot_count,
            moment_count,
            retention: vdi.retention.borrow().clone(),
            has_own_retention: vdi.has_own_rules.get(),
            held_count: as_u64(vdi.held.borrow().len()),
            ledger: vdi.ledger.borrow().entry(),
        }
    }

    fn retention_of(&self, record: &VdiRecord) -> Retention {
        match &record.retention {
            Some(rules) => Retention::new(rules.clone()),
            None => self.default_retention.borrow().clone(),
        }
    }

    /// Drops VDIs that nobody uses, if there are more than may stay.
    pub(crate) async fn unload_idle(&self) {
        if self.checkpoints.damaged.is_any() {
            // Tables are to be written again from what is in memory.
            return;
        }
        let (mut excess, loaded) = {
            let loaded = &self.registry.borrow().loaded;
            let excess = loaded.len().saturating_sub(self.idle_vdis_max);
            if excess == 0 {
                return;
            }
            (excess, loaded.keys().copied().collect::<Vec<_>>())
        };
        for ids in loaded.chunks(VDIS_PER_TURN) {
            for &id in ids {
                let mut registry = self.registry.borrow_mut();
                if excess > 0 && self.is_idle(&registry, id) {
                    excess -= 1;
                    if let Some(vdi) = registry.loaded.remove(&id) {
                        self.allocator.return_window(&mut vdi.window.borrow_mut());
                    }
                }
            }
            if excess == 0 {
                return;
            }
            self.runtime.yield_now().await;
        }
    }

    /// Whether nobody uses a VDI, and its tables have everything of it.
    fn is_idle(&self, registry: &Registry, id: VdiId) -> bool {
        let Some(vdi) = registry.loaded.get(&id) else { return false };
        // A checkpoint under way holds it, too.
        if Rc::strong_count(vdi) > 1 {
            return false;
        }
        if base::mutant::active("unloads_what_changed") {
            return true;
        }
        let branch = vdi.branch.borrow();
        let is_changed =
            registry.dirty.contains(id) || registry.unsettled.contains_key(&branch.serial);
        // It has moments to be taken or deleted, or holds to be ended, whoever uses it.
        let has_work = vdi.snapshots.borrow().kept_count() > 0
            || (!vdi.retention.borrow().is_off() && vdi.changed_blocks.get() > 0)
            || !vdi.held.borrow().is_empty();
        let is_waited_for = has_work || vdi.moment_pending.get() || vdi.is_leaving();
        let is_loading = registry.loading.contains_key(&id);
        // A crash may take it away: who opens it waits for that.
        let is_durable = self.scheduler.watermarks().durable() >= vdi.born.get();
        !is_changed
            && !is_waited_for
            && !is_loading
            && is_durable
            && !is_read(&vdi.snapshots.borrow(), &branch)
    }
}

/// A VDI that somebody reads from its tables.
struct Loading<'a>(&'a Engine, VdiId);

impl<'a> Loading<'a> {
    fn begin(engine: &'a Engine, id: VdiId) -> Self {
        *engine.registry.borrow_mut().loading.entry(id).or_default() += 1;
        Self(engine, id)
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let mut registry = self.0.registry.borrow_mut();
        if let Entry::Occupied(mut count) = registry.loading.entry(self.1) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// Whether somebody reads a VDI's branch or snapshots, or builds on them.
fn is_read(snapshots: &Snapshots, branch: &Rc<Branch>) -> bool {
    let held_by_snapshots = snapshots.iter().filter(|it| Rc::ptr_eq(&it.branch, branch)).count();
    Rc::strong_count(branch) > 1 + held_by_snapshots || snapshots.iter().any(Snapshots::is_in_use)
}

fn loaded_snapshot(record: SnapshotRecord, branch: Rc<Branch>, point: Rc<Point>) -> Snapshot {
    Snapshot {
        number: record.number,
        position: record.position,
        claim: record.claim,
        branch,
        point,
        block_count: record.block_count,
        wall_ns: record.wall_ns,
        store_ns: record.store_ns,
        label: record.label,
        origin: record.origin,
        // Until when says the ledger.
        hold: Cell::new(record.is_held.then_some(Hold { until: None })),
        deleted: Cell::new(false),
    }
}

/// What everybody gets who asks for a VDI of which nothing is left but its name.
fn lost(id: VdiId) -> Error {
    let message = format!("VDI {id} was lost to damage of its record: delete it");
    Error::refused(ErrorKind::Corrupt, message)
}
