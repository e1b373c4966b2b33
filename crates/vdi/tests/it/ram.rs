//! A faultless device in memory, and a runtime to run on. Faults are the simulator's business.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;

use base::{Block, Pba};
use device::{Backend, Cause, Device, DeviceError, Operation};
use runtime::{Clock, Options, Order, Runtime, Time};

/// Contents outlive the runtime that uses them, as a disk outlives a daemon.
#[derive(Clone, Default)]
pub(crate) struct Ram(Rc<State>);

#[derive(Default)]
struct State {
    blocks: RefCell<HashMap<u64, Block>>,
    /// Blocks whose writes fail.
    spoiled: RefCell<HashSet<u64>>,
    /// Blocks whose reads fail.
    unreadable: RefCell<HashSet<u64>>,
    /// A block whose next read fails, and why.
    stumbling: Cell<Option<(u64, Cause)>>,
    /// A bad transfer that is to come.
    garbled: Cell<Option<Garbled>>,
    /// Blocks that are really allocated below, and how many can be.
    backed: RefCell<HashSet<u64>>,
    space: Cell<Option<usize>>,
    /// First blocks of writes that found no space below.
    refused: RefCell<Vec<Pba>>,
    blocks_read: Cell<u64>,
    operations: Cell<u64>,
    /// The operation that fails, and with what.
    failing: Cell<Option<(u64, i32)>>,
}

/// A read of a block that gives other bytes than stand there.
#[derive(Clone, Copy)]
struct Garbled {
    at: u64,
    /// Reads of it that are right before that.
    reads_before: u32,
    garble: fn(&mut Block),
}

struct RamBackend {
    ram: Ram,
    block_count: u64,
}

impl Ram {
    pub(crate) fn device(&self, block_count: u64) -> Device {
        Device::new(self.backend(block_count))
    }

    /// What a device does, to be wrapped by another backend.
    pub(crate) fn backend(&self, block_count: u64) -> Rc<dyn Backend> {
        Rc::new(RamBackend { ram: self.clone(), block_count })
    }

    /// The bytes of a block.
    pub(crate) fn block(&self, at: Pba) -> Block {
        self.0.blocks.borrow().get(&at.get()).cloned().unwrap_or(Block([0; base::BLOCK_SIZE]))
    }

    /// Replaces a block behind everybody's back.
    pub(crate) fn set_block(&self, at: Pba, block: &base::Block) {
        self.0.blocks.borrow_mut().insert(at.get(), block.clone());
    }

    /// Makes every write of this block fail from now on.
    pub(crate) fn spoil(&self, at: Pba) {
        self.0.spoiled.borrow_mut().insert(at.get());
    }

    /// Makes every read of this block fail from now on, or no longer.
    pub(crate) fn set_unreadable(&self, at: Pba, unreadable: bool) {
        let mut blocks = self.0.unreadable.borrow_mut();
        if unreadable {
            blocks.insert(at.get());
        } else {
            blocks.remove(&at.get());
        }
    }

    /// Leaves space below for so many blocks beyond those that have some; `None` for any number.
    pub(crate) fn limit_space(&self, more: Option<usize>) {
        let backed = self.0.backed.borrow().len();
        self.0.space.set(more.map(|more| backed + more));
    }

    /// Blocks that take space below.
    pub(crate) fn space_taken(&self) -> usize {
        self.0.backed.borrow().len()
    }

    /// First blocks of the writes that found no space below.
    pub(crate) fn refused(&self) -> Vec<Pba> {
        self.0.refused.borrow().clone()
    }

    /// Blocks that were read in its life.
    pub(crate) fn blocks_read(&self) -> u64 {
        self.0.blocks_read.get()
    }

    /// Operations so far.
    pub(crate) fn operations(&self) -> u64 {
        self.0.operations.get()
    }

    /// Makes operation `number`, counted from 1, fail with `errno`; a write is torn then.
    pub(crate) fn fail(&self, number: u64, errno: i32) {
        self.0.failing.set(Some((number, errno)));
    }

    /// Makes the next read of this block fail.
    pub(crate) fn stumble(&self, at: Pba) {
        self.0.stumbling.set(Some((at.get(), Cause::Errno(5))));
    }

