//! A store: the VDIs of one host on one device.

use std::rc::Rc;
use std::time::Duration;

use base::{BLOCK_SIZE_U64, ErrorKind, SnapshotNumber, VdiId};
use device::{Device, DeviceError};
use disk::Disk;
use runtime::Runtime;

use crate::check::{CheckProgress, CheckReport, NotedHead};
use crate::engine::{Engine, as_u64};
use crate::handle::{SnapshotHandle, VdiHandle};
use crate::manage::not_found;
use crate::retention::Retention;
use crate::trim::Scope;
use crate::vdi::{Outline, Snapshot, Vdi};
use crate::writes::AtWrite;
use crate::{GcReport, GcStatus, ScrubReport, ScrubStatus, background, recovery};

use crate::Error;
use crate::types::{
    FormatOptions, HoldEntry, OpenOptions, OpenReport, Received, Series, SnapshotEntry, Stats,
    Target, VdiDiff, VdiEntry, VdiIntervals, VdiSpace, VdiWrite, VdiWrites, WantedIntervals,
    WantedSeries, WantedWrites,
};

/// An open store. Clones share it. What changes it is finished once it has begun, also if the future
/// that waits for it is dropped.
#[derive(Clone)]
pub struct Store(Rc<Engine>);

impl Store {
    /// Writes an empty store to `device`. Durable on return.
    ///
    /// # Errors
    /// `Busy` with what was found if the device looks used and `force` is not set; `Invalid` for
    /// impossible sizes.
    pub async fn format(
        device: &Device,
        runtime: &Runtime,
        options: &FormatOptions,
    ) -> Result<(), Error> {
        let options = recovery::format_options(options);
        Ok(blockstore::format::format(device, runtime, &options).await?)
    }

    /// Whether [`Self::format`] would go on, for who has something to do before.
    ///
    /// # Errors
    /// As [`Self::format`].
    pub async fn check_format(
        device: &Device,
        runtime: &Runtime,
        options: &FormatOptions,
    ) -> Result<(), Error> {
        let options = recovery::format_options(options);
        Ok(blockstore::format::check(device, runtime, &options).await.map(drop)?)
    }

    /// Writes zeroes over the whole of `device`, before it is formatted: then no block of a file is
    /// written for the first time when guests wait. `progress` is told how many blocks of how many
    /// are done. Durable on return.
    ///
    /// # Errors
    /// If the device fails.
    pub async fn zero(device: &Device, progress: &dyn Fn(u64, u64)) -> Result<(), Error> {
        Ok(blockstore::format::zero(device, progress).await?)
    }

    /// Opens a store: recovers it if it was not closed cleanly, and starts its background tasks
    /// (group commit, periodic flush, checkpoints, heartbeat) on `runtime`. If the log is damaged
    /// in its middle, every VDI is read-only and as it was before that.
    ///
    /// # Errors
    /// `Corrupt` if no superblock or host slot is intact; `Unsupported` for an unknown
    /// incompatible feature; `NotFound` if there is no store on the device.
    pub async fn open(
        device: Device,
        runtime: Runtime,
        options: &OpenOptions,
    ) -> Result<(Self, OpenReport), Error> {
        let (engine, report) = recovery::open(device, runtime, options).await?;
        if !engine.read_only {
            background::start(&engine);
        }
        Ok((Self(engine), report))
    }

    /// Stops taking requests, waits for those in flight, writes a last checkpoint and marks the
    /// store clean. Durable on return.
    ///
    /// # Errors
    /// If the device fails; the store is as after a crash then.
    pub async fn close(&self) -> Result<(), Error> {
        let engine = Rc::clone(&self.0);
        self.finish(async move { engine.close().await }).await
    }

    /// Creates an empty VDI. Durable on return.
    ///
    /// # Errors
    /// `Exists`; `Invalid` for a bad name or size (1 block to 4 PiB; rounded up to whole blocks).
    pub async fn create(&self, name: &str, size_bytes: u64) -> Result<VdiId, Error> {
        let (engine, name) = (Rc::clone(&self.0), name.to_owned());
        self.finish(async move { engine.create(&name, size_bytes).await }).await
    }

