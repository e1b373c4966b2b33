//! What happened to a disk with a history, and when.

use std::time::Duration;

use api::{Error, Snapshot};
use jiff::Timestamp;
use serde::Serialize;

use super::Context;
use crate::output::{self, Column, bytes, time};

/// Lengths of an interval that people think in, in seconds.
const INTERVALS: [u64; 14] =
    [1, 2, 5, 15, 30, 60, 300, 900, 1800, 3600, 3 * 3600, 12 * 3600, 86_400, 7 * 86_400];

/// Longest bar.
const BAR_CHARS: u64 = 24;

/// What happened in an interval.
#[derive(Debug, PartialEq, Serialize)]
struct Row {
    /// When it begins.
    from: Timestamp,
    /// Moments that the disk's history kept.
    moments: u64,
    /// Bytes changed by the last of them, since the last of the interval before.
    changed_bytes: u64,
    /// The disk at the end of it.
    last: String,
    /// Snapshots that were asked for.
    snapshots: Vec<String>,
    /// What of all these is held.
    held: Vec<String>,
}

pub(super) async fn run(
    context: &Context,
    name: &str,
    every: Option<Duration>,
    rows: usize,
) -> Result<(), Error> {
    let history = context.client.vdi(name).await?.history;
    let snapshots = context.client.snapshots(name).await?;
    let every = every.map_or_else(|| fitting(&snapshots, rows), |every| every.as_secs().max(1));
    let mut list = group(snapshots, every);
    let omitted = list.len().saturating_sub(rows);
    let list = list.split_off(omitted);
    if context.json {
        return output::print_json(&list);
    }
    if list.is_empty() {
        return output::print(&match history.as_str() {
            "off" => {
                format!("{name} has no history; keep it with: parallax set {name} history=24h")
            }
            _ if rows == 0 => "no rows were asked for".to_owned(),
            _ => format!("nothing was written to {name} since its history is kept ({history})"),
        });
    }
    output::print(&draw(&list, omitted))
}

fn draw(list: &[Row], omitted: usize) -> String {
    let most = list.iter().map(|row| row.changed_bytes).max().unwrap_or(0);
    let columns = [
        Column::Left("FROM"),
        Column::Right("MOMENTS"),
        Column::Right("CHANGED"),
        Column::Left(""),
        Column::Left("AT ITS END"),
        Column::Left("SNAPSHOTS"),
    ];
    let row = |row: &Row| {
        vec![
            time(row.from),
            row.moments.to_string(),
            bytes(row.changed_bytes),
            bar(row.changed_bytes, most),
            row.last.clone(),
            marked(row).join(" "),
        ]
    };
    let table = output::table(&columns, list.iter().map(row).collect());
    match omitted {
        0 => table,
        _ => format!("{table}\n({omitted} earlier rows are not shown: --rows COUNT)"),
    }
}

/// Snapshots, and moments that are held.
fn marked(row: &Row) -> Vec<String> {
    let held = row.held.iter().map(|handle| format!("{handle} (held)"));
    let others = row.snapshots.iter().filter(|handle| !row.held.contains(handle)).cloned();
    others.chain(held).collect()
}

/// Twice as much is one step more: beside a discarded disk, a file that was written still shows.
fn bar(part: u64, most: u64) -> String {
    let steps = |bytes: u64| u64::from((bytes / 4096 + 1).ilog2());
    let chars = (steps(part) * BAR_CHARS).div_ceil(steps(most).max(1));
    "#".repeat(usize::try_from(chars).unwrap_or(0))
}

/// The shortest interval of which so many rows show everything.
fn fitting(snapshots: &[Snapshot], rows: usize) -> u64 {
    let (Some(first), Some(last)) = (snapshots.first(), snapshots.last()) else { return 1 };
    let seconds = last.created.as_second() - first.created.as_second();
    let wanted = u64::try_from(seconds).unwrap_or(0) / u64::try_from(rows.max(1)).unwrap_or(1);
    INTERVALS.into_iter().find(|&every| every > wanted).unwrap_or(30 * 86_400)
}

/// One row for each interval in which there is something.
fn group(snapshots: Vec<Snapshot>, every: u64) -> Vec<Row> {
    let every = i64::try_from(every).unwrap_or(i64::MAX);
    let mut rows: Vec<Row> = Vec::new();
    for snapshot in snapshots {
        let second = snapshot.created.as_second();
        let from = Timestamp::from_second(second - second.rem_euclid(every));
        let from = from.unwrap_or(snapshot.created);
        if rows.last().is_none_or(|row| row.from != from) {
            let last = String::new();
            rows.push(Row {
                from,
                moments: 0,
                changed_bytes: 0,
                last,
                snapshots: Vec::new(),
                held: Vec::new(),
            });
        }
        let Some(row) = rows.last_mut() else { continue };
        row.last.clone_from(&snapshot.handle);
        row.held.extend(snapshot.hold.as_ref().map(|_| snapshot.handle.clone()));
        match snapshot.changed_bytes {
            Some(changed_bytes) => {
                row.moments += 1;
                row.changed_bytes = row.changed_bytes.saturating_add(changed_bytes);
            }
            None => row.snapshots.push(snapshot.handle),
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(number: u64, second: i64, changed_bytes: Option<u64>) -> Snapshot {
        Snapshot {
            handle: format!("web01@{number}"),
            number,
            label: None,
            size_bytes: 1 << 30,
            created: Timestamp::from_second(second).unwrap(),
            uuid: String::new(),
            changed_bytes,
            hold: (number == 1).then_some(api::Held { until: None }),
        }
    }

    #[test]
    fn moments_are_summed_up_by_interval() {
        let snapshots = vec![
            snapshot(1, 61, Some(4096)),
            snapshot(2, 119, Some(8192)),
            snapshot(3, 119, None),
            snapshot(4, 600, Some(1 << 20)),
        ];
        assert_eq!(fitting(&snapshots, 10), 60);
        let rows = group(snapshots, 60);
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].moments, rows[0].changed_bytes), (2, 12_288));
        assert_eq!((rows[0].last.as_str(), rows[0].snapshots.len()), ("web01@3", 1));
        assert_eq!(rows[1].from, Timestamp::from_second(600).unwrap());
        let text = draw(&rows, 0);
        let bars: Vec<usize> = text.lines().map(|line| line.matches('#').count()).collect();
        assert_eq!(bars, [0, 6, 24], "{text}");
        assert!(text.contains("web01@3 web01@1 (held)"), "{text}");
    }
}
