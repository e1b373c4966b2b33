//! The transmission phase with well-behaved clients.

use std::cell::Cell;
use std::rc::Rc;

use base::{BlockSlice, Buffer, ErrorKind};
use disk::{
    Disk, DiskError, Extent, ExtentState, GateDisk, LocalBoxFuture, MemDisk, ReadSegment, Request,
    Response,
};
use nbd::Config;
use nbd::protocol::request::{Command, StatusPayload, flag};
use nbd::protocol::{
    BASE_ALLOCATION_ID, Framing, PAYLOAD_BYTES_MAX, STATE_HOLE, STATE_ZERO, error,
};
use proptest::prelude::*;
use runtime::{Order, Runtime};

use crate::client::Client;
use crate::harness::{Harness, TestCatalog};

const FRAMINGS: [Framing; 3] = [Framing::Simple, Framing::Structured, Framing::Extended];
const MIB: usize = 1 << 20;

/// Runs `test` with a client in each framing on a fresh disk of 1 MiB.
fn in_each_framing<F: Future<Output = ()> + 'static>(
    disk: impl Fn() -> Rc<dyn Disk>,
    test: impl Fn(Client) -> F,
) {
    for framing in FRAMINGS {
        let harness = Harness::new(TestCatalog::one("d", disk()));
        let socket = harness.connect(64 << 10);
        let client = harness.run(async move { Client::attach(socket, "d", framing).await });
        harness.run(test(client));
    }
}

fn memory() -> Rc<dyn Disk> {
    Rc::new(MemDisk::new(MIB))
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|index| (index / 7 + index / 4096) as u8 ^ seed).collect()
}

#[test]
fn what_was_written_is_read() {
    in_each_framing(memory, |mut client| async move {
        for (offset, length) in [(0, 4096), (1, 511), (4095, 2), (8192, 300_000), (777, 65_537)] {
            let data = pattern(length, 3);
            assert_eq!(client.write(offset, &data, 0).await.error, 0);
            let answer = client.read(offset, length).await;
            assert_eq!(answer.error, 0);
            assert!(answer.data == data, "{offset} {length}");
        }
        assert_eq!(client.request(Command::Flush, 0, 0, 0).await.error, 0);
        assert_eq!(client.request(Command::Trim, 0, 0, 8192).await.error, 0);
        assert_eq!(client.request(Command::WriteZeroes, flag::NO_HOLE, 9000, 100).await.error, 0);
        assert_eq!(client.request(Command::Cache, 0, 0, 100_000).await.error, 0);
        assert_eq!(client.read(0, 8192).await.data, vec![0; 8192]);
        assert_eq!(client.read(8999, 102).await.data[1..101], [0; 100]);
    });
}

