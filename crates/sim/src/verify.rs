//! What is done after every opening of a store: compare all of it with the model.

use std::collections::BTreeSet;
use std::rc::Rc;

use base::BLOCK_SIZE_U64;
use vdi::{Target, VdiEntry};

use crate::content;
use crate::holds;
use crate::management::{add_snapshot, add_vdi, list_all, list_snapshots};
use crate::model::ops::Serial;
use crate::model::{Place, VdiRef};
use crate::moments;
use crate::receive;
use crate::requests::{read_all, read_blocks};
use crate::session::{Reach, Session};
use crate::world::Pending;

/// Compares names, sizes, snapshots and contents with the model, and decides what nobody heard of.
pub async fn everything(session: Rc<Session>) {
    let world = &session.world;
    let Some(entries) = list_all(&session, 5).await else { return };
    receive::decide(&session, &entries).await;
    reconcile(&session, &entries);
    moments::reconcile_default(&session, lied(&session));
    let vdis: Vec<VdiRef> = world.model.borrow().live().collect();
    for &vdi in &vdis {
        if session.stopped() {
            return;
        }
        reconcile_snapshots(&session, vdi).await;
    }
    world.pending.borrow_mut().retain(|_, pending| {
        matches!(pending, Pending::Rollback(..) | Pending::Resize(_, _, Some(_)))
    });
    for vdi in vdis {
        contents(&session, vdi).await;
        let numbers: Vec<u64> = world.model.borrow().vdi(vdi).snapshots.keys().copied().collect();
        for number in numbers {
            if session.stopped() {
                return;
            }
            snapshot_contents(&session, vdi, number).await;
        }
    }
    world.device.compared();
    world.lies_compared.set(world.device.with_atlas(|atlas| atlas.lies()));
    world.trace.note(|| "verify   everything was compared".to_owned());
}

/// Reads everything there is and checks that it is something that was once written there: all that
/// can be asked when metadata was damaged and then the log was cut or an older root was taken.
pub async fn nothing_wrong(session: Rc<Session>) {
    let world = &session.world;
    world.moments.borrow_mut().clear();
    let Some(entries) = list_all(&session, 5).await else { return };
    for entry in entries {
        let target = Target { vdi: entry.name, snapshot: None };
        let disk = match session.store.open_disk(&target).await {
            Ok(disk) => disk,
            Err(error) => {
                session.excuse("open", error.kind(), &error, Reach::Metadata);
                continue;
            }
        };
        let block_count = disk.size_bytes() / BLOCK_SIZE_U64;
        for slot in 0..world.plan.layout.slot_count() {
            let lba = world.plan.layout.lba(slot);
            if lba >= block_count {
                continue;
            }
            match read_blocks(&session, &disk, lba, 1).await {
                Ok(bytes) => {
                    let _ = world.check(content::check_belongs(lba, &bytes));
                }
                Err(error) => {
                    session.excuse("read", error.kind, &error, Reach::Blocks(lba, lba + 1));
                }
            }
        }
    }
}

/// Compares the listing with the model.
fn reconcile(session: &Session, entries: &[VdiEntry]) {
    let world = &session.world;
    let known: Vec<VdiRef> = world.model.borrow().live().collect();
    let mut listed = BTreeSet::new();
    for entry in entries {
        let vdi = known
            .iter()
            .copied()
            .find(|&vdi| world.model.borrow().vdi(vdi).id == Some(entry.id.get()));
        match vdi {
            Some(vdi) => {
                listed.insert(vdi);
                reconcile_vdi(session, vdi, entry);
            }
            None => appeared(session, entry),
        }
    }
    for vdi in known.into_iter().filter(|vdi| !listed.contains(vdi)) {
        if world.is_pending(|p| matches!(p, Pending::Remove(v) if *v == vdi)) || lied(session) {
            world.model.borrow_mut().vdi_mut(vdi).deleted = true;
            world.held.borrow_mut().retain(|key, _| key.0 != vdi);
        } else {
            world.fail(format!("{} is gone", world.name_of(Place::Head(vdi))));
        }
    }
}

