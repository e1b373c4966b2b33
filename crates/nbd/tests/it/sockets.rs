//! The server on sockets of the kernel, driven by the reactor, on each engine that there is.

use std::rc::Rc;

use disk::MemDisk;
use nbd::protocol::request::Command;
use nbd::protocol::{Framing, PAYLOAD_BYTES_MAX};
use nbd::{Config, Server};
use runtime::reactor::{Address, EngineChoice, Listener, Reactor};

use crate::client::Client;
use crate::harness::TestCatalog;

const MIB: usize = 1 << 20;

/// Runs `test` with an address at which a server listens.
fn served<F: Future<Output = ()> + 'static>(
    address: impl Fn() -> Address,
    test: impl Fn(Kernel, Server, Address) -> F,
) {
    let engines = [EngineChoice::ThreadPool, EngineChoice::Auto];
    for engine in engines {
        let reactor = Reactor::start(engine).unwrap();
        let runtime = reactor.runtime().clone();
        let catalog = TestCatalog::one("d", Rc::new(MemDisk::new(40 * MIB)));
        let server = Server::new(&runtime, Rc::new(catalog), Config::default());
        let listener = Listener::bind(reactor.io(), &address()).unwrap();
        let address = listener.address().unwrap();
        let accepting = server.clone();
        let spawner = runtime.clone();
        drop(runtime.spawn(async move {
            loop {
                let (socket, peer) = listener.accept().await.unwrap();
                drop(spawner.spawn(accepting.serve(socket, peer.to_string())));
            }
        }));
        let io = Kernel { io: reactor.io().clone(), runtime: runtime.clone() };
        let test = test(io, server.clone(), address);
        reactor.run(test).unwrap();
        reactor.run(async move { server.shutdown().await }).unwrap();
    }
}

/// What a test needs of a reactor.
struct Kernel {
    io: runtime::reactor::Io,
    runtime: runtime::Runtime,
}

fn unix() -> Address {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("parallax-nbd-{}-{number}", std::process::id());
    Address::Unix(std::env::temp_dir().join(name))
}

fn tcp() -> Address {
    Address::Tcp("127.0.0.1:0".parse().unwrap())
}

#[test]
fn large_and_small_requests_over_real_sockets() {
    for kind in [unix, tcp] {
        served(kind, |reactor, _server, address| async move {
            for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
                let socket = reactor.io.connect(&address).await.unwrap();
                let mut client = Client::attach(socket, "d", framing).await;
                for length in [1, 4096, 16 << 10, (16 << 10) + 1, 300_000, 5 * MIB] {
                    let data: Vec<u8> = (0..length).map(|at| (at / 3) as u8).collect();
                    assert_eq!(client.write(4095, &data, 0).await.error, 0);
                    assert!(client.read(4095, length).await.data == data, "{length}");
                }
                client.submit(Command::Disconnect, 0, 0, 0, &[]).await;
                assert!(client.is_closed().await);
            }
        });
    }
}

#[test]
fn the_largest_payload_over_a_real_socket() {
    served(unix, |reactor, _server, address| async move {
        let socket = reactor.io.connect(&address).await.unwrap();
        let mut client = Client::attach(socket, "d", Framing::Structured).await;
        let max = PAYLOAD_BYTES_MAX as usize;
        let data: Vec<u8> = (0..max).map(|at| (at / 4093) as u8).collect();
        assert_eq!(client.write(1, &data, 0).await.error, 0);
        assert!(client.read(1, max).await.data == data);
    });
}

#[test]
fn pipelined_writes_of_many_connections() {
    served(unix, |reactor, server, address| async move {
        let mut tasks = Vec::new();
        for number in 0..8u64 {
            let socket = reactor.io.connect(&address).await.unwrap();
            tasks.push(reactor.runtime.spawn(async move {
                let mut client = Client::attach(socket, "d", Framing::Structured).await;
                for round in 0..10u8 {
                    for block in 0..64u64 {
                        let offset = (number * 64 + block) * 4096;
                        client.submit_write(offset, &[round ^ number as u8; 4096], 0).await;
                    }
                    for _ in 0..64 {
                        assert_eq!(client.answer(0).await.unwrap().error, 0);
                    }
                }
                let data = client.read(number * 64 * 4096, 64 * 4096).await.data;
                assert!(data == vec![9 ^ number as u8; 64 * 4096]);
            }));
        }
        for task in tasks {
            task.await;
        }
        assert_eq!(server.metrics().writes, 8 * 10 * 64);
        assert_eq!(server.metrics().requests_failed, 0);
    });
}

#[test]
fn clients_that_hang_up_in_the_middle_leave_nothing_behind() {
    served(unix, |reactor, server, address| async move {
        for number in 0..20usize {
            let socket = reactor.io.connect(&address).await.unwrap();
            let mut client = Client::attach(Rc::clone(&socket), "d", Framing::Structured).await;
            for _ in 0..number {
                client.submit(Command::Read, 0, 0, MIB as u64, &[]).await;
            }
            client.submit(Command::Write, 0, 0, 8 * MIB as u64, &vec![1; number * 50_000]).await;
            socket.shutdown();
        }
        let socket = reactor.io.connect(&address).await.unwrap();
        let mut client = Client::attach(socket, "d", Framing::Structured).await;
        assert_eq!(client.read(0, 4096).await.data, [0; 4096], "no write arrived whole");
        while server.metrics().connections_open > 1 {
            reactor.runtime.sleep(std::time::Duration::from_millis(1)).await;
        }
    });
}
