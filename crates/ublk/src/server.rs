//! The block devices of one thread.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::poll_fn;
use std::io::ErrorKind;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use disk::{Disk, DiskError};
use runtime::Runtime;
use runtime::reactor::Io;
use runtime::sync::Signal;

use crate::control::Control;
use crate::end::End;
use crate::error::Error;
use crate::metrics::{Metrics, Snapshot};
use crate::protocol::{DeviceInfo, Stage};
use crate::queues::KernelQueues;
use crate::session::Session;
use crate::sys::close_left;

/// How often the kernel is asked whether the earlier server of a device has gone, and how long it may
/// take. A server that was killed with every slot of a queue in use is noticed by the timeout of its
/// requests only, which is 30 s.
const HANDOVER_PERIOD: Duration = Duration::from_millis(5);
const HANDOVER_MAX: Duration = Duration::from_secs(90);

/// What an operator can set.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Time that requests in flight have to be completed when devices are left to the next daemon;
    /// it does again those that take longer.
    pub drain_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { drain_timeout: Duration::from_secs(10) }
    }
}

/// Serves block devices on the thread of its runtime. Clones share it.
#[derive(Clone)]
pub struct Server(Rc<Inner>);

struct Inner {
    runtime: Runtime,
    io: Io,
    config: Config,
    metrics: Rc<Metrics>,
    /// What is served, by number.
    served: RefCell<Vec<(u32, Rc<Served>)>>,
    leaving: Cell<bool>,
}

/// A device that is served.
struct Served {
    session: Rc<Session>,
    ended: Cell<bool>,
    changed: Signal,
}

impl Server {
    /// A server without devices.
    #[must_use]
    pub fn new(runtime: &Runtime, io: &Io, config: Config) -> Self {
        Self(Rc::new(Inner {
            runtime: runtime.clone(),
            io: io.clone(),
            config,
            metrics: Rc::default(),
            served: RefCell::default(),
            leaving: Cell::new(false),
        }))
    }

    /// Makes the block device `/dev/ublkbN` of a disk. It is there on return. `start` is to let somebody
    /// call [`start`], in another process where this one must not wait in the kernel.
    ///
    /// # Errors
    /// `Exists` if the number is taken; `Absent` and `TooOld` if the kernel cannot do it; nothing is
    /// left behind.
    pub async fn add(
        &self,
        number: u32,
        disk: Rc<dyn Disk>,
        start: impl AsyncFnOnce(u32) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.0.stay()?;
        let control = self.0.control().await?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let info = DeviceInfo::new(number, processors, disk.identity().digest());
        let info = control.add(number, &info).await?;
        let served = async {
            control.describe(number, &*disk).await?;
            self.0.serve(number, &info, Some(disk), start(number)).await
        };
        let outcome = served.await;
        if outcome.is_err() && !self.0.leaving.get() {
            // The first error says more.
            let _ = control.delete(number).await;
        }
        outcome
    }

    /// Takes over the block device that an earlier server has left, or makes it if it is gone with all
    /// who used it. `identity` is the digest of the disk that it was made of; if `disk` is another one,
    /// or is not there, whoever uses the device gets errors. Returns whether that is so. `start` is as for
    /// [`Self::add`].
    ///
    /// # Errors
    /// `Foreign` if the device is not the one that was left.
    pub async fn take_over(
        &self,
        number: u32,
        identity: u64,
        disk: Result<Rc<dyn Disk>, DiskError>,
        start: impl AsyncFnOnce(u32) -> Result<(), Error>,
    ) -> Result<Taken, Error> {
        self.0.stay()?;
        let control = self.0.control().await?;
        let Some(info) = self.0.left(&control, number, identity).await? else {
            self.add(number, disk?, start).await?;
            return Ok(Taken::Anew);
        };
        let disk = disk.ok().filter(|disk| disk.identity().digest() == identity);
        let taken = if disk.is_some() { Taken::Whole } else { Taken::Replaced };
        self.0.serve(number, &info, disk, control.end_recovery(number)).await?;
        Ok(taken)
    }

    /// Takes a block device away, whether it is served or was left: its users get errors. What was
    /// under way is finished.
    ///
    /// # Errors
    /// `Foreign` if it was not made of the disk with this digest; what the kernel says.
    pub async fn remove(&self, number: u32, identity: u64) -> Result<(), Error> {
        let control = self.0.control().await?;
        let Some(info) = control.find(number).await? else { return Ok(()) };
        if info.identity.get() != identity {
            return Err(Error::Foreign(number));
        }
        control.stop(number).await?;
        let served = self.0.find(number);
        if let Some(served) = served {
            while !served.ended.get() {
                served.changed.changed().await;
            }
        }
        control.delete(number).await
    }

    /// Leaves all devices to the next server: no more requests are taken, those in flight are completed.
    /// Returns when that is so, after [`Config::drain_timeout`] at the latest.
    pub async fn leave(&self) {
        self.0.leaving.set(true);
        let served: Vec<_> = self.0.served.borrow().iter().map(|(_, it)| Rc::clone(it)).collect();
        for it in &served {
            it.session.leave();
        }
        let sleep = self.0.runtime.sleep(self.0.config.drain_timeout);
        let sessions: Vec<_> = served.iter().map(|it| Rc::clone(&it.session)).collect();
        drop(self.0.runtime.spawn(async move {
            sleep.await;
            for session in sessions {
                session.abandon();
            }
        }));
        for it in served {
            while !it.ended.get() {
                it.changed.changed().await;
            }
        }
    }

