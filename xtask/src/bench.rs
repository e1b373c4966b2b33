//! `cargo xtask bench`: our daemon beside its peers, in one run on one file system.
//!
//! Every figure is the median of several rounds, and the subjects take turns within a round
//! (A B C, A B C, …), so that whatever else changes on the machine meanwhile meets all of them.
//! Everything is opened O_DIRECT; only one server runs at a time; a server is stopped cleanly
//! after each turn, so nobody works while another is measured.

mod access;
mod btrfs;
mod chart;
mod client;
mod cpu;
mod crowd;
mod garbage;
mod history;
mod idle;
mod latency;
mod plan;
mod plot;
mod report;
mod scale;
mod send;
mod snapshots;
mod subject;
mod throughput;
mod turns;
mod vhost_user;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::console::{self, Heading};
use crate::packages;
use crate::workspace::Workspace;

use plan::Row;
use report::Measured;

/// What was asked for on the command line.
#[derive(Debug)]
struct Arguments {
    /// Small disks and short runs: shows that it works, not how fast it is.
    quick: bool,
    /// Only the peers: for a machine without our binary, or to see what they can do.
    peers_only: bool,
    /// Write the results into docs/.
    write: bool,
    /// Measure nothing: only make table and chart anew from what is recorded.
    table_only: bool,
    /// Which rows; empty for all.
    rows: Vec<String>,
    /// Rounds, if not the usual number.
    rounds: Option<usize>,
    /// A binary of ours that was built elsewhere.
    binary: Option<PathBuf>,
    /// Where the disks go, if not under the target directory.
    directory: Option<PathBuf>,
}

/// How large and how long everything is.
#[derive(Clone, Debug)]
pub(crate) struct Scale {
    /// Size of the disks that are measured.
    disk_bytes: u64,
    /// Rounds that a median is taken of.
    rounds: usize,
    /// Size of those that lie in memory.
    ram_disk_bytes: u64,
    /// Time that a load is measured for.
    runtime: Duration,
    /// Time that it runs before that.
    ramp: Duration,
    /// Commands that a latency is measured over.
    commands: usize,
    /// Disks of a store with many.
    disks: u32,
    /// Size of a disk with a long past.
    past_disk_bytes: u64,
    /// Numbers of snapshots that it has, one after the other.
    snapshots: &'static [u32],
    /// Internal snapshots that qcow2 is to take.
    qcow2_snapshots: u32,
    /// Clones of clones.
    clone_levels: u32,
    /// Files that a qcow2 disk stands on.
    chain: u32,
    /// Tree nodes of a store that garbage is collected in.
    nodes: u64,
}

impl Scale {
    const FULL: Self = Self {
        disk_bytes: 4 << 30,
        rounds: 5,
        ram_disk_bytes: 1 << 30,
        runtime: Duration::from_secs(10),
        ramp: Duration::from_secs(2),
        commands: 500,
        disks: 1_000_000,
        past_disk_bytes: 2 << 30,
        snapshots: &[1_000, 10_000, 100_000],
        qcow2_snapshots: 500,
        clone_levels: 1_000,
        chain: 100,
        nodes: 1_000_000,
    };
    const QUICK: Self = Self {
        disk_bytes: 1 << 30,
        rounds: 3,
        ram_disk_bytes: 256 << 20,
        runtime: Duration::from_secs(3),
        ramp: Duration::from_secs(1),
        commands: 100,
        disks: 20_000,
        past_disk_bytes: 256 << 20,
        snapshots: &[100, 1_000],
        qcow2_snapshots: 50,
        clone_levels: 50,
        chain: 20,
        nodes: 20_000,
    };
}

/// Where and on what the measurements run.
pub(crate) struct Bench {
    scale: Scale,
    /// Our binary, unless only peers are measured.
    binary: Option<PathBuf>,
    /// Disks and stores.
    data: PathBuf,
    /// Those that lie in memory.
    ram: PathBuf,
    /// Sockets, logs, state files.
    scratch: PathBuf,
}

/// What the rows are called, with commas.
pub(crate) fn row_names() -> String {
    Row::names()
}

/// Measures.
///
/// # Errors
/// If a program fails, or an argument makes no sense. A missed target is a result, not an error.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    let arguments = parse(arguments)?;
    let directory = match arguments.write {
        true => workspace.root.join("docs/benchmarks"),
        false => workspace.target.join("bench-results"),
    };
    if !arguments.table_only {
        measure_rows(workspace, &arguments, &directory)?;
    }
    report::render(&directory)?;
    if arguments.write {
        report::update_document(&workspace.root.join("docs/benchmarks.md"), &directory)?;
    }
    console::say(&format!("results: {}", directory.display()));
    Ok(())
}

