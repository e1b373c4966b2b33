//! The ledger of a VDI: what happened to holds of its snapshots, chained, so that whoever has noted the
//! head can tell whether a held snapshot was removed or altered (`ondisk::LedgerRecord`).
//!
//! - Log records say what happens, checkpoints write it into the ledger: only then is there a tree of
//!   what is held, and its root's hash.
//! - All of it is in memory, so that it can be written whole if a page of it is damaged.
//! - It is bounded: when it is full, what has ended is folded into one record that names the chain
//!   before it. Behind it stand the holds that go on.
//! - If it cannot be read, what was held is known from the snapshots, and held until somebody ends it.

use std::collections::BTreeMap;
use std::rc::Rc;

use base::SnapshotNumber;
use blockstore::table;
use ondisk::{Digest, LEDGER_RECORDS_MAX, LedgerKind, LedgerRecord, RootRef, Until, VdiRecord};

use crate::Error;
use crate::damage::{Table, is_damage};
use crate::engine::{Engine, as_u64};
use crate::holds::Hold;
use crate::types::LedgerEntry;
use crate::vdi::{Snapshot, Vdi};

/// Most snapshots of a VDI that are held at a time: their records, and as many again, fit into a ledger
/// from which what has ended was folded.
pub(crate) const HOLDS_MAX: usize = 1000;

const _: () = assert!(2 * HOLDS_MAX < LEDGER_RECORDS_MAX);

/// The ledger of a VDI that is in use.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// As the last checkpoint wrote it.
    pub(crate) written: Rc<Written>,
    /// What happened since the last checkpoint was cut.
    pub(crate) events: Vec<Event>,
    /// How much more checkpoints have taken that are not published yet.
    pub(crate) frozen_count: usize,
    /// Whether the next checkpoint writes all of it.
    pub(crate) afresh: bool,
    /// Head of the chain, and number of its record, that the last published checkpoint has.
    pub(crate) published: (Digest, u64),
}

/// A ledger in the tables.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) table: RootRef,
    pub(crate) records: Vec<LedgerRecord>,
    pub(crate) head: Digest,
    /// Number of the last record, if none is left of them.
    pub(crate) lost_up_to: u64,
}

impl Default for Written {
    fn default() -> Self {
        Self {
            table: RootRef::empty(1),
            records: Vec::new(),
            head: Digest::default(),
            lost_up_to: 0,
        }
    }
}

/// What a ledger is to tell.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) kind: LedgerKind,
    pub(crate) number: SnapshotNumber,
    /// Wall and store time.
    pub(crate) times: (u64, u64),
    pub(crate) until: Option<Until>,
    /// What is held. It stays until it was written that it was, whatever becomes of it.
    pub(crate) snapshot: Option<Rc<Snapshot>>,
}

impl Written {
    pub(crate) fn sequence(&self) -> u64 {
        self.records.last().map_or(self.lost_up_to, |last| last.sequence)
    }

    /// Holds that nothing has ended, by snapshot.
    pub(crate) fn holds(&self) -> BTreeMap<SnapshotNumber, LedgerRecord> {
        holds(&self.records)
    }

    /// Chains a record behind the last one.
    pub(crate) fn append(&mut self, mut record: LedgerRecord) {
        record.sequence = self.sequence() + 1;
        record.chain = record.chained_to(self.head);
        self.head = record.chain;
        self.records.push(record);
    }

    /// Begins anew behind a record that stands for all that there were, as `kind` says. What still
    /// holds is told again.
    pub(crate) fn fold(&mut self, kind: LedgerKind, (wall_ns, store_ns): (u64, u64)) {
        let was_lost = self.records.iter().any(|record| record.kind == LedgerKind::Lost);
        let kind = if was_lost { LedgerKind::Lost } else { kind };
        let held = self.holds();
        let sequence = self.sequence() + 1;
        let number = SnapshotNumber::new(0);
        let (until, digest) = (None, self.head);
        let chain = Digest::default();
        let mut first =
            LedgerRecord { sequence, kind, number, wall_ns, store_ns, until, digest, chain };
        first.chain = first.chained_to(self.head);
        self.head = first.chain;
        self.records = vec![first];
        // A store holds less; who has forged one that does not gets a ledger that can be read.
        held.into_values().take(LEDGER_RECORDS_MAX - 2).for_each(|record| self.append(record));
    }

