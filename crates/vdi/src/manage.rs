//! Creating, cloning, snapshotting and deleting: one log record each, whatever the size.
//!
//! Every change is an `apply_…` that alters memory without waiting. Running, it is called in the
//! same breath in which its record gets its LSN; after a crash, replay calls it with the record.
//! So both give the same state.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use base::{BLOCK_SIZE_U64, BirthLabel, ClaimGeneration, ErrorKind, Lsn, SnapshotNumber, VdiId};
use ondisk::{
    BLOCKS_MAX, DirectoryRecord, LABEL_BYTES_MAX, NAME_BYTES_MAX, Origin, RangeState, Record,
    RecordBody, RootRef, SnapshotRecord, TableRecord,
};

use blockstore::log::{Admission, Log};
use device::DeviceError;
use runtime::sync::{OneshotReceiver, Permits};

use crate::Error;
use crate::branch::{Base, Branch};
use crate::budget::Growth;
use crate::engine::{Engine, as_u64};
use crate::ranges::RangeGuard;
use crate::start::Start;
use crate::times::parse_time;
use crate::types::Target;
use crate::vdi::{Snapshot, Vdi};
use crate::writes::{WRITE_PREFIX, refuse_write};

/// Claims rise when VDIs move between hosts; a host that never lets go stays in the first.
const FIRST_CLAIM: ClaimGeneration = ClaimGeneration::new(1);

/// Nodes above the pages of a table of snapshots that a checkpoint writes, beyond one of 256 pages.
const SNAPSHOT_PATH_NODES: u64 = 2;

/// What stands in a record for a VDI as it is now.
const NO_SNAPSHOT: SnapshotNumber = SnapshotNumber::new(0);

/// A VDI of which nothing is on its way. Nobody else manages any meanwhile.
pub(crate) struct Quiet {
    pub(crate) vdi: Rc<Vdi>,
    pub(crate) all: RangeGuard,
    pub(crate) one: Permits,
}

/// A record's number, and when it is complete.
pub(crate) type Appended = (Lsn, OneshotReceiver<Result<(), DeviceError>>);

impl Engine {
    /// Creates an empty VDI. Durable on return.
    pub(crate) async fn create(self: &Rc<Self>, name: &str, size: u64) -> Result<VdiId, Error> {
        let _request = self.begin_change()?;
        self.reserve_metadata(|| false).await?;
        let block_count = blocks_of(size)?;
        check_name(name)?;
        let one = self.management.acquire(1).await;
        let room = self.room().await?;
        self.refuse_taken(name)?;
        let id = self.next_id();
        let wall_ns = self.runtime.wall_ns();
        let body = RecordBody::Create { block_count, wall_ns, name: name.to_owned() };
        let appended =
            self.log.append_admitted(room, &Record { vdi: id, claim: FIRST_CLAIM, body });
        let base = Base::Root(RootRef::empty(1));
        self.apply_create((id, appended.0), block_count, wall_ns, name, None, base);
        drop(one);
        self.settle(appended).await?;
        Ok(id)
    }

    /// Makes a VDI of a snapshot, of a write that is kept, or of a VDI as it is now. Durable on return.
    pub(crate) async fn clone_vdi(
        self: &Rc<Self>,
        source: &Target,
        name: &str,
    ) -> Result<VdiId, Error> {
        let _request = self.begin_change()?;
        check_name(name)?;
        let (start, mut nodes) = self.find_start(source).await?;
        let mut attempts = 0;
        let (one, vdi, room, start) = loop {
            self.reserve_nodes(nodes, || false).await?;
            let (one, vdi) = self.manage(&source.vdi).await?;
            let room = self.room().await?;
            let start = start.as_ref().map(|start| start.again(&vdi, &source.vdi)).transpose()?;
            nodes = self.nodes_of_start(&vdi, start.as_ref());
            if self.has_metadata_for(nodes, &mut attempts)? {
                break (one, vdi, room, start);
            }
        };
        self.refuse_taken(name)?;
        let branch = start.as_ref().map(|start| Rc::clone(&start.snapshot.branch));
        refuse_without_labels(&branch.unwrap_or_else(|| Rc::clone(&vdi.branch.borrow())))?;
        let id = self.next_id();
        let wall_ns = self.runtime.wall_ns();
        let body = RecordBody::Clone {
            source: vdi.id,
            snapshot: start.as_ref().map_or(NO_SNAPSHOT, |start| start.snapshot.number),
            position: start.as_ref().and_then(|start| start.position),
            wall_ns,
            name: name.to_owned(),
        };
        let appended =
            self.log.append_admitted(room, &Record { vdi: id, claim: FIRST_CLAIM, body });
        self.apply_clone(id, &vdi, start.as_ref(), appended.0, wall_ns, name);
        drop(one);
        self.settle(appended).await?;
        Ok(id)
    }

