//! What a driver that plays by the rules gets: the set that every frontend's clients get.

use base::ErrorKind;
use disk::MemDisk;
use runtime::reactor::EngineChoice;

use crate::machine::{
    DATA, DISCARD, EVENT_IDX, FLUSH, FLUSH_REQUEST, GET_ID, IN, INDIRECT, Machine, OUT, Options,
    SLOT_BYTES, WRITE_ZEROES,
};
use crate::testbed::{DISK_BYTES, run, run_on};

/// Bytes that tell their place.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let byte = |place: u64| ((place * 7 + place / 251 + seed * 13) % 256) as u8;
    (0..length as u64).map(byte).collect()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn what_was_written_is_read_at_every_size_and_alignment() {
    for choice in [EngineChoice::Auto, EngineChoice::ThreadPool] {
        run_on(choice, async |bed| {
            let machine = Machine::start(&bed, Options::default()).await;
            let lengths = [512, 1024, 4096, 4608, 65_536, 1 << 20, (1 << 20) + 1536, 3 << 20];
            for (index, length) in (0u64..).zip(lengths) {
                for sector in [0, 1, 7, 8, 25] {
                    let data = pattern(index * 100 + sector, length);
                    assert_eq!(machine.write_disk(sector, &data).await, 0);
                    assert_eq!(bed.disk.contents(sector * 512, length), data);
                    machine.write(DATA, &vec![0xee; length]);
                    let (status, read) = machine.read_disk(sector, length).await;
                    assert!(status == 0 && read == data, "{length} bytes at sector {sector}");
                }
            }
            let metrics = bed.server.metrics();
            assert_eq!((metrics.reads, metrics.writes, metrics.requests_failed), (40, 40, 0));
            assert_eq!(metrics.read_bytes, metrics.written_bytes);
        });
    }
}

#[test]
fn where_buffers_end_means_nothing() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let ring = &machine.rings[0];
        let data = pattern(1, 1024);
        // Header and data of a write in one buffer after a half header; nothing but a status.
        machine.write_header(0x20_0000, OUT, 3);
        machine.write(0x20_0010, &data);
        let spans = [
            (0x20_0000, 5, false),
            (0x20_0005, 0, false),
            (0x20_0005, 11 + 1000, false),
            (0x20_0005 + 1011, 24, false),
            (0x30_0000, 1, true),
        ];
        machine.chain(ring.descriptors(), 40, &spans);
        machine.offer(ring, 40);
        ring.kick();
        assert_eq!(machine.completed(ring).await, [(40, 1)]);
        assert_eq!(bed.disk.contents(3 * 512, 1024), data);
        // Data of a read and its status in one buffer, behind a part of the data.
        machine.write_header(0x20_0000, IN, 3);
        machine.write(0x30_0000, &[9; 2048]);
        let spans = [(0x20_0000, 16, false), (0x30_0000, 100, true), (0x30_0064, 925, true)];
        machine.chain(ring.descriptors(), 50, &spans);
        machine.offer(ring, 50);
        ring.kick();
        assert_eq!(machine.completed(ring).await, [(50, 1025)]);
        assert_eq!(machine.read(0x30_0000, 1026), [&data[..], &[0, 9]].concat());
    });
}

#[test]
fn descriptors_may_lie_in_a_table_of_their_own() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let ring = &machine.rings[0];
        machine.write_header(0x20_0000, OUT, 0);
        let pieces = (0..126u64).map(|piece| (DATA + piece * 8192, 4096, false));
        let ends = [(0x20_0000, 16, false), (0x20_0100, 1, true)];
        let spans: Vec<_> = ends[..1].iter().copied().chain(pieces).chain([ends[1]]).collect();
        let mut expected = Vec::new();
        for piece in 0..126 {
            let data = pattern(piece, 4096);
            machine.write(DATA + piece * 8192, &data);
            expected.extend(data);
        }
        machine.chain(0x30_0000, 0, &spans);
        let table = 16 * u32::try_from(spans.len()).unwrap();
        machine.descriptor(ring.descriptors(), 9, (0x30_0000, table, INDIRECT, 0));
        machine.offer(ring, 9);
        ring.kick();
        assert_eq!(machine.completed(ring).await, [(9, 1)]);
        assert_eq!(bed.disk.contents(0, expected.len()), expected);
    });
}

#[test]
fn the_largest_request_is_served_and_a_larger_one_refused() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let largest = 126 * (256 << 10);
        let data = pattern(3, largest);
        assert_eq!(machine.write_disk(8, &data).await, 0);
        assert_eq!(machine.read_disk(8, largest).await, (0, data));
        assert_eq!(machine.request(IN, 0, largest as u32 + 512).await, 1);
        assert_eq!(machine.request(OUT, 0, largest as u32 + 512).await, 1);
    });
}

