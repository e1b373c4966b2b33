//! The handshake phase: from a fresh connection to the terms of a session.
//!
//! - Nothing that was agreed before STARTTLS counts after it.
//! - What a client sends is bounded: options in number and size, the whole in time (by the
//!   server).
//! - Where TLS is required, a client without it learns nothing, not even names.

mod exports;

use std::io;
use std::rc::Rc;

use disk::{Catalog, Disk};
use runtime::Runtime;
use runtime::socket::{Segment, Socket};

use self::exports::{OpenError, describe};
use crate::end::End;
use crate::input::Input;
use crate::metrics::Metrics;
use crate::protocol::handshake::{
    self, ClientFlags, ContextRequest, EXPORT_NAME_PADDING, ExportRequest, Info, OptionHeader,
    info, option, reply,
};
use crate::protocol::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, Framing, Malformed, PAYLOAD_BYTES_MAX, transmission,
};
use crate::session::Terms;
use crate::tls::{Security, TlsSocket};

/// Most options of one connection; clients send about ten.
const OPTIONS_MAX: usize = 1000;

/// Largest data of an option that is looked at, in bytes. The largest sensible ones are metadata
/// queries: a name and a few strings of 4 KiB.
const OPTION_BYTES_MAX: usize = 64 << 10;

/// Largest data of an option that is received and refused; larger ones end the connection.
const REFUSED_OPTION_BYTES_MAX: usize = 16 * OPTION_BYTES_MAX;

/// The block size that is advertised as fast, in bytes.
const PREFERRED_BYTES: u32 = 4096;
const _: () = assert!(PREFERRED_BYTES as usize == base::BLOCK_SIZE);

/// Exports fetched from the catalog at a time.
const LIST_PAGE: usize = 256;

/// Most exports in the answer to LIST, which has no other end: it is cut there. Clients keep all
/// of it in memory; `parallax ls` is made for long lists.
const LIST_EXPORTS_MAX: usize = 10_000;

/// What negotiation arrived at.
pub(crate) struct Negotiated {
    pub(crate) terms: Terms,
    pub(crate) name: String,
    pub(crate) socket: Rc<dyn Socket>,
    pub(crate) tls: Option<Rc<TlsSocket>>,
    pub(crate) input: Input,
}

/// What a negotiation works with.
pub(crate) struct Environment<'a> {
    pub(crate) runtime: &'a Runtime,
    pub(crate) catalog: &'a dyn Catalog,
    pub(crate) security: &'a Security,
    pub(crate) metrics: &'a Metrics,
}

/// Negotiates on a fresh connection.
///
/// # Errors
/// The reason for which the connection must be closed.
pub(crate) async fn negotiate(
    environment: &Environment<'_>,
    socket: Rc<dyn Socket>,
) -> Result<Negotiated, End> {
    let mut out = Vec::new();
    handshake::encode_greeting(&mut out);
    send(&*socket, out).await?;
    let mut input = Input::new(Rc::clone(&socket), environment.runtime.buffers().clone());
    let mut flags = [0; ClientFlags::BYTES];
    receive_exact(&mut input, &mut flags).await?;
    let client = ClientFlags::decode(flags)?;
    let mut negotiation = Negotiation {
        environment,
        client,
        socket,
        input,
        tls: None,
        framing: Framing::Simple,
        contexts: None,
        opened: None,
    };
    for _ in 0..OPTIONS_MAX {
        if let Some((disk, name)) = negotiation.handle_option().await? {
            return Ok(negotiation.finish(disk, name));
        }
    }
    Err(End::TooManyOptions)
}

/// Selected contexts of an export.
struct Contexts {
    name: String,
    allocation: bool,
}

type Selected = Option<(Rc<dyn Disk>, String)>;

struct Negotiation<'a> {
    environment: &'a Environment<'a>,
    client: ClientFlags,
    socket: Rc<dyn Socket>,
    input: Input,
    tls: Option<Rc<TlsSocket>>,
    framing: Framing,
    contexts: Option<Contexts>,
    /// The last export that was looked at: clients ask several times about the same.
    opened: Option<(Rc<dyn Disk>, String)>,
}

