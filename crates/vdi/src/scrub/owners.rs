//! Who names a damaged block, now. Only asked when one was found: it looks into every VDI and snapshot.

use std::rc::Rc;

use base::{ErrorKind, Pba, SnapshotNumber, VdiId};
use blockstore::{table, tree};
use ondisk::{EntryState, History, RootRef, VdiRecord};

use super::Owner;
use crate::Error;
use crate::branch::{Base, Contents, View};
use crate::damage::Table;
use crate::engine::{Engine, as_u64};
use crate::vdi::{Snapshot, Vdi};

/// VDIs that are listed for one place, and snapshots for one VDI.
const LISTED_MAX: usize = 16;

/// Snapshots that are looked into between two breaths of the thread.
const SNAPSHOTS_PER_TURN: usize = 64;

/// A block that somebody may name.
#[derive(Clone, Copy, Debug)]
pub(super) enum Subject {
    /// Data of this block of a VDI.
    Data(u64),
    /// A node on this level, from this block on.
    Node(u8, u64),
    /// A page or a node of a history.
    History(History),
}

/// How many of those who name a block are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Search {
    All,
    /// Any of them: that there is one.
    First,
}

/// Who names a block.
#[derive(Debug, Default)]
pub(super) struct Owners {
    pub(super) listed: Vec<Owner>,
    pub(super) omitted: u64,
}

impl Owners {
    fn add(&mut self, owner: Owner) {
        match self.listed.len() < LISTED_MAX {
            true => self.listed.push(owner),
            false => self.omitted += 1,
        }
    }
}

