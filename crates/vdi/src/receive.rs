//! The end of a receive: what a stream brought into a disk of its own, the *partial* one, becomes a
//! snapshot of the disk that it was meant for.
//!
//! - Until then that disk does not exist, or is as it was before. From then on it is what was sent: a
//!   few records in one log block, whatever the size, so that a crash takes all of them or none. The
//!   partial disk is what it was, with the note of how far it has come, or it is gone.
//! - Those records count as they stand, as what they build on is durable before: recovery drops none
//!   of them alone (`recovery/verify.rs`).
//! - The snapshot keeps the uuid that it has where it comes from, so that the next stream, which
//!   builds on it, finds it.
//! - A stream that builds on a snapshot goes onto that one alone: it must be the newest, and nothing
//!   may have been written to the disk since.

use std::rc::Rc;

use base::{ErrorKind, SnapshotNumber, SnapshotUuid};
use ondisk::{LABEL_BYTES_MAX, LOG_PAYLOAD_BYTES, NAME_BYTES_MAX, Origin, RecordBody};
use runtime::sync::Permits;

use crate::Error;
use crate::engine::Engine;
use crate::manage::{
    Appended, blocks_of, check_label, check_name, find_snapshot, not_found, refuse_taken_label,
    refuse_without_labels,
};
use crate::ranges::RangeGuard;
use crate::start::{Start, nodes_of_head};
use crate::types::{Received, Target};
use crate::vdi::{Snapshot, Vdi};

/// Most bytes of a record that has a name or a label, and of all that belong together.
const RECORD_BYTES: usize = 256;
const TOGETHER_BYTES: usize = 5 * RECORD_BYTES;
const _: () = {
    let text = if NAME_BYTES_MAX > LABEL_BYTES_MAX { NAME_BYTES_MAX } else { LABEL_BYTES_MAX };
    // Its header, three numbers, the text with its length, an origin, and padding.
    assert!(16 + 3 * 8 + 2 + text + Origin::BYTES + 7 <= RECORD_BYTES);
    assert!(TOGETHER_BYTES <= LOG_PAYLOAD_BYTES);
};

/// VDIs of which nothing is on its way, and all is durable. Nobody else manages any meanwhile.
struct Complete<const COUNT: usize> {
    vdis: [Rc<Vdi>; COUNT],
    ranges: Vec<RangeGuard>,
    one: Permits,
}

impl Engine {
    /// What a snapshot is known by in every store that has it.
    pub(crate) fn snapshot_uuid(&self, vdi: &Vdi, snapshot: &Snapshot) -> SnapshotUuid {
        if let Origin::Received(uuid) = snapshot.origin {
            return uuid;
        }
        self.checksums.snapshot_uuid(vdi.id, snapshot.number, snapshot.wall_ns)
    }

    /// Makes of a partial disk what it was received for. Durable on return.
    pub(crate) async fn complete_receive(
        self: &Rc<Self>,
        received: &Received,
    ) -> Result<SnapshotNumber, Error> {
        check_label(received.label())?;
        match received.base {
            None => self.name_partial(received).await,
            Some(base) => self.take_over(received, base).await,
        }
    }

    /// Gives a partial disk its size, its snapshot and its name.
    async fn name_partial(self: &Rc<Self>, received: &Received) -> Result<SnapshotNumber, Error> {
        let _request = self.begin_change()?;
        self.reserve_metadata(|| false).await?;
        check_name(&received.name)?;
        let block_count = blocks_of(received.size_bytes)?;
        let check = |vdis: &[Rc<Vdi>; 1]| {
            let [partial] = vdis;
            self.refuse_taken(&received.name)?;
            refuse_taken_label(partial, &received.partial, received.label())?;
            refuse_without_labels(&partial.branch.borrow())
        };
        let Complete { vdis, ranges, one } = self.complete([&received.partial], check).await?;
        let [cut, taken, renamed] = [self.room().await?, self.room().await?, self.room().await?];
        let inherited = self.room().await?;
        // Names and snapshots may have changed meanwhile.
        check(&vdis)?;
        let [partial] = &vdis;
        partial.sever();
        self.log.together(TOGETHER_BYTES);
        let cut = self.append(cut, partial, RecordBody::Resize { block_count });
        self.apply_resize(partial, block_count, cut.0);
        let number = partial.snapshot_next.get();
        let origin = Origin::Received(received.uuid);
        let taken = self.append_snapshot(taken, partial, received.label(), origin);
        self.break_up();
        let body = RecordBody::Rename { name: received.name.clone() };
        let renamed = self.append(renamed, partial, body);
        self.apply_rename(partial.id, &received.name);
        // A partial disk keeps no history, whatever the store does; what it has become may.
        let inherits = partial.has_own_rules.get() && self.has_holds.get();
        let inherited = inherits.then(|| {
            let appended = self.append(inherited, partial, RecordBody::Retain { rules: None });
            self.apply_retain(partial, None, appended.0);
            appended
        });
        drop((ranges, one));
        self.settle_all([cut, taken, renamed].into_iter().chain(inherited)).await?;
        self.stats.borrow_mut().snapshots += 1;
        Ok(number)
    }

