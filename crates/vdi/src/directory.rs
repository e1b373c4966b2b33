//! The directory: which VDIs there are, by identity and by name. All of it is in memory, some 150
//! bytes for each VDI; everything else about a VDI is read when somebody uses it.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::rc::Rc;

use base::VdiId;
use ondisk::{DirectoryRecord, TableRecord};

use crate::engine::as_u64;

/// Bytes of a name, behind what all names begin with, that names are sorted by first.
const SORTED_BY: usize = 16;

/// Which VDIs there are.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    by_id: BTreeMap<VdiId, Rc<DirectoryRecord>>,
    by_name: BTreeSet<Named>,
    /// Those whose records changed since the last checkpoint.
    changed: ChangedVdis,
}

/// A record, as its name.
#[derive(Debug)]
struct Named(Rc<DirectoryRecord>);

impl Borrow<str> for Named {
    fn borrow(&self) -> &str {
        &self.0.name
    }
}

impl Ord for Named {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.name.cmp(&other.0.name)
    }
}

impl PartialOrd for Named {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Named {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for Named {}

impl Directory {
    /// What a table holds; in order of identity.
    pub(crate) fn new(records: Vec<Rc<DirectoryRecord>>) -> Self {
        // Collected, both are built from sorted entries, and their nodes are full.
        Self {
            by_name: in_order_of_name(&records).collect(),
            by_id: records.into_iter().map(|record| (record.id, record)).collect(),
            changed: ChangedVdis::default(),
        }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        as_u64(self.by_id.len())
    }

    pub(crate) fn contains(&self, id: VdiId) -> bool {
        self.by_id.contains_key(&id)
    }

    pub(crate) fn get(&self, id: VdiId) -> Option<&DirectoryRecord> {
        self.by_id.get(&id).map(|record| &**record)
    }

    /// The VDI of this name.
    pub(crate) fn find(&self, name: &str) -> Option<&DirectoryRecord> {
        self.by_name.get(name).map(|Named(record)| &**record)
    }

    /// The greatest identity of all.
    pub(crate) fn last_id(&self) -> Option<VdiId> {
        self.by_id.last_key_value().map(|(&id, _)| id)
    }

    /// VDIs with identities above `id`, in order of those.
    pub(crate) fn after(&self, id: VdiId) -> impl Iterator<Item = VdiId> {
        self.by_id.range((Bound::Excluded(id), Bound::Unbounded)).map(|(&id, _)| id)
    }

    /// VDIs with names behind `name`, in order of those.
    pub(crate) fn after_name(&self, name: Option<&str>) -> impl Iterator<Item = VdiId> {
        let from = name.map_or(Bound::Unbounded, Bound::Excluded);
        self.by_name.range::<str, _>((from, Bound::Unbounded)).map(|Named(record)| record.id)
    }

    pub(crate) fn insert(&mut self, record: DirectoryRecord) {
        let record = Rc::new(record);
        self.changed.insert(record.id);
        self.by_name.insert(Named(Rc::clone(&record)));
        self.by_id.insert(record.id, record);
    }

    pub(crate) fn rename(&mut self, id: VdiId, name: &str) {
        if let Some(record) = self.remove(id) {
            self.insert(DirectoryRecord { name: name.to_owned(), ..record });
        }
    }

    pub(crate) fn remove(&mut self, id: VdiId) -> Option<DirectoryRecord> {
        self.changed.insert(id);
        let record = self.by_id.remove(&id)?;
        // Names are given once, but not by who forges a log.
        if self.find(&record.name).is_some_and(|named| named.id == id) {
            self.by_name.remove(record.name.as_str());
        }
        Some(Rc::unwrap_or_clone(record))
    }

    /// What a checkpoint is to store: records that changed, `None` of what is gone.
    pub(crate) fn take_changed(&mut self) -> BTreeMap<u64, Option<DirectoryRecord>> {
        let changed = std::mem::take(&mut self.changed);
        changed.iter().map(|id| (id.get(), self.get(id).cloned())).collect()
    }

    /// Makes records count as changed.
    pub(crate) fn put_changed(&mut self, ids: impl Iterator<Item = VdiId>) {
        self.changed.extend(ids);
    }

    /// Makes all records count as changed.
    pub(crate) fn change_all(&mut self) {
        self.changed.extend(self.by_id.keys().copied());
    }

