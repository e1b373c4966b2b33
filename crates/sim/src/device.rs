//! A device that fails: a [`Medium`] behind a queue, on simulated time.
//!
//! The contract, beyond that of [`crate::medium`]:
//!
//! - Operations complete out of order, after seeded latencies; a write takes effect when it
//!   completes, a flush covers what had completed when it was submitted.
//! - When the process dies, each write that is in flight happens or does not; nothing else changes.
//!   (The next process opens the device only when none is in flight: they pin the file lock.)
//! - When the power goes, writes in flight are treated like those in the cache.
//! - A failed read changes nothing. A failed write leaves any mix of old and new sectors in its
//!   range. A failed flush: see `medium`. While the device is gone everything fails at once.
//! - Damage (rot, misdirected and lost writes) is acknowledged as success and noted in the
//!   [`Atlas`], until an honest write of the block is durable.
//! - A discard leaves zeroes, the old contents or anything at all, in the cache like a write.

mod injection;
mod work;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use base::{BLOCK_SIZE, BlockSlice, Pba};
use device::{Backend, Cause, DeviceError, Operation};
use runtime::{Clock, Time};

use crate::clock::SimClock;
use crate::faults::{Atlas, DamageKind, Faults, Victim};
use crate::medium::{CutStyle, Mark, Medium};
use crate::plan::Erratic;
use crate::random::{Random, to_u64, to_usize};
use crate::trace::Trace;

use injection::{Trouble, TroubleKind};
use work::{Fate, LOG_EXTENT, Latencies, Queued, Reply, Work, is_slot};

const MICROSECOND: u64 = 1_000;
const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

/// What a device answers that cannot read or write a block.
const EIO: i32 = 5;

/// The simulated device. Clones share it; it outlives the processes that use it.
#[derive(Clone)]
pub struct SimDevice(Rc<RefCell<State>>);

struct State {
    clock: SimClock,
    trace: Trace,
    random: Random,
    latencies: Latencies,
    faults: Faults,
    block_count: u64,
    medium: Medium,
    atlas: Atlas,
    /// Operations under way, by the time at which they complete.
    queue: BTreeMap<(Time, u64), Queued>,
    operations: u64,
    trouble: Option<Trouble>,
    /// Blocks whose reads fail until they are written.
    unreadable: BTreeSet<u64>,
    /// Blocks that are allocated below.
    allocated: BTreeSet<u64>,
    /// Most blocks that can be allocated below.
    space: u64,
    /// Whether faults are injected now.
    armed: bool,
    /// The operation that fails, whatever else is injected.
    fail_at: Option<u64>,
    counts: Counts,
}

/// Operations that were submitted, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Those of them that publish a slot.
    pub slot_writes: u64,
    /// Blocks of the log that were written since the last slot was.
    pub log_since_slot: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards.
    pub discards: u64,
}

impl SimDevice {
    /// A device of zeroes.
    #[must_use]
    pub fn new(block_count: u64, seed: u64, faults: Faults, clock: SimClock, trace: Trace) -> Self {
        let mut random = Random::split(seed, "device");
        let latencies = Latencies::draw(&mut random);
        Self(Rc::new(RefCell::new(State {
            clock,
            trace,
            random,
            latencies,
            faults,
            block_count,
            medium: Medium::default(),
            atlas: Atlas::default(),
            queue: BTreeMap::new(),
            operations: 0,
            trouble: None,
            unreadable: BTreeSet::new(),
            allocated: BTreeSet::new(),
            space: block_count,
            armed: false,
            fail_at: None,
            counts: Counts::default(),
        })))
    }

    /// Makes some operations take up to so many milliseconds, and others not: what overtakes what is
    /// not to be relied upon.
    pub fn make_erratic(&self, erratic: Erratic) {
        self.0.borrow_mut().latencies.make_erratic(erratic);
    }

    /// Starts or stops injecting faults. What is under way is not changed.
    pub fn arm(&self, armed: bool) {
        let mut state = self.0.borrow_mut();
        state.armed = armed;
        if !armed {
            state.end_trouble();
        }
    }

