//! Asks a daemon over its control socket: HTTP/1.1 and JSON on one connection that stays open.
//!
//! Separate from the daemon's own client on purpose: the tests and figures then judge what is on
//! the wire, and a request costs no process, runtime or connection of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// What a garbage collection did.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Collected {
    /// Bytes of blocks that are needed.
    pub(crate) reached_bytes: u64,
}

/// One connection to a daemon's control socket.
pub(crate) struct Control {
    stream: BufReader<UnixStream>,
}

impl Control {
    /// Connects.
    ///
    /// # Errors
    /// If no daemon answers there.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Connects, for what may take as long as `limit` to be answered.
    ///
    /// # Errors
    /// If no daemon answers there.
    pub(crate) fn connect_patiently(socket: &Path, limit: Duration) -> Result<Self> {
        let control = Self::connect(socket)?;
        control.stream.get_ref().set_read_timeout(Some(limit))?;
        Ok(control)
    }

    /// Creates an empty VDI.
    ///
    /// # Errors
    /// As the daemon says.
    pub(crate) fn create(&mut self, name: &str, size_bytes: u64) -> Result<()> {
        let body = json!({ "name": name, "size_bytes": size_bytes });
        self.ask("POST", "/v1/vdis", Some(&body)).map(drop)
    }

    /// Clones a VDI or snapshot.
    ///
    /// # Errors
    /// As the daemon says.
    pub(crate) fn clone_vdi(&mut self, source: &str, name: &str) -> Result<()> {
        let body = json!({ "name": name, "source": source });
        self.ask("POST", "/v1/vdis", Some(&body)).map(drop)
    }

    /// Takes a snapshot and returns its handle, such as `web01@17`.
    ///
    /// # Errors
    /// As the daemon says.
    pub(crate) fn snapshot(&mut self, name: &str) -> Result<String> {
        let answer = self.ask("POST", &format!("/v1/vdis/{name}/snapshots"), Some(&json!({})))?;
        let handle = answer.get("handle").and_then(Value::as_str);
        handle.map(str::to_owned).context("a snapshot without a handle")
    }

    /// Takes a series of snapshots, and returns how many.
    ///
    /// # Errors
    /// As the daemon says.
    pub(crate) fn series(&mut self, name: &str, every: Duration, count: u32) -> Result<u64> {
        let body = json!({ "every_us": every.as_micros(), "count": count });
        let answer = self.ask("POST", &format!("/v1/vdis/{name}/series"), Some(&body))?;
        answer.get("count").and_then(Value::as_u64).context("a series without a count")
    }

    /// Deletes a snapshot, given by its handle.
    ///
    /// # Errors
    /// As the daemon says.
    pub(crate) fn remove_snapshot(&mut self, handle: &str) -> Result<()> {
        let (name, snapshot) = handle.split_once('@').context("not the handle of a snapshot")?;
        self.ask("DELETE", &format!("/v1/vdis/{name}/snapshots/{snapshot}"), None).map(drop)
    }

    /// Names of the VDIs that follow `after` in order of name, as many as `max` of them.
    ///
    /// # Errors
    /// As the daemon says.
    pub(crate) fn list(&mut self, after: &str, max: usize) -> Result<Vec<String>> {
        let page = self.ask("GET", &format!("/v1/vdis?after={after}&max={max}"), None)?;
        let vdis = page.get("vdis").and_then(Value::as_array).context("a page without disks")?;
        let name = |vdi: &Value| Some(vdi.get("name")?.as_str()?.to_owned());
        vdis.iter().map(name).collect::<Option<_>>().context("a disk without a name")
    }

    /// Gives a VDI another size.
    ///
    /// # Errors
    /// As the daemon says.
    pub(crate) fn resize(&mut self, name: &str, size_bytes: u64) -> Result<()> {
        let body = json!({ "size_bytes": size_bytes });
        self.ask("PATCH", &format!("/v1/vdis/{name}"), Some(&body)).map(drop)
    }

    /// Gives a VDI a history, as `set` takes it.
    ///
    /// # Errors
    /// As the daemon says.
    pub(crate) fn set_history(&mut self, name: &str, history: &str) -> Result<()> {
        let body = json!({ "history": history });
        self.ask("PATCH", &format!("/v1/vdis/{name}"), Some(&body)).map(drop)
    }

    /// Deletes a VDI with its snapshots.
    ///
    /// # Errors
    /// As the daemon says.
    pub(crate) fn remove(&mut self, name: &str) -> Result<()> {
        self.ask("DELETE", &format!("/v1/vdis/{name}"), None).map(drop)
    }