impl Engine {
    /// The VDIs and snapshots that name a block. At the rate of the pass, as if each that is looked into
    /// cost a block: there may be very many, and much that is damaged.
    ///
    /// # Errors
    /// If the device fails, or the pass is to end.
    pub(super) async fn owners(
        &self,
        subject: Subject,
        pba: Pba,
        search: Search,
    ) -> Result<Owners, Error> {
        let mut owners = Owners::default();
        let mut last = VdiId::new(0);
        let next = |last| self.registry.borrow().directory.after(last).next();
        while let Some(id) = next(last) {
            last = id;
            self.keep_scrub_rate(1).await?;
            // What is damaged itself, or deleted meanwhile, names nothing that can be read.
            let vdi = match self.vdi(id).await {
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt) => {
                    continue;
                }
                vdi => vdi?,
            };
            if let Some(owner) = self.owner(&vdi, subject, pba, search).await? {
                owners.add(owner);
                if search == Search::First {
                    break;
                }
            }
        }
        Ok(owners)
    }

    async fn owner(
        &self,
        vdi: &Vdi,
        subject: Subject,
        pba: Pba,
        search: Search,
    ) -> Result<Option<Owner>, Error> {
        let head = self.head_names(vdi, subject, pba).await?;
        // One is held at a time: moments that somebody holds cannot go when the store is full.
        let all: Vec<SnapshotNumber> =
            vdi.snapshots.borrow().iter().map(|snapshot| snapshot.number).collect();
        let (mut snapshots, mut snapshots_omitted) = (Vec::new(), 0);
        for (index, number) in all.into_iter().enumerate() {
            if search == Search::First && (head || !snapshots.is_empty()) {
                break;
            }
            if index % SNAPSHOTS_PER_TURN == SNAPSHOTS_PER_TURN - 1 {
                self.keep_scrub_rate(as_u64(SNAPSHOTS_PER_TURN)).await?;
            }
            let snapshot = vdi.snapshots.borrow().get(number).map(Rc::clone);
            let Some(snapshot) = snapshot else { continue };
            if snapshot.deleted.get() || !self.snapshot_names(&snapshot, subject, pba).await? {
                continue;
            }
            match snapshots.len() < LISTED_MAX {
                true => snapshots.push(snapshot.number),
                false => snapshots_omitted += 1,
            }
        }
        if !head && snapshots.is_empty() {
            return Ok(None);
        }
        let name = self.registry.borrow().name(vdi.id).to_owned();
        Ok(Some(Owner { id: vdi.id, name, head, snapshots, snapshots_omitted }))
    }

    async fn head_names(&self, vdi: &Vdi, subject: Subject, pba: Pba) -> Result<bool, Error> {
        match subject {
            Subject::Data(lba) if lba >= vdi.block_count.get() => Ok(false),
            Subject::Data(lba) => self.view_names(&vdi.head(), lba, pba).await,
            Subject::Node(level, start) => {
                let base = vdi.branch.borrow().base.borrow().clone();
                match base {
                    Base::Root(root) => self.tree_names(&root, level, start, pba).await,
                    Base::Point(..) => Ok(false),
                }
            }
            Subject::History(_) => Ok(false),
        }
    }

    async fn snapshot_names(
        &self,
        snapshot: &Snapshot,
        subject: Subject,
        pba: Pba,
    ) -> Result<bool, Error> {
        let contents = snapshot.point.contents.get();
        match (subject, contents) {
            (Subject::Data(lba), _) => {
                let (branch, point) = (Rc::clone(&snapshot.branch), Rc::clone(&snapshot.point));
                let is_within = lba < snapshot.block_count;
                Ok(is_within && self.view_names(&View::Point(branch, point), lba, pba).await?)
            }
            (Subject::Node(level, start), Contents::Tree(root)) => {
                self.tree_names(&root, level, start, pba).await
            }
            (Subject::Node(level, start), Contents::Past(past)) => {
                self.tree_names(&past.root, level, start, pba).await
            }
            (Subject::History(history), Contents::Past(past)) => Ok(past.history == history),
            (Subject::Node(..) | Subject::History(_), _) => Ok(false),
        }
    }

    async fn view_names(&self, view: &View, lba: u64, pba: Pba) -> Result<bool, Error> {
        let _reader = self.epochs.enter();
        let entries = match self.entries(view, lba..lba + 1).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => return Ok(false),
            entries => entries?,
        };
        let is_named =
            |entry: &ondisk::Entry| entry.state() == EntryState::Mapped && entry.pba() == pba;
        Ok(entries.first().is_some_and(is_named))
    }

    async fn tree_names(
        &self,
        root: &RootRef,
        level: u8,
        start: u64,
        pba: Pba,
    ) -> Result<bool, Error> {
        let _reader = self.epochs.enter();
        match tree::node(&self.nodes, root, level, start).await {
            Err(blockstore::Error::Damaged { .. }) => Ok(false),
            entry => {
                let entry = entry?;
                Ok(entry.state() == EntryState::Mapped && entry.pba() == pba)
            }
        }
    }

    /// The root of a table, as the last merge left it; `None` if it is there no more.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) async fn table_root(&self, table: Table) -> Result<Option<RootRef>, Error> {
        let roots = self.roots.get();
        Ok(Some(match table {
            Table::Directory => roots.directory,
            Table::Extents => roots.extents,
            Table::Bitmaps => roots.bitmaps,
            Table::BadBlocks => roots.bad_blocks,
            Table::Vdis => roots.vdis,
            Table::Snapshots(id) => {
                return Ok(self.merged_record(id).await?.map(|record| record.snapshots));
            }
            Table::Ledger(id) => {
                return Ok(self.merged_record(id).await?.map(|record| record.ledger));
            }
        }))
    }

    /// The record of a VDI, as the last merge left it. The caller holds a read epoch.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) async fn merged_record(&self, id: VdiId) -> Result<Option<VdiRecord>, Error> {
        match table::get(&self.nodes, &self.roots.get().vdis, id.get()).await {
            Err(blockstore::Error::Damaged { .. }) => Ok(None),
            record => Ok(record?),
        }
    }

    /// What people call a table.
    pub(super) fn table_title(&self, table: Table) -> String {
        match table {
            Table::Directory => "the directory".to_owned(),
            Table::Extents => "the extent table".to_owned(),
            Table::Bitmaps => "the bitmaps".to_owned(),
            Table::BadBlocks => "the bad blocks".to_owned(),
            Table::Vdis => "the VDI table".to_owned(),
            Table::Snapshots(id) => {
                format!("the snapshots of {}", self.registry.borrow().name(id))
            }
            Table::Ledger(id) => format!("the ledger of {}", self.registry.borrow().name(id)),
        }
    }
}

/// What people call the history of some snapshots.
pub(super) fn history_title(owners: &Owners) -> String {
    let Some(owner) = owners.listed.first() else { return "a history".to_owned() };
    match (owner.snapshots.first(), owner.snapshots.last()) {
        (Some(first), Some(last)) if first != last || owner.snapshots_omitted > 0 => {
            let count = as_u64(owner.snapshots.len()) + owner.snapshots_omitted;
            format!("the history of {count} snapshots from {}@{first} on", owner.name)
        }
        (Some(first), _) => format!("the history of {}@{first}", owner.name),
        _ => format!("a history of {}", owner.name),
    }
}
