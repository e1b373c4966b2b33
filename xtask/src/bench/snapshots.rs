//! Snapshots of a disk that is in use: how long they take, and what they cost the guest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::fio::Figures;
use crate::qmp::Qmp;
use crate::server::{EXPORT, Server};

use super::access::Access;
use super::client::Client;
use super::latency::quantile;
use super::plan::{Frontend, OURS_WITHOUT, Setting, State, Subject};
use super::plot::{Curve, Plot};
use super::report::{Column, Goal, Line, Measured, Unit};
use super::subject::{Stage, internal_snapshot, timed_beside};
use super::{Bench, btrfs};

const BUSY: Access = Access::random_write(32);
/// Time from one snapshot to the next: 100 a second.
const INTERVAL: Duration = Duration::from_millis(10);
/// The same for qcow2, which stops the guest for each.
const QCOW2_INTERVAL: Duration = Duration::from_millis(500);
/// Snapshots a second that many clients take, and what the guest must keep; the others are points of
/// the curve.
const RATES: [(u32, Option<f64>); 4] =
    [(10, None), (100, None), (1_000, Some(0.95)), (10_000, Some(0.9))];
/// Which part of them must have been taken.
const TAKEN_AT_LEAST: f64 = 0.95;
/// Connections that they come by, if each is asked for.
const CLIENTS: u32 = 16;
/// Series that they come in, if they are asked for so.
const SERIES_PER_SECOND: u32 = 10;
const NODE_BYTES: u64 = 4096;
const VERSION_BYTES: u64 = 32;
const SNAPSHOT_BYTES: u64 = 256;
const BTRFS_WITH: &str = "btrfs, with its copies";
const BTRFS_WITHOUT: &str = "btrfs without";

/// What the rounds of [`busy`] have shown.
struct Busy {
    /// Times of snapshots, in milliseconds.
    ours: Vec<f64>,
    qcow2: Vec<f64>,
    btrfs: Vec<f64>,
    /// A snapshot is durable when it is answered: what a flush takes, it takes at least.
    flushes: Vec<f64>,
    /// What guests reached: ours with and without, btrfs with and without.
    guests: [Column; 4],
    /// Snapshots of ours in a second.
    per_second: Vec<f64>,
}

/// Snapshots of a disk under random writes, and what they cost the guest.
///
/// # Errors
/// If a server or fio fails.
pub(crate) fn busy(bench: &Bench) -> Result<Vec<Line>> {
    let mut shown = Busy {
        ours: Vec::new(),
        qcow2: Vec::new(),
        btrfs: Vec::new(),
        flushes: Vec::new(),
        guests: ["ours", OURS_WITHOUT, BTRFS_WITH, BTRFS_WITHOUT].map(Column::new),
        per_second: Vec::new(),
    };
    for round in 1..=bench.scale.rounds {
        if bench.binary.is_some() {
            shown.turn_of_ours(bench, round)?;
        }
        shown.turns_of_peers(bench, round)?;
    }
    Ok(shown.lines())
}

impl Busy {
    fn turn_of_ours(&mut self, bench: &Bench, round: usize) -> Result<()> {
        let mut stage = Stage::new(bench, Setting::NBD, Subject::Ours, State::FilledAnew);
        let quiet = stage.turn(&BUSY)?.figures;
        let (busy, times) = stage.turn_with(|bench, server| {
            let mut control = Control::connect(&server.control_socket())?;
            let snapshot = || control.snapshot(EXPORT).map(drop);
            timed_beside(|| load(bench, server), INTERVAL, snapshot)
        })?;
        let time = bench.scale.runtime + bench.scale.ramp;
        self.per_second.push(times.len() as f64 / time.as_secs_f64());
        self.guest(0, busy, quiet);
        say(round, "ours", quiet, busy, &times);
        self.ours.extend(times);
        Ok(())
    }

