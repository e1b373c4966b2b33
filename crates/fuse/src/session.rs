//! One mount: takes the kernel's requests and answers them.
//!
//! Reads, writes, flushes and the like go to disks, up to 256 together. What asks for names or
//! attributes is a task of its own. The kernel gets each reply when it is there, in any order.
//!
//! Nothing is remembered that the next server of the mount would need. It gets the connection to the
//! kernel from who keeps it, and asks for what was left unanswered (`FUSE_NOTIFY_RESEND`): requests
//! that were under way are done again.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Context, Poll};

use base::{BLOCK_SIZE, Buffer, ErrorKind};
use disk::directory::Directory;
use disk::in_flight::{InFlight, Outcome, Pending, REQUESTS_MAX};
use disk::{Disk, DiskError, ReadSegment, Response, errno};
use runtime::reactor::{Io, Pollable};
use runtime::sync::Signal;
use runtime::{LocalBoxFuture, Runtime};
use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use crate::end::End;
use crate::metrics::Metrics;
use crate::node::Node;
use crate::protocol::{
    self, AttributesOut, DATA_BYTES_MAX, EntryOut, NOTIFY_RESEND, OPEN_DIRECT_IO,
    OPEN_PARALLEL_DIRECT_WRITES, OpenOut, OutHeader, REQUEST_BYTES_MAX, Request, SeekOut,
    StatfsOut, WriteOut, allocate, set,
};
use crate::view::{self, View};

/// Most bytes of data of requests under way, give or take one request.
const DATA_IN_FLIGHT_MAX: u64 = 32 << 20;

/// Most tasks under way that ask for names and attributes.
const TASKS_MAX: usize = 64;

/// Bytes that are taken in one round, or about as many, and what a request costs besides: eight
/// requests of 4 KiB, which the device works on while the next are read from the kernel.
const WORK_PER_ROUND: u64 = 160 << 10;
const WORK_PER_REQUEST: u64 = 16 << 10;

/// How long the kernel may believe what it was told of names and attributes, in seconds: a disk that
/// is resized, renamed or deleted by other ways is seen after that.
const VALID_SECONDS: u64 = 1;

/// Longest name of a file: what the kernel takes. Names of disks and labels, encoded, are shorter.
const NAME_BYTES_MAX: u32 = 1024;

const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

/// A mount.
pub(crate) struct Session {
    runtime: Runtime,
    kernel: Rc<Pollable>,
    view: View,
    metrics: Rc<Metrics>,
    /// Whether no more requests are taken.
    leaving: Cell<bool>,
    /// Tasks under way.
    tasks: Cell<usize>,
    /// Whenever one of the two has changed.
    changed: Signal,
}

/// A request that a disk works on.
struct Ticket {
    unique: u64,
    reply: Reply,
    bytes: u64,
}

/// What its reply says.
#[derive(Clone, Copy, Debug)]
enum Reply {
    /// The data.
    Data,
    /// How many bytes were written.
    Written(usize),
    /// Nothing.
    Nothing,
}

/// Why no more requests are taken for now.
enum Pause {
    /// There are none, or there is no room.
    Idle,
    /// The device shall begin with what was taken, and others shall have their turn.
    Round,
}

impl Session {
    pub(crate) fn new(
        runtime: &Runtime,
        io: &Io,
        directory: Rc<dyn Directory>,
        metrics: &Rc<Metrics>,
        kernel: OwnedFd,
    ) -> io::Result<Rc<Self>> {
        Ok(Rc::new(Self {
            runtime: runtime.clone(),
            kernel: Rc::new(Pollable::adopt(io, kernel)?),
            view: View::new(directory),
            metrics: Rc::clone(metrics),
            leaving: Cell::new(false),
            tasks: Cell::new(0),
            changed: Signal::default(),
        }))
    }

    /// Takes no more requests; those under way are finished.
    pub(crate) fn leave(&self) {
        self.leaving.set(true);
        self.changed.notify();
    }

    /// Serves the kernel until the mount is gone, or is to be left. Then nothing is under way.
    pub(crate) async fn run(self: &Rc<Self>) -> End {
        self.ask_again();
        let mut service = Service::new(self);
        let end = loop {
            service.complete();
            match service.take() {
                Err(end) => break end,
                Ok(Pause::Round) => self.runtime.next_round().await,
                Ok(Pause::Idle) if self.leaving.get() && service.is_idle() => break End::Left,
                Ok(Pause::Idle) => service.woken(true).await,
            }
        };
        // Also of a mount that is gone: what was begun is finished.
        while !service.is_idle() {
            service.woken(false).await;
            service.complete();
        }
        end
    }

