//! One pass: everything in use, read once from the device, whatever caches know of it.

use std::ops::Range;
use std::rc::Rc;

use base::{BLOCK_SIZE_U64, ErrorKind, Pba, SnapshotNumber, VdiId};
use blockstore::tree;
use device::{Cause, DeviceError};
use ondisk::{Entry, EntryState, History, Node, RootRef, SlotState, VersionRecord};

use super::owners::{Owners, Search, Subject, history_title};
use super::{Damage, DamageKind, Scrubber, Watch};
use crate::Error;
use crate::damage::Table;
use crate::engine::{Engine, as_u64};
use crate::history::{Seen, seen_by};
use crate::mark::{BlockSet, Marker, Named, Walk};
use crate::reach::{self, Visitor};
use crate::verify::{self, DataBlock, Fault};

/// Nodes that are read at a time.
const NODES_AT_ONCE: usize = 8;

/// Data blocks that are gathered before they are read: what is scattered over a tree may be adjacent on
/// the device. What eight leaves name, or a little more.
const GATHER_BLOCKS: usize = 2048;

/// Data blocks that are read between two pauses: 1 MiB, so that no guest waits behind many.
const BLOCKS_PER_PAUSE: usize = 256;

/// Runs of data that are read at a time: guests have the rest of the device's queue.
const READS_AT_ONCE: usize = 2;

/// Rounds through all VDIs. Two are enough unless trees move from one VDI to another meanwhile.
const ROUNDS_MAX: usize = 16;

/// Runs a pass.
///
/// # Errors
/// If it was to end, or the device fails.
pub(super) async fn run(engine: &Rc<Engine>) -> Result<(), Error> {
    if !engine.read_only
        && let Err(error) = engine.checkpoint(SlotState::Running).await
    {
        // Then what has been written since the last one is left to the next pass.
        tracing::warn!(%error, "scrub goes on without a checkpoint");
    }
    let mut pass = Pass {
        engine: Rc::clone(engine),
        tree: Tree::Table(Table::Directory),
        unread: Vec::new(),
        pages: None,
        fresh: 0,
    };
    pass.note_due().await?;
    for _ in 0..ROUNDS_MAX {
        pass.fresh = 0;
        pass.round().await?;
        if pass.fresh == 0 {
            return Ok(());
        }
    }
    tracing::warn!("scrub ends although disks move on: the next pass reads what is left");
    Ok(())
}

/// What is being walked.
#[derive(Clone, Copy, Debug)]
enum Tree {
    Head(VdiId),
    /// One that no checkpoint changes.
    Snapshots,
    Table(Table),
    History(History),
}

struct Pass {
    engine: Rc<Engine>,
    tree: Tree,
    /// Data blocks that are to be read.
    unread: Vec<DataBlock>,
    /// Pages that the walk of a table found.
    pages: Option<Vec<(u64, Entry)>>,
    /// Blocks that this round has read first, or could not find.
    fresh: u64,
}

/// What reading a node gave.
enum Read {
    Sound(Node),
    Freed,
    Failed(Fault),
}

impl Pass {
    fn scrubber(&self) -> &Scrubber {
        &self.engine.scrubber
    }

    fn watch<T>(&self, look: impl FnOnce(&mut Watch) -> T) -> T {
        self.scrubber().watch(look)
    }

    /// Notes what is in use.
    async fn note_due(&mut self) -> Result<(), Error> {
        let mut from = 0;
        while let Some((index, words)) = self.engine.allocator.live_page(from) {
            self.watch(|watch| watch.due.insert_page(index, &words));
            from = index + 1;
            self.engine.runtime.yield_now().await;
            self.engine.scrub_goes_on()?;
        }
        let total = self.watch(|watch| watch.due.len());
        self.scrubber().total_blocks.set(total);
        Ok(())
    }

