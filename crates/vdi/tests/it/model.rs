//! The engine against plain arrays: random requests of odd sizes, snapshots, clones, checkpoints,
//! crashes and restarts on a small address space, so that things collide.

use std::collections::BTreeMap;

use disk::Request;

use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, disk, format_options, open, read, write};
use parallax_vdi::{Store, Target};

const SIZE: usize = 300 * 4096;

/// A small generator of our own: the same on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) as usize % bound
    }
}

#[test]
fn the_engine_is_an_array_with_memory() {
    for seed in 1..=24 {
        one_run(seed);
    }
}

fn one_run(seed: u64) {
    let ram = Ram::default();
    let device = ram.clone();
    run(seed, |runtime| async move {
        Store::format(&device.device(STORE_BLOCKS), &runtime, &format_options()).await.unwrap();
    });
    let mut random = Random(seed);
    // Contents by name: VDIs and `vdi@number` snapshots.
    let mut model: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for session in 0..4 {
        let device = ram.clone();
        (random, model) = run(seed ^ session, |runtime| async move {
            let (store, _) = open(&device, &runtime).await;
            for (name, contents) in &model {
                let disk = disk(&store, name).await;
                let bytes = read(&disk, 0, SIZE.min(1 << 20)).await;
                assert!(bytes == contents[..bytes.len()], "seed {seed}: {name} after a restart");
            }
            if model.is_empty() {
                store.create("vdi0", SIZE as u64).await.unwrap();
                model.insert("vdi0".into(), vec![0; SIZE]);
            }
            for step in 0..150 {
                let serial = (session * 150 + step) as u8;
                one_step(&store, &mut random, &mut model, serial).await;
            }
            if random.below(2) == 0 {
                store.close().await.unwrap();
            }
            (random, model)
        });
        // After a crash as after a clean end.
        crate::check::assert_sound(&ram, seed);
    }
}

async fn one_step(
    store: &Store,
    random: &mut Random,
    model: &mut BTreeMap<String, Vec<u8>>,
    serial: u8,
) {
    let names: Vec<String> = model.keys().cloned().collect();
    let vdis: Vec<&String> = names.iter().filter(|name| !name.contains('@')).collect();
    let vdi = vdis[random.below(vdis.len())].clone();
    let start = random.below(SIZE);
    let length = (1 + random.below(40_000)).min(SIZE - start);
    match random.below(20) {
        0..8 => {
            let fill = vec![serial.wrapping_mul(31) | 1; length];
            write(&disk(store, &vdi).await, start as u64, &fill).await;
            model.get_mut(&vdi).unwrap()[start..start + length].copy_from_slice(&fill);
        }
        8 | 9 => {
            let (offset, length) = (start as u64, length as u64);
            let request = if random.below(2) == 0 {
                Request::Discard { offset, length, fua: false }
            } else {
                Request::WriteZeroes { offset, length, fua: true, no_hole: true, fast_only: false }
            };
            disk(store, &vdi).await.submit(request).await.unwrap();
            model.get_mut(&vdi).unwrap()[start..start + length as usize].fill(0);
        }
        10 => {
            let number = store.snapshot(&vdi, None).await.unwrap();
            model.insert(format!("{vdi}@{number}"), model[&vdi].clone());
        }
        11 if vdis.len() < 6 => {
            let source = &names[random.below(names.len())];
            let name = format!("clone{serial}");
            if !model.contains_key(&name) {
                store.clone_vdi(&Target::parse(source), &name).await.unwrap();
                model.insert(name, model[source].clone());
            }
        }
        12 => {
            let prefix = format!("{vdi}@");
            if let Some(snapshot) = names.iter().find(|name| name.starts_with(&prefix)) {
                store.rollback(&vdi, &snapshot[prefix.len()..]).await.unwrap();
                model.insert(vdi.clone(), model[snapshot].clone());
            }
        }
        13 if names.len() > 3 => {
            let victim = &names[random.below(names.len())];
            if victim.contains('@') || vdis.len() > 1 {
                store.remove(&Target::parse(victim)).await.unwrap();
                let prefix = format!("{victim}@");
                model.retain(|name, _| name != victim && !name.starts_with(&prefix));
            }
        }
        14 => store.checkpoint().await.unwrap(),
        15 => drop(store.collect_garbage().await.unwrap()),
        _ => {
            let name = &names[random.below(names.len())];
            let bytes = read(&disk(store, name).await, start as u64, length).await;
            assert!(bytes == model[name][start..start + length], "{name} at {start}+{length}");
        }
    }
}
