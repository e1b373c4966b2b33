//! Writes that can be opened one by one: of a VDI whose first rule is `every write`.
//!
//! The mapping records of writes are in the log anyway. All that is different is what may be thinned:
//! overlays and histories then have each version of a block, and not only those that a moment sees. A
//! moment *keeps the writes* from a position on (`Point::writes_from`) up to its own, so there is no
//! record for each write:
//!
//! ```text
//!     16          104    107 107    110      17        moments, and writes of the VDI by LSN
//!   ──┼────────────┼──────┼───┼──────┼────────┼──
//!                       └ NAME@lsn:107: all up to 107, by 17's history
//! ```
//!
//! - What reads a moment reads a write: a history, by what has lower LSNs (`history.rs`).
//! - A checkpoint first takes a moment of each VDI that was written since its last, so that none lies
//!   between two histories. It never waits for that: if the log has no room for the record, the writes
//!   since the moment before cannot be opened.
//! - When their time has come, a moment forgets its writes. That is no log record: the next checkpoint
//!   stores it so, and garbage collection, which goes by what is stored, frees what nobody sees then.
//!   After a crash it keeps them again, and nothing of them was freed.
//! - A write is named by its LSN when a slot was published whose cut lies behind its moment. What lies above
//!   that may be written again by recovery, under another: it knows of flushes only what log blocks tell.
//! - A clone and a rollback start at such a position, too (`start.rs`), and the moment goes on to keep its writes.
//! - A moment that gets a tree of its own (it is held or compared) keeps no writes but its own
//!   position. So does one behind a discard of more than single blocks, of which no history tells: one is taken
//!   before it, and one before what is changed next, and so it is with a change of size. Where such discards
//!   and writes follow each other closely, the writes from the last moment to the next cannot be opened.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use base::{BLOCK_SIZE_U64, ErrorKind, Lsn};
use ondisk::{SlotState, VersionRecord};
use runtime::Time;

use crate::Error;
use crate::branch::{Contents, Point};
use crate::engine::Engine;
use crate::history;
use crate::manage::refuse_without_labels;
use crate::types::{Target, VdiWrite};
use crate::vdi::{Snapshot, Vdi};

/// What the name of a write begins with.
pub(crate) const WRITE_PREFIX: &str = "lsn:";

/// Blocks after which a moment is taken, so that few enough for a history lie between two.
const BLOCKS_MAX: u64 = 8192;

/// Shortest time between two large ranges that get moments around them, unless nothing was changed between
/// them: else one guest's discards would push older moments out.
const PARTED_MIN: Duration = Duration::from_millis(100);

/// What a branch keeps of its writes.
#[derive(Debug, Default)]
pub(crate) struct KeptWrites {
    /// Versions that a position in `from .. to` sees stay.
    from: Cell<Lsn>,
    to: Cell<Lsn>,
    /// The next moment keeps those from here on.
    since: Cell<Lsn>,
    /// The newest change.
    newest: Cell<Lsn>,
    /// Blocks that were changed since the last moment.
    block_count: Cell<u64>,
    /// The branch's tree is that of this position.
    in_tree: Cell<Lsn>,
    /// A large range stands behind the last moment, and the next change is to have one before it.
    behind_range: Cell<bool>,
    /// When a large range was parted from what was before it.
    parted_at: Cell<Option<Time>>,
}

impl KeptWrites {
    /// Keeps writes from a position on.
    pub(crate) fn begin(&self, at: Lsn) {
        if self.is_on() {
            return;
        }
        if self.to.get() == Lsn::default() {
            self.from.set(at);
        }
        self.to.set(Lsn::new(u64::MAX));
        self.since.set(at);
    }

    /// Keeps none from a position on.
    pub(crate) fn end(&self, at: Lsn) {
        if self.is_on() {
            self.to.set(at);
        }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.to.get() == Lsn::new(u64::MAX)
    }

    /// Begins or ends, as `wanted` says.
    pub(crate) fn set(&self, wanted: bool, at: Lsn) {
        match wanted {
            true => self.begin(at),
            false => self.end(at),
        }
    }

    /// What lies before is not to be seen by who opens a write behind.
    pub(crate) fn break_at(&self, at: Lsn) {
        self.since.set(self.since.get().max(at));
    }

    /// Whether a large range that comes now is to have moments around it.
    pub(crate) fn parts(&self, now: Time) -> bool {
        let has_rested = |at| now.since(at) >= PARTED_MIN;
        self.behind_range.get() || self.parted_at.get().is_none_or(has_rested)
    }

    /// Notes that a large range has, or will have before the next change.
    pub(crate) fn part(&self, now: Time) {
        if !self.behind_range.replace(true) {
            self.parted_at.set(Some(now));
        }
    }

