//! Snapshots that are received: what differs is applied to a disk of its own, the *partial* one, which
//! then becomes the next snapshot of a disk, or a new one.
//!
//! - The partial disk is a disk like any other, held alone until it is whole. What is written to it is
//!   what the diff says, so a diff that leaves something out shows.
//! - When it is whole, all of it happens or nothing, also in a crash: name, size, contents and snapshot,
//!   and that the partial disk goes.
//! - It is refused if the stream builds on another snapshot than the newest, or the disk was written
//!   since.

use std::rc::Rc;

use base::{BLOCK_SIZE, BLOCK_SIZE_U64, ErrorKind, SnapshotNumber, SnapshotUuid};
use disk::{Disk, DiskError, Request};
use vdi::{Error, Received, Target, VdiEntry};

use crate::compare::diff_in_parts;
use crate::management::{
    SNAPSHOTS_MAX, VDIS_MAX, add_snapshot, certain, created, list_snapshots, new_name,
    pick_snapshot, release_if_certain, resize_to, settle_snapshot,
};
use crate::model::ops::{Moment, Outcome};
use crate::model::{Change, Contents, Place, VdiRef};
use crate::random::{Random, to_usize};
use crate::requests::read_blocks;
use crate::session::{Reach, Session};
use crate::world::{Pending, Receive, Source};

/// Blocks that are copied at a time.
const COPIED_BLOCKS: u64 = 16;

/// A snapshot that is sent, all of which is certain.
struct Sent {
    place: Place,
    target: Target,
    block_count: u64,
    contents: Contents,
}

/// A VDI, and a snapshot of it that a stream builds on.
type Base = (VdiRef, u64);

/// Receives a random snapshot, into a new disk or onto one that exists.
pub async fn receive(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(source) = pick_snapshot(session, random) else { return };
    let base = if random.chance(650) { pick_base(session, random) } else { None };
    if world.model.borrow().live().count() >= VDIS_MAX || !world.hold(source.0, false) {
        return;
    }
    let held = base.is_none_or(|(vdi, _)| world.hold(vdi, false));
    let mut ready = None;
    if held && let Some(sent) = send(session, source).await {
        let partial = make_partial(session, &sent, base).await;
        if let Some(partial) = partial {
            match fill_partial(session, partial, &sent, base, random).await {
                true => ready = Some((sent, partial)),
                false => world.release(partial),
            }
        }
    }
    world.release(source.0);
    if let (true, Some((vdi, _))) = (held, base) {
        world.release(vdi);
    }
    let Some((sent, partial)) = ready else { return };
    match base {
        Some((vdi, _)) if !world.hold(vdi, true) => world.release(partial),
        _ => complete(session, partial, sent, base, random).await,
    }
}

/// A random VDI that has room for a snapshot, and its newest one.
fn pick_base(session: &Session, random: &mut Random) -> Option<Base> {
    let (vdi, _) = pick_snapshot(session, random)?;
    let model = session.world.model.borrow();
    let snapshots = &model.vdi(vdi).snapshots;
    let newest = *snapshots.last_key_value()?.0;
    (snapshots.len() < SNAPSHOTS_MAX).then_some((vdi, newest))
}

/// Reads what is not certain yet of a snapshot that is held.
async fn send(session: &Session, (vdi, number): Base) -> Option<Sent> {
    let place = Place::Snapshot(vdi, number);
    if !settle_snapshot(session, vdi, number).await {
        return None;
    }
    let model = session.world.model.borrow();
    let block_count = model.vdi(vdi).snapshots.get(&number)?.block_count;
    let contents = model.contents_of(vdi, number)?;
    drop(model);
    Some(Sent { place, target: session.target(place), block_count, contents })
}

