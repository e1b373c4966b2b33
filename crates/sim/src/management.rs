//! Changes of VDIs and snapshots, and questions about them.
//!
//! Whoever changes the name, the size, the contents as a whole or the existence of a VDI holds it
//! alone; snapshots and clones of it are taken by many at once. So of what a crash leaves open,
//! each thing happened or not by itself. When a request ends without a certain answer, the hold is
//! kept until the store is opened again.

use std::rc::Rc;

use base::{BLOCK_SIZE_U64, ErrorKind, SnapshotNumber};
use vdi::{Error, SnapshotEntry, Target};

use crate::compare;
use crate::holds;
use crate::model::ops::{Outcome, Serial};
use crate::model::{Contents, Place, VdiRef};
use crate::moments;
use crate::plan::ManagementKind;
use crate::random::{Random, to_u64};
use crate::receive;
use crate::requests;
use crate::scrub;
use crate::series;
use crate::session::{Reach, Session};
use crate::starts;
use crate::times;
use crate::world::{Pending, Source};

/// Most VDIs that a run has at a time.
pub const VDIS_MAX: usize = 8;

/// Most snapshots of one VDI.
pub const SNAPSHOTS_MAX: usize = 8;

/// Makes one change or asks one question.
pub async fn make(session: Rc<Session>, kind: ManagementKind, mut random: Random) {
    let world = Rc::clone(&session.world);
    let number = world.number();
    world.trace.event([30, number, 0, 0], || format!("manage  #{number} {kind:?}"));
    let random = &mut random;
    match kind {
        ManagementKind::Create => create(&session, random).await,
        ManagementKind::Snapshot => snapshot(&session, random).await,
        ManagementKind::Series => series::take(&session, random).await,
        ManagementKind::CloneSnapshot => clone_snapshot(&session, random).await,
        ManagementKind::CloneHead => clone_head(&session, random).await,
        ManagementKind::Rollback => rollback(&session, random).await,
        ManagementKind::Rename => rename(&session, random).await,
        ManagementKind::Resize => resize(&session, random).await,
        ManagementKind::Remove => remove(&session, random).await,
        ManagementKind::RemoveSnapshot => remove_snapshot(&session, random).await,
        ManagementKind::Checkpoint => checkpoint(&session).await,
        ManagementKind::CollectGarbage => collect_garbage(&session).await,
        ManagementKind::Scrub => scrub::scrub(&session, random).await,
        ManagementKind::CheckOnline => scrub::check(&session, random).await,
        ManagementKind::List => list(&session).await,
        ManagementKind::Describe => describe(&session, random).await,
        ManagementKind::Diff => compare::diff(&session, random).await,
        ManagementKind::Retain => moments::retain(&session, random).await,
        ManagementKind::RetainByDefault => moments::retain_by_default(&session, random).await,
        ManagementKind::Hold => holds::hold(&session, random).await,
        ManagementKind::Release => holds::release(&session, random).await,
        ManagementKind::ReadMoment => moments::read(&session, random).await,
        ManagementKind::Receive => receive::receive(&session, random).await,
        ManagementKind::LookUp => times::look_up(&session, random).await,
        ManagementKind::CloneAtTime => times::clone(&session, random).await,
        ManagementKind::RollbackToTime => times::rollback(&session, random).await,
        ManagementKind::CloneAtWrite => starts::clone(&session, random).await,
        ManagementKind::RollbackToWrite => starts::rollback(&session, random).await,
        ManagementKind::DiffMoments => compare::diff_moments(&session, random).await,
        ManagementKind::LeapClock => times::leap(&session, random),
    }
    world.progressed();
    world.trace.event([31, number, 0, 0], || format!("manage  #{number} ended"));
}

/// A random VDI.
#[must_use]
pub fn pick(session: &Session, random: &mut Random) -> Option<VdiRef> {
    let live: Vec<VdiRef> = session.world.model.borrow().live().collect();
    random.pick(&live)
}

/// Creates a VDI.
pub async fn create(session: &Session, random: &mut Random) {
    let world = &session.world;
    if world.model.borrow().live().count() >= VDIS_MAX {
        return;
    }
    let name = new_name(session, random);
    let block_count = draw_size(session, random);
    // Sizes are rounded up to whole blocks.
    let size = block_count * BLOCK_SIZE_U64 - random.below(2) * random.below(BLOCK_SIZE_U64);
    let empty = world.model.borrow().empty();
    let source = Source::Fixed(empty);
    let number = world.ask(Pending::Create { name: name.clone(), block_count, source });
    let answer = session.store.create(&name, size).await;
    created(session, number, &format!("create {name}"), answer);
}

