//! The io_uring engine: one ring for files and sockets, with registered files and buffers.
//!
//! Entries are queued during a turn and go to the kernel with the one system call that also waits
//! (`turn`). With DEFER_TASKRUN completions are posted in that call too, so that nothing interrupts
//! tasks in between.
//!
//! Invariant: each entry in the kernel's hands belongs to a slot of the table, by its user data,
//! and the work in that slot owns all memory that the entry points to, until its completion was
//! read. `drop` waits for that.
#![expect(unsafe_code, reason = "hands pointers to the kernel")]

mod entry;
mod poll;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use base::Block;
use io_uring::squeue::Entry;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode};

use super::clock::SystemClock;
use super::io::Descriptor;
use super::lookout::Lookouts;
use super::pool::Pool;
use super::unpark::Unparker;
use super::work::{Completed, FileAction, IN_FLIGHT_MAX, Interest, Table, Work};
use crate::{Clock, Time};
use entry::{entry, poll_mask};
use poll::PollWindow;

/// Entries that are queued before they must be submitted.
const SUBMISSIONS_MAX: u32 = 256;

/// Slots for registered files: the store's, and sockets while there are any left. The kernel wants
/// no more of them than RLIMIT_NOFILE allows: the next number is tried then.
const REGISTERED_FILES: [u32; 3] = [1024, 256, 64];

/// Works for a thread are rare: discards on block devices.
const THREAD_COUNT: usize = 1;

/// User data of entries that belong to no slot.
const CANCELLATION: u64 = u64::MAX;
const UNPARK: u64 = u64::MAX - 1;

pub(super) struct Ring {
    ring: IoUring,
    table: Table,
    /// Works that found no free slot or entry, in order.
    backlog: VecDeque<Work>,
    /// Addresses of the registered buffers, by index.
    buffers: Vec<usize>,
    file_slots: u32,
    free_files: Vec<u32>,
    pool: Option<Pool>,
    /// What ended before it was submitted; reported at the next turn.
    done: Vec<Completed>,
    unparker: Arc<Unparker>,
    unpark_armed: bool,
    window: PollWindow,
}

impl Ring {
    /// Makes a ring.
    ///
    /// # Errors
    /// `Unsupported` if the kernel lacks something that we need; EPERM, ENOSYS and the like where
    /// io_uring is refused.
    pub(super) fn new(unparker: &Arc<Unparker>) -> io::Result<Self> {
        let ring = build()?;
        check_support(&ring)?;
        let slots = |&count: &u32| ring.submitter().register_files_sparse(count).is_ok();
        let file_slots = REGISTERED_FILES.into_iter().find(slots).unwrap_or(0);
        Ok(Self {
            ring,
            table: Table::default(),
            backlog: VecDeque::new(),
            buffers: Vec::new(),
            file_slots,
            free_files: (0..file_slots).rev().collect(),
            pool: None,
            done: Vec::new(),
            unparker: Arc::clone(unparker),
            unpark_armed: false,
            window: PollWindow::new(),
        })
    }

    /// Tells the kernel about single-block buffers, in the order of their indices.
    ///
    /// # Errors
    /// Mostly ENOMEM: RLIMIT_MEMLOCK is too small. Nothing is registered then.
    pub(super) fn register_buffers(&mut self, blocks: &[Box<[Block]>]) -> io::Result<()> {
        let vector = |blocks: &[Block]| libc::iovec {
            iov_base: blocks.as_ptr().cast_mut().cast(),
            iov_len: std::mem::size_of_val(blocks),
        };
        let vectors: Vec<libc::iovec> = blocks.iter().map(|blocks| vector(blocks)).collect();
        // SAFETY: the vectors lead to live memory. The kernel pins its pages, so memory that is
        // freed later is at worst not what an index names any more; it is only used by entries
        // whose work owns a buffer at the address registered here, which `fixed` compares.
        unsafe { self.ring.submitter().register_buffers(&vectors) }?;
        self.buffers = blocks.iter().map(|blocks| blocks.as_ptr().addr()).collect();
        Ok(())
    }

    pub(super) fn has_registered_buffers(&self) -> bool {
        !self.buffers.is_empty()
    }

    pub(super) fn has_registered_files(&self) -> bool {
        self.file_slots > 0
    }

    /// An index for a descriptor, if one is free.
    pub(super) fn register_file(&mut self, fd: BorrowedFd<'_>) -> Option<u32> {
        let index = self.free_files.pop()?;
        match self.ring.submitter().register_files_update(index, &[fd.as_raw_fd()]) {
            Ok(_) => Some(index),
            Err(_) => {
                self.free_files.push(index);
                None
            }
        }
    }