    /// Makes a new VDI with the contents of a snapshot, or of a VDI at this moment. Durable on
    /// return; copies no data.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `Invalid`.
    pub async fn clone_vdi(&self, source: &Target, name: &str) -> Result<VdiId, Error> {
        let (engine, source, name) = (Rc::clone(&self.0), source.clone(), name.to_owned());
        self.finish(async move { engine.clone_vdi(&source, &name).await }).await
    }

    /// Takes a snapshot; it holds every write acknowledged before this call and none issued after
    /// it completed. Durable on return.
    ///
    /// # Errors
    /// `NotFound`; `Exists` if the label is taken.
    pub async fn snapshot(&self, name: &str, label: Option<&str>) -> Result<SnapshotNumber, Error> {
        let (engine, name) = (Rc::clone(&self.0), name.to_owned());
        let label = label.map(str::to_owned);
        self.finish(async move { engine.snapshot(&name, label.as_deref()).await }).await
    }

    /// Takes a series of snapshots, at most 25,000 within a second: as [`Self::snapshot`], each at its time after
    /// the call, or as soon after that as can be. All are durable on return; if one cannot be taken, those before
    /// it stay, and the error tells of them.
    ///
    /// # Errors
    /// `NotFound`; `NoSpace`; `Invalid` for a series that is empty or longer.
    pub async fn snapshot_series(&self, name: &str, wanted: WantedSeries) -> Result<Series, Error> {
        let (engine, name) = (Rc::clone(&self.0), name.to_owned());
        self.finish(async move { engine.series(&name, wanted).await }).await
    }

    /// Lists at most `max` VDIs whose names come after `after`, in order of name.
    ///
    /// # Errors
    /// If metadata cannot be read.
    pub async fn list(&self, after: Option<&str>, max: usize) -> Result<Vec<VdiEntry>, Error> {
        let ids = self.0.registry.borrow().directory.after_name(after).take(max).collect();
        self.entries(ids).await
    }

