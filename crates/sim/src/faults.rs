//! Which faults a run injects and how often, and the atlas of those that were injected.
//!
//! Swarm testing (Groce et al., ISSTA 2012): a run that injects everything at once dies of the
//! most likely fault and never meets the rare ones. So each seed draws a few kinds, often none,
//! and a rate for each.

use std::collections::BTreeMap;

use crate::medium::Mark;
use crate::random::Random;

/// A kind of fault of the device below the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// A read fails with EIO; the next one may succeed.
    ReadError,
    /// A write fails with EIO, and leaves any mix of old and new sectors in its range.
    WriteError,
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
    pub const ALL: [(Self, &str); 11] = [
        (Self::ReadError, "read-error"),
        (Self::WriteError, "write-error"),
        (Self::FlushError, "flush-error"),
        (Self::NoSpace, "no-space"),
        (Self::Rot, "rot"),
        (Self::Misdirected, "misdirected"),
        (Self::LostWrite, "lost-write"),
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
                FaultKind::FlushError => random.between(1_000, 50_000),
                FaultKind::NoSpace => random.between(1, 1_000_000),
                FaultKind::Rot | FaultKind::Misdirected | FaultKind::LostWrite => {
                    random.between(100, 2_000)
                }
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

/// A block that does not hold what was written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// What is wrong.
    pub kind: DamageKind,
    /// The block of a VDI whose data stands, or should stand, there, if clients' data does.
    /// `None`: metadata, or data that cannot be told from it.
    pub lba: Option<u64>,
    /// What was written later is right again.
    pub since: Mark,
}

/// Everything that was injected: which errors are legitimate, and which are the engine's own.
#[derive(Clone, Debug, Default)]
pub struct Atlas {
    damage: BTreeMap<u64, Damage>,
    counts: BTreeMap<&'static str, u64>,
    /// Errors that the device answered.
    pub errors: u64,
    /// Those of them that were not read errors.
    pub write_side_errors: u64,
    /// Flushes that failed, or caches that vanished: what was not flushed may be lost since.
    pub cache_losses: u64,
    /// Blocks damaged so far.
    pub damaged: u64,
    /// Those of them that did not hold, or should not have held, data of a VDI.
    pub metadata_damaged: u64,
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
        if self.damage.get(&pba).is_some_and(|before| before.lba != damage.lba) {
            // Damaged twice: what stood there may have been either.
            damage.lba = None;
        }
        if damage.lba.is_none() {
            self.metadata_damaged += 1;
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

    /// Blocks that are damaged now.
    pub fn damaged_blocks(&self) -> impl Iterator<Item = (u64, Damage)> + '_ {
        self.damage.iter().map(|(&pba, &damage)| (pba, damage))
    }

    /// Whether a read of the block `lba` of some VDI may fail for damage on the medium.
    #[must_use]
    pub fn explains(&self, lba: u64) -> bool {
        self.damage.values().any(|damage| damage.lba.is_none_or(|hint| hint == lba))
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
        atlas.damage(100, Damage { kind: DamageKind::Flipped, lba: Some(5), since });
        assert!(atlas.explains(5) && !atlas.explains(6));
        atlas.damage(200, Damage { kind: DamageKind::Stale, lba: None, since });
        assert!(atlas.explains(6), "a damaged tree node may hide anything");
        atlas.heal(200, since);
        assert!(atlas.explains(6), "it was not written since");
        medium.write(1, 0, 200, &[0; base::BLOCK_SIZE]);
        atlas.heal(200, medium.mark());
        assert!(!atlas.explains(6));
    }
}
