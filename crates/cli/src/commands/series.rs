//! Series of snapshots: `snapshot --every`, and `rm NAME@17..1016`.

use std::time::Duration;

use api::{Error, Kind, Removed, Series, TakeSeries};
use indicatif::ProgressBar;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Context, progress};
use crate::output::count;

/// How much of a series is asked for at a time: so long it goes on when somebody interrupts.
const PIECE: Duration = Duration::from_millis(250);

/// Pieces that are under way: one begins at its time while the one before is being made durable.
const PIECES_UNDER_WAY: usize = 2;

/// Snapshots that are being deleted at a time: they become durable together.
const DELETED_AT_ONCE: usize = 16;

/// Numbers of the first and the last snapshot.
type Range = (u64, u64);

/// What `snapshot --every --json` prints.
#[derive(Serialize)]
struct Taken {
    handle: String,
    first: u64,
    last: u64,
    count: u64,
    seconds: f64,
}

/// Takes snapshots for so long, or until Ctrl-C. What was taken before something fails stays.
pub(super) async fn take(
    context: &Context,
    name: &str,
    every: Duration,
    length: Duration,
) -> Result<(), Error> {
    let wanted = fits(length, every);
    if wanted == 0 {
        let message =
            format!("--for {length:?} is shorter than --every {every:?}: nothing to take");
        return Err(Error::new(Kind::Invalid, message));
    }
    let start = Instant::now();
    let bar = progress::bar(&format!("snapshots of {name}"), wanted);
    let mut pieces = Pieces { taken: 0, range: None, under_way: JoinSet::new(), bar };
    let ended = tokio::select! {
        ended = pieces.take(context, name, every, wanted) => ended,
        _ = tokio::signal::ctrl_c() => Ok(()),
    };
    // What is under way is taken all the same.
    let ended = ended.and(tokio::select! {
        rest = pieces.end() => rest,
        _ = tokio::signal::ctrl_c() => Ok(()),
    });
    pieces.bar.finish_and_clear();
    if let Err(error) = ended {
        return Err(after(name, pieces.range, error));
    }
    let Some((first, last)) = pieces.range else { return Ok(()) };
    let handle = handle(name, (first, last));
    let seconds = start.elapsed().as_secs_f64();
    let shown = Taken { handle: handle.clone(), first, last, count: pieces.taken, seconds };
    // Nothing but the handle: scripts take it as it is.
    context.print(&shown, &handle)
}

/// A series is asked for in pieces.
struct Pieces {
    taken: u64,
    range: Option<Range>,
    under_way: JoinSet<Result<Series, Error>>,
    bar: ProgressBar,
}

impl Pieces {
    /// Asks for one after the other, each at its time.
    async fn take(
        &mut self,
        context: &Context,
        name: &str,
        every: Duration,
        wanted: u64,
    ) -> Result<(), Error> {
        let every_us = u64::try_from(every.as_micros()).unwrap_or(u64::MAX);
        let piece = u32::try_from(fits(PIECE, every).max(1)).unwrap_or(u32::MAX);
        let (mut next, mut left) = (Instant::now(), wanted);
        while left > 0 {
            tokio::time::sleep_until(next).await;
            while self.under_way.len() >= PIECES_UNDER_WAY {
                self.one().await?;
            }
            let count = piece.min(u32::try_from(left).unwrap_or(u32::MAX));
            let (client, name) = (context.client.clone(), name.to_owned());
            self.under_way.spawn(async move {
                client.take_series(&name, TakeSeries { every_us, count }).await
            });
            next += every * count;
            left -= u64::from(count);
        }
        Ok(())
    }

    /// Waits for those under way.
    async fn end(&mut self) -> Result<(), Error> {
        let mut ended = Ok(());
        while !self.under_way.is_empty() {
            ended = ended.and(self.one().await);
        }
        ended
    }

    async fn one(&mut self) -> Result<(), Error> {
        let Some(ended) = self.under_way.join_next().await else { return Ok(()) };
        let Series { first, last, count } =
            ended.map_err(|error| Error::new(Kind::Io, error.to_string()))??;
        self.taken += count;
        let (lowest, highest) = self.range.unwrap_or((first, last));
        self.range = Some((lowest.min(first), highest.max(last)));
        self.bar.set_position(self.taken);
        Ok(())
    }
}

/// How often `part` fits into `whole`.
fn fits(whole: Duration, part: Duration) -> u64 {
    u64::try_from(whole.as_nanos() / part.as_nanos().max(1)).unwrap_or(u64::MAX)
}

/// Says what had been taken before something failed.
fn after(name: &str, range: Option<Range>, error: Error) -> Error {
    let Some(range) = range else { return error };
    let message = format!("{} were taken; then: {}", handle(name, range), error.message);
    Error::new(error.kind, message)
}

fn handle(name: &str, (first, last): Range) -> String {
    if first == last { format!("{name}@{first}") } else { format!("{name}@{first}..{last}") }
}

/// First and last number of a series that is written as `17..1016`.
pub(super) fn parse(text: &str) -> Option<Range> {
    let (first, last) = text.split_once("..")?;
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok());
    let range = (number(first)??, number(last)??);
    (range.0 <= range.1).then_some(range)
}

/// Deletes the snapshots of a series that are still there: what has a label, or is held, stays. What cannot be
/// deleted keeps none of the others from it.
pub(super) async fn remove(context: &Context, name: &str, range: Range) -> Result<(), Error> {
    let handle = handle(name, range);
    let of_series = context.client.asked_snapshots_between(name, range.0, range.1).await?;
    let of_series: Vec<_> = of_series.into_iter().filter(|it| it.label.is_none()).collect();
    if of_series.is_empty() {
        let message = format!(
            "{name} has no snapshot without a label that is numbered {} to {}: parallax snapshots {name}",
            range.0, range.1
        );
        return Err(Error::new(Kind::NotFound, message));
    }
    let (held, free): (Vec<_>, Vec<_>) = of_series.into_iter().partition(|it| it.hold.is_some());
    let bar = progress::bar("deleting snapshots", free.len() as u64);
    let mut under_way = JoinSet::new();
    let (mut left, mut removed, mut refusals) = (free.into_iter(), 0, Vec::new());
    loop {
        while under_way.len() < DELETED_AT_ONCE {
            let Some(snapshot) = left.next() else { break };
            let (client, name) = (context.client.clone(), name.to_owned());
            under_way.spawn(async move { client.remove_listed_snapshot(&name, &snapshot).await });
        }
        let Some(done) = under_way.join_next().await else { break };
        match done.map_err(|error| Error::new(Kind::Io, error.to_string()))? {
            Ok(_) => removed += 1,
            Err(error) => refusals.push(error),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mut text = format!("deleted {} of {handle}", count(removed, "snapshot"));
    if !held.is_empty() {
        text.push_str(&format!("; held, and still there: {}", held.len()));
    }
    if let Some(first) = refusals.first() {
        let message = format!("{text}; not deleted: {}, the first as {first}", refusals.len());
        return Err(Error::new(first.kind, message));
    }
    context.print(&Removed { removed: handle, snapshots: removed }, &text)
}
