//! One run: a seed, a device, and the lives of a store on it.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use base::ErrorKind;
use device::Device;
use runtime::Clock;
use vdi::check::CheckOptions;
use vdi::{FormatOptions, OpenOptions, OpenReport, Store};

use crate::client;
use crate::executor::{Driven, Executor};
use crate::holds;
use crate::model::block::Floor;
use crate::moments;
use crate::plan::{Ending, Life, Limits, Plan, Strike};
use crate::probes::Probes;
use crate::scrub;
use crate::session::{Injected, Session};
use crate::trace::Trace;
use crate::verify;
use crate::world::World;

/// Attempts to open a store before a run gives up: each fails for an injected reason.
const OPENINGS_MAX: u32 = 20;

/// What a run found.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// The first thing that was wrong.
    pub failure: Option<String>,
    /// Hash of everything that happened.
    pub trace_hash: u64,
    /// Changes that clients made.
    pub changes: u64,
    /// Writes that the device was given.
    pub device_writes: u64,
    /// Operations that the device was given.
    pub device_operations: u64,
    /// Simulated time.
    pub simulated: Duration,
    /// Rare paths that were reached.
    pub probes: Probes,
}

/// Runs a seed.
#[must_use]
pub fn run(seed: u64, limits: &Limits, trace: Trace) -> Report {
    let plan = Plan::draw(seed, limits);
    trace.note(|| format!("plan     {plan:#?}"));
    let world = Rc::new(World::new(seed, plan, trace));
    let mut run = Run {
        world: Rc::clone(&world),
        boots: 0,
        floor: None,
        opened_at: Injected::default(),
        metadata_lost: false,
        filled: false,
        copy_damaged: false,
        was_opened: false,
        last: false,
    };
    if let Some(number) = limits.fail_operation {
        world.device.fail_operation(number);
    }
    run.go();
    let mut probes = world.probes.borrow().clone();
    probes.add("request: concurrent on a block", world.model.borrow().rivals);
    world.device.with_atlas(|atlas| {
        for (what, &count) in atlas.counts() {
            probes.add(&format!("device: {what}"), count);
        }
    });
    let trace_hash = world.trace.hash() ^ world.device.hash();
    world.device.clear();
    Report {
        seed,
        failure: world.failure(),
        trace_hash,
        changes: world.model.borrow().ops().len(),
        device_writes: world.device.counts().writes,
        device_operations: world.device.operations(),
        simulated: Duration::from_nanos(world.clock.now().0),
        probes,
    }
}

struct Run {
    world: Rc<World>,
    /// Boots of the machine so far.
    boots: u8,
    /// What must have survived of what was done since the store was last opened. `None`: nothing
    /// has crashed since.
    floor: Option<Floor>,
    /// What had been injected when the store was last opened.
    opened_at: Injected,
    /// Whether something that may be the log or a slot was damaged at a crash: then anything may be
    /// lost, but nothing may be wrong.
    metadata_lost: bool,
    /// Whether the store was filled to the brim once.
    filled: bool,
    /// Whether one copy of a slot or of the superblock is damaged.
    copy_damaged: bool,
    /// Whether the store was opened since it was formatted: before, it has one slot only.
    was_opened: bool,
    /// Whether this is the last look at the store, where garbage is collected and none may be left.
    last: bool,
}

/// How a life went on.
enum Next {
    /// Open the store again.
    Reopen,
    /// The run is over.
    Over,
}

impl Run {
    fn go(&mut self) {
        if !self.format() {
            return;
        }
        self.world.device.limit_space(self.world.plan.space_below);
        let lives = self.world.plan.lives.clone();
        let mut openings = 0;
        for life in &lives {
            self.check_offline(false);
            for attempt in 1.. {
                openings += 1;
                if openings > OPENINGS_MAX {
                    return;
                }
                match self.live(life, attempt) {
                    Some(Next::Reopen) => break,
                    Some(Next::Over) => return,
                    // It was not opened: once more.
                    None => {}
                }
            }
        }
        self.last_look();
    }

