//! Merging: what a checkpoint has frozen becomes trees and tables. Nothing that others see changes;
//! one that fails is given back as a whole.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use base::{BLOCK_SIZE, BirthLabel, ErrorKind, ExtentIndex, Lsn, Pba};
use blockstore::scheduler::Batch;
use blockstore::table;
use blockstore::tree::{self, Births, Change, OnDamage, Outcome, TreeWriter, span};
use ondisk::{
    EntryState, ExtentRecord, HISTORY_VERSIONS_MAX, History, RootRef, Roots, SnapshotRecord,
    VdiRecord,
};

use super::{Frozen, FrozenSnapshot, NODES_PER_TURN};
use crate::Error;
use crate::branch::{Base, Branch, Contents, Point};
use crate::damage::{Table, is_damage};
use crate::engine::{Engine, as_u64};
use crate::history::{self, Past};
use crate::ledger::Written;
use crate::manage::labels_used_up;
use crate::mark::{BlockSet, page_of_words};
use crate::overlay::{newest_only, seen_from};
use crate::vdi::Vdi;

/// With so many points, the first one gets no tree either: the tree that the branch had before is
/// their keyframe. What was replaced in it before the first point stays as long as their history.
const POINTS_WITHOUT_KEYFRAME: usize = 4;

/// Branches merged between two breaths of the thread.
const BRANCHES_PER_TURN: usize = 64;

/// Pages of marks filled between two breaths.
const PAGES_PER_TURN: usize = 64;

/// A checkpoint being merged.
pub(super) struct Merge {
    pub(super) engine: Rc<Engine>,
    pub(super) batch: Batch,
    /// Blocks allocated for nodes and pages, to be given back if it fails.
    pub(super) allocated: Rc<RefCell<Vec<Pba>>>,
    added: Vec<Pba>,
    pub(super) replaced: Vec<Pba>,
    /// Of `added` and `replaced`, how many the bitmaps know: what a failure has to undo.
    made_live: usize,
    cleared: usize,
    /// Never in any tree: they only stop being busy.
    pub(super) dead: Vec<Pba>,
    /// What points became. Each is held, so that no other takes its address.
    pub(super) points: HashMap<*const Point, Met>,
    pub(super) nodes_written: u64,
    /// Versions that histories took.
    pub(super) versions_written: u64,
    /// What garbage collection found; among `replaced` too.
    garbage: Vec<Pba>,
    /// See [`Outcome::left`].
    pub(super) left: u64,
    /// Extents whose records it stores.
    extents: Vec<ExtentIndex>,
    /// Retired blocks that it stores, if there are more than before.
    pub(super) bad_known: Option<usize>,
    /// Marks that it stores.
    pub(super) marks: Option<Rc<BlockSet>>,
}

/// What a point became.
pub(super) struct Met {
    pub(super) point: Rc<Point>,
    pub(super) contents: Contents,
    pub(super) label: BirthLabel,
    /// See [`Point::writes_from`].
    pub(super) writes_from: Option<Lsn>,
}

/// Points behind a keyframe that get a history, and what changed from there to the last one.
#[derive(Default)]
struct Span {
    /// Each with the position from which on it keeps writes.
    points: Vec<(Rc<Point>, Option<Lsn>)>,
    versions: Vec<Change>,
}

/// What a branch became.
pub(super) struct MergedBranch {
    pub(super) branch: Rc<Branch>,
    pub(super) root: RootRef,
    pub(super) label: BirthLabel,
    pub(super) shared_up_to: BirthLabel,
    pub(super) generation_count: usize,
}

/// Records of VDIs, and the tables that they name.
struct VdiTables {
    records: BTreeMap<u64, Option<VdiRecord>>,
    snapshot_tables: Vec<(Rc<Vdi>, RootRef)>,
    ledgers: Vec<(Rc<Vdi>, Written)>,
}

/// The new trees.
pub(super) struct Done {
    pub(super) branches: Vec<MergedBranch>,
    pub(super) snapshot_tables: Vec<(Rc<Vdi>, RootRef)>,
    /// Ledgers in which something new stands.
    pub(super) ledgers: Vec<(Rc<Vdi>, Written)>,
    pub(super) roots: Roots,
}

