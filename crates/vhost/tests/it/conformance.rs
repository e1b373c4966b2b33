//! The suite of all frontends.

use disk::conformance::{self, Client, Done, read_only_disk};

use crate::machine::{DATA, DISCARD, FLUSH_REQUEST, Machine, Options, WRITE_ZEROES};
use crate::testbed::run;

const SECTOR: u64 = 512;

impl Machine {
    async fn range(&self, kind: u32, offset: u64, length: u64) -> Option<()> {
        let sectors = u32::try_from(length / SECTOR).unwrap();
        let range = [&(offset / SECTOR).to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4]];
        self.write(DATA, &range.concat());
        (self.request(kind, 0, 16).await == 0).then_some(())
    }
}

impl Client for Machine {
    fn grain(&self) -> u64 {
        SECTOR
    }

    fn read(&mut self, offset: u64, length: usize) -> Done<'_, Vec<u8>> {
        Box::pin(async move {
            let (status, bytes) = self.read_disk(offset / SECTOR, length).await;
            (status == 0).then_some(bytes)
        })
    }

    fn write(&mut self, offset: u64, bytes: Vec<u8>) -> Done<'_, ()> {
        Box::pin(async move { (self.write_disk(offset / SECTOR, &bytes).await == 0).then_some(()) })
    }

    fn flush(&mut self) -> Done<'_, ()> {
        Box::pin(async move { (self.request(FLUSH_REQUEST, 0, 0).await == 0).then_some(()) })
    }

    fn discard(&mut self, offset: u64, length: u64) -> Done<'_, ()> {
        Box::pin(self.range(DISCARD, offset, length))
    }

    fn zero(&mut self, offset: u64, length: u64) -> Done<'_, ()> {
        Box::pin(self.range(WRITE_ZEROES, offset, length))
    }

    fn size(&mut self) -> Done<'_, u64> {
        Box::pin(async move {
            // The capacity, at the beginning of the device's configuration.
            let wanted = [&[0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0][..], &[0; 8]].concat();
            let config = self.ask(24, &wanted).await;
            let sectors = config.get(12..)?.first_chunk()?;
            Some(u64::from_le_bytes(*sectors) * SECTOR)
        })
    }
}

#[test]
fn a_machine_has_a_disk() {
    run(async |bed| {
        let mut machine = Machine::start(&bed, Options::default()).await;
        conformance::run(&mut machine, &bed.disk).await;
    });
}

#[test]
fn a_machine_has_a_disk_that_can_only_be_read() {
    run(async |bed| {
        bed.disk.become_other(read_only_disk());
        let mut machine = Machine::start(&bed, Options::default()).await;
        conformance::run_read_only(&mut machine, &bed.disk).await;
    });
}