/// A VDI was created or cloned, or not.
pub fn created(
    session: &Session,
    number: u64,
    what: &str,
    answer: Result<base::VdiId, Error>,
) -> Option<VdiRef> {
    let world = &session.world;
    let id = certain(session, number, what, answer)?;
    let Some(Pending::Create { name, block_count, source }) = world.answered(number) else {
        return None;
    };
    Some(add_vdi(session, &name, id.get(), block_count, source))
}

/// A VDI exists that did not.
pub fn add_vdi(session: &Session, name: &str, id: u64, block_count: u64, source: Source) -> VdiRef {
    let world = &session.world;
    if !world.ids.borrow_mut().insert(id) {
        world.fail(format!("VDI {name} has the id {id}, which another one had before"));
    }
    let mut model = world.model.borrow_mut();
    let contents = match source {
        Source::Fixed(contents) => contents,
        Source::Running(vdi, asked) => {
            let contents = model.contents_since(vdi, asked);
            model.answered(asked);
            contents
        }
    };
    let vdi = model.add(name, id, block_count, contents);
    world.trace.note(|| format!("         VDI {} is '{name}', id {id}", vdi.0));
    vdi
}

/// Judges the answer to a request for a change: its value, if it happened. If it is not certain
/// whether it did, the request stays pending.
pub fn certain<T>(
    session: &Session,
    number: u64,
    what: &str,
    answer: Result<T, Error>,
) -> Option<T> {
    match answer {
        Ok(value) => Some(value),
        Err(error) => {
            session.world.trace.note(|| format!("         {what}: {error}"));
            if leaves_it_open(error.kind()) {
                session.world.unanswered(number);
            } else {
                give_up(session, number);
            }
            session.excuse(what, error.kind(), &error, Reach::Metadata);
            None
        }
    }
}

/// Whether it is not certain what became of a request that failed so.
#[must_use]
pub fn leaves_it_open(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Io | ErrorKind::Corrupt | ErrorKind::Fenced)
}

/// Whether a snapshot of a VDI without a label is asked for, or several are.
#[must_use]
pub fn unlabelled_is_pending(session: &Session, vdi: VdiRef) -> bool {
    session
        .world
        .is_pending(|p| matches!(p, Pending::Snapshot { vdi: v, label: None, .. } if *v == vdi))
}

/// What was asked for did not happen.
pub fn forget(session: &Session, pending: &Pending) {
    let mut model = session.world.model.borrow_mut();
    match pending {
        Pending::Create { source: Source::Running(_, asked), .. }
        | Pending::Snapshot { source: Source::Running(_, asked), .. } => model.answered(*asked),
        Pending::Rollback(_, _, serial) | Pending::Resize(_, _, Some(serial)) => {
            model.end(*serial, Outcome::Failed, false);
        }
        Pending::Receive(receive) => {
            model.end(receive.serial, Outcome::Failed, false);
            model.decide(receive.vdi, receive.serial, false);
        }
        _ => {}
    }
}

/// Something that was asked for did not happen.
pub fn give_up(session: &Session, number: u64) {
    if let Some(pending) = session.world.answered(number) {
        forget(session, &pending);
    }
}

async fn snapshot(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if world.model.borrow().vdi(vdi).snapshots.len() >= SNAPSHOTS_MAX || !world.hold(vdi, false) {
        return;
    }
    let label = (random.chance(600) || unlabelled_is_pending(session, vdi))
        .then(|| format!("label-{}", world.number()));
    let Some(snapshot) = take_snapshot(session, vdi, label).await else { return };
    if random.chance(300) {
        // What was on its way when it was taken must not appear in it later.
        settle_snapshot(session, vdi, snapshot).await;
    }
    world.release(vdi);
}

