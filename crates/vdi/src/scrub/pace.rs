//! The rate that a pass keeps, whatever it reads for.

use std::time::Duration;

use base::{BLOCK_SIZE_U64, ErrorKind};

use crate::Error;
use crate::engine::Engine;

/// Longest sleep before it is looked whether the pass is to end or its rate is another one.
const SLEEP_MAX: Duration = Duration::from_secs(1);

impl Engine {
    /// Whether the pass under way is to go on.
    ///
    /// # Errors
    /// If it is to end.
    pub(super) fn scrub_goes_on(&self) -> Result<(), Error> {
        self.go_on()?;
        match self.scrubber.stop.get() {
            true => Err(Error::refused(ErrorKind::Fenced, "scrub was stopped")),
            false => Ok(()),
        }
    }

    /// Waits as long as reading so many blocks takes at the rate of the pass under way. What is left of
    /// that when the rate changes is waited for at the new one.
    ///
    /// # Errors
    /// If the pass is to end.
    pub(super) async fn keep_scrub_rate(&self, blocks: u64) -> Result<(), Error> {
        let runtime = &self.runtime;
        runtime.yield_now().await;
        // A byte for a nanosecond each: what a rate of bytes in a second pays off in that time.
        let mut owed = u128::from(blocks.saturating_mul(BLOCK_SIZE_U64)) * 1_000_000_000;
        loop {
            self.scrub_goes_on()?;
            let rate = u128::from(self.scrubber.rate_bytes.get());
            if owed == 0 || rate == 0 {
                return Ok(());
            }
            let left = u64::try_from(owed.div_ceil(rate)).unwrap_or(u64::MAX);
            let before = runtime.now();
            runtime.sleep(Duration::from_nanos(left).min(SLEEP_MAX)).await;
            let passed = runtime.now().since(before).as_nanos();
            owed = owed.saturating_sub(passed.saturating_mul(rate));
        }
    }
}
