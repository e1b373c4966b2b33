//! Kernel sockets: listening, connecting, and [`Socket`] over them.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use base::Buffer;
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, sockopt};

use super::channel::Channel;
use super::io::{Descriptor, Io};
use super::sys::peer_credentials;
use super::work::{Interest, Work};
use crate::LocalBoxFuture;
use crate::socket::{Segment, Socket};

/// What we ask for as buffers of a unix socket; the kernel gives what net.core.[rw]mem_max allows.
/// A TCP socket keeps the kernel's own sizing, which an explicit size would end.
const UNIX_BUFFER_BYTES: usize = 1 << 20;

/// A TCP peer that is silent for this long is asked whether it is still there, this often, and
/// given up after so many questions: a machine that vanished must not hold a connection for ever.
/// One that is there may be silent for as long as it likes.
const TCP_KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const TCP_KEEPALIVE_COUNT: u32 = 4;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Where to listen or connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket at a path.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process on this machine.
    Process {
        /// Its process id when it connected; `None` in another pid namespace.
        pid: Option<i32>,
        /// Its effective user id.
        uid: u32,
    },
    /// A TCP address.
    Tcp(SocketAddr),
    /// The kernel would not tell.
    Unknown,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid: Some(pid), uid } => write!(f, "process {pid} of user {uid}"),
            Self::Process { pid: None, uid } => write!(f, "a process of user {uid}"),
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unknown => f.write_str("an unknown peer"),
        }
    }
}

/// A listening socket. A unix socket's path is removed when this is dropped.
pub struct Listener {
    io: Io,
    descriptor: Rc<Descriptor>,
    path: Option<BoundPath>,
    closed: Cell<bool>,
}

impl Listener {
    /// Listens at `address`. A unix socket that nobody serves any more is replaced.
    ///
    /// # Errors
    /// `AddrInUse` if somebody listens there, or if the path is something else than a socket;
    /// what the kernel says.
    pub fn bind(io: &Io, address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let listener = bind_unix(path)?;
                let bound = BoundPath::of(path)?;
                Self::new(io, listener.into(), Some(bound))
            }
            Address::Tcp(address) => Self::new(io, TcpListener::bind(address)?.into(), None),
        }
    }

    /// Takes a listening socket that somebody else made, such as a service manager.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn adopt(io: &Io, fd: OwnedFd) -> io::Result<Self> {
        Self::new(io, fd, None)
    }

    fn new(io: &Io, fd: OwnedFd, path: Option<BoundPath>) -> io::Result<Self> {
        // A peer may go away between readiness and accept, which must not block then.
        rustix::io::ioctl_fionbio(&fd, true)?;
        rustix::net::listen(&fd, BACKLOG)?;
        let descriptor = io.descriptor(fd);
        Ok(Self { io: io.clone(), descriptor, path, closed: Cell::new(false) })
    }

    /// Where it listens: for TCP with the port that the kernel chose.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn address(&self) -> io::Result<Address> {
        if let Some(bound) = &self.path {
            return Ok(Address::Unix(bound.path.clone()));
        }
        let address = rustix::net::getsockname(self.descriptor.fd())?;
        if let Ok(address) = SocketAddr::try_from(address.clone()) {
            return Ok(Address::Tcp(address));
        }
        let unix = rustix::net::SocketAddrUnix::try_from(address)?;
        let path = unix.path().map(|path| path.to_string_lossy().into_owned());
        Ok(Address::Unix(path.unwrap_or_default().into()))
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// What the kernel says; EMFILE and ENFILE may pass.
    pub async fn accept(&self) -> io::Result<(Rc<dyn Socket>, Peer)> {
        self.io.adopt(self.next().await?)
    }

    /// Waits for the next connection of a unix socket, which carries descriptors too.
    ///
    /// # Errors
    /// As for [`Self::accept`].
    pub async fn accept_channel(&self) -> io::Result<(Channel, Peer)> {
        let fd = self.next().await?;
        let peer = process(&fd);
        Ok((Channel::adopt(&self.io, fd)?, peer))
    }

    /// Listens no more: whoever waits for a connection gets an error. Somebody else may, who has the
    /// same socket.
    pub fn close(&self) {
        self.closed.set(true);
        self.io.cancel(&self.descriptor);
    }

    async fn next(&self) -> io::Result<OwnedFd> {
        loop {
            if self.closed.get() {
                return Err(io::ErrorKind::NotConnected.into());
            }
            match rustix::net::accept_with(self.descriptor.fd(), SocketFlags::CLOEXEC) {
                Ok(fd) => return Ok(fd),
                Err(Errno::AGAIN) => self.io.ready(&self.descriptor, Interest::Readable).await?,
                // The peer went away, or a signal came.
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address() {
            Ok(address) => write!(f, "Listener({address})"),
            Err(_) => f.write_str("Listener"),
        }
    }
}

/// The path of a unix socket that we bound, with its identity: it may be somebody else's later.
struct BoundPath {
    path: PathBuf,
    identity: (u64, u64),
}

impl BoundPath {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // A stale socket is replaced at the next start anyway.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            // Refused means that it is a socket, and that its listener is gone.
            match UnixStream::connect(path) {
                Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
                    if !is_socket(path)? {
                        return Err(error);
                    }
                    std::fs::remove_file(path)?;
                    UnixListener::bind(path)
                }
                _ => Err(error),
            }
        }
        outcome => outcome,
    }
}

