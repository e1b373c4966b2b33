//! Reading a store from its superblock to its last data block, in the order in which each part is
//! needed to judge the next.

use std::collections::{BTreeMap, HashMap, HashSet};

use base::{BirthLabel, Block, ErrorKind, HostId, Lsn, Pba, SnapshotNumber, VdiId};
use blockstore::allocator::BITMAP_PAGE_BLOCKS;
use blockstore::log::{Break, Replayed, survey};
use blockstore::slots::{SlotPair, check_vouched, read_slots};
use blockstore::{Geometry, NodeStore, WriteScheduler, superblock};
use device::Device;
use ondisk::{
    Checksums, DirectoryRecord, Entry, ExtentKind, ExtentRecord, History, HostSlot, LedgerRecord,
    Record, RecordBody, RootRef, SlotState, SnapshotRecord, TableRecord, VdiRecord, VersionRecord,
};
use runtime::Runtime;

use super::audit::{Audit, Tree, TreeKind, runs};
use super::{CheckOptions, CheckProgress, CheckReport, CheckStage, FindingKind, NotedHead, ledger};
use crate::Error;
use crate::claim::{self, Place};
use crate::engine::{Engine, as_u64};
use crate::history::{Seen, seen_by};
use crate::mark::{BlockSet, Marker, Named, PAGE_WORDS, Stride, Walk, words_of};
use crate::pace::Pace;
use crate::verify::{self, DataBlock, Fault};

/// The one host that there is today.
pub(super) const HOST: HostId = HostId::new(0);

/// Memory for nodes that are met again.
const CACHE_BYTES: usize = 4 << 20;

/// Pages that are read at a time.
const PAGES_AT_ONCE: usize = 64;

/// Runs of data that are read at a time.
const READS_AT_ONCE: usize = 8;

/// Data blocks that are gathered before they are read: what was scattered over a tree may be adjacent
/// on the device.
const GATHER_BLOCKS: usize = 16 << 10;

/// What an examination found, for a repair to go on from.
pub(super) struct Examined {
    pub(super) options: CheckOptions,
    pub(super) report: CheckReport,
    pub(super) superblock: superblock::Found,
    pub(super) geometry: Geometry,
    pub(super) checksums: Checksums,
    /// `None` if no copy is intact: nothing else was examined then.
    pub(super) slots: Option<SlotPair>,
    /// The log, and where it breaks.
    pub(super) log: Replayed,
    pub(super) log_break: Option<Break>,
    pub(super) space: Space,
}

/// What uses which block, as far as it could be read.
#[derive(Default)]
pub(super) struct Space {
    /// What the trees reach, the bitmaps' own blocks apart.
    pub(super) reached: BlockSet,
    pub(super) bitmap_blocks: BlockSet,
    /// What the bitmaps say.
    pub(super) live: BlockSet,
    pub(super) extents: BTreeMap<u32, ExtentKind>,
    pub(super) bad: BlockSet,
    pub(super) directory: BTreeMap<u64, DirectoryRecord>,
    /// VDIs that have a record of their own.
    pub(super) vdis: BTreeMap<u64, VdiRecord>,
    /// Blocks that log records name.
    pub(super) logged: BlockSet,
    /// Data blocks that either slot's trees reach.
    pub(super) data: BlockSet,
    /// Blocks that either slot's trees or log records name.
    pub(super) named: BlockSet,
    /// Whether all nodes and pages could be read.
    pub(super) is_complete: bool,
    pub(super) bitmaps_are_complete: bool,
    /// Whether all VDIs are known, and all nodes and pages below them could be read.
    pub(super) trees_are_complete: bool,
    pub(super) directory_state: TableState,
    pub(super) extents_state: TableState,
    pub(super) bad_blocks_state: TableState,
    pub(super) marks_state: TableState,
    pub(super) vdis_state: TableState,
}

/// A control table on the device.
#[derive(Default)]
pub(super) struct TableState {
    /// Blocks that it occupies.
    pub(super) blocks: BlockSet,
    /// Whether all of it could be read.
    pub(super) is_complete: bool,
}

struct Examiner<'a> {
    device: &'a Device,
    runtime: &'a Runtime,
    checksums: Checksums,
    nodes: NodeStore,
    progress: &'a dyn Fn(CheckProgress),
    audit: Audit,
    space: Space,
    stage: CheckStage,
    /// The trees of each VDI that were walked for the newer slot.
    walked: HashMap<u64, (RootRef, RootRef, RootRef)>,
    /// What ledgers must still hold.
    noted: &'a [NotedHead],
    /// Whose store it is, if it is in use.
    engine: Option<&'a Engine>,
    /// What it leaves to those who use it.
    pace: Option<Pace<'a>>,
}

