//! Runs a future on a runtime against the simulated device, one step at a time, until it is done
//! or a crash strikes.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use runtime::{Clock, Options, Order, Runtime};

use crate::plan::Strike;
use crate::random::Random;
use crate::world::World;

/// Simulated time without an answer to any client after which the store counts as stuck. Longer
/// than any injected hang.
const STUCK_AFTER: Duration = Duration::from_secs(1_800);

/// Steps after which a run counts as endless.
const STEPS_MAX: u64 = 5_000_000;

/// How a future ended.
#[derive(Debug)]
pub enum Driven<T> {
    /// It is done.
    Done(T),
    /// The crash struck first.
    Struck,
    /// The run has failed.
    Failed,
}

/// The executor of one life of the store.
pub struct Executor {
    world: Rc<World>,
    runtime: Runtime,
    random: RefCell<Random>,
    steps: Cell<u64>,
    strike: Cell<Strike>,
}

impl Executor {
    /// A fresh runtime, as a new process has.
    #[must_use]
    pub fn new(world: &Rc<World>) -> Self {
        let number = world.number();
        let mut random = Random::split(world.seed ^ number, "executor");
        let runtime = Runtime::new(Options {
            order: Order::Random,
            seed: random.number(),
            clock: Rc::new(world.clock.clone()),
            unpark: Arc::new(|| {}),
        });
        Self {
            world: Rc::clone(world),
            runtime,
            random: RefCell::new(random),
            steps: Cell::new(0),
            strike: Cell::new(Strike::Never),
        }
    }

    /// The runtime.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Says when the crash strikes; what it counts, it counts from now on.
    pub fn strike_at(&self, strike: Strike) {
        self.strike.set(match strike {
            Strike::AfterPromise(count, steps) => {
                Strike::AfterPromise(self.world.promises() + count, steps)
            }
            Strike::InReceive(count, steps) => {
                Strike::InReceive(self.world.receives.get() + count, steps)
            }
            Strike::AfterSlotWrite(count, steps) => {
                Strike::AfterSlotWrite(self.world.device.counts().slot_writes + count, steps)
            }
            other => other,
        });
    }

    /// Clients begin to work.
    pub fn begin_work(&self) {
        if let Strike::WorkSteps(steps) = self.strike.get() {
            self.strike.set(Strike::Steps(self.steps.get() + steps));
        }
    }

    /// Runs `future` to its end, if nothing strikes first.
    pub fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Driven<T> {
        let result = Rc::new(RefCell::new(None));
        let slot = Rc::clone(&result);
        drop(self.runtime.spawn(async move {
            *slot.borrow_mut() = Some(future.await);
        }));
        self.world.progressed();
        loop {
            if self.world.failed() {
                return Driven::Failed;
            }
            if let Some(value) = result.borrow_mut().take() {
                return Driven::Done(value);
            }
            if self.is_struck() {
                return Driven::Struck;
            }
            self.turn();
        }
    }

    /// Drops everything that runs, as the death of the process does.
    pub fn kill(self) {
        self.runtime.kill();
        // Wakers of dead tasks refer to the queue that they stand in.
        while self.runtime.step() {}
    }

    fn is_struck(&self) -> bool {
        match self.strike.get() {
            Strike::Steps(steps) => self.steps.get() >= steps,
            Strike::DeviceWrites(writes) => self.world.device.counts().writes >= writes,
            Strike::LogGrown(blocks) => self.world.device.counts().log_since_slot >= blocks,
            Strike::AfterPromise(count, steps) if self.world.promises() >= count => {
                self.strike.set(Strike::Steps(self.steps.get() + steps));
                false
            }
            Strike::InReceive(count, steps) if self.world.receives.get() >= count => {
                self.strike.set(Strike::Steps(self.steps.get() + steps));
                false
            }
            Strike::AfterSlotWrite(count, steps)
                if self.world.device.counts().slot_writes >= count =>
            {
                self.strike.set(Strike::Steps(self.steps.get() + steps));
                false
            }
            Strike::AfterPromise(..)
            | Strike::InReceive(..)
            | Strike::AfterSlotWrite(..)
            | Strike::WorkSteps(_)
            | Strike::Never => false,
        }
    }

    fn turn(&self) {
        let Self { world, runtime, .. } = self;
        let now = world.clock.now();
        let due = |at: Option<runtime::Time>| at.is_some_and(|at| at <= now);
        let device_due = due(world.device.next_completion());
        if device_due && self.random.borrow_mut().chance(250) {
            world.device.complete_one();
            return;
        }
        if due(runtime.next_deadline()) {
            runtime.fire_timers();
        }
        if runtime.step() {
            self.steps.set(self.steps.get() + 1);
            if self.steps.get() > STEPS_MAX {
                world.fail(format!("still running after {STEPS_MAX} steps"));
            }
            world.clock.advance(self.random.borrow_mut().below(world.plan.step_ns + 1));
            return;
        }
        if runtime.end_turn() {
            return;
        }
        if device_due {
            world.device.complete_one();
            return;
        }
        let next = [world.device.next_completion(), runtime.next_deadline()];
        match next.into_iter().flatten().min() {
            Some(next) => world.clock.advance_to(next),
            None => world.fail("everybody waits and nothing is under way"),
        }
        if world.clock.now().since(world.last_progress()) > STUCK_AFTER {
            world.fail(format!("no answer for {} simulated seconds", STUCK_AFTER.as_secs()));
        }
    }
}

impl std::fmt::Debug for Executor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Executor({} steps)", self.steps.get())
    }
}
