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

/// A block of code in a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// What it is marked as, such as `sh`.
    pub(crate) language: String,
    /// Its lines.
    pub(crate) text: String,
}

/// The blocks of code in a document, in order.
pub(crate) fn blocks(document: &str) -> Vec<Block> {
    let mut open: Option<Block> = None;
    let mut blocks = Vec::new();
    for line in document.lines() {
        match (line.trim().strip_prefix("```"), &mut open) {
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(language), None) => {
                open = Some(Block { language: language.to_owned(), text: String::new() });
            }
            (None, Some(block)) => {
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, None) => {}
        }
    }
    blocks
}

/// The commands in the `sh` blocks of a document, one on a line, in order, without comments.
pub(crate) fn commands(document: &str) -> Vec<String> {
    let blocks = blocks(document).into_iter().filter(|block| block.language == "sh");
    let text: String = blocks.map(|block| block.text).collect();
    let command = |line: &str| line.split(" #").next().unwrap_or_default().trim().to_owned();
    let is_command = |line: &String| !line.is_empty() && !line.starts_with('#');
    text.lines().map(command).filter(is_command).collect()
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
    fn blocks_keep_their_lines() {
        let text = "a\n```xml\n<a>\n  <b/>\n</a>\n```\n`c`\n```sh\nls \\\n    -l\n```\n";
        let block =
            |language: &str, text: &str| Block { language: language.into(), text: text.into() };
        let expected = [block("xml", "<a>\n  <b/>\n</a>\n"), block("sh", "ls \\\n    -l\n")];
        assert_eq!(blocks(text), expected);
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
