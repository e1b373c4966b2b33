//! `parallax receive`: a stream from stdin into a disk.
//!
//! - What comes goes to a disk of its own, `NAME.partial`: an empty one, or a clone of the snapshot that
//!   the stream builds on. When the stream has come to its end, and every byte of it was what was sent,
//!   the daemon makes of it what it was received for, at once; until then NAME is what it was.
//! - The last block of a partial disk, behind those of the snapshot, says how far it has come
//!   (`stream::Progress`): a stream that was cut short goes on there. It is gone when the disk is whole.
//! - What is there already is not received again: after a crash of the daemon, a receive that is
//!   repeated goes on, or finds that it had come to its end.
//! - A stream that is not what was sent is refused whole: a partial disk that it began is removed.

mod pump;

use std::io::IsTerminal;
use std::path::Path;

use api::{ChangeVdi, CompleteReceive, CreateVdi, Error, Kind, Snapshot};
use serde_json::json;
use stream::{Header, PROGRESS_BYTES, Progress, Reader};

use super::background::{self, Interrupts};
use super::send::{Totals, Transfer};
use super::transfer::nbd_socket;
use super::{Context, progress};
use crate::args::ReceiveArgs;
use crate::nbd::NbdDisk;
use crate::output::{self, bytes};
use pump::{Ended, Pump};

/// A disk that a stream goes to.
struct Partial {
    name: String,
    progress: Progress,
    /// Whether it was there before.
    resumed: bool,
}

pub(super) async fn run(context: &Context, arguments: &ReceiveArgs) -> Result<(), Error> {
    let name = &arguments.name;
    let socket = nbd_socket(context).await?;
    if arguments.resume_token {
        return print_token(context, Path::new(&socket), name).await;
    }
    if std::io::stdin().is_terminal() {
        let message = "nothing is sent here: pipe a stream of `parallax send` into this, or < FILE";
        return Err(Error::new(Kind::Invalid, message));
    }
    let mut interrupts = Interrupts::catch()?;
    let open = || pump::input().and_then(|input| Reader::open(input).map_err(stream_error));
    let reader = background::run("parallax-receive", &mut interrupts, open).await;
    let reader = reader.and_then(|opened| opened).map_err(|error| about(name, &error))?;
    let header = reader.header().clone();
    let snapshots = snapshots_of(context, name).await?;
    if let Some(there) =
        snapshots.iter().flatten().find(|it| it.uuid == header.snapshot.to_string())
    {
        // As after a crash whose receive had come to its end. Who sends is not to meet a closed pipe.
        let rest =
            background::run("parallax-receive", &mut interrupts, || pump::skip(reader)).await;
        rest.and_then(|skipped| skipped).map_err(|error| about(name, &error))?;
        return say_there(context, &header, there);
    }
    let partial = prepare(context, Path::new(&socket), &header, arguments, snapshots).await?;
    let bar = match reader_shows_bar() {
        true => progress::bar(&format!("receive {name}"), header.size_bytes),
        false => indicatif::ProgressBar::hidden(),
    };
    let pump = Pump {
        socket: socket.into(),
        export: partial.name.clone(),
        progress: partial.progress,
        bar: bar.clone(),
    };
    let received =
        background::run("parallax-receive", &mut interrupts, move || pump.run(reader)).await;
    bar.finish_and_clear();
    let (error, worth_keeping, totals) = match received {
        Ok(Ended { error, cut, done, totals }) => {
            // What else is wrong with an altered stream, nobody knows.
            let is_sound = cut || error.as_ref().is_none_or(|error| error.kind != Kind::Stream);
            (error, is_sound && done > 0, totals)
        }
        // After a signal: how far it is now, only the disk knows.
        Err(error) => (Some(error), true, Totals::default()),
    };
    if let Some(error) = error {
        let keep = partial.resumed || worth_keeping;
        return Err(give_up(context, name, &partial.name, keep, error).await);
    }
    let request = CompleteReceive {
        name: name.clone(),
        size_bytes: header.size_bytes,
        label: (!header.label.is_empty()).then(|| header.label.clone()),
        uuid: header.snapshot.to_string(),
        base: header.base.map(|base| base.to_string()),
        force: arguments.force,
    };
    let snapshot = context.client.complete(&partial.name, &request).await.map_err(|error| {
        let partial = &partial.name;
        let message = match error.kind {
            Kind::Unreachable | Kind::Io | Kind::Fenced | Kind::NoSpace => format!(
                "all came, and it is not certain whether it has become {name}: {error}; receive it \
                 again: what is there already does not come twice"
            ),
            _ => format!("all came, and is in {partial}, but cannot become {name}: {error}"),
        };
        Error::new(error.kind, message)
    })?;
    let text = format!("received {} ({} of data)", snapshot.handle, bytes(totals.data_bytes));
    let transfer = Transfer {
        snapshot: snapshot.handle,
        uuid: snapshot.uuid,
        base: request.base,
        size_bytes: snapshot.size_bytes,
        start: header.start,
        totals,
    };
    context.print(&transfer, &text)
}