#[test]
fn errors_have_their_status() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let end = (DISK_BYTES / 512) as u64;
        assert_eq!(machine.request(IN, end - 1, 512).await, 0);
        for (kind, sector, bytes) in
            [(IN, end, 512), (OUT, end - 1, 1024), (IN, u64::MAX, 512), (OUT, u64::MAX / 512, 512)]
        {
            assert_eq!(machine.request(kind, sector, bytes).await, 1, "{kind} {sector} {bytes}");
        }
        assert_eq!(machine.request(IN, 0, 511).await, 1, "no whole sectors");
        assert_eq!(machine.request(OUT, 0, 513).await, 1, "no whole sectors");
        for unknown in [2, 3, 5, 10, 14, 99, u32::MAX] {
            assert_eq!(machine.request(unknown, 0, 512).await, 2, "{unknown}");
        }
        for kind in [ErrorKind::Io, ErrorKind::Corrupt, ErrorKind::NoSpace] {
            bed.disk.failure.set(Some(kind));
            assert_eq!(machine.write_disk(0, &[1; 512]).await, 1, "{kind:?}");
            assert_eq!(machine.request(FLUSH_REQUEST, 0, 0).await, 1, "{kind:?}");
        }
        bed.disk.failure.set(None);
        assert_eq!(machine.write_disk(0, &[1; 512]).await, 0);
        bed.disk.sever();
        assert_eq!(machine.request(IN, 0, 512).await, 1);
        assert_eq!(machine.request(FLUSH_REQUEST, 0, 0).await, 1);
        assert!(bed.attachment.is_connected(), "only its requests fail");
    });
}

#[test]
fn a_snapshot_can_only_be_read() {
    run(async |bed| {
        bed.disk.become_other(MemDisk::read_only(vec![7; 1 << 20]));
        let machine = Machine::start(&bed, Options::default()).await;
        assert_eq!(machine.read_disk(0, 512).await, (0, vec![7; 512]));
        assert_eq!(machine.write_disk(0, &[1; 512]).await, 1);
        machine.write(DATA, &range(0, 8, 0));
        assert_eq!(machine.request(DISCARD, 0, 16).await, 1);
        assert_eq!(machine.request(FLUSH_REQUEST, 0, 0).await, 0);
        let range = [&[0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0][..], &[0; 8]].concat();
        let config = machine.ask(24, &range).await;
        assert_eq!(config[12..], 2048u64.to_le_bytes());
    });
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let filled = vec![5; 64 << 10];
        assert_eq!(machine.write_disk(0, &filled).await, 0);
        let request = async |kind, ranges: &[Vec<u8>]| {
            let bytes = ranges.concat();
            machine.write(DATA, &bytes);
            machine.request(kind, 0, bytes.len() as u32).await
        };
        assert_eq!(request(DISCARD, &[range(8, 8, 0), range(24, 1, 0)]).await, 0);
        assert_eq!(request(WRITE_ZEROES, &[range(32, 8, 0)]).await, 0);
        assert_eq!(request(WRITE_ZEROES, &[range(48, 8, 1)]).await, 0);
        let mut expected = filled;
        for sectors in [8..16, 24..25, 32..40, 48..56] {
            expected[sectors.start * 512..sectors.end * 512].fill(0);
        }
        assert_eq!(bed.disk.contents(0, 64 << 10), expected);
        let log = bed.disk.log.borrow().join("\n");
        assert!(log.contains("length: 4096, fua: false, no_hole: true"), "{log}");
        assert!(log.contains("length: 4096, fua: false, no_hole: false"), "{log}");

        assert_eq!(request(DISCARD, &[range(0, 8, 1)]).await, 2, "a discard unmaps anyway");
        assert_eq!(request(WRITE_ZEROES, &[range(0, 8, 2)]).await, 2, "an unknown flag");
        assert_eq!(request(DISCARD, &[range(u64::MAX, 8, 0)]).await, 1);
        assert_eq!(request(DISCARD, &[range(0, u32::MAX, 0)]).await, 1);
        assert_eq!(request(DISCARD, &vec![range(0, 8, 0); 17]).await, 1, "too many");
        assert_eq!(request(DISCARD, &[]).await, 1);
        assert_eq!(request(DISCARD, &[vec![0; 15]]).await, 1);
        assert_eq!(bed.disk.contents(0, 64 << 10), expected, "nothing of those was done");
    });
}

#[test]
fn the_serial_number_is_the_disks() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        assert_eq!(machine.request(GET_ID, 0, 20).await, 0);
        assert_eq!(machine.read(DATA, 20), b"plx-0000000000000007");
        machine.write(DATA, &[9; 32]);
        assert_eq!(machine.request(GET_ID, 0, 4).await, 0);
        assert_eq!(machine.read(DATA, 6), b"plx-\x09\x09");
    });
}

