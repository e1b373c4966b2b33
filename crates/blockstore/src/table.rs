//! Tables: trees of pages that hold records of fixed size, found by number. Pages are metadata
//! blocks; a table changes only at a checkpoint.

use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;

use base::{BLOCK_SIZE, BirthLabel, Lsn, Pba};
use ondisk::{DecodeError, Entry, EntryState, Node, RootRef, TableRecord};

use crate::tree::{self, Births, Change, OnDamage, TreeWriter};
use crate::{Error, NodeStore};

/// Tables share nothing: every page and node is private.
const TABLE_BIRTHS: Births = Births {
    label: BirthLabel::new(1),
    shared_up_to: BirthLabel::new(0),
    shared_before: Lsn::new(0),
};

/// Nodes or pages that a walk reads at once: all that a node names.
const BLOCKS_AT_ONCE: usize = ondisk::FANOUT;

/// Reads the page that holds record `index`.
///
/// # Errors
/// As [`tree::leaf`].
pub async fn page(nodes: &NodeStore, root: &RootRef, page: u64) -> Result<Option<Node>, Error> {
    page_of(nodes, tree::lookup(nodes, root, page).await?).await
}

/// As [`page`], for who looks at all pages of a table once: it does not stay in the cache.
///
/// # Errors
/// As [`tree::leaf`].
pub async fn page_once(
    nodes: &NodeStore,
    root: &RootRef,
    page: u64,
) -> Result<Option<Node>, Error> {
    let entry = tree::lookup(nodes, root, page).await?;
    let node = page_of(nodes, entry).await;
    nodes.cache().remove(entry.pba());
    node
}

async fn page_of(nodes: &NodeStore, entry: Entry) -> Result<Option<Node>, Error> {
    match entry.state() {
        EntryState::Mapped => Ok(Some(nodes.load(entry).await?)),
        EntryState::Damaged => Err(Error::Damaged { what: "table page", at: entry.pba() }),
        EntryState::Unmapped | EntryState::Zero => Ok(None),
    }
}

/// Reads record `index`.
///
/// # Errors
/// As [`tree::leaf`]; `Damaged` if the record makes no sense.
pub async fn get<R: TableRecord>(
    nodes: &NodeStore,
    root: &RootRef,
    index: u64,
) -> Result<Option<R>, Error> {
    match page(nodes, root, index / R::PER_PAGE).await? {
        Some(page) => decode(R::get(page.block(), index), root),
        None => Ok(None),
    }
}

/// Calls `visit` with every record that can be read, in order, until it returns `false`.
///
/// # Errors
/// Device errors, at once; `Damaged`, when everything that is left has been visited, if something
/// is damaged.
pub async fn scan<R: TableRecord>(
    nodes: &NodeStore,
    root: &RootRef,
    mut visit: impl FnMut(u64, R) -> bool,
) -> Result<(), Error> {
    let mut walk = Walk::new(nodes, root, u64::MAX);
    let mut damaged = false;
    loop {
        let (number, page) = match walk.next_page().await {
            Ok(Some(page)) => page,
            Ok(None) => break,
            Err(Error::Damaged { .. }) => {
                damaged = true;
                continue;
            }
            Err(error) => return Err(error),
        };
        for index in number * R::PER_PAGE..(number + 1) * R::PER_PAGE {
            match R::get(page.block(), index) {
                Ok(Some(record)) => {
                    if !visit(index, record) {
                        return Ok(());
                    }
                }
                Ok(None) => {}
                Err(_) => damaged = true,
            }
        }
    }
    if damaged { Err(Error::Damaged { what: "table", at: root.entry.pba() }) } else { Ok(()) }
}

/// What the tree of a table names.
#[derive(Clone, Debug)]
pub enum Named {
    /// A node of the tree.
    Node(Entry),
    /// A page, and its number.
    Page(u64, Entry),
}

/// A walk of a table's tree, in order.
///
/// A table shares nothing, so a block that its tree names twice is damage. Without that rule a
/// handful of blocks could stand for 2^40 pages, and a walk would have no end.
pub struct Walk<'a> {
    nodes: &'a NodeStore,
    /// No page has this number or a higher one.
    page_end: u64,
    /// From the root to where the walk is.
    path: Vec<Siblings>,
    named: HashSet<Pba>,
}

/// Entries next to each other: those of a node, or the root's alone.
struct Siblings {
    entries: Vec<Entry>,
    /// The one to be looked at next.
    next: usize,
    /// Height of the tree below each: 0 for pages.
    height: u8,
    /// First page below them.
    start: u64,
}

impl<'a> Walk<'a> {
    /// A walk of the tree of `root`, whose pages are known to have numbers below `page_end`.
    #[must_use]
    pub fn new(nodes: &'a NodeStore, root: &RootRef, page_end: u64) -> Self {
        let top = Siblings { entries: vec![root.entry], next: 0, height: root.height, start: 0 };
        Self { nodes, page_end, path: vec![top], named: HashSet::new() }
    }

