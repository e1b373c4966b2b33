//! Check: whether everything that a store promised is there.
//!
//! Reads the superblock copies, the host slots, the log, and everything that the published roots
//! reach; writes nothing unless it is asked to repair. What it holds the store to:
//! - every node, page and, if asked, data block that is reached verifies against its parent;
//! - what is reached lies in an extent of its kind, and the bitmaps know it: a block that is
//!   reached and free would be overwritten;
//! - a block that an entry has for itself is named once; nothing is named as two things;
//! - the older slot's trees are intact too: they are what the loss of the newer one leaves;
//! - the log is whole up to where it promised to be, and its records name nobody else's blocks;
//! - tables agree: directory and VDIs, VDIs and their snapshots;
//! - held snapshots are there, and what they were when they were held, and the ledger that says so is whole.
//!
//! Blocks that the bitmaps hold and nothing reaches are leaked: counted, no error; garbage
//! collection frees them.
//!
//! It knows nothing of overlays and the running engine: nobody may use the store meanwhile. `online.rs` has
//! the same walk look at what one checkpoint of a store in use has published.

mod audit;
mod examine;
mod ledger;
mod online;
mod repair;

use base::{ErrorKind, Pba};
use device::Device;
use ondisk::{Digest, RECORD_NUMBER_END};
use runtime::Runtime;

use crate::Error;

/// How to check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckOptions {
    /// Repair what can be repaired; see [`check`].
    pub repair: bool,
    /// Read and verify data blocks too, not only metadata.
    pub read_data: bool,
    /// Identity of this boot; see [`crate::OpenOptions::boot_id`].
    pub boot_id: [u8; 16],
    /// Random nonce of the epoch in which a repair writes.
    pub nonce: u64,
}

/// The head of a VDI's ledger of holds as somebody noted it: what stands up to there must not have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotedHead {
    /// Name of the VDI.
    pub vdi: String,
    /// Number of the record, from 1.
    pub record: u64,
    /// Its chain.
    pub digest: Digest,
}

impl NotedHead {
    /// Parses `web01=2:3f9a…`: the name of the VDI, and its ledger's head as it is shown.
    ///
    /// # Errors
    /// `Invalid`, with what would be right.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let parts = text.rsplit_once('=').and_then(|(vdi, head)| {
            let (record, digits) = head.split_once(':')?;
            Some((vdi, record.parse().ok()?, Digest::parse(digits)?))
        });
        let is_head = |&(vdi, record, _): &(&str, u64, Digest)| {
            !vdi.is_empty() && (1..RECORD_NUMBER_END).contains(&record)
        };
        let (vdi, record, digest) = parts.filter(is_head).ok_or_else(|| {
            let message = format!(
                "'{text}' is not where a ledger ended: write the disk and what `hold` or `info` showed, as \
                 web01=2:3f9a…, with all 64 digits"
            );
            Error::refused(ErrorKind::Invalid, message)
        })?;
        Ok(Self { vdi: vdi.to_owned(), record, digest })
    }
}

/// What a check is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckStage {
    /// The log.
    Log,
    /// Tables and bitmaps.
    Tables,
    /// VDIs and snapshots; `done` and `total` count blocks.
    Vdis,
    /// The older slot's trees.
    OlderSlot,
    /// Data, by scrub; `done` and `total` count blocks.
    Data,
    /// Writing repairs.
    Repair,
}

