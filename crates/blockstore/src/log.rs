//! The write-ahead log of one host: a ring of chained blocks, written in groups.
//!
//! Life of a record: [`Log::admit`] waits for room, [`Log::append`] gives it its LSN and puts it
//! into the open block; at the end of the turn, if it is in a hurry, the block is sealed and written, together
//! with whatever else was appended; the receiver answers when this block *and every block before it*
//! have completed (design rule 1). When its data has completed too, the owner says
//! [`Log::complete`]; that moves the completed watermark, which the next flush carries to F.
//!
//! Invariants:
//! - a block is written once per lap (rule 6): each group begins a new one;
//! - LSNs are given without gaps, in the order of the blocks;
//! - F never passes a record whose data has not completed (rule 10);
//! - guests stop at the high-water mark, so that checkpoints always have room (rule 25), and
//!   sooner if F stays behind: recovery writes what is above F again, into the rest of the ring;
//! - after a failed append nothing is appended any more (rule 56).

mod replay;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use base::{BlockSlice, Epoch, Lsn, Pba, RingPosition};
use device::{Cause, DeviceError};
use ondisk::{Checksums, LOG_PAYLOAD_BYTES, LogBlockBuilder, LogSegment, Record, Seal};
use runtime::Runtime;
use runtime::sync::{OneshotReceiver, OneshotSender, Signal, oneshot};

pub use replay::{Break, Replayed, survey};

use crate::{Geometry, WriteScheduler};

/// Log blocks in flight; more records wait and share the next block. Two keep the device busy
/// while a group gathers.
const BLOCKS_IN_FLIGHT_MAX: usize = 4;

/// What the log's writer needs to know of its surroundings.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// Places.
    pub geometry: Geometry,
    /// First block of the ring.
    pub log_start: Pba,
    /// Checksums of the store.
    pub checksums: Checksums,
    /// Epoch of this run.
    pub epoch: Epoch,
    /// Its nonce.
    pub nonce: u64,
    /// Position of the first block to write.
    pub position: RingPosition,
    /// Number of the first record.
    pub first_lsn: Lsn,
    /// First position that is still needed.
    pub tail: RingPosition,
    /// Newest host slot sequence that is durable.
    pub slot_sequence: u64,
}

/// The log. Clones share it.
#[derive(Clone)]
pub struct Log(Rc<Inner>);

struct Inner {
    runtime: Runtime,
    scheduler: WriteScheduler,
    config: LogConfig,
    state: RefCell<State>,
    room: Signal,
    completed: Signal,
}

struct State {
    position: RingPosition,
    lsn_next: Lsn,
    /// Checksum of the block before `position`.
    previous: u64,
    tail: RingPosition,
    slot_sequence: u64,
    cut: Lsn,
    /// Blocks promised to admitted records that are not sealed yet.
    reserved: u64,
    open: LogBlockBuilder,
    open_waiters: Vec<OneshotSender<Result<(), DeviceError>>>,
    /// Whether somebody waits for the open block.
    hurried: bool,
    commit_scheduled: bool,
    /// Sealed blocks in order, until they and all before them have completed.
    in_flight: VecDeque<SealedBlock>,
    /// For each record above the completed watermark: whether it is complete.
    incomplete: VecDeque<bool>,
    /// F as the newest sealed block says it.
    durable_noted: Lsn,
    /// Last record and position of the sealed blocks with records above that F.
    above_durable: VecDeque<(Lsn, RingPosition)>,
    blocks_written: u64,
}

struct SealedBlock {
    position: RingPosition,
    outcome: Option<Result<(), DeviceError>>,
    waiters: Vec<OneshotSender<Result<(), DeviceError>>>,
}

/// Room in the log for one record. Returned if it is dropped unused.
pub struct Admission {
    log: Log,
    used: bool,
}

