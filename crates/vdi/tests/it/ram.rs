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
pub(crate) struct Ram {
    blocks: Rc<RefCell<HashMap<u64, Block>>>,
    spoiled: Rc<RefCell<HashSet<u64>>>,
    blocks_read: Rc<Cell<u64>>,
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
        self.blocks.borrow().get(&at.get()).cloned().unwrap_or(Block([0; base::BLOCK_SIZE]))
    }

    /// Replaces a block behind everybody's back.
    pub(crate) fn set_block(&self, at: Pba, block: &base::Block) {
        self.blocks.borrow_mut().insert(at.get(), block.clone());
    }

    /// Makes every write of this block fail from now on.
    pub(crate) fn spoil(&self, at: Pba) {
        self.spoiled.borrow_mut().insert(at.get());
    }

    /// Blocks that were read in its life.
    pub(crate) fn blocks_read(&self) -> u64 {
        self.blocks_read.get()
    }

    /// A device with the same contents of its own.
    pub(crate) fn copy(&self) -> Self {
        let blocks = Rc::new(RefCell::new(self.blocks.borrow().clone()));
        Self { blocks, ..Self::default() }
    }

    /// Flips one bit of a block.
    pub(crate) fn rot(&self, at: Pba) {
        if let Some(block) = self.blocks.borrow_mut().get_mut(&at.get()) {
            block.0[17] ^= 4;
        }
    }
}

impl Backend for RamBackend {
    fn submit(&self, operation: Operation) {
        let mut blocks = self.ram.blocks.borrow_mut();
        match operation {
            Operation::Read { at, block_count, mut buffer, done } => {
                self.ram.blocks_read.set(self.ram.blocks_read.get() + block_count as u64);
                for (index, block) in (at.get()..).zip(&mut buffer.blocks_mut()[..block_count]) {
                    block.0 = blocks.get(&index).map_or([0; base::BLOCK_SIZE], |block| block.0);
                }
                done.send(Ok(buffer));
            }
            Operation::Write { at, blocks: slices, done } => {
                let new = slices.iter().flat_map(|slice| slice.blocks());
                let count = new.clone().count() as u64;
                let spoiled = self.ram.spoiled.borrow();
                if (at.get()..at.get() + count).any(|index| spoiled.contains(&index)) {
                    done.send(Err(DeviceError::new(Cause::Errno(5), at)));
                    return;
                }
                for (index, block) in (at.get()..).zip(new) {
                    blocks.insert(index, block.clone());
                }
                done.send(Ok(()));
            }
            Operation::Flush { done }
            | Operation::Discard { done, .. }
            | Operation::Allocate { done, .. } => done.send(Ok(())),
        }
    }

    fn block_count(&self) -> u64 {
        self.block_count
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

#[derive(Default)]
struct TestClock(Cell<u64>);

impl Clock for TestClock {
    fn now(&self) -> Time {
        Time(self.0.get())
    }

    fn wall_ns(&self) -> u64 {
        1_700_000_000_000_000_000 + self.0.get()
    }
}

/// Runs `work` to its end on a runtime of its own, then kills that runtime as a crash does.
pub(crate) fn run<T: 'static, F: Future<Output = T> + 'static>(
    seed: u64,
    work: impl FnOnce(Runtime) -> F,
) -> T {
    let clock = Rc::new(TestClock::default());
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
