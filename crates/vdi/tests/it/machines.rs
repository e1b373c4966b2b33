//! Several machines that share a device, and whose file locks do not see each other.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use base::{Buffer, ErrorKind};
use device::{Device, Operation};
use disk::Request;
use parallax_vdi::{Error, OpenOptions, Store};
use runtime::Runtime;

use crate::gate::{Gate, with_gated_store};
use crate::ram::{Ram, run};
use crate::stuck::writes_slot;
use crate::{STORE_BLOCKS, disk, format_options, open_options, read, reopened, with_store, write};

async fn open_on(ram: &Ram, runtime: &Runtime, boot: u8) -> Result<Store, Error> {
    open_device_on(ram.device(STORE_BLOCKS), runtime, boot).await
}

async fn open_device_on(device: Device, runtime: &Runtime, boot: u8) -> Result<Store, Error> {
    let options = OpenOptions { boot_id: [boot; 16], ..open_options(runtime.random()) };
    Store::open(device, runtime.clone(), &options).await.map(|(store, _)| store)
}

fn write_of(byte: u8, fua: bool) -> Request {
    Request::Write { offset: 0, length: 4096, data: Buffer::from_bytes(&[byte; 4096]), fua }
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

/// While it was being closed a store did not beat: when that took five seconds, another machine
/// opened it.
#[test]
fn a_store_that_is_being_closed_is_not_opened_elsewhere() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[5; 4096]).await;
        gate.hold(writes_slot);
        let closing = runtime.spawn(async move { store.close().await });
        runtime.sleep(Duration::from_secs(1)).await;
        assert_eq!(gate.held(), 1);
        let other = open_device_on(gate.behind(), &runtime, 2).await;
        gate.release();
        let _ = closing.await;
        assert_eq!(other.expect_err("two machines have it").kind(), ErrorKind::Busy);
    });
}

/// Beats waited for the periodic flush.
#[test]
fn a_store_whose_flush_is_slow_is_not_opened_elsewhere() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[5; 4096]).await;
        gate.hold(|operation| matches!(operation, Operation::Flush { .. }));
        runtime.sleep(Duration::from_secs(2)).await;
        assert_eq!(gate.held(), 1);
        let other = open_device_on(gate.behind(), &runtime, 2).await;
        gate.release();
        assert_eq!(other.expect_err("two machines have it").kind(), ErrorKind::Busy);
    });
}

/// Recovery did not beat. The second machine's write was acknowledged, durable, and lost when the
/// first one went on.
#[test]
fn a_store_that_is_recovered_slowly_is_not_opened_elsewhere() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[5; 4096]).await;
    });
    let at = ram.filled_with(5).unwrap();
    let shared = ram.clone();
    let (opened, first) = run(3, move |runtime| async move {
        let ram = shared;
        let gate = Gate::new(ram.backend(STORE_BLOCKS));
        gate.hold(
            move |operation| matches!(operation, Operation::Read { at: read, .. } if *read == at),
        );
        let (device, clock) = (gate.device(), runtime.clone());
        let one = runtime.spawn(async move { open_device_on(device, &clock, 1).await.map(|_| ()) });
        runtime.sleep(Duration::from_secs(1)).await;
        assert_eq!(gate.held(), 1);
        let other = open_on(&ram, &runtime, 2).await;
        let opened = other.is_ok();
        if let Ok(store) = &other {
            disk(store, "web01").await.submit(write_of(6, true)).await.unwrap();
        }
        gate.release();
        let first = one.await;
        (opened, first)
    });
    assert!(!opened, "both opened it; the first got {first:?}");
    reopened(&ram, |_, store, _| async move {
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [5; 4096]);
    });
}

/// A machine that stood still for longer than the lease time, and goes on.
#[test]
fn a_daemon_that_was_taken_for_dead_stops() {
    with_gated_store(|runtime, gate, store| async move {
        store.create("web01", 1 << 30).await.unwrap();
        let disk = disk(&store, "web01").await;
        write(&disk, 0, &[5; 4096]).await;
        gate.hold(|_| true);
        let other = open_device_on(gate.behind(), &runtime, 2).await;
        gate.release();
        let other = other.expect("nobody beats");
        runtime.sleep(Duration::from_secs(3)).await;
        let outcome = disk.submit(write_of(6, false)).await;
        assert!(outcome.is_err(), "both acknowledge writes");
        drop(other);
    });
}

/// Two machines whose service managers start their daemons again and again: each claimed the store
/// while the other waited, and none of them ever opened it.
#[test]
fn of_two_machines_that_keep_trying_one_opens_the_store() {
    let ram = Ram::default();
    run(1, |runtime| async move {
        Store::format(&ram.device(STORE_BLOCKS), &runtime, &format_options()).await.unwrap();
        let opened = Rc::new(Cell::new(0));
        for (boot, start_ms) in [(1, 2000), (2, 0)] {
            let (ram, clock, opened) = (ram.clone(), runtime.clone(), Rc::clone(&opened));
            drop(runtime.spawn(async move {
                clock.sleep(Duration::from_millis(start_ms)).await;
                loop {
                    if open_on(&ram, &clock, boot).await.is_ok() {
                        opened.set(opened.get() + 1);
                        return;
                    }
                    clock.sleep(Duration::from_millis(100)).await;
                }
            }));
        }
        runtime.sleep(Duration::from_secs(600)).await;
        assert_eq!(opened.get(), 1, "daemons that opened it in ten minutes");
    });
}
