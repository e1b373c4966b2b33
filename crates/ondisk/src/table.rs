//! Records of the metadata tables. A table is a tree whose pages hold fixed-size records; pages
//! are verified by the hash in the tree, so that records need no checksum of their own.

use std::num::NonZeroU64;

use base::{
    BLOCK_SIZE, BirthLabel, Block, ClaimGeneration, Epoch, HostId, Lsn, Pba, SnapshotNumber,
    SnapshotUuid, VdiId,
};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::bounds::{BLOCKS_MAX, COUNTER_END, RECORD_NUMBER_END, below, vdi_size};
use crate::layout::layout;
use crate::ledger::Digest;
use crate::{DecodeError, Entry, EntryState, RootRef};

/// Longest name of a VDI in bytes.
pub const NAME_BYTES_MAX: usize = 191;

/// Longest label of a snapshot in bytes.
pub const LABEL_BYTES_MAX: usize = 127;

/// Most versions of one history: 2 MiB of them.
pub const HISTORY_VERSIONS_MAX: u32 = 1 << 16;

/// A record of fixed size in a page of a table. All-zero bytes mean: no record.
pub trait TableRecord: Sized {
    /// Bytes per record; a divisor of the page size.
    const BYTES: usize;

    /// Encodes into `BYTES` bytes.
    fn encode(&self, into: &mut [u8]);

    /// Decodes `BYTES` bytes; `None` if there is no record.
    ///
    /// # Errors
    /// `Invalid` if the record makes no sense.
    fn decode(bytes: &[u8]) -> Result<Option<Self>, DecodeError>;

    /// Its number in the table, of a record that says it.
    fn number(&self) -> Option<u64> {
        None
    }

    /// Records per page.
    const PER_PAGE: u64 = (BLOCK_SIZE / Self::BYTES) as u64;

    /// The record at `index` of the table that `page` is the right page of.
    ///
    /// # Errors
    /// As [`Self::decode`]; `Invalid` if the record belongs in another place.
    fn get(page: &Block, index: u64) -> Result<Option<Self>, DecodeError> {
        let start = usize::try_from(index % Self::PER_PAGE).unwrap_or(0) * Self::BYTES;
        let record = Self::decode(page.0.get(start..start + Self::BYTES).unwrap_or_default())?;
        match record.as_ref().and_then(Self::number) {
            Some(number) if number != index => Err(DecodeError::Invalid("place of a record")),
            _ => Ok(record),
        }
    }

    /// Stores `record` at `index` of the table that `page` is the right page of; `None` clears.
    fn set(page: &mut Block, index: u64, record: Option<&Self>) {
        let start = usize::try_from(index % Self::PER_PAGE).unwrap_or(0) * Self::BYTES;
        let bytes = page.0.get_mut(start..start + Self::BYTES).unwrap_or_default();
        match record {
            Some(record) => record.encode(bytes),
            None => bytes.fill(0),
        }
    }
}

layout! {
    /// Fields of a directory record.
    struct RawDirectory as "directory record" = DIRECTORY_LAYOUT {
        id: U64,
        parent: U64,
        parent_snapshot: U64,
        created_ns: U64,
        claim: U32,
        owner: U16,
        flags: U16,
        reserved: [u8; 24],
        name: [u8; NAME_BYTES_MAX],
        name_length: u8,
    }
}

/// Most rules of a VDI's retention.
pub const KEEP_RULES_MAX: usize = 6;

layout! {
    /// Fields of a rule of a VDI's retention.
    struct RawKeepRule as "keep rule" = KEEP_RULE_LAYOUT {
        every_ms: U32,
        for_s: U32,
    }
}

layout! {
    /// Fields of a VDI record.
    struct RawVdi as "VDI record" = VDI_LAYOUT {
        id: U64,
        block_count: U64,
        root: [u8; RootRef::BYTES],
        lsn: U64,
        claim: U32,
        label: U32,
        shared_up_to: U32,
        flags: U32,
        snapshots: [u8; RootRef::BYTES],
        snapshot_next: U64,
        snapshot_count: U64,
        ledger: [u8; RootRef::BYTES],
        rollbacks: U64,
        retention: [u8; KEEP_RULES_MAX * KEEP_RULE_LAYOUT.size],
        ledger_head: [u8; Digest::BYTES],
        ledger_count: U32,
        budget: U64,
        reserved: [u8; 4],
    }
}

