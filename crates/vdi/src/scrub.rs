//! Scrub: reads and verifies everything that is in use, in the background, so that damage is found
//! while a backup or a snapshot of what it hit still exists.
//!
//! A *pass* goes through all VDIs (`scrub/pass.rs`), at a set rate and while everything else goes on. It
//! holds nothing back: no release, no checkpoint, no guest waits for it. What makes that right is
//! that it is told of every block that becomes free ([`Watch`]):
//! - A block was *due* if it was in use when the pass began and was not freed since: it must hold what
//!   any entry says that names it. So a block that does not verify and is still due *after* it was read is
//!   damaged; whatever else may have been written there meanwhile was written after it was freed, and it
//!   was not. No read epoch is needed, so that none is held.
//! - A node that was freed before its turn came has been replaced: what stands there now is looked up
//!   again in the newest tree. The trees are gone through in rounds, until one has met nothing new.
//! - Blocks that were written after the pass had begun are not due: the next one reads them.
//!
//! Damage counts only if something still names it: `scrub/owners.rs` says who does.
//!
//! Memory: three bits for each block of the store, the nodes and blocks of one batch, and
//! [`DAMAGES_MAX`] findings.
//!
//! A pass ends with the process. The next one begins anew: what it has read says nothing of
//! tomorrow.

mod owners;
mod pace;
mod pass;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use base::{Pba, SnapshotNumber, VdiId};
use runtime::Time;
use runtime::sync::Signal;

use crate::engine::Engine;
use crate::mark::BlockSet;

/// Damaged places that a report lists; more are counted only.
const DAMAGES_MAX: usize = 1000;

/// Bytes that a pass reads in a second, if nobody says otherwise.
const RATE_DEFAULT: u64 = 64 << 20;

/// What is damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DamageKind {
    /// Data.
    Data,
    /// A node of a tree: what is below it cannot be read.
    Node,
    /// A part of a table, or of the history of some snapshots; what people call it.
    Table(String),
}

/// A VDI that names a damaged block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The VDI.
    pub id: VdiId,
    /// Its name.
    pub name: String,
    /// Whether its head does.
    pub head: bool,
    /// Which snapshots do; the first few.
    pub snapshots: Vec<SnapshotNumber>,
    /// How many more do.
    pub snapshots_omitted: u64,
}

/// A damaged place: blocks next to each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// What is damaged.
    pub kind: DamageKind,
    /// The first block.
    pub at: Pba,
    /// How many there are.
    pub block_count: u64,
    /// First byte of the VDIs that is hit; of a table, nothing is.
    pub offset: u64,
    /// How many are.
    pub length: u64,
    /// Who names them; the first few.
    pub owners: Vec<Owner>,
    /// How many more VDIs do.
    pub owners_omitted: u64,
    /// Whether the device failed to read them; else they hold something else than was written.
    pub is_unreadable: bool,
}

/// How a pass ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScrubEnd {
    /// Everything was read.
    Finished,
    /// Somebody ended it.
    Stopped,
    /// It could not go on; why.
    Failed(String),
}

/// What a pass did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrubReport {
    /// Its number: the first one since the store was opened is 1.
    pub pass: u64,
    /// When it began, in nanoseconds since 1970.
    pub began_ns: u64,
    /// When it ended.
    pub ended_ns: u64,
    /// How.
    pub end: ScrubEnd,
    /// Blocks that it read and verified.
    pub read_blocks: u64,
    /// Of these, the damaged ones that something names.
    pub damaged_blocks: u64,
    /// Where these are: a thousand places at most.
    pub damages: Vec<Damage>,
    /// More places than are listed.
    pub damages_omitted: u64,
}

/// How scrub stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    /// Number of the newest pass; 0 if none was begun since the store was opened.
    pub pass: u64,
    /// Whether it is under way.
    pub running: bool,
    /// Bytes that it may read in a second; 0 if there is no limit.
    pub rate_bytes: u64,
    /// For how long it has been running.
    pub elapsed: Duration,
    /// Blocks that were due and are done: read, or freed before.
    pub done_blocks: u64,
    /// Blocks that were due when it began.
    pub total_blocks: u64,
    /// Blocks that it has read.
    pub read_blocks: u64,
    /// Damaged ones that it has found.
    pub damaged_blocks: u64,
    /// The last pass that ended.
    pub last: Option<ScrubReport>,
}

