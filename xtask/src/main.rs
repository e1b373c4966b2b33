//! `cargo xtask`: everything that is done to the project rather than by it.
//!
//! One binary holds the gate (`test`), its steps one by one, the long end-to-end tests and the
//! benchmarks, so that a laptop and the continuous integration run the very same thing.
//! docs/development.md explains each task. It deliberately links none of the engine: it judges
//! the project from outside, through its binaries, sockets and files.

mod arrows;
mod bench;
mod clock;
mod console;
mod control;
mod e2e;
mod fio;
mod fuzz;
mod gate;
mod guarantees;
mod licences;
mod lint;
mod nbd;
mod packages;
mod process;
mod qmp;
mod random;
mod readme;
mod server;
mod simulator;
mod workspace;

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::workspace::Workspace;

/// Every task and what it does; a star marks what the gate runs too.
const TASKS: [(&str, &str); 9] = [
    ("test", "the whole gate: everything below marked *, in one go; words pick steps"),
    ("lint", "* formatting, clippy, licences, arrows between crates, house style, README"),
    ("docs", "* the API documentation, warnings denied"),
    ("sim", "* the simulator; without arguments its smoke test, `sim help` tells more"),
    ("fuzz", "the fuzz targets: [--seconds N] [target…]; needs a nightly toolchain"),
    (
        "e2e",
        "* end to end, the gate a part of it: [--quick] [--peer] [--seed N] [--rounds N] [scenario…]",
    ),
    ("bench", "figures beside those of peers: [--quick] [--peers-only] [--write] [--rows a,b]"),
    ("packages", "install the Debian packages that any task needs"),
    ("help", "this list"),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            console::error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<ExitCode> {
    let Some((task, rest)) = arguments.split_first() else {
        console::say(&usage());
        return Ok(ExitCode::from(1));
    };
    let workspace = Workspace::find()?;
    match task.as_str() {
        "test" => return gate::run(&workspace, rest),
        "lint" => lint::run(&workspace)?,
        "docs" => lint::docs(&workspace)?,
        "sim" => simulator::run(&workspace, rest)?,
        "fuzz" => fuzz::run(&workspace, rest)?,
        "bench" => bench::run(&workspace, rest)?,
        "e2e" => e2e::run(&workspace, rest)?,
        "packages" => packages::ensure(packages::Use::Everything)?,
        "help" | "--help" | "-h" => console::say(&usage()),
        other => bail!("there is no task '{other}'\n\n{}", usage()),
    }
    Ok(ExitCode::SUCCESS)
}

fn usage() -> String {
    let line = |(name, purpose): &(&str, &str)| format!("  {name:<10}{purpose}\n");
    format!("cargo xtask <task> [arguments]\n\n{}", TASKS.iter().map(line).collect::<String>())
}
