//! What can be judged without running anything: form, lints, licences, arrows, documents.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::console::Heading;
use crate::workspace::Workspace;
use crate::{arrows, guarantees, licences, readme};

/// Crates that may hold `unsafe`, each in named modules (house style: confine it), and the one file
/// of this program that does.
const UNSAFE_PLACES: [&str; 4] = [
    "crates/runtime/",
    "crates/device/",
    "crates/ublk/src/sys.rs",
    "xtask/src/bench/vhost_user/device.rs",
];

/// File names that say nothing about what is in them.
const EMPTY_NAMES: [&str; 5] = ["mod.rs", "utils.rs", "util.rs", "helpers.rs", "common.rs"];

/// One check: `Err` lists all that it found.
type Check = fn(&Workspace) -> Result<()>;

/// Runs every check of this module.
///
/// # Errors
/// The first check that finds something; its message lists all that it found.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    let checks: [(&str, Check); 7] = [
        ("formatting", formatting),
        ("clippy", clippy),
        ("licences", licences::check),
        ("arrows between crates", arrows::check),
        ("house style", style),
        ("README commands", readme::check),
        ("guarantees name their tests", guarantees::check),
    ];
    for (name, check) in checks {
        let heading = Heading::new(name);
        check(workspace)?;
        heading.done("ok");
    }
    Ok(())
}

/// Formatting of every crate, the fuzz targets included.
pub(crate) fn formatting(workspace: &Workspace) -> Result<()> {
    workspace.cargo().words("fmt --all --check").show()?;
    let fuzz = workspace.root.join("fuzz/Cargo.toml");
    if fuzz.exists() {
        workspace.cargo().words("fmt --check --manifest-path").arg(&fuzz).show()?;
    }
    Ok(())
}

/// Clippy over everything that compiles, tests too.
pub(crate) fn clippy(workspace: &Workspace) -> Result<()> {
    workspace
        .cargo()
        .words("clippy --quiet --workspace --all-targets --locked -- -D warnings")
        .show()
}

/// The API documentation, with every broken link an error.
pub(crate) fn docs(workspace: &Workspace) -> Result<()> {
    let run = workspace.cargo().words("doc --quiet --workspace --no-deps --locked");
    run.env("RUSTDOCFLAGS", "-D warnings").show()
}

/// Rules of the house style that a machine can see.
pub(crate) fn style(workspace: &Workspace) -> Result<()> {
    let mut findings = Vec::new();
    for path in sources(&workspace.root)? {
        let text = std::fs::read_to_string(&path)?;
        let name = path.strip_prefix(&workspace.root).unwrap_or(&path).display().to_string();
        findings
            .extend(style_findings(&name, &text).into_iter().map(|what| format!("{name}{what}")));
    }
    ensure!(findings.is_empty(), "house style:\n  {}", findings.join("\n  "));
    Ok(())
}

/// What is wrong with one source file, each as `: text` or `:line: text`.
fn style_findings(name: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let is_test = name.ends_with("/tests.rs") || name.contains("/tests/");
    if !is_test && !text.starts_with("//!") && !text.starts_with("#![") {
        findings.push(": does not start with a module comment (`//!`)".to_owned());
    }
    let file = Path::new(name).file_name().and_then(|file| file.to_str()).unwrap_or_default();
    if EMPTY_NAMES.contains(&file) && !is_test {
        findings.push(format!(": '{file}' says nothing about its contents"));
    }
    for (index, line) in text.lines().enumerate() {
        // Split, so that this file passes its own test.
        for left_over in [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("dbg", "!(")] {
            if line.contains(left_over) {
                findings.push(format!(":{}: {left_over} is left behind", index + 1));
            }
        }
        let is_unsafe = line.contains(concat!("unsafe ", "{"));
        if is_unsafe && !UNSAFE_PLACES.iter().any(|allowed| name.starts_with(allowed)) {
            findings.push(format!(":{}: unsafe outside of {UNSAFE_PLACES:?}", index + 1));
        }
    }
    findings
}

/// Every Rust file of the project.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut waiting: Vec<PathBuf> =
        ["crates", "xtask", "fuzz"].iter().map(|directory| root.join(directory)).collect();
    while let Some(directory) = waiting.pop() {
        if !directory.is_dir() || directory.ends_with("target") {
            continue;
        }
        let entries = std::fs::read_dir(&directory);
        for entry in entries.with_context(|| format!("list {}", directory.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_of_style_finds_its_breach() {
        let check = |name: &str, text: &str, count: usize| {
            assert_eq!(style_findings(name, text).len(), count, "{name}: {text}");
        };
        check("crates/base/src/lib.rs", "//! Owns sizes.\n", 0);
        check("crates/base/src/lib.rs", "use std::fmt;\n", 1);
        check("crates/base/src/size/tests.rs", "use super::*;\n", 0);
        check("crates/base/src/utils.rs", "//! Things.\n", 1);
        check("crates/base/src/lib.rs", concat!("//! x\n// TO", "DO: later\n"), 1);
        check("crates/vdi/src/lib.rs", concat!("//! x\nlet y = unsafe ", "{ f() };\n"), 1);
        check("crates/device/src/ring.rs", concat!("//! x\nlet y = unsafe ", "{ f() };\n"), 0);
    }
}
