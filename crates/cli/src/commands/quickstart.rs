//! `parallax quickstart`: from nothing to a disk that is served, in one command.

use std::path::{Path, PathBuf};
use std::time::Duration;

use api::{Error, OpenReport, percent_encode};
use daemon::offline::{self, Format};
use daemon::{Config, Daemon, Scrub, own_nbd_socket};
use serde_json::json;

use crate::args::{Global, LogLevel};
use crate::output;

/// Length of the store's file, which is sparse: it takes what is written.
const STORE_BYTES: u64 = 64 << 30;

/// The disk to play with.
const DEMO: &str = "demo";
const DEMO_BYTES: u64 = 10 << 30;

/// Memory for tree nodes.
const CACHE_BYTES: u64 = 256 << 20;

pub(super) fn run(dir: &Path, buffered: bool, global: Global) -> Result<(), Error> {
    super::serve::log_to_stderr(LogLevel::Warn);
    let shown = dir.display();
    std::fs::create_dir_all(dir).map_err(|e| Error::system(&format!("create {shown}"), &e))?;
    let dir = dir.canonicalize().map_err(|e| Error::system(&format!("find {shown}"), &e))?;
    let store = dir.join("store");
    let made_store = !store.exists();
    if made_store {
        make_store(&store, buffered)?;
    }
    let socket = global.socket.unwrap_or_else(|| dir.join("parallax.sock"));
    let daemon = Daemon::start(Config {
        store: store.clone(),
        socket: socket.clone(),
        nbd: Vec::new(),
        cache_bytes: CACHE_BYTES,
        gc_memory_bytes: daemon::GC_MEMORY_BYTES,
        tls: None,
        insecure_plaintext: false,
        buffered,
        scrub: Scrub { every: Duration::ZERO, rate_bytes: 64 << 20 },
    })?;
    let made_disk = daemon.create_unless_there(DEMO, DEMO_BYTES)?;
    let status = daemon.status()?;
    if global.json {
        let ready = json!({
            "ready": true,
            "socket": socket,
            "made_store": made_store,
            "made_disk": made_disk,
            "daemon": *status,
        });
        output::print(&ready.to_string())?;
    } else {
        let found = if made_store { "made and serving".to_owned() } else { found(&status.opened) };
        output::print(&format!(
            "ready: {found} {}, with a disk `{DEMO}`\n\n{}",
            store.display(),
            to_try(&socket, made_disk)
        ))?;
    }
    daemon.run()
}

/// Makes the store under another name first, so that a store that is there is a whole one.
fn make_store(store: &Path, buffered: bool) -> Result<(), Error> {
    let unfinished = store.with_extension("unfinished");
    let size_bytes = Some(STORE_BYTES);
    let format = Format { size_bytes, force: true, buffered, ..Format::default() };
    offline::format(&unfinished, &format, |_, _| {})?;
    std::fs::rename(&unfinished, store)
        .map_err(|e| Error::system(&format!("rename {}", unfinished.display()), &e))
}

/// What opening a store that was there found.
fn found(opened: &OpenReport) -> String {
    let OpenReport { clean, records_replayed, records_dropped, alarms } = opened;
    let mut text = match clean {
        true => "serving".to_owned(),
        false => format!(
            "recovered after an unclean stop ({} replayed, {records_dropped} dropped), serving",
            output::count(*records_replayed, "log record")
        ),
    };
    if !alarms.is_empty() {
        text = format!("ALARM: {}; {text}", alarms.join("; "));
    }
    text
}

/// Commands for another terminal, to be typed as they stand; the second time, those that can be
/// repeated.
fn to_try(socket: &Path, made_disk: bool) -> String {
    let path = match directory_outside_path() {
        Some(directory) => format!("  export PATH={}:$PATH\n", quote(&directory)),
        None => String::new(),
    };
    let snapshots = match made_disk {
        true => {
            "# a snapshot, a clone of it, and how they hang together\n  \
             parallax snapshot demo --label first\n  \
             parallax clone demo@first copy\n  \
             parallax tree"
        }
        false => {
            "# one more snapshot, and all that there are\n  \
             parallax snapshot demo\n  \
             parallax snapshots demo\n  \
             parallax tree"
        }
    };
    let nbd_socket = percent_encode(&own_nbd_socket(socket).to_string_lossy()).replace("%2F", "/");
    format!(
        "To try next, in another terminal:\n\n\
         {path}  export PARALLAX_SOCKET={socket}\n\n  \
         {snapshots}\n\n  \
         # what a client sees: QEMU, nbdcopy and fio take the same URL\n  \
         qemu-img info 'nbd+unix:///{DEMO}?socket={nbd_socket}'\n\n\
         Ctrl-C stops; the same command goes on where it stopped.",
        socket = quote(socket),
    )
}

/// Where this program lies, if a shell would not find it there.
fn directory_outside_path() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let directory = program.parent()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = std::env::split_paths(&path).map(|entry| entry.join("parallax"));
    let found = candidates.find(|file| file.exists()).and_then(|file| file.canonicalize().ok());
    (found.as_deref() != Some(&program)).then(|| directory.to_owned())
}

/// A path as a word for a shell.
fn quote(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_one_word() {
        assert_eq!(quote(Path::new("/srv/a-b/store")), "/srv/a-b/store");
        assert_eq!(quote(Path::new("/my disks")), "'/my disks'");
        assert_eq!(quote(Path::new("it's")), r"'it'\''s'");
    }
}
