//! `parallax scrub`.

use std::time::Duration;

use api::{BeginScrub, Error, Kind, ScrubEnd, ScrubReport, ScrubStatus};
use indicatif::ProgressBar;

use super::{Context, progress};
use crate::output::{bytes, count, time};

/// How often the daemon is asked how far it is.
const LOOK_PERIOD: Duration = Duration::from_millis(200);

/// Runs a pass, or joins the one that is under way, and waits for its end.
pub(super) async fn run(context: &Context, rate_bytes: Option<u64>) -> Result<(), Error> {
    let begun = context.client.begin_scrub(BeginScrub { rate_bytes }).await?;
    let bar = progress::bar("scrub", begun.total_bytes);
    let report = ended(context, begun.pass, &bar).await;
    bar.finish_and_clear();
    let report = report?;
    context.print(&report, &described(&report))?;
    judge(&report)
}

pub(super) async fn status(context: &Context) -> Result<(), Error> {
    let status = context.client.scrub_status().await?;
    context.print(&status, &stands(&status))
}

pub(super) async fn stop(context: &Context) -> Result<(), Error> {
    let stopped = context.client.stop_scrub().await?;
    let bar = progress::bar("stop", 0);
    let report = ended(context, stopped.pass, &bar).await?;
    context.print(&report, &described(&report))
}

/// Waits for the end of a pass, and draws how far it is.
async fn ended(context: &Context, pass: u64, bar: &ProgressBar) -> Result<ScrubReport, Error> {
    loop {
        let status = context.client.scrub_status().await?;
        if let Some(last) = status.last.filter(|last| last.pass >= pass) {
            return Ok(last);
        }
        if status.pass < pass {
            let message = "the daemon was started anew, and the scrub with it ended";
            return Err(Error::new(Kind::Fenced, message));
        }
        bar.set_length(status.total_bytes);
        bar.set_position(status.done_bytes);
        if status.damaged_blocks > 0 {
            bar.set_message(format!("scrub: {}", damaged(status.damaged_blocks)));
        }
        tokio::time::sleep(LOOK_PERIOD).await;
    }
}

fn judge(report: &ScrubReport) -> Result<(), Error> {
    if report.damaged_blocks > 0 {
        let found = damaged(report.damaged_blocks);
        let hint = "bring the disks back from a snapshot or a backup, or write the blocks again";
        return Err(Error::new(Kind::Damaged, format!("scrub found {found}; {hint}")));
    }
    match (report.end, &report.why) {
        (ScrubEnd::Finished, _) => Ok(()),
        (ScrubEnd::Stopped, _) => Err(Error::new(Kind::Busy, "scrub was stopped by somebody")),
        (ScrubEnd::Failed, why) => {
            let why = why.as_deref().unwrap_or("see the log of the daemon");
            Err(Error::new(Kind::Io, format!("scrub could not go on: {why}")))
        }
    }
}

fn damaged(blocks: u64) -> String {
    count(blocks, "damaged block")
}

fn described(report: &ScrubReport) -> String {
    let mut lines: Vec<String> =
        report.damages.iter().map(|damage| format!("damage: {}", damage.message)).collect();
    if report.damages_omitted > 0 {
        lines.push(format!("damage: … and {} more places", report.damages_omitted));
    }
    lines.push(summed_up(report));
    lines.join("\n")
}

/// `read 12 GiB in 3m 20s: no damage found`
fn summed_up(report: &ScrubReport) -> String {
    let took = report.ended.duration_since(report.began);
    let took = Duration::from_secs(took.as_secs().try_into().unwrap_or(0));
    let found = match report.damaged_blocks {
        0 => "no damage found".to_owned(),
        blocks => damaged(blocks),
    };
    let end = match report.end {
        ScrubEnd::Finished => "",
        ScrubEnd::Stopped => "stopped: ",
        ScrubEnd::Failed => "failed: ",
    };
    format!("{end}read {} in {}: {found}", bytes(report.read_bytes), span(took))
}

fn stands(status: &ScrubStatus) -> String {
    let mut lines = vec![match status.running {
        true => running(status),
        false => "idle".to_owned(),
    }];
    lines.push(match &status.last {
        None => "none has ended since the daemon opened the store".to_owned(),
        Some(last) => format!("the last one ended {}: {}", time(last.ended), summed_up(last)),
    });
    if let Some(next) = status.next.filter(|_| !status.running) {
        lines.push(format!("the next one begins {}", time(next)));
    }
    lines.join("\n")
}

fn running(status: &ScrubStatus) -> String {
    let (done, total) = (status.done_bytes, status.total_bytes);
    let percent = (done.saturating_mul(100)).checked_div(total).unwrap_or(0);
    let limit = match status.rate_bytes {
        0 => "no limit".to_owned(),
        rate => format!("limit {}/s", bytes(rate)),
    };
    let rate = status.read_bytes.saturating_mul(1000).checked_div(status.elapsed_ms).unwrap_or(0);
    let left = status.elapsed_ms.saturating_mul(total.saturating_sub(done)).checked_div(done);
    let left = match left {
        Some(ms) if status.elapsed_ms >= 1000 => {
            format!(", {} to go", span(Duration::from_secs(ms / 1000)))
        }
        _ => String::new(),
    };
    let damage = match status.damaged_blocks {
        0 => String::new(),
        blocks => format!("; {}", damaged(blocks)),
    };
    format!(
        "running: {} of {} ({percent}%), {}/s ({limit}){left}{damage}",
        bytes(done),
        bytes(total),
        bytes(rate)
    )
}

/// `2d 3h`, `5m 10s`, `7s`.
fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        86_400.. => format!("{}d {}h", seconds / 86_400, seconds % 86_400 / 3600),
        3600.. => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
        60.. => format!("{}m {}s", seconds / 60, seconds % 60),
        _ => format!("{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrub_under_way_tells_how_long_it_still_takes() {
        let status = ScrubStatus {
            pass: 1,
            running: true,
            rate_bytes: 64 << 20,
            elapsed_ms: 60_000,
            done_bytes: 1 << 30,
            total_bytes: 4 << 30,
            read_bytes: 1 << 30,
            ..ScrubStatus::default()
        };
        let text = stands(&status);
        let first = text.lines().next().unwrap();
        assert_eq!(first, "running: 1 GiB of 4 GiB (25%), 17 MiB/s (limit 64 MiB/s), 3m 0s to go");
    }

    #[test]
    fn spans_are_short() {
        for (seconds, text) in [(7, "7s"), (310, "5m 10s"), (7260, "2h 1m"), (190_000, "2d 4h")] {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
    }
}