    /// Asks for the requests that an earlier server took and did not answer.
    fn ask_again(&self) {
        let header = OutHeader {
            length: u32::try_from(size_of::<OutHeader>()).unwrap_or(0).into(),
            error: NOTIFY_RESEND.into(),
            unique: 0.into(),
        };
        if let Err(errno) = rustix::io::write(&self.kernel, header.as_bytes()) {
            // Linux before 6.9.
            tracing::debug!(%errno, "the kernel cannot send unanswered requests again");
        }
    }

    /// Sends a reply. A request that was interrupted, or whose mount is gone, wants none any more.
    fn send(&self, unique: u64, error: i32, body: &[IoSlice<'_>]) {
        let length = size_of::<OutHeader>() + body.iter().map(|part| part.len()).sum::<usize>();
        let header = OutHeader {
            length: u32::try_from(length).unwrap_or(u32::MAX).into(),
            error: error.into(),
            unique: unique.into(),
        };
        let mut parts = Vec::with_capacity(1 + body.len());
        parts.push(IoSlice::new(header.as_bytes()));
        parts.extend_from_slice(body);
        match rustix::io::writev(&self.kernel, &parts) {
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(errno) => tracing::warn!(%errno, "the kernel refuses a reply"),
        }
    }

    fn answer(&self, unique: u64, body: &(impl IntoBytes + Immutable)) {
        self.send(unique, 0, &[IoSlice::new(body.as_bytes())]);
    }

    fn refuse(&self, unique: u64, errno: Errno) {
        self.metrics.requests_failed.add(1);
        self.send(unique, -errno.raw_os_error(), &[]);
    }

    fn fail(&self, unique: u64, error: &DiskError) {
        self.refuse(unique, Errno::from_raw_os_error(errno(error.kind).cast_signed()));
    }

    /// Sends the data of a read.
    fn send_data(&self, unique: u64, segments: &[ReadSegment]) {
        let parts = disk::io_slices(segments);
        self.metrics.read_bytes.add(parts.iter().map(|part| part.len() as u64).sum());
        self.send(unique, 0, &parts);
    }

    /// Answers a request with what takes some time to find out.
    fn spawn<T: 'static>(
        self: &Rc<Self>,
        unique: u64,
        work: impl Future<Output = Result<T, DiskError>> + 'static,
        answer: impl FnOnce(&Self, T) + 'static,
    ) {
        self.metrics.queries.add(1);
        self.tasks.set(self.tasks.get() + 1);
        let session = Rc::clone(self);
        drop(self.runtime.spawn(async move {
            match work.await {
                Ok(found) => answer(&session, found),
                Err(error) => session.fail(unique, &error),
            }
            session.tasks.set(session.tasks.get() - 1);
            session.changed.notify();
        }));
    }
}

/// What a mount is served with.
struct Service<'a> {
    session: &'a Rc<Session>,
    in_flight: InFlight<Ticket>,
    bytes_in_flight: u64,
    /// Where messages arrive.
    message: Vec<u8>,
    readable: Option<LocalBoxFuture<io::Result<()>>>,
}

impl<'a> Service<'a> {
    fn new(session: &'a Rc<Session>) -> Self {
        Self {
            session,
            in_flight: InFlight::new(),
            bytes_in_flight: 0,
            message: vec![0; REQUEST_BYTES_MAX],
            readable: None,
        }
    }

    fn is_idle(&self) -> bool {
        self.in_flight.count() == 0 && self.session.tasks.get() == 0
    }

    fn has_room(&self) -> bool {
        self.in_flight.count() < REQUESTS_MAX
            && self.bytes_in_flight < DATA_IN_FLIGHT_MAX
            && self.session.tasks.get() < TASKS_MAX
    }

    /// Answers what disks have completed.
    fn complete(&mut self) {
        let Self { session, in_flight, bytes_in_flight, .. } = self;
        in_flight.poll_marked(|ticket, outcome| {
            *bytes_in_flight -= ticket.bytes;
            finish(session, &ticket, outcome);
        });
    }