    /// Takes a snapshot. Durable on return.
    pub(crate) async fn snapshot(
        self: &Rc<Self>,
        name: &str,
        label: Option<&str>,
    ) -> Result<SnapshotNumber, Error> {
        let _request = self.begin_change()?;
        let label = label.unwrap_or_default();
        check_label(label)?;
        let vdi = self.find(name).await?;
        let (number, appended) =
            self.take_snapshot(name, &vdi, label, Log::append_admitted).await?;
        // Guests go on; what they wrote before is waited for (design rule 30).
        self.settle(appended).await?;
        self.stats.borrow_mut().snapshots += 1;
        Ok(number)
    }

    /// Takes a snapshot when there is room for one. The caller completes its record, and makes it durable.
    pub(crate) async fn take_snapshot(
        self: &Rc<Self>,
        name: &str,
        vdi: &Vdi,
        label: &str,
        append: impl FnOnce(&Log, Admission, &Record) -> Appended,
    ) -> Result<(SnapshotNumber, Appended), Error> {
        self.reserve_metadata(|| false).await?;
        let room = self.room().await?;
        refuse_taken_label(vdi, name, label)?;
        if vdi.deleted.get() {
            return Err(not_found(name));
        }
        refuse_without_labels(&vdi.branch.borrow())?;
        let number = vdi.snapshot_next.get();
        let appended = self.append_snapshot_with(vdi, label, Origin::Asked, |body| {
            append(&self.log, room, &Record { vdi: vdi.id, claim: vdi.claim, body })
        });
        Ok((number, appended))
    }

    /// Appends the record of the next snapshot, and applies it.
    pub(crate) fn append_snapshot(
        &self,
        room: Admission,
        vdi: &Vdi,
        label: &str,
        origin: Origin,
    ) -> Appended {
        self.append_snapshot_with(vdi, label, origin, |body| self.append(room, vdi, body))
    }

    /// Appends the record of the next moment into the log's reserve, and applies it.
    pub(crate) fn append_moment_reserved(&self, vdi: &Vdi) -> Appended {
        let changed_blocks = self.begin_moment(vdi);
        self.append_snapshot_with(vdi, "", Origin::Kept { changed_blocks }, |body| {
            self.log.append(&Record { vdi: vdi.id, claim: vdi.claim, body })
        })
    }

    fn append_snapshot_with(
        &self,
        vdi: &Vdi,
        label: &str,
        origin: Origin,
        append: impl FnOnce(RecordBody) -> Appended,
    ) -> Appended {
        let number = vdi.snapshot_next.get();
        let mut wall_ns = self.runtime.wall_ns();
        if !base::mutant::active("snapshot_times_go_back") {
            wall_ns = wall_ns.max(vdi.newest_snapshot_ns());
        }
        let store_ns = self.store_ns();
        let body =
            RecordBody::Snapshot { number, wall_ns, store_ns, label: label.to_owned(), origin };
        let appended = append(body);
        self.apply_snapshot(vdi, number, appended.0, (wall_ns, store_ns), (label, origin));
        appended
    }

    /// Gives a VDI another name. Durable on return.
    pub(crate) async fn rename(self: &Rc<Self>, name: &str, new: &str) -> Result<(), Error> {
        let _request = self.begin_change()?;
        check_name(new)?;
        let (one, vdi) = self.manage(name).await?;
        if name == new {
            return Ok(());
        }
        let room = self.room().await?;
        self.refuse_taken(new)?;
        let appended = self.append(room, &vdi, RecordBody::Rename { name: new.to_owned() });
        self.apply_rename(vdi.id, new);
        drop(one);
        self.settle(appended).await
    }

