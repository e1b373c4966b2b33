//! Host slots: choosing the newest, publishing the next.
//!
//! Two copies, written in turn. The one that is not the last known durable is written, also on a
//! retry (design rule 43); a copy is durable before the other is written again (rule 23). Log tail
//! and released blocks follow the *older* copy, so that the loss of the newer one loses nothing
//! (rule 18).

use std::rc::Rc;

use base::{BlockSlice, ErrorKind, HostId, Pba};
use device::{Device, DeviceError};
use ondisk::{Checksums, DecodeError, HostSlot};
use runtime::Runtime;

use crate::nodes::{READ_RETRIES, RETRY_AFTER};
use crate::scheduler::{After, Batch};
use crate::{Error, Geometry, WriteScheduler};

/// What the two copies of a host's slot hold.
#[derive(Clone, Debug)]
pub struct SlotPair {
    /// The newer valid one.
    pub newest: HostSlot,
    /// Where it stands: 0 or 1.
    pub copy: u64,
    /// The other one, if it is valid.
    pub older: Option<HostSlot>,
    /// Whether the other one is damaged, rather than never written.
    pub other_damaged: bool,
}

/// Reads both copies of a host's slot.
///
/// # Errors
/// `Damaged` if no copy is valid, or if both claim the same sequence with different contents; device
/// errors, if none can be read or the device cannot be reached.
pub async fn read_slots(
    device: &Device,
    runtime: &Runtime,
    geometry: &Geometry,
    checksums: &Checksums,
    host: HostId,
) -> Result<SlotPair, Error> {
    let mut found: [Result<HostSlot, DecodeError>; 2] =
        [Err(DecodeError::Magic), Err(DecodeError::Magic)];
    let mut unreadable = None;
    for (copy, slot) in (0u64..).zip(&mut found) {
        let at = geometry.host_slot(host, copy);
        *slot = match read_copy(device, runtime, checksums, host, at).await {
            // A device that cannot be reached says nothing of the copy, which may be the newest.
            Err(error) if error.is_transport() => return Err(error.into()),
            // One that cannot be read is as good as a damaged one: the other may do.
            Err(error) => {
                unreadable = Some(error);
                Err(DecodeError::Checksum)
            }
            Ok(slot) => slot,
        };
    }
    if let ([Err(_), Err(_)], Some(error)) = (&found, unreadable) {
        return Err(error.into());
    }
    let at = geometry.host_slot(host, 0);
    match found {
        [Ok(a), Ok(b)] if a.sequence == b.sequence => {
            if a == b {
                return Ok(SlotPair { newest: a, copy: 0, older: Some(b), other_damaged: false });
            }
            Err(Error::Damaged { what: "host slot (two different ones of one sequence)", at })
        }
        [Ok(a), Ok(b)] => {
            let (newest, older, copy) = if a.sequence > b.sequence { (a, b, 0) } else { (b, a, 1) };
            Ok(SlotPair { newest, copy, older: Some(older), other_damaged: false })
        }
        [Ok(newest), Err(error)] => {
            let other_damaged = is_damage(&newest, error);
            Ok(SlotPair { newest, copy: 0, older: None, other_damaged })
        }
        [Err(error), Ok(newest)] => {
            let other_damaged = is_damage(&newest, error);
            Ok(SlotPair { newest, copy: 1, older: None, other_damaged })
        }
        [Err(_), Err(_)] => Err(Error::Damaged { what: "host slot (both copies)", at }),
    }
}

