//! The engine thread: the reactor, the store and all sessions run on it, and nowhere else.
//! Other threads hand it closures through [`EngineHandle::call`] and wait for the answer.
//!
//! Start: open the device exclusively, open (and recover) the store, bind sockets, report.
//! Stop: let nobody in, end the sessions, close the store, report. If the store stops by itself,
//! because a write or flush failed, it is left as after a crash. Sockets outlive the engine.

mod listen;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;

use api::{Error, Kind, NbdEndpoint, OpenReport};
use base::ErrorKind;
use runtime::reactor::{Io, RemoteHandle};
use runtime::sync::{OneshotReceiver, OneshotSender, oneshot};
use tokio::sync::oneshot as remote;
use vdi::Store;

use crate::attachments::Attachments;
use crate::catalog::StoreCatalog;
use crate::config::Plan;
use crate::devices::Devices;
use crate::directory::StoreDirectory;
use crate::failure_mark::FailureMark;
use crate::mounts::Mounts;
use crate::scrub_schedule::ScrubSchedule;
use crate::{convert, open};

/// Most calls under way on the engine thread; further ones wait.
const CALLS_MAX: usize = 256;

thread_local! {
    /// What calls work on: closures that come from other threads cannot carry it.
    static SERVED: RefCell<Option<Rc<Served>>> = const { RefCell::new(None) };
}

/// What lives on the engine thread.
pub(crate) struct Served {
    pub(crate) store: Store,
    pub(crate) attachments: Rc<Attachments>,
    pub(crate) devices: Rc<Devices>,
    pub(crate) mounts: Rc<Mounts>,
    /// How far the checks are that are under way, by their tokens.
    pub(crate) checking: Rc<RefCell<BTreeMap<u64, vdi::check::CheckProgress>>>,
    scrub: Rc<ScrubSchedule>,
    servers: Rc<listen::Servers>,
    stop: RefCell<Option<OneshotSender<()>>>,
}

impl Served {
    pub(crate) fn stats(&self) -> api::Stats {
        let stats = self.store.stats();
        convert::stats(&stats, self.servers.connection_count(), self.attachments.connection_count())
    }

    pub(crate) fn scrub_status(&self) -> api::ScrubStatus {
        convert::scrub_status(self.store.scrub_status(), self.scrub.next())
    }

    pub(crate) fn nbd_metrics(&self) -> api::FrontendMetrics {
        self.servers.metrics()
    }
}

/// What the engine reports when it is ready.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) handle: EngineHandle,
    pub(crate) device: String,
    pub(crate) opened: OpenReport,
    pub(crate) nbd: Vec<NbdEndpoint>,
}

/// The running thread.
#[derive(Debug)]
pub(crate) struct Engine {
    handle: EngineHandle,
    /// Resolves when the thread ends, for whatever reason.
    pub(crate) ended: remote::Receiver<Result<(), Error>>,
}

/// A failed assertion ends the process, as it does in release builds: what an engine that
/// unwound would leave behind must not meet the one that is started next.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

/// Calls the engine from other threads.
#[derive(Clone, Debug)]
pub(crate) struct EngineHandle {
    remote: RemoteHandle,
    calls: Arc<tokio::sync::Semaphore>,
}

impl Engine {
    /// Starts the thread, and waits until it serves. Blocks while the store is recovered.
    pub(crate) fn start(plan: Plan) -> Result<(Self, Started), Error> {
        let (ready, readiness) = std::sync::mpsc::channel();
        let (end, ended) = remote::channel();
        let run = move || {
            let _guard = AbortOnPanic;
            // Whoever started the thread waits for one of the two.
            let _ = end.send(run(plan, ready));
        };
        thread::Builder::new()
            .name("parallax-engine".to_owned())
            .spawn(run)
            .map_err(|e| Error::system("start the engine thread", &e))?;
        match readiness.recv() {
            Ok(started) => {
                let started: Started = started;
                Ok((Self { handle: started.handle.clone(), ended }, started))
            }
            Err(_) => match ended.blocking_recv() {
                Ok(Err(error)) => Err(error),
                _ => Err(Error::new(Kind::Io, "the engine ended before it was ready")),
            },
        }
    }

    /// Ends sessions, closes the store, and waits for the thread.
    pub(crate) async fn stop(self) -> Result<(), Error> {
        let posted = self.handle.remote.post(|_| {
            let stop = SERVED.with_borrow(|served| served.as_ref()?.stop.borrow_mut().take());
            if let Some(stop) = stop {
                stop.send(());
            }
        });
        if !posted {
            tracing::debug!("the engine has ended by itself");
        }
        self.ended.await.unwrap_or_else(|_| Err(gone()))
    }
}

impl EngineHandle {
    /// Runs `operation` on the engine thread. It goes on if the caller gives up waiting.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        operation: impl AsyncFnOnce(&Served) -> Result<T, vdi::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let _permit = self.calls.acquire().await.map_err(|_| gone())?;
        let (answer, answered) = remote::channel();
        self.remote.post(move |runtime| {
            let Some(served) = SERVED.with_borrow(Option::clone) else { return };
            drop(runtime.spawn(async move {
                let outcome = operation(&served).await;
                // The caller may have given up.
                let _ = answer.send(outcome.map_err(|error| engine_error(&error)));
            }));
        });
        answered.await.unwrap_or_else(|_| Err(gone()))
    }
}

