//! Series of snapshots: each is one of the VDI at a moment between the request and its answer.

use std::time::Duration;

use vdi::WantedSeries;

use crate::management::{
    SNAPSHOTS_MAX, add_snapshot, give_up, leaves_it_open, list_snapshots, pick, settle_snapshot,
    unlabelled_is_pending,
};
use crate::model::VdiRef;
use crate::random::{Random, to_u64};
use crate::session::{Reach, Session};
use crate::world::{Pending, Source};

/// Most snapshots of a series.
const COUNT_MAX: u64 = 5;

/// Takes a series, finds out which numbers it got, and compares some of it at once.
pub async fn take(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    let count = random.between(1, COUNT_MAX);
    let room = SNAPSHOTS_MAX.saturating_sub(world.model.borrow().vdi(vdi).snapshots.len());
    // What has no label is told from others by being the only one under way.
    let is_told = !unlabelled_is_pending(session, vdi);
    if count > to_u64(room) || !is_told || !world.hold(vdi, false) {
        return;
    }
    let Some(numbers) = take_of(session, vdi, count, random).await else { return };
    if random.chance(300) {
        for &number in &numbers {
            settle_snapshot(session, vdi, number).await;
        }
        for pair in numbers.windows(2) {
            let goes_on = world.model.borrow().goes_on(vdi, pair[0], pair[1]);
            if !goes_on {
                world.fail(format!(
                    "snapshot {} has more than {}, which is later",
                    pair[0], pair[1]
                ));
            }
        }
    }
    world.release(vdi);
}

/// Takes a series of a VDI that is held; its numbers. `None`: it is not certain what there is of it.
async fn take_of(
    session: &Session,
    vdi: VdiRef,
    count: u64,
    random: &mut Random,
) -> Option<Vec<u64>> {
    let world = &session.world;
    let (name, block_count) = {
        let model = world.model.borrow();
        (model.vdi(vdi).name.clone(), model.vdi(vdi).block_count)
    };
    let ask = |_| {
        let source = Source::Running(vdi, world.model.borrow_mut().ask());
        world.ask(Pending::Snapshot { vdi, label: None, block_count, source })
    };
    let mut under_way: Vec<u64> = (0..count).map(ask).collect();
    let every = Duration::from_micros(random.magnitude(5_000));
    let wanted = WantedSeries { every, count: u32::try_from(count).unwrap_or(u32::MAX) };
    let answer = session.store.snapshot_series(&name, wanted).await;
    let what = format!("series of {name}");
    let unanswered = |numbers: Vec<u64>| numbers.into_iter().for_each(|it| world.unanswered(it));
    if let Err(error) = &answer {
        world.trace.note(|| format!("         {what}: {error}"));
        session.excuse(&what, error.kind(), error, Reach::Metadata);
        if leaves_it_open(error.kind()) {
            unanswered(under_way);
            return None;
        }
    }
    let Some(mut listed) = list_snapshots(session, &name).await else {
        unanswered(under_way);
        return None;
    };
    let is_known = |number| world.model.borrow().vdi(vdi).snapshot_numbers.contains(&number);
    listed.retain(|entry| {
        let is_moment = entry.changed_bytes.is_some();
        !is_moment && entry.label.is_none() && !is_known(entry.number.get())
    });
    let numbers: Vec<u64> = listed.iter().map(|entry| entry.number.get()).collect();
    let is_as_said = match &answer {
        Ok(series) => {
            let said = [series.first.get(), series.last.get(), u64::from(series.count)];
            let [first, last] = [numbers.first(), numbers.last()].map(|it| it.copied());
            [first, last, Some(count)] == said.map(Some) && to_u64(numbers.len()) == count
        }
        // It was cut short.
        Err(_) => to_u64(numbers.len()) < count,
    };
    if !is_as_said {
        world.fail(format!("{what} of {count} gave {answer:?}, and there are {numbers:?}"));
    }
    if answer.is_ok() {
        world.probe("series: taken");
    }
    for &number in &numbers {
        let pending = under_way.pop().and_then(|it| world.answered(it));
        let Some(Pending::Snapshot { source, .. }) = pending else { return None };
        add_snapshot(session, vdi, number, None, block_count, source);
    }
    under_way.into_iter().for_each(|it| give_up(session, it));
    Some(numbers)
}
