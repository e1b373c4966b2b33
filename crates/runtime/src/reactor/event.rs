//! Eventfds that are shared with another process: a virtual machine kicks its rings and gets its
//! interrupts through them.
//!
//! Whoever holds the other end may do with it what eventfd(2) allows, at any time. So nothing here
//! ever blocks: signals are taken with RWF_NOWAIT and given through the engine.

use std::cell::Cell;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use rustix::io::{Errno, ReadWriteFlags};

use super::io::{Descriptor, Io};
use super::work::{Interest, Work};

/// One end of an eventfd.
pub struct Event {
    io: Io,
    line: Rc<Line>,
    /// Whether the engine waits for a signal.
    waiting: Cell<bool>,
}

impl Event {
    /// Takes an eventfd.
    ///
    /// # Errors
    /// `InvalidInput` if it is anything else: what is always ready, such as a file, would keep the
    /// thread busy.
    pub fn adopt(io: &Io, fd: OwnedFd) -> io::Result<Self> {
        let what = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if what.as_os_str() != "anon_inode:[eventfd]" {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let line =
            Line { descriptor: io.descriptor(fd), busy: Cell::default(), again: Cell::default() };
        Ok(Self { io: io.clone(), line: Rc::new(line), waiting: Cell::new(false) })
    }

    /// Waits until it was signalled, and takes the signals out, however many there are.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn wait(self: Rc<Self>) -> io::Result<()> {
        loop {
            self.waiting.set(true);
            let ready = self.io.ready(&self.line.descriptor, Interest::Readable).await;
            self.waiting.set(false);
            ready?;
            let mut count = [0u8; 8];
            let mut into = [IoSliceMut::new(&mut count)];
            let fd = self.line.descriptor.fd();
            match rustix::io::preadv2(fd, &mut into, u64::MAX, ReadWriteFlags::NOWAIT) {
                Ok(_) => return Ok(()),
                // Somebody else took them.
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Signals the other end, at the end of the turn at the latest.
    pub fn signal(&self) {
        Line::signal(&self.line, &self.io);
    }
}

/// The writing side. At most one signal is under way: the other end may let its count run full, and
/// what waits for that must not pile up in the engine.
pub(super) struct Line {
    descriptor: Rc<Descriptor>,
    busy: Cell<bool>,
    /// Whether to signal once more: the one under way may have been given before this was asked.
    again: Cell<bool>,
}

impl Line {
    pub(super) fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    fn signal(line: &Rc<Self>, io: &Io) {
        if line.busy.replace(true) {
            line.again.set(true);
        } else {
            io.submit(Work::Signal { line: Rc::clone(line) });
        }
    }

    /// The signal under way was given, or could not be: then the other end gets no more of them.
    pub(super) fn given(line: &Rc<Self>, io: &Io) {
        line.busy.set(false);
        if line.again.replace(false) {
            Self::signal(line, io);
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.waiting.get() || self.line.busy.get() {
            // Nobody waits any more, but the engine does.
            self.io.cancel(&self.line.descriptor);
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Event({:?})", self.line.descriptor.fd())
    }
}
