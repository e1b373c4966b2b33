//! Whether what is held is there, and is what it was when it was held.

use std::collections::{BTreeMap, BTreeSet};

use base::{SnapshotNumber, StoreUuid};
use ondisk::{Digest, LedgerKind, LedgerRecord, SnapshotRecord, VdiRecord};

use super::{FindingKind, NotedHead};
use crate::ledger::{broken, holds};

/// Looks for a noted head among the records of a ledger, which are chained up to its own. What ended since of what
/// was held then, if the record is there.
///
/// # Errors
/// Why it does not prove that everything is there that was noted.
pub(super) fn compare(
    noted: &NotedHead,
    ledger: &[LedgerRecord],
) -> Result<Option<String>, String> {
    let NotedHead { vdi, record, digest } = noted;
    let proves_nothing = "What it says of held snapshots proves nothing: compare them with a copy";
    if let Some(found) = ledger.iter().position(|it| it.sequence == *record) {
        let (then, since) = ledger.split_at(found + 1);
        return match then.last().filter(|it| it.chain == *digest) {
            Some(_) => Ok(ended_since(noted, &holds(then), since)),
            None => Err(format!(
                "{vdi}: record {record} of its ledger is not the one that was noted. {proves_nothing}"
            )),
        };
    }
    match (ledger.first(), ledger.last()) {
        (Some(first), Some(last)) if *record < first.sequence => {
            let end = format!("Note where it ends now, at {}:{}", last.sequence, last.chain);
            let why = match first.kind {
                LedgerKind::Lost => "was lost to damage",
                _ => "was folded, as those of a ledger are after some thousand",
            };
            // Whoever knows what was noted can make a fold that names it, and leaves out what he likes.
            Err(format!(
                "{vdi}: record {record} of its ledger is not there any more: it {why}. {proves_nothing}. {end}"
            ))
        }
        (_, last) => Err(format!(
            "{vdi}: its ledger was noted up to record {record}, and ends at {}: records were taken away, the \
             store is an older copy, or they were lost to damage. {proves_nothing}",
            last.map_or(0, |last| last.sequence)
        )),
    }
}

/// Which holds have ended since a head was noted: somebody may have ended one to remove what it held.
fn ended_since(
    noted: &NotedHead,
    held: &BTreeMap<SnapshotNumber, LedgerRecord>,
    since: &[LedgerRecord],
) -> Option<String> {
    let NotedHead { vdi, record, .. } = noted;
    let ends = since.iter().filter(|it| {
        matches!(it.kind, LedgerKind::Released | LedgerKind::Ended) && held.contains_key(&it.number)
    });
    let ended: BTreeSet<String> = ends.map(|it| format!("{vdi}@{}", it.number)).collect();
    let names: Vec<String> = ended.into_iter().collect();
    let message = format!(
        "{vdi}: held at record {record} of its ledger, and released since: {}",
        names.join(", ")
    );
    (!names.is_empty()).then_some(message)
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
