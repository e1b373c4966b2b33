//! Many runs: worker processes that report seed by seed, so that a panic, an abort or a hang costs
//! one seed and is seen.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use parallax_sim::focus::Focus;
use parallax_sim::mutants::{self, Mutant};
use parallax_sim::plan::Limits;
use parallax_sim::probes::{DECLARED, Probes};
use parallax_sim::trace::Trace;

use crate::arguments::Arguments;
use crate::shrink::shrink;
use crate::{describe, replay, run_named, say, say_to_stderr};

/// Longest that one seed may take.
const SEED_MAX: Duration = Duration::from_secs(120);

/// Seeds after which a missing rare path is worth a word.
const SEEDS_FOR_PROBES: u64 = 2_000;

/// Wall time; the simulation itself has none.
pub(crate) fn now() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "how long a batch took is about this machine")]
    Instant::now()
}

/// Waits in wall time.
pub(crate) fn pause(duration: Duration) {
    #[expect(clippy::disallowed_methods, reason = "this waits for other processes")]
    std::thread::sleep(duration);
}

/// Which seeds are run, and until when.
struct Batch {
    start: u64,
    /// How many; `None`: as many as the time allows.
    seeds: Option<u64>,
    time: Option<Duration>,
    jobs: u64,
    keep_going: bool,
    mutant: Option<&'static str>,
    /// What all runs are about.
    focus: Option<Focus>,
    /// Whether a line of progress is shown.
    progress: bool,
}

/// What came of a batch.
#[derive(Default)]
struct Outcome {
    passed: u64,
    changes: u64,
    simulated_ms: u64,
    failures: Vec<(u64, String)>,
    probes: Probes,
    took: Duration,
}

/// Runs a fixed number of seeds.
pub(crate) fn smoke(arguments: &mut Arguments) -> Result<bool> {
    let batch = Batch {
        start: arguments.number("--start")?.unwrap_or(1),
        seeds: Some(arguments.number("--seeds")?.unwrap_or(2_000)),
        time: None,
        jobs: arguments.number("--jobs")?.unwrap_or(2),
        keep_going: arguments.flag("--keep-going"),
        mutant: None,
        focus: arguments.focus()?,
        progress: true,
    };
    arguments.finish()?;
    conclude("smoke", &batch)
}

/// Runs seeds for some time, from a start that differs from day to day.
pub(crate) fn long(arguments: &mut Arguments) -> Result<bool> {
    let minutes = arguments.number("--minutes")?.unwrap_or(30);
    let start = match arguments.number("--start")? {
        Some(start) => start,
        None => seconds_since_1970()?.saturating_mul(1_000_000),
    };
    let batch = Batch {
        start,
        seeds: None,
        time: Some(Duration::from_secs(minutes * 60)),
        jobs: arguments.number("--jobs")?.unwrap_or(2),
        keep_going: arguments.flag("--keep-going"),
        mutant: None,
        focus: arguments.focus()?,
        progress: true,
    };
    arguments.finish()?;
    conclude("long", &batch)
}

fn seconds_since_1970() -> Result<u64> {
    #[expect(clippy::disallowed_methods, reason = "new seeds every time; the seed is printed")]
    let now = std::time::SystemTime::now();
    Ok(now.duration_since(std::time::UNIX_EPOCH).context("read the clock")?.as_secs())
}

/// Runs a batch and tells about it.
fn conclude(name: &str, batch: &Batch) -> Result<bool> {
    let outcome = run_batch(batch)?;
    let limits = Limits { focus: batch.focus, ..Limits::default() };
    tell_probes(&outcome);
    for (seed, failure) in &outcome.failures {
        say(&format!("\nseed {seed} FAILED: {failure}\n{}", replay(*seed, &limits)));
    }
    if let Some((seed, _)) = outcome.failures.first() {
        say_to_stderr("shrinking the first failure...\n");
        let limits = shrink(*seed, limits)?;
        say(&format!("smallest form found of seed {seed}:\n{}", replay(*seed, &limits)));
    }
    let minutes = outcome.took.as_secs_f64() / 60.0;
    let seeds = outcome.passed + u64::try_from(outcome.failures.len()).unwrap_or(0);
    say(&format!(
        "{name}: {seeds} seeds from {}, {} failed; {} changes, {} simulated minutes; \
         {:.1} s, {} seeds per minute\n",
        batch.start,
        outcome.failures.len(),
        outcome.changes,
        outcome.simulated_ms / 60_000,
        outcome.took.as_secs_f64(),
        per_minute(seeds, minutes),
    ));
    Ok(outcome.failures.is_empty())
}

