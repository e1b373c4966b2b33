//! What must hold of the blocks that trees name, and what was found to be wrong.

use std::collections::{BTreeMap, HashMap};

use base::{BirthLabel, ExtentIndex, Pba};
use blockstore::{Geometry, tree};
use ondisk::{Entry, ExtentKind};

use super::{CheckCounts, CheckReport, Finding, FindingKind};
use crate::mark::{BlockSet, Marker, Named};
use crate::verify::DataBlock;

/// Findings that are listed; more are counted only, so that a ruined store cannot fill memory.
pub(super) const FINDINGS_MAX: usize = 1000;

/// What a tree is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum TreeKind {
    /// Of a VDI or snapshot: shared with others, names data.
    Vdi,
    /// A table: its own alone, names pages.
    Table,
    /// The bitmaps' own: a table whose blocks are not in the bitmaps.
    Bitmaps,
}

/// A tree that is being walked.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    /// For people: `web01`, `web01@3`, `the directory`.
    pub(super) title: String,
    pub(super) kind: TreeKind,
    /// What was born above is nobody else's.
    pub(super) exclusive_above: BirthLabel,
    /// No entry is younger.
    pub(super) label_max: BirthLabel,
    /// Nothing is mapped from here on.
    pub(super) block_count: u64,
}

/// What a metadata block was named as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    hash48: u64,
    is_table: bool,
    /// Level of a node; a page has none.
    level: Option<u8>,
}

/// What has been seen so far.
pub(super) struct Audit {
    pub(super) geometry: Geometry,
    pub(super) report: CheckReport,
    /// Trees of the walk under way, by the number that the walk knows them by.
    pub(super) trees: Vec<Tree>,
    /// Pages that the walk of a table found.
    pub(super) pages: Vec<(u64, Entry)>,
    /// Data blocks to be verified, if that was asked for.
    pub(super) unverified: Vec<DataBlock>,
    pub(super) read_data: bool,
    /// What every extent holds that is in use; `None` if that is not known.
    pub(super) extents: Option<BTreeMap<u32, ExtentKind>>,
    /// Whether the older slot's trees are being walked: they share most blocks with the newer.
    pub(super) older: bool,
    /// Nodes of the table that is being walked, if it is one of the older slot's.
    pub(super) entered: BlockSet,
    /// Nodes and pages that could not be read: what is below them is not known.
    pub(super) unread: u64,
    metadata: HashMap<Pba, Identity>,
    pub(super) data: BlockSet,
    /// What the newer slot's trees reach, the bitmaps' own blocks apart.
    pub(super) reached: BlockSet,
    /// The bitmaps' own blocks.
    pub(super) bitmap_blocks: BlockSet,
    exclusive: BlockSet,
}

impl Audit {
    pub(super) fn new(geometry: Geometry, read_data: bool) -> Self {
        Self {
            geometry,
            report: CheckReport::default(),
            trees: Vec::new(),
            pages: Vec::new(),
            unverified: Vec::new(),
            read_data,
            extents: None,
            older: false,
            entered: BlockSet::default(),
            unread: 0,
            metadata: HashMap::new(),
            data: BlockSet::default(),
            reached: BlockSet::default(),
            bitmap_blocks: BlockSet::default(),
            exclusive: BlockSet::default(),
        }
    }

    pub(super) fn counts(&mut self) -> &mut CheckCounts {
        &mut self.report.counts
    }

    pub(super) fn error(&mut self, kind: FindingKind, at: Option<Pba>, message: String) {
        match self.report.errors.len() < FINDINGS_MAX {
            true => self.report.errors.push(Finding { kind, at, message }),
            false => self.report.errors_omitted += 1,
        }
    }

    pub(super) fn warn(&mut self, kind: FindingKind, at: Option<Pba>, message: String) {
        match self.report.warnings.len() < FINDINGS_MAX {
            true => self.report.warnings.push(Finding { kind, at, message }),
            false => self.report.warnings_omitted += 1,
        }
    }

    /// What an extent holds, or `None` if nobody owns it.
    pub(super) fn extent_kind(&self, pba: Pba) -> Option<ExtentKind> {
        let index: ExtentIndex = self.geometry.extent_of(pba);
        self.extents.as_ref().and_then(|extents| extents.get(&index.get()).copied())
    }

    /// Whether any published tree names the block.
    pub(super) fn is_named(&self, pba: Pba) -> bool {
        self.data.contains(pba) || self.metadata.contains_key(&pba)
    }

    /// All blocks that a published tree names.
    pub(super) fn named(&self) -> BlockSet {
        let mut named = self.data.clone();
        for &pba in self.metadata.keys() {
            named.insert(pba);
        }
        named
    }

    fn tree(&self, named: &Named) -> (TreeKind, &str) {
        self.trees.get(named.tree).map_or((TreeKind::Table, "?"), |tree| (tree.kind, &tree.title))
    }

    /// `web01, blocks 256 to 511`.
    fn place(&self, named: &Named, span: u64) -> String {
        let (kind, title) = self.tree(named);
        let unit = if kind == TreeKind::Vdi { "block" } else { "page" };
        let last = named.start + span - 1;
        match span {
            1 => format!("{title}, {unit} {}", named.start),
            _ => format!("{title}, {unit}s {} to {last}", named.start),
        }
    }

    fn blame(&mut self, kind: FindingKind, named: &Named, span: u64, what: &str) {
        let (place, at) = (self.place(named, span), named.entry.pba());
        self.error(kind, Some(at), format!("{place}: block {at} of the store {what}"));
    }

