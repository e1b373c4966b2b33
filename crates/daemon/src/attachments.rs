//! Disks that are attached to virtual machines over vhost-user, each at a socket of its own.
//!
//! They outlive the daemon: a file beside the control socket remembers them, so that the next
//! daemon of the same store listens where virtual machines look for it, and what was in flight is
//! done again. The file has the life of the sockets: in /run both are gone after a boot, and so are
//! the virtual machines. It is written after every change; one that is lost costs attachments, and
//! no data.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use api::{Attach, Attachment, Error, Kind};
use runtime::Runtime;
use runtime::reactor::{Io, Listener};
use serde::{Deserialize, Serialize};

use crate::config::check_socket_path;
use crate::sockets::Sockets;

/// How long requests in flight may take to be completed when the daemon stops, or a disk is
/// detached; what takes longer is done again when the virtual machine connects the next time.
const DRAIN_MAX: Duration = Duration::from_secs(1);

/// What sockets of attachments are for.
const PURPOSE: &str = "vhost-user";

/// Most attachments: each takes descriptors, and a virtual machine some memory.
const ATTACHMENTS_MAX: usize = 4096;

/// Where attachments are remembered.
#[derive(Clone, Debug)]
pub(crate) struct State {
    file: PathBuf,
    store: PathBuf,
}

/// What the file holds.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Remembered {
    /// The store that they belong to.
    store: PathBuf,
    attachments: Vec<Attach>,
}

impl State {
    /// Beside the control socket: `/run/parallax.sock` goes with
    /// `/run/parallax.attachments.json`.
    pub(crate) fn beside(socket: &Path, store: &Path) -> Self {
        let store = std::path::absolute(store).unwrap_or_else(|_| store.to_owned());
        Self { file: socket.with_extension("attachments.json"), store }
    }

    /// What was attached when the last daemon of this store ended.
    fn read(&self) -> Vec<Attach> {
        let shown = self.file.display();
        let text = match std::fs::read(&self.file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                tracing::warn!(%error, "cannot read {shown}: nothing is attached");
                return Vec::new();
            }
        };
        match serde_json::from_slice::<Remembered>(&text) {
            Ok(remembered) if remembered.store == self.store => remembered.attachments,
            // The daemon of another store had this control socket.
            Ok(_) => Vec::new(),
            Err(error) => {
                tracing::warn!(%error, "{shown} makes no sense: nothing is attached");
                Vec::new()
            }
        }
    }

    fn write(&self, attachments: Vec<Attach>) {
        let remembered = Remembered { store: self.store.clone(), attachments };
        let new = self.file.with_extension("new");
        let written = serde_json::to_vec_pretty(&remembered)
            .map_err(std::io::Error::from)
            .and_then(|text| std::fs::write(&new, text))
            .and_then(|()| std::fs::rename(&new, &self.file));
        if let Err(error) = written {
            let shown = self.file.display();
            tracing::warn!(%error, "cannot write {shown}: the next daemon will not know it all");
        }
    }
}

/// What is attached, by path of the socket.
pub(crate) struct Attachments {
    io: Io,
    server: vhost::Server,
    state: State,
    sockets: Arc<Sockets>,
    attached: RefCell<BTreeMap<String, vhost::Attachment>>,
}

impl Attachments {
    pub(crate) fn new(
        runtime: &Runtime,
        io: &Io,
        catalog: &Rc<dyn disk::Catalog>,
        state: &State,
        sockets: &Arc<Sockets>,
    ) -> Self {
        let config = vhost::Config { drain_timeout: DRAIN_MAX };
        let server = vhost::Server::new(runtime, io, Rc::clone(catalog), config);
        let (io, state, sockets) = (io.clone(), state.clone(), Arc::clone(sockets));
        Self { io, server, state, sockets, attached: RefCell::default() }
    }

    /// Attaches what was attached when the last daemon ended. What cannot be attached any more is
    /// told to the log.
    pub(crate) fn restore(&self) {
        for request in self.state.read() {
            let (disk, path) = (request.disk.clone(), request.vhost_user.clone());
            match self.start(request) {
                Ok(()) => tracing::info!(disk, path, "attached again"),
                Err(error) => tracing::warn!(disk, path, "not attached again: {error}"),
            }
        }
    }

    /// Serves a disk at a new socket.
    pub(crate) fn attach(&self, request: Attach) -> Result<Attachment, Error> {
        let path = request.vhost_user.clone();
        self.start(request)?;
        self.remember();
        self.find(&path)
    }

    fn start(&self, request: Attach) -> Result<(), Error> {
        let Attach { disk, vhost_user } = request;
        let path = Path::new(&vhost_user);
        if !path.is_absolute() {
            let message = format!("{vhost_user}: the path of a socket must begin with /");
            return Err(Error::new(Kind::Invalid, message));
        }
        check_socket_path(path)?;
        if let Some(there) = self.attached.borrow().get(&vhost_user) {
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
        self.attached.borrow_mut().insert(vhost_user, attachment);
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
            let name = attachment.name();
            if let Some(rest) = name.strip_prefix(from)
                && (rest.is_empty() || rest.starts_with('@'))
            {
                attachment.rename(format!("{to}{rest}"));
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
        let attached = self.list().into_iter();
        let attachments = attached.map(|it| Attach { disk: it.disk, vhost_user: it.vhost_user });
        self.state.write(attachments.collect());
    }
}

fn describe(path: &str, attachment: &vhost::Attachment) -> Attachment {
    Attachment {
        disk: attachment.name(),
        vhost_user: path.to_owned(),
        connected: attachment.is_connected(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_belongs_to_one_store() {
        let dir = tempfile::tempdir().unwrap();
        let state = |store| State::beside(&dir.path().join("p.sock"), Path::new(store));
        assert_eq!(state("/s").read(), []);
        let attached =
            vec![Attach { disk: "a@s".to_owned(), vhost_user: "/run/vm.sock".to_owned() }];
        state("/s").write(attached.clone());
        assert_eq!(state("/s").read(), attached);
        assert_eq!(state("/other").read(), []);
        let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(files.len(), 1, "{files:?}");
    }

    #[test]
    fn nonsense_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::beside(&dir.path().join("p.sock"), Path::new("/s"));
        for text in ["", "{", "[]", r#"{"store":"/s"}"#] {
            std::fs::write(&state.file, text).unwrap();
            assert_eq!(state.read(), [], "{text}");
        }
    }
}