/// Reads everything and judges it.
///
/// # Errors
/// See [`super::check`].
pub(super) async fn examine(
    device: &Device,
    runtime: &Runtime,
    options: CheckOptions,
    noted: &[NotedHead],
    progress: &dyn Fn(CheckProgress),
) -> Result<Examined, Error> {
    let found = superblock::read(device, runtime, options.repair).await?;
    let geometry = Geometry::new(&found.superblock);
    let checksums = Checksums::new(found.superblock.uuid, &found.superblock.key);
    let scheduler = WriteScheduler::new(runtime.clone(), device.clone());
    let at = Place { device, runtime, geometry: &geometry, checksums: &checksums, host: HOST };
    let mut examiner = Examiner::new(&at, scheduler, options.read_data, progress, None);
    examiner.noted = noted;
    for &at in &found.damaged {
        let message = format!("the copy of the superblock at block {at} is damaged");
        examiner.audit.error(FindingKind::Superblock, Some(at), message);
    }
    let mut examined = Examined {
        options,
        report: CheckReport::default(),
        superblock: found,
        geometry: geometry.clone(),
        checksums: checksums.clone(),
        slots: None,
        log: Replayed::default(),
        log_break: None,
        space: Space::default(),
    };
    match read_slots(device, runtime, &geometry, &checksums, HOST).await {
        Ok(pair) => {
            let (geometry, checksums) = (&geometry, &checksums);
            let place = Place { device, runtime, geometry, checksums, host: HOST };
            claim::refuse_alive(&place, &pair.newest, options.boot_id).await?;
            (examined.log, examined.log_break) = examiner.run(&pair).await?;
            examined.slots = Some(pair);
        }
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            let at = geometry.host_slot(HOST, 0);
            examiner.audit.error(FindingKind::HostSlot, Some(at), error.to_string());
        }
        Err(error) => return Err(error.into()),
    }
    let mut space = examiner.space;
    space.is_complete = examiner.audit.unread == 0;
    space.named = examiner.audit.named();
    space.data = std::mem::take(&mut examiner.audit.data);
    for pba in space.logged.iter() {
        space.named.insert(pba);
    }
    space.reached = std::mem::take(&mut examiner.audit.reached);
    space.bitmap_blocks = std::mem::take(&mut examiner.audit.bitmap_blocks);
    examined.space = space;
    examined.report = examiner.audit.report;
    Ok(examined)
}

/// Reads all metadata that one checkpoint of a store in use has published, and judges it. None of it may
/// be released meanwhile. `live` are the blocks that its engine says are reached.
///
/// # Errors
/// If the store has failed, is being closed, or somebody needs the space that is held back.
pub(super) async fn examine_cut(
    engine: &Engine,
    slot: &HostSlot,
    live: &BlockSet,
    noted: &[NotedHead],
    progress: &dyn Fn(CheckProgress),
) -> Result<CheckReport, Error> {
    let scheduler = engine.scheduler.clone();
    let mut examiner = Examiner::new(&engine.place(), scheduler, false, progress, Some(engine));
    examiner.noted = noted;
    let found = superblock::read(&engine.device, &engine.runtime, false).await?;
    for &at in &found.damaged {
        let message = format!("the copy of the superblock at block {at} is damaged");
        examiner.audit.error(FindingKind::Superblock, Some(at), message);
    }
    examiner.published(slot).await;
    let reached = std::mem::take(&mut examiner.audit.reached);
    for (first, last) in examiner.runs_beyond(&reached, live).await {
        let message = format!(
            "blocks {first} to {last} are reached, but the daemon holds them for free: stop it"
        );
        examiner.audit.error(FindingKind::ReachedButFree, Some(first), message);
    }
    engine.go_on_checking()?;
    Ok(examiner.audit.report)
}

impl<'a> Examiner<'a> {
    fn new(
        place: &Place<'a>,
        scheduler: WriteScheduler,
        read_data: bool,
        progress: &'a dyn Fn(CheckProgress),
        engine: Option<&'a Engine>,
    ) -> Self {
        let (device, runtime, checksums) = (place.device, place.runtime, place.checksums);
        let nodes = NodeStore::new(
            runtime.clone(),
            device.clone(),
            scheduler,
            checksums.clone(),
            CACHE_BYTES,
        );
        Self {
            device,
            runtime,
            checksums: checksums.clone(),
            nodes,
            progress,
            audit: Audit::new(place.geometry.clone(), read_data),
            space: Space::default(),
            stage: CheckStage::Log,
            walked: HashMap::new(),
            noted: &[],
            engine,
            pace: engine.map(Pace::new),
        }
    }

