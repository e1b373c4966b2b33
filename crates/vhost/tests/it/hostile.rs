//! Guests and monitors that do not play by the rules lose their own disk at most.

use std::os::fd::AsFd;
use std::rc::Rc;

use crate::machine::{
    DATA, FLUSH, IN, INDIRECT, MEMORY_BYTES, Machine, NEXT, OUT, Options, USER_BASE, WRITE,
};
use crate::testbed::{Bed, run};

/// Whether a well-behaved machine is served.
async fn still_serves(bed: &Bed) {
    let machine = Machine::start(bed, Options::default()).await;
    assert_eq!(machine.write_disk(8, &[7; 4096]).await, 0);
    assert_eq!(machine.read_disk(8, 4096).await, (0, vec![7; 4096]));
}

#[test]
fn a_broken_ring_ends_alone_and_can_be_set_up_anew() {
    run(async |bed| {
        let options = Options { rings: 2, ..Options::default() };
        let machine = Machine::start(&bed, options).await;
        let (good, bad) = (&machine.rings[0], &machine.rings[1]);
        machine.write_u16(bad.available() + 2, bad.size + 1);
        bad.kick();
        Rc::clone(&bad.error).wait().await.unwrap();
        assert_eq!(bed.server.metrics().rings_broken, 1);
        assert_eq!(machine.write_disk(0, &[3; 512]).await, 0);
        assert!(good.next_used.get() > 0, "the other one is served");

        machine.stop_ring(bad).await;
        machine.write_u16(bad.available() + 2, 0);
        bad.next_available.set(0);
        machine.start_ring(bad).await;
        machine.submit(bad, 0, IN, 0, 512);
        bad.kick();
        assert_eq!(machine.completed(bad).await, [(0, 513)]);
    });
}

#[test]
fn requests_that_cannot_be_answered_break_the_ring() {
    let check = |spans: &'static [(u64, u32, bool)]| {
        run(async move |bed| {
            let machine = Machine::start(&bed, Options::default()).await;
            let ring = &machine.rings[0];
            machine.write_header(0x20_0000, IN, 0);
            machine.chain(ring.descriptors(), 0, spans);
            machine.offer(ring, 0);
            ring.kick();
            Rc::clone(&ring.error).wait().await.unwrap();
            drop(machine);
            still_serves(&bed).await;
        });
    };
    check(&[(0x20_0000, 16, false)]);
    check(&[(0x20_0000, 16, false), (DATA, 0, true)]);
    check(&[(0x20_0000, 15, false), (DATA, 513, true)]);
    check(&[(DATA, 513, true)]);
    check(&[(MEMORY_BYTES, 16, false), (DATA, 513, true)]);
    check(&[(0x20_0000, 16, false), (MEMORY_BYTES, 1, true)]);
    check(&[(0x20_0000, 16, false), (u64::MAX, 1, true)]);
}

#[test]
fn data_outside_of_memory_is_an_error_of_that_request() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let ring = &machine.rings[0];
        for (kind, address) in
            [(OUT, MEMORY_BYTES), (IN, MEMORY_BYTES), (OUT, MEMORY_BYTES - 100), (IN, u64::MAX - 1)]
        {
            machine.write_header(0x20_0000, kind, 0);
            let spans = [(0x20_0000, 16, false), (address, 512, kind == IN), (0x20_0100, 1, true)];
            machine.chain(ring.descriptors(), 0, &spans);
            machine.offer(ring, 0);
            ring.kick();
            assert_eq!(machine.completed(ring).await.len(), 1);
            assert_eq!(machine.read(0x20_0100, 1), [1], "{kind} {address:x}");
        }
        assert_eq!(machine.write_disk(0, &[3; 512]).await, 0);
    });
}

#[test]
fn memory_may_vanish_under_requests() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let ring = &machine.rings[0];
        bed.disk.hold();
        machine.submit(ring, 0, IN, 0, 4096);
        ring.kick();
        bed.until(|| bed.disk.waiting() == 1).await;
        machine.remove_memory().await;
        bed.disk.release_all();
        Rc::clone(&ring.error).wait().await.unwrap();
        assert_eq!(machine.completions(ring), []);
        drop(machine);
        still_serves(&bed).await;
    });
}

#[test]
fn messages_that_make_no_sense_end_the_connection() {
    let check = |code: u32, payload: Vec<u8>, with_file: bool| {
        run(async move |bed| {
            let machine = Machine::connect(&bed, Options::default()).await;
            let file = std::fs::File::open("/dev/null").unwrap();
            let files = [file.as_fd()];
            machine.send(code, 0, &payload, if with_file { &files } else { &[] }).await;
            machine.closed().await;
            bed.until(|| bed.server.metrics().connections_failed == 1).await;
            drop(machine);
            still_serves(&bed).await;
        });
    };
    let numbers = |numbers: &[u64]| -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    };
    // A code that there is not.
    check(77, vec![], false);
    // A payload too short.
    check(2, vec![1], false);
    // Features that were not offered.
    check(2, numbers(&[u64::MAX]), false);
    // Protocol features that were not offered.
    check(16, numbers(&[u64::MAX]), false);
    // A ring that there is not.
    check(11, numbers(&[200]), false);
    // A kick that is no eventfd.
    check(12, numbers(&[0]), true);
    // A ring without kicks.
    check(12, numbers(&[1 << 8]), false);
    // Memory that is no file.
    check(37, numbers(&[0, 1 << 30, 4096, 1 << 30, 0]), true);
    // Memory that is not there.
    check(38, numbers(&[0, 0, 4096, 0, 0]), false);
    // A channel that is no socket.
    check(21, vec![], true);
    // Too much in flight.
    check(31, numbers(&[0, 0, 0xffff_ffff]), false);
}

