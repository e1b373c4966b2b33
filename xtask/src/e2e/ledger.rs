//! What a disk may hold, sector by sector, after any crash.
//!
//! Invariants: each write carries a number of its own, and every sector that it wrote says that
//! number and its own address, so that a lost, stale, torn or misplaced write is told apart from
//! the right one. A sector may hold the newest acknowledged write, or one that was in flight at
//! the crash and covers it; a block that such a write covers holds all of its part or none.

use std::collections::HashMap;

use anyhow::{Result, ensure};

pub(crate) const SECTOR: usize = 512;
pub(crate) const SECTORS_PER_BLOCK: usize = 8;

/// Number of the write that a sector holds; 0 reads as zeroes.
pub(crate) type Number = u64;

/// A write or zeroing that was sent and not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InFlight {
    /// First sector.
    pub(crate) start: usize,
    /// Number of sectors.
    pub(crate) count: usize,
    /// What they hold if it arrived.
    pub(crate) number: Number,
}

impl InFlight {
    /// Whether it touches any of these sectors.
    pub(crate) fn overlaps(&self, start: usize, count: usize) -> bool {
        self.start < start + count && start < self.start + self.count
    }

    fn covers(&self, sector: usize) -> bool {
        self.overlaps(sector, 1)
    }
}

/// What every sector of a disk must hold.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    settled: Vec<Number>,
    /// What sectors may hold instead, because a write of it was refused.
    doubts: HashMap<usize, Vec<Number>>,
}

impl Ledger {
    /// A disk that reads as zeroes.
    pub(crate) fn new(bytes: usize) -> Self {
        Self { settled: vec![0; bytes / SECTOR], doubts: HashMap::new() }
    }

    /// Number of sectors.
    pub(crate) fn sectors(&self) -> usize {
        self.settled.len()
    }

    /// A request was answered: from now on these sectors hold this.
    pub(crate) fn settle(&mut self, done: InFlight) {
        for slot in self.settled.iter_mut().skip(done.start).take(done.count) {
            *slot = done.number;
        }
        for sector in done.start..done.start + done.count {
            self.doubts.remove(&sector);
        }
    }

    /// A request was refused: these sectors hold what they held, or this.
    pub(crate) fn doubt(&mut self, refused: InFlight) {
        for sector in refused.start..refused.start + refused.count {
            self.doubts.entry(sector).or_default().push(refused.number);
        }
    }

    fn is_doubt(&self, sector: usize, number: Option<Number>) -> bool {
        let doubts = self.doubts.get(&sector);
        number.is_some_and(|number| doubts.is_some_and(|doubts| doubts.contains(&number)))
    }

    /// Checks bytes that were read at `start` while nothing was in flight there.
    ///
    /// # Errors
    /// Names the first wrong sector.
    pub(crate) fn check_settled(&self, start: usize, bytes: &[u8]) -> Result<()> {
        for (sector, (expected, found)) in
            (start..).zip(self.settled.iter().skip(start).zip(bytes.chunks(SECTOR)))
        {
            let number = number_in(sector, found);
            ensure!(
                number == Some(*expected) || self.is_doubt(sector, number),
                "sector {sector} holds {}, not write {expected}",
                describe(number)
            );
        }
        Ok(())
    }

    /// Checks a whole disk as it was read after a crash, with what was in flight then, and takes
    /// what it holds as settled.
    ///
    /// # Errors
    /// Names the first sector or block that breaks the rule.
    pub(crate) fn check_crashed(&mut self, bytes: &[u8], in_flight: &[InFlight]) -> Result<()> {
        ensure!(bytes.len() == self.settled.len() * SECTOR, "the disk has another size");
        let mut found = Vec::with_capacity(self.settled.len());
        for (sector, (expected, bytes)) in self.settled.iter().zip(bytes.chunks(SECTOR)).enumerate()
        {
            let number = number_in(sector, bytes);
            let arrived = in_flight.iter().any(|w| w.covers(sector) && Some(w.number) == number);
            ensure!(
                number == Some(*expected) || arrived || self.is_doubt(sector, number),
                "sector {sector} holds {}, not the acknowledged write {expected}",
                describe(number)
            );
            found.push(number.unwrap_or(*expected));
        }
        for write in in_flight {
            check_atomic(&found, &self.settled, write)?;
        }
        self.settled = found;
        self.doubts.clear();
        Ok(())
    }
}

/// A block holds all of a write's part of it, or nothing of it.
fn check_atomic(found: &[Number], settled: &[Number], write: &InFlight) -> Result<()> {
    let end = write.start + write.count;
    let mut start = write.start;
    while start < end {
        let next = ((start / SECTORS_PER_BLOCK + 1) * SECTORS_PER_BLOCK).min(end);
        let sectors = || found.iter().zip(settled).skip(start).take(next - start);
        let new = sectors().filter(|(found, _)| **found == write.number).count();
        // A sector that held the same before says nothing (zeroes over zeroes).
        let same = sectors().filter(|(_, settled)| **settled == write.number).count();
        ensure!(
            new == next - start || new <= same,
            "block {} is torn: {new} of {} sectors hold write {}",
            start / SECTORS_PER_BLOCK,
            next - start,
            write.number
        );
        start = next;
    }
    Ok(())
}

