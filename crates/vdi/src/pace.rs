//! How work in the background leaves the device and the thread to guests: after each step it rests, the
//! longer the more it took, and takes small steps.

use std::time::Duration;

use runtime::Time;

use crate::engine::Engine;
use crate::mark::NODES_AT_ONCE;

/// Steps are followed by a rest of so many times their length while guests have something to do: they have
/// four fifths of the device and of the thread at least.
const REST_FACTOR: u32 = 4;

/// Nodes of a step beside guests: no request waits behind many.
const NODES_BESIDE_GUESTS: usize = 16;

/// Guests have something to do for so long after their last request.
const ACTIVE_FOR: Duration = Duration::from_millis(20);

/// Work in the background, and what guests did beside it.
pub(crate) struct Pace<'a> {
    engine: &'a Engine,
    /// When this step began.
    began: Time,
    /// Requests of guests by then.
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

    /// Most nodes that this step should read.
    pub(crate) fn nodes(&self) -> usize {
        match self.is_shared() {
            true => NODES_BESIDE_GUESTS,
            false => NODES_AT_ONCE,
        }
    }

    /// Ends a step, rests, and begins the next. Who needs space at once lets nobody rest.
    pub(crate) async fn rest(&mut self) {
        let runtime = &self.engine.runtime;
        let now = runtime.now();
        if served(self.engine) > self.served {
            self.active_until = now.after(ACTIVE_FOR);
        }
        match self.is_shared() {
            true => runtime.sleep(now.since(self.began).saturating_mul(REST_FACTOR)).await,
            false => runtime.yield_now().await,
        }
        self.began = runtime.now();
        self.served = served(self.engine);
    }

    fn is_shared(&self) -> bool {
        self.engine.runtime.now() < self.active_until && !self.engine.collector.is_needed()
    }
}

fn served(engine: &Engine) -> u64 {
    let stats = engine.stats.borrow();
    stats.reads + stats.writes
}
