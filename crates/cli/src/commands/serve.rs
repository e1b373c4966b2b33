//! `parallax serve`.

use std::io::IsTerminal;

use api::{DaemonStatus, Error};
use daemon::{Config, Daemon, Scrub, TlsFiles};
use serde_json::json;
use tracing::level_filters::LevelFilter;

use crate::args::{Global, LogLevel, Serve};
use crate::{output, socket};

pub(super) fn run(serve: Serve, global: Global) -> Result<(), Error> {
    log_to_stderr(serve.log);
    let verify_clients = serve.tls_client_ca;
    let config = Config {
        store: serve.path,
        socket: socket::choose(global.socket)?,
        nbd: serve.nbd,
        cache_bytes: serve.cache,
        gc_memory_bytes: serve.gc_memory,
        tls: serve.tls_dir.map(|dir| TlsFiles { dir, verify_clients }),
        insecure_plaintext: serve.insecure_plaintext,
        buffered: serve.buffered,
        scrub: Scrub { every: serve.scrub_every, rate_bytes: serve.scrub_rate },
    };
    let socket = std::path::absolute(&config.socket).unwrap_or_else(|_| config.socket.clone());
    let daemon = Daemon::start(config)?;
    let status = daemon.status()?;
    if global.json {
        let ready = json!({ "ready": true, "socket": socket, "daemon": *status });
        // One line, so that a reader knows when it is complete.
        output::print(&ready.to_string())?;
    } else {
        let (store, socket) = (&status.store, socket.display());
        output::print(&format!("ready: {store}, control {socket}, NBD {}", addresses(&status)))?;
    }
    daemon.run()
}

/// Where NBD is served, for people.
fn addresses(status: &DaemonStatus) -> String {
    let one = |endpoint: &api::NbdEndpoint| {
        let tls = if endpoint.tls { " (TLS)" } else { "" };
        format!("{}{tls}", endpoint.address)
    };
    status.nbd.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Sends log lines to stderr: the service manager or the terminal keeps them.
pub(super) fn log_to_stderr(level: LogLevel) {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(level)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}
