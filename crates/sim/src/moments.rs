//! Moments that the engine keeps by itself. The model does not know when they were taken, so what one
//! holds is not judged by it: all that is written in it must belong where it stands, and whoever
//! looks again must see the same, until it is gone.

use std::collections::BTreeMap;
use std::time::Duration;

use base::{ErrorKind, SnapshotNumber};
use runtime::Runtime;
use vdi::{Retention, SnapshotEntry, Store, Target};

use crate::content;
use crate::management::pick;
use crate::model::{Place, VdiRef};
use crate::random::Random;
use crate::requests::read_blocks;
use crate::session::{Reach, Session};
use crate::writes;

/// Blocks that were seen, by LBA.
type Seen = BTreeMap<u64, Vec<u8>>;

/// What was seen of each moment, by VDI and number.
pub type Moments = BTreeMap<(VdiRef, u64), Seen>;

/// Moments of which is remembered what they hold.
const REMEMBERED_MAX: usize = 64;

/// Blocks of a moment that are looked at.
const BLOCKS_MAX: u64 = 8;

/// What a VDI's history may be set to: runs last seconds.
const RETENTIONS: [&str; 10] = [
    "off",
    "1h",
    "2s",
    "every flush for 1s, 100ms for 5s",
    "every 1s for 5s, 2s for 1h",
    "every write for 1h",
    "every write for 3s, 500ms for 10s",
    "1h, at most 256K",
    "every 1s for 1h, at most 1B",
    "every write for 1h, at most 1M",
];

/// Budgets that are given to VDIs when nothing writes to them any more.
pub const LAST_BUDGETS: [&str; 2] = ["1h, at most 128K", "1h, at most 1B"];

/// Collections that it may take until a history is within its budget.
const COLLECTIONS_MAX: usize = 30;

/// Changes which moments of a VDI are kept.
pub async fn retain(session: &Session, random: &mut Random) {
    let Some(vdi) = pick(session, random) else { return };
    let Some(Ok(retention)) = random.pick(&RETENTIONS).map(Retention::parse) else { return };
    let name = session.world.name_of(Place::Head(vdi));
    match session.store.retain(&name, retention).await {
        Ok(()) => session.world.probe("moments: retention changed"),
        // Deleted or renamed meanwhile.
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => session.excuse("retain", error.kind(), &error, Reach::Metadata),
    }
}

/// Changes which moments are kept of VDIs that have no rules of their own, or has one have none.
pub async fn retain_by_default(session: &Session, random: &mut Random) {
    let world = &session.world;
    if random.chance(300) {
        let Some(vdi) = pick(session, random) else { return };
        let name = world.name_of(Place::Head(vdi));
        match session.store.inherit_retention(&name).await {
            Ok(()) => {}
            // Deleted or renamed meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => session.excuse("inherit", error.kind(), &error, Reach::Metadata),
        }
        return;
    }
    let Some(Ok(retention)) = random.pick(&RETENTIONS).map(Retention::parse) else { return };
    let shown = retention.to_string();
    // One at a time: which of two comes first nobody can tell.
    if session.default_asked.replace(true) {
        return;
    }
    world.default_retentions.borrow_mut().push(shown.clone());
    match session.store.retain_by_default(retention).await {
        Ok(()) => {
            *world.default_retentions.borrow_mut() = vec![shown];
            session.default_asked.set(false);
        }
        Err(error) => session.excuse("retain by default", error.kind(), &error, Reach::Metadata),
    }
}

/// After an opening of the store, what it keeps must have been asked for, and is certain.
pub fn reconcile_default(session: &Session, is_excused: bool) {
    let seen = session.store.default_retention().to_string();
    let mut possible = session.world.default_retentions.borrow_mut();
    if !possible.contains(&seen) && !is_excused {
        session.world.fail(format!("by default {seen} is kept, and not one of {possible:?}"));
    }
    *possible = vec![seen];
}

/// Reads some blocks of a moment, or of the writes that it keeps.
pub async fn read(session: &Session, random: &mut Random) {
    if random.chance(500) {
        return writes::read(session, random).await;
    }
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    let name = world.name_of(Place::Head(vdi));
    let listed = session.store.snapshots(&name, SnapshotNumber::new(0), usize::MAX).await;
    let Ok(listed) = listed else { return };
    // It may be another one of that name by now.
    let id = world.model.borrow().vdi(vdi).id;
    let info = session.store.info(&name).await;
    if !info.is_ok_and(|info| Some(info.id.get()) == id) {
        return;
    }
    let kept = listed.into_iter().filter(|entry| entry.changed_bytes.is_some());
    let kept: Vec<u64> = kept.map(|entry| entry.number.get()).collect();
    let Some(number) = random.pick(&kept) else { return };
    let target = Target { vdi: name.clone(), snapshot: Some(number.to_string()) };
    let Ok(disk) = session.store.open_disk(&target).await else { return };
    let block_count = disk.size_bytes() / base::BLOCK_SIZE_U64;
    let layout = world.plan.layout.clone();
    for _ in 0..random.between(1, BLOCKS_MAX) {
        let slots = u64::try_from(layout.slot_count()).unwrap_or(1);
        let slot = usize::try_from(random.below(slots)).unwrap_or(0);
        let lba = layout.lba(slot);
        if lba >= block_count {
            continue;
        }
        match read_blocks(session, &disk, lba, 1).await {
            Ok(bytes) => {
                let damaged = world.device.with_atlas(|atlas| atlas.may_have_undone(lba));
                if world.check(content::check_belongs(lba, &bytes)).is_none() || damaged {
                    return;
                }
                remember(session, vdi, number, lba, bytes);
            }
            Err(_) if disk.severed() => return,
            Err(error) => session.excuse(
                &format!("read of block {lba} of {target}"),
                error.kind,
                &error,
                Reach::Blocks(lba, lba + 1),
            ),
        }
    }
    world.probe("moments: read");
}

