//! A small NBD client of our own: pipelined requests, simple replies, one connection.
//!
//! It exists beside libnbd and QEMU's client because the crash tests must know exactly which
//! requests were answered before a server died, including answers that were still in the socket.
//! Source: the NBD protocol specification, "Fixed newstyle negotiation" and "Transmission phase".

use std::collections::HashMap;
use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

const MAGIC_SERVER: u64 = 0x4e42_444d_4147_4943;
const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const MAGIC_REQUEST: u32 = 0x2560_9513;
const MAGIC_REPLY: u32 = 0x6744_6698;

const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1;
const HANDSHAKE_NO_ZEROES: u16 = 2;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_IS_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;

/// NBD's number for a full store.
pub(crate) const ENOSPC: u32 = 28;

/// Longest option reply that is taken: an error message, or a description of an export.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;

/// What is asked of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Read bytes.
    Read,
    /// Write bytes.
    Write,
    /// Make durable what was answered before.
    Flush,
    /// Give back the space of bytes.
    Trim,
    /// Make bytes read as zeroes.
    WriteZeroes,
}

impl Command {
    fn code(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::WriteZeroes => 6,
        }
    }
}

/// The answer to one request.
#[derive(Debug)]
pub(crate) struct Reply {
    /// Which request: what [`Client::send`] returned.
    pub(crate) cookie: u64,
    /// NBD's error number, 0 if it was carried out.
    pub(crate) error: u32,
    /// What was read.
    pub(crate) data: Vec<u8>,
}

/// A connection to one export.
pub(crate) struct Client {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    size_bytes: u64,
    next_cookie: u64,
    /// Lengths of reads in flight: a simple reply does not repeat them.
    reads: HashMap<u64, u32>,
}

impl Client {
    /// Connects to the export `name` on a unix socket.
    ///
    /// # Errors
    /// If nobody answers, or there is no such export.
    pub(crate) fn connect(socket: &Path, name: &str) -> Result<Self> {
        let writer = UnixStream::connect(socket)
            .with_context(|| format!("connect to {}", socket.display()))?;
        writer.set_read_timeout(Some(Duration::from_secs(60)))?;
        writer.set_write_timeout(Some(Duration::from_secs(60)))?;
        let reader = BufReader::with_capacity(256 << 10, writer.try_clone()?);
        let mut client =
            Self { reader, writer, size_bytes: 0, next_cookie: 1, reads: HashMap::new() };
        client.negotiate(name).with_context(|| format!("open the export '{name}'"))?;
        Ok(client)
    }

    /// Size of the export.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn negotiate(&mut self, name: &str) -> Result<()> {
        ensure!(self.read_u64()? == MAGIC_SERVER, "not an NBD server");
        ensure!(self.read_u64()? == MAGIC_OPTION, "an NBD server of the old style");
        let flags = self.read_u16()?;
        ensure!(flags & HANDSHAKE_FIXED_NEWSTYLE != 0, "not fixed newstyle");
        let ours = u32::from(flags & (HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES));
        self.writer.write_all(&ours.to_be_bytes())?;

        let length = u32::try_from(name.len())?;
        let mut option = Vec::new();
        option.extend(MAGIC_OPTION.to_be_bytes());
        option.extend(OPTION_GO.to_be_bytes());
        // Name with its length, and no information requests.
        option.extend((4 + length + 2).to_be_bytes());
        option.extend(length.to_be_bytes());
        option.extend(name.as_bytes());
        option.extend(0u16.to_be_bytes());
        self.writer.write_all(&option)?;
        while self.option_reply()? {}
        Ok(())
    }

    /// Reads one reply to GO; `false` after the last.
    fn option_reply(&mut self) -> Result<bool> {
        ensure!(self.read_u64()? == MAGIC_OPTION_REPLY, "bad magic in an option reply");
        ensure!(self.read_u32()? == OPTION_GO, "reply to another option");
        let kind = self.read_u32()?;
        let length = self.read_u32()?;
        ensure!(length <= OPTION_REPLY_BYTES_MAX, "option reply of {length} bytes");
        let mut payload = vec![0; usize::try_from(length)?];
        self.reader.read_exact(&mut payload)?;
        if kind & REPLY_IS_ERROR != 0 {
            bail!("refused ({kind:#x}): {}", String::from_utf8_lossy(&payload));
        }
        if kind == REPLY_INFO
            && let Some((head, rest)) = payload.split_first_chunk::<2>()
            && u16::from_be_bytes(*head) == INFO_EXPORT
            && let Some(size) = rest.first_chunk::<8>()
        {
            self.size_bytes = u64::from_be_bytes(*size);
        }
        Ok(kind != REPLY_ACK)
    }

    /// Sends a request and returns its cookie at once. `data` is what a write carries.
    ///
    /// # Errors
    /// If the connection is gone.
    pub(crate) fn send(
        &mut self,
        command: Command,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend(MAGIC_REQUEST.to_be_bytes());
        request.extend(0u16.to_be_bytes());
        request.extend(command.code().to_be_bytes());
        request.extend(cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(data);
        if command == Command::Read {
            self.reads.insert(cookie, length);
        }
        self.writer.write_all(&request)?;
        Ok(cookie)
    }

    /// Waits for the next answer.
    ///
    /// # Errors
    /// If the connection is gone, the server talks nonsense, or nothing comes for a minute.
    pub(crate) fn receive(&mut self) -> Result<Reply> {
        let magic = self.read_u32().context("wait for an answer")?;
        ensure!(magic == MAGIC_REPLY, "bad magic in a reply");
        let error = self.read_u32()?;
        let cookie = self.read_u64()?;
        let mut data = Vec::new();
        if let Some(length) = self.reads.remove(&cookie)
            && error == 0
        {
            data.resize(usize::try_from(length)?, 0);
            self.reader.read_exact(&mut data)?;
        }
        Ok(Reply { cookie, error, data })
    }

    /// Sends a request and waits for it; nothing else may be in flight.
    ///
    /// # Errors
    /// As [`receive`](Self::receive), or if the server refuses.
    pub(crate) fn ask(&mut self, command: Command, offset: u64, length: u32) -> Result<Vec<u8>> {
        let cookie = self.send(command, offset, length, &[])?;
        let reply = self.receive()?;
        ensure!(reply.cookie == cookie, "answer to another request");
        ensure!(reply.error == 0, "{command:?} at {offset}: NBD error {}", reply.error);
        Ok(reply.data)
    }

    /// Sends a write and waits for it; nothing else may be in flight. Returns NBD's error number.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Result<u32> {
        let cookie = self.send(Command::Write, offset, u32::try_from(data.len())?, data)?;
        let reply = self.receive()?;
        ensure!(reply.cookie == cookie, "answer to another request");
        Ok(reply.error)
    }

    fn read_u16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.read_bytes()?))
    }

    fn read_u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.read_bytes()?))
    }

    fn read_u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.read_bytes()?))
    }

    fn read_bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
