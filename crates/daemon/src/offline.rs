//! What is done to a store that no daemon serves, on a reactor of its own: here `format`, below
//! `check` and `dump`.

mod check;
mod dump;
mod used;

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use api::{Error, Kind};
use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;
use vdi::{FormatOptions, Store};

pub use check::{Check, CheckProgress, check};
pub use dump::{Part, dump};

use crate::engine::engine_error;
use crate::open;

/// How to make a store.
#[derive(Clone, Copy, Debug, Default)]
pub struct Format {
    /// Create the file with this many bytes, or grow it to them.
    pub size_bytes: Option<u64>,
    /// Bytes per extent; see `vdi::FormatOptions`.
    pub extent_bytes: Option<u64>,
    /// Format even if the device looks used.
    pub force: bool,
    /// What is done about a file's space now.
    pub preallocate: Preallocate,
    /// Go through the page cache, for file systems without O_DIRECT.
    pub buffered: bool,
}

/// How much of a file's space is taken from the file system at once; the words are qemu-img's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocate {
    /// None: the file is sparse.
    #[default]
    Off,
    /// All of it, without writing it.
    Falloc,
    /// All of it, written with zeroes.
    Full,
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Formatted {
    /// Length of the file or device.
    pub size_bytes: u64,
    /// What it is, and which I/O engine drives it.
    pub device: String,
}

/// Writes an empty store to `path`. `progress` is told how many blocks of how many were written
/// with zeroes, if that was asked for. Durable on return. Blocks.
///
/// # Errors
/// `NotFound` if there is no such file and no size to create it with; `Busy` if a daemon has it
/// open; `Exists` if it looks used and `force` is not set; `Invalid` for impossible sizes. A file
/// that is refused is as it was: one that was created for this is removed again, one that was made
/// longer gets its length back.
pub fn format(
    path: &Path,
    format: &Format,
    progress: impl Fn(u64, u64) + 'static,
) -> Result<Formatted, Error> {
    let before = prepare(path, format)?;
    let outcome = run(path, format, progress);
    if outcome.is_err() {
        // The error that is on its way tells more than one from here could.
        let _ = before.restore(path);
    }
    outcome
}

/// What there was before anything was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    Nothing,
    /// A file of this length, which was made longer.
    Shorter(u64),
    AsItIs,
}

impl Before {
    fn restore(self, path: &Path) -> std::io::Result<()> {
        match self {
            Self::Nothing => std::fs::remove_file(path),
            Self::Shorter(length) => File::options().write(true).open(path)?.set_len(length),
            Self::AsItIs => Ok(()),
        }
    }
}

fn run(
    path: &Path,
    format: &Format,
    progress: impl Fn(u64, u64) + 'static,
) -> Result<Formatted, Error> {
    let reactor = open::reactor()?;
    let device = {
        let access = open::Access::Exclusive;
        let options = open::DeviceOptions { access, buffered: format.buffered };
        open::device(reactor.io(), path, options)?
    };
    let options = FormatOptions {
        extent_bytes: format.extent_bytes,
        log_bytes: None,
        force: format.force,
        keep_space: format.preallocate != Preallocate::Off,
        uuid: open::random()?,
        secret: open::random()?,
        boot_id: open::boot_id()?,
    };
    let formatted = Formatted {
        size_bytes: device.block_count() * base::BLOCK_SIZE_U64,
        device: device.describe(),
    };
    let runtime = reactor.runtime().clone();
    let zero = format.preallocate == Preallocate::Full;
    let shown = path.to_owned();
    let make = async move {
        let failed = |error| explain(&shown, &error);
        Store::check_format(&device, &runtime, &options).await.map_err(failed)?;
        if !options.force {
            refuse_data(&shown)?;
        }
        if zero {
            Store::zero(&device, &progress).await.map_err(failed)?;
        }
        // It was looked at, and is locked: once is enough.
        let options = FormatOptions { force: true, ..options };
        Store::format(&device, &runtime, &options).await.map_err(failed)
    };
    reactor.run(make).map_err(|e| Error::system("go on with the I/O engine", &e))??;
    // Last, so that a file that is refused takes no more space than before.
    if format.preallocate == Preallocate::Falloc && path.is_file() {
        preallocate(path)?;
    }
    Ok(formatted)
}

