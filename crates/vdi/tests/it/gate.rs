//! A device that holds operations back for as long as a test wants, or finds no space for writes:
//! a slow or full one, as others see it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use base::{Block, Buffer, Pba};
use device::{Backend, Cause, Device, DeviceError, Operation};
use disk::{Disk, Request};
use parallax_vdi::{OpenOptions, Reuse, Store};
use runtime::Runtime;

use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, format_options, open_options};

type Wanted = Rc<dyn Fn(&Operation) -> bool>;
type Refused = Rc<dyn Fn(Pba, &Block) -> bool>;

/// Passes operations on, but keeps those that it was told to hold. Clones share it.
#[derive(Clone)]
pub(crate) struct Gate {
    inner: Rc<dyn Backend>,
    wanted: Rc<RefCell<Option<Wanted>>>,
    held: Rc<RefCell<Vec<Operation>>>,
    refused: Rc<RefCell<Option<(Cause, Refused)>>>,
}

impl Gate {
    pub(crate) fn new(inner: Rc<dyn Backend>) -> Self {
        Self { inner, wanted: Rc::default(), held: Rc::default(), refused: Rc::default() }
    }

    /// The device behind the gate, as another machine sees it.
    pub(crate) fn behind(&self) -> Device {
        Device::new(Rc::clone(&self.inner))
    }

    pub(crate) fn device(&self) -> Device {
        Device::new(Rc::new(self.clone()))
    }

    /// Holds the operations that are `wanted` from now on.
    pub(crate) fn hold(&self, wanted: impl Fn(&Operation) -> bool + 'static) {
        *self.wanted.borrow_mut() = Some(Rc::new(wanted));
    }

    /// Lets everything pass, also what was held.
    pub(crate) fn release(&self) {
        *self.wanted.borrow_mut() = None;
        for operation in self.held.take() {
            self.inner.submit(operation);
        }
    }

    /// Lets the operation pass that has been held longest.
    pub(crate) fn pass_one(&self) {
        let mut held = self.held.borrow_mut();
        if !held.is_empty() {
            self.inner.submit(held.remove(0));
        }
    }

    /// Finds no space below for writes that begin with a `refused` block from now on.
    pub(crate) fn refuse(&self, refused: impl Fn(Pba, &Block) -> bool + 'static) {
        *self.refused.borrow_mut() = Some((Cause::NoSpace, Rc::new(refused)));
    }

    /// Fails writes at these places from now on.
    pub(crate) fn fail(&self, failed: impl Fn(Pba) -> bool + 'static) {
        let failed: Refused = Rc::new(move |at, _| failed(at));
        *self.refused.borrow_mut() = Some((Cause::Errno(5), failed));
    }

    fn refuses(&self, operation: &Operation) -> Option<Cause> {
        let Operation::Write { at, blocks, .. } = operation else { return None };
        let first = blocks.first().and_then(|slice| slice.blocks().first())?;
        let (cause, refused) = self.refused.borrow().clone()?;
        refused(*at, first).then_some(cause)
    }

    /// Number of operations that are held.
    pub(crate) fn held(&self) -> usize {
        self.held.borrow().len()
    }
}

impl Backend for Gate {
    fn submit(&self, operation: Operation) {
        let wanted = self.wanted.borrow().clone();
        if wanted.is_some_and(|wanted| wanted(&operation)) {
            self.held.borrow_mut().push(operation);
        } else if let Some(cause) = self.refuses(&operation)
            && let Operation::Write { at, done, .. } = operation
        {
            done.send(Err(DeviceError::new(cause, at)));
        } else {
            self.inner.submit(operation);
        }
    }

    fn block_count(&self) -> u64 {
        self.inner.block_count()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

/// As [`crate::with_store`], on a device behind a gate.
pub(crate) fn with_gated_store<T: 'static, F: Future<Output = T> + 'static>(
    work: impl FnOnce(Runtime, Gate, Store) -> F + 'static,
) -> (Ram, T) {
    with_gated_store_that_reuses(Reuse::Late, work)
}

/// As [`with_gated_store`], with this choice of the blocks that are taken first.
pub(crate) fn with_gated_store_that_reuses<T: 'static, F: Future<Output = T> + 'static>(
    reuse: Reuse,
    work: impl FnOnce(Runtime, Gate, Store) -> F + 'static,
) -> (Ram, T) {
    let ram = Ram::default();
    let gate = Gate::new(ram.backend(STORE_BLOCKS));
    let outcome = run(1, |runtime| async move {
        let device = gate.device();
        Store::format(&device, &runtime, &format_options()).await.unwrap();
        let options = OpenOptions { reuse, ..open_options(runtime.random()) };
        let (store, _) = Store::open(device, runtime.clone(), &options).await.expect("opens");
        work(runtime, gate, store).await
    });
    (ram, outcome)
}

/// Whether `work` ends within a minute.
pub(crate) async fn ends(runtime: &Runtime, work: impl Future<Output = ()> + 'static) -> bool {
    let done = Rc::new(Cell::new(false));
    let flag = Rc::clone(&done);
    drop(runtime.spawn(async move {
        work.await;
        flag.set(true);
    }));
    for _ in 0..60 * 4 {
        runtime.sleep(Duration::from_millis(250)).await;
        if done.get() {
            return true;
        }
    }
    false
}

/// Starts so many writers of `each` writes of `length` bytes to places of their own; how many
/// writes have been acknowledged.
pub(crate) fn start_writers(
    runtime: &Runtime,
    disk: &Rc<dyn Disk>,
    writer_count: u64,
    each: u64,
    length: usize,
) -> Rc<Cell<u64>> {
    let done = Rc::new(Cell::new(0));
    for writer in 0..writer_count {
        let (disk, done) = (Rc::clone(disk), Rc::clone(&done));
        drop(runtime.spawn(async move {
            for round in 0..each {
                let data = Buffer::from_bytes(&vec![(writer + round) as u8 | 1; length]);
                let offset = (1 + writer * each + round) * length as u64;
                if disk.submit(Request::Write { offset, length, data, fua: false }).await.is_err() {
                    return;
                }
                done.set(done.get() + 1);
            }
        }));
    }
    done
}
