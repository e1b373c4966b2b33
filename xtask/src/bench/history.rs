//! Disks with many snapshots, and clones of clones: whether a long past makes them slow.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::nbd;
use crate::qmp::Qmp;
use crate::random::Random;
use crate::server::{EXPORT, Kind, Options, Server};

use super::Bench;
use super::access::Access;
use super::crowd;
use super::latency::{milliseconds, quantile};
use super::plan::OURS_WITHOUT;
use super::plot::{Curve, Plot};
use super::report::{Column, Goal, Line, Measured, Unit};
use super::subject::internal_snapshot;
use super::turns::{self, Entrant};

/// Clients that write and take snapshots.
const CLIENTS: usize = 16;
/// Random writes before each snapshot.
const WRITES: u32 = 4;
const BLOCK_BYTES: u64 = 4096;
/// What a qcow2 disk takes space in.
const CLUSTER_BYTES: u64 = 64 << 10;
/// Longest that qcow2 is given to take its snapshots.
const QCOW2_PATIENCE: Duration = Duration::from_secs(180);
/// Part that must be left of what a disk without a past reaches.
const KEPT: f64 = 0.98;
/// Column of a qcow2 disk without a past.
const QCOW2_WITHOUT: &str = "qcow2 without";

const READ: (&str, Access) = ("random read, depth 32", Access::random_read(32));
const WRITE: (&str, Access) = ("random write, depth 32", Access::random_write(32));

/// Reads and writes of a disk with more and more snapshots, beside one that has had the same writes
/// and has no snapshot, and beside qcow2; the first use after opening; deleting one.
///
/// # Errors
/// If a server or a client fails.
pub(crate) fn many_snapshots(bench: &Bench) -> Result<Measured> {
    ensure!(bench.binary.is_some(), "there is nothing of ours to compare with");
    let disk_bytes = bench.scale.past_disk_bytes;
    let options = Options {
        // Room for the disk, and for what the loads at each count leave behind in its snapshots.
        store_bytes: disk_bytes * 8,
        preallocate: true,
        ..Options::disk(disk_bytes)
    };
    // And three disks of qcow2.
    if !bench.has_room(2 * options.store_bytes + 4 * disk_bytes)? {
        return Ok(Measured::default());
    }
    let (mut peers, places): (Vec<Entrant>, Vec<u32>) =
        peers(bench, disk_bytes)?.into_iter().unzip();
    let mut past = Past::new(bench, &options)?;
    let mut measured = Measured::default();
    let mut curves = vec![Curve::new("ours"), Curve::new(OURS_WITHOUT)];
    for count in [0].iter().chain(bench.scale.snapshots) {
        let taken = past.grow(*count)?;
        past.entrants.append(&mut peers);
        for load in [READ, WRITE] {
            let line = past.load(load, &taken)?;
            if load == READ {
                add_points(&mut curves, &line, *count, &places);
            }
            measured.lines.push(line);
        }
        // The peers' snapshots do not become more: they take part once.
        past.entrants.truncate(2);
        measured.lines.push(past.first_use()?);
    }
    measured.lines.push(past.delete_some()?);
    measured.plots.push(Plot {
        file: "snapshots".to_owned(),
        title: "Random reads of a disk with many snapshots (4 KiB, depth 32)".to_owned(),
        across: "snapshots of the disk; of the chain: files that it stands on".to_owned(),
        unit: Unit::Iops,
        curves,
    });
    Ok(measured)
}

/// The points of a line whose first columns are ours, with `count` snapshots, and whose others are
/// peers, with as many as `places` tells.
fn add_points(curves: &mut Vec<Curve>, line: &Line, count: u32, places: &[u32]) {
    for (index, column) in line.columns.iter().enumerate() {
        let Some(value) = line.value(&column.label) else { continue };
        let place = index.checked_sub(2).and_then(|index| places.get(index)).copied();
        let label = match column.label.as_str() {
            QCOW2_WITHOUT => "qcow2, internal",
            label if label.starts_with("qcow2, internal") => "qcow2, internal",
            label if label.starts_with("qcow2, chain") => "qcow2, chain",
            label => label,
        };
        let point = (f64::from(place.unwrap_or(count)), value);
        match curves.iter_mut().find(|curve| curve.label == label) {
            Some(curve) => curve.points.push(point),
            None => curves.push(Curve { label: label.to_owned(), points: vec![point] }),
        }
    }
}

