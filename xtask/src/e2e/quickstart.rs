//! The first five minutes of a person: the README's commands, and those that `quickstart` prints.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock;
use crate::console;
use crate::process::{Run, Running, tail};
use crate::readme;
use crate::workspace;

use super::Bed;

const READY_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// The README's first command; it stays in the foreground.
const FIRST: &str = "cargo run --release -- quickstart";

/// Runs them in an empty directory. There is nothing here for a peer.
///
/// # Errors
/// If the directory cannot be prepared.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    let Some(binary) = bed.parallax().map(ToOwned::to_owned) else {
        console::say("  the peer has no quickstart");
        return Ok(());
    };
    let person = Person { binary, directory: bed.data.join("empty") };
    std::fs::create_dir_all(&person.directory)?;
    person.lay_out_release_directory()?;

    let mut first = None;
    bed.check("quickstart gets ready in an empty directory", || {
        first = Some(person.quickstart("first.log")?);
        Ok(())
    });
    let Some((daemon, said)) = first else { return Ok(()) };
    bed.check("every command that it prints works", || person.run_all(&printed_commands(&said)?));
    bed.check("every command of the README works", || person.run_all(&readme_commands()?));
    bed.check("SIGTERM stops it cleanly and fast", || stop(daemon));
    bed.check("started again, it goes on where it stopped", || {
        let (daemon, said) = person.quickstart("second.log")?;
        ensure!(!said.contains("made"), "it made the store again: {said}");
        person.run_all(&printed_commands(&said)?)?;
        stop(daemon)
    });
    Ok(())
}

/// A directory where somebody tries things out.
struct Person {
    binary: PathBuf,
    directory: PathBuf,
}

impl Person {
    /// `target/release/parallax` as cargo would have left it.
    fn lay_out_release_directory(&self) -> Result<()> {
        let release = self.directory.join("target/release");
        std::fs::create_dir_all(&release)?;
        std::os::unix::fs::symlink(&self.binary, release.join("parallax"))?;
        Ok(())
    }

    /// Starts it and waits until it has said what to do next.
    fn quickstart(&self, log: &str) -> Result<(Running, String)> {
        let log = self.directory.join(log);
        let run = Run::new(&self.binary).arg("quickstart").dir(&self.directory);
        let mut daemon = run.background(&log)?;
        let mut said = String::new();
        let ready = clock::wait_until(READY_LIMIT, || {
            said = std::fs::read_to_string(&log).unwrap_or_default();
            said.contains("Ctrl-C") || !daemon.is_alive()
        });
        ensure!(ready && said.contains("ready"), "quickstart did not get ready:\n{}", tail(&said));
        Ok((daemon, said))
    }

    /// Runs the commands in one shell, one after the other, as somebody who types them.
    fn run_all(&self, commands: &[String]) -> Result<()> {
        ensure!(!commands.is_empty(), "there are no commands");
        let script = commands.join("\n");
        let run = Run::new("sh").arg("-e").arg("-x").arg("-c").arg(&script).dir(&self.directory);
        run.limit(Duration::from_secs(120)).read().map(drop)
    }
}

/// What `quickstart` suggests: the indented lines that are no comments.
fn printed_commands(said: &str) -> Result<Vec<String>> {
    let indented = said.lines().filter_map(|line| line.strip_prefix("  "));
    let commands: Vec<String> =
        indented.map(str::trim).filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
    ensure!(commands.len() >= 2, "quickstart suggests too little:\n{said}");
    Ok(commands)
}

/// What the README has a person type while `quickstart` runs.
fn readme_commands() -> Result<Vec<String>> {
    let text = std::fs::read_to_string(workspace::root().join("README.md"))?;
    let commands = readme::commands(&text);
    let set_up = |command: &&String| *command != FIRST && !command.starts_with("cargo xtask");
    ensure!(commands.iter().any(|command| command == FIRST), "the README does not start with it");
    Ok(commands.iter().filter(set_up).cloned().collect())
}

fn stop(mut daemon: Running) -> Result<()> {
    let status = daemon.stop(STOP_LIMIT).context("stop")?;
    ensure!(status.success(), "{status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggestions_are_told_from_explanations() {
        let said =
            "ready: x\n\nTo try next:\n\n  # a comment\n  parallax ls\n  qemu-img info 'u'\n";
        assert_eq!(printed_commands(said).unwrap(), ["parallax ls", "qemu-img info 'u'"]);
        assert!(printed_commands("ready").is_err());
    }

    #[test]
    fn the_readme_has_more_than_the_set_up() {
        let commands = readme_commands().unwrap();
        assert!(commands.iter().any(|command| command.starts_with("parallax ")), "{commands:?}");
    }
}
