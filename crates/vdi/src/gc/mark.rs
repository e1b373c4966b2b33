//! The mark of a collection: everything that the roots of its cut reach, each shared subtree once.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use base::{ErrorKind, Pba, SnapshotNumber, VdiId};
use blockstore::NodeStore;
use ondisk::{
    Entry, History, Node, Origin, RootRef, Roots, SlotState, SnapshotRecord, VdiRecord,
    VersionRecord,
};
use runtime::Time;

use super::pass::Section;
use super::{GcStatus, Reached, nodes_of_marks};
use crate::Error;
use crate::budget::PastBlocks;
use crate::damage::Table;
use crate::engine::{Engine, as_u64};
use crate::history::{self, Seen, seen_by};
use crate::mark::{BlockSet, Marker, Named, Walk};
use crate::pace::Pace;
use crate::reach::{self, Visitor};

/// Pages of a history that are read at a time.
const PAGES_AT_ONCE: usize = 32;

impl Engine {
    /// Everything in a section that the roots reach, and all nodes. Of what was marked already nothing is looked
    /// at again.
    pub(super) async fn mark(
        self: &Rc<Self>,
        roots: &Roots,
        section: &Section,
        already: BlockSet,
    ) -> Result<Marked, Error> {
        let mut mark = Mark {
            engine: self,
            found: Found::new(&self.nodes, section, already),
            pace: Pace::new(self),
            stored_at: self.runtime.now(),
            has_moments: false,
            moment_count: 0,
            wanted: BTreeSet::new(),
        };
        let mut pasts = BTreeMap::new();
        mark.table_pages(&roots.marks).await?;
        mark.give_up();
        for (table, root) in [
            (Table::Directory, roots.directory),
            (Table::Extents, roots.extents),
            (Table::BadBlocks, roots.bad_blocks),
        ] {
            // Their pages name no blocks, but should be there when the store is opened again.
            for page in mark.pages(table, &root).await? {
                mark.page(table, page).await?;
            }
        }
        let vdis = mark.pages(Table::Vdis, &roots.vdis).await?;
        // All heads before any snapshot: what is marked behind them snapshots alone hold.
        for &page in &vdis {
            for record in reach::records::<VdiRecord>(&mut mark, Table::Vdis, page).await? {
                mark.trees(record.id, &[(None, record.root)]).await?;
            }
            self.go_on()?;
            self.runtime.yield_now().await;
        }
        for page in vdis {
            for record in reach::records::<VdiRecord>(&mut mark, Table::Vdis, page).await? {
                let past = mark.past(&record).await?;
                if !past.is_empty() {
                    pasts.insert(record.id, past);
                }
            }
            // Of what is marked already nothing is read.
            self.go_on()?;
            self.runtime.yield_now().await;
        }
        if self.collector.gave_up.get() {
            let message = "damaged metadata was met and given up";
            return Err(Error::refused(ErrorKind::Corrupt, message));
        }
        let Found { mut marked, tables, reached, .. } = mark.found;
        let bytes = marked.bytes() + tables.bytes();
        marked.union(tables);
        Ok(Marked { blocks: marked, reached, pasts, bytes })
    }
}

/// What a mark has found.
pub(super) struct Marked {
    /// Blocks of the section, and nodes.
    pub(super) blocks: BlockSet,
    /// How many lie in the section, and whose they are.
    pub(super) reached: Reached,
    /// What of it is of the pasts of VDIs, of each that has any.
    pub(super) pasts: BTreeMap<VdiId, PastBlocks>,
    /// Bytes of memory that it took.
    pub(super) bytes: u64,
}

/// A mark under way.
struct Mark<'a> {
    engine: &'a Rc<Engine>,
    found: Found,
    pace: Pace<'a>,
    /// When what it has reached was stored.
    stored_at: Time,
    /// Whether the VDI whose snapshots are walked has moments.
    has_moments: bool,
    /// How many of them nothing but its rules keeps.
    moment_count: u64,
    /// Histories of its other snapshots, if it has moments.
    wanted: BTreeSet<Pba>,
}

