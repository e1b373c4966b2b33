//! What all parts of an open store share, and how they wait for space.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::Duration;

use base::{BLOCK_SIZE_U64, BirthLabel, BlockSlice, Epoch, ErrorKind, HostId, Lsn, Pba, VdiId};
use blockstore::allocator::{Allocator, Run, Space};
use blockstore::log::{Admission, Log};
use blockstore::slots::SlotWriter;
use blockstore::tree::Change;
use blockstore::{Geometry, NodeStore, ReadEpochs, WriteScheduler};
use device::{Device, DeviceError};
use ondisk::{Checksums, LogSegment, Record, RecordBody, Roots};
use runtime::Runtime;
use runtime::sync::{OneshotReceiver, Semaphore, Signal};

use crate::branch::{Base, Branch, Generation, Point};
use crate::budget::CountedPasts;
use crate::checkpoint::Checkpoints;
use crate::directory::{ChangedVdis, Directory};
use crate::gc::Collector;
use crate::manage::Appended;
use crate::release::Releases;
use crate::reserve::Reserve;
use crate::retention::Retention;
use crate::scrub::Scrubber;
use crate::trim::Trimmer;
use crate::vdi::Vdi;
use crate::{Error, Stats};

/// A store that is full says so to the log again when so much time has passed: what is discarded
/// and written again may fill it a thousand times a second.
const FULL_TOLD_INTERVAL: Duration = Duration::from_secs(60);

/// How often room for nodes is waited for that others take before it can be used.
const RESERVE_ATTEMPTS_MAX: u32 = 8;

/// The parts of an open store.
pub(crate) struct Engine {
    pub(crate) runtime: Runtime,
    pub(crate) device: Device,
    pub(crate) geometry: Geometry,
    pub(crate) checksums: Checksums,
    pub(crate) host: HostId,
    /// Epoch of this run.
    pub(crate) epoch: Epoch,
    /// How often the store was opened again under its users after its device had failed.
    pub(crate) failures: u64,
    /// Boot of the machine that it runs on.
    pub(crate) boot_id: [u8; 16],
    pub(crate) log_start: Pba,
    pub(crate) scheduler: WriteScheduler,
    pub(crate) log: Log,
    pub(crate) nodes: NodeStore,
    pub(crate) allocator: Allocator,
    pub(crate) epochs: ReadEpochs,
    pub(crate) slots: RefCell<Option<SlotWriter>>,
    /// The trees as the last merge left them; newer than what is published while one is on its way.
    pub(crate) roots: Cell<Roots>,
    /// Segments of the log that the newest slot names.
    pub(crate) segments: RefCell<Vec<LogSegment>>,
    pub(crate) registry: RefCell<Registry>,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) reserve: Reserve,
    pub(crate) collector: Collector,
    /// What the last one counted.
    pub(crate) counted: RefCell<Option<CountedPasts>>,
    pub(crate) releases: Releases,
    pub(crate) trimmer: Trimmer,
    pub(crate) scrubber: Scrubber,
    /// Set if the log is damaged: what is shown is the state before, and nothing is written.
    pub(crate) read_only: bool,
    /// Requests under way, and who waits for their end.
    pub(crate) active: Cell<u64>,
    pub(crate) idle: Signal,
    pub(crate) closing: Cell<bool>,
    /// Set when the last checkpoint is being written: none may follow it.
    pub(crate) closed: Cell<bool>,
    /// Set when it has been written, or has failed.
    pub(crate) ended: Cell<bool>,
    /// Bytes written since the last flush that was asked for by amount.
    pub(crate) unflushed: Cell<u64>,
    /// Tree nodes with changes that no checkpoint has merged yet.
    pub(crate) changed_nodes: Cell<u64>,
    /// Tree nodes that snapshots need beside those, which get a tree in place of a history.
    pub(crate) owed_nodes: Cell<u64>,
    /// Whether snapshots may have a history in place of a tree.
    pub(crate) keeps_history: Cell<bool>,
    /// VDIs that stay in memory though nobody uses them.
    pub(crate) idle_vdis_max: usize,
    /// Which moments are kept of VDIs that have no rules of their own.
    pub(crate) default_retention: RefCell<Retention>,
    /// Whether snapshots may be held, and the store may have a retention of its own.
    pub(crate) has_holds: Cell<bool>,
    /// Whether moments may keep writes.
    pub(crate) keeps_writes: Cell<bool>,
    /// Whether retentions may have a budget.
    pub(crate) has_budgets: Cell<bool>,
    /// Whether holds whose time has come are being ended.
    pub(crate) ending_holds: Cell<bool>,
    /// Set when even forced checkpoints freed nothing; cleared when something is dropped or freed.
    pub(crate) full: Cell<bool>,
    /// When the log was told so.
    pub(crate) full_told: Cell<Option<runtime::Time>>,
    pub(crate) branch_serial: Cell<u64>,
    /// Where branches have started since the last checkpoint froze, by VDI and position.
    pub(crate) starts: RefCell<HashMap<(VdiId, Lsn), Rc<Point>>>,
    pub(crate) stats: RefCell<Stats>,
    /// One change of names and snapshots at a time.
    pub(crate) management: Semaphore,
    /// One who finds the store full gives up moments at a time; the others see what that gave.
    pub(crate) thinning: Semaphore,
    /// Whether a look for moments whose time has come is under way.
    pub(crate) keeping: Cell<bool>,
    pub(crate) opened_store_ns: u64,
    pub(crate) opened_at: runtime::Time,
}

