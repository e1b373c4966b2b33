//! What travels. Plain data: sizes in bytes, times in RFC 3339.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Most entries that one page of a listing holds, and how many it holds if `max` is not given.
pub const PAGE_MAX: usize = 1000;

/// Most extents that one page of a diff holds, and how many it holds if `max` is not given.
pub const DIFF_EXTENTS_MAX: usize = 65_536;

/// The daemon and the store that it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Version of the daemon.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since when it has been ready.
    pub started: Timestamp,
    /// The store, as an absolute path.
    pub store: String,
    /// What the store lies on, and which I/O engine drives it.
    pub device: String,
    /// What opening the store found.
    pub opened: OpenReport,
    /// Where VDIs are served over NBD; the first is the daemon's own unix socket.
    pub nbd: Vec<NbdEndpoint>,
    /// Why the last upgrade of it came to nothing, if one did.
    pub upgrade_refused: Option<String>,
}

/// What opening a store found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenReport {
    /// Whether the store had been closed cleanly.
    pub clean: bool,
    /// Log records replayed.
    pub records_replayed: u64,
    /// Records that no flush covered and whose data did not arrive: dropped.
    pub records_dropped: u64,
    /// Damage that was found or repaired, one sentence each.
    pub alarms: Vec<String>,
}

/// An address that NBD clients connect to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdEndpoint {
    /// `unix:/path` or `tcp:host:port`.
    pub address: String,
    /// Whether clients must use TLS.
    pub tls: bool,
}

/// What a frontend has counted since the store was opened, by name; docs/nbd.md and
/// docs/vhost-user.md explain each.
pub type FrontendMetrics = std::collections::BTreeMap<String, u64>;

/// A VDI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vdi {
    /// Identity for ever.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Logical size; 0 if it is damaged so that nothing but its name is left.
    pub size_bytes: u64,
    /// When it was created.
    pub created: Timestamp,
    /// Number of its snapshots that were asked for.
    pub snapshot_count: u64,
    /// Number of moments that its history keeps.
    #[serde(default)]
    pub moment_count: u64,
    /// Where it was cloned from.
    pub parent: Option<Parent>,
    /// Which moments of it are kept by themselves, such as `every flush for 1d`; `off` for none.
    #[serde(default)]
    pub history: String,
    /// Whether that is what the store keeps of disks that have no history of their own.
    #[serde(default)]
    pub history_inherited: bool,
    /// Bytes that the moments may hold alone, if its history has a budget.
    #[serde(default)]
    pub history_budget_bytes: Option<u64>,
    /// Number of its snapshots and moments that are held.
    #[serde(default)]
    pub held_count: u64,
    /// Where its ledger of holds ends; without one nothing of it was ever held.
    #[serde(default)]
    pub ledger: Option<Ledger>,
    /// What its snapshots and moments hold alone; `None` if no garbage collection has counted since the
    /// store was opened.
    #[serde(default)]
    pub past: Option<Past>,
}

/// What the snapshots and moments of a VDI held that no VDI needed as it was, when a garbage collection
/// counted. What those of several VDIs share counts for the oldest of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Past {
    /// Bytes that snapshots need which were asked for, or are held.
    pub snapshots_bytes: u64,
    /// Bytes that other moments need, and none of those: what the budget of its history is about.
    pub moments_bytes: u64,
    /// When that was.
    pub counted: Timestamp,
}

/// Where the ledger of holds of a VDI ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Number of its last record.
    pub record: u64,
    /// SHA-256 over that and all before, in hexadecimal digits: who has noted it can tell whether what
    /// stands there was changed since.
    pub head: String,
    /// Holds that began or ended and are not in it yet, as no checkpoint has written them.
    #[serde(default)]
    pub pending: u64,
}

/// What the store keeps for all VDIs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSettings {
    /// Which moments are kept of VDIs that have no history of their own; `off` for none.
    pub history: String,
}

/// Changes what the store keeps for all VDIs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeStore {
    /// Which moments are to be kept of VDIs that have no history of their own.
    pub history: String,
}

/// Where a VDI was cloned from. The VDI and the snapshot may be gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Identity of the VDI.
    pub id: u64,
    /// Its name, if it still exists.
    pub name: Option<String>,
    /// Number of the snapshot; 0 if the running VDI was cloned.
    pub snapshot: u64,
}

