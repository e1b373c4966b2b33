//! What there is already on a file or device that somebody wants to format.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use base::BLOCK_SIZE;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// Blocks of a file that are looked at, or about as many: some of each piece of data, and of a large
/// piece one in so many bytes.
const LOOKS: u64 = 16_384;
const STRIDE_MIN: u64 = 1 << 20;

/// What a file holds besides zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Data {
    /// Nothing, as far as was looked.
    None,
    /// Something, at this byte.
    At(u64),
    /// Nobody knows: it has more pieces than are looked at.
    TooMany,
}

/// Looks at the beginning of each piece of data of a sparse file, and here and there within it: an
/// image of a disk may be empty where disks have their labels.
pub(super) fn data_in(path: &Path) -> io::Result<Data> {
    let file = File::open(path)?;
    let stride = (file.metadata()?.len() / LOOKS).max(STRIDE_MIN);
    let mut block = vec![0; BLOCK_SIZE];
    let mut at = 0;
    for _ in 0..2 * LOOKS {
        let Some(data) = next(&file, SeekFrom::Data(at))? else { return Ok(Data::None) };
        let count = file.read_at(&mut block, data)?;
        if block.iter().take(count).any(|&byte| byte != 0) {
            return Ok(Data::At(data));
        }
        let hole = next(&file, SeekFrom::Hole(data))?.unwrap_or(u64::MAX);
        at = (data + stride).min(hole.max(data + 1));
    }
    Ok(Data::TooMany)
}

/// Where data or a hole begins. Where a file system does not know, all is data.
fn next(file: &File, from: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, from) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// What stands there by its signature, as "ext4" or "gpt", if `blkid` is installed and knows it.
pub(super) fn signature(path: &Path) -> Option<String> {
    let mut command = Command::new("blkid");
    command.args(["--probe", "--output", "value", "--match-tag", "TYPE", "--match-tag", "PTTYPE"]);
    let output = command.arg(path).stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let first = text.lines().next()?.trim();
    let is_a_word = !first.is_empty() && first.chars().all(|c| c.is_ascii_graphic());
    is_a_word.then(|| first.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_found_wherever_it_stands() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = File::create(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        assert_eq!(data_in(&path).unwrap(), Data::None);
        file.write_all_at(b"x", (1 << 29) + 4096).unwrap();
        assert_eq!(data_in(&path).unwrap(), Data::At((1 << 29) + 4096));
    }

    #[test]
    fn written_zeroes_are_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![0; 40 << 20]).unwrap();
        assert_eq!(data_in(&path).unwrap(), Data::None);
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"x", 2 * STRIDE_MIN).unwrap();
        assert_eq!(data_in(&path).unwrap(), Data::At(2 * STRIDE_MIN));
    }
}
