//! `parallax diff`.

use api::{DiffExtent, Error};

use super::Context;
use crate::output::{self, Column, bytes, count};

pub(super) async fn run(context: &Context, from: &str, to: &str) -> Result<(), Error> {
    let diff = context.client.diff(from, to).await?;
    if context.json {
        return output::print_json(&diff);
    }
    if diff.extents.is_empty() {
        return output::print(&format!("{from} and {to} have the same contents"));
    }
    let total: u64 = diff.extents.iter().map(|extent| extent.length).sum();
    let ranges = u64::try_from(diff.extents.len()).unwrap_or(u64::MAX);
    let columns = [Column::Right("OFFSET"), Column::Right("LENGTH"), Column::Left("IN B")];
    let row = |extent: DiffExtent| {
        let state = if extent.data { "data" } else { "zero" };
        vec![extent.offset.to_string(), extent.length.to_string(), state.to_owned()]
    };
    output::print(&output::table(&columns, diff.extents.into_iter().map(row).collect()))?;
    output::print(&format!("{} differ in {}", bytes(total), count(ranges, "range")))
}
