//! Looks for damage, and repairs it.

use std::path::Path;

use api::Error;
use base::ErrorKind;
use vdi::check::NotedHead;

use crate::{convert, open};

/// How to check a store.
#[derive(Clone, Debug, Default)]
pub struct Check {
    /// Repair what can be repaired.
    pub repair: bool,
    /// Read and verify data too, not only metadata.
    pub read_data: bool,
    /// Go through the page cache, for file systems without O_DIRECT.
    pub buffered: bool,
    /// As [`api::BeginCheck::ledgers`].
    pub ledgers: Vec<String>,
}

/// How far a check is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckProgress {
    /// What it is at, in a word or two.
    pub stage: &'static str,
    /// So much of it is done; 0 where nothing is counted.
    pub done: u64,
    /// Of so much, as far as is known.
    pub total: u64,
}

/// Checks the store on `path`, and repairs what can be repaired if told so; repairs are durable on
/// return. Blocks.
///
/// # Errors
/// `Busy` if a daemon has it open; `NotFound` or `Damaged` if there is no superblock to start
/// from; `Invalid` for a ledger that is none. Damage elsewhere is what the report is about, and no error.
pub fn check(
    path: &Path,
    check: &Check,
    progress: impl Fn(CheckProgress) + 'static,
) -> Result<api::CheckReport, Error> {
    let noted: Result<Vec<NotedHead>, vdi::Error> =
        check.ledgers.iter().map(|text| NotedHead::parse(text)).collect();
    let noted = noted.map_err(|error| Error::new(error.kind(), error.to_string()))?;
    let reactor = open::reactor()?;
    let access = if check.repair { open::Access::Exclusive } else { open::Access::ReadOnly };
    let device_options = open::DeviceOptions { access, buffered: check.buffered };
    let device = open::device(reactor.io(), path, device_options)?;
    let options = vdi::check::CheckOptions {
        repair: check.repair,
        read_data: check.read_data,
        boot_id: open::boot_id()?,
        nonce: open::nonce()?,
    };
    let runtime = reactor.runtime().clone();
    let tell = move |at: vdi::check::CheckProgress| {
        progress(CheckProgress {
            stage: convert::check_stage(at.stage),
            done: at.done,
            total: at.total,
        });
    };
    let outcome = reactor
        .run(async move { vdi::check::check(&device, &runtime, options, &noted, &tell).await });
    reactor.runtime().kill();
    let report = outcome
        .map_err(|e| Error::system("go on with the I/O engine", &e))?
        .map_err(|error| explain(path, &error))?;
    Ok(convert::check_report(report))
}

/// What cannot be checked has nothing left that leads to the rest.
fn explain(path: &Path, error: &vdi::Error) -> Error {
    match error.kind() {
        ErrorKind::Corrupt => Error::new(
            error.kind(),
            format!(
                "nothing is left on {} that leads to its contents: {error}; only a copy of it helps",
                path.display()
            ),
        ),
        _ => open::explain(path, error),
    }
}
