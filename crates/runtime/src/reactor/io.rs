//! The handle to a reactor's engine: files, sockets, and the delivery of what is done.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use base::BufferPool;

use super::EngineChoice;
use super::event::Line;
use super::lookout::Lookouts;
use super::ring::Ring;
use super::threads::Threads;
use super::unpark::{RemoteHandle, Unparker};
use super::work::{Completed, Completions, FileOperation, Interest, Work};
use crate::sync::oneshot;

/// Single-block buffers that are registered with the kernel: 4 MiB, half of the 8 MiB that
/// RLIMIT_MEMLOCK commonly allows.
const REGISTERED_BUFFERS: u16 = 1024;

enum Engine {
    Ring(Box<Ring>),
    Threads(Threads),
}

/// Does I/O on the thread of its reactor. Clones share it.
#[derive(Clone)]
pub struct Io(Rc<Inner>);

struct Inner {
    engine: RefCell<Engine>,
    /// Why io_uring is not used, if it was tried.
    refusal: Option<io::Error>,
    unparker: Arc<Unparker>,
    lookouts: Lookouts,
    /// Memory for `turn`, empty in between.
    completed: Cell<Vec<Completed>>,
    /// Whether the reactor is gone: works are dropped then.
    closed: Cell<bool>,
}

impl Io {
    pub(super) fn start(choice: EngineChoice, unparker: &Arc<Unparker>) -> io::Result<Self> {
        let ring = match choice {
            EngineChoice::Auto | EngineChoice::IoUring => Some(Ring::new(unparker)),
            EngineChoice::ThreadPool => None,
        };
        let (engine, refusal) = match ring {
            Some(Ok(ring)) => (Engine::Ring(Box::new(ring)), None),
            Some(Err(error)) if choice == EngineChoice::IoUring => return Err(error),
            Some(Err(error)) => (Engine::Threads(Threads::new(unparker)?), Some(error)),
            None => (Engine::Threads(Threads::new(unparker)?), None),
        };
        Ok(Self(Rc::new(Inner {
            engine: RefCell::new(engine),
            refusal,
            unparker: Arc::clone(unparker),
            lookouts: Lookouts::default(),
            completed: Cell::default(),
            closed: Cell::new(false),
        })))
    }

    /// Registers single-block buffers with the kernel, if it lets us.
    pub(super) fn register_buffers(&self, buffers: &BufferPool) {
        let Engine::Ring(ring) = &mut *self.0.engine.borrow_mut() else { return };
        let outcome = buffers.register(REGISTERED_BUFFERS, |blocks| ring.register_buffers(blocks));
        if let Err(error) = outcome {
            tracing::debug!(%error, "the kernel refuses registered buffers; going on without");
        }
    }

    /// One line for people: which engine this is, and why.
    #[must_use]
    pub fn describe(&self) -> String {
        match (&*self.0.engine.borrow(), &self.0.refusal) {
            (Engine::Ring(ring), _) => {
                let with = match (ring.has_registered_files(), ring.has_registered_buffers()) {
                    (true, true) => "registered files and buffers",
                    (true, false) => "registered files, no registered buffers",
                    (false, true) => "registered buffers",
                    (false, false) => "nothing registered",
                };
                format!("io_uring ({with})")
            }
            (Engine::Threads(_), None) => "worker threads".to_owned(),
            (Engine::Threads(_), Some(refusal)) => {
                format!("worker threads (io_uring is refused: {refusal})")
            }
        }
    }

    /// Takes a file, to do operations on it.
    #[must_use]
    pub fn file(&self, fd: OwnedFd) -> File {
        File { io: self.clone(), descriptor: self.descriptor(fd) }
    }

    /// Reaches this reactor from other threads.
    #[must_use]
    pub fn remote(&self) -> RemoteHandle {
        RemoteHandle(Arc::clone(&self.0.unparker))
    }

    pub(super) fn lookouts(&self) -> &Lookouts {
        &self.0.lookouts
    }

    pub(super) fn descriptor(&self, fd: OwnedFd) -> Rc<Descriptor> {
        let registration = match &mut *self.0.engine.borrow_mut() {
            Engine::Ring(ring) => ring.register_file(fd.as_fd()),
            Engine::Threads(_) => None,
        };
        Rc::new(Descriptor { fd, registration, inner: Rc::downgrade(&self.0) })
    }

