//! Sockets of the kernel: order, volume, ends and refusals.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use base::{BLOCK_SIZE, BlockSlice, Buffer};
use parallax_runtime::reactor::{Address, Io, Listener, Peer};
use parallax_runtime::socket::{Segment, Socket};

use crate::{on_each_engine, scratch_path};

fn loopback() -> Address {
    Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 0)))
}

/// Bytes that tell their place, so that a gap or a repetition shows.
fn pattern(start: usize, length: usize) -> Vec<u8> {
    (start..start + length)
        .map(|place| u8::try_from((place * 7 + place / 251) % 256).unwrap())
        .collect()
}

/// `length` pattern bytes as a mix of owned bytes and parts of blocks.
fn mixed_segments(start: usize, length: usize, step: usize) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut place = start;
    while place < start + length {
        let part = step.min(start + length - place);
        let bytes = pattern(place, part);
        if segments.len() % 2 == 0 {
            segments.push(Segment::Bytes(bytes));
        } else {
            let mut padded = vec![0; 13];
            padded.extend(bytes);
            let slice = BlockSlice::whole(Rc::new(Buffer::from_bytes(&padded)));
            segments.push(Segment::Blocks(slice, 13..13 + part));
        }
        place += part;
    }
    segments
}

async fn receive_exactly(socket: &Rc<dyn Socket>, length: usize) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = Buffer::zeroed(16);
    while all.len() < length {
        let end = (length - all.len()).min(16 * BLOCK_SIZE - 5);
        let (count, returned) = socket.receive(buffer, 5..5 + end).await;
        buffer = returned;
        let count = count.unwrap();
        assert_ne!(count, 0, "ended after {} bytes", all.len());
        all.extend_from_slice(&buffer.bytes()[5..5 + count]);
    }
    all
}

fn connected(io: &Io, address: &Address) -> (Rc<Listener>, Address) {
    let listener = Listener::bind(io, address).unwrap();
    let bound = listener.address().unwrap();
    (Rc::new(listener), bound)
}

#[test]
fn both_directions_carry_much_at_once() {
    const BYTES: usize = 5_000_000;
    on_each_engine(|reactor| {
        for address in [Address::Unix(scratch_path()), loopback()] {
            let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
            let run = async move {
                let (listener, bound) = connected(&io, &address);
                let accepting = runtime.spawn(async move { listener.accept().await.unwrap() });
                let client = io.connect(&bound).await.unwrap();
                let (server, peer) = accepting.await;
                match bound {
                    Address::Unix(_) => {
                        assert!(matches!(peer, Peer::Process { pid: Some(pid), .. }
                        if u32::try_from(pid) == Ok(std::process::id())))
                    }
                    Address::Tcp(_) => assert!(matches!(peer, Peer::Tcp(_))),
                }
                let (outward, back) = (Rc::clone(&client), Rc::clone(&server));
                // The first has more segments than one call takes; the second few large ones.
                let sends = [
                    runtime.spawn(async move {
                        outward.send(mixed_segments(0, BYTES, 1001)).await.unwrap();
                    }),
                    runtime.spawn(async move {
                        for start in (0..BYTES).step_by(1_000_000) {
                            back.send(mixed_segments(start, 1_000_000, 300_000)).await.unwrap();
                        }
                    }),
                ];
                let receiving = runtime.spawn(async move { receive_exactly(&server, BYTES).await });
                assert!(receive_exactly(&client, BYTES).await == pattern(0, BYTES));
                assert!(receiving.await == pattern(0, BYTES));
                for send in sends {
                    send.await;
                }
            };
            reactor.run(run).unwrap();
        }
    });
}

#[test]
fn a_slow_reader_gets_everything() {
    const BYTES: usize = 3_000_000;
    on_each_engine(|reactor| {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (socket, _) = reactor.io().adopt(near.into()).unwrap();
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            let mut part = vec![0; 70_001];
            loop {
                thread::sleep(Duration::from_micros(300));
                match far.read(&mut part).unwrap() {
                    0 => return all,
                    count => all.extend_from_slice(&part[..count]),
                }
            }
        });
        reactor
            .run(async move {
                socket.send(mixed_segments(0, BYTES, 4096)).await.unwrap();
                socket.send(Vec::new()).await.unwrap();
                socket.shutdown();
            })
            .unwrap();
        assert!(reader.join().unwrap() == pattern(0, BYTES));
    });
}

