//! The handle by which a server ends a connection that runs by itself.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Waker};

use disk::Disk;

use crate::end::End;

/// Shared by a connection and its server.
#[derive(Default)]
pub(crate) struct Control {
    shutting_down: Cell<bool>,
    severed: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    disk: RefCell<Option<Rc<dyn Disk>>>,
}

impl Control {
    /// Says which task to wake.
    pub(crate) fn register(&self, context: &Context<'_>) {
        match &mut *self.waker.borrow_mut() {
            Some(known) => known.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
    }

    /// Says which disk the connection serves.
    pub(crate) fn attach(&self, disk: Rc<dyn Disk>) {
        *self.disk.borrow_mut() = Some(disk);
    }

    /// Whether the connection should end.
    pub(crate) fn check(&self) -> Result<(), End> {
        if self.severed.get() {
            Err(End::Severed)
        } else if self.shutting_down.get() {
            Err(End::ShuttingDown)
        } else {
            Ok(())
        }
    }

    /// Ends the connection because the server is shutting down.
    pub(crate) fn shut_down(&self) {
        self.shutting_down.set(true);
        self.wake();
    }

    /// Ends the connection because its disk is dead.
    pub(crate) fn sever(&self) {
        self.severed.set(true);
        self.wake();
    }

    /// Ends the connection if its disk is dead.
    pub(crate) fn sever_if_dead(&self) {
        let severed = self.disk.borrow().as_ref().is_some_and(|disk| disk.severed());
        if severed {
            self.sever();
        }
    }

    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }
}
