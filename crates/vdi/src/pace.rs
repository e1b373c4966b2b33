//! How work in the background leaves the device and the thread to guests: after each step it rests, the
//! longer the more it took, and takes small steps.

use std::time::Duration;

use runtime::Time;

use crate::engine::Engine;
use crate::mark::Stride;

/// Steps are followed by a rest of so many times their length while guests have something to do: they have
/// four fifths of the device and of the thread at least.
const REST_FACTOR: u32 = 4;

/// As [`REST_FACTOR`], while little space is free: what is to be collected must not be overtaken by what is
/// written.
const REST_FACTOR_SCARCE: u32 = 1;

/// Space is scarce when less than one part in this many is free.
const SCARCE_SHARE: u64 = 16;

/// Longest rest: a step may have waited for a device, or for a machine that was asleep.
const REST_MAX: Duration = Duration::from_secs(1);

/// Longest sleep before it is looked whether somebody needs space by now.
const SLEEP_MAX: Duration = Duration::from_millis(10);

/// Guests have something to do for so long after their last request.
const ACTIVE_FOR: Duration = Duration::from_millis(20);

/// Work in the background, and what guests did beside it.
pub(crate) struct Pace<'a> {
    engine: &'a Engine,
    /// When this step began.
    began: Time,
    /// Requests of guests that were served when it was last looked.
    served: u64,
    /// Until when guests count as active.
    active_until: Time,
}

impl<'a> Pace<'a> {
    /// Begins a step. Until more is known, guests are thought to be active.
    pub(crate) fn new(engine: &'a Engine) -> Self {
        let began = engine.runtime.now();
        Self { engine, began, served: served(engine), active_until: began.after(ACTIVE_FOR) }
    }

    /// How far this step of a walk should go.
    pub(crate) fn stride(&self) -> Stride {
        match self.is_shared() {
            true => Stride::BESIDE_GUESTS,
            false => Stride::ALONE,
        }
    }

    /// Begins a step anew: what was done since the last one kept a pace of its own.
    pub(crate) fn begin(&mut self) {
        self.began = self.engine.runtime.now();
    }

    /// Ends a step, rests, and begins the next. Who needs space at once lets nobody rest.
    pub(crate) async fn rest(&mut self) {
        let runtime = &self.engine.runtime;
        self.look();
        let took = runtime.now().since(self.began);
        let until = runtime.now().after(took.saturating_mul(self.factor()).min(REST_MAX));
        loop {
            let left = until.since(runtime.now());
            if left.is_zero() || !self.is_shared() || self.engine.go_on().is_err() {
                break;
            }
            runtime.sleep(left.min(SLEEP_MAX)).await;
            self.look();
        }
        runtime.yield_now().await;
        self.begin();
    }

    /// Notes whether guests have done something.
    fn look(&mut self) {
        let served = served(self.engine);
        if served > std::mem::replace(&mut self.served, served) {
            self.active_until = self.engine.runtime.now().after(ACTIVE_FOR);
        }
    }

    fn factor(&self) -> u32 {
        let allocator = &self.engine.allocator;
        match allocator.free_blocks() < allocator.capacity_blocks() / SCARCE_SHARE {
            true => REST_FACTOR_SCARCE,
            false => REST_FACTOR,
        }
    }

    fn is_shared(&self) -> bool {
        self.engine.runtime.now() < self.active_until && !self.engine.space_is_needed()
    }
}

fn served(engine: &Engine) -> u64 {
    let stats = engine.stats.borrow();
    stats.reads + stats.writes
}
