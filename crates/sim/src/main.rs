//! `parallax-sim`: runs seeds, many seeds, every crash point of a seed, and mutants.

mod arguments;
mod farm;
mod shrink;

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Mutex;

use anyhow::{Context as _, Result, bail};
use parallax_sim::plan::Limits;
use parallax_sim::run::{Report, run};
use parallax_sim::trace::Trace;

use arguments::Arguments;

const USAGE: &str = "\
parallax-sim: the engine on a simulated device, clock and executor; one seed, one run

  run --seed N [--trace] [LIMITS]      one run
  smoke [--seeds 2000] [--start 1] [--jobs 2] [--keep-going] [--focus CORNER]
  long [--minutes 30] [--start R] [--jobs 2] [--keep-going] [--focus CORNER]
  sweep --seed N [--stride 1] [--keep-going]
                                       the run of a seed with a power cut at every write
  sweep --seed N --errors              the same with each operation of the device failing once
  mutants [--seconds 60] [--jobs 2] [--only NAME]
                                       needs a build with RUSTFLAGS='--cfg mutants'

LIMITS narrow a run: --requests N, --clients N, --lives N, --without FAULT, --cut-at-write N,
  --fail-operation N, --focus CORNER
";

/// The run that is under way, as arguments: for whoever reads about a panic.
static CURRENT: Mutex<String> = Mutex::new(String::new());

fn main() -> ExitCode {
    name_panics();
    match dispatch() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say_to_stderr(&format!("parallax-sim: {error:#}\n"));
            ExitCode::from(2)
        }
    }
}

fn dispatch() -> Result<bool> {
    let mut arguments = Arguments::from_process();
    let command = arguments.command();
    let passed = match command.as_str() {
        "run" => run_one(&mut arguments)?,
        "sweep" => sweep(&mut arguments)?,
        "smoke" => farm::smoke(&mut arguments)?,
        "long" => farm::long(&mut arguments)?,
        "mutants" => farm::mutants(&mut arguments)?,
        "worker" => farm::worker(&mut arguments)?,
        "" | "help" | "--help" | "-h" => {
            say(USAGE);
            true
        }
        other => bail!("unknown command '{other}'\n\n{USAGE}"),
    };
    Ok(passed)
}

fn run_one(arguments: &mut Arguments) -> Result<bool> {
    let seed = arguments.number("--seed")?.context("run needs --seed N")?;
    let limits = arguments.limits()?;
    let trace = arguments.flag("--trace");
    arguments.finish()?;
    let trace = if trace { Trace::to(|line| say(&format!("{line}\n"))) } else { Trace::silent() };
    let report = run_named(seed, &limits, trace);
    say(&describe(&report, &limits));
    Ok(report.failure.is_none())
}

/// Runs a seed, with its name where a panic finds it.
fn run_named(seed: u64, limits: &Limits, trace: Trace) -> Report {
    if let Ok(mut current) = CURRENT.lock() {
        *current = format!("--seed {seed}{}", limits.arguments());
    }
    run(seed, limits, trace)
}

fn describe(report: &Report, limits: &Limits) -> String {
    let mut text = format!(
        "seed {}: {} changes, {} device writes, {:.1} simulated seconds, trace {:016x}\n",
        report.seed,
        report.changes,
        report.device_writes,
        report.simulated.as_secs_f64(),
        report.trace_hash
    );
    match &report.failure {
        None => text.push_str("passed\n"),
        Some(failure) => {
            text.push_str(&format!("FAILED: {failure}\n{}", replay(report.seed, limits)));
        }
    }
    text
}

/// How to see a run again.
fn replay(seed: u64, limits: &Limits) -> String {
    format!(
        "replay: cargo run --release -p parallax-sim -- run --seed {seed}{} [--trace]\n",
        limits.arguments()
    )
}

/// Runs a seed again and again, with a power cut, or a failing operation, one later each time.
fn sweep(arguments: &mut Arguments) -> Result<bool> {
    let seed = arguments.number("--seed")?.context("sweep needs --seed N")?;
    let stride = arguments.number("--stride")?.unwrap_or(1).max(1);
    let errors = arguments.flag("--errors");
    let keep_going = arguments.flag("--keep-going");
    let mut limits = arguments.limits()?;
    arguments.finish()?;
    // The run without either must pass; it says how many there are.
    limits.cut_at_write = (!errors).then_some(u64::MAX);
    let whole = run_named(seed, &limits, Trace::silent());
    if whole.failure.is_some() {
        say(&describe(&whole, &limits));
        return Ok(false);
    }
    let last = if errors { whole.device_operations } else { whole.device_writes };
    let (mut count, mut failed) = (0, 0);
    let mut at = 1;
    while at <= last && (failed == 0 || keep_going) {
        if errors {
            limits.fail_operation = Some(at);
        } else {
            limits.cut_at_write = Some(at);
        }
        let report = run_named(seed, &limits, Trace::silent());
        if report.failure.is_some() {
            say(&describe(&report, &limits));
            failed += 1;
        }
        count += 1;
        at += stride;
    }
    let what = if errors { "failing operations" } else { "power cuts" };
    say(&format!("sweep of seed {seed}: {count} {what}, {failed} runs failed\n"));
    Ok(failed == 0)
}

/// A panic in the engine says which run it was.
fn name_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        before(panic);
        let current = CURRENT.lock().map(|current| current.clone()).unwrap_or_default();
        say_to_stderr(&format!(
            "FAILED: {current} panicked: {}\n\
             replay: cargo run --release -p parallax-sim -- run {current} [--trace]\n",
            panic.to_string().replace('\n', " ")
        ));
    }));
}

fn say(text: &str) {
    let mut output = std::io::stdout().lock();
    // Nobody is left to tell if nobody reads.
    let _ = output.write_all(text.as_bytes()).and_then(|()| output.flush());
}

fn say_to_stderr(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}
