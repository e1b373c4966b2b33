//! One ring of a device, and the task that serves it while it runs.
//!
//! ```text
//!            kick, addresses, enabled                  base asked for
//!  Stopped ───────────────────────────► Running ───────────────────────► Stopping ──► Stopped
//!                                          │  connection lost, ring broken      │  nothing in flight
//!                                          └──────────► Abandoned ◄─────────────┘──► Stopped
//! ```
//!
//! - Requests are taken while the ring runs and is enabled, as far as there is room.
//! - Everything that was taken is finished before the ring has stopped: the guest is told of it, or
//!   it was abandoned. Then guest memory is not touched any more, since somebody else may serve the
//!   ring; what was in flight stays marked for them.
//! - So no two tasks ever serve one ring, and no write of an old one comes after a new one's.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll};

use disk::Disk;
use disk::in_flight::{InFlight, REQUESTS_MAX};
use runtime::reactor::{Event, Io, Lookout, Watch};
use runtime::sync::Signal;
use runtime::{LocalBoxFuture, Runtime};

use crate::block::{feature, status};
use crate::budget::Budget;
use crate::dirty::DirtyLog;
use crate::inflight::Inflight;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::protocol::RingAddresses;
use crate::queue::{Broken, Layout, Queue};
use crate::request::{Ask, Started};

/// What the rings of a device share.
pub(crate) struct Device {
    pub(crate) runtime: Runtime,
    pub(crate) io: Io,
    pub(crate) disk: Rc<dyn Disk>,
    pub(crate) metrics: Rc<Metrics>,
    pub(crate) memory: RefCell<Rc<Memory>>,
    /// Where to log what is written to it, while the guest wants that (`LOG_ALL`).
    pub(crate) log: RefCell<Option<Rc<DirtyLog>>>,
    pub(crate) inflight: RefCell<Option<Rc<Inflight>>>,
    /// The features that the guest uses.
    pub(crate) features: Cell<u64>,
    pub(crate) budget: Budget,
    /// Whether no ring starts any more.
    pub(crate) ending: Cell<bool>,
    /// Whether the disk is not the one any more that the guest began with, and has cached.
    pub(crate) replaced: Cell<bool>,
}

impl Device {
    pub(crate) fn memory(&self) -> Rc<Memory> {
        Rc::clone(&self.memory.borrow())
    }

    pub(crate) fn uses(&self, feature: u64) -> bool {
        self.features.get() & feature != 0
    }

    /// Whether what is written to guest memory must be logged and there is no log yet: a monitor
    /// that connects again under way gives it last.
    pub(crate) fn awaits_log(&self) -> bool {
        self.uses(feature::LOG_ALL) && self.log.borrow().is_none()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Stopped,
    Running,
    Stopping,
    Abandoned,
}

/// What the monitor said about a ring.
#[derive(Default)]
pub(crate) struct Setup {
    pub(crate) size: u32,
    pub(crate) addresses: Option<RingAddresses>,
    pub(crate) base: u16,
    pub(crate) kick: Option<Rc<Event>>,
    pub(crate) call: Option<Rc<Event>>,
    pub(crate) error: Option<Rc<Event>>,
    pub(crate) enabled: bool,
}

/// A ring.
pub(crate) struct Ring {
    device: Rc<Device>,
    index: u16,
    setup: RefCell<Setup>,
    phase: Cell<Phase>,
    /// Whenever one of the two has changed.
    changed: Signal,
}

impl Ring {
    pub(crate) fn new(device: &Rc<Device>, index: u16) -> Rc<Self> {
        Rc::new(Self {
            device: Rc::clone(device),
            index,
            setup: RefCell::default(),
            phase: Cell::new(Phase::Stopped),
            changed: Signal::default(),
        })
    }

    /// Whether its size, addresses and base may be set.
    pub(crate) fn is_stopped(&self) -> bool {
        self.phase.get() == Phase::Stopped
    }

    /// Whether these are its addresses already.
    pub(crate) fn lies_at(&self, addresses: &RingAddresses) -> bool {
        self.setup.borrow().addresses.as_ref() == Some(addresses)
    }

