//! How a command ends: its exit code, and what is said about a failure.

use std::process::ExitCode;

use api::{Error, Kind};

/// The exit code for an error; `args::EXIT_CODES` is the table for people.
pub(crate) const fn code(kind: Kind) -> u8 {
    match kind {
        Kind::Invalid | Kind::Exists | Kind::Unsupported | Kind::ReadOnly => USAGE,
        Kind::NotFound => 2,
        Kind::Busy => 3,
        Kind::Damaged => 4,
        Kind::NoSpace => 5,
        Kind::Io | Kind::Fenced | Kind::Unreachable => 6,
    }
}

/// The exit code for a command line that does not make sense.
pub(crate) const USAGE: u8 = 1;

/// Says on stderr what went wrong, and gives the exit code for it.
pub(crate) fn report(error: &Error, json: bool) -> ExitCode {
    let text = if json {
        serde_json::json!({ "error": error }).to_string()
    } else {
        format!("parallax: {error}")
    };
    crate::output::complain(&text);
    ExitCode::from(code(error.kind))
}
