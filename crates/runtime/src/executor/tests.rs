use super::*;
use std::sync::atomic::AtomicUsize;

/// A clock that stands until it is set.
#[derive(Default)]
struct TestClock(Cell<u64>);

impl Clock for TestClock {
    fn now(&self) -> Time {
        Time(self.0.get())
    }

    fn wall_ns(&self) -> u64 {
        self.0.get()
    }
}

fn runtime(order: Order, seed: u64) -> (Runtime, Rc<TestClock>) {
    let clock = Rc::new(TestClock::default());
    let options =
        Options { order, seed, clock: Rc::<TestClock>::clone(&clock), unpark: Arc::new(|| ()) };
    (Runtime::new(options), clock)
}

/// The order in which ten tasks, each of three steps, make their steps.
fn trace(order: Order, seed: u64) -> Vec<usize> {
    let (runtime, _) = runtime(order, seed);
    let steps = Rc::new(RefCell::new(Vec::new()));
    for task in 0..10 {
        let (steps, inner) = (Rc::clone(&steps), runtime.clone());
        drop(runtime.spawn(async move {
            for _ in 0..3 {
                steps.borrow_mut().push(task);
                inner.yield_now().await;
            }
        }));
    }
    runtime.run_until_stalled();
    steps.take()
}

#[test]
fn a_seed_is_one_order() {
    let in_turn: Vec<usize> = (0..10).cycle().take(30).collect();
    assert_eq!(trace(Order::Fifo, 1), in_turn);
    assert_eq!(trace(Order::Fifo, 2), in_turn, "the seed does not matter");
    assert_eq!(trace(Order::Random, 1), trace(Order::Random, 1));
    assert_ne!(trace(Order::Random, 1), trace(Order::Random, 2));
    assert_ne!(trace(Order::Random, 1), in_turn);
}

#[test]
fn a_turn_ends_when_all_others_have_run() {
    for seed in 0..50 {
        let (runtime, _) = runtime(Order::Random, seed);
        let requests = Rc::new(Cell::new(0));
        let batches = Rc::new(RefCell::new(Vec::new()));
        let (seen, at_end, inner) = (Rc::clone(&requests), Rc::clone(&batches), runtime.clone());
        drop(runtime.spawn(async move {
            for _ in 0..2 {
                inner.turn_end().await;
                at_end.borrow_mut().push(seen.replace(0));
            }
        }));
        for _ in 0..5 {
            let (requests, inner) = (Rc::clone(&requests), runtime.clone());
            drop(runtime.spawn(async move {
                inner.yield_now().await;
                requests.set(requests.get() + 1);
            }));
        }
        runtime.run_until_stalled();
        assert_eq!(*batches.borrow(), [5, 0], "all five in the first batch");
    }
}

#[test]
fn the_end_of_a_turn_is_not_mistaken_for_another_wake() {
    let (runtime, _) = runtime(Order::Fifo, 0);
    let (sender, receiver) = oneshot::<()>();
    let others_ran = Rc::new(Cell::new(0));
    let (seen, inner) = (Rc::clone(&others_ran), runtime.clone());
    // One task waits for two things at once; the first to come must not count as the second.
    let waiting = runtime.spawn(async move {
        let (mut turn_end, mut receiver) = (Box::pin(inner.turn_end()), receiver);
        std::future::poll_fn(move |context| {
            let _ = Pin::new(&mut receiver).poll(context);
            turn_end.as_mut().poll(context)
        })
        .await;
        seen.get()
    });
    let (ran, inner) = (Rc::clone(&others_ran), runtime.clone());
    drop(runtime.spawn(async move {
        sender.send(());
        for _ in 0..3 {
            inner.yield_now().await;
            ran.set(ran.get() + 1);
        }
    }));
    let result = Rc::new(Cell::new(None));
    let slot = Rc::clone(&result);
    drop(runtime.spawn(async move { slot.set(Some(waiting.await)) }));
    runtime.run_until_stalled();
    assert_eq!(result.get(), Some(3));
}

#[test]
fn a_round_begins_when_the_driver_has_looked_at_the_device() {
    let (runtime, _) = runtime(Order::Fifo, 0);
    let rounds = Rc::new(Cell::new(0));
    let (count, inner) = (Rc::clone(&rounds), runtime.clone());
    drop(runtime.spawn(async move {
        loop {
            count.set(count.get() + 1);
            inner.next_round().await;
        }
    }));
    for round in 1..4 {
        runtime.run_until_stalled();
        assert_eq!(rounds.get(), round, "it waits, although nothing else is ready");
        assert_eq!(runtime.next_deadline(), Some(Time(0)), "the driver does not sleep");
        runtime.fire_timers();
    }
}

