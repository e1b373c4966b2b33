//! What outlives a crash of the store: the device, time, the model, and what the run has found.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use base::SnapshotUuid;
use runtime::{Clock, Time};

use crate::clock::SimClock;
use crate::device::SimDevice;
use crate::holds::Held;
use crate::model::ops::Serial;
use crate::model::{Asked, Contents, Model, Place, VdiRef};
use crate::moments::Moments;
use crate::plan::Plan;
use crate::probes::Probes;
use crate::random::Random;
use crate::trace::Trace;

/// Something that was asked for and of which nobody heard again: it happened or it did not.
#[derive(Clone, Debug)]
pub enum Pending {
    /// A new VDI; its contents if it is a clone.
    Create {
        /// Its name.
        name: String,
        /// Its size.
        block_count: u64,
        /// What it holds.
        source: Source,
    },
    /// A snapshot.
    Snapshot {
        /// Of which VDI.
        vdi: VdiRef,
        /// Its label.
        label: Option<String>,
        /// Size of the VDI.
        block_count: u64,
        /// What it holds.
        source: Source,
    },
    /// A VDI is deleted.
    Remove(VdiRef),
    /// A snapshot is deleted.
    RemoveSnapshot(VdiRef, u64),
    /// A VDI gets a new name.
    Rename(VdiRef, String),
    /// A VDI gets a new size; the change of its blocks if it shrinks.
    Resize(VdiRef, u64, Option<Serial>),
    /// A VDI gets the contents and the size of a snapshot.
    Rollback(VdiRef, u64, Serial),
    /// A VDI becomes what was received.
    Receive(Receive),
    /// A snapshot or a moment is held, until some time at least.
    Hold(VdiRef, u64, Time),
    /// A hold is ended.
    EndHold(VdiRef, u64),
}

/// What was received, and is to become a snapshot of a VDI: all of it happens, or nothing.
#[derive(Clone, Debug)]
pub struct Receive {
    /// The VDI that it was received into.
    pub partial: VdiRef,
    /// The VDI that it is meant for; the same one for a new disk.
    pub vdi: VdiRef,
    /// Its name then.
    pub name: String,
    /// Its size.
    pub block_count: u64,
    /// What the VDI holds then.
    pub contents: Contents,
    /// The change of its blocks.
    pub serial: Serial,
    /// The snapshot's label.
    pub label: Option<String>,
    /// What it is known by.
    pub uuid: SnapshotUuid,
}

/// Where the contents of a snapshot or clone come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// They are these.
    Fixed(Contents),
    /// They are those of a VDI at some instant since it was asked for.
    Running(VdiRef, Asked),
}

/// Who holds a VDI's name and snapshots as they are.
#[derive(Clone, Copy, Debug, Default)]
struct Hold {
    shared: u32,
    exclusive: bool,
}

/// See the module.
#[derive(Debug)]
pub struct World {
    /// The seed of the run.
    pub seed: u64,
    /// What it decided.
    pub plan: Plan,
    /// Time.
    pub clock: SimClock,
    /// The device.
    pub device: SimDevice,
    /// What happens.
    pub trace: Trace,
    /// What may be.
    pub model: RefCell<Model>,
    /// What was reached.
    pub probes: RefCell<Probes>,
    /// The first thing that was wrong.
    failure: RefCell<Option<String>>,
    /// Management requests under way, by number.
    pub pending: RefCell<BTreeMap<u64, Pending>>,
    numbers: Cell<u64>,
    holds: RefCell<BTreeMap<u32, Hold>>,
    /// Every id that the engine ever gave a VDI.
    pub ids: RefCell<BTreeSet<u64>>,
    /// When a client last got an answer.
    progress: Cell<Time>,
    promises: Cell<u64>,
    /// How often the store was asked to complete a receive.
    pub receives: Cell<u64>,
    /// What moments that the engine keeps by itself were seen to hold, by VDI and number.
    pub moments: RefCell<Moments>,
    /// What is held.
    pub held: RefCell<Held>,
    /// What the store may keep of VDIs without rules of their own: what was asked for since it is certain.
    pub default_retentions: RefCell<Vec<String>>,
    /// How much of what the device had lost was known when everything was last compared.
    pub lies_compared: Cell<u64>,
    /// Random numbers of what belongs to no client.
    pub random: RefCell<Random>,
}

impl World {
    /// A world before its first store.
    #[must_use]
    pub fn new(seed: u64, plan: Plan, trace: Trace) -> Self {
        let clock = SimClock::default();
        let device = SimDevice::new(
            plan.device_blocks,
            seed,
            plan.faults.clone(),
            clock.clone(),
            trace.clone(),
        );
        device.make_erratic(plan.erratic);
        let model = RefCell::new(Model::new(plan.layout.clone()));
        Self {
            seed,
            plan,
            clock,
            device,
            trace,
            model,
            probes: RefCell::default(),
            failure: RefCell::default(),
            pending: RefCell::default(),
            numbers: Cell::default(),
            holds: RefCell::default(),
            ids: RefCell::default(),
            progress: Cell::default(),
            promises: Cell::default(),
            receives: Cell::default(),
            moments: RefCell::default(),
            held: RefCell::default(),
            default_retentions: RefCell::new(vec!["off".to_owned()]),
            lies_compared: Cell::default(),
            random: RefCell::new(Random::split(seed, "world")),
        }
    }

