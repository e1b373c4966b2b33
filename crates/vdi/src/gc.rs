//! Garbage collection: frees blocks that nothing reaches. Checkpoints free what was private to one
//! tree when it is replaced; what a snapshot or clone may have shared is left to this.
//!
//! One cycle, while guests go on:
//! 1. *Cut*: a checkpoint publishes what was deleted. Between two merges, the roots `R` and the
//!    live plane `C` of one checkpoint are taken: `C` are the candidates.
//! 2. *Mark*: everything that `R` reaches is marked, each shared subtree once: from all heads first, so that what
//!    snapshots alone hold is known (docs/decisions/0018-space.md). Blocks that
//!    checkpoints release meanwhile are held back, so that no node is rewritten under the walk.
//! 3. *Sweep*: `C` without the marked blocks goes to the next checkpoints as replaced blocks, and
//!    is released as those are: when both slots are past it (design rules 17, 18).
//!
//! Why no block is freed that anything can reach (rules 35, 36). Let `g` be swept: live at the
//! cut, and not reached by `R`.
//! - *Nothing allocates it meanwhile*: live blocks are busy, until the sweep's own release.
//! - *No later tree names it.* A tree names new blocks, which were not live at the cut, and
//!   blocks that the tree it continues names. By induction it is enough to look at what the first
//!   trees after the cut continue: bases of branches. A branch with changes above the cut
//!   continues, directly or over points that have no tree yet,
//!   - its own tree as of the cut: the head of a VDI that existed then, even if it was deleted or
//!     rolled back since, for that is a record above the cut: `R` reaches it;
//!   - a point with a tree, or a history that the checkpoint makes a tree of: of a snapshot that was there when the branch began. Nobody can clone,
//!     roll back to or open a deleted one, so its deletion is a record above the cut too: `R`
//!     reaches it. The origin of a clone of a running VDI is passed by the same checkpoint as the
//!     clone: from then on the clone has a root of its own;
//!   - nothing: a new VDI.
//! - *No reader sees it*: handles of deleted snapshots are severed, and a read that began before
//!   holds the release back (rule 19).
//! - *After a crash* the same holds: recovery starts from a published checkpoint, whose bitmaps
//!   hold `g` until one without it is published, and replays records above its cut.
//!
//! A cycle that a restart cuts short is gone on with: what it had marked is stored now and then
//! (docs/decisions/0015-marks.md).
//!
//! A store that needs more memory than a cycle may have is collected in several passes (`gc/pass.rs`).
//!
//! What is *held back* during a mark: nodes, so that none is rewritten under the walk. Data blocks, too, if marks
//! are stored: those of another run name no block that is another one by now. Else nobody looks at data:
//! what a checkpoint releases was reached by `R`, and so is no candidate that is swept; and a block that is allocated
//! anew is named by no tree of `R`. Which blocks are nodes the kinds of their extents tell, and an extent changes
//! its kind only when none of its blocks is busy.
//!
//! If a node cannot be read, nothing is freed: what is below it is not known. If it is damaged, it
//! is *given up* for good, as a bad block, and a new cycle begins: whatever was still built of it
//! is a tree of the new cut, and nothing is built of it later. So damage costs what is below it, and
//! does not keep the rest from being collected.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use base::{ErrorKind, Pba, VdiId};
use blockstore::allocator::{Allocator, BITMAP_PAGE_BLOCKS};
use ondisk::{HostSlot, SlotState};
use runtime::Time;
use runtime::sync::{Permits, Semaphore};

use crate::Error;
use crate::budget::PastBlocks;
use crate::engine::{Engine, as_u64};
use crate::mark::BlockSet;
use crate::trim::Scope;

mod mark;
mod pass;

use mark::Marked;
use pass::{Cut, Section};

/// Blocks that one checkpoint sweeps.
const SWEEP_BLOCKS: usize = 64 << 10;

/// Pages of bits copied between two breaths of the thread.
const PAGES_PER_TURN: u64 = 64;

/// How long after opening a store the first cycle may start by itself.
const QUIET_AFTER_OPEN: Duration = Duration::from_secs(60);

/// Shortest time between two cycles that start by themselves.
const PAUSE_MIN: Duration = Duration::from_secs(10);

/// After a cycle, the next one that starts by itself waits so many times as long as it took.
const PAUSE_FACTOR: u32 = 4;