fn remember(session: &Session, vdi: VdiRef, number: u64, lba: u64, bytes: Vec<u8>) {
    let mut moments = session.world.moments.borrow_mut();
    if moments.len() >= REMEMBERED_MAX && !moments.contains_key(&(vdi, number)) {
        moments.pop_first();
    }
    let seen = moments.entry((vdi, number)).or_default();
    match seen.get(&lba) {
        Some(before) if *before != bytes => {
            session.world.fail(format!("{vdi:?}@{number}, block {lba}: the moment has changed"));
        }
        Some(_) => session.world.probe("moments: read again"),
        None => {
            seen.insert(lba, bytes);
        }
    }
}

/// Gives each VDI a budget, and waits until nothing more goes. What is over its budget then is told, unless it is but
/// one moment that is not held.
///
/// # Errors
/// If the store has failed.
pub async fn keep_budgets(
    store: &Store,
    runtime: &Runtime,
    budget: &str,
) -> Result<Option<String>, vdi::Error> {
    let retention = Retention::parse(budget)?;
    let mut bounded = Vec::new();
    for vdi in store.list(None, usize::MAX).await? {
        match store.retain(&vdi.name, retention.clone()).await {
            Ok(()) => bounded.push(vdi.name),
            // Of what is damaged nothing is kept, and on a full store nothing is set.
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NoSpace) => {}
            Err(error) => return Err(error),
        }
    }
    // What was to go before goes.
    runtime.sleep(Duration::from_secs(5)).await;
    let mut newest = Vec::new();
    for name in &bounded {
        newest.push(newest_of(&moments_of(store, name).await?));
    }
    let mut told = None;
    for _ in 0..COLLECTIONS_MAX {
        told = None;
        let counted = store.collect_garbage().await?.space.is_some();
        for name in &bounded {
            let entry = store.info(name).await?;
            let moments = moments_of(store, name).await?;
            let count = moments.iter().filter(|moment| moment.hold.is_none()).count();
            let held = entry.past.map_or(u64::MAX, |past| past.moments_bytes);
            if (held > retention.budget_bytes().unwrap_or(u64::MAX) || !counted) && count > 1 {
                told = Some(format!("{count} moments of {name} hold {held} bytes: {budget}"));
            }
        }
        if told.is_none() {
            break;
        }
        runtime.sleep(Duration::from_secs(5)).await;
    }
    for (name, newest) in bounded.iter().zip(newest) {
        if newest_of(&moments_of(store, name).await?) < newest {
            return Ok(Some(format!("the newest moment of {name} went: {budget}")));
        }
    }
    Ok(told)
}

async fn moments_of(store: &Store, name: &str) -> Result<Vec<SnapshotEntry>, vdi::Error> {
    let mut all = store.snapshots(name, SnapshotNumber::new(0), usize::MAX).await?;
    all.retain(|snapshot| snapshot.changed_bytes.is_some());
    Ok(all)
}

fn newest_of(moments: &[SnapshotEntry]) -> Option<SnapshotNumber> {
    moments.iter().map(|moment| moment.number).max()
}

/// Ends all histories, and waits until nothing of them is left.
///
/// # Errors
/// If the store has failed.
pub async fn end_all(store: &Store, runtime: &Runtime) -> Result<(), vdi::Error> {
    store.retain_by_default(Retention::default()).await?;
    for vdi in store.list(None, usize::MAX).await? {
        match store.retain(&vdi.name, Retention::default()).await {
            // Of what is damaged nothing is kept.
            Err(error) if error.kind() == ErrorKind::Corrupt => {}
            retained => retained?,
        }
    }
    loop {
        let vdis = store.list(None, usize::MAX).await?;
        if vdis.iter().all(|vdi| vdi.moment_count == 0) {
            return Ok(());
        }
        // One that has failed ends nothing any more.
        store.checkpoint().await?;
        runtime.sleep(Duration::from_millis(500)).await;
    }
}

/// Forgets the moments of a VDI that are not listed: numbers of what a crash took are given again.
pub fn forget_others(session: &Session, vdi: VdiRef, listed: &[SnapshotEntry]) {
    session.world.moments.borrow_mut().retain(|&(of, number), _| {
        of != vdi || listed.iter().any(|entry| entry.number.get() == number)
    });
}
