//! An arbitrary kernel: messages with fields of the fuzzer's choice, and names that somebody looks for.
//! No panic, every message with a number is answered at most once, and the mount comes to rest.
#![no_main]

use std::cell::RefCell;
use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use base::ErrorKind;
use disk::directory::{Answer, Directory, DiskEntry, SnapshotEntry};
use disk::{Disk, DiskError, MemDisk};
use fuse::Server;
use fuzz::script::Script;
use fuzz::slow::SlowDisk;
use libfuzzer_sys::fuzz_target;
use runtime::Runtime;
use runtime::reactor::Io;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send};

const DISK_BYTES: usize = 1 << 20;
const HEADER_BYTES: usize = 40;

/// Two disks, one of them with snapshots of all kinds of names.
struct Disks(Rc<SlowDisk>);

const LABELS: [Option<&str>; 4] = [None, Some("daily"), Some("a%2f..b"), Some(".")];

fn ready<T: 'static>(found: Option<T>) -> Answer<T> {
    let missing = || DiskError::new(ErrorKind::NotFound, "there is no such thing");
    Box::pin(std::future::ready(found.ok_or_else(missing)))
}

fn entries() -> Vec<DiskEntry> {
    let entry = |(id, name): (u64, &str)| DiskEntry {
        id,
        name: name.to_owned(),
        size_bytes: DISK_BYTES as u64,
        created_ns: 0,
        snapshot_count: if id == 1 { LABELS.len() as u64 } else { 0 },
    };
    [(1, "web01"), (7, "x")].map(entry).to_vec()
}

fn snapshots() -> Vec<SnapshotEntry> {
    let entry = |(number, label): (u64, &Option<&str>)| SnapshotEntry {
        number,
        label: label.map(str::to_owned),
        size_bytes: DISK_BYTES as u64,
        created_ns: number * 3_600_000_000_000,
    };
    (1..).zip(&LABELS).map(entry).collect()
}

impl Directory for Disks {
    fn disks(&self, after: u64, max: usize) -> Answer<Vec<DiskEntry>> {
        ready(Some(entries().into_iter().filter(|entry| entry.id > after).take(max).collect()))
    }

    fn disk(&self, id: u64) -> Answer<DiskEntry> {
        ready(entries().into_iter().find(|entry| entry.id == id))
    }

    fn find(&self, name: &str) -> Answer<DiskEntry> {
        ready(entries().into_iter().find(|entry| entry.name == name))
    }

    fn snapshots(&self, id: u64, after: u64, max: usize) -> Answer<Vec<SnapshotEntry>> {
        let behind = snapshots().into_iter().filter(|entry| id == 1 && entry.number > after);
        ready(Some(behind.take(max).collect()))
    }

    fn find_snapshot(&self, id: u64, name: &str) -> Answer<SnapshotEntry> {
        let is_this = |entry: &SnapshotEntry| {
            entry.label.as_deref() == Some(name) || entry.number.to_string() == name
        };
        ready(snapshots().into_iter().find(|entry| id == 1 && is_this(entry)))
    }

    fn open(&self, id: u64, snapshot: Option<u64>) -> Answer<Rc<dyn Disk>> {
        let disk: Option<Rc<dyn Disk>> = match (id, snapshot) {
            (1 | 7, None) => Some(Rc::<SlowDisk>::clone(&self.0)),
            (1, Some(1..=4)) => Some(Rc::new(MemDisk::read_only(vec![7; DISK_BYTES]))),
            _ => None,
        };
        ready(disk)
    }
}

/// The kernel's end of the connection.
struct Kernel {
    socket: OwnedFd,
    /// Numbers of messages that may be answered.
    asked: RefCell<HashSet<u64>>,
    /// Numbers of nodes that were told.
    nodes: RefCell<Vec<u64>>,
    unique: u64,
}

