//! Timers, other threads, fairness, and the end.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::mpsc;
use std::task::{Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use base::Buffer;
use parallax_runtime::reactor::{Address, Listener, Reactor};
use parallax_runtime::sync::Signal;

use crate::{on_each_engine, scratch_path};

#[test]
fn sleep_takes_as_long_as_asked_for() {
    on_each_engine(|reactor| {
        let runtime = reactor.runtime().clone();
        let ended = Rc::new(RefCell::new(Vec::new()));
        let log = Rc::clone(&ended);
        let run = async move {
            let sleepers = [30, 10, 20].map(|delay| {
                let (inner, log) = (runtime.clone(), Rc::clone(&log));
                runtime.spawn(async move {
                    let started = Instant::now();
                    inner.sleep(Duration::from_millis(delay)).await;
                    assert!(started.elapsed() >= Duration::from_millis(delay));
                    log.borrow_mut().push(delay);
                })
            });
            for sleeper in sleepers {
                sleeper.await;
            }
        };
        reactor.run(run).unwrap();
        assert_eq!(*ended.borrow(), [10, 20, 30]);
    });
}

#[test]
fn posted_functions_run_in_order_and_wake_a_sleeping_reactor() {
    const POSTS: u32 = 2_000;
    on_each_engine(|reactor| {
        let posters: Vec<_> = (0..3).map(|_| post_from_a_thread(&reactor, POSTS)).collect();
        let runtime = reactor.runtime().clone();
        reactor
            .run(async move {
                for poster in posters {
                    while !poster.is_finished() {
                        runtime.sleep(Duration::from_millis(1)).await;
                    }
                    poster.join().unwrap();
                }
            })
            .unwrap();
        let remote = reactor.io().remote();
        drop(reactor);
        assert!(!remote.post(|_| panic!("nobody is left to run this")));
    });
}

fn post_from_a_thread(reactor: &Reactor, posts: u32) -> thread::JoinHandle<()> {
    let remote = reactor.io().remote();
    thread::spawn(move || {
        let (give, take) = mpsc::channel();
        for number in 0..posts {
            let give = give.clone();
            assert!(remote.post(move |_| give.send(number).unwrap()));
            if number % 100 == 0 {
                // Lets the reactor fall asleep, and waits for it to wake.
                thread::sleep(Duration::from_micros(200));
            }
        }
        drop(give);
        assert!(take.iter().eq(0..posts), "in order, none lost");
    })
}

#[test]
fn a_post_can_end_a_run_that_waits_for_nothing_else() {
    on_each_engine(|reactor| {
        let remote = reactor.io().remote();
        let signal = Signal::default();
        let slot = signal.clone();
        SIGNAL.set(Some(slot));
        let poster = thread::spawn(move || {
            thread::sleep(Duration::from_millis(10));
            remote.post(|_| SIGNAL.with_borrow(|signal| signal.as_ref().unwrap().notify()))
        });
        reactor.run(signal.changed()).unwrap();
        assert!(poster.join().unwrap());
    });
}

thread_local! {
    /// What is posted must be `Send`, so it finds what belongs to the reactor's thread here.
    static SIGNAL: RefCell<Option<Signal>> = const { RefCell::new(None) };
}

/// A wake-up that is lost would leave both sides asleep for ever.
#[test]
fn no_wake_from_another_thread_is_lost() {
    on_each_engine(|reactor| {
        let (give, take) = mpsc::channel::<Waker>();
        // It spins, so as to wake at once; the task lingers for a time that differs each round.
        // So some wakes hit the moment between the reactor's last look and its sleep.
        let waker = thread::spawn(move || {
            loop {
                match take.try_recv() {
                    Ok(waker) => waker.wake(),
                    Err(mpsc::TryRecvError::Empty) => std::hint::spin_loop(),
                    Err(mpsc::TryRecvError::Disconnected) => return,
                }
            }
        });
        let rounds = 20_000;
        let mut polls = 0u32;
        let task = std::future::poll_fn(move |context| {
            polls += 1;
            if polls > rounds {
                return Poll::Ready(());
            }
            give.send(context.waker().clone()).unwrap();
            for _ in 0..polls.wrapping_mul(2_654_435_761) % 256 {
                std::hint::spin_loop();
            }
            Poll::Pending
        });
        reactor.run(task).unwrap();
        waker.join().unwrap();
    });
}

#[test]
fn a_busy_task_does_not_starve_timers_and_sockets() {
    on_each_engine(|reactor| {
        let runtime = reactor.runtime().clone();
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let (socket, _) = reactor.io().adopt(near.into()).unwrap();
        let busy = runtime.clone();
        drop(runtime.spawn(async move {
            loop {
                busy.yield_now().await;
            }
        }));
        let inner = runtime.clone();
        let count = reactor.run(async move {
            inner.sleep(Duration::from_millis(1)).await;
            std::io::Write::write_all(&mut &far, b"x").unwrap();
            socket.receive(Buffer::zeroed(1), 0..10).await.0.unwrap()
        });
        assert_eq!(count.unwrap(), 1);
    });
}

#[test]
fn a_reactor_ends_while_sockets_wait() {
    on_each_engine(|reactor| {
        let path = scratch_path();
        let runtime = reactor.runtime().clone();
        let listener = Listener::bind(reactor.io(), &Address::Unix(path.clone())).unwrap();
        drop(runtime.spawn(async move { listener.accept().await.map(drop) }));
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let (socket, _) = reactor.io().adopt(near.into()).unwrap();
        let owned = Rc::new(());
        let keep = Rc::clone(&owned);
        drop(runtime.spawn(async move {
            let _keep = keep;
            socket.receive(Buffer::zeroed(1), 0..10).await.0
        }));
        let inner = runtime.clone();
        reactor.run(async move { inner.sleep(Duration::from_millis(5)).await }).unwrap();
        drop(reactor);
        assert_eq!(Rc::strong_count(&owned), 2, "tasks stay until the runtime ends");
        runtime.kill();
        assert_eq!(Rc::strong_count(&owned), 1);
        assert!(!path.exists(), "the listener went with its task");
        let mut buffer = [0];
        assert_eq!(std::io::Read::read(&mut &far, &mut buffer).unwrap(), 0, "closed");
    });
}

#[test]
fn tasks_left_by_one_run_go_on_in_the_next() {
    on_each_engine(|reactor| {
        let runtime = reactor.runtime().clone();
        let inner = runtime.clone();
        let task = runtime.spawn(async move {
            inner.sleep(Duration::from_millis(5)).await;
            7
        });
        assert_eq!(reactor.run(async { 1 }).unwrap(), 1);
        assert_eq!(reactor.run(task).unwrap(), 7);
    });
}
