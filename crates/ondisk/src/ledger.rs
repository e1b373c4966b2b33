//! The ledger of a VDI: a record of each hold that one of its snapshots was under, and of each end of one,
//! chained by a cryptographic hash. Whoever has noted the head of the chain elsewhere can tell
//! whether what stands before it was changed since.
//!
//! The first record of a ledger has the number 1 and is chained to the store and the VDI; or it says
//! that those before it are there no more ([`LedgerKind::Folded`], [`LedgerKind::Lost`]), and what they
//! were chained up to.

use std::fmt;

use base::{SnapshotNumber, StoreUuid, VdiId};
use sha2::{Digest as _, Sha256};
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, IntoBytes};

use crate::bounds::{RECORD_NUMBER_END, below};
use crate::layout::layout;
use crate::{DecodeError, SnapshotRecord, TableRecord};

/// Most records of a ledger; before, those of holds that have ended are folded into one.
pub const LEDGER_RECORDS_MAX: usize = 4096;

layout! {
    /// Fields of a record of a ledger.
    struct RawLedger as "ledger record" = LEDGER_LAYOUT {
        sequence: U64,
        number: U64,
        wall_ns: U64,
        store_ns: U64,
        until_wall_ns: U64,
        until_store_ns: U64,
        kind: u8,
        reserved: [u8; 15],
        digest: [u8; Digest::BYTES],
        chain: [u8; Digest::BYTES],
    }
}

const _: () = assert!(LEDGER_LAYOUT.size == 128);

/// SHA-256 of something.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Digest(pub [u8; Self::BYTES]);

impl Digest {
    pub(crate) const BYTES: usize = 32;

    fn of(parts: &[&[u8]]) -> Self {
        let mut hasher = Sha256::new();
        for part in parts {
            hasher.update(part);
        }
        Self(hasher.finalize().into())
    }

    /// Parses 64 hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut digest = Self::default();
        if text.len() != 2 * Self::BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        for (byte, at) in digest.0.iter_mut().zip((0..text.len()).step_by(2)) {
            *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
        }
        Some(digest)
    }

    /// What the first record of a VDI's ledger is chained to.
    #[must_use]
    pub fn origin(store: StoreUuid, vdi: VdiId) -> Self {
        Self::of(&[b"parallax ledger", &store.0, &vdi.get().to_le_bytes()])
    }

    /// Of all that never changes about a snapshot: of its contents what its tree's root says, which
    /// must be the snapshot's own.
    #[must_use]
    pub fn of_snapshot(snapshot: &SnapshotRecord) -> Self {
        let numbers = [
            snapshot.number.get(),
            snapshot.position.get(),
            u64::from(snapshot.claim.get()),
            snapshot.block_count,
            snapshot.wall_ns,
            snapshot.store_ns,
            snapshot.root.hash,
            u64::from(snapshot.root.height),
            u64::from(snapshot.origin.flags()),
        ];
        let numbers = numbers.map(u64::to_le_bytes);
        let origin = snapshot.origin.to_bytes();
        Self::of(&[
            b"parallax snapshot",
            numbers.as_flattened(),
            &origin,
            snapshot.label.as_bytes(),
        ])
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// When a hold ends by itself: when both clocks say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Until {
    /// Wall time; not 0.
    pub wall_ns: u64,
    /// Time that the store has been open.
    pub store_ns: u64,
}

impl Until {
    pub(crate) fn of(wall_ns: u64, store_ns: u64) -> Option<Self> {
        (wall_ns != 0).then_some(Self { wall_ns, store_ns })
    }

    pub(crate) fn words(until: Option<Self>) -> [u64; 2] {
        until.map_or([0; 2], |until| [until.wall_ns, until.store_ns])
    }
}

/// What a record of a ledger tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum LedgerKind {
    /// A snapshot is held from here on, or until another time than before.
    Held = 1,
    /// Somebody ended the hold of a snapshot.
    Released = 2,
    /// The hold of a snapshot ended by itself: its time had come.
    Ended = 3,
    /// Earlier records were folded: what still held stands behind.
    Folded = 4,
    /// As [`Self::Folded`], but earlier records were lost to damage.
    Lost = 5,
}

impl LedgerKind {
    /// Whether it stands for records that are there no more.
    #[must_use]
    pub fn stands_for_others(self) -> bool {
        matches!(self, Self::Folded | Self::Lost)
    }
}

