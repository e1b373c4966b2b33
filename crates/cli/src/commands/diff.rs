//! `parallax diff`.

use api::{Diff, DiffExtent, Error};

use super::Context;
use crate::output::{self, Column, bytes, count};

pub(super) async fn run(context: &Context, from: &str, to: &str) -> Result<(), Error> {
    let diff = context.client.diff(from, to).await?;
    if context.json {
        return output::print_json(&diff);
    }
    let (sizes, total) = (sizes(&diff), total(&diff));
    if !diff.extents.is_empty() {
        let columns = [Column::Right("OFFSET"), Column::Right("LENGTH"), Column::Left("IN B")];
        let row = |extent: DiffExtent| {
            let state = if extent.data { "data" } else { "zero" };
            vec![extent.offset.to_string(), extent.length.to_string(), state.to_owned()]
        };
        output::print(&output::table(&columns, diff.extents.into_iter().map(row).collect()))?;
    }
    output::print(&format!("{total}{sizes}"))
}

/// How much differs.
fn total(diff: &Diff) -> String {
    let Diff { from, to, extents, .. } = diff;
    if extents.is_empty() {
        return format!("{from} and {to} have the same contents");
    }
    let total: u64 = extents.iter().map(|extent| extent.length).sum();
    let ranges = u64::try_from(extents.len()).unwrap_or(u64::MAX);
    format!("{} differ in {}", bytes(total), count(ranges, "range"))
}

/// That the sizes differ, if they do.
fn sizes(diff: &Diff) -> String {
    let Diff { from, to, from_size_bytes, to_size_bytes, .. } = diff;
    if from_size_bytes == to_size_bytes {
        return String::new();
    }
    format!(
        "; {from} has {}, {to} has {}: what only one has counts as zeroes in the other",
        bytes(*from_size_bytes),
        bytes(*to_size_bytes)
    )
}
