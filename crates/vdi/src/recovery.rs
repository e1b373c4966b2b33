//! Opening a store: choose the slot, read the log, keep what was promised, begin a new epoch.
//!
//! Up to F, the durable point, every record counts as it stands. Above it, a write counts if its
//! data verifies, each by itself (design rule 2); what counts is *written again*, data to new
//! blocks and records to the new epoch's log, because a device that failed a flush may still show
//! bytes that it will never keep (rule 56). Then the old log is sealed at F. So after recovery
//! everything stands below a flush that succeeded, and older epochs are never asked again (rule 7).
//!
//! No tree node is read: replay fills overlays, whatever the size of the store (rule 16).

mod rewrite;
mod tables;
mod verify;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use base::{BirthLabel, Epoch, ErrorKind, HostId, Lsn, Pba, StoreUuid, VdiId};
use blockstore::allocator::{Allocator, Run, Space};
use blockstore::log::{Break, Log, LogConfig, Replayed, survey};
use blockstore::scheduler::Batch;
use blockstore::slots::{SlotPair, SlotWriter, check_vouched, read_slots};
use blockstore::{Geometry, NodeStore, ReadEpochs, WriteScheduler, superblock, tree};
use device::Device;
use ondisk::{
    COMPATIBLE_KEEPS_SPACE, Checksums, Entry, HostSlot, INCOMPATIBLE_HISTORY, INCOMPATIBLE_HOLDS,
    INCOMPATIBLE_WRITES, LOG_SEGMENTS_MAX, LogBlock, LogSegment, Origin,
    READ_ONLY_COMPATIBLE_BUDGETS, Record, RecordBody, RootRef, SUPERBLOCK_COPIES, SlotState,
};
use runtime::Runtime;
use runtime::sync::{Semaphore, Signal};

use crate::branch::Base;
use crate::checkpoint::Checkpoints;
use crate::claim::{Claim, Place};
use crate::damage::is_damage;
use crate::engine::{Engine, Registry, as_u64};
use crate::gc::{Collector, nodes_of_marks};
use crate::mark::BlockSet;
use crate::release::Releases;
use crate::reserve::Reserve;
use crate::retention::Retention;
use crate::scrub::Scrubber;
use crate::start::Start;
use crate::trim::Trimmer;
use crate::types::{OpenOptions, OpenReport};
use crate::vdi::Vdi;
use crate::write::pieces;
use crate::{Error, check};

use verify::Dropped;

/// The one host that runs today.
const HOST: HostId = HostId::new(0);

/// Opens the store on `device`.
///
/// # Errors
/// See [`crate::Store::open`].
pub(crate) async fn open(
    device: Device,
    runtime: Runtime,
    options: &OpenOptions,
) -> Result<(Rc<Engine>, OpenReport), Error> {
    let (error, restored) = match open_as_is(device.clone(), runtime.clone(), options).await {
        Ok(opened) => return Ok(opened),
        Err(NotOpened::ForTables(error)) => {
            tracing::error!(%error, "the store's tables are damaged");
            let restored = check::restore_tables(&device, &runtime, options).await?;
            (error, restored)
        }
        Err(NotOpened::For(error)) => return Err(error),
    };
    let Some(repairs) = restored else { return Err(error) };
    match open_as_is(device, runtime, options).await {
        Ok((engine, mut report)) => {
            report.alarms.extend(repairs);
            Ok((engine, report))
        }
        Err(NotOpened::For(error) | NotOpened::ForTables(error)) => Err(error),
    }
}

/// Why a store could not be opened.
enum NotOpened {
    /// Control tables are damaged. Nothing has been written.
    ForTables(Error),
    For(Error),
}

impl<E: Into<Error>> From<E> for NotOpened {
    fn from(error: E) -> Self {
        Self::For(error.into())
    }
}

