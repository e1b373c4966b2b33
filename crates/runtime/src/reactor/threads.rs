//! The engine where io_uring is refused: worker threads for files, non-blocking calls and poll(2)
//! for sockets.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};

use super::io::Descriptor;
use super::lookout::Lookouts;
use super::pool::Pool;
use super::unpark::Unparker;
use super::work::{Completed, Interest, ONE, Work};
use crate::socket::Segment;

/// Enough to keep a disk busy; io_uring is what gives depth.
const THREAD_COUNT: usize = 8;

/// Most segments that one sendmsg takes (IOV_MAX).
const SEGMENTS_MAX: usize = 1024;

pub(super) struct Threads {
    pool: Pool,
    unparker: Arc<Unparker>,
    /// What waits for a descriptor to become ready.
    waiting: Vec<Work>,
    /// What could be done at once; reported at the next turn.
    done: Vec<Completed>,
}

impl Threads {
    pub(super) fn new(unparker: &Arc<Unparker>) -> io::Result<Self> {
        Ok(Self {
            pool: Pool::new(THREAD_COUNT, unparker)?,
            unparker: Arc::clone(unparker),
            waiting: Vec::new(),
            done: Vec::new(),
        })
    }

    pub(super) fn submit(&mut self, work: Work) {
        match work {
            Work::File { .. } => self.pool.submit(work),
            // A full eventfd would block: it is awaited first.
            Work::Poll { .. } | Work::Signal { .. } => self.waiting.push(work),
            Work::Receive { .. } | Work::Send { .. } => self.attempt(work),
        }
    }

    pub(super) fn has_finished(&self) -> bool {
        !self.done.is_empty() || self.pool.has_finished()
    }

    /// Waits until something is done, at most `timeout`, and moves it to `completed`.
    pub(super) fn turn(
        &mut self,
        timeout: Option<Duration>,
        lookouts: &Lookouts,
        completed: &mut Vec<Completed>,
    ) -> io::Result<()> {
        let sleeps = timeout != Some(Duration::ZERO) && !lookouts.announce();
        let timeout = if sleeps { timeout } else { Some(Duration::ZERO) };
        if !self.waiting.is_empty() || timeout != Some(Duration::ZERO) {
            self.poll(timeout)?;
        }
        completed.append(&mut self.done);
        self.pool.take_finished(completed);
        Ok(())
    }

    /// Ends what waits for `descriptor`, after one more look.
    pub(super) fn cancel(&mut self, descriptor: &Descriptor) {
        // It is looked at again at the next turn, should this fail.
        let _ = self.poll(Some(Duration::ZERO));
        let waits = |work: &mut Work| work.waits_for(descriptor);
        let cancel = |work| Completed { work, result: -libc::ECANCELED };
        self.done.extend(self.waiting.extract_if(.., waits).map(cancel));
    }

    /// Waits for all file operations; drops what waits for a peer.
    pub(super) fn drain(&mut self) -> Vec<Completed> {
        let mut completed = std::mem::take(&mut self.done);
        let waiting = std::mem::take(&mut self.waiting);
        let cancel = |work| Completed { work, result: -libc::ECANCELED };
        completed.extend(waiting.into_iter().map(cancel));
        self.pool.finish(&mut completed);
        completed
    }

    fn poll(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let mut descriptors = Vec::with_capacity(1 + self.waiting.len());
        descriptors.push(PollFd::from_borrowed_fd(self.unparker.eventfd().as_fd(), PollFlags::IN));
        for work in &self.waiting {
            let flags = match work {
                Work::Send { .. }
                | Work::Signal { .. }
                | Work::Poll { interest: Interest::Writable, .. } => PollFlags::OUT,
                _ => PollFlags::IN,
            };
            descriptors.push(PollFd::from_borrowed_fd(work.descriptor().fd(), flags));
        }
        // A timeout that does not fit is longer than any uptime.
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut descriptors, timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => return Ok(()),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut ready = descriptors.iter().map(|descriptor| !descriptor.revents().is_empty());
        if ready.next() == Some(true) {
            self.unparker.drain();
        }
        let ready: Vec<bool> = ready.collect();
        for (work, ready) in std::mem::take(&mut self.waiting).into_iter().zip(ready) {
            match work {
                _ if !ready => self.waiting.push(work),
                Work::Poll { .. } => self.done.push(Completed { work, result: 0 }),
                _ => self.attempt(work),
            }
        }
        Ok(())
    }

    /// Does what a socket or an eventfd can do now, or has the work wait.
    fn attempt(&mut self, mut work: Work) {
        let outcome = match &mut work {
            Work::Receive { stream, buffer, range } => {
                let into = buffer.bytes_mut().get_mut(range.clone()).unwrap_or_default();
                let flags = RecvFlags::DONTWAIT;
                recv(stream.descriptor().fd(), into, flags).map(|(count, _)| count)
            }
            Work::Send { stream, segments, skip } => {
                let parts = unsent(segments, *skip);
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                let mut nothing = SendAncillaryBuffer::default();
                sendmsg(stream.descriptor().fd(), &parts, &mut nothing, flags)
            }
            Work::Signal { line } => rustix::io::write(line.descriptor().fd(), &ONE),
            _ => Err(Errno::INVAL),
        };
        match outcome {
            Err(Errno::AGAIN) => self.waiting.push(work),
            Err(errno) => self.done.push(Completed { work, result: -errno.raw_os_error() }),
            Ok(count) => {
                let result = i32::try_from(count).unwrap_or(i32::MAX);
                self.done.push(Completed { work, result });
            }
        }
    }
}

fn unsent(segments: &[Segment], mut skip: usize) -> Vec<IoSlice<'_>> {
    let mut parts = Vec::with_capacity(segments.len().min(SEGMENTS_MAX));
    for bytes in segments.iter().map(Segment::bytes) {
        match bytes.get(skip..) {
            Some([]) => skip = 0,
            Some(rest) => {
                skip = 0;
                parts.push(IoSlice::new(rest));
            }
            None => skip -= bytes.len(),
        }
        if parts.len() == SEGMENTS_MAX {
            break;
        }
    }
    parts
}