    /// Writes an empty store. `false`: the run has failed.
    fn format(&mut self) -> bool {
        let world = Rc::clone(&self.world);
        let mut random = crate::random::Random::split(world.seed, "format");
        let stores = if world.plan.used_device { 2 } else { 1 };
        for attempt in 0..stores {
            let options = FormatOptions {
                extent_bytes: Some(16 << 20),
                log_bytes: Some(world.plan.log_bytes),
                force: attempt > 0,
                keep_space: false,
                uuid: bytes(&mut random),
                secret: bytes(&mut random),
                boot_id: [self.boots; 16],
            };
            let executor = Executor::new(&world);
            if random.chance(20) {
                executor.strike_at(Strike::Steps(random.magnitude(200)));
            }
            let device = Device::new(Rc::new(world.device.clone()));
            let runtime = executor.runtime().clone();
            let outcome = executor.run(format(device, runtime, options.clone()));
            match outcome {
                Driven::Done(Ok(())) => executor.kill(),
                Driven::Done(Err(error)) => {
                    executor.kill();
                    if !Injected::default().errors_since(&world) {
                        world.fail(format!("format: {error}"));
                    }
                    return false;
                }
                Driven::Struck => {
                    world.probe("crash: while formatting");
                    executor.kill();
                    world.device.cut_power();
                    let executor = Executor::new(&world);
                    let device = Device::new(Rc::new(world.device.clone()));
                    let runtime = executor.runtime().clone();
                    let again = FormatOptions { force: true, ..options };
                    let outcome = executor.run(format(device, runtime, again));
                    executor.kill();
                    if !matches!(outcome, Driven::Done(Ok(()))) {
                        world.fail(format!("format after a power cut: {outcome:?}"));
                        return false;
                    }
                }
                Driven::Failed => return false,
            }
            if attempt + 1 < stores {
                // What a store leaves behind when the device is used again.
                self.open_and_leave();
            }
        }
        !world.failed()
    }

    /// Uses a store that will be formatted again.
    fn open_and_leave(&mut self) {
        let executor = Executor::new(&self.world);
        let (device, options) = self.opening();
        let runtime = executor.runtime().clone();
        let outcome = executor.run(async move {
            let (store, _) = Store::open(device, runtime, &options).await?;
            store.create("left-behind", 1 << 20).await?;
            store.checkpoint().await
        });
        if let Driven::Done(Err(error)) = outcome
            && !Injected::default().errors_since(&self.world)
        {
            self.world.fail(format!("use of a new store: {error}"));
        }
        executor.kill();
        self.world.device.kill();
    }

    fn opening(&self) -> (Device, OpenOptions) {
        let mut random = self.world.random.borrow_mut();
        let options = OpenOptions {
            cache_bytes: self.world.plan.cache_bytes,
            boot_id: [self.boots; 16],
            nonce: random.number(),
            after_failure: false,
            idle_vdis_max: random.index(3),
            marks_stored_every: std::time::Duration::from_millis(random.below(2) * 30_000),
            // Enough for one pass, or so little that there are many.
            gc_memory_bytes: if random.chance(500) { 256 << 20 } else { random.below(64 << 10) },
            reuse: self.world.plan.reuse,
        };
        drop(random);
        (Device::new(Rc::new(self.world.device.clone())), options)
    }

    /// Now and then, asks the offline check what it thinks of the store; it changes nothing.
    fn check_offline(&mut self, always: bool) {
        let world = Rc::clone(&self.world);
        let damaged = world.device.with_atlas(|atlas| atlas.damaged > 0 || atlas.cache_losses > 0);
        if damaged || self.copy_damaged || !(always || world.random.borrow_mut().chance(400)) {
            return;
        }
        world.device.arm(false);
        let executor = Executor::new(&world);
        let (device, opening) = self.opening();
        let options = CheckOptions {
            repair: false,
            read_data: true,
            boot_id: opening.boot_id,
            nonce: opening.nonce,
        };
        let runtime = executor.runtime().clone();
        let errors_before = Injected::now(&world);
        let outcome = executor
            .run(async move { vdi::check::check(&device, &runtime, options, &[], &|_| {}).await });
        executor.kill();
        match outcome {
            Driven::Done(Ok(report)) => {
                world.trace.note(|| format!("check    {:?}", report.counts));
                let mut probes = world.probes.borrow_mut();
                probes.hit("check: offline");
                probes.add("check: leaked blocks", report.counts.leaked_blocks);
                drop(probes);
                // A collection that an injected error ended closes nothing.
                let collected = self.last && report.closed_cleanly;
                if collected && report.counts.leaked_blocks > 0 {
                    world.fail(format!("garbage was collected, and there is some: {report:?}"));
                }
                if !report.is_clean() && !errors_before.errors_since(&world) {
                    world.fail(format!("check: {:?}", report.errors));
                }
            }
            Driven::Done(Err(error)) if !errors_before.errors_since(&world) => {
                world.fail(format!("check: {error}"));
            }
            _ => {}
        }
    }

