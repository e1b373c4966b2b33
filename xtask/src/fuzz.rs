//! Running the fuzz targets of `fuzz/`, each for a while.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::console::{self, Heading};
use crate::process::Run;
use crate::workspace::Workspace;

/// Seconds per target if none are asked for.
const SECONDS: u64 = 60;

/// The version that is installed where there is none; anything newer does as well.
const CARGO_FUZZ_VERSION: &str = "0.13.2";

/// Runs every target, or those named, for `--seconds N` each. Installs cargo-fuzz where it is
/// missing.
///
/// # Errors
/// If there is no nightly toolchain, or a target finds something: the input that does it stays
/// under fuzz/artifacts.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    let (seconds, wanted) = parse(arguments)?;
    let directory = workspace.root.join("fuzz");
    ensure_tools()?;
    let listed = cargo_fuzz(&directory, "list").read().context("list the targets")?;
    let known: Vec<&str> = listed.lines().collect();
    for name in &wanted {
        ensure!(known.contains(name), "no fuzz target is called {name}; there are:\n{listed}");
    }
    let targets = if wanted.is_empty() { known } else { wanted };
    for target in targets {
        let heading = Heading::new(&format!("fuzz {target}"));
        // Compiling comes on top of the time that the target itself is given.
        let limit = Duration::from_secs(seconds + 1800);
        let run = cargo_fuzz(&directory, "run").arg(target).arg("--").limit(limit);
        // Inputs are scripts: the short ones that it would begin with do next to nothing.
        run.arg(format!("-max_total_time={seconds}"))
            .words("-rss_limit_mb=4096 -timeout=20 -len_control=0")
            .show()?;
        heading.done("nothing found");
    }
    Ok(())
}

/// Installs cargo-fuzz where it is missing. A toolchain is not ours to install.
fn ensure_tools() -> Result<()> {
    let nightly = Run::new("cargo").words("+nightly --version").read();
    nightly.context(
        "fuzzing needs a nightly compiler, for its sanitizers; get one with: \
         rustup toolchain install nightly --profile minimal",
    )?;
    if Run::new("cargo").words("+nightly fuzz --version").read().is_ok() {
        return Ok(());
    }
    console::say("installing cargo-fuzz");
    let run = Run::new("cargo").words("+nightly install --locked cargo-fuzz --version");
    run.arg(CARGO_FUZZ_VERSION).limit(Duration::from_secs(1800)).show()
}

/// cargo-fuzz needs the nightly compiler; the toolchain that runs us must not be inherited.
fn cargo_fuzz(directory: &std::path::Path, verb: &str) -> Run {
    Run::new("cargo")
        .words("+nightly fuzz")
        .arg(verb)
        .dir(directory)
        .without_env("CARGO_TARGET_DIR")
}

/// Seconds for each target, and names of targets, in any order.
fn parse(arguments: &[String]) -> Result<(u64, Vec<&str>)> {
    let (mut seconds, mut wanted) = (SECONDS, Vec::new());
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if argument == "--seconds" {
            let given = rest.next().and_then(|text| text.parse().ok());
            seconds = given.context("--seconds takes a number")?;
        } else {
            wanted.push(argument.as_str());
        }
    }
    Ok((seconds, wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_stand_before_or_behind_names() {
        let parse = |line: &str| {
            let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            parse(&words).map(|(seconds, wanted)| (seconds, wanted.join(" "))).ok()
        };
        assert_eq!(parse(""), Some((SECONDS, String::new())));
        assert_eq!(parse("store --seconds 9 nbd"), Some((9, "store nbd".to_owned())));
        assert_eq!(parse("--seconds"), None);
    }
}