/// After something was deleted, a cycle starts by itself when so much time has passed, or earlier when
/// space is getting short: what lies below the store may be short of space before the store is.
const DELAY_MAX: Duration = Duration::from_secs(60);

/// What one cycle did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Blocks that were reached.
    pub reached_blocks: u64,
    /// Blocks that were not, and are free now.
    pub freed_blocks: u64,
    /// Free blocks whose space was given back to what lies below afterwards.
    pub trimmed_blocks: u64,
    /// Passes over the trees that it took.
    pub passes: u64,
    /// Bytes of memory that its sets of blocks took at most.
    pub memory_bytes: u64,
    /// Whose the blocks were. `None` if it went on with what an earlier run of the store had marked: whose that
    /// is, is not known; or if it was cut short.
    pub space: Option<GcSpace>,
    /// Whether it ended before it had been everywhere, as somebody needed what it had freed.
    pub was_cut_short: bool,
}

/// When cycles that follow each other have been everywhere.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RoundEnd(u64);

/// Whose the blocks were that were live when a cycle began, each counted once. What changed while it ran is in them
/// in part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcSpace {
    /// Blocks that newest states of VDIs reach: data and nodes, also if snapshots reach them too.
    pub heads_blocks: u64,
    /// Blocks that snapshots and moments alone hold: trees, histories and tables of snapshots. They would
    /// come back if all of these were deleted.
    pub snapshots_blocks: u64,
    /// Blocks of other tables that the cycle walks. Bitmaps and the log are not among them.
    pub tables_blocks: u64,
    /// Blocks that nothing reached.
    pub garbage_blocks: u64,
    /// Wall time when the cycle began.
    pub wall_ns: u64,
}

/// How many blocks a mark reached.
#[derive(Clone, Copy, Debug, Default)]
struct Reached {
    heads: u64,
    /// Of snapshots that were asked for, or are held, or whose VDI has no moments.
    snapshots: u64,
    /// Of moments.
    moments: u64,
    tables: u64,
    /// Those that an earlier run of the store had marked.
    before: u64,
}

impl Reached {
    fn total(&self) -> u64 {
        self.heads + self.snapshots + self.moments + self.tables + self.before
    }
}

/// What the garbage collection is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GcPhase {
    /// Nothing.
    #[default]
    Idle,
    /// Finding out what is reached.
    Marking,
    /// Handing what is not to checkpoints.
    Sweeping,
    /// Giving space of free blocks back to what lies below.
    Trimming,
}

/// How the garbage collection stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcStatus {
    /// What it is doing.
    pub phase: GcPhase,
    /// Blocks that were reached so far, while it is marking.
    pub marked_blocks: u64,
    /// Blocks that may be, while it is marking or sweeping. Both of the pass under way.
    pub candidate_blocks: u64,
    /// The pass under way, from 1, while it is marking or sweeping.
    pub pass: u64,
    /// Bytes of memory that its sets of blocks may take.
    pub memory_bytes_max: u64,
    /// Cycles completed since the store was opened.
    pub cycles: u64,
    /// What the last one did.
    pub last: GcReport,
}

/// State of the garbage collection.
pub(crate) struct Collector {
    /// One cycle at a time.
    cycle: Semaphore,
    /// Number of the last cycle that was started.
    started: Cell<u64>,
    /// The last cycle that was completed, by number.
    completed: Cell<(u64, GcReport)>,
    /// How much was left to collect since the last cut, as far as that is known.
    suspected: Cell<u64>,
    /// Whether something was deleted since then, or may have been before the store was opened.
    has_dropped: Cell<bool>,
    /// When something was deleted for the first time since then.
    dropped_at: Cell<Option<Time>>,
    /// Whether a history may have outgrown its budget since then.
    count_wanted: Cell<bool>,
    /// What is going on, for who watches.
    status: Cell<GcStatus>,
    /// How many wait for space.
    in_need: Cell<usize>,
    /// Swept blocks that the next checkpoint takes.
    garbage: RefCell<Vec<Pba>>,
    /// Blocks whose release waits for the end of the mark, while one is under way or to be resumed.
    held: RefCell<Option<Held>>,
    /// What a mark had reached when the store was closed or crashed.
    resumed: RefCell<Option<BlockSet>>,
    /// What the next checkpoint stores in place of the marks that the roots name.
    unstored: RefCell<Option<Rc<BlockSet>>>,
    /// How often a mark stores what it has reached.
    store_every: Duration,
    /// Where the next cycle begins: the last one may have been cut short there.
    next_start: Cell<Pba>,
    /// How often a cycle has come to the end of the store.
    turns: Cell<u64>,
    /// Whether the last cycle failed.
    has_failed: Cell<bool>,
    /// No cycle starts by itself before.
    not_before: Cell<Time>,
    /// Whether the last mark met damage that was not known.
    gave_up: Cell<bool>,
    /// Bytes that sets of blocks may take.
    memory_bytes_max: u64,
}

