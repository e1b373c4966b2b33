//! The management interface of a daemon: what is asked and answered as JSON over HTTP, and the
//! client that asks.
//!
//! | Route | Method | Takes | Gives |
//! |---|---|---|---|
//! | `/v1/daemon` | GET | | [`DaemonStatus`] |
//! | `/v1/stats` | GET | | [`Stats`] |
//! | `/v1/upgrade` | POST | [`Upgrade`] | [`Upgrading`] |
//! | `/v1/nbd`, `/v1/vhost-user`, `/v1/ublk`, `/v1/fuse` | GET | | [`FrontendMetrics`] |
//! | `/v1/vdis?after=&max=` | GET | | [`VdiPage`] |
//! | `/v1/vdis` | POST | [`CreateVdi`] | [`Vdi`] |
//! | `/v1/vdis/{name}` | GET | | [`Vdi`] |
//! | `/v1/vdis/{name}` | PATCH | [`ChangeVdi`] | [`Vdi`] |
//! | `/v1/vdis/{name}` | DELETE | | [`Removed`] |
//! | `/v1/vdis/{name}/space` | GET | | [`Space`] |
//! | `/v1/vdis/{name}/rollback` | POST | [`Rollback`] | [`Vdi`] |
//! | `/v1/vdis/{name}/complete` | POST | [`CompleteReceive`] | [`Snapshot`] |
//! | `/v1/vdis/{name}/intervals?every=&max=&before=` | GET | | [`IntervalPage`] |
//! | `/v1/vdis/{name}/writes?up_to=&before=&max=` | GET | | [`WritePage`] |
//! | `/v1/vdis/{name}/snapshots?after=&max=` | GET | | [`SnapshotPage`] |
//! | `/v1/vdis/{name}/snapshots` | POST | [`TakeSnapshot`] | [`Snapshot`] |
//! | `/v1/vdis/{name}/series` | POST | [`TakeSeries`] | [`Series`], when all are durable |
//! | `/v1/vdis/{name}/snapshots/{snapshot}` | GET | | [`Snapshot`] |
//! | `/v1/vdis/{name}/snapshots/{snapshot}?uuid=` | DELETE | | [`Removed`]; with `uuid`, of that one only |
//! | `/v1/vdis/{name}/snapshots/{snapshot}/space` | GET | | [`Space`] |
//! | `/v1/vdis/{name}/snapshots/{snapshot}/hold` | POST | [`Hold`] | [`Snapshot`] |
//! | `/v1/vdis/{name}/snapshots/{snapshot}/hold` | DELETE | | [`Snapshot`] |
//! | `/v1/store` | GET | | [`StoreSettings`] |
//! | `/v1/store` | PATCH | [`ChangeStore`] | [`StoreSettings`] |
//! | `/v1/diff?from=&to=&after=&max=` | GET | | [`DiffPage`] |
//! | `/v1/gc` | GET | | [`GcStatus`] |
//! | `/v1/gc` | POST | | [`Gc`] |
//! | `/v1/scrub` | GET | | [`ScrubStatus`] |
//! | `/v1/scrub` | POST | [`BeginScrub`] | [`ScrubStatus`], of the pass that was begun or is under way |
//! | `/v1/scrub` | DELETE | | [`ScrubStatus`], of the pass that is ended |
//! | `/v1/check?token=1` | GET | | [`CheckStatus`] |
//! | `/v1/check` | POST | [`BeginCheck`] | [`CheckReport`], when it has ended |
//! | `/v1/attachments` | GET | | list of [`Attachment`] |
//! | `/v1/attachments` | POST | [`Attach`] | [`Attachment`] |
//! | `/v1/attachments/{path}` | DELETE | | [`Attachment`], as it was |
//! | `/v1/mounts` | GET | | list of [`Mounted`] |
//!
//! Without `from`, `/v1/diff` lists what `to` has data for. A `{snapshot}` is a label or a number, a `{path}` has its slashes encoded. Every failure is an
//! [`Error`] as JSON, under the HTTP status of its kind. Sizes are in bytes, times in RFC 3339.
//! Fields may be added; a client ignores those that it does not know. Requests with unknown fields
//! are refused.

mod check;
mod client;
mod error;
pub mod mount;
mod scrub;
mod types;
mod url;

pub use check::{CheckCounts, CheckReport, Finding, FindingKind};
pub use client::Client;
pub use error::{Error, Kind};
pub use scrub::{
    BeginCheck, BeginScrub, CheckStatus, ScrubDamage, ScrubDamageKind, ScrubEnd, ScrubOwner,
    ScrubReport, ScrubStatus,
};
pub use types::{
    Attach, Attachment, ChangeStore, ChangeVdi, CompleteReceive, CreateVdi, DIFF_EXTENTS_MAX,
    DaemonStatus, Diff, DiffExtent, DiffPage, FrontendMetrics, Gc, GcPhase, GcSpace, GcStatus,
    Held, Hold, Interval, IntervalPage, Ledger, Mounted, NbdEndpoint, OpenReport, PAGE_MAX, Parent,
    Past, Removed, Rollback, Series, Snapshot, SnapshotPage, Space, Stats, StoreSettings,
    TakeSeries, TakeSnapshot, Upgrade, Upgrading, Vdi, VdiPage, Write, WritePage,
};
pub use url::{percent_decode, percent_encode};
