//! Disks that are block devices of this machine (ublk), by number: `/dev/ublkbN`.
//!
//! They outlive the daemon: the kernel keeps them, and whoever uses them waits. The next daemon of the
//! same store takes over what it finds remembered (`remembered.rs`). A number is remembered before the
//! kernel is asked for it, and forgotten after the device is gone, so no device is left to nobody.

mod aside;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use api::{Attachment, Error, Kind};
use runtime::Runtime;
use runtime::reactor::Io;
use serde::{Deserialize, Serialize};
use ublk::Taken;

use crate::remembered::Remembered;
use aside::Aside;
pub use aside::called as called_aside;

/// How long requests in flight may take to be completed when the daemon stops; the next one does again
/// what takes longer.
const DRAIN_MAX: Duration = Duration::from_secs(1);

/// Numbers that are tried for a new device.
const NUMBERS_MAX: u32 = 4096;

/// What a path begins with, before the number.
const PREFIX: &str = "/dev/ublkb";

/// A device as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Listed {
    /// `NAME` or `NAME@SNAPSHOT`.
    disk: String,
    /// Its number.
    number: u32,
    /// Digest of the identity of the disk that it was made of.
    identity: u64,
}

struct Device {
    listed: Listed,
    /// Whether it is being made, taken over or taken away.
    busy: bool,
}

/// What is attached, by number.
pub(crate) struct Devices {
    runtime: Runtime,
    catalog: Rc<dyn disk::Catalog>,
    server: ublk::Server,
    remembered: Remembered<Listed>,
    attached: RefCell<BTreeMap<u32, Device>>,
}

impl Devices {
    pub(crate) fn new(
        runtime: &Runtime,
        io: &Io,
        catalog: &Rc<dyn disk::Catalog>,
        socket: &Path,
        store: &Path,
    ) -> Rc<Self> {
        let config = ublk::Config { drain_timeout: DRAIN_MAX };
        Rc::new(Self {
            runtime: runtime.clone(),
            catalog: Rc::clone(catalog),
            server: ublk::Server::new(runtime, io, config),
            remembered: Remembered::beside(socket, store, "ublk"),
            attached: RefCell::default(),
        })
    }

    /// Takes over what the last daemon has left, by and by.
    pub(crate) fn restore(self: &Rc<Self>) {
        let mut attached = self.attached.borrow_mut();
        for listed in self.remembered.read() {
            let number = listed.number;
            attached.insert(number, Device { listed, busy: true });
            drop(self.runtime.spawn(Rc::clone(self).take_over(number)));
        }
    }

    async fn take_over(self: Rc<Self>, number: u32) {
        let Some(Listed { disk, identity, .. }) = self.listed(number) else { return };
        let opened = self.catalog.open(&disk).await;
        let now = opened.as_ref().ok().map(|disk| disk.identity().digest());
        match self.server.take_over(number, identity, opened, start).await {
            Ok(Taken::Whole) => tracing::info!(disk, number, "a block device is served again"),
            Ok(Taken::Anew) => {
                tracing::info!(disk, number, "a block device was made anew");
                self.change(number, |device| {
                    device.listed.identity = now.unwrap_or(identity);
                });
                self.remember();
            }
            Ok(Taken::Replaced) => tracing::warn!(
                disk,
                "the disk was rolled back or replaced, or its device failed: whoever uses \
                 {PREFIX}{number} gets errors until it is detached"
            ),
            Err(error @ (ublk::Error::Foreign(_) | ublk::Error::Disk(_))) => {
                tracing::warn!(disk, number, "not attached again: {error}");
                self.attached.borrow_mut().remove(&number);
                return self.remember();
            }
            // The next daemon may have more luck.
            Err(error) => tracing::warn!(disk, number, "not attached again: {}", full(&error)),
        }
        self.change(number, |device| device.busy = false);
    }

    /// Makes a block device of a disk.
    pub(crate) async fn attach(&self, disk: String) -> Result<Attachment, Error> {
        let opened = self.catalog.open(&disk).await;
        let opened = opened.map_err(|error| Error::new(error.kind, error.to_string()))?;
        let identity = opened.identity().digest();
        for number in 0..NUMBERS_MAX {
            if self.attached.borrow().contains_key(&number) {
                continue;
            }
            let listed = Listed { disk: disk.clone(), number, identity };
            self.attached.borrow_mut().insert(number, Device { listed, busy: true });
            self.remember();
            match self.server.add(number, Rc::clone(&opened), start).await {
                Ok(()) => {
                    self.change(number, |device| device.busy = false);
                    return self.find(number);
                }
                Err(ublk::Error::Exists(_)) => self.forget(number),
                // The next daemon sees what has become of it.
                Err(error @ ublk::Error::Leaving) => return Err(refusal(&error)),
                Err(error) => {
                    self.forget(number);
                    return Err(refusal(&error));
                }
            }
        }
        let message = format!("{PREFIX}0 to {PREFIX}{} are there already", NUMBERS_MAX - 1);
        Err(Error::new(Kind::Busy, message))
    }