/// Whom what is walked belongs to.
#[derive(Clone, Copy)]
enum Owner {
    Heads,
    /// Snapshots that somebody wants: that were asked for, or are held.
    Snapshots,
    /// Moments that nothing but rules keeps, behind those.
    Moments,
    Tables,
}

struct Found {
    nodes: NodeStore,
    section: Section,
    /// Nodes of trees of VDIs, and what they name in the section. When no walk of one is under way, everything below is marked, too.
    marked: BlockSet,
    /// Blocks of tables: each cycle reads all of them.
    tables: BlockSet,
    /// How many of both lie in the section: each with the owner under whom it was met first.
    reached: Reached,
    owner: Owner,
    /// What leaves of a table name, by the number of the page.
    pages: Option<Vec<(u64, Entry)>>,
    /// Damaged blocks that were not known to be.
    damaged: Vec<Pba>,
    failure: Option<blockstore::Error>,
}

impl Found {
    fn new(nodes: &NodeStore, section: &Section, already: BlockSet) -> Self {
        Self {
            nodes: nodes.clone(),
            section: section.clone(),
            reached: Reached { before: already.len(), ..Reached::default() },
            owner: Owner::Tables,
            marked: already,
            tables: BlockSet::default(),
            pages: None,
            damaged: Vec::new(),
            failure: None,
        }
    }

    /// Notes a node; whether it was not known.
    fn node(&mut self, pba: Pba) -> bool {
        let fresh = match self.pages {
            Some(_) => self.tables.insert(pba),
            None => self.marked.insert(pba),
        };
        if fresh && self.section.contains(pba) {
            self.count();
        }
        fresh
    }

    fn count(&mut self) {
        match self.owner {
            Owner::Heads => self.reached.heads += 1,
            Owner::Snapshots => self.reached.snapshots += 1,
            Owner::Moments => self.reached.moments += 1,
            Owner::Tables => self.reached.tables += 1,
        }
    }

    /// Notes a data block.
    fn data(&mut self, pba: Pba) {
        if self.section.contains(pba) && self.marked.insert(pba) {
            self.count();
        }
    }

    /// Notes that a block could not be read.
    fn unreadable(&mut self, at: Pba, error: &blockstore::Error) {
        match error {
            blockstore::Error::Damaged { .. } if self.nodes.is_given_up(at) => {}
            blockstore::Error::Damaged { .. } => self.damaged.push(at),
            error => {
                self.failure.get_or_insert_with(|| error.clone());
            }
        }
    }
}