    /// One life. `None`: the store was not opened, for a reason that was injected.
    fn live(&mut self, life: &Life, attempt: u32) -> Option<Next> {
        let world = Rc::clone(&self.world);
        let executor = Executor::new(&world);
        let before = Injected::now(&world);
        world.device.arm(life.faults_at_open && attempt < 4);
        let crash_at_open = life.crash_at_open.filter(|_| attempt == 1);
        if let Some((_, steps)) = crash_at_open {
            executor.strike_at(Strike::Steps(steps));
        }
        let (device, options) = self.opening();
        let runtime = executor.runtime().clone();
        world.trace.event([40, u64::from(attempt), 0, 0], || format!("open     attempt {attempt}"));
        let open = {
            let runtime = runtime.clone();
            async move { Store::open(device, runtime, &options).await }
        };
        let (store, report) = match executor.run(open) {
            Driven::Done(Ok(opened)) => opened,
            Driven::Done(Err(error)) => {
                executor.kill();
                world.device.kill();
                return self.not_opened(before, &error);
            }
            Driven::Struck => {
                let ending = crash_at_open.map_or(Ending::Kill, |(ending, _)| ending);
                world.probe("crash: while opening");
                self.crash(executor, ending);
                return None;
            }
            Driven::Failed => {
                executor.kill();
                return Some(Next::Over);
            }
        };
        world.device.arm(false);
        // Opening has written both copies.
        self.copy_damaged = false;
        self.was_opened = true;
        self.note_opening(&report);
        let session = Session::new(&world, &runtime, store, before);
        if self.metadata_lost {
            let outcome = executor.run(verify::nothing_wrong(Rc::clone(&session)));
            self.is_over(&outcome, "verifying");
            world.probe("open: damage went with a crash");
            executor.kill();
            return Some(Next::Over);
        }
        if let Some(floor) = self.floor.take() {
            let cache_lost = self.opened_at.cache_lost_since(&world);
            let floor = if cache_lost { Floor::Flushed } else { floor };
            world.model.borrow_mut().settle(floor);
        }
        self.opened_at = Injected::now(&world);
        executor.strike_at(life.strike);
        Some(self.serve(life, executor, &session))
    }

    /// Everything between opening and the end of a life.
    fn serve(&mut self, life: &Life, executor: Executor, session: &Rc<Session>) -> Next {
        let world = Rc::clone(&self.world);
        if self.is_over(&executor.run(verify::everything(Rc::clone(session))), "verifying") {
            return self.end(executor, life.ending, session);
        }
        let nodes_damaged = world.device.with_atlas(|atlas| atlas.nodes_damaged > 0);
        if nodes_damaged {
            // What can be read is right. What cannot be listed, the model does not know any more.
            world.probe("open: nodes are damaged");
        }
        let is_over = nodes_damaged || world.model.borrow().unknowable;
        if is_over || (self.last && world.random.borrow_mut().chance(500)) {
            self.compare_scrub(executor, session);
            return Next::Over;
        }
        world.device.arm(true);
        if let (Some(fill), false) = (world.plan.fill, self.filled) {
            self.filled = true;
            let fill = client::fill(Rc::clone(session), fill);
            if self.is_over(&executor.run(fill), "filling") {
                return self.end(executor, life.ending, session);
            }
        }
        executor.begin_work();
        let work = client::work(Rc::clone(session), life.requests);
        if self.is_over(&executor.run(work), "working") || session.stopped() {
            return self.end(executor, life.ending, session);
        }
        // Also with caches that have not met the damage.
        let damaged = world.device.with_atlas(|atlas| atlas.damaged > 0);
        if damaged && world.random.borrow_mut().chance(300) {
            self.compare_scrub(executor, session);
            return Next::Over;
        }
        if life.ending != Ending::Close {
            return self.end(executor, life.ending, session);
        }
        let store = session.store.clone();
        let last = self.last;
        if last {
            self.world.default_retentions.borrow_mut().push("off".to_owned());
        }
        let runtime = executor.runtime().clone();
        let over_budget = Rc::new(RefCell::new(None));
        let told = Rc::clone(&over_budget);
        let bounds = last && world.random.borrow_mut().chance(300);
        let budget = world.random.borrow_mut().pick(&moments::LAST_BUDGETS).filter(|_| bounds);
        let outcome = executor.run(async move {
            if let Some(budget) = budget {
                *told.borrow_mut() = Some(moments::keep_budgets(&store, &runtime, budget).await?);
            }
            if last {
                // Moments whose time comes later would be garbage then.
                holds::end_all(&store).await?;
                moments::end_all(&store, &runtime).await?;
                store.collect_garbage().await?;
            }
            store.close().await
        });
        match over_budget.take() {
            Some(None) => world.probe("moments: within their budgets"),
            Some(Some(over_budget)) => world.fail(over_budget),
            None => {}
        }
        match outcome {
            Driven::Done(Ok(())) => {
                self.note_stats(session);
                world.trace.event([42, 0, 0, 0], || "close    done".to_owned());
                // A clean store needs no cache and no process.
                let ending = if world.random.borrow_mut().chance(500) {
                    Ending::PowerCut
                } else {
                    Ending::Kill
                };
                self.crash(executor, ending);
                self.floor = Some(Floor::Acked);
                Next::Reopen
            }
            Driven::Done(Err(error)) => {
                session.excuse("close", error.kind(), &error, crate::session::Reach::Metadata);
                self.end(executor, Ending::Kill, session)
            }
            other => {
                self.is_over(&other, "closing");
                self.end(executor, Ending::PowerCut, session)
            }
        }
    }