    async fn run(&mut self, pair: &SlotPair) -> Result<(Replayed, Option<Break>), Error> {
        let slot = &pair.newest;
        self.audit.report.closed_cleanly = slot.state == SlotState::Clean;
        self.slots(pair);
        self.step(CheckStage::Log);
        let (log, log_break) = self.log(slot, "the log").await?;
        if slot.state == SlotState::Running
            && let Err(error) = check_vouched(slot, log.slot_sequence)
        {
            self.audit.error(FindingKind::HostSlot, None, error.to_string());
        }
        self.published(slot).await;
        self.step(CheckStage::OlderSlot);
        if let Some(older) = &pair.older {
            self.older_slot(older, slot).await?;
        }
        self.logged_blocks(&log, slot).await;
        Ok((log, log_break))
    }

    /// Everything that a slot's roots reach.
    async fn published(&mut self, slot: &HostSlot) {
        self.step(CheckStage::Tables);
        self.extents(slot).await;
        self.bitmaps(slot.roots.bitmaps).await;
        self.bad_blocks(slot.roots.bad_blocks).await;
        self.space.marks_state = self.marks("the marks", slot.roots.marks).await;
        self.directory(slot).await;
        self.vdi_table(slot).await;
        self.step(CheckStage::Vdis);
        let unread = self.audit.unread;
        let ids: Vec<u64> = self.space.vdis.keys().copied().collect();
        for id in ids {
            if self.is_over() {
                break;
            }
            if let Some(record) = self.space.vdis.get(&id).cloned() {
                self.vdi(&record, slot).await;
            }
        }
        self.space.trees_are_complete =
            self.space.vdis_state.is_complete && self.audit.unread == unread;
        self.compare_space().await;
    }

    /// Whether somebody needs what a check of a store in use holds back: then its findings do not count.
    fn is_over(&self) -> bool {
        self.engine.is_some_and(|engine| engine.go_on_checking().is_err())
    }

    fn step(&mut self, stage: CheckStage) {
        self.stage = stage;
        self.report_progress();
    }

    fn report_progress(&self) {
        let (done, total) = match self.stage {
            CheckStage::Vdis => (self.audit.reached.len(), self.space.live.len()),
            _ => (0, 0),
        };
        (self.progress)(CheckProgress { stage: self.stage, done, total });
    }

    /// A copy of the slot is torn by a crash in the middle of its write, and by nothing else.
    fn slots(&mut self, pair: &SlotPair) {
        if pair.older.is_some() || (!pair.other_damaged && pair.newest.sequence <= 1) {
            return;
        }
        let at = self.audit.geometry.host_slot(HOST, 1 - pair.copy);
        let message = format!("the copy of the host slot at block {at} is damaged");
        match pair.newest.state {
            SlotState::Running => {
                let message = format!("{message}, as a crash may leave it");
                self.audit.warn(FindingKind::HostSlot, Some(at), message);
            }
            _ => self.audit.error(FindingKind::HostSlot, Some(at), message),
        }
    }

    async fn log(
        &mut self,
        slot: &HostSlot,
        title: &str,
    ) -> Result<(Replayed, Option<Break>), Error> {
        if slot.state != SlotState::Running {
            return Ok((Replayed { durable: slot.cut, ..Replayed::default() }, None));
        }
        let (log, broken) = survey(
            self.device,
            self.runtime,
            &self.audit.geometry,
            slot.log_start,
            &self.checksums,
            &slot.segments,
            &mut |_, _| {},
        )
        .await?;
        if let Some(at) = log.unreadable {
            let message = format!("{title} ends at block {at}, which cannot be read");
            self.audit.warn(FindingKind::Log, Some(at), message);
        }
        if let Some(broken) = broken {
            let message = format!(
                "{title} is damaged at block {} ({}): record {} is missing, but records up to {} \
                 were durable",
                broken.at, broken.what, broken.lsn, broken.durable
            );
            self.audit.error(FindingKind::Log, Some(broken.at), message);
        }
        Ok((log, broken))
    }