/// A VDI that the model does not know: was it being created?
fn appeared(session: &Session, entry: &VdiEntry) {
    let world = &session.world;
    let number = world.pending.borrow().iter().find_map(|(&number, pending)| match pending {
        Pending::Create { name, .. } if *name == entry.name => Some(number),
        _ => None,
    });
    let created = number.and_then(|number| world.answered(number));
    let Some(Pending::Create { block_count, source, .. }) = created else {
        world.fail(format!("there is a VDI that nobody made: {entry:?}"));
        return;
    };
    if entry.size_bytes != block_count * BLOCK_SIZE_U64 {
        world.fail(format!("{entry:?} was created with {block_count} blocks"));
    }
    add_vdi(session, &entry.name, entry.id.get(), block_count, source);
}

/// Compares name and size of a VDI with the model.
fn reconcile_vdi(session: &Session, vdi: VdiRef, entry: &VdiEntry) {
    let world = &session.world;
    let (name, block_count) = {
        let model = world.model.borrow();
        (model.vdi(vdi).name.clone(), model.vdi(vdi).block_count)
    };
    if entry.name != name {
        let renamed =
            |p: &Pending| matches!(p, Pending::Rename(v, new) if *v == vdi && *new == entry.name);
        if world.is_pending(renamed) {
            world.model.borrow_mut().vdi_mut(vdi).name = entry.name.clone();
        } else {
            world.fail(format!("{name} is called {} now", entry.name));
        }
    }
    let listed_blocks = entry.size_bytes / BLOCK_SIZE_U64;
    let resized = world.pending.borrow().iter().find_map(|(&number, pending)| match *pending {
        Pending::Resize(v, blocks, serial) if v == vdi => Some((number, blocks, serial)),
        _ => None,
    });
    if let Some((number, blocks, serial)) = resized {
        let happened = listed_blocks == blocks;
        if let (Some(serial), true) = (serial, blocks != block_count) {
            world.model.borrow_mut().decide(vdi, serial, happened);
        }
        world.answered(number);
        if happened {
            world.model.borrow_mut().vdi_mut(vdi).block_count = blocks;
            return;
        }
    }
    let rolled_back = |p: &Pending| matches!(p, Pending::Rollback(v, blocks, _) if *v == vdi && *blocks == listed_blocks);
    if listed_blocks != block_count && !world.is_pending(rolled_back) {
        world.fail(format!("{name} has {listed_blocks} blocks instead of {block_count}"));
    }
    world.model.borrow_mut().vdi_mut(vdi).block_count = listed_blocks;
}

/// Whether the device has lost data that it had acknowledged, since everything was last compared:
/// then recovery may drop a write above the durable point, and with it every snapshot and clone
/// that would have a hole there (rule 31).
pub fn lied(session: &Session) -> bool {
    let lies = session.world.device.with_atlas(|atlas| atlas.lies());
    lies > session.world.lies_compared.get()
}

