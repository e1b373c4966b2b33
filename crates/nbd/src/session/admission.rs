//! Which requests reach the disk: a pure decision over a header.

use disk::Request;

use crate::protocol::request::{Command, Header, flag};
use crate::protocol::{Framing, PAYLOAD_BYTES_MAX, error};

/// What a request is judged by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) framing: Framing,
    /// Bytes of the export now.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    /// Whether the client selected `base:allocation`.
    pub(crate) allocation: bool,
}

/// A request that may go on.
#[derive(Debug)]
pub(crate) enum Admitted {
    Disconnect,
    Read {
        length: u32,
        dont_fragment: bool,
    },
    /// The payload is still to be received.
    Write {
        length: u32,
        fua: bool,
    },
    Status {
        length: u64,
        one: bool,
    },
    /// The range stands in the payload and is judged when that has been received.
    StatusByPayload {
        payload: u32,
        one: bool,
    },
    /// A request that is answered with success or an error, nothing else.
    Plain(Request),
}

/// An answer without the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) error: u32,
    pub(crate) message: &'static str,
}

const fn refuse<T>(error: u32, message: &'static str) -> Result<T, Refusal> {
    Err(Refusal { error, message })
}

/// Decides what becomes of a request.
pub(crate) fn admit(header: &Header, limits: &Limits) -> Result<Admitted, Refusal> {
    let Some(command) = Command::from_wire(header.command) else {
        return refuse(error::EINVAL, "unknown command");
    };
    if command == Command::Disconnect {
        return Ok(Admitted::Disconnect);
    }
    if header.flags & !known_flags(command, limits) != 0 {
        return refuse(error::EINVAL, "a flag is not valid for this command");
    }
    let writes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
    if writes && limits.read_only {
        return refuse(error::EPERM, "the export is read-only");
    }
    let has = |bit: u16| header.flags & bit != 0;
    let fua = has(flag::FUA);
    let by_payload = command == Command::BlockStatus && has(flag::PAYLOAD_LEN);
    if command != Command::Flush && !by_payload {
        check_range(command, header.offset, header.length, limits)?;
    }
    let Header { offset, length, .. } = *header;
    Ok(match command {
        Command::Disconnect => Admitted::Disconnect,
        Command::Read => Admitted::Read { length: payload(header)?, dont_fragment: has(flag::DF) },
        Command::Write => Admitted::Write { length: payload(header)?, fua },
        Command::Flush => Admitted::Plain(Request::Flush),
        Command::Trim => Admitted::Plain(Request::Discard { offset, length, fua }),
        Command::Cache => Admitted::Plain(Request::Cache { offset, length }),
        Command::WriteZeroes => {
            let (no_hole, fast_only) = (has(flag::NO_HOLE), has(flag::FAST_ZERO));
            Admitted::Plain(Request::WriteZeroes { offset, length, fua, no_hole, fast_only })
        }
        Command::BlockStatus if !limits.allocation => {
            return refuse(error::EINVAL, "no metadata context was selected");
        }
        Command::BlockStatus if by_payload => {
            Admitted::StatusByPayload { payload: payload(header)?, one: has(flag::REQ_ONE) }
        }
        Command::BlockStatus if length == 0 => {
            return refuse(error::EINVAL, "block status of nothing");
        }
        Command::BlockStatus => Admitted::Status { length, one: has(flag::REQ_ONE) },
    })
}

/// Decides over a block status request whose range stands in its payload.
pub(crate) fn admit_status(offset: u64, length: u64, limits: &Limits) -> Result<(), Refusal> {
    if length == 0 {
        return refuse(error::EINVAL, "block status of nothing");
    }
    check_range(Command::BlockStatus, offset, length, limits)
}

/// Flags that a client may set. FUA must be accepted everywhere.
fn known_flags(command: Command, limits: &Limits) -> u16 {
    let payload = if limits.framing == Framing::Extended { flag::PAYLOAD_LEN } else { 0 };
    let own = match command {
        Command::Read if limits.framing != Framing::Simple => flag::DF,
        Command::Write => payload,
        Command::WriteZeroes => flag::NO_HOLE | flag::FAST_ZERO,
        Command::BlockStatus => flag::REQ_ONE | payload,
        Command::Read | Command::Disconnect | Command::Flush | Command::Trim | Command::Cache => 0,
    };
    own | flag::FUA
}

fn check_range(command: Command, offset: u64, length: u64, limits: &Limits) -> Result<(), Refusal> {
    if offset.checked_add(length).is_some_and(|end| end <= limits.size) {
        return Ok(());
    }
    // The protocol asks for ENOSPC where a larger disk would have taken the data.
    let error = match command {
        Command::Write | Command::WriteZeroes => error::ENOSPC,
        _ => error::EINVAL,
    };
    refuse(error, "the range ends beyond the export")
}

