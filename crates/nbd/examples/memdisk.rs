//! Serves one disk in memory over NBD, for interoperability tests and to measure the frontend by
//! itself:
//!
//! ```text
//! memdisk ADDRESS SIZE [mem|null] [TLS_DIRECTORY [verify]]
//! ```
//!
//! ADDRESS is a path or `unix:PATH` or `tcp:HOST:PORT`. `null` forgets what is written and reads
//! as one and the same block. A directory of certificates makes TLS mandatory, `verify` client
//! certificates too.

extern crate parallax_nbd as nbd;

use std::error::Error;
use std::path::Path;
use std::rc::Rc;

use base::{BLOCK_SIZE, BlockSlice, Buffer, ErrorKind};
use disk::{
    Catalog, Disk, DiskError, Export, Extent, ExtentState, LocalBoxFuture, MemDisk, ReadSegment,
    Request, Response,
};
use nbd::{ClientCertificates, Config, Security, Server, TlsServer};
use runtime::reactor::{Address, EngineChoice, Listener, Reactor};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |index: usize| arguments.get(index).map(String::as_str);
    let usage = "memdisk ADDRESS SIZE [mem|null] [TLS_DIRECTORY [verify]]";
    let address = parse_address(argument(0).ok_or(usage)?)?;
    let size = base::size::parse_bytes(argument(1).ok_or(usage)?)?;
    let disk: Rc<dyn Disk> = match argument(2) {
        None | Some("mem") => Rc::new(MemDisk::new(usize::try_from(size)?)),
        Some("null") => Rc::new(NullDisk::new(size)),
        Some(_) => return Err(usage.into()),
    };
    let clients = match argument(4) {
        Some("verify") => ClientCertificates::Required,
        _ => ClientCertificates::Ignored,
    };
    let security = match argument(3) {
        Some(directory) => Security::Required(TlsServer::load(Path::new(directory), clients)?),
        None => Security::Plaintext,
    };
    let reactor = Reactor::start(EngineChoice::from_environment()?)?;
    let runtime = reactor.runtime().clone();
    let config = Config { security, ..Config::default() };
    let server = Server::new(&runtime, Rc::new(One { name: "mem".to_owned(), disk }), config);
    let listener = Listener::bind(reactor.io(), &address)?;
    reactor.run(async move {
        loop {
            match listener.accept().await {
                Ok((socket, peer)) => {
                    drop(runtime.spawn(server.serve(socket, peer.to_string())));
                }
                Err(error) => return Err::<(), _>(error),
            }
        }
    })??;
    Ok(())
}

fn parse_address(text: &str) -> Result<Address, Box<dyn Error>> {
    Ok(match text.split_once(':') {
        Some(("tcp", address)) => Address::Tcp(address.parse()?),
        Some(("unix", path)) => Address::Unix(path.into()),
        _ => Address::Unix(text.into()),
    })
}

/// A catalog of one disk.
struct One {
    name: String,
    disk: Rc<dyn Disk>,
}

impl Catalog for One {
    fn list(
        &self,
        after: Option<String>,
        _max: usize,
    ) -> LocalBoxFuture<Result<Vec<Export>, DiskError>> {
        let export = Export {
            name: self.name.clone(),
            size_bytes: self.disk.size_bytes(),
            read_only: self.disk.read_only(),
        };
        let page = if after.is_none_or(|after| after < self.name) { vec![export] } else { vec![] };
        Box::pin(std::future::ready(Ok(page)))
    }

    fn open(&self, name: &str) -> LocalBoxFuture<Result<Rc<dyn Disk>, DiskError>> {
        let missing = || DiskError::new(ErrorKind::NotFound, "there is no such export");
        let found = (name == self.name).then(|| Rc::clone(&self.disk)).ok_or_else(missing);
        Box::pin(std::future::ready(found))
    }
}

/// A disk that costs nothing, so that what is measured is the frontend.
struct NullDisk {
    size: u64,
    blocks: Rc<Buffer>,
}

impl NullDisk {
    fn new(size: u64) -> Self {
        Self { size, blocks: Rc::new(Buffer::zeroed(base::REQUEST_BLOCKS_MAX)) }
    }
}

impl Disk for NullDisk {
    fn serial(&self) -> String {
        "null".to_owned()
    }

    fn identity(&self) -> disk::Identity {
        disk::Identity::default()
    }

    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn severed(&self) -> bool {
        false
    }

    fn submit(&self, request: Request) -> LocalBoxFuture<Result<Response, DiskError>> {
        let response = match request {
            Request::Read { length, .. } => {
                let count = length.div_ceil(BLOCK_SIZE);
                let slice = BlockSlice::new(Rc::clone(&self.blocks), 0, count);
                Response::Data(vec![ReadSegment::Bytes(slice, 0..length)])
            }
            Request::BlockStatus { length, .. } => {
                Response::Extents(vec![Extent { length, state: ExtentState::Data }])
            }
            _ => Response::Done,
        };
        Box::pin(std::future::ready(Ok(response)))
    }
}
