//! A vhost-user-blk client that makes load, as fio does where fio can go.
//!
//! The driver is the blkio crate: what the kernel of a virtual machine does, without one. One ring
//! and one thread, which sleeps until the device interrupts it when nothing has completed. Places
//! and contents are new with each operation, so nothing is read or written twice in a row.

mod device;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::clock;
use crate::fio::Figures;
use crate::random::Random;

use super::access::Access;
pub(crate) use device::Device;

/// The processor that clients run on, where they are told to: the last one, so that servers have
/// the others for themselves.
pub(crate) fn client_processor() -> usize {
    std::thread::available_parallelism().map_or(0, |count| count.get() - 1)
}

/// Runs a load on the device at `socket` for `runtime` and, before that, for `ramp`.
///
/// # Errors
/// If there is no such device, or an operation fails.
pub(crate) fn measure(
    socket: &Path,
    access: &Access,
    disk_bytes: u64,
    ramp: Duration,
    runtime: Duration,
) -> Result<Figures> {
    ensure!(!access.flushes, "this client does not flush");
    std::thread::scope(|scope| {
        // A thread of its own, since it stays where it is put.
        let load = scope.spawn(|| {
            let mut processors = CpuSet::new();
            processors.set(client_processor());
            sched_setaffinity(None, &processors).context("choose a processor")?;
            let device = Device::connect(socket, access.depth, usize::try_from(access.bytes)?)?;
            Load::new(device, access, disk_bytes).run(ramp, runtime)
        });
        load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?
    })
}

/// A load under way.
struct Load<'a> {
    device: Device,
    access: &'a Access,
    /// Number of operations that fit on the disk side by side.
    places: u64,
    next: u64,
    random: Random,
}

impl<'a> Load<'a> {
    fn new(device: Device, access: &'a Access, disk_bytes: u64) -> Self {
        let places = disk_bytes / access.bytes;
        Self { device, access, places, next: 0, random: Random::new(Random::fresh_seed()) }
    }

    fn run(mut self, ramp: Duration, runtime: Duration) -> Result<Figures> {
        for slot in 0..self.access.depth {
            self.start(slot)?;
        }
        let begin = clock::now();
        let mut completed = Vec::new();
        let mut measured: Option<(Instant, u64)> = None;
        let seconds = loop {
            self.device.wait(&mut completed)?;
            let now = clock::now();
            match &mut measured {
                None if now - begin >= ramp => measured = Some((now, 0)),
                None => {}
                Some((since, count)) => {
                    *count += completed.len() as u64;
                    if now - *since >= runtime {
                        break (now - *since).as_secs_f64();
                    }
                }
            }
            for &slot in &completed {
                self.start(slot)?;
            }
        };
        let mut running = self.access.depth - completed.len();
        while running > 0 {
            self.device.wait(&mut completed)?;
            running -= completed.len();
        }
        let iops = measured.map_or(0.0, |(_, count)| count as f64) / seconds;
        let bytes_per_second = iops * self.access.bytes as f64;
        Ok(Figures { iops, bytes_per_second, p99_milliseconds: None })
    }

    fn start(&mut self, slot: usize) -> Result<()> {
        let place = match self.access.is_random {
            true => self.random.below(self.places),
            false => self.next % self.places,
        };
        self.next += 1;
        let offset = place * self.access.bytes;
        match self.access.is_write {
            true => self.device.write(slot, offset, self.random.next()),
            false => self.device.read(slot, offset),
        }
    }
}