/// A disk with a past, and one that has had the same writes.
struct Past<'a> {
    bench: &'a Bench,
    /// The first two are ours, with and without snapshots.
    entrants: Vec<Entrant>,
    /// Of all snapshots.
    handles: Vec<String>,
}

impl<'a> Past<'a> {
    fn new(bench: &'a Bench, options: &Options) -> Result<Self> {
        let mut entrants = Vec::new();
        for (label, name) in [("ours", "snapshots"), (OURS_WITHOUT, "none")] {
            let server = turns::ours(bench, options, name)?;
            turns::fill(bench, &server, options.disk_bytes)?;
            entrants.push(Entrant::stopped(label, server)?);
        }
        Ok(Self { bench, entrants, handles: Vec::new() })
    }

    /// Writes to both, and takes snapshots of the first until it has `count`. Returns how that went.
    fn grow(&mut self, count: u32) -> Result<String> {
        let from = u32::try_from(self.handles.len())?;
        let mut said = String::new();
        if count == from {
            return Ok(said);
        }
        for (index, entrant) in self.entrants.iter_mut().enumerate() {
            let server = &mut entrant.server;
            server.start()?;
            let connect = || {
                let control = Control::connect(&server.control_socket())?;
                Ok((nbd::Client::connect(&server.nbd_socket(), EXPORT)?, control))
            };
            let step = |(client, control): &mut (nbd::Client, Control), number: u32| {
                write_some(client, number)?;
                Ok(if index == 0 { Some(control.snapshot(EXPORT)?) } else { None })
            };
            let crowd = crowd::each(CLIENTS, from..count, connect, step)?;
            server.stop()?;
            if index == 0 {
                said = format!(
                    "taken by {CLIENTS} clients with {WRITES} writes before each, {:.0} a second",
                    crowd.per_second()
                );
                console::say(&format!("{count} snapshots: {said}"));
            }
            self.handles.extend(crowd.made.into_iter().flatten());
        }
        ensure!(self.handles.len() == count as usize, "{} snapshots", self.handles.len());
        Ok(said)
    }

    fn measure_of(&self, what: &str) -> String {
        format!("{what}, {} snapshots", self.handles.len())
    }

    fn load(&mut self, (what, access): (&str, Access), taken: &str) -> Result<Line> {
        let measure = self.measure_of(what);
        let columns = turns::measure(self.bench, &measure, &access, &mut self.entrants)?;
        Ok(Line {
            measure,
            unit: Unit::Iops,
            columns,
            goals: vec![Goal::AtLeastTimes { factor: KEPT, column: OURS_WITHOUT.to_owned() }],
            note: taken.to_owned(),
        })
    }

    /// From a request for the disk to the first block read, with a store that was just opened.
    fn first_use(&mut self) -> Result<Line> {
        let mut columns = Vec::new();
        for Entrant { label, server, export } in &mut self.entrants {
            let mut column = Column::new(label);
            for _ in 0..self.bench.scale.rounds {
                server.start_unopened()?;
                let start = clock::now();
                let mut client = nbd::Client::connect(&server.nbd_socket(), export)?;
                client.ask(nbd::Command::Read, client.size_bytes() / 2, 4096)?;
                column.values.push(milliseconds(start.elapsed()));
                drop(client);
                server.stop()?;
            }
            columns.push(column);
        }
        Ok(Line {
            measure: self.measure_of("first use of a disk after the store was opened"),
            unit: Unit::Milliseconds,
            columns,
            goals: Vec::new(),
            note: "to connect, and to read a block".to_owned(),
        })
    }

    /// Deletes some snapshots, anywhere among all.
    fn delete_some(&mut self) -> Result<Line> {
        let measure = self.measure_of("delete a snapshot");
        let server = &mut self.entrants.first_mut().context("ours is not there")?.server;
        server.start()?;
        let mut control = Control::connect(&server.control_socket())?;
        let mut random = Random::new(1);
        let (mut times, mut flushes) = (Vec::new(), Vec::new());
        // What none that is durable when it is answered can be faster than.
        let block = data(1, BLOCK_BYTES);
        let file = std::fs::File::create(self.bench.data.join("flushed"))?;
        for _ in 0..self.bench.scale.commands.min(self.handles.len()) {
            let index = usize::try_from(random.below(self.handles.len() as u64))?;
            let handle = self.handles.swap_remove(index);
            let start = clock::now();
            control.remove_snapshot(&handle)?;
            times.push(milliseconds(start.elapsed()));
            let start = clock::now();
            file.write_all_at(&block, 0)?;
            file.sync_data()?;
            flushes.push(milliseconds(start.elapsed()));
        }
        server.stop()?;
        std::fs::remove_file(self.bench.data.join("flushed"))?;
        Ok(Line {
            measure,
            unit: Unit::Milliseconds,
            note: format!(
                "median of {}, chosen at random; 99th percentile {:.2} ms",
                times.len(),
                quantile(&times, 0.99)
            ),
            columns: vec![
                Column::of("ours", times),
                Column::of("bare file: a block and fdatasync instead", flushes),
            ],
            goals: vec![Goal::AtMost { limit: 1.0 }],
        })
    }
}

