//! What the pasts of VDIs hold: counted per VDI by each garbage collection, and bounded by the budgets of
//! retentions (design rule 39).
//!
//! A collection marks the heads of all VDIs first (docs/decisions/0018-space.md), then of each VDI the snapshots
//! that somebody wants, and then its moments: what it marks newly there, these alone hold. What the pasts of
//! several VDIs share counts for the one with the lowest id. After a start nothing is known until the first
//! collection has ended.
//!
//! When the moments of a VDI held more than its budget, the oldest go, but for the newest of all and those
//! that somebody has open. What each holds alone is not known: so many go as are too many if all of the
//! count hold the same, and the next collection counts again. In between, a past grows no more than by what is
//! changed, and by the nodes that name it: when it may have outgrown its budget, a collection is begun in the
//! background. No guest waits for any of this.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use base::size::HumanBytes;
use base::{BLOCK_SIZE_U64, SnapshotNumber, VdiId};
use runtime::Time;

use crate::engine::Engine;
use crate::retention::{is_mere_moment, is_unused_moment};
use crate::types::VdiPast;
use crate::vdi::{Snapshot, Vdi};

/// One part in so many of a budget is left free when moments go for it. It is not counted again before the
/// past may have grown by as much: so collections do not follow each other for every block.
const SLACK_SHARE: u64 = 8;

/// When a past has been left over its budget by less than that for so long, it is counted.
const SLACK_MAX: Duration = Duration::from_secs(600);

/// What a changed block adds to the past at most: itself and the leaf that named it. Nodes above are few, and
/// so is what histories take.
const BLOCKS_PER_CHANGE: u64 = 2;

/// What the past of a VDI held when it was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PastBlocks {
    /// Blocks that its snapshots need which were asked for, or are held, and no head does.
    pub(crate) snapshots: u64,
    /// Those that its other moments need, and nothing of these.
    pub(crate) moments: u64,
    /// How many moments that were.
    pub(crate) moment_count: u64,
    /// Number of its next snapshot then.
    pub(crate) next: SnapshotNumber,
}

impl PastBlocks {
    pub(crate) fn is_empty(&self) -> bool {
        self.snapshots == 0 && self.moments == 0
    }

    /// How many of the moments may stay.
    fn staying_moments(&self, budget_blocks: u64) -> u64 {
        if self.moments <= budget_blocks {
            return self.moment_count;
        }
        let wanted = u128::from(budget_blocks - budget_blocks / SLACK_SHARE);
        let stay = u128::from(self.moment_count) * wanted / u128::from(self.moments);
        u64::try_from(stay).unwrap_or(self.moment_count)
    }

    /// Adds what a later pass found in another section of addresses, of more moments maybe: these have a part in
    /// the sum.
    pub(crate) fn add_blocks(&mut self, later: &Self) {
        let (snapshots, moments) = (self.snapshots + later.snapshots, self.moments + later.moments);
        *self = Self { snapshots, moments, ..*later };
    }
}

/// All pasts that held something when a collection counted them.
#[derive(Debug)]
pub(crate) struct CountedPasts {
    /// Wall time when it began.
    wall_ns: u64,
    /// When it ended.
    at: Time,
    of_vdis: BTreeMap<VdiId, PastBlocks>,
}

/// How much of a VDI was changed since its past was counted.
#[derive(Debug, Default)]
pub(crate) struct Growth {
    /// Blocks that were changed since the last count began that has ended.
    since_counted: Cell<u64>,
    /// Since the last one began.
    since_begun: Cell<u64>,
}

impl Growth {
    pub(crate) fn note(&self, blocks: u64) {
        for count in [&self.since_counted, &self.since_begun] {
            count.set(count.get().saturating_add(blocks));
        }
    }
}

impl Engine {
    /// Notes that what is changed from here on may not be in the count that begins.
    pub(crate) fn begin_count(&self) {
        for vdi in self.registry.borrow().loaded.values() {
            vdi.growth.since_begun.set(0);
        }
    }

    /// Notes what was counted.
    pub(crate) fn end_count(&self, wall_ns: u64, of_vdis: BTreeMap<VdiId, PastBlocks>) {
        for vdi in self.registry.borrow().loaded.values() {
            vdi.growth.since_counted.set(vdi.growth.since_begun.get());
        }
        let at = self.runtime.now();
        *self.counted.borrow_mut() = Some(CountedPasts { wall_ns, at, of_vdis });
    }