#[test]
fn lengths_of_zero_do_nothing() {
    in_each_framing(memory, |mut client| async move {
        let size = client.size;
        for offset in [0, 17, size] {
            assert_eq!(client.read(offset, 0).await.error, 0);
            assert_eq!(client.write(offset, &[], 0).await.error, 0);
            for command in [Command::Trim, Command::WriteZeroes, Command::Cache] {
                assert_eq!(client.request(command, 0, offset, 0).await.error, 0, "{command:?}");
            }
        }
    });
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_session_goes_on() {
    in_each_framing(memory, |mut client| async move {
        let size = client.size;
        assert_eq!(client.read(size, 1).await.error, error::EINVAL);
        assert_eq!(client.read(size - 512, 4096).await.error, error::EINVAL);
        assert_eq!(client.read(u64::MAX, 4096).await.error, error::EINVAL);
        assert_eq!(client.write(size, b"x", 0).await.error, error::ENOSPC);
        assert_eq!(client.write(size - 1, &pattern(100_000, 0), 0).await.error, error::ENOSPC);
        assert_eq!(client.request(Command::Trim, 0, size, 512).await.error, error::EINVAL);
        assert_eq!(client.request(Command::WriteZeroes, 0, size, 1).await.error, error::ENOSPC);
        assert_eq!(client.request(Command::Cache, 0, size, 1).await.error, error::EINVAL);
        assert_eq!(client.request(Command::Flush, 1 << 9, 0, 0).await.error, error::EINVAL);
        assert_eq!(client.request(Command::Trim, flag::DF, 0, 1).await.error, error::EINVAL);
        assert_eq!(client.write(0, b"abc", flag::REQ_ONE).await.error, error::EINVAL);
        assert_eq!(client.read(0, 4).await.data, [0; 4]);
    });
}

#[test]
fn a_snapshot_cannot_be_written() {
    let disk = || Rc::new(MemDisk::read_only(vec![7; MIB])) as Rc<dyn Disk>;
    in_each_framing(disk, |mut client| async move {
        use nbd::protocol::transmission;
        assert_eq!(client.flags & transmission::READ_ONLY, transmission::READ_ONLY);
        assert_eq!(client.flags & transmission::SEND_TRIM, 0);
        assert_eq!(client.write(0, b"no", 0).await.error, error::EPERM);
        assert_eq!(client.request(Command::Trim, 0, 0, 1).await.error, error::EPERM);
        assert_eq!(client.request(Command::WriteZeroes, 0, 0, 1).await.error, error::EPERM);
        assert_eq!(client.request(Command::Flush, 0, 0, 0).await.error, 0);
        assert_eq!(client.read(0, 2).await.data, [7, 7]);
    });
}

#[test]
fn payloads_larger_than_a_disk_takes_at_once() {
    let harness = Harness::new(TestCatalog::memory(5 * MIB));
    for framing in FRAMINGS {
        let socket = harness.connect(1 << 20);
        harness.run(async move {
            let mut client = Client::attach(socket, "d", framing).await;
            let data = pattern(4 * MIB - 1, framing as u8);
            assert_eq!(client.write(5, &data, 0).await.error, 0);
            assert!(client.read(5, data.len()).await.data == data);
        });
    }
}

#[test]
fn payloads_above_the_maximum_are_refused() {
    let max = PAYLOAD_BYTES_MAX as usize;
    let harness = Harness::new(TestCatalog::memory(max + MIB));
    let socket = harness.connect(1 << 20);
    harness.run(async move {
        let mut client = Client::attach(socket, "d", Framing::Structured).await;
        assert_eq!(client.write(0, &vec![1; max + 1], 0).await.error, error::EINVAL);
        assert_eq!(client.read(0, max + 1).await.error, error::EINVAL);
        assert_eq!(client.read(0, 4096).await.data, [0; 4096], "nothing was written");
    });
}

#[test]
fn a_payload_that_nobody_should_send_ends_the_session() {
    let harness = Harness::new(TestCatalog::memory(MIB));
    let socket = harness.connect(1 << 20);
    harness.run(async move {
        let mut client = Client::attach(socket, "d", Framing::Extended).await;
        let length = u64::from(PAYLOAD_BYTES_MAX) * 2 + 1;
        client.submit(Command::Write, flag::PAYLOAD_LEN, 0, length, &[]).await;
        assert!(client.is_closed().await);
    });
    assert_eq!(harness.server.metrics().sessions_failed, 1);
}

/// A disk whose reads come in segments of data and zeroes.
struct SparseDisk;

impl Disk for SparseDisk {
    fn serial(&self) -> String {
        "sparse".to_owned()
    }

    fn identity(&self) -> disk::Identity {
        disk::Identity::default()
    }

    fn size_bytes(&self) -> u64 {
        1 << 50
    }

    fn read_only(&self) -> bool {
        false
    }

    fn severed(&self) -> bool {
        false
    }

    /// Blocks 1 and 2 of every four hold data, the others are zero.
    fn submit(&self, request: Request) -> LocalBoxFuture<Result<Response, DiskError>> {
        let response = match request {
            Request::Read { offset, length } => {
                assert!(offset.is_multiple_of(4096) && length.is_multiple_of(4096));
                let blocks = offset / 4096..(offset + length as u64) / 4096;
                Response::Data(
                    blocks
                        .map(|block| match block % 4 {
                            1 | 2 => {
                                let bytes = Buffer::from_bytes(&[9; 4096]);
                                ReadSegment::Bytes(BlockSlice::whole(Rc::new(bytes)), 0..4096)
                            }
                            _ => ReadSegment::Zeroes(4096),
                        })
                        .collect(),
                )
            }
            Request::BlockStatus { length, extents_max, .. } => {
                let mut extents = vec![
                    Extent { length: 8 << 30, state: ExtentState::Hole },
                    Extent { length: 4096, state: ExtentState::Data },
                    Extent { length: 4096, state: ExtentState::Zero },
                ];
                extents.truncate(extents_max);
                extents[0].length = extents[0].length.min(length);
                Response::Extents(extents)
            }
            _ => return Box::pin(async { Err(DiskError::new(ErrorKind::Io, "not this one")) }),
        };
        Box::pin(std::future::ready(Ok(response)))
    }
}

#[test]
fn zero_ranges_are_sent_as_holes() {
    in_each_framing(
        || Rc::new(SparseDisk),
        |mut client| async move {
            let mut expected = vec![0; 6 * 4096];
            expected[4096..3 * 4096].fill(9);
            expected[5 * 4096..].fill(9);
            let answer = client.read(0, 6 * 4096).await;
            assert_eq!(answer.data, expected);
            if client.framing == Framing::Simple {
                return;
            }
            let k = 4096;
            let chunks = [(0, k, true), (4096, 2 * k, false), (3 * 4096, 2 * k, true)];
            assert_eq!(answer.chunks[..3], chunks);
            assert_eq!(answer.chunks[3..], [(5 * 4096, k, false)]);
            let answer = client.request(Command::Read, flag::DF, 0, 6 * 4096).await;
            assert_eq!((answer.data, answer.chunks), (expected, vec![(0, 6 * k, false)]));
            let answer = client.request(Command::Read, flag::DF, 3 * 4096, 8192).await;
            assert_eq!(answer.chunks, [(3 * 4096, 2 * k, true)]);
        },
    );
}

#[test]
fn block_status_in_32_and_64_bits() {
    in_each_framing(
        || Rc::new(SparseDisk),
        |mut client| async move {
            let hole = STATE_HOLE | STATE_ZERO;
            match client.framing {
                Framing::Simple => {
                    let answer = client.request(Command::BlockStatus, 0, 0, 4096).await;
                    assert_eq!(answer.error, error::EINVAL);
                    return;
                }
                Framing::Structured => {
                    let length = u64::from(u32::MAX);
                    let answer = client.request(Command::BlockStatus, 0, 0, length).await;
                    let expected = [(length, hole), (4096, 0), (4096, STATE_ZERO)];
                    assert_eq!(answer.extents, expected);
                }
                Framing::Extended => {
                    let answer = client.request(Command::BlockStatus, 0, 0, 1 << 40).await;
                    let expected = [(8 << 30, hole), (4096, 0), (4096, STATE_ZERO)];
                    assert_eq!(answer.extents, expected);
                    status_by_payload(&mut client).await;
                }
            }
            let answer = client.request(Command::BlockStatus, flag::REQ_ONE, 0, 8192).await;
            assert_eq!(answer.extents, [(8192, hole)]);
            let answer = client.request(Command::BlockStatus, 0, 1 << 50, 1).await;
            assert_eq!(answer.error, error::EINVAL);
            let answer = client.request(Command::BlockStatus, 0, 0, 0).await;
            assert_eq!(answer.error, error::EINVAL);
        },
    );
}

/// The form of block status whose payload selects contexts.
async fn status_by_payload(client: &mut Client) {
    let one = vec![BASE_ALLOCATION_ID];
    let cases = [
        (one.clone(), 1 << 40, 0),
        (vec![], 1 << 40, error::EINVAL),
        (vec![BASE_ALLOCATION_ID + 1], 1 << 40, error::EINVAL),
        ([one.clone(), one.clone()].concat(), 1 << 40, error::EINVAL),
        (vec![7; 100], 1 << 40, error::EINVAL),
        (one, (1 << 50) + 1, error::EINVAL),
    ];
    for (contexts, length, expected) in cases {
        let mut payload = Vec::new();
        StatusPayload { length, contexts }.encode(&mut payload);
        let flags = flag::PAYLOAD_LEN;
        let sent = payload.len() as u64;
        client.submit(Command::BlockStatus, flags, 0, sent, &payload).await;
        let answer = client.answer(0).await.unwrap();
        assert_eq!((answer.error, answer.extents.is_empty()), (expected, expected != 0));
    }
    client.submit(Command::BlockStatus, flag::PAYLOAD_LEN, 0, 3, b"abc").await;
    assert_eq!(client.answer(0).await.unwrap().error, error::EINVAL);
}

#[test]
fn payloads_of_commands_that_take_none_are_consumed() {
    let harness = Harness::new(TestCatalog::memory(MIB));
    let socket = harness.connect(1 << 20);
    harness.run(async move {
        let mut client = Client::attach(socket, "d", Framing::Extended).await;
        for command in [Command::Flush, Command::Read, Command::Trim, Command::Cache] {
            client.submit(command, flag::PAYLOAD_LEN, 0, 70_000, &[1; 70_000]).await;
            assert_eq!(client.answer(0).await.unwrap().error, error::EINVAL, "{command:?}");
        }
        assert_eq!(client.read(0, 4).await.data, [0; 4]);
    });
}

/// QEMU 10.0 leaves the payload flag out of writes with extended headers.
#[test]
fn an_extended_write_without_the_payload_flag_is_a_write() {
    let harness = Harness::new(TestCatalog::memory(MIB));
    let socket = harness.connect(1 << 20);
    harness.run(async move {
        let mut client = Client::attach(socket, "d", Framing::Extended).await;
        client.submit(Command::Write, 0, 8, 3, b"abc").await;
        assert_eq!(client.answer(8).await.unwrap().error, 0);
        assert_eq!(client.read(8, 3).await.data, b"abc");
    });
}

#[test]
fn flags_reach_the_disk() {
    let disk = GateDisk::new(MemDisk::new(MIB));
    let log = Rc::clone(&disk);
    let harness = Harness::new(TestCatalog::one("d", disk));
    let socket = harness.connect(64 << 10);
    harness.run(async move {
        let mut client = Client::attach(socket, "d", Framing::Structured).await;
        client.write(0, &[1; 512], flag::FUA).await;
        client.write(0, &[1; 512], 0).await;
        client.request(Command::Trim, flag::FUA, 0, 10).await;
        let all = flag::FUA | flag::NO_HOLE | flag::FAST_ZERO;
        client.request(Command::WriteZeroes, all, 0, 1 << 20).await;
        client.request(Command::WriteZeroes, 0, 5, 6).await;
        client.request(Command::Cache, flag::FUA, 0, 1 << 20).await;
        client.request(Command::Flush, flag::FUA, 0, 0).await;
    });
    let expected = [
        "Write { offset: 0, length: 512, data: Buffer(1 blocks), fua: true }",
        "Write { offset: 0, length: 512, data: Buffer(1 blocks), fua: false }",
        "Discard { offset: 0, length: 10, fua: true }",
        "WriteZeroes { offset: 0, length: 1048576, fua: true, no_hole: true, fast_only: true }",
        "WriteZeroes { offset: 5, length: 6, fua: false, no_hole: false, fast_only: false }",
        "Cache { offset: 0, length: 1048576 }",
        "Flush",
    ];
    assert_eq!(*log.log.borrow(), expected);
}

#[test]
fn errors_of_the_disk_become_error_numbers() {
    let cases = [
        (ErrorKind::Io, 5),
        (ErrorKind::Corrupt, 5),
        (ErrorKind::NoSpace, 28),
        (ErrorKind::Busy, 5),
        (ErrorKind::Invalid, 22),
        (ErrorKind::Unsupported, 95),
        (ErrorKind::ReadOnly, 1),
    ];
    for (kind, expected) in cases {
        let failing = move || {
            let disk = GateDisk::new(MemDisk::new(MIB));
            disk.failure.set(Some(kind));
            disk as Rc<dyn Disk>
        };
        in_each_framing(failing, move |mut client| async move {
            let answers = [
                client.read(0, 4096).await,
                client.write(0, &[1; 4096], 0).await,
                client.request(Command::Flush, 0, 0, 0).await,
            ];
            for answer in answers {
                assert_eq!(answer.error, expected, "{kind:?}");
                let has_message = client.framing != Framing::Simple;
                assert_eq!(answer.message == "a failure that the test wants", has_message);
            }
        });
    }
}

#[test]
fn replies_come_in_the_order_of_completion() {
    let gate = GateDisk::new(MemDisk::new(MIB));
    let disk = Rc::clone(&gate);
    let harness = Harness::new(TestCatalog::one("d", disk));
    let socket = harness.connect(1 << 20);
    gate.hold();
    let (mut client, cookies) = harness.run(async move {
        let mut client = Client::attach(socket, "d", Framing::Structured).await;
        let mut cookies = Vec::new();
        for block in 0..64u8 {
            cookies.push(client.submit_write(u64::from(block) * 4096, &[block; 4096], 0).await);
        }
        (client, cookies)
    });
    harness.settle();
    assert_eq!(gate.waiting(), 64, "all are under way before the first has ended");
    gate.release(63);
    gate.release(0);
    let (mut client, order) = harness.run(async move {
        let order =
            [client.answer(0).await.unwrap().cookie, client.answer(0).await.unwrap().cookie];
        client.submit(Command::Flush, 0, 0, 0, &[]).await;
        (client, order)
    });
    assert!(order.contains(&cookies[63]) && order.contains(&cookies[0]));
    harness.settle();
    assert_eq!(gate.waiting(), 63);
    gate.release_all();
    let before = harness.server.metrics().sends;
    let data = harness.run(async move {
        for _ in 0..63 {
            assert_eq!(client.answer(0).await.unwrap().error, 0);
        }
        client.read(4096, 4096).await.data
    });
    assert_eq!(data, vec![1; 4096]);
    let sends = harness.server.metrics().sends - before;
    assert_eq!(sends, 2, "replies that are ready together are sent together");
}

/// A disk that completes after a random time.
struct SlowDisk {
    memory: Rc<MemDisk>,
    runtime: std::cell::RefCell<Option<Runtime>>,
    in_flight_max: Cell<usize>,
    in_flight: Rc<Cell<usize>>,
}

impl Disk for SlowDisk {
    fn serial(&self) -> String {
        "slow".to_owned()
    }

    fn identity(&self) -> disk::Identity {
        disk::Identity::default()
    }

    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn severed(&self) -> bool {
        false
    }

    fn submit(&self, request: Request) -> LocalBoxFuture<Result<Response, DiskError>> {
        let runtime = self.runtime.borrow().clone().expect("the test sets it");
        let memory = Rc::clone(&self.memory);
        let in_flight = Rc::clone(&self.in_flight);
        in_flight.set(in_flight.get() + 1);
        self.in_flight_max.set(self.in_flight_max.get().max(in_flight.get()));
        let delay = runtime.random_below(50) as u64;
        Box::pin(async move {
            if delay > 5 {
                runtime.sleep(std::time::Duration::from_micros(delay)).await;
            }
            in_flight.set(in_flight.get() - 1);
            memory.submit(request).await
        })
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write { block: u64, count: usize, head: usize, fill: u8 },
    Zero { block: u64, count: usize, fua: bool },
    Read { block: u64, count: usize, head: usize, one_chunk: bool },
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0u64..60, 1usize..4, 0usize..4096, any::<u8>())
            .prop_map(|(block, count, head, fill)| Step::Write { block, count, head, fill }),
        (0u64..60, 1usize..4, any::<bool>()).prop_map(|(block, count, fua)| Step::Zero {
            block,
            count,
            fua
        }),
        (0u64..60, 1usize..4, 0usize..4096, any::<bool>()).prop_map(
            |(block, count, head, one_chunk)| Step::Read { block, count, head, one_chunk }
        ),
        Just(Step::Flush),
    ];
    proptest::collection::vec(step, 1..60)
}

