//! Which faults a run injects and how often, and the atlas of those that were injected.
//!
//! Swarm testing (Groce et al., ISSTA 2012): a run that injects everything at once dies of the
//! most likely fault and never meets the rare ones. So each seed draws a few kinds, often none,
//! and a rate for each.

use std::collections::{BTreeMap, BTreeSet};

use crate::medium::Mark;
use crate::random::Random;

/// A kind of fault of the device below the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// A read fails with EIO; the next one may succeed.
    ReadError,
    /// A write fails with EIO, and leaves any mix of old and new sectors in its range.
    WriteError,
    /// The same, but only writes of data and nodes.
    DataWriteError,
    /// A flush fails; of what it was to cover each block is kept, lost, or served from the cache
    /// until the power goes, and counts as clean afterwards (fsyncgate).
    FlushError,
    /// A write of a block that is not allocated below, or an allocation, finds no space.
    NoSpace,
    /// A bit of a block at rest flips, or the block becomes unreadable.
    Rot,
    /// A write is acknowledged but lands on another block.
    Misdirected,
    /// A write is acknowledged but not done.
    LostWrite,
    /// The same, but only writes that begin with a tree node.
    LostNode,
    /// Operations take a hundred times as long for a while.
    Slow,
    /// Nothing completes for a while.
    Hang,
    /// Everything fails for a while; the device comes back with or without its cache.
    Gone,
    /// The wall clock jumps by up to ten years.
    ClockJump,
}

impl FaultKind {
    /// All kinds, with the names that the command line knows.
    pub const ALL: [(Self, &str); 13] = [
        (Self::ReadError, "read-error"),
        (Self::WriteError, "write-error"),
        (Self::DataWriteError, "data-write-error"),
        (Self::FlushError, "flush-error"),
        (Self::NoSpace, "no-space"),
        (Self::Rot, "rot"),
        (Self::Misdirected, "misdirected"),
        (Self::LostWrite, "lost-write"),
        (Self::LostNode, "lost-node"),
        (Self::Slow, "slow"),
        (Self::Hang, "hang"),
        (Self::Gone, "gone"),
        (Self::ClockJump, "clock-jump"),
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |&(_, name)| name)
    }

    /// The kind with this name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|&(kind, _)| kind)
    }
}

/// Rates of faults, per million operations of the kind that each concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    rates: BTreeMap<FaultKind, u32>,
}

impl Faults {
    /// A device that only loses power.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Exactly one kind, at `rate` per million.
    #[must_use]
    pub fn only(kind: FaultKind, rate: u32) -> Self {
        Self { rates: BTreeMap::from([(kind, rate)]) }
    }

    /// What a seed injects: nothing in half of all runs, else one to three kinds.
    #[must_use]
    pub fn swarm(random: &mut Random) -> Self {
        let mut faults = Self::none();
        if random.chance(500) {
            return faults;
        }
        for _ in 0..=random.below(3) {
            let Some((kind, _)) = random.pick(&FaultKind::ALL) else { continue };
            let rate = match kind {
                FaultKind::ReadError | FaultKind::WriteError => random.between(300, 10_000),
                FaultKind::DataWriteError | FaultKind::FlushError => random.between(1_000, 50_000),
                FaultKind::NoSpace => random.between(1, 1_000_000),
                FaultKind::Rot | FaultKind::Misdirected | FaultKind::LostWrite => {
                    random.between(200, 8_000)
                }
                FaultKind::LostNode => random.between(1_000, 20_000),
                FaultKind::Slow | FaultKind::Hang | FaultKind::Gone => random.between(200, 2_000),
                FaultKind::ClockJump => random.between(1_000, 20_000),
            };
            faults.rates.insert(kind, u32::try_from(rate).unwrap_or(u32::MAX));
        }
        faults
    }

    /// The rate of a kind, per million; 0 if it is not injected.
    #[must_use]
    pub fn rate(&self, kind: FaultKind) -> u32 {
        self.rates.get(&kind).copied().unwrap_or(0)
    }

