use std::os::fd::OwnedFd;

use super::*;

/// A descriptor of no consequence.
fn file() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

fn files(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| file()).collect()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn header(code: u32, flags: u32, bytes: u32) -> [u8; HEADER_BYTES] {
    words(&[code, flags, bytes]).try_into().unwrap()
}

#[test]
fn headers_decode_and_what_is_no_request_is_refused() {
    let request = |need_reply| Header { code: 5, need_reply, payload_bytes: 40 };
    assert_eq!(Header::decode(&header(5, 1, 40)), Ok(request(false)));
    assert_eq!(Header::decode(&header(5, 9, 40)), Ok(request(true)));
    for flags in [0, 2, 3, 1 | 4] {
        assert_eq!(Header::decode(&header(5, flags, 40)), Err(Malformed::Header), "{flags}");
    }
    assert_eq!(Header::decode(&header(5, 1, 1025)), Err(Malformed::TooLong(1025)));
    assert_eq!(Header::decode(&header(5, 1, u32::MAX)), Err(Malformed::TooLong(u32::MAX)));
}

#[test]
fn messages_of_this_side_have_their_headers() {
    assert_eq!(reply(1, &7u64.to_le_bytes()), [words(&[1, 5, 8]), numbers(&[7])].concat());
    assert_eq!(config_changed(), words(&[2, 1, 0]));
    assert_eq!(ring_state(3, 77), words(&[3, 77]));
    let area = InflightArea { bytes: 4096, file_offset: 1, rings: 2, ring_size: 128 };
    let encoded = area.encode();
    assert_eq!(encoded.len(), 24, "as long as QEMU expects it");
    match Request::decode(31, &encoded, Vec::new()) {
        Ok(Request::GetInflight(decoded)) => assert_eq!(decoded, area),
        other => panic!("{other:?}"),
    }
    let range = ConfigRange { offset: 1, bytes: 2, flags: 0 };
    assert_eq!(range.encode(&[8, 9]), [words(&[1, 2, 0]), vec![8, 9]].concat());
}

#[test]
fn requests_decode() {
    let check = |code: u32, payload: &[u8], file_count: usize, expected: &str| {
        let request = Request::decode(code, payload, files(file_count)).unwrap();
        let shown = format!("{request:?}");
        assert!(shown.starts_with(expected), "{shown} is not {expected}");
    };
    check(1, &[], 0, "GetFeatures");
    check(2, &numbers(&[5]), 0, "SetFeatures(5)");
    check(3, &[], 0, "Owner");
    let region = [0x1000, 0x2000, 0x7000_0000, 0x3000];
    let one = [words(&[1, 0]), numbers(&region)].concat();
    let shown = "Region { guest: 4096, bytes: 8192, user: 1879048192, file_offset: 12288 }";
    check(5, &one, 1, &format!("SetMemory([({shown}, "));
    check(8, &words(&[1, 256]), 0, "SetRingSize(1, 256)");
    let addresses = [words(&[2, 0]), numbers(&[16, 32, 64, 0])].concat();
    let parts = "RingAddresses { descriptors: 16, available: 64, used: 32 }";
    check(9, &addresses, 0, &format!("SetRingAddresses(2, {parts})"));
    check(10, &words(&[1, 9]), 0, "SetRingBase(1, 9)");
    check(11, &words(&[1, 0]), 0, "GetRingBase(1)");
    check(12, &numbers(&[3]), 1, "SetKick(3, Some");
    check(13, &numbers(&[3 | 1 << 8]), 0, "SetCall(3, None)");
    check(18, &words(&[1, 1]), 0, "SetRingEnabled(1, true)");
    check(24, &[words(&[0, 4, 0]), vec![0; 4]].concat(), 0, "GetConfig");
    check(25, &[words(&[0, 4, 0]), vec![0; 4]].concat(), 0, "SetConfig");
    check(37, &[numbers(&[0]), numbers(&region)].concat(), 1, &format!("AddRegion({shown}, "));
    check(38, &[numbers(&[0]), numbers(&region)].concat(), 0, &format!("RemoveRegion({shown})"));
    check(38, &[numbers(&[0]), numbers(&region)].concat(), 1, "RemoveRegion");
}

#[test]
fn what_does_not_fit_is_refused() {
    let check = |code: u32, payload: &[u8], file_count: usize| {
        let refused = Request::decode(code, payload, files(file_count));
        assert!(refused.is_err(), "{refused:?}");
    };
    for code in [0, 6, 7, 19, 20, 22, 23, 26, 30, 33, 34, 39, 40, 41, u32::MAX] {
        check(code, &[], 0);
    }
    // A descriptor too many, too few; a payload too long, too short.
    check(1, &[], 1);
    check(1, &[0], 0);
    check(2, &[0; 7], 0);
    check(12, &numbers(&[3]), 0);
    check(12, &numbers(&[3 | 1 << 8]), 1);
    check(21, &[], 0);
    check(5, &[words(&[2, 0]), numbers(&[0; 8])].concat(), 1);
    check(5, &[words(&[u32::MAX, 0]), numbers(&[0; 4])].concat(), 1);
    check(5, &[words(&[9, 0]), numbers(&[0; 36])].concat(), 9);
    check(24, &[words(&[0, 5, 0]), vec![0; 4]].concat(), 0);
    check(24, &[words(&[0, 257, 0]), vec![0; 257]].concat(), 0);
    check(37, &[numbers(&[0]), numbers(&[0; 4])].concat(), 0);
}
