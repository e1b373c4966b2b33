//! `parallax check`.

use api::{CheckReport, Error, Finding, Kind};

use super::progress;
use crate::args::Check;
use crate::output::{self, count};

pub(super) fn run(check: &Check, json: bool) -> Result<(), Error> {
    let options = daemon::offline::Check {
        repair: check.repair,
        read_data: !check.quick,
        buffered: check.buffered,
    };
    let bar = progress::bar("check", 0);
    let drawn = bar.clone();
    let report = daemon::offline::check(&check.path, options, move |at| {
        drawn.set_message(format!("check {}", at.stage));
        drawn.set_length(at.total);
        drawn.set_position(at.done);
    });
    bar.finish_and_clear();
    let report = report?;
    if json {
        output::print_json(&report)?;
    } else {
        output::print(&describe(&report))?;
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
    let path = check.path.display();
    Err(Error::new(Kind::Damaged, format!("{path} has {}; {hint}", count(errors, "error"))))
}

fn describe(report: &CheckReport) -> String {
    let counts = &report.counts;
    let mut lines = vec![format!(
        "{}, {}; {} of metadata, {} of data",
        count(counts.vdis, "disk"),
        count(counts.snapshots, "snapshot"),
        count(counts.metadata_blocks, "block"),
        count(counts.data_blocks, "block"),
    )];
    if counts.data_blocks_verified > 0 {
        // More than disks and snapshots have: recovery relies on the others.
        lines.push(format!(
            "verified {} of data, with those that only the log or the older host slot names",
            count(counts.data_blocks_verified, "block"),
        ));
    }
    if !report.closed_cleanly {
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