/// Takes a snapshot of a VDI that is held; its number. `None`: it is not certain that there is one,
/// and the VDI is let go of if it is certain that there is none.
async fn take_snapshot(session: &Session, vdi: VdiRef, label: Option<String>) -> Option<u64> {
    let world = &session.world;
    let (name, block_count) = {
        let model = world.model.borrow();
        (model.vdi(vdi).name.clone(), model.vdi(vdi).block_count)
    };
    let asked = world.model.borrow_mut().ask();
    let source = Source::Running(vdi, asked);
    let number = world.ask(Pending::Snapshot { vdi, label: label.clone(), block_count, source });
    let before = world.model.borrow().vdi(vdi).snapshot_numbers.last().copied().unwrap_or(0);
    let answer = session.store.snapshot(&name, label.as_deref()).await;
    let what = format!("snapshot of {name}");
    let Some(snapshot) = certain(session, number, &what, answer) else {
        release_if_certain(session, vdi, number);
        return None;
    };
    let Some(Pending::Snapshot { source, .. }) = world.answered(number) else { return None };
    if snapshot.get() <= before {
        world.fail(format!("{what} has the number {snapshot}, but there was {before} before"));
    }
    add_snapshot(session, vdi, snapshot.get(), label, block_count, source);
    Some(snapshot.get())
}

/// A snapshot exists that did not.
pub fn add_snapshot(
    session: &Session,
    vdi: VdiRef,
    number: u64,
    label: Option<String>,
    block_count: u64,
    source: Source,
) {
    let world = &session.world;
    let mut model = world.model.borrow_mut();
    let contents = match source {
        Source::Fixed(contents) => contents,
        Source::Running(vdi, asked) => {
            let contents = model.contents_since(vdi, asked);
            model.answered(asked);
            contents
        }
    };
    if contents.blocks.iter().any(|block| !block.is_settled()) {
        world.probe("snapshot: with requests under way");
    }
    model.add_snapshot(vdi, number, label, block_count, contents);
}

/// Lets go of a VDI, unless it is not certain what became of a request.
pub fn release_if_certain(session: &Session, vdi: VdiRef, number: u64) {
    if !session.world.pending.borrow().contains_key(&number) {
        session.world.release(vdi);
    }
}

async fn clone_snapshot(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some((vdi, snapshot)) = pick_snapshot(session, random) else { return };
    if world.model.borrow().live().count() >= VDIS_MAX || !world.hold(vdi, false) {
        return;
    }
    let target = session.target(Place::Snapshot(vdi, snapshot));
    let name = new_name(session, random);
    let (block_count, blocks) = {
        let model = world.model.borrow();
        let block_count = model.vdi(vdi).snapshots.get(&snapshot).map(|s| s.block_count);
        (block_count, model.contents_of(vdi, snapshot))
    };
    if let (Some(block_count), Some(blocks)) = (block_count, blocks) {
        let source = Source::Fixed(blocks);
        let number = world.ask(Pending::Create { name: name.clone(), block_count, source });
        let answer = session.store.clone_vdi(&target, &name).await;
        created(session, number, &format!("clone {target} as {name}"), answer);
        world.probe("clone: of a snapshot");
    }
    world.release(vdi);
}

async fn clone_head(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if world.model.borrow().live().count() >= VDIS_MAX || !world.hold(vdi, false) {
        return;
    }
    let target = session.target(Place::Head(vdi));
    let name = new_name(session, random);
    let block_count = world.model.borrow().vdi(vdi).block_count;
    let asked = world.model.borrow_mut().ask();
    let source = Source::Running(vdi, asked);
    let number = world.ask(Pending::Create { name: name.clone(), block_count, source });
    let answer = session.store.clone_vdi(&target, &name).await;
    created(session, number, &format!("clone {target} as {name}"), answer);
    world.probe("clone: of a running VDI");
    world.release(vdi);
}

async fn rollback(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some((vdi, snapshot)) = pick_snapshot(session, random) else { return };
    if !world.hold(vdi, false) {
        return;
    }
    let settled = settle_snapshot(session, vdi, snapshot).await;
    world.release(vdi);
    if !settled || !world.hold(vdi, true) {
        return;
    }
    let found = {
        let model = world.model.borrow();
        let size = model.vdi(vdi).snapshots.get(&snapshot).map(|s| s.block_count);
        size.zip(model.contents_of(vdi, snapshot))
    };
    let Some((block_count, contents)) = found else {
        world.release(vdi);
        return;
    };
    let target = session.target(Place::Snapshot(vdi, snapshot));
    let serial = begin_rollback(session, vdi, &contents);
    let number = world.ask(Pending::Rollback(vdi, block_count, serial));
    let label = target.snapshot.clone().unwrap_or_default();
    let answer = session.store.rollback(&target.vdi, &label).await;
    rolled_back(session, number, &target, answer);
}

