//! The real device: a regular file or a block device, driven by a reactor.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use base::{BLOCK_SIZE, BLOCK_SIZE_U64, Buffer, Pba};
use runtime::reactor::{Completions, File, FileAction, FileOperation, Io};
use runtime::sync::OneshotSender;
use rustix::fs::FlockOperation;

use crate::open::{self, OpenError, OpenOptions, Opened};
use crate::{Backend, Cause, DeviceError, Operation};

/// Most operations in the kernel's hands; the rest wait here, in order. Enough for any device to
/// be busy, and few enough for a new operation not to stand behind a thousand others.
const IN_FLIGHT_MAX: usize = 128;

/// Most times that one operation is continued after an interruption or a short transfer.
const ATTEMPTS_MAX: u32 = 1000;

/// A file or block device as a [`Backend`]. Its lock is held until it is dropped and nothing is
/// under way on it any more.
pub struct BlockFile(Rc<State>);

struct State {
    file: File,
    /// See [`Opened::behind`].
    behind: Option<OwnedFd>,
    path: PathBuf,
    block_count: u64,
    is_block_device: bool,
    buffered: bool,
    /// By token of the operation.
    pending: RefCell<Vec<Option<Pending>>>,
    free: RefCell<Vec<usize>>,
    in_flight: Cell<usize>,
    waiting: RefCell<VecDeque<Operation>>,
}

/// What is known about an operation while the engine has it.
struct Pending {
    at: Pba,
    done: Done,
    attempts: u32,
}

enum Done {
    Read(OneshotSender<Result<Buffer, DeviceError>>),
    Other(OneshotSender<Result<(), DeviceError>>),
}

impl BlockFile {
    /// Opens the file or block device at `path`. Blocks for up to a second while another
    /// process holds it.
    ///
    /// # Errors
    /// See [`crate::OpenCause`].
    pub fn open(io: &Io, path: &Path, options: OpenOptions) -> Result<Self, OpenError> {
        Ok(Self::new(io, path, open::open(path, options)?, options.buffered))
    }

    /// Makes a new sparse file of `bytes`, rounded down to whole blocks, and opens it exclusively.
    /// File and name are durable on return.
    ///
    /// # Errors
    /// [`crate::OpenCause::Exists`], and those of `open`; nothing is left behind then.
    pub fn create(io: &Io, path: &Path, bytes: u64, buffered: bool) -> Result<Self, OpenError> {
        Ok(Self::new(io, path, open::create(path, bytes, buffered)?, buffered))
    }

    fn new(io: &Io, path: &Path, opened: Opened, buffered: bool) -> Self {
        Self(Rc::new(State {
            file: io.file(opened.fd),
            behind: opened.behind,
            path: path.to_owned(),
            block_count: opened.block_count,
            is_block_device: opened.is_block_device,
            buffered,
            pending: RefCell::default(),
            free: RefCell::default(),
            in_flight: Cell::new(0),
            waiting: RefCell::default(),
        }))
    }
}

impl Backend for BlockFile {
    fn submit(&self, operation: Operation) {
        if self.0.in_flight.get() < IN_FLIGHT_MAX {
            Rc::clone(&self.0).start(operation);
        } else {
            self.0.waiting.borrow_mut().push_back(operation);
        }
    }

    fn block_count(&self) -> u64 {
        self.0.block_count
    }

    fn describe(&self) -> String {
        let name = self.0.path.file_name().unwrap_or(self.0.path.as_os_str());
        let kind = if self.0.is_block_device { "block device" } else { "file" };
        let mode = if self.0.buffered { "page cache" } else { "O_DIRECT" };
        format!("{}: {kind}, {mode}, {}", name.display(), self.0.file.io().describe())
    }
}

impl fmt::Debug for BlockFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockFile({})", self.describe())
    }
}

impl State {
    fn start(self: Rc<Self>, operation: Operation) {
        let (at, action, done) = match operation {
            Operation::Read { at, block_count, buffer, done } => {
                let range = 0..block_count * BLOCK_SIZE;
                (at, FileAction::Read { buffer, range }, Done::Read(done))
            }
            Operation::Write { at, blocks, done } => {
                (at, FileAction::Write { blocks, skip: 0 }, Done::Other(done))
            }
            Operation::Flush { done } => (Pba::new(0), FileAction::Sync, Done::Other(done)),
            Operation::Discard { at, block_count, done } => {
                let length = block_count.saturating_mul(BLOCK_SIZE_U64);
                let action = if self.is_block_device {
                    FileAction::Discard { length }
                } else {
                    FileAction::Punch { length }
                };
                (at, action, Done::Other(done))
            }
            Operation::Allocate { done, .. } if self.is_block_device => return done.send(Ok(())),
            Operation::Allocate { at, block_count, done } => {
                let length = block_count.saturating_mul(BLOCK_SIZE_U64);
                (at, FileAction::Allocate { length }, Done::Other(done))
            }
        };
        self.in_flight.set(self.in_flight.get() + 1);
        let token = self.enter(Pending { at, done, attempts: 0 });
        let offset = at.get().saturating_mul(BLOCK_SIZE_U64);
        self.submit(FileOperation { token, offset, action });
    }

