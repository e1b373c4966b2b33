//! What was written is what is read.

use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;

use base::{BLOCK_SIZE, BlockSlice, Buffer, Pba};
use parallax_device::{Access, BlockFile, Cause, Device};
use runtime::Runtime;

use crate::{Scratch, on_each_engine, options};

fn stamp(buffer: &mut Buffer, block_count: usize, mark: u64) {
    for (index, block) in (0u64..).zip(buffer.blocks_mut().iter_mut().take(block_count)) {
        for (place, bytes) in block.0.chunks_exact_mut(8).enumerate() {
            let word = (mark + index).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ place as u64;
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

fn stamped(runtime: &Runtime, block_count: usize, mark: u64) -> Buffer {
    let mut buffer = runtime.buffers().take(block_count);
    stamp(&mut buffer, block_count, mark);
    buffer
}

async fn expect(device: &Device, runtime: &Runtime, at: u64, block_count: usize, mark: u64) {
    let buffer = runtime.buffers().take(block_count);
    let read = device.read(Pba::new(at), block_count, buffer).await.unwrap();
    let wanted = stamped(runtime, block_count, mark);
    let length = block_count * BLOCK_SIZE;
    assert!(read.bytes()[..length] == wanted.bytes()[..length], "{block_count} blocks at {at}");
}

#[test]
fn single_blocks_runs_and_gathered_writes_round_trip() {
    on_each_engine(|reactor| {
        let scratch = Scratch::new();
        let device = scratch.create(&reactor, 16 << 20);
        assert_eq!(device.block_count(), 4096);
        let runtime = reactor.runtime().clone();
        reactor
            .run(async move {
                // One block of the pool (registered where there is a ring), one of nobody's.
                let pooled = BlockSlice::whole(Rc::new(stamped(&runtime, 1, 100)));
                device.write(Pba::new(0), vec![pooled]).await.unwrap();
                let mut loose = Buffer::zeroed(1);
                stamp(&mut loose, 1, 101);
                device.write(Pba::new(1), vec![BlockSlice::whole(Rc::new(loose))]).await.unwrap();
                expect(&device, &runtime, 0, 2, 100).await;
                // Gathered from the middle of one buffer, a registered block and a longer run.
                let middle = BlockSlice::new(Rc::new(stamped(&runtime, 64, 190)), 10, 5);
                let single = BlockSlice::whole(Rc::new(stamped(&runtime, 1, 205)));
                let tail = BlockSlice::new(Rc::new(stamped(&runtime, 16, 206)), 0, 16);
                device.write(Pba::new(50), vec![middle, single, tail]).await.unwrap();
                expect(&device, &runtime, 50, 22, 200).await;
                let read = device.read(Pba::new(60), 1, Buffer::zeroed(1)).await.unwrap();
                assert!(read.bytes() == stamped(&runtime, 1, 210).bytes(), "into a loose buffer");
                device
                    .write(
                        Pba::new(4095),
                        vec![BlockSlice::whole(Rc::new(stamped(&runtime, 1, 9)))],
                    )
                    .await
                    .unwrap();
                expect(&device, &runtime, 4095, 1, 9).await;
                device.flush().await.unwrap();
                let beyond = device.read(Pba::new(4095), 2, Buffer::zeroed(2)).await.unwrap_err();
                assert_eq!(beyond.cause, Cause::OutOfRange);
            })
            .unwrap();
        drop(reactor);
        // Past the page cache it is in the file, not only in our idea of it.
        let file = std::fs::File::open(&scratch.0).unwrap();
        let mut block = Buffer::zeroed(1);
        file.read_exact_at(block.bytes_mut(), 4095 * 4096).unwrap();
        let mut wanted = Buffer::zeroed(1);
        stamp(&mut wanted, 1, 9);
        assert!(block.bytes() == wanted.bytes());
    });
}

/// More slices than one system call takes: the kernel does a part, we go on.
#[test]
fn a_write_in_too_many_pieces_for_one_call_is_continued() {
    const PIECES: usize = 2500;
    on_each_engine(|reactor| {
        let scratch = Scratch::new();
        let device = scratch.create(&reactor, 16 << 20);
        let runtime = reactor.runtime().clone();
        reactor
            .run(async move {
                // Blocks of one buffer in reverse, so that no two pieces can be merged.
                let buffer = Rc::new(stamped(&runtime, PIECES, 0));
                let piece = |index| BlockSlice::new(Rc::clone(&buffer), PIECES - 1 - index, 1);
                device.write(Pba::new(7), (0..PIECES).map(piece).collect()).await.unwrap();
                for index in [0u64, 1, 1023, 1024, 1025, 2048, 2499] {
                    expect(&device, &runtime, 7 + index, 1, 2499 - index).await;
                }
            })
            .unwrap();
    });
}

/// Many more operations than the device has in flight, each block written by one task and read
/// back by it, while others do the same around it.
#[test]
fn a_thousand_operations_at_once() {
    on_each_engine(|reactor| {
        let scratch = Scratch::new();
        let device = scratch.create(&reactor, 64 << 20);
        let runtime = reactor.runtime().clone();
        reactor
            .run(async move {
                let mut tasks = Vec::new();
                for number in 0u64..1000 {
                    let (device, runtime) = (device.clone(), runtime.clone());
                    tasks.push(runtime.clone().spawn(async move {
                        let block_count = 1 + runtime.random_below(16);
                        let buffer = stamped(&runtime, block_count, number * 1000);
                        let slice = BlockSlice::new(Rc::new(buffer), 0, block_count);
                        device.write(Pba::new(number * 16), vec![slice]).await.unwrap();
                        if number % 50 == 0 {
                            device.flush().await.unwrap();
                        }
                        expect(&device, &runtime, number * 16, block_count, number * 1000).await;
                    }));
                }
                for task in tasks {
                    task.await;
                }
            })
            .unwrap();
    });
}

#[test]
fn discarded_blocks_give_their_space_back_and_allocated_ones_take_it() {
    on_each_engine(|reactor| {
        let scratch = Scratch::new();
        let device = scratch.create(&reactor, 8 << 20);
        let runtime = reactor.runtime().clone();
        let path = scratch.0.clone();
        reactor
            .run(async move {
                let sectors = || std::fs::metadata(&path).unwrap().blocks();
                assert!(sectors() < 100, "sparse");
                device.allocate(Pba::new(0), 1024).await.unwrap();
                assert!(sectors() >= 1024 * 8, "4 MiB are allocated: {}", sectors());
                let zero = device.read(Pba::new(5), 1, Buffer::from_bytes(&[1])).await.unwrap();
                assert!(zero.bytes().iter().all(|&byte| byte == 0));
                let slice = BlockSlice::whole(Rc::new(stamped(&runtime, 256, 3)));
                device.write(Pba::new(0), vec![slice]).await.unwrap();
                device.allocate(Pba::new(0), 1024).await.unwrap();
                expect(&device, &runtime, 0, 256, 3).await;
                device.discard(Pba::new(64), 900).await.unwrap();
                assert!(sectors() < 200 * 8, "given back: {}", sectors());
                expect(&device, &runtime, 0, 64, 3).await;
                let zero = device.read(Pba::new(64), 1, Buffer::from_bytes(&[1])).await.unwrap();
                assert!(zero.bytes().iter().all(|&byte| byte == 0));
                assert_eq!(device.block_count(), 2048, "the length stays");
            })
            .unwrap();
    });
}

#[test]
fn a_file_that_is_cut_off_under_us_is_an_error() {
    on_each_engine(|reactor| {
        let scratch = Scratch::new();
        let device = scratch.create(&reactor, 1 << 20);
        let file = std::fs::OpenOptions::new().write(true).open(&scratch.0).unwrap();
        file.set_len(10 * 4096).unwrap();
        reactor
            .run(async move {
                for (at, count) in [(100, 1), (8, 4)] {
                    let read = device.read(Pba::new(at), count, Buffer::zeroed(count)).await;
                    assert_eq!(read.unwrap_err().cause, Cause::Truncated);
                }
                device.read(Pba::new(8), 2, Buffer::zeroed(2)).await.unwrap();
            })
            .unwrap();
    });
}

#[test]
fn a_device_opened_for_reading_refuses_writes() {
    on_each_engine(|reactor| {
        let scratch = Scratch::new();
        drop(scratch.create(&reactor, 1 << 20));
        let file = BlockFile::open(reactor.io(), &scratch.0, options(Access::ReadOnly)).unwrap();
        let device = Device::new(Rc::new(file));
        reactor
            .run(async move {
                let slice = BlockSlice::whole(Rc::new(Buffer::zeroed(1)));
                let error = device.write(Pba::new(0), vec![slice]).await.unwrap_err();
                assert_eq!(error.cause, Cause::Errno(libc::EBADF));
                device.read(Pba::new(0), 1, Buffer::zeroed(1)).await.unwrap();
            })
            .unwrap();
    });
}

/// The kernel must not write into memory that was given back, nor may anybody wait for ever.
#[test]
fn a_reactor_that_is_dropped_waits_for_what_is_under_way() {
    on_each_engine(|reactor| {
        let scratch = Scratch::new();
        let device = scratch.create(&reactor, 16 << 20);
        let runtime = reactor.runtime().clone();
        for at in 0u64..300 {
            let (device, runtime) = (device.clone(), runtime.clone());
            drop(runtime.clone().spawn(async move {
                let slice = BlockSlice::whole(Rc::new(stamped(&runtime, 4, at * 4)));
                device.write(Pba::new(at * 4), vec![slice]).await
            }));
        }
        drop(device);
        let inner = runtime.clone();
        reactor.run(async move { inner.turn_end().await }).unwrap();
        drop(reactor);
        runtime.kill();
        let file = std::fs::File::open(&scratch.0).unwrap();
        let mut written = Buffer::zeroed(4);
        file.read_exact_at(written.bytes_mut(), 0).unwrap();
        let mut wanted = Buffer::zeroed(4);
        stamp(&mut wanted, 4, 0);
        assert!(written.bytes() == wanted.bytes(), "the first was under way");
    });
}