    /// Goes through everything. What was gone through before is known at its root.
    async fn round(&mut self) -> Result<(), Error> {
        for table in
            [Table::Directory, Table::Extents, Table::Bitmaps, Table::BadBlocks, Table::Vdis]
        {
            self.look_up_roots();
            let Some(root) = self.engine.table_root(table).await? else { continue };
            for page in self.pages(table, &root).await? {
                self.page(table, page).await?;
            }
        }
        let mut last = VdiId::new(0);
        while let Some(id) = self.next_vdi(last) {
            last = id;
            self.look_up_roots();
            let reader = self.engine.epochs.enter();
            let record = self.engine.merged_record(id).await?;
            drop(reader);
            if let Some(record) = record {
                match reach::vdi(&record, self).await {
                    // A record verifies and makes no sense: the other disks are to be read all the same.
                    Err(error) if error.kind() == ErrorKind::Corrupt => {
                        let registry = self.engine.registry.borrow();
                        tracing::error!(disk = registry.name(id), %error, "scrub skips a disk");
                    }
                    read => read?,
                }
            }
            // Where nothing is new, nothing is read.
            self.engine.scrub_goes_on()?;
            self.engine.runtime.yield_now().await;
        }
        Ok(())
    }

    /// From here on it counts what is freed: roots that are looked up now name nothing that is free.
    fn look_up_roots(&self) {
        self.watch(|watch| watch.freed = BlockSet::default());
    }

    fn next_vdi(&self, last: VdiId) -> Option<VdiId> {
        self.engine.registry.borrow().directory.after(last).next()
    }

    /// Notes that so many blocks were read, and waits until more may be.
    async fn pause(&mut self, blocks: usize) -> Result<(), Error> {
        let scrubber = &self.engine.scrubber;
        scrubber.read_blocks.set(scrubber.read_blocks.get() + as_u64(blocks));
        self.engine.stats.borrow_mut().scrubbed_bytes += as_u64(blocks) * BLOCK_SIZE_U64;
        self.engine.keep_scrub_rate(as_u64(blocks)).await
    }

    /// Who names a damaged block: all of them if that is listed, else whether anybody does.
    async fn owners(&self, subject: Subject, pba: Pba) -> Result<Owners, Error> {
        let search = match self.scrubber().lists(pba) {
            true => Search::All,
            false => Search::First,
        };
        self.engine.owners(subject, pba, search).await
    }

    async fn walk(&mut self, tree: Tree, roots: &[RootRef]) -> Result<(), Error> {
        self.tree = tree;
        let mut walk = Walk::default();
        for root in roots {
            walk.add(0, root, self);
        }
        loop {
            let batch = walk.take(NODES_AT_ONCE);
            if batch.is_empty() {
                break;
            }
            let reads = self.read_nodes(&batch).await?;
            for (named, read) in batch.iter().zip(reads) {
                match read {
                    Read::Sound(node) => walk.show(named, &node, self),
                    Read::Freed => {
                        if let Some(again) = self.look_up_again(named).await? {
                            walk.push(again);
                        }
                    }
                    Read::Failed(fault) => {
                        self.node_failed(named, fault).await?;
                        // What is below may be found all the same.
                        if let Some(node) = self.engine.nodes.cached(named.entry) {
                            walk.show(named, &node, self);
                        }
                    }
                }
            }
            if self.unread.len() >= GATHER_BLOCKS {
                self.read_data().await?;
            }
            self.pause(batch.len()).await?;
        }
        self.read_data().await
    }

    /// Reads nodes from the device.
    async fn read_nodes(&self, batch: &[Named]) -> Result<Vec<Read>, Error> {
        let reads: Vec<_> = batch
            .iter()
            .map(|named| {
                let (engine, entry) = (Rc::clone(&self.engine), named.entry);
                self.engine.runtime.spawn(async move { read_node(&engine, entry).await })
            })
            .collect();
        let mut nodes = Vec::with_capacity(reads.len());
        for read in reads {
            nodes.push(read.await);
        }
        for read in &nodes {
            if let Read::Failed(Fault::Unreadable(error)) = read {
                self.judge_device(*error)?;
            }
        }
        Ok(nodes)
    }

    /// A device that fails everything says nothing about single blocks.
    fn judge_device(&self, error: DeviceError) -> Result<(), Error> {
        self.engine.scheduler.suspect(error);
        match error.is_medium() || error.cause == Cause::OutOfRange {
            true => Ok(()),
            false => Err(blockstore::Error::from(error).into()),
        }
    }