async fn open_as_is(
    device: Device,
    runtime: Runtime,
    options: &OpenOptions,
) -> Result<(Rc<Engine>, OpenReport), NotOpened> {
    let mut report = OpenReport::default();
    let found = superblock::read(&device, &runtime, true).await?;
    let geometry = Geometry::new(&found.superblock);
    let checksums = Checksums::new(found.superblock.uuid, &found.superblock.key);
    let pair = read_slots(&device, &runtime, &geometry, &checksums, HOST).await?;
    if pair.other_damaged {
        report.alarms.push("one copy of the host slot was damaged; the other one was used".into());
    }
    let claim = {
        let place = Place {
            device: &device,
            runtime: &runtime,
            geometry: &geometry,
            checksums: &checksums,
            host: HOST,
        };
        Claim::make(&place, &pair.newest, options.boot_id, options.nonce).await?
    };
    let (replayed, broken) =
        read_log(&device, &runtime, &geometry, &checksums, &pair.newest).await?;
    report.clean = pair.newest.state == SlotState::Clean;

    let engine = build(device, runtime, options, geometry, checksums, &pair, (&replayed, broken))?;
    if found.superblock.features.compatible & COMPATIBLE_KEEPS_SPACE != 0 {
        engine.trimmer.turn_off();
    }
    let features = found.superblock.features;
    engine.keeps_history.set(features.incompatible & INCOMPATIBLE_HISTORY != 0);
    engine.keeps_writes.set(features.incompatible & INCOMPATIBLE_WRITES != 0);
    engine.has_holds.set(features.incompatible & INCOMPATIBLE_HOLDS != 0);
    engine.has_budgets.set(features.read_only_compatible & READ_ONLY_COMPATIBLE_BUDGETS != 0);
    engine.nodes.set_patient(true);
    engine.load_tables(&mut report).await.map_err(|error| match is_damage(&error) {
        true => NotOpened::ForTables(error),
        false => NotOpened::For(error),
    })?;
    let records = replayed.records.iter().filter(|(lsn, _)| *lsn > pair.newest.cut);
    let mut named = BlockSet::default();
    for (lsn, record) in records {
        // Also what does not count stays untouched until the new epoch is published: a crash
        // during recovery must find it again.
        engine.keep_data(*lsn, record, &mut named)?;
    }
    let (settled, doubtful): (Vec<_>, Vec<_>) = replayed
        .records
        .into_iter()
        .filter(|(lsn, _)| *lsn > pair.newest.cut)
        .partition(|(lsn, _)| *lsn <= replayed.durable);
    for (lsn, record) in settled {
        engine.apply(lsn, &record).await?;
        report.records_replayed += 1;
    }
    if let Some(at) = replayed.unreadable {
        report.alarms.push(format!(
            "the log ends at block {at}, which cannot be read: what was acknowledged or flushed last \
             may be lost"
        ));
    }
    if let Some(broken) = broken {
        report.alarms.push(format!(
            "the log is damaged at block {}: of records {} to {}, which were durable, some are \
             lost; every VDI is read-only, as it was before, until `parallax check --repair`",
            broken.at, broken.lsn, broken.durable
        ));
        return Ok((engine, report));
    }
    // The slots, and what they name, may have been read from a volatile cache (rule 8).
    engine.scheduler.flush().await.map_err(blockstore::Error::from)?;
    claim.verify(&engine.place(), &pair.newest).await?;
    let _kept = claim.keep(&engine.place());
    let sealed_at = match base::mutant::active("dropped_records_come_back") {
        true => Lsn::new(replayed.lsn_next.get().saturating_sub(1)),
        false => replayed.durable,
    };
    engine.begin_epoch(&found, &pair, options, doubtful, sealed_at, &mut report).await?;
    claim.verify(&engine.place(), &engine.published()?).await?;
    engine.nodes.set_patient(false);
    // From now on deletions, which make space, find room for their nodes.
    let marks = engine.collector.unstored_marks().map_or(0, |marked| nodes_of_marks(&marked));
    if !engine.fill_reserve(engine.nodes_needed() + 2 * marks).await?
        && !engine.fill_reserve(engine.nodes_needed()).await?
    {
        report.alarms.push("there is no space for metadata: writes are refused".into());
    }
    let registry = engine.registry.borrow();
    report.alarms.extend(registry.lost.iter().map(|id| {
        let name = registry.directory.get(*id).map_or("", |record| &record.name);
        format!("{name} (VDI {id}) is lost: its record is damaged, or that of its origin")
    }));
    drop(registry);
    Ok((engine, report))
}