    /// Makes a disk what the partial one is, and that a snapshot of it; the partial one goes.
    async fn take_over(
        self: &Rc<Self>,
        received: &Received,
        base: SnapshotUuid,
    ) -> Result<SnapshotNumber, Error> {
        let _request = self.begin_change()?;
        let block_count = blocks_of(received.size_bytes)?;
        if received.partial == received.name {
            let message = format!("{} cannot be received into itself", received.name);
            return Err(Error::refused(ErrorKind::Invalid, message));
        }
        let check = |vdis: &[Rc<Vdi>; 2]| {
            let [partial, vdi] = vdis;
            // It is to be deleted at the end.
            self.refuse_holding(&received.partial, partial)?;
            self.refuse_other_base(vdi, received, base)?;
            refuse_taken_label(vdi, &received.name, received.label())?;
            refuse_without_labels(&vdi.branch.borrow())?;
            refuse_without_labels(&partial.branch.borrow())
        };
        let (partial, vdi) =
            (self.find(&received.partial).await?, self.find(&received.name).await?);
        // Before anybody is disconnected.
        let vdis = [partial, vdi];
        check(&vdis)?;
        let [partial, vdi] = vdis;
        self.refuse_changed(&vdi, received).await?;
        self.reserve_nodes(nodes_of_head(&partial), || false).await?;
        let names = [&*received.partial, &*received.name];
        let Complete { vdis, ranges, one } = self.complete(names, check).await?;
        self.refuse_changed(&vdis[1], received).await?;
        let rooms = [self.room().await?, self.room().await?, self.room().await?];
        let more_rooms = [self.room().await?, self.room().await?, self.room().await?];
        // Its snapshots may have changed meanwhile.
        check(&vdis)?;
        let ([cut, as_sent, adopted], [taken, removed, left]) = (rooms, more_rooms);
        let [partial, vdi] = &vdis;
        if !base::mutant::active("adopt_leaves_handles") {
            vdis.iter().for_each(|vdi| vdi.sever());
        }
        // What is lost by force stays in the history.
        let is_left = !vdi.retention.borrow().is_off() && vdi.changed_blocks.get() > 0;
        let left = is_left.then(|| self.append_moment(left, vdi));
        self.log.together(TOGETHER_BYTES);
        let cut = self.append(cut, partial, RecordBody::Resize { block_count });
        self.apply_resize(partial, block_count, cut.0);
        let source = partial.snapshot_next.get();
        let as_sent = self.append_snapshot(as_sent, partial, "", Origin::Asked);
        let source = find_snapshot(partial, &received.partial, &source.to_string())?;
        let body = RecordBody::Adopt { source: partial.id, number: source.number };
        let adopted = self.append(adopted, vdi, body);
        if !base::mutant::active("adopt_keeps_the_branch") {
            self.apply_rollback(vdi, partial, &Start::at(source), adopted.0);
        }
        vdi.changed_blocks.set(0);
        self.break_up();
        let number = vdi.snapshot_next.get();
        let origin = Origin::Received(received.uuid);
        let taken = self.append_snapshot(taken, vdi, received.label(), origin);
        let removed = self.append(removed, partial, RecordBody::Delete);
        self.apply_delete(partial);
        drop((ranges, one));
        self.settle_all(left.into_iter().chain([cut, as_sent, adopted, taken, removed])).await?;
        self.stats.borrow_mut().snapshots += 1;
        Ok(number)
    }

