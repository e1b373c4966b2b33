//! What the kernel shares with a server of ublk: rings for commands, and the memory in which it
//! describes requests.
//!
//! A ring of commands is beside the reactor's: what it asks of a device may stay there for as long as
//! the device lives, and the kernel gives it up only with its ring. Completions come whenever this thread
//! is in the kernel; an eventfd, to which the reactor listens, says that there are some.
#![expect(unsafe_code, reason = "hands commands to the kernel, and maps memory that it writes")]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};

use io_uring::squeue::{Entry, Entry128, EntryMarker};
use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode};
use runtime::LocalBoxFuture;
use runtime::reactor::{Io, Pollable};
use rustix::event::{EventfdFlags, eventfd};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::thread::Pid;
use zerocopy::IntoBytes;

use crate::protocol::{
    ControlCommand, DATA_BYTES_MAX, DESCRIPTOR_BYTES, QueueCommand, Slot, descriptors_place,
};

/// A ring for commands. Dropping it takes back what was asked, sooner or later.
struct Commands<E: EntryMarker> {
    ring: IoUring<E, cqueue::Entry>,
    signal: Rc<Pollable>,
    waiting: Option<LocalBoxFuture<io::Result<()>>>,
    /// Whether the kernel has said that something is done.
    signalled: bool,
}

impl<E: EntryMarker> Commands<E> {
    fn new(io: &Io, entries: u32) -> io::Result<Self> {
        let mut builder = IoUring::<E, cqueue::Entry>::builder();
        // Not DEFER_TASKRUN: Linux 6.12 takes its own memory apart when such a ring is closed while commands
        // of ublk wait in it.
        builder.setup_coop_taskrun().setup_taskrun_flag();
        let ring = builder.build(entries)?;
        let signal = eventfd(0, EventfdFlags::CLOEXEC)?;
        ring.submitter().register_eventfd(signal.as_raw_fd())?;
        let signal = Rc::new(Pollable::adopt(io, signal)?);
        Ok(Self { ring, signal, waiting: None, signalled: false })
    }

    /// Gives the kernel what was queued, and hands what is done to `done`, by user data.
    fn turn(&mut self, mut done: impl FnMut(u64, i32)) -> io::Result<()> {
        while self.has_work() {
            match self.ring.submit() {
                Ok(_) => {}
                // A signal; or completions must be read before there can be more.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => {}
                Err(error) => return Err(error),
            }
            let mut silent = !std::mem::take(&mut self.signalled);
            for entry in self.ring.completion() {
                silent = false;
                done(entry.user_data(), entry.result());
            }
            if !silent {
                // Completions signal too. What comes after this is seen by the next look.
                let _ = rustix::io::read(&*self.signal, &mut [0u8; 8]);
            }
        }
        Ok(())
    }

    fn has_work(&mut self) -> bool {
        let (queued, due) = {
            let submission = self.ring.submission();
            (!submission.is_empty(), submission.taskrun())
        };
        queued || due || self.signalled || !self.ring.completion().is_empty()
    }

    /// Ready when there may be something for a turn to find.
    fn poll_signal(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let signal = &self.signal;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(Rc::clone(signal).readable()));
        match waiting.as_mut().poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(_) => {
                self.waiting = None;
                self.signalled = true;
                Poll::Ready(())
            }
        }
    }
}

/// The ring of a device's queues: one command for each slot.
pub(crate) struct QueueCommands {
    commands: Commands<Entry>,
    device: OwnedFd,
    /// Commands that the kernel has.
    under_way: usize,
}

/// Files of queues that were left to the next server while the kernel had commands of theirs.
static LEFT: Mutex<Vec<Left>> = Mutex::new(Vec::new());

/// What keeps the ring of such queues open until the thread that filled it has ended. If it is closed
/// before, a thread of the kernel's takes the commands back while this one may be given requests through
/// them: Linux 6.12 ends one twice then, and frees it twice. A thread that ends takes its own back.
struct Left {
    thread: Pid,
    _files: [OwnedFd; 2],
}

/// Closes what threads have left that have ended.
pub(crate) fn close_left() {
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    left.retain(|left| {
        std::path::Path::new(&format!("/proc/self/task/{}", left.thread.as_raw_nonzero())).exists()
    });
}

impl Drop for QueueCommands {
    fn drop(&mut self) {
        if self.under_way == 0 {
            return;
        }
        // SAFETY: the ring is open until after this.
        let ring = unsafe { BorrowedFd::borrow_raw(self.commands.ring.as_raw_fd()) };
        let copy = |file: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(file, 0);
        // Without descriptors there is nothing that could be done.
        if let (Ok(ring), Ok(device)) = (copy(ring), copy(self.device.as_fd())) {
            let left = Left { thread: rustix::thread::gettid(), _files: [ring, device] };
            LEFT.lock().unwrap_or_else(PoisonError::into_inner).push(left);
        }
    }
}

impl QueueCommands {
    /// A ring for so many slots of a device, whose file is `device`.
    pub(crate) fn new(io: &Io, device: OwnedFd, slots: u32) -> io::Result<Self> {
        Ok(Self { commands: Commands::new(io, slots)?, device, under_way: 0 })
    }

