//! Licences, sources and double versions of what we compile, from `cargo tree`.
//!
//! deny.toml says the same to cargo-deny, which releases run for its advisories; compiling that
//! takes minutes, so the gate checks by itself what needs no network. `cargo tree` knows which
//! optional dependencies are really used; the lock file and `cargo metadata` do not.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};

use crate::workspace::Workspace;

/// Licences that ask nothing of those who link us.
const ALLOWED: [&str; 14] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// A package of the tree.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Package {
    name: String,
    version: String,
    /// Where it comes from, if that is not the registry.
    place: String,
    licence: String,
}

/// Checks every package that this platform compiles.
///
/// # Errors
/// Lists every package that breaks a rule.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let mut findings = Vec::new();
    for package in tree(workspace, "normal,build,dev", "")? {
        findings.extend(package.findings(&workspace.root.display().to_string()));
    }
    // What only runs at compile time (macros, build scripts, tests) may be there twice, and so may
    // what only this program links: its client for the benchmarks is older than the rest.
    findings.extend(doubles(&tree(workspace, "normal,no-proc-macro", "--exclude xtask")?));
    ensure!(findings.is_empty(), "dependencies:\n  {}", findings.join("\n  "));
    Ok(())
}

/// The packages that the workspace, but for what `options` exclude, reaches over edges of these
/// kinds.
fn tree(workspace: &Workspace, edges: &str, options: &str) -> Result<BTreeSet<Package>> {
    let always = "tree --locked --workspace --prefix none --no-dedupe --target \
                  x86_64-unknown-linux-gnu --format {p}|{l} --edges";
    let text = workspace.cargo().words(always).arg(edges).words(options).read()?;
    let packages: BTreeSet<Package> = text.lines().filter_map(Package::parse).collect();
    ensure!(!packages.is_empty(), "cargo tree shows nothing");
    Ok(packages)
}

impl Package {
    /// Reads `name v1.2.3 (place)|licence`; the place is missing for what comes from the registry.
    fn parse(line: &str) -> Option<Self> {
        let (package, licence) = line.split_once('|')?;
        let mut words = package.splitn(3, ' ');
        Some(Self {
            name: words.next()?.to_owned(),
            version: words.next()?.trim_start_matches('v').to_owned(),
            place: words.next().unwrap_or_default().replace("(proc-macro)", "").trim().to_owned(),
            licence: licence.trim_end_matches(" (*)").to_owned(),
        })
    }

    /// Which rules it breaks; `root` is where our own packages lie.
    fn findings(&self, root: &str) -> Vec<String> {
        let mut findings = Vec::new();
        if !is_allowed(&self.licence) {
            findings.push(format!("{}: licence '{}' is not on the list", self.name, self.licence));
        }
        if !self.place.is_empty() && !self.place.starts_with(&format!("({root}")) {
            findings.push(format!("{}: comes from {}, not a registry", self.name, self.place));
        }
        findings
    }
}

/// Packages that are linked in two versions.
fn doubles(packages: &BTreeSet<Package>) -> Vec<String> {
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in packages {
        versions.entry(&package.name).or_default().insert(&package.version);
    }
    versions.retain(|_, versions| versions.len() > 1);
    versions
        .iter()
        .map(|(name, versions)| format!("{name}: linked in the versions {versions:?}"))
        .collect()
}

/// Evaluates a licence expression: `OR` needs one side allowed, `AND` both; `/` is an old `OR`.
fn is_allowed(expression: &str) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    let allowed = any_of(&mut rest);
    allowed && rest.is_empty()
}

fn any_of(words: &mut &[&str]) -> bool {
    let mut allowed = all_of(words);
    while take(words, "OR") {
        allowed |= all_of(words);
    }
    allowed
}

fn all_of(words: &mut &[&str]) -> bool {
    let mut allowed = one(words);
    while take(words, "AND") {
        allowed &= one(words);
    }
    allowed
}

fn one(words: &mut &[&str]) -> bool {
    if take(words, "(") {
        let allowed = any_of(words);
        return take(words, ")") && allowed;
    }
    let Some((&licence, rest)) = words.split_first() else { return false };
    *words = rest;
    if take(words, "WITH") {
        let Some((exception, rest)) = words.split_first() else { return false };
        *words = rest;
        return ALLOWED.contains(&format!("{licence} WITH {exception}").as_str());
    }
    ALLOWED.contains(&licence)
}

fn take(words: &mut &[&str], expected: &str) -> bool {
    match words.split_first() {
        Some((&word, rest)) if word == expected => {
            *words = rest;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licence_expressions_are_evaluated() {
        for good in [
            "MIT",
            "MIT OR Apache-2.0",
            "MIT/Apache-2.0",
            "GPL-2.0 OR MIT",
            "(MIT OR GPL-3.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
        ] {
            assert!(is_allowed(good), "{good}");
        }
        for bad in [
            "",
            "GPL-2.0-or-later",
            "MIT AND AGPL-3.0",
            "(MIT OR GPL-3.0) AND LGPL-2.1",
            "MIT WITH odd-exception",
            "MIT MIT",
            "(MIT",
            "none given",
        ] {
            assert!(!is_allowed(bad), "{bad}");
        }
    }

    #[test]
    fn each_rule_finds_its_breach() {
        let check = |line: &str, count: usize| {
            let package = Package::parse(line).unwrap();
            assert_eq!(package.findings("/src/parallax").len(), count, "{package:?}");
        };
        check("anyhow v1.0.104|MIT OR Apache-2.0", 0);
        check("parallax-base v0.1.0 (/src/parallax/crates/base)|Apache-2.0", 0);
        check("serde_derive v1.0.229 (proc-macro)|MIT", 0);
        check("viral v1.0.0|GPL-2.0-only", 1);
        check("nameless v1.0.0|", 1);
        check("forked v1.0.0 (https://host/forked?rev=1#1234)|MIT", 1);
        check("elsewhere v1.0.0 (/home/elsewhere)|AGPL-3.0", 2);
    }

    #[test]
    fn two_versions_are_found() {
        let check = |lines: &[&str], count: usize| {
            let packages = lines.iter().filter_map(|line| Package::parse(line)).collect();
            assert_eq!(doubles(&packages).len(), count, "{lines:?}");
        };
        check(&["a v1.0.0|MIT", "b v2.0.0|MIT"], 0);
        check(&["a v1.0.0|MIT", "a v2.0.0|MIT"], 1);
        check(&["a v1.0.0 (proc-macro)|MIT", "a v1.0.0|MIT"], 0);
    }
}
