//! How much is in flight: of one connection, and of all connections of a server together.
//!
//! A request is charged before its payload is received or its data read, and credited when its
//! reply has been sent. So a client that does not read its replies is not read from either, and
//! holds [`BYTES_MAX`] of memory, or one payload of the largest size.
//!
//! - The first [`OWN_BYTES`] of a connection are its own. What goes beyond comes from a [`Pool`],
//!   so that however many clients do not read, they hold a bounded amount together.
//! - A client that holds a part of the pool and keeps the server waiting, while somebody else
//!   waits for room, is cut off: see [`Budget::is_stalled`]. Without need nobody is.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::Duration;

use runtime::Time;

use crate::protocol::PAYLOAD_BYTES_MAX;

/// Most requests of one connection between their arrival and the sending of their replies.
pub(crate) const REQUESTS_MAX: usize = disk::in_flight::REQUESTS_MAX;

/// Most payload bytes of those; a larger request is let in when there is no other.
pub(crate) const BYTES_MAX: u64 = 16 << 20;

/// Payload bytes that a connection may always have in flight.
pub(crate) const OWN_BYTES: u64 = 1 << 20;

/// Payload bytes beyond those, of all connections together. Eight connections can have all that
/// one may have; more than that in flight makes no device faster.
pub(crate) const POOL_BYTES: u64 = 128 << 20;
const _: () = assert!(POOL_BYTES >= PAYLOAD_BYTES_MAX as u64, "the largest request must fit");

/// How long a payload or a batch of replies may take to pass while others wait for the pool.
const STALL_MAX: Duration = Duration::from_secs(10);

/// What the connections of a server share.
#[derive(Debug)]
pub(crate) struct Pool {
    left: Cell<u64>,
    next_number: Cell<u64>,
    /// Who waits for room, by number of the budget.
    waiting: RefCell<BTreeMap<u64, Waker>>,
}

impl Default for Pool {
    fn default() -> Self {
        Self { left: Cell::new(POOL_BYTES), next_number: Cell::new(0), waiting: RefCell::default() }
    }
}

impl Pool {
    /// Whether somebody waits for what others hold.
    pub(crate) fn is_short(&self) -> bool {
        !self.waiting.borrow().is_empty()
    }

    fn take(&self, bytes: u64) -> bool {
        let left = self.left.get().checked_sub(bytes);
        self.left.set(left.unwrap_or(self.left.get()));
        left.is_some()
    }

    fn give(&self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        self.left.set(self.left.get() + bytes);
        assert!(self.left.get() <= POOL_BYTES);
        for waker in self.waiting.borrow().values() {
            waker.wake_by_ref();
        }
    }
}

/// What one connection has in flight.
#[derive(Debug)]
pub(crate) struct Budget {
    pool: Rc<Pool>,
    /// This budget's number in the pool.
    number: u64,
    requests: Cell<usize>,
    bytes: Cell<u64>,
    waiting: RefCell<Option<Waker>>,
    /// Whether the last charge failed because the pool had too little.
    wants_pool: Cell<bool>,
    /// Since when the client is waited for, to take replies.
    pub(crate) sending: Cell<Option<Time>>,
    /// Since when the client is waited for, to send a payload.
    pub(crate) receiving: Cell<Option<Time>>,
}

impl Budget {
    pub(crate) fn new(pool: &Rc<Pool>) -> Self {
        let number = pool.next_number.replace(pool.next_number.get() + 1);
        Self {
            pool: Rc::clone(pool),
            number,
            requests: Cell::default(),
            bytes: Cell::default(),
            waiting: RefCell::default(),
            wants_pool: Cell::default(),
            sending: Cell::default(),
            receiving: Cell::default(),
        }
    }

    /// Charges a request with so many payload bytes, if there is room for it.
    pub(crate) fn charge(&self, bytes: u64) -> bool {
        let (requests, used) = (self.requests.get(), self.bytes.get());
        let sum = used.saturating_add(bytes);
        if requests > 0 && (requests >= REQUESTS_MAX || sum > BYTES_MAX) {
            return false;
        }
        if !self.pool.take(beyond_own(sum) - beyond_own(used)) {
            self.wants_pool.set(true);
            return false;
        }
        if self.wants_pool.replace(false) {
            self.pool.waiting.borrow_mut().remove(&self.number);
        }
        self.requests.set(requests + 1);
        self.bytes.set(sum);
        true
    }

    /// Credits requests whose replies were sent and wakes who waits for room.
    pub(crate) fn credit(&self, requests: usize, bytes: u64) {
        let used = self.bytes.get();
        assert!(requests <= self.requests.get() && bytes <= used);
        self.requests.set(self.requests.get() - requests);
        self.bytes.set(used - bytes);
        self.pool.give(beyond_own(used) - beyond_own(used - bytes));
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
    }

    /// Wakes the task of `context` when a charge that failed may be tried again.
    pub(crate) fn wait(&self, context: &Context<'_>) {
        *self.waiting.borrow_mut() = Some(context.waker().clone());
        if self.wants_pool.get() {
            self.pool.waiting.borrow_mut().insert(self.number, context.waker().clone());
        }
    }

    /// Whether the client holds what others could use, and has kept the server waiting for long.
    pub(crate) fn is_stalled(&self, now: Time) -> bool {
        let long = |since: &Cell<Option<Time>>| {
            since.get().is_some_and(|since| now.since(since) >= STALL_MAX)
        };
        beyond_own(self.bytes.get()) > 0 && (long(&self.sending) || long(&self.receiving))
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        self.pool.waiting.borrow_mut().remove(&self.number);
        self.pool.give(beyond_own(self.bytes.get()));
    }
}

/// How many of a connection's bytes come from the pool.
fn beyond_own(bytes: u64) -> u64 {
    bytes.saturating_sub(OWN_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_bytes_are_both_bounded() {
        let budget = Budget::new(&Rc::default());
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

    #[test]
    fn the_pool_gets_back_what_was_taken() {
        let pool = Rc::new(Pool::default());
        let budgets: Vec<Budget> = (0..8).map(|_| Budget::new(&pool)).collect();
        for budget in &budgets {
            assert!(budget.charge(OWN_BYTES) && budget.charge(BYTES_MAX - OWN_BYTES));
        }
        let last = Budget::new(&pool);
        assert!(!last.charge(32 << 20));
        last.wait(&Context::from_waker(Waker::noop()));
        assert!(pool.is_short());
        assert!(last.charge(OWN_BYTES), "what is its own it has always");
        assert!(!pool.is_short());
        budgets.first().unwrap().credit(1, OWN_BYTES);
        drop((budgets, last));
        assert_eq!(pool.left.get(), POOL_BYTES);
    }

    #[test]
    fn who_holds_nothing_of_others_does_not_stall() {
        let budget = Budget::new(&Rc::default());
        budget.sending.set(Some(Time(0)));
        let late = Time(60_000_000_000);
        assert!(budget.charge(OWN_BYTES) && !budget.is_stalled(late));
        assert!(budget.charge(1) && budget.is_stalled(late) && !budget.is_stalled(Time(1)));
        budget.sending.set(None);
        assert!(!budget.is_stalled(late));
    }
}