    /// Whether a moment is to be taken before the next change, so that it is in a history.
    pub(crate) fn is_behind_range(&self) -> bool {
        self.is_on() && self.behind_range.get()
    }

    /// Whether somebody may want to open a write between two changes of a block.
    pub(crate) fn separate(&self, older: Lsn, newer: Lsn) -> bool {
        newer >= self.from.get() && older < self.to.get()
    }

    /// Notes a change, of so many blocks.
    pub(crate) fn note(&self, lsn: Lsn, block_count: u64) {
        self.newest.set(self.newest.get().max(lsn));
        self.block_count.set(self.block_count.get().saturating_add(block_count));
    }

    /// Whether there are writes that no moment keeps yet.
    pub(crate) fn has_unkept(&self) -> bool {
        self.is_on() && self.newest.get() >= self.since.get() && self.newest.get() > Lsn::default()
    }

    /// Whether they should not become more.
    pub(crate) fn are_many(&self) -> bool {
        self.is_on() && self.block_count.get() >= BLOCKS_MAX
    }

    /// From where on a moment at `position` keeps them.
    pub(crate) fn take(&self, position: Lsn) -> Option<Lsn> {
        let since = self.since.get();
        let from = (self.is_on() && since <= position).then_some(since);
        self.since.set(position);
        self.block_count.set(0);
        self.behind_range.set(false);
        from
    }

    pub(crate) fn set_in_tree(&self, position: Lsn) {
        self.in_tree.set(position);
    }

    pub(crate) fn in_tree(&self) -> Lsn {
        self.in_tree.get()
    }
}

/// A VDI as it was when a write had been made.
pub(crate) struct AtWrite {
    pub(crate) vdi: Rc<Vdi>,
    /// The moment that keeps it.
    pub(crate) moment: Rc<Snapshot>,
    /// The position behind it in the moment's history; `None`: it is the moment.
    pub(crate) point: Option<Rc<Point>>,
}

/// `lsn:107`.
pub(crate) fn parse_write(text: &str) -> Option<Lsn> {
    let digits = text.strip_prefix(WRITE_PREFIX)?;
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| is_number).map(Lsn::new)
}

impl Engine {
    /// Takes a moment of each VDI of which there are writes that none keeps. For a checkpoint, in the
    /// breath in which it cuts the log.
    pub(crate) fn keep_writes_at_cut(self: &Rc<Self>) {
        let mut vdis: Vec<Rc<Vdi>> = {
            let registry = self.registry.borrow();
            let loaded = registry.loaded.values();
            loaded.filter(|vdi| vdi.branch.borrow().writes.has_unkept()).map(Rc::clone).collect()
        };
        vdis.sort_by_key(|vdi| vdi.id);
        for vdi in vdis {
            if !self.log.has_reserve() {
                return;
            }
            if refuse_without_labels(&vdi.branch.borrow()).is_err() {
                continue;
            }
            let appended = self.append_moment_reserved(&vdi);
            let engine = Rc::clone(self);
            drop(self.runtime.spawn(async move {
                // A store that has stopped says so to everybody.
                let _ = engine.complete_record(appended).await;
            }));
        }
    }

    /// Has moments forget their writes whose time has come.
    pub(crate) fn end_writes(&self, vdi: &Vdi) {
        let for_ns = vdi.retention.borrow().writes_for_ns();
        let now_ns = self.store_ns();
        let mut ended = false;
        for snapshot in vdi.snapshots.borrow().iter() {
            let age_ns = now_ns.saturating_sub(snapshot.store_ns);
            let is_due = snapshot.point.writes_from.get().is_some() && age_ns > for_ns;
            if is_due && Rc::strong_count(snapshot) == 1 {
                snapshot.point.writes_from.set(None);
                self.owe_snapshot(vdi, snapshot.number);
                ended = true;
                if self.nodes_needed() > self.reserve.block_count() {
                    // The next turn goes on, when a checkpoint has written this down.
                    break;
                }
            }
        }
        if ended {
            self.collector.dropped(self.runtime.now());
            self.touch(vdi);
        }
    }

    /// The write that `target` names, unless that is a label.
    pub(crate) async fn write_of(self: &Rc<Self>, target: &Target) -> Result<Option<Lsn>, Error> {
        let Some(text) = &target.snapshot else { return Ok(None) };
        let Some(lsn) = parse_write(text) else { return Ok(None) };
        let is_label = self.find(&target.vdi).await?.snapshot(text).is_some();
        Ok((!is_label).then_some(lsn))
    }

