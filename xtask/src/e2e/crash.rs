//! Storms of writes, kill -9 in the middle, and every acknowledged write looked for afterwards.
//!
//! Requests in flight never overlap, so the order of their answers cannot matter. After the kill
//! the socket is read to its end first: an answer that had left the server counts as given. No
//! flush is needed for any of this (guarantee G2: a crash of the daemon loses nothing that was
//! acknowledged).

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::nbd::{Client, Command, ENOSPC, Reply};
use crate::process::Run;
use crate::random::Random;
use crate::server::{EXPORT, Options, Server};

use super::Bed;
use super::ledger::{self, InFlight, Ledger, Number, SECTOR, SECTORS_PER_BLOCK};

/// Small, so that things collide: half of it is rewritten in every storm.
const DISK_BYTES: usize = 32 << 20;
/// Requests in flight.
const DEPTH: usize = 16;
/// Longest that recovery may take on a disk this small.
const RECOVERY_LIMIT: Duration = Duration::from_secs(5);

/// A disk that lives through storms.
struct Sea {
    server: Server,
    ledger: Ledger,
    random: Random,
    takes_snapshots: bool,
    /// Whether the store is small enough to run full, and how many writes it has refused for that.
    may_fill: bool,
    refused: u64,
    snapshots: Vec<Snapshot>,
    /// What the next write writes.
    next_number: Number,
    /// How long it took until the disk was served again, each time.
    opens: Vec<Duration>,
}

/// A storm on its connection.
struct Storm<'a> {
    sea: &'a mut Sea,
    client: Client,
    in_flight: HashMap<u64, Request>,
}

#[derive(Clone, Copy, Debug)]
enum Request {
    Change(InFlight),
    Read(usize),
    Flush,
}

/// A snapshot and what it may hold.
struct Snapshot {
    export: String,
    ledger: Ledger,
    in_flight: Vec<InFlight>,
}

/// Runs the storms.
///
/// # Errors
/// If the server does not start.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    let rounds = bed.rounds(12, 500);
    // Snapshots keep what they share: room for one in each storm.
    let store_bytes = (DISK_BYTES as u64) * (rounds + 20);
    storms(bed, rounds, &Options { store_bytes, ..Options::disk(DISK_BYTES as u64) })
}

/// Storms on a store that is soon full: writes may then be refused, and nothing else changes.
///
/// # Errors
/// If the server does not start.
pub(crate) fn full(bed: &mut Bed) -> Result<()> {
    let rounds = bed.rounds(15, 60);
    let store_bytes = if bed.parallax().is_some() { 256 << 20 } else { 0 };
    storms(bed, rounds, &Options { store_bytes, ..Options::disk(DISK_BYTES as u64) })
}

fn storms(bed: &mut Bed, rounds: u64, options: &Options) -> Result<()> {
    let mut sea = Sea {
        server: bed.server_with(options)?,
        may_fill: options.store_bytes < DISK_BYTES as u64 * rounds,
        refused: 0,
        ledger: Ledger::new(DISK_BYTES),
        random: Random::new(bed.random.next()),
        takes_snapshots: bed.parallax().is_some(),
        snapshots: Vec::new(),
        next_number: 1,
        opens: Vec::new(),
    };
    bed.check(&format!("{rounds} storms, each ended by kill -9"), || {
        for round in 1..=rounds {
            let survived = sea.survive_storm();
            sea.server.explain(survived).with_context(|| format!("storm {round}"))?;
        }
        Ok(())
    });
    console::say(&format!(
        "  {} kills, {} writes, {} refused, {} snapshots; {}",
        sea.opens.len(),
        sea.next_number - 1,
        sea.refused,
        sea.snapshots.len(),
        describe_opens(&mut sea.opens)
    ));
    bed.check("clean stop and restart lose nothing", || {
        sea.server.stop()?;
        sea.server.start()?;
        sea.ledger.check_settled(0, &read_all(&sea.server, EXPORT)?)?;
        sea.server.stop().map(drop)
    });
    if let Some(binary) = bed.parallax().map(ToOwned::to_owned) {
        bed.check("parallax check", || {
            Run::new(binary).arg("check").arg(sea.server.file()).read().map(drop)
        });
    }
    Ok(())
}