/// What is held back.
struct Held {
    blocks: BlockSet,
    /// Whether blocks of data extents are, too.
    has_data: bool,
}

impl Held {
    fn everything() -> Self {
        Self { blocks: BlockSet::default(), has_data: true }
    }

    fn metadata() -> Self {
        Self { blocks: BlockSet::default(), has_data: false }
    }
}

/// Somebody who waits for space.
struct Need<'a>(&'a Collector);

impl<'a> Need<'a> {
    fn begin(collector: &'a Collector) -> Self {
        collector.in_need.set(collector.in_need.get() + 1);
        Self(collector)
    }
}

impl Drop for Need<'_> {
    fn drop(&mut self) {
        self.0.in_need.set(self.0.in_need.get() - 1);
    }
}

/// What a collection did; that it failed the log is told.
fn told(outcome: Result<GcReport, Error>) -> Option<GcReport> {
    outcome.inspect_err(|error| tracing::warn!(%error, "garbage could not be collected")).ok()
}

impl Collector {
    pub(crate) fn new(now: Time, store_every: Duration, memory_bytes_max: u64) -> Self {
        Self {
            cycle: Semaphore::new(1),
            started: Cell::new(0),
            completed: Cell::default(),
            // What an earlier run of the store left is not known.
            suspected: Cell::new(1),
            has_dropped: Cell::new(true),
            dropped_at: Cell::new(None),
            count_wanted: Cell::new(false),
            status: Cell::default(),
            in_need: Cell::new(0),
            garbage: RefCell::default(),
            held: RefCell::default(),
            resumed: RefCell::default(),
            unstored: RefCell::default(),
            store_every,
            next_start: Cell::default(),
            turns: Cell::new(0),
            has_failed: Cell::new(false),
            not_before: Cell::new(now.after(QUIET_AFTER_OPEN)),
            gave_up: Cell::new(false),
            memory_bytes_max,
        }
    }

    /// Notes that what was dropped until now is collected by the cycle that begins.
    fn begin(&self) {
        self.suspected.set(0);
        self.has_dropped.set(false);
        self.dropped_at.set(None);
        self.count_wanted.set(false);
    }

    /// Notes that a VDI, a snapshot or the newest state of a VDI was dropped.
    pub(crate) fn dropped(&self, now: Time) {
        self.has_dropped.set(true);
        self.dropped_at.set(Some(self.dropped_at.get().unwrap_or(now)));
        self.suspect(1);
    }

    /// Has a cycle start by itself soon, so that it counts what pasts hold.
    pub(crate) fn want_count(&self) {
        self.count_wanted.set(true);
    }

    pub(crate) fn enter(&self, phase: GcPhase) {
        self.status.set(GcStatus { phase, ..self.status.get() });
    }

    /// Notes that so much was left to garbage collection.
    pub(crate) fn suspect(&self, count: u64) {
        self.suspected.set(self.suspected.get().saturating_add(count));
    }

    /// Whether somebody waits for space.
    pub(crate) fn is_needed(&self) -> bool {
        self.in_need.get() > 0
    }

    /// Who waits for space has had all of the store collected when this is reached, be it by cycles that were
    /// cut short.
    pub(crate) fn round_from_now(&self) -> RoundEnd {
        RoundEnd(self.turns.get() + 2)
    }

    pub(crate) fn has_come_to(&self, RoundEnd(turns): RoundEnd) -> bool {
        self.turns.get() >= turns
    }

    /// Whether the last cycle failed: what it was to collect is still there.
    pub(crate) fn has_failed(&self) -> bool {
        self.has_failed.get()
    }

    /// What a merge takes as replaced.
    pub(crate) fn take_garbage(&self) -> Vec<Pba> {
        std::mem::take(&mut self.garbage.borrow_mut())
    }

    /// What a failed merge gives back.
    pub(crate) fn put_garbage(&self, garbage: Vec<Pba>) {
        self.garbage.borrow_mut().extend(garbage);
    }

