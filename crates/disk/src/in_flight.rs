//! The requests of one task that the disk has not completed: of a connection, or of a ring.
//!
//! A slot per request, each with a waker of its own that is made once and reused: a completion
//! marks its slot and wakes the one task, which polls the marked slots only. So a request costs no
//! task and no allocation here, and between a completion and the reply there is no hop. The price
//! is this file; a task per request was the road not taken.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use crate::{DiskError, LocalBoxFuture, Response};

/// Most requests of one task at a time. It must not start more.
pub const REQUESTS_MAX: usize = 256;

/// What a disk answers.
pub type Outcome = Result<Response, DiskError>;

/// A request under way.
pub type Pending = LocalBoxFuture<Outcome>;

const WORDS: usize = REQUESTS_MAX / 64;
const _: () = assert!(REQUESTS_MAX.is_multiple_of(64));

/// Requests under way, each with a `T` that says what to do at its end.
pub struct InFlight<T> {
    slots: Vec<Slot<T>>,
    free: Vec<usize>,
    count: usize,
    marks: Arc<Marks>,
}

struct Slot<T> {
    waker: Waker,
    occupant: Option<(Pending, T)>,
}

/// Which slots were woken, and the task to wake with them.
#[derive(Default)]
struct Marks {
    words: [AtomicU64; WORDS],
    task: Mutex<Option<Waker>>,
}

struct SlotWaker {
    index: usize,
    marks: Arc<Marks>,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if let Some(word) = self.marks.words.get(self.index / 64) {
            word.fetch_or(1 << (self.index % 64), Ordering::Release);
        }
        let task = self.marks.task.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = &*task {
            task.wake_by_ref();
        }
    }
}

impl<T> Default for InFlight<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> InFlight<T> {
    /// A table without requests.
    #[must_use]
    pub fn new() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), count: 0, marks: Arc::default() }
    }

    /// Number of requests under way.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Says which task to wake.
    pub fn register(&self, context: &Context<'_>) {
        let mut task = self.marks.task.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &mut *task {
            known.clone_from(context.waker());
            return;
        }
        *task = Some(context.waker().clone());
        // Woken when nobody was known, as one is that wakes itself in its first poll. Later marks have
        // woken the task: it may have better things to do than to look at them, and is not to be
        // woken for them again and again.
        if self.marks.words.iter().any(|word| word.load(Ordering::Acquire) != 0) {
            context.waker().wake_by_ref();
        }
    }

    /// Waits until a request was woken, or `others` have something, once: whoever waits looks at
    /// everything then.
    pub async fn woken(&self, mut others: impl FnMut(&mut Context<'_>) -> Poll<()>) {
        let mut woken = false;
        poll_fn(|context| {
            if std::mem::replace(&mut woken, true) {
                return Poll::Ready(());
            }
            self.register(context);
            others(context)
        })
        .await;
    }

    /// Polls a request once, and keeps it if it is not done at once.
    ///
    /// # Panics
    /// If there are [`REQUESTS_MAX`] already.
    pub fn start(&mut self, mut pending: Pending, tag: T) -> Option<(T, Outcome)> {
        let index = self.free.pop().unwrap_or_else(|| self.add_slot());
        let slot = self.slots.get_mut(index)?;
        match pending.as_mut().poll(&mut Context::from_waker(&slot.waker)) {
            Poll::Ready(outcome) => {
                self.free.push(index);
                Some((tag, outcome))
            }
            Poll::Pending => {
                slot.occupant = Some((pending, tag));
                self.count += 1;
                None
            }
        }
    }

    /// Polls the requests that were woken and hands those that are done to `done`.
    pub fn poll_marked(&mut self, mut done: impl FnMut(T, Outcome)) {
        for base in 0..WORDS {
            let Some(word) = self.marks.words.get(base) else { return };
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut marked = word.swap(0, Ordering::Acquire);
            while marked != 0 {
                let bit = marked.trailing_zeros() as usize;
                marked &= marked - 1;
                if let Some((tag, outcome)) = self.poll_slot(base * 64 + bit) {
                    done(tag, outcome);
                }
            }
        }
    }

    fn poll_slot(&mut self, index: usize) -> Option<(T, Outcome)> {
        let slot = self.slots.get_mut(index)?;
        // A late wake-up of an earlier occupant finds the slot empty, or polls once too often.
        let (pending, _) = slot.occupant.as_mut()?;
        let Poll::Ready(outcome) = pending.as_mut().poll(&mut Context::from_waker(&slot.waker))
        else {
            return None;
        };
        let (_, tag) = slot.occupant.take()?;
        self.free.push(index);
        self.count -= 1;
        Some((tag, outcome))
    }

    fn add_slot(&mut self) -> usize {
        let index = self.slots.len();
        assert!(index < REQUESTS_MAX, "no more requests are started than there is room for");
        let waker = Waker::from(Arc::new(SlotWaker { index, marks: Arc::clone(&self.marks) }));
        self.slots.push(Slot { waker, occupant: None });
        index
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use runtime::sync::{OneshotSender, oneshot};

    use super::*;

    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn pending() -> (OneshotSender<Outcome>, Pending) {
        let (sender, receiver) = oneshot();
        (sender, Box::pin(async move { receiver.await.unwrap() }))
    }

    #[test]
    fn a_request_that_wakes_itself_before_the_task_is_known_is_polled_again() {
        let mut in_flight = InFlight::new();
        let mut polled = false;
        let woken = std::future::poll_fn(move |context| {
            if std::mem::replace(&mut polled, true) {
                return Poll::Ready(Ok(Response::Done));
            }
            context.waker().wake_by_ref();
            Poll::Pending
        });
        assert!(in_flight.start(Box::pin(woken), ()).is_none());
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(Arc::clone(&count));
        for _ in 0..2 {
            in_flight.register(&Context::from_waker(&waker));
            assert_eq!(count.0.load(Ordering::Relaxed), 1, "once, whenever it looks at it");
        }
        in_flight.poll_marked(|(), _| ());
        assert_eq!(in_flight.count(), 0);
    }

    #[test]
    fn only_what_was_woken_is_polled_and_slots_are_reused() {
        let mut in_flight = InFlight::new();
        let count = Arc::new(Count(AtomicUsize::new(0)));
        in_flight.register(&Context::from_waker(&Waker::from(Arc::clone(&count))));
        assert!(in_flight.start(Box::pin(async { Ok(Response::Done) }), 0).is_some());
        let mut senders: Vec<_> = (0..200)
            .map(|tag| {
                let (sender, pending) = pending();
                assert!(in_flight.start(pending, tag).is_none());
                Some(sender)
            })
            .collect();
        for tag in [3, 199, 64] {
            senders[tag].take().unwrap().send(Ok(Response::Done));
        }
        assert_eq!(count.0.load(Ordering::Relaxed), 3);
        let mut done = Vec::new();
        in_flight.poll_marked(|tag, _| done.push(tag));
        assert_eq!(done, [3, 64, 199]);
        in_flight.poll_marked(|tag, _| panic!("{tag} was not woken"));
        assert_eq!(in_flight.count(), 197);
        let (_sender, pending) = pending();
        assert!(in_flight.start(pending, 7).is_none());
        assert_eq!(in_flight.slots.len(), 200, "a free slot was reused");
    }
}
