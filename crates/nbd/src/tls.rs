//! TLS for a connection: rustls driven over memory, so that it runs on any [`Socket`].
//!
//! Certificates are X.509, laid out as QEMU's `tls-creds-x509` directories are, so that one set
//! serves both. Pre-shared keys are not possible with rustls.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use base::{BLOCK_SIZE, Buffer, BufferPool};
use runtime::LocalBoxFuture;
use runtime::socket::{Segment, Socket};
use runtime::sync::Semaphore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

/// Blocks of the buffer for received ciphertext: 64 KiB, four TLS records.
const CIPHERTEXT_BLOCKS: usize = 16;

/// Plaintext that is encrypted before it is sent, in bytes; bounds what a connection holds of it.
const PLAINTEXT_BYTES_MAX: usize = 256 << 10;

/// Whether clients may or must use TLS.
#[derive(Clone, Debug, Default)]
pub enum Security {
    /// No TLS: for unix sockets, whose permissions protect them, and for loopback.
    #[default]
    Plaintext,
    /// At the client's option. Does not protect against somebody in between, who can suppress
    /// the option.
    Optional(TlsServer),
    /// Every option but STARTTLS and ABORT is refused before TLS.
    Required(TlsServer),
}

/// A certificate with its key, and what is asked of clients.
#[derive(Clone, Debug)]
pub struct TlsServer(Arc<ServerConfig>);