/// The snapshots of a disk that were asked for; `None`: there is no such disk.
async fn snapshots_of(context: &Context, name: &str) -> Result<Option<Vec<Snapshot>>, Error> {
    match context.client.asked_snapshots(name).await {
        Err(error) if error.kind == Kind::NotFound => Ok(None),
        snapshots => snapshots.map(Some),
    }
}

/// Says that there is nothing to receive.
fn say_there(context: &Context, header: &Header, there: &Snapshot) -> Result<(), Error> {
    let transfer = Transfer {
        snapshot: there.handle.clone(),
        uuid: there.uuid.clone(),
        base: header.base.map(|base| base.to_string()),
        size_bytes: there.size_bytes,
        start: header.start,
        totals: Totals::default(),
    };
    context.print(&transfer, &format!("{} is there already: nothing has changed", there.handle))
}

/// Whether the bar is drawn here: at the other end of a pipe `send` draws one already.
fn reader_shows_bar() -> bool {
    let stdin = std::io::stdin();
    rustix::fs::fstat(&stdin).is_ok_and(|found| {
        rustix::fs::FileType::from_raw_mode(found.st_mode) == rustix::fs::FileType::RegularFile
    })
}

/// What is kept of a receive that came to nothing, and what to do about it.
async fn give_up(context: &Context, name: &str, export: &str, keep: bool, error: Error) -> Error {
    let hint = if keep {
        format!(
            "; {export} keeps what came: `parallax receive {name} --resume-token` tells how to go \
             on, `parallax rm {export}` gives it up"
        )
    } else {
        match context.client.remove(export).await {
            Ok(_) => "; nothing has changed".to_owned(),
            Err(undo) => format!("; {export} is left, and could not be removed ({undo})"),
        }
    };
    let Error { kind, message } = about(name, &error);
    Error::new(kind, format!("{message}{hint}"))
}

fn about(name: &str, error: &Error) -> Error {
    Error::new(error.kind, format!("cannot receive {name}: {error}"))
}

/// What is wrong with a stream, as an error like any other.
fn stream_error(error: stream::Error) -> Error {
    match error {
        stream::Error::Io(error) => Error::system("read the stream", &error),
        error => Error::new(Kind::Stream, error.to_string()),
    }
}

/// Finds or makes the disk that a stream goes to, if it can go where it is meant for.
async fn prepare(
    context: &Context,
    socket: &Path,
    header: &Header,
    arguments: &ReceiveArgs,
    snapshots: Option<Vec<Snapshot>>,
) -> Result<Partial, Error> {
    let name = &arguments.name;
    let base = check_target(context, header, arguments, snapshots).await?;
    let export = partial_name(name);
    match context.client.vdi(&export).await {
        Ok(_) => resume(socket, header, name, &export),
        Err(error) if error.kind == Kind::NotFound && header.start > 0 => {
            let message = format!("the stream goes on with another one, and there is no {export}");
            Err(Error::new(Kind::NotFound, message))
        }
        Err(error) if error.kind == Kind::NotFound => {
            let base = base.map(|base| (base.size_bytes, format!("{name}@{}", base.number)));
            begin(context, socket, header, &export, base).await
        }
        Err(error) => Err(error),
    }
}

/// Refuses a stream that cannot become what it is meant for; else the snapshot that it builds on.
async fn check_target(
    context: &Context,
    header: &Header,
    arguments: &ReceiveArgs,
    snapshots: Option<Vec<Snapshot>>,
) -> Result<Option<Snapshot>, Error> {
    let name = &arguments.name;
    let refuse = |kind, message| Err(Error::new(kind, message));
    let snapshots = match snapshots {
        Some(snapshots) => snapshots,
        None if header.base.is_none() => return Ok(None),
        None => {
            let message = format!(
                "the stream builds on a snapshot, and there is no disk {name}; send all of it first"
            );
            return refuse(Kind::NotFound, message);
        }
    };
    let Some(base) = header.base.map(|base| base.to_string()) else {
        let message = format!(
            "{name} exists already, and the stream is of a whole disk: choose another name, or send \
             what differs: --from"
        );
        return refuse(Kind::Exists, message);
    };
    let Some(newest) = snapshots.last().filter(|newest| newest.uuid == base) else {
        let message = match snapshots.iter().find(|snapshot| snapshot.uuid == base) {
            Some(base) => {
                format!("the stream builds on {}, and {name} has a later one", base.handle)
            }
            None => format!("the stream builds on a snapshot that {name} does not have ({base})"),
        };
        return refuse(Kind::Invalid, message);
    };
    if snapshots.iter().any(|it| it.label.as_deref() == Some(&*header.label)) {
        return refuse(Kind::Exists, format!("{name}@{} exists already", header.label));
    }
    let attachments = context.client.attachments().await?;
    if let Some(attached) = attachments.iter().find(|it| it.disk == *name) {
        let path = attached.path();
        return refuse(Kind::Busy, format!("{name} is attached at {path}: detach it first"));
    }
    if !arguments.force {
        let since = format!("{name}@{}", newest.number);
        let page = context.client.diff_page(Some(&since), name, None).await?;
        if !page.diff.extents.is_empty() || page.diff.from_size_bytes != page.diff.to_size_bytes {
            let message = format!(
                "{name} was written since {}, which the stream builds on; to lose that, add --force",
                newest.handle
            );
            return refuse(Kind::Invalid, message);
        }
    }
    Ok(Some(newest.clone()))
}