layout! {
    /// Fields of a snapshot record.
    struct RawSnapshot as "snapshot record" = SNAPSHOT_LAYOUT {
        number: U64,
        position: U64,
        claim: U32,
        last_version: U16,
        flags: U16,
        root: [u8; RootRef::BYTES],
        block_count: U64,
        wall_ns: U64,
        store_ns: U64,
        label: [u8; LABEL_BYTES_MAX],
        label_length: u8,
        versions: [u8; RootRef::BYTES],
        origin: [u8; 16],
    }
}

layout! {
    /// Fields of a version record.
    struct RawVersion as "version record" = VERSION_LAYOUT {
        block: U64,
        lsn: U64,
        entry: [u8; 16],
    }
}

layout! {
    /// Fields of an extent record.
    struct RawExtent as "extent record" = EXTENT_LAYOUT {
        kind: u8,
        state: u8,
        owner: U16,
        reserved: U32,
        epoch: U64,
    }
}

const _: () = assert!(DIRECTORY_LAYOUT.size == 256);
const _: () = assert!(VDI_LAYOUT.size == 256);
const _: () = assert!(SNAPSHOT_LAYOUT.size == 256);
const _: () = assert!(VERSION_LAYOUT.size == 32);
const _: () = assert!(EXTENT_LAYOUT.size == 16);

/// What rarely changes about a VDI; in the control tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryRecord {
    /// Identity for ever; the index in the table. Not 0.
    pub id: VdiId,
    /// The VDI that it was cloned from; 0 for none.
    pub parent: VdiId,
    /// The snapshot of it; 0 if it was cloned while running.
    pub parent_snapshot: SnapshotNumber,
    /// Wall time of its creation.
    pub created_ns: u64,
    /// Generation of its claim.
    pub claim: ClaimGeneration,
    /// The host that has claimed it.
    pub owner: HostId,
    /// Its name.
    pub name: String,
}

impl TableRecord for DirectoryRecord {
    const BYTES: usize = DIRECTORY_LAYOUT.size;

    fn number(&self) -> Option<u64> {
        Some(self.id.get())
    }

    fn encode(&self, into: &mut [u8]) {
        let (name, name_length) = base::fixed_text(&self.name);
        let raw = RawDirectory {
            id: self.id.get().into(),
            parent: self.parent.get().into(),
            parent_snapshot: self.parent_snapshot.get().into(),
            created_ns: self.created_ns.into(),
            claim: self.claim.get().into(),
            owner: self.owner.get().into(),
            flags: 0.into(),
            reserved: [0; 24],
            name,
            name_length,
        };
        into.copy_from_slice(raw.as_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Option<Self>, DecodeError> {
        let raw = RawDirectory::ref_from_bytes(bytes)
            .map_err(|_| DecodeError::Invalid("directory record"))?;
        if raw.id.get() == 0 {
            return Ok(None);
        }
        Ok(Some(Self {
            id: VdiId::new(below(raw.id.get(), RECORD_NUMBER_END, "VDI id")?),
            parent: VdiId::new(raw.parent.get()),
            parent_snapshot: SnapshotNumber::new(raw.parent_snapshot.get()),
            created_ns: raw.created_ns.get(),
            claim: ClaimGeneration::new(raw.claim.get()),
            owner: HostId::new(raw.owner.get()),
            name: decode_text(&raw.name, raw.name_length)?,
        }))
    }
}

/// A VDI as its owner host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdiRecord {
    /// Identity; the index in the table. Not 0.
    pub id: VdiId,
    /// Size in blocks.
    pub block_count: u64,
    /// The tree of its head.
    pub root: RootRef,
    /// The tree contains all of its records up to here.
    pub lsn: Lsn,
    /// Generation of the claim under which the tree was written.
    pub claim: ClaimGeneration,
    /// Newest birth label that its entries carry.
    pub label: BirthLabel,
    /// Entries with births up to here may be shared with a snapshot or a clone. Never decreases.
    pub shared_up_to: BirthLabel,
    /// Its snapshots: a table of [`SnapshotRecord`]s by number.
    pub snapshots: RootRef,
    /// Number of its next snapshot.
    pub snapshot_next: SnapshotNumber,
    /// Number of snapshots that exist.
    pub snapshot_count: u64,
    /// Its ledger: a table of [`crate::LedgerRecord`]s without gaps.
    pub ledger: RootRef,
    /// Chain of the ledger's last record.
    pub ledger_head: Digest,
    /// How many they are: [`crate::LEDGER_RECORDS_MAX`] at most, unless who wrote it lies.
    pub ledger_count: u32,
    /// How often it was rolled back or shrunk.
    pub rollbacks: u64,
    /// Which moments of it are kept by themselves. `None`: what the store has for such VDIs.
    pub retention: Option<KeepRules>,
    /// Whether some of its snapshots were made by a retention, this one or an earlier one.
    pub has_moments: bool,
}

/// Flag of a VDI with moments.
const HAS_MOMENTS: u32 = 1;

/// Flag of a VDI of which no moments are kept, whatever the store keeps of others.
const KEEPS_NONE: u32 = 2;

/// Which moments are kept by themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeepRules {
    /// At most [`KEEP_RULES_MAX`], none for none.
    pub rules: Vec<KeepRule>,
    /// Bytes that they may hold, if that is bounded; not without rules.
    pub budget: Option<NonZeroU64>,
}

