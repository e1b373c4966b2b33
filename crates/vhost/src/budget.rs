//! How many bytes of payload a device has in flight, in all of its rings together: what its guest
//! can make this process hold.

use std::cell::{Cell, RefCell};
use std::task::{Context, Waker};

use crate::block::REQUEST_BYTES_MAX;

/// Most bytes in flight. More makes no disk faster, and the largest request must fit.
const BYTES_MAX: u64 = 32 << 20;
const _: () = assert!(BYTES_MAX >= REQUEST_BYTES_MAX);

/// What is in flight.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    bytes: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Budget {
    /// Charges a request, if there is room for it.
    pub(crate) fn take(&self, bytes: u64) -> bool {
        let sum = self.bytes.get().saturating_add(bytes);
        let room = sum <= BYTES_MAX;
        if room {
            self.bytes.set(sum);
        }
        room
    }

    /// Gives back what a request was charged.
    pub(crate) fn give(&self, bytes: u64) {
        assert!(bytes <= self.bytes.get(), "what is given back was taken");
        self.bytes.set(self.bytes.get() - bytes);
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// Wakes this task when something is given back.
    pub(crate) fn wait(&self, context: &Context<'_>) {
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
            waiting.push(context.waker().clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_request_fits_once() {
        let budget = Budget::default();
        assert!(budget.take(REQUEST_BYTES_MAX));
        assert!(!budget.take(REQUEST_BYTES_MAX));
        budget.wait(&Context::from_waker(Waker::noop()));
        budget.give(REQUEST_BYTES_MAX);
        assert!(budget.waiting.borrow().is_empty(), "whoever waited was woken");
        assert!(budget.take(REQUEST_BYTES_MAX));
        assert!(!budget.take(u64::MAX));
    }
}
