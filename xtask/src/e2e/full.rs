//! A disk larger than its store: writes end in ENOSPC, everything else goes on, and freeing space
//! heals it.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::nbd::{Client, Command, ENOSPC};
use crate::server::{EXPORT, Options, Server};

use super::Bed;
use super::ledger::{self, InFlight, Ledger, SECTOR};

const STORE_BYTES: u64 = 256 << 20;
const DISK_BYTES: usize = 512 << 20;
/// What one request writes.
const PIECE: usize = 1 << 20;
const PIECE_SECTORS: usize = PIECE / SECTOR;
/// Freed blocks may be reused only after a checkpoint: this long it may take.
const HEAL_LIMIT: Duration = Duration::from_secs(15);

/// A disk that was written until it would take no more.
struct Full {
    server: Server,
    ledger: Ledger,
    /// Pieces that were taken.
    pieces: usize,
}

/// Fills a store, frees a part of it, fills that again and crashes it. A peer has no store.
///
/// # Errors
/// If the server does not start.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    if bed.parallax().is_none() {
        console::say("  the peer has no store that could run full");
        return Ok(());
    }
    let disk_bytes = DISK_BYTES as u64;
    let options = Options { store_bytes: STORE_BYTES, ..Options::disk(disk_bytes) };
    let server = bed.server_with(&options)?;
    let mut full = Full { server, ledger: Ledger::new(DISK_BYTES), pieces: 0 };
    bed.check("a full store refuses writes with ENOSPC", || {
        let done = full.fill();
        full.server.explain(done)
    });
    bed.check("reads and flushes go on", || {
        let done = full.look();
        full.server.explain(done)
    });
    bed.check("freeing space heals it", || {
        let done = full.heal();
        full.server.explain(done)
    });
    bed.check("kill -9 of a full store loses nothing", || {
        full.server.kill()?;
        full.server.start()?;
        let done = full.look();
        full.server.explain(done)
    });
    bed.check("emptied, it takes no space any more", || {
        let done = full.empty();
        full.server.explain(done)
    });
    bed.check("clean stop", || {
        let status = full.server.stop()?;
        ensure!(status.success(), "{status}");
        Ok(())
    });
    Ok(())
}

impl Full {
    fn client(&self) -> Result<Client> {
        Client::connect(&self.server.nbd_socket(), EXPORT)
    }

    fn fill(&mut self) -> Result<()> {
        let mut client = self.client()?;
        loop {
            match self.write(&mut client, self.pieces)? {
                0 => self.pieces += 1,
                ENOSPC => break,
                error => anyhow::bail!("piece {}: NBD error {error}", self.pieces),
            }
            ensure!(self.pieces * PIECE < DISK_BYTES, "the store took more than it has");
        }
        console::say(&format!("  {} MiB fitted", self.pieces));
        ensure!(self.pieces as u64 * PIECE as u64 > STORE_BYTES / 2, "it is full far too soon");
        Ok(())
    }

    /// Writes one piece with a number of its own; returns NBD's error.
    fn write(&mut self, client: &mut Client, piece: usize) -> Result<u32> {
        let start = piece * PIECE_SECTORS;
        let number = piece as u64 + 1;
        let change = InFlight { start, count: PIECE_SECTORS, number };
        let data = ledger::contents(start, PIECE_SECTORS, number);
        let error = client.write((start * SECTOR) as u64, &data)?;
        if error == 0 {
            self.ledger.settle(change);
        } else {
            self.ledger.doubt(change);
        }
        Ok(error)
    }

    /// Everything that was taken is there.
    fn look(&mut self) -> Result<()> {
        let mut client = self.client()?;
        let length = u32::try_from(PIECE)?;
        for piece in 0..DISK_BYTES / PIECE {
            let bytes = client.ask(Command::Read, (piece * PIECE) as u64, length)?;
            self.ledger.check_settled(piece * PIECE_SECTORS, &bytes)?;
        }
        client.ask(Command::Flush, 0, 0).map(drop)
    }

    /// Deletes the disk: the file system gets back what it took.
    fn empty(&self) -> Result<()> {
        let taken = || -> Result<u64> { Ok(std::fs::metadata(self.server.file())?.blocks() * 512) };
        let before = taken()?;
        let mut control = Control::connect(&self.server.control_socket())?;
        control.remove(EXPORT)?;
        control.collect_garbage()?;
        let after = taken()?;
        console::say(&format!("  {} MiB taken before, {} after", before >> 20, after >> 20));
        ensure!(before > STORE_BYTES / 2 && after < STORE_BYTES / 4, "{before}, then {after}");
        Ok(())
    }

    /// Gives back every second piece; then as many new ones must fit, soon.
    fn heal(&mut self) -> Result<()> {
        let mut client = self.client()?;
        let freed: Vec<usize> = (0..self.pieces).step_by(2).collect();
        for &piece in &freed {
            let offset = (piece * PIECE) as u64;
            client.ask(Command::Trim, offset, u32::try_from(PIECE)?).context("trim")?;
            let start = piece * PIECE_SECTORS;
            self.ledger.settle(InFlight { start, count: PIECE_SECTORS, number: 0 });
        }
        let mut written = 0;
        let mut last = Ok(0);
        clock::wait_until(HEAL_LIMIT, || {
            while let Some(&piece) = freed.get(written) {
                last = self.write(&mut client, piece);
                if !matches!(last, Ok(0)) {
                    break;
                }
                written += 1;
            }
            // A little less than was freed: metadata has changed, too.
            written + freed.len() / 8 >= freed.len() || last.is_err()
        });
        last?;
        let enough = written + freed.len() / 8 >= freed.len();
        ensure!(enough, "only {written} of {} freed pieces could be written again", freed.len());
        self.look()
    }
}
