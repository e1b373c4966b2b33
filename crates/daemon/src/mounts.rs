//! Mounts that the daemon serves for their keepers (`parallax mount`), each at a connection of its
//! own; see [`api::mount`].
//!
//! The daemon keeps nothing: a keeper whose daemon has ended connects to the next one.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use api::{Error, Mounted, mount};
use runtime::Runtime;
use runtime::reactor::{Channel, Filled, Io, Listener};
use runtime::sync::Signal;

use crate::sockets::Sockets;

/// Most keepers that are connected: each takes memory for the kernel's messages.
const KEEPERS_MAX: usize = 64;

/// How long a keeper may take to greet.
const GREETING_MAX: Duration = Duration::from_secs(5);

/// How long a listener rests when the kernel has no descriptor left for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Device numbers of /dev/fuse.
const FUSE_DEVICE: (u32, u32) = (10, 229);

/// What is mounted.
pub(crate) struct Mounts {
    runtime: Runtime,
    server: fuse::Server,
    served: RefCell<BTreeMap<u64, Served>>,
    /// Counts mounts, to tell them apart.
    next: Cell<u64>,
    /// Connections that are open.
    keepers: Cell<usize>,
    leaving: Cell<bool>,
    changed: Signal,
}

struct Served {
    dir: String,
    mount: fuse::Mount,
}

impl Mounts {
    pub(crate) fn new(
        runtime: &Runtime,
        io: &Io,
        directory: Rc<dyn disk::directory::Directory>,
    ) -> Rc<Self> {
        Rc::new(Self {
            runtime: runtime.clone(),
            server: fuse::Server::new(runtime, io, directory),
            served: RefCell::default(),
            next: Cell::default(),
            keepers: Cell::default(),
            leaving: Cell::default(),
            changed: Signal::default(),
        })
    }

    /// Lets keepers in. Only those of this user can connect.
    pub(crate) fn listen(
        self: &Rc<Self>,
        io: &Io,
        sockets: &Sockets,
        control: &Path,
    ) -> Result<Rc<Listener>, Error> {
        let path = mount::socket(control);
        let listener = Listener::adopt(io, sockets.unix("mounts", &path, true)?.into())
            .map_err(|e| Error::system(&format!("listen on {}", path.display()), &e))?;
        let listener = Rc::new(listener);
        drop(self.runtime.spawn(Rc::clone(self).accept(Rc::clone(&listener))));
        Ok(listener)
    }

    /// What is mounted, in order of connection.
    pub(crate) fn list(&self) -> Vec<Mounted> {
        self.served.borrow().values().map(|it| Mounted { dir: it.dir.clone() }).collect()
    }

    /// What the server has counted, by name.
    pub(crate) fn metrics(&self) -> api::FrontendMetrics {
        let values = self.server.metrics().values();
        values.into_iter().map(|(name, value, _)| (name.to_owned(), value)).collect()
    }

    /// Leaves all mounts to the next daemon, when what is under way is answered.
    pub(crate) async fn leave(&self, door: Rc<Listener>) {
        self.leaving.set(true);
        door.close();
        for served in self.served.borrow().values() {
            served.mount.leave();
        }
        while !self.served.borrow().is_empty() {
            self.changed.changed().await;
        }
    }

