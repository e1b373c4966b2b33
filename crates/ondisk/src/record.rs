//! Log records: everything that changes a VDI, in the order in which it happened.
//!
//! A record is a header and a body, padded to 8 bytes. The header names the VDI, the generation of
//! its claim, the kind and the total length, so that a reader can tell what it does not know.

use base::{ClaimGeneration, Lba, Lsn, Pba, REQUEST_BLOCKS_MAX, SnapshotNumber, VdiId};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::layout::layout;
use crate::table::{KeepRule, KeepRules, LABEL_BYTES_MAX, NAME_BYTES_MAX, Origin};
use crate::{DecodeError, Until, bounds};

layout! {
    /// Fields of a record's header.
    struct RawHeader as "record header" = RECORD_HEADER_LAYOUT {
        length: U16,
        kind: u8,
        flags: u8,
        claim: U32,
        vdi: U64,
    }
}

const HEADER_BYTES: usize = RECORD_HEADER_LAYOUT.size;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The VDI that it changes.
    pub vdi: VdiId,
    /// Generation of the claim under which it was written.
    pub claim: ClaimGeneration,
    /// What happened.
    pub body: RecordBody,
}

/// What a zeroed range is afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RangeState {
    /// Unmapped: a hole.
    Unmapped = 0,
    /// Zero: reported as allocated.
    Zero = 1,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordBody {
    /// Adjacent blocks were written to adjacent new blocks.
    Write {
        /// First block in the VDI.
        lba: Lba,
        /// First block in the blockstore.
        pba: Pba,
        /// Hash of each block; 1 to 256.
        hashes: Vec<u64>,
    },
    /// A range was discarded or zeroed.
    Range {
        /// First block.
        lba: Lba,
        /// Number of blocks.
        count: u64,
        /// What it is now.
        state: RangeState,
    },
    /// An earlier record does not count: its data could not be written.
    Void {
        /// Which.
        lsn: Lsn,
    },
    /// A snapshot: everything before this record is in.
    Snapshot {
        /// Its number in the VDI.
        number: SnapshotNumber,
        /// Wall time.
        wall_ns: u64,
        /// Time that the store has been open.
        store_ns: u64,
        /// Its label; empty for none.
        label: String,
        /// How it came to be.
        origin: Origin,
    },
    /// A snapshot was deleted.
    DeleteSnapshot {
        /// Which.
        number: SnapshotNumber,
    },
    /// The VDI was created, empty.
    Create {
        /// Size in blocks.
        block_count: u64,
        /// Wall time.
        wall_ns: u64,
        /// Its name.
        name: String,
    },
    /// The VDI was created as a clone.
    Clone {
        /// Of which VDI.
        source: VdiId,
        /// Of which snapshot; 0: of the VDI as it was at this record.
        snapshot: SnapshotNumber,
        /// Of which position that the snapshot keeps; `None`: of its own.
        position: Option<Lsn>,
        /// Wall time.
        wall_ns: u64,
        /// Its name.
        name: String,
    },
    /// The VDI has a new name.
    Rename {
        /// The name.
        name: String,
    },
    /// The VDI has a new size; what lay beyond a smaller one is unmapped.
    Resize {
        /// Size in blocks.
        block_count: u64,
    },
    /// The VDI and its snapshots were deleted.
    Delete,
    /// The VDI became what a snapshot of it was.
    Rollback {
        /// Which.
        number: SnapshotNumber,
        /// At which position that it keeps; `None`: at its own.
        position: Option<Lsn>,
    },
    /// The VDI became what a snapshot of another VDI is.
    Adopt {
        /// Which VDI.
        source: VdiId,
        /// Which snapshot of it.
        number: SnapshotNumber,
    },
    /// Other moments of the VDI are kept by themselves.
    Retain {
        /// Which. `None`: what the store has for such VDIs.
        rules: Option<KeepRules>,
    },
    /// A snapshot is held from here on: it is not deleted until that ends.
    Hold {
        /// Which.
        number: SnapshotNumber,
        /// Wall time.
        wall_ns: u64,
        /// Time that the store has been open.
        store_ns: u64,
        /// When the hold ends by itself, if it does.
        until: Option<Until>,
    },
    /// The hold of a snapshot ended.
    EndHold {
        /// Of which.
        number: SnapshotNumber,
        /// Wall time.
        wall_ns: u64,
        /// Time that the store has been open.
        store_ns: u64,
        /// Whether its time had come; else somebody wanted it to end.
        is_due: bool,
    },
    /// Other moments are kept of VDIs that have no rules of their own. Of no VDI.
    RetainByDefault {
        /// Which.
        rules: KeepRules,
    },
    /// A time mark.
    Time {
        /// Wall time.
        wall_ns: u64,
        /// Time that the store has been open.
        store_ns: u64,
    },
}

