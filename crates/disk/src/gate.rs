//! A disk for tests of frontends: it completes requests when and in the order the test says.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use base::ErrorKind;
use runtime::sync::{OneshotSender, oneshot};

use crate::in_flight::Outcome;
use crate::{
    Disk, DiskError, Identity, LocalBoxFuture, MemDisk, Request, Response, copy_segments, split,
};

/// A [`MemDisk`] behind a gate.
pub struct GateDisk {
    memory: RefCell<MemDisk>,
    /// Which disk it is.
    pub identity: Cell<Identity>,
    /// Which state of it.
    number: Cell<u8>,
    held: Cell<bool>,
    waiting: RefCell<Vec<(Request, OneshotSender<Outcome>)>>,
    /// Every request, as debug text.
    pub log: RefCell<Vec<String>>,
    /// What the next requests fail with.
    pub failure: Cell<Option<ErrorKind>>,
}

impl GateDisk {
    /// An open gate.
    #[must_use]
    pub fn new(memory: MemDisk) -> Rc<Self> {
        Rc::new(Self {
            memory: RefCell::new(memory),
            identity: Cell::default(),
            number: Cell::new(1),
            held: Cell::new(false),
            waiting: RefCell::default(),
            log: RefCell::default(),
            failure: Cell::new(None),
        })
    }

    /// From now on it is in another state.
    pub fn become_other(&self, memory: MemDisk) {
        self.memory.replace(memory);
        self.number.set(self.number.get().wrapping_add(1));
    }

    /// From now on requests wait.
    pub fn hold(&self) {
        self.held.set(true);
    }

    /// Requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.borrow().len()
    }

    /// Completes the request at `index` of those that wait.
    ///
    /// # Panics
    /// If there is none.
    pub fn release(&self, index: usize) {
        let (request, sender) = self.waiting.borrow_mut().remove(index);
        sender.send(self.execute(request));
    }

    /// Completes all that wait, and lets others pass.
    pub fn release_all(&self) {
        self.held.set(false);
        while self.waiting() > 0 {
            self.release(0);
        }
    }

    /// Ends the disk, as a deletion does.
    pub fn sever(&self) {
        self.memory.borrow().sever();
    }

    /// What it holds; zeroes where that cannot be read.
    #[must_use]
    pub fn contents(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let mut rest = bytes.as_mut_slice();
        for (offset, length) in split::pieces(offset, length) {
            let (piece, others) = rest.split_at_mut(length);
            if let Ok(Response::Data(segments)) = self.execute(Request::Read { offset, length }) {
                copy_segments(&segments, piece);
            }
            rest = others;
        }
        bytes
    }

    fn execute(&self, request: Request) -> Outcome {
        match self.failure.get() {
            Some(kind) => Err(DiskError::new(kind, "a failure that the test wants")),
            None => self.memory.borrow().execute(request),
        }
    }
}

impl Disk for GateDisk {
    fn serial(&self) -> String {
        "plx-0000000000000007".to_owned()
    }

    fn identity(&self) -> Identity {
        Identity { state: self.number.get().into(), ..self.identity.get() }
    }

    fn size_bytes(&self) -> u64 {
        self.memory.borrow().size_bytes()
    }

    fn read_only(&self) -> bool {
        self.memory.borrow().read_only()
    }

    fn severed(&self) -> bool {
        self.memory.borrow().severed()
    }

    fn submit(&self, request: Request) -> LocalBoxFuture<Outcome> {
        self.log.borrow_mut().push(format!("{request:?}"));
        if !self.held.get() {
            return Box::pin(std::future::ready(self.execute(request)));
        }
        let (sender, receiver) = oneshot();
        self.waiting.borrow_mut().push((request, sender));
        let forgotten = DiskError::new(ErrorKind::Io, "the test has forgotten the request");
        Box::pin(async move { receiver.await.unwrap_or(Err(forgotten)) })
    }
}