    fn submit(self: Rc<Self>, operation: FileOperation) {
        let file = self.file.clone();
        file.submit(operation, self);
    }

    /// Tells whoever waits, and starts what waited for room.
    fn end(self: Rc<Self>, operation: FileOperation, outcome: Result<(), Cause>) {
        let Some(Pending { at, done, .. }) = self.leave(operation.token) else { return };
        let outcome = outcome.map_err(|cause| DeviceError::new(cause, at));
        match (done, operation.action) {
            (Done::Read(done), FileAction::Read { buffer, .. }) => {
                done.send(outcome.map(|()| buffer));
            }
            (Done::Read(done), _) => done.send(Err(DeviceError::new(Cause::Gone, at))),
            (Done::Other(done), _) => done.send(outcome),
        }
        self.in_flight.set(self.in_flight.get() - 1);
        while self.in_flight.get() < IN_FLIGHT_MAX {
            let next = self.waiting.borrow_mut().pop_front();
            let Some(operation) = next else { return };
            Rc::clone(&self).start(operation);
        }
    }

    fn enter(&self, entry: Pending) -> usize {
        let mut pending = self.pending.borrow_mut();
        let token = self.free.borrow_mut().pop().unwrap_or(pending.len());
        match pending.get_mut(token) {
            Some(free) => *free = Some(entry),
            None => pending.push(Some(entry)),
        }
        token
    }

    fn leave(&self, token: usize) -> Option<Pending> {
        let entry = self.pending.borrow_mut().get_mut(token)?.take()?;
        self.free.borrow_mut().push(token);
        Some(entry)
    }

    /// Counts an attempt. `false` if there were too many.
    fn may_go_on(&self, token: usize) -> bool {
        let mut pending = self.pending.borrow_mut();
        let Some(Some(entry)) = pending.get_mut(token) else { return false };
        entry.attempts += 1;
        entry.attempts < ATTEMPTS_MAX
    }
}

impl Completions for State {
    fn complete(self: Rc<Self>, mut operation: FileOperation, result: io::Result<usize>) {
        let next = match result {
            Ok(count) => advance(&mut operation, count),
            Err(error) if may_repeat(&error) => Next::GoOn,
            Err(error) => Next::End(Err(cause(&error))),
        };
        match next {
            Next::GoOn if self.may_go_on(operation.token) => self.submit(operation),
            Next::GoOn => self.end(operation, Err(Cause::Errno(libc::EIO))),
            Next::End(outcome) => self.end(operation, outcome),
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // Nothing is under way any more, or the works would own this. Closing unlocks too, but the
        // ring may keep the file open for a moment longer.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
        drop(self.behind.take());
    }
}

/// What follows when the engine returned an operation.
enum Next {
    GoOn,
    End(Result<(), Cause>),
}

/// Books `count` transferred bytes. A partial block is transferred again, as O_DIRECT cannot go on
/// in its middle.
fn advance(operation: &mut FileOperation, count: usize) -> Next {
    let (left, length) = match &mut operation.action {
        FileAction::Read { range, .. } => {
            let length = range.len();
            let whole = if count >= length { length } else { count - count % BLOCK_SIZE };
            range.start += whole;
            (range.len(), whole)
        }
        FileAction::Write { blocks, skip } => {
            let total: usize = blocks.iter().map(|slice| slice.bytes().len()).sum();
            let length = total - *skip;
            let whole = if count >= length { length } else { count - count % BLOCK_SIZE };
            *skip += whole;
            (total - *skip, whole)
        }
        _ => (0, 0),
    };
    if left == 0 {
        return Next::End(Ok(()));
    }
    if count == 0 {
        // A read at the end of a file that was cut off under us; no write does this.
        return Next::End(Err(Cause::Truncated));
    }
    operation.offset += u64::try_from(length).unwrap_or(u64::MAX);
    Next::GoOn
}

fn cause(error: &io::Error) -> Cause {
    match error.raw_os_error().unwrap_or(libc::EIO) {
        // EFBIG: beyond a limit on file size; for the store it is the same as a full disk.
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Cause::NoSpace,
        libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS => Cause::Unsupported,
        libc::ENODEV | libc::ENXIO | libc::ESHUTDOWN | libc::ECANCELED => Cause::Gone,
        errno => Cause::Errno(errno),
    }
}

fn may_repeat(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

#[cfg(test)]
mod tests;