/// Compares the snapshots of a VDI with the model.
async fn reconcile_snapshots(session: &Session, vdi: VdiRef) {
    let world = &session.world;
    let name = world.name_of(Place::Head(vdi));
    let Some(mut listed) = list_snapshots(session, &name).await else { return };
    moments::forget_others(session, vdi, &listed);
    holds::reconcile(session, vdi, &listed);
    listed.retain(|entry| entry.changed_bytes.is_none());
    for entry in &listed {
        let number = entry.number.get();
        let known = world.model.borrow().vdi(vdi).snapshots.get(&number).cloned();
        if let Some(known) = known {
            if known.label != entry.label || known.block_count * BLOCK_SIZE_U64 != entry.size_bytes
            {
                world.fail(format!(
                    "{name}: {entry:?} was {:?}, {} blocks",
                    known.label, known.block_count
                ));
            }
            if known.uuid.is_some_and(|uuid| uuid != entry.uuid) {
                world.fail(format!("{name}: {entry:?} was known by {:?}", known.uuid));
            }
            if let Some(known) = world.model.borrow_mut().vdi_mut(vdi).snapshots.get_mut(&number) {
                known.uuid = Some(entry.uuid);
            }
            continue;
        }
        let pending = world.pending.borrow().iter().find_map(|(&key, pending)| match pending {
            Pending::Snapshot { vdi: v, label, .. } if *v == vdi && *label == entry.label => {
                Some(key)
            }
            _ => None,
        });
        match pending.and_then(|key| world.answered(key)) {
            Some(Pending::Snapshot { label, block_count, source, .. }) => {
                if world.model.borrow().vdi(vdi).snapshot_numbers.contains(&number) {
                    world.fail(format!("{name}: the number of {entry:?} was used before"));
                }
                world.probe("snapshot: unsettled at a crash");
                add_snapshot(session, vdi, number, label, block_count, source);
            }
            _ => world.fail(format!("{name} has a snapshot that nobody took: {entry:?}")),
        }
    }
    let known: Vec<u64> = world.model.borrow().vdi(vdi).snapshots.keys().copied().collect();
    for number in known {
        if listed.iter().any(|entry| entry.number.get() == number) {
            continue;
        }
        let removed =
            |p: &Pending| matches!(p, Pending::RemoveSnapshot(v, n) if *v == vdi && *n == number);
        if world.is_pending(removed) || lied(session) {
            world.model.borrow_mut().vdi_mut(vdi).snapshots.remove(&number);
        } else {
            world.fail(format!("{name}@{number} is gone"));
        }
    }
}

/// Compares the contents of a VDI, and decides whether a rollback happened.
async fn contents(session: &Session, vdi: VdiRef) {
    let world = &session.world;
    let place = Place::Head(vdi);
    let block_count = world.model.borrow().vdi(vdi).block_count;
    let Some(blocks) = read_all(session, place, block_count).await else { return };
    if session.stopped() {
        return;
    }
    let undecided: Option<(u64, Serial)> =
        world.pending.borrow().iter().find_map(|(&key, pending)| match *pending {
            Pending::Rollback(v, _, serial) if v == vdi => Some((key, serial)),
            _ => None,
        });
    let mut model = world.model.borrow_mut();
    if let Some((key, serial)) = undecided {
        let happened = !model.could_have(vdi, serial, false, &blocks);
        model.decide(vdi, serial, happened);
        world.answered(key);
        world.probe("rollback: undecided at a crash");
    }
    for (slot, bytes) in blocks {
        let lba = world.plan.layout.lba(slot);
        let damaged = world.device.with_atlas(|atlas| atlas.may_have_undone(lba));
        if world.check(model.pin(vdi, slot, &bytes, damaged)).is_none() {
            return;
        }
    }
}

/// Compares the contents of a snapshot.
async fn snapshot_contents(session: &Session, vdi: VdiRef, number: u64) {
    let world = &session.world;
    let place = Place::Snapshot(vdi, number);
    let size = world.model.borrow().vdi(vdi).snapshots.get(&number).map(|s| s.block_count);
    let Some(block_count) = size else { return };
    let Some(blocks) = read_all(session, place, block_count).await else { return };
    let mut model = world.model.borrow_mut();
    for (slot, bytes) in blocks {
        let lba = world.plan.layout.lba(slot);
        if world.device.with_atlas(|atlas| atlas.may_have_undone(lba)) {
            let _ = world.check(content::check_belongs(lba, &bytes));
            continue;
        }
        let asked = model.begin_read();
        let offset = lba * BLOCK_SIZE_U64;
        if world.check(model.end_read(place, asked, offset, &bytes)).is_none() {
            return;
        }
    }
}