#[test]
fn a_running_ring_stays_where_it_is() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        machine.send(8, 0, &[0, 0, 0, 0, 8, 0, 0, 0], &[]).await;
        machine.closed().await;
        drop(machine);
        still_serves(&bed).await;
    });
}

#[test]
fn rings_that_lie_nowhere_are_not_started() {
    run(async |bed| {
        let machine = Machine::connect(&bed, Options::default()).await;
        let ring = &machine.rings[0];
        machine.start_ring(ring).await;
        machine.stop_ring(ring).await;
        for place in [0, USER_BASE - 4096, USER_BASE + MEMORY_BYTES, USER_BASE + 8, !15] {
            let places: Vec<u8> =
                [0, place, place, place, 0].iter().flat_map(|it: &u64| it.to_le_bytes()).collect();
            machine.tell(9, &places, &[]).await;
            machine.tell(12, &[0; 8], &[ring.kick.as_fd()]).await;
            Rc::clone(&ring.error).wait().await.unwrap();
        }
        drop(machine);
        still_serves(&bed).await;
    });
}

/// xorshift: the same rubbish every time.
struct Rubbish(u64);

impl Rubbish {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number that is often one of those that hurt.
    fn address(&mut self) -> u64 {
        match self.next() % 8 {
            0 => self.next(),
            1 => MEMORY_BYTES - self.next() % 64,
            2 => self.next() % 0x1_0000,
            3 => u64::MAX - self.next() % 64,
            _ => DATA + self.next() % (1 << 20),
        }
    }

    fn length(&mut self) -> u32 {
        match self.next() % 6 {
            0 => self.next() as u32,
            1 => 0,
            2 => 16 * (self.next() % 300) as u32,
            3 => 1,
            _ => 512 * (self.next() % 16) as u32,
        }
    }
}

#[test]
fn rubbish_in_rings_hurts_nobody_else() {
    run(async |bed| {
        let mut rubbish = Rubbish(0x2545_f491_4f6c_dd1d);
        for _ in 0..60 {
            let options = Options { size: 16, features: FLUSH, ..Options::default() };
            let machine = Machine::start(&bed, options).await;
            let ring = &machine.rings[0];
            for _ in 0..20 {
                for index in 0..16 {
                    let flags = (rubbish.next() as u16) & (NEXT | WRITE | INDIRECT);
                    let flags =
                        if rubbish.next().is_multiple_of(4) { flags } else { flags & !INDIRECT };
                    let next = (rubbish.next() % 18) as u16;
                    let fields = (rubbish.address(), rubbish.length(), flags, next);
                    machine.descriptor(ring.descriptors(), index, fields);
                    machine.descriptor(DATA, index, fields);
                }
                let place = DATA + rubbish.next() % 4096;
                machine.write_header(place, (rubbish.next() % 16) as u32, rubbish.next() % 99_999);
                // A chain that starts well.
                machine.descriptor(ring.descriptors(), 0, (place, 16, NEXT, 1));
                machine.offer(ring, (rubbish.next() % 17) as u16);
                ring.kick();
                bed.runtime.yield_now().await;
                if rubbish.next().is_multiple_of(8) {
                    machine.write_u16(ring.available() + 2, rubbish.next() as u16);
                }
            }
            bed.runtime.sleep(std::time::Duration::from_millis(1)).await;
        }
        assert!(bed.server.metrics().rings_broken > 0);
        still_serves(&bed).await;
    });
}

#[test]
fn rubbish_instead_of_messages_hurts_nobody_else() {
    run(async |bed| {
        let mut rubbish = Rubbish(0x9e37_79b9_7f4a_7c15);
        for _ in 0..300 {
            let channel = bed.connect();
            for _ in 0..rubbish.next() % 4 {
                let length = (rubbish.next() % 300) as usize;
                let mut message: Vec<u8> = (0..length).map(|_| rubbish.next() as u8).collect();
                let code = (rubbish.next() % 45) as u32;
                let payload = (length.saturating_sub(12)) as u32;
                let header: Vec<u8> =
                    [code, 9, payload].iter().flat_map(|word| word.to_le_bytes()).collect();
                let count = length.min(12);
                message[..count].copy_from_slice(&header[..count]);
                if channel.send(&message, &[]).await.is_err() {
                    break;
                }
            }
        }
        still_serves(&bed).await;
    });
}
