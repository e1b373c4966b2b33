//! No space left below: a limit on file size always, a full file system where we may mount one.

use std::process::{Command, Stdio};
use std::rc::Rc;

use base::{BlockSlice, Buffer, ErrorKind, Pba};
use parallax_device::{BlockFile, Cause, Device, OpenOptions};
use runtime::reactor::Reactor;

use crate::{Scratch, child, child_path, on_each_engine};

#[test]
fn beyond_the_file_size_limit_there_is_no_space() {
    let scratch = Scratch::new();
    let file = std::fs::File::create(&scratch.0).unwrap();
    file.set_len(16 << 20).unwrap();
    // 4 MiB in units of 512 bytes; the signal that comes with it would kill the process.
    let limited = "trap '' XFSZ; ulimit -f 8192; exec \"$@\"";
    let inner = child("full::child_writes_until_it_is_full", &scratch.0);
    let mut outer = Command::new("sh");
    outer.args(["-c", limited, "sh"]).arg(inner.get_program()).args(inner.get_args());
    let output = outer.env(crate::CHILD_PATH, &scratch.0).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_full_file_system_says_so() {
    let scratch = Scratch::new();
    std::fs::create_dir(&scratch.0).unwrap();
    let prepare = |command: &str| {
        let mut outer = Command::new("unshare");
        outer.args(["-m", "sh", "-c", command, "sh"]).arg(&scratch.0);
        outer.stderr(Stdio::null());
        outer
    };
    let mount = "mount -t tmpfs -o size=4m parallax-test \"$1\"";
    if !prepare(mount).status().is_ok_and(|status| status.success()) {
        eprintln!("not allowed to mount a small file system here");
        std::fs::remove_dir(&scratch.0).unwrap();
        return;
    }
    let path = scratch.0.join("store");
    let inner = child("full::child_writes_until_it_is_full", &path);
    let script = format!("{mount} && truncate -s 16M \"$1/store\" && shift && exec \"$@\"");
    let mut outer = prepare(&script);
    outer.arg(inner.get_program()).args(inner.get_args()).env(crate::CHILD_PATH, &path);
    let output = outer.stderr(Stdio::piped()).output().unwrap();
    std::fs::remove_dir(&scratch.0).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
#[ignore = "a part of the tests above"]
fn child_writes_until_it_is_full() {
    on_each_engine(|reactor| {
        let path = child_path();
        let options = OpenOptions::default();
        // tmpfs has O_DIRECT since Linux 6.6.
        let file = BlockFile::open(reactor.io(), &path, options).unwrap_or_else(|_| {
            let options = OpenOptions { buffered: true, ..options };
            BlockFile::open(reactor.io(), &path, options).unwrap()
        });
        write_until_full(&reactor, Device::new(Rc::new(file)));
    });
}

fn write_until_full(reactor: &Reactor, device: Device) {
    let run = async move {
        let slice = BlockSlice::whole(Rc::new(Buffer::from_bytes(&vec![7; 16 * 4096])));
        let mut written = 0;
        let error = loop {
            match device.write(Pba::new(written), vec![slice.clone()]).await {
                Ok(()) => written += 16,
                Err(error) => break error,
            }
        };
        assert_eq!((error.cause, error.kind()), (Cause::NoSpace, ErrorKind::NoSpace));
        assert_eq!(error.at, Pba::new(written));
        assert!((900..=1024).contains(&written), "4 MiB fit, less what the file system takes");
        // Reads, overwrites and flushes go on; space that comes back can be used.
        let read = device.read(Pba::new(0), 1, Buffer::zeroed(1)).await.unwrap();
        assert!(read.bytes() == [7; 4096]);
        device.write(Pba::new(0), vec![slice.clone()]).await.unwrap();
        device.flush().await.unwrap();
        device.discard(Pba::new(0), written).await.unwrap();
        device.write(Pba::new(16), vec![slice]).await.unwrap();
    };
    reactor.run(run).unwrap();
}
