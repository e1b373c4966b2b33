//! Moments of a VDI that are kept by themselves, so that it can be opened as it was.
//!
//! A *retention* is a list of rules such as `every flush for 1h, every 1m for 1d`. Its first rule says
//! when a snapshot is taken, all of them how long it stays: of each interval the first one, up to the
//! rule's age. Ages are of store time, so that a clock that leaps deletes nothing (design rule 38).
//!
//! - A moment is taken after a flush of the guest, so it holds everything that the flush covered; and
//!   when nobody flushes, after a second at most. None is taken while nothing is written. Flushes within ten
//!   milliseconds share two: one behind the first of them, and one when that time is over.
//! - It is a snapshot like others, with a number and no label, which a checkpoint gives a history
//!   (`history.rs`); its record becomes durable with the next flush, and nobody waits for it.
//! - What was the newest moment when all rules had run out stays: it is what the disk was at their
//!   start.
//! - A moment that is held stays (`holds.rs`).
//! - Behind its rules a retention may have a budget of bytes (`budget.rs`).
//! - When the store is full, older halves of them go before a guest's write is refused (design
//!   rule 39).

use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;

use base::{ClaimGeneration, ErrorKind, Lsn, SnapshotNumber, VdiId};
use blockstore::log::Admission;
use blockstore::table;
use ondisk::{Origin, Record, RecordBody, TableRecord, VdiRecord};

use crate::Error;
use crate::engine::Engine;
use crate::gc::RoundEnd;
use crate::manage::{Appended, refuse_without_labels};
use crate::vdi::{Snapshot, Vdi};

mod rules;

pub use rules::Retention;

/// Longest time between two moments of a VDI that is written and not flushed.
const UNFLUSHED_MAX: Duration = Duration::from_secs(1);

/// Deletions of moments under way at a time.
const DELETED_AT_ONCE: usize = 64;

/// How often in a row it is waited for what is released before moments go.
const RELEASES_AWAITED_MAX: usize = 2;

/// Most moments of a VDI: beyond it the oldest go. They are in memory while the VDI is in use.
const MOMENTS_MAX: usize = 100_000;

impl Engine {
    /// Changes which moments of a VDI are kept by themselves; `None`: those that the store keeps.
    /// Durable on return.
    pub(crate) async fn retain(
        self: &Rc<Self>,
        name: &str,
        retention: Option<Retention>,
    ) -> Result<(), Error> {
        let _request = self.begin_change()?;
        self.reserve_metadata(|| false).await?;
        if let Some(retention) = &retention {
            self.refuse_unknown(retention)?;
        }
        let (one, vdi) = self.manage(name).await?;
        let room = self.room().await?;
        let rules = retention.as_ref().map(|retention| retention.rules().clone());
        let appended = self.append(room, &vdi, RecordBody::Retain { rules });
        self.apply_retain(&vdi, retention, appended.0);
        drop(one);
        self.settle(appended).await
    }

    pub(crate) fn apply_retain(&self, vdi: &Vdi, retention: Option<Retention>, lsn: Lsn) {
        vdi.has_own_rules.set(retention.is_some());
        let retention = retention.unwrap_or_else(|| self.default_retention.borrow().clone());
        vdi.branch.borrow().writes.set(retention.keeps_writes(), lsn);
        *vdi.retention.borrow_mut() = retention;
        self.touch(vdi);
    }

    /// Changes which moments are kept of VDIs that have no rules of their own. Durable on return.
    pub(crate) async fn retain_by_default(
        self: &Rc<Self>,
        retention: Retention,
    ) -> Result<(), Error> {
        let _request = self.begin_change()?;
        if !self.has_holds.get() {
            let message = "this store was formatted by a Parallax that knew no history for all disks: \
                           give each disk its own";
            return Err(Error::refused(ErrorKind::Unsupported, message));
        }
        self.refuse_unknown(&retention)?;
        let one = self.management.acquire(1).await;
        let room = self.room().await?;
        let (vdi, claim) = (VdiId::default(), ClaimGeneration::default());
        let body = RecordBody::RetainByDefault { rules: retention.rules().clone() };
        let appended = self.log.append_admitted(room, &Record { vdi, claim, body });
        self.apply_retain_by_default(retention, appended.0);
        drop(one);
        self.settle(appended).await
    }

