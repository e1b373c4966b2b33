//! An open store as its clients see it: handles, and which errors are excused.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use base::ErrorKind;
use disk::Disk;
use runtime::Runtime;
use vdi::{Store, Target};

use crate::faults::DamageKind;
use crate::model::{Place, VdiRef};
use crate::world::{Pending, World};

/// Handles of one place that are kept open.
const HANDLES_MAX: usize = 3;

/// An open disk.
#[derive(Clone)]
pub struct Handle {
    /// The disk.
    pub disk: Rc<dyn Disk>,
    /// How often handles of its VDI had been severed when this one was opened.
    severed_before: u64,
    /// The same when it had been opened: what was asked for meanwhile may have come first.
    severed_after: u64,
    place: Place,
}

/// One life of the store, as its clients share it.
pub struct Session {
    /// What outlives it.
    pub world: Rc<World>,
    /// Its process.
    pub runtime: Runtime,
    /// The store.
    pub store: Store,
    handles: RefCell<BTreeMap<(u32, u64), Vec<Handle>>>,
    /// Whether the store stopped after a failure of the device.
    stopped: Cell<bool>,
    /// Whether it is being changed which moments are kept of VDIs without rules of their own.
    pub default_asked: Cell<bool>,
    before: Injected,
}

/// What had been injected at some time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Injected {
    errors: u64,
    cache_losses: u64,
    no_space: u64,
}

impl Injected {
    /// What has been injected by now.
    #[must_use]
    pub fn now(world: &World) -> Self {
        world.device.with_atlas(|atlas| Self {
            errors: atlas.errors,
            cache_losses: atlas.cache_losses,
            no_space: atlas.no_space,
        })
    }

    /// Whether the device has failed an operation since.
    #[must_use]
    pub fn errors_since(&self, world: &World) -> bool {
        Self::now(world).errors > self.errors
    }

    /// Whether the device may have forgotten something since.
    #[must_use]
    pub fn cache_lost_since(&self, world: &World) -> bool {
        Self::now(world).cache_losses > self.cache_losses
    }
}

/// What a request was about, as far as damage may hit it.
#[derive(Clone, Copy, Debug)]
pub enum Reach {
    /// These blocks of a VDI.
    Blocks(u64, u64),
    /// Metadata only.
    Metadata,
}

impl Session {
    /// The session of a store that has just been opened.
    #[must_use]
    pub fn new(world: &Rc<World>, runtime: &Runtime, store: Store, before: Injected) -> Rc<Self> {
        Rc::new(Self {
            world: Rc::clone(world),
            runtime: runtime.clone(),
            store,
            handles: RefCell::default(),
            default_asked: Cell::new(false),
            stopped: Cell::new(false),
            before,
        })
    }