impl Kernel {
    fn step(&mut self, script: &mut Script<'_>) {
        let message =
            if script.byte() % 16 == 0 { script.bytes().to_vec() } else { self.message(script) };
        // Full: the server is to read first.
        let _ = send(&self.socket, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        self.replies();
    }

    /// A message whose header fits, mostly, and whose fields are near bounds.
    fn message(&mut self, script: &mut Script<'_>) -> Vec<u8> {
        let [opcode, node, fields, shape] = script.take();
        let mut body = Vec::new();
        let opcode = match opcode {
            0..64 => u32::from(opcode % 52),
            64..96 => 1,
            96..128 => 15,
            128..176 => 16,
            176..192 => 28,
            192..224 => 43,
            _ => [3, 4, 14, 20, 46, 17][usize::from(opcode % 6)],
        };
        if opcode == 1 {
            let names = ["web01.img", ".snapshots", "web01", "daily.img", "1.img", "1970-01-01"];
            match names.get(usize::from(shape % 8)) {
                Some(name) => body.extend_from_slice(name.as_bytes()),
                None => body.extend_from_slice(script.bytes()),
            }
            body.push(0);
        } else if opcode == 26 {
            for word in [7, 31 + u32::from(shape % 16), 1 << 17, u32::MAX, u32::MAX] {
                body.extend_from_slice(&word.to_le_bytes());
            }
        } else {
            for _ in 0..fields % 7 {
                body.extend_from_slice(&script.number().to_le_bytes());
            }
            if matches!(opcode, 15 | 16 | 28) {
                // handle, offset, size and flags: near the disk.
                body.resize(40, 0);
                let (offset, size) =
                    (script.number() % (DISK_BYTES as u64 + 9000), script.number() % 9000);
                body[8..16].copy_from_slice(&offset.to_le_bytes());
                body[16..24].copy_from_slice(&size.to_le_bytes());
                if opcode == 16 {
                    let less = if shape % 16 == 1 { 1 } else { 0 };
                    body.resize(
                        40 + usize::try_from(size).unwrap_or(0).saturating_sub(less),
                        shape,
                    );
                }
            }
        }
        let nodes = self.nodes.borrow();
        let node = match node {
            0..192 => nodes[usize::from(node) % nodes.len()],
            _ => script.number(),
        };
        self.unique += 2;
        self.asked.borrow_mut().insert(self.unique);
        let length = u32::try_from(HEADER_BYTES + body.len()).expect("short");
        let mut message = Vec::new();
        message.extend_from_slice(&length.to_le_bytes());
        message.extend_from_slice(&opcode.to_le_bytes());
        message.extend_from_slice(&self.unique.to_le_bytes());
        message.extend_from_slice(&node.to_le_bytes());
        message.extend_from_slice(&[0; 16]);
        message.extend_from_slice(&body);
        message
    }

    /// Reads what has been answered, and learns nodes from that.
    fn replies(&self) {
        let mut reply = vec![0; 1 << 17];
        loop {
            let length = match recv(&self.socket, &mut reply[..], RecvFlags::DONTWAIT) {
                Ok((_, length)) if length > 0 => length,
                Ok(_) | Err(Errno::AGAIN | Errno::CONNRESET) => return,
                Err(errno) => panic!("the connection: {errno}"),
            };
            assert!(length >= 16, "a reply has a header");
            let number = |at: usize| u64::from_le_bytes(reply[at..at + 8].try_into().expect("8"));
            let unique = number(8);
            // 0: it asks for what was left unanswered. Scripts of raw bytes have any number.
            if unique != 0 && unique.is_multiple_of(2) && unique <= self.unique {
                assert!(self.asked.borrow_mut().remove(&unique), "answered twice: {unique}");
            }
            let entry = 16 + 128;
            if length == entry && self.nodes.borrow().len() < 64 {
                self.nodes.borrow_mut().push(number(16));
            }
        }
    }
}

async fn play(runtime: Runtime, io: Io, input: Vec<u8>) {
    let mut script = Script(&input);
    let kind = SocketType::SEQPACKET;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
            .expect("a pair");
    let server = Server::new(&runtime, &io, Rc::new(Disks(SlowDisk::new(&runtime, DISK_BYTES))));
    let mount = server.mount(theirs).expect("a mount");
    let serving = runtime.spawn({
        let mount = mount.clone();
        async move { mount.serve().await }
    });
    let mut kernel =
        Kernel { socket: ours, asked: RefCell::default(), nodes: RefCell::new(vec![1]), unique: 0 };
    while !script.is_over() {
        kernel.step(&mut script);
        runtime.yield_now().await;
    }
    for _ in 0..16 {
        kernel.replies();
        runtime.yield_now().await;
    }
    mount.leave();
    serving.await;
    kernel.replies();
}

fuzz_target!(|input: &[u8]| {
    let input = input.to_vec();
    fuzz::reactor::run(|runtime, io| play(runtime, io, input));
});
