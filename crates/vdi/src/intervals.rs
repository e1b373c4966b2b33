//! What happened to a VDI, summed up by intervals of time.
//!
//! A VDI may have a hundred thousand moments. They are walked from the newest on, some at a time, so
//! that other requests go on; what is answered is bounded, and says where the rest begins.

use std::rc::Rc;

use base::{ErrorKind, SnapshotNumber};

use crate::Error;
use crate::engine::Engine;
use crate::times::parse_ms;
use crate::types::{VdiInterval, VdiIntervals, WantedIntervals};
use crate::vdi::Snapshot;

/// Lengths of an interval that people think in, in seconds.
const LENGTHS: [u64; 14] =
    [1, 2, 5, 15, 30, 60, 300, 900, 1800, 3600, 3 * 3600, 12 * 3600, 86_400, 7 * 86_400];

/// The one beyond them.
const LONGEST: u64 = 30 * 86_400;

/// Snapshots that are looked at between two breaths of the thread.
const SNAPSHOTS_PER_TURN: usize = 4096;

/// Most intervals of an answer.
const INTERVALS_MAX: usize = 1000;

/// Most snapshots that an answer names beside the last of each interval.
const NAMES_MAX: usize = 1000;

const SECOND_NS: u64 = 1_000_000_000;

impl Engine {
    /// Sums up what happened to a VDI, the latest first to be answered; only what is durable.
    pub(crate) async fn intervals(
        self: &Rc<Self>,
        name: &str,
        wanted: &WantedIntervals,
    ) -> Result<VdiIntervals, Error> {
        let given_s = wanted.every.as_deref().map(parse_every).transpose()?;
        let vdi = self.find(name).await?;
        let every_s = given_s.unwrap_or_else(|| {
            let snapshots = vdi.snapshots.borrow();
            let mut ends = snapshots.iter();
            let first_ns = ends.next().map_or(0, |first| first.wall_ns);
            let last_ns = ends.next_back().map_or(first_ns, |last| last.wall_ns);
            fitting(last_ns.saturating_sub(first_ns) / SECOND_NS, wanted.max)
        });
        let mut sums = Sums::new(every_s, wanted.max.clamp(1, INTERVALS_MAX));
        let mut before = wanted.before;
        loop {
            let mut seen = 0;
            {
                let snapshots = vdi.snapshots.borrow();
                let durable = snapshots.before(before).skip_while(|it| !self.is_durable(it));
                for snapshot in durable.take(SNAPSHOTS_PER_TURN) {
                    sums.add(snapshot);
                    before = Some(snapshot.number);
                    seen += 1;
                }
            }
            if seen < SNAPSHOTS_PER_TURN {
                return Ok(sums.answer());
            }
            self.runtime.yield_now().await;
        }
    }
}

/// An answer that grows from the newest snapshot to the oldest.
struct Sums {
    every_s: u64,
    max: usize,
    /// The newest first, as what they name.
    intervals: Vec<VdiInterval>,
    named: usize,
    /// Begin of the interval that was met last.
    from_ns: Option<u64>,
    /// The snapshot that was counted last.
    counted: Option<SnapshotNumber>,
    is_full: bool,
    earlier: u64,
}

impl Sums {
    fn new(every_s: u64, max: usize) -> Self {
        let (intervals, from_ns, counted) = (Vec::new(), None, None);
        Self { every_s, max, intervals, named: 0, from_ns, counted, is_full: false, earlier: 0 }
    }

    fn add(&mut self, snapshot: &Snapshot) {
        let second = snapshot.wall_ns / SECOND_NS;
        let from_ns = (second - second.checked_rem(self.every_s).unwrap_or(0)) * SECOND_NS;
        let is_new = self.from_ns.replace(from_ns) != Some(from_ns);
        let no_room = self.named >= NAMES_MAX || (is_new && self.intervals.len() == self.max);
        if self.is_full || no_room {
            self.is_full = true;
            self.earlier += u64::from(is_new);
            return;
        }
        self.counted = Some(snapshot.number);
        let name = || match snapshot.label.as_str() {
            "" => snapshot.number.to_string(),
            label => label.to_owned(),
        };
        if is_new {
            let empty = VdiInterval { from_ns, last: name(), ..VdiInterval::default() };
            self.intervals.push(empty);
        }
        let Some(interval) = self.intervals.last_mut() else { return };
        if snapshot.hold.get().is_some() {
            interval.held.push(name());
            self.named += 1;
        }
        match snapshot.changed_bytes() {
            Some(changed_bytes) => {
                interval.moments += 1;
                interval.changed_bytes = interval.changed_bytes.saturating_add(changed_bytes);
            }
            None => {
                interval.snapshots.push(name());
                self.named += 1;
            }
        }
    }

    fn answer(mut self) -> VdiIntervals {
        self.intervals.reverse();
        for interval in &mut self.intervals {
            interval.snapshots.reverse();
            interval.held.reverse();
        }
        let next = self.counted.filter(|_| self.is_full);
        let (every_s, intervals, earlier) = (self.every_s, self.intervals, self.earlier);
        VdiIntervals { every_s, intervals, earlier, next }
    }
}

/// The shortest interval of which `max` show everything, wherever the first begins.
fn fitting(seconds: u64, max: usize) -> u64 {
    let whole = u64::try_from(max.saturating_sub(1).max(1)).unwrap_or(u64::MAX);
    LENGTHS.into_iter().find(|&length| length > seconds / whole).unwrap_or(LONGEST)
}

/// The length of an interval, in seconds.
fn parse_every(text: &str) -> Result<u64, Error> {
    let seconds = parse_ms(text).map(|ms| ms / 1000).filter(|&seconds| seconds > 0);
    seconds.ok_or_else(|| {
        let message = format!(
            "'{text}' is no interval: give a length of time of 1s or more, such as `15m`, `24h` or \
             `1 day`"
        );
        Error::refused(ErrorKind::Invalid, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_fit() {
        for (seconds, max, length) in
            [(0, 41, 1), (539, 11, 60), (2399, 41, 60), (2400, 41, 300), (1 << 40, 2, LONGEST)]
        {
            assert_eq!(fitting(seconds, max), length, "{seconds} {max}");
        }
    }

    #[test]
    fn an_interval_is_a_length_of_time() {
        for (text, seconds) in
            [("5m", 300), ("24h", 86_400), ("1 day", 86_400), ("1mo", 30 * 86_400), ("1500ms", 1)]
        {
            assert_eq!(parse_every(text).unwrap(), seconds, "{text}");
        }
        for nonsense in ["", "0s", "999ms", "-1h", "5", "5m ago", "often"] {
            assert_eq!(parse_every(nonsense).unwrap_err().kind(), ErrorKind::Invalid, "{nonsense}");
        }
    }
}
