//! A runtime with its own time, a catalog of disks, and a disk that a test can hold up.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use base::ErrorKind;
use disk::{Catalog, Disk, DiskError, Export, LocalBoxFuture, MemDisk};
use nbd::{Config, Server};
use runtime::socket::{Socket, pair};
use runtime::{Clock, Options, Order, Runtime, Time};

/// A clock that a test moves.
#[derive(Default)]
pub(crate) struct TestClock(Cell<u64>);

impl Clock for TestClock {
    fn now(&self) -> Time {
        Time(self.0.get())
    }

    fn wall_ns(&self) -> u64 {
        self.0.get()
    }
}

pub(crate) struct Harness {
    pub(crate) runtime: Runtime,
    pub(crate) server: Server,
    clock: Rc<TestClock>,
}

impl Harness {
    pub(crate) fn new(catalog: TestCatalog) -> Self {
        Self::with(catalog, Config::default(), Order::Fifo, 1)
    }

    pub(crate) fn with(catalog: TestCatalog, config: Config, order: Order, seed: u64) -> Self {
        let clock = Rc::new(TestClock::default());
        let unpark = Arc::new(|| {});
        let shared = Rc::<TestClock>::clone(&clock);
        let runtime = Runtime::new(Options { order, seed, clock: shared, unpark });
        let server = Server::new(&runtime, Rc::new(catalog), config);
        Self { runtime, server, clock }
    }

    /// A connection to the server, with room for `capacity` bytes in each direction.
    pub(crate) fn connect(&self, capacity: usize) -> Rc<dyn Socket> {
        let (client, server) = pair(capacity);
        self.runtime.spawn(self.server.serve(server, "test".to_owned()));
        client
    }

    /// Runs until `future` is done; time jumps to the next timer when nothing else can happen.
    ///
    /// # Panics
    /// If nothing can happen any more.
    pub(crate) fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let result = Rc::new(RefCell::new(None));
        let into = Rc::clone(&result);
        self.runtime.spawn(async move {
            let value = future.await;
            *into.borrow_mut() = Some(value);
        });
        loop {
            self.runtime.run_until_stalled();
            if let Some(value) = result.borrow_mut().take() {
                return value;
            }
            let deadline = self.runtime.next_deadline().expect("nothing can happen any more");
            self.clock.0.set(deadline.0);
            self.runtime.fire_timers();
        }
    }

    /// Runs what can run without time passing.
    pub(crate) fn settle(&self) {
        self.runtime.run_until_stalled();
    }
}

/// Disks by name.
#[derive(Default)]
pub(crate) struct TestCatalog {
    disks: BTreeMap<String, Rc<dyn Disk>>,
    pub(crate) lists: Rc<Cell<usize>>,
}

impl TestCatalog {
    pub(crate) fn one(name: &str, disk: Rc<dyn Disk>) -> Self {
        Self::default().add(name, disk)
    }

    pub(crate) fn memory(size: usize) -> Self {
        Self::one("d", Rc::new(MemDisk::new(size)))
    }

    pub(crate) fn add(mut self, name: &str, disk: Rc<dyn Disk>) -> Self {
        self.disks.insert(name.to_owned(), disk);
        self
    }
}

impl Catalog for TestCatalog {
    fn list(
        &self,
        after: Option<String>,
        max: usize,
    ) -> LocalBoxFuture<Result<Vec<Export>, DiskError>> {
        self.lists.set(self.lists.get() + 1);
        let page = self
            .disks
            .iter()
            .filter(|(name, _)| after.as_ref().is_none_or(|after| *name > after))
            .take(max)
            .map(|(name, disk)| Export {
                name: name.clone(),
                size_bytes: disk.size_bytes(),
                read_only: disk.read_only(),
            })
            .collect();
        Box::pin(std::future::ready(Ok(page)))
    }

    fn open(&self, name: &str) -> LocalBoxFuture<Result<Rc<dyn Disk>, DiskError>> {
        let disk = self.disks.get(name).cloned();
        let missing = DiskError::new(ErrorKind::NotFound, "there is no such disk");
        Box::pin(std::future::ready(disk.ok_or(missing)))
    }
}
