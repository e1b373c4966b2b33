//! The transmission phase of one connection.
//!
//! One task runs two halves in turn: one receives requests and starts them, the other collects
//! completions and sends replies. Neither ever waits for the other except for [`Budget`], and no
//! task is spawned and no other task runs between a request's bytes and `Disk::submit`, or between
//! its completion and its reply: at depth 1 that is what latency is made of.
//!
//! - Every admitted request gets one reply, in the order of completion.
//! - A write reaches the disk only when its payload was received whole.
//! - When reading has ended, what is in flight is completed and answered, for a bounded time.

mod admission;
mod answer;
mod budget;
mod outbox;

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use base::{BLOCK_SIZE, Buffer, ErrorKind};
use disk::in_flight::{InFlight, Outcome, Pending};
use disk::{Disk, DiskError, Extent, Request, split};
use runtime::Runtime;
use runtime::socket::Socket;

use self::admission::{Admitted, Limits, Refusal, admit, admit_status};
use self::answer::Expected;
pub(crate) use self::budget::{Budget, Pool};
use self::outbox::Outbox;
use crate::control::Control;
use crate::end::End;
use crate::input::{CONTIGUOUS_BYTES_MAX, Input};
use crate::metrics::Metrics;
use crate::protocol::reply::Origin;
use crate::protocol::request::{Command, Header, STATUS_PAYLOAD_BYTES_MAX, StatusPayload};
use crate::protocol::{BASE_ALLOCATION_ID, Framing, PAYLOAD_BYTES_MAX, error};

/// Largest payload that is received although it is refused; larger ones end the connection.
/// libnbd can be told to send 64 MiB whatever was advertised.
const REFUSED_PAYLOAD_BYTES_MAX: u64 = 2 * PAYLOAD_BYTES_MAX as u64;

/// Largest payload that is awaited in the receive buffer and copied out of it; of larger ones the
/// rest is received where it belongs.
const COPIED_PAYLOAD_BYTES_MAX: usize = CONTIGUOUS_BYTES_MAX;

/// Most extents in a block status reply: 32 KiB of payload, 64 KiB with extended headers.
const EXTENTS_MAX: usize = 4096;

/// What negotiation arrived at.
pub(crate) struct Terms {
    pub(crate) disk: Rc<dyn Disk>,
    pub(crate) framing: Framing,
    /// Whether the client selected `base:allocation`.
    pub(crate) allocation: bool,
}

/// The transmission phase.
pub(crate) struct Session {
    runtime: Runtime,
    socket: Rc<dyn Socket>,
    terms: Terms,
    control: Rc<Control>,
    metrics: Rc<Metrics>,
    in_flight: RefCell<InFlight<Ticket>>,
    outbox: RefCell<Outbox>,
    budget: Rc<Budget>,
    /// Whether no more requests will come.
    reading_ended: Cell<bool>,
    /// Whether replies are no longer waited for.
    abandoned: Cell<bool>,
}

/// What is kept of a request until its reply.
struct Ticket {
    cookie: u64,
    offset: u64,
    expected: Expected,
    /// Bytes charged to the budget.
    charge: u64,
}

impl Session {
    pub(crate) fn new(
        runtime: &Runtime,
        socket: Rc<dyn Socket>,
        terms: Terms,
        budget: Rc<Budget>,
        control: Rc<Control>,
        metrics: Rc<Metrics>,
    ) -> Self {
        Self {
            runtime: runtime.clone(),
            socket,
            terms,
            control,
            metrics,
            in_flight: RefCell::new(InFlight::new()),
            outbox: RefCell::new(Outbox::new(runtime.buffers().clone())),
            budget,
            reading_ended: Cell::new(false),
            abandoned: Cell::new(false),
        }
    }

    /// Serves requests until the connection ends, and tells why it did. Replies to what is in
    /// flight then are sent for at most `drain`; the socket is still open afterwards, unless
    /// that was not enough.
    pub(crate) async fn run(&self, input: &mut Input, drain: Duration) -> End {
        let mut reader = pin!(self.read_requests(input));
        let mut sender = pin!(self.send_replies());
        let mut end = None;
        let mut patience = None;
        std::future::poll_fn(|context| {
            self.control.register(context);
            self.in_flight.borrow().register(context);
            if end.is_none()
                && let Poll::Ready(Err(reason)) = reader.as_mut().poll(context)
            {
                self.reading_ended.set(true);
                // Others wait for what a stalled client holds.
                let drain = if matches!(reason, End::Stalled) { Duration::ZERO } else { drain };
                patience = Some(Box::pin(self.runtime.sleep(drain)));
                end = Some(reason);
            }
            if let Some(timer) = &mut patience
                && timer.as_mut().poll(context).is_ready()
            {
                patience = None;
                self.abandoned.set(true);
                self.socket.shutdown();
            }
            match sender.as_mut().poll(context) {
                Poll::Ready(Ok(())) => Poll::Ready(end.take().unwrap_or(End::Closed)),
                // The reason why reading ended says more than that sending failed afterwards.
                Poll::Ready(Err(error)) => Poll::Ready(end.take().unwrap_or(End::Io(error))),
                Poll::Pending => Poll::Pending,
            }
        })
        .await
    }

