//! Unix sockets as files: a stale one is replaced, a live one is respected, our own is removed.
//!
//! A daemon takes its store's lock before it touches a socket, so two daemons of one store never
//! meet here. Two of different stores that are started at the same instant with the same socket
//! may: the later one then has it.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use api::{Error, Kind};
use rustix::fs::Mode;

/// A socket that this process listens on. Dropping it removes the file, if it is still ours.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// Makes way for a socket at `path`, has `bind` create it, and watches over the file.
    /// A `private` socket can be used by this user only, from the instant when it appears.
    ///
    /// # Errors
    /// `Busy` if somebody listens there; `Exists` if something else than a socket is there.
    pub(crate) fn bind<T>(
        path: &Path,
        private: bool,
        bind: impl FnOnce(&Path) -> std::io::Result<T>,
    ) -> Result<(T, Self), Error> {
        remove_stale(path)?;
        let mask = private.then(|| rustix::process::umask(Mode::from_raw_mode(0o177)));
        let bound = bind(path);
        if let Some(mask) = mask {
            rustix::process::umask(mask);
        }
        let what = format!("listen on {}", path.display());
        let listener = bound.map_err(|e| Error::system(&what, &e))?;
        let file = fs::symlink_metadata(path).map_err(|e| Error::system(&what, &e))?;
        Ok((listener, Self::known(path.to_owned(), file.dev(), file.ino())))
    }

    /// Watches over the file of a socket that this process listens on already, and knows by this.
    pub(crate) fn known(path: PathBuf, device: u64, inode: u64) -> Self {
        Self { path, device, inode }
    }

    /// Device and inode.
    pub(crate) fn identity(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// Whether the file at its path is still the socket's.
    pub(crate) fn is_ours(&self) -> bool {
        fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == self.identity())
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_ours()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove socket");
        }
    }
}

/// Removes a socket that nobody listens on any more.
fn remove_stale(path: &Path) -> Result<(), Error> {
    let shown = path.display();
    let file = match fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::system(&format!("look at {shown}"), &error)),
    };
    if !file.file_type().is_socket() {
        return Err(Error::new(
            Kind::Exists,
            format!("{shown} is there already, and is not a socket: name another path"),
        ));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::new(
            Kind::Busy,
            format!("another daemon listens on {shown}: stop it, or name another socket"),
        )),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|e| Error::system(&format!("remove the stale socket {shown}"), &e)),
        Err(error) => Err(Error::system(&format!("see who listens on {shown}"), &error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn stale_sockets_are_replaced_and_live_ones_respected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, file) = SocketFile::bind(&path, true, |p| UnixListener::bind(p)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        let busy = SocketFile::bind(&path, false, |p| UnixListener::bind(p)).unwrap_err();
        assert_eq!(busy.kind, Kind::Busy);

        // As after kill -9: the file is there, nobody listens.
        drop(listener);
        std::mem::forget(file);
        let (_listener, file) = SocketFile::bind(&path, false, |p| UnixListener::bind(p)).unwrap();
        drop(file);
        assert!(!path.exists(), "removed at the end");
    }

    #[test]
    fn what_is_not_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        fs::write(&path, "precious").unwrap();
        let refused = SocketFile::bind(&path, false, |p| UnixListener::bind(p)).unwrap_err();
        assert_eq!(refused.kind, Kind::Exists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");

        fs::remove_file(&path).unwrap();
        let (_listener, file) = SocketFile::bind(&path, false, |p| UnixListener::bind(p)).unwrap();
        // Kept alive under another name, so that the inode number cannot come back.
        fs::rename(&path, dir.path().join("moved")).unwrap();
        let successor = UnixListener::bind(&path).unwrap();
        drop(file);
        assert!(path.exists(), "a successor's socket is not removed");
        drop(successor);
    }
}
