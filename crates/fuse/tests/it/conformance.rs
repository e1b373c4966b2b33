//! The suite of all frontends.

use std::rc::Rc;

use disk::conformance::{self, Client, Done, read_only_disk};
use disk::{GateDisk, MemDisk};

use crate::kernel::{FALLOCATE, FSYNC, GETATTR, Kernel, number, numbers, run};

/// A program that has a file open. Its kernel cuts what is too large for a request.
struct Program {
    kernel: Rc<Kernel>,
    file: (u64, u64),
}

/// As large as the socket that stands for /dev/fuse lets through.
const PIECE: usize = 65_536;

impl Program {
    async fn allocate(&mut self, offset: u64, length: u64, mode: u64) -> Option<()> {
        let body = numbers(&[self.file.1, offset, length, mode]);
        self.kernel.ask(FALLOCATE, self.file.0, &body).await.ok().map(drop)
    }
}

impl Client for Program {
    fn grain(&self) -> u64 {
        1
    }

    fn read(&mut self, offset: u64, length: usize) -> Done<'_, Vec<u8>> {
        Box::pin(async move {
            let mut bytes = Vec::new();
            while bytes.len() < length {
                let count = PIECE.min(length - bytes.len()) as u64;
                let at = offset + bytes.len() as u64;
                let more = self.kernel.read(self.file, at, count).await.ok()?;
                if more.is_empty() {
                    break;
                }
                bytes.extend(more);
            }
            Some(bytes)
        })
    }

    fn write(&mut self, offset: u64, bytes: Vec<u8>) -> Done<'_, ()> {
        Box::pin(async move {
            for (index, piece) in bytes.chunks(PIECE).enumerate() {
                let at = offset + (index * PIECE) as u64;
                self.kernel.write(self.file, at, 0, piece).await.ok()?;
            }
            Some(())
        })
    }

    fn flush(&mut self) -> Done<'_, ()> {
        Box::pin(async move {
            let body = numbers(&[self.file.1, 0]);
            self.kernel.ask(FSYNC, self.file.0, &body).await.ok().map(drop)
        })
    }

    fn discard(&mut self, offset: u64, length: u64) -> Done<'_, ()> {
        Box::pin(self.allocate(offset, length, 0x03))
    }

    fn zero(&mut self, offset: u64, length: u64) -> Done<'_, ()> {
        Box::pin(self.allocate(offset, length, 0x11))
    }

    fn size(&mut self) -> Done<'_, u64> {
        Box::pin(async move {
            let attributes = self.kernel.ask(GETATTR, self.file.0, &[0; 16]).await.ok()?;
            Some(number(&attributes, 16 + 8))
        })
    }
}

async fn program(kernel: Kernel, flags: u32) -> (Program, Rc<GateDisk>) {
    let node = kernel.walk("d.img").await.unwrap();
    let disk = Rc::clone(&kernel.directory.0.borrow()[0].disk);
    let handle = kernel.open(node, flags).await.unwrap();
    (Program { kernel: Rc::new(kernel), file: (node, handle) }, disk)
}

#[test]
fn a_file_is_a_disk() {
    run(
        |directory| directory.add(1, "d"),
        async |kernel| {
            kernel.directory.0.borrow_mut()[0].entry.size_bytes = 8 << 20;
            kernel.directory.0.borrow()[0].disk.become_other(MemDisk::new(8 << 20));
            let (mut program, disk) = program(kernel, 2).await;
            conformance::run(&mut program, &disk).await;
        },
    );
}

#[test]
fn a_file_that_can_only_be_read_is_one_too() {
    run(
        |directory| directory.add(1, "d"),
        async |kernel| {
            kernel.directory.0.borrow()[0].disk.become_other(read_only_disk());
            let (mut program, disk) = program(kernel, 0).await;
            conformance::run_read_only(&mut program, &disk).await;
        },
    );
}
