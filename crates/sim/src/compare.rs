//! What differs between two snapshots, compared with what they hold.

use base::BLOCK_SIZE_U64;
use vdi::{Error, Target};

use crate::management::{list_snapshots, pick, pick_snapshot};
use crate::model::Place;
use crate::random::{Random, to_usize};
use crate::session::{Reach, Session};
use crate::times::{Opened, open};

/// Compares a diff of two snapshots with what the model knows of them.
pub async fn diff(session: &Session, random: &mut Random) {
    let world = &session.world;
    let (Some(one), Some(other)) = (pick_snapshot(session, random), pick_snapshot(session, random))
    else {
        return;
    };
    if !world.hold(one.0, false) {
        return;
    }
    if !world.hold(other.0, false) {
        world.release(one.0);
        return;
    }
    let places = [one, other].map(|(vdi, number)| Place::Snapshot(vdi, number));
    let [from, to] = places.map(|place| session.target(place));
    let extents_max = to_usize(1 + random.below(8));
    match diff_in_parts(session, Some(&from), &to, extents_max).await {
        Ok(ranges) => {
            let model = world.model.borrow();
            if let Some(outcome) = model.check_diff(one, other, &ranges) {
                world.probe("diff: compared");
                let _ = world.check(outcome);
            }
        }
        Err(error) => session.excuse("diff", error.kind(), &error, Reach::Metadata),
    }
    world.release(one.0);
    world.release(other.0);
}

/// Compares a diff of two snapshots of a VDI, moments or not, with what is read in them.
pub async fn diff_moments(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if !world.hold(vdi, false) {
        return;
    }
    let name = world.name_of(Place::Head(vdi));
    let listed = list_snapshots(session, &name).await.unwrap_or_default();
    let both = [random.index(listed.len()), random.index(listed.len())];
    if let [Some(one), Some(other)] = both.map(|index| listed.get(index)) {
        let (one, other) = (open(session, &name, one).await, open(session, &name, other).await);
        if let (Some(one), Some(other)) = (one, other) {
            diff_opened(session, &one, &other, to_usize(1 + random.below(8))).await;
        }
    }
    world.release(vdi);
}

async fn diff_opened(session: &Session, one: &Opened, other: &Opened, extents_max: usize) {
    let world = &session.world;
    let ranges = match diff_in_parts(session, Some(&one.target), &other.target, extents_max).await {
        Ok(ranges) => ranges,
        Err(error) => {
            session.excuse("diff of moments", error.kind(), &error, Reach::Metadata);
            return;
        }
    };
    // Behind the end of the smaller one, all that has data differs.
    let pairs = one.blocks.iter().zip(&other.blocks).filter(|(a, b)| a.0 == b.0);
    for ((slot, before), (_, after)) in pairs {
        let offset = world.plan.layout.lba(*slot) * BLOCK_SIZE_U64;
        let range = ranges.iter().find(|&&(start, end, _)| start <= offset && offset < end);
        let wrong = match range {
            None => before != after,
            Some(&(_, _, data)) => !data && after.iter().any(|&byte| byte != 0),
        };
        if wrong {
            world.fail(format!(
                "diff of {} and {}: the block at byte {offset} says otherwise than {range:?}",
                one.target, other.target
            ));
        }
    }
    world.probe("diff: of moments");
}

/// What differs between two snapshots, or what one has data for, asked for in parts: first byte, end,
/// whether there is data.
pub async fn diff_in_parts(
    session: &Session,
    from: Option<&Target>,
    to: &Target,
    extents_max: usize,
) -> Result<Vec<(u64, u64, bool)>, Error> {
    let mut ranges = Vec::new();
    let mut next = Some(0);
    while let Some(offset) = next {
        let part = match from {
            Some(from) => session.store.diff(from, to, offset, extents_max).await?,
            None => session.store.mapped(to, offset, extents_max).await?,
        };
        let goes_on =
            part.next.is_none_or(|next| next > offset && part.extents.len() == extents_max);
        if part.extents.len() > extents_max || !goes_on {
            session.world.fail(format!("{extents_max} differences from {offset} on: {part:?}"));
            break;
        }
        let ends = part.extents.iter().map(|extent| (extent, extent.offset + extent.length));
        ranges.extend(ends.map(|(extent, end)| (extent.offset, end, extent.data)));
        next = part.next;
        if next.is_some() {
            session.world.probe("diff: in parts");
        }
    }
    Ok(ranges)
}
