//! The arrows between our crates: the table in ARCHITECTURE.md against what cargo resolves.
//!
//! The table is the design, cargo the fact; both directions are compared, so that an arrow is
//! neither added silently nor left in the table after it is gone. Only ordinary dependencies
//! count: a test may use anything below or beside it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::workspace::Workspace;

/// Who depends on whom, by short names.
type Arrows = BTreeMap<String, BTreeSet<String>>;

/// First row of the table in ARCHITECTURE.md.
const TABLE_HEAD: [&str; 2] = ["crate", "depends on"];

/// Crates below `daemon`, where nothing may know threads of tokio, JSON or a command line.
const ENGINE: [&str; 8] =
    ["base", "runtime", "ondisk", "device", "disk", "blockstore", "vdi", "nbd"];
const BANNED_BELOW_DAEMON: [&str; 5] = ["tokio", "serde_json", "serde", "clap", "anyhow"];

/// Compares the table with the workspace.
///
/// # Errors
/// Lists every arrow that only one of them has.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let path = workspace.root.join("ARCHITECTURE.md");
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let metadata = workspace.metadata()?;
    let mut findings = compare(&parse_table(&text)?, &actual_arrows(&metadata)?);
    findings.extend(banned(&metadata)?);
    ensure!(findings.is_empty(), "arrows between crates:\n  {}", findings.join("\n  "));
    Ok(())
}

/// Reads the table: `` | `vdi` | `base`, `disk` | ``, one row per crate, more columns ignored.
fn parse_table(text: &str) -> Result<Arrows> {
    let mut rows = text.lines().map(cells).skip_while(|row| !starts_with(row, &TABLE_HEAD));
    rows.next().context("ARCHITECTURE.md has no table with the head `| crate | depends on |`")?;
    let mut arrows = Arrows::new();
    for row in rows.skip(1).take_while(|row| row.len() >= 2) {
        let [name, depends_on, ..] = row.as_slice() else { continue };
        let names = ticked(name);
        let [name] = names.as_slice() else { anyhow::bail!("row without one crate: {row:?}") };
        let double = arrows.insert(name.clone(), ticked(depends_on).into_iter().collect());
        ensure!(double.is_none(), "the table has two rows for `{name}`");
    }
    Ok(arrows)
}

fn cells(line: &str) -> Vec<String> {
    let inner = line.trim().strip_prefix('|').and_then(|line| line.strip_suffix('|'));
    let split = |inner: &str| inner.split('|').map(|cell| cell.trim().to_owned()).collect();
    inner.map(split).unwrap_or_default()
}

fn starts_with(row: &[String], head: &[&str]) -> bool {
    row.len() >= head.len() && row.iter().zip(head).all(|(cell, want)| cell == want)
}