    /// Pages of its table that a checkpoint writes.
    pub(crate) fn changed_pages(&self) -> u64 {
        self.changed.pages()
    }
}

/// Some records in order of name. Names lie all over memory, and comparing them is what a million take
/// longest for: sorted with the bytes that tell most of them apart, few are looked at.
fn in_order_of_name(records: &[Rc<DirectoryRecord>]) -> impl Iterator<Item = Named> {
    let common = common_length(records);
    let told_apart = |record: &DirectoryRecord| {
        let mut bytes = [0; SORTED_BY];
        let rest = record.name.as_bytes().iter().skip(common);
        // What a name lacks is less than what another has there, or the names themselves decide.
        bytes.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        bytes
    };
    let mut named: Vec<_> =
        records.iter().map(|record| (told_apart(record), Named(Rc::clone(record)))).collect();
    named.sort();
    named.into_iter().map(|(_, named)| named)
}

/// Bytes that all names begin with.
fn common_length(records: &[Rc<DirectoryRecord>]) -> usize {
    let mut names = records.iter().map(|record| record.name.as_bytes());
    let first = names.next().unwrap_or_default();
    names.fold(first.len(), |length, name| {
        let same = |(one, other): &(&u8, &u8)| one == other;
        first.iter().zip(name).take(length).take_while(same).count()
    })
}

/// VDIs whose records a checkpoint is to write, in tables of records by identity.
#[derive(Debug, Default)]
pub(crate) struct ChangedVdis {
    ids: BTreeSet<VdiId>,
    /// Pages that these records lie on.
    pages: u64,
}

impl ChangedVdis {
    /// Adds one.
    pub(crate) fn insert(&mut self, id: VdiId) {
        let page = id.get() / DirectoryRecord::PER_PAGE * DirectoryRecord::PER_PAGE;
        let on_page = VdiId::new(page)..VdiId::new(page + DirectoryRecord::PER_PAGE);
        self.pages += u64::from(self.ids.range(on_page).next().is_none());
        self.ids.insert(id);
    }

    pub(crate) fn contains(&self, id: VdiId) -> bool {
        self.ids.contains(&id)
    }

    /// In order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = VdiId> {
        self.ids.iter().copied()
    }

    /// Pages of a table that they lie on.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }
}

impl Extend<VdiId> for ChangedVdis {
    fn extend<I: IntoIterator<Item = VdiId>>(&mut self, ids: I) {
        ids.into_iter().for_each(|id| self.insert(id));
    }
}

const _: () = assert!(DirectoryRecord::PER_PAGE == ondisk::VdiRecord::PER_PAGE);

#[cfg(test)]
mod tests {
    use base::{ClaimGeneration, HostId, SnapshotNumber};

    use super::*;

    fn record(id: u64, name: &str) -> DirectoryRecord {
        DirectoryRecord {
            id: VdiId::new(id),
            parent: VdiId::default(),
            parent_snapshot: SnapshotNumber::new(0),
            created_ns: 1,
            claim: ClaimGeneration::new(1),
            owner: HostId::new(0),
            name: name.to_owned(),
        }
    }

    #[test]
    fn names_and_identities_tell_the_same() {
        let loaded = [record(1, "b"), record(3, "a"), record(9, "c")].map(Rc::new);
        let mut directory = Directory::new(loaded.into());
        assert_eq!((directory.count(), directory.changed_pages()), (3, 0));
        directory.insert(record(20, "d"));
        directory.rename(VdiId::new(1), "e");
        directory.remove(VdiId::new(9));
        let ids = |ids: &mut dyn Iterator<Item = VdiId>| ids.map(VdiId::get).collect::<Vec<_>>();
        assert_eq!(ids(&mut directory.after_name(None)), [3, 20, 1]);
        assert_eq!(ids(&mut directory.after_name(Some("a"))), [20, 1]);
        assert_eq!(ids(&mut directory.after(VdiId::new(1))), [3, 20]);
        assert_eq!(directory.find("e").map(|it| it.id.get()), Some(1));
        assert!(directory.find("b").is_none() && directory.find("c").is_none());
        assert_eq!(directory.changed_pages(), 2, "one of 1 and 9, one of 20");
        let changed = directory.take_changed();
        let gone: Vec<_> = changed.iter().map(|(id, record)| (*id, record.is_none())).collect();
        assert_eq!(gone, [(1, false), (9, true), (20, false)]);
        assert_eq!(directory.changed_pages(), 0);
    }

    #[test]
    fn what_is_loaded_is_in_order_of_name() {
        let check = |names: &[&str]| {
            let numbered = (1..).zip(names);
            let records = numbered.map(|(id, name)| Rc::new(record(id, name))).collect();
            let directory = Directory::new(records);
            let mut expected: Vec<(&str, u64)> =
                names.iter().zip(1..).map(|(name, id)| (*name, id)).collect();
            expected.sort_unstable();
            let expected: Vec<u64> = expected.into_iter().map(|(_, id)| id).collect();
            let found: Vec<u64> = directory.after_name(None).map(VdiId::get).collect();
            assert_eq!(found, expected, "{names:?}");
            for name in names {
                assert_eq!(directory.find(name).map(|it| &*it.name), Some(*name));
            }
        };
        check(&[]);
        check(&["b"]);
        check(&["b", "a", "ab", "aa", "a\0", "a\0b", "é", "z"]);
        // One is what all begin with.
        check(&["web2", "web10", "web", "web1"]);
        // They differ behind what they are sorted by first.
        let long = |last: &str| format!("tenant/{}/{last}", "production".repeat(3));
        let longer = [long("3"), long("20"), long("1"), "tenant/x".into(), "tenants".into()];
        check(&longer.each_ref().map(String::as_str));
    }

    /// Two VDIs of one name are a forgery; deleting one leaves the other its name.
    #[test]
    fn a_name_that_two_have_stays_with_one() {
        let mut directory = Directory::new(vec![Rc::new(record(1, "a"))]);
        directory.insert(record(2, "a"));
        directory.remove(VdiId::new(2));
        assert_eq!(directory.find("a").map(|it| it.id.get()), Some(1));
    }
}
