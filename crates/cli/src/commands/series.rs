//! Series of snapshots: `snapshot --every`, and `rm NAME@17..1016`.

use std::time::Duration;

use api::{Error, Kind, Removed, TakeSeries};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Context, progress};
use crate::output::count;

/// How much of a series is asked for at a time: so long it goes on when somebody interrupts.
const PIECE: Duration = Duration::from_millis(250);

/// Snapshots that are being deleted at a time: they become durable together.
const DELETED_AT_ONCE: usize = 16;

/// What `snapshot --every --json` prints.
#[derive(Serialize)]
struct Taken {
    handle: String,
    first: u64,
    last: u64,
    count: u64,
    seconds: f64,
}

/// Takes snapshots for so long. What was taken before something fails stays.
pub(super) async fn take(
    context: &Context,
    name: &str,
    every: Duration,
    length: Duration,
) -> Result<(), Error> {
    let wanted = ratio(length, every).max(1);
    let piece = ratio(PIECE, every).max(1);
    let bar = progress::bar(&format!("snapshots of {name}"), wanted);
    let start = Instant::now();
    let (mut taken, mut range) = (0, None);
    while taken < wanted {
        let ahead = Duration::from_secs_f64(every.as_secs_f64() * taken as f64);
        tokio::time::sleep_until(start + ahead).await;
        let count = u32::try_from(piece.min(wanted - taken)).unwrap_or(u32::MAX);
        let every_us = u64::try_from(every.as_micros()).unwrap_or(u64::MAX);
        let series = context.client.take_series(name, TakeSeries { every_us, count }).await;
        let series = series.map_err(|error| after(name, range, error))?;
        taken += series.count;
        range = Some((range.map_or(series.first, |(first, _)| first), series.last));
        bar.set_position(taken);
    }
    bar.finish_and_clear();
    let Some((first, last)) = range else { return Ok(()) };
    let handle = handle(name, (first, last));
    let seconds = start.elapsed().as_secs_f64();
    let shown = Taken { handle: handle.clone(), first, last, count: taken, seconds };
    // Nothing but the handle: scripts take it as it is.
    context.print(&shown, &handle)
}

/// How often `part` fits into `whole`.
fn ratio(whole: Duration, part: Duration) -> u64 {
    u64::try_from(whole.as_nanos() / part.as_nanos().max(1)).unwrap_or(u64::MAX)
}

/// Says what had been taken before something failed.
fn after(name: &str, range: Option<(u64, u64)>, error: Error) -> Error {
    let Some(range) = range else { return error };
    let message = format!("{} were taken; then: {}", handle(name, range), error.message);
    Error::new(error.kind, message)
}

fn handle(name: &str, (first, last): (u64, u64)) -> String {
    if first == last { format!("{name}@{first}") } else { format!("{name}@{first}..{last}") }
}

/// First and last number of a series that is written as `17..1016`.
pub(super) fn parse(text: &str) -> Option<(u64, u64)> {
    let (first, last) = text.split_once("..")?;
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok());
    let range = (number(first)??, number(last)??);
    (range.0 <= range.1).then_some(range)
}

/// Deletes the snapshots of a series that are still there: what has a label, or is held, stays.
pub(super) async fn remove(
    context: &Context,
    name: &str,
    (first, last): (u64, u64),
) -> Result<(), Error> {
    let of_series = context.client.asked_snapshots_between(name, first, last).await?;
    let of_series: Vec<_> = of_series.into_iter().filter(|it| it.label.is_none()).collect();
    let (held, free): (Vec<_>, Vec<_>) = of_series.into_iter().partition(|it| it.hold.is_some());
    if held.is_empty() && free.is_empty() {
        let message = format!(
            "{name} has no snapshot without a label that is numbered {first} to {last}: parallax snapshots {name}"
        );
        return Err(Error::new(Kind::NotFound, message));
    }
    let total = free.len() as u64;
    let bar = progress::bar("deleting snapshots", total);
    let mut under_way = JoinSet::new();
    let (mut left, mut removed) = (free.into_iter(), 0);
    loop {
        while under_way.len() < DELETED_AT_ONCE {
            let Some(snapshot) = left.next() else { break };
            let (client, name) = (context.client.clone(), name.to_owned());
            under_way.spawn(async move {
                match client.remove_snapshot(&name, &snapshot.number.to_string()).await {
                    // Somebody else was quicker.
                    Err(error) if error.kind == Kind::NotFound => Ok(0),
                    answer => answer.map(|_| 1),
                }
            });
        }
        let Some(done) = under_way.join_next().await else { break };
        removed += done.map_err(|error| Error::new(Kind::Io, error.to_string()))??;
        bar.set_position(removed);
    }
    bar.finish_and_clear();
    let handle = handle(name, (first, last));
    let mut text = format!("deleted {} of {handle}", count(removed, "snapshot"));
    if !held.is_empty() {
        text.push_str(&format!("; held, and still there: {}", held.len()));
    }
    context.print(&Removed { removed: handle, snapshots: removed }, &text)
}
