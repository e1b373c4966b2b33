//! How other threads reach a reactor: an eventfd that is written only while it sleeps, and a list
//! of functions to run on its thread.
//!
//! Why no wake-up is lost: a waker first publishes what it has (a ready task, a posted function, a
//! finished call), each under a mutex, then looks at `parked`. The reactor first sets `parked`,
//! then looks at those lists under the same mutexes, then sleeps. Whichever of the two took the
//! mutex later sees what the other did.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::Runtime;

type Posted = Box<dyn FnOnce(&Runtime) + Send>;

/// Shared between a reactor and whoever may have to wake it.
pub(super) struct Unparker {
    eventfd: OwnedFd,
    /// Whether the reactor sleeps, or is about to.
    parked: AtomicBool,
    /// `None` once the reactor is gone.
    posted: Mutex<Option<Vec<Posted>>>,
}

impl Unparker {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self {
            eventfd,
            parked: AtomicBool::new(false),
            posted: Mutex::new(Some(Vec::new())),
        }))
    }

    /// Makes a sleeping reactor look up. Costs one atomic load while it is awake.
    pub(super) fn unpark(&self) {
        if self.parked.load(Ordering::SeqCst) && self.parked.swap(false, Ordering::SeqCst) {
            // It can only fail when 2^64 - 2 wakes are pending: then it is readable anyway.
            let _ = rustix::io::write(&self.eventfd, &1u64.to_le_bytes());
        }
    }

    /// From now on `unpark` writes the eventfd. The caller then looks for work once more.
    pub(super) fn will_park(&self) {
        self.parked.store(true, Ordering::SeqCst);
    }

    pub(super) fn did_park(&self) {
        self.parked.store(false, Ordering::SeqCst);
    }

    /// Takes the wake-ups out of the eventfd.
    pub(super) fn drain(&self) {
        // EAGAIN means that there are none.
        let _ = rustix::io::read(&self.eventfd, &mut [0u8; 8]);
    }

    pub(super) fn eventfd(&self) -> &OwnedFd {
        &self.eventfd
    }

    /// `false` if the reactor is gone; the function is dropped then.
    fn post(&self, function: Posted) -> bool {
        let mut posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(list) = posted.as_mut() else { return false };
        list.push(function);
        drop(posted);
        self.unpark();
        true
    }

    pub(super) fn has_posted(&self) -> bool {
        let posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        posted.as_ref().is_some_and(|list| !list.is_empty())
    }

    pub(super) fn take_posted(&self) -> Vec<Posted> {
        let mut posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        posted.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Refuses and drops what is posted from now on.
    pub(super) fn close(&self) {
        // Dropped outside the lock: a function may own a `RemoteHandle` and post in its drop.
        let rest = self.posted.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(rest);
    }
}

/// Hands functions to a reactor's thread from any other one.
#[derive(Clone)]
pub struct RemoteHandle(pub(super) Arc<Unparker>);

impl RemoteHandle {
    /// Runs `function` on the reactor's thread, soon, in the order of posting. `false` if the
    /// reactor is gone: `function` is dropped then, as it is if the reactor goes away first.
    pub fn post(&self, function: impl FnOnce(&Runtime) + Send + 'static) -> bool {
        self.0.post(Box::new(function))
    }
}

impl fmt::Debug for RemoteHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RemoteHandle")
    }
}
