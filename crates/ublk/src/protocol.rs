//! Messages of ublk, as `linux/ublk_cmd.h` has them: commands of the control device and of a block
//! device's queues, and what the kernel says of a request.
//!
//! All commands are those with encoded numbers (`UBLK_F_CMD_IOCTL_ENCODE`). Everything is in the
//! machine's byte order; this knows little-endian ones.

use disk::in_flight::REQUESTS_MAX;
use disk::{Disk, Request};
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes in a sector, the unit of every offset.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// The units in which programs read and write, and the disk likes best, as powers of two.
const LOGICAL_SHIFT: u8 = 9;
const PHYSICAL_SHIFT: u8 = 12;
const _: () = assert!(1 << LOGICAL_SHIFT == SECTOR_BYTES);
const _: () = assert!(1 << PHYSICAL_SHIFT == base::BLOCK_SIZE);

/// Largest read or write, in bytes and sectors: what the disk takes at once.
pub(crate) const REQUEST_BYTES_MAX: u32 = 1 << 20;
const REQUEST_SECTORS_MAX: u32 = REQUEST_BYTES_MAX >> LOGICAL_SHIFT;
const _: () = assert!(REQUEST_BYTES_MAX as usize == disk::REQUEST_BYTES_MAX);

/// Most sectors of a discard or zeroing: 2 GiB.
const RANGE_SECTORS_MAX: u32 = 1 << 22;

/// Most queues, and requests of all of them together.
pub(crate) const QUEUES_MAX: u16 = 4;
pub(crate) const SLOTS_MAX: u16 = 256;
const _: () = assert!(SLOTS_MAX as usize == REQUESTS_MAX);

/// Largest number of a queue's slots that the kernel knows; maps of descriptors lie so far apart.
const DEPTH_MAX: usize = 4096;

/// Numbers of commands, as `_IOR` and `_IOWR` make them.
pub(crate) mod code {
    const READ: u32 = 2 << 30;
    const READ_WRITE: u32 = 3 << 30;
    const KIND: u32 = 0x75 << 8;
    const CONTROL: u32 = 32 << 16;
    const QUEUE: u32 = 16 << 16;
    const _: () = assert!(size_of::<super::ControlCommand>() == (CONTROL >> 16) as usize);
    const _: () = assert!(size_of::<super::QueueCommand>() == (QUEUE >> 16) as usize);

    pub(crate) const GET_DEVICE: u32 = READ | CONTROL | KIND | 0x02;
    pub(crate) const ADD: u32 = READ_WRITE | CONTROL | KIND | 0x04;
    pub(crate) const DELETE: u32 = READ_WRITE | CONTROL | KIND | 0x05;
    pub(crate) const START: u32 = READ_WRITE | CONTROL | KIND | 0x06;
    pub(crate) const STOP: u32 = READ_WRITE | CONTROL | KIND | 0x07;
    pub(crate) const SET_PARAMETERS: u32 = READ_WRITE | CONTROL | KIND | 0x08;
    pub(crate) const START_RECOVERY: u32 = READ_WRITE | CONTROL | KIND | 0x10;
    pub(crate) const END_RECOVERY: u32 = READ_WRITE | CONTROL | KIND | 0x11;
    pub(crate) const GET_FEATURES: u32 = READ | CONTROL | KIND | 0x13;
    pub(crate) const DELETE_LATER: u32 = READ | CONTROL | KIND | 0x14;

    pub(crate) const FETCH: u32 = READ_WRITE | QUEUE | KIND | 0x20;
    pub(crate) const COMMIT_AND_FETCH: u32 = READ_WRITE | QUEUE | KIND | 0x21;
}

/// What a device is asked to be.
pub(crate) mod feature {
    /// It outlives its server, and gives the next one again what the last one left undone.
    pub(crate) const USER_RECOVERY: u64 = 1 << 3;
    pub(crate) const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    /// Commands have encoded numbers.
    pub(crate) const ENCODED_COMMANDS: u64 = 1 << 6;
    /// Data is copied when the server asks for it, by system calls on the device.
    pub(crate) const USER_COPY: u64 = 1 << 7;

    pub(crate) const ALL: u64 =
        USER_RECOVERY | USER_RECOVERY_REISSUE | ENCODED_COMMANDS | USER_COPY;
}

/// What has become of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It was added, and has no block device yet, or not any more.
    Dead,
    /// Somebody serves it.
    Live,
    /// Its server has gone: requests wait for the next one.
    Quiesced,
    /// Something that this does not know.
    Unknown,
}

/// `struct ublksrv_ctrl_cmd`: a command of the control device.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Default, Clone)]
#[repr(C)]
pub(crate) struct ControlCommand {
    pub(crate) number: U32,
    queue: U16,
    pub(crate) data_bytes: U16,
    pub(crate) data_address: U64,
    inline: U64,
    path_bytes: U16,
    pad: U16,
    reserved: U32,
}