/// The log, and where it is damaged: in its middle, as something behind proves that what is missing
/// was durable (design rule 9).
async fn read_log(
    device: &Device,
    runtime: &Runtime,
    geometry: &Geometry,
    checksums: &Checksums,
    slot: &HostSlot,
) -> Result<(Replayed, Option<Break>), Error> {
    if slot.state == SlotState::Running {
        let mut see = |_: &LogSegment, _: &LogBlock| {};
        let (log, segments) = (slot.log_start, &slot.segments);
        let (replayed, broken) =
            survey(device, runtime, geometry, log, checksums, segments, &mut see).await?;
        if let Some(broken) = broken
            && broken.durable < broken.lsn
        {
            // It is the slot that is too old.
            return Err(blockstore::Error::Damaged { what: broken.what, at: broken.at }.into());
        }
        check_vouched(slot, replayed.slot_sequence)?;
        return Ok((replayed, broken));
    }
    // Closed cleanly: the last segment says where the log goes on.
    let last = slot.segments.last();
    let replayed = Replayed {
        end: last.map_or_else(Default::default, |segment| segment.start),
        lsn_next: last.map_or(Lsn::new(1), |segment| segment.first_lsn),
        durable: slot.cut,
        ..Replayed::default()
    };
    Ok((replayed, None))
}

fn build(
    device: Device,
    runtime: Runtime,
    options: &OpenOptions,
    geometry: Geometry,
    checksums: Checksums,
    pair: &SlotPair,
    (replayed, broken): (&Replayed, Option<Break>),
) -> Result<Rc<Engine>, Error> {
    let slot = &pair.newest;
    let scheduler = WriteScheduler::new(runtime.clone(), device.clone());
    let older_epoch = pair.older.as_ref().map_or(Epoch::default(), |older| older.epoch);
    let epoch = Epoch::new(slot.epoch.max(older_epoch).get() + 1);
    let lsn_next = replayed.lsn_next.max(slot.cut.plus(1));
    let live = slot.state == SlotState::Running;
    let first = slot.segments.first().filter(|_| live);
    let config = LogConfig {
        geometry: geometry.clone(),
        log_start: slot.log_start,
        checksums: checksums.clone(),
        epoch,
        nonce: options.nonce,
        position: replayed.end,
        first_lsn: lsn_next,
        tail: first.map_or(replayed.end, |segment| segment.start),
        slot_sequence: slot.sequence,
    };
    if replayed.end.distance_from(config.tail) > geometry.ring_blocks {
        return Err(Error::refused(ErrorKind::Corrupt, "the log is longer than its ring"));
    }
    let log = Log::start(runtime.clone(), scheduler.clone(), config);
    let nodes = NodeStore::new(
        runtime.clone(),
        device.clone(),
        scheduler.clone(),
        checksums.clone(),
        options.cache_bytes,
    );
    let failures = slot.failures.wrapping_add(options.after_failure.into());
    let slots = SlotWriter::new(
        scheduler.clone(),
        geometry.clone(),
        checksums.clone(),
        HostSlot { epoch, boot_id: options.boot_id, failures, ..slot.clone() },
        pair.copy,
    );
    let allocator = Allocator::new(geometry.block_count, geometry.extent_blocks);
    allocator.prefer(options.reuse);
    let opened_at = runtime.now();
    Ok(Rc::new(Engine {
        allocator,
        failures,
        runtime,
        device,
        host: HOST,
        epoch,
        boot_id: options.boot_id,
        log_start: slot.log_start,
        geometry,
        checksums,
        scheduler,
        log,
        nodes,
        epochs: ReadEpochs::default(),
        slots: RefCell::new(Some(slots)),
        roots: Cell::new(slot.roots),
        segments: RefCell::new(if live { slot.segments.clone() } else { Vec::new() }),
        registry: RefCell::new(Registry { id_next: slot.vdi_id_next, ..Registry::default() }),
        checkpoints: Checkpoints::new(),
        reserve: Reserve::new(),
        collector: Collector::new(opened_at, options.marks_stored_every, options.gc_memory_bytes),
        releases: Releases::default(),
        trimmer: Trimmer::new(),
        scrubber: Scrubber::new(),
        read_only: broken.is_some(),
        active: Cell::new(0),
        idle: Signal::default(),
        closing: Cell::new(false),
        closed: Cell::new(false),
        ended: Cell::new(false),
        unflushed: Cell::new(0),
        changed_nodes: Cell::new(0),
        owed_nodes: Cell::new(0),
        keeps_history: Cell::new(false),
        idle_vdis_max: options.idle_vdis_max,
        has_holds: Cell::new(false),
        keeps_writes: Cell::new(false),
        has_budgets: Cell::new(false),
        counted: RefCell::default(),
        ending_holds: Cell::new(false),
        default_retention: RefCell::new(Retention::new(slot.retention.clone())),
        full: Cell::new(false),
        full_told: Cell::new(None),
        branch_serial: Cell::new(0),
        starts: RefCell::default(),
        stats: RefCell::default(),
        management: Semaphore::new(1),
        thinning: Semaphore::new(1),
        keeping: Cell::new(false),
        opened_store_ns: slot.store_ns,
        opened_at,
    }))
}

