//! Rows that fio cannot measure: creating and cloning, recovery, memory.
//!
//! A command's time is that of one request and its answer on a connection that is open already:
//! what a program that manages disks waits for, without the start of a process.

use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::server::{EXPORT, Kind, Options, Server};

use super::Bench;
use super::access::Access;
use super::client::Client;
use super::plan::{Setting, State, Subject};
use super::report::{Column, Goal, Line, Unit};
use super::subject::Stage;

const BUSY: Access = Access::random_write(32);
/// Number of VDIs that lie idle while memory is measured.
const IDLE_VDIS: u32 = 1000;

/// Creating and cloning VDIs.
///
/// # Errors
/// If the server fails.
pub(crate) fn create_and_clone(bench: &Bench) -> Result<Vec<Line>> {
    ensure!(bench.binary.is_some(), "there is no peer to measure here");
    let mut stage = Stage::new(bench, Setting::NBD, Subject::Ours, State::FilledAnew);
    let commands = bench.scale.commands;
    let (created, cloned) = stage.turn_with(|_, server| {
        let mut control = Control::connect(&server.control_socket())?;
        let (mut created, mut cloned) = (Vec::new(), Vec::new());
        for number in 0..commands {
            let start = clock::now();
            control.create(&format!("new{number}"), 10 << 30)?;
            created.push(milliseconds(start.elapsed()));
            let start = clock::now();
            control.clone_vdi(EXPORT, &format!("clone{number}"))?;
            cloned.push(milliseconds(start.elapsed()));
        }
        Ok((created, cloned))
    })?;
    let line = |measure: &str, times: Vec<f64>| Line {
        measure: measure.to_owned(),
        unit: Unit::Milliseconds,
        note: format!(
            "median of {}; 99th percentile {:.2} ms",
            times.len(),
            quantile(&times, 0.99)
        ),
        columns: vec![Column::of("ours", times)],
        goals: vec![Goal::AtMost { limit: 1.0 }],
    };
    Ok(vec![line("create a VDI", created), line("clone a VDI in use", cloned)])
}

/// Time from the start of the daemon until it serves, after kill -9 with as much log as a busy
/// disk ever makes.
///
/// # Errors
/// If the server fails.
pub(crate) fn open_after_kill(bench: &Bench) -> Result<Vec<Line>> {
    ensure!(bench.binary.is_some(), "there is no peer to measure here");
    let mut stage = Stage::new(bench, Setting::NBD, Subject::Ours, State::Filled);
    let mut column = Column::new("ours");
    let mut log_used = Vec::new();
    for round in 1..=bench.scale.rounds {
        let (used, time) = stage.turn_with(|bench, server| {
            let used = kill_with_full_log(bench, server)?;
            Ok((used, server.start()?))
        })?;
        console::say(&format!("round {round}: log {used} % used, open after {time:.3?}"));
        column.values.push(milliseconds(time));
        log_used.push(used);
    }
    let used = log_used.iter().max().copied().unwrap_or(0);
    Ok(vec![Line {
        measure: "open after kill -9 with a full log".to_owned(),
        unit: Unit::Milliseconds,
        note: format!(
            "worst {:.0} ms; up to {used} % of the log in use when killed",
            quantile(&column.values, 1.0)
        ),
        columns: vec![column],
        goals: vec![Goal::AtMost { limit: 1000.0 }],
    }])
}

/// Keeps the disk busy until the log is as full as it gets, then kills the daemon. Returns the
/// percentage of the log that was in use.
fn kill_with_full_log(bench: &Bench, server: &mut Server) -> Result<u64> {
    let mut control = Control::connect(&server.control_socket())?;
    let client = Client::nbd(server);
    std::thread::scope(|scope| {
        let (stop, stopped) = mpsc::channel::<()>();
        let load = scope.spawn(move || {
            let load = || client.run(&BUSY, bench.scale.disk_bytes, bench);
            // Until the server is gone: then fio fails, as it should.
            while stopped.try_recv().is_err() && load().is_ok() {}
        });
        let start = clock::now();
        let patience = 3 * bench.scale.runtime;
        let mut most = 0;
        let used = loop {
            let used = control.stat("log_used_percent")?;
            // First see how high it goes, then wait until it is there again.
            let watched = start.elapsed() > patience / 2;
            if (watched && used * 100 >= most * 95 && used > 0) || start.elapsed() > patience {
                break used;
            }
            most = most.max(used);
            clock::sleep(Duration::from_millis(5));
        };
        server.kill()?;
        if stop.send(()).is_err() {
            // The load ended by itself.
        }
        load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
        Ok(used)
    })
}

/// Resident memory with many idle VDIs, after a load has filled the cache.
///
/// # Errors
/// If the server or fio fails.
pub(crate) fn memory(bench: &Bench) -> Result<Vec<Line>> {
    let binary = bench.binary.clone().context("there is no peer to measure here")?;
    let options = Options { cache_bytes: 64 << 20, ..Options::disk(bench.scale.disk_bytes) };
    let directory = bench.data.join("memory");
    let kind = Kind::Parallax(binary);
    let mut server = Server::create(&kind, &options, &directory, &bench.scratch)?;
    let mut control = Control::connect(&server.control_socket())?;
    for number in 0..IDLE_VDIS {
        control.create(&format!("idle{number}"), 10 << 30)?;
    }
    let client = Client::nbd(&server);
    for access in [BUSY, Access::random_read(32)] {
        client.run(&access, bench.scale.disk_bytes, bench)?;
    }
    clock::sleep(Duration::from_secs(2));
    let resident = resident_bytes(server.process_id()?)?;
    let cache = control.stat("cache_bytes")?;
    server.stop()?;
    let mebibytes = resident as f64 / f64::from(1 << 20);
    Ok(vec![Line {
        measure: "resident memory, 1,000 idle VDIs, 64 MiB cache".to_owned(),
        unit: Unit::Mebibytes,
        columns: vec![Column::of("ours", vec![mebibytes])],
        goals: vec![Goal::AtMost { limit: 128.0 }],
        note: format!("{} MiB of nodes in the cache, after a random load", cache >> 20),
    }])
}

/// Memory of a process that is not swapped out.
///
/// # Errors
/// If it is gone.
pub(crate) fn resident_bytes(process: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes: u64 = line
        .and_then(|rest| rest.split_whitespace().next())
        .context("find VmRSS")?
        .parse()
        .context("read VmRSS")?;
    Ok(kibibytes << 10)
}

/// For the table.
pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The value that a fraction `at` of `values` does not exceed.
pub(crate) fn quantile(values: &[f64], at: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    let target = at * last as f64;
    // The nearest rank, found without a cast from a float.
    let rank = (0..=last).find(|&rank| rank as f64 >= target - 0.5).unwrap_or(last);
    sorted.get(rank).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_ranks() {
        let check = |values: &[f64], at: f64, expected: f64| {
            assert_eq!(quantile(values, at), expected, "{values:?} {at}");
        };
        check(&[7.0], 0.5, 7.0);
        check(&[3.0, 1.0, 2.0], 0.5, 2.0);
        check(&[3.0, 1.0, 2.0], 1.0, 3.0);
        check(&[3.0, 1.0, 2.0], 0.0, 1.0);
        let hundred: Vec<f64> = (1..=101).map(f64::from).collect();
        check(&hundred, 0.99, 100.0);
    }
}
