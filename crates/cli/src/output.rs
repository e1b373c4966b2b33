//! What is printed: lines, tables that fit the terminal, JSON.
//!
//! Everything goes through [`print()`], so that a closed pipe (`parallax ls | head -1`) ends output
//! quietly instead of failing the command.

use std::io::{ErrorKind, IsTerminal, Write};

use api::Error;
use base::size::HumanBytes;
use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table};
use jiff::Timestamp;
use serde::Serialize;

/// Prints `text` and a line end.
///
/// # Errors
/// `Io` or `NoSpace` if stdout takes nothing.
pub(crate) fn print(text: &str) -> Result<(), Error> {
    print_to_reader(text).map(drop)
}

/// As [`print()`]; whether anybody still reads.
///
/// # Errors
/// As [`print()`].
pub(crate) fn print_to_reader(text: &str) -> Result<bool, Error> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.write_all(b"\n")) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Error::system("write to stdout", &error)),
    }
}

/// Prints `value` as indented JSON.
///
/// # Errors
/// As [`print()`].
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::new(api::Kind::Io, format!("cannot print JSON: {e}")))?;
    print(&text)
}

/// Prints a line on stderr; what cannot be said there cannot be said.
pub(crate) fn complain(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// How a column is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    /// Text.
    Left(&'static str),
    /// Numbers.
    Right(&'static str),
}

/// A table without lines: wrapped to the terminal if stdout is one, else one row per line.
pub(crate) fn table(columns: &[Column], rows: Vec<Vec<String>>) -> String {
    layout(columns, rows, width())
}

/// Characters in a line, if stdout is a terminal.
pub(crate) fn width() -> Option<u16> {
    let size = std::io::stdout().is_terminal().then(terminal_size::terminal_size).flatten();
    size.map(|(width, _)| width.0)
}

/// As [`table()`], for a terminal of this width.
pub(crate) fn layout(columns: &[Column], rows: Vec<Vec<String>>, width: Option<u16>) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    if let Some(width) = width {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    table.set_header(columns.iter().map(|column| match column {
        Column::Left(name) | Column::Right(name) => *name,
    }));
    for row in rows {
        table.add_row(row);
    }
    // The first column has names, which people copy: they stay in one piece.
    if let Some(names) = table.column_mut(0) {
        names.set_constraint(ColumnConstraint::ContentWidth);
    }
    for (cells, column) in table.column_iter_mut().zip(columns) {
        cells.set_padding((0, 2));
        if matches!(column, Column::Right(_)) {
            cells.set_cell_alignment(CellAlignment::Right);
        }
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n")
}

/// `1.5 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}

/// A time in UTC to the second, in RFC 3339.
pub(crate) fn time(time: Timestamp) -> String {
    let seconds = Timestamp::from_second(time.as_second());
    seconds.unwrap_or(time).to_string()
}

/// `1 snapshot`, `2 snapshots`.
pub(crate) fn count(count: u64, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_wrap() {
        let columns = [Column::Left("NAME"), Column::Right("SIZE")];
        let rows =
            || vec![vec!["a".to_owned(), "1".to_owned()], vec!["bbbbb".into(), "2 2".into()]];
        assert_eq!(layout(&columns, rows(), None), "NAME   SIZE\na         1\nbbbbb   2 2");
        let narrow = layout(&columns, rows(), Some(11));
        assert!(narrow.lines().all(|line| line.len() <= 11), "{narrow}");
        assert!(narrow.contains("bbbbb"), "names stay whole: {narrow}");
    }

    #[test]
    fn times_are_utc_to_the_second() {
        let at = Timestamp::from_nanosecond(1_763_806_530_250_000_000).unwrap();
        assert_eq!(time(at), "2025-11-22T10:15:30Z");
    }
}
