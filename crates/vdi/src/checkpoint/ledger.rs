//! What happened to holds since the last checkpoint, written into the ledgers of their VDIs: what is held
//! has a tree now.

use std::collections::BTreeMap;
use std::rc::Rc;

use blockstore::tree::OnDamage;
use ondisk::{Digest, LedgerKind, LedgerRecord, RootRef};

use super::merge::Merge;
use super::{FrozenSnapshot, FrozenVdi};
use crate::Error;
use crate::damage::Table;
use crate::ledger::{Event, Written};

impl Merge {
    /// The ledger of a VDI with what happened since the last checkpoint, stored; `None` if nothing did.
    pub(super) async fn ledger_of(&mut self, vdi: &FrozenVdi) -> Result<Option<Written>, Error> {
        let (before, afresh) = {
            let ledger = vdi.vdi.ledger.borrow();
            (Rc::clone(&ledger.written), ledger.afresh)
        };
        if vdi.ledger_events.is_empty() && !afresh {
            return Ok(None);
        }
        let Written { table, ref records, head, lost_up_to } = *before;
        let mut ledger = Written { table, records: records.clone(), head, lost_up_to };
        let mut stored = if afresh { 0 } else { records.len() };
        if records.is_empty() && head == Digest::default() {
            ledger.head = Digest::origin(self.engine.checksums.uuid(), vdi.vdi.id);
        }
        for event in &vdi.ledger_events {
            if event.kind.stands_for_others() || !ledger.has_room(1) {
                let kind =
                    if event.kind == LedgerKind::Lost { event.kind } else { LedgerKind::Folded };
                ledger.fold(kind, event.times);
                stored = 0;
                if event.kind.stands_for_others() {
                    continue;
                }
            }
            let record = self.ledger_record(event).await?;
            ledger.append(record);
        }
        if stored == 0 {
            // What it was before is left to garbage collection.
            ledger.table = RootRef::empty(1);
            self.left += 1;
        }
        let new = (0u64..).zip(&ledger.records).skip(stored);
        let new: BTreeMap<u64, Option<LedgerRecord>> =
            new.map(|(index, record)| (index, Some(*record))).collect();
        let table = Table::Ledger(vdi.vdi.id);
        ledger.table = self.store(table, ledger.table, &new, OnDamage::Fail).await?;
        Ok(Some(ledger))
    }

    /// What a ledger tells of an event; its place in the chain is not known yet.
    async fn ledger_record(&mut self, event: &Event) -> Result<LedgerRecord, Error> {
        let digest = match &event.snapshot {
            Some(snapshot) => {
                let snapshot = Rc::clone(snapshot);
                let held = FrozenSnapshot { snapshot, is_held: true, needs_tree: true };
                Digest::of_snapshot(&self.snapshot_record(&held).await?)
            }
            None => Digest::default(),
        };
        let (wall_ns, store_ns) = event.times;
        Ok(LedgerRecord {
            sequence: 0,
            kind: event.kind,
            number: event.number,
            wall_ns,
            store_ns,
            until: event.until,
            digest,
            chain: Digest::default(),
        })
    }
}