impl Log {
    /// Starts the log of an epoch.
    #[must_use]
    pub fn start(runtime: Runtime, scheduler: WriteScheduler, config: LogConfig) -> Self {
        let last = Lsn::new(config.first_lsn.get().saturating_sub(1));
        scheduler.watermarks().start_at(last);
        let state = State {
            position: config.position,
            lsn_next: config.first_lsn,
            previous: 0,
            tail: config.tail,
            slot_sequence: config.slot_sequence,
            cut: Lsn::default(),
            reserved: 0,
            open: LogBlockBuilder::default(),
            open_waiters: Vec::new(),
            hurried: false,
            commit_scheduled: false,
            in_flight: VecDeque::new(),
            incomplete: VecDeque::new(),
            durable_noted: Lsn::default(),
            above_durable: VecDeque::new(),
            blocks_written: 0,
        };
        Self(Rc::new(Inner {
            runtime,
            scheduler,
            config,
            state: RefCell::new(state),
            room: Signal::default(),
            completed: Signal::default(),
        }))
    }

    /// Waits for room for one guest record below the high-water mark.
    ///
    /// # Errors
    /// If the log has failed.
    pub async fn admit(&self) -> Result<Admission, DeviceError> {
        loop {
            if let Some(error) = self.0.scheduler.failure() {
                return Err(error);
            }
            let room = self.0.room.changed();
            let (above, reserved) = {
                let state = self.0.state.borrow();
                (self.blocks_above_durable(&state), state.reserved)
            };
            if above + reserved >= self.above_durable_max() {
                // What others were admitted for has to be written first, and what is written has
                // to complete before a flush can cover it.
                if self.flush_would_cover() {
                    self.0.scheduler.flush().await?
                } else {
                    room.await
                }
                continue;
            }
            {
                let mut state = self.0.state.borrow_mut();
                if self.used_blocks(&state) + state.reserved < self.high_water() {
                    state.reserved += 1;
                    return Ok(Admission { log: self.clone(), used: false });
                }
            }
            room.await;
        }
    }

    /// Appends a record for which there is room. Its number, and a receiver that answers when its
    /// block and all before it have completed.
    pub fn append_admitted(
        &self,
        admission: Admission,
        record: &Record,
    ) -> (Lsn, OneshotReceiver<Result<(), DeviceError>>) {
        let appended = self.append_unhurried(admission, record);
        self.commit();
        appended
    }

    /// As [`Self::append_admitted`], but nobody waits for it yet: its block is written when it is full, when another
    /// record goes into it, or when somebody waits at [`Self::completed`], which the caller does before long.
    pub fn append_unhurried(
        &self,
        mut admission: Admission,
        record: &Record,
    ) -> (Lsn, OneshotReceiver<Result<(), DeviceError>>) {
        admission.used = true;
        self.0.state.borrow_mut().reserved -= 1;
        self.0.room.notify();
        self.push(record)
    }

    /// Appends a record that may use the reserve: one that says what became of another, or that
    /// recovery writes again.
    pub fn append(&self, record: &Record) -> (Lsn, OneshotReceiver<Result<(), DeviceError>>) {
        let appended = self.push(record);
        self.commit();
        appended
    }

    /// Has the open block written at the end of the turn, if it has records.
    fn commit(&self) {
        let schedule = {
            let mut state = self.0.state.borrow_mut();
            state.hurried = state.open.record_count() > 0;
            state.hurried && !std::mem::replace(&mut state.commit_scheduled, true)
        };
        if schedule {
            self.schedule_commit();
        }
    }

    fn push(&self, record: &Record) -> (Lsn, OneshotReceiver<Result<(), DeviceError>>) {
        let (done, outcome) = oneshot();
        let bytes = record.encoded_bytes();
        if !self.0.state.borrow().open.fits(bytes) {
            self.seal_open();
        }
        let mut state = self.0.state.borrow_mut();
        let lsn = state.lsn_next;
        state.lsn_next = lsn.plus(1);
        state.open.push(record);
        state.open_waiters.push(done);
        state.incomplete.push_back(false);
        (lsn, outcome)
    }

    /// Begins a new block unless so many bytes of records fit into the open one. What is appended
    /// next, in the same breath, is there after a crash as a whole or not at all.
    ///
    /// # Panics
    /// If no block holds so much.
    pub fn together(&self, bytes: usize) {
        assert!(bytes <= LOG_PAYLOAD_BYTES, "records of one block");
        if !self.0.state.borrow().open.fits(bytes) {
            self.seal_open();
        }
    }

