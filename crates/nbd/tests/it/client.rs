//! A client made of the server's own codec.

use std::rc::Rc;

use base::Buffer;
use nbd::protocol::handshake::{
    self, ClientFlags, ContextRequest, ExportRequest, Info, OptionReply, option, reply,
};
use nbd::protocol::reply::{FLAG_DONE, Payload, Reply};
use nbd::protocol::request::{Command, Header, flag};
use nbd::protocol::{BASE_ALLOCATION, Framing};
use runtime::socket::{Segment, Socket};

/// The server closed the connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Closed;

pub(crate) struct Client {
    socket: Rc<dyn Socket>,
    received: Vec<u8>,
    pub(crate) framing: Framing,
    pub(crate) size: u64,
    pub(crate) flags: u16,
    next_cookie: u64,
}

/// A reply of the transmission phase with all of its chunks.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) cookie: u64,
    /// 0 or an error number.
    pub(crate) error: u32,
    pub(crate) message: String,
    /// Data of a read, put together.
    pub(crate) data: Vec<u8>,
    /// `(offset, length, is a hole)` of each chunk of content.
    pub(crate) chunks: Vec<(u64, usize, bool)>,
    pub(crate) extents: Vec<(u64, u32)>,
}

impl Client {
    /// A client that has read nothing yet.
    pub(crate) fn new(socket: Rc<dyn Socket>) -> Self {
        Self {
            socket,
            received: Vec::new(),
            framing: Framing::Simple,
            size: 0,
            flags: 0,
            next_cookie: 1000,
        }
    }

    /// A client past the greeting.
    pub(crate) async fn greet(socket: Rc<dyn Socket>) -> Self {
        let mut client = Self::new(socket);
        client.exchange_greeting(true).await;
        client
    }

    /// A client in the transmission phase on `name`.
    pub(crate) async fn attach(socket: Rc<dyn Socket>, name: &str, framing: Framing) -> Self {
        let mut client = Self::greet(socket).await;
        client.negotiate(name, framing).await;
        client
    }

    pub(crate) async fn exchange_greeting(&mut self, fixed_newstyle: bool) {
        assert_eq!(self.receive(18).await.unwrap(), b"NBDMAGICIHAVEOPT\x00\x03");
        let mut out = Vec::new();
        ClientFlags { fixed_newstyle, no_zeroes: true }.encode(&mut out);
        self.send(out).await;
    }

    /// Framing, `base:allocation` if there can be one, GO.
    pub(crate) async fn negotiate(&mut self, name: &str, framing: Framing) {
        self.set_framing(framing).await;
        if framing != Framing::Simple {
            self.set_allocation(name).await;
        }
        self.go(name).await;
    }

    pub(crate) async fn set_framing(&mut self, framing: Framing) {
        let option = match framing {
            Framing::Simple => return,
            Framing::Structured => option::STRUCTURED_REPLY,
            Framing::Extended => option::EXTENDED_HEADERS,
        };
        assert_eq!(self.option(option, &[]).await, Ok(vec![(reply::ACK, vec![])]));
        self.framing = framing;
    }

    pub(crate) async fn set_allocation(&mut self, name: &str) {
        let replies = self.contexts(option::SET_META_CONTEXT, name, &[BASE_ALLOCATION]).await;
        assert_eq!(replies.len(), 2, "one context and ACK: {replies:?}");
    }

    pub(crate) async fn go(&mut self, name: &str) {
        for (kind, data) in self.export_option(option::GO, name, &[]).await {
            match kind {
                reply::INFO => {
                    if let Some(Info::Export { size, flags }) = Info::decode(&data).unwrap() {
                        (self.size, self.flags) = (size, flags);
                    }
                }
                other => assert_eq!(other, reply::ACK, "{}", String::from_utf8_lossy(&data)),
            }
        }
    }

    /// Sends an option and receives its replies up to the last: `(type, data)` of each.
    pub(crate) async fn option(
        &mut self,
        option: u32,
        data: &[u8],
    ) -> Result<Vec<(u32, Vec<u8>)>, Closed> {
        let mut out = Vec::new();
        handshake::encode_option(option, data, &mut out);
        self.send(out).await;
        let mut replies = Vec::new();
        loop {
            let header = self.receive(OptionReply::BYTES).await?;
            let header = OptionReply::decode(&header).unwrap().unwrap();
            assert_eq!(header.option, option);
            let data = self.receive(header.length as usize).await?;
            replies.push((header.kind, data));
            if header.kind == reply::ACK || header.kind & (1 << 31) != 0 {
                return Ok(replies);
            }
        }
    }

    pub(crate) async fn export_option(
        &mut self,
        option: u32,
        name: &str,
        infos: &[u16],
    ) -> Vec<(u32, Vec<u8>)> {
        let mut data = Vec::new();
        ExportRequest { name, infos: infos.to_vec() }.encode(&mut data);
        self.option(option, &data).await.unwrap()
    }

    pub(crate) async fn contexts(
        &mut self,
        option: u32,
        name: &str,
        queries: &[&str],
    ) -> Vec<(u32, Vec<u8>)> {
        let mut data = Vec::new();
        ContextRequest { name, queries: queries.to_vec() }.encode(&mut data);
        self.option(option, &data).await.unwrap()
    }

