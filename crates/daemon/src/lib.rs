//! The daemon: threads, wiring and the control plane around one store.
//!
//! ```text
//!  engine thread                          main thread (tokio)
//!  reactor ── store ── sessions  ◄──  control plane (HTTP on a unix socket), signals
//!                               calls
//! ```
//!
//! Invariants:
//! - the store is touched on the engine thread only; tokio never sees it;
//! - the store is locked before a socket is bound, and files of sockets are gone before it is closed,
//!   unless another program takes over;
//! - a daemon that says that it is ready answers on all of its sockets.

mod attachments;
mod catalog;
mod config;
mod control;
mod convert;
mod current;
#[cfg_attr(not(feature = "ublk"), path = "devices/absent.rs")]
mod devices;
mod directory;
mod engine;
mod failure_mark;
mod mounts;
pub mod offline;
mod open;
mod remembered;
mod scrub_schedule;
mod socket_file;
mod sockets;
mod supervisor;
mod upgrade;

use std::sync::Arc;
use std::time::Duration;

use api::{DaemonStatus, Error, Kind};
use config::Plan;
pub use config::{
    CACHE_BYTES_MIN, Config, GC_MEMORY_BYTES, GC_MEMORY_BYTES_MIN, NBD_PORT, NbdAddress, Scrub,
    TlsFiles, own_nbd_socket,
};
use current::Current;
pub use devices::called_aside;
use engine::Engine;
use sd_notify::NotifyState;
use sockets::Sockets;
use supervisor::{End, Signals, Wishes, notify};
use tokio::sync::watch;

/// How long requests of the control plane may take to end when the daemon stops.
const CONTROL_END_MAX: Duration = Duration::from_millis(500);

/// A daemon that is ready.
#[derive(Debug)]
pub struct Daemon {
    plan: Plan,
    runtime: tokio::runtime::Runtime,
    engine: Engine,
    current: Current,
    wishes: Wishes,
    signals: Signals,
    sockets: CloseAtEnd,
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
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::system("start the control plane", &e))?;
        upgrade::remember_program();
        let sockets = CloseAtEnd(Arc::clone(&plan.sockets));
        let (engine, current, wishes) = supervisor::start(&plan)?;
        let prepared = {
            let _inside = runtime.enter();
            listen(&plan).and_then(|control| Ok((control, Signals::catch()?)))
        };
        let signals = match prepared {
            // What is said to it waits until it is served.
            Ok((_control, signals)) => signals,
            Err(error) => {
                runtime.block_on(engine.stop())?;
                return Err(error);
            }
        };
        plan.sockets.close_unclaimed();
        notify(NotifyState::Ready);
        Ok(Self { plan, runtime, engine, current, wishes, signals, sockets })
    }

    /// What it serves, and where.
    ///
    /// # Errors
    /// If the store has stopped meanwhile.
    pub fn status(&self) -> Result<Arc<DaemonStatus>, Error> {
        self.current.status()
    }

    /// Creates a VDI unless there is one of this name; `true` if it did. Durable on return.
    ///
    /// # Errors
    /// As for `vdi::Store::create`.
    pub fn create_unless_there(&self, name: &str, size_bytes: u64) -> Result<bool, Error> {
        let name = name.to_owned();
        let create = self.current.call(async move |served: &engine::Served| {
            match served.store.create(&name, size_bytes).await {
                Ok(_) => Ok(true),
                Err(error) if error.kind() == base::ErrorKind::Exists => Ok(false),
                Err(error) => Err(error),
            }
        });
        self.runtime.block_on(create)
    }

    /// Serves until SIGTERM or SIGINT, then stops cleanly; another signal ends it at once. If
    /// the store stops because its device fails, it is opened again. An upgrade ends this program, and
    /// does not return unless it is refused.
    ///
    /// # Errors
    /// If the store cannot be opened again or closed; nothing acknowledged is lost then, and the
    /// next start recovers.
    pub fn run(self) -> Result<(), Error> {
        let Self { plan, runtime, engine, current, mut wishes, mut signals, sockets } = self;
        let outcome = runtime.block_on(async {
            let mut engine = engine;
            loop {
                let (stop, stopping) = watch::channel(false);
                let control =
                    tokio::spawn(control::serve(listen(&plan)?, current.clone(), stopping));
                let supervised =
                    supervisor::supervise(&plan, engine, &current, &mut wishes, &mut signals).await;
                let binary = match &supervised {
                    Ok((_, End::Upgrade(binary))) => Some(binary.clone()),
                    _ => None,
                };
                match &binary {
                    Some(binary) => tracing::info!(binary = %binary.display(), "upgrading"),
                    None => {
                        tracing::info!("stopping");
                        notify(NotifyState::Stopping);
                        plan.sockets.close_all();
                    }
                }
                let (ending, _) = supervised?;
                // Nobody listens for this only if the control plane has ended already.
                let _ = stop.send(true);
                let end = end(control, ending);
                let Some(binary) = binary else {
                    return unless_another_comes(&mut signals, end).await;
                };
                let mut end = std::pin::pin!(end);
                let stops = tokio::select! {
                    outcome = &mut end => {
                        outcome?;
                        signals.have_come().await
                    }
                    () = signals.any() => {
                        unless_another_comes(&mut signals, end).await?;
                        true
                    }
                };
                if stops {
                    tracing::info!("stopping instead");
                    return Ok(());
                }
                let refusal = upgrade::become_program(&binary, &plan.sockets);
                tracing::error!("{refusal}; serving on as before");
                wishes.forget();
                engine = supervisor::restart(&plan, refusal, &current, &mut signals).await?;
            }
        });
        drop(sockets);
        // An attempt to open the store may still be under way; nobody waits for it any more.
        runtime.shutdown_background();
        outcome
    }
}

/// Waits for the end, after a signal asked for it, but not any more when another one comes.
async fn unless_another_comes(
    signals: &mut Signals,
    end: impl Future<Output = Result<(), Error>>,
) -> Result<(), Error> {
    tokio::select! {
        outcome = end => outcome,
        () = signals.another() => Err(Error::new(
            Kind::Io,
            "stopped by a second signal before the store was closed; the next start recovers it",
        )),
    }
}

/// Ends the control plane and the engine.
async fn end(
    control: tokio::task::JoinHandle<std::io::Result<()>>,
    engine: Engine,
) -> Result<(), Error> {
    if tokio::time::timeout(CONTROL_END_MAX, control).await.is_err() {
        tracing::warn!("control requests are still under way; stopping without them");
    }
    engine.stop().await
}

/// Sockets of a process that ends, however it does.
#[derive(Debug)]
struct CloseAtEnd(Arc<Sockets>);

impl Drop for CloseAtEnd {
    fn drop(&mut self) {
        self.0.close_all();
    }
}

/// Listens on the control socket; must run inside the tokio runtime.
fn listen(plan: &Plan) -> Result<tokio::net::UnixListener, Error> {
    let listener = plan.sockets.unix("control", &plan.socket, true)?;
    let listen = || {
        listener.set_nonblocking(true)?;
        tokio::net::UnixListener::from_std(listener)
    };
    listen().map_err(|e| Error::system(&format!("listen on {}", plan.socket.display()), &e))
}
