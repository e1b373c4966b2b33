//! The write scheduler: what must be on the device before what (design.md I3).
//!
//! Writes are operations in a graph. An edge says after which [`Batch`] a write may be issued:
//! when it *completed* (a later read sees it) or when it is *durable* (a flush that was issued
//! after it completed has succeeded). What has no edge left is issued together at the end of the
//! turn, adjacent blocks as one device write.
//!
//! Invariants:
//! - no two writes to one block are in flight: a newer version is written elsewhere (renaming), and
//!   the few places that are rewritten wait for their predecessor;
//! - a flush request joins only a device flush that was not issued yet; at most one is in flight
//!   and one queued (design rule 4);
//! - a failed flush is final: nothing is written, flushed or acknowledged after it (rule 56); so
//!   is an error on the way to the device (rule 57).

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use base::{BlockSlice, Lsn, Pba, REQUEST_BLOCKS_MAX};
use device::{Cause, Device, DeviceError};
use runtime::Runtime;
use runtime::sync::{OneshotReceiver, OneshotSender, Signal, oneshot};

/// Most buffers in one gather write; the kernel takes 1024.
const GATHER_MAX: usize = 256;

/// Issues writes and flushes. Clones share it.
#[derive(Clone)]
pub struct WriteScheduler(Rc<Inner>);

struct Inner {
    runtime: Runtime,
    device: Device,
    /// Ready writes, issued at the end of the turn.
    ready: RefCell<Vec<ReadyWrite>>,
    /// Blocks with a write under way, in builds that verify.
    in_flight: RefCell<BTreeSet<Pba>>,
    flush: RefCell<FlushQueue>,
    watermarks: Watermarks,
    failure: RefCell<Option<DeviceError>>,
    failed: Signal,
    flush_count: Cell<u64>,
}

struct ReadyWrite {
    at: Pba,
    block_count: usize,
    blocks: Vec<BlockSlice>,
    done: OneshotSender<Result<(), DeviceError>>,
}

#[derive(Default)]
struct FlushQueue {
    in_flight: bool,
    queued: Vec<OneshotSender<Result<(), DeviceError>>>,
}

/// How far the log is complete and durable. A flush carries the first over to the second.
#[derive(Clone, Default)]
pub struct Watermarks(Rc<WatermarkCells>);

#[derive(Default)]
struct WatermarkCells {
    completed: Cell<Lsn>,
    durable: Cell<Lsn>,
}

impl Watermarks {
    /// All records up to here are complete: their data and their log blocks.
    #[must_use]
    pub fn completed(&self) -> Lsn {
        self.0.completed.get()
    }

    /// F (design rule 3): they were complete when a flush was issued that succeeded.
    #[must_use]
    pub fn durable(&self) -> Lsn {
        self.0.durable.get()
    }

    pub(crate) fn advance_completed(&self, to: Lsn) {
        assert!(to >= self.completed(), "completion never goes back");
        self.0.completed.set(to);
    }

    pub(crate) fn start_at(&self, lsn: Lsn) {
        self.0.completed.set(lsn);
        self.0.durable.set(lsn);
    }
}

/// Writes that are waited for together.
#[derive(Clone, Default)]
pub struct Batch(Rc<BatchState>);

#[derive(Default)]
struct BatchState {
    pending: Cell<usize>,
    failure: Cell<Option<DeviceError>>,
    changed: Signal,
}

impl Batch {
    /// Waits until every write of the batch has completed.
    ///
    /// # Errors
    /// The first failure; other writes of the batch may have been done.
    pub async fn completed(&self) -> Result<(), DeviceError> {
        while self.0.pending.get() > 0 {
            self.0.changed.changed().await;
        }
        self.0.failure.get().map_or(Ok(()), Err)
    }

    /// Waits until fewer than `count` writes of the batch are under way: what they hold in memory
    /// stays bounded.
    pub async fn below(&self, count: usize) {
        while self.0.pending.get() >= count {
            self.0.changed.changed().await;
        }
    }

    fn finish_one(&self, outcome: Result<(), DeviceError>) {
        if let Err(error) = outcome {
            self.0.failure.set(Some(self.0.failure.get().unwrap_or(error)));
        }
        self.0.pending.set(self.0.pending.get() - 1);
        self.0.changed.notify();
    }
}

/// An edge: what must have happened before a write is issued.
#[derive(Clone)]
pub enum After {
    /// All writes of the batch completed.
    Completed(Batch),
    /// All writes of the batch are durable.
    Durable(Batch),
}

