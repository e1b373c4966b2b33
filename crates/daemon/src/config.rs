//! What a daemon is told, checked once: [`Config`] is what a person writes, `Plan` can be
//! carried out.
//!
//! Invariant: a `Plan` listens on nothing but unix sockets, loopback and TLS, unless the
//! operator asked for plaintext in so many words.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use api::{Error, Kind};

use crate::sockets::Sockets;

/// NBD's registered port.
pub const NBD_PORT: u16 = 10809;

/// Least memory for tree nodes: one path of a tree per request in flight.
pub const CACHE_BYTES_MIN: u64 = 4 << 20;

/// The least memory of a garbage collection: a pass over the trees looks at 16 GiB of data or more.
pub const GC_MEMORY_BYTES_MIN: u64 = 1 << 20;

/// The memory of a garbage collection if nothing is said: as much as bits of 2 TiB take, and in each of several
/// passes of 4 TiB.
pub const GC_MEMORY_BYTES: u64 = 256 << 20;

/// Most bytes of a unix socket's path: `sun_path` in unix(7), less its NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What a daemon serves, and where.
#[derive(Clone, Debug)]
pub struct Config {
    /// File or block device with a store on it.
    pub store: PathBuf,
    /// Unix socket of the control plane. The daemon's own NBD socket lies beside it, see
    /// [`own_nbd_socket`].
    pub socket: PathBuf,
    /// Further NBD addresses.
    pub nbd: Vec<NbdAddress>,
    /// Bytes of tree nodes to keep in memory, at least [`CACHE_BYTES_MIN`].
    pub cache_bytes: u64,
    /// Bytes of memory that a garbage collection may take for what it knows of blocks, at least
    /// [`GC_MEMORY_BYTES_MIN`].
    pub gc_memory_bytes: u64,
    /// Certificate and key for TCP clients.
    pub tls: Option<TlsFiles>,
    /// Allows plaintext TCP beyond loopback.
    pub insecure_plaintext: bool,
    /// Go through the page cache, for file systems without O_DIRECT.
    pub buffered: bool,
    /// When and how fast scrub runs by itself.
    pub scrub: Scrub,
}

/// When scrub runs by itself, and how fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scrub {
    /// From the end of one pass to the beginning of the next; zero: never.
    pub every: Duration,
    /// Bytes that a pass reads in a second; 0 has no limit.
    pub rate_bytes: u64,
}

/// Where TLS certificates lie, named as QEMU and nbdkit name them.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Has `server-cert.pem` and `server-key.pem`, and `ca-cert.pem` if clients are verified.
    pub dir: PathBuf,
    /// Whether clients must show a certificate that `ca-cert.pem` signed.
    pub verify_clients: bool,
}

/// Where NBD clients connect: `unix:/path`, `tcp:host` or `tcp:host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port of this host.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
}

impl FromStr for NbdAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let invalid = || format!("'{text}' is neither unix:/path nor tcp:host:port");
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(invalid()) } else { Ok(Self::Unix(path.into())) };
        }
        let rest = text.strip_prefix("tcp:").ok_or_else(invalid)?;
        let (host, port) = match rest.strip_prefix('[') {
            Some(bracketed) => {
                let (host, rest) = bracketed.split_once(']').ok_or_else(invalid)?;
                let port = match rest {
                    "" => None,
                    _ => Some(rest.strip_prefix(':').ok_or_else(invalid)?),
                };
                (host, port)
            }
            None => match rest.split_once(':') {
                Some((_, port)) if port.contains(':') => {
                    return Err(format!("'{text}': an IPv6 address goes in brackets, tcp:[::1]"));
                }
                Some((host, port)) => (host, Some(port)),
                None => (rest, None),
            },
        };
        if host.is_empty() {
            return Err(format!("'{text}' has no host (0.0.0.0 and [::] mean every address)"));
        }
        let port = match port {
            Some(port) => port.parse().map_err(|_| format!("'{port}' is not a port"))?,
            None => NBD_PORT,
        };
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

