//! A server with one disk, which a test can hold up.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use base::ErrorKind;
use disk::{Catalog, Disk, DiskError, Export, GateDisk, LocalBoxFuture, MemDisk};
use runtime::Runtime;
use runtime::reactor::{Address, Channel, EngineChoice, Io, Listener, Reactor};
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