/// VDIs in order of name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VdiPage {
    /// At most [`PAGE_MAX`].
    pub vdis: Vec<Vdi>,
    /// What to pass as `after` for the next page; `None` on the last one.
    pub next: Option<String>,
}

/// Creates a VDI: an empty one of `size_bytes`, or a clone of `source`. Exactly one is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVdi {
    /// Its name.
    pub name: String,
    /// Logical size of an empty VDI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// `NAME`, `NAME@SNAPSHOT` or, for a write that is kept, `NAME@lsn:N` to clone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Which moments of it are to be kept by themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<String>,
}

/// Changes a VDI. Exactly one of `name`, `size_bytes` and `history` is given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeVdi {
    /// New name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// New logical size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Allows a smaller size: the contents beyond it are lost.
    #[serde(default)]
    pub shrink: bool,
    /// Which moments of it are to be kept by themselves from now on; `inherit`: those that the store keeps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<String>,
}

/// Space of a VDI or snapshot, counted by walking its tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Bytes of data that are mapped.
    pub mapped_bytes: u64,
    /// Those that nothing else names.
    pub exclusive_bytes: u64,
    /// Those that a snapshot or clone may share.
    pub shared_bytes: u64,
}

/// Takes a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TakeSnapshot {
    /// Its label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Whether it is to be held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Hold>,
}

/// Takes a series of snapshots without labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TakeSeries {
    /// Microseconds from one to the next.
    pub every_us: u64,
    /// How many: 1 to 25,000, within a second.
    pub count: u32,
}

/// A series of snapshots that was taken. Numbers in between may be of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Series {
    /// Number of the first.
    pub first: u64,
    /// Number of the last.
    pub last: u64,
    /// How many.
    pub count: u64,
}

/// Holds a snapshot or a moment: it cannot be deleted until the hold ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    /// When that is to end by itself: a time in RFC 3339, a day, or how long, such as `30d`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
}

/// That a snapshot is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// When that ends by itself, if it does.
    pub until: Option<Timestamp>,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// `web01@label`, or `web01@17` if it has no label: what commands take.
    pub handle: String,
    /// Number within its VDI, from 1.
    pub number: u64,
    /// Label, if it was given one.
    pub label: Option<String>,
    /// Logical size of the VDI at that moment.
    pub size_bytes: u64,
    /// When it was taken.
    pub created: Timestamp,
    /// What it is known by in every store that has it: it keeps it when it is sent.
    pub uuid: String,
    /// Of a moment that was kept by itself: bytes changed since the one before.
    pub changed_bytes: Option<u64>,
    /// Whether it is held.
    #[serde(default)]
    pub hold: Option<Held>,
}

/// Snapshots of a VDI in order of number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotPage {
    /// At most [`PAGE_MAX`].
    pub snapshots: Vec<Snapshot>,
    /// What to pass as `after` for the next page; `None` on the last one.
    pub next: Option<u64>,
}

/// What happened to a VDI in an interval of time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interval {
    /// When it begins.
    pub from: Timestamp,
    /// Moments that the VDI's history kept.
    pub moments: u64,
    /// Bytes changed by the last of them, since the last of the interval before.
    pub changed_bytes: u64,
    /// The VDI at the end of it, as a handle.
    pub last: String,
    /// Handles of snapshots that were asked for.
    pub snapshots: Vec<String>,
    /// Handles of what of all these is held.
    pub held: Vec<String>,
}

/// What happened to a VDI, the latest of it. A page that is full may end in the middle of its first
/// interval; what is missing of it is what the next page ends with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalPage {
    /// Length of an interval.
    pub every_seconds: u64,
    /// Those in which there is something, oldest first: at most [`PAGE_MAX`], and some thousand handles.
    pub intervals: Vec<Interval>,
    /// How many there are that begin earlier.
    pub earlier: u64,
    /// What to pass as `before` for the next page; `None` if everything is told.
    pub next: Option<u64>,
}