impl Mark<'_> {
    /// Goes through everything of a VDI; what of it only its snapshots reach.
    async fn past(&mut self, record: &VdiRecord) -> Result<PastBlocks, Error> {
        let before = self.found.reached;
        self.has_moments = record.has_moments;
        self.moment_count = 0;
        self.wanted.clear();
        reach::vdi(record, self).await?;
        let reached = &self.found.reached;
        Ok(PastBlocks {
            snapshots: reached.snapshots - before.snapshots,
            moments: reached.moments - before.moments,
            moment_count: self.moment_count,
            next: record.snapshot_next,
        })
    }

    /// Marks the blocks that snapshots see of their histories. Damage is left to who goes through all of these.
    async fn versions_of(&mut self, snapshots: &[SnapshotRecord]) {
        for snapshots in snapshots.chunk_by(|a, b| a.history == b.history) {
            let Some(history) = snapshots.first().and_then(|first| first.history) else { continue };
            self.wanted.insert(history.at());
            let seen: Vec<Seen> = snapshots.iter().map(Seen::of).collect();
            if let Ok(versions) = history::all(self.nodes(), &history).await {
                for version in seen_by(&versions, &seen) {
                    self.found.data(version.entry.pba());
                }
            }
        }
    }

    /// Whom belongs what is met from here on of the snapshots of a VDI.
    fn owner_of_snapshots(&self) -> Owner {
        match self.has_moments {
            true => Owner::Moments,
            false => Owner::Snapshots,
        }
    }

    fn nodes(&self) -> &NodeStore {
        &self.engine.nodes
    }

    async fn walk(&mut self, roots: &[RootRef]) -> Result<(), Error> {
        let mut walk = Walk::default();
        for root in roots {
            walk.add(0, root, &mut self.found);
        }
        let walked = self.step_through(&mut walk).await;
        // No node is being read any more when what is held back is let go.
        walk.stop().await;
        walked
    }

    /// Walks whole trees.
    async fn walk_trees(&mut self, roots: &[RootRef]) -> Result<(), Error> {
        self.walk(roots).await?;
        self.give_up();
        self.store_if_due().await;
        Ok(())
    }

    async fn step_through(&mut self, walk: &mut Walk) -> Result<(), Error> {
        let nodes = self.nodes().clone();
        while walk.step(&nodes, self.pace.stride(), &mut self.found).await {
            if let Some(error) = self.found.failure.take() {
                return Err(error.into());
            }
            self.engine.go_on()?;
            let collector = &self.engine.collector;
            let marked_blocks = self.found.reached.total();
            collector.status.set(GcStatus { marked_blocks, ..collector.status.get() });
            self.pace.rest().await;
        }
        Ok(())
    }

    /// Has a checkpoint store what is marked, now and then. Called when no walk is under way.
    async fn store_if_due(&mut self) {
        let collector = &self.engine.collector;
        let now = self.engine.runtime.now();
        let is_due = now.since(self.stored_at) >= collector.store_every;
        let may_be =
            self.found.section.is_whole() || base::mutant::active("gc_stores_marks_of_a_section");
        if !is_due || !may_be || collector.gave_up.get() {
            return;
        }
        self.stored_at = now;
        let nodes = nodes_of_marks(&self.found.marked);
        if !self.engine.metadata_suffices_for(nodes).await.unwrap_or(false) {
            // What was stored before is better than nothing.
            return;
        }
        collector.store_marks(self.found.marked.clone());
        if let Err(error) = self.engine.checkpoint(SlotState::Running).await {
            tracing::debug!(%error, "what was marked could not be stored");
        }
        self.pace.begin();
    }

    /// Walks a table; its pages, with their numbers.
    async fn table_pages(&mut self, root: &RootRef) -> Result<Vec<(u64, Entry)>, Error> {
        self.found.pages = Some(Vec::new());
        let walked = self.walk(&[*root]).await;
        let mut pages = self.found.pages.take().unwrap_or_default();
        // A walk goes down the last of a node's children first.
        pages.sort_unstable_by_key(|(number, _)| *number);
        if base::mutant::active("gc_meets_pages_out_of_order") {
            let last = pages.len().saturating_sub(1);
            pages.rotate_left(last);
        }
        walked.map(|()| pages)
    }

    /// Gives up the damaged blocks that were met: they are bad, also when the store is opened again.
    fn give_up(&mut self) {
        for pba in self.found.damaged.drain(..) {
            self.engine.collector.gave_up.set(true);
            self.engine.nodes.give_up(pba);
            if let Err(error) = self.engine.allocator.retire(pba) {
                tracing::error!(%error, "a damaged block cannot be retired");
            }
        }
    }

    /// As [`Self::give_up`], of a table: what of it is in memory is written again first.
    fn note_damage(&mut self, table: Table) {
        if !self.found.damaged.is_empty() {
            self.engine.checkpoints.damaged.note(table);
        }
        self.give_up();
    }

    /// Reads a page; `None` if it is damaged.
    async fn verify(&mut self, page: Entry) -> Result<Option<Node>, Error> {
        match self.nodes().load(page).await {
            Ok(node) => Ok(Some(node)),
            Err(error) => {
                self.found.unreadable(page.pba(), &error);
                self.found.failure.take().map_or(Ok(None), |error| Err(error.into()))
            }
        }
    }
}

/// Whether nothing but rules keeps a snapshot.
fn is_mere_moment(snapshot: &SnapshotRecord) -> bool {
    matches!(snapshot.origin, Origin::Kept { .. }) && !snapshot.is_held
}