    /// Walks trees that may share nodes with each other and with those walked before.
    async fn walk(&mut self, trees: Vec<(Tree, RootRef)>) {
        let mut walk = Walk::default();
        self.audit.entered = BlockSet::default();
        self.audit.trees = trees.iter().map(|(tree, _)| tree.clone()).collect();
        for (number, (tree, root)) in trees.iter().enumerate() {
            if root.entry.state() == ondisk::EntryState::Mapped && !root.entry.matches(root.hash) {
                let message = format!("{}: the root's two hashes disagree", tree.title);
                self.audit.error(FindingKind::Record, Some(root.entry.pba()), message);
            }
            walk.add(number, root, &mut self.audit);
        }
        loop {
            let stride = self.pace.as_ref().map_or(Stride::ALONE, Pace::stride);
            if !walk.step(&self.nodes, stride, &mut self.audit).await {
                break;
            }
            if self.audit.unverified.len() >= GATHER_BLOCKS {
                self.verify().await;
            }
            self.report_progress();
            if self.engine.is_some_and(|engine| engine.go_on_checking().is_err()) {
                return walk.stop().await;
            }
            match &mut self.pace {
                Some(pace) => pace.rest().await,
                None => self.runtime.yield_now().await,
            }
        }
        self.verify().await;
    }

    async fn verify(&mut self) {
        let blocks = std::mem::take(&mut self.audit.unverified);
        self.audit.counts().data_blocks_verified += as_u64(blocks.len());
        for (block, fault) in self.faults(blocks).await {
            let title = self.audit.trees.get(block.tree).map_or("?", |tree| &tree.title);
            let what = format!("{title}, block {}: block {} of the store", block.lba, block.pba);
            self.data_fault(block.pba, &what, fault);
        }
    }

    async fn faults(&self, blocks: Vec<DataBlock>) -> Vec<(DataBlock, Fault)> {
        verify::verify(self.device, self.runtime, &self.checksums, READS_AT_ONCE, blocks).await
    }

    fn data_fault(&mut self, pba: Pba, what: &str, fault: Fault) {
        let message = match fault {
            Fault::Mismatch => format!("{what} does not verify"),
            Fault::Unreadable(error) => format!("{what} cannot be read: {error}"),
        };
        self.audit.error(FindingKind::Data, Some(pba), message);
    }

    /// Walks the tree of a table, and shows each page that verifies.
    async fn table_pages(
        &mut self,
        title: &str,
        kind: TreeKind,
        root: RootRef,
        mut see: impl FnMut(&mut Self, u64, &Block),
    ) -> TableState {
        let unread = self.audit.unread;
        let reached_before = std::mem::take(&mut self.audit.reached);
        let tree = Tree {
            title: title.to_owned(),
            kind,
            exclusive_above: BirthLabel::new(0),
            label_max: BirthLabel::new(u32::MAX),
            block_count: u64::MAX,
        };
        self.walk(vec![(tree.clone(), root)]).await;
        let mut pages = std::mem::take(&mut self.audit.pages);
        pages.sort_unstable_by_key(|(number, _)| *number);
        for chunk in pages.chunks(PAGES_AT_ONCE) {
            if self.is_over() {
                break;
            }
            let entries: Vec<Entry> = chunk.iter().map(|(_, entry)| *entry).collect();
            let loaded = self.nodes.load_all(entries).await;
            for (&(number, entry), page) in chunk.iter().zip(loaded) {
                match page {
                    Ok(page) => see(self, number, page.block()),
                    Err(error) => {
                        self.audit.trees = vec![tree.clone()];
                        let page = Named {
                            tree: 0,
                            entry,
                            level: 0,
                            start: number,
                            parent_birth: entry.birth(),
                        };
                        self.audit.unreadable(&page, 1, &error);
                    }
                }
            }
        }
        let blocks = std::mem::replace(&mut self.audit.reached, reached_before);
        for pba in blocks.iter() {
            self.audit.reached.insert(pba);
        }
        TableState { blocks, is_complete: self.audit.unread == unread }
    }

    /// The records of a table.
    async fn table<R: TableRecord>(
        &mut self,
        title: &str,
        root: RootRef,
    ) -> (BTreeMap<u64, R>, TableState) {
        let mut records = BTreeMap::new();
        let mut is_sound = true;
        let see = |this: &mut Self, number: u64, page: &Block| {
            for index in number * R::PER_PAGE..(number + 1) * R::PER_PAGE {
                match R::get(page, index) {
                    Ok(Some(record)) => {
                        records.insert(index, record);
                    }
                    Ok(None) => {}
                    Err(error) => {
                        is_sound = false;
                        this.wrong(format!("{title}, record {index}: {error}"));
                    }
                }
            }
        };
        let mut state = self.table_pages(title, TreeKind::Table, root, see).await;
        state.is_complete &= is_sound;
        (records, state)
    }

    fn wrong(&mut self, message: String) {
        self.audit.error(FindingKind::Record, None, message);
    }

