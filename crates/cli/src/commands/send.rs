//! `parallax send`: what a snapshot holds, or what differs from an earlier one, as a stream on stdout.
//!
//! The daemon says which runs of bytes differ, page by page; `send/pump.rs` reads them over NBD,
//! several at once, and writes the stream in order. What is sent is a snapshot, so that nothing changes
//! meanwhile and a stream that was cut short can be resumed.

mod pump;

use std::io::IsTerminal;

use api::{Error, Kind, Snapshot};
use base::SnapshotUuid;
use serde::Serialize;
use tokio::sync::mpsc;

use super::background::{self, Interrupts};
use super::transfer::nbd_socket;
use super::{Context, progress};
use crate::args::SendArgs;
use crate::output::{self, bytes};
use pump::{Page, Pump};

/// Pages of runs that wait for those that read them.
const PAGES_AHEAD: usize = 2;

/// What was sent or received.
#[derive(Debug, Serialize)]
pub(super) struct Transfer {
    pub(super) snapshot: String,
    pub(super) uuid: String,
    pub(super) base: Option<String>,
    pub(super) size_bytes: u64,
    pub(super) start: u64,
    #[serde(flatten)]
    pub(super) totals: Totals,
}

/// How much there was of everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Totals {
    /// Data, before compression.
    pub(super) data_bytes: u64,
    /// What is zeroed.
    pub(super) zero_bytes: u64,
    /// Length of the stream.
    pub(super) stream_bytes: u64,
}

pub(super) async fn run(context: &Context, arguments: SendArgs) -> Result<(), Error> {
    if std::io::stdout().is_terminal() {
        return Err(Error::new(
            Kind::Invalid,
            "a stream is nothing for a terminal: write it to a file, or to `parallax receive` \
             (| ssh HOST parallax receive NAME)",
        ));
    }
    let (name, snapshot) = &arguments.target;
    let base = match &arguments.from {
        Some((other, snapshot)) => {
            let name = other.as_deref().unwrap_or(name);
            Some((name, context.client.snapshot_status(name, snapshot).await?))
        }
        None => None,
    };
    let snapshot = match snapshot {
        Some(snapshot) => context.client.snapshot_status(name, snapshot).await?,
        None if arguments.resume.is_some() => {
            let message = format!("which snapshot was cut short? write {name}@SNAPSHOT");
            return Err(Error::new(Kind::Invalid, message));
        }
        None => context.client.snapshot(name, None).await?,
    };
    let header = header(name, &snapshot, base.as_ref().map(|(_, base)| base), &arguments)?;
    let transfer = Transfer {
        snapshot: snapshot.handle.clone(),
        uuid: snapshot.uuid.clone(),
        base: base.as_ref().map(|(_, base)| base.uuid.clone()),
        size_bytes: snapshot.size_bytes,
        start: header.start,
        totals: Totals::default(),
    };
    // By number: a label may go to another snapshot meanwhile.
    let of = |name: &str, snapshot: &Snapshot| format!("{name}@{}", snapshot.number);
    let from = base.as_ref().map(|(name, base)| of(name, base));
    let pump = Pump {
        socket: nbd_socket(context).await?.into(),
        export: of(name, &snapshot),
        header,
        level: (!arguments.no_compress).then_some(arguments.level),
        bar: progress::bar(&format!("send {}", snapshot.handle), snapshot.size_bytes),
    };
    let totals = send(context, pump, from.as_deref()).await.map_err(|error| {
        Error::new(error.kind, format!("cannot send {}: {error}", snapshot.handle))
    })?;
    report(context, &Transfer { totals, ..transfer })
}

fn header(
    name: &str,
    snapshot: &Snapshot,
    base: Option<&Snapshot>,
    arguments: &SendArgs,
) -> Result<stream::Header, Error> {
    let uuid = parse(&snapshot.uuid)?;
    let base_uuid = base.map(|base| parse(&base.uuid)).transpose()?;
    if base_uuid == Some(uuid) {
        let message = format!("{} is what it would build on: nothing differs", snapshot.handle);
        return Err(Error::new(Kind::Invalid, message));
    }
    let start = match arguments.resume {
        None => 0,
        Some(progress) if (progress.snapshot, progress.base) == (uuid, base_uuid) => progress.done,
        Some(_) => {
            let message = "the token is of another stream: name the snapshot, and --from, as they \
                           were when it was cut short";
            return Err(Error::new(Kind::Invalid, message));
        }
    };
    Ok(stream::Header {
        snapshot: uuid,
        base: base_uuid,
        size_bytes: snapshot.size_bytes,
        start,
        created_ns: u64::try_from(snapshot.created.as_nanosecond()).unwrap_or_default(),
        name: name.to_owned(),
        label: snapshot.label.clone().unwrap_or_default(),
    })
}

fn parse(uuid: &str) -> Result<SnapshotUuid, Error> {
    let strange = || Error::new(Kind::Io, format!("the daemon knows a snapshot by '{uuid}'"));
    SnapshotUuid::parse(uuid).ok_or_else(strange)
}

/// Asks what differs, and hands it to the thread that sends it.
async fn send(context: &Context, pump: Pump, from: Option<&str>) -> Result<Totals, Error> {
    let mut interrupts = Interrupts::catch()?;
    let (to_pump, pages) = mpsc::channel(PAGES_AHEAD);
    let (to, start, bar) = (pump.export.clone(), pump.header.start, pump.bar.clone());
    let damaged_before = context.client.stats().await?.checksum_failures;
    let ask = async move {
        let mut after = Some(start);
        while let Some(start) = after {
            let page = context.client.diff_page(from, &to, Some(start)).await?;
            after = page.next;
            let page = Page { extents: page.diff.extents, is_last: after.is_none() };
            if to_pump.send(page).await.is_err() {
                // It has failed, and says why itself.
                break;
            }
        }
        Ok::<_, Error>(())
    };
    let sending = background::run("parallax-send", &mut interrupts, move || pump.run(pages));
    tokio::pin!(sending);
    let (asked, sent) = tokio::select! {
        asked = ask => (asked, sending.await),
        // It has failed, or a signal came.
        sent = &mut sending => (Ok(()), sent),
    };
    bar.finish_and_clear();
    let mut sent = sent.and_then(|sent| sent);
    if let Err(error) = &mut sent
        && error.kind == Kind::Io
        && context.client.stats().await.is_ok_and(|now| now.checksum_failures > damaged_before)
    {
        // To NBD it is an I/O error like any other.
        error.kind = Kind::Damaged;
        error.message.push_str("; the disk is damaged there, and the daemon's log names the block");
    }
    asked.and(sent)
}

/// Says on stderr what was sent: the stream is on stdout.
fn report(context: &Context, transfer: &Transfer) -> Result<(), Error> {
    if context.json {
        let text = serde_json::to_string(transfer)
            .map_err(|e| Error::new(Kind::Io, format!("cannot print JSON: {e}")))?;
        output::complain(&text);
        return Ok(());
    }
    let Totals { data_bytes, stream_bytes, .. } = transfer.totals;
    let (data, stream) = (bytes(data_bytes), bytes(stream_bytes));
    output::complain(&format!("sent {} ({data} of data in {stream})", transfer.snapshot));
    Ok(())
}
