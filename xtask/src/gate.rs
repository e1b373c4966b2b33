//! `cargo xtask test`: the whole gate, in the order in which mistakes are cheapest to find.
//!
//! Every step runs even if one before it failed, so that one run shows everything that is wrong.
//! The last line is the count over all steps: each test that nextest ran, and each other step or
//! end-to-end check as one.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use crate::console::{self, Heading};
use crate::process::Run;
use crate::workspace::Workspace;
use crate::{arrows, e2e, guarantees, licences, lint, packages, readme, simulator};

/// The version that is installed where there is none; anything newer does as well.
const NEXTEST_VERSION: &str = "0.9.143";

/// How many checks of a step held and how many did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    /// Checks that held.
    pub(crate) passed: u64,
    /// Checks that did not.
    pub(crate) failed: u64,
}

impl Count {
    const PASSED: Self = Self { passed: 1, failed: 0 };
    const FAILED: Self = Self { passed: 0, failed: 1 };
}

/// A step of the gate.
struct Step {
    name: &'static str,
    run: fn(&Workspace) -> Result<Count>,
}

/// A step that counts as one check.
macro_rules! single {
    ($name:literal, $run:expr) => {
        Step { name: $name, run: |workspace| $run(workspace).map(|()| Count::PASSED) }
    };
}

const STEPS: [Step; 15] = [
    single!("system packages", |_: &Workspace| packages::ensure(packages::Use::Gate)),
    single!("formatting", lint::formatting),
    single!("licences and sources of dependencies", licences::check),
    single!("arrows between crates", arrows::check),
    single!("house style", lint::style),
    single!("README commands", readme::check),
    single!("guarantees name their tests", guarantees::check),
    single!("clippy", lint::clippy),
    Step { name: "unit and integration tests", run: tests },
    single!("examples in the documentation", doc_tests),
    single!("API documentation", lint::docs),
    single!("release build", release_build),
    single!("simulator smoke", simulator::smoke),
    single!("simulator catches every mutant", simulator::mutants),
    Step { name: "end to end", run: e2e::quick },
];

/// Runs every step, or those whose names contain one of `filters`.
///
/// # Errors
/// None of its own: a failed step is reported and counted.
pub(crate) fn run(workspace: &Workspace, filters: &[String]) -> Result<ExitCode> {
    let total = Heading::new("cargo xtask test");
    let mut sum = Count::default();
    let mut failed_steps = Vec::new();
    let wanted = |step: &&Step| {
        filters.is_empty() || filters.iter().any(|filter| step.name.contains(filter.as_str()))
    };
    for step in STEPS.iter().filter(wanted) {
        let heading = Heading::new(step.name);
        let count = (step.run)(workspace).unwrap_or_else(|error| {
            console::error(&format!("{error:#}"));
            Count::FAILED
        });
        sum.passed += count.passed;
        sum.failed += count.failed;
        if count.failed > 0 {
            failed_steps.push(step.name);
        }
        heading.done(if count.failed > 0 { "FAILED" } else { "ok" });
    }
    ensure!(sum != Count::default(), "no step is called like that");
    total.done(if sum.failed > 0 { "FAILED" } else { "ok" });
    if !failed_steps.is_empty() {
        console::say(&format!("failed: {}", failed_steps.join(", ")));
    }
    console::say(&format!("\n{} passed, {} failed", sum.passed, sum.failed));
    Ok(if sum.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Every test of the workspace, through nextest; the counts come from its report.
fn tests(workspace: &Workspace) -> Result<Count> {
    ensure_nextest(workspace)?;
    let report = workspace.target.join("nextest/gate/junit.xml");
    if report.exists() {
        std::fs::remove_file(&report).context("remove the report of an earlier run")?;
    }
    let run = workspace.cargo().words("nextest run --workspace --locked --profile gate").show();
    let text = match (std::fs::read_to_string(&report), run.is_ok()) {
        (Ok(text), _) => text,
        (Err(error), true) => return Err(error).context("read nextest's report"),
        // It did not get as far as running a test: the build failed.
        (Err(_), false) => return run.map(|()| Count::default()),
    };
    let count = report_count(&text).context("nextest's report has no counts")?;
    // The report and the exit code must tell the same story.
    if count.failed == 0 {
        run?;
    }
    Ok(count)
}

/// Examples in doc comments, which nextest does not run.
fn doc_tests(workspace: &Workspace) -> Result<()> {
    workspace.cargo().words("test --quiet --doc --workspace --locked").show()
}

/// The daemon as the following steps use it. Without the simulator: a build of both has other features of
/// their dependencies, and would be in nobody's place.
fn release_build(workspace: &Workspace) -> Result<()> {
    workspace.parallax(None).map(drop)
}

/// Installs nextest where it is missing.
fn ensure_nextest(workspace: &Workspace) -> Result<()> {
    if workspace.cargo().words("nextest --version").read().is_ok() {
        return Ok(());
    }
    console::say("installing cargo-nextest");
    let run = Run::new("cargo").words("install --locked cargo-nextest --version");
    run.arg(NEXTEST_VERSION).limit(std::time::Duration::from_secs(1800)).show()
}

/// Counts of the `<testsuites …>` element of a JUnit report.
fn report_count(report: &str) -> Option<Count> {
    let element = report.split("<testsuites").nth(1)?.split('>').next()?;
    let attribute = |name: &str| -> Option<u64> {
        element.split(&format!(" {name}=\"")).nth(1)?.split('"').next()?.parse().ok()
    };
    let failed = attribute("failures")? + attribute("errors")?;
    let run = attribute("tests")?;
    Some(Count { passed: run.checked_sub(failed)?, failed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_come_from_the_report() {
        let check = |element: &str, expected: Option<(u64, u64)>| {
            let report = format!("<?xml version=\"1.0\"?>\n{element}\n  <testsuite name=\"x\">");
            let expected = expected.map(|(passed, failed)| Count { passed, failed });
            assert_eq!(report_count(&report), expected, "{element}");
        };
        let head = "<testsuites name=\"nextest-run\" ";
        check(
            &format!("{head}tests=\"12\" failures=\"0\" errors=\"0\" time=\"1.5\">"),
            Some((12, 0)),
        );
        check(&format!("{head}tests=\"12\" failures=\"2\" errors=\"1\">"), Some((9, 3)));
        check(&format!("{head}tests=\"1\" failures=\"2\" errors=\"0\">"), None);
        check("<html>", None);
    }
}
