//! The sockets that the process listens on, from its start to its end.
//!
//! An engine that is started anew, because its device failed, listens on the same ones. So does the
//! program that this process becomes in an upgrade: they stay open, clients that connect meanwhile wait,
//! and nobody finds a socket missing. The next program learns which is which from a variable of its
//! environment, [`VARIABLE`]: `PID NUMBER=KEY NUMBER=KEY…`, where a key is what a socket is for,
//! and its path or address as it was configured, percent-encoded.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use api::{Error, percent_decode, percent_encode};

use crate::socket_file::SocketFile;

/// The variable by which sockets are handed over.
pub(crate) const VARIABLE: &str = "PARALLAX_SOCKETS";

/// Sockets by key. Clones of their descriptors are what is listened on.
#[derive(Debug, Default)]
pub(crate) struct Sockets(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Of the program before, not asked for yet.
    inherited: BTreeMap<String, OwnedFd>,
    held: BTreeMap<String, Held>,
}

#[derive(Debug)]
struct Held {
    fd: OwnedFd,
    /// Removes the file of a unix socket when it is dropped.
    _file: Option<SocketFile>,
}

impl Sockets {
    /// Takes what the program before has left.
    pub(crate) fn inherit() -> Self {
        let said = std::env::var(VARIABLE).unwrap_or_default();
        let inherited = parse(&said, std::process::id())
            .filter_map(|(number, key)| Some((key, runtime::inherited::take(number).ok()?)))
            .collect();
        Self(Mutex::new(State { inherited, held: BTreeMap::new() }))
    }

    /// Listens on a unix socket; see [`SocketFile::bind`]. One for another purpose is another one.
    pub(crate) fn unix(
        &self,
        purpose: &str,
        path: &Path,
        private: bool,
    ) -> Result<UnixListener, Error> {
        let fd = self.listen(&key(purpose, &path.display()), |inherited| match inherited {
            Some(fd) => match SocketFile::adopt(path) {
                Ok(file) => Ok((fd, Some(file))),
                // Somebody has taken the file away: nobody can reach this one any more.
                Err(_) => bind(path, private),
            },
            None => bind(path, private),
        })?;
        Ok(fd.into())
    }

    /// Listens on the first of `addresses` that can be had; `name` is what was configured.
    pub(crate) fn tcp(
        &self,
        purpose: &str,
        name: &str,
        addresses: &[SocketAddr],
    ) -> Result<TcpListener, Error> {
        let fd = self.listen(&key(purpose, &name), |inherited| match inherited {
            Some(fd) => Ok((fd, None)),
            None => TcpListener::bind(addresses)
                .map(|listener| (listener.into(), None))
                .map_err(|e| Error::system(&format!("listen on {name}"), &e)),
        })?;
        Ok(fd.into())
    }

    fn listen(
        &self,
        key: &str,
        make: impl FnOnce(Option<OwnedFd>) -> Result<(OwnedFd, Option<SocketFile>), Error>,
    ) -> Result<OwnedFd, Error> {
        let mut state = self.state();
        if !state.held.contains_key(key) {
            let inherited = state.inherited.remove(key);
            let (fd, file) = make(inherited)?;
            state.held.insert(key.to_owned(), Held { fd, _file: file });
        }
        let held = state.held.get(key).map(|held| held.fd.try_clone());
        held.unwrap_or_else(|| Err(std::io::ErrorKind::NotFound.into()))
            .map_err(|e| Error::system(&format!("listen on {key}"), &e))
    }

    /// Listens no more on a unix socket, and removes its file.
    pub(crate) fn close(&self, purpose: &str, path: &Path) {
        let held = self.state().held.remove(&key(purpose, &path.display()));
        drop(held);
    }

    /// Listens on nothing any more, and removes all files.
    pub(crate) fn close_all(&self) {
        let closed = std::mem::take(&mut *self.state());
        drop(closed);
    }

    /// Closes what the program before had and this one was not told to listen on.
    pub(crate) fn close_unclaimed(&self) {
        let unclaimed = std::mem::take(&mut self.state().inherited);
        for key in unclaimed.keys() {
            tracing::info!("{key} is not listened on any more");
        }
    }

    /// Leaves all to the program that this process is about to become; what to tell it.
    pub(crate) fn leave(&self) -> std::io::Result<String> {
        let state = self.state();
        let mut said = std::process::id().to_string();
        for (key, held) in &state.held {
            runtime::inherited::leave(held.fd.as_fd())?;
            said.push_str(&format!(" {}={}", held.fd.as_raw_fd(), percent_encode(key)));
        }
        Ok(said)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(purpose: &str, what: &dyn std::fmt::Display) -> String {
    format!("{purpose} {what}")
}

fn bind(path: &Path, private: bool) -> Result<(OwnedFd, Option<SocketFile>), Error> {
    let (listener, file) = SocketFile::bind(path, private, |path| UnixListener::bind(path))?;
    Ok((listener.into(), Some(file)))
}

/// Numbers and keys that were said to the process with this id.
fn parse(said: &str, process: u32) -> impl Iterator<Item = (i32, String)> {
    let (to, sockets) = said.split_once(' ').unwrap_or_default();
    // A program that this one starts has the variable too.
    let ours = to.parse() == Ok(process);
    let sockets = if ours { sockets } else { "" };
    sockets.split(' ').filter_map(|socket| {
        let (number, key) = socket.split_once('=')?;
        Some((number.parse().ok()?, percent_decode(key)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_for_one_process() {
        let heard = |said: &str| parse(said, 7).collect::<Vec<_>>();
        let said = "7 12=%2Frun%2Fa%20b.sock 13=tcp%3A%5B%3A%3A1%5D%3A0 x=y 14";
        let expected = [(12, "/run/a b.sock".to_owned()), (13, "tcp:[::1]:0".to_owned())];
        assert_eq!(heard(said), expected);
        for nothing in ["", "7", "8 12=a", "x 12=a"] {
            assert_eq!(heard(nothing), [], "{nothing}");
        }
    }

    #[test]
    fn a_socket_is_bound_once_and_stays_until_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let sockets = Sockets::default();
        let first = sockets.unix("a", &path, true).unwrap();
        drop(first);
        let client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let second = sockets.unix("a", &path, true).unwrap();
        second.accept().unwrap();
        drop(client);
        assert!(sockets.unix("b", &path, true).is_err(), "somebody listens there");
        sockets.close("a", &path);
        assert!(!path.exists());
        let port = |listener: TcpListener| listener.local_addr().unwrap().port();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let first = port(sockets.tcp("a", "tcp:127.0.0.1:0", &[any]).unwrap());
        assert_eq!(port(sockets.tcp("a", "tcp:127.0.0.1:0", &[any]).unwrap()), first);
    }
}
