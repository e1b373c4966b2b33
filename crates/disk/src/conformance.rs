//! What every frontend's clients get: one suite, which the tests of each frontend run through a client of
//! its protocol, against a [`GateDisk`].
//!
//! It fails by panicking, as tests do. What differs between protocols, such as what a client may ask for
//! at the end of a disk, is in the frontends' own tests, and so is what is under way together.

use std::pin::Pin;

use base::ErrorKind;

use crate::{GateDisk, MemDisk};

/// What a client is told: whether it was done, and no more, as protocols differ in what they tell.
pub type Done<'a, T> = Pin<Box<dyn Future<Output = Option<T>> + 'a>>;

/// A client of a frontend that has a disk open.
pub trait Client {
    /// Offsets and lengths are multiples of this.
    fn grain(&self) -> u64;

    /// Reads so many bytes.
    fn read(&mut self, offset: u64, length: usize) -> Done<'_, Vec<u8>>;

    /// Writes.
    fn write(&mut self, offset: u64, bytes: Vec<u8>) -> Done<'_, ()>;

    /// Makes durable what was written.
    fn flush(&mut self) -> Done<'_, ()>;

    /// Forgets a range.
    fn discard(&mut self, offset: u64, length: u64) -> Done<'_, ()>;

    /// Zeroes a range.
    fn zero(&mut self, offset: u64, length: u64) -> Done<'_, ()>;

    /// The size of the disk, as the client knows it.
    fn size(&mut self) -> Done<'_, u64>;
}

/// Least size of the disk.
pub const DISK_BYTES_MIN: usize = 8 << 20;

/// Runs the suite on a disk of zeroes.
pub async fn run(client: &mut impl Client, disk: &GateDisk) {
    sizes_and_alignments(client, disk).await;
    ends(client, disk).await;
    ranges(client, disk).await;
    durability(client, disk).await;
    failures(client, disk).await;
}

/// Runs the suite for what can only be read: a disk that is full of sevens.
pub async fn run_read_only(client: &mut impl Client, disk: &GateDisk) {
    let grain = client.grain();
    assert_eq!(client.read(grain, 4096).await, Some(vec![7; 4096]));
    assert_eq!(client.write(0, vec![1; 4096]).await, None, "it was written");
    assert_eq!(client.discard(0, 4096).await, None, "it was discarded");
    assert_eq!(client.zero(0, 4096).await, None, "it was zeroed");
    assert_eq!(client.flush().await, Some(()), "a flush has nothing to do");
    assert_eq!(disk.contents(0, 8192), [7; 8192]);
}

/// A disk for [`run_read_only`].
#[must_use]
pub fn read_only_disk() -> MemDisk {
    MemDisk::read_only(vec![7; DISK_BYTES_MIN])
}

/// Bytes that tell their place.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let byte = |place: u64| u8::try_from((place * 7 + place / 251 + seed * 13) % 256).unwrap_or(0);
    (0..length as u64).map(byte).collect()
}

async fn sizes_and_alignments(client: &mut impl Client, disk: &GateDisk) {
    let grain = client.grain();
    let lengths = [1, 511, 512, 4096, 4608, 65_536, (1 << 20) - 1, 1 << 20, (1 << 20) + 1536];
    for (index, length) in (0u64..).zip(lengths) {
        let length = usize::next_multiple_of(length, usize::try_from(grain).unwrap_or(1));
        for place in [0, 1, 4095, 4096, 4097, 12_800] {
            let offset = u64::next_multiple_of(place, grain);
            let bytes = pattern(index * 100 + place, length);
            let written = client.write(offset, bytes.clone()).await;
            assert_eq!(written, Some(()), "{length} bytes at {offset}");
            assert!(disk.contents(offset, length) == bytes, "{length} bytes written at {offset}");
            let read = client.read(offset, length).await;
            assert!(read.as_ref() == Some(&bytes), "{length} bytes read at {offset}");
        }
    }
}

async fn ends(client: &mut impl Client, disk: &GateDisk) {
    let Some(size) = client.size().await else { panic!("there is no size") };
    let bytes = pattern(1, 4096);
    assert_eq!(client.write(size - 4096, bytes.clone()).await, Some(()));
    assert_eq!(client.read(size - 4096, 4096).await, Some(bytes.clone()));
    assert_eq!(client.write(size, bytes.clone()).await, None, "written behind the end");
    assert!(disk.contents(size - 4096, 4096) == bytes);
}

async fn ranges(client: &mut impl Client, disk: &GateDisk) {
    let grain = client.grain();
    for zeroed in [false, true] {
        let mut expected = pattern(9, 65_536);
        assert_eq!(client.write(0, expected.clone()).await, Some(()));
        let offset = u64::next_multiple_of(5000, grain);
        let length = u64::next_multiple_of(20_001, grain);
        let done = match zeroed {
            true => client.zero(offset, length).await,
            false => client.discard(offset, length).await,
        };
        assert_eq!(done, Some(()));
        let from = usize::try_from(offset).unwrap_or(0);
        let to = from + usize::try_from(length).unwrap_or(0);
        if let Some(range) = expected.get_mut(from..to) {
            range.fill(0);
        }
        assert!(client.read(0, 65_536).await.as_ref() == Some(&expected), "zeroed: {zeroed}");
        assert!(disk.contents(0, 65_536) == expected);
    }
}

async fn durability(client: &mut impl Client, disk: &GateDisk) {
    disk.log.borrow_mut().clear();
    assert_eq!(client.flush().await, Some(()));
    assert_eq!(*disk.log.borrow(), ["Flush"], "a flush is one of the disk");
}

async fn failures(client: &mut impl Client, disk: &GateDisk) {
    for kind in [ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::Corrupt] {
        disk.failure.set(Some(kind));
        assert_eq!(client.write(0, vec![1; 4096]).await, None, "{kind:?}");
        assert_eq!(client.read(0, 4096).await, None, "{kind:?}");
        assert_eq!(client.flush().await, None, "{kind:?}");
        assert_eq!(client.discard(0, 4096).await, None, "{kind:?}");
        disk.failure.set(None);
        // Only those requests have failed.
        assert_eq!(client.write(0, vec![2; 4096]).await, Some(()));
        assert_eq!(client.read(0, 4096).await, Some(vec![2; 4096]));
    }
}
