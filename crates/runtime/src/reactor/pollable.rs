//! Descriptors that are read and written by system calls of their owner, which never wait: those
//! that have a protocol of their own, such as /dev/fuse.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use super::io::{Descriptor, Io};
use super::work::Interest;

/// A descriptor that can be waited for.
pub struct Pollable {
    io: Io,
    descriptor: Rc<Descriptor>,
    /// Whether the engine waits for it.
    waiting: Cell<bool>,
}

impl Pollable {
    /// Takes a descriptor, and makes it one that never blocks, for all who share it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn adopt(io: &Io, fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { io: io.clone(), descriptor: io.descriptor(fd), waiting: Cell::new(false) })
    }

    /// Waits until there is something to read, an error included. One at a time waits.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn readable(self: Rc<Self>) -> io::Result<()> {
        self.waiting.set(true);
        let ready = self.io.ready(&self.descriptor, Interest::Readable).await;
        self.waiting.set(false);
        ready
    }
}

impl AsFd for Pollable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.fd()
    }
}

impl Drop for Pollable {
    fn drop(&mut self) {
        if self.waiting.get() {
            // Nobody waits any more, but the engine does.
            self.io.cancel(&self.descriptor);
        }
    }
}

impl fmt::Debug for Pollable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pollable({:?})", self.descriptor.fd())
    }
}
