//! One function per route: take the request apart, call the engine, put the answer together.

use std::rc::Rc;
use std::time::Duration;

use api::{
    Attach, Attachment, BeginCheck, BeginScrub, ChangeStore, ChangeVdi, CheckReport, CheckStatus,
    CompleteReceive, CreateVdi, DIFF_EXTENTS_MAX, DaemonStatus, DiffPage, Error, FrontendMetrics,
    Gc, GcStatus, Hold, IntervalPage, Kind, Mounted, PAGE_MAX, Removed, Rollback, ScrubStatus,
    Series, Snapshot, SnapshotPage, Space, Stats, StoreSettings, TakeSeries, TakeSnapshot, Upgrade,
    Upgrading, Vdi, VdiPage, WritePage,
};
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use base::{ErrorKind, Lsn, SnapshotNumber, SnapshotUuid};
use serde::Deserialize;
use vdi::check::NotedHead;
use vdi::{
    GcReport, Received, Retention, Store, Target, WantedIntervals, WantedSeries, WantedWrites,
};

use super::extract::{Body, Failure, Parameters, Segments};
use crate::convert;
use crate::current::Current;
use crate::engine::{Served, refused};
use crate::{devices, upgrade};

/// How long a block device may take to be opened before it is taken away.
const LOOK_MAX: Duration = Duration::from_secs(5);

/// Most ledgers that a check compares with what was noted.
const LEDGERS_MAX: usize = 1000;

/// The history of a disk that has none of its own.
const INHERIT: &str = "inherit";

type Answer<T> = Result<Json<T>, Failure>;

pub(super) fn router(current: Current) -> Router {
    let routes = Router::new()
        .route("/daemon", get(daemon))
        .route("/stats", get(stats))
        .route("/gc", get(gc_status).post(collect_garbage))
        .route("/scrub", get(scrub_status).post(begin_scrub).delete(stop_scrub))
        .route("/check", get(check_status).post(check))
        .route("/upgrade", post(upgrade))
        .route("/nbd", get(nbd))
        .route("/vhost-user", get(vhost_user))
        .route("/ublk", get(ublk))
        .route("/fuse", get(fuse))
        .route("/vdis", get(list).post(create))
        .route("/vdis/{name}", get(info).patch(change).delete(remove))
        .route("/vdis/{name}/space", get(space))
        .route("/vdis/{name}/rollback", post(rollback))
        .route("/vdis/{name}/complete", post(complete))
        .route("/vdis/{name}/intervals", get(intervals))
        .route("/vdis/{name}/writes", get(writes))
        .route("/vdis/{name}/snapshots", get(snapshots).post(take_snapshot))
        .route("/vdis/{name}/series", post(take_series))
        .route("/vdis/{name}/snapshots/{snapshot}", get(snapshot).delete(remove_snapshot))
        .route("/vdis/{name}/snapshots/{snapshot}/space", get(snapshot_space))
        .route("/vdis/{name}/snapshots/{snapshot}/hold", post(hold).delete(release))
        .route("/store", get(store_settings).patch(change_store))
        .route("/diff", get(diff))
        .route("/attachments", get(attachments).post(attach))
        .route("/attachments/{path}", delete(detach))
        .route("/mounts", get(mounts));
    Router::new()
        .nest("/v1", routes)
        .fallback(|| async { Failure(Error::new(Kind::NotFound, "there is no such route")) })
        .method_not_allowed_fallback(|| async {
            Failure(Error::new(Kind::Unsupported, "this route does not take this method"))
        })
        .with_state(current)
}

async fn daemon(State(current): State<Current>) -> Answer<DaemonStatus> {
    Ok(Json(current.status()?.as_ref().clone()))
}

async fn upgrade(
    State(current): State<Current>,
    Body(request): Body<Upgrade>,
) -> Result<(StatusCode, Json<Upgrading>), Failure> {
    let looked_at = tokio::task::spawn_blocking(move || upgrade::look_at(request.binary));
    let upgrading = looked_at
        .await
        .unwrap_or_else(|_| Err(Error::new(Kind::Io, "cannot look at the program")))?;
    current.upgrade(upgrading.binary.clone().into())?;
    Ok((StatusCode::ACCEPTED, Json(upgrading)))
}

async fn stats(State(current): State<Current>) -> Answer<Stats> {
    let answer = async |served: &Served| Ok(served.stats());
    Ok(Json(current.call(answer).await?))
}

