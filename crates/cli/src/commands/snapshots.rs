//! Commands on snapshots: snapshot, snapshots, hold, release, rollback.

use api::{Error, Held, Hold, Ledger, Snapshot, TakeSnapshot};
use serde::Serialize;

use super::vdis::{Taken, ledger_end, with_time};
use super::{Context, WRITE_PREFIX};
use crate::output::{self, Column, bytes, time};

pub(super) async fn take(
    context: &Context,
    name: &str,
    label: Option<String>,
    hold: Option<Hold>,
) -> Result<(), Error> {
    let request = TakeSnapshot { label, hold };
    let snapshot = context.client.take_snapshot(name, &request).await?;
    // Nothing but the handle: scripts take it as it is.
    context.print(&snapshot, &snapshot.handle)
}

pub(super) async fn list(context: &Context, name: &str, all: bool) -> Result<(), Error> {
    let snapshots = match all {
        true => context.client.snapshots(name).await?,
        false => context.client.asked_snapshots(name).await?,
    };
    if context.json {
        return output::print_json(&snapshots);
    }
    if snapshots.is_empty() {
        let hint = match context.client.vdi(name).await?.moment_count {
            0 => format!("{name} has no snapshots; take one with: parallax snapshot {name}"),
            count => {
                let moments = output::count(count, "moment");
                format!(
                    "{name} has no snapshots, but {moments} in its history: parallax log {name}"
                )
            }
        };
        return output::print(&hint);
    }
    let columns = [
        Column::Left("SNAPSHOT"),
        Column::Right("NUMBER"),
        Column::Left("TAKEN"),
        Column::Right("SIZE"),
        Column::Left("HELD"),
    ];
    let row = |snapshot: Snapshot| {
        let (number, size) = (snapshot.number.to_string(), bytes(snapshot.size_bytes));
        let held = held(&snapshot);
        vec![snapshot.handle, number, time(snapshot.created), size, held]
    };
    output::print(&output::table(&columns, snapshots.into_iter().map(row).collect()))
}

/// Whether a snapshot is held, and until when.
pub(super) fn held(snapshot: &Snapshot) -> String {
    match &snapshot.hold {
        None => "no".to_owned(),
        Some(Held { until: None }) => "yes".to_owned(),
        Some(Held { until: Some(until) }) => format!("until {}", time(*until)),
    }
}

/// What `hold --json` and `release --json` print: the snapshot, and where the disk's ledger ends.
#[derive(Serialize)]
struct Noted {
    #[serde(flatten)]
    snapshot: Option<Snapshot>,
    ledger: Option<Ledger>,
}

pub(super) async fn hold(
    context: &Context,
    name: &str,
    snapshot: &str,
    until: Option<String>,
) -> Result<(), Error> {
    let snapshot = context.client.hold(name, snapshot, &Hold { until }).await?;
    let until = match snapshot.hold.as_ref().and_then(|held| held.until) {
        Some(until) => format!(" until {}", time(until)),
        None => String::new(),
    };
    let text = format!("{} is held{until}", snapshot.handle);
    noted(context, name, Some(snapshot), text).await
}

pub(super) async fn release(context: &Context, name: &str, snapshot: &str) -> Result<(), Error> {
    let released = context.client.release(name, snapshot).await?;
    let text = match &released {
        Some(snapshot) => format!("{} is not held any more", snapshot.handle),
        None => format!("{name}@{snapshot} is not held any more, and not there"),
    };
    noted(context, name, released, text).await
}

async fn noted(
    context: &Context,
    name: &str,
    snapshot: Option<Snapshot>,
    text: String,
) -> Result<(), Error> {
    let ledger = context.client.vdi(name).await?.ledger;
    let text = match &ledger {
        Some(ledger) => format!("{text}; its ledger: {}", ledger_end(ledger)),
        None => text,
    };
    context.print(&Noted { snapshot, ledger }, &text)
}

pub(super) async fn rollback(context: &Context, name: &str, wanted: &str) -> Result<(), Error> {
    if wanted.starts_with(WRITE_PREFIX) {
        let vdi = context.client.rollback(name, wanted).await?;
        let write = format!("{name}@{wanted}");
        let text = format!("{name} is as it was at {write}");
        return context.print(&Taken { vdi, snapshot: None, write: Some(write) }, &text);
    }
    let snapshot = context.client.snapshot_status(name, wanted).await?;
    // By its number: a time would be another one by now.
    let vdi = context.client.rollback(name, &snapshot.number.to_string()).await?;
    let text = format!("{name} is as it was at {}", with_time(&snapshot));
    context.print(&Taken { vdi, snapshot: Some(snapshot), write: None }, &text)
}