    /// Lets the kernel forget a registered descriptor.
    pub(super) fn unregister_file(&mut self, index: u32) {
        // If this failed the index stays unused, as it still names the old file.
        if self.ring.submitter().register_files_update(index, &[-1]).is_ok() {
            self.free_files.push(index);
        }
    }

    pub(super) fn submit(&mut self, work: Work) {
        if needs_thread(&work) {
            return self.submit_to_pool(work);
        }
        if self.backlog.is_empty() && self.table.has_room() {
            if let Err(work) = self.start(work) {
                self.backlog.push_back(work);
            }
        } else {
            self.backlog.push_back(work);
        }
    }

    pub(super) fn has_finished(&self) -> bool {
        !self.done.is_empty() || self.pool.as_ref().is_some_and(Pool::has_finished)
    }

    /// Submits what is queued, waits until something is done or there are news, at most `timeout`, and
    /// moves what is done to `completed`.
    ///
    /// # Errors
    /// If the kernel refuses to go on with this ring.
    pub(super) fn turn(
        &mut self,
        timeout: Option<Duration>,
        lookouts: &Lookouts,
        completed: &mut Vec<Completed>,
    ) -> io::Result<()> {
        if !self.unpark_armed {
            let eventfd = Fd(self.unparker.eventfd().as_raw_fd());
            let entry = opcode::PollAdd::new(eventfd, poll_mask(Interest::Readable)).build();
            self.unpark_armed = self.push(&entry.user_data(UNPARK));
        }
        self.enter(timeout, lookouts)?;
        self.reap(completed);
        while self.table.has_room()
            && let Some(work) = self.backlog.pop_front()
        {
            if let Err(work) = self.start(work) {
                self.backlog.push_front(work);
                break;
            }
        }
        completed.append(&mut self.done);
        if let Some(pool) = &mut self.pool {
            pool.take_finished(completed);
        }
        Ok(())
    }

    /// Ends what waits for `descriptor`. What was queued before is tried first: entries are
    /// processed in order.
    pub(super) fn cancel(&mut self, descriptor: &Descriptor) {
        let waits = |(index, work): (usize, &Work)| work.waits_for(descriptor).then_some(index);
        let waiting: Vec<usize> = self.table.occupied().filter_map(waits).collect();
        for index in waiting {
            let entry = opcode::AsyncCancel::new(user_data(index)).build();
            // Without room for it the work waits on, which costs its slot and nothing else.
            self.push(&entry.user_data(CANCELLATION));
        }
    }

    /// Cancels what waits for a peer, waits for everything else, and returns it all.
    pub(super) fn drain(&mut self) -> Vec<Completed> {
        let cancel = |work| Completed { work, result: -libc::ECANCELED };
        let mut completed = std::mem::take(&mut self.done);
        completed.extend(self.backlog.drain(..).map(cancel));
        let endless = |(index, work): (usize, &Work)| (!work.is_finite()).then_some(index);
        let mut to_cancel: Vec<usize> = self.table.occupied().filter_map(endless).collect();
        while self.table.in_flight() > 0 {
            while let Some(index) = to_cancel.pop() {
                let entry = opcode::AsyncCancel::new(user_data(index)).build();
                if !self.push(&entry.user_data(CANCELLATION)) {
                    to_cancel.push(index);
                    break;
                }
            }
            let timeout = if to_cancel.is_empty() { None } else { Some(Duration::ZERO) };
            if self.enter(timeout, &Lookouts::default()).is_err() {
                // The kernel may still use that memory: leave it to it.
                std::mem::forget(std::mem::take(&mut self.table));
                break;
            }
            self.reap(&mut completed);
        }
        // Ends its threads, when they have done what they have.
        if let Some(mut pool) = self.pool.take() {
            pool.finish(&mut completed);
        }
        completed
    }

    fn submit_to_pool(&mut self, work: Work) {
        if self.pool.is_none() {
            self.pool = Pool::new(THREAD_COUNT, &self.unparker).ok();
        }
        match &mut self.pool {
            Some(pool) => pool.submit(work),
            None => self.done.push(Completed { work, result: -libc::ENOMEM }),
        }
    }

    /// Gives a work to the kernel, or back if there is no room.
    fn start(&mut self, work: Work) -> Result<(), Work> {
        let index = self.table.insert(work);
        let Some(slot) = self.table.slot(index) else { return Ok(()) };
        let entry = entry(slot, &self.buffers).user_data(user_data(index));
        if self.push(&entry) {
            return Ok(());
        }
        match self.table.remove(index) {
            Some(work) => Err(work),
            None => Ok(()),
        }
    }

