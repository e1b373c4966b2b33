//! Garbage collection: how fast it marks, what guests notice of it, and whether all space comes back.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::fio::{self, Figures, Target};
use crate::nbd;
use crate::server::{EXPORT, Options, Server};

use super::Bench;
use super::access::Access;
use super::client::Client;
use super::plan::{Frontend, OURS_WITHOUT};
use super::report::{Column, Goal, Line, Unit};
use super::turns;

const BLOCK_BYTES: u64 = 4096;
/// What one leaf of a tree maps (docs/on-disk-format.md).
const LEAF_BYTES: u64 = 1 << 20;
/// The disk whose deletion leaves the garbage.
const GARBAGE: &str = "garbage";
/// The disk that a guest writes to.
const GUEST: &str = "guest";
const GUEST_LOAD: Access = Access::random_write(8);
/// A cache that holds hardly anything of the trees.
const SMALL_CACHE_BYTES: u64 = 16 << 20;
/// Longest that a collection may take.
const COLLECT_LIMIT: Duration = Duration::from_secs(1800);
/// How often its phase is asked for.
const POLL: Duration = Duration::from_millis(1);
const BARE: &str = "bare file: sequential read";
/// Column of what there was to give back.
const ALL: &str = "of the garbage";

/// Figures of all rounds.
struct Figured {
    cached: Column,
    uncached: Column,
    bare: Column,
    beside: Column,
    quiet: Column,
    /// Of the store, and of its file: what did not come back, and what there was.
    lost: [Column; 2],
    garbage: [Column; 2],
    collections: usize,
    misses: u64,
    nodes: u64,
}

/// Collects a store half of whose tree nodes are garbage.
///
/// # Errors
/// If a server or a client fails.
pub(crate) fn collect(bench: &Bench) -> Result<Vec<Line>> {
    let leaves = bench.scale.nodes / 2;
    let used_bytes = 2 * leaves * 2 * BLOCK_BYTES + bench.scale.past_disk_bytes;
    // What the server writes anew while it works, and the bare file.
    if !bench.has_room(2 * used_bytes + bench.scale.past_disk_bytes)? {
        return Ok(Vec::new());
    }
    let options = Options {
        // Most of it stays free, so that the daemon does not collect by itself at once.
        store_bytes: (4 * used_bytes).max(1 << 30),
        ..Options::disk(leaves * LEAF_BYTES)
    };
    let mut server = turns::ours(bench, &options, "collected")?;
    let itself = control(&server)?.collect_garbage()?.reached_bytes;
    fill(bench, &server, leaves)?;
    // The log takes its space of the file too, which is no garbage.
    guest_load(bench, &server)?;
    let reached = control(&server)?.collect_garbage()?.reached_bytes - itself;
    // What is neither a block of the guest's disk nor one of those below leaves is a node.
    let data_bytes = bench.scale.past_disk_bytes + leaves * BLOCK_BYTES;
    let nodes = reached.checked_sub(data_bytes).context("less is reached than was written")?;
    let mut figured = Figured::new(nodes / BLOCK_BYTES);
    ensure!(figured.nodes >= leaves, "{} nodes where {leaves} leaves are", figured.nodes);
    let bare = bare_file(bench)?;
    for round in 1..=bench.scale.rounds {
        figured.round(bench, &mut server, leaves)?;
        let sequential = Access::sequential_read(8);
        let read = Client::of_file(&bare, Frontend::Nbd).run(
            &sequential,
            bench.scale.past_disk_bytes,
            bench,
        )?;
        figured.bare.values.push(read.bytes_per_second);
        figured.say(round);
    }
    server.stop()?;
    Ok(figured.lines())
}

fn control(server: &Server) -> Result<Control> {
    Control::connect_patiently(&server.control_socket(), COLLECT_LIMIT)
}

/// Writes a block below every leaf of the first disk, and the guest's disk from end to end.
fn fill(bench: &Bench, server: &Server, leaves: u64) -> Result<()> {
    write_leaves(server, EXPORT, leaves)?;
    let bytes = bench.scale.past_disk_bytes;
    control(server)?.create(GUEST, bytes)?;
    let fill = format!("{} --end_fsync=1", Access::sequential_write(8).fio());
    let job = fio::job(&Target::Nbd(server.uri_of(GUEST)), bytes, &fill, &bench.scratch);
    fio::measure(job, COLLECT_LIMIT).context("fill the guest's disk").map(drop)
}

fn leaf_offsets(leaves: u64) -> impl Iterator<Item = u64> {
    (0..leaves).map(|leaf| leaf * LEAF_BYTES)
}

fn write_leaves(server: &Server, export: &str, leaves: u64) -> Result<()> {
    let mut client = nbd::Client::connect(&server.nbd_socket(), export)?;
    let data = [0xa5; 4096];
    turns::write_at(&mut client, leaf_offsets(leaves), &data)?;
    client.ask(nbd::Command::Flush, 0, 0).map(drop)
}

