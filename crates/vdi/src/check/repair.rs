//! Writing again what can be derived from what is intact.
//!
//! Control tables are not patched but written afresh, into blocks that neither slot nor the log
//! names, and published in both copies of the host slot: until the first publication is durable
//! the store is what it was, and a crash in between leaves one or the other.

use std::collections::{BTreeMap, BTreeSet};

use base::{Buffer, ClaimGeneration, ErrorKind, Lsn, Pba, SnapshotNumber, VdiId};
use blockstore::scheduler::Batch;
use blockstore::slots::{SlotPair, SlotWriter};
use blockstore::tree::{OnDamage, Outcome, TreeWriter};
use blockstore::{NodeStore, WriteScheduler, superblock, table};
use device::Device;
use ondisk::{
    DirectoryRecord, ExtentKind, ExtentRecord, HostSlot, RootRef, SUPERBLOCK_COPIES, TableRecord,
};
use runtime::Runtime;

use super::FindingKind;
use super::examine::{Examined, HOST};
use crate::Error;
use crate::claim::{Claim, Place};
use crate::engine::as_u64;
use crate::mark::{BlockSet, page_of_words};

/// Memory for nodes while tables are built.
const CACHE_BYTES: usize = 1 << 20;

/// Blocks beyond those that the tables' pages need: nodes above them.
const NODES_MARGIN: u64 = 64;

/// Repairs what can be repaired; one sentence for each thing that was. Durable on return.
///
/// # Errors
/// `NoSpace` if no block is free for new tables; device errors.
pub(super) async fn repair(
    device: &Device,
    runtime: &Runtime,
    examined: &Examined,
) -> Result<Vec<String>, Error> {
    let mut repairs = Vec::new();
    let mut _kept = None;
    if let Some(pair) = &examined.slots {
        let Examined { geometry, checksums, options, .. } = examined;
        let place = Place { device, runtime, geometry, checksums, host: HOST };
        let claim = Claim::make(&place, &pair.newest, options.boot_id, options.nonce).await?;
        claim.verify(&place, &pair.newest).await?;
        _kept = Some(claim.keep(&place));
    }
    let damaged = &examined.superblock.damaged;
    if !damaged.is_empty() {
        let [primary, secondary] = SUPERBLOCK_COPIES;
        let order = [secondary, primary].into_iter().filter(|at| damaged.contains(at));
        let copies: Vec<Pba> = order.collect();
        superblock::write(device, &examined.superblock.superblock, &copies).await?;
        repairs.extend(
            copies.iter().map(|at| format!("the superblock at block {at} was written again")),
        );
    }
    if let Some(pair) = &examined.slots {
        let mut repairer = Repairer::new(device, runtime, examined, pair);
        repairer.cut_log();
        repairer.tables().await?;
        repairs.extend(repairer.publish(pair).await?);
    }
    Ok(repairs)
}

struct Repairer<'a> {
    examined: &'a Examined,
    scheduler: WriteScheduler,
    nodes: NodeStore,
    batch: Batch,
    slot: HostSlot,
    /// Blocks of new tables.
    added: Vec<Pba>,
    /// Free metadata blocks, last one first.
    free: Vec<Pba>,
    repairs: Vec<String>,
}

impl<'a> Repairer<'a> {
    fn new(device: &Device, runtime: &Runtime, examined: &'a Examined, pair: &SlotPair) -> Self {
        let scheduler = WriteScheduler::new(runtime.clone(), device.clone());
        let nodes = NodeStore::new(
            runtime.clone(),
            device.clone(),
            scheduler.clone(),
            examined.checksums.clone(),
            CACHE_BYTES,
        );
        Self {
            examined,
            scheduler,
            nodes,
            batch: Batch::default(),
            slot: pair.newest.clone(),
            added: Vec::new(),
            free: Vec::new(),
            repairs: Vec::new(),
        }
    }

    /// Seals the log where it breaks: what stands before counts, what stands behind is lost.
    fn cut_log(&mut self) {
        let Some(broken) = &self.examined.log_break else { return };
        let Some(segment) = self.slot.segments.get_mut(broken.segment) else { return };
        let last = Lsn::new(broken.lsn.get().saturating_sub(1));
        if broken.durable < broken.lsn {
            // Nothing is known to be missing: the slot is older than the log, and cutting would
            // not help.
            return;
        }
        segment.last_lsn = last;
        let keep = if last < segment.first_lsn { broken.segment } else { broken.segment + 1 };
        self.slot.segments.truncate(keep);
        self.repairs.push(format!(
            "the log was cut at block {}: records {} to {} are lost, among them writes that were \
             flushed, and whatever came after",
            broken.at, broken.lsn, broken.durable
        ));
    }