    /// Fails the operation with this number, counted from 1 over the whole run.
    pub fn fail_operation(&self, number: u64) {
        self.0.borrow_mut().fail_at = Some(number);
    }

    /// Operations submitted so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.0.borrow().operations
    }

    /// When the next operation completes.
    #[must_use]
    pub fn next_completion(&self) -> Option<Time> {
        let state = self.0.borrow();
        let due = state.queue.keys().next().map(|&(due, _)| due)?;
        Some(due.max(state.hangs_until().unwrap_or_default()))
    }

    /// Completes one operation that is due. `false` if none is.
    pub fn complete_one(&self) -> bool {
        let mut state = self.0.borrow_mut();
        let now = state.clock.now();
        state.end_trouble_in_time();
        let hangs = state.hangs_until().is_some();
        match state.queue.first_entry() {
            Some(entry) if entry.key().0 <= now && !hangs => {
                let (_, id) = *entry.key();
                let queued = entry.remove();
                let reply = state.complete(id, queued);
                // Waking somebody must not find the state borrowed.
                drop(state);
                reply.send();
                true
            }
            _ => false,
        }
    }

    /// The process died: what is in flight happens or does not.
    pub fn kill(&self) {
        self.0.borrow_mut().abandon(false);
    }

    /// The power went. The process must be dead.
    pub fn cut_power(&self) -> CutStyle {
        let mut state = self.0.borrow_mut();
        state.abandon(true);
        let state = &mut *state;
        let style = state.random.pick(&CutStyle::ALL).unwrap_or(CutStyle::Torn);
        state.medium.lose_cache(style, &mut state.random);
        state.end_trouble();
        style
    }

    /// Limits the space below to what is allocated and `more` blocks; `None` lifts the limit.
    pub fn limit_space(&self, more: Option<u64>) {
        let mut state = self.0.borrow_mut();
        state.space = match more {
            Some(more) => to_u64(state.allocated.len()).saturating_add(more),
            None => state.block_count,
        };
    }

    /// What was injected so far.
    #[must_use]
    pub fn atlas(&self) -> Atlas {
        self.0.borrow().atlas.clone()
    }

    /// Looks at what was injected so far.
    pub fn with_atlas<T>(&self, look: impl FnOnce(&Atlas) -> T) -> T {
        look(&self.0.borrow().atlas)
    }

    /// Everything was compared with the model; see [`Atlas::compared`].
    pub fn compared(&self) {
        self.0.borrow_mut().atlas.compared();
    }

    /// Whether the device is in trouble: hanging, slow or gone.
    #[must_use]
    pub fn in_trouble(&self) -> bool {
        self.0.borrow().trouble.is_some()
    }

    /// Operations submitted so far, by kind.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.0.borrow().counts
    }

    /// A hash of everything that reads see.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.0.borrow().medium.hash()
    }

    /// Forgets everything that is stored, at the end of a run: whatever still refers to the device
    /// must not keep that.
    pub fn clear(&self) {
        let mut state = self.0.borrow_mut();
        state.medium = Medium::default();
        state.queue.clear();
    }

    /// Reads a block past the queue, without faults.
    pub fn peek(&self, block: u64, into: &mut [u8]) {
        self.0.borrow().medium.read(block, into);
    }

    /// Changes a block at rest, as rot does, without a note: nothing that follows is excused.
    /// `false` if it is not at rest.
    pub fn damage_silently(&self, block: u64, change: impl FnOnce(&mut [u8])) -> bool {
        self.0.borrow_mut().medium.damage(block, |contents| change(contents))
    }

    /// Changes a block at rest, as rot does, and notes it. `false` if it is not at rest.
    pub fn damage(&self, block: u64, change: impl FnOnce(&mut [u8])) -> bool {
        let mut state = self.0.borrow_mut();
        let victim = state.victim_at(block);
        let changed = state.medium.damage(block, |contents| change(contents));
        if changed {
            state.note_damage(block, DamageKind::Flipped, victim);
        }
        changed
    }
}

impl std::fmt::Debug for SimDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SimDevice")
    }
}