    /// Changes the size. Shrinking severs open handles. Durable on return.
    pub(crate) async fn resize(self: &Rc<Self>, name: &str, size: u64) -> Result<(), Error> {
        let _request = self.begin_change()?;
        let block_count = blocks_of(size)?;
        let shrinks = |vdi: &Vdi| Ok(block_count < vdi.block_count.get());
        let Quiet { vdi, all, one } = self.quiet(name, shrinks).await?;
        let (room, room_before, room_behind) =
            (self.room().await?, self.room().await?, self.room().await?);
        if shrinks(&vdi)? {
            vdi.sever();
        }
        // Writes before it are of the old size, and what is cut off is a large discard.
        let keeps_writes = vdi.branch.borrow().writes.is_on();
        let before = keeps_writes.then(|| self.append_moment(room_before, &vdi));
        let appended = self.append(room, &vdi, RecordBody::Resize { block_count });
        self.apply_resize(&vdi, block_count, appended.0);
        let behind = keeps_writes.then(|| self.append_moment(room_behind, &vdi));
        drop(one);
        for appended in before.into_iter().chain([appended]).chain(behind) {
            self.settle(appended).await?;
        }
        drop(all);
        Ok(())
    }

    /// Deletes a VDI with its snapshots, or one snapshot, unless it is held. Durable on return.
    pub(crate) async fn remove(self: &Rc<Self>, target: &Target) -> Result<(), Error> {
        let _request = self.begin_change()?;
        match &target.snapshot {
            Some(label) => self.remove_snapshot(&target.vdi, label).await,
            None => self.remove_vdi(&target.vdi).await,
        }
    }

