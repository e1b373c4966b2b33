//! Shows what stands on a store.

use std::path::Path;

use api::Error;
use vdi::Target;
use vdi::dump::Dump;

use crate::engine::engine_error;
use crate::open;

/// A part of a store that can be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// The superblock and its copies.
    Superblock,
    /// The host slots and the heartbeat.
    Slots,
    /// The log, with every record.
    Log,
    /// VDIs and snapshots, with their roots.
    Vdis,
    /// What each extent is for.
    Extents,
    /// How full the bitmaps' pages are.
    Bitmaps,
    /// The tree of `NAME` or `NAME@SNAPSHOT`.
    Tree(String),
}

/// Hands every line about `parts` of the store on `path` to `line`, in order. Reads only. Blocks.
///
/// # Errors
/// `Busy` if a daemon has it open; `NotFound` or `Damaged` if what leads to a part is not there;
/// damage below is shown where it stands.
pub fn dump(
    path: &Path,
    parts: Vec<Part>,
    buffered: bool,
    line: impl FnMut(&Part, String) + 'static,
) -> Result<(), Error> {
    let reactor = open::reactor()?;
    let options = open::DeviceOptions { access: open::Access::ReadOnly, buffered };
    let device = open::device(reactor.io(), path, options)?;
    let (runtime, store) = (reactor.runtime().clone(), path.to_owned());
    let outcome = reactor.run(async move {
        let dump = Dump::open(&device, &runtime).await;
        let dump = dump.map_err(|error| open::explain(&store, &error))?;
        show(&dump, &parts, line).await.map_err(|error| engine_error(&error))
    });
    reactor.runtime().kill();
    outcome.map_err(|e| Error::system("go on with the I/O engine", &e))?
}

async fn show(
    dump: &Dump,
    parts: &[Part],
    mut line: impl FnMut(&Part, String),
) -> Result<(), vdi::Error> {
    for part in parts {
        let mut line = |text| line(part, text);
        match part {
            Part::Superblock => dump.superblock(&mut line),
            Part::Slots => dump.slots(&mut line).await?,
            Part::Log => dump.log(&mut line).await?,
            Part::Vdis => dump.vdis(&mut line).await?,
            Part::Extents => dump.extents(&mut line).await?,
            Part::Bitmaps => dump.bitmaps(&mut line).await?,
            Part::Tree(target) => dump.tree(&Target::parse(target), &mut line).await?,
        }
    }
    Ok(())
}
