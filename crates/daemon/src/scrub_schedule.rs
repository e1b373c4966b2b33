//! Runs scrub by itself, from time to time.
//!
//! When the last pass ended, and whether one was under way, is in a file beside the control socket, so that
//! the next daemon of the store knows:
//! - a pass ended: the next begins [`Scrub::every`] after that, whoever had it begun;
//! - one was cut short by the end of the daemon or of the store: it begins anew [`AFTER_CUT`] after the
//!   store was opened, and twice as long after each further time in a row, up to [`AFTER_CUT_MAX`]: what
//!   ended the store may be a place that the device does not come back from;
//! - nothing is known, as after a boot that emptied /run: the first begins after [`AFTER_OPEN`], or after
//!   `every` if that is less.
//!
//! Times are store time, which passes while the store is open and does not leap (design rule 38).

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use jiff::Timestamp;
use runtime::Runtime;
use serde::{Deserialize, Serialize};
use vdi::{ScrubEnd, Store};

use crate::config::Scrub;

/// How often it is looked whether something is due.
const LOOK_PERIOD: Duration = Duration::from_secs(30);

/// When a pass begins anew that was cut short.
const AFTER_CUT: Duration = Duration::from_secs(600);

/// After how long it does at the latest: a store that is opened anew each night must be read in the rest of
/// the day.
const AFTER_CUT_MAX: Duration = Duration::from_secs(4 * 3600);

/// When the first pass begins if nothing is known of an earlier one.
const AFTER_OPEN: Duration = Duration::from_secs(24 * 3600);

/// When a pass begins anew that could not go on.
const AFTER_FAILURE: Duration = Duration::from_secs(3600);

/// What the file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Memory {
    store: PathBuf,
    /// When the last pass ended that read everything, in seconds of store time.
    ended_store_seconds: Option<u64>,
    under_way: bool,
    /// How many passes in a row were cut short or could not go on.
    #[serde(default)]
    cuts: u32,
}

impl Memory {
    /// What the next daemon of the store, or this one when it has opened it again, makes of it.
    fn opened(&self) -> Self {
        let cuts = self.cuts.saturating_add(self.under_way.into());
        Self { under_way: false, cuts, ..self.clone() }
    }
}

/// When scrub runs.
pub(crate) struct ScrubSchedule {
    scrub: Scrub,
    file: PathBuf,
    memory: RefCell<Memory>,
    store: Store,
    runtime: Runtime,
    /// When the next pass begins, in seconds of store time.
    next_seconds: Cell<Option<u64>>,
}

impl ScrubSchedule {
    /// Begins to look at the clock, for a store that was just opened. `/run/parallax.sock` goes with
    /// `/run/parallax.scrub.json`.
    pub(crate) fn start(
        runtime: &Runtime,
        store: &Store,
        scrub: Scrub,
        socket: &Path,
        path: &Path,
    ) -> Rc<Self> {
        store.set_scrub_rate(scrub.rate_bytes);
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let file = socket.with_extension("scrub.json");
        let text = std::fs::read(&file).unwrap_or_default();
        let known = serde_json::from_slice::<Memory>(&text).ok();
        let memory = known.filter(|memory| memory.store == path).unwrap_or_default();
        let memory = Memory { store: path, ..memory };
        let opened = memory.opened();
        let next = first(&opened, scrub.every, store_seconds(store));
        let schedule = Rc::new(Self {
            scrub,
            file,
            memory: RefCell::new(memory),
            store: store.clone(),
            runtime: runtime.clone(),
            next_seconds: Cell::new(next),
        });
        schedule.remember(|memory| *memory = opened);
        let looking = Rc::clone(&schedule);
        drop(runtime.spawn(async move { looking.look().await }));
        schedule
    }

    /// When the next pass begins, as the wall clock is now; `None` if none does.
    pub(crate) fn next(&self) -> Option<Timestamp> {
        let left = self.next_seconds.get()?.saturating_sub(store_seconds(&self.store));
        let seconds = (self.runtime.wall_ns() / 1_000_000_000).saturating_add(left);
        Timestamp::from_second(i64::try_from(seconds).ok()?).ok()
    }

    async fn look(&self) {
        let mut seen = 0;
        loop {
            self.runtime.sleep(LOOK_PERIOD).await;
            let status = self.store.scrub_status();
            let now = store_seconds(&self.store);
            if status.running {
                self.remember(|memory| memory.under_way = true);
                continue;
            }
            if let Some(last) = status.last.filter(|last| last.pass > seen) {
                seen = last.pass;
                let has_failed = matches!(last.end, ScrubEnd::Failed(_));
                self.remember(|memory| {
                    // What failed goes with the store, if that has: the next one begins it anew.
                    memory.under_way = has_failed;
                    if !has_failed {
                        memory.cuts = 0;
                    }
                    if last.end == ScrubEnd::Finished {
                        memory.ended_store_seconds = Some(now);
                    }
                });
                let rest = match has_failed {
                    false => self.scrub.every,
                    true => self.scrub.every.min(AFTER_FAILURE),
                };
                let next = now.saturating_add(rest.as_secs());
                self.next_seconds.set((!self.scrub.every.is_zero()).then_some(next));
            }
            if self.next_seconds.get().is_some_and(|next| next <= now) {
                // Before it may meet what the store does not outlive.
                self.remember(|memory| memory.under_way = true);
                self.store.begin_scrub(None);
            }
        }
    }