    async fn remove_vdi(self: &Rc<Self>, name: &str) -> Result<(), Error> {
        let Quiet { vdi, all, one } = loop {
            let severs = |vdi: &Vdi| self.refuse_holding(name, vdi).map(|()| true);
            match self.quiet(name, severs).await {
                // Of what nothing is left the name can still go.
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    if self.remove_lost(name).await? {
                        return Ok(());
                    }
                }
                quiet => break quiet?,
            }
        };
        let room = self.room().await?;
        // One may have been held meanwhile.
        self.refuse_holding(name, &vdi)?;
        vdi.sever();
        let appended = self.append(room, &vdi, RecordBody::Delete);
        self.apply_delete(&vdi);
        drop((all, one));
        self.settle(appended).await
    }

    /// Deletes a VDI of which nothing is left but its name; `false` if it is another one by now.
    async fn remove_lost(self: &Rc<Self>, name: &str) -> Result<bool, Error> {
        let one = self.management.acquire(1).await;
        match self.find(name).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => {}
            found => return found.map(|_| false),
        }
        let room = self.room().await?;
        let record = self.record_of(name).ok_or_else(|| not_found(name))?;
        let (vdi, claim) = (record.id, record.claim);
        let appended =
            self.log.append_admitted(room, &Record { vdi, claim, body: RecordBody::Delete });
        self.apply_delete_lost(vdi);
        drop(one);
        self.settle(appended).await?;
        Ok(true)
    }

    async fn remove_snapshot(self: &Rc<Self>, name: &str, label: &str) -> Result<(), Error> {
        self.make_way_for_deletion().await;
        let (one, vdi) = self.manage(name).await?;
        let (room_before, room) = (self.room().await?, self.room().await?);
        let snapshot = find_snapshot(&vdi, name, label)?;
        self.refuse_held(name, &snapshot)?;
        let number = snapshot.number;
        let was_held = snapshot.hold.get().is_some();
        let ended = was_held.then(|| self.append_end(room_before, &vdi, number, true));
        let appended = self.append(room, &vdi, RecordBody::DeleteSnapshot { number });
        self.apply_delete_snapshot(&vdi, number);
        drop((one, snapshot));
        if let Some(ended) = ended {
            self.complete_record(ended).await?;
        }
        self.settle(appended).await
    }

    /// Makes a VDI what a snapshot of it was, or what it was after a write that is kept. Severs open handles.
    /// Durable on return.
    pub(crate) async fn rollback(self: &Rc<Self>, name: &str, label: &str) -> Result<(), Error> {
        let _request = self.begin_change()?;
        let target = Target { vdi: name.to_owned(), snapshot: Some(label.to_owned()) };
        let (start, mut nodes) = self.find_start(&target).await?;
        let start = start.ok_or_else(|| not_found(name))?;
        let source = |vdi: &Vdi| {
            let start = start.again(vdi, name)?;
            refuse_without_labels(&vdi.branch.borrow())?;
            refuse_without_labels(&start.snapshot.branch)?;
            Ok(start)
        };
        let mut attempts = 0;
        let (Quiet { vdi, all, one }, [room, room_before, room_behind], start) = loop {
            self.reserve_nodes(nodes, || false).await?;
            let quiet = self.quiet(name, |vdi| source(vdi).map(|_| true)).await?;
            let rooms = [self.room().await?, self.room().await?, self.room().await?];
            // It may have been deleted meanwhile.
            let start = source(&quiet.vdi)?;
            nodes = self.nodes_of_start(&quiet.vdi, Some(&start));
            if self.has_metadata_for(nodes, &mut attempts)? {
                break (quiet, rooms, start);
            }
        };
        vdi.sever();
        // What is left behind stays in the history, and where it went back stands there, too.
        let has_history = !vdi.retention.borrow().is_off();
        let is_left = has_history && vdi.changed_blocks.get() > 0;
        let left = is_left.then(|| self.append_moment(room_before, &vdi));
        let (number, position) = (start.snapshot.number, start.position);
        let body = RecordBody::Rollback { number, position };
        let rolled_back = self.append(room, &vdi, body);
        self.apply_rollback(&vdi, &vdi, &start, rolled_back.0);
        vdi.changed_blocks.set(0);
        let reached = has_history.then(|| self.append_moment(room_behind, &vdi));
        drop((all, one));
        for appended in left.into_iter().chain([rolled_back]).chain(reached) {
            self.settle(appended).await?;
        }
        Ok(())
    }

    /// Finds a VDI, and keeps others from managing theirs. Loading it may take as long as its device
    /// does: that is waited for first.
    pub(crate) async fn manage(self: &Rc<Self>, name: &str) -> Result<(Permits, Rc<Vdi>), Error> {
        let _stays = self.find(name).await?;
        let one = self.management.acquire(1).await;
        Ok((one, self.find(name).await?))
    }

    /// Waits until nothing of a VDI is on its way, and keeps it so. Its handles are severed before,
    /// if they are to be; and once more when it is done, as it may have been opened meanwhile.
    ///
    /// A request may take as long as its device does. So it is waited for first: others manage
    /// their VDIs meanwhile.
    pub(crate) async fn quiet(
        self: &Rc<Self>,
        name: &str,
        severs: impl Fn(&Vdi) -> Result<bool, Error>,
    ) -> Result<Quiet, Error> {
        loop {
            let vdi = self.find(name).await?;
            let severs = severs(&vdi)?;
            let all = self.still(&vdi, severs).await;
            let one = self.management.acquire(1).await;
            // It may have been deleted or renamed meanwhile.
            if Rc::ptr_eq(&vdi, &self.find(name).await?) {
                return Ok(Quiet { vdi, all, one });
            }
        }
    }

    /// Waits until nothing of a VDI is on its way, and keeps it so.
    pub(crate) async fn still(&self, vdi: &Vdi, severs: bool) -> RangeGuard {
        if severs {
            vdi.sever();
            vdi.leaving.set(vdi.leaving.get() + 1);
            // Who waits for space gives up.
            self.releases.wake_all();
        }
        let all = vdi.ranges.lock(0..u64::MAX).await;
        if severs {
            vdi.leaving.set(vdi.leaving.get() - 1);
        }
        all
    }

    /// The VDI of this name.
    pub(crate) async fn find(self: &Rc<Self>, name: &str) -> Result<Rc<Vdi>, Error> {
        let id = self.registry.borrow().directory.find(name).map(|record| record.id);
        let vdi = self.vdi(id.ok_or_else(|| not_found(name))?).await?;
        if vdi.deleted.get() {
            return Err(not_found(name));
        }
        Ok(vdi)
    }

    /// What `target` names, when a snapshot or a clone that is being made is durable: before, a crash
    /// may undo it.
    pub(crate) async fn find_durable(
        self: &Rc<Self>,
        target: &Target,
    ) -> Result<(Rc<Vdi>, Option<Rc<Snapshot>>), Error> {
        let vdi = self.find(&target.vdi).await?;
        let snapshot = match &target.snapshot {
            Some(label) => Some(self.find_moment(&vdi, &target.vdi, label)?),
            None => None,
        };
        let born = snapshot.as_ref().map_or(vdi.born.get(), |snapshot| snapshot.position);
        self.log.durable(born).await.map_err(blockstore::Error::from)?;
        if vdi.deleted.get() {
            return Err(not_found(&target.vdi));
        }
        Ok((vdi, snapshot))
    }

    /// A snapshot by its label or number, or the newest one of a time.
    pub(crate) fn find_moment(
        &self,
        vdi: &Vdi,
        name: &str,
        wanted: &str,
    ) -> Result<Rc<Snapshot>, Error> {
        if let Some(snapshot) = vdi.snapshot(wanted) {
            return Ok(snapshot);
        }
        refuse_write(name, wanted)?;
        let now_ns = self.runtime.wall_ns();
        let Some(wall_ns) = parse_time(wanted, now_ns) else {
            let message = format!(
                "{name} has no snapshot {wanted}; `parallax snapshots {name}` lists them, `parallax log \
                 {name}` shows moments; a time is written 2026-11-22T10:15:30Z or '5 minutes ago'"
            );
            return Err(Error::refused(ErrorKind::NotFound, message));
        };
        if wall_ns > now_ns {
            let message = format!("{wanted} is to come; `parallax log {name}` shows what was");
            return Err(Error::refused(ErrorKind::Invalid, message));
        }
        if vdi.newest_snapshot_ns() > now_ns && !base::mutant::active("lookup_trusts_the_clock") {
            let message = format!(
                "the clock went back since the last moment of {name}, so that times cannot be told; name \
                 one by its number, which `parallax log {name}` shows"
            );
            return Err(Error::refused(ErrorKind::Invalid, message));
        }
        if vdi.retention.borrow().is_off() && vdi.snapshots.borrow().count() == 0 {
            let message = format!(
                "{name} has no history; to keep one from now on: parallax set {name} history=24h"
            );
            return Err(Error::refused(ErrorKind::NotFound, message));
        }
        let found = vdi.snapshots.borrow().at(wall_ns).map(Rc::clone);
        found.ok_or_else(|| too_long_ago(name, wanted))
    }

    /// Whether a snapshot will be there after a crash.
    pub(crate) fn is_durable(&self, snapshot: &Snapshot) -> bool {
        self.scheduler.watermarks().durable() >= snapshot.position
    }

    /// Number of a VDI's snapshots that are durable: of those that were asked for, and of moments.
    pub(crate) fn durable_snapshot_counts(&self, vdi: &Vdi) -> (u64, u64) {
        let snapshots = vdi.snapshots.borrow();
        let (mut asked, mut moments) =
            (snapshots.count() - snapshots.kept_count(), snapshots.kept_count());
        for being_made in snapshots.iter().rev().take_while(|it| !self.is_durable(it)) {
            match being_made.is_kept() {
                true => moments -= 1,
                false => asked -= 1,
            }
        }
        (as_u64(asked), as_u64(moments))
    }

    fn record_of(&self, name: &str) -> Option<DirectoryRecord> {
        self.registry.borrow().directory.find(name).cloned()
    }

    pub(crate) fn refuse_taken(&self, name: &str) -> Result<(), Error> {
        if self.registry.borrow().directory.find(name).is_some() {
            let message = format!("a disk named {name} exists already; choose another name");
            return Err(Error::refused(ErrorKind::Exists, message));
        }
        Ok(())
    }

    fn next_id(&self) -> VdiId {
        VdiId::new(self.registry.borrow().id_next)
    }

    pub(crate) fn apply_create(
        &self,
        (id, lsn): (VdiId, Lsn),
        block_count: u64,
        wall_ns: u64,
        name: &str,
        parent: Option<(VdiId, SnapshotNumber)>,
        base: Base,
    ) -> Rc<Vdi> {
        let (parent, parent_snapshot) = parent.unwrap_or_default();
        // A root of its own has nothing that is shared; a point's labels are known when it is
        // merged.
        let branch = self.new_branch(base, BirthLabel::new(1), BirthLabel::new(0));
        branch.writes.set(self.default_retention.borrow().keeps_writes(), lsn.plus(1));
        let vdi = Rc::new(Vdi {
            id,
            claim: FIRST_CLAIM,
            born: Cell::default(),
            branch: RefCell::new(branch),
            block_count: Cell::new(block_count),
            window: RefCell::default(),
            ranges: Default::default(),
            incarnation: Cell::new(0),
            rollbacks: Cell::new(0),
            deleted: Cell::new(false),
            leaving: Cell::new(0),
            snapshots: RefCell::default(),
            snapshot_next: Cell::new(SnapshotNumber::new(1)),
            snapshots_dirty: RefCell::default(),
            snapshot_table: Cell::new(RootRef::empty(1)),
            held: RefCell::default(),
            ledger: RefCell::default(),
            retention: RefCell::new(self.default_retention.borrow().clone()),
            has_own_rules: Cell::new(false),
            moment_at: Cell::default(),
            moment_pending: Cell::new(false),
            changed_blocks: Cell::new(0),
            growth: Growth::default(),
            budget_told: Cell::new(false),
        });
        let record = DirectoryRecord {
            id,
            parent,
            parent_snapshot,
            created_ns: wall_ns,
            claim: FIRST_CLAIM,
            owner: self.host,
            name: name.to_owned(),
        };
        {
            let mut registry = self.registry.borrow_mut();
            registry.id_next = registry.id_next.max(id.get() + 1);
            registry.directory.insert(record);
            registry.loaded.insert(id, Rc::clone(&vdi));
        }
        self.touch(&vdi);
        vdi
    }

    pub(crate) fn apply_clone(
        &self,
        id: VdiId,
        source: &Vdi,
        start: Option<&Start>,
        lsn: Lsn,
        wall_ns: u64,
        name: &str,
    ) {
        let (base, block_count) = match start {
            Some(start) => (self.base_of(source, start), start.snapshot.block_count),
            None => (self.point_now(source, lsn), source.block_count.get()),
        };
        let number = start.map_or(NO_SNAPSHOT, |start| start.snapshot.number);
        let parent = Some((source.id, number));
        let vdi = self.apply_create((id, lsn), block_count, wall_ns, name, parent, base);
        vdi.born.set(lsn);
    }

    /// A clone of what is lost: there is a name, and nothing else.
    pub(crate) fn apply_lost_clone(
        &self,
        (id, lsn): (VdiId, Lsn),
        (parent, parent_snapshot): (VdiId, SnapshotNumber),
        wall_ns: u64,
        name: &str,
    ) {
        let parent = Some((parent, parent_snapshot));
        self.apply_create((id, lsn), 1, wall_ns, name, parent, Base::Root(RootRef::empty(1)));
    }

    pub(crate) fn apply_snapshot(
        &self,
        vdi: &Vdi,
        number: SnapshotNumber,
        lsn: Lsn,
        (wall_ns, store_ns): (u64, u64),
        (label, origin): (&str, Origin),
    ) {
        let branch: Rc<Branch> = Rc::clone(&vdi.branch.borrow());
        let point = branch.add_point(lsn, vdi.block_count.get());
        if matches!(origin, Origin::Kept { .. }) {
            point.writes_from.set(branch.writes.take(lsn));
        }
        let snapshot = Rc::new(Snapshot {
            number,
            position: lsn,
            claim: vdi.claim,
            branch,
            point,
            block_count: vdi.block_count.get(),
            wall_ns,
            store_ns,
            label: label.to_owned(),
            origin,
            hold: Cell::new(None),
            deleted: Cell::new(false),
        });
        vdi.snapshots.borrow_mut().insert(snapshot);
        self.owe_snapshot(vdi, number);
        vdi.snapshot_next.set(SnapshotNumber::new(number.get() + 1));
        self.touch(vdi);
    }

    pub(crate) fn apply_delete_snapshot(&self, vdi: &Vdi, number: SnapshotNumber) {
        if let Some(snapshot) = vdi.snapshots.borrow_mut().remove(number) {
            snapshot.deleted.set(true);
            self.collector.dropped(self.runtime.now());
            self.owe_snapshot(vdi, number);
        }
        self.touch(vdi);
    }

    /// Notes that the next checkpoint writes the record of a snapshot, or takes it out of its page.
    pub(crate) fn owe_snapshot(&self, vdi: &Vdi, number: SnapshotNumber) {
        let mut dirty = vdi.snapshots_dirty.borrow_mut();
        let first = number.get() - number.get() % SnapshotRecord::PER_PAGE;
        let page =
            SnapshotNumber::new(first)..SnapshotNumber::new(first + SnapshotRecord::PER_PAGE);
        if dirty.range(page).next().is_none() {
            let path = if dirty.is_empty() { SNAPSHOT_PATH_NODES } else { 0 };
            self.owed_nodes.set(self.owed_nodes.get() + 1 + path);
        }
        dirty.insert(number);
    }

    pub(crate) fn apply_rename(&self, id: VdiId, name: &str) {
        self.registry.borrow_mut().directory.rename(id, name);
    }

    pub(crate) fn apply_resize(&self, vdi: &Vdi, block_count: u64, lsn: Lsn) {
        let old = vdi.block_count.replace(block_count);
        vdi.growth.note(old.saturating_sub(block_count));
        self.touch(vdi);
        vdi.branch.borrow().writes.break_at(lsn.plus(1));
        if block_count < old {
            // Whoever has cached what is cut off must not go on when the VDI grows again.
            vdi.rollbacks.set(vdi.rollbacks.get().saturating_add(1));
        }
        if block_count < old && !base::mutant::active("shrink_leaves_data") {
            let branch = Rc::clone(&vdi.branch.borrow());
            let generation = branch.active();
            let cut = (block_count, old);
            let level_max = Self::level_max(old);
            self.install_range(&branch, &generation, lsn, cut, RangeState::Unmapped, level_max);
        }
    }

    pub(crate) fn apply_delete(&self, vdi: &Rc<Vdi>) {
        vdi.deleted.set(true);
        self.collector.dropped(self.runtime.now());
        vdi.branch.borrow().is_head.set(false);
        for snapshot in vdi.snapshots.borrow().iter() {
            snapshot.deleted.set(true);
        }
        // The branch may have points that clones are built on.
        self.touch(vdi);
        vdi.snapshots.borrow_mut().clear();
        self.allocator.return_window(&mut vdi.window.borrow_mut());
        let mut registry = self.registry.borrow_mut();
        registry.loaded.remove(&vdi.id);
        registry.directory.remove(vdi.id);
    }

    /// Deletes a VDI of which nothing can be read but its name.
    pub(crate) fn apply_delete_lost(&self, id: VdiId) {
        self.collector.dropped(self.runtime.now());
        let mut registry = self.registry.borrow_mut();
        registry.directory.remove(id);
        registry.lost.remove(&id);
        registry.dirty.insert(id);
    }

    /// Makes `vdi` what `owner`, itself or another VDI, was where it starts.
    pub(crate) fn apply_rollback(&self, vdi: &Vdi, owner: &Vdi, start: &Start, lsn: Lsn) {
        let old = Rc::clone(&vdi.branch.borrow());
        self.touch(vdi);
        self.collector.dropped(self.runtime.now());
        old.is_head.set(false);
        let base = self.base_of(owner, start);
        // Above every label that the old branch may still give (design rule 33): its next merge
        // advances it by at most one.
        let floor = BirthLabel::new(old.label.get().get().saturating_add(2));
        let branch = self.new_branch(base, floor, floor);
        branch.writes.set(vdi.retention.borrow().keeps_writes(), lsn.plus(1));
        *vdi.branch.borrow_mut() = branch;
        vdi.block_count.set(start.snapshot.block_count);
        vdi.rollbacks.set(vdi.rollbacks.get().saturating_add(1));
        self.touch(vdi);
    }
}

