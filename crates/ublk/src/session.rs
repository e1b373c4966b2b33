//! One block device: takes the kernel's requests and answers them, up to 256 together, in any order.
//!
//! Nothing is remembered that the next server of the device would need: requests that were taken and
//! not answered come again (`UBLK_F_USER_RECOVERY_REISSUE`).

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll};

use base::{BLOCK_SIZE, ErrorKind};
use disk::in_flight::{InFlight, Outcome, Pending, REQUESTS_MAX};
use disk::{Disk, DiskError, Request, Response, errno};
use runtime::Runtime;
use runtime::sync::Signal;

use crate::end::End;
use crate::metrics::Metrics;
use crate::protocol::{Descriptor, Operation, REQUEST_BYTES_MAX, Slot};
use crate::queues::{Arrival, Queues};

/// Most bytes of data of requests under way, give or take one request.
const DATA_IN_FLIGHT_MAX: u64 = 32 << 20;

/// Bytes that are copied in one turn, or about as many, and what a request costs besides.
const WORK_PER_TURN: u64 = 1 << 20;
const WORK_PER_REQUEST: u64 = 16 << 10;

/// A block device that is served.
pub(crate) struct Session {
    runtime: Runtime,
    /// The disk; `None` if the device's users know another one by it, or another state of it.
    disk: Option<Rc<dyn Disk>>,
    metrics: Rc<Metrics>,
    wish: Cell<Wish>,
    /// Whenever the wish has changed.
    changed: Signal,
}

/// What the session is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wish {
    /// Serve.
    Serve,
    /// Take no more requests, and finish those under way.
    Leave,
    /// Leave what is under way, too.
    Abandon,
}

/// A request that the disk works on.
struct Ticket {
    slot: Slot,
    operation: Option<Operation>,
    bytes: u64,
}

/// Why no more requests are begun for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// There are none, or there is no room.
    Idle,
    /// Others shall have their turn.
    Turn,
}

impl Session {
    pub(crate) fn new(
        runtime: &Runtime,
        disk: Option<Rc<dyn Disk>>,
        metrics: &Rc<Metrics>,
    ) -> Rc<Self> {
        Rc::new(Self {
            runtime: runtime.clone(),
            disk,
            metrics: Rc::clone(metrics),
            wish: Cell::new(Wish::Serve),
            changed: Signal::default(),
        })
    }

    /// Takes no more requests; those under way are finished.
    pub(crate) fn leave(&self) {
        self.wish(Wish::Leave);
    }

    /// Leaves everything as it is: the next server does it again.
    pub(crate) fn abandon(&self) {
        self.wish(Wish::Abandon);
    }

    fn wish(&self, wish: Wish) {
        self.wish.set(wish.max(self.wish.get()));
        self.changed.notify();
    }

    /// Serves the kernel until the device ends, or is to be left. The queues are given back then, and
    /// unless it was abandoned nothing is under way.
    pub(crate) async fn run(&self, queues: impl Queues) -> End {
        self.metrics.devices.add(1);
        self.metrics.devices_open.add(1);
        let end = Service::new(self, queues).serve().await;
        self.metrics.devices_open.subtract_one();
        if matches!(end, End::Io(_)) {
            self.metrics.devices_failed.add(1);
        }
        end
    }

    /// Begins a request. `Err` has what it is answered with.
    fn begin(
        &self,
        queues: &impl Queues,
        slot: Slot,
        descriptor: &Descriptor,
    ) -> Result<Pending, DiskError> {
        let disk = self.disk.as_ref().ok_or(REPLACED)?;
        let unknown = DiskError::new(ErrorKind::Unsupported, "the kernel asks for what is unknown");
        let operation = descriptor.operation.ok_or(unknown)?;
        if descriptor.data_bytes() > REQUEST_BYTES_MAX.into() {
            return Err(DiskError::new(ErrorKind::Invalid, "the kernel asks for too much at once"));
        }
        let offset = descriptor.offset;
        let length = usize::try_from(descriptor.data_bytes()).unwrap_or(usize::MAX);
        let request = match operation {
            Operation::Read => Request::Read { offset, length },
            Operation::Write => {
                // Whoever writes may change the data meanwhile: what is checksummed is ours.
                let mut data = self.runtime.buffers().take(length.div_ceil(BLOCK_SIZE));
                let into = data.bytes_mut().get_mut(..length).unwrap_or_default();
                queues.fetch(slot, into).map_err(|error| not_copied(&error))?;
                Request::Write { offset, length, data, fua: descriptor.fua }
            }
            Operation::Flush | Operation::Discard | Operation::WriteZeroes => {
                descriptor.range_request().unwrap_or(Request::Flush)
            }
        };
        Ok(disk.submit(request))
    }
}

/// What the users of a device get that know another disk by it.
const REPLACED: DiskError = DiskError::new(
    ErrorKind::Fenced,
    "the disk was rolled back or replaced, or its device failed; attach it again",
);

