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

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;

use base::{BLOCK_SIZE, BlockSlice, Buffer, Pba};
use blockstore::Geometry;
use device::{Backend, Cause, DeviceError, Operation};
use runtime::sync::OneshotSender;
use runtime::{Clock, Time};

use crate::clock::SimClock;
use crate::content;
use crate::faults::{Atlas, Damage, DamageKind, FaultKind, Faults, Victim};
use crate::medium::{CutStyle, Mark, Medium};
use crate::plan::{EXTENT_BLOCKS, Erratic};
use crate::random::{Random, to_u64, to_usize};
use crate::trace::Trace;

const MICROSECOND: u64 = 1_000;
const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

/// What a device answers that cannot read or write a block.
const EIO: i32 = 5;

/// How long operations take, in nanoseconds: a minimum, and a random addition up to as much.
#[derive(Clone, Copy, Debug)]
pub struct Latencies {
    read: (u64, u64),
    write: (u64, u64),
    flush: (u64, u64),
    slot: (u64, u64),
}

impl Latencies {
    /// Draws a device: fast or slow, regular or erratic.
    #[must_use]
    pub fn draw(random: &mut Random) -> Self {
        let mut pair = |low: u64, high: u64| {
            let minimum = random.between(low, high);
            (minimum, random.magnitude(minimum * 20))
        };
        let read = pair(5 * MICROSECOND, 100 * MICROSECOND);
        let write = pair(5 * MICROSECOND, 200 * MICROSECOND);
        let flush = pair(10 * MICROSECOND, 2_000 * MICROSECOND);
        Self { read, write, flush, slot: write }
    }
}

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