    /// Takes the requests that there are, as far as there is room.
    fn take(&mut self) -> Result<Pause, End> {
        let mut work = 0;
        while !self.session.leaving.get() && self.has_room() {
            if work >= WORK_PER_ROUND {
                return Ok(Pause::Round);
            }
            let length = match rustix::io::read(&self.session.kernel, &mut self.message) {
                Ok(length) => length,
                Err(Errno::AGAIN) => return Ok(Pause::Idle),
                // It was interrupted before it was taken, or a signal came.
                Err(Errno::NOENT | Errno::INTR) => continue,
                Err(Errno::NODEV) => return Err(End::Unmounted),
                Err(errno) => return Err(io::Error::from(errno).into()),
            };
            let message = std::mem::take(&mut self.message);
            let handled = self.handle(message.get(..length).unwrap_or_default());
            self.message = message;
            work += WORK_PER_REQUEST + handled?;
        }
        Ok(Pause::Idle)
    }

    /// Begins one request; how many bytes of data it moves.
    fn handle(&mut self, message: &[u8]) -> Result<u64, End> {
        let session = self.session;
        let (header, request) = Request::decode(message)?;
        let unique = header.unique.get();
        let Some(node) = Node::from_number(header.node.get()) else {
            // INIT, STATFS and the like are about no node.
            self.handle_mount(unique, &request);
            return Ok(0);
        };
        let bytes = match request {
            Request::Read { size, .. } => size,
            Request::Write { data, .. } => data.len(),
            _ => 0,
        };
        match request {
            Request::Read { handle, offset, size } => self.read(unique, node, handle, offset, size),
            Request::Write { handle, offset, flags, data } => {
                self.write(unique, node, handle, offset, flags, data);
            }
            Request::Sync { handle } => {
                session.metrics.flushes.add(1);
                let flush = |_: &dyn Disk| Ok(disk::Request::Flush);
                self.start(unique, (node, handle), Reply::Nothing, 0, flush);
            }
            Request::Allocate { handle, offset, length, mode } => {
                self.allocate(unique, (node, handle), offset, length, mode);
            }
            Request::Seek { handle, offset, whence } => {
                seek(session, unique, (node, handle), offset, whence);
            }
            Request::Lookup(name) => lookup(session, unique, node, name),
            Request::GetAttributes => {
                let task = Rc::clone(session);
                let found = async move { task.view.attributes(node).await };
                session.spawn(unique, found, move |session, found| {
                    session.answer(unique, &attributes_out(found));
                });
            }
            Request::SetAttributes { valid, size } => {
                set_attributes(session, unique, node, valid, size);
            }
            Request::Open { flags } => open(session, unique, node, flags),
            Request::ReadDirectory { offset, size } => {
                let task = Rc::clone(session);
                let found = async move { task.view.list(node, offset, size).await };
                session.spawn(unique, found, move |session, found| {
                    session.send(unique, 0, &[IoSlice::new(&found)]);
                });
            }
            Request::Release => {
                session.view.files.forget(node);
                session.send(unique, 0, &[]);
            }
            request => self.handle_mount(unique, &request),
        }
        Ok(bytes as u64)
    }

    /// Requests that are about no node, or about any.
    fn handle_mount(&self, unique: u64, request: &Request<'_>) {
        let session = self.session;
        match *request {
            Request::Init { minor, readahead_max, features } => {
                tracing::debug!(minor, features, "the kernel begins");
                session.answer(unique, &protocol::init_reply(minor, readahead_max, features));
            }
            Request::OpenDirectory => session.answer(unique, &OpenOut::default()),
            Request::Statfs => {
                let statfs = StatfsOut {
                    block_size: 4096.into(),
                    fragment_size: 4096.into(),
                    name_length: NAME_BYTES_MAX.into(),
                    ..StatfsOut::default()
                };
                session.answer(unique, &statfs);
            }
            Request::Release => session.send(unique, 0, &[]),
            Request::Forget => {}
            Request::Rearrange => session.refuse(unique, Errno::PERM),
            Request::Unknown => session.send(unique, -Errno::NOSYS.raw_os_error(), &[]),
            // About a node that there has never been.
            _ => session.refuse(unique, Errno::STALE),
        }
    }

    fn read(&mut self, unique: u64, node: Node, handle: u64, offset: u64, size: usize) {
        self.session.metrics.reads.add(1);
        let size = size.min(DATA_BYTES_MAX);
        self.start(unique, (node, handle), Reply::Data, size as u64, move |disk| {
            let rest = disk.size_bytes().saturating_sub(offset);
            let length = usize::try_from(rest).map_or(size, |rest| size.min(rest));
            // Behind the end there is nothing, wherever that is.
            let offset = if length == 0 { 0 } else { offset };
            Ok(disk::Request::Read { offset, length })
        });
    }

