//! `parallax check`.

use std::time::Duration;

use api::{BeginCheck, CheckReport, Error, Finding, Kind};
use indicatif::ProgressBar;

use super::{Context, progress};
use crate::args::Check;
use crate::output::{self, count};

/// How often the daemon is asked how far it is.
const LOOK_PERIOD: Duration = Duration::from_millis(200);

/// Has the daemon check what it serves.
pub(super) async fn online(context: &Context, check: &Check) -> Result<(), Error> {
    let bar = progress::bar("check", 0);
    // Its own number is what tells it from others that check at the same time.
    let token = std::process::id().into();
    let request = BeginCheck {
        read_data: !check.quick,
        rate_bytes: None,
        token,
        ledgers: check.ledger.clone(),
    };
    let report = tokio::select! {
        report = context.client.check(request) => report,
        never = watch(context, token, &bar) => match never {},
    };
    bar.finish_and_clear();
    let report = report?;
    context.print(&report, &describe(&report, true))?;
    if report.clean {
        return Ok(());
    }
    let errors = report.errors_omitted.saturating_add(as_u64(report.errors.len()));
    let hint = "bring the disks back from a snapshot or a backup, or write the damaged blocks again; what \
                is not of disks, stop the daemon and `parallax check STORE --repair`";
    Err(Error::new(Kind::Damaged, format!("the store has {}; {hint}", count(errors, "error"))))
}

async fn watch(context: &Context, token: u64, bar: &ProgressBar) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(LOOK_PERIOD).await;
        // Whoever checks says what is wrong.
        let Ok(at) = context.client.check_status(token).await else { continue };
        bar.set_message(format!("check {}", at.stage));
        let (done, total) = match (at.stage.as_str(), context.client.scrub_status().await) {
            ("data", Ok(scrub)) => (scrub.done_bytes, scrub.total_bytes),
            _ => (at.done, at.total),
        };
        bar.set_length(total);
        bar.set_position(done);
    }
}

pub(super) fn run(check: &Check, json: bool) -> Result<(), Error> {
    let Some(path) = &check.path else {
        return Err(Error::new(
            Kind::Invalid,
            "name the store, or check the daemon's with --online",
        ));
    };
    let options = daemon::offline::Check {
        repair: check.repair,
        read_data: !check.quick,
        buffered: check.buffered,
        ledgers: check.ledger.clone(),
    };
    let bar = progress::bar("check", 0);
    let drawn = bar.clone();
    let report = daemon::offline::check(path, &options, move |at| {
        drawn.set_message(format!("check {}", at.stage));
        drawn.set_length(at.total);
        drawn.set_position(at.done);
    });
    bar.finish_and_clear();
    let report = report?;
    if json {
        output::print_json(&report)?;
    } else {
        output::print(&describe(&report, false))?;
    }
    if report.clean {
        return Ok(());
    }
    let errors = report.errors_omitted.saturating_add(as_u64(report.errors.len()));
    let hint = match check.repair {
        false => "--repair repairs what can be repaired",
        true => {
            "what remains cannot be repaired: bring the disks back from a snapshot or a backup, or \
             write the damaged blocks again"
        }
    };
    let path = path.display();
    Err(Error::new(Kind::Damaged, format!("{path} has {}; {hint}", count(errors, "error"))))
}

fn describe(report: &CheckReport, is_online: bool) -> String {
    let counts = &report.counts;
    let mut lines = vec![format!(
        "{}, {}; {} of metadata, {} of data",
        count(counts.vdis, "disk"),
        count(counts.snapshots, "snapshot"),
        count(counts.metadata_blocks, "block"),
        count(counts.data_blocks, "block"),
    )];
    if counts.data_blocks_verified > 0 && is_online {
        let verified = count(counts.data_blocks_verified, "block");
        lines.push(format!("scrub verified {verified}, of data and metadata"));
    } else if counts.data_blocks_verified > 0 {
        // More than disks and snapshots have: recovery relies on the others.
        lines.push(format!(
            "verified {} of data, with those that only the log or the older host slot names",
            count(counts.data_blocks_verified, "block"),
        ));
    }
    if !report.closed_cleanly && !is_online {
        let records = count(counts.log_records, "log record");
        lines.push(format!("not closed cleanly: the next start replays {records}"));
    }
    let unusual = [
        (counts.leaked_blocks, "leaked block", "garbage collection frees them"),
        (counts.bad_blocks, "bad block", "retired after failed writes"),
        (counts.lost_entries, "lost block", "contents were lost to damage found earlier"),
    ];
    for (number, noun, meaning) in unusual {
        if number > 0 {
            lines.push(format!("{} ({meaning})", count(number, noun)));
        }
    }
    lines.extend(report.repairs.iter().map(|repair| format!("repaired: {repair}")));
    findings("warning", &report.warnings, report.warnings_omitted, &mut lines);
    findings("error", &report.errors, report.errors_omitted, &mut lines);
    if report.clean {
        lines.push("no damage found".to_owned());
    }
    lines.join("\n")
}

fn findings(word: &str, list: &[Finding], omitted: u64, lines: &mut Vec<String>) {
    lines.extend(list.iter().map(|finding| format!("{word}: {}", finding.message)));
    if omitted > 0 {
        lines.push(format!("{word}: … and {omitted} more"));
    }
}

fn as_u64(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