    /// Has the next cycle go on with what an earlier run of the store had marked, and is still there.
    pub(crate) fn resume(&self, marked: BlockSet) {
        *self.held.borrow_mut() = Some(Held::everything());
        self.store_marks(marked.clone());
        *self.resumed.borrow_mut() = Some(marked);
    }

    /// Has the next checkpoint store these marks, and not those that the roots name.
    pub(crate) fn store_marks(&self, marked: BlockSet) {
        *self.unstored.borrow_mut() = Some(Rc::new(marked));
    }

    /// What a merge is to store in place of the marks that the roots name.
    pub(crate) fn unstored_marks(&self) -> Option<Rc<BlockSet>> {
        self.unstored.borrow().as_ref().map(Rc::clone)
    }

    /// Notes what a merge has stored.
    pub(crate) fn marks_stored(&self, marked: &Rc<BlockSet>) {
        let mut unstored = self.unstored.borrow_mut();
        // There may be newer ones by now.
        if unstored.as_ref().is_some_and(|newest| Rc::ptr_eq(newest, marked)) {
            *unstored = None;
        }
    }

    /// Of blocks that are to be released, holds those back that a mark under way needs; returns the others.
    pub(crate) fn hold(&self, mut blocks: BlockSet, allocator: &Allocator) -> BlockSet {
        let mut held = self.held.borrow_mut();
        let Some(held) = &mut *held else { return blocks };
        let needed = match held.has_data {
            true => std::mem::take(&mut blocks),
            false => blocks.split_off(|index| allocator.metadata_page(index)),
        };
        assert_eq!(held.blocks.union(needed), None, "a block was released twice");
        blocks
    }

    /// Holds nothing back any more; what it was.
    fn unhold(&self) -> BlockSet {
        self.held.take().map(|held| held.blocks).unwrap_or_default()
    }

    /// Bytes of what is held back, and of marks that a checkpoint is to store.
    fn bytes(&self) -> u64 {
        let held = self.held.borrow().as_ref().map_or(0, |held| held.blocks.bytes());
        held + self.unstored.borrow().as_ref().map_or(0, |marked| marked.bytes())
    }
}

impl Engine {
    /// Runs a cycle that begins after this call, or joins one that does; then waits until what it
    /// swept is free, or who waits gives up.
    ///
    /// # Errors
    /// See [`crate::Store::collect_garbage`].
    pub(crate) async fn collect_garbage(
        self: &Rc<Self>,
        gives_up: impl Fn() -> bool,
    ) -> Result<GcReport, Error> {
        let report = self.run_or_join_cycle().await?;
        self.swept_is_free(gives_up).await;
        Ok(report)
    }

    /// Waits until what was swept is free, or who waits gives up.
    async fn swept_is_free(&self, gives_up: impl Fn() -> bool) {
        self.released(self.releases.up_to_now(), gives_up).await;
        self.allocator.reclaim_empty_extents();
    }

    /// As [`Self::collect_garbage`], then gives space back to what lies below.
    ///
    /// # Errors
    /// See [`crate::Store::collect_garbage`].
    pub(crate) async fn collect_and_trim(self: &Rc<Self>, scope: Scope) -> Result<GcReport, Error> {
        let report = self.collect_garbage(|| false).await?;
        self.trim_after(report, scope).await
    }

    /// Ends the cycle of an earlier run of the store, then gives space back as [`Self::collect_and_trim`].
    async fn finish_and_trim(self: &Rc<Self>) -> Result<GcReport, Error> {
        let report = {
            let _one = self.collector.cycle.acquire(1).await;
            self.finish_cycle().await?
        };
        self.swept_is_free(|| false).await;
        self.trim_after(report, Scope::Freed).await
    }

    async fn trim_after(
        self: &Rc<Self>,
        report: GcReport,
        scope: Scope,
    ) -> Result<GcReport, Error> {
        let report = GcReport { trimmed_blocks: self.trim(scope).await?, ..report };
        let collector = &self.collector;
        collector.status.set(GcStatus { last: report, ..collector.status.get() });
        Ok(report)
    }

    async fn run_or_join_cycle(self: &Rc<Self>) -> Result<GcReport, Error> {
        let collector = &self.collector;
        let asked = collector.started.get();
        let _one = collector.cycle.acquire(1).await;
        let (completed, report) = collector.completed.get();
        if completed > asked {
            return Ok(report);
        }
        let resumed = self.finish_cycle().await?;
        let report = self.run_cycle().await?;
        Ok(GcReport { freed_blocks: resumed.freed_blocks + report.freed_blocks, ..report })
    }

