//! How many bytes the requests of a device hold while they are under way, in all of its rings
//! together: what its guest can make this process hold. Rings that find no room get it in the order
//! in which they asked.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::task::{Context, Waker};

/// Most bytes in flight: more makes no disk faster. A request that holds more has it all.
pub(crate) const BYTES_MAX: u64 = 32 << 20;

/// What is in flight.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    bytes: Cell<u64>,
    /// Rings that found no room, the first one first.
    waiting: RefCell<VecDeque<Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    ring: u16,
    waker: Option<Waker>,
}

impl Budget {
    /// Charges a request of a ring, if there is room for it and no other ring was there before. If
    /// not the ring waits from now on.
    pub(crate) fn take(&self, ring: u16, bytes: u64) -> bool {
        let mut waiting = self.waiting.borrow_mut();
        let sum = self.bytes.get().saturating_add(bytes);
        let may = waiting.front().is_none_or(|first| first.ring == ring);
        if may && sum <= BYTES_MAX {
            self.bytes.set(sum);
            drop(waiting);
            self.leave(ring);
            return true;
        }
        if !waiting.iter().any(|it| it.ring == ring) {
            waiting.push_back(Waiting { ring, waker: None });
        }
        false
    }

    /// Gives back what a request was charged.
    pub(crate) fn give(&self, bytes: u64) {
        assert!(bytes <= self.bytes.get(), "what is given back was taken");
        self.bytes.set(self.bytes.get() - bytes);
        self.wake_first();
    }

    /// The ring does not wait any more.
    pub(crate) fn leave(&self, ring: u16) {
        self.waiting.borrow_mut().retain(|it| it.ring != ring);
        self.wake_first();
    }

    /// Wakes this task when there may be room for its ring, which waits.
    pub(crate) fn wait(&self, ring: u16, context: &Context<'_>) {
        let mut waiting = self.waiting.borrow_mut();
        if let Some(waiting) = waiting.iter_mut().find(|it| it.ring == ring) {
            waiting.waker = Some(context.waker().clone());
        }
    }

    fn wake_first(&self) {
        let waker = self.waiting.borrow_mut().front_mut().and_then(|first| first.waker.take());
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicU32);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_largest_request_fits_once() {
        let budget = Budget::default();
        assert!(budget.take(0, BYTES_MAX));
        assert!(!budget.take(0, BYTES_MAX));
        let woken = Arc::new(Woken::default());
        budget.wait(0, &Context::from_waker(&Arc::clone(&woken).into()));
        budget.give(BYTES_MAX);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1, "whoever waited was woken");
        assert!(budget.take(0, BYTES_MAX));
        assert!(!budget.take(0, u64::MAX));
    }

    /// Otherwise a ring that keeps the budget full with small requests would keep out another one
    /// that needs more at once.
    #[test]
    fn who_waits_longest_is_next() {
        let budget = Budget::default();
        for _ in 0..32 {
            assert!(budget.take(1, 1 << 20));
        }
        assert!(!budget.take(2, 2 << 20));
        assert!(!budget.take(3, 1));
        budget.give(1 << 20);
        assert!(!budget.take(1, 1 << 20), "another one waits");
        assert!(!budget.take(2, 2 << 20), "not enough yet");
        budget.give(1 << 20);
        assert!(!budget.take(3, 1), "second in the line");
        assert!(budget.take(2, 2 << 20));
        budget.leave(3);
        budget.give(1 << 20);
        assert!(budget.take(1, 1 << 20), "nobody else is there any more");
    }
}
