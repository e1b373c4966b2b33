//! What stands for block devices (ublk) in a build without them.

use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use api::{Attachment, Error, Kind};
use runtime::Runtime;
use runtime::reactor::Io;

use crate::remembered::Remembered;

/// None.
pub(crate) struct Devices {
    remembered: Remembered<serde_json::Value>,
}

impl Devices {
    pub(crate) fn new(
        _runtime: &Runtime,
        _io: &Io,
        _catalog: &Rc<dyn disk::Catalog>,
        socket: &Path,
        store: &Path,
    ) -> Rc<Self> {
        Rc::new(Self { remembered: Remembered::beside(socket, store, "ublk") })
    }

    /// Tells whom nobody serves.
    pub(crate) fn restore(&self) {
        let count = self.remembered.read().len();
        if count > 0 {
            tracing::warn!(count, "block devices of an earlier daemon wait: {}", refusal());
        }
    }

    pub(crate) async fn attach(&self, _disk: String) -> Result<Attachment, Error> {
        Err(refusal())
    }

    pub(crate) async fn detach(&self, _path: &str) -> Option<Result<Attachment, Error>> {
        None
    }

    pub(crate) fn list(&self) -> Vec<Attachment> {
        Vec::new()
    }

    pub(crate) fn metrics(&self) -> api::FrontendMetrics {
        api::FrontendMetrics::default()
    }

    pub(crate) fn rename(&self, _from: &str, _to: &str) {}

    pub(crate) async fn end(&self) {}
}

/// No process of this program does anything for block devices.
#[must_use]
pub fn called_aside() -> Option<ExitCode> {
    None
}

pub(crate) fn check_unused(_path: &str) -> Result<(), Error> {
    Ok(())
}

pub(crate) fn in_use(_path: &str) -> Error {
    refusal()
}

fn refusal() -> Error {
    let message = "this build of parallax has no block devices: build it with the feature `ublk`";
    Error::new(Kind::Unsupported, message)
}
