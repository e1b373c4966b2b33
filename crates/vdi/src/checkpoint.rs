//! Checkpoints: what the overlays hold is merged into trees and published with one slot write.
//!
//! 1. *Freeze*: the log is cut at an LSN; every changed branch begins a new generation. From here
//!    on the checkpoint contains all records up to the cut and none above (design rule 22).
//! 2. *Merge*: when all records up to the cut are complete, each branch's changes are merged into
//!    its tree, one interval between snapshots after the other, so that each snapshot gets a tree;
//!    then the tables. New nodes are written bottom-up to free blocks.
//! 3. *Swap*: when all nodes are written, readers go to the new trees.
//! 4. *Publish*: flush, slot, flush. The next checkpoint may merge meanwhile; they publish in order
//!    (rule 23).
//! 5. *Release*: what this one replaced becomes free when the next one is published: until then
//!    the older slot still names it (rules 17, 18). No checkpoint waits for it: `release.rs`.

mod due;
mod ledger;
mod merge;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use base::{ErrorKind, Lsn, Pba, VdiId};
use blockstore::scheduler::Batch;
use ondisk::{Digest, DirectoryRecord, HostSlot, KeepRules, LogSegment, Roots, SlotState};
use runtime::Time;
use runtime::sync::{Permits, Semaphore, Signal};

use crate::Error;
use crate::branch::{Base, Branch, Contents};
use crate::damage::{DamagedTables, Table};
use crate::engine::{Engine, as_u64};
use crate::ledger::Event;
use crate::retention::Retention;
use crate::vdi::{Snapshot, Vdi};

use due::Forced;
use merge::{Done, Merge};

/// Overlay nodes gathered between two breaths of the thread.
const NODES_PER_TURN: usize = 256;

/// State of the checkpointing.
pub(crate) struct Checkpoints {
    preparing: Semaphore,
    publishing: Semaphore,
    /// Replaced by the newest published checkpoint; free after the next.
    replaced: RefCell<Vec<Pba>>,
    pub(crate) wanted: Signal,
    /// Notified when changes have been merged.
    pub(crate) merged: Signal,
    forced: RefCell<Forced>,
    /// The log when the last checkpoint cut it.
    last_cut: RefCell<Option<LogSegment>>,
    last_at: Cell<Time>,
    /// Since when guests have waited while checkpoints failed.
    pub(crate) failing_since: Cell<Option<Time>>,
    /// Retired blocks that the table knows.
    bad_known: Cell<usize>,
    pub(crate) damaged: DamagedTables,
}

impl Checkpoints {
    pub(crate) fn new() -> Self {
        Self {
            preparing: Semaphore::new(1),
            publishing: Semaphore::new(1),
            replaced: RefCell::default(),
            wanted: Signal::default(),
            merged: Signal::default(),
            forced: RefCell::default(),
            last_cut: RefCell::default(),
            last_at: Cell::default(),
            failing_since: Cell::default(),
            bad_known: Cell::new(0),
            damaged: DamagedTables::default(),
        }
    }

    /// Makes the next checkpoint store the retired blocks again.
    pub(crate) fn forget_bad_blocks(&self) {
        self.bad_known.set(usize::MAX);
    }
}

/// What a checkpoint took at its cut.
struct Frozen {
    cut: Lsn,
    segment: LogSegment,
    /// What the tables continue.
    roots: Roots,
    /// Tables that are written whole because they are damaged.
    rewritten: BTreeSet<Table>,
    directory: BTreeMap<u64, Option<DirectoryRecord>>,
    vdis: Vec<FrozenVdi>,
    deleted: BTreeSet<VdiId>,
    /// Each with whether it was the head of a VDI then: a rollback or deletion above the cut must
    /// not take away what the cut contains.
    branches: Vec<(Rc<Branch>, bool)>,
    vdi_id_next: u64,
    default_retention: KeepRules,
    owed_nodes: u64,
}

