//! The store as frontends see it: every VDI under its name, every snapshot as `name@label` or
//! `name@17`.
//!
//! Listings go by VDI name; the snapshots of a VDI follow it in order of number. So a page begins
//! with one lookup, wherever the last one ended.

use std::rc::Rc;

use base::SnapshotNumber;
use disk::{Catalog, Disk, DiskError, Export, LocalBoxFuture};
use vdi::{Store, Target, VdiEntry};

/// Serves a store's VDIs and snapshots.
#[derive(Debug)]
pub(crate) struct StoreCatalog(Store);

impl StoreCatalog {
    pub(crate) fn new(store: Store) -> Rc<Self> {
        Rc::new(Self(store))
    }
}

impl Catalog for StoreCatalog {
    fn list(
        &self,
        after: Option<String>,
        max: usize,
    ) -> LocalBoxFuture<Result<Vec<Export>, DiskError>> {
        let store = self.0.clone();
        Box::pin(async move { Ok(list(&store, after.as_deref(), max).await?) })
    }

    fn open(&self, name: &str) -> LocalBoxFuture<Result<Rc<dyn Disk>, DiskError>> {
        let store = self.0.clone();
        let target = Target::parse(name);
        Box::pin(async move {
            // Each connection of a client would get another moment.
            if target.snapshot.as_ref().is_some_and(|wanted| wanted.ends_with(" ago")) {
                let message = "name a snapshot, or a time such as 2026-11-22T10:15:30Z";
                return Err(DiskError::new(base::ErrorKind::NotFound, message));
            }
            Ok(store.open_disk(&target).await?)
        })
    }
}

async fn list(store: &Store, after: Option<&str>, max: usize) -> Result<Vec<Export>, vdi::Error> {
    let mut exports = Vec::new();
    let mut last = None;
    if let Some(after) = after {
        let target = Target::parse(after);
        if let Some(from) = resume(store, &target).await? {
            push_snapshots(store, &target.vdi, from, max, &mut exports).await?;
        }
        last = Some(target.vdi);
    }
    while exports.len() < max {
        let page = store.list(last.as_deref(), max - exports.len()).await?;
        let Some(end) = page.last().map(|entry| entry.name.clone()) else { break };
        for entry in page {
            push_vdi(store, entry, max, &mut exports).await?;
        }
        last = Some(end);
    }
    Ok(exports)
}

/// After which snapshot of the VDI a listing that ended with `target` goes on; `None` if it goes
/// on with the next VDI, because this one or its snapshot has gone meanwhile.
async fn resume(store: &Store, target: &Target) -> Result<Option<SnapshotNumber>, vdi::Error> {
    let found = match &target.snapshot {
        None => store.info(&target.vdi).await.map(|_| Some(SnapshotNumber::new(0))),
        Some(name) => store.snapshot_info(&target.vdi, name).await.map(|found| Some(found.number)),
    };
    match found {
        Err(error) if error.kind() == base::ErrorKind::NotFound => Ok(None),
        found => found,
    }
}

async fn push_vdi(
    store: &Store,
    entry: VdiEntry,
    max: usize,
    exports: &mut Vec<Export>,
) -> Result<(), vdi::Error> {
    if exports.len() >= max {
        return Ok(());
    }
    let (name, snapshots) = (entry.name, entry.snapshot_count);
    let export = Export { name: name.clone(), size_bytes: entry.size_bytes, read_only: false };
    exports.push(export);
    if snapshots == 0 {
        return Ok(());
    }
    match push_snapshots(store, &name, SnapshotNumber::new(0), max, exports).await {
        // Deleted since it was listed.
        Err(error) if error.kind() == base::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

async fn push_snapshots(
    store: &Store,
    vdi: &str,
    after: SnapshotNumber,
    max: usize,
    exports: &mut Vec<Export>,
) -> Result<(), vdi::Error> {
    let room = max.saturating_sub(exports.len());
    if room == 0 {
        return Ok(());
    }
    for entry in store.asked_snapshots(vdi, after, room).await? {
        let size_bytes = entry.size_bytes;
        let name = crate::convert::snapshot(vdi, entry).handle;
        exports.push(Export { name, size_bytes, read_only: true });
    }
    Ok(())
}
