//! Random numbers of a run: small, the same on every machine, and split into independent streams,
//! so that taking one kind of fault away does not change what the clients do.

/// A stream of random numbers. Not for secrets.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // xorshift must not start at zero; mixing spreads small seeds.
        Self(mix(seed ^ 0x9e37_79b9_7f4a_7c15).max(1))
    }

    /// An independent stream; `purpose` says which.
    #[must_use]
    pub fn split(seed: u64, purpose: &str) -> Self {
        let mut state = seed;
        for byte in purpose.bytes() {
            state = mix(state ^ u64::from(byte));
        }
        Self::new(state)
    }

    /// Any number (xorshift64*, Vigna 2016).
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`; 0 if that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The low bits of a product are the weak ones.
        (self.number() >> 8) % bound.max(1)
    }

    /// An index below `bound`; 0 if that is 0.
    pub fn index(&mut self, bound: usize) -> usize {
        to_usize(self.below(to_u64(bound)))
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low).saturating_add(1))
    }

    /// A number from 1 to `high`, small ones as likely as large ones of any magnitude.
    pub fn magnitude(&mut self, high: u64) -> u64 {
        let bits = self.below(u64::from(64 - high.max(1).leading_zeros()) + 1);
        (1u64 << bits.min(62)).saturating_add(self.below(1 << bits.min(62))).min(high.max(1))
    }

    /// True `per_mille` times in a thousand.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    /// True `rate` times in a million.
    pub fn rarely(&mut self, per_million: u32) -> bool {
        per_million > 0 && self.below(1_000_000) < u64::from(per_million)
    }

    /// One of `choices`, by weight; the last one if all weights are 0.
    pub fn weighted<T: Copy>(&mut self, choices: &[(u32, T)]) -> Option<T> {
        let total: u64 = choices.iter().map(|&(weight, _)| u64::from(weight)).sum();
        let mut at = self.below(total);
        for &(weight, choice) in choices {
            if at < u64::from(weight) {
                return Some(choice);
            }
            at -= u64::from(weight);
        }
        choices.last().map(|&(_, choice)| choice)
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> Option<T> {
        choices.get(self.index(choices.len())).copied()
    }
}

/// Mixes all bits of `x` into all bits (the finaliser of splitmix64).
#[must_use]
pub const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A length as `u64`; exact on the machines that we run on.
#[must_use]
pub fn to_u64(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// A count as `usize`; saturates where it does not fit.
#[must_use]
pub fn to_usize(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_and_differ() {
        let take = |mut random: Random| (0..100).map(|_| random.number()).collect::<Vec<_>>();
        assert_eq!(take(Random::split(7, "device")), take(Random::split(7, "device")));
        assert_ne!(take(Random::split(7, "device")), take(Random::split(7, "clients")));
        assert_ne!(take(Random::split(7, "device")), take(Random::split(8, "device")));
    }

    #[test]
    fn bounds_hold() {
        let mut random = Random::new(1);
        for bound in [1u64, 2, 3, 1000, 1 << 40] {
            for _ in 0..1000 {
                assert!(random.below(bound) < bound);
                assert!((1..=bound).contains(&random.magnitude(bound)));
                assert!((bound..=bound + 2).contains(&random.between(bound, bound + 2)));
            }
        }
        assert_eq!(random.below(0), 0);
    }
}
