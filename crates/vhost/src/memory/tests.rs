use std::rc::Rc;

use base::{BlockSlice, Buffer};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;

fn file(bytes: u64) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

fn region(guest: u64, bytes: u64) -> Region {
    Region { guest, bytes, user: guest + 0x7000_0000_0000, file_offset: 0 }
}

fn memory(regions: &[(u64, u64)]) -> Memory {
    let regions = regions.iter().map(|&(guest, bytes)| (region(guest, bytes), file(bytes)));
    Memory::of(regions.collect()).unwrap()
}

fn span(address: u64, bytes: u32) -> Span {
    Span { address: GuestAddress(address), bytes }
}

#[test]
fn regions_come_and_go() {
    let memory = memory(&[(0x10_0000, 0x1000), (0, 0x2000)]);
    let found = memory.guest_address(0x7000_0010_0ff0, 16);
    assert_eq!(found, Some(GuestAddress(0x10_0ff0)));
    assert_eq!(memory.guest_address(0x7000_0010_0ff0, 17), None);
    assert_eq!(memory.guest_address(u64::MAX, 2), None);
    assert!(memory.write(GuestAddress(0x1fff), &[1, 2]).is_err(), "half of it lies outside");
    let smaller = memory.without(&region(0, 0x2000)).unwrap();
    assert!(smaller.read(GuestAddress(0), &mut [0]).is_err());
    assert!(memory.read(GuestAddress(0), &mut [0]).is_ok(), "a map that is in use stays whole");
    assert!(smaller.without(&region(0, 0x2000)).is_none());
    assert!(memory.without(&region(0, 0x1000)).is_none(), "not so long");
}

#[test]
fn regions_that_make_no_sense_are_refused() {
    let memory = memory(&[(0x1000, 0x2000)]);
    let with = |region: Region, bytes| memory.with(region, file(bytes)).map(drop);
    assert!(with(region(0x8000, 0x1000), 0x1000).is_ok());
    let overlapping = with(region(0x2000, 0x1000), 0x1000);
    assert!(matches!(overlapping, Err(MapError::Overlap)), "{overlapping:?}");
    let beyond = with(region(0x8000, 0x2000), 0x1000);
    assert!(matches!(beyond, Err(MapError::File(0x2000))), "{beyond:?}");
    let shifted = Region { file_offset: 0x1000, ..region(0x8000, 0x1000) };
    assert!(with(shifted, 0x1fff).is_err());
    assert!(with(Region { file_offset: u64::MAX, ..shifted }, 0x1000).is_err());
    assert!(with(region(0x8000, 0), 0x1000).is_err());
    assert!(with(Region { guest: u64::MAX, ..region(0, 0x1000) }, 0x1000).is_err());
    assert!(with(Region { user: u64::MAX, ..region(0x8000, 0x1000) }, 0x1000).is_err());
    let device = std::fs::File::open("/dev/zero").unwrap();
    assert!(memory.with(region(0x8000, 0x1000), device.into()).is_err());
}

#[test]
fn spans_split_anywhere() {
    let all = Spans(vec![span(100, 4), span(200, 0), span(300, 4)]);
    let check = |at: u64, first: &[Span], second: &[Span]| {
        let mut head = all.clone();
        let tail = head.split_off(at);
        assert_eq!((head.0.as_slice(), tail.0.as_slice()), (first, second), "{at}");
    };
    check(0, &[span(100, 0)], &[span(100, 4), span(200, 0), span(300, 4)]);
    check(3, &[span(100, 3)], &[span(103, 1), span(200, 0), span(300, 4)]);
    check(4, &[span(100, 4), span(200, 0), span(300, 0)], &[span(300, 4)]);
    check(7, &[span(100, 4), span(200, 0), span(300, 3)], &[span(303, 1)]);
    check(8, &all.0, &[]);
    check(u64::MAX, &all.0, &[]);
}

#[test]
fn data_goes_where_the_spans_lie() {
    let memory = memory(&[(0, 0x4000)]);
    let block: Vec<u8> = (0..=255).cycle().take(4096).collect();
    let slice = BlockSlice::whole(Rc::new(Buffer::from_bytes(&block)));
    memory.write(GuestAddress(0x2000), &[9; 0x1800]).unwrap();
    let data = [
        ReadSegment::Bytes(slice.clone(), 10..13),
        ReadSegment::Zeroes(5000),
        ReadSegment::Bytes(slice, 100..110),
    ];
    let spans = Spans(vec![span(0x1000, 2), span(0x2000, 0), span(0x2000, 5005), span(0, 100)]);
    spans.fill(&memory, &data).unwrap();
    let mut expected = block[10..13].to_vec();
    expected.resize(5003, 0);
    expected.extend(&block[100..110]);
    let mut seen = vec![0; 5013];
    spans.copy_to(&memory, &mut seen).unwrap();
    assert_eq!(seen, expected);
    let outside = Spans(vec![span(0x3fff, 2)]);
    assert!(outside.fill(&memory, &[ReadSegment::Zeroes(2)]).is_err());
    assert!(outside.copy_to(&memory, &mut [0; 2]).is_err());
    let nowhere = Spans(vec![span(u64::MAX, 4)]);
    assert!(nowhere.fill(&memory, &[ReadSegment::Zeroes(4)]).is_err());
}
