//! The kernel's side, and the disks that are served.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use base::ErrorKind;
use disk::directory::{Answer, Directory, DiskEntry, SnapshotEntry};
use disk::{Disk, DiskError, GateDisk, MemDisk};
use parallax_fuse::{End, Mount, Server};
use runtime::reactor::{EngineChoice, Io, Pollable, Reactor};
use runtime::{JoinHandle, Runtime};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

pub(crate) const LOOKUP: u32 = 1;
pub(crate) const GETATTR: u32 = 3;
pub(crate) const SETATTR: u32 = 4;
pub(crate) const MKDIR: u32 = 9;
pub(crate) const OPEN: u32 = 14;
pub(crate) const READ: u32 = 15;
pub(crate) const WRITE: u32 = 16;
pub(crate) const STATFS: u32 = 17;
pub(crate) const RELEASE: u32 = 18;
pub(crate) const FSYNC: u32 = 20;
pub(crate) const INIT: u32 = 26;
pub(crate) const OPENDIR: u32 = 27;
pub(crate) const READDIR: u32 = 28;
pub(crate) const INTERRUPT: u32 = 36;
pub(crate) const FALLOCATE: u32 = 43;
pub(crate) const LSEEK: u32 = 46;

pub(crate) const ROOT: u64 = 1;

pub(crate) const EPERM: i32 = 1;
pub(crate) const ENOENT: i32 = 2;
pub(crate) const EIO: i32 = 5;
pub(crate) const ENXIO: i32 = 6;
pub(crate) const EINVAL: i32 = 22;
pub(crate) const ENOSPC: i32 = 28;
pub(crate) const EROFS: i32 = 30;
pub(crate) const ENOSYS: i32 = 38;
pub(crate) const EOPNOTSUPP: i32 = 95;
pub(crate) const ESHUTDOWN: i32 = 108;

/// Size of a disk.
pub(crate) const DISK_BYTES: usize = 4 << 20;

/// One disk of the directory.
pub(crate) struct TestDisk {
    pub(crate) entry: DiskEntry,
    pub(crate) disk: Rc<GateDisk>,
    pub(crate) snapshots: Vec<SnapshotEntry>,
}

/// Disks by number.
#[derive(Default)]
pub(crate) struct TestDirectory(pub(crate) RefCell<Vec<TestDisk>>);

impl TestDirectory {
    pub(crate) fn add(&self, id: u64, name: &str) {
        let entry = DiskEntry {
            id,
            name: name.to_owned(),
            size_bytes: DISK_BYTES as u64,
            created_ns: 0,
            snapshot_count: 0,
        };
        let disk = GateDisk::new(MemDisk::new(DISK_BYTES));
        self.0.borrow_mut().push(TestDisk { entry, disk, snapshots: Vec::new() });
    }

    pub(crate) fn add_snapshot(&self, id: u64, number: u64, label: Option<&str>, created_ns: u64) {
        let mut disks = self.0.borrow_mut();
        let disk = disks.iter_mut().find(|disk| disk.entry.id == id).unwrap();
        let size_bytes = DISK_BYTES as u64;
        let label = label.map(str::to_owned);
        let entry = SnapshotEntry { number, label, size_bytes, created_ns };
        disk.snapshots.push(entry);
        disk.entry.snapshot_count += 1;
    }

    fn look<T>(&self, id: u64, look: impl FnOnce(&TestDisk) -> Option<T>) -> Result<T, DiskError> {
        let disks = self.0.borrow();
        let disk = disks.iter().find(|disk| disk.entry.id == id);
        disk.and_then(look).ok_or(DiskError::new(ErrorKind::NotFound, "no such disk"))
    }
}

fn ready<T: 'static>(outcome: Result<T, DiskError>) -> Answer<T> {
    Box::pin(std::future::ready(outcome))
}

impl Directory for TestDirectory {
    fn disks(&self, after: u64, max: usize) -> Answer<Vec<DiskEntry>> {
        let disks = self.0.borrow();
        let behind = disks.iter().map(|disk| &disk.entry).filter(|entry| entry.id > after);
        ready(Ok(behind.take(max).cloned().collect()))
    }

    fn disk(&self, id: u64) -> Answer<DiskEntry> {
        ready(self.look(id, |disk| Some(disk.entry.clone())))
    }

    fn find(&self, name: &str) -> Answer<DiskEntry> {
        let disks = self.0.borrow();
        let found = disks.iter().find(|disk| disk.entry.name == name);
        let missing = DiskError::new(ErrorKind::NotFound, "no such disk");
        ready(found.map(|disk| disk.entry.clone()).ok_or(missing))
    }

