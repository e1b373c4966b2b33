//! A byte stream as a session sees it. The reactor implements it over kernel sockets, [`pair`] in
//! memory, for tests, fuzzing and the simulator.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::rc::Rc;

use base::{BlockSlice, Buffer};

use crate::LocalBoxFuture;
use crate::sync::Signal;

/// A part of what is to be sent.
#[derive(Clone, Debug)]
pub enum Segment {
    /// Owned bytes.
    Bytes(Vec<u8>),
    /// Bytes of blocks, sent from where they lie; the range is in bytes within the slice.
    Blocks(BlockSlice, Range<usize>),
}

impl Segment {
    /// The bytes to send.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Blocks(slice, range) => slice.bytes().get(range.clone()).unwrap_or_default(),
        }
    }
}

/// A connected byte stream. At most one `receive` and one `send` are under way at a time.
pub trait Socket {
    /// Receives at least one byte into `range` of `buffer`; 0 means that the peer closed.
    fn receive(
        &self,
        buffer: Buffer,
        range: Range<usize>,
    ) -> LocalBoxFuture<(io::Result<usize>, Buffer)>;

    /// Sends all of `segments`, in order.
    fn send(&self, segments: Vec<Segment>) -> LocalBoxFuture<io::Result<()>>;

    /// Ends both directions: whoever waits in `receive` or `send` gets an end or an error.
    fn shutdown(&self);
}

/// Two connected in-memory sockets, each with room for `capacity` bytes on the way to the other.
#[must_use]
pub fn pair(capacity: usize) -> (Rc<dyn Socket>, Rc<dyn Socket>) {
    let there = Rc::new(Pipe::new(capacity));
    let back = Rc::new(Pipe::new(capacity));
    let one = MemorySocket { outgoing: Rc::clone(&there), incoming: Rc::clone(&back) };
    let other = MemorySocket { outgoing: back, incoming: there };
    (Rc::new(one), Rc::new(other))
}

struct Pipe {
    bytes: RefCell<std::collections::VecDeque<u8>>,
    closed: std::cell::Cell<bool>,
    capacity: usize,
    changed: Signal,
}

impl Pipe {
    fn new(capacity: usize) -> Self {
        Self {
            bytes: RefCell::default(),
            closed: std::cell::Cell::new(false),
            capacity,
            changed: Signal::default(),
        }
    }

    fn close(&self) {
        self.closed.set(true);
        self.changed.notify();
    }
}

struct MemorySocket {
    outgoing: Rc<Pipe>,
    incoming: Rc<Pipe>,
}

impl Socket for MemorySocket {
    fn receive(
        &self,
        mut buffer: Buffer,
        range: Range<usize>,
    ) -> LocalBoxFuture<(io::Result<usize>, Buffer)> {
        let pipe = Rc::clone(&self.incoming);
        Box::pin(async move {
            while pipe.bytes.borrow().is_empty() && !pipe.closed.get() {
                pipe.changed.changed().await;
            }
            let into = buffer.bytes_mut().get_mut(range).unwrap_or_default();
            let mut bytes = pipe.bytes.borrow_mut();
            let count = bytes.len().min(into.len());
            for (to, from) in into.iter_mut().zip(bytes.drain(..count)) {
                *to = from;
            }
            drop(bytes);
            pipe.changed.notify();
            (Ok(count), buffer)
        })
    }

    fn send(&self, segments: Vec<Segment>) -> LocalBoxFuture<io::Result<()>> {
        let pipe = Rc::clone(&self.outgoing);
        Box::pin(async move {
            for segment in &segments {
                let mut rest = segment.bytes();
                while !rest.is_empty() {
                    if pipe.closed.get() {
                        return Err(io::ErrorKind::BrokenPipe.into());
                    }
                    let room = pipe.capacity.saturating_sub(pipe.bytes.borrow().len());
                    let (now, later) = rest.split_at(room.min(rest.len()));
                    if now.is_empty() {
                        pipe.changed.changed().await;
                        continue;
                    }
                    pipe.bytes.borrow_mut().extend(now);
                    rest = later;
                    pipe.changed.notify();
                }
            }
            Ok(())
        })
    }

    fn shutdown(&self) {
        self.outgoing.close();
        self.incoming.close();
    }
}

impl Drop for MemorySocket {
    fn drop(&mut self) {
        self.shutdown();
    }
}

#[cfg(test)]
mod tests;
