//! Holds: a held snapshot is not deleted, by nobody and by no rule, until its hold ends.
//!
//! - A hold ends when somebody ends it, or when its time has come. Then wall clocks must say so,
//!   and the store must have been open as long as the time was away when it was set: a clock that leaps
//!   ends nothing (design rule 38). A store that was closed meanwhile holds longer.
//! - That it ended is a log record too, and there is one before a snapshot that was held is deleted.
//!   So what is held never depends on a clock that is read twice.
//! - A moment may be held like any snapshot. What is held gets a tree of its own, as what is cloned does, so
//!   that there is a hash of all that it holds.
//! - Each hold, and each end of one, goes into the VDI's ledger (`ledger.rs`).

use std::rc::Rc;

use base::{ErrorKind, SnapshotNumber};
use blockstore::log::Admission;
use ondisk::{LedgerKind, RecordBody, SlotState, Until};

use crate::Error;
use crate::engine::Engine;
use crate::ledger::{Event, HOLDS_MAX};
use crate::manage::{Appended, find_snapshot};
use crate::start::nodes_wanted;
use crate::times::parse_until;
use crate::vdi::{Snapshot, Vdi};

/// Names of held snapshots that an error tells.
const NAMED_MAX: usize = 3;

/// That a snapshot is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hold {
    /// When it ends by itself, if it does.
    pub(crate) until: Option<Until>,
}

/// Nodes that a checkpoint takes at most for a hold that begins or ends: a page of snapshots, one of the ledger,
/// and what leads to them.
const HOLD_NODES: u64 = 6;

impl Engine {
    /// Holds a snapshot, or holds it longer. Durable on return.
    pub(crate) async fn hold(
        self: &Rc<Self>,
        name: &str,
        wanted: &str,
        until: Option<&str>,
    ) -> Result<SnapshotNumber, Error> {
        let _request = self.begin_change()?;
        self.refuse_without_holds()?;
        let vdi = self.find(name).await?;
        // A moment that somebody has is not thinned meanwhile.
        let snapshot = self.find_moment(&vdi, name, wanted)?;
        let until = until.map(|until| self.until(until)).transpose()?;
        self.reserve_nodes(nodes_wanted(&snapshot), || false).await?;
        let (one, vdi) = self.manage(name).await?;
        let room = self.room().await?;
        let number = snapshot.number;
        let snapshot = find_snapshot(&vdi, name, &number.to_string())?;
        let until = no_shorter(name, &snapshot, until)?;
        if vdi.held.borrow().len() >= HOLDS_MAX && snapshot.hold.get().is_none() {
            let message = format!(
                "{name} has {HOLDS_MAX} held snapshots, and there cannot be more; release some first"
            );
            return Err(Error::refused(ErrorKind::Invalid, message));
        }
        let times = (self.runtime.wall_ns(), self.store_ns());
        let (wall_ns, store_ns) = times;
        let appended =
            self.append(room, &vdi, RecordBody::Hold { number, wall_ns, store_ns, until });
        self.apply_hold(&vdi, number, until, times);
        drop((one, snapshot));
        self.settle(appended).await?;
        self.write_ledger().await;
        Ok(number)
    }

    /// Ends the hold of a snapshot. Durable on return.
    pub(crate) async fn release_hold(
        self: &Rc<Self>,
        name: &str,
        wanted: &str,
    ) -> Result<SnapshotNumber, Error> {
        let _request = self.begin_change()?;
        let (one, vdi) = self.manage(name).await?;
        let room = self.room().await?;
        let number = self.held_number(&vdi, name, wanted)?;
        let ended = self.append_end(room, &vdi, number, false);
        drop(one);
        self.settle(ended).await?;
        self.write_ledger().await;
        Ok(number)
    }

    /// The number of what is held, or was when it was lost.
    fn held_number(&self, vdi: &Vdi, name: &str, wanted: &str) -> Result<SnapshotNumber, Error> {
        let missing = wanted.parse().ok().map(SnapshotNumber::new);
        if let Some(missing) = missing
            && vdi.snapshot(wanted).is_none()
            && vdi.ledger.borrow().written.holds().contains_key(&missing)
        {
            return Ok(missing);
        }
        let snapshot = self.find_moment(vdi, name, wanted)?;
        if snapshot.hold.get().is_none() {
            let message = format!("{name}@{wanted} is not held");
            return Err(Error::refused(ErrorKind::Invalid, message));
        }
        Ok(snapshot.number)
    }

