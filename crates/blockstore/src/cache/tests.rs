//! The cache against a model that remembers what was inserted last, and its resistance to scans.

use std::collections::BTreeMap;
use std::rc::Rc;

use base::{BirthLabel, Buffer};
use proptest::prelude::*;

use super::*;

const CHARGE: usize = BLOCK_SIZE + OVERHEAD_BYTES;

fn node(blocks: usize, mark: u8) -> Node {
    let mut buffer = Buffer::zeroed(blocks);
    buffer.bytes_mut()[0] = mark;
    Node::from_verified(Rc::new(buffer))
}

fn entry(pba: u64, hash: u64) -> Entry {
    Entry::mapped(Pba::new(pba), hash, BirthLabel::new(1))
}

fn get(cache: &NodeCache, pba: u64, hash: u64) -> Option<Node> {
    cache.get(Pba::new(pba), &entry(pba, hash))
}

/// As a reader does: what is not found is read and inserted. Whether it was found.
fn read(cache: &NodeCache, pba: u64) -> bool {
    let found = get(cache, pba, pba).is_some();
    if !found {
        cache.insert(Pba::new(pba), pba, node(1, 0));
    }
    found
}

fn touch(cache: &NodeCache, pba: u64) {
    read(cache, pba);
}

#[test]
fn a_stale_node_is_dropped_not_served() {
    let cache = NodeCache::new(10 * CHARGE);
    cache.insert(Pba::new(7), 0xabcd_0000_0000_0001, node(1, 1));
    assert!(get(&cache, 7, 0x1234_0000_0000_0001).is_some(), "entries hold 48 bits of the hash");
    assert!(get(&cache, 7, 2).is_none());
    assert!(get(&cache, 7, 1).is_none(), "it is gone, whatever is asked for");
    let expected = CacheStats {
        hits: 1,
        misses: 2,
        stale: 1,
        capacity_bytes: 10 * CHARGE,
        ..CacheStats::default()
    };
    assert_eq!(cache.stats(), expected);
}

#[test]
fn the_memory_of_an_evicted_node_is_freed() {
    let cache = NodeCache::new(2 * CHARGE);
    let first = node(1, 1);
    cache.insert(Pba::new(1), 1, first.clone());
    assert_eq!(Rc::strong_count(first.buffer()), 2);
    cache.insert(Pba::new(2), 2, node(1, 2));
    cache.insert(Pba::new(3), 3, node(1, 3));
    assert_eq!(Rc::strong_count(first.buffer()), 1);
    assert_eq!((cache.stats().nodes, cache.stats().evicted), (2, 1));
}

#[test]
fn a_longer_buffer_is_charged_in_full_and_one_beyond_the_cache_is_not_kept() {
    let cache = NodeCache::new(8 * CHARGE);
    cache.insert(Pba::new(1), 1, node(4, 1));
    assert_eq!(cache.stats().bytes, 4 * BLOCK_SIZE + OVERHEAD_BYTES);
    cache.insert(Pba::new(1), 2, node(16, 1));
    assert_eq!(cache.stats().nodes, 0, "nor is what it was to replace");
}

#[test]
fn nodes_in_use_outlive_a_scan() {
    let cache = NodeCache::new(100 * CHARGE);
    // Upper nodes, used once for every ten leaves of a scan; a leaf is used 16 times in a row.
    let mut leaf = 1000;
    let mut round = || {
        for _ in 0..10 {
            leaf += 1;
            (0..16).for_each(|_| touch(&cache, leaf));
        }
        (0..20).filter(|&pba| read(&cache, pba)).count()
    };
    assert_eq!(round(), 0);
    for number in 0..1000 {
        assert_eq!(round(), 20, "in round {number}");
    }
}

