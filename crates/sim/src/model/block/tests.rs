//! The rules of one block, by example and against an enumeration of everything that is legal.

use std::collections::BTreeSet;

use super::*;
use crate::random::Random;

const LBA: u64 = 7;

/// A block with its list of changes.
struct Bench {
    ops: Ops,
    block: BlockModel,
}

impl Bench {
    fn new() -> Self {
        Self { ops: Ops::default(), block: BlockModel::zero() }
    }

    /// Asks for a write of some sectors.
    fn begin(&mut self, sectors: std::ops::Range<u16>) -> Serial {
        let serial = self.ops.begin(1, "write", 0, 1);
        let content = Content::Tag(self.ops.tag(serial));
        self.push(serial, sectors, content);
        serial
    }

    fn begin_zero(&mut self, sectors: std::ops::Range<u16>) -> Serial {
        let serial = self.ops.begin(1, "discard", 0, 1);
        self.push(serial, sectors, Content::Tag(Tag::ZERO));
        serial
    }

    fn push(&mut self, serial: Serial, sectors: std::ops::Range<u16>, content: Content) {
        let piece = (sectors.start * 512, sectors.end * 512);
        // Readers that never end keep everything as it was told.
        self.block.push(&self.ops, Moment(0), serial, piece, content);
    }

    fn ack(&mut self, serial: Serial) {
        self.ops.end(serial, Outcome::Acked, false);
    }

    fn write(&mut self, sectors: std::ops::Range<u16>) -> Serial {
        let serial = self.begin(sectors);
        self.ack(serial);
        serial
    }

    fn flush(&mut self, serials: &[Serial]) {
        for &serial in serials {
            self.ops.get_mut(serial).expect("it exists").durable = true;
        }
    }

    /// The bytes if these changes happened in this order.
    fn bytes(&self, order: &[Serial]) -> Vec<u8> {
        let mut segments = self.block.base.clone();
        for serial in order {
            let version = self.block.versions.iter().find(|version| version.serial == *serial);
            let version = version.expect("a change of this block");
            segments.overlay(version.start, version.end, &version.content);
        }
        let mut bytes = vec![0; BLOCK_SIZE];
        segments.render(LBA, 0, &mut bytes);
        bytes
    }

    fn legal(&self, bytes: &[u8], floor: Floor) -> bool {
        self.block.check(&self.ops, LBA, 0, bytes, floor).is_ok()
    }

    fn check(&self, floor: Floor, legal: &[&[Serial]], illegal: &[&[Serial]]) {
        for order in legal {
            assert!(self.legal(&self.bytes(order), floor), "{order:?} must be legal");
        }
        for order in illegal {
            assert!(!self.legal(&self.bytes(order), floor), "{order:?} must not be legal");
        }
    }
}

#[test]
fn a_running_disk_shows_what_was_acknowledged() {
    let mut bench = Bench::new();
    let one = bench.write(0..8);
    let two = bench.write(0..8);
    let three = bench.begin(0..8);
    let now = bench.ops.tick();
    bench.check(Floor::Before(now), &[&[one, two], &[one, two, three]], &[&[], &[one]]);
}

#[test]
fn a_kill_takes_nothing_acknowledged() {
    let mut bench = Bench::new();
    let one = bench.write(0..8);
    let two = bench.begin(0..4);
    bench.check(Floor::Acked, &[&[one], &[one, two]], &[&[], &[two]]);
}

#[test]
fn a_power_cut_takes_back_to_the_flush_and_keeps_the_order() {
    let mut bench = Bench::new();
    let one = bench.write(0..8);
    bench.flush(&[one]);
    let two = bench.write(0..2);
    let three = bench.write(4..6);
    bench.check(
        Floor::Flushed,
        &[&[one], &[one, two], &[one, two, three]],
        &[&[], &[two], &[two, three], &[one, three]],
    );
}