/// Labels that must be left for a snapshot, a clone or a rollback: more than each of them takes, so
/// that no checkpoint ever lacks one (design rule 42).
const LABELS_LEFT_MIN: u64 = 16;

/// Refuses what would advance a branch whose labels are nearly used up.
pub(crate) fn refuse_without_labels(branch: &Rc<Branch>) -> Result<(), Error> {
    if branch.label_bound() + LABELS_LEFT_MIN > u64::from(u32::MAX) {
        return Err(labels_used_up());
    }
    Ok(())
}

/// Refuses a label that a snapshot has.
pub(crate) fn refuse_taken_label(vdi: &Vdi, name: &str, label: &str) -> Result<(), Error> {
    if !label.is_empty() && vdi.snapshot(label).is_some() {
        let message = format!("{name}@{label} exists already");
        return Err(Error::refused(ErrorKind::Exists, message));
    }
    Ok(())
}

pub(crate) fn labels_used_up() -> Error {
    let message = "the VDI's birth labels are used up: copy it to a new VDI, and delete this one";
    Error::refused(ErrorKind::NoSpace, message)
}

/// A snapshot by its label or number.
pub(crate) fn find_snapshot(vdi: &Vdi, name: &str, label: &str) -> Result<Rc<Snapshot>, Error> {
    if let Some(snapshot) = vdi.snapshot(label) {
        return Ok(snapshot);
    }
    refuse_write(name, label)?;
    let message = format!("{name} has no snapshot {label}; `parallax snapshots {name}` lists them");
    Err(Error::refused(ErrorKind::NotFound, message))
}