    /// Changes what the monitor said, and starts the ring if it is complete.
    pub(crate) fn set_up(self: &Rc<Self>, change: impl FnOnce(&mut Setup)) {
        change(&mut self.setup.borrow_mut());
        self.changed.notify();
        let ready = {
            let setup = self.setup.borrow();
            setup.kick.is_some() && setup.addresses.is_some() && self.is_enabled(&setup)
        };
        let may = !self.device.ending.get() && !self.device.awaits_log();
        if ready && may && self.is_stopped() {
            self.phase.set(Phase::Running);
            drop(self.device.runtime.spawn(Rc::clone(self).run()));
        }
    }

    /// Takes no more requests, and finishes those that were taken.
    pub(crate) fn stop(&self) {
        if self.phase.get() == Phase::Running {
            self.phase.set(Phase::Stopping);
            self.changed.notify();
        }
        self.setup.borrow_mut().kick = None;
    }

    /// Finishes the requests that were taken without telling the guest.
    pub(crate) fn abandon(&self) {
        if !self.is_stopped() {
            self.phase.set(Phase::Abandoned);
            self.changed.notify();
        }
    }

    /// The entry that comes next, once the ring has stopped.
    pub(crate) fn base(&self) -> u16 {
        self.setup.borrow().base
    }

    /// Waits until nothing of it is in flight.
    pub(crate) async fn stopped(&self) {
        while !self.is_stopped() {
            self.changed.changed().await;
        }
    }

    fn is_enabled(&self, setup: &Setup) -> bool {
        // Without the protocol's features there is no message that enables a ring.
        setup.enabled || !self.device.uses(feature::PROTOCOL_FEATURES)
    }

    fn takes_requests(&self) -> bool {
        let runs = self.phase.get() == Phase::Running && !self.device.ending.get();
        runs && self.is_enabled(&self.setup.borrow())
    }

    fn open(&self) -> Result<Queue, Broken> {
        let setup = self.setup.borrow();
        let layout = Layout {
            size: setup.size,
            addresses: setup.addresses.ok_or(Broken::Place)?,
            base: setup.base,
            event_index: self.device.uses(feature::EVENT_IDX),
        };
        let tracker = match &*self.device.inflight.borrow() {
            None => None,
            Some(inflight) => {
                let size = u16::try_from(setup.size).map_err(|_| Broken::Size(setup.size))?;
                Some(inflight.ring(self.index, size).ok_or(Broken::Untracked)?)
            }
        };
        Queue::open(&layout, &self.device.memory(), tracker)
    }

    /// The life of the ring's task.
    async fn run(self: Rc<Self>) {
        let outcome = match self.open() {
            Ok(queue) => {
                let mut service = Service::new(&self, queue);
                let outcome = service.serve().await;
                service.finish().await;
                let queue = service.queue.borrow();
                if outcome.is_err() {
                    queue.forget();
                }
                self.setup.borrow_mut().base = queue.next_available();
                outcome
            }
            Err(broken) => Err(broken),
        };
        if let Err(broken) = outcome {
            tracing::warn!(ring = self.index, "a guest's ring is broken: {broken}");
            self.device.metrics.rings_broken.add(1);
            let mut setup = self.setup.borrow_mut();
            // It stays stopped until it is set up anew.
            setup.kick = None;
            if let Some(error) = &setup.error {
                error.signal();
            }
        }
        self.phase.set(Phase::Stopped);
        self.changed.notify();
    }
}

/// A request under way.
struct Ticket {
    ask: Ask,
    /// Bytes charged to the budget.
    charge: u64,
}

/// What the task of a running ring works with.
struct Service<'a> {
    ring: &'a Rc<Ring>,
    queue: Rc<RefCell<Queue>>,
    /// Sees what the guest puts into the ring while the thread is awake.
    watch: Watch,
    in_flight: InFlight<Ticket>,
    /// Requests that were taken and found no room.
    waiting: VecDeque<Ask>,
    kick: Option<Kick>,
}

/// Where kicks come from, and the wait for the next one.
type Kick = (Rc<Event>, LocalBoxFuture<std::io::Result<()>>);

/// Bytes that are taken in one round, or about as many, and what a request costs besides: a chain may
/// have a thousand descriptors. Eight requests of 4 KiB: all that a guest has under way together would
/// reach the device together, and be done together; nobody worked on the next meanwhile.
const WORK_PER_ROUND: u64 = 160 << 10;
const WORK_PER_REQUEST: u64 = 16 << 10;

/// Why no more requests are taken for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// There are none: the ring is watched, and the guest will kick if the thread sleeps.
    Empty,
    /// There is no room for one, or none is to be taken: something else has to happen.
    Full,
    /// The device shall begin with what was taken, and others shall have their turn.
    Round,
}