impl Merge {
    pub(super) fn new(engine: &Rc<Engine>) -> Self {
        Self {
            engine: Rc::clone(engine),
            batch: Batch::default(),
            allocated: Rc::default(),
            added: Vec::new(),
            replaced: Vec::new(),
            made_live: 0,
            cleared: 0,
            dead: Vec::new(),
            points: HashMap::new(),
            nodes_written: 0,
            versions_written: 0,
            garbage: Vec::new(),
            left: 0,
            extents: Vec::new(),
            bad_known: None,
            marks: None,
        }
    }

    pub(super) async fn run(&mut self, frozen: &mut Frozen) -> Result<Done, Error> {
        // What nothing reaches goes the way of what was replaced.
        self.garbage = self.engine.collector.take_garbage();
        self.replaced.extend(&self.garbage);
        let mut branches = Vec::with_capacity(frozen.branches.len());
        // A base is older than what is built on it: its points have their trees in time.
        for part in frozen.branches.chunks(BRANCHES_PER_TURN) {
            for (branch, is_head) in part {
                let merged = self.merge_branch(branch, *is_head, frozen.cut).await?;
                branches.push(merged);
            }
            self.engine.runtime.yield_now().await;
        }
        let mut roots = frozen.roots;
        let VdiTables { records: vdis, snapshot_tables, ledgers } =
            self.vdi_records(frozen, &branches).await?;
        let on_damage = match frozen.rewritten.contains(&Table::Vdis) {
            true => OnDamage::Forget,
            false => OnDamage::Fail,
        };
        roots.vdis = self.store(Table::Vdis, roots.vdis, &vdis, on_damage).await?;
        let directory = &frozen.directory;
        roots.directory =
            self.store(Table::Directory, roots.directory, directory, OnDamage::Fail).await?;
        roots.bad_blocks = self.store_bad_blocks(roots.bad_blocks).await?;
        roots.marks = self.store_marks(roots.marks).await?;
        // The table's own blocks may take an extent, which belongs into it too.
        loop {
            self.engine.allocator.reclaim_empty_extents();
            let extents = self.extent_records();
            if extents.is_empty() {
                break;
            }
            roots.extents =
                self.store(Table::Extents, roots.extents, &extents, OnDamage::Fail).await?;
        }
        roots.bitmaps = self.store_bitmaps(roots.bitmaps).await?;
        Ok(Done { branches, snapshot_tables, ledgers, roots })
    }

    /// Merges one branch: a tree or a history for each point that somebody wants, and a tree for the
    /// head.
    async fn merge_branch(
        &mut self,
        branch: &Rc<Branch>,
        is_head: bool,
        cut: Lsn,
    ) -> Result<MergedBranch, Error> {
        let (mut root, label, shared_up_to) = self.start_of(branch).await?;
        let passed: Vec<Rc<Point>> = {
            let points = branch.points.borrow();
            points.iter().filter(|point| point.position <= cut).map(Rc::clone).collect()
        };
        // Held by the branch and by `passed`: nobody else wants it any more.
        let wanted: Vec<Rc<Point>> =
            passed.iter().filter(|point| Rc::strong_count(point) > 2).map(Rc::clone).collect();
        let generation_count = branch.generations.borrow().len() - 1;
        let intervals = self.gather(branch, generation_count, &wanted).await;
        let last = intervals.len() - 1;
        let shared_before = Lsn::default();
        let mut births = Births { label, shared_up_to, shared_before };
        let mut span = Span::default();
        let kept_from = kept_from(&wanted);
        // The first position that `root` is of.
        let mut root_at = branch.writes.in_tree().plus(1);
        for (index, changes) in intervals.into_iter().enumerate() {
            let kept = kept_from.get(index).copied().flatten();
            let changes = seen_from(changes, kept.unwrap_or(Lsn::new(u64::MAX)), &mut self.dead);
            if let Some(point) = wanted.get(index)
                && (index > 0 || kept.is_some() || wanted.len() >= POINTS_WITHOUT_KEYFRAME)
                && self.engine.keeps_history.get()
                && (kept.is_some() || !point.needs_tree.get())
            {
                if kept.is_some() && !span.has_room(&changes) {
                    // The next one begins with a tree of the last point.
                    let full = std::mem::take(&mut span);
                    births.shared_up_to = label;
                    root_at = full.end();
                    root = self.end_span(root, (label, births), full, Vec::new()).await?;
                }
                if span.has_room(&changes) {
                    let from = point.writes_from.get().map(|from| from.max(root_at));
                    span.versions.extend(changes);
                    span.points.push((Rc::clone(point), from));
                    continue;
                }
            }
            if kept.is_some() && changes.iter().all(|change| change.level == 0) {
                let count = changes.len();
                tracing::warn!(count, "too many writes between two moments: they cannot be opened");
            }
            let changes = newest_only(changes, &mut self.dead);
            let span = std::mem::take(&mut span);
            if index == last && !is_head {
                self.store_history(root, label, &span).await?;
                // Nothing reads the head of a branch that a rollback or deletion has left.
                self.dead.extend(changes.iter().filter_map(mapped));
                break;
            }
            if index > 0 && !base::mutant::active("snapshot_shares_nothing") {
                // What the snapshot before holds is shared from here on.
                births.shared_up_to = label;
            }
            if index == last && index > 0 {
                births.label = next_label(label)?;
            }
            root = self.end_span(root, (label, births), span, changes).await?;
            if let Some(point) = wanted.get(index) {
                self.meet(point, Contents::Tree(root), label, None);
                root_at = point.position;
            }
        }
        Ok(MergedBranch {
            branch: Rc::clone(branch),
            root,
            label: births.label,
            shared_up_to: births.shared_up_to,
            generation_count,
        })
    }

