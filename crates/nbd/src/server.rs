//! The connections of one thread.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use disk::Catalog;
use runtime::Runtime;
use runtime::socket::Socket;
use runtime::sync::Signal;

use crate::control::Control;
use crate::end::End;
use crate::metrics::{Metrics, Snapshot};
use crate::negotiation::{Environment, Negotiated, negotiate};
use crate::session::{Budget, Pool, Session};
use crate::tls::Security;

/// How often connections are looked over for disks that died under idle clients, and for clients
/// that stall.
const CHECK_PERIOD: Duration = Duration::from_secs(1);

/// Time that TLS has to say goodbye.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// What an operator can set.
#[derive(Clone, Debug)]
pub struct Config {
    /// Whether clients may or must use TLS.
    pub security: Security,
    /// Most connections at a time; further ones are closed at once. Each may hold 1 MiB of
    /// payloads when its client is busy, all together 128 MiB more, and about 20 KiB when idle.
    pub connections_max: usize,
    /// Time from the start of a connection to the selection of an export.
    pub handshake_timeout: Duration,
    /// Time that requests in flight have to be completed and answered when a session ends.
    pub drain_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            security: Security::default(),
            connections_max: 4096,
            handshake_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(10),
        }
    }
}

/// Serves connections on the thread of its runtime. Clones share it.
#[derive(Clone)]
pub struct Server(Rc<Inner>);

struct Inner {
    runtime: Runtime,
    catalog: Rc<dyn Catalog>,
    config: Config,
    metrics: Rc<Metrics>,
    pool: Rc<Pool>,
    connections: RefCell<BTreeMap<u64, Rc<Control>>>,
    next_connection: Cell<u64>,
    shutting_down: Cell<bool>,
    closed: Signal,
    watching: Cell<bool>,
}

impl Server {
    /// A server of what `catalog` holds.
    #[must_use]
    pub fn new(runtime: &Runtime, catalog: Rc<dyn Catalog>, config: Config) -> Self {
        Self(Rc::new(Inner {
            runtime: runtime.clone(),
            catalog,
            config,
            metrics: Rc::default(),
            pool: Rc::default(),
            connections: RefCell::default(),
            next_connection: Cell::new(0),
            shutting_down: Cell::new(false),
            closed: Signal::default(),
            watching: Cell::new(false),
        }))
    }

    /// Serves one accepted connection until it ends. `peer` is for the log.
    pub fn serve(
        &self,
        socket: Rc<dyn Socket>,
        peer: String,
    ) -> impl Future<Output = ()> + 'static {
        let server = self.clone();
        async move {
            let metrics = &server.0.metrics;
            metrics.connections.add(1);
            let Some(connection) = Connection::open(&server.0, &socket) else {
                metrics.connections_refused.add(1);
                socket.shutdown();
                tracing::warn!(peer, "{}", End::TooManyConnections);
                return;
            };
            server.watch_connections();
            let end = connection.run(&peer).await;
            if end.is_failure() {
                tracing::warn!(peer, reason = ErrorChain(&end).to_string(), "connection failed");
            } else {
                tracing::debug!(peer, "{end}");
            }
        }
    }

    /// What was done so far.
    #[must_use]
    pub fn metrics(&self) -> Snapshot {
        self.0.metrics.snapshot()
    }

    /// Ends all connections: no more requests are read, those in flight are completed and
    /// answered. Returns when all are closed, after [`Config::drain_timeout`] at the latest plus
    /// the time that the disk takes for what clients no longer wait for. New connections are
    /// closed at once.
    pub async fn shutdown(&self) {
        self.0.shutting_down.set(true);
        for control in self.0.connections.borrow().values() {
            control.shut_down();
        }
        while !self.0.connections.borrow().is_empty() {
            self.0.closed.changed().await;
        }
    }

    /// Ends connections whose disk died while their clients ask for nothing; a request would
    /// notice by itself. Ends those that stall while others wait for room, too. Runs while there
    /// are connections.
    fn watch_connections(&self) {
        if self.0.watching.replace(true) {
            return;
        }
        let server = Rc::downgrade(&self.0);
        let runtime = self.0.runtime.clone();
        self.0.runtime.spawn(async move {
            loop {
                runtime.sleep(CHECK_PERIOD).await;
                let Some(server) = server.upgrade() else { return };
                if server.connections.borrow().is_empty() {
                    server.watching.set(false);
                    return;
                }
                let short = server.pool.is_short();
                for control in server.connections.borrow().values() {
                    control.sever_if_dead();
                    if short {
                        control.cut_if_stalled(runtime.now());
                    }
                }
            }
        });
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({} connections)", self.0.connections.borrow().len())
    }
}