impl ControlCommand {
    /// A command about a device, with a number beside it.
    pub(crate) fn new(number: u32, inline: u64) -> Self {
        let (number, inline) = (number.into(), inline.into());
        // No queue is meant.
        Self { number, queue: U16::MAX_VALUE, inline, ..Self::default() }
    }

    /// A command that takes or gives a structure of so many bytes.
    pub(crate) fn with_data(number: u32, bytes: usize) -> Self {
        assert!(bytes <= DATA_BYTES_MAX, "there is room for each structure");
        let data_bytes = u16::try_from(bytes).unwrap_or(0).into();
        Self { data_bytes, ..Self::new(number, 0) }
    }
}

/// Largest structure that a control command takes or gives.
pub(crate) const DATA_BYTES_MAX: usize = size_of::<DeviceInfo>();
const _: () = assert!(DATA_BYTES_MAX >= size_of::<Parameters>());

/// `struct ublksrv_ctrl_dev_info`: a device.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Default, Debug, Clone)]
#[repr(C)]
pub(crate) struct DeviceInfo {
    pub(crate) queues: U16,
    pub(crate) depth: U16,
    stage: U16,
    pad: U16,
    request_bytes_max: U32,
    number: U32,
    server_process: I32,
    more_pad: U32,
    features: U64,
    /// Kept by the kernel for the server: which state of which disk it is.
    pub(crate) identity: U64,
    owner: U32,
    owner_group: U32,
    reserved: [U64; 2],
}

impl DeviceInfo {
    /// A device that is to be added, for a machine with so many processors.
    pub(crate) fn new(number: u32, processors: usize, identity: u64) -> Self {
        let queues = u16::try_from(processors).map_or(QUEUES_MAX, |it| it.clamp(1, QUEUES_MAX));
        Self {
            queues: queues.into(),
            depth: (SLOTS_MAX / queues).into(),
            request_bytes_max: REQUEST_BYTES_MAX.into(),
            number: number.into(),
            features: feature::ALL.into(),
            identity: identity.into(),
            ..Self::default()
        }
    }

    pub(crate) fn stage(&self) -> Stage {
        match self.stage.get() {
            0 => Stage::Dead,
            1 => Stage::Live,
            2 => Stage::Quiesced,
            _ => Stage::Unknown,
        }
    }

    /// Whether this can serve it, as far as its numbers go.
    pub(crate) fn is_served_here(&self) -> bool {
        let slots = usize::from(self.queues.get()) * usize::from(self.depth.get());
        let slots_fit = (1..=REQUESTS_MAX).contains(&slots);
        let needed = self.features.get() & feature::ALL == feature::ALL;
        slots_fit && needed && self.request_bytes_max.get() <= REQUEST_BYTES_MAX
    }
}

mod attribute {
    pub(super) const READ_ONLY: u32 = 1 << 0;
    pub(super) const VOLATILE_CACHE: u32 = 1 << 2;
    pub(super) const FUA: u32 = 1 << 3;
}

const PARAMETERS_BASIC: u32 = 1 << 0;
const PARAMETERS_DISCARD: u32 = 1 << 1;

/// `struct ublk_params`, as far as the limits of discards.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Default)]
#[repr(C)]
pub(crate) struct Parameters {
    bytes: U32,
    kinds: U32,
    // Of every block device.
    attributes: U32,
    logical_shift: u8,
    physical_shift: u8,
    optimal_shift: u8,
    minimal_shift: u8,
    request_sectors_max: U32,
    chunk_sectors: U32,
    sectors: U64,
    boundary_mask: U64,
    // Of those that can discard.
    discard_alignment: U32,
    discard_granularity: U32,
    discard_sectors_max: U32,
    zero_sectors_max: U32,
    discard_segments_max: U16,
    reserved: U16,
}

impl Parameters {
    /// What a block device of `disk` is like.
    pub(crate) fn of(disk: &dyn Disk) -> Self {
        let basic = Self {
            bytes: u32::try_from(size_of::<Self>()).unwrap_or(0).into(),
            kinds: PARAMETERS_BASIC.into(),
            attributes: (attribute::VOLATILE_CACHE | attribute::FUA).into(),
            logical_shift: LOGICAL_SHIFT,
            physical_shift: PHYSICAL_SHIFT,
            optimal_shift: PHYSICAL_SHIFT,
            minimal_shift: PHYSICAL_SHIFT,
            request_sectors_max: REQUEST_SECTORS_MAX.into(),
            sectors: (disk.size_bytes() / SECTOR_BYTES).into(),
            ..Self::default()
        };
        if disk.read_only() {
            return Self { attributes: attribute::READ_ONLY.into(), ..basic };
        }
        Self {
            kinds: (PARAMETERS_BASIC | PARAMETERS_DISCARD).into(),
            discard_granularity: (1 << PHYSICAL_SHIFT).into(),
            discard_sectors_max: RANGE_SECTORS_MAX.into(),
            zero_sectors_max: RANGE_SECTORS_MAX.into(),
            discard_segments_max: 1.into(),
            ..basic
        }
    }
}