    fn meet(
        &mut self,
        point: &Rc<Point>,
        contents: Contents,
        label: BirthLabel,
        writes_from: Option<Lsn>,
    ) {
        let met = Met { point: Rc::clone(point), contents, label, writes_from };
        self.points.insert(Rc::as_ptr(point), met);
    }

    /// Stores the history of a span over the tree of `root`, and makes a tree of its end and of the changes
    /// behind it.
    async fn end_span(
        &mut self,
        root: RootRef,
        (label, births): (BirthLabel, Births),
        span: Span,
        changes: Vec<Change>,
    ) -> Result<RootRef, Error> {
        let births = Births { shared_before: span.end(), ..births };
        let named = self.store_history(root, label, &span).await?;
        let changes = self.behind(span.versions, changes);
        self.update(root, births, &changes, &named).await
    }

    /// Stores the history of some points over the tree of `root`; returns the blocks that it names.
    async fn store_history(
        &mut self,
        root: RootRef,
        label: BirthLabel,
        span: &Span,
    ) -> Result<HashSet<Pba>, Error> {
        if span.versions.is_empty() {
            for (point, from) in &span.points {
                self.meet(point, Contents::Tree(root), label, *from);
            }
            return Ok(HashSet::new());
        }
        let mut versions = span.versions.clone();
        for change in &mut versions {
            if change.entry.state() == EntryState::Mapped {
                change.entry = change.entry.with_birth(label);
            }
        }
        versions.sort_unstable_by_key(|change| (change.start, change.lsn));
        let named: HashSet<Pba> = versions.iter().filter_map(mapped).collect();
        let count = u32::try_from(versions.len()).unwrap_or(u32::MAX);
        let pages = history::pages(&self.engine.runtime, &versions);
        let empty = RootRef::empty(1);
        let store =
            async |writer: &mut TreeWriter<'_>| table::store_pages(writer, empty, pages).await;
        let (stored, outcome) = self.write(OnDamage::Fail, store).await;
        self.account(outcome);
        let past = Past { root, history: History { versions: stored?, count } };
        for (point, from) in &span.points {
            self.meet(point, Contents::Past(past), label, *from);
        }
        self.added.extend(&named);
        self.versions_written += u64::from(count);
        Ok(named)
    }

    /// The changes of a history and those behind it, as one for the next tree. What the history names
    /// does not die with what replaces it.
    fn behind(&mut self, mut versions: Vec<Change>, changes: Vec<Change>) -> Vec<Change> {
        if versions.is_empty() {
            return changes;
        }
        versions.extend(changes);
        let mut replaced = Vec::new();
        let changes = newest_only(versions, &mut replaced);
        if base::mutant::active("history_dies_with_what_replaces_it") {
            self.dead.extend(replaced);
        }
        changes
    }