fn per_minute(seeds: u64, minutes: f64) -> String {
    // Seeds stay far below 2^52.
    let seeds = u32::try_from(seeds).map_or(f64::from(u32::MAX), f64::from);
    format!("{:.0}", seeds / minutes.max(1e-9))
}

fn tell_probes(outcome: &Outcome) {
    say("rare paths, and what the device did:\n");
    for (path, count) in outcome.probes.iter() {
        say(&format!("  {count:>10}  {path}\n"));
    }
    let enough = outcome.passed >= SEEDS_FOR_PROBES;
    for path in outcome.probes.missing().filter(|_| enough) {
        let meaning = DECLARED.iter().find(|(name, _)| *name == path).map_or("", |(_, what)| what);
        say(&format!("  never reached: {path} ({meaning})\n"));
    }
}

/// Says that every mutant is caught and that the engine without mutants passes.
pub(crate) fn mutants(arguments: &mut Arguments) -> Result<bool> {
    let seconds = arguments.number("--seconds")?.unwrap_or(60);
    let jobs = arguments.number("--jobs")?.unwrap_or(2);
    let only = arguments.text("--only")?;
    arguments.finish()?;
    if !cfg!(mutants) {
        bail!(
            "this build has no mutants; use RUSTFLAGS='--cfg mutants' cargo run --release \
             --target-dir target/mutants -p parallax-sim -- mutants"
        );
    }
    let wanted = |mutant: &&Mutant| only.as_deref().is_none_or(|only| only == mutant.name);
    let mut missed = 0;
    for mutant in mutants::ALL.iter().filter(wanted) {
        let start = now();
        let mut seeds = 0;
        let mut caught = None;
        let mut first = 1;
        while caught.is_none() && start.elapsed().as_secs() < seconds {
            let left = Duration::from_secs(seconds).saturating_sub(start.elapsed());
            let outcome = run_batch(&hunt(first, left, jobs, mutant.name, mutant.focus))?;
            seeds += outcome.passed;
            let Some((seed, failure)) = outcome.failures.into_iter().next() else { break };
            // A seed that fails anyway proves nothing.
            if run_batch(&single(seed, mutant.focus))?.failures.is_empty() {
                caught = Some((seed, failure));
            }
            first = seed + 1;
        }
        let took = start.elapsed().as_secs_f64();
        match caught {
            Some((seed, failure)) => say(&format!(
                "caught   {:<32} rule {:<4} {took:>5.1} s, seed {seed}: {}\n",
                mutant.name,
                mutant.rule,
                first_line(&failure)
            )),
            None => {
                missed += 1;
                say(&format!(
                    "SURVIVED {:<32} rule {:<4} {took:>5.1} s, {seeds} seeds: {}\n",
                    mutant.name, mutant.rule, mutant.breaks
                ));
            }
        }
    }
    let canary = hunt(1, Duration::from_secs(seconds.min(30)), jobs, NO_MUTANT, None);
    let canary = run_batch(&canary)?;
    if let Some((seed, failure)) = canary.failures.first() {
        say(&format!("the engine without a mutant fails, too: seed {seed}: {failure}\n"));
    }
    let count = mutants::ALL.iter().filter(wanted).count();
    say(&format!(
        "mutants: {} of {count} caught; without a mutant {} seeds, {} failed\n",
        count - missed,
        canary.passed,
        canary.failures.len()
    ));
    Ok(missed == 0 && canary.failures.is_empty() && count > 0)
}

/// A name that no mutant has.
const NO_MUTANT: &str = "none";