/// The NBD socket that every daemon serves beside its control socket: `/run/parallax.sock` goes
/// with `/run/parallax.nbd.sock`.
#[must_use]
pub fn own_nbd_socket(control: &Path) -> PathBuf {
    control.with_extension("nbd.sock")
}

/// Whether a unix socket can have this path.
pub(crate) fn check_socket_path(path: &Path) -> Result<(), Error> {
    let length = path.as_os_str().len();
    if length <= SOCKET_PATH_BYTES_MAX {
        return Ok(());
    }
    Err(Error::new(
        Kind::Invalid,
        format!(
            "{} cannot be a socket: its path has {length} bytes, of {SOCKET_PATH_BYTES_MAX} at \
             most; name a shorter one",
            path.display()
        ),
    ))
}

/// A configuration that can be carried out.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The store.
    pub(crate) store: PathBuf,
    /// Control socket.
    pub(crate) socket: PathBuf,
    /// Where to listen for NBD clients; the daemon's own socket comes first.
    pub(crate) listen: Vec<Listen>,
    /// Bytes of tree nodes to keep in memory.
    pub(crate) cache_bytes: usize,
    /// Bytes of memory of a garbage collection.
    pub(crate) gc_memory_bytes: u64,
    /// Certificate and key for TCP clients.
    pub(crate) tls: Option<TlsFiles>,
    /// Whether to go through the page cache.
    pub(crate) buffered: bool,
    /// When and how fast scrub runs by itself.
    pub(crate) scrub: Scrub,
    /// The sockets that the process has.
    pub(crate) sockets: Arc<Sockets>,
}

/// One address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Listen {
    /// A unix socket; `private` ones are for the daemon's own user only.
    Unix { path: PathBuf, private: bool },
    /// A TCP port, on the first of these addresses that can be had.
    Tcp { name: String, addresses: Vec<SocketAddr>, tls: bool },
}

impl Config {
    /// Checks everything that can be checked without touching the store.
    pub(crate) fn plan(self) -> Result<Plan, Error> {
        let invalid = |message: String| Error::new(Kind::Invalid, message);
        if self.cache_bytes < CACHE_BYTES_MIN {
            return Err(invalid("the cache must have at least 4M: raise --cache".to_owned()));
        }
        let cache_bytes = usize::try_from(self.cache_bytes)
            .map_err(|_| invalid("the cache is larger than this machine's memory".to_owned()))?;
        if self.gc_memory_bytes < GC_MEMORY_BYTES_MIN {
            let message = "a garbage collection must have at least 1M: raise --gc-memory";
            return Err(invalid(message.to_owned()));
        }
        let own = own_nbd_socket(&self.socket);
        let mut listen = vec![Listen::Unix { path: own.clone(), private: true }];
        for address in &self.nbd {
            let next = match address {
                NbdAddress::Unix(path) if *path == own => continue,
                NbdAddress::Unix(path) => Listen::Unix { path: path.clone(), private: false },
                NbdAddress::Tcp { host, port } => self.listen_tcp(address, host, *port)?,
            };
            if !listen.contains(&next) {
                listen.push(next);
            }
        }
        for socket in &listen {
            if let Listen::Unix { path, .. } = socket {
                check_socket_path(path)?;
            }
        }
        check_socket_path(&api::mount::socket(&self.socket))?;
        let Self { store, socket, gc_memory_bytes, tls, buffered, scrub, .. } = self;
        let sockets = Arc::new(Sockets::inherit());
        Ok(Plan {
            store,
            socket,
            listen,
            cache_bytes,
            gc_memory_bytes,
            tls,
            buffered,
            scrub,
            sockets,
        })
    }