impl KeepRules {
    /// What stands in a record: its rules, and a budget, 0 for none.
    pub(crate) fn decode(rules: &[u8], budget: u64) -> Result<Self, DecodeError> {
        let rules = KeepRule::all_of(rules);
        let budget = NonZeroU64::new(budget);
        if budget.is_some() && rules.is_empty() {
            return Err(DecodeError::Invalid("budget without rules"));
        }
        Ok(Self { rules, budget })
    }

    /// The budget as it stands in a record.
    pub(crate) fn raw_budget(&self) -> u64 {
        self.budget.map_or(0, NonZeroU64::get)
    }

    /// Whether nothing is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }
}

/// One rule of a retention: of the moments that are at most so old, one of each interval is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepRule {
    /// The interval in milliseconds; 0: every one; [`Self::EVERY_WRITE`]: what lies between them, too.
    pub every_ms: u32,
    /// The age in seconds of store time; not 0.
    pub for_s: u32,
}

impl KeepRule {
    /// In place of an interval: each write can be opened.
    pub const EVERY_WRITE: u32 = u32::MAX;

    pub(crate) const BYTES: usize = KEEP_RULE_LAYOUT.size;

    pub(crate) fn to_bytes(self) -> [u8; Self::BYTES] {
        let raw = RawKeepRule { every_ms: self.every_ms.into(), for_s: self.for_s.into() };
        let mut bytes = [0; Self::BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// Some rules, as they stand in a record.
    pub(crate) fn list_to_bytes(rules: &[Self]) -> [u8; KEEP_RULES_MAX * Self::BYTES] {
        let mut bytes = [0; KEEP_RULES_MAX * Self::BYTES];
        for (place, rule) in bytes.chunks_exact_mut(Self::BYTES).zip(rules) {
            place.copy_from_slice(&rule.to_bytes());
        }
        bytes
    }

    /// The rules that stand in `bytes`, up to one that is none.
    pub(crate) fn all_of(bytes: &[u8]) -> Vec<Self> {
        let (rules, _) = bytes.as_chunks::<{ Self::BYTES }>();
        let rules = rules.iter().filter_map(|bytes| RawKeepRule::read_from_bytes(bytes).ok());
        let rules = rules.map(|raw| Self { every_ms: raw.every_ms.get(), for_s: raw.for_s.get() });
        rules.take_while(|rule| rule.for_s != 0).take(KEEP_RULES_MAX).collect()
    }
}

impl TableRecord for VdiRecord {
    const BYTES: usize = VDI_LAYOUT.size;

    fn number(&self) -> Option<u64> {
        Some(self.id.get())
    }

    fn encode(&self, into: &mut [u8]) {
        let keeps_none = self.retention.as_ref().is_some_and(KeepRules::is_empty);
        let rules = self.retention.as_ref().map(|retention| retention.rules.as_slice());
        let retention = KeepRule::list_to_bytes(rules.unwrap_or_default());
        let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
        let flags = flag(self.has_moments, HAS_MOMENTS) | flag(keeps_none, KEEPS_NONE);
        let raw = RawVdi {
            id: self.id.get().into(),
            block_count: self.block_count.into(),
            root: self.root.to_bytes(),
            lsn: self.lsn.get().into(),
            claim: self.claim.get().into(),
            label: self.label.get().into(),
            shared_up_to: self.shared_up_to.get().into(),
            flags: flags.into(),
            snapshots: self.snapshots.to_bytes(),
            snapshot_next: self.snapshot_next.get().into(),
            snapshot_count: self.snapshot_count.into(),
            ledger: self.ledger.to_bytes(),
            rollbacks: self.rollbacks.into(),
            retention,
            ledger_head: self.ledger_head.0,
            ledger_count: self.ledger_count.into(),
            budget: self.retention.as_ref().map_or(0, KeepRules::raw_budget).into(),
            reserved: [0; 4],
        };
        into.copy_from_slice(raw.as_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Option<Self>, DecodeError> {
        let raw = RawVdi::ref_from_bytes(bytes).map_err(|_| DecodeError::Invalid("VDI record"))?;
        if raw.id.get() == 0 {
            return Ok(None);
        }
        let has = |flag: u32| raw.flags.get() & flag != 0;
        let rules = KeepRules::decode(&raw.retention, raw.budget.get())?;
        Ok(Some(Self {
            id: VdiId::new(below(raw.id.get(), RECORD_NUMBER_END, "VDI id")?),
            block_count: vdi_size(raw.block_count.get())?,
            root: RootRef::from_bytes(raw.root)?,
            lsn: Lsn::new(below(raw.lsn.get(), COUNTER_END, "record number")?),
            claim: ClaimGeneration::new(raw.claim.get()),
            label: BirthLabel::new(raw.label.get()),
            shared_up_to: BirthLabel::new(raw.shared_up_to.get()),
            snapshots: RootRef::from_bytes(raw.snapshots)?,
            snapshot_next: snapshot_number(raw.snapshot_next)?,
            snapshot_count: raw.snapshot_count.get(),
            ledger: RootRef::from_bytes(raw.ledger)?,
            ledger_head: Digest(raw.ledger_head),
            ledger_count: raw.ledger_count.get(),
            rollbacks: raw.rollbacks.get(),
            retention: (!rules.is_empty() || has(KEEPS_NONE)).then_some(rules),
            has_moments: has(HAS_MOMENTS),
        }))
    }
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRecord {
    /// Number within the VDI; the index in the table. Not 0.
    pub number: SnapshotNumber,
    /// Log position: what has a lower LSN is in.
    pub position: Lsn,
    /// Claim generation of that position.
    pub claim: ClaimGeneration,
    /// Its tree, or the one that its history changes.
    pub root: RootRef,
    /// What had changed since that tree was made; `None` if it is the snapshot's own.
    pub history: Option<History>,
    /// Size of the VDI then, in blocks.
    pub block_count: u64,
    /// Wall time.
    pub wall_ns: u64,
    /// Time that the store had been open.
    pub store_ns: u64,
    /// Its label; empty for none.
    pub label: String,
    /// How it came to be.
    pub origin: Origin,
    /// Whether it is held: it must not be deleted.
    pub is_held: bool,
    /// Of one that a retention made: from this position on, up to its own, the VDI can be opened as it
    /// was at each, as no version between was left out of the history.
    pub writes_from: Option<Lsn>,
}

/// How a snapshot came to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// Somebody asked for it.
    #[default]
    Asked,
    /// It was received from another store, where it is known by this.
    Received(SnapshotUuid),
    /// The VDI's retention did.
    Kept {
        /// Blocks that were changed since the one before that came so.
        changed_blocks: u64,
    },
}

/// Flag of a snapshot that a retention made, in tables and in the log.
pub(crate) const KEPT: u8 = 1;

/// Flag of a snapshot that is held, in tables.
const HELD: u8 = 2;

impl Origin {
    /// Bytes that one takes in a record.
    pub const BYTES: usize = 16;

    pub(crate) fn flags(self) -> u8 {
        if matches!(self, Self::Kept { .. }) { KEPT } else { 0 }
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::BYTES] {
        match self {
            Self::Asked => [0; Self::BYTES],
            Self::Received(uuid) => uuid.0,
            Self::Kept { changed_blocks } => u128::from(changed_blocks).to_le_bytes(),
        }
    }

    pub(crate) fn from_bytes(flags: u8, bytes: [u8; Self::BYTES]) -> Self {
        let [b0, b1, b2, b3, b4, b5, b6, b7, ..] = bytes;
        match bytes {
            _ if flags & KEPT != 0 => {
                let changed_blocks = u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]);
                Self::Kept { changed_blocks }
            }
            bytes if bytes == [0; Self::BYTES] => Self::Asked,
            bytes => Self::Received(SnapshotUuid(bytes)),
        }
    }
}

/// The versions that blocks had while several snapshots were taken of a VDI. All these snapshots
/// have it in common: what of it has an LSN below a snapshot's position is in the snapshot, the newest
/// of a block counts, and of a block that has none a tree tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct History {
    /// A table of [`VersionRecord`]s, by block and then by LSN, without gaps.
    pub versions: RootRef,
    /// How many they are: 1 to [`HISTORY_VERSIONS_MAX`].
    pub count: u32,
}

impl History {
    fn decode(versions: [u8; RootRef::BYTES], last: u16) -> Result<Option<Self>, DecodeError> {
        if last == 0 && versions == [0; RootRef::BYTES] {
            return Ok(None);
        }
        let versions = RootRef::from_bytes(versions)?;
        if versions.entry.state() != EntryState::Mapped {
            return Err(DecodeError::Invalid("history of a snapshot"));
        }
        Ok(Some(Self { versions, count: u32::from(last) + 1 }))
    }