    fn turns_of_peers(&mut self, bench: &Bench, round: usize) -> Result<()> {
        let mut stage = Stage::new(bench, Setting::NBD, Subject::Qcow2, State::FilledAnew);
        let (_, times) = stage.turn_with(|bench, server| {
            let mut qmp = Qmp::connect(&server.control_socket())?;
            let mut number = 0;
            let snapshot = || {
                number += 1;
                internal_snapshot(&mut qmp, &format!("s{number}"))
            };
            timed_beside(|| load(bench, server), QCOW2_INTERVAL, snapshot)
        })?;
        self.qcow2.extend(times);
        let mut stage = Stage::new(bench, Setting::NBD, Subject::File, State::FilledAnew);
        let (_, times) = stage.turn_on_file(|bench, path| {
            let file = std::fs::File::open(path)?;
            let flush = || Ok(file.sync_data()?);
            let client = Client::of_file(path, Frontend::Nbd);
            let load = || client.run(&BUSY, bench.scale.disk_bytes, bench);
            timed_beside(load, INTERVAL, flush)
        })?;
        self.flushes.extend(times);
        if let Some(btrfs::Shown { quiet, busy, times }) = btrfs::measure(bench, &BUSY, INTERVAL)? {
            self.guest(2, busy, quiet);
            say(round, "btrfs", quiet, busy, &times);
            self.btrfs.extend(times);
        }
        Ok(())
    }

    /// Keeps what a guest reached with and without snapshots, in the columns from `first` on.
    fn guest(&mut self, first: usize, with: Figures, without: Figures) {
        let columns = self.guests.iter_mut().skip(first);
        for (column, figures) in columns.zip([with, without]) {
            column.values.push(figures.iops);
        }
    }

    fn lines(self) -> Vec<Line> {
        let line = |measure: &str, at: f64, limit: f64| {
            let column = |label: &str, times: &[f64]| {
                let value = Some(times).filter(|times| !times.is_empty());
                Column::of(label, value.map(|times| quantile(times, at)).into_iter().collect())
            };
            let mut columns = vec![
                column("ours", &self.ours),
                column("qcow2 over NBD", &self.qcow2),
                column("bare file: fdatasync instead", &self.flushes),
                column("btrfs: reflink copy of a file", &self.btrfs),
            ];
            columns.retain(|column| column.label == "ours" || !column.values.is_empty());
            Line {
                measure: measure.to_owned(),
                unit: Unit::Milliseconds,
                columns,
                goals: vec![Goal::AtMost { limit }],
                note: format!("over {} snapshots", self.ours.len()),
            }
        };
        let rate = if self.per_second.is_empty() { 0.0 } else { quantile(&self.per_second, 0.5) };
        let mut lines = vec![
            line("snapshot of a busy disk, median", 0.5, 0.3),
            line("snapshot of a busy disk, 99th percentile", 0.99, 3.0),
        ];
        let mut note = format!("{rate:.0} snapshots a second were taken");
        if !self.btrfs.is_empty() && !self.per_second.is_empty() {
            let rate = rate * self.btrfs.len() as f64 / self.ours.len() as f64;
            note += &format!(", of btrfs {rate:.0}");
        }
        let columns = self.guests.into_iter();
        lines.push(Line {
            measure: "random write, depth 32, with 100 snapshots a second".to_owned(),
            unit: Unit::Iops,
            columns: columns.filter(|one| one.label == "ours" || !one.values.is_empty()).collect(),
            goals: vec![Goal::AtLeastTimes { factor: 0.97, column: OURS_WITHOUT.to_owned() }],
            note,
        });
        lines
    }
}

fn say(round: usize, who: &str, quiet: Figures, busy: Figures, times: &[f64]) {
    console::say(&format!(
        "round {round}, {who}: {:.0} op/s without, {:.0} op/s with {} snapshots, median {:.3} ms",
        quiet.iops,
        busy.iops,
        times.len(),
        quantile(times, 0.5)
    ));
}

/// How many snapshots are asked for.
#[derive(Clone, Copy)]
enum Way {
    /// Each by a request, of as many clients as it takes.
    Requests,
    /// In series, one after the other.
    Series,
}

impl Way {
    fn said(self) -> String {
        match self {
            Self::Requests => format!("by {CLIENTS} clients"),
            Self::Series => "in series".to_owned(),
        }
    }
}