    fn remember(&self, change: impl FnOnce(&mut Memory)) {
        let before = self.memory.borrow().clone();
        change(&mut self.memory.borrow_mut());
        let memory = self.memory.borrow();
        if *memory == before {
            return;
        }
        let text = serde_json::to_vec(&*memory).unwrap_or_default();
        if let Err(error) = std::fs::write(&self.file, text) {
            let shown = self.file.display();
            tracing::warn!(%error, "cannot write {shown}: the next daemon does not know of this scrub");
        }
    }
}

/// When the first pass of a daemon begins, in seconds of store time.
fn first(memory: &Memory, every: Duration, now: u64) -> Option<u64> {
    if every.is_zero() {
        return None;
    }
    let after = |rest: Duration| now.saturating_add(every.min(rest).as_secs());
    Some(match memory.ended_store_seconds {
        _ if memory.cuts > 0 => after(after_cuts(memory.cuts)),
        // Another store may have been there then: never longer from now than the period.
        Some(ended) => ended.min(now).saturating_add(every.as_secs()),
        None => after(AFTER_OPEN),
    })
}

/// How long a store rests that was opened after so many passes in a row were cut short.
fn after_cuts(cuts: u32) -> Duration {
    let doubled = 2_u32.saturating_pow(cuts.saturating_sub(1));
    AFTER_CUT.saturating_mul(doubled).min(AFTER_CUT_MAX)
}

fn store_seconds(store: &Store) -> u64 {
    store.store_time().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pass_follows_what_is_known_of_the_last() {
        const DAY: u64 = 24 * 3600;
        let now = 1_000 * DAY;
        let check = |ended_store_seconds, cuts, days: u64, expected: Option<u64>| {
            let memory = Memory { store: "/s".into(), ended_store_seconds, under_way: false, cuts };
            assert_eq!(
                first(&memory, Duration::from_secs(days * DAY), now),
                expected,
                "{memory:?}"
            );
        };
        check(None, 0, 30, Some(now + DAY));
        check(None, 1, 30, Some(now + 600));
        check(Some(now - 10 * DAY), 0, 30, Some(now + 20 * DAY));
        check(Some(now - 10 * DAY), 1, 30, Some(now + 600));
        check(Some(now - 40 * DAY), 0, 30, Some(now - 10 * DAY));
        check(Some(now + 999 * DAY), 0, 30, Some(now + 30 * DAY));
        check(Some(now - 40 * DAY), 1, 0, None);
        // A place that the store does not outlive: it began anew at once, for the last pass that ended
        // was a period ago.
        check(Some(now - 40 * DAY), 1, 30, Some(now + 600));
        check(Some(now - 40 * DAY), 2, 30, Some(now + 1200));
        check(Some(now - 40 * DAY), 5, 30, Some(now + 9600));
    }

    /// A store that was opened anew each night was not read any more: the rest before the next pass
    /// doubled each time until it was longer than a day.
    #[test]
    fn a_store_that_is_opened_each_day_is_read_again() {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        let mut memory = Memory { ended_store_seconds: Some(0), ..Memory::default() };
        for day in 100..140 {
            memory = Memory { under_way: true, ..memory }.opened();
            let opened = day * DAY.as_secs();
            let next = first(&memory, 30 * DAY, opened).unwrap();
            assert!(next <= opened + AFTER_CUT_MAX.as_secs(), "{memory:?}");
        }
        let endless = Memory { cuts: u32::MAX, ..memory };
        assert_eq!(first(&endless, 30 * DAY, 0), Some(AFTER_CUT_MAX.as_secs()));
        assert_eq!(first(&endless, AFTER_CUT, 0), Some(600), "never later than the period");
    }

    /// A place at which the device timed out ended the store each time, and was read again as soon.
    #[test]
    fn each_pass_that_is_cut_short_is_counted_until_one_ends() {
        let begun = |memory: &Memory| Memory { under_way: true, ..memory.clone() };
        let mut memory = Memory::default();
        for cuts in 1..4 {
            memory = begun(&memory).opened();
            assert_eq!((memory.cuts, memory.under_way), (cuts, false));
            // What ends before the next one begins was not that.
            assert_eq!(memory.opened(), memory);
        }
    }
}
