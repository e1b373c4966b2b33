//! Unix sockets that carry file descriptors besides bytes (unix(7), SCM_RIGHTS).

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketType, recvmsg, sendmsg, sockopt,
};

use super::io::{Descriptor, Io};
use super::work::Interest;

/// Most descriptors that one call receives; the kernel closes further ones.
const RECEIVED_MAX: usize = 16;

/// A connected unix stream socket. Dropping it ends both directions.
pub struct Channel {
    io: Io,
    descriptor: Rc<Descriptor>,
}

/// How [`Channel::fill`] went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Filled {
    /// All is there.
    Whole,
    /// The peer closed before.
    Ended,
    /// More descriptors came than there are to be.
    TooManyFiles,
}

impl Channel {
    /// Takes a connected unix stream socket.
    ///
    /// # Errors
    /// `InvalidInput` if it is anything else; what the kernel says.
    pub fn adopt(io: &Io, fd: OwnedFd) -> io::Result<Self> {
        let unix = sockopt::socket_domain(&fd)? == AddressFamily::UNIX;
        if !unix || sockopt::socket_type(&fd)? != SocketType::STREAM {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self { io: io.clone(), descriptor: io.descriptor(fd) })
    }

    /// Receives at least one byte into `into`, and adds the descriptors that came with it to
    /// `files`, at most 16 at a time; 0 means that the peer closed.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn receive(&self, into: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<usize> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(RECEIVED_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let mut parts = [IoSliceMut::new(into)];
            match recvmsg(self.descriptor.fd(), &mut parts, &mut control, flags) {
                Ok(received) => {
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(received) = message {
                            files.extend(received);
                        }
                    }
                    return Ok(received.bytes);
                }
                Err(Errno::AGAIN) => self.io.ready(&self.descriptor, Interest::Readable).await?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Receives until `into` is full, and adds the descriptors that come with it to `files`, of which
    /// there are to be `files_max` at most.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn fill(
        &self,
        into: &mut [u8],
        files: &mut Vec<OwnedFd>,
        files_max: usize,
    ) -> io::Result<Filled> {
        let mut rest = into;
        while !rest.is_empty() {
            let count = self.receive(rest, files).await?;
            if count == 0 {
                return Ok(Filled::Ended);
            }
            if files.len() > files_max {
                return Ok(Filled::TooManyFiles);
            }
            rest = rest.get_mut(count..).unwrap_or_default();
        }
        Ok(Filled::Whole)
    }

    /// Sends all of `bytes`, with `files` at the first of them.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut rest = bytes;
        let mut files = files;
        while !rest.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(RECEIVED_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(self.descriptor.fd(), &[IoSlice::new(rest)], &mut control, flags) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    files = &[];
                }
                Err(Errno::AGAIN) => self.io.ready(&self.descriptor, Interest::Writable).await?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Ends both directions: whoever waits in `receive` or `send` gets an end or an error.
    pub fn shutdown(&self) {
        // ENOTCONN: the peer was faster.
        let _ = rustix::net::shutdown(self.descriptor.fd(), Shutdown::Both);
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // The engine may still wait for it, on behalf of somebody who does not any more.
        self.shutdown();
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Channel({:?})", self.descriptor.fd())
    }
}
