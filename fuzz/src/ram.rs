//! A faultless device in memory, and a runtime to run on.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use base::{BLOCK_SIZE, Block, Pba};
use device::{Backend, Device, Operation};
use runtime::{Clock, Options, Order, Runtime, Time};

const ZEROES: Block = Block([0; BLOCK_SIZE]);

/// Contents of a device; clones share them.
#[derive(Clone)]
pub struct Ram {
    block_count: u64,
    /// What it began as.
    base: Rc<HashMap<u64, Block>>,
    changed: Rc<RefCell<HashMap<u64, Block>>>,
}

impl Ram {
    /// A device of zeroes.
    pub fn zeroed(block_count: u64) -> Self {
        Self { block_count, base: Rc::default(), changed: Rc::default() }
    }

    /// A device that begins as this one is now.
    pub fn settled(&self) -> Self {
        let mut base = (*self.base).clone();
        base.extend(self.changed.borrow().iter().map(|(at, block)| (*at, block.clone())));
        Self { base: Rc::new(base), changed: Rc::default(), ..*self }
    }

    /// A device with the same contents of its own; costs as much as was changed.
    pub fn fork(&self) -> Self {
        let changed = Rc::new(RefCell::new(self.changed.borrow().clone()));
        Self { base: Rc::clone(&self.base), changed, ..*self }
    }

    /// The device.
    pub fn device(&self) -> Device {
        Device::new(Rc::new(self.clone()))
    }

    /// Its length in blocks.
    pub fn block_count(&self) -> u64 {
        self.block_count
    }

    /// The blocks that were ever written, in order.
    pub fn written(&self) -> Vec<Pba> {
        let mut written: Vec<u64> = self.base.keys().copied().collect();
        written.extend(self.changed.borrow().keys());
        written.sort_unstable();
        written.dedup();
        written.into_iter().map(Pba::new).collect()
    }

    /// A block.
    pub fn block(&self, at: Pba) -> Block {
        let changed = self.changed.borrow();
        changed.get(&at.get()).or_else(|| self.base.get(&at.get())).unwrap_or(&ZEROES).clone()
    }

    /// Whether a block is not what it began as.
    pub fn is_changed(&self, at: Pba) -> bool {
        let base = self.base.get(&at.get()).unwrap_or(&ZEROES);
        self.changed.borrow().get(&at.get()).is_some_and(|now| now.0 != base.0)
    }

    /// Changes a block behind everybody's back.
    pub fn change<T>(&self, at: Pba, change: impl FnOnce(&mut Block) -> T) -> T {
        let mut block = self.block(at);
        let outcome = change(&mut block);
        self.changed.borrow_mut().insert(at.get(), block);
        outcome
    }
}

impl Backend for Ram {
    fn submit(&self, operation: Operation) {
        match operation {
            Operation::Read { at, block_count, mut buffer, done } => {
                for (index, block) in (at.get()..).zip(&mut buffer.blocks_mut()[..block_count]) {
                    *block = self.block(Pba::new(index));
                }
                done.send(Ok(buffer));
            }
            Operation::Write { at, blocks, done } => {
                let blocks = blocks.iter().flat_map(|slice| slice.blocks());
                for (index, block) in (at.get()..).zip(blocks) {
                    self.changed.borrow_mut().insert(index, block.clone());
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
struct FuzzClock(Cell<u64>);

impl Clock for FuzzClock {
    fn now(&self) -> Time {
        Time(self.0.get())
    }

    fn wall_ns(&self) -> u64 {
        1_700_000_000_000_000_000 + self.0.get()
    }
}

/// Times that a run may wait: an engine that cannot go on tries again now and then, for ever.
const WAITS_MAX: u32 = 3000;

/// Runs `work` to its end on a runtime of its own, then kills that runtime as a crash does. `None`
/// if it waits for something that does not come.
pub fn run<T: 'static, F: Future<Output = T> + 'static>(
    seed: u64,
    work: impl FnOnce(Runtime) -> F,
) -> Option<T> {
    let clock = Rc::new(FuzzClock::default());
    let runtime = Runtime::new(Options {
        order: Order::Random,
        seed,
        clock: Rc::<FuzzClock>::clone(&clock),
        unpark: Arc::new(|| {}),
    });
    let outcome = Rc::new(RefCell::new(None));
    let (work, slot) = (work(runtime.clone()), Rc::clone(&outcome));
    drop(runtime.spawn(async move {
        *slot.borrow_mut() = Some(work.await);
    }));
    for _ in 0..WAITS_MAX {
        runtime.run_until_stalled();
        if outcome.borrow().is_some() {
            break;
        }
        let Some(next) = runtime.next_deadline() else { break };
        clock.0.set(next.0);
        runtime.fire_timers();
    }
    runtime.kill();
    outcome.take()
}
