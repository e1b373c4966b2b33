//! Work that blocks, on a thread of its own: signals are heard meanwhile.

use api::{Error, Kind};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGINT and SIGTERM, caught so that a command can clean up behind itself.
pub(super) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    pub(super) fn catch() -> Result<Self, Error> {
        let catch = |kind| signal(kind).map_err(|e| Error::system("catch signals", &e));
        let interrupt = catch(SignalKind::interrupt())?;
        Ok(Self { interrupt, terminate: catch(SignalKind::terminate())? })
    }

    pub(super) async fn any(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Runs `work`, and waits for it or for a signal. A thread that still works then ends with the
/// process: tokio's own would be waited for, and one that reads a pipe may never come back.
pub(super) async fn run<T: Send + 'static>(
    name: &str,
    interrupts: &mut Interrupts,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let (end, ended) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            // Nobody listens any more after a signal.
            let _ = end.send(work());
        })
        .map_err(|e| Error::system("start a thread", &e))?;
    tokio::select! {
        outcome = ended => {
            outcome.map_err(|_| Error::new(Kind::Io, format!("the thread {name} has died")))
        }
        () = interrupts.any() => Err(Error::new(Kind::Io, "interrupted")),
    }
}