fn payload(header: &Header) -> Result<u32, Refusal> {
    match u32::try_from(header.length) {
        Ok(length) if length <= PAYLOAD_BYTES_MAX => Ok(length),
        _ => refuse(error::EINVAL, "the length is above the maximum payload"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn limits(framing: Framing) -> Limits {
        Limits { framing, size: SIZE, read_only: false, allocation: true }
    }

    fn header(command: Command, flags: u16, offset: u64, length: u64) -> Header {
        Header { flags, command: command.to_wire(), cookie: 1, offset, length }
    }

    fn error_of(header: Header, limits: &Limits) -> u32 {
        admit(&header, limits).map_or_else(|refusal| refusal.error, |_| 0)
    }

    const ALL: [Command; 7] = [
        Command::Read,
        Command::Write,
        Command::Flush,
        Command::Trim,
        Command::Cache,
        Command::WriteZeroes,
        Command::BlockStatus,
    ];

    #[test]
    fn every_flag_of_every_command() {
        for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
            for command in ALL {
                for bit in 0..16 {
                    let flag = 1u16 << bit;
                    let extended = framing == Framing::Extended;
                    let allowed = match (command, flag) {
                        (_, flag::FUA)
                        | (Command::WriteZeroes, flag::NO_HOLE | flag::FAST_ZERO)
                        | (Command::BlockStatus, flag::REQ_ONE) => true,
                        (Command::Read, flag::DF) => framing != Framing::Simple,
                        (Command::Write | Command::BlockStatus, flag::PAYLOAD_LEN) => extended,
                        _ => false,
                    };
                    let error = error_of(header(command, flag, 0, 16), &limits(framing));
                    assert_eq!(error == 0, allowed, "{command:?} {flag:#x} {framing:?}: {error}");
                }
            }
        }
    }

    #[test]
    fn ranges_beyond_the_end() {
        let limits = limits(Framing::Structured);
        for (offset, length) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (0, SIZE + 1)] {
            for command in ALL {
                let expected = match command {
                    Command::Flush => 0,
                    Command::Write | Command::WriteZeroes => error::ENOSPC,
                    _ => error::EINVAL,
                };
                assert_eq!(error_of(header(command, 0, offset, length), &limits), expected);
            }
        }
        for command in ALL {
            assert_eq!(error_of(header(command, 0, 0, SIZE), &limits), 0, "{command:?}");
            assert_eq!(error_of(header(command, 0, SIZE - 1, 1), &limits), 0, "{command:?}");
        }
    }

    #[test]
    fn a_read_only_export_refuses_what_writes() {
        let limits = Limits { read_only: true, ..limits(Framing::Structured) };
        for command in ALL {
            let writes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
            let expected = if writes { error::EPERM } else { 0 };
            assert_eq!(error_of(header(command, 0, 0, 512), &limits), expected);
        }
    }

    #[test]
    fn payloads_are_bounded_and_other_lengths_are_not() {
        let large = u64::from(PAYLOAD_BYTES_MAX) + 1;
        let limits = Limits { size: u64::MAX, ..limits(Framing::Extended) };
        for command in ALL {
            let (flags, carries) = match command {
                Command::Write => (flag::PAYLOAD_LEN, true),
                Command::Read => (0, true),
                _ => (0, false),
            };
            let expected = if carries { error::EINVAL } else { 0 };
            assert_eq!(error_of(header(command, flags, 0, large), &limits), expected);
            let allowed = if carries { large - 1 } else { u64::MAX };
            assert_eq!(error_of(header(command, flags, 0, allowed), &limits), 0, "{command:?}");
        }
    }

    #[test]
    fn block_status_needs_a_context_and_a_range() {
        let structured = limits(Framing::Structured);
        let none = Limits { allocation: false, ..structured };
        assert_eq!(error_of(header(Command::BlockStatus, 0, 0, 1), &none), error::EINVAL);
        assert_eq!(error_of(header(Command::BlockStatus, 0, 0, 0), &structured), error::EINVAL);
        let by_payload = header(Command::BlockStatus, flag::PAYLOAD_LEN, u64::MAX, 12);
        assert!(matches!(
            admit(&by_payload, &limits(Framing::Extended)),
            Ok(Admitted::StatusByPayload { one: false, payload: 12 })
        ));
        assert!(admit_status(0, SIZE + 1, &structured).is_err());
        assert!(admit_status(0, 0, &structured).is_err());
        assert!(admit_status(0, SIZE, &structured).is_ok());
    }

    #[test]
    fn unknown_commands_are_refused() {
        let header = Header { flags: 0, command: 8, cookie: 0, offset: 0, length: 0 };
        assert_eq!(error_of(header, &limits(Framing::Simple)), error::EINVAL);
    }
}