#[test]
fn concurrent_writes_go_either_way_until_somebody_looked() {
    let mut bench = Bench::new();
    let (one, two) = (bench.begin(0..8), bench.begin(2..8));
    bench.ack(two);
    bench.ack(one);
    let floor = Floor::Before(bench.ops.tick());
    bench.check(floor, &[&[one, two], &[two, one]], &[&[], &[two]]);
    let seen = bench.bytes(&[one, two]);
    let explanation = bench.block.check(&bench.ops, LBA, 0, &seen, floor).expect("legal");
    bench.block.learn(&bench.ops, floor, &explanation);
    let later = Floor::Before(bench.ops.tick());
    bench.check(later, &[&[one, two]], &[&[two, one]]);
    bench.check(Floor::Acked, &[&[one, two]], &[&[two, one]]);
}

#[test]
fn a_mix_of_two_versions_is_torn() {
    let mut bench = Bench::new();
    let one = bench.write(0..8);
    let two = bench.begin(0..8);
    let mut torn = bench.bytes(&[one]);
    torn[2048..].copy_from_slice(&bench.bytes(&[two])[2048..]);
    for floor in [Floor::Acked, Floor::Flushed] {
        assert!(!bench.legal(&torn, floor));
    }
    let mut foreign = bench.bytes(&[one]);
    foreign[100] ^= 1;
    assert!(!bench.legal(&foreign, Floor::Flushed));
}

#[test]
fn a_failed_write_is_there_or_not_and_later_ones_follow_it() {
    let mut bench = Bench::new();
    let one = bench.write(0..8);
    let two = bench.begin(0..4);
    bench.ops.end(two, Outcome::Failed, false);
    let three = bench.write(2..6);
    let floor = Floor::Before(bench.ops.tick());
    bench.check(floor, &[&[one, three], &[one, two, three]], &[&[one, three, two], &[two, three]]);
}

#[test]
fn what_was_settled_after_a_crash_stays_apart_from_what_came_later() {
    let mut bench = Bench::new();
    let one = bench.write(0..4);
    let now = bench.ops.tick();
    bench.block = bench.block.frozen(&bench.ops, now, Floor::Flushed);
    bench.ops.next_era();
    let two = bench.write(4..8);
    let floor = Floor::Before(bench.ops.tick());
    bench.check(floor, &[&[two], &[one, two]], &[&[one], &[]]);
    let seen = bench.bytes(&[two]);
    let explanation = bench.block.check(&bench.ops, LBA, 0, &seen, floor).expect("legal");
    bench.block.pin(&explanation);
    assert!(bench.block.is_settled());
    assert!(bench.legal(&seen, Floor::Flushed));
}

#[test]
fn folding_keeps_what_is_legal() {
    let mut bench = Bench::new();
    let one = bench.write(0..4);
    let two = bench.write(2..8);
    let seen = bench.bytes(&[one, two]);
    bench.flush(&[one, two]);
    let now = bench.ops.tick();
    bench.block.fold(&bench.ops, now);
    assert!(bench.block.is_settled());
    assert!(bench.legal(&seen, Floor::Flushed));
}

#[test]
fn folding_waits_for_readers_that_may_have_seen_less() {
    let mut bench = Bench::new();
    let reader = bench.ops.tick();
    let one = bench.write(0..8);
    bench.flush(&[one]);
    bench.block.fold(&bench.ops, reader);
    bench.check(Floor::Before(reader), &[&[], &[one]], &[]);
}

#[test]
fn zeroes_have_many_explanations() {
    let mut bench = Bench::new();
    let one = bench.write(0..8);
    let two = bench.begin_zero(0..4);
    let three = bench.begin_zero(2..8);
    let floor = Floor::Before(bench.ops.tick());
    bench.check(floor, &[&[one], &[one, two], &[one, three], &[one, two, three]], &[]);
    assert!(bench.legal(&[0; BLOCK_SIZE], floor));
    bench.ack(two);
    let floor = Floor::Before(bench.ops.tick());
    bench.check(floor, &[&[one, two], &[one, two, three]], &[&[one], &[one, three]]);
}

