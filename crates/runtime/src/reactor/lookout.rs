//! What a reactor looks at in memory: rings that somebody else fills, and would otherwise have to
//! announce by a system call, which then takes others here to be heard.
//!
//! A lookout is on the list while its task waits. Then it is looked at in each turn, and over and
//! over while the thread looks for completions. Before the thread sleeps it is told to have its
//! news announced, and leaves the list: many idle ones cost nothing.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::task::Waker;

use super::io::Io;

/// What may have news. It is asked while nothing else runs on the thread, and may not do I/O.
pub trait Lookout {
    /// Whether there are news.
    fn has_news(&self) -> bool;
    /// The thread is about to sleep: from now on news must wake the task in another way, as by an
    /// eventfd that it waits for. Whether there are some already, for which that may not happen.
    fn announce(&self) -> bool;
}

/// A task's place on the list of its reactor. Dropping it takes it off.
pub struct Watch {
    io: Io,
    lookout: Rc<dyn Lookout>,
}

impl Watch {
    /// Looks out for a task, which must wait for the announcement of news as well.
    #[must_use]
    pub fn new(io: &Io, lookout: Rc<dyn Lookout>) -> Self {
        Self { io: io.clone(), lookout }
    }

    /// Has the task woken when there are news, until it is disarmed or the thread sleeps.
    pub fn arm(&self, waker: &Waker) {
        self.disarm();
        let entry = Entry { lookout: Rc::clone(&self.lookout), waker: waker.clone() };
        self.io.lookouts().0.borrow_mut().push(entry);
    }

    /// The task does not wait any more.
    pub fn disarm(&self) {
        let is_another = |entry: &Entry| !Rc::ptr_eq(&entry.lookout, &self.lookout);
        // It is not the last reference to the lookout that goes here: this has one.
        self.io.lookouts().0.borrow_mut().retain(is_another);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.disarm();
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

struct Entry {
    lookout: Rc<dyn Lookout>,
    waker: Waker,
}

/// Those whose tasks wait while the thread is awake.
#[derive(Default)]
pub(super) struct Lookouts(RefCell<Vec<Entry>>);

impl Lookouts {
    /// Whether one has news.
    pub(super) fn have_news(&self) -> bool {
        self.0.borrow().iter().any(|entry| entry.lookout.has_news())
    }

    /// The thread is about to sleep: whether it should not, since there are news.
    pub(super) fn announce(&self) -> bool {
        let mut list = self.0.borrow_mut();
        list.retain(|entry| entry.lookout.announce());
        !list.is_empty()
    }

    /// Wakes the tasks for which there are news.
    pub(super) fn wake(&self) {
        for entry in self.0.borrow().iter().filter(|entry| entry.lookout.has_news()) {
            entry.waker.wake_by_ref();
        }
    }
}