/// Reads one copy of a host's slot; one that does not look like one is read again before that is
/// believed. So is one of zeroes, as a format leaves: they may be those of a bad transfer.
async fn read_copy(
    device: &Device,
    runtime: &Runtime,
    checksums: &Checksums,
    host: HostId,
    at: Pba,
) -> Result<Result<HostSlot, DecodeError>, DeviceError> {
    let mut attempts = 0;
    loop {
        let read = device.read(at, 1, runtime.buffers().take(1)).await;
        let slot = read.map(|buffer| match buffer.blocks().first() {
            Some(block) => HostSlot::decode(block, checksums, at).and_then(|slot| {
                // Another host's would be published in that host's place.
                let is_own = slot.host == host;
                is_own.then_some(slot).ok_or(DecodeError::Invalid("number of the host"))
            }),
            None => Err(DecodeError::Magic),
        });
        let is_doubtful = match &slot {
            Ok(slot) => slot.is_err(),
            Err(error) => !error.is_transport(),
        };
        if !is_doubtful || attempts == READ_RETRIES {
            return slot;
        }
        attempts += 1;
        // A new store need not wait for what is most likely as it should be.
        if !matches!(slot, Ok(Err(DecodeError::Magic))) {
            runtime.sleep(RETRY_AFTER).await;
        }
    }
}

/// Whether the copy beside `valid` is damaged. Only a format leaves one that was never written: from
/// the second publication on, zeroes stand where something was lost, which may be the newest slot.
fn is_damage(valid: &HostSlot, error: DecodeError) -> bool {
    error != DecodeError::Magic || valid.sequence > 1
}

/// Publishes one host's slots, one at a time.
#[derive(Debug)]
pub struct SlotWriter {
    scheduler: WriteScheduler,
    geometry: Geometry,
    checksums: Checksums,
    /// The last known durable slot, and where it stands.
    current: HostSlot,
    copy: u64,
}

impl SlotWriter {
    /// Continues after what is on the device.
    #[must_use]
    pub fn new(
        scheduler: WriteScheduler,
        geometry: Geometry,
        checksums: Checksums,
        current: HostSlot,
        copy: u64,
    ) -> Self {
        Self { scheduler, geometry, checksums, current, copy }
    }

    /// The last slot that is known to be durable.
    #[must_use]
    pub fn current(&self) -> &HostSlot {
        &self.current
    }

    /// Publishes `slot`, whose sequence is set here, once all of `after` is durable. Returns the
    /// slot that was current before and is now the older one. Durable on return.
    ///
    /// # Errors
    /// If a write of `after`, the slot's own or the flush failed: then `current` stays.
    pub async fn publish(&mut self, mut slot: HostSlot, after: &Batch) -> Result<HostSlot, Error> {
        slot.sequence = self.current.sequence + 1;
        let copy =
            if base::mutant::active("overwrite_newest_slot") { self.copy } else { 1 - self.copy };
        let at = self.geometry.host_slot(slot.host, copy);
        let block = BlockSlice::whole(Rc::new(slot.encode(&self.checksums, at)));
        let batch = Batch::default();
        let edges = if base::mutant::active("root_before_nodes") {
            Vec::new()
        } else {
            vec![After::Durable(after.clone())]
        };
        if base::mutant::active("both_slots_at_once") {
            let other = self.geometry.host_slot(slot.host, self.copy);
            let block = BlockSlice::whole(Rc::new(slot.encode(&self.checksums, other)));
            self.scheduler.write_after(&batch, other, vec![block], edges.clone());
        }
        self.scheduler.write_after(&batch, at, vec![block], edges);
        self.scheduler.durable(&batch).await?;
        self.copy = copy;
        Ok(std::mem::replace(&mut self.current, slot))
    }
}

/// Whether a slot that the log vouches for is missing: `vouched` is the newest sequence that a log
/// block names as durable. One step behind is survived, as the log reaches back to the older slot.
///
/// # Errors
/// `Refused` if the slot is older than that.
pub fn check_vouched(slot: &HostSlot, vouched: u64) -> Result<(), Error> {
    if vouched > slot.sequence + 1 {
        return Err(Error::refused(
            ErrorKind::Corrupt,
            format!(
                "host slot {} is at sequence {}, but the log has seen {vouched}: slot writes were \
                 lost or the device went back in time; restore it or run check --repair",
                slot.host, slot.sequence
            ),
        ));
    }
    Ok(())
}