    /// What the newest tree names where a node was freed.
    async fn look_up_again(&mut self, gone: &Named) -> Result<Option<Named>, Error> {
        let reader = self.engine.epochs.enter();
        let root = match self.tree {
            Tree::Head(id) => self.engine.merged_record(id).await?.map(|record| record.root),
            Tree::Table(table) => self.engine.table_root(table).await?,
            // It was deleted, or got another tree, which the next round comes to.
            Tree::Snapshots | Tree::History(_) => {
                self.fresh += 1;
                None
            }
        };
        let Some(root) = root else { return Ok(None) };
        let entry = match tree::node(&self.engine.nodes, &root, gone.level, gone.start).await {
            Err(blockstore::Error::Damaged { .. }) => {
                self.fresh += 1;
                Entry::UNMAPPED
            }
            entry => entry?,
        };
        if entry.state() != EntryState::Mapped {
            return Ok(None);
        }
        // It is named now, whatever it was before.
        self.watch(|watch| watch.freed.remove(entry.pba()));
        drop(reader);
        let again = Named { entry, ..*gone };
        Ok(self.enter(&again).then_some(again))
    }

    /// Reads the data blocks that were gathered.
    async fn read_data(&mut self) -> Result<(), Error> {
        let mut blocks = std::mem::take(&mut self.unread);
        blocks.sort_unstable_by_key(|block| block.pba);
        blocks.dedup_by_key(|block| block.pba);
        for part in blocks.chunks(BLOCKS_PER_PAUSE) {
            let part: Vec<DataBlock> = self.watch(|watch| {
                part.iter().filter(|block| watch.due.contains(block.pba)).copied().collect()
            });
            let engine = Rc::clone(&self.engine);
            let (device, runtime, checksums) = (&engine.device, &engine.runtime, &engine.checksums);
            let faults =
                verify::verify(device, runtime, checksums, READS_AT_ONCE, part.clone()).await;
            for (block, fault) in faults {
                self.block_failed(&block, fault).await?;
            }
            self.fresh += as_u64(part.len());
            self.watch(|watch| part.iter().for_each(|block| _ = watch.due.remove(block.pba)));
            self.pause(part.len()).await?;
        }
        Ok(())
    }

    async fn block_failed(&mut self, block: &DataBlock, fault: Fault) -> Result<(), Error> {
        let is_due = |pass: &Self| pass.watch(|watch| watch.due.contains(block.pba));
        let is_unreadable = matches!(fault, Fault::Unreadable(_));
        if let Fault::Unreadable(error) = fault {
            self.judge_device(error)?;
        }
        if !is_due(self) {
            return Ok(());
        }
        let owners = self.owners(Subject::Data(block.lba), block.pba).await?;
        // Asked last: who names it, does so while it holds what it held when it was read.
        if !is_due(self) {
            return Ok(());
        }
        let offset = block.lba.saturating_mul(BLOCK_SIZE_U64);
        self.note(
            DamageKind::Data,
            block.pba,
            offset..offset + BLOCK_SIZE_U64,
            owners,
            is_unreadable,
        );
        Ok(())
    }

    async fn node_failed(&mut self, named: &Named, fault: Fault) -> Result<(), Error> {
        let pba = named.entry.pba();
        let is_unreadable = matches!(fault, Fault::Unreadable(_));
        let is_gone = |pass: &Self| pass.watch(|watch| watch.freed.contains(pba));
        match self.tree {
            Tree::Head(_) | Tree::Snapshots => {
                let subject = Subject::Node(named.level, named.start);
                let owners = self.owners(subject, pba).await?;
                let offset = named.start.saturating_mul(BLOCK_SIZE_U64);
                let length = tree::span(named.level + 1).saturating_mul(BLOCK_SIZE_U64);
                let bytes = offset..offset.saturating_add(length);
                if !is_gone(self) {
                    self.note(DamageKind::Node, pba, bytes, owners, is_unreadable);
                }
            }
            Tree::Table(_) | Tree::History(_) => {
                self.table_failed(pba, Some(named.level), named.start, is_unreadable).await?;
            }
        }
        Ok(())
    }