/// Which clients TLS lets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientCertificates {
    /// Anyone; clients only verify the server.
    Ignored,
    /// Those with a certificate that `ca-cert.pem` signed.
    Required,
}

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or holds no PEM of the kind that it should.
    #[error("read {path}: {source}")]
    File {
        /// The file.
        path: String,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// The certificates do not fit together.
    #[error("certificates in {path} do not fit together: {source}")]
    Certificates {
        /// Their directory.
        path: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl TlsServer {
    /// Reads `server-cert.pem`, `server-key.pem` and, to verify clients, `ca-cert.pem` from
    /// `directory`. Blocks; meant for start-up.
    ///
    /// # Errors
    /// `TlsError`, which names the file.
    pub fn load(directory: &Path, clients: ClientCertificates) -> Result<Self, TlsError> {
        let certificates = read_certificates(&directory.join("server-cert.pem"))?;
        let key_path = directory.join("server-key.pem");
        let key = PrivateKeyDer::from_pem_file(&key_path)
            .map_err(|source| TlsError::File { path: key_path.display().to_string(), source })?;
        let roots = match clients {
            ClientCertificates::Ignored => None,
            ClientCertificates::Required => {
                Some(read_certificates(&directory.join("ca-cert.pem"))?)
            }
        };
        Self::new(certificates, key, roots).map_err(|source| TlsError::Certificates {
            path: directory.display().to_string(),
            source,
        })
    }

    fn new(
        certificates: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        client_roots: Option<Vec<CertificateDer<'static>>>,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        // The provider is named, not installed process-wide: a library must not.
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?;
        let builder = match client_roots {
            None => builder.with_no_client_auth(),
            Some(certificates) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates {
                    roots.add(certificate)?;
                }
                let roots = Arc::new(roots);
                builder.with_client_cert_verifier(
                    WebPkiClientVerifier::builder_with_provider(roots, provider).build()?,
                )
            }
        };
        Ok(Self(Arc::new(builder.with_single_cert(certificates, key)?)))
    }
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let file = |source| TlsError::File { path: path.display().to_string(), source };
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(file)?
        .collect::<Result<_, _>>()
        .map_err(file)?;
    if certificates.is_empty() {
        return Err(file(rustls::pki_types::pem::Error::NoItemsFound));
    }
    Ok(certificates)
}

/// A socket that encrypts what goes over another.
pub(crate) struct TlsSocket {
    shared: Rc<Shared>,
}

struct Shared {
    inner: Rc<dyn Socket>,
    connection: RefCell<ServerConnection>,
    ciphertext: RefCell<Ciphertext>,
    /// Held while sending on `inner`: receiving sends too, when TLS has something to say.
    sending: Semaphore,
}

/// Ciphertext that was received and not decrypted yet.
struct Ciphertext {
    buffer: Buffer,
    held: Range<usize>,
}

impl TlsSocket {
    /// Does the handshake as the server.
    pub(crate) async fn accept(
        inner: Rc<dyn Socket>,
        tls: &TlsServer,
        pool: &BufferPool,
    ) -> io::Result<Self> {
        let mut connection = ServerConnection::new(Arc::clone(&tls.0)).map_err(invalid)?;
        // `send` bounds what it hands over; a limit of rustls's own would cut it short.
        connection.set_buffer_limit(None);
        let shared = Rc::new(Shared {
            inner,
            connection: RefCell::new(connection),
            ciphertext: RefCell::new(Ciphertext {
                buffer: pool.take(CIPHERTEXT_BLOCKS),
                held: 0..0,
            }),
            sending: Semaphore::new(1),
        });
        while shared.connection.borrow().is_handshaking() {
            shared.receive_ciphertext().await?;
        }
        shared.flush().await?;
        Ok(Self { shared })
    }

    /// Tells the peer that nothing more will come.
    pub(crate) async fn close(&self) -> io::Result<()> {
        self.shared.connection.borrow_mut().send_close_notify();
        self.shared.flush().await
    }
}

impl Shared {
    /// Decrypts what is held, or receives more and decrypts that. Answers if TLS needs to.
    async fn receive_ciphertext(&self) -> io::Result<()> {
        if self.ciphertext.borrow().held.is_empty() {
            let buffer =
                std::mem::replace(&mut self.ciphertext.borrow_mut().buffer, Buffer::zeroed(0));
            let room = 0..buffer.bytes().len();
            let (result, buffer) = self.inner.receive(buffer, room).await;
            let mut ciphertext = self.ciphertext.borrow_mut();
            ciphertext.buffer = buffer;
            ciphertext.held = 0..result?;
        }
        let decrypted = self.decrypt();
        // After an error too: the peer gets the alert that says why.
        let wants_write = self.connection.borrow().wants_write();
        if wants_write {
            self.flush().await?;
        }
        decrypted
    }

    fn decrypt(&self) -> io::Result<()> {
        let mut ciphertext = self.ciphertext.borrow_mut();
        let mut connection = self.connection.borrow_mut();
        let held = ciphertext.held.clone();
        let mut bytes = ciphertext.buffer.bytes().get(held).unwrap_or_default();
        if bytes.is_empty() {
            // Without a close_notify the end may have been forged; nobody here cares, because
            // every NBD message carries its length.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let taken = connection.read_tls(&mut bytes)?;
        connection.process_new_packets().map_err(invalid)?;
        ciphertext.held.start += taken;
        Ok(())
    }

    /// Sends what TLS has to say.
    async fn flush(&self) -> io::Result<()> {
        let _turn = self.sending.acquire(1).await;
        self.send_ciphertext().await
    }

    /// The caller holds `sending`.
    async fn send_ciphertext(&self) -> io::Result<()> {
        let mut bytes = Vec::new();
        {
            let mut connection = self.connection.borrow_mut();
            while connection.wants_write() {
                connection.write_tls(&mut bytes)?;
            }
        }
        if bytes.is_empty() { Ok(()) } else { self.inner.send(vec![Segment::Bytes(bytes)]).await }
    }

    /// Decrypted bytes that are ready; `None` if there are none yet.
    fn read_plaintext(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let mut have = 0;
        let mut connection = self.connection.borrow_mut();
        while have < into.len() {
            match connection.reader().read(into.get_mut(have..).unwrap_or_default()) {
                Ok(0) => return Ok(Some(have)),
                Ok(count) => have += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok((have > 0).then_some(have))
    }

    async fn receive(&self, buffer: &mut Buffer, range: Range<usize>) -> io::Result<usize> {
        loop {
            let into = buffer.bytes_mut().get_mut(range.clone()).unwrap_or_default();
            if let Some(count) = self.read_plaintext(into)? {
                return Ok(count);
            }
            match self.receive_ciphertext().await {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => other?,
            }
        }
    }

    async fn send(&self, segments: &[Segment]) -> io::Result<()> {
        let _turn = self.sending.acquire(1).await;
        let mut waiting = 0;
        for segment in segments {
            for piece in segment.bytes().chunks(PLAINTEXT_BYTES_MAX) {
                self.connection.borrow_mut().writer().write_all(piece)?;
                waiting += piece.len();
                if waiting >= PLAINTEXT_BYTES_MAX {
                    self.send_ciphertext().await?;
                    waiting = 0;
                }
            }
        }
        self.send_ciphertext().await
    }
}

impl Socket for TlsSocket {
    fn receive(
        &self,
        mut buffer: Buffer,
        range: Range<usize>,
    ) -> LocalBoxFuture<(io::Result<usize>, Buffer)> {
        let shared = Rc::clone(&self.shared);
        Box::pin(async move {
            let result = shared.receive(&mut buffer, range).await;
            (result, buffer)
        })
    }

    fn send(&self, segments: Vec<Segment>) -> LocalBoxFuture<io::Result<()>> {
        let shared = Rc::clone(&self.shared);
        Box::pin(async move { shared.send(&segments).await })
    }

    fn shutdown(&self) {
        self.shared.inner.shutdown();
    }
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

const _: () = assert!(CIPHERTEXT_BLOCKS * BLOCK_SIZE >= 16_384 + 256, "a TLS record must fit");
