//! `parallax import` and `parallax export`: qemu-img copies, through the daemon's own NBD socket.
//!
//! Invariants: a disk whose import failed is removed again; an exported file appears whole or not
//! at all; what is copied is one moment of the disk.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use api::{CreateVdi, Error, Kind, percent_encode};
use jiff::Timestamp;
use serde_json::json;

use super::background::Interrupts;
use super::qemu_img;
use super::{Context, WRITE_PREFIX};
use crate::output::{self, bytes};

/// Parallel copies that qemu-img runs; more gained nothing when tried.
const COROUTINES: &str = "8";

/// What to export.
pub(super) struct Source {
    pub(super) name: String,
    pub(super) snapshot: Option<String>,
}

pub(super) async fn import(
    context: &Context,
    file: &Path,
    name: &str,
    format: Option<String>,
) -> Result<(), Error> {
    let shown = file.display();
    check_source(context, file, name).await?;
    let file = file.canonicalize().map_err(|e| Error::system(&format!("read {shown}"), &e))?;
    let status = qemu_img::inspect(&file, format.as_deref())?;
    if let (Some(other), None) = (status.refers_to(), &format) {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "{shown} takes contents from another file, {other}; if you trust it, say what it \
                 is: --format {}",
                status.format
            ),
        ));
    }
    if status.virtual_size == 0 {
        return Err(Error::new(Kind::Invalid, format!("{shown} is empty")));
    }
    let mut interrupts = Interrupts::catch()?;
    let target = nbd_url(context, name).await?;
    let size_bytes = Some(status.virtual_size);
    let request = CreateVdi { name: name.to_owned(), size_bytes, source: None, history: None };
    let vdi = context.client.create(&request).await?;
    // A new disk reads as zeroes: holes need not be written (--target-is-zero). The default cache
    // mode of convert would never flush.
    let arguments = [
        &["-n", "-W", "-m", COROUTINES, "-t", "writeback", "--target-is-zero"][..],
        &["-f", &status.format, "-O", "raw", &file.to_string_lossy(), &target],
    ]
    .concat()
    .iter()
    .map(|&argument| argument.to_owned())
    .collect::<Vec<_>>();
    let copied = qemu_img::convert(&arguments, &format!("import {name}"), &mut interrupts).await;
    if let Err(error) = copied {
        return Err(undo_import(context, name, error).await);
    }
    context.print(
        &vdi,
        &format!("imported {shown} ({}) as {name} ({})", status.format, bytes(vdi.size_bytes)),
    )
}

/// Refuses what is no file. A stream tells its size too late; qemu-img would say so less clearly.
async fn check_source(context: &Context, file: &Path, name: &str) -> Result<(), Error> {
    let shown = file.display();
    if file != Path::new("-") {
        let found = std::fs::metadata(file)
            .map_err(|e| Error::system(&format!("read {shown}"), &e))?
            .file_type();
        if found.is_dir() {
            return Err(Error::new(Kind::Invalid, format!("{shown} is a directory")));
        }
        if found.is_file() || found.is_block_device() {
            return Ok(());
        }
    }
    let url = nbd_url(context, name).await?;
    Err(Error::new(
        Kind::Invalid,
        format!(
            "{shown} is a stream, and only files can be imported; if it is raw: parallax create \
             {name} --size SIZE, then nbdcopy --flush - '{url}'"
        ),
    ))
}

async fn undo_import(context: &Context, name: &str, mut error: Error) -> Error {
    if error.kind == Kind::NoSpace {
        // To qemu-img it is some device that is full.
        error.message = format!(
            "the store is full: delete disks or snapshots; `parallax ls --space` shows what they \
             take ({error})"
        );
    }
    let message = match context.client.remove(name).await {
        Ok(_) => format!("cannot import into {name}: {error}"),
        Err(undo) => format!(
            "cannot import into {name}: {error}; {name} is incomplete and could not be removed \
             ({undo}): delete it with parallax rm {name}"
        ),
    };
    Error::new(error.kind, message)
}

pub(super) async fn export(
    context: &Context,
    source: Source,
    file: &Path,
    format: Option<String>,
    force: bool,
) -> Result<(), Error> {
    let format = format.unwrap_or_else(|| format_of(file).to_owned());
    if is_stream_or_device(file) {
        return Err(no_file(context, &source, file).await);
    }
    check_target(file, force)?;
    let mut interrupts = Interrupts::catch()?;
    let (snapshot, temporary) = match source.snapshot {
        Some(snapshot) => {
            // qemu-img would say the same less clearly. Of a write only who opens it can tell.
            if !snapshot.starts_with(WRITE_PREFIX) {
                context.client.snapshot_status(&source.name, &snapshot).await?;
            }
            (snapshot, false)
        }
        None => (hold(context, &source.name).await?, true),
    };
    let target = format!("{}@{snapshot}", source.name);
    let damaged_before = context.client.stats().await?.checksum_failures;
    let mut copied = copy_out(context, &target, file, &format, &mut interrupts).await;
    if let Err(error) = &mut copied
        && error.kind == Kind::Io
        && context.client.stats().await.is_ok_and(|now| now.checksum_failures > damaged_before)
    {
        // To qemu-img it is an I/O error like any other.
        error.kind = Kind::Damaged;
        error.message.push_str("; the disk is damaged there, and the daemon's log names the block");
    }
    let released = match temporary {
        true => context.client.remove_snapshot(&source.name, &snapshot).await.map(drop),
        false => Ok(()),
    };
    let shown = file.display();
    let exported = if temporary { &source.name } else { &target };
    // If both failed, the first tells why.
    copied.and(released).map_err(|error| {
        Error::new(error.kind, format!("cannot export {exported} to {shown}: {error}"))
    })?;
    let length = std::fs::metadata(file).map(|file| file.len()).unwrap_or_default();
    if context.json {
        return output::print_json(&json!({
            "exported": exported,
            "file": file,
            "format": format,
            "length_bytes": length,
        }));
    }
    output::print(&format!("exported {exported} to {shown} ({format}, {})", bytes(length)))
}