#[test]
fn writes_are_durable_for_a_guest_that_does_not_flush() {
    run(async |bed| {
        let options = Options { features: 0, ..Options::default() };
        let machine = Machine::start(&bed, options).await;
        assert_eq!(machine.write_disk(0, &[1; 512]).await, 0);
        assert!(bed.disk.log.borrow()[0].contains("fua: true"), "{:?}", bed.disk.log);
    });
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        assert_eq!(machine.write_disk(0, &[1; 512]).await, 0);
        assert_eq!(machine.request(FLUSH_REQUEST, 0, 0).await, 0);
        let log = bed.disk.log.borrow();
        assert!(log[0].contains("fua: false") && log[1] == "Flush", "{log:?}");
    });
}

#[test]
fn requests_are_completed_in_the_order_of_the_disk() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let ring = &machine.rings[0];
        bed.disk.hold();
        for slot in 0..4 {
            machine.write(machine.data(slot), &[slot as u8; 4096]);
            machine.submit(ring, slot, OUT, u64::from(slot) * 8, 4096);
        }
        ring.kick();
        bed.until(|| bed.disk.waiting() == 4).await;
        // The data was copied: what a guest changes under way changes nothing (design rule 14).
        machine.write(machine.data(2), &[99; 4096]);
        bed.disk.release(2);
        assert_eq!(machine.completed(ring).await, [(8, 1)]);
        assert_eq!(bed.disk.contents(2 * 4096, 4096), vec![2; 4096]);
        bed.disk.release_all();
        let mut rest = Vec::new();
        while rest.len() < 3 {
            rest.extend(machine.completed(ring).await);
        }
        assert_eq!(rest, [(0, 1), (4, 1), (12, 1)]);
    });
}

#[test]
fn rings_are_served_side_by_side() {
    run(async |bed| {
        let options = Options { rings: 4, features: FLUSH | EVENT_IDX, ..Options::default() };
        let machine = Machine::start(&bed, options).await;
        // With an event index of 0 each first completion interrupts; later ones are looked for.
        for round in 0..50u64 {
            for ring in &machine.rings {
                let slot = ring.index as u16;
                let sector = u64::from(ring.index) * 1000 + round * 8;
                machine.write(machine.data(slot), &pattern(sector, 4096));
                machine.submit(ring, slot, OUT, sector, 4096);
                let event = ring.available() + 4 + 2 * u64::from(ring.size);
                machine.write_u16(event, ring.next_used.get());
                ring.kick();
            }
            for ring in &machine.rings {
                assert_eq!(machine.completed(ring).await.len(), 1);
                assert_eq!(machine.status(ring, ring.index as u16), 0);
            }
        }
        for ring in &machine.rings {
            for round in 0..50 {
                let sector = u64::from(ring.index) * 1000 + round * 8;
                assert_eq!(bed.disk.contents(sector * 512, 4096), pattern(sector, 4096));
            }
        }
        assert!(bed.server.metrics().interrupts >= 200);
    });
}

#[test]
fn a_guest_can_make_this_side_hold_so_much_and_no_more() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let ring = &machine.rings[0];
        bed.disk.hold();
        for slot in 0..24 {
            machine.submit(ring, slot, OUT, u64::from(slot) * 8, SLOT_BYTES as u32);
        }
        ring.kick();
        // They are taken in rounds.
        while bed.disk.waiting() < 30 {
            bed.settle().await;
        }
        bed.settle().await;
        // Each is two requests of the disk: 15 of 2 MiB and where they lie fit into 32 MiB.
        assert_eq!(bed.disk.waiting(), 30);
        bed.disk.release_all();
        let mut completed = 0;
        while completed < 24 {
            completed += machine.completed(ring).await.len();
        }
    });
}

#[test]
fn a_ring_that_is_stopped_finishes_what_it_took_and_goes_on_there() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        let ring = &machine.rings[0];
        bed.disk.hold();
        machine.submit(ring, 0, OUT, 0, 512);
        machine.submit(ring, 1, OUT, 1, 512);
        ring.kick();
        bed.until(|| bed.disk.waiting() == 2).await;
        let release = async {
            bed.settle().await;
            machine.submit(ring, 2, OUT, 2, 512);
            ring.kick();
            bed.settle().await;
            assert_eq!(bed.disk.waiting(), 2, "no more is taken");
            bed.disk.release_all();
        };
        let mut release = Box::pin(release);
        let mut stop = Box::pin(machine.stop_ring(ring));
        let mut base = None;
        let mut released = false;
        std::future::poll_fn(|context| {
            released = released || release.as_mut().poll(context).is_ready();
            if base.is_none()
                && let std::task::Poll::Ready(found) = stop.as_mut().poll(context)
            {
                base = Some(found);
            }
            if base.is_some() && released {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        })
        .await;
        assert_eq!(base, Some(2));
        assert_eq!(machine.completions(ring).len(), 2);
        let next = ring.next_available.replace(2);
        machine.start_ring(ring).await;
        ring.next_available.set(next);
        assert_eq!(machine.completed(ring).await, [(8, 1)]);
    });
}
