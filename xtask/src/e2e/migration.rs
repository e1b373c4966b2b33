//! A running guest that is moved from one QEMU to another and on, again and again, while fio
//! verifies its disk over vhost-user.
//!
//! QEMU copies the guest's memory while it runs, and learns from the daemon which pages the disk has
//! written meanwhile. One that is forgotten is old on the other side: the guest finds something else
//! in its page cache than it has read from the disk, fio finds old data, or the guest waits for ever
//! for what the ring has told the other copy of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::server::{EXPORT, Server};

use super::Bed;
use super::filesystems::end_of_fio;
use super::guest::{COMMON, Disk, Machine, Moved, complete_lines};
use super::initramfs::Initramfs;
use super::kernel::Kernel;

const DISK_BYTES: u64 = 1 << 30;
const LIMIT: Duration = Duration::from_secs(120);
/// Moves of one guest, and how long it stays where it is.
const MOVES: u64 = 10;
const STAY: Duration = Duration::from_secs(1);

/// Runs the scenario. The peer serves a vhost-user disk at one socket only.
///
/// # Errors
/// If something cannot be prepared.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    if bed.parallax().is_none() {
        console::say("  the peer has one socket for a disk");
        return Ok(());
    }
    let kernel = Kernel::ensure(&bed.cache)?;
    let initramfs = bed.data.join("initramfs");
    let mut made = Initramfs::new(include_str!("../../assets/files-init.sh"))?;
    made.program(Path::new("/usr/bin/fio"))?;
    made.modules(&kernel, &["virtio_blk", "virtio_pci", "crc32c_generic"])?;
    made.write(&initramfs)?;

    let mut server = bed.server(DISK_BYTES)?;
    let scratch = bed.scratch.clone();
    let journey = Journey { kernel: &kernel, initramfs: &initramfs, scratch: &scratch };
    let mut control = Control::connect(&server.control_socket())?;
    for side in 0..2 {
        control.attach(EXPORT, &journey.socket(side))?;
    }
    let moves = bed.rounds(2, MOVES);
    bed.check(&format!("fio verifies the bare disk while the guest moves {moves} times"), || {
        let travelled = journey.travel(moves, &mut server);
        server.explain(travelled)
    });
    server.stop()?;
    Ok(())
}

struct Journey<'a> {
    kernel: &'a Kernel,
    initramfs: &'a Path,
    scratch: &'a Path,
}

impl Journey<'_> {
    /// Moves one guest again and again; the daemon is killed in the middle of every second move.
    fn travel(&self, moves: u64, server: &mut Server) -> Result<()> {
        let mut guest = self.machine(0, moves, None).start()?;
        guest.wait_for("starting fio", LIMIT, |line| line == "FIO-START")?;
        let mut longest = Moved { total_ms: 0, down_ms: 0 };
        for number in 1..=moves {
            clock::sleep(STAY);
            let socket = self.scratch.join("migration");
            let there = self.machine(number, moves, Some(&socket)).start()?;
            let moved = guest.migrate(&there, &socket, LIMIT, || {
                if number.is_multiple_of(2) {
                    server.kill()?;
                    server.start()?;
                }
                // Not before the disk is there again: QEMU 10.0 goes on without what is in flight.
                clock::sleep(STAY / 2);
                Ok(())
            });
            let moved = moved.with_context(|| format!("move {number}"))?;
            longest.total_ms = longest.total_ms.max(moved.total_ms);
            longest.down_ms = longest.down_ms.max(moved.down_ms);
            guest = there;
        }
        let said = end_of_fio(guest, "move", LIMIT)?;
        let read = complete_lines(&said).find(|line| line.starts_with("CACHE"));
        ensure!(read.is_some_and(|line| line.starts_with("CACHE ")), "memory is old:\n{said}");
        console::say(&format!(
            "  the longest move took {} ms, in which the guest stood still for at most {} ms",
            longest.total_ms, longest.down_ms
        ));
        Ok(())
    }

    /// The guest after so many moves; it waits at a socket for what it was before.
    fn machine(&self, number: u64, moves: u64, incoming: Option<&Path>) -> Machine<'_> {
        // As long as it is on its way, and some more.
        let seconds = 10 + moves * 4 * STAY.as_secs();
        Machine {
            kernel: self.kernel,
            initramfs: self.initramfs,
            append: format!(
                "plx.mode=verify plx.new=0 plx.from=0 plx.cache=1 plx.runtime={seconds}"
            ),
            disks: vec![Disk::VhostUser(self.socket(number % 2))],
            serial: self.scratch.join(format!("guest{number}.log")),
            size: COMMON,
            incoming: incoming.map(Path::to_owned),
        }
    }

    /// The disk of a guest that is on one of the two sides.
    fn socket(&self, side: u64) -> PathBuf {
        self.scratch.join(format!("side{side}.vhost"))
    }
}
