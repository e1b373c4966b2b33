//! Keeping a second machine out, where no file lock reaches (design rule 15), as the multiple mount
//! protection of ext4 does.
//!
//! Whoever opens a store writes a *claim* into the heartbeat block: a beat with a random number.
//! If the store was last used by this boot of this machine, and nobody else has claimed it since,
//! file locks keep all others out that could be at it. Else it waits for a lease time, and a bit
//! more by chance, and goes on only if the claim is still there and the slot is as it was:
//! - a daemon that runs beats every second, over the claim;
//! - of several that open at once, the last to claim goes on, and the others see its claim;
//! - one that has looked and gone on has published before the lease time of the next one is over,
//!   and that shows in the slot.
//!
//! It looks again before it first writes to what the store holds, and when it has published; in
//! between, it writes its claim every second, as whoever comes then waits only for a lease time. The
//! price: a machine that stands still between such a look and a write for longer than the lease
//! time is not kept from that write. Only the device could do that. But it stops when it finds the
//! beat of a later epoch where its own should stand.

use std::rc::Rc;
use std::time::Duration;

use base::{BlockSlice, ErrorKind, HostId};
use blockstore::Geometry;
use blockstore::slots::read_slots;
use device::{Device, DeviceError};
use ondisk::{Checksums, Heartbeat, HostSlot, SlotState};
use runtime::Runtime;

use crate::Error;

/// The lease time: how long a store is watched for somebody who uses it.
const WATCH: Duration = Duration::from_secs(5);

/// Time between two signs of life: several in a lease time.
pub(crate) const BEAT: Duration = Duration::from_secs(1);

/// How often a claim is written until it reads back.
const WRITES_MAX: u32 = 3;

/// Where a store's host shows that it lives.
pub(crate) struct Place<'a> {
    pub(crate) device: &'a Device,
    pub(crate) runtime: &'a Runtime,
    pub(crate) geometry: &'a Geometry,
    pub(crate) checksums: &'a Checksums,
    pub(crate) host: HostId,
}

impl Place<'_> {
    /// The heartbeat, if there is a valid one.
    pub(crate) async fn read(&self) -> Result<Option<Heartbeat>, DeviceError> {
        let at = self.geometry.heartbeat(self.host);
        let buffer = self.device.read(at, 1, self.runtime.buffers().take(1)).await?;
        let block = buffer.blocks().first();
        Ok(block.and_then(|block| Heartbeat::decode(block, self.checksums, at).ok()))
    }

    async fn write(&self, beat: &Heartbeat) -> Result<(), DeviceError> {
        let at = self.geometry.heartbeat(self.host);
        let block = BlockSlice::whole(Rc::new(beat.encode(self.checksums, at)));
        self.device.write(at, vec![block]).await
    }
}

/// Refuses a store whose last user may be alive on another machine. For those who only read it.
///
/// # Errors
/// `Busy` if it is; device errors.
pub(crate) async fn refuse_alive(
    place: &Place<'_>,
    slot: &HostSlot,
    boot_id: [u8; 16],
) -> Result<(), Error> {
    if slot.state != SlotState::Running || slot.boot_id == boot_id {
        return Ok(());
    }
    let before = place.read().await.map_err(blockstore::Error::from)?;
    tracing::info!("the store was not closed on another machine or boot: watching for its daemon");
    place.runtime.sleep(WATCH).await;
    if place.read().await.map_err(blockstore::Error::from)? != before {
        return Err(busy());
    }
    Ok(())
}

/// What a claimant waits beyond the lease time: by chance, so that of several machines that try
/// again and again, each over the claims of the others, one gets through.
fn jitter(nonce: u64) -> Duration {
    Duration::from_millis(nonce % 5_000)
}

/// A claim to a store.
pub(crate) struct Claim {
    beat: Heartbeat,
    /// Whether file locks keep everybody out that could be at the store.
    is_home: bool,
}

/// A claim that is written again and again.
pub(crate) struct Kept(#[expect(dead_code, reason = "lives as long as it")] Rc<()>);

impl Claim {
    /// Claims a store that was found with `slot`, for `boot_id`; `nonce` is random.
    ///
    /// # Errors
    /// `Busy` if somebody else uses or claims it; device errors.
    pub(crate) async fn make(
        place: &Place<'_>,
        slot: &HostSlot,
        boot_id: [u8; 16],
        nonce: u64,
    ) -> Result<Self, Error> {
        let beat = Heartbeat {
            host: place.host,
            epoch: slot.epoch,
            sequence: nonce,
            wall_ns: place.runtime.wall_ns(),
            boot_id,
        };
        // A block that cannot be read names nobody.
        let found = place.read().await.ok().flatten();
        let is_home = slot.boot_id == boot_id && found.is_none_or(|found| found.boot_id == boot_id);
        let claim = Self { beat, is_home };
        claim.write(place).await?;
        if !is_home {
            tracing::info!("another machine or boot used the store last: watching for its daemon");
            place.runtime.sleep(WATCH + jitter(nonce)).await;
            claim.verify(place, slot).await?;
        }
        Ok(claim)
    }

    /// Writes the claim again every second until the answer is dropped.
    pub(crate) fn keep(&self, place: &Place<'_>) -> Kept {
        let at = place.geometry.heartbeat(place.host);
        let block = Rc::new(self.beat.encode(place.checksums, at));
        let (device, runtime) = (place.device.clone(), place.runtime.clone());
        let kept = Rc::new(());
        let held = Rc::downgrade(&kept);
        drop(place.runtime.spawn(async move {
            loop {
                runtime.sleep(BEAT).await;
                if held.strong_count() == 0 {
                    return;
                }
                // Who looks for it learns that it could not be written.
                let _ = device.write(at, vec![BlockSlice::whole(Rc::clone(&block))]).await;
            }
        }));
        Kept(kept)
    }

    async fn write(&self, place: &Place<'_>) -> Result<(), Error> {
        for attempt in 1..=WRITES_MAX {
            let written = place.write(&self.beat).await;
            let read = place.read().await;
            match (written, read) {
                (_, Ok(Some(found))) if found == self.beat => return Ok(()),
                (Err(error), _) | (Ok(()), Err(error)) if attempt == WRITES_MAX => {
                    if !self.is_home {
                        return Err(blockstore::Error::from(error).into());
                    }
                    tracing::warn!(%error, "the heartbeat block does not work");
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes sure that nobody else has claimed the store since, and that its newest slot is `slot`.
    ///
    /// # Errors
    /// `Busy` if it is not so; device errors.
    pub(crate) async fn verify(&self, place: &Place<'_>, slot: &HostSlot) -> Result<(), Error> {
        let is_there = match place.read().await {
            // What this boot wrote before is no claim of another machine.
            Ok(found) if self.is_home => {
                found.is_none_or(|found| found.boot_id == self.beat.boot_id)
            }
            Ok(found) => found == Some(self.beat),
            Err(_) if self.is_home => true,
            Err(error) => return Err(blockstore::Error::from(error).into()),
        };
        let Place { device, runtime, geometry, checksums, host } = *place;
        let pair = read_slots(device, runtime, geometry, checksums, host).await?;
        // At home, another slot of this boot is one that could not be read before.
        let is_ours = self.is_home && pair.newest.boot_id == slot.boot_id;
        if is_there && (is_ours || pair.newest == *slot) {
            return Ok(());
        }
        Err(busy())
    }
}

fn busy() -> Error {
    Error::refused(
        ErrorKind::Busy,
        "a daemon on another machine is using this store; stop it first",
    )
}
