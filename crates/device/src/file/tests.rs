use super::*;
use base::BlockSlice;

fn read(blocks: usize) -> FileOperation {
    let action = FileAction::Read { buffer: Buffer::zeroed(blocks), range: 0..blocks * BLOCK_SIZE };
    FileOperation { token: 0, offset: 8192, action }
}

fn write(slices: &[usize]) -> FileOperation {
    let slice = |&blocks: &usize| BlockSlice::whole(Rc::new(Buffer::zeroed(blocks)));
    let action = FileAction::Write { blocks: slices.iter().map(slice).collect(), skip: 0 };
    FileOperation { token: 0, offset: 8192, action }
}

/// What follows each of `counts`, as bytes done so far, `end` or `cut`.
fn check(mut operation: FileOperation, counts: &[usize], expected: &[&str]) {
    let mut seen = Vec::new();
    for &count in counts {
        let next = advance(&mut operation, count);
        let done = operation.offset - 8192;
        seen.push(match next {
            Next::GoOn => done.to_string(),
            Next::End(Ok(())) => "end".to_owned(),
            Next::End(Err(cause)) => {
                assert_eq!(cause, Cause::Truncated);
                "cut".to_owned()
            }
        });
        match &operation.action {
            FileAction::Read { range, .. } => {
                assert!(range.is_empty() || u64::try_from(range.start) == Ok(done));
            }
            FileAction::Write { skip, .. } => {
                assert!(matches!(next, Next::End(_)) || u64::try_from(*skip) == Ok(done));
            }
            _ => {}
        }
    }
    assert_eq!(seen, expected);
}

#[test]
fn short_transfers_go_on_at_a_whole_block() {
    check(read(1), &[4096], &["end"]);
    check(read(1), &[512, 4096], &["0", "end"]);
    check(read(4), &[4096, 5000, 8191, 4096], &["4096", "8192", "12288", "end"]);
    check(read(2), &[4096, 0], &["4096", "cut"]);
    check(read(2), &[0], &["cut"]);
    check(write(&[1, 2, 1]), &[16384], &["end"]);
    check(write(&[1, 2, 1]), &[4095, 12288, 4096], &["0", "12288", "end"]);
    let sync = FileOperation { token: 0, offset: 8192, action: FileAction::Sync };
    check(sync, &[0], &["end"]);
}

#[test]
fn errnos_have_causes() {
    for (errno, expected) in [
        (libc::ENOSPC, Cause::NoSpace),
        (libc::EDQUOT, Cause::NoSpace),
        (libc::EFBIG, Cause::NoSpace),
        (libc::EOPNOTSUPP, Cause::Unsupported),
        (libc::ENODEV, Cause::Gone),
        (libc::ECANCELED, Cause::Gone),
        (libc::EIO, Cause::Errno(libc::EIO)),
        (libc::EREMOTEIO, Cause::Errno(libc::EREMOTEIO)),
    ] {
        assert_eq!(cause(&io::Error::from_raw_os_error(errno)), expected);
    }
}