/// Sends all steps at once, in windows that touch each block once, and compares with a model.
async fn play(mut client: Client, steps: Vec<Step>) {
    let mut model = vec![0u8; 64 * 4096];
    let mut steps = steps.into_iter().peekable();
    while steps.peek().is_some() {
        let mut touched = [false; 64];
        let mut expected = std::collections::BTreeMap::new();
        while let Some(step) = steps.next_if(|step| claim(step, &mut touched)) {
            let (cookie, data) = start(&mut client, &step, &mut model).await;
            expected.insert(cookie, data);
        }
        for _ in 0..expected.len() {
            // With simple replies the length of the data depends on the cookie.
            let mut answer = client.answer(u64::MAX).await.unwrap();
            let data = expected.remove(&answer.cookie).expect("a cookie of ours, once");
            if client.framing == Framing::Simple && answer.error == 0 {
                answer.data = client.receive(data.len()).await.unwrap();
            }
            assert_eq!(answer.error, 0);
            assert!(answer.data == data);
        }
    }
}

fn claim(step: &Step, touched: &mut [bool; 64]) -> bool {
    let (block, count) = match step {
        Step::Write { block, count, .. }
        | Step::Zero { block, count, .. }
        | Step::Read { block, count, .. } => (*block as usize, *count),
        Step::Flush => return true,
    };
    let free = touched[block..block + count].iter().all(|touched| !touched);
    touched[block..block + count].fill(true);
    free
}

