//! What a check of a store found, as it is printed.

use serde::{Deserialize, Serialize};

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// Whether nothing is wrong; after a repair, whether nothing is wrong any more.
    pub clean: bool,
    /// Whether the store had been closed cleanly; else its log is replayed when it is opened.
    pub closed_cleanly: bool,
    /// What is wrong; the first thousand.
    pub errors: Vec<Finding>,
    /// More errors than are listed.
    pub errors_omitted: u64,
    /// What is unusual, but within what a store promises; the first thousand.
    pub warnings: Vec<Finding>,
    /// More warnings than are listed.
    pub warnings_omitted: u64,
    /// What was repaired, one sentence each.
    pub repairs: Vec<String>,
    /// Counters.
    pub counts: CheckCounts,
}

/// One thing that a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What it concerns.
    pub kind: FindingKind,
    /// Block of the store, if it is one.
    pub block: Option<u64>,
    /// One sentence for people.
    pub message: String,
}

/// What a finding concerns; see `vdi::check::FindingKind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "explained where they are found")]
pub enum FindingKind {
    Superblock,
    HostSlot,
    Log,
    Metadata,
    Data,
    ReachedButFree,
    BitmapBlockLive,
    WrongExtent,
    NamedTwice,
    Record,
    Ledger,
    HeldMissing,
    HeldAltered,
}

/// What a check counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckCounts {
    /// VDIs.
    pub vdis: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// Blocks of metadata that are in use.
    pub metadata_blocks: u64,
    /// Blocks of data that are in use.
    pub data_blocks: u64,
    /// Of these, the ones that were read and verified.
    pub data_blocks_verified: u64,
    /// Blocks that count as used, but that nothing uses: garbage collection frees them.
    pub leaked_blocks: u64,
    /// Blocks that were retired after failed writes.
    pub bad_blocks: u64,
    /// Blocks of VDIs whose contents were lost to damage found earlier.
    pub lost_entries: u64,
    /// Log records that the next start replays.
    pub log_records: u64,
    /// Of these, the ones that no flush covered: each counts only if its data has arrived.
    pub log_records_doubtful: u64,
}
