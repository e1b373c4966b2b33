//! The check of a store in use.
//!
//! The roots of one published checkpoint are walked as the offline check walks them. Until that has
//! ended, nodes that checkpoints release are held back, as for a mark of the garbage collection, so that
//! what guests go on to do cannot look like damage; who needs space ends it. It looks at metadata only,
//! so that does not take long. Data is then read by scrub, which holds nothing back.
//!
//! What it leaves out, as both change while it looks: the log, and the older slot.
//!
//! Memory: as the offline check, some 50 bytes for each node of the trees, and three bits for each block.

use std::rc::Rc;

use base::Pba;
use ondisk::SlotState;

use super::examine;
use super::{CheckProgress, CheckReport, CheckStage, Finding, FindingKind, NotedHead};
use crate::engine::Engine;
use crate::{Damage, DamageKind, Error, Owner, ScrubEnd};

/// Findings that are listed.
const FINDINGS_MAX: usize = super::audit::FINDINGS_MAX;

impl Engine {
    /// Checks the store while it is in use.
    ///
    /// # Errors
    /// See [`crate::Store::check`].
    pub(crate) async fn check_online(
        self: &Rc<Self>,
        read_data: bool,
        rate_bytes: Option<u64>,
        noted: &[NotedHead],
        progress: &dyn Fn(CheckProgress),
    ) -> Result<CheckReport, Error> {
        self.go_on()?;
        progress(CheckProgress { stage: CheckStage::Tables, done: 0, total: 0 });
        if !self.read_only {
            self.checkpoint(SlotState::Running).await?;
        }
        let (slot, live, held_back) = self.hold_back().await?;
        let report = examine::examine_cut(self, &slot, &live, noted, progress).await;
        self.let_go(held_back);
        let mut report = report?;
        if read_data {
            self.check_data(&mut report, rate_bytes, progress).await?;
        }
        Ok(report)
    }

    async fn check_data(
        self: &Rc<Self>,
        report: &mut CheckReport,
        rate_bytes: Option<u64>,
        progress: &dyn Fn(CheckProgress),
    ) -> Result<(), Error> {
        let total = self.scrub_status().total_blocks;
        progress(CheckProgress { stage: CheckStage::Data, done: 0, total });
        let pass = self.begin_scrub_anew(rate_bytes).await;
        let pass = self.scrubbed(pass).await;
        match pass.end {
            ScrubEnd::Finished => {}
            ScrubEnd::Stopped => {
                return Err(Error::refused(base::ErrorKind::Busy, "scrub was stopped meanwhile"));
            }
            ScrubEnd::Failed(why) => {
                return Err(Error::refused(base::ErrorKind::Io, format!("data is unread: {why}")));
            }
        }
        report.counts.data_blocks_verified = pass.read_blocks;
        for damage in &pass.damages {
            let is_known = report.errors.iter().any(|finding| finding.at == Some(damage.at));
            match (is_known, report.errors.len() < FINDINGS_MAX) {
                (true, _) => {}
                (false, true) => report.errors.push(finding(damage)),
                (false, false) => report.errors_omitted += 1,
            }
        }
        report.errors_omitted += pass.damages_omitted;
        Ok(())
    }
}

fn finding(damage: &Damage) -> Finding {
    let kind = match damage.kind {
        DamageKind::Data => FindingKind::Data,
        DamageKind::Node | DamageKind::Table(_) => FindingKind::Metadata,
    };
    Finding { kind, at: Some(damage.at), message: damage.to_string() }
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let owners: Vec<String> = self.owners.iter().map(Owner::to_string).collect();
        let owners = match self.owners_omitted {
            0 => owners.join(", "),
            more => format!("{} and {more} more disks", owners.join(", ")),
        };
        match &self.kind {
            DamageKind::Table(title) if owners.is_empty() => write!(f, "{title}")?,
            DamageKind::Table(title) => write!(f, "{title} ({owners})")?,
            DamageKind::Data | DamageKind::Node => {
                let last_byte = self.offset.saturating_add(self.length).saturating_sub(1);
                write!(f, "{owners}, bytes {} to {}", self.offset, last_byte)?;
            }
        }
        let last: Pba = self.at.plus(self.block_count.saturating_sub(1));
        let blocks = match self.block_count {
            1 => format!("block {} of the store", self.at),
            _ => format!("blocks {} to {last} of the store", self.at),
        };
        let what = match (self.is_unreadable, self.block_count) {
            (true, _) => "cannot be read",
            (false, 1) => "does not verify",
            (false, _) => "do not verify",
        };
        let node = if self.kind == DamageKind::Node { " (a tree node)" } else { "" };
        write!(f, ": {blocks}{node} {what}")
    }
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut names: Vec<String> = self.head.then(|| self.name.clone()).into_iter().collect();
        names.extend(self.snapshots.iter().map(|number| format!("{}@{number}", self.name)));
        f.write_str(&names.join(", "))?;
        match self.snapshots_omitted {
            0 => Ok(()),
            more => write!(f, " and {more} more snapshots"),
        }
    }
}
