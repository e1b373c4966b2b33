//! Who may open what, and what people are told.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use base::{BlockSlice, Buffer, ErrorKind, Pba};
use parallax_device::{Access, Backend, BlockFile, Device, OpenCause, OpenOptions};
use runtime::reactor::{EngineChoice, Reactor};

use crate::{Scratch, child, child_path, on_each_engine, options};

fn refusal(reactor: &Reactor, path: &Path, access: Access) -> (OpenCause, String) {
    let error = BlockFile::open(reactor.io(), path, options(access)).unwrap_err();
    (error.cause, error.to_string())
}

#[test]
fn locks_keep_writers_apart() {
    use Access::{Exclusive, Inspect, ReadOnly};
    let reactor = Reactor::start(EngineChoice::Auto).unwrap();
    let scratch = Scratch::new();
    drop(scratch.create(&reactor, 1 << 20));
    for (first, second, allowed) in [
        (Exclusive, Exclusive, false),
        (Exclusive, ReadOnly, false),
        (Exclusive, Inspect, true),
        (ReadOnly, Exclusive, false),
        (ReadOnly, ReadOnly, true),
        (Inspect, Exclusive, true),
    ] {
        let held = BlockFile::open(reactor.io(), &scratch.0, options(first)).unwrap();
        let outcome = BlockFile::open(reactor.io(), &scratch.0, options(second));
        match outcome {
            Ok(_) => assert!(allowed, "{second:?} beside {first:?}"),
            Err(error) => {
                assert!(!allowed, "{second:?} beside {first:?}");
                assert_eq!((error.cause, error.kind()), (OpenCause::Busy, ErrorKind::Busy));
                let path = scratch.0.display();
                assert_eq!(error.to_string(), format!("another process uses {path}"));
            }
        }
        drop(held);
    }
}

#[test]
fn a_second_process_is_refused() {
    let reactor = Reactor::start(EngineChoice::Auto).unwrap();
    let scratch = Scratch::new();
    let device = scratch.create(&reactor, 1 << 20);
    assert!(!child("open::child_opens", &scratch.0).output().unwrap().status.success());
    drop(device);
    assert!(child("open::child_opens", &scratch.0).output().unwrap().status.success());
}

/// A killed daemon under much I/O left its lock behind for more than the second that the next one
/// waited, which then refused to start.
#[test]
fn a_lock_that_a_dead_process_left_is_waited_for() {
    let reactor = Reactor::start(EngineChoice::Auto).unwrap();
    let scratch = Scratch::new();
    drop(scratch.create(&reactor, 1 << 20));
    // What flock(1) locks stays locked as long as we have the same open file.
    let left = std::fs::File::open(&scratch.0).unwrap();
    let stdin = Stdio::from(left.try_clone().unwrap());
    assert!(Command::new("flock").args(["-n", "0"]).stdin(stdin).status().unwrap().success());
    let path = scratch.0.clone();
    let released = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(1500));
        drop(left);
    });
    BlockFile::open(reactor.io(), &path, options(Access::Exclusive)).unwrap();
    released.join().unwrap();
}

#[test]
#[ignore = "a part of a_second_process_is_refused"]
fn child_opens() {
    let reactor = Reactor::start(EngineChoice::Auto).unwrap();
    drop(BlockFile::open(reactor.io(), &child_path(), OpenOptions::default()).unwrap());
}

/// The lock of a killed daemon goes with its last write, which may be after its death: whoever
/// starts at once must neither fail nor find a write still on its way.
#[test]
fn a_killed_process_gives_its_device_back() {
    let reactor = Reactor::start(EngineChoice::Auto).unwrap();
    let scratch = Scratch::new();
    drop(scratch.create(&reactor, 64 << 20));
    let mut writer =
        child("open::child_writes", &scratch.0).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(writer.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.contains("writing")));
    std::thread::sleep(Duration::from_millis(50));
    writer.kill().unwrap();
    let file = BlockFile::open(reactor.io(), &scratch.0, OpenOptions::default()).unwrap();
    writer.wait().unwrap();
    let device = Device::new(Rc::new(file));
    reactor
        .run(async move {
            let slice = BlockSlice::whole(Rc::new(Buffer::from_bytes(&[0x11; 4096])));
            for at in 0..64 {
                device.write(Pba::new(at), vec![slice.clone()]).await.unwrap();
            }
            for at in 0..64 {
                let read = device.read(Pba::new(at), 1, Buffer::zeroed(1)).await.unwrap();
                assert!(read.bytes() == [0x11; 4096], "overwritten by the dead at {at}");
            }
        })
        .unwrap();
}