    /// Collects garbage, and has the space of free blocks given back.
    ///
    /// # Errors
    /// As the daemon says.
    pub(crate) fn collect_garbage(&mut self) -> Result<Collected> {
        let answer = self.ask("POST", "/v1/gc", None)?;
        serde_json::from_value(answer).context("decode what was collected")
    }

    /// What the garbage collection is doing: `idle`, `marking`, `sweeping` or `trimming`.
    ///
    /// # Errors
    /// If the daemon does not answer.
    pub(crate) fn garbage_phase(&mut self) -> Result<String> {
        let status = self.ask("GET", "/v1/gc", None)?;
        let phase = status.get("phase").and_then(Value::as_str);
        phase.map(str::to_owned).context("a status without a phase")
    }

    /// Attaches a VDI over vhost-user.
    ///
    /// # Errors
    /// As the daemon says.
    pub(crate) fn attach(&mut self, name: &str, socket: &Path) -> Result<()> {
        let body = json!({ "disk": name, "vhost_user": socket });
        self.ask("POST", "/v1/attachments", Some(&body)).map(drop)
    }

    /// The daemon's counters and gauges.
    ///
    /// # Errors
    /// If it does not answer.
    pub(crate) fn stats(&mut self) -> Result<Value> {
        self.ask("GET", "/v1/stats", None)
    }

    /// One of them.
    ///
    /// # Errors
    /// If there is none of that name.
    pub(crate) fn stat(&mut self, name: &str) -> Result<u64> {
        let stats = self.stats()?;
        let value = stats.get(name).and_then(Value::as_u64);
        value.with_context(|| format!("the daemon has no counter '{name}'"))
    }

    /// Sends one request and returns the answer's body.
    ///
    /// # Errors
    /// With the daemon's own message if it refuses.
    fn ask(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: parallax\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        let (status, length) = self.head()?;
        ensure!(length <= ANSWER_BYTES_MAX, "an answer of {length} bytes");
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        if !(200..300).contains(&status) {
            bail!("{method} {path}: status {status}: {}", String::from_utf8_lossy(&bytes));
        }
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes).with_context(|| format!("{method} {path}: decode"))
    }

    /// Reads the status line and the headers; returns the status and the length of the body.
    fn head(&mut self) -> Result<(u16, usize)> {
        let line = self.line()?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.with_context(|| format!("not a status line: {line:?}"))?;
        let mut length = None;
        loop {
            let line = self.line()?.to_ascii_lowercase();
            if line.is_empty() {
                return Ok((status, length.context("an answer without content-length")?));
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = Some(value.trim().parse()?);
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        // Bounded, so that a stream without line ends cannot fill the memory.
        let read = self.stream.by_ref().take(64 << 10).read_line(&mut line)?;
        ensure!(read > 0, "the daemon closed the connection");
        Ok(line.trim_end().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection whose other end has already said `answer`.
    fn answered(answer: &str) -> (Control, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(answer.as_bytes()).unwrap();
        (Control { stream: BufReader::new(ours) }, theirs)
    }

    #[test]
    fn pages_and_phases_are_taken_apart() {
        let ok =
            |body: &str| format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let page = ok(r#"{"vdis":[{"name":"a"},{"name":"b"}],"next":null}"#);
        let unnamed = ok(r#"{"vdis":[{"id":1}],"next":null}"#);
        let phase = ok(r#"{"phase":"marking","cycles":1}"#);
        let (mut control, _theirs) = answered(&(page + &unnamed + &phase));
        assert_eq!(control.list("", 2).unwrap(), ["a", "b"]);
        assert!(control.list("", 2).is_err(), "a disk without a name");
        assert_eq!(control.garbage_phase().unwrap(), "marking");
        assert!(control.remove_snapshot("a").is_err(), "not a handle");
    }

    #[test]
    fn answers_are_decoded_and_refusals_keep_their_message() {
        let body = r#"{"handle":"a@1"}"#;
        let good = format!("HTTP/1.1 201 Created\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let (mut control, theirs) = answered(&good);
        assert_eq!(control.snapshot("a").unwrap(), "a@1");
        drop(theirs);
        assert!(control.stat("reads").is_err(), "the connection is closed");

        let bad = "HTTP/1.1 404 Not Found\r\ncontent-length: 7\r\n\r\nno such";
        let (mut control, _theirs) = answered(bad);
        let error = control.snapshot("a").unwrap_err().to_string();
        assert!(error.contains("404") && error.contains("no such"), "{error}");
    }
}
