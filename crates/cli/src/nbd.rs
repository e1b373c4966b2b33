//! A disk of the daemon as a client sees it, over NBD on the daemon's unix socket.
//!
//! It blocks, and has one request under way at a time: who wants more opens it several times, with a
//! thread for each. So answers need no order, and compression goes on beside the disk.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use api::{Error, Kind};
use nbd::protocol::handshake::{
    self, ClientFlags, ExportRequest, Info, OptionReply, option, reply,
};
use nbd::protocol::reply::Reply;
use nbd::protocol::request::{Command, Header};
use nbd::protocol::{Framing, error, transmission};

/// Bytes of the greeting of a server.
const GREETING_BYTES: usize = 18;

/// Longest answer to an option that is read.
const OPTION_BYTES_MAX: usize = 64 << 10;

/// Bytes of a simple reply.
const REPLY_BYTES: usize = 16;

/// Largest range that one request discards: lengths have 32 bits.
const DISCARD_BYTES_MAX: u64 = 1 << 30;

/// A connection to a disk.
#[derive(Debug)]
pub(crate) struct NbdDisk {
    stream: UnixStream,
    export: String,
    size_bytes: u64,
    cookie: u64,
}

impl NbdDisk {
    /// Opens `NAME` or `NAME@SNAPSHOT`.
    ///
    /// # Errors
    /// `NotFound`, or that nobody serves it there.
    pub(crate) fn open(socket: &Path, export: &str) -> Result<Self, Error> {
        let shown = socket.display();
        let stream = UnixStream::connect(socket)
            .map_err(|e| Error::system(&format!("connect to {shown}"), &e))?;
        let mut disk = Self { stream, export: export.to_owned(), size_bytes: 0, cookie: 0 };
        disk.negotiate()?;
        Ok(disk)
    }

    /// Logical size.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Reads as much as `into` takes.
    pub(crate) fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        self.request(Command::Read, offset, into.len() as u64, &[])?;
        self.receive(into)
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.request(Command::Write, offset, data.len() as u64, data)
    }

    /// Makes a range read as zeroes, and take no space.
    pub(crate) fn discard(&mut self, offset: u64, length: u64) -> Result<(), Error> {
        let end = offset.saturating_add(length);
        let mut at = offset;
        while at < end {
            let count = (end - at).min(DISCARD_BYTES_MAX);
            self.request(Command::Trim, at, count, &[])?;
            at += count;
        }
        Ok(())
    }

    /// Makes durable what has been written, also over other connections.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        self.request(Command::Flush, 0, 0, &[])
    }

    fn negotiate(&mut self) -> Result<(), Error> {
        let mut greeting = [0; GREETING_BYTES];
        self.receive(&mut greeting)?;
        let mut expected = Vec::new();
        handshake::encode_greeting(&mut expected);
        if greeting.as_slice() != expected {
            return Err(self.strange());
        }
        let mut out = Vec::new();
        ClientFlags { fixed_newstyle: true, no_zeroes: true }.encode(&mut out);
        let mut request = Vec::new();
        ExportRequest { name: &self.export, infos: Vec::new() }.encode(&mut request);
        handshake::encode_option(option::GO, &request, &mut out);
        self.send(&out)?;
        loop {
            let mut header = [0; OptionReply::BYTES];
            self.receive(&mut header)?;
            let header = OptionReply::decode(&header).ok().flatten();
            let header = header.ok_or_else(|| self.strange())?;
            let length = usize::try_from(header.length).unwrap_or(usize::MAX);
            if length > OPTION_BYTES_MAX {
                return Err(self.strange());
            }
            let mut data = vec![0; length];
            self.receive(&mut data)?;
            match header.kind {
                reply::ACK => return Ok(()),
                reply::INFO => {
                    if let Ok(Some(Info::Export { size, flags })) = Info::decode(&data) {
                        // On which threads rely that write at once.
                        if flags & transmission::CAN_MULTI_CONN == 0 {
                            return Err(self.strange());
                        }
                        self.size_bytes = size;
                    }
                }
                kind => return Err(self.refused(kind, &String::from_utf8_lossy(&data))),
            }
        }
    }

    /// Sends a request and receives its reply, but for the data of a read.
    fn request(
        &mut self,
        command: Command,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> Result<(), Error> {
        self.cookie += 1;
        let header =
            Header { flags: 0, command: command.to_wire(), cookie: self.cookie, offset, length };
        let mut out = Vec::new();
        header.encode(Framing::Simple, &mut out);
        self.send(&out)?;
        self.send(payload)?;
        let mut answer = [0; REPLY_BYTES];
        self.receive(&mut answer)?;
        match Reply::decode(&answer) {
            Ok(Some((Reply::Simple { cookie, error: 0 }, _))) if cookie == self.cookie => Ok(()),
            Ok(Some((Reply::Simple { error, .. }, _))) if error != 0 => {
                Err(self.failed(error, offset))
            }
            _ => Err(self.strange()),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.stream.write_all(bytes).map_err(|e| self.broken(&e))
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<(), Error> {
        self.stream.read_exact(into).map_err(|e| self.broken(&e))
    }

    fn broken(&self, error: &std::io::Error) -> Error {
        let export = &self.export;
        Error::new(Kind::Io, format!("the connection to disk {export} broke: {error}"))
    }

    fn strange(&self) -> Error {
        let message = format!("disk {} is not served as it should be", self.export);
        Error::new(Kind::Io, message)
    }

    fn refused(&self, kind: u32, message: &str) -> Error {
        let kind = if kind == reply::ERR_UNKNOWN { Kind::NotFound } else { Kind::Io };
        Error::new(kind, format!("cannot open disk {}: {message}", self.export))
    }

    fn failed(&self, number: u32, offset: u64) -> Error {
        let (kind, what) = match number {
            error::ENOSPC => (Kind::NoSpace, "no space is left in the store"),
            error::ESHUTDOWN => (Kind::Fenced, "it was taken away meanwhile"),
            error::EPERM => (Kind::ReadOnly, "it is read-only"),
            _ => (Kind::Io, "I/O error"),
        };
        Error::new(kind, format!("disk {} at byte {offset}: {what}", self.export))
    }
}