    /// Queues an entry whose memory is owned by the slot that its user data names, or that points
    /// to none. `false` if there is no room.
    fn push(&mut self, entry: &Entry) -> bool {
        if self.ring.submission().is_full() {
            // Whatever keeps the kernel from taking more now: there is still no room then.
            let _ = self.ring.submit();
        }
        let mut queue = self.ring.submission();
        // SAFETY: `entry` is the only maker of entries with pointers, and sees to it that they lead into the work of the slot named, where they stay valid until `reap` has
        // read the completion.
        unsafe { queue.push(entry) }.is_ok()
    }

    /// Submits what is queued, and waits until something is done or there are news, at most `timeout`.
    fn enter(&mut self, timeout: Option<Duration>, lookouts: &Lookouts) -> io::Result<()> {
        if timeout == Some(Duration::ZERO) {
            return resume(self.ring.submit());
        }
        let started = SystemClock.now();
        if let Some(window) = self.window.get() {
            let window = timeout.map_or(window, |timeout| window.min(timeout));
            if self.look(started.after(window), lookouts)? {
                return Ok(());
            }
        }
        if lookouts.announce() {
            return resume(self.ring.submit());
        }
        let fell_asleep = SystemClock.now();
        let outcome = match timeout {
            Some(timeout) => {
                let left = timeout.saturating_sub(fell_asleep.since(started));
                let left = Timespec::from(left);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&left))
            }
            None => self.ring.submit_and_wait(1),
        };
        self.window.slept(SystemClock.now().since(fell_asleep));
        resume(outcome)
    }

    /// Submits what is queued and looks for completions and news until `deadline`. Whether there are any.
    fn look(&mut self, deadline: Time, lookouts: &Lookouts) -> io::Result<bool> {
        resume(self.ring.submit())?;
        loop {
            if !self.ring.completion().is_empty() || lookouts.have_news() {
                return Ok(true);
            }
            if self.ring.submission().taskrun() {
                resume(self.ring.submit())?;
            } else {
                std::hint::spin_loop();
            }
            if SystemClock.now() >= deadline {
                return Ok(!self.ring.completion().is_empty());
            }
        }
    }

    fn reap(&mut self, completed: &mut Vec<Completed>) {
        for entry in self.ring.completion() {
            match entry.user_data() {
                CANCELLATION => {}
                UNPARK => {
                    self.unparker.drain();
                    self.unpark_armed = false;
                }
                index => {
                    let index = usize::try_from(index).unwrap_or(usize::MAX);
                    let work = self.table.remove(index);
                    let result = entry.result();
                    completed.extend(work.map(|work| Completed { work, result }));
                }
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.drain();
    }
}

/// What the kernel says when it has done all that it could for now.
fn resume(outcome: io::Result<usize>) -> io::Result<()> {
    match outcome.map_err(|error| (error.raw_os_error(), error)) {
        Ok(_) => Ok(()),
        // Time is up; a signal; or completions must be read before more can be submitted.
        Err((Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN), _)) => Ok(()),
        Err((_, error)) => Err(error),
    }
}

/// The best ring that the kernel has to offer.
fn build() -> io::Result<IoUring> {
    let completions = u32::try_from(IN_FLIGHT_MAX).unwrap_or(u32::MAX);
    // 6.1: completions are posted when we ask for them, by this thread.
    let mut best = IoUring::builder();
    best.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
    // 5.19: completions wait for the next system call of this thread.
    let mut good = IoUring::builder();
    good.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
    let plain = IoUring::builder();
    let mut refusal = None;
    for mut builder in [best, good, plain] {
        match builder.setup_cqsize(completions).build(SUBMISSIONS_MAX) {
            Ok(ring) => return Ok(ring),
            Err(error) => refusal = Some(error),
        }
    }
    Err(refusal.unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
}

fn check_support(ring: &IoUring) -> io::Result<()> {
    let features = ring.params();
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let codes = [
        opcode::Read::CODE,
        opcode::ReadFixed::CODE,
        opcode::Write::CODE,
        opcode::WriteFixed::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::Recv::CODE,
        opcode::Send::CODE,
        opcode::SendMsg::CODE,
        opcode::PollAdd::CODE,
        opcode::AsyncCancel::CODE,
    ];
    let supported = features.is_feature_nodrop()
        && features.is_feature_fast_poll()
        && features.is_feature_ext_arg()
        && codes.into_iter().all(|code| probe.is_supported(code));
    if supported { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

fn needs_thread(work: &Work) -> bool {
    let Work::File { operation, .. } = work else { return false };
    matches!(operation.action, FileAction::Discard { .. })
}

fn user_data(slot: usize) -> u64 {
    // Slot numbers stay below IN_FLIGHT_MAX.
    u64::try_from(slot).unwrap_or(CANCELLATION)
}