    /// Whether something could be held until then.
    pub(crate) fn check_until(&self, text: Option<&str>) -> Result<(), Error> {
        self.refuse_without_holds()?;
        text.map_or(Ok(()), |text| self.until(text).map(drop))
    }

    fn refuse_without_holds(&self) -> Result<(), Error> {
        if self.has_holds.get() {
            return Ok(());
        }
        let message = "this store was formatted by a Parallax that knew no holds: send its disks to a \
                       new store";
        Err(Error::refused(ErrorKind::Unsupported, message))
    }

    /// When a hold ends that is to end at a time that somebody has written.
    fn until(&self, text: &str) -> Result<Until, Error> {
        let now_ns = self.runtime.wall_ns();
        let wall_ns = parse_until(text, now_ns).ok_or_else(|| {
            let message = format!(
                "'{text}' is no time to come; write 2030-01-31, 2030-01-31T18:00:00Z, or how long, such \
                 as 30d"
            );
            Error::refused(ErrorKind::Invalid, message)
        })?;
        let store_ns = self.store_ns().saturating_add(wall_ns - now_ns);
        Ok(Until { wall_ns, store_ns })
    }

    /// Has a checkpoint write what happened into the ledger, so that its head can be noted. What was held
    /// is, whatever becomes of this one.
    async fn write_ledger(self: &Rc<Self>) {
        if let Err(error) = self.checkpoint(SlotState::Running).await {
            tracing::warn!(%error, "a hold is not in the ledger yet; a later checkpoint takes it");
        }
    }

    pub(crate) fn apply_hold(
        &self,
        vdi: &Vdi,
        number: SnapshotNumber,
        until: Option<Until>,
        times: (u64, u64),
    ) {
        let snapshot = vdi.snapshots.borrow().get(number).map(Rc::clone);
        let Some(snapshot) = snapshot else {
            let registry = self.registry.borrow();
            tracing::error!(disk = registry.name(vdi.id), %number, "a held snapshot is lost");
            return;
        };
        snapshot.hold.set(Some(Hold { until }));
        vdi.held.borrow_mut().insert(number);
        self.owe_snapshot(vdi, number);
        self.want_tree(vdi, &snapshot);
        self.owed_nodes.set(self.owed_nodes.get() + HOLD_NODES);
        let kind = LedgerKind::Held;
        let snapshot = Some(snapshot);
        vdi.ledger.borrow_mut().events.push(Event { kind, number, times, until, snapshot });
        self.touch(vdi);
    }

    pub(crate) fn apply_end_hold(
        &self,
        vdi: &Vdi,
        number: SnapshotNumber,
        is_due: bool,
        times: (u64, u64),
    ) {
        if let Some(snapshot) = vdi.snapshots.borrow().get(number) {
            snapshot.hold.set(None);
            self.owe_snapshot(vdi, number);
            if snapshot.is_kept() {
                // What it holds counts for the budget of moments from here on.
                self.collector.dropped(self.runtime.now());
            }
        }
        vdi.held.borrow_mut().remove(&number);
        self.owed_nodes.set(self.owed_nodes.get() + HOLD_NODES);
        let kind = if is_due { LedgerKind::Ended } else { LedgerKind::Released };
        let (until, snapshot) = (None, None);
        vdi.ledger.borrow_mut().events.push(Event { kind, number, times, until, snapshot });
        self.touch(vdi);
    }

    /// Ends a hold.
    pub(crate) fn append_end(
        &self,
        room: Admission,
        vdi: &Vdi,
        number: SnapshotNumber,
        is_due: bool,
    ) -> Appended {
        let times = (self.runtime.wall_ns(), self.store_ns());
        let (wall_ns, store_ns) = times;
        let body = RecordBody::EndHold { number, wall_ns, store_ns, is_due };
        let appended = self.append(room, vdi, body);
        self.apply_end_hold(vdi, number, is_due, times);
        appended
    }

    /// Whether the time of a hold has come.
    pub(crate) fn is_due(&self, hold: Hold) -> bool {
        hold.until.is_some_and(|until| {
            let leaps = base::mutant::active("holds_end_by_the_clock");
            self.runtime.wall_ns() >= until.wall_ns && (leaps || self.store_ns() >= until.store_ns)
        })
    }

    /// Refuses to delete a snapshot that is held.
    pub(crate) fn refuse_held(&self, name: &str, snapshot: &Snapshot) -> Result<(), Error> {
        match snapshot.hold.get().filter(|&hold| !self.is_due(hold)) {
            None => Ok(()),
            Some(_) => {
                let target = snapshot.handle(name);
                let message = format!(
                    "{target} is held{}; to delete it anyway: parallax release {target}",
                    shown_until(snapshot)
                );
                Err(Error::refused(ErrorKind::Busy, message))
            }
        }
    }