    /// Makes the device out of reach for the next read of this block.
    pub(crate) fn sever(&self, at: Pba) {
        self.0.stumbling.set(Some((at.get(), Cause::Gone)));
    }

    /// Makes the next read of this block give other bytes.
    pub(crate) fn garble(&self, at: Pba) {
        self.garble_after(0, at);
    }

    /// Makes one read of this block give other bytes, after so many that are right.
    pub(crate) fn garble_after(&self, reads_before: u32, at: Pba) {
        let garble: fn(&mut Block) = |block| block.0[17] ^= 4;
        self.0.garbled.set(Some(Garbled { at: at.get(), reads_before, garble }));
    }

    /// Makes the next read of this block give zeroes.
    pub(crate) fn blank(&self, at: Pba) {
        let garble: fn(&mut Block) = |block| block.0 = [0; base::BLOCK_SIZE];
        self.0.garbled.set(Some(Garbled { at: at.get(), reads_before: 0, garble }));
    }

    /// The block that holds nothing but `byte`.
    pub(crate) fn filled_with(&self, byte: u8) -> Option<Pba> {
        let blocks = self.0.blocks.borrow();
        blocks
            .iter()
            .find(|(_, block)| block.0 == [byte; base::BLOCK_SIZE])
            .map(|(&at, _)| Pba::new(at))
    }

    /// A device with the same contents of its own.
    pub(crate) fn copy(&self) -> Self {
        let blocks = self.0.blocks.clone();
        Self(Rc::new(State { blocks, ..State::default() }))
    }

    /// Flips one bit of a block.
    pub(crate) fn rot(&self, at: Pba) {
        if let Some(block) = self.0.blocks.borrow_mut().get_mut(&at.get()) {
            block.0[17] ^= 4;
        }
    }

    /// Takes space below for some blocks; `false` if there is none.
    fn take_space(&self, at: Pba, count: u64) -> bool {
        let mut backed = self.0.backed.borrow_mut();
        let missing: Vec<u64> =
            (at.get()..at.get() + count).filter(|block| !backed.contains(block)).collect();
        let fits = self.0.space.get().is_none_or(|space| backed.len() + missing.len() <= space);
        if fits || missing.is_empty() {
            backed.extend(missing);
            return true;
        }
        false
    }
}

impl State {
    /// What becomes of a block on its way from the medium.
    fn transfer(&self, at: u64, block: &mut Block) {
        let Some(garbled) = self.garbled.get().filter(|garbled| garbled.at == at) else { return };
        self.garbled.set(
            garbled
                .reads_before
                .checked_sub(1)
                .map(|reads_before| Garbled { reads_before, ..garbled }),
        );
        if garbled.reads_before == 0 {
            (garbled.garble)(block);
        }
    }
}

