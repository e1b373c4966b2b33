//! The engine that serves now, if there is one: what the control plane calls.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use api::{DaemonStatus, Error, Kind};
use tokio::sync::mpsc;

use crate::engine::{EngineHandle, Served};

/// Shared by the control plane and whoever starts engines.
#[derive(Clone, Debug)]
pub(crate) struct Current {
    state: Arc<RwLock<State>>,
    /// Where a program is sent that the daemon shall become.
    upgrades: mpsc::Sender<PathBuf>,
}

#[derive(Clone, Debug)]
enum State {
    Serving {
        engine: EngineHandle,
        status: Arc<DaemonStatus>,
    },
    /// The store stopped, and is being opened again.
    Stopped {
        why: Error,
    },
}

impl Current {
    /// The engine that was started, and where the supervisor hears of upgrades.
    pub(crate) fn new(
        engine: EngineHandle,
        status: DaemonStatus,
    ) -> (Self, mpsc::Receiver<PathBuf>) {
        let state = State::Serving { engine, status: Arc::new(status) };
        let (upgrades, receiver) = mpsc::channel(1);
        (Self { state: Arc::new(RwLock::new(state)), upgrades }, receiver)
    }

    /// Has the daemon become another program.
    pub(crate) fn upgrade(&self, binary: PathBuf) -> Result<(), Error> {
        let busy = |_| Error::new(Kind::Busy, "the daemon is stopping, or is being upgraded");
        self.upgrades.try_send(binary).map_err(busy)
    }

    pub(crate) fn set_serving(&self, engine: EngineHandle, status: DaemonStatus) {
        self.set(State::Serving { engine, status: Arc::new(status) });
    }

    pub(crate) fn set_stopped(&self, why: Error) {
        self.set(State::Stopped { why });
    }

    /// What is served, and where.
    pub(crate) fn status(&self) -> Result<Arc<DaemonStatus>, Error> {
        self.serving().map(|(_, status)| status)
    }

    /// Runs `operation` on the engine thread; see [`EngineHandle::call`].
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        operation: impl AsyncFnOnce(&Served) -> Result<T, vdi::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (engine, _) = self.serving()?;
        engine.call(operation).await
    }

    fn serving(&self) -> Result<(EngineHandle, Arc<DaemonStatus>), Error> {
        match &*self.state.read().unwrap_or_else(PoisonError::into_inner) {
            State::Serving { engine, status } => Ok((engine.clone(), Arc::clone(status))),
            State::Stopped { why } => Err(Error::new(
                Kind::Fenced,
                format!("the store is not served at the moment, and is being opened again: {why}"),
            )),
        }
    }

    fn set(&self, state: State) {
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
    }
}
