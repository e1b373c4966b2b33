//! How long it takes to open a store.

use std::time::Duration;

use device::{Backend, Device, Operation};
use parallax_vdi::Store;
use runtime::Runtime;
use std::rc::Rc;

use crate::ram::run;
use crate::{STORE_BLOCKS, open_options, with_store};

/// A device whose reads take a while, however many there are at a time.
struct Slow {
    backend: Rc<dyn Backend>,
    runtime: Runtime,
}

const READ_TIME: Duration = Duration::from_millis(10);

impl Backend for Slow {
    fn submit(&self, operation: Operation) {
        let (backend, runtime) = (Rc::clone(&self.backend), self.runtime.clone());
        drop(self.runtime.spawn(async move {
            if matches!(operation, Operation::Read { .. }) {
                runtime.sleep(READ_TIME).await;
            }
            backend.submit(operation);
        }));
    }

    fn block_count(&self) -> u64 {
        self.backend.block_count()
    }

    fn describe(&self) -> String {
        "slow".to_owned()
    }
}

/// Pages of tables were read one after the other: a large store opened slowly.
#[test]
fn tables_are_read_many_pages_at_a_time() {
    let (ram, ()) = with_store(|_, store| async move {
        for number in 0..1600 {
            store.create(&format!("web{number}"), 1 << 30).await.unwrap();
        }
        store.close().await.unwrap();
    });
    run(2, |runtime| async move {
        let slow = Slow { backend: ram.backend(STORE_BLOCKS), runtime: runtime.clone() };
        let options = open_options(runtime.random());
        let before = runtime.now();
        let device = Device::new(Rc::new(slow));
        let (store, _) = Store::open(device, runtime.clone(), &options).await.expect("opens");
        let took = runtime.now().since(before);
        assert_eq!(store.stats().vdi_count, 1600);
        assert!(took < 50 * READ_TIME, "opening took {took:?}");
    });
}