    /// The tree that a branch continues, the label of its new entries, and what it shares.
    async fn start_of(
        &mut self,
        branch: &Branch,
    ) -> Result<(RootRef, BirthLabel, BirthLabel), Error> {
        let base = branch.base.borrow().clone();
        match base {
            Base::Root(root) => Ok((root, branch.label.get(), branch.shared_up_to.get())),
            Base::Point(_, point) => {
                let (root, label) = self.tree_of(&point).await?;
                // Everything that it starts with is shared; labels never go back (rule 33).
                let shared_up_to = label.max(branch.label.get());
                Ok((root, next_label(shared_up_to)?, shared_up_to))
            }
        }
    }

    fn contents_of(&self, point: &Rc<Point>) -> (Contents, BirthLabel) {
        match self.points.get(&Rc::as_ptr(point)) {
            Some(met) => (met.contents, met.label),
            None => (point.contents.get(), point.label.get()),
        }
    }

    /// The tree of a point, which is made if it has a history only.
    async fn tree_of(&mut self, point: &Rc<Point>) -> Result<(RootRef, BirthLabel), Error> {
        let (contents, label) = self.contents_of(point);
        let past = match contents {
            Contents::Tree(root) => return Ok((root, label)),
            Contents::Past(past) => past,
            Contents::Pending => {
                let message = "a branch was merged before its base";
                return Err(Error::refused(ErrorKind::Corrupt, message));
            }
        };
        let engine = Rc::clone(&self.engine);
        // A version may tell that what the tree has beyond the end is gone.
        let end = tree::coverage(&past.root).max(point.block_count);
        let mut changes =
            history::changes(&engine.nodes, past.history, point.position, end).await?;
        if base::mutant::active("clone_forgets_history") {
            changes.clear();
        }
        let named: HashSet<Pba> = changes.iter().filter_map(mapped).collect();
        let births = Births { label, shared_up_to: label, shared_before: Lsn::default() };
        let root = self.update(past.root, births, &changes, &named).await?;
        self.meet(point, Contents::Tree(root), label, None);
        Ok((root, label))
    }

    /// All changes of the frozen generations, by the interval between points that they lie in.
    async fn gather(
        &mut self,
        branch: &Rc<Branch>,
        generation_count: usize,
        wanted: &[Rc<Point>],
    ) -> Vec<Vec<Change>> {
        let mut intervals = vec![Vec::new(); wanted.len() + 1];
        let generations: Vec<_> =
            branch.generations.borrow().iter().take(generation_count).map(Rc::clone).collect();
        let mut chunk = Vec::new();
        for generation in generations {
            self.dead.extend(generation.dead.borrow().iter());
            let mut after = None;
            loop {
                after = generation.overlay.borrow().chunk(after, NODES_PER_TURN, &mut chunk);
                for change in chunk.drain(..) {
                    let index = wanted.partition_point(|point| point.position <= change.lsn);
                    if let Some(interval) = intervals.get_mut(index) {
                        interval.push(change);
                    }
                }
                if after.is_none() {
                    break;
                }
                self.engine.runtime.yield_now().await;
            }
        }
        intervals
    }

