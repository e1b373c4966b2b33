//! One connection of a virtual machine monitor: its messages, and the device that they set up.
//!
//! Messages are handled one after the other, each to its end: after the reply to "what is the base
//! of this ring" the ring is not touched any more.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use disk::Disk;
use runtime::Runtime;
use runtime::reactor::{Channel, Event, Filled, Io};

use crate::block::{self, RINGS_MAX};
use crate::budget::Budget;
use crate::dirty::DirtyLog;
use crate::end::End;
use crate::inflight::Inflight;
use crate::memory::{Memory, REGIONS_MAX};
use crate::metrics::Metrics;
use crate::protocol::{
    self, FILES_MAX, HEADER_BYTES, Header, Malformed, PAYLOAD_BYTES_MAX, Request, feature,
};
use crate::ring::{Device, Ring, Setup};

/// The protocol features that this side offers.
const PROTOCOL_FEATURES: u64 = feature::MQ
    | feature::LOG_SHMFD
    | feature::REPLY_ACK
    | feature::BACKEND_REQ
    | feature::CONFIG
    | feature::INFLIGHT_SHMFD
    | feature::CONFIGURE_MEM_SLOTS;

/// How often the size of a disk is looked at, for guests that can be told of a new one.
const SIZE_PERIOD: Duration = Duration::from_secs(1);

/// A connection.
pub(crate) struct Session {
    io: Io,
    channel: Channel,
    /// Where the monitor is asked for something.
    requests: RefCell<Option<Rc<Channel>>>,
    device: Rc<Device>,
    rings: Vec<Rc<Ring>>,
    protocol_features: Cell<u64>,
}

/// What a message is answered with.
enum Answer {
    /// Success, for those who want to know.
    Done,
    /// It was not done, and nothing is lost by that.
    Refused,
    /// A payload.
    Payload(Vec<u8>),
    /// A payload, and a descriptor beside it.
    WithFile(Vec<u8>, OwnedFd),
}

impl Session {
    pub(crate) fn new(
        runtime: &Runtime,
        io: &Io,
        channel: Channel,
        disk: Rc<dyn Disk>,
        metrics: &Rc<Metrics>,
    ) -> Self {
        let device = Rc::new(Device {
            runtime: runtime.clone(),
            io: io.clone(),
            disk,
            metrics: Rc::clone(metrics),
            memory: RefCell::default(),
            log: RefCell::default(),
            inflight: RefCell::default(),
            features: Cell::new(0),
            budget: Budget::default(),
            ending: Cell::new(false),
            replaced: Cell::new(false),
        });
        let rings = (0..RINGS_MAX).map(|index| Ring::new(&device, index)).collect();
        let protocol_features = Cell::new(0);
        let requests = RefCell::default();
        Self { io: io.clone(), channel, requests, device, rings, protocol_features }
    }

    /// Serves the monitor until one of the two ends the connection, and tells why it ended. Then
    /// nothing is in flight, and guest memory is not touched any more.
    pub(crate) async fn run(&self) -> End {
        let Err(end) = self.serve().await;
        self.device.ending.set(true);
        for ring in &self.rings {
            ring.abandon();
        }
        for ring in &self.rings {
            ring.stopped().await;
        }
        end
    }

    /// Takes no more requests, gives those in flight the time of `drain` to be finished and the
    /// guest to be told, and closes the connection.
    pub(crate) async fn wind_down(self: Rc<Self>, drain: Duration) {
        let runtime = self.device.runtime.clone();
        self.device.ending.set(true);
        let session = Rc::clone(&self);
        let stopping = runtime.spawn(async move {
            for ring in &session.rings {
                ring.stop();
            }
            for ring in &session.rings {
                ring.stopped().await;
            }
            session.channel.shutdown();
        });
        let sleep = runtime.sleep(drain);
        let session = Rc::downgrade(&self);
        drop(runtime.spawn(async move {
            sleep.await;
            if let Some(session) = session.upgrade() {
                // Whoever waits for a ring to stop must not find it writing to memory afterwards.
                for ring in &session.rings {
                    ring.abandon();
                }
                session.channel.shutdown();
            }
        }));
        stopping.await;
    }

    async fn serve(&self) -> Result<Infallible, End> {
        loop {
            let mut files = Vec::new();
            let mut header = [0; HEADER_BYTES];
            self.receive(&mut header, &mut files).await?;
            let header = Header::decode(&header)?;
            let mut payload = [0; PAYLOAD_BYTES_MAX];
            let payload = payload.get_mut(..header.payload_bytes).unwrap_or_default();
            self.receive(payload, &mut files).await?;
            let request = Request::decode(header.code, payload, files)?;
            self.answer(&header, self.handle(request).await).await?;
            // A monitor that has more to say lets others have their turn.
            self.device.runtime.yield_now().await;
        }
    }

