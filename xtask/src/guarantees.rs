//! docs/guarantees.md names, for each guarantee, the tests that hold it and the mutants that show
//! that they bite: here they are looked for.
//!
//! A test is written `crate: path::of::test`, an end-to-end scenario `e2e: name`, a row of the
//! benchmarks `bench: name`.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// The guarantees of the design.
const GUARANTEES: usize = 10;

/// Checks that everything that the document names is there.
///
/// # Errors
/// Lists what is named and not there, and guarantees that name nothing.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let document = workspace.root.join("docs/guarantees.md");
    let document = std::fs::read_to_string(document).context("read docs/guarantees.md")?;
    let claims = claims(&document);
    let mut findings = Vec::new();
    if claims.len() != GUARANTEES {
        findings.push(format!("{} guarantees of {GUARANTEES} are in the table", claims.len()));
    }
    let mutants = workspace.root.join("crates/sim/src/mutants.rs");
    let mutants = std::fs::read_to_string(mutants).context("read the mutants")?;
    for claim in &claims {
        if claim.held_by.is_empty() {
            findings.push(format!("{} names no test", claim.name));
        }
        for held_by in &claim.held_by {
            if !exists(workspace, held_by)? {
                findings.push(format!("{}: there is no `{held_by}`", claim.name));
            }
        }
        for mutant in &claim.mutants {
            if !mutants.contains(&format!("name: \"{mutant}\"")) {
                findings.push(format!("{}: there is no mutant `{mutant}`", claim.name));
            }
        }
    }
    ensure!(findings.is_empty(), "docs/guarantees.md:\n  {}", findings.join("\n  "));
    Ok(())
}

/// A line of the table.
#[derive(Debug, PartialEq, Eq)]
struct Claim {
    name: String,
    held_by: Vec<String>,
    mutants: Vec<String>,
}

fn claims(document: &str) -> Vec<Claim> {
    let lines = document.lines().filter(|line| line.starts_with("| G"));
    lines
        .map(|line| {
            let mut cells = line.trim_matches('|').split(" | ").map(str::trim);
            let name = cells.next().unwrap_or_default().to_owned();
            let held_by = quoted(cells.nth(1).unwrap_or_default());
            let held_by = held_by.into_iter().filter(|it| it.contains(": ")).collect();
            Claim { name, held_by, mutants: quoted(cells.next().unwrap_or_default()) }
        })
        .collect()
}

/// What stands between backticks.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn exists(workspace: &Workspace, held_by: &str) -> Result<bool> {
    let (place, name) = held_by.split_once(": ").unwrap_or((held_by, ""));
    match place {
        "e2e" => Ok(crate::e2e::names().any(|scenario| scenario == name)),
        "bench" => Ok(crate::bench::row_names().split(", ").any(|row| row == name)),
        _ => {
            let directory = if place == "parallax" { "cli" } else { place };
            test_exists(&workspace.root.join("crates").join(directory), name)
        }
    }
}

/// Whether a Rust file below `directory` has this test; a path names the file, too.
fn test_exists(directory: &Path, path: &str) -> Result<bool> {
    let (modules, name) = path.rsplit_once("::").unwrap_or(("", path));
    let file = modules.rsplit("::").next().filter(|module| !module.is_empty());
    let test = format!("#[test]\nfn {name}(");
    let mut waiting = vec![directory.to_owned()];
    while let Some(directory) = waiting.pop() {
        let entries = std::fs::read_dir(&directory)
            .with_context(|| format!("read {}", directory.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                waiting.push(path);
                continue;
            }
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            let named = file.is_none_or(|file| stem.as_deref() == Some(file));
            if named && path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path)?;
                if text.contains(&test) {
                    return Ok(true);
                }
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_table_is_taken_apart() {
        let line = "| G1 | text | simulator; `vdi: gc::x`, `e2e: crash` | `a_b`, `c` |\n";
        let claim = Claim {
            name: "G1".to_owned(),
            held_by: vec!["vdi: gc::x".to_owned(), "e2e: crash".to_owned()],
            mutants: vec!["a_b".to_owned(), "c".to_owned()],
        };
        assert_eq!(claims(&format!("# x\n{line}")), [claim]);
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        let workspace = Workspace::find().unwrap();
        let there = |name: &str| exists(&workspace, name).unwrap();
        assert!(there("device: open::a_second_process_is_refused"));
        assert!(there("e2e: crash") && there("bench: open-after-kill"));
        for nothing in ["device: full::a_second_process_is_refused", "vdi: x", "e2e: x", "bench: x"]
        {
            assert!(!there(nothing), "{nothing}");
        }
    }

    #[test]
    fn every_guarantee_names_tests_that_are_there() {
        check(&Workspace::find().unwrap()).unwrap();
    }
}