fn is_stream_or_device(file: &Path) -> bool {
    let special = |found: std::fs::Metadata| !found.is_file() && !found.is_dir();
    file == Path::new("-") || std::fs::metadata(file).is_ok_and(special)
}

/// An export takes its place when it is complete, which only a file can; says what to do instead.
async fn no_file(context: &Context, source: &Source, file: &Path) -> Error {
    let shown = file.display();
    let export = match &source.snapshot {
        Some(snapshot) => format!("{}@{snapshot}", source.name),
        None => source.name.clone(),
    };
    match nbd_url(context, &export).await {
        Ok(url) => {
            let hint =
                format!("{shown} is not a file; for a stream or device: nbdcopy '{url}' {shown}");
            Error::new(Kind::Invalid, hint)
        }
        Err(error) => error,
    }
}

/// A snapshot that holds one moment of a disk that may be running.
async fn hold(context: &Context, name: &str) -> Result<String, Error> {
    let now = Timestamp::now().as_second();
    let label = format!("export-{now}-{}", std::process::id());
    context.client.snapshot(name, Some(&label)).await?;
    Ok(label)
}

/// Copies to a file beside the target, which takes its place when it is complete and durable.
async fn copy_out(
    context: &Context,
    target: &str,
    file: &Path,
    format: &str,
    interrupts: &mut Interrupts,
) -> Result<(), Error> {
    let file = std::path::absolute(file)
        .map_err(|e| Error::system(&format!("find {}", file.display()), &e))?;
    let partial = partial_path(&file);
    let url = nbd_url(context, target).await?;
    let mut arguments: Vec<String> =
        ["-m", COROUTINES, "-t", "writeback", "-f", "raw", "-O"].map(str::to_owned).into();
    arguments.push(format.to_owned());
    if format == "raw" {
        // Out of order: other formats would become fragmented.
        arguments.push("-W".to_owned());
    }
    arguments.extend([url, partial.to_string_lossy().into_owned()]);
    let copied = qemu_img::convert(&arguments, &format!("export {target}"), interrupts).await;
    let outcome = copied.and_then(|()| {
        let place = std::fs::rename(&partial, &file).and_then(|()| {
            let dir = file.parent().unwrap_or(Path::new("/"));
            File::open(dir)?.sync_all()
        });
        place.map_err(|e| Error::system(&format!("put {} in place", file.display()), &e))
    });
    if outcome.is_err() {
        // It may not have been created at all.
        let _ = std::fs::remove_file(&partial);
    }
    outcome
}

/// A name of this process's own: two exports into one file must not write into each other's.
fn partial_path(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{}.partial", std::process::id()));
    name.into()
}

fn check_target(file: &Path, force: bool) -> Result<(), Error> {
    let shown = file.display();
    match std::fs::symlink_metadata(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::system(&format!("look at {shown}"), &error)),
        Ok(found) if !found.is_file() => {
            Err(Error::new(Kind::Invalid, format!("{shown} is there, and is not a file")))
        }
        Ok(_) if !force => Err(Error::new(
            Kind::Exists,
            format!("{shown} exists already; to replace it, add --force"),
        )),
        Ok(_) => Ok(()),
    }
}

/// The format that a file's extension stands for.
fn format_of(file: &Path) -> &'static str {
    let extension = file.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    match extension.as_deref() {
        Some("qcow2") => "qcow2",
        Some("vmdk") => "vmdk",
        Some("vdi") => "vdi",
        Some("vhd" | "vpc") => "vpc",
        Some("vhdx") => "vhdx",
        _ => "raw",
    }
}

/// The URL under which the daemon serves an export on a unix socket of this machine.
async fn nbd_url(context: &Context, export: &str) -> Result<String, Error> {
    // A slash may stand in a query, and messages show the URL to people.
    let socket = percent_encode(&nbd_socket(context).await?).replace("%2F", "/");
    Ok(format!("nbd+unix:///{}?socket={socket}", percent_encode(export)))
}

/// The unix socket of this machine on which the daemon serves NBD.
pub(super) async fn nbd_socket(context: &Context) -> Result<String, Error> {
    let status = context.client.daemon().await?;
    let socket = status.nbd.iter().find_map(|endpoint| endpoint.address.strip_prefix("unix:"));
    let unserved = || Error::new(Kind::Unsupported, "the daemon serves NBD on no unix socket");
    socket.map(str::to_owned).ok_or_else(unserved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extension_chooses_the_format() {
        let check = |file: &str, format: &str| assert_eq!(format_of(Path::new(file)), format);
        check("a.qcow2", "qcow2");
        check("a.QCOW2", "qcow2");
        check("a.vhd", "vpc");
        check("a.img", "raw");
        check("a", "raw");
    }

    #[test]
    fn a_partial_file_lies_beside_its_target() {
        let expected = format!("/a/b.raw.{}.partial", std::process::id());
        assert_eq!(partial_path(Path::new("/a/b.raw")), Path::new(&expected));
    }
}