    /// Waits until nothing of some VDIs is on its way and all that was written to them is durable,
    /// and keeps it so: the record that builds on it must not survive it. Nobody else manages any
    /// meanwhile. Their handles are severed, if `check` has nothing against them.
    async fn complete<const COUNT: usize>(
        self: &Rc<Self>,
        names: [&str; COUNT],
        check: impl Fn(&[Rc<Vdi>; COUNT]) -> Result<(), Error>,
    ) -> Result<Complete<COUNT>, Error> {
        loop {
            let vdis = self.find_all(names).await?;
            check(&vdis)?;
            // In one order, so that no two wait for each other.
            let mut in_order = vdis.each_ref();
            in_order.sort_by_key(|vdi| vdi.id);
            let mut ranges = Vec::with_capacity(COUNT);
            for vdi in in_order {
                ranges.push(self.still(vdi, !base::mutant::active("adopt_leaves_handles")).await);
            }
            self.log.durable(self.log.last_lsn()).await.map_err(blockstore::Error::from)?;
            let one = self.management.acquire(1).await;
            // They may have been deleted or renamed meanwhile.
            let now = self.find_all(names).await?;
            if vdis.iter().zip(&now).all(|(vdi, now)| Rc::ptr_eq(vdi, now)) {
                return Ok(Complete { vdis, ranges, one });
            }
        }
    }

    async fn find_all<const COUNT: usize>(
        self: &Rc<Self>,
        names: [&str; COUNT],
    ) -> Result<[Rc<Vdi>; COUNT], Error> {
        let mut vdis = Vec::with_capacity(COUNT);
        for name in names {
            vdis.push(self.find(name).await?);
        }
        vdis.try_into().map_err(|_| not_found(""))
    }

    /// Waits until records that were appended together are durable.
    async fn settle_all(&self, appended: impl IntoIterator<Item = Appended>) -> Result<(), Error> {
        let mut last = None;
        for appended in appended {
            if let Some(before) = last.replace(appended) {
                self.complete_record(before).await?;
            }
        }
        match last {
            Some(last) => self.settle(last).await,
            None => Ok(()),
        }
    }

    /// For a mutant: ends the log block in the middle of what belongs together.
    fn break_up(&self) {
        if base::mutant::active("receive_in_pieces") {
            self.log.together(ondisk::LOG_PAYLOAD_BYTES);
        }
    }

    /// Refuses a disk whose newest snapshot is not `base`.
    fn refuse_other_base(
        &self,
        vdi: &Vdi,
        received: &Received,
        base: SnapshotUuid,
    ) -> Result<(), Error> {
        let name = &received.name;
        let snapshots = vdi.snapshots.borrow();
        let is_base = |snapshot: &&Rc<Snapshot>| self.snapshot_uuid(vdi, snapshot) == base;
        let mut asked = snapshots.iter().rev().filter(|snapshot| !snapshot.is_kept());
        if asked.next().is_some_and(|newest| is_base(&newest)) {
            return Ok(());
        }
        let message = match snapshots.iter().find(is_base) {
            Some(snapshot) => format!(
                "the stream builds on {name}@{}, and {name} has a later snapshot",
                snapshot.number
            ),
            None => format!("the stream builds on snapshot {base}, which {name} does not have"),
        };
        Err(Error::refused(ErrorKind::Invalid, message))
    }

    /// Refuses a disk that was written since its newest snapshot.
    async fn refuse_changed(self: &Rc<Self>, vdi: &Vdi, received: &Received) -> Result<(), Error> {
        let newest = {
            let snapshots = vdi.snapshots.borrow();
            snapshots.iter().rev().find(|snapshot| !snapshot.is_kept()).map(Rc::clone)
        };
        let force = received.force || base::mutant::active("receive_onto_what_was_written");
        let (name, Some(newest), false) = (&received.name, newest, force) else {
            return Ok(());
        };
        let from = Target { vdi: name.clone(), snapshot: Some(newest.number.to_string()) };
        let to = Target { vdi: name.clone(), snapshot: None };
        let found = self.diff(Some(&from), &to, 0, 1).await?;
        if found.extents.is_empty() && found.from_size_bytes == found.to_size_bytes {
            return Ok(());
        }
        let message = format!(
            "{name} was written since its newest snapshot, {from}; to lose that, add --force"
        );
        Err(Error::refused(ErrorKind::Invalid, message))
    }
}
