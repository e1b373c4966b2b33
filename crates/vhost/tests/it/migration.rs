//! What a monitor needs to move a running guest to another host: which pages were written.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};

use crate::machine::{LOG_ALL, MEMORY_BYTES, Machine, Options};
use crate::testbed::{Bed, run};

const PAGE_BYTES: u64 = 4096;

/// The monitor's log of written pages.
struct Log(OwnedFd);

impl Log {
    fn new(bytes: u64) -> Self {
        let file = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes).unwrap();
        Self(file)
    }

    /// One for all pages of a machine.
    fn whole() -> Self {
        Self::new(MEMORY_BYTES / PAGE_BYTES / 8)
    }

    fn payload(&self) -> Vec<u8> {
        let bytes = rustix::fs::fstat(&self.0).unwrap().st_size.unsigned_abs();
        [bytes.to_le_bytes(), [0; 8]].concat()
    }

    /// Gives it to the server, which says that it has it.
    async fn give(&self, machine: &Machine) {
        machine.send(6, 0, &self.payload(), &[self.0.as_fd()]).await;
        assert_eq!(machine.receive(6).await.0, [0; 8]);
    }

    /// The pages that are marked, which are so no longer.
    fn take(&self) -> Vec<u64> {
        let mut bits = [0; (MEMORY_BYTES / PAGE_BYTES / 8) as usize];
        pread(&self.0, &mut bits, 0).unwrap();
        pwrite(&self.0, &vec![0; bits.len()], 0).unwrap();
        (0..MEMORY_BYTES / PAGE_BYTES)
            .filter(|page| bits[(page / 8) as usize] & 1 << (page % 8) != 0)
            .collect()
    }
}

/// Begins to log while the rings run, as QEMU does.
async fn begin(machine: &Machine, log: &Log) {
    log.give(machine).await;
    machine.set_features(LOG_ALL).await;
    for ring in &machine.rings {
        machine.place_ring(ring, true).await;
    }
}

/// The pages of these places, in order.
fn pages(places: &[u64]) -> Vec<u64> {
    let mut pages: Vec<u64> = places.iter().map(|place| place / PAGE_BYTES).collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

#[test]
fn every_page_that_is_written_is_logged_and_no_other() {
    run(async |bed: Bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let ring = &machine.rings[0];
        assert_eq!(machine.write_disk(0, &[5; 8192]).await, 0);
        let log = Log::whole();
        begin(&machine, &log).await;
        assert_eq!(log.take(), [0; 0], "what was written before was copied before");

        let status = machine.header(ring, 0) + 128;
        assert_eq!(machine.write_disk(16, &[6; 8192]).await, 0);
        bed.settle().await;
        assert_eq!(log.take(), pages(&[ring.used(), status]), "the guest's own data is its own");

        let data = machine.data(0);
        assert_eq!(machine.read_disk(0, 8192).await, (0, vec![5; 8192]));
        bed.settle().await;
        let read = [ring.used(), status, data, data + PAGE_BYTES];
        assert_eq!(log.take(), pages(&read));
        // What was never written reads as zeroes, which are written as well.
        assert_eq!(machine.read_disk(32, 8192).await, (0, vec![0; 8192]));
        bed.settle().await;
        assert_eq!(log.take(), pages(&read));

        // The copy is done, or was given up.
        machine.set_features(0).await;
        machine.place_ring(ring, false).await;
        assert_eq!(machine.read_disk(0, 512).await, (0, vec![5; 512]));
        bed.settle().await;
        assert_eq!(log.take(), [0; 0]);
    });
}

#[test]
fn what_was_under_way_when_logging_began_is_logged() {
    run(async |bed: Bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let ring = &machine.rings[0];
        machine.hold_a_write(&bed).await;
        let log = Log::whole();
        begin(&machine, &log).await;
        bed.disk.release_all();
        machine.completed(ring).await;
        bed.settle().await;
        assert_eq!(log.take(), pages(&[ring.used(), machine.header(ring, 0) + 128]));
    });
}

#[test]
fn a_larger_log_takes_the_place_of_another_and_memory_that_comes_must_be_covered() {
    run(async |bed: Bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let (first, second) = (Log::whole(), Log::new(MEMORY_BYTES / PAGE_BYTES / 4));
        begin(&machine, &first).await;
        first.take();
        second.give(&machine).await;
        assert_eq!(machine.read_disk(0, 512).await.0, 0);
        bed.settle().await;
        assert_eq!(first.take(), [0; 0]);
        assert_ne!(second.take(), [0; 0]);
        machine.remove_memory().await;
        let beyond = 2 * MEMORY_BYTES;
        let file = memfd_create("more", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, PAGE_BYTES).unwrap();
        let region = [0, beyond, PAGE_BYTES, beyond, 0];
        let region: Vec<u8> = region.iter().flat_map(|number: &u64| number.to_le_bytes()).collect();
        machine.send(37, 0, &region, &[file.as_fd()]).await;
        machine.closed().await;
    });
}

/// A monitor that connects again under way gives its log last, behind the rings.
#[test]
fn rings_wait_for_a_log_that_was_asked_for() {
    run(async |bed: Bed| {
        let machine = Machine::connect(&bed, Options::default()).await;
        let ring = &machine.rings[0];
        machine.set_features(LOG_ALL).await;
        machine.start_ring(ring).await;
        machine.submit(ring, 0, 0, 0, 512);
        ring.kick();
        bed.settle().await;
        assert_eq!(machine.completions(ring), [(0u16, 0u32); 0]);
        let log = Log::whole();
        log.give(&machine).await;
        assert_eq!(machine.completed(ring).await, [(0, 513)]);
        bed.settle().await;
        assert_ne!(log.take(), [0; 0]);
    });
}

#[test]
fn a_log_that_does_not_fit_ends_the_connection() {
    let check = |log: Option<u64>| {
        run(async move |bed: Bed| {
            let machine = Machine::start(&bed, Options::default()).await;
            if let Some(bytes) = log {
                Log::new(bytes).give(&machine).await;
            }
            machine.send(2, 0, &((1u64 << 32) | 1 << 30 | LOG_ALL).to_le_bytes(), &[]).await;
            machine.closed().await;
            bed.until(|| bed.server.metrics().connections_failed == 1).await;
        });
    };
    check(Some(MEMORY_BYTES / PAGE_BYTES / 8 - 1));
    check(None);
}