/// One connection, counted while it exists.
struct Connection<'a> {
    server: &'a Inner,
    number: u64,
    socket: &'a Rc<dyn Socket>,
    control: Rc<Control>,
}

impl<'a> Connection<'a> {
    /// `None` if there are too many, or the server is shutting down.
    fn open(server: &'a Inner, socket: &'a Rc<dyn Socket>) -> Option<Self> {
        let mut connections = server.connections.borrow_mut();
        if server.shutting_down.get() || connections.len() >= server.config.connections_max {
            return None;
        }
        let number = server.next_connection.replace(server.next_connection.get() + 1);
        let control = Rc::new(Control::default());
        connections.insert(number, Rc::clone(&control));
        server.metrics.connections_open.add(1);
        Some(Self { server, number, socket, control })
    }

    async fn run(&self, peer: &str) -> End {
        let Inner { runtime, catalog, config, metrics, .. } = self.server;
        let environment =
            Environment { runtime, catalog: &**catalog, security: &config.security, metrics };
        let negotiation = negotiate(&environment, Rc::clone(self.socket));
        let negotiated = match self.within(config.handshake_timeout, true, negotiation).await {
            Ok(Ok(negotiated)) => negotiated,
            Ok(Err(end)) | Err(end) => {
                self.socket.shutdown();
                if end.is_failure() {
                    metrics.handshakes_failed.add(1);
                }
                return end;
            }
        };
        tracing::info!(peer, export = negotiated.name, "client attached");
        let end = self.transmit(negotiated).await;
        if end.is_failure() {
            metrics.sessions_failed.add(1);
        }
        end
    }

    async fn transmit(&self, negotiated: Negotiated) -> End {
        let Negotiated { terms, name: _, socket, tls, mut input } = negotiated;
        let Inner { runtime, config, metrics, .. } = self.server;
        let budget = Rc::new(Budget::new(&self.server.pool));
        self.control.attach(Rc::clone(&terms.disk), Rc::clone(&budget));
        let control = Rc::clone(&self.control);
        let session = Session::new(runtime, socket, terms, budget, control, Rc::clone(metrics));
        let end = session.run(&mut input, config.drain_timeout).await;
        if let Some(tls) = tls {
            // A courtesy; the client may be gone.
            let _ = self.within(GOODBYE_TIMEOUT, false, tls.close()).await;
        }
        self.socket.shutdown();
        input.close().await;
        end
    }

    /// Runs `work`. When it takes too long, or is `interruptible` and the server shuts down, the
    /// socket is shut down, which ends the work soon; it is not dropped half done.
    async fn within<T>(
        &self,
        limit: Duration,
        interruptible: bool,
        work: impl Future<Output = T>,
    ) -> Result<T, End> {
        let mut work = pin!(work);
        let mut timer = pin!(self.server.runtime.sleep(limit));
        let mut cut = None;
        let result = std::future::poll_fn(|context| {
            if cut.is_none() {
                self.control.register(context);
                if timer.as_mut().poll(context).is_ready() {
                    cut = Some(End::HandshakeTimeout);
                } else if interruptible {
                    cut = self.control.check().err();
                }
                if cut.is_some() {
                    self.socket.shutdown();
                }
            }
            work.as_mut().poll(context)
        })
        .await;
        cut.map_or(Ok(result), Err)
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        self.server.connections.borrow_mut().remove(&self.number);
        self.server.metrics.connections_open.subtract_one();
        self.server.closed.notify();
    }
}

/// An error with its sources.
struct ErrorChain<'a>(&'a dyn std::error::Error);

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
