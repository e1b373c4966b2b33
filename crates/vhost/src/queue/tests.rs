use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;
use crate::protocol::Region;

const SIZE: u16 = 8;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT: u64 = 0x4000;
const BYTES: u64 = 0x10_0000;

/// The driver's side of a queue.
struct Driver {
    memory: Memory,
    available: u16,
}

fn layout() -> Layout {
    let addresses = RingAddresses { descriptors: DESCRIPTORS, available: AVAILABLE, used: USED };
    Layout { size: u32::from(SIZE), addresses, base: 0, event_index: false }
}

impl Driver {
    fn new() -> Self {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, BYTES).unwrap();
        let region = Region { guest: 0, bytes: BYTES, user: 0, file_offset: 0 };
        Self { memory: Memory::of(vec![(region, fd)]).unwrap(), available: 0 }
    }

    fn queue(&self) -> Queue {
        Queue::open(&layout(), &self.memory, None).unwrap()
    }

    fn descriptor(&self, table: u64, index: u64, fields: (u64, u32, u16, u16)) {
        let (address, bytes, flags, next) = fields;
        let raw = [
            &address.to_le_bytes()[..],
            &bytes.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ];
        self.memory.write(GuestAddress(table + 16 * index), &raw.concat()).unwrap();
    }

    fn write(&self, place: u64, value: u16) {
        self.memory.write(GuestAddress(place), &value.to_le_bytes()).unwrap();
    }

    fn read(&self, place: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(GuestAddress(place), &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn offer(&mut self, head: u16) {
        self.write(AVAILABLE + 4 + 2 * u64::from(self.available % SIZE), head);
        self.available = self.available.wrapping_add(1);
        self.write(AVAILABLE + 2, self.available);
    }
}

#[test]
fn chains_are_followed_also_through_an_indirect_table() {
    let mut driver = Driver::new();
    let mut queue = driver.queue();
    assert!(queue.take(&driver.memory).unwrap().is_none());
    driver.descriptor(DESCRIPTORS, 3, (0x5000, 16, FLAG_NEXT, 1));
    driver.descriptor(DESCRIPTORS, 1, (0x6000, 512, FLAG_NEXT | FLAG_WRITE, 7));
    driver.descriptor(DESCRIPTORS, 7, (0x7000, 1, FLAG_WRITE, 0));
    driver.descriptor(DESCRIPTORS, 0, (INDIRECT, 48, FLAG_INDIRECT, 0));
    driver.descriptor(INDIRECT, 0, (0x5000, 16, FLAG_NEXT, 2));
    driver.descriptor(INDIRECT, 2, (0x7000, 1, FLAG_WRITE, 9));
    driver.offer(3);
    driver.offer(0);
    let chain = queue.take(&driver.memory).unwrap().unwrap();
    assert_eq!((chain.head, chain.readable.bytes(), chain.writable.bytes()), (3, 16, 513));
    let chain = queue.take(&driver.memory).unwrap().unwrap();
    assert_eq!((chain.head, chain.readable.bytes(), chain.writable.bytes()), (0, 16, 1));
    assert!(queue.take(&driver.memory).unwrap().is_none());
    queue.put(0, 1, &driver.memory).unwrap();
    queue.put(3, 513, &driver.memory).unwrap();
    assert_eq!(driver.read(USED + 2), 2);
    let ids = [driver.read(USED + 4), driver.read(USED + 8), driver.read(USED + 12)];
    assert_eq!(ids, [0, 1, 3], "head, length, head");
    driver.offer(3);
    assert!(queue.take(&driver.memory).unwrap().is_some(), "it may come again");
    assert_eq!(queue.next_available(), 3);
}

#[test]
fn descriptors_that_make_no_sense_break_the_queue() {
    let check = |what: &str, set_up: &dyn Fn(&mut Driver)| {
        let mut driver = Driver::new();
        let mut queue = driver.queue();
        set_up(&mut driver);
        let broken = queue.take(&driver.memory);
        assert!(broken.is_err(), "{what}: {broken:?}");
    };
    check("a loop", &|driver| {
        driver.descriptor(DESCRIPTORS, 0, (0x5000, 16, FLAG_NEXT, 0));
        driver.offer(0);
    });
    check("a head outside", &|driver| driver.offer(SIZE));
    check("a next outside", &|driver| {
        driver.descriptor(DESCRIPTORS, 0, (0x5000, 16, FLAG_NEXT, SIZE));
        driver.offer(0);
    });
    check("readable after writable", &|driver| {
        driver.descriptor(DESCRIPTORS, 0, (0x5000, 16, FLAG_NEXT | FLAG_WRITE, 1));
        driver.descriptor(DESCRIPTORS, 1, (0x5000, 16, 0, 0));
        driver.offer(0);
    });
    check("tables in tables", &|driver| {
        driver.descriptor(DESCRIPTORS, 0, (INDIRECT, 16, FLAG_INDIRECT, 0));
        driver.descriptor(INDIRECT, 0, (INDIRECT, 16, FLAG_INDIRECT, 0));
        driver.offer(0);
    });
    for (address, bytes, flags) in [
        (INDIRECT, 0, FLAG_INDIRECT),
        (INDIRECT, 17, FLAG_INDIRECT),
        (INDIRECT, 16, FLAG_INDIRECT | FLAG_NEXT),
        (BYTES, 16, FLAG_INDIRECT),
        (u64::MAX - 7, 16, FLAG_INDIRECT),
    ] {
        check("a table that cannot be", &|driver| {
            driver.descriptor(DESCRIPTORS, 0, (address, bytes, flags, 0));
            driver.offer(0);
        });
    }
    check("an indirect table that is a loop", &|driver| {
        driver.descriptor(DESCRIPTORS, 0, (INDIRECT, !15, FLAG_INDIRECT, 0));
        driver.descriptor(INDIRECT, 0, (0x5000, u32::MAX, FLAG_NEXT, 0));
        driver.offer(0);
    });
    check("more than there is room for", &|driver| driver.write(AVAILABLE + 2, SIZE + 1));
}

#[test]
fn a_head_is_not_taken_while_it_is_in_flight() {
    let mut driver = Driver::new();
    let mut queue = driver.queue();
    driver.descriptor(DESCRIPTORS, 0, (0x5000, 16, 0, 0));
    driver.offer(0);
    driver.offer(0);
    assert!(queue.take(&driver.memory).unwrap().is_some());
    assert!(matches!(queue.take(&driver.memory), Err(Broken::Head(0))));
}

#[test]
fn a_queue_that_cannot_be_is_not_opened() {
    let driver = Driver::new();
    let check = |layout: Layout| {
        assert!(Queue::open(&layout, &driver.memory, None).is_err(), "{layout:?}");
    };
    for size in [0, 3, u32::from(SIZE_MAX) * 2, 1 << 16, u32::MAX] {
        check(Layout { size, ..layout() });
    }
    let addresses = layout().addresses;
    for place in [BYTES, BYTES - 8, u64::MAX, 1] {
        check(Layout { addresses: RingAddresses { descriptors: place, ..addresses }, ..layout() });
        check(Layout { addresses: RingAddresses { available: place, ..addresses }, ..layout() });
        check(Layout { addresses: RingAddresses { used: place, ..addresses }, ..layout() });
    }
}

#[test]
fn indices_wrap_around() {
    let mut driver = Driver::new();
    driver.available = u16::MAX;
    driver.write(AVAILABLE + 2, u16::MAX);
    driver.write(USED + 2, u16::MAX);
    let layout = Layout { base: u16::MAX, ..layout() };
    let mut queue = Queue::open(&layout, &driver.memory, None).unwrap();
    for head in 0..4 {
        driver.descriptor(DESCRIPTORS, u64::from(head), (0x5000, 16, 0, 0));
        driver.offer(head);
    }
    for head in 0..4 {
        assert_eq!(queue.take(&driver.memory).unwrap().unwrap().head, head);
        queue.put(head, 0, &driver.memory).unwrap();
    }
    assert!(queue.take(&driver.memory).unwrap().is_none());
    assert_eq!((driver.read(USED + 2), queue.next_available()), (3, 3));
}

#[test]
fn the_guest_is_told_when_it_wants_to() {
    let mut driver = Driver::new();
    driver.descriptor(DESCRIPTORS, 0, (0x5000, 16, 0, 0));
    let one = |driver: &mut Driver, queue: &mut Queue| {
        driver.offer(0);
        queue.take(&driver.memory).unwrap().unwrap();
        queue.put(0, 0, &driver.memory).unwrap();
        queue.should_interrupt(&driver.memory).unwrap()
    };
    let mut queue = driver.queue();
    assert!(queue.should_interrupt(&driver.memory).unwrap(), "an earlier daemon may not have");
    assert!(!queue.should_interrupt(&driver.memory).unwrap());
    assert!(one(&mut driver, &mut queue));
    driver.write(AVAILABLE, NO_INTERRUPT);
    assert!(!one(&mut driver, &mut queue));

    let layout = Layout { base: driver.available, event_index: true, ..layout() };
    let mut queue = Queue::open(&layout, &driver.memory, None).unwrap();
    assert!(queue.should_interrupt(&driver.memory).unwrap());
    let event = AVAILABLE + 4 + 2 * u64::from(SIZE);
    driver.write(event, driver.available + 1);
    assert!(!one(&mut driver, &mut queue), "not yet");
    assert!(one(&mut driver, &mut queue), "now");
    assert!(!one(&mut driver, &mut queue), "not again");
}

#[test]
fn events_are_passed_also_around_the_end() {
    assert!(is_between(5, 5, 6) && is_between(5, 3, 6) && !is_between(5, 6, 7));
    assert!(!is_between(6, 5, 6), "the event is the index before");
    assert!(is_between(u16::MAX, u16::MAX - 1, 2) && is_between(0, u16::MAX, 2));
    assert!(!is_between(3, 3, 3));
}

#[test]
fn kicks_are_refused_and_wanted_again() {
    let mut driver = Driver::new();
    driver.descriptor(DESCRIPTORS, 0, (0x5000, 16, 0, 0));
    let mut queue = driver.queue();
    queue.refuse_kicks(&driver.memory).unwrap();
    assert_eq!(driver.read(USED), NO_KICK);
    assert!(!queue.want_kicks(&driver.memory).unwrap());
    assert_eq!(driver.read(USED), 0);
    driver.offer(0);
    assert!(queue.want_kicks(&driver.memory).unwrap(), "one came before it was asked for");
    let layout = Layout { event_index: true, ..layout() };
    let mut queue = Queue::open(&layout, &driver.memory, None).unwrap();
    queue.take(&driver.memory).unwrap().unwrap();
    queue.refuse_kicks(&driver.memory).unwrap();
    assert!(!queue.want_kicks(&driver.memory).unwrap());
    assert_eq!(driver.read(USED + 4 + 8 * u64::from(SIZE)), 1, "the next entry");
}