    /// The kinds that are injected.
    pub fn kinds(&self) -> impl Iterator<Item = FaultKind> + '_ {
        self.rates.keys().copied()
    }

    /// Takes a kind away.
    pub fn remove(&mut self, kind: FaultKind) {
        self.rates.remove(&kind);
    }
}

/// What is wrong with a block on the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DamageKind {
    /// A bit flipped.
    Flipped,
    /// Reads fail until it is written.
    Unreadable,
    /// It holds what was meant for another block.
    Overwritten,
    /// It lacks what was written to it.
    Stale,
}

/// What stands, or should stand, in a damaged block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// A client's data of this block of some VDI.
    Data(u64),
    /// A tree node. What is below it may be lost; what it does not name is not concerned.
    Node,
    /// Something of the system or the log, a table page, or data that cannot be told from them:
    /// anything may be lost.
    Unknown,
}

/// A block that does not hold what was written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// What is wrong.
    pub kind: DamageKind,
    /// Whose it is.
    pub victim: Victim,
    /// What was written later is right again.
    pub since: Mark,
}

/// Most blocks that a client writes with one record.
const RECORD_BLOCKS: u64 = 64;

/// Everything that was injected: which errors are legitimate, and which are the engine's own.
#[derive(Clone, Debug, Default)]
pub struct Atlas {
    damage: BTreeMap<u64, Damage>,
    /// Blocks that were damaged at some time.
    ever: BTreeSet<u64>,
    /// Blocks of VDIs that the device lost, or lied about, since everything was last compared.
    lied_about: BTreeSet<u64>,
    counts: BTreeMap<&'static str, u64>,
    /// Errors that the device answered.
    pub errors: u64,
    /// Those of them that were not read errors.
    pub write_side_errors: u64,
    /// Flushes that failed, or caches that vanished: what was not flushed may be lost since.
    pub cache_losses: u64,
    /// Blocks damaged so far.
    pub damaged: u64,
    /// Those of them that are tree nodes. A checkpoint may have noted what they named as lost, so
    /// that they excuse errors even after the blocks were written again.
    pub nodes_damaged: u64,
    /// Times that the device had no space.
    pub no_space: u64,
}

