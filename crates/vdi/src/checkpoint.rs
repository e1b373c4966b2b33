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

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::Duration;

use base::{BLOCK_SIZE, BirthLabel, ErrorKind, ExtentIndex, Lsn, Pba, VdiId};
use blockstore::scheduler::Batch;
use blockstore::table;
use blockstore::tree::{self, Births, Change, OnDamage, Outcome, TreeWriter, span};
use ondisk::{
    DirectoryRecord, ExtentRecord, HostSlot, LogSegment, RootRef, Roots, SlotState, SnapshotRecord,
    VdiRecord,
};
use runtime::Time;
use runtime::sync::{OneshotSender, Permits, Semaphore, Signal, oneshot};

use crate::Error;
use crate::branch::{Base, Branch, Point};
use crate::damage::{DamagedTables, Table, is_damage};
use crate::engine::{Engine, as_u64};
use crate::manage::labels_used_up;
use crate::overlay::newest_only;
use crate::release::ReleasedUpTo;
use crate::vdi::{Snapshot, Vdi};

/// Overlay nodes gathered between two breaths of the thread.
const NODES_PER_TURN: usize = 256;

/// Changed nodes that force a checkpoint: each holds up to about two blocks of memory.
const CHANGED_NODES_DUE: u64 = 16 << 10;

/// Changed nodes at which changes wait for a checkpoint: half a gigabyte at the very most.
const CHANGED_NODES_MAX: u64 = 4 * CHANGED_NODES_DUE;

/// Records that force a checkpoint, so that replay stays short whatever their size.
const RECORDS_MAX: u64 = 256 << 10;

/// Longest time that changes wait for a checkpoint, in nanoseconds.
const AGE_MAX_NS: u64 = 5_000_000_000;

/// How long checkpoints may fail while guests wait for them.
const FAILING_MAX: Duration = Duration::from_secs(60);

/// Pause after one that failed: whatever it was needs time or space.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// The errno that a store stops with when checkpoints fail for another reason than space.
const EIO: i32 = 5;

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
    failing_since: Cell<Option<Time>>,
    /// Retired blocks that the table knows.
    bad_known: Cell<usize>,
    pub(crate) damaged: DamagedTables,
}

#[derive(Default)]
struct Forced {
    running: bool,
    queued: Vec<OneshotSender<Result<ReleasedUpTo, ErrorKind>>>,
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
}

/// A VDI as it was at the cut.
struct FrozenVdi {
    vdi: Rc<Vdi>,
    branch: Rc<Branch>,
    block_count: u64,
    snapshot_next: base::SnapshotNumber,
    snapshot_count: u64,
    /// Snapshots taken and deleted since the last checkpoint.
    snapshots: BTreeMap<u64, Option<Rc<Snapshot>>>,
}

/// What a branch became.
struct MergedBranch {
    branch: Rc<Branch>,
    root: RootRef,
    label: BirthLabel,
    shared_up_to: BirthLabel,
    /// Points that were passed, with their trees if somebody wants them.
    points: Vec<Rc<Point>>,
    generation_count: usize,
}

/// A checkpoint whose nodes are on the device.
struct Prepared {
    cut: Lsn,
    segment: LogSegment,
    roots: Roots,
    batch: Batch,
    replaced: Vec<Pba>,
    vdi_id_next: u64,
    nodes_written: u64,
}

/// A checkpoint being merged.
struct Merge {
    engine: Rc<Engine>,
    batch: Batch,
    /// Blocks allocated for nodes and pages, to be given back if it fails.
    allocated: Rc<RefCell<Vec<Pba>>>,
    added: Vec<Pba>,
    replaced: Vec<Pba>,
    /// Of `added` and `replaced`, how many the bitmaps know: what a failure has to undo.
    made_live: usize,
    cleared: usize,
    /// Never in any tree: they only stop being busy.
    dead: Vec<Pba>,
    points: HashMap<*const Point, (RootRef, BirthLabel)>,
    nodes_written: u64,
    /// What garbage collection found; among `replaced` too.
    garbage: Vec<Pba>,
    /// See [`Outcome::left`].
    left: u64,
    /// Extents whose records it stores.
    extents: Vec<ExtentIndex>,
    /// Retired blocks that it stores, if there are more than before.
    bad_known: Option<usize>,
}