#[test]
fn a_working_set_outlives_scans_of_twice_the_cache() {
    let cache = NodeCache::new(100 * CHARGE);
    // Wanted again after they left the small queue, so they get into the main one.
    for scanned in [0..0, 500..600, 600..610] {
        scanned.for_each(|pba| touch(&cache, pba));
        (0..20).for_each(|pba| touch(&cache, pba));
    }
    for scan in 0..50 {
        for leaf in 0..200 {
            (0..16).for_each(|_| touch(&cache, 1000 + scan * 200 + leaf));
        }
        let hits = (0..20).filter(|&pba| read(&cache, pba)).count();
        assert_eq!(hits, 20, "after scan {scan}");
    }
}

#[test]
fn a_node_that_is_asked_for_again_gets_into_the_main_queue() {
    let cache = NodeCache::new(100 * CHARGE);
    (0..150).for_each(|pba| touch(&cache, pba));
    assert!(!read(&cache, 20), "evicted, but remembered");
    (1000..1090).for_each(|pba| touch(&cache, pba));
    assert!(read(&cache, 20), "the scan went through the small queue");
}

#[derive(Clone, Debug)]
enum Step {
    Get { pba: u64, hash: u64 },
    Insert { pba: u64, hash: u64, blocks: usize },
    Remove { pba: u64 },
    SetCapacity { nodes: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (pba, hash) = (0u64..40, 0u64..3);
    let step = prop_oneof![
        6 => (pba.clone(), hash.clone()).prop_map(|(pba, hash)| Step::Get { pba, hash }),
        6 => (pba.clone(), hash, 1usize..3)
            .prop_map(|(pba, hash, blocks)| Step::Insert { pba, hash, blocks }),
        1 => pba.prop_map(|pba| Step::Remove { pba }),
        1 => (0usize..30).prop_map(|nodes| Step::SetCapacity { nodes }),
    ];
    proptest::collection::vec(step, 1..400)
}

proptest! {
    #[test]
    fn only_what_was_inserted_last_is_served_within_the_bound(steps in steps()) {
        let cache = NodeCache::new(10 * CHARGE);
        let mut newest: BTreeMap<u64, (u64, u8)> = BTreeMap::new();
        let (mut gets, mut mark) = (0u64, 0u8);
        for step in steps {
            match step {
                Step::Get { pba, hash } => {
                    gets += 1;
                    if let Some(found) = get(&cache, pba, hash) {
                        let expected = Some(&(hash, found.block().0[0]));
                        prop_assert_eq!(newest.get(&pba), expected);
                    } else if newest.get(&pba).is_some_and(|(newest, _)| *newest != hash) {
                        newest.remove(&pba);
                    }
                }
                Step::Insert { pba, hash, blocks } => {
                    mark = mark.wrapping_add(1);
                    newest.insert(pba, (hash, mark));
                    cache.insert(Pba::new(pba), hash, node(blocks, mark));
                    let fits = blocks * BLOCK_SIZE + OVERHEAD_BYTES <= cache.stats().capacity_bytes;
                    prop_assert_eq!(get(&cache, pba, hash).is_some(), fits);
                    gets += 1;
                }
                Step::Remove { pba } => {
                    newest.remove(&pba);
                    cache.remove(Pba::new(pba));
                }
                Step::SetCapacity { nodes } => cache.set_capacity(nodes * CHARGE),
            }
            let stats = cache.stats();
            prop_assert!(stats.bytes <= stats.capacity_bytes);
            prop_assert_eq!(stats.hits + stats.misses, gets);
            let state = cache.state.borrow();
            prop_assert_eq!(state.slots.len(), stats.nodes);
            prop_assert!(state.ghosts.sequences.len() <= state.ghosts.order.len());
            let charged: usize = (0..40)
                .filter_map(|pba| state.slots.get(&Pba::new(pba)))
                .map(|&slot| state.slab.peek(slot).charge)
                .sum();
            prop_assert_eq!(charged, stats.bytes);
            prop_assert!(state.small_bytes <= stats.bytes);
        }
        cache.set_capacity(0);
        prop_assert_eq!((cache.stats().nodes, cache.stats().bytes), (0, 0));
    }
}