    /// Scrubs a store that nobody uses, ends its process, and asks the offline check what it finds: two
    /// walks that share no code but the trees' own. What is damaged and named, both find.
    fn compare_scrub(&mut self, executor: Executor, session: &Rc<Session>) {
        let world = Rc::clone(&self.world);
        let outcome = executor.run(scrub::quietly(Rc::clone(session)));
        executor.kill();
        world.device.kill();
        let (Driven::Done(Some(found)), false) = (outcome, world.failed()) else { return };
        let executor = Executor::new(&world);
        let (device, opening) = self.opening();
        let (boot_id, nonce) = (opening.boot_id, opening.nonce);
        let options = CheckOptions { repair: false, read_data: true, boot_id, nonce };
        let runtime = executor.runtime().clone();
        let outcome = executor
            .run(async move { vdi::check::check(&device, &runtime, options, &[], &|_| {}).await });
        executor.kill();
        if let Driven::Done(Ok(report)) = outcome {
            world.probe("scrub: compared");
            if let Some(missed) = scrub::missed(&report, &found) {
                world.fail(format!("scrub has not found this: {missed}; but: {found:?}"));
            }
        }
    }

    /// Whether a phase did not come to its end.
    fn is_over<T>(&self, outcome: &Driven<T>, phase: &str) -> bool {
        match outcome {
            Driven::Done(_) => false,
            Driven::Struck => {
                match phase {
                    "working" => {}
                    phase => self.world.probe(&format!("crash: while {phase}")),
                }
                true
            }
            Driven::Failed => true,
        }
    }

    /// Ends a life the hard way.
    fn end(&mut self, executor: Executor, ending: Ending, session: &Rc<Session>) -> Next {
        self.note_stats(session);
        let ending = match ending {
            Ending::Close if session.stopped() => Ending::Kill,
            other => other,
        };
        self.crash(executor, ending);
        if self.world.failed() { Next::Over } else { Next::Reopen }
    }

    /// The process dies, or the power goes.
    fn crash(&mut self, executor: Executor, ending: Ending) {
        let world = Rc::clone(&self.world);
        executor.kill();
        let floor = match ending {
            Ending::Kill | Ending::Close => {
                world.device.kill();
                world.probe("crash: kill");
                self.damage_copy();
                Floor::Acked
            }
            Ending::PowerCut => {
                let style = world.device.cut_power();
                world.trace.note(|| format!("power    cut, {style:?}"));
                world.probe("crash: power cut");
                self.boots = self.boots.wrapping_add(1);
                // It may have torn a copy, which opening the store writes again.
                self.was_opened = false;
                Floor::Flushed
            }
        };
        world.trace.event([41, u64::from(floor == Floor::Acked), world.device.hash(), 0], || {
            format!("crash    {ending:?}")
        });
        world.crash();
        self.metadata_lost |= world.device.with_atlas(|atlas| atlas.anything_may_be_lost());
        if self.floor.is_some() {
            world.probe("crash: twice before anybody read");
        }
        // The worst of several crashes counts.
        if self.floor != Some(Floor::Flushed) {
            self.floor = Some(floor);
        }
    }