async fn gc_status(State(current): State<Current>) -> Answer<GcStatus> {
    let answer = async |served: &Served| Ok(served.store.gc_status());
    Ok(Json(convert::gc_status(current.call(answer).await?)))
}

async fn collect_garbage(State(current): State<Current>) -> Answer<Gc> {
    let answer = async |served: &Served| {
        let report = served.store.collect_garbage().await?;
        let trimmed_blocks = report.trimmed_blocks + served.store.trim().await?;
        Ok(GcReport { trimmed_blocks, ..report })
    };
    Ok(Json(convert::gc(current.call(answer).await?)))
}

async fn scrub_status(State(current): State<Current>) -> Answer<ScrubStatus> {
    let answer = async |served: &Served| Ok(served.scrub_status());
    Ok(Json(current.call(answer).await?))
}

async fn begin_scrub(
    State(current): State<Current>,
    Body(request): Body<BeginScrub>,
) -> Answer<ScrubStatus> {
    let answer = async move |served: &Served| {
        served.store.begin_scrub(request.rate_bytes);
        Ok(served.scrub_status())
    };
    Ok(Json(current.call(answer).await?))
}

async fn stop_scrub(State(current): State<Current>) -> Answer<ScrubStatus> {
    let answer = async |served: &Served| match served.store.stop_scrub() {
        true => Ok(served.scrub_status()),
        false => Err(refused(ErrorKind::NotFound, "no scrub is running".to_owned())),
    };
    Ok(Json(current.call(answer).await?))
}

#[derive(Deserialize)]
struct WhichCheck {
    #[serde(default)]
    token: u64,
}

async fn check_status(
    State(current): State<Current>,
    Parameters(WhichCheck { token }): Parameters<WhichCheck>,
) -> Answer<CheckStatus> {
    let answer = async move |served: &Served| Ok(served.checking.borrow().get(&token).copied());
    Ok(Json(convert::check_status(current.call(answer).await?)))
}

async fn check(
    State(current): State<Current>,
    Body(request): Body<BeginCheck>,
) -> Answer<CheckReport> {
    if request.ledgers.len() > LEDGERS_MAX {
        let message = format!("at most {LEDGERS_MAX} ledgers can be compared at a time");
        return Err(Error::new(Kind::Invalid, message).into());
    }
    let answer = async move |served: &Served| {
        let noted: Result<Vec<NotedHead>, _> =
            request.ledgers.iter().map(|text| NotedHead::parse(text)).collect();
        let noted = noted?;
        let (shown, token) = (Rc::clone(&served.checking), request.token);
        let tell = move |at| _ = shown.borrow_mut().insert(token, at);
        let report = served.store.check(request.read_data, request.rate_bytes, noted, tell).await;
        served.checking.borrow_mut().remove(&token);
        report
    };
    Ok(Json(convert::check_report(current.call(answer).await?)))
}

async fn nbd(State(current): State<Current>) -> Answer<FrontendMetrics> {
    let answer = async |served: &Served| Ok(served.nbd_metrics());
    Ok(Json(current.call(answer).await?))
}

async fn vhost_user(State(current): State<Current>) -> Answer<FrontendMetrics> {
    let answer = async |served: &Served| Ok(served.attachments.metrics());
    Ok(Json(current.call(answer).await?))
}

async fn ublk(State(current): State<Current>) -> Answer<FrontendMetrics> {
    let answer = async |served: &Served| Ok(served.devices.metrics());
    Ok(Json(current.call(answer).await?))
}

async fn fuse(State(current): State<Current>) -> Answer<FrontendMetrics> {
    let answer = async |served: &Served| Ok(served.mounts.metrics());
    Ok(Json(current.call(answer).await?))
}

#[derive(Deserialize)]
struct Page<T> {
    after: Option<T>,
    max: Option<usize>,
}

impl<T> Page<T> {
    fn max(&self) -> usize {
        self.max.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX)
    }
}

async fn list(
    State(current): State<Current>,
    Parameters(page): Parameters<Page<String>>,
) -> Answer<VdiPage> {
    let max = page.max();
    let entries = current
        .call(async move |served: &Served| served.store.list(page.after.as_deref(), max).await)
        .await?;
    let vdis: Vec<Vdi> = entries.into_iter().map(convert::vdi).collect();
    let next = vdis.last().filter(|_| vdis.len() == max).map(|vdi| vdi.name.clone());
    Ok(Json(VdiPage { vdis, next }))
}

