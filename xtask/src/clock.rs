//! The wall around real time: the one place of the tooling that reads a clock or sleeps.

use std::time::{Duration, Instant};

/// Now, on the monotonic clock.
#[expect(clippy::disallowed_methods, reason = "the tooling measures real programs in real time")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Blocks this thread.
#[expect(clippy::disallowed_methods, reason = "the tooling waits for real programs")]
pub(crate) fn sleep(duration: Duration) {
    std::thread::sleep(duration);
}

/// Polls `done` every few milliseconds until it says yes; `false` if `limit` passed first.
pub(crate) fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = now() + limit;
    loop {
        if done() {
            return true;
        }
        if now() >= deadline {
            return false;
        }
        sleep(Duration::from_millis(5));
    }
}
