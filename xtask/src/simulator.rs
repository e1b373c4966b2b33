//! Building and calling the simulator.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::process::Run;
use crate::workspace::Workspace;

/// Seeds of the smoke run that the gate does; each is one whole run of the engine.
const SMOKE_SEEDS: u32 = 2000;

/// Each of some twenty mutants has a minute; most are caught within a second.
const MUTANTS_LIMIT: Duration = Duration::from_secs(1500);

/// Hands `arguments` to the simulator, or runs the smoke test if there are none.
///
/// # Errors
/// If it does not compile, or a seed fails: the simulator prints how to replay it.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    let verb = match arguments.first().map(String::as_str) {
        None => return smoke(workspace),
        Some("mutants") => return mutants(workspace),
        // The two that one types most often need no verb.
        Some("--minutes") => Some("long"),
        Some("--seed") => Some("run"),
        Some(_) => None,
    };
    let arguments: Vec<String> =
        verb.map(str::to_owned).into_iter().chain(arguments.iter().cloned()).collect();
    call(workspace, &arguments, Duration::from_secs(24 * 3600))
}

/// The smoke test of the gate, on the build that has the mutants, all of them switched off: it is built
/// anyway.
///
/// # Errors
/// As [`run`]; also if it takes more than four minutes.
pub(crate) fn smoke(workspace: &Workspace) -> Result<()> {
    let run = Run::new(with_mutants(workspace)?).words("smoke --seeds");
    run.arg(SMOKE_SEEDS.to_string()).limit(Duration::from_secs(240)).show()
}

/// Builds the simulator with every mutant in it, and runs each until it is caught.
///
/// # Errors
/// If a mutant survives: then the simulator has gone blind on that rule.
pub(crate) fn mutants(workspace: &Workspace) -> Result<()> {
    Run::new(with_mutants(workspace)?).arg("mutants").limit(MUTANTS_LIMIT).show()
}

/// The simulator with every mutant in it.
fn with_mutants(workspace: &Workspace) -> Result<PathBuf> {
    // Its own target directory: the flag would otherwise throw away every build of the real code.
    let target = workspace.target.join("mutants");
    let build = workspace.cargo().words("build --release --locked --package parallax-sim");
    build.env("RUSTFLAGS", "--cfg mutants").env("CARGO_TARGET_DIR", &target).show()?;
    Ok(target.join("release/parallax-sim"))
}

fn call(workspace: &Workspace, arguments: &[String], limit: Duration) -> Result<()> {
    let binary = workspace.release_binary("parallax-sim", "parallax-sim")?;
    Run::new(binary).args(arguments).limit(limit).show()
}