    /// Refuses to delete a VDI of which snapshots are held.
    pub(crate) fn refuse_holding(&self, name: &str, vdi: &Vdi) -> Result<(), Error> {
        let snapshots = vdi.snapshots.borrow();
        let held = vdi.held.borrow();
        let held = held.iter().filter_map(|&number| snapshots.get(number));
        let held = held.filter(|snapshot| snapshot.hold.get().is_some_and(|it| !self.is_due(it)));
        let named: Vec<String> = held.map(|it| it.handle(name)).collect();
        let Some(first) = named.first() else { return Ok(()) };
        let more = match named.len().saturating_sub(NAMED_MAX) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let list = named.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
        let message = format!(
            "{name} has held snapshots: {list}{more}; first end each hold: parallax release {first}"
        );
        Err(Error::refused(ErrorKind::Busy, message))
    }

    /// Ends holds whose time has come, in the background.
    pub(crate) fn end_due_holds(self: &Rc<Self>) {
        let due: Vec<(Rc<Vdi>, SnapshotNumber)> = {
            let registry = self.registry.borrow();
            let holding = registry.loaded.values().filter(|vdi| !vdi.held.borrow().is_empty());
            let mut vdis: Vec<&Rc<Vdi>> = holding.collect();
            vdis.sort_by_key(|vdi| vdi.id);
            vdis.into_iter()
                .flat_map(|vdi| self.due_of(vdi).into_iter().map(|it| (Rc::clone(vdi), it)))
                .collect()
        };
        if due.is_empty() || self.read_only || self.ending_holds.replace(true) {
            return;
        }
        let engine = Rc::clone(self);
        drop(self.runtime.spawn(async move {
            for (vdi, number) in due {
                if let Err(error) = engine.end_due_hold(&vdi, number).await {
                    tracing::warn!(%error, "a hold whose time has come could not be ended");
                    break;
                }
            }
            engine.ending_holds.set(false);
        }));
    }

    fn due_of(&self, vdi: &Vdi) -> Vec<SnapshotNumber> {
        let snapshots = vdi.snapshots.borrow();
        let held = vdi.held.borrow();
        let due = |number: &SnapshotNumber| {
            let hold = snapshots.get(*number).and_then(|snapshot| snapshot.hold.get());
            hold.is_some_and(|hold| self.is_due(hold))
        };
        held.iter().copied().filter(due).collect()
    }

    async fn end_due_hold(
        self: &Rc<Self>,
        vdi: &Rc<Vdi>,
        number: SnapshotNumber,
    ) -> Result<(), Error> {
        let _request = self.begin_change()?;
        if !self.metadata_suffices_for(HOLD_NODES).await? {
            // It is ended another time.
            return Ok(());
        }
        let one = self.management.acquire(1).await;
        let room = self.room().await?;
        // It may have been held longer meanwhile.
        let is_due = self.due_of(vdi).contains(&number);
        if !is_due || vdi.deleted.get() {
            return Ok(());
        }
        let ended = self.append_end(room, vdi, number, true);
        drop(one);
        self.complete_record(ended).await
    }
}

/// When a hold is to end that may replace another one: not before that.
fn no_shorter(
    name: &str,
    snapshot: &Snapshot,
    until: Option<Until>,
) -> Result<Option<Until>, Error> {
    let Some(hold) = snapshot.hold.get() else { return Ok(until) };
    match (hold.until, until) {
        (_, None) => return Ok(None),
        (Some(now), Some(then)) if then.wall_ns >= now.wall_ns => {
            return Ok(Some(Until { store_ns: then.store_ns.max(now.store_ns), ..then }));
        }
        _ => {}
    }
    let target = snapshot.handle(name);
    let message = format!(
        "{target} is held{} already; to hold it for less, release it first: parallax release {target}",
        shown_until(snapshot)
    );
    Err(Error::refused(ErrorKind::Invalid, message))
}

/// ` until …`, of what is held until some time.
fn shown_until(snapshot: &Snapshot) -> String {
    let until = snapshot.hold.get().and_then(|hold| hold.until);
    let time = until.and_then(|until| jiff::Timestamp::from_nanosecond(until.wall_ns.into()).ok());
    time.map_or_else(String::new, |time| format!(" until {time:.0}"))
}