impl WriteScheduler {
    /// A scheduler for `device`.
    #[must_use]
    pub fn new(runtime: Runtime, device: Device) -> Self {
        Self(Rc::new(Inner {
            runtime,
            device,
            ready: RefCell::default(),
            in_flight: RefCell::default(),
            flush: RefCell::default(),
            watermarks: Watermarks::default(),
            failure: RefCell::new(None),
            failed: Signal::default(),
            flush_count: Cell::new(0),
        }))
    }

    /// How far the log is complete and durable.
    #[must_use]
    pub fn watermarks(&self) -> &Watermarks {
        &self.0.watermarks
    }

    /// Device flushes so far.
    #[must_use]
    pub fn flush_count(&self) -> u64 {
        self.0.flush_count.get()
    }

    /// Whether a device flush is under way.
    #[must_use]
    pub fn is_flushing(&self) -> bool {
        self.0.flush.borrow().in_flight
    }

    /// Why nothing is written any more, if so.
    #[must_use]
    pub fn failure(&self) -> Option<DeviceError> {
        *self.0.failure.borrow()
    }

    /// Waits until the scheduler has failed.
    pub async fn failed(&self) -> DeviceError {
        loop {
            let changed = self.0.failed.changed();
            if let Some(error) = self.failure() {
                return error;
            }
            changed.await;
        }
    }

    /// Stops everything: called when the log can no longer be appended to.
    pub fn fail(&self, error: DeviceError) {
        if self.failure().is_none() {
            tracing::error!(%error, "the store stops: nothing is written any more");
            *self.0.failure.borrow_mut() = Some(error);
            self.0.failed.notify();
        }
    }

    /// Stops everything if it was the way to the device that failed: it may come back without its
    /// cache, and then the next flush would succeed for writes that are gone. Recovery reads back
    /// what no flush covered, and writes it again (design rule 57).
    pub fn suspect(&self, error: DeviceError) {
        if error.is_transport() {
            self.fail(error);
        }
    }

    /// Writes `blocks` to `at` with everything else that becomes ready in this turn. The write
    /// goes on if the receiver is dropped. Completed, not durable, when the receiver answers.
    pub fn write(
        &self,
        at: Pba,
        blocks: Vec<BlockSlice>,
    ) -> OneshotReceiver<Result<(), DeviceError>> {
        let (done, outcome) = oneshot();
        let block_count = blocks.iter().map(BlockSlice::block_count).sum();
        let first = {
            let mut ready = self.0.ready.borrow_mut();
            ready.push(ReadyWrite { at, block_count, blocks, done });
            ready.len() == 1
        };
        if first {
            let scheduler = self.clone();
            drop(self.0.runtime.spawn(async move {
                scheduler.0.runtime.turn_end().await;
                scheduler.issue();
            }));
        }
        outcome
    }

    /// Adds a write without edges to `batch`; `then` runs when it has completed or failed.
    pub fn write_in(
        &self,
        batch: &Batch,
        at: Pba,
        blocks: Vec<BlockSlice>,
        then: impl FnOnce() + 'static,
    ) {
        batch.0.pending.set(batch.0.pending.get() + 1);
        let (written, batch) = (self.write(at, blocks), batch.clone());
        drop(self.0.runtime.spawn(async move {
            let outcome = written.await.unwrap_or_else(|_| Err(DeviceError::new(Cause::Gone, at)));
            then();
            batch.finish_one(outcome);
        }));
    }

    /// Adds a write to `batch`, to be issued when every edge in `after` is satisfied. If one
    /// fails, the write is not issued and the batch fails.
    pub fn write_after(&self, batch: &Batch, at: Pba, blocks: Vec<BlockSlice>, after: Vec<After>) {
        batch.0.pending.set(batch.0.pending.get() + 1);
        let (scheduler, batch) = (self.clone(), batch.clone());
        drop(self.0.runtime.spawn(async move {
            let outcome = match scheduler.satisfied(&after).await {
                Ok(()) => {
                    let written = scheduler.write(at, blocks).await;
                    written.unwrap_or_else(|_| Err(DeviceError::new(Cause::Gone, at)))
                }
                Err(error) => Err(error),
            };
            batch.finish_one(outcome);
        }));
    }

    async fn satisfied(&self, after: &[After]) -> Result<(), DeviceError> {
        for edge in after {
            match edge {
                After::Completed(batch) => batch.completed().await?,
                After::Durable(batch) => self.durable(batch).await?,
            }
        }
        Ok(())
    }

    /// Waits until every write of `batch` is durable.
    ///
    /// # Errors
    /// If a write of the batch or the flush failed.
    pub async fn durable(&self, batch: &Batch) -> Result<(), DeviceError> {
        batch.completed().await?;
        if base::mutant::active("checkpoint_skips_flush") {
            return Ok(());
        }
        self.flush().await
    }

