//! What the pasts of VDIs hold: counted per VDI by each garbage collection.
//!
//! A collection marks the heads of all VDIs first (docs/decisions/0018-space.md), then of each VDI the snapshots
//! that somebody wants, and then its moments: what it marks newly there, these alone hold. What the pasts of
//! several VDIs share counts for the one with the lowest id. After a start nothing is known until the first
//! collection has ended.

use std::cell::Cell;
use std::collections::BTreeMap;

use base::{BLOCK_SIZE_U64, SnapshotNumber, VdiId};

use crate::engine::Engine;
use crate::types::VdiPast;

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

    /// The same moments, before anything of them was counted.
    pub(crate) fn without_blocks(self) -> Self {
        Self { snapshots: 0, moments: 0, ..self }
    }

    /// Adds what lay in another section of addresses.
    pub(crate) fn add_blocks(&mut self, other: &Self) {
        self.snapshots += other.snapshots;
        self.moments += other.moments;
    }
}

/// All pasts that held something when a collection counted them.
#[derive(Debug)]
pub(crate) struct CountedPasts {
    /// Wall time when it began.
    wall_ns: u64,
    of_vdis: BTreeMap<VdiId, PastBlocks>,
}

/// How much of a VDI was changed since its past was counted: the past has grown by that much at most, but for
/// what it takes to find it.
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
        *self.counted.borrow_mut() = Some(CountedPasts { wall_ns, of_vdis });
    }

    /// What the past of a VDI holds, if that was counted in this run of the store.
    pub(crate) fn past_of(&self, id: VdiId) -> Option<VdiPast> {
        let counted = self.counted.borrow();
        let CountedPasts { wall_ns, of_vdis } = counted.as_ref()?;
        let blocks = |count: fn(&PastBlocks) -> u64| of_vdis.get(&id).map_or(0, count);
        Some(VdiPast {
            snapshots_bytes: blocks(|past| past.snapshots).saturating_mul(BLOCK_SIZE_U64),
            moments_bytes: blocks(|past| past.moments).saturating_mul(BLOCK_SIZE_U64),
            wall_ns: *wall_ns,
        })
    }
}
