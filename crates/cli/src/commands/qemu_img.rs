//! Runs qemu-img, which knows every format there is: looks at files, copies, tells how far it is.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use api::{Error, Kind};
use indicatif::ProgressBar;
use serde::Deserialize;

use super::background::Interrupts;

/// Longest error message that is kept.
const MESSAGE_BYTES_MAX: u64 = 64 << 10;

/// Lines of it that are shown.
const MESSAGE_LINES_MAX: usize = 2;

/// What a file is.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct FileStatus {
    pub(super) format: String,
    pub(super) virtual_size: u64,
    #[serde(default)]
    pub(super) backing_filename: Option<String>,
    #[serde(default)]
    format_specific: Option<FormatSpecific>,
}

#[derive(Debug, Deserialize)]
struct FormatSpecific {
    #[serde(default)]
    data: serde_json::Value,
}

impl FileStatus {
    /// Another file whose contents this one would pull in.
    pub(super) fn refers_to(&self) -> Option<&str> {
        let data_file = self.format_specific.as_ref().and_then(|it| it.data.get("data-file"));
        self.backing_filename.as_deref().or_else(|| data_file.and_then(|name| name.as_str()))
    }
}

/// Looks at a file; `path` must be absolute, so that it cannot read as a protocol.
pub(super) fn inspect(path: &Path, format: Option<&str>) -> Result<FileStatus, Error> {
    let mut command = Command::new("qemu-img");
    command.args(["info", "--output=json"]);
    if let Some(format) = format {
        command.args(["-f", format]);
    }
    command.arg(path).env("LC_ALL", "C");
    let output = command.output().map_err(|e| not_started(&e))?;
    if !output.status.success() {
        return Err(failure(&String::from_utf8_lossy(&output.stderr)));
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|e| Error::new(Kind::Io, format!("qemu-img info answers strangely: {e}")))
}

/// Runs `qemu-img convert -p` with `arguments`, and shows how far it is if stderr is a terminal.
pub(super) async fn convert(
    arguments: &[String],
    title: &str,
    interrupts: &mut Interrupts,
) -> Result<(), Error> {
    let mut child = Command::new("qemu-img")
        .args(["convert", "-p"])
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| not_started(&e))?;
    let bar = super::progress::bar(title, 10_000);
    let progress = child.stdout.take();
    let messages = child.stderr.take();
    let watched = bar.clone();
    let watch = tokio::task::spawn_blocking(move || watch_progress(progress, &watched));
    let listen = tokio::task::spawn_blocking(move || read_messages(messages));
    let interrupted = tokio::select! {
        // It ends when the child closes its output.
        _ = watch => false,
        () = interrupts.any() => true,
    };
    bar.finish_and_clear();
    if interrupted {
        end(&mut child);
        return Err(Error::new(Kind::Io, "interrupted"));
    }
    let status = child.wait().map_err(|e| Error::system("wait for qemu-img", &e))?;
    let messages = listen.await.unwrap_or_default();
    if status.success() { Ok(()) } else { Err(failure(&messages)) }
}

/// Reads `    (12.34/100%)\r` until the end.
fn watch_progress(output: Option<impl Read>, bar: &ProgressBar) {
    let Some(mut output) = output else { return };
    let (mut line, mut chunk) = (Vec::new(), [0; 256]);
    while let Ok(count @ 1..) = output.read(&mut chunk) {
        for &byte in chunk.iter().take(count) {
            match byte {
                b'\r' | b'\n' => {
                    if let Some(position) = parse_progress(&line) {
                        bar.set_position(position);
                    }
                    line.clear();
                }
                _ if line.len() < 64 => line.push(byte),
                _ => {}
            }
        }
    }
}

/// Hundredths of a percent.
fn parse_progress(line: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(line).ok()?.trim().strip_prefix('(')?;
    let (percent, hundredths) = text.strip_suffix("/100%)")?.split_once('.')?;
    let percent: u64 = percent.parse().ok()?;
    percent.checked_mul(100)?.checked_add(hundredths.parse().ok()?)
}

fn read_messages(output: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(output) = output {
        // Whatever could be read is worth showing.
        let _ = output.take(MESSAGE_BYTES_MAX).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Ends a child and waits for it. If Ctrl-C reached it too, it has ended by itself.
fn end(child: &mut Child) {
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        tracing::warn!(%error, "cannot end qemu-img");
    }
}

fn not_started(error: &std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::NotFound {
        return Error::new(
            Kind::Unsupported,
            "this needs qemu-img, which is not installed (Debian, Ubuntu: apt install qemu-utils; \
             Fedora: dnf install qemu-img)",
        );
    }
    Error::system("start qemu-img", error)
}

fn failure(messages: &str) -> Error {
    let kind = if messages.contains("No space left on device") {
        Kind::NoSpace
    } else if messages.contains("No such file or directory") {
        Kind::NotFound
    } else if messages.contains("Unknown driver") || messages.contains("Unknown file format") {
        Kind::Invalid
    } else if messages.contains("Failed to get shared") || messages.contains("Failed to get \"") {
        Kind::Busy
    } else {
        Kind::Io
    };
    // When one of the parallel copies fails, all do: what follows only repeats it.
    let lines = messages.trim().lines().take(MESSAGE_LINES_MAX);
    let lines: Vec<&str> =
        lines.map(|line| line.strip_prefix("qemu-img: ").unwrap_or(line)).collect();
    Error::new(kind, format!("qemu-img: {}", lines.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_parses() {
        assert_eq!(parse_progress(b"    (12.34/100%)"), Some(1234));
        assert_eq!(parse_progress(b"    (100.00/100%)"), Some(10_000));
        for bad in
            ["", "(", "(x.y/100%)", "(12/100%)", "12.34/100%", "(18446744073709551615.00/100%)"]
        {
            assert_eq!(parse_progress(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn failures_have_kinds() {
        let full = failure("qemu-img: error while writing at byte 7: No space left on device\n");
        assert_eq!(full.kind, Kind::NoSpace);
        assert_eq!(
            full.message,
            "qemu-img: error while writing at byte 7: No space left on device"
        );
        assert_eq!(failure("qemu-img: Unknown driver 'x'").kind, Kind::Invalid);
        let many = failure(&"qemu-img: error while writing: Input/output error\n".repeat(8));
        assert_eq!(many.message.matches("Input/output").count(), MESSAGE_LINES_MAX);
    }

    #[test]
    fn files_that_refer_to_others_are_recognised() {
        let check = |json: &str, expected: Option<&str>| {
            let status: FileStatus = serde_json::from_str(json).unwrap();
            assert_eq!(status.refers_to(), expected);
        };
        check(r#"{"format":"raw","virtual-size":512}"#, None);
        check(
            r#"{"format":"qcow2","virtual-size":1,"backing-filename":"/etc/shadow"}"#,
            Some("/etc/shadow"),
        );
        check(
            r#"{"format":"qcow2","virtual-size":1,
                "format-specific":{"type":"qcow2","data":{"data-file":"d.raw"}}}"#,
            Some("d.raw"),
        );
    }
}