    /// Ends the cycle that an earlier run of the store had begun, if there is one: what became garbage since
    /// is left to the next.
    async fn finish_cycle(self: &Rc<Self>) -> Result<GcReport, Error> {
        if self.collector.resumed.borrow().is_none() {
            return Ok(GcReport::default());
        }
        let report = self.run_cycle().await?;
        self.collector.has_dropped.set(true);
        self.collector.suspect(1);
        Ok(report)
    }

    async fn run_cycle(self: &Rc<Self>) -> Result<GcReport, Error> {
        let collector = &self.collector;
        let number = collector.started.get() + 1;
        collector.started.set(number);
        let began = self.runtime.now();
        let mut outcome = self.cycle().await;
        // Each round has given up more blocks than the one before.
        while collector.gave_up.take() && self.go_on().is_ok() {
            outcome = self.cycle().await;
        }
        collector.enter(GcPhase::Idle);
        let pause = self.runtime.now().since(began).saturating_mul(PAUSE_FACTOR).max(PAUSE_MIN);
        collector.has_failed.set(outcome.is_err());
        let pause = if outcome.is_err() { pause.max(DELAY_MAX) } else { pause };
        collector.not_before.set(self.runtime.now().after(pause));
        let report = match outcome {
            Ok(report) => report,
            Err(error) => {
                // What it was to collect is still there.
                collector.dropped(self.runtime.now());
                return Err(error);
            }
        };
        collector.completed.set((number, report));
        let status = collector.status.get();
        collector.status.set(GcStatus { last: report, ..status });
        let mut stats = self.stats.borrow_mut();
        stats.collections += 1;
        stats.collected_blocks += report.freed_blocks;
        Ok(report)
    }

    /// How it stands.
    pub(crate) fn gc_status(&self) -> GcStatus {
        GcStatus {
            cycles: self.stats.borrow().collections,
            memory_bytes_max: self.collector.memory_bytes_max,
            ..self.collector.status.get()
        }
    }

    /// Runs cycles until an attempt at what somebody needs gives something; `None` if all that may help
    /// was collected, or who waits gives up.
    pub(crate) async fn collect_until<T>(
        self: &Rc<Self>,
        gives_up: impl Fn() -> bool,
        attempt: impl AsyncFn() -> Result<Option<T>, Error>,
    ) -> Result<Option<T>, Error> {
        let end = self.collector.round_from_now();
        while let Some(report) = self.collect_for_space(&gives_up).await {
            let given = attempt().await?;
            let is_all = !report.was_cut_short || self.collector.has_come_to(end);
            if given.is_some() || is_all || gives_up() {
                return Ok(given);
            }
        }
        Ok(None)
    }

    /// Runs a cycle for somebody who needs space and may give up, if one may help; `None` if it did not, or
    /// failed.
    async fn collect_for_space(self: &Rc<Self>, gives_up: impl Fn() -> bool) -> Option<GcReport> {
        let collector = &self.collector;
        if collector.suspected.get() == 0 && collector.cycle.available() > 0 {
            return None;
        }
        let _need = Need::begin(collector);
        // If it ends well, what the mark held back is free then, too.
        told(self.collect_garbage(gives_up).await)
    }

    /// Runs a cycle for somebody who needs space; `None` if it failed. What it swept is not free yet.
    pub(crate) async fn cycle_for_space(self: &Rc<Self>) -> Option<GcReport> {
        let _need = Need::begin(&self.collector);
        told(self.run_or_join_cycle().await)
    }