impl Backend for SimDevice {
    fn submit(&self, operation: Operation) {
        self.0.borrow_mut().submit(operation);
    }

    fn block_count(&self) -> u64 {
        self.0.borrow().block_count
    }

    fn describe(&self) -> String {
        "simulated device".to_owned()
    }
}

impl State {
    fn submit(&mut self, operation: Operation) {
        self.operations += 1;
        let id = self.operations;
        self.end_trouble_in_time();
        self.start_trouble();
        let (work, code) = self.accept(operation);
        let fate = match self.fail_at {
            Some(number) if number == id => Fate::Fails(Cause::Errno(EIO)),
            _ => self.fate(&work),
        };
        let due = self.due(&work, fate);
        self.trace.event([code, work.at(), work.block_count(), due.0], || {
            format!("device  #{id} {} at {} x{}", work.name(), work.at(), work.block_count())
        });
        self.queue.insert((due, id), Queued { work, fate });
    }

    fn accept(&mut self, operation: Operation) -> (Work, u64) {
        match operation {
            Operation::Read { at, block_count, buffer, done } => {
                self.counts.reads += 1;
                (Work::Read { at: at.get(), block_count, buffer, done }, 1)
            }
            Operation::Write { at, blocks, done } => {
                self.counts.writes += 1;
                self.counts.slot_writes += u64::from(is_slot(at.get()));
                (Work::Write { at: at.get(), blocks, done }, 2)
            }
            Operation::Flush { done } => {
                self.counts.flushes += 1;
                (Work::Flush { covers: self.medium.mark(), done }, 3)
            }
            Operation::Discard { at, block_count, done } => {
                self.counts.discards += 1;
                (Work::Discard { at: at.get(), block_count, done }, 4)
            }
            Operation::Allocate { at, block_count, done } => {
                (Work::Allocate { at: at.get(), block_count, done }, 5)
            }
        }
    }

    fn count_log(&mut self, at: u64, blocks: &[BlockSlice]) {
        if is_slot(at) {
            self.counts.log_since_slot = 0;
        } else if LOG_EXTENT.contains(&at) {
            let written = blocks.iter().map(|slice| slice.block_count() as u64);
            self.counts.log_since_slot += written.sum::<u64>();
        }
    }

    fn due(&mut self, work: &Work, fate: Fate) -> Time {
        let mut latency = self.latencies.of(work, &mut self.random);
        let start = self.clock.now().0;
        match self.trouble {
            Some(Trouble { kind: TroubleKind::Slow, .. }) => latency *= 100,
            Some(Trouble { kind: TroubleKind::Gone { .. }, .. }) => latency = MICROSECOND,
            Some(Trouble { kind: TroubleKind::Hang, .. }) | None => {}
        }
        if matches!(fate, Fate::Fails(_)) && self.random.chance(200) {
            // Errors often come after a disk's own retries.
            latency += self.random.magnitude(SECOND);
        }
        Time(start.saturating_add(latency))
    }