impl<'a> Service<'a> {
    fn new(ring: &'a Rc<Ring>, queue: Queue) -> Self {
        let queue = Rc::new(RefCell::new(queue));
        let doorbell = Doorbell { device: Rc::clone(&ring.device), queue: Rc::clone(&queue) };
        let watch = Watch::new(&ring.device.io, Rc::new(doorbell));
        let (in_flight, waiting) = (InFlight::new(), VecDeque::new());
        Self { ring, queue, watch, in_flight, waiting, kick: None }
    }

    /// Serves the guest until the ring is to stop and everything taken is finished, or until it
    /// was abandoned.
    async fn serve(&mut self) -> Result<(), Broken> {
        loop {
            self.complete()?;
            let pause = self.take()?;
            self.interrupt()?;
            match self.ring.phase.get() {
                Phase::Abandoned => return Ok(()),
                Phase::Stopping if self.is_idle() => return Ok(()),
                _ => {}
            }
            match pause {
                Pause::Round => self.ring.device.runtime.next_round().await,
                Pause::Empty => self.woken(true).await,
                Pause::Full => self.woken(false).await,
            }
        }
    }

    /// Whether everything that was taken is finished.
    fn is_idle(&self) -> bool {
        self.in_flight.count() == 0 && self.waiting.is_empty() && !self.queue.borrow().has_undone()
    }

    /// Waits for what is in flight, and forgets how it ended.
    async fn finish(&mut self) {
        let budget = &self.ring.device.budget;
        budget.leave(self.ring.index);
        loop {
            self.in_flight.poll_marked(|ticket, _| budget.give(ticket.charge));
            if self.in_flight.count() == 0 {
                return;
            }
            self.in_flight.woken(|_| Poll::Pending).await;
        }
    }

    /// Tells the guest what the disk has completed.
    fn complete(&mut self) -> Result<(), Broken> {
        let Self { ring, queue, in_flight, .. } = self;
        let device = &ring.device;
        let abandoned = ring.phase.get() == Phase::Abandoned;
        let mut outcome = Ok(());
        let memory = device.memory();
        in_flight.poll_marked(|Ticket { ask, charge }, answer| {
            device.budget.give(charge);
            if !abandoned && outcome.is_ok() {
                let status = ask.answer(answer, &memory);
                outcome = finish(device, &mut queue.borrow_mut(), &ask, status, &memory);
            }
        });
        outcome
    }

    /// Takes what there is room for, and what does not take long: one guest is not to keep others
    /// from their turn, whatever it asks for, and however often.
    fn take(&mut self) -> Result<Pause, Broken> {
        if self.ring.phase.get() == Phase::Abandoned {
            return Ok(Pause::Full);
        }
        let memory = self.ring.device.memory();
        self.queue.borrow_mut().refuse_kicks(&memory)?;
        let mut work = 0;
        let size = self.queue.borrow().size();
        for _ in 0..size {
            if work >= WORK_PER_ROUND {
                return Ok(Pause::Round);
            }
            if self.in_flight.count() >= REQUESTS_MAX {
                return Ok(Pause::Full);
            }
            let ask = match self.next(&memory)? {
                Some(ask) => ask,
                None if !self.ring.takes_requests() => return Ok(Pause::Full),
                None => return Ok(Pause::Empty),
            };
            let charge = ask.footprint();
            work += WORK_PER_REQUEST + charge;
            if ask.is_too_large() {
                self.finish_now(&ask, status::IOERR, &memory)?;
            } else if self.ring.device.budget.take(self.ring.index, charge) {
                self.start(ask, charge, &memory)?;
            } else {
                self.waiting.push_front(ask);
                return Ok(Pause::Full);
            }
        }
        Ok(Pause::Round)
    }

    /// The next request: one that was taken before, then one of the ring.
    fn next(&mut self, memory: &Memory) -> Result<Option<Ask>, Broken> {
        if let Some(ask) = self.waiting.pop_front() {
            return Ok(Some(ask));
        }
        let mut queue = self.queue.borrow_mut();
        if !self.ring.takes_requests() && !queue.has_undone() {
            return Ok(None);
        }
        match queue.take(memory)? {
            Some(chain) => Ask::new(chain, memory).map(Some),
            None => Ok(None),
        }
    }