/// Seeds from `start` on until one fails under a mutant.
fn hunt(
    start: u64,
    time: Duration,
    jobs: u64,
    mutant: &'static str,
    focus: Option<Focus>,
) -> Batch {
    Batch {
        start,
        seeds: None,
        time: Some(time),
        jobs,
        keep_going: false,
        mutant: Some(mutant),
        focus,
        progress: false,
    }
}

/// One seed without a mutant.
fn single(seed: u64, focus: Option<Focus>) -> Batch {
    Batch { seeds: Some(1), ..hunt(seed, SEED_MAX, 1, NO_MUTANT, focus) }
}

fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    line.chars().take(100).collect()
}

/// What a worker says, one line each.
enum Message {
    Begun(u64),
    Passed {
        changes: u64,
        simulated_ms: u64,
    },
    Failed(u64, String),
    Probe(String, u64),
    /// It has no more to say.
    Ended,
}

/// One worker process.
struct Worker {
    child: Child,
    current: Option<(u64, Instant)>,
    ended: bool,
}

fn run_batch(batch: &Batch) -> Result<Outcome> {
    let start = now();
    let (sender, messages) = channel();
    let mut workers = BTreeMap::new();
    let mut outcome = Outcome::default();
    std::thread::scope(|scope| -> Result<()> {
        for job in 0..batch.jobs {
            let (worker, output) = spawn(batch, batch.start + job)?;
            let sender = sender.clone();
            scope.spawn(move || listen(job, output, &sender));
            workers.insert(job, worker);
        }
        let mut respawn = |job: u64, first: u64| -> Result<Worker> {
            let (worker, output) = spawn(batch, first)?;
            let sender = sender.clone();
            scope.spawn(move || listen(job, output, &sender));
            Ok(worker)
        };
        collect(batch, start, &messages, &mut workers, &mut outcome, &mut respawn)
    })?;
    outcome.took = start.elapsed();
    outcome.failures.sort();
    Ok(outcome)
}

fn spawn(batch: &Batch, first: u64) -> Result<(Worker, ChildStdout)> {
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command
        .arg("worker")
        .args(["--start", &first.to_string()])
        .args(["--stride", &batch.jobs.to_string()])
        .stdout(Stdio::piped());
    if let Some(seeds) = batch.seeds {
        command.args(["--end", &(batch.start + seeds).to_string()]);
    }
    if let Some(focus) = batch.focus {
        command.args(["--focus", focus.name()]);
    }
    if let Some(mutant) = batch.mutant {
        command.env("PARALLAX_MUTANT", mutant).stderr(Stdio::null());
    }
    let mut child = command.spawn().context("start a worker")?;
    let output = child.stdout.take().context("read from a worker")?;
    Ok((Worker { child, current: None, ended: false }, output))
}

fn listen(job: u64, output: ChildStdout, sender: &Sender<(u64, Message)>) {
    for line in BufReader::new(output).lines() {
        let Ok(line) = line else { break };
        let Some(message) = parse(&line) else { continue };
        if sender.send((job, message)).is_err() {
            return;
        }
    }
    let _ = sender.send((job, Message::Ended));
}

fn parse(line: &str) -> Option<Message> {
    let mut words = line.splitn(3, ' ');
    let (kind, first, rest) = (words.next()?, words.next()?, words.next().unwrap_or_default());
    Some(match kind {
        "begun" => Message::Begun(first.parse().ok()?),
        "passed" => {
            Message::Passed { changes: first.parse().ok()?, simulated_ms: rest.parse().ok()? }
        }
        "failed" => Message::Failed(first.parse().ok()?, rest.replace("\\n", "\n")),
        "probe" => Message::Probe(rest.to_owned(), first.parse().ok()?),
        _ => return None,
    })
}