    /// What comes next; `None` at the end. Nodes and pages are read many at a time, before they are
    /// asked for.
    ///
    /// # Errors
    /// `Damaged` if a node or page was lost, a node does not verify, a block is named that was named
    /// before, or a page has a number behind the end; device errors. Asked again, the walk goes on
    /// behind what it failed at.
    pub async fn next(&mut self) -> Result<Option<Named>, Error> {
        while let Some(siblings) = self.path.last_mut() {
            let Some(&entry) = siblings.entries.get(siblings.next) else {
                self.path.pop();
                continue;
            };
            if siblings.next.is_multiple_of(BLOCKS_AT_ONCE) {
                siblings.fetch(self.nodes, &self.named).await;
            }
            let height = siblings.height;
            let slot = u64::try_from(siblings.next).unwrap_or(0);
            let start = siblings.start + slot * tree::span(height);
            siblings.next += 1;
            let damaged = |what| Err(Error::Damaged { what, at: entry.pba() });
            match entry.state() {
                EntryState::Unmapped | EntryState::Zero => continue,
                EntryState::Damaged => return damaged("table (a part of it was lost)"),
                EntryState::Mapped => {}
            }
            if !self.named.insert(entry.pba()) {
                return damaged("table (it names a block twice)");
            }
            if height == 0 && start >= self.page_end {
                return damaged("table (it has a page behind its end)");
            }
            if height == 0 {
                return Ok(Some(Named::Page(start, entry)));
            }
            let entries = self.nodes.load(entry).await?.entries().into();
            self.path.push(Siblings { entries, next: 0, height: height - 1, start });
            return Ok(Some(Named::Node(entry)));
        }
        Ok(None)
    }

    /// The next page, with its number. It does not stay in the cache: who looks at all pages of a table
    /// keeps what he wants of them.
    ///
    /// # Errors
    /// As [`Self::next`], and if the page does not verify.
    pub async fn next_page(&mut self) -> Result<Option<(u64, Node)>, Error> {
        while let Some(named) = self.next().await? {
            if let Named::Page(number, entry) = named {
                let page = self.nodes.load(entry).await?;
                self.nodes.cache().remove(entry.pba());
                return Ok(Some((number, page)));
            }
        }
        Ok(None)
    }
}

impl Siblings {
    /// Has what some entries name in memory soon, all at once; who needs it learns what is wrong
    /// with it.
    async fn fetch(&self, nodes: &NodeStore, named: &HashSet<Pba>) {
        let wanted = self.entries.iter().skip(self.next).take(BLOCKS_AT_ONCE).copied();
        let wanted = wanted.filter(|entry| entry.state() == EntryState::Mapped);
        let wanted: Vec<Entry> = wanted.filter(|entry| !named.contains(&entry.pba())).collect();
        if wanted.len() > 1 {
            nodes.load_all(wanted).await;
        }
    }
}

/// Stores records (`None` clears) and returns the new root. If damage is to be forgotten, so are the
/// other records of a damaged page.
///
/// # Errors
/// As [`tree::update`].
pub async fn store<R: TableRecord>(
    writer: &mut TreeWriter<'_>,
    root: RootRef,
    records: &BTreeMap<u64, Option<R>>,
) -> Result<RootRef, Error> {
    let mut pages: BTreeMap<u64, Vec<(u64, Option<&R>)>> = BTreeMap::new();
    for (&index, record) in records {
        pages.entry(index / R::PER_PAGE).or_default().push((index, record.as_ref()));
    }
    let mut images = Vec::with_capacity(pages.len());
    for (number, records) in pages {
        let mut buffer = writer.nodes.runtime().buffers().take_to_keep(1);
        let old = match page(writer.nodes, &root, number).await {
            Err(Error::Damaged { .. }) if writer.on_damage == OnDamage::Forget => None,
            old => old?,
        };
        match old {
            Some(old) => buffer.bytes_mut().copy_from_slice(&old.block().0),
            None => buffer.bytes_mut().fill(0),
        }
        if let Some(block) = buffer.blocks_mut().first_mut() {
            for (index, record) in records {
                R::set(block, index, record);
            }
        }
        images.push((number, buffer));
    }
    store_pages(writer, root, images).await
}

/// Stores whole pages, in order of number; an all-zero page is unmapped.
///
/// # Errors
/// As [`tree::update`].
pub async fn store_pages(
    writer: &mut TreeWriter<'_>,
    root: RootRef,
    pages: Vec<(u64, base::Buffer)>,
) -> Result<RootRef, Error> {
    let mut changes = Vec::with_capacity(pages.len());
    let last = pages.iter().map(|(number, _)| *number).max();
    for (number, buffer) in pages {
        let entry = if buffer.bytes().get(..BLOCK_SIZE).is_some_and(is_zero) {
            Entry::UNMAPPED
        } else {
            let pba = (writer.allocate)()?;
            let hash = writer.nodes.write(writer.batch, pba, Rc::new(buffer));
            Entry::mapped(pba, hash, TABLE_BIRTHS.label)
        };
        changes.push(Change { level: 0, start: number, lsn: Lsn::new(1), entry });
    }
    let height = last.map_or(root.height, |last| RootRef::height_for(last + 1)).max(root.height);
    tree::update(writer, TABLE_BIRTHS, root, height, &changes).await
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

fn decode<R>(record: Result<Option<R>, DecodeError>, root: &RootRef) -> Result<Option<R>, Error> {
    record.map_err(|_| Error::Damaged { what: "table record", at: root.entry.pba() })
}
