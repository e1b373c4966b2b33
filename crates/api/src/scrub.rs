//! Scrub: how it stands, and what it found.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Begins a pass of scrub, or sets the rate of the one that is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BeginScrub {
    /// Bytes to read in a second, from now on; 0 for no limit. `None` leaves it as it is.
    #[serde(default)]
    pub rate_bytes: Option<u64>,
}

/// Checks a store that a daemon serves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BeginCheck {
    /// Whether data is read too: by scrub, at its rate.
    #[serde(default)]
    pub read_data: bool,
    /// As [`BeginScrub::rate_bytes`].
    #[serde(default)]
    pub rate_bytes: Option<u64>,
    /// A number of the client's own, by which it asks how far this check is.
    #[serde(default)]
    pub token: u64,
    /// Where ledgers of holds ended when somebody noted it, as `web01=2:3f9a…`: an error if one does not hold that
    /// any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ledgers: Vec<String>,
}

/// How far a check of a store that is served is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckStatus {
    /// What it is at, in a word or two; empty if none of this token is under way.
    pub stage: String,
    /// So much of it is done; 0 where nothing is counted.
    pub done: u64,
    /// Of so much, as far as is known.
    pub total: u64,
}

/// How scrub stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Number of the newest pass; 0 if none was begun since the daemon opened the store.
    pub pass: u64,
    /// Whether it is under way.
    pub running: bool,
    /// Bytes that it may read in a second; 0 for no limit.
    pub rate_bytes: u64,
    /// For how many milliseconds it has been running.
    pub elapsed_ms: u64,
    /// Bytes in use when it began that are done: read, or freed meanwhile.
    pub done_bytes: u64,
    /// Bytes in use when it began.
    pub total_bytes: u64,
    /// Bytes that it has read.
    pub read_bytes: u64,
    /// Damaged blocks that it has found.
    pub damaged_blocks: u64,
    /// When the daemon begins the next one by itself; `None` if it does not.
    #[serde(default)]
    pub next: Option<Timestamp>,
    /// The last pass that ended since the daemon opened the store.
    pub last: Option<ScrubReport>,
}

/// What a pass did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// Its number since the daemon opened the store.
    pub pass: u64,
    /// When it began.
    pub began: Timestamp,
    /// When it ended.
    pub ended: Timestamp,
    /// How it ended.
    pub end: ScrubEnd,
    /// Why it could not go on, if it failed.
    pub why: Option<String>,
    /// Bytes that it read and verified.
    pub read_bytes: u64,
    /// Damaged blocks that it found.
    pub damaged_blocks: u64,
    /// Where they are: the first thousand places.
    pub damages: Vec<ScrubDamage>,
    /// More places than are listed.
    pub damages_omitted: u64,
}

/// How a pass ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScrubEnd {
    /// Everything was read.
    Finished,
    /// Somebody ended it.
    Stopped,
    /// It could not go on.
    Failed,
}

/// Damaged blocks next to each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubDamage {
    /// What is damaged.
    pub kind: ScrubDamageKind,
    /// The first block of the store.
    pub block: u64,
    /// How many there are.
    pub block_count: u64,
    /// First byte of the disks that is hit; 0 for a table.
    pub offset: u64,
    /// Number of bytes that are; 0 for a table.
    pub length: u64,
    /// Whether the device cannot read them; else they do not verify.
    pub unreadable: bool,
    /// Whose they are; the first few disks.
    pub owners: Vec<ScrubOwner>,
    /// More disks than are listed.
    pub owners_omitted: u64,
    /// One sentence for people.
    pub message: String,
}

/// What is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScrubDamageKind {
    /// Data.
    Data,
    /// A tree node: what is below it cannot be read.
    Node,
    /// A table of the store, or a history of snapshots.
    Table,
}

/// A disk that has a damaged block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubOwner {
    /// Identity of the disk.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Whether the disk as it is now has it.
    pub head: bool,
    /// Numbers of its snapshots that have it; the first few.
    pub snapshots: Vec<u64>,
    /// More snapshots than are listed.
    pub snapshots_omitted: u64,
}