impl Engine {
    /// Keeps the blocks that a record names from being allocated. A block that a record above the
    /// cut names was free at the cut, and is named once: releasing it again, or under somebody
    /// else, would be the end of the engine.
    fn keep_data(&self, lsn: Lsn, record: &Record, named: &mut BlockSet) -> Result<(), Error> {
        let RecordBody::Write { pba, hashes, .. } = &record.body else { return Ok(()) };
        if base::mutant::active("recovery_forgets_log_blocks") {
            return Ok(());
        }
        let run = Run { start: *pba, count: as_u64(hashes.len()) };
        self.allocator.mark_busy(run.start, run.count, Space::Data).inspect_err(|error| {
            tracing::error!(%lsn, %error, "a log record names blocks that cannot hold data");
        })?;
        let taken = run.blocks().find(|&at| self.allocator.is_live(at) || !named.insert(at));
        let Some(at) = taken else { return Ok(()) };
        tracing::error!(%lsn, block = %at, "a log record names somebody else's block");
        let what = "log record (it names somebody else's block)";
        Err(blockstore::Error::Damaged { what, at }.into())
    }

    /// Applies a record.
    async fn apply(self: &Rc<Self>, lsn: Lsn, record: &Record) -> Result<(), Error> {
        match &record.body {
            RecordBody::Create { .. } | RecordBody::Clone { .. }
                if self.registry.borrow().directory.contains(record.vdi) =>
            {
                let message = format!("the log creates VDI {} a second time", record.vdi);
                return Err(Error::refused(ErrorKind::Corrupt, message));
            }
            RecordBody::Create { block_count, wall_ns, name } => {
                let base = Base::Root(RootRef::empty(1));
                let id = (record.vdi, lsn);
                self.apply_create(id, *block_count, *wall_ns, name, None, base);
                return Ok(());
            }
            RecordBody::Clone { source, snapshot, position, wall_ns, name } => {
                let (number, position) = (*snapshot, *position);
                let from = (*source, number);
                let source = self.surviving(*source).await?;
                let start = source.as_ref().and_then(|vdi| Start::recorded(vdi, number, position));
                let is_of_head = number.get() == 0 && position.is_none();
                match &source {
                    Some(source) if start.is_some() || is_of_head => {
                        let start = start.as_ref();
                        self.apply_clone(record.vdi, source, start, lsn, *wall_ns, name);
                    }
                    _ => {
                        self.apply_lost_clone((record.vdi, lsn), from, *wall_ns, name);
                        self.lose(record.vdi);
                    }
                }
                return Ok(());
            }
            RecordBody::Void { .. } | RecordBody::Time { .. } => return Ok(()),
            RecordBody::RetainByDefault { rules } => {
                self.apply_retain_by_default(Retention::new(rules.clone()), lsn);
                return Ok(());
            }
            _ => {}
        }
        if !self.registry.borrow().directory.contains(record.vdi) {
            // Deleted by an earlier record: what was on its way then has no home.
            return Ok(());
        }
        let Some(vdi) = self.surviving(record.vdi).await? else {
            match &record.body {
                RecordBody::Rename { name } => self.apply_rename(record.vdi, name),
                RecordBody::Delete => self.apply_delete_lost(record.vdi),
                _ => self.lose(record.vdi),
            }
            return Ok(());
        };
        if vdi.claim != record.claim {
            // Of an earlier claim: the tree has it (design rule 48).
            return Ok(());
        }
        match &record.body {
            RecordBody::Write { lba, pba, hashes } => {
                self.touch(&vdi);
                let branch = Rc::clone(&vdi.branch.borrow());
                let generation = branch.active();
                // What lies behind the end is nobody's, whatever wrote the record.
                let within = vdi.block_count.get().saturating_sub(lba.get());
                vdi.note_changed(as_u64(hashes.len()));
                branch.writes.note(lsn, as_u64(hashes.len()));
                for (index, &hash) in (0..within).zip(hashes) {
                    let entry = Entry::mapped(pba.plus(index), hash, BirthLabel::default());
                    let start = lba.get() + index;
                    let change = tree::Change { level: 0, start, lsn, entry };
                    self.install(&branch, &generation, &change);
                }
                let behind = within.min(as_u64(hashes.len()))..as_u64(hashes.len());
                self.replaced_by_recovery(behind.map(|index| pba.plus(index)));
            }
            RecordBody::Range { lba, count, state } => {
                self.touch(&vdi);
                let branch = Rc::clone(&vdi.branch.borrow());
                let generation = branch.active();
                let end = lba.get().saturating_add(*count).min(vdi.block_count.get());
                let range = (lba.get(), end);
                let level_max = Self::level_max(vdi.block_count.get());
                vdi.note_changed(*count);
                let (piece_count, is_large) = pieces(range.0, range.1, level_max);
                branch.writes.note(lsn, piece_count);
                if is_large {
                    branch.writes.break_at(lsn.plus(1));
                }
                self.install_range(&branch, &generation, lsn, range, *state, level_max);
            }
            RecordBody::Snapshot { number, wall_ns, store_ns, label, origin } => {
                let times = (*wall_ns, *store_ns);
                let forgets = matches!(origin, Origin::Received(_))
                    && base::mutant::active("received_snapshot_forgets_its_origin");
                let origin = if forgets { &Origin::Asked } else { origin };
                self.apply_snapshot(&vdi, *number, lsn, times, (label, *origin));
                if matches!(origin, Origin::Kept { .. }) {
                    vdi.changed_blocks.set(0);
                }
            }
            RecordBody::DeleteSnapshot { number } => self.apply_delete_snapshot(&vdi, *number),
            RecordBody::Rename { name } => self.apply_rename(vdi.id, name),
            RecordBody::Resize { block_count } => self.apply_resize(&vdi, *block_count, lsn),
            RecordBody::Delete => self.apply_delete(&vdi),
            RecordBody::Rollback { number, position } => {
                match Start::recorded(&vdi, *number, *position) {
                    Some(start) => self.apply_rollback(&vdi, &vdi, &start, lsn),
                    // Lost, and the VDI was nothing else any more.
                    None => self.lose(vdi.id),
                }
            }
            RecordBody::Adopt { .. } if base::mutant::active("adopt_is_not_replayed") => {}
            RecordBody::Adopt { source, number } => {
                let source = self.surviving(*source).await?;
                let start = source.and_then(|source| {
                    Start::recorded(&source, *number, None).map(|start| (source, start))
                });
                match start {
                    Some((source, start)) => self.apply_rollback(&vdi, &source, &start, lsn),
                    None => self.lose(vdi.id),
                }
            }
            RecordBody::Retain { rules } => {
                self.apply_retain(&vdi, rules.clone().map(Retention::new), lsn);
            }
            RecordBody::Hold { number, wall_ns, store_ns, until } => {
                self.apply_hold(&vdi, *number, *until, (*wall_ns, *store_ns));
            }
            RecordBody::EndHold { number, wall_ns, store_ns, is_due } => {
                self.apply_end_hold(&vdi, *number, *is_due, (*wall_ns, *store_ns));
            }
            RecordBody::RetainByDefault { .. }
            | RecordBody::Create { .. }
            | RecordBody::Clone { .. }
            | RecordBody::Void { .. }
            | RecordBody::Time { .. } => {}
        }
        Ok(())
    }