// Kinds on disk. Reserved for hosts that share a device: 12 checkpoint, 13 seal, 14 claim,
// 15 release.
const WRITE: u8 = 1;
const RANGE: u8 = 2;
const VOID: u8 = 3;
const SNAPSHOT: u8 = 4;
const DELETE_SNAPSHOT: u8 = 5;
const CREATE: u8 = 6;
const CLONE: u8 = 7;
const RENAME: u8 = 8;
const RESIZE: u8 = 9;
const DELETE: u8 = 10;
const ROLLBACK: u8 = 11;
const TIME: u8 = 16;
const ADOPT: u8 = 17;
const RETAIN: u8 = 18;
const HOLD: u8 = 19;
const END_HOLD: u8 = 20;
const RETAIN_BY_DEFAULT: u8 = 21;
const CLONE_AT: u8 = 22;
const ROLLBACK_AT: u8 = 23;

/// Flag of a record by which a VDI has no rules of its own.
const INHERITED: u8 = 1;

/// Flag of a record of rules with a budget, which stands before them.
const BUDGET: u8 = 2;

/// Flag of a record by which a hold ended because its time had come.
const DUE: u8 = 1;

impl Record {
    /// Bytes that the record takes in a log block.
    #[must_use]
    pub fn encoded_bytes(&self) -> usize {
        let body = match &self.body {
            RecordBody::Write { hashes, .. } => 16 + 8 * hashes.len(),
            RecordBody::Range { .. } => 17,
            RecordBody::Snapshot { label, origin, .. } => {
                let origin_bytes = if *origin == Origin::Asked { 0 } else { Origin::BYTES };
                24 + label.len() + 2 + origin_bytes
            }
            RecordBody::Create { name, .. } => 16 + name.len() + 2,
            RecordBody::Clone { position, name, .. } => {
                24 + position_bytes(*position) + name.len() + 2
            }
            RecordBody::Rename { name } => name.len() + 2,
            RecordBody::Retain { rules } => rules.as_ref().map_or(0, bytes_of_rules),
            RecordBody::RetainByDefault { rules } => bytes_of_rules(rules),
            RecordBody::Hold { .. } => 40,
            RecordBody::EndHold { .. } => 24,
            RecordBody::Time { .. } | RecordBody::Adopt { .. } => 16,
            RecordBody::Rollback { position, .. } => 8 + position_bytes(*position),
            RecordBody::Void { .. }
            | RecordBody::DeleteSnapshot { .. }
            | RecordBody::Resize { .. } => 8,
            RecordBody::Delete => 0,
        };
        (HEADER_BYTES + body).next_multiple_of(8)
    }

