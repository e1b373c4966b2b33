//! An arbitrary monitor and guest: messages, rings and what they point to are of the fuzzer's choice.
//! No panic, and the attachment comes to rest.
//!
//! The input is a script. Most of them begin behind the greeting, with memory and rings that run, so
//! that the fuzzer need not find those by itself.
#![no_main]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use base::ErrorKind;
use disk::{Catalog, Disk, DiskError, Export, LocalBoxFuture};
use fuzz::script::Script;
use fuzz::slow::SlowDisk;
use libfuzzer_sys::fuzz_target;
use runtime::reactor::{Address, Channel, Io, Listener};
use runtime::{JoinHandle, Runtime};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::pwrite;
use vhost::{Config, Server};

const DISK_BYTES: usize = 1 << 20;
/// Guest memory: the rings, then headers and data.
const MEMORY_BYTES: u64 = 256 << 10;
/// Where guest memory lies in the monitor.
const USER_BASE: u64 = 0x7000_0000;
const RINGS: u64 = 2;
const RING_SIZE: u64 = 16;
/// Room for a ring: descriptors, and behind them the two other parts.
const RING_BYTES: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;

struct OneDisk(Rc<SlowDisk>);

impl Catalog for OneDisk {
    fn list(&self, _: Option<String>, _: usize) -> LocalBoxFuture<Result<Vec<Export>, DiskError>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    fn open(&self, name: &str) -> LocalBoxFuture<Result<Rc<dyn Disk>, DiskError>> {
        let disk: Rc<dyn Disk> = Rc::<SlowDisk>::clone(&self.0);
        let missing = DiskError::new(ErrorKind::NotFound, "there is no such disk");
        Box::pin(std::future::ready(if name == "d" { Ok(disk) } else { Err(missing) }))
    }
}

/// The monitor and its guest.
struct Machine {
    runtime: Runtime,
    channel: Rc<Channel>,
    memory: OwnedFd,
    log: OwnedFd,
    kicks: Vec<OwnedFd>,
    available: [u16; RINGS as usize],
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn file(bytes: u64) -> OwnedFd {
    let file = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&file, bytes).expect("its length");
    file
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

impl Machine {
    fn connect(runtime: &Runtime, io: &Io, path: &PathBuf) -> Self {
        let stream = UnixStream::connect(path).expect("it listens");
        let channel = Rc::new(Channel::adopt(io, stream.into()).expect("a channel"));
        Self {
            runtime: runtime.clone(),
            channel,
            memory: file(MEMORY_BYTES),
            log: file(4096),
            kicks: (0..RINGS).map(|_| event()).collect(),
            available: [0; RINGS as usize],
        }
    }

