//! The keeper of a mount: gives the connection to the kernel to the daemon, and to the next daemon
//! when that one has ended.
//!
//! ```text
//!               greeting                 S: it is served
//!  Connecting ───────────────► Greeted ───────────────────► Served
//!      ▲                          │                           │  connection ends: the daemon has ended
//!      └──────────────────────────┴───────────────────────────┘
//!   unmounted, a signal, or F: it cannot be served ──► end
//! ```
//!
//! Meanwhile the kernel keeps requests; whoever waits for one waits until the next daemon answers.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use api::{Error, Kind, mount};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::net::UnixStream as Connection;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::kernel::Mount;
use crate::commands::background::Interrupts;
use crate::output;

/// How often the next daemon is looked for. A daemon that is started anew takes longer than that.
const LOOK_PERIOD: Duration = Duration::from_millis(50);

/// The pause after a daemon has said that it cannot serve the mount.
const FAILED_PAUSE: Duration = Duration::from_secs(1);

/// Most bytes of what a daemon says about why it cannot serve a mount.
const REASON_BYTES_MAX: usize = 4096;

/// What came over a connection.
enum News {
    /// The mount is served.
    Serving,
    /// The daemon has ended.
    Ended,
    /// The mount is gone.
    Unmounted,
    /// The daemon cannot serve it.
    Failed(String),
}

/// Connects to the daemon with this control socket.
pub(super) fn connect(control: &Path) -> Result<UnixStream, Error> {
    let path = mount::socket(control);
    UnixStream::connect(&path).map_err(|error| {
        let message = format!(
            "no daemon answers at {}: {error}; start one with: parallax serve PATH, or name its \
             socket with --socket",
            path.display()
        );
        Error::new(Kind::Unreachable, message)
    })
}

/// Mounts at a directory, and keeps the mount until it is gone. Says `ready` when it is served for the
/// first time.
pub(super) async fn keep(
    dir: &str,
    door: UnixStream,
    control: &Path,
    ready: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error> {
    // Before there is anything that a signal could leave behind.
    let mut signals = Signals::catch()?;
    let mount = Mount::new(dir)?;
    let mut ready = Some(ready);
    let first = greet(door, &mount).map_err(|e| Error::system("greet the daemon", &e))?;
    let mut connection = Some(first);
    let mut pause = LOOK_PERIOD;
    loop {
        tokio::select! {
            news = next_news(&mut connection) => match news {
                News::Serving => {
                    pause = LOOK_PERIOD;
                    if let Some(ready) = ready.take() {
                        ready()?;
                    }
                }
                News::Unmounted => return Ok(()),
                News::Failed(reason) if ready.is_some() => {
                    let message = format!("the daemon cannot serve the mount: {reason}");
                    return Err(Error::new(Kind::Io, message));
                }
                // There are users: what ails this daemon may pass, or be mended in the next.
                News::Failed(reason) => {
                    output::complain(&format!("parallax: {dir} is not served: {reason}"));
                    pause = FAILED_PAUSE;
                }
                // A daemon that serves it tells; nobody else does.
                News::Ended if mount.is_gone() => return Ok(()),
                News::Ended => {
                    tokio::time::sleep(pause).await;
                    let door = UnixStream::connect(mount::socket(control));
                    connection = door.and_then(|door| greet(door, &mount)).ok();
                }
            },
            () = signals.any() => match mount.unmount() {
                Ok(()) => return Ok(()),
                Err(error) => output::complain(&format!("parallax: {error}")),
            },
        }
    }
}

/// Gives the connection to the kernel to a daemon.
fn greet(door: UnixStream, mount: &Mount) -> std::io::Result<Connection> {
    let greeting = mount::greet(mount.dir()).ok_or(std::io::ErrorKind::InvalidInput)?;
    let files: [BorrowedFd<'_>; 1] = [mount.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    let sent = sendmsg(&door, &[IoSlice::new(&greeting)], &mut control, SendFlags::NOSIGNAL)?;
    if sent < greeting.len() {
        return Err(std::io::ErrorKind::WriteZero.into());
    }
    door.set_nonblocking(true)?;
    Connection::from_std(door)
}

/// Waits for what the daemon says next.
async fn next_news(connection: &mut Option<Connection>) -> News {
    let Some(open) = connection else { return News::Ended };
    let mut byte = [0];
    let news = match read(open, &mut byte).await {
        1 => match byte {
            [mount::SERVING] => News::Serving,
            [mount::UNMOUNTED] => News::Unmounted,
            [mount::FAILED] => {
                let mut reason = vec![0; REASON_BYTES_MAX];
                let length = read(open, &mut reason).await;
                reason.truncate(length);
                News::Failed(String::from_utf8_lossy(&reason).into_owned())
            }
            _ => News::Failed("it says what is not understood; is it of another version?".into()),
        },
        _ => News::Ended,
    };
    if !matches!(news, News::Serving) {
        *connection = None;
    }
    news
}

/// Reads some bytes; 0 at the end, however it came.
async fn read(connection: &Connection, into: &mut [u8]) -> usize {
    loop {
        if connection.readable().await.is_err() {
            return 0;
        }
        match connection.try_read(into) {
            Ok(count) => return count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return 0,
        }
    }
}

/// The signals that ask to unmount.
struct Signals {
    interrupts: Interrupts,
    /// The terminal has gone.
    hangup: Signal,
}

impl Signals {
    fn catch() -> Result<Self, Error> {
        let interrupts = Interrupts::catch()?;
        let hangup = signal(SignalKind::hangup());
        Ok(Self { interrupts, hangup: hangup.map_err(|e| Error::system("catch signals", &e))? })
    }

    async fn any(&mut self) {
        tokio::select! {
            () = self.interrupts.any() => {}
            _ = self.hangup.recv() => {}
        }
    }
}