    async fn accept(self: Rc<Self>, listener: Rc<Listener>) {
        while !self.leaving.get() {
            match listener.accept_channel().await {
                Ok((channel, _)) if !self.leaving.get() => {
                    drop(self.runtime.spawn(Rc::clone(&self).attend(channel)));
                }
                Ok(_) => {}
                Err(_) if self.leaving.get() => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept the keeper of a mount");
                    self.runtime.sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn attend(self: Rc<Self>, channel: Channel) {
        self.keepers.set(self.keepers.get() + 1);
        let channel = Rc::new(channel);
        let farewell = if self.keepers.get() > KEEPERS_MAX {
            Some(failed(&"there are too many mounts"))
        } else {
            let greeted = self.greeted(&channel).await;
            match greeted {
                Ok((dir, kernel)) => self.serve(&channel, dir, kernel).await,
                Err(error) => Some(failed(&error)),
            }
        };
        if let Some(farewell) = farewell {
            // The keeper may have gone.
            let _ = channel.send(&farewell, &[]).await;
        }
        self.keepers.set(self.keepers.get() - 1);
    }

    /// Waits for the greeting, not for ever.
    async fn greeted(&self, channel: &Rc<Channel>) -> Result<(String, OwnedFd), Nonsense> {
        let sleep = self.runtime.sleep(GREETING_MAX);
        let silent = Rc::new(Cell::new(true));
        let (still_silent, waiting) = (Rc::clone(&silent), Rc::downgrade(channel));
        drop(self.runtime.spawn(async move {
            sleep.await;
            if let Some(channel) = waiting.upgrade().filter(|_| still_silent.get()) {
                channel.shutdown();
            }
        }));
        let outcome = greeted(channel).await;
        silent.set(false);
        outcome
    }

    /// Serves a mount to its end; what its keeper is told then.
    async fn serve(&self, channel: &Channel, dir: String, kernel: OwnedFd) -> Option<Vec<u8>> {
        let mount = match self.server.mount(kernel) {
            Ok(mount) => mount,
            Err(error) => return Some(failed(&error)),
        };
        if self.leaving.get() {
            return None;
        }
        let number = self.next.replace(self.next.get() + 1);
        let served = Served { dir: dir.clone(), mount: mount.clone() };
        self.served.borrow_mut().insert(number, served);
        // A keeper that has gone leaves the mount to us, for as long as we live.
        let _ = channel.send(&[mount::SERVING], &[]).await;
        tracing::info!(dir, "a mount is served");
        let end = mount.serve().await;
        self.served.borrow_mut().remove(&number);
        self.changed.notify();
        match end {
            fuse::End::Left => {
                tracing::info!(dir, "a mount is left to the next daemon");
                None
            }
            fuse::End::Unmounted => {
                tracing::info!(dir, "a mount is gone");
                Some(vec![mount::UNMOUNTED])
            }
            end => {
                let source = std::error::Error::source(&end).map(ToString::to_string);
                let reason = source.unwrap_or_default();
                tracing::warn!(dir, reason, "a mount cannot be served: {end}");
                Some(failed(&format!("{end}: {reason}")))
            }
        }
    }
}

fn failed(error: &impl std::fmt::Display) -> Vec<u8> {
    [&[mount::FAILED], error.to_string().as_bytes()].concat()
}

/// Why a greeting is none.
#[derive(Debug, thiserror::Error)]
enum Nonsense {
    #[error("the keeper says what the daemon does not understand: are both of one version?")]
    Words,
    #[error("the keeper gives no connection to the kernel")]
    Descriptor,
    #[error("the connection to the keeper failed")]
    Io(#[from] std::io::Error),
}

/// What a keeper says first: the mount point, and the connection to the kernel.
async fn greeted(channel: &Channel) -> Result<(String, OwnedFd), Nonsense> {
    let mut files = Vec::new();
    let mut head = [0; mount::GREETING.len() + 2];
    receive(channel, &mut head, &mut files).await?;
    let (greeting, length) = head.split_at(mount::GREETING.len());
    let length = length.first_chunk().map_or(0, |&length| usize::from(u16::from_le_bytes(length)));
    if greeting != mount::GREETING || length > mount::PATH_BYTES_MAX {
        return Err(Nonsense::Words);
    }
    let mut dir = vec![0; length];
    receive(channel, &mut dir, &mut files).await?;
    let dir = String::from_utf8(dir).map_err(|_| Nonsense::Words)?;
    let kernel = files.pop().filter(|_| files.is_empty()).ok_or(Nonsense::Descriptor)?;
    let device = rustix::fs::fstat(&kernel).map_err(std::io::Error::from)?.st_rdev;
    if (rustix::fs::major(device), rustix::fs::minor(device)) != FUSE_DEVICE {
        return Err(Nonsense::Descriptor);
    }
    Ok((dir, kernel))
}

async fn receive(
    channel: &Channel,
    into: &mut [u8],
    files: &mut Vec<OwnedFd>,
) -> Result<(), Nonsense> {
    match channel.fill(into, files, 1).await? {
        Filled::Whole => Ok(()),
        Filled::Ended | Filled::TooManyFiles => Err(Nonsense::Words),
    }
}
