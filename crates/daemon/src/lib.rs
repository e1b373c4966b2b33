//! The daemon: threads, wiring and the control plane around one store.
//!
//! ```text
//!  engine thread                          main thread (tokio)
//!  reactor ── store ── NBD sessions  ◄──  control plane (HTTP on a unix socket), signals
//!                                   calls
//! ```
//!
//! Invariants:
//! - the store is touched on the engine thread only; tokio never sees it;
//! - the store is locked before a socket is bound, and sockets are gone before it is closed;
//! - a daemon that says that it is ready answers on all of its sockets.

mod catalog;
pub mod config;
mod control;
mod convert;
mod engine;
pub mod offline;
mod open;
mod socket_file;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::{DaemonStatus, Error, Kind};
pub use config::{Config, NbdAddress, TlsFiles, own_nbd_socket};
use control::Control;
use engine::{Engine, Started};
use sd_notify::NotifyState;
use socket_file::SocketFile;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// How long requests of the control plane may take to end when the daemon stops.
const CONTROL_END_MAX: Duration = Duration::from_millis(500);

/// A daemon that is ready.
#[derive(Debug)]
pub struct Daemon {
    status: Arc<DaemonStatus>,
    runtime: tokio::runtime::Runtime,
    engine: Engine,
    control: tokio::net::UnixListener,
    routes: engine::EngineHandle,
    socket_file: SocketFile,
    signals: Signals,
}

#[derive(Debug)]
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Daemon {
    /// Opens the store and all sockets, and tells the service manager. Blocks while the store is
    /// recovered. SIGTERM and SIGINT are caught from here on.
    ///
    /// # Errors
    /// `Busy` if another daemon has the store or a socket; `NotFound` if there is no store;
    /// `Damaged`; `Invalid` for what the configuration forbids. Nothing is left behind.
    pub fn start(config: Config) -> Result<Self, Error> {
        let plan = config.plan()?;
        let (store, socket) = (absolute(&plan.store), plan.socket.clone());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::system("start the control plane", &e))?;
        let (engine, started) = Engine::start(plan)?;
        let Started { handle, device, opened, nbd } = started;
        let prepared = {
            let _inside = runtime.enter();
            prepare(&socket)
        };
        let (control, socket_file, signals) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                runtime.block_on(engine.stop())?;
                return Err(error);
            }
        };
        let status = Arc::new(DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started: jiff::Timestamp::now(),
            store: store.display().to_string(),
            device,
            opened,
            nbd,
        });
        report(&status);
        notify(NotifyState::Ready);
        Ok(Self { status, runtime, engine, control, routes: handle, socket_file, signals })
    }

    /// What it serves, and where.
    #[must_use]
    pub fn status(&self) -> &DaemonStatus {
        &self.status
    }

    /// Creates a VDI unless there is one of this name; `true` if it did. Durable on return.
    ///
    /// # Errors
    /// As for `vdi::Store::create`.
    pub fn create_unless_there(&self, name: &str, size_bytes: u64) -> Result<bool, Error> {
        let name = name.to_owned();
        let create = self.routes.call(async move |served: &engine::Served| {
            match served.store.create(&name, size_bytes).await {
                Ok(_) => Ok(true),
                Err(error) if error.kind() == base::ErrorKind::Exists => Ok(false),
                Err(error) => Err(error),
            }
        });
        self.runtime.block_on(create)
    }

    /// Serves until SIGTERM or SIGINT, then stops cleanly. A second signal ends it at once.
    ///
    /// # Errors
    /// If the engine fails, or the store cannot be closed; nothing acknowledged is lost then, and
    /// the next start recovers.
    pub fn run(self) -> Result<(), Error> {
        let Self { status, runtime, mut engine, control, routes, socket_file, mut signals } = self;
        let (stop, stopping) = watch::channel(false);
        let serve = control::serve(control, Control { engine: routes, status }, stopping);
        runtime.block_on(async move {
            let control = tokio::spawn(serve);
            tokio::select! {
                () = signals.any() => {}
                ended = &mut engine.ended => {
                    let gone = || Error::new(Kind::Io, "the engine ended by itself");
                    return Err(ended.ok().and_then(Result::err).unwrap_or_else(gone));
                }
            }
            tracing::info!("stopping");
            notify(NotifyState::Stopping);
            drop(socket_file);
            // Nobody listens for this only if the control plane has ended already.
            let _ = stop.send(true);
            let end = async {
                if tokio::time::timeout(CONTROL_END_MAX, control).await.is_err() {
                    tracing::warn!("control requests are still under way; stopping without them");
                }
                engine.stop().await
            };
            tokio::select! {
                outcome = end => outcome,
                () = signals.any() => Err(Error::new(
                    Kind::Io,
                    "stopped by a second signal before the store was closed; the next start \
                     recovers it",
                )),
            }
        })
    }
}

impl Signals {
    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Binds the control socket and catches signals; must run inside the tokio runtime.
fn prepare(socket: &Path) -> Result<(tokio::net::UnixListener, SocketFile, Signals), Error> {
    let (listener, file) = SocketFile::bind(socket, true, |path| {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        tokio::net::UnixListener::from_std(listener)
    })?;
    let catch = |kind| signal(kind).map_err(|e| Error::system("catch signals", &e));
    let signals = Signals {
        terminate: catch(SignalKind::terminate())?,
        interrupt: catch(SignalKind::interrupt())?,
    };
    Ok((listener, file, signals))
}

/// Tells the log what opening the store found.
fn report(status: &DaemonStatus) {
    let DaemonStatus { store, device, opened, .. } = status;
    tracing::info!(store, device, clean = opened.clean, "opened");
    if !opened.clean {
        let (replayed, dropped) = (opened.records_replayed, opened.records_dropped);
        tracing::info!(replayed, dropped, "recovered after an unclean stop");
    }
    for alarm in &opened.alarms {
        tracing::error!("{alarm}");
    }
}

fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot reach the service manager");
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