    fn write(
        &mut self,
        unique: u64,
        node: Node,
        handle: u64,
        offset: u64,
        flags: u32,
        bytes: &[u8],
    ) {
        let session = self.session;
        session.metrics.writes.add(1);
        // As a block device does, it takes what lies before its end.
        let size = session.view.files.at_hand(node).map_or(u64::MAX, |disk| disk.size_bytes());
        let room = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let bytes = bytes.get(..room).unwrap_or(bytes);
        let length = bytes.len();
        if length == 0 && room == 0 {
            return session.refuse(unique, Errno::NOSPC);
        }
        let mut data: Buffer = session.runtime.buffers().take(length.div_ceil(BLOCK_SIZE));
        if let Some(into) = data.bytes_mut().get_mut(..length) {
            into.copy_from_slice(bytes);
        }
        let fua = flags & (libc_flags::SYNC | libc_flags::DSYNC) != 0;
        let reply = Reply::Written(length);
        self.start(unique, (node, handle), reply, length as u64, move |disk| {
            if offset.saturating_add(length as u64) > disk.size_bytes() {
                return Err(DiskError::new(ErrorKind::NoSpace, "it ends beyond the disk"));
            }
            Ok(disk::Request::Write { offset, length, data, fua })
        });
    }

    fn allocate(&mut self, unique: u64, file: (Node, u64), offset: u64, length: u64, mode: u32) {
        const PUNCH: u32 = allocate::PUNCH_HOLE | allocate::KEEP_SIZE;
        const ZERO: u32 = allocate::ZERO_RANGE | allocate::KEEP_SIZE;
        if !matches!(mode, PUNCH | ZERO | allocate::ZERO_RANGE) {
            return self.session.refuse(unique, Errno::OPNOTSUPP);
        }
        self.session.metrics.discards.add(1);
        self.start(unique, file, Reply::Nothing, 0, move |disk| {
            let room = disk.size_bytes().saturating_sub(offset);
            // Without KEEP_SIZE the file would have to grow, which it never does.
            if mode == allocate::ZERO_RANGE && length > room {
                return Err(DiskError::new(ErrorKind::Unsupported, "a disk does not grow so"));
            }
            let length = length.min(room);
            let offset = if length == 0 { 0 } else { offset };
            Ok(match mode {
                PUNCH => disk::Request::Discard { offset, length, fua: false },
                _ => disk::Request::WriteZeroes {
                    offset,
                    length,
                    fua: false,
                    no_hole: true,
                    fast_only: false,
                },
            })
        });
    }

    /// Has the disk of a file do something.
    fn start(
        &mut self,
        unique: u64,
        (node, handle): (Node, u64),
        reply: Reply,
        bytes: u64,
        request: impl FnOnce(&dyn Disk) -> Result<disk::Request, DiskError> + 'static,
    ) {
        let files = &self.session.view.files;
        let submit = move |disk: Rc<dyn Disk>| -> Pending {
            match same(&*disk, handle).and_then(|()| request(&*disk)) {
                Ok(request) => disk.submit(request),
                Err(error) => Box::pin(std::future::ready(Err(error))),
            }
        };
        let pending = match files.at_hand(node) {
            Some(disk) => submit(disk),
            None => {
                let files = files.clone();
                Box::pin(async move { submit(files.keep(node).await?).await })
            }
        };
        let ticket = Ticket { unique, reply, bytes };
        match self.in_flight.start(pending, ticket) {
            Some((ticket, outcome)) => finish(self.session, &ticket, outcome),
            None => self.bytes_in_flight += bytes,
        }
    }

    /// Waits until there is a reason to look again. Which one does not matter.
    async fn woken(&mut self, listen: bool) {
        let listens = listen && !self.session.leaving.get() && self.has_room();
        let Self { session, in_flight, readable, .. } = self;
        let mut changed = Box::pin(session.changed.changed());
        let mut poll_readable = |context: &mut Context<'_>| {
            let kernel = &session.kernel;
            let wait = readable.get_or_insert_with(|| Box::pin(Rc::clone(kernel).readable()));
            // What is wrong, if something is, is said by the next read.
            wait.as_mut().poll(context).map(|_| *readable = None)
        };
        let others = |context: &mut Context<'_>| {
            let readable = if listens { poll_readable(context) } else { Poll::Pending };
            match (readable, changed.as_mut().poll(context)) {
                (Poll::Pending, Poll::Pending) => Poll::Pending,
                _ => Poll::Ready(()),
            }
        };
        in_flight.woken(others).await;
    }
}