    async fn extents(&mut self, slot: &HostSlot) {
        let (records, state) =
            self.table::<ExtentRecord>("the extent table", slot.roots.extents).await;
        let geometry = self.audit.geometry.clone();
        let log_end = slot.log_start.plus(geometry.ring_blocks.saturating_sub(1));
        let log = geometry.extent_of(slot.log_start).get()..=geometry.extent_of(log_end).get();
        let mut extents = BTreeMap::from([(0, ExtentKind::System)]);
        extents.extend(log.map(|index| (index, ExtentKind::Log)));
        for (index, record) in records {
            let exists = u32::try_from(index).ok().filter(|&at| at < geometry.extent_count());
            match exists {
                Some(at) if !extents.contains_key(&at) => {
                    extents.insert(at, record.kind);
                }
                _ => self.wrong(format!("the extent table owns extent {index}, which is none")),
            }
        }
        if state.is_complete {
            // The table's own blocks are judged by what they say.
            for pba in state.blocks.iter() {
                if extents.get(&geometry.extent_of(pba).get()) != Some(&ExtentKind::Metadata) {
                    let message =
                        format!("the extent table: block {pba} lies in no extent of Metadata");
                    self.audit.error(FindingKind::WrongExtent, Some(pba), message);
                }
            }
            self.audit.extents = Some(extents.clone());
        }
        self.space.extents = extents;
        self.space.extents_state = state;
    }

    async fn bitmaps(&mut self, root: RootRef) {
        let mut live = BlockSet::default();
        let see = |this: &mut Self, number: u64, page: &Block| {
            if this.is_page_of_bits(number, "the bitmaps") {
                live.insert_page(number, &words_of(&page.0));
            }
        };
        let state = self.table_pages("the bitmaps", TreeKind::Bitmaps, root, see).await;
        self.space.bitmaps_are_complete = state.is_complete;
        self.audit.counts().live_blocks = live.len();
        self.space.live = live;
    }

    /// Whether a page of bits describes blocks of the store; a table that has others is damaged.
    fn is_page_of_bits(&mut self, number: u64, title: &str) -> bool {
        let exists = number < self.audit.geometry.block_count.div_ceil(BITMAP_PAGE_BLOCKS);
        if !exists {
            self.audit.unread += 1;
            self.wrong(format!("{title}: page {number} lies behind the end of the store"));
        }
        exists
    }

    async fn bad_blocks(&mut self, root: RootRef) {
        let mut bad = BlockSet::default();
        let see = |this: &mut Self, number: u64, page: &Block| {
            if this.is_page_of_bits(number, "the bad blocks") {
                bad.insert_page(number, &words_of(&page.0));
            }
        };
        let state = self.table_pages("the bad blocks", TreeKind::Table, root, see).await;
        self.audit.counts().bad_blocks = bad.len();
        self.space.bad = bad;
        self.space.bad_blocks_state = state;
    }

    /// Marks name what was reached, and nothing depends on them: damage of theirs hides nothing else.
    async fn marks(&mut self, title: &str, root: RootRef) -> TableState {
        let unread = self.audit.unread;
        let state = self.table_pages(title, TreeKind::Table, root, |_, _, _| {}).await;
        self.audit.unread = unread;
        state
    }

    async fn directory(&mut self, slot: &HostSlot) {
        let (records, state) =
            self.table::<DirectoryRecord>("the directory", slot.roots.directory).await;
        self.space.directory_state = state;
        let mut names = HashSet::new();
        for (index, record) in records {
            let id = record.id;
            if id.get() >= slot.vdi_id_next {
                self.wrong(format!("the directory: VDI {id} has an id that was not given yet"));
                continue;
            }
            if !names.insert(record.name.clone()) {
                self.wrong(format!("the directory: two VDIs are named {}", record.name));
            }
            self.space.directory.insert(index, record);
        }
    }

    async fn vdi_table(&mut self, slot: &HostSlot) {
        let (records, state) = self.table::<VdiRecord>("the VDI table", slot.roots.vdis).await;
        self.space.vdis_state = state;
        for (index, record) in records {
            if !self.space.directory.contains_key(&index) {
                self.wrong(format!("VDI {index} has a record, but no name in the directory"));
            }
            self.space.vdis.insert(index, record);
        }
        for (index, name) in self.names() {
            if !self.space.vdis.contains_key(&index) {
                self.wrong(format!("{name} is in the directory, but VDI {index} has no record"));
            }
        }
        let noted: HashSet<&str> = self.noted.iter().map(|noted| noted.vdi.as_str()).collect();
        let directory = self.space.directory.values();
        let found: HashSet<&str> =
            directory.map(|it| it.name.as_str()).filter(|name| noted.contains(name)).collect();
        for vdi in noted.difference(&found) {
            let message = format!(
                "{vdi}: its ledger was noted, and there is no such disk: it was deleted, or has another name (also \
                 one that only the log has until the next start)"
            );
            self.audit.error(FindingKind::Ledger, None, message);
        }
        self.audit.counts().vdis = as_u64(self.space.vdis.len());
    }

