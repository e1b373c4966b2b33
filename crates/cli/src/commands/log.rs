//! What happened to a disk with a history, and when.

use api::{Error, Interval};

use super::Context;
use crate::output::{self, Column, bytes, time};

/// Longest bar.
const BAR_CHARS: u64 = 24;

/// Shortest one that tells anything: a terminal that has no room for it does without.
const BAR_CHARS_MIN: u64 = 8;

/// How many snapshots of an interval are named; --json has all.
const NAMED_MAX: usize = 4;

pub(super) async fn run(
    context: &Context,
    name: &str,
    every: Option<&str>,
    rows: usize,
) -> Result<(), Error> {
    let history = context.client.vdi(name).await?.history;
    let (list, omitted) = latest(context, name, every, rows).await?;
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
    output::print(&draw(&list, omitted, output::width()))
}

/// The latest intervals, at most `rows`, and how many there are before.
async fn latest(
    context: &Context,
    name: &str,
    every: Option<&str>,
    rows: usize,
) -> Result<(Vec<Interval>, u64), Error> {
    // With one more the first that is shown is whole: an answer may end within its first.
    let wanted = rows.saturating_add(1);
    let mut page = context.client.intervals(name, every, wanted, None).await?;
    let every = format!("{}s", page.every_seconds);
    let mut list = page.intervals;
    while list.len() < wanted
        && let Some(before) = page.next
    {
        let missing = wanted - list.len() + 1;
        page = context.client.intervals(name, Some(&every), missing, Some(before)).await?;
        list = joined(page.intervals, list);
    }
    let cut = list.len().saturating_sub(rows);
    let shown = list.split_off(cut);
    Ok((shown, page.earlier.saturating_add(u64::try_from(cut).unwrap_or(u64::MAX))))
}

/// Two lists as one: the interval that one ends with may be the one that the other begins with.
fn joined(mut earlier: Vec<Interval>, mut later: Vec<Interval>) -> Vec<Interval> {
    if let (Some(one), Some(other)) = (earlier.last_mut(), later.first_mut())
        && one.from == other.from
    {
        one.moments = one.moments.saturating_add(other.moments);
        one.changed_bytes = one.changed_bytes.saturating_add(other.changed_bytes);
        one.last = std::mem::take(&mut other.last);
        one.snapshots.append(&mut other.snapshots);
        one.held.append(&mut other.held);
        later.remove(0);
    }
    earlier.append(&mut later);
    earlier
}

/// A table for a terminal of this width.
fn draw(list: &[Interval], omitted: u64, width: Option<u16>) -> String {
    let most = list.iter().map(|row| row.changed_bytes).max().unwrap_or(0);
    let named: Vec<String> = list.iter().map(|row| marked(row).join(" ")).collect();
    let mut columns = vec![
        Column::Left("FROM"),
        Column::Right("MOMENTS"),
        Column::Right("CHANGED"),
        Column::Left("AT ITS END"),
        Column::Left("SNAPSHOTS"),
    ];
    let row = |(row, named): (&Interval, String)| {
        let (moments, changed) = (row.moments.to_string(), bytes(row.changed_bytes));
        vec![time(row.from), moments, changed, row.last.clone(), named]
    };
    let mut rows: Vec<Vec<String>> = list.iter().zip(named).map(row).collect();
    if let Some(longest) = room_for_bars(&rows, width) {
        columns.insert(3, Column::Left(""));
        for (cells, row) in rows.iter_mut().zip(list) {
            cells.insert(3, bar(row.changed_bytes, most, longest));
        }
    }
    let table = output::layout(&columns, rows, width);
    match omitted {
        0 => table,
        _ => format!("{table}\n({omitted} earlier rows are not shown: --rows COUNT)"),
    }
}

/// Snapshots, and moments that are held.
fn marked(row: &Interval) -> Vec<String> {
    let held = row.held.iter().map(|handle| format!("{handle} (held)"));
    let others = row.snapshots.iter().filter(|handle| !row.held.contains(handle)).cloned();
    let mut marked: Vec<String> = others.chain(held).collect();
    let more = marked.len().saturating_sub(NAMED_MAX);
    if more > 0 {
        marked.truncate(NAMED_MAX);
        marked.push(format!("and {more} more"));
    }
    marked
}

