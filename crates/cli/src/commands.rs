//! One module per family of commands; [`run`] is the table.

mod attachments;
mod background;
mod check;
mod diff;
mod docs;
mod dump;
mod format;
mod gc;
mod log;
mod mount;
mod progress;
mod qemu_img;
mod quickstart;
mod receive;
mod scrub;
mod send;
mod series;
mod serve;
mod snapshots;
mod stats;
mod stores;
mod transfer;
mod tree;
mod upgrade;
mod vdis;
mod writes;

use api::{Client, Error, Snapshot};

use crate::args::{Cli, Command, Setting};
use crate::{output, socket};

/// What a command that talks to the daemon needs.
struct Context {
    client: Client,
    json: bool,
}

/// Carries out a command line.
///
/// # Errors
/// What `exit` turns into a message and an exit code.
pub(crate) fn run(cli: Cli) -> Result<(), Error> {
    let Cli { global, command } = cli;
    match command {
        Command::Quickstart { dir, buffered } => return quickstart::run(&dir, buffered, global),
        Command::Format(format) => return format::run(&format, global.json),
        Command::Check(check) if !check.online => return check::run(&check, global.json),
        Command::Dump(dump) => return dump::run(&dump, global.json),
        Command::Serve(serve) => return serve::run(serve, global),
        Command::Completion { shell } => return docs::completion(shell),
        Command::Man { dir } => return docs::man(&dir, global.json),
        _ => {}
    }
    if let Command::Unmount { dir } = &command {
        return mount::unmount(dir, global.json);
    }
    let control = socket::choose(global.socket)?;
    if let Command::Mount(arguments) = &command {
        return mount::run(arguments, &control, global.json);
    }
    let client = Client::new(control);
    let context = Context { client, json: global.json };
    block_on(ask(context, command))?
}

/// Carries out a command that talks to the daemon.
async fn ask(context: Context, command: Command) -> Result<(), Error> {
    match command {
        Command::Create { name, size, history } => {
            vdis::create(&context, name.name, size, history).await
        }
        Command::Set { name, setting, store } => match (name, setting, store) {
            (Some(name), Some(Setting::History(history)), _) => {
                vdis::set(&context, &name, history).await
            }
            (_, _, Some(Setting::History(history))) => stores::set(&context, history).await,
            // The command line has one or the other.
            _ => Ok(()),
        },
        Command::Log { name, writes: Some(up_to), rows, .. } => {
            writes::run(&context, &name.name, up_to.as_deref(), rows).await
        }
        Command::Log { name, every, rows, .. } => {
            log::run(&context, &name.name, every.as_deref(), rows).await
        }
        Command::Clone { source, new } => {
            let (source, snapshot) = context.looked_up(source).await?;
            vdis::clone(&context, source, snapshot, new).await
        }
        Command::Ls { space } => vdis::ls(&context, space).await,
        Command::Info { target: None, .. } => stores::info(&context).await,
        Command::Info { target: Some(target), .. } => {
            let (name, snapshot) = context.pinned_target(target).await?;
            vdis::info(&context, &name, snapshot.as_deref()).await
        }
        Command::Hold { target: (name, snapshot), until } => {
            snapshots::hold(&context, &name, &snapshot, until).await
        }
        Command::Release { target: (name, snapshot) } => {
            snapshots::release(&context, &name, &snapshot).await
        }
        Command::Rename { name, new } => vdis::rename(&context, &name.name, new).await,
        Command::Resize { name, size, shrink } => {
            vdis::resize(&context, &name.name, size, shrink).await
        }
        Command::Rm { target: t } => vdis::rm(&context, &t.target.0, t.target.1.as_deref()).await,
        Command::Snapshot { name, every: Some(every), length: Some(length), .. } => {
            series::take(&context, &name, every, length).await
        }
        Command::Snapshot { name, label, hold, until, .. } => {
            let hold = hold.then_some(api::Hold { until });
            snapshots::take(&context, &name, label, hold).await
        }
        Command::Snapshots { name, all } => snapshots::list(&context, &name.name, all).await,
        Command::Rollback { target: (name, snapshot) } => {
            snapshots::rollback(&context, &name, &snapshot).await
        }
        Command::Tree { all } => tree::run(&context, all).await,
        Command::Diff { from, to } => {
            let (from, to) = (context.pinned(from).await?, context.pinned(to).await?);
            diff::run(&context, &from, &to).await
        }
        Command::Stats { watch, interval } => stats::run(&context, watch.then_some(interval)).await,
        Command::Gc { status: true } => gc::status(&context).await,
        Command::Gc { status: false } => gc::run(&context).await,
        Command::Scrub { status: true, .. } => scrub::status(&context).await,
        Command::Scrub { stop: true, .. } => scrub::stop(&context).await,
        Command::Scrub { rate, .. } => scrub::run(&context, rate).await,
        Command::Check(check) => check::online(&context, &check).await,
        Command::Import { file, name, format } => {
            transfer::import(&context, &file, &name.name, format).await
        }
        Command::Export { target: t, file, format, force } => {
            let (name, snapshot) = context.pinned_target(t.target).await?;
            let target = transfer::Source { name, snapshot };
            transfer::export(&context, target, &file, format, force).await
        }
        Command::Send(arguments) => send::run(&context, arguments).await,
        Command::Receive(arguments) => receive::run(&context, &arguments).await,
        // Without a socket it is a block device.
        Command::Attach { target: t, vhost_user, .. } => {
            let target = context.pinned_target(t.target).await?;
            attachments::attach(&context, target, vhost_user.as_deref()).await
        }
        Command::Detach { path } => attachments::detach(&context, &path).await,
        Command::Attachments => attachments::list(&context).await,
        Command::Mounts => mount::list(&context).await,
        Command::Upgrade { binary } => upgrade::run(&context, binary.as_deref()).await,
        Command::Quickstart { .. }
        | Command::Format(_)
        | Command::Dump(_)
        | Command::Serve(_)
        | Command::Mount(_)
        | Command::Unmount { .. }
        | Command::Completion { .. }
        | Command::Man { .. } => Ok(()),
    }
}