    /// A VDI as it was when the write with this LSN had been made.
    ///
    /// # Errors
    /// `NotFound` if no moment keeps it; `Invalid` if there is none yet.
    pub(crate) async fn at_write(self: &Rc<Self>, name: &str, lsn: Lsn) -> Result<AtWrite, Error> {
        let vdi = self.find(name).await?;
        if lsn > self.log.last_lsn() {
            let message = format!("lsn:{lsn} is to come");
            return Err(Error::refused(ErrorKind::Invalid, message));
        }
        let one_too_far = base::mutant::active("write_is_one_record_too_far");
        let position = lsn.plus(1 + u64::from(one_too_far));
        let find = || keeper(&vdi, lsn, position).filter(|moment| !is_pending(moment));
        if find().is_none() {
            // One takes a moment, and makes a history of what is in memory.
            self.checkpoint(SlotState::Running).await?;
        }
        let cut = self.published_cut().await?;
        if let Some(moment) = find().filter(|moment| moment.position <= cut) {
            let point = (position < moment.position).then(|| {
                let (contents, label) = (moment.point.contents.get(), moment.point.label.get());
                Point::met(position, contents, label, moment.block_count)
            });
            return Ok(AtWrite { vdi, moment, point });
        }
        Err(not_kept(name, lsn))
    }

    /// Up to where records keep their numbers, whatever happens. Waits for a checkpoint that readers see
    /// already and that is not published.
    async fn published_cut(&self) -> Result<Lsn, Error> {
        match self.read_only {
            true => Ok(self.log.last_lsn()),
            false => Ok(self.published_slot().await?.cut),
        }
    }

    /// The writes that a moment of `name` keeps, in the order in which they were made.
    ///
    /// # Errors
    /// `Invalid` if it keeps none; `NotFound` if it was deleted meanwhile; if its history is damaged.
    pub(crate) async fn writes(
        self: &Rc<Self>,
        name: &str,
        moment: &Snapshot,
    ) -> Result<Vec<VdiWrite>, Error> {
        if is_pending(moment) {
            self.checkpoint(SlotState::Running).await?;
        }
        self.published_cut().await?;
        // What was freed until now may be something else.
        let _reader = self.epochs.enter();
        if moment.deleted.get() {
            return Err(moment.deleted_meanwhile(name));
        }
        let Some(from) = moment.point.writes_from.get() else {
            let message = format!(
                "{} keeps no writes: they are kept by `parallax set {name} 'history=every write for \
                 10m, 24h'`, and until that is over",
                moment.handle(name)
            );
            return Err(Error::refused(ErrorKind::Invalid, message));
        };
        let Contents::Past(past) = moment.point.contents.get() else { return Ok(Vec::new()) };
        let versions = history::all(&self.nodes, &past.history).await?;
        let kept = |version: &&VersionRecord| from <= version.lsn && version.lsn < moment.position;
        let mut writes: BTreeMap<Lsn, VdiWrite> = BTreeMap::new();
        for version in versions.iter().filter(kept) {
            let offset = version.block * BLOCK_SIZE_U64;
            // Versions are in order of blocks.
            let write = writes.entry(version.lsn);
            let write = write.or_insert(VdiWrite { lsn: version.lsn, offset, length: 0 });
            write.length = offset + BLOCK_SIZE_U64 - write.offset;
        }
        Ok(writes.into_values().collect())
    }
}

impl Snapshot {
    /// Whether it keeps a position before its own.
    pub(crate) fn keeps(&self, position: Lsn) -> bool {
        let from = self.point.writes_from.get();
        from.is_some_and(|from| from <= position) && position < self.position
    }
}

pub(crate) fn not_kept(name: &str, lsn: Lsn) -> Error {
    let message = format!(
        "no moment of {name} keeps lsn:{lsn}; `parallax log {name} --writes` shows what is kept"
    );
    Error::refused(ErrorKind::NotFound, message)
}

/// Refuses a write where a snapshot is needed.
pub(crate) fn refuse_write(name: &str, snapshot: &str) -> Result<(), Error> {
    if parse_write(snapshot).is_none() {
        return Ok(());
    }
    let message = format!(
        "{name}@{snapshot} names a write, and this takes a snapshot: a write that is kept can be read, cloned and \
         rolled back to; for everything else take a clone of it: parallax clone {name}@{snapshot} NEW"
    );
    Err(Error::refused(ErrorKind::NotFound, message))
}

/// The moment that keeps a write, or the snapshot of the position behind it.
fn keeper(vdi: &Vdi, lsn: Lsn, position: Lsn) -> Option<Rc<Snapshot>> {
    let snapshots = vdi.snapshots.borrow();
    let is_at = |it: &Snapshot| it.position == lsn || it.position == position;
    snapshots.iter().find(|it| is_at(it) || it.keeps(position)).map(Rc::clone)
}

/// Whether no checkpoint has met it.
pub(crate) fn is_pending(moment: &Snapshot) -> bool {
    matches!(moment.point.contents.get(), Contents::Pending)
}