    /// A node of a table, or a page (`None`), is damaged: is it still a part of it?
    async fn table_failed(
        &mut self,
        pba: Pba,
        level: Option<u8>,
        start: u64,
        is_unreadable: bool,
    ) -> Result<(), Error> {
        let (owners, kind) = match self.tree {
            Tree::History(history) => {
                let owners = self.owners(Subject::History(history), pba).await?;
                let title = history_title(&owners);
                (owners, DamageKind::Table(title))
            }
            Tree::Table(table) => {
                let reader = self.engine.epochs.enter();
                let Some(root) = self.engine.table_root(table).await? else { return Ok(()) };
                let nodes = &self.engine.nodes;
                let entry = match level {
                    Some(level) => tree::node(nodes, &root, level, start).await,
                    None => tree::lookup(nodes, &root, start).await,
                };
                drop(reader);
                let is_named = entry
                    .is_ok_and(|entry| entry.state() == EntryState::Mapped && entry.pba() == pba);
                if !is_named && !base::mutant::active("scrub_does_not_look_again") {
                    return Ok(());
                }
                (Owners::default(), DamageKind::Table(self.engine.table_title(table)))
            }
            Tree::Head(_) | Tree::Snapshots => return Ok(()),
        };
        if !self.watch(|watch| watch.freed.contains(pba)) {
            self.note(kind, pba, 0..0, owners, is_unreadable);
        }
        Ok(())
    }

    fn note(
        &self,
        kind: DamageKind,
        at: Pba,
        bytes: Range<u64>,
        owners: Owners,
        is_unreadable: bool,
    ) {
        let is_of_store = matches!(self.tree, Tree::Table(_));
        let is_named = is_of_store || !owners.listed.is_empty();
        if !is_named && !base::mutant::active("scrub_does_not_look_again") {
            return;
        }
        self.engine.stats.borrow_mut().scrub_damaged_blocks += 1;
        let who: Vec<&str> = owners.listed.iter().map(|owner| owner.name.as_str()).collect();
        tracing::error!(?kind, block = %at, offset = bytes.start, disks = ?who, "scrub found damage");
        self.scrubber().note(Damage {
            kind,
            at,
            block_count: 1,
            offset: bytes.start,
            length: bytes.end - bytes.start,
            owners: owners.listed,
            owners_omitted: owners.omitted,
            is_unreadable,
        });
    }
}

/// Reads a node from the device; twice if need be: a bad transfer is not a bad block.
async fn read_node(engine: &Engine, entry: Entry) -> Read {
    if base::mutant::active("scrub_trusts_the_cache") {
        return match engine.nodes.load(entry).await {
            Ok(node) => Read::Sound(node),
            Err(_) => Read::Failed(Fault::Mismatch),
        };
    }
    let mut fault = Fault::Mismatch;
    for _ in 0..2 {
        let buffer = engine.runtime.buffers().take(1);
        match engine.device.read(entry.pba(), 1, buffer).await {
            Ok(buffer) => {
                let node = Node::from_verified(Rc::new(buffer));
                if entry.matches(engine.checksums.block(&node.block().0)) {
                    return Read::Sound(node);
                }
                fault = Fault::Mismatch;
            }
            Err(error) => fault = Fault::Unreadable(error),
        }
    }
    let is_freed = engine.scrubber.watch(|watch| watch.freed.contains(entry.pba()));
    if is_freed { Read::Freed } else { Read::Failed(fault) }
}

impl Visitor for Pass {
    async fn trees(
        &mut self,
        vdi: VdiId,
        trees: &[(Option<SnapshotNumber>, RootRef)],
    ) -> Result<(), Error> {
        let is_head = trees.iter().any(|(snapshot, _)| snapshot.is_none());
        let tree = if is_head { Tree::Head(vdi) } else { Tree::Snapshots };
        if !is_head && base::mutant::active("scrub_skips_what_a_snapshot_has") {
            return Ok(());
        }
        let roots: Vec<RootRef> = trees.iter().map(|(_, root)| *root).collect();
        self.walk(tree, &roots).await
    }