    /// Writes the control tables afresh that are damaged or wrong.
    async fn tables(&mut self) -> Result<(), Error> {
        let space = &self.examined.space;
        let report = &self.examined.report;
        let found = |kind| report.errors.iter().any(|finding| finding.kind == kind);
        let directory = self.directory();
        let extents = self.extents();
        let bitmaps_wrong = !space.bitmaps_are_complete
            || found(FindingKind::ReachedButFree)
            || found(FindingKind::BitmapBlockLive)
            || report.counts.leaked_blocks > 0;
        let bad_wrong = !space.bad_blocks_state.is_complete;
        let bitmaps_wrong = bitmaps_wrong || !space.marks_state.is_complete;
        if directory.is_none() && extents.is_none() && !bitmaps_wrong && !bad_wrong {
            return Ok(());
        }
        let mut extents_now = extents.clone().unwrap_or_else(|| space.extents.clone());
        let needed = as_u64(space.directory.len() + space.vdis.len()) / 8
            + as_u64(space.reached.pages().count() + space.live.pages().count())
            + as_u64(space.bad.pages().count() + space.extents.len())
            + NODES_MARGIN;
        let taken = self.find_free(&mut extents_now, needed)?;
        let mut live = self.live_blocks();
        // They are of bitmaps that are no more.
        forget(&mut live, &space.marks_state.blocks);
        self.slot.roots.marks = RootRef::empty(1);
        if let Some(records) = directory {
            forget(&mut live, &space.directory_state.blocks);
            self.slot.roots.directory = self.store(&records).await?;
            self.repairs.push("the directory was written again".into());
        }
        if bad_wrong {
            forget(&mut live, &space.bad_blocks_state.blocks);
            let pages = pages_of(&space.bad);
            self.slot.roots.bad_blocks = self.store_pages(pages).await?;
            self.repairs.push("the list of bad blocks was written again".into());
        }
        if extents.is_some() || taken {
            forget(&mut live, &space.extents_state.blocks);
            let epoch = self.slot.epoch;
            let kinds = extents_now.iter();
            let kinds = kinds.filter(|(_, kind)| is_table_kind(**kind));
            let records = kinds.map(|(&index, &kind)| {
                (u64::from(index), Some(ExtentRecord { kind, owner: HOST, epoch }))
            });
            self.slot.roots.extents = self.store(&records.collect()).await?;
            self.repairs.push("the extent table was written again".into());
        }
        for &pba in &self.added {
            live.insert(pba);
        }
        let freed = as_u64(space.live.iter().filter(|&pba| !live.contains(pba)).count());
        self.slot.roots.bitmaps = self.store_pages(pages_of(&live)).await?;
        self.repairs.push(format!(
            "the bitmaps were written again: {} blocks in use, {freed} that nothing reached freed",
            live.len()
        ));
        Ok(())
    }

    /// The blocks that are in use: what is reached, and if not everything could be read, whatever
    /// the bitmaps held too.
    fn live_blocks(&self) -> BlockSet {
        let space = &self.examined.space;
        let mut live = space.reached.clone();
        if !space.is_complete {
            for pba in space.live.iter().filter(|&pba| !space.bitmap_blocks.contains(pba)) {
                live.insert(pba);
            }
        }
        live
    }

    /// The directory as it should be, if it is not: a VDI without a name gets one, a name without
    /// a VDI goes.
    fn directory(&mut self) -> Option<BTreeMap<u64, Option<DirectoryRecord>>> {
        let space = &self.examined.space;
        if !space.vdis_state.is_complete {
            // A VDI whose record cannot be read may be all there.
            return None;
        }
        let mut records: BTreeMap<u64, Option<DirectoryRecord>> = BTreeMap::new();
        let mut is_changed = !space.directory_state.is_complete;
        for (&index, record) in &space.directory {
            if space.vdis.contains_key(&index) {
                records.insert(index, Some(record.clone()));
            } else {
                is_changed = true;
                let name = &record.name;
                self.repairs.push(format!("{name} has no VDI record and was taken out"));
            }
        }
        for (&index, vdi) in &space.vdis {
            if records.contains_key(&index) {
                continue;
            }
            is_changed = true;
            let name = format!("recovered-{index}");
            self.repairs.push(format!("VDI {index} had lost its name and is now {name}"));
            let record = DirectoryRecord {
                id: vdi.id,
                parent: VdiId::default(),
                parent_snapshot: SnapshotNumber::default(),
                created_ns: 0,
                claim: vdi.claim.max(ClaimGeneration::new(1)),
                owner: HOST,
                name,
            };
            records.insert(index, Some(record));
        }
        is_changed.then_some(records)
    }

    /// What extents hold by what is reached in them, if the table says otherwise.
    fn extents(&mut self) -> Option<BTreeMap<u32, ExtentKind>> {
        let space = &self.examined.space;
        let wrong = |finding: &super::Finding| finding.kind == FindingKind::WrongExtent;
        if space.extents_state.is_complete && !self.examined.report.errors.iter().any(wrong) {
            return None;
        }
        let mut extents = space.extents.clone();
        let mut seen: BTreeMap<u32, ExtentKind> = BTreeMap::new();
        let mut mixed = BTreeSet::new();
        for pba in space.reached.iter() {
            let index = self.examined.geometry.extent_of(pba).get();
            let kind = match space.data.contains(pba) {
                true => ExtentKind::Data,
                false => ExtentKind::Metadata,
            };
            if *seen.entry(index).or_insert(kind) != kind {
                mixed.insert(index);
            }
        }
        for index in mixed {
            seen.remove(&index);
            let message = "holds data and metadata: this cannot be repaired";
            self.repairs.push(format!("extent {index} {message}"));
        }
        let movable =
            |index: &u32| space.extents.get(index).is_none_or(|kind| is_table_kind(*kind));
        extents.extend(seen.into_iter().filter(|(index, _)| movable(index)));
        Some(extents)
    }