    /// Sends a request and returns its cookie.
    pub(crate) async fn submit(
        &mut self,
        command: Command,
        flags: u16,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> u64 {
        self.next_cookie += 1;
        let cookie = self.next_cookie;
        let command = command.to_wire();
        let mut out = Vec::new();
        Header { flags, command, cookie, offset, length }.encode(self.framing, &mut out);
        out.extend_from_slice(payload);
        self.send(out).await;
        cookie
    }

    /// Sends a request and receives its answer.
    pub(crate) async fn request(
        &mut self,
        command: Command,
        flags: u16,
        offset: u64,
        length: u64,
    ) -> Answer {
        let cookie = self.submit(command, flags, offset, length, &[]).await;
        let answer = self.answer(offset).await.unwrap();
        assert_eq!(answer.cookie, cookie);
        answer
    }

    pub(crate) async fn write(&mut self, offset: u64, data: &[u8], flags: u16) -> Answer {
        let cookie = self.submit_write(offset, data, flags).await;
        let answer = self.answer(offset).await.unwrap();
        assert_eq!(answer.cookie, cookie);
        answer
    }

    pub(crate) async fn submit_write(&mut self, offset: u64, data: &[u8], flags: u16) -> u64 {
        let extended = self.framing == Framing::Extended;
        let flags = if extended { flags | flag::PAYLOAD_LEN } else { flags };
        self.submit(Command::Write, flags, offset, data.len() as u64, data).await
    }

    /// Reads `length` bytes, in whatever framing.
    pub(crate) async fn read(&mut self, offset: u64, length: usize) -> Answer {
        let cookie = self.submit(Command::Read, 0, offset, length as u64, &[]).await;
        let answer = self.read_answer(offset, length).await.unwrap();
        assert_eq!(answer.cookie, cookie);
        answer
    }

    /// The next answer, to a read of `length` bytes if it has simple framing.
    pub(crate) async fn read_answer(
        &mut self,
        offset: u64,
        length: usize,
    ) -> Result<Answer, Closed> {
        let mut answer = self.answer(offset).await?;
        if self.framing == Framing::Simple && answer.error == 0 {
            answer.data = self.receive(length).await?;
        }
        Ok(answer)
    }

    /// The next answer, all of whose chunks follow each other.
    pub(crate) async fn answer(&mut self, offset: u64) -> Result<Answer, Closed> {
        let mut answer = Answer::default();
        loop {
            let (reply, used) = loop {
                if let Some(decoded) = Reply::decode(&self.received).unwrap() {
                    break decoded;
                }
                self.receive_more().await?;
            };
            self.received.drain(..used);
            match reply {
                Reply::Simple { cookie, error } => {
                    assert_ne!(self.framing, Framing::Extended);
                    return Ok(Answer { cookie, error, ..Answer::default() });
                }
                Reply::Chunk { cookie, flags, kind, offset: echoed, length } => {
                    assert_eq!(echoed.is_some(), self.framing == Framing::Extended);
                    assert!(echoed.is_none_or(|echoed| echoed == offset || offset == u64::MAX));
                    let payload = self.receive(usize::try_from(length).unwrap()).await?;
                    answer.cookie = cookie;
                    answer.add(Payload::decode(kind, &payload).unwrap());
                    if flags & FLAG_DONE != 0 {
                        return Ok(answer);
                    }
                }
            }
        }
    }

    pub(crate) async fn send(&mut self, bytes: Vec<u8>) {
        // A server that closed the connection shows when something is received.
        let _ = self.socket.send(vec![Segment::Bytes(bytes)]).await;
    }

    pub(crate) async fn receive(&mut self, count: usize) -> Result<Vec<u8>, Closed> {
        while self.received.len() < count {
            self.receive_more().await?;
        }
        Ok(self.received.drain(..count).collect())
    }

    /// Whether the server has closed the connection and sent nothing before.
    pub(crate) async fn is_closed(&mut self) -> bool {
        self.received.is_empty() && self.receive_more().await == Err(Closed)
    }

    pub(crate) fn close(&self) {
        self.socket.shutdown();
    }

    async fn receive_more(&mut self) -> Result<(), Closed> {
        let buffer = Buffer::zeroed(256);
        let size = buffer.bytes().len();
        let (result, buffer) = self.socket.receive(buffer, 0..size).await;
        match result {
            Ok(0) | Err(_) => Err(Closed),
            Ok(count) => {
                self.received.extend_from_slice(&buffer.bytes()[..count]);
                Ok(())
            }
        }
    }
}

impl Answer {
    fn add(&mut self, payload: Payload<'_>) {
        match payload {
            Payload::None => {}
            Payload::Data(offset, data) => {
                self.chunks.push((offset, data.len(), false));
                self.data.extend_from_slice(data);
            }
            Payload::Hole(offset, length) => {
                self.chunks.push((offset, length as usize, true));
                self.data.resize(self.data.len() + length as usize, 0);
            }
            Payload::Status(context, extents) => {
                assert_eq!(context, nbd::protocol::BASE_ALLOCATION_ID);
                self.extents = extents;
            }
            Payload::Error(error, message) => {
                self.error = error;
                self.message = message.to_owned();
            }
        }
    }
}
