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
use crate::nbd::{Client, Command};
use crate::process::Run;
use crate::random::Random;
use crate::server::{EXPORT, Server};

use super::Bed;
use super::ledger::{self, InFlight, Ledger, SECTOR, SECTORS_PER_BLOCK};

/// Small, so that things collide: half of it is rewritten in every storm.
const DISK_BYTES: usize = 32 << 20;
/// Requests in flight.
const DEPTH: usize = 16;
/// Longest that recovery may take on a disk this small.
const RECOVERY_LIMIT: Duration = Duration::from_secs(5);

/// A storm on its connection.
struct Storm {
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
    let rounds = if bed.quick { 12 } else { 200 };
    let mut server = bed.server(DISK_BYTES as u64)?;
    let mut ledger = Ledger::new(DISK_BYTES);
    let mut snapshots: Vec<Snapshot> = Vec::new();
    let mut next_number = 1;
    let mut slowest = Duration::ZERO;
    let takes_snapshots = bed.parallax().is_some();
    let mut random = Random::new(bed.random.next());
    let mut changes = 0;
    bed.check(&format!("{rounds} storms, each ended by kill -9"), || {
        for round in 1..=rounds {
            let storm = Storm { client: connect(&server)?, in_flight: HashMap::new() };
            let taken = takes_snapshots && random.below(3) == 0;
            let before = next_number;
            let (in_flight, snapshot) =
                storm.rage(&mut server, &mut ledger, &mut random, &mut next_number, taken)?;
            changes += next_number - before;
            let recovery = server.start().with_context(|| format!("round {round}"))?;
            ensure!(recovery < RECOVERY_LIMIT, "round {round}: open took {recovery:.2?}");
            slowest = slowest.max(recovery);
            let bytes = read_all(&server, EXPORT)?;
            let checked = ledger.check_crashed(&bytes, &in_flight);
            checked.with_context(|| format!("round {round}: the disk after the crash"))?;
            snapshots.extend(snapshot);
            check_snapshots(&server, &mut snapshots, &mut random)
                .with_context(|| format!("round {round}"))?;
        }
        Ok(())
    });
    console::say(&format!(
        "  {changes} writes and zeroings, {} snapshots; slowest open {slowest:.2?}",
        snapshots.len()
    ));
    bed.check("clean stop and restart lose nothing", || {
        server.stop()?;
        server.start()?;
        ledger.check_settled(0, &read_all(&server, EXPORT)?)?;
        server.stop().map(drop)
    });
    if let Some(binary) = bed.parallax().map(ToOwned::to_owned) {
        bed.check("parallax check", || {
            Run::new(binary).arg("check").arg(server.file()).read().map(drop)
        });
    }
    Ok(())
}

impl Storm {
    /// Sends requests until a random moment, kills the server then, and returns what was not
    /// answered, and the snapshot if one was taken on the way.
    fn rage(
        mut self,
        server: &mut Server,
        ledger: &mut Ledger,
        random: &mut Random,
        next_number: &mut u64,
        take_snapshot: bool,
    ) -> Result<(Vec<InFlight>, Option<Snapshot>)> {
        let requests = 100 + random.below(3000);
        let snapshot_at = random.below(requests);
        let mut snapshot = None;
        for sent in 0..requests {
            if take_snapshot && sent == snapshot_at {
                snapshot = Some(self.snapshot(server, ledger)?);
            }
            if self.in_flight.len() >= DEPTH {
                self.answer(ledger)?;
            }
            self.send(ledger.sectors(), random, next_number)?;
        }
        // The server works on while nobody reads: the kill meets it anywhere.
        clock::sleep(Duration::from_micros(random.below(3000)));
        server.kill()?;
        while !self.in_flight.is_empty() && self.answer(ledger).is_ok() {}
        Ok((self.changes(), snapshot))
    }

    fn changes(&self) -> Vec<InFlight> {
        let change = |request: &Request| match request {
            Request::Change(change) => Some(*change),
            Request::Read(_) | Request::Flush => None,
        };
        self.in_flight.values().filter_map(change).collect()
    }

    /// What was acknowledged before is in it; what is in flight may be.
    fn snapshot(&self, server: &Server, ledger: &Ledger) -> Result<Snapshot> {
        let export = Control::connect(&server.control_socket())?.snapshot(EXPORT)?;
        Ok(Snapshot { export, ledger: ledger.clone(), in_flight: self.changes() })
    }

    /// Takes the next answer.
    fn answer(&mut self, ledger: &mut Ledger) -> Result<()> {
        let reply = self.client.receive()?;
        let request = self.in_flight.remove(&reply.cookie).context("answer to no request")?;
        ensure!(reply.error == 0, "{request:?} failed with NBD error {}", reply.error);
        match request {
            Request::Change(change) => ledger.settle(change),
            Request::Read(start) => ledger.check_settled(start, &reply.data)?,
            Request::Flush => {}
        }
        Ok(())
    }

    /// Sends one request of a random kind and shape that meets nothing in flight.
    fn send(&mut self, sectors: usize, random: &mut Random, next_number: &mut u64) -> Result<()> {
        let kind = random.below(100);
        if kind < 4 {
            let cookie = self.client.send(Command::Flush, 0, 0, &[])?;
            self.in_flight.insert(cookie, Request::Flush);
            return Ok(());
        }
        let (start, count) = loop {
            let (start, count) = range(sectors, kind, random)?;
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
                let number = *next_number;
                *next_number += 1;
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

fn connect(server: &Server) -> Result<Client> {
    Client::connect(&server.nbd_socket(), EXPORT)
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

/// Reads the newest snapshot and one of the others.
fn check_snapshots(server: &Server, snapshots: &mut [Snapshot], random: &mut Random) -> Result<()> {
    let Some((newest, others)) = snapshots.split_last_mut() else { return Ok(()) };
    newest.check(server)?;
    if !others.is_empty() {
        let any = usize::try_from(random.below(others.len() as u64))?;
        if let Some(other) = others.get_mut(any) {
            other.check(server)?;
        }
    }
    Ok(())
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
