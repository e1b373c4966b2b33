//! `parallax format`.

use api::Error;
use serde_json::json;

use super::progress;
use crate::args::{Format, Preallocate};
use crate::output::{self, bytes};

pub(super) fn run(format: &Format, json: bool) -> Result<(), Error> {
    let options = daemon::offline::Format {
        size_bytes: format.size,
        extent_bytes: format.extent_size,
        force: format.force,
        preallocate: match format.preallocate {
            Preallocate::Off => daemon::offline::Preallocate::Off,
            Preallocate::Falloc => daemon::offline::Preallocate::Falloc,
            Preallocate::Full => daemon::offline::Preallocate::Full,
        },
        buffered: format.buffered,
    };
    let bar = progress::bar("format", 0);
    let drawn = bar.clone();
    let made = daemon::offline::format(&format.path, &options, move |done, total| {
        drawn.set_length(total);
        drawn.set_position(done);
    });
    bar.finish_and_clear();
    let made = made?;
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
