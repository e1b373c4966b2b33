//! A store: the VDIs of one host on one device.

use std::rc::Rc;

use base::{ErrorKind, SnapshotNumber, VdiId};
use device::Device;
use disk::Disk;
use runtime::Runtime;

use crate::Error;
use crate::types::{
    DiffExtent, FormatOptions, OpenOptions, OpenReport, SnapshotEntry, Stats, Target, VdiEntry,
    VdiSpace,
};

/// An open store. Clones share it.
#[derive(Clone, Debug)]
pub struct Store {}

fn unsupported<T>() -> Result<T, Error> {
    Err(Error::refused(ErrorKind::Unsupported, "not built yet"))
}

impl Store {
    /// Writes an empty store to `device`. Durable on return.
    ///
    /// # Errors
    /// `Busy` if the device looks used and `force` is not set; `Invalid` for impossible sizes.
    pub async fn format(
        _device: &Device,
        _runtime: &Runtime,
        _options: &FormatOptions,
    ) -> Result<(), Error> {
        unsupported()
    }

    /// Opens a store: recovers it if it was not closed cleanly, and starts its background tasks
    /// (group commit, periodic flush, checkpoints, heartbeat) on `runtime`.
    ///
    /// # Errors
    /// `Corrupt` if no superblock or host slot is intact; `Unsupported` for an unknown
    /// incompatible feature; `NotFound` if there is no store on the device.
    pub async fn open(
        _device: Device,
        _runtime: Runtime,
        _options: &OpenOptions,
    ) -> Result<(Self, OpenReport), Error> {
        unsupported()
    }

    /// Stops taking requests, waits for those in flight, writes a last checkpoint and marks the
    /// store clean. Durable on return.
    ///
    /// # Errors
    /// If the device fails; the store is as after a crash then.
    pub async fn close(&self) -> Result<(), Error> {
        unsupported()
    }

    /// Creates an empty VDI. Durable on return.
    ///
    /// # Errors
    /// `Exists`; `Invalid` for a bad name or size (1 block to 4 PiB; rounded up to whole blocks).
    pub async fn create(&self, _name: &str, _size_bytes: u64) -> Result<VdiId, Error> {
        unsupported()
    }

    /// Makes a new VDI with the contents of a snapshot, or of a VDI at this moment. Durable on
    /// return; copies no data.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `Invalid`.
    pub async fn clone_vdi(&self, _source: &Target, _name: &str) -> Result<VdiId, Error> {
        unsupported()
    }

    /// Takes a snapshot; it holds every write acknowledged before this call and none issued after
    /// it completed. Durable on return.
    ///
    /// # Errors
    /// `NotFound`; `Exists` if the label is taken.
    pub async fn snapshot(
        &self,
        _name: &str,
        _label: Option<&str>,
    ) -> Result<SnapshotNumber, Error> {
        unsupported()
    }

    /// Lists at most `max` VDIs whose names come after `after`, in order of name.
    ///
    /// # Errors
    /// If metadata cannot be read.
    pub async fn list(&self, _after: Option<&str>, _max: usize) -> Result<Vec<VdiEntry>, Error> {
        unsupported()
    }

    /// Lists at most `max` snapshots of a VDI with numbers above `after`.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn snapshots(
        &self,
        _name: &str,
        _after: SnapshotNumber,
        _max: usize,
    ) -> Result<Vec<SnapshotEntry>, Error> {
        unsupported()
    }

    /// Describes one VDI.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn info(&self, _name: &str) -> Result<VdiEntry, Error> {
        unsupported()
    }

    /// Counts the space of a VDI or snapshot by walking its tree.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` if a node of it is damaged.
    pub async fn space(&self, _target: &Target) -> Result<VdiSpace, Error> {
        unsupported()
    }

    /// Renames a VDI. Durable on return. Open handles go on.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `Invalid`.
    pub async fn rename(&self, _name: &str, _new_name: &str) -> Result<(), Error> {
        unsupported()
    }

    /// Changes the size. Durable on return. Contents beyond a smaller size are gone for ever:
    /// growing again reads zeroes there. Shrinking severs open handles.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`.
    pub async fn resize(&self, _name: &str, _size_bytes: u64) -> Result<(), Error> {
        unsupported()
    }

    /// Deletes a VDI with all its snapshots, or one snapshot. Durable on return. Open handles of
    /// what is deleted are severed. Clones are not affected.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn remove(&self, _target: &Target) -> Result<(), Error> {
        unsupported()
    }

    /// Makes the VDI's contents those of one of its snapshots. Snapshots stay. Durable on return.
    /// Severs open handles of the VDI.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn rollback(&self, _name: &str, _snapshot: &str) -> Result<(), Error> {
        unsupported()
    }

    /// Lists the runs of bytes that differ between two VDIs or snapshots. Walks only what differs.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt`.
    pub async fn diff(&self, _from: &Target, _to: &Target) -> Result<Vec<DiffExtent>, Error> {
        unsupported()
    }

    /// Opens a VDI for reading and writing, or a snapshot for reading.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn open_disk(&self, _target: &Target) -> Result<Rc<dyn Disk>, Error> {
        unsupported()
    }

    /// Publishes everything up to now, twice, so that both host slots name it and every block
    /// that was replaced before is free. Mostly for tests.
    ///
    /// # Errors
    /// If the device fails.
    pub async fn checkpoint(&self) -> Result<(), Error> {
        unsupported()
    }

    /// Current counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats::default()
    }
}