impl Visitor for Mark<'_> {
    async fn trees(
        &mut self,
        _: VdiId,
        trees: &[(Option<SnapshotNumber>, RootRef)],
    ) -> Result<(), Error> {
        let is_of_snapshots = trees.iter().any(|(snapshot, _)| snapshot.is_some());
        if is_of_snapshots && base::mutant::active("gc_misses_snapshot_roots") {
            return Ok(());
        }
        self.found.owner = if is_of_snapshots { self.owner_of_snapshots() } else { Owner::Heads };
        let roots: Vec<RootRef> = trees.iter().map(|(_, root)| *root).collect();
        self.walk_trees(&roots).await
    }

    /// All snapshots that somebody wants before any moment: what is marked behind them moments alone hold.
    async fn look_ahead(
        &mut self,
        record: &VdiRecord,
        pages: &[(u64, Entry)],
    ) -> Result<(), Error> {
        if !record.has_moments || base::mutant::active("gc_misses_snapshot_roots") {
            return Ok(());
        }
        for &page in pages {
            let table = Table::Snapshots(record.id);
            let snapshots = reach::records::<SnapshotRecord>(self, table, page).await?;
            let (moments, wanted): (Vec<_>, Vec<_>) =
                snapshots.into_iter().partition(is_mere_moment);
            self.moment_count += as_u64(moments.len());
            if !wanted.is_empty() {
                self.found.owner = Owner::Snapshots;
                let roots: Vec<RootRef> = wanted.iter().map(|snapshot| snapshot.root).collect();
                self.walk_trees(&roots).await?;
                self.versions_of(&wanted).await;
            }
            self.engine.go_on()?;
            self.pace.rest().await;
        }
        Ok(())
    }

    async fn pages(&mut self, table: Table, root: &RootRef) -> Result<Vec<(u64, Entry)>, Error> {
        self.found.owner = match table {
            Table::Snapshots(_) => self.owner_of_snapshots(),
            _ => Owner::Tables,
        };
        let pages = self.table_pages(root).await;
        self.note_damage(table);
        pages
    }

    async fn page(&mut self, table: Table, (_, page): (u64, Entry)) -> Result<Option<Node>, Error> {
        let page = self.verify(page).await;
        self.note_damage(table);
        page
    }

    /// Marks a history, and what its snapshots see of it (design rule 37).
    async fn history(
        &mut self,
        _: VdiId,
        history: History,
        snapshots: &[(SnapshotNumber, Seen)],
    ) -> Result<(), Error> {
        if base::mutant::active("gc_misses_histories")
            || base::mutant::active("gc_misses_snapshot_roots")
        {
            return Ok(());
        }
        if self.found.tables.contains(history.at()) {
            // For other snapshots: what these see of it would not be marked.
            let message = "a history stands in two places of the tables";
            return Err(Error::refused(ErrorKind::Corrupt, message));
        }
        self.found.owner = match self.wanted.contains(&history.at()) {
            true => Owner::Snapshots,
            false => self.owner_of_snapshots(),
        };
        let pages = self.table_pages(&history.versions).await?;
        let mut versions = Vec::new();
        for pages in pages.chunks(PAGES_AT_ONCE) {
            // All at once, before each is asked for.
            self.nodes().load_all(pages.iter().map(|(_, entry)| *entry).collect()).await;
            for &page in pages {
                if as_u64(versions.len()) < u64::from(history.count) {
                    let node = self.verify(page.1).await?;
                    versions.extend(reach::decoded::<VersionRecord>(node.as_ref(), page.0)?);
                }
            }
            self.engine.go_on()?;
            self.pace.rest().await;
        }
        self.give_up();
        let seen: Vec<Seen> = snapshots.iter().map(|(_, seen)| *seen).collect();
        self.found.owner = self.owner_of_snapshots();
        for version in seen_by(&versions, &seen) {
            self.found.data(version.entry.pba());
        }
        Ok(())
    }
}

impl Marker for Found {
    fn enter(&mut self, node: &Named) -> bool {
        self.node(node.entry.pba())
    }

    fn block(&mut self, block: &Named) {
        let pba = block.entry.pba();
        match &mut self.pages {
            Some(pages) => {
                pages.push((block.start, block.entry));
                self.node(pba);
            }
            None => self.data(pba),
        }
    }

    fn lost(&mut self, _: &Named) {}

    fn failed(&mut self, node: &Named, error: &blockstore::Error) {
        self.unreadable(node.entry.pba(), error);
    }
}
