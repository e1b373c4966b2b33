//! What was in flight when a daemon was killed is done again by the next one.

use std::os::fd::{AsFd, OwnedFd};

use disk::MemDisk;

use crate::machine::{Machine, OUT, Options};
use crate::testbed::{DISK_BYTES, run};

/// Gets a memory of what is in flight: the area's description and its descriptor.
async fn area(machine: &Machine, rings: u16, size: u16) -> (Vec<u8>, OwnedFd) {
    let mut wanted = vec![0; 24];
    wanted[16..18].copy_from_slice(&rings.to_le_bytes());
    wanted[18..20].copy_from_slice(&size.to_le_bytes());
    let (area, files) = machine.ask_for_file(31, &wanted).await;
    (area, files.into_iter().next().unwrap())
}

#[test]
fn requests_under_way_are_done_again_and_told_once() {
    run(async |bed| {
        let mut machine = Machine::connect(&bed, Options::default()).await;
        let (area, file) = area(&machine, 1, 128).await;
        machine.tell(32, &area, &[file.as_fd()]).await;
        machine.start_ring(&machine.rings[0]).await;
        bed.disk.hold();
        let mut told = Vec::new();
        for slot in 0..6 {
            machine.write(machine.data(slot), &[slot as u8 + 1; 4096]);
            machine.submit(&machine.rings[0], slot, OUT, u64::from(slot) * 8, 4096);
        }
        machine.rings[0].kick();
        bed.until(|| bed.disk.waiting() == 6).await;
        for held in [4, 1] {
            bed.disk.release(held);
            told.extend(machine.completed(&machine.rings[0]).await);
        }
        // One more, which is never seen before the connection is lost.
        machine.channel.shutdown();
        bed.until(|| !bed.disk.log.borrow().is_empty()).await;
        bed.settle().await;
        machine.submit(&machine.rings[0], 6, OUT, 48, 4096);
        // The disk goes on with what it has; the next connection waits for that.
        bed.disk.log.borrow_mut().clear();
        bed.disk.release_all();
        bed.settle().await;
        told.extend(machine.completions(&machine.rings[0]));
        assert_eq!(told, [(16, 1), (4, 1)], "nobody was told after the end");

        machine = machine.reconnect(&bed).await;
        machine.tell(32, &area, &[file.as_fd()]).await;
        // The base that a monitor finds out by itself is the used index, whatever is in flight.
        let next = machine.rings[0].next_available.replace(2);
        machine.start_ring(&machine.rings[0]).await;
        machine.rings[0].next_available.set(next);
        while told.len() < 7 {
            told.extend(machine.completed(&machine.rings[0]).await);
        }
        assert_eq!(told[2..], [(0, 1), (8, 1), (12, 1), (20, 1), (24, 1)], "in their order");
        assert_eq!(bed.disk.log.borrow().len(), 5);
        for slot in 0..7 {
            let expected = if slot == 6 { vec![0; 4096] } else { vec![slot as u8 + 1; 4096] };
            assert_eq!(bed.disk.contents(slot * 4096, 4096), expected, "{slot}");
        }
        assert_eq!(machine.stop_ring(&machine.rings[0]).await, 7);
    });
}

#[test]
fn a_ring_that_was_stopped_well_leaves_nothing_undone() {
    run(async |bed| {
        let mut machine = Machine::connect(&bed, Options::default()).await;
        let (area, file) = area(&machine, 1, 128).await;
        machine.tell(32, &area, &[file.as_fd()]).await;
        machine.start_ring(&machine.rings[0]).await;
        assert_eq!(machine.write_disk(0, &[1; 512]).await, 0);
        assert_eq!(machine.stop_ring(&machine.rings[0]).await, 1);
        // The guest starts afresh, as after a reset.
        for place in [machine.rings[0].available() + 2, machine.rings[0].used() + 2] {
            machine.write_u16(place, 0);
        }
        machine.rings[0].next_available.set(0);
        machine.rings[0].next_used.set(0);
        machine = machine.reconnect(&bed).await;
        machine.tell(32, &area, &[file.as_fd()]).await;
        machine.start_ring(&machine.rings[0]).await;
        let requests = bed.disk.log.borrow().len();
        assert_eq!(machine.write_disk(8, &[2; 512]).await, 0);
        assert_eq!(bed.disk.log.borrow().len(), requests + 1);
    });
}

