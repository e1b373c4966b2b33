//! Reading and writing.

use base::ErrorKind;
use disk::{Identity, MemDisk};

use crate::kernel::{
    DISK_BYTES, EIO, ENOSPC, ENXIO, EOPNOTSUPP, EPERM, EROFS, ESHUTDOWN, FALLOCATE, FSYNC, Kernel,
    LSEEK, RELEASE, TestDirectory, number, numbers, run,
};

const END: u64 = DISK_BYTES as u64;
const RDWR: u32 = 2;

fn one(directory: &TestDirectory) {
    directory.add(1, "d");
    directory.add_snapshot(1, 5, Some("s"), 0);
}

async fn opened(kernel: &Kernel) -> (u64, u64) {
    let node = kernel.walk("d.img").await.unwrap();
    (node, kernel.open(node, RDWR).await.unwrap())
}

#[test]
fn what_is_written_is_read() {
    run(one, async |kernel| {
        let file = opened(&kernel).await;
        let mut expected = vec![0; DISK_BYTES];
        let mut seed = 1u64;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % below
        };
        for round in 0..200u8 {
            let (length, grain) = if round % 2 == 0 { (16384, 4096) } else { (9000, 1) };
            let length = (1 + random(length)).next_multiple_of(grain);
            let offset = random(DISK_BYTES - length) / grain * grain;
            let bytes = vec![round + 1; length];
            let written = kernel.write(file, offset as u64, 0, &bytes).await;
            assert_eq!(written, Ok(length));
            expected[offset..offset + length].copy_from_slice(&bytes);
        }
        for offset in (0..DISK_BYTES).step_by(100_000) {
            let length = 100_000.min(DISK_BYTES - offset);
            let read = kernel.read(file, offset as u64, 100_000).await.unwrap();
            assert_eq!(read.len(), length);
            assert!(read == expected[offset..offset + length], "at {offset}");
        }
    });
}

#[test]
fn a_file_ends_where_its_disk_does() {
    run(one, async |kernel| {
        let file = opened(&kernel).await;
        assert_eq!(kernel.write(file, END - 100, 0, &[1; 4096]).await, Ok(100));
        assert_eq!(kernel.write(file, END, 0, &[1; 4096]).await, Err(ENOSPC));
        assert_eq!(kernel.write(file, u64::MAX - 5, 0, &[1; 4096]).await, Err(ENOSPC));
        assert_eq!(kernel.read(file, END - 100, 4096).await, Ok(vec![1; 100]));
        assert_eq!(kernel.read(file, END, 4096).await, Ok(vec![]));
        assert_eq!(kernel.read(file, u64::MAX - 5, 4096).await, Ok(vec![]));
    });
}

#[test]
fn holes_are_punched_and_found() {
    run(one, async |kernel| {
        let file = opened(&kernel).await;
        kernel.write(file, 0, 0, &[1; 65536]).await.unwrap();
        let allocate = async |offset: u64, length: u64, mode: u64| {
            let body = numbers(&[file.1, offset, length, mode]);
            kernel.ask(FALLOCATE, file.0, &body).await.map(|out| out.len())
        };
        let seek = async |offset: u64, whence: u64| {
            let out = kernel.ask(LSEEK, file.0, &numbers(&[file.1, offset, whence])).await;
            out.map(|out| number(&out, 0))
        };
        assert_eq!(allocate(8192, 8192, 0x03).await, Ok(0), "punched");
        assert_eq!(kernel.read(file, 8000, 8600).await.unwrap()[192..8384], [0; 8192]);
        assert_eq!(seek(0, 4).await, Ok(8192));
        assert_eq!(seek(9000, 3).await, Ok(16384));
        assert_eq!(seek(70_000, 3).await, Err(ENXIO), "no data behind");
        assert_eq!(seek(70_000, 4).await, Ok(70_000), "a hole until the end");
        assert_eq!(seek(END, 4).await, Err(ENXIO));
        assert_eq!(allocate(100, 200, 0x11).await, Ok(0), "zeroed");
        assert_eq!(allocate(300, 50, 0x10).await, Ok(0), "the same, within the file");
        assert_eq!(allocate(END - 4096, 8192, 0x10).await, Err(EOPNOTSUPP), "a file never grows");
        assert_eq!(kernel.read(file, 99, 202).await.unwrap()[1..201], [0; 200]);
        assert_eq!(allocate(END - 4096, 8192, 0x03).await, Ok(0), "as far as there is a file");
        assert_eq!(allocate(0, 4096, 0).await, Err(EOPNOTSUPP), "space is not kept for writes");
        let log = kernel.directory.0.borrow()[0].disk.log.borrow().join("\n");
        assert!(log.contains("no_hole: true"), "{log}");
    });
}