/// Measures the rows that were asked for, with everything in place, and records them.
fn measure_rows(workspace: &Workspace, arguments: &Arguments, directory: &Path) -> Result<()> {
    packages::ensure(packages::Use::Bench)?;
    let binary = match arguments.peers_only {
        true => None,
        false => Some(workspace.parallax(arguments.binary.as_deref())?),
    };
    let mut scale = if arguments.quick { Scale::QUICK } else { Scale::FULL };
    scale.rounds = arguments.rounds.unwrap_or(scale.rounds);
    let data = arguments.directory.clone().unwrap_or_else(|| workspace.target.join("bench"));
    let name = format!("parallax-bench-{}", std::process::id());
    let (scratch, ram) = (std::env::temp_dir().join(&name), Path::new("/dev/shm").join(&name));
    for directory in [&data, &scratch, &ram] {
        std::fs::create_dir_all(directory)?;
    }
    let bench = Bench { scale, binary, data, ram, scratch };

    let result = measure_and_record(&bench, arguments, directory);
    // Gigabytes: removed even after a failure. The logs stay then, to tell why.
    bench.remove_data()?;
    std::fs::remove_dir(&bench.ram)?;
    if result.is_ok() {
        std::fs::remove_dir_all(&bench.scratch)?;
    }
    result
}

fn measure_and_record(bench: &Bench, arguments: &Arguments, directory: &Path) -> Result<()> {
    let mut any = false;
    let mut failed = Vec::new();
    for row in Row::ALL {
        if !arguments.rows.is_empty() && !arguments.rows.iter().any(|name| name == row.name()) {
            continue;
        }
        if bench.binary.is_none() && !row.has_peers() {
            continue;
        }
        let heading = Heading::new(&format!("bench {}", row.name()));
        any = true;
        let measured: Measured = match row.measure(bench) {
            Ok(measured) => measured,
            // The others may be well; the run fails at its end.
            Err(error) => {
                console::error(&format!("measure {}: {error:#}", row.name()));
                heading.done("failed");
                failed.push(row.name());
                bench.remove_data()?;
                continue;
            }
        };
        heading.done(if measured.lines.is_empty() { "left out" } else { "measured" });
        for line in &measured.lines {
            report::say(line);
        }
        // After each row: a run takes an hour, and what is measured is not lost by what follows.
        report::record(directory, &measured, &bench.scale)?;
        bench.remove_data()?;
    }
    ensure!(any, "nothing was measured: the rows are {}", Row::names());
    ensure!(failed.is_empty(), "could not be measured, see above: {}", failed.join(", "));
    Ok(())
}

impl Bench {
    /// Whether there is room for so many bytes of disks and stores; says so if there is not.
    fn has_room(&self, bytes: u64) -> Result<bool> {
        let found = rustix::fs::statvfs(&self.data).context("ask for the space that is free")?;
        let free = found.f_bavail * found.f_frsize;
        if free < bytes {
            console::say(&format!(
                "left out: it takes {} GiB in {}, of which {} are free",
                bytes.div_ceil(1 << 30),
                self.data.display(),
                free >> 30
            ));
        }
        Ok(free >= bytes)
    }

    fn remove_data(&self) -> Result<()> {
        for directory in [&self.data, &self.ram] {
            for entry in std::fs::read_dir(directory)? {
                let path = entry?.path();
                if path.is_dir() {
                    std::fs::remove_dir_all(&path)?;
                }
            }
        }
        Ok(())
    }
}

fn parse(arguments: &[String]) -> Result<Arguments> {
    let mut parsed = Arguments {
        quick: false,
        peers_only: false,
        write: false,
        table_only: false,
        rows: Vec::new(),
        rounds: None,
        binary: None,
        directory: None,
    };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().with_context(|| format!("{argument} takes a value"));
        match argument.as_str() {
            "--quick" => parsed.quick = true,
            "--peers-only" => parsed.peers_only = true,
            "--write" => parsed.write = true,
            "--table-only" => parsed.table_only = true,
            "--rows" => parsed.rows = value()?.split(',').map(str::to_owned).collect(),
            "--rounds" => parsed.rounds = Some(value()?.parse().context("--rounds")?),
            "--binary" => parsed.binary = Some(value()?.into()),
            "--dir" => parsed.directory = Some(value()?.into()),
            other => bail!(
                "bench does not know '{other}': [--quick] [--peers-only] [--write] [--table-only] \
                 [--rows a,b] [--rounds N] [--binary PATH] [--dir PATH]; the rows are {}",
                Row::names()
            ),
        }
    }
    if let Some(unknown) =
        parsed.rows.iter().find(|name| Row::ALL.iter().all(|r| r.name() != *name))
    {
        bail!("there is no row '{unknown}': the rows are {}", Row::names());
    }
    ensure!(parsed.rounds != Some(0), "--rounds must be at least 1");
    Ok(parsed)
}