#[test]
fn a_peer_that_goes_away_in_the_middle_is_an_error_not_a_signal() {
    on_each_engine(|reactor| {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (socket, _) = reactor.io().adopt(near.into()).unwrap();
        let reader = thread::spawn(move || {
            far.read_exact(&mut vec![0; 100_000]).unwrap();
            drop(far);
        });
        let error = reactor.run({
            let socket = Rc::clone(&socket);
            async move { socket.send(mixed_segments(0, 20_000_000, 65_536)).await.unwrap_err() }
        });
        let kind = error.unwrap().kind();
        assert!(
            matches!(kind, io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset),
            "{kind}"
        );
        reader.join().unwrap();
        let run = async move { socket.receive(Buffer::zeroed(1), 0..10).await.0 };
        // The peer had unread bytes when it closed, so the kernel may tell of a reset first.
        match reactor.run(run).unwrap() {
            Ok(count) => assert_eq!(count, 0),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
    });
}

/// A client whose machine lost power held its connection for ever.
#[test]
fn a_silent_tcp_peer_is_asked_whether_it_is_there() {
    on_each_engine(|reactor| {
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        let run = async move {
            let (listener, bound) = connected(&io, &loopback());
            let Address::Tcp(address) = bound else { panic!("not TCP") };
            let accepting = runtime.spawn(async move { listener.accept().await.unwrap() });
            let client = std::net::TcpStream::connect(address).unwrap();
            let (_server, _) = accepting.await;
            let port = format!(":{:04X}", address.port());
            let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
            let timer = table.lines().find_map(|line| {
                let columns: Vec<&str> = line.split_whitespace().collect();
                match columns[..] {
                    // An established connection of this port.
                    [_, local, _, "01", _, timer, ..] if local.ends_with(&port) => Some(timer),
                    _ => None,
                }
            });
            // 02 is the keepalive timer.
            assert!(timer.is_some_and(|timer| timer.starts_with("02:")), "{port}\n{table}");
            drop(client);
        };
        reactor.run(run).unwrap();
    });
}

#[test]
fn shutdown_ends_what_waits() {
    on_each_engine(|reactor| {
        let (near, _far) = UnixStream::pair().unwrap();
        let (socket, _) = reactor.io().adopt(near.into()).unwrap();
        let runtime = reactor.runtime().clone();
        reactor
            .run(async move {
                let (receiver, sender) = (Rc::clone(&socket), Rc::clone(&socket));
                let receiving =
                    runtime.spawn(async move { receiver.receive(Buffer::zeroed(1), 0..10).await });
                let sending = runtime
                    .spawn(async move { sender.send(mixed_segments(0, 9_000_000, 9_999)).await });
                runtime.sleep(Duration::from_millis(5)).await;
                socket.shutdown();
                assert_eq!(receiving.await.0.unwrap(), 0);
                assert!(sending.await.is_err());
            })
            .unwrap();
    });
}

#[test]
fn a_second_receive_is_refused_and_a_broken_off_one_ends_the_direction() {
    on_each_engine(|reactor| {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (socket, _) = reactor.io().adopt(near.into()).unwrap();
        let runtime = reactor.runtime().clone();
        reactor
            .run(async move {
                let first = socket.receive(Buffer::zeroed(1), 0..10);
                let (refused, buffer) = socket.receive(Buffer::zeroed(3), 0..10).await;
                assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ResourceBusy);
                assert_eq!(buffer.block_count(), 3, "the buffer comes back");
                drop(first);
                far.write_all(b"lost").unwrap();
                runtime.sleep(Duration::from_millis(5)).await;
                let (refused, buffer) = socket.receive(buffer, 0..10).await;
                assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ResourceBusy);
                for range in [0..0, 5..BLOCK_SIZE * 3 + 1] {
                    let (refused, _) = socket.receive(Buffer::zeroed(3), range).await;
                    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
                }
                drop(buffer);
            })
            .unwrap();
    });
}

