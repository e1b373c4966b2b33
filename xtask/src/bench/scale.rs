//! A store with many disks: how fast they come to be, and what they cost where they are not used.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::random::Random;
use crate::server::{EXPORT, Options, Server};

use super::Bench;
use super::access::Access;
use super::crowd::{self, Crowd};
use super::latency::{milliseconds, quantile, resident_bytes};
use super::report::{Column, Goal, Line, Unit};
use super::turns::{self, Entrant};

/// Connections that disks are made by.
const CLIENTS: usize = 64;
/// Names on a page of the list.
const PAGE: u32 = 100;
/// Pages that are read before memory is looked at, and at each place that is timed.
const PAGES: u32 = 100;
/// Logical size of each of the many.
const SMALL_BYTES: u64 = 10 << 30;
/// Room for what one of the many may take of the store.
const ROOM_BYTES: u64 = 16 << 10;
/// Disks that come and go before the daemon is killed, so that its log has something in it.
const PASSING: u32 = 100;
/// Column of the same disk in a store where it is the only one.
const ALONE: &str = "ours, alone in its store";
/// Longest that the daemon may take for one answer while many wait.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// Makes many disks, opens the store, lists them, and reads one beside them.
///
/// # Errors
/// If a server or a client fails.
pub(crate) fn many_disks(bench: &Bench) -> Result<Vec<Line>> {
    let count = bench.scale.disks;
    let options = options(bench);
    if !bench.has_room(2 * bench.scale.disk_bytes + u64::from(count) * ROOM_BYTES)? {
        return Ok(Vec::new());
    }
    let mut many = turns::ours(bench, &options, "many")?;
    turns::fill(bench, &many, options.disk_bytes)?;
    let before = taken(&many)?;
    let mut lines = make(bench, &many)?;
    many.stop()?;
    let grown = taken(&many)?.saturating_sub(before);
    lines.extend(open_and_list(bench, &mut many, grown)?);

    let alone = turns::ours(bench, &options, "alone")?;
    turns::fill(bench, &alone, options.disk_bytes)?;
    let many = Entrant { label: "ours".to_owned(), server: many, export: EXPORT.to_owned() };
    let mut entrants = [many, Entrant::stopped(ALONE, alone)?];
    let measure = format!("random read, depth 32, beside {count} disks");
    lines.push(Line {
        columns: turns::measure(bench, &measure, &Access::random_read(32), &mut entrants)?,
        measure,
        unit: Unit::Iops,
        goals: vec![Goal::AtLeastTimes { factor: 0.98, column: ALONE.to_owned() }],
        note: String::new(),
    });
    Ok(lines)
}

fn options(bench: &Bench) -> Options {
    let disk = Options::disk(bench.scale.disk_bytes);
    let store_bytes = disk.store_bytes + u64::from(bench.scale.disks) * ROOM_BYTES;
    Options { store_bytes, ..disk }
}

/// Bytes that the file of a store takes.
fn taken(server: &Server) -> Result<u64> {
    Ok(server.file().metadata()?.blocks() * 512)
}

/// Names sort as the numbers do.
fn name_of(number: u32) -> String {
    format!("disk{number:07}")
}

/// Creates one half of the disks, and clones the other.
fn make(bench: &Bench, server: &Server) -> Result<Vec<Line>> {
    let count = bench.scale.disks;
    let connect = || Control::connect_patiently(&server.control_socket(), ANSWER_LIMIT);
    let source = connect()?.snapshot(EXPORT)?;
    let create = |control: &mut Control, number| control.create(&name_of(number), SMALL_BYTES);
    let clone = |control: &mut Control, number| control.clone_vdi(&source, &name_of(number));
    let created = crowd::each(CLIENTS, 0..count / 2, connect, create)?;
    let cloned = crowd::each(CLIENTS, count / 2..count, connect, clone)?;
    let line = |what: &str, made: &Crowd<()>| Line {
        measure: format!("{what} disks, {} of them, {CLIENTS} connections", made.times.len()),
        unit: Unit::Iops,
        columns: vec![Column::of("ours", vec![made.per_second()])],
        goals: vec![Goal::AtLeast { limit: 5000.0 }],
        note: format!(
            "each in {:.2} ms (median) and {:.2} ms (99th percentile)",
            quantile(&made.times, 0.5),
            quantile(&made.times, 0.99)
        ),
    };
    Ok(vec![line("create", &created), line("clone", &cloned)])
}