    /// Receives and starts requests until there is a reason to stop.
    async fn read_requests(&self, input: &mut Input) -> Result<Infallible, End> {
        let header_bytes = Header::wire_bytes(self.terms.framing);
        loop {
            match Header::decode(self.terms.framing, input.bytes())? {
                Some(header) => {
                    input.consume(header_bytes);
                    self.control.check()?;
                    self.handle(&header, input).await?;
                }
                None => {
                    let between_requests = input.bytes().is_empty();
                    self.fill(input).await.map_err(|end| match end {
                        End::Io(error) if between_requests && is_eof(&error) => End::Closed,
                        other => other,
                    })?;
                }
            }
        }
    }

    async fn handle(&self, header: &Header, input: &mut Input) -> Result<(), End> {
        let disk = &*self.terms.disk;
        match admit(header, &self.limits()) {
            Ok(Admitted::Disconnect) => return Err(End::Disconnect),
            Ok(Admitted::Read { length, dont_fragment }) => {
                let charge = u64::from(length);
                self.charge(charge).await?;
                let pending = split::read(disk, header.offset, length as usize);
                self.start(header, Expected::Data { length, dont_fragment }, charge, pending);
            }
            Ok(Admitted::Write { length, fua }) => self.write(header, length, fua, input).await?,
            Ok(Admitted::Status { length, one }) => self.status(header, length, one).await?,
            Ok(Admitted::StatusByPayload { payload, one }) => {
                self.status_by_payload(header, payload, one, input).await?;
            }
            Ok(Admitted::Plain(request)) => {
                self.charge(0).await?;
                self.start(header, Expected::Nothing, 0, disk.submit(request));
            }
            Err(refusal) => {
                self.discard(header.payload_bytes(self.terms.framing), input).await?;
                self.refuse(header, refusal).await?;
            }
        }
        Ok(())
    }

    /// Receives the payload of a write, whole, and hands it to the disk.
    async fn write(
        &self,
        header: &Header,
        length: u32,
        fua: bool,
        input: &mut Input,
    ) -> Result<(), End> {
        let charge = u64::from(length);
        self.charge(charge).await?;
        let disk = &*self.terms.disk;
        let length = length as usize;
        if input.bytes().len() < length {
            self.budget.receiving.set(Some(self.runtime.now()));
        }
        let pending = if length <= disk::REQUEST_BYTES_MAX {
            let data = self.receive_payload(length, input).await?;
            disk.submit(Request::Write { offset: header.offset, length, data, fua })
        } else {
            let mut requests = Vec::new();
            for (offset, length) in split::pieces(header.offset, length) {
                let data = self.receive_payload(length, input).await?;
                requests.push(Request::Write { offset, length, data, fua });
            }
            split::together(disk, requests.into_iter())
        };
        self.budget.receiving.set(None);
        self.metrics.written_bytes.add(charge);
        self.start(header, Expected::Nothing, charge, pending);
        Ok(())
    }

    /// Receives `length` bytes to the start of an aligned buffer.
    async fn receive_payload(&self, length: usize, input: &mut Input) -> Result<Buffer, End> {
        if length <= COPIED_PAYLOAD_BYTES_MAX {
            while input.bytes().len() < length {
                self.fill(input).await?;
            }
        }
        let mut buffer = self.runtime.buffers().take(length.div_ceil(BLOCK_SIZE).max(1));
        let into = buffer.bytes_mut().get_mut(..length).unwrap_or_default();
        let mut have = input.copy_out(into);
        while have < length {
            input.start_direct(buffer, have..length);
            let (result, returned) =
                self.unless_ended(|context| input.poll_direct(context)).await?;
            have += match result? {
                0 => return Err(End::Io(io::ErrorKind::UnexpectedEof.into())),
                count => count,
            };
            buffer = returned;
        }
        Ok(buffer)
    }

    async fn status(&self, header: &Header, length: u64, one: bool) -> Result<(), End> {
        let extents_max = if one { 1 } else { EXTENTS_MAX };
        let charge = (extents_max * size_of::<Extent>()) as u64;
        self.charge(charge).await?;
        let request = Request::BlockStatus { offset: header.offset, length, extents_max };
        self.start(header, Expected::Status, charge, self.terms.disk.submit(request));
        Ok(())
    }

    async fn status_by_payload(
        &self,
        header: &Header,
        payload: u32,
        one: bool,
        input: &mut Input,
    ) -> Result<(), End> {
        let size = payload as usize;
        let parsed = if size > STATUS_PAYLOAD_BYTES_MAX {
            self.discard(u64::from(payload), input).await?;
            None
        } else {
            while input.bytes().len() < size {
                self.fill(input).await?;
            }
            let parsed = StatusPayload::decode(input.bytes().get(..size).unwrap_or_default());
            input.consume(size);
            parsed.ok().filter(|payload| payload.contexts == [BASE_ALLOCATION_ID])
        };
        let Some(StatusPayload { length, .. }) = parsed else {
            let message = "the payload does not name the contexts that were selected";
            return self.refuse(header, Refusal { error: error::EINVAL, message }).await;
        };
        match admit_status(header.offset, length, &self.limits()) {
            Ok(()) => self.status(header, length, one).await,
            Err(refusal) => self.refuse(header, refusal).await,
        }
    }