pub(crate) fn engine_error(error: &vdi::Error) -> Error {
    Error::new(error.kind(), error.to_string())
}

/// A refusal in the engine's own words.
pub(crate) fn refused(kind: ErrorKind, message: String) -> vdi::Error {
    vdi::Error::Refused { kind, message }
}

fn gone() -> Error {
    Error::new(Kind::Fenced, "the daemon is stopping")
}

/// The thread's whole life.
fn run(plan: Plan, ready: std::sync::mpsc::Sender<Started>) -> Result<(), Error> {
    let reactor = open::reactor()?;
    let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
    let outcome = reactor.run(serve(runtime, io, plan, ready));
    // Listeners and background tasks own descriptors and each other: without this the store's
    // lock would stay until the kernel has taken the process apart.
    reactor.runtime().kill();
    outcome.map_err(|e| Error::system("go on with the I/O engine", &e))?
}

async fn serve(
    runtime: runtime::Runtime,
    io: Io,
    plan: Plan,
    ready: std::sync::mpsc::Sender<Started>,
) -> Result<(), Error> {
    let access = open::Access::Exclusive;
    let options = open::DeviceOptions { access, buffered: plan.buffered };
    let device = open::device(&io, &plan.store, options)?;
    let description = device.describe();
    let mark = FailureMark::beside(&plan.socket, &plan.store);
    let options = open::options(plan.cache_bytes, plan.gc_memory_bytes, mark.is_set())?;
    let (store, report) = Store::open(device, runtime.clone(), &options)
        .await
        .map_err(|error| open::explain(&plan.store, &error))?;
    mark.clear();
    let catalog: Rc<dyn disk::Catalog> = StoreCatalog::new(store.clone());
    let mounts = Mounts::new(&runtime, &io, StoreDirectory::new(store.clone()));
    let ready_to_serve =
        listen::Servers::new(&runtime, &catalog, plan.tls.as_ref()).and_then(|servers| {
            let listening = listen::start(&runtime, &io, &servers, &plan.sockets, plan.listen)?;
            Ok((listening, Rc::new(servers), mounts.listen(&io, &plan.sockets, &plan.socket)?))
        });
    let (listening, servers, door) = match ready_to_serve {
        Ok(ready) => ready,
        Err(error) => {
            store.close().await.map_err(|error| engine_error(&error))?;
            return Err(error);
        }
    };
    let (socket, path) = (&plan.socket, &plan.store);
    let attachments =
        Rc::new(Attachments::new(&runtime, &io, &catalog, socket, path, &plan.sockets));
    attachments.restore();
    let devices = Devices::new(&runtime, &io, &catalog, socket, path);
    devices.restore();
    let (stop, stopped) = oneshot();
    let served = Served {
        store: store.clone(),
        attachments: Rc::clone(&attachments),
        devices: Rc::clone(&devices),
        mounts: Rc::clone(&mounts),
        checking: Rc::default(),
        scrub: ScrubSchedule::start(&runtime, &store, plan.scrub, socket, path),
        servers: Rc::clone(&servers),
        stop: Some(stop).into(),
    };
    SERVED.set(Some(Rc::new(served)));
    let started = Started {
        handle: EngineHandle {
            remote: io.remote(),
            calls: Arc::new(tokio::sync::Semaphore::new(CALLS_MAX)),
        },
        device: description,
        opened: convert::opened(report),
        nbd: listening.endpoints.clone(),
    };
    let failure = if ready.send(started).is_ok() {
        stopped_or_failed(&runtime, stopped, &store).await
    } else {
        None
    };
    if failure.is_some() {
        mark.set();
    }
    listening.end();
    let ending = {
        let attachments = Rc::clone(&attachments);
        runtime.spawn(async move { attachments.end().await })
    };
    let leaving_devices = runtime.spawn(async move { devices.end().await });
    let leaving = runtime.spawn(async move { mounts.leave(door).await });
    servers.shutdown(&runtime).await;
    ending.await;
    leaving_devices.await;
    leaving.await;
    SERVED.set(None);
    match failure {
        None => store.close().await.map_err(|error| {
            mark.set();
            engine_error(&error)
        }),
        Some(error) => {
            let message = format!("the store stopped after a failed write or flush: {error}");
            Err(Error::new(error.kind(), message))
        }
    }
}

/// Waits until the daemon is to stop (`None`), or until the store has stopped by itself.
async fn stopped_or_failed(
    runtime: &runtime::Runtime,
    stopped: OneshotReceiver<()>,
    store: &Store,
) -> Option<device::DeviceError> {
    let (end, ended) = oneshot();
    let end = Rc::new(RefCell::new(Some(end)));
    let first = Rc::clone(&end);
    let tell = move |outcome| {
        if let Some(end) = first.borrow_mut().take() {
            end.send(outcome);
        }
    };
    let tell_failure = tell.clone();
    let store = store.clone();
    drop(runtime.spawn(async move { tell_failure(Some(store.failed().await)) }));
    drop(runtime.spawn(async move {
        // A dropped sender means that nobody can stop us any more, which is the same.
        let _ = stopped.await;
        tell(None);
    }));
    ended.await.unwrap_or(None)
}
