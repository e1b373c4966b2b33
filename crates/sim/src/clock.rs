//! Simulated time: a number that only the run moves.

use std::cell::Cell;
use std::rc::Rc;

use runtime::{Clock, Time};

/// The wall time at which every run starts: 2026-01-01, in nanoseconds since 1970.
const WALL_START_NS: u64 = 1_767_225_600_000_000_000;

/// Monotonic time and a wall clock that faults may move. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct SimClock(Rc<State>);

#[derive(Debug, Default)]
struct State {
    now: Cell<Time>,
    /// How far the wall clock is off, in nanoseconds.
    wall_error_ns: Cell<i64>,
    /// The latest wall time from which it jumped.
    latest_ns: Cell<u64>,
}

impl SimClock {
    /// Moves time on to `to`; never back.
    pub fn advance_to(&self, to: Time) {
        self.0.now.set(self.0.now.get().max(to));
    }

    /// Moves time on by `ns` nanoseconds.
    pub fn advance(&self, ns: u64) {
        self.0.now.set(Time(self.0.now.get().0.saturating_add(ns)));
    }

    /// How far the wall clock is off, in nanoseconds.
    #[must_use]
    pub fn wall_error_ns(&self) -> i64 {
        self.0.wall_error_ns.get()
    }

    /// Whether the wall clock has been ahead of this time already.
    #[must_use]
    pub fn was_ahead(&self, wall_ns: u64) -> bool {
        self.0.latest_ns.get() > wall_ns
    }

    /// Makes the wall clock jump by `ns` nanoseconds, either way.
    pub fn jump_wall(&self, ns: i64) {
        self.0.latest_ns.set(self.0.latest_ns.get().max(self.wall_ns()));
        self.0.wall_error_ns.set(self.0.wall_error_ns.get().saturating_add(ns));
    }
}

impl Clock for SimClock {
    fn now(&self) -> Time {
        self.0.now.get()
    }

    fn wall_ns(&self) -> u64 {
        WALL_START_NS
            .saturating_add(self.0.now.get().0)
            .saturating_add_signed(self.0.wall_error_ns.get())
    }
}