async fn create(
    State(current): State<Current>,
    Body(request): Body<CreateVdi>,
) -> Result<(StatusCode, Json<Vdi>), Failure> {
    let CreateVdi { name, size_bytes, source, history } = request;
    let entry = current
        .call(async move |served: &Served| {
            let store = &served.store;
            // A new one inherits.
            let history = history.filter(|history| history.trim() != INHERIT);
            let retention = history.as_deref().map(Retention::parse).transpose()?;
            match (size_bytes, source) {
                (Some(size_bytes), None) => store.create(&name, size_bytes).await?,
                (None, Some(source)) => store.clone_vdi(&Target::parse(&source), &name).await?,
                _ => return Err(exactly_one("size_bytes or source")),
            };
            if let Some(retention) = retention {
                store.retain(&name, retention).await?;
            }
            store.info(&name).await
        })
        .await?;
    Ok((StatusCode::CREATED, Json(convert::vdi(entry))))
}

fn exactly_one(what: &str) -> vdi::Error {
    refused(ErrorKind::Invalid, format!("give either {what}"))
}

async fn info(State(current): State<Current>, Segments(name): Segments<String>) -> Answer<Vdi> {
    let answer = async move |served: &Served| served.store.info(&name).await;
    Ok(Json(convert::vdi(current.call(answer).await?)))
}

async fn change(
    State(current): State<Current>,
    Segments(name): Segments<String>,
    Body(request): Body<ChangeVdi>,
) -> Answer<Vdi> {
    let answer = async move |served: &Served| {
        let store = &served.store;
        match (request.name, request.size_bytes, request.history) {
            (Some(new_name), None, None) => {
                store.rename(&name, &new_name).await?;
                served.attachments.rename(&name, &new_name);
                served.devices.rename(&name, &new_name);
                store.info(&new_name).await
            }
            (None, Some(size_bytes), None) => {
                resize(store, &name, size_bytes, request.shrink).await
            }
            (None, None, Some(history)) => {
                match history.trim() {
                    INHERIT => store.inherit_retention(&name).await?,
                    own => store.retain(&name, Retention::parse(own)?).await?,
                }
                store.info(&name).await
            }
            _ => Err(exactly_one("name, size_bytes or history")),
        }
    };
    Ok(Json(convert::vdi(current.call(answer).await?)))
}

/// Shrinking loses data, so it takes a second word; a typo in a size must not.
async fn resize(
    store: &Store,
    name: &str,
    size_bytes: u64,
    shrink: bool,
) -> Result<vdi::VdiEntry, vdi::Error> {
    let now = store.info(name).await?.size_bytes;
    if size_bytes < now && !shrink {
        let (now, then) = (base::size::HumanBytes(now), base::size::HumanBytes(size_bytes));
        return Err(refused(
            ErrorKind::Invalid,
            format!(
                "{name} has {now}: what lies beyond {then} would be lost; to do that, add --shrink"
            ),
        ));
    }
    store.resize(name, size_bytes).await?;
    store.info(name).await
}

async fn remove(
    State(current): State<Current>,
    Segments(name): Segments<String>,
) -> Answer<Removed> {
    let answer = async move |served: &Served| {
        let snapshots = served.store.info(&name).await?.snapshot_count;
        let target = Target { vdi: name.clone(), snapshot: None };
        refuse_attached(served, &target).await?;
        served.store.remove(&target).await?;
        Ok(Removed { removed: name, snapshots })
    };
    Ok(Json(current.call(answer).await?))
}

/// What is attached is not deleted: a virtual machine, or a file system of this machine, counts on it.
/// Clients that come and go are disconnected instead.
async fn refuse_attached(served: &Served, target: &Target) -> Result<(), vdi::Error> {
    for attachment in all_attachments(served) {
        let disk = Target::parse(&attachment.disk);
        if disk.vdi == target.vdi && holds(served, &disk, target).await? {
            return Err(attached(&attachment));
        }
    }
    Ok(())
}

fn attached(attachment: &Attachment) -> vdi::Error {
    let (disk, path) = (&attachment.disk, attachment.path());
    refused(
        ErrorKind::Busy,
        format!("{disk} is attached at {path}; first detach it: parallax detach {path}"),
    )
}

/// Whether deleting `target` takes `attached` away, which is of the same VDI. A snapshot has a number and
/// may have a label.
async fn holds(served: &Served, attached: &Target, target: &Target) -> Result<bool, vdi::Error> {
    let Some(snapshot) = &target.snapshot else { return Ok(true) };
    let Some(attached) = &attached.snapshot else { return Ok(false) };
    let deleted = served.store.snapshot_info(&target.vdi, snapshot).await?.number;
    let attached = served.store.snapshot_info(&target.vdi, attached).await;
    Ok(attached.is_ok_and(|attached| attached.number == deleted))
}