/// A VDI as it was at the cut.
struct FrozenVdi {
    vdi: Rc<Vdi>,
    branch: Rc<Branch>,
    block_count: u64,
    rollbacks: u64,
    /// `None`: the store's.
    retention: Option<Retention>,
    has_moments: bool,
    snapshot_next: base::SnapshotNumber,
    snapshot_count: u64,
    /// Snapshots taken and deleted since the last checkpoint.
    snapshots: BTreeMap<u64, Option<FrozenSnapshot>>,
    /// What happened to holds since then.
    ledger_events: Vec<Event>,
}

/// A snapshot as it was at the cut.
struct FrozenSnapshot {
    snapshot: Rc<Snapshot>,
    is_held: bool,
    /// See [`crate::branch::Point::needs_tree`]. A record above the cut may build on its history: it stays
    /// until who asks for a tree later is above the cut, too.
    needs_tree: bool,
}

/// The end of a ledger that a checkpoint writes.
struct LedgerEnd {
    vdi: Rc<Vdi>,
    /// Head of the chain, and number of its record.
    head: (Digest, u64),
    event_count: usize,
}

/// A checkpoint whose nodes are on the device.
struct Prepared {
    cut: Lsn,
    segment: LogSegment,
    roots: Roots,
    batch: Batch,
    replaced: Vec<Pba>,
    vdi_id_next: u64,
    default_retention: KeepRules,
    nodes_written: u64,
    versions_written: u64,
    /// Snapshots that got a history and no tree.
    histories: u64,
    /// Where the ledgers of these VDIs end.
    ledger_ends: Vec<LedgerEnd>,
}

impl Engine {
    /// Waits until no checkpoint is being merged, and keeps the next one from it: meanwhile
    /// [`Engine::roots`] and the live plane are those of one checkpoint.
    pub(crate) async fn between_merges(&self) -> Permits {
        self.checkpoints.preparing.acquire(1).await
    }

    /// The slot that was published last, when none is on its way. Who holds
    /// [`Self::between_merges`] has the slot of the last merge.
    ///
    /// # Errors
    /// If the store has stopped.
    pub(crate) async fn published_slot(&self) -> Result<HostSlot, Error> {
        let _publishing = self.checkpoints.publishing.acquire(1).await;
        self.go_on()?;
        let slot = self.slots.borrow().as_ref().map(|writer| writer.current().clone());
        slot.ok_or_else(|| Error::refused(ErrorKind::Fenced, "the store is being closed"))
    }

    /// One checkpoint. Durable on return, if it was the last change.
    ///
    /// # Errors
    /// If it could not be merged (nothing has changed then, and it may be tried again), or not be
    /// published (the store has stopped then).
    pub(crate) async fn checkpoint(self: &Rc<Self>, state: SlotState) -> Result<(), Error> {
        self.refuse_read_only()?;
        let preparing = self.checkpoints.preparing.acquire(1).await;
        if self.closed.get() && state == SlotState::Running {
            return Ok(());
        }
        let prepared = self.prepare_anyhow().await.inspect_err(|error| {
            tracing::warn!(%error, "a checkpoint could not be merged");
        })?;
        let _publishing = self.checkpoints.publishing.acquire(1).await;
        drop(preparing);
        self.publish(prepared, state).await
    }

    /// Prepares a checkpoint; one that failed for a reason that can be removed is begun again.
    async fn prepare_anyhow(self: &Rc<Self>) -> Result<Prepared, Error> {
        let mut blocks = self.nodes_needed();
        self.fill_reserve(blocks).await?;
        loop {
            let error = match self.prepare().await {
                Ok(prepared) => return Ok(prepared),
                Err(error) => error,
            };
            let again = if error.kind() == ErrorKind::NoSpace {
                // It needed more than the reserve had.
                blocks *= 2;
                self.fill_reserve(blocks).await?
            } else {
                // What it found damaged is written whole by the next one.
                self.checkpoints.damaged.take_news()
            };
            if !again {
                return Err(error);
            }
        }
    }

