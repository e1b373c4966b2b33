//! Sessions before a kernel of the tests' own.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::IoSlice;
use std::rc::Rc;
use std::task::{Context, Waker};

use disk::conformance::{self, Client, Done, read_only_disk};
use disk::{GateDisk, MemDisk};
use runtime::JoinHandle;
use runtime::reactor::{EngineChoice, Reactor};
use runtime::sync::{OneshotSender, oneshot};

use super::*;

/// The kernel's side of the slots.
#[derive(Default)]
struct Slots {
    arrivals: VecDeque<Arrival>,
    waker: Option<Waker>,
    /// Requests under way, by place.
    asked: Vec<Option<Asked>>,
    /// Whether data cannot be copied.
    broken: bool,
}

struct Asked {
    data: Vec<u8>,
    done: OneshotSender<(i32, Vec<u8>)>,
}

#[derive(Clone)]
struct Kernel(Rc<RefCell<Slots>>);

/// Two queues.
const DEPTH: usize = 20;
const SLOTS: usize = 2 * DEPTH;

fn place(slot: Slot) -> usize {
    usize::from(slot.queue) * DEPTH + usize::from(slot.tag)
}

fn slot(place: usize) -> Slot {
    let number = |number| u16::try_from(number).unwrap();
    Slot { queue: number(place / DEPTH), tag: number(place % DEPTH) }
}

impl Kernel {
    fn new() -> Self {
        let asked = (0..SLOTS).map(|_| None).collect();
        Self(Rc::new(RefCell::new(Slots { asked, ..Slots::default() })))
    }

    fn arrive(&self, arrival: Arrival) {
        let mut slots = self.0.borrow_mut();
        slots.arrivals.push_back(arrival);
        if let Some(waker) = slots.waker.take() {
            waker.wake();
        }
    }

    /// Puts a request into the first free slot; its result, and the data of a read.
    fn ask(
        &self,
        descriptor: Descriptor,
        mut data: Vec<u8>,
    ) -> impl Future<Output = (i32, Vec<u8>)> + 'static {
        data.resize(usize::try_from(descriptor.data_bytes()).unwrap(), 0);
        let (done, outcome) = oneshot();
        let at = {
            let mut slots = self.0.borrow_mut();
            let at = slots.asked.iter().position(Option::is_none).expect("a slot is free");
            slots.asked[at] = Some(Asked { data, done });
            at
        };
        self.arrive(Arrival::Request(slot(at), descriptor));
        async move {
            match outcome.await {
                Ok(answer) => answer,
                // The kernel is gone with the test.
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// As the block layer does it: in pieces that the device takes.
    async fn transfer(&self, operation: Operation, offset: u64, bytes: Vec<u8>) -> Option<Vec<u8>> {
        let mut all = Vec::new();
        for (index, piece) in bytes.chunks(1 << 20).enumerate() {
            let at = offset + (index << 20) as u64;
            let request = descriptor(operation, at, piece.len() as u64);
            let (result, data) = self.ask(request, piece.to_vec()).await;
            if result < 0 {
                return None;
            }
            assert_eq!(usize::try_from(result).unwrap(), piece.len());
            all.extend(data);
        }
        Some(all)
    }

    async fn range(&self, operation: Operation, offset: u64, length: u64) -> Option<()> {
        let (result, _) = self.ask(descriptor(operation, offset, length), Vec::new()).await;
        (result == 0).then_some(())
    }

    fn end(&self) {
        for _ in 0..SLOTS {
            self.arrive(Arrival::End);
        }
    }
}

fn descriptor(operation: Operation, offset: u64, bytes: u64) -> Descriptor {
    Descriptor { operation: Some(operation), offset, bytes, fua: false, no_unmap: false }
}

impl Queues for Kernel {
    fn slots(&self) -> usize {
        SLOTS
    }

    fn turn(&mut self, arrived: &mut dyn FnMut(Arrival)) -> io::Result<()> {
        let arrivals = std::mem::take(&mut self.0.borrow_mut().arrivals);
        arrivals.into_iter().for_each(arrived);
        Ok(())
    }

    fn poll_arrival(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut slots = self.0.borrow_mut();
        slots.waker = Some(context.waker().clone());
        if slots.arrivals.is_empty() { Poll::Pending } else { Poll::Ready(()) }
    }

    fn fetch(&self, slot: Slot, into: &mut [u8]) -> io::Result<()> {
        let slots = self.0.borrow();
        if slots.broken {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        into.copy_from_slice(&slots.asked[place(slot)].as_ref().unwrap().data);
        Ok(())
    }

    fn give(&self, slot: Slot, data: &[IoSlice<'_>]) -> io::Result<()> {
        let mut slots = self.0.borrow_mut();
        if slots.broken {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let all: Vec<u8> = data.iter().flat_map(|part| part.to_vec()).collect();
        let asked = slots.asked[place(slot)].as_mut().unwrap();
        assert_eq!(asked.data.len(), all.len());
        asked.data = all;
        Ok(())
    }

    fn complete(&mut self, slot: Slot, result: i32) {
        let asked = self.0.borrow_mut().asked[place(slot)].take().expect("it is under way");
        asked.done.send((result, asked.data));
    }
}

impl Client for Kernel {
    fn grain(&self) -> u64 {
        512
    }

    fn read(&mut self, offset: u64, length: usize) -> Done<'_, Vec<u8>> {
        Box::pin(self.transfer(Operation::Read, offset, vec![0; length]))
    }

    fn write(&mut self, offset: u64, bytes: Vec<u8>) -> Done<'_, ()> {
        Box::pin(async move { self.transfer(Operation::Write, offset, bytes).await.map(drop) })
    }

    fn flush(&mut self) -> Done<'_, ()> {
        Box::pin(self.range(Operation::Flush, 0, 0))
    }

    fn discard(&mut self, offset: u64, length: u64) -> Done<'_, ()> {
        Box::pin(self.range(Operation::Discard, offset, length))
    }

    fn zero(&mut self, offset: u64, length: u64) -> Done<'_, ()> {
        Box::pin(self.range(Operation::WriteZeroes, offset, length))
    }

