//! The disks of one thread that are attached, each with a socket of its own.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use disk::Catalog;
use runtime::Runtime;
use runtime::reactor::{Channel, Io, Listener};
use runtime::sync::Signal;

use crate::end::End;
use crate::metrics::{Metrics, Snapshot};
use crate::session::Session;

/// How long a listener rests when the kernel has no descriptor left for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What an operator can set.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Time that requests in flight have to be completed when an attachment ends; those that take
    /// longer are done again by the next daemon.
    pub drain_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { drain_timeout: Duration::from_secs(10) }
    }
}

/// Serves virtual machines on the thread of its runtime. Clones share it.
#[derive(Clone)]
pub struct Server(Rc<Inner>);

struct Inner {
    runtime: Runtime,
    io: Io,
    catalog: Rc<dyn Catalog>,
    config: Config,
    metrics: Rc<Metrics>,
}

impl Server {
    /// A server of what `catalog` holds.
    #[must_use]
    pub fn new(runtime: &Runtime, io: &Io, catalog: Rc<dyn Catalog>, config: Config) -> Self {
        let (runtime, io) = (runtime.clone(), io.clone());
        Self(Rc::new(Inner { runtime, io, catalog, config, metrics: Rc::default() }))
    }

    /// Serves the disk `name` to whoever connects to `listener`, one at a time, until the
    /// attachment is ended. The disk is looked up anew for each connection.
    #[must_use]
    pub fn attach(&self, name: String, listener: Listener) -> Attachment {
        let state = Rc::new(State {
            server: Rc::clone(&self.0),
            name: RefCell::new(name),
            listener,
            session: RefCell::default(),
            ending: Cell::new(false),
            ended: Cell::new(false),
            changed: Signal::default(),
        });
        drop(self.0.runtime.spawn(Rc::clone(&state).accept()));
        Attachment(state)
    }

    /// What was done so far.
    #[must_use]
    pub fn metrics(&self) -> Snapshot {
        self.0.metrics.snapshot()
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("vhost::Server")
    }
}

/// A disk that is attached. It goes on if this is dropped.
pub struct Attachment(Rc<State>);

struct State {
    server: Rc<Inner>,
    name: RefCell<String>,
    listener: Listener,
    /// The connection that is served now.
    session: RefCell<Option<Rc<Session>>>,
    ending: Cell<bool>,
    ended: Cell<bool>,
    changed: Signal,
}

impl Attachment {
    /// Name of the disk.
    #[must_use]
    pub fn name(&self) -> String {
        self.0.name.borrow().clone()
    }

    /// The disk has another name from now on.
    pub fn rename(&self, name: String) {
        self.0.name.replace(name);
    }

    /// Whether a virtual machine is connected.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.0.session.borrow().is_some()
    }

    /// Ends several attachments together; see [`Self::end`].
    pub async fn end_all(attachments: &[Self]) {
        for Self(state) in attachments {
            state.stop();
        }
        for Self(state) in attachments {
            state.stopped().await;
        }
    }

    /// Lets nobody in any more, and disconnects who is there: no more requests are taken, those in
    /// flight are completed. Returns when that is so, after [`Config::drain_timeout`] at the latest
    /// plus the time that the disk takes for what nobody waits for any more.
    pub async fn end(&self) {
        Self::end_all(std::slice::from_ref(self)).await;
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Attachment({})", self.0.name.borrow())
    }
}

impl State {
    fn stop(&self) {
        self.ending.set(true);
        self.listener.close();
        if let Some(session) = self.session.borrow().clone() {
            let drain = self.server.config.drain_timeout;
            drop(self.server.runtime.spawn(session.wind_down(drain)));
        }
    }

    async fn stopped(&self) {
        while !self.ended.get() {
            self.changed.changed().await;
        }
    }

    async fn accept(self: Rc<Self>) {
        while !self.ending.get() {
            match self.listener.accept_channel().await {
                Ok((channel, peer)) if !self.ending.get() => {
                    self.serve(channel, &peer.to_string()).await;
                }
                Ok(_) => {}
                Err(_) if self.ending.get() => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a virtual machine");
                    self.server.runtime.sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        self.ended.set(true);
        self.changed.notify();
    }

    async fn serve(&self, channel: Channel, peer: &str) {
        let metrics = &self.server.metrics;
        let name = self.name.borrow().clone();
        metrics.connections.add(1);
        metrics.connections_open.add(1);
        let end = self.connection(channel, &name, peer).await;
        metrics.connections_open.subtract_one();
        if end.is_failure() {
            metrics.connections_failed.add(1);
            let source = std::error::Error::source(&end).map(ToString::to_string);
            let reason = source.unwrap_or_default();
            tracing::warn!(disk = name, peer, reason, "{end}");
        } else {
            tracing::info!(disk = name, peer, "{end}");
        }
    }

    async fn connection(&self, channel: Channel, name: &str, peer: &str) -> End {
        let Inner { runtime, io, catalog, metrics, .. } = &*self.server;
        let disk = match catalog.open(name).await {
            Ok(disk) => disk,
            Err(error) => return End::Disk(error),
        };
        tracing::info!(disk = name, peer, "a virtual machine is connected");
        let session = Rc::new(Session::new(runtime, io, channel, disk, metrics));
        self.session.replace(Some(Rc::clone(&session)));
        // Ended while the disk was being opened.
        let end = if self.ending.get() { End::Closed } else { session.run().await };
        self.session.replace(None);
        end
    }
}