    async fn prepare(self: &Rc<Self>) -> Result<Prepared, Error> {
        if let Some(error) = self.scheduler.failure() {
            return Err(crate::engine::stopped(&error));
        }
        self.checkpoints.last_at.set(self.runtime.now());
        let mut frozen = self.freeze();
        if !base::mutant::active("checkpoint_ignores_in_flight") {
            self.log.completed(frozen.cut).await.map_err(blockstore::Error::from)?;
        }
        let mut merge = Merge::new(self);
        let merged = merge.run(&mut frozen).await;
        // Also on failure: blocks are not given back while writes to them are on their way.
        let mut written = merge.batch.completed().await;
        if base::mutant::active("checkpoint_ignores_failed_writes") {
            written = Ok(());
        }
        let failure = match (merged, written) {
            (Ok(done), Ok(())) => {
                return Ok(self.swap(&frozen, merge, done));
            }
            (Err(error), _) => error,
            (Ok(_), Err(error)) => {
                // A store that has stopped reports what stopped it, which may be no block of ours.
                let ours = merge.allocated.borrow().contains(&error.at);
                if ours && error.kind() == ErrorKind::Io {
                    merge.forget(error.at);
                    self.allocator.retire(error.at).map_err(Error::from)?;
                }
                blockstore::Error::from(error).into()
            }
        };
        merge.give_back();
        self.restore(frozen);
        Err(failure)
    }

    /// Cuts the log and takes what has changed, in one breath.
    fn freeze(self: &Rc<Self>) -> Frozen {
        self.keep_writes_at_cut();
        self.part_starts();
        let cut = self.log.last_lsn();
        let segment = self.log.cut();
        let mut registry = self.registry.borrow_mut();
        let registry = &mut *registry;
        let rewritten = self.checkpoints.damaged.noted();
        let mut roots = self.roots.get();
        self.begin_afresh(&rewritten, registry, &mut roots);
        let branches = std::mem::take(&mut registry.unsettled).into_values();
        let branches: Vec<_> = branches
            .map(|branch| {
                branch.freeze();
                let is_head = branch.is_head.get();
                (branch, is_head)
            })
            .collect();
        let directory = registry.directory.take_changed();
        let mut vdis = Vec::new();
        let mut deleted = BTreeSet::new();
        for id in std::mem::take(&mut registry.dirty).iter() {
            match registry.loaded.get(&id) {
                Some(vdi) => vdis.push(freeze_vdi(vdi)),
                None if registry.is_gone(id) => {
                    deleted.insert(id);
                }
                None => {}
            }
        }
        let vdi_id_next = registry.id_next;
        let default_retention = self.default_retention.borrow().rules().clone();
        let owed_nodes = self.owed_nodes.get();
        Frozen {
            cut,
            segment,
            roots,
            rewritten,
            directory,
            vdis,
            deleted,
            branches,
            vdi_id_next,
            default_retention,
            owed_nodes,
        }
    }

    /// Takes back what a failed checkpoint had frozen. Generations stay as they are: the next
    /// checkpoint merges all but the newest.
    fn restore(&self, frozen: Frozen) {
        let mut registry = self.registry.borrow_mut();
        for (branch, _) in frozen.branches {
            registry.unsettled.insert(branch.serial, branch);
        }
        registry.directory.put_changed(frozen.directory.keys().map(|&id| VdiId::new(id)));
        registry.dirty.extend(frozen.deleted);
        for vdi in frozen.vdis {
            registry.dirty.insert(vdi.vdi.id);
            let mut ledger = vdi.vdi.ledger.borrow_mut();
            ledger.frozen_count -= vdi.ledger_events.len();
            ledger.events.splice(0..0, vdi.ledger_events);
            let mut dirty = vdi.vdi.snapshots_dirty.borrow_mut();
            dirty.extend(vdi.snapshots.into_keys().map(base::SnapshotNumber::new));
        }
    }

