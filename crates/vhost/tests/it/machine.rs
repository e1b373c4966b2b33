//! A virtual machine: its monitor, which speaks vhost-user, and its driver, which speaks virtio.
//!
//! Memory is one region at guest address 0. Rings lie in its first MiB, headers and status bytes in
//! the second, data behind them.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};

use runtime::reactor::{Channel, Event};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::testbed::Bed;

pub(crate) const USER_BASE: u64 = 0x7f00_0000_0000;
pub(crate) const MEMORY_BYTES: u64 = 64 << 20;
const RING_BYTES: u64 = 0x1_0000;
const HEADERS: u64 = 1 << 20;
/// Where data of the first slot lies.
pub(crate) const DATA: u64 = 4 << 20;
/// Room for data of a slot; the first one may have more if it is alone.
pub(crate) const SLOT_BYTES: u64 = 2 << 20;

/// Feature bits.
pub(crate) const FLUSH: u64 = 1 << 9;
pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;

/// Requests of virtio-blk.
pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH_REQUEST: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

/// Flags of a descriptor.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// What a machine is made with.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    pub(crate) rings: u32,
    pub(crate) size: u16,
    pub(crate) features: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { rings: 1, size: 128, features: FLUSH }
    }
}

pub(crate) struct Ring {
    pub(crate) index: u32,
    pub(crate) size: u16,
    pub(crate) kick: OwnedFd,
    pub(crate) call: Rc<Event>,
    call_fd: OwnedFd,
    pub(crate) error: Rc<Event>,
    error_fd: OwnedFd,
    pub(crate) next_available: Cell<u16>,
    pub(crate) next_used: Cell<u16>,
}

pub(crate) struct Machine {
    pub(crate) channel: Channel,
    file: OwnedFd,
    memory: MmapRegion,
    pub(crate) rings: Vec<Ring>,
    options: Options,
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

impl Ring {
    fn new(bed: &Bed, index: u32, size: u16) -> Self {
        let pair = || {
            let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
            (Rc::new(Event::adopt(&bed.io, fd.try_clone().unwrap()).unwrap()), fd)
        };
        let ((call, call_fd), (error, error_fd)) = (pair(), pair());
        let (_, kick) = pair();
        let zero = || Cell::new(0);
        let (next_available, next_used) = (zero(), zero());
        Self { index, size, kick, call, call_fd, error, error_fd, next_available, next_used }
    }

    pub(crate) fn descriptors(&self) -> u64 {
        u64::from(self.index) * RING_BYTES
    }

    pub(crate) fn available(&self) -> u64 {
        self.descriptors() + 0x5000
    }

    pub(crate) fn used(&self) -> u64 {
        self.descriptors() + 0x8000
    }