/// What is older than everything that is kept of a VDI.
fn too_long_ago(name: &str, time: &str) -> Error {
    let message = format!(
        "no moment of {name} is kept that is as old as {time}; `parallax log {name}` shows which are"
    );
    Error::refused(ErrorKind::NotFound, message)
}

pub(crate) fn not_found(name: &str) -> Error {
    let message = format!("there is no disk named {name}; `parallax ls` lists them");
    Error::refused(ErrorKind::NotFound, message)
}

pub(crate) fn blocks_of(size: u64) -> Result<u64, Error> {
    let block_count = size.div_ceil(BLOCK_SIZE_U64);
    if block_count == 0 || block_count > BLOCKS_MAX {
        let message = "the size of a disk must be 4 KiB to 4 PiB";
        return Err(Error::refused(ErrorKind::Invalid, message));
    }
    Ok(block_count)
}

/// Names are shown in tables, typed in shells and sent over NBD and in URLs: none may look like an
/// option or like a step in a path.
pub(crate) fn check_name(name: &str) -> Result<(), Error> {
    let allowed = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ':' | '+');
    let begins = name.starts_with(|c: char| c.is_alphanumeric() || c == '_');
    if !begins || name.len() > NAME_BYTES_MAX || !name.chars().all(allowed) {
        let message = format!(
            "'{name}' cannot be a name: use 1 to {NAME_BYTES_MAX} bytes of letters, digits and \
             - _ . / : +, beginning with a letter, a digit or _"
        );
        return Err(Error::refused(ErrorKind::Invalid, message));
    }
    Ok(())
}

pub(crate) fn check_label(label: &str) -> Result<(), Error> {
    let printable = label.chars().all(|c| !c.is_control() && c != '@');
    let number = !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_digit());
    let is_time = parse_time(label, u64::MAX).is_some();
    let is_write = label.starts_with(WRITE_PREFIX);
    if label.len() > LABEL_BYTES_MAX || !printable || number || is_time || is_write {
        let message = format!(
            "'{label}' cannot be a label: use up to {LABEL_BYTES_MAX} printable bytes without @, \
             not digits alone, no time, and nothing that begins with {WRITE_PREFIX}"
        );
        return Err(Error::refused(ErrorKind::Invalid, message));
    }
    Ok(())
}