    /// Appends the encoded record.
    ///
    /// # Panics
    /// If it names more blocks than [`Self::decode`] takes: what cannot be replayed must not be
    /// acknowledged.
    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        let start = into.len();
        let length = self.encoded_bytes();
        let header = RawHeader {
            length: u16::try_from(length).unwrap_or(u16::MAX).into(),
            kind: self.kind(),
            flags: match &self.body {
                RecordBody::Snapshot { origin, .. } => origin.flags(),
                RecordBody::Retain { rules: None } => INHERITED,
                RecordBody::Retain { rules: Some(rules) }
                | RecordBody::RetainByDefault { rules }
                    if rules.budget.is_some() =>
                {
                    BUDGET
                }
                RecordBody::EndHold { is_due: true, .. } => DUE,
                _ => 0,
            },
            claim: self.claim.get().into(),
            vdi: self.vdi.get().into(),
        };
        into.extend_from_slice(header.as_bytes());
        let mut word = |value: u64| into.extend_from_slice(&value.to_le_bytes());
        match &self.body {
            RecordBody::Write { lba, pba, hashes } => {
                assert!((1..=REQUEST_BLOCKS_MAX).contains(&hashes.len()));
                word(lba.get());
                word(pba.get());
                hashes.iter().for_each(|&hash| word(hash));
            }
            RecordBody::Range { lba, count, state } => {
                word(lba.get());
                word(*count);
                into.push(*state as u8);
            }
            RecordBody::Void { lsn } => word(lsn.get()),
            RecordBody::Snapshot { number, wall_ns, store_ns, label, origin } => {
                word(number.get());
                word(*wall_ns);
                word(*store_ns);
                encode_text(label, into);
                if *origin != Origin::Asked {
                    into.extend_from_slice(&origin.to_bytes());
                }
            }
            RecordBody::DeleteSnapshot { number } => word(number.get()),
            RecordBody::Rollback { number, position } => {
                word(number.get());
                position.iter().for_each(|position| word(position.get()));
            }
            RecordBody::Create { block_count, wall_ns, name } => {
                word(*block_count);
                word(*wall_ns);
                encode_text(name, into);
            }
            RecordBody::Clone { source, snapshot, position, wall_ns, name } => {
                word(source.get());
                word(snapshot.get());
                position.iter().for_each(|position| word(position.get()));
                word(*wall_ns);
                encode_text(name, into);
            }
            RecordBody::Rename { name } => encode_text(name, into),
            RecordBody::Resize { block_count } => word(*block_count),
            RecordBody::Delete => {}
            RecordBody::Retain { rules } => {
                rules.iter().for_each(|rules| encode_rules(rules, into));
            }
            RecordBody::RetainByDefault { rules } => encode_rules(rules, into),
            RecordBody::Hold { number, wall_ns, store_ns, until } => {
                let [until_wall_ns, until_store_ns] = Until::words(*until);
                let words = [number.get(), *wall_ns, *store_ns, until_wall_ns, until_store_ns];
                words.into_iter().for_each(word);
            }
            RecordBody::EndHold { number, wall_ns, store_ns, is_due: _ } => {
                [number.get(), *wall_ns, *store_ns].into_iter().for_each(word);
            }
            RecordBody::Time { wall_ns, store_ns } => {
                word(*wall_ns);
                word(*store_ns);
            }
            RecordBody::Adopt { source, number } => {
                word(source.get());
                word(number.get());
            }
        }
        into.resize(start + length, 0);
    }

    fn kind(&self) -> u8 {
        match self.body {
            RecordBody::Write { .. } => WRITE,
            RecordBody::Range { .. } => RANGE,
            RecordBody::Void { .. } => VOID,
            RecordBody::Snapshot { .. } => SNAPSHOT,
            RecordBody::DeleteSnapshot { .. } => DELETE_SNAPSHOT,
            RecordBody::Create { .. } => CREATE,
            RecordBody::Clone { position: None, .. } => CLONE,
            RecordBody::Clone { position: Some(_), .. } => CLONE_AT,
            RecordBody::Rename { .. } => RENAME,
            RecordBody::Resize { .. } => RESIZE,
            RecordBody::Delete => DELETE,
            RecordBody::Rollback { position: None, .. } => ROLLBACK,
            RecordBody::Rollback { position: Some(_), .. } => ROLLBACK_AT,
            RecordBody::Time { .. } => TIME,
            RecordBody::Adopt { .. } => ADOPT,
            RecordBody::Retain { .. } => RETAIN,
            RecordBody::Hold { .. } => HOLD,
            RecordBody::EndHold { .. } => END_HOLD,
            RecordBody::RetainByDefault { .. } => RETAIN_BY_DEFAULT,
        }
    }

    /// Decodes the first record of `bytes`; returns the rest too.
    ///
    /// # Errors
    /// `Invalid` for lengths, numbers and ranges out of bounds, unknown kinds and texts that are no
    /// UTF-8.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let (header, _) =
            RawHeader::ref_from_prefix(bytes).map_err(|_| DecodeError::Invalid("record length"))?;
        let length = usize::from(header.length.get());
        let (record, rest) =
            bytes.split_at_checked(length).ok_or(DecodeError::Invalid("record length"))?;
        let mut reader =
            Reader(record.get(HEADER_BYTES..).ok_or(DecodeError::Invalid("record length"))?);
        let body = match header.kind {
            WRITE => {
                let (lba, pba) = (reader.word()?, reader.word()?);
                let count = reader.0.len() / 8;
                if count == 0 || count > REQUEST_BLOCKS_MAX {
                    return Err(DecodeError::Invalid("write record length"));
                }
                let blocks = count as u64;
                let lba = Lba::new(bounds::run(lba, blocks, "written range")?);
                let pba = Pba::new(bounds::run(pba, blocks, "block address")?);
                let hashes = (0..count).map(|_| reader.word()).collect::<Result<_, _>>()?;
                RecordBody::Write { lba, pba, hashes }
            }
            RANGE => {
                let (lba, count) = (reader.word()?, reader.word()?);
                let lba = Lba::new(bounds::run(lba, count, "discarded range")?);
                let state = match reader.0.first() {
                    Some(0) => RangeState::Unmapped,
                    Some(1) => RangeState::Zero,
                    _ => return Err(DecodeError::Invalid("range state")),
                };
                RecordBody::Range { lba, count, state }
            }
            VOID => RecordBody::Void { lsn: Lsn::new(reader.word()?) },
            SNAPSHOT => RecordBody::Snapshot {
                number: reader.snapshot()?,
                wall_ns: reader.word()?,
                store_ns: reader.word()?,
                label: reader.text(LABEL_BYTES_MAX)?,
                origin: reader.origin(header.flags),
            },
            DELETE_SNAPSHOT => RecordBody::DeleteSnapshot { number: reader.snapshot()? },
            CREATE => RecordBody::Create {
                block_count: bounds::vdi_size(reader.word()?)?,
                wall_ns: reader.word()?,
                name: reader.text(NAME_BYTES_MAX)?,
            },
            kind @ (CLONE | CLONE_AT) => RecordBody::Clone {
                source: VdiId::new(reader.word()?),
                snapshot: reader.snapshot()?,
                position: if kind == CLONE_AT { Some(reader.position()?) } else { None },
                wall_ns: reader.word()?,
                name: reader.text(NAME_BYTES_MAX)?,
            },
            RENAME => RecordBody::Rename { name: reader.text(NAME_BYTES_MAX)? },
            RESIZE => RecordBody::Resize { block_count: bounds::vdi_size(reader.word()?)? },
            DELETE => RecordBody::Delete,
            kind @ (ROLLBACK | ROLLBACK_AT) => RecordBody::Rollback {
                number: reader.snapshot()?,
                position: if kind == ROLLBACK_AT { Some(reader.position()?) } else { None },
            },
            RETAIN => {
                let is_inherited = header.flags & INHERITED != 0;
                let rules = match is_inherited {
                    true => None,
                    false => Some(reader.rules(header.flags)?),
                };
                RecordBody::Retain { rules }
            }
            RETAIN_BY_DEFAULT => RecordBody::RetainByDefault { rules: reader.rules(header.flags)? },
            HOLD => RecordBody::Hold {
                number: reader.snapshot()?,
                wall_ns: reader.word()?,
                store_ns: reader.word()?,
                until: Until::of(reader.word()?, reader.word()?),
            },
            END_HOLD => RecordBody::EndHold {
                number: reader.snapshot()?,
                wall_ns: reader.word()?,
                store_ns: reader.word()?,
                is_due: header.flags & DUE != 0,
            },
            TIME => RecordBody::Time { wall_ns: reader.word()?, store_ns: reader.word()? },
            ADOPT => {
                RecordBody::Adopt { source: VdiId::new(reader.word()?), number: reader.snapshot()? }
            }
            _ => return Err(DecodeError::Invalid("record kind")),
        };
        let vdi = bounds::below(header.vdi.get(), bounds::RECORD_NUMBER_END, "VDI id")?;
        let vdi = VdiId::new(vdi);
        let claim = ClaimGeneration::new(header.claim.get());
        Ok((Self { vdi, claim, body }, rest))
    }
}

