//! Unix sockets that carry descriptors.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use parallax_runtime::reactor::{Address, Channel, Io, Listener, Peer};

use crate::{on_each_engine, scratch_path};

fn pair(io: &Io) -> (Channel, Channel) {
    let (one, other) = UnixStream::pair().unwrap();
    (Channel::adopt(io, one.into()).unwrap(), Channel::adopt(io, other.into()).unwrap())
}

#[test]
fn descriptors_arrive_with_their_bytes() {
    on_each_engine(|reactor| {
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        let run = async move {
            let (here, there) = pair(&io);
            let receiving = runtime.spawn(async move {
                let (mut bytes, mut files) = ([0u8; 64], Vec::new());
                let count = there.receive(&mut bytes, &mut files).await.unwrap();
                (bytes[..count].to_vec(), files, there)
            });
            runtime.sleep(Duration::from_millis(5)).await;
            let (mut kept, given) = UnixStream::pair().unwrap();
            here.send(b"look", &[given.as_fd(), given.as_fd()]).await.unwrap();
            drop(given);
            let (bytes, files, there) = receiving.await;
            assert_eq!((bytes.as_slice(), files.len()), (&b"look"[..], 2));
            let stream = UnixStream::from(files.into_iter().next().unwrap());
            kept.write_all(b"through").unwrap();
            let (mut bytes, mut files) = ([0u8; 7], Vec::<OwnedFd>::new());
            let through = Channel::adopt(&io, stream.into()).unwrap();
            assert_eq!(through.receive(&mut bytes, &mut files).await.unwrap(), 7);
            assert_eq!((&bytes, files.len()), (b"through", 0));
            drop(here);
            assert_eq!(there.receive(&mut bytes, &mut files).await.unwrap(), 0);
        };
        reactor.run(run).unwrap();
    });
}

#[test]
fn much_is_sent_in_parts() {
    on_each_engine(|reactor| {
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        let run = async move {
            let (here, there) = pair(&io);
            let sending = runtime.spawn(async move { here.send(&[7; 3_000_000], &[]).await });
            let (mut bytes, mut files, mut all) = ([0u8; 4096], Vec::new(), 0);
            loop {
                match there.receive(&mut bytes, &mut files).await.unwrap() {
                    0 => break,
                    count => all += count,
                }
            }
            sending.await.unwrap();
            assert_eq!(all, 3_000_000);
        };
        reactor.run(run).unwrap();
    });
}

#[test]
fn a_shutdown_ends_who_waits() {
    on_each_engine(|reactor| {
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        let run = async move {
            let (here, _there) = pair(&io);
            let here = Rc::new(here);
            let other = Rc::clone(&here);
            let receiving =
                runtime.spawn(async move { other.receive(&mut [0; 8], &mut Vec::new()).await });
            runtime.sleep(Duration::from_millis(5)).await;
            here.shutdown();
            assert_eq!(receiving.await.unwrap(), 0);
        };
        reactor.run(run).unwrap();
    });
}

#[test]
fn a_listener_that_is_closed_lets_nobody_in() {
    on_each_engine(|reactor| {
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        let run = async move {
            let path = scratch_path();
            let address = Address::Unix(path.clone());
            let listener = Rc::new(Listener::bind(&io, &address).unwrap());
            let _client = UnixStream::connect(&path).unwrap();
            let (_channel, peer) = listener.accept_channel().await.unwrap();
            assert!(matches!(peer, Peer::Process { .. }));
            let waiting = Rc::clone(&listener);
            let accepting = runtime.spawn(async move { waiting.accept_channel().await.map(drop) });
            runtime.sleep(Duration::from_millis(5)).await;
            listener.close();
            assert!(accepting.await.is_err());
            // Whoever else has the socket may go on; here nobody has.
            drop(listener);
            assert!(UnixStream::connect(&path).is_err());
        };
        reactor.run(run).unwrap();
    });
}

#[test]
fn what_is_no_unix_stream_is_refused() {
    on_each_engine(|reactor| {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(Channel::adopt(reactor.io(), tcp.into()).is_err());
        let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert!(Channel::adopt(reactor.io(), datagrams.into()).is_err());
    });
}