    pub(crate) fn apply_retain_by_default(&self, retention: Retention, lsn: Lsn) {
        let registry = self.registry.borrow();
        for vdi in registry.loaded.values().filter(|vdi| !vdi.has_own_rules.get()) {
            vdi.branch.borrow().writes.set(retention.keeps_writes(), lsn);
            *vdi.retention.borrow_mut() = retention.clone();
        }
        *self.default_retention.borrow_mut() = retention;
    }

    /// Refuses a retention with `every write` or a budget if the store was formatted before there was that.
    fn refuse_unknown(&self, retention: &Retention) -> Result<(), Error> {
        let message = if retention.keeps_writes() && !self.keeps_writes.get() {
            "this store was formatted by a Parallax that could not keep every write: keep every flush, or send \
             its disks to a new store"
        } else if retention.budget_bytes().is_some() && !self.has_budgets.get() {
            "this store was formatted by a Parallax that knew no budgets: leave `at most` out, or send its disks \
             to a new store"
        } else {
            return Ok(());
        };
        Err(Error::refused(ErrorKind::Unsupported, message))
    }

    /// Has a moment taken soon if there are many writes that none keeps.
    pub(crate) fn keep_many_writes(self: &Rc<Self>, vdi: &Rc<Vdi>) {
        if vdi.branch.borrow().writes.are_many() {
            self.keep_moment(vdi, Duration::ZERO);
        }
    }

    /// Notes that a guest's flush has succeeded. If the last moment is too young for another, one is taken a
    /// little later: the last of some flushes is what the guest goes by, and not the first.
    pub(crate) fn note_flush(self: &Rc<Self>, vdi: &Rc<Vdi>) {
        let interval = vdi.retention.borrow().interval();
        if let Some((interval, true)) = interval {
            self.keep_moment_in(vdi, self.time_to_rest(vdi, interval));
        }
    }

    /// Has the VDIs in use of which moments are kept or something is held: their time comes though nobody
    /// opens them.
    pub(crate) async fn load_retained(self: Rc<Self>) {
        let mut last = VdiId::default();
        loop {
            let next = self.registry.borrow().directory.after(last).next();
            let Some(next) = next.filter(|_| self.go_on().is_ok()) else { return };
            let page = next.get() / VdiRecord::PER_PAGE;
            last = VdiId::new((page + 1) * VdiRecord::PER_PAGE - 1);
            for id in self.retained_on(page).await {
                // What is damaged is told of when somebody opens it.
                let _ = self.vdi(id).await;
            }
            self.runtime.yield_now().await;
        }
    }

    /// VDIs of a page of their table that have something to do with moments or holds.
    async fn retained_on(&self, page: u64) -> Vec<VdiId> {
        let _reader = self.epochs.enter();
        let vdis = self.roots.get().vdis;
        let Ok(Some(node)) = table::page_once(&self.nodes, &vdis, page).await else {
            return Vec::new();
        };
        let indices = page * VdiRecord::PER_PAGE..(page + 1) * VdiRecord::PER_PAGE;
        let records = indices.filter_map(|at| VdiRecord::get(node.block(), at).ok().flatten());
        // What has nothing but the store's rules and no moment yet has had nothing to keep.
        let has_rules = |vdi: &VdiRecord| vdi.retention.as_ref().is_some_and(|it| !it.is_empty());
        let is_wanted = |vdi: &VdiRecord| vdi.has_moments || has_rules(vdi) || vdi.ledger_count > 0;
        records.filter(is_wanted).map(|vdi| vdi.id).collect()
    }

    /// VDIs in use that have something to do with moments, in order.
    fn retained(&self) -> Vec<Rc<Vdi>> {
        let registry = self.registry.borrow();
        let loaded = registry.loaded.values();
        let mut retained: Vec<_> = loaded.filter(|vdi| vdi.has_moments()).map(Rc::clone).collect();
        retained.sort_by_key(|vdi| vdi.id);
        retained
    }

    /// Takes the moments that are due by time.
    pub(crate) fn keep_moments(self: &Rc<Self>) {
        for vdi in self.retained() {
            let interval = vdi.retention.borrow().interval();
            if let Some((interval, by_flush)) = interval {
                self.keep_moment(&vdi, if by_flush { UNFLUSHED_MAX } else { interval });
            }
        }
    }

