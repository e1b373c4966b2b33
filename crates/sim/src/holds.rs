//! Snapshots and moments that are held: they are there, and cannot be deleted, for as long as they must
//! be, whatever crashes and whatever the wall clock says. Afterwards they may be.

use std::collections::BTreeMap;

use base::{ErrorKind, SnapshotNumber};
use runtime::{Clock, Time};
use vdi::{Error, SnapshotEntry, Store};

use crate::management::{certain, pick, pick_snapshot, release_if_certain};
use crate::model::{Place, VdiRef};
use crate::random::Random;
use crate::session::Session;
use crate::verify::lied;
use crate::world::{Pending, World};

/// What is held, by VDI and number, and until when it must be; it may be for longer.
pub type Held = BTreeMap<(VdiRef, u64), Time>;

/// Held until somebody ends it.
const FOR_EVER: Time = Time(u64::MAX);

/// How long something is held, in seconds; runs last some.
const SECONDS: [u64; 5] = [1, 2, 5, 20, 100_000];

const YEAR_NS: i64 = 31_556_952_000_000_000;

/// Holds a snapshot or a moment; then the wall clock may leap.
pub async fn hold(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some((vdi, number)) = pick_any(session, random).await else { return };
    if !world.hold(vdi, true) {
        return;
    }
    let seconds = random.pick(&SECONDS).filter(|_| random.chance(700));
    let until = seconds.map_or(FOR_EVER, |seconds| {
        Time(world.clock.now().0.saturating_add(seconds * 1_000_000_000))
    });
    let name = world.name_of(Place::Head(vdi));
    let key = (vdi, number);
    let request = world.ask(Pending::Hold(vdi, number, until));
    let text = seconds.map(|seconds| format!("{seconds}s"));
    let answer = session.store.hold(&name, &number.to_string(), text.as_deref()).await;
    let what = format!("hold {name}@{number} {text:?}");
    let was_held = world.held.borrow().contains_key(&key);
    match answer {
        // It is held for longer already.
        Err(error) if error.kind() == ErrorKind::Invalid && was_held => {
            world.answered(request);
        }
        // A moment's time had come.
        Err(error) if error.kind() == ErrorKind::NotFound && !must_be_there(world, key) => {
            world.answered(request);
        }
        answer => {
            if certain(session, request, &what, answer).is_some() {
                world.answered(request);
                let mut held = world.held.borrow_mut();
                let end = held.entry(key).or_insert(until);
                *end = until.max(*end);
                world.probe("hold: held");
            }
        }
    }
    release_if_certain(session, vdi, request);
    if random.chance(300) {
        let years = i64::try_from(random.between(1, 3)).unwrap_or(1);
        world.clock.jump_wall(if random.chance(700) { years * YEAR_NS } else { -years * YEAR_NS });
        world.probe("hold: the wall clock leapt");
    }
}

/// Ends the hold of something.
pub async fn release(session: &Session, random: &mut Random) {
    let world = &session.world;
    let held: Vec<(VdiRef, u64)> = world.held.borrow().keys().copied().collect();
    let Some((vdi, number)) = random.pick(&held) else { return };
    if !world.hold(vdi, true) {
        return;
    }
    let name = world.name_of(Place::Head(vdi));
    let request = world.ask(Pending::EndHold(vdi, number));
    let answer = session.store.release_hold(&name, &number.to_string()).await;
    match answer {
        // It has ended by itself, and a moment may be gone since.
        Err(error)
            if matches!(error.kind(), ErrorKind::Invalid | ErrorKind::NotFound)
                && !is_held(world, (vdi, number)) =>
        {
            world.answered(request);
        }
        answer => {
            if certain(session, request, &format!("release {name}@{number}"), answer).is_some() {
                world.answered(request);
                world.held.borrow_mut().remove(&(vdi, number));
                world.probe("hold: released");
            }
        }
    }
    release_if_certain(session, vdi, request);
}

/// A snapshot, or a moment that is there now.
async fn pick_any(session: &Session, random: &mut Random) -> Option<(VdiRef, u64)> {
    if random.chance(500) {
        return pick_snapshot(session, random);
    }
    let vdi = pick(session, random)?;
    let name = session.world.name_of(Place::Head(vdi));
    let id = session.world.model.borrow().vdi(vdi).id;
    let listed = session.store.snapshots(&name, SnapshotNumber::new(0), usize::MAX).await.ok()?;
    // It may be another one of that name by now.
    let info = session.store.info(&name).await.ok()?;
    let kept = listed.into_iter().filter(|entry| entry.changed_bytes.is_some());
    let kept: Vec<u64> = kept.map(|entry| entry.number.get()).collect();
    let number = random.pick(&kept).filter(|_| Some(info.id.get()) == id)?;
    Some((vdi, number))
}

