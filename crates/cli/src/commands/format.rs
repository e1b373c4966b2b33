//! `parallax format`.

use api::Error;
use serde_json::json;

use crate::args::{Format, Preallocate};
use crate::output::{self, bytes};

pub(super) fn run(format: &Format, json: bool) -> Result<(), Error> {
    let options = daemon::offline::Format {
        size_bytes: format.size,
        extent_bytes: format.extent_size,
        force: format.force,
        preallocate: format.preallocate == Preallocate::Full,
        buffered: format.buffered,
    };
    let made = daemon::offline::format(&format.path, &options)?;
    let shown = format.path.display();
    if json {
        return output::print_json(&json!({
            "path": format.path,
            "size_bytes": made.size_bytes,
            "device": made.device,
        }));
    }
    output::print(&format!(
        "made a store of {} on {shown}; serve it with: parallax serve {shown}",
        bytes(made.size_bytes)
    ))
}