    /// Whether so many more records fit.
    pub(crate) fn has_room(&self, count: usize) -> bool {
        self.records.len() + count <= LEDGER_RECORDS_MAX
    }
}

impl Ledger {
    pub(crate) fn read(written: Written) -> Self {
        let published = (written.head, written.sequence());
        Self { written: Rc::new(written), published, ..Self::default() }
    }

    /// One whose records cannot be read: it goes on behind the chain that they had and the number of the
    /// last one, with what the snapshots say that is held.
    pub(crate) fn lost(
        (head, sequence): (Digest, u64),
        times: (u64, u64),
        held: Vec<Rc<Snapshot>>,
    ) -> Self {
        let lost = Event {
            kind: LedgerKind::Lost,
            number: SnapshotNumber::new(0),
            times,
            until: None,
            snapshot: None,
        };
        let again = held.into_iter().map(|snapshot| Event {
            kind: LedgerKind::Held,
            number: snapshot.number,
            times,
            until: None,
            snapshot: Some(snapshot),
        });
        let events = std::iter::once(lost).chain(again).collect();
        let written = Written { head, lost_up_to: sequence, ..Written::default() };
        let published = (head, sequence);
        Self { written: Rc::new(written), events, afresh: true, published, ..Self::default() }
    }
}

/// What can be read of a ledger.
pub(crate) enum Records {
    /// All of it.
    Whole(Vec<LedgerRecord>),
    /// Not all: it is damaged. The number of its last record, or a lower one if no record is left that
    /// tells it.
    Lost(u64),
}

impl Engine {
    /// The records of the ledger of a VDI.
    pub(crate) async fn read_ledger(&self, record: &VdiRecord) -> Result<Records, Error> {
        let count = u64::from(record.ledger_count);
        let count_max = usize::try_from(count).unwrap_or(usize::MAX).min(LEDGER_RECORDS_MAX);
        let mut records = Vec::new();
        let mut last = count.min(as_u64(LEDGER_RECORDS_MAX));
        let scanned = table::scan(&self.nodes, &record.ledger, |index, record: LedgerRecord| {
            last = last.max(record.sequence + as_u64(count_max).saturating_sub(index + 1));
            records.push(record);
            // More than it says that there are would be damage as well.
            records.len() <= count_max
        });
        match scanned.await.map_err(Error::from) {
            Ok(_) => Ok(Records::Whole(records)),
            Err(error) if is_damage(&error) => {
                let registry = self.registry.borrow();
                let disk = registry.name(record.id);
                tracing::error!(
                    disk,
                    "its ledger is lost: what is held stays until it is released"
                );
                self.checkpoints.damaged.note(Table::Ledger(record.id));
                Ok(Records::Lost(last))
            }
            Err(error) => Err(error),
        }
    }