/// Many snapshots of a disk under random writes, each asked for by itself and in series.
///
/// # Errors
/// If the server or fio fails.
pub(crate) fn rate(bench: &Bench) -> Result<Measured> {
    ensure!(bench.binary.is_some(), "there is no peer to measure here");
    let mut lines = Vec::new();
    let mut curves = Vec::new();
    let mut quiet = Vec::new();
    for way in [Way::Requests, Way::Series] {
        let mut curve = Curve::new(&format!("ours, {}", way.said()));
        for (per_second, factor) in RATES {
            let rated = Rated::measure(bench, way, per_second)?;
            quiet.extend(&rated.without.values);
            curve.points.push((quantile(&rated.taken, 0.5), quantile(&rated.with.values, 0.5)));
            if let Some(factor) = factor {
                lines.extend(rated.lines(way, per_second, factor));
            }
        }
        curves.push(curve);
    }
    for curve in &mut curves {
        curve.points.insert(0, (0.0, quantile(&quiet, 0.5)));
    }
    let plot = Plot {
        file: "snapshot-rate".to_owned(),
        title: "Random writes of a guest while snapshots are taken (4 KiB, depth 32)".to_owned(),
        across: "snapshots a second that were taken".to_owned(),
        unit: Unit::Iops,
        curves,
    };
    Ok(Measured { lines, plots: vec![plot] })
}

/// What so many snapshots a second have shown, round by round.
struct Rated {
    with: Column,
    without: Column,
    /// Snapshots in a second.
    taken: Vec<f64>,
    /// All metadata, in bytes, by snapshots.
    metadata: Vec<f64>,
    /// Milliseconds of each that was asked for by itself.
    times: Vec<f64>,
}

impl Rated {
    fn measure(bench: &Bench, way: Way, per_second: u32) -> Result<Self> {
        let (with, without) = (Column::new("ours"), Column::new(OURS_WITHOUT));
        let [taken, metadata, times] = Default::default();
        let mut rated = Self { with, without, taken, metadata, times };
        for round in 1..=bench.scale.rounds {
            rated.round(bench, way, per_second, round)?;
        }
        Ok(rated)
    }

    fn round(&mut self, bench: &Bench, way: Way, per_second: u32, round: usize) -> Result<()> {
        let mut stage = Stage::new(bench, Setting::NBD, Subject::Ours, State::FilledAnew);
        let quiet = stage.turn(&BUSY)?.figures;
        let (busy, times, counts) = stage.turn_with(|bench, server| {
            let before = counted(server)?;
            let (busy, times) = match way {
                Way::Requests => beside_many(bench, server, per_second)?,
                Way::Series => (beside_series(bench, server, per_second)?, Vec::new()),
            };
            let mut counts = counted(server)?;
            for (count, before) in counts.iter_mut().zip(before) {
                *count -= before;
            }
            Ok((busy, times, counts))
        })?;
        let time = bench.scale.runtime + bench.scale.ramp;
        let [snapshots, nodes, versions] = counts;
        let rate = snapshots as f64 / time.as_secs_f64();
        let bytes = (nodes * NODE_BYTES + versions * VERSION_BYTES) as f64 / snapshots as f64
            + SNAPSHOT_BYTES as f64;
        console::say(&format!(
            "{per_second} a second {}, round {round}: {:.0} op/s without, {:.0} op/s with {rate:.0} snapshots a \
             second; {nodes} nodes, {versions} versions",
            way.said(),
            quiet.iops,
            busy.iops
        ));
        self.without.values.push(quiet.iops);
        self.with.values.push(busy.iops);
        self.taken.push(rate);
        self.metadata.push(bytes);
        self.times.extend(times);
        Ok(())
    }

    /// What the guest keeps, and how many there were: fewer would be another measure.
    fn lines(self, way: Way, per_second: u32, factor: f64) -> [Line; 2] {
        let (taken, metadata) = (quantile(&self.taken, 0.5), quantile(&self.metadata, 0.5));
        let took = match way {
            Way::Requests => format!(
                ", in {:.2} ms (median) and {:.2} ms (99th percentile)",
                quantile(&self.times, 0.5),
                quantile(&self.times, 0.99)
            ),
            Way::Series => String::new(),
        };
        let note = format!(
            "{taken:.0} a second were taken{took}; all metadata by snapshots: {metadata:.0} bytes"
        );
        let way = way.said();
        let mut count = Column::new("ours");
        count.values = self.taken;
        let count = Line {
            measure: format!("snapshots a second that were taken of {per_second} {way}"),
            unit: Unit::Iops,
            columns: vec![count],
            goals: vec![Goal::AtLeast { limit: TAKEN_AT_LEAST * f64::from(per_second) }],
            note: String::new(),
        };
        let guest = Line {
            measure: format!("random write, depth 32, with {per_second} snapshots a second {way}"),
            unit: Unit::Iops,
            columns: vec![self.with, self.without],
            goals: vec![Goal::AtLeastTimes { factor, column: OURS_WITHOUT.to_owned() }],
            note,
        };
        [guest, count]
    }
}

