//! How much one connection may have in flight: requests, and bytes of their payloads.
//!
//! A request is charged before its payload is received or its data read, and credited when its
//! reply has been sent. So a client that does not read its replies is not read from either, and
//! holds [`BYTES_MAX`] of memory, or one payload of the largest size.

use std::cell::{Cell, RefCell};
use std::task::{Context, Waker};

/// Most requests of one connection between their arrival and the sending of their replies.
pub(crate) const REQUESTS_MAX: usize = 256;

/// Most payload bytes of those; a larger request is let in when there is no other.
pub(crate) const BYTES_MAX: u64 = 16 << 20;

/// What is in flight.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    requests: Cell<usize>,
    bytes: Cell<u64>,
    waiting: RefCell<Option<Waker>>,
}

impl Budget {
    /// Charges a request with so many payload bytes, if there is room for it.
    pub(crate) fn charge(&self, bytes: u64) -> bool {
        let (requests, used) = (self.requests.get(), self.bytes.get());
        if requests > 0 && (requests >= REQUESTS_MAX || used.saturating_add(bytes) > BYTES_MAX) {
            return false;
        }
        self.requests.set(requests + 1);
        self.bytes.set(used.saturating_add(bytes));
        true
    }

    /// Credits requests whose replies were sent and wakes who waits for room.
    pub(crate) fn credit(&self, requests: usize, bytes: u64) {
        assert!(requests <= self.requests.get() && bytes <= self.bytes.get());
        self.requests.set(self.requests.get() - requests);
        self.bytes.set(self.bytes.get() - bytes);
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
    }

    /// Wakes the task of `context` at the next credit.
    pub(crate) fn wait(&self, context: &Context<'_>) {
        *self.waiting.borrow_mut() = Some(context.waker().clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_bytes_are_both_bounded() {
        let budget = Budget::default();
        for _ in 0..REQUESTS_MAX {
            assert!(budget.charge(1));
        }
        assert!(!budget.charge(0), "one request too many");
        budget.credit(1, 1);
        assert!(!budget.charge(BYTES_MAX), "too many bytes");
        assert!(budget.charge(1));
        budget.credit(REQUESTS_MAX, REQUESTS_MAX as u64);
        assert!(budget.charge(2 * BYTES_MAX), "a large one is let in alone");
        assert!(!budget.charge(1));
    }
}
