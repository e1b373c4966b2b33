//! Servers with different pasts that take turns under one load, and how their disks come to have them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::console;
use crate::control::Control;
use crate::fio::{self, Target};
use crate::nbd;
use crate::server::{EXPORT, Kind, Options, Server};

use super::Bench;
use super::access::Access;
use super::client::Client;
use super::report::{Column, Unit};

/// Longest that filling or reading a disk may take.
const FILL_LIMIT: Duration = Duration::from_secs(1800);
/// Files that are smaller are not read before a turn.
const LARGE_BYTES: u64 = 1 << 20;
/// Requests that are on their way at once while a past is made.
const DEPTH: usize = 32;

/// A stopped server, and which of its disks is measured.
pub(crate) struct Entrant {
    pub(crate) label: String,
    pub(crate) server: Server,
    pub(crate) export: String,
}

impl Entrant {
    /// The disk that each server has; stops it.
    ///
    /// # Errors
    /// If it does not stop.
    pub(crate) fn stopped(label: &str, mut server: Server) -> Result<Self> {
        server.stop()?;
        Ok(Self { label: label.to_owned(), server, export: EXPORT.to_owned() })
    }

    /// One turn under `access`. What it will touch is read once just before (see docs/benchmarks.md on
    /// media that forget): the disk, and before writes the free space too.
    ///
    /// # Errors
    /// If the server or fio fails.
    pub(crate) fn turn(&mut self, bench: &Bench, access: &Access) -> Result<Turn> {
        if access.is_write {
            for file in self.server.files() {
                let bytes = file.metadata()?.len();
                // The files of a chain are small, and read in a moment where they are used.
                if bytes >= LARGE_BYTES {
                    read_once(bench, &Target::File(file.to_owned()), bytes)?;
                }
            }
        }
        self.server.start()?;
        let target = Target::Nbd(self.server.uri_of(&self.export));
        let client = nbd::Client::connect(&self.server.nbd_socket(), &self.export)?;
        let disk_bytes = client.size_bytes();
        drop(client);
        if !access.is_write {
            read_once(bench, &target, disk_bytes)?;
        }
        let before = self.counted()?;
        let figures = Client::Fio(target).run(access, disk_bytes, bench)?;
        let after = self.counted()?;
        self.server.stop()?;
        Ok(Turn { iops: figures.iops, blocks_each: blocks_each(before, after) })
    }

    /// Bytes that a running server of ours has read from its device so far, and reads that it was asked
    /// for.
    fn counted(&self) -> Result<Option<(u64, u64)>> {
        if !matches!(self.server.kind(), Kind::Parallax(_)) {
            return Ok(None);
        }
        let reads = Control::connect(&self.server.control_socket())?.stat("reads")?;
        let io = std::fs::read_to_string(format!("/proc/{}/io", self.server.process_id()?))?;
        let line = io.lines().find_map(|line| line.strip_prefix("read_bytes: "));
        Ok(Some((line.context("find read_bytes")?.parse()?, reads)))
    }
}

/// What a turn showed.
pub(crate) struct Turn {
    /// Operations a second.
    iops: f64,
    /// Blocks that were read from the device for each read, if it was one of ours under reads and the
    /// device is not memory.
    blocks_each: Option<f64>,
}

fn blocks_each(before: Option<(u64, u64)>, after: Option<(u64, u64)>) -> Option<f64> {
    let ((bytes_before, reads_before), (bytes, reads)) = (before?, after?);
    let (bytes, reads) = (bytes - bytes_before, reads - reads_before);
    (bytes > 0 && reads > 0).then(|| bytes as f64 / 4096.0 / reads as f64)
}

fn read_once(bench: &Bench, target: &Target, bytes: u64) -> Result<()> {
    let job = fio::job(target, bytes, &Access::sequential_read(8).fio(), &bench.scratch);
    fio::measure(job, FILL_LIMIT).context("read it once").map(drop)
}

/// Operations a second of each, turn by turn: in their order and in the reverse one by turns, as who
/// follows whom makes a difference. Says what each read from its device, which noise does not change.
///
/// # Errors
/// If a server or fio fails.
pub(crate) fn measure(
    bench: &Bench,
    what: &str,
    access: &Access,
    entrants: &mut [Entrant],
) -> Result<Vec<Column>> {
    let mut columns: Vec<Column> = entrants.iter().map(|one| Column::new(&one.label)).collect();
    for round in 1..=bench.scale.rounds {
        let mut said = Vec::new();
        for index in order(round, entrants.len()) {
            let (Some(entrant), Some(column)) = (entrants.get_mut(index), columns.get_mut(index))
            else {
                continue;
            };
            let turn = entrant.turn(bench, access)?;
            column.values.push(turn.iops);
            let each =
                turn.blocks_each.map(|each| format!(", {each:.2} blocks from the device each"));
            let shown = Unit::Iops.show(turn.iops);
            said.push(format!("{} {shown}{}", entrant.label, each.unwrap_or_default()));
        }
        console::say(&format!("{what}, round {round}:\n  {}", said.join("\n  ")));
    }
    Ok(columns)
}