    /// Takes what was read of the ledger of a VDI that has just been loaded.
    pub(crate) fn adopt_ledger(&self, vdi: &Vdi, record: &VdiRecord, records: Records) {
        let snapshots = vdi.snapshots.borrow();
        let held = || snapshots.iter().filter(|snapshot| snapshot.hold.get().is_some());
        vdi.held.borrow_mut().extend(held().map(|snapshot| snapshot.number));
        let (head, count) = (record.ledger_head, record.ledger_count);
        let records = match records {
            Records::Whole(records) => records,
            Records::Lost(sequence) => {
                let times = (self.runtime.wall_ns(), self.store_ns());
                let held = held().map(Rc::clone).collect();
                *vdi.ledger.borrow_mut() = Ledger::lost((head, sequence), times, held);
                return;
            }
        };
        let origin = Digest::origin(self.checksums.uuid(), vdi.id);
        let why = broken(&records, head, count, origin);
        if let Some(why) = &why {
            let registry = self.registry.borrow();
            tracing::error!(disk = registry.name(vdi.id), why, "the ledger of holds is broken");
        }
        for (number, record) in holds(&records) {
            let snapshot = snapshots.get(number).filter(|snapshot| snapshot.hold.get().is_some());
            match snapshot {
                // What a broken ledger says proves nothing: its holds end when they are released.
                Some(snapshot) => {
                    let until = record.until.filter(|_| why.is_none());
                    snapshot.hold.set(Some(Hold { until }));
                }
                None => {
                    let registry = self.registry.borrow();
                    let disk = registry.name(vdi.id);
                    tracing::error!(disk, %number, "a held snapshot is missing: see `parallax check`");
                }
            }
        }
        let written = Written { table: record.ledger, records, head, ..Written::default() };
        *vdi.ledger.borrow_mut() = Ledger::read(written);
    }
}

impl Ledger {
    /// Where it ends, as the last published checkpoint has it.
    pub(crate) fn entry(&self) -> Option<LedgerEntry> {
        let (Digest(head), sequence) = self.published;
        let pending = as_u64(self.events.len() + self.frozen_count);
        (sequence > 0 || pending > 0).then_some(LedgerEntry { head, sequence, pending })
    }
}

/// Holds that nothing has ended, by snapshot.
pub(crate) fn holds(records: &[LedgerRecord]) -> BTreeMap<SnapshotNumber, LedgerRecord> {
    let mut holds = BTreeMap::new();
    for record in records {
        match record.kind {
            LedgerKind::Held => {
                holds.insert(record.number, *record);
            }
            LedgerKind::Released | LedgerKind::Ended => {
                holds.remove(&record.number);
            }
            LedgerKind::Folded | LedgerKind::Lost => {}
        }
    }
    holds
}

/// What is wrong with the chain of a ledger, if anything: records are missing, or were altered.
/// `origin` is what the first of all is chained to.
pub(crate) fn broken(
    records: &[LedgerRecord],
    head: Digest,
    count: u32,
    origin: Digest,
) -> Option<String> {
    if as_u64(records.len()) != u64::from(count) {
        return Some(format!("{} records are there, but there were {count}", records.len()));
    }
    let mut before = match records.first() {
        None if head == Digest::default() => return None,
        None => return Some("no record is there, but there is a head".to_owned()),
        Some(first) if first.sequence == 1 && !first.kind.stands_for_others() => origin,
        Some(first) if first.kind.stands_for_others() => first.digest,
        Some(first) => return Some(format!("it begins with record {}", first.sequence)),
    };
    let mut sequence = records.first().map_or(0, |first| first.sequence);
    for (index, record) in records.iter().enumerate() {
        let is_placed =
            record.sequence == sequence && (index == 0 || !record.kind.stands_for_others());
        if !is_placed || record.chain != record.chained_to(before) {
            return Some(format!("record {sequence} is not what it was"));
        }
        before = record.chain;
        sequence += 1;
    }
    let is_whole = before == head;
    (!is_whole).then(|| format!("it ends at record {}, and its head is another one", sequence - 1))
}

#[cfg(test)]
mod tests {
    use base::{StoreUuid, VdiId};

    use super::*;

    fn record(kind: LedgerKind, number: u64) -> LedgerRecord {
        LedgerRecord {
            sequence: 0,
            kind,
            number: SnapshotNumber::new(number),
            wall_ns: 1,
            store_ns: 2,
            until: None,
            digest: Digest([3; 32]),
            chain: Digest::default(),
        }
    }

    fn origin() -> Digest {
        Digest::origin(StoreUuid([1; 16]), VdiId::new(2))
    }