impl Negotiation<'_> {
    fn finish(self, disk: Rc<dyn Disk>, name: String) -> Negotiated {
        let allocation = self.allocation(&name);
        let terms = Terms { disk, framing: self.framing, allocation };
        Negotiated { terms, name, socket: self.socket, tls: self.tls, input: self.input }
    }

    /// Receives one option and answers it. `Some` if it started the transmission phase.
    async fn handle_option(&mut self) -> Result<Selected, End> {
        let mut bytes = [0; OptionHeader::BYTES];
        receive_exact(&mut self.input, &mut bytes).await?;
        let header = OptionHeader::decode(&bytes)?.ok_or(Malformed::Length)?;
        let option = header.option;
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        if length > REFUSED_OPTION_BYTES_MAX {
            return Err(Malformed::Length.into());
        }
        let mut data = vec![0; length];
        receive_exact(&mut self.input, &mut data).await?;
        let tls_missing =
            self.tls.is_none() && matches!(self.environment.security, Security::Required(_));
        match option {
            option::ABORT => {
                // The client may be gone already, which is as good.
                let _ = self.reply(option, reply::ACK, &[]).await;
                return Err(End::Disconnect);
            }
            option::EXPORT_NAME if tls_missing => return Err(End::Refused),
            option::STARTTLS => self.start_tls(&data).await?,
            _ if tls_missing => {
                let message = "this server requires TLS: send STARTTLS first";
                self.refuse(option, reply::ERR_TLS_REQD, message).await?;
            }
            option::EXPORT_NAME => return self.export_name(&data).await.map(Some),
            // A client that does not speak fixed newstyle cannot read replies to options.
            _ if !self.client.fixed_newstyle => return Err(End::Refused),
            _ if data.len() > OPTION_BYTES_MAX => {
                self.refuse(option, reply::ERR_TOO_BIG, "the option is too large").await?;
            }
            option::LIST => self.list(&data).await?,
            option::INFO | option::GO => return self.info(option, &data).await,
            option::STRUCTURED_REPLY => self.structured_reply(&data).await?,
            option::EXTENDED_HEADERS => self.extended_headers(&data).await?,
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(option, &data).await?;
            }
            _ => self.refuse(option, reply::ERR_UNSUP, "this option is not supported").await?,
        }
        Ok(None)
    }

    async fn start_tls(&mut self, data: &[u8]) -> Result<(), End> {
        let option = option::STARTTLS;
        let tls = match self.environment.security {
            Security::Optional(tls) | Security::Required(tls) if self.client.fixed_newstyle => tls,
            _ => return self.refuse(option, reply::ERR_POLICY, "TLS is not configured here").await,
        };
        if self.tls.is_some() {
            return self.refuse(option, reply::ERR_INVALID, "TLS is in use already").await;
        }
        if !data.is_empty() {
            return self.refuse(option, reply::ERR_INVALID, "STARTTLS takes no data").await;
        }
        self.reply(option, reply::ACK, &[]).await?;
        // Bytes that came with STARTTLS are not from the client that will be authenticated.
        if !self.input.bytes().is_empty() {
            return Err(End::PlaintextAfterStartTls);
        }
        let pool = self.environment.runtime.buffers();
        let secured = Rc::new(TlsSocket::accept(Rc::clone(&self.socket), tls, pool).await?);
        self.environment.metrics.handshakes_tls.add(1);
        self.socket = Rc::<TlsSocket>::clone(&secured);
        self.input = Input::new(Rc::clone(&self.socket), pool.clone());
        self.tls = Some(secured);
        self.framing = Framing::Simple;
        self.contexts = None;
        Ok(())
    }

    async fn export_name(&mut self, data: &[u8]) -> Result<(Rc<dyn Disk>, String), End> {
        let name = handshake::decode_string(data)?;
        if self.framing == Framing::Extended {
            return Err(End::Refused);
        }
        let (disk, name) = self.open(name).await.map_err(|_| End::Refused)?;
        let mut out = Vec::new();
        out.extend_from_slice(&disk.size_bytes().to_be_bytes());
        out.extend_from_slice(&self.transmission_flags(&*disk, &name).to_be_bytes());
        if !self.client.no_zeroes {
            out.resize(out.len() + EXPORT_NAME_PADDING, 0);
        }
        send(&*self.socket, out).await?;
        Ok((disk, name))
    }

    async fn list(&mut self, data: &[u8]) -> Result<(), End> {
        let option = option::LIST;
        if !data.is_empty() {
            return self.refuse(option, reply::ERR_INVALID, "LIST takes no data").await;
        }
        let mut after = None;
        let mut left = LIST_EXPORTS_MAX;
        while left > 0 {
            let page = match self.environment.catalog.list(after.take(), LIST_PAGE.min(left)).await
            {
                Ok(page) => page,
                Err(error) => {
                    return self.refuse(option, reply::ERR_PLATFORM, &error.message).await;
                }
            };
            let Some(last) = page.last() else { break };
            let mut out = Vec::new();
            for export in &page {
                let mut data = Vec::new();
                let description = describe(export.size_bytes, export.read_only);
                handshake::encode_server(&export.name, &description, &mut data);
                handshake::encode_reply(option, reply::SERVER, &data, &mut out);
            }
            left = left.saturating_sub(page.len());
            after = Some(last.name.clone());
            send(&*self.socket, out).await?;
        }
        self.reply(option, reply::ACK, &[]).await
    }

    async fn info(&mut self, option: u32, data: &[u8]) -> Result<Selected, End> {
        let Ok(request) = ExportRequest::decode(data) else {
            self.refuse(option, reply::ERR_INVALID, "the option is malformed").await?;
            return Ok(None);
        };
        let (disk, name) = match self.open(request.name).await {
            Ok(opened) => opened,
            Err(error) => {
                self.refuse(option, error.reply, &error.message).await?;
                return Ok(None);
            }
        };
        let size = disk.size_bytes();
        let flags = self.transmission_flags(&*disk, &name);
        let description = describe(size, disk.read_only());
        let mut out = Vec::new();
        let mut push = |info: Info<'_>| {
            let mut data = Vec::new();
            info.encode(&mut data);
            handshake::encode_reply(option, reply::INFO, &data, &mut out);
        };
        push(Info::Export { size, flags });
        // Sent unasked: it costs a client nothing, and some would assume less.
        push(Info::BlockSize {
            minimum: 1,
            preferred: PREFERRED_BYTES,
            payload_max: PAYLOAD_BYTES_MAX,
        });
        if request.infos.contains(&info::NAME) {
            push(Info::Name(&name));
        }
        if request.infos.contains(&info::DESCRIPTION) {
            push(Info::Description(&description));
        }
        handshake::encode_reply(option, reply::ACK, &[], &mut out);
        send(&*self.socket, out).await?;
        Ok((option == option::GO).then_some((disk, name)))
    }

    async fn structured_reply(&mut self, data: &[u8]) -> Result<(), End> {
        let option = option::STRUCTURED_REPLY;
        if !data.is_empty() {
            return self.refuse(option, reply::ERR_INVALID, "the option takes no data").await;
        }
        if self.framing == Framing::Extended {
            let message = "extended headers were agreed";
            return self.refuse(option, reply::ERR_EXT_HEADER_REQD, message).await;
        }
        self.framing = Framing::Structured;
        self.reply(option, reply::ACK, &[]).await
    }

    async fn extended_headers(&mut self, data: &[u8]) -> Result<(), End> {
        let option = option::EXTENDED_HEADERS;
        if !data.is_empty() {
            return self.refuse(option, reply::ERR_INVALID, "the option takes no data").await;
        }
        self.framing = Framing::Extended;
        self.reply(option, reply::ACK, &[]).await
    }

    async fn meta_context(&mut self, option: u32, data: &[u8]) -> Result<(), End> {
        let set = option == option::SET_META_CONTEXT;
        if set {
            // Replaces the selection even if it fails.
            self.contexts = None;
        }
        let Ok(request) = ContextRequest::decode(data) else {
            return self.refuse(option, reply::ERR_INVALID, "the option is malformed").await;
        };
        if self.framing == Framing::Simple {
            let message = "structured replies must be negotiated first";
            return self.refuse(option, reply::ERR_INVALID, message).await;
        }
        let name = match self.open(request.name).await {
            Ok((_, name)) => name,
            Err(error) => return self.refuse(option, error.reply, &error.message).await,
        };
        let allocation = if set {
            request.queries.contains(&BASE_ALLOCATION)
        } else {
            request.queries.is_empty()
                || request.queries.iter().any(|query| ["base:", BASE_ALLOCATION].contains(query))
        };
        let mut out = Vec::new();
        if allocation {
            let mut data = Vec::new();
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            handshake::encode_context(id, BASE_ALLOCATION, &mut data);
            handshake::encode_reply(option, reply::META_CONTEXT, &data, &mut out);
        }
        if set {
            self.contexts = Some(Contexts { name, allocation });
        }
        handshake::encode_reply(option, reply::ACK, &[], &mut out);
        send(&*self.socket, out).await
    }

    /// Opens an export, or takes the one that is open already. Returns its canonical name too.
    async fn open(&mut self, name: &str) -> Result<(Rc<dyn Disk>, String), OpenError> {
        let name = exports::canonical(self.environment.catalog, name).await?;
        if let Some((disk, opened)) = &self.opened
            && *opened == name
            && !disk.severed()
        {
            return Ok((Rc::clone(disk), name));
        }
        let disk = self.environment.catalog.open(&name).await?;
        self.opened = Some((Rc::clone(&disk), name.clone()));
        Ok((disk, name))
    }

    fn allocation(&self, name: &str) -> bool {
        self.contexts.as_ref().is_some_and(|contexts| contexts.allocation && contexts.name == name)
    }

    fn transmission_flags(&self, disk: &dyn Disk, name: &str) -> u16 {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::CAN_MULTI_CONN
            | transmission::SEND_CACHE;
        flags |= if disk.read_only() {
            transmission::READ_ONLY
        } else {
            transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO
        };
        if self.framing != Framing::Simple {
            flags |= transmission::SEND_DF;
        }
        if self.framing == Framing::Extended && self.allocation(name) {
            flags |= transmission::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }

    async fn refuse(&mut self, option: u32, kind: u32, message: &str) -> Result<(), End> {
        self.reply(option, kind, message.as_bytes()).await
    }

    async fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<(), End> {
        let mut out = Vec::new();
        handshake::encode_reply(option, kind, data, &mut out);
        send(&*self.socket, out).await
    }
}

async fn send(socket: &dyn Socket, bytes: Vec<u8>) -> Result<(), End> {
    Ok(socket.send(vec![Segment::Bytes(bytes)]).await?)
}

/// Fills `into`.
async fn receive_exact(input: &mut Input, into: &mut [u8]) -> Result<(), End> {
    let mut have = 0;
    loop {
        have += input.copy_out(into.get_mut(have..).unwrap_or_default());
        if have == into.len() {
            return Ok(());
        }
        std::future::poll_fn(|context| input.poll_fill(context)).await.map_err(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof { End::Closed } else { End::Io(error) }
        })?;
    }
}