/// A place for one request: a queue, and a tag in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) queue: u16,
    pub(crate) tag: u16,
}

impl Slot {
    /// As the user data of a command.
    pub(crate) fn to_number(self) -> u64 {
        u64::from(self.queue) << 16 | u64::from(self.tag)
    }

    /// The slot that a command was about.
    pub(crate) fn from_number(number: u64) -> Self {
        let [tag, queue, ..]: [U16; 4] = zerocopy::transmute!(U64::new(number));
        Self { queue: queue.get(), tag: tag.get() }
    }

    /// Where the data of its request is copied to and from, in the file of the device.
    pub(crate) fn data_offset(self) -> u64 {
        const BASE: u64 = 0x8000_0000;
        BASE + (u64::from(self.queue) << 41 | u64::from(self.tag) << 25)
    }
}

/// Where the descriptors of a queue lie in the file of the device, and how much room they take in
/// pages of so many bytes.
pub(crate) fn descriptors_place(queue: u16, depth: u16, page_bytes: usize) -> (u64, usize) {
    let room = |slots: usize| (slots * DESCRIPTOR_BYTES).next_multiple_of(page_bytes);
    (u64::from(queue) * room(DEPTH_MAX) as u64, room(depth.into()))
}

/// `struct ublksrv_io_cmd`: asks for a request, and tells how the one before has ended.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Default)]
#[repr(C)]
pub(crate) struct QueueCommand {
    queue: U16,
    tag: U16,
    result: I32,
    address: U64,
}

impl QueueCommand {
    pub(crate) fn encode(slot: Slot, result: i32) -> [u8; size_of::<Self>()] {
        let Slot { queue, tag } = slot;
        let command = Self {
            queue: queue.into(),
            tag: tag.into(),
            result: result.into(),
            // Data is copied by system calls.
            ..Self::default()
        };
        zerocopy::transmute!(command)
    }
}

/// Bytes of [`Descriptor`] as the kernel writes it.
pub(crate) const DESCRIPTOR_BYTES: usize = 24;

/// `struct ublksrv_io_desc`.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDescriptor {
    operation_and_flags: U32,
    sectors: U32,
    first_sector: U64,
    address: U64,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// A request of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// `None` if this does not know it.
    pub(crate) operation: Option<Operation>,
    /// First byte.
    pub(crate) offset: u64,
    /// Number of bytes.
    pub(crate) bytes: u64,
    /// Whether it is to be durable when it completes.
    pub(crate) fua: bool,
    /// Whether zeroes must keep their space.
    pub(crate) no_unmap: bool,
}

impl Descriptor {
    pub(crate) fn decode(bytes: [u8; DESCRIPTOR_BYTES]) -> Self {
        const FUA: u32 = 1 << 13;
        const NO_UNMAP: u32 = 1 << 15;
        let raw: RawDescriptor = zerocopy::transmute!(bytes);
        let word = raw.operation_and_flags.get();
        let operation = match word & 0xff {
            0 => Some(Operation::Read),
            1 => Some(Operation::Write),
            2 => Some(Operation::Flush),
            3 => Some(Operation::Discard),
            5 => Some(Operation::WriteZeroes),
            _ => None,
        };
        Self {
            operation,
            offset: raw.first_sector.get().saturating_mul(SECTOR_BYTES),
            bytes: u64::from(raw.sectors.get()) * SECTOR_BYTES,
            fua: word & FUA != 0,
            no_unmap: word & NO_UNMAP != 0,
        }
    }

    /// Bytes of data that are copied for it.
    pub(crate) fn data_bytes(&self) -> u64 {
        match self.operation {
            Some(Operation::Read | Operation::Write) => self.bytes,
            _ => 0,
        }
    }

    /// What the disk is asked, of requests without data.
    pub(crate) fn range_request(&self) -> Option<Request> {
        let &Self { offset, bytes: length, fua, no_unmap: no_hole, .. } = self;
        match self.operation? {
            Operation::Flush => Some(Request::Flush),
            Operation::Discard => Some(Request::Discard { offset, length, fua }),
            Operation::WriteZeroes => {
                Some(Request::WriteZeroes { offset, length, fua, no_hole, fast_only: false })
            }
            Operation::Read | Operation::Write => None,
        }
    }
}

#[cfg(test)]
mod tests;
