//! Asks a daemon over its unix socket: one connection per request, so that a client holds
//! nothing and survives a restart of the daemon.

use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::check::CheckReport;
use crate::scrub::{BeginCheck, BeginScrub, CheckStatus, ScrubStatus};
use crate::types::{
    Attach, Attachment, ChangeStore, ChangeVdi, CompleteReceive, CreateVdi, DaemonStatus, Diff,
    DiffPage, Gc, GcStatus, Hold, IntervalPage, Mounted, Removed, Rollback, Series, Snapshot,
    SnapshotPage, Space, Stats, StoreSettings, TakeSeries, TakeSnapshot, Upgrade, Upgrading, Vdi,
    VdiPage, WritePage,
};
use crate::{Error, Kind, percent_encode};

/// Longest answer that is read: a page of a diff has up to 5 MiB, of [`crate::DIFF_EXTENTS_MAX`]
/// extents of at most 75 bytes.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Speaks to the daemon on one control socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// The body of a request without one.
const NOTHING: Option<&()> = None;

impl Client {
    /// A client of the daemon on `socket`. Does not connect yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The socket that it speaks to.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Describes the daemon.
    ///
    /// # Errors
    /// `Unreachable` if none answers, as for every method here.
    pub async fn daemon(&self) -> Result<DaemonStatus, Error> {
        self.ask(Method::GET, "/v1/daemon", NOTHING).await
    }

    /// Has the daemon become another program: it ends well, and the next one begins. Returns before that.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`: the program is none that can be the daemon, and nothing has changed.
    pub async fn upgrade(&self, request: &Upgrade) -> Result<Upgrading, Error> {
        self.ask(Method::POST, "/v1/upgrade", Some(request)).await
    }

    /// Current counters.
    ///
    /// # Errors
    /// If the daemon cannot answer.
    pub async fn stats(&self) -> Result<Stats, Error> {
        self.ask(Method::GET, "/v1/stats", NOTHING).await
    }

    /// Collects garbage: what only deleted disks and snapshots used is free on return, and the space of
    /// free blocks was given back to what lies below.
    ///
    /// # Errors
    /// `Io` if metadata could not be read: nothing was freed then.
    pub async fn collect_garbage(&self) -> Result<Gc, Error> {
        self.ask(Method::POST, "/v1/gc", NOTHING).await
    }

    /// What the garbage collection is doing, and what it did the last time.
    ///
    /// # Errors
    /// If the daemon cannot answer.
    pub async fn gc_status(&self) -> Result<GcStatus, Error> {
        self.ask(Method::GET, "/v1/gc", NOTHING).await
    }

    /// How scrub stands, and what its last pass found.
    ///
    /// # Errors
    /// If the daemon cannot answer.
    pub async fn scrub_status(&self) -> Result<ScrubStatus, Error> {
        self.ask(Method::GET, "/v1/scrub", NOTHING).await
    }

    /// Begins a pass of scrub, or sets the rate of the one that is under way. Does not wait for its end.
    ///
    /// # Errors
    /// If the daemon cannot answer.
    pub async fn begin_scrub(&self, request: BeginScrub) -> Result<ScrubStatus, Error> {
        self.ask(Method::POST, "/v1/scrub", Some(&request)).await
    }

    /// Ends the pass of scrub that is under way.
    ///
    /// # Errors
    /// `NotFound` if none is.
    pub async fn stop_scrub(&self) -> Result<ScrubStatus, Error> {
        self.ask(Method::DELETE, "/v1/scrub", NOTHING).await
    }

    /// Checks the store while it is served. What is wrong with it is in the report, and no error.
    ///
    /// # Errors
    /// `Busy` if somebody needs space that a check holds back.
    pub async fn check(&self, request: BeginCheck) -> Result<CheckReport, Error> {
        self.ask(Method::POST, "/v1/check", Some(&request)).await
    }