impl Sea {
    /// One storm, the kill in its middle, recovery, and a look at everything.
    fn survive_storm(&mut self) -> Result<()> {
        let client = Client::connect(&self.server.nbd_socket(), EXPORT)?;
        let storm = Storm { sea: self, client, in_flight: HashMap::new() };
        let in_flight = storm.rage()?;
        let open = self.server.start()?;
        ensure!(open < RECOVERY_LIMIT, "open took {open:.2?}");
        self.opens.push(open);
        let bytes = read_all(&self.server, EXPORT)?;
        self.ledger.check_crashed(&bytes, &in_flight).context("the disk after the crash")?;
        self.check_snapshots()
    }

    /// Reads the newest snapshot and one of the others.
    fn check_snapshots(&mut self) -> Result<()> {
        let Some((newest, others)) = self.snapshots.split_last_mut() else { return Ok(()) };
        newest.check(&self.server)?;
        if !others.is_empty() {
            let any = usize::try_from(self.random.below(others.len() as u64))?;
            if let Some(other) = others.get_mut(any) {
                other.check(&self.server)?;
            }
        }
        Ok(())
    }
}

impl Storm<'_> {
    /// Sends requests until a random moment, kills the server then, and returns what was not
    /// answered.
    fn rage(mut self) -> Result<Vec<InFlight>> {
        let requests = 100 + self.sea.random.below(3000);
        let snapshot_at = self.sea.random.below(requests);
        let takes_snapshot = self.sea.takes_snapshots && self.sea.random.below(3) == 0;
        for sent in 0..requests {
            if takes_snapshot && sent == snapshot_at {
                self.snapshot()?;
            }
            if self.in_flight.len() >= DEPTH {
                self.answer()?;
            }
            self.send()?;
        }
        // The server works on while nobody reads: the kill meets it anywhere.
        clock::sleep(Duration::from_micros(self.sea.random.below(3000)));
        self.sea.server.kill()?;
        loop {
            match self.client.receive() {
                Ok(reply) => self.judge(&reply)?,
                // The socket is empty: the rest was never answered.
                Err(_) => return Ok(self.changes()),
            }
        }
    }

    fn changes(&self) -> Vec<InFlight> {
        let change = |request: &Request| match request {
            Request::Change(change) => Some(*change),
            Request::Read(_) | Request::Flush => None,
        };
        self.in_flight.values().filter_map(change).collect()
    }

    /// What was acknowledged before is in it; what is in flight may be.
    fn snapshot(&mut self) -> Result<()> {
        let mut control = Control::connect(&self.sea.server.control_socket())?;
        let export = match control.snapshot(EXPORT) {
            Ok(export) => export,
            Err(error) if self.sea.may_fill && error.to_string().contains("space") => return Ok(()),
            Err(error) => return Err(error),
        };
        let (ledger, in_flight) = (self.sea.ledger.clone(), self.changes());
        self.sea.snapshots.push(Snapshot { export, ledger, in_flight });
        Ok(())
    }

    /// Takes the next answer and judges it.
    fn answer(&mut self) -> Result<()> {
        let reply = self.client.receive()?;
        self.judge(&reply)
    }

    fn judge(&mut self, reply: &Reply) -> Result<()> {
        let request = self.in_flight.remove(&reply.cookie).context("answer to no request")?;
        if let (ENOSPC, true, Request::Change(change)) = (reply.error, self.sea.may_fill, request) {
            self.sea.refused += 1;
            self.sea.ledger.doubt(change);
            return Ok(());
        }
        ensure!(reply.error == 0, "{request:?} failed with NBD error {}", reply.error);
        match request {
            Request::Change(change) => self.sea.ledger.settle(change),
            Request::Read(start) => self.sea.ledger.check_settled(start, &reply.data)?,
            Request::Flush => {}
        }
        Ok(())
    }

    /// Sends one request of a random kind and shape that meets nothing in flight.
    fn send(&mut self) -> Result<()> {
        let kind = self.sea.random.below(100);
        if kind < 4 {
            let cookie = self.client.send(Command::Flush, 0, 0, &[])?;
            self.in_flight.insert(cookie, Request::Flush);
            return Ok(());
        }
        let (start, count) = loop {
            let (start, count) = range(self.sea.ledger.sectors(), kind, &mut self.sea.random)?;
            if !self.in_flight.values().any(|request| request.meets(start, count)) {
                break (start, count);
            }
        };
        let offset = u64::try_from(start * SECTOR)?;
        let length = u32::try_from(count * SECTOR)?;
        let (cookie, request) = match kind {
            4..12 => {
                let cookie = self.client.send(Command::WriteZeroes, offset, length, &[])?;
                (cookie, Request::Change(InFlight { start, count, number: 0 }))
            }
            12..22 => {
                let cookie = self.client.send(Command::Read, offset, length, &[])?;
                (cookie, Request::Read(start))
            }
            _ => {
                let number = self.sea.next_number;
                self.sea.next_number += 1;
                let data = ledger::contents(start, count, number);
                let cookie = self.client.send(Command::Write, offset, length, &data)?;
                (cookie, Request::Change(InFlight { start, count, number }))
            }
        };
        self.in_flight.insert(cookie, request);
        Ok(())
    }
}

