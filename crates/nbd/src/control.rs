//! The handle by which a server ends a connection that runs by itself.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Waker};

use disk::Disk;
use runtime::Time;

use crate::end::End;
use crate::session::Budget;

/// Shared by a connection and its server.
#[derive(Default)]
pub(crate) struct Control {
    shutting_down: Cell<bool>,
    severed: Cell<bool>,
    stalled: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    served: RefCell<Option<Served>>,
}

/// What a connection is about once it is past negotiation.
struct Served {
    disk: Rc<dyn Disk>,
    held: Rc<Budget>,
}

impl Control {
    /// Says which task to wake.
    pub(crate) fn register(&self, context: &Context<'_>) {
        match &mut *self.waker.borrow_mut() {
            Some(known) => known.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
    }

    /// Says which disk the connection serves, and what it has in flight.
    pub(crate) fn attach(&self, disk: Rc<dyn Disk>, held: Rc<Budget>) {
        *self.served.borrow_mut() = Some(Served { disk, held });
    }

    /// Whether the connection should end.
    pub(crate) fn check(&self) -> Result<(), End> {
        if self.severed.get() {
            Err(End::Severed)
        } else if self.shutting_down.get() {
            Err(End::ShuttingDown)
        } else if self.stalled.get() {
            Err(End::Stalled)
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
        let severed = self.served.borrow().as_ref().is_some_and(|served| served.disk.severed());
        if severed {
            self.sever();
        }
    }

    /// Ends the connection if its client holds what others wait for, and does not move.
    pub(crate) fn cut_if_stalled(&self, now: Time) {
        let stalled =
            self.served.borrow().as_ref().is_some_and(|served| served.held.is_stalled(now));
        if stalled {
            self.stalled.set(true);
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }
}