/// How far a check is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckProgress {
    /// What it is at.
    pub stage: CheckStage,
    /// So much of it is done; 0 where nothing is counted.
    pub done: u64,
    /// Of so much, as far as is known.
    pub total: u64,
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindingKind {
    /// A superblock copy.
    Superblock,
    /// A copy of the host slot.
    HostSlot,
    /// The log.
    Log,
    /// A tree node or a table page that does not verify or cannot be read.
    Metadata,
    /// A data block that does not verify or cannot be read.
    Data,
    /// A block that is reached, but that the bitmaps say is free.
    ReachedButFree,
    /// A block of the bitmaps' own that is marked as reached.
    BitmapBlockLive,
    /// A block in an extent of another kind, or in one that nobody owns.
    WrongExtent,
    /// A block that is named as two things, or by two that each have it for themselves.
    NamedTwice,
    /// A record or an entry that makes no sense, or disagrees with another.
    Record,
    /// The ledger of a VDI: records are missing or were altered, or it lacks a hold.
    Ledger,
    /// A snapshot that was held is not there.
    HeldMissing,
    /// A snapshot that was held is not what it was then.
    HeldAltered,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Of which kind.
    pub kind: FindingKind,
    /// Where, if it is a block.
    pub at: Option<Pba>,
    /// One sentence for people.
    pub message: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// What a check counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckCounts {
    /// VDIs.
    pub vdis: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// Tree nodes and table pages that the published roots reach, those of the bitmaps too.
    pub metadata_blocks: u64,
    /// Data blocks that the published roots reach.
    pub data_blocks: u64,
    /// Blocks that the bitmaps say are reached.
    pub live_blocks: u64,
    /// Of these, the ones that nothing reaches: garbage collection frees them.
    pub leaked_blocks: u64,
    /// Blocks that were retired after failed writes.
    pub bad_blocks: u64,
    /// Entries that say that their contents were lost to damage found earlier.
    pub lost_entries: u64,
    /// Log records that the next open replays.
    pub log_records: u64,
    /// Of these, the ones above the durable point: each counts only if its data verifies.
    pub log_records_doubtful: u64,
    /// Data blocks that were read and verified.
    pub data_blocks_verified: u64,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What is wrong: a thousand at most.
    pub errors: Vec<Finding>,
    /// More errors than are listed.
    pub errors_omitted: u64,
    /// What is unusual, but within what a store promises.
    pub warnings: Vec<Finding>,
    /// More warnings than are listed.
    pub warnings_omitted: u64,
    /// Whether the store had been closed cleanly; else its log is replayed when it is opened.
    pub closed_cleanly: bool,
    /// Counters.
    pub counts: CheckCounts,
    /// What was repaired, one sentence each. The errors are those that remain.
    pub repairs: Vec<String>,
}

impl CheckReport {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.errors.is_empty()
    }
}

/// Checks the store on `device`, which nobody uses meanwhile, and that its ledgers still hold what was `noted`.
///
/// With `repair`, what can be repaired is, and the store is checked again:
/// - a damaged superblock copy is written again from the other one;
/// - a log that breaks before where it promised to reach is cut there; the records behind it are
///   lost, and the report says how many;
/// - directory, extent table and bitmaps are written afresh from what the VDIs reach, if they are
///   damaged, wrong, or hold leaked blocks. Nothing is freed if any node could not be read.
///
/// Damaged nodes and data of VDIs stay as they are: reads of these blocks fail, writing them again
/// heals them. So does what is wrong with held snapshots and ledgers: it would not be known any more.
/// Repairs are durable on return.
///
/// # Errors
/// `NotFound`, `Corrupt`, `Unsupported` if there is no superblock to start from; `Busy` if a daemon
/// on another machine uses the store; device errors other than of single blocks.
pub async fn check(
    device: &Device,
    runtime: &Runtime,
    options: CheckOptions,
    noted: &[NotedHead],
    progress: &dyn Fn(CheckProgress),
) -> Result<CheckReport, Error> {
    let examined = examine::examine(device, runtime, options, noted, progress).await?;
    if !options.repair {
        return Ok(examined.report);
    }
    progress(CheckProgress { stage: CheckStage::Repair, done: 0, total: 0 });
    let repairs = repair::repair(device, runtime, &examined).await?;
    let again = examine::examine(device, runtime, options, noted, progress).await?;
    Ok(CheckReport { repairs, ..again.report })
}

/// Writes the control tables of a store afresh from what its VDIs reach, so that it can be opened;
/// what was done. Durable on return. `None` if something would be given up that this cannot see:
/// then nothing is written.
///
/// # Errors
/// As [`check`].
pub(crate) async fn restore_tables(
    device: &Device,
    runtime: &Runtime,
    options: &crate::OpenOptions,
) -> Result<Option<Vec<String>>, Error> {
    let (boot_id, nonce) = (options.boot_id, options.nonce);
    let options = CheckOptions { repair: true, read_data: false, boot_id, nonce };
    let examined = examine::examine(device, runtime, options, &[], &|_| {}).await?;
    let space = &examined.space;
    // Which blocks are in use is known from the bitmaps or from all trees.
    let knows_use = space.bitmaps_are_complete || space.trees_are_complete;
    if examined.log_break.is_some() || examined.slots.is_none() || !knows_use {
        return Ok(None);
    }
    repair::repair(device, runtime, &examined).await.map(Some)
}