/// The writes before a snapshot: the same for the same number.
fn write_some(client: &mut nbd::Client, number: u32) -> Result<()> {
    let mut random = Random::new(number.into());
    let blocks = client.size_bytes() / BLOCK_BYTES;
    let offsets = (0..WRITES).map(|_| random.below(blocks) * BLOCK_BYTES);
    turns::write_at(client, offsets, &data(number, BLOCK_BYTES))
}

/// Bytes that are not zeroes, and not those of another number.
fn data(number: u32, bytes: u64) -> Vec<u8> {
    let mut random = Random::new(number.into());
    (0..bytes / 8).flat_map(|_| random.next().to_le_bytes()).collect()
}

/// qcow2 without snapshots, with as many internal ones as it takes in some minutes, and on a chain of
/// files; with the number of snapshots of each.
fn peers(bench: &Bench, disk_bytes: u64) -> Result<Vec<(Entrant, u32)>> {
    let levels = bench.scale.chain;
    let fresh = |name: &str| {
        let options = Options::disk(disk_bytes);
        let directory = bench.scratch.join(name);
        let server = Server::create(&Kind::Qcow2, &options, &bench.data.join(name), &directory)?;
        turns::fill(bench, &server, disk_bytes)?;
        Ok::<_, anyhow::Error>(server)
    };
    let without = fresh("qcow2")?;
    let without = (Entrant::stopped(QCOW2_WITHOUT, without)?, 0);
    let internal = fresh("internal")?;
    let taken = take_internal(&internal, bench.scale.qcow2_snapshots)?;
    let internal = Entrant::stopped(&format!("qcow2, internal: {taken}"), internal)?;
    let chain = turns::qcow2_chain(bench, disk_bytes, "chain", levels, |server, level| {
        if level == 0 {
            return turns::fill(bench, server, disk_bytes);
        }
        write_some(&mut nbd::Client::connect(&server.nbd_socket(), EXPORT)?, level)
    })?;
    let chain = Entrant::stopped(&format!("qcow2, chain of {levels}"), chain)?;
    Ok(vec![without, (internal, taken), (chain, levels)])
}

/// Takes internal snapshots as ours are taken, one after the other; how many before patience or qcow2
/// came to an end.
fn take_internal(server: &Server, wanted: u32) -> Result<u32> {
    let mut qmp = Qmp::connect(&server.control_socket())?;
    let mut client = nbd::Client::connect(&server.nbd_socket(), EXPORT)?;
    let start = clock::now();
    for number in 0..wanted {
        if start.elapsed() > QCOW2_PATIENCE {
            console::say(&format!("qcow2 took {number} internal snapshots in that time"));
            return Ok(number);
        }
        write_some(&mut client, number)?;
        if let Err(error) = internal_snapshot(&mut qmp, &format!("s{number}")) {
            console::say(&format!("qcow2 took {number} internal snapshots: {error:#}"));
            return Ok(number);
        }
    }
    Ok(wanted)
}