    /// Whether the store has stopped.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stopped.get() || self.world.failed()
    }

    /// The store stopped; its clients go.
    pub fn stop(&self) {
        if !self.stopped.replace(true) {
            self.world.probe("store: stopped");
        }
    }

    /// The name of a place, as the store knows it now.
    #[must_use]
    pub fn target(&self, place: Place) -> Target {
        let model = self.world.model.borrow();
        match place {
            Place::Head(vdi) => Target { vdi: model.vdi(vdi).name.clone(), snapshot: None },
            Place::Snapshot(vdi, number) => {
                let vdi = model.vdi(vdi);
                let label = vdi.snapshots.get(&number).and_then(|snapshot| snapshot.label.clone());
                // Half of all labelled snapshots go by their number.
                let label = label.filter(|_| number % 2 == 0);
                let snapshot = Some(label.unwrap_or_else(|| number.to_string()));
                Target { vdi: vdi.name.clone(), snapshot }
            }
        }
    }

    /// A handle of a place: one that is open, or a new one. `None`: it cannot be had, and that is
    /// excused or noted.
    pub async fn handle(&self, place: Place, fresh: bool) -> Option<Handle> {
        let key = key(place);
        if !fresh {
            let mut handles = self.handles.borrow_mut();
            let open = handles.entry(key).or_default();
            open.retain(|handle| !handle.disk.severed());
            let index = self.world.random.borrow_mut().index(open.len());
            if let Some(handle) = open.get(index) {
                return Some(handle.clone());
            }
        }
        let (Place::Head(vdi) | Place::Snapshot(vdi, _)) = place;
        if !self.exists(place) || self.world.is_held(vdi) {
            return None;
        }
        let severed_before = self.world.model.borrow().vdi(vdi).severed;
        let target = self.target(place);
        let opened = self.store.open_disk(&target).await;
        self.world.progressed();
        match opened {
            Ok(disk) => {
                let severed_after = self.world.model.borrow().vdi(vdi).severed;
                let handle = Handle { disk, severed_before, severed_after, place };
                let mut handles = self.handles.borrow_mut();
                let open = handles.entry(key).or_default();
                open.push(handle.clone());
                if open.len() > HANDLES_MAX {
                    open.remove(0);
                }
                Some(handle)
            }
            Err(error) => {
                let gone = error.kind() == ErrorKind::NotFound
                    && (!self.exists(place) || self.world.is_held(vdi));
                if !gone {
                    let what = format!("open {target}");
                    self.excuse(&what, error.kind(), &error, Reach::Metadata);
                }
                None
            }
        }
    }

    /// Every handle of a VDI that was opened before it was severed must know, now.
    pub fn check_severed(&self, vdi: VdiRef) {
        let severed = self.world.model.borrow().vdi(vdi).severed;
        let handles = self.handles.borrow();
        for handle in handles.iter().filter(|((number, _), _)| *number == vdi.0) {
            for handle in handle.1.iter().filter(|handle| matches!(handle.place, Place::Head(_))) {
                if handle.severed_after < severed && !handle.disk.severed() {
                    self.world.fail(format!(
                        "a handle of {} outlived what must sever it",
                        self.world.name_of(handle.place)
                    ));
                }
            }
        }
    }

    /// Judges an error of a request on a handle. `true` if the handle is of no use any more.
    pub fn excuse_request(
        &self,
        what: &str,
        handle: &Handle,
        error: &disk::DiskError,
        reach: Reach,
    ) {
        let (Place::Head(vdi) | Place::Snapshot(vdi, _)) = handle.place;
        if error.kind == ErrorKind::Fenced {
            let severed = {
                let model = self.world.model.borrow();
                model.vdi(vdi).deleted || model.vdi(vdi).severed > handle.severed_before
            };
            if severed || !self.exists(handle.place) {
                self.world.probe("request: severed");
                return;
            }
        }
        self.excuse(what, error.kind, error, reach);
    }

    /// Judges an error: either the run explains it, or the run has failed.
    pub fn excuse(&self, what: &str, kind: ErrorKind, error: &dyn std::fmt::Display, reach: Reach) {
        let world = &self.world;
        let damaged = world.device.with_atlas(|atlas| match reach {
            Reach::Blocks(first, end) => (first..end).any(|lba| atlas.explains(lba)),
            Reach::Metadata => atlas.metadata_is_damaged(),
        });
        let unreadable = damaged
            && world.device.with_atlas(|atlas| {
                atlas.damaged_blocks().any(|(_, damage)| damage.kind == DamageKind::Unreadable)
            });
        let errors = self.before.errors_since(world);
        // A store whose tables are damaged stops when its log is full; for good, even if the blocks
        // have been written again since.
        let stopped = world.device.with_atlas(|atlas| atlas.damaged > 0);
        let excused = match kind {
            ErrorKind::Io => errors || unreadable || stopped,
            // What a lost cache took with it does not verify.
            ErrorKind::Corrupt => damaged || self.before.cache_lost_since(world),
            ErrorKind::Fenced => errors || stopped,
            ErrorKind::NoSpace => self.is_nearly_full(),
            ErrorKind::ReadOnly => damaged,
            _ => false,
        };
        if !excused {
            let stats = self.store.stats();
            let (free, all) = (stats.free_bytes, stats.capacity_bytes);
            world.fail(format!(
                "{what}: {kind:?} ({error}), which nothing explains; {free} of {all} bytes are free"
            ));
            return;
        }
        match kind {
            ErrorKind::Io => world.probe("request: io error"),
            ErrorKind::Corrupt => world.probe("request: corrupt"),
            ErrorKind::NoSpace => world.probe("request: no space"),
            ErrorKind::Fenced => self.stop(),
            _ => {}
        }
    }

    /// What had been injected when the store was opened.
    #[must_use]
    pub fn before(&self) -> Injected {
        self.before
    }

    /// Whether a lack of space is believable.
    #[must_use]
    pub fn is_nearly_full(&self) -> bool {
        let stats = self.store.stats();
        let below = Injected::now(&self.world).no_space > self.before.no_space;
        below
            || self.world.plan.space_below.is_some()
            || stats.free_bytes < stats.capacity_bytes / 4
    }

    /// Whether the model knows a place, and nobody is deleting it.
    fn exists(&self, place: Place) -> bool {
        let model = self.world.model.borrow();
        let (Place::Head(vdi) | Place::Snapshot(vdi, _)) = place;
        if model.vdi(vdi).deleted
            || self.world.is_pending(|p| matches!(p, Pending::Remove(v) if *v == vdi))
        {
            return false;
        }
        match place {
            Place::Head(_) => true,
            Place::Snapshot(_, number) => {
                model.vdi(vdi).snapshots.contains_key(&number)
                    && !self.world.is_pending(
                        |p| matches!(p, Pending::RemoveSnapshot(v, n) if *v == vdi && *n == number),
                    )
            }
        }
    }
}

fn key(place: Place) -> (u32, u64) {
    match place {
        Place::Head(vdi) => (vdi.0, 0),
        Place::Snapshot(vdi, number) => (vdi.0, number),
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Session")
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Handle({:?})", self.place)
    }
}