async fn space(State(current): State<Current>, Segments(vdi): Segments<String>) -> Answer<Space> {
    target_space(&current, Target { vdi, snapshot: None }).await
}

async fn snapshot_space(
    State(current): State<Current>,
    Segments((vdi, snapshot)): Segments<(String, String)>,
) -> Answer<Space> {
    target_space(&current, Target { vdi, snapshot: Some(snapshot) }).await
}

async fn target_space(current: &Current, target: Target) -> Answer<Space> {
    let answer = async move |served: &Served| served.store.space(&target).await;
    Ok(Json(convert::space(current.call(answer).await?)))
}

async fn rollback(
    State(current): State<Current>,
    Segments(name): Segments<String>,
    Body(request): Body<Rollback>,
) -> Answer<Vdi> {
    let answer = async move |served: &Served| {
        served.store.rollback(&name, &request.snapshot).await?;
        served.store.info(&name).await
    };
    Ok(Json(convert::vdi(current.call(answer).await?)))
}

async fn complete(
    State(current): State<Current>,
    Segments(partial): Segments<String>,
    Body(request): Body<CompleteReceive>,
) -> Result<(StatusCode, Json<Snapshot>), Failure> {
    let CompleteReceive { name, size_bytes, label, uuid, base, force } = request;
    let uuid = parse_uuid(&uuid)?;
    let base = base.as_deref().map(parse_uuid).transpose()?;
    let vdi = name.clone();
    let answer = async move |served: &Served| {
        // Both are severed: one ends, and the other becomes something else. Snapshots stay.
        let severed = |it: &&Attachment| it.disk == partial || it.disk == vdi;
        if let Some(attachment) = all_attachments(served).iter().find(severed) {
            return Err(attached(attachment));
        }
        let received =
            Received { partial, name: vdi.clone(), size_bytes, label, uuid, base, force };
        let number = served.store.complete_receive(&received).await?;
        served.store.snapshot_info(&vdi, &number.to_string()).await
    };
    let entry = current.call(answer).await?;
    Ok((StatusCode::CREATED, Json(convert::snapshot(&name, entry))))
}

fn parse_uuid(text: &str) -> Result<SnapshotUuid, Error> {
    let uuid = SnapshotUuid::parse(text).filter(|uuid| *uuid != SnapshotUuid::default());
    uuid.ok_or_else(|| Error::new(Kind::Invalid, format!("'{text}' is not a uuid")))
}

#[derive(Deserialize)]
struct PageOfSnapshots {
    after: Option<u64>,
    max: Option<usize>,
    /// Whether to list what the disk's history keeps, too; it does without a word.
    moments: Option<bool>,
}

async fn snapshots(
    State(current): State<Current>,
    Segments(name): Segments<String>,
    Parameters(page): Parameters<PageOfSnapshots>,
) -> Answer<SnapshotPage> {
    let max = page.max.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX);
    let (vdi, with_moments) = (name.clone(), page.moments.unwrap_or(true));
    let after = SnapshotNumber::new(page.after.unwrap_or(0));
    let answer = async move |served: &Served| match with_moments {
        true => served.store.snapshots(&vdi, after, max).await,
        false => served.store.asked_snapshots(&vdi, after, max).await,
    };
    let entries = current.call(answer).await?;
    let snapshots: Vec<Snapshot> =
        entries.into_iter().map(|entry| convert::snapshot(&name, entry)).collect();
    let next = snapshots.last().filter(|_| snapshots.len() == max).map(|last| last.number);
    Ok(Json(SnapshotPage { snapshots, next }))
}

#[derive(Deserialize)]
struct PageOfIntervals {
    every: Option<String>,
    max: Option<usize>,
    before: Option<u64>,
}

async fn intervals(
    State(current): State<Current>,
    Segments(name): Segments<String>,
    Parameters(page): Parameters<PageOfIntervals>,
) -> Answer<IntervalPage> {
    let PageOfIntervals { every, max, before } = page;
    let max = max.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX);
    let wanted = WantedIntervals { every, max, before: before.map(SnapshotNumber::new) };
    let vdi = name.clone();
    let answer = async move |served: &Served| served.store.intervals(&vdi, &wanted).await;
    Ok(Json(convert::intervals(&name, current.call(answer).await?)))
}

#[derive(Deserialize)]
struct PageOfWrites {
    up_to: Option<String>,
    before: Option<u64>,
    max: Option<usize>,
}

