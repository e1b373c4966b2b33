//! Several machines that share a device, and whose file locks do not see each other.

use std::time::Duration;

use base::ErrorKind;
use parallax_vdi::{Error, OpenOptions, Store};
use runtime::Runtime;

use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, disk, format_options, open_options, read, write};

async fn open_on(ram: &Ram, runtime: &Runtime, boot: u8) -> Result<Store, Error> {
    let options = OpenOptions { boot_id: [boot; 16], ..open_options(runtime.random()) };
    let opened = Store::open(ram.device(STORE_BLOCKS), runtime.clone(), &options).await;
    opened.map(|(store, _)| store)
}

/// Runs `work` on a store that machine 1 has formatted.
fn on_shared_device<F: Future<Output = ()> + 'static>(
    work: impl FnOnce(Runtime, Ram) -> F + 'static,
) {
    let ram = Ram::default();
    run(1, |runtime| async move {
        Store::format(&ram.device(STORE_BLOCKS), &runtime, &format_options()).await.unwrap();
        work(runtime, ram).await;
    });
}

/// A clean store was not watched at all, and of two that watched a crashed one, neither saw the
/// other: both went on.
#[test]
fn two_machines_do_not_both_open_a_store() {
    for (one, other) in [(1, 2), (2, 1), (2, 3)] {
        for delay_ms in [0, 1, 4000, 4999, 5001] {
            for is_clean in [true, false] {
                on_shared_device(move |runtime, ram| async move {
                    if !is_clean {
                        // Its machine dies with it.
                        let crashed = Ram::clone(&ram);
                        run(9, |runtime| async move {
                            open_on(&crashed, &runtime, 1).await.unwrap();
                        });
                    }
                    let (first, later) = (ram.clone(), ram.clone());
                    let (clock, late) = (runtime.clone(), runtime.clone());
                    let a = runtime.spawn(async move { open_on(&first, &clock, one).await });
                    let b = runtime.spawn(async move {
                        late.sleep(Duration::from_millis(delay_ms)).await;
                        open_on(&later, &late, other).await
                    });
                    let opened = [a.await, b.await];
                    let count = opened.iter().filter(|opened| opened.is_ok()).count();
                    let case = (one, other, delay_ms, is_clean);
                    assert!(count <= 1, "{case:?}: both opened it");
                    for error in opened.into_iter().filter_map(Result::err) {
                        assert_eq!(error.kind(), ErrorKind::Busy, "{case:?}: {error}");
                    }
                });
            }
        }
    }
}

#[test]
fn a_running_daemon_is_not_disturbed_by_another_machine() {
    on_shared_device(|runtime, ram| async move {
        let store = open_on(&ram, &runtime, 1).await.unwrap();
        store.create("web01", 1 << 30).await.unwrap();
        let disk = disk(&store, "web01").await;
        for round in 1..4 {
            write(&disk, 0, &[round; 4096]).await;
            let error = open_on(&ram, &runtime, 2).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy);
            assert_eq!(read(&disk, 0, 4096).await, [round; 4096]);
        }
        store.close().await.unwrap();
        open_on(&ram, &runtime, 2).await.expect("it is free now");
    });
}

/// File locks keep others out on one machine, so nothing is waited for.
#[test]
fn the_machine_that_used_a_store_last_opens_it_at_once() {
    on_shared_device(|runtime, ram| async move {
        for is_clean in [true, false, true] {
            let before = runtime.now();
            let store = open_on(&ram, &runtime, 1).await.unwrap();
            assert!(runtime.now().since(before) < Duration::from_millis(100), "{is_clean}");
            if is_clean {
                store.close().await.unwrap();
            }
        }
    });
}
