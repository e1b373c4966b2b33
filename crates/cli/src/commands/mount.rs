//! Commands on mounts: mount, unmount, mounts.
//!
//! `mount` becomes the *keeper* of the mount, in the background: it has the connection to the kernel
//! and gives it to the daemon, and to the next one when that has ended.

mod keeper;
mod kernel;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use api::{Error, Kind, Mounted};

use super::{Context, block_on};
use crate::args::MountArgs;
use crate::output;

/// Mounts the tree, and returns when it can be used.
pub(super) fn run(arguments: &MountArgs, control: &Path, json: bool) -> Result<(), Error> {
    // The keeper looks for the next daemon from elsewhere.
    let control = &std::path::absolute(control)
        .map_err(|e| Error::system("find out where the control socket is", &e))?;
    if arguments.foreground || arguments.detached {
        keep(arguments, control, json)
    } else {
        detach(arguments, control, json)
    }
}

/// Mounts and keeps the mount until it is gone.
fn keep(arguments: &MountArgs, control: &Path, json: bool) -> Result<(), Error> {
    let dir = mount_point(&arguments.dir)?;
    // Before anything is mounted that nobody serves.
    let door = keeper::connect(control)?;
    let ready = || {
        let mounted = Mounted { dir: dir.clone() };
        let said = match json {
            true => output::print_json(&mounted),
            false => output::print(&format!("mounted at {dir}")),
        };
        said.and_then(|()| if arguments.detached { forget_terminal() } else { Ok(()) })
    };
    block_on(keeper::keep(&dir, door, control, ready))?
}

/// Starts a keeper in the background, and says what it says when it is ready.
fn detach(arguments: &MountArgs, control: &Path, json: bool) -> Result<(), Error> {
    let start = |e: &std::io::Error| Error::system("start the keeper of the mount", e);
    let program = std::env::current_exe().map_err(|e| start(&e))?;
    let mut keeper = Command::new(program);
    keeper.arg("mount").arg("--detached").arg("--socket").arg(control);
    if json {
        keeper.arg("--json");
    }
    keeper.arg("--").arg(&arguments.dir).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut keeper = keeper.spawn().map_err(|e| start(&e))?;
    let mut said = String::new();
    if let Some(mut stdout) = keeper.stdout.take() {
        stdout.read_to_string(&mut said).map_err(|e| start(&e))?;
    }
    if said.is_empty() {
        // It has said itself what is wrong.
        let status = keeper.wait().map_err(|e| start(&e))?;
        std::process::exit(status.code().unwrap_or(6));
    }
    output::print(said.trim_end())
}

/// Lives on without the terminal from which it was started.
fn forget_terminal() -> Result<(), Error> {
    let forget = || {
        let nothing = rustix::fs::open(
            "/dev/null",
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )?;
        rustix::stdio::dup2_stdout(&nothing)?;
        rustix::stdio::dup2_stderr(&nothing)?;
        rustix::process::setsid()?;
        rustix::process::chdir("/")
    };
    forget().map_err(|e| Error::system("go to the background", &e.into()))
}

/// Ends a mount.
pub(super) fn unmount(dir: &Path, json: bool) -> Result<(), Error> {
    // The daemon of a mount may hang, and with it whatever looks at the directory: its parent is
    // looked at instead.
    let dir = absolute(dir)?;
    let path = Path::new(&dir);
    let dir = match (path.parent().map(std::fs::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => text(parent.join(name))?,
        _ => dir,
    };
    kernel::unmount(&dir)?;
    let mounted = Mounted { dir };
    match json {
        true => output::print_json(&mounted),
        false => output::print(&format!("unmounted {}", mounted.dir)),
    }
}

pub(super) async fn list(context: &Context) -> Result<(), Error> {
    let mounts = context.client.mounts().await?;
    if context.json {
        return output::print_json(&mounts);
    }
    if mounts.is_empty() {
        return output::print("nothing is mounted; mount all disks with: parallax mount DIR");
    }
    let lines: Vec<String> = mounts.into_iter().map(|mount| mount.dir).collect();
    output::print(&lines.join("\n"))
}

/// The directory to mount at, as the kernel knows it.
fn mount_point(dir: &Path) -> Result<String, Error> {
    let shown = dir.display();
    let found = std::fs::canonicalize(dir).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::new(
            Kind::NotFound,
            format!("there is no directory {shown}: create it with: mkdir {shown}"),
        ),
        _ => Error::system(&format!("look at {shown}"), &e),
    })?;
    if !found.is_dir() {
        return Err(Error::new(Kind::Invalid, format!("{shown} is no directory")));
    }
    text(found)
}

fn absolute(dir: &Path) -> Result<String, Error> {
    let shown = dir.display();
    text(
        std::path::absolute(dir)
            .map_err(|e| Error::system(&format!("find out where {shown} is"), &e))?,
    )
}

fn text(path: PathBuf) -> Result<String, Error> {
    let shown = path.display().to_string();
    path.into_os_string()
        .into_string()
        .map_err(|_| Error::new(Kind::Invalid, format!("{shown}: the path must be UTF-8 text")))
}