/// Whether something must be held now.
pub fn is_held(world: &World, key: (VdiRef, u64)) -> bool {
    world.held.borrow().get(&key).is_some_and(|&until| world.clock.now() < until)
}

/// Whether a snapshot is one that somebody asked for, or must be held.
fn must_be_there(world: &World, key: (VdiRef, u64)) -> bool {
    let model = world.model.borrow();
    model.vdi(key.0).snapshots.contains_key(&key.1) || is_held(world, key)
}

/// Judges the answer to a request to delete a VDI or a snapshot. `None`: it was refused, as something
/// is held; and that is so.
pub fn judge_removal(
    session: &Session,
    vdi: VdiRef,
    number: Option<u64>,
    answer: Result<(), Error>,
) -> Option<Result<(), Error>> {
    let world = &session.world;
    let concerned: Vec<(VdiRef, u64)> = {
        let held = world.held.borrow();
        let concerns = |key: &&(VdiRef, u64)| key.0 == vdi && number.is_none_or(|it| it == key.1);
        held.keys().filter(concerns).copied().collect()
    };
    let must_stay = concerned.iter().find(|&&key| is_held(world, key));
    match answer {
        Err(error) if error.kind() == ErrorKind::Busy => {
            if concerned.is_empty() {
                world.fail(format!("nothing of {vdi:?} {number:?} is held, but {error}"));
            }
            world.probe("hold: deletion refused");
            None
        }
        Ok(()) if must_stay.is_some() => {
            world.fail(format!("{must_stay:?} was deleted, and it was held"));
            None
        }
        answer => {
            if answer.is_ok() {
                world.held.borrow_mut().retain(|key, _| !concerned.contains(key));
            }
            Some(answer)
        }
    }
}

/// Compares what is held of a VDI with what is listed of it after the store was opened, and decides what
/// nobody heard of.
pub fn reconcile(session: &Session, vdi: VdiRef, listed: &[SnapshotEntry]) {
    let world = &session.world;
    decide(world, vdi, listed);
    let is_listed = |number: u64| {
        listed.iter().any(|entry| entry.number.get() == number && entry.hold.is_some())
    };
    let known: Vec<(VdiRef, u64)> = {
        let held = world.held.borrow();
        held.keys().filter(|key| key.0 == vdi).copied().collect()
    };
    for key in known.into_iter().filter(|key| !is_listed(key.1)) {
        if is_held(world, key) && !lied(session) {
            world.fail(format!("{key:?} must be held, and is not"));
        }
        world.held.borrow_mut().remove(&key);
    }
    for entry in listed.iter().filter(|entry| entry.hold.is_some()) {
        let key = (vdi, entry.number.get());
        if !world.held.borrow().contains_key(&key) {
            world.fail(format!("{key:?} is held, and nobody has held it"));
        }
    }
}

fn decide(world: &World, vdi: VdiRef, listed: &[SnapshotEntry]) {
    let pending: Vec<(u64, Pending)> = {
        let pending = world.pending.borrow();
        pending.iter().map(|(&request, pending)| (request, pending.clone())).collect()
    };
    for (request, pending) in pending {
        let (number, until) = match pending {
            Pending::Hold(of, number, until) if of == vdi => (number, Some(until)),
            Pending::EndHold(of, number) if of == vdi => (number, None),
            _ => continue,
        };
        world.answered(request);
        world.probe("hold: undecided at a crash");
        let entry = listed.iter().find(|entry| entry.number.get() == number);
        let is_held = entry.is_some_and(|entry| entry.hold.is_some());
        let mut held = world.held.borrow_mut();
        match until {
            // Until the earlier of the two, if it was held before.
            Some(until) if is_held => {
                let end = held.entry((vdi, number)).or_insert(until);
                *end = until.min(*end);
            }
            None if !is_held => {
                held.remove(&(vdi, number));
            }
            _ => {}
        }
    }
}

/// Ends all holds.
///
/// # Errors
/// If the store has failed.
pub async fn end_all(store: &Store) -> Result<(), Error> {
    for vdi in store.list(None, usize::MAX).await? {
        let listed = match store.snapshots(&vdi.name, SnapshotNumber::new(0), usize::MAX).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => continue,
            listed => listed?,
        };
        for entry in listed.into_iter().filter(|entry| entry.hold.is_some()) {
            match store.release_hold(&vdi.name, &entry.number.to_string()).await {
                // It has ended by itself.
                Err(error) if matches!(error.kind(), ErrorKind::Invalid | ErrorKind::NotFound) => {}
                released => drop(released?),
            }
        }
    }
    Ok(())
}