/// Bytes that are in use: of the store, and of its file.
fn in_use(server: &Server) -> Result<[u64; 2]> {
    let mut control = control(server)?;
    let used = control.stat("capacity_bytes")? - control.stat("free_bytes")?;
    Ok([used, server.file().metadata()?.blocks() * 512])
}

/// A file that was written once.
fn bare_file(bench: &Bench) -> Result<std::path::PathBuf> {
    let directory = bench.data.join("bare");
    std::fs::create_dir_all(&directory)?;
    let path = directory.join("bare.raw");
    let fill = format!("{} --end_fsync=1", Access::sequential_write(8).fio());
    let target = Target::File(path.clone());
    let job = fio::job(&target, bench.scale.past_disk_bytes, &fill, &bench.scratch);
    fio::measure(job, COLLECT_LIMIT).context("write the bare file")?;
    Ok(path)
}

/// Starts it again with such a cache, and nothing in that.
fn restart(server: &mut Server, cache_bytes: u64) -> Result<()> {
    server.stop()?;
    server.set_cache_bytes(cache_bytes);
    server.start().map(drop)
}

/// A collection that nothing runs beside: for how long it was marking.
fn collect_alone(server: &Server) -> Result<Duration> {
    let mut watch = control(server)?;
    let mut collect = control(server)?;
    let done = AtomicBool::new(false);
    let start = clock::now();
    std::thread::scope(|scope| {
        let collection = scope.spawn(|| {
            let collected = collect.collect_garbage();
            done.store(true, Ordering::Relaxed);
            collected.map(|_| start.elapsed())
        });
        let (mut began, mut ended) = (None, None);
        while !done.load(Ordering::Relaxed) && ended.is_none() {
            let is_marking = watch.garbage_phase()? == "marking";
            match is_marking {
                true => began = began.or_else(|| Some(start.elapsed())),
                false => ended = began.map(|_| start.elapsed()),
            }
            clock::sleep(POLL);
        }
        let joined = collection.join().map_err(|_| anyhow::anyhow!("the collection panicked"))?;
        // Too short to be seen: then it took no longer than all of it.
        Ok(ended.unwrap_or(joined?) - began.unwrap_or_default())
    })
}

/// The guest's load, with one collection after the other meanwhile; how many there were.
fn load_beside_collections(bench: &Bench, server: &Server) -> Result<(Figures, usize)> {
    let mut collector = control(server)?;
    std::thread::scope(|scope| {
        let load = scope.spawn(|| guest_load(bench, server));
        let mut collections = 0;
        while !load.is_finished() {
            collector.collect_garbage()?;
            collections += 1;
        }
        let figures = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
        Ok((figures, collections))
    })
}

fn guest_load(bench: &Bench, server: &Server) -> Result<Figures> {
    let client = Client::Fio(Target::Nbd(server.uri_of(GUEST)));
    client.run(&GUEST_LOAD, bench.scale.past_disk_bytes, bench)
}

impl Figured {
    fn new(nodes: u64) -> Self {
        let pair = |label| [Column::new(label), Column::new(label)];
        Self {
            cached: Column::new("ours"),
            uncached: Column::new("ours"),
            bare: Column::new(BARE),
            beside: Column::new("ours"),
            quiet: Column::new(OURS_WITHOUT),
            lost: pair("ours"),
            garbage: pair(ALL),
            collections: 0,
            misses: 0,
            nodes,
        }
    }

    /// One round: garbage is made and collected, with and without a cache, and a guest is watched with
    /// and without collections of more of it. The guest comes last: what it frees between blocks that
    /// are used stays with the file, and is no garbage.
    fn round(&mut self, bench: &Bench, server: &mut Server, leaves: u64) -> Result<()> {
        control(server)?.collect_garbage()?;
        let before = in_use(server)?;
        control(server)?.create(GARBAGE, leaves * LEAF_BYTES)?;
        write_leaves(server, GARBAGE, leaves)?;
        // A clean stop brings all nodes to the store.
        restart(server, SMALL_CACHE_BYTES)?;
        let full = in_use(server)?;
        control(server)?.remove(GARBAGE)?;
        let marking = collect_alone(server)?;
        let bytes = self.nodes * BLOCK_BYTES;
        self.uncached.values.push(bytes as f64 / marking.as_secs_f64());
        let after = in_use(server)?;
        let columns = self.lost.iter_mut().zip(&mut self.garbage);
        let seen = before.into_iter().zip(full).zip(after);
        for ((lost, garbage), ((before, full), after)) in columns.zip(seen) {
            lost.values.push(mebibytes_above(after, before));
            garbage.values.push(mebibytes_above(full, before));
        }

        restart(server, 2 * bytes + SMALL_CACHE_BYTES)?;
        warm(bench, server, leaves)?;
        let misses = control(server)?.stat("cache_misses")?;
        let marking = collect_alone(server)?;
        self.misses = self.misses.max(control(server)?.stat("cache_misses")? - misses);
        self.cached.values.push(self.nodes as f64 / marking.as_secs_f64());

        control(server)?.create(GARBAGE, leaves * LEAF_BYTES)?;
        write_leaves(server, GARBAGE, leaves)?;
        restart(server, SMALL_CACHE_BYTES)?;
        let p99 = |figures: Figures| figures.p99_milliseconds.context("fio gave no percentile");
        self.quiet.values.push(p99(guest_load(bench, server)?)?);
        control(server)?.remove(GARBAGE)?;
        let (figures, collections) = load_beside_collections(bench, server)?;
        self.beside.values.push(p99(figures)?);
        self.collections += collections;
        Ok(())
    }