/// A record of a ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LedgerRecord {
    /// Its number, from 1; rises by one from record to record.
    pub sequence: u64,
    /// What it tells.
    pub kind: LedgerKind,
    /// Of which snapshot; 0 if it stands for other records.
    pub number: SnapshotNumber,
    /// Wall time.
    pub wall_ns: u64,
    /// Time that the store had been open.
    pub store_ns: u64,
    /// When a hold ends by itself, if it does.
    pub until: Option<Until>,
    /// Of a hold, [`Digest::of_snapshot`]; of what stands for others, the chain of the last of them.
    pub digest: Digest,
    /// SHA-256 of the chain of the record before, and of this record without its chain.
    pub chain: Digest,
}

impl LedgerRecord {
    /// What it has to be chained to say, behind a record with the chain `previous`.
    #[must_use]
    pub fn chained_to(&self, previous: Digest) -> Digest {
        let raw = self.raw();
        let own = raw.as_bytes().get(..LEDGER_LAYOUT.size - Digest::BYTES).unwrap_or_default();
        Digest::of(&[&previous.0, own])
    }

    fn raw(&self) -> RawLedger {
        let [until_wall_ns, until_store_ns] = Until::words(self.until);
        RawLedger {
            sequence: self.sequence.into(),
            number: self.number.get().into(),
            wall_ns: self.wall_ns.into(),
            store_ns: self.store_ns.into(),
            until_wall_ns: until_wall_ns.into(),
            until_store_ns: until_store_ns.into(),
            kind: self.kind as u8,
            reserved: [0; 15],
            digest: self.digest.0,
            chain: self.chain.0,
        }
    }
}

impl TableRecord for LedgerRecord {
    const BYTES: usize = LEDGER_LAYOUT.size;

    fn encode(&self, into: &mut [u8]) {
        into.copy_from_slice(self.raw().as_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Option<Self>, DecodeError> {
        let raw =
            RawLedger::ref_from_bytes(bytes).map_err(|_| DecodeError::Invalid("ledger record"))?;
        if raw.sequence.get() == 0 {
            return Ok(None);
        }
        let kind = match raw.kind {
            1 => LedgerKind::Held,
            2 => LedgerKind::Released,
            3 => LedgerKind::Ended,
            4 => LedgerKind::Folded,
            5 => LedgerKind::Lost,
            _ => return Err(DecodeError::Invalid("kind of a ledger record")),
        };
        let sequence = below(raw.sequence.get(), RECORD_NUMBER_END, "number of a ledger record")?;
        let number = below(raw.number.get(), RECORD_NUMBER_END, "snapshot number")?;
        Ok(Some(Self {
            sequence,
            kind,
            number: SnapshotNumber::new(number),
            wall_ns: raw.wall_ns.get(),
            store_ns: raw.store_ns.get(),
            until: Until::of(raw.until_wall_ns.get(), raw.until_store_ns.get()),
            digest: Digest(raw.digest),
            chain: Digest(raw.chain),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> LedgerRecord {
        LedgerRecord {
            sequence: 7,
            kind: LedgerKind::Held,
            number: SnapshotNumber::new(3),
            wall_ns: 4,
            store_ns: 5,
            until: Until::of(6, 7),
            digest: Digest([8; 32]),
            chain: Digest([9; 32]),
        }
    }

    #[test]
    fn records_round_trip_and_nonsense_is_refused() {
        let mut bytes = [0; LedgerRecord::BYTES];
        assert_eq!(LedgerRecord::decode(&bytes), Ok(None));
        for until in [None, Until::of(6, 7)] {
            let record = LedgerRecord { until, ..record() };
            record.encode(&mut bytes);
            assert_eq!(LedgerRecord::decode(&bytes), Ok(Some(record)));
        }
        bytes[48] = 6;
        assert!(LedgerRecord::decode(&bytes).is_err());
        assert!(LedgerRecord::decode(&bytes[1..]).is_err());
    }

    /// SHA-256 over the chain before, and the record's bytes but for its own.
    #[test]
    fn every_byte_of_a_record_is_chained() {
        let mut bytes = [0; LedgerRecord::BYTES];
        record().encode(&mut bytes);
        let previous = Digest([1; 32]);
        let chain = record().chained_to(previous);
        let by_hand = Sha256::digest([previous.0.as_slice(), &bytes[..96]].concat());
        assert_eq!(chain.0.as_slice(), by_hand.as_slice());
        assert_ne!(record().chained_to(Digest([2; 32])), chain);
        for at in (0..96).filter(|at| !(49..64).contains(at)) {
            let mut altered = bytes;
            altered[at] ^= 1;
            if let Ok(Some(altered)) = LedgerRecord::decode(&altered) {
                assert_ne!(altered.chained_to(previous), chain, "byte {at}");
            }
        }
        let empty = Digest::of(&[]).to_string();
        assert_eq!(&empty[..16], "e3b0c44298fc1c14", "SHA-256 of nothing");
    }
}