/// A VDI that is held alone is about to become what it was: the change of its blocks.
pub fn begin_rollback(session: &Session, vdi: VdiRef, contents: &Contents) -> Serial {
    let mut model = session.world.model.borrow_mut();
    model.vdi_mut(vdi).severed += 1;
    model.begin_replace(vdi, "rollback", contents)
}

/// A VDI was rolled back, or not; lets it go, if that is certain.
pub fn rolled_back(session: &Session, number: u64, target: &Target, answer: Result<(), Error>) {
    let world = &session.world;
    let pending = world.pending.borrow().get(&number).cloned();
    let Some(Pending::Rollback(vdi, block_count, serial)) = pending else { return };
    if certain(session, number, &format!("rollback to {target}"), answer).is_some() {
        world.answered(number);
        let mut model = world.model.borrow_mut();
        model.end(serial, Outcome::Acked, true);
        model.vdi_mut(vdi).block_count = block_count;
        drop(model);
        session.check_severed(vdi);
        world.probe("rollback");
    }
    release_if_certain(session, vdi, number);
}

/// Reads what is not certain yet of a snapshot. `false`: it could not be read.
pub async fn settle_snapshot(session: &Session, vdi: VdiRef, snapshot: u64) -> bool {
    let world = &session.world;
    let place = Place::Snapshot(vdi, snapshot);
    if world.model.borrow().is_settled(vdi, snapshot) {
        return true;
    }
    let size = world.model.borrow().vdi(vdi).snapshots.get(&snapshot).map(|s| s.block_count);
    let Some(block_count) = size else { return false };
    let Some(blocks) = requests::read_all(session, place, block_count).await else { return false };
    for (slot, bytes) in blocks {
        let mut model = world.model.borrow_mut();
        let asked = model.begin_read();
        let offset = world.plan.layout.lba(slot) * BLOCK_SIZE_U64;
        let _ = world.check(model.end_read(place, asked, offset, &bytes));
    }
    world.model.borrow().is_settled(vdi, snapshot)
}

async fn rename(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if !world.hold(vdi, true) {
        return;
    }
    let old = world.model.borrow().vdi(vdi).name.clone();
    let taken = random.chance(100).then(|| pick(session, random)).flatten();
    if let Some(other) = taken.filter(|&other| other != vdi && world.hold(other, false)) {
        let name = world.model.borrow().vdi(other).name.clone();
        let answer = session.store.rename(&old, &name).await;
        refused(session, &format!("rename {old} {name}"), ErrorKind::Exists, answer);
        world.release(other);
        world.release(vdi);
        return;
    }
    let name = new_name(session, random);
    let number = world.ask(Pending::Rename(vdi, name.clone()));
    let answer = session.store.rename(&old, &name).await;
    if certain(session, number, &format!("rename {old} {name}"), answer).is_some() {
        world.answered(number);
        world.model.borrow_mut().vdi_mut(vdi).name = name;
    }
    release_if_certain(session, vdi, number);
}

/// A request that must be refused was answered.
pub fn refused<T>(session: &Session, what: &str, kind: ErrorKind, answer: Result<T, Error>) {
    match answer {
        Err(error) if error.kind() == kind => {}
        Err(error) => session.excuse(what, error.kind(), &error, Reach::Metadata),
        Ok(_) => session.world.fail(format!("{what} must be refused with {kind:?}")),
    }
}

async fn resize(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if !world.hold(vdi, true) {
        return;
    }
    let block_count = draw_size(session, random);
    let (number, _) = resize_to(session, vdi, block_count).await;
    release_if_certain(session, vdi, number);
}

