//! The device keeps its contract.

use std::rc::Rc;
use std::sync::Arc;

use base::Buffer;
use device::Device;
use runtime::{Options, Order, Runtime};

use super::*;
use crate::faults::FaultKind;

struct Bench {
    clock: SimClock,
    sim: SimDevice,
    device: Device,
    runtime: Runtime,
}

impl Bench {
    fn new(seed: u64, faults: Faults) -> Self {
        let clock = SimClock::default();
        let sim = SimDevice::new(1024, seed, faults, clock.clone(), Trace::silent());
        let device = Device::new(Rc::new(sim.clone()));
        let mut bench = Self { runtime: Self::runtime(&clock, seed), clock, sim, device };
        bench.restart(seed);
        bench
    }

    fn runtime(clock: &SimClock, seed: u64) -> Runtime {
        Runtime::new(Options {
            order: Order::Random,
            seed,
            clock: Rc::new(clock.clone()),
            unpark: Arc::new(|| {}),
        })
    }

    fn restart(&mut self, seed: u64) {
        self.runtime.kill();
        self.runtime = Self::runtime(&self.clock, seed);
    }

    /// Runs until nothing is left to do.
    fn settle(&self) {
        loop {
            self.runtime.run_until_stalled();
            let Some(due) = self.sim.next_completion() else { return };
            self.clock.advance_to(due);
            while self.sim.complete_one() {}
        }
    }

    fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let result = Rc::new(RefCell::new(None));
        let slot = Rc::clone(&result);
        let _task = self.runtime.spawn(async move {
            *slot.borrow_mut() = Some(future.await);
        });
        self.settle();
        result.borrow_mut().take().expect("it ended")
    }

    fn write(&self, at: u64, fill: u8, count: usize) -> Result<(), DeviceError> {
        let device = self.device.clone();
        self.run(async move { device.write(Pba::new(at), blocks(fill, count)).await })
    }

    fn flush(&self) -> Result<(), DeviceError> {
        let device = self.device.clone();
        self.run(async move { device.flush().await })
    }

    fn read(&self, at: u64) -> Result<u8, DeviceError> {
        let device = self.device.clone();
        let read =
            self.run(async move { device.read(Pba::new(at), 1, Buffer::zeroed(1)).await })?;
        Ok(read.bytes()[0])
    }
}

fn blocks(fill: u8, count: usize) -> Vec<BlockSlice> {
    let mut buffer = Buffer::zeroed(count);
    buffer.bytes_mut().fill(fill);
    vec![BlockSlice::whole(Rc::new(buffer))]
}

#[test]
fn completed_writes_are_read_and_survive_a_kill_but_not_a_power_cut() {
    let mut lost = 0;
    for seed in 0..20 {
        let mut bench = Bench::new(seed, Faults::none());
        bench.write(7, 1, 2).unwrap();
        bench.flush().unwrap();
        bench.write(7, 2, 2).unwrap();
        assert_eq!(bench.read(8), Ok(2));
        bench.runtime.kill();
        bench.sim.kill();
        bench.restart(seed + 1);
        assert_eq!(bench.read(8), Ok(2), "the device's cache outlives the process");
        bench.runtime.kill();
        bench.sim.cut_power();
        bench.restart(seed + 2);
        let after = bench.read(8).unwrap();
        assert!(after == 1 || after == 2);
        lost += u32::from(after == 1);
    }
    assert!((1..20).contains(&lost), "{lost} of 20 cuts lost the cache");
}

#[test]
fn a_write_in_flight_at_a_kill_happens_or_does_not() {
    let mut happened = 0;
    for seed in 0..40 {
        let mut bench = Bench::new(seed, Faults::none());
        let device = bench.device.clone();
        drop(bench.runtime.spawn(async move { device.write(Pba::new(3), blocks(5, 1)).await }));
        bench.runtime.run_until_stalled();
        bench.runtime.kill();
        bench.sim.kill();
        assert_eq!(bench.sim.next_completion(), None, "nothing is in flight any more");
        bench.restart(seed);
        let after = bench.read(3).unwrap();
        assert!(after == 0 || after == 5);
        happened += u32::from(after == 5);
    }
    assert!((1..40).contains(&happened));
}

#[test]
fn a_flush_submitted_before_a_write_completed_does_not_cover_it() {
    let mut lost = 0;
    for seed in 0..200 {
        let bench = Bench::new(seed, Faults::none());
        let device = bench.device.clone();
        drop(bench.runtime.spawn(async move { device.flush().await }));
        bench.runtime.run_until_stalled();
        bench.write(3, 5, 1).unwrap();
        bench.runtime.kill();
        bench.sim.cut_power();
        let mut bytes = [0; BLOCK_SIZE];
        bench.sim.peek(3, &mut bytes);
        lost += u32::from(bytes[0] == 0);
    }
    assert!(lost > 20, "the flush went first: a cut may lose the write");
}