fn is_socket(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::FileTypeExt;
    Ok(std::fs::symlink_metadata(path)?.file_type().is_socket())
}

impl Io {
    /// Takes a connected stream socket.
    ///
    /// # Errors
    /// `InvalidInput` if it is no stream socket; what the kernel says.
    pub fn adopt(&self, fd: OwnedFd) -> io::Result<(Rc<dyn Socket>, Peer)> {
        if sockopt::socket_type(&fd)? != SocketType::STREAM {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let peer = match sockopt::socket_domain(&fd)? {
            AddressFamily::UNIX => {
                sockopt::set_socket_send_buffer_size(&fd, UNIX_BUFFER_BYTES)?;
                sockopt::set_socket_recv_buffer_size(&fd, UNIX_BUFFER_BYTES)?;
                process(&fd)
            }
            _ => {
                sockopt::set_tcp_nodelay(&fd, true)?;
                sockopt::set_tcp_keepidle(&fd, TCP_KEEPALIVE_IDLE)?;
                sockopt::set_tcp_keepintvl(&fd, TCP_KEEPALIVE_INTERVAL)?;
                sockopt::set_tcp_keepcnt(&fd, TCP_KEEPALIVE_COUNT)?;
                sockopt::set_socket_keepalive(&fd, true)?;
                let address = rustix::net::getpeername(&fd)?;
                address
                    .and_then(|address| SocketAddr::try_from(address).ok())
                    .map_or(Peer::Unknown, Peer::Tcp)
            }
        };
        let stream = Stream {
            io: self.clone(),
            descriptor: self.descriptor(fd),
            incoming: Mailbox::default(),
            outgoing: Mailbox::default(),
        };
        Ok((Rc::new(KernelSocket(Rc::new(stream))), peer))
    }

    /// Connects to `address`.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn connect(&self, address: &Address) -> io::Result<Rc<dyn Socket>> {
        let fd = match address {
            // It waits only while the listener's backlog is full.
            Address::Unix(path) => UnixStream::connect(path)?.into(),
            Address::Tcp(address) => self.connect_tcp(address).await?,
        };
        self.adopt(fd).map(|(socket, _)| socket)
    }

    async fn connect_tcp(&self, address: &SocketAddr) -> io::Result<OwnedFd> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&fd, address) {
            Ok(()) => {}
            Err(Errno::INPROGRESS) => {
                let descriptor = self.descriptor(fd.try_clone()?);
                self.ready(&descriptor, Interest::Writable).await?;
                sockopt::socket_error(&fd)??;
            }
            Err(errno) => return Err(errno.into()),
        }
        rustix::io::ioctl_fionbio(&fd, false)?;
        Ok(fd)
    }
}