impl Request {
    fn meets(&self, start: usize, count: usize) -> bool {
        match self {
            Self::Change(change) => change.overlaps(start, count),
            // A read takes at most this many sectors; see `range`.
            Self::Read(first) => {
                InFlight { start: *first, count: 16 * SECTORS_PER_BLOCK, number: 0 }
                    .overlaps(start, count)
            }
            Self::Flush => false,
        }
    }
}

/// Sectors of a request: mostly whole blocks, sometimes any.
fn range(sectors: usize, kind: u64, random: &mut Random) -> Result<(usize, usize)> {
    let whole_blocks = kind < 80;
    let unit = if whole_blocks { SECTORS_PER_BLOCK } else { 1 };
    let most = if whole_blocks { 16 } else { 24 };
    let count = unit * usize::try_from(1 + random.below(most))?;
    let places = u64::try_from((sectors - count) / unit + 1)?;
    Ok((unit * usize::try_from(random.below(places))?, count))
}

fn read_all(server: &Server, export: &str) -> Result<Vec<u8>> {
    const PIECE: u32 = 1 << 20;
    let mut client = Client::connect(&server.nbd_socket(), export)?;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < client.size_bytes() {
        bytes.extend(client.ask(Command::Read, bytes.len() as u64, PIECE)?);
    }
    Ok(bytes)
}

/// The distribution of the times until the disk was served again.
fn describe_opens(opens: &mut [Duration]) -> String {
    opens.sort_unstable();
    let rank = |percent: usize| {
        let place = (opens.len() * percent).div_ceil(100).saturating_sub(1);
        opens.get(place).copied().unwrap_or_default()
    };
    let [median, high, longest] = [50, 99, 100].map(rank);
    format!("served again after {median:.0?} (median), {high:.0?} (99 %), {longest:.0?} (longest)")
}

impl Snapshot {
    /// Once checked, it must stay as it was found for ever.
    fn check(&mut self, server: &Server) -> Result<()> {
        let bytes = read_all(server, &self.export)?;
        let in_flight = std::mem::take(&mut self.in_flight);
        let checked = self.ledger.check_crashed(&bytes, &in_flight);
        checked.with_context(|| format!("the snapshot {}", self.export))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_are_told_by_rank() {
        let mut opens: Vec<Duration> = (1..=200).rev().map(Duration::from_millis).collect();
        let said = describe_opens(&mut opens);
        assert_eq!(said, "served again after 100ms (median), 198ms (99 %), 200ms (longest)");
        assert!(describe_opens(&mut []).contains("0ns"));
    }
}