/// Changes the size of a VDI that is held alone; the number of the request, and whether it happened
/// for certain.
pub async fn resize_to(session: &Session, vdi: VdiRef, block_count: u64) -> (u64, bool) {
    let world = &session.world;
    let target = session.target(Place::Head(vdi));
    let serial = {
        let mut model = world.model.borrow_mut();
        let shrinks = block_count < model.vdi(vdi).block_count;
        model.vdi_mut(vdi).severed += u64::from(shrinks);
        shrinks.then(|| model.begin_shrink(vdi, block_count))
    };
    let number = world.ask(Pending::Resize(vdi, block_count, serial));
    let answer = session.store.resize(&target.vdi, block_count * BLOCK_SIZE_U64).await;
    let what = format!("resize {target} to {block_count} blocks");
    let happened = certain(session, number, &what, answer).is_some();
    if happened {
        world.answered(number);
        let mut model = world.model.borrow_mut();
        model.vdi_mut(vdi).block_count = block_count;
        if let Some(serial) = serial {
            model.end(serial, Outcome::Acked, true);
            drop(model);
            session.check_severed(vdi);
        }
        world.probe(if serial.is_some() { "resize: shrink" } else { "resize: grow" });
    }
    (number, happened)
}

async fn remove(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if !world.hold(vdi, true) {
        return;
    }
    let target = session.target(Place::Head(vdi));
    world.model.borrow_mut().vdi_mut(vdi).severed += 1;
    let number = world.ask(Pending::Remove(vdi));
    let answer = session.store.remove(&target).await;
    let Some(answer) = holds::judge_removal(session, vdi, None, answer) else {
        // Nobody was disconnected for that.
        world.model.borrow_mut().vdi_mut(vdi).severed -= 1;
        world.answered(number);
        world.release(vdi);
        return;
    };
    if certain(session, number, &format!("rm {target}"), answer).is_some() {
        world.answered(number);
        world.model.borrow_mut().vdi_mut(vdi).deleted = true;
        session.check_severed(vdi);
        world.probe("remove: busy VDI");
    }
    release_if_certain(session, vdi, number);
}

async fn remove_snapshot(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some((vdi, snapshot)) = pick_snapshot(session, random) else { return };
    if !world.hold(vdi, true) {
        return;
    }
    let target = session.target(Place::Snapshot(vdi, snapshot));
    let number = world.ask(Pending::RemoveSnapshot(vdi, snapshot));
    let answer = session.store.remove(&target).await;
    let Some(answer) = holds::judge_removal(session, vdi, Some(snapshot), answer) else {
        world.answered(number);
        world.release(vdi);
        return;
    };
    if certain(session, number, &format!("rm {target}"), answer).is_some() {
        world.answered(number);
        world.model.borrow_mut().vdi_mut(vdi).snapshots.remove(&snapshot);
    }
    release_if_certain(session, vdi, number);
}

async fn checkpoint(session: &Session) {
    if let Err(error) = session.store.checkpoint().await {
        session.excuse("checkpoint", error.kind(), &error, Reach::Metadata);
    }
}

async fn collect_garbage(session: &Session) {
    match session.store.collect_garbage().await {
        Ok(report) if report.freed_blocks > 0 => session.world.probe("gc: freed"),
        Ok(_) => {}
        Err(error) => session.excuse("collect garbage", error.kind(), &error, Reach::Metadata),
    }
}

/// Compares the listing with the model, if nothing changed meanwhile.
async fn list(session: &Session) {
    let world = &session.world;
    let version = |world: &crate::world::World| {
        (!world
            .is_pending(|p| !matches!(p, Pending::Snapshot { .. } | Pending::RemoveSnapshot(..))))
        .then(|| world.model.borrow().catalog_version())
    };
    let before = version(world);
    let Some(entries) = list_all(session, 3).await else { return };
    if before.is_none() || version(world) != before {
        return;
    }
    let model = world.model.borrow();
    let mut expected: Vec<(String, Option<u64>, u64)> = model
        .live()
        .map(|vdi| {
            let vdi = model.vdi(vdi);
            (vdi.name.clone(), vdi.id, vdi.block_count * BLOCK_SIZE_U64)
        })
        .collect();
    expected.sort();
    let listed: Vec<(String, Option<u64>, u64)> = entries
        .into_iter()
        .map(|entry| (entry.name, Some(entry.id.get()), entry.size_bytes))
        .collect();
    if listed != expected {
        world.fail(format!("the list is {listed:?}, but there are {expected:?}"));
    }
}

