//! What the daemon lets another process do: whatever waits in the kernel for a block device that the
//! daemon serves.
//!
//! Somebody who waits there cannot be killed before he is answered. A thread of the daemon would keep the
//! store's lock meanwhile, and the next daemon, which alone can answer after kill -9, would be refused.
//! Another process keeps nothing. It is this program once more under the name [`NAME`], asked for by
//! [`called`] before the command line is looked at; it says in its exit code what the kernel said.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use runtime::reactor::{EngineChoice, Reactor};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;

/// What such a process is called.
const NAME: &str = "parallax-block-device";

/// What it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aside {
    /// Make the block device of this number, which a process is about to serve.
    Start { number: u32, server: u32 },
    /// Find out whether the block device of this number is in use; `ResourceBusy` if it is.
    Use { number: u32 },
}

/// Lets another process do it. Blocks as long as that takes, which may be for as long as the device waits
/// for its server.
pub(crate) fn run(aside: Aside) -> io::Result<()> {
    let status = Command::new("/proc/self/exe")
        .arg0(NAME)
        .args(aside.words())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()?;
    match status.code() {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        None => Err(io::Error::other(status.to_string())),
    }
}

/// Whether this process is one of those; then what it has to say, when it has done what it was told.
#[must_use]
pub fn called() -> Option<ExitCode> {
    let mut words = std::env::args();
    if words.next().as_deref() != Some(NAME) {
        return None;
    }
    let outcome = Aside::parse(&words.collect::<Vec<_>>()).map(Aside::carry_out);
    let errno = match outcome {
        Some(Ok(())) => return Some(ExitCode::SUCCESS),
        Some(Err(error)) => error.raw_os_error().and_then(|errno| u8::try_from(errno).ok()),
        None => None,
    };
    let unknown = u8::try_from(rustix::io::Errno::INVAL.raw_os_error()).unwrap_or(u8::MAX);
    Some(ExitCode::from(errno.unwrap_or(unknown)))
}

impl Aside {
    fn words(self) -> Vec<String> {
        match self {
            Self::Start { number, server } => {
                vec!["start".to_owned(), number.to_string(), server.to_string()]
            }
            Self::Use { number } => vec!["use".to_owned(), number.to_string()],
        }
    }

    fn parse(words: &[String]) -> Option<Self> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match *words {
            ["start", number, server] => {
                Some(Self::Start { number: number.parse().ok()?, server: server.parse().ok()? })
            }
            ["use", number] => Some(Self::Use { number: number.parse().ok()? }),
            _ => None,
        }
    }

    fn carry_out(self) -> io::Result<()> {
        match self {
            Self::Start { number, server } => {
                // Nobody else would end it if there is no server any more that it could wait for.
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if rustix::process::getppid().map(|it| it.as_raw_nonzero().get().cast_unsigned())
                    != Some(server)
                {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                start(number, server)
            }
            Self::Use { number } => check_unused(number),
        }
    }
}

fn start(number: u32, server: u32) -> io::Result<()> {
    let reactor = Reactor::start(EngineChoice::Auto)?;
    let io = reactor.io().clone();
    let started = reactor.run(async move { ublk::start(&io, number, server).await })?;
    started.map_err(|error| match error {
        ublk::Error::Kernel { source, .. } => source,
        other => io::Error::other(other),
    })?;
    // Without it a device is served as well.
    let _ = keep_one_free(number);
    Ok(())
}

/// Keeps one slot in each queue of a device free. The kernel notices at once that a daemon was killed
/// only if it has not given it a request for every slot (`ublk_timeout` in Linux 6.12), and else after
/// 30 s. It waits for what is under way.
fn keep_one_free(number: u32) -> io::Result<()> {
    let file = format!("/sys/block/ublkb{number}/queue/nr_requests");
    let slots = std::fs::read_to_string(&file)?;
    let slots: u32 = slots.trim().parse().map_err(io::Error::other)?;
    std::fs::write(&file, slots.saturating_sub(1).to_string())
}

/// Mounted file systems, partitions in use, device-mapper and swap have claimed a device that is in use.
fn check_unused(number: u32) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(format!("/dev/ublkb{number}"), flags, Mode::empty())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_understood() {
        for aside in [Aside::Start { number: 7, server: 1234 }, Aside::Use { number: 0 }] {
            assert_eq!(Aside::parse(&aside.words()), Some(aside));
        }
        for nonsense in [&[][..], &["use"], &["start", "1"], &["use", "x"], &["use", "1", "2"]] {
            let words: Vec<_> = nonsense.iter().map(|&word| word.to_owned()).collect();
            assert_eq!(Aside::parse(&words), None, "{nonsense:?}");
        }
    }
}