/// A write of a VDI that can be opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    /// The VDI after it, as a handle: `web01@lsn:107`.
    pub handle: String,
    /// Number of its log record.
    pub lsn: u64,
    /// First byte of the blocks that it changed.
    pub offset: u64,
    /// Their length in bytes.
    pub length: u64,
    /// Handle of the first moment that was kept after it.
    pub moment: String,
    /// When that was.
    pub time: Timestamp,
}

/// Writes of a VDI in the order in which they were made, the latest of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WritePage {
    /// At most [`PAGE_MAX`].
    pub writes: Vec<Write>,
    /// What to pass as `before` for the next page, of those that were made before; `None` on the last one.
    pub next: Option<u64>,
}

/// Makes a VDI's contents those of one of its snapshots, or what they were after a write that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// Label or number of the snapshot, a time, or `lsn:N` of the write.
    pub snapshot: String,
}

/// Makes of a VDI into which a snapshot was received what it was received for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompleteReceive {
    /// Name of the VDI that it was received for: a new one, or with `base` one that exists.
    pub name: String,
    /// Logical size of the snapshot: what the VDI has beyond it is cut off.
    pub size_bytes: u64,
    /// Label of the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// What the snapshot is known by.
    pub uuid: String,
    /// What the newest snapshot of the VDI that exists is known by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Allows that what was written to it since is lost.
    #[serde(default)]
    pub force: bool,
}

/// Makes the daemon become another program, with the same sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upgrade {
    /// The program, as an absolute path; without one, what stands now where the daemon was started
    /// from.
    pub binary: Option<String>,
}

/// An upgrade that has begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgrading {
    /// Version of the daemon that ends.
    pub from: String,
    /// Version of the one that begins.
    pub to: String,
    /// The program.
    pub binary: String,
}

/// Attaches a disk or snapshot to virtual machines over vhost-user, or to this machine as a block
/// device: one of the two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// `NAME` or `NAME@SNAPSHOT`.
    pub disk: String,
    /// Where the socket is to be: an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_user: Option<String>,
    /// Whether it is to be a block device.
    #[serde(default)]
    pub ublk: bool,
}

/// A disk that is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// `NAME` or `NAME@SNAPSHOT`.
    pub disk: String,
    /// Path of the socket, by which the attachment is known.
    pub vhost_user: Option<String>,
    /// Path of the block device, by which the attachment is known.
    pub ublk: Option<String>,
    /// Whether a virtual machine is connected to it, or the kernel.
    pub connected: bool,
}

impl Attachment {
    /// The path by which it is known.
    #[must_use]
    pub fn path(&self) -> &str {
        self.vhost_user.as_deref().or(self.ublk.as_deref()).unwrap_or_default()
    }
}

/// A mount that the daemon serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounted {
    /// The mount point.
    pub dir: String,
}

/// What was deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// `NAME` or `NAME@SNAPSHOT`.
    pub removed: String,
    /// How many snapshots went with it.
    pub snapshots: u64,
}

/// What a garbage collection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gc {
    /// Bytes of blocks that disks, snapshots and the store itself need.
    pub reached_bytes: u64,
    /// Bytes of blocks that nothing needed, and that are free now.
    pub freed_bytes: u64,
    /// Bytes of free blocks whose space was given back to what lies below.
    pub trimmed_bytes: u64,
    /// How often it went through all trees: more than once if it would have taken more memory than it may.
    #[serde(default)]
    pub passes: u64,
    /// Bytes of memory that it took for what it knew of blocks.
    #[serde(default)]
    pub memory_bytes: u64,
    /// What the store held when it began; `None` if it went on with one that a restart had cut short.
    #[serde(default)]
    pub space: Option<GcSpace>,
}

/// What a store held when a garbage collection began. No byte is counted twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcSpace {
    /// Bytes that disks need as they are, with tree nodes; snapshots may use them, too.
    pub disks_bytes: u64,
    /// Bytes that snapshots and moments alone need: they would come back if all of these were deleted.
    pub snapshots_bytes: u64,
    /// Bytes that other tables of the store need.
    pub tables_bytes: u64,
    /// Bytes that nothing needed.
    pub garbage_bytes: u64,
    /// When that was.
    pub counted: Timestamp,
}