    fn names(&self) -> Vec<(u64, String)> {
        let directory = self.space.directory.iter();
        directory.map(|(&index, record)| (index, record.name.clone())).collect()
    }

    fn name_of(&self, id: VdiId) -> String {
        let record = self.space.directory.get(&id.get());
        record.map_or_else(|| format!("VDI {id}"), |record| record.name.clone())
    }

    async fn vdi(&mut self, record: &VdiRecord, slot: &HostSlot) {
        let name = self.name_of(record.id);
        self.walked.insert(record.id.get(), (record.root, record.snapshots, record.ledger));
        if record.lsn > slot.cut || record.label < record.shared_up_to {
            self.wrong(format!("{name}: its record is ahead of the checkpoint it stands in"));
        }
        let title = format!("the snapshots of {name}");
        let (snapshots, state) = self.table::<SnapshotRecord>(&title, record.snapshots).await;
        if state.is_complete && as_u64(snapshots.len()) != record.snapshot_count {
            self.wrong(format!(
                "{name}: {} snapshots are there, but its record says {}",
                snapshots.len(),
                record.snapshot_count
            ));
        }
        self.audit.counts().snapshots += as_u64(snapshots.len());
        self.ledger(&name, record, &snapshots).await;
        let mut trees = vec![(head_tree(&name, record), record.root)];
        let mut histories = Histories::default();
        for (index, snapshot) in snapshots {
            if snapshot.number >= record.snapshot_next || snapshot.position > record.lsn {
                self.wrong(format!("{name}@{index}: the record makes no sense"));
            }
            trees.push((snapshot_tree(&name, record, &snapshot), snapshot.root));
            histories.add(&snapshot);
        }
        self.walk(trees).await;
        self.histories(&name, record, histories).await;
    }

    /// Reads the ledger of a VDI, and judges what it says that is held.
    async fn ledger(
        &mut self,
        name: &str,
        record: &VdiRecord,
        snapshots: &BTreeMap<u64, SnapshotRecord>,
    ) {
        let title = format!("the ledger of {name}");
        let (records, _) = self.table::<LedgerRecord>(&title, record.ledger).await;
        let records: Vec<LedgerRecord> = records.into_values().collect();
        let (errors, lost) =
            ledger::judge(self.checksums.uuid(), name, record, &records, snapshots);
        for (kind, message) in errors {
            self.audit.error(kind, None, message);
        }
        if let Some(message) = lost {
            self.audit.warn(FindingKind::Ledger, None, message);
        }
        for noted in self.noted.iter().filter(|noted| noted.vdi == name) {
            match ledger::compare(noted, &records) {
                Ok(None) => {}
                Ok(Some(message)) => self.audit.warn(FindingKind::Ledger, None, message),
                Err(message) => self.audit.error(FindingKind::Ledger, None, message),
            }
        }
    }

    /// Reads histories, and what snapshots see of them.
    async fn histories(&mut self, name: &str, record: &VdiRecord, histories: Histories) {
        for (history, numbers, seen) in histories.0.into_values() {
            let title = match (numbers.first(), numbers.last()) {
                (Some(first), Some(last)) => format!("{name}@{first} to {name}@{last}"),
                _ => name.to_owned(),
            };
            let table = format!("the history of {title}");
            let (versions, state) = self.table::<VersionRecord>(&table, history.versions).await;
            let is_whole = versions.keys().copied().eq(0..u64::from(history.count));
            let versions: Vec<VersionRecord> = versions.into_values().collect();
            let is_sorted = versions.is_sorted_by_key(|version| (version.block, version.lsn));
            if state.is_complete && !(is_whole && is_sorted) {
                self.wrong(format!("{table}: versions are missing, or out of order"));
            }
            let tree = Tree {
                title,
                kind: TreeKind::Vdi,
                exclusive_above: BirthLabel::new(u32::MAX),
                label_max: record.label,
                block_count: u64::MAX,
            };
            self.audit.trees = vec![tree];
            for version in seen_by(&versions, &seen) {
                let VersionRecord { block: start, entry, .. } = *version;
                let parent_birth = entry.birth();
                self.audit.block(&Named { tree: 0, entry, level: 0, start, parent_birth });
                if self.audit.unverified.len() >= GATHER_BLOCKS {
                    self.verify().await;
                }
            }
            self.verify().await;
        }
    }

