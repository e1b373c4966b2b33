//! `parallax dump`.

use std::cell::RefCell;
use std::rc::Rc;

use api::Error;
use daemon::offline::Part;
use serde_json::{Map, Value};

use crate::args::{Dump, DumpPart};
use crate::output;

pub(super) fn run(dump: &Dump, json: bool) -> Result<(), Error> {
    let parts = parts(dump);
    if json {
        return as_json(dump, parts);
    }
    // A line that cannot be printed ends the command when there are no more.
    let printed = Rc::new(RefCell::new(Ok(())));
    let outcome = Rc::clone(&printed);
    let mut shown: Option<Part> = None;
    daemon::offline::dump(&dump.path, parts, dump.buffered, move |part, line| {
        let mut outcome = outcome.borrow_mut();
        if outcome.is_err() {
            return;
        }
        if shown.as_ref() != Some(part) {
            let gap = if shown.is_some() { "\n" } else { "" };
            *outcome = output::print(&format!("{gap}== {}", title(part)));
            shown = Some(part.clone());
        }
        if outcome.is_ok() {
            *outcome = output::print(&line);
        }
    })?;
    printed.replace(Ok(()))
}

/// The same lines, by part.
fn as_json(dump: &Dump, parts: Vec<Part>) -> Result<(), Error> {
    let lines = Rc::new(RefCell::new(Map::new()));
    let gathered = Rc::clone(&lines);
    daemon::offline::dump(&dump.path, parts, dump.buffered, move |part, line| {
        let mut all = gathered.borrow_mut();
        let entry = all.entry(title(part)).or_insert_with(|| Value::Array(Vec::new()));
        if let Value::Array(list) = entry {
            list.push(Value::String(line));
        }
    })?;
    let lines = lines.take();
    output::print_json(&lines)
}

fn parts(dump: &Dump) -> Vec<Part> {
    let trees = dump.tree.iter().cloned().map(Part::Tree);
    if dump.parts.is_empty() && dump.tree.is_empty() {
        return vec![Part::Superblock, Part::Slots, Part::Vdis];
    }
    let parts = dump.parts.iter().map(|part| match part {
        DumpPart::Superblock => Part::Superblock,
        DumpPart::Slots => Part::Slots,
        DumpPart::Log => Part::Log,
        DumpPart::Disks => Part::Vdis,
        DumpPart::Extents => Part::Extents,
        DumpPart::Bitmaps => Part::Bitmaps,
    });
    parts.chain(trees).collect()
}

fn title(part: &Part) -> String {
    match part {
        Part::Superblock => "superblock".to_owned(),
        Part::Slots => "slots".to_owned(),
        Part::Log => "log".to_owned(),
        Part::Vdis => "disks".to_owned(),
        Part::Extents => "extents".to_owned(),
        Part::Bitmaps => "bitmaps".to_owned(),
        Part::Tree(target) => format!("tree of {target}"),
    }
}