/// Bytes of a position, if there is one.
fn position_bytes(position: Option<Lsn>) -> usize {
    8 * usize::from(position.is_some())
}

fn encode_text(text: &str, into: &mut Vec<u8>) {
    into.extend_from_slice(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes());
    into.extend_from_slice(text.as_bytes());
}

fn bytes_of_rules(rules: &KeepRules) -> usize {
    rules.rules.len() * KeepRule::BYTES + if rules.budget.is_some() { 8 } else { 0 }
}

fn encode_rules(rules: &KeepRules, into: &mut Vec<u8>) {
    if let Some(budget) = rules.budget {
        into.extend_from_slice(&budget.get().to_le_bytes());
    }
    rules.rules.iter().for_each(|rule| into.extend_from_slice(&rule.to_bytes()));
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn word(&mut self) -> Result<u64, DecodeError> {
        let (word, rest) =
            self.0.split_first_chunk::<8>().ok_or(DecodeError::Invalid("record length"))?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*word))
    }

    fn snapshot(&mut self) -> Result<SnapshotNumber, DecodeError> {
        let number = bounds::below(self.word()?, bounds::RECORD_NUMBER_END, "snapshot number")?;
        Ok(SnapshotNumber::new(number))
    }

    fn position(&mut self) -> Result<Lsn, DecodeError> {
        Ok(Lsn::new(bounds::below(self.word()?, bounds::COUNTER_END, "position")?))
    }

    fn text(&mut self, bytes_max: usize) -> Result<String, DecodeError> {
        let (length, rest) =
            self.0.split_first_chunk::<2>().ok_or(DecodeError::Invalid("record length"))?;
        let length = usize::from(u16::from_le_bytes(*length));
        let text = rest.get(..length).filter(|_| length <= bytes_max);
        let text = text.ok_or(DecodeError::Invalid("text length"))?;
        self.0 = rest.get(length..).unwrap_or_default();
        let text = std::str::from_utf8(text).map_err(|_| DecodeError::Invalid("text"))?;
        Ok(text.to_owned())
    }

    fn rules(&mut self, flags: u8) -> Result<KeepRules, DecodeError> {
        let budget = match flags & BUDGET {
            0 => 0,
            _ => match self.word()? {
                0 => return Err(DecodeError::Invalid("budget")),
                budget => budget,
            },
        };
        KeepRules::decode(self.0, budget)
    }

    /// What is behind a label: padding is shorter.
    fn origin(&self, flags: u8) -> Origin {
        self.0.first_chunk().map_or(Origin::Asked, |&bytes| Origin::from_bytes(flags, bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use base::SnapshotUuid;

    use super::*;
    use crate::{BLOCKS_MAX, COUNTER_END, RECORD_NUMBER_END};

    fn rules(budget: Option<NonZeroU64>) -> KeepRules {
        KeepRules { rules: vec![KeepRule { every_ms: 0, for_s: 3600 }], budget }
    }

    fn samples() -> Vec<RecordBody> {
        vec![
            RecordBody::Write { lba: Lba::new(9), pba: Pba::new(100), hashes: vec![1, 2, 3] },
            RecordBody::Write { lba: Lba::new(0), pba: Pba::new(1), hashes: vec![7; 256] },
            RecordBody::Range { lba: Lba::new(5), count: 1 << 32, state: RangeState::Zero },
            RecordBody::Void { lsn: Lsn::new(4) },
            RecordBody::Snapshot {
                number: SnapshotNumber::new(17),
                wall_ns: 1,
                store_ns: 2,
                label: "before upgrade".into(),
                origin: Origin::Asked,
            },
            RecordBody::Snapshot {
                number: SnapshotNumber::new(18),
                wall_ns: 1,
                store_ns: 2,
                label: "received".into(),
                origin: Origin::Received(SnapshotUuid([7; 16])),
            },
            RecordBody::Snapshot {
                number: SnapshotNumber::new(19),
                wall_ns: 1,
                store_ns: 2,
                label: String::new(),
                origin: Origin::Kept { changed_blocks: 0 },
            },
            RecordBody::Retain { rules: Some(rules(None)) },
            RecordBody::Retain { rules: Some(rules(NonZeroU64::new(20 << 30))) },
            RecordBody::Retain { rules: Some(KeepRules::default()) },
            RecordBody::Retain { rules: None },
            RecordBody::RetainByDefault { rules: rules(None) },
            RecordBody::RetainByDefault { rules: rules(Some(NonZeroU64::MAX)) },
            RecordBody::Hold {
                number: SnapshotNumber::new(17),
                wall_ns: 1,
                store_ns: 2,
                until: Some(Until { wall_ns: 3, store_ns: 4 }),
            },
            RecordBody::Hold {
                number: SnapshotNumber::new(17),
                wall_ns: 1,
                store_ns: 2,
                until: None,
            },
            RecordBody::EndHold {
                number: SnapshotNumber::new(17),
                wall_ns: 1,
                store_ns: 2,
                is_due: true,
            },
            RecordBody::DeleteSnapshot { number: SnapshotNumber::new(17) },
            RecordBody::Create { block_count: 8, wall_ns: 3, name: "web01".into() },
            RecordBody::Clone {
                source: VdiId::new(1),
                snapshot: SnapshotNumber::new(0),
                position: None,
                wall_ns: 4,
                name: "web02".into(),
            },
            RecordBody::Clone {
                source: VdiId::new(1),
                snapshot: SnapshotNumber::new(17),
                position: Some(Lsn::new(108)),
                wall_ns: 4,
                name: "fix".into(),
            },
            RecordBody::Rename { name: "x".into() },
            RecordBody::Resize { block_count: 16 },
            RecordBody::Delete,
            RecordBody::Rollback { number: SnapshotNumber::new(2), position: None },
            RecordBody::Rollback { number: SnapshotNumber::new(2), position: Some(Lsn::new(9)) },
            RecordBody::Time { wall_ns: 5, store_ns: 6 },
            RecordBody::Adopt { source: VdiId::new(9), number: SnapshotNumber::new(2) },
        ]
    }

    #[test]
    fn records_round_trip() {
        for body in samples() {
            let record = Record { vdi: VdiId::new(3), claim: ClaimGeneration::new(2), body };
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            assert_eq!(bytes.len(), record.encoded_bytes(), "{record:?}");
            assert!(bytes.len() <= crate::LOG_PAYLOAD_BYTES);
            bytes.push(0xee);
            assert_eq!(Record::decode(&bytes), Ok((record, &[0xee][..])));
        }
    }

    #[test]
    fn records_that_name_what_no_vdi_has_are_refused() {
        let check = |vdi: u64, body: RecordBody, accepted: bool| {
            let record = Record { vdi: VdiId::new(vdi), claim: ClaimGeneration::new(2), body };
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            assert_eq!(Record::decode(&bytes).is_ok(), accepted, "{record:?}");
        };
        let write = |lba: u64, pba: u64, count: usize| RecordBody::Write {
            lba: Lba::new(lba),
            pba: Pba::new(pba),
            hashes: vec![1; count],
        };
        let range = |lba: u64, count: u64| RecordBody::Range {
            lba: Lba::new(lba),
            count,
            state: RangeState::Unmapped,
        };
        let end = BLOCKS_MAX;
        for (body, accepted) in [
            (write(end - 2, end - 2, 2), true),
            (write(end - 1, 0, 1), true),
            (write(end - 1, 0, 2), false),
            (write(0, end - 1, 2), false),
            (write(u64::MAX, 0, 1), false),
            (write(0, u64::MAX, 1), false),
            (range(0, end), true),
            (range(1, end), false),
            (range(1, u64::MAX), false),
        ] {
            check(1, body, accepted);
        }
        for (block_count, accepted) in
            [(0, false), (1, true), (end, true), (end + 1, false), (u64::MAX, false)]
        {
            check(1, RecordBody::Resize { block_count }, accepted);
            check(1, RecordBody::Create { block_count, wall_ns: 0, name: "a".into() }, accepted);
        }
        for (number, accepted) in [(RECORD_NUMBER_END - 1, true), (u64::MAX, false)] {
            check(number, RecordBody::Delete, accepted);
            let number = SnapshotNumber::new(number);
            check(1, RecordBody::Rollback { number, position: None }, accepted);
        }
        for (position, accepted) in [(COUNTER_END - 1, true), (COUNTER_END, false)] {
            let (number, position) = (SnapshotNumber::new(1), Some(Lsn::new(position)));
            check(1, RecordBody::Rollback { number, position }, accepted);
            let (source, name) = (VdiId::new(1), "a".to_owned());
            let clone = RecordBody::Clone { source, snapshot: number, position, wall_ns: 0, name };
            check(2, clone, accepted);
        }
    }

    #[test]
    fn budgets_that_make_no_sense_are_refused() {
        let decode = |budget: Option<u64>, rules: &[u64]| {
            let words: Vec<u64> = budget.into_iter().chain(rules.iter().copied()).collect();
            let length = u16::try_from(HEADER_BYTES + 8 * words.len()).unwrap();
            let flags = if budget.is_some() { BUDGET } else { 0 };
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend([RETAIN, flags, 1, 0, 0, 0]);
            bytes.extend(3u64.to_le_bytes());
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            Record::decode(&bytes).map(|(record, _)| record.body)
        };
        let rule = 3600 << 32;
        let body = |rules| Ok(RecordBody::Retain { rules: Some(rules) });
        assert_eq!(decode(None, &[rule]), body(rules(None)));
        assert_eq!(decode(Some(4096), &[rule]), body(rules(NonZeroU64::new(4096))));
        assert_eq!(decode(Some(0), &[rule]), Err(DecodeError::Invalid("budget")));
        assert_eq!(decode(Some(1), &[]), Err(DecodeError::Invalid("budget without rules")));
        assert_eq!(decode(Some(1), &[0]), Err(DecodeError::Invalid("budget without rules")));
    }

    #[test]
    fn cut_or_altered_records_are_refused_or_decoded_but_never_panic() {
        for body in samples() {
            let record = Record { vdi: VdiId::new(3), claim: ClaimGeneration::new(2), body };
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            for length in 0..bytes.len() {
                assert!(Record::decode(&bytes[..length]).is_err(), "{record:?} cut to {length}");
            }
            for position in 0..bytes.len().min(64) {
                for flip in [1, 0x80, 0xff] {
                    let mut altered = bytes.clone();
                    altered[position] ^= flip;
                    let _ = Record::decode(&altered);
                }
            }
        }
    }
}