/// The words in backticks.
fn ticked(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The arrows that cargo resolves.
fn actual_arrows(metadata: &Value) -> Result<Arrows> {
    let packages = members(metadata)?;
    let ours: BTreeSet<&str> = packages.iter().filter_map(|package| name_of(package)).collect();
    let mut arrows = Arrows::new();
    for package in &packages {
        let name = name_of(package).context("package without a name")?;
        let depends_on = dependencies(package).filter(|name| ours.contains(name)).map(short);
        arrows.insert(short(name), depends_on.collect());
    }
    Ok(arrows)
}

/// Dependencies outside the workspace that the engine may not have.
fn banned(metadata: &Value) -> Result<Vec<String>> {
    let mut findings = Vec::new();
    for package in members(metadata)? {
        let name = short(name_of(package).unwrap_or_default());
        if !ENGINE.contains(&name.as_str()) {
            continue;
        }
        for dependency in dependencies(package).filter(|name| BANNED_BELOW_DAEMON.contains(name)) {
            findings.push(format!("`{name}` uses {dependency}, which nothing below `daemon` may"));
        }
    }
    Ok(findings)
}

/// Packages of the workspace.
fn members(metadata: &Value) -> Result<Vec<&Value>> {
    let list = |key: &str| metadata.get(key).and_then(Value::as_array);
    let members = list("workspace_members").context("cargo metadata without members")?;
    let packages = list("packages").context("cargo metadata without packages")?;
    let is_member = |package: &&Value| package.get("id").is_some_and(|id| members.contains(id));
    Ok(packages.iter().filter(is_member).collect())
}

fn name_of(package: &Value) -> Option<&str> {
    package.get("name").and_then(Value::as_str)
}

/// Names of a package's ordinary dependencies: those for tests and build scripts have a kind.
fn dependencies(package: &Value) -> impl Iterator<Item = &str> {
    let all = package.get("dependencies").and_then(Value::as_array);
    let ordinary = |dependency: &&Value| dependency.get("kind").is_none_or(Value::is_null);
    all.into_iter().flatten().filter(ordinary).filter_map(name_of)
}

/// `parallax-vdi` is `vdi` among ourselves; the command itself stays `parallax`.
fn short(name: &str) -> String {
    name.strip_prefix("parallax-").unwrap_or(name).to_owned()
}

fn compare(table: &Arrows, actual: &Arrows) -> Vec<String> {
    let mut findings = Vec::new();
    let names: BTreeSet<&String> = table.keys().chain(actual.keys()).collect();
    for name in names {
        let (Some(wanted), Some(found)) = (table.get(name), actual.get(name)) else {
            let place = if table.contains_key(name) { "the workspace" } else { "the table" };
            findings.push(format!("`{name}` is missing in {place}"));
            continue;
        };
        for extra in found.difference(wanted) {
            findings.push(format!("`{name}` depends on `{extra}`, which the table does not allow"));
        }
        for gone in wanted.difference(found) {
            findings.push(format!("the table says `{name}` depends on `{gone}`: it does not"));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "text\n\n| crate | depends on | holds |\n|---|---|---|\n\
                         | `base` | – | sizes |\n| `disk` | `base`, `runtime` | waist |\n\nmore\n";

    fn arrows(pairs: &[(&str, &[&str])]) -> Arrows {
        let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        pairs.iter().map(|(name, to)| ((*name).to_owned(), set(to))).collect()
    }

    #[test]
    fn the_table_is_read() {
        let expected = arrows(&[("base", &[]), ("disk", &["base", "runtime"])]);
        assert_eq!(parse_table(TABLE).unwrap(), expected);
        assert!(parse_table("| crate | uses |\n").is_err());
    }

    #[test]
    fn every_difference_is_found() {
        let check = |actual: &[(&str, &[&str])], count: usize| {
            assert_eq!(compare(&parse_table(TABLE).unwrap(), &arrows(actual)).len(), count);
        };
        check(&[("base", &[]), ("disk", &["base", "runtime"])], 0);
        check(&[("base", &["disk"]), ("disk", &["base", "runtime"])], 1);
        check(&[("base", &[]), ("disk", &["base"])], 1);
        check(&[("base", &[])], 1);
        check(&[("base", &[]), ("disk", &["base", "runtime"]), ("vdi", &[])], 1);
    }

    #[test]
    fn only_ordinary_dependencies_of_members_count() {
        let metadata = serde_json::json!({
            "workspace_members": ["a", "b"],
            "packages": [
                { "id": "a", "name": "parallax-vdi", "dependencies": [
                    { "name": "parallax-base", "kind": null },
                    { "name": "serde_json", "kind": null },
                    { "name": "parallax-sim", "kind": "dev" } ] },
                { "id": "b", "name": "parallax-base", "dependencies": [] },
                { "id": "c", "name": "tokio", "dependencies": [
                    { "name": "parallax-base", "kind": null } ] },
            ],
        });
        let expected = arrows(&[("base", &[]), ("vdi", &["base"])]);
        assert_eq!(actual_arrows(&metadata).unwrap(), expected);
        assert_eq!(banned(&metadata).unwrap().len(), 1);
    }

    #[test]
    fn the_workspace_keeps_to_its_table() {
        check(&Workspace::find().unwrap()).unwrap();
    }
}