/// Names and what is known of each VDI.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    pub(crate) directory: Directory,
    /// VDIs in use.
    pub(crate) loaded: HashMap<VdiId, Rc<Vdi>>,
    /// Those that are being read from their tables, and by how many.
    pub(crate) loading: HashMap<VdiId, u32>,
    /// VDIs of which the log has changes that nothing is left to apply to. The next checkpoint
    /// takes their records out of the table, so that they stay lost.
    pub(crate) lost: BTreeSet<VdiId>,
    pub(crate) id_next: u64,
    /// VDIs that changed since the last checkpoint; a deleted one is in `directory` no more.
    pub(crate) dirty: ChangedVdis,
    /// Branches with changes or points that no tree has yet, by serial number.
    pub(crate) unsettled: BTreeMap<u64, Rc<Branch>>,
}

impl Registry {
    /// Whether nothing is left of a VDI but what the tables say.
    pub(crate) fn is_gone(&self, id: VdiId) -> bool {
        !self.directory.contains(id) || self.lost.contains(&id)
    }

    /// Pages of tables of VDIs that the next checkpoint writes.
    pub(crate) fn changed_pages(&self) -> u64 {
        self.directory.changed_pages() + self.dirty.pages()
    }

    /// What a person calls a VDI.
    pub(crate) fn name(&self, id: VdiId) -> &str {
        self.directory.get(id).map_or("(deleted)", |record| &record.name)
    }
}

/// A request under way; keeps `close` waiting.
pub(crate) struct ActiveRequest(Rc<Engine>);

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get() - 1);
        if self.0.active.get() == 0 {
            self.0.idle.notify();
        }
    }
}

impl Engine {
    /// Begins a request, unless the store has stopped.
    pub(crate) fn begin(self: &Rc<Self>) -> Result<ActiveRequest, Error> {
        if let Some(error) = self.scheduler.failure() {
            return Err(stopped(&error));
        }
        if self.closing.get() {
            return Err(Error::refused(ErrorKind::Fenced, "the store is being closed"));
        }
        self.active.set(self.active.get() + 1);
        Ok(ActiveRequest(Rc::clone(self)))
    }

    /// Begins a request that changes something.
    pub(crate) fn begin_change(self: &Rc<Self>) -> Result<ActiveRequest, Error> {
        self.refuse_read_only()?;
        self.begin()
    }

    pub(crate) fn refuse_read_only(&self) -> Result<(), Error> {
        if self.read_only {
            return Err(Error::refused(
                ErrorKind::ReadOnly,
                "the log is damaged and the store is read-only: see `parallax check --repair`",
            ));
        }
        Ok(())
    }

