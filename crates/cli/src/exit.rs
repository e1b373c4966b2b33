//! How a command ends: its exit code, and what is said about a failure.

use std::ffi::OsString;
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
        Kind::Stream => 7,
    }
}

/// The exit code for a command line that does not make sense.
pub(crate) const USAGE: u8 = 1;

/// Prints help, or says on stderr what is wrong with a command line: in JSON if it has `--json`,
/// since a program cannot know which of its mistakes are found before the others.
pub(crate) fn report_usage(
    error: &clap::Error,
    mut arguments: impl Iterator<Item = OsString>,
) -> ExitCode {
    if !error.use_stderr() {
        // Help and version are no errors. What cannot be printed, nobody wants to read.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let json = arguments.by_ref().take_while(|word| word != "--").any(|word| word == "--json");
    if json {
        return report(&Error::new(Kind::Invalid, sentence(error)), json);
    }
    let _ = error.print();
    ExitCode::from(USAGE)
}

/// What clap complains about, without the usage that it shows below.
fn sentence(error: &clap::Error) -> String {
    use clap::error::ErrorKind as Clap;
    if error.kind() == Clap::DisplayHelpOnMissingArgumentOrSubcommand {
        return "a command is missing; see: parallax --help".to_owned();
    }
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let end =
        ["\n\nUsage:", "\n\nFor more information"].iter().filter_map(|end| text.find(end)).min();
    let text = end.and_then(|end| text.get(..end)).unwrap_or(text);
    let paragraphs = text.split("\n\n");
    let line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    paragraphs.map(line).collect::<Vec<_>>().join("; ")
}

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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn every_kind_of_error_has_its_documented_code() {
        let text = include_str!("../../../docs/operations/json.md");
        let mut described = 0;
        for line in text.lines() {
            let mut cells = line.split('|').map(str::trim).skip(1);
            let (Some(kind), Some(number)) = (cells.next(), cells.next()) else { continue };
            let Ok(number) = number.parse::<u8>() else { continue };
            let kind: Kind =
                serde_json::from_value(kind.trim_matches('`').to_owned().into()).unwrap();
            assert_eq!(code(kind), number, "{line}");
            described += 1;
        }
        assert_eq!(described, 12, "each kind has a line");
    }

    #[test]
    fn complaints_are_one_line() {
        let check = |line: &[&str], expected: &str| {
            let error = Cli::try_parse_from(line).unwrap_err();
            assert_eq!(sentence(&error), expected);
        };
        check(
            &["parallax", "create", "a"],
            "the following required arguments were not provided: --size <SIZE>",
        );
        check(&["parallax"], "a command is missing; see: parallax --help");
        check(
            &["parallax", "forma"],
            "unrecognized subcommand 'forma'; tip: a similar subcommand exists: 'format'",
        );
    }
}