/// Who connected a unix socket.
fn process(fd: &OwnedFd) -> Peer {
    match peer_credentials(fd.as_fd()) {
        Ok(from) => Peer::Process { pid: (from.pid != 0).then_some(from.pid), uid: from.uid },
        Err(_) => Peer::Unknown,
    }
}

/// Where the outcome of the one operation of a direction arrives.
struct Mailbox<T> {
    busy: Cell<bool>,
    outcome: RefCell<Option<T>>,
    waker: RefCell<Option<Waker>>,
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        Self { busy: Cell::new(false), outcome: RefCell::new(None), waker: RefCell::new(None) }
    }
}

impl<T> Mailbox<T> {
    /// `false` if an operation is under way, or its outcome was never taken: a stream with a gap
    /// must not be used further.
    fn begin(&self) -> bool {
        !self.busy.replace(true)
    }

    fn deliver(&self, outcome: T) {
        *self.outcome.borrow_mut() = Some(outcome);
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn poll(&self, context: &Context<'_>) -> Poll<T> {
        if let Some(outcome) = self.outcome.borrow_mut().take() {
            self.busy.set(false);
            return Poll::Ready(outcome);
        }
        *self.waker.borrow_mut() = Some(context.waker().clone());
        Poll::Pending
    }
}

/// A connected socket, shared by its owner and the works under way on it.
pub(super) struct Stream {
    io: Io,
    descriptor: Rc<Descriptor>,
    incoming: Mailbox<(io::Result<usize>, Buffer)>,
    outgoing: Mailbox<io::Result<()>>,
}

impl Stream {
    pub(super) fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    pub(super) fn received(&self, outcome: io::Result<usize>, buffer: Buffer) {
        self.incoming.deliver((outcome, buffer));
    }

    pub(super) fn sent(&self, outcome: io::Result<()>) {
        self.outgoing.deliver(outcome);
    }

    /// Sends what lies behind the first `skip` bytes, or reports the end.
    pub(super) fn send_rest(self: Rc<Self>, segments: Vec<Segment>, skip: usize) {
        let length: usize = segments.iter().map(|segment| segment.bytes().len()).sum();
        if skip >= length {
            return self.sent(Ok(()));
        }
        let io = self.io.clone();
        io.submit(Work::Send { stream: self, segments, skip });
    }

    fn shutdown(&self) {
        // ENOTCONN: the peer was faster.
        let _ = rustix::net::shutdown(self.descriptor.fd(), Shutdown::Both);
    }
}

/// The owner's end. Dropping it ends whatever is under way.
struct KernelSocket(Rc<Stream>);

impl Socket for KernelSocket {
    fn receive(
        &self,
        buffer: Buffer,
        range: Range<usize>,
    ) -> LocalBoxFuture<(io::Result<usize>, Buffer)> {
        let stream = Rc::clone(&self.0);
        if range.is_empty() || range.end > buffer.bytes().len() {
            return Box::pin(async { (Err(io::ErrorKind::InvalidInput.into()), buffer) });
        }
        if !stream.incoming.begin() {
            return Box::pin(async { (Err(io::ErrorKind::ResourceBusy.into()), buffer) });
        }
        stream.io.submit(Work::Receive { stream: Rc::clone(&stream), buffer, range });
        Box::pin(std::future::poll_fn(move |context| stream.incoming.poll(context)))
    }

    fn send(&self, segments: Vec<Segment>) -> LocalBoxFuture<io::Result<()>> {
        let stream = Rc::clone(&self.0);
        if !stream.outgoing.begin() {
            return Box::pin(async { Err(io::ErrorKind::ResourceBusy.into()) });
        }
        Rc::clone(&stream).send_rest(segments, 0);
        Box::pin(std::future::poll_fn(move |context| stream.outgoing.poll(context)))
    }

    fn shutdown(&self) {
        self.0.shutdown();
    }
}

impl Drop for KernelSocket {
    fn drop(&mut self) {
        if self.0.incoming.busy.get() || self.0.outgoing.busy.get() {
            self.0.shutdown();
        }
    }
}
