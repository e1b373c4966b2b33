//! The clock of production.

use rustix::time::{ClockId, Timespec, clock_gettime};

use crate::{Clock, Time};

/// CLOCK_BOOTTIME for what must not stand still in suspend (design rule 54), CLOCK_REALTIME for
/// people.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Time {
        Time(nanoseconds(clock_gettime(ClockId::Boottime)))
    }

    fn wall_ns(&self) -> u64 {
        nanoseconds(clock_gettime(ClockId::Realtime))
    }
}

fn nanoseconds(time: Timespec) -> u64 {
    // A wall clock before 1970 reads as 1970.
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_on() {
        let (first, wall) = (SystemClock.now(), SystemClock.wall_ns());
        assert!(SystemClock.now() >= first);
        assert!(wall > 1_600_000_000_000_000_000, "after 2020");
    }
}
