//! Keeps an engine running: when the store stops because a write or flush failed, everything of
//! it is taken down, and it is opened again (G10).
//!
//! What was promised is recovered from the device by the new engine, under a new epoch; nothing of
//! the old one is trusted. NBD clients are disconnected; those that reconnect go on. A device that
//! does not come back is tried again and again, ever less often.

use std::path::PathBuf;
use std::time::Duration;

use api::{DaemonStatus, Error, Kind};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::config::Plan;
use crate::current::Current;
use crate::engine::{Engine, Started};

/// The pause before the first attempt to open the store again, and the longest one.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// How long after a signal the same one may come once more. Shorter than a person's patience.
const ECHO: Duration = Duration::from_millis(500);

/// SIGTERM and SIGINT.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Catches them from here on; must run inside the tokio runtime.
    pub(crate) fn catch() -> Result<Self, Error> {
        let catch = |kind| signal(kind).map_err(|e| Error::system("catch signals", &e));
        let terminate = catch(SignalKind::terminate())?;
        Ok(Self { terminate, interrupt: catch(SignalKind::interrupt())? })
    }

    /// Waits for either.
    pub(crate) async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Whether one has come.
    pub(crate) async fn have_come(&mut self) -> bool {
        tokio::time::timeout(Duration::ZERO, self.any()).await.is_ok()
    }

    /// Waits for another one than the one that came last. What comes within [`ECHO`] is the same
    /// one again: timeout(1) and others that pass signals on send it to a process and to its group.
    pub(crate) async fn another(&mut self) {
        tokio::time::sleep(ECHO).await;
        while self.have_come().await {}
        self.any().await;
    }
}

/// Opens the store and its NBD sockets. Blocks while the store is recovered.
pub(crate) fn start(plan: &Plan) -> Result<(Engine, Current, Wishes), Error> {
    let (engine, started) = Engine::start(plan.clone())?;
    let status = status(plan, &started);
    report(&status);
    let (current, upgrades) = Current::new(started.handle, status);
    Ok((engine, current, Wishes { upgrades }))
}

/// Opens the store again after an upgrade that came to nothing, for the reason given.
pub(crate) async fn restart(
    plan: &Plan,
    refusal: Error,
    current: &Current,
    signals: &mut Signals,
) -> Result<Engine, Error> {
    let started = tokio::select! {
        () = signals.any() => return Err(refusal),
        started = start_again(plan) => started,
    };
    match started {
        Ok((engine, started)) => {
            let status = status(plan, &started);
            let upgrade_refused = Some(refusal.message);
            current.set_serving(started.handle, DaemonStatus { upgrade_refused, ..status });
            Ok(engine)
        }
        Err(error) => reopen(plan, error, current, signals).await,
    }
}

/// Opens the store on another thread, which goes on if nobody waits for it any more.
async fn start_again(plan: &Plan) -> Result<(Engine, Started), Error> {
    let again = plan.clone();
    let started = tokio::task::spawn_blocking(move || Engine::start(again)).await;
    started.unwrap_or_else(|_| Err(Error::new(Kind::Io, "the engine did not start")))
}

/// What an operator wants of a daemon that serves.
#[derive(Debug)]
pub(crate) struct Wishes {
    upgrades: mpsc::Receiver<PathBuf>,
}

impl Wishes {
    /// What was wished meanwhile is not wished any more.
    pub(crate) fn forget(&mut self) {
        while self.upgrades.try_recv().is_ok() {}
    }
}

/// Why a store is not to be served any more.
pub(crate) enum End {
    /// The daemon is to stop.
    Stop,
    /// It is to become this program.
    Upgrade(PathBuf),
}

/// Keeps the store served until the daemon is to end: the engine that runs then, and how.
///
/// # Errors
/// What keeps the store from being opened again and will not pass; or, if the signal comes while
/// there is no engine, why there is none.
pub(crate) async fn supervise(
    plan: &Plan,
    mut engine: Engine,
    current: &Current,
    wishes: &mut Wishes,
    signals: &mut Signals,
) -> Result<(Engine, End), Error> {
    loop {
        let ended = tokio::select! {
            () = signals.any() => return Ok((engine, End::Stop)),
            Some(binary) = wishes.upgrades.recv() => return Ok((engine, End::Upgrade(binary))),
            ended = &mut engine.ended => ended,
        };
        let ended = ended.unwrap_or_else(|_| Err(Error::new(Kind::Io, "the engine is gone")));
        let Err(why) = ended else {
            return Err(Error::new(Kind::Io, "the engine ended by itself"));
        };
        tracing::error!("{why}; opening the store again");
        notify(NotifyState::Status("the store stopped and is being opened again"));
        // It may take long: who connects is refused, rather than left to wait. A virtual machine's
        // monitor would do nothing else meanwhile.
        plan.sockets.close_all_but("control");
        engine = reopen(plan, why, current, signals).await?;
        notify(NotifyState::Status("serving"));
    }
}

async fn reopen(
    plan: &Plan,
    mut why: Error,
    current: &Current,
    signals: &mut Signals,
) -> Result<Engine, Error> {
    let mut pause = PAUSE_MIN;
    loop {
        current.set_stopped(why.clone());
        tokio::select! {
            () = signals.any() => return Err(why),
            () = tokio::time::sleep(pause) => {}
        }
        pause = PAUSE_MAX.min(pause * 2);
        let started = tokio::select! {
            () = signals.any() => return Err(why),
            started = start_again(plan) => started,
        };
        match started {
            Ok((engine, started)) => {
                let status = status(plan, &started);
                report(&status);
                current.set_serving(started.handle, status);
                return Ok(engine);
            }
            Err(error) if may_pass(error.kind) => {
                tracing::warn!("{error}");
                why = error;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether it makes sense to try again: the device may come back, its other user may go. What
/// looks damaged may be a device that is only half there yet; opening does it no harm.
const fn may_pass(kind: Kind) -> bool {
    match kind {
        Kind::Io | Kind::Damaged | Kind::Fenced | Kind::NoSpace | Kind::Busy | Kind::NotFound => {
            true
        }
        Kind::Invalid
        | Kind::Exists
        | Kind::Unsupported
        | Kind::ReadOnly
        | Kind::Unreachable
        | Kind::Stream => false,
    }
}

fn status(plan: &Plan, started: &Started) -> DaemonStatus {
    let store = std::path::absolute(&plan.store).unwrap_or_else(|_| plan.store.clone());
    DaemonStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started: jiff::Timestamp::now(),
        store: store.display().to_string(),
        device: started.device.clone(),
        opened: started.opened.clone(),
        nbd: started.nbd.clone(),
        upgrade_refused: None,
    }
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

/// Tells the service manager, if there is one.
pub(crate) fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot reach the service manager");
    }
}
