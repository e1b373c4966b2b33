//! Names of exports: what the empty name means, and what to say about a name that leads nowhere.

use base::ErrorKind;
use base::size::HumanBytes;
use disk::{Catalog, DiskError, Export};

use crate::protocol::STRING_BYTES_MAX;
use crate::protocol::handshake::reply;

/// Names given in the message that refuses the empty name.
const NAMES_IN_MESSAGE: usize = 8;

/// Catalog pages that the search for the default export reads. It skips a VDI's snapshots, so
/// that it needs more than two per name only if names and catalog disagree about order.
const PAGES_MAX: usize = 4 * NAMES_IN_MESSAGE;

/// Why an export cannot be had, as a reply to an option.
pub(super) struct OpenError {
    pub(super) reply: u32,
    pub(super) message: String,
}

impl From<DiskError> for OpenError {
    fn from(error: DiskError) -> Self {
        let reply = match error.kind {
            ErrorKind::NotFound | ErrorKind::Invalid => reply::ERR_UNKNOWN,
            _ => reply::ERR_PLATFORM,
        };
        Self { reply, message: error.message.chars().take(STRING_BYTES_MAX / 4).collect() }
    }
}

/// A sentence for people.
pub(super) fn describe(size_bytes: u64, read_only: bool) -> String {
    let size = HumanBytes(size_bytes);
    if read_only { format!("{size}, read-only snapshot") } else { size.to_string() }
}

/// The name of the export that a client means by `name`.
pub(super) async fn canonical(catalog: &dyn Catalog, name: &str) -> Result<String, OpenError> {
    if !name.is_empty() {
        return Ok(name.to_owned());
    }
    let mut names = first_vdis(catalog).await?;
    match names.len() {
        0 => Err(unknown("there are no disks yet: create one with 'parallax create'".to_owned())),
        1 => Ok(names.remove(0)),
        count => {
            let more = if count > NAMES_IN_MESSAGE { ", ..." } else { "" };
            names.truncate(NAMES_IN_MESSAGE);
            let list = names.join(", ");
            Err(unknown(format!("give the name of an export, one of: {list}{more}")))
        }
    }
}

fn unknown(message: String) -> OpenError {
    OpenError { reply: reply::ERR_UNKNOWN, message }
}

/// The names of the first VDIs, one more than fit into a message.
async fn first_vdis(catalog: &dyn Catalog) -> Result<Vec<String>, DiskError> {
    let mut names: Vec<String> = Vec::new();
    let mut after = None;
    for _ in 0..PAGES_MAX {
        let page = catalog.list(after.take(), NAMES_IN_MESSAGE).await?;
        let Some(last) = page.last() else { return Ok(names) };
        after = Some(skip_snapshots(last));
        names.extend(page.into_iter().filter(is_vdi).map(|export| export.name));
        if names.len() > NAMES_IN_MESSAGE {
            break;
        }
    }
    Ok(names)
}

fn is_vdi(export: &Export) -> bool {
    !export.name.contains('@')
}

/// A name behind all snapshots of the VDI whose snapshot `last` is.
fn skip_snapshots(last: &Export) -> String {
    match last.name.split_once('@') {
        Some((vdi, _)) => format!("{vdi}@{}", char::MAX),
        None => last.name.clone(),
    }
}
