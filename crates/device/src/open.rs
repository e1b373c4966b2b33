//! Opening files and block devices, and what may be wrong with them.

use std::ffi::OsStr;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base::size::HumanBytes;
use base::{BLOCK_SIZE, BLOCK_SIZE_U64, Buffer, ErrorKind};
use rustix::fs::{Dev, FileType, FlockOperation, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

/// How to open a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// For what, and who else may use it meanwhile.
    pub access: Access,
    /// Go through the page cache instead of O_DIRECT. Only for file systems without O_DIRECT, and
    /// only where one host uses the store: other hosts would not see what the cache holds.
    pub buffered: bool,
}

/// What a device is opened for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// To read and write; refused while anybody else has it open for this or for `ReadOnly`.
    #[default]
    Exclusive,
    /// To read what nobody changes meanwhile; others may do so too.
    ReadOnly,
    /// To read, even while somebody writes: what is read need not fit together.
    Inspect,
}

/// Why a device could not be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenError {
    /// What should have been opened.
    pub path: PathBuf,
    /// Why not.
    pub cause: OpenCause,
}

/// What stands in the way of opening a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenCause {
    /// There is nothing at the path.
    NotFound,
    /// `create` found something there.
    Exists,
    /// The process may not open it.
    Permission,
    /// Another process, or another handle of this one, uses it, or the file behind a loop device.
    Busy,
    /// It is shorter than one block; its length in bytes.
    TooSmall(u64),
    /// It is neither a file nor a block device.
    WrongKind,
    /// Its file system has no O_DIRECT, or wants it in units above 4 KiB.
    DirectRefused,
    /// The system call failed, with this errno.
    Errno(i32),
}

impl OpenError {
    /// As far as a caller may act upon it.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self.cause {
            OpenCause::NotFound => ErrorKind::NotFound,
            OpenCause::Exists => ErrorKind::Exists,
            OpenCause::Permission | OpenCause::TooSmall(_) | OpenCause::WrongKind => {
                ErrorKind::Invalid
            }
            OpenCause::Busy => ErrorKind::Busy,
            OpenCause::DirectRefused => ErrorKind::Unsupported,
            OpenCause::Errno(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ErrorKind::NoSpace,
            OpenCause::Errno(_) => ErrorKind::Io,
        }
    }

    fn new(path: &Path, cause: OpenCause) -> Self {
        Self { path: path.to_owned(), cause }
    }
}

impl From<Errno> for OpenCause {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT => Self::NotFound,
            Errno::EXIST => Self::Exists,
            Errno::ACCESS | Errno::PERM | Errno::ROFS => Self::Permission,
            // EBUSY is what O_EXCL on a block device gets; it says AGAIN for a held flock.
            Errno::BUSY | Errno::AGAIN => Self::Busy,
            errno => Self::Errno(errno.raw_os_error()),
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.cause {
            OpenCause::NotFound => write!(f, "{path} does not exist"),
            OpenCause::Exists => write!(f, "{path} exists already"),
            OpenCause::Permission => write!(f, "no permission to open {path}"),
            OpenCause::Busy => write!(f, "another process uses {path}"),
            OpenCause::TooSmall(bytes) => {
                write!(f, "{path} is too small for a store: {}", HumanBytes(bytes))
            }
            OpenCause::WrongKind => write!(f, "{path} is neither a file nor a block device"),
            OpenCause::DirectRefused => {
                write!(f, "{path} does not take direct I/O (O_DIRECT) in blocks of 4 KiB")
            }
            OpenCause::Errno(errno) => {
                let source = std::io::Error::from_raw_os_error(errno);
                write!(f, "cannot open {path}: {source}")
            }
        }
    }
}

impl std::error::Error for OpenError {}

/// What an open descriptor leads to.
pub(crate) struct Opened {
    pub(crate) fd: OwnedFd,
    /// What holds the lock of the file behind a loop device.
    pub(crate) behind: Option<OwnedFd>,
    pub(crate) block_count: u64,
    pub(crate) is_block_device: bool,
}