/// Makes the disk that is received into, one block larger than it has to be, and holds it alone.
async fn make_partial(session: &Session, sent: &Sent, base: Option<Base>) -> Option<VdiRef> {
    let world = &session.world;
    let name = format!("part-{}", world.number());
    let from = base.map(|(vdi, number)| {
        let model = world.model.borrow();
        let size = model.vdi(vdi).snapshots.get(&number).map(|snapshot| snapshot.block_count);
        (Place::Snapshot(vdi, number), size, model.contents_of(vdi, number))
    });
    let what = format!("begin to receive into {name}");
    let Some((place, size, contents)) = from else {
        let (block_count, empty) = (sent.block_count + 1, world.model.borrow().empty());
        let source = Source::Fixed(empty);
        let number = world.ask(Pending::Create { name: name.clone(), block_count, source });
        let answer = session.store.create(&name, block_count * BLOCK_SIZE_U64).await;
        let partial = created(session, number, &what, answer)?;
        return world.hold(partial, true).then_some(partial);
    };
    let (block_count, source) = (size?, Source::Fixed(contents?));
    let number = world.ask(Pending::Create { name: name.clone(), block_count, source });
    let answer = session.store.clone_vdi(&session.target(place), &name).await;
    let partial = created(session, number, &what, answer)?;
    if !world.hold(partial, true) {
        return None;
    }
    // What the snapshot does not have is cut off, and the block behind it is nobody's.
    let cut = (sent.block_count < block_count).then_some(sent.block_count);
    for block_count in cut.into_iter().chain([sent.block_count + 1]) {
        let (number, happened) = resize_to(session, partial, block_count).await;
        if !happened {
            release_if_certain(session, partial, number);
            return None;
        }
    }
    Some(partial)
}

/// Applies to a partial disk what differs from its base. `false`: that could not be.
async fn fill_partial(
    session: &Session,
    partial: VdiRef,
    sent: &Sent,
    base: Option<Base>,
    random: &mut Random,
) -> bool {
    let world = &session.world;
    let from = base.map(|(vdi, number)| session.target(Place::Snapshot(vdi, number)));
    let extents_max = to_usize(1 + random.below(8));
    let ranges = diff_in_parts(session, from.as_ref(), &sent.target, extents_max).await;
    let disks = open_both(session, partial, sent).await;
    let (ranges, (source, into)) = match (ranges, disks) {
        (Ok(ranges), Ok(disks)) => (ranges, disks),
        (Err(error), _) | (_, Err(error)) => {
            session.excuse("what to receive", error.kind(), &error, Reach::Metadata);
            return false;
        }
    };
    let size = sent.block_count * BLOCK_SIZE_U64;
    for (start, end, data) in ranges {
        let end = end.min(size);
        if start >= end {
            continue;
        }
        let applied = match data {
            true => copy(session, partial, sent, (&source, &into), (start, end)).await,
            false => discard(session, partial, &into, (start, end)).await.map(|()| true),
        };
        match applied {
            Ok(true) => {}
            Ok(false) => return false,
            Err(error) => {
                let reach = Reach::Blocks(start / BLOCK_SIZE_U64, end / BLOCK_SIZE_U64);
                session.excuse("receive", error.kind, &error, reach);
                return false;
            }
        }
    }
    // Without a flush, completion has to see to it.
    if random.chance(300) {
        let asked = world.model.borrow_mut().begin_flush();
        if into.submit(Request::Flush).await.is_ok() {
            world.model.borrow_mut().end_flush(partial, asked);
        }
    }
    true
}

async fn open_both(
    session: &Session,
    partial: VdiRef,
    sent: &Sent,
) -> Result<(Rc<dyn Disk>, Rc<dyn Disk>), Error> {
    let source = session.store.open_disk(&sent.target).await?;
    let into = session.store.open_disk(&session.target(Place::Head(partial))).await?;
    Ok((source, into))
}

