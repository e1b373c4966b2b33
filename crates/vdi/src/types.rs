//! What the management interface takes and gives. Plain data; sizes in bytes.

use std::time::Duration;

use base::{Lsn, SnapshotNumber, SnapshotUuid, VdiId};
use blockstore::allocator::Reuse;

use crate::Retention;

/// How to format a store.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Bytes per extent: a power of two, 16 MiB to 1 TiB. `None`: 2 GiB, or less so that the
    /// device has at least 64 extents.
    pub extent_bytes: Option<u64>,
    /// Bytes of a host's log ring. `None`: 64 MiB, or a quarter of an extent if that is less.
    pub log_bytes: Option<u64>,
    /// Format even if the device looks used.
    pub force: bool,
    /// Whether the space of free blocks is to stay allocated: it is not given back to what lies below.
    pub keep_space: bool,
    /// The new store's identity and checksum secret, from a secure source.
    pub uuid: [u8; 16],
    /// Key of the store's checksums.
    pub secret: [u8; 32],
    /// Identity of this boot of this machine, which may open the store at once.
    pub boot_id: [u8; 16],
}

/// How to open a store.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Bytes that the node cache may hold.
    pub cache_bytes: usize,
    /// Identity of this boot of this machine (`/proc/sys/kernel/random/boot_id`): a store last
    /// used under another one is watched for a lease time first (design rule 15).
    pub boot_id: [u8; 16],
    /// Random nonce of the new epoch.
    pub nonce: u64,
    /// Whether the store stopped because its device failed, under users who go on with it now. What
    /// they wrote and no flush covered may be lost: every handle has another identity then.
    pub after_failure: bool,
    /// VDIs that stay in memory though nobody uses them.
    pub idle_vdis_max: usize,
    /// How often a garbage collection stores how far it has come, so that it goes on from there when the
    /// store is opened again.
    pub marks_stored_every: Duration,
    /// Bytes that the sets of blocks of a garbage collection may take: bits of nodes, and of some data. A store
    /// that needs more is collected in several passes.
    pub gc_memory_bytes: u64,
    /// Which free blocks are written first. Anything but the default is for the simulator.
    pub reuse: Reuse,
}

/// What opening a store found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// Whether the store had been closed cleanly.
    pub clean: bool,
    /// Log records replayed.
    pub records_replayed: u64,
    /// Records above the durable point whose data did not verify, and which were dropped: writes
    /// that were never acknowledged, or that no flush covered.
    pub records_dropped: u64,
    /// Damage that was found or repaired, one sentence each.
    pub alarms: Vec<String>,
}

/// Names a VDI, or a snapshot of one: `web01`, `web01@label`, `web01@17`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Name of the VDI.
    pub vdi: String,
    /// Label or number of the snapshot.
    pub snapshot: Option<String>,
}

impl Target {
    /// Parses `NAME` or `NAME@SNAPSHOT`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text.split_once('@') {
            Some((vdi, snapshot)) => {
                Self { vdi: vdi.to_owned(), snapshot: Some(snapshot.to_owned()) }
            }
            None => Self { vdi: text.to_owned(), snapshot: None },
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.vdi)?;
        match &self.snapshot {
            Some(snapshot) => write!(f, "@{snapshot}"),
            None => Ok(()),
        }
    }
}

/// One VDI in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdiEntry {
    /// Identity for ever.
    pub id: VdiId,
    /// Its name.
    pub name: String,
    /// Logical size; 0 if the VDI is damaged so that nothing but its name is left.
    pub size_bytes: u64,
    /// When it was created, in nanoseconds since 1970.
    pub created_ns: u64,
    /// Number of snapshots that were asked for.
    pub snapshot_count: u64,
    /// Number of moments that its retention keeps.
    pub moment_count: u64,
    /// The VDI that it was cloned from, and the number of the snapshot there; names may be gone.
    pub parent: Option<(VdiId, SnapshotNumber)>,
    /// Name of the parent if it still exists.
    pub parent_name: Option<String>,
    /// Which moments of it are kept by themselves.
    pub retention: Retention,
    /// Whether that was said of it; else of the store.
    pub has_own_retention: bool,
    /// Number of its snapshots and moments that are held.
    pub held_count: u64,
    /// What happened to holds of its snapshots, if anything ever did.
    pub ledger: Option<LedgerEntry>,
    /// What its snapshots and moments hold; `None` until a garbage collection has counted it.
    pub past: Option<VdiPast>,
}