    /// Starts a cycle in the background if something was deleted, and space is getting short or some time
    /// has passed; or if a history may have outgrown its budget.
    pub(crate) fn collect_if_due(self: &Rc<Self>) {
        let collector = &self.collector;
        let now = self.runtime.now();
        let scarce = self.allocator.free_blocks() < self.allocator.capacity_blocks() / 2;
        let delayed = collector.dropped_at.get().is_some_and(|at| now.since(at) >= DELAY_MAX);
        // What an earlier run had marked holds releases back until it is used.
        let resumes = collector.resumed.borrow().is_some();
        let counts = collector.count_wanted.get();
        let wanted = (collector.has_dropped.get() && scarce) || delayed || counts || resumes;
        let rested = now >= collector.not_before.get() || resumes;
        let idle = collector.cycle.available() > 0;
        if !(wanted && rested && idle) || self.closing.get() {
            return;
        }
        let engine = Rc::clone(self);
        drop(self.runtime.spawn(async move {
            let collected = match resumes {
                true => engine.finish_and_trim().await,
                false => engine.collect_and_trim(Scope::Freed).await,
            };
            match collected {
                Ok(GcReport { freed_blocks: freed, trimmed_blocks: trimmed, .. }) => {
                    tracing::info!(freed, trimmed, "garbage was collected");
                }
                Err(error) => tracing::warn!(%error, "garbage could not be collected"),
            }
        }));
    }

    async fn cycle(self: &Rc<Self>) -> Result<GcReport, Error> {
        self.begin_count();
        // Also takes what an earlier cycle swept and no checkpoint has taken yet.
        if let Err(error) = self.checkpoint(SlotState::Running).await {
            // What is held back since the store was opened may be what it lacks.
            if self.go_on().is_ok() && self.collector.resumed.take().is_some() {
                self.end_mark().await;
            }
            return Err(error);
        }
        let mut already = self.collector.resumed.take();
        if already.is_some() && !self.collects_in_one_pass() {
            // The store has grown.
            already = None;
            self.end_mark().await;
        }
        let space = GcSpace { wall_ns: self.runtime.wall_ns(), ..GcSpace::default() };
        let space = already.is_none().then_some(space);
        let mut report = GcReport { space, ..GcReport::default() };
        let mut pasts: BTreeMap<VdiId, PastBlocks> = BTreeMap::new();
        let mut round = self.round();
        while let Some(cut) = self.cut(&mut round).await {
            report.passes += 1;
            let already = already.take().unwrap_or_default();
            let found = self.pass(cut, already, &mut report).await?;
            for (id, past) in found {
                pasts.entry(id).and_modify(|sum| sum.add_blocks(&past)).or_insert(past);
            }
            if self.collector.is_needed() && report.freed_blocks > 0 && self.has_more(round) {
                // Who waits for space waits for no other sections. They come with the next cycle.
                self.collector.next_start.set(round.at());
                self.collector.dropped(self.runtime.now());
                report.was_cut_short = true;
                report.space = None;
                return Ok(report);
            }
        }
        self.collector.next_start.set(Pba::default());
        if let Some(space) = &report.space {
            self.end_count(space.wall_ns, pasts);
        }
        Ok(report)
    }

    async fn pass(
        self: &Rc<Self>,
        cut: Cut,
        already: BlockSet,
        report: &mut GcReport,
    ) -> Result<BTreeMap<VdiId, PastBlocks>, Error> {
        let Cut { section, roots, candidates } = cut;
        let status = GcStatus {
            phase: GcPhase::Marking,
            marked_blocks: 0,
            candidate_blocks: candidates.len(),
            pass: report.passes,
            ..self.collector.status.get()
        };
        self.collector.status.set(status);
        let marked = self.mark(&roots, &section, already).await;
        let bytes = |marked: &Marked| marked.bytes + candidates.bytes() + self.collector.bytes();
        report.memory_bytes = report.memory_bytes.max(marked.as_ref().map_or(0, bytes));
        // What is stored is of use to the next run: nothing that it names may be allocated in this one.
        self.go_on()?;
        self.end_mark().await;
        let marked = marked?;
        report.reached_blocks += marked.reached.total();
        let candidates = if base::mutant::active("gc_frees_newly_live") {
            self.live_in(&section).await
        } else {
            candidates
        };
        self.collector.enter(GcPhase::Sweeping);
        let freed = self.sweep(candidates, &marked.blocks).await?;
        report.freed_blocks += freed;
        if let Some(space) = &mut report.space {
            space.heads_blocks += marked.reached.heads;
            space.snapshots_blocks += marked.reached.snapshots + marked.reached.moments;
            space.tables_blocks += marked.reached.tables;
            space.garbage_blocks += freed;
        }
        Ok(marked.pasts)
    }