    fn say(&self, round: usize) {
        let last = |column: &Column| column.values.last().copied().unwrap_or_default();
        let [lost, file_lost] = self.lost.each_ref().map(last);
        let [garbage, file_garbage] = self.garbage.each_ref().map(last);
        console::say(&format!(
            "round {round}: marked {}, without a cache {}; 99th percentile {:.2} ms, alone {:.2} ms; {lost:.1} \
             of {garbage:.1} MiB did not come back, {file_lost:.1} of {file_garbage:.1} to the file system",
            Unit::Iops.show(last(&self.cached)),
            Unit::BytesPerSecond.show(last(&self.uncached)),
            last(&self.beside),
            last(&self.quiet),
        ));
    }

    fn lines(self) -> Vec<Line> {
        let nodes = self.nodes;
        let [lost, file_lost] = self.lost;
        let [garbage, file_garbage] = self.garbage;
        let most = |factor: f64, column: &str| {
            vec![Goal::AtMostTimes { factor, column: column.to_owned() }]
        };
        vec![
            Line {
                measure: "garbage collection: nodes marked, from the cache".to_owned(),
                unit: Unit::Iops,
                columns: vec![self.cached],
                goals: vec![Goal::AtLeast { limit: 1e6 }],
                note: format!("{nodes} nodes, of which {} were not in the cache", self.misses),
            },
            Line {
                measure: "garbage collection: nodes marked, nothing in the cache".to_owned(),
                unit: Unit::BytesPerSecond,
                columns: vec![self.uncached, self.bare],
                goals: vec![Goal::AtLeastTimes { factor: 0.7, column: BARE.to_owned() }],
                note: format!("{nodes} nodes of 4 KiB"),
            },
            Line {
                measure: "99th percentile of random writes, depth 8, beside garbage collections"
                    .to_owned(),
                unit: Unit::Milliseconds,
                columns: vec![self.beside, self.quiet],
                goals: most(1.5, OURS_WITHOUT),
                note: format!(
                    "one after the other, {} in all; the first of a round frees the garbage",
                    self.collections
                ),
            },
            Line {
                measure: "space that garbage still takes after a collection".to_owned(),
                unit: Unit::Mebibytes,
                columns: vec![lost, garbage],
                goals: most(0.01, ALL),
                note: "blocks of the store that are not free".to_owned(),
            },
            Line {
                measure: "space that garbage still takes of the file system".to_owned(),
                unit: Unit::Mebibytes,
                columns: vec![file_lost, file_garbage],
                goals: most(0.01, ALL),
                note: "blocks of the store's file, as stat counts them".to_owned(),
            },
        ]
    }
}

/// Has the nodes of both disks in the cache.
fn warm(bench: &Bench, server: &Server, leaves: u64) -> Result<()> {
    let mut client = nbd::Client::connect(&server.nbd_socket(), EXPORT)?;
    turns::read_at(&mut client, leaf_offsets(leaves), 4096)?;
    let mut client = nbd::Client::connect(&server.nbd_socket(), GUEST)?;
    turns::read_at(&mut client, leaf_offsets(bench.scale.past_disk_bytes / LEAF_BYTES), 4096)
}

fn mebibytes_above(bytes: u64, base: u64) -> f64 {
    bytes.saturating_sub(base) as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_lie_a_mebibyte_apart() {
        assert_eq!(leaf_offsets(3).collect::<Vec<_>>(), [0, 1 << 20, 2 << 20]);
        assert_eq!(mebibytes_above(5 << 20, 3 << 20), 2.0);
        assert_eq!(mebibytes_above(3 << 20, 5 << 20), 0.0);
    }

    #[test]
    fn what_came_back_is_judged_by_what_there_was() {
        let check = |lost: f64, expected: bool| {
            let mut figured = Figured::new(7);
            for (columns, value) in [(&mut figured.lost, lost), (&mut figured.garbage, 200.0)] {
                for column in columns {
                    column.values.push(value);
                }
            }
            let lines = figured.lines();
            let judged = |line: &Line| line.goals.first().and_then(|goal| line.is_reached(goal));
            let all: Vec<_> = lines.iter().map(judged).collect();
            assert_eq!(all, [None, None, None, Some(expected), Some(expected)]);
        };
        check(2.0, true);
        check(2.1, false);
    }
}
