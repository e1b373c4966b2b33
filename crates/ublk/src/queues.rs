//! The queues of a block device, as a session sees them: the kernel's, or those of a test.

use std::io::{self, IoSlice};
use std::task::{Context, Poll};

use runtime::reactor::Io;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::protocol::{Descriptor, DeviceInfo, Slot, code};
use crate::sys::{Descriptors, QueueCommands};

/// A slot that the kernel gives up, because the device ends.
const ABORTED: i32 = -libc::ENODEV;

/// What has become of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// A request has come.
    Request(Slot, Descriptor),
    /// No more requests come in one slot.
    End,
}

/// The queues of a device.
pub(crate) trait Queues {
    /// In how many slots requests can come.
    fn slots(&self) -> usize;

    /// Says what was completed, and hands over what has arrived.
    ///
    /// # Errors
    /// What the kernel says, if it cannot be served any more.
    fn turn(&mut self, arrived: &mut dyn FnMut(Arrival)) -> io::Result<()>;

    /// Ready when something may have arrived.
    fn poll_arrival(&mut self, context: &mut Context<'_>) -> Poll<()>;

    /// Copies the data of a write; all of it.
    ///
    /// # Errors
    /// If it is less.
    fn fetch(&self, slot: Slot, into: &mut [u8]) -> io::Result<()>;

    /// Copies the data of a read to who wants it.
    ///
    /// # Errors
    /// If it is less.
    fn give(&self, slot: Slot, data: &[IoSlice<'_>]) -> io::Result<()>;

    /// Completes a request: bytes, or an error as a negative number. The slot is free for another one.
    fn complete(&mut self, slot: Slot, result: i32);
}

/// Those of the kernel. Dropping them leaves the device to the next server.
pub(crate) struct KernelQueues {
    commands: QueueCommands,
    descriptors: Vec<Descriptors>,
    slots: usize,
}

impl KernelQueues {
    /// Begins to serve a device.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn open(io: &Io, number: u32, info: &DeviceInfo) -> io::Result<Self> {
        let path = format!("/dev/ublkc{number}");
        let device = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let (queues, depth) = (info.queues.get(), info.depth.get());
        let map = |queue| Descriptors::map(&device, queue, depth);
        let descriptors = (0..queues).map(map).collect::<io::Result<_>>()?;
        let count = u32::from(queues) * u32::from(depth);
        let mut commands = QueueCommands::new(io, device, count)?;
        for queue in 0..queues {
            for tag in 0..depth {
                commands.push(code::FETCH, Slot { queue, tag }, 0);
            }
        }
        let slots = usize::from(queues) * usize::from(depth);
        Ok(Self { commands, descriptors, slots })
    }
}

impl Queues for KernelQueues {
    fn slots(&self) -> usize {
        self.slots
    }

    fn turn(&mut self, arrived: &mut dyn FnMut(Arrival)) -> io::Result<()> {
        let Self { commands, descriptors, .. } = self;
        let mut refused = None;
        commands.turn(|slot, result| match (result, descriptors.get(usize::from(slot.queue))) {
            (0, Some(of_queue)) => {
                let descriptor = Descriptor::decode(of_queue.get(slot.tag));
                arrived(Arrival::Request(slot, descriptor));
            }
            (ABORTED, _) => arrived(Arrival::End),
            (result, _) => refused = Some(result),
        })?;
        match refused {
            None => Ok(()),
            Some(result) => Err(io::Error::from_raw_os_error(result.saturating_neg())),
        }
    }

    fn poll_arrival(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.commands.poll_signal(context)
    }

    fn fetch(&self, slot: Slot, into: &mut [u8]) -> io::Result<()> {
        let wanted = into.len();
        let copied = rustix::io::pread(self.commands.device(), into, slot.data_offset())?;
        whole(copied, wanted)
    }

    fn give(&self, slot: Slot, data: &[IoSlice<'_>]) -> io::Result<()> {
        let wanted = data.iter().map(|part| part.len()).sum();
        let copied = rustix::io::pwritev(self.commands.device(), data, slot.data_offset())?;
        whole(copied, wanted)
    }

    fn complete(&mut self, slot: Slot, result: i32) {
        self.commands.push(code::COMMIT_AND_FETCH, slot, result);
    }
}

fn whole(copied: usize, wanted: usize) -> io::Result<()> {
    if copied == wanted { Ok(()) } else { Err(Errno::IO.into()) }
}