impl Engine {
    /// Waits until no checkpoint is being merged, and keeps the next one from it: meanwhile
    /// [`Engine::roots`] and the live plane are those of one checkpoint.
    pub(crate) async fn between_merges(&self) -> Permits {
        self.checkpoints.preparing.acquire(1).await
    }

    /// Asks for a checkpoint soon.
    pub(crate) fn request_checkpoint(&self) {
        self.checkpoints.wanted.notify();
    }

    /// Whether a checkpoint is due, by log fill, changes or age (design rule 28).
    pub(crate) fn checkpoint_is_due(&self) -> bool {
        let (used, ring) = self.log.usage();
        let since_cut = self.records_since_cut();
        let pending = since_cut > 0 || !self.checkpoints.replaced.borrow().is_empty();
        let aged = self.runtime.now().0 >= self.checkpoints.last_at.get().0 + AGE_MAX_NS;
        self.log_blocks_since_cut() >= ring / 4
            || used >= ring * 5 / 8
            || since_cut >= RECORDS_MAX
            || self.changed_nodes.get() >= CHANGED_NODES_DUE
            || (aged && pending)
    }

    /// Waits until there is memory for another change: guests can change more than checkpoints
    /// merge meanwhile.
    ///
    /// # Errors
    /// If the store has failed.
    pub(crate) async fn room_in_memory(&self) -> Result<(), Error> {
        loop {
            let merged = self.checkpoints.merged.changed();
            if let Some(error) = self.scheduler.failure() {
                return Err(crate::engine::stopped(&error));
            }
            if !self.is_full_of_changes() {
                return Ok(());
            }
            self.request_checkpoint();
            merged.await;
        }
    }

    fn is_full_of_changes(&self) -> bool {
        self.changed_nodes.get() >= CHANGED_NODES_MAX
    }

    fn records_since_cut(&self) -> u64 {
        let last = self.checkpoints.last_cut.borrow();
        let first = last.as_ref().map_or(Lsn::new(0), |segment| segment.first_lsn);
        self.log.last_lsn().plus(1).distance_from(first)
    }

    fn log_blocks_since_cut(&self) -> u64 {
        let last = self.checkpoints.last_cut.borrow();
        last.as_ref().map_or(0, |segment| self.log.position().distance_from(segment.start))
    }

    /// Two checkpoints, one after the other: afterwards both slots name everything up to now, and
    /// what was replaced before is free.
    ///
    /// # Errors
    /// If a checkpoint failed.
    pub(crate) async fn checkpoint_twice(self: &Rc<Self>) -> Result<(), Error> {
        let released = self.publish_twice().await?;
        self.released(released).await;
        Ok(())
    }