    /// Perhaps one copy rots of what there are two copies of. That loses nothing (rule 18), so it is
    /// not noted, and done only where nothing else was damaged.
    fn damage_copy(&mut self) {
        let world = &self.world;
        let sound = world.device.with_atlas(|atlas| atlas.errors == 0 && atlas.damaged == 0);
        let sound = sound && self.was_opened;
        let mut random = world.random.borrow_mut();
        if self.copy_damaged || self.last || !sound || !random.chance(world.plan.copy_rot_per_mille)
        {
            return;
        }
        let [primary, secondary] = ondisk::SUPERBLOCK_COPIES.map(base::Pba::get);
        let slot = blockstore::Geometry::host_slots_start().get();
        let block = match random.below(10) {
            0 => primary,
            1 => secondary,
            other => slot + other % 2,
        };
        let byte = random.index(base::BLOCK_SIZE);
        if world.device.damage_silently(block, |bytes| bytes[byte] ^= 0x10) {
            self.copy_damaged = true;
            drop(random);
            world.probe("crash: with a copy damaged");
            world.trace.note(|| format!("device  injected: rot of byte {byte} of block {block}"));
        }
    }

    /// Opening failed: is that explained?
    fn not_opened(&mut self, before: Injected, error: &vdi::Error) -> Option<Next> {
        let world = &self.world;
        let kind = error.kind();
        let damaged = world.device.with_atlas(|atlas| atlas.metadata_is_damaged());
        let injected = before.errors_since(world) && kind == ErrorKind::Io;
        if injected {
            world.probe("open: failed under faults");
            return None;
        }
        if damaged {
            world.probe("open: refused for damage");
            return Some(Next::Over);
        }
        let full = kind == ErrorKind::NoSpace && world.plan.space_below.is_some();
        if full {
            world.device.limit_space(None);
            return None;
        }
        world.fail(format!("open: {kind:?} ({error}), which nothing explains"));
        Some(Next::Over)
    }

    fn note_opening(&self, report: &OpenReport) {
        let world = &self.world;
        world.trace.event(
            [43, report.records_replayed, report.records_dropped, u64::from(report.clean)],
            || format!("opened   {report:?}"),
        );
        let mut probes = world.probes.borrow_mut();
        probes.add("open: clean", u64::from(report.clean));
        probes.add("open: replayed records", u64::from(report.records_replayed > 0));
        probes.add("open: dropped records", u64::from(report.records_dropped > 0));
        probes.add("open: alarms", u64::from(!report.alarms.is_empty()));
    }

    fn note_stats(&self, session: &Session) {
        let stats = session.store.stats();
        let mut probes = self.world.probes.borrow_mut();
        let lapped = stats.log_blocks * base::BLOCK_SIZE_U64 > self.world.plan.log_bytes;
        probes.add("log: lapped", u64::from(lapped));
        probes.add("log: over half full at an end", u64::from(stats.log_used_percent > 50));
        probes.add("checkpoint: published", stats.checkpoints);
        probes.add("checkpoint: made histories", stats.histories);
        probes.add("cache: missed", stats.cache_misses);
    }

    /// Opens the store a last time, compares everything and closes it.
    fn last_look(&mut self) {
        let world = Rc::clone(&self.world);
        world.device.limit_space(None);
        let life = Life {
            requests: 0,
            ending: Ending::Close,
            strike: Strike::Never,
            faults_at_open: false,
            crash_at_open: None,
        };
        world.device.arm(false);
        self.last = true;
        if matches!(self.live(&life, 1), Some(Next::Reopen)) {
            self.check_offline(true);
        }
    }
}

async fn format(
    device: Device,
    runtime: runtime::Runtime,
    options: FormatOptions,
) -> Result<(), vdi::Error> {
    Store::format(&device, &runtime, &options).await
}

fn bytes<const N: usize>(random: &mut crate::random::Random) -> [u8; N] {
    std::array::from_fn(|_| u8::try_from(random.below(256)).unwrap_or(0))
}
