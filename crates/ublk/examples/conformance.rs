//! Runs the suite of all frontends on a block device of this machine's kernel, and on one that can only
//! be read: as root, with ublk and `blkdiscard`. `cargo xtask e2e ublk` runs it in a guest.
#![allow(clippy::print_stdout, reason = "it says that it is done")]

extern crate parallax_ublk as ublk;

use std::error::Error;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use base::{BLOCK_SIZE, Buffer};
use disk::conformance::{self, Client, DISK_BYTES_MIN, Done, read_only_disk};
use disk::{GateDisk, MemDisk};
use runtime::reactor::{EngineChoice, Reactor};
use rustix::fs::{FallocateFlags, OFlags};
use ublk::{Config, Server};

/// The number of the device.
const NUMBER: u32 = 0;

fn main() -> Result<(), Box<dyn Error>> {
    let reactor = Reactor::start(EngineChoice::from_environment()?)?;
    let server = Server::new(reactor.runtime(), reactor.io(), Config::default());
    let io = reactor.io().clone();
    reactor.run(async move {
        for read_only in [false, true] {
            let memory = if read_only { read_only_disk() } else { MemDisk::new(DISK_BYTES_MIN) };
            let disk = GateDisk::new(memory);
            let identity = disk::Disk::identity(&*disk).digest();
            let start = async |number| ublk::start(&io, number, std::process::id()).await;
            server.add(NUMBER, Rc::clone(&disk) as Rc<dyn disk::Disk>, start).await?;
            let mut program = Program::open(read_only).await?;
            if read_only {
                conformance::run_read_only(&mut program, &disk).await;
            } else {
                conformance::run(&mut program, &disk).await;
            }
            drop(program);
            server.remove(NUMBER, identity).await?;
        }
        Ok::<(), Box<dyn Error>>(())
    })??;
    println!("a block device is a disk");
    Ok(())
}

/// A program that has the device open, past the page cache. What it does blocks, and is done on threads.
struct Program {
    device: Arc<File>,
}

impl Program {
    async fn open(read_only: bool) -> std::io::Result<Self> {
        let open = move || {
            let mut options = File::options();
            let flags = OFlags::DIRECT.bits().cast_signed();
            options.read(true).write(!read_only).custom_flags(flags);
            options.open(path())
        };
        let device = elsewhere(open).await?;
        Ok(Self { device: Arc::new(device) })
    }

    fn on_device<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut &File) -> std::io::Result<T> + Send + 'static,
    ) -> Done<'static, T> {
        let device = Arc::clone(&self.device);
        Box::pin(async move { elsewhere(move || work(&mut &*device)).await.ok() })
    }
}

impl Client for Program {
    fn grain(&self) -> u64 {
        512
    }

    fn read(&mut self, offset: u64, length: usize) -> Done<'_, Vec<u8>> {
        self.on_device(move |device| {
            let mut buffer = Buffer::zeroed(length.div_ceil(BLOCK_SIZE));
            let into = buffer.bytes_mut().get_mut(..length).unwrap_or_default();
            device.read_exact_at(into, offset)?;
            Ok(into.to_vec())
        })
    }

    fn write(&mut self, offset: u64, bytes: Vec<u8>) -> Done<'_, ()> {
        self.on_device(move |device| {
            let buffer = Buffer::from_bytes(&bytes);
            let from = buffer.bytes().get(..bytes.len()).unwrap_or_default();
            device.write_all_at(from, offset)
        })
    }

    fn flush(&mut self) -> Done<'_, ()> {
        self.on_device(|device| device.sync_all())
    }

    fn discard(&mut self, offset: u64, length: u64) -> Done<'_, ()> {
        Box::pin(async move {
            let words = [format!("-o{offset}"), format!("-l{length}"), path()];
            let run = move || Command::new("blkdiscard").args(words).output();
            elsewhere(run).await.ok().filter(|output| output.status.success()).map(drop)
        })
    }

    fn zero(&mut self, offset: u64, length: u64) -> Done<'_, ()> {
        let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        self.on_device(move |device| Ok(rustix::fs::fallocate(device, mode, offset, length)?))
    }

    fn size(&mut self) -> Done<'_, u64> {
        self.on_device(|device| device.seek(SeekFrom::End(0)))
    }
}

fn path() -> String {
    format!("/dev/ublkb{NUMBER}")
}

/// Does something on a thread of its own, while this one serves the device.
async fn elsewhere<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    type Shared<T> = Arc<Mutex<(Option<T>, Option<Waker>)>>;
    let shared: Shared<std::io::Result<T>> = Arc::default();
    let thread = Arc::clone(&shared);
    let builder = std::thread::Builder::new().name("program".to_owned());
    builder.spawn(move || {
        let outcome = work();
        let mut shared = thread.lock().unwrap_or_else(PoisonError::into_inner);
        shared.0 = Some(outcome);
        if let Some(waker) = shared.1.take() {
            waker.wake();
        }
    })?;
    std::future::poll_fn(|context| {
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        match shared.0.take() {
            Some(outcome) => Poll::Ready(outcome),
            None => {
                shared.1 = Some(context.waker().clone());
                Poll::Pending
            }
        }
    })
    .await
}
