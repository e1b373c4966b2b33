//! Commands on the store: set --store, info --store.

use api::{ChangeStore, Error, StoreSettings};
use serde::Serialize;

use super::Context;
use super::vdis::columns;

pub(super) async fn set(context: &Context, history: String) -> Result<(), Error> {
    let settings = context.client.change_store(&ChangeStore { history }).await?;
    let text = format!("history of all disks without one of their own: {}", settings.history);
    context.print(&settings, &text)
}

/// What `info --store --json` prints.
#[derive(Serialize)]
struct Description {
    /// The store.
    store: String,
    /// What it lies on.
    device: String,
    #[serde(flatten)]
    settings: StoreSettings,
}

pub(super) async fn info(context: &Context) -> Result<(), Error> {
    let settings = context.client.store().await?;
    let daemon = context.client.daemon().await?;
    let lines = [
        ("store", daemon.store.clone()),
        ("device", daemon.device.clone()),
        ("history", settings.history.clone()),
    ];
    let text = columns(&lines);
    context.print(&Description { store: daemon.store, device: daemon.device, settings }, &text)
}