/// Flags of open(2) that a write carries.
mod libc_flags {
    pub(super) const DSYNC: u32 = 0o10_000;
    pub(super) const SYNC: u32 = 0o4_000_000;
    /// Reading, writing, or both.
    pub(super) const ACCESS_MODE: u32 = 0o3;
}

/// Refuses who has opened a file when its disk was another one, or was in another state: they have
/// cached that.
fn same(disk: &dyn Disk, handle: u64) -> Result<(), DiskError> {
    let replaced = "the disk was rolled back or replaced, or its device failed; open it again";
    let same = disk.identity().digest() == handle;
    same.then_some(()).ok_or(DiskError::new(ErrorKind::Fenced, replaced))
}

/// Tells the kernel what a disk has done.
fn finish(session: &Session, ticket: &Ticket, outcome: Outcome) {
    match (outcome, ticket.reply) {
        (Err(error), _) => session.fail(ticket.unique, &error),
        (Ok(Response::Data(segments)), _) => session.send_data(ticket.unique, &segments),
        (Ok(_), Reply::Written(bytes)) => {
            session.metrics.written_bytes.add(bytes as u64);
            let size = u32::try_from(bytes).unwrap_or(u32::MAX).into();
            session.answer(ticket.unique, &WriteOut { size, ..WriteOut::default() });
        }
        (Ok(_), Reply::Data | Reply::Nothing) => session.send(ticket.unique, 0, &[]),
    }
}

fn attributes_out(attributes: protocol::Attributes) -> AttributesOut {
    AttributesOut { valid: VALID_SECONDS.into(), attributes, ..AttributesOut::default() }
}

fn lookup(session: &Rc<Session>, unique: u64, parent: Node, name: &[u8]) {
    let (task, name) = (Rc::clone(session), name.to_vec());
    let found = async move { task.view.lookup(parent, &name).await };
    session.spawn(unique, found, move |session, (node, attributes)| {
        let entry = EntryOut {
            node: node.number().unwrap_or_default().into(),
            entry_valid: VALID_SECONDS.into(),
            attributes_valid: VALID_SECONDS.into(),
            attributes,
            ..EntryOut::default()
        };
        session.answer(unique, &entry);
    });
}

fn open(session: &Rc<Session>, unique: u64, node: Node, flags: u32) {
    let opening = session.view.files.clone().keep(node);
    session.spawn(unique, opening, move |session, disk| {
        if disk.read_only() && flags & libc_flags::ACCESS_MODE != 0 {
            // It will not be closed.
            session.view.files.forget(node);
            return session.refuse(unique, Errno::ROFS);
        }
        let open = OpenOut {
            handle: disk.identity().digest().into(),
            // Others write to the disk by other ways: nothing of it is cached.
            flags: (OPEN_DIRECT_IO | OPEN_PARALLEL_DIRECT_WRITES).into(),
            ..OpenOut::default()
        };
        session.answer(unique, &open);
    });
}

fn seek(session: &Rc<Session>, unique: u64, (node, handle): (Node, u64), offset: u64, whence: u32) {
    if !matches!(whence, SEEK_DATA | SEEK_HOLE) {
        return session.refuse(unique, Errno::INVAL);
    }
    let task = Rc::clone(session);
    let found = async move {
        let disk = task.view.files.open(node).await?;
        same(&*disk, handle)?;
        view::seek(&*disk, offset, whence == SEEK_DATA).await
    };
    session.spawn(unique, found, move |session, found| match found {
        Some(offset) => session.answer(unique, &SeekOut { offset: offset.into() }),
        None => session.refuse(unique, Errno::NXIO),
    });
}

/// Times can be set in vain, as `touch` does; anything else is not the file's to decide.
fn set_attributes(session: &Rc<Session>, unique: u64, node: Node, valid: u32, size: u64) {
    let task = Rc::clone(session);
    let found = async move { task.view.attributes(node).await };
    session.spawn(unique, found, move |session, found| {
        let same_size = valid & set::SIZE == 0 || size == found.size.get();
        if same_size && valid & !(set::SIZE | set::TIMES | set::CONTEXT) == 0 {
            session.answer(unique, &attributes_out(found));
        } else {
            session.refuse(unique, Errno::PERM);
        }
    });
}
