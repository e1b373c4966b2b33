//! Becoming another program, with the same process id, arguments and sockets.
//!
//! The daemon closes its store well, leaves its sockets open (`sockets.rs`) and calls exec(2). Who connects
//! meanwhile waits. Requests that were under way are answered before; virtual machines and mounts, whose
//! next requests wait where they are, go on with the next program. If the kernel refuses to start that, this one serves
//! again.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use api::{Error, Kind, Upgrading};
use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::signal::unix::{SignalKind, signal};

use crate::sockets::{Sockets, VARIABLE};

/// How long a program may say nothing when it is asked for its version, and how much it may say.
const SAYING_SECONDS_MAX: i64 = 5;
const SAID_BYTES_MAX: usize = 256;

/// Where the daemon was started from. A package that is installed anew puts another file there.
static STARTED_FROM: OnceLock<PathBuf> = OnceLock::new();

/// Remembers where this program lies: later its file may be another one, or gone. A link counts as it
/// was named, since it may lead elsewhere by then.
pub(crate) fn remember_program() {
    let named = std::env::args_os().next().map(PathBuf::from);
    let named = named.filter(|path| path.components().count() > 1);
    let path = named.map_or_else(std::env::current_exe, std::path::absolute);
    if let Ok(path) = path {
        STARTED_FROM.get_or_init(|| path);
    }
}

/// Asks a program for its version; what it says, as far as that is of interest.
fn version_of(path: &Path) -> std::io::Result<String> {
    let mut child = Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let said = child.stdout.take().map_or(Ok(Vec::new()), |mut stdout| read_some(&mut stdout));
    if said.is_err() {
        // It may have ended by itself just now.
        let _ = child.kill();
    }
    let status = child.wait()?;
    if !status.success() {
        return Err(std::io::Error::other(format!("it fails: {status}")));
    }
    Ok(String::from_utf8_lossy(&said?).trim().to_owned())
}

fn read_some(stdout: &mut ChildStdout) -> std::io::Result<Vec<u8>> {
    let mut said = vec![0; SAID_BYTES_MAX];
    let mut length = 0;
    loop {
        let mut ready = [PollFd::new(stdout, PollFlags::IN)];
        let limit = Timespec { tv_sec: SAYING_SECONDS_MAX, tv_nsec: 0 };
        if rustix::event::poll(&mut ready, Some(&limit))? == 0 {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        match stdout.read(said.get_mut(length..).unwrap_or_default())? {
            // The end, or enough.
            0 => {
                said.truncate(length);
                return Ok(said);
            }
            count => length += count,
        }
    }
}

/// Finds out whether a program can be the daemon: it runs, and says that it is Parallax.
pub(crate) fn look_at(binary: Option<String>) -> Result<Upgrading, Error> {
    let unknown = || Error::new(Kind::Invalid, "name the program: --binary PATH");
    let path = binary.map(PathBuf::from).or_else(|| STARTED_FROM.get().cloned());
    let path = path.ok_or_else(unknown)?;
    let shown = path.display().to_string();
    let invalid = |why: String| Error::new(Kind::Invalid, format!("{shown} {why}"));
    if !path.is_absolute() {
        return Err(invalid("is no absolute path".to_owned()));
    }
    let said = version_of(&path).map_err(|e| Error::system(&format!("run {shown}"), &e))?;
    let to = said.strip_prefix("parallax ").ok_or_else(|| {
        invalid("is not Parallax: it says something else when it is asked for its --version".into())
    })?;
    let from = env!("CARGO_PKG_VERSION").to_owned();
    Ok(Upgrading { from, to: to.to_owned(), binary: shown.clone() })
}

/// Becomes the program. Returns only if that is refused.
pub(crate) fn become_program(binary: &Path, sockets: &Sockets) -> Error {
    let left = match sockets.leave() {
        Ok(left) => left,
        Err(error) => return Error::system("leave sockets to the next program", &error),
    };
    let error = Command::new(binary).args(std::env::args_os().skip(1)).env(VARIABLE, left).exec();
    // The attempt has undone that this signal is ignored, as it is by Rust's programs.
    drop(signal(SignalKind::pipe()));
    sockets.keep();
    Error::system(&format!("become {}", binary.display()), &error)
}