/// How long the longest bar is to be beside what else is in the rows; `None` for no bars.
fn room_for_bars(rows: &[Vec<String>], width: Option<u16>) -> Option<u64> {
    /// Snapshots are wrapped first.
    const SNAPSHOTS_WIDTH: usize = 24;
    let Some(width) = width else { return Some(BAR_CHARS) };
    let longest = |(column, least): (usize, usize)| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let longest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0).max(least);
        let longest = if column == 4 { longest.min(SNAPSHOTS_WIDTH) } else { longest };
        longest + 2
    };
    // Columns, and widths of what stands above them.
    let others: usize = [(0, 4), (1, 7), (2, 7), (3, 10), (4, 9)].into_iter().map(longest).sum();
    let room = u64::from(width).saturating_sub(u64::try_from(others + 2).unwrap_or(u64::MAX));
    (room >= BAR_CHARS_MIN).then_some(room.min(BAR_CHARS))
}

/// Twice as much is one step more: beside a discarded disk, a file that was written still shows.
fn bar(part: u64, most: u64, longest: u64) -> String {
    let steps = |bytes: u64| u64::from((bytes / 4096 + 1).ilog2());
    let chars = (steps(part) * longest).div_ceil(steps(most).max(1));
    "#".repeat(usize::try_from(chars).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    fn interval(second: i64, changed_bytes: u64, snapshots: &[&str], held: &[&str]) -> Interval {
        let handles = |handles: &[&str]| handles.iter().map(|&it| it.to_owned()).collect();
        Interval {
            from: Timestamp::from_second(second).unwrap(),
            moments: 2,
            changed_bytes,
            last: "web01@12345".to_owned(),
            snapshots: handles(snapshots),
            held: handles(held),
        }
    }

    #[test]
    fn tables_fit_the_terminal() {
        let rows = [
            interval(60, 12_288, &["web01@3"], &["web01@1"]),
            interval(600, 1 << 20, &["web01@a", "web01@b", "web01@c", "web01@d", "web01@e"], &[]),
        ];
        let text = draw(&rows, 0, None);
        let bars: Vec<usize> = text.lines().map(|line| line.matches('#').count()).collect();
        assert_eq!(bars, [0, 6, 24], "{text}");
        assert!(text.contains("web01@3 web01@1 (held)"), "{text}");
        assert!(text.contains("web01@d and 1 more"), "{text}");
        for width in 45..140 {
            let text = draw(&rows, 7, Some(width));
            let fits = |line: &str| line.chars().count() <= usize::from(width);
            assert!(text.lines().all(fits), "{width}\n{text}");
            let bar_lines = text.lines().filter(|line| line.contains('#')).count();
            assert!([0, 2].contains(&bar_lines), "bars are not wrapped: {width}\n{text}");
            assert!(text.contains("1970-01-01T00:01:00Z"), "{width}\n{text}");
            if width >= 72 {
                assert!(text.matches("web01@12345").count() == 2, "{width}\n{text}");
            }
        }
        assert!(draw(&rows, 0, Some(100)).contains('#'));
    }

    #[test]
    fn an_interval_that_was_cut_is_one() {
        let list = joined(
            vec![interval(60, 1, &["a@1"], &[]), interval(120, 2, &["a@2"], &["a@2"])],
            vec![interval(120, 4, &["a@3"], &["a@3"]), interval(180, 8, &[], &[])],
        );
        let changed: Vec<u64> = list.iter().map(|row| row.changed_bytes).collect();
        assert_eq!(changed, [1, 6, 8]);
        assert_eq!((list[1].moments, list[1].snapshots.join(" ")), (4, "a@2 a@3".to_owned()));
        assert_eq!(list[1].held, ["a@2", "a@3"]);
        let apart = joined(vec![interval(60, 1, &[], &[])], vec![interval(61, 1, &[], &[])]);
        assert_eq!(apart.len(), 2);
    }
}