    /// Lets readers go to the new trees, in one breath.
    fn swap(self: &Rc<Self>, frozen: &Frozen, merge: Merge, done: Done) -> Prepared {
        let mut shed = Vec::new();
        let mut histories = 0;
        for met in merge.points.into_values() {
            histories += u64::from(matches!(met.contents, Contents::Past(_)));
            met.point.label.set(met.label);
            met.point.contents.set(met.contents);
            if met.point.writes_from.get().is_some() {
                met.point.writes_from.set(met.writes_from);
            }
        }
        for merged in done.branches {
            let branch = merged.branch;
            branch.points.borrow_mut().retain(|point| point.position > frozen.cut);
            branch.points_met();
            branch.writes.set_in_tree(frozen.cut);
            branch.label.set(merged.label);
            branch.shared_up_to.set(merged.shared_up_to);
            *branch.base.borrow_mut() = Base::Root(merged.root);
            let mut generations = branch.generations.borrow_mut();
            shed.extend(generations.drain(..merged.generation_count));
        }
        for (vdi, table) in done.snapshot_tables {
            vdi.snapshot_table.set(table);
        }
        for (vdi, written) in done.ledgers {
            let mut ledger = vdi.ledger.borrow_mut();
            ledger.written = Rc::new(written);
            ledger.afresh = false;
        }
        let ledger_ends = frozen.vdis.iter().filter_map(ledger_end).collect();
        self.roots.set(done.roots);
        self.checkpoints.damaged.written(&frozen.rewritten);
        // The blocks of what is written afresh are left too.
        self.collector.suspect(merge.left + as_u64(frozen.rewritten.len()));
        if let Some(marked) = &merge.marks {
            self.collector.marks_stored(marked);
        }
        if let Some(known) = merge.bad_known {
            self.checkpoints.bad_known.set(known);
        }
        let nodes: usize =
            shed.iter().map(|generation| generation.overlay.borrow().node_count()).sum();
        self.changed_nodes.set(self.changed_nodes.get().saturating_sub(as_u64(nodes)));
        self.owed_nodes.set(self.owed_nodes.get().saturating_sub(frozen.owed_nodes));
        self.checkpoints.merged.notify();
        self.shed(shed);
        *self.checkpoints.last_cut.borrow_mut() = Some(frozen.segment);
        let mut replaced = merge.replaced;
        replaced.extend(merge.dead);
        Prepared {
            cut: frozen.cut,
            segment: frozen.segment,
            roots: done.roots,
            batch: merge.batch,
            replaced,
            vdi_id_next: frozen.vdi_id_next,
            default_retention: frozen.default_retention.clone(),
            nodes_written: merge.nodes_written,
            versions_written: merge.versions_written,
            histories,
            ledger_ends,
        }
    }

    /// Drops merged overlays piece by piece.
    fn shed(self: &Rc<Self>, generations: Vec<Rc<crate::branch::Generation>>) {
        let runtime = self.runtime.clone();
        drop(self.runtime.spawn(async move {
            for generation in generations {
                // A reader may still be looking; then the last owner drops it.
                if Rc::strong_count(&generation) > 1 {
                    continue;
                }
                while generation.overlay.borrow_mut().shed(NODES_PER_TURN) {
                    runtime.yield_now().await;
                }
            }
        }));
    }

