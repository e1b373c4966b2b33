//! What a frontend that shows disks as files asks: which there are, and which moments of each.
//!
//! Files are known by numbers that never change and never come back, as names do: a kernel keeps
//! them across restarts of the daemon and across renames.

use std::rc::Rc;

use runtime::LocalBoxFuture;

use crate::{Disk, DiskError};

/// What a query answers with.
pub type Answer<T> = LocalBoxFuture<Result<T, DiskError>>;

/// A VDI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskEntry {
    /// Its identity, from 1.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// When it was created, in nanoseconds since 1970.
    pub created_ns: u64,
    /// Number of snapshots.
    pub snapshot_count: u64,
}

/// A snapshot of a VDI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Its number within the VDI, from 1. A later snapshot has a higher one.
    pub number: u64,
    /// Its label, if it was given one.
    pub label: Option<String>,
    /// Size in bytes.
    pub size_bytes: u64,
    /// When it was taken, in nanoseconds since 1970; not before any snapshot with a lower number.
    pub created_ns: u64,
}

/// All disks and snapshots, by number. What has gone meanwhile is `ErrorKind::NotFound`.
pub trait Directory {
    /// At most `max` VDIs with identities above `after`, in order of those.
    fn disks(&self, after: u64, max: usize) -> Answer<Vec<DiskEntry>>;

    /// The VDI with this identity.
    fn disk(&self, id: u64) -> Answer<DiskEntry>;

    /// The VDI with this name.
    fn find(&self, name: &str) -> Answer<DiskEntry>;

    /// At most `max` snapshots of a VDI with numbers above `after`, in order of those.
    fn snapshots(&self, id: u64, after: u64, max: usize) -> Answer<Vec<SnapshotEntry>>;

    /// The snapshot of a VDI with this label or number.
    fn find_snapshot(&self, id: u64, name: &str) -> Answer<SnapshotEntry>;

    /// Opens a VDI, or a snapshot of it.
    fn open(&self, id: u64, snapshot: Option<u64>) -> Answer<Rc<dyn Disk>>;
}