    fn start(&mut self, ask: Ask, charge: u64, memory: &Memory) -> Result<(), Broken> {
        let device = &self.ring.device;
        if device.replaced.get() {
            device.budget.give(charge);
            return self.finish_now(&ask, status::IOERR, memory);
        }
        device.metrics.count(ask.operation);
        let durable = !device.uses(feature::FLUSH);
        match ask.start(&*device.disk, &device.runtime, memory, durable) {
            Started::Pending(pending) => {
                let done = self.in_flight.start(pending, Ticket { ask, charge });
                let Some((Ticket { ask, charge }, answer)) = done else { return Ok(()) };
                device.budget.give(charge);
                let status = ask.answer(answer, memory);
                self.finish_now(&ask, status, memory)
            }
            Started::Done(status) => {
                device.budget.give(charge);
                self.finish_now(&ask, status, memory)
            }
        }
    }

    fn finish_now(&self, ask: &Ask, status: u8, memory: &Memory) -> Result<(), Broken> {
        finish(&self.ring.device, &mut self.queue.borrow_mut(), ask, status, memory)
    }

    /// Interrupts the guest if it wants that for what was put into the used ring.
    fn interrupt(&mut self) -> Result<(), Broken> {
        if self.ring.phase.get() != Phase::Abandoned
            && self.queue.borrow_mut().should_interrupt(&self.ring.device.memory())?
            && let Some(call) = &self.ring.setup.borrow().call
        {
            self.ring.device.metrics.interrupts.add(1);
            call.signal();
        }
        Ok(())
    }

    /// Waits until there is a reason to look again: a request, if there is room for one, a kick, a
    /// completion, room, a change. Which one does not matter, everything is looked at.
    async fn woken(&mut self, watches: bool) {
        let Self { ring, watch, in_flight, waiting, kick, .. } = self;
        let starved = !waiting.is_empty();
        let mut changed = Box::pin(ring.changed.changed());
        let others = |context: &mut Context<'_>| {
            if watches {
                watch.arm(context.waker());
            }
            if starved {
                ring.device.budget.wait(ring.index, context);
            }
            match (poll_kick(ring, kick, context), changed.as_mut().poll(context)) {
                (Poll::Pending, Poll::Pending) => Poll::Pending,
                _ => Poll::Ready(()),
            }
        };
        in_flight.woken(others).await;
        watch.disarm();
    }
}

/// Listens to the ring's kicks, those of another eventfd once there is one.
fn poll_kick(ring: &Ring, kick: &mut Option<Kick>, context: &mut Context<'_>) -> Poll<()> {
    let current = ring.setup.borrow().kick.clone();
    let same = match (&*kick, &current) {
        (Some((known, _)), Some(current)) => Rc::ptr_eq(known, current),
        (known, current) => known.is_none() && current.is_none(),
    };
    if !same {
        *kick = current.map(|event| {
            let wait: LocalBoxFuture<_> = Box::pin(Rc::clone(&event).wait());
            (event, wait)
        });
    }
    let Some((event, wait)) = kick else { return Poll::Pending };
    match wait.as_mut().poll(context) {
        Poll::Pending => Poll::Pending,
        Poll::Ready(outcome) => {
            ring.device.metrics.kicks.add(1);
            if let Err(error) = outcome {
                // An eventfd does not fail. Should it, completions still wake the task.
                tracing::warn!(%error, "cannot listen to the kicks of a ring");
                ring.setup.borrow_mut().kick = None;
                *kick = None;
            } else {
                *wait = Box::pin(Rc::clone(event).wait());
            }
            Poll::Ready(())
        }
    }
}

/// Where the guest puts requests, as the reactor sees it.
struct Doorbell {
    device: Rc<Device>,
    queue: Rc<RefCell<Queue>>,
}

impl Lookout for Doorbell {
    fn has_news(&self) -> bool {
        self.queue.borrow().has_news(&self.device.memory())
    }

    fn announce(&self) -> bool {
        // If it cannot be asked to, taking tells why.
        self.queue.borrow_mut().want_kicks(&self.device.memory()).unwrap_or(true)
    }
}

/// Gives a request its status and puts it into the used ring.
fn finish(
    device: &Device,
    queue: &mut Queue,
    ask: &Ask,
    status: u8,
    memory: &Memory,
) -> Result<(), Broken> {
    match status {
        status::OK => device.metrics.count_bytes(ask.operation, ask.data_bytes()),
        _ => device.metrics.requests_failed.add(1),
    }
    let written = ask.finish(status, memory)?;
    queue.put(ask.head, written, memory)
}
