//! Runs scrub by itself, from time to time.
//!
//! When the last pass ended, and whether one was under way, is in a file beside the control socket, so that
//! the next daemon of the store knows:
//! - a pass ended: the next begins [`Scrub::every`] after that, whoever had it begun;
//! - one was cut short by the end of the daemon: it begins anew [`AFTER_CUT`] after the store was opened;
//! - nothing is known, as after a boot that emptied /run: the first begins after [`AFTER_OPEN`], or after
//!   `every` if that is less.

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

/// When the first pass begins if nothing is known of an earlier one.
const AFTER_OPEN: Duration = Duration::from_secs(24 * 3600);

/// When a pass begins anew that could not go on.
const AFTER_FAILURE: Duration = Duration::from_secs(3600);

/// What the file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Memory {
    store: PathBuf,
    /// When the last pass ended that read everything, in seconds since 1970.
    ended_seconds: Option<u64>,
    under_way: bool,
}

/// When scrub runs.
pub(crate) struct ScrubSchedule {
    scrub: Scrub,
    file: PathBuf,
    memory: RefCell<Memory>,
    /// When the next pass begins, in seconds since 1970.
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
        let next = first(&memory, scrub.every, seconds(runtime));
        let schedule = Rc::new(Self {
            scrub,
            file,
            memory: RefCell::new(memory),
            next_seconds: Cell::new(next),
        });
        let (looking, runtime_too, store) = (Rc::clone(&schedule), runtime.clone(), store.clone());
        drop(runtime.spawn(async move { looking.look(&runtime_too, &store).await }));
        schedule
    }

    /// When the next pass begins; `None` if none does.
    pub(crate) fn next(&self) -> Option<Timestamp> {
        let seconds = i64::try_from(self.next_seconds.get()?).ok()?;
        Timestamp::from_second(seconds).ok()
    }

    async fn look(&self, runtime: &Runtime, store: &Store) {
        let mut seen = 0;
        loop {
            runtime.sleep(LOOK_PERIOD).await;
            let status = store.scrub_status();
            let now = seconds(runtime);
            if status.running {
                self.remember(|memory| memory.under_way = true);
                continue;
            }
            if let Some(last) = status.last.filter(|last| last.pass > seen) {
                seen = last.pass;
                let ended = last.ended_ns / 1_000_000_000;
                self.remember(|memory| {
                    // What failed goes with the store, if that has: the next one begins it anew.
                    memory.under_way = matches!(last.end, ScrubEnd::Failed(_));
                    if last.end == ScrubEnd::Finished {
                        memory.ended_seconds = Some(ended);
                    }
                });
                let rest = match last.end {
                    ScrubEnd::Finished | ScrubEnd::Stopped => self.scrub.every,
                    ScrubEnd::Failed(_) => self.scrub.every.min(AFTER_FAILURE),
                };
                let next = now.saturating_add(rest.as_secs());
                self.next_seconds.set((!self.scrub.every.is_zero()).then_some(next));
            }
            if self.next_seconds.get().is_some_and(|next| next <= now) {
                store.begin_scrub(None);
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

/// When the first pass of a daemon begins, in seconds since 1970.
fn first(memory: &Memory, every: Duration, now: u64) -> Option<u64> {
    if every.is_zero() {
        return None;
    }
    // Never longer from now than the period, whatever the clock said then.
    let due = match memory.ended_seconds {
        Some(ended) => ended.min(now).saturating_add(every.as_secs()),
        None => now.saturating_add(every.min(AFTER_OPEN).as_secs()),
    };
    Some(match memory.under_way {
        true => due.min(now.saturating_add(every.min(AFTER_CUT).as_secs())),
        false => due,
    })
}

fn seconds(runtime: &Runtime) -> u64 {
    runtime.wall_ns() / 1_000_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pass_follows_what_is_known_of_the_last() {
        const DAY: u64 = 24 * 3600;
        let now = 1_000 * DAY;
        let check = |ended_seconds, under_way, days: u64, expected: Option<u64>| {
            let memory = Memory { store: "/s".into(), ended_seconds, under_way };
            assert_eq!(
                first(&memory, Duration::from_secs(days * DAY), now),
                expected,
                "{memory:?}"
            );
        };
        check(None, false, 30, Some(now + DAY));
        check(None, true, 30, Some(now + 600));
        check(Some(now - 10 * DAY), false, 30, Some(now + 20 * DAY));
        check(Some(now - 10 * DAY), true, 30, Some(now + 600));
        check(Some(now - 40 * DAY), false, 30, Some(now - 10 * DAY));
        check(Some(now + 999 * DAY), false, 30, Some(now + 30 * DAY));
        check(Some(now - 40 * DAY), true, 0, None);
    }
}
