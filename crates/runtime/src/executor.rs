//! The single-threaded executor.
//!
//! A *turn* polls ready tasks until none is left. Whoever wants to batch work of one turn waits
//! for [`Runtime::turn_end`]: it resolves when no other task is ready, so that all requests that
//! arrived together have been seen.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use base::BufferPool;

use crate::sync::{OneshotReceiver, oneshot};

/// Monotonic time since an arbitrary start, in nanoseconds; it counts suspended time
/// (CLOCK_BOOTTIME), as leases need (design rule 54).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub u64);

impl Time {
    /// The time `duration` later; saturates.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A source of time.
pub trait Clock {
    /// Monotonic time.
    fn now(&self) -> Time;
    /// Wall time in nanoseconds since 1970; may jump.
    fn wall_ns(&self) -> u64;
}

/// The order in which ready tasks are polled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// First come, first served: production.
    Fifo,
    /// A random ready task next: the simulator looks for races with it.
    Random,
}

/// What makes up a runtime.
pub struct Options {
    /// Poll order.
    pub order: Order,
    /// Seed of all random numbers.
    pub seed: u64,
    /// Source of time.
    pub clock: Rc<dyn Clock>,
    /// Called from any thread when a task became ready, so that a waiting reactor looks up.
    pub unpark: Arc<dyn Fn() + Send + Sync>,
}

/// The executor with its clock, random numbers and buffers. Clones share it.
#[derive(Clone)]
pub struct Runtime(Rc<Inner>);

struct Inner {
    ready: Arc<ReadyQueue>,
    tasks: RefCell<Vec<TaskSlot>>,
    free: RefCell<Vec<usize>>,
    timers: RefCell<BTreeMap<(Time, u64), Waker>>,
    timer_count: Cell<u64>,
    turn_end: RefCell<Vec<Waker>>,
    turns_ended: Cell<u64>,
    order: Order,
    random: Cell<u64>,
    clock: Rc<dyn Clock>,
    buffers: BufferPool,
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

struct TaskSlot {
    /// `None` while the task is being polled or after it ended.
    task: Option<Task>,
    waker: Arc<TaskWaker>,
}

struct ReadyQueue {
    tasks: Mutex<VecDeque<Arc<TaskWaker>>>,
    unpark: Arc<dyn Fn() + Send + Sync>,
}

struct TaskWaker {
    index: usize,
    queued: AtomicBool,
    ended: AtomicBool,
    ready: Arc<ReadyQueue>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.ended.load(Ordering::Acquire) || self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        self.ready.push(Arc::clone(self));
        (self.ready.unpark)();
    }
}

impl ReadyQueue {
    fn push(&self, waker: Arc<TaskWaker>) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push_back(waker);
    }

    fn is_empty(&self) -> bool {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Takes the next task, by `pick` out of the number of ready ones.
    fn pop(&self, pick: impl FnOnce(usize) -> usize) -> Option<Arc<TaskWaker>> {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if tasks.is_empty() {
            return None;
        }
        let index = pick(tasks.len());
        tasks.remove(index)
    }
}

