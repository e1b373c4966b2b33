//! What a VDI reaches, in the order in which garbage collection and scrub go through it: the tree of
//! its head, those of its snapshots, page by page, and each history once, with all of its snapshots.

use base::{ErrorKind, SnapshotNumber, VdiId};
use ondisk::{Entry, History, Node, RootRef, SnapshotRecord, TableRecord, VdiRecord};

use crate::Error;
use crate::damage::Table;
use crate::history::Seen;

/// Who goes through it. A visitor deals with damage by itself: an error ends the visit.
pub(crate) trait Visitor {
    /// Walks trees of a VDI: of its head, or of snapshots.
    async fn trees(
        &mut self,
        vdi: VdiId,
        trees: &[(Option<SnapshotNumber>, RootRef)],
    ) -> Result<(), Error>;

    /// Looks at the pages of a VDI's snapshots before it goes through them.
    async fn look_ahead(&mut self, _: &VdiRecord, _: &[(u64, Entry)]) -> Result<(), Error> {
        Ok(())
    }

    /// Walks the tree of a table; its pages in order, with their numbers.
    async fn pages(&mut self, table: Table, root: &RootRef) -> Result<Vec<(u64, Entry)>, Error>;

    /// Reads a page; `None` if there is nothing to learn from it.
    async fn page(&mut self, table: Table, page: (u64, Entry)) -> Result<Option<Node>, Error>;

    /// Reads a history, and walks what its snapshots see of it. These are in order.
    async fn history(
        &mut self,
        vdi: VdiId,
        history: History,
        snapshots: &[(SnapshotNumber, Seen)],
    ) -> Result<(), Error>;
}

/// Goes through everything that a VDI reaches.
///
/// # Errors
/// Those of the visitor; `Corrupt` if a record makes no sense.
pub(crate) async fn vdi(record: &VdiRecord, visitor: &mut impl Visitor) -> Result<(), Error> {
    let id = record.id;
    visitor.trees(id, &[(None, record.root)]).await?;
    let table = Table::Snapshots(id);
    // Snapshots with the same history follow each other.
    let mut history: Option<(History, Vec<(SnapshotNumber, Seen)>)> = None;
    let pages = visitor.pages(table, &record.snapshots).await?;
    visitor.look_ahead(record, &pages).await?;
    for page in pages {
        let snapshots = records::<SnapshotRecord>(visitor, table, page).await?;
        let trees: Vec<_> =
            snapshots.iter().map(|snapshot| (Some(snapshot.number), snapshot.root)).collect();
        visitor.trees(id, &trees).await?;
        for snapshot in snapshots {
            let Some(of_snapshot) = snapshot.history else { continue };
            let seen = (snapshot.number, Seen::of(&snapshot));
            match &mut history {
                Some((of_last, all)) if *of_last == of_snapshot => all.push(seen),
                _ => {
                    if let Some((last, all)) = history.replace((of_snapshot, vec![seen])) {
                        visitor.history(id, last, &all).await?;
                    }
                }
            }
        }
    }
    if let Some((last, all)) = history {
        visitor.history(id, last, &all).await?;
    }
    // Its pages name no blocks, but should be there.
    let table = Table::Ledger(id);
    for page in visitor.pages(table, &record.ledger).await? {
        visitor.page(table, page).await?;
    }
    Ok(())
}

/// The records of a page that are left.
///
/// # Errors
/// As [`vdi`].
pub(crate) async fn records<R: TableRecord>(
    visitor: &mut impl Visitor,
    table: Table,
    page: (u64, Entry),
) -> Result<Vec<R>, Error> {
    let node = visitor.page(table, page).await?;
    decoded(node.as_ref(), page.0)
}

/// The records of a page with this number, if there is one.
///
/// # Errors
/// `Corrupt` if a record makes no sense.
pub(crate) fn decoded<R: TableRecord>(page: Option<&Node>, number: u64) -> Result<Vec<R>, Error> {
    let Some(page) = page else { return Ok(Vec::new()) };
    let mut records = Vec::new();
    for index in number * R::PER_PAGE..(number + 1) * R::PER_PAGE {
        let damaged = |_| Error::refused(ErrorKind::Corrupt, "a table record makes no sense");
        records.extend(R::get(page.block(), index).map_err(damaged)?);
    }
    Ok(records)
}
