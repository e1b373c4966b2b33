//! Eventfds that the other end may use as it likes.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use parallax_runtime::reactor::{Event, Io};
use rustix::event::{EventfdFlags, eventfd};

use crate::on_each_engine;

/// An eventfd that blocks, as the other end may have made it, and ours.
fn pair(io: &Io) -> (OwnedFd, Rc<Event>) {
    let theirs = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let ours = Event::adopt(io, theirs.try_clone().unwrap()).unwrap();
    (theirs, Rc::new(ours))
}

fn count(fd: impl AsFd) -> u64 {
    let mut bytes = [0u8; 8];
    rustix::io::read(fd, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn add(fd: impl AsFd, count: u64) {
    rustix::io::write(fd, &count.to_le_bytes()).unwrap();
}

/// How many descriptors of this process lead to the same eventfd.
fn ends(fd: &OwnedFd) -> usize {
    let identity = |path: std::path::PathBuf| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().find(|line| line.starts_with("eventfd-id")).map(str::to_owned)
    };
    let same = identity(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()).into());
    assert!(same.is_some());
    let all = std::fs::read_dir("/proc/self/fdinfo").unwrap();
    all.filter(|entry| identity(entry.as_ref().unwrap().path()) == same).count()
}

#[test]
fn a_wait_ends_with_a_signal_and_takes_all_there_are() {
    on_each_engine(|reactor| {
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        let run = async move {
            let (theirs, ours) = pair(&io);
            add(&theirs, 3);
            Rc::clone(&ours).wait().await.unwrap();
            let waiting = runtime.spawn(Rc::clone(&ours).wait());
            runtime.sleep(Duration::from_millis(5)).await;
            add(&theirs, 1);
            waiting.await.unwrap();
            add(&theirs, 1);
            assert_eq!(count(&theirs), 1, "nothing was left, and nothing was taken");
        };
        reactor.run(run).unwrap();
    });
}

#[test]
fn signals_arrive_and_merge() {
    on_each_engine(|reactor| {
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        let run = async move {
            let (theirs, ours) = pair(&io);
            for _ in 0..1000 {
                ours.signal();
            }
            // The last one was asked for while the first was under way: it may come on its own.
            runtime.sleep(Duration::from_millis(50)).await;
            let merged = count(&theirs);
            assert!((1..=2).contains(&merged), "{merged}");
            ours.signal();
            runtime.sleep(Duration::from_millis(50)).await;
            assert!((1..=2).contains(&count(&theirs)));
        };
        reactor.run(run).unwrap();
    });
}

#[test]
fn an_eventfd_that_is_full_holds_up_nobody() {
    on_each_engine(|reactor| {
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        let run = async move {
            let (theirs, ours) = pair(&io);
            add(&theirs, u64::MAX - 1);
            for _ in 0..10_000 {
                ours.signal();
                runtime.yield_now().await;
            }
            runtime.sleep(Duration::from_millis(5)).await;
            assert_eq!(count(&theirs), u64::MAX - 1);
            // What had to wait is given now.
            runtime.sleep(Duration::from_millis(5)).await;
            assert!(count(&theirs) >= 1);
        };
        reactor.run(run).unwrap();
    });
}

#[test]
fn what_is_no_eventfd_is_refused() {
    on_each_engine(|reactor| {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Event::adopt(reactor.io(), file.into()).is_err());
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Event::adopt(reactor.io(), socket.into()).is_err());
    });
}

#[test]
fn a_wait_that_is_given_up_leaves_nothing_open() {
    on_each_engine(|reactor| {
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        let run = async move {
            let (theirs, ours) = pair(&io);
            let mut wait = Box::pin(Rc::clone(&ours).wait());
            std::future::poll_fn(|context| {
                assert!(wait.as_mut().poll(context).is_pending());
                std::task::Poll::Ready(())
            })
            .await;
            assert_eq!(ends(&theirs), 2);
            drop(wait);
            ours.signal();
            drop(ours);
            runtime.sleep(Duration::from_millis(5)).await;
            assert_eq!(ends(&theirs), 1, "ours is closed");
            assert_eq!(count(&theirs), 1, "the last signal was given");
        };
        reactor.run(run).unwrap();
    });
}