    /// Whether a device is served.
    #[must_use]
    pub fn serves(&self, number: u32) -> bool {
        self.0.find(number).is_some()
    }

    /// What was done so far.
    #[must_use]
    pub fn metrics(&self) -> Snapshot {
        self.0.metrics.snapshot()
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ublk::Server")
    }
}

/// What was found of a device that an earlier server has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Everything: its users notice nothing.
    Whole,
    /// Its disk is not what its users know by it: they get errors until it is removed.
    Replaced,
    /// Nothing: it was made anew, of the disk as it is.
    Anew,
}

/// Makes the block device of a device that was added, and whose queues a process serves or is about to.
/// Returns when it is there. Its table of partitions is read before that: whoever calls this waits in the
/// kernel for the server, and cannot be killed meanwhile.
///
/// # Errors
/// `Absent` if the kernel has no ublk; what it says.
pub async fn start(io: &Io, number: u32, server: u32) -> Result<(), Error> {
    Control::open(io)?.start(number, server).await
}

impl Inner {
    fn stay(&self) -> Result<(), Error> {
        if self.leaving.get() { Err(Error::Leaving) } else { Ok(()) }
    }

    fn find(&self, number: u32) -> Option<Rc<Served>> {
        let served = self.served.borrow();
        served.iter().find(|(it, _)| *it == number).map(|(_, it)| Rc::clone(it))
    }

    async fn control(&self) -> Result<Control, Error> {
        let control = Control::open(&self.io)?;
        control.check().await?;
        Ok(control)
    }

    /// Waits until the earlier server of a device has gone, and begins to take it over; `None` if there
    /// is no such device, or not any more.
    async fn left(
        &self,
        control: &Control,
        number: u32,
        identity: u64,
    ) -> Result<Option<DeviceInfo>, Error> {
        let deadline = self.runtime.now().after(HANDOVER_MAX);
        loop {
            self.stay()?;
            let Some(info) = control.find(number).await? else { return Ok(None) };
            if info.identity.get() != identity || !info.is_served_here() {
                return Err(Error::Foreign(number));
            }
            match info.stage() {
                // Its server was killed before there was a block device, or after.
                Stage::Dead => control.delete(number).await?,
                Stage::Quiesced if control.start_recovery(number).await? => return Ok(Some(info)),
                Stage::Live | Stage::Quiesced | Stage::Unknown => {}
            }
            if self.runtime.now() >= deadline {
                return Err(Error::Foreign(number));
            }
            self.runtime.sleep(HANDOVER_PERIOD).await;
        }
    }

    /// Serves a device from now on. Returns when the kernel lets its requests through, which is when
    /// `begun` is done.
    async fn serve(
        self: &Rc<Self>,
        number: u32,
        info: &DeviceInfo,
        disk: Option<Rc<dyn Disk>>,
        begun: impl Future<Output = Result<(), Error>>,
    ) -> Result<(), Error> {
        self.stay()?;
        // Memory that the kernel frees by writing to this device must not be waited for here.
        if let Err(errno) = rustix::process::configure_io_flusher_behavior(true) {
            tracing::debug!(%errno, "the kernel does not take this thread for one that frees memory");
        }
        let queues = self.open(number, info).await?;
        let session = Session::new(&self.runtime, disk, &self.metrics);
        let (ended, changed) = (Cell::new(false), Signal::default());
        let served = Rc::new(Served { session, ended, changed });
        self.served.borrow_mut().push((number, Rc::clone(&served)));
        drop(self.runtime.spawn(Rc::clone(self).run(number, Rc::clone(&served), queues)));
        unless_ended(&served, begun).await
    }

    async fn open(&self, number: u32, info: &DeviceInfo) -> Result<KernelQueues, Error> {
        let deadline = self.runtime.now().after(HANDOVER_MAX);
        loop {
            close_left();
            match KernelQueues::open(&self.io, number, info) {
                // Something of the earlier server is left.
                Err(error)
                    if error.kind() == ErrorKind::ResourceBusy && self.runtime.now() < deadline =>
                {
                    self.runtime.sleep(HANDOVER_PERIOD).await;
                }
                opened => return opened.map_err(Error::kernel("open a ublk device")),
            }
        }
    }

    /// The life of a device's task.
    async fn run(self: Rc<Self>, number: u32, served: Rc<Served>, queues: KernelQueues) {
        match served.session.run(queues).await {
            End::Io(error) => tracing::warn!(number, %error, "a block device cannot be served"),
            end => tracing::info!(number, "a block device is not served any more: {end}"),
        }
        self.served.borrow_mut().retain(|(_, it)| !Rc::ptr_eq(it, &served));
        served.ended.set(true);
        served.changed.notify();
    }
}

/// Waits for `begun`, which does not come if the session ends before.
async fn unless_ended(
    served: &Served,
    begun: impl Future<Output = Result<(), Error>>,
) -> Result<(), Error> {
    let mut begun = Box::pin(begun);
    let mut changed = Box::pin(served.changed.changed());
    poll_fn(|context| {
        if let Poll::Ready(outcome) = begun.as_mut().poll(context) {
            return Poll::Ready(outcome);
        }
        changed.as_mut().poll(context).map(|()| Err(Error::Leaving))
    })
    .await
}