#[test]
#[ignore = "a part of a_killed_process_gives_its_device_back"]
#[allow(clippy::print_stdout, reason = "tells its parent that it is under way")]
fn child_writes() {
    let reactor = Reactor::start(EngineChoice::Auto).unwrap();
    let file = BlockFile::open(reactor.io(), &child_path(), OpenOptions::default()).unwrap();
    let device = Device::new(Rc::new(file));
    let runtime = reactor.runtime().clone();
    for task in 0u64..64 {
        let device = device.clone();
        drop(runtime.spawn(async move {
            let slice = BlockSlice::whole(Rc::new(Buffer::from_bytes(&[0xdd; 4096])));
            loop {
                device.write(Pba::new(task), vec![slice.clone()]).await.unwrap();
            }
        }));
    }
    println!("writing");
    let inner = runtime.clone();
    reactor.run(async move { inner.sleep(Duration::from_secs(20)).await }).unwrap();
}

#[test]
fn what_cannot_be_a_store_is_refused_with_a_reason() {
    let reactor = Reactor::start(EngineChoice::Auto).unwrap();
    let scratch = Scratch::new();
    let directory = scratch.0.parent().unwrap();
    assert_eq!(
        refusal(&reactor, &scratch.0, Access::Exclusive),
        (OpenCause::NotFound, format!("{} does not exist", scratch.0.display()))
    );
    for wrong in [directory, Path::new("/dev/null")] {
        let (cause, text) = refusal(&reactor, wrong, Access::Exclusive);
        assert_eq!(cause, OpenCause::WrongKind);
        assert!(text.ends_with("is neither a file nor a block device"), "{text}");
    }
    std::fs::write(&scratch.0, [0; 4095]).unwrap();
    assert_eq!(refusal(&reactor, &scratch.0, Access::Inspect).0, OpenCause::TooSmall(4095));
    // A file system without O_DIRECT.
    let (cause, text) = refusal(&reactor, Path::new("/proc/self/comm"), Access::Exclusive);
    assert_eq!(cause, OpenCause::DirectRefused);
    assert!(text.contains("O_DIRECT"), "{text}");
    let error = BlockFile::create(reactor.io(), &scratch.0, 1 << 20, false).unwrap_err();
    assert_eq!((error.cause, error.kind()), (OpenCause::Exists, ErrorKind::Exists));
    assert_eq!(std::fs::metadata(&scratch.0).unwrap().len(), 4095, "left as it was");
    std::fs::remove_file(&scratch.0).unwrap();
    let error = BlockFile::create(reactor.io(), &scratch.0, 4095, false).unwrap_err();
    assert_eq!(error.cause, OpenCause::TooSmall(0));
    assert!(!scratch.0.exists());
    let error = BlockFile::create(reactor.io(), Path::new("/nonexistent/x"), 1 << 20, false);
    assert_eq!(error.unwrap_err().cause, OpenCause::NotFound);
}

#[test]
fn a_device_describes_itself() {
    on_each_engine(|reactor| {
        let scratch = Scratch::new();
        let name = scratch.0.file_name().unwrap().to_string_lossy().into_owned();
        let device = scratch.create(&reactor, (1 << 20) + 1000);
        assert_eq!(device.block_count(), 256, "rounded down");
        let engine = reactor.io().describe();
        assert_eq!(device.describe(), format!("{name}: file, O_DIRECT, {engine}"));
        drop(device);
        let buffered = OpenOptions { access: Access::Exclusive, buffered: true };
        let file = BlockFile::open(reactor.io(), &scratch.0, buffered).unwrap();
        assert_eq!(file.describe(), format!("{name}: file, page cache, {engine}"));
    });
}