    /// Stops taking requests, waits for those under way, and publishes a clean state.
    pub(crate) async fn close(self: &Rc<Self>) -> Result<(), Error> {
        self.closing.set(true);
        while self.active.get() > 0 {
            self.idle.changed().await;
        }
        self.closed.set(true);
        // Ends the task that waits for the next one to be due.
        self.request_checkpoint();
        if self.read_only {
            return Ok(());
        }
        // What is being discarded belongs to whoever opens the store next.
        let _trimming = self.trimmer.one.acquire(1).await;
        let outcome = self.checkpoint(ondisk::SlotState::Clean).await;
        self.ended.set(true);
        outcome
    }

    /// Time that the store has been open in its life, in nanoseconds.
    pub(crate) fn store_ns(&self) -> u64 {
        let since = self.runtime.now().since(self.opened_at).as_nanos();
        self.opened_store_ns.saturating_add(u64::try_from(since).unwrap_or(u64::MAX))
    }

    /// Waits for room in the log for one record, and in memory for what it changes.
    pub(crate) async fn room(&self) -> Result<Admission, Error> {
        self.room_in_memory().await?;
        if self.checkpoint_is_due() {
            // Who waits for room in the log waits for one.
            self.request_checkpoint();
        }
        Ok(self.log.admit().await.map_err(blockstore::Error::from)?)
    }

    /// Appends a record of `vdi`. The caller applies it in the same breath.
    pub(crate) fn append(
        &self,
        room: Admission,
        vdi: &Vdi,
        body: RecordBody,
    ) -> (Lsn, OneshotReceiver<Result<(), DeviceError>>) {
        self.log.append_admitted(room, &Record { vdi: vdi.id, claim: vdi.claim, body })
    }

    /// Waits until a record without data is on the device; it is durable with the next flush.
    pub(crate) async fn complete_record(&self, (lsn, appended): Appended) -> Result<(), Error> {
        wait(appended, self.geometry.extent_start(base::ExtentIndex::new(0))).await?;
        self.log.complete(lsn);
        Ok(())
    }

    /// Waits until a record without data is on the device and durable.
    pub(crate) async fn settle(&self, appended: Appended) -> Result<(), Error> {
        let lsn = appended.0;
        self.complete_record(appended).await?;
        self.make_durable(lsn).await
    }

    /// Waits until a record is durable, with all before it: those that are complete on the device.
    pub(crate) async fn make_durable(&self, lsn: Lsn) -> Result<(), Error> {
        if base::mutant::active("management_without_flush") {
            return Ok(());
        }
        if base::mutant::active("snapshot_ignores_in_flight") {
            return Ok(self.scheduler.flush().await.map_err(blockstore::Error::from)?);
        }
        self.log.durable(lsn).await.map_err(blockstore::Error::from)?;
        Ok(())
    }

    /// A branch that begins now.
    pub(crate) fn new_branch(
        &self,
        base: Base,
        label: BirthLabel,
        shared_up_to: BirthLabel,
    ) -> Rc<Branch> {
        let serial = self.branch_serial.get() + 1;
        self.branch_serial.set(serial);
        Branch::new(serial, base, label, shared_up_to)
    }

    /// Notes that a checkpoint has something to do for a VDI.
    pub(crate) fn touch(&self, vdi: &Vdi) {
        let branch = Rc::clone(&vdi.branch.borrow());
        let mut registry = self.registry.borrow_mut();
        registry.dirty.insert(vdi.id);
        registry.unsettled.entry(branch.serial).or_insert(branch);
    }

