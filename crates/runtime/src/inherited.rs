//! Descriptors that a program leaves open for the one that it becomes, by exec(2).
#![expect(unsafe_code, reason = "a descriptor is a number here")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::FdFlags;

/// Leaves a descriptor open for the next program, which finds it by its number.
///
/// # Errors
/// What the kernel says.
pub fn leave(fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::io::fcntl_setfd(fd, FdFlags::empty())?)
}

/// Keeps a descriptor that was left: there is no next program after all.
///
/// # Errors
/// What the kernel says.
pub fn keep(fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::io::fcntl_setfd(fd, FdFlags::CLOEXEC)?)
}

/// Takes a descriptor that the program before has left; it is not left to the next one, nor to any
/// program that is started. Each can be taken once.
///
/// # Errors
/// `NotFound` if no program has left one with this number.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    const STANDARD_STREAMS: std::ops::Range<RawFd> = 0..3;
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    if number < 0 || STANDARD_STREAMS.contains(&number) {
        return Err(missing());
    }
    // SAFETY: the number is not -1, which is all that a borrowed descriptor must not be; what the
    // kernel says of one that is not open is an error.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = rustix::io::fcntl_getfd(borrowed).map_err(|_| missing())?;
    if flags.contains(FdFlags::CLOEXEC) {
        // Opened by this program, which opens all of its descriptors so: somebody owns it.
        return Err(missing());
    }
    // SAFETY: it is open, and was not opened by this program, nor taken before: its flag would be
    // set. So nobody owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(fd.as_fd(), FdFlags::CLOEXEC)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn what_was_left_is_taken_once() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let number = file.as_raw_fd();
        assert!(take(number).is_err(), "it is ours");
        leave(file.as_fd()).unwrap();
        // As exec(2) would have it: nobody owns the number.
        let number_left = file.into_raw_fd();
        assert_eq!(number_left, number);
        let taken = take(number).unwrap();
        assert!(take(number).is_err(), "it was taken");
        drop(taken);
        for never in [-1, 0, 2, 1_000_000] {
            assert!(take(never).is_err(), "{never}");
        }
    }
}
