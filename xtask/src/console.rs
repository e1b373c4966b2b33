//! What a person reads while a task runs: headings with the time that each step took.

use std::io::Write;
use std::time::Instant;

use crate::clock;

/// Prints one line to standard output. A closed pipe is not an error worth stopping for.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        // Nobody reads: the exit code still tells.
    }
}

/// Prints an error to standard error.
pub(crate) fn error(line: &str) {
    let mut out = std::io::stderr().lock();
    if writeln!(out, "error: {line}").is_err() {
        // Nobody reads: the exit code still tells.
    }
}

/// Prints a heading, and on [`Heading::done`] the time since.
pub(crate) struct Heading {
    title: String,
    start: Instant,
}

impl Heading {
    /// Announces a step.
    pub(crate) fn new(title: &str) -> Self {
        say(&format!("\n=== {title}"));
        Self { title: title.to_owned(), start: clock::now() }
    }

    /// Says how the step ended and how long it took.
    pub(crate) fn done(self, outcome: &str) {
        let seconds = self.start.elapsed().as_secs_f64();
        say(&format!("--- {}: {outcome} ({seconds:.1} s)", self.title));
    }
}
