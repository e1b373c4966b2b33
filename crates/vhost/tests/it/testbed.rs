//! A server with one disk, and a disk that a test can hold up.

use std::cell::{Cell, RefCell};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use base::ErrorKind;
use disk::{Catalog, Disk, DiskError, Export, LocalBoxFuture, MemDisk, Request, Response};
use runtime::Runtime;
use runtime::reactor::{Address, Channel, EngineChoice, Io, Listener, Reactor};
use runtime::sync::{OneshotSender, oneshot};
use vhost::{Attachment, Config, Server};

/// Runs a test on the engine that there is.
pub(crate) fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Bed) -> F) {
    run_on(EngineChoice::Auto, test);
}

/// Runs a test on this engine.
pub(crate) fn run_on<F: Future<Output = ()> + 'static>(
    choice: EngineChoice,
    test: impl FnOnce(Bed) -> F,
) {
    let reactor = Reactor::start(choice).unwrap();
    let bed = Bed::new(&reactor);
    reactor.run(test(bed)).unwrap();
    // Tasks and what they own refer to each other.
    reactor.runtime().kill();
}

/// A server with one attachment.
pub(crate) struct Bed {
    pub(crate) runtime: Runtime,
    pub(crate) io: Io,
    pub(crate) disk: Rc<GateDisk>,
    pub(crate) server: Server,
    pub(crate) attachment: Attachment,
    path: PathBuf,
}

/// Size of the disk.
pub(crate) const DISK_BYTES: usize = 40 << 20;

impl Bed {
    fn new(reactor: &Reactor) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        let disk = GateDisk::new(MemDisk::new(DISK_BYTES));
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("plx-vhost-{}-{number}", std::process::id()));
        let listener = Listener::bind(&io, &Address::Unix(path.clone())).unwrap();
        let config = Config { drain_timeout: Duration::from_millis(200) };
        let catalog = Rc::new(OneDisk(Rc::clone(&disk)));
        let server = Server::new(&runtime, &io, catalog, config);
        let attachment = server.attach("d".to_owned(), listener);
        Self { runtime, io, disk, server, attachment, path }
    }

    /// A connection to the server.
    pub(crate) fn connect(&self) -> Channel {
        Channel::adopt(&self.io, UnixStream::connect(&self.path).unwrap().into()).unwrap()
    }

    /// Waits until something holds.
    pub(crate) async fn until(&self, mut holds: impl FnMut() -> bool) {
        for _ in 0..5000 {
            if holds() {
                return;
            }
            self.runtime.sleep(Duration::from_millis(1)).await;
        }
        panic!("it does not come");
    }

    /// Lets everything that can happen happen.
    pub(crate) async fn settle(&self) {
        self.runtime.sleep(Duration::from_millis(20)).await;
    }
}

struct OneDisk(Rc<GateDisk>);

impl Catalog for OneDisk {
    fn list(
        &self,
        _after: Option<String>,
        _max: usize,
    ) -> LocalBoxFuture<Result<Vec<Export>, DiskError>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    fn open(&self, name: &str) -> LocalBoxFuture<Result<Rc<dyn Disk>, DiskError>> {
        let missing = DiskError::new(ErrorKind::NotFound, "there is no such disk");
        let disk: Rc<dyn Disk> = Rc::<GateDisk>::clone(&self.0);
        Box::pin(std::future::ready(if name == "d" { Ok(disk) } else { Err(missing) }))
    }
}

type Held = (Request, OneshotSender<Result<Response, DiskError>>);

/// A disk in memory that, while held, completes requests when and in the order the test says.
pub(crate) struct GateDisk {
    memory: RefCell<MemDisk>,
    held: Cell<bool>,
    waiting: RefCell<Vec<Held>>,
    /// Every request, as debug text.
    pub(crate) log: RefCell<Vec<String>>,
    /// What the next requests fail with.
    pub(crate) failure: Cell<Option<ErrorKind>>,
}

impl GateDisk {
    fn new(memory: MemDisk) -> Rc<Self> {
        Rc::new(Self {
            memory: RefCell::new(memory),
            held: Cell::new(false),
            waiting: RefCell::default(),
            log: RefCell::default(),
            failure: Cell::new(None),
        })
    }

    /// From now on it is another disk.
    pub(crate) fn become_other(&self, memory: MemDisk) {
        self.memory.replace(memory);
    }

    pub(crate) fn hold(&self) {
        self.held.set(true);
    }

    /// Requests that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.borrow().len()
    }

    /// Completes the request at `index` of those that wait.
    pub(crate) fn release(&self, index: usize) {
        let (request, sender) = self.waiting.borrow_mut().remove(index);
        sender.send(self.execute(request));
    }

    pub(crate) fn release_all(&self) {
        self.held.set(false);
        while self.waiting() > 0 {
            self.release(0);
        }
    }

    pub(crate) fn sever(&self) {
        self.memory.borrow().sever();
    }

    /// What it holds.
    pub(crate) fn contents(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let pieces = disk::split::pieces(offset, length);
        let mut at = 0;
        for (offset, length) in pieces {
            match self.execute(Request::Read { offset, length }).unwrap() {
                Response::Data(segments) => {
                    disk::copy_segments(&segments, &mut bytes[at..at + length]);
                }
                other => panic!("{other:?}"),
            }
            at += length;
        }
        bytes
    }

    fn execute(&self, request: Request) -> Result<Response, DiskError> {
        if let Some(kind) = self.failure.get() {
            return Err(DiskError::new(kind, "a failure that the test wants"));
        }
        let mut future = self.memory.borrow().submit(request);
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(outcome) => outcome,
            std::task::Poll::Pending => unreachable!("memory answers at once"),
        }
    }
}

impl Disk for GateDisk {
    fn serial(&self) -> String {
        "plx-0000000000000007".to_owned()
    }

    fn size_bytes(&self) -> u64 {
        self.memory.borrow().size_bytes()
    }

    fn read_only(&self) -> bool {
        self.memory.borrow().read_only()
    }

    fn severed(&self) -> bool {
        self.memory.borrow().severed()
    }

    fn submit(&self, request: Request) -> LocalBoxFuture<Result<Response, DiskError>> {
        self.log.borrow_mut().push(format!("{request:?}"));
        if !self.held.get() {
            return Box::pin(std::future::ready(self.execute(request)));
        }
        let (sender, receiver) = oneshot();
        self.waiting.borrow_mut().push((request, sender));
        Box::pin(async move { receiver.await.expect("the test answers every request") })
    }
}