/// The engine looks where devices have their labels; of a file it is known where it has data.
fn refuse_data(path: &Path) -> Result<(), Error> {
    if !path.is_file() {
        return Ok(());
    }
    let look = used::data_in(path);
    match look.map_err(|e| Error::system(&format!("look for data in {}", path.display()), &e))? {
        used::Data::None => Ok(()),
        used::Data::At(at) => Err(refuse_used(path, &format!("it has data at byte {at}"))),
        used::Data::TooMany => {
            Err(refuse_used(path, "it has too many pieces of data to look at them all"))
        }
    }
}

fn refuse_used(path: &Path, found: &str) -> Error {
    let shown = path.display();
    let found = match used::signature(path) {
        Some(signature) => format!("{found} ({signature}, says blkid)"),
        None => found.to_owned(),
    };
    let message =
        format!("{shown} is not empty: {found}; if everything on it may be lost, add --force");
    Error::new(Kind::Exists, message)
}

fn explain(path: &Path, error: &vdi::Error) -> Error {
    let error = engine_error(error);
    match error.kind {
        // Nobody holds it, or it could not have been opened; there is something on it.
        Kind::Busy => refuse_used(path, &error.message),
        kind => Error::new(kind, format!("cannot format {}: {error}", path.display())),
    }
}

/// Creates or grows the file, if a size is given.
fn prepare(path: &Path, format: &Format) -> Result<Before, Error> {
    let shown = path.display();
    let there = match std::fs::metadata(path) {
        Ok(found) => Some(found),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(Error::system(&format!("look at {shown}"), &error)),
    };
    let Some(size) = format.size_bytes else {
        return match there {
            Some(_) => Ok(Before::AsItIs),
            None => Err(Error::new(
                Kind::NotFound,
                format!("{shown} does not exist; to create a file, say how large: --size 64G"),
            )),
        };
    };
    match there {
        Some(found) if found.is_dir() => {
            Err(Error::new(Kind::Invalid, format!("{shown} is a directory")))
        }
        Some(found) if !found.is_file() => Err(Error::new(
            Kind::Invalid,
            format!("{shown} is not a file: its size is what it is; leave --size away"),
        )),
        Some(found) if found.len() > size => Err(Error::new(
            Kind::Invalid,
            format!("{shown} is larger than that already: remove it first, or leave --size away"),
        )),
        Some(found) => {
            grow(path, size)?;
            Ok(Before::Shorter(found.len()))
        }
        None => {
            // What virtual machines write is nobody else's to read.
            let file = File::options().write(true).create_new(true).mode(0o600).open(path);
            let file = file.map_err(|e| Error::system(&format!("create {shown}"), &e))?;
            file.set_len(size).map_err(|error| {
                // The error that is on its way tells more than one from here could.
                let _ = std::fs::remove_file(path);
                Error::system(&format!("give {shown} its size"), &error)
            })?;
            Ok(Before::Nothing)
        }
    }
}

/// Makes a file longer that nobody uses.
fn grow(path: &Path, size: u64) -> Result<(), Error> {
    let what = format!("give {} its size", path.display());
    let failed = |error: std::io::Error| Error::system(&what, &error);
    let file = File::options().write(true).open(path).map_err(failed)?;
    // As whoever opens a store locks it; let go with the file, before it is opened for good.
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(
        |errno| match errno {
            Errno::WOULDBLOCK => open::in_use(path),
            errno => failed(errno.into()),
        },
    )?;
    file.set_len(size).map_err(failed)
}

fn preallocate(path: &Path) -> Result<(), Error> {
    let what = format!("preallocate {}", path.display());
    let failed = |error: std::io::Error| Error::system(&what, &error);
    let file = File::options().write(true).open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, length)
        .map_err(|errno| failed(errno.into()))?;
    file.sync_all().map_err(failed)
}