    fn size(&mut self) -> Done<'_, u64> {
        Box::pin(std::future::ready(Some(conformance::DISK_BYTES_MIN as u64)))
    }
}

/// What a test works with.
struct Served {
    runtime: Runtime,
    kernel: Kernel,
    disk: Rc<GateDisk>,
    session: Rc<Session>,
    metrics: Rc<Metrics>,
    end: JoinHandle<End>,
}

impl Served {
    /// Lets everybody do what they can do now.
    async fn settle(&self) {
        for _ in 0..20 {
            self.runtime.yield_now().await;
        }
    }

    fn write(&self, offset: u64) -> JoinHandle<(i32, Vec<u8>)> {
        let request = descriptor(Operation::Write, offset, 4096);
        self.runtime.spawn(self.kernel.ask(request, vec![1; 4096]))
    }
}

/// Runs a test with a session for `memory`, or for a device whose disk is another one now.
fn run_with(memory: Option<MemDisk>, test: impl AsyncFnOnce(Served) + 'static) {
    let reactor = Reactor::start(EngineChoice::ThreadPool).unwrap();
    let runtime = reactor.runtime().clone();
    let (kernel, metrics) = (Kernel::new(), Rc::default());
    let replaced = memory.is_none();
    let disk = GateDisk::new(memory.unwrap_or_else(|| MemDisk::new(1 << 20)));
    let served = (!replaced).then(|| Rc::clone(&disk) as Rc<dyn Disk>);
    let session = Session::new(&runtime, served, &metrics);
    let (task, queues) = (Rc::clone(&session), kernel.clone());
    let end = runtime.spawn(async move { task.run(queues).await });
    let served = Served { runtime, kernel, disk, session, metrics, end };
    reactor.run(test(served)).unwrap();
}

fn run(test: impl AsyncFnOnce(Served) + 'static) {
    run_with(Some(MemDisk::new(conformance::DISK_BYTES_MIN)), test);
}

#[test]
fn a_block_device_is_a_disk() {
    run(async |mut served| conformance::run(&mut served.kernel, &served.disk).await);
}

#[test]
fn one_that_can_only_be_read_is_one_too() {
    run_with(Some(read_only_disk()), async |mut served| {
        conformance::run_read_only(&mut served.kernel, &served.disk).await;
    });
}

#[test]
fn what_is_asked_reaches_the_disk_as_it_is() {
    run(async |served| {
        let asked = |change: fn(&mut Descriptor), operation| {
            let mut request = descriptor(operation, 4096, 8192);
            change(&mut request);
            served.kernel.ask(request, Vec::new())
        };
        assert_eq!(asked(|it| it.fua = true, Operation::Write).await.0, 8192);
        assert_eq!(asked(|it| it.fua = true, Operation::Discard).await.0, 0);
        assert_eq!(asked(|it| it.no_unmap = true, Operation::WriteZeroes).await.0, 0);
        let log = served.disk.log.borrow();
        assert!(log[0].starts_with("Write { offset: 4096, length: 8192"), "{log:?}");
        assert!(log[0].ends_with("fua: true }"), "{log:?}");
        assert_eq!(log[1], "Discard { offset: 4096, length: 8192, fua: true }");
        let zeroed = "WriteZeroes { offset: 4096, length: 8192, fua: false, no_hole: true, \
                      fast_only: false }";
        assert_eq!(log[2], zeroed);
    });
}