    /// Takes free data blocks: as many adjacent ones as there are, up to `count`. Waits for
    /// checkpoints, and for garbage collection, that may free some.
    ///
    /// # Errors
    /// `NoSpace` when even those gave nothing; `Fenced` if the VDI is to go meanwhile, whose range
    /// the caller holds.
    pub(crate) async fn allocate_data(
        self: &Rc<Self>,
        vdi: &Vdi,
        count: u64,
    ) -> Result<Run, Error> {
        let gives_up = || vdi.is_leaving();
        for attempt in 0..2 {
            if let Some(run) = self.take_data(vdi, count).await? {
                return Ok(run);
            }
            if self.full.get() || attempt == 1 {
                break;
            }
            let free_before = self.allocator.free_blocks();
            self.return_windows();
            let released = match self.publish_twice().await {
                Err(error) if error.kind() == ErrorKind::NoSpace => break,
                released => released?,
            };
            // Merging alone may have made the room.
            if let Some(run) = self.take_data(vdi, count).await? {
                return Ok(run);
            }
            self.released(released, gives_up).await;
            if gives_up() {
                return Err(severed());
            }
            if self.allocator.free_blocks() <= free_before && !self.metadata_suffices().await? {
                break;
            }
        }
        // What other VDIs have reserved is better used than refused.
        self.return_windows();
        if let Some(run) = self.take_data(vdi, count).await? {
            return Ok(run);
        }
        let attempt = async || self.take_data(vdi, count).await;
        if let Some(run) = self.collect_until(gives_up, attempt).await? {
            return Ok(run);
        }
        // Moments that nobody asked for are worth less than a write that somebody waits for.
        if let Some(run) = self.thin_until(gives_up, attempt).await? {
            return Ok(run);
        }
        if gives_up() {
            return Err(severed());
        }
        self.note_full();
        Err(Error::refused(
            ErrorKind::NoSpace,
            "the store is full: discard, or delete VDIs or snapshots",
        ))
    }

    /// There is no free block. The log is told, now and then.
    fn note_full(&self) {
        self.full.set(true);
        let now = self.runtime.now();
        if self.full_told.get().is_none_or(|told| now.since(told) >= FULL_TOLD_INTERVAL) {
            self.full_told.set(Some(now));
            tracing::warn!("the store is full: writes that need space are refused");
        }
    }

    /// Free data blocks, if there are some and room for the nodes that name them.
    pub(crate) async fn take_data(&self, vdi: &Vdi, count: u64) -> Result<Option<Run>, Error> {
        if !self.metadata_suffices().await? {
            return Ok(None);
        }
        let run = self.allocator.allocate(Space::Data, &mut vdi.window.borrow_mut(), count);
        if let Some(run) = run {
            self.back_ahead(run);
        }
        Ok(run)
    }

    /// Waits until there is room for the nodes that one more change may need. Who has something that
    /// others wait for may give up.
    ///
    /// # Errors
    /// `NoSpace` when checkpoints gave none.
    pub(crate) async fn reserve_metadata(
        self: &Rc<Self>,
        gives_up: impl Fn() -> bool,
    ) -> Result<(), Error> {
        self.reserve_nodes(0, gives_up).await
    }

    /// Has what is changed written down before a deletion adds to it, if there may be no room for both. A deletion is
    /// never refused for that: it makes room.
    pub(crate) async fn make_way_for_deletion(self: &Rc<Self>) {
        if !matches!(self.metadata_suffices().await, Ok(true)) {
            // Whoever waits for it, or the next one, says what is wrong.
            let _ = self.publish_twice().await;
        }
    }

