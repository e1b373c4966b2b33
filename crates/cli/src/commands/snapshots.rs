//! Commands on snapshots: snapshot, snapshots, rollback.

use api::{Error, Snapshot};

use super::Context;
use crate::output::{self, Column, bytes, time};

pub(super) async fn take(context: &Context, name: &str, label: Option<&str>) -> Result<(), Error> {
    let snapshot = context.client.snapshot(name, label).await?;
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
    ];
    let row = |snapshot: Snapshot| {
        let (number, size) = (snapshot.number.to_string(), bytes(snapshot.size_bytes));
        vec![snapshot.handle, number, time(snapshot.created), size]
    };
    output::print(&output::table(&columns, snapshots.into_iter().map(row).collect()))
}

pub(super) async fn rollback(context: &Context, name: &str, snapshot: &str) -> Result<(), Error> {
    let vdi = context.client.rollback(name, snapshot).await?;
    context.print(&vdi, &format!("{name} is as it was at {name}@{snapshot}"))
}
