//! The store as frontends see it that know disks by number.

use std::rc::Rc;

use base::{ErrorKind, SnapshotNumber, VdiId};
use disk::directory::{Answer, Directory, DiskEntry, SnapshotEntry};
use disk::{Disk, DiskError};
use vdi::{Store, Target, VdiEntry};

/// Has a store's VDIs and snapshots by number.
#[derive(Debug)]
pub(crate) struct StoreDirectory(Store);

impl StoreDirectory {
    pub(crate) fn new(store: Store) -> Rc<Self> {
        Rc::new(Self(store))
    }
}

const MISSING: DiskError = DiskError::new(ErrorKind::NotFound, "there is no such disk");

/// The engine knows disks by name. One that is renamed in between is missing, and asked for again.
fn name(store: &Store, id: u64) -> Result<String, DiskError> {
    store.name_of(VdiId::new(id)).ok_or(MISSING)
}

fn disk_entry(entry: VdiEntry) -> DiskEntry {
    let VdiEntry { id, name, size_bytes, created_ns, snapshot_count, moment_count, .. } = entry;
    let snapshot_count = snapshot_count + moment_count;
    DiskEntry { id: id.get(), name, size_bytes, created_ns, snapshot_count }
}

fn snapshot_entry(entry: vdi::SnapshotEntry) -> SnapshotEntry {
    let vdi::SnapshotEntry { number, label, size_bytes, created_ns, .. } = entry;
    SnapshotEntry { number: number.get(), label, size_bytes, created_ns }
}

impl Directory for StoreDirectory {
    fn disks(&self, after: u64, max: usize) -> Answer<Vec<DiskEntry>> {
        let store = self.0.clone();
        Box::pin(async move {
            let page = store.list_by_id(VdiId::new(after), max).await?;
            Ok(page.into_iter().map(disk_entry).collect())
        })
    }

    fn disk(&self, id: u64) -> Answer<DiskEntry> {
        let store = self.0.clone();
        Box::pin(async move {
            let entry = disk_entry(store.info(&name(&store, id)?).await?);
            if entry.id == id { Ok(entry) } else { Err(MISSING) }
        })
    }

    fn find(&self, name: &str) -> Answer<DiskEntry> {
        let (store, name) = (self.0.clone(), name.to_owned());
        Box::pin(async move { Ok(disk_entry(store.info(&name).await?)) })
    }

    fn snapshots(&self, id: u64, after: u64, max: usize) -> Answer<Vec<SnapshotEntry>> {
        let store = self.0.clone();
        Box::pin(async move {
            let after = SnapshotNumber::new(after);
            let page = store.snapshots(&name(&store, id)?, after, max).await?;
            Ok(page.into_iter().map(snapshot_entry).collect())
        })
    }

    fn find_snapshot(&self, id: u64, label: &str) -> Answer<SnapshotEntry> {
        let (store, label) = (self.0.clone(), label.to_owned());
        Box::pin(async move {
            let found = store.snapshot_info(&name(&store, id)?, &label).await?;
            Ok(snapshot_entry(found))
        })
    }

    fn open(&self, id: u64, snapshot: Option<u64>) -> Answer<Rc<dyn Disk>> {
        let store = self.0.clone();
        Box::pin(async move {
            let vdi = name(&store, id)?;
            let snapshot = snapshot.map(|number| number.to_string());
            let disk = store.open_disk(&Target { vdi, snapshot }).await?;
            // Another VDI may have got the name in between.
            if disk.identity().disk == id { Ok(disk) } else { Err(MISSING) }
        })
    }
}
