//! Buffered receiving: many requests per receive, payloads straight into their own buffers.
//!
//! - At most one receive is under way, and it is never abandoned: it is kept here when whoever
//!   waits for it goes away, until [`Input::close`].
//! - An idle connection holds 16 KiB; a busy one grows to 256 KiB and shrinks again.

use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Context, Poll};

use base::{BLOCK_SIZE, Buffer, BufferPool};
use runtime::LocalBoxFuture;
use runtime::socket::Socket;

/// Blocks of the buffer of a quiet connection: 16 KiB.
const QUIET_BLOCKS: usize = 4;

/// Blocks of the buffer of a busy connection: 256 KiB, 60 writes of 4 KiB.
const BUSY_BLOCKS: usize = 64;

/// Receives in a row that would have fitted a quiet connection's buffer before it gets one.
const QUIET_RECEIVES: u32 = 256;

/// Bytes that [`Input::fill_to`] can wait for.
pub(crate) const CONTIGUOUS_BYTES_MAX: usize = QUIET_BLOCKS * BLOCK_SIZE;

type Receiving = LocalBoxFuture<(io::Result<usize>, Buffer)>;

/// The receiving side of a connection.
pub(crate) struct Input {
    socket: Rc<dyn Socket>,
    pool: BufferPool,
    /// Empty while a receive has it.
    buffer: Buffer,
    /// What was received into `buffer` and not consumed.
    held: Range<usize>,
    receiving: Option<Receiving>,
    quiet_receives: u32,
}

impl Input {
    pub(crate) fn new(socket: Rc<dyn Socket>, pool: BufferPool) -> Self {
        let buffer = pool.take(QUIET_BLOCKS);
        Self { socket, pool, buffer, held: 0..0, receiving: None, quiet_receives: 0 }
    }

    /// What was received and not consumed.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.bytes().get(self.held.clone()).unwrap_or_default()
    }

    /// Drops the first `count` bytes of [`Input::bytes`].
    pub(crate) fn consume(&mut self, count: usize) {
        self.held.start = self.held.end.min(self.held.start.saturating_add(count));
    }

    /// Copies received bytes to the start of `into`, consumes them and tells how many.
    pub(crate) fn copy_out(&mut self, into: &mut [u8]) -> usize {
        let bytes = self.bytes();
        let count = bytes.len().min(into.len());
        if let (Some(to), Some(from)) = (into.get_mut(..count), bytes.get(..count)) {
            to.copy_from_slice(from);
        }
        self.consume(count);
        count
    }

    /// Receives more bytes behind those held.
    pub(crate) fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let receiving = match &mut self.receiving {
            Some(receiving) => receiving,
            None => {
                self.make_room();
                let buffer = std::mem::replace(&mut self.buffer, Buffer::zeroed(0));
                let room = self.held.end..buffer.bytes().len();
                self.receiving.insert(self.socket.receive(buffer, room))
            }
        };
        let Poll::Ready((result, buffer)) = receiving.as_mut().poll(context) else {
            return Poll::Pending;
        };
        self.receiving = None;
        self.buffer = buffer;
        Poll::Ready(match result {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                self.held.end += count;
                Ok(())
            }
            Err(error) => Err(error),
        })
    }

    /// Starts to receive into a buffer of the caller's; [`Input::poll_direct`] gives it back.
    /// Nothing may be held, or the order of bytes would be lost.
    pub(crate) fn start_direct(&mut self, buffer: Buffer, range: Range<usize>) {
        assert!(self.held.is_empty() && self.receiving.is_none());
        self.receiving = Some(self.socket.receive(buffer, range));
        // What comes after a large payload is probably another one: receive little with its
        // header, because that little is copied.
        if self.buffer.block_count() != QUIET_BLOCKS {
            self.buffer = self.pool.take(QUIET_BLOCKS);
        }
        self.held = 0..0;
    }

    /// The end of a receive that [`Input::start_direct`] began.
    pub(crate) fn poll_direct(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<(io::Result<usize>, Buffer)> {
        let Some(receiving) = &mut self.receiving else {
            return Poll::Ready((Err(io::ErrorKind::NotConnected.into()), Buffer::zeroed(0)));
        };
        let ended = receiving.as_mut().poll(context);
        if ended.is_ready() {
            self.receiving = None;
        }
        ended
    }

    /// Waits for what is still under way, after the socket was shut down.
    pub(crate) async fn close(self) {
        if let Some(receiving) = self.receiving {
            drop(receiving.await);
        }
    }

    /// Moves what is held to the start of a buffer of the right size.
    fn make_room(&mut self) {
        let size = self.buffer.bytes().len();
        let was_filled = self.held.end == size;
        let little = self.held.end <= QUIET_BLOCKS * BLOCK_SIZE;
        self.quiet_receives = if little { self.quiet_receives + 1 } else { 0 };
        let busy = size > QUIET_BLOCKS * BLOCK_SIZE;
        if was_filled && !busy {
            self.move_to(BUSY_BLOCKS);
        } else if busy && self.held.is_empty() && self.quiet_receives >= QUIET_RECEIVES {
            self.move_to(QUIET_BLOCKS);
        } else {
            let length = self.held.len();
            self.buffer.bytes_mut().copy_within(self.held.clone(), 0);
            self.held = 0..length;
        }
    }

    fn move_to(&mut self, block_count: usize) {
        let mut buffer = self.pool.take(block_count);
        let count = self.copy_out(buffer.bytes_mut());
        self.buffer = buffer;
        self.held = 0..count;
        self.quiet_receives = 0;
    }
}

