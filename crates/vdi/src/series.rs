//! A series of snapshots of a VDI: one each so many nanoseconds, durable all together.
//!
//! A snapshot is one record in the log, and a flush. Who asks for thousands in a second pays for each request, and
//! for flushes that its guest did not ask for; a series is asked for and flushed once.

use std::rc::Rc;
use std::time::Duration;

use base::{ErrorKind, Lsn, SnapshotNumber};
use blockstore::log::Log;

use crate::Error;
use crate::engine::Engine;
use crate::types::{Series, WantedSeries};
use crate::vdi::Vdi;

/// Longest time from the first snapshot of a series to the last: a series cannot be stopped.
const SPAN_MAX: Duration = Duration::from_secs(1);

/// Most snapshots of a series.
const COUNT_MAX: u32 = 25_000;

/// Snapshots that are late and taken in one round of the reactor: what one takes is little beside a round.
const LATE_PER_ROUND: u32 = 8;

impl Engine {
    /// Takes a series of snapshots. All of it is durable on return, and when it was cut short, too.
    pub(crate) async fn series(
        self: &Rc<Self>,
        name: &str,
        wanted: WantedSeries,
    ) -> Result<Series, Error> {
        let _request = self.begin_change()?;
        refuse_unbounded(wanted)?;
        let vdi = self.find(name).await?;
        let start = self.runtime.now();
        let (first, first_lsn) = self.next_of_series(name, &vdi).await?;
        let mut lsn = first_lsn;
        let mut series = Series { first, last: first, count: 1 };
        let mut cut_short = None;
        while series.count < wanted.count && cut_short.is_none() {
            let due = start.after(wanted.every * series.count);
            if self.runtime.now() < due {
                self.runtime.sleep_until(due).await;
            } else if series.count.is_multiple_of(LATE_PER_ROUND) {
                // Those that are late follow at once, but guests go on in between.
                self.runtime.next_round().await;
            }
            match self.next_of_series(name, &vdi).await {
                Ok(next) => {
                    (series.last, lsn) = next;
                    series.count += 1;
                }
                Err(error) => cut_short = Some(error),
            }
        }
        let first_only = base::mutant::active("series_is_flushed_up_to_its_first");
        self.make_durable(if first_only { first_lsn } else { lsn }).await?;
        self.stats.borrow_mut().snapshots += u64::from(series.count);
        let Some(error) = cut_short else { return Ok(series) };
        let Series { first, last, count } = series;
        let message = format!(
            "{count} of {} snapshots were taken, {name}@{first} to {name}@{last}: {error}",
            wanted.count
        );
        Err(Error::refused(error.kind(), message))
    }

    async fn next_of_series(
        self: &Rc<Self>,
        name: &str,
        vdi: &Vdi,
    ) -> Result<(SnapshotNumber, Lsn), Error> {
        // A store that is being closed takes no more of it.
        let _request = self.begin_change()?;
        let (number, appended) = self.take_snapshot(name, vdi, "", Log::append_unhurried).await?;
        let lsn = appended.0;
        // Each is finished by itself: the next may wait for a checkpoint, which waits for all records before it.
        let engine = Rc::clone(self);
        drop(self.runtime.spawn(async move { engine.complete_record(appended).await }));
        Ok((number, lsn))
    }
}

fn refuse_unbounded(WantedSeries { every, count }: WantedSeries) -> Result<(), Error> {
    let span = every.checked_mul(count.saturating_sub(1));
    if (1..=COUNT_MAX).contains(&count) && span.is_some_and(|span| span <= SPAN_MAX) {
        return Ok(());
    }
    let message = format!("a series has 1 to {COUNT_MAX} snapshots, within {SPAN_MAX:?}");
    Err(Error::refused(ErrorKind::Invalid, message))
}