/// Listens to workers until they are done, one fails, or the time is over.
fn collect(
    batch: &Batch,
    start: Instant,
    messages: &Receiver<(u64, Message)>,
    workers: &mut BTreeMap<u64, Worker>,
    outcome: &mut Outcome,
    respawn: &mut dyn FnMut(u64, u64) -> Result<Worker>,
) -> Result<()> {
    let mut told = start;
    while workers.values().any(|worker| !worker.ended) {
        match messages.recv_timeout(Duration::from_millis(200)) {
            Ok((job, message)) => {
                let Some(worker) = workers.get_mut(&job) else { continue };
                if let Some(died_at) = note(worker, message, outcome)
                    && batch.keep_going
                {
                    worker.child.wait().context("wait for a worker")?;
                    *worker = respawn(job, died_at + batch.jobs)?;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        for worker in workers.values_mut() {
            let stuck = worker.current.is_some_and(|(_, since)| since.elapsed() > SEED_MAX);
            if stuck && let Some((seed, _)) = worker.current {
                let seconds = SEED_MAX.as_secs();
                say_to_stderr(&format!("seed {seed} takes more than {seconds} s\n"));
                worker.child.kill().context("end a worker")?;
            }
        }
        let over = batch.time.is_some_and(|time| start.elapsed() > time);
        if over || (!outcome.failures.is_empty() && !batch.keep_going) {
            stop(workers, outcome, messages)?;
            break;
        }
        if batch.progress && told.elapsed() > Duration::from_secs(10) {
            told = now();
            let seconds = start.elapsed().as_secs();
            let failed = outcome.failures.len();
            say_to_stderr(&format!("{seconds} s: {} passed, {failed} failed\n", outcome.passed));
        }
    }
    for worker in workers.values_mut() {
        worker.child.wait().context("wait for a worker")?;
    }
    Ok(())
}

/// Notes a message. The seed at which the worker died, if it did.
fn note(worker: &mut Worker, message: Message, outcome: &mut Outcome) -> Option<u64> {
    match message {
        Message::Begun(seed) => worker.current = Some((seed, now())),
        Message::Passed { changes, simulated_ms } => {
            worker.current = None;
            outcome.passed += 1;
            outcome.changes += changes;
            outcome.simulated_ms += simulated_ms;
        }
        Message::Failed(seed, failure) => {
            worker.current = None;
            outcome.failures.push((seed, failure));
        }
        Message::Probe(path, count) => outcome.probes.add(&path, count),
        Message::Ended => {
            worker.ended = true;
            if let Some((seed, _)) = worker.current.take() {
                outcome.failures.push((seed, "the run died: see the panic above".to_owned()));
                return Some(seed);
            }
        }
    }
    None
}

/// Ends the workers; what they were at does not count, what they had said before does.
fn stop(
    workers: &mut BTreeMap<u64, Worker>,
    outcome: &mut Outcome,
    messages: &Receiver<(u64, Message)>,
) -> Result<()> {
    for worker in workers.values_mut() {
        worker.child.kill().context("end a worker")?;
    }
    while workers.values().any(|worker| !worker.ended) {
        let Ok((job, message)) = messages.recv() else { break };
        let Some(worker) = workers.get_mut(&job) else { continue };
        match message {
            Message::Ended => worker.ended = true,
            other => drop(note(worker, other, outcome)),
        }
    }
    Ok(())
}

/// A worker: runs every `stride`th seed and reports each.
pub(crate) fn worker(arguments: &mut Arguments) -> Result<bool> {
    let start = arguments.number("--start")?.context("--start")?;
    let stride = arguments.number("--stride")?.unwrap_or(1).max(1);
    let end = arguments.number("--end")?.unwrap_or(u64::MAX);
    let limits = Limits { focus: arguments.focus()?, ..Limits::default() };
    arguments.finish()?;
    let mut seed = start;
    while seed < end {
        say(&format!("begun {seed}\n"));
        let report = run_named(seed, &limits, Trace::silent());
        let probes = report.probes.iter().map(|(path, count)| format!("probe {count} {path}\n"));
        let probes: String = probes.collect();
        match &report.failure {
            None => {
                let simulated_ms = report.simulated.as_millis();
                say(&format!("{probes}passed {} {simulated_ms}\n", report.changes));
            }
            Some(failure) => {
                say(&format!("failed {seed} {}\n", failure.replace('\n', "\\n")));
                say_to_stderr(&describe(&report, &limits));
            }
        }
        seed += stride;
    }
    Ok(true)
}