fn not_copied(error: &io::Error) -> DiskError {
    DiskError::from_display(ErrorKind::Io, error)
}

/// What a device is served with.
struct Service<'a, Q> {
    session: &'a Session,
    queues: Q,
    /// Slots in which requests can still come.
    slots: usize,
    /// Requests that have come, and were not begun.
    arrived: VecDeque<(Slot, Descriptor)>,
    in_flight: InFlight<Ticket>,
    bytes_in_flight: u64,
}

impl<'a, Q: Queues> Service<'a, Q> {
    fn new(session: &'a Session, queues: Q) -> Self {
        let (slots, arrived) = (queues.slots(), VecDeque::new());
        Self { session, queues, slots, arrived, in_flight: InFlight::new(), bytes_in_flight: 0 }
    }

    async fn serve(&mut self) -> End {
        loop {
            self.complete();
            if let Err(error) = self.turn() {
                return End::Io(error);
            }
            let pause = self.begin_arrived();
            // What was answered at once is told at once.
            if let Err(error) = self.turn() {
                return End::Io(error);
            }
            let idle = self.in_flight.count() == 0;
            match self.session.wish.get() {
                Wish::Serve if self.slots == 0 && idle => return End::Stopped,
                Wish::Leave if idle => return End::Left,
                Wish::Abandon => return End::Left,
                Wish::Serve | Wish::Leave => {}
            }
            if pause == Pause::Turn || self.begins() && !self.arrived.is_empty() {
                self.session.runtime.yield_now().await;
            } else {
                self.woken().await;
            }
        }
    }

    /// Whether requests that have come are begun.
    fn begins(&self) -> bool {
        self.session.wish.get() == Wish::Serve
            && self.in_flight.count() < REQUESTS_MAX
            && self.bytes_in_flight < DATA_IN_FLIGHT_MAX
    }

    /// Tells the kernel what was answered, and takes what it has to say.
    fn turn(&mut self) -> io::Result<()> {
        let Self { queues, slots, arrived, .. } = self;
        queues.turn(&mut |arrival| match arrival {
            Arrival::Request(slot, descriptor) => arrived.push_back((slot, descriptor)),
            Arrival::End => *slots -= 1,
        })
    }

    /// Answers what the disk has completed.
    fn complete(&mut self) {
        let Self { session, queues, in_flight, bytes_in_flight, .. } = self;
        in_flight.poll_marked(|ticket, outcome| {
            *bytes_in_flight -= ticket.bytes;
            finish(session, queues, &ticket, outcome);
        });
    }

    /// Begins requests, as far as there is room.
    fn begin_arrived(&mut self) -> Pause {
        let mut work = 0;
        while self.begins() {
            if work >= WORK_PER_TURN {
                return Pause::Turn;
            }
            let Some((slot, descriptor)) = self.arrived.pop_front() else { return Pause::Idle };
            let bytes = descriptor.data_bytes();
            work += WORK_PER_REQUEST + bytes;
            self.session.metrics.count(descriptor.operation);
            let ticket = Ticket { slot, operation: descriptor.operation, bytes };
            let done = match self.session.begin(&self.queues, slot, &descriptor) {
                Ok(pending) => self.in_flight.start(pending, ticket),
                Err(error) => Some((ticket, Err(error))),
            };
            match done {
                Some((ticket, outcome)) => {
                    finish(self.session, &mut self.queues, &ticket, outcome);
                }
                None => self.bytes_in_flight += bytes,
            }
        }
        Pause::Idle
    }

    /// Waits until there is a reason to look again. Which one does not matter.
    async fn woken(&mut self) {
        let Self { session, queues, in_flight, .. } = self;
        let mut changed = Box::pin(session.changed.changed());
        let others = |context: &mut Context<'_>| match (
            queues.poll_arrival(context),
            changed.as_mut().poll(context),
        ) {
            (Poll::Pending, Poll::Pending) => Poll::Pending,
            _ => Poll::Ready(()),
        };
        in_flight.woken(others).await;
    }
}

/// Tells the kernel what the disk has done.
fn finish(session: &Session, queues: &mut impl Queues, ticket: &Ticket, outcome: Outcome) {
    let given = match outcome {
        Ok(Response::Data(segments)) => {
            let parts = disk::io_slices(&segments);
            queues.give(ticket.slot, &parts).map_err(|error| not_copied(&error))
        }
        Ok(_) => Ok(()),
        Err(error) => Err(error),
    };
    let result = match given {
        Ok(()) => {
            session.metrics.count_bytes(ticket.operation, ticket.bytes);
            i32::try_from(ticket.bytes).unwrap_or(i32::MAX)
        }
        Err(error) => {
            session.metrics.requests_failed.add(1);
            -errno(error.kind).cast_signed()
        }
    };
    queues.complete(ticket.slot, result);
}

#[cfg(test)]
mod tests;
