//! What becomes of damaged tables, so that damage hurts what it describes and nobody else (G5;
//! docs/decisions/0006-damaged-tables.md).
//!
//! A checkpoint that meets a damaged page or node of a table fails, and the table is noted here.
//! The next one, at once, writes it whole from memory:
//! - directory, extents, bitmaps, bad blocks, the snapshots and the ledger of a VDI are known there completely:
//!   they are written into an empty tree;
//! - of the VDI table only VDIs in use are known: they are written, and what else stood on the
//!   damaged pages is gone. A VDI with a name and no record is lost: it gives errors from then on,
//!   and no other does.
//!
//! Trees of VDIs need none of this: an update marks what it cannot read as lost and goes on.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use base::VdiId;
use ondisk::{RootRef, Roots};

use crate::Error;
use crate::engine::{Engine, Registry};

/// A table that checkpoints write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Table {
    Directory,
    Extents,
    Bitmaps,
    BadBlocks,
    Vdis,
    Snapshots(VdiId),
    Ledger(VdiId),
}

/// Tables that were found damaged and have not been written again yet.
#[derive(Default)]
pub(crate) struct DamagedTables {
    noted: RefCell<BTreeSet<Table>>,
    /// Whether one was added since somebody asked.
    is_news: Cell<bool>,
}

impl DamagedTables {
    pub(crate) fn note(&self, table: Table) {
        if self.noted.borrow_mut().insert(table) {
            tracing::error!(?table, "a table is damaged and will be written again");
            self.is_news.set(true);
        }
    }

    /// Whether one is to be written whole.
    pub(crate) fn is_any(&self) -> bool {
        !self.noted.borrow().is_empty()
    }

    /// Whether one was noted since this was asked before.
    pub(crate) fn take_news(&self) -> bool {
        self.is_news.take()
    }

    /// Those that a checkpoint is to write whole.
    pub(crate) fn noted(&self) -> BTreeSet<Table> {
        self.noted.borrow().clone()
    }

    pub(crate) fn written(&self, tables: &BTreeSet<Table>) {
        self.noted.borrow_mut().retain(|table| !tables.contains(table));
    }
}

/// Whether something that was stored is not what it was.
pub(crate) fn is_damage(error: &Error) -> bool {
    matches!(error, Error::Blockstore(blockstore::Error::Damaged { .. }))
}

impl Engine {
    /// Makes everything of some tables that is in memory count as changed, and those begin empty of
    /// which all is. In the same breath as the cut of the checkpoint that writes them.
    pub(crate) fn begin_afresh(
        &self,
        tables: &BTreeSet<Table>,
        registry: &mut Registry,
        roots: &mut Roots,
    ) {
        for table in tables {
            match table {
                Table::Directory => {
                    registry.directory.change_all();
                    roots.directory = RootRef::empty(1);
                }
                Table::Extents => {
                    self.allocator.mark_all_extents_dirty();
                    roots.extents = RootRef::empty(1);
                }
                Table::Bitmaps => {
                    self.allocator.mark_all_pages_dirty();
                    roots.bitmaps = RootRef::empty(1);
                }
                Table::BadBlocks => {
                    self.checkpoints.forget_bad_blocks();
                    roots.bad_blocks = RootRef::empty(1);
                }
                Table::Vdis => registry.dirty.extend(registry.loaded.keys().copied()),
                Table::Snapshots(id) => {
                    let Some(vdi) = registry.loaded.get(id) else { continue };
                    let snapshots = vdi.snapshots.borrow();
                    let mut dirty = vdi.snapshots_dirty.borrow_mut();
                    dirty.extend(snapshots.iter().map(|snapshot| snapshot.number));
                    vdi.snapshot_table.set(RootRef::empty(1));
                    registry.dirty.insert(*id);
                }
                Table::Ledger(id) => {
                    let Some(vdi) = registry.loaded.get(id) else { continue };
                    vdi.ledger.borrow_mut().afresh = true;
                    registry.dirty.insert(*id);
                }
            }
        }
    }
}