/// How long a lock that somebody holds is waited for. The kernel releases the locks of a killed
/// process only when its last I/O is done, which is just what we want, and takes a moment.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// How long that moment may be on a device that is slow or busy, where the kernel tells that it is one.
const DEAD_LOCK_PATIENCE: Duration = Duration::from_secs(60);
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// Opens what is at `path` and locks it as `options` say. Blocks while it waits for the lock.
pub(crate) fn open(path: &Path, options: OpenOptions) -> Result<Opened, OpenError> {
    let fail = |cause| OpenError::new(path, cause);
    let kind = rustix::fs::stat(path).map_err(|errno| fail(errno.into()))?;
    let kind = FileType::from_raw_mode(kind.st_mode);
    // O_EXCL without O_CREAT is defined for block devices only: nobody else may hold it so, which
    // includes file systems that are mounted from it.
    let mut flags = OFlags::CLOEXEC;
    match options.access {
        Access::Exclusive => flags |= OFlags::RDWR,
        Access::ReadOnly | Access::Inspect => flags |= OFlags::RDONLY,
    }
    match kind {
        FileType::RegularFile => {}
        FileType::BlockDevice if options.access == Access::Exclusive => flags |= OFlags::EXCL,
        FileType::BlockDevice => {}
        _ => return Err(fail(OpenCause::WrongKind)),
    }
    if !options.buffered {
        flags |= OFlags::DIRECT;
    }
    let fd =
        patiently(|| rustix::fs::open(path, flags, Mode::empty()), || false).map_err(|errno| {
            let refused = errno == Errno::INVAL && !options.buffered;
            fail(if refused { OpenCause::DirectRefused } else { errno.into() })
        })?;
    let opened = rustix::fs::fstat(&fd).map_err(|errno| fail(errno.into()))?;
    if FileType::from_raw_mode(opened.st_mode) != kind {
        return Err(fail(OpenCause::WrongKind));
    }
    lock(&fd, options.access).map_err(fail)?;
    let is_block_device = kind == FileType::BlockDevice;
    let behind = match is_block_device {
        true => lock_behind(opened.st_rdev, options.access).map_err(fail)?,
        false => None,
    };
    let block_count = examine(&fd).map_err(fail)?;
    Ok(Opened { fd, behind, block_count, is_block_device })
}

/// Locks the file behind a loop device, as the store may be opened there too: both have locks of
/// their own. `None` if it is none, if the store would stand elsewhere in the file, or if there is
/// no file that we may open; then nobody is kept away from it.
fn lock_behind(device: Dev, access: Access) -> Result<Option<OwnedFd>, OpenCause> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let read = |name| std::fs::read(format!("/sys/dev/block/{major}:{minor}/loop/{name}"));
    let (Ok(path), Ok(offset)) = (read("backing_file"), read("offset")) else { return Ok(None) };
    if offset.trim_ascii() != b"0" {
        return Ok(None);
    }
    let path = Path::new(OsStr::from_bytes(path.strip_suffix(b"\n").unwrap_or(&path)));
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let locked = rustix::fs::open(path, flags, Mode::empty())
        .map_err(OpenCause::from)
        .and_then(|fd| lock(&fd, access).map(|()| fd));
    match locked {
        Ok(fd) => Ok(Some(fd)),
        Err(OpenCause::Busy) => Err(OpenCause::Busy),
        Err(cause) => {
            // Not every file system can lock a file that is open for reading only.
            let error = OpenError::new(path, cause);
            tracing::warn!(%error, "the file behind the loop device is not locked");
            Ok(None)
        }
    }
}