    /// Takes a block device away; `None` if the path is none of them.
    pub(crate) async fn detach(&self, path: &str) -> Option<Result<Attachment, Error>> {
        let number = number(path)?;
        let was = self.find(number).ok()?;
        let identity = self.listed(number)?.identity;
        let busy = self.change(number, |device| std::mem::replace(&mut device.busy, true));
        if busy == Some(true) {
            let message = format!("{path} is being attached or detached");
            return Some(Err(Error::new(Kind::Busy, message)));
        }
        match self.server.remove(number, identity).await {
            Ok(()) | Err(ublk::Error::Foreign(_)) => {
                self.forget(number);
                Some(Ok(was))
            }
            Err(error) => {
                self.change(number, |device| device.busy = false);
                Some(Err(refusal(&error)))
            }
        }
    }

    /// What is attached, in order of number.
    pub(crate) fn list(&self) -> Vec<Attachment> {
        let attached = self.attached.borrow();
        attached.values().map(|device| self.describe(device)).collect()
    }

    /// What the server has counted, by name.
    pub(crate) fn metrics(&self) -> api::FrontendMetrics {
        let values = self.server.metrics().values();
        values.into_iter().map(|(name, value, _)| (name.to_owned(), value)).collect()
    }

    /// A VDI has another name: devices of it, and of its snapshots, are those of the same VDI as before.
    pub(crate) fn rename(&self, from: &str, to: &str) {
        for device in self.attached.borrow_mut().values_mut() {
            if let Some(name) = crate::attachments::renamed(&device.listed.disk, from, to) {
                device.listed.disk = name;
            }
        }
        self.remember();
    }

    /// Leaves all to the next daemon, and keeps in mind what they were.
    pub(crate) async fn end(&self) {
        self.server.leave().await;
    }

    fn listed(&self, number: u32) -> Option<Listed> {
        self.attached.borrow().get(&number).map(|device| device.listed.clone())
    }

    fn change<T>(&self, number: u32, change: impl FnOnce(&mut Device) -> T) -> Option<T> {
        self.attached.borrow_mut().get_mut(&number).map(change)
    }

    fn find(&self, number: u32) -> Result<Attachment, Error> {
        let attached = self.attached.borrow();
        let device = attached.get(&number);
        let device = device.ok_or_else(|| Error::new(Kind::NotFound, "it was detached"))?;
        Ok(self.describe(device))
    }

    fn describe(&self, Device { listed, busy }: &Device) -> Attachment {
        Attachment {
            disk: listed.disk.clone(),
            vhost_user: None,
            ublk: Some(format!("{PREFIX}{}", listed.number)),
            // One that is being made is served before it is there.
            connected: !busy && self.server.serves(listed.number),
        }
    }

    fn forget(&self, number: u32) {
        self.attached.borrow_mut().remove(&number);
        self.remember();
    }

    fn remember(&self) {
        let attached = self.attached.borrow();
        self.remembered.write(attached.values().map(|device| device.listed.clone()).collect());
    }
}

/// Sees to it that nobody uses a block device of ours that is to be taken away. Blocks as long as the
/// device does.
pub(crate) fn check_unused(path: &str) -> Result<(), Error> {
    let Some(number) = number(path) else { return Ok(()) };
    match aside::run(Aside::Use { number }) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(in_use(path)),
        // Whatever is wrong with it is seen when it is taken away.
        _ => Ok(()),
    }
}

/// The refusal of a device that is in use, or that does not answer.
pub(crate) fn in_use(path: &str) -> Error {
    Error::new(Kind::Busy, format!("{path} is in use: unmount what is on it first"))
}

fn number(path: &str) -> Option<u32> {
    let number: u32 = path.strip_prefix(PREFIX)?.parse().ok()?;
    // By another spelling nobody would find it in use.
    (format!("{PREFIX}{number}") == path).then_some(number)
}

/// Lets another process make a block device: what it waits for is answered here.
async fn start(number: u32) -> Result<(), ublk::Error> {
    let (done, outcome) = tokio::sync::oneshot::channel();
    let run = move || {
        let server = std::process::id();
        // Whoever waited may have left.
        let _ = done.send(aside::run(Aside::Start { number, server }));
    };
    let failure = |source| ublk::Error::Kernel { action: "start a ublk device", source };
    let thread = std::thread::Builder::new().name("parallax-ublk".to_owned());
    thread.spawn(run).map_err(failure)?;
    outcome.await.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into())).map_err(failure)
}

fn refusal(error: &ublk::Error) -> Error {
    Error::new(error.kind(), full(error))
}

fn full(error: &ublk::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