    /// Carries an operation out and says what to answer.
    fn complete(&mut self, id: u64, queued: Queued) -> Reply {
        let Queued { work, fate } = queued;
        if let Some(Trouble { kind: TroubleKind::Gone { told, .. }, .. }) = &mut self.trouble {
            *told |= matches!(fate, Fate::Fails(_));
        }
        let failed = u64::from(matches!(fate, Fate::Fails(_)));
        self.trace.event([10, id, failed, self.clock.now().0], || {
            let how = match fate {
                Fate::Succeeds => String::new(),
                Fate::Fails(cause) => format!(": {cause}"),
                Fate::Lost => " (injected: lost)".to_owned(),
                Fate::Misdirected(to) => format!(" (injected: landed at {to})"),
            };
            format!("device  #{id} {} done{how}", work.name())
        });
        let result = match fate {
            Fate::Fails(cause) => {
                self.note_error(&work, cause);
                Err(DeviceError::new(cause, Pba::new(work.at())))
            }
            Fate::Succeeds | Fate::Lost | Fate::Misdirected(_) => Ok(()),
        };
        if let Work::Write { at, blocks, .. } = &work
            && result.is_ok()
        {
            self.count_log(*at, blocks);
        }
        let reply = match work {
            Work::Read { at, block_count, mut buffer, done } => {
                let blocks = buffer.bytes_mut().chunks_exact_mut(BLOCK_SIZE).take(block_count);
                for (block, into) in (at..).zip(blocks) {
                    self.medium.read(block, into);
                }
                Reply::Read(done, result.map(|()| buffer))
            }
            Work::Write { at, blocks, done } => {
                self.write(id, at, &blocks, fate);
                Reply::Done(done, result)
            }
            Work::Flush { covers, done } => {
                match result {
                    Ok(()) => self.flush(covers),
                    Err(_) => self.medium.fail_flush(covers, &mut self.random),
                }
                Reply::Done(done, result)
            }
            Work::Discard { at, block_count, done } => {
                if result.is_ok() {
                    self.discard(id, at, block_count);
                }
                Reply::Done(done, result)
            }
            Work::Allocate { at, block_count, done } => {
                if result.is_ok() {
                    self.allocated.extend(at..at + block_count);
                }
                Reply::Done(done, result)
            }
        };
        self.rot();
        reply
    }

    fn write(&mut self, id: u64, at: u64, blocks: &[BlockSlice], fate: Fate) {
        let bytes = blocks.iter().flat_map(|slice| slice.bytes().chunks_exact(BLOCK_SIZE));
        let to = match fate {
            Fate::Misdirected(victim) => victim,
            _ => at,
        };
        let damages = matches!(fate, Fate::Lost | Fate::Misdirected(_));
        if damages {
            self.atlas.count(if to == at { "lost write" } else { "misdirected write" });
        }
        for (index, data) in bytes.enumerate() {
            let target = at + to_u64(index);
            let block = to + to_u64(index);
            let before = if block == target { Victim::Unknown } else { self.victim_at(block) };
            match fate {
                Fate::Lost => {}
                Fate::Fails(_) => {
                    self.medium.write_torn(id, index, block, data, &mut self.random);
                }
                Fate::Succeeds | Fate::Misdirected(_) => {
                    self.medium.write(id, index, block, data);
                }
            }
            if damages {
                let victim = self.victim(target, data);
                self.note_damage(target, DamageKind::Stale, victim);
            }
            if block != target {
                self.note_damage(block, DamageKind::Overwritten, before);
            }
            self.allocated.insert(block);
            self.unreadable.remove(&block);
        }
    }

    fn flush(&mut self, covers: Mark) {
        let Self { medium, atlas, .. } = self;
        medium.flush(covers, |block, written| atlas.heal(block, written));
    }

    fn discard(&mut self, id: u64, at: u64, block_count: u64) {
        let mut garbage = [0; BLOCK_SIZE];
        for index in 0..block_count {
            let block = at + index;
            match self.random.below(3) {
                0 => self.medium.write(id, to_usize(index), block, &[0; BLOCK_SIZE]),
                1 => {
                    garbage.fill(u8::try_from(self.random.below(255)).unwrap_or(1) + 1);
                    self.medium.write(id, to_usize(index), block, &garbage);
                }
                _ => {}
            }
            self.allocated.remove(&block);
        }
    }

    /// Nobody waits any more. Each write in flight happens or does not; if the power goes, it has
    /// reached the cache at most.
    fn abandon(&mut self, power_cut: bool) {
        let mut queue: Vec<((Time, u64), Queued)> =
            std::mem::take(&mut self.queue).into_iter().collect();
        while !queue.is_empty() {
            let index = self.random.index(queue.len());
            let ((_, id), queued) = queue.swap_remove(index);
            let happens = power_cut || self.random.chance(500);
            match queued.work {
                Work::Write { at, blocks, .. } if happens => {
                    self.write(id, at, &blocks, queued.fate);
                }
                Work::Discard { at, block_count, .. } if happens => {
                    self.discard(id, at, block_count);
                }
                Work::Flush { covers, .. } if happens && !power_cut => self.flush(covers),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
