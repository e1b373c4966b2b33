//! What it takes to open or format a store: the device, identities, secrets.

use std::path::Path;
use std::time::Duration;

use api::{Error, Kind};
use base::ErrorKind;
pub(crate) use device::{Access, OpenOptions as DeviceOptions};
use device::{BlockFile, Device, OpenCause};
use runtime::reactor::{EngineChoice, Io, Reactor};
use rustix::rand::{GetRandomFlags, getrandom};
use vdi::{OpenOptions, Reuse};

/// A reactor on this thread, with the I/O engine that PARALLAX_IO_ENGINE names, if it does.
pub(crate) fn reactor() -> Result<Reactor, Error> {
    EngineChoice::from_environment()
        .and_then(Reactor::start)
        .map_err(|e| Error::system("start the I/O engine", &e))
}

/// Opens the file or block device.
pub(crate) fn device(io: &Io, path: &Path, options: DeviceOptions) -> Result<Device, Error> {
    match BlockFile::open(io, path, options) {
        Ok(file) => Ok(Device::new(std::rc::Rc::new(file))),
        Err(error) => {
            let hint = match error.cause {
                OpenCause::NotFound => "; make a store with: parallax format PATH --size 64G",
                OpenCause::Busy => return Err(in_use(path)),
                OpenCause::DirectRefused => "; if only this machine uses it, add --buffered",
                _ => "",
            };
            Err(Error::new(error.kind(), format!("{error}{hint}")))
        }
    }
}

/// Says that somebody else has a device open.
pub(crate) fn in_use(path: &Path) -> Error {
    let shown = path.display();
    Error::new(
        Kind::Busy,
        format!("another process uses {shown}: is a daemon serving it? stop that first"),
    )
}

/// Disks that stay in memory though nobody uses them: some megabytes.
const IDLE_VDIS_MAX: usize = 1000;

/// What a garbage collection loses at most when the daemon is stopped.
const MARKS_STORED_EVERY: Duration = Duration::from_secs(30);

/// Options for opening a store in a new epoch.
pub(crate) fn options(
    cache_bytes: usize,
    gc_memory_bytes: u64,
    after_failure: bool,
) -> Result<OpenOptions, Error> {
    let (boot_id, nonce) = (boot_id()?, nonce()?);
    Ok(OpenOptions {
        cache_bytes,
        boot_id,
        nonce,
        after_failure,
        idle_vdis_max: IDLE_VDIS_MAX,
        marks_stored_every: MARKS_STORED_EVERY,
        gc_memory_bytes,
        reuse: Reuse::Late,
    })
}

/// A random number for a new epoch.
pub(crate) fn nonce() -> Result<u64, Error> {
    random().map(u64::from_le_bytes)
}

/// Secure random bytes.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    let count = getrandom(&mut bytes, GetRandomFlags::empty())
        .map_err(|e| Error::system("get random numbers", &e.into()))?;
    // getrandom(2): up to 256 bytes come whole.
    assert!(count == N && N <= 256);
    Ok(bytes)
}

/// Identity of this boot of this machine, all zeroes if the kernel does not tell.
pub(crate) fn boot_id() -> Result<[u8; 16], Error> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text =
        std::fs::read_to_string(path).map_err(|e| Error::system(&format!("read {path}"), &e))?;
    parse_uuid(text.trim()).ok_or_else(|| Error::new(Kind::Io, format!("{path} holds no UUID")))
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|&c| c != '-')
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits
        .chunks_exact(2)
        .map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit))
        .collect();
    bytes.try_into().ok().filter(|_| digits.len() == 32)
}

/// Says which store could not be opened, and what helps.
pub(crate) fn explain(path: &Path, error: &vdi::Error) -> Error {
    let shown = path.display();
    let message = match error.kind() {
        ErrorKind::NotFound => {
            format!("there is no store on {shown}: {error}; make one with: parallax format {shown}")
        }
        ErrorKind::Corrupt => format!(
            "the store on {shown} is damaged: {error}; `parallax check {shown}` lists the damage"
        ),
        _ => format!("cannot open the store on {shown}: {error}"),
    };
    Error::new(error.kind(), message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_parse() {
        let bytes = parse_uuid("00112233-4455-6677-8899-aabbccddeeff").unwrap();
        assert_eq!((bytes[0], bytes[1], bytes[15]), (0x00, 0x11, 0xff));
        for bad in ["", "0011", "zz112233-4455-6677-8899-aabbccddeeff", &"0".repeat(33)] {
            assert_eq!(parse_uuid(bad), None, "{bad}");
        }
    }

    #[test]
    fn this_machine_has_a_boot_id_and_randomness() {
        assert_ne!(boot_id().unwrap(), [0; 16]);
        assert_ne!(random::<32>().unwrap(), random::<32>().unwrap());
    }
}