    fn ledger() -> Written {
        let mut written = Written { head: origin(), ..Written::default() };
        for number in 1..=3 {
            written.append(record(LedgerKind::Held, number));
        }
        written.append(record(LedgerKind::Released, 2));
        written
    }

    fn why(written: &Written) -> Option<String> {
        let count = u32::try_from(written.records.len()).unwrap();
        broken(&written.records, written.head, count, origin())
    }

    #[test]
    fn a_chain_tells_of_every_change() {
        assert_eq!(why(&ledger()), None);
        assert_eq!(broken(&[], Digest::default(), 0, origin()), None);
        assert!(broken(&[], origin(), 0, origin()).is_some());
        assert!(broken(&ledger().records, ledger().head, 5, origin()).is_some());
        for at in 0..4 {
            let mut altered = ledger();
            altered.records[at].digest.0[0] ^= 1;
            let found = why(&altered).unwrap();
            assert!(found.contains(&format!("record {}", at + 1)), "{found}");
            let mut removed = ledger();
            removed.records.remove(at);
            assert!(why(&removed).is_some(), "{at}");
        }
        let mut swapped = ledger();
        swapped.records.swap(1, 2);
        assert!(why(&swapped).is_some());
        let other = Digest::origin(StoreUuid([1; 16]), VdiId::new(3));
        assert!(broken(&ledger().records, ledger().head, 4, other).is_some());
    }

    /// A head that was printed after a checkpoint had failed was that from before the hold, and nothing
    /// said so.
    #[test]
    fn an_end_without_what_is_not_written_yet_says_so() {
        let number = SnapshotNumber::new(4);
        let (kind, times, until, snapshot) = (LedgerKind::Released, (9, 9), None, None);
        let event = Event { kind, number, times, until, snapshot };
        let mut read = Ledger::read(ledger());
        assert_eq!(read.entry().map(|end| (end.sequence, end.pending)), Some((4, 0)));
        read.events.push(event.clone());
        assert_eq!(read.entry().map(|end| (end.sequence, end.pending)), Some((4, 1)));
        let first = Ledger { events: vec![event], ..Ledger::default() };
        assert_eq!(first.entry().map(|end| (end.sequence, end.pending)), Some((0, 1)));
        assert_eq!(Ledger::default().entry(), None);
    }

    /// A fold forgot what holds beyond the thousandth: there are more if damage or forgery says so.
    #[test]
    fn a_fold_forgets_no_hold_that_fits() {
        let count = LEDGER_RECORDS_MAX - 2;
        let mut many = Written { head: origin(), ..Written::default() };
        (1..=count as u64).for_each(|number| many.append(record(LedgerKind::Held, number)));
        many.fold(LedgerKind::Folded, (9, 9));
        assert_eq!((why(&many), many.holds().len()), (None, count));
        assert!(many.has_room(1));
    }

    #[test]
    fn what_holds_is_told_again_when_the_rest_is_folded() {
        let mut folded = ledger();
        let before = folded.head;
        folded.fold(LedgerKind::Folded, (9, 9));
        assert_eq!(why(&folded), None);
        let numbers = |written: &Written| -> Vec<u64> {
            written.holds().into_keys().map(SnapshotNumber::get).collect()
        };
        assert_eq!((numbers(&folded), folded.records.len()), (vec![1, 3], 3));
        assert_eq!((folded.records[0].sequence, folded.records[0].digest), (5, before));
        folded.append(record(LedgerKind::Ended, 1));
        assert_eq!((why(&folded), numbers(&folded)), (None, vec![3]));
        let mut cut = ledger();
        cut.fold(LedgerKind::Lost, (9, 9));
        cut.fold(LedgerKind::Folded, (10, 10));
        assert_eq!(cut.records[0].kind, LedgerKind::Lost, "it stays to be seen");
        cut.records.remove(0);
        assert!(why(&cut).is_some());
    }
}