/// What a pass under way knows of blocks, and is told of.
#[derive(Default)]
pub(crate) struct Watch {
    /// Blocks that were in use when it began, that it has not read and that were not freed since.
    due: BlockSet,
    /// Nodes and pages that it has come to, and that were not freed since.
    entered: BlockSet,
    /// Blocks that were freed since it looked up roots.
    freed: BlockSet,
}

/// State of scrub.
pub(crate) struct Scrubber {
    watch: RefCell<Option<Watch>>,
    /// Number of the newest pass.
    pass: Cell<u64>,
    rate_bytes: Cell<u64>,
    /// What a pass begins with.
    rate_usual: Cell<u64>,
    stop: Cell<bool>,
    began: Cell<Time>,
    total_blocks: Cell<u64>,
    read_blocks: Cell<u64>,
    /// What the pass under way has found.
    found: RefCell<Found>,
    last: RefCell<Option<ScrubReport>>,
    /// Notified when a pass has ended.
    changed: Signal,
}

#[derive(Default)]
struct Found {
    damaged_blocks: u64,
    damages: Vec<Damage>,
    omitted: u64,
}

impl Scrubber {
    pub(crate) fn new() -> Self {
        Self {
            watch: RefCell::default(),
            pass: Cell::new(0),
            rate_bytes: Cell::new(RATE_DEFAULT),
            rate_usual: Cell::new(RATE_DEFAULT),
            stop: Cell::new(false),
            began: Cell::default(),
            total_blocks: Cell::new(0),
            read_blocks: Cell::new(0),
            found: RefCell::default(),
            last: RefCell::default(),
            changed: Signal::default(),
        }
    }

    /// Called for every block that becomes free, in the same breath.
    pub(crate) fn note_freed(&self, pba: Pba) {
        if base::mutant::active("scrub_does_not_look_again") {
            return;
        }
        if let Some(watch) = &mut *self.watch.borrow_mut() {
            watch.due.remove(pba);
            watch.entered.remove(pba);
            watch.freed.insert(pba);
        }
    }

    /// Sets what a pass begins with.
    pub(crate) fn set_rate(&self, rate_bytes: u64) {
        self.rate_usual.set(rate_bytes);
        if !self.is_running() {
            self.rate_bytes.set(rate_bytes);
        }
    }

    fn is_running(&self) -> bool {
        self.watch.borrow().is_some()
    }

    fn watch<T>(&self, look: impl FnOnce(&mut Watch) -> T) -> T {
        look(self.watch.borrow_mut().get_or_insert_default())
    }

    /// Whether damage there would be listed: there is room, or it may belong to the last place.
    fn lists(&self, at: Pba) -> bool {
        let found = self.found.borrow();
        let is_next = |last: &Damage| last.at.plus(last.block_count) == at;
        found.damages.len() < DAMAGES_MAX || found.damages.last().is_some_and(is_next)
    }

    /// Notes damage, next to what was noted before if that has the same owners.
    fn note(&self, damage: Damage) {
        let mut found = self.found.borrow_mut();
        found.damaged_blocks += damage.block_count;
        if let Some(last) = found.damages.last_mut()
            && last.is_continued_by(&damage)
        {
            last.block_count += damage.block_count;
            last.length += damage.length;
            return;
        }
        match found.damages.len() < DAMAGES_MAX {
            true => found.damages.push(damage),
            false => found.omitted += 1,
        }
    }
}

impl Damage {
    fn is_continued_by(&self, next: &Self) -> bool {
        self.kind == DamageKind::Data
            && next.kind == DamageKind::Data
            && self.is_unreadable == next.is_unreadable
            && self.at.plus(self.block_count) == next.at
            && self.offset + self.length == next.offset
            && self.owners == next.owners
            && self.owners_omitted == next.owners_omitted
    }
}