async fn start(client: &mut Client, step: &Step, model: &mut [u8]) -> (u64, Vec<u8>) {
    let range = |block: u64, count: usize, head: usize| {
        let start = block as usize * 4096 + head;
        start..(block as usize + count) * 4096
    };
    match *step {
        Step::Write { block, count, head, fill } => {
            let range = range(block, count, head);
            let data = pattern(range.len(), fill);
            model[range.clone()].copy_from_slice(&data);
            (client.submit_write(range.start as u64, &data, 0).await, vec![])
        }
        Step::Zero { block, count, fua } => {
            let range = range(block, count, 0);
            model[range.clone()].fill(0);
            let flags = if fua { flag::FUA } else { 0 };
            let length = range.len() as u64;
            let offset = range.start as u64;
            (client.submit(Command::WriteZeroes, flags, offset, length, &[]).await, vec![])
        }
        Step::Read { block, count, head, one_chunk } => {
            let range = range(block, count, head);
            let one_chunk = one_chunk && client.framing != Framing::Simple;
            let flags = if one_chunk { flag::DF } else { 0 };
            let length = range.len() as u64;
            let cookie = client.submit(Command::Read, flags, range.start as u64, length, &[]).await;
            (cookie, model[range].to_vec())
        }
        Step::Flush => (client.submit(Command::Flush, 0, 0, 0, &[]).await, vec![]),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_pipelining_client_agrees_with_a_model(
        steps in steps(), seed in any::<u64>(), framing in 0usize..3, capacity in 1usize..200_000,
    ) {
        let disk = Rc::new(SlowDisk {
            memory: Rc::new(MemDisk::new(64 * 4096)),
            runtime: std::cell::RefCell::default(),
            in_flight_max: Cell::new(0),
            in_flight: Rc::default(),
        });
        let catalog = TestCatalog::one("d", Rc::<SlowDisk>::clone(&disk));
        let harness = Harness::with(catalog, Config::default(), Order::Random, seed);
        *disk.runtime.borrow_mut() = Some(harness.runtime.clone());
        let socket = harness.connect(capacity);
        harness.run(async move {
            // The client sends and receives in turn: what it sends must fit on the way.
            let client = Client::attach(socket, "d", FRAMINGS[framing]).await;
            play(client, steps).await;
        });
        prop_assert_eq!(harness.server.metrics().requests_failed, 0);
    }
}