    /// Deletes moments whose time has come, in the background.
    pub(crate) fn end_moments(self: &Rc<Self>) {
        let retained = self.retained();
        if retained.is_empty() || self.keeping.replace(true) {
            return;
        }
        let engine = Rc::clone(self);
        drop(self.runtime.spawn(async move {
            for vdi in retained {
                engine.end_writes(&vdi);
                if let Err(error) = engine.delete_ended_moments(&vdi).await {
                    tracing::warn!(%error, "moments whose time has come could not be deleted");
                    break;
                }
            }
            engine.keeping.set(false);
        }));
    }

    async fn delete_ended_moments(self: &Rc<Self>, vdi: &Rc<Vdi>) -> Result<(), Error> {
        self.delete_moments(vdi, self.expired_moments(vdi)).await?;
        self.delete_moments(vdi, self.moments_over_budget(vdi)).await
    }

    fn expired_moments(&self, vdi: &Vdi) -> Vec<SnapshotNumber> {
        let snapshots = vdi.snapshots.borrow();
        let moments = || snapshots.iter().filter(|snapshot| is_unused_moment(snapshot));
        let with_times = moments().map(|snapshot| (snapshot.number, snapshot.store_ns));
        let mut expired = vdi.retention.borrow().expired(self.store_ns(), with_times);
        let excess = snapshots.kept_count().saturating_sub(expired.len() + MOMENTS_MAX);
        if excess > 0 {
            let gone: HashSet<_> = expired.iter().copied().collect();
            let left = moments().map(|snapshot| snapshot.number).filter(|it| !gone.contains(it));
            expired.extend(left.take(excess));
        }
        expired
    }

    /// Takes a moment in the background, if something was written and the last one is old enough.
    fn keep_moment(self: &Rc<Self>, vdi: &Rc<Vdi>, interval: Duration) {
        if self.time_to_rest(vdi, interval).is_zero() {
            self.keep_moment_in(vdi, Duration::ZERO);
        }
    }

    /// Until the last moment is so old.
    fn time_to_rest(&self, vdi: &Vdi, interval: Duration) -> Duration {
        let now = self.runtime.now();
        vdi.moment_at.get().map_or(Duration::ZERO, |at| interval.saturating_sub(now.since(at)))
    }

    /// Takes a moment in the background, after a while, if something was written.
    fn keep_moment_in(self: &Rc<Self>, vdi: &Rc<Vdi>, wait: Duration) {
        let is_wanted = vdi.changed_blocks.get() > 0 && !vdi.is_leaving();
        if !is_wanted || self.read_only || vdi.moment_pending.replace(true) {
            return;
        }
        let (engine, vdi) = (Rc::clone(self), Rc::clone(vdi));
        drop(self.runtime.spawn(async move {
            if !wait.is_zero() {
                engine.runtime.sleep(wait).await;
            }
            if engine.closing.get() || vdi.changed_blocks.get() == 0 {
                vdi.moment_pending.set(false);
                return;
            }
            let taken = engine.take_moment(&vdi).await;
            vdi.moment_pending.set(false);
            if let Err(error) = taken {
                let registry = engine.registry.borrow();
                tracing::warn!(disk = registry.name(vdi.id), %error, "a moment could not be kept");
            }
        }));
    }

    async fn take_moment(self: &Rc<Self>, vdi: &Rc<Vdi>) -> Result<(), Error> {
        let _request = self.begin_change()?;
        // Older moments do not go for a new one.
        if !self.metadata_suffices().await? {
            return Ok(());
        }
        refuse_without_labels(&vdi.branch.borrow())?;
        let room = self.room().await?;
        if vdi.deleted.get() || vdi.is_leaving() {
            return Ok(());
        }
        let appended = self.append_moment(room, vdi);
        self.complete_record(appended).await
    }

    /// Appends the record of a moment of all that was written so far.
    pub(crate) fn append_moment(&self, room: Admission, vdi: &Vdi) -> Appended {
        let changed_blocks = self.begin_moment(vdi);
        self.append_snapshot(room, vdi, "", Origin::Kept { changed_blocks })
    }

    /// Notes that a moment is taken; returns the number of blocks that were changed since the last.
    pub(crate) fn begin_moment(&self, vdi: &Vdi) -> u64 {
        vdi.moment_at.set(Some(self.runtime.now()));
        self.stats.borrow_mut().moments += 1;
        vdi.changed_blocks.take()
    }