/// Snapshots, and what they cost in metadata: nodes and versions.
fn counted(server: &Server) -> Result<[u64; 3]> {
    let mut control = Control::connect(&server.control_socket())?;
    let mut stat = |name| control.stat(name);
    Ok([stat("snapshots")?, stat("nodes_written")?, stat("versions_written")?])
}

/// The load, while many clients take so many snapshots a second together; with the time of each.
fn beside_many(bench: &Bench, server: &Server, per_second: u32) -> Result<(Figures, Vec<f64>)> {
    let interval = Duration::from_secs(u64::from(CLIENTS)) / per_second;
    let socket = server.control_socket();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (done, socket) = (&done, &socket);
                scope.spawn(move || -> Result<Vec<f64>> {
                    let mut control = Control::connect(socket)?;
                    let mut times = Vec::new();
                    // One after the other, not all at once.
                    let mut next = clock::now() + interval * (client + 1) / CLIENTS;
                    loop {
                        clock::sleep(next.saturating_duration_since(clock::now()));
                        if done.load(Ordering::Relaxed) {
                            return Ok(times);
                        }
                        let start = clock::now();
                        control.snapshot(EXPORT)?;
                        times.push(start.elapsed().as_secs_f64() * 1000.0);
                        next = (next + interval).max(clock::now());
                    }
                })
            })
            .collect();
        let figures = load(bench, server);
        done.store(true, Ordering::Relaxed);
        let mut times = Vec::new();
        for client in clients {
            times.extend(client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??);
        }
        Ok((figures?, times))
    })
}

/// The load, while so many snapshots a second are taken in series.
fn beside_series(bench: &Bench, server: &Server, per_second: u32) -> Result<Figures> {
    let every = Duration::from_secs(1) / per_second;
    let count = (per_second / SERIES_PER_SECOND).max(1);
    let mut control = Control::connect(&server.control_socket())?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let client = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                let end = clock::now() + every * count;
                control.series(EXPORT, every, count)?;
                clock::sleep(end.saturating_duration_since(clock::now()));
            }
            Ok(())
        });
        let figures = load(bench, server);
        done.store(true, Ordering::Relaxed);
        client.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        figures
    })
}

/// The load that snapshots are taken under.
fn load(bench: &Bench, server: &Server) -> Result<Figures> {
    Client::nbd(server).run(&BUSY, bench.scale.disk_bytes, bench)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_that_were_not_there_have_no_column() {
        let shown = |btrfs: &[f64]| Busy {
            ours: vec![2.0, 4.0, 6.0],
            qcow2: vec![50.0],
            btrfs: btrfs.to_vec(),
            flushes: vec![5.0],
            guests: ["ours", OURS_WITHOUT, BTRFS_WITH, BTRFS_WITHOUT].map(Column::new),
            per_second: vec![90.0],
        };
        let check = |btrfs: &[f64], columns: usize, note: &str| {
            let mut shown = shown(btrfs);
            let figures = |iops| Figures { iops, ..Figures::default() };
            shown.guest(0, figures(97.0), figures(100.0));
            if !btrfs.is_empty() {
                shown.guest(2, figures(10.0), figures(50.0));
            }
            let lines = shown.lines();
            let counts: Vec<usize> = lines.iter().map(|line| line.columns.len()).collect();
            assert_eq!(counts, [columns, columns, if btrfs.is_empty() { 2 } else { 4 }]);
            assert_eq!(lines[0].value("ours"), Some(4.0));
            assert_eq!(lines[2].value(OURS_WITHOUT), Some(100.0));
            assert!(lines[2].note.ends_with(note), "{}", lines[2].note);
        };
        check(&[], 3, "90 snapshots a second were taken");
        check(&[9.0], 4, "of btrfs 30");
    }
}