    /// Lists at most `max` VDIs with identities above `after`, in order of those.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub async fn list_by_id(&self, after: VdiId, max: usize) -> Result<Vec<VdiEntry>, Error> {
        let ids = self.0.registry.borrow().directory.after(after).take(max).collect();
        self.entries(ids).await
    }

    /// The name of a VDI, if there is one with this identity.
    #[must_use]
    pub fn name_of(&self, id: VdiId) -> Option<String> {
        self.0.registry.borrow().directory.get(id).map(|record| record.name.clone())
    }

    async fn entries(&self, ids: Vec<VdiId>) -> Result<Vec<VdiEntry>, Error> {
        let mut entries = Vec::with_capacity(ids.len());
        for id in ids {
            // One that is deleted meanwhile is left out.
            entries.extend(match self.0.outline(id).await {
                Ok(outline) => self.entry(id, Some(outline)),
                Err(error) if error.kind() == ErrorKind::NotFound => None,
                // A damaged one does not hide the others.
                Err(error) if error.kind() == ErrorKind::Corrupt => self.entry(id, None),
                Err(error) => return Err(error),
            });
        }
        Ok(entries)
    }

    /// Lists at most `max` snapshots of a VDI with numbers above `after`; only those that are durable.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn snapshots(
        &self,
        name: &str,
        after: SnapshotNumber,
        max: usize,
    ) -> Result<Vec<SnapshotEntry>, Error> {
        self.snapshots_where(name, after, max, |_| true).await
    }

    /// As [`Self::snapshots`], without the moments that the VDI's retention keeps.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn asked_snapshots(
        &self,
        name: &str,
        after: SnapshotNumber,
        max: usize,
    ) -> Result<Vec<SnapshotEntry>, Error> {
        self.snapshots_where(name, after, max, |snapshot| !snapshot.is_kept()).await
    }

    async fn snapshots_where(
        &self,
        name: &str,
        after: SnapshotNumber,
        max: usize,
        is_wanted: impl Fn(&Snapshot) -> bool,
    ) -> Result<Vec<SnapshotEntry>, Error> {
        let vdi = self.0.find(name).await?;
        let snapshots = vdi.snapshots.borrow();
        let durable = snapshots.after(after).take_while(|snapshot| self.0.is_durable(snapshot));
        let wanted = durable.filter(|snapshot| is_wanted(snapshot));
        Ok(wanted.take(max).map(|snapshot| self.snapshot_entry(&vdi, snapshot)).collect())
    }

    /// Sums up by interval of time what happened to a VDI; only what is durable.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for an interval that is none.
    pub async fn intervals(
        &self,
        name: &str,
        wanted: &WantedIntervals,
    ) -> Result<VdiIntervals, Error> {
        self.0.intervals(name, wanted).await
    }

    /// Describes one snapshot of a VDI, by its label or its number, when it is durable.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn snapshot_info(&self, name: &str, snapshot: &str) -> Result<SnapshotEntry, Error> {
        let target = Target { vdi: name.to_owned(), snapshot: Some(snapshot.to_owned()) };
        let (vdi, found) = self.0.find_durable(&target).await?;
        found.map(|found| self.snapshot_entry(&vdi, &found)).ok_or_else(|| not_found(name))
    }

    /// Describes one VDI, when it is durable; of its snapshots, those count that are.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn info(&self, name: &str) -> Result<VdiEntry, Error> {
        let target = Target { vdi: name.to_owned(), snapshot: None };
        let (vdi, _) = self.0.find_durable(&target).await?;
        self.entry(vdi.id, Some(self.0.outline_of(&vdi))).ok_or_else(|| not_found(name))
    }

    /// Counts the space of a VDI or snapshot by walking its tree. Of a VDI that is written meanwhile,
    /// each part is as it was at some moment of the call.
    ///
    /// # Errors
    /// `NotFound`, also if it is deleted meanwhile; `Corrupt` if a node of it is damaged.
    pub async fn space(&self, target: &Target) -> Result<VdiSpace, Error> {
        let (engine, target) = (Rc::clone(&self.0), target.clone());
        self.finish(async move { engine.space(&target).await }).await
    }

    /// Changes which moments of a VDI are kept by themselves. Durable on return. Those that are not to be
    /// kept any more are deleted soon.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn retain(&self, name: &str, retention: Retention) -> Result<(), Error> {
        let (engine, name) = (Rc::clone(&self.0), name.to_owned());
        self.finish(async move { engine.retain(&name, Some(retention)).await }).await
    }

    /// Keeps of a VDI what is kept of all that have no rules of their own. Durable on return.
    ///
    /// # Errors
    /// As [`Self::retain`].
    pub async fn inherit_retention(&self, name: &str) -> Result<(), Error> {
        let (engine, name) = (Rc::clone(&self.0), name.to_owned());
        self.finish(async move { engine.retain(&name, None).await }).await
    }

    /// Changes which moments are kept of VDIs that have no rules of their own. Durable on return.
    ///
    /// # Errors
    /// `Unsupported` if the store was formatted before there was this.
    pub async fn retain_by_default(&self, retention: Retention) -> Result<(), Error> {
        let engine = Rc::clone(&self.0);
        self.finish(async move { engine.retain_by_default(retention).await }).await
    }

    /// Which moments are kept of VDIs that have no rules of their own.
    #[must_use]
    pub fn default_retention(&self) -> Retention {
        self.0.default_retention.borrow().clone()
    }

    /// Holds a snapshot, by label, number or time: until the hold ends it cannot be deleted, nor its VDI,
    /// and no retention thins it. `until` is a time to come, or how long; what is held may be held longer,
    /// not shorter. Durable on return, and in the VDI's ledger if a checkpoint could be written.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a time that is none, an earlier one, or too many holds; `Unsupported` if
    /// the store was formatted before there were holds.
    pub async fn hold(
        &self,
        name: &str,
        snapshot: &str,
        until: Option<&str>,
    ) -> Result<SnapshotNumber, Error> {
        let (engine, name, snapshot) = (Rc::clone(&self.0), name.to_owned(), snapshot.to_owned());
        let until = until.map(str::to_owned);
        self.finish(async move { engine.hold(&name, &snapshot, until.as_deref()).await }).await
    }

    /// Whether a snapshot could be held until then, for who has something to do before.
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub fn check_until(&self, until: Option<&str>) -> Result<(), Error> {
        self.0.check_until(until)
    }

    /// Ends the hold of a snapshot. Durable on return.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it is not held.
    pub async fn release_hold(&self, name: &str, snapshot: &str) -> Result<SnapshotNumber, Error> {
        let (engine, name, snapshot) = (Rc::clone(&self.0), name.to_owned(), snapshot.to_owned());
        self.finish(async move { engine.release_hold(&name, &snapshot).await }).await
    }

    /// Renames a VDI. Durable on return. Open handles go on.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `Invalid`.
    pub async fn rename(&self, name: &str, new_name: &str) -> Result<(), Error> {
        let (engine, name, new) = (Rc::clone(&self.0), name.to_owned(), new_name.to_owned());
        self.finish(async move { engine.rename(&name, &new).await }).await
    }

    /// Changes the size. Durable on return. Contents beyond a smaller size are gone for ever:
    /// growing again reads zeroes there. Shrinking severs open handles.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`.
    pub async fn resize(&self, name: &str, size_bytes: u64) -> Result<(), Error> {
        let (engine, name) = (Rc::clone(&self.0), name.to_owned());
        self.finish(async move { engine.resize(&name, size_bytes).await }).await
    }

    /// Deletes a VDI with all its snapshots, or one snapshot. Durable on return. Open handles of
    /// what is deleted are severed. Clones are not affected.
    ///
    /// # Errors
    /// `NotFound`; `Busy` if something of it is held.
    pub async fn remove(&self, target: &Target) -> Result<(), Error> {
        let (engine, target) = (Rc::clone(&self.0), target.clone());
        self.finish(async move { engine.remove(&target).await }).await
    }

    /// Makes the VDI's contents those of one of its snapshots, or what they were after a write that is kept
    /// (`lsn:N`). Snapshots stay. Durable on return. Severs open handles of the VDI.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for what is to come.
    pub async fn rollback(&self, name: &str, snapshot: &str) -> Result<(), Error> {
        let (engine, name, snapshot) = (Rc::clone(&self.0), name.to_owned(), snapshot.to_owned());
        self.finish(async move { engine.rollback(&name, &snapshot).await }).await
    }

    /// Makes of a disk into which a snapshot was received what it was received for: a new disk with
    /// that snapshot, or a later snapshot of one that exists, which becomes what it says. Durable on
    /// return. Severs open handles of that disk. The disk that was received into is gone then.
    ///
    /// # Errors
    /// `NotFound`, `Exists`; `Invalid` if the disk has another newest snapshot than the stream builds
    /// on, or was written since it was taken. The disk is as it was then.
    pub async fn complete_receive(&self, received: &Received) -> Result<SnapshotNumber, Error> {
        let (engine, received) = (Rc::clone(&self.0), received.clone());
        self.finish(async move { engine.complete_receive(&received).await }).await
    }

    /// Lists the runs of bytes that differ between two VDIs or snapshots, at most `extents_max` of
    /// them, from the block of byte `offset` on. Walks only what differs. Of a VDI that is written
    /// meanwhile, each part is as it was at some moment of the call.
    ///
    /// # Errors
    /// `NotFound`, also if one is deleted meanwhile; `Corrupt`.
    pub async fn diff(
        &self,
        from: &Target,
        to: &Target,
        offset: u64,
        extents_max: usize,
    ) -> Result<VdiDiff, Error> {
        let (engine, from, to) = (Rc::clone(&self.0), from.clone(), to.clone());
        self.finish(async move { engine.diff(Some(&from), &to, offset, extents_max).await }).await
    }

    /// Lists the runs of bytes that a VDI or snapshot has data for, as [`Self::diff`] would list
    /// them against a VDI that nothing was written to.
    ///
    /// # Errors
    /// As for [`Self::diff`].
    pub async fn mapped(
        &self,
        target: &Target,
        offset: u64,
        extents_max: usize,
    ) -> Result<VdiDiff, Error> {
        let (engine, target) = (Rc::clone(&self.0), target.clone());
        self.finish(async move { engine.diff(None, &target, offset, extents_max).await }).await
    }

    /// Lists the writes that a moment keeps, in the order in which they were made. Each can be opened as
    /// `NAME@lsn:N`.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for one that keeps none.
    pub async fn writes(&self, name: &str, moment: &str) -> Result<Vec<VdiWrite>, Error> {
        let (engine, name, moment) = (Rc::clone(&self.0), name.to_owned(), moment.to_owned());
        let listed = async move {
            let vdi = engine.find(&name).await?;
            let moment = engine.find_moment(&vdi, &name, &moment)?;
            engine.writes(&name, &moment).await
        };
        self.finish(listed).await
    }

    /// Lists the latest writes of a VDI that can be opened, from moment to moment, as [`Self::writes`] lists
    /// those of one.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if the moment that was named keeps none.
    pub async fn latest_writes(
        &self,
        name: &str,
        wanted: &WantedWrites,
    ) -> Result<VdiWrites, Error> {
        let (engine, name, wanted) = (Rc::clone(&self.0), name.to_owned(), wanted.clone());
        self.finish(async move { engine.latest_writes(&name, &wanted).await }).await
    }

    /// Opens a VDI for reading and writing, or a snapshot or what it was after a write for reading. Waits until a snapshot or a
    /// clone that is being made is durable: what is written to a clone and flushed must not go with
    /// it, and a snapshot must not change under its reader.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn open_disk(&self, target: &Target) -> Result<Rc<dyn Disk>, Error> {
        let engine = Rc::clone(&self.0);
        if let Some(lsn) = engine.write_of(target).await? {
            let AtWrite { vdi, moment, point } = engine.at_write(&target.vdi, lsn).await?;
            return Ok(Rc::new(SnapshotHandle::new(engine, vdi, moment, point)));
        }
        let (vdi, snapshot) = self.0.find_durable(target).await?;
        Ok(match snapshot {
            Some(snapshot) => Rc::new(SnapshotHandle::new(engine, vdi, snapshot, None)),
            None => Rc::new(VdiHandle::new(engine, vdi)),
        })
    }

    /// Publishes everything up to now, twice, so that both host slots name it and every block
    /// that was replaced before is free. Mostly for tests.
    ///
    /// # Errors
    /// If the device fails.
    pub async fn checkpoint(&self) -> Result<(), Error> {
        self.0.checkpoint_twice().await
    }

    /// Frees every block that no VDI and no snapshot reaches: what they held alone that were
    /// deleted before. Guests go on meanwhile. The freed blocks are allocatable on return, and their space
    /// was given back to what lies below, as far as that can take it. Runs by itself when it is needed.
    ///
    /// # Errors
    /// `Io` if a node could not be read: nothing is freed then, as what it names is not known. A
    /// damaged one is given up, with what it alone names. `Fenced` if the store was closed
    /// meanwhile.
    pub async fn collect_garbage(&self) -> Result<GcReport, Error> {
        let request = self.0.begin_change()?;
        let engine = Rc::clone(&self.0);
        self.finish(async move {
            let _request = request;
            engine.collect_and_trim(Scope::Freed).await
        })
        .await
    }

    /// Gives the space of all free blocks back to what lies below, as far as that can take it: also of those
    /// that were freed before the store was opened. Returns how many blocks it was of.
    ///
    /// # Errors
    /// `Fenced` if the store was closed meanwhile.
    pub async fn trim(&self) -> Result<u64, Error> {
        let request = self.0.begin_change()?;
        let engine = Rc::clone(&self.0);
        self.finish(async move {
            let _request = request;
            engine.trim(Scope::All).await
        })
        .await
    }

    /// What the garbage collection is doing, and what it did the last time.
    #[must_use]
    pub fn gc_status(&self) -> GcStatus {
        self.0.gc_status()
    }

    /// Begins to read and verify everything in use that was in use when it began, in the background, and
    /// returns the number of that pass; or that of the pass under way. `rate_bytes` is how much it reads in
    /// a second, from now on: 0 has no limit, `None` leaves it as it is, or as it was set. Nobody waits for
    /// it. It changes nothing: damage is counted and told of.
    pub fn begin_scrub(&self, rate_bytes: Option<u64>) -> u64 {
        self.0.begin_scrub(rate_bytes)
    }

    /// Sets how many bytes passes read in a second that are begun without a rate of their own: 64 MiB
    /// if this is not called, 0 for no limit.
    pub fn set_scrub_rate(&self, rate_bytes: u64) {
        self.0.scrubber.set_rate(rate_bytes);
    }

    /// Waits for the end of a pass that was begun. If others were begun since, the report is of the last
    /// that ended.
    pub async fn scrubbed(&self, pass: u64) -> ScrubReport {
        self.0.scrubbed(pass).await
    }

    /// Ends the pass under way; whether there is one. What it found until then is told of.
    pub fn stop_scrub(&self) -> bool {
        self.0.stop_scrub()
    }

    /// How long the store has been open, in all its life: it does not leap as a clock does (design rule 38).
    #[must_use]
    pub fn store_time(&self) -> Duration {
        Duration::from_nanos(self.0.store_ns())
    }

    /// How scrub stands.
    #[must_use]
    pub fn scrub_status(&self) -> ScrubStatus {
        self.0.scrub_status()
    }

    /// Checks the store while it is in use: what one checkpoint published is held to what
    /// [`crate::check`] holds a store to, but for the log and the older slot. With `read_data`, scrub
    /// reads the data then, at its rate or at `rate_bytes`, in a pass that begins after that of somebody else. Guests go on; what becomes free while metadata
    /// is walked is held back until that has ended. Ledgers must still hold what was `noted`. Changes nothing.
    ///
    /// # Errors
    /// `Busy` if somebody needs the space that is held back, or scrub was stopped; `Io` if the device fails;
    /// `Fenced` if the store was closed meanwhile. Damage is what the report is about, and no error.
    pub async fn check(
        &self,
        read_data: bool,
        rate_bytes: Option<u64>,
        noted: Vec<NotedHead>,
        progress: impl Fn(CheckProgress) + 'static,
    ) -> Result<CheckReport, Error> {
        let engine = Rc::clone(&self.0);
        self.finish(
            async move { engine.check_online(read_data, rate_bytes, &noted, &progress).await },
        )
        .await
    }

    /// Current counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let engine = &self.0;
        let (log_used, log_ring) = engine.log.usage();
        let cache = engine.nodes.cache().stats();
        Stats {
            capacity_bytes: engine.allocator.capacity_blocks() * BLOCK_SIZE_U64,
            free_bytes: (engine.allocator.free_blocks() + engine.reserve.block_count())
                * BLOCK_SIZE_U64,
            vdi_count: engine.registry.borrow().directory.count(),
            device_flushes: engine.scheduler.flush_count(),
            log_blocks: engine.log.blocks_written(),
            log_records: engine.log.last_lsn().get(),
            log_used_percent: log_used * 100 / log_ring,
            cache_hits: cache.hits,
            cache_misses: cache.misses,
            cache_bytes: as_u64(cache.bytes),
            ..engine.stats.borrow().clone()
        }
    }

    /// Waits until the store has stopped because a log write or a flush failed. Every handle is
    /// severed then; opening the store again recovers what was promised (G10).
    pub async fn failed(&self) -> DeviceError {
        self.0.scheduler.failed().await
    }

    /// Runs `work` as a task of its own: a log record counts once it is appended, and others wait
    /// for it to complete, whatever became of the caller; and a checkpoint that was begun has taken
    /// what the next one would miss.
    async fn finish<T: 'static>(&self, work: impl Future<Output = T> + 'static) -> T {
        self.0.runtime.spawn(work).await
    }

    /// Describes a VDI that exists, or what is left of a damaged one: its name.
    fn entry(&self, id: VdiId, outline: Option<Outline>) -> Option<VdiEntry> {
        let Outline {
            block_count,
            snapshot_count,
            moment_count,
            retention,
            has_own_retention,
            held_count,
            ledger,
        } = outline.unwrap_or_default();
        let registry = self.0.registry.borrow();
        let record = registry.directory.get(id)?;
        let parent = (record.parent.get() != 0).then_some((record.parent, record.parent_snapshot));
        let parent_name = registry.directory.get(record.parent).map(|parent| parent.name.clone());
        Some(VdiEntry {
            id,
            name: record.name.clone(),
            size_bytes: block_count * BLOCK_SIZE_U64,
            created_ns: record.created_ns,
            snapshot_count,
            moment_count,
            parent,
            parent_name,
            retention,
            has_own_retention,
            held_count,
            ledger,
            past: self.0.past_of(id),
        })
    }

    fn snapshot_entry(&self, vdi: &Vdi, snapshot: &Snapshot) -> SnapshotEntry {
        SnapshotEntry {
            number: snapshot.number,
            label: (!snapshot.label.is_empty()).then(|| snapshot.label.clone()),
            size_bytes: snapshot.block_count * BLOCK_SIZE_U64,
            created_ns: snapshot.wall_ns,
            uuid: self.0.snapshot_uuid(vdi, snapshot),
            changed_bytes: snapshot.changed_bytes(),
            hold: snapshot
                .hold
                .get()
                .map(|hold| HoldEntry { until_ns: hold.until.map(|until| until.wall_ns) }),
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({:?})", self.0.device)
    }
}