impl Runtime {
    /// A runtime without tasks.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self(Rc::new(Inner {
            ready: Arc::new(ReadyQueue {
                tasks: Mutex::new(VecDeque::new()),
                unpark: options.unpark,
            }),
            tasks: RefCell::new(Vec::new()),
            free: RefCell::new(Vec::new()),
            timers: RefCell::new(BTreeMap::new()),
            timer_count: Cell::new(0),
            turn_end: RefCell::new(Vec::new()),
            turns_ended: Cell::new(0),
            order: options.order,
            // xorshift must not start at zero; the constant spreads small seeds.
            random: Cell::new((options.seed ^ 0x9e37_79b9_7f4a_7c15).max(1)),
            clock: options.clock,
            buffers: BufferPool::default(),
        }))
    }

    /// Starts a task. Dropping the handle lets it go on by itself.
    pub fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> JoinHandle<T> {
        let (sender, receiver) = oneshot();
        let task: Task = Box::pin(async move {
            sender.send(future.await);
        });
        let mut tasks = self.0.tasks.borrow_mut();
        let index = self.0.free.borrow_mut().pop().unwrap_or(tasks.len());
        let waker = Arc::new(TaskWaker {
            index,
            queued: AtomicBool::new(true),
            ended: AtomicBool::new(false),
            ready: Arc::clone(&self.0.ready),
        });
        let slot = TaskSlot { task: Some(task), waker: Arc::clone(&waker) };
        match tasks.get_mut(index) {
            Some(free) => *free = slot,
            None => tasks.push(slot),
        }
        self.0.ready.push(waker);
        JoinHandle(receiver)
    }

    /// Whether a task is ready to be polled.
    #[must_use]
    pub fn has_ready(&self) -> bool {
        !self.0.ready.is_empty()
    }

    /// Polls one ready task. `false` if there was none.
    pub fn step(&self) -> bool {
        let next = match self.0.order {
            Order::Fifo => self.0.ready.pop(|_| 0),
            Order::Random => self.0.ready.pop(|count| self.random_below(count)),
        };
        let Some(waker) = next else { return false };
        waker.queued.store(false, Ordering::Release);
        let task = self.0.tasks.borrow_mut().get_mut(waker.index).and_then(|slot| {
            // A stale waker of a task that ended must not poll its slot's next tenant.
            if Arc::ptr_eq(&slot.waker, &waker) { slot.task.take() } else { None }
        });
        let Some(mut task) = task else { return true };
        let poll_waker = Waker::from(Arc::clone(&waker));
        match task.as_mut().poll(&mut Context::from_waker(&poll_waker)) {
            Poll::Pending => {
                if let Some(slot) = self.0.tasks.borrow_mut().get_mut(waker.index) {
                    slot.task = Some(task);
                }
            }
            Poll::Ready(()) => {
                waker.ended.store(true, Ordering::Release);
                self.0.free.borrow_mut().push(waker.index);
            }
        }
        true
    }

    /// Polls until nothing is ready, then ends the turn, until that makes nothing ready either.
    pub fn run_until_stalled(&self) {
        loop {
            while self.step() {}
            if !self.end_turn() {
                return;
            }
        }
    }

    /// Wakes those who wait for the end of the turn. `false` if nobody does.
    pub fn end_turn(&self) -> bool {
        let waiting = std::mem::take(&mut *self.0.turn_end.borrow_mut());
        let any = !waiting.is_empty();
        self.0.turns_ended.set(self.0.turns_ended.get() + 1);
        for waker in waiting {
            waker.wake();
        }
        any
    }

    /// Drops every task, as a killed process does. The runtime must not be used afterwards.
    pub fn kill(&self) {
        // Dropping a task may wake or spawn others: take them out first, then drop.
        let tasks = std::mem::take(&mut *self.0.tasks.borrow_mut());
        drop(tasks);
        self.0.timers.borrow_mut().clear();
        self.0.turn_end.borrow_mut().clear();
    }

    /// When the next timer is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        self.0.timers.borrow().keys().next().map(|&(deadline, _)| deadline)
    }

    /// Wakes all whose time has come.
    pub fn fire_timers(&self) {
        let now = self.now();
        loop {
            let mut timers = self.0.timers.borrow_mut();
            match timers.first_entry() {
                Some(entry) if entry.key().0 <= now => {
                    let waker = entry.remove();
                    drop(timers);
                    waker.wake();
                }
                _ => return,
            }
        }
    }

    /// Monotonic time.
    #[must_use]
    pub fn now(&self) -> Time {
        self.0.clock.now()
    }

    /// Wall time in nanoseconds since 1970.
    #[must_use]
    pub fn wall_ns(&self) -> u64 {
        self.0.clock.wall_ns()
    }

    /// A random number. Not for secrets.
    #[must_use]
    pub fn random(&self) -> u64 {
        // xorshift64*, Vigna 2016: small, and the same on every machine.
        let mut x = self.0.random.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0.random.set(x);
        x.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A random number below `bound`, which must not be zero.
    #[must_use]
    pub fn random_below(&self, bound: usize) -> usize {
        usize::try_from(self.random() % u64::try_from(bound.max(1)).unwrap_or(u64::MAX))
            .unwrap_or(0)
    }

    /// The buffers of this thread.
    #[must_use]
    pub fn buffers(&self) -> &BufferPool {
        &self.0.buffers
    }

    /// Waits until `duration` has passed.
    pub fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static {
        self.sleep_until(self.now().after(duration))
    }

    /// Waits until `deadline`.
    pub fn sleep_until(&self, deadline: Time) -> impl Future<Output = ()> + 'static {
        Sleep { runtime: self.clone(), deadline, timer: None }
    }

    /// Lets every other ready task run first.
    pub fn yield_now(&self) -> impl Future<Output = ()> + 'static {
        let mut yielded = false;
        std::future::poll_fn(move |context| {
            if std::mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            Poll::Pending
        })
    }

    /// Lets every other ready task run first, has what they submitted given to the device, and goes
    /// on after that. Whoever has much to start does so in rounds: the device works on one while the
    /// next is prepared.
    pub fn next_round(&self) -> impl Future<Output = ()> + 'static {
        let runtime = self.clone();
        let mut waited = false;
        std::future::poll_fn(move |context| {
            if std::mem::replace(&mut waited, true) {
                return Poll::Ready(());
            }
            // A timer that is due: the driver looks at them when no task is ready any more.
            let key = (Time::default(), runtime.timer_id());
            runtime.0.timers.borrow_mut().insert(key, context.waker().clone());
            Poll::Pending
        })
    }

    /// Waits until no other task is ready, for the first time after this call.
    pub fn turn_end(&self) -> impl Future<Output = ()> + 'static {
        let runtime = self.clone();
        let turn = self.0.turns_ended.get();
        std::future::poll_fn(move |context| {
            if runtime.0.turns_ended.get() != turn {
                return Poll::Ready(());
            }
            runtime.0.turn_end.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Runtime({} tasks)", self.0.tasks.borrow().len())
    }
}

struct Sleep {
    runtime: Runtime,
    deadline: Time,
    timer: Option<(Time, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.runtime.now() >= self.deadline {
            return Poll::Ready(());
        }
        let key = self.timer.unwrap_or_else(|| (self.deadline, self.runtime.timer_id()));
        self.timer = Some(key);
        self.runtime.0.timers.borrow_mut().insert(key, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.timer {
            self.runtime.0.timers.borrow_mut().remove(&key);
        }
    }
}

impl Runtime {
    fn timer_id(&self) -> u64 {
        self.0.timer_count.replace(self.0.timer_count.get() + 1)
    }
}

/// The result of a spawned task.
///
/// # Panics
/// When polled after the task was killed.
pub struct JoinHandle<T>(OneshotReceiver<T>);

impl<T> Future for JoinHandle<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        Pin::new(&mut self.0).poll(context).map(|result| {
            #[expect(clippy::expect_used, reason = "a task ends by itself or with its runtime")]
            result.expect("a task is not dropped while somebody waits for it")
        })
    }
}

#[cfg(test)]
mod tests;