    /// Merges changes into a tree. Some of them may be of a history, which names their blocks.
    async fn update(
        &mut self,
        root: RootRef,
        births: Births,
        changes: &[Change],
        named: &HashSet<Pba>,
    ) -> Result<RootRef, Error> {
        let height = changes.iter().fold(root.height, |height, change| {
            let end = change.start + span(change.level);
            height.max(RootRef::height_for(end)).max(change.level + 1)
        });
        let update = async |writer: &mut TreeWriter<'_>| {
            tree::update(writer, births, root, height, changes).await
        };
        let (updated, mut outcome) = self.write(OnDamage::Mark, update).await;
        // These are the history's, whether the tree names them too or not.
        outcome.added.retain(|pba| !named.contains(pba));
        outcome.overruled.retain(|pba| !named.contains(pba));
        self.account(outcome);
        Ok(updated?)
    }

    /// Has `work` write nodes; also what it replaced, which counts on failure too.
    async fn write<T>(
        &self,
        on_damage: OnDamage,
        work: impl AsyncFnOnce(&mut TreeWriter<'_>) -> Result<T, blockstore::Error>,
    ) -> (Result<T, blockstore::Error>, Outcome) {
        let mut allocate = self.engine.node_blocks(&self.allocated);
        let mut writer = TreeWriter {
            nodes: &self.engine.nodes,
            batch: &self.batch,
            allocate: &mut allocate,
            on_damage,
            outcome: Outcome::default(),
        };
        let written = work(&mut writer).await;
        let outcome = writer.outcome;
        (written, outcome)
    }

    /// Stores records in a table.
    pub(super) async fn store<R: ondisk::TableRecord>(
        &mut self,
        table: Table,
        root: RootRef,
        records: &BTreeMap<u64, Option<R>>,
        on_damage: OnDamage,
    ) -> Result<RootRef, Error> {
        if records.is_empty() {
            return Ok(root);
        }
        let store = async |writer: &mut TreeWriter<'_>| table::store(writer, root, records).await;
        let (stored, outcome) = self.write(on_damage, store).await;
        self.account(outcome);
        self.note_damage(table, stored.map_err(Error::from))
    }

    /// Notes that a table is damaged, if that kept it from being stored.
    fn note_damage<T>(&self, table: Table, stored: Result<T, Error>) -> Result<T, Error> {
        stored.inspect_err(|error| {
            if is_damage(error) {
                self.engine.checkpoints.damaged.note(table);
            }
        })
    }

    async fn vdi_records(
        &mut self,
        frozen: &Frozen,
        branches: &[MergedBranch],
    ) -> Result<VdiTables, Error> {
        let mut records = BTreeMap::new();
        let mut snapshot_tables = Vec::new();
        let mut ledgers = Vec::new();
        for id in &frozen.deleted {
            records.insert(id.get(), None);
        }
        let by_serial: HashMap<u64, &MergedBranch> =
            branches.iter().map(|merged| (merged.branch.serial, merged)).collect();
        for vdi in &frozen.vdis {
            let (root, label, shared_up_to) = match by_serial.get(&vdi.branch.serial) {
                Some(merged) => (merged.root, merged.label, merged.shared_up_to),
                None => self.start_of(&vdi.branch).await?,
            };
            let mut snapshots: BTreeMap<u64, Option<SnapshotRecord>> = BTreeMap::new();
            for (&number, snapshot) in &vdi.snapshots {
                let record = match snapshot {
                    Some(frozen) => Some(self.snapshot_record(frozen).await?),
                    None => None,
                };
                snapshots.insert(number, record);
            }
            let id = vdi.vdi.id;
            let table = vdi.vdi.snapshot_table.get();
            let table = self.store(Table::Snapshots(id), table, &snapshots, OnDamage::Fail).await?;
            snapshot_tables.push((Rc::clone(&vdi.vdi), table));
            let written = self.ledger_of(vdi).await?;
            let unchanged = Rc::clone(&vdi.vdi.ledger.borrow().written);
            let ledger = written.as_ref().unwrap_or(&unchanged);
            let record = VdiRecord {
                id: vdi.vdi.id,
                block_count: vdi.block_count,
                root,
                lsn: frozen.cut,
                claim: vdi.vdi.claim,
                label,
                shared_up_to,
                snapshots: table,
                snapshot_next: vdi.snapshot_next,
                snapshot_count: vdi.snapshot_count,
                ledger: ledger.table,
                ledger_head: ledger.head,
                ledger_count: u32::try_from(ledger.records.len()).unwrap_or(u32::MAX),
                rollbacks: vdi.rollbacks,
                retention: vdi.retention.as_ref().map(|it| it.rules().clone()),
                has_moments: vdi.has_moments,
            };
            records.insert(vdi.vdi.id.get(), Some(record));
            ledgers.extend(written.map(|written| (Rc::clone(&vdi.vdi), written)));
        }
        Ok(VdiTables { records, snapshot_tables, ledgers })
    }

    pub(super) async fn snapshot_record(
        &mut self,
        FrozenSnapshot { snapshot, is_held, needs_tree }: &FrozenSnapshot,
    ) -> Result<SnapshotRecord, Error> {
        let point = &snapshot.point;
        if *needs_tree {
            self.tree_of(point).await?;
        }
        let (root, history) = match self.contents_of(point).0 {
            Contents::Tree(root) => (root, None),
            Contents::Past(Past { root, history }) => (root, Some(history)),
            Contents::Pending => {
                let message = "a snapshot was stored before a checkpoint had met it";
                return Err(Error::refused(ErrorKind::Corrupt, message));
            }
        };
        let met = self.points.get(&Rc::as_ptr(point));
        // What is opened, so what this checkpoint has frozen, does not forget its writes: a record above the cut may
        // build on them.
        let writes_from =
            point.writes_from.get().and_then(|from| met.map_or(Some(from), |met| met.writes_from));
        Ok(snapshot.record(root, (history, writes_from), *is_held))
    }

    fn extent_records(&mut self) -> BTreeMap<u64, Option<ExtentRecord>> {
        let (owner, epoch) = (self.engine.host, self.engine.epoch);
        let record = |kind| ExtentRecord { kind, owner, epoch };
        let dirty = self.engine.allocator.take_dirty_extents();
        self.extents.extend(dirty.iter().map(|(index, _)| *index));
        dirty.into_iter().map(|(index, kind)| (u64::from(index.get()), kind.map(record))).collect()
    }

    /// Writes the bitmaps as they are once this checkpoint is published. Their own blocks are not
    /// in them: opening a store reads all of them anyway, and learns where they stand.
    async fn store_bitmaps(&mut self, root: RootRef) -> Result<RootRef, Error> {
        let allocator = &self.engine.allocator;
        for &pba in &self.added {
            allocator.set_live(pba)?;
            self.made_live += 1;
        }
        for &pba in &self.replaced {
            allocator.clear_live(pba)?;
            self.cleared += 1;
        }
        let pages = allocator.take_dirty_pages().into_iter().map(|(number, image)| {
            let mut buffer = self.engine.runtime.buffers().take_to_keep(1);
            let bytes = buffer.bytes_mut().get_mut(..BLOCK_SIZE).unwrap_or_default();
            bytes.copy_from_slice(&image[..]);
            (number, buffer)
        });
        let pages: Vec<_> = pages.collect();
        let numbers: Vec<u64> = pages.iter().map(|(number, _)| *number).collect();
        let stored = self.store_pages(Table::Bitmaps, root, pages).await;
        match stored {
            Ok((root, outcome)) => {
                // Busy, never live.
                self.nodes_written += outcome.nodes_written;
                self.dead.extend(outcome.replaced);
                Ok(root)
            }
            Err(error) => {
                for number in numbers {
                    self.engine.allocator.mark_page_dirty(number);
                }
                Err(error)
            }
        }
    }

    /// Stores what a garbage collection has marked, if it asks for that, in place of what is stored; nothing
    /// if that would take the space of what this and the next checkpoint need.
    async fn store_marks(&mut self, root: RootRef) -> Result<RootRef, Error> {
        let Some(marked) = self.engine.collector.unstored_marks() else { return Ok(root) };
        self.replace_marks(&root).await;
        let page_count = as_u64(marked.pages().count());
        let left = self.engine.reserve.block_count();
        let fits = 2 * page_count + self.engine.nodes_needed() <= left;
        let mut pages = Vec::new();
        for (index, (number, words)) in marked.pages().enumerate().filter(|_| fits) {
            pages.push((number, page_of_words(words)));
            if index % PAGES_PER_TURN == PAGES_PER_TURN - 1 {
                self.engine.runtime.yield_now().await;
            }
        }
        let empty = RootRef::empty(1);
        let mut stored = empty;
        if !pages.is_empty() {
            let store =
                async |writer: &mut TreeWriter<'_>| table::store_pages(writer, empty, pages).await;
            let (written, outcome) = self.write(OnDamage::Fail, store).await;
            self.account(outcome);
            stored = written?;
        }
        self.marks = Some(marked);
        Ok(stored)
    }

    /// Notes that the blocks of stored marks are replaced. What cannot be read of them is left to garbage
    /// collection: no checkpoint depends on it.
    async fn replace_marks(&mut self, root: &RootRef) {
        let engine = Rc::clone(&self.engine);
        let mut walk = table::Walk::new(&engine.nodes, root, engine.bitmap_pages());
        loop {
            match walk.next().await {
                Ok(Some(table::Named::Node(entry) | table::Named::Page(_, entry))) => {
                    let pba = entry.pba();
                    self.replaced.extend(engine.allocator.is_live(pba).then_some(pba));
                }
                Err(blockstore::Error::Damaged { .. }) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    async fn store_bad_blocks(&mut self, root: RootRef) -> Result<RootRef, Error> {
        let bad = self.engine.allocator.bad_blocks();
        if bad.len() == self.engine.checkpoints.bad_known.get() {
            return Ok(root);
        }
        let mut blocks = BlockSet::default();
        for &pba in &bad {
            blocks.insert(pba);
        }
        let pages = blocks.pages().map(|(number, words)| (number, page_of_words(words))).collect();
        let (root, outcome) = self.store_pages(Table::BadBlocks, root, pages).await?;
        self.account(outcome);
        self.bad_known = Some(bad.len());
        Ok(root)
    }

    async fn store_pages(
        &mut self,
        table: Table,
        root: RootRef,
        pages: Vec<(u64, base::Buffer)>,
    ) -> Result<(RootRef, Outcome), Error> {
        let store =
            async |writer: &mut TreeWriter<'_>| table::store_pages(writer, root, pages).await;
        let (stored, outcome) = self.write(OnDamage::Fail, store).await;
        Ok((self.note_damage(table, stored.map_err(Error::from))?, outcome))
    }

    fn account(&mut self, outcome: Outcome) {
        self.added.extend(outcome.added);
        self.replaced.extend(outcome.replaced);
        self.dead.extend(outcome.overruled);
        self.left += outcome.left;
        self.nodes_written += outcome.nodes_written;
    }

    /// Leaves a block out of what is given back.
    pub(super) fn forget(&mut self, pba: Pba) {
        self.allocated.borrow_mut().retain(|&other| other != pba);
    }

    /// Undoes the allocations and bitmap changes of a checkpoint that failed.
    pub(super) fn give_back(self) {
        let allocator = &self.engine.allocator;
        let undo = || -> Result<(), blockstore::Error> {
            for &pba in self.replaced.iter().take(self.cleared) {
                allocator.set_live(pba)?;
            }
            for &pba in self.added.iter().take(self.made_live) {
                allocator.clear_live(pba)?;
            }
            Ok(())
        };
        if let Err(error) = undo() {
            tracing::error!(%error, "a failed checkpoint could not be undone");
        }
        for &index in &self.extents {
            allocator.mark_extent_dirty(index);
        }
        self.engine.collector.put_garbage(self.garbage);
        for pba in self.allocated.take() {
            self.engine.nodes.cache().remove(pba);
            allocator.free_now(blockstore::allocator::Run { start: pba, count: 1 });
        }
    }
}

impl Span {
    /// Whether a point may follow before which this changed.
    fn has_room(&self, changes: &[Change]) -> bool {
        let count = self.versions.len() + changes.len();
        let fits = u32::try_from(count).is_ok_and(|count| count <= HISTORY_VERSIONS_MAX);
        // A discard of a large range would have its history keep all that it dropped.
        fits && changes.iter().all(|change| change.level == 0)
    }

    /// Position of the last point.
    fn end(&self) -> Lsn {
        self.points.last().map_or(Lsn::default(), |(point, _)| point.position)
    }
}

/// For each of some points the first position between it and the one before that somebody may want to
/// open: of writes that it keeps, or one behind it.
fn kept_from(points: &[Rc<Point>]) -> Vec<Option<Lsn>> {
    let mut from: Option<Lsn> = None;
    let mut all: Vec<Option<Lsn>> = Vec::with_capacity(points.len());
    for point in points.iter().rev() {
        // One behind it that begins later wants nothing of what lies before.
        from = from.filter(|from| *from < point.position);
        from = [from, point.writes_from.get()].into_iter().flatten().min();
        all.push(from);
    }
    all.reverse();
    all
}

fn mapped(change: &Change) -> Option<Pba> {
    (change.entry.state() == EntryState::Mapped).then(|| change.entry.pba())
}

fn next_label(label: BirthLabel) -> Result<BirthLabel, Error> {
    if base::mutant::active("labels_wrap") {
        return Ok(BirthLabel::new((label.get() + 1) % 4));
    }
    label.get().checked_add(1).map(BirthLabel::new).ok_or_else(labels_used_up)
}
