//! The sockets that the process listens on, from its start to its end.
//!
//! An engine that is started anew, because its device failed, listens on the same ones. So does the
//! program that this process becomes in an upgrade: they stay open, clients that connect meanwhile wait,
//! and nobody finds a socket missing. The next program learns which is which from a variable of its
//! environment, [`VARIABLE`]: `PID NUMBER:DEVICE:INODE=KEY …`, where device and inode are those of a unix
//! socket's file, and a key is what a socket is for, and its path or address as it was configured,
//! percent-encoded.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use api::{Error, Kind, percent_decode, percent_encode};

use crate::socket_file::SocketFile;

/// The variable by which sockets are handed over.
pub(crate) const VARIABLE: &str = "PARALLAX_SOCKETS";

/// Sockets by key. Clones of their descriptors are what is listened on.
#[derive(Debug, Default)]
pub(crate) struct Sockets(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Of the program before, not asked for yet.
    inherited: BTreeMap<String, Held>,
    held: BTreeMap<String, Held>,
    /// Whether nobody is to listen any more.
    closed: bool,
}

#[derive(Debug)]
struct Held {
    fd: OwnedFd,
    /// Removes the file of a unix socket when it is dropped, if it is still that one.
    file: Option<SocketFile>,
}

impl Sockets {
    /// Takes what the program before has left.
    pub(crate) fn inherit() -> Self {
        let said = std::env::var(VARIABLE).unwrap_or_default();
        let inherited = parse(&said, std::process::id())
            .filter_map(|Left { number, file: (device, inode), key }| {
                let fd = runtime::inherited::take(number).ok()?;
                let path = key.split_once(' ').map(|(_, path)| PathBuf::from(path));
                let path = path.filter(|path| path.is_absolute() && inode != 0);
                let file = path.map(|path| SocketFile::known(path, device, inode));
                Some((key, Held { fd, file }))
            })
            .collect();
        Self(Mutex::new(State { inherited, ..State::default() }))
    }

    /// Listens on a unix socket; see [`SocketFile::bind`]. One for another purpose is another one.
    pub(crate) fn unix(
        &self,
        purpose: &str,
        path: &Path,
        private: bool,
    ) -> Result<UnixListener, Error> {
        let fd = self.listen(&key(purpose, &path.display()), |inherited| match inherited {
            Some(held) if held.file.as_ref().is_some_and(SocketFile::is_ours) => Ok(held),
            // Or nobody could reach it: its file was taken away.
            _ => bind(path, private),
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
            Some(held) => Ok(held),
            None => TcpListener::bind(addresses)
                .map(|listener| Held { fd: listener.into(), file: None })
                .map_err(|e| Error::system(&format!("listen on {name}"), &e)),
        })?;
        Ok(fd.into())
    }

    fn listen(
        &self,
        key: &str,
        make: impl FnOnce(Option<Held>) -> Result<Held, Error>,
    ) -> Result<OwnedFd, Error> {
        let mut state = self.state();
        if state.closed {
            return Err(Error::new(Kind::Fenced, "the daemon is stopping"));
        }
        if !state.held.contains_key(key) {
            let inherited = state.inherited.remove(key);
            let held = make(inherited)?;
            state.held.insert(key.to_owned(), held);
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
        let closed =
            std::mem::replace(&mut *self.state(), State { closed: true, ..State::default() });
        drop(closed);
    }

    /// Listens on nothing but for this purpose, until it is asked for again: nobody shall wait for who does
    /// not come for long.
    pub(crate) fn close_all_but(&self, purpose: &str) {
        let mut state = self.state();
        state.held.retain(|key, _| key.split(' ').next() == Some(purpose));
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
            let number = held.fd.as_raw_fd();
            let (device, inode) = held.file.as_ref().map_or((0, 0), SocketFile::identity);
            said.push_str(&format!(" {number}:{device}:{inode}={}", percent_encode(key)));
        }
        Ok(said)
    }

    /// Keeps what was left: this process has not become another program after all.
    pub(crate) fn keep(&self) {
        for held in self.state().held.values() {
            if let Err(error) = runtime::inherited::keep(held.fd.as_fd()) {
                tracing::warn!(%error, "a socket will be left to programs that are started");
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(purpose: &str, what: &dyn std::fmt::Display) -> String {
    format!("{purpose} {what}")
}

fn bind(path: &Path, private: bool) -> Result<Held, Error> {
    let (listener, file) = SocketFile::bind(path, private, |path| UnixListener::bind(path))?;
    Ok(Held { fd: listener.into(), file: Some(file) })
}

/// A socket that was left.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    number: i32,
    /// Device and inode.
    file: (u64, u64),
    key: String,
}

/// What was said to the process with this id.
fn parse(said: &str, process: u32) -> impl Iterator<Item = Left> {
    let (to, sockets) = said.split_once(' ').unwrap_or_default();
    // A program that this one starts has the variable too.
    let ours = to.parse() == Ok(process);
    let sockets = if ours { sockets } else { "" };
    sockets.split(' ').filter_map(|socket| {
        let (numbers, key) = socket.split_once('=')?;
        let (number, file) = numbers.split_once(':')?;
        let (device, inode) = file.split_once(':')?;
        let file = (device.parse().ok()?, inode.parse().ok()?);
        Some(Left { number: number.parse().ok()?, file, key: percent_decode(key)? })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_for_one_process() {
        let heard = |said: &str| parse(said, 7).collect::<Vec<_>>();
        let said =
            "7 12:5:9=a%20%2Frun%2Fa%20b.sock 13:0:0=b%20tcp%3A%5B%3A%3A1%5D%3A0 x=y 14 15=c";
        let left = |number, file, key: &str| Left { number, file, key: key.to_owned() };
        let expected = [left(12, (5, 9), "a /run/a b.sock"), left(13, (0, 0), "b tcp:[::1]:0")];
        assert_eq!(heard(said), expected);
        for nothing in ["", "7", "8 12:0:0=a", "x 12:0:0=a", "7 12:0=a", "7 12:0:0=%"] {
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