#[test]
fn what_is_to_be_durable_is() {
    run(one, async |kernel| {
        let file = opened(&kernel).await;
        let disk = std::rc::Rc::clone(&kernel.directory.0.borrow()[0].disk);
        let log = || std::mem::take(&mut *disk.log.borrow_mut()).join("\n");
        log();
        kernel.ask(FSYNC, file.0, &numbers(&[file.1, 0])).await.unwrap();
        assert_eq!(log(), "Flush");
        for (flags, fua) in [(0, false), (0o10_000, true), (0o4_010_000, true)] {
            kernel.write(file, 0, flags, &[1; 4096]).await.unwrap();
            assert!(log().contains(&format!("fua: {fua}")), "{flags:o}");
        }
        disk.failure.set(Some(ErrorKind::Io));
        assert_eq!(kernel.ask(FSYNC, file.0, &numbers(&[file.1, 0])).await, Err(EIO));
        disk.failure.set(Some(ErrorKind::NoSpace));
        assert_eq!(kernel.write(file, 0, 0, &[1; 4096]).await, Err(ENOSPC));
        assert_eq!(kernel.server.metrics().requests_failed, 2);
    });
}

#[test]
fn a_snapshot_can_only_be_read() {
    run(one, async |kernel| {
        let node = kernel.walk(".snapshots/d/s.img").await.unwrap();
        assert_eq!(kernel.open(node, RDWR).await, Err(EROFS));
        let file = (node, kernel.open(node, 0).await.unwrap());
        assert_eq!(kernel.read(file, 100, 10).await, Ok(vec![5; 10]));
        assert_eq!(kernel.write(file, 0, 0, &[1; 512]).await, Err(EPERM));
    });
}

/// Whoever has it open, a file system for one, has cached what it was.
#[test]
fn a_disk_that_was_rolled_back_has_to_be_opened_again() {
    run(one, async |kernel| {
        let file = opened(&kernel).await;
        kernel.write(file, 0, 0, &[1; 4096]).await.unwrap();
        let disk = std::rc::Rc::clone(&kernel.directory.0.borrow()[0].disk);
        disk.become_other(MemDisk::new(DISK_BYTES));
        assert_eq!(kernel.write(file, 0, 0, &[2; 4096]).await, Err(ESHUTDOWN));
        assert_eq!(kernel.read(file, 0, 4096).await, Err(ESHUTDOWN));
        assert_eq!(disk.contents(0, 4096), [0; 4096]);
        assert_eq!(kernel.ask(LSEEK, file.0, &numbers(&[file.1, 0, 3])).await, Err(ESHUTDOWN));
        let again = opened(&kernel).await;
        assert_eq!(kernel.write(again, 0, 0, &[3; 4096]).await, Ok(4096));
        assert_eq!(kernel.read(file, 0, 4096).await, Err(ESHUTDOWN), "as before");
        // The same number in another store, or what is left after a device has failed.
        let identity = disk.identity.get();
        for other in [
            Identity { store: [1; 16], ..identity },
            Identity { failures: identity.failures + 1, ..identity },
        ] {
            let file = opened(&kernel).await;
            disk.identity.set(other);
            assert_eq!(kernel.write(file, 0, 0, &[4; 4096]).await, Err(ESHUTDOWN), "{other:?}");
        }
    });
}

#[test]
fn a_file_that_somebody_closed_is_still_open_for_others() {
    run(one, async |kernel| {
        let file = opened(&kernel).await;
        assert_eq!(opened(&kernel).await, file);
        kernel.ask(RELEASE, file.0, &numbers(&[file.1, 0, 0])).await.unwrap();
        assert_eq!(kernel.write(file, 0, 0, &[3; 4096]).await, Ok(4096));
    });
}

#[test]
fn requests_are_under_way_together_and_bounded() {
    run(one, async |kernel| {
        let file = opened(&kernel).await;
        let disk = std::rc::Rc::clone(&kernel.directory.0.borrow()[0].disk);
        disk.hold();
        let mut sent = Vec::new();
        for at in 0..300u64 {
            sent.push(kernel.send_write(file, at * 512, 0, &[at as u8; 512]));
            // The socket holds fewer of them than the kernel does.
            if at % 40 == 0 {
                kernel.settle().await;
            }
        }
        kernel.settle().await;
        assert_eq!(disk.waiting(), 256);
        assert!(kernel.has_untaken());
        disk.release(255);
        assert!(kernel.reply(sent[255]).await.is_ok(), "in any order");
        for unique in sent[..255].iter().chain(&sent[256..]) {
            disk.release(0);
            assert!(kernel.reply(*unique).await.is_ok());
        }
        for at in 0..300 {
            assert_eq!(disk.contents(at * 512, 512), [at as u8; 512]);
        }
    });
}
