//! Writes of a VDI that can be opened (`writes.rs`), listed from the latest on: from moment to moment.

use std::rc::Rc;

use base::{Lsn, SnapshotNumber};

use crate::Error;
use crate::engine::Engine;
use crate::types::{KeptWrite, VdiWrites, WantedWrites};
use crate::vdi::{Snapshot, Vdi};

/// Snapshots that are looked at between two breaths of the thread.
const SNAPSHOTS_PER_TURN: usize = 4096;

/// Most writes of an answer.
const WRITES_MAX: usize = 1000;

impl Engine {
    /// The latest writes that moments keep, those that are `wanted`.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if the moment that was named keeps none; if a history is damaged.
    pub(crate) async fn latest_writes(
        self: &Rc<Self>,
        name: &str,
        wanted: &WantedWrites,
    ) -> Result<VdiWrites, Error> {
        let vdi = self.find(name).await?;
        let max = wanted.max.clamp(1, WRITES_MAX);
        let last = wanted.up_to.as_deref();
        let last = last.map(|last| self.find_moment(&vdi, name, last)).transpose()?;
        let mut number = None;
        if let Some(last) = &last {
            if last.point.writes_from.get().is_none() {
                // It says why.
                self.writes(name, last).await?;
            }
            number = Some(SnapshotNumber::new(last.number.get() + 1));
        }
        let mut latest: Vec<KeptWrite> = Vec::new();
        while let Some(moment) = self.keeps_writes_before(&vdi, number, wanted.before).await {
            number = Some(moment.number);
            let handle = moment.number.to_string();
            let writes = match self.writes(name, &moment).await {
                Err(_) if moment.deleted.get() => continue,
                writes => writes?,
            };
            for write in writes.into_iter().rev() {
                if wanted.before.is_some_and(|before| write.lsn >= before) {
                    continue;
                }
                if latest.len() == max {
                    let next = latest.last().map(|first| first.write.lsn);
                    latest.reverse();
                    return Ok(VdiWrites { writes: latest, next });
                }
                let (moment, wall_ns) = (handle.clone(), moment.wall_ns);
                latest.push(KeptWrite { write, moment, wall_ns });
            }
        }
        latest.reverse();
        Ok(VdiWrites { writes: latest, next: None })
    }

    /// The newest moment with a number below `number` that keeps writes with LSNs below `before`. It stays
    /// as long as the caller has it.
    async fn keeps_writes_before(
        &self,
        vdi: &Vdi,
        mut number: Option<SnapshotNumber>,
        before: Option<Lsn>,
    ) -> Option<Rc<Snapshot>> {
        loop {
            {
                let snapshots = vdi.snapshots.borrow();
                let mut seen = 0;
                for snapshot in snapshots.before(number).take(SNAPSHOTS_PER_TURN) {
                    let from = snapshot.point.writes_from.get();
                    if from.is_some_and(|from| before.is_none_or(|before| from < before)) {
                        return Some(Rc::clone(snapshot));
                    }
                    number = Some(snapshot.number);
                    seen += 1;
                }
                if seen < SNAPSHOTS_PER_TURN {
                    return None;
                }
            }
            self.runtime.yield_now().await;
        }
    }
}
