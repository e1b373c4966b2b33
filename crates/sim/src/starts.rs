//! Clones and rollbacks that start at a write. What the VDI was after it is read first; the clone, or what the
//! VDI is then, must hold the same, whatever happens to the moment that keeps it. Whoever reads it has it
//! open: it stays, unless somebody compares or holds the moment.

use base::{ErrorKind, SnapshotNumber};
use vdi::{Error, Target};

use crate::management::{
    VDIS_MAX, begin_rollback, created, give_up, new_name, pick, release_if_certain, rolled_back,
};
use crate::model::{Contents, Place, VdiRef};
use crate::random::Random;
use crate::session::Session;
use crate::times::{Opened, open_target};
use crate::world::{Pending, Source};

/// A VDI as it was after a write.
struct AtWrite {
    opened: Opened,
    contents: Contents,
}

/// Makes a VDI of what another one was after a write.
pub async fn clone(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if world.model.borrow().live().count() >= VDIS_MAX || !world.hold(vdi, false) {
        return;
    }
    if let Some(AtWrite { opened, contents }) = at_write(session, vdi, random).await {
        let name = new_name(session, random);
        let (block_count, source) = (opened.block_count, Source::Fixed(contents));
        let number = world.ask(Pending::Create { name: name.clone(), block_count, source });
        let answer = session.store.clone_vdi(&opened.target, &name).await;
        if is_forgotten(session, &opened, &answer).await {
            give_up(session, number);
        } else {
            let what = format!("clone {} as {name}", opened.target);
            if created(session, number, &what, answer).is_some() {
                world.probe("clone: of a write");
            }
        }
    }
    world.release(vdi);
}

/// Makes a VDI what it was after a write.
pub async fn rollback(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if !world.hold(vdi, true) {
        return;
    }
    let Some(AtWrite { opened, contents }) = at_write(session, vdi, random).await else {
        world.release(vdi);
        return;
    };
    let serial = begin_rollback(session, vdi, &contents);
    let number = world.ask(Pending::Rollback(vdi, opened.block_count, serial));
    let label = opened.target.snapshot.clone().unwrap_or_default();
    let answer = session.store.rollback(&opened.target.vdi, &label).await;
    if is_forgotten(session, &opened, &answer).await {
        give_up(session, number);
        release_if_certain(session, vdi, number);
        return;
    }
    if answer.is_ok() {
        world.probe("rollback: to a write");
    }
    rolled_back(session, number, &opened.target, answer);
}

/// Opens a write that one of the latest moments of a VDI keeps, and reads all of it.
async fn at_write(session: &Session, vdi: VdiRef, random: &mut Random) -> Option<AtWrite> {
    let world = &session.world;
    let name = world.name_of(Place::Head(vdi));
    let listed = session.store.snapshots(&name, SnapshotNumber::new(0), usize::MAX).await.ok()?;
    let kept = listed.iter().filter(|entry| entry.changed_bytes.is_some());
    let numbers: Vec<u64> = kept.map(|entry| entry.number.get()).collect();
    // Most of the older ones have forgotten their writes.
    let recent = numbers.get(numbers.len().saturating_sub(8)..)?;
    let number = random.pick(recent)?.to_string();
    let all = session.store.writes(&name, &number).await.ok()?;
    // Or at what comes before it.
    let lsn = random.pick(&all)?.lsn.get() - random.below(2);
    let target = Target { vdi: name, snapshot: Some(format!("lsn:{lsn}")) };
    let opened = open_target(session, target, true).await?;
    let empty = world.model.borrow().empty();
    let contents = Contents::seen(empty, &world.plan.layout, &opened.blocks)?;
    world.trace.note(|| format!("         starts at {}", opened.target));
    Some(AtWrite { opened, contents })
}

/// Whether a write was refused because somebody wanted a tree of its moment: then the next checkpoint has taken
/// it from who has it open, too.
async fn is_forgotten<T>(session: &Session, opened: &Opened, answer: &Result<T, Error>) -> bool {
    let Err(error) = answer else { return false };
    if error.kind() != ErrorKind::NotFound {
        return false;
    }
    if session.store.checkpoint().await.is_ok() && !opened.disk.severed() {
        session.world.fail(format!("{}: {error}, but it is open", opened.target));
    }
    true
}
