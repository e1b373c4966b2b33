//! `parallax diff`.

use api::{Diff, DiffExtent, Error};

use super::Context;
use crate::output::{self, bytes, count};

pub(super) async fn run(context: &Context, from: &str, to: &str) -> Result<(), Error> {
    if context.json {
        // One value: so all of it is in memory before it is printed.
        return output::print_json(&context.client.diff(from, to).await?);
    }
    let mut page = context.client.diff_page(Some(from), to, None).await?;
    let sizes = sizes(&page.diff);
    let table = Table::of(&page.diff);
    let (mut range_count, mut total) = (0, 0);
    loop {
        let extents = &page.diff.extents;
        if !extents.is_empty() && !output::print_to_reader(&table.lines(range_count == 0, extents))?
        {
            return Ok(());
        }
        range_count += u64::try_from(extents.len()).unwrap_or(u64::MAX);
        total += extents.iter().map(|extent| extent.length).sum::<u64>();
        let Some(next) = page.next else { break };
        page = context.client.diff_page(Some(from), to, Some(next)).await?;
    }
    let summary = match range_count {
        0 => format!("{from} and {to} have the same contents"),
        _ => format!("{} differ in {}", bytes(total), count(range_count, "range")),
    };
    output::print(&format!("{summary}{sizes}"))
}

/// A table that is printed page by page: its columns are as wide as the larger size needs.
struct Table {
    width: usize,
}

impl Table {
    fn of(diff: &Diff) -> Self {
        let largest = diff.from_size_bytes.max(diff.to_size_bytes);
        Self { width: largest.to_string().len().max("OFFSET".len()) }
    }

    fn lines(&self, with_header: bool, extents: &[DiffExtent]) -> String {
        let width = self.width;
        let header =
            with_header.then(|| format!("{:>width$}  {:>width$}  IN B", "OFFSET", "LENGTH"));
        let rows = extents.iter().map(|DiffExtent { offset, length, data }| {
            let state = if *data { "data" } else { "zero" };
            format!("{offset:>width$}  {length:>width$}  {state}")
        });
        header.into_iter().chain(rows).collect::<Vec<_>>().join("\n")
    }
}

/// That the sizes differ, if they do.
fn sizes(diff: &Diff) -> String {
    let Diff { from: Some(from), to, from_size_bytes, to_size_bytes, .. } = diff else {
        return String::new();
    };
    if from_size_bytes == to_size_bytes {
        return String::new();
    }
    format!(
        "; {from} has {}, {to} has {}: what only one has counts as zeroes in the other",
        bytes(*from_size_bytes),
        bytes(*to_size_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_a_table_align() {
        let diff = |to_size_bytes| Diff {
            from: Some("a".to_owned()),
            to: "b".to_owned(),
            from_size_bytes: 4096,
            to_size_bytes,
            extents: vec![],
        };
        let page = |offset, data| [DiffExtent { offset, length: 4096, data }];
        let table = Table::of(&diff(64 << 20));
        assert_eq!(
            table.lines(true, &page(0, true)),
            "  OFFSET    LENGTH  IN B\n       0      4096  data"
        );
        assert_eq!(table.lines(false, &page(33_554_432, false)), "33554432      4096  zero");
        assert_eq!(Table::of(&diff(8192)).lines(false, &page(4096, true)), "  4096    4096  data");
    }
}
