//! NBD listeners on the engine thread.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use api::{Error, Kind, NbdEndpoint};
use runtime::Runtime;
use runtime::reactor::{Io, Listener};

use crate::config::{Listen, TlsFiles};
use crate::sockets::Sockets;

/// How long a listener rests when the kernel has no descriptor left for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long requests in flight may take to be answered when the daemon stops: a stop takes less
/// than 2 s, unless the disk is slow.
const DRAIN_MAX: Duration = Duration::from_secs(1);

/// Sockets that are being listened on.
pub(super) struct Listening {
    pub(super) endpoints: Vec<NbdEndpoint>,
    listeners: Vec<Rc<Listener>>,
    open: Rc<Cell<bool>>,
}

impl Listening {
    /// Lets nobody new in.
    pub(super) fn end(self) {
        self.open.set(false);
        for listener in &self.listeners {
            listener.close();
        }
    }
}

/// The two NBD servers of a daemon, over the same disks: TLS is a property of the address.
pub(super) struct Servers {
    plain: nbd::Server,
    tls: Option<nbd::Server>,
}

impl Servers {
    /// Reads certificates, if there are any.
    pub(super) fn new(
        runtime: &Runtime,
        catalog: &Rc<dyn disk::Catalog>,
        tls: Option<&TlsFiles>,
    ) -> Result<Self, Error> {
        let server = |security| {
            let drain_timeout = DRAIN_MAX;
            let config = nbd::Config { security, drain_timeout, ..nbd::Config::default() };
            nbd::Server::new(runtime, Rc::clone(catalog), config)
        };
        let tls = match tls {
            None => None,
            Some(files) => {
                let clients = match files.verify_clients {
                    true => nbd::ClientCertificates::Required,
                    false => nbd::ClientCertificates::Ignored,
                };
                let loaded = nbd::TlsServer::load(&files.dir, clients)
                    .map_err(|e| Error::new(Kind::Invalid, format!("cannot {e}")))?;
                Some(server(nbd::Security::Required(loaded)))
            }
        };
        Ok(Self { plain: server(nbd::Security::Plaintext), tls })
    }

    /// Clients that are connected now.
    pub(super) fn connection_count(&self) -> u64 {
        let all = std::iter::once(&self.plain).chain(&self.tls);
        all.map(|server| server.metrics().connections_open).sum()
    }

    /// What all have counted, by name.
    pub(super) fn metrics(&self) -> api::FrontendMetrics {
        let mut metrics = api::FrontendMetrics::new();
        for server in std::iter::once(&self.plain).chain(&self.tls) {
            for (name, value, _) in server.metrics().values() {
                *metrics.entry(name.to_owned()).or_default() += value;
            }
        }
        metrics
    }

    /// Ends all connections, after what is in flight.
    pub(super) async fn shutdown(&self, runtime: &Runtime) {
        let tls = self.tls.clone();
        let tls = runtime.spawn(async move {
            if let Some(server) = tls {
                server.shutdown().await;
            }
        });
        self.plain.shutdown().await;
        tls.await;
    }

    fn of(&self, tls: bool) -> nbd::Server {
        self.tls.as_ref().filter(|_| tls).unwrap_or(&self.plain).clone()
    }
}

/// Binds every address, then accepts on all of them.
pub(super) fn start(
    runtime: &Runtime,
    io: &Io,
    servers: &Servers,
    sockets: &Sockets,
    addresses: Vec<Listen>,
) -> Result<Listening, Error> {
    let open = Rc::new(Cell::new(true));
    let mut listening = Listening { endpoints: Vec::new(), listeners: Vec::new(), open };
    let mut listeners = Vec::new();
    for address in addresses {
        let (fd, endpoint): (OwnedFd, _) = match address {
            Listen::Unix { path, private } => {
                let listener = sockets.unix("nbd", &path, private)?;
                // Whoever asks where it is may have another working directory.
                let path = std::path::absolute(&path).unwrap_or(path);
                let address = format!("unix:{}", path.display());
                (listener.into(), NbdEndpoint { address, tls: false })
            }
            Listen::Tcp { name, addresses, tls } => {
                let listener = sockets.tcp("nbd", &name, &addresses)?;
                let local = listener
                    .local_addr()
                    .map_err(|e| Error::system(&format!("listen on {name}"), &e))?;
                (listener.into(), NbdEndpoint { address: format!("tcp:{local}"), tls })
            }
        };
        let listener = Listener::adopt(io, fd)
            .map_err(|e| Error::system(&format!("listen on {}", endpoint.address), &e))?;
        listeners.push((Rc::new(listener), endpoint.tls));
        listening.endpoints.push(endpoint);
    }
    for (listener, tls) in listeners {
        let open = Rc::clone(&listening.open);
        listening.listeners.push(Rc::clone(&listener));
        let accept = accept(runtime.clone(), listener, servers.of(tls), open);
        drop(runtime.spawn(accept));
    }
    Ok(listening)
}

async fn accept(
    runtime: Runtime,
    listener: Rc<Listener>,
    server: nbd::Server,
    open: Rc<Cell<bool>>,
) {
    while open.get() {
        match listener.accept().await {
            Ok((socket, peer)) if open.get() => {
                drop(runtime.spawn(server.serve(socket, peer.to_string())));
            }
            Ok(_) => {}
            Err(_) if !open.get() => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept an NBD client");
                runtime.sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
