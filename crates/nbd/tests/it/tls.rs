//! TLS, with rustls as the client too.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use base::Buffer;
use nbd::protocol::handshake::{self, option, reply};
use nbd::protocol::request::Command;
use nbd::protocol::{Framing, error};
use nbd::{ClientCertificates, Config, Security, TlsServer};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use runtime::LocalBoxFuture;
use runtime::Order;
use runtime::socket::{Segment, Socket};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::client::{Client, Closed};
use crate::harness::{Harness, TestCatalog};

const MIB: usize = 1 << 20;

/// A directory with certificates as QEMU lays them out; removed at the end.
struct Certificates(PathBuf);

impl Certificates {
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("nbd-tls-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(directory.join("ca-cert.pem"), ca.pem()).unwrap();
        for role in ["server", "client"] {
            let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &ca).unwrap();
            std::fs::write(directory.join(format!("{role}-cert.pem")), certificate.pem()).unwrap();
            std::fs::write(directory.join(format!("{role}-key.pem")), key.serialize_pem()).unwrap();
        }
        Self(directory)
    }

    fn server(&self, clients: ClientCertificates) -> TlsServer {
        TlsServer::load(&self.0, clients).unwrap()
    }

    /// A client that trusts `ca`, with a certificate of its own from `own`.
    fn client(ca: &Self, own: Option<&Self>) -> ClientConfig {
        let certificate = |path: &Path| CertificateDer::from_pem_file(path).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate(&ca.0.join("ca-cert.pem"))).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        match own {
            None => builder.with_no_client_auth(),
            Some(own) => {
                let key = PrivateKeyDer::from_pem_file(own.0.join("client-key.pem")).unwrap();
                let chain = vec![certificate(&own.0.join("client-cert.pem"))];
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        }
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The client's end of TLS. Simple: it never sends and receives at the same time.
struct ClientTls {
    inner: Rc<dyn Socket>,
    connection: Rc<RefCell<ClientConnection>>,
}

impl ClientTls {
    async fn connect(inner: Rc<dyn Socket>, config: ClientConfig) -> io::Result<Self> {
        let name = "localhost".try_into().unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let connection = Rc::new(RefCell::new(connection));
        while connection.borrow().is_handshaking() {
            flush(&inner, &connection).await?;
            if connection.borrow().is_handshaking() {
                feed(&inner, &connection).await?;
            }
        }
        flush(&inner, &connection).await?;
        Ok(Self { inner, connection })
    }
}

async fn flush(inner: &Rc<dyn Socket>, connection: &RefCell<ClientConnection>) -> io::Result<()> {
    let mut out = Vec::new();
    while connection.borrow().wants_write() {
        connection.borrow_mut().write_tls(&mut out)?;
    }
    inner.send(vec![Segment::Bytes(out)]).await
}

async fn feed(inner: &Rc<dyn Socket>, connection: &RefCell<ClientConnection>) -> io::Result<()> {
    // Less than a record, so that records arrive in pieces.
    let buffer = Buffer::zeroed(1);
    let (result, buffer) = inner.receive(buffer, 0..1000).await;
    let count = result?;
    if count == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut bytes = &buffer.bytes()[..count];
    let mut connection = connection.borrow_mut();
    while !bytes.is_empty() {
        connection.read_tls(&mut bytes)?;
        connection.process_new_packets().map_err(io::Error::other)?;
    }
    Ok(())
}

impl Socket for ClientTls {
    fn receive(
        &self,
        mut buffer: Buffer,
        range: Range<usize>,
    ) -> LocalBoxFuture<(io::Result<usize>, Buffer)> {
        let (inner, connection) = (Rc::clone(&self.inner), Rc::clone(&self.connection));
        Box::pin(async move {
            loop {
                let into = &mut buffer.bytes_mut()[range.clone()];
                let result = connection.borrow_mut().reader().read(into);
                match result {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return (other, buffer),
                }
                if let Err(error) = feed(&inner, &connection).await {
                    return (Err(error), buffer);
                }
            }
        })
    }

    fn send(&self, segments: Vec<Segment>) -> LocalBoxFuture<io::Result<()>> {
        let (inner, connection) = (Rc::clone(&self.inner), Rc::clone(&self.connection));
        Box::pin(async move {
            for segment in &segments {
                for piece in segment.bytes().chunks(10_000) {
                    connection.borrow_mut().writer().write_all(piece)?;
                    flush(&inner, &connection).await?;
                }
            }
            Ok(())
        })
    }

    fn shutdown(&self) {
        self.inner.shutdown();
    }
}

fn harness(security: Security) -> Harness {
    let config = Config { security, ..Config::default() };
    Harness::with(TestCatalog::memory(8 * MIB), config, Order::Fifo, 1)
}

/// STARTTLS and a handshake on a connection past the greeting.
async fn secure(
    mut client: Client,
    socket: Rc<dyn Socket>,
    config: ClientConfig,
) -> io::Result<Client> {
    let replies = client.option(option::STARTTLS, &[]).await;
    assert_eq!(replies, Ok(vec![(reply::ACK, vec![])]));
    let tls: Rc<dyn Socket> = Rc::new(ClientTls::connect(socket, config).await?);
    Ok(Client::new(tls))
}

#[test]
fn without_tls_a_client_learns_nothing() {
    let certificates = Certificates::new("nothing");
    let server = certificates.server(ClientCertificates::Ignored);
    let harness = harness(Security::Required(server));
    let socket = harness.connect(1 << 20);
    harness.run(async move {
        let mut client = Client::greet(socket).await;
        for option in [
            option::LIST,
            option::INFO,
            option::GO,
            option::STRUCTURED_REPLY,
            option::EXTENDED_HEADERS,
            option::LIST_META_CONTEXT,
            option::SET_META_CONTEXT,
            99,
        ] {
            let replies = client.option(option, b"whatever").await.unwrap();
            assert_eq!(replies[0].0, reply::ERR_TLS_REQD, "{option}");
        }
        let replies = client.option(option::ABORT, &[]).await;
        assert_eq!(replies, Ok(vec![(reply::ACK, vec![])]));
    });
    let socket = harness.connect(1 << 20);
    harness.run(async move {
        let mut client = Client::greet(socket).await;
        assert_eq!(client.option(option::EXPORT_NAME, b"d").await, Err(Closed));
    });
}

#[test]
fn a_whole_session_over_tls() {
    let certificates = Certificates::new("session");
    for required in [true, false] {
        let server = certificates.server(ClientCertificates::Ignored);
        let security =
            if required { Security::Required(server) } else { Security::Optional(server) };
        let harness = harness(security);
        let socket = harness.connect(1 << 16);
        let config = Certificates::client(&certificates, None);
        harness.run(async move {
            let client = Client::greet(Rc::clone(&socket)).await;
            let mut client = secure(client, socket, config).await.unwrap();
            let replies = client.option(option::STARTTLS, &[]).await.unwrap();
            assert_eq!(replies[0].0, reply::ERR_INVALID, "once is enough");
            client.negotiate("d", Framing::Extended).await;
            let data: Vec<u8> = (0..3 * MIB).map(|index| (index / 5) as u8).collect();
            assert_eq!(client.write(7, &data, 0).await.error, 0);
            assert!(client.read(7, data.len()).await.data == data);
            client.submit(Command::Disconnect, 0, 0, 0, &[]).await;
            assert!(client.is_closed().await);
        });
        let metrics = harness.server.metrics();
        assert_eq!((metrics.handshakes_tls, metrics.sessions_failed), (1, 0));
    }
}

#[test]
fn optional_tls_serves_plain_clients_too() {
    let certificates = Certificates::new("optional");
    let server = certificates.server(ClientCertificates::Ignored);
    let harness = harness(Security::Optional(server));
    let socket = harness.connect(1 << 16);
    harness.run(async move {
        let mut client = Client::attach(socket, "d", Framing::Structured).await;
        assert_eq!(client.read(0, 1).await.data, [0]);
    });
}

#[test]
fn nothing_agreed_before_tls_counts_after_it() {
    let certificates = Certificates::new("state");
    let server = certificates.server(ClientCertificates::Ignored);
    let harness = harness(Security::Optional(server));
    let socket = harness.connect(1 << 16);
    let config = Certificates::client(&certificates, None);
    harness.run(async move {
        let mut client = Client::greet(Rc::clone(&socket)).await;
        client.set_framing(Framing::Extended).await;
        client.set_allocation("d").await;
        let mut client = secure(client, socket, config).await.unwrap();
        client.set_framing(Framing::Structured).await;
        client.go("d").await;
        let answer = client.request(Command::BlockStatus, 0, 0, 4096).await;
        assert_eq!(answer.error, error::EINVAL, "the context was selected before TLS");
    });
}

#[test]
fn plaintext_after_starttls_ends_the_session() {
    let certificates = Certificates::new("injected");
    let server = certificates.server(ClientCertificates::Ignored);
    let harness = harness(Security::Required(server));
    let socket = harness.connect(1 << 16);
    harness.run(async move {
        let mut client = Client::greet(socket).await;
        let mut out = Vec::new();
        handshake::encode_option(option::STARTTLS, &[], &mut out);
        handshake::encode_option(option::LIST, &[], &mut out);
        client.send(out).await;
        client.receive(20).await.unwrap();
        assert!(client.is_closed().await);
    });
    assert_eq!(harness.runtime.now().0, 0, "at once, not when the handshake takes too long");
}

#[test]
fn starttls_with_data_is_refused_and_nonsense_for_a_handshake_ends_the_session() {
    let certificates = Certificates::new("nonsense");
    let server = certificates.server(ClientCertificates::Ignored);
    let harness = harness(Security::Required(server));
    let socket = harness.connect(1 << 16);
    harness.run(async move {
        let mut client = Client::greet(socket).await;
        let replies = client.option(option::STARTTLS, b"x").await.unwrap();
        assert_eq!(replies[0].0, reply::ERR_INVALID);
        client.option(option::STARTTLS, &[]).await.unwrap();
        client.send(b"IHAVEOPT, have I not?".repeat(10)).await;
        let alert = client.receive(7).await.unwrap();
        assert_eq!(alert[0], 21, "an alert says what is wrong");
        assert!(client.is_closed().await);
    });
    assert_eq!(harness.server.metrics().handshakes_failed, 1);
}

#[test]
fn clients_are_verified_if_asked_for() {
    let certificates = Certificates::new("mutual");
    let strangers = Certificates::new("strangers");
    for (own, welcome) in [(Some(&certificates), true), (Some(&strangers), false), (None, false)] {
        let server = certificates.server(ClientCertificates::Required);
        let harness = harness(Security::Required(server));
        let socket = harness.connect(1 << 16);
        let config = Certificates::client(&certificates, own);
        let served = harness.run(async move {
            let client = Client::greet(Rc::clone(&socket)).await;
            // With TLS 1.3 the client believes in success before the server has verified it.
            let Ok(mut client) = secure(client, socket, config).await else { return false };
            client.option(option::LIST, &[]).await.is_ok()
        });
        assert_eq!(served, welcome);
        assert_eq!(harness.server.metrics().handshakes_failed, u64::from(!welcome));
    }
}

#[test]
fn a_client_that_trusts_somebody_else_goes_away() {
    let certificates = Certificates::new("other-ca");
    let others = Certificates::new("other-ca-2");
    let server = certificates.server(ClientCertificates::Ignored);
    let harness = harness(Security::Required(server));
    let socket = harness.connect(1 << 16);
    let config = Certificates::client(&others, None);
    harness.run(async move {
        let client = Client::greet(Rc::clone(&socket)).await;
        assert!(secure(client, Rc::clone(&socket), config).await.is_err());
        socket.shutdown();
    });
    assert_eq!(harness.server.metrics().handshakes_tls, 0);
}

#[test]
fn unusable_certificates_are_refused_with_the_name_of_the_file() {
    let certificates = Certificates::new("unusable");
    let load = || TlsServer::load(&certificates.0, ClientCertificates::Required).unwrap_err();
    let write = |name: &str, text: &str| std::fs::write(certificates.0.join(name), text).unwrap();
    let other = Certificates::new("unusable-2");
    let key = std::fs::read_to_string(other.0.join("server-key.pem")).unwrap();
    write("server-key.pem", &key);
    assert!(load().to_string().contains("do not fit together"), "{}", load());
    write("ca-cert.pem", "nothing");
    assert!(load().to_string().contains("ca-cert.pem"), "{}", load());
    write("server-key.pem", "");
    assert!(load().to_string().contains("server-key.pem"), "{}", load());
    std::fs::remove_file(certificates.0.join("server-cert.pem")).unwrap();
    assert!(load().to_string().contains("server-cert.pem"), "{}", load());
}

#[test]
fn every_metric_counts_something() {
    let certificates = Certificates::new("metrics");
    let server = certificates.server(ClientCertificates::Ignored);
    let config =
        Config { security: Security::Optional(server), connections_max: 1, ..Config::default() };
    let harness = Harness::with(TestCatalog::memory(8 * MIB), config, Order::Fifo, 1);
    let socket = harness.connect(1 << 16);
    harness.run(async move { Client::greet(socket).await.send(vec![0; 100]).await });
    harness.settle();
    let socket = harness.connect(1 << 16);
    harness.run(async move {
        let mut client = Client::attach(socket, "d", Framing::Simple).await;
        client.send(vec![0; 100]).await;
        assert!(client.is_closed().await);
    });
    let socket = harness.connect(1 << 16);
    let refused = harness.connect(1 << 16);
    let config = Certificates::client(&certificates, None);
    let _client = harness.run(async move {
        assert!(Client::new(refused).is_closed().await);
        let client = Client::greet(Rc::clone(&socket)).await;
        let mut client = secure(client, socket, config).await.unwrap();
        client.negotiate("d", Framing::Structured).await;
        client.write(0, &[1; 100], 0).await;
        client.read(0, 10).await;
        client.read(u64::MAX, 10).await;
        for command in [Command::Flush, Command::Trim, Command::WriteZeroes, Command::Cache] {
            client.request(command, 0, 0, 0).await;
        }
        client.request(Command::BlockStatus, 0, 0, 4096).await;
        client
    });
    let metrics = harness.server.metrics();
    for (name, value, _) in metrics.values() {
        assert!(value > 0, "{name}");
    }
    assert_eq!((metrics.read_bytes, metrics.written_bytes, metrics.requests_failed), (10, 100, 1));
    let names: std::collections::BTreeSet<_> = metrics.values().map(|value| value.0).into();
    assert_eq!(names.len(), metrics.values().len(), "names differ");
}
