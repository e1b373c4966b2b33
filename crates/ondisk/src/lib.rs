//! Every persistent structure: fixed little-endian layouts, encoding, decoding, validation. Pure:
//! no I/O, no clock. docs/on-disk-format.md holds the same tables; a test compares them.
//!
//! Two kinds of structure (design rule 40):
//! - *self-validating* ones (superblock, host slot, heartbeat, log block) end in a checksum seeded
//!   with the store's uuid, their type, address, epoch and sequence;
//! - all others (tree nodes, pages, data) are verified by the hash in the parent that names them.
//!
//! Decoding takes arbitrary bytes: it returns an error or a value in bounds, and never panics.

mod bounds;
mod checksum;
mod entry;
mod host_slot;
mod layout;
mod ledger;
mod log;
mod record;
mod superblock;
mod table;

pub use bounds::{BLOCKS_MAX, COUNTER_END, RECORD_NUMBER_END};
pub use checksum::{Checksums, StructureKind};
pub use entry::{Entry, EntryState, FANOUT, FANOUT_BITS, HEIGHT_MAX, Node, RootRef};
pub use host_slot::{
    HEARTBEAT_LAYOUT, HOST_SLOT_LAYOUT, Heartbeat, HostSlot, LOG_SEGMENT_LAYOUT, LOG_SEGMENTS_MAX,
    LogSegment, Roots, SlotState,
};
pub use layout::{Field, Layout};
pub use ledger::{Digest, LEDGER_LAYOUT, LEDGER_RECORDS_MAX, LedgerKind, LedgerRecord, Until};
pub use log::{LOG_BLOCK_LAYOUT, LOG_PAYLOAD_BYTES, LogBlock, LogBlockBuilder, Seal};
pub use record::{RECORD_HEADER_LAYOUT, RangeState, Record, RecordBody};
pub use superblock::{
    COMPATIBLE_KEEPS_SPACE, Features, INCOMPATIBLE_HISTORY, INCOMPATIBLE_HOLDS,
    INCOMPATIBLE_WRITES, KNOWN_INCOMPATIBLE, KNOWN_READ_ONLY_COMPATIBLE,
    READ_ONLY_COMPATIBLE_BUDGETS, SUPERBLOCK_COPIES, SUPERBLOCK_LAYOUT, Superblock,
};
pub use table::{
    DIRECTORY_LAYOUT, DirectoryRecord, EXTENT_LAYOUT, ExtentKind, ExtentRecord,
    HISTORY_VERSIONS_MAX, History, KEEP_RULE_LAYOUT, KEEP_RULES_MAX, KeepRule, KeepRules,
    LABEL_BYTES_MAX, NAME_BYTES_MAX, Origin, SNAPSHOT_LAYOUT, SnapshotRecord, TableRecord,
    VDI_LAYOUT, VERSION_LAYOUT, VdiRecord, VersionRecord,
};

/// Why bytes are not the structure that they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The checksum does not match: torn, rotten, misdirected, or of another store or epoch.
    #[error("checksum mismatch")]
    Checksum,
    /// Not the magic number of this structure: probably something else altogether.
    #[error("no magic number of this structure")]
    Magic,
    /// The bytes verify, yet break a rule of the format: a newer version, or a bug.
    #[error("{0} is out of bounds")]
    Invalid(&'static str),
}

/// All layouts, for the test that compares them with the documentation.
pub const LAYOUTS: &[Layout] = &[
    SUPERBLOCK_LAYOUT,
    HOST_SLOT_LAYOUT,
    LOG_SEGMENT_LAYOUT,
    HEARTBEAT_LAYOUT,
    LOG_BLOCK_LAYOUT,
    RECORD_HEADER_LAYOUT,
    DIRECTORY_LAYOUT,
    VDI_LAYOUT,
    KEEP_RULE_LAYOUT,
    SNAPSHOT_LAYOUT,
    VERSION_LAYOUT,
    LEDGER_LAYOUT,
    EXTENT_LAYOUT,
];
