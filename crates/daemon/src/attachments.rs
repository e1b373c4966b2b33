//! Disks that are attached to virtual machines over vhost-user, each at a socket of its own.
//!
//! They outlive the daemon: the next daemon of the same store listens where virtual machines look
//! for it (`remembered.rs`), and what was in flight is done again.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use api::{Attachment, Error, Kind};
use runtime::Runtime;
use runtime::reactor::{Io, Listener};
use serde::{Deserialize, Serialize};

use crate::config::check_socket_path;
use crate::remembered::Remembered;
use crate::sockets::Sockets;

/// How long requests in flight may take to be completed when the daemon stops, or a disk is
/// detached; what takes longer is done again when the virtual machine connects the next time.
const DRAIN_MAX: Duration = Duration::from_secs(1);

/// What sockets of attachments are for.
const PURPOSE: &str = "vhost-user";

/// Most attachments: each takes descriptors, and a virtual machine some memory.
const ATTACHMENTS_MAX: usize = 4096;

/// An attachment as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Listed {
    /// `NAME` or `NAME@SNAPSHOT`.
    disk: String,
    /// Path of the socket.
    vhost_user: String,
}

/// What is attached, by path of the socket.
pub(crate) struct Attachments {
    io: Io,
    server: vhost::Server,
    state: Remembered<Listed>,
    sockets: Arc<Sockets>,
    attached: RefCell<BTreeMap<String, vhost::Attachment>>,
}

impl Attachments {
    pub(crate) fn new(
        runtime: &Runtime,
        io: &Io,
        catalog: &Rc<dyn disk::Catalog>,
        socket: &Path,
        store: &Path,
        sockets: &Arc<Sockets>,
    ) -> Self {
        let state = Remembered::beside(socket, store, "attachments");
        let config = vhost::Config { drain_timeout: DRAIN_MAX };
        let server = vhost::Server::new(runtime, io, Rc::clone(catalog), config);
        let (io, sockets) = (io.clone(), Arc::clone(sockets));
        Self { io, server, state, sockets, attached: RefCell::default() }
    }

    /// Attaches what was attached when the last daemon ended. What cannot be attached any more is
    /// told to the log.
    pub(crate) fn restore(&self) {
        for Listed { disk, vhost_user: path } in self.state.read() {
            match self.start(disk.clone(), &path) {
                Ok(()) => tracing::info!(disk, path, "attached again"),
                Err(error) => tracing::warn!(disk, path, "not attached again: {error}"),
            }
        }
    }

    /// Serves a disk at a new socket.
    pub(crate) fn attach(&self, disk: String, vhost_user: &str) -> Result<Attachment, Error> {
        self.start(disk, vhost_user)?;
        self.remember();
        self.find(vhost_user)
    }

    fn start(&self, disk: String, vhost_user: &str) -> Result<(), Error> {
        let path = Path::new(vhost_user);
        if !path.is_absolute() {
            let message = format!("{vhost_user}: the path of a socket must begin with /");
            return Err(Error::new(Kind::Invalid, message));
        }
        check_socket_path(path)?;
        if let Some(there) = self.attached.borrow().get(vhost_user) {
            let name = there.name();
            let message = format!(
                "{name} is attached at {vhost_user} already; to end that: \
                 parallax detach {vhost_user}"
            );
            return Err(Error::new(Kind::Exists, message));
        }
        if self.attached.borrow().len() >= ATTACHMENTS_MAX {
            let message = format!("{ATTACHMENTS_MAX} disks are attached: detach one first");
            return Err(Error::new(Kind::Busy, message));
        }
        let listener = Listener::adopt(&self.io, self.sockets.unix(PURPOSE, path, false)?.into())
            .map_err(|e| {
            self.sockets.close(PURPOSE, path);
            Error::system(&format!("listen on {vhost_user}"), &e)
        })?;
        let attachment = self.server.attach(disk, listener);
        self.attached.borrow_mut().insert(vhost_user.to_owned(), attachment);
        Ok(())
    }

    /// Ends an attachment: nothing is in flight afterwards.
    pub(crate) async fn detach(&self, path: &str) -> Result<Attachment, Error> {
        let was = self.find(path)?;
        let removed = self.attached.borrow_mut().remove(path);
        self.remember();
        if let Some(attachment) = removed {
            self.sockets.close(PURPOSE, Path::new(path));
            attachment.end().await;
        }
        Ok(was)
    }

    /// What is attached, in order of path.
    pub(crate) fn list(&self) -> Vec<Attachment> {
        let attached = self.attached.borrow();
        attached.iter().map(|(path, attachment)| describe(path, attachment)).collect()
    }

    /// Virtual machines that are connected now.
    pub(crate) fn connection_count(&self) -> u64 {
        self.server.metrics().connections_open
    }

    /// What the server has counted, by name.
    pub(crate) fn metrics(&self) -> api::FrontendMetrics {
        let values = self.server.metrics().values();
        values.into_iter().map(|(name, value, _)| (name.to_owned(), value)).collect()
    }

    /// A VDI has another name: attachments of it, and of its snapshots, are those of the same VDI
    /// as before.
    pub(crate) fn rename(&self, from: &str, to: &str) {
        let mut changed = false;
        for attachment in self.attached.borrow().values() {
            if let Some(name) = renamed(&attachment.name(), from, to) {
                attachment.rename(name);
                changed = true;
            }
        }
        if changed {
            self.remember();
        }
    }

    /// Ends all, and keeps in mind what they were.
    pub(crate) async fn end(&self) {
        let attached = std::mem::take(&mut *self.attached.borrow_mut());
        let attachments: Vec<_> = attached.into_values().collect();
        vhost::Attachment::end_all(&attachments).await;
    }

    fn find(&self, path: &str) -> Result<Attachment, Error> {
        match self.attached.borrow().get(path) {
            Some(attachment) => Ok(describe(path, attachment)),
            None => Err(Error::new(
                Kind::NotFound,
                format!("nothing is attached at {path}; `parallax attachments` lists what is"),
            )),
        }
    }

    fn remember(&self) {
        let attached = self.attached.borrow();
        let listed = attached
            .iter()
            .map(|(path, attachment)| Listed { disk: attachment.name(), vhost_user: path.clone() });
        self.state.write(listed.collect());
    }
}

fn describe(path: &str, attachment: &vhost::Attachment) -> Attachment {
    Attachment {
        disk: attachment.name(),
        vhost_user: Some(path.to_owned()),
        ublk: None,
        connected: attachment.is_connected(),
    }
}

/// The new name of `NAME` or `NAME@SNAPSHOT` when a VDI is renamed; `None` if it is another VDI.
pub(crate) fn renamed(name: &str, from: &str, to: &str) -> Option<String> {
    let rest = name.strip_prefix(from)?;
    (rest.is_empty() || rest.starts_with('@')).then(|| format!("{to}{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_follows_its_disk_and_no_other() {
        let renamed = |name| renamed(name, "a", "b");
        assert_eq!(renamed("a").as_deref(), Some("b"));
        assert_eq!(renamed("a@s").as_deref(), Some("b@s"));
        assert_eq!(renamed("ab"), None);
        assert_eq!(renamed("c"), None);
    }
}