    /// The VDI with this id; `None` if damage has left nothing of it, or the log names one that is none.
    async fn surviving(self: &Rc<Self>, id: VdiId) -> Result<Option<Rc<Vdi>>, Error> {
        match self.vdi(id).await {
            Ok(vdi) => Ok(Some(vdi)),
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Gives up a VDI that the log changes, and of which there is nothing to change: what is left
    /// must not be taken for all of it later.
    fn lose(&self, id: VdiId) {
        let mut registry = self.registry.borrow_mut();
        if let Some(vdi) = registry.loaded.remove(&id) {
            vdi.branch.borrow().is_head.set(false);
        }
        registry.dirty.insert(id);
        if registry.lost.insert(id) {
            tracing::error!(disk = registry.name(id), "the disk is lost: its record is damaged");
        }
    }

    /// Publishes the new epoch, writes again what counts above F, and seals the old log.
    async fn begin_epoch(
        self: &Rc<Self>,
        found: &superblock::Found,
        pair: &SlotPair,
        options: &OpenOptions,
        doubtful: Vec<(Lsn, Record)>,
        durable: Lsn,
        report: &mut OpenReport,
    ) -> Result<(), Error> {
        let old = &pair.newest;
        // Both copies leave the older state before anything that it names can be reused.
        self.publish_open(old.clone()).await?;
        if !found.damaged.is_empty() {
            let [primary, secondary] = SUPERBLOCK_COPIES;
            // The intact copy stays until the damaged one is durable again.
            let order = [secondary, primary].into_iter().filter(|at| found.damaged.contains(at));
            let copies: Vec<Pba> = order.collect();
            superblock::write(&self.device, &found.superblock, &copies).await?;
            report.alarms.push("a damaged copy of the superblock was repaired".into());
        }
        let again = self.log.cut();
        let mut dropped = Dropped::default();
        let mut doubtful: Vec<Record> = doubtful.into_iter().map(|(_, record)| record).collect();
        while !doubtful.is_empty() {
            let log_blocks = rewrite::log_blocks(&doubtful);
            let window = doubtful.drain(..rewrite::window(&doubtful)).collect();
            self.rewrite_window(window, log_blocks, &mut dropped, report).await?;
        }
        self.log.durable(self.log.last_lsn()).await.map_err(blockstore::Error::from)?;
        // What was written again is sealed as well: after the next crash there may be no room to do
        // so once more.
        let (again, segment) =
            (LogSegment { last_lsn: self.log.last_lsn(), ..again }, self.log.cut());
        let mut segments = self.segments.borrow().clone();
        if let Some(last) = segments.last_mut()
            && last.last_lsn == Lsn::default()
        {
            last.last_lsn = durable;
            if durable < last.first_lsn {
                segments.pop();
            }
        }
        // What the roots contain already need not be read again.
        segments.retain(|segment| segment.last_lsn > old.cut);
        segments.extend((segment.first_lsn > again.first_lsn).then_some(again));
        segments.push(segment);
        let slot = HostSlot {
            state: SlotState::Running,
            boot_id: options.boot_id,
            segments: segments.clone(),
            vdi_id_next: self.registry.borrow().id_next.max(old.vdi_id_next),
            ..old.clone()
        };
        // Twice: the loss of either copy must not lose this epoch's log.
        self.publish_open(slot.clone()).await?;
        self.publish_open(slot).await?;
        let tail = segments.first().map_or(segment.start, |first| first.start);
        let sequence = self.slots.borrow().as_ref().map_or(0, |slots| slots.current().sequence);
        self.log.published(sequence, old.cut, tail);
        // Two each time: what was written again, and what is sealed next time.
        let crowded = segments.len() + 3 > LOG_SEGMENTS_MAX;
        let has_lost = !self.registry.borrow().lost.is_empty();
        *self.segments.borrow_mut() = segments;
        self.start_checkpoints(segment, self.allocator.bad_blocks().len());
        if crowded || has_lost {
            self.checkpoint_twice().await?;
        }
        Ok(())
    }

    pub(crate) fn place(&self) -> Place<'_> {
        Place {
            device: &self.device,
            runtime: &self.runtime,
            geometry: &self.geometry,
            checksums: &self.checksums,
            host: self.host,
        }
    }

    /// The newest slot that is durable, while none is being published.
    fn published(&self) -> Result<HostSlot, Error> {
        let slots = self.slots.borrow();
        let writer = slots.as_ref().ok_or_else(published_already)?;
        Ok(writer.current().clone())
    }

    async fn publish_open(&self, slot: HostSlot) -> Result<(), Error> {
        let writer = self.slots.borrow_mut().take();
        let mut writer = writer.ok_or_else(published_already)?;
        let current = writer.current();
        let HostSlot { epoch, boot_id, failures, .. } = *current;
        let slot = HostSlot { epoch, boot_id, failures, ..slot };
        let outcome = writer.publish(slot, &Batch::default()).await;
        *self.slots.borrow_mut() = Some(writer);
        outcome?;
        Ok(())
    }
}

fn published_already() -> Error {
    Error::refused(ErrorKind::Fenced, "the store is being published already")
}

/// The identity of a new store.
pub(crate) fn format_options(options: &crate::FormatOptions) -> blockstore::format::Options {
    blockstore::format::Options {
        extent_bytes: options.extent_bytes,
        log_bytes: options.log_bytes,
        force: options.force,
        keep_space: options.keep_space,
        uuid: StoreUuid(options.uuid),
        key: options.secret,
        boot_id: options.boot_id,
    }
}