    /// Holds what is reached against the bitmaps.
    async fn compare_space(&mut self) {
        let reached = std::mem::take(&mut self.audit.reached);
        for (first, last) in self.runs_beyond(&reached, &self.space.live).await {
            let message = format!(
                "blocks {first} to {last} are reached, but the bitmaps say that they are free"
            );
            self.audit.error(FindingKind::ReachedButFree, Some(first), message);
        }
        let own: Vec<Pba> = {
            let blocks = self.audit.bitmap_blocks.iter();
            blocks.filter(|&pba| self.space.live.contains(pba)).collect()
        };
        for pba in own {
            let message = format!("block {pba} is the bitmaps' own, but marked as reached");
            self.audit.error(FindingKind::BitmapBlockLive, Some(pba), message);
        }
        let retired: Vec<Pba> =
            self.space.bad.iter().filter(|&pba| reached.contains(pba)).collect();
        for pba in retired {
            let (kind, why) = match self.audit.data.contains(pba) {
                true => (FindingKind::Record, "was retired after a failed write"),
                false => (FindingKind::Metadata, "was given up as damaged, with what it names"),
            };
            self.audit.error(kind, Some(pba), format!("block {pba} is reached, but {why}"));
        }
        // What lies below a node that could not be read is not known to be leaked.
        if self.audit.unread == 0 {
            let mut leaked = 0;
            for (index, live) in self.space.live.pages() {
                leaked += live.iter().zip(words_at(&reached, index)).map(beyond).sum::<u64>();
                self.runtime.yield_now().await;
            }
            self.audit.counts().leaked_blocks = leaked;
        }
        self.audit.reached = reached;
    }

    /// The blocks of a set that another one lacks, as runs.
    async fn runs_beyond(&self, all: &BlockSet, known: &BlockSet) -> Vec<(Pba, Pba)> {
        let mut found = Vec::new();
        for (index, words) in all.pages() {
            self.runtime.yield_now().await;
            if words.iter().zip(words_at(known, index)).map(beyond).sum::<u64>() == 0 {
                continue;
            }
            let start = index * BITMAP_PAGE_BLOCKS;
            let blocks = (start..start + BITMAP_PAGE_BLOCKS).map(Pba::new);
            found.extend(runs(blocks.filter(|&at| all.contains(at) && !known.contains(at))));
        }
        found
    }

    /// Walks what only the older slot reaches: it must be whole too, and so must its log.
    async fn older_slot(&mut self, older: &HostSlot, newer: &HostSlot) -> Result<(), Error> {
        self.audit.older = true;
        self.log(older, "the older slot's log").await?;
        let (roots, newer) = (older.roots, newer.roots);
        let same = |a: &RootRef, b: &RootRef| a == b;
        if !same(&roots.extents, &newer.extents) {
            self.table::<ExtentRecord>("the older extent table", roots.extents).await;
        }
        for (title, kind, root, other) in [
            ("the older bitmaps", TreeKind::Bitmaps, roots.bitmaps, newer.bitmaps),
            ("the older bad blocks", TreeKind::Table, roots.bad_blocks, newer.bad_blocks),
        ] {
            if !same(&root, &other) {
                self.table_pages(title, kind, root, |_, _, _| {}).await;
            }
        }
        if !same(&roots.marks, &newer.marks) {
            self.marks("the older marks", roots.marks).await;
        }
        if !same(&roots.directory, &newer.directory) {
            self.table::<DirectoryRecord>("the older directory", roots.directory).await;
        }
        if same(&roots.vdis, &newer.vdis) {
            return Ok(());
        }
        let (records, _) = self.table::<VdiRecord>("the older VDI table", roots.vdis).await;
        for (index, record) in records {
            let walked = (record.root, record.snapshots, record.ledger);
            if self.walked.get(&index) == Some(&walked) {
                continue;
            }
            let name = self.name_of(record.id);
            self.table::<LedgerRecord>(&format!("the older ledger of {name}"), record.ledger).await;
            let title = format!("the older snapshots of {name}");
            let (snapshots, _) = self.table::<SnapshotRecord>(&title, record.snapshots).await;
            let mut trees = vec![(head_tree(&name, &record), record.root)];
            let mut histories = Histories::default();
            for snapshot in snapshots.into_values() {
                trees.push((snapshot_tree(&name, &record, &snapshot), snapshot.root));
                histories.add(&snapshot);
            }
            self.walk(trees).await;
            self.histories(&name, &record, histories).await;
        }
        Ok(())
    }