    /// Polls a request for the first time. Whatever is done at once is answered at once.
    fn start(&self, header: &Header, expected: Expected, charge: u64, pending: Pending) {
        let Header { cookie, offset, command, .. } = *header;
        if let Some(counter) =
            Command::from_wire(command).and_then(|it| self.metrics.of_command(it))
        {
            counter.add(1);
        }
        let ticket = Ticket { cookie, offset, expected, charge };
        let done = self.in_flight.borrow_mut().start(pending, ticket);
        if let Some((ticket, outcome)) = done {
            self.complete(&mut self.outbox.borrow_mut(), &ticket, outcome);
        }
    }

    fn complete(&self, outbox: &mut Outbox, ticket: &Ticket, outcome: Outcome) {
        if let Err(DiskError { kind: ErrorKind::Fenced, .. }) = outcome {
            self.control.sever();
        }
        if answer::push(
            outbox,
            &self.origin(ticket.cookie, ticket.offset),
            ticket.expected,
            outcome,
        ) {
            if let Expected::Data { length, .. } = ticket.expected {
                self.metrics.read_bytes.add(u64::from(length));
            }
        } else {
            self.metrics.requests_failed.add(1);
        }
        outbox.end_reply(ticket.charge);
    }

    /// Answers without asking the disk.
    async fn refuse(&self, header: &Header, refusal: Refusal) -> Result<(), End> {
        self.charge(0).await?;
        let origin = self.origin(header.cookie, header.offset);
        let mut outbox = self.outbox.borrow_mut();
        answer::push_error(&mut outbox, &origin, refusal.error, refusal.message);
        outbox.end_reply(0);
        self.metrics.requests_failed.add(1);
        Ok(())
    }

    fn origin(&self, cookie: u64, offset: u64) -> Origin {
        Origin { framing: self.terms.framing, cookie, offset }
    }

    /// The limits of this moment: a VDI can be resized.
    fn limits(&self) -> Limits {
        Limits {
            framing: self.terms.framing,
            size: self.terms.disk.size_bytes(),
            read_only: self.terms.disk.read_only(),
            allocation: self.terms.allocation,
        }
    }

    /// Receives and drops a payload.
    async fn discard(&self, length: u64, input: &mut Input) -> Result<(), End> {
        if length > REFUSED_PAYLOAD_BYTES_MAX {
            return Err(End::PayloadTooLarge(length));
        }
        let mut rest = usize::try_from(length).unwrap_or(usize::MAX);
        loop {
            let now = rest.min(input.bytes().len());
            input.consume(now);
            rest -= now;
            if rest == 0 {
                return Ok(());
            }
            self.fill(input).await?;
        }
    }

    async fn fill(&self, input: &mut Input) -> Result<(), End> {
        Ok(self.unless_ended(|context| input.poll_fill(context)).await??)
    }

    /// Waits until there is room in the budget.
    async fn charge(&self, bytes: u64) -> Result<(), End> {
        if self.budget.charge(bytes) {
            return Ok(());
        }
        self.unless_ended(|context| {
            self.budget.wait(context);
            if self.budget.charge(bytes) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await
    }

    /// Waits, but not for longer than the session is meant to go on.
    async fn unless_ended<T>(
        &self,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Result<T, End> {
        std::future::poll_fn(|context| match self.control.check() {
            Ok(()) => poll(context).map(Ok),
            Err(end) => Poll::Ready(Err(end)),
        })
        .await
    }

    /// Sends replies until there will be no more.
    async fn send_replies(&self) -> io::Result<()> {
        while std::future::poll_fn(|_| self.poll_replies()).await {
            let batch = self.outbox.borrow_mut().take();
            self.metrics.sends.add(1);
            self.budget.sending.set(Some(self.runtime.now()));
            self.socket.send(batch.segments).await?;
            self.budget.sending.set(None);
            self.budget.credit(batch.requests, batch.bytes);
        }
        Ok(())
    }

    /// Collects completions. `true` if there is something to send, `false` if nothing will come.
    /// The task is woken through `InFlight::register`, or because the reader runs in it.
    fn poll_replies(&self) -> Poll<bool> {
        let mut outbox = self.outbox.borrow_mut();
        let mut in_flight = self.in_flight.borrow_mut();
        in_flight.poll_marked(|ticket, outcome| self.complete(&mut outbox, &ticket, outcome));
        if !outbox.is_empty() {
            Poll::Ready(true)
        } else if self.abandoned.get() || self.reading_ended.get() && in_flight.count() == 0 {
            Poll::Ready(false)
        } else {
            Poll::Pending
        }
    }
}

fn is_eof(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::UnexpectedEof
}