    /// Notes that something is wrong; only the first one counts.
    pub fn fail(&self, what: impl Into<String>) {
        let mut failure = self.failure.borrow_mut();
        if failure.is_none() {
            let what = what.into();
            self.trace.note(|| format!("FAILED   {what}"));
            *failure = Some(what);
        }
    }

    /// Notes a divergence from the model.
    pub fn check<T>(&self, outcome: Result<T, crate::model::Divergence>) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(divergence) => {
                self.fail(divergence.0);
                None
            }
        }
    }

    /// Whether something was wrong.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failure.borrow().is_some()
    }

    /// What was wrong.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.failure.borrow().clone()
    }

    /// Notes that a rare path was reached.
    pub fn probe(&self, path: &str) {
        self.probes.borrow_mut().hit(path);
    }

    /// A number that no other thing has.
    pub fn number(&self) -> u64 {
        self.numbers.set(self.numbers.get() + 1);
        self.numbers.get()
    }

    /// A client got an answer.
    pub fn progressed(&self) {
        self.progress.set(self.clock.now());
    }

    /// Something was promised to be durable: a flush, a write with FUA, a change of names.
    pub fn promised(&self) {
        self.promises.set(self.promises.get() + 1);
    }

    /// How often something was promised to be durable.
    #[must_use]
    pub fn promises(&self) -> u64 {
        self.promises.get()
    }

    /// When a client last got an answer.
    #[must_use]
    pub fn last_progress(&self) -> Time {
        self.progress.get()
    }

    /// Notes a management request that is being made.
    pub fn ask(&self, pending: Pending) -> u64 {
        let number = self.number();
        self.pending.borrow_mut().insert(number, pending);
        number
    }

    /// A management request was answered for certain.
    pub fn answered(&self, number: u64) -> Option<Pending> {
        self.promised();
        self.pending.borrow_mut().remove(&number)
    }

    /// A management request ended without a certain answer.
    pub fn unanswered(&self, number: u64) {
        if let Some(pending) = self.pending.borrow_mut().get_mut(&number) {
            fix(&mut self.model.borrow_mut(), pending);
        }
    }

    /// Nobody will be answered any more.
    pub fn crash(&self) {
        let mut model = self.model.borrow_mut();
        for pending in self.pending.borrow_mut().values_mut() {
            fix(&mut model, pending);
        }
        model.crash();
        self.holds.borrow_mut().clear();
    }

    /// Whether something was asked of a VDI and not yet answered that `of` looks for.
    pub fn is_pending(&self, of: impl Fn(&Pending) -> bool) -> bool {
        self.pending.borrow().values().any(of)
    }

    /// Holds a VDI's name and snapshots as they are; alone if `exclusive`. `false`: somebody is in
    /// the way.
    pub fn hold(&self, vdi: VdiRef, exclusive: bool) -> bool {
        let mut holds = self.holds.borrow_mut();
        let hold = holds.entry(vdi.0).or_default();
        if hold.exclusive || (exclusive && hold.shared > 0) {
            return false;
        }
        hold.exclusive = exclusive;
        hold.shared += u32::from(!exclusive);
        true
    }

    /// Lets go again.
    pub fn release(&self, vdi: VdiRef) {
        if let Some(hold) = self.holds.borrow_mut().get_mut(&vdi.0) {
            hold.exclusive = false;
            hold.shared = hold.shared.saturating_sub(1);
        }
    }

    /// Whether somebody changes a VDI's name, size or existence.
    #[must_use]
    pub fn is_held(&self, vdi: VdiRef) -> bool {
        self.holds.borrow().get(&vdi.0).is_some_and(|hold| hold.exclusive)
    }

    /// Describes a place, for people.
    #[must_use]
    pub fn name_of(&self, place: Place) -> String {
        let model = self.model.borrow();
        match place {
            Place::Head(vdi) => model.vdi(vdi).name.clone(),
            Place::Snapshot(vdi, number) => format!("{}@{number}", model.vdi(vdi).name),
        }
    }
}

/// Whatever a snapshot or clone holds that nobody heard of again, it holds now.
fn fix(model: &mut Model, pending: &mut Pending) {
    if let Pending::Create { source, .. } | Pending::Snapshot { source, .. } = pending
        && let Source::Running(vdi, asked) = *source
    {
        *source = Source::Fixed(model.contents_since(vdi, asked));
        model.answered(asked);
    }
}
