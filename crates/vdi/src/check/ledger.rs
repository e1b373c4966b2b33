//! Whether what is held is there, and is what it was when it was held.

use std::collections::BTreeMap;

use base::StoreUuid;
use ondisk::{Digest, LedgerKind, LedgerRecord, SnapshotRecord, VdiRecord};

use super::{FindingKind, NotedHead};
use crate::ledger::{broken, holds};

/// What became of a head that somebody has noted.
pub(super) enum Compared {
    /// It stands there.
    Same,
    /// It cannot be told, as it says.
    Unknown(String),
    /// It does not.
    Changed(String),
}

/// Looks for a noted head among the records of a ledger, which are chained up to its own.
pub(super) fn compare(noted: &NotedHead, ledger: &[LedgerRecord]) -> Compared {
    let NotedHead { vdi, record, digits } = noted;
    let chain = ledger.iter().find(|it| it.sequence == *record).map(|it| it.chain);
    // A fold says what was chained before it.
    let folded = ledger.first().filter(|first| first.sequence == record + 1).map(|it| it.digest);
    let (first, last) = match (ledger.first(), ledger.last()) {
        (Some(first), Some(last)) => (first.sequence, last.sequence),
        _ => (1, 0),
    };
    match chain.or(folded) {
        Some(chain) if chain.to_string().starts_with(digits) => Compared::Same,
        Some(chain) => Compared::Changed(format!(
            "{vdi}: record {record} of its ledger is not the one that was noted: it is {chain}. What it says \
             of held snapshots proves nothing: compare them with a copy"
        )),
        None if *record > last => Compared::Changed(format!(
            "{vdi}: its ledger was noted up to record {record}, and ends at {last}: records were taken away, or \
             the store is an older copy"
        )),
        None => Compared::Unknown(format!(
            "{vdi}: record {record} of its ledger was folded into record {first}, as a ledger does after some \
             thousand: it cannot be told whether it is the one that was noted. Note where it ends now"
        )),
    }
}

/// What is wrong with the ledger of the VDI `name`, and with what it says that is held; and what is
/// unusual.
pub(super) fn judge(
    store: StoreUuid,
    name: &str,
    vdi: &VdiRecord,
    ledger: &[LedgerRecord],
    snapshots: &BTreeMap<u64, SnapshotRecord>,
) -> (Vec<(FindingKind, String)>, Option<String>) {
    let mut errors = Vec::new();
    let origin = Digest::origin(store, vdi.id);
    if let Some(why) = broken(ledger, vdi.ledger_head, vdi.ledger_count, origin) {
        let message = format!(
            "{name}: the ledger of holds is broken: {why}. What it says of held snapshots proves nothing: \
             compare them with a copy"
        );
        errors.push((FindingKind::Ledger, message));
    }
    let held = holds(ledger);
    for (number, hold) in &held {
        let target = format!("{name}@{number}");
        match snapshots.get(&number.get()) {
            None => {
                let message = format!(
                    "{target} was held, and is missing: get it back from a copy. `parallax release \
                     {target}` notes in the ledger that this is known"
                );
                errors.push((FindingKind::HeldMissing, message));
            }
            Some(snapshot) => {
                let altered = if Digest::of_snapshot(snapshot) != hold.digest {
                    Some("is not what it was when it was held")
                } else {
                    (!snapshot.is_held).then_some("was held, and its record says that it is not")
                };
                let message = |what| {
                    format!(
                        "{target} {what}: compare it with a copy, and take neither for the other"
                    )
                };
                errors.extend(altered.map(|what| (FindingKind::HeldAltered, message(what))));
            }
        }
    }
    let unknown = snapshots.values().filter(|it| it.is_held && !held.contains_key(&it.number));
    for snapshot in unknown {
        let number = snapshot.number;
        let message = format!(
            "{name}@{number} is held, and the ledger does not tell of it: hold it once more when it was \
             released, if it should be held"
        );
        errors.push((FindingKind::Ledger, message));
    }
    let lost = ledger.first().filter(|first| first.kind == LedgerKind::Lost).map(|first| {
        format!(
            "{name}: what stood in the ledger of holds before record {} was lost to damage; what was held \
             then is held until it is released",
            first.sequence
        )
    });
    (errors, lost)
}