    /// Notes that a tree names a block; whether it is the first to do so.
    fn name(&mut self, named: &Named, level: Option<u8>, is_data: bool) -> bool {
        let span = level.map_or(1, |level| tree::span(level + 1));
        let pba = named.entry.pba();
        if pba.get() >= self.geometry.block_count {
            self.blame(FindingKind::Record, named, span, "lies outside it");
            return false;
        }
        let (kind, _) = self.tree(named);
        let identity =
            Identity { hash48: named.entry.hash48(), is_table: kind != TreeKind::Vdi, level };
        let seen = match is_data {
            true => self.data.contains(pba),
            false => self.metadata.contains_key(&pba),
        };
        let conflicts = match is_data {
            true => self.metadata.contains_key(&pba),
            false => {
                self.data.contains(pba)
                    || self.metadata.get(&pba).is_some_and(|other| *other != identity)
            }
        };
        if conflicts {
            self.blame(FindingKind::NamedTwice, named, span, "is named as something else too");
            return false;
        }
        if !self.older {
            self.judge(named, span, seen, is_data);
        }
        match is_data {
            true => {
                self.data.insert(pba);
            }
            false => {
                self.metadata.insert(pba, identity);
            }
        }
        !seen
    }

    /// What must hold of the newer slot's trees.
    fn judge(&mut self, named: &Named, span: u64, seen: bool, is_data: bool) {
        let pba = named.entry.pba();
        let Some(tree) = self.trees.get(named.tree) else { return };
        let (kind, label_max, block_count) = (tree.kind, tree.label_max, tree.block_count);
        let birth = named.entry.birth();
        let exclusive = birth > tree.exclusive_above && !named.entry.is_shared();
        if !named.entry.is_valid() {
            self.blame(FindingKind::Record, named, span, "is named with unknown flags");
        }
        if birth > named.parent_birth || birth > label_max {
            self.blame(FindingKind::Record, named, span, "is younger than what names it");
        }
        if named.start >= block_count {
            self.blame(FindingKind::Record, named, span, "is mapped beyond the end");
        }
        if (exclusive && seen) || self.exclusive.contains(pba) {
            self.blame(FindingKind::NamedTwice, named, span, "is named by somebody else too");
        }
        if exclusive {
            self.exclusive.insert(pba);
        }
        if seen {
            return;
        }
        match is_data {
            true => self.counts().data_blocks += 1,
            false => self.counts().metadata_blocks += 1,
        }
        let wanted = if is_data { ExtentKind::Data } else { ExtentKind::Metadata };
        let held = self.extent_kind(pba);
        let fits = match kind {
            // Opening the store makes a free extent with such a block one of metadata.
            TreeKind::Bitmaps => held.is_none_or(|held| held == wanted),
            _ => held == Some(wanted),
        };
        if self.extents.is_some() && !fits {
            let what = match held {
                Some(held) => format!("lies in an extent of {held:?}, not of {wanted:?}"),
                None => format!("lies in a free extent, not in one of {wanted:?}"),
            };
            self.blame(FindingKind::WrongExtent, named, span, &what);
        }
        if kind == TreeKind::Bitmaps {
            self.bitmap_blocks.insert(pba);
        } else {
            self.reached.insert(pba);
        }
    }

    /// Notes that what an entry names could not be read.
    pub(super) fn unreadable(&mut self, named: &Named, span: u64, error: &blockstore::Error) {
        self.unread += 1;
        let what = match error {
            blockstore::Error::Damaged { .. } => "does not verify".to_owned(),
            error => format!("cannot be read: {error}"),
        };
        let what = match self.older {
            true => format!("{what}; only the older slot names it"),
            false => what,
        };
        self.blame(FindingKind::Metadata, named, span, &what);
    }
}

impl Marker for Audit {
    fn enter(&mut self, node: &Named) -> bool {
        let fresh = self.name(node, Some(node.level), false);
        let (kind, _) = self.tree(node);
        if kind == TreeKind::Vdi {
            return fresh;
        }
        if self.older {
            // Its tables are read again: they tell which trees it has. Each node once, as a tree
            // that named one again and again would be without end.
            return self.entered.insert(node.entry.pba());
        }
        // Who has named it already is none of this table: what should stand here is not known.
        self.unread += u64::from(!fresh);
        fresh
    }

    fn block(&mut self, block: &Named) {
        let (kind, _) = self.tree(block);
        if kind != TreeKind::Vdi {
            let fresh = self.name(block, None, false);
            self.unread += u64::from(!fresh && !self.older);
            self.pages.push((block.start, block.entry));
        } else if self.name(block, None, true) && self.read_data {
            self.unverified.push(DataBlock {
                pba: block.entry.pba(),
                hash48: block.entry.hash48(),
                tree: block.tree,
                lba: block.start,
            });
        }
    }

    fn lost(&mut self, node: &Named) {
        if self.older {
            return;
        }
        self.counts().lost_entries += 1;
        let place = self.place(node, 1);
        let message = format!("{place}: contents were lost to damage that was found earlier");
        match self.tree(node) {
            (TreeKind::Vdi, _) => self.warn(FindingKind::Data, None, message),
            // What its records named is not known.
            _ => {
                self.unread += 1;
                self.error(FindingKind::Metadata, None, message);
            }
        }
    }

    fn failed(&mut self, node: &Named, error: &blockstore::Error) {
        self.unreadable(node, tree::span(node.level + 1), error);
    }
}

/// Adjacent blocks as one run each: first and last.
pub(super) fn runs(blocks: impl Iterator<Item = Pba>) -> Vec<(Pba, Pba)> {
    let mut runs: Vec<(Pba, Pba)> = Vec::new();
    for pba in blocks {
        match runs.last_mut() {
            Some((_, last)) if last.plus(1) == pba => *last = pba,
            _ => runs.push((pba, pba)),
        }
    }
    runs
}