/// Lists all VDIs, some at a time.
pub async fn list_all(session: &Session, page: usize) -> Option<Vec<vdi::VdiEntry>> {
    let mut entries: Vec<vdi::VdiEntry> = Vec::new();
    loop {
        let after = entries.last().map(|entry| entry.name.clone());
        match session.store.list(after.as_deref(), page).await {
            Ok(more) if more.is_empty() => {
                // What a crash left of filling the store is no business of the model.
                entries.retain(|entry| entry.name != crate::client::FILL_NAME);
                return Some(entries);
            }
            Ok(more) => {
                let sorted = more.iter().all(|entry| Some(&entry.name) > after.as_ref());
                if more.len() > page || !sorted {
                    session.world.fail(format!("list after {after:?}: {more:?}"));
                    return None;
                }
                entries.extend(more);
            }
            Err(error) => {
                session.excuse("list", error.kind(), &error, Reach::Metadata);
                return None;
            }
        }
    }
}

/// Asks for everything that describes a VDI, and compares it.
async fn describe(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if !world.hold(vdi, false) {
        return;
    }
    let name = world.model.borrow().vdi(vdi).name.clone();
    match session.store.info(&name).await {
        Ok(entry) => {
            let model = world.model.borrow();
            let known = model.vdi(vdi);
            let size = known.block_count * BLOCK_SIZE_U64;
            let busy =
                world.is_pending(|p| matches!(p, Pending::Snapshot { vdi: v, .. } if *v == vdi));
            if entry.name != name
                || Some(entry.id.get()) != known.id
                || entry.size_bytes != size
                || !busy && entry.snapshot_count != to_u64(known.snapshots.len())
            {
                world.fail(format!("info {name}: {entry:?}, but the model has {size} bytes"));
            }
        }
        Err(error) => session.excuse("info", error.kind(), &error, Reach::Metadata),
    }
    match session.store.space(&Target { vdi: name, snapshot: None }).await {
        Ok(space) if space.exclusive_bytes + space.shared_bytes != space.mapped_bytes => {
            world.fail(format!("space does not add up: {space:?}"));
        }
        Ok(_) => {}
        Err(error) => session.excuse("space", error.kind(), &error, Reach::Metadata),
    }
    world.release(vdi);
}

/// All snapshots of a VDI, moments too, listed some at a time. `None`: that failed.
pub async fn list_snapshots(session: &Session, name: &str) -> Option<Vec<SnapshotEntry>> {
    let mut listed: Vec<SnapshotEntry> = Vec::new();
    loop {
        let after = listed.last().map_or(SnapshotNumber::new(0), |snapshot| snapshot.number);
        match session.store.snapshots(name, after, 3).await {
            Ok(more) if more.is_empty() => return Some(listed),
            Ok(more) => listed.extend(more),
            Err(error) => {
                session.excuse("snapshots", error.kind(), &error, Reach::Metadata);
                return None;
            }
        }
        if !listed.is_sorted_by(|one, other| one.number < other.number) {
            session.world.fail(format!("snapshots of {name} are not in order: {listed:?}"));
            return None;
        }
    }
}

/// A random snapshot.
pub fn pick_snapshot(session: &Session, random: &mut Random) -> Option<(VdiRef, u64)> {
    let model = session.world.model.borrow();
    let all: Vec<(VdiRef, u64)> = model
        .live()
        .flat_map(|vdi| model.vdi(vdi).snapshots.keys().map(move |&number| (vdi, number)))
        .collect();
    random.pick(&all)
}

/// A name that no VDI has; often one that another VDI had before.
pub fn new_name(session: &Session, random: &mut Random) -> String {
    let world = &session.world;
    let name = format!("vdi-{}", random.below(12));
    let taken = world.model.borrow().by_name(&name).is_some()
        || world.is_pending(|pending| match pending {
            Pending::Create { name: other, .. } | Pending::Rename(_, other) => *other == name,
            Pending::Receive(receive) => receive.name == name,
            _ => false,
        });
    if taken { format!("vdi-{}", 100 + world.number()) } else { name }
}

fn draw_size(session: &Session, random: &mut Random) -> u64 {
    let layout = &session.world.plan.layout;
    let windows = 1 + random.index(layout.windows().len());
    let blocks = layout.blocks_for(windows);
    match random.below(4) {
        0 => random.between(1, blocks),
        1 => blocks + random.magnitude(1_000),
        _ => blocks,
    }
}
