//! The end of a receive: what a stream brought into a disk of its own, the *partial* one, becomes a
//! snapshot of the disk that it was meant for.
//!
//! - Until then that disk does not exist, or is as it was before. From then on it is what was sent:
//!   a rename or one log record, whatever the size.
//! - The snapshot keeps the uuid that it has where it comes from, so that the next stream, which
//!   builds on it, finds it.
//! - A stream that builds on a snapshot goes onto that one alone: it must be the newest, and nothing
//!   may have been written to the disk since.

use std::rc::Rc;

use base::{BLOCK_SIZE_U64, ErrorKind, SnapshotNumber, SnapshotUuid};
use ondisk::{Origin, RecordBody};

use crate::Error;
use crate::engine::Engine;
use crate::manage::{
    Quiet, check_label, find_snapshot, nodes_wanted, refuse_taken_label, refuse_without_labels,
};
use crate::types::{Received, Target};
use crate::vdi::{Snapshot, Vdi};

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
        check_label(received.label.as_deref().unwrap_or_default())?;
        match received.base {
            None => {
                self.refuse_taken(&received.name)?;
                self.cut_partial(received).await?;
                let label = received.label.as_deref();
                let origin = Origin::Received(received.uuid);
                let number = self.snapshot_from(&received.partial, label, origin).await?;
                self.rename(&received.partial, &received.name).await?;
                Ok(number)
            }
            Some(base) => {
                let vdi = self.find(&received.name).await?;
                self.refuse_other_base(&vdi, received, base)?;
                // Before anybody is disconnected.
                self.refuse_changed(&vdi, received).await?;
                self.cut_partial(received).await?;
                let source = self.snapshot(&received.partial, None).await?;
                let number = self.take_over(received, base, source).await?;
                self.remove(&Target { vdi: received.partial.clone(), snapshot: None }).await?;
                Ok(number)
            }
        }
    }

    /// Takes away what only a partial disk has: where its receive stands.
    async fn cut_partial(self: &Rc<Self>, received: &Received) -> Result<(), Error> {
        let partial = self.find(&received.partial).await?;
        if partial.block_count.get() * BLOCK_SIZE_U64 == received.size_bytes {
            return Ok(());
        }
        self.resize(&received.partial, received.size_bytes).await
    }

    /// Makes a disk what a snapshot of the partial one is, and that a snapshot of it.
    async fn take_over(
        self: &Rc<Self>,
        received: &Received,
        base: SnapshotUuid,
        source: SnapshotNumber,
    ) -> Result<SnapshotNumber, Error> {
        let _request = self.begin_change()?;
        let partial = self.find(&received.partial).await?;
        let source = find_snapshot(&partial, &received.partial, &source.to_string())?;
        self.reserve_nodes(nodes_wanted(&source), || false).await?;
        let label = received.label.as_deref().unwrap_or_default();
        let check = |vdi: &Vdi| {
            self.refuse_other_base(vdi, received, base)?;
            refuse_taken_label(vdi, &received.name, label)?;
            refuse_without_labels(&vdi.branch.borrow())?;
            refuse_without_labels(&source.branch)?;
            Ok(true)
        };
        let Quiet { vdi, all, one } = self.quiet(&received.name, check).await?;
        self.refuse_changed(&vdi, received).await?;
        let (room, more_room) = (self.room().await?, self.room().await?);
        // Its snapshots may have changed meanwhile.
        check(&vdi)?;
        vdi.sever();
        let body = RecordBody::Adopt { source: partial.id, number: source.number };
        let adopted = self.append(room, &vdi, body);
        self.apply_rollback(&vdi, &partial, &source);
        let number = vdi.snapshot_next.get();
        let origin = Origin::Received(received.uuid);
        let taken = self.append_snapshot(more_room, &vdi, label, origin);
        drop((all, one));
        self.settle(adopted).await?;
        self.settle(taken).await?;
        self.stats.borrow_mut().snapshots += 1;
        Ok(number)
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
        let (name, Some(newest), false) = (&received.name, newest, received.force) else {
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