    /// As [`Self::reserve_metadata`], for a guest's change: moments go before it is refused.
    ///
    /// # Errors
    /// As [`Self::reserve_metadata`].
    pub(crate) async fn reserve_for_guest(self: &Rc<Self>, vdi: &Vdi) -> Result<(), Error> {
        let gives_up = || vdi.is_leaving();
        match self.reserve_metadata(gives_up).await {
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                let attempt = async || Ok(self.metadata_suffices().await?.then_some(()));
                self.thin_until(gives_up, attempt).await?.ok_or(error)
            }
            reserved => reserved,
        }
    }

    /// As [`Self::reserve_metadata`], and for so many nodes more.
    ///
    /// # Errors
    /// `NoSpace` when checkpoints gave none.
    pub(crate) async fn reserve_nodes(
        self: &Rc<Self>,
        nodes: u64,
        gives_up: impl Fn() -> bool,
    ) -> Result<(), Error> {
        if self.metadata_suffices_for(nodes).await? {
            return Ok(());
        }
        match self.publish_twice().await {
            Ok(released) => {
                // Merging alone may have made the room; else what was replaced does.
                if self.metadata_suffices_for(nodes).await? {
                    return Ok(());
                }
                self.released(released, &gives_up).await;
            }
            Err(error) if error.kind() == ErrorKind::NoSpace => {}
            Err(error) => return Err(error),
        }
        if gives_up() {
            return Err(severed());
        }
        if self.metadata_suffices_for(nodes).await? {
            return Ok(());
        }
        let attempt = async || Ok(self.metadata_suffices_for(nodes).await?.then_some(()));
        self.collect_until(&gives_up, attempt).await?.ok_or_else(no_room_for_metadata)
    }

    /// Whether what [`Self::reserve_nodes`] has waited for is still there, for who appends in this breath: others may
    /// have taken it since, and a checkpoint must never lack it (design rule 25).
    ///
    /// # Errors
    /// `NoSpace` when others were faster time and again.
    pub(crate) fn has_metadata_for(&self, nodes: u64, attempts: &mut u32) -> Result<bool, Error> {
        *attempts += 1;
        match self.reserve.block_count() >= self.needed_with(nodes) {
            false if *attempts >= RESERVE_ATTEMPTS_MAX => Err(no_room_for_metadata()),
            is_there => Ok(is_there),
        }
    }

    fn return_windows(&self) {
        for vdi in self.registry.borrow().loaded.values() {
            self.allocator.return_window(&mut vdi.window.borrow_mut());
        }
    }

    /// Applies a change that was recorded while `generation` of `branch` was active.
    pub(crate) fn install(&self, branch: &Branch, generation: &Generation, change: &Change) {
        let before = generation.overlay.borrow().node_count();
        branch.insert(generation, change);
        let added = generation.overlay.borrow().node_count() - before;
        self.changed_nodes.set(self.changed_nodes.get() + as_u64(added));
        self.owed_nodes.set(self.owed_nodes.get() + branch.take_owed());
    }

    /// Counts and reports a block that is not what was written.
    pub(crate) fn alarm_damage(&self, vdi: VdiId, lba: u64, pba: Pba) {
        self.stats.borrow_mut().checksum_failures += 1;
        let registry = self.registry.borrow();
        tracing::error!(
            disk = registry.name(vdi),
            offset = lba.saturating_mul(BLOCK_SIZE_U64),
            block = %pba,
            "data is damaged: reading it fails until it is written again"
        );
    }

    /// Writes data blocks; the receiver answers when they have completed.
    pub(crate) fn write_data(
        &self,
        at: Pba,
        slice: BlockSlice,
    ) -> OneshotReceiver<Result<(), DeviceError>> {
        self.scheduler.write(at, vec![slice])
    }

    /// Greatest level of a subtree that a change of a VDI of this size may cover.
    pub(crate) fn level_max(block_count: u64) -> u8 {
        ondisk::RootRef::height_for(block_count) - 1
    }
}

/// Waits for a device operation of the engine's own.
pub(crate) async fn wait(
    outcome: OneshotReceiver<Result<(), DeviceError>>,
    at: Pba,
) -> Result<(), Error> {
    let gone = |_| Err(DeviceError::new(device::Cause::Gone, at));
    outcome.await.unwrap_or_else(gone).map_err(|error| blockstore::Error::from(error).into())
}

/// The errno that a store stops with when too much of it fails, for another reason than space.
pub(crate) const EIO: i32 = 5;

/// What every request gets after the store has failed.
pub(crate) fn stopped(error: &DeviceError) -> Error {
    Error::refused(
        ErrorKind::Fenced,
        format!("the store stopped after a failed write or flush ({error}); it must be reopened"),
    )
}

fn no_room_for_metadata() -> Error {
    let message = "no room is left for metadata: delete VDIs or snapshots";
    Error::refused(ErrorKind::NoSpace, message)
}

/// What a request gets that was on its way when its disk went.
pub(crate) fn severed() -> Error {
    let message = "the disk was deleted, rolled back or shrunk meanwhile";
    Error::refused(ErrorKind::Fenced, message)
}

pub(crate) fn as_u64(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}