    /// Holds the blocks that log records name against everything else.
    async fn logged_blocks(&mut self, log: &Replayed, slot: &HostSlot) {
        let mut vdis: HashSet<VdiId> =
            self.space.directory.keys().map(|&id| VdiId::new(id)).collect();
        let mut settled = Vec::new();
        for (lsn, record) in log.records.iter().filter(|(lsn, _)| *lsn > slot.cut) {
            self.audit.counts().log_records += 1;
            let is_settled = *lsn <= log.durable;
            if !is_settled {
                self.audit.counts().log_records_doubtful += 1;
            }
            self.logged_vdi(&mut vdis, *lsn, record, is_settled);
            let RecordBody::Write { pba, hashes, .. } = &record.body else { continue };
            for (index, &hash) in (0u64..).zip(hashes) {
                let pba = pba.plus(index);
                self.logged_block(*lsn, pba);
                if is_settled && self.audit.read_data {
                    let hash48 = hash & ((1 << 48) - 1);
                    settled.push(DataBlock { pba, hash48, tree: 0, lba: lsn.get() });
                }
            }
        }
        self.audit.counts().data_blocks_verified += as_u64(settled.len());
        for (block, fault) in self.faults(settled).await {
            let what = format!("log record {}: block {} of the store", block.lba, block.pba);
            self.data_fault(block.pba, &what, fault);
        }
    }

    fn logged_vdi(
        &mut self,
        vdis: &mut HashSet<VdiId>,
        lsn: Lsn,
        record: &Record,
        is_settled: bool,
    ) {
        match record.body {
            RecordBody::Create { .. } | RecordBody::Clone { .. } => {
                vdis.insert(record.vdi);
            }
            RecordBody::Void { .. }
            | RecordBody::Time { .. }
            | RecordBody::RetainByDefault { .. } => {}
            _ if is_settled && !vdis.contains(&record.vdi) => {
                let message = format!("log record {lsn} changes VDI {}, which is none", record.vdi);
                self.audit.error(FindingKind::Log, None, message);
            }
            RecordBody::Delete => {
                vdis.remove(&record.vdi);
            }
            _ => {}
        }
    }

    fn logged_block(&mut self, lsn: Lsn, pba: Pba) {
        if pba.get() >= self.audit.geometry.block_count {
            let message = format!("log record {lsn} names block {pba}, which lies outside");
            self.audit.error(FindingKind::Log, Some(pba), message);
            return;
        }
        if self.audit.is_named(pba) || !self.space.logged.insert(pba) {
            let message = format!("log record {lsn} names block {pba}, which is somebody else's");
            self.audit.error(FindingKind::NamedTwice, Some(pba), message);
        }
        if matches!(self.audit.extent_kind(pba), Some(ExtentKind::System | ExtentKind::Log)) {
            let message = format!("log record {lsn} names block {pba} of the system or the log");
            self.audit.error(FindingKind::WrongExtent, Some(pba), message);
        }
    }
}

/// A page of a set; an empty one if it has none.
fn words_at(set: &BlockSet, index: u64) -> &[u64; PAGE_WORDS] {
    set.page(index).unwrap_or(&[0; PAGE_WORDS])
}

/// How many blocks one word has that the other lacks.
fn beyond((all, known): (&u64, &u64)) -> u64 {
    u64::from((all & !known).count_ones())
}

/// Histories by where they stand, with the numbers of their snapshots and what is seen of these.
#[derive(Default)]
struct Histories(BTreeMap<Pba, (History, Vec<SnapshotNumber>, Vec<Seen>)>);

impl Histories {
    fn add(&mut self, snapshot: &SnapshotRecord) {
        let Some(history) = snapshot.history else { return };
        let (_, numbers, seen) =
            self.0.entry(history.at()).or_insert_with(|| (history, Vec::new(), Vec::new()));
        numbers.push(snapshot.number);
        seen.push(Seen::of(snapshot));
    }
}

fn head_tree(name: &str, record: &VdiRecord) -> Tree {
    Tree {
        title: name.to_owned(),
        kind: TreeKind::Vdi,
        exclusive_above: record.shared_up_to,
        label_max: record.label,
        block_count: record.block_count,
    }
}

fn snapshot_tree(name: &str, record: &VdiRecord, snapshot: &SnapshotRecord) -> Tree {
    Tree {
        title: format!("{name}@{}", snapshot.number),
        kind: TreeKind::Vdi,
        // Whatever a snapshot holds may be shared.
        exclusive_above: BirthLabel::new(u32::MAX),
        label_max: record.label,
        // The tree that a history changes may be of a time when the VDI was larger.
        block_count: snapshot.history.map_or(snapshot.block_count, |_| u64::MAX),
    }
}