    fn snapshots(&self, id: u64, after: u64, max: usize) -> Answer<Vec<SnapshotEntry>> {
        ready(self.look(id, |disk| {
            let from = disk.snapshots.partition_point(|entry| entry.number <= after);
            Some(disk.snapshots[from..].iter().take(max).cloned().collect())
        }))
    }

    fn find_snapshot(&self, id: u64, name: &str) -> Answer<SnapshotEntry> {
        ready(self.look(id, |disk| {
            let mut all = disk.snapshots.iter();
            let is_this = |entry: &&SnapshotEntry| {
                entry.label.as_deref() == Some(name) || entry.number.to_string() == name
            };
            all.find(is_this).cloned()
        }))
    }

    fn open(&self, id: u64, snapshot: Option<u64>) -> Answer<Rc<dyn Disk>> {
        ready(self.look(id, |disk| match snapshot {
            None => Some(Rc::clone(&disk.disk) as Rc<dyn Disk>),
            Some(number) => {
                disk.snapshots.iter().find(|entry| entry.number == number)?;
                // Full of its number.
                let contents = vec![number as u8; DISK_BYTES];
                Some(GateDisk::new(MemDisk::read_only(contents)) as Rc<dyn Disk>)
            }
        }))
    }
}

/// A kernel with a mount.
pub(crate) struct Kernel {
    pub(crate) runtime: Runtime,
    io: Io,
    pub(crate) directory: Rc<TestDirectory>,
    pub(crate) server: Server,
    socket: Rc<Pollable>,
    theirs: OwnedFd,
    pub(crate) mount: Mount,
    serving: RefCell<Option<JoinHandle<End>>>,
    replies: RefCell<VecDeque<(u64, i32, Vec<u8>)>>,
    unique: std::cell::Cell<u64>,
    /// Where messages arrive.
    message: std::cell::Cell<Vec<u8>>,
}

/// Runs a test with a mount of what `fill` puts into the directory.
pub(crate) fn run<F: Future<Output = ()> + 'static>(
    fill: impl FnOnce(&TestDirectory),
    test: impl FnOnce(Kernel) -> F,
) {
    let reactor = Reactor::start(EngineChoice::Auto).unwrap();
    let directory = Rc::new(TestDirectory::default());
    fill(&directory);
    let kernel = Kernel::new(&reactor, directory);
    reactor.run(test(kernel)).unwrap();
    // Tasks and what they own refer to each other.
    reactor.runtime().kill();
}

impl Kernel {
    fn new(reactor: &Reactor, directory: Rc<TestDirectory>) -> Self {
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .unwrap();
        let served: Rc<TestDirectory> = Rc::clone(&directory);
        let server = Server::new(&runtime, &io, served);
        let mount = server.mount(theirs.try_clone().unwrap()).unwrap();
        let socket = Rc::new(Pollable::adopt(&io, ours).unwrap());
        let kernel = Self {
            runtime,
            io,
            directory,
            server,
            socket,
            theirs,
            mount: mount.clone(),
            serving: RefCell::default(),
            replies: RefCell::default(),
            unique: std::cell::Cell::new(1),
            message: std::cell::Cell::new(vec![0; 2 << 20]),
        };
        kernel.serve(mount);
        kernel
    }

    fn serve(&self, mount: Mount) {
        let serving = self.runtime.spawn(async move { mount.serve().await });
        self.serving.replace(Some(serving));
    }

    /// How the server ended.
    pub(crate) async fn end(&self) -> End {
        let serving = self.serving.borrow_mut().take().unwrap();
        serving.await
    }

    /// Another server takes the mount over.
    pub(crate) fn taken_over(&mut self) {
        let served: Rc<TestDirectory> = Rc::clone(&self.directory);
        self.server = Server::new(&self.runtime, &self.io, served);
        self.mount = self.server.mount(self.theirs.try_clone().unwrap()).unwrap();
        self.serve(self.mount.clone());
    }

    /// Sends a request, and returns its number.
    pub(crate) fn send(&self, opcode: u32, node: u64, body: &[u8]) -> u64 {
        let unique = self.unique.replace(self.unique.get() + 1);
        let length = 40 + body.len() as u32;
        let mut message = Vec::new();
        message.extend_from_slice(&length.to_le_bytes());
        message.extend_from_slice(&opcode.to_le_bytes());
        message.extend_from_slice(&unique.to_le_bytes());
        message.extend_from_slice(&node.to_le_bytes());
        message.extend_from_slice(&[0; 16]);
        message.extend_from_slice(body);
        self.send_raw(&message);
        unique
    }

