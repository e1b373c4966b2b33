//! Whole runs: they repeat exactly, they pass, and they reach what they are meant to reach.

use parallax_sim::plan::Limits;
use parallax_sim::run::{Report, run};
use parallax_sim::trace::Trace;

fn silent(seed: u64, limits: &Limits) -> Report {
    run(seed, limits, Trace::silent())
}

#[test]
fn one_seed_is_one_run() {
    let mut hashes = std::collections::BTreeSet::new();
    for seed in 1..12 {
        let one = silent(seed, &Limits::default());
        let other = silent(seed, &Limits::default());
        assert_eq!(one.trace_hash, other.trace_hash, "seed {seed} ran in two ways");
        assert_eq!(one.simulated, other.simulated);
        assert_eq!(one.failure, other.failure);
        hashes.insert(one.trace_hash);
    }
    assert_eq!(hashes.len(), 11, "different seeds are different runs");
}

#[test]
fn a_trace_changes_nothing() {
    let lines = std::rc::Rc::new(std::cell::Cell::new(0u64));
    let count = std::rc::Rc::clone(&lines);
    let traced = run(3, &Limits::default(), Trace::to(move |_| count.set(count.get() + 1)));
    assert_eq!(traced.trace_hash, silent(3, &Limits::default()).trace_hash);
    assert!(lines.get() > 100);
}

#[test]
fn seeds_pass_and_do_something() {
    let mut probes = parallax_sim::probes::Probes::default();
    let mut changes = 0;
    for seed in 1..60 {
        let report = silent(seed, &Limits::default());
        assert_eq!(report.failure, None, "seed {seed}");
        probes.merge(&report.probes);
        changes += report.changes;
    }
    assert!(changes > 1_000);
    for path in ["crash: kill", "crash: power cut", "open: replayed records", "check: offline"] {
        assert!(probes.count(path) > 10, "{path} was reached {} times", probes.count(path));
    }
}

#[test]
fn a_power_cut_at_every_write_of_a_run_loses_nothing() {
    let everywhere = |write| Limits { cut_at_write: Some(write), ..Limits::default() };
    let whole = silent(5, &everywhere(u64::MAX));
    assert_eq!(whole.failure, None);
    assert!(whole.device_writes > 10);
    for write in 1..=whole.device_writes {
        let report = silent(5, &everywhere(write));
        assert_eq!(report.failure, None, "cut at write {write}");
    }
}

#[test]
fn limits_shorten_a_run() {
    let narrow = Limits { requests: Some(3), clients: Some(1), ..Limits::default() };
    for seed in 1..20 {
        let report = silent(seed, &narrow);
        assert_eq!(report.failure, None, "seed {seed}");
        assert!(report.changes <= 3 + 3, "seed {seed} made {} changes", report.changes);
    }
}