impl Atlas {
    /// Counts an injected fault.
    pub fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_insert(0) += 1;
    }

    /// How often each fault was injected.
    #[must_use]
    pub fn counts(&self) -> &BTreeMap<&'static str, u64> {
        &self.counts
    }

    /// Notes that the block `pba` is damaged.
    pub fn damage(&mut self, pba: u64, mut damage: Damage) {
        self.damaged += 1;
        self.ever.insert(pba);
        if self.damage.get(&pba).is_some_and(|before| before.victim != damage.victim) {
            // Damaged twice: what stood there may have been either.
            damage.victim = Victim::Unknown;
        }
        self.nodes_damaged += u64::from(damage.victim == Victim::Node);
        if let Victim::Data(lba) = damage.victim {
            self.lied_about.insert(lba);
        }
        self.damage.insert(pba, damage);
    }

    /// Notes that `pba` durably holds what was written to it at `written`.
    pub fn heal(&mut self, pba: u64, written: Mark) {
        if self.damage.get(&pba).is_some_and(|damage| damage.since < written) {
            self.damage.remove(&pba);
        }
    }

    /// What is wrong with a block.
    #[must_use]
    pub fn at(&self, pba: u64) -> Option<Damage> {
        self.damage.get(&pba).copied()
    }

    /// Whether a block was damaged at some time.
    #[must_use]
    pub fn was_damaged(&self, pba: u64) -> bool {
        self.ever.contains(&pba)
    }

    /// Blocks that are damaged now.
    pub fn damaged_blocks(&self) -> impl Iterator<Item = (u64, Damage)> + '_ {
        self.damage.iter().map(|(&pba, &damage)| (pba, damage))
    }

    /// Whether a read of the block `lba` of some VDI may fail for damage on the medium.
    #[must_use]
    pub fn explains(&self, lba: u64) -> bool {
        self.metadata_is_damaged()
            || self.damage.values().any(|damage| damage.victim == Victim::Data(lba))
    }

    /// Whether metadata, or what may be metadata, is damaged.
    #[must_use]
    pub fn metadata_is_damaged(&self) -> bool {
        self.nodes_damaged > 0 || self.anything_may_be_lost()
    }

    /// Whether something is damaged now of which it is not known what it is.
    #[must_use]
    pub fn anything_may_be_lost(&self) -> bool {
        self.damage.values().any(|damage| damage.victim == Victim::Unknown)
    }

    /// How often the device lost something of the log or of a VDI's data.
    #[must_use]
    pub fn lies(&self) -> u64 {
        self.damaged - self.nodes_damaged
    }

    /// Whether the block `lba` of some VDI may hold an older content after a crash, as the device
    /// lied about a write of it, or of another block of the same record: recovery drops records
    /// whole. A damaged node can be no reason for that: it fails reads.
    #[must_use]
    pub fn may_have_undone(&self, lba: u64) -> bool {
        let near = lba.saturating_sub(RECORD_BLOCKS)..=lba.saturating_add(RECORD_BLOCKS);
        self.anything_may_be_lost() || self.lied_about.range(near).next().is_some()
    }

    /// Everything was compared: what recovery dropped is known.
    pub fn compared(&mut self) {
        self.lied_about.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swarms_differ_and_every_kind_occurs() {
        let mut seen = std::collections::BTreeSet::new();
        let mut quiet = 0;
        for seed in 0..500 {
            let faults = Faults::swarm(&mut Random::new(seed));
            quiet += u32::from(faults == Faults::none());
            seen.extend(faults.kinds());
        }
        assert_eq!(seen.len(), FaultKind::ALL.len());
        assert!((150..350).contains(&quiet), "{quiet} of 500 runs have no faults");
    }

    #[test]
    fn names_parse() {
        for (kind, name) in FaultKind::ALL {
            assert_eq!(FaultKind::parse(name), Some(kind));
            assert_eq!(kind.name(), name);
        }
        assert_eq!(FaultKind::parse("nonsense"), None);
    }

    #[test]
    fn damage_explains_only_what_it_can_reach() {
        let mut medium = crate::medium::Medium::default();
        let mut atlas = Atlas::default();
        assert!(!atlas.explains(5));
        let since = medium.mark();
        let victim = Victim::Data(5);
        atlas.damage(100, Damage { kind: DamageKind::Flipped, victim, since });
        assert!(atlas.explains(5) && !atlas.explains(6));
        assert!(
            atlas.may_have_undone(5) && atlas.may_have_undone(68) && !atlas.may_have_undone(70)
        );
        let victim = Victim::Unknown;
        atlas.damage(200, Damage { kind: DamageKind::Stale, victim, since });
        assert!(atlas.explains(6) && atlas.may_have_undone(6), "it may hide anything");
        atlas.heal(200, since);
        assert!(atlas.explains(6), "it was not written since");
        medium.write(1, 0, 200, &[0; base::BLOCK_SIZE]);
        atlas.heal(200, medium.mark());
        assert!(!atlas.explains(6));
    }

    #[test]
    fn a_damaged_node_excuses_errors_for_ever_and_old_contents_never() {
        let mut medium = crate::medium::Medium::default();
        let mut atlas = Atlas::default();
        let since = medium.mark();
        let victim = Victim::Node;
        atlas.damage(300, Damage { kind: DamageKind::Stale, victim, since });
        assert!(atlas.explains(5) && !atlas.may_have_undone(5));
        medium.write(1, 0, 300, &[0; base::BLOCK_SIZE]);
        atlas.heal(300, medium.mark());
        assert!(atlas.explains(5), "what it named may have been noted as lost");
        assert!(!atlas.anything_may_be_lost());
    }
}
