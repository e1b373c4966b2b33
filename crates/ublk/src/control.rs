//! Commands of the control device: devices are added, started, taken over, stopped and deleted.

use std::io;
use std::os::fd::OwnedFd;

use disk::Disk;
use runtime::reactor::Io;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::Error;
use crate::protocol::{ControlCommand, DATA_BYTES_MAX, DeviceInfo, Parameters, code, feature};
use crate::sys::ControlCall;

/// The control device.
pub(crate) struct Control {
    io: Io,
    device: OwnedFd,
}

impl Control {
    /// Opens it.
    ///
    /// # Errors
    /// `Absent` if there is none; what the kernel says.
    pub(crate) fn open(io: &Io) -> Result<Self, Error> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = rustix::fs::open("/dev/ublk-control", flags, Mode::empty());
        let device = device.map_err(|errno| match errno {
            // Without the module a file that is there already leads nowhere.
            Errno::NOENT | Errno::NXIO | Errno::NODEV => Error::Absent,
            errno => Error::kernel("open /dev/ublk-control")(errno.into()),
        })?;
        Ok(Self { io: io.clone(), device })
    }

    /// Sees to it that the kernel can do what is needed.
    ///
    /// # Errors
    /// `TooOld` if it cannot.
    pub(crate) async fn check(&self) -> Result<(), Error> {
        let features: io::Result<U64> = self.get(code::GET_FEATURES, 0).await;
        let enough = |features: U64| features.get() & feature::ALL == feature::ALL;
        match features {
            Ok(features) if enough(features) => Ok(()),
            Ok(_) => Err(Error::TooOld),
            // It does not know the question.
            Err(error) if is(&error, &[Errno::OPNOTSUPP, Errno::INVAL]) => Err(Error::TooOld),
            Err(error) => Err(Error::kernel("ask for the features of ublk")(error)),
        }
    }

    /// Adds a device, without a block device for now; what the kernel has made of it.
    ///
    /// # Errors
    /// `Exists` if the number is taken.
    pub(crate) async fn add(&self, number: u32, info: &DeviceInfo) -> Result<DeviceInfo, Error> {
        match self.put(code::ADD, number, info).await {
            Ok(info) => Ok(info),
            Err(error) if is(&error, &[Errno::EXIST]) => Err(Error::Exists(number)),
            Err(error) => Err(Error::kernel("add a ublk device")(error)),
        }
    }

    /// Says what the block device of an added device is like.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) async fn describe(&self, number: u32, disk: &dyn Disk) -> Result<(), Error> {
        let set = self.put(code::SET_PARAMETERS, number, &Parameters::of(disk)).await;
        set.map(drop).map_err(Error::kernel("set the parameters of a ublk device"))
    }

    /// A device; `None` if there is none of this number.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) async fn find(&self, number: u32) -> Result<Option<DeviceInfo>, Error> {
        match self.get(code::GET_DEVICE, number).await {
            Ok(info) => Ok(Some(info)),
            Err(error) if is(&error, &[Errno::NODEV, Errno::NOENT]) => Ok(None),
            Err(error) => Err(Error::kernel("ask for a ublk device")(error)),
        }
    }

    /// Makes the block device of an added device, whose queues are served by this process, or are
    /// about to be. Returns when it is there; its partition table is read meanwhile.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) async fn start(&self, number: u32, server: u32) -> Result<(), Error> {
        let started = self.tell(code::START, number, server.into()).await;
        started.map_err(Error::kernel("start a ublk device"))
    }

    /// Begins to take a quiesced device over; `false` if something of the earlier server is left.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) async fn start_recovery(&self, number: u32) -> Result<bool, Error> {
        match self.tell(code::START_RECOVERY, number, 0).await {
            Ok(()) => Ok(true),
            // An earlier server was killed after it had said this.
            Err(error) if is(&error, &[Errno::INVAL]) => Ok(true),
            Err(error) if is(&error, &[Errno::BUSY]) => Ok(false),
            Err(error) => Err(Error::kernel("take over a ublk device")(error)),
        }
    }

    /// Ends taking it over, when its queues are served: its requests are let through.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) async fn end_recovery(&self, number: u32) -> Result<(), Error> {
        let ended = self.tell(code::END_RECOVERY, number, std::process::id().into()).await;
        ended.map_err(Error::kernel("take over a ublk device"))
    }

    /// Takes the block device away. What it was asked is answered first, so somebody must serve it.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) async fn stop(&self, number: u32) -> Result<(), Error> {
        let stopped = self.tell(code::STOP, number, 0).await;
        stopped.map_err(Error::kernel("stop a ublk device"))
    }

    /// Deletes a device; its number is free when everybody has closed it.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) async fn delete(&self, number: u32) -> Result<(), Error> {
        let deleted = match self.tell(code::DELETE_LATER, number, 0).await {
            // Linux before 6.10 only knows how to wait for that.
            Err(error) if is(&error, &[Errno::OPNOTSUPP, Errno::INVAL]) => {
                self.tell(code::DELETE, number, 0).await
            }
            deleted => deleted,
        };
        deleted.map_err(Error::kernel("delete a ublk device"))
    }

    async fn tell(&self, code: u32, number: u32, inline: u64) -> io::Result<()> {
        let command = ControlCommand::new(number, inline);
        self.call(code, &command, [0; DATA_BYTES_MAX]).await.map(drop)
    }

    /// Gives the kernel a structure, which it may change.
    async fn put<T: FromBytes + IntoBytes + Immutable>(
        &self,
        code: u32,
        number: u32,
        structure: &T,
    ) -> io::Result<T> {
        let mut bytes = [0; DATA_BYTES_MAX];
        structure.write_to_prefix(&mut bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.exchange(code, number, bytes).await
    }

    async fn get<T: FromBytes>(&self, code: u32, number: u32) -> io::Result<T> {
        self.exchange(code, number, [0; DATA_BYTES_MAX]).await
    }

    async fn exchange<T: FromBytes>(
        &self,
        code: u32,
        number: u32,
        bytes: [u8; DATA_BYTES_MAX],
    ) -> io::Result<T> {
        let command = ControlCommand::with_data(number, size_of::<T>());
        let bytes = self.call(code, &command, bytes).await?;
        let (value, _) = T::read_from_prefix(&bytes).map_err(|_| io::ErrorKind::InvalidData)?;
        Ok(value)
    }

    async fn call(
        &self,
        code: u32,
        command: &ControlCommand,
        data: [u8; DATA_BYTES_MAX],
    ) -> io::Result<[u8; DATA_BYTES_MAX]> {
        ControlCall::start(&self.io, &self.device, code, command, data)?.end().await
    }
}

fn is(error: &io::Error, kinds: &[Errno]) -> bool {
    kinds.iter().any(|kind| error.raw_os_error() == Some(kind.raw_os_error()))
}
