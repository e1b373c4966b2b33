//! What a store does by itself: flush what nobody flushes, note F, beat, checkpoint.

use std::rc::Rc;
use std::time::Duration;

use base::BlockSlice;
use device::{Cause, DeviceError};
use ondisk::Heartbeat;

use crate::claim::BEAT;
use crate::engine::Engine;

/// How often the tasks look whether something is due.
const TICK: Duration = Duration::from_millis(250);

/// Ticks after which acknowledged writes are flushed although nobody asked (design rule 16).
const TICKS_PER_FLUSH: u64 = 4;

/// Ticks after which moments are kept that are due by time.
const TICKS_PER_MOMENT: u64 = 4;

/// Ticks after which it is looked for holds and moments whose time has come.
const TICKS_PER_THINNING: u64 = 16;

/// Written bytes after which they are flushed although nobody asked: what recovery verifies and
/// writes again stays small.
const UNFLUSHED_BYTES_MAX: u64 = 64 << 20;

/// Starts the background tasks of an open store.
pub(crate) fn start(engine: &Rc<Engine>) {
    let runtime = engine.runtime.clone();
    drop(runtime.spawn(Rc::clone(engine).checkpoint_when_due()));
    drop(runtime.spawn(tick(Rc::clone(engine))));
    drop(runtime.spawn(beats(Rc::clone(engine))));
    drop(runtime.spawn(Rc::clone(engine).load_retained()));
    let watched = Rc::clone(engine);
    drop(runtime.spawn(async move {
        watched.scheduler.failed().await;
        // Whoever waits for room or for a record sees now that there is nothing to wait for.
        watched.log.wake_all();
        watched.releases.wake_all();
        watched.checkpoints.merged.notify();
        watched.request_checkpoint();
    }));
}

async fn tick(engine: Rc<Engine>) {
    let mut ticks: u64 = 0;
    loop {
        engine.runtime.sleep(TICK).await;
        if engine.closing.get() || engine.scheduler.failure().is_some() {
            return;
        }
        ticks += 1;
        let watermarks = engine.scheduler.watermarks().clone();
        if ticks.is_multiple_of(TICKS_PER_FLUSH) && watermarks.completed() > watermarks.durable() {
            // A failure is the scheduler's to report.
            let _ = engine.scheduler.flush().await;
        }
        if engine.closing.get() {
            // A block behind the cut of the last checkpoint may arrive when somebody else has
            // opened the store, and writes there.
            return;
        }
        engine.log.mark_durable();
        if engine.checkpoint_is_due() {
            engine.request_checkpoint();
        }
        engine.collect_if_due();
        engine.unload_idle().await;
        if ticks.is_multiple_of(TICKS_PER_MOMENT) {
            engine.keep_moments();
        }
        if ticks.is_multiple_of(TICKS_PER_THINNING) {
            engine.end_due_holds();
            engine.end_moments();
            engine.count_if_outgrown();
        }
    }
}

/// Shows that the store is in use, until it is closed: for another machine, one that does not beat
/// for a lease time is dead. So nothing else is waited for.
async fn beats(engine: Rc<Engine>) {
    let mut sequence: u64 = 0;
    loop {
        engine.runtime.sleep(BEAT).await;
        if engine.ended.get() || engine.scheduler.failure().is_some() {
            return;
        }
        if let Ok(Some(found)) = engine.place().read().await
            && found.epoch > engine.epoch
        {
            tracing::error!(epoch = %found.epoch, "another machine has opened the store");
            let at = engine.geometry.heartbeat(engine.host);
            engine.scheduler.fail(DeviceError::new(Cause::Gone, at));
            return;
        }
        sequence += 1;
        beat(&engine, sequence).await;
    }
}

async fn beat(engine: &Engine, sequence: u64) {
    let at = engine.geometry.heartbeat(engine.host);
    let heartbeat = Heartbeat {
        host: engine.host,
        epoch: engine.epoch,
        sequence,
        wall_ns: engine.runtime.wall_ns(),
        boot_id: engine.boot_id,
    };
    let block = BlockSlice::whole(Rc::new(heartbeat.encode(&engine.checksums, at)));
    if let Ok(Err(error)) = engine.scheduler.write(at, vec![block]).await {
        tracing::warn!(%error, "the heartbeat could not be written");
    }
}

impl Engine {
    /// Called for every write: flushes and checkpoints that are due by amount rather than time.
    pub(crate) fn nudge(self: &Rc<Self>, bytes: u64) {
        let unflushed = self.unflushed.get() + bytes;
        self.unflushed.set(unflushed);
        let due = unflushed >= UNFLUSHED_BYTES_MAX || self.log.is_long_unflushed();
        if due && !self.scheduler.is_flushing() {
            self.unflushed.set(0);
            let engine = Rc::clone(self);
            drop(self.runtime.spawn(async move {
                let _ = engine.scheduler.flush().await;
            }));
        }
        if self.checkpoint_is_due() {
            self.request_checkpoint();
        }
    }
}