/// What the garbage collection is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GcPhase {
    /// Nothing.
    #[default]
    Idle,
    /// Finding out what is needed.
    Marking,
    /// Freeing what is not.
    Sweeping,
    /// Giving space back to what lies below.
    Trimming,
}

/// How the garbage collection stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcStatus {
    /// What it is doing.
    pub phase: GcPhase,
    /// Bytes of blocks that it has found to be needed, while it is marking.
    pub marked_bytes: u64,
    /// Bytes of blocks that may be needed, while it is marking or sweeping. Both of the pass under way.
    pub candidate_bytes: u64,
    /// Which pass over all trees that is, from 1.
    #[serde(default)]
    pub pass: u64,
    /// Bytes of memory that a collection may take for what it knows of blocks.
    #[serde(default)]
    pub memory_bytes_max: u64,
    /// How many collections were completed since the daemon opened the store.
    pub cycles: u64,
    /// What the last one did.
    pub last: Gc,
}

/// What differs between two VDIs or snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    /// The first one; without one, what has data in the second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The second one.
    pub to: String,
    /// Logical size of the first one.
    pub from_size_bytes: u64,
    /// Logical size of the second one.
    pub to_size_bytes: u64,
    /// Runs of bytes that differ, in order of offset.
    pub extents: Vec<DiffExtent>,
}

/// Some of what differs between two VDIs or snapshots. No run is cut in two because a page ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffPage {
    /// At most [`DIFF_EXTENTS_MAX`] extents.
    #[serde(flatten)]
    pub diff: Diff,
    /// What to pass as `after` for the next page; `None` on the last one.
    pub next: Option<u64>,
}

/// A run of bytes that differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffExtent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// Whether the second one has data there; otherwise it reads as zeroes.
    pub data: bool,
}

macro_rules! stats {
    ($($(#[$doc:meta])* $field:ident,)*) => {
        /// Counters (since the daemon started) and gauges of a running store.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Stats {
            $($(#[$doc])* #[serde(default)] pub $field: u64,)*
        }

        impl Stats {
            /// Every field by name, in the order above.
            #[must_use]
            pub fn fields(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field),)*]
            }
        }
    };
}

stats! {
    /// Bytes of blocks that can hold data or metadata.
    capacity_bytes,
    /// Bytes of free blocks.
    free_bytes,
    /// Number of VDIs.
    vdi_count,
    /// Guest reads completed.
    reads,
    /// Bytes that guests read.
    read_bytes,
    /// Guest writes completed.
    writes,
    /// Bytes that guests wrote.
    write_bytes,
    /// Guest flushes completed.
    flushes,
    /// Guest discards and zeroings completed.
    discards,
    /// Requests that ended in an error.
    errors,
    /// Blocks that failed verification.
    checksum_failures,
    /// Flushes of the device.
    device_flushes,
    /// Log blocks written.
    log_blocks,
    /// Log records written.
    log_records,
    /// Part of the log ring in use, in percent.
    log_used_percent,
    /// Checkpoints published.
    checkpoints,
    /// Tree nodes written by checkpoints.
    nodes_written,
    /// Snapshots that checkpoints gave a history instead of a tree.
    histories,
    /// Versions of blocks that these histories hold.
    versions_written,
    /// Cycles of garbage collection completed.
    collections,
    /// Blocks that garbage collection freed.
    collected_blocks,
    /// Free blocks whose space was given back to what lies below.
    trimmed_blocks,
    /// Bytes that scrub has read and verified.
    scrubbed_bytes,
    /// Damaged blocks that scrub has found; one that stays damaged counts once in each pass.
    scrub_damaged_blocks,
    /// Passes of scrub that went through everything.
    scrubs,
    /// When the last of them ended, in seconds since 1970; 0 if none did since the daemon opened the store.
    scrub_ended_seconds,
    /// Node cache hits.
    cache_hits,
    /// Node cache misses.
    cache_misses,
    /// Bytes in the node cache.
    cache_bytes,
    /// Snapshots taken.
    snapshots,
    /// Moments that histories kept by themselves.
    moments,
    /// Clients that are connected over NBD.
    nbd_connections,
    /// Virtual machines that are connected over vhost-user.
    vhost_connections,
}