/// Runs a future to its end on this thread.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::system("start", &e))?;
    Ok(runtime.block_on(future))
}

/// What the name of a write begins with, in the place of a snapshot's.
const WRITE_PREFIX: &str = "lsn:";

impl Context {
    /// The same disk or snapshot, by its number where it was by a time: whoever asks twice would get
    /// another one.
    async fn pinned(&self, handle: String) -> Result<String, Error> {
        let Some((name, snapshot)) = handle.split_once('@') else { return Ok(handle) };
        let snapshot = self.pinned_snapshot(name, snapshot.to_owned()).await?;
        Ok(format!("{name}@{snapshot}"))
    }

    /// As [`Self::pinned`], and what the snapshot is, if it is one.
    async fn looked_up(&self, handle: String) -> Result<(String, Option<Snapshot>), Error> {
        let Some((name, snapshot)) = handle.split_once('@') else { return Ok((handle, None)) };
        if snapshot.starts_with(WRITE_PREFIX) {
            return Ok((handle, None));
        }
        let found = self.client.snapshot_status(name, snapshot).await?;
        Ok((format!("{name}@{}", found.number), Some(found)))
    }

    async fn pinned_target(
        &self,
        (name, snapshot): (String, Option<String>),
    ) -> Result<(String, Option<String>), Error> {
        let Some(snapshot) = snapshot else { return Ok((name, None)) };
        let snapshot = self.pinned_snapshot(&name, snapshot).await?;
        Ok((name, Some(snapshot)))
    }

    async fn pinned_snapshot(&self, name: &str, snapshot: String) -> Result<String, Error> {
        let is_time = snapshot.contains(':') || snapshot.ends_with("ago");
        if !is_time || snapshot.starts_with(WRITE_PREFIX) {
            return Ok(snapshot);
        }
        let found = self.client.snapshot_status(name, &snapshot).await?;
        match found.label {
            Some(label) if label == snapshot => Ok(label),
            _ => Ok(found.number.to_string()),
        }
    }

    /// Prints `text`, or `value` with --json.
    fn print(&self, value: &impl serde::Serialize, text: &str) -> Result<(), Error> {
        if self.json { output::print_json(value) } else { output::print(text) }
    }
}