/// Enumerates all legal contents of random small histories, and compares.
#[test]
fn the_checker_agrees_with_an_enumeration() {
    let mut legal_count = 0;
    let mut illegal_count = 0;
    for seed in 0..3_000 {
        let mut random = Random::new(seed);
        let bench = history(&mut random);
        let floor = match random.below(3) {
            0 => Floor::Acked,
            1 => Floor::Flushed,
            _ => Floor::Before(Moment(random.below(20))),
        };
        let legal = enumerate(&bench, floor);
        for bytes in &legal {
            assert!(bench.legal(bytes, floor), "seed {seed}: a legal content is refused");
        }
        let all: Vec<&Vec<u8>> = legal.iter().collect();
        let serials: Vec<Serial> = bench.block.versions.iter().map(|v| v.serial).collect();
        for _ in 0..6 {
            // Mixes of legal contents and of single versions.
            let mut mixed = all[random.index(all.len())].clone();
            let other = if random.chance(500) {
                all[random.index(all.len())].clone()
            } else {
                bench.bytes(&[serials[random.index(serials.len())]])
            };
            let cut = random.index(8) * 512;
            mixed[cut..].copy_from_slice(&other[cut..]);
            let expected = legal.contains(&mixed);
            assert_eq!(bench.legal(&mixed, floor), expected, "seed {seed}: cut at {cut}");
            legal_count += u32::from(expected);
            illegal_count += u32::from(!expected);
        }
    }
    assert!(legal_count > 1_000 && illegal_count > 1_000, "{legal_count} {illegal_count}");
}

/// Up to five changes, some of them under way together, some zeroes, some flushed or failed.
fn history(random: &mut Random) -> Bench {
    let mut bench = Bench::new();
    let mut open: Vec<Serial> = Vec::new();
    let mut count = 0;
    let total = random.between(1, 5);
    while count < total {
        if !open.is_empty() && random.chance(400) {
            let serial = open.swap_remove(random.index(open.len()));
            let outcome = if random.chance(100) { Outcome::Failed } else { Outcome::Acked };
            bench.ops.end(serial, outcome, false);
            continue;
        }
        let start = u16::try_from(random.below(8)).expect("small");
        let end = start + 1 + u16::try_from(random.below(u64::from(8 - start))).expect("small");
        let zero = random.chance(300);
        open.push(if zero { bench.begin_zero(start..end) } else { bench.begin(start..end) });
        count += 1;
    }
    while let Some(serial) = open.pop() {
        if random.chance(500) {
            bench.ack(serial);
        }
    }
    let flushed = Moment(random.below(12));
    let serials: Vec<Serial> = bench.block.versions.iter().map(|v| v.serial).collect();
    let covered: Vec<Serial> = serials
        .into_iter()
        .filter(|&serial| {
            let op = bench.ops.get(serial).expect("it exists");
            op.outcome == Outcome::Acked && op.ended < flushed
        })
        .collect();
    bench.flush(&covered);
    bench
}

/// All contents that some set and order of changes makes.
fn enumerate(bench: &Bench, floor: Floor) -> BTreeSet<Vec<u8>> {
    let question = Question::new(&bench.block, &bench.ops, floor);
    let count = question.fates.len();
    let mut legal = BTreeSet::new();
    for set in 0u32..1 << count {
        let members: Vec<usize> = (0..count).filter(|index| set & (1 << index) != 0).collect();
        let complete = (0..count).all(|index| {
            members.contains(&index)
                || !(question.fates[index].must
                    || members.iter().any(|&member| question.implied(index, member)))
        });
        if complete {
            orders(&question, &members, &mut Vec::new(), &mut |order| {
                let serials: Vec<Serial> =
                    order.iter().map(|&index| bench.block.versions[index].serial).collect();
                legal.insert(bench.bytes(&serials));
            });
        }
    }
    legal
}

fn orders(
    question: &Question<'_>,
    left: &[usize],
    order: &mut Vec<usize>,
    found: &mut impl FnMut(&[usize]),
) {
    if left.is_empty() {
        found(order);
    }
    for &next in left {
        if left.iter().any(|&other| other != next && question.precedes(other, next)) {
            continue;
        }
        let rest: Vec<usize> = left.iter().copied().filter(|&other| other != next).collect();
        order.push(next);
        orders(question, &rest, order, found);
        order.pop();
    }
}
