//! QEMU's machine protocol, as far as the tests need it: one command, one answer.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::clock;

/// A connection to the monitor of QEMU or qemu-storage-daemon.
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects, waiting up to ten seconds for the monitor to appear.
    ///
    /// # Errors
    /// If it does not.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let mut stream = None;
        clock::wait_until(Duration::from_secs(10), || {
            stream = UnixStream::connect(socket).ok();
            stream.is_some()
        });
        let stream = stream.with_context(|| format!("connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        let mut qmp = Self { stream: BufReader::new(stream) };
        qmp.message().context("read QMP's greeting")?;
        qmp.ask("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs one command and returns what it answers. Events in between are dropped.
    ///
    /// # Errors
    /// With QEMU's own message if it refuses.
    pub(crate) fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{request}")?;
        loop {
            let mut message = self.message()?;
            if let Some(error) = message.get("error") {
                bail!("QMP {command}: {error}");
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("QMP said {line:?}"))
    }
}