    /// Where it stands.
    #[must_use]
    pub fn at(&self) -> Pba {
        self.versions.entry.pba()
    }

    fn last(&self) -> u16 {
        u16::try_from(self.count.saturating_sub(1)).unwrap_or(u16::MAX)
    }
}

/// A version of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionRecord {
    /// Which block of the VDI.
    pub block: u64,
    /// The record that made it so; not 0.
    pub lsn: Lsn,
    /// What stood there.
    pub entry: Entry,
}

impl TableRecord for VersionRecord {
    const BYTES: usize = VERSION_LAYOUT.size;

    fn encode(&self, into: &mut [u8]) {
        let raw = RawVersion {
            block: self.block.into(),
            lsn: self.lsn.get().into(),
            entry: self.entry.to_bytes(),
        };
        into.copy_from_slice(raw.as_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Option<Self>, DecodeError> {
        let raw = RawVersion::ref_from_bytes(bytes)
            .map_err(|_| DecodeError::Invalid("version record"))?;
        if raw.lsn.get() == 0 {
            return Ok(None);
        }
        let entry = Entry::from_bytes(raw.entry);
        if !entry.is_valid() {
            return Err(DecodeError::Invalid("entry of a version"));
        }
        let block = below(raw.block.get(), BLOCKS_MAX, "block of a version")?;
        let lsn = Lsn::new(below(raw.lsn.get(), COUNTER_END, "LSN of a version")?);
        Ok(Some(Self { block, lsn, entry }))
    }
}

impl TableRecord for SnapshotRecord {
    const BYTES: usize = SNAPSHOT_LAYOUT.size;

    fn number(&self) -> Option<u64> {
        Some(self.number.get())
    }

    fn encode(&self, into: &mut [u8]) {
        let (label, label_length) = base::fixed_text(&self.label);
        let raw = RawSnapshot {
            number: self.number.get().into(),
            position: self.position.get().into(),
            claim: self.claim.get().into(),
            last_version: self.history.map_or(0, |history| history.last()).into(),
            flags: u16::from(self.origin.flags() | if self.is_held { HELD } else { 0 }).into(),
            root: self.root.to_bytes(),
            block_count: self.block_count.into(),
            wall_ns: self.wall_ns.into(),
            store_ns: self.store_ns.into(),
            label,
            label_length,
            versions: self
                .history
                .map_or([0; RootRef::BYTES], |history| history.versions.to_bytes()),
            origin: self.raw_origin(),
        };
        into.copy_from_slice(raw.as_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Option<Self>, DecodeError> {
        let raw = RawSnapshot::ref_from_bytes(bytes)
            .map_err(|_| DecodeError::Invalid("snapshot record"))?;
        if raw.number.get() == 0 {
            return Ok(None);
        }
        let [flags, _] = raw.flags.get().to_le_bytes();
        Ok(Some(Self {
            number: snapshot_number(raw.number)?,
            position: Lsn::new(below(raw.position.get(), COUNTER_END, "snapshot position")?),
            claim: ClaimGeneration::new(raw.claim.get()),
            root: RootRef::from_bytes(raw.root)?,
            history: History::decode(raw.versions, raw.last_version.get())?,
            block_count: vdi_size(raw.block_count.get())?,
            wall_ns: raw.wall_ns.get(),
            store_ns: raw.store_ns.get(),
            label: decode_text(&raw.label, raw.label_length)?,
            origin: Origin::from_bytes(flags, raw.origin),
            is_held: flags & HELD != 0,
            writes_from: writes_from(flags, raw.origin, raw.position.get())?,
        }))
    }
}

impl SnapshotRecord {
    /// Where it came from, and behind that of one that a retention made, from where on its writes are kept.
    fn raw_origin(&self) -> [u8; Origin::BYTES] {
        let mut origin = self.origin.to_bytes();
        if let (Origin::Kept { .. }, Some(from)) = (self.origin, self.writes_from)
            && let Some(place) = origin.last_chunk_mut()
        {
            *place = from.get().to_le_bytes();
        }
        origin
    }
}

fn writes_from(
    flags: u8,
    origin: [u8; Origin::BYTES],
    position: u64,
) -> Result<Option<Lsn>, DecodeError> {
    let from = origin.last_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    if flags & KEPT == 0 || from == 0 {
        return Ok(None);
    }
    below(from, position.saturating_add(1), "first position of a snapshot")
        .map(|at| Some(Lsn::new(at)))
}

/// What an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExtentKind {
    /// Superblock and slots.
    System = 1,
    /// Data blocks.
    Data = 2,
    /// Tree nodes and table pages.
    Metadata = 3,
    /// Log rings.
    Log = 4,
}

/// An extent that is in use; a free one has no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentRecord {
    /// What it holds.
    pub kind: ExtentKind,
    /// The host that owns it.
    pub owner: HostId,
    /// Epoch of that host in which it took the extent.
    pub epoch: Epoch,
}

impl TableRecord for ExtentRecord {
    const BYTES: usize = EXTENT_LAYOUT.size;

    fn encode(&self, into: &mut [u8]) {
        let raw = RawExtent {
            kind: self.kind as u8,
            state: 0,
            owner: self.owner.get().into(),
            reserved: 0.into(),
            epoch: self.epoch.get().into(),
        };
        into.copy_from_slice(raw.as_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Option<Self>, DecodeError> {
        let raw =
            RawExtent::ref_from_bytes(bytes).map_err(|_| DecodeError::Invalid("extent record"))?;
        let kind = match raw.kind {
            0 => return Ok(None),
            1 => ExtentKind::System,
            2 => ExtentKind::Data,
            3 => ExtentKind::Metadata,
            4 => ExtentKind::Log,
            _ => return Err(DecodeError::Invalid("extent kind")),
        };
        let owner = HostId::new(raw.owner.get());
        Ok(Some(Self { kind, owner, epoch: Epoch::new(raw.epoch.get()) }))
    }
}

fn snapshot_number(raw: U64) -> Result<SnapshotNumber, DecodeError> {
    below(raw.get(), RECORD_NUMBER_END, "snapshot number").map(SnapshotNumber::new)
}

fn decode_text(bytes: &[u8], length: u8) -> Result<String, DecodeError> {
    let text = bytes.get(..usize::from(length)).ok_or(DecodeError::Invalid("text length"))?;
    let text = std::str::from_utf8(text).map_err(|_| DecodeError::Invalid("text"))?;
    Ok(text.to_owned())
}
