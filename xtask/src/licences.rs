//! Licences, sources and double versions of everything that we link, from `cargo metadata`.
//!
//! deny.toml says the same to cargo-deny, which releases run for its advisories; compiling that
//! takes minutes, so the gate checks by itself what needs no network.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

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

/// Crates that may be there in two versions, each with the reason.
const DOUBLES_ALLOWED: [(&str, &str); 0] = [];

/// Checks every package of the lock file that this platform compiles.
///
/// # Errors
/// Lists every package that breaks a rule.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let findings = findings(&workspace.metadata()?)?;
    ensure!(findings.is_empty(), "dependencies:\n  {}", findings.join("\n  "));
    Ok(())
}

fn findings(metadata: &Value) -> Result<Vec<String>> {
    let packages = metadata.get("packages").and_then(Value::as_array);
    let mut findings = Vec::new();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages.context("cargo metadata without packages")? {
        let text = |key: &str| package.get(key).and_then(Value::as_str);
        let name = text("name").context("package without a name")?;
        versions.entry(name).or_default().push(text("version").unwrap_or_default());
        let licence = text("license").unwrap_or("none given");
        if !is_allowed(licence) {
            findings.push(format!("{name}: licence '{licence}' is not on the list"));
        }
        // A path dependency has no source: that is ourselves.
        if text("source").is_some_and(|source| !source.starts_with("registry+")) {
            findings.push(format!("{name}: does not come from a registry"));
        }
    }
    for (name, versions) in versions.iter().filter(|(_, versions)| versions.len() > 1) {
        if !DOUBLES_ALLOWED.iter().any(|(allowed, _)| allowed == name) {
            findings.push(format!("{name}: linked in versions {}", versions.join(" and ")));
        }
    }
    Ok(findings)
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
        let package = |name: &str, version: &str, licence: &str, source: Value| serde_json::json!({ "name": name, "version": version, "license": licence, "source": source });
        let registry = "registry+https://index";
        let check = |packages: Vec<Value>, count: usize| {
            let metadata = serde_json::json!({ "packages": packages });
            assert_eq!(findings(&metadata).unwrap().len(), count);
        };
        check(vec![package("ours", "1.0.0", "Apache-2.0", Value::Null)], 0);
        check(vec![package("gpl", "1.0.0", "GPL-2.0", registry.into())], 1);
        check(vec![package("git", "1.0.0", "MIT", "git+https://host".into())], 1);
        let twice = |version| package("twice", version, "MIT", registry.into());
        check(vec![twice("1.0.0"), twice("2.0.0")], 1);
    }
}