impl Engine {
    /// Begins a pass, or joins the one that is under way; its number.
    pub(crate) fn begin_scrub(self: &Rc<Self>, rate_bytes: Option<u64>) -> u64 {
        let scrubber = &self.scrubber;
        if scrubber.is_running() {
            scrubber.rate_bytes.set(rate_bytes.unwrap_or(scrubber.rate_bytes.get()));
            return scrubber.pass.get();
        }
        scrubber.rate_bytes.set(rate_bytes.unwrap_or(scrubber.rate_usual.get()));
        let pass = scrubber.pass.get() + 1;
        scrubber.pass.set(pass);
        scrubber.stop.set(false);
        scrubber.began.set(self.runtime.now());
        scrubber.total_blocks.set(0);
        scrubber.read_blocks.set(0);
        *scrubber.found.borrow_mut() = Found::default();
        *scrubber.watch.borrow_mut() = Some(Watch::default());
        let engine = Rc::clone(self);
        drop(self.runtime.spawn(async move {
            let began_ns = engine.runtime.wall_ns();
            let outcome = pass::run(&engine).await;
            engine.end_scrub(pass, began_ns, outcome);
        }));
        pass
    }

    /// As [`Self::begin_scrub`], but a pass that begins after this call: one that is under way has read some
    /// of the store before, and leaves out what was written since it began. It is waited for, no slower than
    /// the next one will be.
    pub(crate) async fn begin_scrub_anew(self: &Rc<Self>, rate_bytes: Option<u64>) -> u64 {
        let scrubber = &self.scrubber;
        if scrubber.is_running() {
            let (now, wanted) =
                (scrubber.rate_bytes.get(), rate_bytes.unwrap_or(scrubber.rate_usual.get()));
            if now != 0 && (wanted == 0 || wanted > now) {
                scrubber.rate_bytes.set(wanted);
            }
            self.scrubbed(scrubber.pass.get()).await;
        }
        self.begin_scrub(rate_bytes)
    }

    fn end_scrub(&self, pass: u64, began_ns: u64, outcome: Result<(), crate::Error>) {
        let scrubber = &self.scrubber;
        let end = match outcome {
            Ok(()) => ScrubEnd::Finished,
            Err(_) if scrubber.stop.get() => ScrubEnd::Stopped,
            Err(error) => ScrubEnd::Failed(error.to_string()),
        };
        *scrubber.watch.borrow_mut() = None;
        let found = std::mem::take(&mut *scrubber.found.borrow_mut());
        let read_blocks = scrubber.read_blocks.get();
        tracing::info!(pass, ?end, read_blocks, damaged = found.damaged_blocks, "scrub ended");
        let report = ScrubReport {
            pass,
            began_ns,
            ended_ns: self.runtime.wall_ns(),
            end,
            read_blocks,
            damaged_blocks: found.damaged_blocks,
            damages: found.damages,
            damages_omitted: found.omitted,
        };
        if report.end == ScrubEnd::Finished {
            let mut stats = self.stats.borrow_mut();
            stats.scrubs += 1;
            stats.scrub_ended_seconds = report.ended_ns / 1_000_000_000;
        }
        *scrubber.last.borrow_mut() = Some(report);
        scrubber.changed.notify();
    }

    /// Has the pass under way end soon; whether there is one.
    pub(crate) fn stop_scrub(&self) -> bool {
        let is_running = self.scrubber.is_running();
        self.scrubber.stop.set(is_running);
        is_running
    }

    /// Waits for the end of a pass that was begun.
    pub(crate) async fn scrubbed(&self, pass: u64) -> ScrubReport {
        loop {
            let changed = self.scrubber.changed.changed();
            if let Some(last) = &*self.scrubber.last.borrow()
                && last.pass >= pass
            {
                return last.clone();
            }
            changed.await;
        }
    }

    pub(crate) fn scrub_status(&self) -> ScrubStatus {
        let scrubber = &self.scrubber;
        let last = scrubber.last.borrow().clone();
        let total_blocks = scrubber.total_blocks.get();
        let left = scrubber.watch.borrow().as_ref().map(|watch| watch.due.len());
        ScrubStatus {
            pass: scrubber.pass.get(),
            running: left.is_some(),
            rate_bytes: scrubber.rate_bytes.get(),
            elapsed: left
                .map_or(Duration::ZERO, |_| self.runtime.now().since(scrubber.began.get())),
            done_blocks: total_blocks.saturating_sub(left.unwrap_or(0)),
            total_blocks,
            read_blocks: scrubber.read_blocks.get(),
            damaged_blocks: match (left, &last) {
                (None, Some(last)) => last.damaged_blocks,
                _ => scrubber.found.borrow().damaged_blocks,
            },
            last,
        }
    }
}