async fn writes(
    State(current): State<Current>,
    Segments(name): Segments<String>,
    Parameters(page): Parameters<PageOfWrites>,
) -> Answer<WritePage> {
    let PageOfWrites { up_to, before, max } = page;
    let max = max.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX);
    let wanted = WantedWrites { up_to, before: before.map(Lsn::new), max };
    let vdi = name.clone();
    let answer = async move |served: &Served| served.store.latest_writes(&vdi, &wanted).await;
    Ok(Json(convert::writes(&name, current.call(answer).await?)))
}

async fn take_snapshot(
    State(current): State<Current>,
    Segments(name): Segments<String>,
    Body(request): Body<TakeSnapshot>,
) -> Result<(StatusCode, Json<Snapshot>), Failure> {
    let vdi = name.clone();
    let answer = async move |served: &Served| {
        let store = &served.store;
        if let Some(hold) = &request.hold {
            store.check_until(hold.until.as_deref())?;
        }
        let number = store.snapshot(&vdi, request.label.as_deref()).await?.to_string();
        if let Some(hold) = request.hold {
            let held = store.hold(&vdi, &number, hold.until.as_deref()).await;
            held.map_err(|error| {
                let message = format!("{vdi}@{number} was taken, and is not held: {error}");
                refused(error.kind(), message)
            })?;
        }
        store.snapshot_info(&vdi, &number).await
    };
    let entry = current.call(answer).await?;
    Ok((StatusCode::CREATED, Json(convert::snapshot(&name, entry))))
}

async fn take_series(
    State(current): State<Current>,
    Segments(name): Segments<String>,
    Body(request): Body<TakeSeries>,
) -> Result<(StatusCode, Json<Series>), Failure> {
    let TakeSeries { every_us, count } = request;
    let wanted = WantedSeries { every: Duration::from_micros(every_us), count };
    let answer = async move |served: &Served| served.store.snapshot_series(&name, wanted).await;
    let taken = current.call(answer).await?;
    let (first, last) = (taken.first.get(), taken.last.get());
    let series = Series { first, last, count: taken.count.into() };
    Ok((StatusCode::CREATED, Json(series)))
}

async fn hold(
    State(current): State<Current>,
    Segments((name, snapshot)): Segments<(String, String)>,
    Body(request): Body<Hold>,
) -> Answer<Snapshot> {
    let vdi = name.clone();
    let answer = async move |served: &Served| {
        let number = served.store.hold(&vdi, &snapshot, request.until.as_deref()).await?;
        served.store.snapshot_info(&vdi, &number.to_string()).await
    };
    Ok(Json(convert::snapshot(&name, current.call(answer).await?)))
}

/// `None`: what was held is missing, and that is noted now.
async fn release(
    State(current): State<Current>,
    Segments((name, snapshot)): Segments<(String, String)>,
) -> Answer<Option<Snapshot>> {
    let vdi = name.clone();
    let answer = async move |served: &Served| {
        let number = served.store.release_hold(&vdi, &snapshot).await?;
        match served.store.snapshot_info(&vdi, &number.to_string()).await {
            // Or its time had come, and it went at once.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            found => found.map(Some),
        }
    };
    let entry = current.call(answer).await?;
    Ok(Json(entry.map(|entry| convert::snapshot(&name, entry))))
}

async fn store_settings(State(current): State<Current>) -> Answer<StoreSettings> {
    let answer = async |served: &Served| Ok(settings(&served.store));
    Ok(Json(current.call(answer).await?))
}

async fn change_store(
    State(current): State<Current>,
    Body(request): Body<ChangeStore>,
) -> Answer<StoreSettings> {
    let answer = async move |served: &Served| {
        served.store.retain_by_default(Retention::parse(&request.history)?).await?;
        Ok(settings(&served.store))
    };
    Ok(Json(current.call(answer).await?))
}

fn settings(store: &Store) -> StoreSettings {
    StoreSettings { history: store.default_retention().to_string() }
}

async fn snapshot(
    State(current): State<Current>,
    Segments((name, snapshot)): Segments<(String, String)>,
) -> Answer<Snapshot> {
    let vdi = name.clone();
    let answer = async move |served: &Served| served.store.snapshot_info(&vdi, &snapshot).await;
    Ok(Json(convert::snapshot(&name, current.call(answer).await?)))
}

#[derive(Deserialize)]
struct WhichSnapshot {
    uuid: Option<String>,
}