impl Backend for RamBackend {
    fn submit(&self, operation: Operation) {
        let state = &self.ram.0;
        state.operations.set(state.operations.get() + 1);
        let failing = state.failing.get().filter(|(number, _)| *number == state.operations.get());
        if let Some((_, errno)) = failing {
            self.fail(operation, errno);
            return;
        }
        let fail = |cause, at| Err(DeviceError::new(cause, at));
        let hits = |set: &RefCell<HashSet<u64>>, at: Pba, count: u64| {
            let set = set.borrow();
            (at.get()..at.get() + count).any(|block| set.contains(&block))
        };
        match operation {
            Operation::Read { at, block_count, mut buffer, done } => {
                state.blocks_read.set(state.blocks_read.get() + block_count as u64);
                let stumbles = state.stumbling.get().filter(|&(block, _)| block == at.get());
                if let Some((_, cause)) = stumbles {
                    state.stumbling.set(None);
                    done.send(fail(cause, at).map(|()| buffer));
                    return;
                }
                if hits(&state.unreadable, at, block_count as u64) {
                    done.send(Err(DeviceError::new(Cause::Errno(5), at)));
                    return;
                }
                let blocks = state.blocks.borrow();
                for (index, block) in (at.get()..).zip(&mut buffer.blocks_mut()[..block_count]) {
                    block.0 = blocks.get(&index).map_or([0; base::BLOCK_SIZE], |block| block.0);
                    state.transfer(index, block);
                }
                done.send(Ok(buffer));
            }
            Operation::Write { at, blocks: slices, done } => {
                let new = slices.iter().flat_map(|slice| slice.blocks());
                let count = new.clone().count() as u64;
                if hits(&state.spoiled, at, count) {
                    done.send(fail(Cause::Errno(5), at));
                    return;
                }
                if !self.ram.take_space(at, count) {
                    state.refused.borrow_mut().push(at);
                    done.send(fail(Cause::NoSpace, at));
                    return;
                }
                let mut blocks = state.blocks.borrow_mut();
                for (index, block) in (at.get()..).zip(new) {
                    blocks.insert(index, block.clone());
                }
                done.send(Ok(()));
            }
            Operation::Allocate { at, block_count, done } => {
                match self.ram.take_space(at, block_count) {
                    true => done.send(Ok(())),
                    false => done.send(fail(Cause::NoSpace, at)),
                }
            }
            Operation::Discard { at, block_count, done } => {
                for block in at.get()..at.get() + block_count {
                    state.blocks.borrow_mut().remove(&block);
                    state.backed.borrow_mut().remove(&block);
                }
                done.send(Ok(()));
            }
            Operation::Flush { done } => done.send(Ok(())),
        }
    }

    fn block_count(&self) -> u64 {
        self.block_count
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

impl RamBackend {
    fn fail(&self, operation: Operation, errno: i32) {
        let error = |at| DeviceError::new(Cause::Errno(errno), at);
        match operation {
            Operation::Read { at, done, .. } => done.send(Err(error(at))),
            Operation::Write { at, blocks: slices, done } => {
                let mut blocks = self.ram.0.blocks.borrow_mut();
                let new = slices.iter().flat_map(|slice| slice.blocks());
                for (index, block) in (at.get()..).zip(new) {
                    let torn = blocks.entry(index).or_insert(Block([0; base::BLOCK_SIZE]));
                    torn.0[..512].copy_from_slice(&block.0[..512]);
                }
                done.send(Err(error(at)));
            }
            Operation::Flush { done } => done.send(Err(error(Pba::new(0)))),
            Operation::Discard { at, done, .. } | Operation::Allocate { at, done, .. } => {
                done.send(Err(error(at)));
            }
        }
    }
}

/// When the clocks of these tests begin.
pub(crate) const WALL_START_NS: u64 = 1_700_000_000_000_000_000;

struct TestClock(Cell<u64>, u64);

impl Clock for TestClock {
    fn now(&self) -> Time {
        Time(self.0.get())
    }

    fn wall_ns(&self) -> u64 {
        self.1 + self.0.get()
    }
}

/// Runs `work` to its end on a runtime of its own, then kills that runtime as a crash does.
pub(crate) fn run<T: 'static, F: Future<Output = T> + 'static>(
    seed: u64,
    work: impl FnOnce(Runtime) -> F,
) -> T {
    run_at(WALL_START_NS, seed, work)
}

/// As [`run`], with a wall clock that begins at another time.
pub(crate) fn run_at<T: 'static, F: Future<Output = T> + 'static>(
    wall_ns: u64,
    seed: u64,
    work: impl FnOnce(Runtime) -> F,
) -> T {
    let clock = Rc::new(TestClock(Cell::new(0), wall_ns));
    let options = Options {
        order: Order::Random,
        seed,
        clock: Rc::clone(&clock) as Rc<dyn Clock>,
        unpark: Arc::new(|| {}),
    };
    let runtime = Runtime::new(options);
    let outcome = Rc::new(RefCell::new(None));
    let (work, slot) = (work(runtime.clone()), Rc::clone(&outcome));
    drop(runtime.spawn(async move {
        *slot.borrow_mut() = Some(work.await);
    }));
    loop {
        runtime.run_until_stalled();
        if let Some(outcome) = outcome.borrow_mut().take() {
            runtime.kill();
            return outcome;
        }
        let next = runtime.next_deadline().expect("something is left to wait for");
        clock.0.set(next.0);
        runtime.fire_timers();
    }
}
