//! `parallax upgrade`.

use std::path::Path;
use std::time::Duration;

use api::{DaemonStatus, Error, Kind, Upgrade};
use serde::Serialize;

use super::Context;
use crate::output;

/// How often the next daemon is asked whether it serves, and for how long.
const LOOK_PERIOD: Duration = Duration::from_millis(20);
const WAIT_MAX: Duration = Duration::from_secs(60);

/// What `--json` prints.
#[derive(Serialize)]
struct Upgraded {
    from: String,
    to: String,
    binary: String,
    pid: u32,
}

pub(super) async fn run(context: &Context, binary: Option<&Path>) -> Result<(), Error> {
    let before = context.client.daemon().await?;
    let binary = binary.map(super::attachments::absolute).transpose()?;
    let upgrading = context.client.upgrade(&Upgrade { binary }).await?;
    let late = |_| {
        let message =
            "the next daemon does not answer; its log, or the service manager's, says why";
        Error::new(Kind::Unreachable, message)
    };
    let now = tokio::time::timeout(WAIT_MAX, next(context, &before)).await.map_err(late)?;
    if let Some(refusal) = now.upgrade_refused {
        return Err(Error::new(Kind::Io, format!("it serves on as before: {refusal}")));
    }
    let upgraded =
        Upgraded { from: upgrading.from, to: now.version, binary: upgrading.binary, pid: now.pid };
    let Upgraded { from, to, binary, pid } = &upgraded;
    match context.json {
        true => output::print_json(&upgraded),
        false => output::print(&format!("upgraded from {from} to {to}: {binary}, process {pid}")),
    }
}

/// The daemon that came after this one, once it serves.
async fn next(context: &Context, before: &DaemonStatus) -> DaemonStatus {
    loop {
        tokio::time::sleep(LOOK_PERIOD).await;
        match context.client.daemon().await {
            Ok(now) if now.started != before.started => return now,
            // It is still there, or is just becoming the next one.
            _ => {}
        }
    }
}
