//! A block device: a loop device on a scratch file, where we may make one.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use base::{BlockSlice, Buffer, Pba};
use parallax_device::{Access, BlockFile, Device, OpenCause, OpenOptions};

use crate::{Scratch, on_each_engine, options};

struct Loop(PathBuf);

impl Loop {
    fn on(path: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["-f", "--show"]).arg(path).output().ok()?;
        let name = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self(name.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_works_like_a_file() {
    on_each_engine(|reactor| {
        let scratch = Scratch::new();
        std::fs::File::create(&scratch.0).unwrap().set_len(8 << 20).unwrap();
        let Some(node) = Loop::on(&scratch.0) else {
            eprintln!("not allowed to make a loop device here");
            return;
        };
        // As a mounted file system does: without our lock, but exclusively.
        let mut options = std::fs::OpenOptions::new();
        let mounted = options.read(true).custom_flags(libc::O_EXCL).open(&node.0).unwrap();
        let error = BlockFile::open(reactor.io(), &node.0, OpenOptions::default()).unwrap_err();
        assert_eq!(error.cause, OpenCause::Busy);
        drop(mounted);
        let file = BlockFile::open(reactor.io(), &node.0, OpenOptions::default()).unwrap();
        let error = BlockFile::open(reactor.io(), &node.0, OpenOptions::default()).unwrap_err();
        assert_eq!(error.cause, OpenCause::Busy);
        let device = Device::new(Rc::new(file));
        assert_eq!(device.block_count(), 2048);
        assert!(device.describe().contains(": block device, O_DIRECT, "), "{}", device.describe());
        reactor
            .run(async move {
                let slice = BlockSlice::whole(Rc::new(Buffer::from_bytes(&vec![5; 64 * 4096])));
                device.write(Pba::new(100), vec![slice]).await.unwrap();
                device.allocate(Pba::new(0), 2048).await.unwrap();
                device.flush().await.unwrap();
                device.discard(Pba::new(100), 32).await.unwrap();
                let read = device.read(Pba::new(100), 64, Buffer::zeroed(64)).await.unwrap();
                let (discarded, kept) = read.bytes().split_at(32 * 4096);
                assert!(discarded.iter().all(|&byte| byte == 0), "a loop device reads zeroes then");
                assert!(kept.iter().all(|&byte| byte == 5));
            })
            .unwrap();
    });
}

/// Each had a lock of its own: a store could be open through both at once, twice on one machine.
#[test]
fn a_loop_device_and_its_file_are_one() {
    on_each_engine(|reactor| {
        let scratch = Scratch::new();
        std::fs::File::create(&scratch.0).unwrap().set_len(8 << 20).unwrap();
        let Some(node) = Loop::on(&scratch.0) else {
            eprintln!("not allowed to make a loop device here");
            return;
        };
        let ways = [(&scratch.0, &node.0), (&node.0, &scratch.0)];
        for (first, second) in ways {
            for (access, beside, is_allowed) in [
                (Access::Exclusive, Access::Exclusive, false),
                (Access::ReadOnly, Access::ReadOnly, true),
                (Access::Exclusive, Access::Inspect, true),
            ] {
                let held = BlockFile::open(reactor.io(), first, options(access)).unwrap();
                let opened = BlockFile::open(reactor.io(), second, options(beside));
                let cause = opened.err().map(|error| error.cause);
                let expected = (!is_allowed).then_some(OpenCause::Busy);
                assert_eq!(cause, expected, "{beside:?} of {second:?} beside {access:?}");
                drop(held);
            }
        }
    });
}