#[test]
fn operations_complete_out_of_order() {
    let mut swapped = 0;
    for seed in 0..50 {
        let bench = Bench::new(seed, Faults::none());
        let order = Rc::new(RefCell::new(Vec::new()));
        for at in [1, 2] {
            let (device, order) = (bench.device.clone(), Rc::clone(&order));
            drop(bench.runtime.spawn(async move {
                device.write(Pba::new(at), blocks(5, 1)).await.unwrap();
                order.borrow_mut().push(at);
            }));
        }
        bench.settle();
        swapped += u32::from(*order.borrow() == [2, 1]);
        assert_eq!(order.borrow().len(), 2);
    }
    assert!((5..45).contains(&swapped), "{swapped} of 50 pairs were swapped");
}

#[test]
fn every_kind_of_error_strikes_and_is_counted() {
    let check = |kind: FaultKind, work: fn(&Bench) -> bool| {
        let bench = Bench::new(3, Faults::only(kind, 500_000));
        bench.write(1, 1, 1).unwrap();
        bench.sim.arm(true);
        let failed = (0..20).filter(|_| work(&bench)).count();
        assert!((3..=20).contains(&failed), "{kind:?}: {failed} of 20 failed");
        assert_eq!(bench.sim.atlas().errors, to_u64(failed), "{kind:?}");
        bench.sim.arm(false);
        assert!((0..20).all(|_| !work(&bench)), "{kind:?}: nothing fails when disarmed");
    };
    check(FaultKind::ReadError, |bench| bench.read(1).is_err());
    check(FaultKind::WriteError, |bench| bench.write(1, 2, 1).is_err());
    check(FaultKind::FlushError, |bench| bench.flush().is_err());
}

#[test]
fn lost_and_misdirected_writes_are_in_the_atlas_until_they_are_healed() {
    for kind in [FaultKind::LostWrite, FaultKind::Misdirected] {
        let bench = Bench::new(5, Faults::only(kind, 1_000_000));
        bench.write(1, 1, 1).unwrap();
        bench.write(100, 9, 1).unwrap();
        bench.flush().unwrap();
        bench.sim.arm(true);
        bench.write(1, 2, 1).unwrap();
        bench.sim.arm(false);
        let atlas = bench.sim.atlas();
        if kind == FaultKind::LostWrite || atlas.at(100).is_some() {
            assert_eq!(bench.read(1), Ok(1), "it did not get there");
        }
        assert!(atlas.at(1).is_some());
        bench.flush().unwrap();
        assert!(bench.sim.atlas().at(1).is_some(), "a flush heals nothing");
        bench.write(1, 3, 1).unwrap();
        bench.flush().unwrap();
        assert!(bench.sim.atlas().at(1).is_none(), "an honest write does");
    }
}

#[test]
fn rot_changes_one_bit_or_makes_a_block_unreadable() {
    let bench = Bench::new(6, Faults::only(FaultKind::Rot, 1_000_000));
    bench.write(1, 0, 1).unwrap();
    bench.flush().unwrap();
    bench.sim.arm(true);
    let outcome = bench.read(2);
    bench.sim.arm(false);
    assert_eq!(outcome, Ok(0), "the read itself succeeds");
    let damage = bench.sim.atlas().at(1).expect("block 1 is the only one at rest");
    let mut bytes = [0; BLOCK_SIZE];
    bench.sim.peek(1, &mut bytes);
    let bits: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
    match damage.kind {
        DamageKind::Flipped => assert_eq!(bits, 1),
        _ => assert!(bench.read(1).is_err()),
    }
}

#[test]
fn no_space_below_fails_new_blocks_only() {
    let bench = Bench::new(7, Faults::none());
    bench.write(1, 1, 2).unwrap();
    bench.sim.limit_space(Some(1));
    bench.write(1, 2, 2).unwrap();
    bench.write(5, 2, 1).unwrap();
    assert_eq!(bench.write(6, 2, 1).unwrap_err().cause, Cause::NoSpace);
    let device = bench.device.clone();
    bench.run(async move { device.discard(Pba::new(5), 1).await }).unwrap();
    bench.write(6, 2, 1).unwrap();
    bench.sim.limit_space(None);
    bench.write(9, 2, 1).unwrap();
}

#[test]
fn a_device_that_is_gone_fails_everything_and_comes_back() {
    let bench = Bench::new(8, Faults::only(FaultKind::Gone, 1_000_000));
    bench.sim.arm(true);
    assert!(bench.write(1, 1, 1).is_err());
    assert!(bench.sim.in_trouble());
    assert!(bench.read(1).is_err() && bench.flush().is_err());
    bench.sim.arm(false);
    bench.write(1, 1, 1).unwrap();
    assert_eq!(bench.read(1), Ok(1));
}

#[test]
fn a_hang_delays_what_is_under_way_and_loses_nothing() {
    let bench = Bench::new(9, Faults::only(FaultKind::Hang, 1_000_000));
    bench.sim.arm(true);
    let before = bench.clock.now();
    bench.write(1, 1, 1).unwrap();
    assert!(bench.clock.now().since(before).as_micros() >= 1_000);
    bench.sim.arm(false);
    assert_eq!(bench.read(1), Ok(1));
}

#[test]
fn one_seed_is_one_run() {
    let run = |seed: u64| {
        let bench = Bench::new(seed, Faults::none());
        for index in 0..20u8 {
            bench.write(u64::from(index % 7), index, 2).unwrap();
            if index % 5 == 0 {
                bench.flush().unwrap();
            }
        }
        bench.sim.cut_power();
        (bench.sim.hash(), bench.clock.now())
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
