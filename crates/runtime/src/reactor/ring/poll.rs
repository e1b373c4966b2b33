//! How long to look for completions before going to sleep.
//!
//! Falling asleep and being woken costs more than a fast device or a client next door takes to
//! answer. So a reactor that was woken soon after it slept looks for a while first, the next time;
//! one that slept long looks for half as long, and soon not at all: an idle daemon only sleeps.
//! The kernel's `halt_poll_ns` and QEMU's `poll-max-ns` work alike.
//!
//! Price: while a request is awaited for less than [`WINDOW_MAX`], the thread keeps its core busy.

use std::time::Duration;

/// Longest look, as long as the kernel's own `halt_poll_ns`. Covers reads, writes and flushes of an
/// NVMe or virtio disk, and a client on another core; what takes longer loses little by a wake-up.
const WINDOW_MAX: Duration = Duration::from_micros(200);

/// Shortest look that is worth its system call.
const WINDOW_MIN: Duration = Duration::from_micros(4);

/// The adaptive window.
#[derive(Debug, Default)]
pub(super) struct PollWindow {
    window: Duration,
    /// With one core, looking would only keep busy whoever is waited for.
    disabled: bool,
}

impl PollWindow {
    pub(super) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { window: Duration::ZERO, disabled: cores < 2 }
    }

    /// How long to look before sleeping, if at all.
    pub(super) fn get(&self) -> Option<Duration> {
        (!self.window.is_zero()).then_some(self.window)
    }

    /// Learns from a sleep that lasted so long, after a look that found nothing.
    pub(super) fn slept(&mut self, duration: Duration) {
        if self.disabled {
            return;
        }
        let window = if duration <= WINDOW_MAX {
            (self.window * 2).clamp(WINDOW_MIN, WINDOW_MAX)
        } else {
            self.window / 2
        };
        self.window = if window < WINDOW_MIN { Duration::ZERO } else { window };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_what_sleeping_was_like() {
        let mut window = PollWindow { window: Duration::ZERO, disabled: false };
        let short = Duration::from_micros(20);
        let long = Duration::from_millis(20);
        let check = |window: &mut PollWindow, slept: Duration, expected: u64| {
            window.slept(slept);
            assert_eq!(window.get().unwrap_or_default(), Duration::from_nanos(expected));
        };
        check(&mut window, long, 0);
        for expected in [4_000, 8_000, 16_000, 32_000, 64_000, 128_000, 200_000, 200_000] {
            check(&mut window, short, expected);
        }
        for expected in [100_000, 50_000, 25_000, 12_500, 6_250, 0, 0] {
            check(&mut window, long, expected);
        }
        let mut alone = PollWindow { window: Duration::ZERO, disabled: true };
        check(&mut alone, short, 0);
    }
}