    /// Deletes some moments of a VDI, but for those that somebody has open by now.
    async fn delete_moments(
        self: &Rc<Self>,
        vdi: &Rc<Vdi>,
        numbers: Vec<SnapshotNumber>,
    ) -> Result<(), Error> {
        for numbers in numbers.chunks(DELETED_AT_ONCE) {
            let _request = self.begin_change()?;
            self.make_way_for_deletion().await;
            let mut under_way = Vec::with_capacity(numbers.len());
            for &number in numbers {
                let one = self.management.acquire(1).await;
                let room = self.room().await?;
                let goes = vdi.snapshots.borrow().get(number).is_some_and(is_unused_moment);
                if goes && !vdi.deleted.get() {
                    let appended = self.append(room, vdi, RecordBody::DeleteSnapshot { number });
                    self.apply_delete_snapshot(vdi, number);
                    // Each is finished by itself: the next may wait for a checkpoint, which waits for
                    // all records before it.
                    let engine = Rc::clone(self);
                    under_way.push(
                        self.runtime.spawn(async move { engine.complete_record(appended).await }),
                    );
                }
                drop(one);
            }
            for deletion in under_way {
                deletion.await?;
            }
            self.runtime.yield_now().await;
        }
        Ok(())
    }

    /// Gives up the older half of all moments, and then of what is left, until an attempt at what a guest
    /// waits for gives something; `None` if it never does.
    pub(crate) async fn thin_until<T>(
        self: &Rc<Self>,
        gives_up: impl Fn() -> bool,
        attempt: impl AsyncFn() -> Result<Option<T>, Error>,
    ) -> Result<Option<T>, Error> {
        let mut waits = 0;
        // Until then collections that were cut short are worth another before more goes.
        let mut round: Option<RoundEnd> = None;
        loop {
            // What was given up before is worth waiting for before more goes. Others need not wait for
            // this one's readers.
            self.released(self.releases.up_to_now(), &gives_up).await;
            self.allocator.reclaim_empty_extents();
            self.go_on()?;
            let _one = self.thinning.acquire(1).await;
            if let Some(given) = attempt().await? {
                return Ok(Some(given));
            }
            if gives_up() {
                return Ok(None);
            }
            // Guests that go on overwriting release without end.
            if self.releases.are_under_way() && waits < RELEASES_AWAITED_MAX {
                waits += 1;
                continue;
            }
            waits = 0;
            if round.is_none_or(|end| self.collector.has_come_to(end)) {
                // What nobody can collect gives no space, however much is given up.
                if self.collector.has_failed() || !self.thin_moments().await {
                    return Ok(None);
                }
                round = Some(self.collector.round_from_now());
            }
            match self.cycle_for_space().await {
                None => return Ok(None),
                Some(report) if !report.was_cut_short => round = None,
                Some(_) => {}
            }
        }
    }

    /// Gives up the older half of all moments. Whether there were any.
    async fn thin_moments(self: &Rc<Self>) -> bool {
        let mut any = false;
        for vdi in self.retained() {
            let older: Vec<SnapshotNumber> = {
                let snapshots = vdi.snapshots.borrow();
                let unused = snapshots.iter().filter(|snapshot| is_unused_moment(snapshot));
                let mut older: Vec<_> = unused.map(|snapshot| snapshot.number).collect();
                older.truncate(older.len().div_ceil(2));
                older
            };
            if older.is_empty() {
                continue;
            }
            any = true;
            tracing::warn!(
                disk = self.registry.borrow().name(vdi.id),
                count = older.len(),
                "the store is full: the older half of the kept moments goes"
            );
            if self.delete_moments(&vdi, older).await.is_err() {
                return false;
            }
        }
        any
    }
}

/// Whether a snapshot is a moment that is not held.
pub(crate) fn is_mere_moment(snapshot: &Snapshot) -> bool {
    let is_kept = snapshot.is_kept() || base::mutant::active("thinning_takes_what_was_asked_for");
    let is_held = snapshot.hold.get().is_some() && !base::mutant::active("thinning_takes_held");
    is_kept && !is_held
}

/// Whether a snapshot is a moment that is not held, and that nobody has open.
pub(crate) fn is_unused_moment(snapshot: &Rc<Snapshot>) -> bool {
    is_mere_moment(snapshot) && Rc::strong_count(snapshot) == 1
}
