use super::*;
use crate::{Clock, Options, Order, Runtime, Time};
use std::sync::Arc;

struct NoClock;

impl Clock for NoClock {
    fn now(&self) -> Time {
        Time(0)
    }

    fn wall_ns(&self) -> u64 {
        0
    }
}

fn runtime(seed: u64) -> Runtime {
    ordered(Order::Random, seed)
}

fn ordered(order: Order, seed: u64) -> Runtime {
    let unpark = Arc::new(|| ());
    Runtime::new(Options { order, seed, clock: Rc::new(NoClock), unpark })
}

/// Runs `task` until it ends; panics if it does not.
fn run<T: 'static>(runtime: &Runtime, task: impl Future<Output = T> + 'static) -> T {
    let result = Rc::new(RefCell::new(None));
    let slot = Rc::clone(&result);
    drop(runtime.spawn(async move {
        let value = task.await;
        *slot.borrow_mut() = Some(value);
    }));
    runtime.run_until_stalled();
    result.take().expect("the task ended")
}

#[test]
fn oneshot_delivers_or_tells_of_the_drop() {
    let runtime = runtime(0);
    let (sender, receiver) = oneshot();
    sender.send(7);
    assert_eq!(run(&runtime, receiver), Ok(7), "sent before anybody waited");
    let (sender, receiver) = oneshot();
    let waiting = runtime.spawn(receiver);
    runtime.run_until_stalled();
    sender.send(8);
    assert_eq!(run(&runtime, waiting), Ok(8), "sent while somebody waits");
    let (sender, receiver) = oneshot::<u8>();
    let waiting = runtime.spawn(receiver);
    runtime.run_until_stalled();
    drop(sender);
    assert_eq!(run(&runtime, waiting), Err(Dropped));
    let (sender, receiver) = oneshot();
    drop(receiver);
    let value = Rc::new(());
    sender.send(Rc::clone(&value));
    assert_eq!(Rc::strong_count(&value), 1, "what nobody waits for is dropped");
}

#[test]
fn a_signal_between_call_and_poll_is_not_lost() {
    let runtime = runtime(0);
    let signal = Signal::default();
    let changed = signal.changed();
    signal.notify();
    run(&runtime, changed);
}

#[test]
fn every_waiter_sees_every_change_of_the_condition() {
    for seed in 0..50 {
        let runtime = runtime(seed);
        let (signal, value) = (Signal::default(), Rc::new(Cell::new(0)));
        let reached = Rc::new(Cell::new(0));
        for goal in [1, 5, 5, 10] {
            let (signal, value, reached) = (signal.clone(), Rc::clone(&value), Rc::clone(&reached));
            drop(runtime.spawn(async move {
                while value.get() < goal {
                    signal.changed().await;
                }
                reached.set(reached.get() + 1);
            }));
        }
        let inner = runtime.clone();
        run(&runtime, async move {
            for _ in 0..10 {
                value.set(value.get() + 1);
                signal.notify();
                inner.yield_now().await;
            }
        });
        assert_eq!(reached.get(), 4, "seed {seed}");
    }
}

#[test]
fn an_abandoned_wait_leaves_nothing_behind() {
    let runtime = runtime(0);
    let signal = Signal::default();
    let inner = signal.clone();
    run(&runtime, async move {
        for _ in 0..100 {
            let mut changed = Box::pin(inner.changed());
            std::future::poll_fn(|context| {
                assert!(changed.as_mut().poll(context).is_pending());
                assert!(changed.as_mut().poll(context).is_pending(), "polled twice");
                Poll::Ready(())
            })
            .await;
        }
    });
    assert_eq!(signal.0.waiting.borrow().len(), 0);
}

#[test]
fn permits_go_out_in_order_of_asking() {
    // Polled in order of waking, tasks run in the order of their grants.
    let runtime = ordered(Order::Fifo, 0);
    let semaphore = Semaphore::new(10);
    let order = Rc::new(RefCell::new(Vec::new()));
    let held = run(&runtime, {
        let semaphore = semaphore.clone();
        async move { semaphore.acquire(8).await }
    });
    // A small request behind a large one waits, else the large one would starve.
    for (index, count) in [5, 1, 10, 2].into_iter().enumerate() {
        let (semaphore, order) = (semaphore.clone(), Rc::clone(&order));
        drop(runtime.spawn(async move {
            let permits = semaphore.acquire(count).await;
            order.borrow_mut().push(index);
            drop(permits);
        }));
    }
    runtime.run_until_stalled();
    assert!(order.borrow().is_empty(), "two are free, but the first wants five");
    drop(held);
    runtime.run_until_stalled();
    assert_eq!(*order.borrow(), [0, 1, 2, 3]);
    assert_eq!(semaphore.available(), 10);
}

#[test]
fn more_than_all_permits_waits_for_all() {
    let runtime = runtime(0);
    let semaphore = Semaphore::new(3);
    let inner = semaphore.clone();
    run(&runtime, async move {
        let permits = inner.acquire(100).await;
        assert_eq!(inner.available(), 0);
        drop(permits);
    });
    assert_eq!(semaphore.available(), 3);
}

#[test]
fn an_abandoned_request_does_not_eat_permits() {
    let runtime = runtime(0);
    let semaphore = Semaphore::new(1);
    let inner = semaphore.clone();
    run(&runtime, async move {
        let held = inner.acquire(1).await;
        let mut abandoned = Box::pin(inner.acquire(1));
        std::future::poll_fn(|context| {
            assert!(abandoned.as_mut().poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
        drop(abandoned);
        drop(held);
        drop(inner.acquire(1).await);
    });
    assert_eq!(semaphore.available(), 1);
}