/// Copies bytes of a snapshot to a partial disk. `false`: they may be damaged.
async fn copy(
    session: &Session,
    partial: VdiRef,
    sent: &Sent,
    (source, into): (&Rc<dyn Disk>, &Rc<dyn Disk>),
    (start, end): (u64, u64),
) -> Result<bool, DiskError> {
    let world = &session.world;
    let mut lba = start / BLOCK_SIZE_U64;
    while lba < end / BLOCK_SIZE_U64 {
        let count = (end / BLOCK_SIZE_U64 - lba).min(COPIED_BLOCKS);
        let offset = lba * BLOCK_SIZE_U64;
        let asked = world.model.borrow_mut().begin_read();
        let read = read_blocks(session, source, lba, count).await;
        let damaged = world
            .device
            .with_atlas(|atlas| (lba..lba + count).any(|lba| atlas.may_have_undone(lba)));
        let bytes = match read {
            Ok(bytes) if !damaged => bytes,
            read => {
                world.model.borrow_mut().forget_read(asked);
                return read.map(|_| false);
            }
        };
        let checked = world.model.borrow_mut().end_read(sent.place, asked, offset, &bytes);
        if world.check(checked).is_none() {
            return Ok(false);
        }
        let length = bytes.len();
        let serial = world.model.borrow_mut().begin_copy(
            partial,
            offset,
            count * BLOCK_SIZE_U64,
            &sent.contents,
        );
        let mut data = session.runtime.buffers().take(length / BLOCK_SIZE);
        data.bytes_mut()[..length].copy_from_slice(&bytes);
        let answer = into.submit(Request::Write { offset, length, data, fua: false }).await;
        let outcome = if answer.is_ok() { Outcome::Acked } else { Outcome::Failed };
        world.model.borrow_mut().end(serial, outcome, false);
        world.progressed();
        answer?;
        lba += count;
    }
    Ok(true)
}

async fn discard(
    session: &Session,
    partial: VdiRef,
    into: &Rc<dyn Disk>,
    (start, end): (u64, u64),
) -> Result<(), DiskError> {
    let model = &session.world.model;
    let length = end - start;
    let serial = model.borrow_mut().begin(partial, Change::Discard, start, length);
    let answer = into.submit(Request::Discard { offset: start, length, fua: false }).await;
    let outcome = if answer.is_ok() { Outcome::Acked } else { Outcome::Failed };
    model.borrow_mut().end(serial, outcome, false);
    answer.map(drop)
}

/// Makes of a partial disk what it was received for. It is held alone, as is what it is meant for.
async fn complete(
    session: &Session,
    partial: VdiRef,
    sent: Sent,
    base: Option<Base>,
    random: &mut Random,
) {
    let world = &session.world;
    let vdi = base.map_or(partial, |(vdi, _)| vdi);
    let let_go = |number: u64| {
        release_if_certain(session, vdi, number);
        if vdi != partial {
            release_if_certain(session, partial, number);
        }
    };
    let other_base = random.chance(100);
    let base_uuid = match base {
        Some(_) if other_base => Some(draw_uuid(random)),
        Some((vdi, number)) => match uuid_of(session, vdi, number).await {
            None => return let_go(0),
            found => found,
        },
        None => None,
    };
    let receive = Receive {
        partial,
        vdi,
        name: match base {
            Some(_) => world.name_of(Place::Head(vdi)),
            None => new_name(session, random),
        },
        block_count: sent.block_count,
        serial: {
            let mut model = world.model.borrow_mut();
            for vdi in [partial, vdi] {
                model.vdi_mut(vdi).severed += 1;
            }
            model.begin_replace(vdi, "receive", &sent.contents)
        },
        contents: sent.contents,
        label: random.chance(600).then(|| format!("label-{}", world.number())),
        uuid: draw_uuid(random),
    };
    let request = Received {
        partial: world.name_of(Place::Head(partial)),
        name: receive.name.clone(),
        size_bytes: receive.block_count * BLOCK_SIZE_U64,
        label: receive.label.clone(),
        uuid: receive.uuid,
        base: base_uuid,
        force: random.chance(650),
    };
    let asked = world.model.borrow_mut().begin_read();
    let number = world.ask(Pending::Receive(receive));
    world.receives.set(world.receives.get() + 1);
    let answer = session.store.complete_receive(&request).await;
    world.model.borrow_mut().forget_read(asked);
    judge(session, number, &request, (base, other_base, asked), answer);
    let_go(number);
}