/// Opens the store, which has grown by so many bytes, after a clean stop and after a kill, and looks at
/// memory and the list meanwhile.
fn open_and_list(bench: &Bench, server: &mut Server, grown: u64) -> Result<Vec<Line>> {
    let count = bench.scale.disks;
    let mut random = Random::new(1);
    let (mut clean, mut killed) = (Vec::new(), Vec::new());
    let (mut opened, mut listed) = (Vec::new(), Vec::new());
    // The start, the middle and the end.
    let mut places: [Vec<f64>; 3] = Default::default();
    for round in 1..=bench.scale.rounds {
        clean.push(milliseconds(server.start()?));
        let process = server.process_id()?;
        opened.push(mebibytes(resident_bytes(process)?));
        let mut control = Control::connect(&server.control_socket())?;
        for _ in 0..PAGES {
            page(&mut control, count, random.below(u64::from(count)).try_into()?)?;
        }
        listed.push(mebibytes(resident_bytes(process)?));
        for (times, start) in places.iter_mut().zip(places_of(count)) {
            for _ in 0..PAGES {
                times.push(page(&mut control, count, start)?);
            }
        }
        for number in 0..PASSING {
            let name = format!("passing{number}");
            control.create(&name, SMALL_BYTES)?;
            control.remove(&name)?;
        }
        server.kill()?;
        killed.push(milliseconds(server.start()?));
        server.stop()?;
        let last = [&clean, &killed, &opened, &listed].map(|values| values.last().copied());
        let [clean, killed, opened, listed] = last.map(Option::unwrap_or_default);
        console::say(&format!(
            "round {round}: open {clean:.0} ms, after kill -9 {killed:.0} ms, {opened:.1} MiB, after pages \
             {listed:.1} MiB"
        ));
    }
    let line = |measure: &str, unit: Unit, limit: f64, note: String, values: Vec<f64>| Line {
        measure: format!("{measure}, {count} disks"),
        unit,
        columns: vec![Column::of("ours", values)],
        goals: vec![Goal::AtMost { limit }],
        note,
    };
    let worst = |values: &[f64]| format!("worst {:.0} ms", quantile(values, 1.0));
    let each = grown as f64 / f64::from(count);
    let grown = format!(
        "the disks made its file larger by {:.1} MiB, {each:.0} bytes each",
        mebibytes(grown)
    );
    let clean_worst = format!("{}; {grown}", worst(&clean));
    let killed_worst = worst(&killed);
    let [start, middle, end] = places.each_ref().map(|times| quantile(times, 0.5));
    let pages = format!(
        "the slowest place; medians {start:.2} ms at the start, {middle:.2} ms in the middle, {end:.2} ms at \
         the end"
    );
    let slowest = places.into_iter().max_by(|a, b| quantile(a, 0.5).total_cmp(&quantile(b, 0.5)));
    let ms = Unit::Milliseconds;
    Ok(vec![
        line("open the store", ms, 1000.0, clean_worst, clean),
        line("open the store after kill -9", ms, 1000.0, killed_worst, killed),
        line("resident memory after opening", Unit::Mebibytes, 256.0, String::new(), opened),
        line(
            "resident memory after listing 100 random pages",
            Unit::Mebibytes,
            256.0,
            String::new(),
            listed,
        ),
        line("list a page of 100", ms, 50.0, pages, slowest.unwrap_or_default()),
    ])
}

/// Where the pages begin that are timed.
fn places_of(count: u32) -> [u32; 3] {
    [0, count / 2, count.saturating_sub(PAGE + 1)]
}

/// Asks for the page behind disk `after`, sees that it is that, and tells how long it took.
fn page(control: &mut Control, count: u32, after: u32) -> Result<f64> {
    let start = clock::now();
    let names = control.list(&name_of(after), PAGE as usize)?;
    let time = milliseconds(start.elapsed());
    let expected = PAGE.min(count - after - 1);
    ensure!(names.len() == expected as usize, "{} names on a page of {expected}", names.len());
    let first = names.first().is_none_or(|name| *name == name_of(after + 1));
    ensure!(first, "the page behind disk {after} begins with {:?}", names.first());
    Ok(time)
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_as_numbers_and_the_last_page_is_full() {
        assert!(name_of(9) < name_of(10) && name_of(99_999) < name_of(100_000));
        for count in [20_000, 1_000_000] {
            let [start, middle, end] = places_of(count);
            assert_eq!((start, middle), (0, count / 2));
            assert_eq!(count - end - 1, PAGE, "names behind it");
        }
    }
}