fn partial_name(name: &str) -> String {
    format!("{name}.partial")
}

/// Goes on with a partial disk that is of the same stream.
fn resume(socket: &Path, header: &Header, name: &str, export: &str) -> Result<Partial, Error> {
    let Some(progress) = read_progress(socket, export)? else {
        let message = format!("{export} is in the way: it is no disk that `receive` left");
        return Err(Error::new(Kind::Exists, message));
    };
    if !progress.continues_with(header) {
        let message = format!(
            "{export} is what came of another stream: go on with that one (`parallax receive {name} \
             --resume-token`), or give it up (parallax rm {export})"
        );
        return Err(Error::new(Kind::Exists, message));
    }
    Ok(Partial { name: export.to_owned(), progress, resumed: true })
}

/// Makes a disk for a stream: as the snapshot that it builds on, of so many bytes, and with room for
/// how far it is.
async fn begin(
    context: &Context,
    socket: &Path,
    header: &Header,
    export: &str,
    base: Option<(u64, String)>,
) -> Result<Partial, Error> {
    let size_bytes = header.size_bytes.saturating_add(PROGRESS_BYTES as u64);
    let (base_bytes, source) = base.unzip();
    let empty = source.is_none().then_some(size_bytes);
    // Whatever the store keeps: nobody wants to see it half received.
    let history = Some("off".to_owned());
    let request = CreateVdi { name: export.to_owned(), size_bytes: empty, source, history };
    context.client.create(&request).await?;
    let partial =
        Partial { name: export.to_owned(), progress: Progress::beginning(header), resumed: false };
    let made = make_room(context, socket, &partial, base_bytes, size_bytes).await;
    if let Err(error) = made {
        return Err(match context.client.remove(export).await {
            Ok(_) => error,
            Err(_) => Error::new(error.kind, format!("{error}; {export} is left")),
        });
    }
    Ok(partial)
}

async fn make_room(
    context: &Context,
    socket: &Path,
    partial: &Partial,
    base_bytes: Option<u64>,
    size_bytes: u64,
) -> Result<(), Error> {
    if let Some(base_bytes) = base_bytes {
        // Cut off what the snapshot does not have, or it would be where the progress is noted.
        let snapshot_bytes = partial.progress.size_bytes;
        if snapshot_bytes < base_bytes {
            resize(context, &partial.name, snapshot_bytes).await?;
        }
        resize(context, &partial.name, size_bytes).await?;
    }
    let mut disk = NbdDisk::open(socket, &partial.name)?;
    pump::note(&mut disk, &partial.progress)
}

async fn resize(context: &Context, name: &str, size_bytes: u64) -> Result<(), Error> {
    let request = ChangeVdi { size_bytes: Some(size_bytes), shrink: true, ..ChangeVdi::default() };
    context.client.change(name, &request).await.map(drop)
}

/// How far a partial disk has come; `None` if it is none.
fn read_progress(socket: &Path, export: &str) -> Result<Option<Progress>, Error> {
    let mut disk = NbdDisk::open(socket, export)?;
    let mut block = vec![0; PROGRESS_BYTES];
    let Some(at) = disk.size_bytes().checked_sub(PROGRESS_BYTES as u64) else { return Ok(None) };
    disk.read(at, &mut block)?;
    Ok(Progress::from_block(&block).filter(|progress| progress.size_bytes == at))
}

async fn print_token(context: &Context, socket: &Path, name: &str) -> Result<(), Error> {
    let export = partial_name(name);
    let nothing = || Error::new(Kind::NotFound, format!("no stream into {name} was cut short"));
    match context.client.vdi(&export).await {
        Err(error) if error.kind == Kind::NotFound => return Err(nothing()),
        found => found?,
    };
    let progress = read_progress(socket, &export)?.ok_or_else(nothing)?;
    let token = progress.to_token();
    if context.json {
        return output::print_json(&json!({
            "token": token,
            "uuid": progress.snapshot.to_string(),
            "base": progress.base.map(|base| base.to_string()),
            "size_bytes": progress.size_bytes,
            "done": progress.done,
        }));
    }
    output::print(&token)
}