    /// The file of the device.
    pub(crate) fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Queues the command of a slot.
    ///
    /// # Panics
    /// If there are more commands than slots.
    pub(crate) fn push(&mut self, code: u32, slot: Slot, result: i32) {
        let device = Fd(self.device.as_raw_fd());
        let command = opcode::UringCmd16::new(device, code).cmd(QueueCommand::encode(slot, result));
        let entry = command.build().user_data(slot.to_number());
        // SAFETY: the command points to nothing: data is copied by other calls.
        let pushed = unsafe { self.commands.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "a slot has one command at a time");
        self.under_way += 1;
    }

    /// Gives the kernel what was queued, and hands what it has answered to `done`.
    pub(crate) fn turn(&mut self, mut done: impl FnMut(Slot, i32)) -> io::Result<()> {
        let under_way = &mut self.under_way;
        self.commands.turn(|number, result| {
            *under_way -= 1;
            done(Slot::from_number(number), result);
        })
    }

    /// Ready when there may be something for a turn to find.
    pub(crate) fn poll_signal(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.commands.poll_signal(context)
    }
}

/// A command of the control device, and the structure that it takes or gives.
pub(crate) struct ControlCall {
    commands: Commands<Entry128>,
    /// The kernel's until the command is done.
    data: NonNull<[u8; DATA_BYTES_MAX]>,
    done: bool,
}

impl ControlCall {
    /// Gives the kernel a command, and as much of `data` as it says.
    pub(crate) fn start(
        io: &Io,
        device: &OwnedFd,
        code: u32,
        command: &ControlCommand,
        data: [u8; DATA_BYTES_MAX],
    ) -> io::Result<Self> {
        let commands = Commands::new(io, 1)?;
        let data = NonNull::from(Box::leak(Box::new(data)));
        let mut call = Self { commands, data, done: true };
        let mut command = command.clone();
        if command.data_bytes.get() > 0 {
            command.data_address = (data.as_ptr().expose_provenance() as u64).into();
        }
        let mut bytes = [0; 80];
        for (to, &from) in bytes.iter_mut().zip(command.as_bytes()) {
            *to = from;
        }
        let entry = opcode::UringCmd80::new(Fd(device.as_raw_fd()), code).cmd(bytes).build();
        // SAFETY: the kernel reads and writes `data`, whose length is at least what the command
        // says; it is not touched or freed before the command is done.
        let pushed = unsafe { call.commands.ring.submission().push(&entry) };
        pushed.map_err(io::Error::other)?;
        call.done = false;
        Ok(call)
    }

    /// Waits for its end; the structure as it is then.
    ///
    /// # Errors
    /// What the kernel says of the command.
    pub(crate) async fn end(mut self) -> io::Result<[u8; DATA_BYTES_MAX]> {
        loop {
            let mut outcome = None;
            self.commands.turn(|_, result| outcome = Some(result))?;
            if let Some(result) = outcome {
                self.done = true;
                if result < 0 {
                    return Err(io::Error::from_raw_os_error(result.saturating_neg()));
                }
                // SAFETY: made by `start` from a box, and the kernel's no more.
                return Ok(unsafe { self.data.read() });
            }
            std::future::poll_fn(|context| self.commands.poll_signal(context)).await;
        }
    }
}

impl Drop for ControlCall {
    fn drop(&mut self) {
        // A command that nobody waits for any more keeps its memory.
        if self.done {
            // SAFETY: it was leaked from a box by `start`, and nobody else frees it.
            drop(unsafe { Box::from_raw(self.data.as_ptr()) });
        }
    }
}

/// The descriptors of a queue, which the kernel writes.
pub(crate) struct Descriptors {
    address: NonNull<c_void>,
    bytes: usize,
    depth: u16,
}

impl Descriptors {
    /// Maps those of a queue of the device whose file is `device`.
    pub(crate) fn map(device: &OwnedFd, queue: u16, depth: u16) -> io::Result<Self> {
        let (offset, bytes) = descriptors_place(queue, depth, rustix::param::page_size());
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses, which nobody else knows.
        let address =
            unsafe { mmap(std::ptr::null_mut(), bytes, ProtFlags::READ, flags, device, offset) }?;
        let address = NonNull::new(address).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { address, bytes, depth })
    }

    /// What it says of a tag, whose request the kernel has handed over.
    ///
    /// # Panics
    /// If there is no such tag.
    pub(crate) fn get(&self, tag: u16) -> [u8; DESCRIPTOR_BYTES] {
        assert!(tag < self.depth, "the tag is one of the queue's");
        let descriptors = self.address.cast::<[u8; DESCRIPTOR_BYTES]>();
        // SAFETY: the mapping holds `depth` descriptors, of which this is one.
        let descriptor = unsafe { descriptors.add(tag.into()) };
        // SAFETY: it is mapped for reading, and bytes need no alignment and have any value. The
        // kernel does not write it again before the request is completed; what another descriptor
        // gets meanwhile is not read here.
        unsafe { descriptor.read_volatile() }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: `map` made this mapping, and nothing points into it.
        let _ = unsafe { munmap(self.address.as_ptr(), self.bytes) };
    }
}
