//! Running fio and reading what it measured.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process::Run;

/// Where fio does its I/O.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// An NBD export.
    Nbd(String),
    /// A file, opened O_DIRECT and driven through io_uring.
    File(std::path::PathBuf),
}

/// What fio measured, over the reads or writes of a job.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    /// Operations per second.
    pub(crate) iops: f64,
    /// Bytes per second.
    pub(crate) bytes_per_second: f64,
    /// Milliseconds that 99 of 100 operations do not exceed, where it was measured.
    pub(crate) p99_milliseconds: Option<f64>,
}

/// A fio command for one job; `options` are words such as `--rw=randwrite --bs=4k`.
pub(crate) fn job(target: &Target, size_bytes: u64, options: &str, scratch: &Path) -> Run {
    let run = Run::new("fio").words("--name=job --thread --randrepeat=0 --group_reporting");
    let run = run.arg(format!("--size={size_bytes}")).arg(aux_path(scratch)).words(options);
    match target {
        Target::Nbd(uri) => run.arg("--ioengine=nbd").arg(format!("--uri={uri}")),
        Target::File(path) => run
            .words("--ioengine=io_uring --direct=1")
            .arg(format!("--filename={}", path.display())),
    }
}

/// Runs a job and returns the figures of its reads (or writes).
///
/// # Errors
/// If fio fails: an I/O error, or data that does not verify.
pub(crate) fn measure(run: Run, limit: Duration) -> Result<Figures> {
    let text = run.arg("--output-format=json").limit(limit).read()?;
    // fio may print warnings before the JSON.
    let start = text.find('{').context("fio printed no JSON")?;
    let report: Value = serde_json::from_str(text.get(start..).unwrap_or_default())?;
    figures(&report).context("fio's report lacks a job with I/O")
}

/// Where fio puts the state files of its verification.
fn aux_path(scratch: &Path) -> String {
    format!("--aux-path={}", scratch.display())
}

fn figures(report: &Value) -> Option<Figures> {
    let job = report.get("jobs")?.get(0)?;
    let count = |side: &Value| side.get("total_ios").and_then(Value::as_u64).unwrap_or(0);
    let side =
        ["read", "write"].iter().filter_map(|name| job.get(name)).max_by_key(|s| count(s))?;
    if count(side) == 0 {
        return None;
    }
    let p99 = || side.get("clat_ns")?.get("percentile")?.get("99.000000")?.as_f64();
    Some(Figures {
        iops: side.get("iops")?.as_f64()?,
        bytes_per_second: side.get("bw_bytes")?.as_f64()?,
        p99_milliseconds: p99().map(|nanoseconds| nanoseconds / 1e6),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_side_with_the_io_is_read() {
        let report = serde_json::json!({ "jobs": [ {
            "read": { "total_ios": 0, "iops": 0.0, "bw_bytes": 0 },
            "write": { "total_ios": 9, "iops": 4.5, "bw_bytes": 18432,
                "clat_ns": { "percentile": { "99.000000": 2_500_000 } } },
        } ] });
        let figures = figures(&report).unwrap();
        assert_eq!(figures.p99_milliseconds, Some(2.5));
        assert!((figures.iops - 4.5).abs() < f64::EPSILON);
        let idle = serde_json::json!({ "jobs": [ { "read": { "total_ios": 0 } } ] });
        assert!(super::figures(&idle).is_none());
    }
}