    fn listen_tcp(&self, address: &NbdAddress, host: &str, port: u16) -> Result<Listen, Error> {
        let addresses: Vec<SocketAddr> = (host, port)
            .to_socket_addrs()
            .map_err(|e| Error::new(Kind::Invalid, format!("{address}: cannot find host: {e}")))?
            .collect();
        let loopback = addresses.iter().all(|address| address.ip().is_loopback());
        if !loopback && self.tls.is_none() && !self.insecure_plaintext {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "{address} can be reached from other machines and would serve every disk to \
                     anybody: give certificates with --tls-dir, or listen on tcp:127.0.0.1:{port}; \
                     --insecure-plaintext overrides this"
                ),
            ));
        }
        Ok(Listen::Tcp { name: address.to_string(), addresses, tls: self.tls.is_some() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(nbd: &[&str]) -> Config {
        Config {
            store: "/s".into(),
            socket: "/run/parallax.sock".into(),
            nbd: nbd.iter().map(|text| text.parse().unwrap()).collect(),
            cache_bytes: CACHE_BYTES_MIN,
            gc_memory_bytes: GC_MEMORY_BYTES_MIN,
            tls: None,
            insecure_plaintext: false,
            buffered: false,
            scrub: Scrub { every: Duration::ZERO, rate_bytes: 0 },
        }
    }

    #[test]
    fn addresses_parse_and_print() {
        let check = |text: &str, printed: &str| {
            assert_eq!(text.parse::<NbdAddress>().unwrap().to_string(), printed);
        };
        check("unix:/run/a b", "unix:/run/a b");
        check("tcp:localhost", "tcp:localhost:10809");
        check("tcp:10.0.0.1:1", "tcp:10.0.0.1:1");
        check("tcp:[::1]", "tcp:[::1]:10809");
        check("tcp:[::]:9", "tcp:[::]:9");
        for bad in [
            "",
            "unix:",
            "/x",
            "tcp:",
            "tcp::1",
            "tcp:a:b",
            "tcp:a:70000",
            "tcp:[::1",
            "tcp:[::1]9",
        ] {
            assert!(bad.parse::<NbdAddress>().is_err(), "{bad}");
        }
        assert!("tcp:::1".parse::<NbdAddress>().unwrap_err().contains("brackets"));
    }

    #[test]
    fn plaintext_stays_on_this_machine() {
        for local in ["tcp:127.0.0.1", "tcp:[::1]", "unix:/x"] {
            assert_eq!(config(&[local]).plan().unwrap().listen.len(), 2, "{local}");
        }
        for open in ["tcp:0.0.0.0", "tcp:[::]", "tcp:192.0.2.1"] {
            let refused = config(&[open]).plan().unwrap_err();
            assert_eq!(refused.kind, Kind::Invalid);
            assert!(refused.message.contains("--tls-dir"), "{refused}");
            let tls = Some(TlsFiles { dir: "/t".into(), verify_clients: false });
            assert!(Config { tls, ..config(&[open]) }.plan().is_ok());
            assert!(Config { insecure_plaintext: true, ..config(&[open]) }.plan().is_ok());
        }
    }

    #[test]
    fn the_own_nbd_socket_comes_first_and_once() {
        let plan = config(&["unix:/run/parallax.nbd.sock", "unix:/x", "unix:/x"]).plan().unwrap();
        let own = Listen::Unix { path: "/run/parallax.nbd.sock".into(), private: true };
        assert_eq!(plan.listen, [own, Listen::Unix { path: "/x".into(), private: false }]);
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused() {
        let long = |length: usize| PathBuf::from(format!("/{}", "x".repeat(length - 1)));
        // The socket for keepers of mounts has a longer name than the control socket.
        let check = |length, fits| {
            let plan = Config { socket: long(length), ..config(&[]) }.plan();
            assert_eq!(plan.is_ok(), fits, "{length}: {plan:?}");
        };
        check(95, true);
        check(96, false);
        let nbd = vec![NbdAddress::Unix(long(108))];
        let refused = Config { nbd, ..config(&[]) }.plan().unwrap_err();
        assert!(refused.message.contains("107 at most"), "{refused}");
    }

    #[test]
    fn a_cache_too_small_is_refused() {
        let config = Config { cache_bytes: CACHE_BYTES_MIN - 1, ..config(&[]) };
        assert!(config.plan().unwrap_err().message.contains("--cache"));
    }
}
