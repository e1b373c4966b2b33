//! Replies on their way out: everything that is ready goes into one vectored send.
//!
//! Headers are written one behind the other into a pool buffer and sent from there, data from
//! where it lies: a reply costs neither an allocation nor a copy of its data.

use std::ops::Range;
use std::rc::Rc;

use base::{BLOCK_SIZE, BlockSlice, Buffer, BufferPool};
use runtime::socket::Segment;

/// Blocks of a buffer for headers; 16 KiB hold 400 replies. Not 1, so as to leave the device the
/// buffers that are registered with the kernel.
const HEADER_BLOCKS: usize = 4;

/// Blocks of the buffer of zeroes; a longer run names it several times.
const ZERO_BLOCKS: usize = 16;

/// What is to be sent, in order.
pub(crate) struct Outbox {
    pool: BufferPool,
    headers: Option<Buffer>,
    headers_used: usize,
    /// Made when a client first needs zeroes spelled out.
    zeroes: Option<Rc<Buffer>>,
    parts: Vec<Part>,
    sealed: Vec<Segment>,
    requests: usize,
    bytes: u64,
}

enum Part {
    Headers(Range<usize>),
    Segment(Segment),
}

/// One send.
pub(crate) struct Batch {
    pub(crate) segments: Vec<Segment>,
    /// Requests whose replies end in it.
    pub(crate) requests: usize,
    /// What they were charged.
    pub(crate) bytes: u64,
}

impl Outbox {
    pub(crate) fn new(pool: BufferPool) -> Self {
        Self {
            pool,
            headers: None,
            headers_used: 0,
            zeroes: None,
            parts: Vec::new(),
            sealed: Vec::new(),
            requests: 0,
            bytes: 0,
        }
    }

    /// Whether there is nothing to send.
    pub(crate) fn is_empty(&self) -> bool {
        self.requests == 0
    }

    /// Appends a header.
    pub(crate) fn push_header(&mut self, bytes: &[u8]) {
        if self.headers_used + bytes.len() > HEADER_BLOCKS * BLOCK_SIZE {
            self.seal();
        }
        let range = self.headers_used..self.headers_used + bytes.len();
        let headers = self.headers.get_or_insert_with(|| self.pool.take(HEADER_BLOCKS));
        if let Some(to) = headers.bytes_mut().get_mut(range.clone()) {
            to.copy_from_slice(bytes);
        }
        self.headers_used = range.end;
        match self.parts.last_mut() {
            Some(Part::Headers(last)) if last.end == range.start => last.end = range.end,
            _ => self.parts.push(Part::Headers(range)),
        }
    }

    /// Appends data.
    pub(crate) fn push(&mut self, segment: Segment) {
        self.parts.push(Part::Segment(segment));
    }

    /// Appends `length` zero bytes.
    pub(crate) fn push_zeroes(&mut self, length: usize) {
        let zeroes = self.zeroes.get_or_insert_with(|| Rc::new(Buffer::zeroed(ZERO_BLOCKS)));
        let slice = BlockSlice::whole(Rc::clone(zeroes));
        let mut rest = length;
        while rest > 0 {
            let count = rest.min(ZERO_BLOCKS * BLOCK_SIZE);
            self.parts.push(Part::Segment(Segment::Blocks(slice.clone(), 0..count)));
            rest -= count;
        }
    }

    /// Ends a reply, whose request was charged `bytes`.
    pub(crate) fn end_reply(&mut self, bytes: u64) {
        self.requests += 1;
        self.bytes += bytes;
    }

    /// Takes everything.
    pub(crate) fn take(&mut self) -> Batch {
        self.seal();
        Batch {
            segments: std::mem::take(&mut self.sealed),
            requests: std::mem::take(&mut self.requests),
            bytes: std::mem::take(&mut self.bytes),
        }
    }

    /// Turns the parts so far into segments and starts a new buffer for headers.
    fn seal(&mut self) {
        self.headers_used = 0;
        let headers = self.headers.take().map(|buffer| BlockSlice::whole(Rc::new(buffer)));
        self.sealed.reserve(self.parts.len());
        for part in self.parts.drain(..) {
            match (part, &headers) {
                (Part::Segment(segment), _) => self.sealed.push(segment),
                (Part::Headers(range), Some(headers)) => {
                    self.sealed.push(Segment::Blocks(headers.clone(), range));
                }
                (Part::Headers(_), None) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(batch: &Batch) -> Vec<u8> {
        batch.segments.iter().flat_map(|segment| segment.bytes().to_vec()).collect()
    }

    #[test]
    fn headers_are_joined_and_order_is_kept() {
        let mut outbox = Outbox::new(BufferPool::default());
        outbox.push_header(b"one ");
        outbox.push_header(b"two ");
        outbox.push(Segment::Bytes(b"data ".to_vec()));
        outbox.push_header(b"three");
        outbox.end_reply(10);
        outbox.push_zeroes(3);
        outbox.end_reply(5);
        let batch = outbox.take();
        assert_eq!(sent(&batch), b"one two data three\0\0\0");
        assert_eq!((batch.segments.len(), batch.requests, batch.bytes), (4, 2, 15));
        assert!(outbox.is_empty());
    }

    #[test]
    fn more_headers_than_one_buffer_holds_and_long_runs_of_zeroes() {
        let mut outbox = Outbox::new(BufferPool::default());
        let mut expected = Vec::new();
        for index in 0..3000u32 {
            outbox.push_header(&index.to_be_bytes().repeat(4));
            expected.extend(index.to_be_bytes().repeat(4));
        }
        outbox.push_zeroes(200_000);
        expected.resize(expected.len() + 200_000, 0);
        outbox.end_reply(0);
        assert!(sent(&outbox.take()) == expected);
    }
}