    /// Holds back nodes that are released, for somebody else who walks the roots of a checkpoint, as a mark does;
    /// no cycle runs meanwhile. Returns the published slot, the blocks that are live in it, and what
    /// [`Self::let_go`] takes.
    pub(crate) async fn hold_back(
        self: &Rc<Self>,
    ) -> Result<(HostSlot, BlockSet, HeldBack), Error> {
        let cycle = self.collector.cycle.acquire(1).await;
        // It has held back what it needs since the store was opened.
        self.finish_cycle().await?;
        let _merges_wait = self.between_merges().await;
        let slot = self.published_slot().await?;
        if !base::mutant::active("check_holds_nothing_back") {
            *self.collector.held.borrow_mut() = Some(Held::metadata());
        }
        let live = self.live_in(&Section::WHOLE).await;
        Ok((slot, live, HeldBack(cycle)))
    }

    /// Releases what was held back.
    pub(crate) fn let_go(self: &Rc<Self>, held_back: HeldBack) {
        self.release_set(self.collector.unhold());
        drop(held_back);
    }

    /// Whether somebody waits for space, or for a checkpoint that finds none.
    pub(crate) fn space_is_needed(&self) -> bool {
        self.collector.is_needed() || self.checkpoints.failing_since.get().is_some()
    }

    /// As [`Self::go_on`], for who holds back what others may wait for.
    ///
    /// # Errors
    /// Also if somebody needs space.
    pub(crate) fn go_on_checking(&self) -> Result<(), Error> {
        self.go_on()?;
        match self.space_is_needed() {
            false => Ok(()),
            true => Err(Error::refused(
                ErrorKind::Busy,
                "the store is short of space, and a check holds back what becomes free: check again \
                 when some was freed",
            )),
        }
    }

    /// Lets go of what was held back for a mark. No checkpoint may publish stored marks from here on: what
    /// they name may be allocated anew, and a mark that went on with them would not look below it.
    async fn end_mark(self: &Rc<Self>) {
        let _merges_wait = self.between_merges().await;
        if !base::mutant::active("gc_marks_outlive_their_cycle") {
            self.collector.store_marks(BlockSet::default());
        }
        self.release_set(self.collector.unhold());
    }

    /// Gives the candidates that are not marked to checkpoints; how many these were.
    async fn sweep(
        self: &Rc<Self>,
        mut candidates: BlockSet,
        marked: &BlockSet,
    ) -> Result<u64, Error> {
        let mut swept = 0;
        let mut part = Vec::new();
        while let Some((index, words)) = candidates.pop_page() {
            let start = index * BITMAP_PAGE_BLOCKS;
            let kept = marked.page(index);
            for (word, &bits) in words.iter().enumerate() {
                let mut bits = bits & !kept.map_or(0, |kept| kept[word]);
                while bits != 0 {
                    let bit = as_u64(word) * 64 + u64::from(bits.trailing_zeros());
                    part.push(Pba::new(start + bit));
                    bits &= bits - 1;
                }
            }
            if part.len() >= SWEEP_BLOCKS {
                swept += self.sweep_part(std::mem::take(&mut part)).await?;
            }
            self.runtime.yield_now().await;
        }
        if !part.is_empty() {
            swept += self.sweep_part(part).await?;
        }
        if swept > 0 {
            // The blocks of the last part are released when the older slot is past them too.
            self.checkpoint(SlotState::Running).await?;
        }
        Ok(swept)
    }

    async fn sweep_part(self: &Rc<Self>, part: Vec<Pba>) -> Result<u64, Error> {
        self.go_on()?;
        for pba in &part {
            // Swept at most once, and by nobody else.
            assert!(self.allocator.is_live(*pba), "block {pba} was swept, but is not live");
        }
        let count = as_u64(part.len());
        self.collector.put_garbage(part);
        self.checkpoint(SlotState::Running).await?;
        Ok(count)
    }

    /// Whether the store is still there to be walked.
    ///
    /// # Errors
    /// If it has failed, or is being closed.
    pub(crate) fn go_on(&self) -> Result<(), Error> {
        if let Some(error) = self.scheduler.failure() {
            return Err(crate::engine::stopped(&error));
        }
        if self.closing.get() {
            return Err(Error::refused(ErrorKind::Fenced, "the store is being closed"));
        }
        Ok(())
    }
}

/// Shows that releases are held back.
pub(crate) struct HeldBack(#[expect(dead_code, reason = "held, not looked at")] Permits);

/// Blocks that marks take when they are stored.
pub(crate) fn nodes_of_marks(marked: &BlockSet) -> u64 {
    let pages = as_u64(marked.pages().count());
    pages + pages / as_u64(ondisk::FANOUT) + 4
}
