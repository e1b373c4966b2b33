//! What tasks of one thread wait for: a value, a signal, permits. All are first come, first
//! served, so that nobody starves.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// The sender was dropped without a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped;

struct OneshotState<T> {
    value: Option<T>,
    sender_alive: bool,
    waker: Option<Waker>,
}

/// Sends one value.
pub struct OneshotSender<T>(Rc<RefCell<OneshotState<T>>>);

/// Waits for one value.
pub struct OneshotReceiver<T>(Rc<RefCell<OneshotState<T>>>);

/// A channel for one value.
#[must_use]
pub fn oneshot<T>() -> (OneshotSender<T>, OneshotReceiver<T>) {
    let state =
        Rc::new(RefCell::new(OneshotState { value: None, sender_alive: true, waker: None }));
    (OneshotSender(Rc::clone(&state)), OneshotReceiver(state))
}

impl<T> OneshotSender<T> {
    /// Delivers `value`; it is dropped if nobody waits any more.
    pub fn send(self, value: T) {
        self.0.borrow_mut().value = Some(value);
    }
}

impl<T> Drop for OneshotSender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut state = self.0.borrow_mut();
            state.sender_alive = false;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for OneshotReceiver<T> {
    type Output = Result<T, Dropped>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.borrow_mut();
        if let Some(value) = state.value.take() {
            return Poll::Ready(Ok(value));
        }
        if !state.sender_alive {
            return Poll::Ready(Err(Dropped));
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl<T> fmt::Debug for OneshotSender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OneshotSender")
    }
}

impl<T> fmt::Debug for OneshotReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OneshotReceiver")
    }
}

/// Wakes everybody who waits for something to have changed. The usual form is
/// `while !condition() { signal.changed().await }`.
#[derive(Clone, Default)]
pub struct Signal(Rc<SignalState>);

#[derive(Default)]
struct SignalState {
    count: Cell<u64>,
    /// Who waits, by rising number. An abandoned wait takes its waker out again: a task that
    /// selects between a signal that never comes and something else must not fill memory.
    waiting: RefCell<Vec<(u64, Waker)>>,
    waits: Cell<u64>,
}

struct Changed {
    signal: Signal,
    seen: u64,
    number: Option<u64>,
}

impl Signal {
    /// Wakes all who wait now.
    pub fn notify(&self) {
        self.0.count.set(self.0.count.get() + 1);
        let waiting = std::mem::take(&mut *self.0.waiting.borrow_mut());
        for (_, waker) in waiting {
            waker.wake();
        }
    }

    /// Waits for the next `notify` after this call (not after the first poll).
    pub fn changed(&self) -> impl Future<Output = ()> + 'static {
        Changed { signal: self.clone(), seen: self.0.count.get(), number: None }
    }
}

impl Future for Changed {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let state = Rc::clone(&self.signal.0);
        if state.count.get() != self.seen {
            self.number = None;
            return Poll::Ready(());
        }
        let number = *self.number.get_or_insert_with(|| state.waits.replace(state.waits.get() + 1));
        let mut waiting = state.waiting.borrow_mut();
        match waiting.binary_search_by_key(&number, |&(number, _)| number) {
            Ok(index) => {
                if let Some((_, waker)) = waiting.get_mut(index) {
                    waker.clone_from(context.waker());
                }
            }
            Err(index) => waiting.insert(index, (number, context.waker().clone())),
        }
        Poll::Pending
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        let Some(number) = self.number else { return };
        let mut waiting = self.signal.0.waiting.borrow_mut();
        if let Ok(index) = waiting.binary_search_by_key(&number, |&(number, _)| number) {
            waiting.remove(index);
        }
    }
}

impl fmt::Debug for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Signal")
    }
}

/// Counts permits, of which a caller takes several at once. A request for more than there will
/// ever be waits for all of them.
#[derive(Clone)]
pub struct Semaphore(Rc<SemaphoreState>);

struct SemaphoreState {
    limit: usize,
    available: Cell<usize>,
    waiting: RefCell<VecDeque<(usize, OneshotSender<Permits>)>>,
}

/// Permits that return when dropped.
pub struct Permits {
    semaphore: Semaphore,
    count: usize,
}

impl Semaphore {
    /// A semaphore with `limit` permits.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(Rc::new(SemaphoreState {
            limit,
            available: Cell::new(limit),
            waiting: RefCell::new(VecDeque::new()),
        }))
    }

    /// Waits for `count` permits.
    pub async fn acquire(&self, count: usize) -> Permits {
        let count = count.min(self.0.limit);
        if self.0.waiting.borrow().is_empty() && self.0.available.get() >= count {
            return self.grant(count);
        }
        let (sender, receiver) = oneshot();
        self.0.waiting.borrow_mut().push_back((count, sender));
        // The queue lives in this semaphore, which we own: the sender is not dropped unsent.
        receiver.await.unwrap_or_else(|Dropped| self.grant(0))
    }

    fn grant(&self, count: usize) -> Permits {
        self.0.available.set(self.0.available.get() - count);
        Permits { semaphore: self.clone(), count }
    }

    /// Permits that nobody holds.
    #[must_use]
    pub fn available(&self) -> usize {
        self.0.available.get()
    }

    fn release(&self, count: usize) {
        self.0.available.set(self.0.available.get() + count);
        loop {
            let mut waiting = self.0.waiting.borrow_mut();
            match waiting.front() {
                Some(&(wanted, _)) if wanted <= self.0.available.get() => {}
                _ => return,
            }
            let next = waiting.pop_front();
            drop(waiting);
            if let Some((wanted, sender)) = next {
                // To one that waits no more this releases them at once, by dropping them.
                sender.send(self.grant(wanted));
            }
        }
    }
}

impl Drop for Permits {
    fn drop(&mut self) {
        self.semaphore.release(self.count);
    }
}

impl fmt::Debug for Semaphore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Semaphore({} of {})", self.0.available.get(), self.0.limit)
    }
}

impl fmt::Debug for Permits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Permits({})", self.count)
    }
}

#[cfg(test)]
mod tests;