#[test]
fn a_ring_without_room_for_what_is_in_flight_is_not_started() {
    run(async |bed| {
        let machine = Machine::connect(&bed, Options::default()).await;
        let (area, file) = area(&machine, 1, 64).await;
        machine.tell(32, &area, &[file.as_fd()]).await;
        let ring = &machine.rings[0];
        machine.start_ring(ring).await;
        std::rc::Rc::clone(&ring.error).wait().await.unwrap();
    });
}

/// The guest goes on with what it has cached of the other one, and what it left undone was meant for
/// that.
#[test]
fn a_running_guest_gets_nothing_of_another_disk_of_that_name() {
    run(async |bed| {
        let mut machine = Machine::connect(&bed, Options::default()).await;
        let (known, file) = area(&machine, 1, 128).await;
        machine.tell(32, &known, &[file.as_fd()]).await;
        machine.start_ring(&machine.rings[0]).await;
        machine.hold_a_write(&bed).await;
        machine.channel.shutdown();
        bed.settle().await;
        bed.disk.release_all();
        bed.settle().await;
        bed.disk.become_other(MemDisk::new(DISK_BYTES));
        bed.disk.log.borrow_mut().clear();

        machine = machine.reconnect(&bed).await;
        machine.tell(32, &known, &[file.as_fd()]).await;
        let next = machine.rings[0].next_available.replace(0);
        machine.start_ring(&machine.rings[0]).await;
        machine.rings[0].next_available.set(next);
        assert_eq!(machine.completed(&machine.rings[0]).await.len(), 1);
        assert_eq!(machine.status(&machine.rings[0], 0), 1, "what it left undone");
        assert_eq!(machine.write_disk(0, &[1; 512]).await, 1);
        assert_eq!(machine.read_disk(0, 512).await.0, 1);
        assert_eq!(*bed.disk.log.borrow(), [""; 0], "nothing reached it");

        // A reset: the monitor asks for new memory.
        machine.stop_ring(&machine.rings[0]).await;
        let (fresh, file) = area(&machine, 1, 128).await;
        machine.tell(32, &fresh, &[file.as_fd()]).await;
        machine.start_ring(&machine.rings[0]).await;
        assert_eq!(machine.write_disk(0, &[1; 512]).await, 0);
    });
}

#[test]
fn a_guest_that_is_reset_is_told_to_connect_again_for_a_disk_that_was_rolled_back() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        bed.disk.sever();
        let mut wanted = vec![0; 24];
        wanted[16..20].copy_from_slice(&[1, 0, 128, 0]);
        machine.send(31, 0, &wanted, &[]).await;
        bed.until(|| bed.server.metrics().connections_failed == 1).await;
    });
}

/// Otherwise an old write could reach the disk after a newer one of the next connection.
#[test]
fn the_next_connection_waits_for_what_the_last_one_left_under_way() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        machine.hold_a_write(&bed).await;
        drop(machine);
        let next = bed.connect();
        bed.settle().await;
        assert_eq!(bed.server.metrics().connections, 1);
        bed.disk.release_all();
        bed.until(|| bed.server.metrics().connections == 2).await;
        drop(next);
    });
}

#[test]
fn what_was_in_flight_in_a_ring_that_broke_is_not_done_again_in_the_next() {
    run(async |bed| {
        let machine = Machine::connect(&bed, Options::default()).await;
        let (area, file) = area(&machine, 1, 128).await;
        machine.tell(32, &area, &[file.as_fd()]).await;
        let ring = &machine.rings[0];
        machine.start_ring(ring).await;
        bed.disk.hold();
        machine.submit(ring, 0, OUT, 0, 512);
        ring.kick();
        bed.until(|| bed.disk.waiting() == 1).await;
        machine.write_u16(ring.available() + 2, ring.size + 9);
        ring.kick();
        bed.settle().await;
        bed.disk.release_all();
        std::rc::Rc::clone(&ring.error).wait().await.unwrap();
        // The guest resets the device.
        machine.stop_ring(ring).await;
        machine.write_u16(ring.available() + 2, 0);
        ring.next_available.set(0);
        machine.start_ring(ring).await;
        bed.settle().await;
        assert_eq!(bed.disk.log.borrow().len(), 1);
        assert_eq!(machine.write_disk(8, &[2; 512]).await, 0);
    });
}