/// In which order so many take their turns in a round.
fn order(round: usize, count: usize) -> impl Iterator<Item = usize> {
    let reverse = round.is_multiple_of(2);
    (0..count).map(move |index| if reverse { count - 1 - index } else { index })
}

/// A running server of ours, with files of this name.
///
/// # Errors
/// If it cannot be made.
pub(crate) fn ours(bench: &Bench, options: &Options, name: &str) -> Result<Server> {
    let kind = Kind::Parallax(bench.binary.clone().context("there is no binary of ours")?);
    Server::create(&kind, options, &bench.data.join(name), &bench.scratch.join(name))
}

/// A running server of a qcow2 disk that stands on as many others as `levels`; `write` has written to
/// each before the next was put on it.
///
/// # Errors
/// If a server fails, or `write` does.
pub(crate) fn qcow2_chain(
    bench: &Bench,
    disk_bytes: u64,
    name: &str,
    levels: u32,
    write: impl Fn(&Server, u32) -> Result<()>,
) -> Result<Server> {
    let mut options = Options::disk(disk_bytes);
    let mut level = 0;
    loop {
        let data = bench.data.join(name).join(level.to_string());
        let mut server = Server::create(&Kind::Qcow2, &options, &data, &bench.scratch.join(name))?;
        write(&server, level)?;
        if level == levels {
            return Ok(server);
        }
        server.stop()?;
        options.backing.push(server.file().to_owned());
        level += 1;
    }
}

/// Writes the disk of a running server once from end to end.
///
/// # Errors
/// If fio fails.
pub(crate) fn fill(bench: &Bench, server: &Server, disk_bytes: u64) -> Result<()> {
    let fill = format!("{} --end_fsync=1", Access::sequential_write(8).fio());
    let job = fio::job(&Target::Nbd(server.uri()), disk_bytes, &fill, &bench.scratch);
    fio::measure(job, FILL_LIMIT).context("fill the disk").map(drop)
}

/// Writes `data` at each of `offsets`, many at once, and waits for all of them.
///
/// # Errors
/// If the connection fails, or a write is refused.
pub(crate) fn write_at(
    client: &mut nbd::Client,
    offsets: impl Iterator<Item = u64>,
    data: &[u8],
) -> Result<()> {
    ask_at(client, nbd::Command::Write, offsets, u32::try_from(data.len())?, data)
}

/// Reads so many bytes at each of `offsets`, likewise.
///
/// # Errors
/// If the connection fails, or a read does.
pub(crate) fn read_at(
    client: &mut nbd::Client,
    offsets: impl Iterator<Item = u64>,
    length: u32,
) -> Result<()> {
    ask_at(client, nbd::Command::Read, offsets, length, &[])
}

fn ask_at(
    client: &mut nbd::Client,
    command: nbd::Command,
    offsets: impl Iterator<Item = u64>,
    length: u32,
    data: &[u8],
) -> Result<()> {
    let answered = |client: &mut nbd::Client| -> Result<()> {
        let error = client.receive()?.error;
        ensure!(error == 0, "{command:?} was refused: NBD error {error}");
        Ok(())
    };
    let mut under_way = 0;
    for offset in offsets {
        if under_way == DEPTH {
            answered(client)?;
            under_way -= 1;
        }
        client.send(command, offset, length, data)?;
        under_way += 1;
    }
    (0..under_way).try_for_each(|_| answered(client))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_first_in_every_round() {
        let rounds = [1, 2, 3].map(|round| order(round, 3).collect::<Vec<_>>());
        assert_eq!(rounds, [[0, 1, 2], [2, 1, 0], [0, 1, 2]]);
    }

    #[test]
    fn blocks_are_counted_for_each_read() {
        assert_eq!(blocks_each(Some((4096, 1)), Some((4096 * 9, 5))), Some(2.0));
        assert_eq!(blocks_each(Some((0, 1)), Some((0, 5))), None, "a device in memory");
        assert_eq!(blocks_each(None, None), None, "a peer");
    }
}