#[cfg(test)]
mod tests {
    use runtime::socket::{Segment, pair};

    use super::*;

    fn poll_now<T>(future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        match future.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop())) {
            Poll::Ready(value) => value,
            Poll::Pending => panic!("it should be done at once"),
        }
    }

    fn fill(input: &mut Input) {
        poll_now(std::future::poll_fn(|context| input.poll_fill(context))).unwrap();
    }

    #[test]
    fn the_buffer_grows_for_a_busy_client_and_shrinks_for_a_quiet_one() {
        let (client, server) = pair(1 << 20);
        let send = |count: usize, byte: u8| {
            poll_now(client.send(vec![Segment::Bytes(vec![byte; count])])).unwrap();
        };
        let mut input = Input::new(server, BufferPool::default());
        send(100_000, 1);
        fill(&mut input);
        assert_eq!(input.bytes().len(), QUIET_BLOCKS * BLOCK_SIZE);
        input.consume(16_000);
        fill(&mut input);
        assert_eq!(input.bytes(), vec![1; 84_000], "what was held comes first");
        input.consume(84_000);
        for _ in 0..=QUIET_RECEIVES {
            assert_eq!(input.buffer.block_count(), BUSY_BLOCKS);
            send(10, 2);
            fill(&mut input);
            input.consume(10);
        }
        send(10, 3);
        fill(&mut input);
        assert_eq!(input.buffer.block_count(), QUIET_BLOCKS);
        assert_eq!(input.bytes(), [3; 10]);
    }

    #[test]
    fn a_payload_is_received_where_it_belongs() {
        let (client, server) = pair(1 << 20);
        let byte = |at: usize| u8::try_from(at % 251).unwrap();
        poll_now(client.send(vec![Segment::Bytes((0..50_000).map(byte).collect())])).unwrap();
        let mut input = Input::new(server, BufferPool::default());
        fill(&mut input);
        let mut buffer = Buffer::zeroed(12);
        let mut have = input.copy_out(buffer.bytes_mut());
        assert_eq!(have, 16_384);
        while have < 49_000 {
            input.start_direct(buffer, have..49_000);
            let (result, returned) =
                poll_now(std::future::poll_fn(|context| input.poll_direct(context)));
            have += result.unwrap();
            buffer = returned;
        }
        assert!(buffer.bytes()[..have].iter().enumerate().all(|(at, &got)| got == byte(at)));
        fill(&mut input);
        assert_eq!(input.bytes().len(), 1000, "nothing was lost behind it");
    }
}