async fn remove_snapshot(
    State(current): State<Current>,
    Segments((vdi, snapshot)): Segments<(String, String)>,
    Parameters(which): Parameters<WhichSnapshot>,
) -> Answer<Removed> {
    let wanted = which.uuid.as_deref().map(parse_uuid).transpose()?;
    let answer = async move |served: &Served| {
        if let Some(wanted) = wanted
            && served.store.snapshot_info(&vdi, &snapshot).await?.uuid != wanted
        {
            let message = format!("{vdi}@{snapshot} is another snapshot by now");
            return Err(refused(ErrorKind::NotFound, message));
        }
        let target = Target { vdi, snapshot: Some(snapshot) };
        refuse_attached(served, &target).await?;
        served.store.remove(&target).await?;
        Ok(Removed { removed: target.to_string(), snapshots: 0 })
    };
    Ok(Json(current.call(answer).await?))
}

#[derive(Deserialize)]
struct Between {
    from: Option<String>,
    to: String,
    after: Option<u64>,
    max: Option<usize>,
}

async fn diff(
    State(current): State<Current>,
    Parameters(Between { from, to, after, max }): Parameters<Between>,
) -> Answer<DiffPage> {
    let (one, other) = (from.as_deref().map(Target::parse), Target::parse(&to));
    let max = max.unwrap_or(DIFF_EXTENTS_MAX).clamp(1, DIFF_EXTENTS_MAX);
    let offset = after.unwrap_or(0);
    let answer = async move |served: &Served| match one {
        Some(one) => served.store.diff(&one, &other, offset, max).await,
        None => served.store.mapped(&other, offset, max).await,
    };
    Ok(Json(convert::diff(from, to, current.call(answer).await?)))
}

async fn attachments(State(current): State<Current>) -> Answer<Vec<Attachment>> {
    let answer = async |served: &Served| Ok(all_attachments(served));
    Ok(Json(current.call(answer).await?))
}

/// Sockets and block devices, in order of path.
fn all_attachments(served: &Served) -> Vec<Attachment> {
    let mut attachments = served.attachments.list();
    attachments.extend(served.devices.list());
    attachments.sort_by(|one, other| one.path().cmp(other.path()));
    attachments
}

async fn attach(
    State(current): State<Current>,
    Body(request): Body<Attach>,
) -> Result<(StatusCode, Json<Attachment>), Failure> {
    let answer = async move |served: &Served| {
        let Attach { disk, vhost_user, ublk } = request;
        refuse_moment(&served.store, &Target::parse(&disk)).await?;
        match (vhost_user, ublk) {
            (Some(path), false) => {
                // Whatever is wrong with the disk is told now, not when a virtual machine connects.
                served.store.open_disk(&Target::parse(&disk)).await?;
                Ok(served.attachments.attach(disk, &path))
            }
            (None, true) => Ok(served.devices.attach(disk).await),
            _ => Err(exactly_one("vhost_user or ublk")),
        }
    };
    Ok((StatusCode::CREATED, Json(current.call(answer).await??)))
}

/// A moment goes when its time has come, also while no virtual machine is connected.
async fn refuse_moment(store: &Store, target: &Target) -> Result<(), vdi::Error> {
    let Some(snapshot) = &target.snapshot else { return Ok(()) };
    match store.snapshot_info(&target.vdi, snapshot).await?.changed_bytes {
        None => Ok(()),
        Some(_) => Err(refused(
            ErrorKind::Invalid,
            format!(
                "{target} is a moment, which {} keeps for a while only; attach a clone of it: \
                 parallax clone {target} NEW",
                target.vdi
            ),
        )),
    }
}

async fn detach(
    State(current): State<Current>,
    Segments(path): Segments<String>,
) -> Answer<Attachment> {
    let device = path.clone();
    let looked_at = tokio::task::spawn_blocking(move || devices::check_unused(&device));
    match tokio::time::timeout(LOOK_MAX, looked_at).await {
        Ok(looked_at) => looked_at.unwrap_or(Ok(()))?,
        Err(_) => return Err(devices::in_use(&path).into()),
    }
    let answer = async move |served: &Served| {
        Ok(match served.devices.detach(&path).await {
            Some(outcome) => outcome,
            None => served.attachments.detach(&path).await,
        })
    };
    Ok(Json(current.call(answer).await??))
}

async fn mounts(State(current): State<Current>) -> Answer<Vec<Mounted>> {
    let answer = async |served: &Served| Ok(served.mounts.list());
    Ok(Json(current.call(answer).await?))
}