    async fn receive(&self, into: &mut [u8], files: &mut Vec<OwnedFd>) -> Result<(), End> {
        match self.channel.fill(into, files, FILES_MAX).await? {
            Filled::Whole => Ok(()),
            Filled::Ended => Err(End::Closed),
            Filled::TooManyFiles => Err(Malformed::TooManyFiles.into()),
        }
    }

    async fn answer(&self, header: &Header, outcome: Result<Answer, End>) -> Result<(), End> {
        let wants = header.need_reply && self.protocol_features.get() & feature::REPLY_ACK != 0;
        let verdict = |failed: bool| protocol::reply(header.code, &u64::from(failed).to_le_bytes());
        match outcome {
            Ok(Answer::Payload(payload)) => {
                self.channel.send(&protocol::reply(header.code, &payload), &[]).await?;
            }
            Ok(Answer::WithFile(payload, file)) => {
                let message = protocol::reply(header.code, &payload);
                self.channel.send(&message, &[file.as_fd()]).await?;
            }
            Ok(Answer::Done) if wants => self.channel.send(&verdict(false), &[]).await?,
            Ok(Answer::Refused) if wants => self.channel.send(&verdict(true), &[]).await?,
            Ok(Answer::Done | Answer::Refused) => {}
            Err(end) => {
                if wants {
                    // The reason says more than that this failed as well.
                    let _ = self.channel.send(&verdict(true), &[]).await;
                }
                return Err(end);
            }
        }
        Ok(())
    }

    async fn handle(&self, request: Request) -> Result<Answer, End> {
        let disk = &*self.device.disk;
        match request {
            Request::GetFeatures => return Ok(number(block::features(disk))),
            Request::SetFeatures(features) => {
                if features & !block::features(disk) != 0 {
                    return Err(End::Refused("features that were not offered"));
                }
                let runs = self.rings.iter().any(|ring| !ring.is_stopped());
                self.device.features.set(features);
                if runs && self.device.awaits_log() {
                    return Err(End::Refused("written pages to be logged, and gave no log"));
                }
                self.remember(self.device.memory().as_ref().clone())?;
            }
            Request::GetProtocolFeatures => return Ok(number(PROTOCOL_FEATURES)),
            Request::SetProtocolFeatures(features) => {
                if features & !PROTOCOL_FEATURES != 0 {
                    return Err(End::Refused("protocol features that were not offered"));
                }
                self.protocol_features.set(features);
            }
            Request::Owner => {}
            Request::SetMemory(regions) => self.remember(Memory::of(regions)?)?,
            Request::AddRegion(region, file) => {
                self.remember(self.device.memory().with(region, file)?)?;
            }
            Request::RemoveRegion(region) => {
                let memory = self.device.memory().without(&region);
                let missing = End::Refused("a region to be removed that is not there");
                self.remember(memory.ok_or(missing)?)?;
            }
            Request::SetLog(area, file) => {
                *self.device.log.borrow_mut() = Some(Rc::new(DirtyLog::open(&area, file)?));
                self.remember(self.device.memory().as_ref().clone())?;
                for ring in &self.rings {
                    ring.set_up(|_| ());
                }
                return Ok(number(0));
            }
            Request::GetRegionsMax => return Ok(number(REGIONS_MAX as u64)),
            Request::GetRingsMax => return Ok(number(u64::from(RINGS_MAX))),
            Request::GetConfig(range) => {
                return Ok(Answer::Payload(range.encode(&block::config(disk, &range))));
            }
            // Nothing in it can be changed. A guest may try without harm.
            Request::SetConfig => return Ok(Answer::Refused),
            Request::SetBackendChannel(file) => self.announce_sizes(file)?,
            Request::GetInflight(area) => {
                if disk.severed() {
                    return Err(End::Replaced);
                }
                let (area, file) = Inflight::create(&area, disk.identity())?;
                return Ok(Answer::WithFile(area.encode(), file));
            }
            Request::SetInflight(area, file) => {
                let inflight = Inflight::open(&area, file)?;
                let replaced = !inflight.is_about(disk);
                if replaced {
                    let serial = disk.serial();
                    tracing::warn!(
                        serial,
                        "a running virtual machine knew the disk before it was \
                        rolled back or replaced: it gets errors until it is reset"
                    );
                }
                self.device.replaced.set(replaced);
                *self.device.inflight.borrow_mut() = Some(Rc::new(inflight));
            }
            request => return self.handle_ring(request).await,
        }
        Ok(Answer::Done)
    }