    pub(crate) fn send_raw(&self, message: &[u8]) {
        assert_eq!(rustix::io::write(&self.socket, message), Ok(message.len()));
    }

    /// Whether a message waits to be taken.
    pub(crate) fn has_untaken(&self) -> bool {
        let mut peeked = [0; 1];
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        rustix::net::recv(self.theirs.as_fd(), &mut peeked, flags).is_ok()
    }

    /// The next message of the server: number, error, and what follows.
    pub(crate) async fn receive(&self) -> (u64, i32, Vec<u8>) {
        let mut message = self.message.take();
        loop {
            let received = rustix::io::read(&self.socket, &mut message);
            match received {
                Ok(length) => {
                    let word =
                        |at: usize| u32::from_le_bytes(message[at..at + 4].try_into().unwrap());
                    assert_eq!(word(0) as usize, length);
                    let unique = u64::from_le_bytes(message[8..16].try_into().unwrap());
                    let reply = (unique, word(4).cast_signed(), message[16..length].to_vec());
                    self.message.set(message);
                    return reply;
                }
                Err(Errno::AGAIN) => Rc::clone(&self.socket).readable().await.unwrap(),
                Err(errno) => panic!("{errno}"),
            }
        }
    }

    /// Does one request; what follows the header of its reply, or the error.
    pub(crate) async fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let unique = self.send(opcode, node, body);
        self.reply(unique).await
    }

    /// The reply to a request. The first message of all is no reply.
    pub(crate) async fn reply(&self, wanted: u64) -> Result<Vec<u8>, i32> {
        loop {
            let at = self.replies.borrow().iter().position(|(unique, ..)| *unique == wanted);
            if let Some((_, error, body)) = at.and_then(|at| self.replies.borrow_mut().remove(at)) {
                return if error == 0 { Ok(body) } else { Err(-error) };
            }
            let message = self.receive().await;
            self.replies.borrow_mut().push_back(message);
        }
    }

    pub(crate) async fn lookup(&self, parent: u64, name: &str) -> Result<u64, i32> {
        let entry = self.ask(LOOKUP, parent, &[name.as_bytes(), &[0]].concat()).await?;
        assert_eq!(entry.len(), 128);
        Ok(number(&entry, 0))
    }

    /// The node of a path.
    pub(crate) async fn walk(&self, path: &str) -> Result<u64, i32> {
        let mut node = ROOT;
        for name in path.split('/') {
            node = self.lookup(node, name).await?;
        }
        Ok(node)
    }

    /// Opens a file; its handle.
    pub(crate) async fn open(&self, node: u64, flags: u32) -> Result<u64, i32> {
        let opened = self.ask(OPEN, node, &numbers(&[u64::from(flags)])).await?;
        Ok(number(&opened, 0))
    }

    pub(crate) async fn write(
        &self,
        (node, handle): (u64, u64),
        offset: u64,
        flags: u32,
        bytes: &[u8],
    ) -> Result<usize, i32> {
        let unique = self.send_write((node, handle), offset, flags, bytes);
        Ok(number(&self.reply(unique).await?, 0) as usize)
    }

    pub(crate) fn send_write(
        &self,
        (node, handle): (u64, u64),
        offset: u64,
        flags: u32,
        bytes: &[u8],
    ) -> u64 {
        let head = numbers(&[handle, offset, bytes.len() as u64, 0, u64::from(flags)]);
        self.send(WRITE, node, &[&head, bytes].concat())
    }

    pub(crate) async fn read(
        &self,
        (node, handle): (u64, u64),
        offset: u64,
        size: u64,
    ) -> Result<Vec<u8>, i32> {
        self.ask(READ, node, &numbers(&[handle, offset, size, 0, 0])).await
    }

    /// All names in a directory, listed through buffers of so many bytes.
    pub(crate) async fn list(&self, node: u64, size: u64) -> Vec<String> {
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let listing =
                self.ask(READDIR, node, &numbers(&[0, offset, size, 0, 0])).await.unwrap();
            if listing.is_empty() {
                return names;
            }
            let mut rest = &listing[..];
            while !rest.is_empty() {
                offset = number(rest, 8);
                let length = (number(rest, 16) & 0xffff_ffff) as usize;
                names.push(String::from_utf8(rest[24..24 + length].to_vec()).unwrap());
                rest = &rest[(24 + length).next_multiple_of(8)..];
            }
        }
    }

    /// Lets everything that can happen happen.
    pub(crate) async fn settle(&self) {
        self.runtime.sleep(std::time::Duration::from_millis(20)).await;
    }
}

pub(crate) fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub(crate) fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}