/// Random reads of a clone of a clone of a clone, each level of which holds an equal part of the blocks,
/// beside a disk that holds all of them.
///
/// # Errors
/// If a server or a client fails.
pub(crate) fn clone_depth(bench: &Bench) -> Result<Vec<Line>> {
    ensure!(bench.binary.is_some(), "there is nothing of ours to compare with");
    let disk_bytes = bench.scale.past_disk_bytes;
    let (levels, chain_levels) = (bench.scale.clone_levels, bench.scale.chain);
    let options = Options::disk(disk_bytes);
    // Each of the four once, and what rewriting metadata takes.
    if !bench.has_room(6 * disk_bytes)? {
        return Ok(Vec::new());
    }
    let deep = ours_deep(bench, &options)?;
    let flat = turns::ours(bench, &options, "flat")?;
    for level in 0..=levels {
        write_level(&flat, EXPORT, BLOCK_BYTES, level, levels)?;
    }
    let write_cluster =
        |server: &Server, level| write_level(server, EXPORT, CLUSTER_BYTES, level, chain_levels);
    let write_all =
        |server: &Server, _| (0..=chain_levels).try_for_each(|level| write_cluster(server, level));
    let chain = turns::qcow2_chain(bench, disk_bytes, "chain", chain_levels, write_cluster)?;
    let qcow2 = turns::qcow2_chain(bench, disk_bytes, "qcow2", 0, write_all)?;
    let mut entrants = vec![
        Entrant { export: level_name(levels), ..Entrant::stopped("ours", deep)? },
        Entrant::stopped(OURS_WITHOUT, flat)?,
        Entrant::stopped(&format!("qcow2, chain of {chain_levels}"), chain)?,
        Entrant::stopped(QCOW2_WITHOUT, qcow2)?,
    ];
    let measure = format!("random read, depth 32, of a clone {levels} deep");
    let columns = turns::measure(bench, &measure, &READ.1, &mut entrants)?;
    Ok(vec![Line {
        measure,
        unit: Unit::Iops,
        columns,
        goals: vec![Goal::AtLeastTimes { factor: KEPT, column: OURS_WITHOUT.to_owned() }],
        note: "each level holds an equal part of the blocks".to_owned(),
    }])
}

/// A clone of a clone …; each is cloned after it was written to.
fn ours_deep(bench: &Bench, options: &Options) -> Result<Server> {
    let levels = bench.scale.clone_levels;
    let server = turns::ours(bench, options, "deep")?;
    let mut control = Control::connect(&server.control_socket())?;
    for level in 0..=levels {
        if level > 0 {
            control.clone_vdi(&level_name(level - 1), &level_name(level))?;
        }
        write_level(&server, &level_name(level), BLOCK_BYTES, level, levels)?;
    }
    Ok(server)
}

fn level_name(level: u32) -> String {
    if level == 0 { EXPORT.to_owned() } else { format!("clone{level}") }
}

/// Writes one level's part of a disk: every so many units, which differ from those of other levels.
fn write_level(server: &Server, export: &str, unit: u64, level: u32, levels: u32) -> Result<()> {
    let mut client = nbd::Client::connect(&server.nbd_socket(), export)?;
    let units = client.size_bytes() / unit;
    let offsets = units_of(level, levels, units).map(|number| number * unit);
    turns::write_at(&mut client, offsets, &data(level, unit))
}

/// The units that a level writes.
fn units_of(level: u32, levels: u32, units: u64) -> impl Iterator<Item = u64> {
    (u64::from(level)..units).step_by(levels as usize + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_levels_share_all_units() {
        let mut all: Vec<u64> = (0..=6).flat_map(|level| units_of(level, 6, 100)).collect();
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
        let parts: Vec<usize> = (0..=6).map(|level| units_of(level, 6, 100).count()).collect();
        assert!(parts.iter().all(|part| (14..=15).contains(part)), "{parts:?}");
    }

    #[test]
    fn what_is_written_differs() {
        assert_eq!(data(1, 4096).len(), 4096);
        assert_eq!(data(1, 4096), data(1, 4096));
        assert_ne!(data(1, 4096), data(2, 4096));
    }

    #[test]
    fn points_stand_at_their_number_of_snapshots() {
        let column = |label: &str, value: f64| Column::of(label, vec![value]);
        let mut line = Line {
            measure: String::new(),
            unit: Unit::Iops,
            columns: vec![
                column("ours", 5.0),
                column(OURS_WITHOUT, 6.0),
                column(QCOW2_WITHOUT, 4.0),
                column("qcow2, internal: 50", 3.0),
                column("qcow2, chain of 20", 2.0),
            ],
            goals: Vec::new(),
            note: String::new(),
        };
        let mut curves = Vec::new();
        add_points(&mut curves, &line, 0, &[0, 50, 20]);
        line.columns.truncate(2);
        add_points(&mut curves, &line, 100, &[0, 50, 20]);
        let check = |label: &str, points: &[(f64, f64)]| {
            let found = curves.iter().find(|curve| curve.label == label).unwrap();
            assert_eq!(found.points, points, "{label}");
        };
        check("ours", &[(0.0, 5.0), (100.0, 5.0)]);
        check(OURS_WITHOUT, &[(0.0, 6.0), (100.0, 6.0)]);
        check("qcow2, internal", &[(0.0, 4.0), (50.0, 3.0)]);
        check("qcow2, chain", &[(20.0, 2.0)]);
    }
}