    /// Waits until `descriptor` is ready.
    pub(super) async fn ready(
        &self,
        descriptor: &Rc<Descriptor>,
        interest: Interest,
    ) -> io::Result<()> {
        let (done, outcome) = oneshot();
        self.submit(Work::Poll { descriptor: Rc::clone(descriptor), interest, done });
        outcome.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Starts a work. It is dropped if the reactor is gone.
    pub(super) fn submit(&self, work: Work) {
        if self.0.closed.get() {
            return;
        }
        match &mut *self.0.engine.borrow_mut() {
            Engine::Ring(ring) => ring.submit(work),
            Engine::Threads(threads) => threads.submit(work),
        }
    }

    /// Ends what waits for `descriptor`. A signal is given first if that is possible at once.
    pub(super) fn cancel(&self, descriptor: &Descriptor) {
        if self.0.closed.get() {
            return;
        }
        match &mut *self.0.engine.borrow_mut() {
            Engine::Ring(ring) => ring.cancel(descriptor),
            Engine::Threads(threads) => threads.cancel(descriptor),
        }
    }

    /// Whether `turn` would return at once.
    pub(super) fn has_finished(&self) -> bool {
        match &*self.0.engine.borrow() {
            Engine::Ring(ring) => ring.has_finished(),
            Engine::Threads(threads) => threads.has_finished(),
        }
    }

    /// Submits what is queued, waits at most `timeout` until something is done, and delivers it.
    ///
    /// # Errors
    /// If the kernel refuses to go on.
    pub(super) fn turn(&self, timeout: Option<Duration>) -> io::Result<()> {
        let mut completed = self.0.completed.take();
        let lookouts = &self.0.lookouts;
        let outcome = match &mut *self.0.engine.borrow_mut() {
            Engine::Ring(ring) => ring.turn(timeout, lookouts, &mut completed),
            Engine::Threads(threads) => threads.turn(timeout, lookouts, &mut completed),
        };
        // Wakes from here on are on this thread, and need no system call.
        self.0.unparker.did_park();
        lookouts.wake();
        // The engine is not borrowed any more: whoever gets a result may submit again.
        for Completed { work, result } in completed.drain(..) {
            self.deliver(work, result);
        }
        self.0.completed.set(completed);
        outcome
    }

    /// Takes no more works, and waits for those under way.
    pub(super) fn close(&self) {
        self.0.closed.set(true);
        let completed = match &mut *self.0.engine.borrow_mut() {
            Engine::Ring(ring) => ring.drain(),
            Engine::Threads(threads) => threads.drain(),
        };
        // Nobody is left to be told. Dropped here, where the engine is not borrowed.
        drop(completed);
    }

    fn deliver(&self, work: Work, result: i32) {
        let outcome = match usize::try_from(result) {
            Ok(count) => Ok(count),
            Err(_) => Err(io::Error::from_raw_os_error(result.saturating_neg())),
        };
        let again = matches!(-result, libc::EINTR | libc::EAGAIN);
        match work {
            Work::File { operation, sink, file } => {
                sink.complete(operation, outcome);
                drop(file);
            }
            Work::Receive { .. } | Work::Poll { .. } | Work::Send { .. } if again => {
                self.submit(work);
            }
            Work::Receive { stream, buffer, .. } => stream.received(outcome, buffer),
            Work::Send { stream, segments, skip } => match outcome {
                Ok(count) => stream.send_rest(segments, skip + count),
                Err(error) => stream.sent(Err(error)),
            },
            Work::Poll { done, .. } => done.send(outcome.map(drop)),
            Work::Signal { line } => Line::given(&line, self),
        }
    }
}

impl fmt::Debug for Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Io({})", self.describe())
    }
}

pub(super) fn gone() -> io::Error {
    io::Error::from_raw_os_error(libc::ECANCELED)
}

/// An open file. What is submitted goes on if this is dropped.
#[derive(Clone)]
pub struct File {
    io: Io,
    descriptor: Rc<Descriptor>,
}

impl File {
    /// Starts `operation`; it comes back to `sink` when it is done, unless the reactor is dropped
    /// before. Never blocks.
    pub fn submit(&self, operation: FileOperation, sink: Rc<dyn Completions>) {
        self.io.submit(Work::File { file: Rc::clone(&self.descriptor), operation, sink });
    }

    /// The reactor that drives it.
    #[must_use]
    pub fn io(&self) -> &Io {
        &self.io
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.fd()
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "File({:?})", self.descriptor.fd)
    }
}

/// An open descriptor, and its index if it is registered with the ring. Works under way on it own
/// a reference.
pub(super) struct Descriptor {
    fd: OwnedFd,
    registration: Option<u32>,
    inner: Weak<Inner>,
}

impl Descriptor {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn registration(&self) -> Option<u32> {
        self.registration
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // Engines hand works out before they are dropped, so the engine is not borrowed here. It
        // is gone only when its ring is, with all registrations.
        if let (Some(index), Some(inner)) = (self.registration, self.inner.upgrade())
            && let Engine::Ring(ring) = &mut *inner.engine.borrow_mut()
        {
            ring.unregister_file(index);
        }
    }
}