#[test]
fn timers_fire_in_order_and_only_when_due() {
    let (runtime, clock) = runtime(Order::Fifo, 0);
    let fired = Rc::new(RefCell::new(Vec::new()));
    for delay in [30, 10, 20, 10] {
        let (inner, fired) = (runtime.clone(), Rc::clone(&fired));
        drop(runtime.spawn(async move {
            inner.sleep(Duration::from_nanos(delay)).await;
            fired.borrow_mut().push(delay);
        }));
    }
    let abandoned = Box::pin(runtime.sleep(Duration::from_nanos(5)));
    runtime.run_until_stalled();
    drop(abandoned);
    assert_eq!(runtime.next_deadline(), Some(Time(10)));
    for (now, expected) in
        [(9, &[][..]), (10, &[10, 10]), (29, &[10, 10, 20]), (30, &[10, 10, 20, 30])]
    {
        clock.0.set(now);
        runtime.fire_timers();
        runtime.run_until_stalled();
        assert_eq!(*fired.borrow(), expected, "at {now}");
    }
    assert_eq!(runtime.next_deadline(), None);
}

#[test]
fn a_killed_runtime_drops_its_tasks_and_polls_them_no_more() {
    let (runtime, clock) = runtime(Order::Fifo, 0);
    let owned = Rc::new(());
    let polled = Rc::new(Cell::new(0));
    let (keep, count, inner) = (Rc::clone(&owned), Rc::clone(&polled), runtime.clone());
    drop(runtime.spawn(async move {
        let _keep = keep;
        loop {
            count.set(count.get() + 1);
            inner.sleep(Duration::from_nanos(1)).await;
        }
    }));
    runtime.run_until_stalled();
    assert_eq!((polled.get(), Rc::strong_count(&owned)), (1, 2));
    runtime.kill();
    assert_eq!(Rc::strong_count(&owned), 1, "what the task owned is dropped");
    clock.0.set(100);
    runtime.fire_timers();
    runtime.run_until_stalled();
    assert_eq!(polled.get(), 1);
}

#[test]
fn a_stale_waker_does_not_poll_the_next_tenant_of_its_slot() {
    let (runtime, _) = runtime(Order::Fifo, 0);
    let stale = Rc::new(RefCell::new(None));
    let slot = Rc::clone(&stale);
    drop(runtime.spawn(std::future::poll_fn(move |context| {
        *slot.borrow_mut() = Some(context.waker().clone());
        Poll::Ready(())
    })));
    runtime.run_until_stalled();
    let polls = Rc::new(Cell::new(0));
    let count = Rc::clone(&polls);
    drop(runtime.spawn(std::future::poll_fn(move |_| {
        count.set(count.get() + 1);
        Poll::<()>::Pending
    })));
    runtime.run_until_stalled();
    stale.take().unwrap().wake();
    runtime.run_until_stalled();
    assert_eq!(polls.get(), 1);
}

#[test]
fn a_wake_from_another_thread_is_seen_and_unparks() {
    let unparked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&unparked);
    let runtime = Runtime::new(Options {
        order: Order::Fifo,
        seed: 0,
        clock: Rc::new(TestClock::default()),
        unpark: Arc::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        }),
    });
    let (give, take) = std::sync::mpsc::channel();
    let mut polls = 0;
    let done = runtime.spawn(std::future::poll_fn(move |context| {
        polls += 1;
        if polls == 2 {
            return Poll::Ready(());
        }
        give.send(context.waker().clone()).unwrap();
        Poll::Pending
    }));
    runtime.run_until_stalled();
    let before = unparked.load(Ordering::SeqCst);
    let waker = take.recv().unwrap();
    std::thread::scope(|scope| scope.spawn(|| waker.wake()).join().unwrap());
    assert_eq!(unparked.load(Ordering::SeqCst), before + 1);
    assert!(runtime.has_ready());
    let ended = Rc::new(Cell::new(false));
    let flag = Rc::clone(&ended);
    drop(runtime.spawn(async move {
        done.await;
        flag.set(true);
    }));
    runtime.run_until_stalled();
    assert!(ended.get());
}