    /// As [`Self::checkpoint_twice`], but what was replaced may not be free yet: [`Self::released`]
    /// waits for it, and for every reader. Nobody who does so is in the way of the next pair, which
    /// may give what others need, or fail. Those who ask while a pair is under way share the next.
    ///
    /// # Errors
    /// If a checkpoint failed.
    pub(crate) async fn publish_twice(self: &Rc<Self>) -> Result<ReleasedUpTo, Error> {
        let (done, outcome) = oneshot();
        let start = {
            let mut forced = self.checkpoints.forced.borrow_mut();
            forced.queued.push(done);
            !std::mem::replace(&mut forced.running, true)
        };
        if start {
            let engine = Rc::clone(self);
            drop(self.runtime.spawn(async move {
                loop {
                    let joined = std::mem::take(&mut engine.checkpoints.forced.borrow_mut().queued);
                    if joined.is_empty() {
                        engine.checkpoints.forced.borrow_mut().running = false;
                        return;
                    }
                    let mut outcome = engine.checkpoint(SlotState::Running).await;
                    if outcome.is_ok() {
                        outcome = engine.checkpoint(SlotState::Running).await;
                    }
                    let outcome = outcome.map_err(|error| error.kind());
                    let outcome = outcome.map(|()| engine.releases.up_to_now());
                    for waiting in joined {
                        waiting.send(outcome);
                    }
                }
            }));
        }
        let failed = |kind| Error::refused(kind, "a checkpoint failed; see the log");
        outcome.await.unwrap_or(Err(ErrorKind::Fenced)).map_err(failed)
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
    fn freeze(&self) -> Frozen {
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
        let directory = std::mem::take(&mut registry.dirty_directory)
            .into_iter()
            .map(|id| (id.get(), registry.directory.get(&id).cloned()))
            .collect();
        let mut vdis = Vec::new();
        let mut deleted = BTreeSet::new();
        for id in std::mem::take(&mut registry.dirty) {
            match registry.loaded.get(&id) {
                Some(vdi) => vdis.push(freeze_vdi(vdi)),
                None => {
                    deleted.insert(id);
                }
            }
        }
        let vdi_id_next = registry.id_next;
        Frozen { cut, segment, roots, rewritten, directory, vdis, deleted, branches, vdi_id_next }
    }

    /// Takes back what a failed checkpoint had frozen. Generations stay as they are: the next
    /// checkpoint merges all but the newest.
    fn restore(&self, frozen: Frozen) {
        let mut registry = self.registry.borrow_mut();
        for (branch, _) in frozen.branches {
            registry.unsettled.insert(branch.serial, branch);
        }
        registry.dirty_directory.extend(frozen.directory.keys().map(|&id| VdiId::new(id)));
        registry.dirty.extend(frozen.deleted);
        for vdi in frozen.vdis {
            registry.dirty.insert(vdi.vdi.id);
            let mut dirty = vdi.vdi.snapshots_dirty.borrow_mut();
            for (number, snapshot) in vdi.snapshots {
                let number = base::SnapshotNumber::new(number);
                dirty.entry(number).or_insert(snapshot.is_some());
            }
        }
    }

    /// Lets readers go to the new trees, in one breath.
    fn swap(self: &Rc<Self>, frozen: &Frozen, merge: Merge, done: Done) -> Prepared {
        let mut shed = Vec::new();
        for merged in done.branches {
            let branch = merged.branch;
            for point in &merged.points {
                if let Some(&(root, label)) = merge.points.get(&Rc::as_ptr(point)) {
                    point.label.set(label);
                    point.root.set(Some(root));
                }
            }
            branch.points.borrow_mut().retain(|point| point.position > frozen.cut);
            branch.label.set(merged.label);
            branch.shared_up_to.set(merged.shared_up_to);
            *branch.base.borrow_mut() = Base::Root(merged.root);
            let mut generations = branch.generations.borrow_mut();
            shed.extend(generations.drain(..merged.generation_count));
        }
        for (vdi, table) in done.snapshot_tables {
            vdi.snapshot_table.set(table);
        }
        self.roots.set(done.roots);
        self.checkpoints.damaged.written(&frozen.rewritten);
        // The blocks of what is written afresh are left too.
        self.collector.suspect(merge.left + as_u64(frozen.rewritten.len()));
        if let Some(known) = merge.bad_known {
            self.checkpoints.bad_known.set(known);
        }
        let nodes: usize =
            shed.iter().map(|generation| generation.overlay.borrow().node_count()).sum();
        self.changed_nodes.set(self.changed_nodes.get().saturating_sub(as_u64(nodes)));
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
            nodes_written: merge.nodes_written,
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
        Ok(())
    }

    /// Runs checkpoints when they are due, until the store is closed: while it closes, requests
    /// under way may wait for the room that only a checkpoint makes.
    pub(crate) async fn checkpoint_when_due(self: Rc<Self>) {
        loop {
            let wanted = self.checkpoints.wanted.changed();
            if self.closed.get() || self.scheduler.failure().is_some() {
                return;
            }
            if self.checkpoint_is_due() {
                if let Err(error) = self.checkpoint(SlotState::Running).await {
                    self.stop_if_hopeless(&error);
                    self.runtime.sleep(RETRY_AFTER).await;
                }
                continue;
            }
            wanted.await;
        }
    }

    /// After a checkpoint that failed: stops the store if guests have waited for one that succeeds
    /// for long. An error is better than to hang for ever (G10).
    fn stop_if_hopeless(&self, error: &Error) {
        let guests_wait = self.log.is_full() || self.is_full_of_changes();
        let now = self.runtime.now();
        let failing_since = &self.checkpoints.failing_since;
        let since = failing_since.get().unwrap_or(now);
        failing_since.set(guests_wait.then_some(since));
        if !guests_wait || now.since(since) < FAILING_MAX {
            return;
        }
        tracing::error!(%error, "no checkpoint succeeds, and guests wait for one");
        let cause = match error.kind() {
            ErrorKind::NoSpace => device::Cause::NoSpace,
            _ => device::Cause::Errno(EIO),
        };
        self.scheduler.fail(device::DeviceError::new(cause, Pba::new(0)));
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

fn freeze_vdi(vdi: &Rc<Vdi>) -> FrozenVdi {
    let snapshots = vdi.snapshots.borrow();
    let dirty = std::mem::take(&mut *vdi.snapshots_dirty.borrow_mut());
    FrozenVdi {
        vdi: Rc::clone(vdi),
        branch: Rc::clone(&vdi.branch.borrow()),
        block_count: vdi.block_count.get(),
        snapshot_next: vdi.snapshot_next.get(),
        snapshot_count: as_u64(snapshots.len()),
        snapshots: dirty
            .into_keys()
            .map(|number| (number.get(), snapshots.get(&number).map(Rc::clone)))
            .collect(),
    }
}

/// The new trees.
struct Done {
    branches: Vec<MergedBranch>,
    snapshot_tables: Vec<(Rc<Vdi>, RootRef)>,
    roots: Roots,
}

impl Merge {
    fn new(engine: &Rc<Engine>) -> Self {
        Self {
            engine: Rc::clone(engine),
            batch: Batch::default(),
            allocated: Rc::default(),
            added: Vec::new(),
            replaced: Vec::new(),
            made_live: 0,
            cleared: 0,
            dead: Vec::new(),
            points: HashMap::new(),
            nodes_written: 0,
            garbage: Vec::new(),
            left: 0,
            extents: Vec::new(),
            bad_known: None,
        }
    }

    async fn run(&mut self, frozen: &mut Frozen) -> Result<Done, Error> {
        // What nothing reaches goes the way of what was replaced.
        self.garbage = self.engine.collector.take_garbage();
        self.replaced.extend(&self.garbage);
        let mut branches = Vec::with_capacity(frozen.branches.len());
        // A base is older than what is built on it: its points have their trees in time.
        for (branch, is_head) in &frozen.branches {
            let merged = self.merge_branch(branch, *is_head, frozen.cut).await?;
            branches.push(merged);
        }
        let mut roots = frozen.roots;
        let (vdis, snapshot_tables) = self.vdi_records(frozen, &branches).await?;
        let on_damage = match frozen.rewritten.contains(&Table::Vdis) {
            true => OnDamage::Forget,
            false => OnDamage::Fail,
        };
        roots.vdis = self.store(Table::Vdis, roots.vdis, &vdis, on_damage).await?;
        let directory = &frozen.directory;
        roots.directory =
            self.store(Table::Directory, roots.directory, directory, OnDamage::Fail).await?;
        roots.bad_blocks = self.store_bad_blocks(roots.bad_blocks).await?;
        // The table's own blocks may take an extent, which belongs into it too.
        loop {
            self.engine.allocator.reclaim_empty_extents();
            let extents = self.extent_records();
            if extents.is_empty() {
                break;
            }
            roots.extents =
                self.store(Table::Extents, roots.extents, &extents, OnDamage::Fail).await?;
        }
        roots.bitmaps = self.store_bitmaps(roots.bitmaps).await?;
        Ok(Done { branches, snapshot_tables, roots })
    }

    /// Merges one branch: a tree for each point that somebody wants, and one for the head.
    async fn merge_branch(
        &mut self,
        branch: &Rc<Branch>,
        is_head: bool,
        cut: Lsn,
    ) -> Result<MergedBranch, Error> {
        let (mut root, label, shared_up_to) = self.start_of(branch)?;
        let passed: Vec<Rc<Point>> = {
            let points = branch.points.borrow();
            points.iter().filter(|point| point.position <= cut).map(Rc::clone).collect()
        };
        // Held by the branch and by `passed`: nobody else wants it any more.
        let wanted: Vec<Rc<Point>> =
            passed.iter().filter(|point| Rc::strong_count(point) > 2).map(Rc::clone).collect();
        let generation_count = branch.generations.borrow().len() - 1;
        let intervals = self.gather(branch, generation_count, &wanted).await;
        let last = intervals.len() - 1;
        let mut births = Births { label, shared_up_to };
        for (index, changes) in intervals.into_iter().enumerate() {
            if index == last && !is_head {
                // Nothing reads the head of a branch that a rollback or deletion has left.
                self.dead.extend(changes.iter().filter_map(mapped));
                break;
            }
            if index > 0 && !base::mutant::active("snapshot_shares_nothing") {
                // What the snapshot before holds is shared from here on.
                births.shared_up_to = label;
            }
            if index == last && index > 0 {
                births.label = next_label(label)?;
            }
            let changes = newest_only(changes, &mut self.dead);
            root = self.update(root, births, &changes).await?;
            if let Some(point) = wanted.get(index) {
                self.points.insert(Rc::as_ptr(point), (root, label));
            }
        }
        Ok(MergedBranch {
            branch: Rc::clone(branch),
            root,
            label: births.label,
            shared_up_to: births.shared_up_to,
            points: passed,
            generation_count,
        })
    }

    /// The tree that a branch continues, the label of its new entries, and what it shares.
    fn start_of(&self, branch: &Branch) -> Result<(RootRef, BirthLabel, BirthLabel), Error> {
        match &*branch.base.borrow() {
            Base::Root(root) => Ok((*root, branch.label.get(), branch.shared_up_to.get())),
            Base::Point(_, point) => {
                let merged = self.points.get(&Rc::as_ptr(point)).copied();
                let resolved = point.root.get().map(|root| (root, point.label.get()));
                let (root, label) = merged.or(resolved).ok_or_else(|| {
                    Error::refused(ErrorKind::Corrupt, "a branch was merged before its base")
                })?;
                // Everything that it starts with is shared; labels never go back (rule 33).
                let shared_up_to = label.max(branch.label.get());
                Ok((root, next_label(shared_up_to)?, shared_up_to))
            }
        }
    }

    /// All changes of the frozen generations, by the interval between points that they lie in.
    async fn gather(
        &mut self,
        branch: &Rc<Branch>,
        generation_count: usize,
        wanted: &[Rc<Point>],
    ) -> Vec<Vec<Change>> {
        let mut intervals = vec![Vec::new(); wanted.len() + 1];
        let generations: Vec<_> =
            branch.generations.borrow().iter().take(generation_count).map(Rc::clone).collect();
        let mut chunk = Vec::new();
        for generation in generations {
            self.dead.extend(generation.dead.borrow().iter());
            let mut after = None;
            loop {
                after = generation.overlay.borrow().chunk(after, NODES_PER_TURN, &mut chunk);
                for change in chunk.drain(..) {
                    let index = wanted.partition_point(|point| point.position <= change.lsn);
                    if let Some(interval) = intervals.get_mut(index) {
                        interval.push(change);
                    }
                }
                if after.is_none() {
                    break;
                }
                self.engine.runtime.yield_now().await;
            }
        }
        intervals
    }

    async fn update(
        &mut self,
        root: RootRef,
        births: Births,
        changes: &[Change],
    ) -> Result<RootRef, Error> {
        let height = changes.iter().fold(root.height, |height, change| {
            let end = change.start + span(change.level);
            height.max(RootRef::height_for(end)).max(change.level + 1)
        });
        let engine = Rc::clone(&self.engine);
        let allocated = Rc::clone(&self.allocated);
        let mut allocate = engine.node_blocks(&allocated);
        let batch = self.batch.clone();
        let mut writer = TreeWriter {
            nodes: &engine.nodes,
            batch: &batch,
            allocate: &mut allocate,
            on_damage: OnDamage::Mark,
            outcome: Outcome::default(),
        };
        let updated = tree::update(&mut writer, births, root, height, changes).await;
        let outcome = writer.outcome;
        self.account(outcome);
        Ok(updated?)
    }

    /// Stores records in a table.
    async fn store<R: ondisk::TableRecord>(
        &mut self,
        table: Table,
        root: RootRef,
        records: &BTreeMap<u64, Option<R>>,
        on_damage: OnDamage,
    ) -> Result<RootRef, Error> {
        if records.is_empty() {
            return Ok(root);
        }
        let engine = Rc::clone(&self.engine);
        let allocated = Rc::clone(&self.allocated);
        let mut allocate = engine.node_blocks(&allocated);
        let batch = self.batch.clone();
        let mut writer = TreeWriter {
            nodes: &engine.nodes,
            batch: &batch,
            allocate: &mut allocate,
            on_damage,
            outcome: Outcome::default(),
        };
        let stored = table::store(&mut writer, root, records).await;
        let outcome = writer.outcome;
        self.account(outcome);
        self.note_damage(table, stored.map_err(Error::from))
    }

    /// Notes that a table is damaged, if that kept it from being stored.
    fn note_damage<T>(&self, table: Table, stored: Result<T, Error>) -> Result<T, Error> {
        stored.inspect_err(|error| {
            if is_damage(error) {
                self.engine.checkpoints.damaged.note(table);
            }
        })
    }

    async fn vdi_records(
        &mut self,
        frozen: &Frozen,
        branches: &[MergedBranch],
    ) -> Result<(BTreeMap<u64, Option<VdiRecord>>, Vec<(Rc<Vdi>, RootRef)>), Error> {
        let mut records = BTreeMap::new();
        let mut tables = Vec::new();
        for id in &frozen.deleted {
            records.insert(id.get(), None);
        }
        for vdi in &frozen.vdis {
            let merged = branches.iter().find(|merged| Rc::ptr_eq(&merged.branch, &vdi.branch));
            let (root, label, shared_up_to) = match merged {
                Some(merged) => (merged.root, merged.label, merged.shared_up_to),
                None => self.start_of(&vdi.branch)?,
            };
            let mut snapshots: BTreeMap<u64, Option<SnapshotRecord>> = BTreeMap::new();
            for (&number, snapshot) in &vdi.snapshots {
                let record = match snapshot {
                    Some(snapshot) => Some(snapshot.record(self.root_of(&snapshot.point)?)),
                    None => None,
                };
                snapshots.insert(number, record);
            }
            let id = vdi.vdi.id;
            let table = vdi.vdi.snapshot_table.get();
            let table = self.store(Table::Snapshots(id), table, &snapshots, OnDamage::Fail).await?;
            tables.push((Rc::clone(&vdi.vdi), table));
            let record = VdiRecord {
                id: vdi.vdi.id,
                block_count: vdi.block_count,
                root,
                lsn: frozen.cut,
                claim: vdi.vdi.claim,
                label,
                shared_up_to,
                snapshots: table,
                snapshot_next: vdi.snapshot_next,
                snapshot_count: vdi.snapshot_count,
                history: vdi.vdi.history,
            };
            records.insert(vdi.vdi.id.get(), Some(record));
        }
        Ok((records, tables))
    }

    fn root_of(&self, point: &Rc<Point>) -> Result<RootRef, Error> {
        let merged = self.points.get(&Rc::as_ptr(point)).map(|&(root, _)| root);
        merged.or(point.root.get()).ok_or_else(|| {
            Error::refused(ErrorKind::Corrupt, "a snapshot was stored before its tree")
        })
    }

    fn extent_records(&mut self) -> BTreeMap<u64, Option<ExtentRecord>> {
        let (owner, epoch) = (self.engine.host, self.engine.epoch);
        let record = |kind| ExtentRecord { kind, owner, epoch };
        let dirty = self.engine.allocator.take_dirty_extents();
        self.extents.extend(dirty.iter().map(|(index, _)| *index));
        dirty.into_iter().map(|(index, kind)| (u64::from(index.get()), kind.map(record))).collect()
    }

    /// Writes the bitmaps as they are once this checkpoint is published. Their own blocks are not
    /// in them: opening a store reads all of them anyway, and learns where they stand.
    async fn store_bitmaps(&mut self, root: RootRef) -> Result<RootRef, Error> {
        let allocator = &self.engine.allocator;
        for &pba in &self.added {
            allocator.set_live(pba)?;
            self.made_live += 1;
        }
        for &pba in &self.replaced {
            allocator.clear_live(pba)?;
            self.cleared += 1;
        }
        let pages = allocator.take_dirty_pages().into_iter().map(|(number, image)| {
            let mut buffer = self.engine.runtime.buffers().take_to_keep(1);
            let bytes = buffer.bytes_mut().get_mut(..BLOCK_SIZE).unwrap_or_default();
            bytes.copy_from_slice(&image[..]);
            (number, buffer)
        });
        let pages: Vec<_> = pages.collect();
        let numbers: Vec<u64> = pages.iter().map(|(number, _)| *number).collect();
        let stored = self.store_pages(Table::Bitmaps, root, pages).await;
        match stored {
            Ok((root, outcome)) => {
                // Busy, never live.
                self.nodes_written += outcome.nodes_written;
                self.dead.extend(outcome.replaced);
                Ok(root)
            }
            Err(error) => {
                for number in numbers {
                    self.engine.allocator.mark_page_dirty(number);
                }
                Err(error)
            }
        }
    }

    async fn store_bad_blocks(&mut self, root: RootRef) -> Result<RootRef, Error> {
        let bad = self.engine.allocator.bad_blocks();
        if bad.len() == self.engine.checkpoints.bad_known.get() {
            return Ok(root);
        }
        let mut pages: BTreeMap<u64, base::Buffer> = BTreeMap::new();
        for pba in &bad {
            let bits = as_u64(BLOCK_SIZE * 8);
            let buffer = pages.entry(pba.get() / bits).or_insert_with(|| base::Buffer::zeroed(1));
            let bit = usize::try_from(pba.get() % bits).unwrap_or(0);
            if let Some(byte) = buffer.bytes_mut().get_mut(bit / 8) {
                *byte |= 1 << (bit % 8);
            }
        }
        let pages = pages.into_iter().collect();
        let (root, outcome) = self.store_pages(Table::BadBlocks, root, pages).await?;
        self.account(outcome);
        self.bad_known = Some(bad.len());
        Ok(root)
    }

    async fn store_pages(
        &mut self,
        table: Table,
        root: RootRef,
        pages: Vec<(u64, base::Buffer)>,
    ) -> Result<(RootRef, Outcome), Error> {
        let engine = Rc::clone(&self.engine);
        let allocated = Rc::clone(&self.allocated);
        let mut allocate = engine.node_blocks(&allocated);
        let batch = self.batch.clone();
        let mut writer = TreeWriter {
            nodes: &engine.nodes,
            batch: &batch,
            allocate: &mut allocate,
            on_damage: OnDamage::Fail,
            outcome: Outcome::default(),
        };
        let stored = table::store_pages(&mut writer, root, pages).await;
        let outcome = writer.outcome;
        Ok((self.note_damage(table, stored.map_err(Error::from))?, outcome))
    }

    fn account(&mut self, outcome: Outcome) {
        self.added.extend(outcome.added);
        self.replaced.extend(outcome.replaced);
        self.dead.extend(outcome.overruled);
        self.left += outcome.left;
        self.nodes_written += outcome.nodes_written;
    }

    /// Leaves a block out of what is given back.
    fn forget(&mut self, pba: Pba) {
        self.allocated.borrow_mut().retain(|&other| other != pba);
    }

    /// Undoes the allocations and bitmap changes of a checkpoint that failed.
    fn give_back(self) {
        let allocator = &self.engine.allocator;
        let undo = || -> Result<(), blockstore::Error> {
            for &pba in self.replaced.iter().take(self.cleared) {
                allocator.set_live(pba)?;
            }
            for &pba in self.added.iter().take(self.made_live) {
                allocator.clear_live(pba)?;
            }
            Ok(())
        };
        if let Err(error) = undo() {
            tracing::error!(%error, "a failed checkpoint could not be undone");
        }
        for &index in &self.extents {
            allocator.mark_extent_dirty(index);
        }
        self.engine.collector.put_garbage(self.garbage);
        for pba in self.allocated.take() {
            self.engine.nodes.cache().remove(pba);
            allocator.free_now(blockstore::allocator::Run { start: pba, count: 1 });
        }
    }
}

fn mapped(change: &Change) -> Option<Pba> {
    (change.entry.state() == ondisk::EntryState::Mapped).then(|| change.entry.pba())
}

fn next_label(label: BirthLabel) -> Result<BirthLabel, Error> {
    if base::mutant::active("labels_wrap") {
        return Ok(BirthLabel::new((label.get() + 1) % 4));
    }
    label.get().checked_add(1).map(BirthLabel::new).ok_or_else(labels_used_up)
}