    /// Makes everything durable that has completed before this call.
    ///
    /// # Errors
    /// If the flush failed, or an earlier one did: then nothing is known to be durable any more,
    /// and the scheduler has stopped for good.
    pub async fn flush(&self) -> Result<(), DeviceError> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let (done, outcome) = oneshot();
        let start = {
            let mut flush = self.0.flush.borrow_mut();
            flush.queued.push(done);
            !std::mem::replace(&mut flush.in_flight, true)
        };
        if start {
            let scheduler = self.clone();
            drop(self.0.runtime.spawn(async move { scheduler.flush_queued().await }));
        }
        outcome.await.unwrap_or_else(|_| Err(DeviceError::new(Cause::Gone, Pba::new(0))))
    }

    /// Issues device flushes, one at a time, until nobody waits for one.
    async fn flush_queued(self) {
        loop {
            let joined = std::mem::take(&mut self.0.flush.borrow_mut().queued);
            if joined.is_empty() {
                self.0.flush.borrow_mut().in_flight = false;
                return;
            }
            // Taken before the flush is issued: what completes later is not covered.
            let covered = self.0.watermarks.completed();
            let outcome = match self.failure() {
                None => self.0.device.flush().await,
                Some(error) => Err(error),
            };
            self.0.flush_count.set(self.0.flush_count.get() + 1);
            let mut joined = joined;
            if base::mutant::active("flush_joins_one_under_way") {
                joined.append(&mut self.0.flush.borrow_mut().queued);
            }
            let covered = if base::mutant::active("durable_runs_ahead") {
                self.0.watermarks.completed()
            } else {
                covered
            };
            match outcome {
                Ok(()) => {
                    let durable = &self.0.watermarks.0.durable;
                    durable.set(durable.get().max(covered));
                }
                Err(_) if base::mutant::active("failed_flush_is_forgotten") => {}
                Err(error) => self.fail(error),
            }
            for waiting in joined {
                waiting.send(outcome);
            }
        }
    }

    /// Issues all ready writes, adjacent ones as one.
    fn issue(&self) {
        let mut ready = std::mem::take(&mut *self.0.ready.borrow_mut());
        ready.sort_by_key(|write| write.at);
        let mut run: Vec<ReadyWrite> = Vec::new();
        let (mut run_blocks, mut run_slices) = (0, 0);
        for write in ready {
            let adjacent = run.first().is_some_and(|first| {
                first.at.plus(u64::try_from(run_blocks).unwrap_or(u64::MAX)) == write.at
            });
            let fits = run_blocks + write.block_count <= REQUEST_BLOCKS_MAX
                && run_slices + write.blocks.len() <= GATHER_MAX;
            let joins = adjacent && fits;
            if !joins && !run.is_empty() {
                self.issue_run(std::mem::take(&mut run));
                (run_blocks, run_slices) = (0, 0);
            }
            run_blocks += write.block_count;
            run_slices += write.blocks.len();
            run.push(write);
        }
        if !run.is_empty() {
            self.issue_run(run);
        }
    }

    fn issue_run(&self, run: Vec<ReadyWrite>) {
        self.begin(&run);
        let scheduler = self.clone();
        drop(self.0.runtime.spawn(async move {
            let outcome = match (scheduler.failure(), run.first()) {
                (Some(error), _) => Err(error),
                (None, None) => Ok(()),
                (None, Some(first)) => {
                    let blocks = run.iter().flat_map(|write| write.blocks.iter().cloned());
                    scheduler.0.device.write(first.at, blocks.collect()).await
                }
            };
            scheduler.end(&run);
            if let Err(error) = outcome {
                scheduler.suspect(error);
            }
            if outcome.is_err() && run.len() > 1 && scheduler.failure().is_none() {
                // One bad block must fail only the write that it belongs to.
                for write in run {
                    scheduler.issue_run(vec![write]);
                }
                return;
            }
            for write in run {
                write.done.send(outcome);
            }
        }));
    }

    fn begin(&self, run: &[ReadyWrite]) {
        let mut in_flight = self.0.in_flight.borrow_mut();
        for write in run {
            assert!(in_flight.insert(write.at), "two writes of block {} in flight", write.at);
        }
    }

    fn end(&self, run: &[ReadyWrite]) {
        let mut in_flight = self.0.in_flight.borrow_mut();
        for write in run {
            in_flight.remove(&write.at);
        }
    }
}

impl std::fmt::Debug for WriteScheduler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WriteScheduler({:?})", self.0.device)
    }
}