    async fn publish(self: &Rc<Self>, prepared: Prepared, state: SlotState) -> Result<(), Error> {
        let mut prepared = prepared;
        if base::mutant::active("release_before_publication") {
            self.release(std::mem::take(&mut prepared.replaced));
        }
        if base::mutant::active("cut_runs_ahead") {
            prepared.cut = self.log.last_lsn();
        }
        let writer = self.slots.borrow_mut().take();
        let Some(mut writer) = writer else {
            return Err(Error::refused(ErrorKind::Fenced, "the store is being published already"));
        };
        let segment = prepared.segment;
        let current = writer.current();
        let slot = HostSlot {
            state,
            cut: prepared.cut,
            vdi_id_next: prepared.vdi_id_next,
            wall_ns: self.runtime.wall_ns().max(current.wall_ns),
            store_ns: self.store_ns(),
            roots: prepared.roots,
            segments: vec![segment],
            retention: prepared.default_retention,
            ..current.clone()
        };
        let outcome = writer.publish(slot, &prepared.batch).await;
        let sequence = writer.current().sequence;
        *self.slots.borrow_mut() = Some(writer);
        let older = outcome.inspect_err(|error| {
            // Both outcomes of the write are possible: only reopening can tell which.
            tracing::error!(%error, "a checkpoint could not be published");
            let cause = device::Cause::Gone;
            self.scheduler.fail(device::DeviceError::new(cause, Pba::new(0)));
            self.log.wake_all();
        })?;
        let tail = older.segments.first().map_or(segment.start, |first| first.start);
        let tail =
            if base::mutant::active("tail_follows_newer_slot") { segment.start } else { tail };
        self.log.published(sequence, prepared.cut, tail);
        for LedgerEnd { vdi, head, event_count } in prepared.ledger_ends {
            let mut ledger = vdi.ledger.borrow_mut();
            ledger.published = head;
            ledger.frozen_count -= event_count;
        }
        *self.segments.borrow_mut() = vec![segment];
        let free = if base::mutant::active("release_at_own_publication") {
            prepared.replaced
        } else {
            std::mem::replace(&mut *self.checkpoints.replaced.borrow_mut(), prepared.replaced)
        };
        self.release(free);
        self.trim_reserve();
        self.checkpoints.failing_since.set(None);
        let mut stats = self.stats.borrow_mut();
        stats.checkpoints += 1;
        stats.nodes_written += prepared.nodes_written;
        stats.versions_written += prepared.versions_written;
        stats.histories += prepared.histories;
        Ok(())
    }

    /// Blocks that recovery has no use for: free when a checkpoint has been published.
    pub(crate) fn replaced_by_recovery(&self, blocks: impl Iterator<Item = Pba>) {
        self.checkpoints.replaced.borrow_mut().extend(blocks);
    }

    /// Sets what recovery found: the log from which the next checkpoint counts.
    pub(crate) fn start_checkpoints(&self, segment: LogSegment, bad_known: usize) {
        *self.checkpoints.last_cut.borrow_mut() = Some(segment);
        self.checkpoints.last_at.set(self.runtime.now());
        self.checkpoints.bad_known.set(bad_known);
    }
}

/// Where the ledger of a VDI ends when its checkpoint is published; `None` if nothing changes.
fn ledger_end(frozen: &FrozenVdi) -> Option<LedgerEnd> {
    let ledger = frozen.vdi.ledger.borrow();
    let head = (ledger.written.head, ledger.written.sequence());
    let event_count = frozen.ledger_events.len();
    let changes = event_count > 0 || head != ledger.published;
    changes.then(|| LedgerEnd { vdi: Rc::clone(&frozen.vdi), head, event_count })
}

fn freeze_vdi(vdi: &Rc<Vdi>) -> FrozenVdi {
    let snapshots = vdi.snapshots.borrow();
    let dirty = std::mem::take(&mut *vdi.snapshots_dirty.borrow_mut());
    let forgets = base::mutant::active("checkpoint_forgets_holds");
    let frozen = |snapshot: &Rc<Snapshot>| FrozenSnapshot {
        snapshot: Rc::clone(snapshot),
        is_held: snapshot.hold.get().is_some() && !forgets,
        needs_tree: snapshot.point.needs_tree.get(),
    };
    let mut ledger = vdi.ledger.borrow_mut();
    let mut ledger_events = std::mem::take(&mut ledger.events);
    ledger_events.retain(|_| !forgets);
    ledger.frozen_count += ledger_events.len();
    FrozenVdi {
        vdi: Rc::clone(vdi),
        branch: Rc::clone(&vdi.branch.borrow()),
        block_count: vdi.block_count.get(),
        rollbacks: vdi.rollbacks.get(),
        retention: vdi.has_own_rules.get().then(|| vdi.retention.borrow().clone()),
        has_moments: snapshots.kept_count() > 0,
        snapshot_next: vdi.snapshot_next.get(),
        snapshot_count: as_u64(snapshots.count()),
        snapshots: dirty
            .into_iter()
            .map(|number| (number.get(), snapshots.get(number).map(frozen)))
            .collect(),
        ledger_events,
    }
}
