//! The suite of all frontends, in every framing.

use std::rc::Rc;

use disk::conformance::{self, DISK_BYTES_MIN, Done, read_only_disk};
use disk::{GateDisk, MemDisk};
use nbd::protocol::Framing;
use nbd::protocol::request::Command;

use crate::client::{Answer, Client};
use crate::harness::{Harness, TestCatalog};

/// A client that has an export.
struct Attached {
    client: Client,
    size: u64,
}

fn done(answer: Answer) -> Option<Answer> {
    (answer.error == 0).then_some(answer)
}

impl conformance::Client for Attached {
    fn grain(&self) -> u64 {
        1
    }

    fn read(&mut self, offset: u64, length: usize) -> Done<'_, Vec<u8>> {
        Box::pin(async move { done(self.client.read(offset, length).await).map(|it| it.data) })
    }

    fn write(&mut self, offset: u64, bytes: Vec<u8>) -> Done<'_, ()> {
        Box::pin(async move { done(self.client.write(offset, &bytes, 0).await).map(drop) })
    }

    fn flush(&mut self) -> Done<'_, ()> {
        Box::pin(async move { done(self.client.request(Command::Flush, 0, 0, 0).await).map(drop) })
    }

    fn discard(&mut self, offset: u64, length: u64) -> Done<'_, ()> {
        Box::pin(async move {
            done(self.client.request(Command::Trim, 0, offset, length).await).map(drop)
        })
    }

    fn zero(&mut self, offset: u64, length: u64) -> Done<'_, ()> {
        Box::pin(async move {
            done(self.client.request(Command::WriteZeroes, 0, offset, length).await).map(drop)
        })
    }

    fn size(&mut self) -> Done<'_, u64> {
        Box::pin(std::future::ready(Some(self.size)))
    }
}

fn attached(
    memory: MemDisk,
    framing: Framing,
    test: impl AsyncFnOnce(&mut Attached, &GateDisk) + 'static,
) {
    let gate = GateDisk::new(memory);
    let harness = Harness::new(TestCatalog::one("d", Rc::<GateDisk>::clone(&gate)));
    let socket = harness.connect(4 << 20);
    harness.run(async move {
        let client = Client::attach(socket, "d", framing).await;
        let mut attached = Attached { client, size: DISK_BYTES_MIN as u64 };
        test(&mut attached, &gate).await;
    });
}

#[test]
fn an_export_is_a_disk() {
    for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
        attached(MemDisk::new(DISK_BYTES_MIN), framing, async |client, disk| {
            conformance::run(client, disk).await;
        });
        attached(read_only_disk(), framing, async |client, disk| {
            conformance::run_read_only(client, disk).await;
        });
    }
}