#[test]
fn errors_are_those_of_the_system() {
    run(async |served| {
        for (kind, number) in [
            (ErrorKind::Io, -5),
            (ErrorKind::Corrupt, -5),
            (ErrorKind::NoSpace, -28),
            (ErrorKind::Fenced, -108),
        ] {
            served.disk.failure.set(Some(kind));
            let read = descriptor(Operation::Read, 0, 512);
            assert_eq!(served.kernel.ask(read, Vec::new()).await.0, number, "{kind:?}");
        }
        served.disk.failure.set(None);
        let unknown = Descriptor { operation: None, ..descriptor(Operation::Flush, 0, 0) };
        assert_eq!(served.kernel.ask(unknown, Vec::new()).await.0, -95);
        let too_much = descriptor(Operation::Read, 0, (1 << 20) + 512);
        assert_eq!(served.kernel.ask(too_much, Vec::new()).await.0, -22);
        served.kernel.0.borrow_mut().broken = true;
        for operation in [Operation::Read, Operation::Write] {
            let request = descriptor(operation, 0, 512);
            assert_eq!(served.kernel.ask(request, Vec::new()).await.0, -5);
        }
        let metrics = served.metrics.snapshot();
        assert_eq!((metrics.requests_failed, metrics.reads, metrics.writes), (8, 6, 1));
        assert_eq!((metrics.read_bytes, metrics.written_bytes), (0, 0));
    });
}

#[test]
fn requests_complete_in_any_order() {
    run(async |served| {
        served.disk.hold();
        let writes = [0, 4096, 8192].map(|offset| served.write(offset));
        served.settle().await;
        assert_eq!(served.disk.waiting(), 3);
        served.disk.release(1);
        let [first, second, third] = writes;
        assert_eq!(second.await.0, 4096);
        served.disk.release_all();
        assert_eq!((third.await.0, first.await.0), (4096, 4096));
        assert_eq!(served.metrics.snapshot().written_bytes, 3 * 4096);
    });
}

#[test]
fn whoever_knows_another_disk_gets_nothing_of_it() {
    run_with(None, async |served| {
        for operation in [Operation::Read, Operation::Write, Operation::Flush, Operation::Discard] {
            let request = descriptor(operation, 0, 4096);
            assert_eq!(served.kernel.ask(request, Vec::new()).await.0, -108);
        }
        assert!(served.disk.log.borrow().is_empty());
        served.kernel.end();
        assert!(matches!(served.end.await, End::Stopped));
    });
}

#[test]
fn a_device_that_was_stopped_ends_when_all_is_answered() {
    run(async |served| {
        served.disk.hold();
        let write = served.write(0);
        served.settle().await;
        served.kernel.end();
        served.settle().await;
        assert_eq!(served.metrics.snapshot().devices_open, 1, "one is under way");
        served.disk.release_all();
        assert_eq!(write.await.0, 4096);
        assert!(matches!(served.end.await, End::Stopped));
        assert_eq!(served.metrics.snapshot().devices_open, 0);
    });
}

#[test]
fn one_that_is_left_takes_nothing_more() {
    run(async |served| {
        served.disk.hold();
        let taken = served.write(0);
        served.settle().await;
        served.session.leave();
        let left = served.write(4096);
        served.settle().await;
        assert_eq!(served.disk.log.borrow().len(), 1, "the second one waits for the next server");
        served.disk.release_all();
        assert_eq!(taken.await.0, 4096);
        assert!(matches!(served.end.await, End::Left));
        drop(left);
    });
}

#[test]
fn one_that_is_abandoned_answers_nothing_more() {
    run(async |served| {
        served.disk.hold();
        let _write = served.write(0);
        served.settle().await;
        served.session.leave();
        served.settle().await;
        served.session.abandon();
        assert!(matches!(served.end.await, End::Left));
        served.disk.release_all();
        let slots = served.kernel.0.borrow();
        assert!(slots.asked[0].is_some(), "it comes again to the next server");
    });
}

#[test]
fn data_under_way_has_a_bound() {
    run(async |served| {
        served.disk.hold();
        let write = descriptor(Operation::Write, 0, 1 << 20);
        let requests: Vec<_> =
            (0..SLOTS).map(|_| served.runtime.spawn(served.kernel.ask(write, vec![1]))).collect();
        for _ in 0..SLOTS {
            served.settle().await;
        }
        assert_eq!(served.disk.waiting(), 32);
        served.disk.release_all();
        for request in requests {
            assert_eq!(request.await.0, 1 << 20);
        }
    });
}