    /// Moments of a VDI that are to go because they held more than its budget when they were counted.
    pub(crate) fn moments_over_budget(&self, vdi: &Vdi) -> Vec<SnapshotNumber> {
        let Some(budget) = vdi.retention.borrow().budget_blocks() else { return Vec::new() };
        let past = self.counted.borrow().as_ref().and_then(|it| it.of_vdis.get(&vdi.id).copied());
        let is_over = |past: &PastBlocks| past.moments > budget;
        let is_bounded = !base::mutant::active("budget_bounds_nothing");
        let Some(past) = past.filter(|past| is_over(past) && is_bounded) else {
            vdi.budget_told.set(false);
            return Vec::new();
        };
        let snapshots = vdi.snapshots.borrow();
        let newest = snapshots.iter().rev().find(|it| it.is_kept()).map(|newest| newest.number);
        let all_may_go = base::mutant::active("budget_leaves_no_moment");
        let may_go =
            |it: &Rc<Snapshot>| is_unused_moment(it) && (Some(it.number) != newest || all_may_go);
        // Those that were taken later were not counted.
        let counted = snapshots.iter().take_while(|it| it.number < past.next);
        let counted: Vec<_> = counted.filter(|it| is_mere_moment(it)).collect();
        let staying = usize::try_from(past.staying_moments(budget)).unwrap_or(usize::MAX);
        let excess = counted.len().saturating_sub(staying);
        let going = counted.iter().take(excess).filter(|it| may_go(it));
        let going: Vec<SnapshotNumber> = going.map(|it| it.number).collect();
        let registry = self.registry.borrow();
        let disk = registry.name(vdi.id);
        let held = HumanBytes(past.moments.saturating_mul(BLOCK_SIZE_U64));
        if !going.is_empty() {
            let count = going.len();
            tracing::info!(disk, count, %held, "the oldest moments of a history that is over its budget go");
        } else if !counted.is_empty()
            && !counted.iter().any(|it| may_go(it))
            && !vdi.budget_told.replace(true)
        {
            tracing::warn!(
                disk,
                %held,
                "a history is over its budget, and only its newest moment and what is open are left of it"
            );
        }
        going
    }

    /// Has a collection begin if the moments of some VDI may hold more than its budget by now.
    pub(crate) fn count_if_outgrown(&self) {
        if self.registry.borrow().loaded.values().any(|vdi| self.may_have_outgrown(vdi)) {
            self.collector.want_count();
        }
    }

    fn may_have_outgrown(&self, vdi: &Vdi) -> bool {
        let Some(budget) = vdi.retention.borrow().budget_blocks() else { return false };
        // The newest stays.
        if vdi.snapshots.borrow().kept_count() < 2 {
            return false;
        }
        let counted = self.counted.borrow();
        let Some(counted) = counted.as_ref() else {
            let free = self.allocator.free_blocks();
            let used = self.allocator.capacity_blocks().saturating_sub(free);
            return used > budget;
        };
        let held = counted.of_vdis.get(&vdi.id).map_or(0, |past| past.moments);
        let growth = vdi.growth.since_counted.get().saturating_mul(BLOCKS_PER_CHANGE);
        let is_stale = self.runtime.now().since(counted.at) >= SLACK_MAX && growth > 0;
        (growth > budget / SLACK_SHARE || is_stale) && held.saturating_add(growth) > budget
    }

    /// What the past of a VDI holds, if that was counted in this run of the store.
    pub(crate) fn past_of(&self, id: VdiId) -> Option<VdiPast> {
        let counted = self.counted.borrow();
        let CountedPasts { wall_ns, of_vdis, .. } = counted.as_ref()?;
        let blocks = |count: fn(&PastBlocks) -> u64| of_vdis.get(&id).map_or(0, count);
        Some(VdiPast {
            snapshots_bytes: blocks(|past| past.snapshots).saturating_mul(BLOCK_SIZE_U64),
            moments_bytes: blocks(|past| past.moments).saturating_mul(BLOCK_SIZE_U64),
            wall_ns: *wall_ns,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_moments_stay_as_their_share_allows() {
        let staying = |moments: u64, moment_count: u64, budget: u64| {
            let next = SnapshotNumber::new(1);
            PastBlocks { snapshots: 0, moments, moment_count, next }.staying_moments(budget)
        };
        assert_eq!(staying(800, 100, 800), 100);
        assert_eq!(staying(801, 100, 800), 87);
        assert_eq!(staying(1400, 100, 800), 50);
        assert_eq!(staying(1 << 40, 100_000, 0), 0);
        assert_eq!(staying(2, 1, 1), 0);
        for moment_count in 1..100 {
            assert!(staying(8001, moment_count, 8000) < moment_count, "at least one goes");
        }
        assert!(staying(u64::MAX, u64::MAX, u64::MAX - 1) < u64::MAX / 8 * 7 + 8);
    }
}