    pub(crate) fn kick(&self) {
        rustix::io::write(&self.kick, &1u64.to_le_bytes()).unwrap();
    }
}

impl Machine {
    /// A machine that is connected and has agreed on features and given its memory.
    pub(crate) async fn connect(bed: &Bed, options: Options) -> Self {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, MEMORY_BYTES).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap().into(), 0);
        let memory = MmapRegion::from_file(offset, MEMORY_BYTES as usize).unwrap();
        let rings = (0..options.rings).map(|index| Ring::new(bed, index, options.size)).collect();
        let machine = Self { channel: bed.connect(), file, memory, rings, options };
        machine.greet().await;
        machine
    }

    /// One whose rings run.
    pub(crate) async fn start(bed: &Bed, options: Options) -> Self {
        let machine = Self::connect(bed, options).await;
        for ring in &machine.rings {
            machine.start_ring(ring).await;
        }
        machine
    }

    /// The same machine after its monitor has connected again.
    pub(crate) async fn reconnect(mut self, bed: &Bed) -> Self {
        self.channel = bed.connect();
        self.greet().await;
        self
    }

    async fn greet(&self) {
        let features = self.options.features | PROTOCOL_FEATURES | VERSION_1;
        let offered = self.ask_number(1).await;
        assert_eq!(offered & features, features, "{offered:x}");
        let protocol = self.ask_number(15).await;
        // Sent without a wish for an answer: there is none before REPLY_ACK is agreed on.
        self.send(16, 0, &numbers(&[protocol]), &[]).await;
        self.set_features(0).await;
        self.tell(3, &[], &[]).await;
        let region = numbers(&[0, 0, MEMORY_BYTES, USER_BASE, 0]);
        self.tell(37, &region, &[self.file.as_fd()]).await;
    }

    /// Agrees on the features that it was made with, and these.
    pub(crate) async fn set_features(&self, more: u64) {
        let features = self.options.features | PROTOCOL_FEATURES | VERSION_1 | more;
        self.tell(2, &numbers(&[features]), &[]).await;
    }

    /// Says where a ring lies, and whether what is written to it is logged.
    pub(crate) async fn place_ring(&self, ring: &Ring, logged: bool) {
        let at = |place: u64| USER_BASE + place;
        let places = [ring.descriptors(), ring.used(), ring.available()].map(at);
        let places = [numbers(&places), numbers(&[ring.used()])].concat();
        self.tell(9, &[words(&[ring.index, u32::from(logged)]), places].concat(), &[]).await;
    }

    /// Sets a ring up, and lets it run.
    pub(crate) async fn start_ring(&self, ring: &Ring) {
        let index = u64::from(ring.index);
        self.tell(8, &words(&[ring.index, u32::from(ring.size)]), &[]).await;
        self.tell(10, &words(&[ring.index, u32::from(ring.next_available.get())]), &[]).await;
        self.place_ring(ring, false).await;
        self.tell(14, &numbers(&[index]), &[ring.error_fd.as_fd()]).await;
        self.tell(13, &numbers(&[index]), &[ring.call_fd.as_fd()]).await;
        self.tell(12, &numbers(&[index]), &[ring.kick.as_fd()]).await;
        self.tell(18, &words(&[ring.index, 1]), &[]).await;
    }

    /// Stops a ring; the entry that comes next.
    pub(crate) async fn stop_ring(&self, ring: &Ring) -> u32 {
        let reply = self.ask(11, &words(&[ring.index, 0])).await;
        u32::from_le_bytes(reply[4..8].try_into().unwrap())
    }

    /// Takes the memory away.
    pub(crate) async fn remove_memory(&self) {
        self.tell(38, &numbers(&[0, 0, MEMORY_BYTES, USER_BASE, 0]), &[]).await;
    }

    /// Sends a message.
    pub(crate) async fn send(
        &self,
        code: u32,
        flags: u32,
        payload: &[u8],
        files: &[BorrowedFd<'_>],
    ) {
        let length = u32::try_from(payload.len()).unwrap();
        let message = [words(&[code, 1 | flags, length]), payload.to_vec()].concat();
        self.channel.send(&message, files).await.unwrap();
    }

    /// Sends a message that must succeed.
    pub(crate) async fn tell(&self, code: u32, payload: &[u8], files: &[BorrowedFd<'_>]) {
        self.send(code, 8, payload, files).await;
        let (reply, _) = self.receive(code).await;
        assert_eq!(reply, numbers(&[0]), "message {code} failed");
    }

    /// Sends a message that has a reply.
    pub(crate) async fn ask(&self, code: u32, payload: &[u8]) -> Vec<u8> {
        self.ask_for_file(code, payload).await.0
    }

    /// Sends a message whose reply may bring descriptors.
    pub(crate) async fn ask_for_file(&self, code: u32, payload: &[u8]) -> (Vec<u8>, Vec<OwnedFd>) {
        self.send(code, 0, payload, &[]).await;
        self.receive(code).await
    }

    async fn ask_number(&self, code: u32) -> u64 {
        u64::from_le_bytes(self.ask(code, &[]).await.try_into().unwrap())
    }

    pub(crate) async fn receive(&self, code: u32) -> (Vec<u8>, Vec<OwnedFd>) {
        let mut files = Vec::new();
        let mut header = [0; 12];
        self.receive_exactly(&mut header, &mut files).await;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (code, 5), "a reply to the message");
        let mut payload = vec![0; word(8) as usize];
        self.receive_exactly(&mut payload, &mut files).await;
        (payload, files)
    }

    async fn receive_exactly(&self, into: &mut [u8], files: &mut Vec<OwnedFd>) {
        let mut have = 0;
        while have < into.len() {
            let count = self.channel.receive(&mut into[have..], files).await.unwrap();
            assert_ne!(count, 0, "the server closed the connection");
            have += count;
        }
    }

    /// Waits until the server has closed the connection.
    pub(crate) async fn closed(&self) {
        let mut rest = [0; 256];
        loop {
            match self.channel.receive(&mut rest, &mut Vec::new()).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    pub(crate) fn write(&self, place: u64, bytes: &[u8]) {
        self.memory.as_volatile_slice().write_slice(bytes, place as usize).unwrap();
    }

    pub(crate) fn read(&self, place: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.as_volatile_slice().read_slice(&mut bytes, place as usize).unwrap();
        bytes
    }

    pub(crate) fn write_u16(&self, place: u64, value: u16) {
        let slice = self.memory.as_volatile_slice();
        slice.store(value, place as usize, Ordering::Release).unwrap();
    }

    pub(crate) fn read_u16(&self, place: u64) -> u16 {
        self.memory.as_volatile_slice().load(place as usize, Ordering::Acquire).unwrap()
    }

    /// Writes a descriptor into a table: address, length, flags, next.
    pub(crate) fn descriptor(&self, table: u64, index: u16, fields: (u64, u32, u16, u16)) {
        let (address, bytes, flags, next) = fields;
        let raw = [
            &address.to_le_bytes()[..],
            &bytes.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ];
        self.write(table + 16 * u64::from(index), &raw.concat());
    }

    /// Writes a chain of buffers (address, length, whether the device writes) from `head` on.
    pub(crate) fn chain(&self, table: u64, head: u16, spans: &[(u64, u32, bool)]) {
        for (index, &(address, bytes, writable)) in (head..).zip(spans) {
            let last = usize::from(index - head) + 1 == spans.len();
            let flags = if last { 0 } else { NEXT } | if writable { WRITE } else { 0 };
            self.descriptor(table, index, (address, bytes, flags, index.wrapping_add(1)));
        }
    }

    /// Makes a chain available.
    pub(crate) fn offer(&self, ring: &Ring, head: u16) {
        let next = ring.next_available.get();
        self.write_u16(ring.available() + 4 + 2 * u64::from(next % ring.size), head);
        ring.next_available.set(next.wrapping_add(1));
        self.write_u16(ring.available() + 2, next.wrapping_add(1));
        fence(Ordering::SeqCst);
    }

    /// Where the header of a slot lies; its status lies 128 bytes behind.
    pub(crate) fn header(&self, ring: &Ring, slot: u16) -> u64 {
        HEADERS + u64::from(ring.index) * 0x4000 + u64::from(slot) * 0x100
    }

    pub(crate) fn status(&self, ring: &Ring, slot: u16) -> u8 {
        self.read(self.header(ring, slot) + 128, 1)[0]
    }

    /// Where the data of a slot lies.
    pub(crate) fn data(&self, slot: u16) -> u64 {
        DATA + u64::from(slot) * SLOT_BYTES
    }

    pub(crate) fn write_header(&self, place: u64, kind: u32, sector: u64) {
        self.write(place, &[words(&[kind, 0]), numbers(&[sector])].concat());
    }

    /// Has the disk keep a write of one sector under way.
    pub(crate) async fn hold_a_write(&self, bed: &Bed) {
        bed.disk.hold();
        self.submit(&self.rings[0], 0, OUT, 0, 512);
        self.rings[0].kick();
        bed.until(|| bed.disk.waiting() == 1).await;
    }

    /// Makes a request of a slot available: its head is four times the slot. `bytes` of data lie at
    /// the slot's place; the device writes them if the request wants data.
    pub(crate) fn submit(&self, ring: &Ring, slot: u16, kind: u32, sector: u64, bytes: u32) {
        let header = self.header(ring, slot);
        self.write_header(header, kind, sector);
        self.write(header + 128, &[0xff]);
        let data = (self.data(slot), bytes, matches!(kind, IN | GET_ID));
        let spans = [(header, 16, false), data, (header + 128, 1, true)];
        let used: Vec<_> = spans.into_iter().filter(|span| span.1 > 0).collect();
        self.chain(ring.descriptors(), slot * 4, &used);
        self.offer(ring, slot * 4);
    }

    /// What has been completed since this was last asked: heads, with the bytes written.
    pub(crate) fn completions(&self, ring: &Ring) -> Vec<(u16, u32)> {
        let mut completed = Vec::new();
        while ring.next_used.get() != self.read_u16(ring.used() + 2) {
            let next = ring.next_used.get();
            let entry = self.read(ring.used() + 4 + 8 * u64::from(next % ring.size), 8);
            let head = u16::from_le_bytes(entry[..2].try_into().unwrap());
            completed.push((head, u32::from_le_bytes(entry[4..].try_into().unwrap())));
            ring.next_used.set(next.wrapping_add(1));
        }
        completed
    }

    /// Waits for completions by way of interrupts.
    pub(crate) async fn completed(&self, ring: &Ring) -> Vec<(u16, u32)> {
        loop {
            let completed = self.completions(ring);
            if !completed.is_empty() {
                return completed;
            }
            Rc::clone(&ring.call).wait().await.unwrap();
        }
    }

    /// Does one request on the first ring, and returns its status.
    pub(crate) async fn request(&self, kind: u32, sector: u64, bytes: u32) -> u8 {
        let ring = &self.rings[0];
        self.submit(ring, 0, kind, sector, bytes);
        ring.kick();
        let completed = self.completed(ring).await;
        assert_eq!(completed.len(), 1);
        self.status(ring, 0)
    }

    pub(crate) async fn write_disk(&self, sector: u64, data: &[u8]) -> u8 {
        self.write(self.data(0), data);
        self.request(OUT, sector, u32::try_from(data.len()).unwrap()).await
    }

    pub(crate) async fn read_disk(&self, sector: u64, length: usize) -> (u8, Vec<u8>) {
        let status = self.request(IN, sector, u32::try_from(length).unwrap()).await;
        (status, self.read(self.data(0), length))
    }
}
