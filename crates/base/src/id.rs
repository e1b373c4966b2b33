//! Newtypes of addresses, identifiers and counters.

use std::fmt;

macro_rules! newtype {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($inner);

        impl $name {
            /// Wraps a raw value; the caller vouches for its meaning.
            #[must_use]
            pub const fn new(raw: $inner) -> Self {
                Self(raw)
            }

            /// The raw value.
            #[must_use]
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

macro_rules! address {
    ($name:ident) => {
        impl $name {
            /// The address `count` further on. Saturates, so that a hostile value cannot wrap
            /// around into a valid one; bounds are checked where an address is used.
            #[must_use]
            pub const fn plus(self, count: u64) -> Self {
                Self(self.0.saturating_add(count))
            }

            /// How far `self` lies behind `start`; zero if it does not.
            #[must_use]
            pub const fn distance_from(self, start: Self) -> u64 {
                self.0.saturating_sub(start.0)
            }
        }
    };
}

newtype!(
    /// Block address in a VDI, in blocks of 4 KiB.
    Lba(u64)
);
newtype!(
    /// Block address in the blockstore, in blocks of 4 KiB from the start of the device.
    /// At most 40 bits: 4 PiB.
    Pba(u64)
);
newtype!(
    /// Log sequence number: the number of a record in a host's write-ahead log. Rises by one per
    /// record, never goes back; 0 is before every record.
    Lsn(u64)
);
newtype!(
    /// Position of a log block, counted over all laps of the ring; its place is this number
    /// modulo the ring's length.
    RingPosition(u64)
);
newtype!(
    /// Identifies a VDI for ever; never reused.
    VdiId(u64)
);
newtype!(
    /// Fencing epoch of a host: rises whenever a daemon opens the store.
    Epoch(u64)
);
newtype!(
    /// Counts the lock grants under which control structures are written; the highest wins.
    Ballot(u64)
);
newtype!(
    /// Counts the claims of a VDI by hosts.
    ClaimGeneration(u32)
);
newtype!(
    /// Comparable age of a tree entry within one VDI's lineage; see `vdi::checkpoint`.
    BirthLabel(u32)
);
newtype!(
    /// Number of an extent: its first block is this number times the extent's length.
    ExtentIndex(u32)
);
newtype!(
    /// Number of a host slot.
    HostId(u16)
);
newtype!(
    /// Number of a snapshot within its VDI, from 1; the `17` of `web01@17`. Never reused.
    SnapshotNumber(u64)
);

address!(Lba);
address!(Pba);
address!(Lsn);
address!(RingPosition);

/// Identifies a store; fresh at each format, so that nothing of an earlier store on the same
/// device validates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StoreUuid(pub [u8; 16]);

/// Identifies a snapshot in every store that has it: it keeps it when it is sent from one to another.
/// All zeroes: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SnapshotUuid(pub [u8; 16]);

impl SnapshotUuid {
    /// What [`fmt::Display`] has written; hyphens may be anywhere or missing.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 16];
        let mut digits = text.chars().filter(|&c| c != '-').map(|c| c.to_digit(16));
        for byte in &mut bytes {
            let (high, low) = (digits.next()??, digits.next()??);
            *byte = u8::try_from(high << 4 | low).ok()?;
        }
        digits.next().is_none().then_some(Self(bytes))
    }
}

impl fmt::Display for StoreUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_uuid(&self.0, f)
    }
}

impl fmt::Display for SnapshotUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_uuid(&self.0, f)
    }
}

fn write_uuid(bytes: &[u8; 16], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            f.write_str("-")?;
        }
        write!(f, "{byte:02x}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_as_it_is_written() {
        let uuid = SnapshotUuid([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);
        assert_eq!(uuid.to_string(), "00010203-0405-0607-0809-0a0b0c0d0eff");
        assert_eq!(SnapshotUuid::parse(&uuid.to_string()), Some(uuid));
        for nonsense in ["", "0", "x0010203-0405-0607-0809-0a0b0c0d0eff", &format!("{uuid}0")] {
            assert_eq!(SnapshotUuid::parse(nonsense), None, "{nonsense}");
        }
    }
}