/// What the snapshots of a VDI held that no newest state of any VDI needs, when a garbage collection counted it.
/// What several VDIs share of that counts for the one with the lowest id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VdiPast {
    /// Bytes that its snapshots need which were asked for, or are held.
    pub snapshots_bytes: u64,
    /// Bytes that its other moments need, and none of those.
    pub moments_bytes: u64,
    /// Wall time when the collection began.
    pub wall_ns: u64,
}

/// Where the ledger of a VDI ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LedgerEntry {
    /// Head of the chain: whoever has noted it can tell whether what stands before was changed.
    pub head: [u8; 32],
    /// Number of the last record.
    pub sequence: u64,
    /// Holds that began or ended and are not in it yet: the next checkpoint writes them.
    pub pending: u64,
}

/// That a snapshot is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldEntry {
    /// When that ends by itself, in nanoseconds since 1970, if it does.
    pub until_ns: Option<u64>,
}

/// One snapshot in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Number within its VDI, from 1.
    pub number: SnapshotNumber,
    /// Label, if it was given one.
    pub label: Option<String>,
    /// Logical size of the VDI at that moment.
    pub size_bytes: u64,
    /// When it was taken, in nanoseconds since 1970.
    pub created_ns: u64,
    /// What it is known by in every store that has it.
    pub uuid: SnapshotUuid,
    /// Of one that the VDI's retention made: bytes changed since the one before. `None` if somebody
    /// asked for it.
    pub changed_bytes: Option<u64>,
    /// Whether it is held.
    pub hold: Option<HoldEntry>,
}

/// Which intervals of a VDI's past are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WantedIntervals {
    /// How long each is, such as `15m` or `1 day`; `None`: as long as it takes to show everything.
    pub every: Option<String>,
    /// How many at most, the latest. An answer may have fewer.
    pub max: usize,
    /// Only what snapshots with numbers below this one tell.
    pub before: Option<SnapshotNumber>,
}

/// What happened to a VDI. An answer that is full may end in the middle of its first interval; what is
/// missing of it is what the next answer ends with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdiIntervals {
    /// How long each is, in seconds.
    pub every_s: u64,
    /// Those in which there is something, oldest first.
    pub intervals: Vec<VdiInterval>,
    /// How many there are that begin earlier.
    pub earlier: u64,
    /// Where to go on to them; `None` if everything is told.
    pub next: Option<SnapshotNumber>,
}

/// What happened to a VDI in an interval. Snapshots go by their labels, or numbers without.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VdiInterval {
    /// When it begins, in nanoseconds since 1970.
    pub from_ns: u64,
    /// How many moments the VDI's retention kept.
    pub moments: u64,
    /// Bytes changed by the last of them, since the last of the interval before.
    pub changed_bytes: u64,
    /// The last snapshot or moment of it.
    pub last: String,
    /// Snapshots that were asked for.
    pub snapshots: Vec<String>,
    /// What of all these is held.
    pub held: Vec<String>,
}

/// A write of a VDI that can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VdiWrite {
    /// Its log record.
    pub lsn: Lsn,
    /// First byte of the blocks that it changed.
    pub offset: u64,
    /// Their length in bytes.
    pub length: u64,
}

/// A series of snapshots that is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedSeries {
    /// From one to the next.
    pub every: Duration,
    /// How many.
    pub count: u32,
}

/// Snapshots that were taken one after the other. Others may have been taken in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Series {
    /// Number of the first.
    pub first: SnapshotNumber,
    /// Number of the last.
    pub last: SnapshotNumber,
    /// How many.
    pub count: u32,
}

/// A write, and the moment that keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptWrite {
    /// The write.
    pub write: VdiWrite,
    /// Number of the moment: the first one that was taken after the write.
    pub moment: String,
    /// When that was, in nanoseconds since 1970.
    pub wall_ns: u64,
}

/// Which writes are to be listed: the latest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WantedWrites {
    /// Up to this moment, by number, label or time; else up to now.
    pub up_to: Option<String>,
    /// Only with LSNs below this one.
    pub before: Option<Lsn>,
    /// How many at most.
    pub max: usize,
}