#[derive(Clone, Copy)]
struct Trouble {
    kind: TroubleKind,
    until: Time,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TroubleKind {
    Slow,
    Hang,
    /// The cache goes only after somebody was told: a device that comes back without it reports an
    /// error first.
    Gone {
        loses_cache: bool,
        told: bool,
    },
}

struct Queued {
    work: Work,
    fate: Fate,
}

enum Work {
    Read { at: u64, block_count: usize, buffer: Buffer, done: OneshotSender<ReadResult> },
    Write { at: u64, blocks: Vec<BlockSlice>, done: OneshotSender<Done> },
    Flush { covers: Mark, done: OneshotSender<Done> },
    Discard { at: u64, block_count: u64, done: OneshotSender<Done> },
    Allocate { at: u64, block_count: u64, done: OneshotSender<Done> },
}

type ReadResult = Result<Buffer, DeviceError>;
type Done = Result<(), DeviceError>;

/// Where the one host has its log.
const LOG_EXTENT: Range<u64> = EXTENT_BLOCKS..2 * EXTENT_BLOCKS;

/// Whether a copy of the host's slot stands here.
fn is_slot(at: u64) -> bool {
    let slot = Geometry::host_slots_start();
    [slot, slot.plus(1)].map(Pba::get).contains(&at)
}

/// What was decided about an operation when it was submitted.
#[derive(Clone, Copy)]
enum Fate {
    Succeeds,
    Fails(Cause),
    /// Says that it succeeded, and did nothing.
    Lost,
    /// Says that it succeeded, and wrote from this block on.
    Misdirected(u64),
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
        let latencies = &mut self.0.borrow_mut().latencies;
        match erratic {
            Erratic::Nothing => {}
            Erratic::Reads(ms) => latencies.read.1 = ms * MILLISECOND,
            Erratic::Writes(ms) => {
                latencies.write.1 = ms * MILLISECOND;
                latencies.slot.1 = ms * MILLISECOND;
            }
            Erratic::Flushes(ms) => latencies.flush.1 = ms * MILLISECOND,
            Erratic::Slots(ms) => latencies.slot.1 = ms * MILLISECOND,
        }
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

/// An answer that is sent once nothing is borrowed.
enum Reply {
    Read(OneshotSender<ReadResult>, ReadResult),
    Done(OneshotSender<Done>, Done),
}

impl Reply {
    fn send(self) {
        match self {
            Self::Read(done, result) => done.send(result),
            Self::Done(done, result) => done.send(result),
        }
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

    /// Decides what will become of an operation.
    fn fate(&mut self, work: &Work) -> Fate {
        let gone = matches!(self.trouble, Some(Trouble { kind: TroubleKind::Gone { .. }, .. }));
        if gone {
            return Fate::Fails(Cause::Gone);
        }
        if let Work::Read { at, block_count, .. } = work
            && self.unreadable.range(*at..*at + to_u64(*block_count)).next().is_some()
        {
            return Fate::Fails(Cause::Errno(EIO));
        }
        if matches!(work, Work::Write { .. } | Work::Allocate { .. })
            && !self.has_space(work.at(), work.block_count())
        {
            return Fate::Fails(Cause::NoSpace);
        }
        if !self.armed {
            return Fate::Succeeds;
        }
        match work {
            Work::Read { .. } if self.strikes(FaultKind::ReadError) => {
                Fate::Fails(Cause::Errno(EIO))
            }
            Work::Write { .. } if self.strikes(FaultKind::WriteError) => {
                Fate::Fails(Cause::Errno(EIO))
            }
            Work::Write { .. } if self.strikes(FaultKind::LostWrite) => Fate::Lost,
            Work::Write { at, blocks, .. }
                if self.strikes(FaultKind::LostNode) && self.begins_with_node(*at, blocks) =>
            {
                Fate::Lost
            }
            Work::Write { .. } if self.strikes(FaultKind::Misdirected) => {
                match self.random.pick(self.medium.written()) {
                    Some(victim) if victim + work.block_count() <= self.block_count => {
                        Fate::Misdirected(victim)
                    }
                    _ => Fate::Succeeds,
                }
            }
            Work::Flush { .. } if self.strikes(FaultKind::FlushError) => {
                Fate::Fails(Cause::Errno(EIO))
            }
            _ => Fate::Succeeds,
        }
    }

    fn begins_with_node(&self, at: u64, blocks: &[BlockSlice]) -> bool {
        let first = blocks.first().and_then(|slice| slice.bytes().get(..BLOCK_SIZE));
        first.is_some_and(|bytes| self.victim(at, bytes) == Victim::Node)
    }

    fn count_log(&mut self, at: u64, blocks: &[BlockSlice]) {
        if is_slot(at) {
            self.counts.log_since_slot = 0;
        } else if LOG_EXTENT.contains(&at) {
            let written = blocks.iter().map(|slice| slice.block_count() as u64);
            self.counts.log_since_slot += written.sum::<u64>();
        }
    }

    fn strikes(&mut self, kind: FaultKind) -> bool {
        self.random.rarely(self.faults.rate(kind))
    }

    fn due(&mut self, work: &Work, fate: Fate) -> Time {
        let (minimum, spread) = match work {
            Work::Read { .. } => self.latencies.read,
            Work::Write { at, .. } if is_slot(*at) => self.latencies.slot,
            Work::Write { .. } => self.latencies.write,
            Work::Flush { .. } => self.latencies.flush,
            Work::Discard { .. } | Work::Allocate { .. } => self.latencies.write,
        };
        let mut latency = minimum + self.random.magnitude(spread);
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

    fn note_damage(&mut self, pba: u64, kind: DamageKind, victim: Victim) {
        self.atlas.damage(pba, Damage { kind, victim, since: self.medium.mark() });
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

    /// Whether a write of these blocks finds space below.
    fn has_space(&self, at: u64, block_count: u64) -> bool {
        if self.space >= self.block_count {
            return true;
        }
        let new = (at..at + block_count).filter(|block| !self.allocated.contains(block)).count();
        new == 0 || to_u64(self.allocated.len() + new) <= self.space
    }

    fn note_error(&mut self, work: &Work, cause: Cause) {
        self.atlas.errors += 1;
        if !matches!(work, Work::Read { .. }) {
            self.atlas.write_side_errors += 1;
        }
        if matches!(work, Work::Flush { .. }) {
            self.atlas.cache_losses += 1;
        }
        if cause == Cause::NoSpace {
            self.atlas.no_space += 1;
        }
        self.atlas.count(match (work, cause) {
            (_, Cause::NoSpace) => "no space below",
            (Work::Read { .. }, _) => "read error",
            (Work::Write { .. }, _) => "write error",
            (Work::Flush { .. }, _) => "flush error",
            (Work::Discard { .. } | Work::Allocate { .. }, _) => "other error",
        });
    }

    /// Perhaps damages a block at rest.
    fn rot(&mut self) {
        if !self.armed || !self.strikes(FaultKind::Rot) {
            return;
        }
        let Some(block) = self.random.pick(self.medium.written()) else { return };
        let victim = self.victim_at(block);
        let byte = self.random.index(BLOCK_SIZE);
        let bit = 1u8 << self.random.below(8);
        let unreadable = self.random.chance(200);
        let hit = self.medium.damage(block, |contents| {
            if !unreadable {
                contents[byte] ^= bit;
            }
        });
        if !hit {
            return;
        }
        self.atlas.count("rot");
        let kind = if unreadable { DamageKind::Unreadable } else { DamageKind::Flipped };
        if unreadable {
            self.unreadable.insert(block);
        }
        self.note_damage(block, kind, victim);
        self.trace.event([11, block, to_u64(byte), u64::from(bit)], || {
            format!("device  injected: {kind:?} block {block} ({victim:?})")
        });
    }

    /// Whose a block is, by what stands there now.
    fn victim_at(&self, block: u64) -> Victim {
        let mut bytes = [0; BLOCK_SIZE];
        self.medium.read(block, &mut bytes);
        self.victim(block, &bytes)
    }

    /// Whose a block is that holds, or should hold, `bytes`.
    fn victim(&self, block: u64, bytes: &[u8]) -> Victim {
        match content::identify_lba(bytes) {
            Some(lba) => Victim::Data(lba),
            None if block >= NODES_START && is_node(bytes, self.block_count) => Victim::Node,
            None => Victim::Unknown,
        }
    }

    fn start_trouble(&mut self) {
        if !self.armed || self.trouble.is_some() {
            return;
        }
        let mut trouble = None;
        if self.strikes(FaultKind::Slow) {
            trouble = Some((TroubleKind::Slow, SECOND, "slow"));
        }
        if self.strikes(FaultKind::Hang) {
            trouble = Some((TroubleKind::Hang, 60 * SECOND, "hang"));
        }
        if self.strikes(FaultKind::Gone) {
            let loses_cache = self.random.chance(500);
            trouble = Some((TroubleKind::Gone { loses_cache, told: false }, 20 * SECOND, "gone"));
        }
        if self.strikes(FaultKind::ClockJump) {
            let years = i64::try_from(self.random.below(21)).unwrap_or(0) - 10;
            self.clock.jump_wall(years.saturating_mul(31_556_952_000_000_000));
            self.atlas.count("clock jump");
        }
        if let Some((kind, longest, what)) = trouble {
            let length = MILLISECOND + self.random.magnitude(longest);
            let until = Time(self.clock.now().0 + length);
            self.trouble = Some(Trouble { kind, until });
            if matches!(kind, TroubleKind::Gone { .. }) {
                // What is under way does not come back.
                for queued in self.queue.values_mut() {
                    queued.fate = Fate::Fails(Cause::Gone);
                }
            }
            self.atlas.count(what);
            self.trace.note(|| format!("device  injected: {what} for {} ms", length / MILLISECOND));
        }
    }

    fn hangs_until(&self) -> Option<Time> {
        let hang = self.trouble.filter(|trouble| trouble.kind == TroubleKind::Hang)?;
        Some(hang.until)
    }

    fn end_trouble_in_time(&mut self) {
        if self.trouble.is_some_and(|trouble| trouble.until <= self.clock.now()) {
            self.end_trouble();
        }
    }

    fn end_trouble(&mut self) {
        let Some(trouble) = self.trouble.take() else { return };
        if trouble.kind == (TroubleKind::Gone { loses_cache: true, told: true }) {
            self.atlas.cache_losses += 1;
            self.atlas.count("returned without its cache");
            self.medium.lose_cache(CutStyle::Torn, &mut self.random);
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

/// The first block behind the extents of the system and the log.
const NODES_START: u64 = 2 * EXTENT_BLOCKS;

/// Whether bytes make sense as a node of a VDI's tree that names something. Nothing that clients
/// write does. The nodes of a VDI's first label cannot be told from those of tables, whose loss
/// costs more: they do not count.
fn is_node(bytes: &[u8], block_count: u64) -> bool {
    let mut named = 0;
    let sensible = bytes.chunks_exact(16).all(|entry| {
        let pba = entry.iter().take(5).rev().fold(0, |pba, &byte| pba << 8 | u64::from(byte));
        match entry.get(5) {
            Some(2) => {
                let birth = entry.get(6..10).and_then(|birth| birth.try_into().ok());
                named += u32::from(birth.map_or(0, u32::from_le_bytes) > 1);
                (NODES_START..block_count).contains(&pba)
            }
            // Unmapped, zero or damaged, and nothing else.
            Some(0 | 1 | 3) => (0..16).all(|at| at == 5 || entry[at] == 0),
            _ => false,
        }
    });
    sensible && named > 0
}

impl Work {
    fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Flush { .. } => "flush",
            Self::Discard { .. } => "discard",
            Self::Allocate { .. } => "allocate",
        }
    }

    fn at(&self) -> u64 {
        match self {
            Self::Read { at, .. }
            | Self::Write { at, .. }
            | Self::Discard { at, .. }
            | Self::Allocate { at, .. } => *at,
            Self::Flush { .. } => 0,
        }
    }

    fn block_count(&self) -> u64 {
        match self {
            Self::Read { block_count, .. } => to_u64(*block_count),
            Self::Write { blocks, .. } => to_u64(blocks.iter().map(BlockSlice::block_count).sum()),
            Self::Flush { .. } => 0,
            Self::Discard { block_count, .. } | Self::Allocate { block_count, .. } => *block_count,
        }
    }
}

#[cfg(test)]
mod tests;