    /// Says that a record is complete: its receiver has answered, and its data, if it has any,
    /// has been written. Moves the completed watermark.
    pub fn complete(&self, lsn: Lsn) {
        let advanced = {
            let mut state = self.0.state.borrow_mut();
            let watermarks = self.0.scheduler.watermarks();
            let first = watermarks.completed().plus(1);
            let index = usize::try_from(lsn.distance_from(first)).unwrap_or(usize::MAX);
            if let Some(complete) = state.incomplete.get_mut(index) {
                assert!(!*complete, "a record completes once");
                *complete = true;
            }
            let mut to = watermarks.completed();
            while state.incomplete.front() == Some(&true) {
                state.incomplete.pop_front();
                to = to.plus(1);
            }
            let advanced = to > watermarks.completed();
            watermarks.advance_completed(to);
            advanced
        };
        if advanced {
            self.0.completed.notify();
            // Whoever waits for room may have a flush make some now.
            self.0.room.notify();
        }
    }

    /// Waits until every record up to `lsn` is complete.
    ///
    /// # Errors
    /// If the log has failed.
    pub async fn completed(&self, lsn: Lsn) -> Result<(), DeviceError> {
        self.commit();
        loop {
            let changed = self.0.completed.changed();
            if self.0.scheduler.watermarks().completed() >= lsn {
                return Ok(());
            }
            if let Some(error) = self.0.scheduler.failure() {
                return Err(error);
            }
            changed.await;
        }
    }

    /// Waits until every record up to `lsn` is complete and durable.
    ///
    /// # Errors
    /// If the log or the flush failed.
    pub async fn durable(&self, lsn: Lsn) -> Result<(), DeviceError> {
        self.completed(lsn).await?;
        if self.0.scheduler.watermarks().durable() >= lsn {
            return Ok(());
        }
        self.0.scheduler.flush().await
    }

    /// Number of the last record that was appended.
    #[must_use]
    pub fn last_lsn(&self) -> Lsn {
        Lsn::new(self.0.state.borrow().lsn_next.get() - 1)
    }

    /// Ends the open block, so that the next record begins a new one, and describes the log from
    /// there on: what a checkpoint with a cut at [`Self::last_lsn`] leaves to replay.
    pub fn cut(&self) -> LogSegment {
        self.seal_open();
        let state = self.0.state.borrow();
        LogSegment {
            epoch: self.0.config.epoch,
            nonce: self.0.config.nonce,
            start: state.position,
            first_lsn: state.lsn_next,
            last_lsn: Lsn::default(),
            chain: state.previous,
        }
    }

    /// Records that slot `sequence` with `cut` is durable, and that the log is needed from `tail`
    /// on only: the older of the two slots decides (design rule 18).
    pub fn published(&self, sequence: u64, cut: Lsn, tail: RingPosition) {
        {
            let mut state = self.0.state.borrow_mut();
            assert!(tail >= state.tail, "the tail never goes back");
            state.tail = tail;
            state.slot_sequence = sequence;
            state.cut = cut;
        }
        self.0.room.notify();
    }

    /// Writes an empty block if F is not on the device yet (design rule 3): called when idle.
    pub fn mark_durable(&self) {
        let stale = {
            let state = self.0.state.borrow();
            state.durable_noted < self.0.scheduler.watermarks().durable()
                && state.open.record_count() == 0
                && state.in_flight.is_empty()
                && self.leaves_room_to_recover(&state)
        };
        if stale && self.0.scheduler.failure().is_none() {
            self.seal_block();
        }
    }

    /// Position of the next block.
    #[must_use]
    pub fn position(&self) -> RingPosition {
        self.0.state.borrow().position
    }

    /// Blocks in use, and the length of the ring.
    #[must_use]
    pub fn usage(&self) -> (u64, u64) {
        let state = self.0.state.borrow();
        (self.used_blocks(&state), self.0.config.geometry.ring_blocks)
    }

    /// Whether so much of the ring is above F that a flush should be issued, and would help.
    #[must_use]
    pub fn is_long_unflushed(&self) -> bool {
        let above = self.blocks_above_durable(&self.0.state.borrow());
        above >= self.0.config.geometry.ring_blocks / 8 && self.flush_would_cover()
    }