    /// How far the check is that was begun with this token.
    ///
    /// # Errors
    /// If the daemon cannot answer.
    pub async fn check_status(&self, token: u64) -> Result<CheckStatus, Error> {
        self.ask(Method::GET, &format!("/v1/check?token={token}"), NOTHING).await
    }

    /// Every VDI, in order of name.
    ///
    /// # Errors
    /// If metadata cannot be read.
    pub async fn vdis(&self) -> Result<Vec<Vdi>, Error> {
        let mut vdis = Vec::new();
        let mut path = "/v1/vdis".to_owned();
        loop {
            let page: VdiPage = self.ask(Method::GET, &path, NOTHING).await?;
            vdis.extend(page.vdis);
            let Some(next) = page.next else { return Ok(vdis) };
            path = format!("/v1/vdis?after={}", percent_encode(&next));
        }
    }

    /// Creates or clones a VDI. Durable on return.
    ///
    /// # Errors
    /// `Exists`, `Invalid`, `NotFound` (the source), `NoSpace`.
    pub async fn create(&self, request: &CreateVdi) -> Result<Vdi, Error> {
        self.ask(Method::POST, "/v1/vdis", Some(request)).await
    }

    /// Describes one VDI.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn vdi(&self, name: &str) -> Result<Vdi, Error> {
        self.ask(Method::GET, &vdi_path(name), NOTHING).await
    }

    /// Renames or resizes a VDI. Durable on return.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `Invalid`.
    pub async fn change(&self, name: &str, request: &ChangeVdi) -> Result<Vdi, Error> {
        self.ask(Method::PATCH, &vdi_path(name), Some(request)).await
    }

    /// Deletes a VDI with all its snapshots. Durable on return.
    ///
    /// # Errors
    /// `NotFound`; `Busy` if it or a snapshot of it is attached.
    pub async fn remove(&self, name: &str) -> Result<Removed, Error> {
        self.ask(Method::DELETE, &vdi_path(name), NOTHING).await
    }

    /// Counts the space of a VDI, or of one of its snapshots.
    ///
    /// # Errors
    /// `NotFound`, `Damaged`.
    pub async fn space(&self, name: &str, snapshot: Option<&str>) -> Result<Space, Error> {
        let path = match snapshot {
            Some(snapshot) => snapshot_path(name, snapshot),
            None => vdi_path(name),
        };
        self.ask(Method::GET, &format!("{path}/space"), NOTHING).await
    }

    /// Makes a VDI's contents those of one of its snapshots. Durable on return.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn rollback(&self, name: &str, snapshot: &str) -> Result<Vdi, Error> {
        let request = Rollback { snapshot: snapshot.to_owned() };
        self.ask(Method::POST, &format!("{}/rollback", vdi_path(name)), Some(&request)).await
    }

    /// Holds a snapshot or a moment, named by label, number or time. Durable on return.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a time until which it cannot be held.
    pub async fn hold(
        &self,
        name: &str,
        snapshot: &str,
        request: &Hold,
    ) -> Result<Snapshot, Error> {
        let path = format!("{}/hold", snapshot_path(name, snapshot));
        self.ask(Method::POST, &path, Some(request)).await
    }

    /// Ends the hold of a snapshot. Durable on return.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it is not held.
    pub async fn release(&self, name: &str, snapshot: &str) -> Result<Option<Snapshot>, Error> {
        let path = format!("{}/hold", snapshot_path(name, snapshot));
        self.ask(Method::DELETE, &path, NOTHING).await
    }

    /// What the store keeps for all VDIs.
    ///
    /// # Errors
    /// If the daemon cannot answer.
    pub async fn store(&self) -> Result<StoreSettings, Error> {
        self.ask(Method::GET, "/v1/store", NOTHING).await
    }

    /// Changes what the store keeps for all VDIs. Durable on return.
    ///
    /// # Errors
    /// `Invalid`.
    pub async fn change_store(&self, request: &ChangeStore) -> Result<StoreSettings, Error> {
        self.ask(Method::PATCH, "/v1/store", Some(request)).await
    }

    /// Makes of a VDI into which a snapshot was received what it was received for: a new VDI with
    /// that snapshot, or the next snapshot of one that exists, and its contents. Durable on return.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `Busy` (it is attached); `Invalid` if it has another newest snapshot, or
    /// was written since.
    pub async fn complete(
        &self,
        partial: &str,
        request: &CompleteReceive,
    ) -> Result<Snapshot, Error> {
        let path = format!("{}/complete", vdi_path(partial));
        self.ask(Method::POST, &path, Some(request)).await
    }

    /// Takes a snapshot. Durable on return.
    ///
    /// # Errors
    /// `NotFound`; `Exists` if the label is taken.
    pub async fn snapshot(&self, name: &str, label: Option<&str>) -> Result<Snapshot, Error> {
        let request = TakeSnapshot { label: label.map(str::to_owned), hold: None };
        self.take_snapshot(name, &request).await
    }

    /// As [`Self::snapshot`]; it may be held at once.
    ///
    /// # Errors
    /// As [`Self::snapshot`]; `Invalid` for a time until which it cannot be held.
    pub async fn take_snapshot(
        &self,
        name: &str,
        request: &TakeSnapshot,
    ) -> Result<Snapshot, Error> {
        self.ask(Method::POST, &format!("{}/snapshots", vdi_path(name)), Some(request)).await
    }

    /// Takes a series of snapshots. All are durable on return.
    ///
    /// # Errors
    /// As [`Self::snapshot`]; `Invalid` for one that is empty, or longer than a second. What was taken before stays.
    pub async fn take_series(&self, name: &str, request: TakeSeries) -> Result<Series, Error> {
        self.ask(Method::POST, &format!("{}/series", vdi_path(name)), Some(&request)).await
    }

    /// Every snapshot of a VDI, in order of number.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn snapshots(&self, name: &str) -> Result<Vec<Snapshot>, Error> {
        self.snapshot_pages(name, true, (0, u64::MAX)).await
    }

    /// As [`Self::snapshots`], without the moments that the VDI's history keeps.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn asked_snapshots(&self, name: &str) -> Result<Vec<Snapshot>, Error> {
        self.snapshot_pages(name, false, (0, u64::MAX)).await
    }

    /// As [`Self::asked_snapshots`], those with numbers from `first` to `last`.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn asked_snapshots_between(
        &self,
        name: &str,
        first: u64,
        last: u64,
    ) -> Result<Vec<Snapshot>, Error> {
        self.snapshot_pages(name, false, (first.saturating_sub(1), last)).await
    }

    /// Snapshots with numbers above the first, up to the last.
    async fn snapshot_pages(
        &self,
        name: &str,
        moments: bool,
        (mut after, last): (u64, u64),
    ) -> Result<Vec<Snapshot>, Error> {
        let mut snapshots = Vec::new();
        loop {
            let path = format!("{}/snapshots?moments={moments}&after={after}", vdi_path(name));
            let page: SnapshotPage = self.ask(Method::GET, &path, NOTHING).await?;
            let wanted = page.snapshots.into_iter().filter(|snapshot| snapshot.number <= last);
            snapshots.extend(wanted);
            match page.next.filter(|&next| next < last) {
                Some(next) => after = next,
                None => return Ok(snapshots),
            }
        }
    }

    /// Sums up by interval of time what happened to a VDI: of the `max` latest intervals, or those of
    /// what snapshots with numbers below `before` tell. `every` is a length of time such as `15m`.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for an interval that is none.
    pub async fn intervals(
        &self,
        name: &str,
        every: Option<&str>,
        max: usize,
        before: Option<u64>,
    ) -> Result<IntervalPage, Error> {
        let every = every.map(|every| format!("&every={}", percent_encode(every)));
        let before = before.map(|before| format!("&before={before}"));
        let (every, before) = (every.unwrap_or_default(), before.unwrap_or_default());
        let path = format!("{}/intervals?max={max}{every}{before}", vdi_path(name));
        self.ask(Method::GET, &path, NOTHING).await
    }

    /// The `max` latest writes of a VDI that can be opened, up to a moment if one is named, of those with
    /// log records below `before`.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if the moment that was named keeps none.
    pub async fn writes(
        &self,
        name: &str,
        up_to: Option<&str>,
        max: usize,
        before: Option<u64>,
    ) -> Result<WritePage, Error> {
        let up_to = up_to.map(|moment| format!("&up_to={}", percent_encode(moment)));
        let before = before.map(|before| format!("&before={before}"));
        let (up_to, before) = (up_to.unwrap_or_default(), before.unwrap_or_default());
        let path = format!("{}/writes?max={max}{up_to}{before}", vdi_path(name));
        self.ask(Method::GET, &path, NOTHING).await
    }

    /// Describes one snapshot, named by label or number.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn snapshot_status(&self, name: &str, snapshot: &str) -> Result<Snapshot, Error> {
        self.ask(Method::GET, &snapshot_path(name, snapshot), NOTHING).await
    }

    /// Deletes one snapshot, named by label or number. Durable on return.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn remove_snapshot(&self, name: &str, snapshot: &str) -> Result<Removed, Error> {
        self.ask(Method::DELETE, &snapshot_path(name, snapshot), NOTHING).await
    }

    /// Deletes a snapshot that was listed before, unless what has its number by now is another one. Durable on return.
    ///
    /// # Errors
    /// `NotFound`, also if it is another one.
    pub async fn remove_listed_snapshot(
        &self,
        name: &str,
        snapshot: &Snapshot,
    ) -> Result<Removed, Error> {
        let path = snapshot_path(name, &snapshot.number.to_string());
        let path = format!("{path}?uuid={}", percent_encode(&snapshot.uuid));
        self.ask(Method::DELETE, &path, NOTHING).await
    }

    /// Everything that differs between two VDIs or snapshots: as much memory as there are
    /// differences.
    ///
    /// # Errors
    /// `NotFound`, `Damaged`.
    pub async fn diff(&self, from: &str, to: &str) -> Result<Diff, Error> {
        let DiffPage { mut diff, mut next } = self.diff_page(Some(from), to, None).await?;
        while let Some(after) = next {
            let page = self.diff_page(Some(from), to, Some(after)).await?;
            diff.extents.extend(page.diff.extents);
            next = page.next;
        }
        Ok(diff)
    }

    /// A page of what differs between two VDIs or snapshots: the first one, or what follows another
    /// one, which says `after` what. Without `from`, of what `to` has data for.
    ///
    /// # Errors
    /// As [`Self::diff`].
    pub async fn diff_page(
        &self,
        from: Option<&str>,
        to: &str,
        after: Option<u64>,
    ) -> Result<DiffPage, Error> {
        let to = percent_encode(to);
        let from = from.map(|from| format!("&from={}", percent_encode(from))).unwrap_or_default();
        let after = after.map(|after| format!("&after={after}")).unwrap_or_default();
        self.ask(Method::GET, &format!("/v1/diff?to={to}{from}{after}"), NOTHING).await
    }

    /// Attaches a disk to virtual machines, or makes a block device of it. The socket or the device is
    /// there on return.
    ///
    /// # Errors
    /// `NotFound` (the disk, or the directory), `Exists`, `Busy`, `Invalid` (the path), `Unsupported`
    /// (there are no block devices).
    pub async fn attach(&self, request: &Attach) -> Result<Attachment, Error> {
        self.ask(Method::POST, "/v1/attachments", Some(request)).await
    }

    /// Disconnects whoever is connected to a socket, and removes it, or a block device.
    ///
    /// # Errors
    /// `NotFound`; `Busy` if a block device is in use.
    pub async fn detach(&self, path: &str) -> Result<Attachment, Error> {
        let path = format!("/v1/attachments/{}", percent_encode(path));
        self.ask(Method::DELETE, &path, NOTHING).await
    }

    /// Every disk that is attached, in order of path.
    ///
    /// # Errors
    /// If the daemon cannot answer.
    pub async fn attachments(&self) -> Result<Vec<Attachment>, Error> {
        self.ask(Method::GET, "/v1/attachments", NOTHING).await
    }

    /// Every mount that the daemon serves.
    ///
    /// # Errors
    /// If the daemon cannot answer.
    pub async fn mounts(&self) -> Result<Vec<Mounted>, Error> {
        self.ask(Method::GET, "/v1/mounts", NOTHING).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, Error> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| self.unreachable(&e))?;
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|e| protocol(&e))?,
            None => Vec::new(),
        };
        let request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "parallax")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| protocol(&e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| protocol(&e))?;
        // The connection ends with its sender; what it reports, the sender reports too.
        tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(|e| protocol(&e))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let bytes = body
            .map_err(|e| Error::new(Kind::Io, format!("the daemon's answer broke off: {e}")))?
            .to_bytes();
        decode(status, &bytes)
    }

    fn unreachable(&self, error: &std::io::Error) -> Error {
        let socket = self.socket.display();
        let message = match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                format!(
                    "no daemon answers on {socket}; name its socket with --socket or \
                     PARALLAX_SOCKET, or start one with: parallax serve STORE"
                )
            }
            std::io::ErrorKind::PermissionDenied => format!(
                "you may not use {socket}: run as the user who started the daemon, or name \
                 another socket with --socket"
            ),
            std::io::ErrorKind::InvalidInput => {
                let message = format!("{socket} cannot be a socket: {error}");
                return Error::new(Kind::Invalid, message);
            }
            _ => format!("cannot connect to the daemon on {socket}: {error}"),
        };
        Error::new(Kind::Unreachable, message)
    }
}

