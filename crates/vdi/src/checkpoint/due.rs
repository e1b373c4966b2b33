//! When checkpoints are made: when the log, the changes or their age ask for one, and when somebody
//! cannot go on without.

use std::rc::Rc;
use std::time::Duration;

use base::{ErrorKind, Lsn, Pba};
use ondisk::SlotState;
use runtime::sync::{OneshotSender, oneshot};

use crate::Error;
use crate::engine::{EIO, Engine};
use crate::release::ReleasedUpTo;

/// Changed nodes that force a checkpoint: each holds up to about two blocks of memory.
const CHANGED_NODES_DUE: u64 = 16 << 10;

/// Changed nodes at which changes wait for a checkpoint: half a gigabyte at the very most.
const CHANGED_NODES_MAX: u64 = 4 * CHANGED_NODES_DUE;

/// Records that force a checkpoint, so that replay stays short whatever their size.
const RECORDS_MAX: u64 = 256 << 10;

/// Longest time that changes wait for a checkpoint, in nanoseconds.
const AGE_MAX_NS: u64 = 5_000_000_000;

/// How long checkpoints may fail while guests wait for them.
const FAILING_MAX: Duration = Duration::from_secs(60);

/// Pause after one that failed: whatever it was needs time or space.
const RETRY_AFTER: Duration = Duration::from_millis(100);

#[derive(Default)]
pub(super) struct Forced {
    running: bool,
    queued: Vec<OneshotSender<Result<ReleasedUpTo, ErrorKind>>>,
}

impl Engine {
    /// Asks for a checkpoint soon.
    pub(crate) fn request_checkpoint(&self) {
        self.checkpoints.wanted.notify();
    }

    /// Whether a checkpoint is due, by log fill, changes or age (design rule 28).
    pub(crate) fn checkpoint_is_due(&self) -> bool {
        let (used, ring) = self.log.usage();
        let since_cut = self.records_since_cut();
        let pending = since_cut > 0 || !self.checkpoints.replaced.borrow().is_empty();
        let aged = self.runtime.now().0 >= self.checkpoints.last_at.get().0 + AGE_MAX_NS;
        self.log_blocks_since_cut() >= ring / 4
            || used >= ring * 5 / 8
            || since_cut >= RECORDS_MAX
            || self.changed_nodes.get() >= CHANGED_NODES_DUE
            || (aged && pending)
    }

    /// Waits until there is memory for another change: guests can change more than checkpoints
    /// merge meanwhile.
    ///
    /// # Errors
    /// If the store has failed.
    pub(crate) async fn room_in_memory(&self) -> Result<(), Error> {
        loop {
            let merged = self.checkpoints.merged.changed();
            if let Some(error) = self.scheduler.failure() {
                return Err(crate::engine::stopped(&error));
            }
            if !self.is_full_of_changes() {
                return Ok(());
            }
            self.request_checkpoint();
            merged.await;
        }
    }

    fn is_full_of_changes(&self) -> bool {
        self.changed_nodes.get() >= CHANGED_NODES_MAX
    }

    fn records_since_cut(&self) -> u64 {
        let last = self.checkpoints.last_cut.borrow();
        let first = last.as_ref().map_or(Lsn::new(0), |segment| segment.first_lsn);
        self.log.last_lsn().plus(1).distance_from(first)
    }

    fn log_blocks_since_cut(&self) -> u64 {
        let last = self.checkpoints.last_cut.borrow();
        last.as_ref().map_or(0, |segment| self.log.position().distance_from(segment.start))
    }

    /// Two checkpoints, one after the other: afterwards both slots name everything up to now, and
    /// what was replaced before is free.
    ///
    /// # Errors
    /// If a checkpoint failed.
    pub(crate) async fn checkpoint_twice(self: &Rc<Self>) -> Result<(), Error> {
        let released = self.publish_twice().await?;
        self.released(released, || false).await;
        Ok(())
    }

    /// As [`Self::checkpoint_twice`], but what was replaced may not be free yet: [`Self::released`]
    /// waits for it, and for every reader. Nobody who does so is in the way of the next pair, which
    /// may give what others need, or fail. Those who ask while a pair is under way share the next.
    ///
    /// # Errors
    /// If a checkpoint failed.
    pub(crate) async fn publish_twice(self: &Rc<Self>) -> Result<ReleasedUpTo, Error> {
        let (done, outcome) = oneshot();
        let start = {
            let mut forced = self.checkpoints.forced.borrow_mut();
            forced.queued.push(done);
            !std::mem::replace(&mut forced.running, true)
        };
        if start {
            let engine = Rc::clone(self);
            drop(self.runtime.spawn(async move {
                loop {
                    let joined = std::mem::take(&mut engine.checkpoints.forced.borrow_mut().queued);
                    if joined.is_empty() {
                        engine.checkpoints.forced.borrow_mut().running = false;
                        return;
                    }
                    let mut outcome = engine.checkpoint(SlotState::Running).await;
                    if outcome.is_ok() {
                        outcome = engine.checkpoint(SlotState::Running).await;
                    }
                    let outcome = outcome.map_err(|error| error.kind());
                    let outcome = outcome.map(|()| engine.releases.up_to_now());
                    for waiting in joined {
                        waiting.send(outcome);
                    }
                }
            }));
        }
        let failed = |kind| Error::refused(kind, "a checkpoint failed; see the log");
        outcome.await.unwrap_or(Err(ErrorKind::Fenced)).map_err(failed)
    }

    /// Runs checkpoints when they are due, until the store is closed: while it closes, requests
    /// under way may wait for the room that only a checkpoint makes.
    pub(crate) async fn checkpoint_when_due(self: Rc<Self>) {
        loop {
            let wanted = self.checkpoints.wanted.changed();
            if self.closed.get() || self.scheduler.failure().is_some() {
                return;
            }
            if self.checkpoint_is_due() {
                if let Err(error) = self.checkpoint(SlotState::Running).await {
                    self.stop_if_hopeless(&error);
                    self.runtime.sleep(RETRY_AFTER).await;
                }
                continue;
            }
            wanted.await;
        }
    }

    /// After a checkpoint that failed: stops the store if guests have waited for one that succeeds
    /// for long. An error is better than to hang for ever (G10).
    fn stop_if_hopeless(&self, error: &Error) {
        let guests_wait = self.log.is_full() || self.is_full_of_changes();
        let now = self.runtime.now();
        let failing_since = &self.checkpoints.failing_since;
        let since = failing_since.get().unwrap_or(now);
        failing_since.set(guests_wait.then_some(since));
        if !guests_wait || now.since(since) < FAILING_MAX {
            return;
        }
        tracing::error!(%error, "no checkpoint succeeds, and guests wait for one");
        let cause = match error.kind() {
            ErrorKind::NoSpace => device::Cause::NoSpace,
            _ => device::Cause::Errno(EIO),
        };
        self.scheduler.fail(device::DeviceError::new(cause, Pba::new(0)));
    }
}