/// Makes a sparse file of `bytes`, rounded down to whole blocks, and opens and locks it. File and
/// name are durable on return.
pub(crate) fn create(path: &Path, bytes: u64, buffered: bool) -> Result<Opened, OpenError> {
    let fail = |cause| OpenError::new(path, cause);
    let bytes = bytes - bytes % BLOCK_SIZE_U64;
    if bytes == 0 {
        return Err(fail(OpenCause::TooSmall(bytes)));
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let fd = rustix::fs::open(path, flags, mode).map_err(|errno| fail(errno.into()))?;
    let outcome = fill_new_file(path, &fd, bytes).map_err(|errno| fail(errno.into()));
    drop(fd);
    let options = OpenOptions { access: Access::Exclusive, buffered };
    let opened = outcome.and_then(|()| open(path, options));
    if opened.is_err() {
        // What is there is ours and empty; the error that matters is the first one.
        let _ = rustix::fs::unlink(path);
    }
    opened
}

fn fill_new_file(path: &Path, fd: &OwnedFd, bytes: u64) -> Result<(), Errno> {
    rustix::fs::ftruncate(fd, bytes)?;
    rustix::fs::fsync(fd)?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::fsync(rustix::fs::open(directory, flags, Mode::empty())?)
}

fn lock(fd: &OwnedFd, access: Access) -> Result<(), OpenCause> {
    let operation = match access {
        Access::Exclusive => FlockOperation::NonBlockingLockExclusive,
        Access::ReadOnly => FlockOperation::NonBlockingLockShared,
        Access::Inspect => return Ok(()),
    };
    let id = rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino))?;
    let is_left = || std::fs::read_to_string("/proc/locks").is_ok_and(|locks| is_left(&locks, id));
    Ok(patiently(|| rustix::fs::flock(fd, operation), is_left)?)
}

/// Whether a file is locked by nobody but processes that have ended: what they have asked the device
/// for is still under way. Source: the kernel's fs/locks.c, `lock_get_status`.
fn is_left(locks: &str, (device, inode): (Dev, u64)) -> bool {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    let owner = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let (kind, owner, locked) = (words.next()?, words.nth(2)?.to_owned(), words.next()?);
        (kind == "FLOCK" && locked == file).then_some(owner)
    };
    let mut owners = locks.lines().filter_map(owner).peekable();
    // Without a number it is a process that we cannot see: of another container, or machine.
    let has_ended = |owner: String| {
        owner.parse::<u32>().is_ok_and(|id| id > 0 && !Path::new("/proc").join(owner).exists())
    };
    owners.peek().is_some() && owners.all(has_ended)
}

/// Repeats `attempt` for a while if somebody else is in the way, and for longer while `is_left` says
/// that it is nobody any more.
fn patiently<T>(
    mut attempt: impl FnMut() -> Result<T, Errno>,
    is_left: impl Fn() -> bool,
) -> Result<T, Errno> {
    let mut waited = Duration::ZERO;
    let mut patience = LOCK_PATIENCE;
    loop {
        match attempt() {
            Err(errno @ (Errno::BUSY | Errno::AGAIN)) => {
                if waited < DEAD_LOCK_PATIENCE && is_left() {
                    // The kernel's list may leave out a lock once, while others come and go.
                    patience = waited + LOCK_PATIENCE;
                }
                if waited >= patience {
                    return Err(errno);
                }
                #[expect(clippy::disallowed_methods, reason = "before anything runs here")]
                std::thread::sleep(LOCK_INTERVAL);
                waited += LOCK_INTERVAL;
            }
            Err(Errno::INTR) => {}
            outcome => return outcome,
        }
    }
}

/// Number of blocks, if they can be read.
fn examine(fd: &OwnedFd) -> Result<u64, OpenCause> {
    // Of a block device this is what BLKGETSIZE64 says.
    let bytes = rustix::fs::seek(fd, SeekFrom::End(0))?;
    let block_count = bytes / BLOCK_SIZE_U64;
    if block_count == 0 {
        return Err(OpenCause::TooSmall(bytes));
    }
    // Some file systems take O_DIRECT at open and refuse it, or our block size, at the first read.
    let mut block = Buffer::zeroed(1);
    match rustix::io::pread(fd.as_fd(), block.bytes_mut(), 0) {
        Ok(BLOCK_SIZE) => Ok(block_count),
        Err(Errno::INVAL) => Err(OpenCause::DirectRefused),
        Ok(_) => Err(OpenCause::Errno(libc::EIO)),
        Err(errno) => Err(errno.into()),
    }
}
