//! What the engines do, and the table of what is under way.
//!
//! The kernel borrows memory from submission to completion. [`Work`] owns that memory, and lies in
//! a [`Slot`] of the [`Table`] until its completion was read. A slot is boxed, so that it does not
//! move when the table grows, and nobody looks into the work of an occupied slot in between.

use std::io;
use std::ops::Range;
use std::rc::Rc;

use base::{BlockSlice, Buffer};

use super::event::Line;
use super::io::Descriptor;
use super::net::Stream;
use super::sys::Transfer;
use crate::socket::Segment;
use crate::sync::OneshotSender;

/// One operation on a file. It owns its buffers and comes back with its outcome.
#[derive(Debug)]
pub struct FileOperation {
    /// Whatever the submitter likes, to tell operations apart.
    pub token: usize,
    /// First byte in the file; a multiple of the block size if the file is open with O_DIRECT.
    pub offset: u64,
    /// What to do.
    pub action: FileAction,
}

/// What a [`FileOperation`] does.
#[derive(Debug)]
pub enum FileAction {
    /// Reads into bytes of `buffer`.
    Read {
        /// Where they go.
        buffer: Buffer,
        /// Which of its bytes.
        range: Range<usize>,
    },
    /// Writes `blocks`, one slice after the other, without their first `skip` bytes.
    Write {
        /// What to write.
        blocks: Vec<BlockSlice>,
        /// Bytes of it that are written already.
        skip: usize,
    },
    /// fdatasync.
    Sync,
    /// fallocate with KEEP_SIZE.
    Allocate {
        /// Number of bytes.
        length: u64,
    },
    /// fallocate with PUNCH_HOLE and KEEP_SIZE: the range then reads as zeroes.
    Punch {
        /// Number of bytes.
        length: u64,
    },
    /// BLKDISCARD: what the range of a block device then reads as is up to the device.
    Discard {
        /// Number of bytes.
        length: u64,
    },
}

/// Gets file operations back when they are done, on the reactor's thread, between task polls.
/// It may submit again from there.
pub trait Completions {
    /// `result` is the number of bytes that were read or written, which may be fewer than asked
    /// for; 0 for other actions; or what the kernel said.
    fn complete(self: Rc<Self>, operation: FileOperation, result: io::Result<usize>);
}

pub(super) enum Work {
    File {
        file: Rc<Descriptor>,
        operation: FileOperation,
        sink: Rc<dyn Completions>,
    },
    Receive {
        stream: Rc<Stream>,
        buffer: Buffer,
        range: Range<usize>,
    },
    Send {
        stream: Rc<Stream>,
        segments: Vec<Segment>,
        skip: usize,
    },
    Poll {
        descriptor: Rc<Descriptor>,
        interest: Interest,
        done: OneshotSender<io::Result<()>>,
    },
    /// Adds one to an eventfd.
    Signal {
        line: Rc<Line>,
    },
}

/// What is written to an eventfd to signal it.
pub(super) static ONE: [u8; 8] = 1u64.to_le_bytes();

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interest {
    Readable,
    Writable,
}

impl Work {
    pub(super) fn descriptor(&self) -> &Descriptor {
        match self {
            Self::File { file, .. } => file,
            Self::Receive { stream, .. } | Self::Send { stream, .. } => stream.descriptor(),
            Self::Poll { descriptor, .. } => descriptor,
            Self::Signal { line } => line.descriptor(),
        }
    }

    /// Whether it waits for `descriptor`, and moves no bytes that somebody counts.
    pub(super) fn waits_for(&self, descriptor: &Descriptor) -> bool {
        matches!(self, Self::Poll { .. } | Self::Signal { .. })
            && std::ptr::eq(self.descriptor(), descriptor)
    }

    /// Whether it ends by itself, rather than when a peer does something.
    pub(super) fn is_finite(&self) -> bool {
        matches!(self, Self::File { .. })
    }
}

/// A work that has ended, and how: a count, or a negative errno.
pub(super) struct Completed {
    pub(super) work: Work,
    pub(super) result: i32,
}

#[derive(Default)]
pub(super) struct Slot {
    pub(super) work: Option<Work>,
    /// Vectors and headers that the kernel reads, which point into `work`.
    pub(super) transfer: Transfer,
}

/// Most works under way at once; what comes on top waits in a queue. The completion queue has as
/// many entries, so that it cannot overflow. Each idle connection and each ring of a guest has a
/// work that waits: of them there must be room for as many as a process has descriptors, or they
/// would keep out the requests of the store.
pub(super) const IN_FLIGHT_MAX: usize = 1 << 15;

/// Works under way, by slot number.
#[derive(Default)]
pub(super) struct Table {
    #[expect(clippy::vec_box, reason = "the kernel holds pointers into slots while the Vec grows")]
    slots: Vec<Box<Slot>>,
    free: Vec<usize>,
}

impl Table {
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn has_room(&self) -> bool {
        self.in_flight() < IN_FLIGHT_MAX
    }

    pub(super) fn insert(&mut self, work: Work) -> usize {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Box::default());
            self.slots.len() - 1
        });
        if let Some(slot) = self.slots.get_mut(index) {
            assert!(slot.work.is_none(), "a free slot is empty");
            slot.work = Some(work);
        }
        index
    }

    pub(super) fn slot(&mut self, index: usize) -> Option<&mut Slot> {
        self.slots.get_mut(index).map(Box::as_mut)
    }

    /// Takes out a work whose completion was read, or that was never submitted.
    pub(super) fn remove(&mut self, index: usize) -> Option<Work> {
        let work = self.slots.get_mut(index)?.work.take()?;
        self.free.push(index);
        Some(work)
    }

    pub(super) fn occupied(&self) -> impl Iterator<Item = (usize, &Work)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(index, slot)| slot.work.as_ref().map(|work| (index, work)))
    }
}
