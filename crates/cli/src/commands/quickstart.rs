//! `parallax quickstart`: from nothing to a disk that is served, in one command.

use std::path::Path;

use api::{Error, percent_encode};
use daemon::offline::{self, Format};
use daemon::{Config, Daemon, own_nbd_socket};
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
        tls: None,
        insecure_plaintext: false,
        buffered,
    })?;
    let made_disk = daemon.create_unless_there(DEMO, DEMO_BYTES)?;
    if global.json {
        let ready = json!({
            "ready": true,
            "socket": socket,
            "made_store": made_store,
            "made_disk": made_disk,
            "daemon": *daemon.status()?,
        });
        output::print(&ready.to_string())?;
    } else {
        output::print(&welcome(&store, &socket, made_store))?;
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

fn welcome(store: &Path, socket: &Path, made_store: bool) -> String {
    let made = if made_store { "made and serving" } else { "serving" };
    let parallax = std::env::current_exe().unwrap_or_else(|_| "parallax".into());
    let parallax = format!("{} --socket {}", quote(&parallax), quote(socket));
    let nbd_socket = percent_encode(&own_nbd_socket(socket).to_string_lossy()).replace("%2F", "/");
    let url = format!("nbd+unix:///{DEMO}?socket={nbd_socket}");
    format!(
        "ready: {made} {store}, with a disk `{DEMO}` of {size}\n\n\
         To try next, in another terminal:\n\n  \
         # what a client sees; the same URL works with nbdcopy, fio and QEMU's -drive file=URL,format=raw\n  \
         qemu-img info '{url}'\n\n  \
         # a snapshot, a clone of it, and how they hang together\n  \
         {parallax} snapshot {DEMO} --label first\n  \
         {parallax} clone {DEMO}@first copy\n  \
         {parallax} tree\n\n\
         Ctrl-C stops; the same command goes on where it stopped.",
        store = store.display(),
        size = output::bytes(DEMO_BYTES),
    )
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