    /// Whether guests wait for a checkpoint to make room.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let state = self.0.state.borrow();
        self.used_blocks(&state) + state.reserved >= self.high_water()
    }

    /// Whether so many blocks more can be written, and one that is begun.
    #[must_use]
    pub fn has_room(&self, blocks: u64) -> bool {
        let used = self.used_blocks(&self.0.state.borrow());
        used + blocks + 1 < self.0.config.geometry.ring_blocks
    }

    /// Waits until a record out of the reserve leaves room enough, if a flush makes some: recovery
    /// must be able to write what is above F again, behind everything else. `false` if there is
    /// none.
    ///
    /// # Errors
    /// If the flush failed.
    pub async fn reserve(&self) -> Result<bool, DeviceError> {
        loop {
            if self.leaves_room_to_recover(&self.0.state.borrow()) {
                return Ok(true);
            }
            if !self.flush_would_cover() {
                return Ok(false);
            }
            self.0.scheduler.flush().await?;
        }
    }

    /// Whether [`Self::reserve`] would be granted now, without a flush.
    #[must_use]
    pub fn has_reserve(&self) -> bool {
        self.leaves_room_to_recover(&self.0.state.borrow())
    }

    /// Whether recovery has room for what is above F after one block more and all those that were
    /// promised: the same number of blocks, and those that windows end, one of sixteen at most.
    fn leaves_room_to_recover(&self, state: &State) -> bool {
        let more = state.reserved + 1;
        let open = u64::from(state.open.record_count() > 0);
        let above = self.blocks_above_durable(state) + open + more;
        let used = self.used_blocks(state) + more;
        used + above * 17 / 16 + 2 < self.0.config.geometry.ring_blocks
    }

    /// Blocks from the first record above F on: what recovery may have to write again, into the
    /// reserve. One record whose data does not complete keeps F behind it, whatever is flushed.
    fn blocks_above_durable(&self, state: &State) -> u64 {
        let durable = self.0.scheduler.watermarks().durable();
        let first = state.above_durable.partition_point(|&(last, _)| last <= durable);
        let first = state.above_durable.get(first);
        first.map_or(0, |&(_, position)| state.position.distance_from(position))
    }

    /// Whether a flush that is issued now would move F.
    fn flush_would_cover(&self) -> bool {
        let watermarks = self.0.scheduler.watermarks();
        watermarks.completed() > watermarks.durable()
    }

    /// Log blocks written so far.
    #[must_use]
    pub fn blocks_written(&self) -> u64 {
        self.0.state.borrow().blocks_written
    }

    /// Wakes everybody who waits, so that they see that the store has failed.
    pub fn wake_all(&self) {
        self.0.room.notify();
        self.0.completed.notify();
    }

    fn used_blocks(&self, state: &State) -> u64 {
        state.position.distance_from(state.tail) + u64::from(state.open.record_count() > 0)
    }

    /// Guests fill three sixteenths of the ring above F, so that recovery, which needs as much
    /// again, leaves a sixteenth of it.
    fn above_durable_max(&self) -> u64 {
        self.0.config.geometry.ring_blocks * 3 / 16
    }

    /// Guests use three quarters of the ring.
    fn high_water(&self) -> u64 {
        if base::mutant::active("guests_fill_the_log") {
            return self.0.config.geometry.ring_blocks;
        }
        self.0.config.geometry.ring_blocks * 3 / 4
    }

    fn schedule_commit(&self) {
        let log = self.clone();
        drop(self.0.runtime.spawn(async move {
            log.0.runtime.turn_end().await;
            let due = {
                let mut state = log.0.state.borrow_mut();
                state.commit_scheduled = false;
                // When busy, the completion of a block commits what gathers meanwhile.
                state.hurried && state.in_flight.len() < BLOCKS_IN_FLIGHT_MAX
            };
            if due {
                log.seal_open();
            }
        }));
    }

    fn seal_open(&self) {
        if self.0.state.borrow().open.record_count() > 0 {
            self.seal_block();
        }
    }

    /// Seals the open block and writes it, unless the store has failed: then the block has no place
    /// (design rule 56).
    fn seal_block(&self) {
        if let Some(error) = self.0.scheduler.failure() {
            let mut state = self.0.state.borrow_mut();
            state.hurried = false;
            state.open = LogBlockBuilder::default();
            let waiters = std::mem::take(&mut state.open_waiters);
            drop(state);
            waiters.into_iter().for_each(|waiter| waiter.send(Err(error)));
            return;
        }
        let config = &self.0.config;
        let mut buffer = self.0.runtime.buffers().take(1);
        let (position, at) = {
            let mut state = self.0.state.borrow_mut();
            if base::mutant::active("log_rewrites_last_block") && state.open.record_count() == 0 {
                state.position = RingPosition::new(state.position.get().saturating_sub(1));
            }
            let position = state.position;
            assert!(
                position.distance_from(state.tail) < config.geometry.ring_blocks,
                "the reserve of the log is used up"
            );
            let at = config.geometry.log_block(config.log_start, position);
            let records = u64::from(state.open.record_count());
            let durable = self.0.scheduler.watermarks().durable();
            let seal = Seal {
                epoch: config.epoch,
                nonce: config.nonce,
                position,
                at,
                first_lsn: Lsn::new(state.lsn_next.get() - records),
                durable,
                previous: state.previous,
                slot_sequence: state.slot_sequence,
                cut: state.cut,
            };
            state.previous = state.open.seal(&config.checksums, &seal, &mut buffer);
            state.position = position.plus(1);
            state.hurried = false;
            state.durable_noted = durable;
            let covered = state.above_durable.partition_point(|&(last, _)| last <= durable);
            state.above_durable.drain(..covered);
            let last = Lsn::new(state.lsn_next.get() - 1);
            if last > durable {
                state.above_durable.push_back((last, position));
            }
            state.blocks_written += 1;
            let waiters = std::mem::take(&mut state.open_waiters);
            state.in_flight.push_back(SealedBlock { position, outcome: None, waiters });
            (position, at)
        };
        let written = self.0.scheduler.write(at, vec![BlockSlice::new(Rc::new(buffer), 0, 1)]);
        let log = self.clone();
        drop(self.0.runtime.spawn(async move {
            let outcome = written.await.unwrap_or_else(|_| Err(DeviceError::new(Cause::Gone, at)));
            log.block_done(position, outcome);
        }));
    }

    fn block_done(&self, position: RingPosition, outcome: Result<(), DeviceError>) {
        if let Err(error) = outcome {
            self.0.scheduler.fail(error);
        }
        let mut state = self.0.state.borrow_mut();
        let first = state.in_flight.front().map_or(position, |block| block.position);
        let index = usize::try_from(position.distance_from(first)).unwrap_or(usize::MAX);
        if let Some(block) = state.in_flight.get_mut(index) {
            block.outcome = Some(outcome);
            if base::mutant::active("ack_own_log_block_only") {
                for waiter in std::mem::take(&mut block.waiters) {
                    waiter.send(outcome);
                }
            }
        }
        // Answer in order: a record counts only if the chain up to it is complete.
        while let Some(Some(outcome)) = state.in_flight.front().map(|block| block.outcome) {
            let outcome = self.0.scheduler.failure().map_or(outcome, Err);
            for waiter in state.in_flight.pop_front().map(|block| block.waiters).unwrap_or_default()
            {
                waiter.send(outcome);
            }
        }
        let commit = state.hurried && state.in_flight.len() < BLOCKS_IN_FLIGHT_MAX;
        let schedule = commit && !std::mem::replace(&mut state.commit_scheduled, true);
        drop(state);
        if schedule {
            self.schedule_commit();
        }
        if outcome.is_err() {
            self.wake_all();
        }
    }
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (used, ring) = self.usage();
        write!(f, "Log(last {}, {used} of {ring} blocks)", self.last_lsn())
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if !self.used {
            self.log.0.state.borrow_mut().reserved -= 1;
            self.log.0.room.notify();
        }
    }
}

impl std::fmt::Debug for Admission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Admission")
    }
}