    /// Sends a message, unless the server does not take it any more.
    async fn send(&self, code: u32, payload: &[u8], files: &[BorrowedFd<'_>]) {
        let length = u32::try_from(payload.len()).expect("short");
        let message = [words(&[code, 1, length]), payload.to_vec()].concat();
        let _ = self.channel.send(&message, files).await;
    }

    /// Agrees on everything and lets the rings run.
    async fn greet(&self, features: u64) {
        self.send(16, &numbers(&[0x920b]), &[]).await;
        self.send(2, &numbers(&[1 << 32 | 1 << 30 | features]), &[]).await;
        let region = numbers(&[0, 0, MEMORY_BYTES, USER_BASE, 0]);
        self.send(37, &region, &[self.memory.as_fd()]).await;
        for ring in 0..RINGS {
            let index = u32::try_from(ring).expect("small");
            self.send(8, &words(&[index, RING_SIZE as u32]), &[]).await;
            let at = |part: u64| USER_BASE + ring * RING_BYTES + part;
            let places = numbers(&[at(0), at(USED), at(AVAILABLE), ring * RING_BYTES + USED]);
            self.send(9, &[words(&[index, 0]), places].concat(), &[]).await;
            let kick = self.kicks[usize::try_from(ring).expect("small")].as_fd();
            self.send(12, &numbers(&[ring]), &[kick]).await;
            self.send(18, &words(&[index, 1]), &[]).await;
        }
        self.rest(8).await;
    }

    async fn rest(&self, turns: usize) {
        for _ in 0..turns {
            self.runtime.yield_now().await;
        }
    }

    fn write(&self, place: u64, bytes: &[u8]) {
        if place + (bytes.len() as u64) < MEMORY_BYTES {
            pwrite(&self.memory, bytes, place).expect("it lies inside");
        }
    }

    async fn step(&mut self, script: &mut Script<'_>) {
        match script.byte() % 8 {
            0 => {
                let _ = self.channel.send(script.bytes(), &[]).await;
            }
            1 => self.message(script).await,
            2 => {
                let place = script.number() % MEMORY_BYTES;
                self.write(place, script.bytes());
            }
            3 => self.rest(script.byte().into()).await,
            _ => self.offer(script),
        }
    }

    /// A message with numbers near bounds, and any descriptors.
    async fn message(&self, script: &mut Script<'_>) {
        let [code, count, files, shape] = script.take();
        let mut payload = Vec::new();
        for _ in 0..count % 9 {
            match shape % 3 {
                0 => payload.extend_from_slice(&script.number().to_le_bytes()),
                1 => {
                    payload.extend_from_slice(&words(&[script.byte().into(), script.byte().into()]))
                }
                _ => payload.extend_from_slice(&numbers(&[u64::from(script.byte()) << 12])),
            }
        }
        let all = [self.memory.as_fd(), self.log.as_fd(), self.kicks[0].as_fd()];
        let chosen = &all[usize::from(files % 3)..];
        let chosen = &chosen[..chosen.len().min(usize::from(files / 64))];
        self.send(u32::from(code % 44), &payload, chosen).await;
    }

    /// A request in a ring: mostly a header, some buffers and a status, in one table or another.
    fn offer(&mut self, script: &mut Script<'_>) {
        let [choice, kind, head, count] = script.take();
        let ring = usize::from(choice) % self.available.len();
        let base = ring as u64 * RING_BYTES;
        let header = 0x8000 + u64::from(head) * 0x40;
        let sector = script.number();
        self.write(header, &[words(&[u32::from(kind % 16), 0]), numbers(&[sector])].concat());
        let indirect = choice & 0x80 != 0;
        let table = if indirect { 0x1_0000 } else { base };
        let first = if indirect { 0 } else { u64::from(head) % RING_SIZE };
        let last = u64::from(count % 6) + 1;
        for index in 0..=last {
            let (address, bytes, flags) = match index {
                0 => (header, 16, 0),
                _ if index == last => (header + 32, 1, 2),
                _ => {
                    let [flags] = script.take();
                    let bytes = u32::try_from(script.number() & 0xffff).expect("16 bits");
                    (script.number() % (MEMORY_BYTES + 4096), bytes, u16::from(flags % 16 / 2))
                }
            };
            let next = if index == last { 0 } else { 1 };
            let behind = u16::try_from((first + index + 1) % 0x1_0000).expect("16 bits");
            self.descriptor(table + 16 * (first + index), (address, bytes, flags | next, behind));
        }
        if indirect {
            let bytes = u32::try_from(16 * (last + 1)).expect("short");
            self.descriptor(base + 16 * (u64::from(head) % RING_SIZE), (table, bytes, 4, 0));
        }
        let next = self.available[ring];
        let entry = base + AVAILABLE + 4 + 2 * (u64::from(next) % RING_SIZE);
        self.write(entry, &(u16::from(head) % RING_SIZE as u16).to_le_bytes());
        self.available[ring] = next.wrapping_add(1);
        self.write(base + AVAILABLE + 2, &self.available[ring].to_le_bytes());
        let _ = rustix::io::write(&self.kicks[ring], &1u64.to_le_bytes());
    }

    fn descriptor(&self, place: u64, (address, bytes, flags, next): (u64, u32, u16, u16)) {
        let raw = [
            &address.to_le_bytes()[..],
            &bytes.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ];
        self.write(place, &raw.concat());
    }
}

/// Plays the script, and sees the attachment come to rest.
async fn play(runtime: Runtime, io: Io, input: Vec<u8>) {
    let mut script = Script(&input);
    let [shape] = script.take();
    let path = std::env::temp_dir().join(format!("plx-fuzz-{}", std::process::id()));
    let listener = Listener::bind(&io, &Address::Unix(path.clone())).expect("a socket");
    let disk = SlowDisk::new(&runtime, DISK_BYTES);
    let config = Config { drain_timeout: Duration::from_millis(5) };
    let server = Server::new(&runtime, &io, Rc::new(OneDisk(disk)), config);
    let attachment = server.attach("d".to_owned(), listener);
    let mut machine = Machine::connect(&runtime, &io, &path);
    let replies: JoinHandle<()> = runtime.spawn({
        let channel = Rc::clone(&machine.channel);
        async move {
            let mut reply = [0; 4096];
            while let Ok(1..) = channel.receive(&mut reply, &mut Vec::new()).await {}
        }
    });
    if shape & 3 != 0 {
        let event_index = u64::from(shape & 4) << 27;
        let flush = u64::from(shape & 8) << 6;
        machine.greet(event_index | flush | 1 << 28).await;
    }
    while !script.is_over() {
        machine.step(&mut script).await;
    }
    machine.rest(8).await;
    attachment.end().await;
    assert!(!attachment.is_connected());
    assert_eq!(server.metrics().connections_open, 0);
    drop(machine);
    replies.await;
}

fuzz_target!(|input: &[u8]| {
    let input = input.to_vec();
    fuzz::reactor::run(|runtime, io| play(runtime, io, input));
});
