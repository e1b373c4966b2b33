//! The README's promises: its two commands do all the set-up, and every command in it works.
//!
//! Blocks marked `sh` hold commands, one on a line. Those of `cargo xtask` are checked here
//! against the list of tasks; the end-to-end test `readme` runs the others, in the order in which
//! a person would.

use anyhow::{Context, Result, ensure};

use crate::TASKS;
use crate::workspace::Workspace;

/// The two commands that do all the set-up.
const SET_UP: [&str; 2] = ["cargo run --release -- quickstart", "cargo xtask test"];

/// Checks the README against this task runner.
///
/// # Errors
/// Lists what is promised and not there.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let findings = findings(&read(workspace)?);
    ensure!(findings.is_empty(), "README.md:\n  {}", findings.join("\n  "));
    Ok(())
}

/// The README's text.
///
/// # Errors
/// If there is none.
pub(crate) fn read(workspace: &Workspace) -> Result<String> {
    std::fs::read_to_string(workspace.root.join("README.md")).context("read README.md")
}

/// The commands in the `sh` blocks of a document, in order, without comments.
pub(crate) fn commands(document: &str) -> Vec<String> {
    let mut inside = false;
    let mut commands = Vec::new();
    for line in document.lines() {
        match line.trim() {
            "```sh" => inside = true,
            "```" => inside = false,
            text if inside => {
                let command = text.split(" #").next().unwrap_or_default().trim();
                if !command.is_empty() && !command.starts_with('#') {
                    commands.push(command.to_owned());
                }
            }
            _ => {}
        }
    }
    commands
}

fn findings(readme: &str) -> Vec<String> {
    let commands = commands(readme);
    let mut findings = Vec::new();
    for promised in SET_UP {
        if !commands.iter().any(|command| command == promised) {
            findings.push(format!("the set-up command `{promised}` is missing"));
        }
    }
    for command in &commands {
        let Some(rest) = command.strip_prefix("cargo xtask ") else { continue };
        let task = rest.split_whitespace().next().unwrap_or_default();
        if !TASKS.iter().any(|(name, _)| *name == task) {
            findings.push(format!("`{command}`: there is no such task"));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_taken_from_sh_blocks_only() {
        let text = "`ls`\n```sh\n# first\nparallax ls   # lists\n\ncargo xtask test\n```\n\
                    ```console\n$ rm -rf /\n```\n";
        assert_eq!(commands(text), ["parallax ls", "cargo xtask test"]);
    }

    #[test]
    fn missing_and_unknown_commands_are_found() {
        let good = "```sh\ncargo run --release -- quickstart\ncargo xtask test\n```\n";
        assert_eq!(findings(good).len(), 0);
        assert_eq!(findings("```sh\ncargo xtask test\n```\n").len(), 1);
        assert_eq!(findings(&format!("{good}```sh\ncargo xtask fly\n```\n")).len(), 1);
    }

    #[test]
    fn the_readme_keeps_its_promises() {
        check(&Workspace::find().unwrap()).unwrap();
    }
}
