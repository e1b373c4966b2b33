//! What is looked at in memory.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use parallax_runtime::Runtime;
use parallax_runtime::reactor::{Io, Lookout, Reactor, Watch};

use crate::on_each_engine;

/// A ring in memory, as a lookout sees it.
#[derive(Default)]
struct Mailbox {
    full: Cell<bool>,
    /// Whether something comes at the moment when it is told to announce itself.
    comes_late: Cell<bool>,
    looked: Cell<u32>,
    announced: Cell<u32>,
}

impl Lookout for Mailbox {
    fn has_news(&self) -> bool {
        self.looked.set(self.looked.get() + 1);
        self.full.get()
    }

    fn announce(&self) -> bool {
        self.announced.set(self.announced.get() + 1);
        if self.comes_late.get() {
            self.full.set(true);
        }
        self.full.get()
    }
}

/// Waits until the mailbox is full and somebody has said so.
async fn filled(watcher: &Watcher, mailbox: Rc<Mailbox>) {
    let watch = Watch::new(&watcher.io, mailbox.clone());
    let mut polled = false;
    poll_fn(|context| {
        watch.arm(context.waker());
        if std::mem::replace(&mut polled, true) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    assert!(mailbox.full.get(), "woken for nothing");
}

struct Watcher {
    runtime: Runtime,
    io: Io,
}

impl Watcher {
    fn of(reactor: &Reactor) -> Self {
        Self { runtime: reactor.runtime().clone(), io: reactor.io().clone() }
    }
}

#[test]
fn news_are_found_while_the_thread_is_awake() {
    on_each_engine(|reactor| {
        let watcher = Watcher::of(&reactor);
        let mailbox = Rc::new(Mailbox::default());
        let (filler, seen) = (Rc::clone(&mailbox), Rc::clone(&mailbox));
        let run = async move {
            let runtime = watcher.runtime.clone();
            let busy = watcher.runtime.spawn(async move {
                for turn in 0..100 {
                    if turn == 50 {
                        filler.full.set(true);
                    }
                    runtime.next_round().await;
                }
            });
            filled(&watcher, mailbox).await;
            busy.await;
        };
        reactor.run(run).unwrap();
        assert_eq!(seen.announced.get(), 0, "the thread never slept");
    });
}

#[test]
fn what_comes_before_the_thread_sleeps_is_not_slept_through() {
    on_each_engine(|reactor| {
        let watcher = Watcher::of(&reactor);
        let mailbox = Rc::new(Mailbox::default());
        mailbox.comes_late.set(true);
        let seen = Rc::clone(&mailbox);
        let run = async move {
            let runtime = watcher.runtime.clone();
            // Without this nothing would end the sleep that must not be.
            let alarm = watcher.runtime.spawn(async move {
                runtime.sleep(Duration::from_secs(5)).await;
                panic!("slept through the news");
            });
            filled(&watcher, mailbox).await;
            drop(alarm);
        };
        reactor.run(run).unwrap();
        assert_eq!(seen.announced.get(), 1);
    });
}

#[test]
fn one_that_was_announced_costs_nothing_more() {
    on_each_engine(|reactor| {
        let watcher = Watcher::of(&reactor);
        let mailbox = Rc::new(Mailbox::default());
        let seen = Rc::clone(&mailbox);
        let run = async move {
            let runtime = watcher.runtime.clone();
            let waiting = runtime.spawn(async move { filled(&watcher, mailbox).await });
            runtime.sleep(Duration::from_millis(10)).await;
            let looked = seen.looked.get();
            for _ in 0..5 {
                runtime.sleep(Duration::from_millis(2)).await;
            }
            assert_eq!((seen.announced.get(), seen.looked.get()), (1, looked));
            drop(waiting);
        };
        reactor.run(run).unwrap();
    });
}
