//! What of the log above F counts: each write whose data verifies, by itself (design rule 2), and
//! what builds on nothing that was dropped (rule 31).

use std::collections::HashSet;
use std::rc::Rc;

use base::{BlockSlice, Buffer, ErrorKind, Pba, REQUEST_BLOCKS_MAX, SnapshotNumber, VdiId};
use blockstore::nodes::{READ_RETRIES, RETRY_AFTER};
use device::DeviceError;
use ondisk::{Record, RecordBody};
use runtime::sync::Semaphore;

use crate::Error;
use crate::engine::{Engine, as_u64};
use crate::types::OpenReport;

/// What a read of a write's blocks gave.
enum Data {
    /// There is no data to a record of this kind.
    NotAWrite,
    /// All blocks are what was written.
    Verified(BlockSlice),
    /// Something else is there: the write had not completed.
    Missing,
    /// The device fails the read. The write may have been acknowledged, so it counts where it
    /// stands: what cannot be read later is an error then, and never another content.
    Unreadable,
}

/// What recovery drops, and what cannot count without it (design rule 31).
#[derive(Default)]
pub(super) struct Dropped {
    /// VDIs of which a write is missing.
    incomplete: HashSet<VdiId>,
    snapshots: HashSet<(VdiId, SnapshotNumber)>,
    vdis: HashSet<VdiId>,
}

impl Dropped {
    /// Whether nothing that `record` builds on was dropped. A snapshot or clone must not hold a
    /// later write without an earlier one.
    fn may_count(&self, record: &Record) -> bool {
        if base::mutant::active("snapshots_with_holes") {
            return true;
        }
        if self.vdis.contains(&record.vdi) {
            return false;
        }
        match &record.body {
            RecordBody::Snapshot { .. } => !self.incomplete.contains(&record.vdi),
            RecordBody::Clone { source, snapshot, .. } => {
                let whole = snapshot.get() != 0 || !self.incomplete.contains(source);
                whole
                    && !self.vdis.contains(source)
                    && !self.snapshots.contains(&(*source, *snapshot))
            }
            RecordBody::Rollback { number, .. }
            | RecordBody::Hold { number, .. }
            | RecordBody::EndHold { number, .. } => {
                !self.snapshots.contains(&(record.vdi, *number))
            }
            RecordBody::Adopt { source, number } => {
                !self.vdis.contains(source) && !self.snapshots.contains(&(*source, *number))
            }
            _ => true,
        }
    }

    fn note(&mut self, record: &Record) {
        match &record.body {
            RecordBody::Write { .. } => {
                self.incomplete.insert(record.vdi);
            }
            RecordBody::Snapshot { number, .. } => {
                self.snapshots.insert((record.vdi, *number));
            }
            RecordBody::Create { .. } | RecordBody::Clone { .. } => {
                self.vdis.insert(record.vdi);
            }
            RecordBody::Rollback { .. } | RecordBody::Adopt { .. } => {
                // What follows was made on another base.
                self.incomplete.insert(record.vdi);
            }
            _ => {}
        }
    }
}

impl Engine {
    /// Reads the data of some writes above F. Returns the records that count, with that data.
    pub(super) async fn verify(
        self: &Rc<Self>,
        records: Vec<Record>,
        dropped: &mut Dropped,
        report: &mut OpenReport,
    ) -> Result<Vec<(Record, Option<BlockSlice>)>, Error> {
        let mut reads = Vec::with_capacity(records.len());
        // Enough at a time to keep the device busy, few enough to bound memory.
        let at_once = Semaphore::new(2 * REQUEST_BLOCKS_MAX);
        for record in records {
            let (engine, at_once) = (Rc::clone(self), at_once.clone());
            let permits = match &record.body {
                RecordBody::Write { hashes, .. } => at_once.acquire(hashes.len()).await,
                _ => at_once.acquire(0).await,
            };
            reads.push(self.runtime.spawn(async move {
                let data = engine.verified_data(&record).await;
                drop(permits);
                (record, data)
            }));
        }
        let mut counted = Vec::with_capacity(reads.len());
        for read in reads {
            let (record, data) = read.await;
            let stop = base::mutant::active("recovery_stops_at_bad_data");
            let data = match data? {
                _ if stop && !dropped.incomplete.is_empty() => None,
                Data::Missing => None,
                Data::Verified(data) => Some(Some(data)),
                Data::Unreadable | Data::NotAWrite => Some(None),
            };
            match data {
                Some(data) if dropped.may_count(&record) => counted.push((record, data)),
                _ => {
                    report.records_dropped += 1;
                    if let RecordBody::Write { pba, hashes, .. } = &record.body {
                        let blocks = (0..as_u64(hashes.len())).map(|index| pba.plus(index));
                        self.replaced_by_recovery(blocks);
                    }
                    dropped.note(&record);
                }
            }
        }
        Ok(counted)
    }

    /// What stands where a write says that its data is.
    async fn verified_data(&self, record: &Record) -> Result<Data, Error> {
        let RecordBody::Write { pba, hashes, .. } = &record.body else {
            return Ok(Data::NotAWrite);
        };
        let count = hashes.len();
        // Twice: a bad transfer is not a bad block.
        for _ in 0..2 {
            let buffer = match self.read_again(*pba, count).await {
                Ok(buffer) => buffer,
                // A device that cannot be reached says nothing of the block.
                Err(error) if error.kind() == ErrorKind::Io && !error.is_transport() => {
                    return Ok(Data::Unreadable);
                }
                Err(error) => return Err(blockstore::Error::from(error).into()),
            };
            let verified = hashes
                .iter()
                .zip(buffer.blocks())
                .all(|(&hash, block)| self.checksums.block(&block.0) == hash);
            if verified || base::mutant::active("recovery_trusts_data") {
                return Ok(Data::Verified(BlockSlice::new(Rc::new(buffer), 0, count)));
            }
        }
        Ok(Data::Missing)
    }

    /// Reads blocks; a medium that fails them is asked again before its word is taken.
    async fn read_again(&self, at: Pba, count: usize) -> Result<Buffer, DeviceError> {
        let mut attempts = 0;
        loop {
            let buffer = self.runtime.buffers().take(count);
            match self.device.read(at, count, buffer).await {
                Err(error) if attempts < READ_RETRIES && !error.is_transport() => {
                    attempts += 1;
                    self.runtime.sleep(RETRY_AFTER).await;
                }
                outcome => return outcome,
            }
        }
    }
}
