//! Completion scripts, man pages and docs/operations/cli.md, all made from `args`.

use std::path::Path;

use api::Error;
use clap::CommandFactory;
use clap_complete::Shell;
use serde_json::json;

use crate::args::Cli;
use crate::output;

pub(super) fn completion(shell: Shell) -> Result<(), Error> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "parallax", &mut script);
    output::print(String::from_utf8_lossy(&script).trim_end())
}

pub(super) fn man(dir: &Path, json: bool) -> Result<(), Error> {
    let shown = dir.display();
    std::fs::create_dir_all(dir).map_err(|e| Error::system(&format!("create {shown}"), &e))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .map_err(|e| Error::system(&format!("write man pages into {shown}"), &e))?;
    if json {
        return output::print_json(&json!({ "directory": dir }));
    }
    output::print(&format!("wrote man pages into {shown}; read one with: man {shown}/parallax.1"))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use clap::Command;

    use super::*;

    /// docs/operations/cli.md, as it must be.
    fn markdown() -> String {
        let mut root = Cli::command().term_width(96);
        root.build();
        let mut text = String::from(
            "# The command line\n\n\
             Made from the definitions in crates/cli/src/args.rs and held to them by a test; \
             to write it anew:\n`PARALLAX_UPDATE_DOCS=1 cargo test -p parallax cli_md`.\n",
        );
        section(&mut text, &mut root, "##");
        text.push_str("\nEvery command also takes `--help` and the global options above.\n");
        for command in root.get_subcommands().filter(|command| command.get_name() != "help") {
            let mut command = command.clone();
            for option in ["help", "socket", "json"] {
                command = command.mut_arg(option, |option| option.hide(true));
            }
            section(&mut text, &mut command, "###");
        }
        text
    }

    fn section(text: &mut String, command: &mut Command, heading: &str) {
        let name = command.get_bin_name().unwrap_or("parallax").to_owned();
        let help = command.render_long_help().to_string();
        let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
        write!(text, "\n{heading} {name}\n\n```text\n{}\n```\n", lines.join("\n").trim_end())
            .unwrap();
    }

    #[test]
    fn cli_md_is_what_the_command_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/operations/cli.md");
        let made = markdown();
        if std::env::var_os("PARALLAX_UPDATE_DOCS").is_some() {
            std::fs::write(path, &made).unwrap();
        }
        let written = std::fs::read_to_string(path).unwrap();
        assert!(
            written == made,
            "docs/operations/cli.md is out of date; write it anew with \
             PARALLAX_UPDATE_DOCS=1 cargo test -p parallax cli_md"
        );
    }
}
