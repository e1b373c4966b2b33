//! Aligned block I/O on the shared device, and the only place that may flush it.
//!
//! [`Device`] is what the engine sees: reads, writes, flushes and discards of whole blocks.
//! Behind it stands a [`Backend`]: a file or block device here, a faulty simulated one in `sim`.
//!
//! A device promises what a disk promises: a completed write is seen by later reads; only a flush
//! that was *issued* after a write completed makes it durable; a write that was not flushed may
//! after a power cut be there, be absent or be torn at 512 bytes, in any order.

mod error;
mod file;
mod open;

use std::fmt;
use std::rc::Rc;

use base::{BlockSlice, Buffer, Pba};
use runtime::sync::{OneshotSender, oneshot};

pub use error::{Cause, DeviceError};
pub use file::BlockFile;
pub use open::{Access, OpenCause, OpenError, OpenOptions};

/// One operation on its way to a backend, which owns it, buffers and all, until it completes.
#[derive(Debug)]
pub enum Operation {
    /// Reads the first `block_count` blocks of `buffer` from `at`.
    Read {
        /// First block.
        at: Pba,
        /// Number of blocks, at least 1, at most the buffer's.
        block_count: usize,
        /// Where they go.
        buffer: Buffer,
        /// Gets the buffer back, or the error.
        done: OneshotSender<Result<Buffer, DeviceError>>,
    },
    /// Writes all of `blocks`, one slice after the other, to `at`.
    Write {
        /// First block.
        at: Pba,
        /// What to write; at least one block.
        blocks: Vec<BlockSlice>,
        /// Gets the outcome.
        done: OneshotSender<Result<(), DeviceError>>,
    },
    /// Makes every write that completed before this was submitted durable.
    Flush {
        /// Gets the outcome.
        done: OneshotSender<Result<(), DeviceError>>,
    },
    /// Tells the device that contents are not needed any more: they may read as anything.
    Discard {
        /// First block.
        at: Pba,
        /// Number of blocks.
        block_count: u64,
        /// Gets the outcome.
        done: OneshotSender<Result<(), DeviceError>>,
    },
    /// Really allocates the blocks, so that later writes to them cannot fail for lack of space
    /// (design rule 26). Contents stay. Nothing happens where that has no meaning.
    Allocate {
        /// First block.
        at: Pba,
        /// Number of blocks.
        block_count: u64,
        /// Gets the outcome.
        done: OneshotSender<Result<(), DeviceError>>,
    },
}

/// What stands behind a [`Device`].
pub trait Backend {
    /// Takes an operation; completes it later, or at once. Never blocks.
    fn submit(&self, operation: Operation);

    /// Length of the device in blocks.
    fn block_count(&self) -> u64;

    /// One line for people: what this is and which engine drives it.
    fn describe(&self) -> String;
}

/// The shared block device. Clones share it.
#[derive(Clone)]
pub struct Device(Rc<dyn Backend>);

impl Device {
    /// A device on `backend`.
    #[must_use]
    pub fn new(backend: Rc<dyn Backend>) -> Self {
        Self(backend)
    }

    /// Length in blocks.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        self.0.block_count()
    }

    /// One line for people.
    #[must_use]
    pub fn describe(&self) -> String {
        self.0.describe()
    }

    /// Reads `block_count` blocks from `at` into `buffer`, and returns it.
    ///
    /// # Errors
    /// [`Cause::OutOfRange`] without any I/O; else what the device says.
    pub async fn read(
        &self,
        at: Pba,
        block_count: usize,
        buffer: Buffer,
    ) -> Result<Buffer, DeviceError> {
        self.check_range(at, u64::try_from(block_count).unwrap_or(u64::MAX))?;
        assert!(block_count > 0 && block_count <= buffer.block_count());
        let (done, outcome) = oneshot();
        self.0.submit(Operation::Read { at, block_count, buffer, done });
        outcome.await.unwrap_or_else(|_| Err(DeviceError::new(Cause::Gone, at)))
    }

    /// Writes `blocks` to `at`. Not durable before a flush that is issued after this returned.
    ///
    /// # Errors
    /// [`Cause::OutOfRange`] without any I/O; else what the device says. What then stands on the
    /// device is undefined within the range, and unchanged outside it.
    pub async fn write(&self, at: Pba, blocks: Vec<BlockSlice>) -> Result<(), DeviceError> {
        let block_count: usize = blocks.iter().map(BlockSlice::block_count).sum();
        assert!(block_count > 0);
        self.check_range(at, u64::try_from(block_count).unwrap_or(u64::MAX))?;
        let (done, outcome) = oneshot();
        self.0.submit(Operation::Write { at, blocks, done });
        outcome.await.unwrap_or_else(|_| Err(DeviceError::new(Cause::Gone, at)))
    }

    /// Makes every write that completed before this call durable.
    ///
    /// # Errors
    /// What the device says. What had completed may be lost then, and a later flush that succeeds
    /// proves nothing about it: the caller must not retry (G10).
    pub async fn flush(&self) -> Result<(), DeviceError> {
        let (done, outcome) = oneshot();
        self.0.submit(Operation::Flush { done });
        outcome.await.unwrap_or_else(|_| Err(DeviceError::new(Cause::Gone, Pba::new(0))))
    }

    /// Gives the space of blocks back to whatever lies below.
    ///
    /// # Errors
    /// [`Cause::OutOfRange`] without any I/O; [`Cause::Unsupported`] where it cannot be done.
    pub async fn discard(&self, at: Pba, block_count: u64) -> Result<(), DeviceError> {
        self.check_range(at, block_count)?;
        let (done, outcome) = oneshot();
        self.0.submit(Operation::Discard { at, block_count, done });
        outcome.await.unwrap_or_else(|_| Err(DeviceError::new(Cause::Gone, at)))
    }

    /// Really allocates blocks below, where that has a meaning.
    ///
    /// # Errors
    /// [`Cause::OutOfRange`] without any I/O; [`Cause::NoSpace`] if there is none.
    pub async fn allocate(&self, at: Pba, block_count: u64) -> Result<(), DeviceError> {
        self.check_range(at, block_count)?;
        let (done, outcome) = oneshot();
        self.0.submit(Operation::Allocate { at, block_count, done });
        outcome.await.unwrap_or_else(|_| Err(DeviceError::new(Cause::Gone, at)))
    }

    fn check_range(&self, at: Pba, block_count: u64) -> Result<(), DeviceError> {
        match at.get().checked_add(block_count) {
            Some(end) if end <= self.block_count() => Ok(()),
            _ => Err(DeviceError::new(Cause::OutOfRange, at)),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.describe())
    }
}