    /// Messages that are about one ring.
    async fn handle_ring(&self, request: Request) -> Result<Answer, End> {
        match request {
            Request::SetRingSize(ring, size) => {
                self.stopped(ring)?.set_up(|setup| setup.size = size);
            }
            Request::SetRingAddresses(ring, addresses) => {
                // Sent for a running ring, too, to say that it is logged or not any more.
                if !self.ring(ring)?.lies_at(&addresses) {
                    self.stopped(ring)?.set_up(|setup| setup.addresses = Some(addresses));
                }
            }
            Request::SetRingBase(ring, base) => {
                let base = u16::try_from(base).map_err(|_| End::Refused("a base beyond a ring"))?;
                self.stopped(ring)?.set_up(|setup| setup.base = base);
            }
            Request::GetRingBase(ring) => {
                let stopping = self.ring(ring)?;
                stopping.stop();
                stopping.stopped().await;
                let base = u32::from(stopping.base());
                return Ok(Answer::Payload(protocol::ring_state(ring, base)));
            }
            Request::SetKick(ring, file) => {
                let file = file.ok_or(End::Refused("a ring that is polled"))?;
                let kick = self.event(file)?;
                self.ring(ring)?.set_up(|setup| setup.kick = Some(kick));
            }
            Request::SetCall(ring, file) => {
                let call = file.map(|file| self.event(file)).transpose()?;
                if let Some(call) = &call {
                    // What an earlier daemon completed may not have been told.
                    call.signal();
                }
                self.ring(ring)?.set_up(|setup| setup.call = call);
            }
            Request::SetError(ring, file) => {
                let error = file.map(|file| self.event(file)).transpose()?;
                self.ring(ring)?.set_up(|setup| setup.error = error);
            }
            Request::SetRingEnabled(ring, enabled) => {
                self.ring(ring)?.set_up(|setup: &mut Setup| setup.enabled = enabled);
            }
            _ => return Err(End::Refused("what is not known")),
        }
        Ok(Answer::Done)
    }

    fn ring(&self, index: u32) -> Result<&Rc<Ring>, End> {
        let ring = usize::try_from(index).ok().and_then(|index| self.rings.get(index));
        ring.ok_or(End::Refused("a ring that there is not"))
    }

    /// A ring that does not run: what it is made of cannot change under way.
    fn stopped(&self, index: u32) -> Result<&Rc<Ring>, End> {
        let ring = self.ring(index)?;
        if ring.is_stopped() {
            Ok(ring)
        } else {
            Err(End::Refused("another place of a running ring"))
        }
    }

    fn event(&self, file: OwnedFd) -> Result<Rc<Event>, End> {
        Ok(Rc::new(Event::adopt(&self.io, file)?))
    }

    /// This is guest memory from now on; what is written to it is logged if the monitor wants that.
    fn remember(&self, memory: Memory) -> Result<(), End> {
        let logs = self.device.uses(block::feature::LOG_ALL);
        let log = self.device.log.borrow().clone().filter(|_| logs);
        *self.device.memory.borrow_mut() = Rc::new(memory.logged(log)?);
        Ok(())
    }

    /// Tells the monitor when the disk has another size, for as long as the connection lasts, or until
    /// the monitor wants to be told elsewhere.
    fn announce_sizes(&self, file: OwnedFd) -> Result<(), End> {
        let channel = Rc::new(Channel::adopt(&self.io, file)?);
        let current = Rc::downgrade(&channel);
        *self.requests.borrow_mut() = Some(channel);
        let device = Rc::downgrade(&self.device);
        let runtime = self.device.runtime.clone();
        let mut known = self.device.disk.size_bytes();
        drop(self.device.runtime.spawn(async move {
            loop {
                runtime.sleep(SIZE_PERIOD).await;
                let Some(device) = device.upgrade() else { return };
                let size = device.disk.size_bytes();
                let ending = device.ending.get();
                // It is not to stay for a monitor that does not read.
                drop(device);
                let Some(channel) = current.upgrade() else { return };
                let changed = std::mem::replace(&mut known, size) != size;
                if ending
                    || changed && channel.send(&protocol::config_changed(), &[]).await.is_err()
                {
                    return;
                }
            }
        }));
        Ok(())
    }
}

fn number(number: u64) -> Answer {
    Answer::Payload(number.to_le_bytes().to_vec())
}