/// The contents of sectors from `start` on, written by `number`.
pub(crate) fn contents(start: usize, count: usize, number: Number) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count * SECTOR);
    for sector in start..start + count {
        for _ in 0..SECTOR / 16 {
            bytes.extend((sector as u64).to_le_bytes());
            bytes.extend(number.to_le_bytes());
        }
    }
    bytes
}

/// Which write a sector holds; `None` if it is none of ours for this place.
fn number_in(sector: usize, bytes: &[u8]) -> Option<Number> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Some(0);
    }
    let number = Number::from_le_bytes(*bytes.get(8..)?.first_chunk()?);
    (bytes == contents(sector, 1, number)).then_some(number)
}

fn describe(number: Option<Number>) -> String {
    match number {
        Some(0) => "zeroes".to_owned(),
        Some(number) => format!("write {number}"),
        None => "something that was never written there".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = SECTORS_PER_BLOCK;

    /// A disk of two blocks whose sectors hold these writes.
    fn disk(numbers: &[(usize, usize, Number)]) -> Vec<u8> {
        let mut bytes = vec![0; 2 * BLOCK * SECTOR];
        for &(start, count, number) in numbers {
            bytes[start * SECTOR..(start + count) * SECTOR]
                .copy_from_slice(&contents(start, count, number));
        }
        bytes
    }

    fn settled() -> Ledger {
        let mut ledger = Ledger::new(2 * BLOCK * SECTOR);
        ledger.settle(InFlight { start: 0, count: 2 * BLOCK, number: 7 });
        ledger
    }

    #[test]
    fn after_a_crash_old_or_new_is_right_and_nothing_else() {
        let whole = (0, 2 * BLOCK, 7);
        let in_flight = [InFlight { start: BLOCK, count: BLOCK, number: 9 }];
        let check = |numbers: &[(usize, usize, Number)], fits: bool| {
            let result = settled().check_crashed(&disk(numbers), &in_flight);
            assert_eq!(result.is_ok(), fits, "{numbers:?}: {result:?}");
        };
        check(&[whole], true);
        check(&[whole, (BLOCK, BLOCK, 9)], true);
        check(&[whole, (0, 1, 9)], false);
        check(&[whole, (BLOCK, 4, 9)], false);
        check(&[whole, (BLOCK, BLOCK, 8)], false);
        check(&[(0, BLOCK, 7)], false);
    }

    #[test]
    fn bytes_of_another_place_are_not_taken_for_right() {
        let mut bytes = disk(&[(0, 2 * BLOCK, 7)]);
        bytes.copy_within(0..SECTOR, SECTOR);
        assert!(settled().check_crashed(&bytes, &[]).is_err());
    }

    #[test]
    fn what_was_found_is_settled_from_then_on() {
        let mut ledger = settled();
        let in_flight = [InFlight { start: BLOCK, count: BLOCK, number: 9 }];
        let bytes = disk(&[(0, BLOCK, 7), (BLOCK, BLOCK, 9)]);
        ledger.check_crashed(&bytes, &in_flight).unwrap();
        assert!(ledger.check_crashed(&disk(&[(0, 2 * BLOCK, 7)]), &[]).is_err());
        ledger.check_settled(BLOCK, &bytes[BLOCK * SECTOR..]).unwrap();
    }

    #[test]
    fn a_refused_write_may_have_arrived_until_the_next_one() {
        let mut ledger = settled();
        let refused = InFlight { start: 0, count: BLOCK, number: 8 };
        ledger.doubt(refused);
        let (old, new) = (contents(0, BLOCK, 7), contents(0, BLOCK, 8));
        assert!(ledger.check_settled(0, &old).is_ok() && ledger.check_settled(0, &new).is_ok());
        assert!(ledger.check_settled(0, &contents(0, BLOCK, 9)).is_err());
        ledger.settle(InFlight { start: 0, count: BLOCK, number: 7 });
        assert!(ledger.check_settled(0, &new).is_err());
    }

    #[test]
    fn parts_of_blocks_are_atomic_too() {
        let in_flight = [InFlight { start: 6, count: 4, number: 9 }];
        let check = |numbers: &[(usize, usize, Number)], fits: bool| {
            let mut all = vec![(0, 2 * BLOCK, 7)];
            all.extend(numbers);
            let result = settled().check_crashed(&disk(&all), &in_flight);
            assert_eq!(result.is_ok(), fits, "{numbers:?}: {result:?}");
        };
        check(&[(6, 2, 9)], true);
        check(&[(8, 2, 9)], true);
        check(&[(6, 4, 9)], true);
        check(&[(6, 1, 9)], false);
        check(&[(9, 1, 9)], false);
    }
}