fn vdi_path(name: &str) -> String {
    format!("/v1/vdis/{}", percent_encode(name))
}

fn snapshot_path(name: &str, snapshot: &str) -> String {
    format!("{}/snapshots/{}", vdi_path(name), percent_encode(snapshot))
}

fn protocol(error: &dyn std::error::Error) -> Error {
    Error::new(Kind::Io, format!("the daemon does not answer as it should: {error}"))
}

fn decode<T: DeserializeOwned>(status: StatusCode, bytes: &[u8]) -> Result<T, Error> {
    if status.is_success() {
        return serde_json::from_slice(bytes).map_err(|e| protocol(&e));
    }
    Err(serde_json::from_slice(bytes).unwrap_or_else(|_| {
        Error::new(Kind::Io, format!("the daemon answers with HTTP status {status}"))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_and_errors_decode() {
        let ok = decode::<Removed>(StatusCode::OK, br#"{"removed":"a","snapshots":2,"new":1}"#);
        assert_eq!(ok, Ok(Removed { removed: "a".to_owned(), snapshots: 2 }));
        let error = Error::new(Kind::Busy, "later");
        let bytes = serde_json::to_vec(&error).unwrap();
        assert_eq!(decode::<Removed>(StatusCode::CONFLICT, &bytes), Err(error));
        let foreign = decode::<Removed>(StatusCode::BAD_GATEWAY, b"<html>").unwrap_err();
        assert!(foreign.message.contains("502"), "{foreign}");
        assert_eq!(decode::<Removed>(StatusCode::OK, b"{}").unwrap_err().kind, Kind::Io);
    }

    #[test]
    fn names_cannot_leave_their_path_segment() {
        assert_eq!(snapshot_path("a/b", "x?y"), "/v1/vdis/a%2Fb/snapshots/x%3Fy");
    }
}
