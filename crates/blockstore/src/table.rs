//! Tables: trees of pages that hold records of fixed size, found by number. Pages are metadata
//! blocks; a table changes only at a checkpoint.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use base::{BLOCK_SIZE, BirthLabel, Lsn};
use ondisk::{DecodeError, Entry, EntryState, Node, RootRef, TableRecord};

use crate::tree::{self, Births, Change, OnDamage, TreeWriter};
use crate::{Error, NodeStore};

/// Tables share nothing: every page and node is private.
const TABLE_BIRTHS: Births = Births { label: BirthLabel::new(1), shared_up_to: BirthLabel::new(0) };

/// Pages that a scan reads at once.
const PAGES_AT_ONCE: u64 = 64;

/// Reads the page that holds record `index`.
///
/// # Errors
/// As [`tree::leaf`].
pub async fn page(nodes: &NodeStore, root: &RootRef, page: u64) -> Result<Option<Node>, Error> {
    page_of(nodes, tree::lookup(nodes, root, page).await?).await
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

/// Calls `visit` with every record from number `first` on that can be read, in order, until it
/// returns `false`.
///
/// # Errors
/// Device errors, at once; `Damaged`, when everything that is left has been visited, if something
/// is damaged.
pub async fn scan<R: TableRecord>(
    nodes: &NodeStore,
    root: &RootRef,
    first: u64,
    mut visit: impl FnMut(u64, R) -> bool,
) -> Result<(), Error> {
    let mut number = first / R::PER_PAGE;
    let mut damaged = false;
    while number < tree::coverage(root) {
        let leaf = tree::leaf_left(nodes, root, number).await?;
        let end = leaf.end(number);
        for current in number..end {
            if (current - number).is_multiple_of(PAGES_AT_ONCE) {
                fetch(nodes, &leaf, current..end.min(current + PAGES_AT_ONCE)).await;
            }
            let page = match page_of(nodes, leaf.entry(current)).await {
                Err(Error::Damaged { .. }) => {
                    damaged = true;
                    None
                }
                page => page?,
            };
            let Some(page) = page else {
                match &leaf {
                    // It holds nothing: skip it whole.
                    tree::Leaf::Uniform(..) => break,
                    tree::Leaf::Node(_) => continue,
                }
            };
            for index in current * R::PER_PAGE..(current + 1) * R::PER_PAGE {
                if index < first {
                    continue;
                }
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
        number = end;
    }
    if damaged { Err(Error::Damaged { what: "table", at: root.entry.pba() }) } else { Ok(()) }
}

/// Has pages of a leaf in memory soon, all at once; who needs one learns what is wrong with it.
async fn fetch(nodes: &NodeStore, leaf: &tree::Leaf, pages: Range<u64>) {
    if matches!(leaf, tree::Leaf::Node(_)) {
        let entries = pages.map(|page| leaf.entry(page));
        nodes.load_all(entries.filter(|e| e.state() == EntryState::Mapped).collect()).await;
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