/// Writes that can be opened, in the order in which they were made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdiWrites {
    /// At most a thousand.
    pub writes: Vec<KeptWrite>,
    /// What to pass as `before` for those that were made before; `None` if there are none.
    pub next: Option<Lsn>,
}

/// A disk into which a snapshot was received, and what is to become of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Name of the disk that holds what was received.
    pub partial: String,
    /// Name of the disk that it is received into: a new one, or with `base` one that exists.
    pub name: String,
    /// Logical size of the snapshot; what the partial disk has beyond it is cut off.
    pub size_bytes: u64,
    /// Label of the snapshot.
    pub label: Option<String>,
    /// What the snapshot is known by.
    pub uuid: SnapshotUuid,
    /// The snapshot that what was received builds on: the newest one of the disk.
    pub base: Option<SnapshotUuid>,
    /// Whether what was written to the disk since that snapshot may be lost.
    pub force: bool,
}

impl Received {
    /// Label of the snapshot; empty for none.
    pub(crate) fn label(&self) -> &str {
        self.label.as_deref().unwrap_or_default()
    }
}

/// Space of a VDI or a snapshot, counted by walking its tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VdiSpace {
    /// Bytes of data that are mapped.
    pub mapped_bytes: u64,
    /// Those that nothing else can name.
    pub exclusive_bytes: u64,
    /// Those that a snapshot or clone may share.
    pub shared_bytes: u64,
}

/// What differs between two VDIs or snapshots, from some byte on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdiDiff {
    /// Logical size of the first one.
    pub from_size_bytes: u64,
    /// Logical size of the second one.
    pub to_size_bytes: u64,
    /// In order of offset. Behind its end, the smaller one counts as zeroes.
    pub extents: Vec<DiffExtent>,
    /// First byte that differs behind them, if there were more than were asked for.
    pub next: Option<u64>,
}

/// A run of bytes that differs between two VDIs or snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiffExtent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// Whether the second one has data there; otherwise it reads as zeroes.
    pub data: bool,
}

/// Counters and gauges of a running store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes of blocks that can hold data or metadata.
    pub capacity_bytes: u64,
    /// Bytes of free blocks.
    pub free_bytes: u64,
    /// Number of VDIs.
    pub vdi_count: u64,
    /// Guest reads completed, and their bytes.
    pub reads: u64,
    /// Bytes that guests read.
    pub read_bytes: u64,
    /// Guest writes completed.
    pub writes: u64,
    /// Bytes that guests wrote.
    pub write_bytes: u64,
    /// Guest flushes completed.
    pub flushes: u64,
    /// Guest discards and zeroings completed.
    pub discards: u64,
    /// Requests that ended in an error.
    pub errors: u64,
    /// Blocks that failed verification.
    pub checksum_failures: u64,
    /// Flushes of the device.
    pub device_flushes: u64,
    /// Log blocks written.
    pub log_blocks: u64,
    /// Log records written.
    pub log_records: u64,
    /// Part of the log ring in use, in percent.
    pub log_used_percent: u64,
    /// Checkpoints published.
    pub checkpoints: u64,
    /// Tree nodes written by checkpoints.
    pub nodes_written: u64,
    /// Snapshots that checkpoints gave a history instead of a tree.
    pub histories: u64,
    /// Versions of blocks that these histories hold.
    pub versions_written: u64,
    /// Cycles of garbage collection completed.
    pub collections: u64,
    /// Blocks that they freed.
    pub collected_blocks: u64,
    /// Free blocks whose space was given back to what lies below.
    pub trimmed_blocks: u64,
    /// Bytes that scrub has read and verified.
    pub scrubbed_bytes: u64,
    /// Damaged blocks that it found: one that stays damaged counts once in each pass.
    pub scrub_damaged_blocks: u64,
    /// Its passes that went through everything.
    pub scrubs: u64,
    /// When the last of them ended, in seconds since 1970; 0 if none did since the store was opened.
    pub scrub_ended_seconds: u64,
    /// Node cache hits.
    pub cache_hits: u64,
    /// Node cache misses.
    pub cache_misses: u64,
    /// Bytes in the node cache.
    pub cache_bytes: u64,
    /// Snapshots taken.
    pub snapshots: u64,
    /// Moments that retentions kept.
    pub moments: u64,
}