    /// Finds free blocks in extents of metadata; makes a free extent one if need be. Whether it
    /// did.
    fn find_free(
        &mut self,
        extents: &mut BTreeMap<u32, ExtentKind>,
        count: u64,
    ) -> Result<bool, Error> {
        let space = &self.examined.space;
        let geometry = &self.examined.geometry;
        let mut free = Vec::new();
        let mut take = |index: u32| {
            let start = geometry.extent_start(base::ExtentIndex::new(index));
            let is_free = |pba: &Pba| {
                !space.named.contains(*pba)
                    && !space.live.contains(*pba)
                    && !space.bad.contains(*pba)
            };
            let blocks = (0..geometry.extent_blocks).map(|offset| start.plus(offset));
            let missing = usize::try_from(count).unwrap_or(usize::MAX).saturating_sub(free.len());
            free.extend(blocks.filter(is_free).take(missing));
            as_u64(free.len()) >= count
        };
        let metadata = extents.iter().filter(|(_, kind)| **kind == ExtentKind::Metadata);
        let mut enough = false;
        for (&index, _) in metadata {
            enough = enough || take(index);
        }
        let mut taken = false;
        for index in 0..geometry.extent_count() {
            if !enough && !extents.contains_key(&index) {
                extents.insert(index, ExtentKind::Metadata);
                taken = true;
                enough = take(index);
            }
        }
        if !enough {
            let message = "no block is free for new tables: the store cannot be repaired in place";
            return Err(Error::refused(ErrorKind::NoSpace, message));
        }
        free.reverse();
        self.free = free;
        Ok(taken)
    }

    async fn store<R: TableRecord>(
        &mut self,
        records: &BTreeMap<u64, Option<R>>,
    ) -> Result<RootRef, Error> {
        let mut free = std::mem::take(&mut self.free);
        let mut allocate = || take_last(&mut free);
        let mut writer = TreeWriter {
            nodes: &self.nodes,
            batch: &self.batch,
            allocate: &mut allocate,
            on_damage: OnDamage::Fail,
            outcome: Outcome::default(),
        };
        let root = table::store(&mut writer, RootRef::empty(1), records).await?;
        self.added.extend(writer.outcome.added);
        self.free = free;
        Ok(root)
    }

    async fn store_pages(&mut self, pages: Vec<(u64, Buffer)>) -> Result<RootRef, Error> {
        let mut free = std::mem::take(&mut self.free);
        let mut allocate = || take_last(&mut free);
        let mut writer = TreeWriter {
            nodes: &self.nodes,
            batch: &self.batch,
            allocate: &mut allocate,
            on_damage: OnDamage::Fail,
            outcome: Outcome::default(),
        };
        let root = table::store_pages(&mut writer, RootRef::empty(1), pages).await?;
        self.added.extend(writer.outcome.added);
        self.free = free;
        Ok(root)
    }

    /// Publishes in both copies of the slot, if there is anything to publish.
    async fn publish(self, pair: &SlotPair) -> Result<Vec<String>, Error> {
        let lone = pair.older.is_none() && pair.newest.sequence > 1;
        if self.repairs.is_empty() && !lone {
            return Ok(Vec::new());
        }
        let mut writer = SlotWriter::new(
            self.scheduler.clone(),
            self.examined.geometry.clone(),
            self.examined.checksums.clone(),
            pair.newest.clone(),
            pair.copy,
        );
        writer.publish(self.slot.clone(), &self.batch).await?;
        writer.publish(self.slot, &Batch::default()).await?;
        let mut repairs = self.repairs;
        if lone {
            repairs.push("the damaged copy of the host slot was written again".into());
        }
        Ok(repairs)
    }
}

fn take_last(free: &mut Vec<Pba>) -> Result<Pba, blockstore::Error> {
    let none = || blockstore::Error::refused(ErrorKind::NoSpace, "no block is free for new tables");
    free.pop().ok_or_else(none)
}

/// Whether the extent table has records of this kind: system and log stand in fixed places.
fn is_table_kind(kind: ExtentKind) -> bool {
    matches!(kind, ExtentKind::Data | ExtentKind::Metadata)
}

fn forget(live: &mut BlockSet, blocks: &BlockSet) {
    for pba in blocks.iter() {
        live.remove(pba);
    }
}

/// The stored pages of a set.
fn pages_of(blocks: &BlockSet) -> Vec<(u64, Buffer)> {
    blocks.pages().map(|(index, words)| (index, page_of_words(words))).collect()
}