    async fn pages(&mut self, table: Table, root: &RootRef) -> Result<Vec<(u64, Entry)>, Error> {
        self.pages = Some(Vec::new());
        let walked = self.walk(Tree::Table(table), &[*root]).await;
        let mut pages = self.pages.take().unwrap_or_default();
        pages.sort_unstable_by_key(|(number, _)| *number);
        walked.map(|()| pages)
    }

    async fn page(
        &mut self,
        table: Table,
        (number, page): (u64, Entry),
    ) -> Result<Option<Node>, Error> {
        self.read_page(Tree::Table(table), number, page).await
    }

    async fn history(
        &mut self,
        _: VdiId,
        history: History,
        snapshots: &[(SnapshotNumber, Seen)],
    ) -> Result<(), Error> {
        let tree = Tree::History(history);
        self.pages = Some(Vec::new());
        let walked = self.walk(tree, &[history.versions]).await;
        let mut pages = self.pages.take().unwrap_or_default();
        walked?;
        pages.sort_unstable_by_key(|(number, _)| *number);
        let mut versions = Vec::new();
        for (number, page) in pages {
            let node = self.read_page(tree, number, page).await?;
            if as_u64(versions.len()) < u64::from(history.count) {
                versions.extend(reach::decoded::<VersionRecord>(node.as_ref(), number)?);
            }
        }
        let seen: Vec<Seen> = snapshots.iter().map(|(_, seen)| *seen).collect();
        self.tree = Tree::Snapshots;
        for version in seen_by(&versions, &seen) {
            let VersionRecord { block: start, entry, .. } = *version;
            self.block(&Named { tree: 0, entry, level: 0, start, parent_birth: entry.birth() });
            if self.unread.len() >= GATHER_BLOCKS {
                self.read_data().await?;
            }
        }
        self.read_data().await
    }
}

impl Pass {
    /// Reads a page that was not read before in this pass.
    async fn read_page(
        &mut self,
        tree: Tree,
        number: u64,
        page: Entry,
    ) -> Result<Option<Node>, Error> {
        self.tree = tree;
        let mut page = page;
        // A page that was freed is looked up again once; if it moves on, so does the next round.
        for _ in 0..2 {
            let is_new = self.watch(|watch| {
                watch.due.remove(page.pba());
                watch.entered.insert(page.pba())
            });
            if !is_new {
                return Ok(None);
            }
            let read = read_node(&self.engine, page).await;
            self.pause(1).await?;
            match read {
                Read::Sound(node) => return Ok(Some(node)),
                Read::Failed(fault) => {
                    if let Fault::Unreadable(error) = fault {
                        self.judge_device(error)?;
                    }
                    let is_unreadable = matches!(fault, Fault::Unreadable(_));
                    self.table_failed(page.pba(), None, number, is_unreadable).await?;
                    return Ok(self.engine.nodes.cached(page));
                }
                Read::Freed => {}
            }
            let Tree::Table(table) = tree else { return Ok(None) };
            let _reader = self.engine.epochs.enter();
            let Some(root) = self.engine.table_root(table).await? else { return Ok(None) };
            match tree::lookup(&self.engine.nodes, &root, number).await {
                Ok(entry) if entry.state() == EntryState::Mapped => page = entry,
                Ok(_) => return Ok(None),
                Err(blockstore::Error::Damaged { .. }) => break,
                Err(error) => return Err(error.into()),
            }
            self.watch(|watch| watch.freed.remove(page.pba()));
        }
        self.fresh += 1;
        Ok(None)
    }
}

impl Marker for Pass {
    fn enter(&mut self, node: &Named) -> bool {
        let pba = node.entry.pba();
        self.watch(|watch| {
            watch.due.remove(pba);
            watch.entered.insert(pba)
        })
    }

    fn block(&mut self, block: &Named) {
        let (pba, hash48) = (block.entry.pba(), block.entry.hash48());
        if let Some(pages) = &mut self.pages {
            pages.push((block.start, block.entry));
        } else if self.watch(|watch| watch.due.contains(pba)) {
            self.unread.push(DataBlock { pba, hash48, tree: block.tree, lba: block.start });
        }
    }

    fn lost(&mut self, _: &Named) {}

    fn failed(&mut self, _: &Named, _: &blockstore::Error) {}
}