#[test]
fn a_non_blocking_socket_from_elsewhere_works() {
    on_each_engine(|reactor| {
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let (socket, _) = reactor.io().adopt(near.into()).unwrap();
        let runtime = reactor.runtime().clone();
        let (go, gone) = mpsc::channel();
        let writer = thread::spawn(move || {
            gone.recv().unwrap();
            far.write_all(b"late").unwrap();
            let mut all = vec![0; 2_000_000];
            far.read_exact(&mut all).unwrap();
            assert!(all == pattern(0, 2_000_000));
        });
        let run = async move {
            let receiving = socket.receive(Buffer::zeroed(1), 0..10);
            // Long enough for the engine to find nothing there.
            runtime.sleep(Duration::from_millis(5)).await;
            go.send(()).unwrap();
            assert_eq!(receiving.await.0.unwrap(), 4);
            socket.send(mixed_segments(0, 2_000_000, 10_000)).await
        };
        reactor.run(run).unwrap().unwrap();
        writer.join().unwrap();
    });
}

#[test]
fn more_sockets_than_registered_slots() {
    // Each pair takes two of the ring's 1,024 slots for files; the rest go by descriptor.
    const PAIRS: u16 = 600;
    on_each_engine(|reactor| {
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        reactor
            .run(async move {
                let mut receiving = Vec::new();
                let mut senders = Vec::new();
                for number in 0..PAIRS {
                    let (near, far) = UnixStream::pair().unwrap();
                    let (near, far) =
                        (io.adopt(near.into()).unwrap().0, io.adopt(far.into()).unwrap().0);
                    receiving.push(runtime.spawn(async move { receive_exactly(&near, 2).await }));
                    senders.push((far, number.to_le_bytes()));
                }
                runtime.yield_now().await;
                for (far, bytes) in senders.iter().rev() {
                    far.send(vec![Segment::Bytes(bytes.to_vec())]).await.unwrap();
                }
                for (number, task) in (0..PAIRS).zip(receiving) {
                    assert_eq!(task.await, number.to_le_bytes());
                }
            })
            .unwrap();
    });
}

#[test]
fn a_dropped_socket_closes() {
    on_each_engine(|reactor| {
        for under_way in [false, true] {
            let (near, mut far) = UnixStream::pair().unwrap();
            let (socket, _) = reactor.io().adopt(near.into()).unwrap();
            let runtime = reactor.runtime().clone();
            reactor
                .run(async move {
                    let receiving = under_way.then(|| socket.receive(Buffer::zeroed(1), 0..10));
                    runtime.yield_now().await;
                    drop(socket);
                    drop(receiving);
                    runtime.sleep(Duration::from_millis(2)).await;
                })
                .unwrap();
            far.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            assert_eq!(far.read(&mut [0; 1]).unwrap(), 0);
        }
    });
}

#[test]
fn a_unix_path_is_taken_over_only_from_the_dead() {
    on_each_engine(|reactor| {
        let path = scratch_path();
        let address = Address::Unix(path.clone());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a stale socket stays behind");
        let ours = Listener::bind(reactor.io(), &address).unwrap();
        let error = Listener::bind(reactor.io(), &address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(UnixStream::connect(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists(), "somebody else's by now");
        drop(other);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        let error = Listener::bind(reactor.io(), &address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();
        drop(Listener::bind(reactor.io(), &address).unwrap());
        assert!(!path.exists(), "removed with its listener");
    });
}

#[test]
fn connecting_to_nobody_fails() {
    on_each_engine(|reactor| {
        let io = reactor.io().clone();
        reactor
            .run(async move {
                let (listener, bound) = connected(&io, &loopback());
                drop(listener);
                let Err(error) = io.connect(&bound).await else { panic!("nobody listens") };
                assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
                let nowhere = Address::Unix(scratch_path());
                let Err(error) = io.connect(&nowhere).await else { panic!("nothing there") };
                assert_eq!(error.kind(), io::ErrorKind::NotFound);
            })
            .unwrap();
    });
}