/// Judges the answer to a request for completion.
fn judge(
    session: &Session,
    number: u64,
    request: &Received,
    (base, other_base, asked): (Option<Base>, bool, Moment),
    answer: Result<SnapshotNumber, Error>,
) {
    let world = &session.world;
    let what = format!("receive {} into {}", request.partial, request.name);
    let is_other = base.is_some_and(|(vdi, number)| {
        let model = world.model.borrow();
        other_base || model.vdi(vdi).snapshots.keys().next_back() != Some(&number)
    });
    let was_written = base.is_some_and(|(vdi, number)| {
        !request.force && !world.model.borrow().may_be_as(vdi, number, asked)
    });
    let may_refuse = is_other || (base.is_some() && !request.force);
    match answer {
        Err(error) if error.kind() == ErrorKind::Invalid && may_refuse => {
            world.trace.note(|| format!("         {what}: {error}"));
            world.probe("receive: refused");
            if let Some(pending) = world.answered(number) {
                crate::management::forget(session, &pending);
            }
        }
        Ok(_) if is_other => world.fail(format!("{what}: it builds on another snapshot")),
        Ok(_) if was_written => {
            world.fail(format!("{what}: it was written since its newest snapshot"));
        }
        answer => {
            let Some(snapshot) = certain(session, number, &what, answer) else { return };
            let Some(Pending::Receive(receive)) = world.answered(number) else { return };
            world.model.borrow_mut().end(receive.serial, Outcome::Acked, true);
            let vdis = [receive.partial, receive.vdi];
            happened(session, receive, snapshot.get());
            vdis.into_iter().for_each(|vdi| session.check_severed(vdi));
            world.probe(if base.is_some() {
                "receive: onto a disk"
            } else {
                "receive: a new disk"
            });
        }
    }
}

/// A VDI has become what was received.
fn happened(session: &Session, receive: Receive, number: u64) {
    let Receive { partial, vdi, name, block_count, contents, label, uuid, .. } = receive;
    let mut model = session.world.model.borrow_mut();
    model.vdi_mut(partial).deleted = partial != vdi;
    model.vdi_mut(vdi).name = name;
    model.vdi_mut(vdi).block_count = block_count;
    if model.vdi(vdi).snapshot_numbers.contains(&number) {
        session.world.fail(format!("the number of what was received, {number}, was used before"));
    }
    drop(model);
    add_snapshot(session, vdi, number, label, block_count, Source::Fixed(contents));
    let mut model = session.world.model.borrow_mut();
    if let Some(snapshot) = model.vdi_mut(vdi).snapshots.get_mut(&number) {
        snapshot.uuid = Some(uuid);
    }
}

/// Decides of each receive that a crash has met whether it happened: its snapshot is there, or not.
/// Whether the rest fits, whoever compares all there is finds out.
pub async fn decide(session: &Session, entries: &[VdiEntry]) {
    let world = &session.world;
    let pending: Vec<(u64, Receive)> = {
        let pending = world.pending.borrow();
        let receives = pending.iter().filter_map(|(&key, pending)| match pending {
            Pending::Receive(receive) => Some((key, receive.clone())),
            _ => None,
        });
        receives.collect()
    };
    for (key, receive) in pending {
        let id = world.model.borrow().vdi(receive.vdi).id;
        let entry = entries.iter().find(|entry| Some(entry.id.get()) == id);
        let mut number = None;
        if let Some(entry) = entry {
            let Some(listed) = list_snapshots(session, &entry.name).await else { return };
            let found = listed.iter().find(|snapshot| snapshot.uuid == receive.uuid);
            number = found.map(|snapshot| snapshot.number.get());
        }
        world.model.borrow_mut().decide(receive.vdi, receive.serial, number.is_some());
        world.answered(key);
        match number {
            Some(number) => {
                world.probe("receive: done at a crash");
                happened(session, receive, number);
            }
            None => world.probe("receive: undone at a crash"),
        }
    }
}

fn draw_uuid(random: &mut Random) -> SnapshotUuid {
    SnapshotUuid(std::array::from_fn(|_| u8::try_from(random.below(256)).unwrap_or(0)))
}

/// What a snapshot is known by. `None`: it cannot be had, and that is excused.
async fn uuid_of(session: &Session, vdi: VdiRef, number: u64) -> Option<SnapshotUuid> {
    let name = session.world.name_of(Place::Head(vdi));
    match session.store.snapshots(&name, SnapshotNumber::new(number - 1), 1).await {
        Ok(listed) => listed.first().map(|snapshot| snapshot.uuid),
        Err(error) => {
            session.excuse("snapshots", error.kind(), &error, Reach::Metadata);
            None
        }
    }
}
