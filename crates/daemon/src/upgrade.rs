//! Becoming another program, with the same process id, arguments and sockets.
//!
//! The daemon closes its store well, leaves its sockets open (`sockets.rs`) and calls exec(2). Who connects
//! meanwhile waits. Requests that were under way are answered before; virtual machines and mounts, whose
//! next requests wait where they are, go on with the next program. If the kernel refuses to start that, this one serves
//! again.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use api::{Error, Kind, Upgrading};

use crate::sockets::{Sockets, VARIABLE};

/// Where the daemon was started from. A package that is installed anew puts another file there.
static STARTED_FROM: OnceLock<PathBuf> = OnceLock::new();

/// Remembers where this program lies: later its file may be another one, or gone.
pub(crate) fn remember_program() {
    if let Ok(path) = std::env::current_exe() {
        STARTED_FROM.get_or_init(|| path);
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
    let said = Command::new(&path)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Error::system(&format!("run {shown}"), &e))?;
    let said = String::from_utf8_lossy(&said.stdout).trim().to_owned();
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
    Error::system(&format!("become {}", binary.display()), &error)
}
